"""A pair as a directory that works on a machine without network: DIR/av, DIR/ar and, if asked for, DIR/source.

What is on its way lies in DIR/.nla-hub, on the same disk: a cache of its own in the layout of huggingface_hub's, whose client
continues there what was cut short. A part appears under its name once it is complete and every large file was held against
its sha256. `.nla-hub/download.json` says what the directory holds, so the same command continues and another one is refused.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from nla_hub import hub
from nla_hub.convert import check_destination
from nla_hub.download import WORDS, Part, PartName, require_room, require_whole
from nla_hub.errors import CheckpointError, HubError, RunError
from nla_hub.hub import HubOptions
from nla_hub.layouts import files_of
from nla_hub.loading import Pair, open_pair
from nla_hub.locate import resolve_pair
from nla_hub.locks import Lock
from nla_hub.log import logger
from nla_hub.lora_stages import stacked
from nla_hub.opening import ADAPTER_BASE_KEY
from nla_hub.sidecar import SIDECAR_NAME
from nla_hub.yaml_io import write_text
from nla_hub.zoo import known_sidecar

HIDDEN = ".nla-hub"
RECORD_NAME = "download.json"

_SHA256 = re.compile(r"[0-9a-f]{64}")


def into_folder(
    pair: Pair, parts: list[Part], destination: Path, options: HubOptions, *, told: Mapping[str, Any] | None = None
) -> dict[PartName, Path]:
    """Lay out the parts of a pair below `destination`; part -> its directory. The result is opened once, without network.

    Args:
        pair: from `open_pair(weights=False)`. parts: from `parts_of`.
        told: what the user said about the contract; it is written into the sidecars, as is what the zoo knows.

    Raises:
        RunError: the destination is in use for something else, cannot be written to, or its disk is too small.
        CheckpointError and its children: the pair needs more than these folders can say. HubError and its children.
    """
    _require_simple(pair, parts)
    place, record = _place(destination, parts), _record(pair, parts)
    hidden = place / HIDDEN
    todo = [part for part in parts if not (place / part.name).is_dir()]
    begun = sum(path.stat().st_size for path in hidden.rglob("*") if path.is_file() and not path.is_symlink())
    require_room(
        sum(part.size for part in todo) - begun, place, advice="make room, or name a directory on a larger disk"
    )
    try:
        hidden.mkdir(parents=True, exist_ok=True)
        with _held(hidden):
            write_text(hidden / RECORD_NAME, json.dumps(_merged(hidden, record), indent=1, sort_keys=True) + "\n")
            for part in todo:
                os.replace(_ready(part, hidden, options, told), place / part.name)
                logger.info("%s: is here", WORDS[part.name])
            shutil.rmtree(hidden / "cache", ignore_errors=True)
            shutil.rmtree(hidden / "ready", ignore_errors=True)
    except OSError as cause:
        raise RunError(
            f"The download could not be stored: {cause.strerror or cause}.",
            where=cause.filename or destination,
            next_step="check permissions and the space left on the disk, then run the same command again: it continues",
        ) from cause
    _check(pair, place)
    return {part.name: place / part.name for part in parts}


def folder_lacks(parts: list[Part], destination: Path) -> dict[PartName, int]:
    """Part -> bytes that `into_folder` would fetch over the network."""
    found: dict[PartName, int] = {}
    for part in parts:
        ready = destination / HIDDEN / "ready" / part.name
        wanted = {} if (destination / part.name).is_dir() else part.missing
        found[part.name] = sum(n for name, n in wanted.items() if not _is_there(ready / part.files[name], n))
    return found


def _require_simple(pair: Pair, parts: list[Part]) -> None:
    """Raise a CheckpointError where a half is more than its folder and the source: a LoRA on another model or LoRA."""
    why = None
    for half in (part.half for part in parts if part.half is not None):
        if half.under is None:
            continue
        if any(part.name == "base" for part in parts) or ADAPTER_BASE_KEY in half.sidecar.extra:
            why = f"The {half.role.upper()} is a LoRA on a model that is not the source model."
        else:
            half.checkpoint.fetch(files_of(half.checkpoint.files, half.place))
            stack = stacked(half.checkpoint, half.place, half.sidecar, half.adapter, half.role)
            why = f"The {half.role.upper()} is {len(stack)} LoRAs on top of each other." if len(stack) > 1 else None
        if why is not None:
            raise CheckpointError(
                why,
                where=pair.name,
                next_step=f"merge them while they are copied: nla-hub convert {pair.name} DIR; or fetch the pair into the "
                "cache, without --to",
            )


# -- the destination -----------------------------------------------------------------------------------------


def _place(destination: Path, parts: list[Part]) -> Path:
    """Where the destination really is: new, empty, or with a download of the same files.

    Raises:
        RunError: something else is there.
    """
    record = destination / HIDDEN / RECORD_NAME
    if not record.is_file():
        begun = destination.is_dir() and os.listdir(destination) == [HIDDEN]  # killed before it could say what it is
        return destination.resolve() if begun else check_destination(destination)
    try:
        known = json.loads(record.read_text(encoding="utf-8"))["parts"]
        faults = [
            f"{WORDS[part.name]}: {known[part.name]['from']} there, {part.origin} now"
            for part in parts
            if part.name in known and known[part.name] != _described(part)
        ]
        faults += [
            f"{part.name} is there, and not from this download"
            for part in parts
            if part.name not in known and (destination / part.name).exists()
        ]
    except (OSError, ValueError, KeyError, TypeError) as cause:
        raise RunError(
            "What this directory holds cannot be read.",
            where=record,
            next_step="remove the directory, or name a new one",
        ) from cause
    if faults:
        raise RunError(
            "The destination holds another download.",
            where=destination,
            faults=faults,
            next_step="name a new directory, or remove this one",
        )
    return destination.resolve()


def _record(pair: Pair, parts: list[Part]) -> dict[str, Any]:
    return {"nla": pair.name, "parts": {part.name: _described(part) for part in parts}}


def _described(part: Part) -> dict[str, Any]:
    contract = {} if part.half is None else {"contract": part.half.sidecar.integrity()}
    return {"from": part.origin, "files": {part.files[name]: n for name, n in sorted(part.sizes.items())}, **contract}


def _merged(hidden: Path, record: dict[str, Any]) -> dict[str, Any]:
    """The record with the parts that are there already and were not asked for this time."""
    path = hidden / RECORD_NAME
    before = json.loads(path.read_text(encoding="utf-8"))["parts"] if path.is_file() else {}
    return {**record, "parts": {**before, **record["parts"]}}


@contextmanager
def _held(hidden: Path) -> Iterator[None]:
    lock = Lock(hidden / "lock")
    try:
        yield
    finally:
        lock.release()


# -- a part --------------------------------------------------------------------------------------------------


def _ready(part: Part, hidden: Path, options: HubOptions, told: Mapping[str, Any] | None) -> Path:
    """A part, complete, in a directory that has only to be moved."""
    ready = hidden / "ready" / part.name
    ready.mkdir(parents=True, exist_ok=True)
    lacking = [name for name, n in part.sizes.items() if not _is_there(ready / part.files[name], n)]
    for name in lacking:
        if (source := part.stored(name)) is not None:
            _copy(source, ready / part.files[name])
    lacking = [name for name in lacking if not (ready / part.files[name]).is_file()]
    if lacking:
        _fetch(part, lacking, ready, replace(options, cache_dir=hidden / "cache", force_download=False))
    if (half := part.half) is not None:
        known = known_sidecar(replace(half.checkpoint.ref, subfolder=half.place.folder), half.role)
        if known or told or not half.place.own_sidecar:
            half.sidecar.write(ready)
    require_whole(part, ready)
    return ready


def _is_there(path: Path, n_bytes: int) -> bool:
    return path.is_file() and path.stat().st_size == n_bytes


def _copy(source: Path, target: Path) -> None:
    """Copy a file of a cache or of the package; one of a cache that is damaged is left out, to be fetched."""
    fresh = target.with_name(f".{target.name}.tmp")
    shutil.copyfile(source, fresh)
    sha = source.resolve().name
    if _SHA256.fullmatch(sha) and _hash(fresh) != sha:
        logger.warning("%s is damaged in the cache; it is fetched again", source)
        fresh.unlink()
        return
    os.replace(fresh, target)


def _fetch(part: Part, names: list[str], ready: Path, options: HubOptions) -> None:
    """Download files of a part and move them to their places."""
    ref, commit = part.checkpoint.ref, part.checkpoint.commit
    before = {path.name for path in Path(options.cache_dir or "").rglob("blobs/*")}
    root = hub.fetch_files(ref.name, names, revision=commit, options=options)
    moved: dict[Path, Path] = {}
    for name in names:
        found = (root / name).resolve()
        if found.name in before and _SHA256.fullmatch(found.name) and _hash(found) != found.name:
            found.unlink()
            raise HubError(
                "A file that was fetched before is damaged.",
                where=f"{ref.name}/{name}",
                next_step="run the same command again: it alone is fetched anew",
            )
        target = ready / part.files[name]
        if found in moved:  # files of one content are one blob
            shutil.copyfile(moved[found], target)
        else:
            moved[found] = target
            os.replace(found, target)
        (root / name).unlink(missing_ok=True)


def _hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _check(pair: Pair, place: Path) -> None:
    """Open what was laid out, without weights and without network: its contract is the one that was asked for."""
    local = HubOptions(local_files_only=True)
    where = place if len(pair.wanted) == 2 else place / next(iter(pair.wanted))
    opened = open_pair(resolve_pair(where), components=sorted(pair.wanted), hub_options=local, weights=False)
    for role in pair.wanted:
        before, after = getattr(pair, role), getattr(opened, role)
        if before.sidecar.with_(extra={}) != after.sidecar.with_(extra={}):
            raise CheckpointError(
                f"The {role.upper()} does not say in this directory what it says where it comes from.",
                where=place / role / SIDECAR_NAME,
                next_step="fetch it into the cache instead (without --to), and report this pair",
            )
