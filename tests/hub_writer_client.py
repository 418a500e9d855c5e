"""Everything a release asks of `HubWriter`, in the order of a push; also as processes of their own, to be killed.

    python hub_writer_client.py FOLDER

publishes each directory FOLDER/OWNER/NAME as the repository OWNER/NAME, in one process each, whose ids it says. No torch.
Whatever `release` and `offer` meet, calling them again finishes the work.
"""

from __future__ import annotations

import hashlib
import os
import sys
from contextlib import suppress
from pathlib import Path

from nla_hub.errors import HubNotFoundError
from nla_hub.hub import HubOptions
from nla_hub.hub.writing import HubWriter, Outgoing, RepoKind

BRANCH = "nla-hub/0123456789ab"
TITLE = "nla-hub: release 0123456789ab"


def outgoing(name: str, content: Path | bytes) -> Outgoing:
    data = content if isinstance(content, bytes) else content.read_bytes()
    git = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
    return Outgoing(name, content, len(data), hashlib.sha256(data).hexdigest(), git)


def folder(root: Path) -> list[Outgoing]:
    """The files below a directory."""
    return [outgoing(p.relative_to(root).as_posix(), p) for p in sorted(root.rglob("*")) if p.is_file()]


def release(writer: HubWriter, repo: str, kind: RepoKind, files: list[Outgoing]) -> str:
    """Publish; the commit on main."""
    writer.account()
    writer.create(repo, kind, private=False)
    main = writer.tree(repo, kind, "main")
    if main is None:
        raise HubNotFoundError("The repository that was made is not there.", where=repo)
    writer.branch(repo, kind, BRANCH, start=main.commit)
    held = writer.send(repo, kind, BRANCH, files, message="Files of a release")
    commit = writer.publish(
        repo,
        kind,
        source=held,
        revision="main",
        parent=main.commit,
        files=files,
        message="Release",
        description="Both.",
    )
    writer.tag(repo, kind, "v1", commit=commit, message="Release")
    writer.delete_branch(repo, kind, BRANCH)
    writer.collect(f"owner/All of {repo}", [(repo, kind)], private=False)
    return commit


def offer(writer: HubWriter, repo: str, kind: RepoKind, files: list[Outgoing]) -> str:
    """The same as a pull request; its page."""
    request = writer.pull_request(repo, kind, title=TITLE, description="Look at it.")
    writer.send(repo, kind, request.ref, files, message="Files of a release")
    writer.offer(repo, kind, request)
    return request.url


def main(root: Path) -> None:
    writer = HubWriter(HubOptions())
    writer.url("", "model")  # imports the client once for all
    for place in sorted(root.glob("*/*")):
        name = place.relative_to(root).as_posix()
        if (child := os.fork()) == 0:
            release(writer, name, "model", folder(place))
            os._exit(0)
        sys.stdout.write(f"{child} {name}\n")
        sys.stdout.flush()
    with suppress(ChildProcessError):
        while True:
            os.wait()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
