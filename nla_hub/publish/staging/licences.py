"""Under what a release may be used: found by its base model, with the files that each licence asks for.

The text of Apache 2.0 travels with this package. Meta's licence and policy are taken from where the base model itself lies, and
Gemma's terms are linked to, because they may change. Which licence: what the caller says, the pairs of the zoo, the base's own
README; never a guess.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nla_hub import hub, resources
from nla_hub.errors import HubError, PublishError, did_you_mean
from nla_hub.hub import HubOptions
from nla_hub.locate import Ref
from nla_hub.log import logger
from nla_hub.publish.facts import Licence
from nla_hub.sidecar import base_family
from nla_hub.zoo import zoo

APACHE = "Apache-2.0.txt"
"""In model_cards/licences."""

PAPER = re.compile(r"(?:LICENSE|LICENCE|NOTICE|USE_POLICY|COPYING)(?:[._-][\w.-]*)?", re.IGNORECASE)
"""Files beside weights that say under what they may be used."""

MAX_PAPER = 2**20
"""Bytes; the longest real ones have some ten thousand."""

MADE_HERE = re.compile(r"[^/]+-(?:source|stand-in)")
"""What a run calls a base that it made itself: trained on the grammar that is part of this package, or random."""

_NAMED = re.compile(r"(?P<name>[\w.-]+)=(?P<link>https://\S+)")

GEMMA_TERMS = "https://ai.google.dev/gemma/terms"
GEMMA_POLICY = "https://ai.google.dev/gemma/prohibited_use_policy"

GEMMA_NOTICE = f"""\
Gemma is provided under and subject to the Gemma Terms of Use found at ai.google.dev/gemma/terms

Terms of use: {GEMMA_TERMS}
Prohibited use policy: {GEMMA_POLICY}

The files of this repository were modified: its weights are a model derived from Gemma, trained to describe activations of
{{base}} in words, or to turn such words back into vectors.
"""
"""The first sentence is the one that section 3.1 of the terms asks for, as it does for the last: files were changed."""


@dataclass(frozen=True)
class _Meta:
    """One of Meta's licences: its name in the sentence that it asks for, and what it wants shown."""

    name: str
    notice: str
    first: str = "Llama"

    @property
    def attribution(self) -> str:
        """The content of the NOTICE file that section 1.b.iii asks for."""
        return (
            f"{self.name} is licensed under the {self.name} Community License, Copyright © Meta Platforms, Inc. "
            "All Rights Reserved.\n"
        )


META: Mapping[str, _Meta] = {
    "llama3": _Meta("Meta Llama 3", "Built with Meta Llama 3", "Llama-3"),
    "llama3.1": _Meta("Llama 3.1", "Built with Llama"),
    "llama3.2": _Meta("Llama 3.2", "Built with Llama"),
    "llama3.3": _Meta("Llama 3.3", "Built with Llama"),
    "llama4": _Meta("Llama 4", "Built with Llama"),
}
"""By the names that the Hub has for them."""

BINDING = frozenset({"gemma", *META})
"""Licences that everything made of a model keeps: a caller cannot choose another."""


@dataclass(frozen=True)
class Source:
    """Where licence files may lie: folders here, then the base model.

    Attributes:
        folders: the pair's own, nearest first.
        base: where the base model is; None where nobody knows.
        options: how the Hub is asked.
    """

    folders: tuple[Path, ...] = ()
    base: Ref | None = None
    options: HubOptions = field(default_factory=HubOptions)

    def papers(self) -> Iterator[tuple[str, Mapping[str, bytes]]]:
        """Place in words, and the licence files there by name; the Hub is asked last."""
        folders = [*self.folders]
        if self.base is not None and self.base.is_local:
            folders.append(self.base.fetch(self.options))
        for folder in folders:
            yield str(folder), dict(_papers_of(folder))
        if self.base is not None and self.base.kind == "hub":
            yield f"{self.base} on the Hub", self._of_hub(PAPER)

    def readmes(self) -> Iterator[str]:
        """What the base's author writes about it."""
        if self.base is None:
            return
        found: Mapping[str, bytes] = {}
        if self.base.is_local:
            with suppress(OSError):
                found = {"README.md": (self.base.fetch(self.options) / "README.md").read_bytes()}
        else:
            found = self._of_hub(re.compile(r"README\.md"))
        yield from (text.decode("utf-8", "replace") for text in found.values())

    def _of_hub(self, names: re.Pattern[str]) -> Mapping[str, bytes]:
        assert self.base is not None
        repo, revision = self.base.name, self.base.revision
        listing = hub.listing(repo, revision=revision, options=self.options)
        wanted = [n for n, size in listing.files.items() if names.fullmatch(n) and size <= MAX_PAPER]
        if not wanted:
            return {}
        root = hub.fetch_files(repo, wanted, revision=revision, commit=listing.commit, options=self.options)
        return {name: (root / name).read_bytes() for name in wanted}


def _papers_of(folder: Path) -> Iterator[tuple[str, bytes]]:
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        if PAPER.fullmatch(path.name) and path.is_file() and path.stat().st_size <= MAX_PAPER:
            yield path.name, path.read_bytes()


def licence_of(base_model: str, *, chosen: str | None = None, source: Source | None = None) -> Licence:
    """The licence of everything made of a base model, with its files.

    Args:
        base_model: as sidecars call it.
        chosen: what the caller says: an identifier of the Hub ("apache-2.0", "mit"), or "NAME=https://LINK" for one that the
            Hub does not know.
        source: where files and the base's own words may be found.

    Raises:
        PublishError: nobody says which, the caller says another than the base binds him to, or a file that it asks for is
            not to be had; with where it was looked for.
    """
    source = source or Source()
    known = _by_name(base_model)
    if known is None and (chosen is None or chosen.lower() not in BINDING):
        told = _by_readme(source)
    else:
        told = None
    bound = known or (told.id if told is not None else None)
    if chosen is not None:
        wanted = parsed(chosen)
        if bound in BINDING and wanted.id != bound:
            raise PublishError(
                "The base model's licence binds everything that is made of it.",
                where=base_model,
                got=chosen,
                expected=bound,
                next_step=f"--licence {bound}, or leave it out",
            )
    elif bound is not None:
        wanted = told if told is not None and known is None else Licence(bound)
    else:
        raise PublishError(
            "Nothing says under which licence this may be published.",
            where=base_model,
            next_step="name the base model's: --licence apache-2.0 (or gemma, llama3.3, mit, NAME=https://LINK)",
        )
    return _complete(wanted, base_model, source)


def _by_name(base_model: str) -> str | None:
    """What the zoo knows of a base model; a copy under another owner is the same model."""
    if MADE_HERE.fullmatch(base_model):
        return "apache-2.0"
    family = base_family(base_model)
    return next(
        (entry.licence for entry in zoo().values() if not entry.community and base_family(entry.base) == family), None
    )


def _by_readme(source: Source) -> Licence | None:
    """What the base's README says in its metadata; None where there is none, or nobody answers."""
    from huggingface_hub import RepoCard

    try:
        for text in source.readmes():
            card: Any = RepoCard(text, ignore_metadata_errors=True)
            data: dict[str, Any] = card.data.to_dict()
            found, name, link = (
                value if isinstance(value := data.get(key), str) else None
                for key in ("license", "license_name", "license_link")
            )
            if found is not None and found != "unknown":
                return Licence(found, name, link)
    except HubError as error:
        logger.info("The base model's README was not read: %s", error.one_line())
    return None


def parsed(chosen: str) -> Licence:
    """What a caller calls a licence, without its files: an identifier of the Hub, or "NAME=https://LINK".

    Raises:
        PublishError: neither.
    """
    if named := _NAMED.fullmatch(chosen):
        return Licence("other", named["name"].lower(), named["link"])
    from nla_hub.publish.card.vocabulary import LICENCES  # here: cards are written with this module

    known = LICENCES - {"other", "unknown"}
    if chosen.lower() not in known:
        near = [f"--licence {one}" for one in did_you_mean(chosen, known)]
        raise PublishError(
            "This is no licence that the Hub knows.",
            got=repr(chosen),
            expected="an identifier such as apache-2.0, mit, gemma, llama3.3, or NAME=https://LINK",
            next_step=(f"did you mean {' or '.join(near)}?" if near else "--licence ID")
            + " The identifiers: https://huggingface.co/docs/hub/repositories-licenses",
        )
    return Licence(chosen.lower())


ATTRIBUTIONS: Mapping[str, str] = {
    "HuggingFaceFW/fineweb-edu": "Contains information from FineWeb-Edu (Hugging Face), which is made available under the "
    "Open Data Commons Attribution License (ODC-By) 1.0: https://huggingface.co/datasets/HuggingFaceFW/fineweb-edu",
    "allenai/WildChat-1M": "Contains information from WildChat-1M (Allen Institute for AI), which is made available under the "
    "Open Data Commons Attribution License (ODC-By) 1.0: https://huggingface.co/datasets/allenai/WildChat-1M",
}
"""Data sets of our recipes -> the sentence that section 4.3 of ODC-By 1.0 asks for."""


def attributions(corpora: Iterable[str]) -> tuple[str, ...]:
    """The sentences that data sets (by their Hub names, `hf://datasets/` before it or not) ask whoever uses them to show."""
    names = [corpus.removeprefix("hf://datasets/").partition("@")[0] for corpus in corpora]
    return tuple(ATTRIBUTIONS[name] for name in dict.fromkeys(names) if name in ATTRIBUTIONS)


# -- files ---------------------------------------------------------------------------------------------------


def _complete(licence: Licence, base_model: str, source: Source) -> Licence:
    """The licence with its files and whatever else it asks for."""
    if licence.id == "gemma":
        notice = GEMMA_NOTICE.format(base=base_model).encode()
        return Licence("gemma", link=GEMMA_TERMS, files={"NOTICE": notice})
    if licence.id in META:
        meta = META[licence.id]
        files = _looked_for(licence, source, {"LICENSE": r"LICEN[SC]E.*", "USE_POLICY.md": r"USE_POLICY.*"})
        files = {"LICENSE": files["LICENSE"], "USE_POLICY.md": files["USE_POLICY.md"]}
        return Licence(
            licence.id,
            files={**files, "NOTICE": meta.attribution.encode()},
            notice=meta.notice,
            name_starts_with=meta.first,
        )
    if licence.id == "apache-2.0":
        text = (resources.data_directory("model_cards") / "licences" / APACHE).read_bytes()
        return Licence("apache-2.0", files={"LICENSE": text, **_notices(source)})
    found = _looked_for(licence, source, {"LICENSE": r"(?:LICEN[SC]E|COPYING).*"})
    return Licence(licence.id, licence.name, licence.link, {**found, **_notices(source)})


def _looked_for(licence: Licence, source: Source, wanted: Mapping[str, str]) -> dict[str, bytes]:
    """Files of a repository -> their content, each from the first place that has one of a fitting name."""
    found: dict[str, bytes] = {}
    places: list[str] = []
    try:
        for place, papers in source.papers():
            places.append(f"{place}: {', '.join(papers) or 'no licence files'}")
            for name, pattern in wanted.items():
                fitting = [n for n in papers if re.fullmatch(pattern, n, re.IGNORECASE)]
                if fitting:
                    found.setdefault(name, papers[fitting[0]])
            if len(found) == len(wanted):
                return found
    except HubError as error:
        places.append(error.one_line())
    missing = [name for name in wanted if name not in found]
    raise PublishError(
        f"The licence {licence.name or licence.id} asks for {' and '.join(missing)}, which {_is_are(missing)} not here.",
        where="licence files",
        faults=[f"looked in {place}" for place in places],
        next_step=f"copy {' and '.join(missing)} from the base model's repository into the folder of the AV or above it",
    )


def _is_are(names: Sequence[str]) -> str:
    return "is" if len(names) == 1 else "are"


def _notices(source: Source) -> dict[str, bytes]:
    """NOTICE files of the pair's folders or of a base that lies here, which a licence lets nobody drop."""
    found: dict[str, bytes] = {}
    here = Source(source.folders, source.base if source.base is not None and source.base.is_local else None)
    for _, papers in here.papers():
        for name, content in papers.items():
            if name.upper().startswith("NOTICE"):
                found.setdefault(name, content)
    return found
