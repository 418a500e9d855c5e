"""Rows of the tiny world with the facts known at each: what the facts table, the probes and steering are made from.

The tiny world is imported inside the functions: it stands above this package in the order of imports.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from torch import Tensor

from nla_hub.capture import Activations, capture
from nla_hub.errors import InputError
from nla_hub.evaluation.protocols import Protocol, choose, eligible_positions, select_rows
from nla_hub.loading import Source
from nla_hub.nla import NLA
from nla_hub.positions import Positions
from nla_hub.pretrained import LoadOptions, load_tokenizer, load_trunk
from nla_hub.sampling import document_hash
from nla_hub.sidecar import Site
from nla_hub.source_text import Content, Encoded, Overflow, context_length, encode_source

if TYPE_CHECKING:
    from nla_hub.tiny import Document

FactValue = Hashable
Facts = Mapping[str, FactValue]

PROBE_SEED = 71
"""Seed of the train-split documents that probes and means are fitted on: a stream of its own."""

PROBE_DOCUMENTS = 3000
PROBE_POSITIONS = 8

LIMIT = 20_000
"""Documents looked through at most for rows with a rare fact."""


def facts_of_world() -> tuple[str, ...]:
    """The facts of a facts table, in its order."""
    from nla_hub.tiny.labels import FACTS

    return ("next_word", "last_word", "kind", *(fact for fact in FACTS if fact != "kind"))


def named(text: str | None) -> Facts:
    """The facts that an explanation names; none for a row without a usable explanation."""
    from nla_hub.tiny.labels import named_facts

    return {} if text is None else dict(named_facts(text))


def facts_at(document: Document, char: int) -> Facts:
    """The facts known after reading `document.text[:char]`."""
    return {fact: value for fact, value in document.facts_at(char).items() if value is not None}


def stream(seed: int, split: Literal["train", "eval"], *, limit: int = LIMIT, first: int = 1000) -> Iterator[Document]:
    """The documents of a stream one after the other, made in growing portions."""
    from nla_hub.tiny import documents

    done, size = 0, min(first, limit)
    while done < limit:
        portion = documents(size, seed, split)
        yield from portion[done:]
        done, size = size, min(2 * size, limit)


@dataclass(frozen=True)
class Row:
    """One row before the model runs: document, token index, character offset after it, and what is known there."""

    document: Document
    position: int
    char: int
    facts: Facts


def encode(tokenizer: Any, document: Document, max_length: int | None) -> Encoded:
    """A document of the tiny world as the source reads it, cut where it is too long.

    Raises:
        InputError: the source renders conversations differently, so the offsets of the facts do not apply.
    """
    where = "a document of the tiny world"
    encoded = encode_source(tokenizer, document.content, max_length=max_length, overflow="truncate", where=where)[0]
    if encoded.text != document.text:
        raise InputError(
            "This source does not render conversations as the tiny world does, so its facts cannot be placed.",
            got=repr(encoded.text[:60]),
            expected=repr(document.text[:60]),
            next_step="evaluate pairs of other sources with nla-eval-v1 and a corpus of your own",
        )
    return encoded


def base_rows(tokenizer: Any, protocol: Protocol, max_length: int | None) -> list[Row]:
    """The rows of a protocol on the tiny world: the first usable documents of the eval stream of its seed.

    Raises:
        InputError: see `select_rows` and `encode`.
    """
    by_text: dict[str, Document] = {}

    def contents() -> Iterator[Any]:
        for document in stream(protocol.seed, "eval", limit=max(LIMIT, 2 * protocol.documents)):
            by_text[document.text] = document
            encode(tokenizer, document, max_length)
            yield document.content

    selection = select_rows(tokenizer, contents(), protocol, max_length=max_length, corpus="tiny world, eval split")
    return [
        Row(by_text[text], p, char, facts_at(by_text[text], char))
        for text, positions, ends in zip(selection.texts, selection.positions, selection.char_ends, strict=True)
        for p, char in zip(positions, ends, strict=True)
    ]


def rows_of(
    tokenizer: Any, document: Document, *, k: int, min_position: int, seed: int, max_length: int | None
) -> list[Row]:
    """`k` rows of a document chosen by hash; none where it has fewer eligible tokens."""
    encoded = encode(tokenizer, document, max_length)
    candidates = eligible_positions(encoded, min_position)
    if len(candidates) < k:
        return []
    chosen = choose(candidates, k, seed=seed, document=document_hash(document.content))
    return [Row(document, p, encoded.offsets[p][1], facts_at(document, encoded.offsets[p][1])) for p in chosen]


def extra_rows(
    tokenizer: Any,
    base: Sequence[Row],
    facts: Sequence[str],
    *,
    wanted: int,
    k: int,
    min_position: int,
    seed: int,
    max_length: int | None,
    limit: int = LIMIT,
) -> tuple[list[Row], dict[str, list[int]]]:
    """Rows of further eval documents for facts that fewer than `wanted` rows of `base` have.

    Documents are taken in order, so the rows counted for a fact are simply the first ones of the stream that have it.

    Returns:
        the extra rows; for each fact the indices of its rows in `base` + extra rows.
    """
    members = {fact: [i for i, row in enumerate(base) if fact in row.facts] for fact in facts}
    known = {row.document.text for row in base}
    open_facts = {"next_word", "last_word"}  # known everywhere, so no event tells of them
    extra: list[Row] = []
    for document in stream(seed, "eval", limit=limit):
        short = [fact for fact in facts if len(members[fact]) < wanted]
        if not short:
            break
        if document.text in known or not (open_facts & set(short) or any(e.fact in short for e in document.events)):
            continue
        known.add(document.text)
        for row in rows_of(tokenizer, document, k=k, min_position=min_position, seed=seed, max_length=max_length):
            lacking = [fact for fact in short if fact in row.facts and len(members[fact]) < wanted]
            if lacking:
                extra.append(row)
                for fact in lacking:
                    members[fact].append(len(base) + len(extra) - 1)
    return extra, members


def capture_rows(nla: NLA | BareSource, rows: Sequence[Row], *, batch_size: int = 64) -> Activations:
    """The vectors of `rows`, in their order; rows of one document stand together."""
    contents: list[Any] = []
    lookup: dict[str, list[int]] = {}
    for row in rows:
        if row.document.text not in lookup:
            lookup[row.document.text] = []
            contents.append(row.document.content)
        lookup[row.document.text].append(row.position)
    return nla.capture(
        contents, positions=lambda encoded: lookup[encoded.text], batch_size=batch_size, overflow="truncate"
    )


@dataclass(frozen=True)
class TrainRows:
    """Vectors of train-split documents with their facts: what probes and difference-of-means are fitted on.

    Attributes:
        vectors: float32 [N, d].
        rows: where they come from.
    """

    vectors: Tensor
    rows: tuple[Row, ...]

    def having(self, fact: str) -> tuple[Tensor, list[FactValue]]:
        """Vectors and values of the rows that have `fact`."""
        index = [i for i, row in enumerate(self.rows) if fact in row.facts]
        return self.vectors[index], [self.rows[i].facts[fact] for i in index]


def train_rows(
    nla: NLA | BareSource,
    *,
    documents: int = PROBE_DOCUMENTS,
    positions: int = PROBE_POSITIONS,
    min_position: int = 10,
    seed: int = PROBE_SEED,
    batch_size: int = 64,
) -> TrainRows:
    """Up to `positions` rows of each of `documents` train-split documents, by the protocol's rule."""
    tokenizer, max_length = source_tokenizer(nla)
    rows: list[Row] = []
    seen: set[str] = set()
    for document in stream(seed, "train", limit=documents, first=documents):
        if document.text in seen:
            continue
        seen.add(document.text)
        encoded = encode(tokenizer, document, max_length)
        candidates = eligible_positions(encoded, min_position)
        chosen = choose(candidates, positions, seed=seed, document=document_hash(document.content))
        rows += [Row(document, p, encoded.offsets[p][1], facts_at(document, encoded.offsets[p][1])) for p in chosen]
    return TrainRows(capture_rows(nla, rows, batch_size=batch_size).vectors, tuple(rows))


class BareSource:
    """A source model without a pair: enough of an NLA to capture rows from it.

    Args:
        directory: of the source.
        layer: K, 0-based; vectors are the output of that block.
    """

    def __init__(self, directory: str | Path, layer: int) -> None:
        self.site = Site(layer)
        loaded = load_trunk(Path(directory), self.site, LoadOptions())
        self.source = Source(loaded, load_tokenizer(Path(directory), trust_remote_code=False), str(directory))

    def capture(
        self, texts: Sequence[Content], positions: Positions, *, batch_size: int, overflow: Overflow
    ) -> Activations:
        """As `NLA.capture`."""
        return capture(
            self.source.loaded.adapter,
            self.source.loaded.model,
            self.source.tokenizer,
            self.site,
            texts,
            positions=positions,
            batch_size=batch_size,
            overflow=overflow,
            base_model=self.source.name,
        )


def source_tokenizer(nla: NLA | BareSource) -> tuple[Any, int | None]:
    """The source's tokenizer and how many tokens the source reads."""
    source = nla.source if isinstance(nla, BareSource) else nla.capture_source
    return source.tokenizer, context_length(source.loaded.model.config)  # whichever is loaded: no second copy
