"""What is written to the Hugging Face Hub: repositories, branches, commits, pull requests, tags, collections."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from nla_hub.hub import HubOptions

RepoKind = Literal["model", "dataset"]


@dataclass(frozen=True)
class RemoteFile:
    """A file of a repository at one commit.

    Attributes:
        size: bytes.
        sha256: of a large file (LFS, Xet); None for one that git holds itself.
        git_oid: git's hash of the blob: of a large file the hash of its pointer.
    """

    size: int
    sha256: str | None
    git_oid: str


@dataclass(frozen=True)
class Tree:
    """All files of a repository at one commit."""

    commit: str
    files: Mapping[str, RemoteFile]


@dataclass(frozen=True)
class Outgoing:
    """A file to be sent: its name in the repository, its content (a path or bytes), its two hashes (`release.Entry`)."""

    name: str
    content: Path | bytes
    size: int
    sha256: str
    git_oid: str

    def is_there(self, found: RemoteFile | None) -> bool:
        """Whether this is what the Hub already holds."""
        if found is None or found.size != self.size:
            return False
        return found.sha256 == self.sha256 if found.sha256 is not None else found.git_oid == self.git_oid


@dataclass(frozen=True)
class PullRequest:
    """A pull request: its number, the ref that its commits go to (refs/pr/N), its page."""

    number: int
    ref: str
    url: str


Progress = Callable[[str, int], None]
"""Told (name of the file, its bytes) when a file is on the Hub."""


class HubWriter:
    """One account's writing access; every method raises HubAuthError, HubGatedError, HubNotFoundError, HubError,
    HubUnreachableError as `nla_hub.hub` does, and waits and asks again where that is worth while.
    """

    def __init__(self, options: HubOptions) -> None:
        raise NotImplementedError

    def account(self) -> str:
        """Name of the account whose token is used; a HubAuthError without one."""
        raise NotImplementedError

    def create(self, repo: str, kind: RepoKind, *, private: bool) -> bool:
        """Make a repository; False where it was there (its visibility stays as it is)."""
        raise NotImplementedError

    def is_private(self, repo: str, kind: RepoKind) -> bool | None:
        """Whether an existing repository is private; None where there is none."""
        raise NotImplementedError

    def tree(self, repo: str, kind: RepoKind, revision: str) -> Tree | None:
        """What a revision holds, asked now and never from a cache; None where repository or revision is not there."""
        raise NotImplementedError

    def refs(self, repo: str, kind: RepoKind) -> tuple[dict[str, str], dict[str, str]]:
        """Branches and tags: name -> commit."""
        raise NotImplementedError

    def branch(self, repo: str, kind: RepoKind, name: str, *, start: str) -> None:
        """Make a branch at `start`; nothing happens where it is there."""
        raise NotImplementedError

    def delete_branch(self, repo: str, kind: RepoKind, name: str) -> None:
        """Remove a branch; nothing happens where it is not there."""
        raise NotImplementedError

    def send(
        self,
        repo: str,
        kind: RepoKind,
        revision: str,
        files: Sequence[Outgoing],
        *,
        message: str,
        progress: Progress | None = None,
    ) -> Tree:
        """Bring `files` to a branch or a pull request's ref, in as many commits as it takes; what is there already is not sent.

        A call that was cut off, or killed, is made again with the same arguments. Other files of the revision stay.
        """
        raise NotImplementedError

    def publish(
        self,
        repo: str,
        kind: RepoKind,
        *,
        source: Tree,
        revision: str,
        parent: str,
        files: Sequence[Outgoing],
        message: str,
        description: str = "",
    ) -> str:
        """One commit on `revision` that makes it hold exactly `files`, whose large ones are copied on the Hub from `source`.

        Nothing large is sent. Files that are not among `files` are removed, but `.gitattributes`. Where the revision holds
        all of it already, nothing is committed. The commit's hash.

        Args:
            parent: the revision's commit as it was seen: if somebody else has committed since, a HubError says so.
        """
        raise NotImplementedError

    def tag(self, repo: str, kind: RepoKind, tag: str, *, commit: str, message: str) -> None:
        """Name a commit; nothing happens where the tag names it already, a HubError where it names another."""
        raise NotImplementedError

    def pull_request(self, repo: str, kind: RepoKind, *, title: str, description: str) -> PullRequest:
        """A draft pull request of this account with exactly this title: the open one, or a new one."""
        raise NotImplementedError

    def offer(self, repo: str, kind: RepoKind, request: PullRequest) -> None:
        """Turn a draft into a pull request that others see as ready."""
        raise NotImplementedError

    def collect(self, collection: str, items: Sequence[tuple[str, RepoKind]], *, private: bool) -> str:
        """Add repositories to a collection, `owner/slug` or `owner/title` (made where there is none); its page."""
        raise NotImplementedError

    def url(self, repo: str, kind: RepoKind, revision: str | None = None) -> str:
        """The page of a repository."""
        raise NotImplementedError
