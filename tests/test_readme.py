"""What the README and the card print is what the packaged pair does and what was measured on it."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest
from typer.testing import CliRunner

import nla_hub
from nla_hub.cli.app import app
from nla_hub.evaluation import EvalResult
from nla_hub.geometry import FVE
from nla_hub.sidecar import Sidecar
from nla_hub.zoo import entry

ROOT = Path(__file__).resolve().parents[1]
WEIGHTS = Path(nla_hub.__file__).parent / "tiny" / "weights"
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_first_screen_shows_what_the_command_really_prints() -> None:
    blocks = re.findall(r"^```(\w*)\n(.*?)^```", README, re.M | re.S)
    command, shown = blocks[0][1].strip(), blocks[1][1]
    words = shlex.split(command.split("&&")[-1])
    assert words[0].endswith("nla-hub")
    result = CliRunner().invoke(app, words[1:])
    assert result.exit_code == 0, result.output
    assert result.stdout.strip() == shown.strip()


def test_readme_zoo_sidecars_and_result_print_the_same_score() -> None:
    stored = [Sidecar.read(WEIGHTS / half).fve for half in ("av", "ar")]
    assert stored[0] == stored[1]
    score = stored[0]
    assert score is not None
    result = EvalResult.from_dict(json.loads((ROOT / "model_cards" / "tiny" / "eval.json").read_text(encoding="utf-8")))
    assert result.fve.value == pytest.approx(score.value, abs=5e-5)
    assert result.real.cosine == pytest.approx(score.cosine, abs=5e-5)
    line = str(FVE(score.value, "raw_variance", score.dataset, score.n))
    assert line in README
    assert f"{score.value:.3f}" in entry("tiny").score_text()


def test_the_card_says_which_weights_it_describes() -> None:
    steering = json.loads((ROOT / "model_cards" / "tiny" / "steering.json").read_text(encoding="utf-8"))
    assert steering["nla"] == "tiny"
    assert {row["vector"] for row in steering["rows"]} == {"nla", "random", "means"}


def test_the_packaged_pair_is_small_and_complete() -> None:
    files = [p for p in WEIGHTS.rglob("*.safetensors") if p.is_file()]
    assert sum(p.stat().st_size for p in files) < 12_000_000
    for half in ("source", "av", "ar"):
        assert (WEIGHTS / half / "model.safetensors").is_file()
        assert (WEIGHTS / half / "tokenizer.json").is_file()
    assert (WEIGHTS / "ar" / "value_head.safetensors").is_file()
