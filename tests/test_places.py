"""Which folder of a checkpoint is which half, from names alone."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nla_hub.errors import CheckpointError
from nla_hub.layouts import MAX_DEPTH, files_below, files_of, find, places

MODEL = ("config.json", "model.safetensors", "tokenizer.json")
LORA = ("adapter_config.json", "adapter_model.safetensors")
AR = (*MODEL, "value_head.safetensors")
AR_LORA = ("ar_lora_value_head.safetensors", "ar_meta.json")


def tree(**folders: tuple[str, ...]) -> list[str]:
    """Files of folders; "." is the root, "__" a slash."""
    return [
        name if folder == "root" else f"{folder.replace('__', '/')}/{name}"
        for folder, names in folders.items()
        for name in names
    ]


RUN = tree(
    root=("nla_meta.yaml", "README.md"),
    av_sft_lora=LORA,
    av_rl_lora_step400=LORA,
    ar_sft_critic=AR,
    rl_critic_step400=AR,
)


@pytest.mark.parametrize(
    ("files", "role", "subfolder", "beside", "folder"),
    [
        (tree(root=MODEL), "av", None, None, ""),
        (tree(root=AR), "ar", None, None, ""),
        (tree(av=MODEL, ar=AR, source=MODEL), "av", None, None, "av"),
        (tree(av=MODEL, ar=AR, source=MODEL), "ar", None, "av", "ar"),
        (tree(root=("nla_meta.yaml",), actor=MODEL, critic=AR), "av", None, None, "actor"),
        (tree(root=LORA, critic=AR_LORA, reference=LORA), "av", None, None, ""),
        (tree(root=LORA, critic=AR_LORA, reference=LORA), "ar", None, "", "critic"),
        (RUN, "av", "av_sft_lora", None, "av_sft_lora"),
        (RUN, "av", "./av_sft_lora/".strip("."), None, "av_sft_lora"),
        (RUN, "ar", None, "av_rl_lora_step400", "rl_critic_step400"),
        (RUN, "ar", None, "av_sft_lora", "ar_sft_critic"),
        (tree(it_1__av=MODEL, it_1__ar=AR, it_2__av=MODEL, it_2__ar=AR), "av", "it_2", None, "it_2/av"),
        (tree(it_1__av=MODEL, it_1__ar=AR, it_2__av=MODEL, it_2__ar=AR), "ar", None, "it_2/av", "it_2/ar"),
        (tree(iter_10__av=MODEL, critic_iter_10=AR, critic_iter_5=AR), "ar", None, "iter_10/av", "critic_iter_10"),
        (tree(iter_000400=LORA, critic_latest=AR), "ar", None, "iter_000400", "critic_latest"),
        (tree(av=LORA, merged__ar_hf=AR), "ar", None, "av", "merged/ar_hf"),
    ],
)
def test_the_half_that_is_meant_is_found(
    files: list[str], role: str, subfolder: str | None, beside: str | None, folder: str
) -> None:
    other = None if beside is None else next(p for p in places(files) if p.folder == beside)
    assert find(files, role, subfolder=subfolder, beside=other).folder == folder  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("files", "role", "words"),
    [
        (RUN, "av", ["Several folders may be the AV", "av_rl_lora_step400 (a LoRA adapter)", 'subfolder="av_']),
        (RUN, "ar", ["Several folders may be the AR", "rl_critic_step400 (a complete model)", "ar_subfolder="]),
        (tree(root=("README.md",)), "av", ["No AV was found", "config.json with model.safetensors"]),
        (tree(av=MODEL), "ar", ["No AR was found", "there is av (a complete model)"]),
        (tree(root=AR), "av", ["This is the AR half where the AV is expected", "name the AV first"]),
        ([], "av", ["No AV was found", "name a directory or repository"]),
    ],
)
def test_what_cannot_be_told_is_asked_with_everything_that_is_there(
    files: list[str], role: str, words: list[str]
) -> None:
    with pytest.raises(CheckpointError) as caught:
        find(files, role)  # type: ignore[arg-type]
    for word in words:
        assert word in str(caught.value), str(caught.value)


def test_a_sidecar_speaks_for_the_folders_below_it() -> None:
    files = tree(root=("nla_meta.yaml",), run__iter_1=LORA, run__own=(*LORA, "nla_meta.yaml"))
    found = {p.folder: (p.sidecar, p.own_sidecar) for p in places(files)}
    assert found == {"run/iter_1": ("nla_meta.yaml", False), "run/own": ("run/own/nla_meta.yaml", True)}


def test_only_what_a_half_needs_is_asked_for() -> None:
    decoys = ("pytorch_model.bin", "modeling.py", "consolidated.safetensors", "optimizer.pt", "model.fp16.safetensors")
    files = [
        *tree(root=("tokenizer.json", "nla_meta.yaml", "train.parquet", "config.json"), av=(*MODEL, *decoys)),
        *tree(ar=AR, other=LORA),
    ]
    av = find(files, "av")
    assert set(files_of(files, av)) == {
        *(f"av/{name}" for name in MODEL),
        "nla_meta.yaml",
        "tokenizer.json",
    }
    assert not any(name.endswith(".safetensors") for name in files_of(files, av, weights=False))


names = st.sampled_from(
    [*MODEL, *LORA, *AR_LORA, "nla_meta.yaml", "value_head.safetensors", "model.safetensors.index.json", "x.bin", "é"]
)
folders = st.lists(st.sampled_from(["av", "ar", "iter_1", "sft", "rl", "critic", "source", "..", "a b"]), max_size=6)


@given(st.lists(st.builds(lambda parts, name: "/".join([*parts, name]), folders, names), max_size=12))
def test_any_tree_of_names_gives_a_place_or_a_reason(files: list[str]) -> None:
    for role in ("av", "ar"):
        try:
            place = find(files, role)  # type: ignore[arg-type]
        except CheckpointError as error:
            assert error.next_step  # noqa: PT017 -- either way is right; a reason must be useful
        else:
            assert place in places(files)
            assert set(files_of(files, place)) <= set(files)


def test_a_directory_is_listed_without_following_links_out_of_it(tmp_path: object) -> None:
    from pathlib import Path

    root = Path(str(tmp_path)) / "root"
    deep = root.joinpath(*"abcdef")
    deep.mkdir(parents=True)
    for folder in (root, *deep.parents[: len("abcdef")], deep):
        (folder / "config.json").touch()
    (Path(str(tmp_path)) / "outside").mkdir()
    (Path(str(tmp_path)) / "outside" / "config.json").touch()
    (root / "link").symlink_to(Path(str(tmp_path)) / "outside")
    (root / "circle").symlink_to(root)
    found = files_below(root)
    assert {name.count("/") for name in found} == set(range(MAX_DEPTH + 1))
    assert "link/config.json" not in found
    assert not any(name.startswith("circle/") for name in found)
