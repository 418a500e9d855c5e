"""A Hugging Face Hub of the few endpoints that downloads use, and the other host that its large files come from.

Data sets are asked for under addresses of their own and stand beside the models under the same kind of name.

The Hub is on 127.0.0.1. Files that it keeps in LFS (safetensors) are answered with a redirect to the storage host, which
is called localhost, has no use for tokens and wants the signature that the Hub put into the address.
"""

from __future__ import annotations

import hashlib
import json
import socket
import struct
import threading
from collections import Counter
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import NamedTuple
from urllib.parse import parse_qs, quote, unquote, urlsplit

REVISION = "0123456789abcdef0123456789abcdef01234567"
SIGNATURE = "X-Signature=51gn4tur3"
PAGE = 3
"""Files on one page of a listing."""

REFUSALS = {
    # name of the repository -> status and headers of every answer
    "owner/unauthorized-av": (401, {}),
    "owner/bad-token-av": (401, {"X-Error-Message": "Invalid credentials in Authorization header"}),
    "owner/gated-av": (403, {"X-Error-Code": "GatedRepo", "X-Error-Message": "Access is restricted"}),
    "owner/gated-anonymous": (401, {"X-Error-Code": "GatedRepo", "X-Error-Message": "Access is restricted"}),
    "owner/disabled": (403, {"X-Error-Message": "Access to this resource is disabled."}),
    "owner/forbidden-av": (403, {}),
    "owner/broken-av": (500, {}),
    "owner/down": (503, {}),
    "owner/hidden": (401, {"X-Error-Code": "RepoNotFound", "X-Error-Message": "Repository not found"}),
    "owner/busy-for-long": (429, {"Retry-After": "86400"}),
    "owner/busy-window": (
        429,
        {"RateLimit": '"api";r=0;t=540', "RateLimit-Policy": '"fixed window";"api";q=500;w=600'},
    ),
}


class Request(NamedTuple):
    """What was asked for, and of which host."""

    method: str
    path: str
    authorization: str | None
    range: str | None = None
    host: str = "hub"


@dataclass
class Faults:
    """What goes wrong with one repository. Kinds of requests: info, tree, head, get (from the Hub), blob (storage)."""

    refuse: dict[str, tuple[int, int, dict[str, str]]] = field(default_factory=dict)
    """Kind -> (how often, status, headers)."""
    cut: dict[str, tuple[int, int]] = field(default_factory=dict)
    """File -> (how often, after how many bytes) the connection ends."""
    reset: frozenset[str] = frozenset()
    """Files whose connection is reset instead of closed."""
    promise: dict[str, int] = field(default_factory=dict)
    """File -> bytes that its metadata promises beyond its size."""
    damage: dict[str, int] = field(default_factory=dict)
    """File -> how often it arrives with one byte changed."""
    commit: str = REVISION
    extra: tuple[str, ...] = ()
    """Names that are listed and not there."""
    answer: bytes | None = None
    """What `info` says instead of JSON."""
    moved: str | None = None
    """Another repository, to which everything is redirected."""
    hang_up: bool = False
    """Whether `info` is answered once and ends without an answer from then on."""


class Hub:
    """Serves `repositories` (name -> directory) at one revision; everything else is a 404."""

    def __init__(self, repositories: dict[str, Path], faults: dict[str, Faults] | None = None) -> None:
        self.repositories = repositories
        self.faults = faults or {}
        self.requests: list[Request] = []
        self.happened: Counter[tuple[str, str]] = Counter()
        self.lock = threading.Lock()
        self.server, self.url = self.listen(self.answer, "127.0.0.1")
        self.storage, self.storage_url = self.listen(self.deliver, "localhost")

    def listen(self, answer: object, host: str) -> tuple[ThreadingHTTPServer, str]:
        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                answer(self)  # type: ignore[operator]

            do_HEAD = do_GET

            def log_message(self, *_: object) -> None:
                pass

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        return server, f"http://{host}:{server.server_address[1]}"

    def close(self) -> None:
        for server in (self.server, self.storage):
            server.shutdown()
            server.server_close()

    def note(self, request: BaseHTTPRequestHandler, path: str, host: str) -> None:
        asked = request.headers
        with self.lock:
            self.requests.append(Request(request.command, path, asked.get("Authorization"), asked.get("Range"), host))

    def still(self, repo: str, what: str, times: int) -> bool:
        """Whether a fault that happens so often happens once more."""
        with self.lock:
            self.happened[repo, what] += 1
            return self.happened[repo, what] <= times

    def answer(self, request: BaseHTTPRequestHandler) -> None:
        path = unquote(urlsplit(request.path).path).strip("/")
        query = parse_qs(urlsplit(request.path).query)
        self.note(request, path, "hub")
        if path == "stop":
            send(request, 200, b"{}", {})
            threading.Thread(target=self.close, daemon=True).start()
            return None
        api = path.startswith(("api/models/", "api/datasets/"))
        plain = path.removeprefix("api/").removeprefix("models/").removeprefix("datasets/")
        parts = plain.split("/")
        repo, rest = "/".join(parts[:2]), parts[2:]
        faults = self.faults.get(repo, Faults())
        kind = ("tree" if rest[:1] == ["tree"] else "info") if api else request.command.lower()
        if repo in REFUSALS:
            return send(request, REFUSALS[repo][0], b"{}", REFUSALS[repo][1])
        if faults.moved:
            return send(request, 307, b"", {"Location": request.path.replace(repo, faults.moved)})
        if kind == "info" and faults.hang_up and not self.still(repo, "answered", 1):
            return end(request, reset=False)
        if kind in faults.refuse and self.still(repo, kind, faults.refuse[kind][0]):
            return send(request, faults.refuse[kind][1], b"{}", faults.refuse[kind][2])
        directory = self.repositories.get(repo)
        if directory is None:
            return send(request, 404, b"{}", {"X-Error-Code": "RepoNotFound"})
        revision = rest[1] if len(rest) > 1 else "main"
        if revision not in ("main", REVISION):
            return send(request, 404, b"{}", {"X-Error-Code": "RevisionNotFound"})
        files = {p.relative_to(directory).as_posix(): p for p in sorted(directory.rglob("*")) if p.is_file()}
        if kind == "tree":
            assert "recursive" in query
            entries = [entry(name, files.get(name), faults) for name in (*faults.extra, *files)]
            start = int(query.get("cursor", ["0"])[0])
            more = f'<{self.url}{urlsplit(request.path).path}?recursive=true&cursor={start + PAGE}>; rel="next"'
            headers = {"Link": more} if start + PAGE < len(entries) else {}
            return send(request, 200, json.dumps(entries[start : start + PAGE]).encode(), headers)
        if kind == "info":
            answer = {"id": repo, "sha": faults.commit, "siblings": [{"rfilename": name} for name in files]}
            return send(
                request, 200, faults.answer or json.dumps(answer).encode(), {"Content-Type": "application/json"}
            )
        name = "/".join(rest[2:])
        if rest[0] != "resolve" or name not in files:
            return send(request, 404, b"{}", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": REVISION})
        size = str(files[name].stat().st_size + faults.promise.get(name, 0))
        headers = {"ETag": f'"{etag(files[name])}"', "X-Repo-Commit": REVISION, "X-Linked-Size": size}
        if not is_lfs(name):
            return self.file(request, repo, name, headers)
        headers |= {
            "X-Linked-ETag": headers["ETag"],
            "Location": f"{self.storage_url}/{quote(repo)}/{quote(name)}?{SIGNATURE}",
        }
        return send(request, 302, b"", headers)

    def deliver(self, request: BaseHTTPRequestHandler) -> None:
        """The storage host."""
        path = unquote(urlsplit(request.path).path).strip("/")
        self.note(request, path, "storage")
        if SIGNATURE not in urlsplit(request.path).query:
            return send(request, 403, b"", {})
        owner, repo, name = path.split("/", 2)
        faults = self.faults.get(f"{owner}/{repo}", Faults())
        if "blob" in faults.refuse and self.still(f"{owner}/{repo}", "blob", faults.refuse["blob"][0]):
            return send(request, faults.refuse["blob"][1], b"", faults.refuse["blob"][2])
        return self.file(request, f"{owner}/{repo}", name, {})

    def file(self, request: BaseHTTPRequestHandler, repo: str, name: str, headers: dict[str, str]) -> None:
        data = (self.repositories[repo] / name).read_bytes()
        faults = self.faults.get(repo, Faults())
        status, asked = 200, request.headers.get("Range")
        if request.command == "GET":
            if self.still(repo, f"damage {name}", faults.damage.get(name, 0)):
                data = bytes([data[0] ^ 1]) + data[1:]
            if asked:
                first, _, last = asked.removeprefix("bytes=").partition("-")
                start, stop = int(first), min(int(last or len(data) - 1) + 1, len(data))
                headers = headers | {"Content-Range": f"bytes {start}-{stop - 1}/{len(data)}"}
                status, data = 206, data[start:stop]
            times, after = faults.cut.get(name, (0, 0))
            if self.still(repo, f"cut {name}", times):
                return end(request, data, after, reset=name in faults.reset)
        return send(request, status, data, headers)


def send(request: BaseHTTPRequestHandler, status: int, data: bytes, headers: dict[str, str]) -> None:
    request.send_response(status)
    for key, value in headers.items():
        request.send_header(key, value)
    request.send_header("Content-Length", str(len(data)))
    request.end_headers()
    if request.command == "GET":
        request.wfile.write(data)


def end(request: BaseHTTPRequestHandler, data: bytes = b"", after: int = 0, *, reset: bool) -> None:
    """Promise all of the data, send some of it and end the connection."""
    if data:
        request.send_response(200)
        request.send_header("Content-Length", str(len(data)))
        request.end_headers()
        request.wfile.write(data[:after])
        request.wfile.flush()
    request.close_connection = True
    if reset:  # no farewell: the other side is told that the connection is gone
        request.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        request.connection.close()
    else:
        request.connection.shutdown(socket.SHUT_RDWR)


def is_lfs(name: str) -> bool:
    return name.endswith(".safetensors")


def entry(name: str, path: Path | None, faults: Faults) -> dict[str, object]:
    """One line of a listing."""
    if path is None:
        return {"type": "file", "path": name, "size": 1, "oid": "0" * 40}
    size = path.stat().st_size + faults.promise.get(name, 0)
    found: dict[str, object] = {
        "type": "file",
        "path": name,
        "size": size,
        "oid": hashlib.sha1(name.encode()).hexdigest(),
    }
    if is_lfs(name):
        found["lfs"] = {"oid": etag(path), "size": size, "pointerSize": 134}
    return found


def etag(path: Path) -> str:
    """As the Hub's: sha256 of what is in LFS, git's hash of the rest."""
    data = path.read_bytes()
    if is_lfs(path.name):
        return hashlib.sha256(data).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
