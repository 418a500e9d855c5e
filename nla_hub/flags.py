"""Warnings about a row: reasons not to take its explanation at face value."""

from __future__ import annotations

import re
from collections import Counter
from itertools import pairwise

from nla_hub.sidecar import ReferenceRecord

EARLY_BEFORE = 10
"""Explanations of positions below this are noise (seen in every public pair)."""

REPEATED_SHARE = 0.5
"""`repetitive`: fewer than this share of the word pairs are distinct, in texts of at least ten words."""

CJK = re.compile("[\u2e80-\u9fff\uac00-\ud7af\uf900-\ufaff\uff00-\uffef\u3200-\u33ff]")


def row_flags(
    *,
    text: str | None,
    norm: float,
    position: int | None,
    special: bool = False,
    from_source: bool = True,
    context: str | None = None,
    marker: str | None = None,
    reference: ReferenceRecord | None = None,
) -> tuple[str, ...]:
    """The flags of one row, in a fixed order.

    Args:
        text: the explanation, None where there is none.
        norm: raw L2 norm of the vector.
        position: of its token, None for a bare vector.
        special: the token is a special one.
        from_source: the vector was captured from the pair's own source (a caller's vector is off-distribution).
        context: the text the vector was captured from.
        marker: the AV's injection character.
        reference: quantiles of usual norms.
    """
    flags = []
    if position is not None and 0 <= position < EARLY_BEFORE:
        flags.append("early")
    if special:
        flags.append("special_token")
    if (
        reference is not None
        and reference.norm_p0_5 is not None
        and reference.norm_p99_5 is not None
        and not reference.norm_p0_5 <= norm <= reference.norm_p99_5
    ):
        flags.append("norm_outlier")
    if not from_source:
        flags.append("off_distribution")
    if text is not None:
        if echoes_marker(text, context or "", marker):
            flags.append("marker_echo")
        if is_repetitive(text):
            flags.append("repetitive")
    return tuple(flags)


def echoes_marker(text: str, context: str, marker: str | None) -> bool:
    """Whether the AV describes its own marker: it names it, or writes mostly CJK about a context that is not."""
    if marker is not None and marker in text and marker not in context:
        return True
    return mostly_cjk(text) and not mostly_cjk(context)


def mostly_cjk(text: str) -> bool:
    """Whether more than half of the letters are Chinese, Japanese or Korean."""
    letters = [c for c in text if c.isalpha() or CJK.match(c)]
    return bool(letters) and sum(bool(CJK.match(c)) for c in letters) > len(letters) / 2


def is_repetitive(text: str) -> bool:
    """Whether a text says the same again and again; see `REPEATED_SHARE`."""
    words = text.lower().split()
    if len(words) < 10:
        return False
    pairs = Counter(pairwise(words))
    return len(pairs) / (len(words) - 1) < REPEATED_SHARE
