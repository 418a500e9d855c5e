"""The command `nla-hub`: its options, its commands, and what becomes of an error.

Each command lives in a file of this package whose `register(app)` adds it. None of them imports torch when loaded, so
`--help` and completion answer at once.

Exit codes: 0 ok, 1 a known error, 2 wrong usage, 3 a gate failed, 4 some rows in error, 130 interrupted.
"""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Sequence
from importlib import import_module
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from nla_hub import __version__
from nla_hub.cli import output, wording
from nla_hub.errors import NLAError

COMMANDS = (
    "explain",
    "report",
    "eval",
    "steer",
    "train",
    "new-adapter",
    "models",
    "download",
    "recipes",
    "convert",
    "push",
    "bench",
    "serve-command",
    "doctor",
)
"""Commands in the order of `nla-hub --help`; each is in the file of this package that is named like it, with "_" for "-"."""

EXIT_ROWS_IN_ERROR = 4
EXIT_INTERRUPTED = 130
_ANYWHERE = ("-q", "--quiet", "-v", "--verbose")


class RootGroup(TyperGroup):
    """The command's error handling, and `-q`/`-v` accepted after the command's name too."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Move `-q` and `-v` to the front; what stands behind `--` is text."""
        end = args.index("--") if "--" in args else len(args)
        front = [arg for arg in args[:end] if arg in _ANYWHERE]
        rest = [arg for arg in args[:end] if arg not in _ANYWHERE]
        return super().parse_args(ctx, [*front, *rest, *args[end:]])

    def invoke(self, ctx: Any) -> Any:
        """Run a command; what an error of the SDK advises is put into the words of the command's own options."""
        try:
            return super().invoke(ctx)
        except NLAError as error:
            command = self.get_command(ctx, ctx.invoked_subcommand or "")
            wording.translate(error, {name for option in command.params for name in option.opts} if command else ())
            raise

    def main(self, args: Sequence[str] | None = None, *others: Any, **settings: Any) -> Any:
        """Run; a user's mistake becomes a message on stderr and its exit code."""
        try:
            result = super().main(args, *others, **settings)
            sys.stdout.flush()  # here, where a closed pipe can still be handled
            return result
        except NLAError as error:
            _fail(str(error), error.exit_code)
        except KeyboardInterrupt:
            _fail("Interrupted.", EXIT_INTERRUPTED)
        except BrokenPipeError:
            _close_stdout()
            sys.exit(1)
        except OSError as error:
            where = f"{error.filename}: " if error.filename else ""
            _fail(f"{where}{error.strerror or error}", 1)


def _fail(text: str, code: int) -> None:
    if os.environ.get("HF_DEBUG"):
        traceback.print_exc()
    print(f"Error: {output.clean(text)}" if code != EXIT_INTERRUPTED else text, file=sys.stderr)
    sys.exit(code)


def _close_stdout() -> None:
    """Point stdout at nothing, so that the interpreter's last flush cannot complain about the closed pipe."""
    sink = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(sink, sys.stdout.fileno())
    except (OSError, ValueError):  # a stdout without a descriptor, as under test
        pass
    finally:
        os.close(sink)


app = typer.Typer(
    name="nla-hub",
    cls=RootGroup,
    help="Read a language model's activations as text, score the text, steer with it, train your own.",
    epilog="-q and -v may stand anywhere. Results go to stdout, messages to stderr; HF_DEBUG=1 shows tracebacks.",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(wanted: bool) -> None:
    if wanted:
        print(f"nla-hub {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Only results, warnings and errors.")] = False,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Details of what is done.")] = False,
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and exit.", callback=_version, is_eager=True)
    ] = False,
) -> None:
    output.configure(quiet=quiet, verbose=verbose)


for _name in COMMANDS:
    import_module(f"nla_hub.cli.{_name.replace('-', '_')}").register(app)


def main() -> None:
    """Entry point of the console script."""
    output.quiet_libraries(verbose=not {"-v", "--verbose"}.isdisjoint(sys.argv))
    app(prog_name="nla-hub")
