"""What goes into one commit: files as the Hub knows them, how many at a time, and the operations that bring or copy them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

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


COMMIT_FILES = 64
"""Files in one commit on an upload branch: the Hub's guide asks for 50 to 100."""

COMMIT_BYTES = 5 * 2**30
"""Bytes of files in one commit on an upload branch, roughly one shard: what a kill can leave without a commit."""

SMALL = 10_000_000
"""Bytes below which the Hub may keep a file in git; its content is then a part of the commit's own request."""

COMMIT_SMALL_BYTES = 32 * 2**20
"""Bytes of such files in one commit."""


@dataclass(frozen=True)
class PullRequest:
    """A pull request: its number, the ref that its commits go to (refs/pr/N), its page."""

    number: int
    ref: str
    url: str

    @classmethod
    def of(cls, found: Any) -> PullRequest:
        """What the client says of one."""
        return cls(found.num, found.git_reference, found.url)


def first_batch(files: Sequence[Outgoing], most: int) -> list[Outgoing]:
    """The first files, as many as go into one commit; one at least."""
    taken: list[Outgoing] = []
    total = small = 0
    for file in files[:most]:
        total += file.size
        small += file.size if file.size < SMALL else 0
        if taken and (total > COMMIT_BYTES or small > COMMIT_SMALL_BYTES):
            break
        taken.append(file)
    return taken


def addition(file: Outgoing) -> Any:
    from huggingface_hub import CommitOperationAdd

    content = file.content if isinstance(file.content, bytes) else str(file.content.absolute())
    return CommitOperationAdd(file.name, content)


def release(before: Tree, source: Tree, files: Sequence[Outgoing]) -> list[Any]:
    """The operations that make a revision hold exactly `files`."""
    from huggingface_hub import CommitOperationCopy, CommitOperationDelete

    stale = sorted(others(before, files))
    operations: list[Any] = [CommitOperationDelete(name, is_folder=False) for name in stale]
    for file in files:
        if file.is_there(before.files.get(file.name)):
            continue
        if source.files[file.name].sha256 is not None:
            operations.append(CommitOperationCopy(file.name, file.name, src_revision=source.commit))
        else:
            # A file that git holds has no address on the Hub that a commit could name: the client, too, sends its bytes.
            operations.append(addition(file))
    return operations


def others(tree: Tree, files: Sequence[Outgoing]) -> set[str]:
    # The Hub writes .gitattributes itself, and without it forgets which files are large.
    return set(tree.files) - {file.name for file in files} - {".gitattributes"}


def is_exactly(tree: Tree, files: Sequence[Outgoing]) -> bool:
    return not others(tree, files) and all(file.is_there(tree.files.get(file.name)) for file in files)
