"""Releases of a few bytes, for tests of how they are published; and the history of a Hub, searched for halves of them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from hub_world import HubWorld

from nla_hub.hub import HubOptions
from nla_hub.hub.writing import HubWriter
from nla_hub.publish.plan import PushOptions
from nla_hub.publish.push import Pushed, push
from nla_hub.publish.release import Entry, Release, StagedRepo, release_id

AR, AV = "owner/nla-x-L1-ar", "owner/nla-x-L1-av"
CARD = b"---\nlibrary_name: nla-hub\ntags: [nla]\n---\n"


def repo_of(name: str, role: Any, files: Mapping[str, bytes | Path], kind: Any = "model") -> StagedRepo:
    return StagedRepo(name, kind, role, tuple(Entry(n, c) for n, c in sorted(files.items())))


def release_of(repos: Iterable[StagedRepo], tag: str) -> Release:
    staged = tuple(repos)
    id = release_id([entry.called(f"{repo.role}/{entry.name}") for repo in staged for entry in repo.entries])
    return Release(staged, id, tag)


def pair(word: str = "first", tag: str = "v1", *, more: Mapping[str, bytes] | None = None) -> Release:
    """Two repositories of three files each, and what is `more` in both; the weights differ by `word`, and by half."""
    repos = []
    for name, role in ((AR, "ar"), (AV, "av")):
        files = {
            "README.md": CARD + f"# {role} {word} {tag}\n".encode(),
            "config.json": b'{"hidden_size": 4}\n',
            "model.safetensors": f"{role} {word} ".encode() * 500,
            **(more or {}),
        }
        repos.append(repo_of(name, role, files))
    return release_of(repos, tag)


def publish(release: Release, **options: Any) -> Pushed:
    """Push with this process's token, checked by checksums."""
    hub = HubOptions()
    return push(release, PushOptions(**{"verify": "checksums", **options}), writer=HubWriter(hub), hub=hub)


def already(world: HubWorld, release: Release) -> None:
    """Put a release on the Hub as if it had been published."""
    for repo in release.repos:
        commit = world.seed(repo.name, contents(repo), repo.kind)
        world.store.repo(repo.name, repo.kind).tags[release.tag] = commit


def contents(repo: StagedRepo) -> dict[str, bytes]:
    return {entry.name: b"".join(entry.chunks()) for entry in repo.entries}


def large(release: Release) -> set[str]:
    """sha256 of the files that the Hub keeps apart."""
    return {e.sha256 for repo in release.repos for e in repo.entries if e.name.endswith((".safetensors", ".parquet"))}


def never_half(world: HubWorld, *releases: Release, revision: str = "main") -> None:
    """Every commit that the branch ever had is the Hub's own, or the whole of one of these releases."""
    for repo in (repo for release in releases for repo in release.repos):
        if not world.exists(repo.name, repo.kind):
            continue
        whole = [contents(r) for release in releases for r in release.repos if r.name == repo.name]
        for commit in world.commits(repo.name, revision, repo.kind):
            held = {n: b.path.read_bytes() for n, b in commit.files.items() if n != ".gitattributes"}
            assert held == {} or held in whole, f"{repo.name}@{commit.id}: {sorted(held)}"


def complete(world: HubWorld, release: Release) -> None:
    """The release is on main, tagged, in one commit each, and nothing is left over of the way there."""
    for repo in release.repos:
        assert world.files(repo.name, kind=repo.kind) == contents(repo)
        assert world.tags(repo.name, repo.kind)[release.tag] == world.branches(repo.name, repo.kind)["main"]
        assert list(world.branches(repo.name, repo.kind)) == ["main"]


def snapshot(directory: Path) -> dict[str, tuple[int, str]]:
    """Every file below a directory: its times and what is in it."""
    return {
        path.relative_to(directory).as_posix(): (
            path.stat().st_mtime_ns,
            hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "",
        )
        for path in sorted(directory.rglob("*"))
    }
