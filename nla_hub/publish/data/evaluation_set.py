"""The rows that a protocol measures pairs on, as a data set: so that a model card's scores can name what they were measured on.

`eval.parquet` is a file of activations (`activations`) with a few columns more, and its sidecar names the protocol. Where the
documents are this project's own (the tiny world's) it holds their texts and what is known at each row; of other corpora it
holds ids, positions and vectors, because nobody here may give the texts away.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from nla_hub import yaml_io
from nla_hub.errors import HubNotFoundError, PublishError
from nla_hub.evaluation.facts import GATE_ROWS
from nla_hub.evaluation.protocol_rows import ProtocolRows, capture_protocol
from nla_hub.evaluation.protocols import Protocol
from nla_hub.explain.inputs.tables import CONTEXT, LAYER, LENGTH, VECTOR
from nla_hub.hub import UPLOAD_BRANCHES, HubOptions
from nla_hub.hub.data_files import dataset_files, open_dataset_file
from nla_hub.hub.writing import HubWriter
from nla_hub.publish.data.activations import DOCUMENT, sidecar_of
from nla_hub.training.data import write_meta, write_tables

if TYPE_CHECKING:
    from nla_hub.nla import NLA

FILE = "eval.parquet"

COLUMNS: dict[str, str] = {
    "row": "index of the row, from 0; the protocol's own rows come first, in the order in which they are measured",
    "own": "whether FVE and cosine are measured on the row; the others are further rows for facts that few of these have",
    "position": "index of the token in the encoded document, BOS included",
    "key": "what the row's randomness follows from: sha256 of the document, position, sample",
    "token": "the token's text",
    "char_end": "character offset in the rendered document at which the token ends",
    "text": "the document, where it is a text",
    "messages": "the document, where it is a conversation",
    "facts": "what is known at the row; absent facts are null",
    "counts_for": "the facts whose recall counts the row",
}
"""Columns besides those of activations, with their meanings."""

SAME_SET = ("name", "documents", "positions", "min_position", "seed")
"""What of a protocol decides which rows it has; how explanations are drawn does not."""


def write_evaluation_set(
    nla: NLA,
    protocol: Protocol,
    directory: Path,
    *,
    corpus: Path | None = None,
    facts: bool = True,
    fact_rows: int = GATE_ROWS,
    base_model: str | None = None,
    batch_size: int = 64,
) -> Path:
    """Capture the rows of a protocol and write `eval.parquet` with its sidecar; the file.

    Args:
        nla: a pair on the source whose vectors are wanted; its halves are not used.
        corpus: file of documents, for a protocol that names none.
        facts: also further rows of facts that fewer than `fact_rows` of the protocol's rows have (tiny world only).
        base_model: what the sidecar calls the base model; None: as the pair's own does.

    Raises:
        InputError: see `protocol_rows.capture_protocol`. RunError: it cannot be written.
    """
    rows = capture_protocol(nla, protocol, corpus=corpus, facts=facts, fact_rows=fact_rows, batch_size=batch_size)
    table = table_of(rows)
    place = directory / FILE
    write_tables(place, table.schema, [table])
    write_meta(place, len(table), _meta(rows, nla, base_model or nla.sidecar.base_model))
    return place


def table_of(rows: ProtocolRows) -> pa.Table:
    """The rows as a table: the columns of activations, then `COLUMNS`."""
    acts, n = rows.acts, len(rows.acts)
    flat = pa.array(acts.vectors.contiguous().numpy().reshape(-1), type=pa.float32())
    columns: dict[str, Any] = {
        VECTOR: pa.FixedSizeListArray.from_arrays(flat, acts.vectors.shape[1]),
        LAYER: pa.array([acts.site.layer] * n, pa.int32()),
        DOCUMENT: pa.array(acts.doc_id, pa.string()),
        LENGTH: pa.array([p + 1 for p in acts.position], pa.int32()),
        CONTEXT: pa.array(_prefixes(rows), pa.string()),
        "row": pa.array(range(n), pa.int64()),
        "own": pa.array([i < rows.n for i in range(n)], pa.bool_()),
        "position": pa.array(acts.position, pa.int64()),
        "key": pa.array([f"{k.document}:{k.position}:{k.sample}" for k in acts.keys], pa.string()),
        "char_end": pa.array(acts.char_end, pa.int64()),
    }
    if rows.world:
        columns |= _world_columns(rows)
    return pa.table(columns)


def _prefixes(rows: ProtocolRows) -> list[str | None]:
    if not rows.world:
        return [None] * len(rows.acts)
    return [row.document.text[: row.char] for row in rows.world]


def _world_columns(rows: ProtocolRows) -> dict[str, Any]:
    """Texts and facts, where the documents are this project's own."""
    contents = [row.document.content for row in rows.world]
    messages = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))
    names = list(rows.members) or sorted({fact for row in rows.world for fact in row.facts})
    known = [{name: None if (v := row.facts.get(name)) is None else str(v) for name in names} for row in rows.world]
    counted: list[list[str]] = [[] for _ in rows.world]
    for fact, members in rows.members.items():
        for i in members:
            counted[i].append(fact)
    return {
        "token": pa.array(rows.acts.token, pa.string()),
        "text": pa.array([c if isinstance(c, str) else None for c in contents], pa.string()),
        "messages": pa.array([None if isinstance(c, str) else [dict(m) for m in c] for c in contents], messages),
        "facts": pa.array(known, pa.struct([(name, pa.string()) for name in names])),
        "counts_for": pa.array(counted, pa.list_(pa.string())),
    }


def _meta(rows: ProtocolRows, nla: NLA, base_model: str | None) -> dict[str, Any]:
    """What the sidecar says of the rows, besides how many there are."""
    return {
        "stage": "eval",
        "protocol": asdict(rows.protocol),
        "dataset_id": rows.dataset,
        "extraction": {
            "base_model": base_model,
            "base_revision": nla.sidecar.source_revision,
            "d_model": nla.d_model,
            "layer_index": nla.site.layer,
            "norm": "none",
            "corpus": rows.corpus,
            "positions_per_doc": rows.protocol.positions,
        },
    }


def is_published(repo: str, protocol: Protocol, *, base_model: str, layer: int, options: HubOptions) -> bool:
    """Whether a data set on the Hub is the evaluation set of this protocol and site, and no push of it was cut off.

    Raises:
        PublishError: something else lies there, so scores must not name it.
        HubError and its children, but for a data set that is not there.
    """
    try:
        listing = dataset_files(repo, revision=None, options=options)
    except HubNotFoundError:
        return False
    name = sidecar_of(Path(FILE)).name
    if name not in listing.files:
        if any(file.endswith((".parquet", ".jsonl", ".csv")) for file in listing.files):
            raise _another(repo, [f"it has no {name}"])
        return False  # made, and nothing published yet
    with open_dataset_file(listing, name, options) as stream:
        told = yaml_io.loads(stream.read(yaml_io.MAX_BYTES), where=f"{repo}/{name}", error=PublishError)
    wrong = _differences(told, protocol, base_model, layer)
    if wrong:
        raise _another(repo, wrong)
    branches, _ = HubWriter(options).refs(repo, "dataset")
    return not any(name.startswith(UPLOAD_BRANCHES) for name in branches)


def _differences(told: Mapping[str, Any], protocol: Protocol, base_model: str, layer: int) -> list[str]:
    there = told.get("protocol")
    extraction = told.get("extraction")
    there = there if isinstance(there, Mapping) else {}
    extraction = extraction if isinstance(extraction, Mapping) else {}
    pairs = [(f"protocol.{key}", there.get(key), getattr(protocol, key)) for key in SAME_SET]
    pairs += [
        ("base model", extraction.get("base_model"), base_model),
        ("layer", extraction.get("layer_index"), layer),
    ]
    return [f"{what}: {found!r} there, {wanted!r} here" for what, found, wanted in pairs if found != wanted]


def _another(repo: str, faults: list[str]) -> PublishError:
    return PublishError(
        "This data set is not the evaluation set that these scores were measured on.",
        where=repo,
        faults=faults,
        next_step="name another one, or one that is not there yet, with --evaluation-set OWNER/NAME",
    )
