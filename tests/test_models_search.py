"""The Hub's pairs: found by tags, put together by name, printed without trust; and what named pairs are behind of."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from datetime import UTC, date, datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from hub_world import HubWorld, connected
from huggingface_hub import constants
from typer.testing import CliRunner, Result

from nla_hub import zoo
from nla_hub.cli.app import app
from nla_hub.errors import HubUnreachableError
from nla_hub.hub import HubOptions, search
from nla_hub.hub.search import ListedModel, listed_models, now
from nla_hub.hub_pairs import TAGS, HubPair, hub_pairs, paired
from nla_hub.zoo import ZooEntry, updates

VERBALIZER, RECONSTRUCTOR = "activation-verbalizer", "activation-reconstructor"
BASE = "Qwen/Qwen3-8B"
COMMON: Mapping[str, Any] = {"library_name": "nla-hub", "license": "apache-2.0", "base_model": BASE}


def card(**fields: Any) -> bytes:
    return f"---\n{yaml.safe_dump(fields, allow_unicode=True)}---\n# A card\n".encode()


def publish(world: HubWorld, repo: str, downloads: int = 0, **fields: Any) -> str:
    commit = world.seed(repo, {"README.md": card(**fields)})
    world.store.repo(repo, "model").downloads = downloads
    return commit


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubWorld]:
    with HubWorld(tmp_path / "hub") as world:
        connected(world, monkeypatch, tmp_path / "home")
        publish(world, "one/nla-qwen3-8b-L24-av", 7, **COMMON, tags=["nla", VERBALIZER])
        publish(world, "one/nla-qwen3-8b-L24-ar", 5, **COMMON, tags=["nla", RECONSTRUCTOR])
        publish(world, "two/Gemma-NLA-L3-Actor", 90, tags=["nla"], license="gemma", base_model="google/gemma-3-12b-it")
        publish(world, "two/Gemma-NLA-L3-Critic", 1, tags=["nla"], base_model="google/gemma-3-12b-it")
        publish(world, "three/both", 3, **COMMON, tags=[VERBALIZER, RECONSTRUCTOR], base_model_relation="finetune")
        publish(world, "four/lonely-ar", 2, **COMMON, tags=["nla"])
        publish(world, "kitft/nla-qwen2.5-7b-L20-av", 400, tags=["nla"], base_model="Qwen/Qwen2.5-7B-Instruct")
        publish(world, "five/llama", 10**6, tags=["text-generation"])
        yield world


def models(*args: str) -> Result:
    result = CliRunner().invoke(app, ["models", *args])
    assert result.exit_code == 0, result.stderr + str(result.exception)
    return result


def rows(*args: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in models("search", "--json", *args).stdout.splitlines()]


def of_hub(*args: str) -> list[tuple[str | None, str | None]]:
    return [(row["av"], row["ar"]) for row in rows(*args) if row["zoo"] is None]


# -- what is found -------------------------------------------------------------------------------------------

PAIRS = [
    ("two/Gemma-NLA-L3-Actor", "two/Gemma-NLA-L3-Critic"),
    ("one/nla-qwen3-8b-L24-av", "one/nla-qwen3-8b-L24-ar"),
    ("three/both", "three/both"),
    (None, "four/lonely-ar"),
]


def test_pairs_are_found_by_their_tags_the_most_downloaded_first(world: HubWorld) -> None:
    assert of_hub() == PAIRS
    assert len(world.of("models")) == len(TAGS)
    (row,) = rows("one/nla")
    assert row["base_model"] == BASE and row["layer"] == 24 and row["licence"] == "apache-2.0"
    assert row["downloads"] == 7 and row["distribution"] == "nla-hub"
    assert row["updated"] == datetime.now(UTC).date().isoformat() or row["updated"]
    assert set(row) == set(rows("tiny")[0]), "the keys of a named pair"


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        (["GEMMA"], PAIRS[:1]),
        (["actor"], PAIRS[:1]),
        (["critic"], PAIRS[:1]),
        (["apache-2.0", "l24"], PAIRS[1:2]),
        (["nla-hub"], PAIRS[1:]),
        (["--base-model", BASE], PAIRS[1:]),
        (["--base-model", "qwen3"], PAIRS[1:]),
        (["--base-model", "qwen/qwen4"], []),
        (["--role", "av"], PAIRS[:3]),
        (["--role", "ar"], PAIRS),
        (["--author", "one"], PAIRS[1:2]),
        (["--author", "nobody"], []),
    ],
)
def test_what_is_asked_for(world: HubWorld, args: list[str], expected: list[Any]) -> None:
    assert of_hub(*args) == expected


def test_named_pairs_come_first_with_what_the_hub_says_of_them(world: HubWorld) -> None:
    found = rows("qwen")
    assert [row["name"] for row in found][:3] == ["qwen2.5-7b", "qwen2.5-7b-L20-syvb", "qwen3-8b-L24-syvb"]
    assert found[0]["downloads"] == 400 and found[0]["updated"] and found[0]["zoo"] == "qwen2.5-7b"
    assert found[1]["downloads"] is None, "it is not on this Hub"
    assert not any(row["name"].startswith("kitft/") for row in found), "named once"
    (row,) = rows("kitft")
    assert row["zoo"] == "qwen2.5-7b", "found by its repository alone it is marked all the same"
    assert [row["name"] for row in rows("--author", "kitft") if row["zoo"] == row["name"]] == [
        "qwen2.5-7b",
        "gemma-3-12b",
        "gemma-3-27b",
        "llama-3.3-70b",
    ]
    assert "tiny" not in [row["name"] for row in rows("--base-model", "qwen")]


def test_the_table(world: HubWorld) -> None:
    lines = models("search", "qwen3").stdout.splitlines()
    assert lines[0].split() == ["name", "base", "model", "layer", "licence", "zoo", "downloads", "updated", "AR"]
    assert lines[1].split()[0] == "qwen3-8b-L24-syvb" and lines[1].split()[2:4] == ["24/36", "not"]
    assert lines[2].split()[:6] == ["one/nla-qwen3-8b-L24-av", BASE, "24", "apache-2.0", "-", "7"]
    assert lines[2].split()[-1] == "one/nla-qwen3-8b-L24-ar"
    assert lines[-1].split()[0] == "four/lonely-ar"


def test_rehearsals_are_left_out(world: HubWorld) -> None:
    for role, tag in (("av", VERBALIZER), ("ar", RECONSTRUCTOR)):
        publish(world, f"six/nla-x-L2-{role}", 10**9, **COMMON, tags=["nla", tag, "rehearsal"])
    assert of_hub() == PAIRS
    publish(world, "six/nla-x-L2-av", 10**9, **COMMON, tags=["nla", VERBALIZER])
    assert of_hub("six") == [("six/nla-x-L2-av", None)]


def test_a_limit_says_what_it_left_out(world: HubWorld) -> None:
    result = models("search", "--json", "--limit", "2")
    shown = [json.loads(line) for line in result.stdout.splitlines()]
    assert [(row["av"], row["ar"]) for row in shown if row["zoo"] is None] == PAIRS[:2]
    assert "2 more pairs on the Hub; --limit 4" in result.stderr


def test_a_search_without_the_hub_says_so_and_shows_the_named_pairs(
    world: HubWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    world.fail("models", 500, times=99)
    result = models("search", "gemma", "--json")
    assert "Only the named pairs were searched" in result.stderr and "500" in result.stderr
    assert json.loads(result.stdout.splitlines()[0])["name"] == "gemma-3-12b"
    n = len(world.requests)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    result = models("search", "gemma", "--json")
    assert "The Hub may not be asked" in result.stderr
    assert len(result.stdout.splitlines()) == 4
    with pytest.raises(HubUnreachableError, match="may not be asked"):
        hub_pairs(options=HubOptions())
    assert len(world.requests) == n


def test_a_busy_hub_is_waited_for(world: HubWorld) -> None:
    world.fail("models", 429, times=1, headers={"Retry-After": "1"})
    assert of_hub() == PAIRS


# -- strangers -----------------------------------------------------------------------------------------------

NASTY = [
    "\x1b[2J\x1b[31mgone",
    "base_model:../../etc/passwd",
    "license:a b\x1b]0;x\x07",
    "license:<b>mit</b>",
    "x" * 10**5,
]


def test_what_strangers_write_is_not_printed_as_it_stands(world: HubWorld) -> None:
    publish(world, "evil/nla-av", 10**9, tags=["nla", *NASTY], license="\x1b[1mmit", base_model=["a/b", "c/d"])
    result = models("search", "evil")
    assert "\x1b" not in result.stdout and "<b>" not in result.stdout and "passwd" not in result.stdout
    assert max(map(len, result.stdout.splitlines())) < 300
    (row,) = rows("evil")
    assert row["licence"] is None
    assert row["base_model"] is None, "two bases: nothing says which is the source"


@pytest.mark.parametrize(
    "answer",
    [
        {},
        {"id": 5},
        {"id": "a/b\nc"},
        {"id": "../x"},
        {"id": "ü/x"},
        {"id": "a/b/c"},
        {"id": "a/" + "b" * 200},
        {"id": "no-owner"},
    ],
)
def test_a_line_without_a_repositorys_name_is_left_out(answer: dict[str, Any]) -> None:
    assert search._listed(SimpleNamespace(**answer)) is None


@pytest.mark.parametrize("value", [None, "x", -1, True, [], {}, "\x1b", 10**30, ["\x1b"], [5, None], [["a"]]])
@pytest.mark.parametrize("field", ["tags", "downloads", "last_modified", "library_name", "sha", "gated", "private"])
def test_odd_values_are_not_said(field: str, value: Any) -> None:
    found = search._listed(SimpleNamespace(id="a/b", **{field: value}))
    assert found is not None and found.repo == "a/b"
    assert found.library in (None, "x") and not any("\x1b" in tag for tag in found.tags)
    assert found.downloads is None or found.downloads >= 0
    assert found.updated is None and found.commit is None


def test_thousands_of_tags_are_not_read() -> None:
    tags = [f"t{i}" for i in range(10**5)]
    found = search._listed(SimpleNamespace(id="a/b", tags=tags))
    assert found is not None and len(found.tags) <= 500


def test_no_more_than_a_page_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    def endless(self: object, **asked: Any) -> Iterator[Any]:
        assert asked["limit"] == search.AT_MOST
        i = 0
        while True:
            i += 1
            yield SimpleNamespace(id=f"a/b{i}")

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.HfApi, "list_models", endless)
    assert len(listed_models(["nla"], options=HubOptions())) == search.AT_MOST


# -- pairing -------------------------------------------------------------------------------------------------


def model(repo: str, *tags: str, **fields: Any) -> ListedModel:
    return ListedModel(repo, frozenset(tags), **fields)


@pytest.mark.parametrize(
    ("listed", "expected"),
    [
        (["o/x-av", "o/x-ar"], [("o/x-av", "o/x-ar")]),
        (["o/x-ar", "o/x-av"], [("o/x-av", "o/x-ar")]),
        (["o/x-AV", "O/X-ar"], [("o/x-AV", "O/X-ar")]),
        (["o/x-av", "p/x-ar"], [("o/x-av", None), (None, "p/x-ar")]),
        (["o/x-av"], [("o/x-av", None)]),
        (["o/run"], [("o/run", "o/run")]),
        (
            ["o/x-verbalizer", "o/x-reconstructor", "o/x-av"],
            [("o/x-verbalizer", "o/x-reconstructor"), ("o/x-av", None)],
        ),
    ],
)
def test_halves_are_put_together_by_name(listed: list[str], expected: list[Any]) -> None:
    found = [(p.av and p.av.repo, p.ar and p.ar.repo) for p in paired([model(repo) for repo in listed])]
    assert found == expected


def test_tags_say_more_than_names() -> None:
    (pair,) = paired([model("o/x-av", RECONSTRUCTOR)])
    assert pair.av is None and pair.ar is not None


def test_the_facts_of_a_pair() -> None:
    early, late = date(2026, 1, 2), date(2026, 3, 4)
    pair = HubPair(
        model("L9/nla-x-L12-av", updated=early, base_models=("a/b",)), model("L9/nla-x-L12-ar", updated=late)
    )
    assert (pair.layer, pair.updated, pair.base_model) == (12, late, "a/b")
    assert HubPair(model("o/nla-xL12-av"), None).layer is None


# -- what a named pair is behind of --------------------------------------------------------------------------


def named(name: str, **changes: Any) -> ZooEntry:
    fields: dict[str, Any] = {
        "av": "one/nla-qwen3-8b-L24-av",
        "ar": "one/nla-qwen3-8b-L24-ar",
        "base": BASE,
        "licence": "mit",
        "adapter": "qwen3",
        "summary": "x",
        "layer": 24,
        "n_layers": 36,
        "d_model": 4096,
    }
    return ZooEntry(**{**fields, **changes}, name=name)


@pytest.fixture
def entries(world: HubWorld, monkeypatch: pytest.MonkeyPatch) -> dict[str, ZooEntry]:
    """A pinned pair whose AV has moved on, one that is where it should be, one that is not pinned, and the packaged one."""
    old = world.branches("one/nla-qwen3-8b-L24-av")["main"]
    publish(world, "one/nla-qwen3-8b-L24-av", **COMMON, tags=["nla"], language="en")
    new, ar = world.branches("one/nla-qwen3-8b-L24-av")["main"], world.branches("one/nla-qwen3-8b-L24-ar")["main"]
    found = {
        "behind": named("behind", av_revision=old, ar_revision=ar),
        "current": named("current", av_revision=new, ar_revision=ar),
        "free": named("free"),
        "gone": named("gone", av="no/av", ar="no/ar", av_revision=old),
        "tiny": zoo.zoo()["tiny"],
    }
    monkeypatch.setattr(zoo, "zoo", lambda: found)
    monkeypatch.setattr("nla_hub.cli.models.zoo", lambda: found)
    return found


def test_updates(world: HubWorld, entries: dict[str, ZooEntry]) -> None:
    found = updates(entries.values(), HubOptions())
    assert {name: [(u.part, u.behind) for u in them] for name, them in found.items()} == {
        "behind": [("av", True), ("ar", False)],
        "current": [("av", False), ("ar", False)],
        "free": [("av", False), ("ar", False)],
    }
    new = world.branches("one/nla-qwen3-8b-L24-av")["main"]
    assert str(found["behind"][0]).startswith(f"AV: pinned at {entries['behind'].av_revision[:10]}, main is {new[:10]}")  # type: ignore[index]
    assert str(found["behind"][1]) == "AR: pinned at what main is"
    assert str(found["free"][0]).startswith(f"AV: unpinned, main is {new[:10]} now (")
    assert sorted(str(seen.repo) for seen in world.of("info")) == [
        "no/ar",
        "no/av",
        "one/nla-qwen3-8b-L24-ar",
        "one/nla-qwen3-8b-L24-av",
    ]


def test_the_commands_say_it(world: HubWorld, entries: dict[str, ZooEntry]) -> None:
    shown = models("show", "behind").stdout
    assert "updates" in shown and "AV: pinned at" in shown
    assert "updates" not in models("show", "tiny").stdout and "updates" not in models("show", "gone").stdout
    (row,) = [json.loads(line) for line in models("show", "behind", "--json").stdout.splitlines()]
    assert [u["behind"] for u in row["updates"]] == [True, False]
    assert row["updates"][0]["commit"] == world.branches("one/nla-qwen3-8b-L24-av")["main"]
    n = len(world.requests)
    assert "behind" not in models("ls").stdout.splitlines()[0]
    assert len(world.requests) == n, "a list asks nobody unless it is told to"
    said = {
        row["name"]: row["updates"] for row in map(json.loads, models("ls", "--updates", "--json").stdout.splitlines())
    }
    assert said["tiny"] is None and said["gone"] is None and len(said["free"]) == 2
    table = models("ls", "--updates").stdout
    assert "behind: AV" in table and "current" in table and "unpinned" in table


def test_nothing_is_said_where_nobody_answers(
    world: HubWorld, entries: dict[str, ZooEntry], monkeypatch: pytest.MonkeyPatch
) -> None:
    world.fail("info", 500, times=99)
    world.fail("info", 429, times=99, headers={"Retry-After": "300"})
    result = models("show", "behind")
    assert "updates" not in result.stdout and result.stderr == ""
    world.faults.clear()
    n = len(world.requests)
    assert now(["one/nla-qwen3-8b-L24-av"], options=HubOptions(local_files_only=True)) == {}
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert updates(entries.values(), HubOptions()) == {}
    assert len(world.requests) == n


def test_importing_and_the_zoo_ask_nobody() -> None:
    code = (
        "import sys, socket\n"
        "def no(*_): raise AssertionError('a connection')\n"
        "socket.socket.connect = no\n"
        "import nla_hub, nla_hub.zoo, nla_hub.hub_pairs, nla_hub.cli.models\n"
        "nla_hub.zoo.zoo()\n"
        "sys.exit('torch' in sys.modules)"
    )
    environment = {key: value for key, value in os.environ.items() if key != "HF_HUB_OFFLINE"}
    assert subprocess.run([sys.executable, "-c", code], env=environment, check=False).returncode == 0
