"""A release that is not whole is refused, for every fault once, with all faults in one message.

What is verified is the packaged pair as `bundle.stage` stages it; damage is done to the staged files.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Case, Spec
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save, save_file

from nla_hub import yaml_io
from nla_hub.errors import PublishError
from nla_hub.hub import HubOptions
from nla_hub.publish.facts import ReleaseFacts
from nla_hub.publish.guards.coverage import factor_faults
from nla_hub.publish.guards.papers import card_faults, name_faults
from nla_hub.publish.guards.stored import CHUNK, StoredFile
from nla_hub.publish.guards.verify import require_whole
from nla_hub.publish.release import Entry, Release, StagedRepo
from nla_hub.publish.staging import bundle
from nla_hub.publish.staging.found import find
from nla_hub.sidecar import ReleaseRecord, Score, Sidecar

TINY = Path(__file__).resolve().parents[1] / "nla_hub" / "tiny" / "weights"
AV, AR = "someone/nla-x-L2-av", "someone/nla-x-L2-ar"
OFFLINE = HubOptions(local_files_only=True)


@pytest.fixture(scope="module")
def whole() -> Release:
    return bundle.stage(
        find(TINY), bundle.Wanted(repo="someone/nla-x-L2", licence="apache-2.0"), options=OFFLINE, work=None
    )


@pytest.fixture(scope="module")
def single() -> Release:
    wanted = bundle.Wanted(repo="someone/x", licence="apache-2.0", single=True)
    return bundle.stage(find(TINY), wanted, options=OFFLINE, work=None)


def with_files(release: Release, role: str, changes: Mapping[str, bytes | Path | None]) -> Release:
    """The release with some files of one repository changed, added, or taken away (None)."""
    repos = []
    for repo in release.repos:
        entries = {entry.name: entry for entry in repo.entries}
        if repo.role == role:
            entries |= {name: Entry(name, content) for name, content in changes.items() if content is not None}
            entries = {name: entry for name, entry in entries.items() if changes.get(name, b"") is not None}
        repos.append(replace(repo, entries=tuple(sorted(entries.values(), key=lambda e: e.name))))
    return replace(release, repos=tuple(repos))


def content(release: Release, role: str, name: str) -> bytes:
    entry = next(repo for repo in release.repos if repo.role == role).entry(name)
    assert entry is not None
    return b"".join(entry.chunks())


def refusal(release: Release) -> str:
    with pytest.raises(PublishError) as error:
        require_whole(release)
    return str(error.value)


# -- what is whole ---------------------------------------------------------------------------------------------


def test_the_packaged_pair_is_whole(whole: Release, single: Release) -> None:
    for release in (whole, single):
        said = "\n".join(require_whole(release))
        for told in ("all 780,800 values finite", "all 633,088 values finite", "LICENSE", "canonical, of one release"):
            assert told in said


@pytest.mark.parametrize("spec", [Spec("gemma3"), Spec("gpt2"), Spec("gpt_neox")], ids=str)
def test_pairs_of_every_family_are_whole(spec: Spec, make_case: Callable[[Spec], Case]) -> None:
    root = make_case(spec).pair.root
    wanted = bundle.Wanted(repo="someone/nla-x-L2", licence="apache-2.0", base_model="owner/base")
    release = bundle.stage(find(root), wanted, options=OFFLINE, work=None)
    require_whole(release)
    name = next(name for name in tensors(release, "av") if ".0." in name)
    message = refusal(with_files(release, "av", {"model.safetensors": without(release, "av", name)}))
    assert f"missing: {name.partition('.')[2]} [" in message


def tensors(release: Release, role: str, name: str = "model.safetensors") -> dict[str, torch.Tensor]:
    from safetensors.torch import load

    return load(content(release, role, name))


def packed(values: Mapping[str, torch.Tensor]) -> bytes:
    return save(dict(values), metadata={"format": "pt"})


def without(release: Release, role: str, name: str) -> bytes:
    return packed({key: value for key, value in tensors(release, role).items() if key != name})


def test_a_head_needs_no_metadata(whole: Release) -> None:
    """Nobody reads a head's but this project; those of strangers have none."""
    require_whole(
        with_files(whole, "ar", {"value_head.safetensors": save(tensors(whole, "ar", "value_head.safetensors"))})
    )


def test_files_still_to_be_written_are_left_out_and_told(whole: Release) -> None:
    repos = [
        replace(
            repo,
            entries=tuple(e for e in repo.entries if e.name != "model.safetensors"),
            to_be_written={"model.safetensors": 10},
        )
        for repo in whole.repos
    ]
    said = require_whole(replace(whole, repos=tuple(repos), id=None))
    assert sum("model.safetensors: not written yet, so not checked" in line for line in said) == 2


def test_a_pair_that_does_not_lie_together_is_copied_small(whole: Release) -> None:
    """Where a configuration was made for the occasion, the others are laid beside it; the weights are not."""
    config = content(whole, "av", "config.json") + b"\n"
    require_whole(with_files(whole, "av", {"config.json": config}))


def test_what_lies_there_but_is_not_sent_does_not_help(whole: Release) -> None:
    assert "Its tokenizer cannot be loaded" in refusal(with_files(whole, "av", {"tokenizer.json": None}))


# -- every fault once ------------------------------------------------------------------------------------------

Change = Callable[[Release], Release]


def files(role: str, **changes: Any) -> Change:
    """Files by names whose dots and dashes are spelled in the mapping `named`."""
    return lambda release: with_files(release, role, changes)


def file(role: str, name: str, change: Callable[[bytes], bytes] | None) -> Change:
    def changed(release: Release) -> Release:
        return with_files(release, role, {name: None if change is None else change(content(release, role, name))})

    return changed


def added(role: str, name: str, data: bytes) -> Change:
    return lambda release: with_files(release, role, {name: data})


def in_json(role: str, name: str, **values: Any) -> Change:
    return file(role, name, lambda data: json.dumps({**json.loads(data), **values}).encode())


def weights(role: str, change: Callable[[dict[str, torch.Tensor]], Any], name: str = "model.safetensors") -> Change:
    def changed(release: Release) -> Release:
        found = tensors(release, role, name)
        change(found)
        return with_files(release, role, {name: packed(found)})

    return changed


def sidecar(role: str, **changes: Any) -> Change:
    """With its hash and form put right, so that only what is said is wrong."""

    def changed(release: Release) -> Release:
        told = Sidecar.parse(
            yaml_io.loads(content(release, role, "nla_meta.yaml"), where="x", error=PublishError)
        ).with_(**changes)
        text = yaml_io.dumps({**told.to_mapping(), "integrity": {"sha256": told.integrity()}})
        return with_files(release, role, {"nla_meta.yaml": text.encode()})

    return changed


def facts(**changes: Any) -> Change:
    def changed(release: Release) -> Release:
        assert release.facts is not None
        return replace(release, facts=replace(release.facts, **changes))

    return changed


def licence(**changes: Any) -> Change:
    def changed(release: Release) -> Release:
        assert release.facts is not None
        return replace(release, facts=replace(release.facts, licence=replace(release.facts.licence, **changes)))

    return changed


def nan_at(name: str, place: int) -> Callable[[dict[str, torch.Tensor]], None]:
    def change(found: dict[str, torch.Tensor]) -> None:
        found[name].view(-1)[place] = torch.nan

    return change


def set_to(name: str, value: torch.Tensor) -> Callable[[dict[str, torch.Tensor]], None]:
    return lambda found: found.update({name: value})


def card(change: Callable[[str], str]) -> Change:
    return file("av", "README.md", lambda data: change(data.decode()).encode())


def index(**changes: str) -> bytes:
    return json.dumps({"metadata": {}, "weight_map": changes}).encode()


NORM = "model.layers.0.input_layernorm.weight"
UP = "model.layers.0.mlp.up_proj.weight"
FAULTS: Mapping[str, tuple[Change, str]] = {
    # weights
    "cut off": (file("av", "model.safetensors", lambda d: d[:-4]), f"{AV}: model.safetensors: its tensors take"),
    "added to": (file("av", "model.safetensors", lambda d: d + b"\0" * 8), "it is cut off, or something was added"),
    "no header": (file("av", "model.safetensors", lambda d: b"\xff" * 40), "no safetensors header"),
    "empty": (file("av", "model.safetensors", lambda d: b""), "no safetensors header"),
    "no mapping": (
        file("av", "model.safetensors", lambda d: (4).to_bytes(8, "little") + b"[1] "),
        "its header cannot be read",
    ),
    "NaN": (
        weights("av", nan_at(UP, 1234)),
        f"{UP}: 1 of 32,768 values are NaN or infinite, the first at flat index 1234",
    ),
    "infinite": (weights("ar", lambda w: w[NORM].fill_(torch.inf)), f"{NORM}: 128 of 128 values are NaN or infinite"),
    "missing": (weights("av", lambda w: w.pop(UP)), "missing: layers.0.mlp.up_proj.weight [256, 128]"),
    "missing in the AR": (weights("ar", lambda w: w.pop(NORM)), f"{AR}: missing: layers.0.input_layernorm.weight"),
    "unexpected": (weights("av", set_to("model.odd", torch.zeros(2))), "unexpected: odd"),
    "misshapen": (
        weights("av", set_to(NORM, torch.zeros(4, dtype=torch.float16))),
        "input_layernorm.weight: its shape is [4]",
    ),
    "a norm that no AR has": (
        weights("ar", set_to("model.norm.weight", torch.ones(128, dtype=torch.float16))),
        "unexpected: norm.weight",
    ),
    "an lm_head on an AR": (
        weights("ar", set_to("lm_head.weight", torch.zeros(971, 128))),
        "unexpected: lm_head.weight",
    ),
    "another dtype": (
        weights("av", set_to(NORM, torch.ones(128, dtype=torch.float32))),
        "the weights are stored in F16, F32, and config.json says float16",
    ),
    "a dtype that the card does not say": (
        facts(dtypes={"av": "bfloat16"}),
        "stored in F16, and the card says bfloat16",
    ),
    "bytes without a scale": (
        weights("av", set_to(UP, torch.zeros(256, 128, dtype=torch.uint8))),
        "packed as U8, with no scale beside it or no quantization_config",
    ),
    "no format": (file("av", "model.safetensors", lambda d: d.replace(b'"pt"', b'"tf"')), "does not say format 'pt'"),
    "no weights": (file("av", "model.safetensors", None), "no model.safetensors"),
    "an index beside": (added("av", "model.safetensors.index.json", b"{}"), "which of them is meant?"),
    # head
    "no head": (file("ar", "value_head.safetensors", None), "no value head: value_head.safetensors is missing"),
    "a NaN in the head": (
        weights("ar", nan_at("weight", 16_383), "value_head.safetensors"),
        "value_head.safetensors: weight: 1 of 16,384 values are NaN or infinite, the first at flat index 16383",
    ),
    "a head of another shape": (
        weights("ar", set_to("weight", torch.ones(128, 64)), "value_head.safetensors"),
        "value_head.safetensors: weight has the shape [128, 64], expected [128, 128]",
    ),
    "a head of another name": (
        weights("ar", set_to("odd", torch.ones(2)), "value_head.safetensors"),
        "unexpected: odd",
    ),
    "a head without a weight": (
        weights("ar", lambda w: w.update(bias=w.pop("weight")[0].clone()), "value_head.safetensors"),
        "it has no weight",
    ),
    "a head in whole numbers": (
        weights("ar", set_to("weight", torch.ones(128, 128, dtype=torch.int32)), "value_head.safetensors"),
        "weight is I32, expected F32, BF16, F16",
    ),
    "a destroyed head": (
        weights("ar", lambda w: w["weight"][:16].zero_(), "value_head.safetensors"),
        "16 of 128 rows of the weight are all zeros",
    ),
    "a head without a direction": (
        weights("ar", lambda w: w["weight"][:, 3].zero_(), "value_head.safetensors"),
        "value_head.safetensors: weight: 1 of 128 columns of the weight are all zeros",
    ),
    "a head of one row": (
        weights("ar", lambda w: w["weight"].copy_(w["weight"][:1].clone()), "value_head.safetensors"),
        "all rows of the weight are equal, so every text gives one direction",
    ),
    "a head of one column": (
        weights("ar", lambda w: w["weight"].copy_(w["weight"][:, :1].clone()), "value_head.safetensors"),
        "all columns of the weight are equal",
    ),
    "a head of huge values": (
        weights("ar", set_to("weight", torch.eye(128) * -3e38), "value_head.safetensors"),
        "weight: its largest value is 3e+38, with which the length of a vector overflows float32",
    ),
    "a head of zeros": (
        weights("ar", lambda w: w["weight"].zero_(), "value_head.safetensors"),
        "value_head.safetensors: weight: all 16,384 values are zero: an export destroyed them; export them again",
    ),
    "a matrix of zeros": (
        weights("av", lambda w: w[UP].zero_()),
        f"{AV}: model.safetensors: {UP}: all 32,768 values are zero: an export destroyed them; export them again",
    ),
    "a matrix of zeros in the AR": (weights("ar", lambda w: w[UP].zero_()), f"{AR}: model.safetensors: {UP}: all"),
    # reference
    "a reference beside the AV": (
        lambda r: with_files(r, "av", {"fve_reference.safetensors": content(r, "ar", "fve_reference.safetensors")}),
        "lies beside an AV, where vLLM takes it for weights",
    ),
    "a reference of another set": (
        file("ar", "fve_reference.safetensors", lambda d: d.replace(b"tiny-eval-v1", b"tiny-eval-v2")),
        "it is of 'tiny-eval-v2', the sidecar's fve_reference of 'tiny-eval-v1'",
    ),
    # configurations
    "too deep": (
        in_json("ar", "config.json", num_hidden_layers=2),
        "an AR has 3 blocks; config.json says num_hidden_layers 2",
    ),
    "not the base's depth": (facts(n_layers=5), "num_hidden_layers is 4, and the base model has 5"),
    "another width": (in_json("av", "config.json", hidden_size=64), "d_model: the sidecar says 128"),
    "another family": (facts(family="qwen2"), "it is of the family llama, and the release says qwen2"),
    "no config": (file("av", "config.json", None), "This directory has no config.json"),
    "packed without a word": (
        in_json("av", "config.json", quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True}),
        "it has a quantization_config, and the release says nothing of packed weights",
    ),
    "a word without packing": (facts(quantised="fp8"), "it has no quantization_config, and the release says fp8"),
    "no generation config": (file("av", "generation_config.json", None), "generation_config.json is missing"),
    "no end": (file("av", "generation_config.json", lambda d: b'{"eos_token_id": null}'), "has no eos_token_id"),
    # tokenizer
    "no tokenizer": (file("ar", "tokenizer.json", None), "tokenizer: Its tokenizer cannot be loaded"),
    "no chat template": (file("av", "chat_template.jinja", None), "tokenizer: "),
    "another marker": (
        lambda r: sidecar("av", marker=replace(told_of(r, "av").marker, id=7))(r),
        "tokens.injection_token_id: the sidecar says 7",
    ),
    "another suffix": (sidecar("ar", ar_suffix_ids=(1, 2)), "tokens.critic_suffix_ids: the sidecar says [1, 2]"),
    # sidecars
    "no sidecar": (file("av", "nla_meta.yaml", None), "nla_meta.yaml is missing"),
    "edited by hand": (
        file(
            "av", "nla_meta.yaml", lambda d: d.replace(b"stage: rl", b"stage: rx").replace(b"stage: av", b"stage: ax")
        ),
        "it was edited by hand",
    ),
    "another spelling": (file("av", "nla_meta.yaml", lambda d: b"# mine\n" + d), "not in the canonical form"),
    "no YAML": (file("av", "nla_meta.yaml", lambda d: b"a: [1"), "This YAML is refused"),
    "another partner": (sidecar("av", pair_repo="someone/other"), f"pair_repo is 'someone/other', expected '{AR}'"),
    "no partner": (sidecar("ar", pair_repo=None), f"pair_repo is None, expected '{AV}'"),
    "another base": (sidecar("av", base_model="owner/other"), "base_checkpoint is 'owner/other'"),
    "a branch for a commit": (sidecar("av", source_revision="main"), "source_revision is 'main': a branch moves"),
    "another commit": (facts(base_revision="a" * 40), f"expected '{'a' * 40}'"),
    "of no release": (sidecar("av", release=None), "nla_meta.yaml of the AV: release is None, expected"),
    "of another release": (sidecar("ar", release=ReleaseRecord("f" * 12, "v1")), "release: the halves carry"),
    "of another layer": (lambda r: sidecar("av", site=replace(told_of(r, "av").site, layer=1))(r), "layer K"),
    "two ARs": (
        lambda r: with_files(r, "av", {"nla_meta.yaml": content(r, "ar", "nla_meta.yaml")}),
        "it says role 'ar', expected 'av'",
    ),
    "another score": (
        sidecar("av", fve=Score(0.5, "raw_variance", "x", 10)),
        "and the cards say",
    ),
    "a score without a number": (
        lambda r: facts(score=Score(0.5, "raw_variance", "x", 0))(
            sidecar("ar", fve=Score(0.5, "raw_variance", "x", 0))(r)
        ),
        "fve.n is missing",
    ),
    "a score above one": (sidecar("av", fve=Score(1.5, "raw_variance", "x", 9)), "no FVE is above 1"),
    # papers
    "a licence file missing": (
        file("av", "LICENSE", None),
        f"{AV}: the licence file LICENSE is missing; apache-2.0 asks for it",
    ),
    "a licence file changed": (
        file("ar", "LICENSE", lambda d: d + b"x"),
        f"{AR}: LICENSE is not the text that apache-2.0 asks for",
    ),
    "a licence that is empty": (
        lambda r: licence(files={"LICENSE": b"\n"})(with_files(r, "av", {"LICENSE": b"\n"})),
        "LICENSE has 0 bytes, too few for the text of a licence",
    ),
    "a policy that is cut": (added("av", "USE_POLICY.md", b"Not Found"), "USE_POLICY.md has 9 bytes, too few"),
    "a web page for a licence": (
        added("ar", "LICENSE.txt", b"\n<!DOCTYPE html><html>" + b"x" * 500),
        f"{AR}: LICENSE.txt is a web page; put the text of the licence there",
    ),
    "a name that the licence wants": (licence(name_starts_with="Llama"), "its name must begin with 'Llama'"),
    "a notice that the licence wants": (
        licence(notice="Built with Llama"),
        "README.md does not say 'Built with Llama'",
    ),
    "no card": (file("av", "README.md", None), f"{AV}: README.md is missing"),
    "no front matter": (card(lambda t: t.partition("---\n\n")[2]), "front matter: the card does not begin"),
    "a false tag": (card(lambda t: t.replace("---\n", "---\npipeline_tag: text-generation\n", 1)), "pipeline_tag"),
    "a placeholder": (card(lambda t: t + "\n{{ repo }}\n"), "'{{' is left over from a template"),
    "a block": (card(lambda t: t + "\n{% if x %}\n"), "'{%' is left over from a template"),
    "a marker's place": (card(lambda t: t + "\nWrite {injection_char} here\n"), "'{injection' is left over"),
    "a note": (card(lambda t: t + "\nTODO: say more\n"), "'TODO' is left over from a template"),
    "an empty cell": (card(lambda t: t + "\n| FVE | None |\n"), "None"),
    "an empty figure": (card(lambda t: t + "\nFVE: nan\n"), "nan"),
    "a template in a snippet": (card(lambda t: t + "\n```python\nx = '{{ repo }}'\n```\n"), "left over in the snippet"),
    "a result that is none": (added("av", ".eval_results/x.yaml", b"a: [1"), ".eval_results/x.yaml cannot be read"),
    "an empty result": (added("av", ".eval_results/x.yaml", b""), ".eval_results/x.yaml is empty"),
    # names
    "a name with a colon": (added("av", "a:b.json", b"{}"), "'a:b.json' is no name for a file on the Hub"),
    "a name that leads out": (added("av", "../x.json", b"{}"), "'../x.json' is no name"),
    "names that are one": (added("av", "Config.json", b"{}"), "are one file where capitals do not count"),
    "a half less": (lambda r: replace(r, repos=r.repos[:1]), "there is no AV in this release"),
}


def told_of(release: Release, role: str) -> Any:
    return Sidecar.parse(yaml_io.loads(content(release, role, "nla_meta.yaml"), where="x", error=PublishError))


@pytest.mark.parametrize("case", sorted(FAULTS))
def test_every_fault_is_told(case: str, whole: Release) -> None:
    change, told = FAULTS[case]
    message = refusal(change(whole))
    assert told in message
    assert "Next: nothing was sent" in message


def test_all_faults_are_told_at_once(whole: Release) -> None:
    broken = whole
    chosen = (
        "NaN",
        "no head",
        "another partner",
        "a licence file missing",
        "a note",
        "no generation config",
        "too deep",
    )
    for case in chosen:
        broken = FAULTS[case][0](broken)
    message = refusal(broken)
    assert [case for case in chosen if FAULTS[case][1] not in message] == []


def test_faults_of_a_single_repository_name_the_folder(single: Release) -> None:
    head = tensors(single, "pair", "ar/value_head.safetensors")
    head["weight"][3, 4] = torch.nan
    message = refusal(with_files(single, "pair", {"ar/value_head.safetensors": packed(head), "LICENSE": None}))
    assert "someone/x: ar/: value_head.safetensors: weight: 1 of 16,384 values" in message
    assert "someone/x: the licence file LICENSE is missing" in message


# -- headers and values ----------------------------------------------------------------------------------------


def test_a_nan_in_ten_million_head_weights_is_refused(whole: Release, tmp_path: Path) -> None:
    width = 3163
    head = torch.full((width, width), 0.01, dtype=torch.bfloat16)
    head.view(-1)[7_654_321] = torch.nan
    save_file({"weight": head}, tmp_path / "value_head.safetensors", metadata={"format": "pt"})
    message = refusal(with_files(whole, "ar", {"value_head.safetensors": tmp_path / "value_head.safetensors"}))
    assert f"{AR}: value_head.safetensors: weight: 1 of 10,004,569 values are NaN or infinite" in message
    assert "the first at flat index 7654321" in message


def is_refused(release: Release, role: str, name: str, data: bytes) -> bool:
    try:
        require_whole(with_files(release, role, {name: data}))
    except PublishError:
        return True
    return False


def flipped(data: bytes, bit: int) -> bytes:
    broken = bytearray(data)
    broken[bit // 8] ^= 1 << bit % 8
    return bytes(broken)


def header_bits(data: bytes) -> int:
    return 8 * (8 + int.from_bytes(data[:8], "little"))


def test_every_bit_of_a_header_is_read(whole: Release) -> None:
    """A flip is a fault of the file, or another name, shape, dtype or metadata than the weights have."""
    raw = content(whole, "ar", "value_head.safetensors")
    sound = StoredFile.read(Entry("x", raw))
    for bit in range(header_bits(raw)):
        found = StoredFile.read(Entry("x", flipped(raw, bit)))
        assert found.faults or (found.parts, found.metadata) != (sound.parts, sound.metadata), bit


@settings(max_examples=12)
@given(data=st.data())
def test_no_bit_of_a_header_can_flip(data: st.DataObject, whole: Release) -> None:
    role, name = data.draw(
        st.sampled_from(
            [
                ("av", "model.safetensors"),
                ("ar", "model.safetensors"),
                ("ar", "value_head.safetensors"),
                ("ar", "fve_reference.safetensors"),
            ]
        )
    )
    raw = content(whole, role, name)
    bit = data.draw(st.integers(0, header_bits(raw) - 1))
    assert is_refused(whole, role, name, flipped(raw, bit)), (name, bit)


DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "C64": torch.complex64,
}


@pytest.mark.parametrize("dtype", sorted(DTYPES))
@pytest.mark.parametrize("place", [0, 5000, 9_999])
def test_a_nan_is_found_in_every_dtype(dtype: str, place: int) -> None:
    values = torch.linspace(-3, 3, 10_000).to(DTYPES[dtype])
    file = StoredFile.read(Entry("x", save({"before": torch.ones(3), "w": values})))
    assert file.faults == () and file.parts["w"].dtype == dtype
    assert list(file.value_faults()) == []
    broken = values.clone()
    broken[place] = torch.tensor(torch.nan).to(DTYPES[dtype])
    found = list(StoredFile.read(Entry("x", save({"before": torch.ones(3), "w": broken}))).value_faults())
    assert found == [f"w: 1 of 10,000 values are NaN or infinite, the first at flat index {place}"]


@pytest.mark.parametrize("dtype", sorted(DTYPES))
def test_a_matrix_of_zeros_is_found_in_every_dtype(dtype: str) -> None:
    values = torch.zeros(30, 100).to(DTYPES[dtype])
    told = [
        "w: all 3,000 values are zero: an export destroyed them; export them again from the checkpoint that they came from"
    ]
    assert list(StoredFile.read(Entry("x", save({"w": values}))).value_faults()) == told
    assert (
        list(
            StoredFile.read(
                Entry("x", save({"w": torch.tensor(-0.0).to(DTYPES[dtype]).expand(2, 1500).clone()}))
            ).value_faults()
        )
        == told
    )
    values[29, 99] = torch.tensor(1.0).to(DTYPES[dtype])
    assert list(StoredFile.read(Entry("x", save({"w": values}))).value_faults()) == []


def test_zeros_that_are_nobodys_fault() -> None:
    """Of a bias, a LoRA before its first step, packed weights' zero points, codes, and nothing at all."""
    names = {"w.bias": (4,), "w.lora_B.weight": (4, 2), "w.weight_zero_point": (4, 1), "w.empty": (0, 3)}
    values = {name: torch.zeros(*shape) for name, shape in names.items()}
    file = StoredFile.read(Entry("x", save({**values, "w.codes": torch.zeros(4, 4, dtype=torch.int32)})))
    assert list(file.value_faults()) == []


def test_values_are_counted_across_pieces() -> None:
    n = CHUNK // 4 + 1000
    values = torch.zeros(n)
    values[[5, CHUNK // 4, n - 1]] = torch.inf
    found = list(StoredFile.read(Entry("x", save({"w": values}))).value_faults())
    assert found == [f"w: 3 of {n:,} values are NaN or infinite, the first at flat index 5"]


@pytest.mark.parametrize(("second", "size"), [((0, 8), 8), ((4, 12), 12), ((16, 24), 24)])
def test_tensors_that_overlap_or_leave_a_gap(second: tuple[int, int], size: int) -> None:
    told = {n: {"dtype": "F32", "shape": [2], "data_offsets": o} for n, o in (("a", [0, 8]), ("b", list(second)))}
    header = json.dumps(told).encode()
    found = StoredFile.read(Entry("x", len(header).to_bytes(8, "little") + header + bytes(size)))
    assert found.faults == (f"b begins at byte {second[0]}, expected 8: tensors overlap or leave a gap",)


def test_scales_that_are_packed_in_bytes() -> None:
    """The one NaN of an 8-bit exponent; a byte of any other tensor may have any value."""
    data = save(
        {
            "w.weight_scale": torch.tensor([1, 255], dtype=torch.uint8),
            "w.weight": torch.full((4,), 255, dtype=torch.uint8),
        }
    )
    assert list(StoredFile.read(Entry("x", data)).value_faults()) == [
        "w.weight_scale: 1 of 2 values are NaN or infinite, the first at flat index 1"
    ]


def test_the_state_of_bitsandbytes_is_read() -> None:
    name = "w.weight.quant_state.bitsandbytes__nf4"
    for told, fault in (({"scale": 1.0}, False), ({"scale": float("nan")}, True)):
        data = save({name: torch.tensor(list(json.dumps(told).encode()), dtype=torch.uint8)})
        assert bool(list(StoredFile.read(Entry("x", data)).value_faults())) is fault


@given(st.binary(max_size=300))
def test_no_bytes_break_the_reader(data: bytes) -> None:
    file = StoredFile.read(Entry("x", data))
    assert file.faults or list(file.value_faults()) == []


# -- shards, factors, packed weights ---------------------------------------------------------------------------


def sharded(release: Release, change: Callable[[dict[str, str], dict[str, dict[str, torch.Tensor]]], None]) -> Release:
    """The AV in two shards, after a change to the index and to what lies in the shards."""
    values = tensors(release, "av")
    names = [f"model-0000{n}-of-00002.safetensors" for n in (1, 2)]
    shards: dict[str, dict[str, torch.Tensor]] = {name: {} for name in names}
    for n, key in enumerate(values):
        shards[names[n % 2]][key] = values[key]
    weight_map = {key: name for name, shard in shards.items() for key in shard}
    change(weight_map, shards)
    told: dict[str, bytes | None] = {name: packed(shard) for name, shard in shards.items()}
    return with_files(
        release, "av", {**told, "model.safetensors": None, "model.safetensors.index.json": index(**weight_map)}
    )


def test_shards_with_their_index_are_whole(whole: Release) -> None:
    require_whole(sharded(whole, lambda index, shards: None))


SHARD_1, SHARD_2 = (f"model-0000{n}-of-00002.safetensors" for n in (1, 2))


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda i, s: i.pop(NORM), f"{NORM}: in model-0000"),
        (lambda i, s: i.update(odd=SHARD_1), f"odd: in model.safetensors.index.json, not in {SHARD_1}"),
        (lambda i, s: i.update(dict.fromkeys(i, SHARD_1)), f"{SHARD_2} is not named by model.safetensors.index.json"),
        (lambda i, s: s.pop(SHARD_2), f"names {SHARD_2}, which is not there"),
    ],
)
def test_an_index_that_disagrees_with_its_shards(change: Any, told: str, whole: Release) -> None:
    assert told in refusal(sharded(whole, change))


def test_shards_without_an_index(whole: Release) -> None:
    release = with_files(sharded(whole, lambda i, s: None), "av", {"model.safetensors.index.json": None})
    assert "2 shards without model.safetensors.index.json" in refusal(release)


def test_packed_weights(whole: Release) -> None:
    """float8 with a scale a row, as compressed-tensors stores it."""
    scheme = {"quant_method": "compressed-tensors", "format": "float-quantized", "quantization_status": "compressed"}

    def packed_half(release: Release, role: str, *, scales: bool = True) -> Release:
        values: dict[str, torch.Tensor] = {}
        for name, value in tensors(release, role).items():
            if name.endswith("_scale"):
                continue
            if "proj" in name:
                values[name] = value.to(torch.float8_e4m3fn)
                if scales:
                    values[f"{name}_scale"] = torch.ones(len(value), 1)
            else:
                values[name] = value
        config = {**json.loads(content(release, role, "config.json")), "quantization_config": scheme}
        return with_files(
            release, role, {"model.safetensors": packed(values), "config.json": json.dumps(config).encode()}
        )

    fp8 = facts(quantised="fp8")(packed_half(packed_half(whole, "av"), "ar"))
    require_whole(fp8)
    assert "packed as F8_E4M3, with no scale beside it" in refusal(packed_half(fp8, "av", scales=False))
    assert "missing: layers.0.mlp.up_proj.weight" in refusal(weights("av", lambda w: w.pop(UP))(fp8))
    wrong = weights("av", set_to(UP, torch.zeros(4, 128).to(torch.float8_e4m3fn)))(fp8)
    assert "up_proj.weight: its shape is [4, 128]" in refusal(wrong)


FACTORS = {
    f"base_model.model.model.layers.{n}.mlp.up_proj.lora_{side}.weight": torch.ones(*shape)
    for n in (0, 2)
    for side, shape in (("A", (4, 128)), ("B", (512, 4)))
}
ADAPTER = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "base_model_name_or_path": "owner/base"}


def of_factors(factors: Mapping[str, torch.Tensor], **told: Any) -> list[str]:
    stored = {"adapter_model.safetensors": StoredFile.read(Entry("x", packed(factors)))}
    config = Entry("adapter_config.json", json.dumps({**ADAPTER, **told}).encode())
    return list(factor_faults(stored, config, 3, "owner/base"))


def test_factors() -> None:
    assert of_factors(FACTORS) == []
    first = min(FACTORS)
    for changed, told, fault in (
        ({}, {}, "it holds no LoRA factors"),
        ({first: FACTORS[first]}, {}, "has lora_A only"),
        ({**FACTORS, first: torch.ones(2, 128)}, {}, "their ranks differ"),
        (FACTORS, {"r": 8}, "rank 4, adapter_config.json says 8"),
        (FACTORS, {"peft_type": "IA3"}, "expected 'LORA'"),
        (FACTORS, {"base_model_name_or_path": "/home/x/base"}, "base_model_name_or_path is '/home/x/base'"),
        (
            {k.replace("layers.2", "layers.3"): v for k, v in FACTORS.items()},
            {},
            "is of block 3; this half runs the blocks 0 to 2",
        ),
        ({**FACTORS, "odd": torch.ones(1)}, {}, "unexpected: odd"),
    ):
        assert any(fault in one for one in of_factors(changed, **told)), fault
    assert "adapter_model.safetensors is missing" in list(factor_faults({}, Entry("c", b"{}"), 3, "owner/base"))


# -- papers ----------------------------------------------------------------------------------------------------


def test_words_that_only_look_like_leftovers(whole: Release) -> None:
    text = (
        "\nNone of these words is a figure, and nobody's nan was measured.\n> FVE: None {{ as the AV wrote }}\n"
        'The template is `What is {injection_char}?`.\n```json\n{"a": {"b": null}}\n```\n| words | not measured |\n'
    )
    entry = Entry("README.md", content(whole, "av", "README.md") + text.encode())
    assert list(card_faults(entry, "model")) == []


def test_a_file_that_the_hub_does_not_take(tmp_path: Path) -> None:
    with (tmp_path / "x").open("wb") as file:
        file.truncate(50 * 10**9 + 1)
    repo = StagedRepo("a/b", "model", "av", (Entry("README.md", b""), Entry("model.safetensors", tmp_path / "x")))
    assert list(name_faults(repo)) == [
        "model.safetensors: 50,000,000,001 bytes, and the Hub takes 50,000,000,000 a file: save it in shards"
    ]


def test_a_card_that_is_still_to_be_written_is_not_missing() -> None:
    repo = StagedRepo("a/b", "dataset", "data", (), {"README.md": 100})
    assert list(name_faults(repo)) == []


def test_a_notice_may_be_short(whole: Release) -> None:
    require_whole(with_files(whole, "av", {"NOTICE": b"Built with Llama"}))


def test_a_data_set_needs_a_card() -> None:
    repo = StagedRepo("a/b", "dataset", "data", (Entry("x.parquet", b"PAR1"),))
    assert "a/b: README.md is missing" in refusal(Release((repo,), "0" * 12, "data-0"))
    told = b"---\nlicense: apache-2.0\n---\n\n# x\n"
    require_whole(Release((replace(repo, entries=(*repo.entries, Entry("README.md", told))),), "0" * 12, "data-0"))


def test_steps_without_a_score_are_whole(whole: Release) -> None:
    release = facts(score=None)(sidecar("ar", fve=None)(sidecar("av", fve=None)(whole)))
    assert isinstance(release.facts, ReleaseFacts)
    require_whole(release)
