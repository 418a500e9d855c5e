"""Mixed corpora: whose turn it is, what is one document, which split it belongs to, and what is said of bad and short data."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hub_server import Hub
from hypothesis import given, settings
from hypothesis import strategies as st

from nla_hub.errors import InputError, RunError, TrainingError
from nla_hub.explain.inputs import BadItem, Item, TextItem
from nla_hub.training import corpora
from nla_hub.training.corpora import (
    FEW_BAD,
    RESERVED,
    MixedDocument,
    Mixture,
    Splitter,
    content_key,
    turns,
)
from nla_hub.training.gathering import INDEX_NAME, Wanted, gather, kept_documents, keys_of, parsed
from nla_hub.training.specs import CorpusPart

SIZES = {"av_sft": 30, "ar_sft": 20, "rl": 50}
keys = st.binary(min_size=16, max_size=16)
sizes = st.fixed_dictionaries(dict.fromkeys(SIZES, st.integers(1, 10_000)))


def lines(path: Path, *records: Any) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{json.dumps(record)}\n" for record in records), encoding="utf-8")
    return str(path)


def texts(path: Path, n: int, word: str = "text", **more: Any) -> str:
    return lines(path, *({"text": f"{word} {i}", **more} for i in range(n)))


def chat(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}, {"role": "assistant", "content": "yes"}]


def mixture(*parts: str | CorpusPart) -> Mixture:
    return Mixture([CorpusPart(part) if isinstance(part, str) else part for part in parts])


def contents(documents: Iterator[MixedDocument], n: int | None = None) -> list[Any]:
    return [document.content for document in islice(documents, n)]


# -- splits --------------------------------------------------------------------------------------------------


@given(keys, sizes, st.integers(0, 9), st.sampled_from(list(SIZES)), st.integers(1, 100_000))
def test_a_larger_split_takes_documents_and_moves_none_between_others(
    key: bytes, sizes: dict[str, int], seed: int, grown: str, more: int
) -> None:
    before = Splitter(seed, sizes).split_of(key)
    after = Splitter(seed, {**sizes, grown: sizes[grown] + more}).split_of(key)
    assert after in (before, grown)
    assert (before in RESERVED) == (after in RESERVED)
    assert Splitter(seed, dict(reversed(sizes.items()))).split_of(key) == before


@given(keys, sizes, st.integers(0, 9))
def test_what_is_held_out_depends_on_seed_and_content_alone(key: bytes, sizes: dict[str, int], seed: int) -> None:
    found = Splitter(seed, sizes).split_of(key)
    reserved = {Splitter(seed, other).split_of(key) for other in ({"av_sft": 1}, {"rl": 9}, SIZES)} & set(RESERVED)
    assert reserved == ({found} if found in RESERVED else set())


@pytest.mark.parametrize("sizes", [SIZES, {"av_sft": 1, "ar_sft": 1}, {"av_sft": 1, "ar_sft": 10, "rl": 100}])
@pytest.mark.parametrize("seed", [0, 7])
def test_splits_have_their_shares(sizes: dict[str, int], seed: int) -> None:
    splitter, n = Splitter(seed, sizes), 20_000
    found = Counter(splitter.split_of(content_key(f"document {i}")) for i in range(n))
    assert sum(splitter.shares.values()) == pytest.approx(1.0)
    for name, share in splitter.shares.items():
        spread = (n * share * (1 - share)) ** 0.5
        assert abs(found[name] - n * share) < 5 * spread, name
    other = Splitter(seed + 1, sizes)
    moved = sum(splitter.split_of(k) != other.split_of(k) for k in (content_key(str(i)) for i in range(300)))
    assert moved > 50


@given(st.text(), st.sampled_from(["", " ", "\n", "\t \r\n"]), st.sampled_from(["", " ", "\n\n"]))
def test_white_space_at_the_ends_makes_no_other_document(text: str, before: str, after: str) -> None:
    text = text.encode("utf-8", "ignore").decode()
    assert content_key(before + text + after) == content_key(text)
    assert content_key(chat(before + text + after)) == content_key(chat(text))
    assert content_key(chat(text)) != content_key(text)


# -- mixtures ------------------------------------------------------------------------------------------------


@given(st.lists(st.floats(0.01, 100), min_size=1, max_size=6), st.integers(1, 300))
def test_every_part_has_its_share_at_any_time(weights: list[float], n: int) -> None:
    given_so_far: Counter[int] = Counter()
    for total, i in enumerate(islice(turns(weights), n), start=1):
        given_so_far[i] += 1
        for j, weight in enumerate(weights):
            assert abs(given_so_far[j] - total * weight / sum(weights)) < len(weights)


class Listed:
    """A data set of given items."""

    kind = "text"

    def __init__(self, items: Sequence[str | None]) -> None:
        self.found = items

    def describe(self) -> dict[str, Any]:
        return {}

    def items(self, start: int = 0) -> Iterator[Item]:
        for i, text in enumerate(self.found):
            yield BadItem("bad", None, str(i)) if text is None else TextItem(text, None, str(i))


@given(
    st.lists(
        st.lists(st.one_of(st.none(), st.sampled_from("abcdefgh "), st.text()), max_size=30), min_size=1, max_size=3
    ),
    st.data(),
)
@settings(deadline=None)
def test_a_mixture_is_its_parts_each_content_once(parts: list[list[str | None]], data: st.DataObject) -> None:
    weights = [data.draw(st.sampled_from([0.5, 1.0, 3.0])) for _ in parts]
    named = {str(i): [t and t.encode("utf-8", "ignore").decode() for t in part] for i, part in enumerate(parts)}
    mixed = Mixture([CorpusPart(name, weight) for name, weight in zip(named, weights, strict=True)])
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(corpora, "open_dataset", lambda name, **options: Listed(named[name]))
        patched.setattr(corpora, "FEW_BAD", 1000)
        found = contents(mixed.documents())
        n = data.draw(st.integers(0, len(found)))
        assert contents(mixed.documents(), n) == found[:n], "a longer request starts with the same documents"
        assert contents(mixed.documents()) == found
    stripped = [text.strip() for text in found]
    assert len(set(stripped)) == len(stripped)
    assert "" not in stripped
    assert set(found) <= {text for part in named.values() for text in part if text}
    assert sum(report.ended for report in mixed.reports) == 1
    for report in mixed.reports:
        every = named[report.data]
        if report.ended:
            assert report.given + report.bad + report.repeated == len(every)
            assert report.bad == sum(text is None or not text.strip() for text in every)
    taken = Counter(islice(turns(weights), len(found)))
    assert [report.given for report in mixed.reports] == [taken[i] for i in range(len(parts))]


def test_web_text_and_chat_come_by_weight_until_one_of_them_ends(tmp_path: Path) -> None:
    web = texts(tmp_path / "web.jsonl", 100)
    talk = lines(tmp_path / "talk.jsonl", *({"conversation": chat(f"hello {i}")} for i in range(10)))
    mixed = mixture(CorpusPart(web, 3.0), CorpusPart(talk, 1.0, messages="conversation"))
    found = contents(mixed.documents())
    assert [isinstance(content, str) for content in found[:8]] == [True, True, False, True] * 2
    assert [(report.given, report.ended) for report in mixed.reports] == [(32, False), (10, True)]
    assert Counter(isinstance(content, str) for content in found[:40]) == {True: 30, False: 10}
    assert mixed.reports[0].identity["files"][0]["name"] == "web.jsonl"


def test_parquet_text_and_compressed_files(tmp_path: Path) -> None:
    pq.write_table(pa.table({"body": ["one", None, "two"], "id": [7, 8, 9]}), tmp_path / "a.parquet")
    (tmp_path / "notes.txt").write_text("a note\n", encoding="utf-8")
    mixed = mixture(CorpusPart(str(tmp_path / "a.parquet"), column="body"))
    assert [(document.content, document.own_id) for document in mixed.documents()] == [("one", "7"), ("two", "9")]
    assert (mixed.reports[0].bad, mixed.reports[0].given) == (1, 2)
    assert contents(mixture(str(tmp_path / "*.txt")).documents()) == ["a note"]


def test_bad_documents_are_counted_and_quoted_up_to_a_limit(tmp_path: Path) -> None:
    good = [{"text": f"text {i}"} for i in range(60)]
    name = lines(tmp_path / "a.jsonl", *good[:30], {"text": 3}, {"text": "  \n"}, {}, *good[30:], {"text": " text 7 "})
    mixed = mixture(name)
    assert len(contents(mixed.documents())) == 60
    (report,) = mixed.reports
    assert (report.given, report.bad, report.repeated) == (60, 3, 1)
    assert "a.jsonl:31" in report.reasons[0]
    assert "a.jsonl:32: The document is empty" in report.reasons[1]
    few = mixture(lines(tmp_path / "b.jsonl", *[{}] * (FEW_BAD + 1), *good))
    assert len(contents(few.documents())) == 60
    many = mixture(lines(tmp_path / "c.jsonl", *[{}] * (FEW_BAD + 2), *good))
    with pytest.raises(InputError, match=r"12 of the first 12 documents cannot be used[\s\S]*c\.jsonl:1"):
        contents(many.documents())


def test_a_file_that_vanishes_is_a_bad_document_and_one_that_never_was_is_an_error(tmp_path: Path) -> None:
    for name in "ab":
        texts(tmp_path / f"{name}.jsonl", 3, name)
    mixed = mixture(str(tmp_path))
    running = mixed.documents()
    assert next(running).content == "a 0"
    (tmp_path / "b.jsonl").unlink()
    assert contents(running) == ["a 1", "a 2"]
    assert mixed.reports[0].bad == 1
    assert "b.jsonl: This file is no longer there" in mixed.reports[0].reasons[0]
    with pytest.raises(InputError, match=r"nowhere\.jsonl"):
        contents(mixture(str(tmp_path / "nowhere.jsonl")).documents())


def test_errors_speak_of_the_recipe(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no column \"text\"[\s\S]*column: NAME[\s\S]*messages: NAME") as caught:
        contents(mixture(lines(tmp_path / "a.jsonl", {"body": "x"})).documents())
    assert "--" not in str(caught.value)
    np.save(tmp_path / "v.npy", np.ones((3, 2), np.float32))
    with pytest.raises(InputError, match=r"These are vectors; a recipe reads documents"):
        contents(mixture(str(tmp_path / "v.npy")).documents())


# -- gathering -----------------------------------------------------------------------------------------------


def wanted(factor: int = 1, held: int = 4) -> dict[str, Wanted]:
    found = {name: Wanted(n * factor, n * factor, f"{name}.documents") for name, n in SIZES.items()}
    return {**found, "dev": Wanted(held, held), "eval": Wanted(held, 4 * held, "eval.documents")}


def kept(place: Path, split: str) -> list[tuple[str, Any]]:
    return [parsed(line) for block in kept_documents(place, split, 7) for line in block]


def test_gathered_documents_are_in_one_split_and_more_of_them_start_the_same(tmp_path: Path) -> None:
    web, talk = (
        texts(tmp_path / "web.jsonl", 900),
        lines(tmp_path / "talk.jsonl", *({"messages": chat(f"m{i}")} for i in range(300))),
    )
    mixed = mixture(CorpusPart(web, 3.0), CorpusPart(talk))
    few = gather(mixed, Splitter(0, SIZES), wanted(), tmp_path / "few")
    many = gather(mixed, Splitter(0, {name: 4 * n for name, n in SIZES.items()}), wanted(4, 12), tmp_path / "many")
    assert few.documents == {**SIZES, "dev": 4, "eval": few.documents["eval"]}
    assert 4 <= few.documents["eval"] <= 16
    seen: list[bytes] = []
    for split, n in many.documents.items():
        short, long = kept(tmp_path / "few", split), kept(tmp_path / "many", split)
        assert len(long) == n
        assert long[: len(short)] == short
        assert all(doc_id == f"{split}-{content_key(content).hex()}" for doc_id, content in long)
        seen += [content_key(content) for _, content in long]
    assert len(set(seen)) == len(seen)
    assert keys_of(tmp_path / "many" / INDEX_NAME, but=frozenset()) == set(seen)
    held = {content_key(content) for split in RESERVED for _, content in kept(tmp_path / "many", split)}
    assert keys_of(tmp_path / "many" / INDEX_NAME, but=frozenset(RESERVED)) == set(seen) - held
    kinds = Counter(
        isinstance(content, str) for split in many.documents for _, content in kept(tmp_path / "many", split)
    )
    assert kinds[True] / kinds[False] == pytest.approx(3, rel=0.3)


def test_what_was_gathered_is_not_read_again(tmp_path: Path) -> None:
    web = texts(tmp_path / "web.jsonl", 900)
    first = gather(mixture(web), Splitter(0, SIZES), wanted(), tmp_path / "run")
    Path(web).unlink()
    assert gather(mixture(web), Splitter(0, SIZES), wanted(), tmp_path / "run") == first
    assert first.parts[0]["identity"]["files"][0]["name"] == "web.jsonl"
    with pytest.raises(InputError, match=r"web\.jsonl"):
        gather(mixture(web), Splitter(0, SIZES), wanted(), tmp_path / "other")


def test_ids_of_the_data_are_kept_where_they_are_unique(tmp_path: Path) -> None:
    web = lines(tmp_path / "web.jsonl", *({"text": f"text {i}", "id": i if i % 2 else "same"} for i in range(400)))
    gathered = gather(mixture(web), Splitter(0, SIZES), wanted(), tmp_path / "run")
    ids = [doc_id for split in gathered.documents for doc_id, _ in kept(tmp_path / "run", split)]
    assert len(set(ids)) == len(ids)
    for split in gathered.documents:
        for doc_id, content in kept(tmp_path / "run", split):
            own = int(content.split()[1])
            assert doc_id in (f"{split}-{own}" if own % 2 else f"{split}-same", f"{split}-{content_key(content).hex()}")
            assert own % 2 == 0 or doc_id == f"{split}-{own}"


def test_a_corpus_too_short_says_what_is_missing_and_what_to_lower(tmp_path: Path) -> None:
    web, talk = (
        texts(tmp_path / "web.jsonl", 400),
        lines(tmp_path / "talk.jsonl", *({"messages": chat(f"m{i}")} for i in range(20))),
    )
    with pytest.raises(TrainingError) as caught:
        gather(mixture(CorpusPart(web), CorpusPart(talk)), Splitter(0, SIZES), wanted(2), tmp_path / "run")
    message = str(caught.value)
    for part in (
        "too short",
        "41 different documents",
        "5% for eval and 5% for dev",
        "rl: ",
        " of 100 documents",
        "are missing",
        "talk.jsonl ended after 20 documents (0 bad and 0 repeated ones left out)",
        "web.jsonl goes on after 21 documents",
        "lower av_sft.documents and ar_sft.documents and rl.documents",
        "lower the weight of",
    ):
        assert part in message, message
    found = {name: int(message.split(f"{name}: ")[1].split()[0]) for name in SIZES}
    assert sum(found.values()) <= 41
    need = int(message.split("about ")[1].split()[0])
    lines(tmp_path / "talk.jsonl", *({"messages": chat(f"m{i}")} for i in range(need)))
    texts(tmp_path / "web.jsonl", need)
    gather(mixture(CorpusPart(web), CorpusPart(talk)), Splitter(0, SIZES), wanted(2), tmp_path / "run")


def test_a_full_disk_is_said_and_nothing_counts_as_gathered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    web = texts(tmp_path / "web.jsonl", 900)

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr("os.fsync", full)
        with pytest.raises(RunError, match="No space left on device"):
            gather(mixture(web), Splitter(0, SIZES), wanted(), tmp_path / "run")
    again = gather(mixture(web), Splitter(0, SIZES), wanted(), tmp_path / "run")
    assert again == gather(mixture(web), Splitter(0, SIZES), wanted(), tmp_path / "other")


# -- the Hub -------------------------------------------------------------------------------------------------

SCRIPT = """
import sys
from nla_hub.training.corpora import Mixture
from nla_hub.training.specs import CorpusPart

parts = [CorpusPart(name, weight) for name, weight in zip(sys.argv[1::2], map(float, sys.argv[2::2]), strict=True)]
mixture = Mixture(parts)
print("RESULT", [document.content for document in mixture.documents()])
print("RESULT", [report.identity.get("commit") for report in mixture.reports])
"""


def test_data_sets_of_the_hub_are_streamed(tmp_path: Path) -> None:
    texts(tmp_path / "web" / "train.jsonl", 4, "web")
    lines(tmp_path / "talk" / "a.jsonl", *({"messages": chat(f"m{i}")} for i in range(9)))
    local = texts(tmp_path / "local.jsonl", 9, "here")
    hub = Hub({"owner/web": tmp_path / "web", "owner/talk": tmp_path / "talk"}, {})
    web = "owner/web" if find_spec("datasets") else "hf://datasets/owner/web/train.jsonl"
    arguments = [web, "2", "hf://datasets/owner/talk/a.jsonl", "1", local, "1"]
    environment = {
        **os.environ,
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(tmp_path / "home"),
        "HF_HUB_OFFLINE": "0",
        "HF_DATASETS_OFFLINE": "0",
    }
    try:
        done = subprocess.run(
            [sys.executable, "-W", "ignore", "-c", SCRIPT, *arguments],
            env=environment,
            capture_output=True,
            text=True,
            check=False,
            timeout=100,
        )
    finally:
        hub.close()
    results = [eval(line.removeprefix("RESULT ")) for line in done.stdout.splitlines() if "RESULT" in line]
    assert len(results) == 2, done.stderr
    assert results[0] == ["web 0", chat("m0"), "here 0", "web 1", "web 2", chat("m1"), "here 1", "web 3"]
    assert [commit is not None for commit in results[1]] == [True, True, False]
