"""A data set made of files: which reader each of them gets, what is checked before anything runs, and the order of items."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Generator, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from nla_hub import yaml_io
from nla_hub.errors import InputError, RunError, SidecarError
from nla_hub.explain.inputs import arrays, tables
from nla_hub.explain.inputs.files import GOES_ON, DataFile, NotOpened, Unreadable, damage, opened
from nla_hub.explain.inputs.items import Item, Kind, RecordedSite, bad
from nla_hub.explain.inputs.naming import Files, compression_of
from nla_hub.explain.inputs.readers import BROKEN, Reader
from nla_hub.explain.inputs.records import IDS, Columns, choose_columns
from nla_hub.explain.inputs.texts import LineReader, ListReader, TableReader, TextReader
from nla_hub.sidecar_dialects import present

LISTED = 100
"""Files that `describe` names one by one; of more it gives number, bytes and one digest."""

LOOKED_AT = 10
"""Files that are opened to learn the columns, until one has a row."""

COUNTED = 1000
"""Files that are opened to count rows in advance; of the Hub's, a hundredth."""

SIDECAR_SUFFIX = ".nla_meta.yaml"


@dataclass(frozen=True)
class Options:
    """What was asked for besides the name."""

    column: str | None
    messages_column: str | None
    id_column: str | None
    limit: int | None

    def refuse(self, *names: str, where: object) -> None:
        """Raise an InputError for options that mean nothing for this format."""
        given = [name for name in names if getattr(self, name) is not None]
        if given:
            option = f"--{given[0].replace('_', '-')}"
            raise InputError(
                f"{option} names a column, and this format has none.", where=where, next_step=f"leave {option} out"
            )


class FileDataset:
    """Files of one format, read one after the other; see `items.Dataset`.

    A file that could not be opened is one bad item from then on, even if it comes back: the numbers of the items behind
    it stay what they are.
    """

    def __init__(
        self,
        files: Files,
        make: Callable[[DataFile], Reader],
        *,
        kind: Kind,
        width: int | None = None,
        site: RecordedSite | None = None,
        limit: int | None = None,
    ) -> None:
        self.files = files
        self.make = make
        self.kind: Kind = kind
        self.width = width
        self.site = site
        self.limit = limit
        self._read = 0
        self._reader: Reader | None = None
        self._done = 0
        self._refused: dict[str, str] = {}

    @cached_property
    def total(self) -> int | None:
        """See `items.Dataset`."""
        most = COUNTED if self.files.commit is None else COUNTED // 100
        if len(self.files.files) > most:
            return None
        total = 0
        for file in self.files.files:
            try:
                rows = 1 if file.name in self._refused else self.make(file).count()
            except BROKEN as cause:
                damage(cause, file.name)
                rows = 1  # one bad item stands for it
            if rows is None:
                return None
            total += rows
        return total if self.limit is None else min(total, self.limit)

    def describe(self) -> dict[str, Any]:
        """See `items.Dataset`."""
        files = [self._identity(file) for file in self.files.files]
        if len(files) > LISTED:
            digest = hashlib.sha256(json.dumps(files).encode()).hexdigest()
            size = sum(file["size"] or 0 for file in files)
            summary = {"files": len(files), "bytes": size, "sha256": digest}
            first_and_last = {"first": files[0]["name"], "last": files[-1]["name"]}
            return {**self._origin(), **summary, **first_and_last}
        return {**self._origin(), "files": files}

    def _identity(self, file: DataFile) -> dict[str, Any]:
        try:
            return file.identity()
        except NotOpened as cause:
            self._refused.setdefault(file.name, str(cause))
            return {"name": file.name, "size": None, "sha256": None}
        except (OSError, MemoryError) as cause:
            damage(cause, file.name)
            raise

    def _origin(self) -> dict[str, Any]:
        hub = {} if self.files.commit is None else {"repository": self.files.repo, "commit": self.files.commit}
        return {"kind": self.kind, "format": self.files.format, **hub}

    def items(self, start: int = 0) -> Generator[Item, None, None]:
        """See `items.Dataset`."""
        self._read, self._done = start, 0
        for item in self._all(start):
            if self.limit is not None and self._read >= self.limit:
                return
            self._read += 1
            yield item

    def _all(self, skip: int) -> Generator[Item, None, None]:
        for file in self.files.files:
            reader = self._reader = self.make(file)
            try:
                if file.name in self._refused:
                    raise NotOpened(self._refused[file.name])
                yield from reader.items(skip)
            except BROKEN as cause:
                why = damage(cause, file.name)
                if isinstance(cause, NotOpened):
                    self._refuse(file, why, skip)
                if reader.row >= skip:
                    yield bad(why, reader.place())
                reader.row += 1
            skip = max(skip - reader.row, 0)
            self._done += file.size
            self._reader = None

    def _refuse(self, file: DataFile, why: str, skip: int) -> None:
        """Note a file that cannot be opened; a RunError where rows of it were passed before, nobody knows how many."""
        if skip and file.name not in self._refused:
            raise RunError(
                f"Rows of this file may be done, and it cannot be opened now: {why.rstrip('.')}.",
                where=file.name,
                next_step=f"put it back as it was, then {GOES_ON}",
            )
        self._refused[file.name] = why

    def fraction(self) -> float | None:
        """See `items.Dataset`."""
        every = sum(file.size for file in self.files.files)
        here = 0.0 if self._reader is None else self._reader.fraction() * self._reader.file.size
        parts = [(self._done + here) / every] if every else []
        parts += [self._read / self.limit] if self.limit else []
        return min(max(parts), 1.0) if parts else None


def open_files(name: str, files: Files, options: Options) -> FileDataset:
    """A data set of files, looked into as far as needed to know that its rows can be read.

    Raises:
        InputError: options that do not fit, columns that are not there, no row at all, nothing that can be read.
        SidecarError: a sidecar beside a file of vectors that cannot be read.
        RunError: a disk or network failed meanwhile.
    """
    build = {"npy": _arrays, "safetensors": _arrays, "parquet": _typed, "arrow": _typed, "txt": _whole_texts}
    dataset = build.get(files.format, _records)(name, files, options)
    with closing(dataset.items()) as items:
        if next(items, None) is None:
            raise _empty(name)
    return dataset


def _whole_texts(name: str, files: Files, options: Options) -> FileDataset:
    options.refuse("column", "messages_column", "id_column", where=name)
    return FileDataset(
        files, lambda file: TextReader(file, compression_of(file.name)), kind="text", limit=options.limit
    )


def _records(name: str, files: Files, options: Options) -> FileDataset:
    def make(file: DataFile, columns: Columns) -> Reader:
        compression = compression_of(file.name)
        if files.format == "jsonl":
            return LineReader(file, compression, columns)
        if files.format == "json":
            return ListReader(file, compression, columns)
        return TableReader(file, compression, columns, "\t" if files.format == "tsv" else ",")

    guess = choose_columns(None, **_asked(options), where=name)
    found = _first(name, files.files, lambda file: make(file, guess).columns())
    columns = choose_columns(found, **_asked(options), where=name)
    return FileDataset(files, lambda file: make(file, columns), kind="text", limit=options.limit)


def _asked(options: Options) -> dict[str, str | None]:
    return {
        "column": options.column,
        "messages_column": options.messages_column,
        "id_column": options.id_column,
    }


def _empty(name: str) -> InputError:
    return InputError("This data set has no rows.", where=name, next_step="check that it was written to its end")


def _first(name: str, files: Sequence[DataFile], look: Callable[[DataFile], Any]) -> Any:
    """What the first file that can be read and has a row says; None where none of them has.

    Raises:
        InputError: none of them can be read.
        RunError: as `files.damage`.
    """
    reasons: list[tuple[str, str]] = []
    next_step: str | None = None
    for file in files[:LOOKED_AT]:
        try:
            found = look(file)
        except InputError:
            raise
        except BROKEN as cause:
            reasons.append((file.name, damage(cause, file.name)))
            next_step = cause.next_step if isinstance(cause, Unreadable) else None
        else:
            if found is not None:
                return found
    if len(reasons) == min(len(files), LOOKED_AT):
        if len(reasons) == 1:
            raise InputError(reasons[0][1], where=name, next_step=next_step)
        raise InputError("None of the files can be read.", where=name, faults=[": ".join(pair) for pair in reasons])
    return None


def _typed(name: str, files: Files, options: Options) -> FileDataset:
    def look(file: DataFile) -> tuple[list[str], dict[str, Any]]:
        found = tables.text_reader(file, Columns(None, None)).schema()
        return list(found.names), {field.name: field.type for field in found}

    names, types = _first(name, files.files, look)
    column = options.column
    if column is None and options.messages_column is None and tables.VECTOR in names:
        column = tables.VECTOR
    if column is not None and column in types and tables.is_vectors(types[column]):
        return _vectors(name, files, options, column, names)
    chosen = choose_columns(names, **{**_asked(options), "column": column}, where=name)
    for wanted, fits in ((chosen.text, tables.is_text), (chosen.messages, tables.is_conversation)):
        if wanted in types and not fits(types[wanted]):
            raise InputError(
                f"The column {wanted!r} holds neither texts nor vectors."
                if wanted == chosen.text
                else f"The column {wanted!r} holds no conversations.",
                where=name,
                got=types[wanted],
                expected="texts (string), conversations (lists of structs), or vectors (lists of floats)",
                next_step="name another one: --column NAME or --messages-column NAME",
            )
    return FileDataset(files, lambda file: tables.text_reader(file, chosen), kind="text", limit=options.limit)


def _vectors(name: str, files: Files, options: Options, column: str, names: list[str]) -> FileDataset:
    ids = IDS if options.id_column is None else (options.id_column,)
    if options.id_column is not None:
        choose_columns(names, column=column, messages_column=None, id_column=options.id_column, where=name)

    def look(file: DataFile) -> tuple[int, int | None] | None:
        return tables.first_vector(file, column)

    first = _first(name, files.files, look)
    if first is None:
        raise _empty(name)
    width, layer = first
    site = _agreed([*(_sidecar_site(file) for file in files.files), (name, RecordedSite(None, layer))])
    columns = tables.VectorColumns(column, ids, width, None if site is None else site.layer)
    return FileDataset(
        files,
        lambda file: tables.vector_reader(file, columns),
        kind="vectors",
        width=width,
        site=site,
        limit=options.limit,
    )


def _arrays(name: str, files: Files, options: Options) -> FileDataset:
    options.refuse("messages_column", "id_column", where=name)
    if files.format == "npy":
        options.refuse("column", where=name)

        def find(file: Any, size: int) -> arrays.StoredRows:
            return arrays.npy_rows(file, size)
    else:

        def find(file: Any, size: int) -> arrays.StoredRows:
            return arrays.one_tensor(arrays.safetensors_rows(file, size), options.column, size)

    def told(file: DataFile) -> tuple[str, RecordedSite]:
        try:
            return file.name, RecordedSite(*arrays.steering_site(arrays.ArrayReader(file, find, None).stored()))
        except BROKEN as cause:
            damage(cause, file.name)
            return file.name, RecordedSite(None, None)

    width = _first(name, files.files, lambda file: arrays.ArrayReader(file, find, None).stored().width)
    site = _agreed([*(_sidecar_site(file) for file in files.files), *(told(file) for file in files.files)])
    return FileDataset(
        files,
        lambda file: arrays.ArrayReader(file, find, width),
        kind="vectors",
        width=width,
        site=site,
        limit=options.limit,
    )


def _sidecar_site(file: DataFile) -> tuple[str, RecordedSite]:
    """What the sidecar beside a file of vectors says of their site."""
    beside = file.sibling(SIDECAR_SUFFIX)
    if beside is None:
        return file.name, RecordedSite(None, None)
    try:
        with opened(beside, "") as (stream, _):
            data = stream.read(4 * yaml_io.MAX_BYTES + 1)
    except (NotOpened, OSError) as cause:
        raise SidecarError(damage(cause, beside.name), where=beside.name) from cause
    raw = yaml_io.loads(data, where=beside.name, error=SidecarError)
    base = next((value for _, value in present(raw, "base_checkpoint")), None)
    layer = next((value for _, value in present(raw, "extraction_layer_index")), None)
    return beside.name, RecordedSite(base if isinstance(base, str) else None, layer if type(layer) is int else None)


def _agreed(told: Sequence[tuple[str, RecordedSite]]) -> RecordedSite | None:
    """The one site that all sidecars and columns speak of; None where none says anything.

    Raises:
        InputError: they speak of several.
    """
    values: dict[str, Any] = {}
    for part in ("base_model", "layer"):
        said = {getattr(site, part): where for where, site in reversed(told) if getattr(site, part) is not None}
        if len(said) > 1:
            raise InputError(
                "These vectors are of different sites; a pair reads one.",
                faults=[f"{where} says {part} {value}" for value, where in said.items()],
                next_step="explain them in jobs of their own",
            )
        values[part] = next(iter(said), None)
    return None if set(values.values()) == {None} else RecordedSite(**values)
