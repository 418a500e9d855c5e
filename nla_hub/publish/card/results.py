"""Scores in the form that the Hub collects: `.eval_results/*.yaml`, each naming the data set it was measured on.

https://huggingface.co/docs/hub/eval-results. The Hub shows a result once the data set is one of its benchmarks.
"""

from __future__ import annotations

from nla_hub.evaluation import EvalResult
from nla_hub.publish.facts import ReleaseFacts
from nla_hub.publish.release import RepoRole
from nla_hub.sidecar import Score

FILE = ".eval_results/nla-eval.yaml"

TASKS = {"raw_variance": "fve-raw-variance", "mean_norm": "fve-mean-norm", "cosine": "cosine"}
"""What was measured -> id of the task; larger is better in all of them, 1 is a perfect reconstruction."""

DIGITS = 6
"""Decimals, which take the noise of sums out of a figure."""


def eval_results(facts: ReleaseFacts, role: RepoRole) -> dict[str, bytes]:
    """Name -> content of a repository's result files: empty without a score or a published evaluation set.

    A score belongs to a pair, and stands with its AV: beside both halves a leaderboard would list it twice.
    """
    if role not in ("av", "pair") or facts.evaluation_set is None or facts.score is None or facts.rehearsal:
        return {}
    import yaml
    from huggingface_hub import EvalResultEntry, eval_result_entries_to_yaml

    score = facts.score
    values = {TASKS["raw_variance"]: score.value if score.baseline == "raw_variance" else None}
    values[TASKS["mean_norm"]] = None if facts.score_mean_norm is None else facts.score_mean_norm.value
    values[TASKS["cosine"]] = score.cosine
    entries = [
        EvalResultEntry(
            dataset_id=facts.evaluation_set,
            task_id=task,
            value=round(value, DIGITS),
            notes=_notes(score, facts.evaluation),
        )
        for task, value in values.items()
        if value is not None
    ]
    if not entries:
        return {}
    text = yaml.safe_dump(eval_result_entries_to_yaml(entries), sort_keys=False, allow_unicode=True, width=110)
    return {FILE: text.encode()}


def _notes(score: Score, result: EvalResult | None) -> str:
    """The setting in one line."""
    parts = [score.protocol or "protocol unknown", f"n={score.n}"]
    if result is not None and result.protocol.name == score.protocol:
        protocol = result.protocol
        parts.append("greedy" if protocol.temperature == 0 else f"temperature {protocol.temperature:g}")
        parts.append(f"seed {protocol.seed}")
    parts.append(f"nla-hub at commit {score.commit or 'unknown'}")
    return ", ".join(parts)
