"""Errors: what a person reads."""

from __future__ import annotations

import inspect
import re

import pytest

from nla_hub import errors
from nla_hub.errors import (
    GateFailedError,
    MissingExtraError,
    NLAError,
    RecipeError,
    UnknownNameError,
    VectorError,
    did_you_mean,
)

CLASSES = [c for _, c in inspect.getmembers(errors, inspect.isclass) if issubclass(c, Exception)]


def test_all_parts_in_order() -> None:
    error = NLAError(
        "The width is wrong.",
        where="rows.npy",
        got=3,
        expected=4,
        next_step="nla-hub models show tiny",
        faults=["a", "b"],
    )
    assert str(error).splitlines() == [
        "rows.npy: The width is wrong (got 3, expected 4).",
        "  - a",
        "  - b",
        "  Next: nla-hub models show tiny",
    ]


def test_nothing_is_said_about_absent_parts() -> None:
    assert str(NLAError("The width is wrong.")) == "The width is wrong."
    assert str(NLAError("The width is wrong.", got=0)) == "The width is wrong (got 0)."


def test_key_errors_print_their_message_not_its_repr() -> None:
    assert str(UnknownNameError("recipe", "tinyy", ["tiny"])).splitlines() == [
        "No recipe is called 'tinyy'.",
        "  Next: did you mean 'tiny'?",
    ]


def test_without_a_near_name_the_known_ones_are_listed() -> None:
    assert "known: llama, tiny" in str(UnknownNameError("pair", "zzz", ["tiny", "llama"]))
    assert "none is registered" in str(UnknownNameError("pair", "zzz", []))


def test_missing_extra_prints_the_install_line() -> None:
    assert "pip install 'nla-hub[train]'" in str(MissingExtraError("trl", "train", needed_for="GRPO"))


def test_did_you_mean_ignores_case_and_is_silent_about_strangers() -> None:
    assert did_you_mean("QWEN2.5-7B", ["qwen2.5-7b", "tiny"]) == ["qwen2.5-7b"]
    assert did_you_mean("banana", ["qwen2.5-7b", "tiny"]) == []


@pytest.mark.parametrize("kind", CLASSES, ids=lambda kind: kind.__name__)
def test_one_tree_with_known_exit_codes(kind: type[Exception]) -> None:
    assert issubclass(kind, NLAError)
    assert kind.exit_code == (3 if kind is GateFailedError else 1)
    assert kind.__name__ in (errors.__doc__ or ""), "the tree at the top of errors.py shows every class"


def test_the_tree_shows_no_class_that_is_not_there() -> None:
    shown = set(re.findall(r"\b\w+Error\b", errors.__doc__ or "")) - {"ValueError", "KeyError", "ImportError"}
    assert shown == {kind.__name__ for kind in CLASSES}


def test_builtin_bases_are_caught_as_usual() -> None:
    for kind, builtin in ((VectorError, ValueError), (RecipeError, ValueError), (UnknownNameError, KeyError)):
        assert issubclass(kind, builtin)
    assert issubclass(MissingExtraError, ImportError)
