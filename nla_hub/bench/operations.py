"""The three operations, each by every route: the same inputs, interleaved runs, and what each route computed compared."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from nla_hub import registry
from nla_hub.architecture import Architecture
from nla_hub.bench import plain
from nla_hub.bench.agreement import compare_rows, compare_vectors
from nla_hub.bench.machine import Limits
from nla_hub.bench.roofline import Decoding, read_weights
from nla_hub.bench.route import BATCHED, ONE_BY_ONE, Operation, Route
from nla_hub.bench.subject import Subject, engine_on
from nla_hub.bench.texts import random_texts
from nla_hub.bench.timing import Timed, interleaved
from nla_hub.capture import capture
from nla_hub.engines.base import LoadedAV, require_room
from nla_hub.engines.choice import EngineChoice
from nla_hub.errors import NLAError
from nla_hub.sidecar import Sidecar
from nla_hub.source_text import context_length

Generate = Callable[[Tensor, int], list[list[int]]]
"""(raw vectors float32 [N, d], new tokens) -> exactly that many ids for each."""

OURS = "nla-hub"
"""Name of the route of an operation that has no engines."""

ALWAYS = "transformers"
"""The engine that runs wherever nla-hub does: where it fails, the bench does."""

ROWS = {"reconstruct": 512, "capture": 128}
"""Rows where none are asked for; verbalize takes one batch."""

CAPTURED_TOKENS = 128
"""Tokens of the longest captured text."""


@dataclass(frozen=True)
class Settings:
    """What is asked of a run.

    Attributes:
        batch_size: rows that run together. rows: of each operation; None for its own default.
        max_new_tokens: tokens of every explanation; also of the longest text that the AR reads.
        pairs: timed runs of each route.
        one_by_one: whether the slow plain route runs.
        engine: the only one to time; None for every one that is registered.
    """

    batch_size: int = 48
    max_new_tokens: int = 150
    rows: int | None = None
    pairs: int = 5
    seed: int = 0
    one_by_one: bool = True
    engine: EngineChoice | None = None
    progress: Callable[[str], None] | None = None

    def rows_of(self, operation: Operation) -> int:
        """Rows of a run."""
        return self.rows or ROWS.get(operation, self.batch_size)

    def timed(
        self, what: str, routes: Mapping[str, Callable[[], Any]], device: torch.device, *, watch: bool = True
    ) -> dict[str, Timed[Any]]:
        """The routes, interleaved; with `watch` their peaks of memory too. `what` they do is told with the progress."""

        def tell(text: str) -> None:
            if self.progress is not None:
                self.progress(f"{what}, {text}")

        return interleaved(routes, self.pairs, device, watch=watch, progress=tell)


Measure = Callable[[Subject, Settings, Limits], Iterator[Route]]


# -- verbalize -----------------------------------------------------------------------------------------------


def verbalize(subject: Subject, settings: Settings, limits: Limits) -> Iterator[Route]:
    """Vectors to texts: `generate` one by one and batched, and every engine.

    Raises:
        ContextLengthError: prompt and answer do not fit into the AV.
    """
    av, sidecar = subject.av()
    new, n = settings.max_new_tokens, settings.rows_of("verbalize")
    limit = context_length(av.config)
    require_room(av, new, limit, next_step=f"--max-new-tokens {(limit or 0) - len(av.prompt)}")
    reference = plain.PlainAV(av)
    vectors = torch.randn(n, av.loaded.d_model, generator=torch.Generator().manual_seed(settings.seed))
    least = _decoding(av, min(n, settings.batch_size)).least_seconds(new, bandwidth=limits.bandwidth, rate=limits.rate)
    with ExitStack() as stack:
        routes: dict[str, Generate] = {}
        if settings.one_by_one:
            routes[ONE_BY_ONE] = partial(reference.generate, batch_size=1)
        routes[BATCHED] = partial(reference.generate, batch_size=settings.batch_size)
        outside: set[str] = set()
        missing: dict[str, str] = {}
        for name, choice in _engines(settings).items():
            try:
                if choice.reads != "model":
                    outside.add(name)  # its weights are its own business, and so is its memory
                routes[name] = _engine_route(stack, choice, av, sidecar, vectors, settings)
            except Exception as cause:  # an engine may fail in every way there is
                if settings.engine is not None or choice.name == ALWAYS:
                    raise
                missing[name] = _reason(cause)
        batches = {name: _batch(name, settings.batch_size) for name in routes}
        device = reference.device
        first_tokens = {name: partial(route, vectors[: batches[name]], 1) for name, route in routes.items()}
        firsts = settings.timed("first token", first_tokens, device, watch=False)
        answers = {name: partial(route, vectors, new) for name, route in routes.items()}
        runs = settings.timed("verbalize", answers, device)
    for name, run in runs.items():
        first = firsts[name].median
        yield Route(
            "verbalize",
            name,
            rows=n,
            batch_size=batches[name],
            tokens=n * new,
            seconds=run.seconds,
            first_token=first,
            peak=None if name in outside else run.peak,
            agreement=None if name == BATCHED else compare_rows(run.result, runs[BATCHED].result, reference, vectors),
            roofline=_share(run.median - -(-n // batches[name]) * first, n, new, min(n, settings.batch_size), least),
            faster_than=_ratios(runs, name),
        )
    for name, reason in missing.items():
        yield Route("verbalize", name, rows=n, batch_size=settings.batch_size, tokens=n * new, reason=reason)


def _engines(settings: Settings) -> dict[str, EngineChoice]:
    """The engines to time, by the names of their routes."""
    choices = [settings.engine] if settings.engine else [EngineChoice(name) for name in registry.engines.names()]
    return {f"engine {choice.name}": choice for choice in choices}


def _reason(cause: Exception) -> str:
    """Why an engine could not run, in a line, with what to do about it where that is known."""
    if not isinstance(cause, NLAError):
        return f"{type(cause).__name__}: {cause}"
    return cause.one_line() + (f" {cause.next_step}" if cause.next_step else "")


def _engine_route(
    stack: ExitStack, choice: EngineChoice, av: LoadedAV, sidecar: Sidecar, vectors: Tensor, settings: Settings
) -> Generate:
    """An engine as a route, tried on one row; it is closed with `stack`, or at once where it fails."""
    with ExitStack() as own:
        engine = own.enter_context(engine_on(choice, av, sidecar))

        def run(rows: Tensor, new: int) -> list[list[int]]:
            found = engine.generate(rows, None, temperature=1.0, max_new_tokens=new, batch_size=settings.batch_size)
            if any(len(completion.ids) != new for completion in found):
                raise NLAError(
                    f"The engine {engine.name!r} ends rows early, so its time says nothing about theirs.",
                    expected=f"{new} tokens a row",
                    next_step="give its instances an attribute `stops`; False must make every row as long as the bound",
                )
            return [list(completion.ids) for completion in found]

        run(vectors[:1], settings.max_new_tokens)
        stack.enter_context(own.pop_all())
        return run


def _decoding(av: LoadedAV, rows: int) -> Decoding:
    model, at = av.loaded.model, av.prompt.marker_position
    return Decoding(
        Architecture.of(av.config),
        *read_weights(model, av.loaded.adapter),
        width=model.dtype.itemsize,
        rows=rows,
        shared=at,
        own=len(av.prompt) - at,
    )


def _share(decoding: float, rows: int, new: int, batch: int, least: float | None) -> float | None:
    """Tokens a second behind the first ones over the most that `batch` rows in `least` seconds a step could be.

    Args:
        decoding: seconds of a run without those until the first tokens.
    """
    if least is None or decoding <= 0:
        return None
    return (rows * (new - 1) / decoding) / (batch / least)


def _batch(name: str, batch_size: int) -> int:
    return 1 if name == ONE_BY_ONE else batch_size


def _ratios(runs: Mapping[str, Timed[Any]], name: str) -> dict[str, float]:
    mine = runs[name].median
    return {p: runs[p].median / mine for p in (ONE_BY_ONE, BATCHED) if p in runs and p != name}


# -- reconstruct, capture ------------------------------------------------------------------------------------


def reconstruct(subject: Subject, settings: Settings, limits: Limits) -> Iterator[Route]:
    """Texts to vectors: one forward pass a text, batches of neighbours, and `Reconstructor.reconstruct`."""
    ar = subject.ar()
    limit = ar.prompt.max_length

    def length(text: str) -> int:
        return len(ar.prompt.encode(text))

    n = settings.rows_of("reconstruct")
    texts = random_texts(length, n, longest=settings.max_new_tokens, limit=limit, seed=settings.seed)
    routes: dict[str, Callable[[], Tensor]] = {}
    if settings.one_by_one:
        routes[ONE_BY_ONE] = partial(plain.vectors_one_by_one, ar, texts)
    routes[BATCHED] = partial(plain.vectors_batched, ar, texts, batch_size=settings.batch_size)
    routes[OURS] = partial(ar.reconstruct, texts, batch_size=settings.batch_size)
    runs = settings.timed("reconstruct", routes, ar.model.head.weight.device)
    yield from _vector_routes("reconstruct", runs, n, settings, sum(map(length, texts)))


def capture_texts(subject: Subject, settings: Settings, limits: Limits) -> Iterator[Route]:
    """Texts to residual-stream vectors at their last tokens: the complete model with all hidden states, and `capture`."""
    source = subject.source()
    model, tokenizer, adapter = source.loaded.model, source.tokenizer, source.loaded.adapter
    limit = context_length(model.config)

    def length(text: str) -> int:
        return len(tokenizer(text)["input_ids"])

    n = settings.rows_of("capture")
    texts = random_texts(length, n, longest=CAPTURED_TOKENS, limit=limit, seed=settings.seed)

    def ours() -> Tensor:
        return capture(adapter, model, tokenizer, subject.site, texts, batch_size=settings.batch_size).vectors

    def whole() -> Tensor:
        return plain.last_hidden(model, tokenizer, subject.site, texts, batch_size=settings.batch_size)

    runs = settings.timed("capture", {BATCHED: whole, OURS: ours}, model.get_input_embeddings().weight.device)
    yield from _vector_routes("capture", runs, n, settings, sum(map(length, texts)))


def _vector_routes(
    operation: Operation, runs: Mapping[str, Timed[Tensor]], n: int, settings: Settings, tokens: int
) -> Iterator[Route]:
    """The routes of an operation that returns vectors, compared with the plainest one that ran."""
    plainest = next(name for name in (ONE_BY_ONE, BATCHED) if name in runs)
    for name, run in runs.items():
        yield Route(
            operation,
            name,
            rows=n,
            batch_size=_batch(name, settings.batch_size),
            tokens=tokens,
            seconds=run.seconds,
            peak=run.peak,
            agreement=None if name == plainest else compare_vectors(run.result, runs[plainest].result),
            faster_than=_ratios(runs, name),
        )


MEASURES: Mapping[Operation, Measure] = {
    "verbalize": verbalize,
    "reconstruct": reconstruct,
    "capture": capture_texts,
}
"""Operation -> how it is measured."""


def required(operations: Sequence[Operation]) -> tuple[str, ...]:
    """The halves of a pair that some operations need; the AV where they need none, because a pair has one at least."""
    halves = {"verbalize": "av", "reconstruct": "ar"}
    return tuple(dict.fromkeys(halves[name] for name in operations if name in halves)) or ("av",)
