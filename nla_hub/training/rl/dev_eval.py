"""The greedy measurement on held-out rows of the training stream, made every few steps of a joint run.

Always the same rows, denominators and eight samples, so that two evaluations differ in the models alone.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nla_hub.batching import check_batch_size
from nla_hub.engines.base import Engine
from nla_hub.errors import InputError
from nla_hub.evaluation.facts import Facts, fact_row
from nla_hub.evaluation.stats import mean_interval
from nla_hub.geometry import (
    COSINE_UNUSABLE,
    MSE_UNUSABLE,
    Reference,
    cosine,
    direction_mse,
    fve_value,
    require_finite,
)
from nla_hub.prompts import ARPrompt, parse_explanation
from nla_hub.reconstructor import ARModel, Reconstructor
from nla_hub.sidecar import Sidecar
from nla_hub.training.data import TrainingRows
from nla_hub.training.rl.reward import repeated_pairs

Named = Callable[[str], Mapping[str, Hashable]]
"""The facts that a text names."""

SAMPLES = 8
"""Rows shown with every evaluation, chosen by hash."""

CONTEXT_CHARACTERS = 80
"""Characters of the document shown with a sample: those up to its token."""

FACT_ROWS = 20
"""Rows from which a fact counts in the means: with fewer, one row moves its share by more than 5 points."""


@dataclass(frozen=True)
class DevFact:
    """One fact: rows that have it, the share named correctly, rows that name it, the correct share of these."""

    fact: str
    n: int
    recall: float | None
    named: int
    precision: float | None


@dataclass(frozen=True)
class DevFacts:
    """Facts in the texts; `recall` and `precision` are means over facts with at least 20 rows that have (name) it."""

    recall: float | None
    precision: float | None
    rows: tuple[DevFact, ...]


@dataclass(frozen=True)
class DevSample:
    """One row as a reader sees it; `cosine` is None without a usable text, `gold` where there is no label."""

    doc_id: str
    position: int
    context: str
    text: str | None
    raw: str
    status: str
    cosine: float | None
    gold: str | None


@dataclass(frozen=True)
class DevResult:
    """One evaluation. Rows without a usable explanation count with mse 2 and cosine 0; unknown figures are None.

    Attributes:
        n: rows.
        fve, fve_low, fve_high: against the rows' raw variance, with a 95 % bootstrap interval over documents.
        fve_mean_norm: against the other denominator.
        cosine: mean cosine by the live AR; `watch_cosine` by the second AR.
        permuted: `fve` of the same texts given to rows of other documents.
        statuses: rows of each status.
        words: mean over usable texts. tokens: mean new tokens over all rows.
        repetition: mean share of repeated word pairs in usable texts.
        facts: None where the rows' facts are not known.
        samples: the eight fixed rows.
    """

    n: int
    fve: float | None
    fve_low: float | None
    fve_high: float | None
    fve_mean_norm: float | None
    cosine: float
    permuted: float | None
    watch_cosine: float | None
    statuses: dict[str, int]
    words: float | None
    tokens: float
    repetition: float | None
    facts: DevFacts | None
    samples: tuple[DevSample, ...]

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready mapping."""
        data = asdict(self)
        data["samples"] = list(data["samples"])
        if self.facts is not None:
            data["facts"]["rows"] = list(data["facts"]["rows"])
        return data


class DevEvaluation:
    """What is measured, built once a run.

    Args:
        rows: held-out rows of the training stream; `texts` are their gold labels, "" where there is none.
        prompt: of the ARs.
        n: rows to use at most, taken evenly.
        max_new_tokens, batch_size: of the generation; the ARs run in batches of the same size.
        named: reads facts from a text. truth: the facts of each of `rows`; None values count as unknown. Both or neither.

    Attributes:
        rows: the rows in use. reference: their denominators, measured once.

    Raises:
        InputError: fewer than two rows, facts for another number of rows, or only one of `named` and `truth`.
        VectorError: a vector without a direction.
    """

    def __init__(
        self,
        rows: TrainingRows,
        prompt: ARPrompt,
        *,
        n: int,
        max_new_tokens: int,
        batch_size: int = 64,
        named: Named | None = None,
        truth: Sequence[Mapping[str, Hashable]] | None = None,
    ) -> None:
        check_batch_size(batch_size)
        if (named is None) != (truth is None):
            raise InputError("Facts are measured with `named` and `truth` together.", next_step="pass both, or neither")
        if truth is not None and len(truth) != len(rows):
            raise InputError("`truth` needs the facts of every row.", got=len(truth), expected=len(rows))
        count = min(n, len(rows))
        if count < 2:
            raise InputError("A held-out evaluation needs at least two rows.", got=f"{len(rows)} rows, n={n}")
        taken = [i * len(rows) // count for i in range(count)]
        self.rows = TrainingRows(
            vectors=rows.vectors[taken],
            texts=tuple(rows.texts[i] for i in taken),
            doc_ids=tuple(rows.doc_ids[i] for i in taken),
            positions=tuple(rows.positions[i] for i in taken),
            prefixes=tuple(rows.prefixes[i] for i in taken),
            site=rows.site,
        )
        require_finite(self.rows.vectors, what="held-out vectors")
        self.reference = Reference.measure(self.rows.vectors, "held-out rows")
        self._prompt = prompt
        self._max_new_tokens = max_new_tokens
        self._batch_size = batch_size
        self._named = named
        self._truth: list[Facts] | None = None
        if truth is not None:
            self._truth = [{fact: value for fact, value in truth[i].items() if value is not None} for i in taken]
        self._elsewhere = other_documents(self.rows.doc_ids)
        self._shown = _hashed(self.rows, SAMPLES)

    def measure(self, engine: Engine, ar: ARModel, watch: ARModel | None = None) -> DevResult:
        """Explain every row greedily and score the texts by `ar`, and by `watch` where there is a second AR.

        A text longer than the AR reads counts as unusable in the scores; its status stays what it is. The models' modes and
        gradients are left as they are.
        """
        completions = engine.generate(
            self.rows.vectors,
            None,
            temperature=1.0,
            max_new_tokens=self._max_new_tokens,
            batch_size=self._batch_size,
        )
        parsed = [parse_explanation(completion.text) for completion in completions]
        texts = [text for _, text in parsed]
        statuses: dict[str, int] = {}
        for status, _ in parsed:
            statuses[status] = statuses.get(status, 0) + 1
        usable = [text for text in texts if text is not None]
        found = self._reconstruct(ar, texts)
        cosines, mses = self._scores(found)
        fve, low, high = self._fve(mses)
        permuted = None
        if self._elsewhere is not None:
            permuted = self._fve(self._scores([found[i] for i in self._elsewhere])[1])[0]
        denominator = self.reference.mean_norm
        return DevResult(
            n=len(texts),
            fve=fve,
            fve_low=low,
            fve_high=high,
            fve_mean_norm=fve_value(mses, denominator) if denominator > 0 else None,
            cosine=_mean_cosine(cosines),
            permuted=permuted,
            watch_cosine=None if watch is None else _mean_cosine(self._scores(self._reconstruct(watch, texts))[0]),
            statuses=dict(sorted(statuses.items())),
            words=_mean([len(text.split()) for text in usable]),
            tokens=sum(len(completion.ids) for completion in completions) / len(completions),
            repetition=_mean([repeated_pairs(text) for text in usable]),
            facts=self._facts(texts),
            samples=tuple(
                DevSample(
                    doc_id=self.rows.doc_ids[i],
                    position=self.rows.positions[i],
                    context=self.rows.prefixes[i][-CONTEXT_CHARACTERS:],
                    text=texts[i],
                    raw=completions[i].text,
                    status=parsed[i][0],
                    cosine=cosines[i],
                    gold=self.rows.texts[i] or None,
                )
                for i in self._shown
            ),
        )

    def _reconstruct(self, ar: ARModel, texts: Sequence[str | None]) -> list[Tensor | None]:
        """The AR's vector [d] of each text; None where there is no text that it can read."""
        sidecar = Sidecar(role="ar", d_model=self.rows.vectors.shape[1], site=self.rows.site)
        readable = {i: text for i, text in enumerate(texts) if text is not None and self._prompt.fits(text)}
        vectors = Reconstructor(ar, self._prompt, sidecar, "held-out evaluation").reconstruct(
            list(readable.values()), batch_size=self._batch_size
        )
        found: list[Tensor | None] = [None] * len(texts)
        for i, vector in zip(readable, vectors, strict=True):
            found[i] = vector
        return found

    def _scores(self, found: Sequence[Tensor | None]) -> tuple[list[float | None], list[float]]:
        """Cosine (None: unusable) and counted mse of each row."""
        cosines: list[float | None] = [None] * len(found)
        mses = [MSE_UNUSABLE] * len(found)
        known = [i for i, vector in enumerate(found) if vector is not None]
        if known:
            vectors = torch.stack([vector for vector in found if vector is not None])
            targets = self.rows.vectors[known]
            scored = zip(
                known, cosine(vectors, targets).tolist(), direction_mse(vectors, targets).tolist(), strict=True
            )
            for i, c, mse in scored:
                cosines[i], mses[i] = c, mse
        return cosines, mses

    def _fve(self, mses: Sequence[float]) -> tuple[float | None, float | None, float | None]:
        """FVE (raw variance) and its interval; None where all vectors are the same and there is nothing to explain."""
        denominator = self.reference.raw_variance
        if not denominator > 0:
            return None, None, None
        low, high = mean_interval(1.0 - np.asarray(mses) / denominator, self.rows.doc_ids)
        return fve_value(mses, denominator), low, high

    def _facts(self, texts: Sequence[str | None]) -> DevFacts | None:
        if self._named is None or self._truth is None:
            return None
        named: list[Facts] = [{} if text is None else self._named(text) for text in texts]
        rows = []
        for fact in sorted({fact for facts in (*self._truth, *named) for fact in facts}):
            has = [i for i, facts in enumerate(self._truth) if fact in facts]
            row = fact_row(
                fact,
                actual=[self._truth[i][fact] for i in has],
                named=[named[i].get(fact) for i in has],
                probed=None,
                documents=[self.rows.doc_ids[i] for i in has],
                base_actual=[facts.get(fact) for facts in self._truth],
                base_named=[facts.get(fact) for facts in named],
            )
            rows.append(DevFact(fact, row.n, row.recall, row.named, row.precision))
        return DevFacts(
            recall=_mean([row.recall for row in rows if row.n >= FACT_ROWS and row.recall is not None]),
            precision=_mean([row.precision for row in rows if row.named >= FACT_ROWS and row.precision is not None]),
            rows=tuple(rows),
        )


def other_documents(documents: Sequence[Hashable]) -> list[int] | None:
    """For each row a row of another document, each used once; None where one document has more than half of the rows.

    Rows are put in the order of their documents and moved on by the size of the largest one.
    """
    members: dict[Hashable, list[int]] = {}
    for i, document in enumerate(documents):
        members.setdefault(document, []).append(i)
    order = [i for rows in members.values() for i in rows]
    largest = max((len(rows) for rows in members.values()), default=0)
    if 2 * largest > len(order):
        return None
    found = [0] * len(order)
    for place, i in enumerate(order):
        found[i] = order[(place + largest) % len(order)]
    return found


def _hashed(rows: TrainingRows, k: int) -> list[int]:
    """Indices of `k` rows, in order: those with the smallest hashes of (doc_id, position)."""

    def rank(i: int) -> bytes:
        return hashlib.sha256(f"{rows.doc_ids[i]}\x1f{rows.positions[i]}".encode("utf-8", "surrogatepass")).digest()

    return sorted(sorted(range(len(rows)), key=rank)[:k])


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


def _mean_cosine(cosines: Sequence[float | None]) -> float:
    return sum(COSINE_UNUSABLE if c is None else c for c in cosines) / len(cosines)
