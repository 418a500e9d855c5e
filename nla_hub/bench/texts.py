"""Texts to read: random words, no two texts the same, of lengths that vary as those of explanations do."""

from __future__ import annotations

from collections.abc import Callable
from random import Random

WORDS = (
    "the a of and in on it is was where who what next a small red blue old quick day night river house song story dog cat "
    "walks sees then so that word"
).split()


def random_texts(length: Callable[[str], int], n: int, *, longest: int, limit: int | None, seed: int) -> list[str]:
    """`n` different texts of about `longest` / 2 to `longest` tokens.

    Args:
        length: tokens of a text.
        limit: tokens that no text may exceed, whatever its words turn out to be; None for no limit.
    """
    random = Random(seed)
    empty = length(WORDS[0]) - 1
    per_word = max(0.1, (length(" ".join(WORDS)) - empty) / len(WORDS))
    found: dict[str, None] = {}
    while len(found) < n:
        words = random.choices(WORDS, k=max(1, round(random.uniform(longest / 2, longest) / per_word)))
        while " ".join(words) in found:
            words.append(random.choice(WORDS))
        while limit is not None and len(words) > 1 and length(" ".join(words)) > limit:
            words.pop()
        found[" ".join(words)] = None
    return list(found)
