"""What watches a joint run for cheating and breakage: figures in, alarms out.

Everything here reads the figures of a step or of an evaluation and nothing else, so that it can be tested with planted
cheats and carried through a checkpoint. A figure that is absent, None or not finite says nothing, unless its absence is
itself the fault. Figures that scatter are judged by their median over the last `WINDOW` steps.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from statistics import median
from typing import Any

from nla_hub.errors import InputError
from nla_hub.training.loop import NON_FINITE_LIMIT
from nla_hub.training.rl.messages import MESSAGES

__all__ = ["Alarm", "Monitor"]

# -- limits --------------------------------------------------------------------------------------------------

WINDOW = 5
"""Steps in a median: one odd step raises nothing and clears nothing."""

QUIET = 2 * WINDOW
"""Steps in a row on the good side of the limit after which an alarm has cleared: medians of neighbouring steps are alike."""

BEGINNING = 5
"""First steps whose median is a figure's own beginning: few, because small models change within tens of steps."""

GAP_GROWTH = 0.05
"""Cosine by which the reward's AR may pull away from the second AR. Choosing the best of ten texts by one AR raises its FVE
by 0.005 and that of a fresh AR by nothing; this is ten times that, and a third of what a whole run gains."""

VECTOR_WORTH = 0.02
"""Cosine that a text must lose against other rows' vectors. An AV that ignores its vector loses 0; an FVE 0.2 above its
control is already a cosine of 0.05 to 0.1."""

VECTOR_WORTH_FVE = 0.05
"""The same for the FVE of an evaluation: 0.02 of cosine is 0.04 of mse, over denominators of 0.5 to 1."""

FROZEN_SHARE = 1e-3
"""Relative change of the weights, in learning rates, below which a model does not learn. Adam moves a weight by a tenth of the
learning rate or more as soon as it has a gradient, and the weights of these models are far below 1."""

FROZEN_STEPS = 3
"""Steps in a row before standing still is an alarm: one step may be left out for its gradient."""

LOSS_TOLERANCE = 1e-4
"""Relative difference between the trainer's loss and the sum of its parts in float32: the same sums in another order."""

LOSS_TOLERANCE_16_BIT = 1e-2
"""The same in 16 bit, where a single rounding is up to 0.4 %; not yet measured on a GPU."""

LOGPROB_LIMIT = 1e-4
"""Largest difference between the sampler's and the trainer's log-probability of a token in float32: "equal" as this project
defines it. Honest steps of the tiny pair stay below 6e-5; a lost or displaced vector gives differences above 0.01, and
the trainer itself stops at a tenth of that."""

LOGPROB_MEAN_LIMIT_16_BIT = 0.05
"""Mean difference in 16 bit, where single tokens differ by much more and prove nothing. Chosen from the 8 bits of bfloat16, not
yet measured on a GPU: it is reported and does not stop a run."""

OK_SHARE = 0.9
"""Share of usable explanations: warm starts in the tiny world write 98 % or more of them well."""

LENGTH_RATIO = 2.0
"""Growth of the mean length: an AR that learns too fast makes it grow without end, so the value matters little."""

ENTROPY_SHARE = 0.1
"""Share of the beginning's entropy. Learning lowers it; at a tenth the samples of a group are nearly the same text."""

REPETITION_GROWTH = 0.1
"""Growth of the share of repeated word pairs: one pair in ten more than at the beginning is visible in any text."""

STOPPING = ("non_finite",)
"""Alarms that end a run."""

SIXTEEN_BIT = ("bfloat16", "float16")
FROZEN = (("frozen_av/update", "lr", "policy_update"), ("frozen_ar/update", "ar_lr", "ar_update"))


@dataclass(frozen=True)
class Alarm:
    """One alarm as it begins.

    Attributes:
        message: what was seen, what it usually means, what to do.
        value, limit: the figure and what it crossed; None where the figure is absent or not finite.
        fatal: nothing that follows can be trusted, so the run should stop.
    """

    name: str
    step: int
    message: str
    value: float | None
    limit: float | None
    fatal: bool = False

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready mapping."""
        return asdict(self)


@dataclass(frozen=True)
class _Check:
    """One look at one way in which an alarm can begin; it begins after `after` looks in a row, and clears after `clear`."""

    key: str
    holds: bool
    value: float | None
    limit: float | None
    said: dict[str, float] = field(default_factory=dict)
    after: int = 1
    clear: int = QUIET
    fatal: bool = False

    def alarm(self, step: int) -> Alarm:
        message = MESSAGES[self.key].format(value=self.value, limit=self.limit, **self.said)
        return Alarm(_name(self.key), step, message, _finite(self.value), self.limit, self.fatal)


class Monitor:
    """Watches a run. An alarm is given once when it begins, and again only after it had cleared.

    Args:
        precision_drop: how far the facts' mean precision may fall below its best; None does not watch it. The caller stops on
            the alarm `precision_falls`, which is not fatal: what was trained until then is sound.
    """

    def __init__(self, *, precision_drop: float | None = None) -> None:
        self.precision_drop = precision_drop
        self._first: dict[str, list[float]] = {}
        self._last: dict[str, list[float]] = {}
        self._streaks: dict[str, int] = {}  # looks in a row at which a check held (> 0) or did not (< 0)
        self._on: set[str] = set()
        self._moved = False
        self._best_precision: float | None = None

    @property
    def active(self) -> tuple[str, ...]:
        """Names of the alarms that have begun and not cleared."""
        return tuple(sorted({_name(key) for key in self._on}))

    def observe(self, step: int, figures: Mapping[str, Any]) -> list[Alarm]:
        """The alarms that begin with the figures of a step (called once a step).

        Figures read: in_a_row; cosine, cosine_shuffled, gap; lr, ar_lr, policy_update, ar_update; beta, kl, loss_difference;
        logprob_difference, logprob_difference_mean, dtype; ok, length, entropy, repetition. While only the AR learns, `lr`
        must be 0.
        """
        checks = [*_steps_left_out(figures), *_logprobs(figures)]
        if not _number(figures, "in_a_row"):  # in a step that was left out nothing moved, and its losses say nothing
            checks += [*_frozen(figures), *_kl(figures, moved=self._moved)]
        checks += [*self._cheating(figures), *self._writing(figures)]
        self._moved = self._moved or (_number(figures, "policy_update") or 0.0) > 0
        return self._settle(step, checks)

    def evaluated(self, step: int, evaluation: Mapping[str, Any]) -> list[Alarm]:
        """The alarms that begin with an evaluation (`DevResult.to_dict()`)."""
        return self._settle(step, list(self._evaluation(evaluation)))

    def _settle(self, step: int, checks: list[_Check]) -> list[Alarm]:
        """Count what held; the alarms that begin."""
        before = self.active
        begun: dict[str, Alarm] = {}
        for check in checks:
            streak = self._streaks.get(check.key, 0)
            streak = max(streak, 0) + 1 if check.holds else min(streak, 0) - 1
            self._streaks[check.key] = streak
            if streak >= check.after and check.key not in self._on:
                self._on.add(check.key)
                if _name(check.key) not in before:  # the same alarm may have begun in another way
                    begun.setdefault(_name(check.key), check.alarm(step))
            elif -streak >= check.clear:
                self._on.discard(check.key)
        return list(begun.values())

    # -- figures that are compared with their own beginning --------------------------------------------------

    def _medians(self, name: str, value: float | None) -> tuple[float, float] | None:
        """Medians of the first steps and of the last ones; None while there are too few, or without a value."""
        if value is None:
            return None
        first, last = self._first.setdefault(name, []), self._last.setdefault(name, [])
        if len(first) < BEGINNING:
            first.append(value)
        last.append(value)
        del last[:-WINDOW]
        return (median(first), median(last)) if len(first) >= BEGINNING and len(last) >= WINDOW else None

    def _cheating(self, figures: Mapping[str, Any]) -> Iterator[_Check]:
        if gap := self._medians("gap", _number(figures, "gap")):
            start, now = gap
            limit = start + GAP_GROWTH
            yield _Check("reward_hacking/gap", now > limit, now, limit, {"start": start})
            limit = min(start, 0.0) - GAP_GROWTH
            yield _Check("frozen_ar/overtaken", now < limit, now, limit, {"start": start, "above": -now})
        true, shuffled = _number(figures, "cosine"), _number(figures, "cosine_shuffled")
        if worth := self._medians("worth", None if true is None or shuffled is None else true - shuffled):
            yield _Check("vector_ignored/steps", worth[1] < VECTOR_WORTH, worth[1], VECTOR_WORTH)

    def _writing(self, figures: Mapping[str, Any]) -> Iterator[_Check]:
        if ok := self._medians("ok", _number(figures, "ok")):
            yield _Check("format_lost/steps", ok[1] < OK_SHARE, ok[1], OK_SHARE)
        if length := self._medians("length", _number(figures, "length")):
            start, now = length
            limit = LENGTH_RATIO * start
            yield _Check("length_explosion/steps", now > limit, now, limit, {"start": start})
        if entropy := self._medians("entropy", _number(figures, "entropy")):
            start, now = entropy
            limit = ENTROPY_SHARE * start
            yield _Check("entropy_collapse/steps", now < limit, now, limit, {"start": start})
        if repetition := self._medians("repetition", _number(figures, "repetition")):
            start, now = repetition
            limit = start + REPETITION_GROWTH
            yield _Check("repetition/steps", now > limit, now, limit, {"start": start})

    def _evaluation(self, evaluation: Mapping[str, Any]) -> Iterator[_Check]:
        fve, permuted = _number(evaluation, "fve"), _number(evaluation, "permuted")
        if fve is not None and permuted is not None:
            worth, said = fve - permuted, {"fve": fve, "permuted": permuted}
            yield _Check("vector_ignored/evaluation", worth < VECTOR_WORTH_FVE, worth, VECTOR_WORTH_FVE, said, clear=1)
        statuses, n = evaluation.get("statuses"), _number(evaluation, "n")
        if statuses is not None and n:
            ok = statuses.get("ok", 0) / n
            yield _Check("format_lost/evaluation", ok < OK_SHARE, ok, OK_SHARE, clear=1)
        precision = _number(evaluation.get("facts") or {}, "precision")
        if precision is not None:
            best = self._best_precision = max(precision, self._best_precision or 0.0)
            if self.precision_drop is not None:
                limit = best - self.precision_drop
                yield _Check("precision_falls/evaluation", precision < limit, precision, limit, {"best": best}, clear=1)

    # -- state -----------------------------------------------------------------------------------------------

    def to_dict(self) -> dict[str, Any]:
        """The whole state, JSON-ready."""
        return {
            "precision_drop": self.precision_drop,
            "first": {name: list(values) for name, values in self._first.items()},
            "last": {name: list(values) for name, values in self._last.items()},
            "streaks": dict(self._streaks),
            "on": sorted(self._on),
            "moved": self._moved,
            "best_precision": self._best_precision,
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Monitor:
        """Read what `to_dict` wrote; an InputError where it did not write it."""
        try:
            monitor = cls(precision_drop=data["precision_drop"])
            monitor._first = {name: [float(v) for v in values] for name, values in data["first"].items()}
            monitor._last = {name: [float(v) for v in values] for name, values in data["last"].items()}
            monitor._streaks = {key: int(n) for key, n in data["streaks"].items()}
            # What stopped a run is said again if it is still so: the same command tries once more.
            monitor._on = {key for key in data["on"] if _name(key) not in STOPPING}
            monitor._moved = bool(data["moved"])
            monitor._best_precision = data["best_precision"]
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise InputError(
                "This is not the state of a monitor.",
                got=f"{type(error).__name__}: {error}",
                expected="what Monitor.to_dict() wrote",
                next_step="continue from another checkpoint of the run",
            ) from error
        return monitor


# -- figures that are right or wrong in themselves -----------------------------------------------------------


def _steps_left_out(figures: Mapping[str, Any]) -> Iterator[_Check]:
    in_a_row = _number(figures, "in_a_row")
    if in_a_row is not None:
        wrong = in_a_row >= NON_FINITE_LIMIT
        yield _Check("non_finite/steps", wrong, in_a_row, NON_FINITE_LIMIT, clear=1, fatal=True)


def _logprobs(figures: Mapping[str, Any]) -> Iterator[_Check]:
    loose = figures.get("dtype") in SIXTEEN_BIT
    value = figures.get("logprob_difference_mean" if loose else "logprob_difference")
    if value is not None:
        limit = LOGPROB_MEAN_LIMIT_16_BIT if loose else LOGPROB_LIMIT
        wrong = not value <= limit  # NaN disagrees
        yield _Check("logprobs_disagree/sampler", wrong, value, limit, clear=1)


def _frozen(figures: Mapping[str, Any]) -> Iterator[_Check]:
    for key, rate, update in FROZEN:
        lr, change = _number(figures, rate), _number(figures, update)
        if lr is not None and lr > 0 and change is not None:
            limit = FROZEN_SHARE * lr
            yield _Check(key, change < limit, change, limit, {"lr": lr}, after=FROZEN_STEPS)


def _kl(figures: Mapping[str, Any], *, moved: bool) -> Iterator[_Check]:
    """`moved`: whether the AV has changed in an earlier step."""
    if _number(figures, "lr") == 0:
        return  # only the AR learns
    beta, kl, difference = _number(figures, "beta"), figures.get("kl"), figures.get("loss_difference")
    if beta is not None and beta > 0:
        yield _Check("kl_not_applied/absent", kl is None, None, None, {"beta": beta})
        if kl is not None and moved:
            yield _Check("kl_not_applied/zero", kl == 0, kl, 0.0, after=FROZEN_STEPS)
    if difference is not None:
        limit = LOSS_TOLERANCE_16_BIT if figures.get("dtype") in SIXTEEN_BIT else LOSS_TOLERANCE
        yield _Check("kl_not_applied/loss", not difference <= limit, difference, limit)


def _name(key: str) -> str:
    return key.split("/")[0]


def _number(figures: Mapping[str, Any], name: str) -> float | None:
    """A figure; None where it is absent, None or not finite."""
    return _finite(figures.get(name))


def _finite(value: float | None) -> float | None:
    return None if value is None or not math.isfinite(value) else float(value)
