"""Every family of the registry: where its parts are, what is special about it, what its checkpoints may hold.

The parity tests of injection, capture, the AR, steering, generation and export run over the same families, each in its own
file; here is what they do not see.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import CROSSED, Case, Spec
from parity import TEXTS, check_generation, check_logits, close
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from nla_hub import NLA, adapters, registry
from nla_hub.adapters import Adapter, adapter_for
from nla_hub.capture import block_outputs, run_trunk
from nla_hub.errors import CheckpointError, ContextLengthError, UnknownNameError, WeightsError
from nla_hub.pretrained import LoadOptions, load_causal_lm, load_trunk
from nla_hub.sidecar import Site
from nla_hub.source_text import context_length
from nla_hub.testing import ARCHITECTURES, D_MODEL, LAYER, LAYERS, NO_THINKING, random_gemma3_wrapper, random_model
from nla_hub.weights import matches

VOCABULARY = 430
IDS = torch.randint(3, VOCABULARY, (2, 48), generator=torch.Generator().manual_seed(0))
"""Longer than every sliding window here."""


@pytest.fixture(scope="module")
def model_of() -> Callable[[str], Any]:
    """A random causal LM of a family (or the wrapper), one for the whole file: leave it as it is."""
    built: dict[str, Any] = {}

    def model(name: str) -> Any:
        if name not in built:
            make = random_gemma3_wrapper if name == "wrapper" else lambda vocabulary: random_model(name, vocabulary)
            built[name] = make(VOCABULARY)
        return built[name]

    return model


def in_peft(model: Any) -> Any:
    """The model with a LoRA on its first block's projections (its weights wrapped in place)."""
    from peft import LoraConfig, get_peft_model

    return get_peft_model(model, LoraConfig(r=2, target_modules="all-linear"))


# -- the registry --------------------------------------------------------------------------------------------


def test_every_adapter_of_ours_is_registered_and_has_a_random_model() -> None:
    ours = {value.name for value in vars(adapters).values() if isinstance(value, Adapter)}
    assert ours == set(ARCHITECTURES)
    assert ours <= set(registry.adapters.names())
    for name in ARCHITECTURES:
        assert registry.adapters.get(name).name == name


def test_no_two_families_read_the_same_model_type() -> None:
    claimed = [
        t for name in ARCHITECTURES for a in [registry.adapters.get(name)] for t in a.model_types + a.wrapper_types
    ]
    assert len(claimed) == len(set(claimed))


def test_a_family_that_nobody_reads_is_named_with_those_that_are() -> None:
    class Config:
        model_type = "gpt3"

    with pytest.raises(UnknownNameError, match="did you mean 'gpt2'"):
        adapter_for(Config())


def test_what_runs_models_knows_no_family() -> None:
    """Whatever differs between families is asked of the adapter."""
    package = Path(adapters.__file__).parent
    words = {t for name in ARCHITECTURES for a in [registry.adapters.get(name)] for t in (name, *a.model_types)}
    words |= {"layers", "embed_tokens", "lm_head", "wte", "ln_f"}
    for module in ("steering", "capture", "injection", "reconstructor", "engines/transformers"):
        source = (package / f"{module}.py").read_text(encoding="utf-8")
        code = re.sub(r'"""(?:.|\n)*?"""|#.*', "", source)
        assert not [word for word in words if re.search(rf"\b{word}\b", code)], module


# -- where the parts are -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*ARCHITECTURES, "wrapper"])
def test_an_adapter_finds_what_transformers_itself_names(name: str, model_of: Callable[[str], Any]) -> None:
    model = model_of(name)
    adapter = adapter_for(model.config)
    assert adapter.name == ("gemma3" if name == "wrapper" else name)
    trunk = adapter.trunk(model)
    assert adapter.trunk(trunk) is trunk
    assert adapter.embedding_module(model) is model.get_input_embeddings()
    assert getattr(model, adapter.lm_head) is model.get_output_embeddings()
    assert len(adapter.block_list(model)) == LAYERS
    assert adapter.causal_prefix == f"{trunk.base_model_prefix}."
    with torch.no_grad():
        last: list[Tensor] = []
        handle = adapter.final_norm_module(model).register_forward_hook(lambda *a: last.append(a[2]))
        states = model(input_ids=IDS, output_hidden_states=True).hidden_states
        handle.remove()
    assert torch.equal(last[0], states[-1])


@pytest.mark.parametrize("name", [*ARCHITECTURES, "wrapper"])
def test_final_norm_and_lm_head_are_known_by_name_wherever_they_stand(
    name: str, model_of: Callable[[str], Any], tmp_path: Path
) -> None:
    model = model_of(name)
    adapter = adapter_for(model.config)
    norm, head = adapter.final_norm_module(model), model.get_output_embeddings()
    model.save_pretrained(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    inside = dict(model.state_dict(keep_vars=True))
    assert {n for n in inside if matches(n, adapter.final_norm_weights)} == {
        n for n, v in inside.items() if any(v is p for p in norm.parameters())
    }
    assert {n for n in inside if matches(n, adapter.lm_head_weights)} == {
        n for n in inside if n.startswith(f"{adapter.lm_head}.")
    }
    assert len([n for n in stored if matches(n, adapter.final_norm_weights)]) == len(list(norm.parameters()))
    tied = head.weight is model.get_input_embeddings().weight
    assert len([n for n in stored if matches(n, adapter.lm_head_weights)]) == (0 if tied else 1)
    trunk_names = adapter.trunk(model).state_dict()
    assert len([n for n in trunk_names if matches(n, adapter.final_norm_weights)]) == len(list(norm.parameters()))
    for other in ("vision_tower.encoder", f"{adapter.causal_prefix}{adapter.blocks}.0"):
        assert not matches(f"{other}.{adapter.final_norm}.weight", adapter.final_norm_weights)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_fresh_final_norm_is_told_from_a_trained_one(name: str) -> None:
    fresh = AutoModelForCausalLM.from_config(random_model(name, VOCABULARY, layers=1).config)
    adapter = adapter_for(fresh.config)
    for part, value in adapter.final_norm_module(fresh).state_dict().items():
        assert adapter.is_untrained_norm(f"x.{part}", value)
        assert not adapter.is_untrained_norm(f"x.{part}", value + 0.25)
        value[3] += 0.25
        assert not adapter.is_untrained_norm(f"x.{part}", value)


# -- cut -----------------------------------------------------------------------------------------------------


def hooked(adapter: Adapter, model: Any, site: Site) -> Tensor:
    """What the hook at K sees of the complete model."""
    with block_outputs(adapter, model, site) as seen, torch.no_grad():
        adapter.trunk(model)(input_ids=IDS, use_cache=False)
    return seen[0]


@contextmanager
def unchanged(adapter: Adapter, model: Any) -> Iterator[None]:
    """The model inside must be the same to the bit afterwards: modules, weights and logits."""

    def look() -> tuple[Any, ...]:
        with torch.no_grad():
            logits = model(input_ids=IDS).logits
        return dict(model.named_modules()), list(model.state_dict()), logits, model.config.to_dict()

    before = look()
    yield
    after = look()
    assert list(after[0]) == list(before[0])
    assert all(after[0][n] is m for n, m in before[0].items())
    assert after[1] == before[1]
    assert torch.equal(after[2], before[2])
    assert after[3] == before[3]


@pytest.mark.parametrize("cache", [False, True], ids=["uncached", "cached"])
@pytest.mark.parametrize("name", [*ARCHITECTURES, "wrapper"])
def test_a_cut_model_ends_where_the_hook_looks(name: str, cache: bool, model_of: Callable[[str], Any]) -> None:
    model = model_of(name)
    adapter = adapter_for(model.config)
    with unchanged(adapter, model):
        for site in map(Site, range(LAYERS)):
            expected = hooked(adapter, model, site)
            with block_outputs(adapter, model, Site(LAYERS - 1)) as above, adapter.cut(model, site) as trunk:
                assert adapter.trunk(model) is trunk
                with torch.no_grad():
                    found = trunk(input_ids=IDS, use_cache=cache).last_hidden_state
                assert len(adapter.block_list(model)) == site.n_blocks
            assert torch.equal(found, expected)
            assert len(above) == (site.layer == LAYERS - 1)


@pytest.mark.filterwarnings(
    "ignore:.*is_gradient_checkpointing:FutureWarning"
)  # peft asks transformers by its old name
@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False:UserWarning")  # GPT-2's Conv1D; peft corrects itself
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_cut_reaches_through_peft_and_from_the_trunk_itself(name: str) -> None:
    pytest.importorskip("peft", reason="peft wraps the model (extra lora)")
    site = Site(1)
    model = random_model(name, VOCABULARY)
    adapter = adapter_for(model.config)
    expected = hooked(adapter, model, site)
    trunk = adapter.trunk(model)
    with adapter.cut(trunk, site) as same, torch.no_grad():
        assert same is trunk
        assert torch.equal(trunk(input_ids=IDS).last_hidden_state, expected)
    wrapped = in_peft(model)
    with unchanged(adapter, wrapped), adapter.cut(wrapped, site) as inner:
        with torch.no_grad():
            close(inner(input_ids=IDS).last_hidden_state, expected)  # a fresh LoRA adds nothing
            head = wrapped.get_base_model().get_output_embeddings()
            cap = getattr(model.config, "final_logit_softcapping", None)
            logits = head(expected) if cap is None else cap * torch.tanh(head(expected) / cap)
            close(wrapped(input_ids=IDS).logits, logits)
        wrapped(input_ids=IDS).logits.sum().backward()
    trained = {n for n, p in wrapped.named_parameters() if p.grad is not None}
    wrapped.zero_grad(set_to_none=True)
    assert any(f".{adapter.blocks}.{site.layer}." in n for n in trained)
    assert not any(f".{adapter.blocks}.{site.layer + 1}." in n for n in trained)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_cut_is_undone_by_exceptions_and_closes_in_turn(name: str, model_of: Callable[[str], Any]) -> None:
    model = model_of(name)
    adapter = adapter_for(model.config)

    def fail() -> None:
        with adapter.cut(model, Site(0)):
            raise KeyboardInterrupt

    def beyond() -> None:
        with adapter.cut(model, Site(LAYERS)):
            pytest.fail("there is no such block")

    with unchanged(adapter, model):
        with pytest.raises(KeyboardInterrupt):
            fail()
        with pytest.raises(CheckpointError, match=f"no such layer.*K = {LAYERS}"):
            beyond()
        with adapter.cut(model, Site(2)):
            with adapter.cut(model, Site(0)) as trunk, torch.no_grad():
                low = trunk(input_ids=IDS).last_hidden_state
            assert len(adapter.block_list(model)) == 3
        close(low, hooked(adapter, model, Site(0)))


# -- truncation ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_list_with_an_entry_a_block_is_cut_with_the_blocks(name: str, model_of: Callable[[str], Any]) -> None:
    """Found by comparing configs of different depth, so that a list which a family gains is noticed."""
    adapter = registry.adapters.get(name)
    long, short = (random_model(name, VOCABULARY, layers=n).config for n in (7, 3))
    cut = adapter.truncate_config(long, Site(2))
    assert cut.to_dict() == short.to_dict()
    assert {key for key, value in short.to_dict().items() if isinstance(value, list) and len(value) == 3} <= set(
        adapter.per_layer_config
    )


# -- what is special about a family --------------------------------------------------------------------------

SPECIAL: list[tuple[str, str, Any]] = [
    ("gemma3", "sliding_window", 512),
    ("gemma3", "layer_types", ["full_attention"] * LAYERS),
    ("qwen3", "sliding_window", 512),
    ("qwen3", "layer_types", ["full_attention"] * LAYERS),
    ("mistral", "sliding_window", None),
    ("gemma2", "sliding_window", 512),
    ("gemma2", "attn_logit_softcapping", None),
    ("gemma2", "final_logit_softcapping", None),
    ("gpt_neox", "use_parallel_residual", False),
]


@pytest.mark.parametrize(("name", "setting", "plain"), SPECIAL)
def test_what_is_special_matters_in_the_random_models(
    name: str, setting: str, plain: Any, model_of: Callable[[str], Any]
) -> None:
    """A parity test over a model whose window is wider than the text would prove nothing about windows."""
    model = model_of(name)
    config = type(model.config)(**(model.config.to_dict() | {setting: plain}))
    other = type(model)._from_config(config, attn_implementation=model.config._attn_implementation).eval()
    other.load_state_dict(model.state_dict())
    with torch.no_grad():
        difference = (other(input_ids=IDS).logits - model(input_ids=IDS).logits)[:, -1].abs().max()
    assert float(difference) > 1e-3


def test_the_logits_of_a_gemma_2_av_are_capped(make_case: Callable[[Spec], Case], vectors: Tensor) -> None:
    case = make_case(Spec("gemma2"))
    cap = case.av.model.config.final_logit_softcapping
    seen: list[Tensor] = []
    engine = case.nla.av.engine
    handle = engine.model.get_output_embeddings().register_forward_hook(lambda *a: seen.append(a[2]))
    with torch.no_grad():
        logits, _ = engine._prompt_pass(vectors, 1, None)
    handle.remove()
    assert float(seen[0].abs().max()) > cap > float(logits.abs().max())
    close(logits, cap * torch.tanh(seen[0][:, -1] / cap))


def test_gemma_2_runs_where_its_attention_is_capped_and_nowhere_else(make_case: Callable[[Spec], Case]) -> None:
    pair = make_case(Spec("gemma2")).pair
    assert load_causal_lm(pair.av, LoadOptions()).model.config._attn_implementation == "eager"
    with pytest.raises(WeightsError, match=r"sdpa|scaled_dot_product"):
        load_causal_lm(pair.av, LoadOptions(attn_implementation="sdpa"))


def test_qwen_3_answers_without_thinking(make_case: Callable[[Spec], Case]) -> None:
    """Its template writes an empty thought where it is asked for an answer, and none into a text to explain."""
    case = make_case(Spec("qwen3"))
    assert case.nla.av.engine.av.prompt.text.endswith(f"<|assistant|>\n{NO_THINKING}")
    talk = [{"role": "user", "content": "the cat"}, {"role": "assistant", "content": "a house"}]
    assert "think" not in "".join(case.nla.capture(talk, positions="all").token)


def test_gpt_2_reads_as_many_tokens_as_it_has_positions(make_case: Callable[[Spec], Case], vectors: Tensor) -> None:
    case = make_case(Spec("gpt2"))
    model = case.nla.av.engine.model
    assert context_length(model.config) == model.transformer.wpe.num_embeddings == 512
    room = 512 - len(case.nla.av.engine.av.prompt)
    run = {"temperature": 1.0, "batch_size": 7}
    with pytest.raises(ContextLengthError, match=f"at most {room}"):
        case.nla.av.engine.generate(vectors, None, max_new_tokens=room + 1, **run)
    with pytest.raises(ContextLengthError, match="at most 512"):
        case.nla.capture("the cat sees a house " * 200)
    with pytest.raises(ContextLengthError, match="at most 512"):
        case.nla.reconstruct("the cat sees a house " * 200)


def test_an_overwritten_row_of_gpt_2_keeps_its_position(make_case: Callable[[Spec], Case], vectors: Tensor) -> None:
    """What enters block 0 at the marker is the rescaled vector plus the position's embedding."""
    engine = make_case(Spec("gpt2")).nla.av.engine
    seen: list[Tensor] = []
    handle = engine.model.transformer.h[0].register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        engine._prompt_pass(vectors, 1, None)
    handle.remove()
    at = engine.av.prompt.marker_position
    unit = vectors.double() / vectors.double().norm(dim=-1, keepdim=True)
    close(seen[0][:, at], (8 * unit + engine.model.transformer.wpe.weight[at].double()).float())


# -- injection of the other kind -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in ARCHITECTURES if name not in CROSSED])
def test_an_added_vector_acts_as_in_an_independent_forward(
    name: str, make_case: Callable[[Spec], Case], vectors: Tensor
) -> None:
    """The families that conftest crosses with everything have the same checks in test_injection.py and test_engine.py."""
    case = make_case(Spec(name, kind="add"))
    check_logits(case, vectors)
    check_generation(case, vectors)


# -- checkpoints as they lie on the Hub ----------------------------------------------------------------------


def rewritten(directory: Path, target: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> Path:
    """A copy of a checkpoint with other weights."""
    import shutil

    shutil.copytree(directory, target)
    save_file(change(load_file(directory / "model.safetensors")), target / "model.safetensors", {"format": "pt"})
    return target


def old_gpt2(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """As in openai-community/gpt2: no prefix, the causal mask a buffer of every block."""
    plain = {name.removeprefix("transformer."): value for name, value in state.items()}
    for i in range(LAYERS):
        plain[f"h.{i}.attn.bias"] = torch.ones(1, 1, 8, 8).tril()
        plain[f"h.{i}.attn.masked_bias"] = torch.tensor(-1e4)
    return plain


def old_neox(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """As in Pythia: mask and frequencies are buffers of every block, the lm_head is `embed_out`."""
    assert "embed_out.weight" in state
    more = dict(state)
    for i in range(LAYERS):
        more[f"gpt_neox.layers.{i}.attention.bias"] = torch.ones(1, 1, 8, 8).tril().bool()
        more[f"gpt_neox.layers.{i}.attention.masked_bias"] = torch.tensor(-1e9)
        more[f"gpt_neox.layers.{i}.attention.rotary_emb.inv_freq"] = torch.ones(4)
    return more


def old_rotary(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """As in the first conversions of Llama 2."""
    return state | {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.ones(16) for i in range(LAYERS)}


OLD = {"gpt2": old_gpt2, "gpt_neox": old_neox, "llama": old_rotary}


@pytest.mark.parametrize("name", OLD)
def test_checkpoints_in_the_layout_of_their_time_load(
    name: str, make_case: Callable[[Spec], Case], tmp_path: Path
) -> None:
    case = make_case(Spec(name))
    ids = case.source.ids(TEXTS[0])
    old = rewritten(case.pair.source, tmp_path / "source", OLD[name])
    with torch.no_grad():
        expected = case.source.model(torch.tensor([ids])).logits
        close(load_causal_lm(old, LoadOptions()).model(torch.tensor([ids])).logits, expected)
    trunk = load_trunk(old, Site(LAYER), LoadOptions())
    rows = [(ids, list(range(len(ids))))]
    found = run_trunk(trunk.adapter, trunk.model, Site(LAYER), rows, pad_id=0, batch_size=1)
    close(found, case.source.hidden(ids, LAYER + 1))


@pytest.mark.parametrize("name", [*ARCHITECTURES, "wrapper"])
def test_what_is_ignored_on_disk_is_listed_and_none_of_the_models_own(
    name: str, model_of: Callable[[str], Any]
) -> None:
    """transformers drops some of these by itself, but loading does not rest on that."""
    model = model_of(name)
    adapter = adapter_for(model.config)
    own = {name: value for name, value in model.named_parameters() if "vision_tower" not in name}
    own = {name: value for name, value in own.items() if "multi_modal_projector" not in name}
    assert not [weight for weight in own if matches(weight, adapter.ignored_weights)]
    if name in OLD:
        on_disk = {adapter.stored_name(weight): value for weight, value in model.state_dict().items()}
        old = OLD[name](on_disk)
        buffers = [weight for weight, value in old.items() if not any(value is known for known in on_disk.values())]
        assert len(buffers) >= LAYERS
        assert all(matches(weight, adapter.ignored_weights) for weight in buffers)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_weight_that_no_family_has_is_refused(name: str, make_case: Callable[[Spec], Case], tmp_path: Path) -> None:
    pair = make_case(Spec(name)).pair

    def strange(state: dict[str, Tensor]) -> dict[str, Tensor]:
        prefix = registry.adapters.get(name).causal_prefix
        return state | {f"{prefix}adapter_gate.weight": torch.ones(D_MODEL)}

    with pytest.raises(WeightsError, match=r"unexpected: .*adapter_gate\.weight"):
        load_causal_lm(rewritten(pair.av, tmp_path / "av", strange), LoadOptions())


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_an_export_is_named_as_transformers_names_it(
    name: str, make_case: Callable[[Spec], Case], tmp_path: Path
) -> None:
    """Other programs (vLLM, older transformers) read it by these names: `embed_out` of GPT-NeoX, say."""
    case = make_case(Spec(name))
    case.av.model.save_pretrained(tmp_path)
    theirs, mine = (load_file(p / "model.safetensors") for p in (tmp_path, case.pair.av))
    assert set(mine) == set(theirs)
    assert all(torch.equal(mine[n], theirs[n]) for n in mine)
    stored = set(load_file(case.pair.ar / "model.safetensors"))
    assert stored < set(theirs)


@pytest.mark.parametrize("name", ["gpt2", "gpt_neox", "gemma2"])
def test_a_final_norm_that_nobody_trained_is_dropped_from_an_ar(
    name: str, make_case: Callable[[Spec], Case], tmp_path: Path
) -> None:
    """Its bias counts too: a trained one alone means that the norm was trained."""
    import shutil

    case = make_case(Spec(name))
    adapter = registry.adapters.get(name)
    fresh = AutoModelForCausalLM.from_config(case.av.model.config)
    parts = adapter.final_norm_module(fresh).state_dict()
    names = {part: f"{adapter.causal_prefix}{adapter.final_norm}.{part}" for part in parts}
    for half in ("av", "source"):
        shutil.copytree(case.pair.root / half, tmp_path / half)
    rewritten(case.pair.ar, tmp_path / "ar", lambda s: s | {names[part]: v for part, v in parts.items()})
    nla = NLA.from_pretrained(tmp_path)
    assert isinstance(adapter.final_norm_module(nla.ar.model.trunk), nn.Identity)
    close(nla.reconstruct("the cat"), case.ar.vector("the cat"))
    for part in parts:
        shutil.rmtree(tmp_path / "ar")
        changed = parts | {part: parts[part] + 0.5}
        rewritten(case.pair.ar, tmp_path / "ar", lambda s, c=changed: s | {names[p]: v for p, v in c.items()})  # type: ignore[misc]
        with pytest.raises(WeightsError, match="final norm"):
            NLA.from_pretrained(tmp_path)
