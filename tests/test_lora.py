"""LoRA adapters against peft's own layers: merged, laid over, stacked; damaged and foreign ones refused."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from parity import close
from safetensors.torch import load_file, save_file

from nla_hub.adapters import adapter_for
from nla_hub.errors import CheckpointError, WeightsError
from nla_hub.lora import read_lora
from nla_hub.lora_roles import Roles, merge
from nla_hub.lora_stages import relation
from nla_hub.testing import ARCHITECTURES, random_model

peft = pytest.importorskip("peft", reason="peft is the independent route")

pytestmark = [
    # peft 0.21 asks transformers 5.23 for names that it calls deprecated, and corrects itself on GPT-2's Conv1D.
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning"),
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False:UserWarning"),
]

IDS = torch.tensor([[3, 17, 29, 31, 8, 40]])


def adapted(base: Any, seed: int, **settings: Any) -> Any:
    """A random LoRA of peft over a copy of `base`."""
    torch.manual_seed(seed)
    config = peft.LoraConfig(
        **{"r": 4, "lora_alpha": 6, "init_lora_weights": False, "target_modules": "all-linear"} | settings
    )
    return peft.get_peft_model(copy.deepcopy(base), config).eval()


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


@pytest.fixture(scope="module")
def llama() -> Any:
    return random_model("llama", 60, seed=1)


@pytest.fixture
def saved(llama: Any, tmp_path: Path) -> Path:
    adapted(llama, 5).save_pretrained(tmp_path)
    return tmp_path


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("rslora", [False, True])
def test_merged_and_laid_over_as_peft_computes_it(architecture: str, rslora: bool, tmp_path: Path) -> None:
    base = random_model(architecture, 60, seed=1)
    model = adapted(base, 2, use_rslora=rslora)
    model.save_pretrained(tmp_path)
    expected = logits(model)
    adapter = adapter_for(base.config)
    lora = read_lora(tmp_path, adapter)
    assert float((expected - logits(base)).abs().max()) > 1e-2
    roles = Roles(base, adapter)
    before = logits(base)
    roles.add("av", [lora])
    with roles.playing("av"):
        close(logits(base), expected)
    assert torch.equal(logits(base), before)
    merge(base, adapter, [lora])
    close(logits(base), expected)


def test_ranks_and_strengths_by_pattern_are_those_of_peft(llama: Any, tmp_path: Path) -> None:
    patterns = {
        "rank_pattern": {"q_proj": 2, r"layers.[23].mlp.up_proj": 6},
        "alpha_pattern": {"v_proj": 11, r"model.layers.0.self_attn.q_proj": 3},
    }
    model = adapted(llama, 3, **patterns)
    model.save_pretrained(tmp_path)
    mine = copy.deepcopy(llama)
    merge(mine, adapter_for(mine.config), [read_lora(tmp_path, adapter_for(mine.config))])
    close(logits(mine), logits(model))


def test_a_stack_acts_together(llama: Any, tmp_path: Path) -> None:
    for name, seed in (("a", 4), ("b", 5)):
        adapted(llama, seed).save_pretrained(tmp_path / name)
    both = peft.PeftModel.from_pretrained(copy.deepcopy(llama), tmp_path / "a", adapter_name="a")
    both.load_adapter(tmp_path / "b", adapter_name="b")
    both.base_model.set_adapter(["a", "b"])
    expected = logits(both.eval())
    adapter = adapter_for(llama.config)
    loras = [read_lora(tmp_path / name, adapter) for name in "ab"]
    merged = copy.deepcopy(llama)
    merge(merged, adapter, loras)
    close(logits(merged), expected)
    base = copy.deepcopy(llama)
    roles = Roles(base, adapter)
    roles.add("both", loras)
    with roles.playing("both"):
        close(logits(base), expected)


def test_roles_come_back_after_an_exception_and_inside_each_other(llama: Any, saved: Path) -> None:
    base = copy.deepcopy(llama)
    adapter = adapter_for(base.config)
    lora = read_lora(saved, adapter)
    roles = Roles(base, adapter)
    plain = logits(base)
    roles.add("av", [lora])
    roles.add("ar", [lora, lora])
    with roles.playing("av"):
        av = logits(base)
        with roles.playing("ar"):
            assert not torch.equal(logits(base), av)
        assert torch.equal(logits(base), av)
    with pytest.raises(ZeroDivisionError), roles.playing("av"):
        raise ZeroDivisionError
    assert torch.equal(logits(base), plain)


def test_a_merge_into_bfloat16_rounds_once(llama: Any, saved: Path) -> None:
    base = copy.deepcopy(llama).to(torch.bfloat16)
    adapter = adapter_for(base.config)
    lora = read_lora(saved, adapter)
    one = next(f for f in lora.factors if f.module == "layers.1.mlp.up_proj")
    before = base.model.layers[1].mlp.up_proj.weight.clone()
    expected = (before.double() + one.scale * (one.b.double() @ one.a.double())).to(torch.float32).to(torch.bfloat16)
    merge(base, adapter, [lora])
    after = base.model.layers[1].mlp.up_proj.weight
    differing = float((after != expected).float().mean())
    assert differing < 1e-3  # a float32 sum may round to the other side where the exact one is half-way
    assert not torch.equal(after, before)


# -- what is refused -----------------------------------------------------------------------------------------


def edit(directory: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    path = directory / "adapter_model.safetensors"
    state = load_file(path)
    change(state)
    save_file(state, path, metadata={"format": "pt"})


def configure(directory: Path, **changes: Any) -> None:
    path = directory / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | changes), encoding="utf-8")


def first(state: dict[str, torch.Tensor], side: str) -> str:
    return next(name for name in state if f"lora_{side}" in name)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda s: s.pop(first(s, "B")), "missing: "),
        (lambda s: s[first(s, "A")].fill_(float("nan")), "NaN or infinite"),
        (lambda s: s[first(s, "B")].view(-1)[:1].fill_(float("inf")), "NaN or infinite"),
        (lambda s: s.update({"base_model.model.lm_head.lora_A.weight": torch.ones(4, 64)}), "unexpected: base_model"),
        (lambda s: s.update({"base_model.model.model.embed_tokens.lora_embedding_A": torch.ones(4, 60)}), "unexpected"),
        (lambda s: s.update({first(s, "A"): torch.ones(3, 64)}), "ranks differ"),
        (lambda s: s.clear(), "no LoRA factors"),
    ],
)
def test_weights_that_are_no_complete_lora_are_refused(saved: Path, llama: Any, change: Any, words: str) -> None:
    edit(saved, change)
    with pytest.raises(WeightsError) as caught:
        read_lora(saved, adapter_for(llama.config))
    assert words in str(caught.value)


@pytest.mark.parametrize(
    "changes",
    [
        {"peft_type": "IA3"},
        {"use_dora": True},
        {"modules_to_save": ["lm_head"]},
        {"bias": "all"},
        {"trainable_token_indices": [1]},
        {"layer_replication": [[0, 2]]},
        {"lora_alpha": None},
        {"r": 0},
    ],
)
def test_configurations_that_are_no_plain_lora_are_refused(saved: Path, llama: Any, changes: dict[str, Any]) -> None:
    configure(saved, **changes)
    with pytest.raises(CheckpointError, match=str(next(iter(changes)))):
        read_lora(saved, adapter_for(llama.config))


def test_a_rank_that_is_not_the_configured_one_is_refused(saved: Path, llama: Any) -> None:
    configure(saved, r=8)
    with pytest.raises(WeightsError, match=r"have rank 4, adapter_config\.json says 8"):
        read_lora(saved, adapter_for(llama.config))


def test_pickled_adapters_are_never_opened(saved: Path, llama: Any) -> None:
    (saved / "adapter_model.safetensors").unlink()
    (saved / "adapter_model.bin").write_bytes(b"cos\nsystem\n(S'touch executed'\ntR.")
    with pytest.raises(WeightsError, match=r"pickled weights only.*adapter_model\.bin"):
        read_lora(saved, adapter_for(llama.config))


def test_weights_behind_a_link_to_elsewhere_are_refused(saved: Path, llama: Any, tmp_path_factory: Any) -> None:
    outside = tmp_path_factory.mktemp("outside") / "adapter_model.safetensors"
    (saved / "adapter_model.safetensors").rename(outside)
    (saved / "adapter_model.safetensors").symlink_to(outside)
    with pytest.raises(WeightsError, match="leads outside"):
        read_lora(saved, adapter_for(llama.config))


def test_an_adapter_of_another_base_is_refused_with_all_differences(saved: Path) -> None:
    narrow = random_model("llama", 60, layers=2)
    adapter = adapter_for(narrow.config)
    with pytest.raises(WeightsError, match="was not made for this base") as caught:
        merge(narrow, adapter, [read_lora(saved, adapter)])
    assert any("the base has no layers.2." in fault for fault in caught.value.faults)
    other = random_model("qwen2", 60)
    other.model.layers[0].mlp.up_proj = torch.nn.Linear(64, 95)
    with pytest.raises(WeightsError, match=r"up_proj: the adapter is \[96, 64\], the base \[95, 64\]"):
        merge(other, adapter, [read_lora(saved, adapter)])


# -- stages --------------------------------------------------------------------------------------------------


def test_continued_and_fresh_adapters_are_told_apart(llama: Any, tmp_path: Path) -> None:
    adapter = adapter_for(llama.config)
    sft, fresh, narrow = adapted(llama, 6), adapted(llama, 7), adapted(llama, 8, r=2)
    for name, model in (("sft", sft), ("fresh", fresh), ("narrow", narrow)):
        model.save_pretrained(tmp_path / name)
    optimizer = torch.optim.AdamW([p for n, p in sft.named_parameters() if "lora_" in n], lr=1e-3)
    for _ in range(20):
        loss = sft(input_ids=IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    sft.save_pretrained(tmp_path / "rl")
    loras = {name: read_lora(tmp_path / name, adapter) for name in ("sft", "fresh", "narrow", "rl")}
    assert relation(loras["sft"], loras["rl"])[0] == "continues"
    assert relation(loras["sft"], loras["fresh"])[0] == "fresh"
    assert relation(loras["sft"], loras["narrow"]) == ("fresh", None)
