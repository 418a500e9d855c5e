"""A Hugging Face Hub of the few endpoints that a download uses, on 127.0.0.1."""

from __future__ import annotations

import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

REVISION = "0123456789abcdef0123456789abcdef01234567"

REFUSALS = {
    # name of the repository -> status and headers of every answer
    "owner/unauthorized-av": (401, {}),
    "owner/bad-token-av": (401, {"X-Error-Message": "Invalid credentials in Authorization header"}),
    "owner/gated-av": (403, {"X-Error-Code": "GatedRepo", "X-Error-Message": "Access is restricted"}),
    "owner/forbidden-av": (403, {}),
    "owner/broken-av": (500, {}),
}


class Hub:
    """Serves `repositories` (name -> directory) at one revision; everything else is a 404."""

    def __init__(self, repositories: dict[str, Path]) -> None:
        self.repositories = repositories
        self.requests: list[tuple[str, str, str | None]] = []
        hub = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                hub.answer(self, body=True)

            def do_HEAD(self) -> None:
                hub.answer(self, body=False)

            def log_message(self, *_: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()

    def answer(self, request: BaseHTTPRequestHandler, *, body: bool) -> None:
        path = unquote(urlsplit(request.path).path).strip("/")
        query = parse_qs(urlsplit(request.path).query)
        self.requests.append((request.command, path, request.headers.get("Authorization")))
        if path == "stop":
            self.send(request, 200, b"{}", {}, body)
            threading.Thread(target=self.close, daemon=True).start()
            return
        parts = path.removeprefix("api/models/").split("/")
        repo, rest = "/".join(parts[:2]), parts[2:]
        if repo in REFUSALS:
            status, headers = REFUSALS[repo]
            return self.send(request, status, b"{}", headers, body)
        directory = self.repositories.get(repo)
        if directory is None:
            return self.send(request, 404, b"{}", {"X-Error-Code": "RepoNotFound"}, body)
        revision = rest[1] if len(rest) > 1 else "main"
        if revision not in ("main", REVISION):
            return self.send(request, 404, b"{}", {"X-Error-Code": "RevisionNotFound"}, body)
        files = {p.name: p for p in directory.iterdir()}
        if path.startswith("api/models/"):
            if rest and rest[0] == "tree":
                answer: object = [
                    {"type": "file", "path": n, "size": p.stat().st_size, "oid": etag(p)} for n, p in files.items()
                ]
                assert "recursive" in query
            else:
                answer = {"id": repo, "sha": REVISION, "siblings": [{"rfilename": n} for n in files]}
            return self.send(request, 200, json.dumps(answer).encode(), {"Content-Type": "application/json"}, body)
        name = "/".join(rest[2:])
        if rest[0] != "resolve" or name not in files:
            return self.send(request, 404, b"{}", {"X-Error-Code": "EntryNotFound"}, body)
        headers = {
            "ETag": f'"{etag(files[name])}"',
            "X-Repo-Commit": REVISION,
            "X-Linked-Size": str(files[name].stat().st_size),
        }
        self.send(request, 200, files[name].read_bytes(), headers, body)

    def send(
        self, request: BaseHTTPRequestHandler, status: int, data: bytes, headers: dict[str, str], body: bool
    ) -> None:
        request.send_response(status)
        for key, value in headers.items():
            request.send_header(key, value)
        request.send_header("Content-Length", str(len(data)))
        request.end_headers()
        if body:
            request.wfile.write(data)


def etag(path: Path) -> str:
    return hashlib.sha1(path.read_bytes()).hexdigest()
