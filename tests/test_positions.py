"""The words that positions may be: each against a way of its own to find the same tokens."""

from __future__ import annotations

import re

import pytest
from conftest import Case
from hypothesis import given
from hypothesis import strategies as st

from nla_hub.errors import PositionError
from nla_hub.positions import check_word, sample_positions, select_positions
from nla_hub.source_text import Encoded

LETTERS = st.text("ab c\n", min_size=1, max_size=40)


def letters(text: str, special: int = 1) -> Encoded:
    """A text of which every two characters are a token, behind `special` special ones."""
    spans = [(0, 0)] * special + [(i, min(i + 2, len(text))) for i in range(0, len(text), 2)]
    n = len(spans)
    return Encoded(text, tuple(range(n)), tuple(spans), tuple(i < special for i in range(n)), (None,) * n)


@given(text=LETTERS, n=st.integers(1, 9))
def test_every_nth_token_from_the_first_on(text: str, n: int) -> None:
    encoded = letters(text)
    assert select_positions(encoded, f"every:{n}") == [i for i in range(len(encoded)) if i % n == 0]


@given(text=LETTERS, k=st.integers(1, 9), seed=st.integers(0, 5))
def test_a_sample_is_distinct_in_order_without_special_tokens_and_always_the_same(text: str, k: int, seed: int) -> None:
    encoded = letters(text)
    found = select_positions(encoded, f"sample:{k}", seed=seed)
    assert found == sorted(set(found))
    assert len(found) == min(k, len(encoded) - 1)
    assert 0 not in found
    assert found == select_positions(encoded, f"sample:{k}", seed=seed)


def test_a_sample_depends_on_seed_and_document() -> None:
    texts = [f"{i} of many words in a row, so that there is something to choose" for i in range(20)]
    assert len({tuple(select_positions(letters(text), "sample:5")) for text in texts}) > 10
    assert len({tuple(select_positions(letters(texts[0]), "sample:5", seed=s)) for s in range(20)}) > 10
    drawn = [i for s in range(400) for i in sample_positions(range(8), 2, s, "document")]
    assert all(60 < drawn.count(i) < 140 for i in range(8))  # 100 each; three standard deviations are 26


@given(text=LETTERS, pattern=st.sampled_from(["a", "ab", "b+", "^c", " ", "a.c", "c$", "x", "a*"]))
def test_a_pattern_finds_the_tokens_that_its_matches_touch(text: str, pattern: str) -> None:
    encoded = letters(text)
    touched = {i for m in re.finditer(pattern, text) for i in range(m.start(), m.end())}
    wanted = [i for i, (a, b) in enumerate(encoded.offsets) if touched.intersection(range(a, b))]
    assert select_positions(encoded, f"regex:{pattern}") == wanted


@pytest.mark.parametrize("word", ["every:2", "sample:3", r"regex:\bcat\b", "last", "all"])
def test_the_sdk_takes_every_word(llama: Case, word: str) -> None:
    text = "the cat sees a house and a dog"
    encoded_positions = llama.nla.capture(text, word).position
    check_word(word)
    assert list(encoded_positions) == sorted(encoded_positions)
    assert encoded_positions


def test_a_text_without_a_match_has_no_rows(llama: Case) -> None:
    assert len(llama.nla.capture("the cat", "regex:zebra")) == 0


@pytest.mark.parametrize(
    "word", ["evry:2", "every", "every:0", "every:-1", "every:1.5", "every:²", "sample:x", "regex:[", "regex:", ""]
)
def test_a_word_that_is_none_says_what_is(word: str) -> None:
    with pytest.raises(PositionError) as refused:
        check_word(word)
    assert refused.value.got is not None or "regular expression" in refused.value.what
    with pytest.raises(PositionError, match="in the test"):
        select_positions(letters("ab"), word, where="in the test")
