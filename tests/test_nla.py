"""The front door: shapes, scores, halves that are missing, and typed errors before any model runs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Case, Spec
from parity import TEXTS, close

from nla_hub import NLA, Explanation, SteeringVector, loading
from nla_hub.engines.base import Completion
from nla_hub.errors import (
    CheckpointError,
    InputError,
    NLAError,
)
from nla_hub.flags import mostly_cjk
from nla_hub.geometry import Reference
from nla_hub.library import Library
from nla_hub.locate import Ref
from nla_hub.opening import open_half
from nla_hub.pretrained import LoadOptions
from nla_hub.sampling import vector_hash
from nla_hub.sidecar import ReferenceRecord, Sidecar, Site
from nla_hub.testing import D_MODEL, RandomPair
from nla_hub.training.recipe import load_recipe

FAST: dict[str, Any] = {"temperature": 0, "max_new_tokens": 4}


def rows(n: int) -> torch.Tensor:
    return torch.randn(n, D_MODEL, generator=torch.Generator().manual_seed(2))


class Scripted:
    """An engine that writes what it is told to, one text a row."""

    name = "scripted"
    kinds = frozenset({"overwrite", "add"})

    def __init__(self, texts: list[str]) -> None:
        self.texts = texts
        self.calls: list[int] = []

    def generate(self, vectors: torch.Tensor, draws: Any, *, progress: Any = None, **_: Any) -> list[Completion]:
        self.calls.append(len(vectors))
        return [Completion((1,), self.texts[i % len(self.texts)], "tag", torch.zeros(1)) for i in range(len(vectors))]

    def probe(self) -> None: ...

    def close(self) -> None: ...


def scripted(case: Case, *texts: str, record: ReferenceRecord | None = None) -> NLA:
    """The pair of a case whose AV writes `texts`."""
    nla = case.nla
    sidecar = nla.av.sidecar.with_(fve_reference=record)
    av = replace(nla.av, engine=Scripted(list(texts)), sidecar=sidecar)
    return NLA(name="scripted", av=av, ar=nla.ar, base=nla._base)


# -- shapes -------------------------------------------------------------------------------------------------------------


def test_one_vector_gives_one_explanation_and_several_a_list(llama: Case) -> None:
    v = rows(2)
    one = llama.nla.verbalize(v[0], **FAST)
    assert isinstance(one, Explanation)
    for same in (v[0].numpy(), v[0].tolist(), v[0].double()):
        assert llama.nla.verbalize(same, **FAST) == one
    for several in (v, v.numpy(), v.tolist(), list(v), v[None]):
        found = llama.nla.verbalize(several, **FAST)
        assert isinstance(found, list)
        assert [e.raw for e in found] == [llama.nla.verbalize(x, **FAST).raw for x in v]
    assert isinstance(llama.nla.verbalize(v[:1], **FAST), list)


def test_with_several_samples_each_becomes_a_list(llama: Case) -> None:
    run = {"temperature": 0.9, "max_new_tokens": 4, "n": 3}
    one = llama.nla.verbalize(rows(1)[0], **run)
    assert [e.sample for e in one] == [0, 1, 2]
    many = llama.nla.verbalize(rows(2), **run)
    assert [[e.sample for e in group] for group in many] == [[0, 1, 2]] * 2
    assert many[0] == one


def test_captured_activations_go_straight_in(llama: Case) -> None:
    acts = llama.nla.capture(list(TEXTS), positions=[0, -1])
    found = llama.nla.verbalize(acts, **FAST)
    assert [(e.doc_id, e.position, e.token) for e in found] == list(
        zip(acts.doc_id, acts.position, acts.token, strict=True)
    )
    assert found[0].flags[:2] == ("early", "special_token")
    bare = llama.nla.verbalize(acts.vectors, **FAST)
    assert [e.raw for e in bare] == [e.raw for e in found]
    assert all("off_distribution" in e.flags for e in bare)
    assert {e.position for e in bare} == {-1}
    assert [e.doc_id for e in bare] == [vector_hash(row) for row in acts.vectors]


def test_sampled_rows_of_texts_are_keyed_by_text_and_position(llama: Case) -> None:
    run = {"temperature": 0.9, "max_new_tokens": 12}
    acts = llama.nla.capture(["the cat sees", "a dog walks"])
    together = llama.nla.verbalize(acts, **run)
    alone = llama.nla.verbalize(llama.nla.capture("a dog walks", doc_ids=["any name"]), **run)
    assert alone[0].raw == together[1].raw


def test_an_explanation_says_how_it_was_made(llama: Case) -> None:
    found = llama.nla.verbalize(rows(1)[0] * 5, temperature=0.5, max_new_tokens=7, seed=3)
    assert found.sampling is not None
    assert (found.sampling.temperature, found.sampling.max_new_tokens, found.sampling.seed) == (0.5, 7, 3)
    assert found.norm == pytest.approx(float(rows(1)[0].norm()) * 5, rel=1e-6)
    assert found.model == str(llama.pair.root)
    assert found.cosine is None


# -- statuses and scores ------------------------------------------------------------------------------------------------

OUTPUTS = ("<explanation>the cat</explanation>", "<explanation>the", "nothing", "<explanation> </explanation>")


def test_every_row_has_a_status_and_only_ok_rows_a_score(llama: Case) -> None:
    nla = scripted(llama, *OUTPUTS)
    found = nla.explain(list(TEXTS), temperature=0.7)
    assert [e.status for e in found] == ["ok", "truncated", "no_tags", "empty"]
    assert [e.text for e in found] == ["the cat", None, None, None]
    assert [e.raw for e in found] == list(OUTPUTS)
    assert [e.mse is None for e in found] == [False, True, True, True]
    expected = torch.nn.functional.cosine_similarity(
        llama.ar.vector("the cat"), llama.nla.capture(TEXTS[0]).vectors[0], dim=0
    )
    assert found[0].cosine == pytest.approx(float(expected), abs=1e-5)
    assert found[0].mse == pytest.approx(2 * (1 - found[0].cosine))
    assert found.counts() == {"ok": 1, "truncated": 1, "no_tags": 1, "empty": 1}
    assert found.fve().value is None


def test_the_reference_of_the_pair_is_the_denominator(llama: Case) -> None:
    record = ReferenceRecord("some data", 500, 0.8, 0.95, 0.001, 0.002)
    nla = scripted(llama, *OUTPUTS, record=record)
    assert nla.reference == Reference(**vars(record))
    found = nla.explain(list(TEXTS), temperature=0.7)
    assert found.fve().value == pytest.approx(1 - (found[0].mse + 6) / 4 / 0.8)
    assert str(found.fve("mean_norm")).startswith("FVE (mean-norm, some data, n=4): ")
    assert all("norm_outlier" in e.flags for e in found)


def test_score_takes_texts_explanations_and_gaps(llama: Case) -> None:
    v = rows(4)
    ok = Explanation("the cat", "x", "ok", 1.0)
    bad = Explanation(None, "x", "no_tags", 1.0)
    scores = llama.nla.score([ok, "the cat", bad, None], v)
    cos = torch.nn.functional.cosine_similarity(llama.ar.vector("the cat")[None], v, dim=1).tolist()
    assert scores.cosine[:2] == pytest.approx(cos[:2], abs=1e-5)
    assert scores.cosine[2:] == (None, None)
    assert scores.mse[2:] == (None, None)
    one = llama.nla.score("the cat", v[0])
    assert one.cosine == pytest.approx(cos[:1], abs=1e-5)
    assert llama.nla.score([], torch.empty(0, D_MODEL)).mse == ()


def test_enough_rows_are_scored_against_themselves(llama: Case) -> None:
    v = rows(120)
    scores = llama.nla.score(["the cat"] * 120, v)
    u = v.double() / v.double().norm(dim=-1, keepdim=True)
    expected = 1 - np.mean(scores.mse) / float((u - u.mean(0)).square().sum(-1).mean())
    assert scores.fve().value == pytest.approx(expected)
    assert scores.fve().dataset == "in-sample"
    assert llama.nla.score(["the cat"] * 99, v[:99]).fve().value is None


def test_explain_is_capture_verbalize_and_score(llama: Case) -> None:
    run = {"temperature": 0.8, "max_new_tokens": 6, "seed": 4, "n": 2}
    found = llama.nla.explain(list(TEXTS), positions=[-1, -2], **run)
    acts = llama.nla.capture(list(TEXTS), positions=[-1, -2])
    flat = [e for group in llama.nla.verbalize(acts, **run) for e in group]
    assert [e.raw for e in found] == [e.raw for e in flat]
    assert [e.sample for e in found] == [0, 1] * 8
    assert [e.position for e in found] == [p for p in acts.position for _ in range(2)]
    scores = llama.nla.score(flat, acts.vectors.repeat_interleave(2, dim=0))
    assert [e.cosine for e in found] == list(scores.cosine)


def test_every_sample_is_scored_against_its_own_vector(llama: Case) -> None:
    nla = scripted(llama, "<explanation>the cat</explanation>")
    found = nla.explain(list(TEXTS), n=2, temperature=0.7)
    vectors = nla.capture(list(TEXTS)).vectors
    expected = torch.nn.functional.cosine_similarity(llama.ar.vector("the cat")[None], vectors, dim=1)
    assert len(set(expected.tolist())) == len(TEXTS)
    assert [e.cosine for e in found] == pytest.approx(expected.repeat_interleave(2).tolist(), abs=1e-5)


def test_nothing_in_gives_nothing_out(llama: Case) -> None:
    found = llama.nla.explain([])
    assert len(found) == 0
    assert found.fve().value is None


def test_one_conversation_is_one_document(llama: Case) -> None:
    talk = [{"role": "user", "content": "the cat"}]
    assert len(llama.nla.explain(talk, **FAST)) == 1
    assert len(llama.nla.explain([talk, talk], **FAST)) == 2
    assert len(llama.nla.explain([talk, "the cat"], **FAST)) == 2


# -- halves and names --------------------------------------------------------------------------------------------------


def test_the_weights_of_the_half_that_is_not_wanted_are_never_opened(copied: RandomPair, llama: Case) -> None:
    (copied.ar / "model.safetensors").write_bytes(b"not read")
    av = NLA.from_pretrained(copied.root, components=("av",))
    assert [e.raw for e in av.explain(list(TEXTS), **FAST)] == [e.raw for e in llama.nla.explain(list(TEXTS), **FAST)]
    assert av.explain("the cat", **FAST)[0].cosine is None
    with pytest.raises(InputError, match="The AR was not loaded"):
        av.reconstruct("the cat")
    with pytest.raises(NLAError):
        NLA.from_pretrained(copied.root)


def test_an_ar_alone_reconstructs(copied: RandomPair, llama: Case) -> None:
    (copied.av / "model.safetensors").write_bytes(b"not read")
    ar = NLA.from_pretrained(copied.root, components="ar")  # type: ignore[arg-type]
    close(ar.reconstruct("the cat"), llama.ar.vector("the cat"))
    assert ar.site == Site(2)
    assert ar.d_model == D_MODEL
    with pytest.raises(InputError, match=r"The AV was not loaded.*\n.*components"):
        ar.verbalize(rows(1))


def test_a_pair_whose_ar_is_not_known_says_what_to_pass(copied: RandomPair) -> None:
    copied.ar.rename(copied.root / "elsewhere")
    with pytest.raises(CheckpointError, match=r"AR half of this pair is not known.*\n.*ar="):
        NLA.from_pretrained(copied.av)
    assert NLA.from_pretrained(copied.av, ar=copied.root / "elsewhere").ar


def test_a_pair_whose_base_is_not_known_says_so_only_when_it_is_needed(copied: RandomPair) -> None:

    copied.source.rename(copied.root / "elsewhere")
    for name in (None, "gpt2", "/mnt/models/base", "a/b/c", "./local"):
        for half in (copied.av, copied.ar):
            Sidecar.read(half).with_(base_model=name).write(half)
        nla = NLA.from_pretrained(copied.root)
        assert nla.reconstruct("the cat").shape == (D_MODEL,)
        with pytest.raises(CheckpointError, match=r"base model.*\n.*base_model="):
            nla.capture("the cat")
    assert NLA.from_pretrained(copied.root, base_model=copied.root / "elsewhere").capture("the cat")


@pytest.mark.parametrize("components", [(), ("av", "base"), "both", ("AV",)])
def test_unknown_components_are_refused(llama: Case, components: Any) -> None:
    with pytest.raises(InputError, match="Unknown components"):
        NLA.from_pretrained(llama.pair.root, components=components)


def test_keywords_are_those_of_transformers(llama: Case) -> None:
    with pytest.warns(FutureWarning, match="torch_dtype is called dtype now"):
        nla = NLA.from_pretrained(llama.pair.root, torch_dtype="bfloat16", components=("ar",))
    assert next(nla.ar.model.trunk.parameters()).dtype == torch.bfloat16
    with pytest.raises(TypeError, match="unexpected keywords: revison"):
        NLA.from_pretrained(llama.pair.root, revison="main")


def test_bfloat16_gives_nearly_the_same_vectors(family: Case) -> None:
    nla = NLA.from_pretrained(family.pair.root, dtype=torch.bfloat16, device_map="cpu")
    exact, half = (x.capture(list(TEXTS), positions="all").vectors for x in (family.nla, nla))
    assert half.dtype == torch.float32
    assert float(torch.nn.functional.cosine_similarity(exact, half).min()) > 0.99
    assert nla.explain("the cat", **FAST)[0].raw


def test_what_it_is_is_printed_without_secrets(llama: Case) -> None:
    nla = NLA.from_pretrained(llama.pair.root, token="hf_verysecret", components=("ar",))
    assert "hf_verysecret" not in repr(nla)
    assert "L2" in repr(llama.nla)
    assert "av+ar" in repr(llama.nla)
    assert f"d={D_MODEL}" in repr(llama.nla)


def test_both_kinds_of_injection_go_through_the_same_door(make_case: Callable[[Spec], Case]) -> None:
    adding, overwriting = make_case(Spec("llama", kind="add")), make_case(Spec("llama"))
    assert adding.nla.sidecar.injection.kind == "add"
    assert adding.nla.verbalize(rows(1)[0], **FAST).raw
    assert overwriting.nla.sidecar.injection.scale == 8.0


@pytest.mark.parametrize(
    "call",
    [
        lambda nla: nla.capture("some words", slice(0, 3, 0)),
        lambda nla: nla.capture(["some words"], doc_ids=[3]),
        lambda nla: nla.verbalize(torch.ones(1, nla.d_model), keys=5),
        lambda nla: nla.score(None, torch.ones(1, nla.d_model)),
        lambda nla: nla.reconstruct(None),
        lambda nla: NLA.from_pretrained("~no-such-user-here/x"),
        lambda nla: load_recipe("~no-such-user-here/recipe.yaml"),
        lambda nla: SteeringVector([[1.0, 2.0]], nla.site),
        lambda nla: nla.check_text("some words", slice(90, 99)),
        lambda nla: (
            SteeringVector(torch.ones(4), nla.site, "one/model")
            + SteeringVector(torch.ones(4), nla.site, "another/model")
        ),
    ],
)
def test_a_wrong_argument_is_a_typed_error(llama: Case, call: Any) -> None:
    with pytest.raises(InputError):
        call(llama.nla)


def test_later_pieces_of_a_long_text_are_early_too(llama: Case) -> None:
    rows = llama.nla.explain("the old dog walks " * 200, [3], overflow="stride", temperature=0, max_new_tokens=2)
    assert len(rows) > 1
    assert rows[1].position is not None
    assert rows[1].position > 10
    assert all("early" in row.flags for row in rows)


def test_the_marker_echo_looks_at_the_document_and_not_at_one_token(llama: Case) -> None:
    acts = llama.nla.capture("\u4f60\u597d\u4e16\u754c\u4f60\u597d\u4e16\u754c.", positions="last")
    assert mostly_cjk(acts.context[0])


class _Stop(Exception):
    pass


@pytest.mark.parametrize(
    ("name", "expected"), [("gemma-3-12b", "kitft/nla-gemma3-12b-L32-ar"), ("owner/some-av", "stranger/other-ar")]
)
def test_a_sidecar_replaces_a_guessed_ar_but_never_a_pinned_one(
    llama: Case, monkeypatch: pytest.MonkeyPatch, name: str, expected: str
) -> None:
    asked: list[str] = []
    mine = open_half(Ref("directory", str(llama.pair.av)), "av", library=Library(), load_options=LoadOptions())

    def opened(ref: Any, role: str, **settings: Any) -> Any:
        asked.append(ref.name)
        if role == "ar":
            raise _Stop
        return replace(mine, sidecar=mine.sidecar.with_(pair_repo="stranger/other-ar"))

    monkeypatch.setattr(loading, "open_half", opened)
    with pytest.raises(_Stop):
        NLA.from_pretrained(name)
    assert asked[-1] == expected


def test_an_unknown_dtype_and_odd_messages_are_understood(llama: Case) -> None:
    with pytest.raises(CheckpointError, match="Unknown dtype"):
        NLA.from_pretrained(llama.pair.root, dtype=None)  # type: ignore[arg-type]
    message = {"role": "user", "content": "a cat", "seen": {1, 2}}
    assert len(llama.nla.capture([message]).doc_id) == 1
