"""Files of data sets on the Hub, read where they lie: nothing is stored, and only what is asked for is transferred."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any, BinaryIO, TypeVar, cast

from nla_hub.errors import HubError, HubNotFoundError
from nla_hub.hub import HubOptions, Listing
from nla_hub.hub.refusals import ask, transport_errors, unreachable

T = TypeVar("T")

BLOCK = 4 * 2**20
"""Bytes that one request asks for at least: reading on is then seldom a request of its own."""


def dataset_commit(repo: str, *, revision: str | None, options: HubOptions) -> str:
    """The commit that a revision of a data set is now (None: its main branch).

    Raises:
        HubNotFoundError, HubAuthError, HubGatedError, HubUnreachableError, HubError.
    """
    from huggingface_hub import HfApi, constants

    if options.local_files_only:
        raise unreachable(f"datasets/{repo}", local_only=True)
    timeout = float(constants.HF_HUB_ETAG_TIMEOUT)
    call = HfApi(token=options.token).dataset_info
    return str(ask_dataset(lambda: call(repo, revision=revision, timeout=timeout), repo, revision).sha)


def dataset_files(repo: str, *, revision: str | None, options: HubOptions) -> Listing:
    """Names and sizes of the files of a data set, all of one commit; nothing is downloaded.

    Raises:
        HubNotFoundError, HubAuthError, HubGatedError, HubUnreachableError, HubError.
    """
    from huggingface_hub import HfApi

    commit = dataset_commit(repo, revision=revision, options=options)

    def tree() -> dict[str, int]:
        entries = HfApi(token=options.token).list_repo_tree(repo, recursive=True, revision=commit, repo_type="dataset")
        return {entry.path: int(entry.size) for entry in entries if hasattr(entry, "size")}

    return Listing(repo, commit, ask_dataset(tree, repo, revision))


def open_dataset_file(listing: Listing, name: str, options: HubOptions) -> BinaryIO:
    """A file of a data set, seekable; what it cannot read raises the errors of `dataset_files`."""
    stream = _HubStream(listing, name, options)
    return cast(BinaryIO, io.BufferedReader(stream, buffer_size=2**17))


class _HubStream(io.RawIOBase):
    """A file that is read by ranges, with `ask`'s patience for a Hub that says "later" or breaks off."""

    def __init__(self, listing: Listing, name: str, options: HubOptions) -> None:
        super().__init__()
        self.listing = listing
        self.options = options
        self.size = listing.files[name]
        self.path = f"datasets/{listing.repo}@{listing.commit}/{name}"
        self.at = 0
        self.file: Any = None

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self.at, io.SEEK_END: self.size}[whence]
        self.at = max(start + offset, 0)
        return self.at

    def tell(self) -> int:
        return self.at

    def readinto(self, buffer: Any) -> int:
        wanted = min(len(buffer), self.size - self.at)
        if wanted <= 0:
            return 0
        data = ask_dataset(lambda: self._read(wanted), self.listing.repo, self.listing.commit)
        buffer[: len(data)] = data
        self.at += len(data)
        return len(data)

    def _read(self, n: int) -> bytes:
        if self.file is None:
            from huggingface_hub import HfFileSystem

            system = HfFileSystem(token=self.options.token)
            # With its size said, the client does not list the file's folder first.
            self.file = system.open(self.path, "rb", block_size=BLOCK, cache_type="readahead", size=self.size)
        self.file.seek(self.at)
        data = bytes(self.file.read(n))
        if not data:
            raise EOFError("the file is shorter than the Hub's listing says")
        return data

    def close(self) -> None:
        if self.file is not None:
            self.file.close()
            self.file = None
        super().close()


def refusal_in(error: BaseException) -> BaseException | None:
    """The Hub's refusal or the broken connection behind an error of a library that reads from the Hub; None for others."""
    from huggingface_hub import errors as hf

    known = (hf.HfHubHTTPError, hf.OfflineModeIsEnabled, ConnectionError, TimeoutError, *transport_errors())
    found: BaseException | None = error
    while found is not None and not isinstance(found, known):
        found = found.__cause__ or found.__context__
    return found


def ask_dataset(call: Callable[[], T], repo: str, revision: str | None) -> T:
    """The answer of a call that reads a data set, with `ask`'s patience; the client's refusals as this project's errors."""
    where = f"datasets/{repo}"

    def unwrapped() -> T:
        try:
            return call()
        except FileNotFoundError as error:  # the file system's word for what the Hub refused
            if (refusal := refusal_in(error)) is not None:
                raise refusal from None
            raise HubNotFoundError(
                "The data set lacks a file.", where=where, got=str(error), next_step="try again later"
            ) from error

    try:
        return ask(unwrapped, repo=where, revision=revision, local_only=False)
    except EOFError as error:
        raise HubError(f"The file stopped coming: {error}.", where=where, next_step="try again later") from error
