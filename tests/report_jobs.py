"""Outputs of batch jobs for the tests of the report: rows of the packaged pair, and rows that a test makes up."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from nla_hub import NLA, yaml_io
from nla_hub.explain.schema import COLUMNS, JOB, MANIFEST, PARTS, part_name, schema
from nla_hub.geometry import Reference
from nla_hub.tiny import world

REFERENCE = Reference("made-up-rows", 500, 0.8, 1.2)
CONFIG: dict[str, Any] = {
    "nla": "tiny",
    "site": {"layer": 3},
    "base_model": "tiny-source",
    "data": {"path": "texts.jsonl", "column": "text"},
    "positions": "all",
    "n": 1,
    "reference": asdict(REFERENCE),
}


def made_up(row: int = 0, **values: Any) -> dict[str, Any]:
    """A row of a job; `mse` follows from `cosine`."""
    found: dict[str, Any] = dict.fromkeys(COLUMNS)
    found |= {"row": row, "document": 0, "position": row, "token": "a", "text": f"words {row}", "status": "ok"}
    found |= {"raw": "<explanation>", "cosine": 0.8, "norm": 10.0, "flags": [], "sample": 0, "model": "tiny"}
    found |= {"context": "a", "char_end": row + 1, **values}
    if found["status"] != "ok":
        found |= {"text": None, "cosine": None}
    if found["mse"] is None and found["cosine"] is not None:
        found["mse"] = 2 * (1 - found["cosine"])
    return found


def of_text(
    tokens: Sequence[str], *, document: int = 0, first: int = 0, doc_id: str | None = "doc", **values: Any
) -> list[dict[str, Any]]:
    """A row for each token of a text that is theirs joined; `values` may be functions of the position."""
    rows, text = [], ""
    for i, token in enumerate(tokens):
        text += token
        own = {name: value(i) if callable(value) else value for name, value in values.items()}
        place = {"document": document, "doc_id": doc_id, "position": i, "token": token}
        rows.append(made_up(first + i, **place | {"context": text[-200:], "char_end": len(text)} | own))
    return rows


def write_job(
    path: Path,
    rows: Iterable[Mapping[str, Any]],
    *,
    block: int = 256,
    config: Mapping[str, Any] | None = None,
    manifest: Mapping[str, Any] | None = None,
) -> Path:
    """The output directory of a job with these rows; without a manifest it is unfinished."""
    (path / PARTS).mkdir(parents=True)
    yaml_io.write_text(path / JOB, yaml_io.dumps(CONFIG | dict(config or {})))
    every = list(rows)
    for i in range(0, len(every), block):
        table = pa.Table.from_pylist([dict(row) for row in every[i : i + block]], schema=schema())
        pq.write_table(table, path / PARTS / part_name(i // block))
    if manifest is not None:
        (path / MANIFEST).write_text(json.dumps(manifest), encoding="utf-8")
    return path


def real_rows(nla: NLA, documents: int, *, seed: int = 0, n: int = 1) -> list[dict[str, Any]]:
    """Every token of documents of the tiny world, explained by a pair."""
    texts = [document.content for document in world.documents(documents, seed, "eval")]
    ids = [f"tiny-world-{i}" for i in range(documents)]
    acts = nla.capture(texts, positions="all", doc_ids=ids)
    found = nla.explain(texts, positions="all", doc_ids=ids, temperature=0.7 if n > 1 else 0, n=n, seed=seed)
    rows = []
    for i, explanation in enumerate(found):
        at = i // n
        place = {"row": i, "document": acts.document[at], "context": acts.context[at], "char_end": acts.char_end[at]}
        rows.append({**dict.fromkeys(COLUMNS), **explanation.to_dict(), **place})
    return rows
