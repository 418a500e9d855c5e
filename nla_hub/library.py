"""Checkpoints as trees of files: their names at once, their contents when they are needed, each at one commit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from nla_hub import hub, layouts
from nla_hub.hub import HubOptions
from nla_hub.layouts import Place
from nla_hub.locate import Ref
from nla_hub.weights import inside


@dataclass
class Checkpoint:
    """A directory or repository whose file names are known; its files are fetched when they are needed, each once."""

    ref: Ref
    options: HubOptions
    files: tuple[str, ...]
    sizes: Mapping[str, int] = field(default_factory=dict)
    commit: str | None = None
    cached: bool = False
    """Its files are those that the cache has: nobody answered."""
    _root: Path | None = None
    _here: set[str] = field(default_factory=set)

    @classmethod
    def open(cls, ref: Ref, options: HubOptions) -> Checkpoint:
        """The names of a checkpoint's files.

        Raises:
            CheckpointError: no such directory. HubError and its children: see `hub.listing`.
        """
        if ref.kind == "hub":
            listing = hub.listing(ref.name, revision=ref.revision, options=options)
            return cls(ref, options, tuple(listing.files), listing.files, listing.commit, listing.cached)
        root = ref.fetch(options)
        # A downloaded snapshot lies in a directory named after its commit.
        commit = root.name if root.parent.name == "snapshots" else None
        return cls(ref, options, tuple(layouts.files_below(root)), {}, commit, _root=root)

    def fetch(self, names: Sequence[str]) -> Path:
        """Have these files on disk; the local directory that they are in, under their names."""
        if self.ref.kind != "hub":
            assert self._root is not None
            for name in names:
                path = self._root / name
                if path.is_symlink():
                    inside(path.parent, path.name)
            return self._root
        wanted = [name for name in names if name not in self._here]
        if wanted or self._root is None:
            self._root = hub.fetch_files(
                self.ref.name, wanted, revision=self.ref.revision, commit=self.commit, options=self.options
            )
            self._here.update(wanted)
        return self._root


class Library:
    """The checkpoints that one pair is opened from: each is listed once, so all of its files are of one commit."""

    def __init__(self, options: HubOptions | None = None) -> None:
        self.options = options or HubOptions()
        self._opened: dict[Ref, Checkpoint] = {}

    def open(self, ref: Ref) -> Checkpoint:
        """The checkpoint of a name; see `Checkpoint.open`."""
        key = replace(ref, subfolder="")
        if key not in self._opened:
            self._opened[key] = Checkpoint.open(key, self.options)
        return self._opened[key]


@dataclass(frozen=True)
class Under:
    """A complete model that something lies on: a folder of a checkpoint."""

    checkpoint: Checkpoint
    folder: str

    def fetch(self, *, weights: bool = True) -> Path:
        """Have it on disk; its directory."""
        place = Place(self.folder, "model", None, None, False)
        return self.checkpoint.fetch(layouts.files_of(self.checkpoint.files, place, weights=weights)) / self.folder
