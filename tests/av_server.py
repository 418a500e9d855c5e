"""A server with the two routes of vLLM that the remote engine uses, over an AV that transformers alone runs.

What it is asked is kept; what it does wrong is told by `faults`, one for each request for completions, and by `twist`.
"""

from __future__ import annotations

import base64
import io
import json
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import torch
from hub_server import end
from torch import Tensor

Answer = dict[str, Any]


@dataclass
class Fault:
    """What happens to one request instead of an answer."""

    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b"{}"
    cut: bool = False
    reset: bool = False
    sleep: float = 0.0


class AVServer:
    """Serves a model and its tokenizer.

    Attributes:
        asked: bodies of the requests for completions, in the order of their arrival.
        faults: taken from the left, one a request.
        twist: may change an answer before it is sent.
        embeds: may change what was sent before the model reads it.
        script: token ids that every row writes, whatever the model says.
        key: the API key that requests need.
        scaled: whether log-probabilities are those at the temperature.
        hang_up: connections end after each answer, without a word about it.
    """

    def __init__(self, model: Any, tokenizer: Any, *, max_model_len: int = 512) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.models: list[Answer] = [{"id": "served", "max_model_len": max_model_len}]
        self.asked: list[Answer] = []
        self.headers: list[dict[str, str]] = []
        self.faults: deque[Fault] = deque()
        self.twist: Callable[[Answer], Any] = lambda answer: answer
        self.embeds: Callable[[Tensor], Tensor] = lambda embeds: embeds
        self.script: list[int] | None = None
        self.key: str | None = None
        self.scaled = True
        self.hang_up = False
        self.connections: set[tuple[str, int]] = set()
        self.running = self.most_running = 0
        self.lock = threading.Lock()
        self.turn = threading.Lock()
        self.released = threading.Event()
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                server.answer(self, None)

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with server.lock:
                    server.running += 1
                    server.most_running = max(server.most_running, server.running)
                try:
                    server.answer(self, body)
                finally:
                    with server.lock:
                        server.running -= 1

            def log_message(self, *_: object) -> None:
                pass

        class Server(ThreadingHTTPServer):
            daemon_threads = True

            def handle_error(self, *_: object) -> None:
                """A client that goes away is no news."""

        self.http = Server(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.http.serve_forever, args=(0.02,), daemon=True).start()
        self.url = f"http://127.0.0.1:{self.http.server_address[1]}"

    def close(self) -> None:
        self.released.set()
        self.http.shutdown()
        self.http.server_close()

    # -- answers ---------------------------------------------------------------------------------------------

    def answer(self, request: BaseHTTPRequestHandler, body: Answer | None) -> None:
        with self.lock:
            self.connections.add(request.client_address)
            self.headers.append(dict(request.headers))
            if body is not None:
                self.asked.append(body)
            fault = self.faults.popleft() if body is not None and self.faults else Fault()
        if self.key is not None and request.headers.get("Authorization") != f"Bearer {self.key}":
            return send(request, 401, error(f"no such key: {request.headers.get('Authorization')}"))
        if request.path == "/v1/models":
            return send(request, 200, json.dumps({"object": "list", "data": self.models}).encode())
        if request.path != "/v1/completions" or body is None:
            return send(request, 404, error("Not Found"))
        if fault.sleep:
            self.released.wait(fault.sleep)
        if fault.status != 200 or fault.body != b"{}":
            return send(request, fault.status, fault.body, fault.headers)
        data = json.dumps(self.twist(self.complete(body))).encode()
        if fault.cut or fault.reset:
            return end(request, data, len(data) // 2, reset=fault.reset)
        send(request, 200, data)
        if self.hang_up:
            request.close_connection = True

    def complete(self, body: Answer) -> Answer:
        table = self.model.get_input_embeddings()
        prompts = [decoded(text) for text in body.get("prompt_embeds", [])]
        with self.turn, torch.no_grad():
            rows = [self.embeds(prompt) for prompt in prompts] or [table(torch.tensor(ids)) for ids in body["prompt"]]
            choices = [{"index": i, **self.row(row, body)} for i, row in enumerate(rows)]
        return {"model": body["model"], "choices": choices[::-1]}  # in whatever order

    def row(self, embeds: Tensor, body: Answer) -> Answer:
        """One row, without a cache: every step reads everything again."""
        assert (body["top_p"], body["top_k"], body["min_p"], body["repetition_penalty"]) == (1.0, -1, 0.0, 1.0)
        temperature, seed = body["temperature"], body.get("seed")
        generator = torch.Generator().manual_seed(seed % 2**63) if seed is not None else None
        ids: list[int] = []
        logprobs: list[float] = []
        tops: list[dict[str, float]] = []
        reason = "length"
        while len(ids) < body["max_tokens"]:
            tail = self.model.get_input_embeddings()(torch.tensor(ids, dtype=torch.long)).to(embeds.dtype)
            logits = self.model(inputs_embeds=torch.cat([embeds, tail])[None], use_cache=False).logits[0, -1].float()
            at = (logits / temperature if temperature else logits).log_softmax(-1)
            said = at if self.scaled else logits.log_softmax(-1)
            token = int(torch.multinomial(at.exp(), 1, generator=generator) if temperature else at.argmax())
            if self.script is not None:
                token = self.script[len(ids)]
            ids.append(token)
            logprobs.append(float(said[token]))
            best = said.topk(body["logprobs"]) if body["logprobs"] else None
            listed = [] if best is None else zip(best.indices.tolist(), best.values.tolist(), strict=True)
            tops.append({f"token_id:{i}": value for i, value in [(token, logprobs[-1]), *listed]})
            text = self.tokenizer.decode(ids, skip_special_tokens=True)
            if token in body.get("stop_token_ids", []) or any(stop in text for stop in body.get("stop", [])):
                reason = "stop"
                break
        return {
            "text": self.tokenizer.decode(ids, skip_special_tokens=True),
            "token_ids": ids,
            "logprobs": {"token_logprobs": logprobs, "top_logprobs": tops},
            "finish_reason": reason,
        }


def decoded(text: str) -> Tensor:
    """What a request carries, as vLLM reads it."""
    tensor = torch.load(io.BytesIO(base64.b64decode(text, validate=True)), weights_only=True)
    assert isinstance(tensor, Tensor)
    assert tensor.dim() == 2
    return tensor


def error(message: str) -> bytes:
    return json.dumps({"error": {"message": message, "type": "BadRequestError", "code": 400}}).encode()


def send(request: BaseHTTPRequestHandler, status: int, data: bytes, headers: dict[str, str] | None = None) -> None:
    request.send_response(status)
    for key, value in (headers or {}).items():
        request.send_header(key, value)
    request.send_header("Content-Type", "application/json")
    request.send_header("Content-Length", str(len(data)))
    request.end_headers()
    request.wfile.write(data)


def within(seconds: float, holds: Callable[[], bool]) -> bool:
    """Whether something comes to hold in time."""
    until = time.monotonic() + seconds
    while not (done := holds()) and time.monotonic() < until:
        time.sleep(0.01)
    return done
