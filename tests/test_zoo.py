"""The zoo: every named pair is complete, pinned or said to be unpinned, and no figure stands without its provenance."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from importlib.metadata import EntryPoint, EntryPoints
from pathlib import Path
from typing import Any

import pytest

from nla_hub import registry
from nla_hub import zoo as zoo_module
from nla_hub.errors import NLAError, UnknownNameError
from nla_hub.resources import data_directory
from nla_hub.sidecar import Injection, MarkerTokens, Score, Sidecar, Site
from nla_hub.zoo import ZooEntry, entry, read_entries, zoo

RELEASED = {
    "qwen2.5-7b": ("Qwen/Qwen2.5-7B-Instruct", 20, 28, 3584, "kitft/nla-qwen2.5-7b-L20-av", None),
    "gemma-3-12b": ("google/gemma-3-12b-it", 32, 48, 3840, "kitft/nla-gemma3-12b-L32-av", "7aec2259"),
    "gemma-3-27b": ("google/gemma-3-27b-it", 41, 62, 5376, "kitft/nla-gemma3-27b-L41-av", "4e721238"),
    "llama-3.3-70b": ("meta-llama/Llama-3.3-70B-Instruct", 53, 80, 8192, "kitft/Llama-3.3-70B-NLA-L53-av", None),
}

HUB_ENTRY: dict[str, Any] = {
    "av": "me/x-av",
    "ar": "me/x-ar",
    "base": "me/x",
    "layer": 3,
    "n_layers": 6,
    "d_model": 8,
    "licence": "apache-2.0",
    "adapter": "llama",
    "summary": "A test.",
}


@pytest.fixture(autouse=True)
def _fresh_cache() -> Iterator[None]:
    zoo.cache_clear()
    yield
    zoo.cache_clear()


def test_our_names_in_order() -> None:
    assert list(zoo()) == ["tiny", *RELEASED]


@pytest.mark.parametrize("name", RELEASED)
def test_released_pairs(name: str) -> None:
    base, layer, n_layers, d_model, av, revision = RELEASED[name]
    found = entry(name)
    assert (found.base, found.layer, found.n_layers, found.d_model, found.av) == (base, layer, n_layers, d_model, av)
    assert (found.av_revision or "").startswith(revision or "")
    assert found.site == Site(layer)
    assert found.where("av") == f"{av}@{found.av_revision or 'unpinned'}"
    assert found.measured() is None, "nothing about it was measured by this project yet"
    assert found.base_gated == (found.licence != "apache-2.0")


@pytest.mark.parametrize("name", ["tiny", *RELEASED])
def test_entries_name_real_things(name: str) -> None:
    found = entry(name)
    assert found.adapter in registry.adapters.names()
    assert found.recipe is None or (data_directory("recipes") / f"{found.recipe}.yaml").is_file()
    assert found.card is None or list(data_directory("model_cards").glob(f"*{found.card}*"))
    for revision in (found.av_revision, found.ar_revision, found.base_revision):
        assert revision is None or re.fullmatch(r"[0-9a-f]{40}", revision)


def test_published_figures_are_marked_and_others_are_not_measured() -> None:
    assert entry("qwen2.5-7b").score_text() == "published: 0.752, raw variance, Fraser-Taliente et al. 2026"
    assert entry("gemma-3-27b").score_text() == "published: 0.763, raw variance, Fraser-Taliente et al. 2026"
    assert entry("gemma-3-12b").score_text() == entry("llama-3.3-70b").score_text() == "not measured"


def test_tiny_takes_its_facts_from_the_packaged_sidecar(tmp_path: Path) -> None:
    sidecar = Sidecar(
        role="av",
        d_model=16,
        site=Site(2),
        marker=MarkerTokens("x", 1, 2, 3),
        av_template="<{injection_char}>",
        injection=Injection("overwrite", 5.0),
        fve=Score(0.7, "raw_variance", "tiny-eval-v1", 1200, cosine=0.9, protocol="tiny-eval-v1", commit="abc1234"),
    )
    half = tmp_path / "av"
    half.mkdir()
    sidecar.write(half)
    (half / "config.json").write_text('{"num_hidden_layers": 5}')
    packaged = {**HUB_ENTRY, "av": f"package:{half}", "ar": "package:ar", "base": "package:source"}
    for key in ("layer", "n_layers", "d_model"):
        del packaged[key]
    found = read_entries({"mine": packaged})["mine"]
    assert (found.layer, found.n_layers, found.d_model, found.packaged) == (2, 5, 16, True)
    assert found.measured() == sidecar.fve
    assert found.score_text() == "FVE (raw variance, tiny-eval-v1, n=1200): 0.700, cosine 0.900 [tiny-eval-v1, abc1234]"


def test_a_packaged_pair_that_is_not_there_is_unknown_not_zero() -> None:
    missing = {**HUB_ENTRY, "av": "package:no/such/directory", "layer": None}
    found = read_entries({"mine": missing})["mine"]
    assert found.site is None
    assert found.measured() is None
    assert found.score_text() == "not measured"


def test_unknown_name() -> None:
    with pytest.raises(UnknownNameError, match=r"did you mean 'gemma-3-12b'"):
        entry("gemma-3-12")


def test_faults_of_several_entries_at_once() -> None:
    wrong = {**HUB_ENTRY, "layer": 6, "licens": "mit"}
    with pytest.raises(NLAError) as caught:
        read_entries(
            {
                "a": {**HUB_ENTRY, "av": "./here"},
                "b": {**HUB_ENTRY, "layer": 6},
                "c": wrong,
                "d": {**HUB_ENTRY, "scores": [{"published": "high", "baseline": "raw_variance", "source": "x"}]},
                "e": {**HUB_ENTRY, "d_model": None},
                "f": {**HUB_ENTRY, "scores": [{"value": 0.5}]},
            }
        )
    text = str(caught.value)
    assert "entries.a.av: got './here', expected owner/name or package:DIR" in text
    assert "entries.b.layer: got 6, expected 0 to 5" in text
    assert "entries.c.licens: unknown key; did you mean 'licence'?" in text
    assert "entries.d.scores[0].published: got 'high', expected a number" in text
    assert "entries.e.av: an entry on the Hub needs layer, n_layers and d_model" in text
    assert "entries.f.scores[0].baseline: missing" in text, "a figure never stands without its baseline"


# -- plug-ins ------------------------------------------------------------------------------------------------

PLUGIN = sys.modules[__name__]


def from_callable() -> Mapping[str, Any]:
    return {"mine": HUB_ENTRY, "tiny": HUB_ENTRY}


def broken() -> Mapping[str, Any]:
    raise RuntimeError("out of order")


def _install(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    points = EntryPoints(EntryPoint(name, f"{__name__}:{name}", zoo_module.GROUP) for name in names)
    monkeypatch.setattr(zoo_module, "entry_points", lambda group: points.select(group=group))


def test_a_plugin_adds_entries_and_replaces_none(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    _install(monkeypatch, "from_callable")
    assert entry("mine").base == "me/x"
    assert entry("tiny").packaged
    assert "may not replace the entry tiny" in caplog.text


def test_a_plugin_may_be_a_path(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    file = tmp_path / "more.yaml"
    file.write_text(
        "mine: {av: me/x-av, ar: me/x-ar, base: me/x, layer: 1, n_layers: 2, d_model: 4,\n"
        "  licence: mit, adapter: llama, summary: A test.}\n"
    )
    monkeypatch.setattr(PLUGIN, "from_path", file, raising=False)
    _install(monkeypatch, "from_path")
    assert entry("mine").licence == "mit"


def test_a_broken_plugin_costs_only_its_own_names(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    _install(monkeypatch, "broken", "from_callable")
    assert {"tiny", "mine"} <= set(zoo())
    assert "broken" in caplog.text
    assert "out of order" in caplog.text


def test_the_zoo_is_read_without_torch() -> None:
    code = "import sys, nla_hub.zoo as z; z.zoo(); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_entries_cannot_be_changed() -> None:
    with pytest.raises(TypeError):
        zoo()["x"] = ZooEntry("a/b", "a/b", "a/b", "mit", "llama", "x")  # type: ignore[index]
