"""Vectors come from the output of block K, of the token that was asked for."""

from __future__ import annotations

import pytest
import torch
from conftest import Case
from parity import TEXTS, check_capture, close

from nla_hub.adapters import adapter_for
from nla_hub.capture import run_trunk
from nla_hub.errors import ContextLengthError, InputError, PositionError, TextError, VectorError
from nla_hub.pretrained import LoadOptions, load_trunk
from nla_hub.sidecar import Site
from nla_hub.testing import LAYERS

LONG = "the cat sees a house and the dog walks on it " * 80
TALK = [
    {"role": "user", "content": "the cat sees what ?"},
    {"role": "assistant", "content": "a house"},
    {"role": "user", "content": "and then ?"},
]


def test_captured_vectors_equal_hidden_states_in_padded_batches(case: Case) -> None:
    check_capture(case)


@pytest.mark.parametrize("layer", range(LAYERS - 1))
def test_the_hook_at_any_layer_equals_the_next_hidden_state(family: Case, layer: int) -> None:
    ids = family.source.ids(TEXTS[1])
    trunk = load_trunk(family.pair.source, Site(layer), LoadOptions())
    assert len(trunk.adapter.block_list(trunk.model)) == layer + 1
    rows = [(ids, list(range(len(ids))))]
    got = run_trunk(trunk.adapter, trunk.model, Site(layer), rows, pad_id=0, batch_size=1)
    close(got, family.source.hidden(ids, layer + 1))
    close(
        run_trunk(
            adapter_for(family.source.model.config), family.source.model, Site(layer), rows, pad_id=0, batch_size=1
        ),
        family.source.hidden(ids, layer + 1),
    )


def test_the_last_block_is_not_the_last_hidden_state(family: Case) -> None:
    """`hidden_states[L]` is behind the final norm; the hook reads the residual stream before it."""
    ids = family.source.ids(TEXTS[0])
    trunk = load_trunk(family.pair.source, Site(LAYERS - 1), LoadOptions())
    got = run_trunk(
        trunk.adapter, trunk.model, Site(LAYERS - 1), [(ids, list(range(len(ids))))], pad_id=0, batch_size=1
    )
    normed = family.source.hidden(ids, LAYERS)
    assert float((got - normed).abs().max()) > 0.1
    model = family.source.model
    with torch.no_grad():
        close(adapter_for(model.config).final_norm_module(model)(got), normed)


def test_a_layer_that_the_model_does_not_have_is_refused(family: Case) -> None:
    from nla_hub.errors import CheckpointError

    with pytest.raises(CheckpointError, match=rf"no such layer.*K = {LAYERS}, expected 0 to {LAYERS - 1}"):
        load_trunk(family.pair.source, Site(LAYERS), LoadOptions())


def test_the_complete_source_gives_the_same_vectors_as_the_trunk(family: Case) -> None:
    from nla_hub import NLA

    nla = NLA.from_pretrained(family.pair.root, components=("ar",))
    trunk = nla.capture(list(TEXTS), positions="all").vectors
    assert len(nla.source.loaded.adapter.block_list(nla.source.loaded.model)) == LAYERS
    close(nla.capture(list(TEXTS), positions="all").vectors, trunk)


@pytest.mark.parametrize("batch_size", [1, 3, 7])
def test_batch_size_and_order_do_not_change_vectors(case: Case, batch_size: int) -> None:
    texts = [*TEXTS, *(t[:9] for t in TEXTS[:2]), "the"]
    expected = torch.cat([case.nla.capture(t).vectors for t in texts])
    close(case.nla.capture(texts, batch_size=batch_size).vectors, expected)
    close(case.nla.capture(texts[::-1], batch_size=batch_size).vectors, expected.flip(0))


def test_rows_keep_the_order_of_texts_and_positions(llama: Case) -> None:
    acts = llama.nla.capture([TEXTS[0], TEXTS[1]], positions=[3, 0, -1])
    assert acts.position[:2] == (3, 0)
    assert acts.document == (0, 0, 0, 1, 1, 1)
    full = llama.nla.capture(TEXTS[0], positions="all")
    close(acts.vectors[:3], full.vectors[[3, 0, -1]])
    assert acts.token[0] == full.token[3]


@pytest.mark.parametrize(
    ("positions", "expected"),
    [
        ("last", [-1]),
        (0, [0]),
        (-2, [-2]),
        ([1, 3], [1, 3]),
        (torch.tensor(2), [2]),
        (torch.tensor([2, 1]), [2, 1]),
        (slice(1, 4), [1, 2, 3]),
        (slice(-2, None), [-2, -1]),
        (lambda encoded: [i for i, t in enumerate(encoded.special) if t], [0]),
    ],
)
def test_positions_may_be_named_in_every_way(llama: Case, positions: object, expected: list[int]) -> None:
    acts = llama.nla.capture(TEXTS[0], positions=positions)
    n = len(llama.source.ids(TEXTS[0]))
    assert list(acts.position) == [p % n for p in expected]


def test_positions_of_a_role_are_the_tokens_of_its_contents(case: Case) -> None:
    acts = case.nla.capture(TALK, positions="user")
    assert "".join(acts.token) == TALK[0]["content"] + TALK[2]["content"]
    assert "".join(case.nla.capture(TALK, positions="assistant").token) == "a house"


@pytest.mark.parametrize("word", ["user", "a", "assistant", "e", "\n", "|"])
def test_a_content_that_the_template_spells_too_is_found_at_its_own_place(llama: Case, word: str) -> None:
    talk = [{"role": "user", "content": word}, {"role": "assistant", "content": "the house"}]
    acts = llama.nla.capture(talk, positions="user")
    whole = llama.nla.capture(talk, positions="all")
    header = whole.token.index("<|user|>")
    assert "".join(acts.token) == word
    assert acts.position == tuple(range(header + 2, header + 2 + len(acts)))


def test_rows_carry_their_provenance(llama: Case) -> None:
    acts = llama.nla.capture([TEXTS[0], TALK], positions=[0, -1], doc_ids=["x", "y"])
    assert acts.doc_id == ("x", "x", "y", "y")
    assert acts.special[0] is True
    assert [k.position for k in acts.keys] == list(acts.position)
    assert acts.keys[0].document != acts.keys[2].document
    assert acts.char_end[1] == len(TEXTS[0])
    assert acts.site == llama.pair.site
    assert acts.vectors.dtype == torch.float32
    part = acts[1:3]
    assert (part.position, part.doc_id, part.keys) == (acts.position[1:3], ("x", "y"), acts.keys[1:3])


def test_without_ids_a_document_is_called_by_its_hash(llama: Case) -> None:
    a, b = llama.nla.capture(["the cat", "the cat"]).doc_id
    assert a == b == llama.nla.capture("the cat").keys[0].document
    assert len(a) == 64


@pytest.mark.parametrize("position", [6, -7, 10_000, [0, 7]])
def test_a_position_out_of_range_names_the_text_and_the_range(llama: Case, position: int | list[int]) -> None:
    assert len(llama.source.ids("the cat sees the house")) == 7 - 1
    with pytest.raises(PositionError, match=r"text [01]: .*got position .*expected 0 to \d+ \(or -\d+ to -1\)"):
        llama.nla.capture([LONG, "the cat sees the house"], positions=position, overflow="truncate")


@pytest.mark.parametrize("position", [True, 1.5, None, "first", ["last"], [0.5]])
def test_a_position_that_is_none_is_a_typed_error(llama: Case, position: object) -> None:
    with pytest.raises(PositionError, match="text 0: "):
        llama.nla.capture("the cat", positions=position)


def test_a_role_that_a_text_does_not_have_is_an_error(llama: Case) -> None:
    with pytest.raises(PositionError, match="no user message"):
        llama.nla.capture("the cat", positions="user")
    with pytest.raises(PositionError, match="no assistant message"):
        llama.nla.capture(TALK[:1], positions="assistant")


def test_too_long_a_text_is_an_error_unless_asked_otherwise(llama: Case) -> None:
    n = len(llama.source.ids(LONG))
    assert n > 512
    with pytest.raises(ContextLengthError, match=rf"text 1: .*{n} tokens, expected at most 512.*\n.*stride"):
        llama.nla.capture(["the cat", LONG])
    cut = llama.nla.capture(LONG, positions="all", overflow="truncate")
    assert cut.position == tuple(range(512))
    close(cut.vectors, llama.source.hidden(llama.source.ids(LONG)[:512], llama.pair.site.layer + 1))


def test_stride_reads_every_token_once_in_independent_pieces(llama: Case) -> None:
    ids = llama.source.ids(LONG)
    acts = llama.nla.capture(LONG, positions="all", overflow="stride")
    assert acts.position == tuple(range(len(ids)))
    close(acts.vectors[512:1024], llama.source.hidden(ids[512:1024], llama.pair.site.layer + 1))
    assert len(set(acts.keys)) == len(ids)
    with pytest.raises(TextError, match="Unknown overflow rule"):
        llama.nla.capture(LONG, overflow="wrap")


def test_a_model_that_overflows_says_so(llama: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    from nla_hub import NLA

    nla = NLA.from_pretrained(llama.pair.root, components=("ar",))
    nla.capture("the cat")
    loaded = nla.capture_source.loaded
    loaded.model.embed_tokens.weight.data[5] = float("inf")
    with pytest.raises(VectorError, match="The model itself produced"):
        run_trunk(loaded.adapter, loaded.model, nla.site, [([0, 5], [1])], pad_id=0, batch_size=1)


def test_nothing_is_captured_from_nothing(llama: Case) -> None:
    assert llama.nla.capture([]).vectors.shape == (0, 64)
    for bad in (7, None, {"role": "user", "content": "x"}):
        with pytest.raises(InputError):
            llama.nla.capture(bad)
    with pytest.raises(InputError, match="doc_ids= needs one id"):
        llama.nla.capture(["the", "cat"], doc_ids=["x"])
