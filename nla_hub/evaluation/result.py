"""What an evaluation found: JSON-ready, printable, and the figures that gates and cards use."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from nla_hub.errors import InputError
from nla_hub.evaluation.controls import Measure
from nla_hub.evaluation.facts import FactRow
from nla_hub.evaluation.protocols import Protocol
from nla_hub.evaluation.source_check import SourceCheckRow
from nla_hub.geometry import FVE, Baseline, Reference
from nla_hub.sidecar import Score

FORMAT = 1


@dataclass(frozen=True)
class Example:
    """A row shown with a result: the best, the median and the worst by cosine (unusable rows count 0)."""

    choice: str
    doc_id: str | None
    position: int | None
    token: str | None
    context: str
    text: str | None
    raw: str
    status: str
    cosine: float | None
    gold: str | None


@dataclass(frozen=True)
class EvalResult:
    """One protocol run on one pair.

    Attributes:
        nla, revision, base_model, layer: what was measured.
        protocol: exactly how; `corpus` names the documents.
        n, documents: rows and documents.
        real: the pair's explanations. permuted: the same at rows not their own. ceiling: gold labels, floor: labels of
            last and next word only, both through the pair's AR. floor_linear: the two words by ridge regression. The
            last three exist for the tiny world only.
        sampled: the protocol's rows explained at temperature 1, one sample each; None where not asked for.
        sampled_statuses: rows of each status among these; empty where not asked for.
        reference: denominators of every FVE here; None from fewer than 100 rows without a stored one.
        statuses: rows of each status.
        words: mean number of words of usable explanations.
        facts: facts table; empty where the corpus has no known facts.
        source_check: what the source itself holds; empty where not asked for.
        shared_documents: evaluation documents that stand verbatim among the train-split documents looked at
            (`train_documents`); None where not checked.
        examples: see `Example`.
        commit, versions, seeds, wall_seconds: provenance.
    """

    nla: str
    revision: str | None
    base_model: str | None
    layer: int
    protocol: Protocol
    corpus: str
    n: int
    documents: int
    real: Measure
    permuted: Measure | None
    floor: Measure | None
    floor_linear: Measure | None
    ceiling: Measure | None
    reference: Reference | None
    statuses: Mapping[str, int]
    words: float | None
    facts: tuple[FactRow, ...] = ()
    source_check: tuple[SourceCheckRow, ...] = ()
    shared_documents: int | None = None
    train_documents: int | None = None
    examples: tuple[Example, ...] = ()
    sampled: Measure | None = None
    sampled_statuses: Mapping[str, int] = field(default_factory=dict)
    commit: str | None = None
    versions: Mapping[str, str | None] = field(default_factory=dict)
    seeds: Mapping[str, int] = field(default_factory=dict)
    wall_seconds: float | None = None

    @property
    def fve(self) -> FVE:
        """The headline: FVE on raw variance."""
        return self.real.fve

    @property
    def ok(self) -> float:
        """Share of rows with status "ok"."""
        return self.statuses.get("ok", 0) / self.n

    @property
    def ok_sampled(self) -> float | None:
        """Share of rows with status "ok" among those drawn at temperature 1; None where not measured."""
        return self.sampled_statuses.get("ok", 0) / self.n if self.sampled is not None else None

    def score(self, baseline: Baseline = "raw_variance") -> Score | None:
        """The figure as a sidecar stores it; None where it was not measured."""
        fve = self.real.fve if baseline == "raw_variance" else self.real.fve_mean_norm
        if fve.value is None:
            return None
        return Score(fve.value, baseline, fve.dataset, fve.n, self.real.cosine, self.protocol.name, self.commit)

    def fact(self, name: str) -> FactRow | None:
        """The facts table's row of `name`."""
        return next((row for row in self.facts if row.fact == name), None)

    def figures(self) -> dict[str, float | None]:
        """Every figure that a gate can name; None: not measured."""

        def value(measure: Measure | None) -> float | None:
            return None if measure is None else measure.fve.value

        found: dict[str, float | None] = {
            "fve": self.real.fve.value,
            "fve_mean_norm": self.real.fve_mean_norm.value,
            "cosine": self.real.cosine,
            "ok": self.ok,
            "fve_sampled": value(self.sampled),
            "ok_sampled": self.ok_sampled,
            "n": float(self.n),
            "permuted": value(self.permuted),
            "permuted_cosine": None if self.permuted is None else self.permuted.cosine,
            "floor": value(self.floor),
            "floor_linear": value(self.floor_linear),
            "ceiling": value(self.ceiling),
            "words": self.words,
        }
        for row in self.facts:
            for name in ("recall", "precision", "chance", "probe"):
                found[f"{name}.{row.fact}"] = getattr(row, name)
            found[f"share.{row.fact}"] = row.share
            found[f"n.{row.fact}"] = float(row.n)
        for check in self.source_check:
            found[f"source.{check.fact}"] = check.accuracy
            found[f"source_majority.{check.fact}"] = check.majority
        return found

    # -- JSON ------------------------------------------------------------------------------------------------

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready mapping with stable keys."""
        data = asdict(self)
        data["format"] = FORMAT
        for name in ("facts", "source_check", "examples"):
            data[name] = list(data[name])
        for name in ("statuses", "sampled_statuses"):
            data[name] = dict(sorted(data[name].items()))
        return data

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> EvalResult:
        """Read what `to_dict` wrote, also before a result had its sampled figures; an InputError for anything else."""
        values = dict(data)
        if values.pop("format", None) != FORMAT:
            raise InputError("This is no evaluation result.", got=f"format {data.get('format')!r}", expected=FORMAT)
        try:
            values.setdefault("sampled", None)
            for name in ("real", "sampled", "permuted", "floor", "floor_linear", "ceiling"):
                values[name] = None if values[name] is None else Measure.from_dict(values[name])
            values["protocol"] = Protocol(**values["protocol"])
            values["reference"] = None if values["reference"] is None else Reference(**values["reference"])
            values["facts"] = tuple(FactRow(**row) for row in values["facts"])
            values["source_check"] = tuple(SourceCheckRow(**row) for row in values["source_check"])
            values["examples"] = tuple(Example(**row) for row in values["examples"])
            return cls(**values)
        except (KeyError, TypeError) as cause:
            raise InputError(f"This evaluation result is damaged: {cause}") from cause

    def to_markdown(self, *, examples: bool = True) -> str:
        """Tables for cards and docs."""
        from nla_hub.evaluation.render import markdown

        return markdown(self, examples=examples)

    def __str__(self) -> str:
        from nla_hub.evaluation.render import plain

        return plain(self)
