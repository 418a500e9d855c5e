"""What is exported is what is loaded, and nothing broken is ever written."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Case, Spec
from parity import close, trunk_names
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from nla_hub import NLA
from nla_hub.errors import WeightsError
from nla_hub.export import save_ar, save_av, save_source
from nla_hub.pretrained import LoadOptions, load_causal_lm
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


@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt_neox"])
def test_a_head_of_its_own_is_written_whatever_the_config_says(
    name: str, make_case: Callable[[Spec], Case], tmp_path: Path
) -> None:
    case = make_case(Spec(name))
    directory = tmp_path / "odd"
    shutil.copytree(case.pair.source, directory)
    model = AutoModelForCausalLM.from_pretrained(directory).eval()
    state = model.state_dict()
    apart = state["lm_head.weight"] + torch.randn_like(state["lm_head.weight"])
    stored = {"gpt_neox": "embed_out.weight"}.get(name, "lm_head.weight")
    file = directory / "model.safetensors"
    save_file({**load_file(file), stored: apart}, file, metadata={"format": "pt"})
    config = json.loads((directory / "config.json").read_text()) | {"tie_word_embeddings": True}
    (directory / "config.json").write_text(json.dumps(config))
    loaded = load_causal_lm(directory, LoadOptions()).model
    save_source(tmp_path / "out", loaded, case.av.tokenizer, dtype=torch.float32)
    assert torch.equal(load_file(tmp_path / "out" / "model.safetensors")[stored], apart)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is False
    assert loaded.config.tie_word_embeddings is True  # the model's own is left alone
    ids = torch.tensor([case.source.ids("the cat sees")])
    with torch.no_grad():
        expected = model(ids, output_hidden_states=True).hidden_states[-1] @ apart.T
        close(AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()(ids).logits, expected)
    streamed = load_causal_lm(tmp_path / "out", LoadOptions(dtype=torch.bfloat16, device_map={"": "cpu"})).model
    assert torch.equal(streamed.get_output_embeddings().weight, apart.bfloat16())


def test_a_copy_of_the_embedding_is_still_the_embedding(llama: Case, tmp_path: Path) -> None:
    config = LlamaConfig(**(llama.source.model.config.to_dict() | {"tie_word_embeddings": True}))
    model = LlamaForCausalLM(config).eval()
    model.lm_head.weight = torch.nn.Parameter(model.model.embed_tokens.weight.detach().clone())
    save_source(tmp_path, model, llama.av.tokenizer, dtype=torch.bfloat16)
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")
    assert json.loads((tmp_path / "config.json").read_text())["tie_word_embeddings"] is True


def test_every_written_file_has_the_permissions_of_an_ordinary_one(llama: Case, tmp_path: Path) -> None:
    before = os.umask(0o026)
    try:
        write(llama, tmp_path / "out", torch.float32)
        save_source(tmp_path / "out" / "source", llama.source.model, llama.av.tokenizer, dtype=torch.float32)
    finally:
        os.umask(before)
    files = [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
    assert len({path.name for path in files}) >= 6
    assert {path.name: path.stat().st_mode & 0o777 for path in files} == {path.name: 0o640 for path in files}
