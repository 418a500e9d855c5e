"""`nla-hub bench`: the plain routes are right, wrong engines are seen, and figures mean what docs/performance.md says."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Case
from parity import TEXTS, close, same_rows
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from nla_hub import registry
from nla_hub.architecture import Architecture
from nla_hub.bench import architectures, machine, page, plain, render
from nla_hub.bench.agreement import Rows, Vectors, compare_rows, compare_vectors
from nla_hub.bench.operations import Settings, verbalize
from nla_hub.bench.roofline import Decoding, read_weights
from nla_hub.bench.subject import engine_on, of_pair
from nla_hub.bench.texts import random_texts
from nla_hub.bench.timing import interleaved, peak_while
from nla_hub.cli.app import app
from nla_hub.engines.choice import EngineChoice
from nla_hub.engines.transformers import TransformersEngine
from nla_hub.errors import ContextLengthError, InputError, MissingExtraError, NLAError, UnknownNameError
from nla_hub.pretrained import LoadOptions
from nla_hub.prompts import AVPrompt
from nla_hub.testing.random_models import D_MODEL

CPU = torch.device("cpu")
ON_CPU = LoadOptions(dtype=torch.float32, device_map={"": "cpu"})
SMALL = ["--max-new-tokens", "3", "--rows", "3", "--batch-size", "2", "--pairs", "1"]
MACHINE_KEYS = {
    "record",
    "command",
    "subject",
    "random",
    "site",
    "shape",
    "dtype",
    "device",
    "device_name",
    "cores",
    "threads",
    "versions",
    "commit",
    "copy_bytes_per_s",
    "matmul_flops",
}
ROUTE_KEYS = {
    "record",
    "operation",
    "route",
    "status",
    "reason",
    "rows",
    "batch_size",
    "tokens",
    "seconds",
    "median_s",
    "rows_per_s",
    "tokens_per_s",
    "first_token_s",
    "faster_than",
    "peak_bytes",
    "rows_compared",
    "difference",
    "roofline",
}


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine that is measured in no time, a random architecture that is built in none, and one engine."""
    monkeypatch.setattr(registry.engines, "builtin", {"transformers": registry.engines.builtin["transformers"]})
    monkeypatch.setitem(machine.COPY_BYTES, "cpu", 2**16)
    monkeypatch.setitem(machine.MATMUL_SIDE, "cpu", 32)
    monkeypatch.setattr(machine, "REPEATS", 1)
    sizes = {
        **architectures.ARCHITECTURES["llama-d256"][1],
        "hidden_size": 32,
        "num_hidden_layers": 4,
        "head_dim": 8,
        "intermediate_size": 48,
    }
    monkeypatch.setitem(architectures.ARCHITECTURES, "small", ("llama", sizes))


def bench(*args: str) -> Any:
    return CliRunner().invoke(app, ["bench", *args])


def records(*args: str) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The machine's record and the routes' of a run that must succeed."""
    result = bench(*args, "--json")
    assert result.exit_code == 0, result.output
    first, *rest = [json.loads(line) for line in result.stdout.splitlines()]
    return first, rest


# -- the plain routes ----------------------------------------------------------------------------------------


def test_the_plain_av_writes_what_an_independent_loop_does(speaker: Case, vectors: torch.Tensor) -> None:
    av = speaker.nla.av.engine.av
    before = av.loaded.model.generation_config
    route = plain.PlainAV(av)
    ids, margins = speaker.av.decode(vectors, 4)
    for batch_size in (1, 4):
        same_rows(route.generate(vectors, 4, batch_size=batch_size), ids, margins)
    expected = speaker.av.logits(vectors[:1], torch.tensor([ids[0][:2]]))[0, -1].log_softmax(-1)
    close(route.logprobs_after(vectors[0], ids[0][:2]), expected)
    assert av.loaded.model.generation_config is before
    assert not any(module._forward_hooks for module in av.loaded.model.modules())


def test_the_plain_av_goes_on_behind_eos(llama: Case, vectors: torch.Tensor) -> None:
    av = llama.nla.av.engine.av
    route = plain.PlainAV(av)
    model = av.loaded.model
    expected = route.generate(vectors, 6, batch_size=7)
    stopper = expected[0][1]
    before, model.generation_config = model.generation_config, type(model.generation_config)(eos_token_id=stopper)
    try:
        assert route.generate(vectors, 6, batch_size=7) == expected
    finally:
        model.generation_config = before


def test_the_plain_vectors_are_the_references(crossed: Case) -> None:
    ar = crossed.nla.ar
    expected = torch.stack([crossed.ar.vector(text) for text in TEXTS])
    close(plain.vectors_one_by_one(ar, TEXTS), expected)
    close(plain.vectors_batched(ar, TEXTS, batch_size=3), expected)
    source = crossed.nla.source
    layer = crossed.pair.site.layer
    found = plain.last_hidden(source.loaded.model, source.tokenizer, crossed.pair.site, TEXTS, batch_size=3)
    close(found, torch.stack([crossed.source.hidden(crossed.source.ids(text), layer + 1)[-1] for text in TEXTS]))
    last = replace(crossed.pair.site, layer=source.loaded.model.config.num_hidden_layers - 1)
    with pytest.raises(NLAError, match="last block"):
        plain.last_hidden(source.loaded.model, source.tokenizer, last, TEXTS, batch_size=3)


# -- the command ---------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("small")
def test_json_of_a_pair_has_every_route_and_equal_results() -> None:
    first, routes = records(*SMALL)
    assert first.keys() == MACHINE_KEYS
    assert first["command"] == (
        "nla-hub bench --batch-size 2 --max-new-tokens 3 --rows 3 --pairs 1 --json"  # in the order of its help
    )
    assert (first["subject"], first["random"], first["dtype"], first["device"]) == ("tiny", False, "float32", "cpu")
    assert all(route.keys() == ROUTE_KEYS for route in routes)
    named = {(route["operation"], route["route"]): route for route in routes if route["status"] == "measured"}
    assert {
        *(("verbalize", name) for name in ("plain, one by one", "plain, batched", "engine transformers")),
        *(("reconstruct", name) for name in ("plain, one by one", "plain, batched", "nla-hub")),
        *(("capture", name) for name in ("plain, batched", "nla-hub")),
    } <= named.keys()
    for (operation, name), route in named.items():
        assert len(route["seconds"]) == 1
        assert route["rows_per_s"] == pytest.approx(3 / route["median_s"])
        assert route["tokens_per_s"] == pytest.approx(route["tokens"] / route["median_s"])
        if operation == "verbalize":
            assert route["tokens"] == 9
            assert route["first_token_s"] > 0
            if name != "plain, batched":
                assert route["rows_compared"] == {"equal": 3, "total": 3, "distinct": 3, "same_tokens": 1.0, "gap": 0.0}
        elif route["difference"] is not None:
            assert route["difference"] <= 1e-5
    ours = named["verbalize", "engine transformers"]
    one = named["verbalize", "plain, one by one"]
    assert ours["faster_than"]["plain, one by one"] == pytest.approx(one["median_s"] / ours["median_s"])
    assert (one["batch_size"], ours["batch_size"]) == (1, 2)


@pytest.mark.usefixtures("small")
def test_a_random_architecture_runs_every_operation_and_prints_tables() -> None:
    result = bench("--arch", "small", "--random", "--no-one-by-one", "--prompt-tokens", "41", *SMALL)
    assert result.exit_code == 0, result.output
    assert "small (random weights), L2" in result.stdout
    assert result.stdout.count(", 3 rows, ") == 3
    assert "3/3 rows equal (" in result.stdout
    assert "plain, one by one" not in result.stdout


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize(
    ("args", "code", "said"),
    [
        (["--arch", "qwen2.5-7"], 1, "did you mean 'qwen2.5-7b'"),
        (["--random"], 2, "--random needs --arch"),
        (["--engine-option", "a=1"], 2, "--engine-option needs --engine"),
        (["--arch", "small", "--engine", "transformer"], 1, "did you mean 'transformers'"),
        (["--arch", "small", "--prompt-tokens", "3"], 1, "at least"),
        (["verbalize", "--max-new-tokens", "100000"], 1, "--max-new-tokens 504"),
        (["everything"], 2, "everything"),
    ],
)
def test_what_cannot_be_measured_is_refused_with_the_way_out(args: list[str], code: int, said: str) -> None:
    result = bench(*args)
    assert result.exit_code == code
    assert said in result.stderr


# -- engines that are wrong, absent or in a hurry ------------------------------------------------------------


class Wrong(TransformersEngine):
    """Writes its second token wrong."""

    name = "wrong"

    def generate(self, *args: Any, **settings: Any) -> Any:
        done = super().generate(*args, **settings)
        return [replace(c, ids=(*c.ids[:1], *(c.ids[1] ^ 1 for _ in c.ids[1:2]), *c.ids[2:])) for c in done]


class Absent(TransformersEngine):
    """Needs something that is not here."""

    name = "absent"

    def __init__(self, av: Any) -> None:
        raise MissingExtraError("something", "some", needed_for="This engine")


class Hasty(TransformersEngine):
    """Ends every row at its first token, whatever it is told."""

    name = "hasty"

    def generate(self, *args: Any, **settings: Any) -> Any:
        return [replace(c, ids=c.ids[:1]) for c in super().generate(*args, **settings)]


@pytest.mark.usefixtures("small")
def test_an_engine_that_writes_something_else_fails_the_run() -> None:
    with registry.engines.lend("wrong", Wrong):
        result = bench("verbalize", "--arch", "small", "--json", *SMALL)
    assert result.exit_code == 3
    assert "verbalize, engine wrong: 0 of 3 rows are the plain route's" in result.stderr
    routes = {route.get("route"): route for route in map(json.loads, result.stdout.splitlines())}
    assert routes["engine wrong"]["rows_compared"]["equal"] == 0
    assert routes["engine wrong"]["rows_compared"]["same_tokens"] == pytest.approx(1 / 3)
    assert routes["engine transformers"]["rows_compared"]["equal"] == 3


@pytest.mark.usefixtures("small")
def test_engines_that_cannot_be_timed_are_listed_with_the_reason() -> None:
    with registry.engines.lend("absent", Absent), registry.engines.lend("hasty", Hasty):
        _, routes = records("verbalize", "--arch", "small", "--no-one-by-one", *SMALL)
        assert bench("verbalize", "--arch", "small", "--engine", "absent", *SMALL).exit_code == 1
    reasons = {route["route"]: route["reason"] for route in routes if route["status"] == "not measured"}
    assert "'something', which is not installed" in reasons["engine absent"]
    assert "pip install 'nla-hub[some]'" in reasons["engine absent"]
    assert "ends rows early" in reasons["engine hasty"]
    assert all(route["seconds"] == [] for route in routes if route["reason"] is not None)


def test_engines_are_told_not_to_stop_and_files_are_written_for_those_that_read_them(llama: Case) -> None:
    av, sidecar = llama.nla.av.engine.av, llama.nla.sidecar
    seen: dict[str, Any] = {}

    class Reader:
        name, kinds, reads, stops = "reader", frozenset({"overwrite"}), "files", True

        def __init__(self, av: Any) -> None:
            seen["files"] = {path.name for path in av.directory.iterdir()}
            seen["directory"] = av.directory

        def generate(self, vectors: Any, draws: Any, **settings: Any) -> Any: ...
        def probe(self) -> None: ...
        def close(self) -> None:
            seen["closed"] = True

    class Elsewhere(Reader):
        name, reads = "elsewhere", "contract"

    with registry.engines.lend("reader", Reader), registry.engines.lend("elsewhere", Elsewhere):  # type: ignore[arg-type]
        with engine_on(EngineChoice("reader"), av, sidecar) as engine:
            assert not engine.stops  # type: ignore[attr-defined]
        with pytest.raises(InputError, match="elsewhere"), engine_on(EngineChoice("elsewhere"), av, sidecar):
            pass
    assert {"config.json", "model.safetensors", "nla_meta.yaml", "tokenizer.json"} <= seen["files"]
    assert seen["closed"]
    assert not seen["directory"].exists()


def test_an_answer_that_does_not_fit_is_refused_before_anything_runs(llama: Case) -> None:
    limits = machine.Limits(1.0, 1.0)
    with pytest.raises(ContextLengthError, match="--max-new-tokens"):
        next(verbalize(of_pair(llama.nla), Settings(max_new_tokens=600), limits))


# -- agreement -----------------------------------------------------------------------------------------------


def test_the_gap_is_what_the_other_token_lacks(llama: Case, vectors: torch.Tensor) -> None:
    route = plain.PlainAV(llama.nla.av.engine.av)
    expected = route.generate(vectors, 4, batch_size=7)
    other = [list(row) for row in expected]
    other[2][3] ^= 1
    found = compare_rows(other, expected, route, vectors)
    logprobs = llama.av.logits(vectors[2:3], torch.tensor([expected[2][:3]]))[0, -1].log_softmax(-1)
    assert (found.equal, found.total) == (6, 7)
    assert found.same_tokens == pytest.approx(27 / 28)
    assert found.gap == pytest.approx(float(logprobs[expected[2][3]] - logprobs[other[2][3]]), rel=1e-3)
    assert compare_rows(expected, expected, route, vectors).gap == 0


def test_only_float32_is_judged_and_near_ties_are_let_pass() -> None:
    rows = Rows(equal=1, total=2, distinct=2, same_tokens=0.5, gap=2e-4)
    assert rows.fault(torch.float32) is not None
    assert rows.fault(torch.bfloat16) is None
    assert replace(rows, gap=5e-5).fault(torch.float32) is None
    assert replace(rows, gap=math.nan).fault(torch.float32) is not None
    assert Vectors(2e-5).fault(torch.float32) is not None
    assert Vectors(2e-5).fault(torch.bfloat16) is None
    one = torch.tensor([[3.0, 4.0]])
    assert compare_vectors(one + torch.tensor([0.0, 0.2]), one).difference == pytest.approx(0.05)
    assert compare_vectors(one * math.nan, one).difference == math.inf
    assert compare_vectors(one[0], one).difference == math.inf


# -- figures -------------------------------------------------------------------------------------------------


def test_the_roofline_is_the_arithmetic_that_its_page_states() -> None:
    shape = Architecture(d_model=8, mlp=16, heads=4, kv_heads=2, head_dim=2, vocabulary=10, windows=(None, 6))
    work = Decoding(shape, weight_bytes=1000, weight_values=500, width=2, rows=3, shared=5, own=2)
    # One token answered: 3 tokens of a row's own. The window of 6 sees those 3 and the last 3 of the 5 shared ones.
    read = 1000 + 2 * 2 * 2 * 2 * (5 + 3 * 3) + 2 * 2 * 2 * 2 * (3 + 3 * 3)
    done = 2 * 3 * 500 + 4 * 4 * 2 * 3 * (5 + 3) + 4 * 4 * 2 * 3 * (3 + 3)
    assert work.step(1) == (read, done)
    far = 1000 + 16 * (5 + 3 * 9) + 16 * (0 + 3 * 6)
    assert work.step(7)[0] == far
    assert work.least_seconds(2, bandwidth=100.0, rate=1e9) == pytest.approx(read / 100)
    assert work.least_seconds(2, bandwidth=1e9, rate=10.0) == pytest.approx(done / 10)
    mean = (read + work.step(2)[0]) / 2 / 100
    assert work.least_seconds(3, bandwidth=100.0, rate=1e9) == pytest.approx(mean)
    assert work.least_seconds(1, bandwidth=1.0, rate=1.0) is None


def test_an_embedding_counts_as_read_only_where_it_is_the_head(crossed: Case) -> None:
    model, adapter = crossed.av.model, crossed.nla.av.engine.av.loaded.adapter
    values = sum(value.numel() for value in model.parameters())
    tied = model.config.tie_word_embeddings
    expected = values if tied else values - model.config.vocab_size * D_MODEL
    assert read_weights(model, adapter) == (4 * expected, expected)


def test_runs_take_turns_behind_one_warm_up_each() -> None:
    calls: list[str] = []

    def route(name: str) -> Any:
        return lambda: calls.append(name) or len(calls)

    said: list[str] = []
    found = interleaved({"a": route("a"), "b": route("b")}, 2, CPU, progress=said.append)
    assert calls == ["a", "b", "a", "b", "a", "b"]
    assert (found["a"].result, found["b"].result) == (1, 2)
    assert all(len(timed.seconds) == 2 for timed in found.values())
    assert said[-1] == "b: run 2 of 2"


@pytest.mark.skipif(
    not Path("/proc/self/clear_refs").exists(), reason="the peak of a process is read from Linux's /proc"
)
def test_the_peak_is_of_the_route_that_ran() -> None:
    held, peak = peak_while(lambda: torch.ones(2**28, dtype=torch.uint8), CPU)
    if peak is None:
        pytest.skip("this system does not let a process reset its peak")
    del held
    _, after = peak_while(lambda: None, CPU)
    assert after is not None
    assert peak - after > 0.9 * 2**28


def test_texts_are_different_and_within_their_limit() -> None:
    texts = random_texts(lambda text: 3 + len(text.split()), 300, longest=8, limit=9, seed=0)
    lengths = [3 + len(text.split()) for text in texts]
    assert len(set(texts)) == 300
    assert max(lengths) <= 9 and min(lengths) < max(lengths)
    assert texts == random_texts(lambda text: 3 + len(text.split()), 300, longest=8, limit=9, seed=0)


# -- random architectures ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "billions"),
    # What the Hub counts in the checkpoints; of the Gemmas without the vision tower (0.417) and the projector (0.004, 0.006).
    [("qwen2.5-7b", 7.616), ("gemma-3-12b", 11.766), ("gemma-3-27b", 27.009), ("llama-3.3-70b", 70.554)],
)
def test_named_shapes_have_the_published_number_of_parameters(name: str, billions: float) -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(architectures.config_of(name))
    assert sum(value.numel() for value in model.parameters()) / 1e9 == pytest.approx(billions, abs=6e-4)


@pytest.mark.usefixtures("small")
def test_a_random_av_has_the_prompt_that_was_asked_for_and_reads_its_vector() -> None:
    for length in (40, 105):
        av, sidecar = architectures.random_av("small", ON_CPU, prompt_tokens=length, seed=0)
        assert len(av.prompt) == length
        assert AVPrompt.build(av.tokenizer, sidecar) == av.prompt
        TransformersEngine(av).probe()
    other, _ = architectures.random_av("small", ON_CPU, prompt_tokens=105, seed=1)
    again, _ = architectures.random_av("small", ON_CPU, prompt_tokens=105, seed=0)
    weights = [next(each.loaded.model.parameters()) for each in (av, again, other)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_an_unknown_architecture_gets_a_suggestion() -> None:
    with pytest.raises(UnknownNameError) as caught:
        architectures.site_of("lama-d256")
    assert caught.value.suggestions[0] == "llama-d256"


# -- the page ------------------------------------------------------------------------------------------------


def test_the_page_is_fresh() -> None:
    text = page.PAGE.read_text(encoding="utf-8")
    assert text == page.page(text, page.RESULTS), "docs/performance.md is stale: python -m nla_hub.bench.page"


@pytest.mark.usefixtures("small")
def test_a_stored_result_is_shown_and_a_changed_one_makes_the_page_stale(tmp_path: Path) -> None:
    blank = f"# Title\n\n{page.BEGIN}\nold\n{page.END}\n\nbelow\n"
    result = bench("verbalize", "--json", "--no-one-by-one", *SMALL)
    (tmp_path / "tiny.jsonl").write_text(result.stdout, encoding="utf-8")
    text = page.page(blank, tmp_path)
    assert page.page(text, tmp_path) == text
    assert "| engine transformers |" in text
    assert "--json > docs/performance/tiny.jsonl" in text
    assert "### On a GPU\n\nnot measured." in text
    assert "old" not in text
    assert text.endswith(f"{page.END}\n\nbelow\n")
    (tmp_path / "tiny.jsonl").write_text(result.stdout.replace('"equal": 3', '"equal": 2'), encoding="utf-8")
    assert page.page(text, tmp_path) != text
    (tmp_path / "tiny.jsonl").write_text("\n".join(result.stdout.splitlines()[1:]), encoding="utf-8")
    with pytest.raises(NLAError, match="begins with its machine"):
        page.page(text, tmp_path)
    with pytest.raises(NLAError, match="no place for results"):
        page.page("# Title\n", tmp_path)


def test_what_was_not_measured_is_said_to_be_not_measured() -> None:
    route = dict.fromkeys(ROUTE_KEYS)
    missing = render.cells({**route, "route": "engine x", "status": "not measured", "reason": "why"})
    assert missing[:2] == ("engine x", "not measured")
    assert missing[-1] == "why"
    assert len(missing) == len(render.COLUMNS)
