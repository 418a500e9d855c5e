"""Data sets of the Hub by their name, streamed through the `datasets` library (extra `data`).

The library knows what the files of a repository mean (splits, configurations, formats that are not read here); it reads
them in larger pieces, so a damaged piece ends the data set with one bad item.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Mapping
from typing import Any

import numpy as np
import pyarrow as pa

from nla_hub.errors import InputError, MissingExtraError
from nla_hub.explain.inputs.dataset import Options
from nla_hub.explain.inputs.items import Item, Kind, RecordedSite, bad, one_line
from nla_hub.explain.inputs.naming import HubName
from nla_hub.explain.inputs.records import IDS, choose_columns
from nla_hub.explain.inputs.tables import LAYER, VECTOR, VectorColumns, as_float32, without_nulls
from nla_hub.hub import HubOptions
from nla_hub.hub.data_files import ask_dataset, dataset_commit, refusal_in

Record = Mapping[str, Any]

DAMAGE = (ValueError, EOFError, pa.ArrowException)
"""What the library raises for contents that are not what their format says, UTF-8 and JSON included."""


class StreamDataset:
    """The rows of one split; see `items.Dataset`."""

    total: int | None = None

    def __init__(
        self,
        name: str,
        rows: Callable[[int], Iterator[Record]],
        pick: Callable[[dict[str, Any], str], Item],
        origin: dict[str, Any],
        *,
        kind: Kind,
        width: int | None = None,
        site: RecordedSite | None = None,
        limit: int | None = None,
    ) -> None:
        self.name = name
        self.rows = rows
        self.pick = pick
        self.origin = origin
        self.kind: Kind = kind
        self.width = width
        self.site = site
        self.limit = limit
        self._read = 0

    def describe(self) -> dict[str, Any]:
        """See `items.Dataset`."""
        return {"kind": self.kind, **self.origin}

    def fraction(self) -> float | None:
        """See `items.Dataset`; known only with a limit."""
        return None if self.limit is None else min(self._read / self.limit, 1.0)

    def items(self, start: int = 0) -> Generator[Item, None, None]:
        """See `items.Dataset`."""
        self._read = start
        source = _Source(self.rows, start, self.origin["repository"], self.origin["commit"])
        while self.limit is None or self._read < self.limit:
            row = source.next()
            if row is None:
                return
            self._read += 1
            where = f"{self.name} row {self._read}"
            if isinstance(row, Exception):
                yield bad(f"The rest of the data set cannot be read: {row}", where)
                return
            yield self.pick({name: _value(value) for name, value in row.items()}, where)


class _Source:
    """The rows from one on; after a broken connection they are asked for again, from where it broke."""

    def __init__(self, rows: Callable[[int], Iterator[Record]], start: int, repo: str, commit: str) -> None:
        self.rows = rows
        self.at = start
        self.repo = repo
        self.commit = commit
        self.iterator: Iterator[Record] | None = None

    def next(self) -> Record | Exception | None:
        """A row, None behind the last one, or what is wrong with the contents from here on."""
        found = ask_dataset(self._step, self.repo, self.commit)
        self.at += 1
        return found

    def _step(self) -> Record | Exception | None:
        if self.iterator is None:
            self.iterator = self.rows(self.at)
        try:
            return next(self.iterator, None)
        except Exception as error:
            self.iterator = None  # what has raised once has ended
            if (refusal := refusal_in(error)) is not None:
                raise refusal from None
            if isinstance(error, DAMAGE) or isinstance(error.__cause__, DAMAGE):
                return error
            raise


def open_stream(name: str, found: HubName, split: str | None, asked: Options, options: HubOptions) -> StreamDataset:
    """The data set of this name at one commit.

    Raises:
        MissingExtraError: the library is not installed.
        InputError: several splits or configurations and none named, one that is not there, columns that are not there.
        HubError: as `hub.data_files.dataset_commit`.
    """
    try:
        import datasets
    except ImportError as cause:
        raise MissingExtraError("datasets", "data", needed_for="A data set of the Hub by its name") from cause
    if split is not None and found.split not in (None, split):
        raise InputError("Two different splits.", where=name, got=f"{found.split!r} and {split!r}")
    configuration, slash, wanted = (split or found.split or "").rpartition("/")
    commit = dataset_commit(found.repo, revision=found.revision, options=options)

    def load() -> Any:
        try:
            return datasets.load_dataset(
                found.repo, configuration or None, revision=commit, streaming=True, token=options.token
            )
        except Exception as error:
            if (refusal := refusal_in(error)) is not None:
                raise refusal from None
            raise InputError(
                f"The datasets library cannot open this: {one_line(error)}",
                where=name,
                next_step=f"name a configuration and split, as in {found.repo}:CONFIGURATION/SPLIT, or the files themselves: "
                f"hf://datasets/{found.repo}/PATH",
            ) from error

    splits = ask_dataset(load, found.repo, commit)
    stream = splits[_one_split(name, list(splits), wanted or None, f"{configuration}{slash}")]
    origin = {"repository": found.repo, "commit": commit, "configuration": configuration or None}
    return from_stream(name, stream, {**origin, "split": str(stream.split)}, asked)


def from_stream(name: str, stream: Any, origin: dict[str, Any], asked: Options) -> StreamDataset:
    """The data set of an IterableDataset, its columns chosen.

    Args:
        origin: what tells these data from others, `repository` and `commit` among it.

    Raises:
        InputError: no row, or no column that holds texts, conversations or vectors.
    """

    def rows(of: Any) -> Callable[[int], Iterator[Record]]:
        return lambda start: iter(of.skip(start) if start else of)

    def first(of: Any) -> Record:
        row = _Source(rows(of), 0, origin["repository"], origin["commit"]).next()
        if row is None or isinstance(row, Exception):
            raise InputError(f"The data set holds no row that can be read{f': {row}' if row else ''}.", where=name)
        return row

    names = list(stream.column_names or first(stream))
    column = asked.column or (VECTOR if VECTOR in names and asked.messages_column is None else None)
    chosen = choose_columns(
        names, column=column, messages_column=asked.messages_column, id_column=asked.id_column, where=name
    )
    stream = stream.select_columns([n for n in (*chosen.names(), *VectorColumns.BESIDE) if n in names])
    row = first(stream)
    vector = _value(row.get(column)) if column is not None else None
    if column is None or not isinstance(vector, np.ndarray):
        return StreamDataset(name, rows(stream), chosen.pick, origin, kind="text", limit=asked.limit)
    layer = recorded if isinstance(recorded := row.get(LAYER), int) else None
    ids = IDS if asked.id_column is None else (asked.id_column,)
    return StreamDataset(
        name,
        rows(stream),
        VectorColumns(column, ids, len(vector), layer).pick,
        origin,
        kind="vectors",
        width=len(vector),
        site=None if layer is None else RecordedSite(None, layer),
        limit=asked.limit,
    )


def _one_split(name: str, splits: list[str], wanted: str | None, before: str) -> str:
    if wanted is None and len(splits) == 1:
        return splits[0]
    if wanted in splits:
        return str(wanted)
    what = "Which split?" if wanted is None else f"There is no split {wanted!r}."
    stem = name.partition(":")[0]
    raise InputError(
        what,
        where=name,
        got=", ".join(splits),
        next_step=f"name one of them: {stem}:{before}{splits[0]}" if splits else "name files: hf://datasets/...",
    )


def _value(value: Any) -> Any:
    """A list of floats as a vector, everything else as it is."""
    if isinstance(value, list) and value and all(isinstance(x, float) for x in value):
        return as_float32(np.array(value))
    return without_nulls(value)
