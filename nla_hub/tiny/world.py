"""The tiny world: a probabilistic grammar whose documents carry known latent facts.

Every kind of document states facts early and then writes clauses in which each slot is filled by a word that belongs
to *some* fact known there (see `vocabulary`). Whoever predicts the next word therefore gains, at nearly every
position, by holding all the facts. Questions about them come at unpredictable times.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from itertools import product
from random import Random

from nla_hub.tiny.document import Builder, Document, Split, Value
from nla_hub.tiny.vocabulary import (
    ADVERB,
    COLOUR,
    JOINER,
    MOOD,
    OBJECT,
    PERSON,
    PLACE,
    PREPOSITION,
    PRONOUN,
    RHYME,
    TABLES,
    TONGUES,
    TOPIC,
    partner,
)

__all__ = ["KINDS", "Document", "documents", "held_out"]

# How often each kind is written. Stories carry most facts, hence the largest share.
KINDS: dict[str, float] = {
    "story": 0.36,
    "dialogue": 0.14,
    "couplet": 0.18,
    "sum": 0.16,
    "tools": 0.09,
    "song": 0.07,
}

QUESTION: dict[str, str] = {
    "person": "who",
    "object": "what",
    "colour": "colour",
    "place": "where",
    "mood": "mood",
    "running_sum": "total",
    "topic": "topic",
}


def held_out(person: str, thing: str, place: str) -> bool:
    """Whether this combination is reserved for the eval split: a fifth of all, every pair still seen in training."""
    return (person, thing, place) in _held_out()


@cache
def _held_out() -> frozenset[tuple[str, str, str]]:
    triples = list(product(PERSON, OBJECT, PLACE))
    return frozenset(Random("tiny/held-out").sample(triples, len(triples) // 5))


def documents(n: int, seed: int, split: Split = "train") -> list[Document]:
    """The first `n` documents of a stream; document i depends on (seed, split, i) alone."""
    if split not in ("train", "eval"):
        raise ValueError(f"split is 'train' or 'eval', not {split!r}")
    return [_document(Random(f"tiny/{split}/{seed}/{i}"), split) for i in range(n)]


def _document(rng: Random, split: Split) -> Document:
    (kind,) = rng.choices(list(KINDS), weights=list(KINDS.values()))
    return _WRITERS[kind](rng, split)


def _triple(rng: Random, split: Split) -> tuple[str, str, str]:
    """A person, an object and a place whose combination belongs to `split`."""
    while True:
        triple = rng.choice(list(PERSON)), rng.choice(list(OBJECT)), rng.choice(list(PLACE))
        if held_out(*triple) == (split == "eval"):
            return triple


def _word(rng: Random, b: Builder, slot: str, facts: dict[str, Value]) -> None:
    """One word of `slot`, brought in by any of `facts`."""
    fact = rng.choice(list(facts))
    b.say(getattr(TABLES[fact][str(facts[fact])], slot))


def _leaning(b: Builder, *only: str) -> dict[str, Value]:
    """The known facts that may colour a clause."""
    return {f: v for f, v in b.known.items() if f in TABLES and (not only or f in only)}


def _clause(rng: Random, b: Builder, *only: str, end: str | None = None) -> None:
    """`[adj] subj [adv] verb [prep [adj] noun]`; `end` replaces the last noun."""
    facts = _leaning(b, *only)
    if rng.random() < 0.3:
        _word(rng, b, "adj", facts)
    roll = rng.random()
    if roll < 0.03 and "person" in b.known:
        b.tell("person", b.known["person"])
    elif roll < 0.06 and "object" in b.known:
        b.say("the").tell("object", b.known["object"])
    else:
        _word(rng, b, "subj", facts)
    if "mood" in b.known and rng.random() < 0.2:
        b.say(ADVERB[str(b.known["mood"])])
    _word(rng, b, "verb", facts)
    if end is not None or rng.random() < 0.6:
        b.say(PREPOSITION[str(b.known["place"])] if "place" in b.known else "near")
        if rng.random() < 0.2:
            _word(rng, b, "adj", facts)
        if end is not None:
            b.tell("rhyme", end) if b.known.get("rhyme") == end else b.say(end)
        else:
            _word(rng, b, "noun", facts)


def _stop(rng: Random, b: Builder) -> None:
    """End a clause: a comma, a joining word, or a full stop."""
    joiner = JOINER[str(b.known["object"])] if "object" in b.known else "and"
    b.say(rng.choices((",", joiner, "."), (0.2, 0.3, 0.5))[0])


def _ask(rng: Random, b: Builder, *among: str) -> None:
    """A question about a known fact, and its answer."""
    fact = rng.choice([f for f in among if f in b.known])
    b.say(QUESTION[fact], "?").tell(fact, b.known[fact]).say(".")


def _state(rng: Random, b: Builder, fact: str, value: str) -> None:
    """A sentence that tells one fact of a story whose person is known."""
    who = PRONOUN[str(b.known["person"])]
    if fact == "place":
        b.say(who, rng.choice(("came", "went")), "to", "the").tell("place", value)
    elif fact == "mood":
        b.say(who, "felt").tell("mood", value)
    else:
        colour, _, thing = value.rpartition(" ")
        b.say(who, rng.choice(("had", "held")), "a")
        b.tell("object", thing)
        if colour:
            b.say("in").tell("colour", colour)
    b.say(".")


def _story(rng: Random, split: Split) -> Document:
    person, thing, place = _triple(rng, split)
    b = Builder("story")
    b.open_with("kind", "story")
    b.open_with("language", "english")
    b.say(rng.choice(("once", "today"))).tell("person", person)
    colour = rng.choice(list(COLOUR)) + " " if rng.random() < 0.85 else ""
    facts = [("place", place), ("object", colour + thing), ("mood", rng.choice(list(MOOD)))]
    rng.shuffle(facts)
    told_at_once = rng.choice((1, 2, 3))
    if facts[0][0] == "place":
        b.say(rng.choice(("came", "went")), "to", "the").tell("place", place).say(".")
    elif facts[0][0] == "mood":
        b.say("felt").tell("mood", facts[0][1]).say(".")
    else:
        b.say("had", "a")
        b.tell("object", thing)
        if colour:
            b.say("in").tell("colour", colour.strip())
        b.say(".")
    rest = facts[1:]
    for fact, value in rest[: told_at_once - 1]:
        _state(rng, b, fact, value)
    later = rest[told_at_once - 1 :]
    if later and rng.random() < 0.2:
        later.pop()
    for step in range(rng.randint(4, 7)):
        _clause(rng, b)
        if later and rng.random() < 0.7:
            b.say(".")
            _state(rng, b, *later.pop(0))
        elif step and rng.random() < 0.22:
            b.say(".")
            _ask(rng, b, "person", "object", "colour", "place", "mood")
        else:
            _stop(rng, b)
    if b.text[-1] != ".":
        _clause(rng, b)
        b.say(".")
    return b.done()


def _dialogue(rng: Random, split: Split) -> Document:
    person, thing, place = _triple(rng, split)
    b = Builder("dialogue", chat=True)
    b.turn("user")
    b.open_with("kind", "dialogue")
    b.open_with("language", "english")
    b.say("hello", ",", "i", "am").tell("person", person)
    facts = [("place", place), ("object", thing), ("mood", rng.choice(list(MOOD))), ("topic", rng.choice(list(TOPIC)))]
    rng.shuffle(facts)
    told = facts[: rng.choice((1, 2))]
    later = facts[len(told) : rng.choice((3, 4))]

    def state(fact: str, value: str) -> None:
        opening = {"place": ("i", "am", "at", "the"), "mood": ("i", "feel"), "topic": ("tell", "me", "of")}
        if fact == "object":
            b.say("i", "have", "a")
            b.tell("object", value)
            if rng.random() < 0.85:
                b.say("in").tell("colour", rng.choice(list(COLOUR)))
        else:
            b.say(*opening[fact]).tell(fact, value)
        b.say(".")

    b.say(".")
    for fact, value in told:
        state(fact, value)
    for _ in range(rng.randint(2, 3)):
        b.turn("assistant")
        _clause(rng, b)
        if rng.random() < 0.5:
            _stop(rng, b)
            _clause(rng, b)
        b.say(".")
        b.turn("user")
        if later and rng.random() < 0.6:
            state(*later.pop(0))
        elif rng.random() < 0.5:
            _clause(rng, b)
            b.say(".")
        else:
            fact = rng.choice([f for f in QUESTION if f in b.known])
            b.say(QUESTION[fact], "?")
            b.turn("assistant")
            b.tell(fact, b.known[fact]).say(".")
            b.turn("user")
            _clause(rng, b)
            b.say(".")
    b.turn("assistant")
    _clause(rng, b)
    b.say(".")
    return b.done()


def _couplet(rng: Random, split: Split) -> Document:
    b = Builder("couplet")
    b.open_with("kind", "couplet")
    b.open_with("language", "english")
    topic = rng.choice(list(TOPIC))
    b.say("rhymes", "of").tell("topic", topic)
    if rng.random() < 0.5:
        b.say("and").tell("mood", rng.choice(list(MOOD)))
    b.say(":")
    for _ in range(rng.choice((2, 2, 3))):
        if rng.random() < 0.4:
            _clause(rng, b, "topic", "mood")
            b.say(",")
        first = rng.choice(list(RHYME))
        _clause(rng, b, "topic", "mood", end=first)
        answer = partner(first, topic)
        b.learn("rhyme", answer)
        b.say("/")
        for _ in range(rng.choice((0, 1, 1))):
            _clause(rng, b, "rhyme", rng.choice(("topic", "mood", "rhyme")))
            b.say(",")
        _clause(rng, b, "rhyme", "topic", "mood", end=answer)
        b.learn("rhyme", None)
        b.say(".")
    return b.done()


def _sum(rng: Random, split: Split) -> Document:
    b = Builder("sum")
    b.open_with("kind", "sum")
    b.open_with("language", "english")
    b.say("count", ":").tell("person", rng.choice(list(PERSON))).say("has")
    if rng.random() < 0.5:
        b.tell("colour", rng.choice(list(COLOUR)))
    total = rng.randint(0, 9)
    b.tell("running_sum", total).say(".")
    for _ in range(rng.randint(2, 4)):
        if rng.random() < 0.5:
            _clause(rng, b)
            b.say(".")
        change = rng.choice([c for c in range(-5, 6) if 0 <= total + c <= 9 and c])
        b.say("plus" if change > 0 else "minus", str(abs(change)))
        total += change
        b.learn("running_sum", total)
        for _ in range(rng.choice((0, 1, 1, 2))):
            b.say(",")
            _clause(rng, b)
        b.say("makes").tell("running_sum", total).say(".")
    if rng.random() < 0.5:
        _ask(rng, b, "person", "running_sum", "colour")
    return b.done()


def _tools(rng: Random, split: Split) -> Document:
    person, thing, place = _triple(rng, split)
    b = Builder("tools", chat=True)
    b.turn("user")
    b.open_with("kind", "tools")
    b.open_with("language", "english")
    b.say("find", "the").tell("object", thing)
    if rng.random() < 0.8:
        b.say("in").tell("colour", rng.choice(list(COLOUR)))
    b.say("of").tell("person", person)
    if rng.random() < 0.6:
        b.say("at", "the").tell("place", place)
    calls = rng.randint(1, 3)
    b.learn("calls", 0)
    b.say("with", str(calls), "calls", ".")
    for call in range(1, calls + 1):
        b.turn("assistant")
        if rng.random() < 0.4:
            _clause(rng, b)
            b.say(".")
        b.say("call", ("look", "listen", "open")[call - 1])
        b.learn("calls", call)
        b.say(".")
        b.turn("tool")
        if call == calls and "place" not in b.known:
            b.say("seen", "at", "the").tell("place", place).say(".")
        _clause(rng, b)
        if rng.random() < 0.4:
            _stop(rng, b)
            _clause(rng, b)
        b.say(".")
    b.turn("assistant")
    b.say("found", "after").tell("calls", calls).say("calls", ":")
    b.say("the").tell("object", thing).say("of").tell("person", person)
    b.say("at", "the").tell("place", place).say(".")
    return b.done()


def _song(rng: Random, split: Split) -> Document:
    """Lines in a second language about a person and a topic."""
    language = rng.choice(list(TONGUES))
    tongue = TONGUES[language]
    b = Builder("song")
    b.open_with("kind", "song")
    b.open_with("language", language)
    person, topic = rng.choice(list(PERSON)), rng.choice(list(TOPIC))
    b.say(tongue.opening, ":").tell("person", person).say(*tongue.at.split(), tongue.topics[topic])
    b.learn("topic", topic)
    b.say(".")
    words = tongue.table[topic]
    for _ in range(rng.randint(3, 6)):
        subject = [words.subj, words.adj] if language == "spanish" else [words.adj, words.subj]
        b.say(*(subject if rng.random() < 0.5 else [words.subj]))
        if rng.random() < 0.3:
            b.say(tongue.joiner).tell("person", person)
        b.say(words.verb)
        if rng.random() < 0.6:
            b.say(tongue.where, words.noun)
        b.say(",")
        if rng.random() < 0.3:
            b.say(tongue.who, "?").tell("person", person).say(".")
    b.say(tongue.who, "?").tell("person", person).say(".")
    return b.done()


_WRITERS: dict[str, Callable[[Random, Split], Document]] = {
    "story": _story,
    "dialogue": _dialogue,
    "couplet": _couplet,
    "sum": _sum,
    "tools": _tools,
    "song": _song,
}
