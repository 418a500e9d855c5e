"""Checkpoints by name -> halves of which everything but the weights is known and verified.

A `Half` has its files found, its sidecar read in whatever dialect, its configuration and tokenizer held against it.
`loading.py` turns halves into modules.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import Any

from nla_hub import hub, layouts, lora, yaml_io
from nla_hub.adapters import Adapter, adapter_for
from nla_hub.errors import CheckpointError, InputError, SidecarError
from nla_hub.hub import HubOptions
from nla_hub.layouts import HalfFiles, Place
from nla_hub.locate import Ref, parse_name
from nla_hub.log import logger
from nla_hub.lora_stages import relation
from nla_hub.pretrained import LoadOptions, has_tokenizer, load_config, load_tokenizer
from nla_hub.prompts import measure_marker
from nla_hub.sidecar import SIDECAR_NAME, Hints, Role, Sidecar, merge, named_role
from nla_hub.weights import inside
from nla_hub.zoo import known_sidecar


@dataclass
class Checkpoint:
    """A directory or repository whose file names are known; its files are fetched when they are needed."""

    ref: Ref
    options: HubOptions
    files: tuple[str, ...]
    sizes: Mapping[str, int] = field(default_factory=dict)
    commit: str | None = None
    _root: Path | None = None

    @classmethod
    def open(cls, ref: Ref, options: HubOptions) -> Checkpoint:
        """The names of a checkpoint's files.

        Raises:
            CheckpointError: no such directory. HubError and its children: see `hub.listing`.
        """
        if ref.kind == "hub":
            listing = hub.listing(ref.name, revision=ref.revision, options=options)
            return cls(ref, options, tuple(listing.files), listing.files, listing.commit)
        root = ref.fetch(options)
        # A downloaded snapshot lies in a directory named after its commit.
        commit = root.name if root.parent.name == "snapshots" else None
        return cls(ref, options, tuple(layouts.files_below(root)), {}, commit, root)

    def fetch(self, names: Sequence[str]) -> Path:
        """Have these files on disk; the local directory that they are in, under their names."""
        if self.ref.kind != "hub":
            assert self._root is not None
            for name in names:
                path = self._root / name
                if path.is_symlink():
                    inside(path.parent, path.name)
            return self._root
        return hub.fetch_files(
            self.ref.name, list(names), revision=self.ref.revision, commit=self.commit, options=self.options
        )

    def fetch_model(self, folder: str = "") -> Path:
        """Have a complete model on disk; its directory."""
        place = Place(folder, "model", None, None, False)
        return self.fetch(layouts.files_of(self.files, place)) / folder


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
        raise SidecarError("There is no such file.", where=path, expected="a YAML file with the keys of nla_meta.yaml")
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
    hub_options: HubOptions,
    load_options: LoadOptions,
    base: Ref | None = None,
    beside: Half | None = None,
    told: Mapping[str, Any] | None = None,
    weights: bool = True,
) -> Half:
    """Find and verify one half.

    Args:
        base: the pair's base model, where it is known by now.
        beside: the other half: its checkpoint may hold this one too, and its sidecar or tokenizer serve both.
        told: what the user says about the contract; it wins over the sidecar.
        weights: whether the weights are wanted too, or only what is said about them.

    Raises:
        CheckpointError and its children, HubError and its children.
    """
    if beside is not None and replace(ref, subfolder="") == replace(beside.checkpoint.ref, subfolder=""):
        checkpoint = beside.checkpoint
    else:
        checkpoint = Checkpoint.open(ref, hub_options)
    place = layouts.find(
        checkpoint.files,
        role,
        subfolder=ref.subfolder or None,
        beside=beside.place if beside and beside.checkpoint is checkpoint else None,
        where=ref,
    )
    root = checkpoint.fetch(layouts.files_of(checkpoint.files, place, weights=weights))
    directory = root / place.folder
    raw = _contract(root, place, role, ref, beside, told)
    files = HalfFiles(directory, place.form)
    under = None
    if place.form != "model":
        under = _under(directory, checkpoint, place, raw, base)
        files = HalfFiles(directory, place.form, under.fetch(weights=weights), (directory,))
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
    if place.form != "model":
        told_meta = sidecar.extra.get(AR_META_KEY)
        told_meta = told_meta if isinstance(told_meta, Mapping) else {}
        files = HalfFiles(directory, place.form, files.base, files.stack, told_meta)
        if role == "av" and weights:
            files = _stacked(files, checkpoint, place, sidecar, adapter)
    return Half(role, checkpoint, place, files, sidecar, config, adapter, tokenizer, under)


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
    spoken = {**raw, "role": role}
    if role == "av" and written_for == "ar":
        spoken.pop("injection", None)
        extraction = _mapping(raw.get("extraction"))
        if extraction.get("injection_scale") is None:
            spoken["extraction"] = {k: v for k, v in extraction.items() if k != "injection_scale"}
    return spoken


_OF_ONE_HALF = ("role", "stage", "pair_repo", "adapter_stack", "integrity", "source_revision")


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


@dataclass(frozen=True)
class Under:
    """The complete model that a LoRA lies on: a folder of a checkpoint."""

    checkpoint: Checkpoint
    folder: str

    def fetch(self, *, weights: bool) -> Path:
        """Have it on disk; its directory."""
        place = Place(self.folder, "model", None, None, False)
        return self.checkpoint.fetch(layouts.files_of(self.checkpoint.files, place, weights=weights)) / self.folder


def _under(directory: Path, checkpoint: Checkpoint, place: Place, raw: Mapping[str, Any], base: Ref | None) -> Under:
    """What a LoRA lies on: a folder of its own checkpoint, the pair's base, or what adapter and sidecar call it."""
    stack = raw.get("adapter_stack")
    if isinstance(stack, list) and place.folder in stack:
        first = next((p for p in layouts.places(checkpoint.files) if p.folder == str(stack[0]).strip("/")), None)
        if first is not None and first.form == "model":
            return Under(checkpoint, first.folder)
    spelled = [raw.get("base_checkpoint"), raw.get("base_model"), _mapping(raw.get("extraction")).get("base_model")]
    names = [lora.adapter_base(directory), *(name for name in spelled if isinstance(name, str))]
    found = base or next((ref for name in names if name and (ref := hub_name(name))), None)
    if found is None:
        raise CheckpointError(
            "This is a LoRA adapter, and nothing says where its base model is."
            if not any(names)
            else f"This is a LoRA adapter; its author called the base model {next(n for n in names if n)!r}, "
            "which is not a Hub name.",
            where=directory,
            next_step='pass base_model="owner/name" or base_model="./path"',
        )
    return Under(Checkpoint.open(found, checkpoint.options), found.subfolder)


def _stacked(files: HalfFiles, checkpoint: Checkpoint, place: Place, sidecar: Sidecar, adapter: Adapter) -> HalfFiles:
    """The LoRAs that act together with this one: those that the sidecar lists, or the stage it was begun on top of."""
    everything = {p.folder: p for p in layouts.places(checkpoint.files)}
    if sidecar.adapter_stack is not None:
        folders = [name.strip("/") for name in sidecar.adapter_stack]
        faults = [f"there is no LoRA in {f!r}" for f in folders if f not in everything]
        loras = [f for f in folders if f in everything and everything[f].form == "lora"]
        if place.folder not in loras:
            faults.append(f"the AV's own folder {place.folder!r} is not among {', '.join(folders)}")
        if faults:
            raise SidecarError(
                "The sidecar's adapter_stack does not fit the checkpoint.", where=checkpoint.ref, faults=faults
            )
    else:
        earlier = _earlier_stage(place, everything)
        if earlier is None:
            return files
        root = checkpoint.fetch(layouts.files_of(checkpoint.files, earlier))
        verdict, cosine = relation(
            lora.read_lora(root / earlier.folder, adapter), lora.read_lora(files.directory, adapter)
        )
        if verdict == "unclear":
            raise CheckpointError(
                f"It is not clear whether {place.folder} replaces {earlier.folder} or acts on top of it.",
                where=checkpoint.ref,
                got=f"their A factors have a median cosine of {cosine:.2f}",
                next_step=f'ask its author, then pass sidecar={{"adapter_stack": ["{place.folder}"]}} or '
                f'["{earlier.folder}", "{place.folder}"]',
            )
        loras = [place.folder] if verdict == "continues" else [earlier.folder, place.folder]
        logger.info(
            "%s: %s %s %s (their A factors are %s)",
            checkpoint.ref,
            place.folder,
            "replaces" if verdict == "continues" else "acts on top of",
            earlier.folder,
            "not of one shape" if cosine is None else f"at a median cosine of {cosine:.2f}",
        )
    root = checkpoint.fetch([f for name in loras for f in layouts.files_of(checkpoint.files, everything[name])])
    return HalfFiles(files.directory, files.form, files.base, tuple(root / name for name in loras), files.told)


def _earlier_stage(place: Place, everything: Mapping[str, Place]) -> Place | None:
    """The supervised AV LoRA beside one of reinforcement learning; None where there is none, or several."""
    if layouts.stage_of(place.folder) != "rl":
        return None
    parent = place.folder.rpartition("/")[0]
    found = [
        p
        for p in everything.values()
        if p.form == "lora"
        and p.role == "av"
        and p.folder.rpartition("/")[0] == parent
        and layouts.stage_of(p.folder) == "sft"
    ]
    return found[0] if len(found) == 1 else None
