"""What of a model repository a cache holds already, told without asking anybody."""

from __future__ import annotations

from pathlib import Path

from nla_hub.hub import HubOptions
from nla_hub.hub.cache import cache_folder


def stored(repo: str, name: str, *, commit: str, options: HubOptions) -> Path | None:
    """Where the cache has a file of a commit; None where it does not."""
    from huggingface_hub import try_to_load_from_cache

    path = try_to_load_from_cache(repo, name, cache_dir=options.cache_dir, revision=commit)
    return Path(path) if isinstance(path, str) and not options.force_download else None


def unfinished(repo: str, options: HubOptions) -> int:
    """Bytes of downloads of a repository that were cut short and will be continued."""
    if options.force_download:
        return 0
    parts = (cache_folder(repo, options.cache_dir) / "blobs").glob("*.incomplete")
    return sum(path.stat().st_size for path in parts if path.is_file())


def cache_directory(options: HubOptions) -> Path:
    """The directory that downloads go to."""
    return cache_folder("owner/name", options.cache_dir).parent
