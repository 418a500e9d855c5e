"""What a Hub holds and enforces: repositories, branches, tags, commits, pull requests, collections, large files.

Blobs lie in a directory under their sha256, everything else in memory. `hub_world.py` puts it behind HTTP.
"""

from __future__ import annotations

import hashlib
import re
import secrets
import shutil
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Literal

import yaml

Kind = Literal["model", "dataset"]

LARGE = 10_000_000
"""Bytes from which the Hub keeps any file in LFS."""

LFS_PATTERNS = {
    "model": ("*.safetensors", "*.bin", "*.npz", "*.npy", "*.parquet", "*.model", "*.gz", "*.zip", "*.pt", "*.pkl"),
    "dataset": ("*.safetensors", "*.bin", "*.npz", "*.npy", "*.parquet", "*.arrow", "*.gz", "*.zip", "*.png"),
}
"""What a new repository's .gitattributes sends to LFS (the part of it that matters here)."""


class Refusal(Exception):
    """An answer that is not a success."""

    def __init__(self, status: int, message: str, code: str | None = None, **body: Any) -> None:
        super().__init__(message)
        self.status, self.message, self.code, self.body = status, message, code, body


@dataclass(frozen=True)
class Blob:
    """A file at a commit; `sha256` is None for one that git holds itself."""

    path: Path
    size: int
    oid: str
    sha256: str | None


@dataclass(frozen=True)
class Commit:
    id: str
    parent: str | None
    files: Mapping[str, Blob]
    title: str
    message: str
    date: str
    author: str


@dataclass
class Request:
    """A pull request (the Hub's discussions without commits are not needed here)."""

    num: int
    title: str
    description: str
    author: str
    status: str
    created: str
    base: str
    merged: str | None = None


@dataclass(frozen=True)
class Account:
    """Who a token belongs to. Roles of organisations and tokens: read or write."""

    name: str
    orgs: Mapping[str, str] = field(default_factory=dict)
    role: str = "write"

    def may_write(self, namespace: str) -> bool:
        return self.role == "write" and (namespace == self.name or self.orgs.get(namespace) == "write")

    def may_read(self, namespace: str) -> bool:
        return namespace == self.name or namespace in self.orgs


@dataclass
class Repo:
    name: str
    kind: Kind
    private: bool
    heads: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    commits: dict[str, Commit] = field(default_factory=dict)
    requests: list[Request] = field(default_factory=list)
    stored: set[str] = field(default_factory=set)
    """sha256 of the large files that this repository may name in a commit."""
    downloads: int = 0
    likes: int = 0

    def resolve(self, revision: str) -> Commit:
        """The commit of a branch, a tag, a pull request's ref or a commit's hash."""
        for names in (self.heads, self.tags):
            for name in (revision, revision.removeprefix("refs/heads/"), revision.removeprefix("refs/tags/")):
                if name in names:
                    return self.commits[names[name]]
        if revision in self.commits:
            return self.commits[revision]
        short = [id for id in self.commits if len(revision) >= 7 and id.startswith(revision)]
        if len(short) == 1:
            return self.commits[short[0]]
        raise Refusal(404, f"Invalid rev id: {revision}", "RevisionNotFound")

    def history(self, revision: str) -> Iterator[Commit]:
        commit: Commit | None = self.resolve(revision)
        while commit is not None:
            yield commit
            commit = self.commits[commit.parent] if commit.parent else None

    def card(self) -> dict[str, Any]:
        blob = self.resolve("main").files.get("README.md")
        return metadata(blob.path.read_text()) or {} if blob else {}

    def tagged(self) -> list[str]:
        """The Hub's tags: those of the card, and what it makes of the card's other fields."""
        card = self.card()

        def many(key: str) -> list[str]:
            value = card.get(key) or []
            return [str(item) for item in (value if isinstance(value, list) else [value])]

        found = [*many("tags"), *many("language"), *many("library_name"), *many("pipeline_tag")]
        found += [f"license:{name}" for name in many("license")] + [f"dataset:{name}" for name in many("datasets")]
        for base in many("base_model"):
            found.append(f"base_model:{base}")
            if card.get("base_model_relation"):
                found.append(f"base_model:{card['base_model_relation']}:{base}")
        found += ["safetensors"] if any(n.endswith(".safetensors") for n in self.resolve("main").files) else []
        return list(dict.fromkeys([*found, "region:us"]))


class Store:
    """All of it. Not thread-safe: the server holds a lock."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.repos: dict[tuple[Kind, str], Repo] = {}
        self.collections: dict[str, dict[str, Any]] = {}
        (root / "blobs").mkdir(parents=True, exist_ok=True)

    def repo(self, name: str, kind: Kind = "model") -> Repo:
        if (found := self.repos.get((kind, name))) is None:
            raise Refusal(404, "Repository not found", "RepoNotFound")
        return found

    def create(self, name: str, kind: Kind, *, private: bool = False, author: str = "owner") -> Repo:
        if not re.fullmatch(r"[\w.-]+/[\w.-]{1,96}", name):
            raise Refusal(400, f"Invalid name {name!r}")
        if (kind, name) in self.repos:
            raise Refusal(409, f"You already created this {kind} repo", url=f"https://huggingface.co/{name}")
        repo = self.repos[kind, name] = Repo(name, kind, private)
        lines = "".join(f"{pattern} filter=lfs diff=lfs merge=lfs -text\n" for pattern in LFS_PATTERNS[kind])
        self.append(repo, "main", {".gitattributes": self.small(lines.encode())}, "initial commit", author=author)
        return repo

    # Blobs

    def file(self, sha256: str) -> Path:
        return self.root / "blobs" / sha256

    def keep(self, content: bytes | Path) -> tuple[str, int]:
        """Store bytes (a file is moved); sha256 and size."""
        if isinstance(content, bytes):
            sha = hashlib.sha256(content).hexdigest()
            self.file(sha).write_bytes(content)
            return sha, len(content)
        sha, size = sha256_of(content), content.stat().st_size
        shutil.move(content, self.file(sha))
        return sha, size

    def small(self, content: bytes) -> Blob:
        sha, size = self.keep(content)
        return Blob(self.file(sha), size, hashlib.sha1(b"blob %d\0" % size + content).hexdigest(), None)

    def large(self, repo: Repo, sha256: str) -> Blob:
        if sha256 not in repo.stored:
            raise Refusal(400, f"LFS pointer pointed to a file that does not exist: {sha256}")
        size = self.file(sha256).stat().st_size
        pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {size}\n".encode()
        oid = hashlib.sha1(b"blob %d\0" % len(pointer) + pointer).hexdigest()
        return Blob(self.file(sha256), size, oid, sha256)

    # Commits

    def append(
        self,
        repo: Repo,
        branch: str,
        files: Mapping[str, Blob],
        title: str,
        *,
        message: str = "",
        author: str = "owner",
    ) -> Commit:
        parent = repo.heads.get(branch)
        commit = Commit(secrets.token_hex(20), parent, dict(sorted(files.items())), title, message, now(), author)
        repo.commits[commit.id] = commit
        repo.heads[branch] = commit.id
        return commit

    def commit(self, repo: Repo, branch: str, lines: Iterable[Mapping[str, Any]], author: str) -> Commit:
        """Apply what the client sends: a header, then one operation a line. All of it, or nothing."""
        header: Mapping[str, Any] = {}
        if branch not in repo.heads:
            raise Refusal(404, f"Invalid rev id: {branch}", "RevisionNotFound")
        before = repo.resolve(branch)
        files = dict(before.files)
        for line in lines:
            value = line["value"]
            match line["key"]:
                case "header":
                    header = value
                case "file":
                    files[value["path"]] = self.small(value["content"])
                    if files[value["path"]].size > LARGE:
                        raise Refusal(400, f"{value['path']} is too large for git, use LFS")
                case "lfsFile":
                    files[value["path"]] = self.large(repo, value["oid"])
                    self.attribute(files, value["path"])
                case "deletedFile" | "deletedFolder" as key:
                    folder = value["path"].rstrip("/") + "/"
                    gone = [n for n in files if n == value["path"] or (key == "deletedFolder" and n.startswith(folder))]
                    if not gone:
                        raise Refusal(404, f"A file with this name doesn't exist: {value['path']}", "EntryNotFound")
                    for name in gone:
                        del files[name]
                case other:
                    raise Refusal(400, f"Unknown operation {other}")
        if not header.get("summary"):
            raise Refusal(400, "A commit needs a summary")
        if header.get("parentCommit") not in (None, before.id):
            raise Refusal(412, "A commit has happened since. Please refresh and try again.")
        card = files.get("README.md")
        if card is not None and card != before.files.get("README.md"):
            check_card(card.path.read_text())
        return self.append(repo, branch, files, header["summary"], message=header.get("description", ""), author=author)

    def attribute(self, files: dict[str, Blob], name: str) -> None:
        """As the Hub does: a large file that .gitattributes does not speak of is added to it."""
        if not is_lfs(files, name):
            known = files.get(".gitattributes")
            text = known.path.read_bytes() if known else b""
            files[".gitattributes"] = self.small(text + f"{name} filter=lfs diff=lfs merge=lfs -text\n".encode())

    def open(self, repo: Repo, title: str, description: str, author: str) -> Request:
        """A new pull request: a draft, as all that come through the client."""
        number, head = len(repo.requests) + 1, repo.heads["main"]
        repo.requests.append(Request(number, title, description, author, "draft", now(), head))
        repo.heads[f"refs/pr/{number}"] = head
        return repo.requests[-1]

    def merge(self, repo: Repo, request: Request, author: str) -> None:
        """One commit on main, where main has not touched the same files since."""
        if request.status != "open":
            raise Refusal(403, "Only open pull requests can be merged")
        base, head = repo.commits[request.base].files, repo.resolve(f"refs/pr/{request.num}").files
        main = dict(repo.resolve("main").files)
        for name in {name for name in {*base, *head} if base.get(name) != head.get(name)}:
            if main.get(name) not in (base.get(name), head.get(name)):
                raise Refusal(409, f"Conflict in {name}")
            if name in head:
                main[name] = head[name]
            else:
                main.pop(name, None)
        request.merged = self.append(repo, "main", main, f"{request.title} (#{request.num})", author=author).id
        request.status = "merged"


def is_lfs(files: Mapping[str, Blob], name: str) -> bool:
    """Whether .gitattributes sends a name to LFS."""
    attributes = files.get(".gitattributes")
    lines = attributes.path.read_text().splitlines() if attributes else []
    patterns = [line.split()[0] for line in lines if "filter=lfs" in line]
    return any(fnmatchcase(name, p) or fnmatchcase(name.rpartition("/")[2], p) for p in patterns)


def metadata(text: str) -> dict[str, Any] | None:
    """The YAML on top of a card; None where there is none."""
    found = re.match(r"\s*---\r?\n(.*?)\r?\n---(\r?\n|$)", text, re.DOTALL)
    value = yaml.safe_load(found[1]) if found else None
    return value if isinstance(value, dict) else None


def check_card(text: str) -> None:
    try:
        metadata(text)
    except yaml.YAMLError as error:
        raise Refusal(400, f"Invalid metadata in README.md: {str(error).splitlines()[0]}") from None


def sha256_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.000Z")
