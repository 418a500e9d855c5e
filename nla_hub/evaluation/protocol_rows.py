"""The rows of a protocol, captured: what every measurement by that protocol, of one pair or of two, starts from."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from nla_hub.capture import Activations
from nla_hub.errors import InputError
from nla_hub.evaluation import tiny_rows
from nla_hub.evaluation.facts import GATE_ROWS, probe_answers
from nla_hub.evaluation.protocols import Protocol, read_corpus, select_rows
from nla_hub.results import Explanation
from nla_hub.source_text import Content

if TYPE_CHECKING:
    from nla_hub.nla import NLA

Progress = Callable[[str, int, int], None]
"""Called with (what is done, rows done, rows in all)."""

BLOCK = 256
CONTEXT_CHARACTERS = 80


def quiet(what: str, done: int, total: int) -> None:
    """No report of progress."""


@dataclass(frozen=True)
class ProtocolRows:
    """Captured rows, the protocol's own first.

    Attributes:
        protocol: by which they were chosen; `corpus` names its documents, `dataset` what denominators are measured on.
        acts: all rows: the protocol's own `n`, then further ones for facts that few of these have.
        contents: the documents of the protocol's own rows, in their order.
        contexts: the end of the text that each of the protocol's own rows has read.
        world: the same rows with what is known at each; empty unless the documents are the tiny world's.
        members: for each fact the rows that count for it; empty where no facts were asked for or there are none.
    """

    protocol: Protocol
    corpus: str
    dataset: str
    acts: Activations
    n: int
    contents: tuple[Content, ...]
    contexts: tuple[str, ...]
    world: tuple[tiny_rows.Row, ...] = ()
    members: Mapping[str, Sequence[int]] = field(default_factory=dict)

    @property
    def own(self) -> Activations:
        """The protocol's own rows."""
        return self.acts[: self.n]


def capture_protocol(
    nla: NLA,
    protocol: Protocol,
    *,
    corpus: str | Path | None = None,
    facts: bool = True,
    fact_rows: int = GATE_ROWS,
    batch_size: int = 64,
) -> ProtocolRows:
    """Choose the rows of a protocol and capture them from the pair's source.

    Args:
        corpus: file of documents, for a protocol that names none.
        facts: also further rows of facts that fewer than `fact_rows` of the protocol's rows have (tiny world only).
        batch_size: documents a forward pass.

    Raises:
        InputError: a corpus where the protocol has its own, none where it needs one, or too few documents in it.
    """
    if protocol.corpus == "tiny":
        if corpus is not None:
            raise InputError(
                f"{protocol.name} has its own documents.", got=f"corpus {corpus}", next_step="use nla-eval-v1"
            )
        return _tiny(nla, protocol, facts=facts, fact_rows=fact_rows, batch_size=batch_size)
    if corpus is None:
        raise InputError(
            f"{protocol.name} needs documents.",
            expected="a local .txt, .jsonl or .parquet file, disjoint from the pair's training data",
            next_step="--corpus FILE (corpus= in Python)",
        )
    return _corpus(nla, protocol, Path(corpus), batch_size=batch_size)


def _corpus(nla: NLA, protocol: Protocol, corpus: Path, *, batch_size: int) -> ProtocolRows:
    tokenizer, max_length = tiny_rows.source_tokenizer(nla)
    selection = select_rows(tokenizer, read_corpus(corpus), protocol, max_length=max_length, corpus=str(corpus))
    lookup = selection.lookup()
    acts = nla.capture(
        list(selection.contents),
        positions=lambda encoded: lookup[encoded.text],
        batch_size=batch_size,
        overflow="truncate",
    )
    return ProtocolRows(
        protocol=protocol,
        corpus=corpus.name,
        dataset=f"{protocol.name} on {corpus.name}",
        acts=acts,
        n=len(acts),
        contents=selection.contents,
        contexts=tuple(_context(selection.texts[d], end) for d, end in zip(acts.document, acts.char_end, strict=True)),
    )


def _tiny(nla: NLA, protocol: Protocol, *, facts: bool, fact_rows: int, batch_size: int) -> ProtocolRows:
    tokenizer, max_length = tiny_rows.source_tokenizer(nla)
    base = tiny_rows.base_rows(tokenizer, protocol, max_length)
    extra, members = tiny_rows.extra_rows(
        tokenizer,
        base,
        tiny_rows.facts_of_world() if facts else (),
        wanted=fact_rows,
        k=protocol.positions,
        min_position=protocol.min_position,
        seed=protocol.seed,
        max_length=max_length,
    )
    rows = (*base, *extra)
    return ProtocolRows(
        protocol=protocol,
        corpus="tiny world, eval split",
        dataset=protocol.name,
        acts=tiny_rows.capture_rows(nla, rows, batch_size=batch_size),
        n=len(base),
        contents=tuple({row.document.text: row.document.content for row in base}.values()),
        contexts=tuple(_context(row.document.text, row.char) for row in base),
        world=rows,
        members=members,
    )


def _context(text: str, end: int) -> str:
    return text[max(0, end - CONTEXT_CHARACTERS) : end]


def explain_rows(
    nla: NLA,
    acts: Activations,
    protocol: Protocol,
    *,
    batch_size: int = 64,
    progress: Progress = quiet,
    what: str = "explanations",
) -> list[Explanation]:
    """One explanation of each row as the protocol draws them, not scored; `what` names them to `progress`."""
    found: list[Explanation] = []
    for begin in range(0, len(acts), BLOCK):
        found += nla.verbalize(
            acts[begin : begin + BLOCK],
            temperature=protocol.temperature,
            max_new_tokens=protocol.max_new_tokens,
            seed=protocol.seed,
            batch_size=batch_size,
        )
        progress(what, len(found), len(acts))
    return found


def probe_members(
    train: tiny_rows.TrainRows, rows: ProtocolRows, *, progress: Progress = quiet
) -> dict[str, list[Hashable]]:
    """For each fact the answers of a probe fitted on `train` at the fact's rows; absent where it could not be fitted."""
    probed: dict[str, list[Hashable]] = {}
    for done, (fact, members) in enumerate(rows.members.items(), start=1):
        answers = probe_answers(*train.having(fact), rows.acts.vectors[list(members)])
        if answers is not None:
            probed[fact] = answers
        progress("probes", done, len(rows.members))
    return probed


def count_statuses(explanations: Sequence[Explanation]) -> dict[str, int]:
    """Rows of each status, in the order of the names."""
    counts: dict[str, int] = {}
    for e in explanations:
        counts[e.status] = counts.get(e.status, 0) + 1
    return dict(sorted(counts.items()))
