"""What the Hub lists: model repositories by their tags, and what a repository is now.

Names, tags and dates come from strangers: only what has the form of such a thing is kept, so nothing of it can move a cursor
or pass for something else.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from datetime import date, datetime
from itertools import islice
from typing import Any

from nla_hub.errors import HubUnreachableError
from nla_hub.hub import HubOptions
from nla_hub.hub.refusals import ask

AT_MOST = 1000
"""Repositories of one listing that are looked at: one page of the Hub."""

QUICK = 4.0
"""Seconds that a notice may take, which nobody asked for."""

REHEARSAL_TAG = "rehearsal"
"""The tag of what only tried whether everything fits together: random weights."""

_MOST_TAGS = 500
_REPO = re.compile(r"\w[\w.-]{0,99}/\w[\w.-]{0,99}", re.ASCII)
_WORD = re.compile(r"[\w.+/:@-]{1,200}", re.ASCII)
_COMMIT = re.compile(r"[0-9a-f]{40}")
_RELATION = re.compile(r"(?:finetune|adapter|quantized|merge):")


@dataclass(frozen=True)
class ListedModel:
    """A model repository as the Hub lists it; None is "not said".

    Attributes:
        repo: owner/name.
        tags: all of its tags that have a tag's form.
        library: the library that its card names.
        licence: as the Hub's metadata spells it.
        base_models: owner/name of what it was made from.
        downloads: of the last thirty days.
        updated: day of its last commit.
        commit: of its main branch.
    """

    repo: str
    tags: frozenset[str] = frozenset()
    library: str | None = None
    licence: str | None = None
    base_models: tuple[str, ...] = ()
    downloads: int | None = None
    updated: date | None = None
    commit: str | None = None
    gated: bool = False
    private: bool = False

    @property
    def owner(self) -> str:
        """The account that it belongs to."""
        return self.repo.partition("/")[0]


def listed_models(
    tags: Sequence[str], *, also: Sequence[str] = (), author: str | None = None, options: HubOptions
) -> list[ListedModel]:
    """Model repositories that carry at least one of `tags`, the most downloaded first, each once; rehearsals are left out.

    Args:
        tags: one question to the Hub each, of whose answer at most `AT_MOST` repositories are read.
        also: tags that they must carry besides.
        author: the account that they must belong to.

    Raises:
        HubAuthError: the token is refused. HubUnreachableError: nobody answers, or nobody may be asked.
        HubError: any other refusal.
    """
    from huggingface_hub import HfApi

    where = "the list of models"
    if _offline(options):
        raise HubUnreachableError(
            "The Hub may not be asked.", where=where, next_step="unset HF_HUB_OFFLINE, with a connection"
        )
    api = HfApi(token=options.token)

    def one(tag: str) -> list[ListedModel]:
        def call() -> list[Any]:
            asked = api.list_models(
                filter=[tag, *also],
                author=author,
                sort="downloads",
                limit=AT_MOST,
                expand=["downloads", "gated", "lastModified", "library_name", "private", "sha", "tags"],
            )
            return list(islice(asked, AT_MOST))

        answers = ask(call, repo=where, revision=None, local_only=False)
        listed = [found for answer in answers if (found := _listed(answer)) is not None]
        return [found for found in listed if REHEARSAL_TAG not in found.tags]

    with ThreadPoolExecutor(max_workers=len(tags)) as pool:
        found = {model.repo: model for models in pool.map(one, tags) for model in models}
    return sorted(found.values(), key=lambda m: (-(m.downloads or 0), m.repo))


def now(repos: Sequence[str], *, options: HubOptions) -> dict[str, ListedModel]:
    """What the main branches of some repositories are now; those that cannot be told within `QUICK` seconds are left out.

    Nothing is raised, and nobody is asked in offline mode.
    """
    from huggingface_hub import HfApi

    if not repos or _offline(options):
        return {}
    api = HfApi(token=options.token)

    def one(repo: str) -> ListedModel | None:
        with suppress(Exception):  # a notice is no reason to fail, nor to wait as `ask` does
            return _listed(api.model_info(repo, timeout=QUICK))
        return None

    with ThreadPoolExecutor(max_workers=8) as pool:
        found = dict(zip(repos, pool.map(one, repos), strict=True))
    return {repo: model for repo, model in found.items() if model is not None}


def _offline(options: HubOptions) -> bool:
    from huggingface_hub import is_offline_mode

    return options.local_files_only or is_offline_mode()


def _listed(answer: Any) -> ListedModel | None:
    """One line of the Hub's list; None where it has no repository's name."""
    repo = getattr(answer, "id", None)
    if not isinstance(repo, str) or not _REPO.fullmatch(repo):
        return None
    said = getattr(answer, "tags", None)
    tags = [t for t in islice(said, _MOST_TAGS) if _is_word(t)] if isinstance(said, list | tuple) else []
    bases = [_RELATION.sub("", tag.removeprefix("base_model:")) for tag in tags if tag.startswith("base_model:")]
    updated, downloads = getattr(answer, "last_modified", None), getattr(answer, "downloads", None)
    library, commit = getattr(answer, "library_name", None), getattr(answer, "sha", None)
    return ListedModel(
        repo,
        frozenset(tags),
        library if _is_word(library) else None,
        next((tag.removeprefix("license:") for tag in tags if tag.startswith("license:")), None),
        tuple(dict.fromkeys(base for base in bases if _REPO.fullmatch(base))),
        downloads if isinstance(downloads, int) and not isinstance(downloads, bool) and downloads >= 0 else None,
        updated.date() if isinstance(updated, datetime) else None,
        commit if isinstance(commit, str) and _COMMIT.fullmatch(commit) else None,
        bool(getattr(answer, "gated", False)),
        bool(getattr(answer, "private", False)),
    )


def _is_word(value: object) -> bool:
    return isinstance(value, str) and _WORD.fullmatch(value) is not None
