"""Items of the input -> rows -> blocks, with everything that is known before a model runs.

A block holds what its rows need and nothing else, so it can be computed anywhere. Where a document is cut by the end of a
block, both blocks hold its beginning.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import torch

from nla_hub.capture import context_of, token_text
from nla_hub.errors import InputError
from nla_hub.explain.inputs import BadItem, Item, TextItem, VectorItem
from nla_hub.explain.settings import JobSettings
from nla_hub.geometry import bad_rows
from nla_hub.positions import select_in_pieces
from nla_hub.sampling import BARE_POSITION, document_hash, vector_hash
from nla_hub.source_text import encode_source


@dataclass(frozen=True)
class PlannedRow:
    """A row before its vector is known.

    Attributes:
        row, document, doc_id, sample, token, char_end, context, copy_of, error: columns of the part.
        position: of the token in its document; -1 for a bare vector, None where there is no token.
        hash: the document's, or the vector's: with position and sample the row's key.
        source: index of its sequence or vector in the block; -1 for a row in error.
        read: index of the token in that sequence.
    """

    row: int
    document: int
    doc_id: str
    hash: str
    position: int | None = None
    sample: int = 0
    token: str | None = None
    special: bool = False
    char_end: int | None = None
    context: str | None = None
    source: int = -1
    read: int = 0
    copy_of: int | None = None
    error: str | None = None


@dataclass(frozen=True)
class Block:
    """Rows `index * size` to `index * size + len(rows)` of the job.

    Attributes:
        sequences: token ids of the documents, int32, cut behind the last token that is asked for.
        vectors: raw float32 [d] each, of a data set of vectors.
    """

    index: int
    rows: tuple[PlannedRow, ...]
    sequences: tuple[np.ndarray, ...] = ()
    vectors: tuple[np.ndarray, ...] = ()


@dataclass(frozen=True)
class ItemRows:
    """The rows of one item: `rows` with `source` as an index into `sources`, and no global numbers yet."""

    rows: tuple[PlannedRow, ...]
    sources: tuple[np.ndarray, ...]
    hash: bytes | None
    """What makes two items compute the same; None where nothing is computed."""


class RowMaker(Protocol):
    """Items to rows; one for texts, one for vectors."""

    def __call__(self, item: Item, document: int) -> ItemRows: ...


def in_error(item: Item, document: int, reason: str, doc_hash: str = "") -> ItemRows:
    """The one row of an item that cannot be computed."""
    return ItemRows((PlannedRow(-1, document, item.doc_id or doc_hash or item.where, "", error=reason),), (), None)


@dataclass(frozen=True)
class TextRows:
    """Documents to rows, at the job's positions."""

    settings: JobSettings
    tokenizer: Any
    max_length: int | None

    def __call__(self, item: Item, document: int) -> ItemRows:
        """The rows of a document; of one that cannot be encoded as asked, a row in error."""
        if isinstance(item, BadItem):
            return in_error(item, document, item.error)
        assert isinstance(item, TextItem)
        settings, digest = self.settings, document_hash(item.content)
        rows: list[PlannedRow] = []
        sources: list[np.ndarray] = []
        try:
            pieces = encode_source(
                self.tokenizer,
                item.content,
                parse_special_tokens=settings.parse_special_tokens,
                max_length=self.max_length,
                overflow=settings.overflow,
                where=item.where,
            )
            found = select_in_pieces(pieces, settings.positions, where=item.where, seed=settings.seed)
            for encoded, chosen in zip(pieces, found, strict=True):
                for p in chosen:
                    row = PlannedRow(
                        row=-1,
                        document=document,
                        doc_id=item.doc_id or digest,
                        hash=digest,
                        position=encoded.start + p,
                        token=token_text(self.tokenizer, encoded, p),
                        special=encoded.special[p],
                        char_end=encoded.offsets[p][1],
                        context=context_of(encoded, p),
                        source=len(sources),
                        read=p,
                    )
                    rows += [replace(row, sample=sample) for sample in range(settings.n)]
                if chosen:
                    sources.append(np.array(encoded.ids[: max(chosen) + 1], dtype=np.int32))
        except InputError as error:
            return in_error(item, document, error.one_line(), digest)
        return ItemRows(tuple(rows), tuple(sources), bytes.fromhex(digest))


@dataclass(frozen=True)
class VectorRows:
    """Vectors to rows; `from_source` where they were captured at the pair's own site."""

    settings: JobSettings
    d: int

    def __call__(self, item: Item, document: int) -> ItemRows:
        """The rows of a vector; of one without a direction, a row in error."""
        if isinstance(item, BadItem):
            return in_error(item, document, item.error)
        assert isinstance(item, VectorItem)
        vector = np.ascontiguousarray(item.vector, dtype=np.float32)
        if vector.shape != (self.d,):
            reason = f"{item.where}: This vector has another width. (got {list(vector.shape)}, expected [{self.d}])."
            return in_error(item, document, reason)
        tensor = torch.from_numpy(vector.copy())
        digest = vector_hash(tensor)
        if fault := bad_rows(tensor[None]).get(0):
            return in_error(item, document, f"{item.where}: The vector has no direction: it is {fault}.", digest)
        position = BARE_POSITION if item.position is None else item.position
        row = PlannedRow(-1, document, item.doc_id or digest, digest, position=position, context=item.context, source=0)
        rows = tuple(replace(row, sample=sample) for sample in range(self.settings.n))
        # Position and context decide about flags, so rows that differ in them are no copies of each other.
        place = f"{digest}\x1f{position}\x1f{item.context}".encode("utf-8", "surrogatepass")
        return ItemRows(rows, (vector,), hashlib.sha256(place).digest())


def blocks_of(
    items: Iterable[tuple[int, ItemRows, int | None]], size: int, *, index: int = 0, skip: int = 0
) -> Iterator[tuple[Block, int, int]]:
    """Cut the rows of items into blocks.

    Args:
        items: document index, its rows, and the global index of the first row of an equal item before it (None: there is
            none, so its rows are computed where they stand).
        index: number of the first block.
        skip: rows of the first item that an earlier block has.

    Yields:
        A block, and where the next one begins: document and rows of it that are in blocks already.
    """
    rows: list[PlannedRow] = []
    sources: list[np.ndarray] = []
    vectors = False
    document = -1
    for document, item, first in items:
        begin, places = skip, dict[int, int]()
        skip = 0
        while begin < len(item.rows):
            taken = item.rows[begin : begin + size - len(rows)]
            for offset, row in enumerate(taken, start=begin):
                number = index * size + len(rows)
                original = None if first is None else first + offset
                if original is not None and original // size < index:
                    row = replace(row, copy_of=original)
                if row.source >= 0:
                    if row.source not in places:
                        places[row.source] = len(sources)
                        sources.append(item.sources[row.source])
                    row = replace(row, source=places[row.source])
                    vectors = item.sources[0].dtype == np.float32
                rows.append(replace(row, row=number))
            begin += len(taken)
            if len(rows) == size:
                done = begin == len(item.rows)
                yield _block(index, rows, sources, vectors), document + done, 0 if done else begin
                index, rows, sources, places = index + 1, [], [], {}
    if rows:
        yield _block(index, rows, sources, vectors), document + 1, 0


def _block(index: int, rows: list[PlannedRow], sources: list[np.ndarray], vectors: bool) -> Block:
    if vectors:
        return Block(index, tuple(rows), vectors=tuple(sources))
    reads: dict[int, int] = {}
    for row in rows:
        if row.source >= 0:
            reads[row.source] = max(reads.get(row.source, 0), row.read)
    return Block(index, tuple(rows), tuple(ids[: reads[i] + 1] for i, ids in enumerate(sources)))
