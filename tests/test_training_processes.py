"""Several processes do what one does: the same losses, one writer, one decision."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from nla_hub.training.processes import Processes

RECIPE = """
name: small
summary: A pair of nothing much, for two processes
seed: 3
base:
  model: tiny-world
  train:
    {hidden_size: 32, layers: 2, heads: 2, mlp_size: 32, documents: 200, steps: 20, batch_documents: 16,
     tokenizer_documents: 400}
layer: 1
marker: "㊥"
prompts:
  av: "<v>{injection_char}</v>"
  ar: "<text>{explanation}</text>"
data: {corpus: tiny-world, positions: 4, min_position: 4}
labels: {labeler: tiny}
ar: {documents: 110, batch_size: 8, lr: 3.0e-3}
av: {documents: 110, batch_size: 8, lr: 3.0e-3}
eval: {protocol: tiny-eval-v1, documents: 12}
export: {dtype: float32}
"""

LOSSES = """
import json, sys
from pathlib import Path
import nla_hub.training.loop as loop
import nla_hub.training.pipeline as pipeline
from nla_hub.training.processes import Processes
from nla_hub.training.recipe import load_recipe
from nla_hub.training.run import RunDirectory

class Silent:
    def stage(self, name, *, resumed): ...
    def metrics(self, name, metrics): ...
    def done(self, name, summary): ...

# A line for every step, not for every fifty.
loop.run_loop.__kwdefaults__["report_every"] = 1
processes = Processes.here()
recipe = load_recipe(sys.argv[1])
run = RunDirectory(Path(sys.argv[2]), recipe, processes=processes)
pipeline.Pipeline(recipe, run, Silent()).execute(("source", "data", "ar", "av"))
processes.close()
"""


def environments(world: int) -> list[dict[str, str]]:
    """What a launcher sets for each of `world` processes on this machine."""
    common = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
    if world == 1:
        return [common]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common |= {
        "ACCELERATE_USE_CPU": "true",
        "WORLD_SIZE": str(world),
        "LOCAL_WORLD_SIZE": str(world),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    return [{**common, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(world)]


def launch(arguments: list[str], world: int) -> list[tuple[int, str, str]]:
    """Exit code, stdout and stderr of each process."""
    started = [
        subprocess.Popen(
            [sys.executable, *arguments], env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        for env in environments(world)
    ]
    try:
        outputs = [process.communicate(timeout=500) for process in started]
    finally:
        for process in started:
            process.kill()
    return [(process.returncode, *output) for process, output in zip(started, outputs, strict=True)]


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "small.yaml"
    path.write_text(RECIPE, encoding="utf-8")
    return path


def losses(run: Path, stage: str) -> list[float]:
    lines = [json.loads(line) for line in (run / stage / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return [line["loss"] for line in lines if "loss" in line]


@pytest.mark.long
def test_two_processes_have_the_losses_of_one(recipe: Path, tmp_path: Path) -> None:
    for world in (1, 2):
        ends = launch(["-c", LOSSES, str(recipe), str(tmp_path / str(world))], world)
        assert [code for code, _, _ in ends] == [0] * world, ends
    for stage in ("ar", "av"):
        one, two = (losses(tmp_path / str(world), stage) for world in (1, 2))
        assert len(one) >= 50
        assert one[0] != one[-1]
        assert two == pytest.approx(one, abs=1e-4), stage


@pytest.mark.long
def test_a_run_in_two_processes_has_one_voice_and_is_continued(recipe: Path, tmp_path: Path) -> None:
    command = ["-m", "nla_hub", "train", str(recipe), "--rehearse", "-o", str(tmp_path / "run")]
    (code, out, told), (other_code, other_out, other_told) = launch(command, 2)
    assert (code, other_code) == (0, 0), (told, other_told)
    assert out.strip() == str(tmp_path / "run" / "export" / "checkpoint")
    assert "[6/6] eval" in told
    assert (other_out, other_told) == ("", "")
    assert (tmp_path / "run" / "eval" / "DONE").is_file()
    stamps = {p: p.stat().st_mtime_ns for p in (tmp_path / "run").rglob("*") if p.name != ".lock"}
    (code, _, told), (other_code, _, _) = launch(command, 2)
    assert (code, other_code) == (0, 0), told
    assert told.count("already done") == 6
    assert stamps == {p: p.stat().st_mtime_ns for p in (tmp_path / "run").rglob("*") if p.name != ".lock"}


RL = """
rl:
  {documents: 20, steps: 4, lr: 1.0e-4, ar_lr: 1.0e-4, prompts: 4, group: 4, micro_batch: 8, max_new_tokens: 40,
   rollout_block: 8, evaluate_every: 2, evaluate_rows: 8, checkpoint_every: 2}
"""


@pytest.mark.slow
@pytest.mark.train
def test_the_whole_of_a_run_with_rl_in_two_processes(tmp_path: Path) -> None:
    recipe = tmp_path / "small.yaml"
    recipe.write_text(RECIPE + RL, encoding="utf-8")
    for world in (1, 2):
        ends = launch(["-m", "nla_hub", "train", str(recipe), "-o", str(tmp_path / str(world))], world)
        assert [code for code, _, _ in ends] == [0] * world, ends
    one, two = (
        [json.loads(line) for line in (tmp_path / str(world) / "rl" / "metrics.jsonl").read_text("utf-8").splitlines()]
        for world in (1, 2)
    )
    assert [line["step"] for line in one] == [line["step"] for line in two]
    for alone, together in zip(one, two, strict=True):
        for name in ("mse", "ar_loss", "kl", "reward", "cosine"):
            if name in alone:
                assert together[name] == pytest.approx(alone[name], abs=1e-4), (alone["step"], name)


def test_what_the_main_process_refuses_ends_all_of_them(recipe: Path, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "letter.txt").write_text("dear")
    (code, _, told), (other_code, other_out, other_told) = launch(
        ["-m", "nla_hub", "train", str(recipe), "-o", str(tmp_path / "run")], 2
    )
    assert (code, other_code, other_out) == (1, 1, "")
    assert "Error: " in told
    assert "something else" in told
    assert other_told.splitlines()[-1].startswith("warning: process 1: The main process stopped: This directory holds")
    assert [p.name for p in (tmp_path / "run").iterdir()] == ["letter.txt"]


def test_a_single_process_decides_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    alone = Processes.here()
    assert (alone.rank, alone.world, alone.is_main) == (0, 1, True)
    box: list[Any] = [object()]
    assert alone.share(box) is box
    assert alone.on_main(lambda: box) is box
    alone.close()
