"""A Hub on this machine that the real huggingface_hub client can publish to and load from: `hub_store.Store` behind HTTP.

    with HubWorld(tmp_path / "hub") as world:
        connected(world, monkeypatch, tmp_path / "home")  # this process; of others: env=world.environment(home)
        world.seed("owner/nla-x-av", {"README.md": b"...", "model.safetensors": b"..."})
        world.fail("commit", 500)                         # the next commit is refused with a 500
        world.cut("lfs-upload", after=1000)               # the connection ends after 1000 bytes of a large file
        world.cut("commit", applied=True)                 # the commit happens, the answer does not arrive
        held = world.pause("lfs-upload", after=1000)      # for kills: held.reached.wait(60); process.kill(); held.drop()

Stages: whoami, create, settings, validate-yaml, preupload, lfs-batch, lfs-upload (a large file's bytes, or those of a part),
lfs-complete (the parts), lfs-verify, commit, commits, branch, delete-branch, tag, delete-tag, refs, discussion (a new one),
discussions, discussion-details, discussion-status, merge, collections, new-collection, collection, collection-item, info, tree,
paths-info, resolve (a file, or the address of a large one), download (a large file from its host), models, datasets, xet.

Xet cannot be spoken here: hf_xet talks to a storage service of its own, in Rust. The tests set HF_HUB_DISABLE_XET, with which
the client sends large files through LFS, as it does wherever hf_xet is not installed.

What is not known of the real Hub and decided here: a large file counts as stored when its last byte has arrived (`lfs-verify`
only checks it), and a commit that names one that is not stored is a 400.
"""

from __future__ import annotations

import base64
import json
import os
import re
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Self
from urllib.parse import parse_qs, quote, unquote, urlencode, urlsplit

import pytest
import yaml
from hub_store import (
    LARGE,
    Account,
    Blob,
    Commit,
    Kind,
    Refusal,
    Repo,
    Request,
    Store,
    is_lfs,
    metadata,
    now,
)

TOKEN = "hf_" + "0wnersW0rdF0rAll0fThis" * 2
READER = "hf_" + "readsAndNeverWr1tes" * 2
MEMBER = "hf_" + "w0rksF0rAnOrganisati0n" * 2
SIGNATURE = "X-Signature=51gn4tur3"


@dataclass
class Seen:
    """A request. `bytes` have arrived of its body; `status` is None where no answer was sent."""

    method: str
    path: str
    stage: str
    repo: str | None
    authorization: str | None
    bytes: int = 0
    status: int | None = None


class Held:
    """A request that waits: `reached` is set when it is there."""

    def __init__(self) -> None:
        self.reached = threading.Event()
        self.decided = threading.Event()
        self.dropped = False

    def release(self) -> None:
        """Go on as if nothing had been."""
        self.decided.set()

    def drop(self) -> None:
        """End the connection; what was not applied yet never is."""
        self.dropped = True
        self.decided.set()


@dataclass
class Fault:
    stage: str
    times: int
    repo: str | None = None
    skip: int = 0
    status: int | None = None
    headers: Mapping[str, str] = field(default_factory=dict)
    message: str = ""
    page: bytes | None = None
    after: int = 0
    applied: bool = False
    reset: bool = False
    held: Held | None = None


@dataclass
class Answer:
    body: Any = None
    status: int = 200
    headers: Mapping[str, str] = field(default_factory=dict)


@dataclass
class Call:
    """One request as a handler sees it."""

    parts: Mapping[str, str]
    query: Mapping[str, list[str]]
    body: bytes
    account: Account | None
    headers: Mapping[str, str]
    method: str
    upload: Path | None = None

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def kind(self) -> Kind:
        return "dataset" if self.parts.get("kind", "").startswith("dataset") else "model"

    def asked(self, name: str) -> str | None:
        return (self.query.get(name) or [None])[0]

    def wants(self, name: str) -> bool:
        return (self.asked(name) or "").lower() in ("true", "1")


class Gone(Exception):
    """The connection has ended, or is to end now."""


class HubWorld:
    """See the module. Attributes:

    url: HF_ENDPOINT.
    requests: everything that was asked for, in order.
    uploads: sha256 -> how often a large file was stored.
    received: sha256 -> bytes that arrived of it, in all tries.
    tokens: who may come; `TOKEN` is owner's, `READER` owner's without writing, `MEMBER` that of a member of "lab".
    most_operations, most_bytes: of one commit; more is a 413.
    part_size: larger files are uploaded in parts of so many bytes.
    page: entries on one page of a listing.
    """

    def __init__(self, root: Path, *, part_size: int = 5_000_000) -> None:
        self.store = Store(root)
        self.root, self.part_size, self.page = root, part_size, 100
        self.requests: list[Seen] = []
        self.uploads: Counter[str] = Counter()
        self.received: Counter[str] = Counter()
        self.most_operations: int | None = None
        self.most_bytes: int | None = None
        self.tokens = {
            TOKEN: Account("owner", {"lab": "write", "guests": "read"}),
            READER: Account("owner", role="read"),
            MEMBER: Account("member", {"lab": "write"}),
        }
        self.faults: list[Fault] = []
        self.held: list[Held] = []
        self.lock = threading.RLock()
        (root / "incoming").mkdir(exist_ok=True)
        world = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            disable_nagle_algorithm = True

            def handle_any(self) -> None:
                world.serve(self)

            do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = handle_any

            def log_message(self, *_: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.server.handle_error = lambda *_: None  # type: ignore[method-assign,assignment]
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        self.storage = f"http://localhost:{self.server.server_address[1]}/storage"
        threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True).start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        for held in self.held:
            held.drop()
        self.server.shutdown()
        self.server.server_close()

    # What tests arrange

    def seed(self, repo: str, files: Mapping[str, bytes | Path] | Path, kind: Kind = "model", **options: Any) -> str:
        """Make a repository (where there is none) whose main holds these files too; the commit.

        Args:
            options: private (bool), revision (a branch; made where there is none), title.
        """
        if isinstance(files, Path):
            files = {p.relative_to(files).as_posix(): p for p in sorted(files.rglob("*")) if p.is_file()}
        branch = options.get("revision", "main")
        with self.lock:
            found = self.store.repos.get((kind, repo))
            found = found or self.store.create(repo, kind, private=options.get("private", False))
            held = dict(found.resolve(branch if branch in found.heads else "main").files)
            for name, content in files.items():
                data = content if isinstance(content, bytes) else content.read_bytes()
                held[name] = self.store.small(data)
                if is_lfs(held, name) or len(data) >= LARGE:
                    found.stored.add(held[name].path.name)
                    held[name] = self.store.large(found, held[name].path.name)
            found.heads.setdefault(branch, found.heads["main"])
            return self.store.append(found, branch, held, options.get("title", "seeded")).id

    def fail(
        self,
        stage: str,
        status: int,
        times: int = 1,
        headers: Mapping[str, str] | None = None,
        repo: str | None = None,
        *,
        message: str = "",
        page: bytes | None = None,
        skip: int = 0,
    ) -> None:
        """Answer the next `times` requests of this stage (after `skip` that no other fault met) with an error.

        Args:
            message: what the Hub says. page: what a proxy in between says instead, as HTML.
        """
        self.faults.append(Fault(stage, times, repo, skip, status, headers or {}, message, page))

    def cut(
        self,
        stage: str,
        times: int = 1,
        after: int = 0,
        *,
        applied: bool = False,
        reset: bool = False,
        repo: str | None = None,
        skip: int = 0,
    ) -> None:
        """End the connection of the next requests of this stage, without an answer.

        Args:
            after: bytes of the body that arrive first (`download`: that are sent first).
            applied: the request is carried out all the same.
            reset: not even a farewell.
        """
        self.faults.append(Fault(stage, times, repo, skip, after=after, applied=applied, reset=reset))

    def pause(
        self, stage: str, after: int | None = None, *, applied: bool = False, repo: str | None = None, skip: int = 0
    ) -> Held:
        """Hold one request of this stage: after so many bytes of its body (all of them), before or after it is carried out."""
        held = Held()
        self.held.append(held)
        self.faults.append(
            Fault(stage, 1, repo, skip, after=-1 if after is None else after, applied=applied, held=held)
        )
        return held

    # What tests ask

    def files(self, repo: str, revision: str = "main", kind: Kind = "model") -> dict[str, bytes]:
        """Name -> content, without .gitattributes."""
        with self.lock:
            found = self.store.repo(repo, kind).resolve(revision).files
            return {name: blob.path.read_bytes() for name, blob in found.items() if name != ".gitattributes"}

    def exists(self, repo: str, kind: Kind = "model") -> bool:
        return (kind, repo) in self.store.repos

    def private(self, repo: str, kind: Kind = "model") -> bool:
        return self.store.repo(repo, kind).private

    def tags(self, repo: str, kind: Kind = "model") -> dict[str, str]:
        return dict(self.store.repo(repo, kind).tags)

    def branches(self, repo: str, kind: Kind = "model") -> dict[str, str]:
        heads = self.store.repo(repo, kind).heads
        return {name: commit for name, commit in heads.items() if not name.startswith("refs/pr/")}

    def commits(self, repo: str, revision: str = "main", kind: Kind = "model") -> list[Commit]:
        """Newest first; the last is the Hub's own initial commit."""
        return list(self.store.repo(repo, kind).history(revision))

    def pull_requests(self, repo: str, kind: Kind = "model") -> list[Request]:
        return list(self.store.repo(repo, kind).requests)

    def collections(self) -> dict[str, list[str]]:
        """Slug -> names of what it holds."""
        return {slug: [item["id"] for item in c["items"]] for slug, c in self.store.collections.items()}

    def of(self, stage: str, repo: str | None = None) -> list[Seen]:
        return [seen for seen in self.requests if seen.stage == stage and repo in (None, seen.repo)]

    def written(self) -> list[Seen]:
        """Every request that was more than a question."""
        asks = {"paths-info", "validate-yaml"}
        return [seen for seen in self.requests if seen.method not in ("GET", "HEAD") and seen.stage not in asks]

    def environment(self, home: Path, token: str | None = TOKEN) -> dict[str, str]:
        """Of a process that knows this Hub alone."""
        kept = {
            k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING")) and "proxy" not in k.lower()
        }
        here = Path(__file__).parent
        kept |= self.settings(home) | ({"HF_TOKEN": token} if token else {})
        paths = [str(here.parent), str(here), *filter(None, [os.environ.get("PYTHONPATH")])]
        return kept | {"PYTHONPATH": os.pathsep.join(paths)}

    def settings(self, home: Path) -> dict[str, str]:
        return {
            "HF_ENDPOINT": self.url,
            "HF_HOME": str(home),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "HF_HUB_OFFLINE": "0",
            "NO_PROXY": "127.0.0.1,localhost",
        }

    # HTTP

    def serve(self, request: BaseHTTPRequestHandler) -> None:
        address = urlsplit(request.path)
        stage, repo, parts, handler = route(request.command, address.path)
        seen = Seen(request.command, unquote(address.path), stage, repo, request.headers.get("Authorization"))
        with self.lock:
            self.requests.append(seen)
            fault = self.next_fault(stage, repo)
        upload = self.root / "incoming" / f"{id(request)}-{len(self.requests)}" if stage == "lfs-upload" else None
        try:
            body = self.receive(request, seen, fault, upload)
            call = Call(parts, parse_qs(address.query), body, None, request.headers, request.command, upload)  # type: ignore[arg-type]
            if fault and not fault.applied:
                self.spoil(request, seen, fault, early=True)
            answer = self.answer(handler, call, fault)
            if fault and fault.applied:
                self.spoil(request, seen, fault, early=False)
            if stage == "download" and fault and fault.status is None and fault.held is None:
                return self.send(request, seen, answer, part=fault.after)
            self.send(request, seen, answer)
        except Gone:
            end(request, reset=bool(fault and fault.reset))
        except OSError:
            request.close_connection = True
        finally:
            if upload is not None:
                upload.unlink(missing_ok=True)
        return None

    def next_fault(self, stage: str, repo: str | None) -> Fault | None:
        for fault in self.faults:
            if fault.stage == stage and fault.repo in (None, repo) and fault.times > 0:
                if fault.skip > 0:
                    fault.skip -= 1
                    continue
                fault.times -= 1
                return fault
        return None

    def receive(self, request: BaseHTTPRequestHandler, seen: Seen, fault: Fault | None, upload: Path | None) -> bytes:
        """The body (of a large file: put into `upload`), or as much of it as a fault lets through."""
        stops = fault is not None and fault.status is None and not fault.applied and fault.after >= 0
        stop = fault.after if fault is not None and stops and seen.stage != "download" else None
        kept = bytearray()
        file = upload.open("wb") if upload else None
        sha = seen.path.split("/")[5] if upload else ""
        try:
            for piece in pieces(request, stop):
                seen.bytes += len(piece)
                if file is None:
                    kept += piece
                else:
                    file.write(piece)
                    with self.lock:
                        self.received[sha] += len(piece)
        finally:
            if file is not None:
                file.close()
        return bytes(kept)

    def spoil(self, request: BaseHTTPRequestHandler, seen: Seen, fault: Fault, *, early: bool) -> None:
        """Hold a request, or end it."""
        if fault.held is not None:
            fault.held.reached.set()
            fault.held.decided.wait(300)
            if fault.held.dropped:
                raise Gone
            if early and fault.after >= 0:
                raise Gone  # the rest of its body was not read
        elif fault.status is None and seen.stage != "download":
            raise Gone

    def answer(self, handler: Callable[[HubWorld, Call], Answer], call: Call, fault: Fault | None) -> Answer:
        try:
            call.account = self.account(call)
            if fault and fault.status is not None and fault.page is not None:
                return Answer(fault.page, fault.status, {"Content-Type": "text/html", **fault.headers})
            if fault and fault.status is not None:
                raise Refusal(
                    fault.status, fault.message or f"Refused with {fault.status}", headers=dict(fault.headers)
                )
            with self.lock:
                return handler(self, call)
        except Refusal as refusal:
            headers = refusal.body.pop("headers", {})
            headers = {"X-Error-Message": refusal.message, **headers}
            if refusal.code:
                headers["X-Error-Code"] = refusal.code
            return Answer({"error": refusal.message, **refusal.body}, refusal.status, headers)

    def account(self, call: Call) -> Account | None:
        given = call.headers.get("Authorization")
        if given is None or "storage" in call.parts:
            return None
        if (found := self.tokens.get(given.removeprefix("Bearer "))) is None:
            raise Refusal(401, "Invalid credentials in Authorization header")
        return found

    def send(self, request: BaseHTTPRequestHandler, seen: Seen, answer: Answer, part: int | None = None) -> None:
        data = answer.body if isinstance(answer.body, bytes) else json.dumps(answer.body).encode()
        if answer.body is None:
            data = b""
        seen.status = answer.status
        request.send_response(answer.status)
        kind = "application/octet-stream" if isinstance(answer.body, bytes) else "application/json"
        for key, value in {"Content-Type": kind, "X-Request-Id": "Root=1-local", **answer.headers}.items():
            request.send_header(key, value)
        request.send_header("Content-Length", str(len(data)))
        request.end_headers()
        if request.command != "HEAD":
            request.wfile.write(data if part is None else data[:part])
        if part is not None:
            raise Gone

    # Rights

    def readable(self, call: Call) -> Repo:
        name = call.parts["repo"]
        found = self.store.repos.get((call.kind, name))
        namespace = name.split("/")[0]
        if found is not None and (not found.private or (call.account and call.account.may_read(namespace))):
            return found
        if call.account is None:
            raise Refusal(401, "Invalid username or password.")
        raise Refusal(404, "Repository not found", "RepoNotFound")

    def writable(self, call: Call, ref: str | None = None) -> tuple[Repo, Account]:
        """A repository that this account may write to; an author may write to the ref of a pull request."""
        repo, account = self.readable(call), self.writer(call)
        number = re.fullmatch(r"refs/pr/(\d+)", ref or "")
        own = (
            number and int(number[1]) <= len(repo.requests) and repo.requests[int(number[1]) - 1].author == account.name
        )
        if not own and not account.may_write(repo.name.split("/")[0]):
            raise Refusal(403, "You don't have the required permissions to write to this repository")
        return repo, account

    def writer(self, call: Call) -> Account:
        if call.account is None:
            raise Refusal(401, "Invalid username or password.")
        if call.account.role != "write":
            raise Refusal(403, "Forbidden: you must use a write token to upload to a repository.")
        return call.account

    # Accounts and repositories

    def whoami(self, call: Call) -> Answer:
        if call.account is None:
            raise Refusal(401, "Invalid username or password.")
        orgs = [{"name": name, "roleInOrg": role} for name, role in call.account.orgs.items()]
        token = {"accessToken": {"displayName": "test", "role": call.account.role}}
        return Answer({"type": "user", "name": call.account.name, "orgs": orgs, "auth": token})

    def create(self, call: Call) -> Answer:
        asked, account = call.json, self.writer(call)
        namespace = asked.get("organization") or account.name
        kind: Kind = "dataset" if asked.get("type") == "dataset" else "model"
        name = f"{namespace}/{asked['name']}"
        if not account.may_write(namespace):
            raise Refusal(403, f'You don\'t have the rights to create a {kind} under the namespace "{namespace}"')
        private = asked.get("visibility") == "private" or bool(asked.get("private"))
        self.store.create(name, kind, private=private, author=account.name)
        prefix = "datasets/" if kind == "dataset" else ""
        return Answer({"url": f"{self.url}/{prefix}{name}", "name": name, "id": name})

    def visibility(self, call: Call) -> Answer:
        repo, _ = self.writable(call)
        repo.private = call.json.get("visibility") == "private" or bool(call.json.get("private"))
        return Answer({"private": repo.private})

    def validate(self, call: Call) -> Answer:
        try:
            found = metadata(call.json["content"])
        except yaml.YAMLError as error:
            return Answer({"errors": [{"message": str(error)}], "warnings": []}, 400)
        warned = [] if found else [{"message": "empty or missing yaml metadata in repo card"}]
        return Answer({"errors": [], "warnings": warned})

    def info(self, call: Call) -> Answer:
        repo = self.readable(call)
        return Answer(
            self.described(repo, repo.resolve(call.parts.get("revision") or "main"), blobs=call.wants("blobs"))
        )

    def described(self, repo: Repo, commit: Commit, *, blobs: bool = False) -> dict[str, Any]:
        siblings = [
            {"rfilename": name, **({"size": blob.size, "blobId": blob.oid} if blobs else {})}
            for name, blob in commit.files.items()
        ]
        first = list(repo.history("main"))[-1]
        found = {
            "_id": "0" * 24,
            "id": repo.name,
            "author": repo.name.split("/")[0],
            "sha": commit.id,
            "private": repo.private,
            "gated": False,
            "disabled": False,
            "downloads": repo.downloads,
            "likes": repo.likes,
            "tags": repo.tagged(),
            "cardData": repo.card(),
            "siblings": siblings,
            "createdAt": first.date,
            "lastModified": repo.resolve("main").date,
        }
        return found | (
            {"modelId": repo.name, "library_name": repo.card().get("library_name")} if repo.kind == "model" else {}
        )

    def listed(self, call: Call) -> Answer:
        def shown(repo: Repo) -> bool:
            namespace = repo.name.split("/")[0]
            return (
                repo.kind == call.kind
                and (not repo.private or bool(call.account and call.account.may_read(namespace)))
                and call.asked("author") in (None, namespace)
                and all(word.lower() in repo.name.lower() for word in call.query.get("search", []))
                and set(call.query.get("filter", [])) <= set(repo.tagged())
            )

        found = [self.described(repo, repo.resolve("main")) for repo in self.store.repos.values() if shown(repo)]
        if key := call.asked("sort"):
            found.sort(key=lambda item: str(item.get(key) or "").rjust(30), reverse=True)
        return self.paged(call, found[: int(call.asked("limit") or len(found))])

    def paged(self, call: Call, entries: list[dict[str, Any]]) -> Answer:
        start, path = int(call.asked("cursor") or 0), call.parts["path"]
        query = urlencode({**call.query, "cursor": [start + self.page]}, doseq=True)
        more = {"Link": f'<{self.url}{quote(path)}?{query}>; rel="next"'} if start + self.page < len(entries) else {}
        return Answer(entries[start : start + self.page], headers=more)

    # Files

    def tree(self, call: Call) -> Answer:
        commit = self.readable(call).resolve(call.parts["revision"])
        folder = unquote(call.parts.get("folder") or "")
        inside = {n: b for n, b in commit.files.items() if n.startswith(f"{folder}/" if folder else "")}
        if folder and not inside:
            raise Refusal(404, "Entry not found", "EntryNotFound")
        return self.paged(call, entries(inside, folder, recursive=call.wants("recursive")))

    def paths(self, call: Call) -> Answer:
        commit = self.readable(call).resolve(call.parts["revision"])
        asked = parse_qs(call.body.decode())["paths"]
        found = {e["path"]: e for e in entries(commit.files, "", recursive=True)}
        return Answer([found[name] for name in asked if name in found])

    def resolve(self, call: Call) -> Answer:
        repo, name = self.readable(call), unquote(call.parts["file"])
        commit = repo.resolve(call.parts["revision"])
        if (blob := commit.files.get(name)) is None:
            raise Refusal(404, "Entry not found", "EntryNotFound", headers={"X-Repo-Commit": commit.id})
        headers = {"ETag": f'"{blob.sha256 or blob.oid}"', "X-Repo-Commit": commit.id, "Accept-Ranges": "bytes"}
        if blob.sha256 is None:
            return ranged(blob.path, call.headers.get("Range"), headers)
        place = f"{self.storage}/{repo.kind}/{repo.name}/{blob.sha256}?{SIGNATURE}"
        linked = {"X-Linked-ETag": headers["ETag"], "X-Linked-Size": str(blob.size), "Location": place}
        return Answer(None, 302, headers | linked)

    def history(self, call: Call) -> Answer:
        repo = self.readable(call)
        commits = [
            {"id": c.id, "title": c.title, "message": c.message, "date": c.date, "authors": [{"user": c.author}]}
            for c in repo.history(call.parts["revision"])
        ]
        return self.paged(call, commits)

    # Writing

    def preupload(self, call: Call) -> Answer:
        ref = call.parts["revision"]
        repo = self.readable(call) if call.wants("create_pr") else self.writable(call, ref)[0]
        held = repo.resolve(ref).files

        def one(file: Mapping[str, Any]) -> dict[str, Any]:
            binary = b"\0" in base64.b64decode(file.get("sample", ""))
            large = is_lfs(held, file["path"]) or file["size"] >= LARGE or binary
            blob = held.get(file["path"])
            known = {"oid": blob.sha256 or blob.oid} if blob else {}
            return {"path": file["path"], "uploadMode": "lfs" if large else "regular", "shouldIgnore": False, **known}

        return Answer({"files": [one(file) for file in call.json["files"]]})

    def batch(self, call: Call) -> Answer:
        asked = call.json
        repo, _ = self.writable(call, asked.get("ref", {}).get("name"))
        return Answer(
            {"transfer": "basic", "objects": [self.action(repo, o["oid"], o["size"]) for o in asked["objects"]]}
        )

    def action(self, repo: Repo, sha: str, size: int) -> dict[str, Any]:
        found: dict[str, Any] = {"oid": sha, "size": size}
        if sha in repo.stored:
            return found
        place = f"{self.storage}/{repo.kind}/{repo.name}/{sha}"
        prefix = "datasets/" if repo.kind == "dataset" else ""
        api = f"{self.url}/{prefix}{repo.name}.git/info/lfs/objects"
        upload: dict[str, Any] = {"href": f"{place}?{SIGNATURE}"}
        if size > self.part_size:
            parts = {str(n + 1): f"{place}/{n + 1}?{SIGNATURE}" for n in range(-(-size // self.part_size))}
            upload = {"href": f"{api}/complete", "header": {"chunk_size": str(self.part_size), **parts}}
        actions = {"upload": upload, "verify": {"href": f"{api}/verify"}}
        return found | {"authenticated": True, "actions": actions}

    def upload(self, call: Call) -> Answer:
        if call.asked("X-Signature") is None or "Authorization" in call.headers:
            raise Refusal(403, "Only one auth mechanism allowed")
        assert call.upload is not None
        repo, sha = self.store.repo(call.parts["repo"], call.kind), call.parts["sha"]
        if part := call.parts.get("part"):
            place = self.part(repo, sha, int(part))
            place.parent.mkdir(parents=True, exist_ok=True)
            call.upload.rename(place)
            return Answer(headers={"ETag": f'"{part}"'})
        self.kept(repo, sha, call.upload)
        return Answer(headers={"ETag": f'"{sha}"'})

    def part(self, repo: Repo, sha: str, number: int) -> Path:
        return self.root / "parts" / repo.kind / repo.name / sha / str(number)

    def kept(self, repo: Repo, sha: str, path: Path) -> None:
        if (found := self.store.keep(path)[0]) != sha:
            self.store.file(found).unlink()
            raise Refusal(400, f"The content is not what its hash says: {sha}")
        repo.stored.add(sha)
        self.uploads[sha] += 1

    def complete(self, call: Call) -> Answer:
        # The completion address is signed by itself: the client sends no token with it.
        repo, sha = self.store.repo(call.parts["repo"], call.kind), call.json["oid"]
        if sha in repo.stored:
            return Answer({"success": True})
        whole = self.root / "incoming" / sha
        with whole.open("wb") as file:
            for part in call.json["parts"]:
                if not (place := self.part(repo, sha, part["partNumber"])).exists():
                    raise Refusal(400, f"Part {part['partNumber']} is missing")
                file.write(place.read_bytes())
        self.kept(repo, sha, whole)
        return Answer({"success": True})

    def verify(self, call: Call) -> Answer:
        repo, _ = self.readable(call), self.writer(call)
        sha = call.json["oid"]
        if sha not in repo.stored or self.store.file(sha).stat().st_size != call.json["size"]:
            raise Refusal(404, "Object does not exist")
        return Answer({})

    def commit(self, call: Call) -> Answer:
        ref = call.parts["revision"]
        wants_request = call.wants("create_pr")
        repo, account = (self.readable(call), self.writer(call)) if wants_request else self.writable(call, ref)
        lines = [json.loads(line) for line in call.body.splitlines() if line]
        too_many = self.most_operations is not None and len(lines) - 1 > self.most_operations
        if too_many or (self.most_bytes is not None and len(call.body) > self.most_bytes):
            raise Refusal(413, "Payload Too Large")
        for line in lines:
            if line["key"] == "file":
                line["value"]["content"] = base64.b64decode(line["value"]["content"])
        page = {}
        if wants_request:
            request = self.store.open(repo, lines[0]["value"]["summary"], "", account.name)
            request.status, ref = "open", f"refs/pr/{request.num}"
            page = {"pullRequestUrl": f"{self.url}/{repo.name}/discussions/{request.num}"}
        commit = self.store.commit(repo, ref, lines, account.name)
        url = f"{self.url}/{'datasets/' if repo.kind == 'dataset' else ''}{repo.name}/commit/{commit.id}"
        return Answer({"success": True, "commitOid": commit.id, "commitUrl": url, "hookOutput": "", **page})

    # Refs

    def refs(self, call: Call) -> Answer:
        repo = self.readable(call)

        def listed(names: Mapping[str, str], prefix: str) -> list[dict[str, str]]:
            return [{"name": n, "ref": f"{prefix}{n}", "targetCommit": c} for n, c in names.items()]

        pulls = {n: c for n, c in repo.heads.items() if n.startswith("refs/pr/")}
        heads = {n: c for n, c in repo.heads.items() if n not in pulls}
        found = {"branches": listed(heads, "refs/heads/"), "tags": listed(repo.tags, "refs/tags/"), "converts": []}
        return Answer(found | ({"pullRequests": listed(pulls, "")} if call.asked("include_prs") else {}))

    def branch(self, call: Call) -> Answer:
        repo, _ = self.writable(call)
        name, asked = call.parts["name"], json.loads(call.body or b"{}")
        start = repo.resolve(asked.get("startingPoint") or "main").id
        if name in repo.heads or name in repo.tags:
            raise Refusal(409, "Reference already exists")
        repo.heads[name] = start
        return Answer({})

    def drop_branch(self, call: Call) -> Answer:
        repo, _ = self.writable(call)
        if call.parts["name"] == "main":
            raise Refusal(403, "Cannot delete the default branch")
        if repo.heads.pop(call.parts["name"], None) is None:
            raise Refusal(404, "Invalid ref name", "RevisionNotFound")
        return Answer({})

    def tag(self, call: Call) -> Answer:
        repo, _ = self.writable(call)
        commit, name = repo.resolve(call.parts["name"]), call.json["tag"]
        if name in repo.tags:
            raise Refusal(409, f"Tag {name} already exists")
        repo.tags[name] = commit.id
        return Answer({})

    def drop_tag(self, call: Call) -> Answer:
        repo, _ = self.writable(call)
        if repo.tags.pop(call.parts["name"], None) is None:
            raise Refusal(404, "Tag not found", "RevisionNotFound")
        return Answer({})

    # Pull requests

    def discussions(self, call: Call) -> Answer:
        repo, author, status = self.readable(call), call.asked("author"), call.asked("status")
        found = [
            self.told(repo, request)
            for request in reversed(repo.requests)
            if author in (None, request.author)
            and (status in (None, "all") or (request.status in ("open", "draft")) == (status == "open"))
        ]
        start = int(call.asked("p") or 0) * self.page
        return Answer({"count": len(found), "start": start, "discussions": found[start : start + self.page]})

    def told(self, repo: Repo, request: Request) -> dict[str, Any]:
        return {
            "num": request.num,
            "title": request.title,
            "author": {"name": request.author},
            "createdAt": request.created,
            "status": request.status,
            "isPullRequest": True,
            "repo": {"name": repo.name, "type": repo.kind},
        }

    def discussion(self, call: Call) -> Answer:
        repo, account = self.readable(call), self.writer(call)
        if len(call.json["title"]) < 3:
            raise Refusal(400, "The title is too short")
        request = self.store.open(repo, call.json["title"], call.json.get("description", ""), account.name)
        return Answer({"num": request.num, "pullRequest": True})

    def request(self, call: Call) -> tuple[Repo, Request]:
        repo, number = self.readable(call), int(call.parts["num"])
        if not 1 <= number <= len(repo.requests):
            raise Refusal(404, "Discussion not found")
        return repo, repo.requests[number - 1]

    def details(self, call: Call) -> Answer:
        repo, request = self.request(call)
        changes = {"base": "refs/heads/main", "mergeCommitId": request.merged}
        return Answer(
            self.told(repo, request) | {"events": [], "changes": changes, "filesWithConflicts": [], "diff": ""}
        )

    def status(self, call: Call) -> Answer:
        (repo, request), account = self.request(call), self.writer(call)
        if account.name != request.author and not account.may_write(repo.name.split("/")[0]):
            raise Refusal(403, "You cannot change this pull request")
        request.status = call.json["status"]
        event = {"id": "0", "type": "status-change", "createdAt": now(), "author": {"name": account.name}}
        return Answer({"newStatus": {**event, "data": {"status": request.status}}})

    def merge(self, call: Call) -> Answer:
        (repo, request), (_, account) = self.request(call), self.writable(call)
        self.store.merge(repo, request, account.name)
        return Answer({"merged": True})

    # Collections

    def collected(self, call: Call) -> Answer:
        owner = call.asked("owner")
        found = [c for c in self.store.collections.values() if owner in (None, c["owner"]["name"])]
        shown = [c for c in found if not c["private"] or (call.account and call.account.may_read(c["owner"]["name"]))]
        return self.paged(
            call, [{k: v for k, v in c.items() if k != "position"} | {"items": c["items"][:4]} for c in shown]
        )

    def new_collection(self, call: Call) -> Answer:
        asked, account = call.json, self.writer(call)
        if not account.may_write(asked["namespace"]):
            raise Refusal(403, "You don't have the rights to create a collection here")
        words = re.sub(r"[^a-z0-9]+", "-", asked["title"].lower()).strip("-")
        slug = f"{asked['namespace']}/{words}-{len(self.store.collections):024x}"
        same = [c for c in self.store.collections.values() if c["slug"][:-24] == slug[:-24]]
        if same:
            raise Refusal(409, "A collection of this title exists", slug=same[0]["slug"])
        self.store.collections[slug] = {
            "slug": slug,
            "title": asked["title"],
            "owner": {"name": asked["namespace"]},
            "items": [],
            "lastUpdated": now(),
            "position": 0,
            "private": bool(asked.get("private")),
            "theme": "green",
            "upvotes": 0,
        }
        return Answer(self.store.collections[slug])

    def collection(self, call: Call) -> Answer:
        found = self.store.collections.get(unquote(call.parts["slug"]))
        if found is None or (found["private"] and not (call.account and call.account.may_read(found["owner"]["name"]))):
            raise Refusal(404, "Collection not found")
        return Answer(found)

    def collection_item(self, call: Call) -> Answer:
        found, item = self.collection(call).body, call.json["item"]
        if not self.writer(call).may_write(found["owner"]["name"]):
            raise Refusal(403, "You cannot write to this collection")
        self.store.repo(item["id"], item["type"])
        if any((other["id"], other["type"]) == (item["id"], item["type"]) for other in found["items"]):
            raise Refusal(409, "This item is in the collection already")
        found["items"].append({"_id": f"{len(found['items']):024x}", **item, "position": len(found["items"])})
        return Answer(found)

    # The rest

    def download(self, call: Call) -> Answer:
        if call.asked("X-Signature") is None or "Authorization" in call.headers:
            raise Refusal(403, "Only one auth mechanism allowed")
        return ranged(self.store.file(call.parts["sha"]), call.headers.get("Range"), {})

    def xet(self, call: Call) -> Answer:
        raise Refusal(501, "This server does not speak Xet: set HF_HUB_DISABLE_XET=1")

    def unknown(self, call: Call) -> Answer:
        raise Refusal(404, f"Nothing is at {call.parts['path']}")


API = r"/api/(?P<kind>models|datasets)/(?P<repo>[^/]+/[^/]+)"
PLAIN = r"/(?P<kind>datasets/)?(?P<repo>[^/]+/[^/]+?)"
REF = r"(?P<revision>[^/]+)"
STORAGE = r"/(?P<storage>storage)/(?P<kind>model|dataset)/(?P<repo>[^/]+/[^/]+)/(?P<sha>[0-9a-f]{64})"
PULL = rf"{API}/discussions/(?P<num>\d+)"

ROUTES: list[tuple[str, str, str, Callable[[HubWorld, Call], Answer]]] = [
    ("GET", r"/api/whoami-v2", "whoami", HubWorld.whoami),
    ("POST", r"/api/repos/create", "create", HubWorld.create),
    ("POST", r"/api/validate-yaml", "validate-yaml", HubWorld.validate),
    ("GET", r"/api/(?P<kind>models)", "models", HubWorld.listed),
    ("GET", r"/api/(?P<kind>datasets)", "datasets", HubWorld.listed),
    ("PUT", rf"{API}/settings", "settings", HubWorld.visibility),
    ("GET", rf"{API}/xet-(?:read|write)-token/.*", "xet", HubWorld.xet),
    ("POST", rf"{API}/preupload/{REF}", "preupload", HubWorld.preupload),
    ("POST", rf"{API}/commit/{REF}", "commit", HubWorld.commit),
    ("GET", rf"{API}/commits/{REF}", "commits", HubWorld.history),
    ("GET", rf"{API}/refs", "refs", HubWorld.refs),
    ("POST", rf"{API}/branch/(?P<name>[^/]+)", "branch", HubWorld.branch),
    ("DELETE", rf"{API}/branch/(?P<name>[^/]+)", "delete-branch", HubWorld.drop_branch),
    ("POST", rf"{API}/tag/(?P<name>[^/]+)", "tag", HubWorld.tag),
    ("DELETE", rf"{API}/tag/(?P<name>[^/]+)", "delete-tag", HubWorld.drop_tag),
    ("GET", rf"{API}/tree/{REF}(?:/(?P<folder>.+))?", "tree", HubWorld.tree),
    ("POST", rf"{API}/paths-info/{REF}", "paths-info", HubWorld.paths),
    ("GET", rf"{API}/discussions", "discussions", HubWorld.discussions),
    ("POST", rf"{API}/discussions", "discussion", HubWorld.discussion),
    ("GET", PULL, "discussion-details", HubWorld.details),
    ("POST", rf"{PULL}/status", "discussion-status", HubWorld.status),
    ("POST", rf"{PULL}/merge", "merge", HubWorld.merge),
    ("GET", rf"{API}/revision/{REF}", "info", HubWorld.info),
    ("GET", API, "info", HubWorld.info),
    ("GET", r"/api/collections", "collections", HubWorld.collected),
    ("POST", r"/api/collections", "new-collection", HubWorld.new_collection),
    ("POST", r"/api/collections/(?P<slug>[^/]+/[^/]+)/items", "collection-item", HubWorld.collection_item),
    ("GET", r"/api/collections/(?P<slug>[^/]+/[^/]+)", "collection", HubWorld.collection),
    ("POST", rf"{PLAIN}\.git/info/lfs/objects/batch", "lfs-batch", HubWorld.batch),
    ("POST", rf"{PLAIN}\.git/info/lfs/objects/complete", "lfs-complete", HubWorld.complete),
    ("POST", rf"{PLAIN}\.git/info/lfs/objects/verify", "lfs-verify", HubWorld.verify),
    ("PUT", rf"{STORAGE}(?:/(?P<part>\d+))?", "lfs-upload", HubWorld.upload),
    ("GET", STORAGE, "download", HubWorld.download),
    ("GET", rf"{PLAIN}/resolve/{REF}/(?P<file>.+)", "resolve", HubWorld.resolve),
]


def route(method: str, path: str) -> tuple[str, str | None, dict[str, str], Callable[[HubWorld, Call], Answer]]:
    for wanted, pattern, stage, handler in ROUTES:
        if wanted == method.replace("HEAD", "GET") and (found := re.fullmatch(pattern, path)):
            parts = {key: unquote(value) for key, value in found.groupdict().items() if value is not None}
            return stage, parts.get("repo"), {**parts, "path": path}, handler
    return "unknown", None, {"path": path}, HubWorld.unknown


def pieces(request: BaseHTTPRequestHandler, stop: int | None) -> Any:
    """The body, or its first bytes; a Gone where the other side leaves."""
    chunked = "chunked" in (request.headers.get("Transfer-Encoding") or "")
    left = stop
    while left is None or left > 0:
        size = int(request.rfile.readline() or b"0", 16) if chunked else int(request.headers.get("Content-Length") or 0)
        rest = size
        while rest > 0 and (left is None or left > 0):
            piece = request.rfile.read1(min(rest, 65536, left or 65536))  # type: ignore[attr-defined]
            if not piece:
                raise Gone
            rest -= len(piece)
            left = None if left is None else left - len(piece)
            yield piece
        if chunked and rest == 0:
            request.rfile.readline()
        if not chunked or size == 0:
            return


def entries(files: Mapping[str, Blob], folder: str, *, recursive: bool) -> list[dict[str, Any]]:
    """A listing: the folders too, as the Hub has them."""
    found: dict[str, dict[str, Any]] = {}
    for name, blob in files.items():
        inner = name[len(folder) + 1 :] if folder else name
        steps = inner.split("/")
        for depth in range(1, len(steps)):
            path = "/".join([*filter(None, [folder]), *steps[:depth]])
            if recursive or depth == 1:
                found.setdefault(path, {"type": "directory", "oid": "0" * 40, "size": 0, "path": path})
        if recursive or len(steps) == 1:
            found[name] = {"type": "file", "oid": blob.oid, "size": blob.size, "path": name}
            if blob.sha256:
                found[name]["lfs"] = {"oid": blob.sha256, "size": blob.size, "pointerSize": 134}
    return list(found.values())


def ranged(path: Path, asked: str | None, headers: Mapping[str, str]) -> Answer:
    data = path.read_bytes()
    if not asked:
        return Answer(data, headers=headers)
    first, _, last = asked.removeprefix("bytes=").partition("-")
    start, stop = int(first), min(int(last or len(data) - 1) + 1, len(data))
    return Answer(data[start:stop], 206, {**headers, "Content-Range": f"bytes {start}-{stop - 1}/{len(data)}"})


def end(request: BaseHTTPRequestHandler, *, reset: bool) -> None:
    """End the connection; with `reset` the other side is told that it is gone."""
    request.close_connection = True
    try:
        if reset:
            request.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            request.connection.close()
        else:
            request.connection.shutdown(socket.SHUT_RDWR)
    except OSError:
        pass  # the other side left first


def connected(world: HubWorld, monkeypatch: pytest.MonkeyPatch, home: Path, token: str | None = TOKEN) -> list[float]:
    """Let this process talk to `world` as one that was started with its environment; what it would have waited, in seconds."""
    import huggingface_hub.utils as client
    from huggingface_hub import constants
    from huggingface_hub.utils import _http

    from nla_hub.hub import refusals, write_refusals

    for key in [key for key in os.environ if "proxy" in key.lower() or key in ("HF_TOKEN", "HF_TOKEN_PATH")]:
        monkeypatch.delenv(key)
    for key, value in (world.settings(home) | ({"HF_TOKEN": token} if token else {})).items():
        monkeypatch.setenv(key, value)
    monkeypatch.setattr(constants, "ENDPOINT", world.url)
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", world.url + "/{repo_id}/resolve/{revision}/{filename}"
    )
    monkeypatch.setattr(constants, "HF_HOME", str(home))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(home / "hub"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(home / "token"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    # The client takes addresses of the Hub's interface for such on https alone.
    plain = _http.REPO_API_REGEX.pattern.replace("https:", "https?:")
    monkeypatch.setattr(_http, "REPO_API_REGEX", re.compile(plain, _http.REPO_API_REGEX.flags))
    waits: list[float] = []
    for module in (_http, refusals, write_refusals):
        monkeypatch.setattr(
            module, "time", SimpleNamespace(sleep=waits.append, time=time.time, monotonic=time.monotonic)
        )
    client.close_session()
    return waits
