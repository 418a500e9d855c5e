"""A pair in any layout and dialect -> the canonical one: two complete directories with canonical sidecars.

Values are kept: each half is written in the widest dtype that its weights are stored in. Only LoRAs are changed, by being
merged into their base (in float32, rounded once to the dtype written).
"""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import torch

from nla_hub.checkpoints import HeadFile, load_ar, load_av
from nla_hub.errors import CheckpointError, HubError, RunError
from nla_hub.export import save_ar, save_av
from nla_hub.hub import HubOptions
from nla_hub.loading import Pair, ar_prompt
from nla_hub.log import logger
from nla_hub.lora import read_ar_meta
from nla_hub.opening import ADAPTER_BASE_KEY, AR_META_KEY, Half
from nla_hub.pretrained import TORCH_DTYPES, LoadOptions
from nla_hub.prompts import AVPrompt
from nla_hub.sidecar import Role, Sidecar
from nla_hub.weights import REFERENCE_NAME, WeightIndex, inside, matches

PAPER = re.compile(
    r"(?:licen[cs]e|notice|use_policy|copying)[^/]*|readme\.md|fve_reference\.safetensors", re.IGNORECASE
)
"""What is copied beside weights, tokenizer and sidecar: licences, what the author wrote, the mean vector of FVE."""

MAX_PAPER = 2**20
"""Bytes up to which a paper is fetched from the Hub."""


@dataclass(frozen=True)
class Converted:
    """One half that was written.

    Attributes:
        role, directory: which, and where.
        came_from: folder and form it was found in.
        dtype: what its weights are stored in now.
        merged: LoRAs that were merged into their base.
    """

    role: Role
    directory: Path
    came_from: str
    dtype: str
    merged: int


def convert(pair: Pair, destination: Path, *, dtype: str | None = None) -> list[Converted]:
    """Write the opened halves of a pair as `destination`/av and `destination`/ar.

    Everything is written into a hidden directory `.NAME.*` (beside the destination, or inside one that exists and is empty)
    and moved to its place when it is complete. A run that fails leaves nothing behind; one that is killed outright leaves
    that directory, which may be deleted.

    Args:
        pair: from `loading.open_pair`; halves without weights on disk are left out.
        dtype: "float32", "bfloat16" or "float16"; None is the widest that each half is stored in.

    Raises:
        RunError: the destination is in use, cannot be written to, or lies inside the pair.
        CheckpointError and its children: the pair cannot be believed.
    """
    place = check_destination(destination)
    _require_apart(pair, place)
    halves = [half for half in (pair.av, pair.ar) if half is not None and half.role in pair.wanted]
    for half in halves:
        if half.role == "av":
            AVPrompt.build(half.tokenizer, half.sidecar)
        else:
            ar_prompt(half)
    try:
        with _draft(place) as draft:
            papers = {half.role: _papers(half, pair) for half in halves}
            done = [_write(half, draft / half.role, dtype, papers[half.role]) for half in halves]
    except OSError as cause:
        raise RunError(
            f"Nothing was converted: {cause.strerror or cause}.",
            where=cause.filename or destination,
            next_step="check permissions and the space left on the disk, or name another destination",
        ) from cause
    return [Converted(c.role, destination / c.role, c.came_from, c.dtype, c.merged) for c in done]


# -- where to ------------------------------------------------------------------------------------------------


def check_destination(destination: Path) -> Path:
    """Where a destination really is, held to be new, or a directory that is empty; nothing is created.

    Raises:
        RunError: something is there already, a link that leads nowhere, or no directory could be made there.
    """

    def refused(what: str, next_step: str, got: object = None) -> RunError:
        return RunError(what, where=destination, got=got, next_step=next_step)

    another = "name another directory"
    try:
        place = destination.resolve()
        if destination.is_symlink() and not place.exists():
            raise refused("The destination is a link that leads nowhere.", f"remove it, or {another}", got=place)
        if place.is_dir():
            if entries := sorted(entry.name for entry in os.scandir(place)):
                raise refused(
                    "The destination exists and is not empty.",
                    "name a new directory, or remove it",
                    got=", ".join(entries[:3]),
                )
        elif place.exists():
            raise refused("The destination exists and is a file.", another)
        above = next(folder for folder in (place, *place.parents) if folder.exists())
        if not above.is_dir():
            raise refused("The destination lies below a file.", another, got=above)
        if not os.access(above, os.W_OK | os.X_OK):
            raise refused("The destination cannot be written to.", f"{another}, or change its permissions", got=above)
    except (OSError, RuntimeError, ValueError) as cause:  # links in a circle, names too long, no access
        raise refused(
            f"The destination cannot be used: {getattr(cause, 'strerror', None) or cause}.", another
        ) from cause
    return place


def _require_apart(pair: Pair, place: Path) -> None:
    """Raise a RunError where the destination lies inside the pair that is read, or the pair inside the destination."""
    roots = {_source_directory(pair)}
    for half in (pair.av, pair.ar):
        for checkpoint in (half.checkpoint, half.under.checkpoint if half.under else None) if half else ():
            if checkpoint is not None and checkpoint.ref.is_local:
                roots.add(checkpoint.ref.fetch(HubOptions()).resolve())
    if pair.base is not None and pair.base.is_local:
        roots.add(pair.base.fetch(HubOptions()).resolve())
    for root in sorted(root for root in roots if root is not None):
        inner, outer = ("source", "destination") if root.is_relative_to(place) else ("destination", "source")
        if root.is_relative_to(place) or place.is_relative_to(root):
            raise RunError(
                f"The {inner} lies inside the {outer}: a pair found there later could be either of the two.",
                where=place,
                got=f"source {root}",
                next_step="name a directory that is neither inside the source nor around it",
            )


def _source_directory(pair: Pair) -> Path | None:
    """The directory that the user named; its halves may be checkpoints of their own below it."""
    first = pair.av or pair.ar
    if first is None or first.checkpoint.ref.kind != "directory" or not Path(pair.name).is_dir():
        return None
    return Path(pair.name).resolve()


@contextmanager
def _draft(place: Path) -> Iterator[Path]:
    """A directory to write into, that becomes `place` when the block ends well; otherwise nothing stays of it."""
    existed = place.is_dir()
    missing = [folder for folder in place.parents if not folder.exists()]
    whole: Path | None = None
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        # Inside a directory that exists: it may be a mount, the current directory, or all that may be written to.
        whole = Path(tempfile.mkdtemp(prefix=f".{place.name}.", dir=place if existed else place.parent))
        draft = whole / "draft"
        draft.mkdir()  # unlike `whole` with the permissions that the umask gives
        yield draft
        if existed:
            _move_into(place, sorted(draft.iterdir()))
        else:
            os.replace(draft, place)
    except BaseException:
        if whole is not None:
            shutil.rmtree(whole, ignore_errors=True)
        for folder in missing:
            with suppress(OSError):
                folder.rmdir()
        raise
    shutil.rmtree(whole, ignore_errors=True)


def _move_into(place: Path, parts: Sequence[Path]) -> None:
    moved: list[Path] = []
    try:
        for part in parts:
            os.replace(part, place / part.name)
            moved.append(place / part.name)
    except BaseException:
        for path in moved:
            shutil.rmtree(path, ignore_errors=True)
        raise


# -- what ----------------------------------------------------------------------------------------------------


def _write(half: Half, directory: Path, dtype: str | None, papers: Sequence[Path]) -> Converted:
    files = half.files
    chosen = LoadOptions(dtype=dtype).torch_dtype() if dtype else _widest(half)
    options = LoadOptions(dtype=chosen, device_map={"": "cpu"})
    sidecar = _canonical(half)
    if half.role == "av":
        save_av(directory, load_av(files, options).model, half.tokenizer, sidecar, dtype=chosen)
    else:
        loaded, head = load_ar(files, half.sidecar, options)
        stored = HeadFile.find(files.directory).dtype
        save_ar(directory, loaded.model, head, half.tokenizer, sidecar, dtype=chosen, head_dtype=stored)
    for paper in (paper for paper in papers if half.role == "ar" or paper.name != REFERENCE_NAME):
        shutil.copyfile(paper, directory / paper.name)
    name = str(chosen).removeprefix("torch.")
    if files.stack:
        logger.info(
            "%s: %d LoRA%s merged into %s, written in %s",
            half.place,
            len(files.stack),
            "s" if len(files.stack) > 1 else "",
            files.base,
            name,
        )
    return Converted(half.role, directory, str(half.place), name, len(files.stack))


def _papers(half: Half, pair: Pair) -> list[Path]:
    """Licences and notes that speak for a half: of its own folder, else of the nearest one above up to the checkpoint."""
    checkpoint = half.checkpoint
    folders = [str(p) for p in (PurePosixPath(half.place.folder), *PurePosixPath(half.place.folder).parents)]
    found: dict[str, str] = {}  # name -> path in the checkpoint
    for folder in dict.fromkeys(folders):
        for file in checkpoint.files:
            path = PurePosixPath(file)
            if str(path.parent) == folder and PAPER.fullmatch(path.name):
                found.setdefault(path.name.lower(), file)
    if checkpoint.ref.kind == "hub":
        return _fetched(half, list(found.values()))
    root = checkpoint.ref.fetch(HubOptions())
    named = {name: root / file for name, file in found.items()}
    top = _source_directory(pair)
    if top is None or not root.resolve().is_relative_to(top):
        top = root.resolve()
    for folder_above in root.resolve().parents:
        if not folder_above.is_relative_to(top):
            break
        for one in sorted(folder_above.iterdir()):
            if PAPER.fullmatch(one.name) and one.is_file():
                named.setdefault(one.name.lower(), one)
    for paper in named.values():
        if not Path(os.path.realpath(paper)).is_relative_to(top):
            inside(paper.parent, paper.name)  # says where it leads, or that it leads nowhere
    return list(named.values())


def _fetched(half: Half, names: list[str]) -> list[Path]:
    """The papers of a repository, as far as they are small and can be had."""
    checkpoint = half.checkpoint
    for name in (large := [name for name in names if checkpoint.sizes.get(name, 0) > MAX_PAPER]):
        logger.warning("%s: %s is too large to be a paper and was not copied", checkpoint.ref, name)
    names = [name for name in names if name not in large]
    if not names:
        return []
    try:
        root = checkpoint.fetch(names)
    except HubError as error:
        logger.warning("%s: not copied: %s (%s)", checkpoint.ref, ", ".join(names), error.one_line())
        return []
    return [inside((root / name).parent, (root / name).name) for name in names]


def _canonical(half: Half) -> Sidecar:
    """The half's sidecar for its new form, which lies on nothing; what `ar_meta.json` said is kept in it."""
    extra = {key: value for key, value in half.sidecar.extra.items() if key != ADAPTER_BASE_KEY}
    if meta := read_ar_meta(half.files.directory, half.files.told):
        extra[AR_META_KEY] = meta
    return half.sidecar.with_(adapter_stack=None, extra=extra)


def _widest(half: Half) -> torch.dtype:
    """The dtype that holds every stored weight that a half uses without loss."""
    directory = half.files.model_directory
    unused = [*half.adapter.ignored_weights]
    if half.role == "ar":
        unused += half.adapter.lm_head_weights
        if half.sidecar.final_norm_stripped is not False:
            unused += half.adapter.final_norm_weights
        if half.files.form != "model":
            unused.append(f"blocks>{half.adapter.blocks}>{half.sidecar.site.layer}")
    stored = WeightIndex.read(directory).tensors
    names = {tensor.dtype for name, tensor in stored.items() if not matches(name, unused)}
    known = {TORCH_DTYPES[name] for name in names if name in TORCH_DTYPES} - {torch.float64}
    if len(known) < len(names):
        raise CheckpointError(
            "These weights are stored in a form that is not converted.",
            where=directory,
            got=", ".join(sorted(names)),
            expected="float32, bfloat16 or float16",
            next_step='pass the dtype to write: dtype="bfloat16"',
        )
    return known.pop() if len(known) == 1 else torch.float32


def describe(done: Converted) -> str:
    """One line about a written half."""
    merged = f", {done.merged} merged" if done.merged else ""
    return f"{done.role.upper()}: {done.came_from}{merged} -> {done.directory} ({done.dtype})"
