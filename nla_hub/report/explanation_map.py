"""A map of explanations: words that weigh much (TF-IDF), few dimensions (SVD), two (UMAP or t-SNE), and groups with names.

Needs the `viz` extra. Near points say near things; distances between groups, and the axes, mean nothing. The same texts
give the same map.
"""

from __future__ import annotations

import importlib.util
import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from nla_hub.errors import MissingExtraError

Method = Literal["umap", "tsne", "off"]

AT_MOST = 2000
"""Explanations on a map; of more, evenly spaced ones."""

AT_LEAST = 12
"""Explanations below which there is no map."""

TERMS = 3
DIMENSIONS = 30
"""Of the SVD, fewer where there are fewer words."""

LARGEST_GROUP_COUNT = 12
SEED = 0


@dataclass(frozen=True)
class Group:
    """Explanations with similar words.

    Attributes:
        name: its most telling words.
        members: indices into the texts.
    """

    name: str
    members: tuple[int, ...]


@dataclass(frozen=True)
class ExplanationMap:
    """Where each text lies: float [n, 2] in 0 to 1; `texts` are the indices that are drawn."""

    method: Method
    texts: tuple[int, ...]
    points: np.ndarray
    groups: tuple[Group, ...]


def installed() -> Method:
    """The method that works here: UMAP before t-SNE, "off" without the extra."""
    if importlib.util.find_spec("sklearn") is None:
        return "off"
    return "umap" if importlib.util.find_spec("umap") is not None else "tsne"


def explanation_map(texts: Sequence[str], method: Method) -> ExplanationMap | None:
    """The map of different texts; None for "off", and where there are too few of them.

    Raises:
        MissingExtraError: the method's package is not installed.
    """
    if method == "off" or len(texts) < AT_LEAST:
        return None
    try:
        from sklearn.decomposition import TruncatedSVD
        from sklearn.feature_extraction.text import TfidfVectorizer
    except ImportError as cause:
        raise MissingExtraError("scikit-learn", "viz", needed_for="The map of explanations") from cause
    every = max(1, math.ceil(len(texts) / AT_MOST))
    chosen = tuple(range(0, len(texts), every))
    words = TfidfVectorizer(sublinear_tf=True, max_features=20_000, token_pattern=r"(?u)\b\w+\b")
    try:
        weights = words.fit_transform([texts[i] for i in chosen])
    except ValueError:  # not one word in all of them
        return None
    dimensions = min(DIMENSIONS, weights.shape[1] - 1, len(chosen) - 1)
    if dimensions < 2:
        return None
    reduced = TruncatedSVD(dimensions, random_state=SEED).fit_transform(weights)
    points = _umap(reduced) if method == "umap" else _tsne(reduced)
    low, high = points.min(axis=0), points.max(axis=0)
    points = (points - low) / np.maximum(high - low, 1e-12)
    return ExplanationMap(method, chosen, points, _groups(reduced, weights, words.get_feature_names_out(), chosen))


def _tsne(rows: np.ndarray) -> np.ndarray:
    from sklearn.manifold import TSNE

    perplexity = min(30.0, (len(rows) - 1) / 3)
    return np.asarray(TSNE(2, perplexity=perplexity, init="pca", random_state=SEED).fit_transform(rows))


def _umap(rows: np.ndarray) -> np.ndarray:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that there is no tensorflow, and that a seed means one thread
        try:
            from umap import UMAP
        except ImportError as cause:
            raise MissingExtraError("umap-learn", "viz", needed_for="--map umap") from cause
        return np.asarray(UMAP(n_neighbors=min(15, len(rows) - 1), random_state=SEED, n_jobs=1).fit_transform(rows))


def _groups(reduced: np.ndarray, weights: Any, names: np.ndarray, chosen: tuple[int, ...]) -> tuple[Group, ...]:
    """k-means over the SVD's dimensions, the largest group first; its words are those that it has above the average."""
    from sklearn.cluster import KMeans

    count = min(LARGEST_GROUP_COUNT, max(2, round(math.sqrt(len(reduced) / 12))))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"sklearn(\.|$)")  # fewer different texts than groups
        labels = KMeans(count, n_init=4, random_state=SEED).fit_predict(reduced)
    overall = np.asarray(weights.mean(axis=0)).ravel()
    found = []
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        above = np.asarray(weights[members].mean(axis=0)).ravel() - overall
        best = [i for i in np.lexsort((names, -above))[:TERMS] if above[i] > 0]
        found.append(Group(", ".join(str(names[i]) for i in best) or "mixed", tuple(chosen[i] for i in members)))
    return tuple(sorted(found, key=lambda group: (-len(group.members), group.members)))
