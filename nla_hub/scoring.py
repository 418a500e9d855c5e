"""How well texts bring their vectors back: the scores of rows, those without a usable text included."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import cast

from torch import Tensor

from nla_hub.errors import InputError
from nla_hub.geometry import Reference, cosine, direction_mse
from nla_hub.results import Explanation, Scores


def score_rows(
    explanations: Explanation | str | Sequence[Explanation | str | None],
    targets: Tensor,
    reconstruct: Callable[[Sequence[str]], Tensor],
    reference: Reference | None,
) -> Scores:
    """Cosine and mse = 2 (1 - cosine) of each row; None for rows without a text.

    Args:
        explanations: one a vector; a single one for a single vector.
        targets: raw vectors float32 [N, d].
        reconstruct: texts -> float32 [n, d]; asked once, for the rows that have a text.

    Raises:
        InputError: not one explanation or text a vector.
    """
    one = isinstance(explanations, (str, Explanation))
    if not one and not isinstance(explanations, Sequence):
        raise InputError(
            "Explanations are expected here.", got=type(explanations).__name__, expected="texts or Explanations"
        )
    rows = [explanations] if one else list(cast("Sequence[Explanation | str | None]", explanations))
    for i, row in enumerate(rows):
        if not (row is None or isinstance(row, (str, Explanation))):
            raise InputError(
                "score() takes one explanation a vector.",
                where=f"row {i}",
                got=type(row).__name__,
                next_step="with several samples a vector, score them one sample at a time, or use explain(n=...)",
            )
    texts = [row.text if isinstance(row, Explanation) else cast("str | None", row) for row in rows]
    if len(targets) != len(texts):
        raise InputError("score() needs one vector a text.", got=f"{len(texts)} texts and {len(targets)} vectors")
    usable = [i for i, text in enumerate(texts) if text is not None]
    found = reconstruct([cast(str, texts[i]) for i in usable])
    cosines: list[float | None] = [None] * len(texts)
    mses: list[float | None] = [None] * len(texts)
    if usable:
        cos = cosine(found, targets[usable]).tolist()
        mse = direction_mse(found, targets[usable]).tolist()
        for i, c, m in zip(usable, cos, mse, strict=True):
            cosines[i], mses[i] = c, m
    in_sample = Reference.measure(targets, "in-sample") if len(targets) >= 2 else None
    return Scores(tuple(cosines), tuple(mses), reference, in_sample)
