"""Data sets as releases: what is refused, what a card says, and that what was published is read again, row for row."""

from __future__ import annotations

import json
import re
import shutil
import socket
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from click.testing import Result
from hub_world import READER, TOKEN, HubWorld, connected
from typer.testing import CliRunner

import nla_hub
from nla_hub import NLA
from nla_hub.cli.app import app
from nla_hub.errors import HubUnreachableError, NLAError, PublishError
from nla_hub.evaluation import EvalResult, get_protocol, run_protocol
from nla_hub.evaluation.protocol_rows import capture_protocol
from nla_hub.evaluation.protocols import Protocol
from nla_hub.explain import DataSettings, JobResult, JobSettings, PairSettings, run_job
from nla_hub.explain.inputs import VectorItem, open_dataset
from nla_hub.explain.result import read_part
from nla_hub.explain.schema import part_name
from nla_hub.geometry import FVE
from nla_hub.hub import HubOptions
from nla_hub.hub.writing import HubWriter
from nla_hub.publish.card import metadata_faults
from nla_hub.publish.data import datasets, evaluation_set, explanations
from nla_hub.publish.data.columns import Against
from nla_hub.publish.data.dataset_cards import explanations_card
from nla_hub.publish.data.explanations import require_finished
from nla_hub.publish.facts import Licence, ReleaseFacts
from nla_hub.publish.prepare import push_found
from nla_hub.publish.push import PushOptions, push
from nla_hub.publish.release import Release, StagedRepo
from nla_hub.publish.staging import bundle
from nla_hub.publish.staging.bundle import Wanted
from nla_hub.publish.staging.found import Found, find
from nla_hub.sidecar import Site
from nla_hub.tiny import documents
from nla_hub.training.data import TrainingRows, write_rows

PAIR = Path(nla_hub.__file__).parent / "tiny" / "weights"
LICENCE = "cc-by-4.0"
REPO = "owner/some-rows"
BLOCK = 4
MARKUP = "<script>alert(1)</script> | `x` *y*"
TOKEN_IN_TEXT = "hf_" + "Ab3dEf7hIj" * 3

JOB_FILES = ["job.yaml", "manifest.json", *(f"{f}/{part_name(i)}" for f in ("parts", "vectors") for i in range(4))]


def write_posts(path: Path) -> Path:
    """Six documents of the tiny world, one of them twice, a text of markup, and a line that is no JSON."""
    stories = [document.content for document in documents(5, seed=3, split="eval")]
    rows = [{"id": f"p{i}", ("text" if isinstance(c, str) else "messages"): c} for i, c in enumerate(stories)]
    rows += [{"id": "again", **{k: v for k, v in rows[0].items() if k != "id"}}, {"id": "markup", "text": MARKUP}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + "this is no JSON\n", encoding="utf-8")
    return path


def settings(data: Path, **changes: Any) -> JobSettings:
    asked: dict[str, Any] = {"positions": "sample:2", "temperature": 0, "max_new_tokens": 40, "keep_vectors": True}
    return JobSettings(PairSettings(), DataSettings(str(data)), **{**asked, "block": BLOCK, **changes})


@pytest.fixture(scope="module")
def posts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_posts(tmp_path_factory.mktemp("data") / "posts.jsonl")


@pytest.fixture(scope="module")
def job(posts: Path) -> Path:
    """A finished job with vectors: 14 rows that were explained, two of them copies, and one in error."""
    out = posts.parent / "job"
    summary = run_job(settings(posts), out)
    assert (summary.rows, summary.counts["error"]) == (15, 1)
    (out / "report.html").write_text("<html>")
    (out / "work").mkdir(exist_ok=True)
    (out / "work" / "plan-0-of-2.sqlite").write_bytes(b"x")
    return out


@pytest.fixture
def copied_job(job: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(job, tmp_path / "job"))


@pytest.fixture(scope="module")
def nla() -> Iterator[NLA]:
    torch.set_num_threads(1)
    with NLA.from_pretrained("tiny") as pair:
        yield pair


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubWorld]:
    with HubWorld(tmp_path / "hub") as hub:
        connected(hub, monkeypatch, tmp_path / "home")
        yield hub


def staged(path: Path, **changes: Any) -> StagedRepo:
    (repo,) = release_of(path, **changes).repos
    return repo


def release_of(path: Path, **changes: Any) -> Release:
    asked: dict[str, Any] = {"repo": REPO, "licence": LICENCE}
    return datasets.stage_data(find(path), Wanted(**{**asked, **changes}))


def card_of(repo: StagedRepo) -> str:
    entry = repo.entry("README.md")
    assert entry is not None
    assert isinstance(entry.content, bytes)
    return entry.content.decode()


def front_matter(card: str) -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load(card.split("---\n")[1])
    return found


# -- explanations: what is published -----------------------------------------------------------------------------


def test_a_job_is_published_where_it_lies(job: Path) -> None:
    release = release_of(job)
    (repo,) = release.repos
    assert (repo.name, repo.kind, repo.role, release.facts) == (REPO, "dataset", "data", None)
    assert [entry.name for entry in repo.entries] == sorted([*JOB_FILES, "README.md"])
    for entry in repo.entries:
        assert entry.content == job / entry.name or entry.name == "README.md"
    assert release.tag == f"data-{release.id}"
    assert release_of(job).id == release.id
    assert release_of(job, tag="v1").tag == "v1"
    again = staged(job)
    assert [e.sha256 for e in again.entries] == [e.sha256 for e in repo.entries]


def test_nothing_that_is_published_names_this_machine(job: Path) -> None:
    repo = staged(job)
    for name in ("README.md", "job.yaml", "manifest.json"):
        entry = repo.entry(name)
        assert entry is not None
        text = b"".join(entry.chunks()).decode()
        for trace in (str(job.parent), str(Path.home()) + "/", socket.gethostname(), "pid"):
            assert trace not in text, f"{trace!r} in {name}"


def test_the_card_says_what_the_rows_say(job: Path) -> None:
    card = card_of(staged(job))
    assert metadata_faults(card, "dataset") == []
    metadata = front_matter(card)
    assert metadata["license"] == LICENCE
    assert metadata["size_categories"] == ["n<1K"]
    assert {"nla", "interpretability", "explanations"} <= set(metadata["tags"])
    assert [c["config_name"] for c in metadata["configs"]] == ["explanations", "vectors"]
    manifest = json.loads((job / "manifest.json").read_text())
    raw = manifest["fve"][0]
    of = f"{raw['dataset']}: {raw['value']:.3f}"
    assert f"- FVE of these {raw['n']} rows against the raw variance denominator of {of}\n" in card
    assert f"mean-norm denominator of {raw['dataset']}: {manifest['fve'][1]['value']:.3f}\n" in card
    assert "FVE (" not in card, "the form of a score on that data set's own rows"
    for status, count in manifest["counts"].items():
        assert f"| {status} | {count} |" in card
    for column in read_part(job / "parts" / part_name(0)).column_names:
        assert f"| `{column}` |" in card
    assert not re.search(r"\{\{|\}\}|\{%|\bNone\b", card)


def test_a_score_against_the_rows_own_denominator_says_so(job: Path) -> None:
    facts = explanations.survey(job, Against.here(job, REPO))
    own = (FVE(0.5, "raw_variance", "in-sample", 2000), FVE(None, "mean_norm", "no reference", 3))
    config = {name: value for name, value in facts.config.items() if name != "reference"}
    card = explanations_card(REPO, "v1", Licence(LICENCE), replace(facts, config=config, fve=own))
    assert "- FVE of these 2,000 rows against their own raw variance denominator: 0.500\n" in card
    assert "- FVE (mean-norm): not measured\n" in card


def test_samples_follow_their_rule_and_cannot_be_markup(job: Path) -> None:
    rows = pd.read_parquet(job / "parts").sort_values("row")
    rows = rows[rows.status.notna()]
    order = rows.assign(counted=rows.cosine.fillna(0.0)).sort_values("counted", kind="stable").row.tolist()
    wanted = [order[round(rank * (len(order) - 1))] for rank in (0, 0.25, 0.5, 0.75, 1)]
    card = card_of(staged(job))
    table = card.partition("## Samples")[2].partition("##")[0]
    assert [int(n) for n in re.findall(r"^\| \d+ % \| (\d+) \|", table, re.M)] == wanted
    assert "<script>" not in card


def test_a_sample_of_markup_stays_text(copied_job: Path) -> None:
    """A row whose text is markup is made the best one, so that the card shows it."""
    part = copied_job / "parts" / part_name(3)
    table = read_part(part)
    columns = {name: table.column(name).to_pylist() for name in ("cosine", "context", "text")}
    columns["cosine"][0], columns["context"][0], columns["text"][0] = 0.99999, MARKUP, MARKUP
    rewrite(part, table, **columns)
    recount(copied_job)
    shown = card_of(staged(copied_job)).partition("| 100 % |")[2].splitlines()[0]
    assert shown.count("&lt;script&gt;alert(1)&lt;/script&gt; \\| \\`x\\` \\*y\\*") == 2


def test_a_job_without_vectors_says_nothing_of_vectors(copied_job: Path) -> None:
    config = (copied_job / "job.yaml").read_text()
    (copied_job / "job.yaml").write_text(config.replace("keep_vectors: true", "keep_vectors: false"))
    repo = staged(copied_job)
    assert not [e.name for e in repo.entries if e.name.startswith("vectors")]
    assert [c["config_name"] for c in front_matter(card_of(repo))["configs"]] == ["explanations"]
    assert "vectors/" not in card_of(repo)


# -- explanations: what is refused -------------------------------------------------------------------------------


def rewrite(part: Path, table: pa.Table, **columns: list[Any]) -> None:
    """Put other values into columns of a part, whose notes stay."""
    for name, values in columns.items():
        place = table.column_names.index(name)
        table = table.set_column(place, table.schema.field(name), pa.array(values, table.schema.field(name).type))
    pq.write_table(table, part, compression="zstd", write_page_checksum=True)


def change(part: str, column: str, row: int, value: Any) -> Callable[[Path], None]:
    def act(path: Path) -> None:
        table = pq.read_table(path / part)
        values = table.column(column).to_pylist()
        values[row] = value
        rewrite(path / part, table, **{column: values})

    return act


def recount(path: Path) -> None:
    """Make the manifest say what the rows say."""
    from nla_hub.explain.tally import Tally

    result = JobResult.open(path)
    tally = Tally(result.reference)
    for table in result.tables():
        tally.add(table)
    assert result.manifest is not None
    (path / "manifest.json").write_text(json.dumps({**result.manifest, **tally.to_mapping()}))


def told(name: str, value: Any) -> Callable[[Path], None]:
    def act(path: Path) -> None:
        manifest = json.loads((path / "manifest.json").read_text())
        (path / "manifest.json").write_text(json.dumps({**manifest, name: value}))

    return act


def bad_vector(value: float) -> Callable[[Path], None]:
    def act(path: Path) -> None:
        place = path / "vectors" / part_name(1)
        table = pq.read_table(place)
        values = np.stack(table.column(1).to_pylist()).astype(np.float32)
        values[2] = 0.0 if value == 0 else values[2]
        values[2, 17] = value
        pq.write_table(
            table.set_column(1, table.schema.field(1), pa.array(list(values), table.schema.field(1).type)), place
        )

    return act


def swap_parts(path: Path) -> None:
    first, second = (path / "parts" / part_name(i) for i in (0, 1))
    first.rename(path / "aside")
    second.rename(first)
    (path / "aside").rename(second)


P1 = f"parts/{part_name(1)}"
DAMAGES: dict[str, tuple[Callable[[Path], None], str]] = {
    "a token in a text": (change(P1, "text", 2, f"next {TOKEN_IN_TEXT}"), f"{P1}, row 6, column text: a Hugging Face"),
    "a token in a context": (change(P1, "context", 0, TOKEN_IN_TEXT), f"{P1}, row 4, column context: a Hugging Face"),
    "a token in a flag": (change(P1, "flags", 1, ["early", TOKEN_IN_TEXT]), f"{P1}, row 5, column flags: a Hugging"),
    "this account's token": (
        change(P1, "raw", 3, "0wnersW0rdF0rAll"),
        f"{P1}, row 7, column raw: the value of HF_TOKEN",
    ),
    "a home in an id": (change(P1, "doc_id", 3, "/home/jane/x.txt"), f"{P1}, row 7, column doc_id: a home directory"),
    "NaN in a vector": (bad_vector(np.nan), f"vectors/{part_name(1)}, row 2: the vector is missing or not finite"),
    "an infinite vector": (bad_vector(np.inf), f"vectors/{part_name(1)}, row 2: the vector is missing or not finite"),
    "a zero vector": (bad_vector(0.0), f"vectors/{part_name(1)}, row 2: the vector is zero"),
    "no vectors": (lambda p: (p / "vectors" / part_name(2)).unlink(), f"vectors/{part_name(2)} is missing"),
    "vectors of others": (
        lambda p: (p / "vectors" / part_name(2)).rename(p / "vectors" / part_name(1)),
        f"vectors/{part_name(1)}: its rows are not those of {P1}",
    ),
    "a lost part": (lambda p: (p / "parts" / part_name(2)).unlink(), f"without {part_name(2)}"),
    "swapped parts": (swap_parts, "do not follow"),
    "another figure": (change(P1, "mse", 0, 1.9), "manifest.json says fve"),
    "another manifest": (told("counts", {"ok": 15}), "manifest.json says counts {'ok': 15}"),
    "a copy not filled in": (change(P1, "status", 0, None), "row 4: neither an explanation nor an error"),
    "more parts than a folder takes": (lambda p: None, "at most 3"),
    "no rows": (told("rows", 0), "This job has no rows"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_job_that_must_not_go_out_is_refused(copied_job: Path, damage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "0wnersW0rdF0rAll")
    act, message = DAMAGES[damage]
    assert staged(copied_job)
    act(copied_job)
    if damage == "more parts than a folder takes":
        monkeypatch.setattr(explanations, "MOST_FILES", 3)
    with pytest.raises(PublishError) as refusal:
        staged(copied_job)
    assert message in str(refusal.value)
    assert refusal.value.next_step
    assert TOKEN_IN_TEXT not in str(refusal.value)
    assert "0wnersW0rdF0rAll" not in str(refusal.value)


def test_everything_that_is_wrong_is_said_at_once(copied_job: Path) -> None:
    for damage in ("a token in a text", "a home in an id", "NaN in a vector", "another figure"):
        DAMAGES[damage][0](copied_job)
    with pytest.raises(PublishError) as refusal:
        staged(copied_job)
    assert len(refusal.value.faults) == 4


def test_documents_may_speak_of_passwords_and_homes(copied_job: Path) -> None:
    """They are the caller's; what only looks like a secret by the words around it stands in ordinary texts."""
    said = "password: hunter22! of jane@corp.com in /home/jane"
    change(P1, "context", 0, said)(copied_job)
    assert staged(copied_job)
    change(P1, "context", 0, "-----BEGIN RSA PRIVATE KEY-----")(copied_job)
    with pytest.raises(PublishError, match="a private key"):
        staged(copied_job)


def test_an_unfinished_job_names_the_way_on(copied_job: Path) -> None:
    (copied_job / "manifest.json").unlink()
    with pytest.raises(PublishError, match="not finished") as refusal:
        staged(copied_job)
    assert "same command" in str(refusal.value)
    with pytest.raises(PublishError, match=r"4 blocks of rows are done, no manifest\.json") as refusal:
        require_finished(copied_job)
    assert "nla-hub explain --data DATASET" in str(refusal.value)
    assert "--shard" in str(refusal.value)


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        ({"repo": None}, "name it: --repo"),
        ({"repo": "no-owner"}, "no repository of this name"),
        ({"licence": None}, "Under which licence"),
        ({"licence": "other"}, "no licence that the Hub knows"),
    ],
)
def test_name_and_licence_are_the_callers(job: Path, wanted: dict[str, Any], message: str) -> None:
    with pytest.raises(PublishError, match=message):
        staged(job, **wanted)


def test_a_licence_of_ones_own(job: Path) -> None:
    metadata = front_matter(card_of(staged(job, licence="our-terms=https://example.org/terms")))
    assert (metadata["license"], metadata["license_name"]) == ("other", "our-terms")
    assert metadata["license_link"] == "https://example.org/terms"


# -- activations -------------------------------------------------------------------------------------------------

D = 8
SITE = {"base_model": "owner/base", "d_model": D, "layer_index": 3, "norm": "none"}


def activations(n: int = 6, *, layer: int = 3, texts: bool = False) -> TrainingRows:
    drawn = torch.randn(n, D, generator=torch.Generator().manual_seed(n))
    names = tuple(f"doc-{i // 2}" for i in range(n))
    labels = tuple(f"label {i}" if texts else "" for i in range(n))
    return TrainingRows(
        drawn, labels, names, tuple(range(10, 10 + n)), tuple(f"text {i}" for i in range(n)), Site(layer)
    )


@pytest.fixture
def vectors_dir(tmp_path: Path) -> Path:
    """What a data stage leaves: two splits, and files that are nobody's business."""
    folder = tmp_path / "checkpoint"
    write_rows(folder / "av_sft.parquet", activations(6, texts=True), meta={"stage": "av_sft", "extraction": SITE})
    write_rows(folder / "rl.parquet", activations(4), meta={"stage": "rl", "extraction": SITE})
    (folder / "av_sft.parquet.f32").write_bytes(b"1234")
    (folder / "eval.jsonl").write_text('{"text": "held out"}\n')
    return folder


def test_activations_are_published_with_their_sidecars(vectors_dir: Path) -> None:
    repo = staged(vectors_dir)
    names = ["README.md", *(f"{f}{s}" for f in ("av_sft.parquet", "rl.parquet") for s in ("", ".nla_meta.yaml"))]
    assert [entry.name for entry in repo.entries] == names
    card = card_of(repo)
    assert metadata_faults(card, "dataset") == []
    assert [c["config_name"] for c in front_matter(card)["configs"]] == ["av_sft", "rl"]
    assert "`owner/base`" in card
    assert "| `av_sft.parquet` | 6 |" in card
    assert [e.name for e in staged(vectors_dir / "rl.parquet").entries] == [
        "README.md",
        "rl.parquet",
        "rl.parquet.nla_meta.yaml",
    ]


def retyped(column: str, type_: pa.DataType, values: list[Any]) -> Callable[[Path], None]:
    def act(folder: Path) -> None:
        table = pq.read_table(folder / "rl.parquet")
        rest = table.drop_columns([column]) if column in table.column_names else table
        pq.write_table(rest.append_column(column, pa.array(values, type_)), folder / "rl.parquet")

    return act


def meta(**changes: Any) -> Callable[[Path], None]:
    def act(folder: Path) -> None:
        path = folder / "rl.parquet.nla_meta.yaml"
        path.write_text(yaml.safe_dump({**yaml.safe_load(path.read_text()), **changes}))

    return act


ROWS = np.ones((4, D), dtype=np.float32)
ODD_ACTIVATIONS: dict[str, tuple[Callable[[Path], None], str]] = {
    "no sidecar": (
        lambda f: (f / "rl.parquet.nla_meta.yaml").unlink(),
        "there is no rl.parquet.nla_meta.yaml beside it",
    ),
    "another number of rows": (meta(row_count=5), "it has 4 rows, its sidecar says 5"),
    "another kind": (meta(kind="nla_model"), "kind is 'nla_model'"),
    "another width": (meta(extraction={**SITE, "d_model": 9}), "d_model 9; the vectors have 8 numbers"),
    "no base model": (meta(extraction={"layer_index": 3}), "no base model"),
    "another base model": (
        meta(extraction={**SITE, "base_model": "owner/other"}),
        "each site as a data set of its own",
    ),
    "another layer": (meta(extraction={**SITE, "layer_index": 4}), "rl.parquet, row 0: of layer 3; the sidecar says 4"),
    "lists of any length": (retyped("activation_vector", pa.list_(pa.float32()), list(ROWS)), "not fixed_size_list"),
    "float64": (retyped("activation_vector", pa.list_(pa.float64(), D), list(ROWS)), "not fixed_size_list<float32"),
    "a null vector": (
        retyped("activation_vector", pa.list_(pa.float32(), D), [*ROWS[:3], None]),
        "rl.parquet, row 3: the",
    ),
    "NaN": (
        retyped("activation_vector", pa.list_(pa.float32(), D), [*ROWS[:3], ROWS[3] * np.nan]),
        "rl.parquet, row 3:",
    ),
    "bytes": (retyped("image", pa.binary(), [b"x"] * 4), "the column image holds bytes"),
    "a token": (
        retyped("note", pa.string(), ["a", "b", TOKEN_IN_TEXT, "d"]),
        "rl.parquet, row 2, column note: a Hugging",
    ),
    "a token deep inside": (
        retyped("more", pa.list_(pa.struct([("x", pa.string())])), [[{"x": "a"}]] * 3 + [[{"x": TOKEN_IN_TEXT}]]),
        "rl.parquet, row 3, column more: a Hugging",
    ),
    "a home in an id": (
        retyped("doc_id", pa.string(), ["/home/jane/x", "b", "c", "d"]),
        "rl.parquet, row 0, column doc_id",
    ),
}


@pytest.mark.parametrize("oddity", ODD_ACTIVATIONS)
def test_activations_that_must_not_go_out_are_refused(vectors_dir: Path, oddity: str) -> None:
    assert staged(vectors_dir)
    act, message = ODD_ACTIVATIONS[oddity]
    act(vectors_dir)
    with pytest.raises(PublishError) as refusal:
        staged(vectors_dir)
    assert message in str(refusal.value)
    assert TOKEN_IN_TEXT not in str(refusal.value)


def test_vectors_of_a_slice_are_those_of_the_slice() -> None:
    from nla_hub.publish.data.columns import vectors_in

    values = np.arange(40, dtype=np.float32).reshape(5, 8)
    column = pa.array(list(values), pa.list_(pa.float32(), 8))
    assert np.array_equal(vectors_in(column.slice(2, 2)), values[2:4])
    holed = vectors_in(pa.array([values[0], None, values[2]], pa.list_(pa.float32(), 8)).slice(1))
    assert np.isnan(holed[0]).all()
    assert np.array_equal(holed[1], values[2])


# -- the evaluation set ------------------------------------------------------------------------------------------

SMALL = get_protocol("tiny-eval-v1").changed(documents=8)
FACT_ROWS = 6


@pytest.fixture(scope="module")
def evaluation_file(nla: NLA, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return evaluation_set.write_evaluation_set(nla, SMALL, tmp_path_factory.mktemp("eval"), fact_rows=FACT_ROWS)


def test_the_evaluation_set_holds_the_rows_that_are_measured(nla: NLA, evaluation_file: Path) -> None:
    """Against the rows as the evaluation captures them, and against the documents read again from the file."""
    table = pq.read_table(evaluation_file)
    rows = capture_protocol(nla, SMALL, fact_rows=FACT_ROWS)
    assert len(table) == len(rows.acts) > rows.n == 16
    found = table.to_pylist()
    assert [row["row"] for row in found] == list(range(len(found)))
    assert [row["own"] for row in found] == [True] * rows.n + [False] * (len(found) - rows.n)
    assert np.array_equal(np.stack([row["activation_vector"] for row in found]), rows.acts.vectors.numpy())
    assert [row["key"] for row in found] == [f"{k.document}:{k.position}:{k.sample}" for k in rows.acts.keys]
    assert [row["token"] for row in found] == list(rows.acts.token)
    for row, known in zip(found, rows.world, strict=True):
        facts = {name: value for name, value in row["facts"].items() if value is not None}
        assert facts == {name: str(value) for name, value in known.facts.items() if name in row["facts"]}
    assert {fact: [i for i, row in enumerate(found) if fact in row["counts_for"]] for fact in rows.members} == {
        fact: sorted(members) for fact, members in rows.members.items()
    }
    contents = [row["text"] if row["text"] is not None else row["messages"] for row in found]
    for i in (0, 7, len(found) - 1):
        acts = nla.capture([contents[i]], positions=[found[i]["position"]])
        assert torch.allclose(acts.vectors[0], torch.tensor(found[i]["activation_vector"]), atol=1e-4)
        assert (acts.token[0], acts.char_end[0]) == (found[i]["token"], found[i]["char_end"])
        assert found[i]["detokenized_text_truncated"].endswith(acts.context[0])
        assert found[i]["n_raw_tokens"] == found[i]["position"] + 1
    assert any(isinstance(content, list) for content in contents)


@pytest.fixture(scope="module")
def result(nla: NLA) -> EvalResult:
    return run_protocol(nla, SMALL, facts=False, probe_documents=8)


def test_the_evaluation_set_gives_the_score_that_it_is_named_for(
    result: EvalResult, evaluation_file: Path, tmp_path: Path
) -> None:
    own = evaluation_file.parent / "own.parquet"
    table = pq.read_table(evaluation_file)
    pq.write_table(table.filter(table.column("own")), own)
    shutil.copy(f"{evaluation_file}.nla_meta.yaml", f"{own}.nla_meta.yaml")
    summary = run_job(settings(own, temperature=0, positions="last", max_new_tokens=200), tmp_path / "out")
    own.unlink()
    Path(f"{own}.nla_meta.yaml").unlink()
    assert summary.rows == result.n
    assert summary.mean_cosine == pytest.approx(result.real.cosine, abs=1e-6)
    flags = read_part(tmp_path / "out" / "parts" / part_name(0)).column("flags").to_pylist()
    assert all("off_distribution" not in row for row in flags)  # the sidecar says that they are the pair's own


def test_the_evaluation_set_as_a_release(evaluation_file: Path) -> None:
    repo = staged(evaluation_file, licence="apache-2.0")
    names = ["README.md", "eval.parquet", "eval.parquet.nla_meta.yaml"]
    assert [entry.name for entry in repo.entries] == names
    card = card_of(repo)
    assert metadata_faults(card, "dataset") == []
    assert "evaluation-set" in front_matter(card)["tags"]
    (config,) = front_matter(card)["configs"]
    assert config["data_files"] == [{"split": "test", "path": "eval.parquet"}]
    assert f"`{SMALL.name}`" in card
    assert "16 activations of 8 documents" in card
    for column in pq.read_schema(evaluation_file).names:
        assert f"| `{column}` |" in card
        assert "as the author named it" not in card


def test_documents_of_others_are_not_given_away(nla: NLA, tmp_path: Path) -> None:
    corpus = tmp_path / "corpus.jsonl"
    texts = [" ".join(["otto came to the island and sang"] * 12) + f" {word}." for word in ("gold", "knight", "sleep")]
    corpus.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    protocol = get_protocol("nla-eval-v1").changed(documents=3)
    place = evaluation_set.write_evaluation_set(nla, protocol, tmp_path / "eval", corpus=corpus)
    table = pq.read_table(place)
    rows = capture_protocol(nla, protocol, corpus=corpus)
    assert table.column("doc_id").to_pylist() == list(rows.acts.doc_id)
    assert table.column("position").to_pylist() == list(rows.acts.position)
    assert table.column("detokenized_text_truncated").null_count == len(table) == 15
    assert not {"text", "messages", "token", "facts"} & set(table.column_names)
    assert b"otto" not in place.read_bytes()
    assert staged(place)


@pytest.fixture(scope="module")
def pair_facts(result: EvalResult) -> ReleaseFacts:
    """What is known of the packaged pair when it is published with a score and the name of its evaluation set."""
    release = bundle.stage(find(PAIR), Wanted(owner="owner", evaluation_set=REPO), options=HubOptions(), work=None)
    assert release.facts is not None
    return replace(release.facts, evaluation=result)


def test_a_pair_brings_its_evaluation_set(
    world: HubWorld,
    pair_facts: ReleaseFacts,
    evaluation_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    found, hub = find(PAIR), HubOptions()
    planned = datasets.stage_evaluation_set(found, pair_facts, hub, None)
    assert planned is not None
    release = datasets.stage_evaluation_set(found, pair_facts, hub, tmp_path / "work")
    assert release is not None
    own = pq.read_table(evaluation_file)
    own = own.filter(own.column("own"))
    written = pq.read_table(tmp_path / "work" / "eval.parquet")
    for name in ("key", "text", "messages", "detokenized_text_truncated"):
        assert written.column(name).to_pylist() == own.column(name).to_pylist()
    vectors = [np.stack(table.column("activation_vector").to_pylist()) for table in (written, own)]
    assert np.allclose(*vectors, atol=1e-3)  # the rows of a batch were others
    (unwritten,) = planned.repos
    names = [entry.name for entry in release.repos[0].entries]
    assert sorted([*unwritten.to_be_written, *(e.name for e in unwritten.entries)]) == names
    assert planned.id is None
    assert "LICENSE" in names
    push(release, PushOptions(), writer=HubWriter(hub), hub=hub)
    assert datasets.stage_evaluation_set(found, pair_facts, hub, tmp_path / "more") is None
    assert not (tmp_path / "more").exists()
    assert datasets.stage_evaluation_set(found, replace(pair_facts, evaluation_set=None), hub, None) is None
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert datasets.stage_evaluation_set(found, pair_facts, hub, None) is not None  # a dry run without network
    with pytest.raises(HubUnreachableError):
        datasets.stage_evaluation_set(found, pair_facts, hub, tmp_path / "more")
    with pytest.raises(PublishError, match="Nothing was measured"):
        datasets.stage_evaluation_set(found, replace(pair_facts, evaluation=None), hub, None)


def test_the_documents_of_a_run_are_its_own(
    world: HubWorld, pair_facts: ReleaseFacts, result: EvalResult, tmp_path: Path
) -> None:
    """A protocol without documents is measured on those that a run keeps; a bare pair has none."""
    protocol = get_protocol("nla-eval-v1").changed(documents=2)
    facts = replace(pair_facts, evaluation=replace(result, protocol=protocol))
    with pytest.raises(PublishError, match="documents that nla-eval-v1"):
        datasets.stage_evaluation_set(find(PAIR), facts, HubOptions(), None)
    kept = tmp_path / "run" / "data" / "checkpoint" / "eval.jsonl"
    kept.parent.mkdir(parents=True)
    texts = [" ".join(["otto came to the island and sang"] * 12) + f" {word}." for word in ("gold", "knight")]
    kept.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    lies = find(PAIR)
    run = Found("run", tmp_path / "run", lies.av, lies.ar, lies.base)
    release = datasets.stage_evaluation_set(run, facts, HubOptions(), tmp_path / "work")
    assert release is not None
    assert pq.read_metadata(tmp_path / "work" / "eval.parquet").num_rows == 10


# -- on the Hub --------------------------------------------------------------------------------------------------


def published(world: HubWorld, path: Path, repo: str = REPO, **options: Any) -> Any:
    return push_found(find(path), repo, **{"licence": LICENCE, **options})


def test_explanations_are_read_again_from_the_hub(world: HubWorld, job: Path, tmp_path: Path) -> None:
    from huggingface_hub import snapshot_download

    from nla_hub.report.write import write_report

    pushed = published(world, job)
    files = world.files(REPO, kind="dataset")
    assert sorted(files) == sorted([*JOB_FILES, "README.md"])
    for name in JOB_FILES:
        assert files[name] == (job / name).read_bytes()
    assert list(world.tags(REPO, kind="dataset")) == [pushed.tag]
    assert [name for name in world.branches(REPO, kind="dataset") if name != "main"] == []
    here = pd.read_parquet(job / "parts")
    there = pd.read_parquet(f"hf://datasets/{REPO}@{pushed.tag}/parts")
    pd.testing.assert_frame_equal(there, here)
    vectors = pd.read_parquet(f"hf://datasets/{REPO}@{pushed.tag}/vectors")
    assert len(here.merge(vectors, on="row", how="left")) == len(here)
    copy = Path(snapshot_download(REPO, repo_type="dataset", revision=pushed.tag))
    opened = JobResult.open(copy)
    assert opened.manifest == JobResult.open(job).manifest
    assert pa.concat_tables(opened.tables()).equals(pa.concat_tables(JobResult.open(job).tables()))
    page = write_report([copy], tmp_path / "report.html", map_by="off")
    assert "posts" not in page.name
    assert page.is_file()
    before = len(world.written())
    again = published(world, job)
    assert (again.tag, again.changed) == (pushed.tag, False)
    assert len(world.written()) == before


@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_the_library_of_data_sets_reads_what_the_card_names(
    world: HubWorld, job: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    library = pytest.importorskip("datasets")
    monkeypatch.setattr(library.config, "HF_HUB_OFFLINE", False)  # it reads the environment once, when it is imported
    monkeypatch.setattr(library.config, "HF_ENDPOINT", world.url)
    pushed = published(world, job)
    for name in ("explanations", "vectors"):
        rows = library.load_dataset(REPO, name, split="train", revision=pushed.tag, cache_dir=str(tmp_path / "cache"))
        here = pq.read_table(job / ("parts" if name == "explanations" else "vectors"))
        assert rows.column_names == here.column_names
        assert list(rows["row"]) == here.column("row").to_pylist()
        column = "text" if name == "explanations" else "activation_vector"
        assert list(rows[column]) == here.column(column).to_pylist()
    blocks = re.findall(r"```python\n(.*?)```", world.files(REPO, kind="dataset")["README.md"].decode(), re.S)
    named: dict[str, Any] = {}
    for block in blocks:
        exec(block, named)
    assert len(blocks) == 3
    assert len(named["rows"]) == len(pd.read_parquet(job / "parts"))
    assert named["job"].manifest == JobResult.open(job).manifest


def test_activations_are_an_input_again(world: HubWorld, vectors_dir: Path) -> None:
    pushed = published(world, vectors_dir)
    data = open_dataset(f"hf://datasets/{REPO}@{pushed.tag}")
    local = [
        *pq.read_table(vectors_dir / "av_sft.parquet").to_pylist(),
        *pq.read_table(vectors_dir / "rl.parquet").to_pylist(),
    ]
    items = list(data.items())
    assert data.site is not None
    assert (data.kind, data.width, data.site.base_model, data.site.layer) == ("vectors", D, "owner/base", 3)
    assert len(items) == len(local) == 10
    for item, row in zip(items, local, strict=True):
        assert isinstance(item, VectorItem)
        assert np.array_equal(item.vector, np.float32(row["activation_vector"]))
        assert (item.doc_id, item.position) == (row["doc_id"], row["n_raw_tokens"] - 1)
        assert item.context == row["detokenized_text_truncated"]


def is_there(protocol: Protocol = SMALL, *, layer: int = 2, base_model: str = "tiny-source") -> bool:
    return evaluation_set.is_published(REPO, protocol, base_model=base_model, layer=layer, options=HubOptions())


def test_an_evaluation_set_is_published_once(world: HubWorld, evaluation_file: Path) -> None:
    assert not is_there()
    world.seed(REPO, {"README.md": b"soon"}, kind="dataset")
    assert not is_there()
    published(world, evaluation_file)
    assert is_there()
    for other in ({"layer": 1}, {"base_model": "owner/other"}, {"protocol": get_protocol("tiny-eval-v1")}):
        with pytest.raises(PublishError, match="not the evaluation set"):
            is_there(**other)  # type: ignore[arg-type]
    greedy = SMALL.changed(max_new_tokens=100)
    with pytest.raises(PublishError, match=r"protocol\.name"):
        is_there(greedy)


def test_a_push_of_the_evaluation_set_that_was_cut_off_is_finished(world: HubWorld, evaluation_file: Path) -> None:
    world.fail("tag", 403, times=9)
    with pytest.raises(NLAError):
        published(world, evaluation_file)
    assert "eval.parquet" in world.files(REPO, kind="dataset")
    assert not is_there()
    world.faults.clear()
    published(world, evaluation_file)
    assert is_there()


def test_a_data_set_of_others_is_no_evaluation_set(world: HubWorld) -> None:
    world.seed(REPO, {"train.parquet": b"x"}, kind="dataset")
    with pytest.raises(PublishError, match=r"has no eval\.parquet\.nla_meta\.yaml"):
        is_there()


# -- the command -------------------------------------------------------------------------------------------------


REFUSED: dict[str, tuple[tuple[str, ...], str | None, int, str]] = {
    "no licence": (("--yes",), TOKEN, 1, "Under which licence"),
    "no such licence": (("--yes", "--licence", "other"), TOKEN, 1, "no licence that the Hub knows"),
    "no name": (("--yes", "--licence", LICENCE, "--push-to", "rows"), TOKEN, 1, "name another: --push-to OWNER/NAME"),
    "no token": (("--yes", "--licence", LICENCE), None, 1, "token"),
    "a wrong token": (("--yes", "--licence", LICENCE), "hf_" + "n0b0dy" * 6, 1, "token"),
    "a token that only reads": (("--yes", "--licence", LICENCE), READER, 1, "This token may not write"),
    "of somebody else": (("--yes", "--licence", LICENCE, "--push-to", "other/rows"), TOKEN, 1, "may not write there"),
    "nobody to ask": (("--licence", LICENCE), TOKEN, 2, "add --yes"),
    "public and to be private": (
        ("--yes", "--licence", LICENCE, "--private", "--push-to", "owner/public"),
        TOKEN,
        1,
        "is there already, and public",
    ),
}


def explain(data: Path, out: Path, *options: str) -> Result:
    """`nla-hub explain --data` in this process; a later --push-to wins."""
    words = ["explain", "--data", str(data), "-o", str(out), "--push-to", REPO, "--temperature", "0", *options]
    return CliRunner().invoke(app, words)


@pytest.mark.parametrize("case", REFUSED)
def test_what_can_be_refused_is_refused_before_anything_is_computed(
    case: str, posts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options, token, code, message = REFUSED[case]
    with HubWorld(tmp_path / "hub") as world:
        world.seed("owner/public", {"README.md": b"hello"}, kind="dataset")
        connected(world, monkeypatch, tmp_path / "home", token=token)
        before = len(world.written())
        result = explain(posts, tmp_path / "out", *options)
        assert (result.exit_code, message in re.sub(r"[\s│]+", " ", result.output)) == (code, True), result.output
        assert not (tmp_path / "out").exists()
        assert len(world.written()) == before


@pytest.mark.parametrize("option", [("--licence", LICENCE), ("--private",), ("--push-to", REPO)])
def test_options_that_mean_nothing_alone(option: tuple[str, ...], tmp_path: Path) -> None:
    alone = CliRunner().invoke(app, ["explain", "a text", *option])
    assert alone.exit_code == 2
    assert "belongs to" in re.sub(r"[\s│]+", " ", alone.output)


def test_a_job_is_pushed_when_it_is_done(world: HubWorld, posts: Path, tmp_path: Path) -> None:
    """A refusal in the middle keeps the job; the same line only pushes; once more sends nothing."""
    out = tmp_path / "out"
    options = ("--yes", "--licence", LICENCE, "--private", "--limit", "9", "--batch-size", "4")
    world.fail("preupload", 403, times=9)
    cut = explain(posts, out, *options)
    assert cut.exit_code == 1, cut.output
    assert JobResult.open(out).manifest is not None
    assert f"nla-hub push {out} --repo {REPO} --licence {LICENCE} --private" in cut.output
    assert world.files(REPO, kind="dataset").keys() <= {"README.md"}
    world.faults.clear()
    parts = {path: path.stat().st_mtime_ns for path in (out / "parts").iterdir()}
    done = explain(posts, out, *options)
    assert done.exit_code == 4, done.output  # the line that is no JSON is a row in error, which is published too
    assert done.stdout.splitlines()[-1] == f"{world.url}/datasets/{REPO}"
    assert {path: path.stat().st_mtime_ns for path in (out / "parts").iterdir()} == parts
    assert world.private(REPO, kind="dataset")
    assert world.files(REPO, kind="dataset")["parts/part-000000.parquet"] == (out / "parts" / part_name(0)).read_bytes()
    errors = pq.read_table(out / "parts").column("error").drop_null()
    assert len(errors) == 1
    sent = len(world.written())
    again = explain(posts, out, *options, "--json")
    assert again.exit_code == 4
    figures, pushed = (json.loads(line) for line in again.stdout.splitlines())
    assert figures["counts"]["error"] == 1
    assert (pushed["event"], pushed["changed"], pushed["url"]) == ("pushed", False, f"{world.url}/datasets/{REPO}")
    assert len(world.written()) == sent


def test_shards_are_published_by_the_last_one(world: HubWorld, posts: Path, tmp_path: Path) -> None:
    options = ("--yes", "--licence", LICENCE, "--limit", "2", "--batch-size", "2", "--shard")
    first = explain(posts, tmp_path / "out", *options, "1/2")  # every second block, and there is but one
    assert "the shard that finishes last" in first.output
    assert not world.exists(REPO, kind="dataset")
    with pytest.raises(PublishError, match="not finished"):
        staged(tmp_path / "out")
    last = explain(posts, tmp_path / "out", *options, "2/2")
    assert last.exit_code == 0, last.output
    names = {"README.md", "job.yaml", "manifest.json", f"parts/{part_name(0)}"}
    assert set(world.files(REPO, kind="dataset")) == names
