"""Names of repositories: the released pairs' own rule, what licences ask for, what the Hub takes."""

from __future__ import annotations

import re
import string

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from nla_hub.errors import PublishError
from nla_hub.locate import resolve_pair
from nla_hub.publish.facts import Form, Licence, Quantised
from nla_hub.publish.staging.naming import LONGEST, chosen_names, data_name, default_names, short_name
from nla_hub.sidecar import Site
from nla_hub.zoo import zoo

APACHE, LLAMA = Licence("apache-2.0"), Licence("llama3.3", name_starts_with="Llama")


@pytest.mark.parametrize("name", ["qwen2.5-7b", "gemma-3-12b", "gemma-3-27b", "llama-3.3-70b"])
def test_the_released_pairs_are_called_as_the_rule_says(name: str) -> None:
    entry = zoo()[name]
    licence = LLAMA if entry.licence == LLAMA.id else Licence(entry.licence)
    assert entry.layer is not None
    names = default_names("kitft", entry.base, Site(entry.layer), licence)
    assert (names.av, names.ar) == (entry.av, entry.ar)


@pytest.mark.parametrize(
    ("base", "expected"),
    [
        ("Qwen/Qwen3-8B", "qwen3-8b"),
        ("google/gemma-2-9b-it@main", "gemma2-9b"),
        ("mistralai/Mistral-7B-Instruct-v0.3", "mistral-7b-v0.3"),
        ("EleutherAI/pythia-410m", "pythia-410m"),
        ("openai-community/gpt2", "gpt2"),
        ("tiny-source", "tiny"),
        ("qwen2.5-7b-stand-in", "qwen2.5-7b-stand-in"),
        ("owner/instruct", "instruct"),
    ],
)
def test_short_names(base: str, expected: str) -> None:
    assert short_name(base) == expected


@pytest.mark.parametrize(
    ("form", "quantised", "single", "av"),
    [
        ("full", None, False, "me/nla-qwen2.5-7b-L20-av"),
        ("merged", None, False, "me/nla-qwen2.5-7b-L20-av"),
        ("lora", None, False, "me/nla-qwen2.5-7b-L20-lora-av"),
        ("full", "fp8", False, "me/nla-qwen2.5-7b-L20-fp8-av"),
        ("merged", "nf4", True, "me/nla-qwen2.5-7b-L20-nf4"),
    ],
)
def test_variants_say_what_they_are(form: Form, quantised: Quantised | None, single: bool, av: str) -> None:
    names = default_names(
        "me", "Qwen/Qwen2.5-7B-Instruct", Site(20), APACHE, form=form, quantised=quantised, single=single
    )
    assert names.av == av
    assert names.ar == (av if single else av.removesuffix("-av") + "-ar")


@pytest.mark.parametrize(
    ("base", "av"),
    [
        ("meta-llama/Meta-Llama-3-8B-Instruct", "me/Llama-3-8B-NLA-L53-av"),
        ("unsloth/llama-3.3-70b-instruct", "me/Llama-3.3-70b-NLA-L53-av"),
        ("deepseek-ai/DeepSeek-R1-Distill-Llama-70B", "me/Llama-DeepSeek-R1-Distill-Llama-70B-NLA-L53-av"),
    ],
)
def test_a_licence_may_want_its_name_first(base: str, av: str) -> None:
    assert default_names("me", base, Site(53), LLAMA).av == av


def test_a_chosen_name_is_taken_for_both_halves() -> None:
    for repo in ("me/x", "me/x-av", "me/x-ar", "x"):
        names = chosen_names(repo, "me", APACHE)
        assert (names.av, names.ar) == ("me/x-av", "me/x-ar")
    assert chosen_names("me/x", None, APACHE, single=True).ar == "me/x"


def test_a_chosen_name_that_breaks_the_licence_is_refused_with_a_better_one() -> None:
    with pytest.raises(PublishError, match=r"--repo me/Llama-my-nla"):
        chosen_names("me/my-nla", None, LLAMA)
    with pytest.raises(PublishError, match=r"--repo me/Llama-3\.3-x"):
        chosen_names("me/llama-3.3-x", None, LLAMA)
    assert chosen_names("me/Llama-3.3-x", None, LLAMA).av == "me/Llama-3.3-x-av"


@pytest.mark.parametrize(
    "repo", ["x", "a/b/c", "me/", "/x", "me/a b", "me/a--b", "me/a..b", "me/-a", "me/a.git", "é/x"]
)
def test_names_that_the_hub_does_not_take(repo: str) -> None:
    with pytest.raises(PublishError):
        chosen_names(repo, None, APACHE, single=True)


def test_a_data_set_must_be_named() -> None:
    assert data_name("me/x") == "me/x"
    with pytest.raises(PublishError, match="--repo"):
        data_name(None)


NAMES = st.text(string.ascii_letters + string.digits + "-._ /@é", max_size=120)


@given(base=NAMES, layer=st.integers(0, 200), first=st.sampled_from([None, "Llama", "Llama-3"]))
@example(base="-it", layer=0, first=None)
@example(base="Instruct", layer=3, first="Llama")
def test_every_name_is_one_that_the_hub_takes_or_refused(base: str, layer: int, first: str | None) -> None:
    licence = Licence("x", name_starts_with=first)
    try:
        names = default_names("me", base, Site(layer), licence)
    except PublishError:
        return  # of a base whose name has no usable characters, or too many
    for name in (names.av, names.ar):
        assert len(name) <= LONGEST
        assert re.fullmatch(r"me/[A-Za-z0-9_][A-Za-z0-9_.-]*-L\d+-a[vr]", name)
        assert "--" not in name
        assert ".." not in name
    assert first is None or names.av.startswith(f"me/{first}")
    found = resolve_pair(names.av)
    assert found.ar is not None
    assert found.ar.name == names.ar  # a reader of the one finds the other


@given(repo=NAMES)
def test_every_chosen_name_is_taken_as_it_is_or_refused(repo: str) -> None:
    try:
        names = chosen_names(repo, "me", APACHE)
    except PublishError:
        return
    whole = repo if "/" in repo else f"me/{repo}"
    assert names.av.removesuffix("-av") == re.sub(r"-a[vr]$", "", whole)
