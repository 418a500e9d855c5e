"""Pairs by name -> opened halves -> verified modules; `NLA.from_pretrained` puts them together."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from nla_hub import hub
from nla_hub.adapters import adapter_for
from nla_hub.architecture import tied
from nla_hub.checkpoints import head_input_scale, load_ar, load_av
from nla_hub.embedding import embedding_file, embedding_table
from nla_hub.engines.base import LoadedAV, StoredAV
from nla_hub.engines.choice import EngineChoice
from nla_hub.errors import CheckpointError, HubNotFoundError, InputError, SidecarError
from nla_hub.export import save_av
from nla_hub.hub import HubOptions
from nla_hub.injection import Injector
from nla_hub.layouts import places
from nla_hub.library import Checkpoint, Library, Under
from nla_hub.locate import PairRefs, Ref, sibling_names
from nla_hub.log import logger
from nla_hub.opening import Half, hub_name, open_half
from nla_hub.pretrained import (
    LoadedModel,
    LoadOptions,
    has_tokenizer,
    load_causal_lm,
    load_config,
    load_tokenizer,
    load_trunk,
    verify_causal_lm,
)
from nla_hub.prompts import ARPrompt, AVPrompt
from nla_hub.reconstructor import ARModel, Reconstructor
from nla_hub.releases import at_release_of, require_one_release
from nla_hub.sidecar import Sidecar
from nla_hub.source_text import context_length
from nla_hub.verbalizer import Verbalizer
from nla_hub.weights import StoredSlice, WeightIndex, matches


def check_components(components: Sequence[str]) -> set[str]:
    """The wanted halves; raises an InputError for anything else."""
    wanted = {components} if isinstance(components, str) else set(components)
    if not wanted or not wanted <= {"av", "ar"}:
        raise InputError("Unknown components.", got=repr(components), expected='"av", "ar" or both')
    return wanted


@dataclass(frozen=True)
class Pair:
    """A pair whose files are found and whose contract is verified; no weights were read yet.

    `av` is opened even where only the AR is wanted: its sidecar leads to the other half. `wanted` are the halves whose
    weights are on disk.
    """

    name: str
    av: Half | None
    ar: Half | None
    base: Ref | None
    wanted: frozenset[str]
    library: Library

    @property
    def sidecar(self) -> Sidecar:
        """The AV's sidecar (the AR's where only that was wanted)."""
        first, second = (self.av, self.ar) if "av" in self.wanted else (self.ar, self.av)
        half = first or second
        assert half is not None
        return half.sidecar

    @property
    def is_packed(self) -> bool:
        """Whether weights of a half are quantised on disk already."""
        halves = [half for half in (self.av, self.ar) if half is not None]
        return any(getattr(half.config, "quantization_config", None) is not None for half in halves)

    @property
    def family(self) -> str:
        """Name of the pair's adapter."""
        half = self.av or self.ar
        assert half is not None
        return half.adapter.name


def open_pair(
    refs: PairRefs,
    *,
    components: Sequence[str] = ("av", "ar"),
    sidecar: Mapping[str, Any] | None = None,
    hub_options: HubOptions | None = None,
    load_options: LoadOptions | None = None,
    weights: bool | Sequence[str] = True,
) -> Pair:
    """Open the halves of a pair and hold them against each other.

    Args:
        refs: from `locate.resolve_pair`.
        components: the halves whose weights are wanted.
        sidecar: what the user says about the contract of both halves.
        weights: False leaves weights on the Hub: sidecars, configurations and tokenizers alone are downloaded. Roles: of
            the wanted halves, those whose weights are downloaded.

    Raises:
        CheckpointError and its children, HubError and its children.
    """
    wanted = check_components(components)
    library = Library(hub_options)
    common: dict[str, Any] = {
        "library": library,
        "load_options": load_options or LoadOptions(),
        "base": refs.base,
        "told": {key: value for key, value in (sidecar or {}).items() if key != "role"},  # it is told to both halves
    }
    av = ar = None
    if wanted == {"ar"} and refs.av is not None and (refs.ar is None or refs.ar_guessed) and _is_ar(refs.av, common):
        ar = open_half(refs.av, "ar", **common)  # the AR itself was named
    else:
        av = open_half(refs.av, "av", **common) if refs.av else None
        if "ar" in wanted:
            ar = _open_ar(refs, av, common)
    if av is not None and ar is not None:
        faults = av.sidecar.pair_faults(ar.sidecar)
        if av.adapter.name != ar.adapter.name:
            faults.append(f"family: the AV is a {av.adapter.name}, the AR a {ar.adapter.name}")
        if faults:
            raise SidecarError(
                "These two halves are not a pair.",
                where=f"{refs.av} and {ar.checkpoint.ref}",
                faults=faults,
                next_step='name the AR that was trained with this AV: ar="owner/name" or ar="./path"',
            )
        require_one_release(av, ar, ar_named=refs.ar_named)
    for half in (av, ar):
        if half is not None and half.role in wanted:
            half.require_config()
    base = refs.base
    if base is None:
        names = [half.sidecar.base_model for half in (av, ar) if half is not None]
        base = next((ref for name in names if (ref := hub_name(name))), None) or _under(av, ar)
    fetched = wanted & ({"av", "ar"} if weights is True else set(weights or ()))
    av = av.with_weights() if av is not None and "av" in fetched else av
    ar = ar.with_weights() if ar is not None and "ar" in fetched else ar
    return Pair(refs.name, av, ar, base, frozenset(wanted), library)


def _under(*halves: Half | None) -> Ref | None:
    """What a pair's LoRAs lie on, where that is no folder of their own: the source, as far as anything says."""
    for half in halves:
        if half is not None and half.under is not None and half.under.checkpoint is not half.checkpoint:
            return replace(half.under.checkpoint.ref, subfolder=half.under.folder)
    return None


def _open_ar(refs: PairRefs, av: Half | None, common: Mapping[str, Any]) -> Half:
    """The AR: the one named, else one in the AV's own checkpoint, what its sidecar calls its pair, its sibling by name.

    Where nobody says its revision, it is opened at the AV's release.
    """
    library: Library = common["library"]
    if refs.ar is not None and not refs.ar_guessed:
        known = refs.ar if refs.ar_named else at_release_of(av, refs.ar, library)
        return open_half(known, "ar", beside=av, **common)
    if av is not None:
        inside = replace(av.checkpoint.ref, subfolder=refs.ar_subfolder)
        if refs.ar_subfolder or _holds_ar(av):
            return open_half(inside, "ar", beside=av, **common)
        if (named := hub_name(av.sidecar.pair_repo)) is not None:
            return open_half(at_release_of(av, named, library), "ar", beside=av, **common)
    tried = [] if refs.ar is None else [refs.ar]
    if refs.av is not None and refs.av.kind == "hub":
        tried = [Ref("hub", name) for name in sibling_names(refs.av.name)]
    for ref in tried:
        if ref.kind != "hub" or hub.exists(ref.name, options=library.options):
            return open_half(at_release_of(av, ref, library), "ar", beside=av, **common)
    error = HubNotFoundError if tried else CheckpointError
    raise error(
        f"The AR half of this pair is not known{': the Hub has no such repository' if tried else ''}.",
        where=refs.name,
        got=" or ".join(map(str, tried)) or None,
        next_step='pass ar="owner/name" or ar="./path", or components=("av",) to do without scores',
    )


def _is_ar(ref: Ref, common: Mapping[str, Any]) -> bool:
    """Whether a checkpoint's own folder can only be an AR."""
    checkpoint: Checkpoint = common["library"].open(ref)
    return any(place.folder == ref.subfolder and place.role == "ar" for place in places(checkpoint.files))


def _holds_ar(av: Half) -> bool:
    """Whether the AV's own checkpoint holds something that only an AR can be."""
    return any(place.role == "ar" for place in places(av.checkpoint.files))


def load_verbalizer(half: Half, engine: EngineChoice, options: LoadOptions, *, name: str) -> Verbalizer:
    """The AV on its engine, verified and probed; `name` is what its explanations call it."""
    if engine.reads == "model":
        return verbalizer_of(half, load_av(half.files, options), engine, name=name)
    return _verbalizer(half, stored_av(half, options, weights=engine.reads == "files"), engine, name)


def verbalizer_of(half: Half, loaded: LoadedModel, engine: EngineChoice, *, name: str) -> Verbalizer:
    """A loaded AV on its engine, probed."""
    prompt = AVPrompt.build(half.tokenizer, half.sidecar)
    return _verbalizer(half, LoadedAV(loaded, half.tokenizer, prompt, _injector(half)), engine, name)


def _verbalizer(half: Half, av: LoadedAV | StoredAV, engine: EngineChoice, name: str) -> Verbalizer:
    built = engine.build(av)
    logger.debug("%s: AV on engine %s", half.files.directory, built.name)
    return Verbalizer(built, half.sidecar, name, half.checkpoint.commit)


def _injector(half: Half) -> Injector:
    assert half.sidecar.marker is not None
    return Injector(half.adapter, half.sidecar.injection, half.sidecar.marker)


def stored_av(half: Half, options: LoadOptions, *, weights: bool) -> StoredAV:
    """An AV as files that anybody can read: its own folder where that is a complete text model with a tokenizer, else one that
    is written for the occasion (a LoRA merged, a text model taken out of its wrapper).

    Raises:
        CheckpointError, WeightsError: see `checkpoints.load_av`; with `weights`, everything is verified as when it is loaded.
    """
    config = half.config.get_text_config()
    known = (half.tokenizer, AVPrompt.build(half.tokenizer, half.sidecar), _injector(half), options.torch_dtype())
    directory = half.files.directory
    if not weights:
        return StoredAV(half.files.model_directory, config, *known, embedding=partial(embedding_of, half))
    plain = half.files.form == "model" and config is half.config and has_tokenizer(directory)
    if plain and not denies_head(half, WeightIndex.read(directory).tensors):
        verify_causal_lm(directory, options)
        return StoredAV(directory, config, *known)
    scratch = TemporaryDirectory(prefix="nla-hub-av-")
    try:
        on_cpu = replace(options, device_map={"": "cpu"})
        save_av(Path(scratch.name), load_av(half.files, on_cpu).model, half.tokenizer, half.sidecar, dtype=known[-1])
    except BaseException:
        scratch.cleanup()
        raise
    return StoredAV(Path(scratch.name), config, *known, scratch)


def embedding_of(half: Half) -> StoredSlice:
    """A half's embedding table on disk (of a LoRA: its base's), of which the one file that holds it is fetched.

    Raises:
        WeightsError: no table, or more than one. HubError and its children.
    """
    under = half.under or Under(half.checkpoint, half.place.folder)
    prefix = f"{under.folder}/" if under.folder else ""
    names = [name.removeprefix(prefix) for name in under.checkpoint.files if name.startswith(prefix)]
    name = embedding_file(half.files.model_directory, names, half.adapter)
    root = under.checkpoint.fetch([f"{prefix}{name}"])
    return embedding_table(root / under.folder, name, half.adapter)


def denies_head(half: Half, stored: Collection[str]) -> bool:
    """Whether among an AV's stored weights is an lm_head that its config denies: transformers loads it, others do not."""
    return tied(half.config) and any(matches(name, half.adapter.lm_head_weights) for name in stored)


def load_reconstructor(half: Half, options: LoadOptions) -> Reconstructor:
    """The AR, verified."""
    prompt = ar_prompt(half)
    loaded, head = load_ar(half.files, half.sidecar, options)
    model = ARModel(loaded.adapter, loaded.model, head, head_input_scale(half.sidecar))
    return Reconstructor(model, prompt, half.sidecar, str(half.checkpoint.ref))


def ar_prompt(half: Half) -> ARPrompt:
    """The AR's prompt, held against its tokenizer."""
    return ARPrompt.build(half.tokenizer, half.sidecar, max_length=context_length(half.config))


# -- the source ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Source:
    """The base model with its tokenizer: complete for steering, cut after block K for capture."""

    loaded: LoadedModel
    tokenizer: Any
    name: str


def find_source(
    base: Ref | None, sidecar: Sidecar, family: str | None, name: str, library: Library, options: LoadOptions
) -> Under:
    """A pair's base model, whose config fits the pair; its weights stay where they are.

    Raises:
        CheckpointError: nothing says where it is. SidecarError: it is not this pair's. HubError and its children.
    """
    if base is None:
        named = sidecar.base_model
        raise CheckpointError(
            "Nothing says where the base model of this pair is."
            if named is None
            else f"The sidecar calls the base model {named!r}, which is not a Hub name.",
            where=name,
            next_step='pass base_model="owner/name" or base_model="./path" to from_pretrained',
        )
    under = Under(library.open(base), base.subfolder)
    directory = under.fetch(weights=False)
    config = load_config(directory, trust_remote_code=options.trust_remote_code).get_text_config()
    faults = []
    if family is not None and (found := adapter_for(config).name) != family:
        faults.append(f"family: the pair is a {family}, the base model a {found}")
    if config.hidden_size != sidecar.d_model:
        faults.append(f"d_model: the pair says {sidecar.d_model}, the base model has hidden_size {config.hidden_size}")
    if sidecar.site.layer >= config.num_hidden_layers:
        faults.append(f"layer: the pair says K = {sidecar.site.layer}, the model has {config.num_hidden_layers} blocks")
    if faults:
        raise SidecarError(
            "This is not the base model of this pair.",
            where=base,
            faults=faults,
            next_step='pass the right one: base_model="owner/name" or base_model="./path"',
        )
    return under


def open_source(
    base: Ref | None, sidecar: Sidecar, family: str | None, name: str, library: Library, options: LoadOptions
) -> Path:
    """The directory of a pair's base model, whose weights are on disk, but not read; raises as `find_source`."""
    return find_source(base, sidecar, family, name, library, options).fetch()


def load_source(directory: Path, sidecar: Sidecar, name: str, options: LoadOptions, *, complete: bool) -> Source:
    """The base model of a directory: complete, or its trunk up to the pair's site."""
    loaded = load_causal_lm(directory, options) if complete else load_trunk(directory, sidecar.site, options)
    return Source(loaded, load_tokenizer(directory, trust_remote_code=options.trust_remote_code), name)
