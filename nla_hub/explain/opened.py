"""A job before it runs: its data and its pair opened and held against each other, and what identifies both."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nla_hub.errors import CheckpointError, InputError
from nla_hub.explain.inputs import Dataset, open_dataset
from nla_hub.explain.rows import RowMaker, TextRows, VectorRows
from nla_hub.explain.settings import JobSettings
from nla_hub.geometry import Reference
from nla_hub.loading import Pair, open_pair, open_source
from nla_hub.locate import resolve_pair
from nla_hub.opening import Half, read_contract
from nla_hub.pretrained import LoadOptions, load_config, load_tokenizer
from nla_hub.sidecar import base_family
from nla_hub.source_text import context_length


@dataclass(frozen=True)
class OpenedJob:
    """What is known of a job without any weights.

    Attributes:
        dataset, make_rows: the input, and how its items become rows.
        from_source: vectors of the input were captured at the pair's own site.
        reference: the pair's FVE denominators, None where it has none.
        config: what `job.yaml` says; equal for every run of the same job, wherever its files are.
    """

    settings: JobSettings
    dataset: Dataset
    make_rows: RowMaker
    from_source: bool
    reference: Reference | None
    config: dict[str, Any]


def open_job(settings: JobSettings) -> OpenedJob:
    """Open data and pair; the pair's weights are downloaded, not read.

    Raises:
        InputError: data that cannot be used, or not with this pair. CheckpointError, HubError and their children.
    """
    named = settings.pair
    dataset = open_dataset(**vars(settings.data))
    pair = open_pair(
        resolve_pair(
            named.name,
            ar=named.ar,
            base_model=named.base_model,
            subfolder=named.subfolder,
            ar_subfolder=named.ar_subfolder,
        ),
        sidecar=read_contract(named.sidecar),
    )
    sidecar = pair.sidecar
    from_source = False
    source: Path | None = None
    if dataset.kind == "vectors":
        from_source = _same_site(dataset, pair)
        make: RowMaker = VectorRows(settings, sidecar.d_model)
    else:
        options = LoadOptions()
        source = open_source(pair.base, sidecar, pair.family, pair.name, pair.library, options)
        make = TextRows(settings, load_tokenizer(source), context_length(load_config(source)))
    record = sidecar.fve_reference or (pair.ar.sidecar.fve_reference if pair.ar is not None else None)
    reference = None if record is None else Reference(**vars(record))
    halves: dict[str, Any] = {half.role: _identity(half) for half in (pair.av, pair.ar) if half is not None}
    base: dict[str, Any] = {} if source is None else {"source": fingerprint(source)}
    config = {
        **settings.to_mapping(),
        "nla": pair.name if pair.av is None or pair.av.checkpoint.ref.kind != "directory" else Path(pair.name).name,
        "base_model": None
        if pair.base is None
        else Path(str(pair.base)).name
        if pair.base.is_local
        else str(pair.base),
        "site": {"layer": sidecar.site.layer},
        "d_model": sidecar.d_model,
        "weights": {**halves, **base},
        "engine": named.engine,
        "data": _data(settings, dataset),
        "reference": None if reference is None else vars(reference),
    }
    del config["pair"]
    return OpenedJob(settings, dataset, make, from_source, reference, config)


def _data(settings: JobSettings, dataset: Dataset) -> dict[str, Any]:
    """The data by their contents, and how they are read; each file under its own name, so that differences name it."""
    found = dict(dataset.describe())
    if isinstance(files := found.get("files"), list):
        found["files"] = {
            file["name"]: "gone"
            if file.get("size") is None
            else f"{file['size']} bytes, {str(file.get('sha256'))[:16]}"
            for file in files
        }
    asked = {key: value for key, value in vars(settings.data).items() if key != "name" and value is not None}
    return {**found, **asked}


def _same_site(dataset: Dataset, pair: Pair) -> bool:
    """Whether the input's vectors are known to come from the pair's site.

    Raises:
        InputError: they are known to come from elsewhere, or have another width.
    """
    sidecar, site = pair.sidecar, dataset.site
    if dataset.width not in (None, sidecar.d_model):
        raise InputError(
            "These vectors do not have the width of the pair's model.",
            got=dataset.width,
            expected=sidecar.d_model,
            next_step="check which model they come from: every pair reads one layer of one model",
        )
    if site is None:
        return False
    if site.layer is not None and site.layer != sidecar.site.layer:
        raise InputError(
            "These vectors come from another layer than the one this pair reads.",
            got=f"layer {site.layer}",
            expected=f"layer {sidecar.site.layer}",
            next_step="capture them at that layer, or name a pair for theirs with --nla",
        )
    known = [str(name) for name in (sidecar.base_model, pair.base) if name is not None]
    if site.base_model is None or site.layer is None or not known:
        return False
    if base_family(site.base_model) not in {base_family(name) for name in known}:
        raise InputError(
            "These vectors come from another model than the one this pair reads.",
            got=site.base_model,
            expected=" or ".join(dict.fromkeys(known)),
            next_step="name a pair for that model with --nla",
        )
    return True


def _identity(half: Half) -> dict[str, Any]:
    """What a half is: its commit on the Hub, its contract as it was read (with what the user told), and its files."""
    commit = {} if half.checkpoint.commit is None else {"commit": half.checkpoint.commit}
    folders = {half.files.directory, *half.files.stack, *([half.files.base] if half.files.base else [])}
    contract = json.dumps(half.sidecar.to_mapping(), sort_keys=True, default=str)
    commit |= {"contract": hashlib.sha256(contract.encode()).hexdigest()[:16]}
    return {**commit, "files": "+".join(fingerprint(folder) for folder in sorted(folders))}


EDGE = 2**16
"""Bytes at either end of a file of weights that are looked at: its header, and its last tensor."""


def fingerprint(directory: Path) -> str:
    """What the files of a checkpoint say: 16 hexadecimal digits over the names and contents of its small files, and over name,
    size, beginning and end of its weights. Enough to see that somebody trained on; no proof against who wants to deceive."""
    digest = hashlib.sha256()
    for path in sorted(p for p in directory.iterdir() if p.suffix in (".safetensors", ".json", ".yaml", ".jinja")):
        try:
            with path.open("rb") as file:
                size = path.stat().st_size
                digest.update(f"{path.name}\0{size}\0".encode())
                whole = path.suffix != ".safetensors" or size <= 2 * EDGE
                digest.update(file.read(-1 if whole else EDGE))
                if not whole:
                    file.seek(-EDGE, 2)
                    digest.update(file.read())
        except OSError as cause:
            raise CheckpointError(f"Cannot be read: {cause.strerror or cause}", where=path) from cause
    return digest.hexdigest()[:16]
