"""Every error that a user can cause, in one tree.

    NLAError                      exit 1
    ├── InputError                (also ValueError)  something handed to a call cannot be used
    │   ├── VectorError           wrong shape, dtype, NaN, infinite, zero
    │   ├── TextError             empty, special tokens inside content, no chat template
    │   ├── PositionError         a position that the sequence does not have
    │   └── ContextLengthError    longer than the model reads
    ├── UnknownNameError          (also KeyError)    no such zoo entry, recipe, adapter, engine, labeler
    ├── CheckpointError           a checkpoint that must not be used
    │   ├── SidecarError          nla_meta.yaml: all of its faults at once
    │   └── WeightsError          missing, unexpected, corrupt, non-finite or misshapen weights
    ├── InjectionError            the vector would not reach the model
    ├── HubError                  the Hugging Face Hub said no
    │   ├── HubNotFoundError      404: repository, revision or file
    │   ├── HubAuthError          401: no token, or a wrong one
    │   ├── HubGatedError         403: licence not accepted, or no access
    │   └── HubUnreachableError   no network, or offline mode and nothing cached
    ├── RecipeError               (also ValueError)  all faults of a recipe at once
    ├── RunError                  a run or output directory in the way, damaged, or changed
    ├── TrainingError             a run that must not go on (non-finite loss, no usable data)
    ├── PublishError              a release that must not go out: all of its faults at once
    ├── MissingExtraError         (also ImportError) an optional dependency is absent
    └── GateFailedError           exit 3             a figure fell below its bar

    Interrupted                   exit 130 (a KeyboardInterrupt)  Ctrl-C; carries what was done by then

Each carries what happened, where, what was got and expected, and the next step; `str()` of it is what the
command line prints.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from typing import Any, ClassVar


class NLAError(Exception):
    """Base of all errors a user can cause.

    Args:
        what: one sentence: what is wrong.
        where: the file, argument or row that is wrong.
        got: the offending value.
        expected: what would have been accepted.
        next_step: what to do about it, a command where there is one.
        faults: further sentences, where several things are wrong at once.
    """

    exit_code: ClassVar[int] = 1

    def __init__(
        self,
        what: str,
        *,
        where: object = None,
        got: object = None,
        expected: object = None,
        next_step: str | None = None,
        faults: Sequence[str] = (),
    ) -> None:
        self.what = what
        self.where = None if where is None else str(where)
        self.got = None if got is None else str(got)
        self.expected = None if expected is None else str(expected)
        self.next_step = next_step
        self.faults = tuple(faults)
        super().__init__(self._render())

    def _render(self) -> str:
        head = self.what.rstrip()
        if self.where:
            head = f"{self.where}: {head}"
        details = [f"{k} {v}" for k, v in (("got", self.got), ("expected", self.expected)) if v]
        if details:
            head = f"{head.rstrip('.')} ({', '.join(details)})."
        lines = [head, *(f"  - {fault}" for fault in self.faults)]
        if self.next_step:
            lines.append(f"  Next: {self.next_step}")
        return "\n".join(lines)

    def __str__(self) -> str:
        return self._render()

    def one_line(self) -> str:
        """The message without its next step, on one line: the reason recorded with a row in error."""
        return " ".join(line.strip() for line in self._render().splitlines() if not line.startswith("  Next:"))


class InputError(NLAError, ValueError):
    """Something handed to a call cannot be used."""


class VectorError(InputError):
    """A vector of the wrong shape or dtype, or NaN, infinite or zero."""


class TextError(InputError):
    """A text or conversation that cannot be encoded as asked."""


class PositionError(InputError):
    """A position that the encoded sequence does not have."""


class ContextLengthError(InputError):
    """A text longer than the model reads."""


class UnknownNameError(NLAError, KeyError):
    """No such name; `suggestions` are the near ones."""

    def __init__(self, kind: str, name: str, known: Iterable[str], *, next_step: str | None = None) -> None:
        names = sorted(known)
        self.suggestions = did_you_mean(name, names)
        hint = f"did you mean {' or '.join(map(repr, self.suggestions))}?" if self.suggestions else None
        if hint is None:
            hint = f"known: {', '.join(names)}" if names else "none is registered"
        if next_step:
            hint = f"{hint} {next_step}"
        super().__init__(f"No {kind} is called {name!r}.", next_step=hint)


class CheckpointError(NLAError):
    """A checkpoint that must not be used."""


class SidecarError(CheckpointError):
    """A sidecar (`nla_meta.yaml`) that is damaged or contradicts the checkpoint."""


class WeightsError(CheckpointError):
    """Missing, unexpected, corrupt, non-finite or misshapen weights."""


class InjectionError(NLAError):
    """The vector would not reach the model."""


class HubError(NLAError):
    """The Hugging Face Hub said no."""


class HubNotFoundError(HubError):
    """404: no such repository, revision or file (or it is private and no token was sent)."""


class HubAuthError(HubError):
    """401: no token, or a wrong one."""


class HubGatedError(HubError):
    """403: the licence was not accepted yet, or the account has no access."""


class HubUnreachableError(HubError):
    """No network, or offline mode with nothing cached."""


class RecipeError(NLAError, ValueError):
    """A recipe with faults, all of them listed."""


class RunError(NLAError):
    """A run or output directory that is in the way, damaged, or belongs to another configuration."""


class TrainingError(NLAError):
    """A training run that must not go on."""


class PublishError(NLAError):
    """A release that must not go out: secrets, damaged weights, a missing licence, a card that says what it must not."""


class MissingExtraError(NLAError, ImportError):
    """An optional dependency is not installed."""

    def __init__(self, package: str, extra: str, *, needed_for: str) -> None:
        super().__init__(
            f"{needed_for} needs the package {package!r}, which is not installed.",
            next_step=f"pip install 'nla-hub[{extra}]'",
        )


class GateFailedError(NLAError):
    """A measured figure fell below the bar that was asked for."""

    exit_code: ClassVar[int] = 3


def did_you_mean(name: str, known: Iterable[str], *, at_most: int = 2) -> list[str]:
    """The names in `known` that `name` was probably meant to be, nearest first (may be empty)."""
    folded = {k.lower(): k for k in known}
    near = difflib.get_close_matches(name.lower(), folded, n=at_most, cutoff=0.6)
    return [folded[k] for k in near]


class Interrupted(KeyboardInterrupt):
    """Ctrl-C during a call that had finished a part of its rows.

    No NLAError, and no Exception: what catches errors in order to go on must not catch it.

    Attributes:
        done: what is finished, by the row's index: completions of an engine's call, explanations of `verbalize` (a list of them
            where n > 1). Of `NLA.explain` the Explanations, without scores.
    """

    def __init__(self, done: Any) -> None:
        self.done = done
        super().__init__(f"{len(done)} rows are done")
