"""The card of one repository of a pair: everything on the page that is not front matter.

A `Page` holds what is known, of a release or of a recipe that nobody has run; what is None reads "not measured", "not known" or
"not pinned", never a guess.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from nla_hub import yaml_io
from nla_hub.evaluation import EvalResult
from nla_hub.evaluation.render import NOT_MEASURED, number
from nla_hub.publish.card import scores
from nla_hub.publish.card.contract import Contract
from nla_hub.publish.card.metadata import model_metadata, relation
from nla_hub.publish.card.snippets import base_note, base_option, unpacked_by, with_nla_hub, with_transformers
from nla_hub.publish.card.templates import card, render
from nla_hub.publish.card.text import CONTEXT_CHARACTERS, SAMPLE_CHARACTERS, code, fenced, inline, table, visible
from nla_hub.publish.facts import Effort, Form, Licence, Quantised, RecipeFacts, ReleaseFacts, ReleaseNames
from nla_hub.publish.release import RepoRole
from nla_hub.publish.staging.licences import META
from nla_hub.sidecar import Role, Score

NOT_KNOWN = "not known"

SAME = 1e-4
"""Two scores that differ by less are one figure: a release states four decimals."""

GATED = frozenset({"gemma", *META})
"""Licences whose base models' repositories on the Hub ask for consent."""

HALF_NAMES: Mapping[Role, str] = {"av": "activation verbalizer (AV)", "ar": "activation reconstructor (AR)"}


@dataclass(frozen=True)
class Page:
    """What a card is made of; fields as in `ReleaseFacts`.

    Attributes:
        planned: name of the recipe, where nothing was trained; then `release_id` is None.
        published: what others say about a pair of theirs, in Markdown.
        comment: how the page is made again, for pages of this repository.
    """

    role: RepoRole
    names: ReleaseNames
    contract: Contract
    licence: Licence
    release_id: str | None = None
    form: Form = "full"
    quantised: Quantised | None = None
    score: Score | None = None
    score_mean_norm: Score | None = None
    evaluation: EvalResult | None = None
    evaluation_set: str | None = None
    recipe: RecipeFacts | None = None
    effort: Effort | None = None
    steps: tuple[str, ...] = ()
    parity: Mapping[str, float] = field(default_factory=dict)
    attribution: tuple[str, ...] = ()
    rehearsal: bool = False
    price_per_gpu_hour: float | None = None
    planned: str | None = None
    published: str | None = None
    comment: str | None = None

    @classmethod
    def of(cls, facts: ReleaseFacts, role: RepoRole) -> Page:
        """The page of a release's repository."""
        return cls(
            role=role,
            names=facts.names,
            contract=Contract.of(facts),
            licence=facts.licence,
            release_id=facts.release_id,
            form=facts.form,
            quantised=facts.quantised,
            score=facts.score,
            score_mean_norm=facts.score_mean_norm,
            evaluation=facts.evaluation,
            evaluation_set=facts.evaluation_set,
            recipe=facts.recipe,
            effort=facts.effort,
            steps=facts.steps,
            parity=facts.parity,
            attribution=facts.attribution,
            rehearsal=facts.rehearsal,
            price_per_gpu_hour=facts.price_per_gpu_hour,
        )

    @property
    def repo(self) -> str:
        """The repository that the page stands in."""
        return self.names.ar if self.role == "ar" else self.names.av

    @property
    def halves(self) -> tuple[Role, ...]:
        """What the repository holds."""
        return ("av", "ar") if self.role == "pair" else ("ar",) if self.role == "ar" else ("av",)

    def markdown(self) -> str:
        """The complete README.md."""
        metadata = model_metadata(
            self.role,
            licence=self.licence,
            base_model=self.contract.base_model,
            form=self.form,
            quantised=self.quantised,
            corpora=() if self.recipe is None else self.recipe.corpora,
            rehearsal=self.rehearsal,
        )
        body = render(
            "model.md",
            comment=self.comment,
            title=self.repo.partition("/")[2] or self.repo,
            licence=self.licence,
            rehearsal=self.rehearsal,
            planned=self.planned,
            what=self._what(),
            chat=_chat(self.halves),
            contract=table(("", ""), self.contract.rows()),
            av_prompt=_prompt(self.contract.av_template),
            ar_prompt=_prompt(self.contract.ar_template),
            nla_hub=with_nla_hub(self.contract, self.names, self.role),
            transformers=self._transformers(),
            usage_notes=self._usage_notes(),
            headline=scores.figure(self.score),
            headline_mean_norm=None if self.score_mean_norm is None else scores.figure(self.score_mean_norm),
            made=self._made(),
            provenance=scores.where_from(self.evaluation, self.score),
            evaluation_set=self.evaluation_set,
            not_own=self._not_own(),
            measures=scores.measure_rows(self.evaluation, self.score, self.score_mean_norm),
            facts=scores.facts_table(self.evaluation),
            parity=self._parity(),
            form_word=self.quantised or self.form,
            published=self.published,
            verify=self._verify(),
            verify_note=None if self.contract.base_model is None else base_note(self.contract.base_model),
            samples=scores.samples(self.evaluation),
            context_characters=CONTEXT_CHARACTERS,
            sample_characters=SAMPLE_CHARACTERS,
            training=self._training(),
            resolved=None if self.recipe is None else _yaml(self.recipe),
            data=self._data(),
            versions=self._versions(),
            licence_text=self._licence(),
        )
        return card("model", metadata, body)

    # -- what it is ------------------------------------------------------------------------------------------

    def _what(self) -> str:
        base = "any model with an adapter" if self.contract.base_model is None else code(self.contract.base_model)
        where = "its residual stream" if self.contract.site is None else f"layer {self.contract.site.layer} of {base}"
        if self.role == "pair":
            return f"Both halves of a Natural Language Autoencoder for {where}: the AV in the folder `av/`, the AR in `ar/`."
        (half,) = self.halves
        other = "ar" if half == "av" else "av"
        name = code(self.names.ar if half == "av" else self.names.av)
        what = f"The {HALF_NAMES[half]} of a Natural Language Autoencoder for {where}."
        return f"{what} The other half, the {other.upper()}: {name}."

    def _transformers(self) -> list[tuple[str, str]]:
        if self.planned is not None:
            return []
        found = [(half.upper(), self._alone(half)) for half in self.halves]
        return [(f"The {name}", block) for name, block in found if block is not None]

    def _alone(self, half: Role) -> str | None:
        return with_transformers(self.contract, self.names, half, self.form, self.quantised)

    def _usage_notes(self) -> list[str]:
        notes = []
        if self.licence.id in GATED:
            notes.append("The base model's repository asks each reader to accept its terms first.")
        if self.planned is None and len(self._transformers()) < len(self.halves):
            notes.append(
                "There is no short way with transformers alone: `nla-hub convert` merges the factors into complete weights."
            )
        if self.quantised is not None:
            needed = code(unpacked_by(self.quantised))
            notes.append(f"The weights are packed ({self.quantised}): {needed} has to be installed to load them.")
        return notes

    # -- figures ---------------------------------------------------------------------------------------------

    def _made(self) -> str | None:
        """Where the score comes from, unless the evaluation that is shown says it."""
        if self.score is None or (self.evaluation is not None and self._not_own() is None):
            return None
        return scores.made(self.score)

    def _not_own(self) -> str | None:
        """Why the tables are not about these weights, where they are not."""
        if self.evaluation is None:
            return None
        measured = self.evaluation.score()
        if self.score is not None and measured is not None and abs(measured.value - self.score.value) < SAME:
            return None
        change = "packed" if self.quantised else "brought into this form"
        return (
            f"The tables below and the samples were measured on the run's own weights, before they were {change}; the line at "
            "the top is what was measured on the published ones."
        )

    def _parity(self) -> str | None:
        if not self.parity:
            return None
        return table(("figure", "value"), [(inline(name), f"{value:.3g}") for name, value in self.parity.items()])

    def _verify(self) -> str:
        protocol = None if self.score is None else self.score.protocol
        if protocol is None and self.evaluation is not None:
            protocol = self.evaluation.protocol.name
        name = (protocol or "nla-eval-v1").partition("+")[0]
        corpus = "" if name.startswith("tiny") else " --corpus DOCUMENTS.jsonl"
        base = "" if self.contract.base_model is None else base_option(self.contract.base_model)
        return f"pip install nla-hub\nnla-hub eval {self.names.av}@{self.names.tag} --protocol {name}{corpus}{base}"

    # -- how it was made -------------------------------------------------------------------------------------

    def _training(self) -> str:
        if self.recipe is None:
            return (
                f"Recipe, stages, GPU hours and cost: {NOT_KNOWN}, as this was published from a directory, not a run."
            )
        rows = [
            ("recipe", f"{code(self.recipe.name)}, hash {code(self.recipe.hash)}"),
            ("labels of the warm start", NOT_KNOWN if self.recipe.labels is None else inline(self.recipe.labels)),
        ]
        effort = self.effort
        rows += [
            ("machine", self._machine()),
            ("GPU hours", _hours(effort)),
            ("cost", _cost(effort, self.price_per_gpu_hour)),
        ]
        parts = [table(("", ""), rows)]
        if effort is not None and effort.stage_seconds:
            stages = [(inline(stage), f"{seconds:,.0f}") for stage, seconds in effort.stage_seconds.items()]
            parts.append(table(("stage", "wall seconds"), stages))
        return "\n\n".join(parts)

    def _machine(self) -> str:
        if self.effort is None or self.effort.device is None:
            return NOT_KNOWN
        count = "" if self.effort.processes is None else f"{self.effort.processes} x "
        return f"{count}{inline(self.effort.device)}"

    def _data(self) -> str:
        corpora = () if self.recipe is None else self.recipe.corpora
        lines = [f"- {code(name)}" for name in corpora]
        if lines:
            text = "\n".join(["Documents come from:", "", *lines])
        else:
            text = self._local_data()
        return "\n\n".join([text, *(inline(sentence) for sentence in self.attribution)])

    def _local_data(self) -> str:
        """Where documents come from, where no data set of the Hub is among them."""
        data = None if self.recipe is None else self.recipe.resolved.get("data")
        told = data if isinstance(data, Mapping) else {}
        if told.get("corpus"):
            return f"Documents: the corpus {code(str(told['corpus']))} of the recipe above, no data set of the Hub."
        if told.get("mix"):
            return "Documents: files of whoever ran the recipe above, no data set of the Hub."
        return f"What documents it learned from: {NOT_KNOWN}."

    # -- form, licence ---------------------------------------------------------------------------------------

    def _versions(self) -> str:
        release = "not released" if self.release_id is None else f"{code(self.release_id)}, the same in both halves"
        rows = [
            ("form", _FORMS[self.form].format(base=code(self.contract.base_model or NOT_KNOWN))),
            ("packed", self._packed()),
            ("relation to the base model", relation(self.form, self.quantised)),
            ("release", release),
            ("tag", code(self.names.tag)),
        ]
        if self.steps:
            steps = ", ".join(code(step) for step in self.steps)
            rows.append(("earlier steps of reinforcement learning", f"{steps} (tags)"))
        return table(("", ""), rows)

    def _packed(self) -> str:
        if self.quantised is None:
            return "no"
        own = NOT_MEASURED if self.score is None else "above, measured on these weights"
        return f"{self.quantised}; its own score: {own}"

    def _licence(self) -> str:
        licence = self.licence
        link = "" if licence.link is None else f", {_link(licence.link)}"
        lines = [f"{code(licence.name or licence.id)}{link}."]
        if licence.notice:
            lines.append(f"**{licence.notice}**")
        files = [code(name) for name in sorted(licence.files)]
        if files:
            lines.append(f"Files in this repository: {', '.join(files)}.")
        lines.append("These weights are derived from the base model, whose terms they keep.")
        return "\n\n".join(lines)


_FORMS: Mapping[Form, str] = {
    "full": "complete weights",
    "lora": "LoRA factors, to be put on {base} at the revision above; an AR's value head is complete",
    "merged": "complete weights: LoRA factors merged into {base}",
}


def _chat(halves: tuple[Role, ...]) -> str:
    if halves == ("ar",):
        return "it writes nothing. It has no language-model head."
    return "it was trained to answer one prompt, with a vector in it, and to nothing else."


def _prompt(template: str | None) -> str:
    return NOT_KNOWN if template is None else fenced(visible(template))  # its own line ends, and no others


def _yaml(recipe: RecipeFacts) -> str:
    return fenced(visible(yaml_io.dumps(recipe.resolved)).strip(), "yaml")


def _link(target: str) -> str:
    """An address that a reader may follow, or the name of a file."""
    return f"<{target}>" if re.fullmatch(r"https?://[^\s<>]+", target) else code(target)


def _hours(effort: Effort | None) -> str:
    if effort is None:
        return NOT_KNOWN
    if effort.device == "cpu":
        return "none (trained on a CPU)"
    return NOT_KNOWN if effort.gpu_hours is None else number(effort.gpu_hours, 1)


def _cost(effort: Effort | None, price: float | None) -> str:
    hours = None if effort is None else effort.gpu_hours
    if hours is None or price is None:
        return NOT_KNOWN
    return f"{hours * price:,.2f} US dollars at {price:g} an hour"
