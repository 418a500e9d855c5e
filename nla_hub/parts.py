"""Which of a pair's parts are in memory: source, AV and AR, all at once, one after another, or as roles of one base."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any, ClassVar, Literal, get_args

from torch import Tensor, nn

from nla_hub.accelerator import free_memory
from nla_hub.adapters import Adapter
from nla_hub.checkpoints import head_input_scale, load_head, read_loras, require_blocks
from nla_hub.engines.base import Completion, Engine
from nla_hub.engines.choice import EngineChoice
from nla_hub.errors import CheckpointError, InputError, NLAError
from nla_hub.library import Library
from nla_hub.loading import (
    Pair,
    Source,
    ar_prompt,
    load_reconstructor,
    load_source,
    load_verbalizer,
    open_source,
    verbalizer_of,
)
from nla_hub.locate import Ref
from nla_hub.lora_roles import Roles
from nla_hub.opening import Half
from nla_hub.pretrained import LoadOptions, load_causal_lm, load_tokenizer
from nla_hub.prompts import AVPrompt
from nla_hub.reconstructor import ARModel, Reconstructor
from nla_hub.sidecar import Role, Sidecar, Site
from nla_hub.sizing import choose_mode
from nla_hub.steering import unsteered
from nla_hub.verbalizer import Verbalizer

Memory = Literal["auto", "resident", "staged", "shared"]
"""How parts share the memory: all stay ("resident"); one at a time, freed when another is needed ("staged"); one frozen base
with AV and AR as LoRA roles on it ("shared"); "auto" is resident where everything fits, else staged."""

Mode = Literal["resident", "staged", "shared"]
"""What was taken."""

PartName = Literal["av", "ar", "trunk", "source"]
"""`trunk` is the source up to block K, for capture; `source` the complete one, for steering."""


class Parts:
    """A pair's parts, loaded when they are asked for and kept as the mode says."""

    def __init__(
        self,
        loaders: Mapping[PartName, Callable[[], Any]],
        ready: Mapping[PartName, Any] | None = None,
        *,
        staged: bool = False,
        turn: AbstractContextManager[Any] | None = None,
    ) -> None:
        self.turn: AbstractContextManager[Any] = turn or nullcontext()
        """Held while the source runs: on a shared base one role is played at a time."""
        self._loaders = dict(loaders)
        self._here: dict[PartName, Any] = dict(ready or {})  # what no loader could bring back is never freed
        self.staged = staged

    def __contains__(self, name: object) -> bool:
        return name in self._here or name in self._loaders

    @property
    def loaded(self) -> tuple[PartName, ...]:
        """The parts that are in memory now."""
        return tuple(self._here)

    def get(self, name: PartName) -> Any:
        """A part, loaded where it is not here; under "staged" every other one is freed first.

        Raises:
            CheckpointError and its children, HubError and its children, InjectionError: see `loading`.
        """
        if name not in self._here:
            if self.staged:
                self.release()
            self._here[name] = self._loaders[name]()
        return self._here[name]

    def release(self) -> None:
        """Free every part that could be loaded again."""
        for name in [name for name in self._here if name in self._loaders]:
            _close(self._here.pop(name))
        free_memory()

    def close(self) -> None:
        """Stop what parts run beside their weights (processes, threads, connections), and free what could be loaded again."""
        for name, part in self._here.items():
            if name not in self._loaders:
                _close(part)
        self.release()


def _close(part: Any) -> None:
    if isinstance(part, Verbalizer):
        part.engine.close()


def build(pair: Pair, *, engine: EngineChoice, memory: Memory, load_options: LoadOptions) -> tuple[Parts, Mode]:
    """The parts of an opened pair, and the mode that was taken. Under "resident" and "shared" the halves are loaded now.

    Raises:
        InputError: an unknown mode. CheckpointError: "shared" for a pair that does not stand on one base.
    """
    if memory not in get_args(Memory):
        raise InputError("Unknown memory mode.", got=repr(memory), expected=", ".join(map(repr, get_args(Memory))))
    mode: Mode = _choose(pair, engine, load_options) if memory == "auto" else memory
    if mode == "shared":
        parts = _shared(pair, engine, load_options)
    else:
        parts = _separate(pair, engine, load_options, staged=mode == "staged")
    if mode != "staged":
        halves: tuple[PartName, PartName] = ("av", "ar")
        for half in halves:
            if half in parts:
                parts.get(half)
    return parts, mode


def _choose(pair: Pair, engine: EngineChoice, options: LoadOptions) -> Mode:
    """What "auto" takes; where a size cannot be told the loader itself says best what is wrong."""
    try:
        return choose_mode(pair, options, elsewhere=("av",) if engine.reads == "contract" else ())
    except NLAError:
        return "resident"


def _separate(pair: Pair, engine: EngineChoice, options: LoadOptions, *, staged: bool) -> Parts:
    loaders: dict[PartName, Callable[[], Any]] = {}
    av, ar = pair.av, pair.ar
    if "av" in pair.wanted and av is not None:
        AVPrompt.build(av.tokenizer, av.sidecar)  # its faults are told now, whenever the weights come
        loaders["av"] = lambda: load_verbalizer(av, engine, options, name=_av_name(pair))
    if "ar" in pair.wanted and ar is not None:
        ar_prompt(ar)
        loaders["ar"] = lambda: load_reconstructor(ar, options)

    sources = source_loaders(pair.base, pair.sidecar, pair.family, pair.name, pair.library, options)
    return Parts({**loaders, **sources}, staged=staged)


def source_loaders(
    base: Ref | None, sidecar: Sidecar, family: str | None, name: str, library: Library, options: LoadOptions
) -> dict[PartName, Callable[[], Source]]:
    """How to load a pair's source, cut to its site and complete."""

    def source(complete: bool) -> Source:
        directory = open_source(base, sidecar, family, name, library, options)
        return load_source(directory, sidecar, str(base), options, complete=complete)

    return {"trunk": lambda: source(False), "source": lambda: source(True)}


def _av_name(pair: Pair) -> str:
    assert pair.av is not None
    return pair.av.name if pair.av.checkpoint.ref.kind == "hub" else pair.name


# -- one base, several roles -----------------------------------------------------------------------------------


def _shared(pair: Pair, engine: EngineChoice, options: LoadOptions) -> Parts:
    if engine.reads != "model":
        raise InputError(
            f"The engine {engine.name!r} keeps weights of its own, so nothing can be shared with it.",
            next_step='use memory="resident" or "staged", or engine="transformers"',
        )
    halves: dict[Role, Half] = {
        half.role: half for half in (pair.av, pair.ar) if half is not None and half.role in pair.wanted
    }
    faults = []
    for role, half in halves.items():
        if half.under is None:
            faults.append(f"the {role.upper()} is a complete model")
            continue
        under = replace(half.under.checkpoint.ref, subfolder=half.under.folder)
        if under != pair.base:
            faults.append(f"the {role.upper()} lies on {under}, the source is {pair.base}")
        if role == "ar" and half.sidecar.final_norm_stripped is not True:
            faults.append("the AR's head reads behind the final norm (final_norm_stripped is not true)")
    if faults:
        raise CheckpointError(
            "This pair cannot share one base model.",
            where=pair.name,
            faults=faults,
            expected="an AV and an AR that are LoRAs on the source itself",
            next_step='use memory="staged": one part at a time',
        )
    base = open_source(pair.base, pair.sidecar, pair.family, pair.name, pair.library, options)
    loaded = load_causal_lm(base, options)
    roles = Roles(loaded.model, loaded.adapter)
    ready: dict[PartName, Any] = {}
    av, ar = halves.get("av"), halves.get("ar")
    if av is not None:
        roles.add("av", read_loras(av.files, loaded.adapter))
        with roles.playing("av"):
            verbalizer = verbalizer_of(av, loaded, engine, name=_av_name(pair))
        ready["av"] = Verbalizer(
            _RoleEngine(verbalizer.engine, roles), verbalizer.sidecar, verbalizer.name, verbalizer.revision
        )
    if ar is not None:
        loras = read_loras(ar.files, loaded.adapter, site=ar.sidecar.site)
        require_blocks(ar.files, loras, ar.sidecar)
        roles.add("ar", loras)
        head = load_head(ar.files.directory, ar.sidecar.d_model).to(next(loaded.model.parameters()).device)
        model = _RoleAR(loaded.adapter, loaded.model, head, roles, ar.sidecar.site, head_input_scale(ar.sidecar))
        ready["ar"] = Reconstructor(model, ar_prompt(ar), ar.sidecar, ar.name)
    source = Source(loaded, load_tokenizer(base, trust_remote_code=options.trust_remote_code), str(pair.base))
    ready["trunk"] = ready["source"] = source
    return Parts({}, ready, turn=roles.turn)


class _RoleEngine(Engine):
    """An engine whose model is a shared base: every pass is made in the AV's role."""

    name: ClassVar[str] = "shared"
    kinds: ClassVar[frozenset[str]] = frozenset({"overwrite", "add"})  # the engine inside was asked already

    def __init__(self, engine: Engine, roles: Roles) -> None:
        self.engine = engine
        self.roles = roles

    @property
    def av(self) -> Any:
        """The AV inside."""
        return self.engine.av  # type: ignore[attr-defined]

    def generate(self, vectors: Tensor, draws: Tensor | None, **settings: Any) -> list[Completion]:
        """See `Engine.generate`."""
        with self.roles.playing("av"), unsteered(self.roles.adapter, self.roles.model):
            return self.engine.generate(vectors, draws, **settings)

    def probe(self) -> None:
        """See `Engine.probe`."""
        with self.roles.playing("av"):
            self.engine.probe()

    def close(self) -> None:
        """See `Engine.close`."""
        self.engine.close()


class _RoleAR(ARModel):
    """An AR whose trunk is a shared base, cut to its blocks while it reads."""

    def __init__(
        self, adapter: Adapter, base: Any, head: nn.Linear, roles: Roles, site: Site, scale: float | None
    ) -> None:
        super().__init__(adapter, base, head, scale)
        self.roles = roles
        self.site = site

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        """See `ARModel.forward`."""
        with (
            self.roles.playing("ar"),
            unsteered(self.adapter, self.trunk),
            self.adapter.cut(self.trunk, self.site),
        ):
            return super().forward(ids, mask)
