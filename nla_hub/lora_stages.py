"""Which LoRAs act together: what a sidecar lists, or whether a later stage continues an earlier one or lies on top of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from nla_hub import layouts
from nla_hub.adapters import Adapter
from nla_hub.errors import CheckpointError, SidecarError
from nla_hub.layouts import Place
from nla_hub.library import Checkpoint
from nla_hub.log import logger
from nla_hub.lora import Lora, read_lora
from nla_hub.sidecar import Role, Sidecar

CONTINUES = 0.5
FRESH = 0.2


def relation(earlier: Lora, later: Lora) -> tuple[Literal["continues", "fresh", "unclear"], float | None]:
    """Whether a later adapter continues an earlier one (and replaces it) or was begun anew on top of it.

    An adapter is begun with random A factors, which training turns only a little: in one that was continued they still point
    where they pointed, in a new one they are unrelated (|cos| ~ 1/sqrt(r * in)). Two that were begun with one seed have alike
    A factors too, but unrelated B factors, which begin at zero: that is "unclear". Returns the verdict and the median cosine
    between the A factors of modules that both have (None where their shapes differ).
    """
    before = {one.module: one for one in earlier.factors}
    pairs = [(before[one.module], one) for one in later.factors if one.module in before]
    same = [(x, y) for x, y in pairs if x.a.shape == y.a.shape and x.b.shape == y.b.shape]
    if len(before) != len(later.factors) or len(same) < len(later.factors):
        return "fresh", None
    a, b = (_median_cosine([(getattr(x, side), getattr(y, side)) for x, y in same]) for side in "ab")
    verdict: Literal["continues", "fresh", "unclear"] = "unclear"
    if abs(a) < FRESH:
        verdict = "fresh"
    elif min(a, b) > CONTINUES:
        verdict = "continues"
    logger.debug(
        "%s and %s: median cosines of their factors %.3f and %.3f (%s)",
        earlier.directory,
        later.directory,
        a,
        b,
        verdict,
    )
    return verdict, a


def _median_cosine(pairs: Sequence[tuple[Tensor, Tensor]]) -> float:
    return float(torch.stack([torch.cosine_similarity(x.flatten(), y.flatten(), dim=0) for x, y in pairs]).median())


def stacked(checkpoint: Checkpoint, place: Place, sidecar: Sidecar, adapter: Adapter, role: Role) -> tuple[Path, ...]:
    """The folders of the LoRAs that act together with the one at `place`, in order, on disk.

    Raises:
        SidecarError: an `adapter_stack` that does not fit the checkpoint.
        CheckpointError: several stages, and neither sidecar nor factors tell which act.
    """
    everything = {p.folder: p for p in layouts.places(checkpoint.files)}
    if sidecar.adapter_stack is not None and place.folder in sidecar.adapter_stack:
        folders = _listed(sidecar.adapter_stack, everything, checkpoint)
    else:
        folders = _measured(place, everything, checkpoint, adapter, role)
    names = [name for folder in folders for name in layouts.files_of(checkpoint.files, everything[folder])]
    root = checkpoint.fetch(names)
    return tuple(root / folder for folder in folders)


def _listed(stack: Sequence[str], everything: Mapping[str, Place], checkpoint: Checkpoint) -> list[str]:
    folders = [name.strip("/") for name in stack]
    if faults := [f"there is nothing in {folder!r}" for folder in folders if folder not in everything]:
        raise SidecarError(
            "The sidecar's adapter_stack does not fit the checkpoint.", where=checkpoint.ref, faults=faults
        )
    return [folder for folder in folders if everything[folder].form != "model"]


def _measured(
    place: Place, everything: Mapping[str, Place], checkpoint: Checkpoint, adapter: Adapter, role: Role
) -> list[str]:
    if layouts.stage_of(place.folder) != "rl":
        return [place.folder]
    earlier = [p for p in everything.values() if p != place and _is_earlier(p, role)]
    loras = [p for p in earlier if p.form != "model"]
    if not earlier:
        return [place.folder]
    later = read_lora(checkpoint.fetch([]) / place.folder, adapter, scaled=False)
    verdicts = {}
    for one in loras:
        root = checkpoint.fetch(layouts.files_of(checkpoint.files, one))
        verdicts[one.folder] = relation(read_lora(root / one.folder, adapter, scaled=False), later)
    continued = [folder for folder, (verdict, _) in verdicts.items() if verdict == "continues"]
    if len(continued) == 1:
        logger.info(
            "%s: %s replaces %s, which it continues (%s)",
            checkpoint.ref,
            place.folder,
            continued[0],
            _words(verdicts[continued[0]][1]),
        )
        return [place.folder]
    if role == "av" and len(earlier) == len(loras) == 1 and verdicts[loras[0].folder][0] == "fresh":
        only = loras[0].folder
        logger.info(
            "%s: %s acts on top of %s, on which it was begun anew (%s)",
            checkpoint.ref,
            place.folder,
            only,
            _words(verdicts[only][1]),
        )
        return [only, place.folder]
    raise CheckpointError(
        f"It is not clear what {place.folder} was trained on top of.",
        where=checkpoint.ref,
        faults=[
            f"{p} may lie under it" + (f" ({_words(verdicts[p.folder][1])})" if p.folder in verdicts else "")
            for p in earlier
        ],
        next_step=f'ask its author, then pass sidecar={{"adapter_stack": ["{place.folder}"]}} where it stands alone on the '
        f'base, or ["{earlier[0].folder}", "{place.folder}"] where both act',
    )


def _is_earlier(place: Place, role: Role) -> bool:
    """Whether a folder may be the supervised stage of a half: a LoRA that says so, or a complete model of that half."""
    last = place.folder.rpartition("/")[2]
    if place.form == "model":
        return place.role in (role, None) and layouts.names_role(last, role) and layouts.stage_of(place.folder) != "rl"
    return place.role == role and layouts.stage_of(place.folder) == "sft"


def _words(cosine: float | None) -> str:
    return (
        "its factors have other shapes" if cosine is None else f"their A factors are at a median cosine of {cosine:.2f}"
    )
