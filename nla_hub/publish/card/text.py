"""Texts of others on a page: shown as they are, unable to change the page around them.

A description written by a model may hold anything: tags, pipes, fences, the markers of front matter. Prose goes into a fence
that is longer than any inside it; a name or a line goes through `inline` or `code`.
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterable, Sequence

WIDTH = 110
"""Columns at which prose inside a fence is broken: fenced text scrolls sideways instead of wrapping."""

CONTEXT_CHARACTERS = 300
"""Of the text up to the token: its last ones are shown."""

SAMPLE_CHARACTERS = 1500
"""Of an explanation: its first ones are shown. The longest of the released pairs have about 150 words (1,000 characters)."""

_UNSEEN = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u200b-\u200f\u2028-\u202e\u2060-\u2069\ufeff\ud800-\udfff]")
"""Control characters, marks of writing direction, half characters: what makes a page look other than its source."""


def visible(text: str) -> str:
    """The text with its line ends as newlines, and each character that is not shown as a replacement character."""
    lines = re.sub(r"\r\n?|[\x85\u2028\u2029]", "\n", text)
    return _UNSEEN.sub("\ufffd", lines)


def fenced(text: str, language: str = "text") -> str:
    """The text as a fenced block that it cannot close."""
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{text}\n{fence}"


def prose(text: str) -> str:
    """A text of any kind as a fenced block, its lines broken at `WIDTH` columns."""
    lines = [
        line
        for paragraph in visible(text).split("\n")
        for line in (textwrap.wrap(paragraph, WIDTH, break_on_hyphens=False) or [""])
    ]
    return fenced("\n".join(lines).strip("\n"))


def code(text: str) -> str:
    """A short text as a code span, also inside a table."""
    line = " ".join(visible(text).split())
    longest = max((len(run) for run in re.findall(r"`+", line)), default=0)
    mark = "`" * (longest + 1)
    space = " " if line.startswith("`") or line.endswith("`") else ""
    return f"{mark}{space}{line}{space}{mark}".replace("|", "\\|")


def inline(text: str) -> str:
    """A short text in a line or a table, without any meaning to Markdown or HTML."""
    line = " ".join(visible(text).split())
    line = line.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"([\\`*_\[\]|~$])", r"\\\1", line)


def ending(text: str) -> str:
    """The last `CONTEXT_CHARACTERS` of what the model had read."""
    return text if len(text) <= CONTEXT_CHARACTERS else f"[...] {text[-CONTEXT_CHARACTERS:]}"


def beginning(text: str) -> str:
    """The first `SAMPLE_CHARACTERS` of an explanation."""
    return text if len(text) <= SAMPLE_CHARACTERS else f"{text[:SAMPLE_CHARACTERS]} [...]"


def table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table whose cells are Markdown already."""
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
