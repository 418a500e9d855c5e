"""What is exported is what is loaded, and nothing broken is ever written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Case
from parity import close, trunk_names
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from nla_hub import NLA
from nla_hub.errors import WeightsError
from nla_hub.export import save_ar, save_av, save_source
from nla_hub.sidecar import Sidecar


def halves(case: Case) -> tuple[Any, Any, torch.nn.Linear]:
    """Fresh AV, AR trunk and head of a case."""
    nla = NLA.from_pretrained(case.pair.root)
    return nla.av.engine.av.loaded.model, nla.ar.model.trunk, nla.ar.model.head


def write(case: Case, place: Path, dtype: torch.dtype) -> None:
    av, trunk, head = halves(case)
    tokenizer = case.av.tokenizer
    save_av(place / "av", av, tokenizer, Sidecar.read(case.pair.av), dtype=dtype)
    save_ar(place / "ar", trunk, head, tokenizer, Sidecar.read(case.pair.ar), dtype=dtype)


def test_an_export_in_float32_is_byte_for_byte_what_was_loaded(architecture: Case, tmp_path: Path) -> None:
    write(architecture, tmp_path, torch.float32)
    for half in ("av", "ar"):
        for name in ("model.safetensors", "nla_meta.yaml"):
            assert (tmp_path / half / name).read_bytes() == (architecture.pair.root / half / name).read_bytes()
    mine, theirs = (load_file(p / "ar" / "value_head.safetensors") for p in (tmp_path, architecture.pair.root))
    assert torch.equal(mine["weight"], theirs["weight"])


def test_an_export_in_bfloat16_loads_and_keeps_its_head_in_float32(architecture: Case, tmp_path: Path) -> None:
    write(architecture, tmp_path, torch.bfloat16)
    assert {t.dtype for t in load_file(tmp_path / "av" / "model.safetensors").values()} == {torch.bfloat16}
    assert load_file(tmp_path / "ar" / "value_head.safetensors")["weight"].dtype == torch.float32
    vector = NLA.from_pretrained(tmp_path).reconstruct("the cat")
    assert float(torch.nn.functional.cosine_similarity(vector, architecture.ar.vector("the cat"), dim=0)) > 0.99


def test_an_exported_ar_has_neither_norm_nor_lm_head(architecture: Case) -> None:
    names = set(load_file(architecture.pair.ar / "model.safetensors"))
    prefix = f"{architecture.av.model.base_model_prefix}."
    _, norm = trunk_names(architecture.av.model.config)
    assert all(n.startswith(prefix) and not n.startswith(f"{prefix}{norm}.") for n in names)


def test_a_broken_weight_is_never_written(llama: Case, tmp_path: Path) -> None:
    av, trunk, head = halves(llama)
    sidecar = Sidecar.read(llama.pair.ar)
    av.model.layers[0].mlp.up_proj.weight.data[0, 0] = float("nan")
    with pytest.raises(WeightsError, match=r"1 weights hold NaN.*\n.*layers.0.mlp.up_proj.weight"):
        save_av(tmp_path / "av", av, llama.av.tokenizer, sidecar, dtype=torch.float32)
    head.weight.data[3, 3] = float("inf")
    with pytest.raises(WeightsError, match=r"value head: 1 weights hold NaN or infinite"):
        save_ar(tmp_path / "ar", trunk, head, llama.av.tokenizer, sidecar, dtype=torch.float32)
    assert list(tmp_path.rglob("*.*")) == []


def test_values_that_leave_the_dtype_are_never_written(llama: Case, tmp_path: Path) -> None:
    _, trunk, head = halves(llama)
    trunk.layers[1].mlp.up_proj.weight.data[0, 0] = 1e30
    with pytest.raises(WeightsError, match=r"layers.1.mlp.up_proj.weight does not fit into float16"):
        save_ar(tmp_path / "ar", trunk, head, llama.av.tokenizer, Sidecar.read(llama.pair.ar), dtype=torch.float16)
    assert list(tmp_path.rglob("*.safetensors")) == []


def test_a_model_with_tied_embeddings_comes_back_tied(llama: Case, tmp_path: Path) -> None:
    config = LlamaConfig(**(llama.source.model.config.to_dict() | {"tie_word_embeddings": True}))
    torch.manual_seed(0)
    tied = LlamaForCausalLM(config).eval()
    save_source(tmp_path, tied, llama.av.tokenizer, dtype=torch.float32)
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")
    nla = NLA.from_pretrained(llama.pair.root, base_model=tmp_path, components=("ar",))
    ids = torch.tensor([llama.source.ids("the cat sees")])
    with torch.no_grad():
        expected = tied(ids).logits
        close(nla.source.loaded.model(ids).logits, expected)
        close(AutoModelForCausalLM.from_pretrained(tmp_path).eval()(ids).logits, expected)
