"""Run a protocol on a pair."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from nla_hub.capture import Activations
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
from nla_hub.evaluation.facts import GATE_ROWS, FactRow, facts_table, probe_answers
from nla_hub.evaluation.protocols import Protocol, get_protocol, overlap, read_corpus, select_rows
from nla_hub.evaluation.result import EvalResult, Example
from nla_hub.evaluation.source_check import source_check
from nla_hub.geometry import COSINE_UNUSABLE
from nla_hub.results import Explanation
from nla_hub.source_text import Content

if TYPE_CHECKING:
    from nla_hub.nla import NLA

Progress = Callable[[str, int, int], None]
"""Called with (what is done, rows done, rows in all)."""

BLOCK = 256
CONTEXT_CHARACTERS = 80


def _quiet(what: str, done: int, total: int) -> None:
    pass


def run_protocol(
    nla: NLA,
    protocol: str | Protocol = "tiny-eval-v1",
    *,
    corpus: str | Path | None = None,
    documents: int | None = None,
    facts: bool = True,
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
        with_source_check: also probe what the source itself holds (tiny world only).
        batch_size: rows a forward pass.
        fact_rows: rows wanted a fact; more documents are explained for facts that the protocol's rows lack.
        probe_documents: train-split documents that probes are fitted on.
        progress: called after every block of rows.

    Raises:
        UnknownNameError: no such protocol.
        InputError: a corpus where the protocol has its own, none where it needs one, or too few documents in it.
    """
    chosen = get_protocol(protocol).changed(documents=documents)
    told = progress or _quiet
    if chosen.corpus == "tiny":
        if corpus is not None:
            raise InputError(
                f"{chosen.name} has its own documents.", got=f"corpus {corpus}", next_step="use nla-eval-v1"
            )
        return _run_tiny(
            nla,
            chosen,
            facts=facts,
            with_source_check=with_source_check,
            batch_size=batch_size,
            fact_rows=fact_rows,
            probe_documents=probe_documents,
            progress=told,
        )
    if corpus is None:
        raise InputError(
            f"{chosen.name} needs documents.",
            expected="a local .txt, .jsonl or .parquet file, disjoint from the pair's training data",
            next_step="--corpus FILE (corpus= in Python)",
        )
    if with_source_check:
        raise InputError("The source check knows facts of the tiny world only.", next_step="use tiny-eval-v1")
    return _run_corpus(nla, chosen, Path(corpus), batch_size, told)


# -- the two kinds of corpus ---------------------------------------------------------------------------------


def _run_corpus(nla: NLA, protocol: Protocol, corpus: Path, batch_size: int, progress: Progress) -> EvalResult:
    started = time.perf_counter()
    tokenizer, max_length = tiny_rows.source_tokenizer(nla)
    selection = select_rows(tokenizer, read_corpus(corpus), protocol, max_length=max_length, corpus=str(corpus))
    lookup = selection.lookup()
    contents: list[Content] = list(selection.contents)
    acts = nla.capture(
        contents, positions=lambda encoded: lookup[encoded.text], batch_size=batch_size, overflow="truncate"
    )
    explanations = explain_rows(nla, acts, protocol, batch_size=batch_size, progress=progress)
    texts = dict(enumerate(selection.texts))
    result = _scored(
        nla,
        protocol,
        acts,
        explanations,
        corpus=corpus.name,
        dataset=f"{protocol.name} on {corpus.name}",
        contexts=[_context(texts[d], end) for d, end in zip(acts.document, acts.char_end, strict=True)],
        gold=None,
        batch_size=batch_size,
    )
    return replace(result, wall_seconds=time.perf_counter() - started)


def _run_tiny(
    nla: NLA,
    protocol: Protocol,
    *,
    facts: bool,
    with_source_check: bool,
    batch_size: int,
    fact_rows: int,
    probe_documents: int,
    progress: Progress,
) -> EvalResult:
    started = time.perf_counter()
    tokenizer, max_length = tiny_rows.source_tokenizer(nla)
    base = tiny_rows.base_rows(tokenizer, protocol, max_length)
    names = tiny_rows.facts_of_world() if facts else ()
    extra, members = tiny_rows.extra_rows(
        tokenizer,
        base,
        names,
        wanted=fact_rows,
        k=protocol.positions,
        min_position=protocol.min_position,
        seed=protocol.seed,
        max_length=max_length,
    )
    rows, n = [*base, *extra], len(base)
    acts = tiny_rows.capture_rows(nla, rows, batch_size=batch_size)
    explanations = explain_rows(nla, acts, protocol, batch_size=batch_size, progress=progress)
    gold = [gold_label(row.document, row.char) for row in base]
    result = _scored(
        nla,
        protocol,
        acts[:n],
        explanations[:n],
        corpus="tiny world, eval split",
        dataset=protocol.name,
        contexts=[_context(row.document.text, row.char) for row in base],
        gold=gold,
        batch_size=batch_size,
    )
    train = tiny_rows.train_rows(nla, documents=probe_documents, batch_size=batch_size)
    vectors, ids = acts.vectors[:n], acts.doc_id[:n]
    short = [floor_label(row.document, row.char) for row in base]
    ridge = two_word_vectors(train.vectors, [_two_words(r) for r in train.rows], [_two_words(r) for r in base])
    by_ar = score_texts(nla, short, vectors, batch_size=batch_size)
    by_ridge = linear_scores(ridge, vectors)
    table: list[FactRow] = []
    if facts:
        probed = {}
        for done, fact in enumerate(names, start=1):
            answers = probe_answers(*train.having(fact), acts.vectors[members[fact]])
            if answers is not None:
                probed[fact] = answers
            progress("probes", done, len(names))
        table = facts_table(
            names,
            actual=[row.facts for row in rows],
            named=[tiny_rows.named(e.text) for e in explanations],
            documents=acts.doc_id,
            members=members,
            base=n,
            probed=probed,
            seed=protocol.seed,
        )
    checks = source_check(nla, seed=protocol.seed, batch_size=batch_size) if with_source_check else []
    trained_on = {row.document.text for row in train.rows}
    return replace(
        result,
        ceiling=measure(
            "gold labels, by the AR (ceiling)",
            *score_texts(nla, gold, vectors, batch_size=batch_size),
            ids,
            result.reference,
        ),
        floor=measure("last and next word only, by the AR (floor)", *by_ar, ids, result.reference),
        floor_linear=measure("last and next word only, by ridge regression", *by_ridge, ids, result.reference),
        facts=tuple(table),
        source_check=tuple(checks),
        shared_documents=len(overlap({row.document.text for row in base}, trained_on)),
        train_documents=len(trained_on),
        seeds={**result.seeds, "probe_documents": tiny_rows.PROBE_SEED},
        wall_seconds=time.perf_counter() - started,
    )


def _two_words(row: tiny_rows.Row) -> tuple[object, object]:
    return row.facts.get("last_word"), row.facts.get("next_word")


def _context(text: str, end: int) -> str:
    return text[max(0, end - CONTEXT_CHARACTERS) : end]


# -- shared --------------------------------------------------------------------------------------------------


def explain_rows(
    nla: NLA, acts: Activations, protocol: Protocol, *, batch_size: int = 64, progress: Progress = _quiet
) -> list[Explanation]:
    """One explanation of each row as the protocol draws them, not scored."""
    found: list[Explanation] = []
    for begin in range(0, len(acts), BLOCK):
        found += nla.verbalize(
            acts[begin : begin + BLOCK],
            temperature=protocol.temperature,
            max_new_tokens=protocol.max_new_tokens,
            seed=protocol.seed,
            batch_size=batch_size,
        )
        progress("explanations", len(found), len(acts))
    return found


def _scored(
    nla: NLA,
    protocol: Protocol,
    acts: Activations,
    explanations: Sequence[Explanation],
    *,
    corpus: str,
    dataset: str,
    contexts: Sequence[str],
    gold: Sequence[str] | None,
    batch_size: int,
) -> EvalResult:
    """The parts of a result that every corpus has."""
    texts = [e.text for e in explanations]
    reference = protocol_reference(acts.vectors, dataset, nla.reference)
    cosines, mses = score_texts(nla, texts, acts.vectors, batch_size=batch_size)
    control = None
    if len(texts) >= 2:
        elsewhere = score_texts(nla, permuted(texts, seed=protocol.seed), acts.vectors, batch_size=batch_size)
        control = measure("explanations of other rows (permuted)", *elsewhere, acts.doc_id, reference)
    statuses: dict[str, int] = {}
    for e in explanations:
        statuses[e.status] = statuses.get(e.status, 0) + 1
    usable = [text for text in texts if text is not None]
    return EvalResult(
        nla=nla.name,
        revision=explanations[0].revision,
        base_model=acts.base_model or None,
        layer=nla.site.layer,
        protocol=protocol,
        corpus=corpus,
        n=len(texts),
        documents=len(set(acts.document)),
        real=measure("explanations", cosines, mses, acts.doc_id, reference),
        permuted=control,
        floor=None,
        floor_linear=None,
        ceiling=None,
        reference=reference,
        statuses=dict(sorted(statuses.items())),
        words=sum(len(text.split()) for text in usable) / len(usable) if usable else None,
        examples=_examples(explanations, cosines, contexts, gold),
        commit=provenance.commit(),
        versions=provenance.versions(),
        seeds={"protocol": protocol.seed},
    )


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
