"""A block -> its rows explained: the one way, whichever process or machine does it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import PurePath
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from nla_hub.batching import halvings
from nla_hub.capture import Activations
from nla_hub.errors import InputError
from nla_hub.explain.rows import Block, PlannedRow
from nla_hub.explain.schema import schema, vector_schema
from nla_hub.explain.settings import JobSettings
from nla_hub.geometry import bad_rows, unit
from nla_hub.nla import NLA
from nla_hub.results import COLUMNS, Explanation, Scores
from nla_hub.sampling import BARE_POSITION, RowKey

WINDOW_BYTES = 256 * 2**20
"""Vectors that are held at once where parts of the pair take turns in memory: with one load of each part a window, loading a 7B
trio takes its half minute for some 20,000 vectors of width 3584."""

MOST_BLOCKS = 64


@dataclass(frozen=True)
class BlockResult:
    """What became of a block.

    Attributes:
        rows: its part, `schema.schema()`.
        vectors: `schema.vector_schema(d)`, where they were asked for.
        computed: rows for which the pair had something to do.
        backed_off: memory did not suffice for the job's batch: these rows equal those of another run, but need not be
            identical in every byte.
    """

    index: int
    rows: pa.Table
    vectors: pa.Table | None = None
    computed: int = 0
    backed_off: bool = False


@dataclass
class _State:
    """A block on its way: the rows that have a vector, and what was made of those that are no copies."""

    block: Block
    kept: list[PlannedRow]
    kept_vectors: Tensor
    faults: dict[int, str]
    rows: list[PlannedRow] = field(init=False)
    vectors: Tensor = field(init=False)
    found: list[Explanation] | None = None
    scores: Scores | None = None
    backed_off: bool = False

    def __post_init__(self) -> None:
        new = [i for i, row in enumerate(self.kept) if row.copy_of is None]
        self.rows = [self.kept[i] for i in new]
        self.vectors = self.kept_vectors[new]


@dataclass(frozen=True)
class BlockWorker:
    """A loaded pair and the settings of a job.

    Attributes:
        batch_size: rows that the engine runs together.
        from_source: vectors of the input were captured at the pair's own site.
    """

    nla: NLA
    settings: JobSettings
    batch_size: int
    from_source: bool = False

    def run(self, blocks: Sequence[Block]) -> list[BlockResult]:
        """The results of some blocks: all are captured, then all verbalized, then all scored."""
        states = [self._staged(self._captured, block) for block in blocks]
        for state in states:
            self._again(state, self._verbalized)
        for state in states:
            self._again(state, self._scored)
        return [self._result(state) for state in states]

    @property
    def _model(self) -> str:
        """What the rows call the AV: a directory by its name alone, which is the same wherever it lies."""
        name = self.nla.av.name
        return PurePath(name).name if PurePath(name).is_absolute() else name

    def _staged(self, stage: Callable[[Block], _State], block: Block) -> _State:
        with halvings() as seen:
            state = stage(block)
        state.backed_off = bool(seen)
        return state

    def _again(self, state: _State, stage: Callable[[_State], None]) -> None:
        with halvings() as seen:
            stage(state)
        state.backed_off |= bool(seen)

    def _captured(self, block: Block) -> _State:
        rows = [row for row in block.rows if row.source >= 0]
        if block.vectors:
            vectors = torch.from_numpy(np.stack([block.vectors[row.source] for row in rows]))
        elif rows:
            vectors = self._read(block, rows)
        else:
            vectors = torch.empty(0, self.nla.d_model)
        bad = bad_rows(vectors)
        faults = {rows[i].row: f"The model's own vector is {fault}." for i, fault in bad.items()}
        good = [i for i in range(len(rows)) if i not in bad]
        return _State(block, [rows[i] for i in good], vectors[good], faults)

    def _read(self, block: Block, rows: Sequence[PlannedRow]) -> Tensor:
        """Vectors of rows [N, d]; each position of each document once, however many samples it has."""
        wanted: list[dict[int, None]] = [{} for _ in block.sequences]
        for row in rows:
            wanted[row.source][row.read] = None
        sequences = [(ids.tolist(), list(reads)) for ids, reads in zip(block.sequences, wanted, strict=True)]
        vectors = self.nla.capture_ids(sequences, check=False)
        places = [(source, read) for source, reads in enumerate(wanted) for read in reads]
        index = {place: i for i, place in enumerate(places)}
        return vectors[[index[row.source, row.read] for row in rows]]

    def _verbalized(self, state: _State) -> None:
        settings, rows = self.settings, state.rows
        keys = [RowKey(row.hash, BARE_POSITION if row.token is None else _position(row), row.sample) for row in rows]
        common: dict[str, Any] = {
            "temperature": settings.temperature,
            "max_new_tokens": settings.max_new_tokens,
            "seed": settings.seed,
            "batch_size": self.batch_size,
            "show_progress_bar": False,
        }
        if not rows:
            state.found = []
        elif state.block.vectors and not self.from_source:
            state.found = self.nla.verbalize(state.vectors, keys=keys, **common)
        else:
            state.found = self.nla.verbalize(self._activations(state, keys), **common)

    def _activations(self, state: _State, keys: Sequence[RowKey]) -> Activations:
        rows = state.rows
        return Activations(
            vectors=state.vectors,
            position=tuple(_position(row) for row in rows),
            doc_id=tuple(row.doc_id for row in rows),
            token=tuple(row.token or "" for row in rows),
            special=tuple(row.special for row in rows),
            keys=tuple(keys),
            document=tuple(row.document for row in rows),
            char_end=tuple(row.char_end or 0 for row in rows),
            site=self.nla.site,
            base_model=str(self.nla.sidecar.base_model),
            read=tuple(row.read if row.token is not None else _position(row) for row in rows),
            context=tuple(row.context or "" for row in rows),
        )

    def _scored(self, state: _State) -> None:
        assert state.found is not None
        if not state.found:
            return
        try:
            state.scores = self.nla.score(state.found, state.vectors)
        except InputError:  # a text that the AR cannot read must not cost the others their scores
            single = [self._score_alone(state, i) for i in range(len(state.found))]
            state.scores = Scores(tuple(c for c, _ in single), tuple(m for _, m in single))

    def _score_alone(self, state: _State, i: int) -> tuple[float | None, float | None]:
        assert state.found is not None
        try:
            scores = self.nla.score([state.found[i]], state.vectors[i : i + 1])
        except InputError as error:
            state.faults[state.rows[i].row] = f"Not scored: {error.one_line()}"
            return None, None
        return scores.cosine[0], scores.mse[0]

    def _result(self, state: _State) -> BlockResult:
        explained: dict[int, dict[str, Any]] = {}
        assert state.found is not None
        for i, (row, found) in enumerate(zip(state.rows, state.found, strict=True)):
            values = found.to_dict() | {"model": self._model}
            if state.scores is not None:
                values |= {"cosine": state.scores.cosine[i], "mse": state.scores.mse[i]}
            explained[row.row] = values
        records = [_record(row, explained.get(row.row), state.faults.get(row.row)) for row in state.block.rows]
        table = pa.Table.from_pylist(records, schema=schema())
        if self.nla.reference is None:
            table = table.replace_schema_metadata(in_sample_metadata(state.kept_vectors))
        vectors = _vector_table(state, self.nla.d_model) if self.settings.keep_vectors else None
        return BlockResult(state.block.index, table, vectors, len(state.rows), state.backed_off)


def failed(block: Block, reason: str, *, width: int | None = None) -> BlockResult:
    """A block that could not be computed: every row of it that should have been is in error.

    Args:
        width: of the vectors, where they are kept; there are none then, which is written too.
    """
    lost = [row.source >= 0 and row.copy_of is None for row in block.rows]
    records = [_record(row, None, reason if gone else None) for row, gone in zip(block.rows, lost, strict=True)]
    vectors = None if width is None else vector_schema(width).empty_table()
    return BlockResult(block.index, pa.Table.from_pylist(records, schema=schema()), vectors)


def _position(row: PlannedRow) -> int:
    """Of a row that has a vector."""
    assert row.position is not None
    return row.position


def _record(row: PlannedRow, found: Mapping[str, Any] | None, fault: str | None) -> dict[str, Any]:
    """A row as the part has it: what was known before, and what was found."""
    values: dict[str, Any] = dict.fromkeys(COLUMNS) if found is None else dict(found)
    return {
        **values,
        "row": row.row,
        "document": row.document,
        "doc_id": row.doc_id,
        "position": row.position,
        "token": row.token,
        "sample": row.sample,
        "flags": values["flags"] or [],
        "context": row.context,
        "char_end": row.char_end,
        "copy_of": row.copy_of,
        "error": row.error or fault,
    }


def _vector_table(state: _State, d: int) -> pa.Table:
    flat = pa.array(state.kept_vectors.contiguous().numpy().reshape(-1), type=pa.float32())
    rows = pa.array([row.row for row in state.kept], pa.int64())
    return pa.table([rows, pa.FixedSizeListArray.from_arrays(flat, d)], schema=vector_schema(d))


# -- vectors of a job whose pair has no reference --------------------------------------------------------------

IN_SAMPLE = b"nla_hub.sum_of_unit_vectors"
"""Metadata of a part: the sum of its unit vectors, float64 [d], behind their number, float64."""


def in_sample_metadata(vectors: Tensor) -> dict[bytes, bytes]:
    """What a reference measured on the job itself needs of a block."""
    total = unit(vectors).sum(dim=0).numpy() if len(vectors) else np.zeros(vectors.shape[1])
    return {IN_SAMPLE: np.concatenate([[float(len(vectors))], total]).astype("<f8").tobytes()}


def batch_size_for(nla: NLA, settings: JobSettings) -> int:
    """Rows that the engine runs together where nobody says: what fits now, a block at most."""
    return min(settings.block, nla.av.fitting_rows(settings.max_new_tokens))


def window(nla: NLA, settings: JobSettings) -> int:
    """Blocks that a worker takes at once: one where every part stays in memory."""
    if nla.memory != "staged":
        return 1
    return max(1, min(MOST_BLOCKS, WINDOW_BYTES // (4 * nla.d_model * settings.block)))
