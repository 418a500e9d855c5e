"""Files of activations as they are published: this project's columns, a sidecar beside each file, every vector finite.

They lie at the root of their repository, so `--data hf://datasets/OWNER/NAME` reads them all; that is why all of them are
of one site. An evaluation set is such a data set too: its sidecar names the protocol.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.types as pt

from nla_hub import yaml_io
from nla_hub.errors import PublishError, SidecarError
from nla_hub.explain.inputs.dataset import SIDECAR_SUFFIX
from nla_hub.explain.inputs.tables import CONTEXT, LAYER, LENGTH, VECTOR
from nla_hub.publish.data.columns import Against, Faults, batches, schema_of, text_faults, vector_faults, vector_width
from nla_hub.publish.release import Entry
from nla_hub.sidecar_dialects import present

DOCUMENT = "doc_id"

REQUIRED: dict[str, tuple[Callable[[pa.DataType], bool], str]] = {
    VECTOR: (lambda type_: vector_width(type_) is not None, "fixed_size_list<float32, d>"),
    LAYER: (pt.is_integer, "int32"),
    DOCUMENT: (lambda type_: bool(pt.is_string(type_) or pt.is_large_string(type_)), "string"),
    LENGTH: (pt.is_integer, "int32"),
    CONTEXT: (lambda type_: bool(pt.is_string(type_) or pt.is_large_string(type_)), "string"),
}
"""Columns that every file has (the reference's names), how their types are known, and what they are."""

FILE_NAME = re.compile(r"[A-Za-z0-9][\w.-]*\.parquet")
"""What a file may be called: what every tool that reads the Hub takes."""


@dataclass(frozen=True)
class ActivationFile:
    """One file: its rows, its columns, and what its sidecar says."""

    path: Path
    rows: int
    columns: tuple[str, ...]
    sidecar: Mapping[str, Any]

    @property
    def name(self) -> str:
        """As it is published."""
        return self.path.name


@dataclass(frozen=True)
class ActivationFacts:
    """A data set of activations, all of one site.

    Attributes:
        path: the directory or file that was named.
        width, layer, base_model: d, K, and what the vectors were taken from.
        protocol: of an evaluation set what its sidecar says of the protocol; None for other data.
    """

    path: Path
    files: tuple[ActivationFile, ...]
    width: int
    layer: int
    base_model: str
    protocol: Mapping[str, Any] | None

    @property
    def rows(self) -> int:
        """Of all files."""
        return sum(file.rows for file in self.files)

    def entries(self) -> list[Entry]:
        """The files, each with its sidecar."""
        return [
            Entry(path.name, path) for file in self.files for path in (file.path, sidecar_of(file.path))
        ]  # a sidecar speaks of its file alone, so no other file of the directory is taken


def sidecar_of(path: Path) -> Path:
    """The sidecar beside a file."""
    return path.with_name(path.name + SIDECAR_SUFFIX)


def survey(path: Path, rules: Against) -> ActivationFacts:
    """Look at every row of the parquet files in a directory, or of one file.

    Raises:
        PublishError: columns that are missing or of another type, a sidecar that is missing or says something else, a vector
            that is not finite, a token in a text, files of several sites; all faults at once.
    """
    found = sorted(p for p in path.iterdir() if FILE_NAME.fullmatch(p.name)) if path.is_dir() else [path]
    faults = Faults()
    files: list[ActivationFile] = []
    sites: dict[tuple[int, int, str], str] = {}
    for file in found:
        before = len(faults.listed) + faults.more
        schema = _checked_schema(file, faults)
        sidecar = _read_sidecar(file, faults)
        if schema is None or sidecar is None:
            continue
        site = _site(file, schema, sidecar, faults)
        rows = _check_rows(file, schema, None if site is None else site[1], rules, faults)
        if sidecar.get("row_count") != rows:
            faults.add(f"{file.name}: it has {rows} rows, its sidecar says {sidecar.get('row_count')}")
        if site is not None and len(faults.listed) + faults.more == before:
            sites.setdefault(site, file.name)
            files.append(ActivationFile(file, rows, tuple(schema.names), sidecar))
    if len(sites) > 1:
        for (width, layer, base), name in sites.items():
            faults.add(
                f"{name}: {width} numbers of layer {layer} of {base}; publish each site as a data set of its own"
            )
    if faults or not files:
        raise PublishError(
            "These activations must not be published as they are."
            if faults
            else "There is no file of activations here.",
            where=path,
            faults=faults.lines(),
            expected=f"parquet files with {', '.join(REQUIRED)}, each with FILE{SIDECAR_SUFFIX} beside it",
            next_step="a token that stood in a text is no longer a secret: revoke it"
            if any(" column " in fault and " row " in fault for fault in faults.listed)
            else f"write what is missing; FILE{SIDECAR_SUFFIX} holds kind: nla_dataset, row_count, and extraction with "
            "base_model, d_model and layer_index",
        )
    (width, layer, base), _ = next(iter(sites.items()))
    protocol = next((file.sidecar["protocol"] for file in files if "protocol" in file.sidecar), None)
    return ActivationFacts(path, tuple(files), width, layer, base, protocol)


def _checked_schema(file: Path, faults: Faults) -> pa.Schema | None:
    """The columns of a file; None where they are not those of activations."""
    schema = schema_of(file)
    wrong = [
        f"{file.name}: no column {name} ({spelled})"
        if name not in schema.names
        else f"{file.name}: the column {name} is {schema.field(name).type}, not {spelled}"
        for name, (fits, spelled) in REQUIRED.items()
        if name not in schema.names or not fits(schema.field(name).type)
    ]
    wrong += [
        f"{file.name}: the column {field.name} holds bytes, which nobody can look through"
        for field in schema
        if pt.is_binary(field.type) or pt.is_large_binary(field.type) or pt.is_fixed_size_binary(field.type)
    ]
    for fault in wrong:
        faults.add(fault)
    return None if wrong else schema


def _read_sidecar(file: Path, faults: Faults) -> Mapping[str, Any] | None:
    beside = sidecar_of(file)
    if not beside.is_file():
        faults.add(f"{file.name}: there is no {beside.name} beside it (kind: nla_dataset, row_count, extraction)")
        return None
    try:
        found = yaml_io.read(beside, error=SidecarError)
    except SidecarError as error:
        faults.add(error.one_line())
        return None
    if found.get("kind") != "nla_dataset":
        faults.add(f"{beside.name}: kind is {found.get('kind')!r}, not 'nla_dataset'")
    return found


def _site(file: Path, schema: pa.Schema, sidecar: Mapping[str, Any], faults: Faults) -> tuple[int, int, str] | None:
    """Width, layer and base model, as columns and sidecar agree on them; None where they do not."""
    width = vector_width(schema.field(VECTOR).type)
    assert width is not None
    base = next((value for _, value in present(sidecar, "base_checkpoint")), None)
    layer = next((value for _, value in present(sidecar, "extraction_layer_index")), None)
    told = sidecar.get("extraction")
    d = told.get("d_model") if isinstance(told, Mapping) else None
    wrong = []
    if not isinstance(base, str) or not base:
        wrong.append("no base model (extraction.base_model)")
    if type(layer) is not int:
        wrong.append("no layer (extraction.layer_index)")
    if d is not None and d != width:
        wrong.append(f"d_model {d}; the vectors have {width} numbers")
    for fault in wrong:
        faults.add(f"{sidecar_of(file).name} says {fault}")
    return None if wrong or not isinstance(base, str) or not isinstance(layer, int) else (width, layer, base)


def _check_rows(file: Path, schema: pa.Schema, layer: int | None, rules: Against, faults: Faults) -> int:
    """Look at every row; their number."""
    rows = 0
    for batch in batches(file):
        vector_faults(batch.column(VECTOR), where=file.name, first=rows, faults=faults)
        layers = batch.column(LAYER).to_numpy(zero_copy_only=False)
        for i in np.flatnonzero(layers != layer) if layer is not None else ():
            faults.add(f"{file.name}, row {rows + int(i)}: of layer {layers[i]}; the sidecar says {layer}")
        text_faults(
            batch,
            where=file.name,
            first=rows,
            rules=lambda name: rules.own if name == DOCUMENT else rules.documents,
            faults=faults,
        )
        rows += batch.num_rows
    return rows
