"""What `nla-hub train` shows on stderr while it runs: a line a stage, one compact line of figures, evaluations, warnings.

On a terminal the line of figures is rewritten in its place and never longer than the terminal is wide. Elsewhere lines
are printed as they are, of a reinforcement learning stage only every so many.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

from nla_hub.cli import output
from nla_hub.cli.status_line import StatusLine, cells, columns, fitted
from nla_hub.log import logger
from nla_hub.training.view.records import figure, held_out_fve, mapping_of, mappings_of, text_of
from nla_hub.units import duration

INDENT = "    "

PLAIN_LINES = 40
"""Without a terminal: about so many step lines of a stage ..."""

PLAIN_SECONDS = 60.0
"""... but one at least that often."""

PLAIN_WIDTH = 400
"""Without a terminal: as much of a sample."""

RECENT = 10
"""Steps over which the time of a step is averaged."""

SAMPLES = 2

ORDER = ("reward", "fve", "cosine", "gap", "kl", "length", "ok", "|dlogp|", "step time", "left")
"""As they stand in the line."""

IMPORTANCE = ("fve", "reward", "ok", "left", "cosine", "length", "kl", "gap", "step time", "|dlogp|")
"""As they are given up on a narrow terminal, from the end."""


class TrainView:
    """Tells a person what a run does; a `Listener` of the pipeline.

    Args:
        as_json: print one JSON object a finished stage on stdout.
        stages: the stages that were asked for, in order.
    """

    def __init__(self, as_json: bool, stages: Sequence[str]) -> None:
        self.as_json = as_json
        self.stages = list(stages)
        self.clock = StepClock()
        self._line = StatusLine()
        self._printed: float | None = None

    def stage(self, name: str, *, resumed: bool) -> None:
        """A stage begins, or was found done."""
        self.clock = StepClock()
        self._printed = None
        number = f"[{self.stages.index(name) + 1}/{len(self.stages)}]"
        output.message(f"{number} {name}{': already done' if resumed else ''}")

    def metrics(self, name: str, metrics: dict[str, Any]) -> None:
        """Figures of a running stage, an evaluation or an alarm."""
        if isinstance(metrics.get("alarm"), dict):
            width = columns() - 1 if output.progress_wanted() else None
            self._line.apart(lambda: logger.warning("%s", alarm_text(metrics, width)))
            if metrics["alarm"].get("fatal") is True:
                self._line.end()  # an error message follows
        elif isinstance(metrics.get("evaluation"), dict):
            width = columns() - 1 if output.progress_wanted() else None
            self._line.apart(lambda: output.message("\n".join(evaluation_lines(metrics, width))))
        elif name == "rl" and "reward" in metrics:
            self.clock.tick(metrics)
            if output.progress_wanted():
                self._line.show(step_line(metrics, self.clock.seconds_a_step, columns() - 1))
            elif self._is_due(metrics):
                output.message(step_line(metrics, self.clock.seconds_a_step, None))
        else:
            line = INDENT + "  ".join(f"{key} {_short(value)}" for key, value in metrics.items() if key != "lr")
            if output.progress_wanted():
                self._line.show(line)
            else:
                output.message(line)

    def done(self, name: str, summary: dict[str, Any]) -> None:
        """A stage is done."""
        self._line.end()
        if self.as_json:
            output.print_json_lines([{"stage": name, **summary}])

    def _is_due(self, metrics: Mapping[str, Any]) -> bool:
        step, steps, seconds = (figure(metrics, key) for key in ("step", "steps", "seconds"))
        every = max(1, math.ceil((steps or 0) / PLAIN_LINES))
        late = seconds is not None and self._printed is not None and not 0 <= seconds - self._printed < PLAIN_SECONDS
        due = self._printed is None or late or step is None or step % every == 0 or step == steps
        if due:
            self._printed = seconds if seconds is not None else 0.0
        return due


class StepClock:
    """How long a step takes, from the seconds that the last step lines carry."""

    def __init__(self) -> None:
        self._marks: list[tuple[float, float]] = []
        self.seconds_a_step: float | None = None

    def tick(self, metrics: Mapping[str, Any]) -> None:
        """Take note of a step line."""
        step, seconds = figure(metrics, "step"), figure(metrics, "seconds")
        if step is None or seconds is None:
            return
        if self._marks and not (step > self._marks[-1][0] and seconds >= self._marks[-1][1]):
            self._marks = []  # the count began again
        self._marks = [*self._marks[-RECENT:], (step, seconds)]
        (first, begun), (last, now) = self._marks[0], self._marks[-1]
        if last > first:
            self.seconds_a_step = (now - begun) / (last - first)
        elif step == 1:
            self.seconds_a_step = seconds


def step_line(metrics: Mapping[str, Any], seconds_a_step: float | None, width: int | None) -> str:
    """The figures of a step in one line; where it would be wider than `width`, without the less important ones."""
    step, steps = figure(metrics, "step"), figure(metrics, "steps")
    head = f"{INDENT}step {step:.0f}" if step is not None else f"{INDENT}step ?"
    head += "" if steps is None else f"/{steps:.0f}"
    formats = {
        "reward": "{:.3f}",
        "fve": "{:.3f}",
        "cosine": "{:.3f}",
        "gap": "{:+.3f}",
        "kl": "{:.3g}",
        "length": "{:.0f}",
    }
    found = {key: f"{key} {form.format(v)}" for key, form in formats.items() if (v := figure(metrics, key)) is not None}
    if (ok := figure(metrics, "ok")) is not None:
        found["ok"] = f"ok {100 * ok:.3g} %"
    if (difference := figure(metrics, "logprob_difference")) is not None:
        found["|dlogp|"] = f"|dlogp| {difference:.1g}"
    if seconds_a_step is not None:
        found["step time"] = f"{seconds_a_step:.3g} s/step"
        if step is not None and steps is not None and step < steps:
            found["left"] = f"{duration(seconds_a_step * (steps - step))} left"
    for kept in range(len(IMPORTANCE), -1, -1):
        chosen = set(IMPORTANCE[:kept])
        line = "  ".join([head, *(found[key] for key in ORDER if key in found and key in chosen)])
        if width is None or cells(line) <= width:
            return line
    return fitted(head, width or 0)


def evaluation_lines(line: Mapping[str, Any], width: int | None) -> list[str]:
    """An evaluation in a few lines: scores, facts, two samples."""
    found = mapping_of(line, "evaluation")
    facts = mapping_of(found, "facts")
    step = figure(line, "step")
    head = f"held out{'' if step is None else f', step {step:.0f}'}: {held_out_fve(found)}"
    parts = [f"cosine {_measured(figure(found, 'cosine'))}"]
    if (watch := figure(found, "watch_cosine")) is not None:
        parts.append(f"watch AR {watch:.3f}")
    if facts:
        parts += [f"facts: {key} {_measured(figure(facts, key))}" for key in ("recall", "precision")]
    scores = "  " + "  ".join(parts)
    lines = [INDENT + head, INDENT + scores]
    if width is not None:
        lines = [*_wrapped(head, width, "    "), *_wrapped(scores, width, "    ")]
    for sample in mappings_of(found, "samples")[:SAMPLES]:
        status = text_of(sample, "status")
        said = text_of(sample, "text") or text_of(sample, "raw") or ""
        note = "" if status == "ok" else f"({status}) "
        cosine = figure(sample, "cosine")
        text = output.clean(f"{'  -  ' if cosine is None else f'{cosine:5.2f}'}  {note}{said}", one_line=True)
        lines.append(fitted(f"{INDENT}  {text}", PLAIN_WIDTH if width is None else width))
    return lines


def alarm_text(line: Mapping[str, Any], width: int | None) -> str:
    """An alarm, without the "warning: " that the log puts before it; broken at `width`, else one line."""
    alarm = mapping_of(line, "alarm")
    step, value, limit = figure(line, "step"), figure(alarm, "value"), figure(alarm, "limit")
    figures = [f"{name} {number:.4g}" for name, number in (("value", value), ("limit", limit)) if number is not None]
    text = f"{'' if step is None else f'step {step:.0f}: '}{(text_of(alarm, 'name') or 'alarm').replace('_', ' ')}"
    said = text_of(alarm, "message") or ", ".join(figures)
    text += f": {said}" if said else ""
    text = output.clean(
        text + (" Fatal: nothing after this can be trusted." if alarm.get("fatal") is True else ""), one_line=True
    )
    if width is None:
        return text
    room = " " * len("warning: ")
    return "\n".join(textwrap.wrap(text, max(width, 20), initial_indent=room, subsequent_indent=INDENT)).lstrip()


def _wrapped(text: str, width: int, indent: str) -> list[str]:
    return textwrap.wrap(text, max(width, 20), initial_indent=INDENT, subsequent_indent=INDENT + indent)


def _measured(value: float | None) -> str:
    return "not measured" if value is None else f"{value:.3f}"


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
