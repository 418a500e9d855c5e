"""The activation verbalizer: vector -> explanations, over any engine."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from nla_hub.engines.base import Completion, Engine
from nla_hub.errors import InputError, Interrupted
from nla_hub.geometry import norms
from nla_hub.prompts import parse_explanation
from nla_hub.results import Explanation, Sampling
from nla_hub.sampling import RowKey, uniforms, vector_hash
from nla_hub.sidecar import Sidecar


@dataclass(frozen=True)
class Verbalizer:
    """A loaded AV on its engine."""

    engine: Engine
    sidecar: Sidecar
    name: str
    revision: str | None = None

    def verbalize(
        self,
        vectors: Tensor,
        *,
        keys: Sequence[RowKey] | None = None,
        n: int = 1,
        temperature: float = 0.7,
        max_new_tokens: int = 200,
        seed: int = 0,
        batch_size: int | None = None,
        progress: Callable[[int], None] | None = None,
    ) -> list[list[Explanation]]:
        """`n` explanations of each row of `vectors` (raw float32 [N, d], finite and not zero).

        `batch_size` None takes as many rows together as fit into the memory that is free.

        A row's text depends on (seed, key, sample) and its vector alone. Rows equal in key and vector, and under
        greedy decoding in vector, are computed once.

        Raises:
            InputError: a sampling setting out of range, or keys that do not match the rows.
            Interrupted: Ctrl-C; carries the explanations of the rows of which every sample is done, by index.
        """
        check_sampling(n=n, temperature=temperature, max_new_tokens=max_new_tokens, batch_size=batch_size)
        hashes = [vector_hash(row) for row in vectors]
        row_keys = list(keys) if keys is not None else [RowKey(h) for h in hashes]
        if len(row_keys) != len(vectors):
            raise InputError("keys= needs one key a row.", got=f"{len(row_keys)} keys", expected=len(vectors))
        greedy = temperature == 0
        unique: dict[tuple[str, RowKey | None], int] = {}
        jobs: list[tuple[int, RowKey]] = []
        slots: list[list[int]] = []
        for i, (row_hash, key) in enumerate(zip(hashes, row_keys, strict=True)):
            mine = []
            for sample in range(n):
                sampled = key.with_sample(key.sample + sample)
                identity = (row_hash, None if greedy else sampled)
                if identity not in unique:
                    unique[identity] = len(jobs)
                    jobs.append((i, sampled))
                mine.append(unique[identity])
            slots.append(mine)
        sampling = Sampling(temperature, max_new_tokens, seed)
        lengths = norms(vectors).tolist() if len(vectors) else []

        def explained(i: int, completions: Mapping[int, Completion]) -> list[Explanation]:
            return [
                self._explanation(completions[slot], lengths[i], row_keys[i], sample, sampling)
                for sample, slot in enumerate(slots[i])
            ]

        completions: list[Completion] = []
        if jobs:
            try:
                completions = self.engine.generate(
                    vectors[[i for i, _ in jobs]],
                    None if greedy else uniforms(seed, [key for _, key in jobs], max_new_tokens),
                    temperature=temperature or 1.0,
                    max_new_tokens=max_new_tokens,
                    batch_size=batch_size or self.fitting_rows(max_new_tokens),
                    progress=progress,
                )
            except Interrupted as stop:
                stop.done = {
                    i: explained(i, stop.done)
                    for i, mine in enumerate(slots)
                    if all(slot in stop.done for slot in mine)
                }
                raise
        by_slot = dict(enumerate(completions))
        return [explained(i, by_slot) for i in range(len(slots))]

    def fitting_rows(self, max_new_tokens: int) -> int:
        """What an engine says that it can run together; `ROWS` for one that does not say."""
        fitting = getattr(self.engine, "fitting_rows", None)
        return ROWS if fitting is None else int(fitting(max_new_tokens))

    def _explanation(
        self, completion: Completion, norm: float, key: RowKey, sample: int, sampling: Sampling
    ) -> Explanation:
        status, text = parse_explanation(completion.text)
        return Explanation(
            text=text,
            raw=completion.text,
            status=status,
            norm=norm,
            doc_id=key.document,
            position=key.position,
            sample=key.sample + sample,
            model=self.name,
            revision=self.revision,
            sampling=sampling,
        )


ROWS = 32
"""Rows together where neither user nor engine says."""


def check_sampling(*, n: int, temperature: float, max_new_tokens: int, batch_size: int | None) -> None:
    """Raise an InputError for a sampling setting out of range."""
    for name, value in (("n", n), ("max_new_tokens", max_new_tokens), ("batch_size", batch_size)):
        if name == "batch_size" and value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise InputError(f"{name} is a whole number from 1 up.", got=repr(value))
    if (
        isinstance(temperature, bool)
        or not isinstance(temperature, (int, float))
        or not 0 <= temperature < float("inf")
    ):
        raise InputError("temperature is a number from 0 up; 0 is greedy.", got=repr(temperature))


def as_keys(keys: Sequence[object]) -> list[RowKey]:
    """The caller's `keys=` as row keys: RowKeys as they are, anything else by its text; an InputError for no list."""
    if isinstance(keys, (str, bytes)) or not isinstance(keys, Iterable):
        raise InputError("keys= needs one key a row.", got=repr(keys)[:80], expected="a list")
    return [key if isinstance(key, RowKey) else RowKey(str(key)) for key in keys]
