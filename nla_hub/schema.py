"""A YAML mapping -> a frozen dataclass, strictly: unknown keys, wrong types and missing keys are all reported at once.

Fields may be bool, int, float, str, Any, `Literal[...]`, another dataclass, `X | None` (or any union of these),
`tuple[T, ...]`, `tuple[A, B]`, `list[T]` and `dict[str, T]`. A dataclass may define `faults(self) -> Iterable[str]` for
rules that its types cannot say; what it yields is reported under the dataclass's own path.
"""

from __future__ import annotations

import copy
import dataclasses
import math
import re
import types
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from nla_hub import yaml_io
from nla_hub.errors import NLAError, RecipeError, did_you_mean

T = TypeVar("T")

_EXPONENT = re.compile(r"[-+]?(\d+(\.\d*)?|\.\d+)[eE][-+]?\d+")
"""Numbers such as 1e-5, which YAML 1.1 reads as text because they have no point."""

_NAMES = {bool: "true or false", int: "a whole number", float: "a number", str: "text", type(None): "null"}


def from_mapping(
    kind: type[T],
    mapping: Mapping[str, Any],
    *,
    where: object = None,
    what: str = "recipe",
    error: type[NLAError] = RecipeError,
    next_step: str | None = None,
) -> T:
    """The dataclass `kind` filled from `mapping`.

    Args:
        kind: a dataclass; its defaults stand in for absent keys.
        mapping: what `yaml_io.read` returned.
        where: the file, for the message.
        what: what the file is called in the message ("recipe", "zoo entry").
        error: the class of the error.
        next_step: what the reader of the error should do.

    Raises:
        error: with one fault a line, each naming its path, what it got and what is expected.
    """
    reader = _Reader()
    value = reader.dataclass(kind, mapping, "")
    if reader.faults:
        count = len(reader.faults)
        raise error(
            f"This {what} has {count} {'fault' if count == 1 else 'faults'}:",
            where=where,
            faults=reader.faults,
            next_step=next_step,
        )
    assert isinstance(value, kind)
    return value


def to_mapping(value: Any) -> dict[str, Any]:
    """The mapping that `from_mapping` turns back into an equal dataclass: fields in order, tuples as lists."""
    assert dataclasses.is_dataclass(value)
    return {field.name: _plain(getattr(value, field.name)) for field in dataclasses.fields(value) if field.init}


def apply_overrides(
    mapping: Mapping[str, Any],
    assignments: Iterable[str],
    *,
    where: object = "command line",
    error: type[NLAError] = RecipeError,
) -> dict[str, Any]:
    """A copy of `mapping` with `key.sub=value` assignments made, in order; values are read as YAML.

    A list is replaced as a whole (`key=[1, 2]`), `key=null` unsets. Whether a key exists is judged afterwards, by
    `from_mapping`.

    Raises:
        error: assignments that are none, or that go through something that is no mapping; all of them listed.
    """
    result: dict[str, Any] = copy.deepcopy(dict(mapping))
    faults: list[str] = []
    for assignment in assignments:
        path, equals, text = assignment.partition("=")
        keys = path.strip().split(".")
        if not equals or not all(keys):
            faults.append(f"{assignment!r}: expected key=value or key.sub=value")
            continue
        try:
            read = yaml_io.loads(f"value: {text}", where=None, error=error)
        except NLAError as cause:
            faults.append(f"{assignment!r}: the value is no YAML ({cause.what})")
            continue
        if set(read) != {"value"}:
            faults.append(f"{assignment!r}: the value must be one YAML value")
            continue
        fault = _assign(result, keys, read["value"])
        if fault:
            faults.append(f"{assignment!r}: {fault}")
    if faults:
        raise error("These settings cannot be applied:", where=where, faults=faults)
    return result


def differences(old: Mapping[str, Any], new: Mapping[str, Any], path: str = "") -> list[str]:
    """What two configurations do not have in common, one sentence a key ("rl.lr: 1e-05 before, 2e-05 now")."""
    found = []
    for key in [*old, *(k for k in new if k not in old)]:
        a, b, name = old.get(key), new.get(key), f"{path}{key}"
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            found += differences(a, b, f"{name}.")
        elif a != b:
            found.append(f"{name}: {a!r} before, {b!r} now")
    return found


def _assign(mapping: dict[str, Any], keys: Sequence[str], value: Any) -> str | None:
    here = mapping
    for depth, key in enumerate(keys[:-1]):
        below = here.get(key)
        if below is None:
            below = here[key] = {}
        if not isinstance(below, dict):
            path = ".".join(keys[: depth + 1])
            return f"{path} is {_show(below)}, which has no keys; set {path} as a whole"
        here = below
    here[keys[-1]] = value
    return None


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return to_mapping(value)
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value


_BAD: Any = object()
"""Stands for a value that had faults."""


class _Reader:
    """Collects faults instead of stopping at the first."""

    def __init__(self) -> None:
        self.faults: list[str] = []

    def dataclass(self, kind: type[Any], value: Any, path: str) -> Any:
        if not isinstance(value, Mapping):
            return self._wrong(path, value, "a mapping")
        broken = False
        fields = {field.name: field for field in dataclasses.fields(kind) if field.init}
        for key in value:
            if key not in fields:
                near = did_you_mean(str(key), fields, at_most=1)
                hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(fields)}"
                self.faults.append(f"{_join(path, key)}: unknown key; {hint}")
        hints = get_type_hints(kind)
        arguments: dict[str, Any] = {}
        for name, field in fields.items():
            expected = hints[name]
            if name in value:
                arguments[name] = self.value(expected, value[name], _join(path, name))
            elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
                self.faults.append(f"{_join(path, name)}: missing (expected {describe(expected)})")
                broken = True
        if broken or any(argument is _BAD for argument in arguments.values()):
            return (
                _BAD  # what else may be wrong with it cannot be asked; unknown keys and broken rules do not stop here
            )
        built = kind(**arguments)
        if hasattr(built, "faults"):
            self.faults += [_join(path, fault) if path else fault for fault in built.faults()]
        return built

    def value(self, expected: Any, value: Any, path: str) -> Any:
        origin = get_origin(expected)
        if expected is Any:
            return value
        if origin in (Union, types.UnionType):
            return self._union(expected, value, path)
        if origin is Literal:
            choices = get_args(expected)
            if any(type(value) is type(choice) and value == choice for choice in choices):
                return value
            return self._wrong(path, value, describe(expected), near=[c for c in choices if isinstance(c, str)])
        if dataclasses.is_dataclass(expected):
            assert isinstance(expected, type)
            return self.dataclass(expected, value, path)
        if origin is dict:
            return self._dict(expected, value, path)
        if origin in (list, tuple):
            return self._sequence(expected, value, path)
        return self._scalar(expected, value, path)

    def _scalar(self, expected: Any, value: Any, path: str) -> Any:
        if expected is float:
            if isinstance(value, str) and _EXPONENT.fullmatch(value):
                value = float(value)
            if isinstance(value, (int, float)) and not isinstance(value, bool):
                if math.isfinite(value):
                    return float(value)
                return self._wrong(path, value, "a finite number")
        elif expected in _NAMES:
            if type(value) is expected:
                return value
        else:
            raise TypeError(f"{path}: schema.py does not read fields of type {expected!r}")
        return self._wrong(path, value, describe(expected))

    def _union(self, expected: Any, value: Any, path: str) -> Any:
        members = get_args(expected)
        if value is None and type(None) in members:
            return None
        members = tuple(member for member in members if member is not type(None))
        attempts: list[tuple[int, _Reader, Any]] = []
        for member in members:
            reader = _Reader()
            result = reader.value(member, value, path)
            if not reader.faults:
                return result
            attempts.append((_affinity(member, value), reader, member))
        best = max(attempts, key=lambda attempt: attempt[0])
        if len(members) == 1 or best[0] > 0:  # the member that was meant is clear: its own faults say most
            self.faults += best[1].faults
            return _BAD
        return self._wrong(path, value, describe(expected))

    def _dict(self, expected: Any, value: Any, path: str) -> Any:
        if not isinstance(value, Mapping):
            return self._wrong(path, value, "a mapping")
        inner = get_args(expected)[1]
        result = {}
        for key, item in value.items():
            if not isinstance(key, str):
                self._wrong(path, key, "keys that are text")
                continue
            result[key] = self.value(inner, item, _join(path, key))
        return result

    def _sequence(self, expected: Any, value: Any, path: str) -> Any:
        arguments = get_args(expected)
        if not isinstance(value, (list, tuple)):
            return self._wrong(path, value, describe(expected))
        if get_origin(expected) is list or arguments[-1] is Ellipsis:
            inner = [arguments[0]] * len(value)
        elif len(value) != len(arguments):
            return self._wrong(path, value, describe(expected))
        else:
            inner = list(arguments)
        items = [
            self.value(kind, item, f"{path}[{i}]") for i, (kind, item) in enumerate(zip(inner, value, strict=True))
        ]
        return items if get_origin(expected) is list else tuple(items)

    def _wrong(self, path: str, value: Any, expected: str, *, near: Sequence[str] = ()) -> Any:
        hint = ""
        if isinstance(value, str) and (found := did_you_mean(value, near, at_most=1)):
            hint = f"; did you mean {found[0]!r}?"
        where = f"{path}: " if path else ""
        self.faults.append(f"{where}got {_show(value)}, expected {expected}{hint}")
        return _BAD


def _affinity(member: Any, value: Any) -> int:
    """How plainly `value` was meant to be a `member` of a union: 0 is not at all."""
    origin = get_origin(member)
    if isinstance(value, Mapping):
        if dataclasses.is_dataclass(member):
            return 1 + sum(field.name in value for field in dataclasses.fields(member))
        return 1 if origin is dict else 0
    return 1 if isinstance(value, (list, tuple)) and origin in (list, tuple) else 0


def describe(expected: Any) -> str:
    """What a type accepts, in words."""
    origin, arguments = get_origin(expected), get_args(expected)
    if origin in (Union, types.UnionType):
        parts = [describe(member) for member in arguments]
        return " or ".join(sorted(parts, key=lambda part: part == "null"))
    if origin is Literal:
        return " or ".join(repr(choice) for choice in arguments)
    if origin is dict or dataclasses.is_dataclass(expected):
        return "a mapping"
    if origin is list or (origin is tuple and arguments[-1] is Ellipsis):
        return f"a list (each {describe(arguments[0])})"
    if origin is tuple:
        return f"a list of {len(arguments)} ({', '.join(describe(member) for member in arguments)})"
    return _NAMES.get(expected, "any value")


def _join(path: str, key: object) -> str:
    return f"{path}.{key}" if path else str(key)


def _show(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if value is None:
        return "null"
    shown = repr(value)
    return shown if len(shown) <= 60 else f"{shown[:57]}..."
