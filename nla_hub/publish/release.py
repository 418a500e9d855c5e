"""What a release is made of: repositories, and in each of them files that exist on disk or are bytes made for the occasion.

Nothing is copied to be published: weights stay where they are until they are sent. Nothing here talks to anybody.
"""

from __future__ import annotations

import hashlib
import io
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import BinaryIO, Literal

from nla_hub.publish.facts import ReleaseFacts

RepoKind = Literal["model", "dataset"]
"""What the Hub calls the type of a repository."""

RepoRole = Literal["av", "ar", "pair", "data"]
"""What a repository of a release holds: one half, both in folders, or a data set."""

LARGEST_FILE = 50 * 10**9
"""Bytes that the Hub takes a file (https://huggingface.co/docs/hub/repositories-recommendations)."""

CHUNK = 2**22
"""Bytes read at a time."""

_DESCRIBES = re.compile(r"(?:.*/)?(?:nla_meta\.yaml|README\.md|\.eval_results/.*|LICENSE.*|NOTICE.*|USE_POLICY\.md)")
"""Files that speak about the others: a release with other words about the same weights has the same id."""


@dataclass(frozen=True)
class Entry:
    """One file of a repository.

    Attributes:
        name: its path in the repository, with slashes.
        content: where it lies, or what it holds.
    """

    name: str
    content: Path | bytes

    @cached_property
    def size(self) -> int:
        """Bytes."""
        return len(self.content) if isinstance(self.content, bytes) else self.content.stat().st_size

    def open(self) -> BinaryIO:
        """A stream over its bytes."""
        return io.BytesIO(self.content) if isinstance(self.content, bytes) else self.content.open("rb")

    def chunks(self) -> Iterator[bytes]:
        """Its bytes, piece by piece."""
        with self.open() as stream:
            while piece := stream.read(CHUNK):
                yield piece

    @cached_property
    def hashes(self) -> tuple[str, str]:
        """sha256 of its bytes (what the Hub calls a large file by), and git's hash of it as a blob (a small one); read once."""
        large, small = hashlib.sha256(), hashlib.sha1(b"blob %d\0" % self.size, usedforsecurity=False)
        for piece in self.chunks():
            large.update(piece)
            small.update(piece)
        return large.hexdigest(), small.hexdigest()

    def called(self, name: str) -> Entry:
        """The same file under another name; what was hashed of it is not hashed again."""
        other = Entry(name, self.content)
        other.__dict__.update({key: value for key, value in self.__dict__.items() if key in ("size", "hashes")})
        return other

    @property
    def sha256(self) -> str:
        """sha256 of its bytes."""
        return self.hashes[0]

    @property
    def git_oid(self) -> str:
        """git's hash of it as a blob."""
        return self.hashes[1]


@dataclass(frozen=True)
class StagedRepo:
    """One repository as it is to be.

    Attributes:
        name: owner/name.
        kind, role: see `RepoKind`, `RepoRole`.
        entries: all of its files, sorted by name.
        to_be_written: weights that a form needs and that nobody has written yet (a dry run): name -> estimated bytes.
    """

    name: str
    kind: RepoKind
    role: RepoRole
    entries: tuple[Entry, ...]
    to_be_written: Mapping[str, int] = field(default_factory=dict)

    @property
    def size(self) -> int:
        """Bytes of all files, those still to be written included."""
        return sum(entry.size for entry in self.entries) + sum(self.to_be_written.values())

    def entry(self, name: str) -> Entry | None:
        """The file of that name."""
        return next((entry for entry in self.entries if entry.name == name), None)


@dataclass(frozen=True)
class Release:
    """What one push publishes.

    Attributes:
        repos: in the order in which they appear on the Hub: the AR before the AV that points to it.
        id: twelve hex digits, see `release_id`; None where weights are still to be written.
        tag: what the revision is called once everything is there.
        facts: what the cards say; None for data sets.
    """

    repos: tuple[StagedRepo, ...]
    id: str | None
    tag: str
    facts: ReleaseFacts | None = None

    @property
    def size(self) -> int:
        """Bytes of all repositories."""
        return sum(repo.size for repo in self.repos)


def release_id(entries: Sequence[Entry]) -> str:
    """Twelve hex digits over names and contents of what is loaded: weights, configurations, tokenizers.

    Sidecars, cards and licences are left out: they name the id themselves.
    """
    total = hashlib.sha256()
    for entry in sorted(entries, key=lambda e: e.name):
        if not _DESCRIBES.fullmatch(entry.name):
            total.update(f"{entry.name}\0{entry.sha256}\n".encode())
    return total.hexdigest()[:12]
