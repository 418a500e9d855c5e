"""Labels that all processes of a run write together: the same bytes from any number of them, and no answer twice."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import sqlite3
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from hashlib import sha256
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import Case
from test_training import SOURCE, small_recipe
from test_training_processes import environments, launch

from nla_hub.errors import RunError, TrainingError
from nla_hub.loading import Source
from nla_hub.pretrained import LoadOptions, load_tokenizer, load_trunk
from nla_hub.sidecar import Site
from nla_hub.training import extraction, splits
from nla_hub.training.data_stage import prepare_rows
from nla_hub.training.extraction import Extraction
from nla_hub.training.labelers import LabelContext, LabelRequest, opened
from nla_hub.training.labeling import from_source
from nla_hub.training.labeling.cache import FILE, Answer, LabelCache
from nla_hub.training.labeling.from_source import SourceLabeler, SourceSettings
from nla_hub.training.labeling.in_process import RANKS, InProcessLabeler
from nla_hub.training.labeling.prompt import PromptSettings
from nla_hub.training.labeling.run import Missing, PromptedLabeler
from nla_hub.training.planning.base_sizes import Sizes
from nla_hub.training.planning.effort import label_seconds
from nla_hub.training.planning.gpus import GPUS
from nla_hub.training.processes import Processes
from nla_hub.training.recipe import CorpusPart, DataSpec, Recipe, load_recipe
from nla_hub.training.run import StageDirectory
from nla_hub.training.splits import UNLABELLED, data_splits


class Neighbours(InProcessLabeler[PromptSettings], PromptedLabeler[PromptSettings]):
    """Answers that depend on what runs together; each fifth is none, and another one at the second attempt."""

    name, kind, by_size = "neighbours", PromptSettings, True
    asked: list[str]
    fail = False

    def __init__(self, asked: list[str] | None = None, log: Path | None = None, pause: float = 0.0) -> None:
        super().__init__(min_words=1, min_features=1, attempts=2)
        self.asked, self.log, self.pause = [] if asked is None else asked, log, pause

    @property
    def block(self) -> int:
        return 4

    def identity(self) -> dict[str, Any]:
        return {"model": "neighbours"}

    def write(self, blocks: Sequence[Missing]) -> Iterator[dict[str, Answer]]:
        for block in blocks:
            if self.fail:
                raise TrainingError("ill")
            together = sha256("".join(block).encode()).hexdigest()
            if self.log is not None:
                time.sleep(self.pause)
                with self.log.open("a") as file:
                    file.write("".join(f"{key}\n" for key in block))
            self.asked.extend(block)
            yield {
                key: Answer(
                    "no" if int(key, 16) % 5 == 0 else f"<explanation>{together} {key}</explanation>", "stop", 3, 2
                )
                for key in block
            }


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Small blocks and few held-out documents; one thread."""
    monkeypatch.setattr(extraction, "BLOCK", 8)
    monkeypatch.setattr(splits, "DEV_DOCUMENTS", 10)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def source() -> Source:
    return Source(load_trunk(SOURCE, Site(2), LoadOptions()), load_tokenizer(SOURCE), "tiny-source")


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    """A mixture of texts of which some begin alike, so that some snippets are the same."""
    texts = [
        f"{'The same words begin each text' if i % 2 else f'Text {i} has words of its own'} and {i} goes on for a while."
        for i in range(400)
    ]
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    data = DataSpec(mix=(CorpusPart(str(tmp_path / "texts.jsonl"), 1.0),), positions=3, min_position=2, max_tokens=16)
    made = small_recipe(data=data)
    stages = {name: dataclasses.replace(getattr(made, name), documents=24) for name in ("av", "ar")}
    return dataclasses.replace(made, **stages)


class Run:
    """A data stage in `world` processes, one after the other in this one."""

    def __init__(self, recipe: Recipe, place: Path, source: Source, world: int) -> None:
        self.recipe, self.place, self.world = recipe, place, world
        self.asked: list[list[str]] = [[] for _ in range(world)]
        self.labelers = [Neighbours(asked) for asked in self.asked]
        for labeler in self.labelers:
            labeler.open(LabelContext(place / "labels"))
        self.work().begin()
        self.work().extract(lambda: source)

    def work(self) -> Extraction:
        return Extraction(self.recipe, self.place / "state", self.place / "checkpoint")

    def share(self, rank: int, plan: list[list[str]], attempt: int) -> None:
        self.work().answer(self.labelers[rank], plan[rank :: self.world], attempt, rank=rank, world=self.world)

    def labels(self) -> dict[str, bytes]:
        """All attempts, the last process first, and the merged files."""
        main = self.labelers[0]
        for attempt in range(main.attempts):
            if plan := main.plan(self.work().label_requests(), attempt):
                for rank in reversed(range(self.world)):
                    self.share(rank, plan, attempt)
                main.take_over()
        before = len(self.asked[0])
        for split in data_splits(self.recipe):
            self.work().merge(split, None if split in UNLABELLED else main, {"stage": split})
        assert len(self.asked[0]) == before
        return bytes_of(self.place / "checkpoint")

    @property
    def all_asked(self) -> list[str]:
        return [key for asked in self.asked for key in asked]


def bytes_of(place: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(place.iterdir())}


def stored(path: Path) -> set[str]:
    """The keys in the file of a process that was killed."""
    with LabelCache(path.parent, own=path.parent.name.startswith(RANKS)) as cache:
        return {row[0] for row in cache._read("select key from answer", [])}


def test_any_number_of_processes_makes_the_same_labels(recipe: Recipe, source: Source, tmp_path: Path) -> None:
    runs = {world: Run(recipe, tmp_path / str(world), source, world) for world in (1, 2, 3)}
    files = {world: run.labels() for world, run in runs.items()}
    assert files[1] == files[2] == files[3]
    for world, run in runs.items():
        assert Counter(run.all_asked) == Counter(runs[1].all_asked)
        assert set(Counter(run.all_asked).values()) == {1}
        assert max(map(len, run.asked)) - min(map(len, run.asked)) <= 2 * 4
        figures = run.labelers[0].figures()
        assert figures["label_answers"] == len(run.all_asked), world
        assert figures["label_output_tokens"] == 2 * len(run.all_asked)
        assert [path.name for path in (run.place / "labels").iterdir() if path.is_dir()] == []
    snippets = [request.prefix for request in runs[1].work().label_requests()]
    firsts = len(set(runs[1].all_asked)) - sum(int(key, 16) % 5 == 0 for key in first_keys(runs[1]))
    assert firsts == len(set(snippets)) < len(snippets)
    assert figures["labels_dropped"]["no tags"] < 0.2 * len(snippets)


def first_keys(run: Run) -> set[str]:
    main = run.labelers[0]
    return {key for key, _, _ in main._keyed(run.work().label_requests(), 0)}


def test_what_is_done_is_the_same_as_what_one_labeler_does_alone(
    recipe: Recipe, source: Source, tmp_path: Path
) -> None:
    run = Run(recipe, tmp_path / "run", source, 3)
    run.labels()
    requests = list(run.work().label_requests())
    alone = Neighbours()
    with opened(alone, LabelContext(tmp_path / "alone")):
        found = alone.label(requests)
    assert [text and text.split()[1] for text in found] == [
        text and text.split()[1] for text in run.labelers[0].label(requests)
    ]
    assert sorted(alone.asked) == sorted(run.all_asked)


@pytest.mark.parametrize("world", [1, 4])
def test_what_a_killed_run_stored_is_not_answered_again(
    world: int, recipe: Recipe, source: Source, tmp_path: Path
) -> None:
    whole = Run(recipe, tmp_path / "whole", source, 1).labels()
    killed = Run(recipe, tmp_path / "run", source, 3)
    plan = killed.labelers[0].plan(killed.work().label_requests(), 0)
    for rank, blocks in ((0, 1), (1, 2), (2, 1)):
        share = killed.labelers[rank].answer_share(plan[rank::3], killed.work().label_requests(), 0, rank=rank, world=3)
        for _ in range(blocks):
            next(share)
        share.close()
    killed.labelers[0].close()
    (tmp_path / "run" / "labels" / f"{RANKS}7").mkdir()  # killed before it had stored anything
    again = Run(recipe, tmp_path / "run", source, world)
    assert again.labels() == whole
    assert len(killed.all_asked) == 4 * 4
    assert not set(again.all_asked) & set(killed.all_asked)


def test_an_answer_in_the_middle_of_a_block_moves_no_other(recipe: Recipe, source: Source, tmp_path: Path) -> None:
    run = Run(recipe, tmp_path / "run", source, 1)
    main = run.labelers[0]
    plan = main.plan(run.work().label_requests(), 0)
    main.close()
    with LabelCache(tmp_path / "run" / "labels") as cache:
        cache.put(main.asker_id(), {plan[1][2]: Answer("there already")})
    left = [[key for key in block if key != plan[1][2]] for block in plan]
    assert main.plan(run.work().label_requests(), 0) == left
    main.close()


def test_where_one_process_fails_the_others_stop(recipe: Recipe, source: Source, tmp_path: Path) -> None:
    run = Run(recipe, tmp_path / "run", source, 2)
    plan = run.labelers[0].plan(run.work().label_requests(), 0)
    run.labelers[1].fail = True
    with pytest.raises(TrainingError, match="ill"):
        run.share(1, plan, 0)
    run.share(0, plan, 0)
    assert len(run.asked[0]) == 4
    run.labelers[0].close()
    assert Run(recipe, tmp_path / "run", source, 2).labels() == Run(recipe, tmp_path / "other", source, 1).labels()


def test_two_runs_with_one_cache_do_not_write_at_once(recipe: Recipe, source: Source, tmp_path: Path) -> None:
    run = Run(recipe, tmp_path / "run", source, 2)
    main = run.labelers[0]

    class Held(Exception):
        pass

    def waiting() -> None:
        raise Held

    def is_held() -> bool:
        with LabelCache(tmp_path / "run" / "labels") as cache:
            try:
                with cache.alone(waiting):
                    return False
            except Held:
                return True

    assert main.plan(run.work().label_requests(), 0)
    assert is_held()
    main.take_over()
    assert not is_held()
    main.plan(run.work().label_requests(), 0)
    main.close()
    assert not is_held()


def test_a_damaged_file_of_a_process_is_named_and_kept(recipe: Recipe, source: Source, tmp_path: Path) -> None:
    run = Run(recipe, tmp_path / "run", source, 2)
    file = tmp_path / "run" / "labels" / f"{RANKS}1" / FILE
    file.parent.mkdir(parents=True)
    file.write_bytes(b"no data base, but hours of work" * 100)
    with pytest.raises(RunError, match=r"damaged[\s\S]*rank-1"):
        run.labelers[0].plan(run.work().label_requests(), 0)
    assert file.read_bytes().startswith(b"no data base")


def test_a_file_of_ones_own_has_no_wal(tmp_path: Path) -> None:
    for own, mode in ((True, "truncate"), (False, "wal")):
        with LabelCache(tmp_path / mode, own=own) as cache:
            cache.put("asker", {"k": Answer("text")})
            assert cache._read("pragma journal_mode", []) == [(mode,)]
            assert (tmp_path / mode / f"{FILE}-wal").exists() != own


# -- the base model ------------------------------------------------------------------------------------------


def test_the_source_answers_the_same_in_any_number_of_processes(llama: Case, tmp_path: Path) -> None:
    documents = [SimpleNamespace(content=f"Document {i:03d} {'is long ' * (i % 7)}") for i in range(24)]
    requests = [LabelRequest(document, len(document.content)) for document in documents]
    loads: list[int] = []

    def answers(world: int) -> dict[str, tuple[str, int | None]]:
        place = tmp_path / str(world)
        made = [SourceLabeler(template="{snippet}", max_output_tokens=6, batch_size=4) for _ in range(world)]
        for rank, labeler in enumerate(made):

            def load(rank: int = rank) -> Source:
                loads.append(rank)
                return llama.nla.source

            labeler.open(LabelContext(place, "base@1", load))
        plan = made[0].plan(requests, 0)
        for rank, labeler in enumerate(made):
            for _ in labeler.answer_share(plan[rank::world], requests, 0, rank=rank, world=world):
                pass
        made[0].take_over()
        for labeler in made:
            labeler.close()
        with LabelCache(place) as cache:
            rows = cache._read("select key, text, output from answer order by key", [])
        return {key: (text, output) for key, text, output in rows}

    one = answers(1)
    assert len(one) == 24 and len({text for text, _ in one.values()}) > 3
    assert loads == [0]
    assert answers(3) == one
    assert loads == [0, 0, 1, 2]


def test_sixty_four_long_prompts_run_together(llama: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    together: list[int] = []

    def batch(source: Source, rows: list[list[int]], keys: Sequence[str], settings: SourceSettings) -> list[Answer]:
        together.append(len(rows))
        assert min(map(len, rows)) > 60
        return [Answer("")] * len(rows)

    monkeypatch.setattr(from_source, "_batch", batch)
    keys = [f"k{i}" for i in range(100)]
    prompts = [f"{i} " + "a few more words " * 12 for i in range(100)]
    settings = SourceSettings(max_output_tokens=8)
    assert {key for part in from_source.write(llama.nla.source, prompts, keys, settings) for key in part} == set(keys)
    assert together == [64, 36]


# -- real processes ------------------------------------------------------------------------------------------

STAGE = """
import os, sys
from pathlib import Path
import test_labels_divided as tests
from nla_hub.loading import Source
from nla_hub.pretrained import LoadOptions, load_tokenizer, load_trunk
from nla_hub.training import extraction, splits
from nla_hub.training.data_stage import prepare_rows
from nla_hub.training.labelers import LabelContext, opened
from nla_hub.training.processes import Processes
from nla_hub.training.recipe import parse_recipe
from nla_hub.training.run import StageDirectory

tests.torch.set_num_threads(1)
extraction.BLOCK, splits.DEV_DOCUMENTS = 8, 10
recipe, place, pause = parse_recipe(tests.json.loads(sys.argv[1])), Path(sys.argv[2]), float(sys.argv[3])
processes = Processes.here()
loaded = Source(load_trunk(tests.SOURCE, recipe.site, LoadOptions()), load_tokenizer(tests.SOURCE), "tiny-source")
made = tests.Neighbours(log=place.parent / f"asked-{processes.rank}", pause=pause)
print(prepare_rows(recipe, StageDirectory(place), processes, source=lambda: loaded,
                   labeler=lambda: opened(made, LabelContext(place / "labels")),
                   meta=lambda split: {"stage": split}, report=lambda figures: None))
processes.close()
sys.stdout.flush()
os._exit(0)  # on a busy machine torch sometimes aborts while it is torn down, after everything is done
"""


def logged(place: Path) -> list[str]:
    return [key for path in place.glob("asked-*") for key in path.read_text().split()]


@pytest.mark.slow
def test_two_real_processes_and_what_is_left_when_they_are_killed(
    recipe: Recipe, source: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))
    whole = Run(recipe, tmp_path / "whole", source, 1).labels()
    place, labels = tmp_path / "data", tmp_path / "data" / "labels"
    told = json.dumps(recipe.to_mapping())
    files = [labels / FILE, labels / f"{RANKS}1" / FILE]
    begun = [
        subprocess.Popen([sys.executable, "-c", STAGE, told, str(place), "0.1"], env=env, stderr=subprocess.DEVNULL)
        for env in environments(2)
    ]
    try:
        deadline = time.monotonic() + 120
        while not all(answers_in(path) for path in files):
            assert time.monotonic() < deadline and all(process.poll() is None for process in begun)
            time.sleep(0.02)
    finally:
        for process in begun:
            os.kill(process.pid, signal.SIGKILL)
            process.wait()
    kept = set().union(*map(stored, files))
    assert 8 <= len(kept) < len(set(first_keys(Run(recipe, tmp_path / "count", source, 1))))
    for path in tmp_path.glob("asked-*"):
        path.unlink()
    (code, out, errors), (other_code, other_out, other_errors) = launch(["-c", STAGE, told, str(place), "0"], 2)
    assert (code, other_code) == (0, 0), (errors, other_errors)
    assert bytes_of(place / "checkpoint") == whole
    again = logged(tmp_path)
    assert not kept & set(again)
    assert len(again) == len(set(again))
    assert (tmp_path / "asked-1").read_text() and not files[1].exists()
    assert out == other_out


def answers_in(path: Path) -> int:
    """How many answers a file has that is being written."""
    if not path.is_file():
        return 0
    try:
        with sqlite3.connect(f"file:{path}?mode=ro", uri=True) as db:
            [[n]] = db.execute("select count(*) from answer").fetchall()
        db.close()
        return int(n)
    except sqlite3.Error:
        return 0


class Other(Processes):
    """A process that is not the main one, whose labeler is divided."""

    def on_main(self, action: Any) -> Any:
        return True


def test_a_source_that_is_spread_answers_in_the_main_process_alone(
    recipe: Recipe, source: Source, tmp_path: Path
) -> None:
    placement = dataclasses.replace(recipe.hardware.placement, source="spread")
    spread = dataclasses.replace(recipe, hardware=dataclasses.replace(recipe.hardware, placement=placement))
    made: list[Neighbours] = []

    def labeler() -> Any:
        made.append(Neighbours())
        return opened(made[-1], LabelContext(tmp_path / "labels"))

    def stage(processes: Processes) -> Any:
        return prepare_rows(
            spread,
            StageDirectory(tmp_path / "data"),
            processes,
            source=lambda: source,
            labeler=labeler,
            meta=lambda split: {"stage": split},
            report=lambda figures: None,
        )

    stage(Other(1, 2))
    assert not made
    summary = stage(Processes())
    assert summary["labels"]["label_answers"] == len(made[0].asked) > 0
    assert bytes_of(tmp_path / "data" / "checkpoint") == Run(recipe, tmp_path / "other", source, 2).labels()


def test_the_plan_divides_the_time_of_labels_where_each_process_has_the_model() -> None:
    def seconds(*changes: str) -> float:
        recipe = load_recipe("qwen2.5-7b", ["labels.labeler=source", *changes])
        found = label_seconds(recipe, Sizes.of(recipe), GPUS["H100-80GB"])
        assert found is not None
        return found.sampling

    alone = seconds("hardware.gpus=1")
    assert seconds() == pytest.approx(alone / 8, rel=1e-3)
    assert seconds("hardware.placement.source=spread") == pytest.approx(alone, rel=1e-3)
