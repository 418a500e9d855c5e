"""What a file is by its content, and what of it is searched for secrets: texts whole, weights by their header only.

A tokenizer's vocabulary holds any string at all, so inside one only access tokens count: `tokenizer.json` is told from its
vocabulary by its structure, and the other vocabulary files by what every one of their lines must look like.
"""

from __future__ import annotations

import bz2
import json
import lzma
import pickletools
import re
import warnings
import zipfile
import zlib
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import accumulate
from pathlib import PurePosixPath
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from nla_hub.publish.guards.secret_forms import TOKENS, Rule
from nla_hub.publish.guards.secrets import Finding, masked, search, spans, wide_encoding
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

BEGINNING = 2**16
"""Bytes of a file, and of what a compressed one holds, by which a pickle without a mark is told."""

_IMPORTS = ("GLOBAL", "INST", "STACK_GLOBAL")
_CALLS = ("NEWOBJ", "NEWOBJ_EX")
_CALLS_FROM_MARK = ("INST", "OBJ")
_BEFORE_CALL = {"EMPTY_TUPLE", "TUPLE", "TUPLE1", "TUPLE2", "TUPLE3", "GET", "BINGET", "POP"}
"""Opcodes of pickles (`pickletools`): those that import, those that call, and what stands before the call `REDUCE`."""

_IMPORTED = re.compile(r"[A-Za-z_][\w.]* [A-Za-z_][\w.]*")
_BUILDS = {"GLOBAL", "REDUCE", "INST", "BUILD", "APPENDS", "SETITEMS"}

MANY_NUMBERED = 8
"""Objects that are numbered 0, 1, 2, ... as only a pickle numbers them."""

_COMPRESSED: Mapping[bytes, Callable[[], Any]] = {
    b"\x1f\x8b": lambda: zlib.decompressobj(31),  # with gzip's header
    b"BZh": bz2.BZ2Decompressor,
    b"\xfd7zXZ\0": lzma.LZMADecompressor,
}
"""How compressed files begin -> what opens them."""

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
    if _is_safetensors(entry, start):
        return None
    with entry.open() as stream:
        beginning = stream.read(BEGINNING)
    if entry.name.lower().endswith(PICKLE_SUFFIXES) or _is_pickle(beginning):
        return "a pickle: loading one runs whatever its author put there"
    if _is_pickle(_unpacked(beginning)):
        return "a compressed pickle: loading one runs whatever its author put there"
    if start.startswith(b"PK\x03\x04") and _holds_pickle(entry):
        return "a pickle in an archive, as torch.save writes it: loading one runs whatever its author put there"
    if entry.name.endswith(".ipynb") or _may_be_notebook(entry, start):
        return _outputs(entry)
    return None


def head_of(entry: Entry) -> bytes:
    """The first bytes of a file."""
    with entry.open() as stream:
        return stream.read(512)


def is_executable(start: bytes) -> bool:
    """Whether a file that begins so is a program or a script."""
    return start.startswith(_EXECUTABLE_START) or (start.startswith(b"MZ") and b"\0" in start)


def _is_safetensors(entry: Entry, start: bytes) -> bool:
    """Whether a file called so begins as such files do: a length below 2**32 that fits the file, then a mapping.

    One length in 16,000 looks like the mark of a pickle.
    """
    if not entry.name.lower().endswith(".safetensors") or start[4:9] != b"\0\0\0\0{":
        return False
    return int.from_bytes(start[:8], "little") <= min(LARGEST_HEADER, entry.size - 8)


def _is_pickle(data: bytes) -> bool:
    """Whether a file that begins so is a pickle; the protocols 0 and 1 have no mark, and are told by what they do."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # a backslash in what is no pickle's text
        return bool(_PICKLE_START.match(data)) or _old_pickle(data)


def _old_pickle(data: bytes) -> bool:
    """One that imports something and calls it, one that builds objects and ends here, or one that numbers what it holds.

    Lines of words are valid opcodes for a while too, so single ones prove nothing.
    """
    seen: set[str] = set()
    last, imports, numbered = "", False, 0
    try:
        for code, argument, _ in pickletools.genops(data):
            if code.name in ("PUT", "BINPUT"):
                numbered += argument == numbered
                continue
            imports |= code.name in _IMPORTS and (argument is None or bool(_IMPORTED.fullmatch(argument)))
            called = code.name in _CALLS or (code.name in _CALLS_FROM_MARK and "MARK" in seen)
            if imports and (called or (code.name == "REDUCE" and last in _BEFORE_CALL)):
                return True
            last = code.name
            seen.add(last)
    except (ValueError, IndexError, KeyError, OverflowError):  # no pickle, or one that goes on behind this
        pass
    is_whole = last == "STOP" and bool(_BUILDS & seen)
    return data[:1] in (b"c", b"(", b"]", b"}") and (is_whole or numbered >= MANY_NUMBERED)


def _unpacked(data: bytes) -> bytes:
    """The beginning of what a compressed file holds; nothing for any other."""
    for mark, decompressor in _COMPRESSED.items():
        if data.startswith(mark):
            with suppress(OSError, EOFError, ValueError, zlib.error, lzma.LZMAError):
                return bytes(decompressor().decompress(data, BEGINNING))
    return b""


def _holds_pickle(entry: Entry) -> bool:
    try:
        with entry.open() as stream, zipfile.ZipFile(stream) as archive:
            return any(name.endswith(PICKLE_SUFFIXES) for name in archive.namelist())
    except (zipfile.BadZipFile, NotImplementedError):
        return False


def _may_be_notebook(entry: Entry, start: bytes) -> bool:
    """Whether a file of another name is worth reading as a notebook."""
    is_mapping = start.lstrip().startswith(b"{") and not entry.name.endswith(".jsonl")
    if not is_mapping or entry.size > LARGEST_TEXT:
        return False
    data = b"".join(entry.chunks())
    return b'"nbformat"' in data and b'"cells"' in data


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
        header = _header(entry)
        yield from (f"header, {finding}" for finding in search([header], rules.all))
        yield from (f"header, {found}" for found in _escaped(header, rules.all))
    elif start.startswith(b"PAR1"):
        yield from _in_schema(entry, rules.all)
    elif entry.name.lower().endswith(OTHER_WEIGHTS):
        with entry.open() as stream:
            yield from map(str, search([stream.read(HEADER)], rules.all))
    elif entry.name.lower().endswith(_RAW_VOCABULARY):
        yield from map(str, _in_text(entry, rules.tokens))
    elif _is_vocabulary(entry):
        yield from _beside_vocabulary(entry, rules)
    else:
        yield from map(str, _in_text(entry, rules.all))
        if entry.name.endswith(".json") and entry.size <= LARGEST_TEXT:
            yield from map(str, _escaped(b"".join(entry.chunks()), rules.all))


def _in_text(entry: Entry, rules: Sequence[Rule]) -> Iterator[Finding]:
    """As its bytes stand there, and in the encoding that they seem to have."""
    yield from search(entry.chunks(), rules)
    if (encoding := wide_encoding(head_of(entry))) is not None:
        yield from search(entry.chunks(), rules, encoding=encoding)


@dataclass(frozen=True)
class Escaped:
    """What a JSON string holds once its escapes are undone, and does not show before.

    Attributes:
        text: the string.
        line: where it begins, from 1.
    """

    text: str
    line: int
    rule: Rule
    masked: str

    def __str__(self) -> str:
        return f"line {self.line}: {self.rule.what} ({self.masked}), in a string with escapes"


def _escaped(data: bytes, rules: Sequence[Rule]) -> Iterator[Escaped]:
    """Secrets that escapes hide from a search of the bytes: `\\u002fhome`, or an `n` in front that is a line's end."""
    strings = [*_escaped_strings(data)]
    told = [text.encode("utf-8", "surrogatepass") for _, _, text in strings]
    starts = [*accumulate((len(text) + 1 for text in told), initial=0)]
    together = b"\n".join(told)  # no rule reaches over a line's end
    for start, end, rule in spans(together, rules):
        begin, stop, text = strings[bisect_right(starts, start) - 1]
        if rule.what not in {shown.what for *_, shown in spans(data[begin:stop], rules)}:
            yield Escaped(text, data.count(b"\n", 0, begin) + 1, rule, masked(together[start:end], rule))


def _escaped_strings(data: bytes) -> Iterator[tuple[int, int, str]]:
    """Where the strings with a backslash begin and end in a JSON file, and what they say."""
    place = data.find(b"\\")
    while place >= 0:
        begin, end = _quote(data, place, -1), _quote(data, place, 1)
        if end < 0:
            return
        if begin >= 0:
            with suppress(ValueError):
                yield begin, end + 1, json.loads(data[begin : end + 1], strict=False)
        place = data.find(b"\\", end + 1)


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
    data = b"".join(entry.chunks())
    is_json = entry.name.endswith(".json")
    findings: list[Finding | Escaped] = [*_in_text(entry, rules.all), *(_escaped(data, rules.all) if is_json else ())]
    if all(finding.rule.kind == "token" for finding in findings):
        yield from map(str, findings)
        return
    own_words = _words_outside(data) if is_json else frozenset()
    for finding in findings:
        if finding.rule.kind == "token" or own_words is None or _string_of(data, finding) in own_words:
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


def _string_of(data: bytes, finding: Finding | Escaped) -> str | None:
    """The JSON string that a finding stands in."""
    if isinstance(finding, Escaped):
        return finding.text
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
