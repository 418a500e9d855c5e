"""What is written to the Hub: the real client against a Hub on this machine, and everything that can go wrong in between."""

from __future__ import annotations

import logging
import os
import random
import re
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hub_world import MEMBER, READER, TOKEN, HubWorld, connected
from hub_writer_client import BRANCH, TITLE, folder, offer, outgoing, release
from hypothesis import given, settings
from hypothesis import strategies as st

from nla_hub.errors import HubAuthError, HubError, HubGatedError, HubNotFoundError, HubUnreachableError
from nla_hub.hub import HubOptions, write_refusals, writing
from nla_hub.hub.accounts import may_write
from nla_hub.hub.commits import first_batch
from nla_hub.hub.write_refusals import PATIENCE, TRIES
from nla_hub.hub.writing import HubWriter, Outgoing, RepoKind

REPO = "owner/nla-x-av"
PART = 3000
"""Bytes of one part of an upload here: one of the files below is sent whole, one in parts."""

CARD = b"---\nlibrary_name: nla-hub\ntags:\n- nla\n---\n# A card\n"


def noise(size: int, seed: int) -> bytes:
    return random.Random(seed).randbytes(size)


@dataclass
class Setting:
    """A Hub, a writer of its owner, and the files of a release."""

    world: HubWorld
    writer: HubWriter
    files: list[Outgoing]
    waits: list[float]
    repo: str = REPO

    @property
    def contents(self) -> dict[str, bytes]:
        return {f.name: f.content if isinstance(f.content, bytes) else f.content.read_bytes() for f in self.files}

    @property
    def large(self) -> list[str]:
        return [f.sha256 for f in self.files if f.name.endswith(".safetensors")]

    def stored_once(self) -> None:
        assert {sha: self.world.uploads[sha] for sha in self.large} == dict.fromkeys(self.large, 1)

    def whole(self, kind: RepoKind = "model") -> None:
        """What every push comes to in the end."""
        world, repo = self.world, self.repo
        assert world.files(repo, kind=kind) == self.contents
        assert world.tags(repo, kind) == {"v1": world.branches(repo, kind)["main"]}
        assert set(world.branches(repo, kind)) == {"main"}
        assert list(world.collections().values()).count([repo]) == 1
        assert [c.title for c in world.commits(repo, kind=kind)] == ["Release", "initial commit"]
        self.stored_once()

    def main_is_whole_or_untouched(self) -> None:
        if self.world.exists(self.repo):
            assert self.world.files(self.repo) in ({}, self.contents)


@pytest.fixture
def setting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Setting]:
    with prepared(tmp_path, monkeypatch) as found:
        yield found


@contextmanager
def prepared(root: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Setting]:
    (root / "run").mkdir(parents=True)
    (root / "run" / "large").write_bytes(noise(10_000, 1))
    files = [
        outgoing("README.md", CARD),
        outgoing("config.json", b'{"a": 1}'),
        outgoing("folder/model-00001-of-00002.safetensors", root / "run" / "large"),
        outgoing("folder/model-00002-of-00002.safetensors", noise(2_000, 2)),
    ]
    with HubWorld(root / "hub", part_size=PART) as world:
        waits = connected(world, monkeypatch, root / "home")
        yield Setting(world, HubWriter(HubOptions()), files, waits)


# Success


@pytest.mark.parametrize("kind", ["model", "dataset"])
def test_a_release_arrives_and_main_gets_it_in_one_commit(setting: Setting, kind: RepoKind) -> None:
    commit = release(setting.writer, REPO, kind, setting.files)
    setting.whole(kind)
    assert setting.world.branches(REPO, kind)["main"] == commit
    assert setting.waits == []
    sizes = {f.sha256: f.size for f in setting.files}
    assert setting.world.received == {sha: sizes[sha] for sha in setting.large}


def test_a_second_call_sends_nothing(setting: Setting) -> None:
    first = release(setting.writer, REPO, "model", setting.files)
    before = len(setting.world.written())
    assert release(setting.writer, REPO, "model", setting.files) == first
    assert {seen.stage for seen in setting.world.written()[before:]} == {"branch", "delete-branch"}
    setting.whole()


def test_what_exists_keeps_its_visibility_and_other_files_of_a_branch_stay(setting: Setting) -> None:
    world, writer = setting.world, setting.writer
    world.seed(REPO, {"old.json": b"{}", "gone.safetensors": b"1"}, private=True)
    assert writer.create(REPO, "model", private=False) is False
    assert writer.is_private(REPO, "model") is True
    assert writer.is_private("owner/absent", "model") is None
    main = writer.tree(REPO, "model", "main")
    assert main is not None
    writer.branch(REPO, "model", BRANCH, start=main.commit)
    held = writer.send(REPO, "model", BRANCH, setting.files, message="m")
    assert set(world.files(REPO, BRANCH)) == {*setting.contents, "old.json", "gone.safetensors"}
    writer.publish(REPO, "model", source=held, revision="main", parent=main.commit, files=setting.files, message="m")
    assert world.files(REPO) == setting.contents
    attributes = world.commits(REPO)[0].files[".gitattributes"].path.read_text()
    assert "*.safetensors filter=lfs" in attributes


def test_publishing_moves_no_large_file(setting: Setting) -> None:
    release(setting.writer, REPO, "model", setting.files)
    uploads = [i for i, seen in enumerate(setting.world.requests) if seen.stage in ("lfs-upload", "lfs-batch")]
    last = max(i for i, seen in enumerate(setting.world.requests) if seen.stage == "commit")
    first = min(i for i, seen in enumerate(setting.world.requests) if seen.stage == "commit")
    assert max(uploads) < first < last
    assert not setting.world.of("download")


def test_a_large_file_outside_of_gitattributes_is_published_and_found_again(setting: Setting) -> None:
    files = [*setting.files, outgoing("tokenizer.json", noise(300, 3) + b"\0")]  # binary: the Hub takes it as large
    first = release(setting.writer, REPO, "model", files)
    assert "tokenizer.json filter=lfs" in setting.world.commits(REPO)[0].files[".gitattributes"].path.read_text()
    assert release(setting.writer, REPO, "model", files) == first


def test_a_pull_request_is_found_again_and_offered(setting: Setting) -> None:
    world = setting.world
    world.seed("guests/nla", {"README.md": CARD})
    page = offer(setting.writer, "guests/nla", "model", setting.files)
    assert offer(setting.writer, "guests/nla", "model", setting.files) == page
    (request,) = world.pull_requests("guests/nla")
    assert (request.title, request.status, request.author) == (TITLE, "open", "owner")
    assert world.files("guests/nla", "refs/pr/1") == setting.contents
    assert world.files("guests/nla") == {"README.md": CARD}
    setting.stored_once()


def test_a_closed_request_or_one_of_somebody_else_is_not_taken(setting: Setting, tmp_path: Path) -> None:
    world, writer = setting.world, setting.writer
    world.seed(REPO, {"README.md": CARD})
    other = HubWriter(HubOptions(token=MEMBER)).pull_request(REPO, "model", title=TITLE, description="")
    mine = writer.pull_request(REPO, "model", title=TITLE, description="")
    assert (other.number, mine.number, mine.ref) == (1, 2, "refs/pr/2")
    writer.offer(REPO, "model", mine)
    world.pull_requests(REPO)[1].status = "closed"
    writer.offer(REPO, "model", mine)
    assert [request.status for request in world.pull_requests(REPO)] == ["draft", "closed"]
    assert writer.pull_request(REPO, "model", title=TITLE, description="").number == 3


def test_a_collection_is_found_by_title_or_slug(setting: Setting) -> None:
    world, writer = setting.world, setting.writer
    world.seed(REPO, {})
    world.seed("owner/data", {}, kind="dataset")
    items: list[tuple[str, RepoKind]] = [(REPO, "model"), ("owner/data", "dataset")]
    page = writer.collect("owner/Our NLAs", items[:1], private=True)
    assert writer.collect("owner/our nlas", items, private=False) == page
    (slug,) = world.collections()
    assert writer.collect(slug, items, private=False) == page == f"{world.url}/collections/{slug}"
    assert world.collections() == {slug: [REPO, "owner/data"]}
    assert len(world.of("new-collection")) == 1
    with pytest.raises(HubError, match="not the name of a collection"):
        writer.collect("owner", items, private=False)
    with pytest.raises(HubNotFoundError):
        writer.collect(f"owner/x-{'0' * 24}", items, private=False)


def test_pages(setting: Setting) -> None:
    address = setting.writer.url
    assert address(REPO, "model") == f"{setting.world.url}/{REPO}"
    assert address(REPO, "dataset", "a/b") == f"{setting.world.url}/datasets/{REPO}/tree/a%2Fb"


# Batches


def test_a_release_is_cut_into_commits_and_what_is_committed_is_told(
    setting: Setting, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writing, "COMMIT_FILES", 3)
    files = [outgoing(f"{i:02}.json", b"%d" % i) for i in range(8)]
    setting.world.seed(REPO, {"00.json": b"0"})
    told: list[tuple[str, int]] = []
    setting.writer.send(REPO, "model", "main", files, message="m", progress=lambda *file: told.append(file))
    assert told == [(file.name, file.size) for file in files]
    assert len(setting.world.of("commit")) == 3


@pytest.mark.parametrize(
    ("sizes", "most", "expected"),
    [
        ([1, 1, 1], 2, 2),
        ([6 * 2**30, 1], 9, 1),
        ([2**31, 2**31, 2**31], 9, 2),
        ([9_000_000] * 9, 9, 3),
        ([11_000_000] * 9, 9, 9),
        ([2**40], 9, 1),
    ],
)
def test_a_batch_has_bounds_of_number_and_bytes(sizes: list[int], most: int, expected: int) -> None:
    files = [Outgoing(str(i), b"", size, "", "") for i, size in enumerate(sizes)]
    assert len(first_batch(files, most)) == expected


def test_a_413_halves_the_batch_down_to_one_file(setting: Setting) -> None:
    world = setting.world
    world.seed(REPO, {})
    world.most_operations = 2
    files = [outgoing(f"{i}.json", b"%d" % i) for i in range(9)]
    setting.writer.send(REPO, "model", "main", files, message="m")
    assert len(world.files(REPO)) == 9
    assert [seen.status for seen in world.of("commit")] == [413, 413, 200, 200, 200, 200, 200]
    world.most_operations = 0
    with pytest.raises(HubError, match=r"more than the Hub takes at once.*\n.*shards"):
        setting.writer.send(REPO, "model", "main", [outgoing("x.json", b"x"), outgoing("y.json", b"y")], message="m")
    with pytest.raises(HubError, match="more than the Hub takes at once"):
        setting.writer.publish(
            REPO,
            "model",
            source=held(setting.writer),
            revision="main",
            parent=held(setting.writer).commit,
            files=files[:1],
            message="m",
        )
    assert len(world.files(REPO)) == 9


def held(writer: HubWriter, revision: str = "main") -> writing.Tree:
    found = writer.tree(REPO, "model", revision)
    assert found is not None
    return found


# main


def test_main_is_not_touched_where_somebody_has_committed_since(setting: Setting) -> None:
    world, writer = setting.world, setting.writer
    seen = world.seed(REPO, {"README.md": CARD})
    writer.branch(REPO, "model", BRANCH, start=seen)
    source = writer.send(REPO, "model", BRANCH, setting.files, message="m")
    theirs = world.seed(REPO, {"theirs.json": b"{}"})
    with pytest.raises(HubError, match=r"Somebody else has committed.*HTTP 412"):
        writer.publish(REPO, "model", source=source, revision="main", parent=seen, files=setting.files, message="m")
    assert world.branches(REPO)["main"] == theirs
    assert len(world.of("commit")) == 2  # the branch's, and one refused: not sent again
    assert setting.waits == []


def test_a_commit_whose_answer_is_lost_is_looked_for_and_not_sent_again(setting: Setting) -> None:
    world, writer = setting.world, setting.writer
    seen = world.seed(REPO, {"old.json": b"{}", "gone.safetensors": b"1"})
    writer.branch(REPO, "model", BRANCH, start=seen)
    source = writer.send(REPO, "model", BRANCH, setting.files, message="m")
    world.cut("commit", applied=True)
    found = writer.publish(REPO, "model", source=source, revision="main", parent=seen, files=setting.files, message="m")
    assert found == world.branches(REPO)["main"]
    assert world.files(REPO) == setting.contents
    assert len(world.of("commit")) == 2
    assert setting.waits == []


def test_what_is_not_on_the_branch_is_not_published(setting: Setting) -> None:
    main = setting.world.seed(REPO, {"README.md": CARD})
    source = held(setting.writer)
    with pytest.raises(HubError, match=r"not on the upload branch[\s\S]*config.json"):
        setting.writer.publish(
            REPO, "model", source=source, revision="main", parent=main, files=setting.files, message="m"
        )
    assert not setting.world.written()


def test_a_file_that_changes_while_it_is_sent_is_noticed(setting: Setting, tmp_path: Path) -> None:
    setting.world.seed(REPO, {})
    files = [outgoing("model.safetensors", tmp_path / "run" / "large")]
    (tmp_path / "run" / "large").write_bytes(noise(10_000, 9))
    with pytest.raises(HubError, match=r"not what was to be sent[\s\S]*- model.safetensors"):
        setting.writer.send(REPO, "model", "main", files, message="m")
    (tmp_path / "run" / "large").unlink()
    with pytest.raises(HubError, match="cannot be sent"):
        setting.writer.send(REPO, "model", "main", files, message="m")


def test_a_tag_is_never_moved(setting: Setting) -> None:
    first = setting.world.seed(REPO, {"a.json": b"1"})
    second = setting.world.seed(REPO, {"a.json": b"2"})
    setting.writer.tag(REPO, "model", "v1", commit=first, message="")
    with pytest.raises(HubError, match="names another commit"):
        setting.writer.tag(REPO, "model", "v1", commit=second, message="")
    assert setting.world.tags(REPO) == {"v1": first}


# Refusals


def test_a_token_that_is_wrong_missing_or_may_only_read(
    setting: Setting, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    wrong = "hf_" + "n0t0neThatTheHubKnows" * 2

    def refusal(token: str | bool, error: type[HubError], *words: str) -> None:
        with pytest.raises(error) as raised:
            release(HubWriter(HubOptions(token=token)), REPO, "model", setting.files)
        for word in words:
            assert word in str(raised.value)
        assert not {TOKEN, READER, wrong} & set(str(raised.value).split()), "no token in an error"

    refusal(wrong, HubAuthError, "does not accept this token", "HTTP 401", "type write")
    refusal(False, HubAuthError, "nobody is logged in", "type write")
    assert HubWriter(HubOptions(token=False)).tree(REPO, "model", "main") is None, "a 401 without a token says no more"
    refusal(READER, HubGatedError, "may read and not write", "HTTP 403", "type write")
    monkeypatch.delenv("HF_TOKEN")
    refusal(True, HubAuthError, "nobody is logged in", "hf auth login")
    assert not setting.world.exists(REPO)
    assert not [token for token in (TOKEN, READER, wrong) if token in caplog.text]
    assert setting.waits == []


def test_somebody_elses_namespace(setting: Setting) -> None:
    for repo in ("guests/nla", "strangers/nla"):
        with pytest.raises(HubGatedError, match=r"may not write here: You don't have the rights[\s\S]*contributor"):
            setting.writer.create(repo, "model", private=False)
    setting.world.seed("strangers/nla", {})
    with pytest.raises(HubGatedError, match=r"required permissions[\s\S]*fine-grained[\s\S]*--create-pr"):
        setting.writer.branch("strangers/nla", "model", BRANCH, start=setting.world.branches("strangers/nla")["main"])
    assert HubWriter(HubOptions(token=MEMBER)).create("lab/nla", "model", private=True)


def test_a_private_repository_that_the_token_cannot_see_is_a_conflict_of_names(setting: Setting) -> None:
    setting.world.seed("lab/secret", {}, private=True)
    setting.world.tokens[TOKEN] = setting.world.tokens[READER]
    assert setting.writer.tree("lab/secret", "model", "main") is None
    setting.world.seed("owner/hidden", {}, private=True)
    setting.world.fail("info", 404, 2, repo="owner/hidden")
    setting.world.tokens[TOKEN] = type(setting.world.tokens[TOKEN])("owner")
    with pytest.raises(HubError, match=r"already created[\s\S]*name be taken"):
        setting.writer.create("owner/hidden", "model", private=True)


@pytest.mark.parametrize(
    ("status", "message", "error", "words"),
    [
        (400, "Bad metadata", HubError, "does not accept this: Bad metadata"),
        (402, "Payment required", HubError, "plan does not cover"),
        (
            403,
            "Private repository storage limit reached, please upgrade your plan",
            HubError,
            "storage on the Hub is used up",
        ),
        (403, "Forbidden: you must use a write token to upload", HubGatedError, "may read and not write"),
        (409, "Another commit is in progress", HubError, "conflict: Another commit is in progress"),
        (412, "A commit has happened since", HubError, "Somebody else has committed"),
        (413, "Payload Too Large", HubError, "more than the Hub takes at once"),
    ],
)
def test_refusals_of_a_commit_are_told_at_once(
    setting: Setting, status: int, message: str, error: type[HubError], words: str
) -> None:
    setting.world.seed(REPO, {})
    setting.world.fail("commit", status, 99, message=message)
    with pytest.raises(error, match=words) as raised:
        setting.writer.send(REPO, "model", "main", setting.files[:1], message="m")
    assert f"HTTP {status}" in str(raised.value)
    assert "\n  Next: " in str(raised.value)
    assert len(setting.world.of("commit")) == 1
    assert setting.waits == []


def test_invalid_metadata_is_told(setting: Setting) -> None:
    setting.world.seed(REPO, {})
    card = outgoing("README.md", b"---\ntags: [nla\n---\n")
    with pytest.raises(HubError, match=r"cannot be sent: Invalid metadata in README.md. - while parsing"):
        setting.writer.send(REPO, "model", "main", [card], message="m")


def test_a_429_is_waited_for_as_told_and_no_longer(setting: Setting) -> None:
    setting.world.seed(REPO, {})
    setting.world.fail("commit", 429, 2, {"Retry-After": "17"})
    setting.writer.send(REPO, "model", "main", setting.files, message="m")
    assert setting.waits == [17, 17]
    setting.world.fail("branch", 429, 1, {"RateLimit": '"api";r=0;t=55'})
    setting.writer.branch(REPO, "model", BRANCH, start=setting.world.branches(REPO)["main"])
    assert setting.waits[2:] == [55]
    setting.world.fail("tag", 429, 99, {"Retry-After": "7200"})
    with pytest.raises(HubError, match=r"fewer requests[\s\S]*in 2 hours: what has arrived is not sent again"):
        setting.writer.tag(REPO, "model", "v1", commit=setting.world.branches(REPO)["main"], message="")
    assert setting.waits[3:] == []
    setting.world.fail("delete-branch", 429, 99, {"Retry-After": "60"})
    with pytest.raises(HubError, match="fewer requests"):
        setting.writer.delete_branch(REPO, "model", BRANCH)
    assert setting.waits[3:] == [60] * int(PATIENCE // 60)


def test_a_hub_that_fails_for_good_is_told_after_growing_waits(setting: Setting) -> None:
    setting.world.seed(REPO, {})
    setting.world.fail("commit", 503, 99, message="Down")
    with pytest.raises(HubError, match=rf"error {TRIES} times: Down[\s\S]*status.huggingface.co"):
        setting.writer.send(REPO, "model", "main", setting.files[:1], message="m")
    assert setting.waits == [1, 2, 4, 8]
    setting.world.faults.clear()
    setting.world.cut("branch", 99)
    with pytest.raises(HubUnreachableError, match=r"broke off 5 times[\s\S]*same command again"):
        setting.writer.branch(REPO, "model", BRANCH, start=setting.world.branches(REPO)["main"])


def test_without_network_or_with_something_else_there(setting: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    setting.world.seed(REPO, {})
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(HubUnreachableError, match="HF_HUB_OFFLINE"):
        setting.writer.tree(REPO, "model", "main")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    assert setting.waits == []
    setting.world.fail("whoami", 200, 99, page=b"<html>log in to the network of this hotel</html>")
    with pytest.raises(HubUnreachableError, match="not a Hugging Face Hub"):
        HubWriter(HubOptions()).account()


@pytest.mark.parametrize(
    ("raised", "error", "words", "waits"),
    [
        (ConnectionError("Network error: error sending request for url (http://x/?X-Sig=abc)"), HubUnreachableError,
         r"Hub's storage broke off 5 times.*http://x/\?\.\.\.[\s\S]*HF_HUB_DISABLE_XET", [1, 2, 4, 8]),
        (TimeoutError("too slow"), HubUnreachableError, "storage broke off", [1, 2, 4, 8]),
        (ConnectionError("Network error: Request error: HTTP status client error (403 Forbidden), domain: x"), HubGatedError,
         "may not write here", []),
        (ConnectionError("Network error: Request error: HTTP status client error (401 Unauthorized), domain: x"), HubAuthError,
         "does not accept this token", []),
        (RuntimeError("Data processing error: hf_abcdefgh"), HubError, r"Sending failed: Data processing error: hf_\*\*\*", []),
        (PermissionError("[Errno 13] Permission denied: 'x'"), HubError, "cannot be read", []),
    ],
)  # fmt: skip
def test_what_hf_xet_and_the_disk_raise(
    setting: Setting,
    monkeypatch: pytest.MonkeyPatch,
    raised: Exception,
    error: type[HubError],
    words: str,
    waits: list[float],
) -> None:
    """hf_xet's own errors, as it raised them against servers that refused, failed or were not there (1.8.0)."""
    from huggingface_hub import HfApi

    def fails(*_: Any, **__: Any) -> None:
        raise raised

    setting.world.seed(REPO, {})
    monkeypatch.setattr(HfApi, "create_commit", fails)
    with pytest.raises(error, match=words):
        setting.writer.send(REPO, "model", "main", setting.files, message="m")
    assert setting.waits == waits


@pytest.mark.parametrize(
    ("whoami", "may"),
    [
        ({"name": "me", "auth": {"accessToken": {"role": "write"}}}, {"me": True, "org": False}),
        ({"name": "me", "auth": {"accessToken": {"role": "read"}}}, {"me": False}),
        ({"name": "me", "orgs": [{"name": "org", "roleInOrg": "contributor"}, {"name": "x", "roleInOrg": "read"}]},
         {"me": True, "org": True, "x": False}),
        (
            {
                "name": "me",
                "orgs": [{"name": "org", "roleInOrg": "admin"}],
                "auth": {
                    "accessToken": {
                        "role": "fineGrained",
                        "fineGrained": {
                            "scoped": [
                                {"entity": {"name": "me"}, "permissions": ["repo.content.read"]},
                                {"entity": {"name": "lab/one"}, "permissions": ["repo.content.read", "repo.write"]},
                            ]
                        },
                    }
                },
            },
            {"me": False, "org": False, "lab": True},
        ),
    ],
)  # fmt: skip
def test_what_a_token_may(whoami: dict[str, Any], may: dict[str, bool]) -> None:
    assert {owner: may_write(whoami, owner) for owner in may} == may


# Faults at every stage

STAGES = {
    # stage -> how often a push comes there
    "whoami": 1,
    "info": 3,
    "create": 1,
    "tree": 2,
    "refs": 2,
    "branch": 1,
    "validate-yaml": 2,
    "preupload": 2,
    "lfs-batch": 1,
    "lfs-upload": 5,
    "lfs-complete": 1,
    "lfs-verify": 2,
    "commit": 2,
    "paths-info": 2,
    "tag": 1,
    "delete-branch": 1,
    "collections": 1,
    "new-collection": 1,
    "collection": 1,
    "collection-item": 1,
}
"""Every request of a push."""

CHANGING = ("create", "branch", "lfs-upload", "lfs-complete", "lfs-verify", "commit", "tag", "delete-branch", "new-collection",
            "collection-item")  # fmt: skip


def test_the_stages_are_all_of_them(setting: Setting) -> None:
    release(setting.writer, REPO, "model", setting.files)
    asked = Counter(seen.stage for seen in setting.world.requests if seen.stage != "unknown")
    assert set(asked) == set(STAGES)
    assert all(asked[stage] >= times for stage, times in STAGES.items())


HOW = {
    "cut": {},
    "reset": {"reset": True},
    "cut within": {"after": 700},
    "carried out, unanswered": {"applied": True},
}


@pytest.mark.parametrize("how", HOW)
def test_every_connection_may_be_cut_once(setting: Setting, how: str) -> None:
    for stage, times in STAGES.items():
        if how == "carried out, unanswered" and stage in CHANGING:
            setting.world.cut(stage, 1 if stage == "lfs-upload" else times, **HOW[how])
        elif how != "carried out, unanswered":
            for skip in range(times):  # counted over those that are let through
                setting.world.cut(stage, skip=skip, **HOW[how])
    release(setting.writer, REPO, "model", setting.files)
    assert not [fault for fault in setting.world.faults if fault.times], "every fault has happened"
    if how == "carried out, unanswered":
        forget_resent(setting)
    setting.whole()


def forget_resent(setting: Setting) -> None:
    """What arrived whole, without the client being told, it sends once more within the same attempt."""
    assert {setting.world.uploads[sha] for sha in setting.large} <= {1, 2}
    setting.world.uploads.update({sha: 1 - setting.world.uploads[sha] for sha in setting.large})


@pytest.mark.parametrize("status", [429, 500, 502, 503, 504])
def test_every_request_may_fail_once(setting: Setting, status: int) -> None:
    for stage, times in STAGES.items():
        for skip in range(times):
            page = b"<html>503 Service Unavailable</html>" if status == 503 else None
            setting.world.fail(stage, status, skip=skip, page=page)
    release(setting.writer, REPO, "model", setting.files)
    setting.whole()


@pytest.mark.parametrize("stage", STAGES)
def test_a_push_given_up_anywhere_is_finished_by_the_next(
    setting: Setting, stage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(write_refusals, "TRIES", 2)
    setting.world.cut(stage, 999)
    # A large file whose last byte has arrived is stored: that the check of it fails is not noticed in the next try.
    with nullcontext() if stage == "lfs-verify" else pytest.raises(HubUnreachableError):
        release(setting.writer, REPO, "model", setting.files)
    setting.main_is_whole_or_untouched()
    setting.world.faults.clear()
    release(HubWriter(HubOptions()), REPO, "model", setting.files)
    setting.whole()


@pytest.mark.parametrize("stage", CHANGING)
def test_a_hub_that_does_as_told_and_never_answers(
    setting: Setting, stage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(write_refusals, "TRIES", 2)
    setting.world.cut(stage, 999, applied=True)
    # Whether an item is in a collection is asked by adding it again, and a part's answer is needed to put parts together.
    found_out = stage not in ("collection-item", "lfs-upload")
    with nullcontext() if found_out else pytest.raises(HubUnreachableError):
        release(setting.writer, REPO, "model", setting.files)
    arrived = {sha: setting.world.received[sha] for sha in setting.world.uploads}
    setting.world.faults.clear()
    release(HubWriter(HubOptions()), REPO, "model", setting.files)
    assert {sha: setting.world.received[sha] for sha in arrived} == arrived, "the next push sends no stored file"
    setting.world.uploads = Counter(setting.large)
    setting.whole()


@pytest.mark.parametrize("stage", ["discussions", "discussion", "discussion-details", "discussion-status", "commit"])
@pytest.mark.parametrize("applied", [False, True], ids=["before", "after"])
def test_a_cut_pull_request_is_not_opened_twice(setting: Setting, stage: str, applied: bool) -> None:
    setting.world.seed(REPO, {"README.md": CARD})
    setting.world.cut(stage, applied=applied)
    offer(setting.writer, REPO, "model", setting.files)
    (request,) = setting.world.pull_requests(REPO)
    assert request.status == "open"
    assert setting.world.files(REPO, "refs/pr/1") == setting.contents
    assert [c.title for c in setting.world.commits(REPO, "refs/pr/1")] == [
        "Files of a release",
        "seeded",
        "initial commit",
    ]
    setting.stored_once()


def test_an_address_of_the_storage_that_holds_no_longer_is_asked_for_again(setting: Setting) -> None:
    setting.world.fail("lfs-upload", 403, message="Request has expired")
    release(setting.writer, REPO, "model", setting.files)
    setting.whole()
    setting.world.fail("lfs-upload", 403, 99, message="Request has expired")
    with pytest.raises(HubError, match="storage does not take a file: Request has expired"):
        setting.writer.send(REPO, "model", "main", [outgoing("new.safetensors", b"new")], message="m")


FAULTS = st.tuples(
    st.sampled_from(sorted(STAGES)),
    st.integers(0, 4),
    st.sampled_from(["cut", "applied", "reset", 400, 401, 403, 404, 409, 412, 413, 429, 500, 502, 504]),
    st.sampled_from([1, 2, 8]),
)


def after_a_fault(root: Path, stage: str, skip: int, what: str | int, times: int) -> None:
    with pytest.MonkeyPatch.context() as patch, prepared(root, patch) as setting:
        if isinstance(what, int):
            setting.world.fail(stage, what, times, {"Retry-After": "1"} if what == 429 else None, skip=skip)
        else:
            setting.world.cut(stage, times, applied=what == "applied", reset=what == "reset", skip=skip)
        try:
            release(setting.writer, REPO, "model", setting.files)
        except HubError:
            setting.main_is_whole_or_untouched()
            setting.world.faults.clear()
            release(HubWriter(HubOptions()), REPO, "model", setting.files)
        if what == "applied" and stage == "lfs-upload":
            setting.world.uploads = Counter(setting.large)
        setting.whole()


@settings(max_examples=12)
@given(fault=FAULTS)
def test_after_any_single_fault_the_next_push_ends_with_the_same_tree(
    tmp_path_factory: pytest.TempPathFactory, fault: tuple[str, int, str | int, int]
) -> None:
    after_a_fault(tmp_path_factory.mktemp("hub"), *fault)


@pytest.mark.slow
@settings(max_examples=1000)
@given(fault=FAULTS)
def test_after_any_single_fault_of_many(
    tmp_path_factory: pytest.TempPathFactory, fault: tuple[str, int, str | int, int]
) -> None:
    after_a_fault(tmp_path_factory.mktemp("hub"), *fault)


# Kills

KILLS: dict[str, tuple[str, dict[str, Any]]] = {
    "branch made": ("branch", {"applied": True}),
    "within the first part": ("lfs-upload", {"after": 1500}),
    "within a later part": ("lfs-upload", {"after": 100, "skip": 3}),
    "before the check": ("lfs-verify", {"skip": 1}),
    "before the branch's commit": ("commit", {}),
    "after the branch's commit": ("commit", {"applied": True}),
    "before main's commit": ("commit", {"skip": 1}),
    "after main's commit": ("commit", {"skip": 1, "applied": True}),
    "tagged": ("tag", {"applied": True}),
}
"""When a push is killed."""


@dataclass
class Killed:
    """A Hub as many killed pushes have left it, one repository each."""

    world: HubWorld
    root: Path
    received: Counter[str]

    @staticmethod
    def repo(when: str) -> str:
        return f"owner/{re.sub('[^a-z]+', '-', when)}"


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Killed]:
    root = tmp_path_factory.mktemp("killed")
    for seed, when in enumerate(KILLS):
        place = root / "run" / Killed.repo(when)
        (place / "folder").mkdir(parents=True)
        (place / "README.md").write_bytes(CARD)
        for part, size in enumerate((10_000, 2_000)):
            (place / "folder" / f"model-0000{part + 1}-of-00002.safetensors").write_bytes(
                noise(size, 100 * seed + part)
            )
    with HubWorld(root / "hub", part_size=PART) as world:
        held = {when: world.pause(stage, repo=Killed.repo(when), **how) for when, (stage, how) in KILLS.items()}
        command = [sys.executable, str(Path(__file__).with_name("hub_writer_client.py")), str(root / "run")]
        process = subprocess.Popen(
            command,
            env=world.environment(root / "home"),
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            start_new_session=True,
        )
        try:
            assert process.stdout is not None
            ids = dict(reversed(process.stdout.readline().split()) for _ in KILLS)
            for when, request in held.items():
                assert request.reached.wait(60), when
                os.kill(int(ids[Killed.repo(when)]), signal.SIGKILL)
                request.drop()
            assert process.wait(60) == 0, "all of them are gone"
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
        yield Killed(world, root, world.received.copy())


@pytest.mark.parametrize("when", KILLS)
def test_a_killed_push_is_finished_by_the_next_and_nothing_is_sent_twice(
    killed: Killed, when: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    world, repo = killed.world, killed.repo(when)
    waits = connected(world, monkeypatch, tmp_path / "home")
    setting = Setting(world, HubWriter(HubOptions()), folder(killed.root / "run" / repo), waits, repo)
    stored = [sha for sha in setting.large if world.uploads[sha]]
    assert len(stored) == (0 if when == "branch made" else 2) or "within" in when or "check" in when
    setting.main_is_whole_or_untouched()
    release(setting.writer, repo, "model", setting.files)
    setting.whole()
    for sha in stored:
        assert world.received[sha] == killed.received[sha], "of what was stored, not a byte is sent again"
    assert waits == []
