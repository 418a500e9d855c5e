"""What a file is by its content, and what of it is searched for secrets: texts whole, weights by their header only.

A tokenizer's vocabulary holds any string at all, so inside one only access tokens count: `tokenizer.json` is told from its
vocabulary by its structure, and the other vocabulary files by what every one of their lines must look like.
"""

from __future__ import annotations

import json
import pickletools
import re
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from nla_hub.publish.guards.secret_forms import TOKENS, Rule
from nla_hub.publish.guards.secrets import Finding, search
from nla_hub.publish.release import Entry
from nla_hub.weights import PICKLED

LARGEST_HEADER = 100_000_000
"""Bytes of a safetensors header; the format's own limit."""

HEADER = 2**20
"""Bytes of weights in other forms than safetensors that are searched: what they say of themselves stands in front."""

LARGEST_TEXT = 2**28
"""Bytes of a file that is read whole, to tell its structure."""

OTHER_WEIGHTS = (".gguf", ".onnx", ".h5", ".msgpack", ".npz", ".npy", ".arrow", ".tflite")
PICKLE_SUFFIXES = (*PICKLED, ".pickle", ".joblib", ".dill")
_PICKLE_START = re.compile(rb"\x80[\x02-\x05]")
_EXECUTABLE_START = (b"\x7fELF", b"#!", b"\xfe\xed\xfa", b"\xcf\xfa\xed\xfe", b"\xca\xfe\xba\xbe")
_OUTPUTS = re.compile(rb'"outputs"\s*:\s*\[\s*[^\]\s]')
_RAW_VOCABULARY = (".tiktoken", ".model")
_LINES = {"merges.txt": re.compile(rb"#version.*|\S+ \S+|"), "vocab.txt": re.compile(rb"\S*")}


@dataclass(frozen=True)
class Rules:
    """What is searched for.

    Attributes:
        tokens: access tokens, and the account's own.
        traces: besides, everything that tells of a person or a machine.
    """

    tokens: tuple[Rule, ...] = TOKENS
    traces: tuple[Rule, ...] = ()

    @property
    def all(self) -> tuple[Rule, ...]:
        """Both."""
        return (*self.tokens, *self.traces)

    def without(self, kind: str) -> Rules:
        """The same without one kind of traces."""
        return Rules(self.tokens, tuple(rule for rule in self.traces if rule.kind != kind))


def code_in(entry: Entry) -> str | None:
    """What runs when it is opened carelessly: a pickle (whatever the file is called) or a notebook with outputs; else None.

    Returns:
        In words, with the line where there is one.
    """
    start = head_of(entry)
    if entry.name.lower().endswith(PICKLE_SUFFIXES) or _PICKLE_START.match(start) or _old_pickle(entry, start):
        return "a pickle: loading one runs whatever its author put there"
    if start.startswith(b"PK\x03\x04") and _holds_pickle(entry):
        return "a pickle in an archive, as torch.save writes it: loading one runs whatever its author put there"
    if entry.name.endswith(".ipynb"):
        return _outputs(entry)
    return None


def head_of(entry: Entry) -> bytes:
    """The first bytes of a file."""
    with entry.open() as stream:
        return stream.read(512)


def is_executable(start: bytes) -> bool:
    """Whether a file that begins so is a program or a script."""
    return start.startswith(_EXECUTABLE_START) or (start.startswith(b"MZ") and b"\0" in start)


def _old_pickle(entry: Entry, start: bytes) -> bool:
    """Whether this is a pickle of a protocol that has no mark of its own: one that builds objects, read to its end."""
    if start[:1] not in (b"c", b"(", b"]", b"}") or entry.size > 2**16:
        return False
    try:
        *codes, stop = [code.name for code, _, _ in pickletools.genops(b"".join(entry.chunks()))]
    except (ValueError, IndexError, KeyError, OverflowError):
        return False
    return stop == "STOP" and bool({"GLOBAL", "REDUCE", "INST", "BUILD", "APPENDS", "SETITEMS"} & set(codes))


def _holds_pickle(entry: Entry) -> bool:
    try:
        with entry.open() as stream, zipfile.ZipFile(stream) as archive:
            return any(name.endswith(PICKLE_SUFFIXES) for name in archive.namelist())
    except (zipfile.BadZipFile, NotImplementedError):
        return False


def _outputs(entry: Entry) -> str | None:
    data = b"".join(entry.chunks())
    try:
        notebook = json.loads(data)
        sheets = [notebook, *notebook.get("worksheets", [])]
        cells = [cell for sheet in sheets for cell in sheet.get("cells", [])]
        written = sum(bool(cell.get("outputs")) for cell in cells)
    except (ValueError, AttributeError, TypeError, RecursionError):
        return None
    if not written:
        return None
    found = _OUTPUTS.search(data)
    line = 1 if found is None else data.count(b"\n", 0, found.start()) + 1
    return f"line {line}: a notebook with the outputs of {written} cells"


# -- searching -----------------------------------------------------------------------------------------------


def secrets_of(entry: Entry, rules: Rules) -> Iterator[str]:
    """What stands in a file, with line and column (or the field of a header)."""
    start = head_of(entry)
    if entry.name.endswith(".safetensors"):
        yield from (f"header, {finding}" for finding in search([_header(entry)], rules.all))
    elif start.startswith(b"PAR1"):
        yield from _in_schema(entry, rules.all)
    elif entry.name.lower().endswith(OTHER_WEIGHTS):
        with entry.open() as stream:
            yield from map(str, search([stream.read(HEADER)], rules.all))
    elif entry.name.lower().endswith(_RAW_VOCABULARY):
        yield from map(str, search(entry.chunks(), rules.tokens))
    elif _is_vocabulary(entry):
        yield from _beside_vocabulary(entry, rules)
    else:
        yield from map(str, search(entry.chunks(), rules.all))


def _header(entry: Entry) -> bytes:
    with entry.open() as stream:
        length = int.from_bytes(stream.read(8), "little")
        return stream.read(min(length, LARGEST_HEADER))


def _in_schema(entry: Entry, rules: Sequence[Rule]) -> Iterator[str]:
    """In the metadata of a parquet file; its rows are looked at where data sets are staged."""
    try:
        with entry.open() as stream:
            schema = pq.read_schema(pa.PythonFile(stream, mode="r"))
    except (OSError, pa.ArrowException):
        yield from map(str, search(entry.chunks(), rules))
        return
    for holder in (schema, *schema):
        for key, value in (holder.metadata or {}).items():
            for finding in search([key + b"=" + value], rules):
                yield f"metadata {key.decode('utf-8', 'replace')!r}: {finding.rule.what} ({finding.masked})"


def _is_vocabulary(entry: Entry) -> bool:
    name = PurePosixPath(entry.name).name
    if name in _LINES:
        return all(_LINES[name].fullmatch(line) for line in b"".join(entry.chunks()).splitlines())
    return name in ("tokenizer.json", "vocab.json") and entry.size <= LARGEST_TEXT


def _beside_vocabulary(entry: Entry, rules: Rules) -> Iterator[str]:
    findings = list(search(entry.chunks(), rules.all))
    if all(finding.rule.kind == "token" for finding in findings):
        yield from map(str, findings)
        return
    data = b"".join(entry.chunks())
    own_words = _words_outside(data) if entry.name.endswith(".json") else frozenset()
    for finding in findings:
        if finding.rule.kind == "token" or own_words is None or _string_at(data, finding) in own_words:
            yield str(finding)


def _words_outside(data: bytes) -> frozenset[str] | None:
    """All strings of a tokenizer's file that are not in its vocabulary; None where it is no such file."""
    try:
        found = json.loads(data)
    except (ValueError, RecursionError):
        return None
    if not isinstance(found, dict):
        return None
    if all(type(number) is int for number in found.values()):
        return frozenset()  # a vocab.json is nothing but a vocabulary
    model = found.get("model")
    if isinstance(model, dict):
        found = {**found, "model": {key: value for key, value in model.items() if key not in ("vocab", "merges")}}
    return frozenset(_strings(found))


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            yield key
            yield from _strings(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _strings(inner)


def _string_at(data: bytes, finding: Finding) -> str | None:
    """The JSON string that a finding stands in."""
    begin = _quote(data, finding.offset, -1)
    end = _quote(data, finding.offset, 1)
    try:
        found = json.loads(data[begin : end + 1])
    except ValueError:
        return None
    return found if isinstance(found, str) else None


def _quote(data: bytes, place: int, step: int) -> int:
    """The next quotation mark in a direction that no backslash takes back."""
    while True:
        place = data.find(b'"', place) if step > 0 else data.rfind(b'"', 0, place)
        before = data[:place] if place < 256 else data[place - 256 : place]
        if place < 0 or (len(before) - len(before.rstrip(b"\\"))) % 2 == 0:
            return place
        place += step if step > 0 else 0
