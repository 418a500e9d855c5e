"""The only module that talks to the Hugging Face Hub; its refusals become this project's errors.

HF_HOME, HF_HUB_CACHE, HF_TOKEN, HF_ENDPOINT and HF_HUB_OFFLINE mean what they mean to huggingface_hub. That client
resumes a download cut short, waits as a 429 says (while it lists and downloads) and locks its cache. What it leaves to
its caller is done here: waiting where it does not, starting again after a reset connection, holding what arrived
against its sha256, and the cache in place of a Hub that fails.
"""

from __future__ import annotations

import glob
import re
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

from nla_hub.errors import HubAuthError, HubError, HubNotFoundError, HubUnreachableError, WeightsError
from nla_hub.hub.cache import cache_folder, check_arrived, note
from nla_hub.hub.refusals import Damaged, ask, place, status, token_refused, transport_errors, unreachable
from nla_hub.log import logger

T = TypeVar("T")

MODEL_FILES = ("*.json", "*.safetensors", "*.yaml", "*.jinja", "*.model", "*.txt", "LICENSE*", "NOTICE*")
"""What a checkpoint is made of here. Pickled weights and Python files are never downloaded.

A `*` stands for slashes too, so the patterns match in folders.
"""

SMALL_FILES = tuple(pattern for pattern in MODEL_FILES if "safetensors" not in pattern)
"""The same without weights: sidecars, configurations and tokenizers, read before anything large is downloaded.

An index of weights (`model.safetensors.index.json`) is among them.
"""

UPLOAD_BRANCHES = "nla-hub/"
"""What the branches begin with that releases are sent to before they are published."""

_COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True)
class HubOptions:
    """How to download; the keywords of transformers' `from_pretrained`.

    Raises:
        HubAuthError: a token that cannot be sent, such as one with a line break inside.
    """

    token: str | bool | None = None
    cache_dir: str | Path | None = None
    local_files_only: bool = False
    force_download: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.token, str):
            return
        # The HTTP library quotes a header that it cannot send, token and all.
        if not re.fullmatch(r"[\x21-\x7e]+", self.token.strip()):
            raise HubAuthError(
                "This is no token: it is empty, or holds spaces, line breaks or characters outside ASCII.",
                where="token",
                next_step="copy it again from the settings of your account (hf_...), or `hf auth login`",
            )
        object.__setattr__(self, "token", self.token.strip())

    def __repr__(self) -> str:  # a token never reaches a log
        return f"HubOptions(token={'***' if isinstance(self.token, str) else self.token}, cache_dir={self.cache_dir})"


@dataclass(frozen=True)
class Listing:
    """The files of a model repository at one commit. Hand `commit` to `fetch` and `fetch_files`: all is of one commit."""

    repo: str
    commit: str
    files: Mapping[str, int]
    """Name (folders with slashes) -> size in bytes."""
    cached: bool = False
    """Read from the cache's snapshot: files that were never downloaded are not listed."""


def fetch(
    repo: str,
    *,
    revision: str | None,
    options: HubOptions,
    files: Sequence[str] = MODEL_FILES,
    commit: str | None = None,
) -> Path:
    """Download (or find in the cache) the files of a model repository that match `files`; its local directory.

    `commit` is what `listing` found `revision` to be: that is downloaded, and noted in the cache as the revision's, for
    days without network. (Giving the commit as `revision` would lose the note.)

    Where the Hub cannot be asked or fails, the answer is what the cache holds; a snapshot known to lack some of these
    files is refused.

    Raises:
        HubNotFoundError, HubAuthError, HubGatedError, HubUnreachableError, HubError.
    """
    return _ask(repo, revision, options, lambda: _snapshot(repo, revision, options, list(files), commit))


def fetch_files(
    repo: str, names: Sequence[str], *, revision: str | None, options: HubOptions, commit: str | None = None
) -> Path:
    """Download (or find in the cache) exactly these files, such as `av/config.json`; the repository's local directory.

    Otherwise as `fetch`.

    Raises:
        HubNotFoundError: some are not there; all of those are named.
        HubAuthError, HubGatedError, HubUnreachableError, HubError: as `fetch`.
    """
    where = place(repo, revision)
    for name in names:
        _check_name(name, where)
    patterns = [glob.escape(name) for name in names]
    directory = fetch(repo, revision=revision, options=options, files=patterns, commit=commit)
    missing = [name for name in names if not (directory / name).is_file()]
    if missing and _offline(options):
        raise unreachable(where, local_only=options.local_files_only, lacks=", ".join(missing[:5]))
    if missing:
        raise HubNotFoundError(
            f"The repository lacks {len(missing)} of {len(names)} files.",
            where=where,
            got=f"without {', '.join(missing[:5])}",
            next_step="name another revision, or tell the repository's author",
        )
    return directory


def listing(repo: str, *, revision: str | None, options: HubOptions) -> Listing:
    """Names and sizes of all files of a model repository; nothing is downloaded.

    Offline, and where the Hub cannot be reached or fails: what the cache holds of that revision.

    Raises:
        HubNotFoundError, HubAuthError, HubGatedError, HubUnreachableError.
        HubError: also for file names that point outside the repository.
    """
    from huggingface_hub.errors import RevisionNotFoundError

    if _offline(options):
        return _cached_listing(repo, revision, options)
    try:
        return _ask(repo, revision, options, lambda: _remote_listing(repo, revision, options))
    except HubError as refusal:
        # As the client's own downloads: the cache answers for a Hub that fails, not for one that knows better.
        if not isinstance(refusal.__cause__, RevisionNotFoundError):
            with suppress(HubError):
                found = _cached_listing(repo, revision, options)
                logger.info("Listed from the cache: %s", refusal.one_line())
                return found
        raise


def headers(
    repo: str, names: Sequence[str], *, revision: str | None, options: HubOptions
) -> dict[str, dict[str, tuple[tuple[int, ...], str]]]:
    """What is inside safetensors files, before any of them is downloaded: file -> tensor -> (shape, dtype).

    dtypes are named as in safetensors ("BF16", "F32"). A file that the cache holds is read there (`revision` None: as
    the cache knows it); of others the header alone is requested: the first 100 kB, then as far as its length says, up
    to the client's limit of 25 MB.

    Raises:
        WeightsError: not safetensors: a header too long, damaged, or with shapes that are none.
        HubNotFoundError, HubAuthError, HubGatedError, HubUnreachableError, HubError: as `fetch`.
    """
    for name in names:
        _check_name(name, place(repo, revision))

    def one(name: str) -> dict[str, tuple[tuple[int, ...], str]]:
        return _ask(repo, revision, options, lambda: _header(repo, name, revision, options))

    with ThreadPoolExecutor(max_workers=8) as pool:
        return dict(zip(names, pool.map(one, names), strict=True))


def exists(repo: str, *, revision: str | None = None, options: HubOptions) -> bool:
    """Whether this model repository (and revision) is there for this account; a gated one is there.

    The Hub answers alike for what does not exist and what is private: both are False.

    Raises:
        HubAuthError: the token itself is refused.
        HubUnreachableError: nobody answers, and the cache has nothing of it.
        HubError: any other refusal.
    """
    if _offline(options):
        return bool(_cached_listing(repo, revision, options).commit)
    try:
        return _ask(repo, revision, options, lambda: _answers(repo, revision, options))
    except HubUnreachableError:
        with suppress(HubError):
            return bool(_cached_listing(repo, revision, options).commit)
        raise


def pending_push(repo: str, *, revision: str | None, options: HubOptions) -> str | None:
    """The branch of a push that a branch (`revision` None: main) of a model repository still waits for.

    None: there is none, or `revision` is no branch, so it stays as it is. It only explains what is missing, so it is asked
    once, and a Hub that does not answer is None too.
    """
    from huggingface_hub import HfApi

    with suppress(Exception):  # whatever goes wrong, what was found missing is what must be told
        branches = [branch.name for branch in HfApi(token=options.token).list_repo_refs(repo).branches]
        if (revision or "main") in branches:
            return next((name for name in branches if name.startswith(UPLOAD_BRANCHES)), None)
    return None


# The calls of the client


def _snapshot(
    repo: str, revision: str | None, options: HubOptions, patterns: list[str], commit: str | None = None
) -> Path:
    from huggingface_hub import snapshot_download

    named, revision = revision, commit or revision

    def download(local: bool) -> Path:
        return Path(
            snapshot_download(
                repo,
                revision=revision,
                token=options.token,
                cache_dir=options.cache_dir,
                local_files_only=local,
                force_download=options.force_download and not local,
                allow_patterns=patterns,
            )
        )

    if _offline(options):
        return download(local=True)
    folder = cache_folder(repo, options.cache_dir)
    before = set() if options.force_download else {path.name for path in (folder / "blobs").glob("*")}
    try:
        if _pinned(revision) and _known_tree(repo, revision, options) is None:
            # With a commit named, the client goes on to the list of files and asks for it for 23 seconds.
            _info(repo, revision, options)
        directory = download(local=False)
    except Exception as error:
        with suppress(Damaged):  # what did arrive before it failed
            check_arrived(repo, folder, before, options.cache_dir)
        if isinstance(error, transport_errors()):
            with suppress(Exception):  # the client itself takes the cache's answer after some of these only
                return download(local=True)
        raise
    check_arrived(repo, folder, before, options.cache_dir)
    if commit is not None and not _pinned(named):
        note(folder, named or "main", commit)
    return directory


def _remote_listing(repo: str, revision: str | None, options: HubOptions) -> Listing:
    from huggingface_hub import HfApi

    files = _known_tree(repo, revision, options)
    commit = str(revision if files is not None else _info(repo, revision, options).sha)
    if not _COMMIT.fullmatch(commit):
        raise ValueError(f"a commit called {commit[:60]!r}")
    if files is None:
        entries = HfApi(token=options.token).list_repo_tree(repo, recursive=True, revision=commit)
        files = {entry.path: entry.size for entry in entries if hasattr(entry, "size")}
    for name, size in files.items():
        _check_name(name, place(repo, revision))
        if not isinstance(size, int) or size < 0:
            raise ValueError(f"a file of {size!r} bytes")
    return Listing(repo, commit, files)


def _cached_listing(repo: str, revision: str | None, options: HubOptions) -> Listing:
    local = HubOptions(cache_dir=options.cache_dir, local_files_only=True)
    directory = _ask(repo, revision, options, lambda: _snapshot(repo, revision, local, []))
    paths = [path for path in directory.rglob("*") if path.is_file()]
    files = {path.relative_to(directory).as_posix(): path.stat().st_size for path in paths}
    return Listing(repo, directory.name, files, cached=True)


def _known_tree(repo: str, revision: str | None, options: HubOptions) -> dict[str, int] | None:
    """The files of a commit that a download listed before: a commit does not change."""
    from huggingface_hub import get_cached_repo_tree

    if _pinned(revision):
        with suppress(Exception):  # what it raises where nothing is cached is not public in all versions
            entries = get_cached_repo_tree(repo, revision=revision, cache_dir=options.cache_dir)
            return {entry.path: entry.size for entry in entries}
    return None


def _info(repo: str, revision: str | None, options: HubOptions) -> Any:
    from huggingface_hub import HfApi, constants

    timeout = float(constants.HF_HUB_ETAG_TIMEOUT)
    return HfApi(token=options.token).repo_info(repo, revision=revision, timeout=timeout)


def _answers(repo: str, revision: str | None, options: HubOptions) -> bool:
    from huggingface_hub import errors as hf

    try:
        _info(repo, revision, options)
    except hf.GatedRepoError:
        return True
    except hf.HfHubHTTPError as refusal:
        if status(refusal) == 404 or (status(refusal) == 401 and not token_refused(refusal)):
            return False
        raise
    return True


def _header(repo: str, name: str, revision: str | None, options: HubOptions) -> dict[str, tuple[tuple[int, ...], str]]:
    from huggingface_hub import HfApi, try_to_load_from_cache
    from huggingface_hub.errors import LocalEntryNotFoundError, SafetensorsParsingError
    from safetensors import SafetensorError, safe_open

    where = f"{place(repo, revision)}/{name}"
    advice = "the file is damaged: name another revision, or tell the repository's author"
    found: dict[str, tuple[Any, Any]] = {}
    try:
        path = try_to_load_from_cache(repo, name, cache_dir=options.cache_dir, revision=revision)
        if isinstance(path, str) and not options.force_download:
            with safe_open(path, framework="np") as file:
                for key in file.keys():  # noqa: SIM118 -- safe_open is no mapping
                    found[key] = file.get_slice(key).get_shape(), file.get_slice(key).get_dtype()
        elif _offline(options):
            raise LocalEntryNotFoundError(name)
        else:
            parsed = HfApi(token=options.token).parse_safetensors_file_metadata(repo, name, revision=revision)
            found = {key: (tensor.shape, tensor.dtype) for key, tensor in parsed.tensors.items()}
    # The client parses what it gets: a header that is no object, or nested without end, ends in one of the others.
    except (SafetensorsParsingError, SafetensorError, TypeError, AttributeError, RecursionError) as cause:
        raise WeightsError(f"This is not a safetensors file: {cause}", where=where, next_step=advice) from cause
    odd = [key for key, (shape, dtype) in found.items() if not _is_shape(shape) or not isinstance(dtype, str)]
    if odd:
        raise WeightsError("A tensor has no shape.", where=where, got=repr(odd[0])[:100], next_step=advice)
    return {key: (tuple(shape), dtype) for key, (shape, dtype) in found.items()}


def _is_shape(shape: Any) -> bool:
    return isinstance(shape, list | tuple) and all(type(n) is int and n >= 0 for n in shape)


# Small parts


def _ask(repo: str, revision: str | None, options: HubOptions, call: Callable[[], T]) -> T:
    return ask(call, repo=repo, revision=revision, local_only=options.local_files_only)


def _offline(options: HubOptions) -> bool:
    from huggingface_hub import is_offline_mode

    return options.local_files_only or is_offline_mode()


def _pinned(revision: str | None) -> bool:
    return revision is not None and _COMMIT.fullmatch(revision) is not None


def _check_name(name: str, where: str) -> None:
    """Refuse a file name that would leave the repository's directory, read as POSIX or Windows do."""
    path = PurePosixPath(name.replace("\\", "/"))
    if not path.parts or path.is_absolute() or ".." in path.parts or ":" in path.parts[0] or "\0" in name:
        raise HubError(
            "A file name points outside the repository.",
            where=where,
            got=repr(name)[:200],
            expected="names such as folder/file.json",
            next_step="do not use this repository unless its author explains it",
        )
