"""One line at the bottom of a terminal that says where things stand, and is written over as they change."""

from __future__ import annotations

import os
import shutil
import sys
import unicodedata
from collections.abc import Callable


class StatusLine:
    """The line, on stderr; nothing is written before the first `show`."""

    def __init__(self) -> None:
        self._line: str | None = None

    def show(self, line: str) -> None:
        """Put a line in the place of the last one; it is cut to the terminal's width."""
        self._line = fitted(line, columns() - 1)
        sys.stderr.write(f"\r\x1b[K{self._line}")
        sys.stderr.flush()

    def end(self) -> None:
        """Leave the line where it is and go on below it."""
        if self._line is not None:
            sys.stderr.write("\n")
            self._line = None

    def apart(self, show: Callable[[], None]) -> None:
        """Print something above the line, and put the line back."""
        line = self._line
        if line is not None:
            sys.stderr.write("\r\x1b[K")
            sys.stderr.flush()
        show()
        if line is not None:
            self.show(line)


def columns() -> int:
    """How wide the terminal of stderr is; COLUMNS counts first."""
    if not os.environ.get("COLUMNS"):
        try:
            found = os.get_terminal_size(sys.stderr.fileno()).columns
        except (OSError, ValueError):
            found = 0
        if found > 0:
            return found
    return shutil.get_terminal_size().columns


def cells(text: str) -> int:
    """Columns of a terminal that `text` takes at most: marks that some terminals put on the letter before count too."""
    return sum(2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in text)


def fitted(text: str, width: int) -> str:
    """`text` cut to `width` columns, with dots where something is missing."""
    if cells(text) <= width:
        return text
    dots = "..."[: max(0, width)]
    end, room = 0, width - len(dots)
    while end < len(text) and cells(text[end]) <= room:
        room -= cells(text[end])
        end += 1
    return text[:end].rstrip() + dots
