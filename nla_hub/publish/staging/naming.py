"""What the repositories of a release are called.

The rule is that of the released pairs: `nla-qwen2.5-7b-L20-av`, `nla-gemma3-12b-L32-ar`; under a licence that wants its own
name first, `Llama-3.3-70B-NLA-L53-av`. The half stands last, so that each half's name leads to the other's.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from nla_hub.errors import PublishError
from nla_hub.publish.facts import Form, Licence, Quantised
from nla_hub.sidecar import Site

CHAT_WORDS = frozenset({"instruct", "it", "chat", "hf"})
"""Parts of a base model's name that are left out: released pairs are named for the model, not for its tuning."""

MADE_HERE = "-source"
"""How the name ends that a run gives to a base it trained itself."""

OWN_PREFIXES = ("meta-",)
"""What stands before a family's word in some of its names (`Meta-Llama-3-8B`)."""

LONGEST = 96
"""Characters of `owner/name` that the Hub takes."""


@dataclass(frozen=True)
class RepoNames:
    """`owner/name` of both halves; the same where they share one repository."""

    av: str
    ar: str


def short_name(base_model: str) -> str:
    """What a base model is called inside a repository's name: `Qwen/Qwen2.5-7B-Instruct` -> `qwen2.5-7b`.

    A family's word and a version behind it are one word: `gemma-3-12b-it` -> `gemma3-12b`.
    """
    words = _words(base_model).lower()
    return re.sub(r"^([a-z]+)-(\d+(?:\.\d+)?)(?=-|$)", r"\1\2", words)


def _words(base_model: str) -> str:
    name = base_model.partition("@")[0].rstrip("/").rpartition("/")[2].removesuffix(MADE_HERE)
    parts = [part for part in re.split(r"[^A-Za-z0-9._]+", name) if part]
    kept = [part for part in parts if part.lower() not in CHAT_WORDS] or parts
    return "-".join(part.strip("._-") for part in kept if part.strip("._-"))


def stem(
    base_model: str, site: Site, *, form: Form = "full", quantised: Quantised | None = None, first: str | None = None
) -> str:
    """The name without owner and half.

    Args:
        form, quantised: a variant says what it is (`-lora`, `-fp8`, `-nf4`); merged factors are complete weights.
        first: what the licence wants it to begin with (`Licence.name_starts_with`).

    Raises:
        PublishError: nothing is left of the base model's name.
    """
    variant = "".join(f"-{word}" for word in ("lora" if form == "lora" else None, quantised) if word)
    if not short_name(base_model):
        raise PublishError(
            "No name can be made of the base model's.", got=repr(base_model), next_step="name it: --repo OWNER/NAME"
        )
    if first is None:
        return f"nla-{short_name(base_model)}-{site}{variant}"
    name = _words(base_model)
    for prefix in OWN_PREFIXES:
        if name.lower().startswith(f"{prefix}{first.lower()}"):
            name = name[len(prefix) :]
    return f"{required(name, first)}-NLA-{site}{variant}"


def required(name: str, first: str) -> str:
    """A name that begins with `first`, spelled so."""
    return first + name[len(first) :] if name.lower().startswith(first.lower()) else f"{first}-{name}"


def default_names(
    owner: str,
    base_model: str,
    site: Site,
    licence: Licence,
    *,
    form: Form = "full",
    quantised: Quantised | None = None,
    single: bool = False,
) -> RepoNames:
    """The names that a pair gets where the caller names none.

    Raises:
        PublishError: one that the Hub does not take.
    """
    name = stem(base_model, site, form=form, quantised=quantised, first=licence.name_starts_with)
    return _checked(f"{owner}/{name}", single)


def chosen_names(repo: str, owner: str | None, licence: Licence, *, single: bool = False) -> RepoNames:
    """The names of a pair whose caller names it: `OWNER/NAME-av` and `OWNER/NAME-ar`, or `OWNER/NAME` for both.

    `NAME-av` and `NAME-ar` mean `NAME`; a NAME alone is the `owner`'s.

    Raises:
        PublishError: one that the Hub does not take, or that the base's licence does not allow.
    """
    if "/" not in repo and owner is not None:
        repo = f"{owner}/{repo}"
    if not single:
        repo = re.sub(r"-a[vr]$", "", repo)
    namespace, slash, name = repo.partition("/")
    first = licence.name_starts_with
    if slash and first is not None and not name.startswith(first):
        raise PublishError(
            f"The licence of the base model ({licence.id}) wants a name that begins with {first!r}.",
            got=repr(repo),
            next_step=f"--repo {namespace}/{required(name, first)}",
        )
    return _checked(repo, single)


def data_name(repo: str | None) -> str:
    """The name of a data set, which its caller has to give.

    Raises:
        PublishError: none, or one that the Hub does not take.
    """
    if repo is None:
        raise PublishError("A data set has no name of its own.", next_step="name it: --repo OWNER/NAME")
    return _require(repo, "")


def _checked(repo: str, single: bool) -> RepoNames:
    endings = ("", "") if single else ("-av", "-ar")
    return RepoNames(*(_require(repo, ending) for ending in endings))


def _require(repo: str, ending: str) -> str:
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]  # there, but not in its `__all__`

    name = f"{repo}{ending}"
    try:
        if name.count("/") != 1:
            raise HFValidationError("an owner and a name are expected, with one slash between them")
        validate_repo_id(name)
        if name.endswith(".git") or any(not part or part[0] in "-." or part[-1] in "-." for part in name.split("/")):
            raise HFValidationError("owner and name begin and end with a letter, a digit or an underscore")
    except HFValidationError as cause:
        raise PublishError(
            f"The Hub takes no repository of this name: {cause}".rstrip("."),
            got=repr(name)[: 2 * LONGEST],
            expected="OWNER/NAME of letters, digits, '-', '_' and '.', at most 96 characters",
            next_step="name another: --repo OWNER/NAME",
        ) from cause
    return name
