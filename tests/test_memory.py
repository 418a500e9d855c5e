"""The estimator against loaded modules, real caches and measured peaks; loading that never holds a checkpoint twice."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import peaks
import pytest
import torch
from conftest import Case
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from nla_hub import NLA, pretrained, weights
from nla_hub.architecture import Architecture
from nla_hub.batching import PASS_TOKENS
from nla_hub.errors import WeightsError
from nla_hub.hardware import _cgroup_left, _mem_available, free_memory
from nla_hub.loading import open_pair
from nla_hub.locate import resolve_pair
from nla_hub.memory import (
    MARGIN,
    RUNTIME,
    PartSize,
    Workload,
    bits,
    cache_bytes,
    choose,
    estimate,
    estimates,
    working_bytes,
)
from nla_hub.pretrained import LoadOptions, load_causal_lm, load_trunk
from nla_hub.sizing import choose_mode, pair_sizes, quantization_of, source_size, workload_of
from nla_hub.training.recipe import LoRASpec
from nla_hub.weights import is_finite

TINY = peaks.Size("tiny", 256, 3, 1, 384, vocabulary=512)


def sizes_of(root: Path, options: LoadOptions | None = None) -> dict[str, PartSize]:
    return {size.name: size for size in pair_sizes(open_pair(resolve_pair(root)), options or LoadOptions())}


def module_bytes(*modules: Any) -> int:
    """Bytes of all weights, shared ones once: what the estimator is held against."""
    found = {}
    for module in modules:
        for value in module.parameters():
            found[value.data_ptr()] = value.numel() * value.element_size()
    return sum(found.values())


@pytest.fixture(scope="module")
def lora_pair(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return peaks.build(tmp_path_factory.mktemp("memory") / "lora", TINY, lora=True)


# -- bytes of parts ------------------------------------------------------------------------------------------


def test_parts_are_as_large_as_their_modules(family: Case) -> None:
    """In bfloat16, so that every tensor changes its size on the way; an AR's head stays float32."""
    dtype = "bfloat16"
    found = sizes_of(family.pair.root, LoadOptions(dtype=dtype))
    nla = NLA.from_pretrained(family.pair.root, dtype=dtype)
    assert found["av"].loaded == module_bytes(nla.av.engine.av.loaded.model)  # type: ignore[attr-defined]
    assert found["ar"].loaded == module_bytes(nla.ar.model)
    assert found["source"].loaded == module_bytes(nla.capture_source.loaded.model)
    pair = open_pair(resolve_pair(family.pair.root))
    assert pair.base is not None
    whole = source_size(pair.base, pair, LoadOptions(dtype=dtype), complete=True)
    assert whole.loaded == module_bytes(nla.source.loaded.model)


def test_stored_bytes_are_the_files(family: Case) -> None:
    found = sizes_of(family.pair.root)
    for name, part in found.items():
        files = list((family.pair.root / name).glob("*.safetensors"))
        headers = sum(8 + int.from_bytes(f.read_bytes()[:8], "little") for f in files)
        assert part.stored == sum(f.stat().st_size for f in files) - headers


def test_the_factors_of_a_lora_pair_are_counted_beside_one_base(lora_pair: Path) -> None:
    found = sizes_of(lora_pair)
    nla = NLA.from_pretrained(lora_pair, memory="shared")
    base = module_bytes(nla.source.loaded.model)
    factors = load_file(lora_pair / "av" / "adapter_model.safetensors")
    assert found["av"].base == found["ar"].base == base
    assert found["av"].own == sum(4 * t.numel() for t in factors.values())
    shared = estimate("shared", list(found.values()), Workload(batch_size=1))
    resident = estimate("resident", list(found.values()), Workload(batch_size=1))
    assert shared is not None and resident is not None
    assert shared.weights == base + (found["av"].own or 0) + (found["ar"].own or 0) < resident.weights


def test_only_loras_can_share(family: Case) -> None:
    modes = {one.mode for one in estimates(list(sizes_of(family.pair.root).values()), Workload())}
    assert modes == {"resident", "staged"}


@pytest.mark.parametrize(
    ("dtype", "expected"), [("F64", 64), ("BF16", 16), ("F8_E4M3", 8), ("F8_E8M0", 8), ("I64", 64), ("BOOL", 8)]
)
def test_bits(dtype: str, expected: int) -> None:
    assert bits(dtype) == expected


def test_packed_weights_are_smaller_and_only_in_the_blocks(llama: Case) -> None:
    plain = sizes_of(llama.pair.root, LoadOptions(dtype="bfloat16"))["av"]
    nf4 = sizes_of(llama.pair.root, LoadOptions(dtype="bfloat16", quantization_config={"load_in_4bit": True}))["av"]
    int8 = sizes_of(llama.pair.root, LoadOptions(dtype="bfloat16", quantization_config={"load_in_8bit": True}))["av"]
    model = llama.nla.av.engine.av.loaded.model  # type: ignore[attr-defined]
    linear = sum(p.numel() for n, p in model.named_parameters() if ".layers." in n and p.ndim == 2)
    rows = sum(p.shape[0] for n, p in model.named_parameters() if ".layers." in n and p.ndim == 2)
    assert plain.loaded - nf4.loaded == 2 * linear - (linear // 2 + 4 * linear // 64)
    assert plain.loaded - int8.loaded == 2 * linear - (linear + 4 * rows)


def test_kinds_of_quantization_are_told_apart() -> None:
    from transformers import BitsAndBytesConfig

    assert quantization_of(None) is None
    assert quantization_of({"quant_method": "fp8"}) is None
    assert quantization_of({"load_in_4bit": True}) == "nf4"
    assert quantization_of(BitsAndBytesConfig(load_in_4bit=True)) == "nf4"
    assert quantization_of(BitsAndBytesConfig(load_in_8bit=True)) == "int8"


# -- bytes while it works ------------------------------------------------------------------------------------


def test_the_cache_is_as_large_as_the_engines(architecture: Case) -> None:
    """Also beyond the sliding windows of 32 tokens."""
    engine = architecture.nla.av.engine
    model = engine.av.loaded.model  # type: ignore[attr-defined]
    with torch.inference_mode():
        _, cache = engine._prompt_pass(torch.randn(3, architecture.nla.d_model), 40, None)  # type: ignore[attr-defined]
        prompt = len(engine.av.prompt)  # type: ignore[attr-defined]
        for _ in range(40):
            model(input_ids=torch.zeros(3, 1, dtype=torch.long), past_key_values=cache, use_cache=True)
    held = sum(t.numel() * t.element_size() for layer in cache.layers for t in (layer.keys, layer.values))
    assert cache_bytes(Architecture.of(model.config), 3, prompt + 40, 4) == held


def part(name: str, loaded: int, transient: int = 0) -> PartSize:
    shape = Architecture(64, 128, 2, 1, 32, 400, (None,) * 3)
    return PartSize(name, loaded, loaded, transient, shape, 4)  # type: ignore[arg-type]


WORK = st.builds(
    Workload,
    batch_size=st.integers(1, 64),
    prompt=st.integers(1, 300),
    max_new_tokens=st.integers(1, 300),
    text=st.integers(1, 4000),
    sampled=st.booleans(),
)


@given(work=WORK, bytes_=st.lists(st.integers(0, 10**10), min_size=3, max_size=3), transient=st.integers(0, 10**9))
def test_staged_never_needs_more_than_resident(work: Workload, bytes_: list[int], transient: int) -> None:
    parts = [part(name, n, transient) for name, n in zip(("av", "ar", "source"), bytes_, strict=True)]
    resident, staged = estimate("resident", parts, work), estimate("staged", parts, work)
    assert resident is not None and staged is not None
    assert max(bytes_) + RUNTIME < staged.peak <= resident.peak
    assert resident.peak - RUNTIME >= sum(bytes_) + max(working_bytes(p, work) for p in parts)


@given(work=WORK)
def test_more_work_needs_more(work: Workload) -> None:
    for name in ("av", "ar", "source"):
        size = part(name, 0)
        rows = dataclasses.replace(work, batch_size=work.batch_size + 1)
        longer = dataclasses.replace(work, text=work.text + 1, max_new_tokens=work.max_new_tokens + 1)
        assert working_bytes(size, rows) >= working_bytes(size, work)  # passes of AR and source are bounded
        assert working_bytes(size, longer) >= working_bytes(size, work)
    alone = dataclasses.replace(work, batch_size=1, text=5 * PASS_TOKENS, max_new_tokens=5 * PASS_TOKENS)
    for name in ("ar", "source"):
        assert working_bytes(part(name, 0), alone) > working_bytes(part(name, 0), work)
    many = dataclasses.replace(work, batch_size=work.batch_size + 1)
    assert working_bytes(part("av", 0), many) > working_bytes(part("av", 0), work)


def test_what_all_rows_share_is_counted_once() -> None:
    size = part("av", 0)
    apart, shared = Workload(48, 100, 150), Workload(48, 100, 150, shared=90)
    assert working_bytes(size, shared) < 0.5 * working_bytes(size, apart)
    windowed = PartSize("av", 0, 0, 0, dataclasses.replace(size.architecture, windows=(None, 200, None)), 4)
    assert working_bytes(windowed, shared) == working_bytes(windowed, apart)


@pytest.mark.parametrize(("share", "mode"), [(1.001, "resident"), (0.999, "staged")])
def test_auto_is_resident_where_it_fits(share: float, mode: str) -> None:
    parts, work = [part("av", 10**9), part("ar", 10**9)], Workload()
    whole = estimate("resident", parts, work)
    assert whole is not None
    assert choose(parts, work, int(share * whole.peak / MARGIN)) == mode
    assert choose(parts, work, None) == "resident"


def test_the_mode_of_an_opened_pair(llama: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    pair = open_pair(resolve_pair(llama.pair.root))
    assert choose_mode(pair, LoadOptions()) == "resident"
    monkeypatch.setattr("nla_hub.sizing.free_memory", lambda device: RUNTIME)
    assert choose_mode(pair, LoadOptions()) == "staged"
    assert workload_of(pair).prompt == len(llama.nla.av.engine.av.prompt)  # type: ignore[attr-defined]


# -- what is free --------------------------------------------------------------------------------------------


def test_free_memory_is_what_the_system_says() -> None:
    free = free_memory("cpu")
    assert free is not None and 0 < free <= torch.iinfo(torch.int64).max
    assert _mem_available(Path("/no/such/file")) is None
    assert free_memory("meta") is None


def test_the_tightest_control_group_counts(tmp_path: Path) -> None:
    inner = tmp_path / "job" / "step"
    inner.mkdir(parents=True)
    (inner / "memory.max").write_text("max\n")
    (inner.parent / "memory.max").write_text("1000\n")
    (inner.parent / "memory.current").write_text("700\n")
    (inner.parent / "memory.stat").write_text("active_file 5\ninactive_file 100\n")
    assert _cgroup_left(tmp_path, ["0::/job/step"]) == 400
    assert _cgroup_left(tmp_path, ["0::/other"]) is None
    assert _cgroup_left(tmp_path, ["nonsense", ""]) is None


def test_version_one_control_groups_and_no_limit(tmp_path: Path) -> None:
    base = tmp_path / "memory"
    (base / "job").mkdir(parents=True)
    for place, limit in ((base, 2**63 - 4096), (base / "job", 5000)):
        (place / "memory.limit_in_bytes").write_text(str(limit))
        (place / "memory.usage_in_bytes").write_text("6000")
    assert _cgroup_left(tmp_path, ["4:cpu,memory:/job", "0::/"]) == 0
    assert _cgroup_left(tmp_path, ["4:memory:/"]) is None


# -- loading -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("stored", "loaded"), [("bfloat16", "float32"), ("float32", "bfloat16")])
def test_tensors_one_by_one_load_as_files_do(family: Case, tmp_path: Path, stored: str, loaded: str) -> None:
    """transformers' own way, file by file, is the reference: same weights, same settings, bit for bit."""
    import shutil

    from transformers import AutoModelForCausalLM

    copy = tmp_path / "av"
    shutil.copytree(family.pair.av, copy)
    file = copy / "model.safetensors"
    save_file({k: v.to(getattr(torch, stored)) for k, v in load_file(file).items()}, file, metadata={"format": "pt"})
    (copy / "generation_config.json").write_text('{"eos_token_id": [2, 5], "_from_model_config": false}')
    found = load_causal_lm(copy, LoadOptions(dtype=loaded)).model
    reference = AutoModelForCausalLM.from_pretrained(copy, dtype=getattr(torch, loaded))
    mine, other = found.state_dict(), reference.state_dict()
    assert mine.keys() == other.keys()
    assert all(torch.equal(mine[k], other[k]) and mine[k].dtype == other[k].dtype for k in mine)
    assert found.generation_config.eos_token_id == reference.generation_config.eos_token_id == [2, 5]
    assert (found.get_output_embeddings().weight is found.get_input_embeddings().weight) == (
        reference.get_output_embeddings().weight is reference.get_input_embeddings().weight
    )


def test_blocks_above_the_site_are_never_read(family: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []

    class Watched(weights.StoredSlice):
        def __getitem__(self, key: object) -> torch.Tensor:
            read.append(self.name)
            return super().__getitem__(key)

    monkeypatch.setattr(pretrained, "StoredSlice", Watched)
    load_trunk(family.pair.source, family.pair.site, LoadOptions(dtype="bfloat16"))
    adapter = family.nla.capture_source.loaded.adapter
    kept = [n for n in read if weights.matches(n, [f"blocks>{adapter.blocks}>-1"])]
    assert kept, "the blocks below were read"
    above = [f"blocks>{adapter.blocks}>{family.pair.site.layer}", *adapter.lm_head_weights, *adapter.ignored_weights]
    assert [n for n in read if weights.matches(n, above)] == []


def test_loading_the_av_never_opens_the_ar(copied: Any) -> None:
    for file in copied.ar.glob("*.safetensors"):
        file.write_bytes(b"\xff" * 64)
    nla = NLA.from_pretrained(copied.root, components=("av",))
    assert nla.verbalize(torch.randn(nla.d_model), max_new_tokens=2).raw is not None
    with pytest.raises(WeightsError):  # and what it would have said
        NLA.from_pretrained(copied.root, components=("ar",))


def test_the_packaged_pair_is_loaded_lazily() -> None:
    nla = NLA.from_pretrained("tiny", memory="staged")
    assert nla._parts.loaded == ()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.float8_e4m3fn])
@pytest.mark.parametrize("at", [0, 1, -1])
def test_one_value_that_is_not_finite_is_seen(dtype: torch.dtype, at: int) -> None:
    value = torch.ones(3, 5)
    assert is_finite(value.to(dtype))
    kinds = [float("nan")] if dtype == torch.float8_e4m3fn else [float("nan"), float("inf"), -float("inf")]
    for broken in kinds:
        one = value.clone()
        one.view(-1)[at] = broken
        assert not is_finite(one.to(dtype))


def test_what_has_no_values_is_finite() -> None:
    assert is_finite(torch.empty(0, 4))
    assert is_finite(torch.ones(2, dtype=torch.int8))
    assert is_finite(torch.empty(3, device="meta"))


def test_a_slice_reads_as_safetensors_does(llama: Case) -> None:
    stored = weights.WeightIndex.read(llama.pair.av).tensors
    name = next(n for n in stored if n.endswith("down_proj.weight"))
    mine = weights.StoredSlice(name, stored[name])
    with safe_open(stored[name].file, framework="pt") as file:
        theirs = file.get_slice(name)
        assert mine.get_shape() == theirs.get_shape() and mine.get_dtype() == theirs.get_dtype()
        assert torch.equal(mine[...], theirs[...]) and torch.equal(mine[3:7], theirs[3:7])


# -- measured ------------------------------------------------------------------------------------------------


def test_the_measurement_and_the_estimate_agree_on_what_a_pair_is(lora_pair: Path) -> None:
    """A cheap look at the machinery of the slow bars: at this size the process itself is what is measured."""
    measured = peaks.measure(lora_pair, "shared", peaks.Work(rows=2, max_new_tokens=3, words=8))
    assert 0 < measured["rss"] <= measured["peak"] < 4 * RUNTIME
    assert RUNTIME < peaks.estimated(lora_pair, "shared", peaks.Work(rows=2, max_new_tokens=3, words=8)) < 2 * RUNTIME


@pytest.mark.slow
@pytest.mark.parametrize(("stored", "loaded", "shard"), peaks.LOADS)
def test_loading_needs_little_more_than_the_weights(tmp_path: Path, stored: str, loaded: str, shard: str) -> None:
    """Parts and pairs of >= 500 MB in the dtype they are loaded in, within 1.2 times their bytes."""
    for what, size, peak in peaks.loading(tmp_path, stored, loaded, shard):
        assert size >= 500e6, what
        assert peak <= 1.2 * size, (what, peak / size)


@pytest.mark.slow
@pytest.mark.parametrize("size", peaks.SIZES, ids=lambda size: size.name)
def test_the_estimate_is_within_15_percent_of_the_peak(size: peaks.Size) -> None:
    rows = list(peaks.table((size,)))
    assert {row.mode for row in rows} == {"resident", "staged", "shared"}
    assert all(row.peak >= 500e6 for row in rows)
    assert {(r.stored, r.mode): round(r.ratio, 3) for r in rows if not 0.85 <= r.ratio <= 1.15} == {}


# -- training ------------------------------------------------------------------------------------------------


def test_a_plan_counts_the_weights_that_are_trained() -> None:
    from nla_hub.training.planning.memory import Sizes, base_config, plan
    from nla_hub.training.recipe import load_recipe

    nla = NLA.from_pretrained("tiny")
    av, ar = nla.av.engine.av.loaded.model, nla.ar.model  # type: ignore[attr-defined]
    recipe = load_recipe("tiny", ["rl.watch_ar=false", "rl.beta=0"])
    sizes = Sizes.of(recipe, base_config(recipe, vocabulary=av.config.vocab_size))
    stages = {stage.name: stage.roles for stage in plan(recipe, sizes)}
    assert list(stages) == ["source", "data", "ar", "av", "rl", "export", "eval"]
    assert stages["data"]["source"] == module_bytes(nla.capture_source.loaded.model)
    assert stages["av"]["av"] == stages["av"]["gradients"] == module_bytes(av)
    assert stages["ar"]["moments"] == 2 * module_bytes(ar)
    assert stages["rl"]["moments"] == 2 * (module_bytes(av) + module_bytes(ar))
    both = {stage.name: stage.roles for stage in plan(load_recipe("tiny"), sizes)}
    assert both["rl"]["watching_ar"] == module_bytes(ar) and both["rl"]["reference"] == module_bytes(av)
    shared = {stage.name: stage.roles for stage in plan(load_recipe("tiny", ["hardware.gpus=4"]), sizes)}
    assert shared["av"]["activations"] * 4 == stages["av"]["activations"]
    assert shared["av"]["av"] == stages["av"]["av"]


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")  # peft 0.21 with transformers 5.23
@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "v_proj"]])
def test_lora_values_are_what_peft_adds(targets: Any) -> None:
    peft = pytest.importorskip("peft")
    from transformers import LlamaConfig, LlamaForCausalLM

    from nla_hub.training.planning.memory import Sizes, lora_values
    from nla_hub.training.recipe import LoRASpec, load_recipe

    config = LlamaConfig(
        hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=2, vocab_size=300
    )
    spec = LoRASpec(r=4, alpha=8, targets=targets if isinstance(targets, str) else tuple(targets))
    with torch.device("meta"):
        model = peft.get_peft_model(
            LlamaForCausalLM(config), peft.LoraConfig(r=4, lora_alpha=8, target_modules=targets, task_type="CAUSAL_LM")
        )
    expected = sum(value.numel() for value in model.parameters() if value.requires_grad)
    assert lora_values(spec, Sizes.of(load_recipe("tiny"), config).linear) == expected


@pytest.mark.parametrize(("width", "factors"), [(4, False), (2, False), (2, True)])
@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_what_a_backward_pass_keeps(family: str, width: int, factors: bool) -> None:
    """Against the tensors that autograd really saves: within a quarter (docs/memory.md has measured peaks).

    In float32, under autocast, and with factors on a frozen base in bfloat16.
    """
    from nla_hub.training.planning.memory import Sizes, StageMemory
    from nla_hub.training.recipe import load_recipe

    if factors:
        pytest.importorskip("peft", reason="needs the train extra")
    config: dict[str, Any] = {"hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 3}
    config |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64, "vocab_size": 64}
    sizes_of_rest = ["base.train=null", "base.model=random/base", f"base.config={{model_type: {family}}}", "layer=1"]
    recipe = load_recipe("tiny", [*sizes_of_rest, *(f"base.config.{key}={value}" for key, value in config.items())])
    sizes = Sizes.of(recipe)
    spec = LoRASpec(r=4, alpha=8) if factors else None
    half = StageMemory(recipe, sizes).half("av", spec)
    causal = AutoModelForCausalLM.from_config(sizes.config)
    if spec is not None:
        from nla_hub.training.lora_training import add_factors

        causal = add_factors(causal.to(torch.bfloat16), spec, seed=0).get_base_model()
    model = causal.model
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    own |= {b.untyped_storage().data_ptr() for b in model.buffers()}
    weights = {p.numel() for p in model.parameters() if p.ndim == 2}
    saved: dict[int, int] = {}

    alive: list[torch.Tensor] = []  # so that no place in memory is given to two of them

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        alive.append(tensor)
        storage = tensor.untyped_storage()
        # Autocast's copies of weights are counted elsewhere.
        copied = width == 2 and tensor.ndim == 2 and tensor.numel() in weights
        if storage.data_ptr() not in own and not copied:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with (
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
        torch.autocast("cpu", torch.bfloat16, enabled=width == 2),
    ):
        hidden = model(input_ids=torch.zeros(2, 50, dtype=torch.long), use_cache=False).last_hidden_state
    assert hidden.requires_grad
    expected = 100 * half.per_token(width, checkpointing=False)
    assert 0.75 <= expected / sum(saved.values()) <= 1.25, expected / sum(saved.values())
