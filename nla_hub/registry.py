"""Name -> object, loaded on first use. Everything with a name is an entry point, ours and plug-ins' alike.

Groups: `nla_hub.adapters`, `nla_hub.engines`, `nla_hub.labelers`, `nla_hub.corpora`, `nla_hub.zoo`. Our own entry points
are the tables at the end of this module; pyproject.toml declares the same ones (a test holds the two equal). The tables
are what is read, so that a checkout works that was never installed, or was installed before its last change.

Both kinds go through one loader and one check of their shape. A broken plug-in costs only its own name: it is reported
with its distribution, version and cause when somebody asks for it, left out with one warning where all are gone through,
and listed by `plugins()`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from importlib import invalidate_caches
from importlib.metadata import Distribution, EntryPoint, distributions
from typing import TYPE_CHECKING, Any, Generic, Literal, TypeVar

from nla_hub.errors import NLAError, UnknownNameError
from nla_hub.log import logger
from nla_hub.shapes import class_reader, read_adapter, read_engine, read_pairs

if TYPE_CHECKING:
    from nla_hub.adapters import Adapter
    from nla_hub.engines.base import Engine
    from nla_hub.training.labelers import Corpus, Labeler
    from nla_hub.zoo import ZooEntry

T = TypeVar("T")

OWN_DISTRIBUTION = "nla-hub"
GROUPS = ("nla_hub.adapters", "nla_hub.engines", "nla_hub.labelers", "nla_hub.corpora", "nla_hub.zoo")


@dataclass(frozen=True)
class Plugin:
    """One entry point of somebody else's distribution.

    Attributes:
        group, name: entry-point group and name.
        distribution, version: what installed it; None where its metadata does not say.
        state: "ok", or "broken": it cannot be had under this name.
        cause: why it is broken, in one line; None for "ok".
    """

    group: str
    name: str
    distribution: str | None
    version: str | None
    state: Literal["ok", "broken"]
    cause: str | None = None


class Registry(Generic[T]):
    """The objects of one kind.

    Args:
        kind: what one of them is called in messages.
        group: entry-point group that adds to them.
        builtin: our own entry points, name -> "module:attribute".
        read: turns what an entry point loads into the object, or raises an NLAError that says what is wrong with it.
    """

    def __init__(self, kind: str, group: str, builtin: dict[str, str], read: Callable[[str, Any], T]) -> None:
        self.kind = kind
        self.group = group
        self.builtin = builtin
        self._read = read
        self._loaded: dict[str, T] = {}
        self._broken: dict[str, tuple[NLAError, str]] = {}  # with the cause in one line
        self._lent: dict[str, T] = {}
        self._found: dict[str, list[EntryPoint]] | None = None
        self._reported: set[str] = set()

    # -- asking ----------------------------------------------------------------------------------------------

    def names(self) -> list[str]:
        """All names, our own first; those of broken plug-ins too."""
        plugins = sorted(name for name in self._points() if name not in self.builtin)
        return [*self.builtin, *plugins, *(name for name in self._lent if name not in (*self.builtin, *plugins))]

    def get(self, name: str) -> T:
        """The object called `name`.

        Raises:
            UnknownNameError: no such name.
            NLAError: a plug-in that does not load or is not what it should be, named with its distribution, version
                and cause; or two plug-ins of one name, both named.
        """
        if name in self._lent:
            return self._lent[name]
        if name in self._broken:
            raise self._broken[name][0].with_traceback(None)
        if name not in self._loaded:
            self._loaded[name] = self._load(name)
        return self._loaded[name]

    def items(self) -> Iterator[tuple[str, T]]:
        """Every name with its object, our own first. A broken plug-in is left out, with one warning a process."""
        for name in self.names():
            try:
                found = self.get(name)
            except NLAError as error:
                if name in self.builtin:
                    raise
                self._warn(name, "%s; it is left out", error.one_line().rstrip("."))
                continue
            yield name, found

    def origin(self, name: str) -> str:
        """Name of the distribution that `name` comes from."""
        if name in self.builtin:
            return OWN_DISTRIBUTION
        points = self._points().get(name)  # None for what was lent
        return (_distribution(points[0]) if points else None) or "an unknown distribution"

    def plugins(self) -> list[Plugin]:
        """The entry points of other distributions, each loaded once to see how it is."""
        listed = []
        for name, points in sorted(self._points().items()):
            cause = None
            if name in self.builtin:
                cause = f"this name is {OWN_DISTRIBUTION}'s own {self.kind}, which no plug-in replaces"
            else:
                try:
                    self.get(name)
                except NLAError as error:
                    cause = self._broken[name][1] if name in self._broken else error.one_line()
            for point in points:
                state: Literal["ok", "broken"] = "ok" if cause is None else "broken"
                listed.append(Plugin(self.group, name, _distribution(point), _version(point), state, cause))
        return listed

    # -- loading ---------------------------------------------------------------------------------------------

    def _points(self) -> dict[str, list[EntryPoint]]:
        """Entry points of other distributions by name; read once a process (see `refresh`)."""
        if self._found is None:
            found: dict[str, list[EntryPoint]] = {}
            for point in _installed():
                if point.group == self.group:
                    found.setdefault(point.name, []).append(point)
            self._found = found
            for name in self.builtin:
                for point in found.get(name, ()):
                    self._warn(name, "%s may not replace our %s %r; it is left out", _who(point), self.kind, name)
        return self._found

    def _load(self, name: str) -> T:
        if target := self.builtin.get(name):
            return self._read(name, EntryPoint(name, target, self.group).load())
        points = self._points().get(name)
        if points is None:
            raise UnknownNameError(self.kind, name, self.names())
        if len(points) > 1:
            raise NLAError(
                f"The {self.kind} {name!r} comes from {len(points)} plug-ins.",
                got=" and ".join(_who(point) for point in points),
                next_step="uninstall all of them but one",
            )
        (point,) = points
        try:
            return self._read(name, point.load())
        except (Exception, SystemExit) as cause:  # a plug-in may fail in every way there is
            reason = cause.one_line() if isinstance(cause, NLAError) else f"{type(cause).__name__}: {cause}"
            reason = " ".join(reason.split())
            error = NLAError(
                f"The {self.kind} {name!r} of the plug-in {_who(point)} cannot be used: {reason}",
                where=point.value,
                next_step=f"update or uninstall {_distribution(point) or 'it'}; everything else works without it",
            )
            self._broken[name] = error, reason
            raise error from cause

    def _warn(self, name: str, text: str, *values: object) -> None:
        if name not in self._reported:
            self._reported.add(name)
            logger.warning(text, *values)

    # -- for tests and long sessions -------------------------------------------------------------------------

    def refresh(self) -> None:
        """Forget what was found and loaded, so that a plug-in installed since is seen."""
        self._found = None
        self._loaded.clear()
        self._broken.clear()
        self._reported.clear()

    @contextmanager
    def lend(self, name: str, found: T) -> Iterator[None]:
        """While open, `name` answers to `found`, as if it were registered; for tests of what is not installed yet.

        It holds for the whole process, so it is not for use while other threads load pairs.
        """
        before = dict(self._lent)
        self._lent[name] = found
        try:
            yield
        finally:
            self._lent = before


def plugins() -> list[Plugin]:
    """Every entry point of another distribution in our groups, loaded once to see how it is."""
    return [plugin for registry in (adapters, engines, labelers, corpora, zoos) for plugin in registry.plugins()]


def broken() -> list[Plugin]:
    """The plug-ins that cannot be used, each with its cause."""
    return [plugin for plugin in plugins() if plugin.state == "broken"]


def refresh() -> None:
    """Look for plug-ins again: for a session in which one was installed or removed."""
    from nla_hub.zoo import forget

    invalidate_caches()
    _installed.cache_clear()
    for registry in (adapters, engines, labelers, corpora, zoos):
        registry.refresh()
    forget()


def unknown(kind: str, name: str, known: Iterable[str], *, next_step: str | None = None) -> UnknownNameError:
    """The error for a name that no registered object answers to."""
    return UnknownNameError(kind, name, known, next_step=next_step)


@cache
def _installed() -> tuple[EntryPoint, ...]:
    """The entry points of all other distributions, each distribution as Python would import it: the first on the path.

    Each is read for itself: one that nobody can read, ours or not, must not hide the others.
    """
    found: list[EntryPoint] = []
    seen: set[str] = {OWN_DISTRIBUTION}
    for distribution in distributions():
        name = _name(distribution)
        if name in seen:
            continue
        try:
            found.extend(point for point in distribution.entry_points if point.group in GROUPS)
        except Exception as cause:  # metadata of strangers fails in every way there is
            logger.warning("the entry points of %s cannot be read: %s", name or "a distribution", cause)
            continue
        seen.update(filter(None, [name]))
    return tuple(sorted(found, key=_who))


def _name(distribution: Distribution | None) -> str | None:
    """The name of a distribution as PEP 503 normalises it; None where its metadata does not say."""
    try:
        name = distribution.name if distribution else None
    except Exception:  # no metadata at all
        return None
    return re.sub(r"[-_.]+", "-", name).lower() if isinstance(name, str) and name else None


def _distribution(point: EntryPoint) -> str | None:
    return _name(point.dist)


def _version(point: EntryPoint) -> str | None:
    try:
        version = point.dist.version if point.dist else None
    except Exception:  # no metadata at all
        return None
    return version if isinstance(version, str) else None


def _who(point: EntryPoint) -> str:
    name = _distribution(point)
    return f"{name} {_version(point) or '(unknown version)'}" if name else "an unknown distribution"


# -- our own: the same in pyproject.toml ---------------------------------------------------------------------

adapters: Registry[Adapter] = Registry(
    "adapter",
    "nla_hub.adapters",
    {
        "qwen2": "nla_hub.adapters:QWEN2",
        "qwen3": "nla_hub.adapters:QWEN3",
        "llama": "nla_hub.adapters:LLAMA",
        "mistral": "nla_hub.adapters:MISTRAL",
        "gemma2": "nla_hub.adapters:GEMMA2",
        "gemma3": "nla_hub.adapters:GEMMA3",
        "gpt2": "nla_hub.adapters:GPT2",
        "gpt_neox": "nla_hub.adapters:GPT_NEOX",
    },
    read_adapter,
)
engines: Registry[type[Engine]] = Registry(
    "engine",
    "nla_hub.engines",
    {
        "transformers": "nla_hub.engines.transformers:TransformersEngine",
        "vllm": "nla_hub.engines.vllm.engine:VLLMEngine",
        "remote": "nla_hub.engines.remote.engine:RemoteEngine",
    },
    read_engine,
)
labelers: Registry[type[Labeler]] = Registry(
    "labeler",
    "nla_hub.labelers",
    {
        "tiny": "nla_hub.tiny.labeler:TinyLabeler",
        "openai": "nla_hub.training.labeling.openai_api:OpenAILabeler",
        "anthropic": "nla_hub.training.labeling.anthropic_batch:AnthropicLabeler",
        "source": "nla_hub.training.labeling.from_source:SourceLabeler",
        "nla": "nla_hub.training.labeling.from_nla:NLALabeler",
    },
    class_reader("labeler", "label", "requests"),
)
corpora: Registry[type[Corpus]] = Registry(
    "corpus",
    "nla_hub.corpora",
    {"tiny-world": "nla_hub.tiny.labeler:TinyCorpus"},
    class_reader("corpus", "documents", "n, seed=", seed=0),
)
zoos: Registry[Mapping[str, ZooEntry]] = Registry(
    "list of pairs", "nla_hub.zoo", {"nla-hub": "nla_hub.zoo:own_pairs"}, read_pairs
)
