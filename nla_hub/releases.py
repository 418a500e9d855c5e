"""Halves of one push: at which revision an AR is opened, and what is said where the halves of two pushes meet.

`nla-hub push` publishes the AR, then the AV, then tags both. Both sidecars carry the release's id and tag, so whoever reads
in between gets the AR of the AV's own release, or is told.
"""

from __future__ import annotations

import logging
import re
import warnings
from dataclasses import replace
from typing import TYPE_CHECKING

from nla_hub import hub
from nla_hub.errors import CheckpointError, HubNotFoundError, HubUnreachableError, SidecarError
from nla_hub.layouts import places
from nla_hub.library import Checkpoint, Library
from nla_hub.locate import Ref
from nla_hub.log import logger
from nla_hub.sidecar import ReleaseRecord

if TYPE_CHECKING:
    from nla_hub.opening import Half

_TAG = re.compile(r"\w[\w.-]*(/\w[\w.-]*)*", re.ASCII)
_COMPLETED = "ask its author to run the same `nla-hub push` again, which completes it"


def require_published(checkpoint: Checkpoint) -> None:
    """Refuse a repository that a push has not reached yet. The Hub is asked only where nothing can be a half.

    Raises:
        CheckpointError: a push is under way, or was cut short.
    """
    ref = checkpoint.ref
    if ref.kind != "hub" or checkpoint.cached or places(checkpoint.files):
        return
    branch = hub.pending_push(ref.name, revision=ref.revision, options=checkpoint.options)
    if branch is not None:
        raise CheckpointError(
            "No half of an NLA is published here yet: a push is under way, or was cut short.",
            where=ref,
            got=f"a branch {branch[:80]!r}",
            next_step=f"try again in a few minutes. If it stays so: {_COMPLETED}",
        )


def at_release_of(av: Half | None, ar: Ref, library: Library) -> Ref:
    """Where the AR of an AV's release is: `ar` at the release's tag, or as it is where its repository has no such tag (yet).

    Nobody is asked for an AV without a release, nor for an AR whose revision is known. A cache that noted the tag answers
    for a Hub that cannot be reached.

    Raises:
        HubAuthError, HubGatedError, HubError: the Hub refuses the AR's repository.
    """
    release = None if av is None else av.sidecar.release
    if release is None or ar.kind != "hub" or ar.revision is not None or not _TAG.fullmatch(release.tag):
        return ar
    tagged = replace(ar, revision=release.tag)
    try:
        library.open(tagged)
    except (HubNotFoundError, HubUnreachableError) as refusal:
        logger.debug("%s is opened as it is: %s", ar, refusal.one_line())
        return ar
    return tagged


def require_one_release(av: Half, ar: Half, *, ar_named: bool) -> None:
    """Refuse halves of two pushes. Where only one half says its release, or none does, nothing can be told: of the former
    the caller of `NLA.from_pretrained` is warned.

    Args:
        ar_named: the caller chose the AR.

    Raises:
        SidecarError: the caller chose an AR of another release. CheckpointError: a push is under way, or was cut short.
    """
    mine, theirs = av.sidecar.release, ar.sidecar.release
    if av.checkpoint is ar.checkpoint or mine == theirs:
        return
    if mine is None or theirs is None:
        if not ar_named:
            _tell(_not_together(av, ar))
        return
    if mine.id == theirs.id:
        return
    where = f"{av.checkpoint.ref} and {ar.checkpoint.ref}"
    faults = [f"the {half.role.upper()} is of {_words(half.sidecar.release)}" for half in (av, ar)]
    if ar_named:
        raise SidecarError(
            "These two halves are not a pair: they were published by two different pushes.",
            where=where,
            faults=faults,
            next_step="name no AR, so that the one of the AV's release is taken, or name that one: "
            f'ar="{_at_tag(av, ar, mine)}"',
        )
    if ar.checkpoint.ref.is_local:
        raise CheckpointError(
            "The AV and the AR here were published by two different pushes.",
            where=where,
            faults=faults,
            next_step="fetch both again: nla-hub download NAME --to DIR",
        )
    raise CheckpointError(
        "The AV and the AR were published by two different pushes: one is under way, or was cut short.",
        where=where,
        faults=faults,
        next_step="try again in a few minutes. If it stays so: name an earlier state of the AV by its tag "
        f"({av.checkpoint.ref.name}@TAG), or {_COMPLETED}",
    )


def _not_together(av: Half, ar: Half) -> str:
    """What is said of two halves of which one has a release."""
    with_, without = (ar, av) if av.sidecar.release is None else (av, ar)
    ref = ar.checkpoint.ref
    # A push publishes the AR first.
    wait = "try again in a few minutes, in case a push is under way; else " if with_ is ar and ref.kind == "hub" else ""
    name = f"{ref.name}@REVISION" if ref.kind == "hub" else "./path"
    return (
        f"{av.checkpoint.ref} and {ref}: the {with_.role.upper()} is of {_words(with_.sidecar.release)}, the "
        f"{without.role.upper()} names no release, so they were not published together and may not fit. "
        f'Next: {wait}name the AR that belongs to the AV (ar="{name}"), or ask the author to push both again'
    )


def _tell(text: str) -> None:
    """A warning, once: on the package's log where somebody shows that (the command line does), else as Python's own."""
    if all(isinstance(handler, logging.NullHandler) for handler in logger.handlers):
        # The line that is shown is that of the call of `NLA.from_pretrained`: below it open_pair, require_one_release, this.
        warnings.warn(text, UserWarning, stacklevel=5)
    else:
        logger.warning("%s", text)


def _words(release: ReleaseRecord | None) -> str:
    assert release is not None
    return f"release {release.id[:40]!r} (tag {release.tag[:80]!r})"


def _at_tag(av: Half, ar: Half, release: ReleaseRecord) -> str:
    """Where the AR of the AV's release should be, for a person."""
    name = ar.checkpoint.ref.name if ar.checkpoint.ref.kind == "hub" else av.sidecar.pair_repo or "owner/name"
    return f"{name}@{release.tag[:80] if _TAG.fullmatch(release.tag) else 'TAG'}"
