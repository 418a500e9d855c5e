"""The code on the cards runs as it stands there, and does what nla-hub does: for every family of the released pairs."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from conftest import Case, Spec
from huggingface_hub import constants
from parity import close, trunk_names
from safetensors.torch import save_file
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

from nla_hub import NLA
from nla_hub.publish.card import model_card
from nla_hub.publish.card.snippets import EXPLANATIONS, TEXT
from nla_hub.publish.facts import Form, Licence, ReleaseFacts, ReleaseNames
from nla_hub.publish.release import RepoRole
from nla_hub.sidecar import ReleaseRecord, Role, Sidecar
from nla_hub.testing import D_MODEL

COMMIT = "0123456789abcdef0123456789abcdef01234567"
NAMES = ReleaseNames("random/nla-x-L2-av", "random/nla-x-L2-ar", "v1")
BASE = "random/base"
TOKENS = 24
"""New tokens, instead of 200."""

SPECS = [
    *(Spec(family) for family in ("qwen2", "llama", "qwen3", "gpt2")),
    Spec("gemma3", wrapper=True),
    Spec("gemma3", kind="add"),
    Spec("llama", bos=False),
]
"""The families of the released pairs, one whose template can think, one with other names for its parts."""


@dataclass
class Published:
    """A pair in the Hub client's cache, as if it had been downloaded, and what its cards are made of."""

    case: Case
    cache: Path
    facts: ReleaseFacts

    def blocks(self, role: RepoRole) -> list[str]:
        """The Python of a card, in order."""
        return re.findall(r"^```python\n(.*?)\n```$", model_card(self.facts, role), re.MULTILINE | re.DOTALL)

    def run(self, code: str) -> dict[str, Any]:
        """Execute a block, with fewer new tokens; its names."""
        short = code.replace('"max_new_tokens": 200', f'"max_new_tokens": {TOKENS}')
        short = short.replace("temperature=0)", f"temperature=0, max_new_tokens={TOKENS})")
        names: dict[str, Any] = {"__name__": "__main__"}
        exec(compile(short, "card", "exec"), names)
        return names


def place(cache: Path, repo: str, directory: Path) -> None:
    """Put a directory into a cache under a repository's name, main and the tag naming its only commit."""
    folder = cache / f"models--{repo.replace('/', '--')}"
    (folder / "snapshots").mkdir(parents=True)
    (folder / "refs").mkdir()
    for ref in ("main", NAMES.tag):
        (folder / "refs" / ref).write_text(COMMIT)
    (folder / "snapshots" / COMMIT).symlink_to(directory, target_is_directory=True)


def copy_half(half: Path, to: Path, **changes: Any) -> Sidecar:
    """A copy of a half with another sidecar."""
    shutil.copytree(half, to)
    sidecar = Sidecar.read(half).with_(base_model=BASE, release=ReleaseRecord("abcdef012345", "v1"), **changes)
    sidecar.write(to)
    return sidecar


@pytest.fixture
def publish(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Published]]:
    transformers.logging.set_verbosity_error()  # of an AR it says that a final norm was made up, as the snippet does

    def make(case: Case, *, single: bool = False, form: Form = "full", **changes: Any) -> Published:
        names = replace(NAMES, ar=NAMES.av) if single else NAMES
        root = tmp_path / "pair"
        av = copy_half(case.pair.av, root / "av", pair_repo=names.ar)
        ar = copy_half(case.pair.ar, root / "ar", pair_repo=names.av, **changes)
        trap = {"repetition_penalty": 1.8, "do_sample": True, "temperature": 0.3, "eos_token_id": 2, "pad_token_id": 1}
        (root / "av" / "generation_config.json").write_text(json.dumps(trap))
        cache = tmp_path / "cache"
        if single:
            place(cache, names.av, root)
        else:
            place(cache, names.av, root / "av")
            place(cache, names.ar, root / "ar")
        place(cache, BASE, case.pair.source)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
        family = case.spec.architecture
        facts = ReleaseFacts(names, "abcdef012345", BASE, None, 4, family, av, ar, Licence("apache-2.0"), form=form)
        return Published(case, cache, facts)

    yield make
    transformers.logging.set_verbosity_warning()


def greedy(nla: NLA, vector: torch.Tensor) -> str:
    return nla.verbalize(vector, temperature=0, max_new_tokens=TOKENS).raw


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_both_snippets_of_both_cards_do_what_nla_hub_does(
    spec: Spec, make_case: Callable[[Spec], Case], publish: Callable[..., Published]
) -> None:
    pair = publish(make_case(spec))
    ours = pair.case.nla
    with_hub, with_transformers = (pair.run(code) for code in pair.blocks("av"))
    captured = ours.capture(TEXT, positions="last").vectors[0]
    close(with_transformers["vector"], captured)
    assert with_transformers["written"] == greedy(ours, captured) == with_hub["row"].raw
    expected = ours.reconstruct(EXPLANATIONS)
    close(with_hub["vectors"], expected)
    for code in pair.blocks("ar"):
        close(pair.run(code)["vectors"], expected)


def test_a_repository_with_both_halves_has_snippets_for_its_folders(
    llama: Case, publish: Callable[..., Published]
) -> None:
    pair = publish(llama, single=True)
    with_hub, av, ar = (pair.run(code) for code in pair.blocks("pair"))
    assert av["written"] == greedy(llama.nla, av["vector"]) == with_hub["row"].raw
    close(ar["vectors"], llama.nla.reconstruct(EXPLANATIONS))
    close(with_hub["vectors"], llama.nla.reconstruct(EXPLANATIONS))


@pytest.mark.parametrize(
    ("wrong", "right"),
    [
        ("states[2]", "states[3]"),
        ("* 1.0 / vector.norm()", '* contract["extraction"]["injection_scale"] / vector.norm()'),
        ('"repetition_penalty": 1.8', '"repetition_penalty": 1.0'),
        ("hidden[:, at - 1] =", "hidden[:, at] ="),
    ],
)
def test_a_wrong_av_snippet_would_be_found(
    wrong: str, right: str, llama: Case, publish: Callable[..., Published]
) -> None:
    pair = publish(llama)
    code = pair.blocks("av")[1]
    assert right in code
    found = pair.run(code.replace(right, wrong))
    captured = llama.nla.capture(TEXT, positions="last").vectors[0]
    assert found["written"] != greedy(llama.nla, captured)


@pytest.mark.parametrize(
    ("wrong", "right"),
    [
        ("add_special_tokens=False", "add_special_tokens=True"),
        ("trunk.norm = trunk.norm", "trunk.norm = torch.nn.Identity()"),
        ("hidden[:, -1]", "hidden[torch.arange(len(texts), device=mask.device), last]"),
    ],
)
def test_a_wrong_ar_snippet_would_be_found(
    wrong: str, right: str, llama: Case, publish: Callable[..., Published]
) -> None:
    pair = publish(llama)
    code = pair.blocks("ar")[1]
    assert right in code
    found = pair.run(code.replace(right, wrong))["vectors"]
    with pytest.raises(AssertionError, match="relative difference"):
        close(found, llama.nla.reconstruct(EXPLANATIONS))


def test_a_tokenizer_without_padding_and_a_head_on_rescaled_states(
    llama: Case, publish: Callable[..., Published]
) -> None:
    """Llama 3 has no padding token; some heads read h sqrt(d)/||h||, some ARs no BOS."""
    pair = publish(llama, head_input="normalized", ar_special_tokens=False, ar_suffix_ids=None)
    root = Path(pair.cache / f"models--{NAMES.ar.replace('/', '--')}/snapshots/{COMMIT}").resolve()
    config = root / "tokenizer_config.json"
    text = json.loads(config.read_text("utf-8"))
    del text["pad_token"]
    config.write_text(json.dumps(text), "utf-8")
    assert AutoTokenizer.from_pretrained(root).pad_token is None
    ours = NLA.from_pretrained(root.parent / "av", ar=root.parent / "ar")
    found = pair.run(pair.blocks("ar")[1])["vectors"]
    close(found, ours.reconstruct(EXPLANATIONS))
    with pytest.raises(AssertionError):
        close(found, llama.nla.reconstruct(EXPLANATIONS))


def test_the_last_block_is_read_by_a_hook(llama: Case, publish: Callable[..., Published]) -> None:
    pair = publish(llama)
    pair.facts = replace(pair.facts, n_layers=3)
    code = pair.blocks("av")[1]
    assert "output_hidden_states" not in code
    close(pair.run(code)["vector"], llama.nla.capture(TEXT, positions="last").vectors[0])


def test_a_base_model_that_is_not_on_the_hub_is_not_asked_for(llama: Case, publish: Callable[..., Published]) -> None:
    pair = publish(llama)
    pair.facts = replace(pair.facts, base_model="tiny-source")
    with_hub, alone = (pair.run(code) for code in pair.blocks("av"))
    assert alone["vector"].shape == (D_MODEL,)
    assert alone["written"] == with_hub["row"].raw == greedy(llama.nla, alone["vector"])


@pytest.mark.train
@pytest.mark.filterwarnings("ignore")  # of peft: what it asks transformers for, what it cannot look up offline
def test_factors_are_put_on_their_base(llama: Case, publish: Callable[..., Published], tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    published = publish(llama, form="lora")
    source, root = llama.pair.source, tmp_path / "pair"
    models: dict[Role, Any] = {
        "av": AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32),
        "ar": AutoModel.from_pretrained(source, dtype=torch.float32),
    }
    blocks, _ = trunk_names(models["ar"].config)
    setattr(models["ar"], blocks, getattr(models["ar"], blocks)[:3])
    for role, model in models.items():
        (root / role / "model.safetensors").unlink()
        (root / role / "config.json").unlink()
        config = peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj"])
        with_factors = peft.get_peft_model(model, config)
        torch.manual_seed(7)
        for name, value in with_factors.named_parameters():
            if "lora_" in name:
                torch.nn.init.normal_(value, std=0.2)
        with_factors.peft_config["default"].base_model_name_or_path = BASE
        with_factors.save_pretrained(root / role)
    head = torch.randn(D_MODEL, D_MODEL, generator=torch.Generator().manual_seed(8))
    save_file({"weight": head}, root / "ar" / "value_head.safetensors")
    for role in ("av", "ar"):
        Sidecar.read(root / role).with_(final_norm_stripped=True if role == "ar" else None).write(root / role)
    ours = NLA.from_pretrained(root / "av", ar=root / "ar", base_model=source)
    av = published.run(published.blocks("av")[1])
    close(av["vector"], llama.nla.capture(TEXT, positions="last").vectors[0])
    assert av["written"] == greedy(ours, av["vector"])
    assert av["written"] != greedy(llama.nla, av["vector"])
    close(published.run(published.blocks("ar")[1])["vectors"], ours.reconstruct(EXPLANATIONS))
