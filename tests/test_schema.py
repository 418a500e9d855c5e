"""schema.py: strict, complete in its faults, and the inverse of itself."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nla_hub import yaml_io
from nla_hub.errors import NLAError, RecipeError
from nla_hub.schema import apply_overrides, from_mapping, to_mapping


@dataclass(frozen=True)
class Optimiser:
    lr: float
    schedule: Literal["cosine", "linear"] = "cosine"
    betas: tuple[float, float] = (0.9, 0.999)
    warmup: int = 0

    def faults(self) -> Iterator[str]:
        if self.lr <= 0:
            yield f"lr: got {self.lr}, expected a positive number"


@dataclass(frozen=True)
class Run:
    name: str
    optimiser: Optimiser
    steps: int = 10
    keep: bool = True
    note: str | None = None
    sizes: tuple[int, ...] = ()
    tags: list[str] = field(default_factory=list)
    extra: dict[str, Optimiser] = field(default_factory=dict)
    second: Optimiser | None = None
    length: int | Literal["all"] = "all"
    free: Any = None


def faults_of(mapping: dict[str, Any], kind: type[Any] = Run) -> list[str]:
    with pytest.raises(RecipeError) as caught:
        from_mapping(kind, mapping, where="x.yaml")
    return list(caught.value.faults)


def test_reads_defaults_and_nested_values() -> None:
    run = from_mapping(
        Run,
        {"name": "a", "optimiser": {"lr": 1, "betas": [0, 0.5]}, "sizes": [1, 2], "extra": {"b": {"lr": 0.5}}},
    )
    assert run == Run("a", Optimiser(1.0, betas=(0.0, 0.5)), sizes=(1, 2), extra={"b": Optimiser(0.5)})
    assert isinstance(run.optimiser.lr, float)


def test_all_faults_at_once_each_with_its_path() -> None:
    found = faults_of(
        {
            "nmae": "a",
            "optimiser": {"lr": "fast", "schedule": "cosin", "betas": [1]},
            "steps": 1.5,
            "keep": "yes",
            "sizes": [1, "two"],
            "extra": {"b": {"lr": None}},
        }
    )
    assert found == [
        "nmae: unknown key; did you mean 'name'?",
        "name: missing (expected text)",
        "optimiser.lr: got 'fast', expected a number",
        "optimiser.schedule: got 'cosin', expected 'cosine' or 'linear'; did you mean 'cosine'?",
        "optimiser.betas: got [1], expected a list of 2 (a number, a number)",
        "steps: got 1.5, expected a whole number",
        "keep: got 'yes', expected true or false",
        "sizes[1]: got 'two', expected a whole number",
        "extra.b.lr: got null, expected a number",
    ]


def test_message_names_the_file_and_counts() -> None:
    with pytest.raises(RecipeError) as caught:
        from_mapping(Run, {}, where="my.yaml", next_step="nla-hub recipes show tiny")
    text = str(caught.value)
    assert text.startswith("my.yaml: This recipe has 2 faults:")
    assert text.endswith("Next: nla-hub recipes show tiny")


def test_unknown_key_without_a_near_name_lists_the_known_ones() -> None:
    found = faults_of({"lr": 0.1, "zzz": 1}, Optimiser)
    assert found == ["zzz: unknown key; known: lr, schedule, betas, warmup"]


@pytest.mark.parametrize("value", [True, "3", 3.0, None, [3]])
def test_whole_numbers_are_only_that(value: object) -> None:
    assert len(faults_of({"name": "a", "optimiser": {"lr": 1}, "steps": value})) == 1


@pytest.mark.parametrize(
    ("text", "value"), [("1e-5", 1e-5), ("3E4", 3e4), ("-.5e+1", -5.0), ("2", 2.0), ("1.5e-3", 1.5e-3)]
)
def test_numbers_that_yaml_reads_as_text(text: str, value: float) -> None:
    @dataclass(frozen=True)
    class Plain:
        lr: float

    globals()["Plain"] = Plain
    assert from_mapping(Plain, yaml_io.loads(f"lr: {text}", where=None, error=RecipeError)).lr == value


@pytest.mark.parametrize("value", [float("nan"), float("inf"), True, "1e", "e5", "0x1", "1e5 m"])
def test_no_other_text_is_a_number(value: object) -> None:
    assert len(faults_of({"lr": value}, Optimiser)) == 1


def test_unions() -> None:
    base: dict[str, Any] = {"name": "a", "optimiser": {"lr": 1}}
    assert from_mapping(Run, {**base, "length": 3}).length == 3
    assert from_mapping(Run, {**base, "second": None}).second is None
    assert faults_of({**base, "length": "al"}) == ["length: got 'al', expected a whole number or 'all'"]
    assert faults_of({**base, "second": {"lr": "x"}}) == ["second.lr: got 'x', expected a number"]
    assert faults_of({**base, "second": 3}) == ["second: got 3, expected a mapping"]


def test_rules_of_the_dataclass_itself_are_faults_with_a_path() -> None:
    assert faults_of({"name": "a", "optimiser": {"lr": -1}}) == ["optimiser.lr: got -1.0, expected a positive number"]


def test_another_error_class() -> None:
    class MyError(NLAError):
        pass

    with pytest.raises(MyError):
        from_mapping(Run, {}, error=MyError)


def test_an_unsupported_field_type_is_our_own_mistake() -> None:
    @dataclass(frozen=True)
    class Odd:
        value: complex

    globals()["Odd"] = Odd
    with pytest.raises(TypeError, match="does not read"):
        from_mapping(Odd, {"value": 1})


# -- overrides -----------------------------------------------------------------------------------------------


def test_overrides() -> None:
    before: dict[str, Any] = {"rl": {"lr": 1.0, "steps": 3}, "names": ["a"]}
    after = apply_overrides(before, ["rl.lr=1e-5", "names=[b, c]", "new.deep.key=true", "rl.steps=null", "text=a=b"])
    assert after == {
        "rl": {"lr": "1e-5", "steps": None},
        "names": ["b", "c"],
        "new": {"deep": {"key": True}},
        "text": "a=b",
    }
    assert before == {"rl": {"lr": 1.0, "steps": 3}, "names": ["a"]}, "the original is not touched"


def test_override_reaches_a_float_field() -> None:
    mapping = apply_overrides({"name": "a", "optimiser": {"lr": 1.0}}, ["optimiser.lr=1e-5"])
    assert from_mapping(Run, mapping).optimiser.lr == 1e-5


def test_faulty_overrides_are_all_listed() -> None:
    with pytest.raises(RecipeError) as caught:
        apply_overrides(
            {"steps": 3}, ["steps", "=1", "a..b=1", "steps.x=1", "a=[1", "a=1\nb: 2", "fine=1", "x=!!python/name:os.x"]
        )
    faults = caught.value.faults
    assert len(faults) == 7
    assert "steps is 3, which has no keys" in faults[3]
    assert not any("fine" in fault for fault in faults)


# -- properties ----------------------------------------------------------------------------------------------

finite = st.floats(allow_nan=False, allow_infinity=False)
text = st.text(st.characters(codec="utf-8", exclude_categories=("Cs", "Cc")), max_size=8)
optimisers = st.builds(
    Optimiser,
    lr=st.floats(min_value=1e-300, max_value=1e300),
    schedule=st.sampled_from(["cosine", "linear"]),
    betas=st.tuples(finite, finite),
    warmup=st.integers(),
)
runs = st.builds(
    Run,
    name=text,
    optimiser=optimisers,
    steps=st.integers(),
    keep=st.booleans(),
    note=st.none() | text,
    sizes=st.lists(st.integers(), max_size=3).map(tuple),
    tags=st.lists(text, max_size=3),
    extra=st.dictionaries(text, optimisers, max_size=2),
    second=st.none() | optimisers,
    length=st.integers() | st.just("all"),
    free=st.none() | st.integers() | text,
)


@given(runs)
def test_there_and_back_through_yaml(run: Run) -> None:
    mapping = to_mapping(run)
    assert from_mapping(Run, mapping) == run
    assert from_mapping(Run, yaml_io.loads(yaml_io.dumps(mapping), where=None, error=RecipeError)) == run


junk = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | text,
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(text | st.sampled_from(["lr", "name", "optimiser"]), inner)
    ),
    max_leaves=8,
)


@given(st.dictionaries(st.sampled_from([*Run.__dataclass_fields__, "unknown"]), junk))
def test_any_mapping_is_read_or_refused_with_reasons(mapping: dict[str, Any]) -> None:
    try:
        run = from_mapping(Run, mapping)
    except RecipeError as error:
        reasons: tuple[str, ...] | None = error.faults
    else:
        reasons = None
        assert set(mapping) <= set(Run.__dataclass_fields__)
        assert from_mapping(Run, to_mapping(run)) == run
    assert reasons is None or reasons


@given(runs, st.sampled_from(["steps", "optimiser.warmup", "second.warmup"]), st.integers())
def test_an_override_changes_that_key_alone(run: Run, path: str, number: int) -> None:
    before = to_mapping(run)
    after = apply_overrides(before, [f"{path}={number}"])
    head, _, tail = path.partition(".")
    changed = after[head][tail] if tail else after[head]
    assert changed == number
    assert {k: v for k, v in after.items() if k != head} == {k: v for k, v in before.items() if k != head}
