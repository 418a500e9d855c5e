"""The parts of a pair, from names to loaded and verified halves; `NLA.from_pretrained` puts them together."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from nla_hub import registry
from nla_hub.adapters import adapter_for
from nla_hub.checkpoints import load_ar
from nla_hub.engines.base import Engine, LoadedAV
from nla_hub.errors import InputError, SidecarError
from nla_hub.hub import HubOptions
from nla_hub.injection import Injector
from nla_hub.locate import PairRefs, Ref, parse_name
from nla_hub.log import logger
from nla_hub.pretrained import LoadOptions, has_tokenizer, load_causal_lm, load_config, load_tokenizer
from nla_hub.prompts import ARPrompt, AVPrompt
from nla_hub.reconstructor import ARModel, Reconstructor
from nla_hub.sidecar import Sidecar
from nla_hub.source_text import context_length
from nla_hub.verbalizer import Verbalizer


def hub_name(name: str | None) -> Ref | None:
    """What a sidecar calls another repository, where that is a Hub name.

    Sidecars come from strangers: a path in one is never followed.
    """
    if name is None:
        return None
    try:
        ref = parse_name(name)
    except InputError:
        return None
    return ref if ref.kind == "hub" else None


def check_components(components: Sequence[str]) -> set[str]:
    """The wanted halves; raises an InputError for anything else."""
    wanted = {components} if isinstance(components, str) else set(components)
    if not wanted or not wanted <= {"av", "ar"}:
        raise InputError("Unknown components.", got=repr(components), expected='"av", "ar" or both')
    return wanted


def open_half(ref: Ref, role: str, options: HubOptions, *, weights: bool) -> tuple[Path, Sidecar]:
    """Directory and sidecar of one half; raises a SidecarError where it is the other one."""
    directory = ref.fetch(options, weights=weights)
    sidecar = Sidecar.read(directory)
    if sidecar.role != role:
        raise SidecarError(
            f"This is the {sidecar.role.upper()} half where the {role.upper()} is expected.",
            where=ref,
            next_step="name the AV first and the other half as ar=...",
        )
    return directory, sidecar


def family(directory: Path, options: LoadOptions) -> str:
    """The architecture family of a half, from its config alone."""
    return adapter_for(load_config(directory, trust_remote_code=options.trust_remote_code)).name


def load_verbalizer(directory: Path, sidecar: Sidecar, refs: PairRefs, engine: str, options: LoadOptions) -> Verbalizer:
    """The AV of a directory on its engine, verified and probed."""
    config = load_config(directory, trust_remote_code=options.trust_remote_code)
    tokenizer = load_tokenizer(directory, trust_remote_code=options.trust_remote_code)
    if faults := sidecar.config_faults(config):
        raise SidecarError("Sidecar and config.json disagree.", where=directory, faults=faults)
    prompt = AVPrompt.build(tokenizer, sidecar)
    loaded = load_causal_lm(directory, options)
    assert sidecar.marker is not None
    injector = Injector(loaded.adapter, sidecar.injection, sidecar.marker)
    engine_type = registry.engines.get("transformers" if engine == "auto" else engine)
    built: Engine = engine_type(LoadedAV(loaded, tokenizer, prompt, injector))
    built.probe()
    logger.debug("%s: AV on engine %s", directory, built.name)
    # A downloaded snapshot lies in a directory named after its commit.
    revision = directory.name if directory.parent.name == "snapshots" else None
    return Verbalizer(built, sidecar, str(refs.av.name if refs.av and refs.av.kind == "hub" else refs.name), revision)


def load_reconstructor(
    directory: Path, sidecar: Sidecar, av_directory: Path | None, name: str, options: LoadOptions
) -> Reconstructor:
    """The AR of a directory, verified; its tokenizer is the AV's where it brings none."""
    loaded, head = load_ar(directory, sidecar, options)
    place = directory if has_tokenizer(directory) or av_directory is None else av_directory
    tokenizer = load_tokenizer(place, trust_remote_code=options.trust_remote_code)
    prompt = ARPrompt.build(tokenizer, sidecar, max_length=context_length(loaded.model.config))
    return Reconstructor(ARModel(loaded.adapter, loaded.model, head), prompt, sidecar, name)
