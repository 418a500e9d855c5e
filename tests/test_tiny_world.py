"""The tiny world: documents, facts, tokenizer, labels, and a training run in miniature. Offline and quick."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from itertools import combinations, pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nla_hub.tiny import Document, documents
from nla_hub.tiny.labels import CLAUSES, FACTS, label, label_texts, named_facts
from nla_hub.tiny.vocabulary import OBJECT, PERSON, PLACE, RHYME, TABLES, TOPIC, partner
from nla_hub.tiny.world import KINDS, held_out

TRAIN = documents(1200, 0)
EVAL = documents(600, 0, "eval")
ANY = st.sampled_from(TRAIN[:300] + EVAL[:100])
TRIPLE_KINDS = ("story", "dialogue", "tools")


def fact_values(document: Document, fact: str) -> set[object]:
    return {e.value for e in document.events if e.fact == fact}


# ---------------------------------------------------------------- documents


def test_streams_are_deterministic_and_prefix_stable() -> None:
    assert documents(20, 3) == documents(50, 3)[:20]
    assert documents(20, 3) != documents(20, 4)
    assert [d.text for d in documents(20, 3)] != [d.text for d in documents(20, 3, "eval")]


def test_documents_do_not_depend_on_the_process() -> None:
    code = "from nla_hub.tiny import documents; import json; print(json.dumps([d.text for d in documents(30, 1)]))"
    out = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env={"PYTHONHASHSEED": "7"}
    )
    assert json.loads(out.stdout) == [d.text for d in documents(30, 1)]


def test_an_unknown_split_is_refused() -> None:
    with pytest.raises(ValueError, match="'train' or 'eval'"):
        documents(1, 0, "test")  # type: ignore[arg-type]


def test_every_kind_is_written_in_both_splits() -> None:
    for docs in (TRAIN, EVAL):
        share = Counter(d.kind for d in docs)
        assert set(share) == set(KINDS)
        assert all(abs(share[k] / len(docs) - p) < 0.05 for k, p in KINDS.items())


def test_held_out_combinations_appear_in_eval_only() -> None:
    seen = {"train": 0, "eval": 0}
    for split, docs in (("train", TRAIN), ("eval", EVAL)):
        for d in docs:
            if d.kind not in TRIPLE_KINDS:
                continue
            values = [fact_values(d, f) for f in ("person", "object", "place")]
            if all(values):
                (person,), (thing,), (place,) = values
                assert held_out(str(person), str(thing), str(place)) == (split == "eval"), d.text
                seen[split] += 1
    assert min(seen.values()) > 100
    share = sum(held_out(p, o, w) for p in PERSON for o in OBJECT for w in PLACE) / 1000
    assert share == 0.2


def test_every_pair_of_a_held_out_combination_is_seen_in_training() -> None:
    triples = [(p, o, w) for p in PERSON for o in OBJECT for w in PLACE if not held_out(p, o, w)]
    for a, b in combinations(range(3), 2):
        assert len({(t[a], t[b]) for t in triples}) == 100


def test_hardly_any_evaluation_document_is_verbatim_in_training() -> None:
    train = {d.text for d in documents(15_000, 0)}
    evaluation = [d.text for d in EVAL]
    assert sum(t in train for t in evaluation) / len(evaluation) < 0.005
    assert len(set(evaluation)) > 0.995 * len(evaluation)


def test_no_word_belongs_to_two_values() -> None:
    words = Counter(w for table in TABLES.values() for value, row in table.items() for w in (value, *row))
    assert {w for w, n in words.items() if n > 1} <= {"0", "1", "2", "3"}  # sums and calls share their digits


def test_rhyme_partners_depend_on_the_topic_and_stay_in_the_family() -> None:
    words = list(RHYME)
    for w in words:
        answers = {partner(w, t) for t in TOPIC}
        family = words.index(w) // 3
        assert answers == set(words[3 * family : 3 * family + 3]) - {w}


# ---------------------------------------------------------------- facts


@given(ANY, st.integers(0, 600))
@settings(max_examples=200, deadline=None)
def test_facts_say_what_the_prefix_says(document: Document, char: int) -> None:
    char = min(char, len(document.text))
    facts, text = document.facts_at(char), document.text
    for fact in ("person", "object", "colour", "mood"):
        if fact in facts:
            assert str(facts[fact]) in text[:char]
    spans = document.words
    ends = [b for _, b in spans if b <= char]
    assert facts.get("last_word") == (text[spans[len(ends) - 1][0] : ends[-1]] if ends else None)
    assert ("next_word" in facts) == (len(ends) < len(spans))
    for fact in ("kind", "language", *FACTS):
        if fact in facts and fact in ("person", "object", "place", "mood", "colour", "topic", "kind", "language"):
            assert document.facts_at(len(text))[fact] == facts[fact], "told facts stay as they are"


def test_nothing_is_known_before_the_first_word_and_the_kind_after_ten() -> None:
    for d in TRAIN[:200]:
        assert set(d.facts_at(0)) == {"next_word"}
        assert d.facts_at(len(d.text))["kind"] == d.kind


def test_mentions_and_events_point_at_their_words() -> None:
    count = 0
    for d in TRAIN[:400]:
        for m in d.mentions:
            assert d.text[m.start : m.end] == str(m.value)
            # A planned rhyme is no plan any more once it is said.
            assert d.facts_at(m.end - (m.fact == "rhyme"))[m.fact] == m.value
            count += 1
    assert count > 1000


def test_a_fact_is_not_said_inside_its_memory_spans() -> None:
    lengths: Counter[str] = Counter()
    for d in TRAIN[:600]:
        for fact in ("person", "object", "colour", "place", "mood", "rhyme"):
            for span in d.memory_spans(fact):
                inside = d.text[span.start : span.end]
                assert str(span.value) not in inside.replace(".", " ").replace(",", " ").split()
                assert d.facts_at(span.end)[fact] == span.value or fact == "rhyme"
                assert d.facts_at(span.start)[fact] == span.value
                lengths[fact] += len(inside.split())
    assert min(lengths.values()) > 500 and len(lengths) == 6


def test_sums_add_up() -> None:
    checked = 0
    for d in TRAIN:
        if d.kind != "sum":
            continue
        words = [d.text[a:b] for a, b in d.words]
        total = int(next(w for w in words if w.isdigit()))
        for here, after in pairwise(words):
            if here in ("plus", "minus"):
                total += int(after) if here == "plus" else -int(after)
            elif here == "makes":
                assert int(after) == total
                checked += 1
        assert d.facts_at(len(d.text))["running_sum"] == total
    assert checked > 200


def test_the_planned_rhyme_ends_the_line() -> None:
    planned = 0
    for d in TRAIN:
        for event in d.events:
            if event.fact == "rhyme" and event.value is not None:
                line = d.text[event.end :].split("/")[1].split(".")[0]
                assert line.split()[-1] == event.value
                assert d.facts_at(event.end)["rhyme"] == event.value
                planned += 1
    assert planned > 200


def test_calls_are_counted() -> None:
    for d in TRAIN:
        if d.kind == "tools":
            assert d.facts_at(len(d.text))["calls"] == sum(m["role"] == "tool" for m in d.content)  # type: ignore[index]


# ---------------------------------------------------------------- labels


@given(ANY, st.integers(1, 600))
@settings(max_examples=300, deadline=None)
def test_a_label_names_exactly_the_facts(document: Document, char: int) -> None:
    ends = [b for _, b in document.words]
    char = ends[char % len(ends)]
    assert named_facts(label(document, char)) == document.facts_at(char)


def test_labels_can_be_cut_to_some_clauses() -> None:
    d = TRAIN[0]
    floor = label(d, 40, ("last_word", "next_word"))
    assert set(named_facts(floor)) == {"last_word", "next_word"}
    assert label(d, 40, CLAUSES) == label(d, 40)
    with pytest.raises(ValueError, match="unknown clauses"):
        label(d, 40, ("nexxt",))


@given(st.text(max_size=200))
def test_any_text_can_be_read_for_facts(text: str) -> None:
    for fact, value in named_facts(text).items():
        assert fact in ("last_word", "next_word") or value in FACTS[fact]


def test_an_imperfect_explanation_is_read_tolerantly() -> None:
    text = "next gulls;; after the old ; english story; person nobody; person mara; person otto; colour red blue;"
    text += " sum 7; total 7"
    assert named_facts(text) == {
        "next_word": "gulls", "last_word": "old", "language": "english", "kind": "story",
        "person": "mara", "colour": "red", "running_sum": 7,
    }  # fmt: skip


# ---------------------------------------------------------------- tokenizer


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with tokenizer and weights of a model that trained for a moment."""
    from nla_hub.tiny.source import SourceSettings, train_source

    seen: list[dict[str, float]] = []
    tiny = SourceSettings(
        hidden_size=32, layers=2, heads=1, mlp_size=32, documents=200, steps=12, batch_documents=16,
        tokenizer_documents=800,
    )  # fmt: skip
    out = train_source(tmp_path_factory.mktemp("source"), seed=0, settings=tiny, progress=seen.append)
    assert seen and seen[-1]["step"] == 12
    again = train_source(tmp_path_factory.mktemp("again"), seed=0, settings=tiny)
    assert (out / "model.safetensors").read_bytes() == (again / "model.safetensors").read_bytes()
    return out


def test_the_saved_tokenizer_comes_back_as_it_was(saved: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from nla_hub.tiny.tokenizer import MARKER, build_tokenizer

    docs = documents(800, 0)
    built = build_tokenizer([d.text for d in docs] + label_texts(docs))
    loaded = AutoTokenizer.from_pretrained(saved)
    samples = [d.text for d in EVAL[:100]] + [
        "  two  blanks\n\nlines\tand Ünïcödé 日本 e\u0301 🙂", f"<v>{MARKER}</v>",
        "<explanation>next gulls</explanation>", " ", "\n",
    ]  # fmt: skip
    for text in samples:
        ids = loaded(text, add_special_tokens=False).input_ids
        assert loaded.decode(ids) == text
        assert built.decode(built(text, add_special_tokens=False).input_ids) == text
        assert loaded(text).input_ids == [loaded.bos_token_id, *ids]
    assert len(loaded(MARKER, add_special_tokens=False).input_ids) == 1
    marker = loaded.convert_tokens_to_ids(MARKER)
    neighbours = set()
    for before, after in (("", ""), ("x ", " y"), ("mara.", "<"), ("<", ">")):
        ids = loaded(f"{before}<v>{MARKER}</v>{after}", add_special_tokens=False).input_ids
        at = ids.index(marker)
        neighbours.add(tuple(ids[at - 1 : at + 2]))
    assert len(neighbours) == 1
    model = AutoModelForCausalLM.from_pretrained(saved)
    assert model.get_input_embeddings().weight.shape[0] == len(loaded)


def test_nearly_every_word_is_one_token(saved: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(saved)
    assert len(tokenizer) <= 1200
    tokens = words = 0
    for d in EVAL:
        tokens += len(tokenizer(d.text, add_special_tokens=False).input_ids)
        words += len(d.words) + d.text.startswith("<|bos|>")
    assert words <= tokens < 1.005 * words


def test_rendered_chats_equal_the_template(saved: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(saved)
    chats = [d for d in TRAIN[:300] if not isinstance(d.content, str)]
    assert len(chats) > 30
    for d in chats:
        assert tokenizer.apply_chat_template(d.content, tokenize=False) == d.text
        ids = tokenizer(d.text, add_special_tokens=False).input_ids
        assert ids.count(tokenizer.bos_token_id) == 1 and ids[0] == tokenizer.bos_token_id
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "who?"}], tokenize=False, add_generation_prompt=True
    )
    assert prompt == "<|bos|><|user|> who?<|end|><|assistant|>"
    with pytest.raises(Exception, match="unknown role"):
        tokenizer.apply_chat_template([{"role": "oracle", "content": "x"}], tokenize=False)


def test_importing_the_world_loads_no_torch() -> None:
    code = "import sys, nla_hub.tiny; assert not {'torch', 'transformers', 'tokenizers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
