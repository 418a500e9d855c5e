"""Texts, conversations or token ids -> residual-stream vectors at a site.

Only the trunk runs, and only up to block K. Batches are padded on the right, and every vector is taken from the block's
own output by a hook, which is what `hidden_states[K+1]` holds.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from nla_hub.adapters import Adapter
from nla_hub.batching import check_batch_size, pad_id_of, pad_right
from nla_hub.errors import PositionError, VectorError
from nla_hub.sampling import RowKey, document_hash
from nla_hub.sidecar import Site
from nla_hub.source_text import Content, Encoded, Overflow, context_length, encode_source

Positions = int | Sequence[int] | slice | str | Callable[[Encoded], Sequence[int]]
"""Which tokens of a text: an index (negative counts from the end), several, a slice, "last", "all", "user", "assistant", or
a function from the encoded text to indices."""

NAMED_POSITIONS = ("last", "all", "user", "assistant")


@dataclass(frozen=True, eq=False)  # tensors have no single truth value to compare by
class Activations:
    """Vectors with their provenance.

    Attributes:
        vectors: raw residual-stream vectors, float32 [N, d], on the CPU.
        position: index of each row's token in its whole encoded sequence, BOS included.
        doc_id: the caller's id of each row's document, or its sha256.
        token: the token's text.
        special: whether it is a special token.
        keys: row keys for sampling.
        document: index of each row's document among those captured.
        char_end: character offset in the document's rendered text at which the row's token ends.
        read: tokens that the model had read before each row's token (less than `position` in later pieces of
            overflow="stride").
        context: the end of the text up to each row's token, at most `CONTEXT_CHARACTERS` of it.
        site: where the vectors were taken.
        base_model: what they were taken from.
    """

    vectors: Tensor
    position: tuple[int, ...]
    doc_id: tuple[str, ...]
    token: tuple[str, ...]
    special: tuple[bool, ...]
    keys: tuple[RowKey, ...]
    document: tuple[int, ...]
    char_end: tuple[int, ...]
    site: Site
    base_model: str
    read: tuple[int, ...] = ()
    context: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not self.read:
            object.__setattr__(self, "read", self.position)
        if not self.context:
            object.__setattr__(self, "context", self.token)

    def __len__(self) -> int:
        return len(self.position)

    def __getitem__(self, rows: slice | Sequence[int]) -> Activations:
        index = list(range(len(self)))[rows] if isinstance(rows, slice) else [int(i) for i in rows]

        def pick(values: tuple[Any, ...]) -> tuple[Any, ...]:
            return tuple(values[i] for i in index)

        return Activations(
            self.vectors[index],
            pick(self.position),
            pick(self.doc_id),
            pick(self.token),
            pick(self.special),
            pick(self.keys),
            pick(self.document),
            pick(self.char_end),
            self.site,
            self.base_model,
            pick(self.read),
            pick(self.context),
        )


@contextmanager
def block_outputs(adapter: Adapter, model: nn.Module, site: Site) -> Iterator[list[Tensor]]:
    """While open, collects the output of block K of every forward pass: tensors [rows, length, d]."""
    collected: list[Tensor] = []

    def keep(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        collected.append(output[0] if isinstance(output, tuple) else output)

    handle = adapter.block(model, site).register_forward_hook(keep)
    try:
        yield collected
    finally:
        handle.remove()


def select_positions(encoded: Encoded, positions: Positions, *, where: str = "text") -> list[int]:
    """The indices (into this piece) that `positions` names, in order.

    Raises:
        PositionError: out of range, unknown word, or a role that the text does not have.
    """
    n = len(encoded)
    if isinstance(positions, str):
        if positions == "last":
            return [n - 1]
        if positions == "all":
            return list(range(n))
        if positions in ("user", "assistant"):
            found = [i for i, role in enumerate(encoded.roles) if role == positions]
            if not found:
                raise PositionError(
                    f"The text has no {positions} message.",
                    where=where,
                    next_step='pass messages ([{"role": ..., "content": ...}]), or positions="all"',
                )
            return found
        raise PositionError(
            "Unknown word for positions.",
            where=where,
            got=repr(positions),
            expected=", ".join(map(repr, NAMED_POSITIONS)),
        )
    if isinstance(positions, slice):
        try:
            return list(range(n))[positions]
        except (TypeError, ValueError) as cause:
            raise PositionError(f"This slice cannot be used: {cause}.", where=where, got=repr(positions)) from cause
    if callable(positions):
        positions = positions(encoded)
    chosen = []
    for p in _several(positions):
        try:
            index = operator.index(p)
        except TypeError:
            index = None
        if index is None or isinstance(p, bool):
            raise PositionError("A position is a whole number.", where=where, got=repr(p))
        if not -n <= index < n:
            raise PositionError(
                "The text has no such token.",
                where=where,
                got=f"position {index}",
                expected=f"0 to {n - 1} (or -{n} to -1); BOS is position 0",
            )
        chosen.append(index % n)
    return chosen


def _several(positions: Any) -> list[Any]:
    """One index or several as a list; arrays and tensors (also of no dimension) included."""
    try:
        return list(positions)
    except TypeError:
        return [positions]


def capture(
    adapter: Adapter,
    model: Any,
    tokenizer: Any,
    site: Site,
    texts: Sequence[Content],
    *,
    positions: Positions = "last",
    doc_ids: Sequence[str] | None = None,
    batch_size: int = 32,
    overflow: Overflow = "error",
    parse_special_tokens: bool = False,
    base_model: str = "",
    progress: Callable[[int], None] | None = None,
) -> Activations:
    """Capture the vectors of `texts` at `positions`; all rows are encoded and checked before the model runs.

    Rows keep the order of the texts, and within a text the order of the positions.

    Raises:
        TextError, ContextLengthError, PositionError: with the index of the text.
        VectorError: the model itself produced NaN, infinite or zero vectors.
    """
    check_batch_size(batch_size)
    limit = context_length(model.config)
    pieces: list[tuple[int, Encoded, list[int]]] = []
    for i, content in enumerate(texts):
        where = f"text {i}"
        for encoded in encode_source(
            tokenizer,
            content,
            parse_special_tokens=parse_special_tokens,
            max_length=limit,
            overflow=overflow,
            where=where,
        ):
            pieces.append((i, encoded, select_positions(encoded, positions, where=where)))
    ids = list(doc_ids) if doc_ids is not None else [document_hash(content) for content in texts]
    hashes = [document_hash(content) for content in texts]
    vectors = run_trunk(
        adapter,
        model,
        site,
        [(encoded.ids, chosen) for _, encoded, chosen in pieces],
        pad_id=pad_id_of(tokenizer),
        batch_size=batch_size,
        progress=progress,
    )
    rows = [(i, encoded, p) for i, encoded, chosen in pieces for p in chosen]
    return Activations(
        vectors=vectors,
        position=tuple(encoded.start + p for _, encoded, p in rows),
        doc_id=tuple(ids[i] for i, _, _ in rows),
        token=tuple(_token_text(tokenizer, encoded, p) for _, encoded, p in rows),
        special=tuple(encoded.special[p] for _, encoded, p in rows),
        keys=tuple(RowKey(hashes[i], encoded.start + p) for i, encoded, p in rows),
        document=tuple(i for i, _, _ in rows),
        char_end=tuple(encoded.offsets[p][1] for _, encoded, p in rows),
        site=site,
        base_model=base_model,
        read=tuple(p for _, _, p in rows),
        context=tuple(_context(encoded, p) for _, encoded, p in rows),
    )


CONTEXT_CHARACTERS = 200
"""Text kept before each row's token: enough to tell in which script its document is written."""


def _context(encoded: Encoded, position: int) -> str:
    end = encoded.offsets[position][1]
    return encoded.text[max(0, end - CONTEXT_CHARACTERS) : end]


def run_trunk(
    adapter: Adapter,
    model: Any,
    site: Site,
    sequences: Sequence[tuple[Sequence[int], Sequence[int]]],
    *,
    pad_id: int,
    batch_size: int,
    progress: Callable[[int], None] | None = None,
) -> Tensor:
    """Vectors of (ids, positions) pairs, in order: float32 [total positions, d] on the CPU.

    Sequences of similar length share a batch; padding is on the right and masked.
    """
    width = int(model.config.get_text_config().hidden_size)
    found: dict[int, Tensor] = {}
    order = sorted(range(len(sequences)), key=lambda i: len(sequences[i][0]))
    device = next(model.parameters()).device
    with torch.inference_mode():
        for begin in range(0, len(order), batch_size):
            chunk = order[begin : begin + batch_size]
            ids, mask = pad_right([sequences[i][0] for i in chunk], pad_id)
            with block_outputs(adapter, model, site) as outputs:
                adapter.trunk(model)(input_ids=ids.to(device), attention_mask=mask.to(device), use_cache=False)
            for row, i in enumerate(chunk):
                found[i] = outputs[0][row, list(sequences[i][1])].float().cpu()
            if progress is not None:
                progress(len(chunk))
    if not found:
        return torch.empty(0, width)
    vectors = torch.cat([found[i] for i in range(len(sequences))])
    if not bool(torch.isfinite(vectors).all()):
        bad = (~torch.isfinite(vectors).all(dim=-1)).nonzero().flatten().tolist()
        raise VectorError(
            f"The model itself produced NaN or infinite vectors in {len(bad)} rows.",
            got=f"rows {bad[:10]}",
            next_step="load the model in bfloat16 or float32: float16 overflows in many families",
        )
    return vectors


def _token_text(tokenizer: Any, encoded: Encoded, position: int) -> str:
    return str(tokenizer.decode([encoded.ids[position]]))
