"""A release goes to the Hub: sent to branches, checked there, one commit on main for each repository, checked again, tagged.

What was done is known from the Hub alone, so the same push made again goes on wherever one was cut off:

    branch nla-hub/ID         files that were sent; gone when everything is done
    main holds the release    published
    the tag is there          published and checked

main never holds a part of a release. While one repository of two is published a reader is told so (`loading`): the AV's
sidecar names a release, and the AR's has not got it yet.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from nla_hub.errors import GateFailedError, NLAError, PublishError
from nla_hub.hub import HubOptions
from nla_hub.hub.writing import HubWriter, PullRequest, Tree
from nla_hub.publish import check
from nla_hub.publish.check import Figures, LocalPair
from nla_hub.publish.plan import (
    GIT_ATTRIBUTES,
    Plan,
    RepoPlan,
    branch_of,
    faults,
    make_plan,
    outgoing,
)
from nla_hub.publish.plan import PushOptions as PushOptions
from nla_hub.publish.release import Release, RepoKind, RepoRole, StagedRepo


class Listener(Protocol):
    """Told what happens."""

    def say(self, text: str) -> None:
        """A step is begun or done, in a sentence."""

    def sent(self, repo: str, name: str, size: int) -> None:
        """A file of so many bytes is on the Hub."""


class Silent:
    """A listener that does nothing."""

    def say(self, text: str) -> None:
        """See `Listener.say`."""

    def sent(self, repo: str, name: str, size: int) -> None:
        """See `Listener.sent`."""


@dataclass(frozen=True)
class PushedRepo:
    """One repository of a release that is on the Hub.

    Attributes:
        url: its page, or its pull request's.
        commit: that holds the release.
    """

    name: str
    kind: RepoKind
    role: RepoRole
    url: str
    commit: str


@dataclass(frozen=True)
class Pushed:
    """A release on the Hub.

    Attributes:
        repos: in the order of the release: the AR before the AV.
        release_id: see `release.release_id`.
        tag: None for pull requests.
        collection: its page.
        changed: False where everything was there already.
    """

    repos: tuple[PushedRepo, ...]
    release_id: str
    tag: str | None
    collection: str | None = None
    changed: bool = True

    @property
    def url(self) -> str:
        """The page to look at: of the AV, or of the only repository."""
        return self.repos[-1].url


def push(
    release: Release,
    options: PushOptions,
    *,
    writer: HubWriter,
    hub: HubOptions,
    listener: Listener | None = None,
    local: LocalPair | None = None,
    plan: Plan | None = None,
) -> Pushed:
    """Publish a release, or finish what an earlier push of it began.

    Args:
        release: staged, scrubbed and verified; no file is left to be made.
        hub: how the pair is loaded to be scored.
        local: the pair that it is scored beside; None for the release's own files.
        plan: what `plan.make_plan` found, where somebody has agreed to it: whatever changes on the Hub after that is not
            overwritten.

    Raises:
        PublishError: the Hub has something that stands in the way.
        GateFailedError: what lies on the Hub is not what was sent; it is not tagged then.
        HubError and its children.
    """
    plan = plan or make_plan(release, options, writer)
    run = _Push(plan, writer, hub, listener or Silent())
    if plan.is_finished:
        return run.finished()
    return run.propose() if options.create_pr else run.publish(local)


class _Push:
    def __init__(self, plan: Plan, writer: HubWriter, hub: HubOptions, listener: Listener) -> None:
        self.plan = plan
        self.release = plan.release
        self.options = plan.options
        self.writer = writer
        self.hub = hub
        self.listener = listener
        self.branch = branch_of(plan.release)
        self.message = f"Release {plan.release.tag} ({plan.release.id})"

    # -- the whole of it ---------------------------------------------------------------------------------------

    def publish(self, local: LocalPair | None) -> Pushed:
        scored, how = check.depth(self.release, self.options)
        wanted: Figures | None = None
        if scored:
            self.listener.say("loading the local pair, to know what it answers")
            wanted = check.expected(self.release, local, self.options, self.hub)
        starts = {one.repo.name: self._start(one) for one in self._missing}
        sent = {one.repo.name: self._send(one.repo, starts[one.repo.name]) for one in self._missing}
        commits = {one.repo.name: self._published_tree(one).commit for one in self.plan.repos if one.is_published}
        for one in self._missing:
            self._require_published(commits)
            commits[one.repo.name] = self._publish(one.repo, starts[one.repo.name], sent[one.repo.name])
        self._require_published(commits)
        self.listener.say(f"checked: {how if not scored else 'every file by its checksum'}")
        if wanted is not None:
            self._require_answers(wanted, commits)
        for one in self.plan.repos:
            commit = commits[one.repo.name]
            self.writer.tag(one.repo.name, one.repo.kind, self.release.tag, commit=commit, message=self.message)
            self.listener.say(f"{one.repo.name}: tagged {self.release.tag}")
        return self._done(commits, changed=True)

    def propose(self) -> Pushed:
        """Pull requests that name each other, each with the whole of its repository."""
        repos = [one.repo for one in self._missing]
        requests = {repo.name: self._request(repo, repos) for repo in repos}
        commits = {}
        for repo in repos:
            request = requests[repo.name]
            tree = self._deliver(repo, request.ref)
            commits[repo.name] = self._commit(repo, request.ref, tree, tree.commit)
            self._require_equal(repo, request.ref, published=False)
        for repo in repos:
            self.writer.offer(repo.name, repo.kind, requests[repo.name])
            self.listener.say(f"{repo.name}: pull request {requests[repo.name].number} is ready")
        return Pushed(
            tuple(PushedRepo(r.name, r.kind, r.role, requests[r.name].url, commits[r.name]) for r in repos),
            self._id,
            tag=None,
        )

    def finished(self) -> Pushed:
        """Everything is there; what may be left to do is to tidy up."""
        commits = {one.repo.name: self._published_tree(one).commit for one in self.plan.repos}
        self.listener.say(f"release {self._id} is on the Hub already; nothing is sent")
        return self._done(commits, changed=False)

    def _done(self, commits: dict[str, str], *, changed: bool) -> Pushed:
        for one in self.plan.repos:
            if not one.is_published or (one.remote is not None and one.remote.branch is not None):
                self.writer.delete_branch(one.repo.name, one.repo.kind, self.branch)
        repos = [one.repo for one in self.plan.repos]
        collection = None
        if self.options.collection is not None and not self.options.create_pr:
            items = [(repo.name, repo.kind) for repo in repos]
            collection = self.writer.collect(self.options.collection, items, private=self._private)
            self.listener.say(f"in the collection {collection}")
        revision = self.release.tag if self.options.tag_only else self.options.revision
        return Pushed(
            tuple(
                PushedRepo(r.name, r.kind, r.role, self.writer.url(r.name, r.kind, revision), commits[r.name])
                for r in repos
            ),
            self._id,
            None if self.options.create_pr else self.release.tag,
            collection,
            changed,
        )

    # -- its steps ---------------------------------------------------------------------------------------------

    @property
    def _id(self) -> str:
        assert self.release.id is not None, "a release is sent once its weights are made"
        return self.release.id

    @property
    def _private(self) -> bool:
        return any(one.private for one in self.plan.repos)

    @property
    def _missing(self) -> list[RepoPlan]:
        return [one for one in self.plan.repos if not one.is_published]

    def _published_tree(self, one: RepoPlan) -> Tree:
        assert one.remote is not None
        tree = one.remote.tagged if self.options.tag_only else one.remote.target
        assert tree is not None, "it is published"
        return tree

    def _start(self, one: RepoPlan) -> Tree:
        """The branch to be published on, as the plan saw it; repository and branch are made where they are not there.

        All are made before anything is sent: what is refused is refused at once.
        """
        repo, remote, target = one.repo, one.remote, self.options.target
        if remote is not None and remote.target is not None:
            return remote.target
        if remote is None:
            self.writer.create(repo.name, repo.kind, private=self.options.private)
            self.listener.say(f"{repo.name}: {'private' if self.options.private else 'public'} repository made")
        main = remote.main if remote is not None else self.writer.tree(repo.name, repo.kind, "main")
        if main is None or (remote is None and set(main.files) - {GIT_ATTRIBUTES}):
            raise PublishError(
                "Somebody else has changed this repository since the plan was made.",
                where=repo.name,
                next_step="look at its page; the same command shows the new plan",
            )
        if target != "main" and not self.options.tag_only:
            self.writer.branch(repo.name, repo.kind, target, start=main.commit)
        return main

    def _send(self, repo: StagedRepo, start: Tree) -> Tree:
        """The release on its branch."""
        self.writer.branch(repo.name, repo.kind, self.branch, start=start.commit)
        return self._deliver(repo, self.branch)

    def _deliver(self, repo: StagedRepo, revision: str) -> Tree:
        files = [outgoing(entry) for entry in repo.entries]
        self.listener.say(f"{repo.name}: {len(files)} files go to {revision}")
        self.writer.send(
            repo.name,
            repo.kind,
            revision,
            files,
            message=self.message,
            progress=lambda name, size: self.listener.sent(repo.name, name, size),
        )
        return self._require_equal(repo, revision, published=False, exact=False)

    def _publish(self, repo: StagedRepo, start: Tree, sent: Tree) -> str:
        """One commit that holds exactly the release, on the branch that it is for."""
        if self.options.tag_only:
            return self._commit(repo, self.branch, sent, sent.commit)
        commit = self._commit(repo, self.options.target, sent, start.commit)
        self.listener.say(f"{repo.name}: on {self.options.target} at {commit[:12]}")
        return commit

    def _commit(self, repo: StagedRepo, revision: str, source: Tree, parent: str) -> str:
        return self.writer.publish(
            repo.name,
            repo.kind,
            source=source,
            revision=revision,
            parent=parent,
            files=[outgoing(entry) for entry in repo.entries],
            message=self.message,
        )

    def _request(self, repo: StagedRepo, repos: list[StagedRepo]) -> PullRequest:
        others = [other for other in repos if other is not repo]
        text = f"{self.message}. Made with nla-hub; every file was checked after it was sent."
        for other in others:
            page = self.writer.url(other.name, other.kind)
            text += f"\n\nThe other half is the pull request of the same title in [{other.name}]({page}/discussions): "
            text += "please merge both, the AR's first." if repo.role == "av" else "please merge this one first."
        return self.writer.pull_request(repo.name, repo.kind, title=self.message, description=text)

    # -- checks ------------------------------------------------------------------------------------------------

    def _require_equal(self, repo: StagedRepo, revision: str, *, published: bool, exact: bool = True) -> Tree:
        tree = self.writer.tree(repo.name, repo.kind, revision)
        if found := faults(repo, tree, exact=exact):
            raise self._wrong(repo, revision, found) if published else self._not_arrived(repo, revision, found)
        assert tree is not None
        return tree

    def _require_published(self, commits: dict[str, str]) -> None:
        """Whether the repositories that are published hold the release, and nobody has changed them since."""
        for one in self.plan.repos:
            if (commit := commits.get(one.repo.name)) is None:
                continue
            target = commit if self.options.tag_only else self.options.target
            tree = self._require_equal(one.repo, target, published=True)
            if tree.commit != commit:
                raise self._wrong(one.repo, target, [f"somebody has committed {tree.commit[:12]} on it since"])

    def _require_answers(self, wanted: Figures, commits: dict[str, str]) -> None:
        """Whether the pair on the Hub loads by its name and answers as the local one does."""
        self.listener.say("downloading the release, to load it by its name and score it")
        try:
            found = wanted.differences(check.published(self.release, commits, self.options, self.hub))
        except NLAError as error:
            found = [f"it does not load: {error.one_line()}"]
        if found:
            raise self._wrong(self.release.repos[-1], commits[self.release.repos[-1].name], found)
        self.listener.say(f"scored: the pair on the Hub answers as the local one does (to {check.TOLERANCE:g})")

    # -- refusals ----------------------------------------------------------------------------------------------

    def _not_arrived(self, repo: StagedRepo, revision: str, found: list[str]) -> PublishError:
        return PublishError(
            "What arrived is not what was sent; nothing was published.",
            where=f"{repo.name}@{revision}",
            faults=found,
            next_step="the same command sends what is missing; if it stays so, tell the Hub's support",
        )

    def _wrong(self, repo: StagedRepo, revision: str, found: list[str]) -> GateFailedError:
        """What was published is not right: how it was before, and how to get back there."""
        told = list(found)
        for one in self.plan.repos:
            before = one.remote.target if one.remote is not None else None
            if not one.is_published and not self.options.tag_only:
                told.append(
                    f"{one.repo.name}: before this push {self.options.target} was "
                    f"{before.commit if before is not None else 'empty'}"
                )
        page = self.writer.url(repo.name, repo.kind)
        return GateFailedError(
            "What is published does not pass its check, and is not tagged.",
            where=f"{repo.name}@{revision}",
            faults=told,
            next_step="the same command again, if somebody else was at work; to take it back: "
            f"GIT_LFS_SKIP_SMUDGE=1 git clone {page}, git revert, git push --no-verify",
        )
