"""GRPO with an injected vector: what the sampler, TRL and an independent forward pass say about the same tokens."""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from parity import ReferenceAV

pytest.importorskip("trl", reason="needs the train extra")

from rl_world import SPEC, make_trainer, random_rows, weights

from nla_hub.errors import RecipeError, TrainingError
from nla_hub.geometry import direction_mse
from nla_hub.injection import Injector
from nla_hub.testing import RandomPair, random_pair
from nla_hub.training.grpo import RLTrainer
from nla_hub.training.recipe import LoRASpec, RewardSpec, RLSpec
from nla_hub.training.rl.live_ar import LiveAR
from nla_hub.training.rl.monitor import LOGPROB_LIMIT as AGREEMENT
from nla_hub.training.rl.reward import contrast, repeated_pairs, reward, sample_mse
from nla_hub.training.rl.rollouts import prompt_order, sample, step_seed
from nla_hub.training.rl.settings import grpo_config, policy_rate, rate

pytestmark = pytest.mark.train

LORA = LoRASpec(r=4, alpha=8)


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., RandomPair]:
    made: dict[tuple[str, str], RandomPair] = {}

    def get(architecture: str = "llama", kind: str = "overwrite") -> RandomPair:
        key = (architecture, kind)
        if key not in made:
            made[key] = random_pair(tmp_path_factory.mktemp(f"{architecture}-{kind}"), architecture, kind=kind)
        return made[key]

    return get


def independent(pair: RandomPair, trainer: RLTrainer, vectors: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Log-probabilities of `ids` [n, T] by a model on `inputs_embeds`, with the trainer's present weights."""
    reference = ReferenceAV(pair.av)
    model = trainer.accelerator.unwrap_model(trainer.model)
    if trainer.spec.lora is not None:
        model = copy.deepcopy(model).merge_and_unload()
    reference.model.load_state_dict(model.state_dict())
    logits = reference.logits(vectors, ids)[:, :-1]
    return logits.float().log_softmax(-1).gather(-1, ids[..., None]).squeeze(-1)


# -- log-probabilities ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({}, id="aligned"),
        pytest.param({"updates": 2}, id="two-updates"),
        pytest.param({"iterations": 2}, id="two-iterations"),
        pytest.param({"updates": 2, "iterations": 2, "micro_batch": 8}, id="both"),
        pytest.param({"lora": LORA}, id="lora"),
        pytest.param({"lora": LORA, "updates": 2, "iterations": 2}, id="lora-both"),
        pytest.param({"gradient_checkpointing": True, "updates": 2}, id="checkpointing"),
    ],
)
@pytest.mark.parametrize("kind", ["overwrite", "add"])
def test_sampler_trainer_and_an_independent_forward_agree(
    pairs: Callable[..., RandomPair],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
    changes: dict[str, Any],
) -> None:
    pair = pairs("llama", kind)
    trainer, watcher = make_trainer(pair, tmp_path, **changes)
    seen: list[float] = []
    generate = RLTrainer._generate_and_score_completions

    def checked(self: RLTrainer, inputs: Any) -> Any:
        output = generate(self, inputs)
        theirs = independent(pair, self, output["vectors"], output["completion_ids"])
        mask = output["completion_mask"].bool()
        seen.append(float((theirs - output["sampling_per_token_logps"])[mask].abs().max()))
        if "old_per_token_logps" in output:
            seen.append(float((theirs - output["old_per_token_logps"])[mask].abs().max()))
        return output

    monkeypatch.setattr(RLTrainer, "_generate_and_score_completions", checked)
    trainer.train()
    aligned = trainer.spec.per_step == 1
    assert len(seen) == trainer.spec.steps * (1 if aligned else 2)
    assert max(seen) < AGREEMENT
    assert len(watcher.figures) == trainer.spec.steps
    for figures in watcher.figures:
        assert 0 < figures["logprob_difference"] < AGREEMENT
        assert figures["policy_update"] > 0
        assert figures["loss_difference"] < 1e-4


@pytest.mark.parametrize("architecture", ["qwen2", "gemma3", "gpt2"])
def test_the_other_families_agree_too(pairs: Callable[..., RandomPair], tmp_path: Path, architecture: str) -> None:
    trainer, watcher = make_trainer(pairs(architecture), tmp_path, updates=2)
    trainer.train()
    assert max(f["logprob_difference"] for f in watcher.figures) < AGREEMENT


@pytest.mark.parametrize("updates", [1, 2])
@pytest.mark.parametrize("damage", ["zero", "swap"])
@pytest.mark.parametrize("side", ["sampler", "trainer"])
def test_a_vector_lost_on_one_side_stops_the_run(
    pairs: Callable[..., RandomPair],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    side: str,
    damage: str,
    updates: int,
) -> None:
    trainer, _ = make_trainer(pairs(), tmp_path, updates=updates, micro_batch=8)
    inject = Injector.inject
    before = weights(trainer.model)

    def damaged(self: Injector, model: Any, vectors: torch.Tensor, positions: torch.Tensor) -> Any:
        sampling = torch.is_inference_mode_enabled()
        if sampling == (side == "sampler"):
            # A zero vector has no direction and cannot be rescaled: next to nothing of one is a constant direction.
            vectors = torch.ones_like(vectors) if damage == "zero" else vectors.flip(0)
        return inject(self, model, vectors, positions)

    monkeypatch.setattr(Injector, "inject", damaged)
    with pytest.raises(TrainingError, match="do not see the same policy") as caught:
        trainer.train()
    assert float(str(caught.value).split("difference ")[1].split(",")[0]) > 0.01
    assert torch.equal(weights(trainer.model), before)


def test_a_pass_without_vectors_is_refused(pairs: Callable[..., RandomPair], tmp_path: Path) -> None:
    trainer, _ = make_trainer(pairs(), tmp_path)
    ids = torch.tensor([trainer.prompt.ids])
    with pytest.raises(TrainingError, match="without its vectors"):
        trainer._get_per_token_logps_and_entropies(trainer.model, ids, torch.ones_like(ids), 1)


# -- KL ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lora", [None, LORA], ids=["full", "lora"])
def test_kl_starts_at_zero_grows_and_is_held_by_its_coefficient(
    pairs: Callable[..., RandomPair], tmp_path: Path, lora: LoRASpec | None
) -> None:
    found = {}
    for beta in (1e-4, 10.0):
        trainer, watcher = make_trainer(pairs(), tmp_path / str(beta), beta=beta, steps=6, lora=lora, lr=3e-3)
        trainer.train()
        found[beta] = [figures["kl"] for figures in watcher.figures]
    for series in found.values():
        assert abs(series[0]) < 1e-7
        assert all(value > 1e-6 for value in series[1:])
    assert found[10.0][-1] < 0.7 * found[1e-4][-1]


def test_without_beta_there_is_no_reference(pairs: Callable[..., RandomPair], tmp_path: Path) -> None:
    trainer, watcher = make_trainer(pairs(), tmp_path, beta=0.0, steps=1)
    trainer.train()
    assert trainer.ref_model is None
    assert watcher.figures[0]["kl"] is None
    assert watcher.figures[0]["loss_difference"] < 1e-4


def test_the_reference_stays_where_it_was(pairs: Callable[..., RandomPair], tmp_path: Path) -> None:
    trainer, _ = make_trainer(pairs(), tmp_path, steps=2)
    before = weights(trainer.ref_model)
    assert torch.equal(before, weights(trainer.model))
    trainer.train()
    assert torch.equal(before, weights(trainer.ref_model))
    assert not torch.equal(before, weights(trainer.model))


# -- what is the same however it is shared --------------------------------------------------------------------


def test_micro_batches_change_nothing_but_rounding(pairs: Callable[..., RandomPair], tmp_path: Path) -> None:
    results = []
    for size in (16, 4):
        trainer, watcher = make_trainer(pairs(), tmp_path / str(size), micro_batch=size, steps=3, watch=True)
        trainer.train()
        results.append((weights(trainer.model), weights(trainer.scoring.ar.model), watcher.figures))
    for a, b in zip(results[0][:2], results[1][:2], strict=True):
        assert float((a - b).abs().max() / b.abs().max()) < 1e-4
    for a, b in zip(results[0][2], results[1][2], strict=True):
        assert a["mse"] == pytest.approx(b["mse"], abs=1e-5)
        assert a["watch_loss"] == pytest.approx(b["watch_loss"], abs=1e-5)


def test_blocks_are_cut_by_the_place_in_the_step(pairs: Callable[..., RandomPair], tmp_path: Path) -> None:
    trainer, _ = make_trainer(pairs(), tmp_path)
    rows = [r for r in (3, 1, 7, 5) for _ in range(SPEC.group)]
    whole = sample(trainer.engine, trainer.data, rows, SPEC, seed=5, step=2)
    parts = [sample(trainer.engine, trainer.data, rows[b : b + 8], SPEC, seed=5, step=2, first=b) for b in (0, 8)]
    together = [c for part in parts for c in part.completions]
    assert [c.ids for c in whole.completions] == [c.ids for c in together]
    for a, b in zip(whole.completions, together, strict=True):
        assert torch.equal(a.logprobs, b.logprobs)


def test_the_step_is_part_of_the_seed(pairs: Callable[..., RandomPair], tmp_path: Path) -> None:
    trainer, _ = make_trainer(pairs(), tmp_path)
    rows = [0] * SPEC.group
    texts = [tuple(c.ids for c in sample(trainer.engine, trainer.data, rows, SPEC, seed=s, step=t).completions)
             for s, t in ((0, 0), (0, 1), (1, 0), (0, 0))]  # fmt: skip
    assert len(set(texts)) == 3
    assert texts[0] == texts[3]
    assert len(set(texts[0])) > 1, "the samples of a group must differ"


@given(st.integers(1, 60), st.integers(1, 8), st.integers(1, 20), st.integers(0, 5))
def test_no_row_stands_twice_in_a_step(rows: int, prompts: int, steps: int, seed: int) -> None:
    spec = dataclasses.replace(SPEC, prompts=prompts, steps=steps, micro_batch=1)
    if rows < prompts:
        with pytest.raises(RecipeError, match="too few vectors"):
            prompt_order(rows, spec, seed=seed)
        return
    order = prompt_order(rows, spec, seed=seed)
    assert len(order) == steps * prompts
    for begin in range(0, len(order), prompts):
        assert len(set(order[begin : begin + prompts])) == prompts
    a_pass = rows - rows % prompts
    for begin in range(0, len(order) - a_pass + 1, a_pass):
        assert len(set(order[begin : begin + a_pass])) == a_pass, "every vector is used once before any is again"


def test_step_seeds_differ() -> None:
    assert len({step_seed(seed, step) for seed in range(20) for step in range(50)}) == 1000


# -- the reward ----------------------------------------------------------------------------------------------


def test_reward_is_what_the_recipe_says() -> None:
    mse = torch.tensor([0.5, 2.0], dtype=torch.float64)
    parts = {"mse": mse, "tokens": torch.tensor([10, 4]), "repetition": torch.tensor([0.25, 0.0])}
    assert reward(RewardSpec(), **parts).tolist() == [-0.5, -2.0]
    assert reward(RewardSpec(kind="neg_log_mse"), **parts).tolist() == pytest.approx([-math.log(0.5), -math.log(2)])
    paid = reward(RewardSpec(length_penalty=0.01, repetition_penalty=2.0), **parts)
    assert paid.tolist() == pytest.approx([-0.5 - 0.1 - 0.5, -2.0 - 0.04])
    extra = reward(RewardSpec(contrastive=0.5), **parts, contrast=torch.tensor([-1.0, -3.0]))
    assert extra.tolist() == pytest.approx([-1.0, -3.5])


def test_anything_but_ok_gets_the_orthogonal_score() -> None:
    cosine = torch.tensor([0.9, 0.9, -0.5])
    assert sample_mse(cosine, torch.tensor([True, False, True])).tolist() == pytest.approx([0.2, 2.0, 3.0])


@given(st.lists(st.sampled_from("ab"), max_size=12))
def test_repeated_pairs_counts_pairs_seen_before(words: list[str]) -> None:
    pairs_seen, repeats = [], 0
    for i in range(1, len(words)):
        pair = (words[i - 1], words[i])
        repeats += pair in pairs_seen
        pairs_seen.append(pair)
    expected = repeats / len(pairs_seen) if pairs_seen else 0.0
    assert repeated_pairs(" ".join(words)) == pytest.approx(expected)


@given(st.integers(0, 1000))
def test_contrast_is_a_softmax_over_explanations_of_other_vectors(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    group = torch.tensor([0, 0, 1, 1, 2])
    cosines = torch.rand(5, 5, generator=generator, dtype=torch.float64) * 2 - 1
    usable = torch.rand(5, generator=generator) > 0.3
    own = torch.where(usable, cosines.diagonal(), torch.zeros(5, dtype=torch.float64))
    found = contrast(own, cosines, group=group, other_groups=group, other_usable=usable, temperature=0.2)
    for i in range(5):
        rivals = [float(cosines[i, j]) for j in range(5) if group[j] != group[i] and usable[j]]
        total = math.exp(float(own[i]) / 0.2) + sum(math.exp(r / 0.2) for r in rivals)
        assert float(found[i]) == pytest.approx(float(own[i]) / 0.2 - math.log(total), abs=1e-9)
        assert float(found[i]) <= 1e-12


def test_advantages_are_normalised_in_the_group(
    pairs: Callable[..., RandomPair], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer, _ = make_trainer(pairs(), tmp_path, steps=1)
    kept: list[dict[str, Any]] = []
    generate = RLTrainer._generate_and_score_completions
    monkeypatch.setattr(
        RLTrainer,
        "_generate_and_score_completions",
        lambda self, inputs: kept.append(output := generate(self, inputs)) or output,  # type: ignore[func-returns-value]
    )
    paid: list[float] = []
    pay = trainer.reward_funcs[0]
    trainer.reward_funcs[0] = lambda **given: paid.extend(pay(**given)) or paid  # type: ignore[func-returns-value]
    trainer.reward_func_names = ["reward"]
    trainer.train()
    rewards = torch.tensor(paid).reshape(-1, SPEC.group)
    spread = rewards.std(dim=1, keepdim=True)
    expected = (rewards - rewards.mean(dim=1, keepdim=True)) / (spread + 1e-4)
    assert float(spread.min()) > 0
    torch.testing.assert_close(kept[0]["advantages"], expected.reshape(-1), atol=1e-5, rtol=1e-4)


# -- the AR that learns --------------------------------------------------------------------------------------


def test_the_live_ar_pays_before_it_learns_and_learns_what_a_plain_step_learns(
    pairs: Callable[..., RandomPair], tmp_path: Path
) -> None:
    trainer, _ = make_trainer(pairs(), tmp_path, clip=1e9)
    live = trainer.scoring.ar
    plain = copy.deepcopy(live.model)
    rows = random_rows(6)
    predicted = live.score(rows.texts[:4], rows.vectors[:4], total=6)
    live.score(rows.texts[4:], rows.vectors[4:], total=6)
    update = live.update(1e-3)
    optimizer = torch.optim.AdamW(plain.parameters(), lr=1e-3, betas=(0.9, SPEC.beta2), weight_decay=0.0)
    losses = []
    for text, vector in zip(rows.texts, rows.vectors, strict=True):
        ids = torch.tensor([live.prompt.encode(text)])
        out = plain(ids, torch.ones_like(ids))[0]
        losses.append(2 - 2 * torch.nn.functional.cosine_similarity(out, vector, dim=0))
    torch.testing.assert_close(
        direction_mse(predicted, rows.vectors[:4]).float(), torch.stack(losses[:4]).detach(), atol=1e-5, rtol=1e-4
    )
    torch.stack(losses).mean().backward()
    optimizer.step()
    assert update.loss == pytest.approx(torch.stack(losses).mean().item(), abs=1e-5)
    assert update.change > 0
    torch.testing.assert_close(weights(live.model), weights(plain), atol=2e-5, rtol=1e-3)
    assert live.model.head.weight.dtype == torch.float32


def test_label_rows_join_the_regression(pairs: Callable[..., RandomPair], tmp_path: Path) -> None:
    labels = random_rows(9, seed=4)
    plain, alone = make_trainer(pairs(), tmp_path / "a", steps=1)
    mixed, watcher = make_trainer(pairs(), tmp_path / "b", steps=1, labels=labels, label_share=0.5)
    plain.train()
    mixed.train()
    assert alone.figures[0]["mse"] == pytest.approx(watcher.figures[0]["mse"], abs=1e-6), "the samples are the same"
    assert alone.figures[0]["ar_loss"] != pytest.approx(watcher.figures[0]["ar_loss"], abs=1e-4)


def test_a_gradient_that_is_not_finite_is_dropped(pairs: Callable[..., RandomPair], tmp_path: Path) -> None:
    trainer, watcher = make_trainer(pairs(), tmp_path, steps=1)
    loss = RLTrainer._compute_loss
    trainer._compute_loss = lambda model, inputs: loss(trainer, model, inputs) * float("nan")  # type: ignore[method-assign]
    before = weights(trainer.model)
    trainer.train()
    assert torch.equal(weights(trainer.model), before)
    assert watcher.figures[0]["skipped"] == 1
    assert watcher.figures[0]["in_a_row"] == 1


def test_the_ar_drops_a_gradient_that_is_not_finite(pairs: Callable[..., RandomPair], tmp_path: Path) -> None:
    trainer, _ = make_trainer(pairs(), tmp_path)
    rows = random_rows(3)
    trainer.scoring.ar.score(rows.texts, rows.vectors, total=3)
    trainer.scoring.ar.model.head.weight.grad = torch.full_like(trainer.scoring.ar.model.head.weight, float("inf"))
    before = weights(trainer.scoring.ar.model)
    update = trainer.scoring.ar.update(1e-3)
    assert update.skipped
    assert update.change == 0.0
    assert torch.equal(weights(trainer.scoring.ar.model), before)


# -- schedules and sizes -------------------------------------------------------------------------------------


def test_the_av_rests_while_only_the_ar_learns(pairs: Callable[..., RandomPair], tmp_path: Path) -> None:
    trainer, watcher = make_trainer(pairs(), tmp_path, steps=3, ar_warmup=2)
    trainer.train()
    assert [f["policy_update"] > 0 for f in watcher.figures] == [False, False, True]
    assert all(f["ar_update"] > 0 for f in watcher.figures)


@given(st.integers(1, 50), st.integers(0, 10), st.floats(0, 1))
def test_rates_stay_between_nothing_and_the_peak(steps: int, warmup: int, final: float) -> None:
    spec = dataclasses.replace(SPEC, steps=steps, warmup=warmup, final_lr=final, ar_warmup=2)
    rates = [rate(step, spec) for step in range(steps)]
    assert all(0 < r <= 1 + 1e-12 for r in rates) or final == 0
    assert rates[: min(warmup, steps)] == sorted(rates[: min(warmup, steps)])
    assert policy_rate(0, spec) == policy_rate(1, spec) == 0.0


def test_sizes_that_cannot_be_shared_are_refused() -> None:
    faults = list(dataclasses.replace(SPEC, micro_batch=3).faults())
    assert any("micro_batch" in fault for fault in faults)
    with pytest.raises(TrainingError, match="cannot be shared"):
        grpo_config(SPEC, Path("nowhere"), seed=0, world=3, on_cpu=True)


def test_state_of_the_ar_comes_back(pairs: Callable[..., RandomPair], tmp_path: Path) -> None:
    rows = random_rows(4)
    trainer, _ = make_trainer(pairs(), tmp_path)
    other, _ = make_trainer(pairs(), tmp_path)

    def learn(live: LiveAR) -> None:
        live.score(rows.texts, rows.vectors, total=4)
        live.update(1e-3)

    learn(trainer.scoring.ar)
    other.scoring.ar.load_state_dict(copy.deepcopy(trainer.scoring.ar.state_dict()))
    learn(trainer.scoring.ar)
    learn(other.scoring.ar)
    assert torch.equal(weights(trainer.scoring.ar.model), weights(other.scoring.ar.model))


def test_a_spec_lists_its_faults() -> None:
    spec = RLSpec(documents=0, steps=0, lr=-1.0, ar_lr=0.0, group=1, final_lr=2.0)
    faults = " ".join(spec.faults())
    for name in ("documents", "steps", "lr", "group", "final_lr"):
        assert f"{name}: got" in faults
    assert any("lm_head" in fault for fault in LoRASpec(targets=("q_proj", "lm_head")).faults())
