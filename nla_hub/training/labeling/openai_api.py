"""The labeler `openai`: any chat endpoint of OpenAI's shape, also a vLLM server of one's own.

Each answer is stored before the next request of its thread begins, so a process that is killed loses the answers in flight
(at most `concurrency`), which the API charges for all the same: chat completions have no name under which they could be had
again. The same is true of a connection that breaks in the middle of an answer; such requests are counted and reported.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any, ClassVar, Literal

from nla_hub.engines.remote.pace import Batch, Gate, Stopped
from nla_hub.errors import MissingExtraError, RunError
from nla_hub.training.labelers import LabelRequest
from nla_hub.training.labeling.cache import Answer, LabelCache
from nla_hub.training.labeling.calls import Caller, Nonsense, RefusedRequest
from nla_hub.training.labeling.cost import EXPECTED_OUTPUT_TOKENS, Budget, Prices, tokens_in
from nla_hub.training.labeling.limits import Pace
from nla_hub.training.labeling.run import Missing, PromptedLabeler, Tally
from nla_hub.training.labeling.service import PLACEHOLDER, Key, ServiceSettings, host_of

OWN_URL = "https://api.openai.com/v1"
USUAL_KEY = "OPENAI_API_KEY"

BLOCK = 5000
"""Requests that stand in line at once: hundreds of thousands would take more memory than their answers."""
REPORTS = 50
"""Lines of progress of a call, at most."""


@dataclass(frozen=True, kw_only=True)
class OpenAISettings(ServiceSettings):
    """Settings of the labeler `openai`.

    Attributes:
        concurrency: requests in flight at most; fewer while the API is busy.
        seed: sent where it is given; most APIs promise nothing about it.
        limit_field: what bounds an answer: OpenAI's own newer models take only "max_completion_tokens", many other servers only
            "max_tokens". None: the first for OpenAI, the second elsewhere.
    """

    concurrency: int = 8
    seed: int | None = None
    limit_field: Literal["max_tokens", "max_completion_tokens"] | None = None

    def faults(self) -> Iterator[str]:
        """A count that is none."""
        yield from super().faults()
        if self.concurrency < 1:
            yield f"concurrency: got {self.concurrency}, expected 1 or more"

    @property
    def address(self) -> str:
        """Where requests go."""
        return self.base_url or OWN_URL

    def sampling(self) -> dict[str, Any]:
        """The fields of a request's body besides model and messages."""
        own = host_of(self.address) == host_of(OWN_URL)
        limit = self.limit_field or ("max_completion_tokens" if own else "max_tokens")
        given = {"temperature": self.temperature, "seed": self.seed, limit: self.max_output_tokens}
        return {**{name: value for name, value in given.items() if value is not None}, **self.options}


class OpenAILabeler(PromptedLabeler[OpenAISettings]):
    """Asks a chat endpoint, many requests at a time."""

    name: ClassVar[str] = "openai"
    kind: ClassVar[type[Any]] = OpenAISettings

    def check(self) -> None:
        """An InputError where its key is missing, a MissingExtraError where its package is."""
        _client(self.settings, Key.find(self.settings, own=OWN_URL, usual=USUAL_KEY))[1].close()

    def identity(self) -> dict[str, Any]:
        """The model and what is sent with each prompt; not the address, so that a server may move."""
        sampling = self.settings.sampling()
        sampling["max_output_tokens"] = sampling.pop("max_completion_tokens", None) or sampling.pop("max_tokens", None)
        return {"model": self.settings.model, "sampling": sampling}

    def prices(self) -> Prices:
        """As the user gave them."""
        return self.settings.prices

    def answer(self, missing: Missing, cache: LabelCache, tally: Tally) -> None:
        """Ask for all of them; each answer is stored as it comes."""
        with cache.alone(lambda: self.report({"labels": "another process is asking; waiting for it"})):
            known = cache.known(missing)
            left = {key: request for key, request in missing.items() if key not in known}
            if left:
                _Run(self, left, cache, tally).run()


class _Run:
    """The requests of one call of `label`."""

    def __init__(self, labeler: OpenAILabeler, missing: Missing, cache: LabelCache, tally: Tally) -> None:
        settings = labeler.settings
        self._labeler = labeler
        self._settings = settings
        self._cache = cache
        self._tally = tally
        self._missing = missing
        self._failure: BaseException | None = None
        sdk, self._client = _client(settings, key := Key.find(settings, own=OWN_URL, usual=USUAL_KEY))
        self._budget = Budget(settings.prices, settings.max_cost, cache.spent(labeler.asker_id()))
        self._budget.require(labeler.announce(missing))
        self._pace = Pace(settings.requests_per_minute, settings.tokens_per_minute)
        self._caller = Caller(
            sdk,
            f"labeler openai ({settings.address})",
            key,
            self._pace,
            Gate(settings.concurrency),
            patience=settings.patience,
            unconfirmed=tally.count_unconfirmed,
        )

    def run(self) -> None:
        ended, wanted = 0, len(self._missing)
        every = max(1, wanted // REPORTS)

        def progress(_: int, __: None) -> None:
            nonlocal ended
            ended += 1
            if ended % every == 0 or ended == wanted:
                self._labeler.report({"labels": ended, "of": wanted})

        waiting = iter(self._missing.items())
        try:
            while block := list(islice(waiting, BLOCK)):
                calls = [partial(self._unless_ended, key, request) for key, request in block]
                Batch().run(calls, threads=self._settings.concurrency, done=progress)
        except (Stopped, RunError):
            assert self._failure is not None
            if isinstance(self._failure, RunError):
                raise self._tally.told_of_unsaved(self._failure) from self._failure.__cause__
            raise self._failure from None
        finally:
            self._client.close()

    def _unless_ended(self, key: str, request: LabelRequest, batch: Batch) -> None:
        """One request. The first that fails ends the batch here, before its thread takes the next one."""
        try:
            self._one(key, request, batch)
        except Stopped:
            raise
        except BaseException as error:
            self._failure = self._failure or error
            batch.end()
            raise

    def _one(self, key: str, request: LabelRequest, batch: Batch) -> None:
        prompt = self._settings.prompt(request)
        expected = tokens_in(prompt) + min(EXPECTED_OUTPUT_TOKENS, self._settings.max_output_tokens)
        batch.check()
        reserved = self._budget.reserve(tokens_in(prompt), self._settings.max_output_tokens)
        try:
            answer = self._caller.ask(batch, partial(self._request, prompt), tokens=expected)
        except RefusedRequest:
            self._budget.settle(reserved, 0, 0)
            self._tally.count("refused by the service")
            return
        except BaseException:
            self._budget.settle(reserved, 0, 0)
            raise
        self._budget.settle(reserved, answer.input_tokens, answer.output_tokens)
        counted = None if answer.input_tokens is None else answer.input_tokens + (answer.output_tokens or 0)
        self._pace.settle(expected, counted)
        try:
            self._cache.put(self._labeler.asker_id(), {key: answer})
        except RunError:
            self._tally.count_unsaved()
            raise
        self._tally.take(answer)

    def _request(self, prompt: str) -> Answer:
        sent = {"model": self._settings.model, "messages": [{"role": "user", "content": prompt}]}
        reply = self._client.chat.completions.with_raw_response.create(**sent, extra_body=self._settings.sampling())
        try:
            return read_chat(json.loads(reply.http_response.content))
        except ValueError:
            raise Nonsense(f"no JSON: {reply.http_response.content[:80]!r}") from None


def _client(settings: OpenAISettings, key: Key) -> tuple[Any, Any]:
    """The SDK and a client of it that repeats nothing by itself."""
    try:
        import openai
    except ImportError as cause:
        raise MissingExtraError("openai", "labelers", needed_for="The labeler 'openai'") from cause
    return openai, openai.OpenAI(
        api_key=key.secret or PLACEHOLDER, base_url=settings.address, max_retries=0, timeout=settings.timeout
    )


def read_chat(data: Any) -> Answer:
    """The answer in a chat completion; `Nonsense` where it is none. An answer without choices or text is an empty one."""
    if not isinstance(data, dict) or not isinstance(choices := data.get("choices"), list):
        raise Nonsense(f"no chat completion: {str(data)[:80]}")
    usage = found if isinstance(found := data.get("usage"), dict) else {}
    counts = [count_of(usage.get(name)) for name in ("prompt_tokens", "completion_tokens")]
    if not choices:
        return Answer("", "no choices", *counts)
    choice = choices[0]
    message = choice.get("message") if isinstance(choice, dict) else None
    if not isinstance(message, dict) or not isinstance(text := message.get("content"), (str, type(None))):
        raise Nonsense(f"no message in the answer: {str(choice)[:80]}")
    finish = "refusal" if isinstance(message.get("refusal"), str) else choice.get("finish_reason")
    return Answer(text or "", finish if isinstance(finish, str) else None, *counts)


def count_of(value: Any) -> int | None:
    """A count of tokens; None for anything else."""
    return value if type(value) is int and value >= 0 else None
