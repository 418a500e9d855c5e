"""JSON over HTTP to one server, from many threads: connections that are kept, requests that are made again.

The standard library's client: what comes with huggingface_hub is httpx in one of its major versions and httpx2 in the next.
Proxies that the environment names are not used.
"""

from __future__ import annotations

import json
import random
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from http.client import HTTPConnection, HTTPException, HTTPResponse, HTTPSConnection, IncompleteRead
from typing import Any, TypeVar
from urllib.parse import urlsplit

from nla_hub.engines.remote.pace import Batch, Gate
from nla_hub.errors import InputError, NLAError
from nla_hub.log import logger

T = TypeVar("T")

BUSY = (429, 503)
"""Statuses of a server that has too much to do."""
RETRIED = (*BUSY, 502, 504)
"""Statuses after which the same request may be answered; 502 and 504 are a proxy's."""
CONNECT_TIMEOUT = 10.0
"""Seconds until a connection that is not accepted has failed."""
KEPT = 4.0
"""Seconds that an idle connection is used again; vLLM closes it after 5 (VLLM_HTTP_TIMEOUT_KEEP_ALIVE)."""
FIRST_DELAY, LONGEST_DELAY = 0.5, 30.0
"""Seconds before the first retry, doubled for each further one up to the second."""
PATIENCE = 120.0
"""Seconds that a Retry-After may ask for; a server that asks for more is not waited for."""


class ServerError(NLAError):
    """A server that refuses, does not answer, or answers what cannot be used.

    `status` is the HTTP status it answered with, None where it did not.
    """

    def __init__(self, what: str, *, status: int | None = None, **details: Any) -> None:
        self.status = status
        super().__init__(what, **details)

    def at(self, where: object) -> ServerError:
        """The same error, told of a place."""
        return ServerError(
            self.what, status=self.status, where=where, got=self.got, expected=self.expected, next_step=self.next_step
        )


@dataclass(frozen=True)
class Address:
    """Where a server listens; `path` is what stands before its routes."""

    secure: bool
    host: str
    port: int
    path: str

    @classmethod
    def parse(cls, url: str) -> Address:
        """`http://host:port`, with or without the `/v1` that OpenAI clients want; raises an InputError."""
        advice = {"where": "url", "expected": "http://host:port or https://host"}
        if not isinstance(url, str):
            raise InputError("The server's address is a text.", got=type(url).__name__, **advice)
        parts = urlsplit(url)
        if parts.username is not None or parts.password is not None:
            raise InputError("The address holds a password.", next_step="leave it out and pass api_key", **advice)
        try:
            port = parts.port
        except ValueError:
            port = -1
        if parts.scheme not in ("http", "https") or not parts.hostname or port == -1 or parts.query or parts.fragment:
            raise InputError("This is no server's address.", got=repr(url), **advice)
        secure = parts.scheme == "https"
        path = parts.path.rstrip("/").removesuffix("/v1")
        return cls(secure, parts.hostname, port or (443 if secure else 80), path)

    def connection(self) -> HTTPConnection:
        """A connection that is not open yet."""
        kind = HTTPSConnection if self.secure else HTTPConnection
        return kind(self.host, self.port, timeout=CONNECT_TIMEOUT)

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{'https' if self.secure else 'http'}://{host}:{self.port}{self.path}"


@dataclass(frozen=True)
class Reply:
    """One answer as it came."""

    status: int
    retry_after: str
    data: bytes


class Client:
    """One server.

    Args:
        api_key: sent as a bearer token; it never reaches a message.
        timeout: seconds that the server may be silent.
        retries: how often a request is made again.
        concurrency: requests in flight at most.
    """

    def __init__(
        self, address: Address, *, api_key: str | None, timeout: float, retries: int, concurrency: int
    ) -> None:
        self.address = address
        self.timeout = timeout
        self.retries = retries
        self.gate = Gate(concurrency)
        self._headers = {"Accept": "application/json"}
        if api_key is not None:
            self._headers["Authorization"] = f"Bearer {api_key}"
        self._api_key = api_key
        self._idle: list[tuple[HTTPConnection, float]] = []
        self._lock = threading.Lock()
        self._reached = False

    def close(self) -> None:
        """Close the connections that are kept."""
        with self._lock:
            idle, self._idle = self._idle, []
        for connection, _ in idle:
            connection.close()

    def ask(self, batch: Batch, route: str, body: Callable[[], bytes] | None, read: Callable[[Any], T]) -> T:
        """What `read` makes of the server's answer to a GET, or with a body to a POST.

        Args:
            body: makes the body when the request's turn has come, so that only those in flight take memory.
            read: gets the answer's JSON; its ServerError is told where the answer came from.

        Raises:
            ServerError: a refusal; no answer, or a busy server, after all retries; an answer that is not JSON.
            Stopped: the batch has ended.
        """
        for attempt in range(self.retries + 1):
            delay = min(FIRST_DELAY * 2**attempt, LONGEST_DELAY) * random.uniform(0.5, 1.0)
            with self.gate.passed(batch):
                data = None if body is None else body()
                try:
                    reply = self._exchange(batch, route, data)
                except (OSError, HTTPException) as cause:
                    batch.check()  # interrupted by ourselves
                    last = self._unanswered(cause)
                    if not self._reached and isinstance(cause, (ConnectionRefusedError, socket.gaierror)):
                        raise last from cause
                else:
                    self._reached = True
                    if reply.status == 200:
                        self.gate.raise_slowly()
                        return self._read(reply, read)
                    last = self._refused(reply)
                    if reply.status not in RETRIED:
                        raise last
                    if reply.status in BUSY:
                        self.gate.lower()
                    delay = max(delay, seconds_asked(reply.retry_after))
            if attempt == self.retries or delay > PATIENCE:
                break
            logger.info("%s Trying again in %.1f s.", last.one_line(), delay)
            batch.sleep(delay)
        raise last

    # -- one exchange ----------------------------------------------------------------------------------------

    def _exchange(self, batch: Batch, route: str, body: bytes | None) -> Reply:
        connection = self._kept()
        if connection is not None:
            try:
                return self._send(batch, connection, route, body)
            except ConnectionError:  # the server had closed it, which is no failure
                batch.check()
        return self._send(batch, self.address.connection(), route, body)

    def _send(self, batch: Batch, connection: HTTPConnection, route: str, body: bytes | None) -> Reply:
        with batch.using(connection):
            try:
                if connection.sock is None:
                    _connect(connection, self.timeout)
                batch.check()
                headers = self._headers | ({} if body is None else {"Content-Type": "application/json"})
                connection.request("GET" if body is None else "POST", self.address.path + route, body, headers)
                answer = connection.getresponse()
                reply = Reply(answer.status, answer.getheader("Retry-After") or "", _whole(answer))
            except ValueError as cause:  # what a TLS connection raises that `Batch.end` interrupted
                connection.close()
                batch.check()
                raise ConnectionError(str(cause)) from cause
            except BaseException:
                connection.close()
                raise
        if answer.will_close:
            connection.close()
        else:
            with self._lock:
                self._idle.append((connection, time.monotonic()))
        return reply

    def _kept(self) -> HTTPConnection | None:
        """An open connection that is idle, the one used last; older ones are closed."""
        fresh = time.monotonic() - KEPT
        with self._lock:
            stale = [connection for connection, since in self._idle if since < fresh]
            self._idle = [(connection, since) for connection, since in self._idle if since >= fresh]
            found = self._idle.pop()[0] if self._idle else None
        for connection in stale:
            connection.close()
        return found

    # -- what went wrong -------------------------------------------------------------------------------------

    def _read(self, reply: Reply, read: Callable[[Any], T]) -> T:
        try:
            return read(json.loads(reply.data))
        except ServerError as error:
            raise error.at(self.address) from None
        except ValueError as cause:
            raise ServerError(
                "What answers is not JSON.",
                status=reply.status,
                where=self.address,
                got=repr(self._clean(reply.data[:80].decode("utf-8", "replace"))),
                next_step="check the address: it is that of a vLLM server (nla-hub serve-command NLA starts one)",
            ) from cause

    def _unanswered(self, cause: Exception) -> ServerError:
        reason = f"no answer within {self.timeout:g} s" if isinstance(cause, TimeoutError) else str(cause)
        if isinstance(cause, IncompleteRead):
            reason = "the connection ended in the middle of an answer"
        return ServerError(
            "The server does not answer.",
            where=self.address,
            got=self._clean(reason) or type(cause).__name__,
            next_step="check that it runs and that the address is right; `nla-hub serve-command NLA` prints how to start one",
        )

    def _refused(self, reply: Reply) -> ServerError:
        said = self._clean(_message(reply.data))
        if reply.status in (401, 403):
            what = "The server wants another API key." if self._api_key else "The server wants an API key."
            advice = (
                'pass engine_options={"api_key": "..."} (--engine-option api_key=...): what the server was started with'
            )
        elif reply.status in BUSY:
            what = "The server has too much to do."
            later = f"in {seconds:.0f} s, as it says" if (seconds := seconds_asked(reply.retry_after)) else "later"
            advice = f"try again {later}, or with a smaller concurrency"
        elif reply.status in RETRIED:
            what, advice = "The server behind this address does not answer.", "look at the server's log, and try again"
        elif reply.status == 404:
            what = "The server does not have this."
            advice = "check url and model: nla-hub speaks to vLLM's /v1/models and /v1/completions"
        elif "enable-prompt-embeds" in said:
            what = "The server does not take vectors."
            advice = "start it with --enable-prompt-embeds: nla-hub serve-command NLA prints the whole command"
        elif "not JSON compliant" in said:
            what = "The server computes NaN."
            advice = "restart it: one request with NaN, of any client, can stay in its cache"
        else:
            what = "The server refuses the request."
            advice = "start it as nla-hub serve-command NLA says, and look at its log"
        got = f"HTTP {reply.status}{': ' if said else ''}{said}"
        return ServerError(what, status=reply.status, where=self.address, got=got, next_step=advice)

    def _clean(self, text: str) -> str:
        """A server's own words on one line, short, and without the key should it repeat it."""
        words = " ".join(text.split())
        return (words.replace(self._api_key, "***") if self._api_key else words)[:300]


def _connect(connection: HTTPConnection, timeout: float) -> None:
    """Open a connection, whose other side may be silent for `timeout` seconds from then on."""
    connection.connect()
    connection.sock.settimeout(timeout)


def _whole(answer: HTTPResponse) -> bytes:
    """The rest of an answer that has begun; an IncompleteRead where it ends too early, however the connection does."""
    try:
        return answer.read()
    except ConnectionError as cause:
        raise IncompleteRead(b"") from cause


def _message(data: bytes) -> str:
    """What an error says: OpenAI's and vLLM's JSON, else its first words."""
    try:
        found = json.loads(data)
    except ValueError:
        return data[:300].decode("utf-8", "replace")
    error = found.get("error", found) if isinstance(found, dict) else found
    if isinstance(error, dict):
        error = error.get("message") or error.get("detail") or error
    return str(error)


def seconds_asked(retry_after: str) -> float:
    """What a Retry-After asks for: seconds, or a date; 0 where it asks for nothing that can be read."""
    text = retry_after.strip()
    if text.isdigit():
        return float(text)
    try:
        date = parsedate_to_datetime(text)
    except ValueError:
        return 0.0
    return max(0.0, (date - datetime.now(date.tzinfo and UTC)).total_seconds())
