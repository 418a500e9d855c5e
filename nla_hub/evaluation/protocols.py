"""Named evaluation protocols: which documents, which positions, how texts are drawn.

A figure is only comparable with another one of the same protocol, so a protocol that is changed in any way loses its
name (`Protocol.changed`). Positions are chosen by hashing (seed, document, position): they depend on nothing else, so
adding or dropping documents moves no other row.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from nla_hub.errors import InputError, UnknownNameError
from nla_hub.sampling import document_hash
from nla_hub.source_text import Content, Encoded, encode_source


@dataclass(frozen=True)
class Protocol:
    """What is measured on what.

    Attributes:
        name: as it is printed beside every figure.
        documents: number of documents.
        positions: positions a document.
        min_position: smallest token index (BOS is 0); special tokens are never chosen.
        seed: of the choice of positions, and of sampling where `temperature` > 0.
        corpus: "tiny" (the reserved split of the tiny world), or None: the caller names a file.
        temperature, samples, max_new_tokens: how explanations are drawn; 0 is greedy.
    """

    name: str
    documents: int
    positions: int
    min_position: int
    seed: int = 0
    corpus: str | None = None
    temperature: float = 0.0
    samples: int = 1
    max_new_tokens: int = 200

    @property
    def rows(self) -> int:
        """Number of activations."""
        return self.documents * self.positions

    def changed(self, **changes: Any) -> Protocol:
        """A copy with other settings, whose name says so; the same protocol where nothing differs."""
        real = {key: value for key, value in changes.items() if value is not None and getattr(self, key) != value}
        if not real:
            return self
        for key in ("documents", "positions", "samples", "max_new_tokens"):
            if key in real and (isinstance(real[key], bool) or not isinstance(real[key], int) or real[key] < 1):
                raise InputError(f"{key} is a whole number from 1 up.", got=repr(real[key]))
        marks = "".join(f"+{key}={value}" for key, value in sorted(real.items()))
        return replace(self, name=self.name + marks, **real)


PROTOCOLS: dict[str, Protocol] = {
    p.name: p
    for p in (
        Protocol("tiny-eval-v1", documents=600, positions=2, min_position=10, corpus="tiny"),
        Protocol("nla-eval-v1", documents=200, positions=5, min_position=50),
    )
}


def get_protocol(protocol: str | Protocol) -> Protocol:
    """The protocol of that name (or the one given); raises an UnknownNameError with near names."""
    if isinstance(protocol, Protocol):
        return protocol
    if protocol not in PROTOCOLS:
        raise UnknownNameError("evaluation protocol", protocol, PROTOCOLS)
    return PROTOCOLS[protocol]


# -- positions -----------------------------------------------------------------------------------------------


def eligible_positions(encoded: Encoded, min_position: int) -> list[int]:
    """Indices of the ordinary tokens of `encoded` from `min_position` on."""
    return [p for p in range(min_position, len(encoded)) if not encoded.special[p]]


def choose(candidates: Sequence[int], k: int, *, seed: int, document: str) -> list[int]:
    """`k` of `candidates`, ascending: those with the smallest sha256 of (seed, document, candidate)."""

    def rank(p: int) -> bytes:
        return hashlib.sha256(f"{seed}\x1f{document}\x1f{p}".encode()).digest()

    return sorted(sorted(candidates, key=rank)[:k])


@dataclass(frozen=True)
class Selection:
    """The rows of a protocol before the model runs.

    Attributes:
        contents: one text or conversation a document.
        positions: chosen token indices of each document.
        char_ends: character offset at which each chosen token ends, same shape.
        texts: the exact encoded string of each document.
        read: how many documents of the corpus were looked at.
    """

    contents: tuple[Content, ...]
    positions: tuple[tuple[int, ...], ...]
    char_ends: tuple[tuple[int, ...], ...]
    texts: tuple[str, ...]
    read: int

    def lookup(self) -> dict[str, list[int]]:
        """Encoded string -> positions, for `NLA.capture(positions=...)`."""
        return {text: list(p) for text, p in zip(self.texts, self.positions, strict=True)}


def select_rows(
    tokenizer: Any, contents: Iterable[Content], protocol: Protocol, *, max_length: int | None, corpus: str
) -> Selection:
    """The first `protocol.documents` distinct documents that have enough eligible positions, and these positions.

    Longer documents than the model reads are cut at their end. The corpus is read only as far as needed.

    Raises:
        InputError: too few such documents; says how many documents and rows are missing.
        TextError: a document that cannot be encoded, by its index.
    """
    kept: list[Content] = []
    positions: list[tuple[int, ...]] = []
    ends: list[tuple[int, ...]] = []
    texts: list[str] = []
    seen: set[str] = set()
    read = 0
    for index, content in enumerate(contents):
        if len(kept) == protocol.documents:
            break
        read += 1
        encoded = encode_source(
            tokenizer, content, max_length=max_length, overflow="truncate", where=f"{corpus}: document {index}"
        )[0]
        candidates = eligible_positions(encoded, protocol.min_position)
        if len(candidates) < protocol.positions or encoded.text in seen:
            continue
        seen.add(encoded.text)
        chosen = choose(candidates, protocol.positions, seed=protocol.seed, document=document_hash(content))
        kept.append(content)
        positions.append(tuple(chosen))
        ends.append(tuple(encoded.offsets[p][1] for p in chosen))
        texts.append(encoded.text)
    if len(kept) < protocol.documents:
        missing = protocol.documents - len(kept)
        raise InputError(
            f"{missing} documents ({missing * protocol.positions} rows) are missing for {protocol.name}.",
            where=corpus,
            got=f"{len(kept)} usable documents among {read}",
            expected=f"{protocol.documents} distinct documents with at least {protocol.positions} ordinary tokens "
            f"from position {protocol.min_position} on",
            next_step="name a larger corpus, or measure on fewer documents (--documents N changes the protocol's name)",
        )
    return Selection(tuple(kept), tuple(positions), tuple(ends), tuple(texts), read)


# -- corpora -------------------------------------------------------------------------------------------------


def read_corpus(path: str | Path) -> Iterator[Content]:
    """Documents of a local file, one after the other.

    `.jsonl`: one object a line with `text` or `messages`. `.parquet`: a column `text` or `messages`. Anything else is
    text: documents are separated by blank lines where the file has any, otherwise each line is one.

    Raises:
        InputError: no such file, a line that is not such an object, no such column, an empty file.
    """
    file = Path(path)
    if not file.is_file():
        raise InputError("There is no such file.", where=file, expected="a .txt, .jsonl or .parquet file")
    readers = {".jsonl": _read_jsonl, ".ndjson": _read_jsonl, ".parquet": _read_parquet}
    found = False
    for content in readers.get(file.suffix.lower(), _read_text)(file):
        found = True
        yield content
    if not found:
        raise InputError("This corpus holds no document.", where=file)


def _read_text(file: Path) -> Iterator[Content]:
    try:
        with file.open(encoding="utf-8") as lines:
            blocks = _has_blank_line(lines)
        with file.open(encoding="utf-8") as lines:
            block: list[str] = []
            for line in lines:
                if blocks and line.strip():
                    block.append(line)
                elif blocks and block:
                    yield "".join(block).strip()
                    block = []
                elif not blocks and line.strip():
                    yield line.strip()
            if block:
                yield "".join(block).strip()
    except UnicodeDecodeError as cause:
        raise InputError("This is no UTF-8 text.", where=file, expected="a .txt, .jsonl or .parquet file") from cause


def _has_blank_line(lines: Iterable[str]) -> bool:
    """Whether a blank line stands between two lines with text."""
    begun = gap = False
    for line in lines:
        if line.strip():
            if gap:
                return True
            begun = True
        elif begun:
            gap = True
    return False


def _read_jsonl(file: Path) -> Iterator[Content]:
    with file.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                value = json.loads(line)
            except ValueError as cause:
                raise InputError(f"This line is no JSON: {cause}", where=f"{file}:{number}") from cause
            yield _content_of(value, where=f"{file}:{number}")


def _content_of(value: Any, *, where: str) -> Content:
    if isinstance(value, dict):
        if isinstance(value.get("messages"), list):
            messages: Content = [dict(message) for message in value["messages"]]
            return messages
        if isinstance(value.get("text"), str):
            return str(value["text"])
    raise InputError("An object with 'text' or 'messages' is expected here.", where=where, got=type(value).__name__)


def _read_parquet(file: Path) -> Iterator[Content]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table = pq.ParquetFile(file)
    except (pa.ArrowInvalid, OSError) as cause:
        raise InputError(f"This is no parquet file: {cause}", where=file) from cause
    names = [name for name in ("messages", "text") if name in table.schema_arrow.names]
    if not names:
        raise InputError(
            "This table has neither a column 'text' nor 'messages'.",
            where=file,
            got=", ".join(table.schema_arrow.names),
        )
    row = 0
    for batch in table.iter_batches(columns=names[:1]):
        for value in batch.to_pylist():
            yield _content_of(value, where=f"{file}: row {row}")
            row += 1


# -- leaks ---------------------------------------------------------------------------------------------------


def overlap(evaluation: Iterable[Content], training: Iterable[Content]) -> list[int]:
    """Indices of the evaluation documents that stand verbatim in the training documents.

    White space at both ends does not count, so a document that was stripped on one side is still noticed.
    """

    def key(content: Content) -> str:
        return document_hash(content.strip() if isinstance(content, str) else content)

    seen = {key(content) for content in training}
    return [i for i, content in enumerate(evaluation) if key(content) in seen]


def require_disjoint(evaluation: Sequence[Content], training: Iterable[Content], *, at_most: float = 0.005) -> int:
    """The number of evaluation documents that stand in `training`; an InputError where it is a share of `at_most` or more.

    The default share is that of definitions: less than 0.5 % verbatim.
    """
    shared = overlap(evaluation, training)
    if evaluation and len(shared) / len(evaluation) >= at_most:
        raise InputError(
            f"{len(shared)} of {len(evaluation)} evaluation documents stand verbatim in the training data.",
            expected=f"below {at_most:.1%}",
            faults=[f"document {i}" for i in shared[:5]],
            next_step="evaluate on documents that were held out, or leave these out of training",
        )
    return len(shared)
