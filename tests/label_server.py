"""A server with the routes of the OpenAI chat API and of the Anthropic Message Batches API, and a log of what it was paid for.

What it does wrong is told by `faults`, one for each request (for an answer or a new batch; `poll_faults` for all other ones).
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from av_server import Fault, send
from hub_server import end

Data = dict[str, Any]

CHAT = "/v1/chat/completions"
BATCHES = "/v1/messages/batches"


def good(prompt: str) -> str:
    """A label as it is asked for, different for each prompt."""
    word = hashlib.sha256(prompt.encode()).hexdigest()[:8]
    lines = [f"Feature {i} about {word}: " + " ".join(["words"] * 25) + "." for i in range(3)]
    return "<explanation>\n" + "\n".join(f"- {line}" for line in lines) + "\n</explanation>"


@dataclass
class StoredBatch:
    """A batch that was accepted.

    Attributes:
        requests: custom_id -> params. ended: whether its results are there.
        results: custom_id -> result, where it is not the usual one.
    """

    id: str
    requests: dict[str, Data]
    created: datetime = field(default_factory=lambda: datetime.now(UTC))
    ended: bool = True
    results: dict[str, Data] = field(default_factory=dict)
    gone: bool = False


class LabelServer:
    """Serves both APIs.

    Attributes:
        asked: prompts in the order of their arrival. sent: those whose answer was written to its end.
        bodies, headers: of all requests with a body.
        faults, poll_faults: taken from the left, one a request; `fault` makes them where there are none left.
        twist: may change an answer before it is sent. text: the answer's text. usage: (input, output) tokens of an answer.
        hold: after so many answers the next requests wait for `released`.
        batches: accepted, by name. lose: batches that are accepted, whose name nobody is told. ending: whether new ones end.
    """

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.sent: list[str] = []
        self.bodies: list[Data] = []
        self.headers: list[dict[str, str]] = []
        self.polls: Counter[str] = Counter()
        self.faults: deque[Fault] = deque()
        self.poll_faults: deque[Fault] = deque()
        self.fault: Callable[[str], Fault] = lambda prompt: Fault()
        self.twist: Callable[[Data], Any] = lambda answer: answer
        self.text: Callable[[str], str] = good
        self.usage: tuple[int, int] | None = (100, 50)
        self.key: str | None = None
        self.hold: int | None = None
        self.stuck = threading.Event()
        self.released = threading.Event()
        self.running = self.most_running = 0
        self.batches: dict[str, StoredBatch] = {}
        self.lose = 0
        self.ending = True
        self.result: Callable[[str, Data], Data | None] = lambda key, params: None
        self.dead = False
        self.lock = threading.Lock()
        self._start(0)

    def _start(self, port: int) -> None:
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                server.get(self)

            def do_POST(self) -> None:
                if server.dead:
                    return end(self, reset=True)
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with server.lock:
                    server.running += 1
                    server.most_running = max(server.most_running, server.running)
                try:
                    server.post(self, body)
                finally:
                    with server.lock:
                        server.running -= 1

            def log_message(self, *_: object) -> None:
                pass

        class Server(ThreadingHTTPServer):
            daemon_threads = True

            def handle_error(self, *_: object) -> None:
                """A client that goes away is no news."""

        self.http = Server(("127.0.0.1", port), Handler)
        self.port = self.http.server_address[1]
        threading.Thread(target=self.http.serve_forever, args=(0.02,), daemon=True).start()

    @property
    def openai_url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    @property
    def anthropic_url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def die(self) -> None:
        """Accept nothing any more and end what is open, until `come_back`."""
        self.dead = True
        self.http.shutdown()
        self.http.server_close()

    def come_back(self) -> None:
        self.dead = False
        self._start(self.port)

    def close(self) -> None:
        self.released.set()
        self.die()

    # -- requests --------------------------------------------------------------------------------------------

    def _refused(self, request: BaseHTTPRequestHandler) -> bool:
        given = request.headers.get("Authorization", "").removeprefix("Bearer ") or request.headers.get("X-Api-Key")
        if self.key is None or given == self.key:
            return False
        send(request, 401, error(f"Incorrect API key provided: {given}", "authentication_error"))
        return True

    def post(self, request: BaseHTTPRequestHandler, body: Data) -> None:
        with self.lock:
            self.bodies.append(body)
            self.headers.append(dict(request.headers))
            fault = self.faults.popleft() if self.faults else self.fault(json.dumps(body))
        if self._refused(request):
            return
        if request.path == CHAT:
            self._chat(request, body, fault)
        elif request.path == BATCHES:
            self._new_batch(request, body, fault)
        else:
            send(request, 404, error("Not Found", "not_found_error"))

    def get(self, request: BaseHTTPRequestHandler) -> None:
        path = request.path.partition("?")[0]
        with self.lock:
            self.polls[path] += 1
            fault = self.poll_faults.popleft() if self.poll_faults else Fault()
        if self._refused(request):
            return
        if fault.status != 200 or fault.body != b"{}":
            return send(request, fault.status, fault.body, fault.headers)
        if path == BATCHES:
            listed = sorted(self.batches.values(), key=lambda batch: batch.created, reverse=True)
            page = {"data": [self._state(b) for b in listed], "has_more": False, "first_id": None, "last_id": None}
            return send(request, 200, json.dumps(page).encode())
        name, _, rest = path.removeprefix(f"{BATCHES}/").partition("/")
        batch = self.batches.get(name)
        if batch is None or batch.gone:
            return send(request, 404, error("no such batch", "not_found_error"))
        data = json.dumps(self._state(batch)).encode()
        if rest == "results":
            lines = [{"custom_id": key, "result": self._result(batch, key)} for key in reversed(batch.requests)]
            data = "".join(json.dumps(line) + "\n" for line in lines).encode()
        if fault.cut or fault.reset:
            return end(request, data, len(data) // 2, reset=fault.reset)
        send(request, 200, data)

    # -- chat ------------------------------------------------------------------------------------------------

    def _chat(self, request: BaseHTTPRequestHandler, body: Data, fault: Fault) -> None:
        [message] = body["messages"]
        prompt = message["content"]
        with self.lock:
            stuck = self.hold is not None and len(self.asked) >= self.hold
            self.asked.append(prompt)
        if stuck:
            self.stuck.set()
            self.released.wait(60)
        if fault.sleep:
            self.released.wait(fault.sleep)
        if fault.status != 200 or fault.body != b"{}":
            return send(request, fault.status, fault.body, fault.headers)
        answer: Data = {
            "id": "x",
            "object": "chat.completion",
            "model": body["model"],
            "choices": [
                {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": self.text(prompt)}}
            ],
        }
        if self.usage is not None:
            answer["usage"] = {"prompt_tokens": self.usage[0], "completion_tokens": self.usage[1]}
        data = json.dumps(self.twist(answer)).encode()
        if fault.cut or fault.reset:
            return end(request, data, len(data) // 2, reset=fault.reset)
        send(request, 200, data)
        with self.lock:
            self.sent.append(prompt)

    # -- batches ---------------------------------------------------------------------------------------------

    def _new_batch(self, request: BaseHTTPRequestHandler, body: Data, fault: Fault) -> None:
        if fault.status != 200 or fault.body != b"{}":
            return send(request, fault.status, fault.body, fault.headers)
        requests = {entry["custom_id"]: entry["params"] for entry in body["requests"]}
        assert len(requests) == len(body["requests"])
        with self.lock:
            batch = StoredBatch(f"msgbatch_{len(self.batches)}", requests, ended=self.ending)
            self.batches[batch.id] = batch
            self.asked += [params["messages"][0]["content"] for params in requests.values()]
            lost, self.lose = self.lose > 0, max(0, self.lose - 1)
        if self.hold is not None:
            self.stuck.set()
            self.released.wait(60)
        data = json.dumps(self._state(batch)).encode()
        if lost or fault.cut:
            return end(request, data, 0, reset=True)
        send(request, 200, data)

    def _state(self, batch: StoredBatch) -> Data:
        names = ("canceled", "errored", "expired", "succeeded")
        counts = {"processing": 0 if batch.ended else len(batch.requests), **dict.fromkeys(names, 0)}
        if batch.ended:
            counts |= Counter(self._result(batch, key)["type"] for key in batch.requests)
        when = batch.created.isoformat().replace("+00:00", "Z")
        return {
            "id": batch.id,
            "type": "message_batch",
            "processing_status": "ended" if batch.ended else "in_progress",
            "request_counts": counts,
            "created_at": when,
            "expires_at": when,
            "ended_at": when if batch.ended else None,
            "results_url": f"{self.anthropic_url}{BATCHES}/{batch.id}/results" if batch.ended else None,
        }

    def _result(self, batch: StoredBatch, key: str) -> Data:
        params = batch.requests[key]
        if key not in batch.results:
            batch.results[key] = self.result(key, params) or self.success(params)
        return batch.results[key]

    def success(self, params: Data) -> Data:
        usage = {"input_tokens": 100, "output_tokens": 50}
        text = self.text(params["messages"][0]["content"])
        message = {
            "id": "m",
            "type": "message",
            "role": "assistant",
            "model": params["model"],
            "content": [{"type": "text", "text": text}],
            "stop_reason": "end_turn",
            "stop_sequence": None,
            "usage": usage,
        }
        return {"type": "succeeded", "message": self.twist(message)}

    @property
    def paid(self) -> Counter[str]:
        """How often each prompt was answered in a batch."""
        return Counter(
            batch.requests[key]["messages"][0]["content"]
            for batch in self.batches.values()
            for key in batch.requests
            if self._result(batch, key)["type"] == "succeeded"
        )


def error(message: str, kind: str = "invalid_request_error", code: str | None = None) -> bytes:
    return json.dumps({"type": "error", "error": {"message": message, "type": kind, "code": code}}).encode()
