"""What is done to huggingface_hub's cache from here; its layout is documented by that package.

models--OWNER--NAME/
    blobs/ETAG                what was downloaded; of files in LFS the ETag is the sha256
    snapshots/COMMIT/FILE     links into blobs
    refs/REVISION             the commit that a branch or tag was
"""

from __future__ import annotations

import hashlib
import os
import re
import threading
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path

from nla_hub.hub.refusals import Damaged

_SHA256 = re.compile(r"[0-9a-f]{64}")


def cache_folder(repo: str, cache_dir: str | Path | None) -> Path:
    """Where the cache keeps a model repository."""
    from huggingface_hub import constants

    return Path(cache_dir or constants.HF_HUB_CACHE).expanduser() / f"models--{repo.replace('/', '--')}"


def note(folder: Path, revision: str, commit: str) -> None:
    """Note what a revision was, as the client does for revisions that it looks up itself (its documented layout)."""
    path = folder / "refs" / revision
    if ".." in path.parts or (path.is_file() and path.read_text() == commit):
        return
    with suppress(OSError):  # a cache that may not be written to is still a cache
        path.parent.mkdir(parents=True, exist_ok=True)
        fresh = path.with_name(f"{path.name}.{os.getpid()}-{threading.get_ident()}.tmp")
        fresh.write_text(commit)
        fresh.replace(path)


def check_arrived(repo: str, folder: Path, before: set[str], cache_dir: str | Path | None) -> None:
    """Hold what was downloaded against its sha256, which is its name in the cache; a damaged file leaves the cache.

    The client checks sizes only, and what once lies in the cache is never asked for again. Files that came by Xet are
    left out: that transfer is by content, checked on the way. Small files carry git's hash, or on mirrors another.

    Args:
        before: the names of the blobs that were there before.
    """
    damaged = []
    for snapshot in (folder / "snapshots").glob("*"):
        by_xet: set[str] | None = None
        for path in snapshot.rglob("*"):
            blob = path.parent / os.readlink(path) if path.is_symlink() else path
            if not _SHA256.fullmatch(blob.name) or blob.name in before or blob.is_symlink() or not blob.is_file():
                continue
            by_xet = _came_by_xet(repo, snapshot.name, cache_dir) if by_xet is None else by_xet
            if path.relative_to(snapshot).as_posix() in by_xet:
                continue
            with blob.open("rb") as file:
                if hashlib.file_digest(file, "sha256").hexdigest() != blob.name:
                    damaged.append(path.name)
                    path.unlink(missing_ok=True)
                    blob.unlink(missing_ok=True)
    if damaged:
        raise Damaged(f"{', '.join(damaged[:3])}: what arrived is not what its sha256 promises")


def _came_by_xet(repo: str, commit: str, cache_dir: str | Path | None) -> set[str]:
    from huggingface_hub import constants, get_cached_repo_tree

    if find_spec("hf_xet") and not constants.HF_HUB_DISABLE_XET:
        with suppress(Exception):  # what it raises where nothing is cached is not public in all versions
            entries = get_cached_repo_tree(repo, revision=commit, cache_dir=cache_dir)
            return {entry.path for entry in entries if entry.xet_hash is not None}
    return set()
