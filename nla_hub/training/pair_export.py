"""The pair as others load it: what a stage kept of both halves, read once more and written whole, in the recipe's dtypes.

The stage `export` and the pairs of earlier reinforcement-learning steps come here, so a step's pair and a finished one differ
in nothing but what was trained between them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from nla_hub.checkpoints import load_ar, load_av
from nla_hub.export import save_ar, save_av
from nla_hub.pretrained import LoadOptions
from nla_hub.sidecar import Sidecar
from nla_hub.training.halves import Halves
from nla_hub.training.recipe import Recipe


def pair_options(recipe: Recipe) -> LoadOptions:
    """How weights are read to be written once more: on the CPU, in the dtype of the files.

    As `convert` does: factors are added in float32 and the sum is rounded once.
    """
    return LoadOptions(dtype=getattr(torch, recipe.export.dtype), device_map={"": "cpu"})


def export_pair(
    halves: Halves,
    tokenizer: Any,
    sidecars: tuple[Sidecar, Sidecar],
    kept: tuple[Path, Path],
    place: Path,
    *,
    rl_steps: int | None,
) -> None:
    """Write `place`/av and /ar, in one process; LoRA factors are merged into the base.

    Args:
        sidecars: of AV and AR; what they were trained by is added.
        kept: directories of AV and AR as `Halves.write_av` and `write_ar` made them.
        rl_steps: steps of reinforcement learning that are in the weights; None: none.

    Raises:
        CheckpointError, WeightsError and their children: see `checkpoints.load_av` and `load_ar`. RunError: a full disk.
    """
    recipe, options = halves.recipe, pair_options(halves.recipe)
    trained: dict[str, Any] = {"recipe": recipe.name, "recipe_hash": recipe.digest(), "seed": recipe.seed}
    if rl_steps is not None:
        trained["rl_steps"] = rl_steps
    extra = {"training": trained, "created_by": "nla-hub"}
    dtype, head_dtype = (getattr(torch, name) for name in (recipe.export.dtype, recipe.export.head_dtype))
    av_sidecar, ar_sidecar = sidecars
    av = load_av(halves.files(kept[0]), options)
    save_av(place / "av", av.model, tokenizer, av_sidecar.with_(extra=extra), dtype=dtype)
    del av  # both halves of a large pair need not be in memory at once
    ar, head = load_ar(halves.files(kept[1]), ar_sidecar, options)
    ar_sidecar = ar_sidecar.with_(extra=extra)
    save_ar(place / "ar", ar.model, head, tokenizer, ar_sidecar, dtype=dtype, head_dtype=head_dtype)
