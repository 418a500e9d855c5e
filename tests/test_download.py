"""Downloads: what arrives works without network, what was cut short is continued, and what is in the way is refused."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from conftest import Case
from hub_world import HubWorld, connected
from huggingface_hub import constants
from parity import close, engine_logits
from typer.testing import CliRunner, Result
from wild import TEXTS, Built, World, easynla_rl, peft_pair, vectors, write_sidecar

from nla_hub import NLA, hub, zoo
from nla_hub.cli.app import app
from nla_hub.errors import CheckpointError, HubGatedError, HubUnreachableError, RunError
from nla_hub.hub import HubOptions
from nla_hub.sidecar import ReleaseRecord, Sidecar
from nla_hub.zoo import ZooEntry

AV, AR, BASE = "owner/nla-x-L2-av", "owner/nla-x-L2-ar", "random/source"
RELEASE = ReleaseRecord("0123456789ab", "v1")
TEXT = "the cat sees"
PEFT = find_spec("peft") is not None


@pytest.fixture(scope="module")
def published(llama: Case, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The repositories of a pair as directories, with what a download leaves out."""
    root = tmp_path_factory.mktemp("published")
    for role, repo in (("av", AR), ("ar", AV)):
        shutil.copytree(getattr(llama.pair, role), root / role)
        sidecar = Sidecar.read(root / role)
        sidecar.with_(release=RELEASE, pair_repo=repo).write(root / role)
        for name in ("LICENSE", "NOTICE", "README.md", "USE_POLICY.md", "modeling_evil.py", "pytorch_model.bin"):
            (root / role / name).write_text(f"{name} of the {role}")
        (root / role / "fve_reference.safetensors").write_bytes((root / role / "model.safetensors").read_bytes()[:2000])
    (root / "ar" / "fve_reference.safetensors").unlink()
    shutil.copytree(llama.pair.source, root / "source")
    return {AV: root / "av", AR: root / "ar", BASE: root / "source"}


@pytest.fixture
def world(published: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubWorld]:
    """A Hub with the pair, of which this process knows nothing yet; the working directory is an empty one."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with HubWorld(tmp_path / "hub") as world:
        connected(world, monkeypatch, tmp_path / "home")
        quick = SimpleNamespace(sleep=lambda seconds: None, time=time.time)
        monkeypatch.setattr("huggingface_hub.file_download.time", quick)  # a second between two tries
        commits = {repo: world.seed(repo, place) for repo, place in published.items()}
        world.store.repo(AR, "model").tags[RELEASE.tag] = commits[AR]
        yield world


def run(*args: str) -> Result:
    return CliRunner().invoke(app, ["download", *args])


def done(*args: str) -> list[str]:
    """The lines that a download which must work prints."""
    result = run(*args)
    assert result.exit_code == 0, result.stderr + str(result.exception)
    return result.stdout.splitlines()


def refused(*args: str) -> str:
    result = run(*args)
    assert result.exit_code == 1, result.stdout
    return result.stderr


def fetched(world: HubWorld) -> list[str]:
    """Names of the large files whose bytes were asked for."""
    by_sha = {
        blob.sha256: f"{repo.name}/{name}"
        for repo in world.store.repos.values()
        for commit in repo.commits.values()
        for name, blob in commit.files.items()
    }
    return [by_sha[seen.path.rsplit("/", 1)[-1].partition("?")[0]] for seen in world.of("download")]


def names(directory: Path) -> set[str]:
    return {path.name for path in directory.iterdir()}


def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)


def explained(name: str | Path) -> list[str | None]:
    return [e.raw for e in NLA.from_pretrained(name).explain([TEXT], temperature=0, max_new_tokens=8)]


# -- into the cache ------------------------------------------------------------------------------------------

OFFLINE = """
import json, sys, torch
from nla_hub import NLA
torch.set_num_threads(1)
name, text = sys.argv[1:]
nla = NLA.from_pretrained(name)
rows = nla.explain([text], temperature=0, max_new_tokens=8)
print(json.dumps([[row.raw for row in rows], nla.reconstruct("x").tolist()]))
"""


def test_a_download_with_its_source_works_in_a_process_without_network(
    world: HubWorld, llama: Case, tmp_path: Path
) -> None:
    lines = done(AV, "--with-source")
    assert lines[-1] == f'nla-hub explain "..." --nla {AV}'
    assert [line.split()[0] for line in lines] == ["part", "av", "ar", "source", "nla-hub"]
    n = len(world.requests)
    environment = world.environment(tmp_path / "home", token=None) | {"HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", OFFLINE, AV, TEXT]
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240, check=False)
    assert ran.returncode == 0, ran.stderr[-3000:]
    expected = [e.raw for e in llama.nla.explain([TEXT], temperature=0, max_new_tokens=8)]
    assert json.loads(ran.stdout) == [expected, llama.nla.reconstruct("x").tolist()]
    assert len(world.requests) == n


@pytest.mark.parametrize(("named", "given"), [("tiny-source", "tiny"), ("my-recipe-source", "./BASE")])
def test_a_base_model_that_is_not_on_the_hub_stands_in_the_line_to_use(world: HubWorld, named: str, given: str) -> None:
    for repo in (AV, AR):
        contract = world.files(repo)["nla_meta.yaml"].replace(BASE.encode(), named.encode())
        commit = world.seed(repo, {"nla_meta.yaml": contract})
        world.store.repo(repo, "model").tags[RELEASE.tag] = commit
    assert done(AV)[-1] == f'nla-hub explain "..." --nla {AV} --base-model {given}'
    assert done(AV, "--base-model", BASE)[-1] == f'nla-hub explain "..." --nla {AV} --base-model {BASE}'


def test_without_its_source_a_pair_explains_vectors_and_says_what_it_lacks(
    world: HubWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    done(AV)
    offline(monkeypatch)
    nla = NLA.from_pretrained(AV)
    assert nla.verbalize(torch.ones(nla.d_model), temperature=0, max_new_tokens=4).raw
    with pytest.raises(HubUnreachableError, match=BASE):
        nla.capture(TEXT)


def test_only_what_is_needed_is_fetched_and_only_once(world: HubWorld) -> None:
    done(AV)
    weights = [f"{AV}/model.safetensors", f"{AR}/model.safetensors", f"{AR}/value_head.safetensors"]
    assert sorted(fetched(world)) == sorted(weights)
    asked = {seen.path.rpartition("/")[2] for seen in world.of("resolve")}
    assert not asked & {"pytorch_model.bin", "modeling_evil.py", "fve_reference.safetensors"}
    assert {"LICENSE", "NOTICE", "USE_POLICY.md"} <= asked
    done(AV)
    assert len(fetched(world)) == len(weights)


def test_sizes_are_said_before_anything_large_is_fetched(world: HubWorld, published: dict[str, Path]) -> None:
    result = run(AV, "--with-source", "--dry-run")
    assert result.exit_code == 0
    assert fetched(world) == []
    assert [line.split()[0] for line in result.stdout.splitlines()] == ["part", "av", "ar", "source"]
    rows = [json.loads(line) for line in done(AV, "--dry-run", "--json")]
    size = (published[AV] / "model.safetensors").stat().st_size
    assert rows[0]["part"] == "av" and rows[0]["bytes"] > rows[0]["fetched"] >= size
    assert rows[0]["from"] == f"{AV}@{world.branches(AV)['main']}"
    assert [row["directory"] for row in rows] == [None, None]
    done(AV)
    assert [json.loads(line)["fetched"] for line in done(AV, "--json")] == [0, 0]


def test_an_earlier_revision_and_one_half(world: HubWorld, published: dict[str, Path]) -> None:
    old = world.branches(AV)["main"]
    world.seed(AV, {"README.md": b"newer"})
    lines = done(AV, "--revision", old, "--half", "av")
    assert old[:10] in lines[1]
    assert lines[-1] == f'NLA.from_pretrained("{AV}@{old}", components=("av",))'
    assert fetched(world) == [f"{AV}/model.safetensors"]


def test_a_disk_that_is_too_small_is_found_out_first(
    world: HubWorld, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda place: SimpleNamespace(free=100_000))
    for args in (["--with-source"], ["--to", "pair"]):
        text = refused(AV, *args)
        assert "not enough room" in text and "HF_HOME" in text + "HF_HOME"
        assert fetched(world) == []
    assert not Path("pair").exists()
    monkeypatch.setattr(shutil, "disk_usage", lambda place: SimpleNamespace(free=10**9))
    done(AV)


def test_a_gated_source_says_what_to_accept_before_anything_large_is_fetched(world: HubWorld) -> None:
    gated = {"X-Error-Code": "GatedRepo", "X-Error-Message": "Access is restricted"}
    world.fail("resolve", 403, times=99, headers=gated, repo=BASE)
    text = refused(AV, "--with-source")
    assert f"accept its terms on the page of {BASE}" in text
    assert "leave --with-source out" in text
    assert fetched(world) == []
    done(AV)


def test_an_incomplete_cache_is_no_download(world: HubWorld, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without network a cache lists what it holds: a pair whose weights never came must not pass for one."""
    done(AV, "--dry-run")
    offline(monkeypatch)
    for args in ([], ["--to", "pair"]):
        text = refused(AV, *args)
        assert "The weights of the AV are not all there" in text and "with a connection" in text
    assert not Path("pair").exists()


def test_a_damaged_header_is_refused(world: HubWorld, published: dict[str, Path]) -> None:
    world.seed(AV, {"model.safetensors": (published[AV] / "model.safetensors").read_bytes()[:-8]})
    assert "damaged or incomplete" in refused(AV)
    assert "damaged or incomplete" in refused(AV, "--to", "pair")
    assert not Path("pair/av").exists()


# -- into a directory ----------------------------------------------------------------------------------------


def test_a_directory_holds_the_pair_and_its_papers_and_nothing_else(
    world: HubWorld, llama: Case, published: dict[str, Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    lines = done(AV, "--to", "pair", "--with-source")
    assert lines[-1] == 'nla-hub explain "..." --nla ./pair'
    pair = Path("pair")
    assert names(pair) == {".nla-hub", "av", "ar", "source"}
    left_out = {"modeling_evil.py", "pytorch_model.bin"}
    assert names(pair / "av") == names(published[AV]) - left_out - {"fve_reference.safetensors"}
    assert names(pair / "ar") == names(published[AR]) - left_out
    for repo, role in ((AV, "av"), (AR, "ar"), (BASE, "source")):
        for file in (pair / role).iterdir():
            assert file.read_bytes() == (published[repo] / file.name).read_bytes()
            assert not file.is_symlink()
    assert names(pair / ".nla-hub") == {"download.json", "lock"}
    assert not list((tmp_path / "home").rglob("*.safetensors")), "the large files went straight to the directory"
    offline(monkeypatch)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "empty"))
    assert explained("./pair") == [e.raw for e in llama.nla.explain([TEXT], temperature=0, max_new_tokens=8)]
    assert not (tmp_path / "empty").exists()


def test_what_the_cache_holds_is_copied_from_there(world: HubWorld, monkeypatch: pytest.MonkeyPatch) -> None:
    done(AV, "--with-source")
    n = len(world.of("download"))
    offline(monkeypatch)
    done(AV, "--with-source", "--to", "pair")
    assert explained("./pair")
    assert len(world.of("download")) == n


def test_a_file_that_is_damaged_in_the_cache_is_fetched_again(
    world: HubWorld, published: dict[str, Path], tmp_path: Path
) -> None:
    done(AV)
    blob = next((tmp_path / "home").rglob("models--owner--nla-x-L2-av/snapshots/*/model.safetensors")).resolve()
    data = bytearray(blob.read_bytes())
    data[-1] ^= 1
    blob.write_bytes(data)
    n = len(fetched(world))
    done(AV, "--to", "pair")
    assert fetched(world)[n:] == [f"{AV}/model.safetensors"]
    assert Path("pair/av/model.safetensors").read_bytes() == (published[AV] / "model.safetensors").read_bytes()


def test_the_same_command_again_fetches_nothing_and_more_parts_are_added(world: HubWorld) -> None:
    done(AV, "--to", "pair")
    before = fetched(world)
    assert [json.loads(line)["fetched"] for line in done(AV, "--to", "pair", "--json")] == [0, 0]
    assert fetched(world) == before
    done(AV, "--to", "pair", "--with-source")
    assert fetched(world)[len(before) :] == [f"{BASE}/model.safetensors"]
    done(AV, "--to", "pair", "--half", "av")
    assert set(json.loads(Path("pair/.nla-hub/download.json").read_text())["parts"]) == {"av", "ar", "source"}


def test_a_download_that_breaks_off_is_continued(world: HubWorld, published: dict[str, Path]) -> None:
    size = (published[AR] / "model.safetensors").stat().st_size
    world.cut("download", times=200, after=size // 2, repo=AR)
    assert "broke off" in refused(AV, "--to", "pair")
    assert names(Path("pair")) == {".nla-hub", "av"}, "a part appears once it is complete"
    world.faults.clear()
    before = len(fetched(world))
    done(AV, "--to", "pair")
    assert f"{AV}/model.safetensors" not in fetched(world)[before:]
    assert explained("./pair") and len(fetched(world)[before:]) <= 3


@pytest.mark.slow
def test_a_killed_download_is_continued(world: HubWorld, published: dict[str, Path], tmp_path: Path) -> None:
    held = world.pause("download", after=1000, skip=1)
    environment = world.environment(tmp_path / "home")
    command = [sys.executable, "-m", "nla_hub", "download", AV, "--to", "pair", "--with-source"]
    with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert held.reached.wait(60)
        finally:
            process.send_signal(signal.SIGKILL)
            held.drop()
            process.communicate()
    before = fetched(world)
    assert before[0] == f"{AV}/model.safetensors"
    done(AV, "--to", "pair", "--with-source")
    assert f"{AV}/model.safetensors" not in fetched(world)[len(before) :], "what had arrived is not fetched again"
    for repo, role in ((AV, "av"), (AR, "ar"), (BASE, "source")):
        weights = Path("pair") / role / "model.safetensors"
        assert weights.read_bytes() == (published[repo] / "model.safetensors").read_bytes()
    assert names(Path("pair") / ".nla-hub") == {"download.json", "lock"}


def test_what_was_fetched_before_a_kill_is_held_against_its_sha256(world: HubWorld) -> None:
    """A process may end between the last byte of a file and its check."""
    world.cut("download", times=200, repo=AR)
    refused(AV, "--to", "pair")
    world.faults.clear()
    commit = world.branches(AR)["main"]
    cache = Path("pair/.nla-hub/cache").resolve()
    root = hub.fetch_files(AR, ["model.safetensors"], revision=commit, options=HubOptions(cache_dir=cache))
    blob = (root / "model.safetensors").resolve()
    blob.write_bytes(blob.read_bytes()[:-1] + b"\1")
    assert "A file that was fetched before is damaged" in refused(AV, "--to", "pair")
    done(AV, "--to", "pair")
    assert explained("./pair")


def test_a_directory_that_holds_something_else_is_left_alone(world: HubWorld) -> None:
    Path("mine").mkdir()
    Path("mine/thesis.txt").write_text("years of work")
    text = refused(AV, "--to", "mine")
    assert "exists and is not empty" in text and "thesis.txt" in text
    assert names(Path("mine")) == {"thesis.txt"}
    Path("file").write_text("x")
    assert "is a file" in refused(AV, "--to", "file")
    assert "spelled like a repository" in refused(AV, "--to", "owner/name")
    assert fetched(world) == []


def test_a_directory_with_another_download_is_refused_with_the_difference(world: HubWorld) -> None:
    done(AV, "--to", "pair")
    old = world.branches(AV)["main"]
    new = world.seed(AV, {"README.md": b"newer"})
    text = refused(AV, "--to", "pair")
    assert f"AV: {AV}@{old} there, {AV}@{new} now" in text and "name a new directory" in text
    done(f"{AV}@{old}", "--to", "pair")
    (Path("pair") / "source").mkdir()
    assert "source is there, and not from this download" in refused(f"{AV}@{old}", "--to", "pair", "--with-source")


def test_two_downloads_into_one_directory_do_not_meet(world: HubWorld) -> None:
    from nla_hub.locks import Lock

    done(AV, "--to", "pair")
    with_lock = Lock(Path("pair/.nla-hub/lock"))
    try:
        assert "Another process is working here" in refused(AV, "--to", "pair")
    finally:
        with_lock.release()


def test_what_the_user_says_is_written_down(world: HubWorld, published: dict[str, Path], tmp_path: Path) -> None:
    """A directory has no zoo entry and no --sidecar: its own sidecar must say it all."""
    raw = yaml.safe_load((published[AV] / "nla_meta.yaml").read_text())
    del raw["extraction"]["injection_scale"], raw["injection"], raw["integrity"]
    world.seed(AV, {"nla_meta.yaml": yaml.safe_dump(raw, allow_unicode=True).encode()})
    assert "injection_scale" in refused(AV, "--to", "pair")
    (tmp_path / "known.yaml").write_text("extraction: {injection_scale: 8.0}\ninjection: {kind: overwrite}\n")
    done(AV, "--to", "pair", "--sidecar", str(tmp_path / "known.yaml"))
    assert Sidecar.read(Path("pair/av")).injection.scale == 8.0
    assert explained("./pair")


def test_both_halves_in_one_repository(
    world: HubWorld, published: dict[str, Path], llama: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Files of one content, such as the tokenizers, are one file in the cache."""
    for repo, role in ((AV, "av"), (AR, "ar")):
        world.seed("owner/both", {f"{role}/{p.name}": p for p in published[repo].iterdir()})
    done("owner/both", "--to", "pair", "--with-source")
    offline(monkeypatch)
    assert explained("./pair") == [e.raw for e in llama.nla.explain([TEXT], temperature=0, max_new_tokens=8)]


def test_two_files_of_one_content_both_arrive(world: HubWorld) -> None:
    world.seed(AV, {"README.md": b"the same", "USE_POLICY.md": b"the same"})
    done(AV, "--to", "pair", "--half", "av")
    assert {Path("pair/av", name).read_text() for name in ("README.md", "USE_POLICY.md")} == {"the same"}


def test_a_directory_and_an_unknown_name(world: HubWorld) -> None:
    assert "nothing to download" in refused("./x")
    assert "did you mean 'qwen2.5-7b'" in refused("qwen2.5-7")
    assert "no such repository" in refused("owner/absent-av")


# -- named pairs ---------------------------------------------------------------------------------------------


def test_the_packaged_pair_needs_no_download_and_can_be_copied(
    world: HubWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    result = run("tiny")
    assert result.exit_code == 0
    assert "needs no download" in result.stderr
    assert result.stdout.splitlines()[-1] == 'nla-hub explain "..." --nla tiny'
    assert done("tiny", "--to", "bare")[-1] == 'nla-hub explain "..." --nla ./bare --base-model tiny'
    assert done("tiny", "--to", "tiny", "--with-source")[-1] == 'nla-hub explain "..." --nla ./tiny'
    assert world.requests == []
    assert "fve_reference.safetensors" not in names(Path("tiny/av"))
    assert "fve_reference.safetensors" in names(Path("tiny/ar"))
    assert explained("./tiny") == explained("tiny")


def test_a_named_pair_says_where_its_pins_are_behind(
    world: HubWorld, monkeypatch: pytest.MonkeyPatch, published: dict[str, Path]
) -> None:
    old = world.branches(AV)["main"]
    new = world.seed(AV, {"README.md": b"newer"})
    common: dict[str, Any] = {"av": AV, "ar": AR, "base": BASE, "licence": "mit", "adapter": "llama", "summary": "x"}
    named = ZooEntry(**common, layer=2, n_layers=4, d_model=64, name="x", av_revision=old)
    monkeypatch.setattr(zoo, "zoo", lambda: {"x": named})
    result = run("x", "--dry-run")
    assert f"x, AV: pinned at {old[:10]}, main is {new[:10]} now" in result.stderr
    assert "x, AR" not in result.stderr
    assert old[:10] in result.stdout and new[:10] not in result.stdout


# -- LoRAs ---------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not PEFT, reason="the LoRAs are written with peft (extra lora)")
@pytest.mark.parametrize("build", [peft_pair, easynla_rl])
def test_a_lora_brings_what_it_lies_on(
    world: HubWorld, build: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "lora"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of transformers about what peft asks it
        built: Built = build(World(), root)
    base = root / "source" if (root / "source").is_dir() else root / "base"
    world.seed("owner/base", base)
    shutil.rmtree(base)
    world.seed("owner/lora", Path(str(built.name)))
    lines = done("owner/lora", "--to", "pair")
    assert [line.split()[0] for line in lines[1:4]] == ["av", "ar", "source"]
    assert fetched(world).count("owner/base/model.safetensors") == 1
    assert not any("reference" in name for name in fetched(world))
    done("owner/lora")
    offline(monkeypatch)
    for name in ("./pair", "owner/lora"):
        nla = NLA.from_pretrained(name)
        assert built.logits is not None and built.vectors is not None
        close(engine_logits(nla.av.engine, vectors()), built.logits)
        close(nla.reconstruct(list(TEXTS)), built.vectors)


@pytest.mark.skipif(not PEFT, reason="the LoRAs are written with peft (extra lora)")
def test_loras_on_top_of_each_other_go_into_the_cache_or_are_merged(world: HubWorld, tmp_path: Path) -> None:
    made = World()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        made.lora(1).save_pretrained(tmp_path / "x" / "av_sft_lora")
        made.lora(2).save_pretrained(tmp_path / "x" / "av_rl_lora")
    stack = ["av_sft_lora", "av_rl_lora"]
    write_sidecar(tmp_path / "x", made.model_sidecar("av", adapter_stack=stack, pair_repo=AR))
    made.write_base(tmp_path / "base")
    world.seed("owner/base", tmp_path / "base")
    world.seed("owner/stack", tmp_path / "x")
    args = ("owner/stack", "--subfolder", "av_rl_lora", "--half", "av")
    text = refused(*args, "--to", "pair")
    assert "2 LoRAs on top of each other" in text and "nla-hub convert owner/stack" in text
    done(*args)
    assert {
        "owner/stack/av_sft_lora/adapter_model.safetensors",
        "owner/stack/av_rl_lora/adapter_model.safetensors",
    } <= set(fetched(world))


def test_the_errors_are_the_ones_that_the_documentation_names(world: HubWorld) -> None:
    from nla_hub.download import into_cache, parts_of, require_room
    from nla_hub.loading import open_pair
    from nla_hub.locate import resolve_pair

    pair = open_pair(resolve_pair(AV), weights=False)
    assert set(into_cache(pair, parts_of(pair, source=False), HubOptions())) == {"av", "ar"}
    with pytest.raises(RunError, match="not enough room"):
        require_room(2**60, Path("x/y"), advice="make room")
    with pytest.raises(CheckpointError, match="which is not a Hub name"):
        parts_of(replace(pair, base=None), source=True)
    world.fail("resolve", 403, times=99, headers={"X-Error-Code": "GatedRepo"}, repo=BASE)
    with pytest.raises(HubGatedError):
        parts_of(pair, source=True)
