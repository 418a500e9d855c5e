"""Blocks computed on a Ray cluster: one actor a worker, on whichever machine has room. Nothing but this module knows Ray.

Actors get blocks and return results, as the processes of one machine do, so they need no file system in common; the pair they
load by its name, each on its own machine. Docs: docs/explain.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from nla_hub.errors import MissingExtraError, RunError
from nla_hub.explain.pools import Broken, Event, Failed, Terms, Worker, reason_of
from nla_hub.explain.rows import Block
from nla_hub.explain.stop import handlers_kept


class _Actor:
    """A worker on the cluster."""

    def __init__(self, terms: Terms) -> None:
        self._worker: Worker | None = None
        self._terms = terms

    def load(self) -> Event:
        """Load the pair: `Ready`, or `Broken`."""
        try:
            self._worker = Worker(self._terms)
            return self._worker.ready()
        except Exception as error:
            return Broken(reason_of(error))

    def run(self, blocks: Sequence[Block], batch_size: int) -> Event:
        """Compute blocks; see `Worker.run`."""
        assert self._worker is not None
        return self._worker.run(blocks, batch_size)


class RayPool:
    """`n` actors of a Ray cluster: the one that RAY_ADDRESS names, else one that is started on this machine.

    An actor that dies, with its machine or alone, is replaced, and what it had is reported as `Failed`.
    """

    def __init__(self, n: int) -> None:
        self._n = n
        self._terms: Terms | None = None
        self._ray: Any = None
        self._calls: dict[Any, tuple[Any, tuple[Block, ...]]] = {}
        """What is under way: the actor and its blocks; none while it loads."""
        self._idle: list[Any] = []
        self._ours = False

    def start(self, terms: Terms) -> None:
        """See `Pool.start`.

        Raises:
            MissingExtraError: Ray is not installed. RunError: the cluster cannot be reached.
        """
        try:
            import ray
        except ImportError as cause:
            raise MissingExtraError("ray", "ray", needed_for="--runner ray") from cause
        self._ray, self._terms = ray, terms
        if not ray.is_initialized():
            self._ours = True
            try:
                with handlers_kept():  # it would end this process at SIGTERM
                    ray.init(log_to_driver=False, include_dashboard=False, configure_logging=False)
            except Exception as cause:  # whatever its transport raises
                raise RunError(
                    f"The Ray cluster cannot be reached: {' '.join(str(cause).split())[:300]}",
                    next_step="start it with `ray start --head`, or unset RAY_ADDRESS to use this machine alone",
                ) from cause
        for _ in range(self._n):
            self._hire()

    def _hire(self) -> None:
        assert self._terms is not None
        gpus = 1 if any(node["Resources"].get("GPU") for node in self._ray.nodes()) else 0
        needs = {"num_gpus": gpus, "num_cpus": 0 if gpus else self._terms.settings.threads}
        actor = self._ray.remote(_Actor).options(max_restarts=0, **needs).remote(self._terms)
        self._calls[actor.load.remote()] = actor, ()

    @property
    def idle(self) -> int:
        """See `Pool.idle`."""
        return len(self._idle)

    @property
    def alive(self) -> int:
        """See `Pool.alive`."""
        return len(self._idle) + len(self._calls)

    def submit(self, blocks: Sequence[Block], batch_size: int) -> None:
        """See `Pool.submit`."""
        actor = self._idle.pop()
        self._calls[actor.run.remote(list(blocks), batch_size)] = actor, tuple(blocks)

    def wait(self, seconds: float) -> list[Event]:
        """See `Pool.wait`."""
        if not self._calls:
            return []
        ready, _ = self._ray.wait(list(self._calls), timeout=seconds)
        return [self._event(reference) for reference in ready]

    def _event(self, reference: Any) -> Event:
        actor, blocks = self._calls.pop(reference)
        try:
            event: Event = self._ray.get(reference)
        except self._ray.exceptions.RayError as error:
            reason = f"The actor was lost: {type(error).__name__}."
            if not blocks:
                return Broken(reason)
            self._hire()
            return Failed(blocks, reason, died=True)
        if isinstance(event, Broken):
            self._ray.kill(actor)
        else:
            self._idle.append(actor)
        return event

    def close(self) -> None:
        """See `Pool.close`; a cluster that was there before stays."""
        if self._ray is None:
            return
        for actor in [*self._idle, *(actor for actor, _ in self._calls.values())]:
            self._ray.kill(actor)
        self._idle, self._calls = [], {}
        if self._ours:
            self._ray.shutdown()
            self._ours = False
