"""Where the halves of a pair lie in a checkpoint, from its file names alone; nothing is opened here.

A checkpoint is a directory or a Hub repository. Its halves are folders of three forms: a complete model, a LoRA adapter in
PEFT's form, or the AR form of EasyNLA (`ar_lora_value_head.safetensors` with `ar_meta.json`). A merged AR may still carry an
`ar_meta.json`: only the weight file says that it is a LoRA.
"""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from nla_hub.errors import CheckpointError, SidecarError
from nla_hub.sidecar import SIDECAR_NAME, Role
from nla_hub.weights import ADAPTER_CONFIG_NAME, HEAD_NAME, INDEX_NAME, PICKLED, WEIGHTS_NAME

AR_LORA_NAME = "ar_lora_value_head.safetensors"
AR_META_NAME = "ar_meta.json"
ADAPTER_WEIGHTS_NAME = "adapter_model.safetensors"

Form = Literal["model", "lora", "ar_lora"]

FORM_WORDS: dict[Form, str] = {
    "model": "a complete model",
    "lora": "a LoRA adapter",
    "ar_lora": "a LoRA adapter with a value head",
}

MAX_DEPTH = 4
"""Folders below the root that are looked into; the deepest seen is three (`rl_vllm/iter_000400/critic`)."""

WRONG_HALF = "name the AV first and the other half as ar=..."
"""What to do about a half in the other one's place."""

_NO_HALF = re.compile(r"(^|[_-])(source|base|reference|optim\w*|tmp|old)($|[_.-])|\.(tmp|old)$")
_ROLE_WORDS: dict[Role, re.Pattern[str]] = {
    "av": re.compile(r"(^|[_.-])(av|actor|verbali[sz]er)($|[_.-])"),
    "ar": re.compile(r"(^|[_.-])(ar|critic|reconstructor)($|[_.-])"),
}


@dataclass(frozen=True)
class Place:
    """A folder of a checkpoint that may be a half.

    Attributes:
        folder: its path below the root, "" for the root itself, with "/" between parts.
        form: what kind of weights it holds.
        role: what its file names prove ("ar" where there is a value head); None where only a sidecar can tell.
        sidecar: path of the sidecar that speaks for it, its own or the nearest above; None where there is none.
        own_sidecar: whether that sidecar lies in the folder itself.
    """

    folder: str
    form: Form
    role: Role | None
    sidecar: str | None
    own_sidecar: bool

    def path(self, name: str) -> str:
        """Path of one of its files below the root."""
        return f"{self.folder}/{name}" if self.folder else name

    def __str__(self) -> str:
        return f"{self.folder or '.'} ({FORM_WORDS[self.form]})"


def files_below(root: Path) -> list[str]:
    """Paths of the files of a local directory, relative and with "/", at most `MAX_DEPTH` folders deep.

    Links to folders are not followed: nothing outside the directory is looked at.
    """
    found: list[str] = []

    def walk(directory: Path, prefix: str, depth: int) -> None:
        try:
            entries = sorted(os.scandir(directory), key=lambda entry: entry.name)
        except OSError as cause:
            raise CheckpointError(f"This directory cannot be read: {cause.strerror}.", where=directory) from cause
        for entry in entries:
            if entry.name.startswith("."):
                continue
            if entry.is_dir(follow_symlinks=False):
                if depth < MAX_DEPTH:
                    walk(Path(entry.path), f"{prefix}{entry.name}/", depth + 1)
            else:
                found.append(f"{prefix}{entry.name}")

    walk(root, "", 0)
    return found


def places(files: Collection[str]) -> list[Place]:
    """The folders that may be halves, the root first, then by name."""
    names: dict[str, set[str]] = {}
    for file in files:
        folder, _, name = file.rpartition("/")
        if folder.count("/") < MAX_DEPTH:
            names.setdefault(folder, set()).add(name)
    found = []
    for folder in sorted(names):
        inside = names[folder]
        form, role = _form(inside)
        if form is None:
            continue
        sidecar = next(
            (
                f"{up}/{SIDECAR_NAME}" if up else SIDECAR_NAME
                for up in _upwards(folder)
                if SIDECAR_NAME in names.get(up, ())
            ),
            None,
        )
        found.append(Place(folder, form, role, sidecar, SIDECAR_NAME in inside))
    return found


def files_of(files: Collection[str], place: Place, *, weights: bool = True) -> list[str]:
    """The files that a half needs: those of its folder, its sidecar, and tokenizers above it; no pickles, no code.

    Of weights only those that transformers would load: some repositories hold a second copy under another name.
    """
    found = []
    for file in files:
        folder, _, name = file.rpartition("/")
        is_weights = name.endswith(".safetensors")
        if folder == place.folder:
            wanted = _is_text(name) or (weights and is_weights and _is_loaded(name))
        else:
            wanted = file == place.sidecar or (folder in tuple(_upwards(place.folder)) and _is_tokenizer(name))
        if wanted:
            found.append(file)
    return found


def _is_text(name: str) -> bool:
    return name.endswith((".json", ".yaml", ".jinja", ".model", ".txt")) or name.startswith(("LICENSE", "NOTICE"))


def _is_loaded(name: str) -> bool:
    return name in (WEIGHTS_NAME, HEAD_NAME, AR_LORA_NAME, ADAPTER_WEIGHTS_NAME) or bool(
        re.fullmatch(r"model-[\w-]+\.safetensors", name)
    )


def _is_tokenizer(name: str) -> bool:
    return name.startswith(("tokenizer", "special_tokens_map", "vocab", "merges", "added_tokens", "chat_template"))


def _form(names: set[str]) -> tuple[Form | None, Role | None]:
    if AR_LORA_NAME in names and ADAPTER_CONFIG_NAME not in names:
        return "ar_lora", "ar"
    if ADAPTER_CONFIG_NAME in names:
        return "lora", "ar" if names & {HEAD_NAME, AR_LORA_NAME} else "av"
    weights = names & {WEIGHTS_NAME, INDEX_NAME} or any(n.endswith(PICKLED) and "model" in n for n in names)
    if weights or {"config.json", SIDECAR_NAME} <= names:
        head = any(name.startswith("value_head.") for name in names)  # in whatever form: loading says what is wrong
        return "model", "ar" if head else None
    return None, None


def _upwards(folder: str) -> Iterator[str]:
    """`folder` and all folders above it, the root ("") last."""
    if folder:
        path = PurePosixPath(folder)
        yield from (str(p) for p in (path, *path.parents) if str(p) != ".")
    yield ""


def find(
    files: Collection[str],
    role: Role,
    *,
    subfolder: str | None = None,
    beside: Place | None = None,
    where: object = None,
) -> Place:
    """The place of the half `role` in a checkpoint.

    Args:
        subfolder: folder that the user named; the half is it or lies in it.
        beside: the other half, where that lies in the same checkpoint: of several candidates the nearest is its partner.

    Raises:
        CheckpointError: none, or several that nothing tells apart; they are listed.
    """
    below = None if subfolder is None else subfolder.strip("/")
    everything = places(files)
    here = [
        p for p in everything if below is None or p.folder == below or p.folder.startswith(f"{below}/") or below == ""
    ]
    fitting = [p for p in here if p.role in (role, None) and p != beside and _may_be(p, role, below)]
    near = _nearest(fitting, beside) if beside is not None and not below else []
    for certain in (near, _named_exactly(fitting, role, below or ""), fitting):
        if len(certain) == 1:
            return certain[0]
    other = "subfolder" if role == "av" else "ar_subfolder"
    named = next((p for p in here if p.folder == (below or "")), None)
    if not fitting and named is not None:
        raise SidecarError(
            f"This is the {'AR' if role == 'av' else 'AV'} half where the {role.upper()} is expected.",
            where=where,
            next_step=WRONG_HALF,
        )
    if not fitting:
        raise CheckpointError(
            f"No {role.upper()} was found here."
            if below is None
            else f"No {role.upper()} was found in the folder {below!r}.",
            where=where,
            faults=[f"there is {p}" for p in everything[:8]],
            expected="config.json with model.safetensors"
            + (f" and {HEAD_NAME}, or {AR_LORA_NAME}" if role == "ar" else ", or adapter_config.json"),
            next_step=f'name the folder of the {role.upper()}: {other}="..."'
            if everything
            else "name a directory or repository that holds an NLA",
        )
    raise CheckpointError(
        f"Several folders may be the {role.upper()}.",
        where=where,
        faults=[str(p) for p in fitting],
        next_step=f'name one: {other}="{fitting[-1].folder or "."}"',
    )


def _may_be(place: Place, role: Role, asked: str | None) -> bool:
    """Whether a folder's own name speaks against it: another role's word, or a word of no half at all."""
    if asked is not None and place.folder == asked:
        return True
    last = place.folder.rpartition("/")[2].lower()
    if not last:
        return True
    other: Role = "ar" if role == "av" else "av"
    if _NO_HALF.search(last) and not _ROLE_WORDS[role].search(last):
        return False
    return place.role == role or not _ROLE_WORDS[other].search(last)


def _named_exactly(fitting: Sequence[Place], role: Role, top: str) -> list[Place]:
    """The place that needs no search: the named folder itself where its files fit, else its `av` or `ar`."""
    own = [p for p in fitting if p.folder == top]
    named = [p for p in fitting if p.folder == (f"{top}/{role}" if top else role)]
    proven = [p for p in fitting if p.role == role and p not in own]
    if own and (own[0].role == role or not proven):
        return own
    return named


def _nearest(fitting: Sequence[Place], beside: Place) -> list[Place]:
    """The candidates of the same run: inside the other half, beside it, of the same step, of the same stage."""
    parent = beside.folder.rpartition("/")[0]
    rules = (
        lambda p: bool(beside.folder) and p.folder.startswith(f"{beside.folder}/"),
        lambda p: _step(p.folder) is not None and _step(p.folder) == _step(beside.folder),
        lambda p: stage_of(p.folder) is not None and stage_of(p.folder) == stage_of(beside.folder),
        lambda p: p.folder.rpartition("/")[0] == parent,
    )
    for rule in rules:
        if chosen := [p for p in fitting if rule(p)]:
            if len(chosen) == 1:
                return chosen
            fitting = chosen
    return []


def _step(folder: str) -> int | None:
    found = re.findall(r"(?:iter|step)_?(\d+)", folder.lower())
    return int(found[-1]) if found else None


def names_role(name: str, role: Role) -> bool:
    """Whether a folder's name has a word for a half."""
    return bool(_ROLE_WORDS[role].search(name.lower()))


def stage_of(folder: str) -> str | None:
    """The training stage that a folder's name tells: "sft" or "rl"."""
    found = re.findall(r"(?:^|[_/.-])(sft|rl|warmstart)(?=$|[_/.-])", folder.lower())
    return str(found[-1]).replace("warmstart", "sft") if found else None


@dataclass(frozen=True)
class HalfFiles:
    """One half on disk, ready to be loaded.

    Attributes:
        directory: the folder with its own weights.
        form: what kind of weights these are.
        base: the complete model under a LoRA; None for a complete model.
        stack: LoRA folders that act together, in order; the last is `directory`. Empty for a complete model.
        told: what the sidecar says in place of a missing `ar_meta.json`.
    """

    directory: Path
    form: Form = "model"
    base: Path | None = None
    stack: tuple[Path, ...] = ()
    told: Mapping[str, Any] = field(default_factory=dict)

    @property
    def model_directory(self) -> Path:
        """Where config.json of the half's architecture is: its own folder, or its base's."""
        return self.directory if self.base is None else self.base
