"""Factors in every stage: what trains and what does not, what is written and read back, and what a whole run exports."""

from __future__ import annotations

import dataclasses
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from parity import ReferenceAV, close
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

pytest.importorskip("peft", reason="needs the train extra")
pytest.importorskip("trl", reason="needs the train extra")

import peft
import rl_world
from rl_world import make_trainer, random_rows, weights
from test_training import RL, Silent, small_recipe
from test_training_processes import environments
from test_training_resume import figures

from nla_hub.checkpoints import load_ar
from nla_hub.errors import TrainingError, WeightsError
from nla_hub.injection import Injector
from nla_hub.nla import NLA
from nla_hub.pretrained import LoadOptions, load_causal_lm, load_tokenizer, load_trunk
from nla_hub.prompts import ARPrompt, AVPrompt
from nla_hub.reconstructor import ARModel
from nla_hub.sidecar import Sidecar
from nla_hub.testing import RandomPair, random_pair
from nla_hub.training.ar_regression import train_ar
from nla_hub.training.av_sft import AVLoss, train_av
from nla_hub.training.grpo import RLTrainer
from nla_hub.training.halves import Halves
from nla_hub.training.loop import make_optimizer
from nla_hub.training.lora_training import factors, load_trained, trained_state
from nla_hub.training.pipeline import Pipeline
from nla_hub.training.recipe import BaseSpec, LoRASpec, Recipe, RewardSpec, StageSpec
from nla_hub.training.rl.live_ar import LiveAR
from nla_hub.training.run import RunDirectory, StageDirectory
from nla_hub.training.stages import stages_of
from nla_hub.training.state import TrainingState

pytestmark = [
    pytest.mark.train,
    # peft 0.21 asks transformers 5.23 for names that it calls deprecated; here where a test calls it itself.
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning"),
]

LORA = LoRASpec(r=4, alpha=8)
SPEC = StageSpec(documents=1, lr=1e-2, batch_size=4, weight_decay=0.1)
FAMILIES = ("qwen2", "llama", "gemma3")


class Killed(BaseException):
    """Stands for a signal that cannot be caught."""


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., RandomPair]:
    made: dict[tuple[str, str], RandomPair] = {}

    def get(architecture: str = "llama", kind: str = "overwrite") -> RandomPair:
        if (architecture, kind) not in made:
            root = tmp_path_factory.mktemp(f"{architecture}-{kind}")
            made[architecture, kind] = random_pair(root, architecture, kind=kind)
        return made[architecture, kind]

    return get


def on(pair: RandomPair, **changes: Any) -> Halves:
    """The halves of a recipe with factors on a random pair's source."""
    recipe = small_recipe(**{"lora": LORA, "base": BaseSpec("tiny-world"), **changes})
    return Halves(recipe, pair.source)


def logits(model: Any) -> Tensor:
    with torch.inference_mode():
        found: Tensor = model(input_ids=torch.tensor([[3, 17, 29, 31, 8, 40]])).logits
    return found


def vectors_of(model: ARModel) -> Tensor:
    ids = torch.tensor([[3, 17, 29, 31, 8, 40]])
    with torch.inference_mode():
        return model(ids, torch.ones_like(ids))


def learn_av(halves: Halves, pair: RandomPair, *, spec: StageSpec = SPEC, steps: int = 3, **options: Any) -> Any:
    """An AV after some steps on random rows."""
    sidecar, tokenizer = Sidecar.read(pair.av), load_tokenizer(pair.av)
    loaded = halves.load_av()
    assert sidecar.marker is not None
    train_av(
        loaded.model,
        tokenizer,
        AVPrompt.build(tokenizer, sidecar),
        Injector(loaded.adapter, sidecar.injection, sidecar.marker),
        random_rows(12),
        spec,
        seed=1,
        report=lambda _: None,
        max_steps=steps,
        **options,
    )
    return loaded.model


def learn_ar(halves: Halves, pair: RandomPair, *, spec: StageSpec = SPEC, steps: int = 3, **options: Any) -> ARModel:
    """An AR after some steps on random rows."""
    sidecar = Sidecar.read(pair.ar)
    model = halves.load_ar(sidecar)
    prompt = ARPrompt.build(load_tokenizer(pair.ar), sidecar)
    train_ar(model, prompt, random_rows(12), spec, seed=1, report=lambda _: None, max_steps=steps, **options)
    return model


def plain_name(name: str) -> str:
    """A base weight's name without what peft puts into it."""
    return name.replace(".base_layer", "").removeprefix("base_model.model.")


# -- what trains ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", FAMILIES)
def test_fresh_factors_change_nothing(pairs: Callable[..., RandomPair], architecture: str) -> None:
    pair = pairs(architecture)
    halves, sidecar = on(pair), Sidecar.read(pair.ar)
    assert torch.equal(logits(halves.load_av().model), logits(load_causal_lm(pair.source, LoadOptions()).model))
    trunk = load_trunk(pair.source, sidecar.site, LoadOptions()).model
    ids = torch.tensor([[3, 17, 29, 31, 8, 40]])
    with torch.inference_mode():
        expected = trunk(input_ids=ids).last_hidden_state[:, -1]
    assert torch.equal(vectors_of(halves.load_ar(sidecar)), expected)


@pytest.mark.parametrize("architecture", FAMILIES)
def test_factors_learn_and_the_base_stays_to_the_byte(pairs: Callable[..., RandomPair], architecture: str) -> None:
    pair = pairs(architecture)
    before = {n: p.clone() for n, p in load_causal_lm(pair.source, LoadOptions()).model.named_parameters()}
    av, ar = learn_av(on(pair), pair), learn_ar(on(pair), pair)
    frozen = {plain_name(n): p for n, p in av.named_parameters() if not p.requires_grad}
    assert frozen.keys() == before.keys()
    assert all(torch.equal(p, before[n]) for n, p in frozen.items())
    blocks = {n for n, p in ar.trunk.named_parameters() if not p.requires_grad}
    assert len(blocks) > 10
    for name, value in ar.trunk.named_parameters():
        if name in blocks:
            assert torch.equal(value, before[f"model.{plain_name(name)}"]), name
    for model in (av, ar):
        found = factors(model)
        assert len(found) >= 2 * 7 * 3
        assert all(bool(value.abs().sum() > 0) for value in found.values()), "every B left zero"
        trained = {id(p) for group in make_optimizer(model, SPEC).param_groups for p in group["params"]}
        head = [ar.head.weight] if model is ar else []
        assert trained == {id(p) for p in [*found.values(), *head]}
    assert not torch.equal(ar.head.weight, torch.eye(len(ar.head.weight)))


def test_factors_begin_as_the_seed_says_wherever_the_generator_stands(pairs: Callable[..., RandomPair]) -> None:
    pair = pairs()
    made = []
    for noise, seed in ((1, 5), (2, 5), (1, 6)):
        torch.manual_seed(noise)
        made.append(factors(on(pair, seed=seed).load_av().model))
        assert torch.equal(torch.rand(1), torch.rand(1, generator=torch.Generator().manual_seed(noise)))
    name = next(n for n in made[0] if "lora_A" in n)
    assert all(torch.equal(made[0][n], made[1][n]) for n in made[0])
    assert not torch.equal(made[0][name], made[2][name])
    assert all(bool((value == 0).all()) for n, value in made[0].items() if "lora_B" in n)


@pytest.mark.parametrize("kind", ["overwrite", "add"])
def test_gradient_checkpointing_gives_the_same_factors(pairs: Callable[..., RandomPair], kind: str) -> None:
    pair = pairs("llama", kind)
    found = []
    for checkpointing in (False, True):
        spec = dataclasses.replace(SPEC, gradient_checkpointing=checkpointing)
        halves = on(pair, av=spec, ar=spec)
        calls: list[int] = []
        with recounted(calls):
            found.append((factors(learn_av(halves, pair, spec=spec)), factors(learn_ar(halves, pair, spec=spec))))
        assert bool(calls) == checkpointing, "blocks are computed again"
    for plain, checkpointed in zip(*found, strict=True):
        for name, value in plain.items():
            assert bool(value.abs().sum() > 0)
            torch.testing.assert_close(checkpointed[name], value, atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize("lora", [None, LORA])
def test_the_ar_of_the_rl_stage_recomputes_its_blocks_too(
    pairs: Callable[..., RandomPair], lora: LoRASpec | None, tmp_path: Path
) -> None:
    pair = pairs("llama")
    sidecar = Sidecar.read(pair.ar)
    start = pair.ar
    if lora is not None:
        halves = on(pair, lora=lora)
        halves.write_ar(tmp_path, halves.load_ar(sidecar), load_tokenizer(pair.source), sidecar)
        start = tmp_path
    prompt = ARPrompt.build(load_tokenizer(pair.source), sidecar)
    texts, vectors = ["the cat sees a house", "a dog", "night and day and night"], random_rows(3).vectors
    found = []
    for checkpointing in (False, True):
        spec = dataclasses.replace(RL, gradient_checkpointing=checkpointing, micro_batch=2)
        calls: list[int] = []
        with recounted(calls):
            model = on(pair, lora=lora, rl=spec).load_ar(sidecar, start)
            live = LiveAR(model, prompt, spec, Accelerator())
            predicted = live.score(texts, vectors, total=3)
        assert bool(calls) == checkpointing
        assert not any(m.training for m in model.modules() if isinstance(m, nn.Dropout)), "what pays is what learns"
        found.append((predicted, [p.grad for p in live.trained]))
    torch.testing.assert_close(found[0][0], found[1][0], atol=1e-6, rtol=1e-5)
    assert any(bool(g.abs().sum() > 0) for g in found[0][1])
    for plain, again in zip(found[0][1], found[1][1], strict=True):
        torch.testing.assert_close(again, plain, atol=1e-6, rtol=1e-4)


def recounted(calls: list[int]) -> Any:
    """While open, `calls` gets an entry for every block that is run under checkpointing."""
    import torch.utils.checkpoint as checkpointing

    original = checkpointing.checkpoint

    def counting(*args: Any, **options: Any) -> Any:
        calls.append(1)
        return original(*args, **options)

    patched = pytest.MonkeyPatch()
    patched.setattr("transformers.modeling_utils.checkpoint", counting)

    class Context:
        def __enter__(self) -> None: ...
        def __exit__(self, *_: object) -> None:
            patched.undo()

    return Context()


def test_targets_that_no_module_has_are_refused(pairs: Callable[..., RandomPair]) -> None:
    with pytest.raises(TrainingError, match="cannot carry these factors"):
        on(pairs(), lora=LoRASpec(r=2, alpha=2, targets=("no_such_proj",))).load_av()
    chosen = on(pairs(), lora=LoRASpec(r=2, alpha=2, targets=("q_proj", "v_proj"))).load_av().model
    assert {name.split(".lora_")[0].rpartition(".")[2] for name in factors(chosen)} == {"q_proj", "v_proj"}


# -- checkpoints ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("half", ["av", "ar"])
def test_a_checkpoint_holds_what_is_trained_and_continues_to_the_same_bytes(
    pairs: Callable[..., RandomPair], half: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pair = pairs()
    learn = learn_av if half == "av" else learn_ar

    def run(place: str) -> Any:
        stage = StageDirectory(tmp_path / place)
        stage.begin(small_recipe())
        return learn(
            on(pair), pair, spec=dataclasses.replace(SPEC, epochs=4), steps=12, state=TrainingState(stage, half)
        )

    whole = run("whole")
    calls: list[int] = []
    once = AVLoss.__call__ if half == "av" else ARModel.forward

    def stopping(self: Any, *args: Any, **options: Any) -> Any:
        calls.append(1)
        if len(calls) == 8:
            raise Killed
        return once(self, *args, **options)

    with monkeypatch.context() as patched:
        patched.setattr(AVLoss if half == "av" else ARModel, "__call__" if half == "av" else "forward", stopping)
        with pytest.raises(Killed):
            run("cut")
    kept = sorted((tmp_path / "cut" / "state").glob("*.pt"))
    assert [p.name for p in kept] == [f"{half}-00000005.pt"]
    content = torch.load(kept[0], weights_only=True)
    names = set(content["model"])
    assert names == set(trained_state(whole))
    assert all("lora_" in name or name == "head.weight" for name in names)
    assert ("head.weight" in names) == (half == "ar")
    continued = run("cut")
    assert all(torch.equal(value, factors(whole)[name]) for name, value in factors(continued).items())


def test_a_checkpoint_of_another_model_is_refused(pairs: Callable[..., RandomPair]) -> None:
    model = on(pairs()).load_av().model
    state = dict(trained_state(model))
    load_trained(model, state)
    state.pop(next(iter(state)))
    with pytest.raises(TrainingError, match="other weights"):
        load_trained(model, state)
    plain = nn.Linear(2, 2)
    assert trained_state(plain).keys() == plain.state_dict().keys()


def test_the_live_ar_trains_and_keeps_its_factors_and_head_alone(pairs: Callable[..., RandomPair]) -> None:
    from accelerate import Accelerator

    pair = pairs()
    sidecar = Sidecar.read(pair.ar)
    prompt = ARPrompt.build(load_tokenizer(pair.ar), sidecar)
    live = LiveAR(on(pair).load_ar(sidecar), prompt, rl_world.SPEC, Accelerator())
    before = {n: p.clone() for n, p in live.model.named_parameters()}
    rows = random_rows(6)
    live.score(rows.texts, rows.vectors, total=6)
    assert live.update(1e-3).change > 0  # type: ignore[operator]
    changed = {n for n, p in live.model.named_parameters() if not torch.equal(p, before[n])}
    assert changed == {n for n in before if "lora_B" in n or n == "head.weight"}, "A has no gradient while B is zero"
    other = LiveAR(on(pair, seed=9).load_ar(sidecar), prompt, rl_world.SPEC, Accelerator())
    other.load_state_dict(live.state_dict())
    assert torch.equal(weights(other.model), weights(live.model))


# -- on disk -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", FAMILIES)
def test_what_a_stage_writes_is_read_by_the_loader_and_by_the_next_stage(
    pairs: Callable[..., RandomPair], architecture: str, tmp_path: Path
) -> None:
    pair = pairs(architecture)
    halves = on(pair)
    tokenizer = load_tokenizer(pair.av)
    av, ar = learn_av(halves, pair), learn_ar(halves, pair)
    for name in ("av", "ar"):
        (tmp_path / name).mkdir()
    halves.write_av(tmp_path / "av", av, tokenizer, Sidecar.read(pair.av))
    halves.write_ar(tmp_path / "ar", ar, tokenizer, Sidecar.read(pair.ar))
    assert sorted(p.name for p in (tmp_path / "av").glob("*.safetensors")) == ["adapter_model.safetensors"]
    sizes = [(tmp_path / half / "adapter_model.safetensors").stat().st_size for half in ("av", "ar")]
    assert max(sizes) < (pair.source / "model.safetensors").stat().st_size / 3
    assert json.loads((tmp_path / "ar" / "ar_meta.json").read_text())["ar_num_layers"] == pair.site.n_blocks
    again_av = halves.load_av(tmp_path / "av").model
    again_ar = halves.load_ar(Sidecar.read(tmp_path / "ar"), tmp_path / "ar")
    assert torch.equal(logits(again_av), logits(av))
    assert torch.equal(vectors_of(again_ar), vectors_of(ar))
    nla = NLA.from_pretrained(tmp_path, base_model=str(pair.source))
    assert nla.av is not None
    assert nla.ar is not None
    assert float((logits(av) - logits(load_causal_lm(pair.source, LoadOptions()).model)).abs().max()) > 1e-2
    close(logits(nla.av.engine.av.loaded.model), logits(av))  # type: ignore[attr-defined]
    close(vectors_of(nla.ar.model), vectors_of(ar))
    theirs = peft.PeftModel.from_pretrained(load_causal_lm(pair.source, LoadOptions()).model, tmp_path / "av")
    assert torch.equal(logits(theirs), logits(av))


def test_factors_of_another_recipe_are_refused(pairs: Callable[..., RandomPair], tmp_path: Path) -> None:
    pair = pairs()
    small = on(pair, lora=LoRASpec(r=2, alpha=4))
    small.write_av(tmp_path, small.load_av().model, load_tokenizer(pair.av), Sidecar.read(pair.av))
    with pytest.raises(WeightsError, match=r"not those of this recipe[^$]*got shape \(2, 64\), expected \(4, 64\)"):
        on(pair).load_av(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    stored = load_file(file)
    stored.pop(next(iter(stored)))
    save_file(stored, file)
    with pytest.raises(WeightsError, match="missing: "):
        small.load_av(tmp_path)
    model = small.load_av().model
    next(iter(factors(model).values())).data[0] = float("nan")
    with pytest.raises(WeightsError, match="NaN"):
        small.write_av(tmp_path / "broken", model, load_tokenizer(pair.av), Sidecar.read(pair.av))


# -- reinforcement learning ----------------------------------------------------------------------------------


@pytest.fixture
def trained(pairs: Callable[..., RandomPair], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Makes a trainer of the stage rl on factors that were trained before it."""

    def make(architecture: str = "llama", *, kind: str = "overwrite", **changes: Any) -> Any:
        pair = pairs(architecture, kind)
        halves = on(pair, rl=dataclasses.replace(rl_world.SPEC, **changes))
        place = tmp_path / "av"
        if not place.exists():
            halves.write_av(place, learn_av(halves, pair), load_tokenizer(pair.av), Sidecar.read(pair.av))
        loaded = halves.load_av(place)
        monkeypatch.setattr(rl_world, "load_causal_lm", lambda *_: loaded)
        return make_trainer(pair, tmp_path / "state", **changes)

    return make


@pytest.mark.parametrize(("architecture", "kind"), [("llama", "overwrite"), ("llama", "add"), ("gemma3", "overwrite")])
def test_kl_is_measured_to_the_factors_as_they_were(
    trained: Callable[..., Any],
    pairs: Callable[..., RandomPair],
    architecture: str,
    kind: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    trainer, watcher = trained(
        architecture, kind=kind, steps=2, lr=3e-3, updates=2, gradient_checkpointing=kind == "add"
    )
    assert trainer.ref_model is None
    before = {n: p.clone() for n, p in trainer.model.named_parameters()}
    reference = ReferenceAV(pairs(architecture, kind).av)
    merged = peft_merged(trainer.model)
    reference.model.load_state_dict(merged)
    seen: list[tuple[Tensor, Tensor]] = []
    passes = RLTrainer._get_per_token_logps_and_entropies
    generate = RLTrainer._generate_and_score_completions

    def both(self: RLTrainer, model: Any, *args: Any, **options: Any) -> Any:
        found = passes(self, model, *args, **options)
        if not torch.is_grad_enabled():
            seen.append((model.active_adapter, found[0].clone()))  # type: ignore[arg-type]
        return found

    gaps: list[float] = []

    def checked(self: RLTrainer, inputs: Any) -> Any:
        output = generate(self, inputs)
        ids, mask = output["completion_ids"], output["completion_mask"].bool()
        found = reference.logits(output["vectors"], ids)[:, :-1].float().log_softmax(-1)
        theirs = found.gather(-1, ids[..., None]).squeeze(-1)
        gaps.append(float((theirs - output["ref_per_token_logps"])[mask].abs().max()))
        return output

    monkeypatch.setattr(RLTrainer, "_get_per_token_logps_and_entropies", both)
    monkeypatch.setattr(RLTrainer, "_generate_and_score_completions", checked)
    trainer.train()
    assert [name for name, _ in seen[:2]] == ["default", "ref"]
    assert torch.equal(seen[0][1], seen[1][1]), "at the first step the policy is its own reference, to the bit"
    assert max(gaps) < 1e-4, "the reference's pass has the vectors in, and the weights of the beginning, at every step"
    assert all(figures["kl"] > 1e-7 for figures in watcher.figures), "from the second update on it has moved"
    for name, value in trainer.model.named_parameters():
        assert torch.equal(value, before[name]) == (".default." not in name), name
    assert trainer.model.active_adapter == "default"
    assert all(p.requires_grad for p in factors(trainer.model).values())


def peft_merged(model: Any) -> dict[str, Tensor]:
    """The weights of a plain causal LM with the active factors in them."""
    import copy

    twin = copy.deepcopy(model)
    del twin.base_model.model.forward  # TRL's, bound to the model itself
    merged: dict[str, Tensor] = twin.merge_and_unload().state_dict()
    return merged


def test_a_kl_term_without_the_kept_factors_is_refused(
    trained: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nla_hub.training.halves.keep_reference", lambda model: None)
    with pytest.raises(TrainingError, match="frozen copy of the AV's factors"):
        trained()
    trained(beta=0.0)


# -- a whole run ---------------------------------------------------------------------------------------------


def run_recipe() -> Recipe:
    plain = small_recipe()
    rl = dataclasses.replace(
        RL, documents=16, steps=4, lr=1e-2, prompts=4, group=4, micro_batch=8, max_new_tokens=12, checkpoint_every=2,
        evaluate_rows=8, rollout_block=16, evaluate_every=4, label_share=1.0,
        reward=RewardSpec(length_penalty=0.1),  # what nearly untrained factors can be paid for
    )  # fmt: skip
    return dataclasses.replace(
        plain,
        lora=LORA,
        data=dataclasses.replace(plain.data, positions=2),
        ar=StageSpec(documents=24, lr=3e-3, batch_size=8),
        av=StageSpec(documents=24, lr=3e-3, batch_size=8, epochs=2),
        rl=rl,
        eval=dataclasses.replace(plain.eval, documents=2),
        export=dataclasses.replace(plain.export, dtype="float32", head_dtype="float32"),
    )


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Recipe, Silent]:
    place, recipe, listener = tmp_path_factory.mktemp("lora") / "run", run_recipe(), Silent()
    Pipeline(recipe, RunDirectory(place, recipe), listener).execute()
    return place, recipe, listener


def test_a_run_with_factors_goes_through_every_stage(finished: tuple[Path, Recipe, Silent]) -> None:
    place, recipe, listener = finished
    assert listener.begun == list(stages_of(recipe))
    for folder in ("av/checkpoint", "ar/checkpoint", "ar/watch", "rl/checkpoint/av", "rl/checkpoint/ar"):
        names = {p.name for p in (place / folder).iterdir()}
        assert {"adapter_model.safetensors", "adapter_config.json", "nla_meta.yaml", "tokenizer.json"} <= names, folder
        assert "model.safetensors" not in names
    first, watch = (load_file(place / "ar" / f / "adapter_model.safetensors") for f in ("checkpoint", "watch"))
    assert any(not torch.equal(first[n], watch[n]) for n in first), "two ARs of one seed would be one AR"
    pair = place / "export" / "checkpoint"
    assert not list(pair.rglob("adapter_*"))
    assert Sidecar.read(pair / "av").stage == "rl"
    lines = figures(place / "rl" / "metrics.jsonl")
    kl = [line["kl"] for line in lines if "kl" in line]
    assert abs(kl[0]) < 1e-7
    assert kl[-1] > 1e-7
    for half in ("av", "ar"):
        rl, sft = (
            load_file(place / f / "adapter_model.safetensors") for f in (f"rl/checkpoint/{half}", f"{half}/checkpoint")
        )
        assert rl.keys() == sft.keys(), "the same factors go on"
        assert any(not torch.equal(rl[n], sft[n]) for n in rl)


def test_the_exported_pair_says_what_the_factors_say(finished: tuple[Path, Recipe, Silent]) -> None:
    place, recipe, _ = finished
    base = Path(recipe.base.name)
    halves = Halves(recipe, base)
    rl, pair = place / "rl" / "checkpoint", place / "export" / "checkpoint"
    # In float64, where what is left is the rounding of the stored sums.
    over, exported, plain = (
        logits(model.double()).log_softmax(-1)
        for model in (
            halves.load_av(rl / "av").model,
            load_causal_lm(pair / "av", LoadOptions()).model,
            load_causal_lm(base, LoadOptions()).model,
        )
    )
    assert float((over - exported).abs().max()) < 1e-5
    assert float((over - plain).abs().max()) > 1e-2
    sidecar = Sidecar.read(pair / "ar")
    trunk, head = load_ar(pair / "ar", sidecar, LoadOptions())
    expected = vectors_of(halves.load_ar(sidecar, rl / "ar"))
    got = vectors_of(ARModel(trunk.adapter, trunk.model, head))
    torch.testing.assert_close(got, expected, atol=1e-5 * float(expected.abs().max()), rtol=1e-5)
    nla = NLA.from_pretrained(rl, base_model=str(base))
    texts = ["otto sails", "a red kite"]
    assert nla.ar is not None
    whole = NLA.from_pretrained(pair, base_model=str(base))
    assert whole.ar is not None
    close(nla.ar.reconstruct(texts), whole.ar.reconstruct(texts))


@pytest.mark.long
def test_a_run_that_was_killed_twice_ends_the_same(
    finished: tuple[Path, Recipe, Silent], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place, recipe, _ = finished
    calls = {"av": 0, "rl": 0}

    for name in ("source", "data", "ar"):
        shutil.copytree(place / name, tmp_path / "run" / name)
    shutil.copyfile(place / "config.yaml", tmp_path / "run" / "config.yaml")

    def run() -> None:
        Pipeline(recipe, RunDirectory(tmp_path / "run", recipe), Silent()).execute(("av", "rl"))

    def stopping(owner: Any, name: str, stage: str, at: int) -> None:
        original = getattr(owner, name)

        def counted(*args: Any, **options: Any) -> Any:
            calls[stage] += 1
            if calls[stage] == at:
                raise Killed
            return original(*args, **options)

        monkeypatch.setattr(owner, name, counted)

    stopping(AVLoss, "__call__", "av", 8)
    stopping(RLTrainer, "_generate_and_score_completions", "rl", 4)
    for stage in ("av", "rl"):
        with pytest.raises(Killed):
            run()
        assert list((tmp_path / "run" / stage / "state").iterdir()), "something is there to continue from"
    kept = next((tmp_path / "run" / "rl" / "state").glob("checkpoint-*"))
    assert not (kept / "model.safetensors").exists()
    run()
    assert calls == {"av": 19, "rl": 6}, "only the steps since the last checkpoint are done again"
    files = [
        *(place / "av" / "checkpoint").glob("*.safetensors"),
        *(place / "rl" / "checkpoint").rglob("*.safetensors"),
    ]
    assert len(files) == 4
    for file in files:
        assert file.read_bytes() == (tmp_path / "run" / file.relative_to(place)).read_bytes(), file


# -- sharded -------------------------------------------------------------------------------------------------

SHARDED = """
import dataclasses, sys
from pathlib import Path
from test_training_lora import run_recipe
from test_training import Silent
from nla_hub.training.pipeline import Pipeline
from nla_hub.training.processes import Processes
from nla_hub.training.recipe import PlacementSpec
from nla_hub.training.run import RunDirectory

processes = Processes.here()
recipe = run_recipe()
both = PlacementSpec(av="sharded", ar="sharded") if processes.world > 1 else PlacementSpec()
recipe = dataclasses.replace(
    recipe,
    rl=dataclasses.replace(recipe.rl, steps=2, checkpoint_every=1),
    hardware=dataclasses.replace(recipe.hardware, placement=both),
)
run = RunDirectory(Path(sys.argv[1]), recipe, processes=processes)
Pipeline(recipe, run, Silent()).execute(("source", "data", "ar", "av", "rl"))
processes.close()
"""


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_sharded_factors_are_those_of_one_process(tmp_path: Path) -> None:
    tests = str(Path(__file__).parent)
    for world in (1, 2):
        command = [sys.executable, "-c", SHARDED, str(tmp_path / str(world))]
        started = [subprocess.Popen(command, env={**e, "PYTHONPATH": tests}) for e in environments(world)]
        assert [process.wait(500) for process in started] == [0] * world
    for folder in ("ar/checkpoint", "ar/watch", "av/checkpoint", "rl/checkpoint/av", "rl/checkpoint/ar"):
        one, two = (load_file(tmp_path / world / folder / "adapter_model.safetensors") for world in ("1", "2"))
        limit = 1e-3 if folder.startswith("rl") else 1e-4  # AdamW makes a step of the sign of a gradient near zero
        for name, value in one.items():
            torch.testing.assert_close(two[name], value, atol=limit, rtol=0)
    one, two = ([line for line in figures(tmp_path / w / "rl" / "metrics.jsonl") if "kl" in line] for w in ("1", "2"))
    assert [line["kl"] for line in two] == pytest.approx([line["kl"] for line in one], rel=1e-3, abs=1e-7)
    assert two[1]["kl"] > 1e-4
    assert all(line["logprob_difference"] < 1e-4 for line in two)


# -- a packed base -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_factors_on_a_packed_base(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("bitsandbytes", reason="needs the quant extra")
    # Its 16-bit kernels for processors pack weights anew outside training, and sum otherwise than in it.
    monkeypatch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda: False)
    recipe = run_recipe()
    # Products of 8 bits are rounded by what else is in a batch: further than float32's bar on two views of one policy.
    recipe = dataclasses.replace(
        recipe,
        base=dataclasses.replace(recipe.base, quantization=kind),
        rl=recipe.rl if kind == "nf4" else None,
    )
    place, base = tmp_path / "run", Path(recipe.base.name)
    Pipeline(recipe, RunDirectory(place, recipe), Silent()).execute()
    made = place / "rl" / "checkpoint" / "av" if kind == "nf4" else place / "av" / "checkpoint"
    over = Halves(recipe, base).load_av(made).model
    packed = {name: p for name, p in over.named_parameters() if not p.is_floating_point()}
    assert len(packed) == 4 * 7, "every linear layer of every block"
    assert {p.dtype for p in factors(over).values()} == {torch.float32}
    assert any(bool((p.float() - p.bfloat16().float()).abs().max() > 0) for p in factors(over).values()), "not rounded"
    exported = load_causal_lm(place / "export" / "checkpoint" / "av", LoadOptions()).model
    unpacked = Halves(dataclasses.replace(recipe, base=dataclasses.replace(recipe.base, quantization=None)), base)
    torch.testing.assert_close(logits(exported), logits(unpacked.load_av(made).model), atol=1e-3, rtol=1e-3)
    difference = (logits(over).log_softmax(-1) - logits(exported).log_softmax(-1)).abs().mean()
    assert 1e-4 < float(difference) < 0.5, "what packing costs"
