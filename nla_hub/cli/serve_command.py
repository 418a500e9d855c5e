"""`nla-hub serve-command`: how to start a server that `--engine remote` can use."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

import typer

from nla_hub.cli import output, pair
from nla_hub.locate import resolve_pair


class Dtype(StrEnum):
    """What a server may compute in."""

    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


def register(app: typer.Typer) -> None:
    """Add `serve-command` to the command."""
    app.command("serve-command")(serve_command)


def serve_command(
    nla: Annotated[str, typer.Argument(metavar="NLA", help="A zoo name, owner/name, or ./directory.")],
    base_model: pair.Base = None,
    subfolder: pair.Subfolder = "",
    sidecar: pair.SidecarFile = None,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port to listen on.")] = 8000,
    tensor_parallel: Annotated[int, typer.Option(min=1, help="Cards that share the model.")] = 1,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="The longest answer that there is room for.")] = 1024,
    dtype: Annotated[
        Dtype | None, typer.Option(help="What to compute in; what the embedding table is stored in by default.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object.")] = False,
) -> None:
    """Print the command that serves an AV with vLLM, for `--engine remote` here or elsewhere.

    The command alone goes to stdout, what to know about it to stderr. Nothing is started and no weights are downloaded; run
    the command where vLLM is installed (pip install 'nla-hub[vllm]').
    """
    from nla_hub.loading import open_pair
    from nla_hub.opening import read_contract
    from nla_hub.serving import serving

    refs = resolve_pair(nla, base_model=base_model, subfolder=subfolder)
    opened = open_pair(refs, components=("av",), sidecar=read_contract(sidecar), weights=False)
    found = serving(
        opened,
        host=host,
        port=port,
        tensor_parallel=tensor_parallel,
        max_new_tokens=max_new_tokens,
        dtype=None if dtype is None else dtype.value,
    )
    if as_json:
        output.print_json_lines([found.to_mapping()])
    else:
        output.print_text(found.command)
    for note in found.notes:
        output.message(note)
