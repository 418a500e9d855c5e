"""Memory modes: the same results whether parts stay, take turns, or are roles of one base."""

from __future__ import annotations

import gc
import shutil
import weakref
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Case
from parity import close, engine_logits
from transformers import BitsAndBytesConfig
from wild import TEXTS, Built, World, peft_pair, vectors

from nla_hub import NLA, hub
from nla_hub.errors import CheckpointError, GateFailedError, InputError
from nla_hub.parts import Parts
from nla_hub.round_trip import TEXTS as GATE_TEXTS
from nla_hub.round_trip import round_trip

SETTINGS: dict[str, Any] = {"temperature": 0, "max_new_tokens": 8}


@pytest.fixture(scope="module")
def lora_pair(tmp_path_factory: pytest.TempPathFactory) -> Built:
    pytest.importorskip("peft", reason="the LoRA pair is written with peft")
    with pytest.warns(FutureWarning, match="is_gradient_checkpointing"):
        return peft_pair(World(), tmp_path_factory.mktemp("peft"))


def modules() -> Iterator[Any]:
    """Transformers models that are alive."""
    gc.collect()
    return (o for o in gc.get_objects() if isinstance(o, torch.nn.Module) and hasattr(o, "generation_config"))


# -- staged --------------------------------------------------------------------------------------------------


def test_staged_explains_as_resident_does(llama: Case) -> None:
    staged = NLA.from_pretrained(llama.pair.root, memory="staged")
    assert staged.memory == "staged"
    mine = staged.explain(list(TEXTS), **SETTINGS)
    theirs = llama.nla.explain(list(TEXTS), **SETTINGS)
    assert [(e.raw, e.cosine, e.norm) for e in mine] == [(e.raw, e.cosine, e.norm) for e in theirs]


def test_staged_holds_one_part_at_a_time_and_frees_it(llama: Case) -> None:
    nla = NLA.from_pretrained(llama.pair.root, memory="staged")
    assert nla._parts.loaded == ()
    seen: list[weakref.ref[Any]] = []
    for use, name in (
        (lambda: nla.capture("the cat"), "trunk"),
        (lambda: nla.verbalize(vectors(), **SETTINGS), "av"),
        (lambda: nla.reconstruct("the cat"), "ar"),
        (lambda: nla.source, "source"),
    ):
        use()
        assert nla._parts.loaded == (name,)
        gc.collect()
        assert [ref() for ref in seen] == [None] * len(seen), f"{name} was loaded beside another part"
        part = nla._parts.get(name)  # type: ignore[arg-type]
        model = {"av": lambda p: p.engine.model, "ar": lambda p: p.model.trunk}.get(name, lambda p: p.loaded.model)(
            part
        )
        seen.append(weakref.ref(model))
        del part, model


def test_staged_faults_are_told_before_any_weight_is_read(llama: Case, copied: Any) -> None:
    (copied.av / "model.safetensors").write_bytes(b"no weights")
    nla = NLA.from_pretrained(copied.root, memory="staged")
    with pytest.raises(CheckpointError, match="damaged"):
        nla.verbalize(vectors())
    text = (copied.ar / "nla_meta.yaml").read_text(encoding="utf-8")
    (copied.ar / "nla_meta.yaml").write_text(text.replace("critic_suffix_ids:\n", "critic_suffix_ids:\n  - 1\n"))
    with pytest.raises(CheckpointError, match="critic_suffix_ids"):
        NLA.from_pretrained(copied.root, memory="staged")


def test_release_frees_everything_and_loads_it_again(llama: Case) -> None:
    nla = NLA.from_pretrained(llama.pair.root, memory="resident")
    before = nla.reconstruct("the cat")
    assert set(nla._parts.loaded) == {"av", "ar"}
    nla.release()
    assert nla._parts.loaded == ()
    assert torch.equal(nla.reconstruct("the cat"), before)


def test_parts_that_cannot_come_back_are_never_freed() -> None:
    parts = Parts({}, {"av": "a verbalizer"})
    parts.release()
    assert parts.loaded == ("av",)


# -- shared --------------------------------------------------------------------------------------------------


def test_one_base_plays_source_av_and_ar(lora_pair: Built) -> None:
    nla = NLA.from_pretrained(lora_pair.name, memory="shared")
    alone = NLA.from_pretrained(lora_pair.name, memory="resident")
    assert nla.memory == "shared"
    captured = alone.capture(list(TEXTS), positions="all")
    for _ in range(2):  # no role leaves a trace for the next
        assert torch.equal(nla.capture(list(TEXTS), positions="all").vectors, captured.vectors)
        close(nla.reconstruct(list(TEXTS)), lora_pair.vectors)  # type: ignore[arg-type]
        mine, theirs = (n.explain(list(TEXTS), **SETTINGS) for n in (nla, alone))
        assert [e.raw for e in mine] == [e.raw for e in theirs]
    with nla.av.engine.roles.playing("av"):  # type: ignore[attr-defined]
        close(engine_logits(nla.av.engine.engine, vectors()), lora_pair.logits)  # type: ignore[attr-defined, arg-type]
    assert nla.source.loaded.model is nla.ar.model.trunk is nla.av.engine.av.loaded.model  # type: ignore[attr-defined]


def test_a_shared_source_steers_as_it_is(lora_pair: Built) -> None:
    nla = NLA.from_pretrained(lora_pair.name, memory="shared")
    alone = NLA.from_pretrained(lora_pair.name)
    ids = torch.tensor([[0, 30, 31, 32]])
    vector = nla.steering_vector(to="a cat")
    close(vector.vector, alone.steering_vector(to="a cat").vector)
    outs = []
    for one in (nla, alone):
        with vector.apply(one.source.loaded.model, strength=0.5), torch.no_grad():
            outs.append(one.source.loaded.model(ids).logits)
    assert torch.equal(*outs)


def test_a_steered_source_steers_no_other_role(lora_pair: Built) -> None:
    nla = NLA.from_pretrained(lora_pair.name, memory="shared")
    vector = nla.steering_vector(to="a cat")
    rows = vectors()
    free = [e.raw for e in nla.verbalize(rows, **SETTINGS)]
    model = nla.source.loaded.model
    ids = torch.tensor([[0, 30, 31, 32]])
    with torch.no_grad(), vector.apply(model, strength=4.0):
        steered = model(ids).logits
        assert [e.raw for e in nla.verbalize(rows, **SETTINGS)] == free
        close(nla.reconstruct(list(TEXTS)), lora_pair.vectors)  # type: ignore[arg-type]
        assert torch.equal(model(ids).logits, steered)
    with torch.no_grad():
        assert not torch.equal(model(ids).logits, steered)


def test_threads_take_turns_on_a_shared_base(lora_pair: Built) -> None:
    nla = NLA.from_pretrained(lora_pair.name, memory="shared")
    expected = (
        [e.raw for e in nla.verbalize(vectors(), **SETTINGS)],
        nla.capture(list(TEXTS), positions="all").vectors,
    )

    def work(i: int) -> bool:
        if i % 3 == 0:
            return [e.raw for e in nla.verbalize(vectors(), **SETTINGS)] == expected[0]
        if i % 3 == 1:
            close(nla.reconstruct(list(TEXTS)), lora_pair.vectors)  # type: ignore[arg-type]
            return True
        return torch.equal(nla.capture(list(TEXTS), positions="all").vectors, expected[1])

    with ThreadPoolExecutor(3) as pool:
        assert all(pool.map(work, range(18)))


def test_nothing_is_asked_of_the_hub_about_a_source_that_is_not_needed(
    llama: Case, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    shutil.copytree(llama.pair.root / "av", tmp_path / "x-av")  # no source beside it; its sidecar names one on the Hub
    shutil.copytree(llama.pair.root / "ar", tmp_path / "x-ar")
    for name in ("listing", "fetch", "fetch_files", "headers", "exists"):
        monkeypatch.setattr(hub, name, lambda *_, **__: pytest.fail("the Hub was asked"))
    nla = NLA.from_pretrained(tmp_path / "x-av")
    assert (nla.memory, str(nla._base)) == ("resident", "random/source")
    assert NLA.from_pretrained(tmp_path / "x-av", components=("av",)).memory == "resident"


def test_complete_models_cannot_share_a_base(llama: Case) -> None:
    with pytest.raises(CheckpointError, match="cannot share one base") as caught:
        NLA.from_pretrained(llama.pair.root, memory="shared")
    assert caught.value.faults == ("the AV is a complete model", "the AR is a complete model")
    assert "staged" in str(caught.value)


def test_an_unknown_mode_is_a_typed_error(llama: Case) -> None:
    with pytest.raises(InputError, match="Unknown memory mode"):
        NLA.from_pretrained(llama.pair.root, memory="swap")  # type: ignore[arg-type]


# -- the gate ------------------------------------------------------------------------------------------------


def test_the_packaged_pair_reads_its_own_vectors() -> None:
    found = NLA.from_pretrained("tiny").round_trip()
    assert (found.n, found.usable) == (len(GATE_TEXTS), len(GATE_TEXTS))
    assert found.margin > 0.3
    found.require()


def test_a_pair_that_lost_its_meaning_does_not_pass(llama: Case) -> None:
    with pytest.raises(GateFailedError, match="no longer reads its own vectors"):
        llama.nla.round_trip().require()


@pytest.mark.parametrize("what", ["constant", "nan", "zero", "mute"])
def test_broken_halves_fail_the_gate(what: str, tmp_path: Path) -> None:
    rows = {"nan": torch.full((4,), float("nan")), "zero": torch.zeros(4)}.get(what, torch.arange(4.0))

    def reconstruct(texts: Any) -> torch.Tensor:
        return rows.expand(len(texts), -1)

    found = round_trip(reconstruct, lambda v: [None if what == "mute" else "words"] * len(v))
    with pytest.raises(GateFailedError):
        found.require()


# -- quantised (needs bitsandbytes, extra quant) ---------------------------------------------------------------


def quantisation(bits: int) -> Any:
    pytest.importorskip("bitsandbytes", reason="quantised loading needs the quant extra (bitsandbytes)")
    return BitsAndBytesConfig(load_in_8bit=True) if bits == 8 else BitsAndBytesConfig(load_in_4bit=True)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.filterwarnings("ignore")  # of bitsandbytes about dtypes
def test_a_quantised_pair_passes_the_gate_and_says_nearly_the_same(bits: int) -> None:
    text = "today otto came to the island. he had a drum in red."
    nla = NLA.from_pretrained("tiny", quantization_config=quantisation(bits))
    assert nla.round_trip().margin > 0.2
    quantised, exact = (one.explain(text, temperature=0)[0] for one in (nla, NLA.from_pretrained("tiny")))
    assert quantised.cosine is not None and exact.cosine is not None
    assert quantised.cosine > exact.cosine - 0.1


@pytest.mark.filterwarnings("ignore")
def test_a_quantised_pair_that_does_not_read_its_vectors_is_refused_on_loading(llama: Case) -> None:
    with pytest.raises(GateFailedError, match="without quantization_config"):
        NLA.from_pretrained(llama.pair.root, quantization_config=quantisation(8))


@pytest.mark.filterwarnings("ignore")
def test_a_lora_is_laid_over_a_quantised_base(lora_pair: Built) -> None:
    nla = NLA.from_pretrained(lora_pair.name, components=("ar",), quantization_config=quantisation(8))
    found = nla.reconstruct(list(TEXTS))
    assert lora_pair.vectors is not None
    assert float(torch.cosine_similarity(found, lora_pair.vectors, dim=-1).min()) > 0.95


def test_a_closed_pair_has_given_everything_back_and_can_be_asked_again(llama: Case) -> None:
    with NLA.from_pretrained(llama.pair.root) as nla:
        before = nla.reconstruct("the cat")
        closed: list[str] = []
        nla.av.engine.close = lambda: closed.append("engine")  # type: ignore[method-assign]
        assert set(nla._parts.loaded) >= {"av", "ar"}
    assert (closed, nla._parts.loaded) == (["engine"], ())
    assert torch.equal(nla.reconstruct("the cat"), before)
