"""Which tokens of a text: the words and forms that `positions` may have, one meaning for SDK and command line."""

from __future__ import annotations

import hashlib
import operator
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from nla_hub.errors import PositionError
from nla_hub.sampling import document_hash
from nla_hub.source_text import Encoded

Positions = int | Sequence[int] | slice | str | Callable[[Encoded], Sequence[int]]
"""An index (negative counts from the end), several, a slice, a word, or a function from the encoded text to indices."""

WORDS = ("last", "all", "user", "assistant", "every:N", "sample:K", "regex:PATTERN")
"""Words: the last token; every token; those of a role's messages; each N-th from the first on; K at random, chosen by the
seed and the document alone, special tokens left out; those of which a character lies in a match in the rendered text."""


def select_positions(encoded: Encoded, positions: Positions, *, where: str = "text", seed: int = 0) -> list[int]:
    """The indices (into this piece) that `positions` names, in order; none where a slice or pattern meets no token.

    Args:
        seed: of "sample:K".

    Raises:
        PositionError: out of range, unknown word, or a role that the text does not have.
    """
    n = len(encoded)
    if isinstance(positions, str):
        return _of_word(encoded, positions, where, seed)
    if isinstance(positions, slice):
        try:
            return list(range(n))[positions]
        except (TypeError, ValueError) as cause:
            raise PositionError(f"This slice cannot be used: {cause}.", where=where, got=repr(positions)) from cause
    if callable(positions):
        positions = positions(encoded)
    chosen = []
    for p in _several(positions):
        try:
            index = operator.index(p)
        except TypeError:
            index = None
        if index is None or isinstance(p, bool):
            raise PositionError("A position is a whole number.", where=where, got=repr(p))
        if not -n <= index < n:
            raise PositionError(
                "The text has no such token.",
                where=where,
                got=f"position {index}",
                expected=f"0 to {n - 1} (or -{n} to -1); BOS is position 0",
            )
        chosen.append(index % n)
    return chosen


def select_in_pieces(
    pieces: Sequence[Encoded], positions: Positions, *, where: str = "text", seed: int = 0
) -> list[list[int]]:
    """The indices that `positions` names in each piece of a text; see `select_positions`.

    Each piece is read by itself (overflow="stride"), so "last" or 5 is meant in each. A piece without such a token gives none,
    unless all are without it.

    Raises:
        PositionError: no piece has them.
    """
    found: list[list[int]] = []
    failure: PositionError | None = None
    for piece in pieces:
        try:
            found.append(select_positions(piece, positions, where=where, seed=seed))
        except PositionError as error:
            found.append([])
            failure = failure or error
    if failure is not None and not any(found):
        raise failure
    return found


def check_word(word: str) -> None:
    """Raise a PositionError for a text that is none of `WORDS`; no text has to be at hand."""
    if word in ("last", "all", "user", "assistant"):
        return
    name, colon, value = word.partition(":")
    if colon and name in ("every", "sample"):
        if not value.isascii() or not value.isdigit() or int(value) < 1:
            raise PositionError(
                f"{name}: takes a whole number from 1 up.", got=repr(word), next_step=f'for example "{name}:10"'
            )
    elif colon and name == "regex":
        try:
            re.compile(value)
        except re.error as cause:
            raise PositionError(f"This is no regular expression: {cause}.", got=repr(value)) from cause
        if not value:
            raise PositionError("regex: takes a pattern.", got=repr(word), next_step=r'for example "regex:\bcat\b"')
    else:
        raise PositionError("Unknown word for positions.", got=repr(word), expected=", ".join(map(repr, WORDS)))


def _of_word(encoded: Encoded, word: str, where: str, seed: int) -> list[int]:
    n = len(encoded)
    if word == "last":
        return [n - 1]
    if word == "all":
        return list(range(n))
    if word in ("user", "assistant"):
        found = [i for i, role in enumerate(encoded.roles) if role == word]
        if not found:
            raise PositionError(
                f"The text has no {word} message.",
                where=where,
                next_step='pass messages ([{"role": ..., "content": ...}]), or positions="all"',
            )
        return found
    try:
        check_word(word)
    except PositionError as error:
        error.where = where
        raise
    name, _, value = word.partition(":")
    if name == "every":
        return list(range(0, n, int(value)))
    if name == "sample":
        allowed = [i for i in range(n) if not encoded.special[i]]
        return sample_positions(allowed, int(value), seed, f"{document_hash(encoded.text)}\x1f{encoded.start}")
    return _matching(encoded, value)


def sample_positions(allowed: Iterable[int], n: int, seed: int, document: str) -> list[int]:
    """`n` distinct ones of `allowed` in order (all, where there are fewer).

    Chosen by a generator keyed by (seed, document) alone, so that any sharding of a corpus picks the same ones.
    """
    places = list(allowed)
    if len(places) <= n:
        return places
    digest = hashlib.sha256(f"{seed}\x1f{document}".encode()).digest()
    rng = np.random.Generator(np.random.Philox(key=int.from_bytes(digest[:16], "little")))
    return sorted(int(i) for i in rng.choice(places, size=n, replace=False))


def _matching(encoded: Encoded, pattern: str) -> list[int]:
    """Tokens of which a character lies in a match."""
    inside = bytearray(len(encoded.text))
    for match in re.finditer(pattern, encoded.text):
        a, b = match.span()
        inside[a:b] = b"\1" * (b - a)
    return [i for i, (a, b) in enumerate(encoded.offsets) if any(inside[a:b])]


def _several(positions: Any) -> list[Any]:
    """One index or several as a list; arrays and tensors (also of no dimension) included."""
    try:
        return list(positions)
    except TypeError:
        return [positions]
