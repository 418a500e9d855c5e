"""`nla-hub push` and `NLA.push_to_hub` on a real pair: what a person sees, what a reader gets, and what a kill leaves."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import push_jobs
import pytest
import torch
from hub_world import HubWorld, connected
from push_world import snapshot
from typer.testing import CliRunner, Result

import nla_hub
from nla_hub import NLA
from nla_hub.cli import push as command
from nla_hub.cli.app import app
from nla_hub.errors import InputError, NLAError, PublishError
from nla_hub.hub import HubOptions
from nla_hub.hub.writing import HubWriter
from nla_hub.publish.check import TOLERANCE, Figures, figures
from nla_hub.publish.plan import PushOptions, look, make_plan
from nla_hub.publish.prepare import push_found
from nla_hub.publish.staging.bundle import Wanted, stage
from nla_hub.publish.staging.found import find
from nla_hub.round_trip import TEXTS

NAME = "owner/nla-tiny"
AR, AV = f"{NAME}-ar", f"{NAME}-av"
WEIGHTS = Path(nla_hub.__file__).parent / "tiny" / "weights"


@pytest.fixture
def world(tmp_path: Path) -> Iterator[HubWorld]:
    with HubWorld(tmp_path / "hub") as found:
        yield found


@pytest.fixture
def here(world: HubWorld, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> HubWorld:
    """A Hub that this process itself talks to."""
    connected(world, monkeypatch, tmp_path / "home")
    return world


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The packaged pair somewhere else."""
    return shutil.copytree(WEIGHTS, tmp_path_factory.mktemp("made") / "pair")


def push(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["push", *map(str, arguments)])


def whole(world: HubWorld, *names: str) -> None:
    """Published in one commit each, tagged, and nothing left over."""
    for name in names:
        assert len(world.commits(name)) == 2
        assert list(world.branches(name)) == ["main"]
        assert [*world.tags(name).values()] == [world.branches(name)["main"]]


# -- what a reader gets --------------------------------------------------------------------------------------


LOAD = f"""
import json
from nla_hub import NLA
nla = NLA.from_pretrained({AV!r})
texts = {list(TEXTS)!r}
vectors = nla.reconstruct(texts)
said = nla.verbalize(vectors, temperature=0)
print(json.dumps([vectors.tolist(), [e.raw for e in said], list(nla.score(said, vectors).cosine)]))
"""


def test_a_pushed_pair_loads_by_its_name_elsewhere_and_scores_the_same(
    world: HubWorld, pair: Path, tmp_path: Path
) -> None:
    job = push_jobs.run(world, tmp_path, pair, "--repo", NAME, "--yes", "--collection", "owner/Tiny")
    assert job.code == 0, job.said()
    assert job.printed().splitlines() == [f"{world.url}/{AR}", f"{world.url}/{AV}"]
    assert "the pair on the Hub answers as the local one does" in job.said()
    whole(world, AR, AV)
    assert [*world.collections().values()] == [[AR, AV]]
    found = subprocess.run(
        [sys.executable, "-c", LOAD], env=world.environment(tmp_path / "clean"), capture_output=True, text=True
    )
    assert found.returncode == 0, found.stderr
    vectors, words, cosines = json.loads(found.stdout)
    with NLA.from_pretrained(pair) as nla:
        local = figures(nla, ("av", "ar"))
    assert local.differences(Figures(torch.tensor(vectors), tuple(words), tuple(cosines))) == []


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
def test_factors_are_scored_on_the_base_that_the_cache_has(here: HubWorld, tmp_path: Path) -> None:
    pytest.importorskip("peft", reason="peft writes the factors")
    from wild import World, peft_pair

    made = peft_pair(World(), tmp_path / "pair").name
    here.seed("owner/base", made / "source")
    arguments = (made, "--repo", "owner/factors", "--licence", "apache-2.0", "--yes")
    asked = push(*arguments[:-1], "--dry-run")
    assert "owner/base is not in the cache" in asked.stdout
    result = push(*arguments, "--verify", "score")
    assert result.exit_code == 0, result.stderr
    assert "answers as the local one does" in result.stderr
    assert (tmp_path / "home" / "hub" / "models--owner--base" / "snapshots").is_dir()
    assert not (tmp_path / "home" / "hub" / "models--owner--factors-av").exists()


def test_figures_that_differ_are_told() -> None:
    vectors = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    mine = Figures(vectors, ("a", "b"), (0.5, None))
    assert mine.differences(mine) == []
    apart = vectors.clone()
    apart[3, 2] += 2 * TOLERANCE * float(vectors.abs().max())
    for other, word in (
        (Figures(apart, ("a", "b"), (0.5, None)), "vectors of 6 texts differ"),
        (Figures(vectors.clone().fill_(float("nan")), ("a", "b"), (0.5, None)), "vectors of 6 texts differ"),
        (Figures(vectors[:, :3], ("a", "b"), (0.5, None)), "shape"),
        (Figures(vectors, ("a", "c"), (0.5, None)), "says 'c' of vector 1"),
        (Figures(vectors, ("a", "b"), (0.5 + 2 * TOLERANCE, None)), "vector 0 comes back"),
        (Figures(vectors, ("a", "b"), (0.5, 0.1)), "vector 1 comes back"),
    ):
        (told,) = mine.differences(other)
        assert word in told


def test_what_answers_otherwise_is_published_and_not_tagged(
    here: HubWorld, pair: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from nla_hub.publish import check

    true = check.published

    def another(*arguments: Any) -> Figures:
        found = true(*arguments)
        return Figures(found.vectors, tuple(w + "." for w in found.words or ()), found.cosines)

    monkeypatch.setattr(check, "published", another)
    result = push(pair, "--repo", NAME, "--yes")
    assert result.exit_code == 3
    assert "does not pass its check, and is not tagged" in result.stderr
    assert "git revert" in result.stderr and "main was empty" in result.stderr
    assert here.tags(AR) == here.tags(AV) == {}
    monkeypatch.undo()


def test_push_to_hub_publishes_the_files_that_a_pair_was_loaded_from(here: HubWorld, pair: Path) -> None:
    with NLA.from_pretrained(pair) as nla:
        done = nla.push_to_hub("owner/both", single_repo=True, private=True, tag="v1", verify="checksums")
    assert done.url == f"{here.url}/owner/both" and done.tag == "v1"
    assert here.private("owner/both")
    whole(here, "owner/both")
    files = here.files("owner/both")
    for half in ("av", "ar"):
        assert files[f"{half}/model.safetensors"] == (pair / half / "model.safetensors").read_bytes()
    with NLA.from_pretrained("owner/both") as read, pytest.raises(InputError, match="directories of this machine"):
        read.push_to_hub("owner/again")
    with NLA.from_pretrained(pair, sidecar={"license": "apache-2.0"}) as told, pytest.raises(InputError, match="told"):
        told.push_to_hub("owner/again")


# -- what a person sees --------------------------------------------------------------------------------------


def test_a_dry_run_prints_the_plan_and_sends_nothing(here: HubWorld, pair: Path) -> None:
    result = push(pair, "--dry-run")
    assert result.exit_code == 0, result.stderr
    for half in ("ar", "av"):
        assert f"owner/nla-tiny-L2-{half}  (model, public, new)" in result.stdout
    size = (pair / "ar" / "model.safetensors").stat().st_size
    assert re.search(rf"^  new +{size:,}  model.safetensors$", result.stdout, re.M)
    assert re.search(r"^licence    apache-2.0$", result.stdout, re.M)
    assert "then downloaded, loaded by its name and scored" in result.stdout
    assert here.written() == [] and {seen.method for seen in here.requests} == {"GET"}


def test_a_dry_run_writes_nothing_anywhere(world: HubWorld, pair: Path, tmp_path: Path) -> None:
    locked = tmp_path / "locked"
    shutil.copytree(pair, locked / "pair")
    places = [locked, *(p for p in locked.rglob("*") if p.is_dir())]
    for place in places:
        place.chmod(0o555)
    seen = snapshot(locked)
    try:
        job = push_jobs.run(world, tmp_path, locked / "pair", "--repo", NAME, "--dry-run", locked=locked)
        assert job.code == 0, job.said()
        assert snapshot(locked) == seen
    finally:
        for place in places:
            place.chmod(0o755)
    assert f"{AV}  (model, public, new)" in job.printed()
    assert world.requests and {request.method for request in world.requests} == {"GET"}


def test_a_stray_file_is_refused_with_the_line_of_what_it_gives_away(
    here: HubWorld, pair: Path, tmp_path: Path
) -> None:
    pair = shutil.copytree(pair, tmp_path / "pair")
    (pair / "av" / "notes.txt").write_text("first\nwrite to jo@uni.edu\n")
    (pair / "ar" / "run.ipynb").write_text(json.dumps({"nbformat": 4, "cells": [{"outputs": [{"text": "1"}]}]}))
    done = push(pair, "--yes")
    assert done.exit_code == 1
    assert f"{pair}/av/notes.txt, line 2, column 10: an e-mail address (...@uni.edu)" in done.stderr
    assert "notes.txt is no part of a release" in done.stderr and "run.ipynb, line 1" in done.stderr
    assert here.written() == []


def test_a_dry_run_needs_neither_hub_nor_token(
    here: HubWorld, pair: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    connected(here, monkeypatch, tmp_path / "home", None)
    anonymous = push(pair, "--dry-run")
    assert anonymous.exit_code == 0 and "OWNER/nla-tiny-L2-av" in anonymous.stdout
    assert "nobody is logged in: a push needs a token" in anonymous.stdout
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    here.requests.clear()
    offline = push(pair, "--dry-run", "--repo", NAME)
    assert offline.exit_code == 0 and "the Hub was not asked what it has" in offline.stdout
    assert here.requests == []


def test_a_dry_run_ends_with_why_the_push_would_be_refused(here: HubWorld, pair: Path) -> None:
    elsewhere = push(pair, "--dry-run", "--repo", "other/t")
    assert elsewhere.exit_code == 1, elsewhere.stderr
    told = elsewhere.stdout.partition("\nThis push would be refused:\n")[2]
    assert "other: This account may not write there" in told
    assert told.splitlines()[-1].strip() == "Next: correct --repo (yours: owner/NAME)"
    as_json = push(pair, "--dry-run", "--repo", "other/t", "--json")
    assert as_json.exit_code == 1
    (plan,) = map(json.loads, as_json.stdout.splitlines())
    assert [text.splitlines()[0] for text in plan["refusals"]] == [told.splitlines()[0].strip()]
    here.fail("whoami", 401, 99)
    refused = push(pair, "--dry-run", "--repo", NAME)
    assert refused.exit_code == 1 and "does not accept this token" in refused.stdout.splitlines()[-2]
    assert here.written() == []


def test_nobody_is_asked_without_a_terminal(here: HubWorld, pair: Path) -> None:
    result = push(pair, "--repo", NAME)
    assert result.exit_code == 2
    assert "--yes" in result.stderr and "--dry-run" in result.stderr and "Invalid value" not in result.stderr
    assert here.requests == []


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (("./nowhere",), "no such directory"),
        (("owner/x",), "a repository of the Hub cannot be pushed"),
        (("tiny",), "nla-hub download tiny --to ./pair, then nla-hub push ./pair"),
        (("qwen2.5-7b",), "nla-hub download qwen2.5-7b --to ./pair"),
        ((WEIGHTS, "--repo", "a/b/c"), "no repository of this name"),
        ((WEIGHTS, "--repo", "a/-b"), "no repository of this name"),
        ((WEIGHTS, "--repo", "b."), "no repository of this name"),
    ],
)
def test_what_is_wrong_is_named_before_who_could_be_asked(
    here: HubWorld, arguments: tuple[Any, ...], word: str
) -> None:
    result = push(*arguments)
    assert result.exit_code == 1 and word in result.stderr
    assert here.requests == []


@pytest.mark.parametrize("answer", ["y", "n"])
def test_a_terminal_is_asked_once_before_anything_is_sent(
    here: HubWorld, pair: Path, monkeypatch: pytest.MonkeyPatch, answer: str
) -> None:
    monkeypatch.setattr(command, "_can_ask", lambda: True)
    result = CliRunner().invoke(app, ["push", str(pair), "--repo", NAME, "--verify", "checksums"], input=f"{answer}\n")
    assert f"Send 3 MiB to {AR}, {AV}? [y/N]" in result.stderr
    if answer == "y":
        assert result.exit_code == 0 and result.stdout.splitlines()[-1] == f"{here.url}/{AV}"
    else:
        assert result.exit_code == 1 and "Nothing was sent." in result.stderr
        assert here.written() == []


def test_json_lines_hold_the_plan_and_what_was_published(here: HubWorld, pair: Path) -> None:
    result = push(pair, "--repo", NAME, "--yes", "--json", "--verify", "checksums", "-q", "--tag", "v1")
    assert result.exit_code == 0, result.stderr
    plan, pushed = map(json.loads, result.stdout.splitlines())
    assert plan["event"] == "plan" and [r["repo"] for r in plan["repos"]] == [AR, AV]
    assert plan["to_send"] == sum(f["size"] for r in plan["repos"] for f in r["files"])
    assert {f["state"] for r in plan["repos"] for f in r["files"]} == {"new"}
    assert pushed["event"] == "pushed" and pushed["url"] == f"{here.url}/{AV}" and pushed["tag"] == "v1"
    assert [r["commit"] for r in pushed["repos"]] == [here.tags(name)["v1"] for name in (AR, AV)]
    assert result.stderr == ""
    again = push(pair, "--repo", NAME, "--yes", "--json", "--verify", "checksums", "-q", "--tag", "v1")
    assert json.loads(again.stdout.splitlines()[-1])["changed"] is False


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (("--create-pr", "--revision", "next"), "a pull request is for main"),
        (("--create-pr", "--steps"), "steps become tags"),
        (("--create-pr", "--collection", "owner/x"), "goes into a collection"),
        (("--revision", "nla-hub/0123"), "other uses"),
        (("--revision", "refs/pr/1"), "other uses"),
    ],
)
def test_options_that_exclude_each_other(here: HubWorld, pair: Path, arguments: tuple[str, ...], word: str) -> None:
    result = push(pair, "--repo", NAME, "--yes", *arguments)
    assert result.exit_code == 1 and word in result.stderr and "Next: " in result.stderr
    assert here.requests == []


def test_a_rehearsal_is_published_in_private_alone(here: HubWorld, pair: Path) -> None:
    release = stage(find(pair), Wanted(repo=NAME), options=HubOptions(), work=None)
    assert release.facts is not None
    release = replace(release, facts=replace(release.facts, rehearsal=True))
    with pytest.raises(PublishError, match="rehearsal") as caught:
        make_plan(release, PushOptions(), HubWriter(HubOptions()))
    assert caught.value.next_step == "--private, or train it without --rehearse"
    assert look(release, PushOptions(), HubWriter(HubOptions())).refusals == (str(caught.value),)
    assert make_plan(release, PushOptions(private=True), HubWriter(HubOptions())).to_send == release.size
    for name in (AR, AV):
        here.seed(name, {"README.md": b"# public\n"})
    for private in (False, True):
        with pytest.raises(PublishError, match="there already, and public") as public:
            make_plan(release, PushOptions(private=private), HubWriter(HubOptions()))
        assert public.value.next_step == (
            "make it private in its settings, or name another with --repo and --private; or train it without --rehearse"
        )


def test_verify_score_needs_room(here: HubWorld, pair: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 9, 1))  # type: ignore[attr-defined]
    refused = push(pair, "--repo", NAME, "--yes", "--verify", "score")
    assert refused.exit_code == 1 and "There is no room to download the release" in refused.stderr
    assert here.written() == []
    unasked = push(pair, "--repo", NAME, "--dry-run")
    assert "not downloaded and scored" in unasked.stdout


def test_an_error_of_the_hub_says_how_to_go_on(here: HubWorld, pair: Path) -> None:
    here.fail("commit", 500, 99, repo=AV)
    result = push(pair, "--repo", NAME, "--yes", "--verify", "checksums")
    assert result.exit_code == 1
    assert "The same command goes on" in result.stderr and "Error: " in result.stderr and "Next: " in result.stderr
    assert "Traceback" not in result.stderr


# -- killed --------------------------------------------------------------------------------------------------

KILLS: dict[str, tuple[str, dict[str, Any]]] = {
    "in the middle of a large file": ("lfs-upload", {"after": 100_000, "repo": None, "skip": 1}),
    "before the AV is published": ("commit", {"repo": AV, "skip": 1}),
    "before a tag": ("tag", {"repo": AR}),
}
MORE_KILLS: dict[str, tuple[str, dict[str, Any]]] = {
    "before a repository is made": ("create", {"skip": 1}),
    "after a repository is made": ("create", {"applied": True}),
    "before a branch": ("branch", {"repo": AR}),
    "after a branch": ("branch", {"repo": AV, "applied": True}),
    "before the Hub is told of large files": ("lfs-batch", {"repo": AR}),
    "after a large file": ("lfs-upload", {"applied": True, "skip": 2}),
    "before files are sent": ("commit", {"repo": AR}),
    "after files are sent": ("commit", {"repo": AR, "applied": True}),
    "before the AR is published": ("commit", {"repo": AR, "skip": 1}),
    "after the AR is published": ("commit", {"repo": AR, "skip": 1, "applied": True}),
    "after the AV is published": ("commit", {"repo": AV, "skip": 1, "applied": True}),
    "between the tags": ("tag", {"repo": AV}),
    "after the tags": ("tag", {"repo": AV, "applied": True}),
    "before a branch is removed": ("delete-branch", {"repo": AR}),
    "between the branches": ("delete-branch", {"repo": AV}),
}


def killed(world: HubWorld, pair: Path, folder: Path, stage: str, where: dict[str, Any]) -> None:
    """`kill -9` while one request waits, and the same command again."""
    arguments = (pair, "--repo", NAME, "--yes", "--verify", "checksums")
    held = world.pause(stage, **where)
    job = push_jobs.start(world, folder, *arguments)
    assert held.reached.wait(push_jobs.PATIENCE), job.said()
    job.kill()
    held.drop()
    for name in (AR, AV):
        if world.exists(name):
            assert all(len(c.files) in (1, len(world.files(name)) + 1) for c in world.commits(name))
    again = push_jobs.run(world, folder, *arguments)
    assert again.code == 0, again.said()
    assert again.printed().splitlines()[-1] == f"{world.url}/{AV}"
    whole(world, AR, AV)
    for half, name in (("ar", AR), ("av", AV)):
        files = world.files(name)
        for path in (pair / half).glob("*.safetensors"):
            if path.name in files:
                assert files[path.name] == path.read_bytes()
    assert set(world.uploads.values()) == {1}, "nothing large is stored twice"


@pytest.mark.parametrize("moment", KILLS)
def test_a_push_that_was_killed_is_finished_by_the_same_command(
    world: HubWorld, pair: Path, tmp_path: Path, moment: str
) -> None:
    killed(world, pair, tmp_path, *KILLS[moment])


@pytest.mark.long
@pytest.mark.parametrize("moment", MORE_KILLS)
def test_a_push_that_was_killed_anywhere_is_finished_by_the_same_command(
    world: HubWorld, pair: Path, tmp_path: Path, moment: str
) -> None:
    killed(world, pair, tmp_path, *MORE_KILLS[moment])


def test_ctrl_c_says_that_the_same_command_goes_on(world: HubWorld, pair: Path, tmp_path: Path) -> None:
    arguments = (pair, "--repo", NAME, "--yes", "--verify", "checksums")
    held = world.pause("lfs-upload", after=1000)
    job = push_jobs.start(world, tmp_path, *arguments)
    assert held.reached.wait(push_jobs.PATIENCE), job.said()
    assert job.interrupt() == 130
    held.drop()
    assert f"The same command goes on:\n  nla-hub push {pair}" in job.said() and "Traceback" not in job.said()
    assert job.printed() == ""


def another_release(pair: Path, folder: Path) -> Path:
    """The same pair with a file of the AR spelled otherwise: another release, which nothing can tell by its answers."""
    other = shutil.copytree(pair, folder / "other")
    config = other / "ar" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()), indent=4) + "\n\n")
    return other


def test_a_reader_between_the_halves_gets_the_old_pair_or_is_told(
    here: HubWorld, pair: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ("--repo", NAME, "--yes", "--verify", "checksums")
    assert push(pair, *arguments).exit_code == 0
    here.fail("commit", 500, 99, repo=AV, skip=1)
    assert push(another_release(pair, tmp_path), *arguments).exit_code == 1
    assert len(here.commits(AR)) == 3 and len(here.commits(AV)) == 2
    with NLA.from_pretrained(AV) as read, NLA.from_pretrained(pair) as local:
        assert figures(local, ("av", "ar")).differences(figures(read, ("av", "ar"))) == []
    for name in (AR, AV):  # as if the first push had been cut before its tags
        here.store.repo(name).tags.clear()
    connected(here, monkeypatch, tmp_path / "second home")
    with pytest.raises(NLAError) as caught:
        NLA.from_pretrained(AV)
    assert "push" in str(caught.value) and caught.value.next_step


def test_steps_are_published_as_tags_before_the_pair_that_names_them(
    here: HubWorld, pair: Path, tmp_path: Path
) -> None:
    step = another_release(pair, tmp_path)
    found = replace(find(pair), steps={"step-000400": step})
    done = push_found(found, NAME, steps=True, verify="checksums", tag="v1")
    assert done.tag == "v1"
    for name in (AR, AV):
        assert sorted(here.tags(name)) == ["step-000400", "v1"]
        assert len(here.commits(name)) == 2 and list(here.branches(name)) == ["main"]
    assert here.files(AR, "step-000400")["config.json"] == (step / "ar" / "config.json").read_bytes()
    assert here.files(AR)["config.json"] == (pair / "ar" / "config.json").read_bytes()
    order = [(seen.stage, seen.repo) for seen in here.requests if seen.stage == "tag"]
    assert order == [("tag", AR), ("tag", AV)] * 2
    with NLA.from_pretrained(AV, revision="step-000400") as read:
        assert read.sidecar.release is not None and read.sidecar.release.tag == "step-000400"


def test_a_data_set_is_pushed_by_the_same_command(here: HubWorld, tmp_path: Path) -> None:
    out = tmp_path / "out"
    (tmp_path / "texts.jsonl").write_text('{"text": "today otto came"}\n')
    job = ["explain", "--data", str(tmp_path / "texts.jsonl"), "-o", str(out)]
    made = CliRunner().invoke(app, job)
    assert made.exit_code == 0, made.stderr
    result = push(out, "--repo", "owner/rows", "--licence", "cc-by-4.0", "--yes")
    assert result.exit_code == 0, result.stderr
    assert result.stdout.splitlines() == [f"{here.url}/datasets/owner/rows"]
    ((tag, commit),) = here.tags("owner/rows", "dataset").items()
    assert tag.startswith("data-") and commit == here.branches("owner/rows", "dataset")["main"]
    assert any(name.endswith(".parquet") for name in here.files("owner/rows", kind="dataset"))
    assert push(out, "--repo", "owner/rows", "--yes").exit_code == 1, "its licence is its author's word"
