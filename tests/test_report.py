"""The report of a job: its text against the documents, its figures against plain sums, its bounds, its escaping."""

from __future__ import annotations

import base64
import hashlib
import html
import json
import math
import re
import sys
from dataclasses import asdict
from html.parser import HTMLParser
from itertools import chain, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from report_jobs import REFERENCE, made_up, of_text, real_rows, write_job

from nla_hub import NLA
from nla_hub.errors import InputError, MissingExtraError, RunError
from nla_hub.explain.result import JobResult
from nla_hub.explain.tally import Tally
from nla_hub.geometry import Reference
from nla_hub.report import choice, explanation_map, page, scale, table, write
from nla_hub.report import survey as survey_module
from nla_hub.report.explanation_map import AT_LEAST
from nla_hub.report.survey import POSITIONS, Bin, survey
from nla_hub.report.tokens import CLASSES, Gap, Token, pieces, token_class
from nla_hub.report.write import write_report
from nla_hub.results import Explanation, Explanations
from nla_hub.svg import Bars, bar_chart

HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(2)>\"'&<!--"


class Page(HTMLParser):
    """A page's tags and texts; refuses what could run, fetch or leave it."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.source = source
        self.scripts: list[tuple[dict[str, str | None], str]] = []
        self.styles: list[str] = []
        self.policy = ""
        self.text = ""
        self._open: list[tuple[str, dict[str, str | None]]] = []
        self.feed(source)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        own = dict(attrs)
        assert tag not in ("img", "iframe", "link", "object", "embed", "base")
        assert not any(name.startswith("on") or name in ("src", "style", "srcset") for name in own)
        assert (own.get("href") or "#").startswith("#")
        if own.get("http-equiv") == "Content-Security-Policy":
            self.policy = own["content"] or ""
        self._open.append((tag, own))

    def handle_endtag(self, tag: str) -> None:
        while self._open and self._open.pop()[0] != tag:
            pass

    def handle_data(self, data: str) -> None:
        tag, attributes = self._open[-1] if self._open else ("", {})
        if tag == "script":
            self.scripts.append((attributes, data))
        elif tag == "style":
            self.styles.append(data)
        else:
            self.text += data

    @property
    def data(self) -> dict[str, Any]:
        (found,) = [text for attributes, text in self.scripts if attributes.get("id") == "data"]
        assert "<" not in found
        loaded: dict[str, Any] = json.loads(found)
        return loaded


def opened(*outputs: Path, **settings: Any) -> Page:
    return Page(write_report(outputs, map_by=settings.pop("map_by", "off"), **settings).read_text(encoding="utf-8"))


def text_of(column: list[Any]) -> str:
    """What a reader sees of a document, gaps as so many dots."""
    return "".join("." * p if isinstance(p, int) else p if isinstance(p, str) else p[0] for p in column)


# -- the text of a document -----------------------------------------------------------------------------------


@given(st.data())
def test_the_text_of_a_document_comes_back_from_its_rows(data: st.DataObject) -> None:
    words = data.draw(
        st.lists(st.text(" ab\n\u00e9\u65e5\U0001f600.", min_size=0, max_size=90), min_size=1, max_size=12)
    )
    rows = of_text(words)
    for row in data.draw(st.lists(st.sampled_from(rows))):
        row["token"] = row["token"].strip()  # a tokenizer may leave the blank out of the token's text
    kept = sorted(data.draw(st.sets(st.integers(0, len(rows) - 1), min_size=1)))
    text, shown, previous = "".join(words), "", None
    for piece in pieces([rows[i] for i in kept]):
        if isinstance(piece, Gap):
            assert piece.characters > 0
            shown += text[len(shown) : len(shown) + piece.characters]
        elif isinstance(piece, str):
            shown += piece
        else:
            shown += piece.text
            position = piece.rows[0]["position"]
            if previous == position - 1:
                assert piece.text == words[position]
            previous = position
        assert text.startswith(shown)
    assert shown == text[: max(row["char_end"] for row in (rows[i] for i in kept))]


def test_text_is_only_unknown_further_back_than_a_row_reaches() -> None:
    rows = of_text(["x" * 150] * 10)
    found = list(pieces([rows[0], rows[5]]))
    assert found == [
        Token("x" * 150, 0, 150, 0, (rows[0],)),
        Gap(550),
        "x" * 50,
        Token("x" * 150, 750, 900, 0, (rows[5],)),
    ]
    whole = list(pieces(rows))
    assert not any(isinstance(piece, (Gap, str)) for piece in whole)


def test_tokens_without_text_of_their_own_are_kept_and_told_apart() -> None:
    rows = of_text(["", "", "\U0001f600", "", "a"], token=lambda i: ("<bos>", "<user>", "\ufffd", "\ufffd", "a")[i])
    found = [(p.text, p.end, p.order) for p in pieces(rows) if isinstance(p, Token)]
    assert found == [("", 0, 0), ("", 0, 1), ("\U0001f600", 1, 0), ("", 1, 1), ("a", 2, 0)]


def test_samples_of_a_token_stand_together() -> None:
    rows = [row | {"sample": s} for row in of_text(["a", "b"]) for s in (0, 1)]
    found = [piece for piece in pieces(rows) if isinstance(piece, Token)]
    assert [len(piece.rows) for piece in found] == [2, 2]


@pytest.mark.parametrize(
    ("token", "context", "special", "expected"),
    [
        ("<|bos|>", "", True, "special"),
        (" \n", "a \n", False, "whitespace"),
        (" ...", "so ...", False, "punctuation"),
        ("1,5", "is 1,5", False, "digits"),
        (" cat", "a cat", False, "word start"),
        ("cat", "a cat", False, "word start"),  # the tokenizer left the blank out
        ("cat", "cat", False, "word start"),
        ("cat", "(cat", False, "word start"),
        ("cat", "concat", False, "word continued"),
        ("\u00e9t\u00e9", "\u00e9t\u00e9", False, "word start"),
        ("\u65e5", "\u65e5", False, "other scripts"),
        ("\u043c\u0438\u0440", "\u043c\u0438\u0440", False, "other scripts"),
        ("\ufffd", "\u65e5", False, "other scripts"),
    ],
)
def test_classes_of_tokens(token: str, context: str, special: bool, expected: str) -> None:
    assert token_class(token, context, special=special) == expected
    assert expected in CLASSES


# -- figures over all rows ------------------------------------------------------------------------------------


def mixed_rows(documents: int = 40, *, length: int = 30) -> list[dict[str, Any]]:
    """Rows of every kind, with scores and norms from a fixed stream."""
    rows: list[dict[str, Any]] = []
    rng = np.random.default_rng(3)
    for d in range(documents):
        own = of_text(
            [f" w{i}" if i % 3 else "," for i in range(length)],
            document=d,
            first=len(rows),
            doc_id=f"doc-{d}",
            cosine=lambda i: float(rng.uniform(-0.2, 1)),
            norm=lambda i: float(rng.lognormal(3, 1)),
            text=lambda i, d=d: f"explanation {d} {i}",
            flags=lambda i: ["early"] if i < 10 else [],
        )
        rows += own
    for i in range(0, len(rows), 17):
        rows[i] |= {"status": "truncated", "text": None, "cosine": None, "mse": None}
    for i in range(5, len(rows), 101):
        rows[i] |= {
            "status": None,
            "text": None,
            "raw": None,
            "cosine": None,
            "mse": None,
            "error": "the vector is NaN",
        }
    return rows


def error_of(rows: Bin) -> float | None:
    return None if rows.mean_mse is None else rows.mean_mse / 0.8


def test_figures_are_those_of_all_rows(tmp_path: Path) -> None:
    rows = mixed_rows()
    result = JobResult.open(write_job(tmp_path / "out", rows, block=37))
    found = survey(result, rows=5, denominator=0.8)
    counted = [row for row in rows if row["status"] is not None]

    def mean(some: list[dict[str, Any]]) -> float:
        return sum(2.0 if row["mse"] is None else row["mse"] for row in some) / len(some) / 0.8

    assert (found.rows, found.documents) == (len(rows), 40)
    assert found.statuses == {
        "ok": sum(r["status"] == "ok" for r in rows),
        "truncated": sum(r["status"] == "truncated" for r in rows),
    }
    assert found.errors == {"the vector is NaN": sum(r["status"] is None for r in rows)}
    assert found.flags == {"early": 400}
    assert error_of(found.total) == pytest.approx(mean(counted))
    for start, end, one in zip(POSITIONS, [*POSITIONS[1:], math.inf], found.positions, strict=True):
        own = [row for row in counted if start <= row["position"] < end]
        assert one.n == len(own)
        assert error_of(one) == (pytest.approx(mean(own)) if own else None)
    commas = [row for row in counted if row["token"] == ","]
    assert found.classes["punctuation"].n == len(commas)
    assert error_of(found.classes["punctuation"]) == pytest.approx(mean(commas))
    scored = [row for row in rows if row["mse"] is not None]
    edges = [-1, *scale.EDGES, math.inf]
    assert found.steps == [sum(a <= r["mse"] / 0.8 < b for r in scored) for a, b in pairwise(edges)]
    ordered = sorted(scored, key=lambda row: row["mse"])
    assert [place.row for place in found.best] == [row["row"] for row in ordered[:5]]
    assert [place.row for place in found.worst] == [row["row"] for row in ordered[:-6:-1]]


def test_groups_by_norm_are_about_equal_and_hold_every_row(tmp_path: Path) -> None:
    rows = mixed_rows()
    found = survey(JobResult.open(write_job(tmp_path / "out", rows)), rows=1, denominator=1.0)
    groups = found.norm_quantiles()
    norms = [row["norm"] for row in rows if row["status"] is not None]
    assert len(groups) == 10
    assert sum(group.n for _, group in groups) == len(norms)
    tops = [top for top, _ in groups]
    assert tops == sorted(tops)
    assert tops[-1] == max(norms)
    for (low, _), (top, group) in zip([(0.0, None), *groups], groups, strict=False):
        assert group.n == sum(low < norm <= top for norm in norms)
        assert 0.7 * len(norms) / 10 < group.n < 1.3 * len(norms) / 10


def test_the_sketch_is_bounded_and_the_same_whatever_came_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [made_up(i, document=i, doc_id=f"d{i}", position=0) for i in range(300)]
    turned = [row | {"row": i, "document": i} for i, row in enumerate(rows[::-1])]
    whole = survey(JobResult.open(write_job(tmp_path / "whole", rows)), rows=1, denominator=1.0)
    monkeypatch.setattr(survey_module, "SKETCH", 20)
    found = [
        survey(JobResult.open(write_job(tmp_path / name, some)), rows=1, denominator=1.0)
        for name, some in (("a", rows), ("b", turned))
    ]
    assert [set(one.sketch) for one in found] == [set(sorted(whole.sketch)[:20])] * 2
    assert (whole.complete, found[0].complete) == (True, False)


def test_many_different_reasons_are_counted_without_being_kept(tmp_path: Path) -> None:
    rows = [made_up(i, status=None, raw=None, error=f"reason {i}") for i in range(250)]
    found = survey(JobResult.open(write_job(tmp_path / "out", rows)), rows=3, denominator=1.0)
    assert len(found.errors) == survey_module.REASONS + 1
    assert found.errors.total() == 250
    assert len(found.failed) == 3


def test_special_tokens_and_copies_are_not_among_the_worst(tmp_path: Path) -> None:
    rows = of_text(["a", "b", "c"], cosine=lambda i: (-0.9, -0.8, 0.1)[i])
    rows[0]["flags"] = ["special_token"]
    rows[1]["copy_of"] = 0
    page = opened(write_job(tmp_path / "out", rows))
    (lists,) = page.data["lists"]
    assert [page.data["rows"][i]["k"] for i in lists["worst"]] == ["c"]
    assert "1 of 1" in page.text


# -- what stands on the page ----------------------------------------------------------------------------------


def test_the_page_of_real_rows(tmp_path: Path) -> None:
    nla = NLA.from_pretrained("tiny")
    rows = real_rows(nla, 2, n=2)
    reference = nla.explain("a", temperature=0).reference
    assert reference is not None
    page = opened(write_job(tmp_path / "out", rows, config={"n": 2, "reference": asdict(reference)}))
    data = page.data
    from nla_hub.tiny import world

    documents = world.documents(2, 0, "eval")
    assert [text_of(d["columns"][0]) for d in data["documents"]] == [document.text for document in documents]
    tokens = [p for d in data["documents"] for p in d["columns"][0] if isinstance(p, list)]
    assert len(tokens) * 2 == len(rows) == len(data["rows"])
    for row in data["rows"]:
        source = rows[row["r"]]
        assert row["x"] == source["text"]
        assert row["v"] == pytest.approx(source["mse"] / reference.raw_variance, rel=1e-4)
    fve = 1 - np.mean([row["mse"] for row in rows]) / reference.raw_variance
    assert f"FVE (raw variance, tiny-eval-v1, n={len(rows)}): {fve:.3f}" in page.text
    assert f"{np.mean([row['cosine'] for row in rows]):.3f}" in page.text
    assert "does not make an explanation true" in page.text


def test_the_page_is_bounded_and_the_listed_rows_are_always_in(tmp_path: Path) -> None:
    sizes = []
    for n in (60, 180):
        page = opened(write_job(tmp_path / f"out{n}", mixed_rows(n, length=40)), documents=3, rows=4)
        data = page.data
        sizes.append(len(page.source))
        assert sum(document["whole"] for document in data["documents"]) == 3
        shown = {i for d in data["documents"] for p in d["columns"][0] if isinstance(p, list) for i in p[5]}
        (lists,) = data["lists"]
        for name in ("worst", "best", "unusable", "failed"):
            assert len(lists[name]) == 4
            assert set(lists[name]) <= shown
        assert f"of {n * 40:,}" in page.text
    assert sizes[1] < 1.3 * sizes[0]


def test_long_documents_and_texts_are_cut(tmp_path: Path) -> None:
    long = choice.DOCUMENT_ROWS + 50
    rows = of_text(["a"] * long, text="word " * 5000, cosine=0.5)
    page = opened(write_job(tmp_path / "out", rows), rows=0)
    assert len(page.data["rows"]) == choice.DOCUMENT_ROWS
    assert max(len(row["x"]) for row in page.data["rows"]) < 2000


def test_only_parts_that_hold_a_chosen_row_are_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = write_job(tmp_path / "out", mixed_rows(60), block=30)
    read: list[str] = []
    real = choice.read_part
    monkeypatch.setattr(choice, "read_part", lambda part: read.append(part.name) or real(part))
    opened(out, documents=2, rows=1)
    assert 2 <= len(read) <= 6


def test_rows_are_told_apart_where_they_have_no_score(tmp_path: Path) -> None:
    rows = of_text(list("abcd"))
    rows[1] |= {"status": "empty", "text": None, "raw": "?", "cosine": None, "mse": None}
    rows[2] |= {"status": None, "text": None, "raw": None, "cosine": None, "mse": None, "error": "poisoned"}
    rows[3] |= {"cosine": None, "mse": None}
    data = opened(write_job(tmp_path / "out", rows)).data
    column = data["documents"][0]["columns"][0]
    assert [piece[4] for piece in column] == ["e3", "unusable", "failed", "unscored"]
    assert [row.get("m") for row in data["rows"]] == [None, None, "poisoned", None]


NOT_SCORED = "Not scored: the text is longer than the AR reads."


@pytest.mark.parametrize("scored", [0, 2])
def test_rows_without_a_score_count_as_in_the_manifest(tmp_path: Path, scored: int) -> None:
    rows = of_text(list("abcde"), cosine=lambda i: 0.9 - i / 10)
    for row in rows[scored:4]:
        row |= {"cosine": None, "mse": None, "error": NOT_SCORED}
    rows[4] |= {"status": "empty", "text": None, "cosine": None, "mse": None}
    rows.append(made_up(5, status=None, raw=None, error="the vector is NaN"))
    rows.append(made_up(6, status=None, raw=None, copy_of=0))
    out = write_job(tmp_path / "out", rows, block=2)
    tally = Tally(REFERENCE)
    for part in JobResult.open(out).tables():
        tally.add(part)
    page = opened(out)
    assert f"{tally.fve()}{tally.fve('mean_norm')}" in page.text
    assert f"mean cosine{tally.mean_cosine:.3f}" in page.text
    assert f"{4 - scored} {NOT_SCORED}1 the vector is NaN" in page.text
    found = survey(JobResult.open(out), rows=5, denominator=0.8)
    assert sum(one.n for one in found.positions) == found.total.n == tally.fve().n == 5
    (lists,) = page.data["lists"]
    listed = [page.data["rows"][i] for i in lists["failed"]]
    assert [row["m"] for row in listed] == [NOT_SCORED] * (4 - scored) + ["the vector is NaN"]
    assert [row["z"] for row in listed] == ["unscored"] * (4 - scored) + ["failed"]


def test_copies_that_are_not_filled_in_yet_are_no_errors(tmp_path: Path) -> None:
    rows = [*of_text(list("abc")), *of_text(list("abc"), document=1, first=3, doc_id="again")]
    before = survey(JobResult.open(write_job(tmp_path / "before", rows[:3])), rows=5, denominator=0.8)
    for row in rows[3:]:
        row |= {"status": None, "text": None, "raw": None, "cosine": None, "mse": None, "norm": None}
        row["copy_of"] = row["row"] - 3
    out = write_job(tmp_path / "out", rows)
    found = survey(JobResult.open(out), rows=5, denominator=0.8)
    assert (found.rows, found.waiting, found.errors, found.failed) == (6, 3, {}, [])
    assert (found.total, found.statuses, found.cosine) == (before.total, before.statuses, before.cosine)
    assert (found.classes, found.positions) == (before.classes, before.positions)
    page = opened(out)
    assert "copies not filled in yet3, counted in no figure" in page.text
    assert "no reason recorded" not in page.source
    states = [piece[4] for document in page.data["documents"] for piece in document["columns"][0]]
    assert sorted(states) == ["e3"] * 3 + ["waiting"] * 3
    assert [(row["y"], "m" in row) for row in page.data["rows"] if row["z"] == "waiting"] == [
        (i, False) for i in range(3)
    ]
    assert "not filled in yet" not in opened(write_job(tmp_path / "done", rows[:3])).text


def test_without_a_reference_the_scale_says_so(tmp_path: Path) -> None:
    page = opened(write_job(tmp_path / "out", of_text(["a"], cosine=0.5), config={"reference": None}))
    assert "mse / 2, because the pair has no reference" in page.text
    assert page.data["rows"][0]["v"] == 0.5


def test_a_finished_job_speaks_for_itself_and_an_unfinished_one_says_so(tmp_path: Path) -> None:
    manifest = {
        "mean_cosine": 0.71234,
        "fve": [{"baseline": "raw_variance", "dataset": "in-sample", "n": 640, "value": 0.5}],
        "backed_off": [3, 9],
        "errors": {"The text is empty.": 7},
    }
    rows = [*of_text(["a"]), made_up(1, status=None, raw=None, cosine=None, error="texts.jsonl:2: The text is empty.")]
    done = opened(write_job(tmp_path / "done", rows, manifest=manifest))
    assert "7 The text is empty." in done.text
    assert "FVE (raw variance, in-sample, n=640): 0.500" in done.text
    assert "0.712" in done.text
    assert "2 blocks (3, 9)" in done.text
    running = opened(write_job(tmp_path / "running", of_text(["a"] * 5), block=2))
    assert "unfinished: 3 of ? blocks" in running.text
    assert "done" not in running.text.split("Tokens")[0]


STRANGE: list[dict[str, Any]] = [
    {},
    {"fve": None, "mean_cosine": "high", "backed_off": 3},
    {"fve": [{}]},
    {"fve": {"value": 1}, "counts": 3, "blocks": math.inf, "errors": ["x"], "mean_cosine": math.nan},
    {"fve": [1, "x"], "counts": [], "blocks": "many", "errors": {"x": "y"}, "mean_cosine": 10**400},
    {"fve": [{"value": 10**400, "n": math.inf, "dataset": "\ud800", "baseline": []}], "backed_off": ["\udc00"]},
]


@pytest.mark.parametrize("manifest", STRANGE)
def test_what_a_manifest_does_not_say_is_measured_or_not(tmp_path: Path, manifest: dict[str, Any]) -> None:
    page = opened(write_job(tmp_path / "out", of_text(["a"]), config={"data": None, "n": None}, manifest=manifest))
    assert "FVE (raw variance" in page.text
    assert "n=not measured" in page.text
    assert not re.search(r"\b(nan|inf)\b", page.text)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"reference": "x"}, "`reference` is no mapping (got str"),
        ({"reference": {"dataset": "x"}}, "raw_variance"),
        ({"reference": asdict(REFERENCE) | {"n": "many"}}, "'many'"),
        ({"reference": {1: 2}}, "fault"),
        ({"site": 3}, "`site` is no mapping (got int"),
        ({"data": ["x"]}, "`data` is no mapping (got list"),
    ],
)
def test_a_job_yaml_of_another_form_is_refused(tmp_path: Path, config: dict[str, Any], words: str) -> None:
    with pytest.raises(RunError) as refused:
        opened(write_job(tmp_path / "out", of_text(["a"]), config=config))
    assert "job.yaml: " in str(refused.value)
    assert words in str(refused.value)


def test_only_files_are_parts_and_a_manifest_is_one_object(tmp_path: Path) -> None:
    out = write_job(tmp_path / "out", of_text(list("abcd")), block=2)
    (out / "parts" / "part-000002.parquet").mkdir()
    assert [part.name for part in JobResult.open(out).parts] == ["part-000000.parquet", "part-000001.parquet"]
    assert "unfinished: 2 of ? blocks" in opened(out).text
    for text in ("[1]", "{", "[" * 200_000):
        (out / "manifest.json").write_text(text)
        with pytest.raises(RunError, match=r"manifest\.json"):
            JobResult.open(out)


def test_bare_vectors_and_jobs_without_rows(tmp_path: Path) -> None:
    bare = [
        made_up(i, document=i, doc_id=f"v{i}", position=-1, token=None, context=None, char_end=None) for i in range(5)
    ]
    bare[3] |= {"status": None, "text": None, "cosine": None, "mse": None, "norm": math.nan, "error": "NaN"}
    data = opened(write_job(tmp_path / "vectors", bare)).data
    (document,) = data["documents"]
    assert [piece[4] for piece in document["columns"][0]] == ["e3", "e3", "e3", "failed", "e3"]
    assert [row["k"] for row in data["rows"]] == [f"v{i}" for i in range(5)]
    empty = opened(write_job(tmp_path / "empty", []), map_by="tsne")
    assert empty.data["documents"] == []
    failed = [
        made_up(0, position=None, token=None, context=None, char_end=None, status=None, raw=None, error="too long")
    ]
    lost = opened(write_job(tmp_path / "lost", failed)).data
    assert (lost["documents"], lost["rows"][0]["m"]) == ([], "too long")


def test_a_document_twice_under_one_id_is_two_documents(tmp_path: Path) -> None:
    rows = [*of_text(["a", "b"]), *of_text(["c", "d"], document=1, first=2, cosine=0.1)]
    data = opened(write_job(tmp_path / "out", rows)).data
    assert [text_of(document["columns"][0]) for document in data["documents"]] == ["ab", "cd"]


# -- several jobs ---------------------------------------------------------------------------------------------


def test_jobs_stand_side_by_side(tmp_path: Path) -> None:
    a = [*of_text(["a", "b", " c"]), *of_text(["x"], document=1, first=3, doc_id="only here")]
    b = of_text(["ab", " c"], document=7, text="other words")
    outs = [write_job(tmp_path / "a", a), write_job(tmp_path / "b", b, config={"site": {"layer": 5}})]
    page = opened(*outs)
    assert page.data["pairs"] == ["tiny, layer 3", "tiny, layer 5"]
    (shared, alone) = page.data["documents"]
    assert [text_of(column) for column in shared["columns"]] == ["ab c", "ab c"]
    assert shared["same"] is True
    assert alone["columns"][1] is None
    assert (tmp_path / "a" / "report.html").is_file()
    assert not (tmp_path / "b" / "report.html").exists()
    twice = opened(outs[0], outs[0])
    assert twice.data["pairs"] == ["tiny, layer 3 (a)"] * 2


def test_other_renderings_of_a_document_are_not_linked(tmp_path: Path) -> None:
    outs = [write_job(tmp_path / name, of_text(list(text))) for name, text in (("a", "<user>hi"), ("b", "[INST]hi"))]
    assert opened(*outs).data["documents"][0]["same"] is False


def test_jobs_without_a_common_document_are_refused(tmp_path: Path) -> None:
    outs = [write_job(tmp_path / name, of_text(["a"], doc_id=name)) for name in ("a", "b")]
    with pytest.raises(RunError, match="no document in common"):
        write_report(outs)
    with pytest.raises(InputError, match="7 jobs"):
        write_report(outs[:1] * 7)
    with pytest.raises(RunError, match="no output of"):
        write_report([tmp_path])
    assert not list(tmp_path.rglob("*.html"))


# -- safety ---------------------------------------------------------------------------------------------------


def test_nothing_in_the_data_is_markup(tmp_path: Path) -> None:
    rows = of_text([HOSTILE, "b", "c"], doc_id=HOSTILE, text=HOSTILE)
    rows[1] |= {"status": None, "text": None, "cosine": None, "mse": None, "error": HOSTILE, "raw": None}
    rows[2] |= {"status": "no_tags", "text": None, "cosine": None, "mse": None, "raw": HOSTILE, "flags": [HOSTILE]}
    config = {"nla": HOSTILE, "base_model": HOSTILE, "data": {"path": HOSTILE, HOSTILE: 1}, "positions": HOSTILE}
    config["reference"] = asdict(REFERENCE) | {"dataset": HOSTILE}
    manifest = {"fve": [{"dataset": HOSTILE, "n": 3, "value": 0.5}], "backed_off": [HOSTILE]}
    out = write_job(tmp_path / "out", rows, config=config, manifest=manifest)
    page = opened(out, out, map_by="tsne")
    assert len(page.scripts) == 2
    assert page.data["rows"][0]["x"] == HOSTILE
    assert page.text.count("<script>alert(1)</script>") > 8


def test_the_policy_allows_exactly_this_script_and_style(tmp_path: Path) -> None:
    page = opened(write_job(tmp_path / "out", of_text(["a"])))
    (style,) = page.styles
    (script,) = [text for attributes, text in page.scripts if not attributes]
    for kind, text in (("style", style), ("script", script)):
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert f"{kind}-src 'sha256-{digest}'" in page.policy
    assert page.policy.startswith("default-src 'none';")
    assert "unsafe" not in page.policy
    assert not re.search(
        r"https?://(?!www\.w3\.org/2000/svg)|\bfetch\(|XMLHttp|innerHTML|outerHTML|insertAdjacent|eval\(", page.source
    )


def test_the_check_of_a_page_sees_what_is_wrong(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for bad in ("<img src=x>", '<p onclick="x">', '<a href="http://x">', '<p style="x">'):
        with pytest.raises(AssertionError):
            Page(bad)
    monkeypatch.setattr("nla_hub.report.figures.escape", str)
    with pytest.raises(AssertionError):
        opened(write_job(tmp_path / "out", of_text(["a"]), config={"nla": HOSTILE}))


def luminance(colour: str) -> float:
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(a: str, b: str) -> float:
    low, high = sorted((luminance(a), luminance(b)))
    return (high + 0.05) / (low + 0.05)


def test_colours_grow_steadily_and_their_text_can_be_read() -> None:
    for colours in (scale.LIGHT, scale.DARK):
        assert len(colours) == len(scale.LABELS) == len(scale.EDGES) + 1
        assert all(contrast(back, text) >= 4.5 for back, text in colours)
        lights = [luminance(back) for back, _ in colours]
        assert lights == sorted(lights, reverse=colours is scale.LIGHT)
        assert all(contrast(a, b) >= 1.1 for (a, _), (b, _) in pairwise(colours))
    css = (Path(write.__file__).parent / "page.css").read_text()
    for block in re.findall(r":root \{(.*?)\}", css, re.S):
        own = dict(re.findall(r"--(\w+): (#\w{6});", block))
        for name in ("fg", "soft", "accent", "hit"):
            assert min(contrast(own[name], own[back]) for back in ("bg", "panel")) >= 4.5
        assert contrast(own["control"], own["panel"]) >= 3


def test_steps_of_the_scale() -> None:
    assert [scale.step_of(error) for error in (0, 0.0999, 0.1, 0.99, 1, 1.5, 9)] == [0, 0, 1, 4, 5, 6, 6]
    assert scale.denominator(None) == 2
    assert scale.denominator(REFERENCE) == 0.8
    assert scale.denominator(Reference("x", 2, 0.0, 0.0)) == 2


# -- charts ---------------------------------------------------------------------------------------------------


def test_bars_have_their_lengths_and_counts() -> None:
    text = bar_chart(
        "T <b>", ["one <b>", "two", "three"], [Bars("s", [0.5, 1.0, None], [1234, 2, 0])], key="k", mark=2.0
    )
    widths = [float(w) for w in re.findall(r'<rect class="d0" x="[\d.]+" y="[\d.]+" width="([\d.]+)"', text)]
    assert widths[1] == pytest.approx(2 * widths[0], abs=0.2)
    assert "0.5 (n=1,234)" in text
    assert "no rows" in text
    assert "<b>" not in text
    assert "one <b>: 0.5 (n=1,234). two: 1 (n=2). three: no rows." in html.unescape(text)
    assert "not measured" in bar_chart("T", ["a"], [Bars("s", [None], [0])], key="k")
    several = bar_chart("T", ["a"], [Bars("s", [1.0], [3]), Bars("t", [math.nan], [4])], key="k")
    assert several.count('<rect class="d') == 3  # one bar, two swatches
    assert "a, s: 1 (n=3)." in several


# -- the map --------------------------------------------------------------------------------------------------

TEXTS = [
    f"{animal} {verb} story number{i}" for i in range(12) for animal, verb in (("cat", "sleeps"), ("ship", "sails"))
]


def test_a_map_is_the_same_each_time_and_groups_what_says_the_same() -> None:
    found = explanation_map.explanation_map(TEXTS, "tsne")
    again = explanation_map.explanation_map(TEXTS, "tsne")
    assert found is not None
    assert again is not None
    assert np.array_equal(found.points, again.points)
    assert found.points.shape == (24, 2)
    assert (found.points.min(), found.points.max()) == (0, 1)
    members = sorted(sorted(group.members) for group in found.groups)
    assert members == [list(range(0, 24, 2)), list(range(1, 24, 2))]
    assert {frozenset(group.name.split(", ")[:2]) for group in found.groups} == {
        frozenset({"cat", "sleeps"}),
        frozenset({"sails", "ship"}),
    }
    assert not any("story" in group.name for group in found.groups)  # it is in all of them


@pytest.mark.skipif(explanation_map.installed() != "umap", reason="umap-learn is not installed (extra viz)")
def test_a_map_by_umap() -> None:
    found = explanation_map.explanation_map(TEXTS, "umap")
    assert found is not None
    assert found.points.shape == (24, 2)


def test_a_map_is_bounded_and_needs_something_to_show(monkeypatch: pytest.MonkeyPatch) -> None:
    for texts in ([], ["a b"] * (AT_LEAST - 1), ["...", "?"] * 10):
        assert explanation_map.explanation_map(texts, "tsne") is None
    assert explanation_map.explanation_map(TEXTS, "off") is None
    monkeypatch.setattr(explanation_map, "AT_MOST", 13)
    found = explanation_map.explanation_map(TEXTS, "tsne")
    assert found is not None
    assert found.texts == tuple(range(0, 24, 2))
    monkeypatch.setitem(sys.modules, "umap", None)
    with pytest.raises(MissingExtraError, match=r"nla-hub\[viz\]"):
        explanation_map.explanation_map(TEXTS, "umap")
    monkeypatch.setitem(sys.modules, "sklearn.decomposition", None)
    with pytest.raises(MissingExtraError, match="scikit-learn"):
        explanation_map.explanation_map(TEXTS, "tsne")


def test_points_lead_to_all_rows_that_say_the_same(tmp_path: Path) -> None:
    words = TEXTS[:13] + TEXTS[:13]
    rows = of_text(["a"] * 26, text=lambda i: words[i], cosine=lambda i: 1.0 if i < 13 else 0.6)
    data = opened(write_job(tmp_path / "out", rows), map_by="tsne").data
    assert sorted(chain.from_iterable(point[4] for point in data["map"]["points"])) == list(range(26))
    for *_, state, own in data["map"]["points"]:
        assert len({data["rows"][i]["x"] for i in own}) == 1
        assert (len(own), state) == (2, "e3")  # the mean of 0 and 1
    assert sum(group["n"] for group in data["map"]["groups"]) == 26


def test_without_the_extra_there_is_a_message_and_no_map(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(write, "installed", lambda: "off")
    with caplog.at_level("INFO", logger="nla_hub"):
        page = Page(write_report([write_job(tmp_path / "out", of_text(["a"]))]).read_text(encoding="utf-8"))
    assert page.data["map"] is None
    assert "viz extra" in page.text
    assert "nla-hub[viz]" in caplog.text


# -- the command and notebooks ----------------------------------------------------------------------------------


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from nla_hub.cli.app import app

    out = write_job(tmp_path / "out", of_text(list("abc")))
    target = tmp_path / "new" / "page.html"
    arguments = ["report", str(out), "-o", str(target), "--map", "off", "--rows", "2", "--documents", "0"]
    with pytest.raises(SystemExit) as done:
        app(arguments)
    assert done.value.code == 0
    assert capsys.readouterr().out == f"{target}\n"
    assert len(Page(target.read_text(encoding="utf-8")).data["lists"][0]["worst"]) == 2
    with pytest.raises(SystemExit) as refused:
        app(["report", str(tmp_path)])
    assert refused.value.code == 1
    assert "no output of" in capsys.readouterr().err


def test_an_interrupted_write_leaves_the_old_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = write_job(tmp_path / "out", of_text(["a"]))
    place = write_report([out], map_by="off")
    before = place.read_bytes()

    def fail(*_: Any) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("os.replace", fail)
    with pytest.raises(OSError, match="disk full"):
        write_report([out], map_by="off", rows=0)
    assert place.read_bytes() == before
    assert [path.name for path in out.glob("*report*")] + [path.name for path in out.glob(".*")] == ["report.html"]


NOTEBOOK = Explanations(
    (
        Explanation("a <b>cat</b>", "", "ok", 1.0, 0.9, 0.2, doc_id="d", position=0, token="<s>"),
        Explanation("second", "", "ok", 1.0, 0.5, 1.0, doc_id="d", position=1, token=" \"quoted'"),
        Explanation("again", "", "ok", 1.0, 0.7, 0.6, doc_id="d", position=1, token=" \"quoted'", sample=1),
        Explanation(None, HOSTILE, "no_tags", 1.0, doc_id="d", position=4, token="far"),
        Explanation("unscored", "", "ok", 1.0, doc_id="e", position=0, token="other"),
    ),
    REFERENCE,
)


class Spans(HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.spans: list[tuple[dict[str, str | None], str]] = []
        self.tags: set[str] = set()
        self._inside = False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        own = dict(attrs)
        self._inside = "title" in own
        if self._inside:
            self.spans.append((own, ""))

    def handle_endtag(self, tag: str) -> None:
        self._inside = False

    def handle_data(self, data: str) -> None:
        if self._inside:
            self.spans[-1] = (self.spans[-1][0], self.spans[-1][1] + data)


def test_a_notebook_shows_coloured_tokens_without_a_script() -> None:
    found = Spans(NOTEBOOK._repr_html_())
    assert found.tags.isdisjoint({"script", "b", "img"})
    assert [text for _, text in found.spans] == ["<s>", " \"quoted'", "far", "other"]
    titles = [own["title"] or "" for own, _ in found.spans]
    assert titles[0] == "a <b>cat</b> [error 0.250]"
    assert titles[1] == "second [error 1.250]\nagain [error 0.750]"
    assert titles[2].startswith(f"(no_tags) {HOSTILE}")
    styles = [own["style"] or "" for own, _ in found.spans]
    assert [scale.LIGHT[i][0] in style for i, style in ((2, styles[0]), (5, styles[1]))] == [True, True]
    assert ["dashed" in style for style in styles] == [False, False, True, False]
    assert ["dotted" in style for style in styles] == [False, False, False, True]
    assert "mse / 0.800" in table(NOTEBOOK)
    assert "\N{HORIZONTAL ELLIPSIS}" in table(NOTEBOOK)
    assert "mse / 2: there is no reference" in page(Explanations(NOTEBOOK.rows))
    assert "Error of a token" not in table(Explanations((Explanation("x", "", "ok", 1.0),)))


def test_a_notebook_is_bounded() -> None:
    rows = tuple(NOTEBOOK[0].with_(position=i) for i in range(4000))
    assert len(Spans(table(Explanations(rows))).spans) == 1500
    assert "2500 more tokens" in table(Explanations(rows))
