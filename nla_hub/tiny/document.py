"""A document of the tiny world and the builder that records what is known where."""

from __future__ import annotations

import re
from bisect import bisect_right
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

Value = str | int
Split = Literal["train", "eval"]

BOS = "<|bos|>"
END = "<|end|>"
WORD = re.compile(r"<\|\w+\|>|\w+|[^\w\s]")


def role_mark(role: str) -> str:
    """The string that opens a chat turn of `role`."""
    return f"<|{role}|>"


@dataclass(frozen=True, slots=True)
class Event:
    """From character `end` on, `fact` has `value` (None: not known any more)."""

    end: int
    fact: str
    value: Value | None


@dataclass(frozen=True, slots=True)
class Mention:
    """`text[start:end]` says `value` of `fact` in so many words."""

    start: int
    end: int
    fact: str
    value: Value


@dataclass(frozen=True, slots=True)
class MemorySpan:
    """Offsets `start < c <= end` lie after `value` became known and before it is said (again)."""

    start: int
    end: int
    value: Value


@dataclass(frozen=True)
class Document:
    """A text with its latent facts.

    `content` is a string or a list of chat messages; `text` the exact rendered string. All offsets count characters
    of `text`.
    """

    content: str | list[dict[str, str]]
    text: str
    kind: str
    events: tuple[Event, ...]
    mentions: tuple[Mention, ...]

    @cached_property
    def words(self) -> list[tuple[int, int]]:
        """Spans of words and punctuation marks in `text`, without the BOS string."""
        return [m.span() for m in WORD.finditer(self.text) if m.group() != BOS]

    @cached_property
    def _word_ends(self) -> list[int]:
        return [end for _, end in self.words]

    def last_words(self, char: int, count: int) -> list[str]:
        """Up to `count` last complete words of `text[:char]`, in reading order."""
        stop = bisect_right(self._word_ends, char)
        return [self.text[a:b] for a, b in self.words[max(0, stop - count) : stop]]

    def next_word(self, char: int) -> str | None:
        """The first word completed after `char`; None at the end."""
        stop = bisect_right(self._word_ends, char)
        if stop == len(self.words):
            return None
        start, end = self.words[stop]
        return self.text[start:end]

    def facts_at(self, char: int) -> dict[str, Value | None]:
        """What is known after reading `text[:char]`; what is not known is absent."""
        facts: dict[str, Value | None] = {}
        for event in self.events:
            if event.end > char:
                break
            if event.value is None:
                facts.pop(event.fact, None)
            else:
                facts[event.fact] = event.value
        last = self.last_words(char, 1)
        if last:
            facts["last_word"] = last[0]
        following = self.next_word(char)
        if following is not None:
            facts["next_word"] = following
        return facts

    def memory_spans(self, fact: str) -> list[MemorySpan]:
        """Where `fact` must be remembered: after it became known, until it is said again or changes."""
        spans: list[MemorySpan] = []
        changes = [e for e in self.events if e.fact == fact]
        for index, event in enumerate(changes):
            if event.value is None:
                continue
            stop = changes[index + 1].end if index + 1 < len(changes) else len(self.text)
            again = (m.start for m in self.mentions if m.fact == fact and m.start >= event.end)
            stop = min(stop, next(again, stop))
            spans.append(MemorySpan(event.end, stop, event.value))
        return spans

    def fact_first_end(self, fact: str) -> int | None:
        """Offset from which `fact` is known for the first time."""
        return next((e.end for e in self.events if e.fact == fact and e.value is not None), None)

    def fact_next_mention(self, fact: str) -> int | None:
        """Offset at which `fact` is said for the first time after it became known; None when it never is."""
        first = self.fact_first_end(fact)
        if first is None:
            return None
        return next((m.start for m in self.mentions if m.fact == fact and m.start >= first), None)


@dataclass
class Builder:
    """Writes a document word by word and notes facts and mentions at the right offsets."""

    kind: str
    chat: bool = False
    known: dict[str, Value] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.text = BOS if self.chat else ""
        self.events: list[Event] = []
        self.mentions: list[Mention] = []
        self.messages: list[dict[str, str]] = []
        self._turn: tuple[str, int] | None = None
        self._pending: list[tuple[str, Value]] = []

    def turn(self, role: str) -> None:
        """Close the open chat turn and open one of `role`."""
        self._close()
        self.text += role_mark(role)
        self._turn = (role, len(self.text))

    def _close(self) -> None:
        if self._turn is not None:
            role, start = self._turn
            self.messages.append({"role": role, "content": self.text[start + 1 :]})
            self.text += END
            self._turn = None

    def open_with(self, fact: str, value: Value) -> None:
        """`fact` becomes known with the next word, which need not say it."""
        self._pending.append((fact, value))

    def say(self, *words: str) -> Builder:
        """Append words, each after a space; punctuation marks without one."""
        for word in words:
            if self.text and word not in ".,?:":
                self.text += " "
            self.text += word
            for fact, value in self._pending:
                self.learn(fact, value)
            self._pending.clear()
        return self

    def learn(self, fact: str, value: Value | None) -> None:
        """From here on `fact` is `value`."""
        if value is None:
            self.known.pop(fact, None)
        else:
            self.known[fact] = value
        self.events.append(Event(len(self.text), fact, value))

    def tell(self, fact: str, value: Value) -> Builder:
        """Say `value` in so many words; it is known from here on."""
        self.say(str(value))
        self.mentions.append(Mention(len(self.text) - len(str(value)), len(self.text), fact, value))
        if self.known.get(fact) != value:
            self.learn(fact, value)
        return self

    def done(self) -> Document:
        """The finished document."""
        self._close()
        content: str | list[dict[str, str]] = self.messages if self.chat else self.text
        return Document(content, self.text, self.kind, tuple(self.events), tuple(self.mentions))
