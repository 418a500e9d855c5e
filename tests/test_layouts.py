"""Every layout in the wild: it loads and computes what it must, converts, and computes the same again; or is refused."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from parity import close, engine_logits
from safetensors.torch import load_file, save_file
from wild import LAYOUTS, TEXTS, Built, Layout, World, page, vectors, wrapper_base, write_sidecar

from nla_hub import NLA
from nla_hub.convert import convert
from nla_hub.errors import CheckpointError, NLAError
from nla_hub.loading import open_pair
from nla_hub.locate import resolve_pair
from nla_hub.pretrained import LoadOptions
from nla_hub.sizing import pair_sizes

pytest.importorskip("peft", reason="the independent route of LoRA layouts needs the lora extra (peft)")

# peft 0.21 asks transformers 5.23 for names that it calls deprecated.
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")

READ = [layout for layout in LAYOUTS if not layout.refused]
REFUSED = [layout for layout in LAYOUTS if layout.refused]


@pytest.fixture(scope="module")
def world() -> World:
    return World()


@pytest.fixture(scope="module")
def built(world: World, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Builds each layout once."""
    done: dict[str, Built] = {}

    def build(layout: Layout) -> Built:
        if layout.key not in done:
            with torch.random.fork_rng():
                done[layout.key] = layout.build(world, tmp_path_factory.mktemp(layout.key))
        return done[layout.key]

    return build


def components(found: Built) -> tuple[str, ...]:
    return tuple(half for half, there in (("av", found.logits), ("ar", found.vectors)) if there is not None)


def check(nla: NLA, found: Built) -> None:
    """The halves compute what the modules computed that they were written from."""
    if found.logits is not None:
        close(engine_logits(nla.av.engine, vectors()), found.logits)
    if found.vectors is not None:
        close(nla.reconstruct(list(TEXTS)), found.vectors)


@pytest.mark.parametrize("layout", READ, ids=lambda layout: layout.key)
def test_a_layout_computes_what_it_was_written_from(layout: Layout, built: Any) -> None:
    found = built(layout)
    check(NLA.from_pretrained(found.name, **found.options), found)


@pytest.mark.parametrize("layout", READ, ids=lambda layout: layout.key)
def test_a_converted_layout_computes_the_same_and_converts_to_itself(
    layout: Layout, built: Any, tmp_path: Path
) -> None:
    found = built(layout)
    options = dict(found.options)
    told = options.pop("sidecar", None)
    wanted = options.pop("components", ("av", "ar"))
    pair = open_pair(resolve_pair(found.name, **options), components=wanted, sidecar=told)
    done = convert(pair, tmp_path / "once")
    assert [one.role for one in done] == list(components(found))
    again = {} if "av" in components(found) else {"subfolder": "ar"}
    check(NLA.from_pretrained(tmp_path / "once", components=wanted, **again), found)
    second = open_pair(resolve_pair(tmp_path / "once", **again), components=wanted)
    convert(second, tmp_path / "twice")
    first_files = {p.relative_to(tmp_path / "once"): p.read_bytes() for p in (tmp_path / "once").rglob("*.*")}
    assert first_files
    for name, data in first_files.items():
        assert (tmp_path / "twice" / name).read_bytes() == data, name


@pytest.mark.parametrize("layout", READ, ids=lambda layout: layout.key)
def test_the_bytes_of_a_layout_are_known_before_it_is_loaded(layout: Layout, built: Any) -> None:
    found = built(layout)
    options = dict(found.options)
    told = options.pop("sidecar", None)
    wanted = options.pop("components", ("av", "ar"))
    pair = open_pair(resolve_pair(found.name, **options), components=wanted, sidecar=told, weights=False)
    sizes = {size.name: size for size in pair_sizes(pair, LoadOptions(), source=False)}
    nla = NLA.from_pretrained(found.name, **found.options)
    for half in components(found):
        module = nla.av.engine.model if half == "av" else nla.ar.model  # type: ignore[attr-defined]
        here = sum(p.numel() * p.element_size() for p in module.parameters())
        assert sizes[half].loaded == pytest.approx(here, rel=0.01)  # type: ignore[index]


@pytest.mark.parametrize("layout", REFUSED, ids=lambda layout: layout.key)
def test_what_is_no_ordinary_pair_is_refused_with_its_reason(layout: Layout, built: Any) -> None:
    found = built(layout)
    with pytest.raises(CheckpointError) as caught:
        NLA.from_pretrained(found.name, **found.options)
    assert layout.refused in str(caught.value)
    assert "Next: " in str(caught.value) or caught.value.expected, str(caught.value)


@pytest.mark.parametrize("layout", [one for one in READ if one.needs], ids=lambda layout: layout.key)
def test_without_what_it_needs_a_layout_asks_for_it(layout: Layout, built: Any) -> None:
    found = built(layout)
    kept = {"base_model"} if layout.key != "easynla-sft" else {"base_model", "ar"}
    options = {key: value for key, value in found.options.items() if key in kept}
    if layout.key == "peft-pair":
        (found.name / "source").rename(found.name / "elsewhere")
    try:
        with pytest.raises(NLAError) as caught:
            NLA.from_pretrained(found.name, **options)
    finally:
        if layout.key == "peft-pair":
            (found.name / "elsewhere").rename(found.name / "source")
    assert "Next: " in str(caught.value), str(caught.value)


def test_a_lora_that_names_the_wrappers_modules_finds_its_text_stack_too(world: World, tmp_path: Path) -> None:
    found = wrapper_base(world, tmp_path)
    path = tmp_path / "av" / "adapter_model.safetensors"
    state = {n.replace(".model.layers.", ".model.language_model.layers."): v for n, v in load_file(path).items()}
    save_file(state, path, metadata={"format": "pt"})
    check(NLA.from_pretrained(found.name, **found.options), found)


def test_the_page_is_fresh() -> None:
    there = (Path(__file__).parents[1] / "docs" / "layouts.md").read_text(encoding="utf-8")
    assert there == page(), "stale: python tests/wild.py > docs/layouts.md"


def test_a_sidecar_of_the_ar_above_both_halves_says_nothing_about_injection(world: World, tmp_path: Path) -> None:
    world.write_av(tmp_path / "av", None)
    world.write_ar(tmp_path / "ar", None)
    write_sidecar(tmp_path, world.model_sidecar("ar"))
    with pytest.raises(NLAError, match=r"injection"):
        NLA.from_pretrained(tmp_path)
    nla = NLA.from_pretrained(tmp_path, sidecar={"extraction": {"injection_scale": 8.0}})
    close(engine_logits(nla.av.engine, vectors()), world.av_logits(world.full_av))


def test_an_ar_that_was_trained_without_bos_reads_none(world: World, tmp_path: Path) -> None:
    world.write_ar(tmp_path, world.model_sidecar("ar", ar_special_tokens=False))
    nla = NLA.from_pretrained(tmp_path, components=("ar",))
    assert (
        nla.ar.prompt.encode("a cat") == world.tokenizer("Words: a cat\nVector:", add_special_tokens=False)["input_ids"]
    )
    assert (
        NLA.from_pretrained(tmp_path, components=("ar",), sidecar={"ar_special_tokens": True}).ar.prompt.encode(
            "a cat"
        )[0]
        == world.tokenizer.bos_token_id
    )


# -- folders that could be mistaken ----------------------------------------------------------------------------


def asked(name: Path, *words: str, **options: Any) -> None:
    """The load is refused, and the message holds `words` and says what to pass."""
    with pytest.raises(CheckpointError) as caught:
        NLA.from_pretrained(name, **options)
    for word in (*words, "Next: "):
        assert word in str(caught.value), str(caught.value)


def test_the_ar_of_the_avs_own_step_comes_before_one_at_the_root(world: World, tmp_path: Path) -> None:
    other = copy.deepcopy(world)
    other.full_ar.model.layers[0].mlp.up_proj.weight.data.add_(1)
    for folder, which in (("", other), ("iter_0000100", world)):
        which.write_av(tmp_path / folder / "av", world.model_sidecar("av"))
        which.write_ar(tmp_path / folder / "ar", world.model_sidecar("ar"))
    write_sidecar(tmp_path, world.model_sidecar("av"))
    expected = world.ar_vectors(world.full_ar)
    close(NLA.from_pretrained(tmp_path, subfolder="iter_0000100").reconstruct(list(TEXTS)), expected)
    named = NLA.from_pretrained(tmp_path, ar_subfolder="iter_0000100/ar/")
    close(named.reconstruct(list(TEXTS)), expected)


def test_a_folder_that_was_named_is_the_one_that_is_read(world: World, tmp_path: Path) -> None:
    other = copy.deepcopy(world)
    other.full_ar.model.layers[0].mlp.up_proj.weight.data.add_(1)
    world.write_av(tmp_path / "av", world.model_sidecar("av"))
    other.write_ar(tmp_path / "ar", world.model_sidecar("ar"))
    world.write_ar(tmp_path / "ar_rl", world.model_sidecar("ar"))
    nla = NLA.from_pretrained(tmp_path, ar_subfolder="./ar_rl")
    close(nla.reconstruct(list(TEXTS)), world.ar_vectors(world.full_ar))
    asked(tmp_path, "No AR was found in the folder 'nonsense'", ar_subfolder="nonsense")
    with pytest.raises(NLAError, match="lies inside the checkpoint"):
        NLA.from_pretrained(tmp_path, ar_subfolder="../ar")


def test_the_avs_stack_does_not_move_the_ar_onto_its_base(world: World, tmp_path: Path) -> None:
    world.write_base(tmp_path / "base")
    world.full_av.save_pretrained(tmp_path / "x" / "av_base")
    world.tokenizer.save_pretrained(tmp_path / "x" / "av_base")
    av, ar = world.lora(50, base=world.full_av), world.lora(51)
    av.save_pretrained(tmp_path / "x" / "av_rl" / "iter_1")
    world.write_ar_lora(tmp_path / "x" / "critic", ar)
    stack = ["av_base", "av_rl/iter_1"]
    write_sidecar(tmp_path / "x", world.dataset_sidecar(injection={"kind": "add"}, adapter_stack=stack))
    nla = NLA.from_pretrained(tmp_path / "x", subfolder="av_rl/iter_1", base_model=tmp_path / "base")
    close(engine_logits(nla.av.engine, vectors()), world.av_logits(av, kind="add"))
    close(nla.reconstruct(list(TEXTS)), world.ar_vectors(ar, normalized=True))


@pytest.mark.parametrize("case", ["two stages", "other parent", "merged stage", "complete base", "one seed", "ar"])
def test_what_a_later_lora_lies_on_is_asked_where_it_cannot_be_told(world: World, tmp_path: Path, case: str) -> None:
    world.write_base(tmp_path / "base")
    root, rl = tmp_path / "x", "av_rl_lora"
    write_sidecar(root, world.dataset_sidecar(injection={"kind": "add"}))
    sft = world.lora(52)
    later = world.lora(53)
    if case == "two stages":
        sft.save_pretrained(root / "av_sft_step500")
        world.lora(54).save_pretrained(root / "av_sft_step1000")
    elif case == "other parent":
        rl = "rl/av_lora"
        sft.save_pretrained(root / "sft" / "av_lora_a")
        world.lora(54).save_pretrained(root / "sft" / "av_lora_b")
    elif case == "merged stage":
        world.full_av.save_pretrained(root / "av_sft")
    elif case == "complete base":
        rl = "av_rl_adapters/iter_000100"
        world.full_av.save_pretrained(root / "av_base")
    elif case == "one seed":
        sft.save_pretrained(root / "av_sft_lora")
        with torch.no_grad():
            weights = dict(sft.named_parameters())
            for name, value in later.named_parameters():
                if "lora_A" in name:
                    value.copy_(weights[name])
    else:
        sft.save_pretrained(root / "av_lora")
        world.write_ar_lora(root / "ar_sft_critic", world.lora(55))
        world.write_ar_lora(root / "rl_critic", world.lora(56))
        options = {"subfolder": "av_lora", "ar_subfolder": "rl_critic"}
        asked(root, "It is not clear what rl_critic", "adapter_stack", base_model=tmp_path / "base", **options)
        return
    later.save_pretrained(root / rl)
    asked(
        root,
        f"It is not clear what {rl}",
        "adapter_stack",
        subfolder=rl,
        components=("av",),
        base_model=tmp_path / "base",
    )
    alone = NLA.from_pretrained(
        root,
        subfolder=rl,
        components=("av",),
        base_model=tmp_path / "base",
        sidecar={"adapter_stack": [rl]},
    )
    close(engine_logits(alone.av.engine, vectors()), world.av_logits(later, kind="add"))


def test_two_names_for_a_loras_base_are_asked_about(world: World, tmp_path: Path) -> None:
    world.write_base(tmp_path / "base")
    av = world.lora(57)
    av.save_pretrained(tmp_path / "av")
    path = tmp_path / "av" / "adapter_config.json"
    said = json.loads(path.read_text(encoding="utf-8")) | {"base_model_name_or_path": "owner/other"}
    path.write_text(json.dumps(said), encoding="utf-8")
    write_sidecar(tmp_path / "av", world.model_sidecar("av"))
    asked(tmp_path / "av", "name two base models", "owner/other and owner/base", "adapter_base", components=("av",))
    told = {"adapter_base": str(tmp_path / "base")}
    nla = NLA.from_pretrained(tmp_path / "av", components=("av",), sidecar=told)
    close(engine_logits(nla.av.engine, vectors()), world.av_logits(av))
    assert str(nla._base) == "owner/base"


def test_the_role_in_a_file_that_is_told_is_not_told_to_the_other_half(world: World, tmp_path: Path) -> None:
    world.write_av(tmp_path / "av", None)
    world.write_ar(tmp_path / "ar", None)
    (tmp_path / "told.yaml").write_text(yaml.safe_dump(world.model_sidecar("av"), allow_unicode=True), "utf-8")
    nla = NLA.from_pretrained(tmp_path, sidecar=tmp_path / "told.yaml")
    close(nla.reconstruct(list(TEXTS)), world.ar_vectors(world.full_ar))


def test_a_linked_folder_that_leads_outside_is_refused(world: World, tmp_path: Path) -> None:
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "evil.jinja").write_text("evil", encoding="utf-8")
    world.write_av(tmp_path / "av", world.model_sidecar("av"))
    (tmp_path / "av" / "additional_chat_templates").symlink_to(tmp_path / "outside")
    asked(tmp_path / "av", "leads outside", components=("av",))


def test_factors_above_an_ars_last_block_are_left_alone(world: World, tmp_path: Path) -> None:
    world.write_base(tmp_path / "source")
    ar = world.lora(58)
    ar.save_pretrained(tmp_path / "ar")
    world.write_head(tmp_path / "ar")
    write_sidecar(tmp_path / "ar", world.model_sidecar("ar", final_norm_stripped=True))
    for memory in ("resident", "shared"):
        nla = NLA.from_pretrained(tmp_path / "ar", components=("ar",), memory=memory, base_model=tmp_path / "source")
        close(nla.reconstruct(list(TEXTS)), world.ar_vectors(ar))
