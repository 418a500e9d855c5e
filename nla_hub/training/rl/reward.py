"""What an explanation is paid: pure functions from the AR's vectors to one number a sample."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from nla_hub.geometry import MSE_UNUSABLE
from nla_hub.training.recipe import RewardSpec

SMALLEST_MSE = 1e-6
"""Below this the logarithm is cut: a cosine of 1 - 5e-7 is exact in float32."""


def reward(
    spec: RewardSpec,
    *,
    mse: Tensor,
    tokens: Tensor,
    repetition: Tensor,
    contrast: Tensor | None = None,
) -> Tensor:
    """The reward of each sample: float32 [n].

    Args:
        mse: direction mse under the live AR, 2 for a sample without a usable explanation; float [n].
        tokens: new tokens of each sample [n].
        repetition: see `repeated_pairs` [n].
        contrast: see `contrast`, needed where the recipe pays for it [n].
    """
    wide = mse.double()
    paid = -wide.clamp_min(SMALLEST_MSE).log() if spec.kind == "neg_log_mse" else -wide
    paid = paid - spec.length_penalty * tokens.double() - spec.repetition_penalty * repetition.double()
    if spec.contrastive:
        assert contrast is not None
        paid = paid + spec.contrastive * contrast.double()
    return paid.float()


def sample_mse(cosine: Tensor, usable: Tensor) -> Tensor:
    """2 (1 - cos), and the orthogonal score where `usable` is False: float64 [n]."""
    return torch.where(usable, 2.0 * (1.0 - cosine.double()), torch.full_like(cosine.double(), MSE_UNUSABLE))


def repeated_pairs(text: str) -> float:
    """The share of neighbouring word pairs of a text that stood in it before: 0 for a text without repetition."""
    words = text.split()
    pairs = list(pairwise(words))
    return 1.0 - len(set(pairs)) / len(pairs) if pairs else 0.0


def contrast(
    own: Tensor, cosines: Tensor, *, group: Tensor, other_groups: Tensor, other_usable: Tensor, temperature: float
) -> Tensor:
    """How well each explanation beats those of other vectors, for its own vector: log-probabilities [n], at most 0.

    Row i is a softmax over its own cosine and the cosines that usable explanations of other groups reach for the same
    vector: an explanation that would fit any vector is paid little.

    Args:
        own: cosine of each sample with its vector, 0 where it is not usable [n].
        cosines: of every explanation of the step (columns) with the vector of each of these samples (rows) [n, m].
        group: which vector each row belongs to [n]; other_groups: the same of the columns [m].
        other_usable: columns that count [m].
    """
    foreign = (group[:, None] != other_groups[None, :]) & other_usable[None, :]
    others = (cosines.double() / temperature).masked_fill(~foreign, float("-inf"))
    mine = own.double() / temperature
    return mine - torch.logsumexp(torch.cat([mine[:, None], others], dim=1), dim=1)
