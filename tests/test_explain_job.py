"""A batch job's own rules: which rows there are, in which blocks, computed once, the same in any way of running."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from conftest import Case
from hypothesis import given
from hypothesis import strategies as st

from nla_hub import NLA
from nla_hub.batching import halvings
from nla_hub.capture import CONTEXT_CHARACTERS
from nla_hub.errors import InputError, PositionError, RunError
from nla_hub.explain.ahead import Ahead
from nla_hub.explain.inputs import BadItem, Item, TextItem
from nla_hub.explain.job import run_job
from nla_hub.explain.plan import Plan, Total
from nla_hub.explain.progress import JobSummary
from nla_hub.explain.result import JobResult
from nla_hub.explain.rows import Block, ItemRows, PlannedRow, blocks_of
from nla_hub.explain.schema import COLUMNS, part_name, schema
from nla_hub.explain.settings import DataSettings, JobSettings, PairSettings, Shard
from nla_hub.explain.tally import Tally, kind_of
from nla_hub.geometry import Reference, reference_of_sum
from nla_hub.results import COLUMNS as SHARED
from nla_hub.sampling import document_hash

WORDS = (
    "the cat sees a house",
    "a dog",
    "my red drum fell over",
    "otto came to the island",
    "she is in the garden today",
)


# -- rows and blocks -------------------------------------------------------------------------------------------


def item_rows(document: int, n: int, key: int) -> ItemRows:
    """An item of `n` rows in two sequences; equal keys are equal items."""
    digest = f"{key:064x}"
    rows = tuple(
        PlannedRow(-1, document, f"d{document}", digest, position=p, token="t", source=p % 2, read=p) for p in range(n)
    )
    sources = tuple(np.arange(n, dtype=np.int32) + 100 * key + s for s in range(2)) if n else ()
    return ItemRows(rows, sources, bytes.fromhex(digest))


def with_firsts(items: list[tuple[int, int]]) -> list[tuple[int, ItemRows, int | None]]:
    """Items of (rows, key) as a plan hands them over: each with the first row of an equal one before it."""
    found: list[tuple[int, ItemRows, int | None]] = []
    seen: dict[int, int] = {}
    row = 0
    for document, (n, key) in enumerate(items):
        n = next((m for m, k in items if k == key), n)  # equal items have equally many rows
        first = seen.setdefault(key, row) if n else row
        found.append((document, item_rows(document, n, key), first if first < row else None))
        row += n
    return found


ITEMS = st.lists(st.tuples(st.integers(0, 7), st.integers(0, 4)), max_size=12)


@given(items=ITEMS, size=st.integers(1, 6))
def test_blocks_hold_every_row_once_with_what_it_needs(items: list[tuple[int, int]], size: int) -> None:
    planned = with_firsts(items)
    blocks = [block for block, _, _ in blocks_of(planned, size)]
    rows = [row for block in blocks for row in block.rows]
    assert [row.row for row in rows] == list(range(len(rows)))
    assert [(row.document, row.position) for row in rows] == [
        (document, row.position) for document, item, _ in planned for row in item.rows
    ]
    assert [len(block.rows) for block in blocks[:-1]] == [size] * (len(blocks) - 1)
    for block in blocks:
        assert block.index == block.rows[0].row // size
        assert {row.source for row in block.rows} - {-1} == set(range(len(block.sequences)))
        for row in block.rows:
            if row.copy_of is not None:
                original = rows[row.copy_of]
                assert (original.hash, original.position, original.copy_of) == (row.hash, row.position, None)
                assert row.copy_of // size < block.index
            key = int(row.hash, 16)
            assert block.sequences[row.source][row.read] == row.read + 100 * key + row.position % 2
    new = [row for row in rows if row.copy_of is None]
    for place in {(row.hash, row.position) for row in new}:  # again only inside the block that has the first one
        assert len({row.row // size for row in new if (row.hash, row.position) == place}) == 1


@given(items=ITEMS, size=st.integers(1, 6), data=st.data())
def test_planning_goes_on_at_any_block(items: list[tuple[int, int]], size: int, data: st.DataObject) -> None:
    planned = with_firsts(items)
    found = list(blocks_of(planned, size))
    if not found:
        return
    i = data.draw(st.integers(0, len(found) - 1))
    block, document, skip = found[i]
    rest = [block for block, _, _ in blocks_of(planned[document:], size, index=block.index + 1, skip=skip)]
    assert [shown(block) for block in rest] == [shown(block) for block, _, _ in found[i + 1 :]]


def shown(block: Block) -> Any:
    """A block without arrays, which have no single truth value."""
    return block.index, block.rows, [ids.tolist() for ids in block.sequences]


class Words:
    """A data set in memory that counts how far it was read."""

    kind, width, site, total = "text", None, None, None

    def __init__(self, items: list[ItemRows]) -> None:
        self.rows = items
        self.read: list[int] = []

    def describe(self) -> dict[str, Any]:
        return {}

    def items(self, start: int = 0) -> Iterator[Item]:
        for i in range(start, len(self.rows)):
            self.read.append(i)
            yield TextItem(str(i), None, str(i))

    def fraction(self) -> float | None:
        return None

    def make(self, item: Item, document: int) -> ItemRows:
        return self.rows[int(item.where)]


@given(items=ITEMS, size=st.integers(1, 5), wanted=st.sets(st.integers(0, 20)), killed=st.integers(0, 20))
def test_a_plan_that_was_cut_short_goes_on(
    tmp_path_factory: pytest.TempPathFactory, items: list[tuple[int, int]], size: int, wanted: set[int], killed: int
) -> None:
    data = Words([item for _, item, _ in with_firsts(items)])
    whole = [shown(block) for block, _, _ in blocks_of(with_firsts(items), size)]
    place = tmp_path_factory.mktemp("plan") / "plan.sqlite"
    first = Plan(place, data, data.make, size)  # type: ignore[arg-type]
    before = []
    for block in first.blocks(lambda i: True):
        before.append(shown(block))
        if block.index == killed:
            break
    first.close()
    assert before == whole[: killed + 1]
    again = Plan(place, data, data.make, size)  # type: ignore[arg-type]
    assert [shown(block) for block in again.blocks(wanted.__contains__)] == [b for b in whole if b[0] in wanted]
    assert again.total == Total(sum(len(b[1]) for b in whole), len(items), len(whole))
    assert again.rows == again.total.rows
    again.close()


def test_a_plan_reads_only_what_is_missing(tmp_path: Path) -> None:
    data = Words([item_rows(i, 2, i) for i in range(40)])
    plan = Plan(tmp_path / "plan.sqlite", data, data.make, 4)  # type: ignore[arg-type]
    assert len(list(plan.blocks(lambda i: True))) == 20
    data.read.clear()
    assert [block.index for block in plan.blocks({5, 6, 19}.__contains__)] == [5, 6, 19]
    assert len(data.read) <= 8
    plan.close()


def test_a_damaged_plan_is_made_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    place = tmp_path / "plan.sqlite"
    place.write_bytes(b"no database at all" * 100)
    data = Words([item_rows(i, 2, i) for i in range(3)])
    plan = Plan(place, data, data.make, 4)  # type: ignore[arg-type]
    assert len(list(plan.blocks(lambda i: True))) == 2
    assert "read again from its beginning" in caplog.text
    plan.close()


@pytest.mark.parametrize("depth", [0, 1, 3])
def test_planning_ahead_keeps_its_distance_and_tells_its_errors(depth: int) -> None:
    made = []

    def blocks() -> Iterator[Block]:
        for i in range(8):
            made.append(i)
            yield Block(i, ())
        raise InputError("the end of it")

    ahead = Ahead(blocks(), depth)
    taken = [block.index for block in ahead.take(1, wait=True)]
    assert len(made) <= 1 + depth + 1
    while block := ahead.take(1, wait=True):
        taken.append(block[0].index)
    assert taken == list(range(8))
    assert ahead.exhausted
    with pytest.raises(InputError, match="the end of it"):
        ahead.raise_failure()
    ahead.close()


# -- small parts -----------------------------------------------------------------------------------------------


@given(of=st.integers(1, 9), block=st.integers(0, 1000))
def test_each_block_is_one_shards_however_they_are_counted(of: int, block: int) -> None:
    from_zero = [Shard(i, of) for i in range(of)]
    from_one = [Shard(i, of) for i in range(1, of + 1)]
    assert sum(shard.owns(block) for shard in from_zero) == 1
    assert set(from_zero) == set(from_one)


@pytest.mark.parametrize("text", ["", "3", "5/4", "-1/4", "1/0", "a/b", "1/2/3"])
def test_a_shard_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(InputError, match="shard"):
        Shard.parse(text)


@pytest.mark.parametrize("positions", ["evry:3", "every:0", "every:x", "sample:", "regex:(", "regex:", "first"])
def test_positions_are_checked_before_anything_is_opened(positions: str) -> None:
    with pytest.raises(PositionError):
        JobSettings(PairSettings(), DataSettings("x.jsonl"), positions=positions)


def test_a_function_is_no_position_of_a_job() -> None:
    with pytest.raises(InputError, match="no name to be kept by"):
        JobSettings(PairSettings(), DataSettings("x.jsonl"), positions=lambda encoded: [0])


@given(
    rows=st.lists(
        st.lists(st.floats(-9, 9), min_size=3, max_size=3).filter(lambda v: np.linalg.norm(v) > 1e-3), min_size=2
    )
)
def test_a_reference_of_a_sum_is_that_of_the_vectors(rows: list[list[float]]) -> None:
    vectors = torch.tensor(rows, dtype=torch.float64)
    units = vectors / vectors.norm(dim=-1, keepdim=True)
    measured, reckoned = Reference.measure(vectors, "x"), reference_of_sum(units.sum(0), len(units), "x")
    assert reckoned.raw_variance == pytest.approx(measured.raw_variance, abs=1e-9)
    if units.mean(0).norm() > 1e-6:
        assert reckoned.mean_norm == pytest.approx(measured.mean_norm, abs=1e-9)


def part(**columns: list[Any]) -> pa.Table:
    n = len(next(iter(columns.values())))
    full = {name: columns.get(name, [None] * n) for name in schema().names}
    return pa.table(full, schema=schema())


def test_a_tally_counts_what_cannot_be_used_as_orthogonal_and_leaves_errors_out() -> None:
    tally = Tally(Reference("d", 10, 0.5, 0.8))
    tally.add(
        part(
            status=["ok", "truncated", None, None],
            cosine=[0.9, None, None, None],
            mse=[0.2, None, None, None],
            error=[None, None, "x.jsonl:3: The text is empty: no token.", None],
            copy_of=[None, None, None, 1],
        )
    )
    assert tally.rows == 3
    assert tally.counts == {"ok": 1, "truncated": 1, "error": 1}
    assert tally.mean_cosine == pytest.approx(0.45)
    assert tally.fve().value == pytest.approx(1 - (2.2 / 2) / 0.5)
    assert str(tally.fve()) == "FVE (raw variance, d, n=2): -1.200"
    assert Tally(None).fve().value is None


def test_kinds_of_errors_leave_out_what_is_special_about_the_row() -> None:
    one = kind_of("a.jsonl:3: The text is longer than the model reads (got 700 tokens, expected at most 512).")
    assert one == kind_of("b.jsonl:9: The text is longer than the model reads (got 901 tokens, expected at most 512).")


def test_halvings_are_seen_inside_only() -> None:
    from nla_hub.batching import run_batches

    def work(batch: Any) -> int:
        if len(batch) > 2:
            raise torch.OutOfMemoryError
        return len(batch)

    with halvings() as seen:
        assert [n for _, n in run_batches([range(8)], work)] == [2, 2, 2, 2]
    assert seen == [4, 2]
    assert [n for _, n in run_batches([range(4)], work)] == [2, 2]
    assert seen == [4, 2]


# -- whole jobs ------------------------------------------------------------------------------------------------


def write_jsonl(path: Path, records: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def texts() -> list[str]:
    """Texts of the tiny world's words; the tenth and the last one stand twice."""
    found = [f"{WORDS[i % 5]} {WORDS[(i * 3 + 1) % 5]} {WORDS[i // 5 % 5]}" for i in range(20)]
    return [*found[:10], found[2], *found[10:], found[0], found[19]]


@pytest.fixture(scope="module")
def job(texts: list[str], tmp_path_factory: pytest.TempPathFactory) -> JobSettings:
    """A job with every kind of row: chats, duplicates, samples, errors."""
    chat = [{"role": "user", "content": "hello, i am clara."}, {"role": "assistant", "content": "good morning clara."}]
    records: list[dict[str, Any]] = [{"id": f"t{i}", "text": text} for i, text in enumerate(texts)]
    records[5:5] = [{"id": "empty", "text": ""}, {"id": "long", "text": "otto " * 9000}]
    records.append({"id": "twice", "text": records[0]["text"]})
    data = write_jsonl(tmp_path_factory.mktemp("data") / "data.jsonl", records)
    assert chat
    return JobSettings(
        PairSettings(),
        DataSettings(str(data)),
        positions="every:4",
        n=2,
        max_new_tokens=12,
        block=16,
        batch_size=8,
        keep_vectors=True,
    )


@pytest.fixture(scope="module")
def done(job: JobSettings, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, JobSummary]:
    out = tmp_path_factory.mktemp("jobs") / "one"
    return out, run_job(job, out)


def rows_of(out: Path) -> list[dict[str, Any]]:
    return [row for table in JobResult.open(out).tables() for row in table.to_pylist()]


def files_of(out: Path) -> dict[str, bytes]:
    return {str(p.relative_to(out)): p.read_bytes() for p in out.rglob("*.parquet")}


def test_the_rows_are_those_of_the_sdk(job: JobSettings, done: tuple[Path, JobSummary], texts: list[str]) -> None:
    out, summary = done
    rows = rows_of(out)
    nla = NLA.from_pretrained("tiny")
    wanted = nla.explain(texts, positions="every:4", n=2, max_new_tokens=12, batch_size=8)
    good = [row for row in rows if row["error"] is None and row["doc_id"] != "twice"]
    assert [(r["position"], r["sample"], r["token"], r["text"], r["status"], tuple(r["flags"])) for r in good] == [
        (e.position, e.sample, e.token, e.text, e.status, e.flags) for e in wanted
    ]
    assert [r["cosine"] for r in good] == pytest.approx([e.cosine for e in wanted], abs=1e-5)
    assert summary.complete
    assert summary.rows == summary.total == len(rows)
    assert [row["row"] for row in rows] == list(range(len(rows)))


def test_what_a_job_says_about_itself(job: JobSettings, done: tuple[Path, JobSummary]) -> None:
    out, summary = done
    result = JobResult.open(out)
    rows = rows_of(out)
    counted = {status: sum((row["status"] or "error") == status for row in rows) for status in summary.counts}
    assert counted == summary.counts
    assert summary.counts["error"] == 2
    assert len(summary.errors) == 2
    assert result.manifest is not None
    assert result.manifest["counts"] == summary.counts
    scored = [row for row in rows if row["status"] is not None]
    mean = np.mean([2.0 if row["mse"] is None else row["mse"] for row in scored])
    reference = result.reference
    assert reference is not None
    assert result.manifest["fve"][0]["value"] == pytest.approx(1 - mean / reference.raw_variance)
    assert result.manifest["batch_size"] == 8
    assert not (out / "work").exists()
    assert list(schema().names) == list(COLUMNS)
    assert set(SHARED) <= set(COLUMNS)


def test_errors_keep_their_place_and_their_reason(done: tuple[Path, JobSummary]) -> None:
    errors = {row["doc_id"]: row["error"] for row in rows_of(done[0]) if row["error"]}
    assert list(errors) == ["empty", "long"]
    assert "data.jsonl:6: The text is empty" in errors["empty"]
    assert "longer than the model reads" in errors["long"]


def test_equal_documents_are_computed_once(done: tuple[Path, JobSummary], texts: list[str]) -> None:
    rows = rows_of(done[0])
    copies = [row for row in rows if row["copy_of"] is not None]
    assert {row["doc_id"] for row in copies} == {"t10", "t21", "t22", "twice"}
    for row in copies:
        original = rows[row["copy_of"]]
        same = ("position", "sample", "text", "raw", "status", "cosine", "mse", "norm", "flags", "token", "context")
        assert {name: row[name] for name in same} == {name: original[name] for name in same}
        assert original["copy_of"] is None
        assert row["doc_id"] != original["doc_id"]


def test_the_text_of_a_document_can_be_put_together_again(done: tuple[Path, JobSummary], texts: list[str]) -> None:
    rows = [row for row in rows_of(done[0]) if row["doc_id"] == "t3" and row["sample"] == 0]
    for row in rows:
        assert texts[3][: row["char_end"]][-CONTEXT_CHARACTERS:] == row["context"]


def test_vectors_are_those_that_capture_gives(done: tuple[Path, JobSummary], texts: list[str]) -> None:
    out, _ = done
    rows = {row["row"]: row for row in rows_of(out)}
    nla = NLA.from_pretrained("tiny")
    kept = pa.concat_tables(pq.read_table(p) for p in sorted((out / "vectors").iterdir())).to_pylist()
    assert [v["row"] for v in kept] == [n for n, row in rows.items() if row["norm"] is not None]
    for vector in kept[:-20:7]:
        row = rows[vector["row"]]
        direct = nla.capture(texts[int(row["doc_id"][1:])], row["position"]).vectors[0]
        assert torch.allclose(torch.tensor(vector["activation_vector"]), direct, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("lost", [{0}, {1, 2}, {0, 3, 4}])
def test_a_lost_part_comes_back_as_it_was(
    job: JobSettings, done: tuple[Path, JobSummary], tmp_path: Path, lost: set[int]
) -> None:
    import shutil

    out = tmp_path / "again"
    shutil.copytree(done[0], out)
    before = files_of(out)
    for block in lost:
        (out / "parts" / part_name(block)).unlink()
    if 0 in lost:
        (out / "manifest.json").unlink()
    else:
        (out / "parts" / part_name(3)).write_bytes(b"PAR1 torn")
        lost = {*lost, 3}
    summary = run_job(job, out)
    assert summary.complete
    assert summary.computed <= 16 * len(lost)
    assert files_of(out) == before


def test_shards_come_to_the_same_files_in_one_place_or_several(
    job: JobSettings, done: tuple[Path, JobSummary], tmp_path: Path
) -> None:
    import shutil

    together = [run_job(job, tmp_path / "together", shard=Shard(i, 3)) for i in (2, 1, 3)]
    assert [summary.complete for summary in together] == [False, False, True]
    assert files_of(tmp_path / "together") == files_of(done[0])
    for i in (0, 1):
        assert not run_job(job, tmp_path / str(i), shard=Shard(i, 2)).complete
    for folder in ("parts", "vectors"):
        shutil.copytree(tmp_path / "1" / folder, tmp_path / "0" / folder, dirs_exist_ok=True)
    merged = run_job(job, tmp_path / "0")
    assert merged.complete
    assert merged.computed == 0
    assert files_of(tmp_path / "0") == files_of(done[0])
    assert (tmp_path / "0" / "manifest.json").read_bytes() == (done[0] / "manifest.json").read_bytes()


def test_processes_come_to_the_same_files(job: JobSettings, done: tuple[Path, JobSummary], tmp_path: Path) -> None:
    seen = []
    summary = run_job(job, tmp_path / "two", workers=2, progress=lambda p: seen.append((p.rows, p.total)))
    assert summary.complete
    assert files_of(tmp_path / "two") == files_of(done[0])
    assert seen[-1] == (summary.rows, summary.rows)


def test_parts_that_take_turns_in_memory_come_to_the_same_files(
    job: JobSettings, done: tuple[Path, JobSummary], tmp_path: Path
) -> None:
    staged = replace(job, pair=PairSettings(memory="staged"))
    assert run_job(staged, tmp_path / "staged").complete
    assert files_of(tmp_path / "staged") == files_of(done[0])


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"positions": "every:5"}, "positions: 'every:4' before, 'every:5' now"),
        ({"max_new_tokens": 13}, "max_new_tokens: 12 before, 13 now"),
        ({"seed": 1}, "seed: 0 before, 1 now"),
        ({"data": {"limit": 3}}, "data.limit: None before, 3 now"),
        ({"batch_size": 4}, "batch_size: 8 before, 4 now"),
    ],
)
def test_another_configuration_is_refused_with_its_differences(
    job: JobSettings, done: tuple[Path, JobSummary], change: dict[str, Any], named: str
) -> None:
    if "data" in change:
        change = {"data": replace(job.data, **change["data"])}
    with pytest.raises(RunError) as refused:
        run_job(replace(job, **change), done[0])
    assert named in str(refused.value)


def test_changed_data_are_refused_with_the_files_name(job: JobSettings, done: tuple[Path, JobSummary]) -> None:
    path = Path(job.data.name)
    before = path.read_bytes()
    try:
        path.write_bytes(before + b'{"text": "one more"}\n')
        with pytest.raises(RunError, match=r"data.files.data.jsonl: '\d+ bytes"):
            run_job(job, done[0])
    finally:
        path.write_bytes(before)
    assert run_job(job, done[0]).computed == 0


def test_a_place_that_holds_something_else_is_refused(job: JobSettings, tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(RunError, match=r"something else than a job .*thesis.tex"):
        run_job(job, tmp_path)
    with pytest.raises(RunError, match="A file is in the way"):
        run_job(job, tmp_path / "thesis.tex")
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]


# -- vectors as input ------------------------------------------------------------------------------------------


def test_bare_vectors_are_explained_as_the_sdk_does_and_flagged(llama: Case, tmp_path: Path) -> None:
    rows = torch.randn(9, llama.nla.d_model, generator=torch.Generator().manual_seed(3))
    rows[4] = rows[1]
    rows[6] = float("nan")
    rows[7] = 0
    np.save(tmp_path / "v.npy", rows.numpy())
    job = JobSettings(
        PairSettings(str(llama.pair.root)),
        DataSettings(str(tmp_path / "v.npy")),
        max_new_tokens=6,
        block=3,
        batch_size=2,
    )
    summary = run_job(job, tmp_path / "out")
    found = rows_of(tmp_path / "out")
    assert summary.counts["error"] == 2
    assert [row["row"] for row in found if row["error"]] == [6, 7]
    assert "NaN" in found[6]["error"]
    assert "zero" in found[7]["error"]
    good = [i for i in range(9) if i not in (6, 7)]
    wanted = llama.nla.verbalize(rows[good], max_new_tokens=6)
    assert [found[i]["raw"] for i in good] == [e.raw for e in wanted]
    assert all("off_distribution" in found[i]["flags"] for i in good)
    assert all(found[i]["position"] == -1 for i in good)
    assert found[4]["copy_of"] == 1


def test_vectors_of_another_layer_model_or_width_are_refused(llama: Case, tmp_path: Path) -> None:
    from nla_hub.yaml_io import dumps

    d = llama.nla.d_model

    def written(layer: int, width: int, base: str) -> str:
        vectors = np.ones((2, width), dtype=np.float32)
        column = pa.FixedSizeListArray.from_arrays(pa.array(vectors.reshape(-1)), width)
        path = tmp_path / f"{layer}-{width}.parquet"
        table = pa.table({"activation_vector": column, "activation_layer": [layer] * 2, "doc_id": ["a", "b"]})
        pq.write_table(table, path)
        meta = {"kind": "nla_dataset", "schema_version": 1, "extraction": {"base_model": base, "layer_index": layer}}
        Path(f"{path}.nla_meta.yaml").write_text(dumps(meta))
        return str(path)

    layer, base = llama.nla.site.layer, str(llama.nla.sidecar.base_model)
    pair = PairSettings(str(llama.pair.root))
    for name, message in (
        (written(layer + 1, d, base), "another layer"),
        (written(layer, d + 1, base), "width"),
        (written(layer, d, "owner/elsewhere"), "another model"),
    ):
        with pytest.raises(InputError, match=message):
            run_job(JobSettings(pair, DataSettings(name)), tmp_path / "refused")
    assert not (tmp_path / "refused").exists()
    run_job(JobSettings(pair, DataSettings(written(layer, d, base)), max_new_tokens=4, batch_size=2), tmp_path / "out")
    assert [row["flags"] for row in rows_of(tmp_path / "out")] == [[], []]


def test_a_pair_without_a_reference_is_scored_in_sample_from_a_hundred_rows_up(llama: Case, tmp_path: Path) -> None:
    assert llama.nla.reference is None
    rows = torch.randn(120, llama.nla.d_model, generator=torch.Generator().manual_seed(4))
    np.save(tmp_path / "v.npy", rows.numpy())
    pair = PairSettings(str(llama.pair.root))
    job = JobSettings(
        pair, DataSettings(str(tmp_path / "v.npy")), temperature=0, max_new_tokens=2, batch_size=64, block=50
    )
    summary = run_job(job, tmp_path / "out")
    measured = Reference.measure(rows, "in-sample")
    fve = summary.fve[0]
    assert (fve.dataset, fve.n) == ("in-sample", 120)
    found = rows_of(tmp_path / "out")
    mean = np.mean([2.0 if row["mse"] is None else row["mse"] for row in found])
    assert fve.value == pytest.approx(1 - mean / measured.raw_variance)
    few = run_job(replace(job, data=replace(job.data, limit=99)), tmp_path / "few")
    assert few.fve[0].value is None


# -- what goes wrong -------------------------------------------------------------------------------------------


def test_bad_items_are_rows_in_error() -> None:
    from nla_hub.explain.rows import VectorRows

    job = JobSettings(PairSettings(), DataSettings("x.npy"))
    made = VectorRows(job, 4)(BadItem("x: broken", None, "x"), 3)
    assert [(row.document, row.error, row.source) for row in made.rows] == [(3, "x: broken", -1)]


def test_a_model_that_makes_nan_costs_those_rows_alone(
    job: JobSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    true = NLA.capture_ids

    def poisoned(self: NLA, sequences: Any, **settings: Any) -> torch.Tensor:
        found = true(self, sequences, **settings)
        if not poisoned_once:
            poisoned_once.append(1)
            found[1] = float("inf")
        return found

    poisoned_once: list[int] = []

    monkeypatch.setattr(NLA, "capture_ids", poisoned)
    summary = run_job(replace(job, data=replace(job.data, limit=3), n=1), tmp_path / "out")
    rows = rows_of(tmp_path / "out")
    assert summary.counts["error"] == 1
    assert rows[1]["error"] == "The model's own vector is infinite."
    assert all(row["status"] is not None for row in rows if row["row"] != 1)


def test_a_block_that_always_fails_costs_its_rows_alone_unless_nothing_works(
    job: JobSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    true = NLA.capture_ids
    calls: list[int] = []

    def failing(self: NLA, sequences: Any, **settings: Any) -> torch.Tensor:
        digest = document_hash(str(sequences))
        calls.append(1)
        if not calls[1:] or digest == first[0]:
            first.append(digest)
            raise RuntimeError("CUDA error: an illegal memory access")
        return true(self, sequences, **settings)

    first: list[str] = []
    monkeypatch.setattr(NLA, "capture_ids", failing)
    summary = run_job(job, tmp_path / "out")
    assert summary.complete
    failed = [row for row in rows_of(tmp_path / "out") if row["error"] and "illegal memory access" in row["error"]]
    assert {(row["row"] if row["copy_of"] is None else row["copy_of"]) // job.block for row in failed} == {0}
    assert "(3 times)" in failed[0]["error"]
    assert len(first) == 3

    def never(self: NLA, sequences: Any, **settings: Any) -> torch.Tensor:
        raise RuntimeError("no kernel image")

    monkeypatch.setattr(NLA, "capture_ids", never)
    with pytest.raises(RunError, match="Nothing could be computed: RuntimeError: no kernel image"):
        run_job(job, tmp_path / "nothing")
    assert not (tmp_path / "nothing" / "parts").exists()


def test_memory_that_does_not_suffice_is_noted(
    job: JobSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    true = NLA.score
    raised: list[int] = []

    def tight(self: NLA, *args: Any, **settings: Any) -> Any:
        from nla_hub.batching import run_batches

        def work(batch: Any) -> None:
            if not raised:
                raised.append(1)
                raise torch.OutOfMemoryError

        list(run_batches([range(4)], work))
        return true(self, *args, **settings)

    monkeypatch.setattr(NLA, "score", tight)
    small = replace(job, data=replace(job.data, limit=5))
    summary = run_job(small, tmp_path / "out")
    assert summary.backed_off == (0,)
    assert json.loads((tmp_path / "out" / "manifest.json").read_text())["backed_off"] == [0]
    assert run_job(small, tmp_path / "out").backed_off == (0,)


def test_a_text_that_the_ar_cannot_read_costs_its_own_score(
    job: JobSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from nla_hub.reconstructor import Reconstructor

    true = Reconstructor.reconstruct
    poison: list[str] = []

    def picky(self: Reconstructor, texts: Any, **settings: Any) -> torch.Tensor:
        poison[:] = poison or list(texts[:1])
        if poison and poison[0] in texts:
            raise InputError("The AR cannot read this.", where="text 0")
        return true(self, texts, **settings)

    monkeypatch.setattr(Reconstructor, "reconstruct", picky)
    run_job(replace(job, data=replace(job.data, limit=4), max_new_tokens=40, n=1), tmp_path / "out")
    bad = [row for row in rows_of(tmp_path / "out") if row["text"] == poison[0]]
    assert bad
    assert all(row["cosine"] is None and "Not scored: text 0: The AR cannot read this." in row["error"] for row in bad)
    assert all(row["cosine"] is not None for row in rows_of(tmp_path / "out") if row["error"] is None)


# -- what must never be taken for this job's -------------------------------------------------------------------


def test_parts_of_another_job_or_block_are_refused_and_kept(
    job: JobSettings, done: tuple[Path, JobSummary], tmp_path: Path
) -> None:
    import shutil

    out = tmp_path / "mixed"
    shutil.copytree(done[0], out)
    (out / "manifest.json").unlink()
    parts = out / "parts"
    shutil.copy(parts / part_name(1), parts / part_name(2))
    with pytest.raises(RunError, match="not written by this job for this block"):
        run_job(job, out)
    assert (parts / part_name(2)).read_bytes() == (parts / part_name(1)).read_bytes()
    other = replace(job, seed=5, data=replace(job.data, limit=3))
    run_job(other, tmp_path / "other")
    shutil.copy(tmp_path / "other" / "parts" / part_name(0), parts / part_name(2))
    with pytest.raises(RunError, match="not written by this job"):
        run_job(job, out)
    (parts / part_name(2)).unlink()
    assert run_job(job, out).complete
    assert files_of(out) == files_of(done[0])


def test_a_part_that_is_no_longer_ours_to_judge_is_not_deleted(
    job: JobSettings, done: tuple[Path, JobSummary], tmp_path: Path
) -> None:
    import shutil

    out = tmp_path / "later"
    shutil.copytree(done[0], out)
    path = out / "parts" / part_name(1)
    table = pq.read_table(path)
    pq.write_table(table.append_column("confidence", pa.array([1.0] * len(table))), path)
    with pytest.raises(RunError, match="cannot be used"):
        run_job(job, out)
    assert pq.read_table(path).column_names[-1] == "confidence"


def test_damage_in_any_column_is_seen_and_mended(
    job: JobSettings, done: tuple[Path, JobSummary], tmp_path: Path
) -> None:
    import shutil

    out = tmp_path / "damaged"
    shutil.copytree(done[0], out)
    path = out / "parts" / part_name(1)
    column = pq.read_metadata(path).row_group(0).column(list(COLUMNS).index("raw"))
    data = bytearray(path.read_bytes())
    middle = column.dictionary_page_offset + 60
    data[middle : middle + 8] = bytes(b ^ 0xFF for b in data[middle : middle + 8])
    path.write_bytes(bytes(data))
    summary = run_job(job, out)
    assert summary.computed == job.block
    assert files_of(out) == files_of(done[0])


def test_the_plan_of_another_job_is_dropped(tmp_path: Path) -> None:
    place = tmp_path / "plan.sqlite"
    one, other = Words([item_rows(i, 2, 7) for i in range(6)]), Words([item_rows(i, 3, i) for i in range(6)])
    plan = Plan(place, one, one.make, 4, identity="one")  # type: ignore[arg-type]
    list(plan.blocks(lambda i: True))
    plan.close()
    plan = Plan(place, other, other.make, 4, identity="other")  # type: ignore[arg-type]
    rows = [row for block in plan.blocks(lambda i: True) for row in block.rows]
    assert [row.copy_of for row in rows] == [None] * 18
    plan.close()


def test_planning_stops_when_it_is_told(tmp_path: Path) -> None:
    data = Words([item_rows(i, 0, i) for i in range(1000)])
    plan = Plan(tmp_path / "plan.sqlite", data, data.make, 4)  # type: ignore[arg-type]
    assert list(plan.blocks(lambda i: True, stopped=lambda: len(data.read) > 10)) == []
    assert plan.total is None
    assert len(data.read) < 20
    plan.close()


def test_a_job_whose_last_blocks_all_fail_comes_to_its_end(
    job: JobSettings, done: tuple[Path, JobSummary], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import shutil

    out = tmp_path / "tail"
    shutil.copytree(done[0], out)
    for block in (3, 4, 5):
        (out / "parts" / part_name(block)).unlink()

    def never(self: NLA, sequences: Any, **settings: Any) -> torch.Tensor:
        raise RuntimeError("poison")

    monkeypatch.setattr(NLA, "capture_ids", never)
    summary = run_job(job, out)
    assert summary.complete
    assert summary.errors["poison (3 times)."] >= job.block


def test_pieces_without_the_role_do_not_cost_the_others(llama: Case, tmp_path: Path) -> None:
    long = "the cat sees a house and " * 60
    chat = [{"role": "user", "content": long}, {"role": "assistant", "content": "a dog"}]
    data = write_jsonl(tmp_path / "chat.jsonl", [{"messages": chat}])
    job = JobSettings(
        PairSettings(str(llama.pair.root)),
        DataSettings(str(data)),
        positions="assistant",
        overflow="stride",
        max_new_tokens=2,
        batch_size=4,
    )
    summary = run_job(job, tmp_path / "out")
    assert "error" not in summary.counts
    assert summary.rows == len(llama.nla.capture([chat], "assistant", overflow="stride")) > 0


def test_equal_vectors_at_other_positions_are_no_copies(tmp_path: Path) -> None:
    from nla_hub.explain.inputs import VectorItem
    from nla_hub.explain.rows import VectorRows

    make = VectorRows(JobSettings(PairSettings(), DataSettings("x.npy")), 2)
    vector = np.ones(2, dtype=np.float32)
    made = [make(VectorItem(vector, None, p, c, "x"), 0) for p, c in ((3, "a"), (59, "a"), (3, "b"), (3, "a"))]
    assert len({m.hash for m in made}) == 3
    assert made[0].hash == made[3].hash
    assert len({m.rows[0].hash for m in made}) == 1


def test_a_directory_is_called_by_its_name_in_the_rows(llama: Case, tmp_path: Path) -> None:
    np.save(tmp_path / "v.npy", np.ones((1, llama.nla.d_model), dtype=np.float32))
    job = JobSettings(PairSettings(str(llama.pair.root)), DataSettings(str(tmp_path / "v.npy")), max_new_tokens=2)
    run_job(job, tmp_path / "out")
    assert rows_of(tmp_path / "out")[0]["model"] == llama.pair.root.name
    assert str(llama.pair.root) not in (tmp_path / "out" / "job.yaml").read_text()


def test_an_edited_batch_size_is_refused(job: JobSettings, done: tuple[Path, JobSummary], tmp_path: Path) -> None:
    import shutil

    out = tmp_path / "edited"
    shutil.copytree(done[0], out)
    text = (out / "job.yaml").read_text()
    for bad in ("settled: [1]", "settled:\n  batch_size: -3", "settled:\n  batch_size: x"):
        (out / "job.yaml").write_text(text.replace("settled:\n  batch_size: 8", bad))
        with pytest.raises(RunError, match="not what a job writes"):
            run_job(replace(job, batch_size=None), out)


def test_a_setting_that_the_pair_cannot_serve_ends_the_job_at_once(job: JobSettings, tmp_path: Path) -> None:
    with pytest.raises(InputError):
        run_job(replace(job, max_new_tokens=100_000), tmp_path / "out")


def test_a_reference_of_the_jobs_own_rows_does_not_depend_on_the_blocks(llama: Case, tmp_path: Path) -> None:
    texts = [{"text": f"the cat sees {'a' if i % 2 else 'my'} house number {i % 30}"} for i in range(110)]
    data = write_jsonl(tmp_path / "t.jsonl", texts)
    values = []
    for block in (7, 256):
        pair, named = PairSettings(str(llama.pair.root)), DataSettings(str(data))
        job = JobSettings(pair, named, temperature=0, max_new_tokens=2, batch_size=4, block=block)
        values.append(run_job(job, tmp_path / str(block)).fve[0])
    assert values[0].n == values[1].n == 110
    assert values[0].value == pytest.approx(values[1].value, rel=1e-3)
