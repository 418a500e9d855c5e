"""Data sets as releases: the explanations of a job, activations, the evaluation set that scores name.

A data set has no default name, and its licence is the caller's word: only he knows under what terms the documents are.
Nothing is copied; files stay where they lie.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from nla_hub.errors import HubUnreachableError, PublishError
from nla_hub.evaluation.protocols import Protocol
from nla_hub.hub import HubOptions
from nla_hub.log import logger
from nla_hub.nla import NLA
from nla_hub.opening import hub_name
from nla_hub.publish.data import activations, evaluation_set, explanations
from nla_hub.publish.data.columns import Against
from nla_hub.publish.data.dataset_cards import activations_card, explanations_card
from nla_hub.publish.facts import Licence, ReleaseFacts
from nla_hub.publish.release import Entry, Release, StagedRepo, release_id
from nla_hub.publish.staging.bundle import CARD_NAME, Wanted
from nla_hub.publish.staging.found import Found
from nla_hub.publish.staging.licences import parsed
from nla_hub.publish.staging.naming import data_name
from nla_hub.training.splits import EVALUATION_NAME

ROW_BYTES, SIDECAR_BYTES, CARD_BYTES = 2000, 1000, 4000
"""Guessed bytes of a row besides its vector, of a sidecar and of a card, where a file is yet to be written."""


def stage_data(found: Found, wanted: Wanted) -> Release:
    """A data set as a release: one repository of kind "dataset", its files where they lie, its card made for it.

    Args:
        found: of kind "explanations" or "activations".
        wanted: `repo` and `licence` are needed; `tag` is `data-ID` where none is named.

    Raises:
        PublishError: no name or licence, an unfinished job, files that must not be published (see `explanations.survey`,
            `activations.survey`); all faults of the data at once.
        RunError: a file of a job that cannot be read.
    """
    repo, licence = data_name(wanted.repo), required_licence(wanted.licence)
    if found.kind == "explanations":
        job = explanations.survey(found.path, Against.here(found.path, repo))
        return _release(
            repo, job.entries(), licence, wanted.tag, lambda tag: explanations_card(repo, tag, licence, job)
        )
    if found.kind == "activations":
        return stage_activations(found.path, repo, licence, wanted.tag)
    raise PublishError(
        "This is no data set.",
        where=found.path,
        got=f"a {found.kind}",
        expected="the output of nla-hub explain --data, or parquet files with the column activation_vector",
    )


def stage_activations(path: Path, repo: str, licence: Licence, tag: str | None = None) -> Release:
    """Files of activations, or an evaluation set, as a release; raises as `stage_data`."""
    facts = activations.survey(path, Against.here(path, repo))
    return _release(repo, facts.entries(), licence, tag, lambda named: activations_card(repo, named, licence, facts))


def stage_evaluation_set(found: Found, facts: ReleaseFacts, options: HubOptions, work: Path | None) -> Release | None:
    """The evaluation set that the cards of a release name, where it is not on the Hub yet: to be published before them.

    Args:
        found: the run (or pair) that is published.
        facts: of the staged release: `evaluation_set` is the data set's name, `evaluation` what was measured on it.
        options: how the Hub is asked, and the base model loaded.
        work: a directory for the file; None writes nothing: its name and guessed size are in `to_be_written`, and there is no
            id.

    Returns:
        None where no set is named, or main of the one that is named holds these rows of this model already.

    Raises:
        PublishError: nothing was measured, the documents are not at hand, or something else lies there.
        HubError, CheckpointError and their children.
    """
    if facts.evaluation_set is None:
        return None
    if facts.evaluation is None:
        raise PublishError(
            "Nothing was measured on these weights, so no evaluation set belongs to them.",
            where=found.path,
            got=f"--evaluation-set {facts.evaluation_set}",
            next_step="leave --evaluation-set out, or push a run whose stage eval is done",
        )
    repo, protocol = data_name(facts.evaluation_set), facts.evaluation.protocol
    corpus = _corpus(found, protocol)
    layer = facts.av.site.layer
    try:
        if evaluation_set.is_published(repo, protocol, base_model=facts.base_model, layer=layer, options=options):
            return None
    except HubUnreachableError:
        if work is not None:
            raise
        logger.info("Whether %s is on the Hub is not known: nobody answers.", repo)
    if work is None:
        return _unwritten(repo, facts, facts.evaluation.n)
    nla = NLA.from_pretrained(
        str(found.av or found.ar),
        ar=None if found.av is None or found.ar is None else str(found.ar),
        base_model=_base(found, facts),
        components=("av",) if found.ar is None else ("ar",) if found.av is None else ("av", "ar"),
        memory="staged",
        token=options.token,
        cache_dir=options.cache_dir,
        local_files_only=options.local_files_only,
    )
    with nla:
        place = evaluation_set.write_evaluation_set(
            nla, protocol, work, corpus=corpus, facts=bool(facts.evaluation.facts), base_model=facts.base_model
        )
    return stage_activations(place, repo, facts.licence)


def _unwritten(repo: str, facts: ReleaseFacts, rows: int) -> Release:
    """An evaluation set that nobody has written yet: what it will hold, with guessed sizes."""
    name = evaluation_set.FILE
    size = rows * (4 * facts.av.d_model + ROW_BYTES)
    sizes = {name: size, activations.sidecar_of(Path(name)).name: SIDECAR_BYTES, CARD_NAME: CARD_BYTES}
    papers = tuple(Entry(paper, content) for paper, content in sorted(facts.licence.files.items()))
    return Release((StagedRepo(repo, "dataset", "data", papers, sizes),), None, "data-new")


def _corpus(found: Found, protocol: Protocol) -> Path | None:
    """The documents of a protocol that has none of its own: a run keeps those that it was measured on."""
    if protocol.corpus is not None:
        return None
    kept = None if found.run is None else found.run / "data" / "checkpoint" / EVALUATION_NAME
    if kept is None or not kept.is_file():
        raise PublishError(
            f"The documents that {protocol.name} was measured on are not here.",
            where=kept or found.path,
            next_step="push the run directory, name an evaluation set that is on the Hub already, or leave "
            "--evaluation-set out",
        )
    return kept


def _base(found: Found, facts: ReleaseFacts) -> str | None:
    """What the vectors are taken from; None where the sidecar says it best."""
    if found.base_model is not None or hub_name(facts.base_model) is None:
        return found.base_model
    return facts.base_model if facts.base_revision is None else f"{facts.base_model}@{facts.base_revision}"


def required_licence(chosen: str | None) -> Licence:
    """The licence that the caller names for his data.

    Raises:
        PublishError: none is named, or none that the Hub knows.
    """
    if chosen is None:
        raise PublishError(
            "Under which licence is this data set?",
            expected="an identifier of the Hub such as cc-by-4.0, odc-by, apache-2.0, or NAME=https://LINK",
            next_step="name it with --licence; explanations and vectors derive from the documents and the models, so it can "
            "allow no more than theirs do",
        )
    return parsed(chosen)


def _release(
    repo: str, entries: Sequence[Entry], licence: Licence, tag: str | None, card: Callable[[str], str]
) -> Release:
    """The id is over the data; the card, which names the tag, comes last."""
    digest = release_id(entries)
    tag = tag or f"data-{digest}"
    papers = {CARD_NAME: card(tag).encode("utf-8"), **licence.files}
    every = [*entries, *(Entry(name, content) for name, content in papers.items())]
    ordered = tuple(sorted(every, key=lambda entry: entry.name))
    return Release((StagedRepo(repo, "dataset", "data", ordered),), digest, tag)
