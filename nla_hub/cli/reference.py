"""The page docs/cli.md, from the application itself: `python -m nla_hub.cli.reference > docs/cli.md`."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import typer

HEAD = """<!-- Generated: python -m nla_hub.cli.reference > docs/cli.md -->

# Command line

Results go to stdout, messages and progress to stderr. `-q` and `-v` may stand anywhere on the line. `HF_DEBUG=1` shows
the traceback behind an error; `NO_COLOR`, `HF_HOME`, `HF_TOKEN` and `HF_HUB_OFFLINE` mean what they always mean.

| exit code | meaning |
|---|---|
| 0 | done |
| 1 | a known error: a message and the next step on stderr |
| 2 | wrong usage |
| 3 | a figure fell below its gate |
| 4 | some rows are in error; the others are there |
| 130 | interrupted; what was finished is kept |
"""


def reference() -> str:
    """The whole page as Markdown."""
    from nla_hub.cli.app import app

    root = typer.main.get_command(app)
    sections = "\n".join(part for name, command in _commands("nla-hub", root) for part in _section(name, command))
    return f"{HEAD}\n{sections}".rstrip() + "\n"


def _commands(name: str, command: Any) -> Iterator[tuple[str, Any]]:
    yield name, command
    for child_name, child in getattr(command, "commands", {}).items():
        if not child.hidden:
            yield from _commands(f"{name} {child_name}", child)


def _section(name: str, command: Any) -> Iterator[str]:
    arguments = [p for p in command.params if p.param_type_name == "argument" and not p.hidden]
    options = [p for p in command.params if p.param_type_name == "option" and not p.hidden]
    usage = [name, *(["[OPTIONS]"] if options else []), *map(_argument, arguments)]
    if hasattr(command, "commands"):
        usage.append("COMMAND")
    yield f"## {name}\n"
    yield f"{' '.join((command.help or '').split())}\n"
    yield f"```text\n{' '.join(usage)}\n```\n"
    if arguments or options:
        yield "| | meaning | default |\n|---|---|---|"
        yield from (f"| `{_cell(_argument(a))}` | {_cell(a.help or '')} | |" for a in arguments)
        yield from (f"| {_names(o)} | {_cell(o.help or '')} | {_default(o)} |" for o in options)
        yield ""


def _argument(argument: Any) -> str:
    name = argument.metavar or argument.name.upper()
    if argument.nargs == -1 and not name.endswith("..."):
        name += "..."
    return str(name if argument.required or name.startswith("[") else f"[{name}]")


def _names(option: Any) -> str:
    names = ", ".join(f"`{name}`" for name in (*option.opts, *option.secondary_opts))
    return names if option.is_flag else f"{names} {_cell(option.metavar or option.name.upper())}"


def _default(option: Any) -> str:
    value = option.default
    if value is None or value is False or callable(value):
        return ""
    return f"`{_cell(str(getattr(value, 'value', value)))}`"


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


if __name__ == "__main__":
    sys.stdout.write(reference())
