"""The card of the packaged pair, rendered from `model_cards/tiny/eval.json` and `model_cards/tiny/steering.json`.

`nla-hub eval tiny --source-check --sampled --json` and `nla-hub steer --table --json` write the two.
"""

from __future__ import annotations

import json
from typing import Any

from nla_hub import resources
from nla_hub.evaluation import EvalResult
from nla_hub.evaluation.facts import FactRow
from nla_hub.evaluation.render import markdown, markdown_table, number

INTRODUCTION = """\
<!-- Generated: python -m nla_hub.publish.card > model_cards/tiny.md -->
# tiny: the embedded pair

A complete natural language autoencoder that travels inside the package: a source language model of the tiny world, the
activation verbalizer (AV) that describes its residual stream in words, and the activation reconstructor (AR) that turns the
words back into a vector. It exists so that everything in nla-hub can be tried, taught and tested offline, against a world
whose facts are known. It says nothing about large models.

- Architecture: Llama, trained from nothing by `nla-hub train tiny` ([recipe](../recipes/tiny.yaml)): a supervised warm
  start, then AV and AR together by reinforcement learning (GRPO)
- Licence: Apache-2.0; the training documents are made by a grammar that is part of the package
- How it was made and how to make it again: [docs/tiny.md](../docs/tiny.md); the
  history of its run: [docs/tiny-training.md](../docs/tiny-training.md); what the reinforcement learning changed:
  [docs/tiny-rl.md](../docs/tiny-rl.md)

## What it is not

It is not evidence that a description is true. FVE measures how much of a vector comes back, not whether the words are right:
see the facts table below, where precision stands beside recall. A small grammar flatters every figure.
"""


def tiny_card() -> str:
    """The card of the packaged pair."""
    directory = resources.data_directory("model_cards") / "tiny"
    result = EvalResult.from_dict(json.loads((directory / "eval.json").read_text(encoding="utf-8")))
    steering: dict[str, Any] = json.loads((directory / "steering.json").read_text(encoding="utf-8"))
    return "\n".join(
        [
            INTRODUCTION,
            "## What it invents",
            "",
            invents(result),
            "",
            "## Measured",
            "",
            markdown(result),
            "## Steering",
            "",
            steering_section(steering),
        ]
    )


def invents(result: EvalResult) -> str:
    """In plain words, from the facts table: which facts a reader may rely on, and which are made up how often."""
    rows = [row for row in result.facts if row.precision is not None and row.recall is not None]
    wrong = sorted((r for r in rows if (r.precision or 0.0) < 0.9), key=lambda r: r.precision or 0.0)
    lines = ["When it names a fact, it is wrong this often (one minus the precision on the evaluation rows):", ""]
    lines += [f"- {_name(row)}: {1 - (row.precision or 0.0):.0%} of the times it is named" for row in wrong]
    if not wrong:
        lines.append("- every fact that it names is right at least nine times in ten")
    right = [_name(row) for row in rows if (row.precision or 0.0) >= 0.9]
    if right:
        lines += ["", f"Right at least nine times in ten: {', '.join(right)}."]
    lines += [
        "",
        "It always answers in the same form and with the same confidence. It does not say that it does not know: text of "
        "any other kind than the tiny world's is described as if it were a story, a sum or a song of that world.",
    ]
    return "\n".join(lines)


def _name(row: FactRow) -> str:
    return row.fact.replace("_", " ")


def steering_section(table: dict[str, Any]) -> str:
    """The best strength of each fact and vector, and the rule by which cases were chosen."""
    best: dict[tuple[str, str], dict[str, Any]] = {}
    for row in table["rows"]:
        key = (row["fact"], row["vector"])
        if row["rate"] is not None and (key not in best or row["rate"] > best[key]["rate"]):
            best[key] = row
    rows = [
        (
            fact,
            vector,
            f"{row['strength']:g}",
            str(row["cases"]),
            number(row["rate"], 2),
            f"[{row['low']:.2f}, {row['high']:.2f}]",
        )
        for (fact, vector), row in best.items()
    ]
    columns = ("fact", "vector", "best strength", "cases", "flips", "95 % interval")
    explanation = (
        "A flip: the greedy continuation of a prompt names the edited value where the unsteered one named the true one. Cases "
        "are the first documents of the evaluation split that end in a question about the fact and are answered correctly "
        "without steering, chosen before any steered output is seen. `nla`: AR(edited explanation) - AR(explanation); `means`: "
        "difference of mean training vectors; `random`: a random direction. All strengths are in "
        "`model_cards/tiny/steering.json`."
    )
    return f"{explanation}\n\n{markdown_table(columns, rows)}\n"
