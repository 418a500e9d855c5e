"""Training rows: documents -> positions -> vectors and labels, and the parquet files they are kept in.

The columns are those of the reference's data sets: `activation_vector` (fixed_size_list<float32, d>: variable-length
lists corrupt above 4 GiB), `activation_layer`, `doc_id`, `n_raw_tokens` (position + 1),
`detokenized_text_truncated`, and with labels `api_explanation`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from nla_hub import registry, yaml_io
from nla_hub.batching import pad_id_of
from nla_hub.capture import run_trunk
from nla_hub.errors import RecipeError, TrainingError
from nla_hub.loading import Source
from nla_hub.positions import sample_positions
from nla_hub.sidecar import Site
from nla_hub.source_text import Encoded, context_length, encode_source
from nla_hub.training.labelers import Corpus, CorpusDocument, Labeler, LabelRequest
from nla_hub.training.recipe import DataSpec, LabelSpec, Recipe

__all__ = ["TrainingRows", "collect", "make_labeler", "open_corpus", "pick_positions", "read_rows", "write_rows"]

LABEL = "api_explanation"


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


def pick_positions(encoded: Encoded, doc_id: str, *, n: int, minimum: int, seed: int) -> list[int]:
    """`n` distinct positions of a document (fewer where it is short), at or after `minimum`, no special tokens.

    Chosen by a generator keyed by (seed, doc_id) alone, so that any sharding of a corpus picks the same ones.
    """
    allowed = [i for i in range(len(encoded)) if i >= minimum and not encoded.special[i]]
    return sample_positions(allowed, n, seed, doc_id)


def collect(
    source: Source,
    recipe: Recipe,
    documents: Sequence[CorpusDocument],
    labeler: Labeler | None,
    *,
    prefix: str,
    batch_size: int = 64,
) -> TrainingRows:
    """Capture and label rows of `documents`; `prefix` names the split in their ids.

    Rows for which the labeler has no answer are left out; without a labeler all stay, and their texts are "". Raises a
    TrainingError where nothing is left.
    """
    site = recipe.site
    limit = context_length(source.loaded.model.config)
    sequences: list[tuple[Sequence[int], Sequence[int]]] = []
    rows: list[tuple[str, int, str]] = []
    requests: list[LabelRequest] = []
    for i, document in enumerate(documents):
        doc_id = f"{prefix}-{i}"
        encoded = encode_source(
            source.tokenizer, document.content, max_length=limit, overflow="truncate", where=f"document {doc_id}"
        )[0]
        chosen = pick_positions(
            encoded, doc_id, n=recipe.data.positions, minimum=recipe.data.min_position, seed=recipe.seed
        )
        if not chosen:
            continue
        sequences.append((encoded.ids, chosen))
        for p in chosen:
            end = encoded.offsets[p][1]
            rows.append((doc_id, p, encoded.text[:end]))
            requests.append(LabelRequest(document, end))
    labels: list[str | None] = [""] * len(rows) if labeler is None else labeler.label(requests)
    usable = [i for i, text in enumerate(labels) if text or labeler is None]
    if not usable:
        raise TrainingError(
            "No row is left." if labeler is None else "No row with a label is left.",
            where=f"{prefix}: {len(documents)} documents",
            got=f"{len(rows)} positions, {len(usable)} labels",
            next_step="check data.min_position against the length of the documents, and the labeler",
        )
    model = source.loaded
    vectors = run_trunk(
        model.adapter, model.model, site, sequences, pad_id=pad_id_of(source.tokenizer), batch_size=batch_size
    )
    return TrainingRows(
        vectors=vectors[usable],
        texts=tuple(str(labels[i]) for i in usable),
        doc_ids=tuple(rows[i][0] for i in usable),
        positions=tuple(rows[i][1] for i in usable),
        prefixes=tuple(rows[i][2] for i in usable),
        site=site,
    )


def write_rows(path: Path, rows: TrainingRows, *, meta: dict[str, Any]) -> None:
    """Write rows and their sidecar (`<file>.nla_meta.yaml`) atomically; rows without any label get no such column."""
    d = rows.vectors.shape[1]
    flat = pa.array(rows.vectors.numpy().reshape(-1), type=pa.float32())
    columns = {
        "activation_vector": pa.FixedSizeListArray.from_arrays(flat, d),
        "activation_layer": pa.array([rows.site.layer] * len(rows), pa.int32()),
        "doc_id": pa.array(rows.doc_ids, pa.string()),
        "n_raw_tokens": pa.array([p + 1 for p in rows.positions], pa.int32()),
        "detokenized_text_truncated": pa.array(rows.prefixes, pa.string()),
    }
    if any(rows.texts):
        columns[LABEL] = pa.array(rows.texts, pa.string())
    table = pa.table(columns)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    pq.write_table(table, temporary)
    temporary.replace(path)
    mapping = {"kind": "nla_dataset", "schema_version": 1, "row_count": len(rows), **meta}
    yaml_io.write_text(path.with_name(f"{path.name}.nla_meta.yaml"), yaml_io.dumps(mapping))


def read_rows(path: Path) -> TrainingRows:
    """Read what `write_rows` wrote."""
    table = pq.read_table(path)
    column = table.column("activation_vector").combine_chunks()
    d = column.type.list_size
    vectors = torch.from_numpy(column.flatten().to_numpy(zero_copy_only=False).reshape(-1, d).copy())
    return TrainingRows(
        vectors=vectors,
        texts=tuple(table.column(LABEL).to_pylist()) if LABEL in table.column_names else ("",) * len(table),
        doc_ids=tuple(table.column("doc_id").to_pylist()),
        positions=tuple(n - 1 for n in table.column("n_raw_tokens").to_pylist()),
        prefixes=tuple(table.column("detokenized_text_truncated").to_pylist()),
        site=Site(int(table.column("activation_layer")[0].as_py())),
    )


def open_corpus(spec: DataSpec) -> Corpus:
    """The corpus of a recipe; raises an UnknownNameError."""
    return registry.corpora.get(str(spec.corpus))()


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
