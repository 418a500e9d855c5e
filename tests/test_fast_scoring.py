"""The AR in batches: similar lengths together, a common beginning once, and the vector of one text alone each time."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import pytest
import torch
from conftest import Case
from hypothesis import given
from hypothesis import strategies as st
from parity import TEXTS, close
from torch import nn

from nla_hub import reconstructor as module
from nla_hub.adapters import adapter_for
from nla_hub.batching import by_length, is_right_padded, pad_right, run_batches
from nla_hub.lora_roles import Roles
from nla_hub.parts import _RoleAR
from nla_hub.reconstructor import ARModel
from nla_hub.sidecar import Site
from nla_hub.testing import D_MODEL, LAYER, random_model

ALIKE = [f"{TEXTS[1]} {TEXTS[1]} {end}" for end in ("where", "who", *TEXTS)]
"""Texts whose first tokens are the same, more of them than the windows of the random Gemmas and Mistral (32)."""


@pytest.fixture
def shared(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Collects how many tokens of each pass ran once."""
    seen: list[int] = []
    read = ARModel._read

    def spy(self: ARModel, ids: torch.Tensor, common: int) -> torch.Tensor:
        seen.append(common)
        return read(self, ids, common)

    monkeypatch.setattr(ARModel, "_read", spy)
    return seen


# -- batches -------------------------------------------------------------------------------------------------


@given(st.lists(st.integers(1, 60), max_size=40), st.integers(1, 9), st.integers(1, 100))
def test_batches_are_of_similar_length_and_bounded(lengths: list[int], rows: int, tokens: int) -> None:
    batches = by_length(lengths, rows, tokens)
    order = [i for batch in batches for i in batch]
    assert sorted(order) == list(range(len(lengths)))
    assert [lengths[i] for i in order] == sorted(lengths)
    for batch in batches:
        padded = len(batch) * max(lengths[i] for i in batch)
        assert len(batch) == 1 or (len(batch) <= rows and padded <= tokens)
    for batch, after in pairwise(batches):  # no batch could have taken the next sequence too
        assert len(batch) == rows or (len(batch) + 1) * lengths[after[0]] > tokens


def refuse(limit: int, seen: list[int]) -> Any:
    """Work that runs out of memory with more than `limit` items."""

    def work(batch: Sequence[int]) -> list[int]:
        seen.append(len(batch))
        if len(batch) > limit:
            raise torch.OutOfMemoryError("not enough")
        return [-i for i in batch]

    return work


def test_out_of_memory_halves_this_batch_and_the_later_ones(caplog: pytest.LogCaptureFixture) -> None:
    seen: list[int] = []
    with caplog.at_level(logging.WARNING, "nla_hub"):
        done = list(run_batches([range(0, 8), range(8, 16), [16]], refuse(3, seen)))
    assert [i for batch, _ in done for i in batch] == list(range(17))
    assert all(result == [-i for i in batch] for batch, result in done)
    assert seen == [8, 4, 2, 2, 2, 2, 2, 2, 2, 2, 1]
    assert [r.getMessage() for r in caplog.records] == [
        f"out of memory: going on with {n} rows at a time" for n in (4, 2)
    ]


def test_one_item_that_does_not_fit_is_an_error() -> None:
    with pytest.raises(torch.OutOfMemoryError, match="not enough"):
        list(run_batches([range(4)], refuse(0, [])))


@pytest.mark.parametrize(
    ("mask", "right"),
    [
        ([[1, 1, 1]], True),
        ([[1, 0, 0], [1, 1, 0]], True),
        ([[0, 1, 1]], False),
        ([[1, 0, 1]], False),
        ([[1, 1, 0], [0, 1, 0]], False),
    ],
)
def test_right_padding_is_told_from_any_other(mask: list[list[int]], right: bool) -> None:
    assert is_right_padded(torch.tensor(mask)) is right


# -- vectors -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("worth", [0.0, 2.0], ids=["shared", "plain"])
def test_every_batch_gives_the_vectors_of_texts_alone(
    architecture: Case, worth: float, shared: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "WORTH_SHARING", worth)
    texts = [*TEXTS, *ALIKE, *(TEXTS[1][:n] for n in range(1, 40, 5))]
    expected = torch.stack([architecture.ar.vector(text) for text in texts])
    for batch_size in (1, 7, 64):
        close(architecture.nla.reconstruct(texts, batch_size=batch_size), expected)
    assert (max(shared) > 0) is (worth == 0.0)


def test_a_long_common_beginning_is_shared_unasked(architecture: Case, shared: list[int]) -> None:
    rows = [architecture.ar.ids(text) for text in ALIKE]
    close(architecture.nla.reconstruct(ALIKE), torch.stack([architecture.ar.vector(text) for text in ALIKE]))
    equal = next(n for n in range(len(rows[0])) if len({tuple(row[: n + 1]) for row in rows}) > 1)
    assert shared == [equal]
    assert equal > 32


def test_a_short_beginning_and_a_text_alone_take_the_plain_path(llama: Case, shared: list[int]) -> None:
    long = [f"{text} {' '.join(TEXTS)}" for text in TEXTS]
    llama.nla.reconstruct(long)
    llama.nla.reconstruct(ALIKE[0])
    assert shared == [0, 0]


def test_the_row_that_ends_first_keeps_a_token_of_its_own(llama: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "WORTH_SHARING", 0.0)
    model = llama.nla.ar.model
    ids = llama.ar.ids(TEXTS[1])
    rows = [ids[:5], ids[:9], ids]  # each is the beginning of the next
    with torch.no_grad():
        got = model(*pad_right(rows, 1))
        close(got, torch.cat([model(torch.tensor([row]), torch.ones(1, len(row), dtype=torch.long)) for row in rows]))


def test_changed_weights_are_never_answered_from_before(copied: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from nla_hub import NLA

    nla = NLA.from_pretrained(copied.root, components=("ar",))
    before = nla.reconstruct(ALIKE)
    with torch.no_grad():
        nla.ar.model.adapter.block_list(nla.ar.model.trunk)[0].self_attn.k_proj.weight.add_(0.3)
    after = nla.reconstruct(ALIKE)
    assert float((after - before).abs().max()) > 1e-3
    monkeypatch.setattr(module, "WORTH_SHARING", 2.0)
    close(after, nla.reconstruct(ALIKE))


def test_a_role_of_a_shared_base_shares_as_well(shared: list[int]) -> None:
    base = random_model("gemma3", 420)
    adapter = adapter_for(base.config)
    torch.manual_seed(0)
    head = nn.Linear(D_MODEL, D_MODEL, bias=False)
    roles = Roles(base, adapter)
    roles.add("ar", [])
    model = _RoleAR(adapter, base, head, roles, Site(LAYER), None).eval()
    ids = torch.randint(3, 420, (6, 50))
    ids[:, :40] = ids[0, :40]
    mask = torch.ones_like(ids)
    with torch.no_grad():
        got = model(ids, mask)
        hidden = base(input_ids=ids, output_hidden_states=True).hidden_states[LAYER + 1]
        close(got, head(hidden[:, -1]))
    assert shared == [40]


# -- gradients -----------------------------------------------------------------------------------------------


@pytest.fixture
def learner(copied: Any) -> ARModel:
    from nla_hub import NLA

    model: ARModel = NLA.from_pretrained(copied.root, components=("ar",)).ar.model
    return model.requires_grad_(True)


def test_gradients_of_a_padded_batch_are_those_of_its_rows(
    learner: ARModel, llama: Case, shared: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "WORTH_SHARING", 0.0)
    rows = [llama.ar.ids(text) for text in (*TEXTS, *ALIKE[:2])]

    def gradient(groups: list[list[list[int]]]) -> torch.Tensor:
        learner.zero_grad()
        with torch.enable_grad():
            for group in groups:
                learner(*pad_right(group, 1)).square().sum().backward()
        return torch.cat([p.grad.flatten() for p in learner.parameters() if p.grad is not None])

    close(gradient([rows]), gradient([[row] for row in rows]))
    assert set(shared) == {0}


def test_a_model_in_training_mode_takes_the_plain_path(
    learner: ARModel, shared: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Gradient checkpointing leaves out the cache without a word in that mode."""
    ids = torch.randint(3, 300, (6, 50))
    ids[:, :40] = ids[0, :40]
    with torch.no_grad():
        expected = learner.eval()(ids, torch.ones_like(ids))
        close(learner.train()(ids, torch.ones_like(ids)), expected)
    assert shared == [40, 0]


# -- memory --------------------------------------------------------------------------------------------------


def test_reconstruct_goes_on_with_smaller_batches(
    llama: Case, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    texts = [*TEXTS, *ALIKE]
    expected = llama.nla.reconstruct(texts)
    forward = ARModel.forward
    sizes: list[int] = []
    done: list[int] = []

    def scarce(self: ARModel, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        sizes.append(len(ids))
        if len(ids) > 3:
            raise torch.OutOfMemoryError("not enough")
        return forward(self, ids, mask)

    monkeypatch.setattr(ARModel, "forward", scarce)
    with caplog.at_level(logging.WARNING, "nla_hub"):
        close(llama.nla.ar.reconstruct(texts, progress=done.append), expected)
    assert max(sizes[2:]) <= 3
    assert sum(done) == len(texts)
    assert "out of memory" in caplog.text
