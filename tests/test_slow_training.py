"""A pair from nothing by the packaged recipe. Minutes, so only on request: pytest -m slow"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from nla_hub.evaluation import check_gates, parse_gates

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]


def run(*arguments: str) -> float:
    """Wall seconds of an `nla-hub` command that must succeed."""
    started = time.perf_counter()
    subprocess.run([sys.executable, "-m", "nla_hub", *arguments], check=True, timeout=3600)
    return time.perf_counter() - started


def test_train_tiny_makes_a_pair_like_the_packaged_one(tmp_path: Path) -> None:
    seconds = run("train", "tiny", "-o", str(tmp_path / "run"))
    print(f"nla-hub train tiny: {seconds / 60:.1f} minutes")
    figures = json.loads((tmp_path / "run" / "eval" / "DONE").read_text(encoding="utf-8"))
    bars = (
        "fve>=0.70",
        "fve_sampled>=0.60",
        "fve>floor",
        "fve>floor_linear",
        "ok>=0.99",
        "share.next_word>=0.5",
        "share.last_word>=0.5",
        "share.kind>=0.5",
    )
    check_gates(parse_gates(bars), figures, where="a pair trained from nothing")


def test_a_rehearsal_runs_every_stage(tmp_path: Path) -> None:
    seconds = run("train", "tiny", "--rehearse", "-o", str(tmp_path / "run"))
    print(f"nla-hub train tiny --rehearse: {seconds:.0f} seconds")
    assert (tmp_path / "run" / "eval" / "DONE").is_file()
