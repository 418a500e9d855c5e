"""GRPO in two processes does what one does: the same samples, the same losses, the same weights."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("trl", reason="needs the train extra")

from test_training_processes import launch

from nla_hub.testing import random_pair

pytestmark = [pytest.mark.train, pytest.mark.long]

SCRIPT = """
import json, sys
from pathlib import Path
import torch
sys.path.insert(0, sys.argv[1])
torch.set_num_threads(1)
from rl_world import make_trainer, random_rows, weights
from nla_hub.testing import RandomPair
from nla_hub.sidecar import Site
from nla_hub.training.processes import Processes
from nla_hub.training.recipe import LoRASpec, RewardSpec

root = Path(sys.argv[2])
processes = Processes.here()
pair = RandomPair(root, root / "source", root / "av", root / "ar", Site(2))
trainer, watcher = make_trainer(
    pair, root / f"state-{processes.world}", steps=3, watch=True, world=processes.world, rows=random_rows(16),
    labels=random_rows(9, seed=4), label_share=0.5, reward=RewardSpec(contrastive=0.2), rollout_block=8,
    lora=LoRASpec(r=4, alpha=8) if sys.argv[3] == "lora" else None,
)
texts = []
sample = trainer._roll_out
def kept(rows):
    rollout = sample(rows)
    texts.append([list(c.ids) for c in rollout.completions])
    return rollout
trainer._roll_out = kept
trainer.train()
result = {
    "figures": watcher.figures,
    "reward": [log["reward"] for log in watcher.logs],
    "samples": texts,
    "policy": weights(trainer.model)[::37].tolist(),
    "ar": weights(trainer.scoring.ar.model)[::37].tolist(),
}
Path(root / f"result-{processes.world}-{processes.rank}.json").write_text(json.dumps(result))
processes.close()
"""


@pytest.mark.parametrize("weights", ["full", "lora"])
def test_two_processes_sample_and_learn_what_one_does(tmp_path: Path, weights: str) -> None:
    random_pair(tmp_path, "llama")
    for world in (1, 2):
        ends = launch(["-c", SCRIPT, str(Path(__file__).parent), str(tmp_path), weights], world)
        assert [code for code, _, _ in ends] == [0] * world, ends
    one, first, second = (
        json.loads((tmp_path / f"result-{name}.json").read_text(encoding="utf-8")) for name in ("1-0", "2-0", "2-1")
    )
    shared = [a + b for a, b in zip(first["samples"], second["samples"], strict=True)]
    assert shared == one["samples"], "row-keyed draws: the same samples in the same order"
    assert len(one["figures"]) == 3
    assert first["reward"] == pytest.approx(one["reward"], abs=1e-4)
    assert first["reward"] == second["reward"], "both processes know the same figures"
    for alone, together, other in zip(one["figures"], first["figures"], second["figures"], strict=True):
        for name in ("kl", "mse", "cosine", "watch_cosine", "ar_loss", "watch_loss", "contrast", "repetition", "fve"):
            assert together[name] == pytest.approx(alone[name], abs=1e-4), name
            assert together[name] == other[name], name
        assert together["statuses"] == alone["statuses"]
        assert together["loss_difference"] < 1e-4
        assert together["logprob_difference"] < 1e-4
    assert first["policy"] == second["policy"]
    assert first["ar"] == second["ar"]
    for name in ("policy", "ar"):
        assert first[name] == pytest.approx(one[name], abs=2e-4), name
