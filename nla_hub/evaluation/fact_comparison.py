"""Facts in the explanations of two pairs: recall, precision and captured share of both, and their differences."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from nla_hub.evaluation import tiny_rows
from nla_hub.evaluation.facts import FactHits, fact_hits, share_of_sums
from nla_hub.evaluation.paired import UNMEASURED, Paired, Sides, paired
from nla_hub.evaluation.protocol_rows import ProtocolRows
from nla_hub.results import Explanation


@dataclass(frozen=True)
class FactComparison:
    """One fact of both pairs.

    Attributes:
        n: rows that have the fact.
        probe: what a linear probe on the vector gets right there; None without one.
        gated: whether the probe beats the chance of both pairs by 0.2: only such facts have a share and count in means.
        named_a, named_b: protocol rows whose explanation names the fact.
        recall, precision, share: see `nla_hub.evaluation.facts`; precision counts the protocol's own rows.
    """

    fact: str
    n: int
    probe: float | None
    gated: bool
    named_a: int
    named_b: int
    recall: Paired
    precision: Paired
    share: Paired


def compare_facts(
    rows: ProtocolRows,
    said_a: Sequence[Explanation],
    said_b: Sequence[Explanation],
    probed: Mapping[str, Sequence[Hashable]],
) -> tuple[tuple[FactComparison, ...], dict[str, Paired]]:
    """Each fact of both pairs, and the means over the gated facts as "recall", "precision" and "share"; {} without any.

    Args:
        rows: of the tiny world. said_a, said_b: the explanations of all of them.
        probed: for each fact a probe's answers at its rows.
    """
    seed, documents, own = rows.protocol.seed, rows.acts.doc_id, rows.own.doc_id
    named_a, named_b = ([tiny_rows.named(e.text) for e in said] for said in (said_a, said_b))
    table: list[FactComparison] = []
    recalls: list[Sides] = []
    precisions: list[Sides] = []
    shares: list[Sides] = []
    for fact, members in rows.members.items():
        actual = [rows.world[i].facts[fact] for i in members]
        a, b = (
            fact_hits(actual, [side[i].get(fact) for i in members], probed.get(fact)) for side in (named_a, named_b)
        )
        gated = len(members) >= 2 and a.gated and b.gated
        where = [documents[i] for i in members]
        recall, share = (_recall(a), _recall(b)), (_share(a), _share(b))
        precision = _claims(rows, named_a, fact), _claims(rows, named_b, fact)
        table.append(
            FactComparison(
                fact=fact,
                n=len(members),
                probe=None if a.right is None else float(a.right.mean()),
                gated=gated,
                named_a=int(precision[0][:, 1].sum()),
                named_b=int(precision[1][:, 1].sum()),
                recall=paired(recall, where, seed=seed),
                precision=paired(precision, own, seed=seed),
                share=paired(share, where, share_of_sums, seed=seed) if gated else UNMEASURED,
            )
        )
        if gated:
            recalls.append(_spread(recall, members, len(documents)))
            shares.append(_spread(share, members, len(documents)))
            precisions.append(precision)
    if not recalls:
        return tuple(table), {}
    return tuple(table), {
        "recall": paired(_stack(recalls), documents, seed=seed),
        "precision": paired(_stack(precisions), own, seed=seed),
        "share": paired(_stack(shares), documents, share_of_sums, seed=seed),
    }


def _claims(rows: ProtocolRows, named: Sequence[tiny_rows.Facts], fact: str) -> np.ndarray:
    """Named correctly, and named, of each of the protocol's own rows: [n, 2]."""
    claims = [(rows.world[i].facts.get(fact), named[i].get(fact)) for i in range(rows.n)]
    return np.array([(m is not None and a == m, m is not None) for a, m in claims], dtype=np.float64)


def _recall(hits: FactHits) -> np.ndarray:
    return np.column_stack([hits.hit, np.ones(len(hits.hit))])


def _share(hits: FactHits) -> np.ndarray:
    right = np.full(len(hits.hit), np.nan) if hits.right is None else hits.right
    return np.column_stack([hits.hit, hits.chance, right])


def _spread(sides: Sides, members: Sequence[int], rows: int) -> Sides:
    """Columns [members, k] at their rows among all: [rows, k], zero elsewhere."""

    def spread(columns: np.ndarray) -> np.ndarray:
        found = np.zeros((rows, columns.shape[1]))
        found[list(members)] = columns
        return found

    return spread(sides[0]), spread(sides[1])


def _stack(facts: Sequence[Sides]) -> Sides:
    """Columns [rows, k] of each fact as [rows, facts, k]."""
    return np.stack([a for a, _ in facts], axis=1), np.stack([b for _, b in facts], axis=1)
