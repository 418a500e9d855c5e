"""The AR reads the last real token behind its K+1 blocks, and nothing else."""

from __future__ import annotations

import pytest
import torch
from conftest import Case
from parity import TEXTS, check_reconstruct, close

from nla_hub.batching import last_real, pad_id_of, pad_right
from nla_hub.errors import ContextLengthError, InjectionError, TextError
from nla_hub.reconstructor import ARModel


def test_vectors_equal_an_independent_computation_in_padded_batches(case: Case) -> None:
    check_reconstruct(case)


@pytest.mark.parametrize("side", ["right", "left"])
def test_the_last_real_token_is_read_for_either_padding_side(family: Case, side: str) -> None:
    model: ARModel = family.nla.ar.model
    ids, mask = pad_right([family.ar.ids(text) for text in TEXTS], pad_id_of(family.ar.tokenizer))
    if side == "left":
        for row in range(len(ids)):
            shift = int((mask[row] == 0).sum())
            ids[row], mask[row] = ids[row].roll(shift), mask[row].roll(shift)
    assert bool((mask.sum(dim=1) < mask.shape[1]).any())
    with torch.no_grad():
        got = model(ids, mask)
    close(got, torch.stack([family.ar.vector(text) for text in TEXTS]))


@pytest.mark.parametrize("batch_size", [1, 3, 7])
def test_batch_size_order_and_repetition_do_not_change_vectors(case: Case, batch_size: int) -> None:
    texts = [*TEXTS, TEXTS[0], "the", "a cat"]
    expected = torch.stack([case.nla.reconstruct(t) for t in texts])
    close(case.nla.reconstruct(texts, batch_size=batch_size), expected)
    close(case.nla.reconstruct(texts[::-1], batch_size=batch_size), expected.flip(0))


def test_equal_texts_are_computed_once(llama: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    forward = ARModel.forward

    def spy(self: ARModel, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        seen.append(len(ids))
        return forward(self, ids, mask)

    monkeypatch.setattr(ARModel, "forward", spy)
    found = llama.nla.reconstruct(["the cat", "a dog", "the cat"])
    assert seen == [2]
    assert torch.equal(found[0], found[2])


def test_one_text_gives_one_vector_and_none_gives_none(llama: Case) -> None:
    assert llama.nla.reconstruct("the cat").shape == (64,)
    assert llama.nla.reconstruct(["the cat"]).shape == (1, 64)
    assert llama.nla.reconstruct([]).shape == (0, 64)


def test_the_trunk_has_exactly_the_blocks_that_reach_the_site_and_no_norm(family: Case) -> None:
    model = family.nla.ar.model
    assert len(model.adapter.block_list(model.trunk)) == family.pair.site.layer + 1
    assert isinstance(model.adapter.final_norm_module(model.trunk), torch.nn.Identity)
    assert model.head.weight.dtype == torch.float32


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "The explanation is empty"),
        (" \n", "The explanation is empty"),
        ("a \ud800 b", "lone surrogate"),
        (None, "An explanation is a text"),
        (7, "An explanation is a text"),
    ],
)
def test_an_unusable_text_is_refused_with_its_index(llama: Case, text: object, message: str) -> None:
    with pytest.raises(TextError, match=f"text 1: .*{message}"):
        llama.nla.reconstruct(["the cat", text])


def test_an_explanation_longer_than_the_ar_reads_is_refused(llama: Case) -> None:
    with pytest.raises(ContextLengthError, match=r"text 0: .*tokens with its prompt, expected at most 512"):
        llama.nla.reconstruct("the cat sees a house " * 200)


def test_last_real_is_the_last_attended_token() -> None:
    mask = torch.tensor([[1, 1, 0, 0], [0, 0, 1, 1], [0, 1, 1, 0], [1, 1, 1, 1]])
    assert last_real(mask).tolist() == [1, 3, 2, 3]
    with pytest.raises(InjectionError, match="without any attended token"):
        last_real(torch.tensor([[1, 0], [0, 0]]))
