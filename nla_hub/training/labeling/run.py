"""What all labelers here do: look up what is known, say what the rest will cost, have it answered, judge all of it."""

from __future__ import annotations

import hashlib
import json
import threading
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar

from nla_hub import schema
from nla_hub.errors import InputError, RunError, TrainingError
from nla_hub.locate import expand
from nla_hub.log import logger
from nla_hub.training.labelers import LabelContext, LabelRequest
from nla_hub.training.labeling.cache import Answer, LabelCache, key_of
from nla_hub.training.labeling.cost import EXPECTED_OUTPUT_TOKENS, Estimate, Prices, Usage, tokens_in
from nla_hub.training.labeling.prompt import SNIPPET, AnswerSettings, PromptSettings, judge

S = TypeVar("S", bound=AnswerSettings)
P = TypeVar("P", bound=PromptSettings)

ENOUGH = 50
"""Answers after which a share of bad ones says something."""

Missing = Mapping[str, LabelRequest]
"""What has to be asked: the key of each answer, and one of the requests that want it."""


class Tally:
    """Counts answers as they come, and stops where nearly none of them is a label.

    Attributes:
        most: answers that are wanted. done: those that came.
        unsaved: answers that came and could not be stored.
        unconfirmed: requests that ended without an answer after they were sent: the API may have charged for them.
        usage: what the API counted.
        reasons: how many are no labels, and why.
    """

    def __init__(self, rules: AnswerSettings, most: int) -> None:
        self._rules = rules
        self._lock = threading.Lock()
        self.most = most
        self.done = 0
        self.unsaved = self.unconfirmed = 0
        self.usage = Usage()
        self.reasons: Counter[str] = Counter()

    def take(self, answer: Answer) -> None:
        """Count an answer that is stored; a TrainingError where too many are of no use."""
        _, reason = judge(answer.text, answer.finish, self._rules)
        with self._lock:
            self.usage = self.usage.plus(answer.input_tokens, answer.output_tokens)
        self.count(reason)

    def count_unconfirmed(self) -> None:
        """Count a request that was sent and never answered."""
        with self._lock:
            self.unconfirmed += 1

    def count_unsaved(self) -> None:
        """Count an answer that could not be stored."""
        with self._lock:
            self.unsaved += 1

    def told_of_unsaved(self, error: RunError) -> RunError:
        """The error of a full disk with what it cost."""
        said = f"{self.unsaved} answers came that could not be stored: the API will be asked for them again"
        return RunError(error.what, where=error.where, next_step=error.next_step, faults=[said] if self.unsaved else ())

    def count(self, reason: str | None) -> None:
        """Count one for which it is known already why it is no label (None: it is one)."""
        with self._lock:
            self.done += 1
            if reason is not None:
                self.reasons[reason] += 1
            bad = sum(self.reasons.values())
            if self.done >= ENOUGH and bad > self._rules.stop_when_bad * self.done:
                raise TrainingError(
                    "Nearly no answer of the labeler is a label.",
                    got=f"{bad} of {self.done} dropped: {_listed(self.reasons)}",
                    expected=f"at most {self._rules.stop_when_bad:.0%} (labels.settings.stop_when_bad)",
                    next_step="try another model, template or bounds; what was answered is stored and not paid again",
                )


class CachedLabeler(ABC, Generic[S]):
    """A labeler whose answers are stored; made from `labels.settings`, read strictly.

    Raises:
        RecipeError: unknown or wrong settings, all at once.
    """

    name: ClassVar[str]
    kind: ClassVar[type[Any]]

    def __init__(self, **settings: Any) -> None:
        self.settings: S = schema.from_mapping(
            self.kind,
            settings,
            where="labels.settings",
            what=f"labeler ({self.name})",
            next_step="docs/training.md lists the settings of each labeler",
        )
        self._context: LabelContext | None = None
        self._reasons: Counter[str] = Counter()
        self._requests = 0
        self._paid = Usage()
        self._unconfirmed = 0

    # -- what each labeler says ------------------------------------------------------------------------------

    @abstractmethod
    def identity(self) -> dict[str, Any]:
        """Who is asked, and with which sampling settings: with template and snippet, what an answer depends on."""

    @abstractmethod
    def answer(self, missing: Missing, cache: LabelCache, tally: Tally) -> None:
        """Have everything answered and stored, or raise; what cannot be answered at all is only counted."""

    def prices(self) -> Prices:
        """Nothing is paid where nothing else is said."""
        return Prices(0.0, 0.0)

    @abstractmethod
    def content(self, request: LabelRequest) -> str:
        """What of a request its answer depends on."""

    # -- a run -----------------------------------------------------------------------------------------------

    def open(self, context: LabelContext) -> None:
        """Say where answers lie and who is told."""
        self._context = context

    def close(self) -> None:
        """Nothing is held where nothing else is said."""

    def estimate(self, requests: int, mean_tokens: float) -> Estimate:
        """What so many requests cost whose texts have so many tokens on average; nothing is looked up."""
        output_tokens = requests * min(EXPECTED_OUTPUT_TOKENS, self.settings.max_output_tokens)
        input_tokens = round(requests * mean_tokens)
        return Estimate(requests, input_tokens, output_tokens, self.prices().cost(input_tokens, output_tokens))

    def label(self, requests: Sequence[LabelRequest]) -> list[str | None]:
        """One label a request, None where its answers are none.

        Raises:
            TrainingError: whoever is asked does not answer, refuses, or answers nothing of use; too expensive.
            RunError: answers cannot be stored. InputError: no key, no rendered text. In all cases what was answered is
                stored, and the same call goes on from there.
        """
        labels: list[str | None] = [None] * len(requests)
        reasons: list[str | None] = [None] * len(requests)
        with LabelCache(self._directory()) as cache:
            left = list(range(len(requests)))
            asker = self.asker()
            for attempt in range(self.settings.attempts):
                keys = {i: key_of(asker, self.content(requests[i]), attempt) for i in left}
                self._complete(keys, requests, cache)
                for i, key in keys.items():
                    found = cache.get(key)
                    if found is None:
                        reasons[i] = "refused by the service"
                        continue
                    labels[i], reasons[i] = judge(found.text, found.finish, self.settings)
                left = [i for i in left if labels[i] is None]
                if not left:
                    break
        self._requests += len(requests)
        self._reasons.update(reasons[i] or "" for i in left)
        self.report(self.figures())
        return labels

    def figures(self) -> dict[str, Any]:
        """What was labelled, dropped (by reason) and paid by this object so far; costs where prices are known."""
        figures: dict[str, Any] = {
            "labels": self._requests - sum(self._reasons.values()),
            "labels_wanted": self._requests,
            "labels_dropped": dict(self._reasons),
            "label_answers": self._paid.answers,
            "label_input_tokens": self._paid.input_tokens,
            "label_output_tokens": self._paid.output_tokens,
        }
        if self._paid.uncounted:
            figures["label_answers_without_usage"] = self._paid.uncounted
        if self._unconfirmed:
            figures["label_requests_without_answer"] = self._unconfirmed
        cost = self.prices().cost(self._paid.input_tokens, self._paid.output_tokens)
        return figures if cost is None else {**figures, "label_cost": cost}

    def report(self, figures: dict[str, Any]) -> None:
        """Tell the run."""
        if self._context is not None:
            self._context.report(figures)

    def asker(self) -> dict[str, Any]:
        """Everything but the snippet that an answer depends on."""
        return {"labeler": self.name, **self.identity()}

    def asker_id(self) -> str:
        """A name for it, under which answers are counted."""
        return hashlib.sha256(json.dumps(self.asker(), sort_keys=True).encode()).hexdigest()[:16]

    # -- parts -----------------------------------------------------------------------------------------------

    def _directory(self) -> Path:
        if self.settings.cache is not None:
            return expand(self.settings.cache)
        return self._run_directory()

    def _run_directory(self) -> Path:
        if self._context is None:
            raise InputError(
                "Nothing says where answers are stored.",
                where=f"the labeler {self.name!r}",
                next_step="call open(LabelContext(directory)) first, or set labels.settings.cache",
            )
        return self._context.directory

    def _complete(self, keys: Mapping[int, str], requests: Sequence[LabelRequest], cache: LabelCache) -> None:
        """Have those of the keys answered that are not."""
        known = cache.known(keys.values())
        missing = {key: requests[i] for i, key in keys.items() if key not in known}
        if not missing:
            return
        cache.require_room(len(missing))
        tally = Tally(self.settings, len(missing))
        try:
            self.answer(missing, cache, tally)
        finally:
            self._paid = self._paid + tally.usage
            self._unconfirmed += tally.unconfirmed

    def estimate_of(self, missing: Missing) -> Estimate:
        """What these requests cost."""
        tokens = sum(tokens_in(self.content(request)) for request in missing.values())
        return self.estimate(len(missing), tokens / max(1, len(missing)))

    def announce(self, missing: Missing) -> Estimate:
        """Say what is about to be asked and what it costs."""
        estimate = self.estimate_of(missing)
        self.announce_estimate(estimate)
        return estimate

    def announce_estimate(self, estimate: Estimate) -> None:
        """Say what these requests cost, before they are asked."""
        logger.info("labels: %s", estimate)
        self.report({"labels_to_ask": estimate.requests, "label_estimate": str(estimate)})


class PromptedLabeler(CachedLabeler[P]):
    """One that fills the template with the snippet."""

    def content(self, request: LabelRequest) -> str:
        """The snippet."""
        return self.settings.snippet(request)

    def asker(self) -> dict[str, Any]:
        """With the template."""
        return {"template": self.settings.template_hash, **super().asker()}

    def estimate(self, requests: int, mean_tokens: float) -> Estimate:
        """With the template, and of snippets no more than is shown."""
        if self.settings.snippet_chars is not None:
            mean_tokens = min(mean_tokens, tokens_in("." * self.settings.snippet_chars))
        return super().estimate(requests, mean_tokens + tokens_in(self.settings.template.replace(SNIPPET, "")))


def _listed(reasons: Mapping[str, int]) -> str:
    return ", ".join(f"{reason} {n}" for reason, n in Counter(reasons).most_common())
