"""Whether what lies on the Hub is the pair that was sent: downloaded, loaded by its name and scored beside the local one.

Checksums are compared by `plan.faults`; here the pair has to work.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nla_hub.errors import PublishError
from nla_hub.hub import HubOptions
from nla_hub.hub.cache import cache_folder
from nla_hub.publish.plan import PushOptions
from nla_hub.publish.release import Release, StagedRepo
from nla_hub.round_trip import TEXTS
from nla_hub.units import size

if TYPE_CHECKING:
    from torch import Tensor

    from nla_hub.nla import NLA, Component

SCORED_BELOW = 20 * 10**9
"""Bytes of a release up to which it is downloaded and scored unasked."""

TOLERANCE = 1e-6
"""How far vectors (largest difference over largest value) and cosines of the two pairs may lie apart."""

ROOM = 1.1
"""Free disk that a download takes, in multiples of its size."""

SEED = 0
"""Of the vectors that an AV without an AR is asked about."""

MAX_NEW_TOKENS = 200
"""Bound of the greedy explanations; `NLA.verbalize`'s own."""


HALVES: tuple[Component, ...] = ("av", "ar")


@dataclass(frozen=True)
class LocalPair:
    """The pair on this machine that a release was made from.

    Attributes:
        av, ar: directories of the halves; None for one that is not published.
        base_model: what was told about the base model, as `NLA.from_pretrained` takes it.
    """

    av: Path | None
    ar: Path | None
    base_model: str | None = None


@dataclass(frozen=True)
class Figures:
    """What a pair answers to `round_trip.TEXTS`.

    Attributes:
        vectors: the AR's of the texts, float32 [6, d]; without an AR drawn from a normal distribution under `SEED`.
        words: the AV's greedy outputs for those vectors; None without an AV.
        cosines: of what the AR makes of these with the vectors (None for unusable ones); None unless both are there.
    """

    vectors: Tensor
    words: tuple[str, ...] | None
    cosines: tuple[float | None, ...] | None

    def differences(self, other: Figures) -> list[str]:
        """Where `other` does not answer the same, a sentence each."""
        import torch

        found = []
        if self.vectors.shape != other.vectors.shape:
            return [f"vectors of shape {tuple(other.vectors.shape)} where {tuple(self.vectors.shape)} are expected"]
        apart = float((self.vectors.double() - other.vectors.double()).abs().max() / self.vectors.double().abs().max())
        if not apart <= TOLERANCE or not torch.isfinite(other.vectors).all():
            found.append(f"the AR's vectors of {len(TEXTS)} texts differ by {apart:.2g} of their largest value")
        for i, (mine, its) in enumerate(zip(self.words or (), other.words or (), strict=True)):
            if mine != its:
                found.append(f"the AV says {its[:60]!r} of vector {i}, and {mine[:60]!r} here")
        for i, (a, b) in enumerate(zip(self.cosines or (), other.cosines or (), strict=True)):
            if (a is None) != (b is None) or (a is not None and b is not None and not abs(a - b) <= TOLERANCE):
                found.append(f"vector {i} comes back with cosine {b}, and {a} here")
        return found


def figures(nla: NLA, halves: tuple[Component, ...]) -> Figures:
    """Ask a loaded pair."""
    import torch

    if "ar" in halves:
        vectors = nla.reconstruct(list(TEXTS))
    else:
        vectors = torch.randn(len(TEXTS), nla.d_model, generator=torch.Generator().manual_seed(SEED))
    if "av" not in halves:
        return Figures(vectors, None, None)
    said = nla.verbalize(vectors, temperature=0, max_new_tokens=MAX_NEW_TOKENS, show_progress_bar=False)
    scores = nla.score(said, vectors) if "ar" in halves else None
    return Figures(vectors, tuple(e.raw for e in said), None if scores is None else scores.cosine)


def halves_of(release: Release) -> tuple[Component, ...]:
    """The halves that a release publishes; none of a data set."""
    roles = {repo.role for repo in release.repos}
    if "pair" in roles:
        return HALVES
    return tuple(half for half in HALVES if half in roles)


def depth(release: Release, options: PushOptions) -> tuple[bool, str]:
    """Whether a release is scored after it was published, and the sentence that says how it is checked.

    Raises:
        PublishError: `--verify score` where there is no room for the download.
    """
    sums = "every file by its checksum"
    if not halves_of(release) or options.create_pr or options.verify == "checksums":
        return False, sums
    total = release.size
    if options.verify is None and total >= SCORED_BELOW:
        return False, f"{sums}; not downloaded and scored, since it is {size(total)} (--verify score does it)"
    facts = release.facts
    if options.verify is None and facts is not None and facts.form == "lora" and not _is_cached(facts.base_model):
        return (
            False,
            f"{sums}; not downloaded and scored: {facts.base_model} is not in the cache (--verify score gets it)",
        )
    place, free = _room(options.place)
    if free < total * ROOM:
        lacks = f"{place} has {size(free)} free, and the download takes {size(total * ROOM)}"
        if options.verify == "score":
            raise PublishError(
                "There is no room to download the release and score it.",
                where=place,
                got=f"{size(free)} free",
                expected=size(total * ROOM),
                next_step="--work DIR on a larger disk, or --verify checksums",
            )
        return False, f"{sums}; not downloaded and scored: {lacks}"
    return True, f"{sums}; then downloaded, loaded by its name and scored on {len(TEXTS)} vectors"


def _is_cached(repo: str) -> bool:
    """Whether the cache has something of a model repository."""
    return (cache_folder(repo, None) / "snapshots").is_dir()


def _room(place: Path | None) -> tuple[Path, int]:
    """Where the download would lie, and how many bytes are free there."""
    try:
        place = place or Path(tempfile.gettempdir())
    except OSError:  # a machine on which nothing can be written
        return Path("/"), 0
    there = next(path for path in (place, *place.absolute().parents) if path.exists())
    return place, shutil.disk_usage(there).free


def expected(release: Release, local: LocalPair | None, options: PushOptions, hub: HubOptions) -> Figures:
    """What the local pair answers: the one that `local` names, else the release's own files.

    Raises:
        CheckpointError and its children, HubError and its children: as loading it does.
    """
    if local is not None:
        return _ask(local, release, hub)
    with tempfile.TemporaryDirectory(prefix="nla-hub-push-", dir=options.place) as scratch:
        roots: dict[str, Path] = {}
        for repo in release.repos:
            folder = Path(scratch) / repo.role
            _lay_out(repo, folder)
            roots |= {"av": folder / "av", "ar": folder / "ar"} if repo.role == "pair" else {repo.role: folder}
        return _ask(LocalPair(roots.get("av"), roots.get("ar")), release, hub)


def _lay_out(repo: StagedRepo, folder: Path) -> None:
    """The repository as a directory. Files are hard links where that can be: links that lead outside are not loaded."""
    for entry in repo.entries:
        path = folder / entry.name
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(entry.content, bytes):
            path.write_bytes(entry.content)
            continue
        try:
            path.hardlink_to(entry.content.resolve())
        except OSError:  # another file system, or one without them
            shutil.copyfile(entry.content, path)


def _ask(local: LocalPair, release: Release, hub: HubOptions) -> Figures:
    first = local.av or local.ar
    assert first is not None
    ar = local.ar if local.av is not None else None
    return _figures(release, hub, first, ar=ar, base_model=local.base_model)


def published(release: Release, commits: dict[str, str], options: PushOptions, hub: HubOptions) -> Figures:
    """What the pair on the Hub answers, downloaded at these commits (repository -> commit) and loaded by its name.

    It is downloaded into a cache of its own, which is removed; only a base model that factors lie on comes from the
    usual one. On main the AR is found as a reader finds it, elsewhere it is named.

    Raises:
        CheckpointError and its children, HubError and its children: as loading it does.
    """
    first = release.repos[-1]  # the AV, or the only one
    last = next((repo for repo in release.repos if repo.role == "ar" and repo is not first), None)
    named = last is not None and (options.tag_only or options.target != "main")
    ar = f"{last.name}@{commits[last.name]}" if last is not None and named else None
    with _fresh_cache(release, options, hub) as fresh:
        return _figures(release, fresh, first.name, ar=ar, revision=commits[first.name])


@contextmanager
def _fresh_cache(release: Release, options: PushOptions, hub: HubOptions) -> Iterator[HubOptions]:
    with tempfile.TemporaryDirectory(prefix="nla-hub-check-", dir=options.place) as scratch:
        facts = release.facts
        if facts is not None and facts.form == "lora":
            base = cache_folder(facts.base_model, hub.cache_dir)
            base.mkdir(parents=True, exist_ok=True)
            cache_folder(facts.base_model, scratch).symlink_to(base.resolve(), target_is_directory=True)
        yield replace(hub, cache_dir=scratch, local_files_only=False, force_download=False)


def _figures(release: Release, hub: HubOptions, name: str | Path, **others: Any) -> Figures:
    from nla_hub.nla import NLA

    halves = halves_of(release)
    with NLA.from_pretrained(
        name,
        components=halves,
        engine="transformers",
        token=hub.token,
        cache_dir=hub.cache_dir,
        local_files_only=hub.local_files_only,
        **others,
    ) as nla:
        return figures(nla, halves)
