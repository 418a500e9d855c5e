"""`nla-hub explain --data ... --push-to OWNER/NAME`: a job whose rows become a data set on the Hub once it is done.

Whatever can be refused is refused before anything is computed: the name, the licence, the token and its rights. The question is
asked then, too, because nobody sits there when a long job ends.
"""

from __future__ import annotations

import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from nla_hub.cli import output
from nla_hub.cli import push as push_command
from nla_hub.cli.convert import ended_by_sigterm
from nla_hub.errors import NLAError

if TYPE_CHECKING:
    from nla_hub.publish.plan import RepoPlan


@dataclass(frozen=True)
class PushTo:
    """Where the rows of a job go.

    Attributes:
        repo: OWNER/NAME. licence: as the Hub spells it, or NAME=https://LINK; a PublishError says so where it is None.
        private: make a new repository private.
        yes: ask nothing.
    """

    repo: str
    licence: str | None
    private: bool
    yes: bool

    def check(self) -> None:
        """Refuse what the push at the end would refuse, as far as that can be known; nothing is made on the Hub.

        Raises:
            PublishError: a name that the Hub does not take, no licence, a public repository where a private one is wanted.
            HubAuthError, HubGatedError: no token, or one that may not write there. HubError and its children.
            typer.BadParameter: nobody can be asked. typer.Abort: the answer is no.
        """
        from nla_hub.hub import HubOptions
        from nla_hub.hub.writing import HubWriter
        from nla_hub.publish.data.datasets import required_licence
        from nla_hub.publish.plan import PushOptions, make_plan
        from nla_hub.publish.release import Release, StagedRepo
        from nla_hub.publish.staging.naming import data_name

        if not self.yes and not (sys.stdin.isatty() and sys.stderr.isatty()):
            raise typer.BadParameter(
                "nobody can be asked here whether the rows may be published: add --yes", param_hint="--push-to"
            )
        options = PushOptions(private=self.private)
        try:
            licence = required_licence(self.licence)
            nothing = StagedRepo(data_name(self.repo), "dataset", "data", ())
            plan = make_plan(Release((nothing,), "unknown", "data-unknown"), options, HubWriter(HubOptions()))
        except NLAError as error:
            error.next_step = None if error.next_step is None else error.next_step.replace("--repo ", "--push-to ")
            raise
        text = f"When the job is done, its rows are published under {licence.name or licence.id}: {_described(plan.repos[0])}."
        output.message(text)
        if not self.yes and not typer.confirm("Go on?", default=False, err=True):
            raise typer.Abort

    def push(self, out: Path, *, as_json: bool) -> None:
        """Publish a finished job, and say how to do that alone where it fails: the job is kept.

        Raises:
            PublishError: rows that must not be published. See also `publish.push.push`.
        """
        from nla_hub.hub import HubOptions
        from nla_hub.hub.writing import HubWriter
        from nla_hub.publish import prepare
        from nla_hub.publish.plan import PushOptions
        from nla_hub.publish.staging.found import find

        hub = HubOptions()
        writer = HubWriter(hub)
        wanted = prepare.wanted_of(self.repo, licence=self.licence)
        options = PushOptions(private=self.private)
        with push_command.ended_at_once():
            try:
                with ended_by_sigterm(), prepare.prepared(find(out), wanted, options, writer=writer, hub=hub) as ready:
                    planned = prepare.plans(ready, writer, dry_run=False)
                    push_command.show(ready, planned, result=False, as_json=False)
                    push_command.send(ready, planned, writer=writer, hub=hub, as_json=as_json)
            except BaseException:
                output.message(f"The job is done and kept. This publishes it:\n  {self.command(out)}")
                raise

    def command(self, out: Path) -> str:
        """The command that publishes a job that is done."""
        place = str(out)
        words = ["nla-hub", "push", f"./{place}" if place.startswith("-") else place, "--repo", self.repo]
        words += ["--licence", self.licence or ""]
        return shlex.join([*words, *(["--private"] if self.private else [])])


def wanted(push_to: str | None, licence: str | None, *, private: bool, yes: bool) -> PushTo | None:
    """What the options of the command ask for; a usage error for those that mean nothing without --push-to."""
    if push_to is not None:
        return PushTo(push_to, licence, private, yes)
    for name, given in (("--licence", licence is not None), ("--private", private)):
        if given:
            raise typer.BadParameter("this belongs to --push-to OWNER/NAME", param_hint=name)
    return None


def _described(plan: RepoPlan) -> str:
    """A repository before a job: what becomes of it."""
    kind = "private" if plan.private else "public"
    if plan.remote is None:
        return f"a new {kind} data set {plan.repo.name}"
    there = f"; its {len(plan.changes)} files give way to those of the job" if plan.changes else ""
    return f"the {kind} data set {plan.repo.name}, which is there already{there}"
