"""Mixed corpora: documents streamed from several places by weight, each content once, and the split that each belongs to.

Everything here depends on the data, their order and the seed alone. Which part of a mixture gives the next document is a
matter of counting, not of chance; which split a document belongs to is a hash of its content, so what is the same document
in two places, or in two runs, is never on both sides of a split.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from nla_hub.errors import InputError
from nla_hub.explain.inputs import BadItem, Dataset, open_dataset
from nla_hub.hub import HubOptions
from nla_hub.sampling import document_hash
from nla_hub.source_text import Content
from nla_hub.training.specs import CorpusPart

RESERVED = {"eval": 0.05, "dev": 0.05}
"""Held-out splits and the share of all documents that is theirs, whatever the sizes of the others: no change of a recipe moves
a document from here into training. 0.05 of 20,000 documents are what nla-eval-v1 wants with a margin."""

FEW_BAD, MOST_BAD = 10, 0.1
"""So many documents of a part may be bad, and this share of those that were read: more is a mistake, not noise."""

REASONS = 5
"""Bad documents that are quoted."""

OPTIONS = {"--messages-column": "messages:", "--column": "column:"}
"""How a recipe writes what a command line writes otherwise."""


def normal(content: Content) -> Content:
    """A document without white space at the ends of its texts: what makes two documents the same one."""
    if isinstance(content, str):
        return content.strip()
    return [{"role": message["role"], "content": str(message["content"]).strip()} for message in content]


def content_key(content: Content) -> bytes:
    """16 bytes that are equal for equal documents, white space at the ends aside."""
    return bytes.fromhex(document_hash(normal(content)))[:16]


def is_blank(content: Content) -> bool:
    """Whether a document says nothing."""
    found = normal(content)
    return not (found if isinstance(found, str) else any(message["content"] for message in found))


# -- splits --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Splitter:
    """Says to which split a document belongs: by its content and the seed, and by nothing else.

    The reserved splits come first, each with its own range of hashes. All other documents are shared in proportion to
    `sizes` (weighted rendezvous hashing): where one size grows, documents move into that split and none between others.
    """

    seed: int
    sizes: Mapping[str, int]

    @cached_property
    def shares(self) -> dict[str, float]:
        """Split -> its share of all documents."""
        rest, wanted = 1.0 - sum(RESERVED.values()), sum(self.sizes.values())
        return {**RESERVED, **{name: rest * size / wanted for name, size in self.sizes.items()}}

    def split_of(self, key: bytes) -> str:
        """The split of the document with this content key."""
        place = self._uniform("reserved", key)
        for name, share in RESERVED.items():
            if place < share:
                return name
            place -= share
        return min(self.sizes, key=lambda name: -math.log(self._uniform(name, key)) / self.sizes[name])

    def _uniform(self, name: str, key: bytes) -> float:
        """A number in (0, 1) of this document for this purpose."""
        digest = hashlib.sha256(f"{self.seed}\x1f{name}\x1f".encode() + key).digest()
        return (int.from_bytes(digest[:6], "big") + 0.5) / 2.0**48


# -- mixtures ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class MixedDocument:
    """A document of a mixture: a `CorpusDocument` that knows where it comes from.

    Attributes:
        content: a text or a conversation.
        own_id: its id in its data set, None where that has none.
        key: see `content_key`.
    """

    content: Content
    own_id: str | None
    key: bytes


@dataclass
class PartReport:
    """What became of one part's documents so far.

    Attributes:
        given: documents that went into the mixture. bad: that cannot be read or are empty. repeated: that the mixture had
            already. reasons: of the first bad ones.
        ended: whether the part has no more.
        identity: what its data are: files with digests, or repository and commit.
    """

    data: str
    given: int = 0
    bad: int = 0
    repeated: int = 0
    reasons: list[str] = field(default_factory=list)
    ended: bool = False
    identity: dict[str, Any] = field(default_factory=dict)

    def add_bad(self, reason: str) -> None:
        """Count a bad document; an InputError where they are too many."""
        self.bad += 1
        if len(self.reasons) < REASONS:
            self.reasons.append(reason)
        require_few_bad(self.bad, self.given + self.repeated + self.bad, self.reasons, where=self.data)


def require_few_bad(bad: int, read: int, reasons: Sequence[str], *, where: str) -> None:
    """Raise an InputError where `bad` of `read` documents are too many to be passed over."""
    if bad > FEW_BAD + MOST_BAD * read:
        raise InputError(
            f"{bad} of the first {read} documents cannot be used.",
            where=where,
            expected=f"at most {FEW_BAD} and {MOST_BAD:.0%} of them",
            faults=list(reasons),
            next_step="correct the data, or name another column: in data.mix",
        )


class Mixture:
    """The documents of several places, mixed by weight.

    After n documents each part has given its share of n, give or take the one that is due. The mixture ends where the
    first of its parts does, so that weights hold to its end.
    """

    def __init__(self, parts: Sequence[CorpusPart], options: HubOptions | None = None) -> None:
        self.parts = tuple(parts)
        self.options = options
        self.reports = [PartReport(part.data) for part in self.parts]
        self._seen: set[bytes] = set()

    def documents(self) -> Generator[MixedDocument, None, None]:
        """Every document, from the first one on.

        Raises:
            InputError: a part that is not there, has no such column or holds vectors; too many bad documents.
            HubError, RunError, MissingExtraError: as `explain.inputs.open_dataset` and its items.
        """
        self.reports = [PartReport(part.data) for part in self.parts]
        self._seen = set()
        with ExitStack() as stack:
            streams = []
            for part, report in zip(self.parts, self.reports, strict=True):
                dataset = _opened(part, self.options)
                report.identity = dataset.describe()
                streams.append(self._good(stack.enter_context(closing(dataset.items())), report))
            for i in turns([part.weight for part in self.parts]):
                document = next(streams[i], None)
                if document is None:
                    self.reports[i].ended = True
                    return
                yield document

    def _good(self, items: Iterator[Any], report: PartReport) -> Iterator[MixedDocument]:
        """The documents of one part that can be read and that the mixture does not have."""
        for item in items:
            if isinstance(item, BadItem):
                report.add_bad(item.error)
            elif is_blank(item.content):
                report.add_bad(f"{item.where}: The document is empty.")
            elif (key := content_key(item.content)) in self._seen:
                report.repeated += 1
            else:
                self._seen.add(key)
                report.given += 1
                yield MixedDocument(item.content, item.doc_id, key)


def turns(weights: Sequence[float]) -> Iterator[int]:
    """Whose turn it is, for ever: always the one that is furthest behind its share, the first of equals."""
    shares = [weight / sum(weights) for weight in weights]
    given = [0] * len(shares)
    while True:
        total = sum(given) + 1
        i = max(range(len(shares)), key=lambda i: shares[i] * total - given[i])
        given[i] += 1
        yield i


def _opened(part: CorpusPart, options: HubOptions | None) -> Dataset:
    """The data set of a part; errors speak of the recipe, not of a command line."""
    try:
        dataset = open_dataset(
            part.data, column=part.column, messages_column=part.messages, split=part.split, options=options
        )
    except InputError as error:
        for option, key in OPTIONS.items():
            error.what = error.what.replace(option, key)
            error.next_step = error.next_step and error.next_step.replace(option, key)
        raise
    if dataset.kind != "text":
        raise InputError(
            "These are vectors; a recipe reads documents.",
            where=part.data,
            next_step="name the column that holds texts: column: NAME in data.mix",
        )
    return dataset
