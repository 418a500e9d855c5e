"""`nla-hub new-adapter`: the files that a new base model begins with."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from nla_hub.cli import output


def register(app: typer.Typer) -> None:
    """Add `new-adapter` to the command."""
    app.command("new-adapter")(new_adapter)


def new_adapter(
    base: Annotated[str, typer.Argument(help="The base model: owner/name of the Hub, or ./directory.")],
    layer: Annotated[
        int,
        typer.Option(
            "--layer", help="K, counted from 0: the block whose output is read. Two thirds of the depth is usual."
        ),
    ],
    out: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="The directory to write; it must not exist.", show_default="nla-BASE-LK"),
    ] = None,
) -> None:
    """Write what a new base model needs: a recipe, a sidecar's template, and a plug-in with an adapter where none reads it.

    Its config and tokenizer are read, no weights.
    """
    from nla_hub.training.scaffold.new_base import read_base
    from nla_hub.training.scaffold.write import write_scaffold

    found = read_base(base)
    written = write_scaffold(found, layer, out)
    for name in written.files:
        output.print_text(str(written.directory / name))
    if written.is_new:
        output.message(f"The family {written.adapter!r} is new: its adapter was guessed and passes check_adapter.")
    else:
        output.message(f"The adapter {written.adapter!r} reads this family already, so no adapter was written.")
    output.message(f"marker: {written.marker}")
    first = f"cd {written.directory} && pip install -e . && python -m pytest tests" if written.is_new else None
    for step in (first, f"nla-hub recipes validate {written.recipe}", f"nla-hub train {written.recipe} --plan"):
        if step is not None:
            output.message(f"next: {step}")
