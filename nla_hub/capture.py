"""Texts, conversations or token ids -> residual-stream vectors at a site.

Only the trunk runs, and only up to block K, also where the model has more. Every vector is taken from the block's own
output by a hook, which is what `hidden_states[K+1]` holds. Attention is causal, so what stands behind the last token that
is asked for is not read at all, and a long document is read chunk by chunk with a cache.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from nla_hub.adapters import Adapter
from nla_hub.batching import (
    PASS_TOKENS,
    by_length,
    check_batch_size,
    check_pass_tokens,
    pad_id_of,
    pad_right,
    run_batches,
)
from nla_hub.errors import VectorError
from nla_hub.positions import Positions, select_in_pieces
from nla_hub.sampling import RowKey, document_hash
from nla_hub.sidecar import Site
from nla_hub.source_text import Content, Encoded, Overflow, context_length, encode_source
from nla_hub.steering import is_steered


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


class _Reached(Exception):
    """Raised behind block K: no error, nothing above it needs to run."""


@contextmanager
def block_outputs(adapter: Adapter, model: nn.Module, site: Site, *, stop: bool = False) -> Iterator[list[Tensor]]:
    """While open, collects the output of block K of every forward pass of this thread: tensors [rows, length, d].

    Args:
        stop: the first pass ends there, and the context with it: no block above K runs.
    """
    collected: list[Tensor] = []
    mine = threading.get_ident()

    def keep(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if threading.get_ident() != mine:
            return
        collected.append(output[0] if isinstance(output, tuple) else output)
        if stop:
            raise _Reached

    handle = adapter.block(model, site).register_forward_hook(keep)
    try:
        yield collected
    except _Reached:
        pass
    finally:
        handle.remove()


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
    seed: int = 0,
    base_model: str = "",
    chunk_tokens: int = PASS_TOKENS,
    progress: Callable[[int], None] | None = None,
) -> Activations:
    """Capture the vectors of `texts` at `positions`; all rows are encoded and checked before the model runs.

    Rows keep the order of the texts, and within a text the order of the positions. `batch_size`, `chunk_tokens`,
    `progress`: see `run_trunk`.

    Raises:
        TextError, ContextLengthError, PositionError: with the index of the text.
        VectorError: the model itself produced NaN, infinite or zero vectors.
    """
    check_batch_size(batch_size)
    check_pass_tokens(chunk_tokens)
    limit = context_length(model.config)
    pieces: list[tuple[int, Encoded, list[int]]] = []
    for i, content in enumerate(texts):
        where = f"text {i}"
        found = encode_source(
            tokenizer,
            content,
            parse_special_tokens=parse_special_tokens,
            max_length=limit,
            overflow=overflow,
            where=where,
        )
        chosen = select_in_pieces(found, positions, where=where, seed=seed)
        pieces += [(i, encoded, indices) for encoded, indices in zip(found, chosen, strict=True)]
    ids = list(doc_ids) if doc_ids is not None else [document_hash(content) for content in texts]
    hashes = [document_hash(content) for content in texts]
    vectors = run_trunk(
        adapter,
        model,
        site,
        [(encoded.ids, chosen) for _, encoded, chosen in pieces],
        pad_id=pad_id_of(tokenizer),
        batch_size=batch_size,
        chunk_tokens=chunk_tokens,
        progress=progress,
    )
    rows = [(i, encoded, p) for i, encoded, chosen in pieces for p in chosen]
    return Activations(
        vectors=vectors,
        position=tuple(encoded.start + p for _, encoded, p in rows),
        doc_id=tuple(ids[i] for i, _, _ in rows),
        token=tuple(token_text(tokenizer, encoded, p) for _, encoded, p in rows),
        special=tuple(encoded.special[p] for _, encoded, p in rows),
        keys=tuple(RowKey(hashes[i], encoded.start + p) for i, encoded, p in rows),
        document=tuple(i for i, _, _ in rows),
        char_end=tuple(encoded.offsets[p][1] for _, encoded, p in rows),
        site=site,
        base_model=base_model,
        read=tuple(p for _, _, p in rows),
        context=tuple(context_of(encoded, p) for _, encoded, p in rows),
    )


CONTEXT_CHARACTERS = 200
"""Text kept before each row's token: enough to tell in which script its document is written."""


def context_of(encoded: Encoded, position: int) -> str:
    """The end of the text up to a token, at most `CONTEXT_CHARACTERS` of it."""
    end = encoded.offsets[position][1]
    return encoded.text[max(0, end - CONTEXT_CHARACTERS) : end]


@dataclass(frozen=True)
class _Trunk:
    """A model read at some sites, in passes of at most `chunk` tokens where a document allows it."""

    adapter: Adapter
    model: Any
    sites: tuple[Site, ...]
    pad_id: int
    chunk: int

    @property
    def device(self) -> torch.device:
        """Where ids go: accelerate sends them on by itself where it has taken all weights away."""
        places = (p.device for p in self.model.parameters())
        return next((device for device in places if device.type != "meta"), torch.device("cpu"))

    @property
    def width(self) -> int:
        """Width of the residual stream."""
        return int(self.model.config.get_text_config().hidden_size)

    def output(self, ids: Tensor, mask: Tensor, cache: DynamicCache | None = None) -> list[Tensor]:
        """What each of the sites' blocks gives for `ids` [rows, length]: [rows, length, d]; the pass ends at the deepest."""
        deepest = max(self.sites, key=lambda site: site.layer)
        others = [site for site in dict.fromkeys(self.sites) if site != deepest]
        with ExitStack() as stack:
            found = {site: stack.enter_context(block_outputs(self.adapter, self.model, site)) for site in others}
            found[deepest] = stack.enter_context(block_outputs(self.adapter, self.model, deepest, stop=True))
            self.adapter.trunk(self.model)(
                input_ids=ids.to(self.device),
                attention_mask=mask.to(self.device),
                past_key_values=cache,
                use_cache=cache is not None,
            )
        return [found[site][0] for site in self.sites]

    def batch(self, sequences: Sequence[tuple[Sequence[int], Sequence[int]]], *, masked: bool) -> list[Tensor]:
        """The vectors of each sequence of a batch, float32 [positions, sites, d] on the CPU.

        Right padding needs no mask; `masked` gives one to hooks that want to know which tokens are real.
        """
        ids, mask = pad_right([ids for ids, _ in sequences], self.pad_id)
        hidden = self.output(ids, mask if masked else torch.ones_like(mask))
        rows = [row for row, (_, chosen) in enumerate(sequences) for _ in chosen]
        columns = [p for _, chosen in sequences for p in chosen]
        found = torch.stack([each[rows, columns].float().cpu() for each in hidden], dim=1)
        return list(found.split([len(chosen) for _, chosen in sequences]))

    def stream(self, ids: Sequence[int], chosen: Sequence[int]) -> Tensor:
        """The vectors of one document that is longer than a chunk, float32 [positions, sites, d] on the CPU."""
        tokens = torch.tensor([list(ids)], dtype=torch.long)
        cache = DynamicCache(config=self.model.config)
        places = torch.tensor(list(chosen))
        found = torch.empty(len(places), len(self.sites), self.width)
        for begin in range(0, len(ids), self.chunk):
            end = min(begin + self.chunk, len(ids))
            hidden = self.output(tokens[:, begin:end], torch.ones(1, end, dtype=torch.long), cache)
            if int(cache.get_seq_length()) != end:  # gradient checkpointing and foreign models may leave the cache out
                return self.batch([(ids, chosen)], masked=False)[0]
            here = (begin <= places) & (places < end)
            for i, each in enumerate(hidden):
                found[here, i] = each[0, (places[here] - begin).to(each.device)].float().cpu()
        return found


def run_trunk(
    adapter: Adapter,
    model: Any,
    site: Site,
    sequences: Sequence[tuple[Sequence[int], Sequence[int]]],
    *,
    pad_id: int,
    batch_size: int,
    chunk_tokens: int = PASS_TOKENS,
    progress: Callable[[int], None] | None = None,
    check: bool = True,
) -> Tensor:
    """Vectors of (ids, positions) pairs, in order: float32 [total positions, d] on the CPU.

    Arguments and errors: see `run_trunk_at`.
    """
    return run_trunk_at(
        adapter,
        model,
        (site,),
        sequences,
        pad_id=pad_id,
        batch_size=batch_size,
        chunk_tokens=chunk_tokens,
        progress=progress,
        check=check,
    )[:, 0]


def run_trunk_at(
    adapter: Adapter,
    model: Any,
    sites: Sequence[Site],
    sequences: Sequence[tuple[Sequence[int], Sequence[int]]],
    *,
    pad_id: int,
    batch_size: int,
    chunk_tokens: int = PASS_TOKENS,
    progress: Callable[[int], None] | None = None,
    check: bool = True,
) -> Tensor:
    """Vectors of (ids, positions) pairs at several sites in one pass, in order: float32 [total positions, sites, d] on the CPU.

    Args:
        sites: one or more; no block above the deepest runs.
        sequences: token ids, and the positions that are asked for, counted from 0.
        batch_size: sequences of one pass at most; those of similar length share one.
        chunk_tokens: tokens of one pass at most, padding included; a longer sequence is read in several. While a
            SteeringVector acts on the model, sequences are read whole.
        progress: called with the number of sequences that have been read since; one without positions is not read.
        check: False returns NaN and infinite vectors as well, for callers that record each of them.

    Raises:
        torch.OutOfMemoryError: one sequence alone does not fit; several are tried again in smaller batches.
        VectorError: the model itself produced NaN or infinite vectors.
    """
    trunk = _Trunk(adapter, model, tuple(sites), pad_id, chunk_tokens)
    whole = is_steered(adapter, model)
    read = [(ids if whole else ids[: max(chosen) + 1], chosen) for ids, chosen in sequences if len(chosen)]
    if not read:
        return torch.empty(0, len(trunk.sites), trunk.width)
    lengths = [len(ids) for ids, _ in read]
    tokens = batch_size * max(lengths) if whole else chunk_tokens

    def work(batch: Sequence[int]) -> list[Tensor]:
        if lengths[batch[0]] > tokens:
            return [trunk.stream(*read[batch[0]])]
        return trunk.batch([read[i] for i in batch], masked=whole)

    found: dict[int, Tensor] = {}
    with torch.inference_mode():
        for batch, parts in run_batches(by_length(lengths, batch_size, tokens), work):
            found.update(zip(batch, parts, strict=True))
            if progress is not None:
                progress(len(batch))
    vectors = torch.cat([found[i] for i in range(len(read))])
    if check and not bool(torch.isfinite(vectors).all()):
        bad = (~torch.isfinite(vectors).all(dim=-1).all(dim=-1)).nonzero().flatten().tolist()
        raise VectorError(
            f"The model itself produced NaN or infinite vectors in {len(bad)} rows.",
            got=f"rows {bad[:10]}",
            next_step="load the model in bfloat16 or float32: float16 overflows in many families",
        )
    return vectors


def token_text(tokenizer: Any, encoded: Encoded, position: int) -> str:
    """The text of one token."""
    return str(tokenizer.decode([encoded.ids[position]]))
