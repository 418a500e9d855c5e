"""`nla-hub explain`: texts in, explanations of their activations out."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from nla_hub.cli import explain_job, explain_push, output, pair
from nla_hub.errors import InputError, Interrupted
from nla_hub.locate import expand
from nla_hub.log import logger

if TYPE_CHECKING:
    from nla_hub.nla import NLA
    from nla_hub.results import Explanations

EXIT_ROWS_IN_ERROR = 4
EXAMPLE = "today otto came to the island. he had a drum in red. parrots squawked below skin and"
"""Explained where no text is given: the beginning of a story of the tiny world."""


EXAMPLES = (
    'nla-hub explain "the cat sat" --positions all   |   nla-hub explain --data posts.jsonl -o OUT --positions sample:5'
)


def register(app: typer.Typer) -> None:
    """Add `explain` to the command."""
    app.command("explain", epilog=EXAMPLES)(explain)


class Overflow(StrEnum):
    """The SDK's rules for texts that are too long."""

    error = "error"
    truncate = "truncate"
    stride = "stride"


class RunnerName(StrEnum):
    """Where the workers of a job are."""

    local = "local"
    ray = "ray"


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
    data: Annotated[
        str | None,
        typer.Option(
            "--data",
            metavar="DATASET",
            help="A data set, into the directory -o: ./file.jsonl (.json, .csv, .tsv, .parquet, .txt), ./directory, "
            "owner/name or hf://datasets/... of the Hub, or vectors (.npy, .safetensors, .parquet).",
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            "-o", "--output", metavar="OUT", help="Where the rows of --data go; the same command goes on there."
        ),
    ] = None,
    column: Annotated[
        str | None,
        typer.Option(help='Of --data: column of the texts ("text") or vectors; tensor of a .safetensors file.'),
    ] = None,
    messages_column: Annotated[
        str | None, typer.Option(help='Of --data: column of conversations ("messages").')
    ] = None,
    id_column: Annotated[str | None, typer.Option(help='Of --data: column of ids ("doc_id", else "id").')] = None,
    limit: Annotated[int | None, typer.Option(help="Items of --data at most.", min=1)] = None,
    workers: Annotated[
        int, typer.Option(help="With --data: processes that compute, one a GPU, or shares of the processor.", min=1)
    ] = 1,
    runner: Annotated[
        RunnerName, typer.Option(help="With --data: ray makes the workers actors of a Ray cluster.")
    ] = RunnerName.local,
    shard: Annotated[
        str | None,
        typer.Option(metavar="I/N", help="With --data: only every N-th block; N such runs come to the same rows."),
    ] = None,
    threads: Annotated[int, typer.Option(help="With --data: threads of a worker on the processor.", min=1)] = 1,
    keep_vectors: Annotated[bool, typer.Option("--keep-vectors", help="With --data: write the vectors too.")] = False,
    push_to: Annotated[
        str | None,
        typer.Option(
            "--push-to", metavar="OWNER/NAME", help="With --data: publish the rows as this data set in the end."
        ),
    ] = None,
    licence: Annotated[
        str | None,
        typer.Option("--licence", metavar="ID", help="Of --push-to: licence of the data set, as the Hub spells it."),
    ] = None,
    private: Annotated[bool, typer.Option("--private", help="Of --push-to: make a new data set private.")] = False,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="With --data: ask nothing.")] = False,
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
        str,
        typer.Option(
            "--positions",
            "-p",
            help="last, all, user, assistant, 5, -1, 3,7,9, 10:20, every:N, sample:K or regex:PATTERN.",
        ),
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
    parse_special_tokens: Annotated[
        bool, typer.Option("--parse-special-tokens", help="Read special tokens that a text spells as such.")
    ] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="One JSON object a row; with --data one object with the figures.")
    ] = False,
) -> None:
    """Explain the activations of texts: what the model holds at a token, in words, with the measured score."""
    where = parse_positions(positions)
    published = explain_push.wanted(push_to, licence, private=private, yes=yes)
    named: dict[str, Any] = {
        "ar": ar,
        "base_model": base_model,
        "subfolder": subfolder,
        "ar_subfolder": ar_subfolder,
        "sidecar": sidecar,
        "engine": engine,
        "engine_options": engine_option,
        "memory": memory,
    }
    if data is None:
        refuse_alone(
            {
                "-o": out,
                "--column": column,
                "--messages-column": messages_column,
                "--id-column": id_column,
                "--limit": limit,
                "--workers": workers if workers > 1 else None,
                "--runner": runner.value if runner is not RunnerName.local else None,
                "--shard": shard,
                "--threads": threads if threads > 1 else None,
                "--keep-vectors": keep_vectors or None,
                "--push-to": push_to,
            }
        )
    else:
        if texts or file is not None:
            raise typer.BadParameter("a data set stands alone: leave out the texts and -f", param_hint="--data")
        if out is None:
            raise typer.BadParameter("where do the rows go? Name a directory: -o OUT", param_hint="--data")
        from nla_hub.explain.settings import DataSettings, JobSettings

        job = JobSettings(
            pair.settings(nla, **named),
            DataSettings(data, column, messages_column, id_column, limit),
            positions=where,
            n=n,
            temperature=temperature,
            max_new_tokens=max_new_tokens,
            seed=seed,
            overflow=overflow.value,
            parse_special_tokens=parse_special_tokens,
            keep_vectors=keep_vectors,
            batch_size=batch_size,
            threads=threads,
        )
        if published is not None:
            published.check()
        summary = explain_job.run(job, out, workers=workers, runner=runner.value, shard=shard, yes=yes, as_json=as_json)
        if published is not None and summary.complete:
            published.push(out, as_json=as_json)
        elif published is not None:
            output.message("The rows are published by the shard that finishes last, if it has --push-to as well.")
        if summary.errors:
            raise typer.Exit(EXIT_ROWS_IN_ERROR)
        return
    items = list(read_items(texts or [], file))
    if not texts and file is None:
        output.message(f'No text was given, so here is an example. Your own: nla-hub explain "..."\n{EXAMPLE}')
        items = [Item("example", EXAMPLE)]
    if not items:
        raise InputError("This file holds no texts.", where=file)
    loaded = pair.load(nla, **named)
    settings = {"n": n, "temperature": temperature, "max_new_tokens": max_new_tokens, "seed": seed}
    reading = {"overflow": overflow.value, "parse_special_tokens": parse_special_tokens}
    try:
        with loaded:
            found, failed = run(loaded, items, where, batch_size, reading, settings)
    except Interrupted as stop:
        show_rows(stop.done, [], items, as_json=as_json)
        output.message(f"{len(stop.done)} rows were done; they have no scores.")
        raise
    show_rows(found, failed, items, as_json=as_json)
    if failed:
        raise typer.Exit(EXIT_ROWS_IN_ERROR)


def refuse_alone(options: dict[str, object]) -> None:
    """Raise a usage error for options that mean something with --data only."""
    for name, value in options.items():
        if value is not None:
            raise typer.BadParameter("this belongs to a data set: --data DATASET -o OUT", param_hint=name)


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
    loaded: NLA,
    items: list[Item],
    positions: Any,
    batch_size: int | None,
    reading: dict[str, Any],
    settings: dict[str, Any],
) -> tuple[Explanations, list[Item]]:
    """Explanations of the items that can be read, and the items that cannot, with their reasons.

    Args:
        reading: `overflow` and `parse_special_tokens`.
        settings: how texts are drawn.
    """
    from nla_hub.results import Explanations

    good, failed = [], [item for item in items if item.error is not None]
    for item in items:
        if item.error is None:
            try:
                loaded.check_text(item.content, positions, where=item.name, **reading)
            except InputError as error:
                failed.append(Item(item.name, item.content, error.one_line(), _on_the_command_line(error.next_step)))
            else:
                good.append(item)
    if not good:
        return Explanations(()), failed
    found = loaded.explain(
        [item.content for item in good],
        positions,
        batch_size=batch_size,
        doc_ids=[item.name for item in good],
        **reading,
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
    """The command line's texts, and those of a file: JSON lines, or one text."""
    from nla_hub.explain.inputs import BadItem, read_lines, read_text

    for i, text in enumerate(texts):
        yield Item(f"text {i}", text)
    if file is None:
        return
    name = "stdin" if file == "-" else Path(file).name
    with nullcontext(sys.stdin.buffer) if file == "-" else expand(file).open("rb") as stream:
        found = read_lines(name, stream) if file.endswith(".jsonl") else [read_text(name, stream)]
        for item in found:
            if isinstance(item, BadItem):
                yield Item(item.where, None, item.error)
            else:
                yield Item(item.where, item.content)


def parse_positions(text: str) -> Any:
    """The SDK's `positions` from its spelling on the command line; raises a usage error."""
    if text[:1].isalpha():
        from nla_hub.positions import check_word

        try:
            check_word(text)
        except InputError as error:
            raise typer.BadParameter(error.one_line(), param_hint="--positions") from None
        return text
    try:
        if ":" in text:
            parts = [int(part) if part.strip() else None for part in text.split(":")]
            if len(parts) > 3 or parts[2:] == [0]:
                raise ValueError
            return slice(*parts)
        numbers = [int(part) for part in text.split(",")]
    except ValueError:
        raise typer.BadParameter(
            f"{text!r} is none of last, all, user, assistant, 5, -1, 3,7,9, 10:20, every:N, sample:K or regex:PATTERN",
            param_hint="--positions",
        ) from None
    return numbers[0] if len(numbers) == 1 else numbers
