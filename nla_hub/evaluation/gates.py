"""Gates: bars on an evaluation's figures, as in `--gate "fve>=0.65"`.

A gate is FIGURE OPERATOR BAR, where BAR is a number or another figure ("fve>floor"). Several stand in one text
separated by commas. A figure that was not measured fails every gate on it.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from nla_hub.errors import GateFailedError, InputError, UnknownNameError

_OPERATORS: dict[str, Callable[[float, float], bool]] = {
    ">=": operator.ge,
    ">": operator.gt,
    "<=": operator.le,
    "<": operator.lt,
}
_GATE = re.compile(r"\s*([A-Za-z_][\w.]*)\s*(>=|<=|>|<)\s*(\S+)\s*")

Figures = Mapping[str, float | None]


@dataclass(frozen=True)
class Gate:
    """One bar: `figure` `operator` `bar`, the bar a number or another figure's name."""

    figure: str
    operator: str
    bar: float | str

    def __str__(self) -> str:
        return f"{self.figure}{self.operator}{self.bar}"

    def fault(self, figures: Figures) -> str | None:
        """Why the gate fails on `figures`; None where it holds.

        Raises:
            UnknownNameError: a figure that does not exist.
        """
        got = _look_up(self.figure, figures)
        bar = _look_up(self.bar, figures) if isinstance(self.bar, str) else self.bar
        if got is None:
            return f"{self}: {self.figure} was not measured"
        if bar is None:
            return f"{self}: {self.bar} was not measured"
        if _OPERATORS[self.operator](got, bar):
            return None
        against = f" and {self.bar} is {bar:.4f}" if isinstance(self.bar, str) else ""
        return f"{self}: {self.figure} is {got:.4f}{against}"


def _look_up(name: str, figures: Figures) -> float | None:
    if name not in figures:
        raise UnknownNameError("figure", name, figures)
    return figures[name]


def parse_gates(texts: Sequence[str]) -> list[Gate]:
    """Gates from texts such as "fve>=0.65" or "fve>floor, ok>=0.99".

    Raises:
        InputError: not of that form.
    """
    gates = []
    for text in texts:
        for part in text.split(","):
            match = _GATE.fullmatch(part)
            if match is None:
                raise InputError(
                    "This is no gate.",
                    where="--gate",
                    got=repr(part),
                    expected='FIGURE>=BAR, also with > <= <: "fve>=0.65", "ok>=0.99", "share.person>=0.5", "fve>floor"',
                )
            figure, sign, bar = match.groups()
            try:
                gates.append(Gate(figure, sign, float(bar)))
            except ValueError:
                if not re.fullmatch(r"[A-Za-z_][\w.]*", bar):
                    raise InputError(
                        "The bar of a gate is a number or a figure.", where="--gate", got=repr(bar)
                    ) from None
                gates.append(Gate(figure, sign, bar))
    return gates


def check_gates(gates: Sequence[Gate], figures: Figures, *, where: str) -> None:
    """Raise a GateFailedError that lists every gate that does not hold.

    Raises:
        GateFailedError; UnknownNameError for a figure that does not exist.
    """
    faults = [fault for gate in gates if (fault := gate.fault(figures)) is not None]
    if faults:
        raise GateFailedError(f"{len(faults)} of {len(gates)} gates failed.", where=where, faults=faults)
