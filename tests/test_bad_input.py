"""Bad input at the front door: typed errors before any model runs."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from conftest import Case
from test_nla import rows, scripted

from nla_hub import NLA
from nla_hub.errors import InputError, TextError, VectorError
from nla_hub.sidecar import Site
from nla_hub.testing import D_MODEL


@pytest.fixture
def untouched(llama: Case, monkeypatch: pytest.MonkeyPatch) -> NLA:
    """A pair whose engine must not run."""
    nla = scripted(llama, "never")
    monkeypatch.setattr(nla.av.engine, "generate", lambda *_, **__: pytest.fail("the engine ran"))
    return nla


@pytest.mark.parametrize(
    ("vectors", "message"),
    [
        (torch.ones(3, D_MODEL + 1), r"expected \[..., 64\]"),
        (torch.ones(D_MODEL, dtype=torch.int64), "dtype int64"),
        ([[1] * D_MODEL], "dtype int64"),
        (torch.zeros(2, D_MODEL), "row 0: zero"),
        (torch.full((D_MODEL,), math.nan), "row 0: NaN"),
        (torch.cat([torch.ones(3, D_MODEL), torch.full((1, D_MODEL), math.inf)]), "row 3: infinite"),
        ("the cat", "not numbers"),
        (None, "not numbers"),
    ],
)
def test_bad_vectors_are_refused_before_anything_runs(untouched: NLA, vectors: Any, message: str) -> None:
    with pytest.raises(VectorError, match=message):
        untouched.verbalize(vectors)
    with pytest.raises(VectorError, match=message):
        untouched.score("the cat", vectors)


@pytest.mark.parametrize(
    "settings",
    [
        {"n": 0},
        {"n": 1.5},
        {"n": True},
        {"max_new_tokens": 0},
        {"max_new_tokens": "8"},
        {"batch_size": 0},
        {"batch_size": -3},
        {"temperature": -0.1},
        {"temperature": math.nan},
        {"temperature": math.inf},
        {"temperature": "hot"},
        {"temperature": None},
        {"keys": ["a"]},
        {"keys": ["a", "b", "c"]},
    ],
    ids=str,
)
def test_settings_out_of_range_are_refused_before_anything_runs(untouched: NLA, settings: dict[str, Any]) -> None:
    with pytest.raises(InputError):
        untouched.verbalize(rows(2), **settings)


@pytest.mark.parametrize("batch_size", [0, -1, 1.5, True, "8"])
def test_a_batch_size_out_of_range_is_refused_everywhere(llama: Case, batch_size: Any) -> None:
    with pytest.raises(InputError, match="batch_size"):
        llama.nla.capture("the cat", batch_size=batch_size)
    with pytest.raises(InputError, match="batch_size"):
        llama.nla.reconstruct("the cat", batch_size=batch_size)
    with pytest.raises(InputError, match="batch_size"):
        llama.nla.score("the cat", rows(1), batch_size=batch_size)


def test_all_texts_are_checked_before_the_first_model_call(llama: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    from nla_hub import capture as capture_module

    llama.nla.capture("the cat")
    monkeypatch.setattr(capture_module, "run_trunk", lambda *_, **__: pytest.fail("the model ran"))
    with pytest.raises(TextError, match="text 2"):
        llama.nla.explain(["the cat", "a dog", ""])


def test_vectors_of_another_site_are_refused(untouched: NLA, llama: Case) -> None:
    acts = replace(llama.nla.capture("the cat"), site=Site(1))
    with pytest.raises(InputError, match=r"another site.*got L1, expected L2"):
        untouched.verbalize(acts)


def test_numbers_of_texts_and_vectors_must_agree(llama: Case) -> None:
    with pytest.raises(InputError, match="got 2 texts and 3 vectors"):
        llama.nla.score(["the cat", "a dog"], rows(3))
    with pytest.raises(InputError, match="one explanation a vector"):
        llama.nla.score([["the cat"]], rows(1))  # type: ignore[list-item]
    with pytest.raises(TextError, match="The explanation is empty"):
        llama.nla.score([""], rows(1))
