"""What is measured: the parts of a pair, or of a random model of a named architecture, one in memory at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from nla_hub.accelerator import free_memory
from nla_hub.engines.base import Engine, LoadedAV, StoredAV
from nla_hub.engines.choice import EngineChoice
from nla_hub.errors import InputError
from nla_hub.export import save_av
from nla_hub.loading import Source
from nla_hub.pretrained import LoadOptions
from nla_hub.reconstructor import Reconstructor
from nla_hub.sidecar import Sidecar, Site

if TYPE_CHECKING:
    from nla_hub.nla import NLA


@dataclass(frozen=True)
class Subject:
    """The parts, each loaded when it is asked for.

    Attributes:
        name: of the pair or architecture.
        random: whether its weights are random.
        site: where its vectors live.
        av: loads the AV on modules, with its sidecar.
        ar: loads the AR.
        source: loads the complete source.
        release: frees what was loaded; whoever asked must have let go of it.
    """

    name: str
    random: bool
    site: Site
    av: Callable[[], tuple[LoadedAV, Sidecar]]
    ar: Callable[[], Reconstructor]
    source: Callable[[], Source]
    release: Callable[[], None]


def of_pair(nla: NLA) -> Subject:
    """The parts of a pair that was loaded with memory="staged" and engine="transformers"."""

    def av() -> tuple[LoadedAV, Sidecar]:
        engine: Any = nla.av.engine
        return engine.av, nla.av.sidecar

    return Subject(nla.name, False, nla.site, av, lambda: nla.ar, lambda: nla.source, nla.release)


def of_architecture(name: str, options: LoadOptions, *, prompt_tokens: int, seed: int) -> Subject:
    """Random parts of a named architecture.

    Raises:
        UnknownNameError: no such architecture.
    """
    from nla_hub.bench import architectures

    built: dict[str, Any] = {}

    def release() -> None:
        built.clear()
        free_memory()

    def once(part: str, build: Callable[[], Any]) -> Any:
        if part not in built:
            release()
            built[part] = build()
        return built[part]

    return Subject(
        name,
        True,
        architectures.site_of(name),
        lambda: once("av", lambda: architectures.random_av(name, options, prompt_tokens=prompt_tokens, seed=seed)),
        lambda: once("ar", lambda: architectures.random_ar(name, options, seed=seed)),
        lambda: once("source", lambda: architectures.random_source(name, options, seed=seed)),
        release,
    )


@contextmanager
def engine_on(choice: EngineChoice, av: LoadedAV, sidecar: Sidecar) -> Iterator[Engine]:
    """While open, an engine of an AV that is in memory, probed, which never stops a row where it can be told not to.

    An engine that reads files gets the AV written to a directory of its own. An engine that ends rows early has an attribute
    `stops` of its instances; False makes every row as long as the bound.

    Raises:
        InputError: the engine's weights are elsewhere. Whatever the engine itself raises.
    """
    if choice.reads == "contract":
        raise InputError("its weights are elsewhere, so it does not run this AV")
    with TemporaryDirectory(prefix="nla-hub-bench-", ignore_cleanup_errors=True) as folder:
        given = av if choice.reads == "model" else _stored(av, sidecar, Path(folder))
        engine = choice.build(given)
        try:
            if hasattr(engine, "stops"):
                engine.stops = False
            yield engine
        finally:
            engine.close()


def _stored(av: LoadedAV, sidecar: Sidecar, folder: Path) -> StoredAV:
    dtype = av.loaded.model.dtype
    save_av(folder, av.loaded.model, av.tokenizer, sidecar, dtype=dtype)
    return StoredAV(folder, av.config, av.tokenizer, av.prompt, av.injector, dtype)
