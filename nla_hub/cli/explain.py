"""`nla-hub explain`: texts in, explanations of their activations out."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from nla_hub.cli import output, pair
from nla_hub.errors import InputError, Interrupted
from nla_hub.locate import expand
from nla_hub.log import logger

if TYPE_CHECKING:
    from nla_hub.nla import NLA
    from nla_hub.results import Explanations

EXIT_ROWS_IN_ERROR = 4
EXAMPLE = "today otto came to the island. he had a drum in red. parrots squawked below skin and"
"""Explained where no text is given: the beginning of a story of the tiny world."""


def register(app: typer.Typer) -> None:
    """Add `explain` to the command."""
    app.command("explain")(explain)


class Overflow(StrEnum):
    """The SDK's rules for texts that are too long."""

    error = "error"
    truncate = "truncate"
    stride = "stride"


@dataclass(frozen=True)
class Item:
    """One text or conversation of the command line, or the reason why it is none."""

    name: str
    content: Any
    error: str | None = None
    next_step: str | None = None


def explain(
    texts: Annotated[
        list[str] | None, typer.Argument(metavar="TEXT...", help="Texts to read.", show_default=False)
    ] = None,
    file: Annotated[
        str | None,
        typer.Option(
            "--file", "-f", help='A text file, a .jsonl file of {"text": ...} or {"messages": [...]}, or - for stdin.'
        ),
    ] = None,
    nla: pair.Name = "tiny",
    ar: pair.Ar = None,
    base_model: pair.Base = None,
    subfolder: pair.Subfolder = "",
    ar_subfolder: pair.ArSubfolder = "",
    sidecar: pair.SidecarFile = None,
    engine: pair.Engine = "auto",
    engine_option: pair.EngineOptions = None,
    memory: pair.Memory = pair.MemoryMode.auto,
    positions: Annotated[
        str, typer.Option("--positions", "-p", help="last, all, user, assistant, 5, -1, 3,7,9 or 10:20.")
    ] = "last",
    n: Annotated[int, typer.Option("-n", help="Samples a vector.", min=1)] = 1,
    temperature: Annotated[float, typer.Option(help="0 is greedy.", min=0.0)] = 0.7,
    max_new_tokens: Annotated[int, typer.Option(help="Length bound of an explanation, in tokens.", min=1)] = 200,
    seed: Annotated[int, typer.Option(help="Same seed, same explanations.")] = 0,
    batch_size: Annotated[
        int | None, typer.Option(help="Rows that run together; by default as many as fit into free memory.", min=1)
    ] = None,
    overflow: Annotated[
        Overflow, typer.Option(help="What to do with texts longer than the model reads.")
    ] = Overflow.error,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object a row.")] = False,
) -> None:
    """Explain the activations of texts: what the model holds at a token, in words, with the measured score."""
    where = parse_positions(positions)
    items = list(read_items(texts or [], file))
    if not texts and file is None:
        output.message(f'No text was given, so here is an example. Your own: nla-hub explain "..."\n{EXAMPLE}')
        items = [Item("example", EXAMPLE)]
    if not items:
        raise InputError("This file holds no texts.", where=file)
    loaded = pair.load(
        nla,
        ar=ar,
        base_model=base_model,
        subfolder=subfolder,
        ar_subfolder=ar_subfolder,
        sidecar=sidecar,
        engine=engine,
        engine_options=engine_option,
        memory=memory,
    )
    settings = {"n": n, "temperature": temperature, "max_new_tokens": max_new_tokens, "seed": seed}
    try:
        with loaded:
            found, failed = run(loaded, items, where, overflow.value, batch_size, settings)
    except Interrupted as stop:
        show_rows(stop.done, [], items, as_json=as_json)
        output.message(f"{len(stop.done)} rows were done; they have no scores.")
        raise
    show_rows(found, failed, items, as_json=as_json)
    if failed:
        raise typer.Exit(EXIT_ROWS_IN_ERROR)


def show_rows(found: Explanations, failed: list[Item], items: list[Item], *, as_json: bool) -> None:
    """Everything that came of the items: rows on stdout, what could not be explained on stderr."""
    if as_json:
        output.print_json_lines(row.to_dict() for row in found)
        output.print_json_lines(error_row(item) for item in failed)
    elif len(found):
        show(found, several=len(items) > 1)
    for item in failed:
        logger.error("%s%s", item.error, f"\n  Next: {item.next_step}" if item.next_step else "")
    if failed and not as_json:
        output.message(f"{len(failed)} of {len(items)} texts could not be explained.")


def run(
    loaded: NLA, items: list[Item], positions: Any, overflow: Any, batch_size: int | None, settings: dict[str, Any]
) -> tuple[Explanations, list[Item]]:
    """Explanations of the items that can be read, and the items that cannot, with their reasons."""
    from nla_hub.results import Explanations

    good, failed = [], [item for item in items if item.error is not None]
    for item in items:
        if item.error is None:
            try:
                loaded.check_text(item.content, positions, overflow=overflow, where=item.name)
            except InputError as error:
                failed.append(Item(item.name, item.content, error.one_line(), _on_the_command_line(error.next_step)))
            else:
                good.append(item)
    if not good:
        return Explanations(()), failed
    found = loaded.explain(
        [item.content for item in good],
        positions,
        overflow=overflow,
        batch_size=batch_size,
        doc_ids=[item.name for item in good],
        **settings,
    )
    return found, failed


def _on_the_command_line(next_step: str | None) -> str | None:
    """The SDK's advice in the words of the command's options."""
    if next_step is None:
        return None
    sdk, option = (
        'pass overflow="truncate" (keep the beginning) or "stride"',
        "--overflow truncate (its beginning) or stride",
    )
    return next_step.replace(sdk, option)


def show(found: Explanations, *, several: bool) -> None:
    """A table for a person: token, explanation, cosine, flags; then the scores over all rows."""
    columns = ["token", "cosine", "flags", "explanation"]
    if several:
        columns.insert(0, "text")
    output.print_table(
        columns,
        [
            [
                *([row.doc_id] if several else []),
                f"{row.position}: {json.dumps(row.token, ensure_ascii=False)}",
                "not measured" if row.cosine is None else f"{row.cosine:.3f}",
                ", ".join(row.flags) or None,
                row.text if row.text is not None else f"({row.status}) {row.raw}",
            ]
            for row in found
        ],
    )
    if len(found):
        output.message(summary(found))


def summary(found: Explanations) -> str:
    """One line: FVE with its baseline, mean cosine, counts of each status."""
    mean = found.scores.mean_cosine() if any(row.cosine is not None for row in found) else None
    cosine = "not measured" if mean is None else f"{mean:.3f}"
    counts = ", ".join(f"{count} {status}" for status, count in sorted(found.counts().items()))
    reference = found.reference
    against = f" against the denominator of {reference.dataset}" if reference is not None else ""
    rows = "1 row" if len(found) == 1 else f"{len(found)} rows"
    return f"{rows}: {counts}; mean cosine {cosine}; {found.fve()}{against}"


def error_row(item: Item) -> dict[str, Any]:
    """A row in error: the columns of an explanation, all null, and the reason."""
    from nla_hub.results import COLUMNS

    return {**dict.fromkeys(COLUMNS), "doc_id": item.name, "flags": [], "error": item.error}


def read_items(texts: list[str], file: str | None) -> Iterator[Item]:
    """The command line's texts, and those of a file."""
    for i, text in enumerate(texts):
        yield Item(f"text {i}", text)
    if file is None:
        return
    name = "stdin" if file == "-" else Path(file).name
    data = sys.stdin.buffer.read() if file == "-" else expand(file).read_bytes()
    if not file.endswith(".jsonl"):
        yield _decoded(name, data)
        return
    for number, line in enumerate(data.splitlines(), start=1):
        if line.strip():
            yield _json_item(f"{name}:{number}", line)


def _decoded(name: str, data: bytes) -> Item:
    try:
        return Item(name, data.decode("utf-8").rstrip("\r\n"))
    except UnicodeDecodeError as error:
        return Item(name, None, f"{name}: This is not UTF-8 text (byte {error.start}).")


def _json_item(name: str, line: bytes) -> Item:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        return Item(name, None, f"{name}: This line is not JSON: {error}.")
    if isinstance(record, dict) and isinstance(record.get("text"), str):
        return Item(name, record["text"])
    if isinstance(record, dict) and isinstance(record.get("messages"), list):
        return Item(name, record["messages"])
    return Item(name, None, f'{name}: This line is neither {{"text": ...}} nor {{"messages": [...]}}.')


def parse_positions(text: str) -> Any:
    """The SDK's `positions` from its spelling on the command line; raises a usage error."""
    if text in ("last", "all", "user", "assistant"):
        return text
    try:
        if ":" in text:
            parts = [int(part) if part.strip() else None for part in text.split(":")]
            if len(parts) > 3:
                raise ValueError
            return slice(*parts)
        numbers = [int(part) for part in text.split(",")]
    except ValueError:
        raise typer.BadParameter(
            f"{text!r} is none of last, all, user, assistant, 5, -1, 3,7,9 or 10:20", param_hint="--positions"
        ) from None
    return numbers[0] if len(numbers) == 1 else numbers
