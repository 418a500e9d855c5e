"""What a push will do: every file of every repository, held against what the Hub has of it. The Hub is only read here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from nla_hub.errors import HubAuthError, HubGatedError, PublishError
from nla_hub.hub import UPLOAD_BRANCHES
from nla_hub.hub.writing import HubWriter, Outgoing, Tree
from nla_hub.publish.release import Entry, Release, StagedRepo

Verify = Literal["score", "checksums"]
"""How far a release is checked once it is on the Hub: loaded by its name and scored too, or its checksums alone."""

State = Literal["new", "changed", "unchanged", "sent", "removed", "not asked"]
"""What becomes of a file. "sent": an earlier push that was cut off has brought it to its branch already."""

GIT_ATTRIBUTES = ".gitattributes"
"""The Hub's own list of what it keeps as large files; it is in every repository and in no release."""


@dataclass(frozen=True)
class PushOptions:
    """How a release is published.

    Attributes:
        private: make new repositories private.
        create_pr: propose it in pull requests, and publish nothing.
        revision: a branch to publish on; None is main.
        collection: owner/title of a collection to add it to.
        verify: see `Verify`; None scores pairs below `check.SCORED_BELOW` bytes where there is room to download them.
        tag_only: publish a tag and leave every branch as it is (steps of reinforcement learning).
        place: a directory for what is downloaded to be scored; None is the system's own for temporary files.
    """

    private: bool = False
    create_pr: bool = False
    revision: str | None = None
    collection: str | None = None
    verify: Verify | None = None
    tag_only: bool = False
    place: Path | None = None

    @property
    def target(self) -> str:
        """The branch that the release is for."""
        return self.revision or "main"


@dataclass(frozen=True)
class Change:
    """One file: its size in bytes and what becomes of it. `estimated`: it is yet to be made, and the size is a guess."""

    name: str
    size: int
    state: State
    estimated: bool = False


@dataclass(frozen=True)
class Remote:
    """What the Hub has of a repository.

    Attributes:
        private: whether it is private.
        main: what main holds.
        target: what the branch to be published on holds; None where there is no such branch yet.
        branch: what an earlier push of this release has left on its branch; None where there is none.
        tagged: what the release's tag names; None where there is no such tag.
        left_over: branches of other releases' pushes that were not finished.
    """

    private: bool
    main: Tree | None
    target: Tree | None
    branch: Tree | None
    tagged: Tree | None
    left_over: tuple[str, ...] = ()


@dataclass(frozen=True)
class RepoPlan:
    """What becomes of one repository; `remote` is None where there is none yet, or where the Hub was not asked."""

    repo: StagedRepo
    remote: Remote | None
    private: bool | None
    changes: tuple[Change, ...]
    is_published: bool = False
    is_tagged: bool = False

    @property
    def to_send(self) -> int:
        """Bytes that are sent at most: the Hub may have more of them, under other names."""
        return sum(c.size for c in self.changes if c.state in ("new", "changed", "not asked"))


@dataclass(frozen=True)
class Plan:
    """What a push of `release` does.

    Attributes:
        unasked: why the Hub's side of it is not known.
        refusals: of a plan that somebody only looks at: the errors, with their next steps, that a push would end with.
        notes: what a push would need besides.
    """

    release: Release
    options: PushOptions
    repos: tuple[RepoPlan, ...]
    unasked: str | None = None
    refusals: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def to_send(self) -> int:
        """Bytes that are sent at most."""
        return sum(repo.to_send for repo in self.repos)

    @property
    def is_published(self) -> bool:
        """Whether every repository's branch holds the release."""
        return all(repo.is_published for repo in self.repos)

    @property
    def is_finished(self) -> bool:
        """Whether nothing is left to be sent, published or tagged."""
        wanted = self.options.create_pr or all(repo.is_tagged for repo in self.repos)
        return self.is_published and wanted


def branch_of(release: Release) -> str:
    """The branch that a release is sent to."""
    return f"{UPLOAD_BRANCHES}{release.id}"


def outgoing(entry: Entry) -> Outgoing:
    """A file of a release as the Hub's writer takes it."""
    return Outgoing(entry.name, entry.content, entry.size, entry.sha256, entry.git_oid)


def faults(repo: StagedRepo, tree: Tree | None, *, exact: bool = True) -> list[str]:
    """How a revision differs from what a release wants of it, a sentence a file; nothing is downloaded.

    Args:
        exact: whether files that the release does not have are faults too.
    """
    if tree is None:
        return [f"{repo.name}: the revision is not there"]
    found = []
    for entry in repo.entries:
        there = tree.files.get(entry.name)
        if there is None:
            found.append(f"{entry.name} is missing")
        elif not outgoing(entry).is_there(there):
            found.append(f"{entry.name} is another file ({there.size:,} bytes of {entry.size:,}, or another checksum)")
    names = {entry.name for entry in repo.entries} | {GIT_ATTRIBUTES}
    if exact:
        found += [f"{name} does not belong to the release" for name in sorted(set(tree.files) - names)]
    return found


def make_plan(release: Release, options: PushOptions, writer: HubWriter) -> Plan:
    """Ask the Hub what it has, and say what is left to do.

    Raises:
        PublishError: what the Hub has stands in the way.
        HubAuthError: no token. HubGatedError: one that may not write there. HubError and its children.
    """
    require_rights(writer, release.repos, create_pr=options.create_pr)
    plan = Plan(release, options, tuple(_repo_plan(repo, release, options, writer) for repo in release.repos))
    _require_way(plan)
    return plan


def unasked_plan(release: Release, options: PushOptions, reason: str) -> Plan:
    """What can be said without the Hub: the files alone."""
    plans = []
    for repo in release.repos:
        changes = tuple(Change(e.name, e.size, "not asked") for e in repo.entries)
        plans.append(RepoPlan(repo, None, None, _sorted((*changes, *_unmade(repo, None)))))
    return Plan(release, options, tuple(plans), unasked=reason)


def look(release: Release, options: PushOptions, writer: HubWriter) -> Plan:
    """A plan for somebody who only wants to see it: what would end a push stands in its `refusals`.

    Raises:
        HubError and its children.
    """
    plan = Plan(release, options, tuple(_repo_plan(repo, release, options, writer) for repo in release.repos))
    refusals = []
    try:
        if not writer.is_anonymous:
            require_rights(writer, release.repos, create_pr=options.create_pr)
    except (HubAuthError, HubGatedError) as error:
        refusals.append(str(error))
    try:
        _require_way(plan)
    except PublishError as error:
        refusals.append(str(error))
    notes = (NOT_LOGGED_IN,) if writer.is_anonymous else ()
    return replace(plan, refusals=tuple(refusals), notes=notes)


def require_rights(writer: HubWriter, repos: Sequence[StagedRepo], *, create_pr: bool = False) -> None:
    """Refuse where this account, or this token of it, may not write; nothing is made.

    Args:
        create_pr: ask for no more than pull requests need, which anybody may open.

    Raises:
        HubAuthError: no token, or a wrong one. HubGatedError: a token that may not write, repositories of somebody else.
    """
    account = writer.account()
    if writer.only_reads():
        raise HubGatedError(
            "This token may not write.",
            where=", ".join(repo.name for repo in repos),
            got=f"a token of {account} that may only read",
            next_step=_TOKEN,
        )
    for owner in sorted({repo.name.partition("/")[0] for repo in repos}):
        if create_pr or writer.may_write(owner):
            continue
        if owner == account:
            raise HubGatedError(
                "This token may not write there.",
                where=owner,
                got=f"a fine-grained token of {account} without that right",
                next_step=_TOKEN,
            )
        there = all(writer.is_private(r.name, r.kind) is not None for r in repos if r.name.partition("/")[0] == owner)
        raise HubGatedError(
            "This account may not write there.",
            where=owner,
            got=f"the token of {account}",
            expected=f"{account}, or an organisation that it may write to",
            next_step=f"correct --repo (yours: {account}/NAME)" + (", or propose it with --create-pr" if there else ""),
        )


NOT_LOGGED_IN = "nobody is logged in: a push needs a token that may write (`hf auth login`, or HF_TOKEN)"
_TOKEN = "a token with the right to write (`hf auth login`)"


# -- one repository --------------------------------------------------------------------------------------------


def _repo_plan(repo: StagedRepo, release: Release, options: PushOptions, writer: HubWriter) -> RepoPlan:
    remote = _remote(repo, release, options, writer)
    if remote is None:
        changes = tuple(Change(e.name, e.size, "new") for e in repo.entries)
        return RepoPlan(repo, None, options.private, _sorted((*changes, *_unmade(repo, None))))
    wanted = remote.tagged if options.tag_only else remote.target
    is_published = not repo.to_be_written and not faults(repo, wanted)
    is_tagged = is_published and remote.tagged is not None and not faults(repo, remote.tagged)
    before = remote.target or remote.main
    return RepoPlan(
        repo, remote, remote.private, _changes(repo, before, remote, options), is_published, is_tagged=is_tagged
    )


def _remote(repo: StagedRepo, release: Release, options: PushOptions, writer: HubWriter) -> Remote | None:
    private = writer.is_private(repo.name, repo.kind)
    if private is None:
        return None
    branches, tags = writer.refs(repo.name, repo.kind)

    def tree(name: str, known: Mapping[str, str]) -> Tree | None:
        return writer.tree(repo.name, repo.kind, known[name]) if name in known else None

    mine = branch_of(release)
    main = tree("main", branches)
    return Remote(
        private,
        main,
        main if options.target == "main" else tree(options.target, branches),
        tree(mine, branches),
        tree(release.tag, tags),
        tuple(sorted(name for name in branches if name.startswith(UPLOAD_BRANCHES) and name != mine)),
    )


def _changes(repo: StagedRepo, before: Tree | None, remote: Remote, options: PushOptions) -> tuple[Change, ...]:
    there = before.files if before else {}
    waiting = remote.branch.files if remote.branch else {}
    changes = []
    for entry in repo.entries:
        file, state = outgoing(entry), "new"
        if file.is_there(there.get(entry.name)):
            state = "unchanged"
        elif file.is_there(waiting.get(entry.name)):
            state = "sent"
        elif entry.name in there:
            state = "changed"
        changes.append(Change(entry.name, entry.size, state))  # type: ignore[arg-type]
    kept = {entry.name for entry in repo.entries} | set(repo.to_be_written) | {GIT_ATTRIBUTES}
    if not options.tag_only:
        changes += [Change(name, f.size, "removed") for name, f in there.items() if name not in kept]
    return _sorted((*changes, *_unmade(repo, before)))


def _unmade(repo: StagedRepo, before: Tree | None) -> list[Change]:
    there = before.files if before else {}
    return [
        Change(name, size, "changed" if name in there else "new", estimated=True)
        for name, size in repo.to_be_written.items()
    ]


def _sorted(changes: Sequence[Change]) -> tuple[Change, ...]:
    return tuple(sorted(changes, key=lambda change: change.name))


# -- what stands in the way ------------------------------------------------------------------------------------


def _require_way(plan: Plan) -> None:
    """Raise a PublishError with everything on the Hub that forbids this push."""
    release, options = plan.release, plan.options
    found, steps = [], []
    rehearsal = release.facts is not None and release.facts.rehearsal
    for one in plan.repos:
        name, remote = one.repo.name, one.remote
        if remote is None:
            if options.create_pr:
                found.append(f"{name}: there is no such repository to make a pull request for")
                steps.append("correct --repo, or leave --create-pr out")
            continue
        if (options.private or rehearsal) and not remote.private:
            found.append(f"{name} is there already, and public: what is sent there can be read by everybody")
            ways = [
                "make it private in its settings",
                f"name another with --repo{' and --private' if rehearsal else ''}",
            ]
            steps.append(", or ".join(ways if rehearsal else [*ways, "leave --private out"]))
        if not options.create_pr and remote.tagged is not None and not one.is_tagged:
            found.append(
                f"{name}: the tag {release.tag} is there already, and names {_tagged_as(one.repo, remote.tagged, release)}"
                f" ({remote.tagged.commit[:12]})"
            )
            steps.append("another name for this one: --tag NAME")
    if rehearsal and not all(one.private for one in plan.repos):
        found.append("this is a rehearsal's pair: random weights, which nobody should find")
        new = not options.private and any(one.remote is None for one in plan.repos)
        steps.append("--private, or train it without --rehearse" if new else "or train it without --rehearse")
    if found:
        raise PublishError(
            "The release cannot be published as asked.", faults=found, next_step="; ".join(dict.fromkeys(steps))
        )


def _tagged_as(repo: StagedRepo, tagged: Tree, release: Release) -> str:
    """What a tag names that cannot be this release's, in words."""
    if not faults(repo, tagged):
        return "this release, and the branch has moved on"
    if release.id is not None and release.tag.endswith(release.id):
        return "this release with other words (card, sidecar or licence files)"
    return "another release"
