"""Whether the LoRA of a later training stage continues an earlier one or was begun anew on top of it."""

from __future__ import annotations

from typing import Literal

import torch

from nla_hub.log import logger
from nla_hub.lora import Lora

CONTINUES = 0.5
FRESH = 0.2


def relation(earlier: Lora, later: Lora) -> tuple[Literal["continues", "fresh", "unclear"], float | None]:
    """Whether a later adapter continues an earlier one (and replaces it) or was begun anew on top of it.

    A adapter is begun with random A factors, which training turns only a little: in one that was continued they still point
    where they pointed, in a new one they are unrelated (|cos| ~ 1/sqrt(r * in)). Returns the verdict and the median cosine
    between the A factors of modules that both have.
    """
    before = {one.module: one.a for one in earlier.factors}
    pairs = [(before[one.module], one.a) for one in later.factors if one.module in before]
    same = [(x, y) for x, y in pairs if x.shape == y.shape]
    if len(before) != len(later.factors) or len(same) < len(later.factors):
        return "fresh", None
    cosines = torch.stack([torch.cosine_similarity(x.flatten(), y.flatten(), dim=0) for x, y in same])
    median = float(cosines.median())
    verdict: Literal["continues", "fresh", "unclear"] = (
        "continues" if median > CONTINUES else "fresh" if abs(median) < FRESH else "unclear"
    )
    logger.debug(
        "%s and %s: median cosine of their A factors %.3f (%s)", earlier.directory, later.directory, median, verdict
    )
    return verdict, median
