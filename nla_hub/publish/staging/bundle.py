"""A pair that was found -> a release: every file of every repository, in place or made for the occasion.

Weights are not copied. Sidecars, cards, evaluation results and licences are bytes. The same input gives the same bytes, so a
push that was cut off is staged again and goes on.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from nla_hub import hub
from nla_hub.errors import HubError, PublishError
from nla_hub.hub import HubOptions
from nla_hub.loading import ar_prompt
from nla_hub.locate import Ref, parse_name, zoo_ref
from nla_hub.log import logger
from nla_hub.opening import hub_name
from nla_hub.prompts import AVPrompt
from nla_hub.publish import card
from nla_hub.publish.facts import Effort, Form, Licence, Quantised, ReleaseFacts, ReleaseNames
from nla_hub.publish.release import Entry, Release, RepoRole, StagedRepo, release_id
from nla_hub.publish.staging import licences, naming
from nla_hub.publish.staging.forms import ROLES, Prepared, prepare
from nla_hub.publish.staging.found import Found
from nla_hub.publish.staging.half_files import GENERATION, generation_config, half_entries
from nla_hub.publish.staging.measured import dtypes_of, evaluated, rounded, values_of
from nla_hub.publish.staging.publishable import lies_in, require_publishable
from nla_hub.publish.staging.run_facts import RunFacts, run_facts
from nla_hub.sidecar import (
    SIDECAR_NAME,
    ReferenceRecord,
    ReleaseRecord,
    Role,
    Score,
    Sidecar,
)
from nla_hub.zoo import zoo

COMMIT = re.compile(r"[0-9a-f]{40}")
TAG = re.compile(r"\w[\w.-]*(?:/\w[\w.-]*)*", re.ASCII)
NOT_YET = "new"
"""Stands for the release id where weights are still to be written."""

CARD_NAME = "README.md"


@dataclass(frozen=True)
class Wanted:
    """What the caller wants of a release.

    Attributes:
        repo: OWNER/NAME; None takes the name that the rule gives, of `owner`.
        owner: the account or organisation.
        single: both halves in one repository.
        form, quantise: see `forms.prepare`.
        tag: what the revision is called; None: `nla-` and the release id.
        licence: see `licences.licence_of`.
        base_model: Hub name of the base model, where the sidecars do not say it.
        base_revision: its commit, or a branch or tag that the Hub is asked about.
        evaluation_set: Hub name of the published evaluation set.
        price_per_gpu_hour: in US dollars.
        steps: publish what a run kept of its reinforcement-learning steps, too.
        measure: run the evaluation protocol again on a form whose weights are new.
    """

    repo: str | None = None
    owner: str | None = None
    single: bool = False
    form: Form | None = None
    quantise: Quantised | None = None
    tag: str | None = None
    licence: str | None = None
    base_model: str | None = None
    base_revision: str | None = None
    evaluation_set: str | None = None
    price_per_gpu_hour: float | None = None
    steps: bool = True
    measure: bool = True


def stage(found: Found, wanted: Wanted, *, options: HubOptions, work: Path | None) -> Release:
    """The release of a pair.

    Args:
        found: from `found.find`.
        work: an empty directory for weights that must be written; None writes nothing: `StagedRepo.to_be_written` then says
            what would be, and the release has no id.

    Raises:
        PublishError: everything that must not go out as it is, all at once.
        GateFailedError: a packed pair that no longer reads its own vectors. MissingExtraError: packing needs a package.
        CheckpointError and its children, HubError and its children: the pair cannot be believed, or not be had.
    """
    return _staged(found, wanted, _run_facts(found), tuple(_steps(found, wanted)), options, work)


def stage_steps(found: Found, wanted: Wanted, *, options: HubOptions, work: Path | None) -> list[Release]:
    """The reinforcement-learning steps that a run kept: releases of the same repositories, each with its step as its tag.

    They are published by their tags alone, and have no score. Raises as `stage`.
    """
    steps = _steps(found, wanted)
    run = _run_facts(found) if steps else None
    told = None if run is None else replace(run, evaluation=None, effort=Effort({}, None, None))  # the whole run's
    return [
        _staged(
            replace(found, path=place, av=place / "av", ar=place / "ar", kind="pair", steps={}),
            replace(wanted, tag=tag, form=None, measure=False),
            told,
            (),
            options,
            None if work is None else work / tag,
        )
        for tag, place in steps.items()
    ]


def _steps(found: Found, wanted: Wanted) -> Mapping[str, Path]:
    """The steps that are published with a release; a run merges them when it keeps them, so factors have none."""
    return {} if not wanted.steps or wanted.form == "lora" else found.steps


def _run_facts(found: Found) -> RunFacts | None:
    return None if found.run is None else run_facts(found.run)


def _staged(
    found: Found,
    wanted: Wanted,
    run: RunFacts | None,
    steps: tuple[str, ...],
    options: HubOptions,
    work: Path | None,
) -> Release:
    if wanted.tag is not None and not TAG.fullmatch(wanted.tag):
        raise PublishError(
            "This is no name for a tag.", got=repr(wanted.tag), expected="letters, digits, '.', '_', '-'"
        )
    making = partial(prepare, found, wanted.form, wanted.quantise, base=_base(found, wanted), options=options)
    prepared = making(work=None)  # whatever can be refused is refused before weights are written
    av, ar = prepared.half("av"), prepared.half("ar")
    AVPrompt.build(av.tokenizer, av.sidecar)
    ar_prompt(ar)
    base_model = _base_name(wanted, prepared)
    require_publishable(found, prepared, base_model)
    licence = licences.licence_of(
        base_model,
        chosen=wanted.licence,
        source=licences.Source(_folders(found), _licensor(prepared, base_model), options),
    )
    names = _names(wanted, prepared, base_model, licence)
    revision = _revision(wanted, prepared, base_model, options)
    if prepared.to_be_written and work is not None:
        prepared = making(work=work)
    entries = {role: _entries(prepared, role, base_model) for role in ROLES}
    id = release_id([e for role in ROLES for e in entries[role]]) if not prepared.to_be_written else None
    tag = wanted.tag or f"nla-{id or NOT_YET}"
    evaluation = evaluated(found, prepared, entries, base_model, run, measure=wanted.measure and work is not None)
    facts = ReleaseFacts(
        names=ReleaseNames(names.av, names.ar, tag),
        release_id=id or NOT_YET,
        base_model=base_model,
        base_revision=revision,
        n_layers=int(av.config.get_text_config().num_hidden_layers),
        family=av.adapter.name,
        av=prepared.half("av").sidecar,
        ar=prepared.half("ar").sidecar,
        licence=licence,
        form=prepared.form,
        quantised=prepared.quantised,
        dtypes=dtypes_of(prepared),
        parameters=values_of(prepared),
        score=_score(prepared) if evaluation is None else rounded(evaluation.score()),
        score_mean_norm=None if evaluation is None else rounded(evaluation.score("mean_norm")),
        evaluation=evaluation,
        evaluation_set=wanted.evaluation_set,
        recipe=None if run is None else run.recipe,
        effort=None if run is None else run.effort,
        steps=steps,
        parity=prepared.parity,
        attribution=() if run is None else licences.attributions(run.recipe.corpora),
        rehearsal=run is not None and run.rehearsal,
        price_per_gpu_hour=wanted.price_per_gpu_hour,
    )
    facts = replace(facts, av=_sidecar(facts, "av"), ar=_sidecar(facts, "ar"))
    return Release(_repos(entries, facts, prepared.to_be_written), id, tag, facts)


# -- what it is made from --------------------------------------------------------------------------------------


def _base(found: Found, wanted: Wanted) -> Ref | None:
    """Where the base model is, as far as the place or the caller says it."""
    if found.base is not None:
        return Ref("directory", str(found.base))
    return None if wanted.base_model is None else parse_name(wanted.base_model)


def _base_name(wanted: Wanted, prepared: Prepared) -> str:
    """What the release calls its base model."""
    name = wanted.base_model or prepared.half("av").sidecar.base_model or prepared.half("ar").sidecar.base_model
    if name is None:
        raise PublishError(
            "Nothing says which model's vectors this pair explains.",
            where=prepared.pair.name,
            next_step="name it: --base-model OWNER/NAME",
        )
    return _known_as(name.partition("@")[0])


def _known_as(name: str) -> str:
    """What the packaged pair calls a base model that travels inside this package: a place in it is nothing to others."""
    packaged = next((entry for entry in zoo().values() if entry.packaged and entry.base == name), None)
    if packaged is None:
        return name
    return Sidecar.read(zoo_ref(packaged.av).fetch(HubOptions())).base_model or name


def _licensor(prepared: Prepared, base_model: str) -> Ref | None:
    return prepared.pair.base if prepared.pair.base is not None else hub_name(base_model)


def _folders(found: Found) -> tuple[Path, ...]:
    """Where licence files may lie, nearest first: the halves' folders, what holds them, the run."""
    av, ar = found.require_pair()
    above = [] if av.parent != ar.parent or not lies_in(av, found.path) else [av.parent]
    return tuple(dict.fromkeys([av, ar, *above, found.path.absolute()]))


def _revision(wanted: Wanted, prepared: Prepared, base_model: str, options: HubOptions) -> str | None:
    """The base model's commit, as the caller or the sidecars say it (a run writes it there); None where nobody does.

    A branch or tag is resolved on the Hub. What main is today is not asked: it need not be what the pair was made on.
    """
    named = wanted.base_revision or (parse_name(wanted.base_model).revision if wanted.base_model else None)
    told = [prepared.half(role).sidecar.source_revision for role in ROLES]
    for revision in dict.fromkeys([named, *told]):
        if revision is None or revision.startswith("sha256:"):
            continue
        if COMMIT.fullmatch(revision):
            return revision
        if hub_name(base_model) is None:
            continue
        try:
            return hub.listing(base_model, revision=revision, options=options).commit
        except HubError as error:
            if revision == named:
                raise
            logger.info("The base model's revision %r is not known: %s", revision, error.one_line())
    return None


def _score(prepared: Prepared) -> Score | None:
    """The score in the sidecars, where it was measured on these weights."""
    if prepared.changed:
        return None
    return next((fve for role in ROLES if (fve := prepared.half(role).sidecar.fve) is not None), None)


def _names(wanted: Wanted, prepared: Prepared, base_model: str, licence: Licence) -> naming.RepoNames:
    if wanted.repo is not None:
        return naming.chosen_names(wanted.repo, wanted.owner, licence, single=wanted.single)
    if wanted.owner is None:
        raise PublishError("Nobody says under whose name this is published.", next_step="name it: --repo OWNER/NAME")
    return naming.default_names(
        wanted.owner,
        base_model,
        prepared.half("av").sidecar.site,
        licence,
        form=prepared.form,
        quantised=prepared.quantised,
        single=wanted.single,
    )


# -- what it becomes -------------------------------------------------------------------------------------------


def _entries(prepared: Prepared, role: Role, base_model: str) -> list[Entry]:
    """What is loaded of a half, each name with the half's folder in front."""
    half = prepared.half(role)
    tokenizer = Path(half.tokenizer.name_or_path)
    found = half_entries(half.files.directory, half.place.form, role, tokenizer=tokenizer, base=base_model)
    if role == "av" and all(entry.name != GENERATION for entry in found) and half.place.form == "model":
        found.append(Entry(GENERATION, generation_config(half.config)))
    left = prepared.to_be_written.get(role, {})
    return [entry.called(f"{role}/{entry.name}") for entry in found if not (left and entry.name.startswith("model"))]


def _sidecar(facts: ReleaseFacts, role: Role) -> Sidecar:
    """A half's sidecar as it is published."""
    sidecar = facts.av if role == "av" else facts.ar
    measured = None if facts.evaluation is None else facts.evaluation.reference
    reference = None if measured is None else ReferenceRecord(**vars(measured))
    return sidecar.with_(
        fve_reference=sidecar.fve_reference or reference,
        base_model=facts.base_model,
        source_revision=facts.base_revision or sidecar.source_revision,
        pair_repo=facts.names.ar if role == "av" else facts.names.av,
        fve=facts.score,
        release=None if facts.release_id == NOT_YET else ReleaseRecord(facts.release_id, facts.names.tag),
    )


def _repos(
    entries: Mapping[Role, Sequence[Entry]], facts: ReleaseFacts, left: Mapping[Role, Mapping[str, int]]
) -> tuple[StagedRepo, ...]:
    """The AR before the AV that points to it, or one repository with both in folders."""
    whole: dict[Role, list[Entry]] = {
        role: [
            *entries[role],
            Entry(f"{role}/{SIDECAR_NAME}", (facts.av if role == "av" else facts.ar).text().encode()),
        ]
        for role in ROLES
    }
    if facts.names.single:
        both = [entry for role in ROLES for entry in whole[role]]
        unwritten = {f"{role}/{name}": size for role, files in left.items() for name, size in files.items()}
        return (_repo(facts.names.av, "pair", [*both, *_papers(facts, "pair")], unwritten),)
    names: dict[Role, str] = {"ar": facts.names.ar, "av": facts.names.av}
    return tuple(
        _repo(
            name,
            role,
            [*(entry.called(entry.name.removeprefix(f"{role}/")) for entry in whole[role]), *_papers(facts, role)],
            left.get(role, {}),
        )
        for role, name in names.items()
    )


def _repo(name: str, role: RepoRole, entries: Sequence[Entry], left: Mapping[str, int]) -> StagedRepo:
    return StagedRepo(name, "model", role, tuple(sorted(entries, key=lambda e: e.name)), dict(left))


def _papers(facts: ReleaseFacts, role: RepoRole) -> list[Entry]:
    """Card, evaluation results and licence files of a repository."""
    papers = {
        CARD_NAME: card.model_card(facts, role).encode(),
        **card.eval_results(facts, role),
        **facts.licence.files,
    }
    return [Entry(name, content) for name, content in papers.items()]
