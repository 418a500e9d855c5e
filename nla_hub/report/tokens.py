"""Tokens of a document: what class each belongs to, and the document's text put together again from their rows.

A row stores the end of the text up to its token, so the text between two explained tokens is known where they are near;
further back only its length is.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

Row = Mapping[str, Any]
"""A row of a job: names of `nla_hub.explain.schema.COLUMNS` to values."""

CLASSES = ("special", "whitespace", "punctuation", "digits", "word start", "word continued", "other scripts")
"""Every token with text is in one: marked special; no visible character; no letter or digit; digits without letters; Latin
letters at the beginning of a word; Latin letters within one; letters of other scripts and pieces of characters."""

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


def token_class(token: str, context: str, *, special: bool) -> str:
    """The one of `CLASSES` that a token is in; `context` is the text up to its end."""
    if special:
        return "special"
    core = token.strip()
    if not core:
        return "whitespace"
    letters = [c for c in core if unicodedata.category(c)[0] in "LM"]
    if REPLACEMENT in core or any(not _latin(c) for c in letters):
        return "other scripts"
    if not letters:
        return "digits" if any(unicodedata.category(c)[0] == "N" for c in core) else "punctuation"
    before = context[: -len(token)] if context.endswith(token) else context[: -len(core)]
    begins = token[0].isspace() or not before or not before[-1].isalnum()
    return "word start" if begins else "word continued"


def _latin(char: str) -> bool:
    return ord(char) < 0x250 or 0x1E00 <= ord(char) < 0x1F00 or 0x300 <= ord(char) < 0x370


@dataclass(frozen=True)
class Gap:
    """So many characters of the document that no row holds."""

    characters: int


@dataclass(frozen=True)
class Token:
    """A token and its rows.

    Attributes:
        text: its part of the document; empty for a token without one (BOS, a piece of a character, a bare vector).
        start, end: where that part stands, in characters; of a bare vector its index.
        order: counts tokens with the same end from 0.
        rows: its rows, one a sample.
    """

    text: str
    start: int
    end: int
    order: int
    rows: tuple[Row, ...]


Piece = str | Gap | Token
"""A document in order: text between tokens, gaps and tokens."""


def pieces(rows: Sequence[Row]) -> Iterator[Piece]:
    """A document from the rows of it that are known, in order of position; each position once, with all its samples."""
    cursor, previous, order = 0, None, 0
    for position, group in groupby(rows, key=lambda row: row["position"]):
        samples = tuple(group)
        end, context = samples[0]["char_end"], samples[0]["context"] or ""
        if end is None or end <= cursor or not context:
            order = order + 1 if previous is not None else 0
            yield Token("", cursor, cursor, order, samples)
            previous = position
            continue
        known = end - len(context)  # from here on the text up to the token's end is at hand
        near = previous is not None and position == previous + 1
        start = max(known, cursor if near else max(cursor, end - _length(samples[0]["token"] or "", context)))
        if (missing := min(known, start) - cursor) > 0:
            yield Gap(missing)
        if between := context[max(cursor, known) - known : start - known]:
            yield between
        yield Token(context[start - known :], start, end, 0, samples)
        cursor, previous, order = end, position, 0


def vectors(rows: Sequence[Row]) -> Iterator[Token]:
    """Bare vectors, which have no text, in order of their index."""
    for index, group in groupby(rows, key=lambda row: row["document"]):
        yield Token("", index, index, 0, tuple(group))


def _length(token: str, context: str) -> int:
    """How many of the last characters of `context` are the token, whose text may lack or add blanks."""
    for form in (token, token.strip()):
        if form and context.endswith(form):
            return len(form)
    return min(max(len(token), 1), len(context))
