"""Steering is an exact formula at the output of block K, adds up, and leaves no trace."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Case, Spec
from hypothesis import given
from hypothesis import strategies as st
from parity import TEXTS, close
from torch import Tensor

from nla_hub.errors import CheckpointError, InputError, PositionError, VectorError
from nla_hub.sidecar import Site
from nla_hub.steering import SteeringVector, _SteeredBlock
from nla_hub.testing import D_MODEL, LAYER

POSITIONS: list[Any] = ["generated", "all", 2, -1, [0, -2], [1, 3, 3]]


def direction(seed: int, site: Site = Site(LAYER), size: float = 1.0) -> SteeringVector:
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


def generate(model: Any, ids: Tensor, mask: Tensor | None = None, *, steps: int = 10, cache: bool = True) -> list[list[int]]:
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
def test_the_output_of_block_k_is_the_formula_at_the_chosen_positions(family: Case, positions: Any, strength: float) -> None:
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


@given(st.lists(st.floats(-100, 100, width=32), min_size=4, max_size=4), st.floats(-8, 8, width=32))
def test_arithmetic_is_that_of_vectors(values: list[float], factor: float) -> None:
    v = SteeringVector(torch.tensor(values), Site(1), "base")
    w = SteeringVector(torch.arange(4.0), Site(1), "base")
    assert (v - v).is_zero
    assert (v + (-v)).is_zero
    assert (0 * v).is_zero
    assert torch.equal((v + w).vector, (w + v).vector)
    assert torch.equal((factor * v).vector, (v * factor).vector)
    assert torch.equal((-v).vector, (v * -1).vector)
    assert torch.equal(((v + w) - w).vector, v.vector + w.vector - w.vector)
    assert (v + w).site == Site(1)
    assert (v + w).base_model == "base"


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
    with direction(3).apply(model, 4.0, positions=positions), torch.no_grad():
        logits = model(input_ids=ids, attention_mask=mask).logits[:, -1]
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
            input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=4, num_beams=2, do_sample=False,
            num_return_sequences=2, pad_token_id=1,
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


def test_a_vector_comes_back_from_disk(tmp_path: Path) -> None:
    sv = SteeringVector(torch.randn(5), Site(3), "owner/base", "é ㊥")
    path = sv.save(tmp_path / "v.safetensors")
    again = SteeringVector.load(path)
    assert torch.equal(again.vector, sv.vector)
    assert (again.site, again.base_model, again.note) == (sv.site, sv.base_model, sv.note)
    assert [p.name for p in tmp_path.iterdir()] == ["v.safetensors"]


@pytest.mark.parametrize("damage", ["absent", "empty", "cut", "foreign", "no metadata", "list", "nan", "directory"])
def test_a_file_that_is_no_steering_vector_is_refused(tmp_path: Path, damage: str) -> None:
    from safetensors.torch import save_file

    path = tmp_path / "v.safetensors"
    direction(1).save(path)
    if damage == "absent":
        path.unlink()
    elif damage == "empty":
        path.write_bytes(b"")
    elif damage == "cut":
        path.write_bytes(path.read_bytes()[:-4])
    elif damage == "directory":
        path.unlink()
        path.mkdir()
    else:
        meta = {"foreign": {"nla_hub": "{}"}, "no metadata": None, "list": {"nla_hub": "[]"}}
        good = {"nla_hub": '{"layer": 1, "base": "", "note": ""}'}
        save_file({"vector": torch.full((3,), float("nan"))}, path, metadata=meta.get(damage, good))
    with pytest.raises(CheckpointError, match="no steering vector"):
        SteeringVector.load(path)


def test_saving_into_a_directory_that_is_not_there_is_a_typed_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="There is no such directory"):
        direction(1).save(tmp_path / "a" / "v.safetensors")


# -- bad input -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("vector", "error"),
    [
        (torch.ones(2, 64), InputError),
        (torch.tensor(1.0), InputError),
        (torch.ones(0), VectorError),
        (torch.full((64,), float("nan")), VectorError),
        (torch.full((64,), float("inf")), VectorError),
        (torch.ones(64, dtype=torch.int64), VectorError),
    ],
)
def test_what_is_no_direction_is_refused(vector: Tensor, error: type[Exception]) -> None:
    with pytest.raises(error):
        SteeringVector(vector, Site(1))


def test_vectors_of_different_sites_or_widths_do_not_add() -> None:
    with pytest.raises(InputError, match="one site of one model"):
        assert direction(1, Site(1)) + direction(1, Site(2))
    with pytest.raises(InputError, match="one site of one model"):
        assert direction(1) - SteeringVector(torch.ones(3), Site(LAYER))


def test_a_vector_of_another_width_or_layer_is_refused(family: Case) -> None:
    unsteered = traces(family.source.model)
    with pytest.raises(InputError, match=r"differ in width \(got 3, expected 64\)"):
        SteeringVector(torch.ones(3), Site(1)).apply(family.source.model, 1.0).__enter__()
    with pytest.raises(CheckpointError, match="no such layer"):
        direction(1, Site(9)).apply(family.source.model, 1.0).__enter__()
    assert traces(family.source.model) == unsteered


@pytest.mark.parametrize("strength", [float("nan"), float("inf"), "2", None, True])
def test_a_strength_that_is_no_number_is_refused(llama: Case, strength: Any) -> None:
    with pytest.raises(InputError, match="strength is a finite number"):
        direction(1).apply(llama.source.model, strength).__enter__()


@pytest.mark.parametrize("positions", ["last", "", [1.5], [True], None, 2.0, [[1]]])
def test_positions_that_are_none_are_refused(llama: Case, positions: Any) -> None:
    with pytest.raises(InputError, match=r"word for positions|whole numbers"):
        direction(1).apply(llama.source.model, 1.0, positions=positions).__enter__()


@pytest.mark.parametrize("position", [6, -7, [0, 100]])
def test_a_position_that_the_prompt_does_not_have_is_refused(family: Case, position: Any) -> None:
    ids = family.source.ids(TEXTS[0])[:6]
    with (
        direction(1).apply(family.source.model, 1.0, positions=position),
        pytest.raises(PositionError, match=r"no such token.*expected 0 to 5"),
    ):
        hidden_states(family, ids)
