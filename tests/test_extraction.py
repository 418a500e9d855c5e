"""The data stage: the same bytes from any number of processes, also after a kill; nothing leaks, nothing is lost unsaid."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from copy import deepcopy
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from test_training import RL, SOURCE, Silent, small_recipe
from test_training_processes import launch

from nla_hub import registry
from nla_hub.errors import InputError, RunError, TextError, TrainingError
from nla_hub.evaluation.protocols import read_corpus
from nla_hub.loading import Source
from nla_hub.pretrained import LoadOptions, load_tokenizer, load_trunk
from nla_hub.sidecar import Site
from nla_hub.source_text import encode_source
from nla_hub.tiny import documents
from nla_hub.tiny.labeler import TinyLabeler
from nla_hub.training import extraction, splits
from nla_hub.training.corpora import content_key
from nla_hub.training.data import collect, read_rows, write_rows
from nla_hub.training.data_stage import in_each, prepare_rows
from nla_hub.training.extraction import Extraction
from nla_hub.training.labelers import LabelRequest
from nla_hub.training.pipeline import Pipeline
from nla_hub.training.processes import Processes
from nla_hub.training.recipe import CorpusPart, DataSpec, EvalSpec, LabelSpec, Recipe
from nla_hub.training.run import RunDirectory, StageDirectory
from nla_hub.training.splits import EVALUATION_NAME, data_splits, require_held_out, split_documents

BLOCK = 8

Files = dict[str, bytes]


class Endings:
    """Labels that say where their row ends; every fifth row has none."""

    def label(self, requests: Sequence[LabelRequest]) -> list[str | None]:
        return [None if len(r.document.content) % 5 == 0 else f"ends with {_prefix(r)[-9:]}" for r in requests]


def _prefix(request: LabelRequest) -> str:
    assert request.prefix is not None
    assert request.prefix == request.document.content
    assert request.char_end == len(request.prefix)
    return request.prefix


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Small blocks and few held-out documents; one thread, as in the processes that results are held against."""
    monkeypatch.setattr(extraction, "BLOCK", BLOCK)
    monkeypatch.setattr(splits, "DEV_DOCUMENTS", 10)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def source() -> Source:
    return Source(load_trunk(SOURCE, Site(2), LoadOptions()), load_tokenizer(SOURCE), "tiny-source")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """web.jsonl and chat.jsonl: documents of the tiny world."""
    place = tmp_path_factory.mktemp("corpus")
    found = [document.content for document in documents(1500, 77)]
    records = [{"text": text, "id": i} if isinstance(text, str) else {"messages": text} for i, text in enumerate(found)]
    for name, key in (("web", "text"), ("chat", "messages")):
        lines = [json.dumps(record) + "\n" for record in records if key in record]
        (place / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
    return place


def mixed_recipe(corpus: Path, **changes: Any) -> Recipe:
    mix = (CorpusPart(str(corpus / "web.jsonl"), 3.0), CorpusPart(str(corpus / "chat.jsonl"), 1.0))
    given: dict[str, Any] = {
        "rl": dataclasses.replace(RL, documents=30, evaluate_rows=16),
        "data": DataSpec(mix=mix, positions=3, min_position=4, max_tokens=40),
        "eval": EvalSpec("nla-eval-v1", 5),
    }
    return small_recipe(**{**given, **changes})


def run(recipe: Recipe, place: Path, source: Source, *, world: int = 1, **options: Any) -> dict[str, dict[str, int]]:
    """All steps with the shards of `world` processes, the last process first."""
    Extraction(recipe, place / "state", place / "checkpoint").begin()
    for rank in reversed(range(world)):
        work = Extraction(recipe, place / "state", place / "checkpoint")
        work.extract(lambda: source, rank=rank, world=world)
    work = Extraction(recipe, place / "state", place / "checkpoint", **options)
    return {
        split: work.merge(split, None if split == "rl" else Endings(), {"stage": split})
        for split in data_splits(recipe)
    }


def bytes_of(place: Path) -> Files:
    return {path.name: path.read_bytes() for path in sorted(place.iterdir())}


@pytest.fixture(scope="module")
def reference(corpus: Path, source: Source, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished stage of one process."""
    place = tmp_path_factory.mktemp("reference")
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(extraction, "BLOCK", BLOCK)
        patched.setattr(splits, "DEV_DOCUMENTS", 10)
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        run(mixed_recipe(corpus), place, source)
        torch.set_num_threads(threads)
    return place


def stop_after(monkeypatch: pytest.MonkeyPatch, n: int, error: BaseException) -> None:
    """Let the writing of files fail from the `n`-th on."""
    calls: list[int] = []
    write = extraction.write_tables

    def failing(*arguments: Any, **options: Any) -> None:
        calls.append(1)
        if len(calls) > n:
            raise error
        write(*arguments, **options)

    monkeypatch.setattr(extraction, "write_tables", failing)


# -- the same bytes ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("world", [2, 3])
def test_any_number_of_processes_makes_the_same_files(
    world: int, corpus: Path, source: Source, reference: Path, tmp_path: Path
) -> None:
    run(mixed_recipe(corpus), tmp_path, source, world=world)
    names = {"av_sft", "ar_sft", "dev", "rl"}
    assert set(bytes_of(reference / "checkpoint")) == {
        *(f"{name}.parquet" for name in names),
        *(f"{name}.parquet.nla_meta.yaml" for name in names),
        "documents.parquet",
        EVALUATION_NAME,
    }
    assert bytes_of(tmp_path / "checkpoint") == bytes_of(reference / "checkpoint")


STAGE = """
import json, os, sys, time
from contextlib import nullcontext
from pathlib import Path
import torch
from nla_hub.errors import NLAError, TrainingError
from nla_hub.loading import Source
from nla_hub.pretrained import LoadOptions, load_tokenizer, load_trunk
from nla_hub.training import extraction, splits
from nla_hub.training.data_stage import in_each, prepare_rows
from nla_hub.training.processes import Processes
from nla_hub.training.recipe import parse_recipe
from nla_hub.training.run import StageDirectory

torch.set_num_threads(1)
extraction.BLOCK, splits.DEV_DOCUMENTS = 8, 10
recipe, place, pause = parse_recipe(json.loads(sys.argv[1])), Path(sys.argv[2]), float(sys.argv[3])
processes = Processes.here()

class Endings:
    def label(self, requests):
        return [None if len(r.prefix) % 5 == 0 else f"ends with {r.prefix[-9:]}" for r in requests]

directory = Path(recipe.base.model)
loaded = Source(load_trunk(directory, recipe.site, LoadOptions()), load_tokenizer(directory), "tiny-source")

def source():
    time.sleep(pause)
    return loaded

print(prepare_rows(recipe, StageDirectory(place), processes, source=source,
                   labeler=lambda: nullcontext(Endings()), meta=lambda split: {"stage": split}, report=print))

def fail():
    if processes.rank == 1:
        raise TrainingError("The second one is ill.")
try:
    in_each(processes, fail)
except NLAError as error:
    print(f"FAILED {type(error).__name__} {error.one_line()}")
processes.close()
sys.stdout.flush()
os._exit(0)  # on a busy machine torch sometimes aborts while it is torn down, after everything is done
"""


@pytest.mark.long
def test_two_real_processes(corpus: Path, reference: Path, tmp_path: Path) -> None:
    arguments = ["-c", STAGE, json.dumps(mixed_recipe(corpus).to_mapping()), str(tmp_path / "data"), "0"]
    (code, out, told), (other_code, other_out, other_told) = launch(arguments, 2)
    assert (code, other_code) == (0, 0), (told, other_told)
    assert bytes_of(tmp_path / "data" / "checkpoint") == bytes_of(reference / "checkpoint")
    assert "FAILED RunError" in out
    assert "process 1: The second one is ill." in out
    assert "FAILED TrainingError The second one is ill." in other_out
    assert [line for line in other_out.splitlines() if line.startswith("{'rows'")] == [
        line for line in out.splitlines() if line.startswith("{'rows'")
    ]
    assert "extracting" not in other_out


@pytest.mark.long
def test_a_killed_extraction_goes_on_with_its_shards(
    corpus: Path, source: Source, reference: Path, tmp_path: Path
) -> None:
    shards = tmp_path / "state" / "shards"
    arguments = ["-c", STAGE, json.dumps(mixed_recipe(corpus).to_mapping()), str(tmp_path), "0.05"]
    with subprocess.Popen([sys.executable, *arguments], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as process:
        try:
            while len(list(shards.glob("*.parquet"))) < 3:
                assert process.poll() is None, process.stderr and process.stderr.read()
                time.sleep(0.01)
        finally:
            os.kill(process.pid, signal.SIGKILL)
    done = {path: path.stat().st_mtime_ns for path in shards.glob("[!.]*.parquet")}
    assert 3 <= len(done) < 14
    assert not (tmp_path / "checkpoint" / "rl.parquet").exists()
    damaged, *whole = sorted(done)
    damaged.write_bytes(damaged.read_bytes()[:1000])
    (shards / ".av_sft-000099.parquet.tmp").write_bytes(b"half")
    run(mixed_recipe(corpus), tmp_path, source)
    assert {path: path.stat().st_mtime_ns for path in whole} == {path: done[path] for path in whole}
    assert bytes_of(tmp_path / "checkpoint") == bytes_of(reference / "checkpoint")
    assert not list(shards.glob(".*"))


def test_a_full_disk_keeps_what_is_done(
    corpus: Path, source: Source, reference: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write, written = pq.ParquetWriter.write_table, []

    def full(self: Any, table: Any, **options: Any) -> None:
        written.append(1)
        if len(written) > 3:
            raise OSError(errno.ENOSPC, "No space left on device")
        write(self, table, **options)

    with monkeypatch.context() as patched:
        patched.setattr(pq.ParquetWriter, "write_table", full)
        with pytest.raises(RunError, match=r"No space left on device[\s\S]*goes on where it stopped"):
            run(mixed_recipe(corpus), tmp_path, source)
    assert len(list((tmp_path / "state" / "shards").iterdir())) == 2  # the first table was the index
    run(mixed_recipe(corpus), tmp_path, source)
    assert bytes_of(tmp_path / "checkpoint") == bytes_of(reference / "checkpoint")


def test_where_one_process_fails_the_others_stop(
    corpus: Path, source: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def work() -> Extraction:
        return Extraction(mixed_recipe(corpus), tmp_path / "state", tmp_path / "checkpoint")

    work().begin()
    with monkeypatch.context() as patched:
        stop_after(patched, 1, RunError("ill"))
        with pytest.raises(RunError, match="ill"):
            work().extract(lambda: source, rank=1, world=2)
    work().extract(lambda: source, rank=0, world=2)
    assert len(list((tmp_path / "state" / "shards").iterdir())) == 1
    with pytest.raises(RunError, match=r"blocks of vectors are not there[\s\S]*same run directory"):
        work().merge("rl", None, {})
    work().begin()
    work().extract(lambda: source)
    assert work().merge("rl", None, {})["rows"] == 90


# -- what rows say -------------------------------------------------------------------------------------------


def test_rows_are_those_of_their_documents(source: Source, reference: Path, corpus: Path) -> None:
    recipe = mixed_recipe(corpus)
    kinds = set()
    for split in ("av_sft", "rl", "dev"):
        rows = read_rows(reference / "checkpoint" / f"{split}.parquet")
        by_id = {}
        for line in (reference / "state" / "documents" / f"{split}.jsonl").read_text("utf-8").splitlines():
            record = json.loads(line)
            by_id[record["doc_id"]] = record.get("text", record.get("messages"))
        assert set(rows.doc_ids) <= set(by_id)
        assert len(by_id) == data_splits(recipe)[split]
        assert max(rows.positions) < 40 and min(rows.positions) >= 4
        for i in range(0, len(rows), 5):
            content = by_id[rows.doc_ids[i]]
            kinds.add(type(content))
            encoded = encode_source(source.tokenizer, content)[0]
            ids = encoded.ids[: rows.positions[i] + 1]
            with torch.inference_mode():
                alone = source.loaded.model(input_ids=torch.tensor([ids])).last_hidden_state[0, -1]
            torch.testing.assert_close(rows.vectors[i], alone, rtol=1e-4, atol=1e-3)
            assert rows.prefixes[i] == encoded.text[: encoded.offsets[rows.positions[i]][1]]
            assert rows.texts[i] == ("" if split == "rl" else f"ends with {rows.prefixes[i][-9:]}")
            assert split == "rl" or len(rows.prefixes[i]) % 5
    assert kinds == {str, list}
    meta = (reference / "checkpoint" / "rl.parquet.nla_meta.yaml").read_text("utf-8")
    assert "web.jsonl" in meta and "sha256" in meta and "weight: 3.0" in meta


def test_rows_without_an_answer_are_left_out_and_counted(corpus: Path, source: Source, tmp_path: Path) -> None:
    counts = run(mixed_recipe(corpus), tmp_path, source)
    for split, found in counts.items():
        assert found["rows"] == pq.read_metadata(tmp_path / "checkpoint" / f"{split}.parquet").num_rows
        assert (found["without_label"] > 0) == (split != "rl")
        assert found["rows"] + found["without_label"] == 3 * (found["documents"] - found["short"]), split

    class Silence:
        def label(self, requests: Sequence[LabelRequest]) -> list[str | None]:
            return [None] * len(requests)

    work = Extraction(mixed_recipe(corpus), tmp_path / "state", tmp_path / "checkpoint")
    with pytest.raises(TrainingError, match=r"av_sft: 24 documents: No row with a label is left"):
        work.merge("av_sft", Silence(), {})


def test_a_registered_corpus_keeps_its_rows(source: Source, tmp_path: Path) -> None:
    recipe = small_recipe(rl=dataclasses.replace(RL, evaluate_rows=16), eval=EvalSpec("nla-eval-v1", 5))
    for rank in (1, 0):
        work = Extraction(recipe, tmp_path / "state", tmp_path / "checkpoint")
        if rank == 1:
            assert work.begin() >= 5
        work.extract(lambda: source, rank=rank, world=2)
    for split, n in data_splits(recipe).items():
        labeler = None if split == "rl" else TinyLabeler()
        rows = collect(source, recipe, split_documents(recipe, split, n), labeler, prefix=split)
        work.merge(split, labeler, {"stage": split})
        write_rows(tmp_path / "expected.parquet", rows, meta={"stage": split})
        found, expected = tmp_path / "checkpoint" / f"{split}.parquet", tmp_path / "expected.parquet"
        assert pq.read_table(found).equals(pq.read_table(expected), check_metadata=True), split
        assert torch.equal(read_rows(found).vectors, rows.vectors)
    kept = list(read_corpus(tmp_path / "checkpoint" / EVALUATION_NAME))
    assert len(kept) >= 5
    assert require_held_out(recipe, kept, tmp_path / "checkpoint") == 0


def test_large_vectors_are_mapped_and_never_changed_on_the_disk(corpus: Path, source: Source, tmp_path: Path) -> None:
    run(mixed_recipe(corpus), tmp_path, source, mapped_bytes=20_000)
    place = tmp_path / "checkpoint"
    assert {path.name for path in place.glob("*.f32")} == {f"{name}.parquet.f32" for name in ("av_sft", "ar_sft", "rl")}
    mapped = read_rows(place / "rl.parquet")
    beside = place / "rl.parquet.f32"
    before = beside.read_bytes()
    (tmp_path / "rl.parquet").write_bytes((place / "rl.parquet").read_bytes())
    read = read_rows(tmp_path / "rl.parquet")
    assert torch.equal(mapped.vectors, read.vectors)
    assert dataclasses.replace(mapped, vectors=read.vectors) == read
    mapped.vectors[0] = 0
    assert beside.read_bytes() == before
    beside.write_bytes(before[:-4])
    assert torch.equal(read_rows(place / "rl.parquet").vectors, read.vectors)
    write_rows(place / "rl.parquet", read[:3], meta={})
    assert not beside.exists()
    assert len(read_rows(place / "rl.parquet").vectors) == 3


# -- what cannot be used -------------------------------------------------------------------------------------


def poisoned(corpus: Path, place: Path, share: int) -> Recipe:
    """The recipe, where every `share`-th document of chat.jsonl spells a special token."""
    for name in ("web", "chat"):
        lines = (corpus / f"{name}.jsonl").read_text("utf-8").splitlines()
        if name == "chat":
            for i in range(0, len(lines), share):
                record = json.loads(lines[i])
                record["messages"][0]["content"] += " <|end|>"
                lines[i] = json.dumps(record)
        (place / f"{name}.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return mixed_recipe(place)


def test_documents_that_cannot_be_encoded_are_left_out_up_to_a_limit(
    corpus: Path, source: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = poisoned(corpus, tmp_path, 2)
    counts = run(recipe, tmp_path / "run", source)
    refused = sum(found["refused"] for found in counts.values())
    assert refused > 3
    for found in counts.values():
        assert found["rows"] + found["without_label"] == 3 * (found["documents"] - found["short"] - found["refused"])
    monkeypatch.setattr("nla_hub.training.corpora.FEW_BAD", 0)
    monkeypatch.setattr("nla_hub.training.corpora.MOST_BAD", 0.01)
    with pytest.raises(InputError, match=r"documents of \w+: \d+ of the first \d+ documents cannot be used"):
        run(recipe, tmp_path / "again", source)


def test_a_source_without_a_chat_template_refuses_conversations_at_once(
    corpus: Path, source: Source, tmp_path: Path
) -> None:
    tokenizer = deepcopy(source.tokenizer)
    tokenizer.chat_template = None
    with pytest.raises(TextError, match=r"document av_sft-\w+[\s\S]*chat template"):
        run(mixed_recipe(corpus), tmp_path, dataclasses.replace(source, tokenizer=tokenizer))
    assert len(list((tmp_path / "state").rglob("*.parquet"))) <= 2


def test_what_is_evaluated_on_was_not_trained_on(reference: Path, corpus: Path, tmp_path: Path) -> None:
    web = CorpusPart(str(tmp_path / "gone.jsonl"))
    recipe = mixed_recipe(corpus, data=DataSpec(mix=(web,)))  # the corpus itself is not needed
    place = reference / "checkpoint"
    kept = list(read_corpus(place / EVALUATION_NAME))
    assert 5 <= len(kept) <= 20
    assert require_held_out(recipe, kept, place) == 0
    lines = (reference / "state" / "documents" / "ar_sft.jsonl").read_text("utf-8").splitlines()
    trained = [json.loads(line).get("text", json.loads(line).get("messages")) for line in lines]
    text = next(content for content in trained if isinstance(content, str))
    talk = next(content for content in trained if not isinstance(content, str))
    padded = [{**talk[0], "content": f"{talk[0]['content']} "}, *talk[1:]]
    for leak in (text, f"  {text}\n", talk, padded):
        with pytest.raises(InputError, match=r"1 of \d+ evaluation documents stand verbatim"):
            require_held_out(recipe, [*kept, leak], place)
    dev = (reference / "state" / "documents" / "dev.jsonl").read_text("utf-8").splitlines()[0]
    assert require_held_out(recipe, [json.loads(dev).get("text", "")], place) == 0


def test_documents_of_a_split_can_be_read_again(reference: Path, corpus: Path) -> None:
    recipe = mixed_recipe(corpus)
    lines = (reference / "state" / "documents" / "rl.jsonl").read_text("utf-8").splitlines()
    expected = [json.loads(line).get("text", json.loads(line).get("messages")) for line in lines]
    assert [document.content for document in split_documents(recipe, "rl", 30)] == expected
    assert [content_key(content) for content in expected[:7]] == [
        content_key(document.content) for document in split_documents(recipe, "rl", 7)
    ]


# -- the stage -----------------------------------------------------------------------------------------------


@pytest.mark.train
def test_the_stage_of_a_run(corpus: Path, tmp_path: Path) -> None:
    recipe = mixed_recipe(corpus, labels=LabelSpec("endings"))
    told: list[dict[str, Any]] = []

    class Told(Silent):
        def metrics(self, name: str, metrics: dict[str, Any]) -> None:
            told.append(metrics)

    with registry.labelers.lend("endings", Endings):
        pipeline = Pipeline(recipe, RunDirectory(tmp_path / "run", recipe), Told())
        pipeline.execute(("source", "data"))
    stage = pipeline.run.stage("data")
    summary = stage.summary()
    assert summary["rows"].keys() == data_splits(recipe).keys()
    assert summary["evaluation_documents"] == len(list(read_corpus(stage.checkpoint / EVALUATION_NAME)))
    assert summary["without_label"] > 0
    assert not stage.state.exists()
    assert {line["split"]: line["rows"] for line in told if "split" in line} == summary["rows"]
    assert any(line.get("extracting") == "rl" for line in told)
    assert len(pipeline.rows("rl")) == summary["rows"]["rl"]


class Other(Processes):
    """A process that is not the main one; the main one's work was done before."""

    def on_main(self, action: Any) -> Any:
        return None


def test_a_source_that_is_spread_is_read_by_the_main_process_alone(
    corpus: Path, source: Source, tmp_path: Path
) -> None:
    recipe = mixed_recipe(corpus)
    placement = dataclasses.replace(recipe.hardware.placement, source="spread")
    recipe = dataclasses.replace(recipe, hardware=dataclasses.replace(recipe.hardware, placement=placement))
    loaded: list[int] = []

    def load() -> Source:
        loaded.append(1)
        return source

    def stage(processes: Processes) -> Any:
        return prepare_rows(
            recipe,
            StageDirectory(tmp_path),
            processes,
            source=load,
            labeler=lambda: nullcontext(Endings()),
            meta=lambda split: {},
            report=lambda figures: None,
        )

    stage(Other(1, 2))
    assert not loaded
    assert stage(Processes())["rows"]["rl"] == 90
    assert loaded


def test_one_process_needs_no_others() -> None:
    assert in_each(Processes(), lambda: 3) == 3
    with pytest.raises(TrainingError):
        in_each(Processes(), lambda: (_ for _ in ()).throw(TrainingError("ill")))
