"""Weights that are divided over two processes (FSDP2) are trained, kept and written as one process does it."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from test_training_processes import launch

from nla_hub.errors import RunError, TrainingError
from nla_hub.testing import random_pair
from nla_hub.training.loop import batch_order, learning_rate, make_optimizer, run_loop, shares
from nla_hub.training.processes import Processes
from nla_hub.training.recipe import BaseSpec, HardwareSpec, LoRASpec, PlacementSpec, StageSpec, load_recipe
from nla_hub.training.sharding import Execution, clip_grad_norm, full_weights

pytest.importorskip("trl", reason="needs the train extra")

pytestmark = [pytest.mark.train, pytest.mark.long, pytest.mark.timeout(600)]

SCRIPT = str(Path(__file__).parent / "sharded_world.py")
Found = dict[str, Any]


def run(root: Path, world: int, *sections: str) -> dict[str, list[Found]]:
    """What each of `world` processes found in each section."""
    ends = launch([SCRIPT, str(root), *sections], world)
    assert [code for code, _, _ in ends] == [0] * world, ends
    return {
        section: [json.loads((root / f"{section}-{world}-{rank}.json").read_text("utf-8")) for rank in range(world)]
        for section in sections
    }


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pair with tied embeddings, whose vectors are added behind block 1."""
    place = tmp_path_factory.mktemp("sharded")
    random_pair(place, "gemma3", kind="add")
    return place


@pytest.fixture(scope="module")
def alone(root: Path) -> dict[str, list[Found]]:
    return run(root, 1, "supervised", "grpo")


@pytest.fixture(scope="module")
def shared(root: Path) -> dict[str, list[Found]]:
    return run(root, 2, "supervised", "grpo", "stage")


def assert_divided(parts: dict[str, list[Any]], other: dict[str, list[Any]]) -> None:
    """Every parameter is a DTensor in rows, of which each process has some and both together all."""
    for name, (kind, placements, here, whole) in parts.items():
        assert (kind, placements) == ("DTensor", "(Shard(dim=0),)"), name
        assert here + other[name][2] == whole, name
        assert 0 < here < whole, name


def test_a_sharded_model_gives_the_logits_of_a_whole_one(
    alone: dict[str, list[Found]], shared: dict[str, list[Found]]
) -> None:
    expected = alone["supervised"][0]["logits"]
    for process in shared["supervised"]:
        assert process["logits"] == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("half", ["av", "ar"])
def test_supervised_stages_train_what_one_process_trains(
    half: str, root: Path, alone: dict[str, list[Found]], shared: dict[str, list[Found]]
) -> None:
    one, (first, second) = alone["supervised"][0][half], (found[half] for found in shared["supervised"])
    assert_divided(first["parts"], second["parts"])
    assert first["lines"] == second["lines"], "both processes know the same figures"
    assert len(one["lines"]) == 9
    assert one["lines"][0]["loss"] != one["lines"][-2]["loss"]
    for alone_line, line in zip(one["lines"], first["lines"], strict=True):
        assert line == pytest.approx(alone_line, abs=1e-4)
    files = [path.name for path in sorted((root / "out-1" / half).iterdir())]
    assert files == [path.name for path in sorted((root / "out-2" / half).iterdir())]
    assert "model.safetensors" in files
    for name in (name for name in files if name.endswith(".safetensors")):
        expected, written = (load_file(root / f"out-{world}" / half / name) for world in (1, 2))
        assert written.keys() == expected.keys()
        for key, value in expected.items():
            assert written[key].dtype == value.dtype
            assert torch.allclose(written[key], value, atol=1e-4, rtol=0), key


def test_micro_batches_in_copies_train_what_one_process_trains(
    alone: dict[str, list[Found]], shared: dict[str, list[Found]]
) -> None:
    one, two = alone["supervised"][0]["copies"], shared["supervised"][0]["copies"]
    assert {part[0] for part in two["parts"].values()} == {"Parameter"}
    for alone_line, line in zip(one["lines"], two["lines"], strict=True):
        assert line == pytest.approx(alone_line, abs=1e-4)


@pytest.mark.parametrize("half", ["av", "ar"])
def test_a_sharded_stage_that_was_killed_ends_with_the_same_weights(
    half: str, root: Path, shared: dict[str, list[Found]]
) -> None:
    whole = shared["supervised"][0][half]["lines"]
    again = shared["supervised"][0][f"train_{half}-again"]
    assert again == whole[5:], "from the checkpoint of step 5 on"
    expected, written = (
        load_file(root / "out-2" / name / "model.safetensors") for name in (half, f"train_{half}-again")
    )
    for key, value in expected.items():
        assert torch.equal(written[key], value), key
    state = root / "stage-2" / f"train_{half}-again" / "state"
    assert sorted(p.suffix for p in state.iterdir()) == [".parts", ".pt"], "older checkpoints are gone"


def assert_same_training(one: Found, first: Found, second: Found) -> None:
    assert [a + b for a, b in zip(first["samples"], second["samples"], strict=True)] == one["samples"]
    assert first["usable"] == [8, 8, 8]
    assert second["usable"] == [8, 0, 8], "with nothing to score in one step it kept the other company"
    for alone_log, log in zip(one["logs"], first["logs"], strict=True):
        for name in ("loss", "reward", "reward_std", "grad_norm", "kl"):
            if name in alone_log:
                assert log[name] == pytest.approx(alone_log[name], abs=1e-4), name
    for alone_step, step, other in zip(one["figures"], first["figures"], second["figures"], strict=True):
        for name in ("mse", "cosine", "watch_cosine", "ar_loss", "watch_loss", "ar_grad_norm", "kl", "fve"):
            assert step[name] == pytest.approx(alone_step[name], abs=1e-4), name
            assert step[name] == other[name], name
        assert step["statuses"] == alone_step["statuses"]
        assert step["policy_update"] == other["policy_update"] > 0
        assert step["ar_update"] == other["ar_update"] > 0
        assert step["logprob_difference"] < 1e-4
        assert step["loss_difference"] < 1e-4
    for name in ("av", "ar", "watch"):
        assert first[name] == second[name]
        assert first[name].keys() == one[name].keys()
        for key, values in one[name].items():
            assert first[name][key] == pytest.approx(values, abs=1e-4), key
    for mine, theirs in zip(first["parts"], second["parts"], strict=True):
        assert_divided(mine, theirs)


def test_a_sharded_grpo_step_is_that_of_one_process(
    alone: dict[str, list[Found]], shared: dict[str, list[Found]]
) -> None:
    assert len(shared["grpo"][0]["parts"]) == 3, "the AV, its reference and the AR"
    assert shared["grpo"][0]["figures"][-1]["kl"] > 0
    assert_same_training(alone["grpo"][0], *shared["grpo"])


def test_a_sharded_rl_stage_that_was_killed_ends_with_the_same_weights(shared: dict[str, list[Found]]) -> None:
    def timeless(lines: list[Found]) -> list[Found]:
        return [{k: v for k, v in line.items() if not k.startswith("seconds")} for line in lines]

    for found in shared["stage"]:
        whole, again = timeless(found["whole"]["lines"]), timeless(found["again"]["lines"])
        assert [line["step"] for line in found["cut"]["lines"]][-1] == 3
        assert again == whole[-len(again) :]
        assert [line["step"] for line in again if "reward" in line] == [3, 4]
        assert [line["step"] for line in again if "evaluation" in line] == [4]
        for half in ("av", "ar"):
            assert found["again"][half] == found["whole"][half]


@pytest.mark.slow
def test_factors_on_a_sharded_av_train_as_in_one_process(root: Path) -> None:
    assert_same_training(run(root, 1, "factors")["factors"][0], *run(root, 2, "factors")["factors"])


@pytest.mark.slow
def test_bfloat16_under_float32_weights_keeps_sampler_and_trainer_together(root: Path) -> None:
    for world in (1, 2):
        for found in run(root, world, "rounded")["rounded"]:
            for step in found["figures"]:
                assert step["dtype"] == "bfloat16"
                assert 0 < step["logprob_difference_mean"] < 0.05


# -- without other processes -----------------------------------------------------------------------------------


def test_micro_batches_are_equally_many_in_all_processes() -> None:
    batch = list(range(9))
    for world, micro in ((1, 2), (2, 4), (2, 1), (4, 1), (2, None)):
        parts = [shares(batch, rank, world, micro) for rank in range(world)]
        assert len({len(own) for own in parts}) == 1
        assert sorted(i for own in parts for part in own for i in part) == batch
        assert all(len(part) <= (micro or 9) for own in parts for part in own)
    assert shares(batch, 1, 2, 1)[-1] == [], "the process with fewer rows has an empty one"


def test_micro_batches_have_the_gradient_of_the_batch() -> None:
    x = torch.randn(21, 4, generator=torch.Generator().manual_seed(2))
    spec = StageSpec(documents=1, lr=0.05, batch_size=7, clip=1e6)

    def fresh() -> torch.nn.Linear:
        torch.manual_seed(0)
        return torch.nn.Linear(4, 1)

    def loss_of(model: Any, rows: Any) -> tuple[torch.Tensor, int]:
        # As many terms as the row's number says: the mean is over terms, not over micro-batches.
        weights = torch.tensor([float(i + 1) for i in rows])
        return (model(x[list(rows)])[:, 0].square() * weights).sum(), int(weights.sum())

    batches = batch_order([1] * 21, 7, epochs=1, seed=0)
    layer = fresh()
    optimizer = make_optimizer(layer, spec)
    for step, batch in enumerate(batches):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, len(batches), spec)
        optimizer.zero_grad()
        total, count = loss_of(layer, batch)
        (total / count).backward()
        optimizer.step()
    for micro_batch in (None, 2, 1):
        trained = fresh()
        parts = dataclasses.replace(spec, micro_batch=micro_batch)
        run_loop(trained, loss_of, [1] * 21, parts, seed=0, report=lambda _: None)
        assert torch.allclose(trained.weight, layer.weight, atol=1e-6), micro_batch


def test_clipping_is_that_of_torch() -> None:
    def model() -> torch.nn.Module:
        torch.manual_seed(0)
        made = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Linear(3, 2))
        made(torch.randn(5, 4)).square().sum().backward()
        return made

    for limit in (0.1, 1e6):
        ours, theirs = model(), model()
        for p in theirs.parameters():
            p.grad = None if p.grad is None else p.grad * 0.5
        expected = float(torch.nn.utils.clip_grad_norm_(theirs.parameters(), limit))
        assert clip_grad_norm(ours.parameters(), limit, torch.device("cpu"), scale=0.5) == pytest.approx(expected)
        for own, other in zip(ours.parameters(), theirs.parameters(), strict=True):
            assert own.grad is not None
            assert other.grad is not None
            assert torch.allclose(own.grad, other.grad)
    broken = model()
    next(broken.parameters()).grad[0] = float("nan")  # type: ignore[index]
    assert not clip_grad_norm(broken.parameters(), 1.0, torch.device("cpu")) < float("inf")


def test_weights_of_a_plain_model_are_its_own(root: Path) -> None:
    from nla_hub.pretrained import LoadOptions, load_causal_lm

    model = load_causal_lm(root / "av", LoadOptions(device_map={"": "cpu"})).model
    found = dict(full_weights(model))
    assert "lm_head.weight" not in found, "tied weights come once"
    assert {name: value.data_ptr() for name, value in found.items()} == {
        name: value.data_ptr() for name, value in model.named_parameters()
    }


def placed(**changes: Any) -> Any:
    recipe = load_recipe("tiny")
    hardware = HardwareSpec(gpus=2, placement=PlacementSpec(**changes))
    return dataclasses.replace(recipe, hardware=hardware)


def test_the_recipe_decides_how_a_half_is_run(caplog: pytest.LogCaptureFixture) -> None:
    recipe = placed(av="sharded", optimizers="cpu")
    assert Execution.of(recipe, "av", world=2) == Execution(sharded=True, offload=True)
    assert Execution.of(recipe, "ar", world=2) == Execution()
    assert Execution.of(dataclasses.replace(recipe, precision="bf16"), "ar", world=2) == Execution(bf16=True)
    with caplog.at_level("WARNING"):
        assert Execution.of(recipe, "av", world=1) == Execution()
    assert "there is one process" in caplog.text


def test_packed_weights_cannot_be_sharded() -> None:
    recipe = placed(av="sharded")
    packed = dataclasses.replace(recipe, base=BaseSpec("some/model", quantization="nf4"), lora=LoRASpec())
    with pytest.raises(TrainingError, match="Packed weights cannot be sharded"):
        Execution.of(packed, "av", world=2)


@pytest.mark.parametrize(
    ("name", "value", "told"),
    [
        ("ACCELERATE_USE_FSDP", "true", "FSDP"),
        ("ACCELERATE_USE_DEEPSPEED", "true", "DeepSpeed"),
        ("ACCELERATE_MIXED_PRECISION", "bf16", "mixed_precision bf16"),
    ],
)
def test_a_launcher_that_decides_what_the_recipe_does_is_refused(
    name: str, value: str, told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for other in ("WORLD_SIZE", "ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED", "ACCELERATE_MIXED_PRECISION"):
        monkeypatch.delenv(other, raising=False)
    assert Processes.here().world == 1
    monkeypatch.setenv(name, value)
    with pytest.raises(RunError, match=told):
        Processes.here()
