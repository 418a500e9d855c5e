"""Names mean what their spelling says, whatever lies on the disk."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nla_hub.errors import CheckpointError, InputError, NLAError, UnknownNameError
from nla_hub.hub import HubOptions
from nla_hub.locate import Ref, parse_name, resolve_pair
from nla_hub.testing import RandomPair


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("tiny", Ref("zoo", "tiny")),
        ("qwen2.5-7b", Ref("zoo", "qwen2.5-7b")),
        ("tiny@v1", Ref("zoo", "tiny", "v1")),
        ("owner/name", Ref("hub", "owner/name")),
        ("owner/name@v1", Ref("hub", "owner/name", "v1")),
        ("owner/name@refs/pr/3", Ref("hub", "owner/name", "refs/pr/3")),
        ("owner/na.me_x-av", Ref("hub", "owner/na.me_x-av")),
        ("./tiny", Ref("directory", "tiny")),
        ("../x", Ref("directory", "../x")),
        ("/a/b", Ref("directory", "/a/b")),
        ("./a@b", Ref("directory", "a@b")),
        (".", Ref("directory", ".")),
        ("..", Ref("directory", "..")),
        (Path("owner/name"), Ref("directory", "owner/name")),
        (Path("tiny"), Ref("directory", "tiny")),
    ],
)
def test_the_spelling_decides(name: Any, expected: Ref) -> None:
    assert parse_name(name) == expected


def test_a_tilde_is_the_home_directory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert parse_name("~/x") == Ref("directory", str(tmp_path / "x"))
    assert parse_name(Path("~/x")) == Ref("directory", str(tmp_path / "x"))


@pytest.mark.parametrize("name", ["owner/name", "tiny"])
def test_what_lies_on_the_disk_does_not_change_a_name(
    name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    before = parse_name(name)
    (tmp_path / name).mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert parse_name(name) == before
    assert before.kind != "directory"


@pytest.mark.parametrize("name", ["", "  ", None, 7, "owner/name@", "a/b/c", "owner/na me", "a\\b", "/ab"[1:] + "/"])
def test_names_that_mean_nothing_are_refused(name: Any) -> None:
    with pytest.raises(InputError):
        parse_name(name)


def test_a_revision_is_given_once(tmp_path: Path) -> None:
    assert (
        parse_name("owner/name", revision="v1")
        == parse_name("owner/name@v1")
        == parse_name("owner/name@v1", revision="v1")
    )
    with pytest.raises(InputError, match="Two different revisions"):
        parse_name("owner/name@v1", revision="v2")
    for directory in ("./x", tmp_path):
        with pytest.raises(InputError, match="A directory has no revisions"):
            parse_name(directory, revision="v1")


def test_the_packaged_pair_has_no_revisions() -> None:
    for keywords in ({"name": "tiny", "revision": "v1"}, {"name": "tiny@v1"}):
        with pytest.raises(InputError, match="packaged pair has no revisions"):
            resolve_pair(**keywords)


@given(st.text(max_size=30))
def test_every_spelling_is_a_name_or_a_typed_error(name: str) -> None:
    try:
        ref = parse_name(name)
    except NLAError:
        return
    assert ref.kind in ("zoo", "hub", "directory", "package")
    assert not (ref.kind == "hub" and ref.name.count("/") != 1)


@pytest.mark.parametrize(
    ("wrong", "near"), [("qwen2.5-7B", "qwen2.5-7b"), ("gemma-3-27", "gemma-3-27b"), ("tny", "tiny")]
)
def test_an_unknown_name_gets_the_near_ones(wrong: str, near: str) -> None:
    with pytest.raises(UnknownNameError, match="did you mean") as caught:
        resolve_pair(wrong)
    assert near in caught.value.suggestions


def test_an_unknown_name_without_near_ones_gets_all(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UnknownNameError, match=r"known: .*gemma-3-12b.*tiny"):
        resolve_pair("zzzzzzzz")


def test_a_bare_name_of_an_existing_directory_says_how_to_write_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "mine").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UnknownNameError, match=r"write \./mine"):
        resolve_pair("mine")


def test_the_zoo_and_a_directory_called_like_an_entry_are_two_things(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "tiny").mkdir()
    monkeypatch.chdir(tmp_path)
    assert resolve_pair("tiny").av is not None
    assert resolve_pair("tiny").av.kind == "package"  # type: ignore[union-attr]
    assert resolve_pair("./tiny").av == Ref("directory", "tiny")


def test_a_zoo_name_stands_for_pinned_repositories() -> None:
    refs = resolve_pair("gemma-3-12b")
    assert refs.av == Ref("hub", "kitft/nla-gemma3-12b-L32-av", "7aec22599e8a9cd533564868999b443fcc963cf4")
    assert refs.ar == Ref("hub", "kitft/nla-gemma3-12b-L32-ar", "3d6901d8243182d642af9dea452ca91549a94615")
    assert refs.base == Ref("hub", "google/gemma-3-12b-it")
    other = resolve_pair("gemma-3-12b", revision="main", ar="owner/x", base_model="./b")
    assert other.av == Ref("hub", "kitft/nla-gemma3-12b-L32-av", "main")
    assert (other.ar, other.base) == (Ref("hub", "owner/x"), Ref("directory", "b"))


def test_a_hub_av_has_its_ar_beside_it() -> None:
    assert resolve_pair("owner/name-av@v1").ar == Ref("hub", "owner/name-ar")
    assert resolve_pair("owner/avav").ar is None
    assert resolve_pair("owner/name-av", ar="owner/other").ar == Ref("hub", "owner/other")


def test_directories_of_a_pair_are_found_by_their_layout(copied: RandomPair, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (copied.root, copied.av, str(copied.av)):
        refs = resolve_pair(name)
        assert (refs.av, refs.ar, refs.base) == tuple(
            Ref("directory", str(p)) for p in (copied.av, copied.ar, copied.source)
        )
    copied.av.rename(copied.root / "mine-av")
    copied.ar.rename(copied.root / "mine-ar")
    assert resolve_pair(copied.root / "mine-av").ar == Ref("directory", str(copied.root / "mine-ar"))
    monkeypatch.chdir(copied.root / "mine-av")
    assert resolve_pair(".").ar == Ref("directory", str(copied.root / "mine-ar"))
    (copied.root / "mine-ar").rename(copied.root / "elsewhere")
    assert resolve_pair(copied.root / "mine-av").ar is None


@pytest.mark.parametrize("part", ["ar", "base_model"])
def test_parts_may_be_named_by_a_zoo_entry_too(part: str) -> None:
    refs = resolve_pair("owner/name-av", **{part: "qwen2.5-7b"})
    if part == "ar":
        assert refs.ar == Ref("hub", "kitft/nla-qwen2.5-7b-L20-ar")
    else:
        assert refs.base == Ref("hub", "Qwen/Qwen2.5-7B-Instruct")
    with pytest.raises(UnknownNameError):
        resolve_pair("owner/name-av", **{part: "gpt2"})


def test_a_directory_that_is_not_there_is_a_typed_error(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="There is no such directory"):
        resolve_pair(tmp_path / "absent")
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match="a file, not a directory"):
        Ref("directory", str(tmp_path / "file")).fetch(HubOptions())


def test_package_directories_are_a_zoo_entrys_business_alone() -> None:
    with pytest.raises(InputError, match="neither a Hub name nor a directory"):
        parse_name("package:tiny/weights/av")
