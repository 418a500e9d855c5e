"""The measured part of docs/performance.md, rendered from stored results.

`python -m nla_hub.bench.page` rewrites it from docs/performance/*.jsonl, each of which `nla-hub bench ... --json` wrote. A
stale page fails the tests. It is a page of the checkout: an installed wheel has none.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from nla_hub.bench.render import COLUMNS, cells, heading, machine_fields
from nla_hub.bench.route import OPERATIONS
from nla_hub.doctor import NOT_MEASURED
from nla_hub.errors import NLAError
from nla_hub.evaluation.render import escape, markdown_table
from nla_hub.resources import PACKAGE

PAGE = PACKAGE.parent / "docs" / "performance.md"
RESULTS = PACKAGE.parent / "docs" / "performance"
BEGIN = "<!-- results: python -m nla_hub.bench.page -->"
END = "<!-- end of results -->"


def page(text: str, results: Path) -> str:
    """`text` with what stands between the two markers made anew from the files of `results`.

    Raises:
        NLAError: a marker is missing, or a file is no result.
    """
    head, begin, rest = text.partition(BEGIN)
    _, end, tail = rest.partition(END)
    if not begin or not end:
        raise NLAError("The page has no place for results.", expected=f"{BEGIN} and below it {END}")
    return "".join([head, BEGIN, "\n\n", *_sections(results), END, tail])


def _sections(results: Path) -> Iterator[str]:
    files = sorted(results.glob("*.jsonl"))
    devices = set()
    for file in files:
        machine, *routes = _read(file)
        devices.add(machine["device"])
        yield "\n".join(_section(file.name, machine, routes))
    if "cuda" not in devices:
        yield f"### On a GPU\n\n{NOT_MEASURED}.\n\n"


def _section(name: str, machine: dict[str, Any], routes: Sequence[dict[str, Any]]) -> Iterator[str]:
    yield f"### {machine['subject']}, {machine['dtype']}, {machine['device']}\n"
    yield f"```text\n{machine['command']} > docs/performance/{name}\n```\n"
    yield from (f"- {title}: {escape(str(value))}" for title, value in machine_fields(machine).items())
    for operation in OPERATIONS:
        mine = [route for route in routes if route["operation"] == operation]
        if mine:
            yield f"\n**{heading(mine[0])}**\n"
            yield markdown_table(COLUMNS, [["-" if cell is None else cell for cell in cells(route)] for route in mine])
    yield "\n"


def _read(file: Path) -> list[dict[str, Any]]:
    """The records of a result, the machine's first."""
    try:
        records = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines() if line]
    except ValueError as cause:
        raise NLAError("This is no result of nla-hub bench --json.", where=file, got=str(cause)) from cause
    if [record.get("record") for record in records[:1]] != ["machine"]:
        raise NLAError("A result begins with its machine.", where=file, next_step="store all that --json printed")
    return records


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text(encoding="utf-8"), RESULTS), encoding="utf-8")
