"""The contract of a pair in the making: its sidecars, measured on the tokenizer and the vectors, and its score."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from nla_hub.evaluation import EvalResult
from nla_hub.geometry import norms, unit
from nla_hub.sidecar import EXPLANATION_PLACEHOLDER, Injection, ReferenceRecord, Score, Sidecar
from nla_hub.training.marker import require_marker
from nla_hub.training.recipe import InjectionSpec, Recipe
from nla_hub.weights import REFERENCE_NAME


def make_sidecars(
    recipe: Recipe, tokenizer: Any, vectors: Tensor, *, base_name: str, revision: str | None
) -> tuple[Sidecar, Sidecar]:
    """Sidecars of AV and AR: ids measured on the tokenizer, injection scale on training vectors float32 [N, d].

    Raises:
        RecipeError: a marker that is not one token, or does not stand in the AV prompt once.
    """
    av = Sidecar(
        role="av",
        d_model=int(vectors.shape[1]),
        site=recipe.site,
        marker=require_marker(tokenizer, recipe.marker, recipe.prompts.av),
        av_template=recipe.prompts.av,
        ar_template=recipe.prompts.ar,
        ar_suffix_ids=suffix_ids(tokenizer, recipe.prompts.ar),
        injection=Injection(recipe.injection.kind, injection_scale(recipe.injection, vectors)),
        base_model=base_name,
        source_revision=revision,
        stage="av_sft",
    )
    return av, av.with_(role="ar", stage="ar_sft", final_norm_stripped=True)


def injection_scale(spec: InjectionSpec, vectors: Tensor) -> float | None:
    """The L2 norm that injected vectors get, from training vectors float32 [N, d]; None where they keep their own."""
    if spec.kind == "add":
        return None
    if not isinstance(spec.scale, str):
        return spec.scale
    # About the 75th percentile of the raw norms at layer K, rounded (the reference's recipe): three figures.
    return float(f"{float(torch.quantile(norms(vectors), 0.75)):.3g}")


def suffix_ids(tokenizer: Any, template: str) -> tuple[int, ...]:
    """The ids that end every AR prompt, whatever the explanation: the longest common tail over two texts."""
    tails = [
        tokenizer(template.replace(EXPLANATION_PLACEHOLDER, text), add_special_tokens=True)["input_ids"]
        for text in ("one thing", "several other words.")
    ]
    common: list[int] = []
    for a, b in zip(reversed(tails[0]), reversed(tails[1]), strict=False):
        if a != b:
            break
        common.insert(0, int(a))
    return tuple(common)


def record_score(pair: Path, result: EvalResult, vectors: Tensor) -> None:
    """Write a result's FVE and its reference into both halves of a pair, the reference's mean vector beside the AR.

    `vectors` float32 [n, d] are the rows that were measured.
    """
    if result.reference is None or result.fve.value is None:
        return  # a rehearsal has too few rows to measure anything
    score = Score(
        value=round(result.fve.value, 4),
        baseline=result.fve.baseline,
        dataset=result.fve.dataset,
        n=result.fve.n,
        cosine=None if result.real.cosine is None else round(result.real.cosine, 4),
        protocol=result.protocol.name,
        commit=result.commit,
    )
    record = ReferenceRecord(**vars(result.reference))
    mean = unit(vectors).mean(dim=0).float()
    for half in ("av", "ar"):
        sidecar = Sidecar.read(pair / half)
        sidecar.with_(fve=score, fve_reference=record).write(pair / half)
    # One entry of metadata only: safetensors writes several in an order that changes from process to process.
    save_file({"mean": mean}, pair / "ar" / REFERENCE_NAME, metadata={"dataset": record.dataset})
