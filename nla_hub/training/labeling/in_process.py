"""What labelers share that write answers themselves: all processes of a run answer together.

The distinct snippets of all labelled splits, answered or not, are cut into blocks in a fixed order; a block with something
missing is answered by one process. So a snippet meets the same neighbours whatever the number of processes, and after a kill.
The main process writes into the cache itself, each other one into a file of its own in the run's directory (`rank-R`),
which the main process takes over: after each attempt, and at the beginning those that a killed run left.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, ClassVar

from nla_hub.training.labelers import Block, LabelRequest
from nla_hub.training.labeling.cache import Answer, LabelCache, key_of
from nla_hub.training.labeling.cost import tokens_in
from nla_hub.training.labeling.prompt import judge
from nla_hub.training.labeling.run import CachedLabeler, Missing, S, Tally

RANKS = "rank-"
"""Directories of processes other than the main one, followed by their number."""


class InProcessLabeler(CachedLabeler[S]):
    """A labeler without an API; a `DividedLabeler` of `nla_hub.training.labelers`."""

    divided: ClassVar[bool] = True
    by_size: ClassVar[bool] = False

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self._round = ExitStack()

    # -- what each of them says ------------------------------------------------------------------------------

    @property
    @abstractmethod
    def block(self) -> int:
        """Snippets of a block; blocks are of snippets of like size where `by_size` says so."""

    @abstractmethod
    def write(self, blocks: Sequence[Missing]) -> Iterator[dict[str, Answer]]:
        """The answers to all requests of the blocks, some at a time; what is loaded stays until `close`."""

    # -- in one process --------------------------------------------------------------------------------------

    def answer(self, missing: Missing, cache: LabelCache, tally: Tally) -> None:
        """Write all of them."""
        with cache.alone(self._wait):
            known = cache.known(missing)
            left = {key: request for key, request in missing.items() if key not in known}
            if not left:
                return
            self.announce(left)
            sizes = {key: tokens_in(self.content(request)) for key, request in left.items()}
            blocks = [{key: left[key] for key in block} for block in self._blocks(sizes)]
            for _ in self._store(blocks, cache, tally):
                pass

    def close(self) -> None:
        """Let go of the cache, where a round was not finished."""
        self._round.close()

    # -- in all processes ------------------------------------------------------------------------------------

    @property
    def attempts(self) -> int:
        """How often a snippet is asked at most."""
        return int(self.settings.attempts)

    def plan(self, requests: Iterable[LabelRequest], attempt: int) -> list[Block]:
        """What an attempt has to ask, in blocks; nobody else writes to this cache from here to `take_over` or `close`.

        Raises:
            RunError: the cache cannot be used, or has no room.
        """
        with ExitStack() as stack:
            cache = stack.enter_context(LabelCache(self._directory()))
            stack.enter_context(cache.alone(self._wait))
            for directory in self._others():
                cache.take_over(directory)
            sizes = self._wanted(requests, attempt, cache)
            known = cache.known(sizes)
            missing = [size for key, size in sizes.items() if key not in known]
            if not missing:
                return []
            cache.require_room(len(missing))
            self.announce_estimate(self.estimate(len(missing), sum(missing) / len(missing)))
            self._round = stack.pop_all()
        blocks = ([key for key in block if key not in known] for block in self._blocks(sizes))
        return [block for block in blocks if block]

    def answer_share(
        self, share: Sequence[Block], requests: Iterable[LabelRequest], attempt: int, *, rank: int, world: int
    ) -> Iterator[None]:
        """Answer some of the blocks of the plan; yields each time something is stored.

        Raises:
            What `label` raises.
        """
        wanted = {key for block in share for key in block}
        if not wanted:
            return
        found: dict[str, LabelRequest] = {}
        for key, _, request in self._keyed(requests, attempt):
            if key in wanted:
                found.setdefault(key, request)
        own = rank > 0
        with LabelCache(self._run_directory() / f"{RANKS}{rank}" if own else self._directory(), own=own) as cache:
            cache.require_room(len(wanted))
            tally = Tally(self.settings, len(wanted))
            try:
                blocks = [{key: found[key] for key in block} for block in share]
                yield from self._store(blocks, cache, tally, {"processes": world} if world > 1 else {})
            finally:
                self._paid = self._paid + tally.usage

    def take_over(self) -> None:
        """Bring the answers of the other processes into the cache; others may write to it again.

        Raises:
            RunError: what another process stored cannot be read, or not be stored.
        """
        with self._round:
            for directory in self._others():
                with LabelCache(directory, own=True) as other:
                    self._paid = self._paid + other.spent(self.asker_id())
                with LabelCache(self._directory()) as cache:
                    cache.take_over(directory)

    # -- parts -----------------------------------------------------------------------------------------------

    def _wait(self) -> None:
        self.report({"labels": "another run is writing them; waiting for it"})

    def _others(self) -> list[Path]:
        """Where other processes stored answers that are not taken over yet."""
        return sorted(self._run_directory().glob(f"{RANKS}*"))

    def _keyed(self, requests: Iterable[LabelRequest], attempt: int) -> Iterator[tuple[str, str, LabelRequest]]:
        """Each request with the key of its answer and what that depends on."""
        asker = self.asker()
        for request in requests:
            content = self.content(request)
            yield key_of(asker, content, attempt), content, request

    def _wanted(self, requests: Iterable[LabelRequest], attempt: int, cache: LabelCache) -> dict[str, int]:
        """The distinct keys that an attempt asks for, answered or not, and about how many tokens each shows."""
        asker = self.asker()
        sizes: dict[str, int] = {}
        for key, content, _ in self._keyed(requests, attempt):
            if key in sizes:
                continue
            earlier = (cache.get(key_of(asker, content, i)) for i in range(attempt))
            if not any(found and judge(found.text, found.finish, self.settings)[0] for found in earlier):
                sizes[key] = tokens_in(content)
        return sizes

    def _blocks(self, sizes: dict[str, int]) -> list[Block]:
        """The keys in blocks."""
        keys = sorted(sizes, key=sizes.__getitem__) if self.by_size else list(sizes)
        return [keys[begin : begin + self.block] for begin in range(0, len(keys), self.block)]

    def _store(
        self, blocks: Sequence[Missing], cache: LabelCache, tally: Tally, told: dict[str, Any] | None = None
    ) -> Iterator[None]:
        """Write the blocks and store their answers; yields after each part. `told` is reported beside the figures."""
        for answers in self.write(blocks):
            cache.put(self.asker_id(), answers)
            for answer in answers.values():
                tally.take(answer)
            self.report({"labels": tally.done, "of": tally.most, **(told or {})})
            yield
