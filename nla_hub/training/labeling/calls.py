"""One call to an API until it is answered: what is made again, what stops everything, and what concerns one request alone.

The SDKs' own retries are switched off: they would repeat a call out of sight, and so pay for it twice without a word. The SDKs
of OpenAI and Anthropic name their errors alike, which is all that is asked of them here.
"""

from __future__ import annotations

import json
import random
import threading
import time
from collections.abc import Callable
from typing import Any, TypeVar

from nla_hub.engines.remote.pace import Batch, Gate
from nla_hub.engines.remote.transport import FIRST_DELAY, LONGEST_DELAY, seconds_asked
from nla_hub.errors import TrainingError
from nla_hub.log import logger
from nla_hub.training.labeling.limits import Pace
from nla_hub.training.labeling.service import Key

T = TypeVar("T")

BUSY = (429, 503, 529)
"""Statuses of an API that has too much to do; 529 is Anthropic's."""
REPEATED = (408, 409, 429)
"""Statuses below 500 after which the same request may be answered, as the SDKs have them."""
OUT_OF_MONEY = "insufficient_quota"
"""OpenAI's code for an account without credit: a 429 that no waiting helps."""
NONSENSE_TRIES = 3
"""How often a request is made whose answers are none."""
REFUSED_IN_A_ROW = 10
"""Requests that are refused one after the other before the fault is looked for in the settings."""

GO_ON = "run the same command again later: it goes on where it stopped, and what is stored is not paid again"


class Nonsense(Exception):
    """An answer that is not what the API promises."""


class RefusedRequest(Exception):
    """This one request is not accepted, and would not be when it is made again."""


class Caller:
    """Calls one API from many threads.

    Args:
        sdk: the module with the errors `APIStatusError`, `APIConnectionError` and `APITimeoutError`.
        service: what it is called in messages.
        patience: seconds for which a request is made again.
        unconfirmed: called for each request that ended without an answer after it was sent.
    """

    def __init__(
        self,
        sdk: Any,
        service: str,
        key: Key,
        pace: Pace,
        gate: Gate,
        *,
        patience: float,
        unconfirmed: Callable[[], None] = lambda: None,
    ) -> None:
        self._sdk = sdk
        self._service = service
        self._key = key
        self._pace = pace
        self._gate = gate
        self._patience = patience
        self._unconfirmed = unconfirmed
        self._lock = threading.Lock()
        self._refused = 0
        self.reached = False

    def ask(self, batch: Batch, call: Callable[[], T], *, tokens: float = 0.0, again: bool = True) -> T:
        """What `call` returns.

        Args:
            tokens: what it will take of the tokens a minute.
            again: False: not made again where it may have been accepted although nobody was told; an `Unclear` then.

        Raises:
            TrainingError: the key is wrong, the account is empty, the model does not exist; no answer for too long; answers
                that are none; too many refused requests. RefusedRequest: this one is refused. Stopped: the batch has ended.
        """
        begun = time.monotonic()
        nonsense = attempt = 0
        while True:
            with self._gate.passed(batch):
                self._pace.wait(batch, tokens)
                found, fault = self._once(call)
            if fault is None:
                self._answered()
                return found[0]
            if isinstance(fault, RefusedRequest):
                self._count_refusal(fault)
                raise fault
            if fault.kind == "nonsense":
                nonsense += 1
            if fault.final or nonsense == NONSENSE_TRIES:
                raise fault.error
            if fault.kind == "unclear" and not again:
                raise Unclear(fault.error)
            delay = max(min(FIRST_DELAY * 2**attempt, LONGEST_DELAY) * random.uniform(0.5, 1.0), fault.wait)
            if time.monotonic() - begun + delay > self._patience:
                raise fault.error
            if fault.wait:
                self._pace.pause(fault.wait)
            logger.info("%s Trying again in %.1f s.", fault.error.one_line(), delay)
            batch.sleep(delay)
            attempt += 1

    def _once(self, call: Callable[[], T]) -> tuple[list[T], _Fault | RefusedRequest | None]:
        """The answer, or what went wrong: raised elsewhere, so that no error of the SDK, which may quote keys, hangs on it."""
        try:
            return [call()], None
        except Nonsense as error:
            self.reached = True
            return [], _Fault(self._error("What answers is not what the API promises.", error), "nonsense")
        except self._sdk.APIStatusError as error:
            self.reached = True
            return [], self._status(error)
        except self._sdk.APIConnectionError as error:
            return [], self._connection(error)
        except Exception as error:  # what the HTTP client raises in the middle of a stream, and what is no JSON
            module = type(error).__module__.partition(".")[0]
            if isinstance(error, (json.JSONDecodeError, UnicodeDecodeError)):
                return [], _Fault(self._error("What answers is not JSON.", type(error).__name__), "nonsense")
            if module not in ("httpx", "httpx2", "httpcore", "httpcore2") and not isinstance(error, OSError):
                raise
            return [], self._connection(error)

    def _connection(self, error: Exception) -> _Fault:
        cause = error.__cause__ or error
        name = type(cause).__name__
        unsent = name in ("ConnectError", "ConnectTimeout")
        if not unsent:
            self._unconfirmed()
        timeout = isinstance(error, self._sdk.APITimeoutError)
        what = "The API does not answer in time." if timeout else "The API does not answer."
        told = self._error(what, f"{name}: {cause}" if str(cause) else name)
        return _Fault(told, "down" if unsent else "unclear", final=name == "ConnectError" and not self.reached)

    def _status(self, error: Any) -> _Fault | RefusedRequest:
        status = int(error.status_code)
        said = _message(error)
        got = f"HTTP {status}: {said}" if said else f"HTTP {status}"
        if status in (401, 403):
            what = "The API wants another key." if self._key.secret else "The API wants a key."
            advice = f"put a key that is valid there into the environment variable {self._key.variable}"
            if not self._key.secret:
                advice += ", and name it in labels.settings.api_key_env"
            return _Fault(self._error(what, got, advice), "wrong", final=True)
        if status == 402 or (status == 429 and OUT_OF_MONEY in said + _code(error)):
            advice = f"add credit to the account; then {GO_ON}"
            return _Fault(self._error("The account has no credit left.", got, advice), "wrong", final=True)
        if status == 404:
            advice = "check labels.settings.model and base_url"
            return _Fault(self._error("The API has no such model or address.", got, advice), "wrong", final=True)
        if status in REPEATED or status >= 500:
            if status in BUSY:
                self._gate.lower()
            wait = seconds_asked(error.response.headers.get("retry-after") or "")
            return _Fault(self._error("The API is busy or broken.", got), "unclear" if status >= 500 else "busy", wait)
        return RefusedRequest(self._key.clean(got))

    def _answered(self) -> None:
        self.reached = True
        self._gate.raise_slowly()
        with self._lock:
            self._refused = 0

    def _count_refusal(self, refusal: RefusedRequest) -> None:
        """Raise a TrainingError where it is not this one request that is wrong."""
        with self._lock:
            self._refused += 1
            wrong = self._refused >= REFUSED_IN_A_ROW
        if wrong:
            advice = "check labels.settings: model, options, max_output_tokens, snippet_chars"
            raise self._error(f"The API refused {REFUSED_IN_A_ROW} requests in a row.", refusal, advice)

    def _error(self, what: str, got: object, next_step: str = GO_ON) -> TrainingError:
        return TrainingError(what, where=self._service, got=self._key.clean(got), next_step=next_step)


class Unclear(Exception):
    """Nobody knows whether the API accepted a request; `error` says what happened."""

    def __init__(self, error: TrainingError) -> None:
        self.error = error
        super().__init__(error.what)


class _Fault:
    """What went wrong with one attempt.

    Attributes:
        kind: "wrong" (the request will never do), "busy" or "down" (it was not accepted), "unclear" (it may have been),
            "nonsense".
        wait: seconds that the API asks to wait.
        final: whether it is pointless to try again.
    """

    def __init__(self, error: TrainingError, kind: str, wait: float = 0.0, *, final: bool = False) -> None:
        self.error = error
        self.kind = kind
        self.wait = wait
        self.final = final


def _message(error: Any) -> str:
    """What an API says about an error."""
    body = error.body
    inner = body.get("error", body) if isinstance(body, dict) else body
    if isinstance(inner, dict):
        inner = inner.get("message") or inner
    return "" if inner is None else str(inner)


def _code(error: Any) -> str:
    body = error.body
    inner = body.get("error", body) if isinstance(body, dict) else body
    return f"{inner.get('code')} {inner.get('type')}" if isinstance(inner, dict) else ""
