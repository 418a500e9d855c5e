"""What a person sees of a training run: the page, the live line, the history; on runs that these tests write themselves."""

from __future__ import annotations

import io
import json
import math
import re
import unicodedata
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from markdown_it import MarkdownIt

from nla_hub import yaml_io
from nla_hub.cli import output
from nla_hub.cli.status_line import fitted
from nla_hub.cli.train_view import TrainView, alarm_text, evaluation_lines, step_line
from nla_hub.errors import RunError
from nla_hub.svg import AT_MOST, HEIGHT, WIDTH, Series, line_chart
from nla_hub.svg import thinned as thinned_points
from nla_hub.training.recipe import load_recipe
from nla_hub.training.run import RunDirectory
from nla_hub.training.view.history import ROWS, history, main, render, thinned
from nla_hub.training.view.records import read_metrics, read_run
from nla_hub.training.view.report import verdict, write_report

HOSTILE = (
    '<script>alert("x")</script><img src=x onerror=alert(1)>\'"&amp; </bdi></p></table> | [a](javascript:x) `b` *c*\n'
    "שלום \u202eevil\u202c \ud800 \x00\x1b[2J " + "W" * 3000
)


def step(i: int, steps: int, **changes: Any) -> dict[str, Any]:
    """A step line."""
    x = i / max(1, steps)
    line: dict[str, Any] = {
        "step": i, "steps": steps, "reward": -0.5 + 0.3 * x + 0.02 * math.sin(i), "reward_std": 0.2, "mse": 0.4 - 0.2 * x,
        "cosine": 0.8 + 0.1 * x, "fve": 0.4 + 0.3 * x, "fve_mean_norm": 0.6, "cosine_shuffled": 0.1,
        "watch_cosine": 0.79 + 0.09 * x, "gap": 0.01 + 0.01 * x, "kl": 0.05 * x, "entropy": 0.5 - 0.2 * x, "length": 43.2,
        "ok": 0.996, "statuses": {"ok": 510, "truncated": 2}, "repetition": 0.02, "logprob_difference": 0.0 if i == 2 else 1e-5,
        "logprob_difference_mean": 1e-7, "ratio": 1.0, "ratio_min": 0.98, "ratio_max": 1.03, "loss": 0.01,
        "ar_loss": 0.3 - 0.1 * x, "grad_norm": 0.4, "lr": 1e-5, "ar_lr": 5e-5, "skipped": 0, "seconds": 12.5 * i,
        "seconds_rollout": 9.0, "seconds_reward": 1.0, "seconds_policy": 2.5,
    }  # fmt: skip
    return {**line, **changes}


def evaluation(i: int, steps: int, text: str = "next word: drum. kind: story.", **changes: Any) -> dict[str, Any]:
    """An evaluation line."""
    x = i / max(1, steps)
    samples = [
        {"doc_id": f"dev-{j}", "position": 10 + j, "context": f"the {text}", "text": text, "raw": text, "status": "ok",
         "cosine": 0.8 + 0.01 * j, "gold": text}
        for j in range(7)
    ]  # fmt: skip
    unusable = {"text": None, "raw": text, "status": "truncated", "cosine": None, "gold": None}
    samples.append({"doc_id": "dev-7", "position": 17, "context": text, **unusable})
    facts = {
        "recall": 0.7 + 0.1 * x,
        "precision": 0.8,
        "rows": [
            {"fact": "person", "n": 380, "recall": 0.5 + 0.2 * x, "named": 300, "precision": 0.9},
            {"fact": "last_word", "n": 400, "recall": None, "named": 0, "precision": None},
        ],
    }
    found = {
        "n": 400, "fve": 0.4 + 0.3 * x, "fve_low": 0.38 + 0.3 * x, "fve_high": 0.42 + 0.3 * x, "fve_mean_norm": 0.6,
        "cosine": 0.8 + 0.1 * x, "permuted": 0.06, "watch_cosine": 0.79, "statuses": {"ok": 399, "truncated": 1},
        "words": 30.0, "tokens": 44.0, "repetition": 0.01, "facts": facts, "samples": samples,
    }  # fmt: skip
    return {"step": i, "steps": steps, "evaluation": {**found, **changes}}


def alarm(
    i: int, *, fatal: bool = False, name: str = "gap", message: str = "The watch AR disagrees."
) -> dict[str, Any]:
    """An alarm line."""
    return {
        "step": i,
        "alarm": {"name": name, "step": i, "message": message, "value": 0.12, "limit": 0.1, "fatal": fatal},
    }


def rl_lines(steps: int, text: str = "next word: drum.", every: int = 10) -> list[dict[str, Any]]:
    """A whole RL stage."""
    lines = [evaluation(0, steps, text)]
    for i in range(1, steps + 1):
        lines.append(step(i, steps))
        if i % every == 0 or i == steps:
            lines.append(evaluation(i, steps, text))
    return lines


def write_run(
    place: Path, rl: list[dict[str, Any]] | None, *, finished: bool = True, summary: str = "a summary"
) -> Path:
    """A run directory with a supervised part and, if given, RL lines."""
    config = {"name": "tiny", "summary": summary, "layer": 2, "marker": "㊥", "rl": {"steps": 60} if rl else None}
    place.mkdir(parents=True, exist_ok=True)
    yaml_io.write_text(place / "config.yaml", yaml_io.dumps(config))
    for name in ("source", "data", "ar", "av"):
        done(place / name, {"seconds": 61.0, "documents": 100})
    for name in ("source", "ar", "av"):
        losses = [{"step": 50 * i, "steps": 500, "loss": 3.0 / i, "lr": 1e-3, "seconds": 6.0 * i} for i in range(1, 11)]
        write_lines(place / name, [*losses, {"step": 500, "steps": 500, f"held_out_{name}": 0.62}])
    if rl is not None:
        write_lines(place / "rl", rl)
    if finished:
        if rl is not None:
            done(place / "rl", {"seconds": 750.0, "steps": 60})
        done(place / "export", {"seconds": 2.0})
        measure = {
            "value": 0.71,
            "baseline": "raw_variance",
            "dataset": "tiny-eval-v1",
            "n": 1200,
            "low": 0.7,
            "high": 0.72,
        }
        result = {"commit": "abc1234", "real": {"fve": measure, "cosine": 0.9}, "protocol": {"name": "tiny-eval-v1"}}
        done(place / "eval", {"seconds": 30.0, "fve": 0.71})
        (place / "eval" / "result.json").write_text(json.dumps(result))
    return place


def done(stage: Path, summary: dict[str, Any]) -> None:
    stage.mkdir(parents=True, exist_ok=True)
    (stage / "DONE").write_text(json.dumps(summary))


def write_lines(stage: Path, lines: list[dict[str, Any]], tail: str = "") -> None:
    stage.mkdir(parents=True, exist_ok=True)
    (stage / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + tail)


class Page(HTMLParser):
    """Checks a page while it is read: every tag is closed in order, nothing in it runs or is fetched."""

    VOID = frozenset({"meta", "br", "hr"})
    TAGS = frozenset(
        "html head title style body main header section article h1 h2 h3 h4 p ul li div span strong bdi pre table thead tbody "
        "tr th td figure figcaption svg path text circle meta".split()
    )

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.words: list[str] = []
        self.ids: list[str] = []
        self.refers: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []
        assert len(self.ids) == len(set(self.ids))
        assert set(self.refers) <= set(self.ids)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_startendtag(tag, attrs)
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag in self.TAGS, tag
        names = [name for name, _ in attrs]
        assert len(names) == len(set(names))
        for name, value in attrs:
            assert not name.startswith("on"), name
            assert name not in ("href", "src", "style", "action", "xlink:href"), name
            assert "javascript:" not in (value or "")
            self.ids += [value or ""] if name == "id" else []
            self.refers += (value or "").split() if name in ("aria-labelledby", "aria-describedby") else []

    def handle_endtag(self, tag: str) -> None:
        assert self.open, tag
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.words.append(data)
        else:
            assert "url(" not in data
            assert "@import" not in data

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


def opened(run: Path) -> Page:
    text = write_report(run).read_text(encoding="utf-8")
    assert "default-src 'none'" in text
    return Page(text)


# -- the page ------------------------------------------------------------------------------------------------


def test_the_page_of_a_finished_run_says_what_happened(tmp_path: Path) -> None:
    lines = [*rl_lines(60), alarm(31), alarm(60, fatal=True, name="entropy")]
    page = opened(write_run(tmp_path, lines))
    for words in (
        "FVE (raw variance, held-out rows, n=400): 0.400 [0.380, 0.420] at step 0, 0.700 [0.680, 0.720] at step 60: it rose.",
        "cosine 0.800 at step 0, 0.900 at step 60.",
        "facts recall 0.700, precision 0.800 at step 0; facts recall 0.800, precision 0.800 at step 60.",
        "2 alarms, 1 of them fatal",
        "The watch AR disagrees. Value 0.12, limit 0.1. Fatal: nothing after it can be trusted.",
        "FVE (raw variance, tiny-eval-v1, n=1200): 0.710 [0.700, 0.720]; cosine 0.900",
        "code abc1234",
        "Step 30: cosine 0.800",
        "last word not measured",
    ):
        assert words in page.text, words
    assert page.text.count("position 1") == 8


def test_hostile_text_stays_text(tmp_path: Path) -> None:
    lines = [*rl_lines(20, HOSTILE), alarm(3, name="<b>", message=HOSTILE)]
    lines[1]["statuses"] = {"<script>": 4, "ok": 1, HOSTILE: 2}
    lines[-2]["evaluation"]["facts"]["rows"][0]["fact"] = HOSTILE
    run = write_run(tmp_path, lines, summary=HOSTILE.replace("\ud800", "").replace("\x00", ""))
    text = write_report(run).read_text(encoding="utf-8")
    page = Page(text)
    assert '<script>alert("x")</script>' in page.text
    assert "<script" not in text
    assert "<img" not in text
    assert "\u202e" not in text
    assert "\x00" not in text
    assert len(text) < 1_000_000


@pytest.mark.parametrize(
    "tail", ['{"step": 13, "ste', "{", '{"step": "x"}\n', "[1]\n", "\xff\n", "null\n", "9" * 9000 + "\n"]
)
def test_a_line_cut_in_half_is_left_out_and_said(tmp_path: Path, tail: str) -> None:
    run = write_run(tmp_path, None, finished=False)
    write_lines(run / "rl", rl_lines(12), tail)
    assert "Left out of rl/metrics.jsonl: 1 line that could not be read." in opened(run).text
    assert read_run(run).rl.last["step"] == 12
    assert history(run)["notes"]


def test_a_multi_byte_letter_cut_in_half_is_no_error(tmp_path: Path) -> None:
    run = write_run(tmp_path, rl_lines(3), finished=False)
    path = run / "rl" / "metrics.jsonl"
    path.write_bytes(path.read_bytes() + '{"step": 4, "x": "ü'.encode()[:-1])
    assert "1 line that could not be read" in opened(run).text


@pytest.mark.parametrize(
    "rl", [None, [], [evaluation(0, 60)], [step(1, 60)], [evaluation(0, 1), step(1, 1), evaluation(1, 1)]]
)
@pytest.mark.parametrize("finished", [True, False])
def test_runs_of_any_length(tmp_path: Path, rl: list[dict[str, Any]] | None, finished: bool) -> None:
    run = write_run(tmp_path, rl, finished=finished)
    page = opened(run)
    assert ("This run has no RL stage." in page.text) == (rl is None)
    assert ("Finished pair: not measured." in page.text) != finished
    render(history(run))


def test_a_run_that_has_only_begun(tmp_path: Path) -> None:
    with RunDirectory(tmp_path / "run", load_recipe("tiny"), rehearsal=True) as run:
        pass
    page = opened(run.path)
    assert "rehearsal of recipe hash" in page.text
    assert "not begun" in page.text
    assert read_run(run.path).digest == load_recipe("tiny").digest()
    assert f"hash {load_recipe('tiny').digest()}" in render(history(run.path))


def test_figures_that_are_missing_are_not_measured(tmp_path: Path) -> None:
    bare = [
        {"step": 1, "steps": 2},
        {"step": 2, "steps": 2, "reward": None, "kl": None, "statuses": None, "cosine": "high"},
    ]
    empty = {"n": 400, "fve": None, "cosine": None, "facts": None, "samples": [], "statuses": {}}
    run = write_run(tmp_path, [{"step": 0, "evaluation": {}}, *bare, {"step": 2, "evaluation": empty}], finished=False)
    page = opened(run)
    assert "FVE (raw variance): not measured at step 0, FVE (raw variance): not measured at step 2." in page.text
    assert page.text.count("not measured") > 15
    assert "<circle" not in write_report(run).read_text().split("Supervised stages")[0]
    assert "not measured" in render(history(run))


def test_figures_that_are_not_finite_are_gaps_and_counted(tmp_path: Path) -> None:
    lines = [step(1, 3), step(2, 3, reward=math.nan, kl=math.inf), step(3, 3, reward=10**400)]
    page = opened(write_run(tmp_path, lines))
    assert "Values that cannot be drawn (not finite): 2." in page.text
    json.dumps(history(tmp_path), allow_nan=False)


def test_a_long_run_makes_a_page_of_bounded_size(tmp_path: Path) -> None:
    lines = rl_lines(5000, "a word " * 40, every=20)
    lines += [alarm(i, name=f"alarm {i % 7}") for i in range(1, 5000)]
    run = write_run(tmp_path, lines)
    page = opened(run)
    assert (run / "report.html").stat().st_size < 1_000_000
    assert "4999 alarms" in page.text
    assert "714 times from step 7 to step 4998" in page.text
    data = history(run)
    assert len(data["rl"]["rows"]) == ROWS
    assert len(data["rl"]["evaluations"]) == ROWS
    assert data["rl"]["alarms_in_all"] == 4999
    assert len(json.dumps(data)) < 200_000


def test_there_must_be_a_run(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="not the directory of a run"):
        write_report(tmp_path)
    (tmp_path / "config.yaml").write_text("{")
    with pytest.raises(RunError, match="refused"):
        write_report(tmp_path)


def test_the_verdict_compares_intervals(tmp_path: Path) -> None:
    def said(**last: float) -> str:
        place = tmp_path / str(len(list(tmp_path.iterdir())))
        return verdict(read_run(write_run(place, [evaluation(0, 60), evaluation(60, 60, **last)])))[0]

    assert "it rose" in said()
    assert "it fell" in said(fve=0.2, fve_low=0.1, fve_high=0.3)
    assert "the intervals overlap" in said(fve=0.43, fve_low=0.41, fve_high=0.45)
    assert said(fve_low=None).endswith("at step 0, 0.700 at step 60.")
    assert said(n=399).endswith("FVE (raw variance, held-out rows, n=399): 0.700 [0.680, 0.720] at step 60: it rose.")


# -- reading -------------------------------------------------------------------------------------------------


def test_what_a_continued_run_wrote_again_counts_once(tmp_path: Path) -> None:
    killed = [evaluation(0, 20), *(step(i, 20) for i in range(1, 15)), alarm(14, name="old"), evaluation(14, 20)]
    again = [alarm(11, name="new"), *(step(i, 20, reward=7.0) for i in range(11, 14)), evaluation(12, 20, n=5)]
    write_lines(tmp_path / "rl", [*killed, *again])
    found = read_metrics(tmp_path / "rl" / "metrics.jsonl")
    assert [row["step"] for row in found.steps] == list(range(1, 14))
    assert [row["reward"] == 7.0 for row in found.steps] == [False] * 10 + [True] * 3
    assert [row["alarm"]["name"] for row in found.alarms] == ["new"]
    assert [row["step"] for row in found.evaluations] == [0, 12]
    assert "6 lines of an attempt that was continued from an earlier step" in found.notes[0]


def test_the_last_line_of_a_supervised_stage_belongs_to_its_last_step(tmp_path: Path) -> None:
    found = read_run(write_run(tmp_path, None)).stages["ar"].metrics
    assert len(found.steps) == 11
    assert found.notes == ()
    assert found.latest("held_out_ar") == 0.62
    assert found.latest("loss") == 0.3


def test_a_second_model_of_a_stage_is_no_continued_run(tmp_path: Path) -> None:
    run = write_run(tmp_path, None)
    own = [{"step": i, "steps": 3, "loss": 1.0 / i, "seconds": 1.0} for i in (1, 2, 3)]
    end = {"step": 3, "steps": 3, "held_out_fve_of_labels": 0.4}
    write_lines(run / "ar", [*own, end, *({**row, "model": "watch"} for row in own), {**end, "model": "watch"}])
    found = read_run(run)
    assert len(found.stages["ar"].metrics.steps) == 4
    assert len(found.stages["ar"].metrics.models["watch"]) == 4
    assert found.notes == ()
    assert "watch: 1 at step 1, 0.3333 at step 3" in opened(run).text
    assert "FVE of the labels (raw variance, held-out rows) 0.4, watch: loss 0.3333" in render(history(run))


# -- charts --------------------------------------------------------------------------------------------------

VALUES = st.one_of(st.none(), st.floats(), st.floats(-1, 1), st.just(0.0), st.just(1.5), st.floats(1e15, 1e15 + 4))


def coordinates(svg: str) -> Iterator[tuple[float, float]]:
    """Every point that a chart names."""
    for path in re.findall(r' d="([^"]*)"', svg.split('class="legend"')[0]):
        x, y = math.nan, math.nan
        for letter, numbers in re.findall(r"([A-Za-z])([^A-Za-z]*)", path):
            parts = [float(part) for part in numbers.split()]
            if letter == "v":
                y += parts[0]
            elif letter == "V":
                y = parts[0]
            elif letter == "H":
                x = parts[0]
            else:
                x, y = parts
            yield x, y
    for x_text, y_text in re.findall(r'(?:cx|x)="([^"]*)" (?:cy|y)="([^"]*)"', svg):
        yield float(x_text), float(y_text)


@given(
    ys=st.lists(VALUES, max_size=60),
    low=st.lists(VALUES, max_size=60),
    start=st.one_of(st.integers(0, 10**6), st.floats(-1e90, 1e90)),
    log=st.booleans(),
)
def test_a_chart_stays_inside_its_frame(
    ys: list[float | None], low: list[float | None], start: float, log: bool
) -> None:
    xs = [start + i for i in range(len(ys))]
    ends = [*low, *[None] * len(ys)][: len(ys)]
    chart = line_chart("A & B", [Series("a", xs, ys, ends, ys), Series("<b>", xs, ends)], key="c", log=log)
    Page(chart)
    for x, y in coordinates(chart):
        assert 0 <= x <= WIDTH, (x, y)
        assert 0 <= y <= HEIGHT, (x, y)
    drawable = [v for v in [*ys, *ends] if v is not None and abs(v) <= 1e100 and not (log and v < 0)]
    assert ("not measured</p>" in chart) == (not drawable)
    assert chart.count("<text") <= 20
    assert "nan" not in chart.replace("not finite", "")
    assert "inf" not in chart.replace("not finite", "")


def test_one_point_is_a_dot_and_ten_thousand_are_thinned() -> None:
    one = line_chart("t", [Series("a", [3.0], [0.5])], key="c")
    assert one.count("<circle") == 1
    assert "a: 0.5 at step 3." in one
    xs = [float(i) for i in range(10_000)]
    spike = [0.0] * 10_000
    spike[7_777] = 9.0
    many = line_chart("t", [Series("a", xs, list(spike))], key="c")
    assert len(many) < 12_000
    assert max(y for _, y in thinned_points(list(zip(xs, spike, strict=True))) if y is not None) == 9.0


@given(st.lists(st.one_of(st.none(), st.floats(-1, 1)), max_size=2000))
def test_thinning_keeps_the_extremes_and_the_order(ys: list[float | None]) -> None:
    points = [(float(i), y) for i, y in enumerate(ys)]
    kept = thinned_points(points)
    assert len(kept) <= AT_MOST
    assert [x for x, _ in kept] == sorted(x for x, _ in kept)
    known = [y for y in ys if y is not None]
    left = [y for _, y in kept if y is not None]
    assert bool(known) == bool(left)
    if known:
        assert (min(left), max(left)) == (min(known), max(known))


def test_gaps_are_not_bridged() -> None:
    chart = line_chart("t", [Series("a", [0, 1, 2, 3, 4], [1.0, 2.0, None, 3.0, 1.0])], key="c")
    line = re.search(r'class="line s0" d="([^"]*)"', chart)
    assert line is not None
    assert line[1].count("M") == 2


def test_ticks_are_round_numbers_around_the_values() -> None:
    chart = line_chart("t", [Series("a", [0, 60], [0.412, 0.688])], key="c")
    assert re.findall(r">([^<]+)</text>", chart)[:5] == ["0.4", "0.5", "0.6", "0.7", "0"]
    logs = line_chart("t", [Series("a", [1, 2, 3], [0.0, 2e-6, 3e-4])], key="c", log=True)
    assert "1e-6" in logs
    assert "Zeros are drawn on the lowest line." in logs


# -- the live view -------------------------------------------------------------------------------------------


class Terminal(io.StringIO):
    """A stderr that is a terminal, and what stands on its screen."""

    def isatty(self) -> bool:
        return True

    def screen(self) -> list[str]:
        lines = [""]
        for part in re.findall(r"\r|\n|\x1b\[K|[^\r\n\x1b]+", self.getvalue()):
            if part == "\n":
                lines.append("")
            elif part == "\r":
                fresh = True
            elif part == "\x1b[K":
                assert fresh
                lines[-1] = ""
            else:
                lines[-1] += part
                fresh = False
        return lines


def wide(text: str) -> int:
    return sum(2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in text)


def on_terminal(monkeypatch: pytest.MonkeyPatch, width: int) -> Terminal:
    """Make stderr a terminal; pytest puts its own stderr back before a test's body begins, so this is no fixture."""
    found = Terminal()
    monkeypatch.setattr("sys.stderr", found)
    monkeypatch.setenv("COLUMNS", str(width))
    monkeypatch.delenv("HF_HUB_DISABLE_PROGRESS_BARS")
    output.configure()
    return found


@pytest.mark.parametrize("width", [40, 80, 200])
def test_the_live_line_fits_and_comes_back(monkeypatch: pytest.MonkeyPatch, width: int) -> None:
    terminal = on_terminal(monkeypatch, width)
    view = TrainView(False, ["av", "rl"])
    view.stage("av", resumed=False)
    view.metrics("av", {"step": 50, "steps": 100, "loss": 1.23456789, "lr": 1e-3, "skipped": 0, "seconds": 3.14159265})
    view.done("av", {})
    view.stage("rl", resumed=False)
    view.metrics("rl", evaluation(0, 60, "漢字" * 100 + HOSTILE))
    for i in range(1, 6):
        view.metrics("rl", step(i, 60))
    before = terminal.screen()[-1]
    assert before.startswith("    step 5/60  ")
    view.metrics("rl", alarm(5, message="The watch AR says something else than the live AR does. " * 4))
    assert terminal.screen()[-1] == before
    assert any(line.startswith("warning: step 5: gap: The watch") for line in terminal.screen())
    view.metrics("rl", evaluation(5, 60, HOSTILE))
    assert terminal.screen()[-1] == before
    view.done("rl", {})
    screen = terminal.screen()
    assert max(map(wide, screen)) < width
    assert screen[-1] == ""
    assert screen[0] == "[1/2] av"
    assert "    step 50  steps 100  loss 1.235" in screen[1]
    assert len([line for line in screen if "step 5/60" in line]) == 1
    joined = " ".join(" ".join(screen).split())
    assert "FVE (raw variance, held-out rows, n=400): 0.400 [0.380, 0.420]" in joined
    assert "facts: recall 0.700 facts: precision 0.800" in joined


def test_a_fatal_alarm_leaves_the_line_where_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = on_terminal(monkeypatch, 120)
    view = TrainView(False, ["rl"])
    view.metrics("rl", step(5, 60))
    view.metrics("rl", alarm(5, fatal=True))
    assert terminal.screen()[-1] == ""
    assert "Fatal: nothing after this" in terminal.getvalue()


def test_less_important_figures_go_first() -> None:
    line = step_line(step(12, 60), 12.5, None)
    assert line == (
        "    step 12/60  reward -0.451  fve 0.460  cosine 0.820  gap +0.012  kl 0.01  length 43  ok 99.6 %  |dlogp| 1e-05  "
        "12.5 s/step  10 min left"
    )
    assert step_line(step(12, 60), 12.5, 60) == "    step 12/60  reward -0.451  fve 0.460  ok 99.6 %"[:60]
    assert step_line(step(12, 60), 12.5, 30) == "    step 12/60  fve 0.460"
    assert step_line(step(12, 60), 12.5, 8) == "    s..."
    assert step_line({"step": 1, "steps": 2, "reward": None, "kl": None}, None, 80) == "    step 1/2"


def test_without_a_terminal_there_are_few_plain_lines(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    output.configure()
    view = TrainView(True, ["rl"])
    for i in range(1, 401):
        view.metrics("rl", step(i, 400, seconds=0.5 * i))
    view.metrics("rl", evaluation(400, 400))
    view.metrics("rl", alarm(400))
    view.done("rl", {"seconds": 200.0})
    told = capsys.readouterr()
    lines = told.err.splitlines()
    assert 35 <= len([line for line in lines if "step " in line and "s/step" in line]) <= 45
    assert "0.5 s/step" in lines[5]
    assert any("step 400/400" in line for line in lines)
    assert "\r" not in told.err
    assert "\x1b" not in told.err
    assert "warning: step 400: gap: The watch AR disagrees." in lines
    assert json.loads(told.out) == {"stage": "rl", "seconds": 200.0}


def test_slow_steps_are_told_at_least_once_a_minute(capsys: pytest.CaptureFixture[str]) -> None:
    output.configure()
    view = TrainView(False, ["rl"])
    for i in range(1, 21):
        view.metrics("rl", step(i, 4000, seconds=40.0 * i))
    assert len(capsys.readouterr().err.splitlines()) == 10


def test_quiet_drops_the_figures_and_keeps_the_warnings(capsys: pytest.CaptureFixture[str]) -> None:
    output.configure(quiet=True)
    try:
        view = TrainView(False, ["rl"])
        view.stage("rl", resumed=True)
        view.metrics("rl", step(1, 60))
        view.metrics("rl", evaluation(1, 60))
        view.metrics("rl", alarm(1))
        assert capsys.readouterr().err.splitlines() == ["warning: step 1: gap: The watch AR disagrees."]
    finally:
        output.configure()


def test_terminal_codes_in_explanations_and_alarms_are_shown() -> None:
    told = [*evaluation_lines(evaluation(1, 2, HOSTILE), None), alarm_text(alarm(1, message=HOSTILE), None)]
    assert (
        alarm_text(alarm(3, name="entropy_collapse", message=""), None)
        == "step 3: entropy collapse: value 0.12, limit 0.1"
    )
    assert not any(c in line for line in told for c in "\n\r\x1b\x00\u202e")


@given(st.text(), st.integers(0, 50))
def test_fitted_text_fits(text: str, width: int) -> None:
    assert wide(fitted(text, width)) <= width
    if wide(text) <= width:
        assert fitted(text, width) == text


# -- the history ---------------------------------------------------------------------------------------------


def tables(page: str) -> list[list[list[str]]]:
    """The tables of a Markdown page as a parser of Markdown sees them."""
    found: list[list[list[str]]] = []
    for token in MarkdownIt("commonmark").enable("table").parse(page):
        if token.type == "table_open":
            found.append([])
        elif token.type == "tr_open":
            found[-1].append([])
        elif token.type == "inline" and found and token.level > 3:
            found[-1][-1].append("".join(c.content for c in token.children or [] if c.type != "softbreak"))
            assert all(child.type in ("text", "text_special") for child in token.children or []), token.content
    return found


@pytest.mark.parametrize("text", ["next word: drum.", HOSTILE])
def test_the_history_is_json_and_its_page_has_whole_tables(tmp_path: Path, text: str) -> None:
    run = write_run(tmp_path, [*rl_lines(60, text), alarm(7, message=text)])
    data = json.loads(json.dumps(history(run), allow_nan=False))
    assert data["hash"] == read_run(run).digest
    assert data["commit"] == "abc1234"
    assert [row["step"] for row in data["rl"]["evaluations"]] == [0, 10, 20, 30, 40, 50, 60]
    assert ["samples" in row for row in data["rl"]["evaluations"]] == [True, *[False] * 5, True]
    page = render(data)
    assert page.startswith(
        "<!-- Generated: python -m nla_hub.training.view.history --markdown model_cards/tiny/history.json > "
    )
    found = tables(page)
    assert len(found) == 6
    for table in found:
        assert {len(row) for row in table} == {len(table[0])}
    stages, steps, evaluations, facts, samples, alarms = sorted(found, key=lambda t: page.index(_head(t)))
    assert [row[0] for row in stages[1:]] == ["source", "data", "ar", "av", "rl", "export", "eval"]
    assert "held out ar 0.62" in stages[3][4]
    assert len(steps) == 61
    assert evaluations[1][1] == "FVE (raw variance, held-out rows, n=400): 0.400 [0.380, 0.420]"
    assert facts[1][:4] == ["person", "380", "0.500", "0.700"]
    assert len(samples) == 9
    assert alarms[1][:2] == ["7", "gap"]
    if text is HOSTILE:
        assert '<script>alert("x")</script>' in samples[1][1]


def _head(table: list[list[str]]) -> str:
    return "| " + " | ".join(table[0]) + " |"


def test_the_history_of_a_run_without_rl(tmp_path: Path) -> None:
    data = history(write_run(tmp_path, None))
    assert data["rl"] is None
    assert [stage["stage"] for stage in data["stages"]] == ["source", "data", "ar", "av", "export", "eval"]
    assert "no finished step of reinforcement learning" in render(data)


def test_the_command_prints_data_and_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = write_run(tmp_path / "run", rl_lines(10))
    assert main([str(run)]) == 0
    printed = capsys.readouterr().out
    (tmp_path / "history.json").write_text(printed)
    assert main(["--markdown", str(tmp_path / "history.json")]) == 0
    assert capsys.readouterr().out == render(history(run))
    assert main([str(tmp_path)]) == 1
    assert "not the directory of a run" in capsys.readouterr().err
    assert main(["--markdown", str(run)]) == 1
    assert "cannot be read" in capsys.readouterr().err


@given(st.integers(0, 500))
def test_thinned_rows_keep_both_ends(n: int) -> None:
    kept = thinned(range(n), ROWS)
    assert len(kept) == min(n, ROWS)
    assert len(set(kept)) == len(kept)
    if n:
        assert (kept[0], kept[-1]) == (0, n - 1)


# -- these checks can fail -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    ["<p><b>x</p>", "<p>", "</p>", "<script></script>", '<p onclick="x">a</p>', '<p style="x">a</p>', "<img>",
     '<svg><a href="x"></a></svg>', '<p id="a">x</p><p id="a">y</p>', '<svg aria-labelledby="b"></svg>'],
)  # fmt: skip
def test_the_check_of_a_page_sees_what_is_wrong(text: str) -> None:
    with pytest.raises(AssertionError):
        Page(text)


def test_a_page_that_does_not_escape_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = write_run(tmp_path, rl_lines(3, HOSTILE))
    monkeypatch.setattr("nla_hub.training.view.report.escape", str)
    with pytest.raises(AssertionError):
        opened(run)


def test_a_line_that_is_too_long_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = on_terminal(monkeypatch, 40)
    for module in ("train_view", "status_line"):
        monkeypatch.setattr(f"nla_hub.cli.{module}.columns", lambda: 90)
    TrainView(False, ["rl"]).metrics("rl", step(5, 60))
    assert max(map(wide, terminal.screen())) > 40
