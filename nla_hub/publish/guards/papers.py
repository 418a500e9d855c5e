"""What a release says about itself, held against what it is: names, licence files, cards, sidecars."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from nla_hub import yaml_io
from nla_hub.errors import SidecarError
from nla_hub.publish.card import metadata_faults
from nla_hub.publish.facts import ReleaseFacts
from nla_hub.publish.release import LARGEST_FILE, Entry, Release, RepoKind, StagedRepo
from nla_hub.sidecar import SIDECAR_NAME, Role, Sidecar

CARD_NAME = "README.md"

_ILLEGAL = re.compile(r'[\x00-\x1f\x7f\\:*?"<>|]')
"""Characters that git or a file system of those who download has no place for."""

_LEFTOVER = re.compile(r"\{\{|\{%|%\}|\{#|\{injection|\{explanation|\bTODO\b|\bFIXME\b")
_EMPTY = re.compile(r"(?:^|[|:=(]\s*)(?:None|nan|NaN|inf|null)\s*(?=$|[|),;.])")
"""A figure that nobody filled in: alone in a cell, or behind a colon. The word inside a sentence is a word."""

_LICENCE_TEXT = re.compile(r"(?:LICEN[CS]E|USE_POLICY)[^/]*")
"""Names of files with a licence's own words; a NOTICE may be a line."""

SHORTEST_LICENCE = 100
"""Bytes; the shortest licences in use (0BSD, WTFPL) have some 500. What is shorter is an empty or cut download."""

_WEB_PAGE = re.compile(rb"(?i)\s*(?:\xef\xbb\xbf)?\s*<(?:!doctype|html)\b")

_COMMIT = re.compile(r"[0-9a-f]{40}|sha256:[0-9a-f]{64}")


# -- files -----------------------------------------------------------------------------------------------------


def name_faults(repo: StagedRepo) -> Iterator[str]:
    """Names that the Hub or a file system refuses, files that it does not take, and what must be there."""
    folded: dict[str, str] = {}
    for entry in repo.entries:
        parts = entry.name.split("/")
        legal = all(part and part.strip() == part and part not in (".", "..", ".git") for part in parts)
        if not legal or _ILLEGAL.search(entry.name) or any(len(part.encode()) > 255 for part in parts):
            yield f"{entry.name!r} is no name for a file on the Hub"
        other = folded.setdefault(entry.name.lower(), entry.name)
        if other != entry.name:
            yield f"{entry.name} and {other} are one file where capitals do not count"
        if entry.size > LARGEST_FILE:
            yield f"{entry.name}: {entry.size:,} bytes, and the Hub takes {LARGEST_FILE:,} a file: save it in shards"
    names = [entry.name for entry in repo.entries]
    yield from (f"{name} stands twice" for name in sorted({n for n in names if names.count(n) > 1}))
    if CARD_NAME not in {*names, *repo.to_be_written}:
        yield f"{CARD_NAME} is missing"


def licence_faults(repo: StagedRepo, facts: ReleaseFacts) -> Iterator[str]:
    """Licence files that are missing or changed, and what else a licence asks for."""
    licence = facts.licence
    for name, content in licence.files.items():
        entry = repo.entry(name)
        if entry is None:
            yield f"the licence file {name} is missing; {licence.id} asks for it"
        elif b"".join(entry.chunks()) != content:
            yield f"{name} is not the text that {licence.id} asks for"
    for entry in repo.entries:
        if _LICENCE_TEXT.fullmatch(entry.name.rpartition("/")[2]):
            yield from _licence_text_faults(entry)
    short = repo.name.rpartition("/")[2]
    if licence.name_starts_with and not short.lower().startswith(licence.name_starts_with.lower()):
        yield f"its name must begin with {licence.name_starts_with!r} ({licence.id})"
    if licence.notice and (card := repo.entry(CARD_NAME)) is not None and licence.notice.encode() not in _read(card):
        yield f"{CARD_NAME} does not say {licence.notice!r}, which {licence.id} asks for"


def _licence_text_faults(entry: Entry) -> Iterator[str]:
    """A licence file without a licence in it: nothing, or the page that a server sent in its place."""
    data = _read(entry)
    if len(data.strip()) < SHORTEST_LICENCE:
        yield f"{entry.name} has {len(data.strip())} bytes, too few for the text of a licence; put the whole text there"
    elif _WEB_PAGE.match(data):
        yield f"{entry.name} is a web page; put the text of the licence there"


def card_faults(entry: Entry, kind: RepoKind) -> Iterator[str]:
    """Metadata that the Hub refuses, and places of a template that nobody filled in."""
    try:
        text = _read(entry).decode("utf-8")
    except UnicodeDecodeError:
        yield f"{entry.name} is no text"
        return
    yield from (f"{entry.name}: {fault}" for fault in metadata_faults(text, kind))
    code = False
    for number, line in enumerate(text.splitlines(), start=1):
        if line.lstrip().startswith("```"):
            code = not code
        elif not line.startswith(">"):  # what an AV wrote is quoted
            for pattern in () if code else (_LEFTOVER, _EMPTY):
                if (found := pattern.search(_without_code(line))) is not None:
                    yield f"{entry.name}, line {number}: {found[0].strip()!r} is left over from a template"
        if code and re.search(r"\{\{\s*\w|\{%", line):
            yield f"{entry.name}, line {number}: a template's braces are left over in the snippet"


def _without_code(line: str) -> str:
    """A line of Markdown without what stands in backticks, where a template's own placeholder may be named."""
    return re.sub(r"(`+)(?!`).*?(?<!`)\1(?!`)", "``", line)


def _read(entry: Entry) -> bytes:
    return b"".join(entry.chunks())


# -- sidecars --------------------------------------------------------------------------------------------------


def read_sidecar(entry: Entry | None, role: Role) -> tuple[Sidecar | None, list[str]]:
    """A half's sidecar, and what is wrong with its form: it must be exactly what this project writes."""
    if entry is None:
        return None, [f"{SIDECAR_NAME} is missing"]
    data = _read(entry)
    try:
        raw = yaml_io.loads(data, where=entry.name, error=SidecarError)
        sidecar = Sidecar.parse(raw, where=entry.name)
    except SidecarError as error:
        return None, [f"{entry.name}: {' '.join([error.what, *error.faults])}"]
    faults = []
    if sidecar.role != role:
        faults.append(f"{entry.name}: it says role {sidecar.role!r}, expected {role!r}")
    if raw.get("integrity") != {"sha256": sidecar.integrity()}:
        faults.append(f"{entry.name}: integrity is not the hash of its contents; it was edited by hand")
    elif data != yaml_io.dumps({**sidecar.to_mapping(), "integrity": {"sha256": sidecar.integrity()}}).encode():
        faults.append(f"{entry.name}: it is not in the canonical form that Sidecar.write gives")
    return sidecar, faults


def sidecar_faults(sidecar: Sidecar, release: Release, facts: ReleaseFacts) -> Iterator[str]:
    """What a sidecar says that the release is not, or leaves out."""
    name = f"{SIDECAR_NAME} of the {sidecar.role.upper()}"
    other = facts.names.ar if sidecar.role == "av" else facts.names.av
    if sidecar.pair_repo != other:
        yield f"{name}: pair_repo is {sidecar.pair_repo!r}, expected {other!r}"
    if sidecar.base_model != facts.base_model:
        yield f"{name}: base_checkpoint is {sidecar.base_model!r}, expected {facts.base_model!r}"
    if sidecar.source_revision is not None and not _COMMIT.fullmatch(sidecar.source_revision):
        yield f"{name}: source_revision is {sidecar.source_revision!r}: a branch moves; pin the commit, or leave it out"
    elif facts.base_revision is not None and sidecar.source_revision != facts.base_revision:
        yield f"{name}: source_revision is {sidecar.source_revision!r}, expected {facts.base_revision!r}"
    if release.id is not None:
        told = None if sidecar.release is None else (sidecar.release.id, sidecar.release.tag)
        if told != (release.id, release.tag):
            yield f"{name}: release is {told}, expected {(release.id, release.tag)}"
    wanted = ("av_template", "marker") if sidecar.role == "av" else ("ar_template",)
    yield from (f"{name}: it has no {field}" for field in wanted if getattr(sidecar, field) is None)
    yield from score_faults(sidecar, facts)


def score_faults(sidecar: Sidecar, facts: ReleaseFacts) -> Iterator[str]:
    """A score that is not the measured one, or does not say what it was measured on."""
    name = f"{SIDECAR_NAME} of the {sidecar.role.upper()}"
    if sidecar.fve != facts.score:
        yield f"{name}: fve is {sidecar.fve}, and the cards say {facts.score}"
    if (score := sidecar.fve) is None:
        return
    for key, value in (("baseline", score.baseline), ("dataset", score.dataset), ("n", score.n)):
        if not value:
            yield f"{name}: fve.{key} is missing: a figure without it says nothing"
    if not score.value <= 1:
        yield f"{name}: fve.value is {score.value}, and no FVE is above 1"


def pair_faults(sidecars: Sequence[Sidecar]) -> Iterator[str]:
    """What disagrees between both halves."""
    if len(sidecars) == 2:
        yield from sidecars[0].pair_faults(sidecars[1])
        if sidecars[0].release != sidecars[1].release:
            yield f"release: the halves carry {sidecars[0].release} and {sidecars[1].release}"


def yaml_faults(entry: Entry) -> Iterator[str]:
    """An evaluation result that cannot be read."""
    import yaml

    try:
        found = yaml.safe_load(_read(entry))
    except (yaml.YAMLError, UnicodeDecodeError) as cause:
        yield f"{entry.name} cannot be read: {' '.join(str(cause).split())}"
        return
    if not isinstance(found, (list, dict)) or not found:
        yield f"{entry.name} is empty"
