"""Which rows stand on the page: some documents from their beginning, and what is around the worst and best rows.

Documents are drawn by the hash of their id, so a job that grows, a shard of it and a job of another pair over the same
documents show the same ones.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from nla_hub.errors import RunError
from nla_hub.explain.result import read_part
from nla_hub.report.survey import Place, Survey, document_key
from nla_hub.report.tokens import Row

DOCUMENT_ROWS = 600
"""Rows of a drawn document that are shown from its beginning."""

VECTOR_ROWS = 1500
"""Bare vectors that are shown from the first on."""

REACH = 150
"""Characters before and after a listed row's token within which tokens are shown, divided by the samples of a token."""

Key = tuple[int, int]
"""A document on the page: its key, and 0, or one more than its index where an earlier document has the same id."""


@dataclass
class Chosen:
    """One document on the page.

    Attributes:
        index: in the first job that has it.
        doc_id: its id.
        drawn: it was drawn by its hash, and not only for a listed row.
        rows: of each job, in the order of position and sample; empty where a job does not have it.
    """

    index: int
    doc_id: str | None
    drawn: bool
    rows: list[list[Row]]
    centres: list[int] = field(default_factory=list)


@dataclass(frozen=True)
class Choice:
    """What the page shows.

    Attributes:
        documents: the drawn ones first, each kind in the order of the input.
        vectors: bare vectors of each job.
        listed: of each job, index -> row for the places that its survey kept.
    """

    documents: tuple[Chosen, ...]
    vectors: tuple[list[Row], ...]
    listed: tuple[dict[int, Row], ...]


def choose(surveys: Sequence[Survey], *, documents: int) -> Choice:
    """Choose rows of jobs over the same input and read them.

    Raises:
        RunError: the jobs have no document in common, or a part that cannot be read.
    """
    shared = set.intersection(*(set(survey.sketch) for survey in surveys))
    if not shared and any(survey.documents for survey in surveys):
        raise RunError(
            "These jobs have no document in common, so their rows cannot stand side by side.",
            expected="jobs over the same data, matched by doc_id",
            next_step="write a report of each: nla-hub report OUT",
        )
    drawn = set(heapq.nsmallest(documents, shared))
    chosen: dict[Key, Chosen] = {}
    for survey in surveys:
        for key in drawn:
            _add(chosen, survey, survey.sketch[key], len(surveys), drawn=True)
        for place in _places(survey):
            if place.position is not None and place.position >= 0:
                one = _add(chosen, survey, (place.document, place.doc_id), len(surveys), drawn=False)
                if place.char_end is not None:
                    one.centres.append(place.char_end)
    readers = [_Reader(i, survey, chosen) for i, survey in enumerate(surveys)]
    for reader in readers:
        reader.read()
    found = sorted((one for one in chosen.values() if any(one.rows)), key=lambda one: (not one.drawn, one.index))
    return Choice(tuple(found), tuple(r.vectors for r in readers), tuple(r.listed for r in readers))


def _places(survey: Survey) -> list[Place]:
    return [*survey.worst, *survey.best, *survey.unusable, *survey.failed]


def _key(survey: Survey, index: int, doc_id: str | None) -> Key:
    key = document_key(index, doc_id)
    first = survey.sketch.get(key, (index, doc_id))[0]
    return key, 0 if first == index else index + 1


def _add(
    chosen: dict[Key, Chosen], survey: Survey, document: tuple[int, str | None], jobs: int, *, drawn: bool
) -> Chosen:
    return chosen.setdefault(_key(survey, *document), Chosen(*document, drawn, [[] for _ in range(jobs)]))


class _Reader:
    """Reads the chosen rows of one job, of those parts only that hold one."""

    def __init__(self, job: int, survey: Survey, chosen: dict[Key, Chosen]) -> None:
        self.survey = survey
        self.job = job
        self.vectors: list[Row] = []
        self.listed: dict[int, Row] = {}
        self._wanted = {place.row for place in _places(survey)}
        self._documents: dict[int, Chosen] = {}
        for (key, twin), one in chosen.items():
            if twin == 0 and key in survey.sketch:
                self._documents[survey.sketch[key][0]] = one
        for place in _places(survey):
            if (own := chosen.get(_key(survey, place.document, place.doc_id))) is not None:
                self._documents[place.document] = own
        self._needed = sorted({*self._documents, *(place.document for place in _places(survey))})

    def read(self) -> None:
        """Fill the rows of the chosen documents."""
        for part, first, last in self.survey.spans:
            if self._holds(first, last):
                self._read(part)
        for one in self._documents.values():
            one.rows[self.job].sort(key=lambda row: (row["position"], row["sample"] or 0))

    def _holds(self, first: int, last: int) -> bool:
        more_vectors = self.survey.has_vectors and len(self.vectors) < VECTOR_ROWS
        return more_vectors or any(first <= index <= last for index in self._needed)

    def _read(self, part: Path) -> None:
        for row in read_part(part).to_pylist():
            if row["row"] in self._wanted:
                self.listed[row["row"]] = row
            if row["position"] is None or row["position"] < 0:
                if self.survey.has_vectors and (len(self.vectors) < VECTOR_ROWS or row["row"] in self._wanted):
                    self.vectors.append(row)
            elif (document := self._documents.get(row["document"])) is not None and self._shows(document, row):
                document.rows[self.job].append(row)

    def _shows(self, document: Chosen, row: Row) -> bool:
        mine = document.rows[self.job]
        if row["row"] in self._wanted or (document.drawn and len(mine) < DOCUMENT_ROWS):
            return True
        if mine and mine[-1]["position"] == row["position"]:  # further samples of a token that is there
            return True
        end, reach = row["char_end"], REACH // self.survey.samples
        return end is not None and any(abs(end - centre) <= reach for centre in document.centres)
