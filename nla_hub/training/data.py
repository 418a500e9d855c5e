"""Training rows: documents -> positions -> vectors and labels, and the parquet files they are kept in.

The columns are those of the reference's data sets: `activation_vector` (fixed_size_list<float32, d>: variable-length
lists corrupt above 4 GiB), `activation_layer`, `doc_id`, `n_raw_tokens` (position + 1),
`detokenized_text_truncated`, and with labels `api_explanation`. Files are written piece by piece and are there whole or
not at all. Beside a large one lie its vectors once more as they are in memory, to be mapped instead of read: all processes
of a machine share them, and only what is used takes space.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from nla_hub import registry, yaml_io
from nla_hub.batching import pad_id_of
from nla_hub.capture import run_trunk
from nla_hub.errors import RecipeError, RunError, TextError, TrainingError
from nla_hub.loading import Source
from nla_hub.positions import sample_positions
from nla_hub.sidecar import Site
from nla_hub.source_text import Content, Encoded, context_length, encode_source
from nla_hub.training.corpora import Mixture
from nla_hub.training.labelers import Corpus, CorpusDocument, Labeler, LabelRequest
from nla_hub.training.recipe import DataSpec, LabelSpec, Recipe

__all__ = [
    "Captured",
    "TrainingRows",
    "capture_rows",
    "collect",
    "make_labeler",
    "open_corpus",
    "pick_positions",
    "read_rows",
    "write_rows",
    "write_tables",
]

VECTOR, LAYER, DOCUMENT, TOKENS, PREFIX, LABEL = (
    "activation_vector",
    "activation_layer",
    "doc_id",
    "n_raw_tokens",
    "detokenized_text_truncated",
    "api_explanation",
)

MAPPED_SUFFIX = ".f32"
"""Behind a parquet file's name: its vectors, float32 [N, d] row by row, little endian, nothing else."""

MAPPED_BYTES = 2**30
"""Vectors of so many bytes and more are kept to be mapped. A 7B source gives as much in 75,000 rows."""

BATCH_SIZE = 64
"""Documents of a forward pass at most; part of the result, because sums depend on the batch."""


@dataclass(frozen=True)
class TrainingRows:
    """Vectors float32 [N, d] with their labels and provenance."""

    vectors: Tensor
    texts: tuple[str, ...]
    doc_ids: tuple[str, ...]
    positions: tuple[int, ...]
    prefixes: tuple[str, ...]
    site: Site

    def __len__(self) -> int:
        return len(self.texts)

    def __getitem__(self, rows: slice) -> TrainingRows:
        return TrainingRows(
            self.vectors[rows],
            self.texts[rows],
            self.doc_ids[rows],
            self.positions[rows],
            self.prefixes[rows],
            self.site,
        )


# -- from documents ------------------------------------------------------------------------------------------


def pick_positions(encoded: Encoded, doc_id: str, *, n: int, minimum: int, seed: int) -> list[int]:
    """`n` distinct positions of a document (fewer where it is short), at or after `minimum`, no special tokens.

    Chosen by a generator keyed by (seed, doc_id) alone, so that any sharding of a corpus picks the same ones.
    """
    allowed = [i for i in range(len(encoded)) if i >= minimum and not encoded.special[i]]
    return sample_positions(allowed, n, seed, doc_id)


@dataclass(frozen=True)
class Captured:
    """Rows of some documents, before any label.

    Attributes:
        vectors: float32 [N, d].
        doc_ids, positions, prefixes: one a row.
        short: documents without a token to take.
        refused: why documents could not be encoded, one sentence each.
    """

    vectors: Tensor
    doc_ids: tuple[str, ...]
    positions: tuple[int, ...]
    prefixes: tuple[str, ...]
    short: int
    refused: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.doc_ids)


def capture_rows(
    source: Source,
    recipe: Recipe,
    documents: Iterable[tuple[str, Content]],
    *,
    tolerant: bool = False,
    batch_size: int = BATCH_SIZE,
) -> Captured:
    """Vectors at the positions that `recipe.data` asks for, of (doc_id, content) pairs.

    A document is cut after `data.max_tokens` tokens, and where the source ends.

    Args:
        tolerant: a document that cannot be encoded is left out and counted, instead of a TextError; not where the source
            reads no conversation at all.

    Raises:
        TextError: a document that cannot be encoded, by its id. VectorError: the source produced NaN or infinite values.
    """
    limits = [n for n in (context_length(source.loaded.model.config), recipe.data.max_tokens) if n is not None]
    sequences: list[tuple[Sequence[int], Sequence[int]]] = []
    rows: list[tuple[str, int, str]] = []
    refused: list[str] = []
    short = 0
    for doc_id, content in documents:
        try:
            encoded = encode_source(
                source.tokenizer,
                content,
                max_length=min(limits, default=None),
                overflow="truncate",
                where=f"document {doc_id}",
            )[0]
        except TextError as error:
            if not tolerant or (not isinstance(content, str) and not source.tokenizer.chat_template):
                raise
            refused.append(error.one_line())
            continue
        chosen = pick_positions(
            encoded, doc_id, n=recipe.data.positions, minimum=recipe.data.min_position, seed=recipe.seed
        )
        if not chosen:
            short += 1
            continue
        sequences.append((encoded.ids, chosen))
        rows += [(doc_id, p, encoded.text[: encoded.offsets[p][1]]) for p in chosen]
    model = source.loaded
    vectors = run_trunk(
        model.adapter, model.model, recipe.site, sequences, pad_id=pad_id_of(source.tokenizer), batch_size=batch_size
    )
    doc_ids, positions, prefixes = zip(*rows, strict=True) if rows else ((), (), ())
    return Captured(vectors, doc_ids, positions, prefixes, short, tuple(refused))


def label_rows(
    labeler: Labeler | None, rows: int, requests: Callable[[], Sequence[LabelRequest]], *, split: str, documents: int
) -> tuple[list[int], list[str]]:
    """Which of `rows` stay, and their texts: those with an answer; without a labeler all, and their texts are "".

    Raises:
        TrainingError: nothing is left of the split's `documents`.
    """
    labels: Sequence[str | None] = [""] * rows if labeler is None else labeler.label(requests())
    kept = [i for i, text in enumerate(labels) if text or labeler is None]
    if not kept:
        raise TrainingError(
            "No row is left." if labeler is None else "No row with a label is left.",
            where=f"{split}: {documents} documents",
            got=f"{rows} positions, {len(kept)} labels",
            next_step="check data.min_position against the length of the documents, and the labeler",
        )
    return kept, [str(labels[i]) for i in kept]


def requests_for(
    documents: Sequence[CorpusDocument], prefix: str, doc_ids: Sequence[str], prefixes: Sequence[str]
) -> list[LabelRequest]:
    """What is asked of a labeler for rows of `documents`, whose ids are `prefix` and their index."""
    by_id = {f"{prefix}-{i}": document for i, document in enumerate(documents)}
    return [LabelRequest(by_id[doc_id], len(read), read) for doc_id, read in zip(doc_ids, prefixes, strict=True)]


def collect(
    source: Source,
    recipe: Recipe,
    documents: Sequence[CorpusDocument],
    labeler: Labeler | None,
    *,
    prefix: str,
    batch_size: int = BATCH_SIZE,
) -> TrainingRows:
    """Capture and label rows of `documents`; `prefix` names the split in their ids.

    Rows for which the labeler has no answer are left out; without a labeler all stay, and their texts are "". Raises a
    TrainingError where nothing is left.
    """
    named = [(f"{prefix}-{i}", document.content) for i, document in enumerate(documents)]
    found = capture_rows(source, recipe, named, batch_size=batch_size)
    kept, texts = label_rows(
        labeler,
        len(found),
        lambda: requests_for(documents, prefix, found.doc_ids, found.prefixes),
        split=prefix,
        documents=len(documents),
    )
    return TrainingRows(
        vectors=found.vectors[kept],
        texts=tuple(texts),
        doc_ids=tuple(found.doc_ids[i] for i in kept),
        positions=tuple(found.positions[i] for i in kept),
        prefixes=tuple(found.prefixes[i] for i in kept),
        site=recipe.site,
    )


# -- files ---------------------------------------------------------------------------------------------------


def as_table(rows: TrainingRows | Captured, site: Site, texts: Sequence[str] | None = None) -> pa.Table:
    """Rows as the table that their file holds; with `texts` it has a column of labels."""
    d = rows.vectors.shape[1]
    flat = pa.array(rows.vectors.numpy().reshape(-1), type=pa.float32())
    columns = {
        VECTOR: pa.FixedSizeListArray.from_arrays(flat, d),
        LAYER: pa.array([site.layer] * len(rows), pa.int32()),
        DOCUMENT: pa.array(rows.doc_ids, pa.string()),
        TOKENS: pa.array([p + 1 for p in rows.positions], pa.int32()),
        PREFIX: pa.array(rows.prefixes, pa.string()),
    }
    return pa.table(columns if texts is None else {**columns, LABEL: pa.array(texts, pa.string())})


def vectors_of(column: pa.ChunkedArray | pa.Array) -> np.ndarray[Any, np.dtype[np.float32]]:
    """A column of vectors as float32 [N, d]; a view where the column is in one piece."""
    whole = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    values: np.ndarray[Any, np.dtype[np.float32]] = whole.flatten().to_numpy(zero_copy_only=False)
    return values.reshape(-1, whole.type.list_size)


def write_tables(path: Path, schema: pa.Schema, tables: Iterable[pa.Table], *, mapped: bool = False) -> None:
    """Write a parquet file of rows table by table, each a row group; it is there whole or not at all.

    Args:
        mapped: write the vectors beside it too, for `read_rows` to map.

    Raises:
        RunError: it cannot be written.
    """
    beside = path.with_name(path.name + MAPPED_SUFFIX)
    with ExitStack() as stack:
        raw = stack.enter_context(_complete(beside)) if mapped else None
        place = stack.enter_context(_complete(path))
        # Vectors do not repeat: a dictionary of them costs half of the time and saves nothing.
        with pq.ParquetWriter(place, schema, use_dictionary=[DOCUMENT]) as writer:
            for table in tables:
                writer.write_table(table)
                if raw is not None:
                    raw.write(vectors_of(table.column(VECTOR)).tobytes())


@contextmanager
def _complete(path: Path) -> Iterator[Any]:
    """A binary file under another name, flushed to the disk and then renamed; nothing stays of one that failed."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            with temporary.open("wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


@contextmanager
def writing(where: Path) -> Iterator[None]:
    """Raise a RunError in place of what the disk says."""
    try:
        yield
    except OSError as cause:
        raise RunError(
            f"The training data cannot be written: {cause.strerror or cause}.",
            where=where,
            next_step="see to the disk, then run the same command again: it goes on where it stopped",
        ) from cause


def write_meta(path: Path, n: int, meta: dict[str, Any]) -> None:
    """Write the sidecar of a file of `n` rows: `<file>.nla_meta.yaml`."""
    mapping = {"kind": "nla_dataset", "schema_version": 1, "row_count": n, **meta}
    yaml_io.write_text(path.with_name(f"{path.name}.nla_meta.yaml"), yaml_io.dumps(mapping))


def write_rows(path: Path, rows: TrainingRows, *, meta: dict[str, Any]) -> None:
    """Write rows and their sidecar (`<file>.nla_meta.yaml`) atomically; rows without any label get no such column."""
    table = as_table(rows, rows.site, rows.texts if any(rows.texts) else None)
    path.with_name(path.name + MAPPED_SUFFIX).unlink(missing_ok=True)
    write_tables(path, table.schema, [table])
    write_meta(path, len(rows), meta)


def read_rows(path: Path) -> TrainingRows:
    """Read a file of rows; vectors that lie beside it are mapped (a change of the tensor never reaches the file)."""
    schema = pq.read_schema(path)
    d = schema.field(VECTOR).type.list_size
    n = pq.read_metadata(path).num_rows
    beside = path.with_name(path.name + MAPPED_SUFFIX)
    if beside.is_file() and beside.stat().st_size == 4 * n * d > 0:
        vectors = torch.from_file(str(beside), shared=False, size=n * d, dtype=torch.float32).view(n, d)
        table = pq.read_table(path, columns=[name for name in schema.names if name != VECTOR])
    else:
        table = pq.read_table(path)
        vectors = torch.from_numpy(vectors_of(table.column(VECTOR)).copy())
    return TrainingRows(
        vectors=vectors,
        texts=tuple(table.column(LABEL).to_pylist()) if LABEL in table.column_names else ("",) * n,
        doc_ids=tuple(table.column(DOCUMENT).to_pylist()),
        positions=tuple(tokens - 1 for tokens in table.column(TOKENS).to_pylist()),
        prefixes=tuple(table.column(PREFIX).to_pylist()),
        site=Site(int(table.column(LAYER)[0].as_py())),
    )


# -- by name -------------------------------------------------------------------------------------------------


def open_corpus(spec: DataSpec) -> Corpus | Mixture:
    """The corpus of a recipe; nothing is read yet. Raises an UnknownNameError."""
    return Mixture(spec.mix) if spec.corpus is None else registry.corpora.get(spec.corpus)()


def make_labeler(spec: LabelSpec) -> Labeler:
    """The labeler of a recipe, given only the settings that are set.

    Raises:
        UnknownNameError: no such labeler. RecipeError: it does not have these settings.
    """
    kind: Any = registry.labelers.get(spec.labeler)
    try:
        made: Labeler = kind(**spec.settings)
    except TypeError as cause:
        raise RecipeError(
            f"The labeler {spec.labeler!r} cannot be made with these settings: {cause}",
            got=", ".join(f"labels.settings.{name}" for name in spec.settings) or "no setting",
        ) from cause
    return made
