"""What the objects behind entry points must look like, ours and plug-ins' alike; `registry.py` asks before it hands one out.

Each reader takes the name that an object is registered under and what its entry point loaded, and returns the object or raises
an NLAError that says what is wrong with it.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from nla_hub.errors import NLAError

if TYPE_CHECKING:
    from nla_hub.adapters import Adapter
    from nla_hub.engines.base import Engine
    from nla_hub.zoo import ZooEntry


def read_adapter(name: str, found: Any) -> Adapter:
    """An adapter under its own name; an NLAError for anything else."""
    from nla_hub.adapters import Adapter

    if not isinstance(found, Adapter):
        raise NLAError("This is no adapter.", got=_kind_of(found), expected="an nla_hub.adapters.Adapter")
    faults = [f"name: got {found.name!r}, expected {name!r}, as it is registered"] if found.name != name else []
    if not found.model_types:
        faults.append("model_types: empty, so it reads no model")
    _refuse("adapter", faults)
    return found


def read_engine(name: str, found: Any) -> type[Engine]:
    """An engine under its own name; an NLAError that says what a class lacks to be one."""
    _refuse("engine", engine_faults(found, name))
    engine: type[Engine] = found
    return engine


def engine_faults(found: Any, name: str | None = None) -> list[str]:
    """What a class lacks to be an engine (see `nla_hub.engines.base.Engine`), one sentence each.

    Args:
        name: what it is registered as; None where it is not.
    """
    if not inspect.isclass(found):
        return [f"got {_kind_of(found)}, expected a class"]
    faults = []
    own = getattr(found, "name", None)
    if not isinstance(own, str) or (name is not None and own != name):
        expected = "a text" if name is None else f"{name!r}, as it is registered"
        faults.append(f"name: {'missing' if own is None else f'got {own!r}'}, expected {expected}")
    kinds = getattr(found, "kinds", None)
    known = {"overwrite", "add"}
    if not isinstance(kinds, (set, frozenset)) or not kinds or not kinds <= known:
        faults.append(
            f"kinds: {'missing' if kinds is None else f'got {kinds!r}'}, expected a set out of {sorted(known)}"
        )
    settings = {"temperature": 1.0, "max_new_tokens": 1, "batch_size": 1, "progress": None}
    if found.__init__ is object.__init__ and found.__new__ is object.__new__:
        faults.append("__init__: missing, expected one that takes an AV")
    else:
        faults += _method_faults(found, "__init__", "an AV", 1, {})
    faults += _method_faults(
        found, "generate", f"vectors, draws, {', '.join(f'{key}=' for key in settings)}", 2, settings
    )
    faults += _method_faults(found, "probe", "nothing", 0, {})
    faults += _method_faults(found, "close", "nothing", 0, {})
    return faults


def class_reader(kind: str, method: str, takes: str, **keywords: Any) -> Callable[[str, Any], Any]:
    """A reader of classes that have one method of one positional argument and `keywords`."""

    def read(name: str, found: Any) -> Any:
        if not inspect.isclass(found):
            raise NLAError(f"This is no {kind}.", got=_kind_of(found), expected="a class")
        _refuse(kind, _method_faults(found, method, takes, 1, keywords))
        return found

    return read


def read_pairs(name: str, found: Any) -> Mapping[str, ZooEntry]:
    """The entries of a list of pairs (see `zoo.entries_of`)."""
    from nla_hub.zoo import entries_of

    return entries_of(found)


def _method_faults(found: Any, name: str, takes: str, positional: int, keywords: dict[str, Any]) -> list[str]:
    method = getattr(found, name, None)
    if not callable(method):
        return [f"{name}: missing, expected a method"]
    try:
        signature = inspect.signature(method)
    except (TypeError, ValueError):  # a method in C: what it takes is not known
        return []
    # Whatever is bound already, as a class method is, takes no `self`.
    bound = inspect.ismethod(method) or not inspect.isclass(found)
    try:
        signature.bind(*[None] * (positional + (not bound)), **keywords)
    except TypeError as cause:
        return [f"{name}: cannot be called with {takes} ({cause})"]
    return []


def _refuse(kind: str, faults: list[str]) -> None:
    if faults:
        raise NLAError(f"This is no {kind}.", faults=faults)


def _kind_of(found: Any) -> str:
    return f"the class {found.__name__}" if inspect.isclass(found) else f"an object of type {type(found).__name__}"
