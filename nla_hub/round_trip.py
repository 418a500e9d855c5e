"""A gate for weights that were changed on loading: does the pair still read what it wrote itself?

Fixed texts go through the AR, the vectors through the AV, its words through the AR again. In a working pair the vector that
comes back is nearer to its own beginning than to those of the other texts; a quantised half that broke brings back
nothing, or the same for all (seen with quantised Gemma ARs: cosine about 0). No base model is needed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from nla_hub.errors import GateFailedError
from nla_hub.geometry import cosine

TEXTS = (
    "The text lists ingredients for a soup; the next word is probably a vegetable.",
    "A line of Python code that opens a file and reads numbers from it.",
    "An angry customer writes about a parcel that never arrived.",
    "A report on the weather in the mountains, with snow expected at night.",
    "The end of a sentence about a mouse that hides under a red chair.",
    "A proof in algebra that has just introduced a prime number.",
)
"""What the gate begins with: far apart in subject, form and mood."""

MARGIN = 0.1
"""How much nearer, in cosine, a vector must come back to its own beginning than to the others, on average."""


@dataclass(frozen=True)
class RoundTrip:
    """What came back.

    Attributes:
        matched: mean cosine of a vector and what came back of it (0 where the AV wrote no usable explanation).
        mismatched: mean cosine of a vector and what came back of another.
        n: texts.
        usable: how many explanations were usable.
    """

    matched: float
    mismatched: float
    n: int
    usable: int

    @property
    def margin(self) -> float:
        """matched - mismatched."""
        return self.matched - self.mismatched

    def require(self, margin: float = MARGIN) -> None:
        """Raise a GateFailedError where the margin is below `margin` (NaN included)."""
        if self.margin >= margin:
            return
        raise GateFailedError(
            "This pair no longer reads its own vectors.",
            got=f"cosine {self.matched:.3f} to the vector itself, {self.mismatched:.3f} to others "
            f"({self.usable} of {self.n} explanations usable)",
            expected=f"a difference of at least {margin}",
            next_step="load it without quantization_config, or with 8 bits instead of 4; if it fails unquantised too, "
            "check base model and sidecar",
        )


def round_trip(
    reconstruct: Callable[[Sequence[str]], Tensor], verbalize: Callable[[Tensor], Sequence[str | None]]
) -> RoundTrip:
    """Run the gate's texts through a pair.

    Args:
        reconstruct: texts -> float32 [N, d]. verbalize: float32 [N, d] -> N explanations, None where unusable.
    """
    vectors = reconstruct(TEXTS)
    usable = torch.isfinite(vectors).all(dim=-1) & (vectors.norm(dim=-1) > 0)
    words: list[str | None] = [None] * len(TEXTS)
    rows = usable.nonzero().flatten().tolist()
    for row, text in zip(rows, verbalize(vectors[rows]) if rows else (), strict=True):
        words[row] = text
    written = [i for i, text in enumerate(words) if text]
    table = torch.zeros(len(TEXTS), len(TEXTS), dtype=torch.float64)
    if written:
        back = reconstruct([str(words[i]) for i in written])
        for row, vector in zip(written, back, strict=True):
            table[row] = cosine(vector.expand(len(TEXTS), -1), vectors)
    others = ~torch.eye(len(TEXTS), dtype=torch.bool)
    return RoundTrip(float(table.diagonal().mean()), float(table[others].mean()), len(TEXTS), len(written))
