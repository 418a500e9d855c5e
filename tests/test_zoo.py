"""The zoo: every named pair is complete, pinned or said to be unpinned, and no figure stands without its provenance."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from plugin_site import install_module, plugged
from typer.testing import CliRunner

from nla_hub import registry
from nla_hub.cli.app import app
from nla_hub.errors import InputError, NLAError, UnknownNameError
from nla_hub.locate import Ref, resolve_pair
from nla_hub.resources import data_directory
from nla_hub.sidecar import Injection, MarkerTokens, Score, Sidecar, Site
from nla_hub.zoo import ZooEntry, entry, known_sidecar, read_entries, zoo

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
    registry.refresh()
    yield
    registry.refresh()


def test_our_names_in_order() -> None:
    assert list(zoo())[:5] == ["tiny", *RELEASED]
    assert {found.distribution for found in zoo().values()} == {"nla-hub"}


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


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Path]:
    """An empty directory of plug-ins."""
    place = tmp_path / "site"
    place.mkdir()
    with plugged(place):
        yield place


def install(site: Path, distribution: str, source: str, point: str = "pairs") -> None:
    """Install pairs whose source is that of a module with a `thing`."""
    install_module(site, distribution, "1.0", "nla_hub.zoo", point, f"ENTRY = {HUB_ENTRY!r}\n{source}")
    registry.refresh()


def test_a_plugin_adds_entries_and_replaces_none(site: Path, caplog: pytest.LogCaptureFixture) -> None:
    ours = list(zoo())
    install(site, "acme", "def thing(): return {'mine': ENTRY, 'tiny': ENTRY}")
    assert entry("mine").base == "me/x"
    assert entry("mine").distribution == "acme"
    assert entry("tiny").packaged
    assert entry("tiny").distribution == "nla-hub"
    assert caplog.text.count("acme may not replace our pair 'tiny'") == 1
    assert list(zoo()) == [*ours, "mine"]


def test_a_plugin_may_be_a_file_with_directories_beside_it(site: Path, tmp_path: Path) -> None:
    file = tmp_path / "pairs" / "more.yaml"
    half = file.parent / "weights" / "av"
    half.mkdir(parents=True)
    marker = MarkerTokens("x", 1, 2, 3)
    Sidecar(role="av", d_model=16, site=Site(2), marker=marker, av_template="<{injection_char}>").write(half)
    file.write_text(
        "mine: {av: ./weights/av, ar: ./weights/ar, base: ../source, licence: mit, adapter: llama, summary: A test.}\n"
    )
    install(site, "acme", f"thing = {str(file)!r}")
    found = entry("mine")
    assert (found.licence, found.layer, found.d_model, found.packaged) == ("mit", 2, 16, True)
    assert (found.av, found.base) == (str(half.resolve()), str((tmp_path / "source").resolve()))
    assert found.where("av") == found.av, "a directory has no revision"
    refs = resolve_pair("mine")
    assert (refs.av and refs.av.kind, refs.av and refs.av.name) == ("directory", str(half.resolve()))
    with pytest.raises(InputError, match="has no revisions"):
        resolve_pair("mine@main")


def test_directories_of_a_mapping_are_absolute(site: Path, tmp_path: Path) -> None:
    install(site, "acme", f"from pathlib import Path\nthing = {{'mine': ENTRY | {{'av': Path({str(tmp_path)!r})}}}}")
    assert entry("mine").av == str(tmp_path)
    install(site, "zeta", "from pathlib import Path\nthing = {'other': ENTRY | {'av': Path('here')}}", "others")
    assert "other" not in zoo()
    assert "expected owner/name or package:DIR" in str(registry.broken()[0].cause)


def test_an_unknown_pair_may_be_that_of_a_broken_plugin(site: Path, caplog: pytest.LogCaptureFixture) -> None:
    install(site, "acme", "def thing(): raise RuntimeError('out of order')")
    install(site, "zeta", "thing = {'mine': ENTRY}", "others")
    assert {"tiny", "mine"} <= set(zoo())
    assert caplog.text.count("acme 1.0") == 1
    for ask in (entry, resolve_pair):
        with pytest.raises(UnknownNameError) as caught:
            ask("theirs")
        assert "The pairs of acme could not be read: RuntimeError: out of order" in str(caught.value)


def test_a_pair_of_two_plugins_is_neithers(site: Path, caplog: pytest.LogCaptureFixture) -> None:
    install(site, "acme", "thing = {'mine': ENTRY, 'a': ENTRY}")
    install(site, "zeta", "thing = {'mine': ENTRY, 'z': ENTRY}", "others")
    install(site, "beta", "thing = {'mine': ENTRY}", "more")
    assert list(zoo())[-2:] == ["z", "a"], "in the order of the entry points"
    assert "the pair 'mine' comes from beta and zeta and acme; it is left out" in caplog.text
    with pytest.raises(NLAError, match="'mine' comes from 3 plug-ins"):
        entry("mine")


def test_search() -> None:
    def found(*words: str) -> list[str]:
        result = CliRunner().invoke(app, ["models", "search", *words, "--json"])
        assert result.exit_code == 0
        return [json.loads(line)["name"] for line in result.stdout.splitlines()]

    gemmas = [name for name, e in zoo().items() if "gemma" in e.base]
    assert {"gemma-3-12b", "gemma-3-27b"} <= set(gemmas)
    assert found("GEMMA") == gemmas
    assert found("gemma", "41 of 62") == ["gemma-3-27b"], "the summary is searched too"
    assert "llama-3.3-70b" in found("meta-llama")
    assert found("packaged", "tiny") == ["tiny"]
    assert found("nla-hub") == list(zoo())
    assert found("apache-2.0") == [name for name, e in zoo().items() if e.licence == "apache-2.0"] != list(zoo())
    assert found("no-such-word") == []
    table = CliRunner().invoke(app, ["models", "search", "41 of 62"]).stdout.splitlines()
    assert [line.split()[0] for line in table] == ["name", "gemma-3-27b"]


def test_search_without_a_match_says_what_is_near(caplog: pytest.LogCaptureFixture) -> None:
    result = CliRunner().invoke(app, ["models", "search", "gema-3-12b"])
    assert (result.exit_code, result.stdout) == (0, "")
    assert "did you mean gemma-3-12b" in result.stderr


def test_the_zoo_is_read_without_torch() -> None:
    code = "import sys, nla_hub.zoo as z; z.zoo(); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_entries_cannot_be_changed() -> None:
    with pytest.raises(TypeError):
        zoo()["x"] = ZooEntry("a/b", "a/b", "a/b", "mit", "llama", "x")  # type: ignore[index]


def test_what_is_known_of_a_repository_holds_however_it_is_named() -> None:
    known = zoo()["gemma-3-12b-L24-achand45"]
    assert known.community and known.sidecar == {"injection": {"kind": "add"}, "ar_special_tokens": False}
    refs = resolve_pair("gemma-3-12b-L24-achand45")
    assert refs.av == Ref("hub", known.av, subfolder="rl_vllm/iter_000400")
    assert refs.ar == Ref("hub", known.ar, subfolder="rl_vllm/critic_latest")
    assert known_sidecar(Ref("hub", known.av), "av") == known.sidecar
    assert known_sidecar(refs.ar, "ar") == known.sidecar
    assert known_sidecar(Ref("hub", known.av, subfolder="rl_vllm/iter_000200"), "av") == known.sidecar
    assert known_sidecar(Ref("hub", known.av.capitalize()), "ar") == known.sidecar
    assert known_sidecar(Ref("hub", "owner/other"), "av") == {}
    assert known_sidecar(Ref("directory", known.av), "av") == {}
