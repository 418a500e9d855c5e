"""Whether the source model itself holds what an explanation is asked to tell.

For each fact a balanced linear probe is trained on the source's vectors at tokens where the fact must be remembered
(after it was stated or decided, before it is said again) in train-split documents, and tested at such tokens of
eval-split documents. A fact counts as held where the accuracy is at least 0.6 and at least twice the majority class.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from nla_hub.errors import InputError
from nla_hub.evaluation.probe import accuracy, balanced_accuracy, fit_probe, majority_share
from nla_hub.evaluation.protocols import choose
from nla_hub.evaluation.tiny_rows import PROBE_SEED, BareSource, Row, capture_rows, encode, source_tokenizer, stream
from nla_hub.sampling import document_hash

if TYPE_CHECKING:
    from nla_hub.nla import NLA

MEMORY_FACTS = ("person", "object", "colour", "place", "mood", "rhyme", "running_sum")
HELD_ACCURACY = 0.6
HELD_OVER_MAJORITY = 2.0
TOKENS_A_DOCUMENT = 4
"""Tokens taken from one document for one fact, chosen by hash: many documents say more than many tokens of one."""


@dataclass(frozen=True)
class SourceCheckRow:
    """One fact in the source's vectors.

    Attributes:
        n, n_train: eval and train rows; at most four tokens a document.
        accuracy: share of eval rows that the probe gets right.
        balanced: mean over values.
        majority: share of the most frequent value among the eval rows.
        held: accuracy >= 0.6 and >= 2 x majority.
    """

    fact: str
    n: int
    n_train: int
    accuracy: float | None
    balanced: float | None
    majority: float | None
    held: bool


def memory_rows(
    nla: NLA | BareSource,
    facts: Sequence[str],
    *,
    split: Literal["train", "eval"],
    wanted: int,
    seed: int,
    limit: int,
    per_document: int = TOKENS_A_DOCUMENT,
) -> tuple[list[Row], dict[str, list[tuple[int, object]]]]:
    """Rows at ordinary tokens whose end lies in a memory span of a fact: start < end of token <= end of span.

    Documents are read in order until every fact has `wanted` rows, at most `limit` of them.

    Returns:
        the rows (each token once); for each fact (row index, value) pairs.
    """
    tokenizer, max_length = source_tokenizer(nla)
    rows: list[Row] = []
    found: dict[str, list[tuple[int, object]]] = {fact: [] for fact in facts}
    seen: set[str] = set()
    for document in stream(seed, split, limit=limit):
        short = [fact for fact in facts if len(found[fact]) < wanted]
        if not short:
            break
        if document.text in seen:
            continue
        seen.add(document.text)
        encoded = encode(tokenizer, document, max_length)
        ends = {p: end for p, (_, end) in enumerate(encoded.offsets) if not encoded.special[p] and end > 0}
        taken: dict[int, int] = {}
        for fact in short:
            spans = document.memory_spans(fact)
            inside = {
                p: s.value
                for p, end in ends.items()
                for s in spans
                # A span ends where the fact ends or changes, too: the token that ends it no longer counts then.
                if s.start < end <= s.end and document.facts_at(end).get(fact) == s.value
            }
            for p in choose(list(inside), per_document, seed=seed, document=document_hash(document.content) + fact):
                if p not in taken:
                    taken[p] = len(rows)
                    rows.append(Row(document, p, ends[p], {}))
                found[fact].append((taken[p], inside[p]))
    return rows, found


def source_check(
    nla: NLA | BareSource,
    *,
    facts: Sequence[str] = MEMORY_FACTS,
    wanted: int = 1000,
    train_wanted: int = 6000,
    seed: int = 0,
    limit: int = 20_000,
    batch_size: int = 64,
) -> list[SourceCheckRow]:
    """Probe the source for each fact; rows come in whole documents, so `n` may exceed `wanted` a little.

    Raises:
        InputError: the source is not the tiny world's.
    """
    if wanted < 1 or train_wanted < 1:
        raise InputError("Numbers of rows are whole numbers from 1 up.", got=f"{wanted}, {train_wanted}")
    train, train_found = memory_rows(nla, facts, split="train", wanted=train_wanted, seed=PROBE_SEED, limit=limit)
    evaluation, found = memory_rows(nla, facts, split="eval", wanted=wanted, seed=seed, limit=limit)
    train_vectors = capture_rows(nla, train, batch_size=batch_size).vectors
    vectors = capture_rows(nla, evaluation, batch_size=batch_size).vectors
    table = []
    for fact in facts:
        n, n_train = len(found[fact]), len(train_found[fact])
        if n < 2 or n_train < 50:
            table.append(SourceCheckRow(fact, n, n_train, None, None, None, False))
            continue
        probe = fit_probe(train_vectors[[i for i, _ in train_found[fact]]], [v for _, v in train_found[fact]])
        predicted = probe.predict(vectors[[i for i, _ in found[fact]]])
        actual = [v for _, v in found[fact]]
        right, majority = accuracy(predicted, actual), majority_share(actual)
        held = right >= HELD_ACCURACY and right >= HELD_OVER_MAJORITY * majority
        table.append(SourceCheckRow(fact, n, n_train, right, balanced_accuracy(predicted, actual), majority, held))
    return table
