"""Two pairs of one base model on the same rows of a protocol: figures of both and the difference, paired by document."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from nla_hub.errors import InputError
from nla_hub.evaluation import provenance, tiny_rows
from nla_hub.evaluation.controls import protocol_reference, score_texts
from nla_hub.evaluation.fact_comparison import FactComparison, compare_facts
from nla_hub.evaluation.facts import GATE_ROWS
from nla_hub.evaluation.paired import UNMEASURED, Paired, paired
from nla_hub.evaluation.protocol_rows import (
    Progress,
    ProtocolRows,
    capture_protocol,
    count_statuses,
    explain_rows,
    probe_members,
    quiet,
)
from nla_hub.evaluation.protocols import Protocol, get_protocol
from nla_hub.geometry import COSINE_UNUSABLE, MSE_UNUSABLE, Reference
from nla_hub.results import Explanation
from nla_hub.source_text import encode_source

if TYPE_CHECKING:
    from nla_hub.nla import NLA

CHECKED_DOCUMENTS = 16
"""Documents that both pairs capture, to see that they read the same vectors."""

SAME = 1e-5
"""Largest difference of two captures of the same vectors, over the largest value."""

SIDES = ("a", "b", "difference")


@dataclass(frozen=True)
class Comparison:
    """Two pairs, A and B, on the same captured rows; every difference is A - B.

    Attributes:
        a, b, revision_a, revision_b: what was compared.
        base_model, layer: what both read.
        protocol, corpus, n, documents: on what.
        reference: denominator of both FVEs; None from fewer than 100 rows without a stored one.
        fve, cosine, ok, words: FVE (raw variance), mean cosine, share of usable explanations, their mean number of words.
        recall, precision, share: means over the gated facts; not measured where there is none.
        facts: each fact; empty where the corpus has no known facts.
        statuses_a, statuses_b: rows of each status.
        commit, versions, seeds, wall_seconds: provenance.
    """

    a: str
    b: str
    revision_a: str | None
    revision_b: str | None
    base_model: str | None
    layer: int
    protocol: Protocol
    corpus: str
    n: int
    documents: int
    reference: Reference | None
    fve: Paired
    cosine: Paired
    ok: Paired
    words: Paired
    recall: Paired = UNMEASURED
    precision: Paired = UNMEASURED
    share: Paired = UNMEASURED
    facts: tuple[FactComparison, ...] = ()
    statuses_a: Mapping[str, int] = field(default_factory=dict)
    statuses_b: Mapping[str, int] = field(default_factory=dict)
    commit: str | None = None
    versions: Mapping[str, str | None] = field(default_factory=dict)
    seeds: Mapping[str, int] = field(default_factory=dict)
    wall_seconds: float | None = None

    @property
    def gated(self) -> tuple[str, ...]:
        """The facts that the means are over."""
        return tuple(row.fact for row in self.facts if row.gated)

    def fact(self, name: str) -> FactComparison | None:
        """The comparison of the fact `name`."""
        return next((row for row in self.facts if row.fact == name), None)

    def figures(self) -> dict[str, float | None]:
        """Every figure that a gate can name; None: not measured.

        SIDE.FIGURE, with SIDE a, b or difference, and SIDE.FIGURE_low and SIDE.FIGURE_high for its interval; of one fact
        SIDE.FIGURE.FACT, SIDE.FIGURE_low.FACT and SIDE.FIGURE_high.FACT.
        """
        found: dict[str, float | None] = {"n": float(self.n), "gated": float(len(self.gated))}
        for name in ("fve", "cosine", "ok", "words", "recall", "precision", "share"):
            found |= _figures(name, "", getattr(self, name))
        for row in self.facts:
            found |= {f"n.{row.fact}": float(row.n), f"probe.{row.fact}": row.probe}
            for name in ("recall", "precision", "share"):
                found |= _figures(name, f".{row.fact}", getattr(row, name))
        return found

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready mapping with stable keys."""
        data = asdict(self)
        data["facts"] = list(data["facts"])
        data["gated"] = list(self.gated)
        return data

    def to_markdown(self) -> str:
        """Tables for cards and docs."""
        from nla_hub.evaluation.render_comparison import markdown

        return markdown(self)

    def __str__(self) -> str:
        from nla_hub.evaluation.render_comparison import plain

        return plain(self)


def _figures(name: str, of: str, figure: Paired) -> Iterator[tuple[str, float | None]]:
    for side in SIDES:
        estimate = getattr(figure, side)
        yield f"{side}.{name}{of}", estimate.value
        yield f"{side}.{name}_low{of}", estimate.low
        yield f"{side}.{name}_high{of}", estimate.high


def compare(
    nla: NLA,
    other: NLA,
    protocol: str | Protocol = "tiny-eval-v1",
    *,
    corpus: str | Path | None = None,
    documents: int | None = None,
    batch_size: int = 64,
    facts: bool = True,
    fact_rows: int = GATE_ROWS,
    probe_documents: int = tiny_rows.PROBE_DOCUMENTS,
    progress: Progress | None = None,
) -> Comparison:
    """Measure two pairs on the same rows: captured once from A's source, explained by both, scored by each one's AR.

    Args:
        nla, other: A and B, both with both halves.
        protocol, corpus, documents, batch_size, facts, fact_rows, probe_documents, progress: as in `run_protocol`.

    Raises:
        UnknownNameError: no such protocol.
        InputError: pairs that do not read the same vectors, or a corpus as in `run_protocol`.
    """
    started = time.perf_counter()
    chosen = get_protocol(protocol).changed(documents=documents)
    told = progress or quiet
    _require_same_site(nla, other)
    rows = capture_protocol(nla, chosen, corpus=corpus, facts=facts, fact_rows=fact_rows, batch_size=batch_size)
    _require_same_vectors(nla, other, rows, batch_size)
    said_a, said_b = (
        explain_rows(pair, rows.acts, chosen, batch_size=batch_size, progress=told, what=f"explanations of {side}")
        for pair, side in ((nla, "A"), (other, "B"))
    )
    stored = nla.reference if nla.reference == other.reference else None
    reference = protocol_reference(rows.own.vectors, rows.dataset, stored)
    columns = [
        _columns(pair, said[: rows.n], rows, reference, batch_size) for pair, said in ((nla, said_a), (other, said_b))
    ]
    scores = {
        name: paired((columns[0][name], columns[1][name]), rows.own.doc_id, seed=chosen.seed)
        for name in ("fve", "cosine", "ok", "words")
        if name in columns[0]
    }
    means: dict[str, Paired] = {}
    table: tuple[FactComparison, ...] = ()
    if rows.members:
        train = tiny_rows.train_rows(nla, documents=probe_documents, batch_size=batch_size)
        table, means = compare_facts(rows, said_a, said_b, probe_members(train, rows, progress=told))
    return Comparison(
        a=nla.name,
        b=other.name,
        revision_a=said_a[0].revision,
        revision_b=said_b[0].revision,
        base_model=rows.acts.base_model or None,
        layer=nla.site.layer,
        protocol=chosen,
        corpus=rows.corpus,
        n=rows.n,
        documents=len(set(rows.own.document)),
        reference=reference,
        **{"fve": UNMEASURED, **scores},
        **means,
        facts=table,
        statuses_a=count_statuses(said_a[: rows.n]),
        statuses_b=count_statuses(said_b[: rows.n]),
        commit=provenance.commit(),
        versions=provenance.versions(),
        seeds={"protocol": chosen.seed} | ({"probe_documents": tiny_rows.PROBE_SEED} if rows.members else {}),
        wall_seconds=time.perf_counter() - started,
    )


# -- the same vectors ----------------------------------------------------------------------------------------


def _require_same_site(nla: NLA, other: NLA) -> None:
    faults = [
        f"{what}: {mine} and {theirs}"
        for what, mine, theirs in (("site", nla.site, other.site), ("d_model", nla.d_model, other.d_model))
        if mine != theirs
    ]
    if faults:
        raise _different(nla, other, "These two pairs do not read the same vectors.", faults)


def _require_same_vectors(nla: NLA, other: NLA, rows: ProtocolRows, batch_size: int) -> None:
    """Both tokenizers and both sources on the protocol's first documents."""
    contents = list(rows.contents[:CHECKED_DOCUMENTS])
    read = []
    for pair in (nla, other):
        tokenizer, limit = tiny_rows.source_tokenizer(pair)
        read.append([encode_source(tokenizer, c, max_length=limit, overflow="truncate")[0].ids for c in contents])
    unlike = sum(mine != theirs for mine, theirs in zip(*read, strict=True))
    if unlike:
        fault = f"{unlike} of {len(contents)} documents are other tokens to one source than to the other"
        raise _different(nla, other, "The base models of these two pairs read texts differently.", [fault])
    mine, theirs = (
        pair.capture(contents, "last", batch_size=batch_size, overflow="truncate").vectors.double()
        for pair in (nla, other)
    )
    apart = float((mine - theirs).abs().max() / theirs.abs().max())
    if not apart <= SAME:
        fault = f"the same {len(contents)} tokens give vectors that differ by {apart:.2g} of the largest value"
        raise _different(nla, other, "These two pairs read different base models.", [fault])


def _different(nla: NLA, other: NLA, what: str, faults: Sequence[str]) -> InputError:
    return InputError(
        what,
        where=f"{nla.name} against {other.name}",
        expected=f"one site of one base model, vectors equal within {SAME:g}",
        faults=faults,
        next_step="measure each pair by itself: nla-hub eval NLA; a difference needs the same vectors",
    )


# -- figures -------------------------------------------------------------------------------------------------


def _columns(
    nla: NLA, explanations: Sequence[Explanation], rows: ProtocolRows, reference: Reference | None, batch_size: int
) -> dict[str, np.ndarray]:
    """What each score of one pair is summed from: [n, 2], a value and its weight; "fve" only with a reference."""
    texts = [e.text for e in explanations]
    cosines, mses = score_texts(nla, texts, rows.own.vectors, batch_size=batch_size)
    one = np.ones(len(texts))
    usable = np.array([text is not None for text in texts], dtype=np.float64)
    words = np.array([0 if text is None else len(text.split()) for text in texts], dtype=np.float64)
    cosine = np.array([COSINE_UNUSABLE if c is None else c for c in cosines])
    found = {"cosine": (cosine, one), "ok": (usable, one), "words": (words, usable)}
    if reference is not None:
        mse = np.array([MSE_UNUSABLE if m is None else m for m in mses])
        found["fve"] = (1.0 - mse / reference.denominator("raw_variance"), one)
    return {name: np.column_stack(columns) for name, columns in found.items()}
