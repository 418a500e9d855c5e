"""The vLLM engine. What needs vLLM is marked so; the rest runs everywhere, against a stand-in that keeps vLLM's contract."""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import re
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import Case, Spec
from parity import STEPS, check_generation, close
from torch import Tensor
from wild import World, peft_pair
from wild import vectors as lora_vectors

from nla_hub import NLA
from nla_hub.engines.base import LoadedAV, StoredAV
from nla_hub.engines.choice import EngineChoice
from nla_hub.engines.vllm import engine as engine_module
from nla_hub.engines.vllm import room as room_module
from nla_hub.engines.vllm.engine import VLLMEngine, request
from nla_hub.engines.vllm.room import room
from nla_hub.engines.vllm.start import model_alone, refusal, surroundings
from nla_hub.errors import (
    ContextLengthError,
    InjectionError,
    InputError,
    Interrupted,
    MissingExtraError,
    NLAError,
    UnknownNameError,
)
from nla_hub.sampling import RowKey, request_seed, uniforms
from nla_hub.sidecar import Injection, Sidecar
from nla_hub.testing import D_MODEL, check_engine, random_av, random_model, random_pair

GREEDY: dict[str, Any] = {"temperature": 1.0, "max_new_tokens": 8, "batch_size": 4}


def rows(n: int, seed: int = 11) -> Tensor:
    return torch.randn(n, D_MODEL, generator=torch.Generator().manual_seed(seed))


def files_of(av: LoadedAV) -> StoredAV:
    return StoredAV(av.directory, av.config, av.tokenizer, av.prompt, av.injector, torch.float32)


@pytest.fixture
def stored(llama: Case) -> StoredAV:
    av: LoadedAV = llama.nla.av.engine.av  # type: ignore[attr-defined]
    return files_of(av)


# -- a stand-in for vLLM -------------------------------------------------------------------------------------


class Core:
    """Two steps a request; those that came last end first."""

    def __init__(self, llm: StandIn) -> None:
        self.llm = llm
        self.running: dict[str, int] = {}
        self.most = 0
        self.engine_core = SimpleNamespace(
            resources=SimpleNamespace(engine_dead=False, engine_manager=SimpleNamespace(processes=[])),
            shutdown=lambda: llm.events.append("shutdown"),
        )

    def step(self) -> list[Any]:
        if self.llm.trouble is not None:
            raise self.llm.trouble
        self.most = max(self.most, len(self.running))
        time.sleep(0.001)  # lets other threads in
        ended = list(self.running)[::-1][:3]
        return [self._end(name) for name in ended] + [SimpleNamespace(finished=False)] * (len(self.running) > 0)

    def _end(self, name: str) -> Any:
        del self.running[name]
        asked, params = self.llm.asked[int(name) - self.llm.before]
        mask = torch.tensor(asked["prompt_is_token_ids"])
        seen = float(asked["prompt_embeds"][~mask].sum()) if self.llm.listens else 0.0
        ids = [7, 8, 9][: params.max_tokens]
        if params.logprob_token_ids is not None:
            stale = self.llm.mixes_up and not params.skip_reading_prefix_cache
            word = (0.0 if stale else seen) + self.llm.drifts * int(name)
            first = {i: SimpleNamespace(logprob=math.sin(i + word)) for i in params.logprob_token_ids}
            logprobs: Any = [first]
        else:
            logprobs = SimpleNamespace(logprobs=[seen] * len(ids), start_indices=list(range(len(ids))))
        return SimpleNamespace(
            finished=True, request_id=name, outputs=[SimpleNamespace(token_ids=ids, logprobs=logprobs)]
        )

    def abort_request(self, names: list[str], *, internal: bool) -> None:
        self.llm.events.append(f"abort {len(names)}")
        for name in names:
            self.running.pop(name.split("-")[0], None)

    def has_unfinished_requests(self) -> bool:
        return bool(self.running)


class StandIn:
    """Keeps the part of `vllm.LLM`'s contract that the engine stands on."""

    listens = True
    mixes_up = False
    drifts = 0.0
    before = 5  # numbers that were given away already

    def __init__(self, **settings: Any) -> None:
        self.settings = settings
        self.events: list[str] = []
        self.trouble: BaseException | None = None
        self.asked: list[tuple[dict[str, Any], Any]] = []
        self.request_counter = SimpleNamespace(counter=self.before)
        self.renderer = SimpleNamespace(shutdown=lambda: None)
        self.llm_engine = Core(self)

    def enqueue(self, prompts: list[dict[str, Any]], params: list[Any], *, use_tqdm: bool) -> list[str]:
        names = []
        for asked in zip(prompts, params, strict=True):
            self.asked.append(asked)
            name = str(self.request_counter.counter)
            self.llm_engine.running[name] = 0
            self.request_counter.counter += 1
            names.append(f"{name}-internal")
        return names


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> type[StandIn]:
    """vLLM's module, replaced; the class whose objects are its LLMs."""

    class Mine(StandIn):
        pass

    defaults = {"logprob_token_ids": None, "skip_reading_prefix_cache": None}
    vllm, platforms = ModuleType("vllm"), ModuleType("vllm.platforms")
    vllm.LLM = Mine  # type: ignore[attr-defined]
    vllm.SamplingParams = lambda **settings: SimpleNamespace(**{**defaults, **settings})  # type: ignore[attr-defined]
    vllm.__version__ = "0"  # type: ignore[attr-defined]
    platform = SimpleNamespace(device_type="cpu", is_unspecified=lambda: False)
    platforms.current_platform = platform  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "vllm", vllm)
    monkeypatch.setitem(sys.modules, "vllm.platforms", platforms)
    return Mine


@pytest.fixture
def standing(stand_in: type[StandIn], stored: StoredAV) -> Iterator[VLLMEngine]:
    engine = VLLMEngine(stored, max_num_seqs=4)
    yield engine
    engine.close()


def llm_of(engine: VLLMEngine) -> Any:
    assert engine._running is not None
    return engine._running.llm


def test_completions_are_in_the_callers_order_whatever_ends_first(standing: VLLMEngine) -> None:
    vectors = rows(30)
    told: list[int] = []
    found = standing.generate(vectors, None, **GREEDY, progress=told.append)
    entering = standing.av.injector.entering(vectors).sum(-1)
    assert torch.allclose(torch.stack([c.logprobs[0] for c in found]), entering, atol=1e-4)
    assert [(c.ids, c.finish) for c in found] == [((7, 8, 9), "length")] * 30
    assert sum(told) == 30
    again = standing.generate(vectors[:3], None, **GREEDY)  # request numbers go on
    assert [float(c.logprobs[0]) for c in again] == [float(c.logprobs[0]) for c in found[:3]]


def test_no_more_than_twice_the_rows_that_run_at_once_are_handed_over(standing: VLLMEngine) -> None:
    standing.generate(rows(40), None, **GREEDY)
    assert llm_of(standing).llm_engine.most == 8


def test_threads_take_turns(standing: VLLMEngine) -> None:
    vectors = rows(24)
    alone = [float(c.logprobs[0]) for c in standing.generate(vectors, None, **GREEDY)]

    def one(i: int) -> list[float]:
        return [float(c.logprobs[0]) for c in standing.generate(vectors[i : i + 6], None, **GREEDY)]

    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(one, (0, 6, 12, 18)))
    assert [value for part in found for value in part] == alone


def test_a_request_is_the_prompt_with_a_hole_for_the_vector(stored: StoredAV) -> None:
    row = torch.arange(D_MODEL, dtype=torch.bfloat16)
    made = request(stored, row)
    assert made["prompt_token_ids"] == list(stored.prompt.ids)
    holes = [i for i, is_token in enumerate(made["prompt_is_token_ids"]) if not is_token]
    assert holes == [stored.prompt.marker_position]
    assert made["prompt_embeds"].dtype == torch.bfloat16
    assert torch.equal(made["prompt_embeds"][holes[0]], row)
    assert made["prompt_embeds"].count_nonzero() == row.count_nonzero()


def test_a_rows_seed_is_its_own_in_any_batch(standing: VLLMEngine) -> None:
    vectors, draws = rows(6), uniforms(0, [RowKey(str(i)) for i in range(6)], 8)
    standing.generate(vectors, draws, **{**GREEDY, "temperature": 0.7})
    seeds = [params.seed for _, params in llm_of(standing).asked]
    assert seeds == [request_seed(row) for row in draws]
    assert len(set(seeds)) == 6
    order = [3, 5, 0, 1, 4, 2]
    standing.generate(vectors[order], draws[order], **{**GREEDY, "temperature": 0.7})
    assert [params.seed for _, params in llm_of(standing).asked[6:]] == [seeds[i] for i in order]
    assert {params.temperature for _, params in llm_of(standing).asked} == {0.7}


def test_rows_can_be_told_not_to_stop(standing: VLLMEngine) -> None:
    standing.generate(rows(1), None, **GREEDY)
    standing.stops = False
    standing.generate(rows(1), None, **GREEDY)
    stopping, going_on = (vars(params) for _, params in llm_of(standing).asked)
    assert stopping["stop"] == ["</explanation>"]
    assert stopping["include_stop_str_in_output"]
    assert stopping["stop_token_ids"] == [2]
    assert "stop" not in going_on
    assert going_on["ignore_eos"]


def test_ctrl_c_takes_requests_back_and_the_engine_goes_on(standing: VLLMEngine) -> None:
    def stop(_rows: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(Interrupted) as caught:
        standing.generate(rows(9), None, **GREEDY, progress=stop)
    assert list(caught.value.done) == [7]  # the last of the eight that were handed over
    assert llm_of(standing).events == ["abort 8"]
    assert len(standing.generate(rows(3), None, **GREEDY)) == 3


def test_an_engine_that_takes_no_abort_is_closed(standing: VLLMEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    llm = llm_of(standing)
    llm.trouble = KeyboardInterrupt()
    monkeypatch.setattr(llm.llm_engine, "has_unfinished_requests", lambda: True)
    with pytest.raises(Interrupted):
        standing.generate(rows(9), None, **GREEDY)
    assert llm.events == ["abort 8", "shutdown"]
    with pytest.raises(NLAError, match=r"is closed(.|\n)*load the pair again"):
        standing.generate(rows(1), None, **GREEDY)


def test_an_engine_that_died_says_so_and_is_closed(standing: VLLMEngine) -> None:
    llm = llm_of(standing)
    llm.trouble = RuntimeError("EngineCore encountered an issue")
    with pytest.raises(NLAError, match=r"stopped while it was writing.*EngineCore encountered"):
        standing.generate(rows(2), None, **GREEDY)
    assert "shutdown" in llm.events


def test_a_vector_that_does_not_arrive_is_seen(standing: VLLMEngine) -> None:
    standing.probe()
    llm_of(standing).listens = False
    with pytest.raises(InjectionError, match="does not reach"):
        standing.probe()


def test_scores_that_are_never_the_same_prove_nothing(standing: VLLMEngine) -> None:
    llm_of(standing).listens = False
    llm_of(standing).drifts = 0.1
    with pytest.raises(InjectionError, match="other next words each time"):
        standing.probe()


@pytest.mark.parametrize(("asked", "raises"), [("auto", False), (True, True)])
def test_a_cache_that_mixes_vectors_up_is_not_read(
    stand_in: type[StandIn], stored: StoredAV, asked: Any, raises: bool, caplog: pytest.LogCaptureFixture
) -> None:
    stand_in.mixes_up = True
    engine = VLLMEngine(stored, prefix_caching=asked)
    if raises:
        with pytest.raises(InjectionError, match=r"prefix cache takes one vector(.|\n)*\"prefix_caching\": False"):
            engine.probe()
    else:
        with caplog.at_level(logging.WARNING, "nla_hub"):
            engine.probe()
        assert "it is not used" in caplog.text
        engine.generate(rows(1), None, **GREEDY)
        assert llm_of(engine).asked[-1][1].skip_reading_prefix_cache
    engine.close()


def test_a_cache_that_is_off_is_not_proven(stand_in: type[StandIn], stored: StoredAV) -> None:
    stand_in.mixes_up = True
    engine = VLLMEngine(stored, prefix_caching=False)
    engine.probe()
    assert llm_of(engine).settings["enable_prefix_caching"] is False
    assert len(llm_of(engine).asked) == 3
    engine.close()


def test_what_vllm_is_told(standing: VLLMEngine, stored: StoredAV) -> None:
    told = llm_of(standing).settings
    per_token = 2 * 4 * 32 * 4  # keys and values, blocks, head_dim of one head, float32
    assert told["max_model_len"] == 512
    assert told["dtype"] == "float32"
    assert (told["block_size"], told["enforce_eager"], told["max_num_seqs"]) == (32, True, 4)
    assert told["kv_cache_memory_bytes"] == 4 * (len(stored.prompt) + room_module.ANSWER) * per_token
    assert told["enable_prompt_embeds"]
    assert told["generation_config"] == "vllm"
    assert told["hf_overrides"] == {"architectures": ["LlamaForCausalLM"]}


def test_a_share_of_the_card_is_passed_on(stand_in: type[StandIn], stored: StoredAV) -> None:
    engine = VLLMEngine(stored, gpu_memory_utilization=0.4, block_size=64, enforce_eager=False, max_model_len=100)
    told = llm_of(engine).settings
    assert told["gpu_memory_utilization"] == 0.4
    assert "kv_cache_memory_bytes" not in told
    assert (told["block_size"], told["enforce_eager"], told["max_model_len"]) == (64, False, 100)
    engine.close()


def test_answers_longer_than_it_was_started_for_are_refused(standing: VLLMEngine) -> None:
    with pytest.raises(ContextLengthError, match=r"at most 496(.|\n)*\"max_model_len\": 517"):
        standing.generate(rows(1), None, temperature=1.0, max_new_tokens=501, batch_size=1)


@pytest.mark.parametrize("temperature", [0.001, 2.5])
def test_temperatures_that_vllm_would_change_are_refused(standing: VLLMEngine, temperature: float) -> None:
    draws = uniforms(0, [RowKey("x")], 4)
    with pytest.raises(InputError, match=rf"this temperature.*{temperature}, expected from 0.01 to 2.0"):
        standing.generate(rows(1), draws, temperature=temperature, max_new_tokens=4, batch_size=1)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"prefix_caching": "yes"}, "prefix_caching is True, False or 'auto'"),
        ({"max_model_len": 10}, "more than its prompt of 16 tokens, at most 512"),
        ({"max_model_len": 513}, "more than its prompt of 16 tokens, at most 512"),
    ],
)
def test_options_out_of_range_are_refused_and_scratch_is_removed(
    stand_in: type[StandIn], stored: StoredAV, options: dict[str, Any], words: str
) -> None:
    scratch = TemporaryDirectory()
    with pytest.raises(InputError, match=words):
        VLLMEngine(replace(stored, scratch=scratch), **options)
    assert not Path(scratch.name).exists()


def test_a_kind_that_it_cannot_inject_is_refused(stored: StoredAV) -> None:
    added = replace(stored, injector=replace(stored.injector, spec=Injection("add", None)))
    with pytest.raises(InjectionError, match=r"'add'.*expected overwrite(.|\n)*engine=\"transformers\""):
        VLLMEngine(added)


def test_unknown_options_get_a_suggestion() -> None:
    with pytest.raises(UnknownNameError, match="did you mean 'tensor_parallel_size'"):
        EngineChoice("vllm", {"tensor_parallel": 2}).check()


def test_a_missing_vllm_says_what_to_install(llama: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    before = environment()
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'nla-hub\[vllm\]'"):
        NLA.from_pretrained(llama.pair.root, engine="vllm", components=("av",))
    assert environment() == before


def test_it_runs_on_linux_alone(stored: StoredAV, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    with pytest.raises(NLAError, match=r"Linux alone.*darwin(.|\n)*engine=\"transformers\""):
        VLLMEngine(stored)


def test_a_build_for_another_device_is_refused(stand_in: type[StandIn], stored: StoredAV) -> None:
    sys.modules["vllm.platforms"].current_platform.is_unspecified = lambda: True
    with pytest.raises(NLAError, match="finds no device"):
        VLLMEngine(stored)


def environment() -> dict[str, str]:
    """The environment, but for what pytest writes into it."""
    return {name: value for name, value in os.environ.items() if name != "PYTEST_CURRENT_TEST"}


def test_the_environment_is_as_before(tmp_path: Path) -> None:
    before = environment()
    with contextlib.suppress(ValueError), surroundings(tmp_path / "vllm.log"):
        assert os.environ["VLLM_WORKER_MULTIPROC_METHOD"] == "spawn"
        assert os.environ["VLLM_LOGGING_STREAM"] == "ext://sys.stderr"
        config = json.loads(Path(os.environ["VLLM_LOGGING_CONFIG_PATH"]).read_text(encoding="utf-8"))
        assert config["handlers"]["file"]["filename"] == str(tmp_path / "vllm.log")
        os.environ["LD_PRELOAD"] = "libgomp.so"
        del os.environ["PATH"]
        raise ValueError
    assert environment() == before


def test_a_user_who_sets_vllms_log_level_gets_its_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_LOGGING_LEVEL", "INFO")
    with surroundings(tmp_path / "vllm.log"):
        assert "VLLM_LOGGING_CONFIG_PATH" not in os.environ
        assert os.environ["VLLM_LOGGING_STREAM"] == "ext://sys.stderr"


def test_safetensors_that_are_not_the_models_stay_out(copied: Any, tmp_path: Path) -> None:
    (copied.av / "fve_reference.safetensors").write_bytes(b"not for vLLM")
    found = model_alone(copied.av, tmp_path / "model")
    names = {path.name for path in found.iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= names
    assert "fve_reference.safetensors" not in names
    assert (found / "config.json").read_bytes() == (copied.av / "config.json").read_bytes()


LOG = """WARNING vllm.x: something harmless
ERROR vllm.v1.executor: WorkerProc failed to start.
Traceback (most recent call last):
  File "worker.py", line 1, in f
    raise {error}
{error}
ERROR vllm.v1.engine: EngineCore failed to start.
RuntimeError: Worker failed with error, please check the stack trace above for the root cause
"""
FAILED = RuntimeError("Engine core initialization failed. See root cause above. Failed core proc(s): {}")


@pytest.mark.parametrize(
    ("cause", "log", "words"),
    [
        (
            FAILED,
            LOG.format(error="ValueError: No available memory for the KV cache blocks."),
            r"too little memory.*No available memory(.|\n)*gpu_memory_utilization",
        ),
        (
            FAILED,
            LOG.format(error="torch.OutOfMemoryError: CUDA out of memory."),
            r"too little memory.*CUDA out of memory",
        ),
        (FAILED, LOG.format(error="ValueError: Unsupported head size 24"), r"cannot run this AV.*head size 24"),
        (ValueError("Model architectures ['X'] are not supported for now."), "", r"cannot run this AV.*\['X'\]"),
        (FAILED, "", r"did not start(.|\n)*__main__"),
        (ValueError("heads must be divisible\nby 3"), "", r"did not start.*divisible by 3(.|\n)*Next: VLLM_LOGGING"),
    ],
)
def test_why_it_did_not_start(cause: Exception, log: str, words: str) -> None:
    assert re.search(words, str(refusal(cause, log)))


def test_a_failed_start_reads_the_log_and_leaves_nothing(
    stand_in: type[StandIn], stored: StoredAV, monkeypatch: pytest.MonkeyPatch
) -> None:
    logs: list[Path] = []

    def fail(self: Any, **settings: Any) -> None:
        config = json.loads(Path(os.environ["VLLM_LOGGING_CONFIG_PATH"]).read_text(encoding="utf-8"))
        logs.append(Path(config["handlers"]["file"]["filename"]))
        logs[0].write_text(LOG.format(error="ValueError: Unsupported head size 24"), encoding="utf-8")
        raise FAILED

    monkeypatch.setattr(stand_in, "__init__", fail)
    with pytest.raises(NLAError, match="Unsupported head size 24"):
        VLLMEngine(stored)
    assert not logs[0].parent.exists()


# -- memory --------------------------------------------------------------------------------------------------

PER_TOKEN = 2 * 4 * 32 * 4


def test_the_cache_has_room_for_the_rows_that_run_at_once(stored: StoredAV, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room_module, "free_memory", lambda device: 2**33)
    found = room(stored, "cpu", rows=10, max_model_len=500)
    assert found.cache == 10 * (16 + room_module.ANSWER) * PER_TOKEN
    assert room(stored, "cpu", rows=10, max_model_len=100).cache == 10 * 100 * PER_TOKEN


def test_half_of_what_the_weights_leave_stays_free(stored: StoredAV, monkeypatch: pytest.MonkeyPatch) -> None:
    weights = (stored.directory / "model.safetensors").stat().st_size
    free = weights + 2 * 1000 * PER_TOKEN
    monkeypatch.setattr(room_module, "free_memory", lambda device: free)
    monkeypatch.setattr(room_module, "_total", lambda device: 2 * free)
    found = room(stored, "cuda", rows=10**6, max_model_len=500)
    assert abs(found.cache - 1000 * PER_TOKEN) < 10**4  # a header's length
    assert found.share == pytest.approx((weights + found.cache) / (2 * free), rel=0.01)


def test_an_av_without_room_for_one_row_is_refused(stored: StoredAV, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room_module, "free_memory", lambda device: 10**6)
    with pytest.raises(NLAError, match=r"no room(.|\n)*one row of 500 tokens(.|\n)*max_model_len"):
        room(stored, "cpu", rows=1, max_model_len=500)


def test_cards_share_weights_and_heads(llama: Case, stored: StoredAV, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room_module, "free_memory", lambda device: None)
    monkeypatch.setattr(stored.config, "num_key_value_heads", 4)
    whole, half = (room(stored, "cpu", rows=8, max_model_len=500, devices=n).cache for n in (1, 2))
    assert whole == 2 * half == 4 * 8 * (16 + room_module.ANSWER) * PER_TOKEN


# -- vLLM itself ---------------------------------------------------------------------------------------------

real = [
    pytest.mark.vllm,
    pytest.mark.timeout(600),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]


def vllm_tests(test: Callable[..., None]) -> Callable[..., None]:
    """Marks of a test that runs vLLM."""
    for mark in real:
        test = mark(test)
    return test


def with_vllm() -> None:
    pytest.importorskip("vllm", reason="the vllm extra: .ci/run installs its CPU build in an environment of its own")


LONG = "a story in the night: the red dog walks and walks, and the small quick cat is where it was. " * 3
"""More than two blocks of 32 tokens stand before the marker."""


def long_pair(root: Path, architecture: str) -> Path:
    """A random pair whose AV prompt is longer than several cache blocks, before and after the marker."""
    pair = random_pair(root, architecture)
    for half in (pair.av, pair.ar):
        sidecar = Sidecar.read(half)
        sidecar.with_(av_template=f"{LONG}{sidecar.av_template} {LONG}").write(half)
    return root


@pytest.fixture(scope="session")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Case]:
    """A llama whose AV runs on vLLM, and the environment unharmed by that."""
    with_vllm()
    before, threads = environment(), torch.get_num_threads()
    root = long_pair(tmp_path_factory.mktemp("served"), "llama")
    nla = NLA.from_pretrained(root, engine="vllm")
    assert environment() == before
    assert (torch.get_num_threads(), torch.get_default_dtype()) == (threads, torch.float32)
    pair = random_pair(tmp_path_factory.mktemp("other"), "llama")
    yield Case(Spec("llama"), replace(pair, root=root, av=root / "av", ar=root / "ar", source=root / "source"), nla)
    nla.close()


@pytest.fixture
def engine(served: Case) -> VLLMEngine:
    found = served.nla.av.engine
    assert isinstance(found, VLLMEngine)
    return found


@vllm_tests
def test_greedy_text_equals_an_independent_loop(served: Case, vectors: Tensor) -> None:
    check_generation(served, torch.cat([vectors, rows(40)]))


@vllm_tests
def test_explanations_and_scores_are_those_of_the_transformers_engine(served: Case) -> None:
    plain = NLA.from_pretrained(served.pair.root, engine="transformers")
    texts = ["the cat sees a house", "a story in the night"]
    mine, theirs = (nla.explain(texts, temperature=0, max_new_tokens=STEPS) for nla in (served.nla, plain))
    assert [e.raw for e in mine] == [e.raw for e in theirs]
    assert [e.cosine for e in mine] == pytest.approx([e.cosine for e in theirs], abs=1e-6)


@vllm_tests
def test_first_tokens_are_drawn_from_the_models_distribution(served: Case, engine: VLLMEngine) -> None:
    """Pearson's chi-square over the eight likeliest tokens and the rest: eight degrees, 0.999 quantile 26.1."""
    n = 1500
    vector = rows(1)
    exact = served.av.logits(vector, torch.empty(1, 0, dtype=torch.long))[0, -1].double().softmax(-1)
    draws = uniforms(7, [RowKey("x", sample=i) for i in range(n)], 1)
    found = engine.generate(vector.expand(n, -1), draws, temperature=1.0, max_new_tokens=1, batch_size=1)
    top = exact.topk(8)
    counts = torch.bincount(torch.tensor([c.ids[0] for c in found]), minlength=len(exact)).double()
    observed = torch.cat([counts[top.indices], (n - counts[top.indices].sum())[None]])
    expected = n * torch.cat([top.values, (1 - top.values.sum())[None]])
    assert float(expected.min()) > 5
    assert float(((observed - expected) ** 2 / expected).sum()) < 26.1


@vllm_tests
def test_drawn_texts_follow_seed_and_key_in_any_batch(served: Case) -> None:
    vectors, keys = rows(9), [str(i) for i in range(9)]
    run: dict[str, Any] = {"temperature": 0.9, "max_new_tokens": 16}
    straight = [e.raw for e in served.nla.verbalize(vectors, keys=keys, **run)]
    order = [4, 8, 0, 2, 7, 1, 3, 6, 5]
    shuffled = [e.raw for e in served.nla.verbalize(vectors[order], keys=[keys[i] for i in order], **run)]
    assert shuffled == [straight[i] for i in order]
    assert served.nla.verbalize(vectors[3], keys=["3"], **run).raw == straight[3]
    assert [e.raw for e in served.nla.verbalize(vectors, keys=keys, seed=1, **run)] != straight
    three = [e.raw for e in served.nla.verbalize(vectors[0], n=3, **run)]
    assert len(set(three)) == 3
    shorter = served.nla.verbalize(vectors[0], temperature=0.9, max_new_tokens=6).raw
    assert three[0].startswith(shorter)


@vllm_tests
def test_vectors_never_alias_in_the_prefix_cache(served: Case, engine: VLLMEngine) -> None:
    """Hits are real, a vector's own block is found again, and texts are those of a run that reads nothing."""
    assert engine.reads_cache
    vectors = torch.cat([rows(12, seed=3), rows(12, seed=3), -rows(12, seed=3)])
    hits: list[int] = []
    completion = VLLMEngine._completion

    def spy(self: Any, output: Any) -> Any:
        hits.append(output.num_cached_tokens)
        return completion(self, output)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(VLLMEngine, "_completion", spy)
        warm = [engine.generate(vectors, None, **GREEDY) for _ in range(2)]
        known = max(hits)
        patch.setattr(engine, "reads_cache", False)
        hits.clear()
        cold = engine.generate(vectors, None, **GREEDY)
        assert set(hits) == {0}
    marker = engine.av.prompt.marker_position
    assert known > marker >= 64, "no block that holds a marker was found again, so nothing is proven"
    for run in warm:
        assert [c.ids for c in run] == [c.ids for c in cold]
        close(torch.stack([c.logprobs[0] for c in run]), torch.stack([c.logprobs[0] for c in cold]))
    assert len({float(c.logprobs[0]) for c in cold}) >= 20
    teacher = served.av.logits(vectors[:1], torch.tensor([cold[0].ids]))
    assert int(teacher[0, 0].argmax()) == cold[0].ids[0]


@vllm_tests
def test_a_request_without_its_mask_is_caught_by_the_probe(engine: VLLMEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    engine.probe()

    def maskless(av: StoredAV, row: Tensor) -> dict[str, Any]:
        made = request(av, row)
        del made["prompt_is_token_ids"]
        return made

    monkeypatch.setattr(engine_module, "request", maskless)
    with pytest.raises(InjectionError, match="does not reach"):
        engine.probe()


def constrain(monkeypatch: pytest.MonkeyPatch, **more: Any) -> None:
    """Let vLLM sample under constraints, so that a random model writes what is wanted."""
    plain = engine_module.sampling_params
    monkeypatch.setattr(engine_module, "sampling_params", lambda **settings: plain(**settings, **more))


@vllm_tests
@pytest.mark.parametrize("spelled", [False, True])
def test_the_closing_tag_ends_a_row_in_one_token_or_many(
    engine: VLLMEngine, monkeypatch: pytest.MonkeyPatch, spelled: bool
) -> None:
    from vllm.sampling_params import StructuredOutputsParams

    whole = engine.av.tokenizer.convert_tokens_to_ids("</explanation>")
    bias = {whole: -100.0 if spelled else 100.0}
    wanted = StructuredOutputsParams(regex="a</explanation>bbbbbb")
    constrain(monkeypatch, structured_outputs=wanted, logit_bias=bias)
    (found,) = engine.generate(rows(1), None, temperature=1.0, max_new_tokens=40, batch_size=1)
    assert (found.text, found.finish) == ("a</explanation>", "tag")
    assert (whole in found.ids) is not spelled
    assert len(found.ids) == len(found.logprobs) == (2 if not spelled else len(found.ids))


@vllm_tests
def test_a_sampled_marker_is_just_a_token(
    served: Case, engine: VLLMEngine, monkeypatch: pytest.MonkeyPatch, vectors: Tensor
) -> None:
    """Only marker and neighbours may be written; each is the likeliest of the three after all before it, as plain tokens."""
    marker = engine.av.injector.marker
    allowed = [marker.left_id, marker.id, marker.right_id]
    constrain(monkeypatch, allowed_token_ids=allowed)
    found = engine.generate(vectors, None, temperature=1.0, max_new_tokens=12, batch_size=7)
    ids = torch.tensor([c.ids for c in found])
    assert (ids == marker.id).any()
    best = served.av.logits(vectors, ids)[:, :-1, allowed].argmax(-1)
    assert torch.equal(torch.tensor(allowed)[best], ids)


@vllm_tests
def test_an_interrupted_engine_is_usable(engine: VLLMEngine) -> None:
    before = [c.ids for c in engine.generate(rows(3), None, **GREEDY)]

    def stop(_rows: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(Interrupted) as caught:
        engine.generate(rows(90), None, temperature=1.0, max_new_tokens=60, batch_size=4, progress=stop)
    assert len(caught.value.done) == 1
    assert not llm_of(engine).llm_engine.has_unfinished_requests()
    assert [c.ids for c in engine.generate(rows(3), None, **GREEDY)] == before


@vllm_tests
def test_the_engine_passes_the_public_check(tmp_path: Path) -> None:
    """Gemma: its embedding rows are scaled, its windows are shorter than the prompt."""
    with_vllm()
    check_engine(VLLMEngine, random_av(tmp_path, partial(random_model, "gemma3")))


def children() -> set[int]:
    """Processes below this one, zombies among them, but Python's own resource tracker."""
    found = set()
    for task in Path("/proc/self/task").iterdir():
        found |= {int(pid) for pid in (task / "children").read_text(encoding="ascii").split()}
    return {pid for pid in found if b"resource_tracker" not in Path(f"/proc/{pid}/cmdline").read_bytes()}


@vllm_tests
def test_a_lora_is_merged_and_closing_leaves_nothing(tmp_path: Path) -> None:
    with_vllm()
    pytest.importorskip("peft", reason="the LoRA is written with peft")
    built = peft_pair(World(), tmp_path)
    processes, threads = children(), set(threading.enumerate())
    nla = NLA.from_pretrained(built.name, engine="vllm", components=("av",), **built.options)
    engine = nla.av.engine
    assert isinstance(engine, VLLMEngine)
    assert engine.av.scratch is not None
    assert engine._running is not None
    folders = [Path(engine.av.scratch.name), Path(engine._running._folder.name)]
    assert all(folder.is_dir() for folder in folders)
    assert children() > processes
    found = engine.generate(lora_vectors(), None, temperature=1.0, max_new_tokens=1, batch_size=7)
    assert built.logits is not None
    best = built.logits.log_softmax(-1).max(-1)
    assert [c.ids[0] for c in found] == best.indices.tolist()
    close(torch.stack([c.logprobs[0] for c in found]), best.values)
    nla.close()
    engine.close()
    assert children() == processes
    left = {thread for thread in threading.enumerate() if thread.name != "tqdm_monitor"} - threads
    assert not left
    assert not any(folder.exists() for folder in folders)
    assert not any(isinstance(h, logging.FileHandler) for h in logging.getLogger("vllm").handlers)
    with pytest.raises(NLAError, match="is closed"):
        engine.generate(lora_vectors(), None, **GREEDY)


def in_session(session: int) -> list[str]:
    """Command lines of the processes of a session, but for those that are ending."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            state, _parent, _group, its_session = stat.read_text(encoding="utf-8").rpartition(")")[2].split()[:4]
            if int(its_session) == session and state != "Z":
                found.append((stat.parent / "cmdline").read_text(encoding="utf-8").replace("\0", " "))
    return found


def run_alone(*command: str, **settings: Any) -> tuple[str, str]:
    """stdout and stderr of a command in a session of its own, of which nothing must be left."""
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True, **settings
    ) as process:
        try:
            out, err = process.communicate(timeout=500)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            raise
    assert process.returncode == 0, err
    for _ in range(100):  # a process that is ending takes a moment
        if not (left := in_session(process.pid)):
            break
        time.sleep(0.2)
    assert left == []
    return out, err


@vllm_tests
def test_the_command_prints_json_lines_alone_and_leaves_no_process(tmp_path: Path) -> None:
    with_vllm()
    pair = random_pair(tmp_path, "qwen2")
    text = "the cat sees a house"
    settings = ("--temperature", "0", "--max-new-tokens", "12", "--json")
    command = (sys.executable, "-m", "nla_hub", "explain", text, "--nla", str(pair.root), "--engine", "vllm")
    out, _err = run_alone(*command, "--engine-option", "max_model_len=64", *settings)
    (row,) = [json.loads(line) for line in out.splitlines()]
    (plain,) = NLA.from_pretrained(pair.root).explain([text], temperature=0, max_new_tokens=12)
    assert (row["raw"], row["cosine"]) == (plain.raw, pytest.approx(plain.cosine, abs=1e-6))


@vllm_tests
def test_ctrl_c_at_a_terminal_and_an_exit_without_close_leave_no_process(tmp_path: Path) -> None:
    """The signal reaches vLLM's processes too: the engine must go on or say that it is closed, never hang."""
    with_vllm()
    pair = random_pair(tmp_path, "llama")
    script = tmp_path / "script.py"
    script.write_text(
        textwrap.dedent(f"""
        import os, signal, torch
        from nla_hub import NLA
        from nla_hub.errors import NLAError

        if __name__ == "__main__":
            nla = NLA.from_pretrained({str(pair.root)!r}, engine="vllm", components=("av",))
            try:
                nla.av.engine.generate(torch.randn(64, {D_MODEL}), None, temperature=1.0, max_new_tokens=100, batch_size=1,
                                       progress=lambda n: os.killpg(0, signal.SIGINT))
            except KeyboardInterrupt:
                print("interrupted")
            try:
                print("usable", len(nla.verbalize(torch.randn(2, {D_MODEL}), max_new_tokens=4)))
            except NLAError as error:
                print("closed", error.what)
        """),
        encoding="utf-8",
    )
    out, _err = run_alone(sys.executable, str(script))
    first, second = out.splitlines()
    assert first == "interrupted"
    assert second.split()[0] in ("usable", "closed")


@vllm_tests
def test_too_little_memory_names_the_options_and_leaves_no_process(tmp_path: Path) -> None:
    """The reason is in the log of a process that is gone."""
    with_vllm()
    av = files_of(random_av(tmp_path, partial(random_model, "llama")))
    processes = children()
    with pytest.raises(NLAError, match=r"too little memory.*requested memory for kv(.|\n)*\"gpu_memory_utilization\""):
        VLLMEngine(av, gpu_memory_utilization=1e-5)
    assert children() == processes


@vllm_tests
def test_what_vllm_refuses_is_said_in_its_words(tmp_path: Path) -> None:
    with_vllm()
    av = files_of(random_av(tmp_path, partial(random_model, "llama")))
    with pytest.raises(NLAError, match=r"did not start.*divisible by tensor parallel size"):
        VLLMEngine(av, tensor_parallel_size=3)
