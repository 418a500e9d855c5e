"""Plug-ins come through the same door as our own parts; a broken one costs only its own name."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from plugin_site import install, install_example, install_module, plugged
from transformers import GraniteConfig, GraniteForCausalLM, LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner

from nla_hub import NLA, registry
from nla_hub.adapters import Adapter, adapter_for
from nla_hub.cli.app import app
from nla_hub.engines import transformers as engine_module
from nla_hub.engines.base import Completion, LoadedAV
from nla_hub.engines.transformers import TransformersEngine
from nla_hub.errors import InjectionError, NLAError, UnknownNameError
from nla_hub.registry import Plugin
from nla_hub.testing import check_adapter, check_engine, random_av, random_model
from nla_hub.training.labelers import LabelRequest

ROOT = Path(__file__).resolve().parents[1]
OURS = list(registry.engines.builtin)
REGISTRIES = (registry.adapters, registry.engines, registry.labelers, registry.corpora, registry.zoos)
runner = CliRunner()


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Path]:
    """An empty directory of plug-ins; call `registry.refresh()` after installing into it."""
    place = tmp_path / "site"
    place.mkdir()
    with plugged(place):
        yield place


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with `site`, where the example plug-in is installed, and `cache`, where it keeps its weights."""
    place = tmp_path_factory.mktemp("example")
    install_example(place / "site")
    return place


@pytest.fixture
def example(installed: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The example plug-in, there for one test; the directory of its cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(installed / "cache"))
    with plugged(installed / "site"):
        yield installed / "cache"


# -- our own come through the door ---------------------------------------------------------------------------


def test_pyproject_declares_the_entry_points_that_the_registry_holds() -> None:
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["entry-points"]
    assert declared == {r.group: r.builtin for r in REGISTRIES}
    assert tuple(r.group for r in REGISTRIES) == registry.GROUPS
    assert [list(declared[r.group]) for r in REGISTRIES] == [list(r.builtin) for r in REGISTRIES]


@pytest.mark.parametrize(
    ("kind", "name"),
    [(r, name) for r in REGISTRIES for name in r.builtin],
    ids=lambda value: getattr(value, "kind", value),
)
def test_our_own_parts_load_through_the_same_check(kind: registry.Registry[Any], name: str) -> None:
    assert kind.get(name) is kind.get(name)
    assert kind.origin(name) == "nla-hub"


def test_a_checkout_without_metadata_knows_its_own_names(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "distributions", lambda: [])
    registry.refresh()
    assert registry.engines.names() == list(registry.engines.builtin)
    assert runner.invoke(app, ["models", "show", "tiny"]).exit_code == 0
    monkeypatch.undo()
    registry.refresh()


@pytest.mark.parametrize("name", registry.adapters.builtin)
def test_our_adapters_pass_the_public_check(name: str) -> None:
    check_adapter(registry.adapters.get(name), partial(random_model, name))


def test_our_engine_passes_the_public_check(av: LoadedAV) -> None:
    """tests/test_vllm.py has the one for vLLM; where the weights are elsewhere nothing can be checked."""
    check_engine(registry.engines.get("transformers"), av)
    with pytest.raises(NLAError, match="elsewhere"):
        check_engine(registry.engines.get("remote"), av)


@pytest.fixture(scope="module")
def av(tmp_path_factory: pytest.TempPathFactory) -> LoadedAV:
    return random_av(tmp_path_factory.mktemp("av"), partial(random_model, "llama"))


# -- the example ---------------------------------------------------------------------------------------------


def test_the_example_adds_its_names_behind_ours(example: Path) -> None:
    from nla_hub.zoo import entry, zoo

    assert [p for p in registry.plugins() if p.state == "ok"] == registry.plugins() != []
    assert {(p.group, p.name) for p in registry.plugins()} == {
        ("nla_hub.adapters", "olmo2"),
        ("nla_hub.engines", "uncached"),
        ("nla_hub.labelers", "last-words"),
        ("nla_hub.zoo", "example"),
    }
    assert {(p.distribution, p.version) for p in registry.plugins()} == {("nla-hub-example", "0.1.0")}
    assert registry.adapters.names() == [*registry.adapters.builtin, "olmo2"]
    assert registry.broken() == []
    assert list(zoo())[-1] == "example-olmo2"
    found = entry("example-olmo2")
    assert (found.distribution, found.layer, found.n_layers, found.d_model) == ("nla-hub-example", 2, 4, 64)
    assert found.packaged
    assert found.av == str(example / "nla-hub-example" / "0.1.0" / "av")


def test_models_treats_the_examples_pair_like_ours(example: Path) -> None:
    rows = [json.loads(line) for line in runner.invoke(app, ["models", "ls", "--json"]).stdout.splitlines()]
    assert [row["name"] for row in rows if row["distribution"] != "nla-hub"] == ["example-olmo2"]
    shown = runner.invoke(app, ["models", "show", "example-olmo2"]).stdout
    assert "nla-hub-example (a plug-in)" in shown
    assert "2/4" in shown
    assert runner.invoke(app, ["models", "search", "OLMO", "random"]).stdout.count("example-olmo2") == 1


def test_the_examples_adapter_and_engine_pass_the_public_checks(example: Path, tmp_path: Path) -> None:
    from nla_hub_example.family import random_olmo2  # type: ignore[import-not-found]

    check_adapter(registry.adapters.get("olmo2"), random_olmo2)
    check_engine(registry.engines.get("uncached"), random_av(tmp_path, random_olmo2))


def test_the_examples_pair_runs_on_both_engines(example: Path) -> None:
    first = NLA.from_pretrained("example-olmo2")
    second = NLA.from_pretrained("example-olmo2", engine="uncached")
    assert (first.av.engine.name, second.av.engine.name) == ("transformers", "uncached")
    texts = ["the cat sees a house", "a story in the night"]
    for temperature in (0.0, 1.0):
        rows, others = (nla.explain(texts, temperature=temperature, max_new_tokens=8) for nla in (first, second))
        assert [row.raw for row in rows] == [row.raw for row in others]
        assert len({row.raw for row in rows}) == 2


def test_the_examples_labeler_is_found_by_recipes(example: Path) -> None:
    from nla_hub.tiny.world import documents
    from nla_hub.training.data import make_labeler
    from nla_hub.training.recipe import LabelSpec

    labeler = make_labeler(LabelSpec(labeler="last-words"))
    document = next(d for d in documents(20, 0, "train") if isinstance(d.content, str))
    read = document.content[:40]
    assert labeler.label([LabelRequest(document, 40), LabelRequest(document, 0)]) == [" ".join(read.split()[-5:]), None]


def test_the_commands_in_a_process_of_its_own(example: Path, tmp_path: Path) -> None:
    """PYTHONPATH alone, as in a fresh shell: nothing of this process is there."""
    script = (
        "import sys\nfrom nla_hub.cli.app import app\n"
        "for words in (['models', 'ls'], ['explain', 'the cat', '--nla', 'example-olmo2'],\n"
        "              ['doctor', '--nla', 'example-olmo2']):\n"
        "    print('$', *words, flush=True)\n"
        "    try: app(words)\n"
        "    except SystemExit as end: print('exit', end.code or 0, flush=True)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(example.parent / "site"), "XDG_CACHE_HOME": str(example)}
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment, cwd=tmp_path, capture_output=True, text=True, check=False
    )
    listed, explained, doctored = done.stdout.split("$ ")[1:]
    assert "example-olmo2" in listed
    assert "nla-hub-example" in listed
    assert "reads L2" in doctored
    assert "nla-hub-example 0.1.0" in doctored
    assert [part.rstrip().splitlines()[-1] for part in (listed, explained, doctored)] == ["exit 0"] * 3, done.stderr


# -- broken ones ---------------------------------------------------------------------------------------------

ENGINE = """
class thing:
    name = "mine"
    kinds = frozenset({"add"})
    def __init__(self, av): ...
    def generate(self, vectors, draws, *, temperature, max_new_tokens, batch_size, progress=None): ...
    def probe(self): ...
    def close(self): ...
"""

BROKEN = {
    "import error": ("adapters", "import no_such_module", "ModuleNotFoundError: No module named 'no_such_module'"),
    "syntax error": ("engines", "thing = (", "SyntaxError"),
    "raises": ("labelers", "raise RuntimeError('out of order')", "RuntimeError: out of order"),
    "leaves": ("corpora", "import sys; sys.exit('no licence')", "SystemExit: no licence"),
    "no attribute": ("adapters", "other = 1", "AttributeError: module 'plugin_acme' has no attribute 'thing'"),
    "no adapter": (
        "adapters",
        "thing = 3",
        "This is no adapter (got an object of type int",
    ),
    "other name": (
        "adapters",
        "from nla_hub.adapters import Adapter\nthing = Adapter('yours', ('yours',))",
        "name: got 'yours', expected 'mine'",
    ),
    "reads nothing": (
        "adapters",
        "from nla_hub.adapters import Adapter\nthing = Adapter('mine', ())",
        "reads no model",
    ),
    "no engine": ("engines", "class thing: name = 'mine'", "kinds: missing"),
    "half an engine": ("engines", ENGINE.replace("def probe", "def test"), "probe: missing, expected a method"),
    "an instance": ("engines", ENGINE + "\nthing = thing(None)", "got an object of type thing, expected a class"),
    "other kinds": ("engines", ENGINE.replace('"add"', '"magic"'), "kinds: got frozenset({'magic'})"),
    "other arguments": (
        "engines",
        ENGINE.replace("draws, *, temperature", "*, seed"),
        "generate: cannot be called with",
    ),
    "no labeler": ("labelers", "class thing: pass", "label: missing, expected a method"),
    "no corpus": ("corpora", "thing = 'documents'", "This is no corpus (got an object of type str"),
    "no pairs": ("zoo", "def thing(): return 3", "got int"),
    "pairs raise": ("zoo", "def thing(): return 1 / 0", "ZeroDivisionError"),
    "faulty pairs": ("zoo", "thing = {'mine': {'av': 'a/b'}}", "entries.mine.ar: missing"),
    "no file": ("zoo", "thing = '/no/such/file.yaml'", "/no/such/file.yaml"),
}
BY_GROUP = {r.group.removeprefix("nla_hub."): r for r in REGISTRIES}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_plugin_is_named_with_distribution_version_and_cause(
    case: str, site: Path, caplog: pytest.LogCaptureFixture
) -> None:
    group, source, cause = BROKEN[case]
    install_module(site, "acme", "1.2", f"nla_hub.{group}", "mine", source)
    registry.refresh()
    kind = BY_GROUP[group]
    for _ in range(2):  # the second answer is remembered, and as good as the first
        with pytest.raises(NLAError) as caught:
            kind.get("mine")
        text = str(caught.value)
        assert f"The {kind.kind} 'mine' of the plug-in acme 1.2 cannot be used" in text
        assert cause in text
        assert "update or uninstall acme" in text
    (found,) = registry.plugins()
    assert replace(found, cause=None) == Plugin(f"nla_hub.{group}", "mine", "acme", "1.2", "broken", None)
    assert found.cause is not None
    assert cause in found.cause
    assert "\n" not in found.cause
    assert registry.broken() == [found]
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            assert [name for name, _ in kind.items()] == list(kind.builtin)
    assert caplog.text.count("acme 1.2") == 1
    assert caplog.text.count("it is left out") == 1


def test_a_good_plugin_beside_a_broken_one_of_the_same_group(site: Path) -> None:
    install_module(site, "acme", "1", "nla_hub.engines", "torn", "raise RuntimeError")
    install_module(site, "good", "2", "nla_hub.engines", "mine", ENGINE)
    registry.refresh()
    assert [name for name, _ in registry.engines.items()] == [*OURS, "mine"]
    assert registry.engines.origin("mine") == "good"
    assert registry.engines.names() == [*OURS, "mine", "torn"]
    with pytest.raises(UnknownNameError, match="did you mean 'torn'"):
        registry.engines.get("torm")


def test_a_broken_adapter_disturbs_no_model(site: Path, caplog: pytest.LogCaptureFixture) -> None:
    install_module(site, "acme", "1.2", "nla_hub.adapters", "mine", "raise RuntimeError('out of order')")
    registry.refresh()
    config = random_model("llama", 64).config
    assert adapter_for(config).name == "llama"
    config.model_type = "another"
    with pytest.raises(UnknownNameError, match="'another'"):
        adapter_for(config)
    assert "acme 1.2" in caplog.text, "the family asked for may well be the broken plug-in's"


def test_a_plugin_never_replaces_one_of_our_names(site: Path, caplog: pytest.LogCaptureFixture) -> None:
    install_module(site, "acme", "1.2", "nla_hub.engines", "transformers", ENGINE)
    registry.refresh()
    for _ in range(2):
        assert registry.engines.get("transformers") is TransformersEngine
        assert registry.engines.names() == OURS
    assert caplog.text.count("acme 1.2 may not replace our engine 'transformers'") == 1
    (found,) = registry.broken()
    assert found.cause == "this name is nla-hub's own engine, which no plug-in replaces"


def test_two_plugins_with_one_name_are_both_named(site: Path) -> None:
    install_module(site, "acme", "1.2", "nla_hub.engines", "mine", ENGINE)
    install_module(site, "zeta", "3.4", "nla_hub.engines", "mine", ENGINE)
    registry.refresh()
    with pytest.raises(NLAError, match=r"engine 'mine' comes from 2 plug-ins \(got acme 1.2 and zeta 3.4\)") as caught:
        registry.engines.get("mine")
    assert "uninstall all of them but one" in str(caught.value)
    assert [name for name, _ in registry.engines.items()] == OURS
    assert [(p.distribution, p.state) for p in registry.plugins()] == [("acme", "broken"), ("zeta", "broken")]


def test_old_metadata_of_our_own_is_no_plugin(site: Path) -> None:
    install(site, "NLA_hub", "0.0.1", {"nla_hub.engines": {"gone": "nla_hub.gone:Engine"}})
    registry.refresh()
    assert registry.engines.names() == OURS
    assert registry.plugins() == []


def test_metadata_that_nobody_can_read_hides_nobody(site: Path, caplog: pytest.LogCaptureFixture) -> None:
    install(site, "torn", "1", {"nla_hub.engines": {"torn": "torn:thing"}})
    (site / "torn-1.dist-info" / "entry_points.txt").write_text("[nla_hub.engines]\nno equals sign\n")
    install(site, "bare", "1", {"nla_hub.engines": {"bare": "not a : place"}})
    (site / "bare-1.dist-info" / "METADATA").unlink()
    install_module(site, "good", "2", "nla_hub.engines", "mine", ENGINE)
    registry.refresh()
    assert registry.engines.names() == [*OURS, "bare", "mine"]
    assert [name for name, _ in registry.engines.items()] == [*OURS, "mine"]
    assert caplog.text.count("the entry points of torn cannot be read") == 1
    (found,) = registry.broken()
    assert (found.name, found.distribution, found.version) == ("bare", None, None)
    with pytest.raises(NLAError, match="'bare' of the plug-in an unknown distribution cannot be used"):
        registry.engines.get("bare")


def test_the_first_distribution_of_a_name_counts(site: Path, tmp_path: Path) -> None:
    install_module(site, "acme", "2", "nla_hub.engines", "mine", ENGINE)
    older = tmp_path / "older"
    older.mkdir()
    install_module(older, "acme", "1", "nla_hub.engines", "old", ENGINE)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "path", [*sys.path, str(older)])
        registry.refresh()
        assert [(p.name, p.version) for p in registry.plugins()] == [("mine", "2")]


# -- the checks can fail -------------------------------------------------------------------------------------

LLAMA: Adapter = registry.adapters.get("llama")

WRONG_ADAPTERS: dict[str, tuple[Callable[[], Any], str]] = {
    "no adapter": (lambda: "llama", "got a str"),
    "no model": (lambda: replace(LLAMA, name="x", model_types=("x",)), "are read by the adapter 'llama' already"),
    "trunk": (lambda: replace(LLAMA, trunk_paths=("decoder",)), "finds no 'layers'"),
    "blocks": (lambda: replace(LLAMA, blocks="h"), "finds no 'h'"),
    "embedding": (lambda: replace(LLAMA, embedding="norm"), "'norm' is not the input embedding"),
    "final_norm": (lambda: replace(LLAMA, final_norm="ln_f"), "final_norm: AttributeError"),
    "lm_head": (lambda: replace(LLAMA, lm_head="head"), "'head' is not the output layer"),
    "ignored_weights": (
        lambda: replace(LLAMA, ignored_weights=("mlp",)),
        "match weights that the model uses: model.layers.0",
    ),
    "causal_prefix": (lambda: replace(LLAMA, causal_prefix="decoder."), "are not named as in a causal LM: decoder."),
    "untrained_norm": (lambda: Bare(**vars(LLAMA)), "an AR with a trained final norm was loaded"),
    "off by one": (lambda: Shifted(**vars(LLAMA)), "capture: output of block 0"),
    "norm kept": (lambda: Keeping(**vars(LLAMA)), "trunk that ends at L0"),
    "too long": (lambda: Uncut(**vars(LLAMA)), "4 blocks for L0, expected 1"),
}


class Shifted(Adapter):
    """Takes block K for layer K+1."""

    def block(self, model: Any, site: Any) -> Any:
        return self.block_list(model)[max(site.layer - 1, 0)] if site.layer else self.block_list(model)[1]


class Keeping(Adapter):
    """Leaves the final norm where it is."""

    def drop_final_norm(self, model: Any) -> None:
        return None


class Uncut(Adapter):
    """Truncates nothing."""

    def truncate_config(self, config: Any, site: Any) -> Any:
        return config


class Bare(Adapter):
    """Takes every norm for an untrained one."""

    def is_untrained_norm(self, name: str, value: torch.Tensor) -> bool:
        return True


def plain_llama(vocab_size: int, *, seed: int, layers: int) -> Any:
    """A random model made without an adapter, however wrong that may be."""
    torch.manual_seed(seed)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 2, "num_hidden_layers": layers}
    return LlamaForCausalLM(LlamaConfig(vocab_size=vocab_size, initializer_range=0.15, **sizes)).eval()


def test_the_model_for_wrong_adapters_is_right() -> None:
    check_adapter(LLAMA, plain_llama)


@pytest.mark.parametrize("case", WRONG_ADAPTERS)
def test_check_adapter_finds(case: str) -> None:
    make, fault = WRONG_ADAPTERS[case]
    with pytest.raises(NLAError) as caught:
        check_adapter(make(), plain_llama)
    assert any(fault in line for line in caught.value.faults), str(caught.value)
    assert registry.adapters.get("llama") is LLAMA, "what was lent is gone"


def test_check_adapter_finds_a_family_that_multiplies_outside_of_its_embedding() -> None:
    """Granite's factor would scale an overwritten row too."""

    def granite(vocab_size: int, *, seed: int, layers: int) -> Any:
        torch.manual_seed(seed)
        sizes = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 2, "num_hidden_layers": layers}
        config = GraniteConfig(vocab_size=vocab_size, initializer_range=0.15, embedding_multiplier=3.0, **sizes)
        return GraniteForCausalLM(config).eval()

    with pytest.raises(NLAError) as caught:
        check_adapter(Adapter("granite", ("granite",)), granite)
    (fault,) = caught.value.faults
    assert fault.startswith("injection 'overwrite': change of the row that enters block 0: relative difference")


def test_check_adapter_lists_all_faults_and_names_the_factory() -> None:
    with pytest.raises(NLAError) as caught:
        check_adapter(replace(LLAMA, embedding="norm", lm_head="head"), plain_llama)
    assert [fault.split(":")[0] for fault in caught.value.faults] == ["embedding", "lm_head"]
    with pytest.raises(NLAError, match="gave 2 blocks where 4 were asked for"):
        check_adapter(LLAMA, lambda vocab_size, *, seed, layers: plain_llama(vocab_size, seed=seed, layers=2))


class Base(TransformersEngine):
    """A good engine of one kind, to be spoilt."""

    kinds = frozenset({"overwrite"})

    def generate(self, vectors: Any, draws: Any, **settings: Any) -> list[Completion]:
        return [self.change(c) for c in super().generate(vectors, draws, **settings)]

    def change(self, completion: Completion) -> Completion:
        return completion


class Deaf(Base):
    def generate(self, vectors: Any, draws: Any, **settings: Any) -> list[Completion]:
        return super().generate(torch.ones_like(vectors), draws, **settings)


class Greedy(Base):
    def generate(self, vectors: Any, draws: Any, **settings: Any) -> list[Completion]:
        return super().generate(vectors, None, **settings)


class Mute(Base):
    def change(self, completion: Completion) -> Completion:
        return replace(completion, text="")


class Sure(Base):
    def change(self, completion: Completion) -> Completion:
        return replace(completion, logprobs=completion.logprobs * 0)


class Bounded(Base):
    def change(self, completion: Completion) -> Completion:
        return replace(completion, finish="length")


class Spelled(Base):
    """Stops at a closing tag only where it is one token."""

    def __init__(self, av: LoadedAV) -> None:
        super().__init__(av)
        at = self._endings.at
        self._endings.at = lambda ids: at(ids[-1:])  # type: ignore[method-assign]


class PastEos(Base):
    def __init__(self, av: LoadedAV) -> None:
        super().__init__(av)
        self._endings.eos = frozenset()


class Shuffled(Base):
    """Mixes up the rows of some batches, and refuses every AV."""

    def generate(self, vectors: Any, draws: Any, *, batch_size: int, **settings: Any) -> list[Completion]:
        found = super().generate(vectors, draws, batch_size=batch_size, **settings)
        return found[::-1] if batch_size == 3 else found

    def probe(self) -> None:
        raise InjectionError("I trust nobody.")


class Careless(Base):
    """Takes every kind, believes every AV, tells nobody, and holds on to what it closed."""

    closed = False

    def __init__(self, av: LoadedAV) -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(engine_module, "require_kind", lambda *_: None)
            super().__init__(av)

    def generate(self, vectors: Any, draws: Any, *, progress: Any = None, **settings: Any) -> list[Completion]:
        return super().generate(vectors, draws, **settings)

    def probe(self) -> None:
        return None

    def close(self) -> None:
        if self.closed:
            raise RuntimeError("closed already")
        self.closed = True


WRONG_ENGINES: dict[type[Base], tuple[str, ...]] = {
    Deaf: ("overwrite: greedy, batches of 1: row 0 differs from token 0 on", "overwrite: drawn, batches of 7: row"),
    Greedy: ("overwrite: drawn, batches of 1: row",),
    Mute: ("text is ''",),
    Sure: ("a log-probability is off by",),
    Bounded: ("finish is 'length', expected 'tag'",),
    Spelled: ("overwrite: where a row ends: row 3",),
    PastEos: ("overwrite: where a row ends: row 2",),
    Shuffled: ("overwrite: greedy, batches of 3: row", "overwrite: probe: I trust nobody."),
    Careless: (
        "kind 'add': not declared, but an AV of this kind is taken",
        "kinds: an AV of a kind that is not declared is taken",
        "progress was told of 0 rows",
        "overwrite: probe of an AV that does not read its vector: accepted",
        "close: RuntimeError: closed already",
    ),
}


def test_the_engine_that_is_spoilt_is_good(av: LoadedAV) -> None:
    check_engine(Base, av)


@pytest.mark.parametrize("engine", WRONG_ENGINES, ids=lambda engine: engine.__name__)
def test_check_engine_finds(engine: type[Base], av: LoadedAV) -> None:
    with pytest.raises(NLAError) as caught:
        check_engine(engine, av)
    for fault in WRONG_ENGINES[engine]:
        assert any(fault in found for found in caught.value.faults), f"{fault}: {caught.value}"


def test_check_engine_finds_what_has_no_shape(av: LoadedAV) -> None:
    class Half:
        name = "half"
        kinds = frozenset({"overwrite"})

    with pytest.raises(NLAError) as caught:
        check_engine(Half, av)  # type: ignore[arg-type]
    assert [fault.split(":")[0] for fault in caught.value.faults] == ["__init__", "generate", "probe", "close"]
