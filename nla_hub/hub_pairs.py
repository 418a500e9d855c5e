"""Pairs that anybody has published on the Hub, found by their tags: an AV with the AR that its name leads to."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date

from nla_hub.hub import HubOptions
from nla_hub.hub.search import ListedModel, listed_models
from nla_hub.locate import half_named, sibling_names
from nla_hub.sidecar import Role

LIBRARY = "nla-hub"
"""`library_name` of what this project publishes; the Hub makes a tag of it."""

ROLE_TAGS: dict[Role, str] = {"av": "activation-verbalizer", "ar": "activation-reconstructor"}
"""The tag of a repository that holds a half; one with both halves carries both."""

TAGS = ("nla", *ROLE_TAGS.values(), LIBRARY)
"""What pairs are found by. Of each tag the Hub is asked once."""

_LAYER = re.compile(r"(?<![A-Za-z0-9])L(\d{1,3})(?![A-Za-z0-9])")


@dataclass(frozen=True)
class HubPair:
    """A pair as the Hub lists it, its sidecars not read: `av` and `ar` are the same where one repository seems to hold both,
    and one of them is None where the other half was not found."""

    av: ListedModel | None
    ar: ListedModel | None

    @property
    def model(self) -> ListedModel:
        """The AV's repository, else the AR's."""
        found = self.av or self.ar
        assert found is not None
        return found

    @property
    def base_model(self) -> str | None:
        """owner/name of the source model; None where the cards do not say it, or name several."""
        return self.model.base_models[0] if len(self.model.base_models) == 1 else None

    @property
    def layer(self) -> int | None:
        """K, where the repository's name says it ("-L20-")."""
        found = _LAYER.search(self.model.repo.partition("/")[2])
        return int(found[1]) if found else None

    @property
    def updated(self) -> date | None:
        """Day of the last commit to either half."""
        return max((half.updated for half in (self.av, self.ar) if half and half.updated), default=None)

    def has(self, words: Sequence[str]) -> bool:
        """Whether names, base model, library and licence hold all of these words, in any case."""
        repos = [half.repo for half in (self.av, self.ar) if half]
        text = "\n".join([*repos, *self.model.base_models, self.model.library or "", self.model.licence or ""]).lower()
        return all(word.lower() in text for word in words)


def hub_pairs(
    words: Sequence[str] = (),
    *,
    base_model: str | None = None,
    role: Role | None = None,
    author: str | None = None,
    options: HubOptions,
) -> list[HubPair]:
    """The Hub's pairs, the most downloaded first.

    Args:
        words: all of them must be found, see `HubPair.has`.
        base_model: owner/name, or a part of that.
        role: only pairs whose half of this role was found.
        author: the account that they belong to.

    Raises:
        HubAuthError, HubUnreachableError, HubError: see `listed_models`.
    """
    also = [f"base_model:{base_model}"] if base_model is not None and "/" in base_model else []
    found = paired(listed_models(TAGS, also=also, author=author, options=options))
    if base_model is not None:
        found = [pair for pair in found if any(is_base(base_model, name) for name in pair.model.base_models)]
    return [pair for pair in found if pair.has(words) and (role is None or getattr(pair, role) is not None)]


def is_base(wanted: str, name: str) -> bool:
    """Whether the base model `name` is the one that is asked for, by owner/name or by a part of that, in any case."""
    return wanted.lower() == name.lower() if "/" in wanted else wanted.lower() in name.lower()


def paired(models: Sequence[ListedModel]) -> list[HubPair]:
    """Repositories as pairs, in the order of the AVs; ARs to which no AV leads stand for themselves."""
    halves = {model.repo.lower(): model for model in models if "ar" in _roles(model)}
    pairs, taken = [], set()
    for model in models:
        roles = _roles(model)
        if roles == {"av", "ar"}:
            pairs.append(HubPair(model, model))
            taken.add(model.repo)
        elif roles == {"av"}:
            ar = next((halves[name.lower()] for name in sibling_names(model.repo) if name.lower() in halves), None)
            pairs.append(HubPair(model, ar))
            taken |= {ar.repo} if ar else set()
    lonely = [HubPair(None, model) for model in halves.values() if model.repo not in taken]
    return [*pairs, *lonely]


def _roles(model: ListedModel) -> set[Role]:
    """Which halves a repository holds, by its tags, else by its name; both where neither says."""
    tagged: set[Role] = {role for role, tag in ROLE_TAGS.items() if tag in model.tags}
    if not tagged and (named := half_named(model.repo.partition("/")[2])) is not None:
        return {named}
    return tagged or {"av", "ar"}
