"""Looking for secrets in texts and files of any size.

Files are read piece by piece. A finding never carries what was found, only a masked form of it.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from nla_hub.publish.guards.secret_forms import LOOK_AHEAD, LOOK_BACK, TOKENS, TRACES, Rule


@dataclass(frozen=True)
class Finding:
    """One secret, where it stands and what it looks like masked.

    Attributes:
        line, column: from 1; the column in characters.
        offset: in bytes, from 0.
        rule: what it is.
        masked: its first characters and its length.
    """

    line: int
    column: int
    offset: int
    rule: Rule
    masked: str

    def __str__(self) -> str:
        return f"line {self.line}, column {self.column}: {self.rule.what} ({self.masked})"


def masked(value: bytes, rule: Rule) -> str:
    """What may be shown of a secret: enough to find it, never enough to use it."""
    text = value.decode("utf-8", "replace")
    if rule.kind == "e-mail":
        return f"...{text[text.index('@') :]}"
    shown = ""
    if rule.kind == "token":  # the beginning that all tokens of this kind have
        key = next((k.decode("utf-8", "replace") for k in rule.keys if value.startswith(k)), "")
        shown = "" if key == text else key
    elif rule.kind == "path":
        shown = "".join(re.findall(r"^(?:file:/{2})?[\\/]*[^\\/]*[\\/]*", text)[:1])[:24]
    return f"{shown}..., {len(text)} characters"


def spans(data: bytes, rules: Sequence[Rule]) -> list[tuple[int, int, Rule]]:
    """All that stands in `data`, in order; of what overlaps, what begins first, then what comes first in the rules."""
    folded = data.lower()
    found = [(start, n, end, rule) for n, rule in enumerate(rules) for start, end in rule.spans(data, folded)]
    chosen: list[tuple[int, int, Rule]] = []
    for start, _, end, rule in sorted(found, key=lambda f: (f[0], f[1])):
        if not chosen or start >= chosen[-1][1]:
            chosen.append((start, end, rule))
    return chosen


_MARKS = {
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
"""Marks at the beginning of a text -> its encoding; that of UTF-32 begins with that of UTF-16."""

MANY_NULS = 0.3
"""Part of a text's bytes above which its letters have more than one byte: half of an English text in UTF-16 is NUL."""


def wide_encoding(start: bytes) -> str | None:
    """The encoding of a text whose letters have two or four bytes, by its mark or by where its NULs stand; else None."""
    marked = next((name for mark, name in _MARKS.items() if start.startswith(mark)), None)
    if marked is not None or start.count(0) <= MANY_NULS * len(start):
        return marked
    nuls = [start[n::4].count(0) for n in range(4)]
    if 4 * min(nuls[1], nuls[2]) > 0.9 * len(start):
        return "utf-32-le" if nuls[0] < nuls[3] else "utf-32-be"
    return "utf-16-le" if nuls[0] + nuls[2] < nuls[1] + nuls[3] else "utf-16-be"


def search(pieces: Iterable[bytes], rules: Sequence[Rule], *, encoding: str | None = None) -> Iterator[Finding]:
    """What stands in a text that comes in pieces of any size; memory is a few pieces.

    Args:
        encoding: of the text, where it is not UTF-8; see `wide_encoding`.
    """
    here = _Place()
    window, judged, told = (
        b"",
        0,
        0,
    )  # of the window, `judged` bytes were looked at, and `told` of them belong to a finding
    for piece, last in _with_last(_as_utf8(pieces, encoding)):
        window += piece
        ready = len(window) if last else len(window) - LOOK_AHEAD
        if ready <= judged:
            continue
        for start, end, rule in spans(window, rules):
            if max(judged, told) <= start < ready:
                here.move(window, start)
                yield Finding(here.line, here.column, here.offset, rule, masked(window[start:end], rule))
                told = end
        drop = max(0, ready - LOOK_BACK)
        here.move(window, max(drop, here.index))
        here.index -= drop
        window, judged, told = window[drop:], ready - drop, max(0, told - drop)


class _Place:
    """A byte of a file, moved on from finding to finding: counting from the beginning each time would be quadratic."""

    def __init__(self) -> None:
        self.line, self.column, self.offset = 1, 1, 0
        self.index = 0
        """Where that byte stands in the window."""

    def move(self, window: bytes, index: int) -> None:
        """On to another byte of the window."""
        newline = window.rfind(b"\n", self.index, index)
        if newline < 0:
            self.column += _characters(window[self.index : index])
        else:
            self.line += window.count(b"\n", self.index, index)
            self.column = 1 + _characters(window[newline + 1 : index])
        self.offset += index - self.index
        self.index = index


_CONTINUATION = bytes(range(0x80, 0xC0))
"""Bytes that go on a character of UTF-8."""


def _characters(data: bytes) -> int:
    return len(data.translate(None, _CONTINUATION))


def _with_last(pieces: Iterator[bytes]) -> Iterator[tuple[bytes, bool]]:
    before: bytes | None = None
    for piece in pieces:
        if before is not None:
            yield before, False
        before = piece
    if before is not None:
        yield before, True


def _as_utf8(pieces: Iterable[bytes], encoding: str | None) -> Iterator[bytes]:
    decoder = None if encoding is None else codecs.getincrementaldecoder(encoding)("replace")
    for piece in pieces:
        yield piece if decoder is None else decoder.decode(piece).encode("utf-8", "replace")


def tokens_in(text: str, *, own: Sequence[Rule] = ()) -> list[str]:
    """Kinds of access tokens in a text, never the tokens; `own` as `this_machine.own_tokens` gives them."""
    return kinds_in(text, (*own, *TOKENS))


def kinds_in(text: str, rules: Sequence[Rule]) -> list[str]:
    """What the rules find in a text, each in words, once."""
    found = spans(text.encode("utf-8", "surrogatepass"), rules)
    return list(dict.fromkeys(rule.what for *_, rule in found))


def mask(text: str, rules: Sequence[Rule] = TRACES) -> str:
    """`text` with "[token]", "[e-mail]", "[path]", "[name]" or "[run id]" in the place of what the rules find."""
    data = text.encode("utf-8", "surrogatepass")
    parts, done = [], 0
    for start, end, rule in spans(data, rules):
        parts += [data[done:start], f"[{rule.kind}]".encode()]
        done = end
    return b"".join([*parts, data[done:]]).decode("utf-8", "surrogatepass")
