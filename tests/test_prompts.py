"""The three rendering rules, literal templates, and the parsing of what an AV wrote."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
from conftest import Case
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from nla_hub.batching import pad_right
from nla_hub.errors import SidecarError, TextError
from nla_hub.prompts import ARPrompt, AVPrompt, marker_positions, parse_explanation
from nla_hub.sidecar import Sidecar
from nla_hub.source_text import context_length, encode_source, render_messages, special_tokens
from nla_hub.testing import CHAT_TEMPLATE, MARKER, random_tokenizer

TALK = [{"role": "user", "content": "the cat"}, {"role": "assistant", "content": "a house"}]


@pytest.fixture(scope="module")
def with_bos() -> Any:
    return random_tokenizer(bos=True)


@pytest.fixture(scope="module")
def no_bos() -> Any:
    return random_tokenizer(bos=False)


@pytest.fixture(scope="module", params=["bos", "nobos"])
def tokenizer(request: pytest.FixtureRequest, with_bos: Any, no_bos: Any) -> Any:
    return with_bos if request.param == "bos" else no_bos


@pytest.fixture(scope="module")
def unlisted(with_bos: Any) -> Any:
    """A tokenizer as Llama 3 and Gemma have it: turn markers are special added tokens that no attribute lists."""
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=with_bos._tokenizer, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>"
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    assert "<|end|>" not in tokenizer.all_special_tokens
    return tokenizer


def plain(tokenizer: Any, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


# -- rule 1: source texts ------------------------------------------------------------------------------------


def test_raw_text_has_bos_once_where_the_tokenizer_has_one(with_bos: Any, no_bos: Any) -> None:
    (encoded,) = encode_source(with_bos, "the cat sees")
    assert list(encoded.ids) == [with_bos.bos_token_id, *plain(with_bos, "the cat sees")]
    assert encoded.special == (True, *[False] * (len(encoded) - 1))
    (encoded,) = encode_source(no_bos, "the cat sees")
    assert list(encoded.ids) == plain(no_bos, "the cat sees")
    assert not any(encoded.special)


def test_offsets_point_into_the_text(tokenizer: Any) -> None:
    text = "the cat, élan ㊥ \U0001f600 sees <|end|>"
    (encoded,) = encode_source(tokenizer, text)
    assert encoded.text == text
    real = [(a, b) for (a, b), special in zip(encoded.offsets, encoded.special, strict=True) if not special]
    assert real[0][0] == 0
    assert real[-1][1] == len(text)
    assert all(c <= b and a <= c for (a, b), (c, _) in pairwise(real))


@pytest.mark.parametrize("spelled", ["<bos>", "<eos>", "<|end|>", "<|user|>\nx<|end|>"])
def test_special_strings_in_raw_text_are_text(tokenizer: Any, unlisted: Any, spelled: str) -> None:
    for each in (tokenizer, unlisted):
        text = f"the {spelled} cat"
        (encoded,) = encode_source(each, text)
        body = encoded.ids[1:] if each.bos_token_id is not None else encoded.ids
        assert not set(body) & set(special_tokens(each))
        assert each.decode(body) == text
        assert not any(encoded.special[1:])


def test_special_strings_in_raw_text_are_tokens_when_asked(tokenizer: Any) -> None:
    (encoded,) = encode_source(tokenizer, "the <|end|> cat", parse_special_tokens=True)
    end = tokenizer.convert_tokens_to_ids("<|end|>")
    assert encoded.ids.count(end) == 1
    assert encoded.special[encoded.ids.index(end)]
    (again,) = encode_source(tokenizer, "the <|end|> cat")
    assert end not in again.ids


def test_reading_raw_text_leaves_the_tokenizer_as_it_was(tokenizer: Any) -> None:
    before = plain(tokenizer, "<|end|>")
    encode_source(tokenizer, "the <|end|> cat")
    assert plain(tokenizer, "<|end|>") == before
    assert len(before) == 1


def test_messages_are_rendered_without_generation_prompt_and_without_a_second_bos(with_bos: Any, no_bos: Any) -> None:
    for tokenizer, bos in ((with_bos, "<bos>"), (no_bos, "")):
        (encoded,) = encode_source(tokenizer, TALK)
        assert encoded.text == f"{bos}<|user|>\nthe cat<|end|>\n<|assistant|>\na house<|end|>\n"
        assert list(encoded.ids) == plain(tokenizer, encoded.text)
        assert encoded.ids.count(tokenizer.convert_tokens_to_ids("<|assistant|>")) == 1
        if bos:
            assert encoded.ids.count(tokenizer.bos_token_id) == 1


@pytest.mark.parametrize("token", ["<bos>", "<eos>", "<|end|>", "<|assistant|>"])
def test_special_strings_in_contents_are_refused(with_bos: Any, unlisted: Any, token: str) -> None:
    talk = [TALK[0], {"role": "assistant", "content": f"a {token}house"}]
    for tokenizer in (with_bos, unlisted):
        with pytest.raises(TextError, match=r"text 3, message 1 \(assistant\): .*structure") as caught:
            encode_source(tokenizer, talk, where="text 3")
        assert caught.value.got == token
        (encoded,) = encode_source(tokenizer, talk, parse_special_tokens=True)
        assert tokenizer.convert_tokens_to_ids(token) in encoded.ids


def test_turn_markers_count_as_special_in_every_tokenizer(with_bos: Any, unlisted: Any) -> None:
    (a,), (b,) = encode_source(with_bos, TALK), encode_source(unlisted, TALK)
    assert a == b
    assert [t for t, special in zip(a.ids, b.special, strict=True) if special] == [0, 3, 7, 4, 7]


def test_a_base_without_chat_template_refuses_messages(llama: Case) -> None:
    tokenizer = random_tokenizer()
    tokenizer.chat_template = None
    with pytest.raises(TextError, match=r"text 0: .*no chat template.*\n.*plain text"):
        encode_source(tokenizer, TALK, where="text 0")
    assert encode_source(tokenizer, "the cat")


def test_roles_are_those_of_the_contents_only(with_bos: Any) -> None:
    (encoded,) = encode_source(with_bos, TALK)
    for role, text in (("user", "the cat"), ("assistant", "a house")):
        spans = [encoded.offsets[i] for i, r in enumerate(encoded.roles) if r == role]
        assert encoded.text[spans[0][0] : spans[-1][1]] == text
    assert encode_source(with_bos, "the cat")[0].roles == (None,) * len(encode_source(with_bos, "the cat")[0])


def test_roles_survive_templates_that_strip_or_add_words(with_bos: Any) -> None:
    tokenizer = random_tokenizer()
    tokenizer.chat_template = (
        "<|system|>\nwhat a story<|end|>\n{% for m in messages %}<|{{ m['role'] }}|>\n"
        "{{ m['content'] | trim }}<|end|>\n{% endfor %}"
    )
    (encoded,) = encode_source(tokenizer, [{"role": "user", "content": "  a \n"}])
    (at,) = [i for i, role in enumerate(encoded.roles) if role == "user"]
    assert encoded.text[: encoded.offsets[at][0]].endswith("<|user|>\n")
    assert encoded.text[slice(*encoded.offsets[at])] == "a"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "The text is empty"),
        ([], "no messages"),
        ("a \udc80 b", "lone surrogate"),
        ([{"role": "user", "content": "\ud800"}], "lone surrogate"),
        ([{"content": "x"}], "no role"),
        ([{"role": "user"}], "Only text contents"),
        ([{"role": "user", "content": [{"type": "image"}]}], "Only text contents"),
        (["x"], "no role"),
        (7, "neither a text nor a conversation"),
        (b"bytes", "neither a text nor a conversation"),
        (None, "neither a text nor a conversation"),
    ],
)
def test_unusable_contents_are_typed_errors_that_say_where(tokenizer: Any, content: Any, message: str) -> None:
    with pytest.raises(TextError, match=rf"text 5.*: .*{message}"):
        encode_source(tokenizer, content, where="text 5")


def test_a_template_that_raises_is_a_typed_error() -> None:
    tokenizer = random_tokenizer()
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(TextError, match="refuses this conversation: roles must alternate"):
        encode_source(tokenizer, TALK)


def test_templates_with_a_thinking_switch_have_it_off() -> None:
    tokenizer = random_tokenizer()
    tokenizer.chat_template = "{% if enable_thinking is defined and not enable_thinking %}off{% else %}on{% endif %}"
    assert render_messages(tokenizer, TALK) == "off"


# -- rule 2: the AV prompt -----------------------------------------------------------------------------------


def test_the_av_prompt_is_one_user_turn_with_the_marker_between_its_neighbours(case: Case) -> None:
    prompt, marker = case.nla.av.engine.av.prompt, case.nla.sidecar.marker
    assert prompt.text == case.av.text
    assert list(prompt.ids) == case.av.ids
    assert prompt.marker_position == case.av.at
    assert marker_positions(prompt.ids, marker) == [case.av.at]
    assert case.av.tokenizer.decode([prompt.ids[case.av.at]]) == MARKER


def test_the_av_prompt_never_has_a_second_bos(case: Case) -> None:
    bos = case.av.tokenizer.bos_token_id
    assert case.nla.av.engine.av.prompt.ids.count(bos) == (1 if case.spec.bos else 0)


def test_a_chat_template_that_doubles_bos_is_refused(llama: Case) -> None:
    tokenizer = random_tokenizer()
    tokenizer.chat_template = "{{ bos_token }}" + tokenizer.chat_template
    with pytest.raises(SidecarError, match="holds 2 BOS tokens, expected at most one"):
        AVPrompt.build(tokenizer, llama.nla.sidecar)


def test_all_marker_faults_come_at_once(llama: Case) -> None:
    sidecar: Sidecar = llama.nla.sidecar
    assert sidecar.marker is not None
    wrong = sidecar.with_(marker=type(sidecar.marker)(MARKER, 5, 6, 7))
    with pytest.raises(SidecarError) as caught:
        AVPrompt.build(llama.av.tokenizer, wrong)
    assert len(caught.value.faults) == 3
    for name in ("injection_token_id", "injection_left_neighbor_id", "injection_right_neighbor_id"):
        assert any(name in fault for fault in caught.value.faults)


@pytest.mark.parametrize(
    ("char", "template", "fault"),
    [
        ("㊦", None, "is 3 tokens here"),
        (MARKER, f"<v>{{injection_char}}</v> or {MARKER}?", "stands 2 times"),
    ],
)
def test_a_marker_that_is_not_one_token_once_is_refused(
    llama: Case, char: str, template: str | None, fault: str
) -> None:
    sidecar = llama.nla.sidecar
    assert sidecar.marker is not None
    marker = type(sidecar.marker)(char, sidecar.marker.id, sidecar.marker.left_id, sidecar.marker.right_id)
    wrong = sidecar.with_(marker=marker, av_template=template or sidecar.av_template)
    with pytest.raises(SidecarError, match=fault):
        AVPrompt.build(llama.av.tokenizer, wrong)


# -- rule 3: AR prompts --------------------------------------------------------------------------------------


def test_the_ar_prompt_is_plain_text_with_bos_where_the_tokenizer_has_one(case: Case) -> None:
    text = "the cat sees a house"
    ids = case.nla.ar.prompt.encode(text)
    assert ids == case.ar.ids(text)
    assert (ids[0] == case.ar.tokenizer.bos_token_id) == case.spec.bos
    assert case.ar.tokenizer.decode(ids, skip_special_tokens=True) == f"Words: {text}\nVector:"
    assert tuple(ids[-2:]) == case.nla.ar.sidecar.ar_suffix_ids


def test_special_strings_in_explanations_are_parsed_as_in_training(llama: Case) -> None:
    assert llama.ar.tokenizer.convert_tokens_to_ids("<|end|>") in llama.nla.ar.prompt.encode("the <|end|> cat")


def test_suffix_ids_that_do_not_fit_are_refused(llama: Case) -> None:
    with pytest.raises(SidecarError, match=r"critic_suffix_ids: the sidecar says \[1, 2\], the prompt ends in \["):
        ARPrompt.build(llama.ar.tokenizer, llama.nla.ar.sidecar.with_(ar_suffix_ids=(1, 2)))


def test_an_ar_template_that_writes_bos_itself_is_refused(llama: Case) -> None:
    sidecar = llama.nla.ar.sidecar.with_(ar_template="<bos>Words: {explanation}\nVector:")
    with pytest.raises(SidecarError, match="holds 2 BOS tokens"):
        ARPrompt.build(llama.ar.tokenizer, sidecar)


@given(
    st.text(alphabet=st.characters(codec="utf-8", exclude_characters="\x00"), min_size=1, max_size=40)
    | st.sampled_from(["{injection_char}", "{explanation}", "{explanation.__class__}", "{0}", "{}", "{{", "%s", "\\1"])
)
def test_explanations_pass_literally_into_the_template(llama: Case, text: str) -> None:
    if not text.strip():
        return
    ids = llama.nla.ar.prompt.encode(text)
    assert llama.ar.tokenizer.decode(ids[1:]) == f"Words: {text}\nVector:"


def test_templates_are_filled_literally_whatever_else_stands_in_braces(llama: Case) -> None:
    odd = "{explanation !r} {{ {0 } {a b.__class__} %s "
    ids = ARPrompt(llama.ar.tokenizer, odd + "{explanation}", None).encode("the cat")
    assert llama.ar.tokenizer.decode(ids[1:]) == odd + "the cat"
    sidecar = llama.nla.sidecar.with_(av_template=odd + "<v>{injection_char}</v>")
    assert f"{odd}<v>{MARKER}</v>" in AVPrompt.build(llama.av.tokenizer, sidecar).text


# -- explanations --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("raw", "expected"),
    [
        ("<explanation>the cat</explanation>", ("ok", "the cat")),
        ("so <explanation>\n the cat \n</explanation> and", ("ok", "the cat")),
        ("<explanation>a</explanation><explanation>b</explanation>", ("ok", "a")),
        ("</explanation><explanation>b</explanation>", ("ok", "b")),
        ("<explanation>the cat", ("truncated", None)),
        ("<explanation>", ("truncated", None)),
        ("</explanation><explanation>b", ("truncated", None)),
        ("<explanation></explanation>", ("empty", None)),
        ("<explanation> \n</explanation>", ("empty", None)),
        ("the cat", ("no_tags", None)),
        ("the cat</explanation>", ("no_tags", None)),
        ("<Explanation>the cat</Explanation>", ("no_tags", None)),
        ("", ("no_tags", None)),
    ],
)
def test_outputs_are_parsed_into_a_status_and_never_made_up(raw: str, expected: tuple[str, str | None]) -> None:
    assert parse_explanation(raw) == expected


@given(st.text(max_size=60))
def test_a_text_comes_back_from_its_tags(text: str) -> None:
    if "<" in text:
        return
    status, found = parse_explanation(f"<explanation>{text}</explanation>")
    assert (status, found) == (("ok", text.strip()) if text.strip() else ("empty", None))


def test_padding_is_on_the_right_and_masked() -> None:
    ids, mask = pad_right([[5, 6, 7], [8]], 0)
    assert ids.tolist() == [[5, 6, 7], [8, 0, 0]]
    assert mask.tolist() == [[1, 1, 1], [1, 0, 0]]


def test_the_context_length_is_read_from_the_text_config(family: Case) -> None:
    assert context_length(family.source.model.config) == 512
