"""`nla-hub recipes`: training recipes, ours and yours. A name that ends in .yaml is a file."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from nla_hub import yaml_io
from nla_hub.cli import output
from nla_hub.errors import RunError

group = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="List, check and copy training recipes.")

Json = Annotated[bool, typer.Option("--json", help="One JSON object a line.")]
Recipe = Annotated[str, typer.Argument(metavar="RECIPE", help="A recipe's name, or a file that ends in .yaml.")]
Overrides = Annotated[list[str] | None, typer.Argument(metavar="[KEY.SUB=VALUE]...", help="Settings to change.")]


def register(app: typer.Typer) -> None:
    """Add `recipes` to the command."""
    app.add_typer(group, name="recipes")


@group.command("ls")
def ls(json: Json = False) -> None:
    """List the recipes that come with nla-hub."""
    from nla_hub.training.recipe import load_recipe, recipe_names, recipe_path

    rows = [
        {"name": name, "summary": load_recipe(name).summary, "command": _first_comment(recipe_path(name))}
        for name in recipe_names()
    ]
    if json:
        output.print_json_lines(rows)
    else:
        output.print_table(("name", "summary"), [(row["name"], row["summary"]) for row in rows])
        output.message("how one is started: nla-hub recipes launch NAME; what it needs: nla-hub train NAME --plan")


@group.command("show")
def show(recipe: Recipe, overrides: Overrides = None, json: Json = False) -> None:
    """Print a recipe as it would run: checked, every default written out."""
    from nla_hub.schema import to_mapping
    from nla_hub.training.recipe import load_recipe

    resolved = to_mapping(load_recipe(recipe, overrides or ()))
    if json:
        output.print_json_lines([resolved])
    else:
        sys.stdout.write(yaml_io.dumps(resolved))


@group.command("validate")
def validate(recipe: Recipe, overrides: Overrides = None) -> None:
    """Check a recipe; all of its faults are listed at once."""
    from nla_hub.training.checks import check_recipe
    from nla_hub.training.recipe import load_recipe

    check_recipe(load_recipe(recipe, overrides or ()), runs_here=False)
    output.print_text(f"{recipe}: valid")


@group.command("launch")
def launch(recipe: Recipe, overrides: Overrides = None) -> None:
    """Print the configuration with which `accelerate launch` starts a recipe's processes."""
    from nla_hub.training.launch import launch_text
    from nla_hub.training.recipe import load_recipe

    sys.stdout.write(launch_text(load_recipe(recipe, overrides or ())))


@group.command("cp")
def cp(
    name: Annotated[str, typer.Argument(help="A name that `recipes ls` lists.")],
    file: Annotated[Path, typer.Argument(help="The file to write; it must not exist.")],
) -> None:
    """Copy a recipe to a file of your own, comments included."""
    from nla_hub.training.recipe import recipe_path

    source = recipe_path(name)
    target = file / source.name if file.is_dir() else file
    if target.suffix != ".yaml":
        raise RunError("A recipe's file name ends in .yaml.", where=target, next_step=f"write it to {target}.yaml")
    if target.exists():
        raise RunError("This file exists already; nothing was written.", where=target, next_step="choose another name")
    if not target.parent.is_dir():
        raise RunError("There is no such directory; nothing was written.", where=target.parent)
    yaml_io.write_text(target, source.read_text(encoding="utf-8"))
    output.message(f"next: edit it, then nla-hub train {target} --plan")
    output.print_text(str(target))


def _first_comment(path: Path) -> str | None:
    """A recipe's first comment line, which is its launch command."""
    for line in path.read_text(encoding="utf-8").splitlines():
        if line.startswith("#"):
            return line.lstrip("# ").strip()
        if line.strip():
            break
    return None
