"""`nla-hub push`: a pair or a data set goes to the Hub; the same line continues where it stopped."""

from __future__ import annotations

import os
import re
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from nla_hub.cli import output
from nla_hub.cli.convert import ended_by_sigterm
from nla_hub.cli.explain_job import PLAIN_SECONDS, command
from nla_hub.errors import HubError, InputError
from nla_hub.locate import expand
from nla_hub.units import size

if TYPE_CHECKING:
    from nla_hub.hub import HubOptions
    from nla_hub.hub.writing import HubWriter
    from nla_hub.publish.plan import Plan
    from nla_hub.publish.prepare import Prepared
    from nla_hub.publish.push import Pushed


T = TypeVar("T")

EXIT_INTERRUPTED = 130


class Form(StrEnum):
    """What the published weights are."""

    full = "full"
    lora = "lora"
    merged = "merged"


class Packing(StrEnum):
    """In what they may be packed."""

    fp8 = "fp8"
    nf4 = "nf4"


class Verify(StrEnum):
    """How far the release is checked once it is on the Hub."""

    score = "score"
    checksums = "checksums"


def register(app: typer.Typer) -> None:
    """Add `push` to the command."""
    app.command("push")(push)


def push(
    source: Annotated[
        str, typer.Argument(metavar="RUN_OR_DIR", help="A run, a directory with av/ and ar/, or a data set.")
    ],
    repo: Annotated[
        str | None,
        typer.Option(
            "--repo",
            metavar="OWNER/NAME",
            help="Name: NAME-av and NAME-ar. A data set needs one.",
            show_default="nla-BASE-L[K] of your account",
        ),
    ] = None,
    single_repo: Annotated[
        bool, typer.Option("--single-repo", help="One repository OWNER/NAME with av/ and ar/.")
    ] = False,
    private: Annotated[bool, typer.Option("--private", help="Make new repositories private.")] = False,
    create_pr: Annotated[bool, typer.Option("--create-pr", help="Open pull requests, and publish nothing.")] = False,
    revision: Annotated[
        str | None, typer.Option("--revision", metavar="BRANCH", help="Publish on this branch.", show_default="main")
    ] = None,
    collection: Annotated[
        str | None, typer.Option("--collection", metavar="OWNER/TITLE", help="Add it to this collection of the Hub.")
    ] = None,
    tag: Annotated[
        str | None, typer.Option("--tag", help="What the release is called.", show_default="nla-ID, data-ID")
    ] = None,
    form: Annotated[
        Form | None,
        typer.Option(help="Complete weights, LoRA factors, or factors merged.", show_default="as they lie"),
    ] = None,
    quantize: Annotated[Packing | None, typer.Option("--quantize", help="Pack the weights.")] = None,
    licence: Annotated[
        str | None,
        typer.Option("--licence", metavar="ID", help="Licence, as the Hub spells it.", show_default="the base model's"),
    ] = None,
    base_model: Annotated[
        str | None,
        typer.Option(
            "--base-model", metavar="OWNER/NAME[@COMMIT]", help="The base model, where the files do not say it."
        ),
    ] = None,
    steps: Annotated[bool, typer.Option("--steps", help="The steps of RL too, each as a tag.")] = False,
    evaluation_set: Annotated[
        str | None,
        typer.Option(
            "--evaluation-set",
            metavar="OWNER/NAME",
            help="Data set that the scores were measured on, published first where it is not there.",
        ),
    ] = None,
    gpu_price: Annotated[
        float | None,
        typer.Option("--gpu-price", min=0, help="What a GPU cost for an hour, in US$.", show_default="not known"),
    ] = None,
    verify: Annotated[
        Verify | None,
        typer.Option(
            help="Check the published release by checksums alone, or also download, load and score it.",
            show_default="score below 20 GB",
        ),
    ] = None,
    work: Annotated[
        Path | None,
        typer.Option(
            "--work",
            metavar="DIR",
            help="For weights that are made and downloads that are scored.",
            show_default="a temporary one",
        ),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan; send and write nothing.")] = False,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask before sending.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="JSON lines: the plan, then what was published.")] = False,
) -> None:
    """Publish a pair or a data set on the Hugging Face Hub. The last line is its URL.

    Files are searched for secrets and verified, the plan is shown, and nothing is sent before you agree. A release is sent
    to branches and checked there; then main gets all of it in one commit, AR before AV; then it is checked again and
    tagged. The same command finishes a push that was cut off, and sends nothing twice.

    A dry run only asks the Hub what it has; HF_HUB_OFFLINE=1 keeps it from that too. Its exit code is 1 where the push would be
    refused. The token is that of `hf auth login`, or HF_TOKEN.
    """
    from nla_hub.hub import HubOptions
    from nla_hub.hub.writing import HubWriter
    from nla_hub.publish import prepare
    from nla_hub.publish.plan import PushOptions
    from nla_hub.publish.staging.found import find

    found = find(_directory(source))
    options = PushOptions(
        private=private,
        create_pr=create_pr,
        revision=revision,
        collection=collection,
        verify=verify.value if verify else None,
        place=work,
    )
    wanted = prepare.wanted_of(
        repo,
        single_repo=single_repo,
        form=form.value if form else None,
        quantize=quantize.value if quantize else None,
        tag=tag,
        licence=licence,
        base_model=base_model,
        steps=steps,
        evaluation_set=evaluation_set,
        gpu_price=gpu_price,
    )
    prepare.require_options(options, wanted)
    if not dry_run:
        require_answer(yes)
    hub = HubOptions()
    writer = HubWriter(hub)
    with (
        ended_at_once(),
        ended_by_sigterm(),
        prepare.prepared(found, wanted, options, writer=writer, hub=hub, work=work, dry_run=dry_run) as ready,
    ):
        planned = prepare.plans(ready, writer, dry_run=dry_run)
        show(ready, planned, result=dry_run, as_json=as_json)
        if dry_run:
            _end_if_refused(planned, as_json=as_json)
        else:
            confirm(planned, yes=yes)
            send(ready, planned, writer=writer, hub=hub, as_json=as_json)


def _directory(source: str) -> Path:
    """The place that a user means by RUN_OR_DIR; raises an InputError where that can only be a repository."""
    from nla_hub.zoo import zoo

    place = expand(source)
    if not place.exists() and source in zoo():
        raise InputError(
            "There is no such directory; this is the name of a pair that somebody has published.",
            got=repr(source),
            expected="a run directory, one with av/ and ar/, or a data set",
            next_step=f"nla-hub download {source} --to ./pair, then nla-hub push ./pair",
        )
    if not place.exists() and re.fullmatch(r"[\w.-]+/[\w.-]+(@.*)?", source):
        raise InputError(
            "There is no such directory; a repository of the Hub cannot be pushed.",
            got=repr(source),
            expected="a run directory, one with av/ and ar/, or a data set",
            next_step="name the directory first, and the repository with --repo",
        )
    return place


class _NobodyToAsk(typer.BadParameter):
    """Wrong usage, told without the name of a parameter: none is wrong."""

    def format_message(self) -> str:
        """The sentence alone."""
        return self.message


def require_answer(yes: bool) -> None:
    """Refuse at once, as wrong usage, where a question could not be answered."""
    if not yes and not _can_ask():
        raise _NobodyToAsk(
            "Nothing is sent before somebody agrees, and without a terminal nobody can be asked. "
            f"--dry-run shows the plan, --yes agrees to it: {command()} --yes"
        )


def _can_ask() -> bool:
    return sys.stdin.isatty() and sys.stderr.isatty()


def show(ready: Prepared, planned: Sequence[Plan], *, result: bool, as_json: bool) -> None:
    """Print the plan: on stdout where it is what was asked for (`result`, JSON), else for the person at the terminal."""
    from nla_hub.publish.check import depth
    from nla_hub.publish.plan_words import lines, to_mapping

    for plan in planned:
        afterwards = depth(plan.release, plan.options)[1]
        if as_json:
            output.print_json_lines([{**to_mapping(plan), "checked": list(ready.checked), "verify": afterwards}])
            continue
        text = "\n".join([*lines(plan), f"afterwards {afterwards}"])
        if result:
            output.print_text(text)
        else:
            output.message(output.clean(text))
    if not as_json:
        for line in ready.checked:
            output.message(f"checked: {line}")


def _end_if_refused(planned: Sequence[Plan], *, as_json: bool) -> None:
    """End a dry run with exit code 1 where a push would be refused, after why and what to do; JSON has said it in the plan."""
    from nla_hub.publish.plan_words import refusal

    if told := refusal(planned):
        if not as_json:
            output.print_text("\n".join(told))
        raise typer.Exit(1)


def confirm(planned: Sequence[Plan], *, yes: bool) -> None:
    """Ask once, before anything is sent; typer.Abort where the answer is no."""
    if yes or all(plan.is_finished for plan in planned):
        return
    total = sum(plan.to_send for plan in planned)
    names = ", ".join(dict.fromkeys(one.repo.name for plan in planned for one in plan.repos))
    if not typer.confirm(f"Send {size(total)} to {names}?", default=False, err=True):
        output.message("Nothing was sent.")
        raise typer.Abort


def send(
    ready: Prepared, planned: Sequence[Plan], *, writer: HubWriter, hub: HubOptions, as_json: bool
) -> list[Pushed]:
    """Push what was planned, show how it goes, and print the addresses, the pair's last.

    Raises:
        KeyboardInterrupt, HubError: after a line that says how to go on. See also `push.push`.
    """
    from nla_hub.publish.prepare import push_parts

    try:
        done = _beside(lambda: push_parts(ready, planned, writer=writer, hub=hub, listener=_View(planned)))
    except (KeyboardInterrupt, HubError):
        output.message(f"What was sent is kept on the Hub. The same command goes on:\n  {command()}")
        raise
    for pushed in done:
        if as_json:
            output.print_json_lines([to_mapping(pushed)])
        else:
            for repo in pushed.repos:
                output.print_text(repo.url)
    return done


def _beside(act: Callable[[], T]) -> T:
    """What `act` returns, called in a thread beside this one, which goes on at once when somebody presses Ctrl-C.

    The Hub's client would end the files first that it is just sending.
    """
    answers: list[T] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            answers.append(act())
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    while thread.is_alive():
        thread.join(0.1)
    if errors:
        raise errors[0]
    return answers[0]


@contextmanager
def ended_at_once() -> Iterator[None]:
    """Ctrl-C and SIGTERM end the process once what is inside has tidied up: threads that still send are not waited for."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit) as stop:
        if threading.active_count() == 1:
            raise
        code = EXIT_INTERRUPTED if isinstance(stop, KeyboardInterrupt) else stop.code
        print("Interrupted.", file=sys.stderr)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code if isinstance(code, int) else 1)


def to_mapping(pushed: Pushed) -> dict[str, Any]:
    """A release that is on the Hub, as JSON has it."""
    return {
        "event": "pushed",
        "release": pushed.release_id,
        "tag": pushed.tag,
        "repos": [vars(repo) for repo in pushed.repos],
        "collection": pushed.collection,
        "changed": pushed.changed,
        "url": pushed.url,
    }


class _View:
    """How a push goes: sentences, and a line every half minute where the client draws no bars of its own."""

    def __init__(self, planned: Sequence[Plan]) -> None:
        self._total = sum(plan.to_send for plan in planned)
        self._sent = 0
        self._told = time.monotonic()

    def say(self, text: str) -> None:
        """See `push.Listener.say`."""
        output.message(text)

    def sent(self, repo: str, name: str, size_: int) -> None:
        """See `push.Listener.sent`."""
        self._sent += size_
        if not output.progress_wanted() and time.monotonic() - self._told >= PLAIN_SECONDS:
            self._told = time.monotonic()
            output.message(f"{size(self._sent)} of about {size(self._total)} are there, {repo}/{name} the last")
