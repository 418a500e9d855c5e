"""Steering is an exact formula at the output of block K, adds up, and leaves no trace."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import pytest
import torch
from conftest import Case, Spec
from parity import TEXTS, close
from torch import Tensor

from nla_hub.errors import PositionError
from nla_hub.sidecar import Site
from nla_hub.steering import SteeringVector, _SteeredBlock
from nla_hub.testing import D_MODEL, LAYER

SITE = Site(LAYER)
POSITIONS: list[Any] = ["generated", "all", 2, -1, [0, -2], [1, 3, 3]]


def direction(seed: int, site: Site = SITE, size: float = 1.0) -> SteeringVector:
    vector = torch.randn(D_MODEL, generator=torch.Generator().manual_seed(seed))
    return SteeringVector(vector * size, site)


def chosen(positions: Any, length: int) -> list[int]:
    """The steered positions of a prompt, written out."""
    if positions == "all":
        return list(range(length))
    if positions == "generated":
        return [length - 1]
    return sorted({p % length for p in ([positions] if isinstance(positions, int) else positions)})


def hidden_states(case: Case, ids: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Output of block K (entering K+1) and logits of the complete model as transformers loads it."""
    with torch.no_grad():
        out = case.source.model(input_ids=torch.tensor([list(ids)]), output_hidden_states=True, use_cache=False)
    return out.hidden_states[LAYER + 1][0], out.logits[0]


def generate(
    model: Any, ids: Tensor, mask: Tensor | None = None, *, steps: int = 10, cache: bool = True
) -> list[list[int]]:
    mask = torch.ones_like(ids) if mask is None else mask
    with torch.no_grad():
        out = model.generate(
            input_ids=ids,
            attention_mask=mask,
            max_new_tokens=steps,
            min_new_tokens=steps,
            do_sample=False,
            use_cache=cache,
            pad_token_id=1,
        )
    return [row[ids.shape[1] :] for row in out.tolist()]


def traces(model: torch.nn.Module) -> list[str]:
    """Every hook and every attribute of ours; transformers leaves hooks of its own that record hidden states."""
    hooks = [
        f"{n}: {hook}"
        for n, m in model.named_modules()
        for hook in (*m._forward_hooks.values(), *m._forward_pre_hooks.values())
    ]
    return hooks + [f"{n}.{key}" for n, m in model.named_modules() for key in vars(m) if "nla" in key]


# -- the formula ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("positions", POSITIONS, ids=str)
@pytest.mark.parametrize("strength", [0.5, -3.0])
def test_the_output_of_block_k_is_the_formula_at_the_chosen_positions(
    family: Case, positions: Any, strength: float
) -> None:
    ids = family.source.ids(TEXTS[0])
    before, plain = hidden_states(family, ids)
    sv = direction(1, size=1e3)
    with sv.apply(family.source.model, strength, positions=positions):
        after, steered = hidden_states(family, ids)
    at = chosen(positions, len(ids))
    rest = [i for i in range(len(ids)) if i not in at]
    unit = sv.vector.double() / sv.vector.double().norm()
    expected = before.double() + strength * before.double().norm(dim=-1, keepdim=True) * unit
    close(after[at], expected[at].float())
    assert torch.equal(after[rest], before[rest])
    assert not torch.equal(steered[-1], plain[-1])


def test_a_steering_of_two_vectors_is_the_sum_from_the_unsteered_residual(family: Case) -> None:
    ids = family.source.ids(TEXTS[1])
    before, _ = hidden_states(family, ids)
    a, b = direction(1), direction(2, size=50)
    with a.apply(family.source.model, 2.0, positions="all"), b.apply(family.source.model, -0.7, positions=[1, -1]):
        after, _ = hidden_states(family, ids)
    wide = before.double()
    size = wide.norm(dim=-1, keepdim=True)
    expected = wide + 2.0 * size * (a.vector.double() / a.vector.double().norm())
    for p in (1, len(ids) - 1):
        expected[p] -= 0.7 * size[p] * (b.vector.double() / b.vector.double().norm())
    close(after, expected.float())


def test_the_order_of_two_steerings_does_not_matter(family: Case) -> None:
    ids = family.source.ids(TEXTS[1])
    a, b = direction(1), direction(2)
    with a.apply(family.source.model, 1.0, positions="all"), b.apply(family.source.model, 2.0, positions="all"):
        one, _ = hidden_states(family, ids)
    with b.apply(family.source.model, 2.0, positions="all"), a.apply(family.source.model, 1.0, positions="all"):
        other, _ = hidden_states(family, ids)
    close(one, other)


def test_steerings_at_two_layers_both_act(llama: Case) -> None:
    ids = llama.source.ids(TEXTS[0])
    low, high = direction(1, Site(0)), direction(2, Site(1))
    with low.apply(llama.source.model, 1.0, positions="all"):
        only_low = llama.source.hidden(ids, 2)
        with high.apply(llama.source.model, 1.0, positions="all"):
            both = llama.source.hidden(ids, 2)
    wide = only_low.double()
    close(both, (wide + wide.norm(dim=-1, keepdim=True) * high.vector.double() / high.vector.double().norm()).float())


# -- identities ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("positions", ["generated", "all", 0], ids=str)
def test_strength_0_and_the_zero_vector_are_bitwise_the_identity(family: Case, positions: Any) -> None:
    ids = family.source.ids(TEXTS[0])
    before = hidden_states(family, ids)
    v = direction(1)
    zero = SteeringVector(torch.zeros(D_MODEL), Site(LAYER))
    for sv, strength in ((v, 0), (v, 0.0), (zero, 5.0), (v - v, 5.0), (0 * v, 1.0)):
        with sv.apply(family.source.model, strength, positions=positions):
            after = hidden_states(family, ids)
        assert torch.equal(after[0], before[0])
        assert torch.equal(after[1], before[1])


def test_a_vector_and_its_opposite_cancel_bitwise(family: Case) -> None:
    ids = family.source.ids(TEXTS[0])
    before = hidden_states(family, ids)
    v = direction(1)
    with v.apply(family.source.model, 1.5, positions="all"), (-v).apply(family.source.model, 1.5, positions="all"):
        after = hidden_states(family, ids)
    assert torch.equal(after[1], before[1])


def test_only_the_direction_of_a_vector_counts(llama: Case) -> None:
    ids = llama.source.ids(TEXTS[0])
    found = []
    for size in (1e-30, 1.0, 1e30):
        with direction(1, size=size).apply(llama.source.model, 2.0, positions="all"):
            found.append(hidden_states(llama, ids)[0])
    close(found[0], found[1])
    close(found[2], found[1])


# -- no trace ------------------------------------------------------------------------------------------------


def test_the_model_is_bit_for_bit_as_before_after_use(family: Case) -> None:
    ids = family.source.ids(TEXTS[0])
    model = family.source.model
    before, names = hidden_states(family, ids), list(model.state_dict())
    unsteered = traces(model)
    with direction(1).apply(model, 2.0) as same:
        assert same is model
        assert list(model.state_dict()) == names
        assert traces(model) != unsteered
        hidden_states(family, ids)
    assert traces(model) == unsteered
    after = hidden_states(family, ids)
    assert torch.equal(after[0], before[0])
    assert torch.equal(after[1], before[1])


def test_the_model_is_bit_for_bit_as_before_after_an_exception(family: Case) -> None:
    ids = family.source.ids(TEXTS[0])
    model = family.source.model
    before = hidden_states(family, ids)
    unsteered = traces(model)

    def outside() -> None:
        with direction(1).apply(model, 2.0):
            raise KeyboardInterrupt

    def inside() -> None:
        with direction(1).apply(model, 2.0), direction(2).apply(model, 2.0, positions=[10_000]):
            hidden_states(family, ids)

    with pytest.raises(KeyboardInterrupt):
        outside()
    with pytest.raises(PositionError):
        inside()
    assert traces(model) == unsteered
    after = hidden_states(family, ids)
    assert torch.equal(after[0], before[0])
    assert torch.equal(after[1], before[1])


def test_steerings_may_end_in_any_order(llama: Case) -> None:
    ids = llama.source.ids(TEXTS[0])
    model = llama.source.model
    hidden_states(llama, ids)
    unsteered = traces(model)
    a, b = direction(1), direction(2)
    with b.apply(model, 2.0, positions="all"):
        only_b = hidden_states(llama, ids)[0]
    first, second = ExitStack(), ExitStack()
    first.enter_context(a.apply(model, 1.0, positions="all"))
    second.enter_context(b.apply(model, 2.0, positions="all"))
    first.close()
    assert torch.equal(hidden_states(llama, ids)[0], only_b)
    second.close()
    assert traces(model) == unsteered


# -- generation ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("positions", ["generated", "all", [1, -1]], ids=str)
def test_generation_with_a_cache_equals_generation_without(family: Case, positions: Any) -> None:
    ids = torch.tensor([family.source.ids(TEXTS[0])])
    model = family.source.model
    plain = generate(model, ids)
    with direction(3).apply(model, 4.0, positions=positions):
        cached = generate(model, ids)
        uncached = generate(model, ids, cache=False)
    assert cached == uncached
    assert cached != plain
    assert generate(model, ids) == plain


def test_generated_steers_the_last_prompt_token_and_every_new_one(family: Case) -> None:
    """Greedy by hand: the whole sequence each time, the formula applied from the last prompt position on."""
    ids = family.source.ids(TEXTS[0])
    sv, steps = direction(3), 6
    with sv.apply(family.source.model, 3.0):
        (found,) = generate(family.source.model, torch.tensor([ids]), steps=steps)
    sequence = list(ids)
    for _ in range(steps):
        with sv.apply(family.source.model, 3.0, positions=list(range(len(ids) - 1, len(sequence)))):
            _, logits = hidden_states(family, sequence)
        sequence.append(int(logits[-1].argmax()))
    assert found == sequence[len(ids) :]


@pytest.mark.parametrize("positions", ["generated", "all", 1, -1, [0, -2]], ids=str)
def test_a_left_padded_batch_equals_one_prompt_at_a_time(family: Case, positions: Any) -> None:
    check_left_padding(family, positions)


def check_left_padding(family: Case, positions: Any) -> None:
    model = family.source.model
    prompts = [family.source.ids(t) for t in (TEXTS[0], TEXTS[3], "the cat")]
    longest = max(map(len, prompts))
    ids = torch.tensor([[1] * (longest - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts])
    places = (mask.cumsum(dim=1) - 1).clamp(min=0)  # what `generate` passes; learned positions (GPT-2) need it
    with direction(3).apply(model, 4.0, positions=positions), torch.no_grad():
        logits = model(input_ids=ids, attention_mask=mask, position_ids=places).logits[:, -1]
        singly = torch.stack([hidden_states(family, p)[1][-1] for p in prompts])
        together = generate(model, ids, mask)
        alone = [generate(model, torch.tensor([p]))[0] for p in prompts]
    unsteered = torch.stack([hidden_states(family, p)[1][-1] for p in prompts])
    assert bool(((singly - unsteered).abs().amax(dim=-1) > 1e-2).all())
    close(logits, singly)
    assert together == alone


@pytest.mark.parametrize("half", ["_listen", "_look"])
def test_padding_that_is_counted_as_text_is_seen(
    make_case: Callable[..., Case], monkeypatch: pytest.MonkeyPatch, half: str
) -> None:
    """Sabotage: the wrapper's mask is not listened to, or the mask that any trunk is given is not looked at."""
    spec = Spec("gemma3", wrapper=True) if half == "_listen" else Spec("llama")
    original = getattr(_SteeredBlock, half)

    def deaf(self: Any, module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        original(self, module, args, {k: v for k, v in kwargs.items() if k != "attention_mask"})

    monkeypatch.setattr(_SteeredBlock, half, deaf)
    if half == "_look":
        monkeypatch.setattr(_SteeredBlock, "_listen", lambda *_: None)
    with pytest.raises(AssertionError):
        check_left_padding(make_case(spec), 1)


def test_one_context_serves_several_generations(family: Case) -> None:
    model = family.source.model
    first, second = (torch.tensor([family.source.ids(t)]) for t in (TEXTS[0], TEXTS[1]))
    with direction(3).apply(model, 4.0):
        a, b = generate(model, first), generate(model, second)
        again = generate(model, first)
    with direction(3).apply(model, 4.0):
        fresh = generate(model, second)
    assert a == again
    assert b == fresh


def test_sampling_several_sequences_of_one_prompt_runs_steered(llama: Case) -> None:
    ids = torch.tensor([llama.source.ids(TEXTS[0])])
    with direction(3).apply(llama.source.model, 4.0), torch.no_grad():
        out = llama.source.model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=4,
            num_beams=2,
            do_sample=False,
            num_return_sequences=2,
            pad_token_id=1,
        )
    assert out.shape[0] == 2


# -- the front door ------------------------------------------------------------------------------------------


def test_a_steering_vector_is_the_difference_of_two_directions(case: Case) -> None:
    sv = case.nla.steering_vector(to="the cat", minus="a dog")
    a, b = (case.ar.vector(t).double() for t in ("the cat", "a dog"))
    close(sv.vector, (a / a.norm() - b / b.norm()).float())
    alone = case.nla.steering_vector("the cat")
    close(alone.vector, (a / a.norm()).float())
    assert sv.site == case.pair.site
    assert sv.note == "the cat - a dog"
    assert case.nla.steering_vector("the cat", "the cat").is_zero


def test_the_source_of_a_pair_is_steered_like_any_model(family: Case) -> None:
    ids = torch.tensor([family.source.ids(TEXTS[0])])
    sv = family.nla.steering_vector(to="the cat", minus="a dog")
    with sv.apply(family.nla.source.loaded.model, 3.0):
        mine = generate(family.nla.source.loaded.model, ids)
    with sv.apply(family.source.model, 3.0):
        theirs = generate(family.source.model, ids)
    assert mine == theirs
