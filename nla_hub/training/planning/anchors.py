"""What others took for comparable work: the only ground on which `train --plan` says hours, and always as a range.

An anchor's share is the peak seconds of its work (`effort.py`) over the seconds that it took. A stage takes its own peak
seconds over the shares of the comparable anchors, the highest and the lowest of them. Figures are as published; what was not
said with them stands in `reading`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from nla_hub.training.planning.effort import Machine, Products, Seconds
from nla_hub.training.planning.gpus import GPUS

FARTHEST = 10
"""Times larger or smaller that a model may be than an anchor's; beyond it nothing is known. Untuned."""

NEAR = 2
"""The same for whole runs, which are not converted but shown as they are. Untuned."""

FORK = "a public fork's own account"

QWEN_7B = Products(av=7.07e9, ar=4.91e9)
"""Qwen2.5-7B read at layer 20 of 28: blocks and lm_head; blocks 0 to 20 and a value head."""


@dataclass(frozen=True)
class Anchor:
    """A recorded timing.

    Attributes:
        name: what took how long, where.
        kind: whether it says how fast "passes" are (forward and backward), "sampling", or both in a "step" of GRPO.
        values: of the model.
        shares: lowest and highest share of the hardware's peak that it comes to.
        source: who says so. reading: what was taken for granted, "" where nothing had to be.
    """

    name: str
    kind: Literal["passes", "sampling", "step"]
    values: float
    shares: tuple[float, float]
    source: str
    reading: str = ""


@dataclass(frozen=True)
class Run:
    """A recorded training as a whole: not converted, only shown beside a recipe of its size.

    Attributes:
        values: of the model. lora: whether factors were trained.
        gpu_hours: fewest and most.
        said: what was reached, and the money where it was said.
    """

    name: str
    values: float
    lora: bool
    gpu_hours: tuple[float, float]
    said: str
    source: str


def _warm_start() -> tuple[float, float]:
    h200 = Machine(GPUS["H200-141GB"], 1)
    operations = 6 * (QWEN_7B.ar * 190 * 250_000 + QWEN_7B.av * 250 * 256_000)
    share = h200.passes(operations) / (6 * 3600)
    return share, share


def _step() -> tuple[float, float]:
    peak = QWEN_7B.step(Machine(GPUS["H100-80GB"], 8), 512, 150, block=256)
    return (peak.passes + peak.sampling) / 41, (peak.passes + peak.sampling) / 32


def _explanations() -> tuple[float, float]:
    share = Machine(GPUS["H200-141GB"], 1).sampling(QWEN_7B.av, 256, 150, block=256) * 36 / 256
    return share, share


def _rollouts() -> tuple[float, float]:
    share = Machine(GPUS["B200"], 4).sampling(27.0e9, 1024, 150, block=256) / 88
    return share, share


ANCHORS: tuple[Anchor, ...] = (
    Anchor(
        "Llama 3.1 8B with FSDP2: 5,762 tokens a second on each of 8 H100",
        "passes",
        8.0e9,
        (6 * 7.5e9 * 5762 / 989e12, 6 * 7.5e9 * 5762 / 989e12),
        "torchtitan, benchmarks/llama3_h100_202412_torchtitan.md, December 2024",
        "sequences of 8,192 tokens; ours are of about 200",
    ),
    Anchor(
        "7B warm start: 6 h on one H200",
        "passes",
        7.6e9,
        _warm_start(),
        FORK,
        "rows not said: those of the published recipe (250,000 for the AR, 256,000 for the AV) taken",
    ),
    Anchor(
        "7B GRPO: 32 to 41 s a step on 8 H100",
        "step",
        7.6e9,
        _step(),
        FORK,
        "samples a step not said: 512 taken, of 150 tokens, full weights",
    ),
    Anchor(
        "7B: 36 explanations a second with batched generate",
        "sampling",
        7.6e9,
        _explanations(),
        FORK,
        "hardware, lengths and batch not said: one H200, 150 tokens and 256 rows taken",
    ),
    Anchor(
        "27B: 88 s for 1,024 rollouts on 4 B200",
        "sampling",
        27.0e9,
        _rollouts(),
        "a public re-implementation's own account",
        "150 tokens, 256 sequences on each taken",
    ),
)
"""What a stage's hours are reckoned from. Not among them: 47 s a step of 512 samples for Qwen-7B (the reference repository),
because nobody says on how many GPUs."""

RUNS: tuple[Run, ...] = (
    Run(
        "Gemma-27B: 1.5 days to a week on 16 H100",
        27.0e9,
        False,
        (576, 2688),
        "FVE 0.38 -> 0.71, 0.75 after the week; $1,500 to $5,000",
        "the paper's appendix",
    ),
    Run("8B: 3 to 4 h on 4 H200", 8.0e9, True, (12, 16), "LoRA", "a public re-implementation's own account"),
    Run("7B: 200 to 300 steps of GRPO on 8 H100", 7.6e9, False, (14, 27), "about $55", FORK),
)
"""Hours of the last: 200 steps of 32 s to 300 of 41 s, on 8 GPUs."""


@dataclass(frozen=True)
class Hours:
    """Wall time between the fastest and the slowest comparable anchor, and which these are."""

    low: float
    high: float
    anchors: tuple[str, ...]

    def __add__(self, other: Hours) -> Hours:
        names = dict.fromkeys((*self.anchors, *other.anchors))
        return Hours(self.low + other.low, self.high + other.high, tuple(names))


def hours(seconds: Seconds | None, values: float) -> Hours | None:
    """How long work of so many peak seconds takes with a model of `values`; None where no anchor is comparable."""
    if seconds is None:
        return None
    passes, sampling, step = (_comparable(kind, values) for kind in ("passes", "sampling", "step"))
    if not seconds.sampling:
        if not passes:
            return None
        return _range([seconds.passes / share for anchor in passes for share in anchor.shares], passes, values)
    found = [(seconds.passes + seconds.sampling) / share for anchor in step for share in anchor.shares]
    used = list(step)
    if sampling and passes:
        slow, fast = (pick(s for a in passes for s in a.shares) for pick in (min, max))
        for anchor in sampling:
            found += [
                seconds.sampling / share + seconds.passes / other for share in anchor.shares for other in (slow, fast)
            ]
        used += [*sampling, *passes]
    return _range(found, used, values) if found else None


def runs_like(values: float, *, lora: bool) -> list[Run]:
    """Recorded trainings of about this size and kind."""
    return [run for run in RUNS if run.lora == lora and 1 / NEAR <= values / run.values <= NEAR]


def _comparable(kind: str, values: float) -> list[Anchor]:
    return [a for a in ANCHORS if a.kind == kind and 1 / FARTHEST <= values / a.values <= FARTHEST]


def _range(found: list[float], anchors: list[Anchor], values: float) -> Hours:
    return Hours(min(found) / 3600, max(found) / 3600, tuple(_named(anchor, values) for anchor in anchors))


def _named(anchor: Anchor, values: float) -> str:
    apart = max(values / anchor.values, anchor.values / values)
    far = f"; a model {apart:.1f} times {'smaller' if values > anchor.values else 'larger'}" if apart > NEAR else ""
    reading = f"; {anchor.reading}" if anchor.reading else ""
    return f"{anchor.name} ({anchor.source}{reading}{far})"
