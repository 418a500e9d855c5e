"""What a labeler is: something that writes, for a token of a document, the explanation a warm start learns from."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from nla_hub.source_text import Content

if TYPE_CHECKING:
    from nla_hub.loading import Source


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
    """One activation to be labelled.

    Attributes:
        document: where it is from.
        char_end: the character at which its token ends in the document's rendered text.
        prefix: the rendered text up to there. None: whoever asks did not keep it; for a document that is a text, it is the
            beginning of that text.
    """

    document: CorpusDocument
    char_end: int
    prefix: str | None = None


@dataclass(frozen=True)
class LabelContext:
    """What a run gives to a labeler before the first request.

    Attributes:
        directory: where it may keep what it was answered; the same one when the run is started again.
        base: name of the base model with its revision or digest: what its own answers are stored under.
        source: loads the complete base model, with its last layer, when it is called; None where there is none.
        report: is told figures and what goes on, as {"words": value}; from any thread.
    """

    directory: Path
    base: str = ""
    source: Callable[[], Source] | None = None
    report: Callable[[dict[str, Any]], None] = lambda figures: None


class Labeler(Protocol):
    """Writes labels. A third party registers a class with this shape under `nla_hub.labelers`.

    It is made with the settings that a recipe sets as keywords, which must cost no network and no heavy import: `recipes
    validate` and `train --plan` make it too. It may have more, and is asked for it only where it does:

    - `check()` before anything is computed: raises where it could not begin, for want of a key or a package;
    - `open(context: LabelContext)` before the first request, `close()` after the last one (see `opened`);
    - `estimate(requests, mean_tokens)`: what so many requests of so many tokens will cost, as an `Estimate` of
      `nla_hub.training.labeling.cost`;
    - `figures()`: what was asked, dropped and paid, for the summary of the run;
    - `divided = True` and what `DividedLabeler` says: all processes of the run answer together, before `label` is called.
    """

    def label(self, requests: Sequence[LabelRequest]) -> list[str | None]:
        """One label a request; None where there is no usable answer, never a made-up text."""
        ...


Block = list[str]
"""Keys of snippets that are answered together."""


class DividedLabeler(Labeler, Protocol):
    """One that writes its answers in process, so that every process of a run can write a share of them.

    For each attempt the main process plans, each process answers its share, and the main process takes over what they wrote;
    afterwards `label` finds every answer stored. `open` and `close` are called in every process that has a share.
    """

    divided: bool

    @property
    def attempts(self) -> int:
        """How often a snippet is asked at most."""
        ...

    def plan(self, requests: Iterable[LabelRequest], attempt: int) -> list[Block]:
        """In the main process: what is not answered yet, in blocks that do not depend on the number of processes."""
        ...

    def answer_share(
        self, share: Sequence[Block], requests: Iterable[LabelRequest], attempt: int, *, rank: int, world: int
    ) -> Iterator[None]:
        """In every process: answer some of the blocks and store them; yields each time something was stored."""
        ...

    def take_over(self) -> None:
        """In the main process, after all shares: bring together what every process stored."""
        ...


@contextmanager
def opened(labeler: Labeler, context: LabelContext) -> Iterator[Labeler]:
    """A labeler between its `open` and its `close`, where it has them."""
    if (begin := getattr(labeler, "open", None)) is not None:
        begin(context)
    try:
        yield labeler
    finally:
        if (end := getattr(labeler, "close", None)) is not None:
            end()
