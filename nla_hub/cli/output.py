"""What the command line prints: results on stdout, everything else on stderr.

Anywhere but on a terminal (a pipe, a file) a table's lines are as long as their contents, so that `grep` and `cut` see
whole rows. On a terminal the last column is wrapped, and where even that is too wide each row becomes a block of lines.
Emphasis goes through rich, which obeys NO_COLOR.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import sys
import textwrap
import unicodedata
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from nla_hub.log import logger

MISSING = "-"
"""Shown for a value that does not apply; an unknown figure is "not measured" instead."""


class _MessageHandler(logging.Handler):
    """Log records as plain lines on whatever stderr is now."""

    def emit(self, record: logging.LogRecord) -> None:
        prefix = "" if record.levelno < logging.WARNING else f"{record.levelname.lower()}: "
        over = "\r\x1b[K" if sys.stderr.isatty() else ""  # a line of progress, which comes back below
        print(f"{over}{prefix}{record.getMessage()}", file=sys.stderr)


def configure(*, quiet: bool = False, verbose: bool = False) -> None:
    """Send the package's log to stderr: warnings only when quiet, details when verbose; keep other libraries quiet."""
    if not any(isinstance(handler, _MessageHandler) for handler in logger.handlers):
        logger.addHandler(_MessageHandler())
    logger.setLevel(logging.WARNING if quiet else logging.DEBUG if verbose else logging.INFO)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")  # a lone surrogate must not end a run


def quiet_libraries(*, verbose: bool) -> None:
    """Keep transformers, huggingface_hub and torch from writing on stderr; call it before they are imported.

    Only what the user did not set: HF_HUB_DISABLE_PROGRESS_BARS and TRANSFORMERS_VERBOSITY keep their values. It
    changes the process's environment, so only the console script calls it.
    """
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if not sys.stderr.isatty():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    if not verbose:
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
        warnings.filterwarnings("ignore", module=r"(torch|transformers|huggingface_hub|accelerate)(\.|$)")


def progress_wanted() -> bool:
    """Whether to draw progress bars: only on a terminal's stderr, and not under --quiet."""
    return (
        sys.stderr.isatty() and logger.isEnabledFor(logging.INFO) and not os.environ.get("HF_HUB_DISABLE_PROGRESS_BARS")
    )


def is_terminal() -> bool:
    """Whether results go to a person's terminal."""
    return sys.stdout.isatty()


def message(text: str) -> None:
    """A line for the person at the terminal, on stderr; --quiet drops it."""
    logger.info("%s", text)


def print_text(text: str) -> None:
    """One or more lines of result on stdout; control characters of strangers' text are shown, not obeyed."""
    print(clean(text))


def print_json_lines(rows: Iterable[Mapping[str, Any]]) -> None:
    """One JSON object a line on stdout, each written as soon as it is there. NaN is not JSON: pass None."""
    ascii_only = "utf" not in (getattr(sys.stdout, "encoding", None) or "ascii").lower()
    for row in rows:
        sys.stdout.write(json.dumps(row, ensure_ascii=ascii_only, allow_nan=False) + "\n")
        sys.stdout.flush()


def print_table(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """A table on stdout; None prints as "-"."""
    cells = [[MISSING if value is None else clean(str(value), one_line=True) for value in row] for row in rows]
    widths = [max(_width(line[i]) for line in [list(columns), *cells]) for i in range(len(columns))]
    before_last = sum(widths[:-1]) + len(_GAP) * (len(columns) - 1)
    room = shutil.get_terminal_size().columns - before_last if is_terminal() else widths[-1]
    if room < min(widths[-1], _NARROWEST):
        for i, row in enumerate(cells):
            if i:
                print()
            print_fields(dict(zip(columns, row, strict=True)))
        return
    print_heading(_line(columns, widths))
    for row in cells:
        first, *rest = _wrapped(row[-1], room)
        print(_line([*row[:-1], first], widths))
        for part in rest:
            print(" " * before_last + part)


_GAP = "  "
_NARROWEST = 24
"""Columns of a terminal below which a wrapped last column is no longer readable."""


def _line(cells: Sequence[str], widths: Sequence[int]) -> str:
    padded = [cell + " " * (width - _width(cell)) for cell, width in zip(cells, widths, strict=True)]
    return _GAP.join(padded).rstrip()


def _wrapped(text: str, room: int) -> list[str]:
    return (textwrap.wrap(text, max(room, 1)) or [""]) if _width(text) > room else [text]


def print_heading(text: str) -> None:
    """A line on stdout, bold on a terminal."""
    if not is_terminal():
        print(text)
        return
    from rich.console import Console
    from rich.text import Text

    Console(file=sys.stdout, markup=False, highlight=False, emoji=False).print(Text(text, style="bold"), soft_wrap=True)


def print_fields(fields: Mapping[str, object]) -> None:
    """Names and values, one a line, values aligned; lists take a line an item."""
    width = max((_width(name) for name in fields), default=0)
    for name, value in fields.items():
        values = value if isinstance(value, (list, tuple)) else [value]
        for i, item in enumerate(values or [None]):
            label = name if i == 0 else ""
            print(f"{label:<{width}}  {MISSING if item is None else clean(str(item), one_line=True)}")


def clean(text: str, *, one_line: bool = False) -> str:
    """`text` with control characters written out, so that no text can move the cursor or change colours.

    Newlines and tabs stay unless `one_line`.
    """
    kept = "" if one_line else "\n\t"
    return "".join(
        c if c in kept or (unicodedata.category(c) != "Cc" and c not in _UNSAFE) else _escaped(c) for c in text
    )


_UNSAFE = frozenset("\u2028\u2029\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")
"""Line and paragraph separators, and what changes the direction of the text that follows."""


def _escaped(char: str) -> str:
    return char.encode("unicode_escape").decode("ascii")


def _width(text: str) -> int:
    """Columns of a terminal that `text` takes."""
    wide = sum(unicodedata.east_asian_width(c) in "WF" for c in text)
    return len(text) + wide - sum(unicodedata.combining(c) != 0 for c in text)
