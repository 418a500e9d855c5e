"""The labeler `nla`: an existing pair explains the same token, and its words are the label.

The pair reads the document with its own base model at its own layer: what it describes is the same token of the same text, in
whatever model the pair was made for. Where that is the base model and layer of the run, it is the run's own vector.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from nla_hub.log import logger
from nla_hub.sampling import document_hash
from nla_hub.source_text import Encoded, context_length, encode_source
from nla_hub.training.labelers import CorpusDocument, LabelRequest
from nla_hub.training.labeling.cache import Answer
from nla_hub.training.labeling.in_process import InProcessLabeler
from nla_hub.training.labeling.prompt import NOT_READ, AnswerSettings
from nla_hub.training.labeling.run import Missing

if TYPE_CHECKING:
    from nla_hub.nla import NLA

BLOCK = 256
"""Rows that are read together, after which answers are stored."""


@dataclass(frozen=True, kw_only=True)
class NLASettings(AnswerSettings):
    """Settings of the labeler `nla`. Its bounds are wide: a pair has learnt its own form.

    Attributes:
        nla: name of the pair, as everywhere; revision: of a Hub repository.
        temperature: 0 is greedy. seed: of the draws.
        batch_size: rows that run together at most; None leaves it to the pair.
        device_map, dtype: as in `NLA.from_pretrained`.
    """

    nla: str
    revision: str | None = None
    temperature: float = 0.0
    seed: int = 0
    batch_size: int | None = None
    device_map: str | None = None
    dtype: str = "auto"
    min_words: int = 1
    max_words: int = 400
    min_features: int = 1
    max_features: int = 20
    forbidden: tuple[str, ...] = ()
    max_output_tokens: int = 200

    def faults(self) -> Iterator[str]:
        """A temperature below 0, attempts that would all be the same."""
        yield from super().faults()
        if not self.temperature >= 0:
            yield f"temperature: got {self.temperature}, expected 0 or more"
        if self.attempts > 1:
            yield "attempts: a pair explains a vector once"


class NLALabeler(InProcessLabeler[NLASettings]):
    """Explains each token with a pair, which is loaded where an answer is missing."""

    name: ClassVar[str] = "nla"
    kind: ClassVar[type[Any]] = NLASettings

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self._nla: NLA | None = None

    def identity(self) -> dict[str, Any]:
        """The pair and how it is sampled."""
        chosen = self.settings
        sampling: dict[str, Any] = {"temperature": chosen.temperature, "max_output_tokens": chosen.max_output_tokens}
        if chosen.temperature:
            sampling["seed"] = chosen.seed
        return {"model": chosen.nla, "revision": chosen.revision, "sampling": sampling}

    def content(self, request: LabelRequest) -> str:
        """The document and the end of the token; what stands behind it is not read, but may change the rendering."""
        return f"{document_hash(request.document.content)} {request.char_end}"

    @property
    def block(self) -> int:
        """Rows of neighbouring documents."""
        return BLOCK

    def write(self, blocks: Sequence[Missing]) -> Iterator[dict[str, Answer]]:
        """Explain one block after the other; the pair is loaded for the first of them."""
        if self._nla is None:
            self._nla = self._pair()
        for block in blocks:
            yield explain(self._nla, block, self.settings)

    def close(self) -> None:
        """Free the pair."""
        super().close()
        if self._nla is not None:
            self._nla.close()
            self._nla = None

    def _pair(self) -> NLA:
        from nla_hub.nla import NLA

        chosen = self.settings
        nla = NLA.from_pretrained(
            chosen.nla,
            components=("av",),
            revision=chosen.revision,
            device_map=chosen.device_map,
            dtype=chosen.dtype,
        )
        logger.info("labels: %s explains its own reading: %s", chosen.nla, nla)
        return nla


def explain(nla: NLA, block: Missing, settings: NLASettings) -> dict[str, Answer]:
    """What a pair writes for each request; NOT_READ for a token behind what its base model reads, or rendered otherwise."""
    documents: dict[int, Encoded] = {}
    sequences: list[tuple[tuple[int, ...], list[int]]] = []
    read: list[str] = []
    for key, request in block.items():
        encoded = documents.get(id(request.document))
        if encoded is None:
            encoded = documents[id(request.document)] = _encoded(nla, request.document)
        if (position := position_of(encoded, request)) is not None:
            sequences.append((encoded.ids, [position]))
            read.append(key)
    answers = {key: Answer("", NOT_READ) for key in block}
    if read:
        rows = nla.verbalize(
            nla.capture_ids(sequences, batch_size=settings.batch_size),
            temperature=settings.temperature,
            max_new_tokens=settings.max_output_tokens,
            seed=settings.seed,
            batch_size=settings.batch_size,
            show_progress_bar=False,
        )
        answers.update((key, Answer(row.raw)) for key, row in zip(read, rows, strict=True))
    return answers


def _encoded(nla: NLA, document: CorpusDocument) -> Encoded:
    source = nla.capture_source
    limit = context_length(source.loaded.model.config)
    return encode_source(source.tokenizer, document.content, max_length=limit, overflow="truncate")[0]


def position_of(encoded: Encoded, request: LabelRequest) -> int | None:
    """The token in which the request's token ends; None where this reading has none, or another text before it."""
    end = request.char_end
    if request.prefix is not None and encoded.text[:end] != request.prefix:
        return None
    return next((i for i, (a, b) in enumerate(encoded.offsets) if a < end <= b and not encoded.special[i]), None)
