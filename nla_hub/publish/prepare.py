"""From a directory to releases that may go out: found, staged, searched for secrets, verified. The Hub is not written to.

The command and `NLA.push_to_hub` both come through here.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nla_hub.errors import HubAuthError, HubError, HubGatedError, InputError, PublishError
from nla_hub.hub import UPLOAD_BRANCHES, HubOptions
from nla_hub.hub.writing import HubWriter
from nla_hub.publish.check import LocalPair
from nla_hub.publish.data import datasets
from nla_hub.publish.facts import Form, Quantised
from nla_hub.publish.guards import scrub, verify
from nla_hub.publish.plan import Plan, PushOptions, Verify, look, make_plan, unasked_plan
from nla_hub.publish.push import Listener, Pushed, push
from nla_hub.publish.release import Release
from nla_hub.publish.staging import bundle, naming
from nla_hub.publish.staging.bundle import Wanted
from nla_hub.publish.staging.found import EXPORT, Found, find
from nla_hub.weights import shorten

if TYPE_CHECKING:
    from nla_hub.loading import Pair

DATA_KINDS = ("explanations", "activations")
"""Of `Found.kind`: what is a data set."""

ANYBODY = "OWNER"
"""Stands for the account in the plan of a dry run without a token."""


@dataclass(frozen=True)
class Part:
    """One release of a push, how it is published, and the local pair that it is scored beside (None: its own files)."""

    release: Release
    options: PushOptions
    local: LocalPair | None = None


@dataclass(frozen=True)
class Prepared:
    """Everything that one push publishes, in this order, and sentences about what was checked."""

    parts: tuple[Part, ...]
    checked: tuple[str, ...]


def wanted_of(
    repo: str | None = None,
    *,
    single_repo: bool = False,
    form: Form | None = None,
    quantize: Quantised | None = None,
    tag: str | None = None,
    licence: str | None = None,
    base_model: str | None = None,
    steps: bool = False,
    evaluation_set: str | None = None,
    gpu_price: float | None = None,
) -> Wanted:
    """What is to be staged, from the words of the command and of `NLA.push_to_hub`: `base_model` may end in @revision."""
    name, _, revision = (base_model or "").partition("@")
    return Wanted(
        repo=repo,
        owner=None,
        single=single_repo,
        form=form,
        quantise=quantize,
        tag=tag,
        licence=licence,
        base_model=name or None,
        base_revision=revision or None,
        evaluation_set=evaluation_set,
        price_per_gpu_hour=gpu_price,
        steps=steps,
    )


def require_options(options: PushOptions, wanted: Wanted) -> None:
    """Refuse what can be seen to be wrong without looking at any file.

    Raises:
        InputError: ways of publishing that exclude each other. PublishError: no name of a repository.
    """
    for ruled_out, why, next_step in (
        (
            options.create_pr and options.revision,
            "a pull request is for main",
            "leave --revision or --create-pr out",
        ),
        (
            options.create_pr and wanted.steps,
            "steps become tags, and a pull request has none",
            "leave --steps or --create-pr out",
        ),
        (
            options.create_pr and options.collection,
            "only what is published goes into a collection",
            "leave --collection or --create-pr out",
        ),
        (
            (options.revision or "").startswith((UPLOAD_BRANCHES, "refs/")),
            f"branches {UPLOAD_BRANCHES}* and refs/* have other uses",
            "name another branch with --revision, or leave it out for main",
        ),
    ):
        if ruled_out:
            raise InputError(f"This cannot be published so: {why}.", next_step=next_step)
    if wanted.repo is not None:
        naming.data_name(wanted.repo if "/" in wanted.repo else f"{ANYBODY}/{wanted.repo}")


@contextmanager
def prepared(
    found: Found,
    wanted: Wanted,
    options: PushOptions,
    *,
    writer: HubWriter,
    hub: HubOptions,
    work: Path | None = None,
    dry_run: bool = False,
) -> Iterator[Prepared]:
    """What `found` is published as; files that were made for it are there until the context ends.

    Args:
        work: where a temporary directory is made for weights that a form needs and for downloads that are scored; None is
            the system's own place.
        dry_run: write nothing anywhere: such weights are only named.

    Raises:
        PublishError: what must not go out. CheckpointError and its children. HubError and its children.
    """
    require_options(options, wanted)
    with ExitStack() as stack:
        if dry_run:
            place = None
        else:
            place = Path(stack.enter_context(_scratch(work)))
            options = replace(options, place=place)
        if found.kind in DATA_KINDS:
            parts: tuple[Part, ...] = (Part(datasets.stage_data(found, wanted), options),)
        else:
            if wanted.repo is None or "/" not in wanted.repo:
                wanted = replace(wanted, owner=_owner(writer, dry_run=dry_run))
            parts = _staged(found, wanted, options, hub, place)
        checked: list[str] = []
        for part in parts:
            scrub.require_clean(part.release, source=found.path)
            checked += verify.require_whole(part.release)
        yield Prepared(parts, tuple(dict.fromkeys(checked)))


def _scratch(work: Path | None) -> tempfile.TemporaryDirectory[str]:
    """A temporary directory, removed as far as that can be: a thread that is not waited for may still write there."""
    if work is not None:
        work.mkdir(parents=True, exist_ok=True)
    return tempfile.TemporaryDirectory(prefix="nla-hub-push-", dir=work, ignore_cleanup_errors=True)


def _owner(writer: HubWriter, *, dry_run: bool) -> str:
    try:
        return writer.account()
    except HubError:
        if dry_run:
            return ANYBODY
        raise


def _staged(found: Found, wanted: Wanted, options: PushOptions, hub: HubOptions, work: Path | None) -> tuple[Part, ...]:
    """The parts of a pair; a refusal also says what else must not be published from there, all at once."""
    try:
        return tuple(_pair_parts(found, wanted, options, hub, work))
    except PublishError as refusal:
        if not (secrets := scrub.findings(found.path)):
            raise
        faults = [*refusal.faults, *shorten(secrets, at_most=40)]
        raise PublishError(refusal.what, where=refusal.where, faults=faults, next_step=scrub.REVOKE) from refusal


def _pair_parts(
    found: Found, wanted: Wanted, options: PushOptions, hub: HubOptions, work: Path | None
) -> Iterator[Part]:
    """The evaluation set, then the steps, then the pair itself: its card names them."""
    apart = replace(options, collection=None, revision=None, create_pr=False)
    release = bundle.stage(found, wanted, options=hub, work=work)
    if wanted.evaluation_set is not None and release.facts is not None:
        rows = datasets.stage_evaluation_set(found, release.facts, hub, work)
        if rows is not None:
            yield Part(rows, apart)
    for step in bundle.stage_steps(found, wanted, options=hub, work=work) if wanted.steps else ():
        yield Part(step, replace(apart, tag_only=True))
    yield Part(release, options, _as_it_lies(found, wanted, release))


def _as_it_lies(found: Found, wanted: Wanted, release: Release) -> LocalPair | None:
    """The pair as it lies on this machine; None where the release has other weights than that."""
    facts, base = release.facts, found.base_model or wanted.base_model
    if facts is None or facts.form == "merged" or facts.quantised is not None:
        return None
    if facts.form == "lora" and found.factors:
        return LocalPair(found.factors["av"], found.factors["ar"], base)
    return LocalPair(found.av, found.ar, base)


def plans(ready: Prepared, writer: HubWriter, *, dry_run: bool) -> list[Plan]:
    """What is left to do, part by part. A dry run asks the Hub what it can, and goes without where that fails.

    Raises:
        PublishError, HubError and its children: not of a dry run.
    """
    found = []
    for part in ready.parts:
        if not dry_run:
            found.append(make_plan(part.release, part.options, writer))
            continue
        try:
            found.append(look(part.release, part.options, writer))
        except HubError as error:
            plan = unasked_plan(part.release, part.options, error.one_line())
            refused = isinstance(error, HubAuthError | HubGatedError)
            found.append(replace(plan, refusals=(str(error),) if refused else ()))
    return found


def push_parts(
    ready: Prepared, planned: Sequence[Plan], *, writer: HubWriter, hub: HubOptions, listener: Listener | None = None
) -> list[Pushed]:
    """Publish what was planned; see `push.push`."""
    return [
        push(p.release, p.options, writer=writer, hub=hub, listener=listener, local=p.local, plan=plan)
        for p, plan in zip(ready.parts, planned, strict=True)
    ]


def push_found(
    found: Found,
    repo: str | None = None,
    *,
    token: str | bool | None = None,
    private: bool = False,
    create_pr: bool = False,
    revision: str | None = None,
    collection: str | None = None,
    verify: Verify | None = None,
    work: Path | None = None,
    single_repo: bool = False,
    form: Form | None = None,
    quantize: Quantised | None = None,
    tag: str | None = None,
    licence: str | None = None,
    base_model: str | None = None,
    steps: bool = False,
    evaluation_set: str | None = None,
    gpu_price: float | None = None,
) -> Pushed:
    """All of it at once, without a question: what `nla-hub push --yes` does, with its options as keywords.

    Raises:
        PublishError, GateFailedError, InputError; HubError and its children; CheckpointError and its children.
    """
    hub = HubOptions(token=token)
    writer = HubWriter(hub)
    options = PushOptions(private, create_pr, revision, collection, verify, place=work)
    wanted = wanted_of(
        repo,
        single_repo=single_repo,
        form=form,
        quantize=quantize,
        tag=tag,
        licence=licence,
        base_model=base_model,
        steps=steps,
        evaluation_set=evaluation_set,
        gpu_price=gpu_price,
    )
    with prepared(found, wanted, options, writer=writer, hub=hub, work=work) as ready:
        return push_parts(ready, plans(ready, writer, dry_run=False), writer=writer, hub=hub)[-1]


def push_pair(pair: Pair | None, repo: str | None, *, told: bool, **options: Any) -> Pushed:
    """Publish the files that a pair was opened from; `options` are those of `push_found`.

    Args:
        told: whether its contract was told besides its files, which then do not say it.

    Raises:
        InputError: files that are not here, or not all of the pair. See also `push_found`.
    """
    halves = [] if pair is None else [half for half in (pair.av, pair.ar) if half is not None]
    if pair is None or any(not half.checkpoint.ref.is_local for half in halves):
        raise InputError(
            "Only a pair that was loaded from directories of this machine can be published.",
            where=None if pair is None else pair.name,
            next_step="to publish another copy of a pair of the Hub: nla-hub download NAME --to DIR, then nla-hub push DIR",
        )
    if told:
        raise InputError(
            "The contract of this pair was told with sidecar=, and its files do not say it.",
            where=pair.name,
            next_step="write the pair with its contract first: nla-hub convert SRC DST --sidecar FILE",
        )
    found = _found([half.files.directory for half in halves])
    if found.base is None and pair.base is not None and pair.base.kind == "directory":
        found = replace(found, base=Path(pair.base.name))
    return push_found(found, repo, **options)


def _found(halves: Sequence[Path]) -> Found:
    """What the directories of a pair are: the run that exported it, where there is one and it is finished."""
    first = halves[0].absolute()
    if first.parts[-3:-1] == EXPORT.parts:
        try:
            run = find(first.parents[len(EXPORT.parts)])
        except PublishError:
            run = None
        if run is not None and run.kind == "run":
            return run
    return find(first, ar=halves[1] if len(halves) > 1 else None)
