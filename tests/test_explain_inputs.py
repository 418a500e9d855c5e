"""Data sets of a batch job: names, formats, rows that cannot be read, and the Hub through its real client."""

from __future__ import annotations

import csv
import errno
import gzip
import io
import json
import os
import struct
import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hub_server import REVISION, Faults, Hub
from hypothesis import example, given
from hypothesis import strategies as st
from safetensors.torch import save_file

from nla_hub import Site, yaml_io
from nla_hub.cli.explain import read_items
from nla_hub.errors import HubNotFoundError, HubUnreachableError, InputError, MissingExtraError, RunError, SidecarError
from nla_hub.explain.inputs import (
    BadItem,
    Dataset,
    RecordedSite,
    TextItem,
    VectorItem,
    open_dataset,
    streamed,
    texts,
)
from nla_hub.explain.inputs.files import MIB, LocalFile
from nla_hub.explain.inputs.naming import HubName, parse
from nla_hub.explain.inputs.tables import ParquetReader
from nla_hub.hub import HubOptions
from nla_hub.steering import SteeringVector
from nla_hub.training.data import TrainingRows, write_rows


def contents(dataset: Dataset, start: int = 0) -> list[Any]:
    """Texts and conversations as they are, vectors as lists, None for what could not be read."""
    found: list[Any] = []
    for item in dataset.items(start):
        if isinstance(item, TextItem):
            found.append(item.content)
        else:
            found.append(item.vector.tolist() if isinstance(item, VectorItem) else None)
    return found


def ids(dataset: Dataset) -> list[str | None]:
    return [item.doc_id for item in dataset.items()]


def errors(dataset: Dataset) -> list[str]:
    return [item.error for item in dataset.items() if isinstance(item, BadItem)]


def comparable(items: Sequence[Any]) -> list[tuple[Any, ...]]:
    return [
        (item.vector.tobytes(), item.doc_id, item.position, item.context, item.where)
        if isinstance(item, VectorItem)
        else (item,)
        for item in items
    ]


def starts_anywhere(dataset: Dataset) -> None:
    """Wherever one begins, the items are those of the whole."""
    whole = comparable(list(dataset.items()))
    for start in range(len(whole) + 2):
        assert comparable(list(dataset.items(start))) == whole[start:]
    assert dataset.total in (None, len(whole))
    assert dataset.fraction() == pytest.approx(1.0)


def write(path: Path, data: bytes | str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data if isinstance(data, bytes) else data.encode())
    return path


def lines(path: Path, *records: Any) -> Path:
    return write(path, "".join(json.dumps(record) + "\n" for record in records))


def arrow(path: Path, stream: bool, rows: int = 2**20, **columns: Any) -> Path:
    table = pa.table(columns)
    with (pa.ipc.new_stream if stream else pa.ipc.new_file)(path, table.schema) as writer:
        writer.write_table(table, rows)
    return path


def parquet(path: Path, rows: int = 2**20, **columns: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path, row_group_size=rows)
    return path


def vectors(values: Any, kind: pa.DataType | None = None) -> pa.Array:
    return pa.array(values, pa.list_(kind or pa.float32()))


# -- names ---------------------------------------------------------------------------------------------------


def test_a_directory_is_its_files_in_order_of_their_names(tmp_path: Path) -> None:
    lines(tmp_path / "b.jsonl", {"text": "2"})
    lines(tmp_path / "a.ndjson", {"text": "1"})
    write(tmp_path / "c.jsonl.gz", gzip.compress(b'{"text": "3"}\n'))
    for ignored in ("README.md", ".hidden.csv", "_SUCCESS.txt", "a.nla_meta.yaml", "folder/d.jsonl"):
        write(tmp_path / ignored, "x")
    dataset = open_dataset(f"{tmp_path}/")
    assert contents(dataset) == ["1", "2", "3"]
    assert [item.where for item in dataset.items()] == ["a.ndjson:1", "b.jsonl:1", "c.jsonl.gz:1"]
    starts_anywhere(dataset)


def test_patterns_match_files_and_not_links_that_run_in_circles(tmp_path: Path) -> None:
    for name in ("a/x.jsonl", "a/y.jsonl", "b/x.jsonl", "b/c/z.jsonl", ".h/x.jsonl", "a/.x.jsonl", "a/x.md"):
        lines(tmp_path / name, {"text": name})
    for loop in ("a/loop", "b/loop", "b/c/again"):
        (tmp_path / loop).symlink_to(tmp_path, target_is_directory=True)

    def found(pattern: str) -> list[Any]:
        return contents(open_dataset(f"{tmp_path}/{pattern}"))

    assert found("**/*.jsonl") == ["a/x.jsonl", "a/y.jsonl", "b/c/z.jsonl", "b/x.jsonl"]
    assert found("*/x.*") == ["a/x.jsonl", "b/x.jsonl"]
    assert found("[b]/**") == ["b/c/z.jsonl", "b/x.jsonl"]
    assert found("?/c/*.jsonl") == ["b/c/z.jsonl"]
    assert [item.where for item in open_dataset(f"{tmp_path}/b/**/*.jsonl").items()] == ["c/z.jsonl:1", "x.jsonl:1"]
    with pytest.raises(InputError, match="No data file matches"):
        found("*/nothing*")


def test_patterns_are_read_from_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines(tmp_path / "data/x.jsonl", {"text": "x"})
    monkeypatch.chdir(tmp_path)
    for name in ("data/*.jsonl", "./data/x.jsonl", "data/x.jsonl", "./data", "*/*.jsonl"):
        assert contents(open_dataset(name)) == ["x"]


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("", ["The name of a data set"]),
        ("-", ["cannot be read again", "write it to a file first"]),
        ("./posts.jsnl", ["no such file", "did you mean", "posts.jsonl"]),
        ("posts.jsonk", ["no name of a data set", "did you mean posts.jsonl"]),
        ("pots.jsonl", ["no such file", "did you mean posts.jsonl"]),
        ("posts", ["no name of a data set", "write ./posts"]),
        ("./notes.md", [".jsonl", ".parquet", ".zst"]),
        ("./empty", ["no data files", "its folders are not searched", "empty/**/*.parquet"]),
        ("./mixed", ["several formats", "1 of csv: b.csv", "1 of jsonl: a.jsonl"]),
        ("./pipe.jsonl", ["not a regular file"]),
        ("./dangling.jsonl", ["leads nowhere"]),
        ("./loop.jsonl", ["leads nowhere"]),
        ("/dev/zero", ["not a regular file"]),
        ("./nowhere/x.jsonl", ["no such file"]),
        ("hf://models/owner/name/x.jsonl", ["hf://datasets/owner/name/path"]),
        ("a/b/c", ["no name of a data set"]),
        ("./blank.jsonl", ["no rows"]),
        ("./nothing.parquet", ["no rows"]),
        ("./header.csv", ["no rows"]),
        ("./vectors.parquet.gz", [".parquet"]),
    ],
)
def test_names_that_lead_nowhere(name: str, words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    lines(tmp_path / "posts.jsonl", {"text": "x"})
    write(tmp_path / "notes.md", "x")
    lines(tmp_path / "mixed/a.jsonl", {"text": "x"})
    write(tmp_path / "mixed/b.csv", "text\nx\n")
    lines(tmp_path / "empty/folder/x.jsonl", {"text": "x"})
    (tmp_path / "posts").mkdir()
    os.mkfifo(tmp_path / "pipe.jsonl")
    (tmp_path / "dangling.jsonl").symlink_to("absent")
    (tmp_path / "loop.jsonl").symlink_to("loop.jsonl")
    write(tmp_path / "blank.jsonl", "\n \n")
    parquet(tmp_path / "nothing.parquet", text=pa.array([], pa.string()))
    write(tmp_path / "header.csv", "id,text\n")
    with pytest.raises(InputError) as caught:
        open_dataset(name)
    for word in words:
        assert word in str(caught.value)


def test_names_of_the_hub() -> None:
    def hub(name: str) -> Any:
        return parse(name, HubOptions())

    assert hub("owner/name") == HubName("owner/name", None, None)
    assert hub("owner/name@v1:train") == HubName("owner/name", "v1", "train")
    assert hub("owner/na.me:en/test") == HubName("owner/na.me", None, "en/test")


def test_options_that_do_not_fit(tmp_path: Path) -> None:
    text, array = write(tmp_path / "a.txt", "x"), tmp_path / "v.npy"
    np.save(array, np.ones((2, 3), np.float32))
    for path, options in ((text, {"column": "x"}), (text, {"split": "train"}), (array, {"column": "x"})):
        with pytest.raises(InputError, match=r"column|splits"):
            open_dataset(str(path), **options)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="id-column"):
        open_dataset(str(array), id_column="x")
    with pytest.raises(InputError, match="at least one row"):
        open_dataset(str(text), limit=0)


# -- texts ---------------------------------------------------------------------------------------------------


def test_a_text_file_is_one_document(tmp_path: Path) -> None:
    write(tmp_path / "b.txt", "\ufefftwo\nlines\r\n\n")
    write(tmp_path / "a.txt", b"bad \xff")
    write(tmp_path / "c.txt.gz", gzip.compress("drei ß".encode()))
    write(tmp_path / "d.txt", "")
    dataset = open_dataset(str(tmp_path))
    assert contents(dataset) == [None, "two\nlines", "drei ß", ""]
    assert ids(dataset) == ["a.txt", "b.txt", "c.txt.gz", "d.txt"]
    assert errors(dataset) == ["a.txt: This is not UTF-8 text (byte 4)."]
    assert dataset.total == 4
    starts_anywhere(dataset)


HUGE = "[" * 100_000
MESSAGES = [{"role": "user", "content": "hi"}]


def test_json_lines_good_and_bad(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(texts, "LONGEST_TEXT", 150_000)
    rows: list[tuple[str | bytes, Any]] = [
        ('{"text": "a", "id": 7}', "a"),
        ('{"messages": [{"role": "user", "content": "hi"}], "doc_id": "m"}', MESSAGES),
        ('{"messages": [{"from": "human", "value": "hi"}]}', MESSAGES),
        ('{"messages": "[{\\"role\\": \\"user\\", \\"content\\": \\"hi\\"}]"}', MESSAGES),
        ('{"text": ""}', ""),
        ('{"text": "\\u2028 \\r\\n \\u0000"}', "\u2028 \r\n \0"),
        ("\u2028{}", "This line is not JSON"),
        ("{bad", "This line is not JSON"),
        (HUGE, "This line is not JSON"),
        ('{"text": ' + "9" * 5000 + "}", "This line is not JSON"),
        ("7", "is a int, not an object"),
        (b'{"text": "\xff"}', "not UTF-8 text (byte 10)"),
        ('{"text": "' + "x" * 200_000 + '"}', "longer than"),
        ('{"text": null}', "'text' is null"),
        ('{"text": ["a"]}', "'text' holds list"),
        ('{"other": "a"}', "columns other"),
        ('{"text": "\\ud800"}', "lone surrogate"),
        ('{"messages": [{"role": "user", "content": 3}]}', "Only text contents"),
        ('{"messages": [{"from": "tool", "value": "x"}]}', "no role"),
        ('{"messages": []}', "no messages"),
        ('{"messages": "[" }', "conversation is not JSON"),
        ('{"text": "last", "id": "\\ud800"}', "last"),
    ]
    data = b"\xef\xbb\xbf" + b"\r\n\n".join(r.encode() if isinstance(r, str) else r for r, _ in rows)
    dataset = open_dataset(str(write(tmp_path / "a.jsonl", data)))
    for number, (item, (_, wanted)) in enumerate(zip(dataset.items(), rows, strict=True)):
        assert item.where == f"a.jsonl:{2 * number + 1}"
        if isinstance(item, BadItem):
            assert item.error.startswith(f"a.jsonl:{2 * number + 1}")
            assert wanted in item.error
            assert "\n" not in item.error
        else:
            assert isinstance(item, TextItem)
            assert item.content == wanted
    assert [i for i in ids(dataset) if i] == ["7", "m", "\\ud800"]
    starts_anywhere(dataset)


def test_a_file_of_other_things_is_refused_at_once(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", b"\x80\x81\n" * 100)
    with pytest.raises(InputError, match="None of the first 100 lines"):
        open_dataset(str(path))
    few = open_dataset(str(write(tmp_path / "b.jsonl", b"\x80\x81\n" * 99)))
    assert len(errors(few)) == 99


@pytest.mark.parametrize("ending", ["jsonl", "json", "csv", "tsv", "parquet"])
def test_columns_are_chosen_once(ending: str, tmp_path: Path) -> None:
    records = [{"body": f"body {i}", "key": f"k{i}", "id": f"i{i}"} for i in range(3)]
    path = str(as_file(tmp_path / f"a.{ending}", records))
    with pytest.raises(InputError, match=r'no column "text" or "messages" \(got columns body, key, id') as caught:
        open_dataset(path)
    assert "--column NAME" in str(caught.value)
    with pytest.raises(InputError, match="no column 'bodi'") as caught:
        open_dataset(path, column="bodi")
    assert "such as --column body" in str(caught.value)
    with pytest.raises(InputError, match="no column 'x'"):
        open_dataset(path, column="body", id_column="x")
    with pytest.raises(InputError, match="not both"):
        open_dataset(path, column="body", messages_column="body")
    dataset = open_dataset(path, column="body")
    assert contents(dataset) == ["body 0", "body 1", "body 2"]
    assert ids(dataset) == ["i0", "i1", "i2"]
    assert ids(open_dataset(path, column="body", id_column="key")) == ["k0", "k1", "k2"]
    assert contents(open_dataset(path, column="body", limit=2)) == ["body 0", "body 1"]
    assert contents(open_dataset(path, column="body", limit=2), 1) == ["body 1"]


def as_file(path: Path, records: list[dict[str, Any]]) -> Path:
    """Records of texts in the format that the ending says, written by the format's own library."""
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(records), path, row_group_size=2)
    elif path.suffix in (".csv", ".tsv"):
        with path.open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, list(records[0]), delimiter="\t" if path.suffix == ".tsv" else ",")
            writer.writeheader()
            writer.writerows(records)
    elif path.suffix == ".json":
        path.write_text(json.dumps(records), "utf-8")
    else:
        lines(path, *records)
    return path


anything = st.text(st.characters(exclude_categories=["Cs"]), max_size=30)


@given(pairs=st.lists(st.tuples(anything, anything), min_size=1, max_size=5))
@example(pairs=[("\r", "\n"), ('"', ""), ("", ","), ("\0", "\ufeff"), ("\x85\u2028\x1c", " ")])
@example(pairs=[("\ufeff", "")])
@pytest.mark.parametrize("ending", ["jsonl", "json", "csv", "tsv", "parquet"])
def test_whatever_is_written_is_read_back(
    ending: str, pairs: list[tuple[str, str]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("trip")
    path = as_file(folder / f"a.{ending}", [{"text": text, "doc_id": id_} for text, id_ in pairs])
    dataset = open_dataset(str(path))
    assert contents(dataset) == [text for text, _ in pairs]
    assert ids(dataset) == [id_ or None for _, id_ in pairs]


@pytest.mark.parametrize(
    ("value", "wanted"),
    [
        ("a", "a"),
        ("", None),
        (7, "7"),
        (0, "0"),
        (3.0, "3"),
        (3.5, None),
        (float("nan"), None),
        (True, None),
        (None, None),
    ],
)
def test_ids_are_texts_or_whole_numbers(value: Any, wanted: str | None, tmp_path: Path) -> None:
    assert ids(open_dataset(str(lines(tmp_path / "a.jsonl", {"text": "x", "id": value})))) == [wanted]
    assert ids(open_dataset(str(parquet(tmp_path / "a.parquet", text=["x"], id=pa.array([value]))))) == [wanted]


def test_csv_rows_that_do_not_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(texts, "LONGEST_FIELD", 300_000)
    before = csv.field_size_limit()
    wide = "y" * 200_000
    data = f'text,id\n"a\r\nb",1\n\nc\nd,2,3\n"e"f,4\n{wide},5\n'.encode() + b'\xff,6\ng,\xff\nh,8\n"open, 9\nz,10\n'
    dataset = open_dataset(str(write(tmp_path / "a.csv", b"\xef\xbb\xbf" + data)))
    assert contents(dataset) == ["a\r\nb", None, None, None, wide, None, None, "h", None]
    places = [item.where for item in dataset.items()]
    assert places == [f"a.csv:{n}" for n in (2, 5, 6, 7, 8, 9, 10, 11, 12)]
    for error, words in zip(
        errors(dataset),
        [
            "has 1 fields",
            "has 3 fields",
            "not CSV",
            "'text' is not UTF-8",
            "'id' is not UTF-8",
            "unexpected end of data",
        ],
        strict=True,
    ):
        assert words in error
    starts_anywhere(dataset)
    unclosed = open_dataset(str(write(tmp_path / "b.csv", f'text\na\n"{wide}\n{wide}\nb\n')))
    assert contents(unclosed) == ["a", None]
    assert "never closed" in errors(unclosed)[0]
    starts_anywhere(unclosed)
    assert csv.field_size_limit() == before


@pytest.mark.parametrize(
    ("name", "header", "sign", "advice"),
    [
        ("a.csv", "id;text", "';'", "save it with commas"),
        ("a.csv", '"id";"text";"other, one"', "';'", "save it with commas"),
        ("a.csv", "id|text", "'|'", "with tabs as .tsv"),
        ("a.csv", "id\ttext", r"'\t'", "rename it to .tsv"),
        ("a.tsv", "id,text", "','", "rename it to .csv"),
    ],
)
def test_a_table_with_another_delimiter(name: str, header: str, sign: str, advice: str, tmp_path: Path) -> None:
    path = str(write(tmp_path / name, f"\ufeff{header}\r\n1;x\r\n"))
    for column in (None, "text"):
        with pytest.raises(InputError) as caught:
            open_dataset(path, column=column)
        assert f"seem to be divided by {sign}" in str(caught.value)
        assert advice in str(caught.value)
        assert "--column" not in str(caught.value)


def test_a_single_column_is_no_other_delimiter(tmp_path: Path) -> None:
    assert contents(open_dataset(str(write(tmp_path / "a.csv", "a;b\nx;y\n")), column="a;b")) == ["x;y"]
    assert contents(open_dataset(str(write(tmp_path / "b.csv", "text\nx;y\n")))) == ["x;y"]
    with pytest.raises(InputError, match="no column"):
        open_dataset(str(write(tmp_path / "c.csv", "body\nx;y\n")))


@pytest.mark.parametrize("data", ["text,text\na,b\n", 'text,id,"id"\na,b,c\n'])
def test_a_column_that_is_there_twice(data: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is there twice"):
        open_dataset(str(write(tmp_path / "a.csv", data)))
    assert contents(open_dataset(str(write(tmp_path / "b.csv", "text,x,x\na,b,c\n")))) == ["a"]


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b'{"text": "a"}\n{"text": "b"}\n', "called .jsonl"),
        (b'{"data": [{"text": "a"}]}', "is a dict, not a list"),
        (b"[1", "This is not JSON"),
        (b"[" * 100_000, "This is not JSON"),
        (b'["\xff"]', "not UTF-8"),
        (b'[{"text": "' + b"x" * 2000 + b'"}]', "jq -c"),
    ],
)
def test_a_json_file_is_a_list_and_not_too_large(
    data: bytes, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(texts, "LARGEST_JSON", 200_000 if data[:2] == b"[[" else 1500)
    with pytest.raises(InputError, match=words):
        open_dataset(str(write(tmp_path / "a.json", data)))
    mixed = open_dataset(str(write(tmp_path / "b.json", '[{"text": "a"}, 7, {"text": null}, {"text": "b"}]')))
    assert contents(mixed) == ["a", None, None, "b"]
    starts_anywhere(mixed)


# -- files that break ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("ending", ["gz", "zst"])
def test_compressed_lines_and_damaged_ones(ending: str, tmp_path: Path) -> None:
    plain = b"".join(b'{"text": "%d %s"}\n' % (i, os.urandom(2000).hex().encode()) for i in range(200))
    data = gzip.compress(plain) if ending == "gz" else pa.Codec("zstd").compress(plain, asbytes=True)
    whole = write(tmp_path / f"a.jsonl.{ending}", data)
    write(tmp_path / f"b.jsonl.{ending}", data[: len(data) // 2])
    write(tmp_path / f"c.jsonl.{ending}", b"not compressed")
    write(tmp_path / f"d.jsonl.{ending}", data)
    assert len(contents(open_dataset(str(whole)))) == 200
    assert contents(open_dataset(str(tmp_path / f"b.jsonl.{ending}")))[-1] is None
    dataset = open_dataset(str(tmp_path))
    found = contents(dataset)
    assert found[:200] == found[-200:]
    assert None not in found[:200]
    broken = [i for i, content in enumerate(found) if content is None]
    assert broken[-1] == len(found) - 201
    assert [error.split(":")[0] for error in errors(dataset)][-1] == f"c.jsonl.{ending}"
    whole_items = comparable(list(dataset.items()))
    for start in (100, broken[0], broken[0] + 1, broken[-1], len(found) - 1, len(found)):
        assert comparable(list(dataset.items(start))) == whole_items[start:]


def test_a_file_that_vanishes_is_one_bad_item(tmp_path: Path) -> None:
    for name in "abc":
        lines(tmp_path / f"{name}.jsonl", {"text": name})
    os.mkfifo(tmp_path / "d.jsonl")
    dataset = open_dataset(str(tmp_path))
    before = dataset.describe()
    (tmp_path / "b.jsonl").unlink()
    assert contents(dataset) == ["a", None, "c", None]
    assert errors(dataset) == [
        "b.jsonl: This file is no longer there.",
        "d.jsonl: This is not a regular file.",
    ]
    starts_anywhere(dataset)
    assert dataset.describe() != before


class Failing(io.FileIO):
    """A file of which the byte behind the first third fails to be read, as often as `times` says."""

    def __init__(self, path: Path, error: Exception, times: list[int]) -> None:
        super().__init__(path)
        self.third = path.stat().st_size // 3
        self.error = error
        self.times = times

    def readinto(self, buffer: Any, /) -> int:
        if self.times[0] and self.tell() <= self.third < self.tell() + len(buffer):
            self.times[0] -= 1
            raise self.error
        return super().readinto(buffer)

    def readall(self) -> bytes:
        data = bytearray(2**24)
        return bytes(data[: self.readinto(data)])


def failing(monkeypatch: pytest.MonkeyPatch, name: str, error: Exception, times: list[int], buffer: int = 4096) -> None:
    """From now on, files of this name fail behind their first third, `times[0]` times in all."""
    real = LocalFile.open

    def fails(self: LocalFile) -> Any:
        if self.path.name == name:
            return io.BufferedReader(Failing(self.path, error, times), buffer)
        return real(self)

    monkeypatch.setattr(LocalFile, "open", fails)


def large_file(path: Path) -> Path:
    """Sixty rows that no compression makes small, in the format that the ending says."""
    rng = np.random.default_rng(len(path.name))
    noise = [rng.bytes(1000).hex() for _ in range(60)]
    records: list[dict[str, Any]] = [{"text": text} for text in noise]
    plain = "".join(json.dumps(record) + "\n" for record in records).encode()
    if path.suffix == ".gz":
        return write(path, gzip.compress(plain))
    if path.suffix == ".zst":
        return write(path, pa.Codec("zstd").compress(plain, asbytes=True))
    if path.suffix == ".txt":
        return write(path, noise[0] * 20)
    if path.suffix in (".arrow", ".feather"):
        return arrow(path, path.suffix == ".feather", 10, text=noise)
    values = rng.standard_normal((60, 500)).astype(np.float32)
    if path.suffix == ".npy":
        np.save(path, values)
        return path
    if path.suffix == ".safetensors":
        save_file({"x": torch.from_numpy(values)}, path)
        return path
    return parquet(path, 20, text=noise) if path.suffix == ".parquet" else as_file(path, records)


ENDINGS = ["txt", "jsonl", "jsonl.gz", "jsonl.zst", "json", "csv", "parquet", "arrow", "feather", "npy", "safetensors"]


@pytest.mark.parametrize("ending", ENDINGS)
def test_a_disk_that_fails_costs_no_row_and_shifts_none(
    ending: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nla_hub.explain.inputs.arrays.CHUNK", 2**14)
    monkeypatch.setattr("nla_hub.explain.inputs.tables.PAGE_BUFFER", 2**13)
    for name in "abc":
        large_file(tmp_path / f"{name}.{ending}")
    whole = comparable(list(open_dataset(str(tmp_path)).items()))
    assert not errors(open_dataset(str(tmp_path)))
    dataset = open_dataset(str(tmp_path))
    error = OSError(errno.EIO, os.strerror(errno.EIO))
    failing(monkeypatch, f"b.{ending}", error, [1])
    found: list[Any] = []
    with pytest.raises(RunError, match=f"b.{ending}: Reading stopped: Input/output error") as caught:
        found.extend(dataset.items())
    assert "it goes on where it stopped" in str(caught.value)
    assert comparable(found) == whole[: len(found)]
    assert len(found) >= len(whole) // 3
    assert comparable(list(open_dataset(str(tmp_path)).items(len(found)))) == whole[len(found) :]


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (OSError(errno.ESTALE, "Stale file handle"), "Reading stopped: Stale file handle"),
        (PermissionError(errno.EACCES, "Permission denied"), "Reading stopped: Permission denied"),
        (TimeoutError("timed out"), "Reading stopped: timed out"),
        (MemoryError(), "not enough memory"),
    ],
)
def test_what_ends_the_reading_of_a_file(
    error: Exception, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for ending in ("jsonl", "parquet", "npy", "json"):
        path = large_file(tmp_path / f"a.{ending}")
        dataset = open_dataset(str(path))
        with monkeypatch.context() as patch:
            failing(patch, path.name, error, [10**6])
            for act in (lambda d=dataset: list(d.items()), dataset.describe):
                with pytest.raises(RunError, match=words):
                    act()
    for ending in ("jsonl", "json"):
        path = large_file(tmp_path / f"only.{ending}")
        failing(monkeypatch, path.name, error, [10**6])
        with pytest.raises(RunError, match=words):
            open_dataset(str(path))


def test_a_disk_that_fails_while_a_file_is_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in "ab":
        np.save(tmp_path / f"{name}.npy", np.ones((2, 3), np.float32))
    dataset = open_dataset(str(tmp_path))
    with monkeypatch.context() as patch:  # in the header
        failing(patch, "b.npy", OSError(errno.EIO, "Input/output error"), [10**6], 8)
        with pytest.raises(RunError, match=r"b\.npy: Reading stopped: Input/output error"):
            list(dataset.items())
    real = os.open

    def refuse(path: Any, *rest: Any) -> int:
        if Path(path).name == "b.npy":
            raise OSError(errno.EMFILE, "Too many open files")
        return real(path, *rest)

    monkeypatch.setattr("nla_hub.explain.inputs.files.os.open", refuse)
    with pytest.raises(RunError, match=r"b\.npy: Reading stopped: Too many open files"):
        list(dataset.items())


def test_a_damaged_length_is_no_lack_of_memory(tmp_path: Path) -> None:
    path = arrow(tmp_path / "a.arrow", True, 3, text=[f"t{i}" for i in range(9)])
    data = path.read_bytes()
    broken = 0
    for i in range(0, len(data) - 8, 8):
        path.write_bytes(data[:i] + struct.pack("<q", 2**61) + data[i + 8 :])
        with suppress(InputError):
            broken += None in contents(open_dataset(str(path)))
    assert broken


def test_a_file_that_vanishes_behind_its_beginning_shifts_nothing(tmp_path: Path) -> None:
    for name in "abc":
        lines(tmp_path / f"{name}.jsonl", *({"text": f"{name}{i}"} for i in range(4)))
    dataset = open_dataset(str(tmp_path))
    dataset.describe()
    (tmp_path / "b.jsonl").rename(tmp_path / "b.away")
    for start in (5, 8, 11):
        with pytest.raises(RunError, match=r"b.jsonl: Rows of this file may be done.*no longer there") as caught:
            contents(dataset, start)
        assert "put it back" in str(caught.value)
    (tmp_path / "b.away").rename(tmp_path / "b.jsonl")
    assert contents(dataset, 5)[0] == "b1"
    (tmp_path / "b.jsonl").unlink()
    assert contents(dataset, 4) == [None, "c0", "c1", "c2", "c3"]
    lines(tmp_path / "b.jsonl", {"text": "back"}, {"text": "again"})
    assert contents(dataset, 4) == [None, "c0", "c1", "c2", "c3"]


def test_a_file_that_was_never_there_stays_one_bad_item(tmp_path: Path) -> None:
    lines(tmp_path / "a.jsonl", {"text": "a"})
    (tmp_path / "b.jsonl").symlink_to("absent")
    lines(tmp_path / "c.jsonl", {"text": "c"})
    for start in range(4):
        resumed = open_dataset(str(tmp_path))
        assert resumed.describe()["files"][1] == {"name": "b.jsonl", "size": None, "sha256": None}
        assert contents(resumed, start) == ["a", None, "c"][start:]


def test_a_folder_that_fails_is_not_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in "ab":
        lines(tmp_path / name / "x.jsonl", {"text": name})
    real = os.scandir

    def scan(path: Any) -> Any:
        if Path(path).name == "b":
            raise error
        return real(path)

    monkeypatch.setattr("nla_hub.explain.inputs.naming.os.scandir", scan)
    error = PermissionError(errno.EACCES, "Permission denied")
    assert contents(open_dataset(f"{tmp_path}/**/*.jsonl")) == ["a"]
    error = OSError(errno.EIO, "Input/output error")  # type: ignore[assignment]
    with pytest.raises(RunError, match="Reading stopped"):
        open_dataset(f"{tmp_path}/**/*.jsonl")


@pytest.mark.skipif(os.geteuid() == 0, reason="nothing is unreadable for root")
def test_a_file_that_may_not_be_read(tmp_path: Path) -> None:
    lines(tmp_path / "a.jsonl", {"text": "a"}).chmod(0)
    lines(tmp_path / "b.jsonl", {"text": "b"})
    assert contents(open_dataset(str(tmp_path))) == [None, "b"]
    with pytest.raises(InputError, match="Permission denied"):
        open_dataset(str(tmp_path / "a.jsonl"))


def damaged_group(path: Path, group: int) -> None:
    """Turn all bits of a row group's pages of the column `text`."""
    meta = pq.read_metadata(path)
    column = next(c for c in map(meta.row_group(group).column, range(meta.num_columns)) if c.path_in_schema == "text")
    data = bytearray(path.read_bytes())
    start = column.dictionary_page_offset or column.data_page_offset
    for i in range(start, start + column.total_compressed_size):
        data[i] ^= 255
    path.write_bytes(data)


def test_a_damaged_row_group_costs_its_own_rows(tmp_path: Path) -> None:
    path = parquet(tmp_path / "a.parquet", 4, text=[f"t{i}" for i in range(10)], id=list(range(10)))
    damaged_group(path, 1)
    write(tmp_path / "b.parquet", b"PAR1 this is none PAR1")
    parquet(tmp_path / "c.parquet", text=["c"])
    parquet(tmp_path / "d.parquet", other=["c"])
    dataset = open_dataset(str(tmp_path))
    assert contents(dataset) == ["t0", "t1", "t2", "t3", None, None, None, None, "t8", "t9", None, "c", None]
    assert [item.where for item in dataset.items()][4:6] == ["a.parquet:5", "a.parquet:6"]
    assert "no column 'text'" in errors(dataset)[-1]
    whole = comparable(list(dataset.items()))
    for start in range(len(whole) + 1):
        assert comparable(list(dataset.items(start))) == whole[start:]


def test_whole_row_groups_are_skipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[int] = []
    read_group = ParquetReader._group

    def noted(self: Any, table: Any, group: int, *rest: Any) -> Any:
        read.append(group)
        return read_group(self, table, group, *rest)

    dataset = open_dataset(str(parquet(tmp_path / "a.parquet", 4, text=[f"t{i}" for i in range(12)])))
    monkeypatch.setattr(ParquetReader, "_group", noted)
    assert contents(dataset, 8) == ["t8", "t9", "t10", "t11"]
    assert read == [2]


# -- parquet -------------------------------------------------------------------------------------------------


def test_parquet_texts_and_conversations(tmp_path: Path) -> None:
    kinds = [pa.string(), pa.large_string(), pa.dictionary(pa.int32(), pa.string()), pa.string_view(), pa.binary()]
    for i, kind in enumerate(kinds):
        value = pa.array(["a", "", None, "ß"], pa.string())
        column = value.cast(kind) if not pa.types.is_dictionary(kind) else value.dictionary_encode()
        dataset = open_dataset(str(parquet(tmp_path / f"{i}.parquet", 3, id=[1, 2, 3, None], text=column)))
        assert contents(dataset) == ["a", "", None, "ß"]
        assert ids(dataset) == ["1", "2", "3", None]
        starts_anywhere(dataset)
    talk = [MESSAGES, [{"role": "user", "content": "x", "name": "n"}], None, []]
    dataset = open_dataset(str(parquet(tmp_path / "m.parquet", messages=pa.array(talk))))
    assert contents(dataset) == [MESSAGES, talk[1], None, None]
    shared = pa.array([[{"from": "human", "value": "hi"}]])
    path = parquet(tmp_path / "s.parquet", conversations=shared, text=["x"])
    assert contents(open_dataset(str(path), messages_column="conversations")) == [MESSAGES]


@pytest.mark.parametrize("stream", [True, False])
def test_arrow_files(stream: bool, tmp_path: Path) -> None:
    path = arrow(tmp_path / "a.arrow", stream, 3, id=list(range(10)), text=[f"t{i}" for i in range(10)])
    dataset = open_dataset(str(path))
    assert contents(dataset) == [f"t{i}" for i in range(10)]
    assert ids(dataset)[:3] == ["0", "1", "2"]
    starts_anywhere(dataset)
    path = arrow(tmp_path / "v.feather", stream, activation_vector=vectors([[1, 2], [3, 4]]))
    assert contents(open_dataset(str(path))) == [[1, 2], [3, 4]]
    write(tmp_path / "b.arrow", path.read_bytes()[:300])
    arrow(tmp_path / "c.arrow", stream, text=["c"])
    dataset = open_dataset(f"{tmp_path}/*.arrow")
    assert contents(dataset) == [*(f"t{i}" for i in range(10)), None, "c"]
    starts_anywhere(dataset)


def test_parquet_text_that_is_not_utf8(tmp_path: Path) -> None:
    raw = pa.array([b"a", b"\xff", b"c"], pa.binary())
    column = pa.StringArray.from_buffers(3, raw.buffers()[1], raw.buffers()[2])
    dataset = open_dataset(str(parquet(tmp_path / "a.parquet", text=column)))
    assert contents(dataset) == ["a", None, "c"]
    assert "not UTF-8" in errors(dataset)[0]


@pytest.mark.parametrize(
    ("column", "options"),
    [
        (pa.array([1, 2]), {}),
        (pa.array([{"a": "b"}, None]), {"column": "text"}),
        (pa.array([["a"], ["b"]]), {}),
        (vectors([[1, 2], [3, 4]], pa.int64()), {"column": "text"}),
        (pa.array(["a", "b"]), {"messages_column": "other"}),
    ],
)
def test_parquet_columns_of_other_types_are_refused(column: Any, options: dict[str, str], tmp_path: Path) -> None:
    path = parquet(tmp_path / "a.parquet", text=column, other=[1, 2])
    with pytest.raises(InputError, match=r"holds neither|holds no conversations"):
        open_dataset(str(path), **options)  # type: ignore[arg-type]


# -- vectors -------------------------------------------------------------------------------------------------


def test_activations_as_training_writes_them(tmp_path: Path) -> None:
    rows = TrainingRows(
        torch.randn(5, 8, generator=torch.Generator().manual_seed(0)),
        ("",) * 5,
        ("a", "a", "b", "b", "c"),
        (0, 3, 1, 2, 9),
        tuple("abcde"),
        Site(3),
    )
    path = tmp_path / "train.parquet"
    write_rows(path, rows, meta={"extraction": {"layer_index": 3, "base_model": "owner/base"}})
    dataset = open_dataset(str(path))
    assert (dataset.kind, dataset.width, dataset.total) == ("vectors", 8, 5)
    assert dataset.site == RecordedSite("owner/base", 3)
    found = [item for item in dataset.items() if isinstance(item, VectorItem)]
    assert np.array_equal(np.stack([item.vector for item in found]), rows.vectors.numpy())
    assert [(item.doc_id, item.position, item.context) for item in found] == list(
        zip(rows.doc_ids, rows.positions, rows.prefixes, strict=True)
    )
    starts_anywhere(dataset)
    as_texts = open_dataset(str(path), column="detokenized_text_truncated")
    assert (as_texts.kind, as_texts.width, contents(as_texts)) == ("text", None, list("abcde"))


def test_vectors_that_are_none_and_vectors_of_elsewhere(tmp_path: Path) -> None:
    column = vectors([[1, 2], None, [1, 2, 3], [float("nan"), 0], [0, 0], [None, 1], [5, 6]], pa.float64())
    layer = pa.array([4, 4, 4, 4, 4, 4, 5])
    dataset = open_dataset(str(parquet(tmp_path / "a.parquet", activation_vector=column, activation_layer=layer)))
    found = contents(dataset)
    assert [found[i] for i in (0, 1, 2, 4, 6)] == [[1, 2], None, None, [0, 0], None]
    assert np.isnan(found[3][0]) and np.isnan(found[5][0])
    for error, words in zip(errors(dataset), ["holds no vector", "3 numbers", "of layer 5"], strict=True):
        assert words in error
    assert dataset.site == RecordedSite(None, 4)


@pytest.mark.parametrize("kind", [pa.float16(), pa.float32(), pa.float64()])
def test_any_list_of_floats_is_a_vector(kind: pa.DataType, tmp_path: Path) -> None:
    values = [[1.5, -2.0], [0.25, 3.0], [8.0, 9.0]]
    for shape in (pa.list_(kind), pa.large_list(kind), pa.list_(kind, 2)):
        column = pa.array([[np.float16(x) if kind == pa.float16() else x for x in row] for row in values], shape)
        dataset = open_dataset(str(parquet(tmp_path / "a.parquet", 2, x=column)), column="x")
        assert contents(dataset) == values
        starts_anywhere(dataset)


def test_sites_that_disagree_and_sidecars_that_cannot_be_read(tmp_path: Path) -> None:
    for name, layer in (("a", 3), ("b", 4)):
        parquet(tmp_path / f"{name}.parquet", activation_vector=vectors([[1, 2]]))
        sidecar = tmp_path / f"{name}.parquet.nla_meta.yaml"
        yaml_io.write_text(sidecar, yaml_io.dumps({"extraction": {"layer_index": layer}}))
    assert open_dataset(str(tmp_path / "a.parquet")).site == RecordedSite(None, 3)
    with pytest.raises(InputError, match="different sites"):
        open_dataset(str(tmp_path))
    write(tmp_path / "b.parquet.nla_meta.yaml", "!!python/object/apply:os.system [true]")
    with pytest.raises(SidecarError, match=r"b\.parquet\.nla_meta.yaml"):
        open_dataset(str(tmp_path))


@pytest.mark.parametrize("dtype", ["<f2", "<f4", ">f4", "<f8"])
@pytest.mark.parametrize("shape", [(3,), (5, 3), (2, 2, 3)])
def test_numpy_files(dtype: str, shape: tuple[int, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nla_hub.explain.inputs.arrays.CHUNK", 30)
    values = np.arange(np.prod(shape)).reshape(shape).astype(dtype)
    np.save(tmp_path / "v.npy", values)
    dataset = open_dataset(str(tmp_path / "v.npy"))
    assert contents(dataset) == values.reshape(-1, 3).tolist()
    assert (dataset.kind, dataset.width, dataset.site) == ("vectors", 3, None)
    assert all(item.vector.dtype == np.float32 for item in dataset.items() if isinstance(item, VectorItem))
    starts_anywhere(dataset)
    if values.ndim == 2:  # an SAE's decoder, transposed
        np.save(tmp_path / "t.npy", values.T)
        dataset = open_dataset(str(tmp_path / "t.npy"))
        assert contents(dataset) == values.T.tolist()
        starts_anywhere(dataset)


class Trap:
    """Pickled, it makes a file where it is loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


def npy(header: str, data: bytes = b"", version: bytes = b"\1\0") -> bytes:
    return b"\x93NUMPY" + version + struct.pack("<H", len(header)) + header.encode() + data


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (npy("{'descr': '<f4', 'fortran_order': False, 'shape': (3, 2)}\n", b"x" * 23), "too short"),
        (npy("{'descr': '<f4', 'fortran_order': False, 'shape': (-3, 2)}\n", b"x" * 24), "shape is"),
        (npy("{'descr': '<f4', 'fortran_order': False, 'shape': (9999999999, 9999999999)}\n"), "too short"),
        (npy("{'descr': '<f4', 'fortran_order': False, 'shape': ()}\n", b"x" * 4), "holds no vectors"),
        (npy("{'descr': '<f4', 'fortran_order': False, 'shape': (4, 0)}\n"), "holds no vectors"),
        (npy("{'descr': '<i8', 'fortran_order': False, 'shape': (1, 1)}\n", b"x" * 8), "floating point"),
        (npy("{'descr': [('a', '<f4')], 'fortran_order': False, 'shape': (1, 1)}\n", b"x" * 4), "floating point"),
        (npy("{'descr': '<f4', 'fortran_order': False, 'shape': (1, 1)}\n", b"x" * 4, b"\3\0"), "version 3"),
        (npy("__import__('os')\n"), "cannot be read"),
        (npy("(" * 60_000), "cannot be read"),
        (b"\x93NUMPY", "cannot be read"),
        (b"text", "cannot be read"),
    ],
)
def test_numpy_files_that_hold_no_vectors(data: bytes, words: str, tmp_path: Path) -> None:
    path = write(tmp_path / "v.npy", data)
    with pytest.raises(InputError, match=words):
        open_dataset(str(path))


def test_nothing_is_unpickled(tmp_path: Path) -> None:
    np.save(tmp_path / "v.npy", np.array([Trap(tmp_path / "sprung")], dtype=object), allow_pickle=True)
    with pytest.raises(InputError, match=r"pickled Python objects[\s\S]*Next: save it as numbers: np\.save"):
        open_dataset(str(tmp_path / "v.npy"))
    assert not (tmp_path / "sprung").exists()


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64, torch.bfloat16])
def test_safetensors_files(dtype: torch.dtype, tmp_path: Path) -> None:
    values = torch.randn(4, 3, generator=torch.Generator().manual_seed(1)).to(dtype)
    save_file({"w": values, "ids": torch.arange(4)}, tmp_path / "one.safetensors")
    dataset = open_dataset(str(tmp_path / "one.safetensors"))
    assert contents(dataset) == values.float().tolist()
    starts_anywhere(dataset)
    save_file({"W_dec": values, "b": values[0].clone()}, tmp_path / "two.safetensors")
    path = str(tmp_path / "two.safetensors")
    assert contents(open_dataset(path, column="W_dec")) == values.float().tolist()
    assert contents(open_dataset(path, column="b")) == [values[0].float().tolist()]
    with pytest.raises(InputError, match=r"--column; .*W_dec \[4, 3\], b \[3\]"):
        open_dataset(path)
    with pytest.raises(InputError, match=r"no tensor 'x'.*W_dec"):
        open_dataset(path, column="x")


def safetensors(header: bytes, data: bytes = b"", length: int | None = None) -> bytes:
    return struct.pack("<Q", len(header) if length is None else length) + header + data


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"<html>log in here</html>",
        safetensors(b"{}", length=2**62),
        safetensors(b"[1, 2]"),
        safetensors(b"[" * 100_000),
        safetensors(b'{"w": {"dtype": "F32", "shape": [-1, 4], "data_offsets": [0, 4]}}', bytes(4)),
        safetensors(b'{"w": {"dtype": "F32", "shape": [1, 4], "data_offsets": [0, 4]}}', bytes(4)),
        safetensors(b'{"w": {"dtype": "F32", "shape": [1, 4], "data_offsets": [0, 16]}}', bytes(4)),
        safetensors(b'{"w": {"dtype": "F32", "shape": [1, 4], "data_offsets": [-16, 0]}}', bytes(16)),
        safetensors(b'{"w": {"dtype": "F32", "shape": [], "data_offsets": [0, 4]}}', bytes(4)),
        safetensors(b'{"w": {"dtype": "F32", "shape": 3}}', bytes(4)),
        safetensors(b'{"w": {"dtype": "I64", "shape": [1, 1], "data_offsets": [0, 8]}}', bytes(8)),
        safetensors(b'{"__metadata__": 3, "w": {"dtype": ["F32"], "shape": [1], "data_offsets": [0, 4]}}', bytes(4)),
    ],
)
def test_safetensors_files_that_hold_no_vectors(data: bytes, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"safetensors file|too short|holds no vectors|are: none"):
        open_dataset(str(write(tmp_path / "v.safetensors", data)))


def test_steering_vectors_know_their_site(tmp_path: Path) -> None:
    for i in range(3):
        SteeringVector(torch.full((4,), i + 1.0), Site(2), "owner/base").save(tmp_path / f"{i}.safetensors")
    dataset = open_dataset(str(tmp_path))
    assert dataset.site == RecordedSite("owner/base", 2)
    assert contents(dataset) == [[1.0] * 4, [2.0] * 4, [3.0] * 4]
    SteeringVector(torch.ones(4), Site(5), "owner/base").save(tmp_path / "3.safetensors")
    with pytest.raises(InputError, match="different sites"):
        open_dataset(str(tmp_path))


def test_a_vector_file_of_another_width_is_one_bad_item(tmp_path: Path) -> None:
    for name, shape in (("a", (2, 3)), ("b", (9, 4)), ("c", (1, 3))):
        np.save(tmp_path / f"{name}.npy", np.ones(shape, np.float32))
    dataset = open_dataset(str(tmp_path))
    assert [content is None for content in contents(dataset)] == [False, False, True, False]
    assert "have 4 numbers, the data set's have 3" in errors(dataset)[0]
    whole = comparable(list(dataset.items()))
    assert all(comparable(list(dataset.items(start))) == whole[start:] for start in range(5))


# -- what a job notes ----------------------------------------------------------------------------------------


def test_data_are_the_same_wherever_they_lie_and_others_where_a_byte_differs(tmp_path: Path) -> None:
    def described(folder: str, data: bytes) -> dict[str, Any]:
        path = write(tmp_path / folder / "a.jsonl", data)
        os.utime(path, (len(folder), len(folder)))
        return open_dataset(str(path.parent)).describe()

    long = b'{"text": "%s"}\n' % (b"x" * (3 * 2**20))
    assert described("one", long) == described("other", long)
    for changed in (b"[" + long[1:], long[:-2] + b"\n\n", long + b"\n"):
        assert described("one", changed) != described("other", long)


def test_vectors_of_whole_numbers_come_with_a_next_step(tmp_path: Path) -> None:
    np.save(tmp_path / "v.npy", np.ones((2, 3), np.int64))
    with pytest.raises(InputError, match=r"values are int64[\s\S]*Next: .*token ids.*astype\(np\.float32\)"):
        open_dataset(str(tmp_path / "v.npy"))


def test_an_edit_in_the_middle_of_a_large_file_is_seen(tmp_path: Path) -> None:
    data = bytearray(b'{"text": "x"}\n' * (6 * MIB // 14))
    path = write(tmp_path / "a.jsonl", bytes(data))
    dataset = open_dataset(str(path))
    before = dataset.describe()
    middle = len(data) - 2 * MIB
    for i in range(16):
        changed = bytearray(data)
        changed[MIB + i * middle // 16 + 1000] ^= 1
        path.write_bytes(changed)
        assert dataset.describe() != before
    path.write_bytes(data)
    assert dataset.describe() == before


def test_what_is_noted_of_many_files_stays_small(tmp_path: Path) -> None:
    for i in range(150):
        lines(tmp_path / f"{i:03d}.jsonl", {"text": str(i)})
    dataset = open_dataset(str(tmp_path))
    noted = dataset.describe()
    assert (noted["files"], noted["first"], noted["last"]) == (150, "000.jsonl", "149.jsonl")
    assert yaml_io.loads(yaml_io.dumps(noted), where="job", error=InputError) == noted
    lines(tmp_path / "077.jsonl", {"text": "?"})
    assert open_dataset(str(tmp_path)).describe() != noted


def test_the_part_that_was_read(tmp_path: Path) -> None:
    for name in ("a.jsonl", "b.jsonl"):
        lines(tmp_path / name, *({"text": "x" * 1000} for _ in range(1000)))
    dataset = open_dataset(str(tmp_path))
    parts = []
    for _ in dataset.items():
        parts.append(dataset.fraction() or 0.0)
    assert parts == sorted(parts)
    assert parts[0] < 0.2
    assert 0.45 < parts[999] < 0.55
    assert parts[-1] > 0.99
    limited = open_dataset(str(tmp_path), limit=4)
    assert len(list(limited.items())) == 4
    assert limited.fraction() == 1.0


MEASURE = r"""
import json, resource, sys
from nla_hub.explain.inputs import open_dataset

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024

small, *large = sys.argv[1:]
for name in (small, large[0]):
    sum(1 for _ in open_dataset(name, limit=100).items())
for name in large:
    before = peak()
    count = sum(1 for _ in open_dataset(name).items())
    print(name.split("/")[-1], count, peak() - before)
"""


def test_memory_does_not_grow_with_the_input(tmp_path: Path) -> None:
    text = "The quick brown fox. " * 100
    record = json.dumps({"text": text}).encode() + b"\n"
    n = 25_000
    large = [
        parquet(tmp_path / "a.parquet", text=pa.array([f"{i}{text}" for i in range(n)])),
        write(tmp_path / "b.jsonl", record * n),
        write(tmp_path / "c.csv", "text\n" + f"{text}\n" * n),
        write(tmp_path / "d.jsonl.gz", gzip.compress(record * n, 1)),
        tmp_path / "e.npy",
    ]
    np.save(large[-1], np.ones((n, 500), np.float32))
    small = lines(tmp_path / "small.jsonl", {"text": "x"})
    code = [sys.executable, "-c", MEASURE, *map(str, [small, *large])]
    output = subprocess.run(code, capture_output=True, text=True, check=True, timeout=120).stdout.split()
    assert output[1::3] == [str(n)] * 5
    grown = dict(zip(output[::3], map(int, output[2::3]), strict=True))
    assert max(grown.values()) < 32, grown  # MiB; each of the files has 50


# -- the command line's files --------------------------------------------------------------------------------


def test_files_of_the_command_line(tmp_path: Path) -> None:
    path = write(
        tmp_path / "a.jsonl", b'{"text": "a"}\n\n{"messages": [{"role": "user", "content": "hi"}]}\n{"x": 1}\n\xff\n'
    )
    found = list(read_items(["first"], str(path)))
    assert [(item.name, item.content) for item in found] == [
        ("text 0", "first"),
        ("a.jsonl:1", "a"),
        ("a.jsonl:3", MESSAGES),
        ("a.jsonl:4", None),
        ("a.jsonl:5", None),
    ]
    assert all((item.error is None) == (item.content is not None) for item in found)
    text = write(tmp_path / "notes.md", "one\ntwo\n")
    assert [(item.name, item.content) for item in read_items([], str(text))] == [("notes.md", "one\ntwo")]


# -- the Hub -------------------------------------------------------------------------------------------------

SCRIPT = r"""
import json, sys, time, urllib.request
from nla_hub.errors import NLAError
from nla_hub.explain.inputs import open_dataset
from nla_hub.hub import HubOptions

endpoint, token = sys.argv[1:3]
time.sleep = lambda seconds: None  # the client waits between its attempts

def tell(what, act):
    result = {"what": what}
    try:
        result["value"] = act()
    except Exception as error:
        result |= {"error": type(error).__name__, "typed": isinstance(error, NLAError), "text": str(error)}
    print("RESULT " + json.dumps(result), flush=True)

def read(name, start=0, **options):
    dataset = open_dataset(name, options=HubOptions(token=token), **options)
    items = list(dataset.items(start))
    rows = [getattr(item, "content", None) or getattr(item, "error", None) or item.vector.tolist() for item in items]
    return {"rows": rows, "total": dataset.total, "described": dataset.describe(), "site": dataset.site and vars(dataset.site)}

for name in sys.argv[3:]:
    tell(name, lambda: read(name))
tell("from the third on", lambda: read("hf://datasets/owner/texts/*.jsonl", 3))
dataset = open_dataset("hf://datasets/owner/long/a.parquet")
running = dataset.items()
first = next(running).content
lines = open_dataset("hf://datasets/owner/long/b.jsonl").items()
next(lines)
try:
    while True:
        urllib.request.urlopen(endpoint + "/stop").read()
except OSError:
    pass  # refused from now on
tell("in the middle", lambda: [item.error for item in running if hasattr(item, "error")])
tell("in the middle of lines", lambda: [item.error for item in lines if hasattr(item, "error")])
"""
NAMES = [
    "hf://datasets/owner/texts/a.jsonl",
    "hf://datasets/owner/texts/*.jsonl",
    f"hf://datasets/owner/texts@{REVISION}/folder",
    "hf://datasets/owner/texts/**/*.parquet",
    "hf://datasets/owner/texts@v9/a.jsonl",
    "hf://datasets/owner/texts/b.jsnl",
    "hf://datasets/owner/texts",
    "hf://datasets/owner/absent/a.jsonl",
    "hf://datasets/owner/gated-av/a.jsonl",
    "hf://datasets/owner/once/a.jsonl",
    "hf://datasets/owner/cut/a.jsonl",
    "hf://datasets/owner/broken/a.jsonl",
]
STREAMED = ["owner/plain", "owner/plain@main:train", "owner/plain:test", "owner/absent", "owner/gated-av", "owner/acts"]


@pytest.fixture(scope="module")
def hub_session(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    root = tmp_path_factory.mktemp("data")
    lines(root / "texts/a.jsonl", {"text": "a0"}, {"text": "a1"}, {"text": "a2"})
    lines(root / "texts/b.jsonl", {"text": "b0"}, {"text": "b1"})
    parquet(root / "texts/folder/v.parquet", activation_vector=vectors([[1, 2], [3, 4]]))
    sidecar = root / "texts/folder/v.parquet.nla_meta.yaml"
    yaml_io.write_text(sidecar, yaml_io.dumps({"extraction": {"layer_index": 7}}))
    write(root / "texts/README.md", "data")
    rng = np.random.default_rng(0)
    noise = [rng.bytes(5000).hex() for _ in range(2000)]
    parquet(root / "long/a.parquet", 400, text=noise)
    lines(root / "long/b.jsonl", *({"text": text} for text in noise))
    lines(root / "plain/train.jsonl", {"text": "p0", "id": 1}, {"text": "p1", "id": 2})
    parquet(root / "acts/v.parquet", activation_vector=vectors([[1, 2], [3, 4]]), activation_layer=[5, 5])
    texts_, long = root / "texts", root / "long"
    hub = Hub(
        {
            "owner/texts": texts_,
            "owner/long": long,
            "owner/once": texts_,
            "owner/cut": texts_,
            "owner/broken": texts_,
            "owner/plain": root / "plain",
            "owner/acts": root / "acts",
        },
        {
            "owner/once": Faults(cut={"a.jsonl": (2, 5)}),
            "owner/cut": Faults(cut={"a.jsonl": (1000, 5)}),
            "owner/broken": Faults(refuse={"get": (1000, 500, {})}),
        },
    )
    names = NAMES + (STREAMED if find_spec("datasets") else [])
    environment = {
        **os.environ,
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(root / "home"),
        "HF_HUB_OFFLINE": "0",
        "HF_DATASETS_OFFLINE": "0",
    }
    try:
        done = subprocess.run(
            [sys.executable, "-W", "ignore", "-c", SCRIPT, hub.url, "hf_s3cret", *names],
            env=environment,
            capture_output=True,
            text=True,
            check=False,
            timeout=200,
        )
    finally:
        hub.close()
    results = [json.loads(line.removeprefix("RESULT ")) for line in done.stdout.splitlines() if "RESULT" in line]
    assert results, done.stderr
    assert "hf_s3cret" not in done.stdout + done.stderr
    trees = [request.path for request in hub.requests if "/tree/" in request.path]
    return {result["what"]: result for result in results} | {"trees": {"value": trees}}


def rows_of(session: dict[str, dict[str, Any]], name: str) -> Any:
    assert "error" not in session[name], session[name]
    return session[name]["value"]["rows"]


def test_files_of_the_hub(hub_session: dict[str, dict[str, Any]]) -> None:
    a, folder, files = NAMES[0], NAMES[2], NAMES[3]
    assert rows_of(hub_session, a) == ["a0", "a1", "a2"]
    assert rows_of(hub_session, NAMES[1]) == rows_of(hub_session, NAMES[6]) == ["a0", "a1", "a2", "b0", "b1"]
    assert rows_of(hub_session, "from the third on") == ["b0", "b1"]
    assert rows_of(hub_session, folder) == rows_of(hub_session, files) == [[1, 2], [3, 4]]
    assert hub_session[folder]["value"]["site"] == {"base_model": None, "layer": 7}
    assert hub_session[folder]["value"]["total"] == 2
    described = hub_session[a]["value"]["described"]
    assert (described["repository"], described["commit"]) == ("owner/texts", REVISION)
    trees = hub_session["trees"]["value"]
    assert trees and all(f"/tree/{REVISION}" in path for path in trees)


def test_what_the_hub_refuses(hub_session: dict[str, dict[str, Any]]) -> None:
    for name, error, words in (
        (NAMES[4], "HubNotFoundError", "no revision 'v9'"),
        (NAMES[5], "HubNotFoundError", "did you mean b.jsonl"),
        (NAMES[7], "HubNotFoundError", "no such repository"),
        (NAMES[8], "HubGatedError", "gated"),
    ):
        assert hub_session[name].get("error") == error, hub_session[name]
        assert words in hub_session[name]["text"]


def test_a_connection_that_breaks_is_tried_again_and_never_a_row(hub_session: dict[str, dict[str, Any]]) -> None:
    assert rows_of(hub_session, "hf://datasets/owner/once/a.jsonl") == ["a0", "a1", "a2"]
    for name in ("hf://datasets/owner/cut/a.jsonl", "in the middle", "in the middle of lines"):
        assert hub_session[name].get("error") == "HubUnreachableError", hub_session[name]
    assert hub_session["hf://datasets/owner/broken/a.jsonl"].get("error") == "HubError"


@pytest.mark.skipif(not find_spec("datasets"), reason="needs the extra data")
def test_a_data_set_of_the_hub_by_its_name(hub_session: dict[str, dict[str, Any]]) -> None:
    assert rows_of(hub_session, "owner/plain") == rows_of(hub_session, "owner/plain@main:train") == ["p0", "p1"]
    described = hub_session["owner/plain"]["value"]["described"]
    assert (described["commit"], described["split"]) == (REVISION, "train")
    assert hub_session["owner/plain:test"]["error"] == "InputError"
    assert "owner/plain:train" in hub_session["owner/plain:test"]["text"]
    assert hub_session["owner/absent"]["error"] == "HubNotFoundError"
    assert hub_session["owner/gated-av"]["error"] == "HubGatedError"
    assert rows_of(hub_session, "owner/acts") == [[1, 2], [3, 4]]
    assert hub_session["owner/acts"]["value"]["site"] == {"base_model": None, "layer": 5}


def test_without_network() -> None:
    for options in (None, HubOptions(local_files_only=True)):
        with pytest.raises(HubUnreachableError):
            open_dataset("hf://datasets/owner/name/a.jsonl", options=options)


def test_without_the_datasets_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(MissingExtraError, match=r"nla-hub\[data\]"):
        open_dataset("owner/name")


class Broken:
    """Rows of which the third raises `error`, as often as is said."""

    column_names = None

    def __init__(self, error: Exception, times: int) -> None:
        self.error = error
        self.times = times
        self.begun: list[int] = []

    def rows(self, start: int) -> Any:
        self.begun.append(start)
        for i in range(start, 4):
            if i == 2 and self.times:
                self.times -= 1
                raise self.error
            yield {"text": f"t{i}"}


def stream_of(make: Callable[[], Broken]) -> tuple[Broken, streamed.StreamDataset]:
    source = make()
    columns = streamed.choose_columns(["text"], column=None, messages_column=None, id_column=None, where="x")
    return source, streamed.StreamDataset(
        "x", source.rows, columns.pick, {"repository": "x", "commit": "y"}, kind="text"
    )


def test_a_stream_goes_on_where_it_broke(monkeypatch: pytest.MonkeyPatch) -> None:
    httpx = pytest.importorskip("httpx2" if find_spec("httpx2") else "httpx")
    monkeypatch.setattr("nla_hub.hub.refusals.time.sleep", lambda _: None)
    source, dataset = stream_of(lambda: Broken(httpx.ReadError("gone"), 2))
    assert contents(dataset) == ["t0", "t1", "t2", "t3"]
    assert source.begun == [0, 2, 2]
    wrapped = ValueError("no table")
    wrapped.__cause__ = httpx.ReadError("gone")
    assert contents(stream_of(lambda: Broken(wrapped, 1))[1]) == ["t0", "t1", "t2", "t3"]
    with pytest.raises(HubNotFoundError, match="lacks a file"):
        contents(stream_of(lambda: Broken(FileNotFoundError("train.jsonl"), 1))[1])
    source, dataset = stream_of(lambda: Broken(pa.ArrowInvalid("damaged"), 1))
    assert contents(dataset) == ["t0", "t1", None]
    assert "damaged" in errors(stream_of(lambda: Broken(pa.ArrowInvalid("damaged"), 1))[1])[0]
