"""The tiny world as a corpus and a labeler of training recipes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from nla_hub.errors import InputError
from nla_hub.tiny.document import Document
from nla_hub.tiny.labels import label, named_facts
from nla_hub.tiny.world import documents
from nla_hub.training.labelers import LabelRequest


class TinyCorpus:
    """Documents of the tiny world; every purpose draws from its own stream."""

    name = "tiny-world"

    def documents(self, n: int, *, seed: int, split: Literal["train", "eval"] = "train") -> list[Document]:
        """The first `n` documents of the stream `seed`."""
        return documents(n, seed, split)


class TinyLabeler:
    """Labels from the documents' own latent facts: nothing is guessed and nothing costs money."""

    name = "tiny"
    named = staticmethod(named_facts)
    """Facts that an explanation names."""

    def __init__(self, clauses: Sequence[str] | None = None, share: float | None = None) -> None:
        self.clauses = clauses
        self.share = share

    def label(self, requests: Sequence[LabelRequest]) -> list[str | None]:
        """One label a request; raises an InputError for documents of other corpora."""
        found: list[str | None] = []
        for request in requests:
            if not isinstance(request.document, Document):
                raise InputError(
                    "The labeler 'tiny' knows only documents of the tiny world.", got=type(request.document).__name__
                )
            found.append(label(request.document, request.char_end, self.clauses, share=self.share))
        return found
