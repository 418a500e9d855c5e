"""Name -> object, loaded on first use, ours and plug-ins' alike through entry points.

Groups: `nla_hub.adapters`, `nla_hub.engines`, `nla_hub.labelers`, `nla_hub.corpora`.
A broken plug-in costs only its own name: it is
reported with its distribution and cause when somebody asks for it.
"""

from __future__ import annotations

from collections.abc import Iterable
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from nla_hub.errors import NLAError, UnknownNameError

if TYPE_CHECKING:
    from nla_hub.adapters import Adapter
    from nla_hub.engines.base import Engine
    from nla_hub.training.labelers import Corpus, Labeler

T = TypeVar("T")


class Registry(Generic[T]):
    """The objects of one kind. `builtin` maps names to "module:attribute"; entry points of `group` add to it."""

    def __init__(self, kind: str, group: str, builtin: dict[str, str]) -> None:
        self.kind = kind
        self.group = group
        self._builtin = builtin
        self._loaded: dict[str, T] = {}

    def _plugins(self) -> dict[str, EntryPoint]:
        found: dict[str, EntryPoint] = {}
        for point in entry_points(group=self.group):
            if point.name in self._builtin:
                continue  # our own entries are found without installed metadata; a plug-in cannot replace them
            found.setdefault(point.name, point)
        return found

    def names(self) -> list[str]:
        """All names, our own first."""
        return [*self._builtin, *sorted(self._plugins())]

    def get(self, name: str) -> T:
        """The object called `name`.

        Raises:
            UnknownNameError: no such name.
            NLAError: a plug-in that does not load, named with its distribution and cause.
        """
        if name not in self._loaded:
            if target := self._builtin.get(name):
                module, attribute = target.split(":")
                self._loaded[name] = getattr(import_module(module), attribute)
            elif point := self._plugins().get(name):
                self._loaded[name] = _load(point, self.kind)
            else:
                raise UnknownNameError(self.kind, name, self.names())
        return self._loaded[name]


def _load(point: EntryPoint, kind: str) -> Any:
    try:
        return point.load()
    except Exception as cause:
        distribution = point.dist.name if point.dist else "an unknown distribution"
        raise NLAError(
            f"The {kind} {point.name!r} of the plug-in {distribution} does not load: {type(cause).__name__}: {cause}",
            where=point.value,
            next_step=f"update or uninstall {distribution}; everything else works without it",
        ) from cause


def unknown(kind: str, name: str, known: Iterable[str], *, next_step: str | None = None) -> UnknownNameError:
    """The error for a name that no registered object answers to."""
    return UnknownNameError(kind, name, known, next_step=next_step)


adapters: Registry[Adapter] = Registry(
    "adapter",
    "nla_hub.adapters",
    {
        "qwen2": "nla_hub.adapters:QWEN2",
        "llama": "nla_hub.adapters:LLAMA",
        "gemma3": "nla_hub.adapters:GEMMA3",
    },
)
engines: Registry[type[Engine]] = Registry(
    "engine", "nla_hub.engines", {"transformers": "nla_hub.engines.transformers:TransformersEngine"}
)
labelers: Registry[type[Labeler]] = Registry(
    "labeler", "nla_hub.labelers", {"tiny": "nla_hub.tiny.labeler:TinyLabeler"}
)
corpora: Registry[type[Corpus]] = Registry(
    "corpus", "nla_hub.corpora", {"tiny-world": "nla_hub.tiny.labeler:TinyCorpus"}
)
