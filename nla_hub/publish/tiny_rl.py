"""The page on what reinforcement learning did to the tiny pairs, rendered from measured comparisons.

`python -m nla_hub.publish.tiny_rl` prints docs/tiny-rl.md from the files of `model_cards/tiny/rl/`, each of which
`nla-hub eval A --against B --json` wrote. A stale page fails the tests.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from nla_hub import resources
from nla_hub.evaluation.paired import Estimate
from nla_hub.evaluation.render import interval, markdown_table
from nla_hub.evaluation.render_comparison import signed

FILES = "tiny", "rl"
WARM_START = "warm-start.json"
SEEDS = "weak-*.json"

INTRODUCTION = """\
<!-- Generated: python -m nla_hub.publish.tiny_rl > docs/tiny-rl.md -->
# What reinforcement learning did

Every figure is from `tiny-eval-v1`; brackets are 95 % bootstrap intervals over documents, those of a difference paired: both
pairs explain the same vectors. Means over facts are over those that the vector holds (probe - chance >= 0.2).
"""

SHIPPED = """\
## The packaged pair against its own warm start

A is the packaged pair, B the supervised pair that the same run had before its rl stage, each with its own AR.

```bash
nla-hub train tiny -o runs/tiny
mkdir before && cp -r runs/tiny/av/checkpoint before/av && cp -r runs/tiny/ar/checkpoint before/ar
cp -r runs/tiny/source/checkpoint before/source
nla-hub eval tiny --against ./before
```
"""

WEAK = """\
## From a warm start that tells only part

[`recipes/tiny-weak.yaml`](../recipes/tiny-weak.yaml): a label names each of its clauses with probability 0.35. The control
has as many samples and steps of the AR, but an AV that never moves (`rl.lr=0`): its facts are those of the warm start.

```bash
nla-hub train tiny-weak seed=0 -o runs/weak
nla-hub train tiny-weak seed=0 rl.lr=0 -o runs/control
nla-hub eval ./runs/weak/export/checkpoint --against ./runs/control/export/checkpoint
```

These runs read the source model that was packaged at commit 11c4cfe; the present one was trained by the same recipe. The
protocol's evaluation came after training; settings were chosen on held-out rows of the training stream, on seed 0.

A rising FVE does not mean that more is told: recall is what to look at beside it. [tiny.md](tiny.md) has the settings tried.
"""

COLUMNS = ("fve", "cosine", "words", "recall", "precision", "share")
TITLES = {"fve": "FVE (raw variance)", "share": "captured share"}


def page() -> str:
    """The page."""
    directory = resources.data_directory("model_cards").joinpath(*FILES)
    parts = [INTRODUCTION, SHIPPED, one(_read(directory / WARM_START)), WEAK, several(directory)]
    return "\n".join(parts)


def one(comparison: Mapping[str, Any]) -> str:
    """A comparison as a table of scores and one of facts."""
    n, reference = comparison["n"], comparison["reference"]["dataset"]
    scores = [(TITLES.get(name, name), *_cells(comparison[name])) for name in COLUMNS]
    facts = [
        (
            row["fact"].replace("_", " "),
            str(row["n"]),
            *(_difference(row[name]) for name in ("recall", "precision", "share")),
        )
        for row in comparison["facts"]
    ]
    return "\n".join(
        [
            f"n={n} activations, {reference}; commit {comparison['commit']}.",
            "",
            markdown_table(("", "A", "B", "A - B"), scores),
            "",
            "The difference fact by fact:",
            "",
            markdown_table(("fact", "n", "recall", "precision", "captured share"), facts),
            "",
        ]
    )


def several(directory: Path) -> str:
    """A row for each seed of the experiment."""
    rows = []
    for file in sorted(directory.glob(SEEDS)):
        comparison = _read(file)
        fve = comparison["fve"]
        rows.append(
            (
                file.stem.removeprefix("weak-"),
                _estimate(fve["a"]),
                _estimate(fve["b"]),
                *(_difference(comparison[name]) for name in COLUMNS),
            )
        )
    columns = ("seed", "FVE, GRPO", "FVE, control", *(f"{TITLES.get(n, n)}, difference" for n in COLUMNS))
    return markdown_table(columns, rows) + "\n"


def _read(file: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return found


def _cells(figure: Mapping[str, Any]) -> Sequence[str]:
    return _estimate(figure["a"]), _estimate(figure["b"]), _difference(figure)


def _estimate(estimate: Mapping[str, Any]) -> str:
    return interval(estimate["value"], estimate["low"], estimate["high"])


def _difference(figure: Mapping[str, Any]) -> str:
    return signed(Estimate(**figure["difference"]))


if __name__ == "__main__":
    print(page(), end="")
