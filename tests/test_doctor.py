"""`nla-hub doctor` about a pair: bytes before a download, the mode that fits, what to type where none does."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import Case
from hub_server import Hub
from typer.testing import CliRunner

from nla_hub import doctor, registry
from nla_hub.cli.app import app
from nla_hub.doctor import AUTO, Finding
from nla_hub.memory import RUNTIME
from nla_hub.registry import Plugin

runner = CliRunner()
RELEASED = ("qwen2.5-7b", "gemma-3-12b", "gemma-3-27b", "llama-3.3-70b")


def by_name(findings: Any) -> dict[str, Finding]:
    return {finding.name: finding for finding in findings}


def test_every_part_and_mode_of_a_pair_that_is_here(llama: Case) -> None:
    found = by_name(doctor.memory(str(llama.pair.root)))
    assert {"AV", "AR", "source up to its layer", "resident", "staged", "reckoned with", AUTO} == set(found)
    assert found["resident"].state == found["staged"].state == "ok"
    assert found[AUTO].found == "takes resident"
    assert "loaded in float32" in (found["AV"].found or "")


def test_it_says_what_auto_takes_and_what_does_not_fit(llama: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    from nla_hub.memory import MARGIN, estimate
    from nla_hub.pretrained import LoadOptions
    from nla_hub.sizing import pair_sizes, workload_of

    pair = doctor._opened(str(llama.pair.root), {})
    staged = estimate("staged", pair_sizes(pair, LoadOptions()), workload_of(pair))
    assert staged is not None
    monkeypatch.setattr("nla_hub.hardware.free_memory", lambda device: int(staged.peak / MARGIN) + 10)
    found = by_name(doctor.memory(str(llama.pair.root)))
    assert (found["resident"].state, found["staged"].state) == ("too large", "ok")
    assert (found[AUTO].found or "").startswith("takes staged")
    assert not any(finding.fatal for finding in found.values())


def test_a_pair_that_fits_nowhere_is_not_loaded(llama: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nla_hub.hardware.free_memory", lambda device: int(1.3 * RUNTIME))
    monkeypatch.setattr("nla_hub.NLA.from_pretrained", lambda *a, **k: pytest.fail("it was loaded"))
    result = runner.invoke(app, ["doctor", "--json", "--nla", str(llama.pair.root)])
    rows = [json.loads(line) for line in result.stdout.splitlines()]
    (worst,) = (row for row in rows if row["part"] == "pair" and row["state"] == "too large")
    assert "batch_size=1" in worst["next_step"]
    assert result.exit_code == 1
    assert "This pair does not work here" in result.stderr


def test_nothing_is_promised_where_nothing_would_fit(llama: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nla_hub.hardware.free_memory", lambda device: RUNTIME)
    (worst,) = (f for f in doctor.memory(str(llama.pair.root)) if f.fatal)
    assert worst.next_step == "use a machine with more memory, or a smaller pair"


@pytest.mark.parametrize("name", RELEASED)
def test_without_a_network_sizes_are_not_measured(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    (finding,) = doctor.memory(name)
    assert finding.state == "note" and not finding.fatal
    assert (finding.found or "").startswith("not measured: its sizes are on the Hub")
    assert not any(character.isdigit() and "iB" in (finding.found or "") for character in finding.found or "")


def test_a_directory_that_is_no_pair_is_a_finding(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (finding,) = doctor.memory(str(tmp_path))
    assert finding.fatal and finding.next_step


def test_plugins_are_listed_with_their_state(monkeypatch: pytest.MonkeyPatch) -> None:
    listed = [
        Plugin("nla_hub.adapters", "good", "acme-nla", "1.2", "ok"),
        Plugin("nla_hub.engines", "bad", "acme-nla", "1.2", "broken", "ImportError: no module"),
    ]
    monkeypatch.setattr(registry, "plugins", lambda: listed)
    good, bad = doctor.plugins()
    assert (good.name, good.state, good.found) == ("adapters: good", "ok", "acme-nla 1.2")
    assert (bad.state, bad.fatal) == ("broken", False)
    assert "ImportError" in (bad.found or "") and "acme-nla" in (bad.next_step or "")


def test_sizes_are_known_before_anything_is_downloaded(llama: Case, tmp_path: Path) -> None:
    """The real client against a local Hub: headers are requested in ranges, no weights are stored."""
    hub = Hub({"owner/x-av": llama.pair.av, "owner/x-ar": llama.pair.ar, "random/source": llama.pair.source})
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING"))}
    environment |= {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), "NO_PROXY": "127.0.0.1,localhost"}
    environment["PYTHONPATH"] = str(Path(__file__).parents[1])
    script = "import json\nfrom dataclasses import asdict\nfrom nla_hub import doctor\n"
    script += "print(json.dumps([asdict(f) for f in doctor.memory('owner/x-av')]))"
    try:
        done = subprocess.run(
            [sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=120, check=False
        )
    finally:
        hub.close()
    assert done.returncode == 0, done.stderr[-2000:]
    remote = {row["name"]: row["found"] for row in json.loads(done.stdout.splitlines()[-1])}
    here = by_name(doctor.memory(str(llama.pair.root)))
    for name in ("AV", "AR", "source up to its layer"):
        assert remote[name] == here[name].found
    assert not [p for p in (tmp_path / "home").rglob("*") if p.name.endswith(".safetensors")]
    asked = [r for r in hub.requests if r.path.endswith(".safetensors") and r.method == "GET"]
    assert asked and all(r.range for r in asked)


def test_a_plan_prints_bytes_of_every_stage_and_trains_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("trl", reason="needs the train extra")
    monkeypatch.chdir(tmp_path)
    result = runner.invoke(app, ["train", "tiny", "--plan", "--json"])
    *rows, last = [json.loads(line) for line in result.stdout.splitlines()]
    assert result.exit_code == 0
    assert [row["name"] for row in rows] == ["source", "data", "ar", "av", "rl", "export", "eval"]
    assert all(row["total"] == sum(row["bytes"].values()) for row in rows)
    assert all(row["total"] > 0 for row in rows if row["name"] != "export") and rows[5]["main_memory"] > 0
    assert last["usable"] is None and last["fits"]
    assert "as a note" in result.stderr
    assert list(tmp_path.iterdir()) == []
