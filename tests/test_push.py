"""How a release reaches the Hub: in which order, what happens when that is cut off anywhere, and what is refused."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from hub_world import READER, HubWorld, connected
from push_world import AR, AV, CARD, already, complete, contents, large, never_half, pair, publish, release_of, repo_of

from nla_hub.errors import GateFailedError, HubAuthError, HubError, HubGatedError, HubUnreachableError, PublishError
from nla_hub.hub import HubOptions
from nla_hub.hub.writing import HubWriter
from nla_hub.publish.plan import PushOptions, branch_of, look, make_plan, unasked_plan
from nla_hub.publish.plan_words import lines
from nla_hub.publish.push import push
from nla_hub.publish.release import Release


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubWorld]:
    with HubWorld(tmp_path / "hub") as found:
        connected(found, monkeypatch, tmp_path / "home")
        yield found


def stages(world: HubWorld, *wanted: str) -> list[tuple[str, str | None]]:
    return [(seen.stage, seen.repo) for seen in world.requests if seen.stage in wanted]


def states(release: Release, **options: Any) -> dict[str, dict[str, str]]:
    plan = make_plan(release, PushOptions(**options), HubWriter(HubOptions()))
    return {one.repo.name: {c.name: c.state for c in one.changes} for one in plan.repos}


# -- the way -------------------------------------------------------------------------------------------------


def test_a_pair_is_published_ar_first_and_tagged_last(world: HubWorld) -> None:
    release = pair()
    done = publish(release)
    complete(world, release)
    never_half(world, release)
    assert [len(world.commits(name)) for name in (AR, AV)] == [2, 2]  # the Hub's own, and the release
    assert done.url == f"{world.url}/{AV}"
    assert [repo.commit for repo in done.repos] == [world.tags(name)["v1"] for name in (AR, AV)]
    mains = [(s.stage, s.repo) for s in world.requests if s.stage == "commit" and s.path.endswith("/main")]
    assert mains == [("commit", AR), ("commit", AV)]
    assert stages(world, "commit", "tag")[-3:] == [("commit", AV), ("tag", AR), ("tag", AV)]
    assert all(world.uploads[sha] == 1 for sha in large(release))


def test_a_finished_release_is_not_sent_again(world: HubWorld) -> None:
    release = pair()
    first = publish(release)
    world.requests.clear()
    again = publish(release)
    assert world.written() == []
    assert (again.url, again.repos, again.changed) == (first.url, first.repos, False)


def test_a_new_release_takes_the_place_of_the_old_one_in_one_commit(world: HubWorld) -> None:
    old = pair("first", "v1", more={"old.safetensors": b"old", "model-2.safetensors": b"same" * 999, "notes.txt": b"1"})
    new = pair("second", "v2", more={"model-2.safetensors": b"same" * 999})
    publish(old)
    before = dict(world.uploads)
    expected = {
        "README.md": "changed",
        "config.json": "unchanged",
        "model-2.safetensors": "unchanged",
        "model.safetensors": "changed",
        "notes.txt": "removed",
        "old.safetensors": "removed",
    }
    assert states(new) == {AR: expected, AV: expected}
    publish(new)
    complete(world, new)
    never_half(world, old, new)
    assert [len(world.commits(name)) for name in (AR, AV)] == [3, 3]
    assert sorted(world.tags(AV)) == ["v1", "v2"]
    assert world.files(AV, "v1") == contents(old.repos[1])
    assert world.uploads == before | {repo.entry("model.safetensors").sha256: 1 for repo in new.repos}  # type: ignore[union-attr]


def test_a_single_repository_and_a_data_set_go_the_same_way(world: HubWorld) -> None:
    files = {"README.md": CARD, "av/model.safetensors": b"av" * 99, "ar/model.safetensors": b"ar" * 99}
    both = release_of([repo_of("owner/both", "pair", files)], "v1")
    rows = release_of([repo_of("owner/rows", "data", {"data/part-0.parquet": b"PAR1" * 99}, "dataset")], "data-1")
    publish(both)
    publish(rows)
    for release in (both, rows):
        complete(world, release)
        never_half(world, release)


def test_private_repositories_are_made_private(world: HubWorld) -> None:
    publish(pair(), private=True)
    assert world.private(AR) and world.private(AV)


def test_what_is_public_already_is_not_taken_for_private(world: HubWorld) -> None:
    already(world, pair())
    world.requests.clear()
    with pytest.raises(PublishError, match="is there already, and public"):
        publish(pair("second", "v2"), private=True)
    assert world.written() == []


def test_another_branch_leaves_main_as_it_is(world: HubWorld) -> None:
    old, new = pair("first", "v1"), pair("second", "v2")
    already(world, old)
    done = publish(new, revision="next")
    never_half(world, old)
    assert world.files(AV) == contents(old.repos[1])
    assert world.files(AV, "next") == world.files(AV, "v2") == contents(new.repos[1])
    assert sorted(world.branches(AV)) == ["main", "next"]
    assert done.url.endswith("/tree/next")


def test_steps_are_tags_and_leave_every_branch_as_it_is(world: HubWorld) -> None:
    step = pair("early", "step-000400")
    publish(step, tag_only=True)
    never_half(world, step)
    assert world.files(AV) == {}
    assert world.files(AV, "step-000400") == contents(step.repos[1])
    assert list(world.branches(AV)) == ["main"]
    last = pair("last", "v1", more={"more.safetensors": b"more"})
    publish(last)
    another = pair("middle", "step-000800")
    publish(another, tag_only=True)
    assert world.files(AV, "step-000800") == contents(another.repos[1])  # without what main has besides
    assert world.files(AV) == contents(last.repos[1])
    world.requests.clear()
    assert publish(step, tag_only=True).changed is False
    assert world.written() == []


def test_pull_requests_name_each_other_and_publish_nothing(world: HubWorld) -> None:
    old, new = pair("first", "v1", more={"old.safetensors": b"old"}), pair("second", "v2")
    already(world, old)
    done = publish(new, create_pr=True)
    never_half(world, old)
    assert world.files(AV) == contents(old.repos[1])
    for name, other, repo in ((AR, AV, new.repos[0]), (AV, AR, new.repos[1])):
        (request,) = world.pull_requests(name)
        assert request.status == "open"
        assert other in request.description
        assert request.title in {r.title for r in world.pull_requests(other)}
        assert world.files(name, f"refs/pr/{request.num}") == contents(repo)
        assert list(world.branches(name)) == ["main"]
    assert "v2" not in world.tags(AV)
    assert done.tag is None and done.url.endswith(f"{AV}/discussions/1")
    publish(new, create_pr=True)
    assert [len(world.pull_requests(name)) for name in (AR, AV)] == [1, 1]


def test_a_collection_gets_both_repositories_and_again_the_same(world: HubWorld) -> None:
    publish(pair(), collection="owner/My pairs")
    publish(pair(), collection="owner/My pairs")
    (items,) = world.collections().values()
    assert sorted(items) == [AR, AV]


# -- cut off, and made again ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Moment:
    """A writing request of a push: the `nth` of its stage and repository, over an older release or where nothing was."""

    over: bool
    stage: str
    repo: str | None
    nth: int


OLD, NEW = pair("first", "v1", more={"old.txt": b"old"}), pair("second", "v2")


def moments_of(root: Path, *, over: bool) -> list[Moment]:
    """The writing requests of a push that nothing disturbs."""
    with HubWorld(root / "hub") as world, pytest.MonkeyPatch.context() as patch:
        connected(world, patch, root / "home")
        if over:
            already(world, OLD)
        publish(NEW)
        keys = [(request.stage, request.repo) for request in world.written()]
    return [Moment(over, *key, keys[:i].count(key)) for i, key in enumerate(keys)]


@pytest.fixture(scope="module")
def moments(tmp_path_factory: pytest.TempPathFactory) -> list[Moment]:
    """All of them, of a first release and of one that takes another's place."""
    return [m for over in (False, True) for m in moments_of(tmp_path_factory.mktemp("calm"), over=over)]


def disturbed(root: Path, moment: Moment, **fault: Any) -> None:
    """A push that is cut at one request, however often that is tried, and made again."""
    with HubWorld(root / "hub") as world, pytest.MonkeyPatch.context() as patch:
        connected(world, patch, root / "home")
        if moment.over:
            already(world, OLD)
        if "status" in fault:
            world.fail(moment.stage, fault["status"], 99, repo=moment.repo, skip=moment.nth)
        else:
            world.cut(moment.stage, 99, repo=moment.repo, skip=moment.nth, **fault)
        with suppress(HubError):
            publish(NEW)
        never_half(world, OLD, NEW)
        for name in (AR, AV):
            if world.exists(name) and "v2" in world.tags(name):
                assert all(world.files(repo.name) == contents(repo) for repo in NEW.repos), "tagged before it was there"
        world.faults.clear()
        publish(NEW)
        complete(world, NEW)
        never_half(world, OLD, NEW)
        if not (fault.get("applied") and moment.stage == "lfs-upload"):  # the Hub had the file and could not say so
            assert all(world.uploads[sha] == 1 for sha in large(NEW)), moment


def test_a_push_cut_at_any_kind_of_request_is_finished_by_the_next(moments: list[Moment], tmp_path: Path) -> None:
    kinds: dict[str, Moment] = {}
    for moment in moments:
        kinds[moment.stage] = moment  # the last of its kind: most has happened before
    assert {"create", "branch", "lfs-batch", "lfs-upload", "commit", "tag", "delete-branch"} <= set(kinds)
    for i, moment in enumerate(kinds.values()):
        disturbed(tmp_path / str(i), moment, applied=i % 2 == 0)


STATUSES = (401, 403, 409, 413, 429, 500, 503)


@pytest.mark.long
@pytest.mark.parametrize(
    "fault", [{"applied": False}, {"applied": True}, {"reset": True}, *({"status": code} for code in STATUSES)], ids=str
)
def test_a_push_disturbed_at_any_request_in_any_way_is_finished_by_the_next(
    moments: list[Moment], fault: dict[str, Any], tmp_path: Path
) -> None:
    for i, moment in enumerate(moments):
        disturbed(tmp_path / str(i), moment, **fault)


@pytest.mark.parametrize("status", [401, 403, 409, 413, 429, 500])
def test_a_refusal_in_the_middle_is_told_in_one_line_with_a_next_step(world: HubWorld, status: int) -> None:
    old, new = pair("first", "v1"), pair("second", "v2")
    already(world, old)
    world.fail("commit", status, 99, repo=AV)
    with pytest.raises(HubError) as caught:
        publish(new)
    assert caught.value.next_step and "\n" not in caught.value.what
    assert world.files(AR) == contents(old.repos[0]), "both are sent before either is published"
    world.faults.clear()
    assert "v2" not in {*world.tags(AR), *world.tags(AV)}


def test_main_is_refused_where_somebody_else_has_committed_since_the_plan(world: HubWorld) -> None:
    already(world, pair("first", "v1"))
    new, writer = pair("second", "v2"), HubWriter(HubOptions())
    options = PushOptions(verify="checksums")
    plan = make_plan(new, options, writer)
    world.seed(AV, {"README.md": b"# mine\n"})
    with pytest.raises(HubError):
        push(new, options, writer=writer, hub=HubOptions(), plan=plan)
    assert world.files(AV)["README.md"] == b"# mine\n"
    assert "v2" not in world.tags(AR)
    publish(new)  # with a new plan
    complete(world, new)


def test_what_is_published_and_changed_by_others_is_not_tagged(world: HubWorld) -> None:
    release = pair()
    held = world.pause("commit", repo=AV, skip=1)  # the one on main

    def meddle() -> None:
        assert held.reached.wait(60)
        world.seed(AR, {"model.safetensors": b"another"})
        held.release()

    other = threading.Thread(target=meddle)
    other.start()
    with pytest.raises(GateFailedError) as caught:
        publish(release)
    other.join()
    assert caught.value.exit_code == 3
    assert "model.safetensors is another file" in str(caught.value)
    assert "before this push main was" in str(caught.value)
    assert world.tags(AR) == world.tags(AV) == {}


def test_a_push_that_was_cut_between_the_halves_goes_on_with_the_second(world: HubWorld) -> None:
    old, new = pair("first", "v1"), pair("second", "v2")
    already(world, old)
    world.fail("commit", 500, 99, repo=AV, skip=1)
    with pytest.raises(HubError):
        publish(new)
    assert world.files(AR) == contents(new.repos[0]) and world.files(AV) == contents(old.repos[1])
    world.faults.clear()
    sent = {"README.md": "sent", "config.json": "unchanged", "model.safetensors": "sent"}
    assert states(new) == {AR: dict.fromkeys(sent, "unchanged"), AV: sent}
    world.requests.clear()
    publish(new)
    assert world.of("lfs-upload") == [] and world.of("commit", AR) == []
    complete(world, new)


# -- refused -------------------------------------------------------------------------------------------------


def test_a_tag_that_names_something_else_is_refused_before_anything_is_sent(world: HubWorld) -> None:
    already(world, pair("first", "v1"))
    world.requests.clear()
    with pytest.raises(PublishError, match="names another release") as caught:
        publish(pair("second", "v1"))
    assert "--tag" in str(caught.value)
    world.seed(AV, {"README.md": b"# edited\n"})
    with pytest.raises(PublishError, match="the branch has moved on"):
        publish(pair("first", "v1"))
    assert world.written() == []


def test_a_tag_that_names_the_same_weights_with_other_words_is_told_apart(world: HubWorld) -> None:
    first = pair("first")
    here, there = replace(first, tag=f"nla-{first.id}"), pair("first", more={"LICENSE": b"terms"})
    already(world, replace(there, tag=here.tag))
    assert here.id == there.id
    world.requests.clear()
    with pytest.raises(PublishError, match="names this release with other words"):
        publish(here)
    assert world.written() == []


def test_a_token_that_cannot_write_there_is_refused_before_anything_is_made(
    world: HubWorld, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    somebody = release_of([repo_of("stranger/nla-x", "pair", {"av/config.json": b"{}"})], "v1")
    with pytest.raises(HubGatedError, match="may not write there") as refused:
        publish(somebody)
    assert refused.value.next_step == "correct --repo (yours: owner/NAME)"
    with pytest.raises(PublishError, match="no such repository") as circle:
        publish(somebody, create_pr=True)
    assert circle.value.next_step == "correct --repo, or leave --create-pr out"
    world.seed("stranger/nla-x", {"README.md": b"# theirs\n"})
    with pytest.raises(HubGatedError, match="--create-pr"):
        publish(somebody)
    connected(world, monkeypatch, tmp_path / "home", READER)
    for create_pr in (False, True):
        with pytest.raises(HubGatedError, match="a token of owner that may only read") as reader:
            publish(pair(), create_pr=create_pr)
        assert reader.value.next_step == "a token with the right to write (`hf auth login`)"
    connected(world, monkeypatch, tmp_path / "home", None)
    for create_pr in (False, True):
        with pytest.raises(HubAuthError):
            publish(pair(), create_pr=create_pr)
    assert world.written() == []


def test_a_fine_grained_token_without_the_right_is_told_what_it_lacks(
    world: HubWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    scoped = [{"entity": {"name": "lab"}, "permissions": ["repo.write"]}]
    token = {"role": "fineGrained", "fineGrained": {"scoped": scoped}}
    monkeypatch.setattr(HubWriter, "_whoami", {"name": "owner", "auth": {"accessToken": token}})
    with pytest.raises(HubGatedError, match="a fine-grained token of owner without that right"):
        publish(pair())
    assert world.written() == []


def test_nothing_is_published_offline(world: HubWorld, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(HubUnreachableError, match="Nothing can be published with HF_HUB_OFFLINE=1") as refused:
        publish(pair())
    assert "--dry-run works" in str(refused.value) and "--nla" not in str(refused.value)
    assert world.requests == []


def test_who_only_looks_is_told_everything_that_would_end_a_push(
    world: HubWorld, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refusals(release: Release) -> tuple[str, ...]:
        return look(release, PushOptions(), HubWriter(HubOptions())).refusals

    already(world, pair("first", "v1"))
    assert refusals(pair("second", "v2")) == ()
    (one,) = refusals(pair("second", "v1"))
    assert "names another release" in one and "Next: another name" in one
    connected(world, monkeypatch, tmp_path / "home", READER)
    rights, way = refusals(pair("second", "v1"))
    assert "may only read" in rights and "Next: a token" in rights and way == one
    connected(world, monkeypatch, tmp_path / "home", None)
    assert refusals(pair("second", "v1")) == (one,)


def test_a_pull_request_needs_a_repository(world: HubWorld) -> None:
    with pytest.raises(PublishError, match="no such repository"):
        publish(pair(), create_pr=True)
    assert world.written() == []


# -- the plan ------------------------------------------------------------------------------------------------


def test_the_plan_names_every_file_with_its_size_and_what_is_sent(world: HubWorld) -> None:
    release = pair()
    plan = make_plan(release, PushOptions(private=True), HubWriter(HubOptions()))
    text = "\n".join(lines(plan))
    for repo in release.repos:
        assert f"{repo.name}  (model, private, new)" in text
        for entry in repo.entries:
            assert any(f"{entry.size:,}" in line and entry.name in line for line in text.splitlines())
    assert plan.to_send == release.size
    assert f"to send    {release.size:,} bytes in 6 files at most" in text
    assert f"release    {release.id}" in text and "tag        v1" in text
    assert world.written() == []


def test_a_plan_without_the_hub_says_so_and_counts_files_to_be_made() -> None:
    release = pair()
    unmade = replace(release.repos[1], to_be_written={"model-00001-of-00001.safetensors": 10**9})
    plan = unasked_plan(replace(release, repos=(release.repos[0], unmade), id=None), PushOptions(), "nobody answers")
    text = "\n".join(lines(plan))
    assert "~1,000,000,000" in text and "the Hub was not asked what it has: nobody answers" in text
    assert "not known before its weights are made" in text
    assert plan.to_send == release.size + 10**9


def test_branches_of_other_pushes_are_named(world: HubWorld) -> None:
    already(world, pair())
    HubWriter(HubOptions()).branch(AV, "model", "nla-hub/0123456789ab", start=world.branches(AV)["main"])
    new = pair("second", "v2")
    assert "nla-hub/0123456789ab" in "\n".join(lines(make_plan(new, PushOptions(), HubWriter(HubOptions()))))
    assert branch_of(new) != "nla-hub/0123456789ab"
