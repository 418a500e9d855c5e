"""Halves of one push: at which revision an AR is opened, and what is said where the halves of two pushes meet.

`nla-hub push` publishes the AR, then the AV, then tags both. Both sidecars carry the release's id and tag, so whoever reads
in between gets the AR of the AV's own release, or is told.
"""

from __future__ import annotations

import re
from dataclasses import replace

from nla_hub.errors import CheckpointError, HubNotFoundError, HubUnreachableError, SidecarError
from nla_hub.library import Library
from nla_hub.locate import Ref
from nla_hub.log import logger
from nla_hub.opening import Half
from nla_hub.sidecar import ReleaseRecord

_TAG = re.compile(r"\w[\w.-]*(/\w[\w.-]*)*", re.ASCII)


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
    """Refuse halves of two pushes. Where only one half says its release, or none does, nothing can be told: the former is
    warned about.

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
            with_, without = ("AR", "AV") if mine is None else ("AV", "AR")
            logger.warning(
                "%s and %s: the %s says of which release it is, the %s does not; they were not published together",
                av.checkpoint.ref,
                ar.checkpoint.ref,
                with_,
                without,
            )
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
        f"({av.checkpoint.ref.name}@TAG), or ask its author to run the same `nla-hub push` again, which completes it",
    )


def _words(release: ReleaseRecord | None) -> str:
    assert release is not None
    return f"release {release.id[:40]!r} (tag {release.tag[:80]!r})"


def _at_tag(av: Half, ar: Half, release: ReleaseRecord) -> str:
    """Where the AR of the AV's release should be, for a person."""
    name = ar.checkpoint.ref.name if ar.checkpoint.ref.kind == "hub" else av.sidecar.pair_repo or "owner/name"
    return f"{name}@{release.tag[:80] if _TAG.fullmatch(release.tag) else 'TAG'}"
