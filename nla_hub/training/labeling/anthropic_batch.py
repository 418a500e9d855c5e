"""The labeler `anthropic`: the Message Batches API, in which requests are answered within 24 hours at a lower price.

A request's name in its batch (`custom_id`) is the key of its answer. What is about to be sent is written down first and the
batch's name right after, so that a process that is killed picks the same batches up when it is started again. One killed
between the two looks for its batch in the account's list: by time and size, and by the names in it once it has ended.
Results can be fetched as often as wanted; a batch is forgotten only when all of them are stored.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from typing import Any, ClassVar, TypeVar

from nla_hub.engines.remote.pace import Batch, Gate
from nla_hub.errors import MissingExtraError, TrainingError
from nla_hub.log import logger
from nla_hub.training.labeling.cache import Answer, LabelCache, StoredBatch
from nla_hub.training.labeling.calls import GO_ON, Caller, Nonsense, RefusedRequest, Unclear
from nla_hub.training.labeling.cost import Budget, Prices
from nla_hub.training.labeling.limits import Pace
from nla_hub.training.labeling.openai_api import count_of
from nla_hub.training.labeling.run import Missing, PromptedLabeler, Tally
from nla_hub.training.labeling.service import PLACEHOLDER, Key, ServiceSettings

T = TypeVar("T")

OWN_URL = "https://api.anthropic.com"
USUAL_KEY = "ANTHROPIC_API_KEY"

MOST_REQUESTS = 100_000
"""Of one batch, as the API documents it."""
MOST_BYTES = 200_000_000
"""Of one batch's prompts; the API takes 256 MB with everything around them."""
ROUNDS = 3
"""How often requests are sent that the API did not come to (expired, or an error on its side; neither is charged)."""
SKEW = 600.0
"""Seconds that this machine's clock may differ from the API's."""
SETTLING = 5.0
"""Seconds after which a batch that was accepted shows in the account's list; a guess."""
LISTED = 100
"""Batches of a page of the account's list."""


@dataclass(frozen=True, kw_only=True)
class AnthropicSettings(ServiceSettings):
    """Settings of the labeler `anthropic`; prices are those of its batches.

    Attributes:
        batch_size: requests of one batch at most.
        poll: seconds between questions whether a batch has ended.
        abandon: names of batches to be forgotten, because they cannot be read any more: what was in them is paid again.
    """

    batch_size: int = 10_000
    poll: float = 60.0
    abandon: tuple[str, ...] = ()

    def faults(self) -> Iterator[str]:
        """Sizes that the API does not take."""
        yield from super().faults()
        if not 1 <= self.batch_size <= MOST_REQUESTS:
            yield f"batch_size: got {self.batch_size}, expected 1 to {MOST_REQUESTS}"
        if not self.poll > 0:
            yield f"poll: got {self.poll}, expected a value above 0"


class AnthropicLabeler(PromptedLabeler[AnthropicSettings]):
    """Sends batches, waits for them and stores what they hold."""

    name: ClassVar[str] = "anthropic"
    kind: ClassVar[type[Any]] = AnthropicSettings

    def identity(self) -> dict[str, Any]:
        """The model and what is sent with each prompt."""
        return {"model": self.settings.model, "sampling": self.sampling()}

    def sampling(self) -> dict[str, Any]:
        """The fields of a request besides model and messages."""
        given = {"max_tokens": self.settings.max_output_tokens, "temperature": self.settings.temperature}
        return {**{name: value for name, value in given.items() if value is not None}, **self.settings.options}

    def prices(self) -> Prices:
        """As the user gave them."""
        return self.settings.prices

    def check(self) -> None:
        """An InputError where its key is missing, a MissingExtraError where its package is."""
        _client(self.settings, Key.find(self.settings, own=OWN_URL, usual=USUAL_KEY))[1].close()

    def answer(self, missing: Missing, cache: LabelCache, tally: Tally) -> None:
        """Bring all of them into batches, and the batches to their end."""
        _Run(self, missing, cache, tally).run()


class _Run:
    """The requests of one call of `label`."""

    def __init__(self, labeler: AnthropicLabeler, missing: Missing, cache: LabelCache, tally: Tally) -> None:
        settings = labeler.settings
        self._labeler = labeler
        self._settings = settings
        self._cache = cache
        self._tally = tally
        self._missing = missing
        key = Key.find(settings, own=OWN_URL, usual=USUAL_KEY)
        sdk, self._client = _client(settings, key)
        self._batches = self._client.messages.batches
        self._alive = Batch()  # never ended: nothing runs beside this thread
        self._refused: dict[str, str] = {}
        self._strangers: set[str] = set()
        self._key = key
        self._caller = Caller(
            sdk,
            f"labeler anthropic ({settings.base_url or OWN_URL})",
            key,
            Pace(settings.requests_per_minute, None),
            Gate(1),
            patience=settings.patience,
        )

    def run(self) -> None:
        """Raises a TrainingError where requests are left that the API did not answer."""
        try:
            for round_ in range(ROUNDS):
                with self._cache.alone(lambda: self._labeler.report({"labels": "another process is sending; waiting"})):
                    self._settle_unnamed()
                    self._send_missing(first=round_ == 0)
                self._wait()
                if not (left := self._open()):
                    return
        finally:
            self._client.close()
        raise TrainingError(
            "The API did not come to all requests.",
            where="labeler anthropic",
            got=f"{len(left)} without an answer after {ROUNDS} batches",
            next_step=GO_ON,
        )

    def _open(self) -> list[str]:
        """Keys that have no answer, and will get none by waiting."""
        known = self._cache.known(self._missing) | self._cache.waiting(self._missing)
        return [key for key in self._missing if key not in known and key not in self._refused]

    # -- sending ---------------------------------------------------------------------------------------------

    def _send_missing(self, *, first: bool) -> None:
        open_ = self._open()
        if first:
            for batch in self._cache.batches(self._missing):
                logger.info("labels: the batch %s, sent before, is picked up", batch.remote)
        if not open_:
            return
        budget = Budget(self._settings.prices, self._settings.max_cost, self._cache.spent(self._labeler.asker_id()))
        unpaid = [*open_, *self._cache.waiting(self._missing)]
        budget.require(self._labeler.estimate_of({key: self._missing[key] for key in unpaid}))
        self._labeler.announce({key: self._missing[key] for key in open_})
        for keys in self._parts(open_):
            self._send(keys)

    def _parts(self, keys: list[str]) -> Iterator[list[str]]:
        """Keys by batch: not too many, and not too large together."""
        part: list[str] = []
        size = 0
        for key in keys:
            length = len(self._settings.prompt(self._missing[key]).encode("utf-8", "surrogatepass"))
            if part and (len(part) == self._settings.batch_size or size + length > MOST_BYTES):
                yield part
                part, size = [], 0
            part.append(key)
            size += length
        yield part

    def _send(self, keys: list[str]) -> None:
        """Send one batch; where nobody knows whether it arrived, find out before it is sent again."""
        requests = [{"custom_id": key, "params": self._params(key)} for key in keys]
        stored = self._cache.begin_batch(self._labeler.asker_id(), keys)
        begun = time.monotonic()
        while True:
            try:
                made = self._ask(partial(self._create, requests), again=False)
            except Unclear as unclear:
                self._alive.sleep(min(self._settings.poll, SETTLING))
                if (found := self._find(stored)) is not None:
                    self._cache.name_batch(stored, found, sure=False)
                    return
                if time.monotonic() - begun > self._settings.patience:
                    raise unclear.error from None  # what was written down stays: the next run looks for it again
            except RefusedRequest as refusal:
                self._cache.end_batch(stored)
                raise TrainingError(
                    "The API refuses the batch.",
                    where="labeler anthropic",
                    got=str(refusal),
                    next_step="check labels.settings: model, options, max_output_tokens",
                ) from None
            except TrainingError:  # it was not accepted, for certain
                self._cache.end_batch(stored)
                raise
            else:
                self._cache.name_batch(stored, made)
                logger.info("labels: sent %d requests as the batch %s", len(keys), made)
                return

    def _params(self, key: str) -> dict[str, Any]:
        prompt = self._settings.prompt(self._missing[key])
        messages = [{"role": "user", "content": prompt}]
        return {"model": self._settings.model, "messages": messages, **self._labeler.sampling()}

    def _create(self, requests: list[dict[str, Any]]) -> str:
        return str(_plain(self._batches.create(requests=requests), "id")["id"])

    # -- batches whose name nobody was told ------------------------------------------------------------------

    def _settle_unnamed(self) -> None:
        """Find, or forget, what a killed process was sending; forget what the user has given up."""
        for batch in self._cache.batches():
            if batch.remote in self._settings.abandon:
                logger.warning(
                    "labels: the batch %s is given up: its %d requests are sent again", batch.remote, batch.size
                )
                self._cache.end_batch(batch)
            elif batch.remote is None:
                if (found := self._find(batch)) is None:
                    self._cache.end_batch(batch)
                else:
                    logger.info("labels: the batch %s was sent by a process that ended; it is picked up", found)
                    self._cache.name_batch(batch, found, sure=False)

    def _find(self, batch: StoredBatch) -> str | None:
        """The account's batch that this one must be: not older, as large, and not known."""
        known = {other.remote for other in self._cache.batches()} | self._strangers
        listed = self._ask(partial(self._listed, batch.at - SKEW))
        return next((name for name, size in listed if size == batch.size and name not in known), None)

    def _listed(self, since: float) -> list[tuple[str, int]]:
        """Names and sizes of the account's batches since a time, newest first."""
        found = []
        for batch in self._batches.list(limit=LISTED):
            plain = _plain(batch, "id", "request_counts", "created_at")
            try:
                made = datetime.fromisoformat(plain["created_at"]).timestamp()
                size = sum(plain["request_counts"].values())
            except (AttributeError, TypeError, ValueError):
                raise Nonsense(f"no batch: {str(plain)[:80]}") from None
            if made < since:
                break
            found.append((str(plain["id"]), size))
        return found

    # -- waiting ---------------------------------------------------------------------------------------------

    def _wait(self) -> None:
        """Until no batch holds one of the keys any more."""
        while batches := self._cache.batches(self._missing):
            ended = False
            for batch in batches:
                assert batch.remote is not None
                state = self._ask(partial(self._state, batch.remote))
                self._labeler.report({"batch": batch.remote, "status": state["processing_status"], "of": batch.size})
                if state["processing_status"] == "ended":
                    self._collect(batch, state)
                    ended = True
            if not ended:
                self._alive.sleep(self._settings.poll)

    def _state(self, remote: str) -> dict[str, Any]:
        try:
            return _plain(self._batches.retrieve(remote), "processing_status")
        except Exception as error:
            if getattr(error, "status_code", None) != 404:
                raise
        raise self._unreadable(remote)

    def _unreadable(self, remote: str) -> TrainingError:
        return TrainingError(
            "A batch that was sent cannot be read any more.",
            where="labeler anthropic",
            got=remote,
            next_step="use a key of the workspace that sent it, or give it up and pay for it again: "
            f"labels.settings.abandon=[{remote}]",
        )

    def _collect(self, batch: StoredBatch, state: dict[str, Any]) -> None:
        """Store what a batch holds, then forget it."""
        assert batch.remote is not None
        if not state.get("results_url"):
            raise self._unreadable(batch.remote)
        with self._cache.alone(lambda: None):
            keys = set(self._cache.keys_of(batch))
            if not keys:  # another process was faster
                return
            results = self._ask(partial(self._results, batch.remote, batch.size if batch.sure else 0))
            if not batch.sure and set(results) != keys:
                logger.info("labels: the batch %s is somebody else's", batch.remote)
                self._strangers.add(batch.remote)
                if (other := self._find(batch)) is not None:
                    self._cache.name_batch(batch, other, sure=False)
                else:
                    self._cache.end_batch(batch)
                return
            answers = {key: read_message(r["message"]) for key, r in results.items() if r["type"] == "succeeded"}
            self._cache.put(self._labeler.asker_id(), {key: a for key, a in answers.items() if key in keys})
            self._cache.end_batch(batch)
        self._count(results, answers)

    def _results(self, remote: str, size: int) -> dict[str, dict[str, Any]]:
        """The results of a batch by the keys of its requests; `Nonsense` for fewer than there must be."""
        # Closed by us, whatever is wrong with them: the HTTP client waits for itself where the garbage collector has to do it.
        with closing(self._batches.results(remote)) as lines:
            read = list(lines)
        found = {}
        for line in read:
            plain = _plain(line, "custom_id", "result")
            if not isinstance(plain["result"], dict) or not isinstance(plain["result"].get("type"), str):
                raise Nonsense(f"no result: {str(plain)[:80]}")
            if plain["result"]["type"] == "succeeded":
                read_message(plain["result"].get("message"))
            found[str(plain["custom_id"])] = plain["result"]
        if len(found) < size:
            raise Nonsense(f"{len(found)} results of {size}")
        return found

    def _count(self, results: dict[str, dict[str, Any]], answers: dict[str, Answer]) -> None:
        """Count what a batch came to; a TrainingError where somebody has to look at it."""
        wrong = {key: said for key, result in results.items() if (said := _fault_of(result)) is not None}
        if wrong and len(wrong) == len(results):
            raise TrainingError(
                "The API refused every request of a batch.",
                where="labeler anthropic",
                got=self._key.clean(next(iter(wrong.values()))),
                next_step="check labels.settings: model, options, max_output_tokens",
            )
        self._refused.update(wrong)
        for _ in wrong:
            self._tally.count("refused by the service")
        for answer in answers.values():
            self._tally.take(answer)
        if any(result["type"] == "canceled" for result in results.values()):
            raise TrainingError(
                "The batch was cancelled; what had been answered by then is stored.",
                where="labeler anthropic",
                next_step="run the same command again to send the rest",
            )

    def _ask(self, call: Callable[[], T], *, again: bool = True) -> T:
        return self._caller.ask(self._alive, call, again=again)


def _client(settings: AnthropicSettings, key: Key) -> tuple[Any, Any]:
    """The SDK and a client of it that repeats nothing by itself."""
    try:
        import anthropic
    except ImportError as cause:
        raise MissingExtraError("anthropic", "labelers", needed_for="The labeler 'anthropic'") from cause
    return anthropic, anthropic.Anthropic(
        api_key=key.secret or PLACEHOLDER,
        base_url=settings.base_url or OWN_URL,
        max_retries=0,
        timeout=settings.timeout,
    )


def read_message(data: Any) -> Answer:
    """The answer in a message; `Nonsense` where it is none."""
    blocks = data.get("content") if isinstance(data, dict) else None
    if not isinstance(blocks, list) or not all(isinstance(block, dict) for block in blocks):
        raise Nonsense(f"no message: {str(data)[:80]}")
    text = "".join(str(block.get("text") or "") for block in blocks if block.get("type") == "text")
    usage = found if isinstance(found := data.get("usage"), dict) else {}
    counts = [count_of(usage.get(name)) for name in ("input_tokens", "output_tokens")]
    finish = data.get("stop_reason")
    return Answer(text, finish if isinstance(finish, str) else None, *counts)


def _fault_of(result: dict[str, Any]) -> str | None:
    """What is wrong with a request that no repetition helps; None for everything else."""
    if result["type"] != "errored":
        return None
    error = result.get("error") or {}
    inner = error.get("error", error) if isinstance(error, dict) else {}
    kind = inner.get("type") if isinstance(inner, dict) else None
    return str(inner.get("message") or kind) if kind == "invalid_request_error" else None


def _plain(value: Any, *names: str) -> dict[str, Any]:
    """What the SDK read, as JSON; `Nonsense` where it lacks one of the fields."""
    data = value.to_dict(mode="json", warnings=False) if hasattr(value, "to_dict") else value
    if not isinstance(data, dict) or any(data.get(name) is None for name in names):
        raise Nonsense(f"expected {' and '.join(names)}: {str(data)[:80]}")
    return data
