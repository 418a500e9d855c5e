"""What a run directory says about the pair that it made, as far as others may know it: nothing of the machine but its kind.

Only read, never written, and without torch where nothing was evaluated. What a run of an older version did not record is None.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nla_hub import yaml_io
from nla_hub.errors import InputError, NLAError, RunError
from nla_hub.locate import parse_name
from nla_hub.training.run import MACHINE, StageDirectory, step_pairs
from nla_hub.training.stages import STAGES
from nla_hub.training.view.records import RunRecord, StageRecord, figure, mapping_of, mappings_of, read_run, text_of

if TYPE_CHECKING:
    from nla_hub.evaluation import EvalResult
    from nla_hub.publish.facts import Effort, RecipeFacts
    from nla_hub.sidecar import Score

COMMIT = re.compile(r"[0-9a-f]{40}")
"""A commit of the Hub; what else a run calls a revision (a digest of weights, a branch) names nothing that others can fetch."""

LOCAL_FILE, LOCAL_DIRECTORY, ADDRESS, PRIVATE = "a local file", "a local directory", "an address", "not shown"
"""What stands in a published configuration for documents, models, servers and keys that are nobody else's business."""

_LOCAL = re.compile(r"\s*(?:[/~\\]|\.{1,2}(?:[/\\]|$)|[A-Za-z]:[/\\]|(?i:file):)")
_ADDRESS = re.compile(r"\s*(?:(?!hf://)[A-Za-z][A-Za-z0-9+.-]*://|[\w.-]+:\d{2,5}(?:/|$))")
_SECRET = re.compile(r"(?i)(?:^|[_-])(?:key|secret|password|auth|authorization|credentials?|headers?)(?:[_-]|$)|token$")
_WORDS = frozenset({"summary", "prompts", "template", "forbidden"})
"""Settings that are texts for people or models: they may begin like a path."""


@dataclass(frozen=True)
class RunFacts:
    """What is known of a run.

    Attributes:
        run: its directory.
        recipe, effort: see `RecipeFacts` and `Effort`.
        evaluation: of the finished pair; None: not measured.
        pair: directory of the finished pair; None where the stage `export` is not done.
        base_model: Hub name of the model that is explained; None where the run made it, or read it from a directory.
        base_revision: its commit; None where none is known.
        base_made_here: whether the run trained it.
        corpora_commits: data set of the Hub -> the commit that was read.
        steps: "step-000400" -> directory of the pair after so many steps of reinforcement learning (`rl.export_every`).
        versions: package -> version that the last stage ran with; {} where none was recorded.
        measured_weights: role -> file -> sha256 of the weights that `evaluation` is of; {} where none was recorded.
        rehearsal: whether sizes were cut, so that the weights are worth nothing.
        unfinished: a sentence for each stage that is not done.
    """

    run: Path
    recipe: RecipeFacts
    effort: Effort
    evaluation: EvalResult | None
    pair: Path | None
    base_model: str | None
    base_revision: str | None
    base_made_here: bool
    corpora_commits: Mapping[str, str]
    steps: Mapping[str, Path]
    versions: Mapping[str, str]
    measured_weights: Mapping[str, Mapping[str, str]]
    rehearsal: bool
    unfinished: tuple[str, ...]

    @property
    def score(self) -> Score | None:
        """FVE on raw variance of the finished pair; None: not measured."""
        return None if self.evaluation is None else self.evaluation.score()

    @property
    def score_mean_norm(self) -> Score | None:
        """The same by the other denominator."""
        return None if self.evaluation is None else self.evaluation.score("mean_norm")


def run_facts(run: Path) -> RunFacts:
    """Read the directory of a run.

    Raises:
        RunError: it is none, or files of it are damaged or missing; all of them at once.
    """
    return _Reader(run, read_run(run)).facts()


class _Reader:
    """Collects faults instead of stopping at the first."""

    def __init__(self, run: Path, record: RunRecord) -> None:
        self.run, self.record = run, record
        self.faults: list[str] = []

    def facts(self) -> RunFacts:
        from nla_hub.publish.facts import RecipeFacts

        record = self.record
        for stage in record.stages.values():
            if stage.state == "done" and not stage.summary:
                self.faults.append(f"{stage.name}/DONE: it cannot be read")
        name = text_of(record.config, "name")
        if name is None:
            self.faults.append("config.yaml: name is missing")
        base_model, base_revision, made_here = self._base()
        pair, evaluation = self._pair(), self._evaluation()
        commits = self.corpora
        if self.faults:
            raise RunError(
                "This run directory is damaged.",
                where=self.run,
                faults=self.faults,
                next_step="restore these files, or run nla-hub train again with the same settings in another place",
            )
        return RunFacts(
            run=self.run,
            recipe=RecipeFacts(
                name=name or "",
                hash=record.digest,
                resolved=public_config(record.config, frozenset(self._hub_parts)),
                corpora=tuple(commits),
                labels=labels_in_words(mapping_of(record.config, "labels"), record.stages["data"].summary),
            ),
            effort=_effort(record),
            evaluation=evaluation,
            pair=pair,
            base_model=base_model,
            base_revision=base_revision,
            base_made_here=made_here,
            corpora_commits={data: commit for data, commit in commits.items() if commit is not None},
            steps=step_pairs(StageDirectory(self.run / "rl")),
            versions=_versions(record),
            measured_weights=mapping_of(record.stages["eval"].summary, "weights"),
            rehearsal=record.rehearsal,
            unfinished=tuple(_unfinished(record)),
        )

    def _base(self) -> tuple[str | None, str | None, bool]:
        told, found = mapping_of(self.record.config, "base"), self.record.stages["source"].summary
        model = text_of(told, "model")
        if model is None:
            self.faults.append("config.yaml: base.model is missing")
            return None, None, False
        if told.get("train") is not None or told.get("stand_in") is not None:
            return None, None, True
        if not is_on_the_hub(model):
            return None, None, False
        name, _, pinned = model.partition("@")
        revisions = (text_of(found, "revision"), text_of(told, "revision"), pinned)
        return name, next((r for r in revisions if r and COMMIT.fullmatch(r)), None), False

    def _pair(self) -> Path | None:
        export = self.record.stages["export"]
        if export.state != "done":
            return None
        place = StageDirectory(self.run / "export").checkpoint
        missing = [half for half in ("av", "ar") if not (place / half).is_dir()]
        self.faults += [f"export/checkpoint/{half}: it is not there" for half in missing]
        return place

    def _evaluation(self) -> EvalResult | None:
        if self.record.stages["eval"].state != "done":
            return None
        if self.record.result is None:
            self.faults.append("eval/result.json: it is not there, or cannot be read")
            return None
        from nla_hub.evaluation import EvalResult

        try:
            return EvalResult.from_dict(self.record.result)
        except InputError as error:
            self.faults.append(f"eval/result.json: {error.what}")
            return None

    @cached_property
    def _hub_parts(self) -> dict[str, dict[str, Any]]:
        """Parts of the mixture that were read from the Hub, as the recipe spells them, with what they were then."""
        sidecars = sorted(StageDirectory(self.run / "data").checkpoint.glob("*.parquet.nla_meta.yaml"))
        if not sidecars:
            return {}
        try:
            meta = yaml_io.read(sidecars[0], error=RunError)
        except NLAError as error:
            self.faults.append(f"data/checkpoint/{sidecars[0].name}: {error.what}")
            return {}
        parts = {text_of(part, "data"): mapping_of(part, "identity") for part in mappings_of(meta, "mix")}
        return {data: found for data, found in parts.items() if data and text_of(found, "repository")}

    @cached_property
    def corpora(self) -> dict[str, str | None]:
        """Data sets of the Hub by their names, with the commits that were read."""
        return {found["repository"]: text_of(found, "commit") for found in self._hub_parts.values()}


# -- the recipe ----------------------------------------------------------------------------------------------


def is_on_the_hub(name: str) -> bool:
    """Whether a name is that of a repository on the Hub."""
    try:
        return parse_name(name).kind == "hub"
    except InputError:
        return False


def public_config(config: Mapping[str, Any], hub_data: frozenset[str] = frozenset()) -> dict[str, Any]:
    """A recipe as it may be shown: without paths, addresses and keys, for which words stand.

    Args:
        config: as a run directory has it.
        hub_data: those of its `data.mix` that are data sets of the Hub; the others are local.
    """
    found: dict[str, Any] = _public(dict(config))
    mixed = mappings_of(mapping_of(config, "data"), "mix")
    if mixed:
        found["data"]["mix"] = [
            {**_public(part), "data": part.get("data") if part.get("data") in hub_data else LOCAL_FILE}
            for part in mixed
        ]
    return found


def _public(value: Any, key: str = "") -> Any:
    if key in _WORDS or value is None or isinstance(value, (bool, int, float)):
        return value
    if _SECRET.search(key):
        return PRIVATE
    if isinstance(value, Mapping):
        return {str(name): _public(item, str(name)) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_public(item, key) for item in value]
    if not isinstance(value, str):
        return value
    if _LOCAL.match(value):
        return LOCAL_DIRECTORY
    return ADDRESS if _ADDRESS.match(value) else value


def labels_in_words(labels: Mapping[str, Any], data: Mapping[str, Any]) -> str | None:
    """Who wrote the explanations that the warm start learned from; None where the recipe does not say.

    Args:
        labels: the recipe's section. data: the summary of the stage `data`.
    """
    labeler, settings = text_of(labels, "labeler"), mapping_of(labels, "settings")
    if labeler is None:
        return None
    model = _public(text_of(settings, "model"))
    named = {
        "tiny": "the tiny world's documents themselves, whose facts are known",
        "source": "the explained model itself, asked about its own reading",
        "nla": f"an existing pair ({_public(text_of(settings, 'nla'))})",
        "openai": f"the model {model}, behind a chat endpoint",
        "anthropic": f"the model {model}, through Anthropic's message batches",
    }.get(labeler, f"the labeler {labeler!r} of a plug-in")
    figures = mapping_of(data, "labels")
    used, wanted = figure(figures, "labels"), figure(figures, "labels_wanted")
    if used is None or wanted is None:
        return named
    return f"{named}; {used:,.0f} of {wanted:,.0f} were usable"


# -- effort --------------------------------------------------------------------------------------------------


def _effort(record: RunRecord) -> Effort:
    """Wall seconds of all stages; processes where all stages had as many, devices where every stage says on what it ran."""
    from nla_hub.publish.facts import Effort

    seconds = {name: value for name, stage in record.stages.items() if (value := _seconds(stage)) is not None}
    machines = [_machine(record.stages[name]) for name in seconds]
    processes = {figure(machine, "processes") for machine in machines}
    count = processes.pop() if len(processes) == 1 else None
    devices = [machine.get("devices") for machine in machines]
    named = sorted({str(device) for found in devices for device in found or ()})
    return Effort(
        stage_seconds=seconds,
        processes=None if count is None else int(count),
        device=", ".join(named) if named and all(devices) else None,
    )


def _seconds(stage: StageRecord) -> float | None:
    """Wall seconds of a stage; earlier attempts count up to the checkpoint that was continued from, where its lines tell."""
    known = (stage.seconds, stage.metrics.latest("seconds"))
    return max((value for value in known if value is not None), default=None)


def _machine(stage: StageRecord) -> dict[str, Any]:
    """What a stage's DONE says about where it ran."""
    return mapping_of(stage.summary, MACHINE)


def _versions(record: RunRecord) -> dict[str, str]:
    for name in reversed(STAGES):
        if found := mapping_of(_machine(record.stages[name]), "versions"):
            return {package: version for package, version in found.items() if isinstance(version, str)}
    return {}


def _unfinished(record: RunRecord) -> Iterator[str]:
    for name, stage in record.stages.items():
        if stage.state == "done" or (name == "rl" and not record.has_rl):
            continue
        step, steps = figure(stage.metrics.last, "step"), figure(stage.metrics.last, "steps")
        if stage.state == "not begun":
            yield f"The stage {name!r} has not begun."
        elif step is None:
            yield f"The stage {name!r} is not done."
        else:
            yield f"The stage {name!r} is not done: it came to step {step:.0f}{'' if steps is None else f' of {steps:.0f}'}."
