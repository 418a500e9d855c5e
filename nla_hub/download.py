"""A pair fetched before it is needed: what it consists of, what of it is here already, and how it gets into the cache.

Contracts, configurations and tokenizers are read first, so a pair that must not be used, or a source model whose terms were
not accepted, is refused before anything large is fetched. `download_folder` lays a pair out as a directory.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Literal

from nla_hub.convert import MAX_PAPER, PAPER
from nla_hub.errors import CheckpointError, HubGatedError, RunError, WeightsError
from nla_hub.hub import HubOptions
from nla_hub.hub.stored import cache_directory, stored, unfinished
from nla_hub.layouts import ADAPTER_WEIGHTS_NAME, AR_LORA_NAME, Form, Place, files_of
from nla_hub.library import Checkpoint, Under
from nla_hub.loading import Pair, find_source
from nla_hub.log import logger
from nla_hub.opening import Half
from nla_hub.pretrained import LoadOptions
from nla_hub.units import size
from nla_hub.weights import HEAD_NAME, INDEX_NAME, REFERENCE_NAME, WEIGHTS_NAME, WeightIndex, read_header

PartName = Literal["av", "ar", "source", "base"]

WORDS: dict[PartName, str] = {"av": "AV", "ar": "AR", "source": "source model", "base": "model under the LoRA"}
"""What a part is called."""


@dataclass(frozen=True)
class Part:
    """Files of one checkpoint.

    Attributes:
        name: which part of the pair; "base" is what a LoRA lies on where that is not the source model.
        files: path in the checkpoint -> path in the part's own folder.
        folder: folder in the checkpoint that it is taken from.
        half: the opened half; None for models.
    """

    name: PartName
    checkpoint: Checkpoint
    files: Mapping[str, str]
    folder: str
    half: Half | None = None

    @cached_property
    def sizes(self) -> dict[str, int]:
        """Path in the checkpoint -> bytes."""
        if self.checkpoint.ref.kind == "hub":
            return {name: self.checkpoint.sizes[name] for name in self.files}
        root = self.checkpoint.fetch([])
        return {name: (root / name).stat().st_size for name in self.files}

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(self.sizes.values())

    @property
    def origin(self) -> str:
        """Where it comes from, with its commit."""
        ref = self.checkpoint.ref
        if ref.kind != "hub":
            return "packaged" if ref.kind == "package" else ref.name
        inside = f"/{self.folder}" if self.folder else ""
        return f"{ref.name}{inside}@{self.checkpoint.commit}"

    @property
    def short(self) -> str:
        """The same for a person: a commit by its first ten digits."""
        commit = self.checkpoint.commit
        return self.origin if commit is None else self.origin.replace(commit, commit[:10])

    def stored(self, name: str) -> Path | None:
        """Where a file lies on this machine already; None where it must be fetched."""
        checkpoint = self.checkpoint
        if checkpoint.ref.kind != "hub":
            return checkpoint.fetch([]) / name
        assert checkpoint.commit is not None
        return stored(checkpoint.ref.name, name, commit=checkpoint.commit, options=checkpoint.options)

    @property
    def form(self) -> Form:
        """What kind of weights it holds."""
        return "model" if self.half is None else self.half.place.form

    @property
    def missing(self) -> dict[str, int]:
        """The files that must be fetched: path in the checkpoint -> bytes."""
        return {name: n for name, n in self.sizes.items() if self.stored(name) is None}


def parts_of(pair: Pair, *, source: bool, load_options: LoadOptions | None = None) -> list[Part]:
    """What a pair (`open_pair(weights=False)`) consists of: its wanted halves, what LoRAs lie on, the source if asked for.

    Raises:
        HubGatedError: the terms of the source's repository were not accepted. CheckpointError and its children: nothing says
            what the source is, or it is another; weights that are not listed. HubError and its children.
    """
    halves = [half for half in (pair.av, pair.ar) if half is not None and half.role in pair.wanted]
    below = {_key(half.under): half.under for half in halves if half.under is not None}
    base = _source(pair, load_options or LoadOptions(), optional=not below) if source else None
    found = [_half(half) for half in halves]
    for key, under in below.items():
        if base is None or key != _key(base):
            is_source = pair.base == replace(under.checkpoint.ref, subfolder=under.folder)
            found.append(_model("source" if is_source else "base", under))
    if base is not None:
        found.append(_model("source", base))
    for part in found:
        _require_listed(part)
    return found


def require_room(needed: int, directory: Path, *, advice: str) -> None:
    """Raise a RunError where a disk has less than `needed` bytes free.

    Args:
        directory: it, or the nearest directory above that exists, is on that disk.
    """
    above = next(folder for folder in (directory, *directory.absolute().parents) if folder.exists())
    free = shutil.disk_usage(above).free
    if needed > free:
        raise RunError(
            "There is not enough room for this download; nothing was fetched.",
            where=directory,
            got=f"{size(free)} free",
            expected=size(needed),
            next_step=advice,
        )


def into_cache(pair: Pair, parts: list[Part], options: HubOptions) -> dict[PartName, Path]:
    """Fetch all parts into the cache, where loading finds them without a network; part -> its directory there.

    What was cut short is continued.

    Raises:
        RunError: not enough room. CheckpointError: LoRAs of which nothing tells which act together.
        HubError and its children.
    """
    remote = [part for part in parts if part.checkpoint.ref.kind == "hub"]
    begun = sum(unfinished(repo, options) for repo in {part.checkpoint.ref.name for part in remote})
    needed = sum(sum(part.missing.values()) for part in remote) - begun
    require_room(
        needed,
        cache_directory(options),
        advice="make room, or name a cache on a larger disk (HF_HOME), or a directory there (--to DIR)",
    )
    directories: dict[PartName, Path] = {}
    for part in parts:
        directories[part.name] = part.checkpoint.fetch(list(part.files)) / part.folder
        logger.info("%s: is here", WORDS[part.name])
    for part in parts:
        if part.half is not None:
            part.half.with_weights()  # of LoRAs also the earlier stages that act with them
        require_whole(part, directories[part.name])
    return directories


def require_whole(part: Part, directory: Path) -> None:
    """Raise a WeightsError where the headers of a part's weights do not fit its files."""
    if part.form == "model":
        WeightIndex.read(directory)
    for name in part.files.values():
        if name.endswith(".safetensors"):
            read_header(directory / name)


def _source(pair: Pair, options: LoadOptions, *, optional: bool) -> Under:
    try:
        return find_source(pair.base, pair.sidecar, pair.family, pair.name, pair.library, options)
    except HubGatedError as refusal:
        if not optional:
            raise
        raise HubGatedError(
            refusal.what,
            where=refusal.where,
            got=refusal.got,
            next_step=f"{refusal.next_step}. The pair itself can be fetched without it: leave --with-source out",
        ) from refusal


def _half(half: Half) -> Part:
    """A half with the papers that speak for it, of its own folder or of those above."""
    files: dict[str, str] = {}
    place, checkpoint = half.place, half.checkpoint
    papers = [file for file in checkpoint.files if _is_paper(file, half) and checkpoint.sizes.get(file, 0) <= MAX_PAPER]
    for file in (*files_of(checkpoint.files, place), *papers):
        name = PurePosixPath(file).name
        other = next((one for one, there in files.items() if there == name), None)
        if other is None or len(file) > len(other):  # of one name the nearest: its path is the longest
            files.pop(other or "", None)
            files[file] = name
    return Part(half.role, checkpoint, files, place.folder, half)


def _is_paper(file: str, half: Half) -> bool:
    path = PurePosixPath(file)
    above = half.place.folder == str(path.parent) or path.parent in (PurePosixPath(half.place.folder) / "x").parents
    return above and PAPER.fullmatch(path.name) is not None and (half.role == "ar" or path.name != REFERENCE_NAME)


def _model(name: PartName, under: Under) -> Part:
    place = Place(under.folder, "model", None, None, False)
    names, sizes = files_of(under.checkpoint.files, place), under.checkpoint.sizes
    papers = [
        n for n in under.checkpoint.files if PAPER.fullmatch(n) and n != REFERENCE_NAME and sizes.get(n, 0) <= MAX_PAPER
    ]
    return Part(name, under.checkpoint, {n: PurePosixPath(n).name for n in [*names, *papers]}, under.folder)


def _require_listed(part: Part) -> None:
    """Raise a CheckpointError where a part's weights are not all listed: without network a cache lists what it holds."""
    names = set(part.files.values())
    if part.form != "model":
        wanted = {ADAPTER_WEIGHTS_NAME if part.form == "lora" else AR_LORA_NAME}
    elif WEIGHTS_NAME in names or INDEX_NAME not in names:
        wanted = {WEIGHTS_NAME}
    else:
        inside = next(file for file, name in part.files.items() if name == INDEX_NAME)
        wanted = _shards(part.checkpoint.fetch([inside]) / inside)
    if part.name == "ar" and part.form == "model":
        wanted |= {HEAD_NAME}
    if lacking := sorted(wanted - names):
        raise CheckpointError(
            f"The weights of the {WORDS[part.name]} are not all there.",
            where=part.origin,
            got=f"without {', '.join(lacking[:3])}",
            next_step="with a connection to the Hub it may be complete: without one only what is in the cache is seen",
        )


def _shards(index: Path) -> set[str]:
    """The files that an index of weights names."""
    try:
        return {str(name) for name in json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as cause:
        raise WeightsError("This index cannot be read.", where=index, next_step="ask its author") from cause


def _key(under: Under) -> tuple[str, str | None, str]:
    return under.checkpoint.ref.name, under.checkpoint.commit, under.folder
