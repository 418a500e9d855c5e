"""Rollouts by vLLM in the training process: what needs vLLM is marked so; the rest runs against a stand-in for its loader."""

from __future__ import annotations

import dataclasses
import itertools
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from parity import same_rows
from test_vllm import StandIn, rows, vllm_tests, with_vllm
from torch import Tensor, nn

from nla_hub.engines.base import Completion, LoadedAV
from nla_hub.engines.vllm import engine as engine_module
from nla_hub.errors import NLAError, RecipeError, TrainingError
from nla_hub.sampling import RowKey, uniforms
from nla_hub.testing import random_av, random_model, random_pair
from nla_hub.testing.harness import reference_logits, reference_rows
from nla_hub.training.processes import Processes
from nla_hub.training.recipe import LoRASpec, RLSpec, RolloutSpec
from nla_hub.training.rl import vllm_sampler
from nla_hub.training.rl.vllm_sampler import ColocatedVLLM, Incoming, pooled

LENGTH = 12
SPEC = RLSpec(documents=8, steps=2, lr=1e-3, ar_lr=1e-3, max_new_tokens=LENGTH, rollouts=RolloutSpec("vllm"))
ALONE = Processes()


def named(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """A model's weights by name, tied ones once."""
    yield from model.named_parameters()


def stepped(model: nn.Module, seed: int = 0) -> None:
    """Change every weight a little, as an optimizer's steps do."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in model.parameters():
            scale = 0.2 * (weight.std() if weight.dim() > 1 else 0.5)
            weight += torch.randn(weight.shape, generator=generator) * scale


# -- a stand-in for vLLM's loader ----------------------------------------------------------------------------


class Loader:
    """Keeps the part of `Colocated`'s contract that the sampler stands on."""

    device = "cpu"
    group: Callable[[Any], tuple[list[Any], int]]

    def __init__(self, directory: Path, settings: Callable[[str], dict[str, Any]]) -> None:
        self.llm = StandIn(**settings(self.device))
        self.config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
        self.files = {path.name for path in directory.iterdir()}
        self.events: list[str] = []
        self.loaded: dict[str, Tensor] = {}
        self.loses = False
        self.in_use = False
        self.usable = True

    def load(self, weights: Any) -> None:
        self.events.append("load")
        self.loaded = {name: tensor.clone() for name, tensor in weights}

    def parameters(self, names: set[str]) -> dict[str, Tensor]:
        kept = {name: value for name, value in self.loaded.items() if name in names}
        fused = {"model.layers.0.qkv_proj.bias": torch.ones(3)}
        return {name: value + self.loses for name, value in kept.items()} | {n: fused[n] for n in fused if n in names}

    def forget(self) -> bool:
        self.events.append("forget")
        return not self.in_use

    def sleep(self, level: int) -> None:
        self.events.append(f"sleep {level}")

    def wake(self, part: str) -> None:
        self.events.append(f"wake {part}")

    def close(self) -> None:
        self.events.append("close")


@pytest.fixture
def loader(monkeypatch: pytest.MonkeyPatch) -> type[Loader]:
    class Mine(Loader):
        pass

    defaults = {"logprob_token_ids": None, "skip_reading_prefix_cache": None}
    monkeypatch.setattr(vllm_sampler, "Colocated", Mine)
    monkeypatch.setattr(engine_module, "sampling_params", lambda **given: SimpleNamespace(**{**defaults, **given}))
    return Mine


@pytest.fixture
def av(tmp_path: Path) -> LoadedAV:
    return random_av(tmp_path / "av", partial(random_model, "gemma3"))


def loader_of(engine: ColocatedVLLM) -> Any:
    assert engine._running is not None
    return engine._running


def test_a_sync_hands_over_every_weight_once_in_the_samplers_dtype(loader: type[Loader], av: LoadedAV) -> None:
    """Tied: the head is not among them."""
    model = av.loaded.model
    engine = ColocatedVLLM(av, SPEC, processes=ALONE, dtype=torch.bfloat16)
    engine.sync(named(model))
    inside = loader_of(engine)
    assert inside.events == ["load", "forget"]
    assert set(inside.loaded) == set(dict(model.named_parameters()))
    assert "lm_head.weight" not in inside.loaded
    assert {value.dtype for value in inside.loaded.values()} == {torch.bfloat16}
    assert not any(value.requires_grad for value in inside.loaded.values())
    for name, value in model.named_parameters():
        assert torch.equal(inside.loaded[name], value.detach().bfloat16())
    engine.close()


def test_vllm_starts_from_a_text_config_without_weights(loader: type[Loader], av: LoadedAV) -> None:
    av.loaded.model.config.quantization_config = {"quant_method": "bitsandbytes"}
    engine = ColocatedVLLM(av, SPEC, processes=ALONE)
    inside, directory = loader_of(engine), engine.av.directory
    assert inside.config["architectures"] == ["Gemma3ForCausalLM"]
    assert inside.config["dtype"] == "float32"
    assert "quantization_config" not in inside.config
    assert {"config.json", "tokenizer.json"} <= inside.files
    assert not any(name.endswith(".safetensors") for name in inside.files)
    told = inside.llm.settings
    assert told["load_format"] == "dummy"
    assert told["max_model_len"] == len(av.prompt) + LENGTH
    assert "distributed_executor_backend" not in told
    assert "enable_sleep_mode" not in told
    assert av.loaded.model.config.quantization_config, "the model that is trained keeps its own config"
    engine.close()
    assert not directory.exists()


def test_the_first_sync_is_probed_and_later_ones_are_not(loader: type[Loader], av: LoadedAV) -> None:
    engine = ColocatedVLLM(av, SPEC, processes=ALONE)
    engine.sync(named(av.loaded.model))
    asked = len(loader_of(engine).llm.asked)
    assert asked > 2
    assert generated(engine, 0) == []
    engine.sync(named(av.loaded.model))
    assert len(loader_of(engine).llm.asked) == asked
    engine.close()


def without(name: str, model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    return ((n, w) for n, w in named(model) if n != name)


def turned(name: str, model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    return ((n, w.T if n == name else w) for n, w in named(model))


def twice(name: str, model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from named(model)
    yield name, dict(named(model))[name]


def prefixed(name: str, model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    return ((n.replace(name, f"module.{name}"), w) for n, w in named(model))


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (without, r"not sent all weights.*53 of 54.*model.layers.1.mlp.up_proj.weight"),
        (turned, r"up_proj.weight: .*another shape.*\(64, 96\).*\(96, 64\)"),
        (twice, r"twice.*up_proj.weight"),
        (prefixed, r"does not have.*module.model.layers.1.mlp.up_proj.weight"),
    ],
)
def test_a_stream_that_is_not_the_models_is_refused_and_the_engine_closed(
    loader: type[Loader], av: LoadedAV, wrong: Callable[[str, nn.Module], Any], words: str
) -> None:
    engine = ColocatedVLLM(av, SPEC, processes=ALONE)
    with pytest.raises(TrainingError, match=words):
        engine.sync(wrong("model.layers.1.mlp.up_proj.weight", av.loaded.model))
    with pytest.raises(NLAError, match="is closed"):
        engine.sync(named(av.loaded.model))


def test_weights_that_did_not_arrive_are_seen(loader: type[Loader], av: LoadedAV) -> None:
    engine = ColocatedVLLM(av, SPEC, processes=ALONE)
    engine.sync(named(av.loaded.model))
    loader_of(engine).loses = True
    with pytest.raises(TrainingError, match=r"input_layernorm.weight: Weights did not arrive.*of 25"):
        engine.sync(named(av.loaded.model))


def test_a_loader_that_shows_nothing_proves_nothing(av: LoadedAV) -> None:
    incoming = Incoming(av.config, torch.float32)
    list(incoming.checked(named(av.loaded.model)))
    incoming.complete()
    with pytest.raises(TrainingError, match="did not arrive"):
        incoming.compare({})


def test_a_cache_that_stays_full_stops_the_run(loader: type[Loader], av: LoadedAV) -> None:
    engine = ColocatedVLLM(av, SPEC, processes=ALONE)
    loader_of(engine).in_use = True
    with pytest.raises(TrainingError, match="old weights"):
        engine.sync(named(av.loaded.model))


def generated(engine: ColocatedVLLM, n: int = 5, draws: Tensor | None = None) -> list[Completion]:
    return engine.generate(rows(n), draws, temperature=1.0, max_new_tokens=LENGTH, batch_size=n)


def test_nothing_is_sampled_before_the_first_sync(loader: type[Loader], av: LoadedAV) -> None:
    engine = ColocatedVLLM(av, SPEC, processes=ALONE)
    with pytest.raises(TrainingError, match="has no weights"):
        generated(engine)
    engine.close()


@pytest.mark.parametrize("level", [0, 1, 2])
def test_it_sleeps_between_steps_on_an_accelerator(
    loader: type[Loader], av: LoadedAV, level: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loader, "device", "cuda")
    engine = ColocatedVLLM(av, SPEC, processes=ALONE, sleep_level=level)
    inside = loader_of(engine)
    told = inside.llm.settings
    assert told["gpu_memory_utilization"] == SPEC.rollouts.memory
    assert "kv_cache_memory_bytes" not in told
    assert told.get("enable_sleep_mode", False) == (level > 0)
    engine.sync(named(av.loaded.model))
    generated(engine)
    inside.events.clear()
    engine.sleep()
    engine.sleep()
    if level == 2:
        with pytest.raises(TrainingError, match="has no weights"):
            generated(engine)
        engine.sync(named(av.loaded.model))
        assert inside.events == ["sleep 2", "wake weights", "load", "wake kv_cache", "forget"]
    elif level == 1:
        generated(engine)
        assert inside.events == ["sleep 1", "wake weights", "wake kv_cache"]
    else:
        assert inside.events == []
    assert len(generated(engine)) == 5
    engine.close()


def test_on_a_cpu_there_is_nothing_to_free(loader: type[Loader], av: LoadedAV) -> None:
    engine = ColocatedVLLM(av, SPEC, processes=ALONE)
    engine.sync(named(av.loaded.model))
    engine.sleep()
    assert len(generated(engine)) == 5
    engine.close()


def divided(n: int) -> RLSpec:
    return dataclasses.replace(SPEC, rollouts=RolloutSpec("vllm", tensor_parallel=n))


def test_processes_that_form_no_groups_are_refused(loader: type[Loader], av: LoadedAV) -> None:
    with pytest.raises(RecipeError, match=r"groups.*6 processes.*a multiple of 4"):
        ColocatedVLLM(av, divided(4), processes=Processes(0, 6))


@pytest.mark.parametrize("rank", [0, 1, 2])
def test_members_pool_their_rows_and_keep_their_own(loader: type[Loader], av: LoadedAV, rank: int) -> None:
    """A member without rows takes part."""
    sizes = (3, 0, 2)
    vectors, draws = rows(5), uniforms(0, [RowKey(str(i)) for i in range(5)], LENGTH)
    mine = slice(sum(sizes[:rank]), sum(sizes[: rank + 1]))
    parts = [(v, d) for v, d in zip(vectors.split(sizes), draws.split(sizes), strict=True)]
    engine = ColocatedVLLM(av, divided(3), processes=Processes(rank, 3))
    inside = loader_of(engine)
    assert inside.llm.settings["distributed_executor_backend"] == "external_launcher"
    assert inside.llm.settings["tensor_parallel_size"] == 3
    inside.exchange = lambda value: ([*parts[:rank], value, *parts[rank + 1 :]], rank)
    engine.sync(named(av.loaded.model))
    before, told = len(inside.llm.asked), []
    found = engine.generate(
        vectors[mine], draws[mine], temperature=0.7, max_new_tokens=LENGTH, batch_size=5, progress=told.append
    )
    assert len(inside.llm.asked) - before == 5, "each member generates all rows"
    entering = av.injector.entering(vectors).sum(-1)[mine]
    assert torch.allclose(torch.tensor([float(c.logprobs[0]) for c in found]), entering, atol=1e-4)
    assert (len(found), sum(told)) == (sizes[rank], sizes[rank])
    engine.close()


def test_members_that_ask_for_different_things_stop() -> None:
    drawn, greedy = (rows(2), torch.zeros(2, 4)), (rows(1), None)
    with pytest.raises(TrainingError, match="different things"):
        pooled([drawn, greedy], 0)
    with pytest.raises(TrainingError, match="different things"):
        pooled([drawn, (rows(2), torch.zeros(2, 5))], 1)
    (vectors, draws), mine = pooled([greedy, greedy], 1)
    assert (len(vectors), draws, mine) == (2, None, slice(1, 2))


# -- vLLM itself ---------------------------------------------------------------------------------------------


def worst(av: LoadedAV, vectors: Tensor, found: list[Completion], temperature: float) -> float:
    """Largest |sampler - transformers| log-probability over all sampled tokens."""
    ids = torch.tensor([[*c.ids, *[0] * (LENGTH - len(c.ids))] for c in found])
    logprobs = (reference_logits(av, vectors, ids) / temperature).log_softmax(-1)
    gaps = [
        (c.logprobs - logprobs[row, : len(c.ids)].gather(-1, ids[row, : len(c.ids), None])[:, 0]).abs().max()
        for row, c in enumerate(found)
    ]
    return float(torch.stack(gaps).max())


@vllm_tests
@pytest.mark.parametrize("architecture", ["qwen2", "llama", "gemma3"])
def test_after_a_sync_the_samplers_log_probabilities_are_the_models(tmp_path: Path, architecture: str) -> None:
    with_vllm()
    av = random_av(tmp_path, partial(random_model, architecture))
    model = av.loaded.model
    vectors, draws = rows(24), uniforms(0, [RowKey(str(i)) for i in range(24)], LENGTH)
    random_state, threads, set_threads = torch.get_rng_state(), torch.get_num_threads(), torch.set_num_threads
    engine = ColocatedVLLM(av, SPEC, processes=ALONE)
    drawn = partial(engine.generate, vectors, draws, temperature=0.8, max_new_tokens=LENGTH, batch_size=len(vectors))
    texts = []
    try:
        for seed in range(3):
            if seed:
                stepped(model, seed)
                assert worst(av, vectors, drawn(), 0.8) > 0.1, "without a sync they are those of the weights before"
            engine.sync(named(model))
            with torch.autocast("cpu", torch.bfloat16):  # the trainer's business
                found = drawn()
            assert worst(av, vectors, found, 0.8) <= 1e-4
            texts.append([c.ids for c in found])
            greedy = engine.generate(vectors, None, temperature=1.0, max_new_tokens=LENGTH, batch_size=1)
            expected = reference_rows(av, vectors, LENGTH, None, 1.0)
            same_rows([c.ids for c in greedy], expected.ids.tolist(), expected.margins.tolist())
        assert texts[0] != texts[1] != texts[2]
        assert torch.equal(torch.get_rng_state(), random_state)
        assert (torch.get_num_threads(), torch.set_num_threads) == (threads, set_threads)
    finally:
        engine.close()
    assert not torch.distributed.is_initialized()


@vllm_tests
def test_a_prefix_that_was_cached_before_a_sync_is_not_read_after_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The prompt is longer than a cache block, and the cache is in use."""
    with_vllm()
    from test_vllm import long_pair

    from nla_hub.sidecar import Sidecar
    from nla_hub.testing.harness import open_av

    root = long_pair(tmp_path, "llama")
    av = open_av(root / "av", Sidecar.read(root / "av"))
    engine = ColocatedVLLM(av, SPEC, processes=ALONE)
    vectors, draws = rows(6), uniforms(0, [RowKey(str(i)) for i in range(6)], LENGTH)
    drawn = partial(engine.generate, vectors, draws, temperature=1.0, max_new_tokens=LENGTH, batch_size=6)
    try:
        engine.sync(named(av.loaded.model))
        assert engine.reads_cache
        drawn()
        stepped(av.loaded.model)
        engine.sync(named(av.loaded.model))
        assert worst(av, vectors, drawn(), 1.0) <= 1e-4
        stepped(av.loaded.model)
        monkeypatch.setattr(loader_of(engine), "forget", lambda: True)
        engine.sync(named(av.loaded.model))
        assert worst(av, vectors, drawn(), 1.0) > 1e-2, "the cache was not in use, so nothing is proven"
    finally:
        engine.close()


class Tagging(ColocatedVLLM):
    """Puts the tags around whatever a random AV writes, so that there is something to pay."""

    def __init__(self, av: LoadedAV, spec: RLSpec = SPEC) -> None:
        super().__init__(av, spec, processes=ALONE)

    def generate(self, *args: Any, **options: Any) -> list[Completion]:
        return [
            dataclasses.replace(c, text=f"<explanation>{c.text}</explanation>")
            for c in super().generate(*args, **options)
        ]


class Stale(Tagging):
    """Takes the first weights and no others."""

    def sync(self, weights: Any) -> None:
        if not self._filled:
            super().sync(weights)


@vllm_tests
@pytest.mark.parametrize(
    ("architecture", "lora"), [("llama", None), ("gemma3", None), ("qwen2", LoRASpec(r=4, alpha=8))]
)
def test_a_run_learns_from_what_vllm_samples(tmp_path: Path, architecture: str, lora: LoRASpec | None) -> None:
    with_vllm()
    pytest.importorskip("trl", reason="needs the train extra")
    from rl_world import make_trainer

    pair = random_pair(tmp_path, architecture)
    trainer, watcher = make_trainer(pair, tmp_path / "state", lr=1e-2, lora=lora, make_engine=Tagging)
    asked = [row for row in range(4) for _ in range(2)]

    def ids() -> list[tuple[int, ...]]:
        """What is written for the same vectors with the same draws, those of step 0."""
        trainer.state.global_step = 0
        return [c.ids for c in trainer._roll_out(asked).completions]

    try:
        before = ids()
        assert ids() == before
        trainer.train()
        one, two = watcher.figures
        assert max(one["logprob_difference"], two["logprob_difference"]) < 1e-4
        assert one["policy_update"] > 0
        assert 0.999 < two["ratio"] < 1.001
        assert ids() != before
    finally:
        trainer.engine.close()


@vllm_tests
def test_a_run_whose_sampler_keeps_old_weights_stops(tmp_path: Path) -> None:
    with_vllm()
    pytest.importorskip("trl", reason="needs the train extra")
    from rl_world import make_trainer

    trainer, watcher = make_trainer(random_pair(tmp_path, "llama"), tmp_path / "state", lr=1e-2, make_engine=Stale)
    try:
        with pytest.raises(TrainingError, match=r"step 1: .*do not see the same policy"):
            trainer.train()
        assert len(watcher.figures) == 1
    finally:
        trainer.engine.close()


GROUPS = """
import json, os, sys
os.environ["TORCHDYNAMO_DISABLE"] = "1"  # what vLLM compiles for one step of sampling takes longer than all of this
from pathlib import Path
import torch
sys.path.insert(0, sys.argv[1])
torch.set_num_threads(1)
from test_vllm_rollouts import LENGTH, divided, named, rows, stepped, worst
from nla_hub.sampling import RowKey, uniforms
from nla_hub.sidecar import Sidecar
from nla_hub.testing.harness import open_av
from nla_hub.training.processes import Processes
from nla_hub.training.rl.vllm_sampler import ColocatedVLLM

root = Path(sys.argv[2])
processes = Processes.here()
av = open_av(root / "av", Sidecar.read(root / "av"))
vectors, draws = rows(9), uniforms(0, [RowKey(str(i)) for i in range(9)], LENGTH)
mine = slice(0, 4) if processes.rank == 0 else slice(4, 9)
results = []
for size in (1, 2):
    engine = ColocatedVLLM(av, divided(size), processes=processes)
    for seed in range(2):
        stepped(av.loaded.model, seed)
        engine.sync(named(av.loaded.model))
        found = engine.generate(vectors[mine], draws[mine], temperature=0.8, max_new_tokens=LENGTH, batch_size=9)
        results.append({"gap": worst(av, vectors[mine], found, 0.8), "ids": [c.ids for c in found]})
    engine.close()
    results.append(processes.share(f"alive after {size}"))  # the trainer's own group outlives vLLM
(root / f"{processes.rank}.json").write_text(json.dumps(results))
processes.close()
"""


@vllm_tests
def test_two_processes_sample_apart_and_as_one(tmp_path: Path) -> None:
    """gloo on a CPU: each process with a copy of its own, then both with one that is divided between them."""
    with_vllm()
    from test_training_processes import environments

    random_pair(tmp_path, "llama")
    command = [sys.executable, "-c", GROUPS, str(Path(__file__).parent), str(tmp_path)]
    started = [
        subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        for env in environments(2)
    ]
    try:
        told = [process.communicate(timeout=500)[1] for process in started]
    finally:
        for process in started:
            process.kill()
    assert [process.returncode for process in started] == [0, 0], told
    for rank, n in enumerate((4, 5)):
        one, two, alive, three, four, still = json.loads((tmp_path / f"{rank}.json").read_text(encoding="utf-8"))
        runs = (one, two, three, four)
        assert max(run["gap"] for run in runs) <= 1e-4
        assert {len(run["ids"]) for run in runs} == {n}
        assert all(a["ids"] != b["ids"] for a, b in itertools.pairwise(runs))
        assert (alive, still) == ("alive after 1", "alive after 2")
