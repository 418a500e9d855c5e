"""Halves of one push are opened together, whatever moment of another push they are read at; halves of two are refused."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import Case
from hub_world import HubWorld, connected
from huggingface_hub import constants

from nla_hub import NLA, hub, zoo
from nla_hub.cli.output import configure
from nla_hub.errors import CheckpointError, SidecarError
from nla_hub.hub import HubOptions
from nla_hub.loading import Pair, open_pair
from nla_hub.locate import PairRefs, Ref, half_named, resolve_pair, sibling_names
from nla_hub.log import logger
from nla_hub.sidecar import ReleaseRecord, Sidecar
from nla_hub.zoo import ZooEntry

AV, AR = "owner/nla-x-L2-av", "owner/nla-x-L2-ar"
OLD, NEW = ReleaseRecord("0" * 11 + "a", "v1"), ReleaseRecord("0" * 11 + "b", "v2")


class Halves:
    """Two repositories, and what is published there."""

    def __init__(self, world: HubWorld, case: Case, root: Path) -> None:
        self.world, self.case, self.root = world, case, root
        self.commits: dict[str, str] = {}

    def half(self, role: str, release: ReleaseRecord | None, **changes: Any) -> Path:
        """A half on disk, as the sidecar of a release has it."""
        place = self.root / f"{role}-{len(list(self.root.iterdir()))}"
        shutil.copytree(getattr(self.case.pair, role), place)
        sidecar = Sidecar.read(place).with_(release=release, pair_repo={"av": AR, "ar": AV}[role])
        sidecar.with_(**changes).write(place)
        return place

    def publish(self, role: str, release: ReleaseRecord | None, *, tag: bool = False, **changes: Any) -> str:
        """One commit on a half's main."""
        repo = {"av": AV, "ar": AR}[role]
        commit = self.world.seed(repo, self.half(role, release, **changes))
        if tag and release is not None:
            self.tag(repo, release.tag, commit)
        return commit

    def tag(self, repo: str, tag: str, commit: str) -> None:
        self.world.store.repo(repo, "model").tags[tag] = commit


@pytest.fixture
def halves(llama: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Halves]:
    (tmp_path / "halves").mkdir()
    with HubWorld(tmp_path / "hub") as world:
        connected(world, monkeypatch, tmp_path / "home")
        yield Halves(world, llama, tmp_path / "halves")


def opened(name: str | Path = AV, **keywords: Any) -> Pair:
    """As loading opens a pair, without its weights."""
    components = keywords.pop("components", ("av", "ar"))
    return open_pair(resolve_pair(name, **keywords), components=components, weights=False)


def ar_commit(pair: Pair) -> str | None:
    assert pair.ar is not None
    return pair.ar.checkpoint.commit


# -- at which revision the AR is opened ----------------------------------------------------------------------


def test_during_a_push_the_av_still_gets_the_ar_of_its_own_release(halves: Halves) -> None:
    halves.publish("av", OLD, tag=True)
    old = halves.publish("ar", OLD, tag=True)
    halves.publish("ar", NEW)  # the next push has come as far as this
    assert ar_commit(opened()) == old


def test_between_the_last_commit_and_the_tags_the_ar_is_taken_from_main(halves: Halves) -> None:
    for role in ("av", "ar"):
        halves.publish(role, OLD, tag=True)
    new = halves.publish("ar", NEW)
    halves.publish("av", NEW)
    assert ar_commit(opened()) == new


def test_an_earlier_revision_of_the_av_gets_the_ar_of_that_time(halves: Halves) -> None:
    first, old = halves.publish("av", OLD, tag=True), halves.publish("ar", OLD, tag=True)
    new = halves.publish("ar", NEW, tag=True)
    halves.publish("av", NEW, tag=True)
    assert ar_commit(opened()) == new
    assert ar_commit(opened(f"{AV}@{OLD.tag}")) == ar_commit(opened(AV, revision=first)) == old
    assert ar_commit(opened(f"{AV}@{OLD.tag}", components=("ar",))) == old


def test_a_copy_of_the_av_on_disk_gets_the_ar_of_its_release(halves: Halves) -> None:
    old = halves.publish("ar", OLD, tag=True)
    halves.publish("ar", NEW, tag=True)
    copy = halves.half("av", OLD)
    assert ar_commit(opened(copy)) == old


def test_a_named_pair_without_pinned_revisions_follows_the_release_and_a_pinned_one_its_pins(
    halves: Halves, monkeypatch: pytest.MonkeyPatch
) -> None:
    halves.publish("av", OLD, tag=True)
    old = halves.publish("ar", OLD, tag=True)
    new = halves.publish("ar", NEW)
    common: dict[str, Any] = {"av": AV, "ar": AR, "base": "random/source", "licence": "mit", "adapter": "llama"}
    sizes = {"layer": 2, "n_layers": 4, "d_model": 64, "summary": "x"}
    entries = {
        "free": ZooEntry(**common, **sizes, name="free"),
        "fixed": ZooEntry(**common, **sizes, name="fixed", ar_revision=new),
    }
    monkeypatch.setattr(zoo, "zoo", lambda: entries)
    assert ar_commit(opened("free")) == old
    with pytest.raises(CheckpointError, match="two different pushes"):
        opened("fixed")


@pytest.mark.parametrize("tag", ["../../../etc/cron.d/x", "/etc/x", "", "-x", "a//b", "v 1", "ü"])
def test_a_tag_that_is_none_is_not_asked_for(halves: Halves, tag: str) -> None:
    odd = ReleaseRecord(OLD.id, tag)
    main = halves.publish("ar", odd)
    halves.publish("av", odd)
    assert ar_commit(opened()) == main
    assert all(seen.status != 404 for seen in halves.world.requests)


def questions(halves: Halves, cache: Path) -> list[tuple[str, str | None, int | None]]:
    """What opening the pair with an empty cache asks for besides files."""
    before = len(halves.world.requests)
    open_pair(resolve_pair(AV), hub_options=HubOptions(cache_dir=cache), weights=False)
    asked = [s for s in halves.world.requests[before:] if s.stage in ("info", "tree")]
    return [(seen.stage, seen.repo, seen.status) for seen in asked]


def test_a_release_costs_no_request_and_a_tag_that_is_not_there_one(halves: Halves, tmp_path: Path) -> None:
    halves.publish("av", None)
    halves.publish("ar", None)
    free = questions(halves, tmp_path / "free")
    assert {repo for _, repo, _ in free} == {AV, AR}
    halves.publish("av", OLD, tag=True)
    commit = halves.publish("ar", OLD)
    untagged = questions(halves, tmp_path / "untagged")
    halves.tag(AR, OLD.tag, commit)
    assert questions(halves, tmp_path / "tagged") == free
    assert [q for q in untagged if q[2] == 404] == [("info", AR, 404)]
    assert [q for q in untagged if q[2] != 404] == free


@pytest.mark.parametrize("said", [OLD, None])
def test_both_halves_in_one_repository_are_of_one_commit(
    halves: Halves, caplog: pytest.LogCaptureFixture, said: ReleaseRecord | None
) -> None:
    both = halves.root / "both"
    shutil.copytree(halves.half("av", OLD, pair_repo="owner/both"), both / "av")
    shutil.copytree(halves.half("ar", said, pair_repo="owner/both"), both / "ar")
    commit = halves.world.seed("owner/both", both)
    with caplog.at_level(logging.WARNING):
        assert ar_commit(opened("owner/both")) == commit
    assert caplog.text == ""
    assert all("v1" not in seen.path for seen in halves.world.requests)


@pytest.mark.parametrize("tagged", [True, False], ids=["at its tag", "at main"])
def test_the_cache_answers_as_the_hub_did(halves: Halves, monkeypatch: pytest.MonkeyPatch, tagged: bool) -> None:
    halves.publish("av", OLD, tag=tagged)
    old = halves.publish("ar", OLD, tag=tagged)
    if tagged:
        halves.publish("ar", NEW)
        assert ar_commit(opened(AR, components=("ar",))) != old  # main is in the cache as well
    assert ar_commit(opened()) == old
    n = len(halves.world.requests)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert ar_commit(opened()) == old
    assert len(halves.world.requests) == n


def test_local_files_only_is_answered_by_the_cache(halves: Halves) -> None:
    halves.publish("av", OLD, tag=True)
    old = halves.publish("ar", OLD, tag=True)
    opened()
    n = len(halves.world.requests)
    again = open_pair(resolve_pair(AV), hub_options=HubOptions(local_files_only=True), weights=False)
    assert ar_commit(again) == old
    assert len(halves.world.requests) == n


# -- what is said where two pushes meet ----------------------------------------------------------------------


def test_a_push_that_was_cut_short_is_told(halves: Halves) -> None:
    halves.publish("av", OLD)  # nobody ever tagged it
    halves.publish("ar", NEW)
    with pytest.raises(CheckpointError, match="one is under way, or was cut short") as caught:
        opened()
    text = str(caught.value)
    for part in (AV, AR, OLD.id, "'v1'", NEW.id, "'v2'", "try again in a few minutes", f"{AV}@TAG", "nla-hub push"):
        assert part in text, text


def test_a_named_ar_of_another_release_is_no_pair_and_the_way_out_is_told(halves: Halves) -> None:
    halves.publish("av", NEW, tag=True)
    halves.publish("ar", OLD, tag=True)
    halves.publish("ar", NEW, tag=True)
    with pytest.raises(SidecarError, match="These two halves are not a pair") as caught:
        opened(AV, ar=f"{AR}@v1")
    assert f'ar="{AR}@v2"' in str(caught.value)
    assert OLD.id in str(caught.value) and NEW.id in str(caught.value)
    assert ar_commit(opened(AV, ar=f"{AR}@v2")) == ar_commit(opened(AV, ar=AR))


def test_a_named_ar_is_opened_where_the_user_says(halves: Halves) -> None:
    """main was asked for, although the AV's release has a tag there."""
    halves.publish("av", OLD, tag=True)
    halves.publish("ar", OLD, tag=True)
    free = halves.publish("ar", None)
    assert ar_commit(opened(AV, ar=AR)) == free


def test_two_copies_on_disk_are_told_to_be_fetched_again(halves: Halves) -> None:
    place = halves.root / "copies"
    shutil.copytree(halves.half("av", OLD), place / "av")
    shutil.copytree(halves.half("ar", NEW), place / "ar")
    with pytest.raises(CheckpointError, match="two different pushes") as caught:
        opened(place)
    assert "nla-hub download" in str(caught.value)
    assert "minutes" not in str(caught.value)


@pytest.mark.parametrize(("av", "ar", "with_", "without"), [(OLD, None, "AV", "AR"), (None, NEW, "AR", "AV")])
def test_a_half_without_a_release_beside_one_with_it_is_warned_about(
    halves: Halves,
    monkeypatch: pytest.MonkeyPatch,
    av: ReleaseRecord | None,
    ar: ReleaseRecord | None,
    with_: str,
    without: str,
) -> None:
    monkeypatch.setattr(logger, "handlers", [logging.NullHandler()])
    halves.publish("av", av)
    halves.publish("ar", ar)
    with pytest.warns(UserWarning, match=f"the {with_} is of release") as caught:
        NLA.from_pretrained(AV)
    assert [warning.filename for warning in caught] == [__file__]  # the reader's own line
    text = str(caught[0].message)
    release = av or ar
    assert release is not None
    for part in (
        AV,
        AR,
        release.id,
        release.tag,
        f"the {without} names no release",
        f'ar="{AR}@REVISION"',
        "push both",
    ):
        assert part in text, text
    assert ("a push is under way" in text) == (with_ == "AR")
    opened(AV, ar=AR)  # the user knows what belongs together


def test_the_command_line_says_it_in_one_line(
    halves: Halves, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(logger, "handlers", [logging.NullHandler()])
    monkeypatch.setattr(logger, "level", logger.level)
    configure(quiet=True)
    halves.publish("av", None)
    halves.publish("ar", NEW)
    opened()
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"warning: {AV} and {AR}: the AR is of release")


# -- repositories that a push has not reached ----------------------------------------------------------------


def begun(halves: Halves, role: str, *branches: str) -> str:
    """A repository with its first commit alone, and branches; its name."""
    repo = {"av": AV, "ar": AR}[role]
    commit = halves.world.seed(repo, {"README.md": b"# soon"})
    halves.world.store.repo(repo, "model").heads.update(dict.fromkeys(branches, commit))
    return repo


@pytest.mark.parametrize("missing", ["av", "ar"])
def test_a_first_push_that_has_not_reached_a_repository_is_told(halves: Halves, missing: str) -> None:
    repo = begun(halves, missing, f"nla-hub/{NEW.id}")
    if missing == "av":
        halves.publish("ar", NEW)
    else:
        halves.publish("av", None)
    with pytest.raises(CheckpointError, match="a push is under way, or was cut short") as caught:
        opened()
    assert caught.value.where == repo
    for part in (f"nla-hub/{NEW.id}", "try again in a few minutes", "its author", "nla-hub push"):
        assert part in str(caught.value)
    assert len(halves.world.of("refs")) == 1


def test_a_repository_without_a_push_holds_no_half_and_no_load_asks_for_branches(halves: Halves) -> None:
    halves.publish("ar", OLD, tag=True)
    begun(halves, "av", "nla-hubs", "dev")
    with pytest.raises(CheckpointError, match="No AV was found here"):
        opened()
    assert len(halves.world.of("refs")) == 1
    halves.publish("av", OLD, tag=True)
    halves.world.store.repo(AV, "model").heads[f"nla-hub/{NEW.id}"] = halves.world.branches(AV)["main"]  # the next push
    opened()
    assert len(halves.world.of("refs")) == 1


def test_only_a_branch_waits_for_a_push(halves: Halves) -> None:
    begun(halves, "av", f"nla-hub/{NEW.id}")
    commit = halves.world.branches(AV)["main"]
    halves.tag(AV, "old", commit)
    for revision in ("old", commit):  # these stay as they are
        with pytest.raises(CheckpointError, match="No AV was found here"):
            opened(f"{AV}@{revision}")
    with pytest.raises(CheckpointError, match="a push is under way"):
        opened(f"{AV}@main")


def test_without_a_network_nobody_is_asked_for_a_push(halves: Halves, monkeypatch: pytest.MonkeyPatch) -> None:
    begun(halves, "av", f"nla-hub/{NEW.id}")
    hub.fetch(AV, revision=None, options=HubOptions(), files=["README.md"])
    n = len(halves.world.requests)
    with pytest.raises(CheckpointError, match="No AV was found here"):
        open_pair(resolve_pair(AV), hub_options=HubOptions(local_files_only=True))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(CheckpointError, match="No AV was found here"):
        opened()
    assert len(halves.world.requests) == n


def test_a_hub_that_does_not_tell_its_branches_is_asked_once(halves: Halves) -> None:
    begun(halves, "av", f"nla-hub/{NEW.id}")
    halves.world.fail("refs", 503, times=9)
    with pytest.raises(CheckpointError, match="No AV was found here"):
        opened()
    assert len(halves.world.of("refs")) == 1


# -- names ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "half"),
    [
        ("nla-x-L2-av", "av"),
        ("nla-x-L2-AR", "ar"),
        ("x_Verbalizer_final", "av"),
        ("x-critic", "ar"),
        ("nla-x", None),
        ("lava-x", None),
        ("av-and-ar", None),
    ],
)
def test_the_half_that_a_name_speaks_of(name: str, half: str | None) -> None:
    assert half_named(name) == half
    assert bool(sibling_names(name)) == (half == "av" or name == "av-and-ar")


def test_who_named_the_ar() -> None:
    assert resolve_pair("owner/x-av").ar_guessed and not resolve_pair("owner/x-av").ar_named
    assert resolve_pair("owner/x-av", ar="owner/y").ar_named
    assert resolve_pair("qwen2.5-7b", ar="owner/y").ar_named and not resolve_pair("qwen2.5-7b").ar_named
    assert PairRefs("x", Ref("hub", "a/b"), None, None).ar_named is False
