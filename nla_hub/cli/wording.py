"""The SDK's advice in the words of a command: keywords become options."""

from __future__ import annotations

import re
import shlex
from collections.abc import Collection

from nla_hub.errors import NLAError

_KEYWORD = re.compile(
    r'(?<![\w.=-])(?P<name>ar_subfolder|subfolder|ar|base_model|engine|memory|dtype)=(?:"(?P<value>[^"]*)"|(?P<any>\.\.\.))'
)
_ONE_HALF = re.compile(r'(?<![\w.=-])components=\("(av|ar)",\)')
_PYTHON_ONLY = re.compile(r"(?<!in Python )(?<![\w.=-])(?=components=\(|trust_remote_code=True)")
_SIDECAR = "sidecar={"


def translate(error: NLAError, options: Collection[str]) -> None:
    """Put what an error advises into the words of the command that raised it; what the user wrote stays as it is.

    Args:
        options: those that the command has, such as "--ar"; a keyword without its option stays a keyword.
    """
    error.what = for_command(error.what, options)
    error.faults = tuple(for_command(fault, options) for fault in error.faults)
    if error.next_step is not None:
        error.next_step = for_command(error.next_step, options)


def for_command(text: str, options: Collection[str]) -> str:
    """`text` with the keywords of `from_pretrained` as options of a command.

    `ar="owner/name"` becomes `--ar owner/name`, `components=("av",)` `--half av`, and `sidecar={...}` a YAML file.
    """

    def option(found: re.Match[str]) -> str:
        name = f"--{found['name'].replace('_', '-')}"
        value = found["any"] or _word(found["value"])
        return f"{name} {value}" if name in options else found[0]

    if "--sidecar" in options:
        text = _with_files(text)
    text = _KEYWORD.sub(option, text)
    if "--half" in options:
        text = _ONE_HALF.sub(r"--half \1", text)
    return _PYTHON_ONLY.sub("in Python ", text).replace(" to from_pretrained", "")


def _word(value: str) -> str:
    """A value as a shell reads it; the dots of "something" are no value."""
    return value if value == "..." else shlex.quote(value)


def _with_files(text: str) -> str:
    """Mappings told in Python -> the YAML file that says the same."""
    done, rest = "", text
    while (at := rest.find(_SIDECAR)) >= 0:
        start = at + len(_SIDECAR) - 1
        end = _closing(rest, start)
        if end is None:
            break
        done += f"{rest[:at]}--sidecar FILE (a YAML file with `{_yaml(rest[start:end])}`)"
        rest = rest[end:].removeprefix(" in Python")
    return done + rest


def _closing(text: str, start: int) -> int | None:
    """Where the bracket that opens at `start` has been closed; brackets inside strings are text."""
    depth, quoted = 0, False
    for i in range(start, len(text)):
        if text[i] == '"':
            quoted = not quoted
        elif not quoted and text[i] in "{[":
            depth += 1
        elif not quoted and text[i] in "}]":
            depth -= 1
            if depth == 0:
                return i + 1
    return None


def _yaml(literal: str) -> str:
    """A Python mapping of plain words, lists and mappings, as YAML on one line; a single key needs no brackets."""
    plain = re.sub(r'"([A-Za-z_][\w./-]*)"', r"\1", literal)
    plain = re.sub(r"\b(True|False)\b", lambda found: found[0].lower(), plain)
    inner = plain[1:-1]
    depth = 0
    for char in inner:
        depth += (char in "{[") - (char in "}]")
        if char == "," and depth == 0:
            return plain
    return inner
