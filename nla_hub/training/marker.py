"""The marker of a new pair: one rare character that is one token, alone and in the AV's prompt.

The released pairs took enclosed CJK characters (U+320E, U+321C, U+33A1): symbols that stand in no text by chance and that a
vocabulary holds as a token of their own. Tokenizers are asked character by character, because a vocabulary's entries are
spelled in as many ways as there are kinds of tokenizers.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from nla_hub.errors import RecipeError, SidecarError
from nla_hub.prompts import measure_marker
from nla_hub.sidecar import INJECTION_PLACEHOLDER, MarkerTokens
from nla_hub.source_text import special_tokens
from nla_hub.training.recipe import AUTO

ENCLOSED_CJK = range(0x3200, 0x3400)
"""Enclosed CJK letters and months, and CJK compatibility."""

LOOKED_AT = range(0x80, 0x20000)
"""The planes with symbols and the scripts of the world; above are rare CJK characters, private and unassigned ones."""

BETWEEN_TAGS = f"<v>{INJECTION_PLACEHOLDER}</v>"
"""Neighbours like those of the packaged and the released templates."""

COMMON_SCRIPTS = (
    "LATIN",
    "GREEK",
    "CYRILLIC",
    "ARABIC",
    "HEBREW",
    "DEVANAGARI",
    "BENGALI",
    "TAMIL",
    "THAI",
    "HANGUL",
    "HIRAGANA",
    "KATAKANA",
    "CJK",
    "IDEOGRAPHIC",
    "FULLWIDTH",
    "HALFWIDTH",
)
"""First words of the Unicode names of letters that ordinary texts are written in."""

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
"""What decoders write for broken text, so it is not rare."""


def choose_marker(tokenizer: Any, template: str = BETWEEN_TAGS) -> str:
    """The marker for a tokenizer: the rarest character of the first kind that has a usable one.

    The kinds are enclosed CJK characters, then other symbols, then whatever is neither ASCII nor a letter of a common script.
    Within a kind the highest token id is taken: vocabularies are in order of frequency. Usable is a character that is one
    token, comes back when that token is decoded, and stands once, as that same token, in `template` rendered through the
    chat template. The same tokenizer always gets the same marker.

    Args:
        template: of the AV, with its placeholder.

    Raises:
        RecipeError: the vocabulary has no such character. TextError: the tokenizer has no chat template.
    """
    for kind in (_is_enclosed, _is_symbol, _is_uncommon):
        for char in _single_tokens(tokenizer, _characters(kind)):
            if _stays_one(tokenizer, char, template):
                return char
    raise RecipeError(
        "This vocabulary has no usable marker: no rare character is one token, alone and in the AV's prompt.",
        where="marker",
        got=f"a vocabulary of {len(tokenizer)}",
        expected=f"one of U+{ENCLOSED_CJK.start:04X} to U+{ENCLOSED_CJK.stop - 1:04X}, a symbol, or a letter of a rare script",
        next_step="set marker to a character that is one token here; a common one will do as long as the AV's template holds "
        "it once",
    )


def require_marker(tokenizer: Any, char: str, template: str) -> MarkerTokens:
    """The ids of a marker that a recipe names, and of its neighbours.

    Args:
        template: of the AV, with its placeholder.

    Raises:
        RecipeError: it is not one token, or does not stand once in the AV's prompt. TextError: no chat template.
    """
    try:
        return measure_marker(tokenizer, char, template)
    except SidecarError as cause:
        raise RecipeError(
            "This marker cannot be used with this tokenizer.",
            where="marker",
            faults=[cause.one_line()],
            next_step=f"set marker to a rare character that is one token here, or to {AUTO}: then one is chosen",
        ) from cause


def _characters(kind: Callable[[str], bool]) -> list[str]:
    return [char for char in map(chr, LOOKED_AT) if kind(char)]


def _is_enclosed(char: str) -> bool:
    return ord(char) in ENCLOSED_CJK and _is_visible(char)


def _is_symbol(char: str) -> bool:
    return unicodedata.category(char) in ("So", "Sm", "Sc") and char != REPLACEMENT


def _is_uncommon(char: str) -> bool:
    return _is_visible(char) and char != REPLACEMENT and not unicodedata.name(char, "").startswith(COMMON_SCRIPTS)


def _is_visible(char: str) -> bool:
    """Whether a character is a letter, a number or a symbol: no blank, control, punctuation or mark on another one."""
    return unicodedata.category(char)[0] in "LNS"


def _single_tokens(tokenizer: Any, chars: Iterable[str]) -> Iterator[str]:
    """Those of `chars` that are one token and come back from it, the highest id first."""
    listed = list(chars)
    if not listed:
        return
    special = special_tokens(tokenizer)
    unknown = getattr(tokenizer, "unk_token_id", None)
    # Its own encoder, because transformers takes seconds to wrap thousands of results; what is chosen is measured again.
    found = zip(tokenizer.backend_tokenizer.encode_batch(listed, add_special_tokens=False), listed, strict=True)
    ids_of = ((encoded.ids, char) for encoded, char in found)
    single = [(ids[0], char) for ids, char in ids_of if len(ids) == 1 and ids[0] != unknown and ids[0] not in special]
    for token, char in sorted(single, reverse=True):
        if tokenizer.decode([token]) == char:
            yield char


def _stays_one(tokenizer: Any, char: str, template: str) -> bool:
    try:
        measure_marker(tokenizer, char, template)
    except SidecarError:
        return False
    return True
