"""What is written to the Hugging Face Hub: repositories, branches, commits, pull requests, tags, collections.

Large files are sent to a branch, or to a pull request's ref, in commits that stay when the rest is cut off. main then gets
them in one commit that names them: in the Hub's protocol a large file in a commit is its sha256, so that a copy moves nothing,
whatever revision it comes from. The pull request's own merge is not used for that: it needs a pull request in the author's
own repository, what it does where main has moved is the Hub's choice, and it cannot be told which state of main was seen.
A copy names main's commit, and is refused (412) where that is no longer main's.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from nla_hub.errors import HubError, HubNotFoundError
from nla_hub.hub import HubOptions
from nla_hub.hub.accounts import may_write, only_reads, require_connection
from nla_hub.hub.collections import collect
from nla_hub.hub.commits import (
    COMMIT_FILES,
    Outgoing,
    PullRequest,
    RemoteFile,
    RepoKind,
    Tree,
    addition,
    first_batch,
    is_exactly,
    release,
)
from nla_hub.hub.refusals import place, status
from nla_hub.hub.write_refusals import persist

if TYPE_CHECKING:
    from huggingface_hub import HfApi

__all__ = ["HubWriter", "Outgoing", "Progress", "PullRequest", "RemoteFile", "RepoKind", "Tree"]


Progress = Callable[[str, int], None]
"""Told (name of the file, its bytes) when a file is on the Hub."""


class HubWriter:
    """One account's writing access; every method raises HubAuthError, HubGatedError, HubNotFoundError, HubError,
    HubUnreachableError as `nla_hub.hub` does, and waits and asks again where that is worth while (`write_refusals.persist`).
    """

    def __init__(self, options: HubOptions) -> None:
        self._options = options

    @cached_property
    def _api(self) -> HfApi:
        from huggingface_hub import HfApi

        return HfApi(token=self._options.token)

    @cached_property
    def _whoami(self) -> Mapping[str, Any]:
        from huggingface_hub.errors import LocalTokenNotFoundError

        def ask() -> Mapping[str, Any]:
            require_connection()
            if self._options.token is False:
                raise LocalTokenNotFoundError
            return self._api.whoami()

        return persist(ask, where="account")

    @property
    def is_anonymous(self) -> bool:
        """Whether there is no token at all; nobody is asked."""
        from huggingface_hub import get_token

        return self._options.token is False or not (isinstance(self._options.token, str) or get_token())

    def account(self) -> str:
        """Name of the account whose token is used; a HubAuthError without one."""
        return str(self._whoami["name"])

    def may_write(self, owner: str) -> bool:
        """Whether this token may make repositories of `owner`: False only where the Hub says so by itself."""
        return may_write(self._whoami, owner)

    def only_reads(self) -> bool:
        """Whether this token may write nowhere at all."""
        return only_reads(self._whoami)

    def create(self, repo: str, kind: RepoKind, *, private: bool) -> bool:
        """Make a repository; False where it was there (its visibility stays as it is)."""
        if self.is_private(repo, kind) is not None:
            return False

        def made() -> bool | None:
            found = self.is_private(repo, kind)
            return None if found is None else found == private

        def make() -> bool:
            self._api.create_repo(repo, repo_type=kind, private=private)
            return True

        return persist(make, where=repo, settled=made)

    def is_private(self, repo: str, kind: RepoKind) -> bool | None:
        """Whether an existing repository is private; None where there is none."""
        info = self._info(repo, kind, None)
        return None if info is None else bool(info.private)

    def tree(self, repo: str, kind: RepoKind, revision: str) -> Tree | None:
        """What a revision holds, asked now and never from a cache; None where repository or revision is not there."""
        info = self._info(repo, kind, revision)
        return None if info is None else Tree(info.sha, self._files(repo, kind, info.sha))

    def refs(self, repo: str, kind: RepoKind) -> tuple[dict[str, str], dict[str, str]]:
        """Branches and tags: name -> commit."""
        found = persist(lambda: self._api.list_repo_refs(repo, repo_type=kind), where=repo)
        return {b.name: b.target_commit for b in found.branches}, {t.name: t.target_commit for t in found.tags}

    def branch(self, repo: str, kind: RepoKind, name: str, *, start: str) -> None:
        """Make a branch at `start`; nothing happens where it is there."""

        def there() -> str | None:
            return self.refs(repo, kind)[0].get(name)

        def make() -> str:
            self._api.create_branch(repo, branch=name, revision=start, repo_type=kind)
            return start

        there() or persist(make, where=place(repo, name), settled=there)

    def delete_branch(self, repo: str, kind: RepoKind, name: str) -> None:
        """Remove a branch; nothing happens where it is not there."""

        def gone() -> bool | None:
            return name not in self.refs(repo, kind)[0] or None

        def remove() -> bool:
            self._api.delete_branch(repo, branch=name, repo_type=kind)
            return True

        gone() or persist(remove, where=place(repo, name), settled=gone)

    def send(
        self,
        repo: str,
        kind: RepoKind,
        revision: str,
        files: Sequence[Outgoing],
        *,
        message: str,
        progress: Progress | None = None,
    ) -> Tree:
        """Bring `files` to a branch or a pull request's ref, in as many commits as it takes; what is there already is not sent.

        A call that was cut off, or killed, is made again with the same arguments. Other files of the revision stay. Hashes are
        taken anew from what is sent: a file that changed since `files` was made is noticed.
        """
        told = progress or (lambda name, size: None)
        held, missing = self._there(repo, kind, revision), []
        for file in files:
            if file.is_there(held.files.get(file.name)):
                told(file.name, file.size)
            else:
                missing.append(file)
        head, most = held.commit, COMMIT_FILES
        while missing:
            batch = first_batch(missing, most)
            try:
                head = self._add(repo, kind, revision, batch, parent=head, message=message)
            except HubError as refusal:
                if status(refusal.__cause__ or refusal) != 413 or len(batch) == 1:
                    raise
                most = len(batch) // 2
                continue
            missing = missing[len(batch) :]
            for file in batch:
                told(file.name, file.size)
        held = self._there(repo, kind, revision)
        if wrong := [file.name for file in files if not file.is_there(held.files.get(file.name))]:
            raise HubError(
                "What the Hub holds is not what was to be sent.",
                where=place(repo, revision),
                faults=wrong[:20],
                next_step="files must not change while they are published, and a .gitignore in the repository may hide some:"
                " run the same command again",
            )
        return held

    def publish(
        self,
        repo: str,
        kind: RepoKind,
        *,
        source: Tree,
        revision: str,
        parent: str,
        files: Sequence[Outgoing],
        message: str,
        description: str = "",
    ) -> str:
        """One commit on `revision` that makes it hold exactly `files`, whose large ones are copied on the Hub from `source`.

        Nothing large is sent. Files that are not among `files` are removed, but `.gitattributes`. Where the revision holds
        all of it already, nothing is committed. The commit's hash.

        Args:
            parent: the revision's commit as it was seen: if somebody else has committed since, a HubError says so.
        """
        where = place(repo, revision)
        if lacking := [file.name for file in files if not file.is_there(source.files.get(file.name))]:
            raise HubError(
                "What is to be published is not on the upload branch.",
                where=where,
                faults=lacking[:20],
                next_step="run the same command again",
            )
        before = self._there(repo, kind, revision)

        def done() -> str | None:
            now = self._there(repo, kind, revision)
            return now.commit if is_exactly(now, files) else None

        if is_exactly(before, files):
            return before.commit
        # The client gives `parent` to the Hub, which answers 412 where main has moved.
        return self._commit(
            repo,
            kind,
            revision,
            lambda: release(before, source, files),
            parent=parent,
            message=message,
            description=description,
            settled=done,
        )

    def tag(self, repo: str, kind: RepoKind, tag: str, *, commit: str, message: str) -> None:
        """Name a commit; nothing happens where the tag names it already, a HubError where it names another."""

        def there() -> str | None:
            found = self.refs(repo, kind)[1].get(tag)
            if found not in (None, commit):
                raise HubError(
                    f"The tag {tag!r} names another commit.",
                    where=repo,
                    got=found,
                    expected=commit,
                    next_step="name another tag: one that readers may have used is never moved",
                )
            return found

        def make() -> str:
            self._api.create_tag(repo, tag=tag, tag_message=message, revision=commit, repo_type=kind)
            return commit

        there() or persist(make, where=place(repo, tag), settled=there)
        if there() is None:
            raise HubError(
                "The Hub did not make this tag, though it did not refuse it.",
                where=place(repo, tag),
                next_step="look at proxies and login pages of the network, then run the same command again",
            )

    def pull_request(self, repo: str, kind: RepoKind, *, title: str, description: str) -> PullRequest:
        """A draft pull request of this account with exactly this title: the open one, or a new one."""
        author = self.account()

        def there() -> PullRequest | None:
            found = persist(
                lambda: list(self._api.get_repo_discussions(repo, repo_type=kind, author=author)), where=repo
            )
            same = [
                d for d in found if d.is_pull_request and d.title == title.strip() and d.status in ("draft", "open")
            ]
            return PullRequest.of(same[0]) if same else None

        def make() -> PullRequest:
            return PullRequest.of(self._api.create_pull_request(repo, title, description=description, repo_type=kind))

        return there() or persist(make, where=repo, settled=there)

    def offer(self, repo: str, kind: RepoKind, request: PullRequest) -> None:
        """Turn a draft into a pull request that others see as ready."""

        def ready() -> bool | None:
            found = persist(
                lambda: self._api.get_discussion_details(repo, request.number, repo_type=kind), where=request.url
            )
            return found.status != "draft" or None

        def publish() -> bool:
            self._api.change_discussion_status(repo, request.number, "open", repo_type=kind)
            return True

        ready() or persist(publish, where=request.url, settled=ready)

    def collect(self, collection: str, items: Sequence[tuple[str, RepoKind]], *, private: bool) -> str:
        """Add repositories to a collection, `owner/slug` or `owner/title` (made where there is none); its page."""
        return collect(self._api, collection, items, private=private)

    def url(self, repo: str, kind: RepoKind, revision: str | None = None) -> str:
        """The page of a repository."""
        page = f"{self._api.endpoint}/{'datasets/' if kind == 'dataset' else ''}{repo}"
        return f"{page}/tree/{quote(revision, safe='')}" if revision else page

    def _info(self, repo: str, kind: RepoKind, revision: str | None) -> Any:
        """What the Hub says of a repository; None where it or the revision is not there."""
        from huggingface_hub.errors import HfHubHTTPError

        def ask() -> Any:
            try:
                return self._api.repo_info(repo, revision=revision, repo_type=kind)
            except HfHubHTTPError as refusal:
                # Without a token the Hub answers 401 for what does not exist; with one it means the token.
                sent = "authorization" in refusal.response.request.headers
                if status(refusal) == 404 or (status(refusal) == 401 and not sent):
                    return None
                raise

        return persist(ask, where=place(repo, revision))

    def _files(self, repo: str, kind: RepoKind, commit: str) -> dict[str, RemoteFile]:
        from huggingface_hub import RepoFile
        from huggingface_hub.errors import EntryNotFoundError

        def ask() -> dict[str, RemoteFile]:
            try:
                entries = list(self._api.list_repo_tree(repo, recursive=True, revision=commit, repo_type=kind))
            except EntryNotFoundError:  # the Hub's answer for a commit without files
                return {}
            files = [entry for entry in entries if isinstance(entry, RepoFile)]
            return {f.path: RemoteFile(f.size, f.lfs.sha256 if f.lfs else None, f.blob_id) for f in files}

        return persist(ask, where=place(repo, commit))

    def _there(self, repo: str, kind: RepoKind, revision: str) -> Tree:
        found = self.tree(repo, kind, revision)
        if found is None:
            raise HubNotFoundError(
                "The Hub does not have this, or this account cannot see it.",
                where=place(repo, revision),
                next_step="check the spelling owner/name and whose token is used: `hf auth whoami`",
            )
        return found

    def _add(
        self, repo: str, kind: RepoKind, revision: str, batch: Sequence[Outgoing], *, parent: str, message: str
    ) -> str:
        """One commit that adds a batch; the branch's commit then."""

        def done() -> str | None:
            now = self._there(repo, kind, revision)
            return now.commit if all(file.is_there(now.files.get(file.name)) for file in batch) else None

        return self._commit(
            repo,
            kind,
            revision,
            lambda: [addition(file) for file in batch],
            parent=parent,
            message=message,
            description="",
            settled=done,
        )

    def _commit(
        self,
        repo: str,
        kind: RepoKind,
        revision: str,
        operations: Callable[[], Sequence[Any]],
        *,
        parent: str,
        message: str,
        description: str,
        settled: Callable[[], str | None],
    ) -> str:
        def act() -> str:
            done = self._api.create_commit(
                repo,
                operations(),  # made anew for every try: the client writes into them
                commit_message=message,
                commit_description=description,
                repo_type=kind,
                revision=revision,
                parent_commit=parent,
            )
            return str(done.oid)

        return persist(act, where=place(repo, revision), settled=settled)
