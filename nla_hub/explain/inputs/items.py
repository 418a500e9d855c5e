"""What a data set is made of: texts, vectors, and rows that could not be read."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np

from nla_hub.errors import NLAError
from nla_hub.source_text import Content

Kind = Literal["text", "vectors"]


@dataclass(frozen=True)
class TextItem:
    """One document.

    Attributes:
        content: a text (perhaps empty), or a conversation as `source_text.check_messages` accepts it.
        doc_id: the caller's id, None where the data have none.
        where: file and line or row, counted from 1, for messages to people.
    """

    content: Content
    doc_id: str | None
    where: str


@dataclass(frozen=True, eq=False)  # arrays have no single truth value to compare by
class VectorItem:
    """One vector.

    Attributes:
        vector: float32 [d], raw; it may hold NaN or be zero.
        doc_id, position, context: from the columns `doc_id`, `n_raw_tokens` (less one) and
            `detokenized_text_truncated`; None where they do not say.
        where: as `TextItem.where`.
    """

    vector: np.ndarray[Any, np.dtype[np.float32]]
    doc_id: str | None
    position: int | None
    context: str | None
    where: str


@dataclass(frozen=True)
class BadItem:
    """A row or file that could not be read; `error` says on one line what is wrong and where."""

    error: str
    doc_id: str | None
    where: str


Item = TextItem | VectorItem | BadItem


@dataclass(frozen=True)
class RecordedSite:
    """Where vectors were taken, as their sidecar or columns say; None for what they do not say."""

    base_model: str | None
    layer: int | None


class Dataset(Protocol):
    """Items in an order that does not change, from files or a stream."""

    @property
    def kind(self) -> Kind:
        """What the items are, apart from those that cannot be read."""
        ...

    @property
    def width(self) -> int | None:
        """d of vectors, None for texts."""
        ...

    @property
    def site(self) -> RecordedSite | None:
        """Where the vectors were taken; None for texts, and where nothing is said."""
        ...

    @property
    def total(self) -> int | None:
        """Number of items where that is known without reading everything, else None."""
        ...

    def describe(self) -> dict[str, Any]:
        """What the data are, ready for YAML; equal for the same data, whatever their folder and times of change."""
        ...

    def items(self, start: int = 0) -> Generator[Item, None, None]:
        """The items from the `start`-th one on (0-based); skipping is as cheap as the format allows, closing frees the files.

        Raises:
            HubError: a data set of the Hub stopped coming; the items so far are good.
            RunError: so did a file of this machine, or one whose rows were passed before cannot be opened now.
        """
        ...

    def fraction(self) -> float | None:
        """The part of the input that the iterator begun last has consumed, 0 to 1; None where that is unknown."""
        ...


def encodable(text: str) -> str:
    """A text that files and terminals can hold: parts that are no characters (of file names, of JSON) are spelled out."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def one_line(text: object, at_most: int = 400) -> str:
    """A text as a message may hold it: on one line, not too long, and encodable."""
    line = " ".join(str(text).split())
    return encodable(line if len(line) <= at_most else f"{line[:at_most]}...")


def refused(error: NLAError, where: str, doc_id: str | None = None) -> BadItem:
    """An error that names its place, as a BadItem."""
    return BadItem(one_line(error.one_line()), doc_id, where)


def bad(reason: str, where: str, doc_id: str | None = None) -> BadItem:
    """A BadItem whose message begins with the place."""
    return BadItem(one_line(f"{where}: {reason}"), doc_id, where)
