"""Strangers' YAML: refused where it would run, explode or mislead, and nothing in it executed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from strangers import names, values

from nla_hub import yaml_io
from nla_hub.errors import SidecarError
from nla_hub.sidecar import Sidecar


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("role: !!python/object/apply:os.system ['touch {there}']", "could not determine a constructor"),
        ("role: !!python/object/new:os.system [touch {there}]", "could not determine a constructor"),
        ("role: !!python/name:os.system ''", "could not determine a constructor"),
        ("role: !mine av", "could not determine a constructor"),
        (
            "a: &a [x,x]\n"
            + "".join(f"{c}: &{c} [*{p},*{p},*{p},*{p}]\n" for p, c in zip("abcdefgh", "bcdefghi", strict=True)),
            "nodes once its anchors are expanded",
        ),
        ("a: &a [*a]", "contains itself"),
        ("a: &a {b: {c: *a}}", "contains itself"),
        ("role: av\nrole: ar", "'role' stands twice (line 2)"),
        ("tokens: {x: 1, x: 2}", "'x' stands twice"),
        ("", "the file is empty"),
        ("- a\n- b", "A mapping with named keys"),
        ("just text", "A mapping with named keys"),
        ("1: a", "A mapping with named keys"),
        ("a: b: c", "mapping values are not allowed"),
        ("a: [1, 2", "while parsing"),
        ("a: 1\n---\nb: 2", "expected a single document"),
        ("? [a, b]\n: 1", "unhashable key"),
        ("a: 2024-99-99", "month must be"),
        ("a: " + "9" * 5000, "a number of 5000 digits"),
        ("a: 0x" + "f" * 5000, "a number of 5002 digits"),
        ("a: " + "[" * 1200 + "]" * 1200, "recursion"),
        ("a: " + "x" * 1_000_001, "more than 1000000"),
        ("a: \x07", "special characters are not allowed"),
        ("a: !!float ''", "does not fit its tag"),
        ("a: !!int ''", "does not fit its tag"),
        ("a: !!int '-'", "does not fit its tag"),
        ("a: !!bool maybe", "does not fit its tag"),
        ("a: !!timestamp soon", "does not fit its tag"),
        ("a: !!float " + ":".join(["59"] * 2000), "does not fit its tag"),
        ("a: !!omap {x: 1}", "expected a sequence"),
        ("a: {<<: 5}", "expected a mapping"),
    ],
)
def test_hostile_yaml_is_refused_and_nothing_runs(tmp_path: Path, text: str, words: str) -> None:
    there = tmp_path / "executed"
    path = tmp_path / "nla_meta.yaml"
    path.write_text(text.replace("{there}", str(there)), encoding="utf-8")
    with pytest.raises(SidecarError) as caught:
        Sidecar.read(tmp_path)
    assert words in str(caught.value)
    assert str(path) in str(caught.value)
    assert len(str(caught.value)) < 2000
    assert not there.exists()


@pytest.mark.parametrize("data", [b"\x80\x02}q\x00.", b"\xff\xfe\x00\x00", bytes(range(256))])
def test_binary_files_are_refused(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "nla_meta.yaml").write_bytes(data)
    with pytest.raises(SidecarError, match="binary data"):
        Sidecar.read(tmp_path)


def test_a_huge_file_is_refused_without_being_read(tmp_path: Path) -> None:
    with (tmp_path / "nla_meta.yaml").open("wb") as file:
        file.truncate(3 << 40)  # sparse: three terabytes on paper, nothing on disk
    with pytest.raises(SidecarError, match="more than 1000000"):
        Sidecar.read(tmp_path)


def test_yaml_that_an_alias_merely_repeats_is_read() -> None:
    assert yaml_io.loads("a: &x {b: 1}\nc: *x", where="x", error=SidecarError) == {"a": {"b": 1}, "c": {"b": 1}}


def test_sets_are_written_in_one_order() -> None:
    text = yaml_io.dumps({"a": {"c", "b", "d", 1}})
    assert text == yaml_io.dumps({"a": {"d", 1, "c", "b"}})
    assert [line.split()[0] for line in text.splitlines()[1:]] == ["1:", "b:", "c:", "d:"]
    assert yaml_io.loads(text, where="x", error=SidecarError) == {"a": {"b", "c", "d", 1}}


@given(st.dictionaries(names, values, min_size=1, max_size=5))
def test_yaml_comes_back_as_it_was_written(value: dict[str, Any]) -> None:
    assert yaml_io.loads(yaml_io.dumps(value), where="x", error=SidecarError) == value
