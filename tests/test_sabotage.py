"""The parity checks can fail: each mistake that others have paid for is made on purpose and must be seen.

Every test first runs the check on the intact implementation, then breaks one thing and expects the check, or the typed
error of the implementation itself, to stop it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import pytest
import torch
from conftest import Case
from parity import STEPS, check_capture, check_generation, check_logits, check_neighbours, check_reconstruct

from nla_hub import NLA
from nla_hub import batching as batching_module
from nla_hub import capture as capture_module
from nla_hub import injection as injection_module
from nla_hub import reconstructor as reconstructor_module
from nla_hub import sampling as sampling_module
from nla_hub import source_text as source_text_module
from nla_hub.adapters import Adapter
from nla_hub.errors import InjectionError, SidecarError, WeightsError
from nla_hub.injection import Injector
from nla_hub.prompts import ARPrompt, AVPrompt
from nla_hub.sampling import RowKey, uniforms
from nla_hub.sidecar import Site
from nla_hub.source_text import Encoded


@pytest.fixture
def broken(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    return monkeypatch


@contextmanager
def must_fail() -> Iterator[None]:
    """The check inside must fail its own assertion (any other error would prove nothing)."""
    with pytest.raises(AssertionError):
        yield


def again(case: Case, **changes: Any) -> Case:
    """The same case with the pair loaded anew, under whatever is broken now."""
    fresh = replace(case, nla=NLA.from_pretrained(case.pair.root, **changes))
    for name in ("av", "ar", "source"):
        fresh.__dict__[name] = getattr(case, name)
    return fresh


# -- the layer -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("delta", [1, -1])
def test_a_hook_one_layer_off_is_seen(family: Case, broken: pytest.MonkeyPatch, delta: int) -> None:
    fresh = again(family)
    assert fresh.nla.source  # complete, so that block K + 1 is there
    check_capture(fresh)
    broken.setattr(Adapter, "block", lambda self, model, site: self.block_list(model)[site.layer + delta])
    with must_fail():
        check_capture(fresh)


def test_a_trunk_with_a_block_too_many_is_seen_where_its_last_output_is_read(
    family: Case, broken: pytest.MonkeyPatch
) -> None:
    fresh = again(family, components=("av",))
    block = Adapter.block
    broken.setattr(Adapter, "block", lambda self, model, site: self.block_list(model)[-1])
    check_capture(fresh)
    broken.setattr(Adapter, "block", block)
    fresh = again(family, components=("av",))
    broken.setattr(Site, "n_blocks", property(lambda self: self.layer + 2))
    broken.setattr(Adapter, "block", lambda self, model, site: self.block_list(model)[-1])
    with must_fail():
        check_capture(fresh)


def test_a_trunk_with_a_block_too_few_is_refused(family: Case, broken: pytest.MonkeyPatch) -> None:
    fresh = again(family, components=("av",))
    broken.setattr(Site, "n_blocks", property(lambda self: self.layer))
    with pytest.raises(WeightsError, match="unexpected"):
        fresh.nla.capture("the cat")


@pytest.mark.parametrize("delta", [1, -1])
def test_an_ar_with_a_block_too_many_or_too_few_is_refused(llama: Case, broken: pytest.MonkeyPatch, delta: int) -> None:
    broken.setattr(Site, "n_blocks", property(lambda self: self.layer + 1 + delta))
    with pytest.raises(SidecarError, match="num_hidden_layers 3"):
        again(llama)


def test_an_ar_that_keeps_its_final_norm_is_seen(family: Case, broken: pytest.MonkeyPatch) -> None:
    check_reconstruct(family)
    broken.setattr(Adapter, "drop_final_norm", lambda self, model: None)
    with must_fail():
        check_reconstruct(again(family))


# -- the marker ----------------------------------------------------------------------------------------------


def test_a_neighbour_check_that_is_off_is_seen(llama: Case, broken: pytest.MonkeyPatch) -> None:
    check_neighbours(llama)

    def careless(ids: torch.Tensor, marker: Any, *, prompt_length: int | None = None) -> torch.Tensor:
        return (ids[:, :prompt_length] == marker.id).to(torch.int64).argmax(dim=1)

    broken.setattr(injection_module, "find_markers", careless)
    with must_fail():
        check_neighbours(llama)


@pytest.mark.parametrize("side", ["left_id", "right_id"])
def test_a_neighbour_check_of_one_side_only_is_seen(llama: Case, broken: pytest.MonkeyPatch, side: str) -> None:
    def half(ids: torch.Tensor, marker: Any, *, prompt_length: int | None = None) -> torch.Tensor:
        shift = 1 if side == "left_id" else -1
        there = (ids == marker.id) & (ids.roll(shift, dims=1) == getattr(marker, side))
        if bool((there[:, :prompt_length].sum(dim=1) != 1).any()):
            raise InjectionError("The prompt of row 0 holds 0 valid injection markers")
        return there.to(torch.int64).argmax(dim=1)

    broken.setattr(injection_module, "find_markers", half)
    with pytest.raises((AssertionError, InjectionError, pytest.fail.Exception)):
        check_neighbours(llama)


def test_an_injection_at_the_wrong_token_is_seen(
    crossed: Case, broken: pytest.MonkeyPatch, vectors: torch.Tensor
) -> None:
    prompt = crossed.nla.av.engine.av.prompt
    moved = replace(prompt, marker_position=prompt.marker_position + 1)
    broken.setattr(crossed.nla.av.engine, "av", replace(crossed.nla.av.engine.av, prompt=moved))
    with must_fail():
        check_logits(crossed, vectors)


# -- BOS -----------------------------------------------------------------------------------------------------


def doubled(ids: Sequence[int]) -> list[int]:
    return [ids[0], *ids]


def dropped(ids: Sequence[int]) -> list[int]:
    return list(ids[1:])


@pytest.mark.parametrize("wrong", [doubled, dropped])
def test_bos_doubled_or_dropped_in_the_av_prompt_is_seen(
    crossed: Case, broken: pytest.MonkeyPatch, vectors: torch.Tensor, wrong: Callable[[Sequence[int]], list[int]]
) -> None:
    check_logits(crossed, vectors)
    build = AVPrompt.build.__func__  # type: ignore[attr-defined]

    def rebuilt(cls: type[AVPrompt], *args: Any) -> AVPrompt:
        prompt = build(cls, *args)
        ids = wrong(prompt.ids)
        return cls(tuple(ids), prompt.marker_position + len(ids) - len(prompt.ids), prompt.text)

    broken.setattr(AVPrompt, "build", classmethod(rebuilt))
    with must_fail():
        check_logits(again(crossed), vectors)


@pytest.mark.parametrize("wrong", [doubled, dropped])
def test_bos_doubled_or_dropped_in_the_ar_prompt_is_seen(
    family: Case, broken: pytest.MonkeyPatch, wrong: Callable[[Sequence[int]], list[int]]
) -> None:
    check_reconstruct(family)
    ids = ARPrompt._ids
    broken.setattr(ARPrompt, "_ids", lambda self, text: wrong(ids(self, text)))
    with must_fail():
        check_reconstruct(family)


@pytest.mark.parametrize("wrong", [doubled, dropped])
def test_bos_doubled_or_dropped_in_a_source_text_is_seen(
    family: Case, broken: pytest.MonkeyPatch, wrong: Callable[[Sequence[int]], list[int]]
) -> None:
    check_capture(family)
    encode = source_text_module.encode_source

    def rebuilt(*args: Any, **kwargs: Any) -> list[Encoded]:
        return [
            replace(
                e,
                ids=tuple(wrong(e.ids)),
                offsets=tuple(wrong(e.offsets)),  # type: ignore[arg-type]
                special=tuple(wrong(e.special)),
                roles=tuple(wrong(e.roles)),  # type: ignore[arg-type]
            )
            for e in encode(*args, **kwargs)
        ]

    broken.setattr(capture_module, "encode_source", rebuilt)
    with must_fail():
        check_capture(family)


# -- the vector ----------------------------------------------------------------------------------------------

WRONG_VECTORS: dict[str, Callable[[Injector, torch.Tensor], torch.Tensor]] = {
    "zero": lambda self, vectors: torch.zeros_like(vectors),
    "raw norm": lambda self, vectors: vectors,
    "of length 1": lambda self, vectors: vectors / vectors.norm(dim=-1, keepdim=True),
    "flipped": lambda self, vectors: -8 * vectors / vectors.norm(dim=-1, keepdim=True),
    "in bfloat16": lambda self, vectors: (8 * vectors / vectors.norm(dim=-1, keepdim=True)).bfloat16().float(),
    "of the row before": lambda self, vectors: (8 * vectors / vectors.norm(dim=-1, keepdim=True)).roll(1, dims=0),
}


@pytest.mark.parametrize("wrong", WRONG_VECTORS)
def test_a_wrong_vector_is_seen(crossed: Case, broken: pytest.MonkeyPatch, vectors: torch.Tensor, wrong: str) -> None:
    check_logits(crossed, vectors)
    broken.setattr(Injector, "entering", WRONG_VECTORS[wrong])
    with must_fail():
        check_logits(crossed, vectors)


@pytest.mark.parametrize("wrong", ["zero", "raw norm", "flipped"])
def test_a_wrong_vector_is_seen_in_the_text_too(
    crossed: Case, broken: pytest.MonkeyPatch, vectors: torch.Tensor, wrong: str
) -> None:
    broken.setattr(Injector, "entering", WRONG_VECTORS[wrong])
    with must_fail():
        check_generation(crossed, vectors)


def test_an_added_vector_that_is_not_scaled_to_the_residual_is_seen(
    make_case: Callable[..., Case], broken: pytest.MonkeyPatch, vectors: torch.Tensor
) -> None:
    from conftest import Spec

    adding = make_case(Spec("llama", kind="add"))
    check_logits(adding, vectors)
    broken.setattr(Injector, "entering", WRONG_VECTORS["raw norm"])
    with must_fail():
        check_logits(adding, vectors)


def test_an_added_vector_at_another_block_is_seen(
    make_case: Callable[..., Case], broken: pytest.MonkeyPatch, vectors: torch.Tensor
) -> None:
    from conftest import Spec

    adding = make_case(Spec("gemma3", kind="add"))
    broken.setattr(injection_module, "ADD_SITE", Site(0))
    with must_fail():
        check_logits(adding, vectors)


def test_a_vector_that_is_not_injected_at_all_is_seen(
    speaker: Case, broken: pytest.MonkeyPatch, vectors: torch.Tensor
) -> None:
    broken.setattr(Injector, "inject", lambda self, model, vectors, positions: nullcontext())
    with must_fail():
        check_logits(speaker, vectors)
    with pytest.raises(InjectionError, match="does not reach"):
        speaker.nla.av.engine.probe()
    with pytest.raises(InjectionError, match="does not reach"):
        NLA.from_pretrained(speaker.pair.root, components=("av",))


# -- reading and drawing -------------------------------------------------------------------------------------


def test_reading_a_padded_batch_at_its_last_column_is_seen(family: Case, broken: pytest.MonkeyPatch) -> None:
    check_reconstruct(family)
    broken.setattr(
        reconstructor_module, "last_real", lambda mask: torch.full((len(mask),), mask.shape[1] - 1, dtype=torch.long)
    )
    with must_fail():
        check_reconstruct(family)


def test_attending_to_padding_on_the_left_is_seen(family: Case, broken: pytest.MonkeyPatch) -> None:
    pad = batching_module.pad_right

    def left(sequences: Sequence[Sequence[int]], pad_id: int) -> tuple[torch.Tensor, torch.Tensor]:
        ids, mask = pad(sequences, pad_id)
        for row in range(len(ids)):
            ids[row] = ids[row].roll(int((mask[row] == 0).sum()))
        return ids, torch.ones_like(mask)

    broken.setattr(capture_module, "pad_right", left)
    with must_fail():
        check_capture(family)
    broken.setattr(reconstructor_module, "pad_right", left)
    with must_fail():
        check_reconstruct(family)


def test_randomness_that_depends_on_the_batch_is_seen(
    llama: Case, broken: pytest.MonkeyPatch, vectors: torch.Tensor
) -> None:
    from nla_hub.engines import transformers as engine_module

    draws = uniforms(0, [RowKey(str(i)) for i in range(7)], STEPS)
    check_generation(llama, vectors, draws=draws)
    broken.setattr(engine_module, "choose", lambda logits, d, t: sampling_module.choose(logits, d.roll(1), t))
    with must_fail():
        check_generation(llama, vectors, draws=draws)
