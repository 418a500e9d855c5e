"""Facts in explanations: what is named, how often it is true, and how much of what the vector holds that is.

For a fact with values in a row (definitions):

    recall     = named correctly / rows that have it
    precision  = named correctly / named, over the protocol's own rows, those without the fact included
    chance     = recall after permuting explanations among the rows that have the fact
    probe      = share of the same rows that a balanced linear probe on the vector, trained elsewhere, gets right
    share      = (recall - chance) / (probe - chance)

Chance is not drawn: row i's chance is the share of the *other* rows whose explanation names i's value, which is
the mean over all permutations without fixed points.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from torch import Tensor

from nla_hub.evaluation.probe import balanced_accuracy, fit_probe, majority_share
from nla_hub.evaluation.stats import cluster_interval, mean_interval

Facts = Mapping[str, Hashable]

GATE_GAP = 0.2
"""Only facts whose probe beats chance by this much have a captured share: the others are hardly in the vector."""

GATE_ROWS = 1000
"""Rows a fact that a gate wants."""


@dataclass(frozen=True)
class FactRow:
    """One fact of the table. Shares of 1; None: not measured, or (share) not in the vector.

    Attributes:
        n: rows that have the fact.
        recall, recall_low, recall_high: with a 95 % bootstrap interval over documents.
        recall_balanced: mean over the fact's values.
        named: protocol rows whose explanation names the fact; `precision` is the correct share of these.
        precision_given: correct / named among the `n` rows that have the fact.
        chance, probe: see the module.
        probe_balanced: mean over the fact's values.
        majority: share of the most frequent value among the `n` rows.
        share, share_low, share_high: captured share with a paired 95 % bootstrap interval.
        gated: whether probe - chance >= 0.2, so that gates may use the share.
    """

    fact: str
    n: int
    recall: float | None
    recall_low: float | None
    recall_high: float | None
    recall_balanced: float | None
    named: int
    precision: float | None
    precision_given: float | None
    chance: float | None
    probe: float | None
    probe_balanced: float | None
    majority: float | None
    share: float | None
    share_low: float | None
    share_high: float | None
    gated: bool

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready mapping."""
        return asdict(self)


def chance_of_rows(named: Sequence[Hashable | None], actual: Sequence[Hashable]) -> np.ndarray:
    """For each row the share of the other rows whose explanation names this row's value: float64 [n]."""
    n = len(actual)
    if n < 2:
        return np.zeros(n)
    counts = Counter(named)
    return np.array([(counts[a] - (m == a)) / (n - 1) for m, a in zip(named, actual, strict=True)])


def share_of_sums(sums: np.ndarray) -> np.ndarray:
    """(recall - chance) / (probe - chance) from sums [..., >= 3] of hits, chances and probe hits."""
    result: np.ndarray = (sums[..., 0] - sums[..., 1]) / (sums[..., 2] - sums[..., 1])
    return result


@dataclass(frozen=True, eq=False)
class FactHits:
    """What recall, chance, probe and share are made of: one number a row that has the fact, each float64 [n].

    Attributes:
        hit: 1 where the explanation names the fact correctly.
        chance: see `chance_of_rows`.
        right: 1 where the probe is right; None without a probe.
    """

    hit: np.ndarray
    chance: np.ndarray
    right: np.ndarray | None

    @property
    def gated(self) -> bool:
        """Whether the probe beats chance by `GATE_GAP`."""
        return self.right is not None and bool(self.right.mean() - self.chance.mean() >= GATE_GAP)


def fact_hits(
    actual: Sequence[Hashable], named: Sequence[Hashable | None], probed: Sequence[Hashable | None] | None
) -> FactHits:
    """The hits of one fact; arguments as in `fact_row`."""
    hit = np.array([m == a for m, a in zip(named, actual, strict=True)], dtype=np.float64)
    right = None
    if probed is not None:
        right = np.array([p == a for p, a in zip(probed, actual, strict=True)], dtype=np.float64)
    return FactHits(hit, chance_of_rows(named, actual), right)


def fact_row(
    fact: str,
    *,
    actual: Sequence[Hashable],
    named: Sequence[Hashable | None],
    probed: Sequence[Hashable | None] | None,
    documents: Sequence[Hashable],
    base_actual: Sequence[Hashable | None],
    base_named: Sequence[Hashable | None],
    seed: int = 0,
) -> FactRow:
    """The table's row for one fact.

    Args:
        actual, named, probed: value, value named by the explanation (None: none), and the probe's answer, of each of
            the `n` rows that have the fact; `probed` None where there is no probe.
        documents: document of each of these rows.
        base_actual, base_named: the same over the protocol's own rows, None where a row does not have the fact.
    """
    claims = [(a, m) for a, m in zip(base_actual, base_named, strict=True) if m is not None]
    precision = float(np.mean([a == m for a, m in claims])) if claims else None
    n = len(actual)
    if n < 2:
        return FactRow(
            fact=fact, n=n, recall=None, recall_low=None, recall_high=None, recall_balanced=None, named=len(claims),
            precision=precision, precision_given=None, chance=None, probe=None, probe_balanced=None, majority=None,
            share=None, share_low=None, share_high=None, gated=False,
        )  # fmt: skip
    hits = fact_hits(actual, named, probed)
    hit, chance, right = hits.hit, hits.chance, hits.right
    low, high = mean_interval(hit, documents, seed=seed)
    given = [a == m for a, m in zip(actual, named, strict=True) if m is not None]
    probe = probe_balanced = share = share_low = share_high = None
    if probed is not None and right is not None:
        probe, probe_balanced = float(right.mean()), balanced_accuracy(probed, actual)
        if hits.gated:
            columns = np.column_stack([hit, chance, right])
            share = float(share_of_sums(columns.sum(axis=0)))
            share_low, share_high = cluster_interval(columns, documents, share_of_sums, seed=seed)
    return FactRow(
        fact=fact,
        n=n,
        recall=float(hit.mean()),
        recall_low=low,
        recall_high=high,
        recall_balanced=balanced_accuracy(named, actual),
        named=len(claims),
        precision=precision,
        precision_given=float(np.mean(given)) if given else None,
        chance=float(chance.mean()),
        probe=probe,
        probe_balanced=probe_balanced,
        majority=majority_share(actual),
        share=share,
        share_low=share_low,
        share_high=share_high,
        gated=hits.gated,
    )


def facts_table(
    facts: Sequence[str],
    *,
    actual: Sequence[Facts],
    named: Sequence[Facts],
    documents: Sequence[Hashable],
    members: Mapping[str, Sequence[int]],
    base: int,
    probed: Mapping[str, Sequence[Hashable | None]],
    seed: int = 0,
) -> list[FactRow]:
    """The table over rows whose first `base` are the protocol's own.

    Args:
        actual, named: facts of each row, and those its explanation names (empty where it is not usable).
        documents: document of each row.
        members: for each fact the rows that count for it.
        probed: for each fact the probe's answers on its members; facts without a probe are absent.
    """
    table = []
    for fact in facts:
        rows = members[fact]
        table.append(
            fact_row(
                fact,
                actual=[actual[i][fact] for i in rows],
                named=[named[i].get(fact) for i in rows],
                probed=probed.get(fact),
                documents=[documents[i] for i in rows],
                base_actual=[actual[i].get(fact) for i in range(base)],
                base_named=[named[i].get(fact) for i in range(base)],
                seed=seed,
            )
        )
    return table


def probe_answers(
    train_vectors: Tensor, train_values: Sequence[Hashable], vectors: Tensor, *, at_least: int = 50
) -> list[Hashable] | None:
    """Answers of a balanced probe on `vectors` [n, d]; None where fewer than `at_least` rows could be trained on."""
    if len(train_values) < at_least or len(vectors) == 0:
        return None
    return fit_probe(train_vectors, train_values).predict(vectors)
