"""What the page's script gets: rows, documents, lists and the map as JSON that can stand inside an HTML page."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from nla_hub.report.choice import Choice, Chosen
from nla_hub.report.explanation_map import ExplanationMap
from nla_hub.report.scale import step_of
from nla_hub.report.survey import Place, Survey, fault_of, is_waiting, usable_mse
from nla_hub.report.tokens import Gap, Piece, Row, pieces, vectors

TEXT, TOKEN, NAME, REASON = 1500, 120, 200, 500
"""Characters of an explanation, a token, a document's id and an error's reason that are kept."""

LISTS = ("worst", "best", "unusable", "failed")
"""Names of the lists of rows; each is an attribute of a survey."""


@dataclass(frozen=True)
class Pair:
    """One job on the page: its name, what its errors are divided by, and what was counted."""

    name: str
    denominator: float
    survey: Survey


class Payload:
    """The rows of the page, each once, and what refers to them by index."""

    def __init__(self, pairs: Sequence[Pair], choice: Choice) -> None:
        self.pairs = pairs
        self.rows: list[dict[str, Any]] = []
        self._index: dict[tuple[int, int], int] = {}
        self.documents = [self._document(i, one) for i, one in enumerate(choice.documents)]
        if any(choice.vectors):
            self.documents.append(self._vectors(len(self.documents), choice.vectors))
        self.lists = [self._lists(i, found) for i, found in enumerate(choice.listed)]

    def texts(self) -> dict[str, list[int]]:
        """Every explanation with the rows that say it."""
        found: dict[str, list[int]] = {}
        for i, row in enumerate(self.rows):
            if "x" in row:
                found.setdefault(row["x"], []).append(i)
        return found

    def to_json(self, found: ExplanationMap | None) -> str:
        """JSON in which no `<` stands, so that no text can end the element that holds it.

        Args:
            found: the map of `texts`, None without one.
        """
        data = {
            "pairs": [pair.name for pair in self.pairs],
            "rows": self.rows,
            "documents": self.documents,
            "lists": self.lists,
            "map": None if found is None else self._map(found),
        }
        text = json.dumps(data, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
        return text.encode("utf-8", "replace").decode().replace("<", "\\u003c")

    def _map(self, found: ExplanationMap) -> dict[str, Any]:
        rows_of = list(self.texts().values())
        group_of = {text: i for i, group in enumerate(found.groups) for text in group.members}
        points = []
        for (x, y), text in zip(found.points, found.texts, strict=True):
            rows = rows_of[text]
            points.append([round(float(x), 4), round(float(y), 4), group_of[text], self._state_of(rows), rows])
        groups = []
        for group in found.groups:
            rows = [row for text in group.members for row in rows_of[text]]
            groups.append({"name": group.name, "n": len(rows), "error": finite(self._mean(rows))})
        return {"points": points, "groups": groups}

    def _mean(self, rows: Iterable[int]) -> float | None:
        errors = [e for row in rows if (e := self.rows[row].get("v")) is not None]
        return sum(errors) / len(errors) if errors else None

    def _state_of(self, rows: Sequence[int]) -> str:
        """The class of the colour or pattern of several rows together: that of their mean error."""
        mean = self._mean(rows)
        return str(self.rows[rows[0]]["z"]) if mean is None else f"e{step_of(mean)}"

    def _document(self, i: int, one: Chosen) -> dict[str, Any]:
        columns = [
            [self._piece(piece, i, job) for piece in pieces(rows)] if rows else None
            for job, rows in enumerate(one.rows)
        ]
        title = shown(one.doc_id, NAME) if one.doc_id is not None else f"document {one.index}"
        return {"title": title, "whole": one.drawn, "same": _same_text(one.rows), "columns": columns}

    def _vectors(self, i: int, jobs: Sequence[Sequence[Row]]) -> dict[str, Any]:
        columns = [
            [self._piece(piece, i, job) for piece in vectors(rows)] if rows else None for job, rows in enumerate(jobs)
        ]
        return {"title": "Vectors without a text", "whole": True, "same": True, "columns": columns}

    def _piece(self, piece: Piece, document: int, job: int) -> Any:
        if isinstance(piece, str):
            return piece
        if isinstance(piece, Gap):
            return piece.characters
        rows = [self._row(row, document, job) for row in piece.rows]
        return [piece.text, piece.start, piece.end, piece.order, self._state_of(rows), rows]

    def _error(self, row: Row, job: int) -> float | None:
        mse = usable_mse(row)
        return None if mse is None else mse / self.pairs[job].denominator

    def _row(self, row: Row, document: int, job: int) -> int:
        key = (job, row["row"])
        if key in self._index:
            return self._index[key]
        error = self._error(row, job)
        fault = fault_of(row)
        record = {
            "r": row["row"],
            "d": document if document >= 0 else None,
            "k": shown(_label(row), TOKEN),
            "h": shown(row["doc_id"], NAME) if document < 0 and row["doc_id"] is not None else None,
            "p": row["position"] if row["position"] is not None and row["position"] >= 0 else None,
            "x": None if row["text"] is None else shown(row["text"], TEXT),
            "w": shown(row["raw"], TEXT) if row["text"] is None and row["raw"] else None,
            "s": row["status"] if row["status"] != "ok" else None,
            "m": None if fault is None else shown(fault, REASON),
            "y": row["copy_of"] if is_waiting(row) else None,
            "v": finite(error),
            "c": finite(row["cosine"]),
            "n": finite(row["norm"]),
            "f": list(row["flags"] or ()) or None,
            "i": row["sample"] or None,
            "z": _state_without_score(row) if error is None else f"e{step_of(error)}",
        }
        self._index[key] = len(self.rows)
        self.rows.append({name: value for name, value in record.items() if value is not None})
        return self._index[key]

    def _lists(self, job: int, found: dict[int, Row]) -> dict[str, list[int]]:
        survey = self.pairs[job].survey
        return {name: self._places(job, getattr(survey, name), found) for name in LISTS}

    def _places(self, job: int, places: Iterable[Place], found: dict[int, Row]) -> list[int]:
        return [self._row(found[place.row], -1, job) for place in places if place.row in found]


def shown(text: str, at_most: int) -> str:
    """A text that may be long: its beginning, and that it goes on."""
    return text if len(text) <= at_most else f"{text[:at_most]} \N{HORIZONTAL ELLIPSIS}"


def finite(value: float | None) -> float | None:
    """A figure with the digits that are shown; None for one that is no number."""
    return float(f"{value:.5g}") if value is not None and math.isfinite(value) else None


def _label(row: Row) -> str:
    if row["token"] is not None and row["position"] is not None and row["position"] >= 0:
        return str(row["token"])
    return str(row["doc_id"]) if row["doc_id"] is not None else f"vector {row['document']}"


def _state_without_score(row: Row) -> str:
    if is_waiting(row):
        return "waiting"
    if row["status"] is None:
        return "failed"
    return "unscored" if row["status"] == "ok" else "unusable"


def _same_text(jobs: Sequence[Sequence[Row]]) -> bool:
    """Whether all jobs read the same text, as far as their rows hold it: models may render a conversation differently."""
    known: dict[int, str] = {}
    for rows in jobs:
        for row in rows:
            end, context = row["char_end"], row["context"] or ""
            if end is None or not context:
                continue
            other = known.setdefault(end, context)
            size = min(len(other), len(context))
            if other[-size:] != context[-size:]:
                return False
    return True
