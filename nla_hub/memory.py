"""What a pair needs of memory, from the headers of its weights and its config alone: one estimator for `doctor`, for
`memory="auto"` and for `train --plan`.

Everything here is arithmetic: no weights are opened and nothing is downloaded. docs/memory.md says how far the figures are
from what was measured, and by which command.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch

from nla_hub.adapters import Adapter
from nla_hub.architecture import Architecture, tied
from nla_hub.batching import PASS_TOKENS
from nla_hub.sidecar import Site
from nla_hub.weights import matches

Part = Literal["source", "av", "ar"]
Mode = Literal["resident", "staged", "shared"]
Quantization = Literal["nf4", "int8"]

Header = Mapping[str, tuple[tuple[int, ...], str]]
"""Tensor name -> (shape, dtype as safetensors calls it), of all files of a checkpoint together."""

MODES: tuple[Mode, ...] = ("resident", "staged", "shared")

LOADING_WORKERS = 4
"""Tensors that transformers reads at the same time, at most one a core (`core_model_loading.GLOBAL_WORKERS`)."""

RUNTIME = 45 * 10**6
"""Bytes that a process takes on a CPU besides weights and tensors once it has loaded and run a pair: tokenizers, pages of
torch's library that are first used then, thread pools. Measured with pairs of under 1 MB: 43 MB (tests/peaks.py)."""

GROWTH = 2
"""Times the cache's bytes that growing it takes: every step asks for tensors a little larger than those just freed, and the
freed ones fit nothing. Measured with glibc's allocator: 972 MB at a cache of 128 MB, where one copy would make 840."""

MARGIN = 0.9
"""Share of the free memory that `choose` gives away: an allocator cannot use every byte, and other processes move."""


MOST_ROWS_CPU = 64
"""Rows together on a CPU at most. Measured on two cores (d 256, 6 blocks, 60 tokens): 16 rows give 35 a second, 32 give 56,
64 give 75, 128 give 92; a larger batch answers later and takes more memory."""

MOST_ROWS = 1024
"""Rows together on an accelerator at most. A step over N weights in 16 bits reads 2 N bytes and computes 2 N operations a row,
so it is limited by reading below about 200 rows on an H100 or H200 (989e12 / 4.8e12 operations a byte, NVIDIA's data sheets);
a few times that leaves little to gain. Reckoned, not measured."""


# -- bytes of a part -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PartSize:
    """What one part of a pair takes.

    Attributes:
        name: which part.
        stored: bytes of its tensors on disk: what is downloaded for it alone (factors and value head only, for a LoRA).
        loaded: bytes in memory once it is loaded, without what is dropped (blocks above K, norms, heads nobody reads).
        transient: bytes that loading needs beyond that, for a moment.
        own: bytes that it adds to a base that is in memory already (LoRA factors in float32, value head); None where it is
            no LoRA.
        base: bytes of the complete frozen base model that a LoRA lies on; None where it is no LoRA.
        base_transient: bytes that loading that base needs beyond these, for a moment.
        architecture: its sizes, blocks that are dropped left out.
        width: bytes of a value that it computes with.
    """

    name: Part
    stored: int
    loaded: int
    transient: int
    architecture: Architecture
    width: int
    own: int | None = None
    base: int | None = None
    base_transient: int = 0


def bits(dtype: str) -> int:
    """Bits of a value of a safetensors dtype ("BF16" -> 16, "F8_E4M3" -> 8, "BOOL" -> 8)."""
    found = re.search(r"\d+", dtype)
    return int(found.group()) if found else 8


def stored_bytes(header: Header) -> int:
    """Bytes of all tensors of a checkpoint on disk."""
    return sum(math.prod(shape) * bits(dtype) // 8 for shape, dtype in header.values())


def part_size(
    name: Part,
    header: Header,
    config: Any,
    adapter: Adapter,
    *,
    dtype: torch.dtype,
    site: Site,
    complete: bool = False,
    factors: Header | None = None,
    head: Header | None = None,
    quantization: Quantization | None = None,
    on_cpu: bool = True,
) -> PartSize:
    """What one part takes when it is loaded in `dtype`.

    Args:
        header: of the complete model (for a LoRA: of its base).
        config: transformers config of that model.
        site: of the pair; a source is cut above it unless `complete`, and so is the base under an AR's LoRA.
        factors: the LoRA's tensors, None where the part is a complete model.
        head: the value head's tensors (an AR's), where they are in a file of their own.
        quantization: how its linear layers are packed by bitsandbytes while loading.
        on_cpu: whether the weights end in main memory, where those of the right dtype stay mapped files.
    """
    cut = (name == "source" and not complete) or (name == "ar" and factors is not None)
    kept = _kept(name, header, config, adapter, site if cut else None, trunk=cut or name == "ar")
    architecture = Architecture.of(config)
    if cut:
        architecture = _cut(architecture, site)
    packed = quantization if not hasattr(config, "quantization_config") else None
    loaded = sum(_loaded(n, *kept[n], adapter, dtype, packed) for n in kept)
    transient = _loading(kept, adapter, dtype, packed, on_cpu=on_cpu)
    head_bytes = 4 * sum(math.prod(shape) for shape, _ in (head or {}).values())
    if factors is None:
        stored = stored_bytes(header) + stored_bytes(head or {})
        return PartSize(name, stored, loaded + head_bytes, transient, architecture, dtype.itemsize)
    # Factors are read in float32 whatever they are stored in, and merging widens one weight at a time.
    values = {n: math.prod(shape) for n, (shape, _) in factors.items() if ".lora_" in n}
    own = 4 * sum(values.values()) + head_bytes
    own += 4 * sum(math.prod(s) for n, (s, _) in factors.items() if ".lora_" not in n)  # a head in the same file
    widest = max((math.prod(kept[n][0]) for n in kept if len(kept[n][0]) == 2 and _in_block(n, adapter)), default=0)
    merging = 4 * sum(values.values()) + 4 * widest * (2 if dtype == torch.float32 else 3)
    whole = _kept("av", header, config, adapter, None, trunk=False)
    base = sum(_loaded(n, *whole[n], adapter, dtype, packed) for n in whole)
    return PartSize(
        name,
        stored_bytes(factors) + stored_bytes(head or {}),
        loaded + own - 4 * sum(values.values()),
        max(transient, merging),
        architecture,
        dtype.itemsize,
        own=own,
        base=base,
        base_transient=_loading(whole, adapter, dtype, packed, on_cpu=on_cpu),
    )


def _cut(architecture: Architecture, site: Site) -> Architecture:
    values = {**vars(architecture), "windows": architecture.windows[: site.n_blocks]}
    return Architecture(**values)


def _kept(
    name: Part, header: Header, config: Any, adapter: Adapter, site: Site | None, *, trunk: bool
) -> dict[str, tuple[tuple[int, ...], str]]:
    """The tensors that become weights."""
    dropped = list(adapter.ignored_weights)
    if trunk:
        dropped += [*adapter.lm_head_weights, *adapter.final_norm_weights]
    elif tied(config):
        dropped += adapter.lm_head_weights  # where it is stored all the same
    if site is not None:
        dropped.append(f"blocks>{adapter.blocks}>{site.layer}")
    return {n: spec for n, spec in header.items() if not matches(n, dropped)}


def _in_block(name: str, adapter: Adapter) -> bool:
    return matches(name, [f"blocks>{adapter.blocks}>-1"])


def _loaded(
    name: str,
    shape: tuple[int, ...],
    stored: str,
    adapter: Adapter,
    dtype: torch.dtype,
    quantization: Quantization | None,
) -> int:
    n = math.prod(shape)
    if not re.fullmatch(r"B?F(16|32|64)", stored):
        return n * bits(stored) // 8  # packed on disk already (8-bit floats, integers): stays what it is
    if quantization is None or len(shape) != 2 or not _in_block(name, adapter):
        return n * dtype.itemsize
    # bitsandbytes 0.50: nf4 keeps a float32 of scale for 64 values; int8 a float32 of scale for each row.
    return n // 2 + 4 * math.ceil(n / 64) if quantization == "nf4" else n + 4 * shape[0]


def _loading(
    kept: Header, adapter: Adapter, dtype: torch.dtype, quantization: Quantization | None, *, on_cpu: bool
) -> int:
    """Bytes beyond the weights that loading needs at its worst moment.

    Tensors that become the weights as they are stay mapped, and cost nothing more. Others are read in the order of their
    names, `LOADING_WORKERS` at a time, and each is both there as stored and as a weight for a moment. On an accelerator
    only the stored form is in main memory, which is not counted here.
    """
    if not on_cpu and quantization is None:
        return 0
    same = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}.get(dtype)
    if quantization is None and {stored for _, stored in kept.values()} <= {same}:
        return 0
    workers = 1 if quantization else min(LOADING_WORKERS, os.cpu_count() or 1)
    names = sorted(kept, key=_natural)
    final = [_loaded(n, *kept[n], adapter, dtype, quantization) for n in names]
    # While it is quantised on its device, a tensor is there once more in the dtype that it is packed from.
    raw = [math.prod(kept[n][0]) * (bits(kept[n][1]) // 8 + (dtype.itemsize if quantization else 0)) for n in names]
    total, before, worst = sum(final), 0, 0
    for i in range(len(names)):
        window = slice(i, i + workers)
        worst = max(worst, before + sum(final[window]) + sum(raw[window]))
        before += final[i]
    return max(0, worst - total)


def _natural(name: str) -> list[tuple[int, int | str]]:
    return [(0, int(word)) if word.isdigit() else (1, word) for word in name.split(".")]


# -- bytes while it works ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Workload:
    """What is asked of a pair at once.

    Attributes:
        batch_size: rows that run together.
        prompt: tokens of the AV's prompt (the released families': about 100).
        max_new_tokens: tokens of an explanation.
        text: tokens of the texts that are captured.
        template: tokens that the AR's template puts around an explanation.
        sampled: whether tokens are drawn, not chosen greedily.
        shared: tokens of the AV's prompt before its marker, which all rows have in common and keep once (0: each its own).
    """

    batch_size: int = 32
    prompt: int = 100
    max_new_tokens: int = 200
    text: int = 512
    template: int = 40
    sampled: bool = True
    shared: int = 0


def working_bytes(size: PartSize, work: Workload) -> int:
    """Bytes that a loaded part needs while it works, weights not counted.

    With B rows, T tokens, w bytes a value, all for one block unless said (blocks run one after the other):

    - *Activations* of one pass, per token: the residual stream, its sum with a block's output and its normed copy
      (widened to float32 while it is normed): d (3 w + 4); and the wider of the MLP (gate, its activation, up, their
      product: 4 mlp w) and attention (queries, keys, values, rotated copies and output: (3 heads + 4 kv_heads) head_dim w).
      Attention's scores are never complete: PyTorch's scaled_dot_product_attention works in tiles.
    - *AV*: keys and values of what all rows share, once, and of each row's own tokens (from the marker on, to the last new
      one), allocated in advance; then the greater of the pass over the prompt's own tokens, whose attention scores are
      complete (heads x T x prompt, in w, in w again while the two parts are joined, and in float32), and a later step: the
      logits, vocabulary wide, as they are, and what `sampling.choose` makes of them: 8 bytes greedily (float32 copy and
      log-softmax), 24 where tokens are drawn (two more in float64).
      Where a sliding window is shorter than prompt and answer: the pass over the whole prompt, then a key-value cache (see
      `cache_bytes`), `GROWTH` times, because `DynamicCache` appends by concatenation.
    - *AR* and *source*: activations alone, T = max_new_tokens + template or the text's tokens; rows x T is at most
      `batching.PASS_TOKENS` where several rows run (a longer one runs alone). Of a source the output of block K besides; a text
      longer than that is read in chunks, with the keys and values of all of it.
    """
    a, w, rows = size.architecture, size.width, work.batch_size
    wide = max(4 * a.mlp, (3 * a.heads + 4 * a.kv_heads) * a.head_dim)
    per_token = a.d_model * (3 * w + 4) + wide * w
    if size.name == "ar":
        length = work.max_new_tokens + work.template
        return max(length, min(rows * length, PASS_TOKENS)) * per_token
    if size.name == "source":
        chunks = cache_bytes(a, 1, work.text, w) if work.text > PASS_TOKENS else 0
        return chunks + min(rows * work.text, PASS_TOKENS) * (per_token + a.d_model * w)
    total = work.prompt + work.max_new_tokens
    logits = rows * a.vocabulary * ((w if w < 4 else 4) + (20 if work.sampled else 4) + (4 if w < 4 else 0))
    if work.shared and not any(window is not None and window < total for window in a.windows):
        own = work.prompt - work.shared
        kept = cache_bytes(a, 1, work.shared, w) + cache_bytes(a, rows, total - work.shared, w)
        scores = rows * a.heads * own * work.prompt * (2 * w + 4)
        return kept + max(rows * own * per_token + scores, logits + rows * per_token)
    cache = GROWTH * cache_bytes(a, rows, total, w)
    first = cache_bytes(a, rows, work.prompt, w) + rows * work.prompt * per_token
    return max(first, cache + logits + rows * per_token)


def rows_that_fit(architecture: Architecture, work: Workload, free: int | None, *, width: int, on_cpu: bool) -> int:
    """Rows of an AV that can run together: a power of two, so that a little more or less free memory changes nothing.

    Args:
        work: what is asked; its batch_size does not matter.
        free: bytes beside the weights; None where a device does not say.
        width: bytes of a value that the AV computes with.
    """
    size = PartSize("av", 0, 0, 0, architecture, width)
    one, two = (working_bytes(size, replace(work, batch_size=rows)) for rows in (1, 2))
    most = MOST_ROWS_CPU if on_cpu else MOST_ROWS
    fitting = most if free is None else int((MARGIN * free - 2 * one + two) // (two - one))
    return 1 << max(0, min(most, fitting).bit_length() - 1)


def cache_bytes(architecture: Architecture, rows: int, tokens: int, width: int) -> int:
    """Bytes of the keys and values of `rows` sequences of `tokens`.

    Blocks with a window keep its last tokens but one: transformers' sliding cache adds the next before it attends.
    """
    kept = (tokens if window is None else min(tokens, window - 1) for window in architecture.windows)
    return 2 * rows * architecture.kv_heads * architecture.head_dim * width * sum(kept)


# -- modes ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Estimate:
    """The peak of one mode on the device that the weights are on.

    Attributes:
        mode: see `estimate`.
        peak: bytes at the worst moment.
        weights: bytes of weights that are loaded at the same time, at most.
        parts: bytes of weights of each part.
        working: bytes that the hungriest part needs to work.
        loading: bytes beyond the weights that loading needs at its worst moment.
    """

    mode: Mode
    peak: int
    weights: int
    parts: Mapping[Part, int]
    working: int
    loading: int


def estimate(mode: Mode, sizes: Sequence[PartSize], work: Workload, *, on_cpu: bool = True) -> Estimate | None:
    """The peak of capturing, verbalizing and scoring with these parts in one mode; None where the mode is not possible.

    "resident": every part stays once it is loaded (AV, AR, then the source at the first capture). "staged": one part at a
    time. "shared": one frozen base that is source, AV and AR in turn; only where both halves are LoRAs.
    """
    by_name = {size.name: size for size in sizes}
    order = [by_name[name] for name in ("av", "ar", "source") if name in by_name]
    extra = RUNTIME if on_cpu else 0
    parts: dict[Part, int] = {size.name: size.loaded for size in order}
    working = {size.name: working_bytes(size, work) for size in order}
    if mode == "shared":
        halves = [size for size in order if size.name != "source"]
        base = max((size.base or 0 for size in halves), default=0)
        if not halves or any(size.own is None for size in halves):
            return None
        parts = {size.name: size.own or 0 for size in halves}
        weights = base + sum(parts.values())
        loading = max(size.base_transient for size in halves)
        # A role's update is computed in float32 beside its module's output, which it then replaces: three copies.
        roles = {s.name: working[s.name] + _role_bytes(s, work) for s in halves}
        most = max({**working, **roles}.values())
        return Estimate(
            mode, extra + max(weights + most, base + loading), weights, {**parts, "source": base}, most, loading
        )
    if mode == "resident":
        weights = sum(parts.values())
        before, worst = 0, 0
        for size in order:
            worst = max(worst, before + size.loaded + size.transient)
            before += size.loaded
        most = max(working.values(), default=0)
        return Estimate(mode, extra + max(weights + most, worst), weights, parts, most, max(0, worst - weights))
    weights = max(parts.values(), default=0)
    peak = max((size.loaded + max(size.transient, working[size.name]) for size in order), default=0)
    return Estimate(
        mode, extra + peak, weights, parts, max(working.values(), default=0), max(s.transient for s in order)
    )


def _role_bytes(size: PartSize, work: Workload) -> int:
    a = size.architecture
    tokens = work.prompt if size.name == "av" else work.max_new_tokens + work.template
    return work.batch_size * tokens * 3 * 4 * max(a.mlp, a.d_model)


def estimates(sizes: Sequence[PartSize], work: Workload, *, on_cpu: bool = True) -> list[Estimate]:
    """The estimates of all modes that are possible."""
    found = (estimate(mode, sizes, work, on_cpu=on_cpu) for mode in MODES)
    return [one for one in found if one is not None]


def choose(sizes: Sequence[PartSize], work: Workload, free: int | None, *, on_cpu: bool = True) -> Mode:
    """What `memory="auto"` takes: "resident" where it fits into `MARGIN` of the free bytes, else "staged".

    `free` None (a device that does not say) is "resident": nothing is known that speaks against it.
    """
    whole = estimate("resident", sizes, work, on_cpu=on_cpu)
    assert whole is not None
    return "resident" if free is None or whole.peak <= MARGIN * free else "staged"
