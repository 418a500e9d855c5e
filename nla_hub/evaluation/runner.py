"""Run a protocol on a pair."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from nla_hub.errors import InputError
from nla_hub.evaluation import provenance, tiny_rows
from nla_hub.evaluation.controls import (
    floor_label,
    gold_label,
    linear_scores,
    measure,
    permuted,
    protocol_reference,
    score_texts,
    two_word_vectors,
)
from nla_hub.evaluation.facts import GATE_ROWS, FactRow, facts_table
from nla_hub.evaluation.protocol_rows import (
    Progress,
    ProtocolRows,
    capture_protocol,
    count_statuses,
    explain_rows,
    probe_members,
    quiet,
)
from nla_hub.evaluation.protocols import Protocol, get_protocol, overlap
from nla_hub.evaluation.result import EvalResult, Example
from nla_hub.evaluation.source_check import source_check
from nla_hub.geometry import COSINE_UNUSABLE
from nla_hub.results import Explanation

if TYPE_CHECKING:
    from nla_hub.nla import NLA

SAMPLED_TEMPERATURE = 1.0


def run_protocol(
    nla: NLA,
    protocol: str | Protocol = "tiny-eval-v1",
    *,
    corpus: str | Path | None = None,
    documents: int | None = None,
    facts: bool = True,
    sampled: bool = False,
    with_source_check: bool = False,
    batch_size: int = 64,
    fact_rows: int = GATE_ROWS,
    probe_documents: int = tiny_rows.PROBE_DOCUMENTS,
    progress: Progress | None = None,
) -> EvalResult:
    """Measure a pair by a named protocol.

    Args:
        nla: a pair with both halves.
        protocol: a name, or a Protocol.
        corpus: file of documents, for a protocol that names none; see `read_corpus`.
        documents: another number of documents than the protocol's; its name then says so.
        facts: the facts table (tiny world only).
        sampled: also score explanations of the protocol's rows drawn at temperature 1, one each.
        with_source_check: also probe what the source itself holds (tiny world only).
        batch_size: rows a forward pass.
        fact_rows: rows wanted a fact; more documents are explained for facts that the protocol's rows lack.
        probe_documents: train-split documents that probes are fitted on.
        progress: called after every block of rows.

    Raises:
        UnknownNameError: no such protocol.
        InputError: a corpus where the protocol has its own, none where it needs one, or too few documents in it.
    """
    started = time.perf_counter()
    chosen = get_protocol(protocol).changed(documents=documents)
    if with_source_check and chosen.corpus != "tiny":
        raise InputError("The source check knows facts of the tiny world only.", next_step="use tiny-eval-v1")
    told = progress or quiet
    rows = capture_protocol(nla, chosen, corpus=corpus, facts=facts, fact_rows=fact_rows, batch_size=batch_size)
    explanations = explain_rows(nla, rows.acts, chosen, batch_size=batch_size, progress=told)
    result = _scored(nla, rows, explanations[: rows.n], batch_size)
    if sampled:
        result = _with_sampled(nla, rows, result, batch_size, told)
    if rows.world:
        result = _with_world(nla, rows, explanations, result, probe_documents, batch_size, told)
    if with_source_check:
        checks = source_check(nla, seed=chosen.seed, batch_size=batch_size)
        result = replace(result, source_check=tuple(checks))
    return replace(result, wall_seconds=time.perf_counter() - started)


# -- the parts -----------------------------------------------------------------------------------------------


def _scored(nla: NLA, rows: ProtocolRows, explanations: Sequence[Explanation], batch_size: int) -> EvalResult:
    """The parts of a result that every corpus has, from the protocol's own rows."""
    protocol, acts = rows.protocol, rows.own
    texts = [e.text for e in explanations]
    reference = protocol_reference(acts.vectors, rows.dataset, nla.reference)
    cosines, mses = score_texts(nla, texts, acts.vectors, batch_size=batch_size)
    control = None
    if len(texts) >= 2:
        elsewhere = score_texts(nla, permuted(texts, seed=protocol.seed), acts.vectors, batch_size=batch_size)
        control = measure("explanations of other rows (permuted)", *elsewhere, acts.doc_id, reference)
    usable = [text for text in texts if text is not None]
    gold = [gold_label(row.document, row.char) for row in rows.world[: rows.n]] or None
    return EvalResult(
        nla=nla.name,
        revision=explanations[0].revision,
        base_model=acts.base_model or None,
        layer=nla.site.layer,
        protocol=protocol,
        corpus=rows.corpus,
        n=len(texts),
        documents=len(set(acts.document)),
        real=measure("explanations", cosines, mses, acts.doc_id, reference),
        permuted=control,
        floor=None,
        floor_linear=None,
        ceiling=None,
        reference=reference,
        statuses=count_statuses(explanations),
        words=sum(len(text.split()) for text in usable) / len(usable) if usable else None,
        examples=_examples(explanations, cosines, rows.contexts, gold),
        commit=provenance.commit(),
        versions=provenance.versions(),
        seeds={"protocol": protocol.seed},
    )


def _with_sampled(nla: NLA, rows: ProtocolRows, result: EvalResult, batch_size: int, progress: Progress) -> EvalResult:
    """The result with the protocol's own rows explained once more, drawn at temperature 1."""
    drawn = explain_rows(
        nla,
        rows.own,
        replace(rows.protocol, temperature=SAMPLED_TEMPERATURE),
        batch_size=batch_size,
        progress=progress,
        what="explanations drawn at temperature 1",
    )
    scores = score_texts(nla, [e.text for e in drawn], rows.own.vectors, batch_size=batch_size)
    found = measure("explanations drawn at temperature 1", *scores, rows.own.doc_id, result.reference)
    return replace(result, sampled=found, sampled_statuses=count_statuses(drawn))


def _with_world(
    nla: NLA,
    rows: ProtocolRows,
    explanations: Sequence[Explanation],
    result: EvalResult,
    probe_documents: int,
    batch_size: int,
    progress: Progress,
) -> EvalResult:
    """The result with what only the tiny world has: floors, ceiling, facts, and the check for shared documents."""
    base = rows.world[: rows.n]
    train = tiny_rows.train_rows(nla, documents=probe_documents, batch_size=batch_size)
    vectors, ids = rows.own.vectors, rows.own.doc_id
    gold = [gold_label(row.document, row.char) for row in base]
    short = [floor_label(row.document, row.char) for row in base]
    ridge = two_word_vectors(train.vectors, [_two_words(r) for r in train.rows], [_two_words(r) for r in base])
    by_gold = score_texts(nla, gold, vectors, batch_size=batch_size)
    by_ar = score_texts(nla, short, vectors, batch_size=batch_size)
    by_ridge = linear_scores(ridge, vectors)
    table: list[FactRow] = []
    if rows.members:
        table = facts_table(
            tuple(rows.members),
            actual=[row.facts for row in rows.world],
            named=[tiny_rows.named(e.text) for e in explanations],
            documents=rows.acts.doc_id,
            members=rows.members,
            base=rows.n,
            probed=probe_members(train, rows, progress=progress),
            seed=rows.protocol.seed,
        )
    trained_on = {row.document.text for row in train.rows}
    return replace(
        result,
        ceiling=measure("gold labels, by the AR (ceiling)", *by_gold, ids, result.reference),
        floor=measure("last and next word only, by the AR (floor)", *by_ar, ids, result.reference),
        floor_linear=measure("last and next word only, by ridge regression", *by_ridge, ids, result.reference),
        facts=tuple(table),
        shared_documents=len(overlap({row.document.text for row in base}, trained_on)),
        train_documents=len(trained_on),
        seeds={**result.seeds, "probe_documents": tiny_rows.PROBE_SEED},
    )


def _two_words(row: tiny_rows.Row) -> tuple[object, object]:
    return row.facts.get("last_word"), row.facts.get("next_word")


def _examples(
    explanations: Sequence[Explanation],
    cosines: Sequence[float | None],
    contexts: Sequence[str],
    gold: Sequence[str] | None,
) -> tuple[Example, ...]:
    """Best, median and worst row by cosine; unusable rows count 0, ties go to the earlier row."""
    counted = [COSINE_UNUSABLE if c is None else c for c in cosines]
    order = sorted(range(len(counted)), key=lambda i: (-counted[i], i))
    chosen = {"best": order[0], "median": order[len(order) // 2], "worst": order[-1]}
    return tuple(
        Example(
            choice=choice,
            doc_id=explanations[i].doc_id,
            position=explanations[i].position,
            token=explanations[i].token,
            context=contexts[i],
            text=explanations[i].text,
            raw=explanations[i].raw,
            status=explanations[i].status,
            cosine=cosines[i],
            gold=None if gold is None else gold[i],
        )
        for choice, i in chosen.items()
    )
