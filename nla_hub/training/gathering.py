"""Documents of a mixture, read once and kept for a run: a file a split, which every process takes its part of.

What comes over a network or from files that may change is read by one process, in order, before anything is computed;
from then on a run depends on nothing outside its directory.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from itertools import islice
from math import ceil
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from nla_hub import yaml_io
from nla_hub.errors import TrainingError
from nla_hub.source_text import Content
from nla_hub.training.corpora import RESERVED, MixedDocument, Mixture, PartReport, Splitter
from nla_hub.training.data import writing

GATHERED_NAME = "gathered.json"
"""Written last: how many documents each split has, and what became of each part."""

INDEX_NAME = "documents.parquet"
"""Split, id and content key of every document that was gathered."""

ROOM = 1.2
"""Documents that are asked for beyond what is wanted on average: hashes do not divide exactly."""


@dataclass(frozen=True)
class Wanted:
    """How many documents a split is to have.

    Attributes:
        least: with fewer the run cannot go on. most: no more are taken.
        setting: of the recipe that says so; None where none does.
    """

    least: int
    most: int
    setting: str | None = None


@dataclass(frozen=True)
class Gathered:
    """What was gathered.

    Attributes:
        documents: of each split.
        parts: what became of each part of the mixture, as plain data (see `corpora.PartReport`).
    """

    documents: dict[str, int]
    parts: list[dict[str, Any]]

    def total(self, name: str) -> int:
        """A count of `PartReport` over all parts."""
        return sum(part[name] for part in self.parts)


def gather(mixture: Mixture, splitter: Splitter, wanted: Mapping[str, Wanted], place: Path) -> Gathered:
    """Read a mixture until every split has what is wanted of it; what was gathered in `place` before is not read again.

    Raises:
        TrainingError: the mixture is too short. RunError: the disk is full.
        InputError, HubError, MissingExtraError: as `Mixture.documents`.
    """
    report = place / GATHERED_NAME
    if report.is_file():
        return Gathered(**json.loads(report.read_text(encoding="utf-8")))
    index: dict[str, list[tuple[str, bytes]]] = {split: [] for split in wanted}
    ids: set[str] = set()
    with ExitStack() as stack:
        with writing(place):
            place.mkdir(parents=True, exist_ok=True)
            files = {split: stack.enter_context(_file(place, split).open("w", encoding="utf-8")) for split in wanted}
        for document in stack.enter_context(closing(mixture.documents())):
            split = splitter.split_of(document.key)
            if split not in wanted or len(index[split]) == wanted[split].most:
                continue
            doc_id = f"{split}-{_unique_id(document, ids)}"
            index[split].append((doc_id, document.key))
            kind = "text" if isinstance(document.content, str) else "messages"
            with writing(place):
                files[split].write(json.dumps({"doc_id": doc_id, kind: document.content}) + "\n")
            if all(len(index[name]) == some.most for name, some in wanted.items()):
                break
        found = {split: len(documents) for split, documents in index.items()}
        _require_enough(found, wanted, splitter, mixture.reports)
        gathered = Gathered(found, [dataclasses.asdict(part) for part in mixture.reports])
        with writing(place):
            for file in files.values():
                file.flush()
                os.fsync(file.fileno())
            _write_index(place / INDEX_NAME, index)
            yaml_io.write_text(report, json.dumps(dataclasses.asdict(gathered), indent=1) + "\n")
    return gathered


def kept_documents(place: Path, split: str, size: int) -> Iterator[list[str]]:
    """The documents of a split in blocks of `size`, in order, as lines that `parsed` reads."""
    with _file(place, split).open(encoding="utf-8") as lines:
        while block := list(islice(lines, size)):
            yield block


def parsed(line: str) -> tuple[str, Content]:
    """Id and content of a kept document."""
    record = json.loads(line)
    return record["doc_id"], record["text"] if "text" in record else record["messages"]


def keys_of(path: Path, *, but: frozenset[str]) -> set[bytes]:
    """Content keys of the documents in an index, those of some splits left out."""
    table = pq.read_table(path)
    pairs = zip(table.column("split").to_pylist(), table.column("key").to_pylist(), strict=True)
    return {key for split, key in pairs if split not in but}


def _file(place: Path, split: str) -> Path:
    return place / f"{split}.jsonl"


def _unique_id(document: MixedDocument, taken: set[str]) -> str:
    """The document's own id where no other one has it, else one made of its content."""
    if document.own_id is None or document.own_id in taken:
        return document.key.hex()
    taken.add(document.own_id)
    return document.own_id


def _write_index(path: Path, documents: Mapping[str, Sequence[tuple[str, bytes]]]) -> None:
    rows = [(split, doc_id, key) for split, pairs in documents.items() for doc_id, key in pairs]
    splits, ids, keys = zip(*rows, strict=True)
    columns = {"split": pa.array(splits), "doc_id": pa.array(ids), "key": pa.array(keys, pa.binary(16))}
    pq.write_table(pa.table(columns), path)


def _require_enough(
    found: Mapping[str, int], wanted: Mapping[str, Wanted], splitter: Splitter, parts: Sequence[PartReport]
) -> None:
    """Raise a TrainingError where a split has fewer documents than it needs."""
    short = {name: some for name, some in wanted.items() if found[name] < some.least}
    if not short:
        return
    faults = [
        f"{name}: {found[name]} of {some.least} documents, {some.least - found[name]} are missing"
        for name, some in short.items()
    ]
    faults += [
        f"{part.data} {'ended' if part.ended else 'goes on'} after {part.given} documents "
        f"({part.bad} bad and {part.repeated} repeated ones left out)"
        for part in parts
    ]
    need = ceil(ROOM * max(some.least / splitter.shares[name] for name, some in short.items()))
    settings = [some.setting for some in short.values() if some.setting is not None]
    steps = [f"lower {' and '.join(settings)}"] if settings else []
    steps.append(f"add documents: about {need} different ones are needed in all")
    if len(parts) > 1:
        steps.append(f"lower the weight of {next(part.data for part in parts if part.ended)}")
    held = " and ".join(f"{share:.0%} for {name}" for name, share in RESERVED.items())
    raise TrainingError(
        "The corpus is too short for this recipe.",
        where="data.mix",
        got=f"{sum(part.given for part in parts)} different documents, of which {held} are always held out",
        faults=faults,
        next_step=", or ".join(steps),
    )
