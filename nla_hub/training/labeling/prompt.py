"""What a labeler asks a language model, and which of its answers are labels.

The default wording is our own. It asks for what the warm start of the paper is made of: 2 to 5 short features, 80 to 200 words
in all, the last one about the final token. What comes back is stored as it came; whether it is a label is decided when it
is read, by rules that are settings, so that other rules cost nothing.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass

from nla_hub.errors import InputError
from nla_hub.prompts import CLOSING_TAG, OPENING_TAG
from nla_hub.training.labelers import LabelRequest

SNIPPET = "{snippet}"
"""Stands once in a template: the text up to the token."""

TEMPLATE = """\
Here is the beginning of a text. It stops right after one token.

<snippet>
{snippet}
</snippet>

Imagine a language model that has read exactly this much and now has to go on. What is it attending to at this point: what \
does it hold in mind about the text so far, and what does it expect?

Write 2 to 5 features of one or two sentences each, every feature in a line of its own, the most important first. Good \
features are for example the topic, the kind of text and its tone, who speaks to whom, a name or fact on which the next words \
depend, a structure that is still open. The last feature is about the final token: what it is, what it does here and what is \
likely to follow it. Quote words of the text where they matter.

Write 80 to 200 words in all, in plain English, without headings, bullets or numbers. Speak about the text itself, never \
about having been shown it, and do not continue it. Put the features between <explanation> and </explanation> and write \
nothing else."""

REFUSALS = frozenset({"content_filter", "refusal"})
"""Why an answer ended, in the words of the OpenAI and Anthropic APIs, where the model or a filter would not write it."""
CUTS = frozenset({"length", "max_tokens", "model_context_window_exceeded"})
"""The same, where it was not finished."""

NOT_READ = "not read"
"""The same, where whoever was asked does not read this token of this document."""

_THOUGHT = "</think>"
_BULLET = re.compile(r"^(?:[-*•]|\(?\d{1,2}[.)])\s+")


@dataclass(frozen=True, kw_only=True)
class AnswerSettings:
    """What is accepted and where it is kept; settings of every labeler here.

    Attributes:
        min_words, max_words: an answer with fewer or more is dropped. Wider than what is asked for, because models count badly.
        min_features, max_features: the same for its lines.
        forbidden: an answer with one of these words is dropped, whatever its case.
        attempts: how often a snippet is asked at most, where answers are dropped. Each is stored (and paid) once.
        max_output_tokens: tokens of an answer at most.
        stop_when_bad: give up when more than this share of the answers is dropped, once there are 50 of them.
        cache: a directory for the answers instead of the run's own, so that runs share them.
    """

    min_words: int = 60
    max_words: int = 260
    min_features: int = 2
    max_features: int = 5
    forbidden: tuple[str, ...] = ("snippet",)
    attempts: int = 1
    max_output_tokens: int = 600
    stop_when_bad: float = 0.9
    cache: str | None = None

    def faults(self) -> Iterator[str]:
        """Bounds that nothing satisfies."""
        for name in ("attempts", "max_output_tokens", "min_words", "min_features"):
            if getattr(self, name) < 1:
                yield f"{name}: got {getattr(self, name)}, expected 1 or more"
        for low, high in (("min_words", "max_words"), ("min_features", "max_features")):
            if getattr(self, high) < getattr(self, low):
                yield f"{high}: got {getattr(self, high)}, expected {low} = {getattr(self, low)} or more"
        if not 0 < self.stop_when_bad <= 1:
            yield f"stop_when_bad: got {self.stop_when_bad}, expected a share above 0, at most 1"


@dataclass(frozen=True, kw_only=True)
class PromptSettings(AnswerSettings):
    """What is asked; settings of every labeler that prompts a model.

    Attributes:
        template: the prompt, with {snippet} in it once.
        snippet_chars: characters before the end of the token that are shown at most; None: all. Untuned.
    """

    template: str = TEMPLATE
    snippet_chars: int | None = 8000

    def faults(self) -> Iterator[str]:
        """A template without its place, a snippet without characters."""
        yield from super().faults()
        if self.template.count(SNIPPET) != 1:
            yield f"template: {SNIPPET} stands {self.template.count(SNIPPET)} times, expected once"
        if self.snippet_chars is not None and self.snippet_chars < 1:
            yield f"snippet_chars: got {self.snippet_chars}, expected 1 or more, or null"

    @property
    def template_hash(self) -> str:
        """sha256 of the template: part of what an answer is stored under."""
        return hashlib.sha256(self.template.encode()).hexdigest()

    def snippet(self, request: LabelRequest) -> str:
        """The text that is shown for a request; an InputError where nothing says what it is."""
        text = request.prefix
        if text is None:
            content = request.document.content
            if not isinstance(content, str):
                raise InputError(
                    "A conversation can be labelled only with its rendered text.",
                    where="LabelRequest.prefix",
                    next_step="pass prefix=encoded.text[:char_end]",
                )
            text = content[: request.char_end]
        return text if self.snippet_chars is None else text[-self.snippet_chars :]

    def prompt(self, request: LabelRequest) -> str:
        """The filled template."""
        return self.template.replace(SNIPPET, self.snippet(request))


def judge(text: str, finish: str | None, rules: AnswerSettings) -> tuple[str | None, str | None]:
    """An answer as a label, or None and the reason why it is none.

    Args:
        finish: why the answer ended, as the API says.

    Returns:
        The features, one a line, without bullets; or the reason: "refused", "not read", "empty", "cut off", "no tags", "several
        explanations", "too short", "too long", "too few features", "too many features", "forbidden word".
    """
    if finish in REFUSALS:
        return None, "refused"
    answer = text.rpartition(_THOUGHT)[2]  # reasoning models write tags in their thoughts too
    if finish == NOT_READ:
        return None, NOT_READ
    if not answer.strip():
        return None, "cut off" if finish in CUTS else "empty"
    if (answer.count(OPENING_TAG), answer.count(CLOSING_TAG)) != (1, 1):
        if finish in CUTS and CLOSING_TAG not in answer:
            return None, "cut off"
        several = answer.count(OPENING_TAG) > 1 or answer.count(CLOSING_TAG) > 1
        return None, "several explanations" if several else "no tags"
    inside = answer.partition(OPENING_TAG)[2].partition(CLOSING_TAG)[0]
    lines = [_BULLET.sub("", " ".join(line.split())) for line in inside.splitlines() if line.strip()]
    return _within(lines, rules)


def _within(lines: list[str], rules: AnswerSettings) -> tuple[str | None, str | None]:
    words = sum(len(line.split()) for line in lines)
    label = "\n".join(lines)
    reason = None
    if not words:
        reason = "empty"
    elif words < rules.min_words:
        reason = "too short"
    elif words > rules.max_words:
        reason = "too long"
    elif len(lines) < rules.min_features:
        reason = "too few features"
    elif len(lines) > rules.max_features:
        reason = "too many features"
    elif any(re.search(rf"\b{re.escape(word)}\b", label, re.IGNORECASE) for word in rules.forbidden):
        reason = "forbidden word"
    return (label, None) if reason is None else (None, reason)
