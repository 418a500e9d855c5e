"""What goes wrong in a training run, through the command: one clear message, what is done is kept, the same command goes on."""

from __future__ import annotations

import hashlib
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from av_server import Fault
from label_server import LabelServer
from typer.testing import CliRunner

from nla_hub import yaml_io
from nla_hub.cli.app import app
from nla_hub.errors import RecipeError
from nla_hub.pretrained import load_tokenizer
from nla_hub.tiny import documents
from nla_hub.training.checks import check_recipe
from nla_hub.training.recipe import load_recipe
from nla_hub.training.stages import stages_of

RECIPE: dict[str, Any] = {
    "name": "small",
    "summary": "A pair of nothing much, on the packaged source",
    "seed": 3,
    "base": {"model": "package:tiny/weights/source"},
    "layer": 1,
    "marker": "㊥",
    "prompts": {"av": "<v>{injection_char}</v>", "ar": "<text>{explanation}</text>"},
    "data": {"corpus": "tiny-world", "positions": 1, "min_position": 4},
    "labels": {"labeler": "tiny"},
    "ar": {"documents": 48, "batch_size": 4, "lr": 1.0e-3},
    "av": {"documents": 24, "batch_size": 4, "lr": 1.0e-3},
    "eval": {"protocol": "tiny-eval-v1", "documents": 4},
    "export": {"dtype": "float32"},
}

GO_ON = "run the same command again"
TO_DATA = ("--stage", "source", "--stage", "data")


@dataclass(frozen=True)
class Said:
    """What a command answered."""

    code: int
    text: str


class Run:
    """A recipe in a file and the command on it.

    Args:
        changes: sections or fields of `RECIPE`; of a section's mapping only what is given.
    """

    def __init__(self, root: Path, place: Path | None = None, **changes: Any) -> None:
        self.recipe = root / "small.yaml"
        self.place = place or root / "run"
        changed = {
            name: {**RECIPE[name], **value} if isinstance(value, dict) and isinstance(RECIPE.get(name), dict) else value
            for name, value in changes.items()
        }
        self.recipe.write_text(yaml_io.dumps({**RECIPE, **changed}), encoding="utf-8")

    def train(self, *others: str) -> Said:
        """The command; never a traceback."""
        result = CliRunner().invoke(app, ["-q", "train", str(self.recipe), "-o", str(self.place), *others])
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        return Said(result.exit_code, result.stderr)

    def stopped(self, *others: str) -> str:
        """The one message of a command that ends with exit code 1."""
        said = self.train(*others)
        assert said.code == 1, said.text
        found = re.findall("^Error: ", said.text, re.MULTILINE)
        assert len(found) == 1, said.text
        assert "  Next: " in said.text, said.text
        assert not list(self.place.rglob("*.tmp"))
        return said.text[said.text.index("Error: ") :]

    def finished(self, *others: str) -> dict[str, Any]:
        """What a command has made that ends well."""
        said = self.train(*others)
        assert said.code == 0, said.text
        return self.outcome()

    def done(self) -> list[str]:
        """Stages that are done, in order."""
        return [name for name in stages_of(load_recipe(str(self.recipe))) if (self.place / name / "DONE").is_file()]

    def outcome(self) -> dict[str, Any]:
        """Hashes of rows and exported weights, and the losses of every stage."""
        files = [*self.place.glob("data/checkpoint/*.parquet"), *self.place.glob("export/**/*.safetensors")]
        logs = [
            {key: value for key, value in json.loads(line).items() if not key.startswith("seconds")}
            for log in sorted(self.place.glob("*/metrics.jsonl"))
            if log.parent.name in ("ar", "av")
            for line in log.read_text(encoding="utf-8").splitlines()
        ]
        assert not list(self.place.glob("*/state")), "a stage that is done needs nothing to continue from"
        return {"logs": logs, **hashes(files, self.place)}


def hashes(files: list[Path], root: Path) -> dict[str, str]:
    return {str(p.relative_to(root)): hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(files)}


def stamps(place: Path) -> dict[str, int]:
    """When each file was written."""
    return {str(p.relative_to(place)): p.stat().st_mtime_ns for p in place.rglob("*") if p.is_file()}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run that nobody disturbed."""
    run = Run(tmp_path_factory.mktemp("whole"))
    run.finished()
    return run


# -- recipes -------------------------------------------------------------------------------------------------


def test_a_recipe_with_several_faults(tmp_path: Path) -> None:
    run = Run(tmp_path, ar={"lrr": 1.0e-3, "documents": 0}, layer=-1, labelz={"labeler": "tiny"}, marker="ab")
    said = run.stopped()
    for part in ("ar.lrr", "lr", "ar.documents", "layer", "labelz", "did you mean", "labels", "marker"):
        assert part in said, part
    assert not run.place.exists()


@pytest.mark.parametrize(
    ("setting", "meant"),
    [
        ("labels.labeler=tinny", "tiny"),
        ("data.corpus=tiny-word", "tiny-world"),
        ("eval.protocol=tiny-eval-v2", "tiny-eval-v1"),
        ("hardware.gpu=H100-80G", "H100-80GB"),
        ("base.model=./nowhere", "There is no such directory"),
    ],
)
def test_a_name_that_is_mistyped(tmp_path: Path, setting: str, meant: str) -> None:
    run = Run(tmp_path)
    said = run.stopped(setting)
    assert setting.partition("=")[2].removeprefix("./") in said
    assert meant in said
    assert not run.place.exists()


def test_a_run_of_another_configuration(whole: Run) -> None:
    before = stamps(whole.place)
    said = whole.stopped("ar.lr=2e-3", "seed=4")
    for part in ("started with another configuration", "ar.lr", "0.001", "0.002", "seed", "-o"):
        assert part in said, part
    assert stamps(whole.place) == before


def test_processes_that_cannot_share_a_batch(tmp_path: Path) -> None:
    run = Run(tmp_path)
    with pytest.raises(RecipeError, match=r"av\.batch_size: 4 rows cannot be shared by 8 processes"):
        check_recipe(load_recipe(str(run.recipe)), world=8)
    check_recipe(load_recipe(str(run.recipe)), world=4)


def test_a_launcher_that_decides_what_the_recipe_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp16")
    run = Run(tmp_path)
    said = run.stopped()
    assert "mixed_precision fp16" in said
    assert "hardware.placement" in said
    assert not run.place.exists()


# -- markers -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def plain_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The packaged source with a vocabulary of ASCII alone."""
    from nla_hub.locate import zoo_ref

    place = tmp_path_factory.mktemp("base") / "plain"
    shutil.copytree(zoo_ref(RECIPE["base"]["model"]).fetch(None), place)
    path = place / "tokenizer.json"
    tokenizer = json.loads(path.read_text(encoding="utf-8"))
    for added in tokenizer["added_tokens"]:
        if not added["content"].isascii():
            added["content"] = f"plain{added['id']}"
    path.write_text(json.dumps(tokenizer), encoding="utf-8")
    assert len(load_tokenizer(place)("㊥", add_special_tokens=False)["input_ids"]) != 1
    return place


def test_a_vocabulary_without_a_marker(plain_base: Path, tmp_path: Path) -> None:
    run = Run(tmp_path, base={"model": str(plain_base)}, marker="auto")
    said = run.stopped()
    assert "no usable marker" in said
    assert "set marker" in said
    assert not run.place.exists()


def test_a_marker_that_is_several_tokens(plain_base: Path, tmp_path: Path) -> None:
    run = Run(tmp_path, base={"model": str(plain_base)})
    said = run.stopped()
    assert "'㊥' is" in said
    assert "expected one token" in said
    assert not run.place.exists()


def test_a_marker_that_stands_twice_in_the_prompt(tmp_path: Path) -> None:
    run = Run(tmp_path, prompts={"av": "㊥ <v>{injection_char}</v>"})
    assert "stands 2 times" in run.stopped()
    assert not run.place.exists()


def test_a_marker_that_the_source_of_the_run_itself_lacks(tmp_path: Path) -> None:
    """Its tokenizer is made by the run: what is refused is refused before a vector is captured."""
    sizes = {"hidden_size": 16, "layers": 2, "heads": 2, "mlp_size": 16, "documents": 32, "steps": 2}
    base = {"model": "tiny-world", "train": {**sizes, "batch_documents": 16, "tokenizer_documents": 100}}
    run = Run(tmp_path, base=base, marker="㋐")
    assert "'㋐' is" in run.stopped()
    assert run.done() == ["source"]
    assert not list(run.place.glob("data/**/*.parquet"))


# -- labelers ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("labeler", "variable"), [("openai", "OPENAI_API_KEY"), ("anthropic", "ANTHROPIC_API_KEY")])
def test_a_key_that_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, labeler: str, variable: str) -> None:
    monkeypatch.delenv(variable, raising=False)
    monkeypatch.delenv("MY_KEY", raising=False)
    run = Run(tmp_path, labels={"labeler": labeler, "settings": {"model": "m"}})
    assert variable in run.stopped()
    assert not run.place.exists(), "nothing is begun that could be changed no more"
    assert "environment variable MY_KEY" in run.stopped("labels.settings.api_key_env=MY_KEY")
    assert "labels.settings" in run.stopped("labels.settings.modle=m")
    assert not run.place.exists()


@pytest.fixture
def server() -> Iterator[LabelServer]:
    made = LabelServer()
    yield made
    made.close()


def labelled(root: Path, server: LabelServer, place: Path | None = None, **changes: Any) -> Run:
    """A run whose labels come from `server`; it gives up at once."""
    settings = {"model": "m", "base_url": server.openai_url, "patience": 0.2, "concurrency": 8, "api_key_env": "MY_KEY"}
    return Run(root, place, labels={"labeler": "openai", "settings": settings}, **changes)


def test_a_labeler_that_is_down(server: LabelServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("openai", reason="needs the labelers extra")
    monkeypatch.setenv("MY_KEY", "k")
    (tmp_path / "whole").mkdir()
    whole = labelled(tmp_path / "whole", server)
    expected = whole.finished(*TO_DATA)
    wanted = Counter(server.sent)
    server.sent.clear()

    run = labelled(tmp_path, server)
    server.die()
    said = run.stopped(*TO_DATA)
    assert f"labeler openai ({server.openai_url})" in said
    assert GO_ON in said
    vectors = stamps(run.place / "data" / "state")
    assert sum(name.endswith(".parquet") for name in vectors) == 3
    server.come_back()
    server.fault = lambda body: Fault(status=503) if len(server.sent) >= 9 else Fault()
    run.stopped(*TO_DATA)
    assert 9 <= len(server.sent) < len(wanted)
    assert run.done() == ["source"]
    assert stamps(run.place / "data" / "state") == vectors

    server.fault = lambda body: Fault()
    assert run.finished(*TO_DATA) == expected
    assert Counter(server.sent) == wanted, "nothing was asked twice"
    monkeypatch.delenv("MY_KEY")
    assert run.finished(*TO_DATA) == expected, "a key is not needed once all labels are there"


# -- corpora -------------------------------------------------------------------------------------------------


def write_corpus(path: Path, begin: int, end: int, seed: int = 1) -> None:
    """Add documents to a file, or begin it."""
    with path.open("a" if begin else "w", encoding="utf-8") as file:
        for document in documents(end, seed)[begin:]:
            file.write(json.dumps({"text": f"{document.text} {begin}"}) + "\n")


def test_a_corpus_that_is_too_short(server: LabelServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("openai", reason="needs the labelers extra")
    monkeypatch.setenv("MY_KEY", "k")
    corpus = tmp_path / "corpus.jsonl"
    data = {"corpus": None, "mix": [{"data": str(corpus)}]}
    run = labelled(tmp_path, server, data=data)
    write_corpus(corpus, 0, 5)
    said = run.stopped(*TO_DATA)
    for part in ("too short", "got 5 different documents", "of 48 documents", "lower av.documents", "add documents"):
        assert part in said, part
    assert "rl:" not in said
    assert run.done() == ["source"]
    assert server.asked == []

    # The same command goes on with the documents that were added, and stays with them.
    write_corpus(corpus, 5, 3000)
    server.fault = lambda body: Fault(status=503) if len(server.sent) >= 9 else Fault()
    run.stopped(*TO_DATA)
    (tmp_path / "other").mkdir()
    other = labelled(tmp_path / "other", server, data=data)
    server.fault = lambda body: Fault()
    expected = other.finished(*TO_DATA)
    corpus.unlink()
    write_corpus(corpus, 0, 3000, seed=2)
    assert run.finished(*TO_DATA) == expected, "documents of two corpora in one run"


# -- losses --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", ["ar", "av"])
def test_a_loss_that_is_no_number(stage: str, whole: Run, tmp_path: Path) -> None:
    run = Run(tmp_path, **{stage: {"lr": 1.0e30}})
    said = run.stopped()
    for part in ("non-finite loss", "step ", "lower the learning rate", "-o"):
        assert part in said, part
    assert run.done() == ["source", "data", *(["ar"] if stage == "av" else [])]
    kept = {name: time for name, time in stamps(run.place).items() if name.startswith("data/")}
    assert "non-finite loss" in run.stopped()
    assert kept.items() <= stamps(run.place).items()
    name = "data/checkpoint/ar_sft.parquet"
    assert run_hash(run, name) == run_hash(whole, name), "the run with another rate began like this one"


RL = {
    "documents": 8, "steps": 4, "lr": 1.0e30, "ar_lr": 1.0e-3, "prompts": 4, "group": 4, "micro_batch": 4,
    "max_new_tokens": 16, "evaluate_every": 9, "evaluate_rows": 4, "checkpoint_every": 1, "watch_ar": False,
    "reward": {"repetition_penalty": 5.0},
}  # fmt: skip
"""Samples that say the same thing twice are paid less, so there is something to learn before anything was learned."""


@pytest.mark.train
def test_a_policy_that_is_no_number(tmp_path: Path) -> None:
    run = Run(tmp_path, rl=RL)
    said = run.stopped()
    for part in ("step 1", "lower rl.lr", "-o PLACE"):
        assert part in said, part
    assert run.done() == ["source", "data", "ar", "av"]
    kept = {name: time for name, time in stamps(run.place).items() if name.startswith(("data/", "ar/", "av/"))}
    assert "lower rl.lr" in run.stopped()
    assert kept.items() <= stamps(run.place).items()
    (tmp_path / "next").mkdir()
    other = Run(tmp_path / "next")
    other.finished(*TO_DATA, "--stage", "ar")
    name = "ar/checkpoint/model.safetensors"
    assert run_hash(other, name) == run_hash(run, name), "the trainer that was stopped left its mark on the process"


def run_hash(run: Run, name: str) -> str:
    return hashlib.sha256((run.place / name).read_bytes()).hexdigest()


# -- disks ---------------------------------------------------------------------------------------------------


@contextmanager
def small_files(limit: int) -> Iterator[None]:
    """No file of this process may grow beyond `limit` bytes: what a quota does, for anybody."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


def test_files_that_cannot_be_written_to_their_end(whole: Run, tmp_path: Path) -> None:
    run = Run(tmp_path)
    stopped_in = []
    for stages, limit in (((), 20_000), ((), 1_000_000), (("--stage", "av"), 10_000), ((), 1_000_000)):
        with small_files(limit):
            said = run.stopped(*stages)
        assert "File too large" in said
        assert GO_ON in said
        stopped_in.append(len(run.done()))
        if stopped_in[-1] == 2:
            assert run.train("--stage", "ar").code == 0
        elif len(stopped_in) == 3:
            assert run.train("--stage", "av").code == 0
    assert stopped_in == [1, 2, 3, 4], "during extraction, training of either half, export"
    assert run.finished() == whole.outcome()


@contextmanager
def disk(path: Path, size: str) -> Iterator[Path]:
    """A file system of its own, of this size."""
    path.mkdir()
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", path], capture_output=True, text=True)
    if made.returncode:
        pytest.skip(f"no file system can be mounted here: {made.stderr.strip()}")
    try:
        yield path
    finally:
        subprocess.run(["umount", "-l", path], check=True)


def fill_until_done(run: Run, sizes: list[str]) -> dict[str, Any]:
    """Run on a disk that grows whenever it is full; which stages were done at each end, and what came of it."""
    ends: list[list[str]] = []
    for size in sizes:
        subprocess.run(["mount", "-o", f"remount,size={size}", run.place.parent], check=True)
        said = run.train()
        ends.append(run.done())
        if said.code == 0:
            return {"ends": ends, **run.outcome()}
        assert said.code == 1, said.text
        assert said.text.count("Error: ") == 1, said.text
        assert "No space left on device" in said.text, said.text
        assert GO_ON in said.text or "another place with -o" in said.text, said.text
        assert not list(run.place.rglob("*.tmp"))
    raise AssertionError(f"not done with {sizes[-1]}")


def test_a_disk_that_is_full(whole: Run, tmp_path: Path) -> None:
    with disk(tmp_path / "disk", "4k") as place:
        found = fill_until_done(Run(tmp_path, place / "run"), ["64k", "1m", "6m", "12m", "40m"])
    counts = [len(done) for done in found.pop("ends")]
    assert found == whole.outcome()
    assert {1, 2, 3} <= set(counts), counts


@pytest.mark.slow
def test_a_disk_that_is_full_at_many_sizes(whole: Run, tmp_path: Path) -> None:
    with disk(tmp_path / "disk", "4k") as place:
        sizes = [*(f"{size}k" for size in range(4, 200, 12)), *(f"{size}k" for size in range(400, 18_000, 700)), "40m"]
        found = fill_until_done(Run(tmp_path, place / "run"), sizes)
    del found["ends"]
    assert found == whole.outcome()


# -- processes -----------------------------------------------------------------------------------------------


def launched(run: Run, *others: str) -> subprocess.Popen[str]:
    """The command in two processes."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
    command = [*launcher, "-m", "nla_hub", "-q", "train", str(run.recipe), "-o", str(run.place), *others]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    return subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)


@pytest.mark.slow
def test_two_processes_are_refused_with_one_voice(tmp_path: Path) -> None:
    run = Run(tmp_path)
    with launched(run, "ar.batch_size=1") as started:
        _, said = started.communicate(timeout=50)
    assert started.returncode == 1
    assert len(re.findall("^Error: ", said, re.MULTILINE)) == 1, said
    assert "ar.batch_size: 1 rows cannot be shared by 2 processes" in said
    assert not run.place.exists()


@pytest.mark.slow
def test_where_one_process_dies_none_is_left(tmp_path: Path) -> None:
    run = Run(tmp_path, ar={"documents": 4000})
    with launched(run) as started:
        while not (run.place / "ar" / "state").is_dir():
            assert started.poll() is None
            time.sleep(0.05)
        workers = children_of(started.pid)
        assert len(workers) == 2
        os.kill(workers[1], signal.SIGKILL)
        started.communicate(timeout=50)
    assert started.returncode == 1
    assert not any(Path(f"/proc/{pid}").exists() for pid in workers)
    assert run.done() == ["source", "data"]
    assert run.train("--stage", "ar").code == 0, "one process goes on with what two began"


def children_of(pid: int) -> list[int]:
    """Processes whose parent is `pid`, in order."""
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text(encoding="ascii").split()]
