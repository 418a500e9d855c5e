"""Checkpoints by name -> halves of which everything but the weights is known and verified.

A `Half` has its files found, its sidecar read in whatever dialect, its configuration and tokenizer held against it.
`loading.py` turns halves into modules.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any

from nla_hub import layouts, lora, yaml_io
from nla_hub.adapters import Adapter, adapter_for
from nla_hub.errors import CheckpointError, InputError, SidecarError
from nla_hub.layouts import HalfFiles, Place
from nla_hub.library import Checkpoint, Library, Under
from nla_hub.locate import Ref, named_part, parse_name
from nla_hub.log import logger
from nla_hub.lora_stages import stacked
from nla_hub.pretrained import LoadOptions, has_tokenizer, load_config, load_tokenizer
from nla_hub.prompts import measure_marker
from nla_hub.releases import require_published
from nla_hub.sidecar import SIDECAR_NAME, Hints, Role, Sidecar, base_family, merge, named_role
from nla_hub.weights import inside
from nla_hub.zoo import known_sidecar


@dataclass(frozen=True)
class Half:
    """One half of a pair, verified as far as that goes without its weights.

    Attributes:
        checkpoint, place: where it was found.
        files: its folders on disk (a LoRA with its base).
        sidecar: its contract.
        config: transformers config of its architecture: its own, or its base's.
        adapter: the family.
        tokenizer: its own, else the nearest above, else its base's, else the other half's.
        under: what a LoRA lies on; None for a complete model.
    """

    role: Role
    checkpoint: Checkpoint
    place: Place
    files: HalfFiles
    sidecar: Sidecar
    config: Any
    adapter: Adapter
    tokenizer: Any
    under: Under | None = None

    @property
    def name(self) -> str:
        """What an explanation calls it."""
        name = self.checkpoint.ref.name
        return f"{name}/{self.place.folder}" if self.place.folder and self.checkpoint.ref.kind == "hub" else name

    def with_weights(self) -> Half:
        """The same half with its weights on disk; of a LoRA also its base and the LoRAs that act together with it.

        Raises:
            CheckpointError: it is not clear which LoRAs act together. HubError and its children.
        """
        self.checkpoint.fetch(layouts.files_of(self.checkpoint.files, self.place))
        if self.under is None:
            return self
        self.under.fetch()
        stack = stacked(self.checkpoint, self.place, self.sidecar, self.adapter, self.role)
        return replace(self, files=replace(self.files, stack=stack))

    def require_config(self) -> None:
        """Raise a SidecarError where sidecar and config.json (a LoRA's base's) disagree."""
        # A LoRA's base is as deep as the source, whichever half it is under.
        contract = self.sidecar if self.place.form == "model" else self.sidecar.with_(role="av")
        if faults := contract.config_faults(self.config):
            raise SidecarError("Sidecar and config.json disagree.", where=self.files.directory, faults=faults)


def read_contract(told: Mapping[str, Any] | str | os.PathLike[str] | None) -> dict[str, Any] | None:
    """What a user says about a pair's contract: a mapping as it is, or the YAML file of one; raises a SidecarError."""
    if told is None:
        return None
    if isinstance(told, Mapping):
        return dict(told)
    if not isinstance(told, (str, os.PathLike)):
        raise InputError("sidecar= is a mapping, or the path of a YAML file.", got=type(told).__name__)
    path = Path(told).expanduser()
    if not path.is_file():
        raise SidecarError(
            "There is no such file.",
            where=path,
            expected="a YAML file with the keys of nla_meta.yaml",
            next_step="check the path; docs/sidecar.md lists the keys",
        )
    return yaml_io.read(path, error=SidecarError)


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


def open_half(
    ref: Ref,
    role: Role,
    *,
    library: Library,
    load_options: LoadOptions,
    base: Ref | None = None,
    beside: Half | None = None,
    told: Mapping[str, Any] | None = None,
) -> Half:
    """Find and verify one half; its weights stay where they are (see `Half.with_weights`).

    Args:
        base: the pair's base model, where it is known by now.
        beside: the other half: its checkpoint may hold this one too, and its sidecar or tokenizer serve both.
        told: what the user says about the contract; it wins over the sidecar.

    Raises:
        CheckpointError and its children, HubError and its children.
    """
    checkpoint = library.open(ref)
    require_published(checkpoint)
    place = layouts.find(
        checkpoint.files,
        role,
        subfolder=ref.subfolder or None,
        beside=beside.place if beside and beside.checkpoint is checkpoint else None,
        where=ref,
    )
    root = checkpoint.fetch(layouts.files_of(checkpoint.files, place, weights=False))
    directory = root / place.folder
    _refuse_linked_folders(directory)
    raw = _contract(root, place, role, ref, beside, told)
    files = HalfFiles(directory, place.form)
    under = None
    if place.form != "model":
        under = _under(directory, place, checkpoint, raw, base, library, told)
        meta = _mapping(raw.get(AR_META_KEY))
        files = HalfFiles(directory, place.form, under.fetch(weights=False), (directory,), meta)
    config = load_config(files.model_directory, trust_remote_code=load_options.trust_remote_code)
    adapter = adapter_for(config)
    tokenizer = _tokenizer(root, place, files, beside, load_options)
    sidecar = _sidecar(raw, role, place, files, config, tokenizer, root)
    if sidecar.role != role:
        raise SidecarError(
            f"This is the {sidecar.role.upper()} half where the {role.upper()} is expected.",
            where=ref,
            next_step=layouts.WRONG_HALF,
        )
    if place.form == "ar_lora" and sidecar.ar_special_tokens and getattr(tokenizer, "bos_token_id", None) is not None:
        logger.warning(
            "%s: this AR's prompt begins with the tokenizer's BOS, which EasyNLA's own code leaves out; where it was trained "
            'so, pass sidecar={"ar_special_tokens": False}',
            directory,
        )
    return Half(role, checkpoint, place, files, sidecar, config, adapter, tokenizer, under)


def _refuse_linked_folders(directory: Path) -> None:
    """Raise a WeightsError for a link to a folder elsewhere: transformers looks into some by name."""
    with os.scandir(directory) as entries:
        for name in [entry.name for entry in entries if entry.is_symlink()]:
            if os.path.isdir(directory / name):
                inside(directory, name)


AR_META_KEY = "ar_meta"
"""Key of a sidecar that stands in for a missing `ar_meta.json`."""


# -- the contract --------------------------------------------------------------------------------------------


def _contract(
    root: Path, place: Place, role: Role, ref: Ref, beside: Half | None, told: Mapping[str, Any] | None
) -> dict[str, Any]:
    """The mapping that the half's sidecar is parsed from: the file, what is known of the repository, what the user says."""
    raw: dict[str, Any] = {}
    if place.sidecar is not None:
        raw = yaml_io.read(root / place.sidecar, error=SidecarError)
    elif beside is not None:
        raw = {k: v for k, v in beside.sidecar.to_mapping().items() if k not in _OF_ONE_HALF}
        raw = _spoken_for(raw, role, beside.role)
    if raw and not place.own_sidecar and place.sidecar is not None:
        raw = _spoken_for(raw, role, named_role(raw))
    known = known_sidecar(ref, role)
    for more in (known, told):
        if more:
            raw = merge(raw, more)
    if not raw:
        raise SidecarError(
            f"This directory has no {SIDECAR_NAME}, so nothing says which layer, marker and prompts it was made for.",
            where=root / place.folder,
            next_step="name a directory or repository of an NLA half (an AV or an AR), or say what its author says: "
            'sidecar={"extraction_layer_index": ..., "prompt_templates": {"av": ..., "ar": ...}, "tokens": '
            '{"injection_char": ...}, "extraction": {"injection_scale": ...}}',
        )
    return raw


def _spoken_for(raw: Mapping[str, Any], role: Role, written_for: Role | None) -> dict[str, Any]:
    """A contract that lies above both halves, or beside the other one, read as this half's.

    How vectors enter is not an AR's business: what its sidecar has there (null) says nothing about the AV.
    """
    spoken = {**{k: v for k, v in raw.items() if k != "integrity"}, "role": role}
    if role == "av" and written_for == "ar":
        spoken.pop("injection", None)
        extraction = _mapping(raw.get("extraction"))
        if extraction.get("injection_scale") is None:
            spoken["extraction"] = {k: v for k, v in extraction.items() if k != "injection_scale"}
    return spoken


_OF_ONE_HALF = ("role", "stage", "pair_repo", "adapter_stack", "integrity", "source_revision", "release")


def _sidecar(
    raw: Mapping[str, Any], role: Role, place: Place, files: HalfFiles, config: Any, tokenizer: Any, root: Path
) -> Sidecar:
    """The half's sidecar, with what its files say where it is silent."""
    text = config.get_text_config()
    meta = lora.read_ar_meta(files.directory, _mapping(raw.get(AR_META_KEY)))
    blocks = int(text.num_hidden_layers) if place.form == "model" else meta.get("ar_num_layers")
    stripped = meta.get("final_norm_stripped")
    hints = Hints(
        d_model=int(text.hidden_size),
        layer=blocks - 1 if role == "ar" and isinstance(blocks, int) else None,
        final_norm_stripped=stripped if isinstance(stripped, bool) else None,
        # EasyNLA reads head(h * mse_scale / ||h||) (its nla/utils/critic.py).
        head_input="normalized" if place.form == "ar_lora" else None,
        measure=lambda char, template: measure_marker(tokenizer, char, template),
    )
    where = root / (place.sidecar or place.folder)
    sidecar = Sidecar.parse(raw, where=where, role=role, hints=hints)
    sidecar.warn_if_edited(raw, where)
    return sidecar


def _mapping(value: object) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _tokenizer(root: Path, place: Place, files: HalfFiles, beside: Half | None, options: LoadOptions) -> Any:
    """The nearest tokenizer: the folder's own, one above it, the base's, the other half's."""
    above = [root / str(p) for p in PurePosixPath(place.folder).parents] if place.folder else []
    for directory in (files.directory, *above, *([files.base] if files.base else [])):
        if has_tokenizer(directory):
            return load_tokenizer(directory, trust_remote_code=options.trust_remote_code)
    if beside is not None:
        return beside.tokenizer
    return load_tokenizer(files.directory, trust_remote_code=options.trust_remote_code)


# -- what a LoRA stands on -----------------------------------------------------------------------------------


def _under(
    directory: Path,
    place: Place,
    checkpoint: Checkpoint,
    raw: Mapping[str, Any],
    base: Ref | None,
    library: Library,
    told: Mapping[str, Any] | None,
) -> Under:
    """What a LoRA lies on: a folder of its own checkpoint, the pair's base, or what adapter and sidecar call it.

    Raises:
        CheckpointError: nothing says it, or adapter and sidecar name two.
    """
    stack = raw.get("adapter_stack")
    if isinstance(stack, list) and place.folder in stack:
        first = next((p for p in layouts.places(checkpoint.files) if p.folder == str(stack[0]).strip("/")), None)
        if first is not None and first.form == "model":
            return Under(checkpoint, first.folder)
    if isinstance(own := _mapping(told).get(ADAPTER_BASE_KEY), str):
        found = named_part(own, "base")
    else:
        found = hub_name(raw.get(ADAPTER_BASE_KEY)) or base
    spelled = [raw.get("base_checkpoint"), raw.get("base_model"), _mapping(raw.get("extraction")).get("base_model")]
    names = [lora.adapter_base(directory), *(name for name in spelled if isinstance(name, str))]
    if found is None:
        known = [ref for name in names if name and (ref := hub_name(name))]
        if len({base_family(ref.name) for ref in known}) > 1:
            raise CheckpointError(
                "Adapter and sidecar name two base models.",
                where=directory,
                got=" and ".join(dict.fromkeys(map(str, known))),
                next_step=f'pass base_model="owner/name" where both mean one, or sidecar={{"{ADAPTER_BASE_KEY}": '
                '"owner/name"} where the adapter lies on another model than the source',
            )
        found = next(iter(known), None)
    if found is None:
        raise CheckpointError(
            "This is a LoRA adapter, and nothing says where its base model is."
            if not any(names)
            else f"This is a LoRA adapter; its author called the base model {next(n for n in names if n)!r}, "
            "which is not a Hub name.",
            where=directory,
            next_step='pass base_model="owner/name" or base_model="./path"',
        )
    return Under(library.open(found), found.subfolder)


ADAPTER_BASE_KEY = "adapter_base"
"""Key of a sidecar: the model that a LoRA lies on, where that is not the source."""
