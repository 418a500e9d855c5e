"""Programmatic labels of the tiny world: short texts that tell what a reader of a prefix holds, and their parser."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from nla_hub.sampling import RowKey, document_hash, row_uniforms
from nla_hub.tiny.document import Document, Value
from nla_hub.tiny.vocabulary import CALLS, COLOUR, MOOD, OBJECT, PERSON, PLACE, RHYME, SUM, TOPIC

__all__ = ["CLAUSES", "FACTS", "KIND_NAMES", "label", "label_texts", "named_facts"]

KIND_NAMES: dict[str, str] = {k: k for k in ("story", "dialogue", "couplet", "sum", "tools", "song")}
LANGUAGES = ("english", "spanish", "german")

# The facts with a closed vocabulary, in the order in which a label names them.
FACTS: dict[str, tuple[Value, ...]] = {
    "language": LANGUAGES,
    "kind": tuple(KIND_NAMES),
    "person": tuple(PERSON),
    "object": tuple(OBJECT),
    "colour": tuple(COLOUR),
    "place": tuple(PLACE),
    "mood": tuple(MOOD),
    "topic": tuple(TOPIC),
    "rhyme": tuple(RHYME),
    "running_sum": tuple(map(int, SUM)),
    "calls": tuple(map(int, CALLS)),
}

CLAUSES = (
    "next_word", "last_word", "kind", "person", "object", "colour", "place", "mood", "topic", "rhyme", "running_sum",
    "calls", "sentence",
)  # fmt: skip

HEADS: dict[str, str] = {
    "person": "person",
    "object": "object",
    "colour": "colour",
    "place": "place",
    "mood": "mood",
    "topic": "topic",
    "rhyme": "rhyme",
    "running_sum": "total",
    "calls": "calls",
    "sentence": "sentence",
}

# Marks that cannot stand in a label as they are.
MARKS: dict[str, str] = {
    ".": "period",
    ",": "comma",
    "?": "question",
    ":": "colon",
    "/": "slash",
    "<|end|>": "turn-end",
    "<|user|>": "user-turn",
    "<|assistant|>": "assistant-turn",
    "<|tool|>": "tool-turn",
    "<|system|>": "system-turn",
}
_UNMARK = {name: mark for mark, name in MARKS.items()}


def label(document: Document, char: int, clauses: Sequence[str] | None = None, *, share: float | None = None) -> str:
    """What a reader of `document.text[:char]` holds, most telling first.

    `clauses` keeps only some of `CLAUSES`; `share` keeps each of them with this probability, drawn from (document, char)
    alone, and at least one.
    """
    wanted = CLAUSES if clauses is None else clauses
    unknown = set(wanted) - set(CLAUSES)
    if unknown:
        raise ValueError(f"unknown clauses {sorted(unknown)}; known: {', '.join(CLAUSES)}")
    facts = document.facts_at(char)
    parts: list[str] = []
    for clause in CLAUSES:
        if clause not in wanted:
            continue
        if clause == "next_word":
            following = facts.get("next_word")
            parts.append("next " + (_show(str(following)) if following is not None else "nothing"))
        elif clause == "last_word":
            words = document.last_words(char, 3)
            if words:
                parts.append("after " + " ".join(map(_show, words)))
        elif clause == "kind":
            if "kind" in facts:
                parts.append(f"{facts['language']} {KIND_NAMES[str(facts['kind'])]}")
        elif clause == "sentence":
            done = document.text[:char].count(".")
            parts.append(f"sentence {min(done + 1, 9)}")
        elif clause in facts:
            parts.append(f"{HEADS[clause]} {facts[clause]}")
    if share is not None:
        draws = row_uniforms(0, RowKey(document_hash(document.text), char), len(parts) + 1)
        kept = [part for part, draw in zip(parts, draws, strict=False) if draw < share]
        parts = kept or parts[int(draws[-1] * len(parts)) :][:1]
    return "; ".join(parts)


def _show(word: str) -> str:
    return MARKS.get(word, word)


def named_facts(text: str) -> dict[str, Value]:
    """The facts that an explanation names; the first clause that names a fact wins, unknown words are ignored."""
    found: dict[str, Value] = {}
    for clause in re.split(r"[;\n]", text):
        words = clause.split()
        if not words:
            continue
        head, rest = words[0], words[1:]
        if head == "next" and rest:
            if rest[0] != "nothing":
                found.setdefault("next_word", _UNMARK.get(rest[0], rest[0]))
        elif head == "after" and rest:
            found.setdefault("last_word", _UNMARK.get(rest[-1], rest[-1]))
        elif head in LANGUAGES or head in KIND_NAMES:
            for word in words:
                if word in LANGUAGES:
                    found.setdefault("language", word)
                elif word in KIND_NAMES:
                    found.setdefault("kind", word)
        else:
            fact = _FACT_OF_HEAD.get(head)
            if fact is not None and rest:
                value = next((v for v in FACTS[fact] if str(v) == rest[0]), None)
                if value is not None:
                    found.setdefault(fact, value)
    return found


_FACT_OF_HEAD = {head: fact for fact, head in HEADS.items() if fact in FACTS}


def label_texts(documents: Iterable[Document]) -> list[str]:
    """Labels at a few offsets of each document: the text that a tokenizer must know besides the documents."""
    return [label(d, c) for d in documents for c in range(0, len(d.text) + 1, 7)]
