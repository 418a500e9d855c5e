"""Documents -> shards of vectors, made by all processes -> one file of rows a split, made by the main one.

Documents are cut into blocks that depend on the corpus alone, and nothing of one block meets another: a forward pass never
spans two of them. A block is done when its shard is there, so any number of processes make the same shards, and a run that
was killed goes on with those it has. Labels are asked for when all vectors are there, in all processes where the labeler
divides them.
"""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from math import ceil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from nla_hub import yaml_io
from nla_hub.batching import halvings
from nla_hub.errors import RunError, TrainingError
from nla_hub.loading import Source
from nla_hub.source_text import Content
from nla_hub.training.corpora import REASONS, Mixture, content_key, require_few_bad
from nla_hub.training.data import (
    DOCUMENT,
    LABEL,
    MAPPED_BYTES,
    PREFIX,
    VECTOR,
    as_table,
    capture_rows,
    label_rows,
    open_corpus,
    requests_for,
    write_meta,
    write_tables,
    writing,
)
from nla_hub.training.gathering import INDEX_NAME, Gathered, gather, kept_documents, parsed
from nla_hub.training.labelers import Block as LabelBlock
from nla_hub.training.labelers import DividedLabeler, Labeler, LabelRequest
from nla_hub.training.recipe import Recipe
from nla_hub.training.splits import (
    EVALUATION_NAME,
    UNLABELLED,
    data_splits,
    evaluation_documents,
    require_dev_held_out,
    split_documents,
    splitter_of,
    training_documents,
    wanted_documents,
)

BLOCK = 128
"""Documents of a block of a mixture: of a 70B source 40 MB of vectors, a few seconds of work to lose."""

FACTS = b"nla_hub"
"""Key of a shard's own metadata."""

Report = Callable[[dict[str, Any]], None]


@dataclass(frozen=True)
class KeptText:
    """What a labeler sees of a document of a mixture: its rendered text up to a token."""

    content: str


@dataclass(frozen=True)
class Block:
    """Some documents of a split that are read together; `load` gives their ids and contents."""

    split: str
    number: int
    load: Callable[[], list[tuple[str, Content]]]


class Extraction:
    """What the data stage of a run makes, step by step; see `data_stage` for their order.

    Args:
        recipe: the run's.
        state: a directory for what is continued from.
        result: where finished files go.
        mapped_bytes: see `data.MAPPED_BYTES`.
    """

    def __init__(self, recipe: Recipe, state: Path, result: Path, *, mapped_bytes: int = MAPPED_BYTES) -> None:
        self.recipe = recipe
        self.documents = state / "documents"
        self.shards = state / "shards"
        self._stop = state / "stop"
        self.result = result
        self.mapped_bytes = mapped_bytes
        self.mixture = corpus if isinstance(corpus := open_corpus(recipe.data), Mixture) else None

    # -- documents -------------------------------------------------------------------------------------------

    def begin(self) -> int:
        """Everything that the main process does before vectors are made; how many documents the evaluation has."""
        self.gather()
        return self.keep_documents()

    def gather(self) -> None:
        """Read the mixture, if there is one; what an attempt left that failed is removed. In the main process."""
        for leftover in (self._stop, *self.shards.glob(".*.tmp")):
            leftover.unlink(missing_ok=True)
        self.gathered  # noqa: B018  # read here, and known from now on
        if self.mixture is None:
            require_dev_held_out(self.recipe)

    @cached_property
    def gathered(self) -> Gathered:
        """The documents of each split; of a mixture they are on the disk."""
        if self.mixture is None:
            return Gathered(data_splits(self.recipe), [])
        return gather(self.mixture, splitter_of(self.recipe), wanted_documents(self.recipe), self.documents)

    def blocks(self) -> Iterator[Block]:
        """The blocks of all splits that have rows. A registered corpus has one a split: its documents are objects."""
        for split, n in data_splits(self.recipe).items():
            if self.mixture is None:

                def load(split: str = split, n: int = n) -> list[tuple[str, Content]]:
                    documents = split_documents(self.recipe, split, n)
                    return [(f"{split}-{i}", document.content) for i, document in enumerate(documents)]

                yield Block(split, 0, load)
                continue
            for number, lines in enumerate(kept_documents(self.documents, split, BLOCK)):
                yield Block(split, number, lambda lines=lines: [parsed(line) for line in lines])  # type: ignore[misc]

    # -- vectors ---------------------------------------------------------------------------------------------

    def extract(
        self, source: Callable[[], Source], *, rank: int = 0, world: int = 1, report: Report | None = None
    ) -> None:
        """Make the shards of each `world`-th block from the `rank`-th on, those that are not there yet.

        Ends early where another process has failed.

        Raises:
            RunError: the disk is full. InputError: too many documents cannot be encoded.
            TextError, VectorError: see `data.capture_rows`.
        """
        refused: Counter[str] = Counter()
        with self._stopping_others():
            for turn, block in enumerate(self.blocks()):
                if self._stop.is_file():
                    return
                if turn % world == rank and not self._is_done(block):
                    reasons = self._make(block, source())
                    refused[block.split] += len(reasons)
                    self._require_readable(block.split, refused[block.split], reasons)
                    if report is not None and self.mixture is not None:
                        n = self.gathered.documents[block.split]
                        report({"extracting": block.split, "documents": min((block.number + 1) * BLOCK, n), "of": n})

    @contextmanager
    def _stopping_others(self) -> Iterator[None]:
        """Where this process fails, the others end early."""
        try:
            yield
        except Exception:
            with suppress(OSError):  # a full disk: the others find out when all have come to their end
                self._stop.parent.mkdir(parents=True, exist_ok=True)
                self._stop.touch()
            raise

    def _require_readable(self, split: str, refused: int, reasons: Sequence[str]) -> None:
        """Raise an InputError where too many documents of a split cannot be encoded, whatever comes of the others."""
        require_few_bad(refused, self.gathered.documents[split], reasons[:REASONS], where=f"documents of {split}")

    def _shard(self, split: str, number: int) -> Path:
        return self.shards / f"{split}-{number:06d}.parquet"

    def _is_done(self, block: Block) -> bool:
        path = self._shard(block.split, block.number)
        try:
            pq.read_metadata(path)
        except (OSError, pa.ArrowInvalid):  # not there, or not all of it after a crash of the machine
            return False
        return True

    def _make(self, block: Block, source: Source) -> tuple[str, ...]:
        """Write the shard of a block; why documents were left out."""
        with halvings() as halved:
            found = capture_rows(source, self.recipe, block.load(), tolerant=self.mixture is not None)
        facts = {"short": found.short, "refused": found.refused, "halvings": len(halved)}
        table = as_table(found, self.recipe.site)
        table = table.replace_schema_metadata({FACTS: json.dumps(facts)})
        write_tables(self._shard(block.split, block.number), table.schema, [table])
        return found.refused

    # -- labels ----------------------------------------------------------------------------------------------

    def label_requests(self) -> Iterator[LabelRequest]:
        """What is asked of a labeler for the rows of all splits that have labels, in a fixed order.

        Raises:
            RunError: a shard is missing.
        """
        for split in data_splits(self.recipe):
            if split in UNLABELLED:
                continue
            for path in self._shards_of(split):
                asked = pq.read_table(path, columns=[DOCUMENT, PREFIX])
                yield from self._requests(split, asked.column(DOCUMENT).to_pylist(), asked.column(PREFIX).to_pylist())

    def answer(
        self, labeler: DividedLabeler, share: Sequence[LabelBlock], attempt: int, *, rank: int = 0, world: int = 1
    ) -> None:
        """Have some blocks of a labeler's plan answered. Ends early where another process has failed.

        Raises:
            What the labeler raises.
        """
        with self._stopping_others():
            stored = labeler.answer_share(share, self.label_requests(), attempt, rank=rank, world=world)
            with closing(stored):  # type: ignore[type-var]
                for _ in stored:
                    if self._stop.is_file():
                        return

    # -- rows ------------------------------------------------------------------------------------------------

    def merge(self, split: str, labeler: Labeler | None, meta: dict[str, Any]) -> dict[str, int]:
        """Put the shards of a split together, with labels where there is a labeler; what was counted, `rows` among it.

        Raises:
            RunError: a shard is missing. InputError: too many documents could not be encoded.
            TrainingError: no row is left.
        """
        n, shards = self.gathered.documents[split], self._shards_of(split)
        counts = self._facts(split, n, shards)
        asked = pa.concat_tables([pq.read_table(path, columns=[DOCUMENT, PREFIX]) for path in shards])
        kept, texts = label_rows(
            labeler,
            len(asked),
            lambda: self._requests(split, asked.column(DOCUMENT).to_pylist(), asked.column(PREFIX).to_pylist()),
            split=split,
            documents=n,
        )
        schema = pq.read_schema(shards[0]).remove_metadata()
        if labeler is not None:
            schema = schema.append(pa.field(LABEL, pa.string()))
        size = 4 * len(kept) * schema.field(VECTOR).type.list_size
        path = self.result / f"{split}.parquet"
        tables = _filled(shards, schema, np.array(kept), texts if labeler is not None else None)
        write_tables(path, schema, tables, mapped=size >= self.mapped_bytes)
        write_meta(path, len(kept), {**meta, **({"mix": self._origin()} if self.mixture is not None else {})})
        counts |= {"rows": len(kept), "without_label": len(asked) - len(kept)}
        return counts

    def _shards_of(self, split: str) -> list[Path]:
        """The shards of a split, in order; a RunError where one is missing."""
        n = 1 if self.mixture is None else ceil(self.gathered.documents[split] / BLOCK)
        shards = [self._shard(split, i) for i in range(n)]
        if missing := [path.name for path in shards if not path.is_file()]:
            raise RunError(
                f"{len(missing)} blocks of vectors are not there.",
                where=self.shards,
                got=", ".join(missing[:5]),
                expected="what every process wrote",
                next_step="let all machines see the same run directory",
            )
        return shards

    def _facts(self, split: str, n: int, shards: Sequence[Path]) -> dict[str, int]:
        """What was counted in the shards of a split of `n` documents."""
        facts = [json.loads(pq.read_schema(path).metadata[FACTS]) for path in shards]
        refused = [reason for fact in facts for reason in fact["refused"]]
        self._require_readable(split, len(refused), refused)
        counts = {name: sum(fact[name] for fact in facts) for name in ("short", "halvings")}
        return {"documents": n, "refused": len(refused), **counts}

    def _requests(self, split: str, doc_ids: Sequence[str], prefixes: Sequence[str]) -> list[LabelRequest]:
        if self.mixture is not None:
            return [LabelRequest(KeptText(text), len(text), text) for text in prefixes]
        documents = split_documents(self.recipe, split, data_splits(self.recipe)[split])
        return requests_for(documents, split, doc_ids, prefixes)

    def _origin(self) -> list[dict[str, Any]]:
        """Where the documents of a mixture come from."""
        pairs = zip(self.recipe.data.mix, self.gathered.parts, strict=True)
        return [
            {"data": part.data, "weight": part.weight, "documents": found["given"], "identity": found["identity"]}
            for part, found in pairs
        ]

    # -- documents that are kept -----------------------------------------------------------------------------

    def keep_documents(self) -> int:
        """Put held-out documents for the evaluation beside the rows, and the index of a mixture; how many there are.

        Raises:
            TrainingError: a registered corpus has too few that are not trained on.
        """
        evaluation = evaluation_documents(self.recipe)
        target = self.result / EVALUATION_NAME
        with writing(self.result):
            self.result.mkdir(parents=True, exist_ok=True)
            if self.mixture is not None:
                shutil.copyfile(self.documents / INDEX_NAME, self.result / INDEX_NAME)
            if evaluation is None:
                return 0
            if self.mixture is not None:
                shutil.copyfile(self.documents / EVALUATION_NAME, target)
                return self.gathered.documents["eval"]
        seen = {content_key(content) for content in training_documents(self.recipe)}
        lines = []
        for i, document in enumerate(split_documents(self.recipe, "eval", evaluation.most)):
            if (key := content_key(document.content)) not in seen:
                seen.add(key)
                kind = "text" if isinstance(document.content, str) else "messages"
                lines.append(json.dumps({"doc_id": f"eval-{i}", kind: document.content}) + "\n")
        if len(lines) < evaluation.least:
            raise TrainingError(
                "The corpus has too few documents that are not trained on.",
                where=f"data.corpus {self.recipe.data.corpus}",
                got=f"{len(lines)} for the evaluation",
                expected=evaluation.least,
                next_step=f"lower {evaluation.setting}",
            )
        with writing(target):
            yaml_io.write_text(target, "".join(lines))
        return len(lines)


def _filled(
    shards: Sequence[Path], schema: pa.Schema, kept: np.ndarray[Any, np.dtype[np.int64]], texts: Sequence[str] | None
) -> Iterator[pa.Table]:
    """The rows `kept` (ascending, counted over all shards) of each shard, with their labels if they have any."""
    begin = first = 0
    for path in shards:
        table = pq.read_table(path)
        end = begin + len(table)
        last = int(np.searchsorted(kept, end))
        table = table.take(kept[first:last] - begin)
        if texts is not None:
            table = table.append_column(LABEL, pa.array(texts[first:last], pa.string()))
        if len(table):
            yield table.cast(schema)
        begin, first = end, last
