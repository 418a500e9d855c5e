"""Steering in the tiny world: does editing a fact in an explanation change what the source says next?

Cases, by rule and before anything is steered: eval-split documents in order; stories cut at the end of the first
question about the fact ("... who?"), couplets right after the first "/" (the rhyme is decided there, and said at the
end of the line). Of these the first `cases` a fact are kept whose *unsteered* greedy continuation names the true value
first; at most ten times as many prompts are tried. The fact is changed to another of its values, chosen by the
document's hash.

Directions, each applied to the last token of the prompt and to every generated token:

    nla     AR(explanation with every occurrence of the value replaced) - AR(explanation). The explanation is the pair's
            own greedy one of the prompt's last token where it names the fact correctly, else the gold label (counted).
    random  a Gaussian vector seeded by the document's hash (only directions count, so its norm is equal by rule)
    means   mean of train-split vectors that hold the new value minus mean of those that hold the old one

A flip is a continuation whose first value of that fact is the new one.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch

from nla_hub.errors import InputError
from nla_hub.evaluation import provenance
from nla_hub.evaluation.controls import gold_label
from nla_hub.evaluation.protocols import choose
from nla_hub.evaluation.stats import wilson
from nla_hub.evaluation.tiny_rows import (
    PROBE_DOCUMENTS,
    Row,
    TrainRows,
    capture_rows,
    encode,
    facts_at,
    named,
    source_tokenizer,
    stream,
    train_rows,
)
from nla_hub.sampling import document_hash
from nla_hub.steering import SteeringVector

if TYPE_CHECKING:
    from nla_hub.nla import NLA
    from nla_hub.tiny import Document

STEERED_FACTS = ("person", "object", "colour", "place", "mood", "rhyme")
STRENGTHS = (0.5, 1.0, 2.0, 4.0)
ANSWER_TOKENS = 4
VERSE_TOKENS = 24
TRIES = 10


@dataclass(frozen=True)
class Case:
    """One prompt: `ids` are the tokens of `row.document.text[:row.char]`, the last of them at `row.position`."""

    fact: str
    row: Row
    ids: tuple[int, ...]
    old: object
    new: object
    new_tokens: int


@dataclass(frozen=True)
class SteeringRow:
    """Flips of one fact by one kind of vector at one strength; low and high: Wilson, 95 %.

    `kept` counts the continuations that still name the old value first; the rest name none or another.
    """

    fact: str
    vector: str
    strength: float
    cases: int
    flips: int
    kept: int
    rate: float | None
    low: float
    high: float


@dataclass(frozen=True)
class SteeringTable:
    """Flip rates with what they come from.

    Attributes:
        looked_at: per fact the prompts tried until enough unsteered continuations named the true value.
        own_explanation: per fact the cases whose explanation is the pair's own; the others use the gold label.
    """

    nla: str
    strengths: tuple[float, ...]
    rows: tuple[SteeringRow, ...]
    looked_at: dict[str, int]
    own_explanation: dict[str, int]
    seed: int
    commit: str | None
    versions: dict[str, str | None]

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready mapping."""
        return {**asdict(self), "strengths": list(self.strengths), "rows": [asdict(row) for row in self.rows]}

    def best(self, fact: str, vector: str = "nla") -> SteeringRow | None:
        """The row of a fact with the highest flip rate."""
        rows = [r for r in self.rows if r.fact == fact and r.vector == vector and r.rate is not None]
        return max(rows, key=lambda r: (r.rate or 0.0, -r.strength), default=None)

    def to_markdown(self) -> str:
        """The table for docs."""
        from nla_hub.evaluation.render import markdown_table, steering_rows

        return markdown_table(*steering_rows(self)) + "\n"


def cut(document: Document, fact: str) -> int | None:
    """Offset at which the document becomes a prompt for `fact`, None where the rule does not apply to it.

    Stories: the end of the first "?" that the value of `fact` directly answers. Couplets, for the rhyme: the end of the
    first "/" at which a rhyme is planned.
    """
    if document.kind == "couplet" and fact == "rhyme":
        at = next((i + 1 for i, c in enumerate(document.text) if c == "/"), None)
        return at if at is not None and "rhyme" in document.facts_at(at) else None
    if document.kind != "story":
        return None
    for mention in document.mentions:
        before = document.text[: mention.start].rstrip()
        if mention.fact == fact and before.endswith("?") and document.facts_at(len(before)).get(fact) == mention.value:
            return len(before)
    return None


def other_value(fact: str, old: object, document: Document) -> object:
    """Another value of `fact`, chosen by the document's hash."""
    from nla_hub.tiny.labels import FACTS

    values = FACTS[fact]
    others = [i for i, value in enumerate(values) if value != old]
    return values[choose(others, 1, seed=0, document=document_hash(document.content) + fact)[0]]


def first_value(fact: str, text: str) -> object:
    """The first value of `fact` that `text` says; None where it says none."""
    from nla_hub.tiny.labels import FACTS

    values = {str(value): value for value in FACTS[fact]}
    return next((values[word] for word in re.findall(r"\w+", text) if word in values), None)


def edited(text: str, old: object, new: object) -> str:
    """`text` with every whole word `old` replaced."""
    return re.sub(rf"\b{re.escape(str(old))}\b", str(new), text)


def find_cases(
    nla: NLA, fact: str, *, cases: int, seed: int = 0, limit: int = 20_000, batch_size: int = 32
) -> tuple[list[Case], int]:
    """The first `cases` cases of a fact in the eval stream of `seed`, and how many prompts were tried for them."""
    tokenizer, max_length = source_tokenizer(nla)
    found: list[Case] = []
    waiting: list[Case] = []
    tried = 0

    def settle() -> None:
        nonlocal tried
        texts = continue_greedily(nla, [c.ids for c in waiting], waiting[0].new_tokens) if waiting else []
        for case, text in zip(waiting, texts, strict=True):
            if len(found) < cases:
                tried += 1
                if first_value(fact, text) == case.old:
                    found.append(case)
        waiting.clear()

    for document in stream(seed, "eval", limit=limit):
        at = cut(document, fact)
        if at is None:
            continue
        encoded = encode(tokenizer, document, max_length)
        stop = next((p for p, (_, end) in enumerate(encoded.offsets) if end == at and not encoded.special[p]), None)
        if stop is None:
            continue
        facts = facts_at(document, at)
        row = Row(document, stop, at, facts)
        budget = VERSE_TOKENS if fact == "rhyme" else ANSWER_TOKENS
        new = other_value(fact, facts[fact], document)
        waiting.append(Case(fact, row, encoded.ids[: stop + 1], facts[fact], new, budget))
        if len(waiting) == batch_size:
            settle()
        if len(found) == cases or tried + len(waiting) >= TRIES * cases:
            break
    settle()
    return found, tried


def steering_table(
    nla: NLA,
    *,
    facts: Sequence[str] = STEERED_FACTS,
    cases: int = 50,
    strengths: Sequence[float] = STRENGTHS,
    seed: int = 0,
    probe_documents: int = PROBE_DOCUMENTS,
    progress: Callable[[str, int, int], None] | None = None,
) -> SteeringTable:
    """Flip rates of each fact, kind of vector and strength; see the module for the rules.

    Raises:
        InputError: an unknown fact, fewer than one case, or a source that is not the tiny world's.
    """
    unknown = set(facts) - set(STEERED_FACTS)
    if unknown or cases < 1:
        raise InputError(
            "Unknown facts, or no cases.", got=f"{sorted(unknown)}, cases={cases}", expected=", ".join(STEERED_FACTS)
        )
    nla.source.loaded.model.eval()  # the complete source, before anything loads only its trunk
    train = train_rows(nla, documents=probe_documents)
    rows: list[SteeringRow] = []
    looked_at: dict[str, int] = {}
    own: dict[str, int] = {}
    for fact in facts:
        chosen, looked_at[fact] = find_cases(nla, fact, cases=cases, seed=seed)
        vectors, own[fact] = _directions(nla, chosen, train)
        total = len(vectors) * len(strengths)
        for done, (kind, strength) in enumerate((k, s) for k in vectors for s in strengths):
            flips = kept = 0
            for case, vector in zip(chosen, vectors[kind], strict=True):
                with vector.apply(nla.source.loaded.model, float(strength), positions="generated"):
                    text = continue_greedily(nla, [case.ids], case.new_tokens)[0]
                said = first_value(fact, text)
                flips += said == case.new
                kept += said == case.old
            n = len(chosen)
            rate = flips / n if n else None
            rows.append(SteeringRow(fact, kind, float(strength), n, flips, kept, rate, *wilson(flips, n)))
            if progress is not None:
                progress(f"steering {fact}", done + 1, total)
    return SteeringTable(
        nla=nla.name,
        strengths=tuple(map(float, strengths)),
        rows=tuple(rows),
        looked_at=looked_at,
        own_explanation=own,
        seed=seed,
        commit=provenance.commit(),
        versions=provenance.versions(),
    )


def _directions(nla: NLA, cases: Sequence[Case], train: TrainRows) -> tuple[dict[str, list[SteeringVector]], int]:
    """Vectors of each kind, one a case, and how many cases use the pair's own explanation."""
    found: dict[str, list[SteeringVector]] = {"nla": [], "random": [], "means": []}
    if not cases:
        return found, 0
    acts = capture_rows(nla, [case.row for case in cases])
    explanations = nla.verbalize(acts, temperature=0.0, batch_size=64)
    held, values = train.having(cases[0].fact)
    own = 0
    for case, explanation in zip(cases, explanations, strict=True):
        text = gold_label(case.row.document, case.row.char)
        if explanation.text is not None and named(explanation.text).get(case.fact) == case.old:
            text = explanation.text
            own += 1
        found["nla"].append(nla.steering_vector(to=edited(text, case.old, case.new), minus=text))
        name = document_hash(case.row.document.content)
        generator = torch.Generator().manual_seed(int(name[:8], 16))
        noise = torch.randn(acts.vectors.shape[1], generator=generator)
        found["random"].append(SteeringVector(noise, nla.site, note="random"))
        means = [held[[i for i, v in enumerate(values) if v == value]] for value in (case.new, case.old)]
        difference = means[0].mean(dim=0) - means[1].mean(dim=0) if all(map(len, means)) else torch.zeros_like(noise)
        found["means"].append(SteeringVector(difference, nla.site, note="difference of means"))
    return found, own


def continue_greedily(nla: NLA, prompts: Sequence[Sequence[int]], new_tokens: int) -> list[str]:
    """Greedy continuations of token sequences by the source, padded on the left."""
    source = nla.source
    pad = source.tokenizer.pad_token_id
    pad = pad if pad is not None else 0
    width = max(map(len, prompts))
    ids = torch.tensor([[pad] * (width - len(p)) + list(p) for p in prompts])
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
    device = next(source.loaded.model.parameters()).device
    with torch.inference_mode():
        out = source.loaded.model.generate(
            input_ids=ids.to(device),
            attention_mask=mask.to(device),
            max_new_tokens=new_tokens,
            do_sample=False,
            pad_token_id=pad,
        )
    texts: list[str] = source.tokenizer.batch_decode(out[:, width:], skip_special_tokens=True)
    return texts
