"""Steering vectors as values: arithmetic, files, and what is no direction."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Case
from hypothesis import given
from hypothesis import strategies as st
from parity import TEXTS
from test_steering import direction, hidden_states, traces
from torch import Tensor

from nla_hub.errors import CheckpointError, InputError, PositionError, VectorError
from nla_hub.sidecar import Site
from nla_hub.steering import SteeringVector
from nla_hub.testing import LAYER


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


def test_vectors_can_be_compared_and_kept_in_sets() -> None:
    a, b = direction(1), direction(1)
    assert a == a
    assert a != b
    assert len({a, b}) == 2


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
