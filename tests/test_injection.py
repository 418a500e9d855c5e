"""Vectors enter the model exactly where and as the contract says."""

from __future__ import annotations

import pytest
import torch
from conftest import Case
from parity import check_logits, check_neighbours, close

from nla_hub.errors import InjectionError, VectorError
from nla_hub.injection import ADD_SITE, Injector, find_markers
from nla_hub.sidecar import Injection


def test_next_token_logits_equal_an_inputs_embeds_forward(speaker: Case, vectors: torch.Tensor) -> None:
    check_logits(speaker, vectors)


def test_a_marker_counts_only_between_its_neighbours(speaker: Case) -> None:
    check_neighbours(speaker)


def test_opposite_vectors_give_different_logits(speaker: Case, vectors: torch.Tensor) -> None:
    empty = torch.empty(1, 0, dtype=torch.long)
    a, b = speaker.av.logits(vectors[:1], empty), speaker.av.logits(-vectors[:1], empty)
    assert float((a.log_softmax(-1) - b.log_softmax(-1)).abs().max()) > 1e-2


def test_the_norm_of_a_vector_does_not_matter(speaker: Case, vectors: torch.Tensor) -> None:
    injector = speaker.nla.av.engine.av.injector
    close(injector.entering(vectors * 64), injector.entering(vectors))


def test_an_overwritten_row_has_the_norm_of_the_sidecar(architecture: Case, vectors: torch.Tensor) -> None:
    entering = architecture.nla.av.engine.av.injector.entering(vectors)
    assert entering.dtype == torch.float32
    close(entering.norm(dim=-1), torch.full((7,), 8.0))


def test_an_added_vector_enters_at_the_output_of_block_1() -> None:
    assert ADD_SITE.layer == 1


@pytest.mark.parametrize("size", [1e-38, 1e-30, 1e-20, 1e20, 1e38])
def test_vectors_at_the_ends_of_float32_keep_their_direction(llama: Case, size: float) -> None:
    direction = torch.randn(1, 64, generator=torch.Generator().manual_seed(3)).clamp(-2, 2)
    injector = llama.nla.av.engine.av.injector
    close(injector.entering(direction * size), injector.entering(direction))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 0.0])
def test_a_vector_without_direction_is_refused(speaker: Case, vectors: torch.Tensor, bad: float) -> None:
    vectors[3] = bad
    with pytest.raises(VectorError, match="zero, NaN or infinite"):
        speaker.nla.av.engine.av.injector.entering(vectors)


def test_null_scale_puts_the_raw_vector_in(llama: Case, vectors: torch.Tensor) -> None:
    injector = llama.nla.av.engine.av.injector
    raw = Injector(injector.adapter, Injection("overwrite", None), injector.marker)
    assert torch.equal(raw.entering(vectors), vectors)


def test_the_model_is_as_before_after_injection_and_after_an_exception(speaker: Case, vectors: torch.Tensor) -> None:
    engine = speaker.nla.av.engine
    model, prompt = engine.av.loaded.model, engine.av.prompt
    ids = torch.tensor([prompt.ids])
    columns = torch.tensor([prompt.marker_position])

    def forward() -> torch.Tensor:
        with torch.no_grad():
            return model(input_ids=ids, use_cache=False).logits

    before = forward()
    with engine.av.injector.inject(model, vectors[:1], columns):
        inside = forward()
    assert not torch.equal(before, inside)
    assert torch.equal(before, forward())

    def fail() -> None:
        with engine.av.injector.inject(model, vectors[:1], columns):
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        fail()
    assert torch.equal(before, forward())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_an_injection_that_never_happened_is_an_error(speaker: Case, vectors: torch.Tensor) -> None:
    engine = speaker.nla.av.engine
    model = engine.av.loaded.model

    def nothing() -> None:
        with engine.av.injector.inject(model, vectors[:1], torch.tensor([3])):
            pass

    with pytest.raises(InjectionError, match="never entered"):
        nothing()


def test_a_batch_with_another_number_of_rows_than_vectors_is_an_error(speaker: Case, vectors: torch.Tensor) -> None:
    engine = speaker.nla.av.engine
    model, prompt = engine.av.loaded.model, engine.av.prompt

    def mismatch() -> None:
        with engine.av.injector.inject(model, vectors[:2], torch.tensor([prompt.marker_position] * 2)), torch.no_grad():
            model(input_ids=torch.tensor([prompt.ids]), use_cache=False)

    with pytest.raises(InjectionError, match="differ in length"):
        mismatch()


def test_markers_in_a_completion_are_just_tokens(speaker: Case, vectors: torch.Tensor) -> None:
    """A whole prompt with a completion that spells marker and neighbours, in one pass as a trainer runs it."""
    engine = speaker.nla.av.engine
    marker, prompt = engine.av.injector.marker, engine.av.prompt
    completion = torch.tensor([[marker.left_id, marker.id, marker.right_id, marker.id]])
    ids = torch.cat([torch.tensor([prompt.ids]), completion], dim=1)
    columns = find_markers(ids, marker, prompt_length=len(prompt))
    assert columns.tolist() == [prompt.marker_position]
    with engine.av.injector.inject(engine.av.loaded.model, vectors[:1], columns), torch.no_grad():
        got = engine.av.loaded.model(input_ids=ids, use_cache=False).logits
    close(got[:, len(prompt) - 1 :], speaker.av.logits(vectors[:1], completion))
    with pytest.raises(InjectionError, match="holds 2 valid"):
        find_markers(ids, marker)


def test_decoding_with_a_cache_inside_the_context_injects_into_the_prompt_only(
    speaker: Case, vectors: torch.Tensor
) -> None:
    """As a trainer generates its rollouts: prompt pass and single-token passes all inside."""
    engine = speaker.nla.av.engine
    prompt = engine.av.prompt
    ids = torch.tensor([prompt.ids] * len(vectors))
    columns = torch.full((len(vectors),), prompt.marker_position)
    with engine.av.injector.inject(engine.av.loaded.model, vectors, columns), torch.no_grad():
        found = engine.av.loaded.model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, min_new_tokens=6, do_sample=False
        )[:, ids.shape[1] :]
    logits = speaker.av.logits(vectors, found)
    logits[:, :, speaker.av.tokenizer.eos_token_id] = float("-inf")
    logits[:, :, engine.av.loaded.model.generation_config.eos_token_id] = float("-inf")
    assert torch.equal(found, logits[:, :-1].argmax(dim=-1))
