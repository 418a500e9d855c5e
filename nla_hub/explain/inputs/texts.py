"""Text files, JSON lines, JSON lists and CSV, read as streams; a line that cannot be read is one bad item."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from typing import Any, BinaryIO

from nla_hub.errors import InputError, TextError
from nla_hub.explain.inputs.files import MIB, DataFile, Unreadable, damage, opened
from nla_hub.explain.inputs.items import BadItem, Item, TextItem, bad, one_line, refused
from nla_hub.explain.inputs.readers import BROKEN, Reader
from nla_hub.explain.inputs.records import MESSAGES, TEXT, Columns, decoded

LONGEST_TEXT = 64 * MIB
"""Bytes of a line, or of a file that is one document; a model's context is a thousandth of it."""

LARGEST_JSON = 64 * MIB
"""Bytes of a .json file, which can only be read as a whole."""

LONGEST_FIELD = 16 * MIB
"""Characters of a CSV field; a longer one is a quotation mark that is never closed."""

DELIMITERS = (",", ";", "\t", "|")
"""What divides the fields of tables in practice; only the first and, in .tsv, the third are read."""

LONGEST_HEADER = 2**16
"""Bytes of a line of names in which another delimiter is looked for."""

SAMPLE = 100
"""Lines from which the columns of JSON lines are learnt."""

BOM = b"\xef\xbb\xbf"


class TextReader(Reader):
    """A file that is one document; its name is the document's id. Line breaks at its end do not belong to it."""

    def __init__(self, file: DataFile, compression: str) -> None:
        super().__init__(file)
        self.compression = compression

    def count(self) -> int:
        return 1

    def items(self, skip: int) -> Iterator[Item]:
        if not skip:
            with opened(self.file, self.compression) as (stream, self.raw):
                item = read_text(self.place(), stream, doc_id=self.file.name)
            yield item
        self.row = 1


def read_text(name: str, stream: BinaryIO, *, doc_id: str | None = None) -> TextItem | BadItem:
    """All of a stream as one document."""
    data = stream.read(LONGEST_TEXT + 1)
    if len(data) > LONGEST_TEXT:
        return bad(
            f"This is one document of more than {LONGEST_TEXT // MIB} MiB; write one document a line, as JSON lines.",
            name,
            doc_id,
        )
    try:
        return TextItem(decoded(data.removeprefix(BOM), name).rstrip("\r\n"), doc_id, name)
    except TextError as error:
        return refused(error, name, doc_id)


class LineReader(Reader):
    """JSON lines; blank ones are no rows."""

    def __init__(self, file: DataFile, compression: str, columns: Columns) -> None:
        super().__init__(file)
        self.compression = compression
        self.chosen = columns

    def columns(self) -> list[str] | None:
        names: dict[str, None] = {}
        first, records, seen = "", 0, 0
        try:
            with opened(self.file, self.compression) as (stream, _):
                for number, line in islice(json_lines(stream), SAMPLE):
                    seen += 1
                    record = parsed(line, self.place(number))
                    if isinstance(record, dict):
                        records += 1
                        names |= dict.fromkeys(record)
                    else:
                        first = first or record.error
        except BROKEN as cause:
            damage(cause, self.file.name)
            if not records:
                raise
        if seen == SAMPLE and not records:
            raise InputError(
                f"None of the first {SAMPLE} lines is a JSON object.",
                where=self.place(),
                got=first,
                expected='one {"text": ...} a line, in UTF-8',
            )
        return list(names) if records else None

    def items(self, skip: int) -> Iterator[Item]:
        with opened(self.file, self.compression) as (stream, self.raw):
            for number, line in json_lines(stream):
                self.row += 1
                if self.row > skip:
                    yield json_item(line, self.place(number), self.chosen)


def json_lines(stream: BinaryIO) -> Iterator[tuple[int, bytes | None]]:
    """Number (from 1) and bytes of each line that is not blank; None for a line longer than `LONGEST_TEXT`."""
    number = 0
    while line := stream.readline(LONGEST_TEXT + 1):
        number += 1
        too_long = len(line) > LONGEST_TEXT
        while too_long and line and not line.endswith(b"\n"):
            line = stream.readline(LONGEST_TEXT + 1)
        line = line.removeprefix(BOM) if number == 1 else line
        if too_long:
            yield number, None
        elif line.strip():
            yield number, line


def json_item(line: bytes | None, where: str, columns: Columns) -> TextItem | BadItem:
    """The item of one line of `json_lines`."""
    record = parsed(line, where)
    return columns.pick(record, where) if isinstance(record, dict) else record


def read_lines(name: str, stream: BinaryIO) -> Iterator[TextItem | BadItem]:
    """The items of a stream of JSON lines: {"text": ...} or {"messages": [...]}."""
    columns = Columns(TEXT, MESSAGES)
    for number, line in json_lines(stream):
        yield json_item(line, f"{name}:{number}", columns)


def parsed(line: bytes | None, where: str) -> dict[str, Any] | BadItem:
    """The object of a line."""
    if line is None:
        return bad(f"This line is longer than {LONGEST_TEXT // MIB} MiB.", where)
    try:
        record = json.loads(decoded(line, where))
    except TextError as error:
        return refused(error, where)
    except (ValueError, RecursionError) as error:
        return bad(f"This line is not JSON: {error}.", where)
    return record if isinstance(record, dict) else bad(_no_object(record, "line"), where)


class ListReader(Reader):
    """A .json file that is a list of objects; parsed as a whole, so not larger than `LARGEST_JSON`."""

    def __init__(self, file: DataFile, compression: str, columns: Columns) -> None:
        super().__init__(file)
        self.compression = compression
        self.chosen = columns

    def columns(self) -> list[str] | None:
        names: dict[str, None] = {}
        for record in self._load()[:SAMPLE]:
            names |= dict.fromkeys(record) if isinstance(record, dict) else {}
        return list(names) or None

    def items(self, skip: int) -> Iterator[Item]:
        for record in self._load():
            self.row += 1
            if self.row > skip:
                where = self.place(self.row)
                yield (
                    self.chosen.pick(record, where)
                    if isinstance(record, dict)
                    else bad(_no_object(record, "row"), where)
                )

    def _load(self) -> list[Any]:
        with opened(self.file, self.compression) as (stream, self.raw):
            data = stream.read(LARGEST_JSON + 1)
        if len(data) > LARGEST_JSON:
            raise Unreadable(
                f"A .json file is read as a whole, and this one has more than {LARGEST_JSON // MIB} MiB. "
                "Convert it to JSON lines: jq -c '.[]' FILE.json > FILE.jsonl"
            )
        try:
            records = json.loads(data.removeprefix(BOM).decode("utf-8"))
        except UnicodeDecodeError as cause:
            raise Unreadable(f"This is not UTF-8 text (byte {cause.start}).") from cause
        except (ValueError, RecursionError) as cause:
            lines = " One object a line is called .jsonl." if "Extra data" in str(cause) else ""
            raise Unreadable(f"This is not JSON: {cause}.{lines}") from cause
        if not isinstance(records, list):
            raise Unreadable(f"This is a {type(records).__name__}, not a list of objects; one object a line is .jsonl.")
        return records


class TableReader(Reader):
    """CSV and TSV with a line of names; quoted fields may hold line breaks."""

    def __init__(self, file: DataFile, compression: str, columns: Columns, delimiter: str) -> None:
        super().__init__(file)
        self.compression = compression
        self.chosen = columns
        self.delimiter = delimiter

    def columns(self) -> list[str] | None:
        with self._rows() as rows:
            first = next(rows, None)
        if first is None:
            return None
        if isinstance(first[1], str) or (len(first[1]) == 1 and first[1][0] not in self.chosen.names()):
            self._check_delimiter()
        return _names(first[1])

    def _check_delimiter(self) -> None:
        """Raise an InputError where another sign than this table's divides the line of names."""
        with opened(self.file, self.compression) as (stream, self.raw):
            line = decoded(stream.readline(LONGEST_HEADER).removeprefix(BOM), self.place()).split("\r")[0].strip()
        counts = {sign: len(next(csv.reader([line], delimiter=sign), [])) for sign in DELIMITERS}
        best = max(counts, key=lambda sign: counts[sign])
        if best == self.delimiter or counts[best] < 2:
            return
        into = {"\t": "rename it to .tsv", ",": "rename it to .csv"}
        raise InputError(
            f"The fields of this table seem to be divided by {best!r}, and they are read as divided by {self.delimiter!r}.",
            where=self.place(),
            got=f"a line of names: {one_line(line, 80)}",
            next_step=into.get(best, "save it with commas, or with tabs as .tsv"),
        )

    def items(self, skip: int) -> Iterator[Item]:
        with self._rows() as rows:
            names: list[str] | None = None
            for number, row in rows:
                if names is None:
                    names = _names(row)
                    self.require(names, self.chosen)
                    continue
                self.row += 1
                if self.row > skip:
                    yield self._item(names, row, self.place(number))

    def _item(self, names: list[str], row: list[str] | str, where: str) -> Item:
        if isinstance(row, str):
            return bad(row, where)
        if len(row) != len(names):
            return bad(f"This row has {len(row)} fields, and there are {len(names)} columns.", where)
        record = dict(zip(names, row, strict=True))
        for name in self.chosen.names():
            try:
                record.get(name, "").encode("utf-8")
            except UnicodeEncodeError:
                return bad(f"The column {name!r} is not UTF-8 text.", where)
        return self.chosen.pick(record, where)

    @contextmanager
    def _rows(self) -> Iterator[Iterator[tuple[int, list[str] | str]]]:
        """Number of its first line and fields of each row, or why it has none; what is not UTF-8 comes as surrogates."""
        with opened(self.file, self.compression) as (stream, self.raw):
            text = io.TextIOWrapper(stream, encoding="utf-8-sig", errors="surrogateescape", newline="")
            yield self._parse(text)

    def _parse(self, text: io.TextIOWrapper) -> Iterator[tuple[int, list[str] | str]]:
        rows = csv.reader(text, delimiter=self.delimiter, strict=True)
        while True:
            number = rows.line_num + 1
            try:
                with _wide_fields():
                    row = next(rows)
            except StopIteration:
                return
            except csv.Error as error:
                if "limit" in str(error):
                    raise Unreadable(
                        f"A field that begins about line {number} has more than {LONGEST_FIELD // MIB} Mi characters: "
                        "a quotation mark is never closed. The rest of the file is left out."
                    ) from error
                yield number, f"This row is not CSV: {error}."
                continue
            if row:
                yield number, row


def _names(row: list[str] | str) -> list[str]:
    """The names in the first line."""
    if isinstance(row, str):
        raise Unreadable(f"The line of column names cannot be read: {row}")
    return row


@contextmanager
def _wide_fields() -> Iterator[None]:
    """While open, csv reads fields up to `LONGEST_FIELD`; its bound is one for the whole process, and restored."""
    before = csv.field_size_limit(LONGEST_FIELD)
    try:
        yield
    finally:
        csv.field_size_limit(before)


def _no_object(record: object, what: str) -> str:
    return f'This {what} is a {type(record).__name__}, not an object like {{"text": ...}}.'
