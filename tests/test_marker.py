"""The marker of a new pair: which character a vocabulary gives, and what is refused."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import nla_hub
from nla_hub.errors import RecipeError, TextError
from nla_hub.pretrained import load_tokenizer
from nla_hub.prompts import measure_marker
from nla_hub.sidecar import INJECTION_PLACEHOLDER
from nla_hub.testing import MARKER, random_tokenizer
from nla_hub.training.marker import BETWEEN_TAGS, choose_marker
from nla_hub.training.recipe import load_recipe

SOURCE = Path(nla_hub.__file__).parent / "tiny" / "weights" / "source"
PLAIN = ["<pad>", "<eos>", "<unk>", *map(chr, range(0x20, 0x7F)), "\n"]
CHAT = "{% for m in messages %}{{ m['content'] }}{% endfor %}\n"


def of_characters(
    extra: str, *, normalizer: Any = None, special: Sequence[str] = (), merges: Sequence[tuple[str, str]] = ()
) -> Any:
    """A tokenizer whose tokens are ASCII and the characters of `extra`, the rarest last; `merges` make longer ones."""
    vocab = {token: i for i, token in enumerate(dict.fromkeys([*PLAIN, *extra, *("".join(pair) for pair in merges)]))}
    if merges:
        tokenizer = Tokenizer(models.BPE(vocab, list(merges), unk_token="<unk>"))
    else:
        tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
        tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    tokenizer.decoder = decoders.Fuse()
    made = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="<eos>",
        unk_token="<unk>",
        additional_special_tokens=list(special),
    )
    made.chat_template = CHAT
    return made


def test_the_packaged_and_the_random_tokenizers_have_the_marker_that_they_were_made_with() -> None:
    assert choose_marker(load_tokenizer(SOURCE)) == load_recipe("tiny").marker == MARKER
    assert choose_marker(random_tokenizer(bos=False)) == MARKER


@pytest.mark.parametrize(
    ("extra", "chosen"),
    [
        ("㈜☃ⰀⰁ", "㈜"),  # enclosed, though others are rarer
        ("㈜㈎☃", "㈎"),  # the rarest of its kind
        ("㈎㈜☃", "㈜"),
        ("é漢☃★Ⰰ", "★"),  # then symbols
        ("é漢ⰀⰁ", "Ⰱ"),  # then letters of rare scripts
        ("é漢’—\u3000\u0301Ⰰ", "Ⰰ"),  # no punctuation, blank or mark
        ("\ufffdⰀ", "Ⰰ"),
    ],
)
def test_the_rarest_character_of_the_first_kind_that_has_one(extra: str, chosen: str) -> None:
    tokenizer = of_characters(extra)
    assert choose_marker(tokenizer) == choose_marker(tokenizer) == chosen
    assert measure_marker(tokenizer, chosen, BETWEEN_TAGS).id == tokenizer.convert_tokens_to_ids(chosen)


@pytest.mark.parametrize("extra", ["", "éя漢가あ\ufffd"])
def test_a_vocabulary_without_a_usable_character_is_refused(extra: str) -> None:
    with pytest.raises(RecipeError, match="no usable marker") as caught:
        choose_marker(of_characters(extra))
    assert "set marker to a character that is one token here" in str(caught.value)


def test_what_does_not_come_back_is_passed_over() -> None:
    plain = of_characters("★㈎")
    changed = of_characters("★㈎", normalizer=normalizers.NFKC())  # reads the second as three characters
    assert choose_marker(plain) == "㈎"
    assert choose_marker(changed) == "★"


def test_what_a_neighbour_swallows_is_passed_over() -> None:
    assert choose_marker(of_characters("★㈎", merges=[("a", "b")])) == "㈎"
    assert choose_marker(of_characters("★㈎", merges=[(">", "㈎")])) == "★"
    assert choose_marker(of_characters("★㈎", merges=[(">", "㈎")]), f"({INJECTION_PLACEHOLDER})") == "㈎"


def test_special_tokens_and_what_the_template_holds_already_are_passed_over() -> None:
    assert choose_marker(of_characters("★㈎", special=["㈎"])) == "★"
    assert choose_marker(of_characters("★㈎"), f"㈎ <v>{INJECTION_PLACEHOLDER}</v>") == "★"
    tokenizer = of_characters("★㈎")
    tokenizer.chat_template = "㈎" + CHAT
    assert choose_marker(tokenizer) == "★"


def test_without_a_chat_template_there_is_no_prompt_to_look_at() -> None:
    tokenizer = of_characters("㈎")
    tokenizer.chat_template = None
    with pytest.raises(TextError, match="no chat template"):
        choose_marker(tokenizer)
