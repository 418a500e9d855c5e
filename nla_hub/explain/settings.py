"""What a job is asked for, and how that is kept in `job.yaml`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from nla_hub.errors import InputError
from nla_hub.nla import NLA
from nla_hub.parts import Memory
from nla_hub.positions import Positions, check_word
from nla_hub.source_text import Overflow
from nla_hub.verbalizer import check_sampling

BLOCK = 256
"""Rows of a block. The engine never batches across blocks, so any way of running a job gives the same rows."""

MOST_SAMPLES = 10_000


@dataclass(frozen=True)
class PairSettings:
    """How a worker loads the pair: keywords of `NLA.from_pretrained`."""

    name: str = "tiny"
    ar: str | None = None
    base_model: str | None = None
    subfolder: str = ""
    ar_subfolder: str = ""
    sidecar: Mapping[str, Any] | None = None
    engine: str = "auto"
    engine_options: Mapping[str, Any] = field(default_factory=dict)
    memory: Memory = "auto"

    def load(self) -> NLA:
        """The pair; for errors see `NLA.from_pretrained`."""
        keywords = {key: value for key, value in vars(self).items() if key != "name"}
        return NLA.from_pretrained(self.name, **keywords)


@dataclass(frozen=True)
class DataSettings:
    """Which data: keywords of `inputs.open_dataset`."""

    name: str
    column: str | None = None
    messages_column: str | None = None
    id_column: str | None = None
    limit: int | None = None


@dataclass(frozen=True)
class JobSettings:
    """What every row of a job depends on. A job that is continued must be asked for the same.

    Attributes:
        positions: as `NLA.capture` takes them, functions left out: they have no name to be kept by.
        batch_size: rows that the engine runs together; None is settled when the job starts for the first time, and kept.
        threads: of the processor, a worker; None is 1 where it computes on the processor.
        keep_vectors: whether the vectors are written too.
    """

    pair: PairSettings
    data: DataSettings
    positions: Positions = "last"
    n: int = 1
    temperature: float = 0.7
    max_new_tokens: int = 200
    seed: int = 0
    overflow: Overflow = "error"
    parse_special_tokens: bool = False
    keep_vectors: bool = False
    block: int = BLOCK
    batch_size: int | None = None
    threads: int = 1

    def __post_init__(self) -> None:
        check_sampling(
            n=self.n, temperature=self.temperature, max_new_tokens=self.max_new_tokens, batch_size=self.batch_size
        )
        if isinstance(self.positions, str):
            check_word(self.positions)
        elif callable(self.positions):
            raise InputError(
                "A job keeps its positions in a file, and a function has no name to be kept by.",
                next_step='use a word such as "every:10" or "regex:...", an index, several, or a slice',
            )
        limit = {"block": self.block, "threads": self.threads}
        if self.data.limit is not None:
            limit["limit"] = self.data.limit
        for name, value in limit.items():
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise InputError(f"{name} is a whole number from 1 up.", got=repr(value))
        if self.n > MOST_SAMPLES:
            raise InputError(
                "So many samples of one vector say nothing new.", got=self.n, expected=f"<= {MOST_SAMPLES}"
            )

    def to_mapping(self) -> dict[str, Any]:
        """As `job.yaml` keeps it: plain values only."""
        rest = {
            key: value for key, value in vars(self).items() if key not in ("pair", "data", "positions", "batch_size")
        }
        pair = {key: value for key, value in vars(self.pair).items() if value not in (None, "", {})}
        data = {key: value for key, value in vars(self.data).items() if value is not None}
        return {"pair": pair, "data": data, "positions": _spelled(self.positions), **rest}


def _spelled(positions: Positions) -> Any:
    if isinstance(positions, slice):
        parts = (positions.start, positions.stop, positions.step)
        return ":".join("" if part is None else str(part) for part in parts[: 3 if parts[2] is not None else 2])
    if isinstance(positions, (str, int)):
        return positions
    assert not callable(positions)
    return [int(p) for p in positions]


@dataclass(frozen=True)
class Shard:
    """One of several independent runs of one job: every `of`-th block. `number` counts from 0 or from 1 alike."""

    number: int = 0
    of: int = 1

    def __post_init__(self) -> None:
        if self.of < 1 or not 0 <= self.number <= self.of:
            raise InputError(
                "There is no such shard.",
                got=f"{self.number}/{self.of}",
                expected="i/n with i from 0 to n-1, or from 1 to n (0/n and n/n are the same shard)",
            )
        object.__setattr__(self, "number", self.number % self.of)

    @classmethod
    def parse(cls, text: str) -> Shard:
        """From "i/n"; raises an InputError."""
        number, slash, of = text.partition("/")
        if not slash or not number.strip().isdecimal() or not of.strip().isdecimal():
            raise InputError("A shard is written i/n.", got=repr(text), expected="such as 1/4, 2/4, 3/4 and 4/4")
        return cls(int(number), int(of))

    def owns(self, block: int) -> bool:
        """Whether a block is this shard's."""
        return block % self.of == self.number

    @property
    def name(self) -> str:
        """Of its files: "all", or "0-of-4"."""
        return "all" if self.of == 1 else f"{self.number}-of-{self.of}"
