"""What is linear between labels and vectors: a ridge map from the words of labels, and probes for the tiny world's facts."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Hashable, Mapping, Sequence

import torch
from torch import Tensor

from nla_hub.evaluation.probe import balanced_accuracy, fit_probe
from nla_hub.evaluation.tiny_rows import facts_of_world
from nla_hub.geometry import direction_mse, unit
from nla_hub.training.data import TrainingRows

MOST_WORDS = 2000
"""Words that a ridge map reads, the most frequent of the training labels; a word seen once teaches nothing."""

PENALTIES = (1.0, 10.0, 100.0, 1000.0)
"""Added to the diagonal, in rows; the best on the last fifth of the training documents is used."""

LEAST_ROWS = 30
"""Rows of a fact, in training and held out, below which its probe is left out."""


def ridge_from_words(train: TrainingRows, held_out: TrainingRows) -> Tensor:
    """mse of each held-out row under a ridge map from which words its label holds to the vector's direction, float64 [N].

    The words' order and number are not read, so this is what the labels say at least, to a reader without a model.
    """
    counts = Counter(word for text in train.texts for word in _words(text))
    kept = [word for word, n in sorted(counts.items(), key=lambda item: (-item[1], item[0])) if n > 1][:MOST_WORDS]
    index = {word: i for i, word in enumerate(kept)}
    x, target = _features(train.texts, index), unit(train.vectors)
    documents = list(dict.fromkeys(train.doc_ids))
    later = set(documents[len(documents) - len(documents) // 5 :])
    mask = torch.tensor([doc_id in later for doc_id in train.doc_ids])
    penalty = PENALTIES[1]
    if bool(mask.any()):
        fitted = _ridge(x[~mask], target[~mask], x[mask], PENALTIES)
        penalty = min(fitted, key=lambda each: float(direction_mse(fitted[each], target[mask]).mean()))
    found = _ridge(x, target, _features(held_out.texts, index), [penalty])[penalty]
    return direction_mse(found, held_out.vectors)


def _words(text: str) -> set[str]:
    return set(re.findall(r"\w+|[^\w\s]", text.lower()))


def _features(texts: Sequence[str], index: Mapping[str, int]) -> Tensor:
    """Which words each text holds, float64 [texts, words]."""
    x = torch.zeros(len(texts), len(index), dtype=torch.float64)
    for row, text in enumerate(texts):
        for word in _words(text):
            if word in index:
                x[row, index[word]] = 1.0
    return x


def _ridge(x: Tensor, target: Tensor, new: Tensor, penalties: Sequence[float]) -> dict[float, Tensor]:
    """The predictions for rows `new` [M, w] of ridge regression from `x` [N, w] to `target` [N, d]: [M, d] for each penalty."""
    centre, mean = x.mean(dim=0), target.mean(dim=0)
    values, basis = torch.linalg.eigh((x - centre).T @ (x - centre))
    projected = basis.T @ ((x - centre).T @ (target - mean))
    return {
        penalty: mean + (new - centre) @ basis @ (projected / (values.clamp_min(0.0) + penalty)[:, None])
        for penalty in penalties
    }


def fact_accuracies(
    train_vectors: Tensor,
    train_facts: Sequence[Mapping[str, Hashable]],
    vectors: Tensor,
    facts: Sequence[Mapping[str, Hashable]],
) -> dict[str, float]:
    """Balanced accuracy, on `vectors` [N, d], of a linear probe for each fact that enough rows have."""
    found = {}
    for fact in facts_of_world():
        own = [i for i, known in enumerate(train_facts) if fact in known]
        others = [i for i, known in enumerate(facts) if fact in known]
        values = [train_facts[i][fact] for i in own]
        if min(len(own), len(others)) < LEAST_ROWS or len(set(values)) < 2:
            continue
        probe = fit_probe(train_vectors[own], values)
        found[fact] = balanced_accuracy(probe.predict(vectors[others]), [facts[i][fact] for i in others])
    return found
