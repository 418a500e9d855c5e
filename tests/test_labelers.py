"""Labelers against servers that are slow, busy, dying and talking nonsense: nothing is paid twice, nothing is lost."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import textwrap
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from av_server import Fault, within
from conftest import Case
from label_server import BATCHES, LabelServer, error, good

from nla_hub.engines.remote.pace import Batch, Stopped
from nla_hub.errors import InputError, MissingExtraError, RecipeError, RunError, TrainingError
from nla_hub.training.data import make_labeler
from nla_hub.training.labelers import LabelContext, LabelRequest, opened
from nla_hub.training.labeling import anthropic_batch, calls, from_source
from nla_hub.training.labeling.anthropic_batch import AnthropicLabeler
from nla_hub.training.labeling.cache import FILE, Answer, LabelCache, key_of
from nla_hub.training.labeling.cost import Prices
from nla_hub.training.labeling.from_nla import NLALabeler
from nla_hub.training.labeling.from_source import SourceLabeler, SourceSettings
from nla_hub.training.labeling.limits import Pace
from nla_hub.training.labeling.openai_api import OpenAILabeler
from nla_hub.training.labeling.prompt import TEMPLATE, PromptSettings, judge
from nla_hub.training.recipe import LabelSpec

KEY = "sk-Very-Secret-0123456789"
TESTS = Path(__file__).parent


def requests_for(n: int, *, start: int = 0) -> list[LabelRequest]:
    documents = [SimpleNamespace(content=f"Document {i:03d} is about something else.") for i in range(start, start + n)]
    return [LabelRequest(document, 20) for document in documents]


def labels_for(requests: list[LabelRequest]) -> list[str | None]:
    rules = PromptSettings()
    return [judge(good(rules.prompt(request)), "stop", rules)[0] for request in requests]


@pytest.fixture
def server() -> Iterator[LabelServer]:
    made = LabelServer()
    yield made
    made.close()


@pytest.fixture(autouse=True)
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    """No waiting between attempts, and no key of whoever runs the tests."""
    monkeypatch.setattr(calls, "FIRST_DELAY", 0.001)
    monkeypatch.setattr(calls, "LONGEST_DELAY", 0.01)
    monkeypatch.setattr(anthropic_batch, "SETTLING", 0.001)
    for name in ("OPENAI_API_KEY", "ANTHROPIC_API_KEY"):
        monkeypatch.delenv(name, raising=False)


class Told(list[dict[str, Any]]):
    """What a run was told."""

    def last(self, name: str) -> Any:
        return [figures[name] for figures in self if name in figures][-1]


def openai(server: LabelServer, directory: Path, told: list[dict[str, Any]] | None = None, **settings: Any) -> Any:
    pytest.importorskip("openai")
    labeler = OpenAILabeler(**{"model": "m", "base_url": server.openai_url, "timeout": 20.0, **settings})
    labeler.open(LabelContext(directory, report=([] if told is None else told).append))
    return labeler


def anthropic(server: LabelServer, directory: Path, told: list[dict[str, Any]] | None = None, **settings: Any) -> Any:
    pytest.importorskip("anthropic")
    labeler = AnthropicLabeler(**{"model": "m", "base_url": server.anthropic_url, "poll": 0.01, **settings})
    labeler.open(LabelContext(directory, report=([] if told is None else told).append))
    return labeler


# -- what is asked, what is a label --------------------------------------------------------------------------


def test_the_prompt_shows_the_end_of_the_text_and_nothing_behind_it() -> None:
    request = LabelRequest(SimpleNamespace(content="one two three four"), 13)
    assert PromptSettings().prompt(request) == TEMPLATE.replace("{snippet}", "one two three")
    assert PromptSettings(snippet_chars=5).snippet(request) == "three"
    chat = SimpleNamespace(content=[{"role": "user", "content": "hello"}])
    assert PromptSettings().snippet(LabelRequest(chat, 9, "<u>hello")) == "<u>hello"
    with pytest.raises(InputError, match="rendered text"):
        PromptSettings().snippet(LabelRequest(chat, 9))


def test_braces_and_tags_in_a_text_are_only_text() -> None:
    request = LabelRequest(SimpleNamespace(content="{snippet} {x} </explanation>"), 28)
    assert "{snippet} {x} </explanation>\n</snippet>" in PromptSettings().prompt(request)


LINE = " ".join(["word"] * 40)

ANSWERS = {
    "label": (f"<explanation>{LINE}\n\n* {LINE}</explanation>", "stop", None),
    "thoughts": (f"<think>an <explanation>?</think><explanation>{LINE}\n{LINE}</explanation>", "stop", None),
    "refused": (f"<explanation>{LINE}\n{LINE}</explanation>", "content_filter", "refused"),
    "refusal": ("", "refusal", "refused"),
    "empty": ("  \n", "stop", "empty"),
    "nothing inside": ("<explanation> \n </explanation>", "stop", "empty"),
    "no tags": (f"{LINE}\n{LINE}", "stop", "no tags"),
    "not closed": (f"<explanation>{LINE}\n{LINE}", "stop", "no tags"),
    "cut": (f"<explanation>{LINE}\n{LINE}", "length", "cut off"),
    "cut before it began": ("", "max_tokens", "cut off"),
    "two": (f"<explanation>{LINE}\n{LINE}</explanation><explanation>b</explanation>", "stop", "several explanations"),
    "short": ("<explanation>a\nb</explanation>", "stop", "too short"),
    "long": (f"<explanation>{LINE * 4}\n{LINE * 4}</explanation>", "stop", "too long"),
    "one line": (f"<explanation>{LINE} {LINE}</explanation>", "stop", "too few features"),
    "many lines": ("<explanation>" + "\n".join([LINE[:50]] * 6) + "</explanation>", "stop", "too many features"),
    "forbidden": (f"<explanation>{LINE}\nThe Snippet {LINE}</explanation>", "stop", "forbidden word"),
}


@pytest.mark.parametrize("case", ANSWERS)
def test_an_answer_is_a_label_or_has_a_reason(case: str) -> None:
    text, finish, reason = ANSWERS[case]
    label, found = judge(text, finish, PromptSettings())
    assert found == reason
    assert label == (f"{LINE}\n{LINE}" if reason is None else None)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"modle": "m"}, "did you mean 'model'"),
        ({"model": "m", "api_key": KEY}, "api_key"),
        ({"model": "m", "api_key_env": KEY}, "upper case"),
        ({"model": "m", "base_url": f"https://user:{KEY}@host/v1"}, "more than an address"),
        ({"model": "m", "base_url": f"https://host/v1?key={KEY}"}, "more than an address"),
        ({"model": "m", "base_url": "host"}, "expected http"),
        ({"model": "m", "template": "no place"}, "stands 0 times"),
        ({"model": "m", "max_cost": 1.0}, "max_cost: needs"),
        ({"model": "m", "input_price": 1.0}, "only one"),
        ({"model": "m", "min_words": 300}, "max_words"),
        ({"model": "m", "options": {"stream": True}}, "options: stream"),
        ({"model": "m", "concurrency": 0}, "concurrency"),
    ],
)
def test_settings_are_read_strictly_and_never_show_a_key(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(RecipeError, match=said) as caught:
        make_labeler(LabelSpec("openai", settings))
    assert KEY not in str(caught.value)


@pytest.mark.parametrize("name", ["openai", "anthropic"])
def test_an_absent_package_is_named_with_its_extra(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, server: LabelServer
) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    labeler: Any = make_labeler(LabelSpec(name, {"model": "m", "base_url": server.openai_url}))
    with opened(labeler, LabelContext(tmp_path)), pytest.raises(MissingExtraError, match="labelers"):
        labeler.label(requests_for(1))


# -- the cache -----------------------------------------------------------------------------------------------


def test_a_snippet_is_asked_once_whatever_asks_again(server: LabelServer, tmp_path: Path) -> None:
    requests = requests_for(6)
    mixed = [requests[i] for i in (3, 0, 3, 5, 1, 0, 2, 4)]
    assert openai(server, tmp_path).label(mixed) == labels_for(mixed)
    assert openai(server, tmp_path, concurrency=2, timeout=9.0).label(requests) == labels_for(requests)
    assert Counter(server.asked) == Counter(PromptSettings().prompt(request) for request in requests)


@pytest.mark.parametrize(
    "changed",
    [
        {"model": "other"},
        {"temperature": 0.5},
        {"max_output_tokens": 300},
        {"options": {"top_p": 0.9}},
        {"template": "Other. {snippet}"},
        {"snippet_chars": 5},
        {"seed": 1},
    ],
)
def test_whatever_changes_the_question_is_asked_anew(
    server: LabelServer, tmp_path: Path, changed: dict[str, Any]
) -> None:
    openai(server, tmp_path).label(requests_for(1))
    openai(server, tmp_path, **changed).label(requests_for(1))
    assert len(server.asked) == 2
    for name in ("model", "temperature", "seed"):
        assert server.bodies[1].get(name) == changed.get(name, {"model": "m"}.get(name))


def test_another_address_is_the_same_question(server: LabelServer, tmp_path: Path) -> None:
    openai(server, tmp_path).label(requests_for(1))
    openai(server, tmp_path, base_url=server.openai_url.replace("127.0.0.1", "localhost")).label(requests_for(1))
    assert len(server.asked) == 1


def test_a_cache_of_ones_own_is_shared_by_runs(server: LabelServer, tmp_path: Path) -> None:
    for run in ("a", "b"):
        openai(server, tmp_path / run, cache=str(tmp_path / "shared")).label(requests_for(3))
    assert len(server.asked) == 3
    assert not (tmp_path / "a").exists()


def test_without_a_place_for_answers_nothing_is_asked(server: LabelServer) -> None:
    pytest.importorskip("openai")
    with pytest.raises(InputError, match="where answers are stored"):
        OpenAILabeler(model="m", base_url=server.openai_url).label(requests_for(1))
    assert not server.asked


def test_bad_answers_are_dropped_counted_and_not_paid_again(server: LabelServer, tmp_path: Path) -> None:
    requests, told = requests_for(4), Told()
    server.text = lambda prompt: good(prompt) if "001" not in prompt else "I would rather not."
    wanted = [None if i == 1 else label for i, label in enumerate(labels_for(requests))]
    for _ in range(2):
        assert openai(server, tmp_path, told).label(requests) == wanted
        assert told.last("labels_dropped") == {"no tags": 1}
        assert len(server.asked) == 4
    # Other rules cost nothing; another attempt is asked for what was dropped, and for nothing else.
    assert openai(server, tmp_path, max_words=60).label(requests) == [None] * 4
    assert len(server.asked) == 4
    server.text = good
    for _ in range(2):
        assert openai(server, tmp_path, attempts=2).label(requests) == labels_for(requests)
        assert Counter("001" in prompt for prompt in server.asked) == {True: 2, False: 3}


def test_a_labeler_of_no_use_is_stopped(server: LabelServer, tmp_path: Path) -> None:
    server.text = lambda prompt: "no"
    with pytest.raises(TrainingError, match="Nearly no answer") as caught:
        openai(server, tmp_path).label(requests_for(200))
    assert "no tags 50" in str(caught.value)
    assert len(server.asked) <= 50 + 8


def test_a_damaged_cache_is_not_thrown_away(server: LabelServer, tmp_path: Path) -> None:
    (tmp_path / FILE).write_bytes(b"no data base, but paid" * 100)
    with pytest.raises(RunError, match=r"damaged[\s\S]*paid"):
        openai(server, tmp_path).label(requests_for(1))
    assert (tmp_path / FILE).read_bytes().startswith(b"no data base")
    assert not server.asked


@contextmanager
def files_up_to(limit: int) -> Iterator[None]:
    """A disk that is full: no file grows beyond `limit` bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, ignored)


def test_a_full_disk_stops_the_asking_and_keeps_what_is_stored(server: LabelServer, tmp_path: Path) -> None:
    requests = requests_for(60)
    with files_up_to(150_000), pytest.raises(RunError, match=r"cannot be stored[\s\S]*make room"):
        openai(server, tmp_path, concurrency=2).label(requests)
    with LabelCache(tmp_path) as cache:
        stored = cache.spent(openai(server, tmp_path).asker_id()).answers
    asked = len(server.asked)
    assert 0 < stored < 60
    assert asked <= stored + 4  # what was in flight, at most
    assert openai(server, tmp_path).label(requests) == labels_for(requests)
    assert len(server.asked) == asked + 60 - stored


def test_too_little_room_is_seen_before_anything_is_paid(
    server: LabelServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=5000))
    assert openai(server, tmp_path).label(requests_for(1))
    with pytest.raises(RunError, match="not enough room"):
        openai(server, tmp_path).label(requests_for(4))
    assert len(server.asked) == 1


# -- a server in trouble -------------------------------------------------------------------------------------

TROUBLE = {
    "busy": Fault(429, body=error("slow down", "rate_limit_error")),
    "broken": Fault(500, body=b"oops"),
    "unavailable": Fault(503, body=b""),
    "overloaded": Fault(529, body=error("overloaded", "overloaded_error")),
    "cut": Fault(cut=True),
    "reset": Fault(reset=True),
    "not json": Fault(body=b"<html>one moment</html>"),
    "wrong shape": Fault(body=b'{"choices": 3}'),
    "slow": Fault(sleep=0.05),
}


@pytest.mark.parametrize("trouble", TROUBLE)
def test_trouble_that_passes_costs_no_answer(server: LabelServer, tmp_path: Path, trouble: str) -> None:
    requests, told = requests_for(10), Told()
    server.faults.extend([TROUBLE[trouble]] * 2)
    assert openai(server, tmp_path, told, concurrency=3).label(requests) == labels_for(requests)
    assert Counter(server.sent) == Counter(PromptSettings().prompt(request) for request in requests)
    assert server.most_running <= 3
    assert len(server.asked) == (10 if trouble == "slow" else 12)
    unanswered = [figures.get("label_requests_without_answer") for figures in told][-1]
    assert unanswered == (2 if trouble in ("cut", "reset") else None)


def test_an_answer_that_does_not_come_in_time_is_asked_for_again(server: LabelServer, tmp_path: Path) -> None:
    server.faults.append(Fault(sleep=1.0))
    told = Told()
    assert openai(server, tmp_path, told, timeout=0.2).label(requests_for(1)) == labels_for(requests_for(1))
    assert told.last("label_requests_without_answer") == 1


def test_retry_after_holds_back_everybody(server: LabelServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paused: list[float] = []
    monkeypatch.setattr(Pace, "pause", lambda self, seconds: paused.append(seconds))
    monkeypatch.setattr(Batch, "sleep", lambda self, seconds: paused.append(seconds))
    server.faults.append(Fault(429, {"Retry-After": "7"}, error("slow down")))
    assert openai(server, tmp_path, patience=10.0).label(requests_for(1)) == labels_for(requests_for(1))
    assert paused == [7.0, 7.0]
    server.faults.append(Fault(429, {"Retry-After": "3600"}, error("slow down")))
    with pytest.raises(TrainingError, match="busy"):
        openai(server, tmp_path, patience=10.0).label(requests_for(1, start=5))
    assert len(server.asked) == 3


def test_a_server_that_dies_and_comes_back(server: LabelServer, tmp_path: Path) -> None:
    requests = requests_for(40)

    def dying() -> None:
        within(20, lambda: len(server.sent) >= 10)
        server.die()
        server.come_back()

    server.fault = lambda prompt: Fault(sleep=0.01)
    thread = threading.Thread(target=dying)
    thread.start()
    try:
        assert openai(server, tmp_path, concurrency=2).label(requests) == labels_for(requests)
    finally:
        thread.join()
    assert set(Counter(server.sent).values()) == {1}


def test_a_server_that_stays_away(server: LabelServer, tmp_path: Path) -> None:
    requests = requests_for(20)
    server.fault = lambda prompt: Fault(503) if len(server.sent) >= 5 else Fault()
    with pytest.raises(TrainingError, match=r"busy or broken[\s\S]*goes on where it stopped"):
        openai(server, tmp_path, concurrency=2, patience=0.2).label(requests)
    server.die()
    with pytest.raises(TrainingError, match="does not answer"):  # never reached: no patience for a wrong address
        openai(server, tmp_path).label(requests)
    server.come_back()
    server.fault = lambda prompt: Fault()
    assert openai(server, tmp_path).label(requests) == labels_for(requests)
    assert set(Counter(server.sent).values()) == {1}


NONSENSE = {
    "html": b"<html></html>",
    "half": b'{"choices": [{"message"',
    "list": b"[]",
    "no choices": b'{"id": "x"}',
    "no message": b'{"choices": [{}]}',
    "a number": b'{"choices": [{"message": {"content": 5}}]}',
    "huge": json.dumps({"data": "x" * 3_000_000}).encode(),
    "not text": b"\xff\xfe\x00",
}


@pytest.mark.parametrize("kind", NONSENSE)
def test_nonsense_is_an_error_and_never_a_label(server: LabelServer, tmp_path: Path, kind: str) -> None:
    server.fault = lambda prompt: Fault(body=NONSENSE[kind])
    with pytest.raises(TrainingError, match="What answers is not") as caught:
        openai(server, tmp_path, concurrency=1).label(requests_for(3))
    assert len(str(caught.value)) < 700
    assert len(server.asked) == 3  # one request, three times
    server.fault = lambda prompt: Fault()
    assert openai(server, tmp_path).label(requests_for(3)) == labels_for(requests_for(3))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda answer: {**answer, "choices": []}, "empty"),
        (lambda answer: {**answer, "choices": [{"message": {"content": None}, "finish_reason": "stop"}]}, "empty"),
        (lambda answer: {**answer, "choices": [{"message": {"content": "", "refusal": "no"}}]}, "refused"),
        (lambda answer: {**answer, "choices": [{"message": {"content": "<explanation>" + "x " * 300_000}}]}, "no tags"),
    ],
)
def test_answers_without_content_are_kept_as_what_they_are(
    server: LabelServer, tmp_path: Path, change: Any, reason: str
) -> None:
    server.twist = change
    told = Told()
    for _ in range(2):
        assert openai(server, tmp_path, told).label(requests_for(1)) == [None]
        assert told.last("labels_dropped") == {reason: 1}
    assert len(server.asked) == 1
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) < 1_000_000


def test_one_refused_request_is_left_out_and_many_are_an_error(server: LabelServer, tmp_path: Path) -> None:
    told = Told()
    refusal = Fault(400, body=error("the prompt is against the policy"))
    server.fault = lambda prompt: refusal if "002" in prompt else Fault()
    wanted = [None if i == 2 else label for i, label in enumerate(labels_for(requests_for(5)))]
    assert openai(server, tmp_path, told).label(requests_for(5)) == wanted
    assert told.last("labels_dropped") == {"refused by the service": 1}
    server.fault = lambda prompt: refusal
    with pytest.raises(TrainingError, match=r"10 requests in a row[\s\S]*against the policy"):
        openai(server, tmp_path).label(requests_for(100, start=10))
    assert len(server.asked) < 5 + 10 + 8 + 1
    server.fault = lambda prompt: Fault()
    assert openai(server, tmp_path).label(requests_for(5)) == labels_for(
        requests_for(5)
    )  # it cost nothing: asked again


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        (Fault(429, body=error("You exceeded your current quota", code="insufficient_quota")), "no credit"),
        (Fault(402, body=error("pay")), "no credit"),
        (Fault(404, body=error("no such model")), "no such model or address"),
        (Fault(403, body=error("not you")), "environment variable"),
    ],
)
def test_what_no_waiting_helps_stops_at_once(server: LabelServer, tmp_path: Path, fault: Fault, said: str) -> None:
    server.fault = lambda prompt: fault
    with pytest.raises(TrainingError, match=said):
        openai(server, tmp_path, concurrency=2).label(requests_for(50))
    assert len(server.asked) <= 4


# -- keys ----------------------------------------------------------------------------------------------------


def chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


@pytest.mark.parametrize("make", [openai, anthropic])
def test_a_wrong_key_stops_at_once_and_is_never_shown(
    server: LabelServer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    make: Any,
) -> None:
    monkeypatch.setenv("LABEL_KEY", KEY)
    server.key = "another"
    told = Told()
    labeler = make(server, tmp_path, told, api_key_env="LABEL_KEY")
    with caplog.at_level("DEBUG", logger="nla_hub"), pytest.raises(TrainingError, match="LABEL_KEY") as caught:
        labeler.label(requests_for(30))
    assert "401" in str(caught.value) and "Incorrect API key provided: ***" in str(caught.value)
    assert len(server.bodies) <= 8
    seen = [
        *map(repr, chain(caught.value)),
        *map(str, chain(caught.value)),
        caplog.text,
        repr(told),
        repr(labeler.settings),
    ]
    seen += [path.read_bytes().decode("latin-1") for path in tmp_path.rglob("*") if path.is_file()]
    assert not any(KEY in text for text in seen)
    server.key = KEY
    assert labeler.label(requests_for(3)) == labels_for(requests_for(3))
    assert all(KEY.encode() not in path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())


@pytest.mark.parametrize(("make", "usual"), [(openai, "OPENAI_API_KEY"), (anthropic, "ANTHROPIC_API_KEY")])
def test_a_key_is_needed_only_where_it_is_for(
    server: LabelServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make: Any, usual: str
) -> None:
    with pytest.raises(InputError, match=rf"{usual}[\s\S]*export {usual}"):
        make(server, tmp_path, base_url=None).label(requests_for(1))
    with pytest.raises(InputError, match="MISSING_KEY"):
        make(server, tmp_path, api_key_env="MISSING_KEY").label(requests_for(1))
    monkeypatch.setenv(usual, KEY)
    assert make(server, tmp_path).label(requests_for(1)) == labels_for(requests_for(1))
    assert KEY not in repr(server.headers)  # it is for the company, not for whoever listens here
    monkeypatch.delenv(usual)
    assert make(server, tmp_path, base_url=None).label(requests_for(1)) == labels_for(requests_for(1))  # all stored


# -- pace and price ------------------------------------------------------------------------------------------


class Clock:
    """A clock that only sleeping moves, and a batch that sleeps by it."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds

    def check(self) -> None:
        pass


def turns(pace: Pace, clock: Clock, n: int, tokens: float) -> list[float]:
    found = []
    for _ in range(n):
        pace.wait(clock, tokens)  # type: ignore[arg-type]
        found.append(clock.now)
    return found


@pytest.mark.parametrize(
    ("limits", "a_minute"), [((30, None), 30), ((None, 1000), 10), ((30, 1000), 10), ((5, 1000), 5)]
)
def test_no_minute_holds_more_than_it_may(limits: tuple[float | None, float | None], a_minute: int) -> None:
    clock = Clock()
    times = turns(Pace(*limits, clock=clock), clock, 40, 100.0)
    assert max(sum(begin <= t < begin + 59.999 for t in times) for begin in times) == a_minute
    assert times[-1] - times[0] == pytest.approx(39 * 60 / a_minute)


def test_the_pace_follows_what_was_counted_and_waits_when_asked() -> None:
    clock = Clock()
    pace = Pace(None, 600, clock=clock)
    turns(pace, clock, 1, 100)
    pace.settle(100, 400)
    assert turns(pace, clock, 1, 100) == [pytest.approx(140.0)]
    free = Pace(None, None, clock=clock)
    free.pause(30)
    assert turns(free, clock, 2, 100) == [pytest.approx(170.0)] * 2
    ended = Batch()
    ended.end()
    with pytest.raises(Stopped):
        Pace(1, None).wait(ended, 1)


def test_an_estimate_needs_no_documents_and_a_price_of_the_user() -> None:
    unknown = OpenAILabeler(model="m").estimate(1000, 400)
    assert unknown.cost is None and "not known" in str(unknown)
    priced = OpenAILabeler(model="m", input_price=2.0, output_price=10.0).estimate(1000, 400)
    assert priced.cost == pytest.approx((priced.input_tokens * 2 + priced.output_tokens * 10) / 1e6)
    assert priced.input_tokens > 400_000
    assert OpenAILabeler(model="m", snippet_chars=400).estimate(1000, 400).input_tokens < priced.input_tokens - 290_000
    assert SourceLabeler().estimate(10, 400).cost == 0.0
    assert Prices(1.0, None).cost(5, 5) is None


@pytest.mark.parametrize("make", [openai, anthropic])
def test_what_is_too_expensive_is_refused_before_it_is_asked(server: LabelServer, tmp_path: Path, make: Any) -> None:
    prices = {"input_price": 1.0, "output_price": 5.0, "max_cost": 0.01}
    told = Told()
    with pytest.raises(TrainingError, match=r"more than labels.settings.max_cost[\s\S]*raise max_cost"):
        make(server, tmp_path, told, **prices).label(requests_for(100))
    assert not server.asked
    labeler = make(server, tmp_path, told, **prices)
    assert labeler.label(requests_for(3)) == labels_for(requests_for(3))
    assert told.last("label_cost") == pytest.approx(3 * (100 * 1 + 50 * 5) / 1e6)
    assert "about 0.0" in told.last("label_estimate")
    with pytest.raises(TrainingError, match=r"0\.001\d* were paid before"):  # what an earlier run paid counts too
        make(server, tmp_path, told, **{**prices, "max_cost": 0.0011}).label(requests_for(3, start=3))
    assert make(server, tmp_path, told, **{**prices, "max_cost": 0.0}).label(requests_for(3)) == labels_for(
        requests_for(3)
    )


def test_a_bound_holds_while_answers_cost_more_than_expected(server: LabelServer, tmp_path: Path) -> None:
    server.usage = (400, 600)
    with pytest.raises(TrainingError, match="could cost more"):
        openai(server, tmp_path, concurrency=4, input_price=0.0, output_price=1000.0, max_cost=5.0).label(
            requests_for(20)
        )
    assert len(server.sent) * 0.6 <= 5.0
    assert len(server.sent) == 8


def test_answers_without_usage_are_said_to_be_so(server: LabelServer, tmp_path: Path) -> None:
    server.usage = None
    told = Told()
    openai(server, tmp_path, told).label(requests_for(2))
    assert told.last("label_answers_without_usage") == 2


# -- processes -----------------------------------------------------------------------------------------------

CLIENT = textwrap.dedent("""
    import json, sys
    from pathlib import Path
    from types import SimpleNamespace
    from nla_hub import registry
    from nla_hub.training.labelers import LabelContext, LabelRequest

    name, directory, n, settings = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), json.loads(sys.argv[4])
    labeler = registry.labelers.get(name)(**settings)
    labeler.open(LabelContext(directory))
    documents = [SimpleNamespace(content=f"Document {i:03d} is about something else.") for i in range(n)]
    print(json.dumps(labeler.label([LabelRequest(document, 20) for document in documents])))
""")


def started(name: str, directory: Path, n: int, **settings: Any) -> subprocess.Popen[str]:
    pytest.importorskip(name)
    arguments = [sys.executable, "-c", CLIENT, name, str(directory), str(n), json.dumps({"model": "m", **settings})]
    return subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True, cwd=TESTS.parent)


def killed(process: subprocess.Popen[str]) -> None:
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()


def test_a_killed_labeler_pays_for_no_stored_answer_again(server: LabelServer, tmp_path: Path) -> None:
    server.hold = 17
    process = started("openai", tmp_path, 40, base_url=server.openai_url, concurrency=4)
    assert server.stuck.wait(60)
    assert within(20, lambda: len(server.asked) == 17 + 4 and len(server.sent) == 17)
    with LabelCache(tmp_path) as cache:
        asker = openai(server, tmp_path).asker()
        rules = PromptSettings()
        requests = requests_for(40)

        def stored() -> set[str]:
            found = cache.known(key_of(asker, rules.snippet(r), 0) for r in requests)
            return {rules.prompt(r) for r in requests if key_of(asker, rules.snippet(r), 0) in found}

        # An answer that was sent is stored before its thread asks for the next one.
        assert within(20, lambda: len(stored()) == 17)
        killed(process)
        assert stored() == set(server.sent)
    server.hold = None
    before = list(server.asked)
    assert openai(server, tmp_path).label(requests) == labels_for(requests)
    again = server.asked[len(before) :]
    assert len(again) == len(set(again)) == 40 - 17
    assert not set(again) & stored_prompts(before, 17)
    server.released.set()


def stored_prompts(asked: list[str], n: int) -> set[str]:
    """Of the prompts of a killed process the first ones, which were answered."""
    return set(asked[:n])


def test_two_processes_pay_once(server: LabelServer, tmp_path: Path) -> None:
    server.fault = lambda prompt: Fault(sleep=0.005)
    both = [started("openai", tmp_path, 25, base_url=server.openai_url, concurrency=3) for _ in range(2)]
    outputs = [json.loads(process.communicate()[0]) for process in both]
    assert outputs == [labels_for(requests_for(25))] * 2
    assert Counter(server.asked) == Counter(PromptSettings().prompt(request) for request in requests_for(25))


# -- batches -------------------------------------------------------------------------------------------------


def test_batches_are_sent_in_parts_and_read_in_any_order(server: LabelServer, tmp_path: Path) -> None:
    requests = requests_for(7)
    labeler = anthropic(server, tmp_path, batch_size=3, temperature=0.5, options={"system": "Be brief."})
    assert labeler.label(requests) == labels_for(requests)
    assert [len(batch.requests) for batch in server.batches.values()] == [3, 3, 1]
    assert server.bodies[0]["requests"][0]["params"]["system"] == "Be brief."
    assert server.bodies[0]["requests"][0]["params"]["temperature"] == 0.5
    with LabelCache(tmp_path) as cache:
        assert cache.batches() == []
    assert anthropic(server, tmp_path, temperature=0.5, options={"system": "Be brief."}).label(requests) == labels_for(
        requests
    )
    assert set(server.paid.values()) == {1}


@pytest.mark.parametrize("trouble", ["busy", "unavailable", "cut", "not json"])
def test_trouble_with_batches_pays_nothing_twice(server: LabelServer, tmp_path: Path, trouble: str) -> None:
    fault = TROUBLE[trouble]
    server.faults.append(fault)
    server.poll_faults.extend([fault, Fault(), fault, Fault(), fault])
    assert anthropic(server, tmp_path).label(requests_for(4)) == labels_for(requests_for(4))
    assert set(server.paid.values()) == {1}
    assert len(server.batches) == 1


def test_results_that_break_off_are_fetched_again(server: LabelServer, tmp_path: Path) -> None:
    # One question for its state by us, one by the SDK before it asks for the results.
    server.poll_faults.extend([Fault(), Fault(), Fault(cut=True), Fault(), Fault(reset=True)])
    assert anthropic(server, tmp_path).label(requests_for(30)) == labels_for(requests_for(30))
    assert server.polls[f"{BATCHES}/msgbatch_0/results"] == 3
    assert len(server.batches) == 1


def test_a_killed_process_picks_its_batch_up(server: LabelServer, tmp_path: Path) -> None:
    server.ending = False
    process = started("anthropic", tmp_path, 9, base_url=server.anthropic_url, poll=0.01)
    assert within(60, lambda: server.polls[f"{BATCHES}/msgbatch_0"] > 2)
    killed(process)
    server.batches["msgbatch_0"].ended = True
    assert anthropic(server, tmp_path).label(requests_for(9)) == labels_for(requests_for(9))
    assert list(server.batches) == ["msgbatch_0"]
    assert set(server.paid.values()) == {1}


def test_a_process_killed_while_it_sends_finds_its_batch(server: LabelServer, tmp_path: Path) -> None:
    server.hold = 0
    process = started("anthropic", tmp_path, 9, base_url=server.anthropic_url, poll=0.01)
    assert server.stuck.wait(60)
    killed(process)
    server.hold = None
    server.released.set()
    # Somebody else's batch, younger and of the same size: it is looked at first, and found to be another.
    stranger = {f"k{i}": {"model": "m", "messages": [{"role": "user", "content": f"other {i}"}]} for i in range(9)}
    server.batches["stranger"] = type(server.batches["msgbatch_0"])("stranger", stranger)
    assert anthropic(server, tmp_path).label(requests_for(9)) == labels_for(requests_for(9))
    assert list(server.batches) == ["msgbatch_0", "stranger"]
    assert server.polls[f"{BATCHES}/stranger/results"] == 1


def test_what_never_arrived_is_sent_again(server: LabelServer, tmp_path: Path) -> None:
    with LabelCache(tmp_path) as cache:
        labeler = anthropic(server, tmp_path)
        keys = [key_of(labeler.asker(), PromptSettings().snippet(r), 0) for r in requests_for(3)]
        cache.begin_batch(labeler.asker_id(), keys)  # and then killed, before anything was sent
    assert labeler.label(requests_for(3)) == labels_for(requests_for(3))
    assert len(server.batches) == 1


def test_a_batch_whose_name_got_lost_is_found(server: LabelServer, tmp_path: Path) -> None:
    server.lose = 1
    assert anthropic(server, tmp_path).label(requests_for(5)) == labels_for(requests_for(5))
    assert len(server.batches) == 1
    assert server.polls[BATCHES] == 1


def test_a_batch_that_failed_in_part(server: LabelServer, tmp_path: Path) -> None:
    def result(key: str, params: dict[str, Any]) -> dict[str, Any] | None:
        number = int(params["messages"][0]["content"].partition("Document ")[2][:3])
        first = len(server.batches) == 1
        if number == 0:
            return {"type": "errored", "error": json.loads(error("too odd"))}
        if number == 1 and first:
            return {"type": "errored", "error": json.loads(error("overloaded", "overloaded_error"))}
        return {"type": "expired"} if number == 2 and first else None

    server.result = result
    told = Told()
    wanted = [None, *labels_for(requests_for(6))[1:]]
    assert anthropic(server, tmp_path, told).label(requests_for(6)) == wanted
    assert told.last("labels_dropped") == {"refused by the service": 1}
    assert [len(batch.requests) for batch in server.batches.values()] == [6, 2]
    assert sorted(server.paid.values()) == [1] * 5


def test_batches_that_only_expire_are_an_error_that_loses_nothing(server: LabelServer, tmp_path: Path) -> None:
    server.result = lambda key, params: {"type": "expired"}
    with pytest.raises(TrainingError, match="3 without an answer after 3 batches"):
        anthropic(server, tmp_path).label(requests_for(3))
    server.result = lambda key, params: None
    assert anthropic(server, tmp_path).label(requests_for(3)) == labels_for(requests_for(3))
    assert not server.paid - Counter(server.paid.keys())


def test_a_cancelled_batch_stops_until_it_is_started_again(server: LabelServer, tmp_path: Path) -> None:
    server.result = lambda key, params: {"type": "canceled"} if "000" in json.dumps(params) else None
    with pytest.raises(TrainingError, match="cancelled"):
        anthropic(server, tmp_path).label(requests_for(3))
    server.result = lambda key, params: None
    assert anthropic(server, tmp_path).label(requests_for(3)) == labels_for(requests_for(3))
    assert [len(batch.requests) for batch in server.batches.values()] == [3, 1]


def test_a_batch_that_is_refused(server: LabelServer, tmp_path: Path) -> None:
    server.result = lambda key, params: {"type": "errored", "error": json.loads(error("no such model"))}
    with pytest.raises(TrainingError, match=r"refused every request[\s\S]*no such model"):
        anthropic(server, tmp_path).label(requests_for(3))
    server.fault = lambda prompt: Fault(400, body=error("max_tokens: too many"))
    with pytest.raises(TrainingError, match=r"refuses the batch[\s\S]*too many"):
        anthropic(server, tmp_path).label(requests_for(3))
    with LabelCache(tmp_path) as cache:
        assert cache.batches() == []


def test_a_batch_that_is_gone_is_paid_again_only_when_it_is_given_up(server: LabelServer, tmp_path: Path) -> None:
    server.ending = False
    server.poll_faults.append(Fault(401, body=error("the key was withdrawn", "authentication_error")))
    with pytest.raises(TrainingError, match="wants a key"):
        anthropic(server, tmp_path).label(requests_for(3))
    server.batches["msgbatch_0"].gone = server.ending = True
    with pytest.raises(TrainingError, match=r"abandon=\[msgbatch_0\]"):
        anthropic(server, tmp_path).label(requests_for(3))
    assert len(server.batches) == 1
    assert anthropic(server, tmp_path, abandon=["msgbatch_0"]).label(requests_for(3)) == labels_for(requests_for(3))


@pytest.mark.parametrize(
    "change",
    [
        lambda message: {**message, "content": "text"},
        lambda message: {**message, "content": [3]},
        lambda message: "nothing",
        lambda message: None,
    ],
)
def test_nonsense_in_a_batch_stays_unread(server: LabelServer, tmp_path: Path, change: Any) -> None:
    server.twist = change
    with pytest.raises(TrainingError, match="not what the API promises"):
        anthropic(server, tmp_path).label(requests_for(2))
    server.twist = lambda message: message
    server.batches["msgbatch_0"].results.clear()
    assert anthropic(server, tmp_path).label(requests_for(2)) == labels_for(requests_for(2))
    assert len(server.batches) == 1


# -- in this process -----------------------------------------------------------------------------------------


def greedy(case: Case, prompt: str, n: int) -> list[int]:
    """What transformers itself writes, one prompt alone, without a cache."""
    tokenizer, model = case.source.tokenizer, case.source.model
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True
    )
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    new: list[int] = []
    while len(new) < n and (not new or new[-1] != tokenizer.eos_token_id):
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([[*ids, *new]]), use_cache=False).logits[0, -1]
        new.append(int(logits.argmax()))
    return new


def test_the_source_writes_what_it_writes_alone(crossed: Case) -> None:
    source = crossed.nla.source
    prompts = ["a b", "a much longer prompt than the first one, about nothing", "c"]
    settings = SourceSettings(template="{snippet}", max_output_tokens=12, batch_size=2)
    found: dict[str, Answer] = {}
    for part in from_source.write(source, prompts, ["k0", "k1", "k2"], settings):
        found.update(part)
    for i, prompt in enumerate(prompts):
        ids = greedy(crossed, prompt, 12)
        assert found[f"k{i}"].text == crossed.source.tokenizer.decode(ids, skip_special_tokens=True)
        assert found[f"k{i}"].output_tokens == len(ids)


def test_a_snippets_draws_are_its_own(llama: Case) -> None:
    prompts = [f"prompt {'x' * i}" for i in range(5)]
    keys = [f"k{i}" for i in range(5)]

    def texts(batch_size: int, order: list[int], seed: int = 0) -> dict[str, str]:
        settings = SourceSettings(max_output_tokens=10, batch_size=batch_size, temperature=1.0, seed=seed)
        chosen = [prompts[i] for i in order], [keys[i] for i in order]
        return {k: a.text for part in from_source.write(llama.nla.source, *chosen, settings) for k, a in part.items()}

    alone = texts(1, [0, 1, 2, 3, 4])
    assert texts(3, [4, 2, 0, 1, 3]) == alone
    assert texts(1, [0, 1, 2, 3, 4], seed=1) != alone


def test_the_source_is_loaded_once_and_only_where_an_answer_is_missing(llama: Case, tmp_path: Path) -> None:
    loads: list[int] = []

    def load() -> Any:
        loads.append(1)
        return llama.nla.source

    settings = {"max_output_tokens": 8, "template": "{snippet}"}
    told = Told()
    for _ in range(2):
        labeler: Any = make_labeler(LabelSpec("source", settings))
        with opened(labeler, LabelContext(tmp_path, "base@1", load, told.append)):
            assert labeler.label(requests_for(4)) == [None] * 4
    assert loads == [1]
    assert sum(told.last("labels_dropped").values()) == 4
    with opened(labeler, LabelContext(tmp_path, "base@2", load)):
        labeler.label(requests_for(1))
    assert loads == [1, 1]
    with opened(labeler, LabelContext(tmp_path, "base@3")), pytest.raises(InputError, match="no base model"):
        labeler.label(requests_for(1))


def test_special_tokens_in_a_snippet_are_text(llama: Case) -> None:
    eos = llama.source.tokenizer.eos_token
    settings = SourceSettings(max_output_tokens=3)
    ids = from_source._encoded(llama.nla.source, f"end{eos}here", settings)
    plain = from_source._encoded(llama.nla.source, "endhere", settings)
    assert ids.count(llama.source.tokenizer.eos_token_id) == plain.count(llama.source.tokenizer.eos_token_id)
    with pytest.raises(InputError, match="snippet_chars"):
        from_source._encoded(llama.nla.source, "word " * 5000, settings)


def test_a_pair_explains_the_same_token(llama: Case, tmp_path: Path) -> None:
    told = Told()
    settings = {"nla": str(llama.pair.root), "max_output_tokens": 20}
    text = "Some words to read, one after the other."
    encoded = llama.source.tokenizer(text, return_offsets_mapping=True)
    ends = [end for _, end in encoded["offset_mapping"]][3:6]
    document = SimpleNamespace(content=text)
    requests = [LabelRequest(document, end, text[:end]) for end in ends]
    requests.append(LabelRequest(document, ends[0], "rendered otherwise"))
    labeler = NLALabeler(**settings)
    with opened(labeler, LabelContext(tmp_path, report=told.append)):
        assert len(labeler.label(requests[:3])) == 3
        answers = [stored(tmp_path, labeler, request) for request in requests[:3]]
    wanted = llama.nla.explain(text, [3, 4, 5], temperature=0, max_new_tokens=20)
    assert [answer.text for answer in answers] == [explanation.raw for explanation in wanted]
    other = NLALabeler(**settings)
    with opened(other, LabelContext(tmp_path / "other", report=told.append)):
        assert other.label(requests[3:]) == [None]
    assert told.last("labels_dropped") == {"not read": 1}


def stored(directory: Path, labeler: Any, request: LabelRequest) -> Answer:
    with LabelCache(directory) as cache:
        found = cache.get(key_of(labeler.asker(), labeler.content(request), 0))
    assert found is not None
    return found
