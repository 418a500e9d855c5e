"""Scores and what they are to be held against: permuted explanations, gold labels, and labels of two words only."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from nla_hub.evaluation.stats import derangement, mean_interval
from nla_hub.geometry import (
    COSINE_UNUSABLE,
    FVE,
    IN_SAMPLE_MINIMUM,
    MSE_UNUSABLE,
    Baseline,
    Reference,
    direction_mse,
    fve_value,
    unit,
)

if TYPE_CHECKING:
    from nla_hub.nla import NLA
    from nla_hub.tiny import Document


@dataclass(frozen=True)
class Measure:
    """Scores of some texts against the protocol's vectors.

    Rows without a usable text count with mse 2 and cosine 0. Intervals are 95 %, resampling documents.

    Attributes:
        what: which texts, in words.
        n: rows.
        cosine, cosine_low, cosine_high: mean over rows.
        fve, fve_mean_norm: FVE against the two denominators of the result's reference.
    """

    what: str
    n: int
    cosine: float
    cosine_low: float
    cosine_high: float
    fve: FVE
    fve_mean_norm: FVE

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready mapping."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Measure:
        """Read what `to_dict` wrote."""
        return cls(**{**data, "fve": FVE(**data["fve"]), "fve_mean_norm": FVE(**data["fve_mean_norm"])})


def measure(
    what: str,
    cosines: Sequence[float | None],
    mses: Sequence[float | None],
    documents: Sequence[Hashable],
    reference: Reference | None,
) -> Measure:
    """Summarise the scores of rows; FVE is not measured without a reference."""
    cos = np.array([COSINE_UNUSABLE if c is None else c for c in cosines])
    mse = np.array([MSE_UNUSABLE if m is None else m for m in mses])
    low, high = mean_interval(cos, documents)

    def fve(baseline: Baseline) -> FVE:
        if reference is None:
            return FVE(None, baseline, "no reference", len(mse))
        denominator = reference.denominator(baseline)
        bottom, top = mean_interval(1.0 - mse / denominator, documents)
        return FVE(fve_value(mse.tolist(), denominator), baseline, reference.dataset, len(mse), bottom, top)

    return Measure(what, len(cos), float(cos.mean()), low, high, fve("raw_variance"), fve("mean_norm"))


def protocol_reference(vectors: Tensor, dataset: str, stored: Reference | None) -> Reference | None:
    """The denominators for `dataset`: those stored with the pair for it, else measured on `vectors` [N, d].

    None from fewer than 100 vectors.
    """
    if stored is not None and stored.dataset == dataset:
        return stored
    if len(vectors) < IN_SAMPLE_MINIMUM:
        return None
    return Reference.measure(vectors, dataset)


def score_texts(
    nla: NLA, texts: Sequence[str | None], vectors: Tensor, *, batch_size: int = 64
) -> tuple[list[float | None], list[float | None]]:
    """cosine and mse of AR(text) with each row of `vectors` [N, d]; None where there is no text."""
    scores = nla.score(list(texts), vectors, batch_size=batch_size)
    return list(scores.cosine), list(scores.mse)


def permuted(texts: Sequence[str | None], *, seed: int = 0) -> list[str | None]:
    """The texts in another order, each at a row that is not its own."""
    return [texts[i] for i in derangement(len(texts), seed=seed)]


# -- the tiny world ------------------------------------------------------------------------------------------

FLOOR_CLAUSES = ("next_word", "last_word")


def gold_label(document: Document, char: int) -> str:
    """Everything known there, as the tiny world's labeler writes it."""
    from nla_hub.tiny.labels import label

    return label(document, char)


def floor_label(document: Document, char: int) -> str:
    """A label that tells only the last and the next word.

    The labeler's clause about the words before may quote several; only the last one is kept.
    """
    from nla_hub.tiny.labels import label

    clauses = label(document, char, FLOOR_CLAUSES).split("; ")
    return "; ".join(_last_word_only(clause) for clause in clauses)


def _last_word_only(clause: str) -> str:
    head, *words = clause.split(" ")
    return f"{head} {words[-1]}" if head == "after" and words else clause


def two_word_vectors(
    train_vectors: Tensor,
    train_words: Sequence[tuple[Hashable, Hashable]],
    words: Sequence[tuple[Hashable, Hashable]],
    *,
    l2: float = 1.0,
) -> Tensor:
    """What the last and the next word alone tell about a vector: ridge regression from both, one-hot, to directions.

    A floor that owes nothing to an AR: an AR trained on full labels may read a label of two words badly.

    Args:
        train_vectors: raw [N, d] of train-split documents; `train_words` their (last, next) words.
        words: (last, next) words of the rows to predict.
        l2: added to the diagonal, in rows: a word seen `l2` times is shrunk by half.

    Returns:
        float64 [len(words), d]; only the direction means anything.
    """
    index: dict[tuple[int, Hashable], int] = {}
    for pair in train_words:
        for side, word in enumerate(pair):
            index.setdefault((side, word), len(index))

    def features(pairs: Sequence[tuple[Hashable, Hashable]]) -> Tensor:
        x = torch.zeros(len(pairs), len(index), dtype=torch.float64)
        for row, pair in enumerate(pairs):
            for side, word in enumerate(pair):
                column = index.get((side, word))
                if column is not None:
                    x[row, column] = 1.0
        return x

    targets = unit(train_vectors)
    mean = targets.mean(dim=0)
    x = features(train_words)
    gram = x.T @ x + l2 * torch.eye(len(index), dtype=torch.float64)
    weight = torch.linalg.solve(gram, x.T @ (targets - mean))
    predicted: Tensor = features(words) @ weight + mean
    return predicted


def linear_scores(found: Tensor, vectors: Tensor) -> tuple[list[float | None], list[float | None]]:
    """cosine and mse between rows of `found` and `vectors`, both [N, d]."""
    mse = direction_mse(found, vectors)
    return (1.0 - mse / 2.0).tolist(), mse.tolist()
