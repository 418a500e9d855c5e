"""Row keys and the random stream of a row.

A row's randomness comes from hash(seed, key) alone: never from the batch, the order, or other rows. The
stream is Philox (Salmon et al. 2011, counter-based) keyed with 128 bits of a SHA-256, and draws are made by
inverting the cumulative distribution in order of token id.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

BARE_POSITION = -1
"""Position of a vector that came without its text."""


@dataclass(frozen=True, order=True)
class RowKey:
    """What identifies a row, and with the seed all of its randomness."""

    document: str
    position: int = BARE_POSITION
    sample: int = 0

    def with_sample(self, sample: int) -> RowKey:
        """The key of another sample of the same row."""
        return RowKey(self.document, self.position, sample)


def document_hash(content: object) -> str:
    """sha256 of a document: its text, or for messages their canonical JSON."""
    if isinstance(content, str):
        data = content
    else:
        data = json.dumps(content, sort_keys=True, ensure_ascii=False, separators=(",", ":"), default=_plain)
    return hashlib.sha256(data.encode("utf-8", "surrogatepass")).hexdigest()


def _plain(value: object) -> object:
    """What JSON has no word for: mappings of other kinds as mappings, anything else by its text."""
    return dict(value) if isinstance(value, Mapping) else repr(value)


def vector_hash(row: Tensor) -> str:
    """sha256 of a vector's float32 bytes, little endian: the document hash of a bare vector [d]."""
    data = row.detach().to("cpu", torch.float32).contiguous().numpy().astype("<f4", copy=False)
    return hashlib.sha256(data.tobytes()).hexdigest()


def row_uniforms(seed: int, key: RowKey, n: int) -> np.ndarray:
    """The first `n` uniforms in [0, 1) of a row's stream, float64; a longer request starts with the same ones."""
    text = f"{seed}\x1f{key.document}\x1f{key.position}\x1f{key.sample}"
    digest = hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(digest[:16], "little"))).random(n)


def uniforms(seed: int, keys: Sequence[RowKey], n: int) -> Tensor:
    """The streams of several rows: float64 [rows, n]."""
    return torch.from_numpy(np.stack([row_uniforms(seed, key, n) for key in keys]))


def request_seed(draws: Tensor) -> int:
    """A seed below 2**63 for one row, for engines that draw by themselves.

    It follows from the row's own uniforms [n] (its stream), so equal (seed, key) give equal requests in any batch. The
    first of them alone decides, so that a longer answer starts with the shorter one.
    """
    data = draws[:1].detach().to("cpu").double().numpy().astype("<f8", copy=False).tobytes()
    return int.from_bytes(hashlib.sha256(data).digest()[:8], "little") >> 1


def choose(logits: Tensor, draws: Tensor | None, temperature: float) -> tuple[Tensor, Tensor]:
    """The next token of each row, and its log-probability under the distribution that it was drawn from.

    Args:
        logits: [rows, vocabulary], any float dtype.
        draws: uniforms [rows], or None for greedy.
        temperature: > 0 where draws are given; greedy log-probabilities are at temperature 1.

    Returns:
        tokens int64 [rows]; log-probabilities float32 [rows].
    """
    wide = logits.float()
    if draws is None:
        tokens = wide.argmax(dim=-1)
        logp = wide.log_softmax(dim=-1)
    else:
        logp = (wide / max(temperature, 1e-30)).log_softmax(dim=-1)  # smaller ones are zero in float32
        cdf = logp.double().exp().cumsum(dim=-1)
        targets = draws.to(cdf)[:, None] * cdf[:, -1:]
        tokens = torch.searchsorted(cdf, targets, right=True).squeeze(-1).clamp(max=logits.shape[-1] - 1)
    return tokens, logp.gather(-1, tokens[:, None]).squeeze(-1)
