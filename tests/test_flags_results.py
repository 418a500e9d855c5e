"""Flags, and what the SDK returns: tables, files and pages of explanations."""

from __future__ import annotations

import builtins
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from nla_hub.errors import InputError, MissingExtraError
from nla_hub.flags import is_repetitive, mostly_cjk, row_flags
from nla_hub.geometry import Reference
from nla_hub.results import COLUMNS, Explanation, Explanations
from nla_hub.sidecar import ReferenceRecord

RECORD = ReferenceRecord("x", 100, 0.7, 0.9, 2.0, 50.0)
ROWS = (
    Explanation(
        "the cat", "<explanation>the cat</explanation>", "ok", 3.5, 0.9, 0.2, ("early",), "d1", 3, " cat", 0, "m", "r"
    ),
    Explanation(
        None, "<script>alert(1)</script>", "no_tags", 4.0, flags=("a", "b"), doc_id="d2", position=12, token="<&>"
    ),
    Explanation("a <b>dog</b> & é ㊥", "x", "ok", 2.0, 0.1, 1.8),
)


def flags(**changes: Any) -> tuple[str, ...]:
    return row_flags(**{"text": "the cat sees a house", "norm": 10.0, "position": 20, "reference": RECORD} | changes)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, ()),
        ({"position": 0}, ("early",)),
        ({"position": 9}, ("early",)),
        ({"position": 10}, ()),
        ({"position": None}, ()),
        ({"position": -1}, ()),
        ({"special": True}, ("special_token",)),
        ({"norm": 1.99}, ("norm_outlier",)),
        ({"norm": 50.01}, ("norm_outlier",)),
        ({"norm": 2.0}, ()),
        ({"norm": 1e9, "reference": None}, ()),
        ({"norm": 1e9, "reference": ReferenceRecord("x", 1, 0.7, 0.9)}, ()),
        ({"from_source": False, "position": None}, ("off_distribution",)),
        ({"text": "the character ㊥", "marker": "㊥"}, ("marker_echo",)),
        ({"text": "the character ㊥", "marker": "㊥", "context": "what is ㊥"}, ()),
        ({"text": "这是一个故事"}, ("marker_echo",)),
        ({"text": "这是一个故事", "context": "中文故事"}, ()),
        ({"text": "この猫"}, ("marker_echo",)),
        ({"text": "the cat 猫"}, ()),
        ({"text": "the cat " * 10}, ("repetitive",)),
        ({"text": "the cat " * 4}, ()),
        ({"text": None}, ()),
        ({"text": None, "position": 3, "special": True, "norm": 0.1}, ("early", "special_token", "norm_outlier")),
    ],
)
def test_flags_warn_about_what_they_name(changes: dict[str, Any], expected: tuple[str, ...]) -> None:
    assert flags(**changes) == expected


def test_words_and_scripts_are_told_apart() -> None:
    assert not mostly_cjk("")
    assert not mostly_cjk("... 123")
    assert mostly_cjk("한국어 no")
    assert not mostly_cjk("한국어 text")
    assert not is_repetitive("")


def test_a_table_has_the_columns_in_order() -> None:
    frame = Explanations(ROWS).to_pandas()
    assert tuple(frame.columns) == COLUMNS
    assert frame["text"].tolist()[0] == "the cat"
    assert frame["status"].tolist() == ["ok", "no_tags", "ok"]
    assert tuple(Explanations(()).to_pandas().columns) == COLUMNS


def test_json_holds_every_column_and_nothing_made_up() -> None:
    data = json.loads(json.dumps(ROWS[1].to_dict()))
    assert tuple(data) == COLUMNS
    assert data["text"] is None
    assert data["cosine"] is None
    assert data["mse"] is None
    assert data["flags"] == ["a", "b"]


def test_a_parquet_file_comes_back(tmp_path: Path) -> None:
    path = Explanations(ROWS).to_parquet(tmp_path / "rows.parquet")
    table = pq.read_table(path)
    assert tuple(table.column_names) == COLUMNS
    assert table.to_pylist() == [row.to_dict() for row in ROWS]
    assert [p.name for p in tmp_path.iterdir()] == ["rows.parquet"]


def test_nothing_half_written_stays_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(table: Any, where: Any, *args: Any, **kwargs: Any) -> None:
        Path(where).write_bytes(b"PAR1 half")
        raise OSError("disk full")

    monkeypatch.setattr(pq, "write_table", fail)
    with pytest.raises(OSError, match="disk full"):
        Explanations(ROWS).to_parquet(tmp_path / "rows.parquet")
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(InputError, match="no such directory"):
        Explanations(ROWS).to_parquet(tmp_path / "absent" / "rows.parquet")


class Page(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        assert not any(key.startswith("on") or key in ("src", "href") for key, _ in attrs)

    def handle_data(self, data: str) -> None:
        self.text += data


def test_a_page_is_self_contained_and_everything_is_escaped(tmp_path: Path) -> None:
    html = Explanations(ROWS, Reference("x", 5, 0.7, 0.9)).to_html(tmp_path / "page.html")
    assert (tmp_path / "page.html").read_text(encoding="utf-8") == html
    page = Page()
    page.feed(html)
    assert not set(page.tags) & {"script", "b", "img", "link", "iframe"}
    assert "a <b>dog</b> & é ㊥" in page.text
    assert "<script>alert(1)</script>" in page.text
    assert "FVE (raw variance, x, n=3)" in page.text
    assert "1 no_tags, 2 ok" in page.text
    assert not re.search(r"https?://", html)


def test_a_notebook_shows_a_table() -> None:
    html = Explanations(ROWS)._repr_html_()
    assert html.count("<tr") == 4
    many = Explanations(ROWS * 100)._repr_html_()
    assert "and 100 more rows" in many


def test_a_missing_extra_names_its_install_line(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without_pandas(name: str, *args: Any, **kwargs: Any) -> Any:
        if name == "pandas":
            raise ImportError("No module named 'pandas'")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without_pandas)
    with pytest.raises(MissingExtraError, match=r"needs the package 'pandas'.*\n.*pip install 'nla-hub\[viz\]'"):
        Explanations(ROWS).to_pandas()


def test_explanations_are_a_sequence_with_counts() -> None:
    rows = Explanations(ROWS, Reference("x", 5, 0.7, 0.9))
    assert len(rows) == 3
    assert rows[0] is ROWS[0]
    assert rows[-1] is ROWS[-1]
    assert isinstance(rows[1:], Explanations)
    assert list(rows[1:]) == list(ROWS[1:])
    assert rows[1:].reference == rows.reference
    assert rows.counts() == {"ok": 2, "no_tags": 1}
    assert rows.fve().value == pytest.approx(1 - (0.2 + 2 + 1.8) / 3 / 0.7)
    assert rows.scores.mean_cosine() == pytest.approx((0.9 + 0 + 0.1) / 3)


def test_rows_print_what_they_say_or_why_they_do_not() -> None:
    assert str(ROWS[0]) == "the cat [cosine 0.900]"
    assert str(ROWS[1]) == "(no_tags)"
