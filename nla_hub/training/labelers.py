"""What a labeler is: something that writes, for a token of a document, the explanation a warm start learns from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from nla_hub.source_text import Content


class CorpusDocument(Protocol):
    """A document of a corpus; a corpus may give it more (the tiny world knows its latent facts)."""

    @property
    def content(self) -> Content:
        """A text, or chat messages."""
        ...


class Corpus(Protocol):
    """A source of documents. Different seeds are different streams; a longer request starts with the same documents."""

    def documents(self, n: int, *, seed: int) -> Sequence[CorpusDocument]:
        """The first `n` documents of the stream `seed`."""
        ...


@dataclass(frozen=True)
class LabelRequest:
    """One activation to be labelled: the document and the character at which the token ends in its rendered text."""

    document: CorpusDocument
    char_end: int


class Labeler(Protocol):
    """Writes labels. A third party registers a class with this shape under `nla_hub.labelers`.

    It is made without arguments, or with those of `clauses` and `share` that a recipe sets.
    """

    def label(self, requests: Sequence[LabelRequest]) -> list[str | None]:
        """One label a request; None where there is no usable answer, never a made-up text."""
        ...
