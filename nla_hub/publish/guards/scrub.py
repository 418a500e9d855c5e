"""Nothing secret leaves the machine: every file of a release, and what lies around it, is searched before anything is sent.

Three rings. What is sent is searched for everything. What lies below the place that is published, sent or not, is searched too:
it was put there by somebody, and the next release may send it. What a run writes about itself names this machine by its nature,
and is searched for access tokens only.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath

from nla_hub.errors import PublishError, WeightsError
from nla_hub.publish.guards import secrets, this_machine
from nla_hub.publish.guards.content import (
    OTHER_WEIGHTS,
    PICKLE_SUFFIXES,
    Rules,
    code_in,
    head_of,
    is_executable,
    secrets_of,
)
from nla_hub.publish.guards.secret_forms import EMAILS, PATHS, RUN_IDS, TOKENS, Rule
from nla_hub.publish.release import Entry, Release, RepoKind
from nla_hub.training.run import LABELS, STATE
from nla_hub.training.stages import STAGES
from nla_hub.weights import inside, shorten

_LINK = "a link"

SUFFIXES = (
    *(".json", ".yaml", ".yml", ".md", ".txt", ".jinja", ".model", ".tiktoken", ".safetensors", ".png", ".svg"),
)
DATA_SUFFIXES = (".parquet", ".jsonl", ".csv", ".html")
"""Of a data set besides."""

_ENDS = frozenset(
    (
        *SUFFIXES,
        *DATA_SUFFIXES,
        *OTHER_WEIGHTS,
        *PICKLE_SUFFIXES,
        ".index",
        ".log",
        ".gz",
        ".zip",
        ".py",
        ".sh",
        ".ipynb",
    )
)
"""Ends of names that are no domain of an e-mail address: `mean@L20.json`."""

LICENCES = re.compile(r"(?:LICEN[CS]E|NOTICE|USE_POLICY|COPYING|ATTRIBUTION)[^/]*")
"""Names of licence texts; the addresses in them are their authors' own."""

HIDDEN = re.compile(r"\.gitattributes|\.eval_results/[\w.-]+\.yaml")
"""Hidden files that the Hub knows."""

NEVER_SENT = (".git", "__pycache__")
"""Folders that nothing is ever published of, and that are not looked into."""

_CONFIGURATIONS = r"(?:adapter_|generation_|tokenizer_)?config\.json|ar_meta\.json|(?:[\w.-]+\.)?nla_meta\.yaml"
_REWRITTEN = re.compile(_CONFIGURATIONS)
"""Files that are published in a form of their own; as they lie they may name this machine."""

_STAGE = "(?:" + "|".join(STAGES) + ")"
_WRITTEN_BY_RUN = re.compile(
    rf"config\.yaml|report\.html|\.lock|{LABELS}/(?:rank-\d+/)?[^/]+\.sqlite[\w-]*|tensorboard/.*tfevents.*"
    rf"|(?P<state>{_STAGE}/{STATE}/.*)"
    rf"|{_STAGE}/(?:config\.yaml|DONE|result\.json|[\w-]+\.jsonl)"
    rf"|{_STAGE}/(?:.*/)?(?:{_CONFIGURATIONS}|tokenizer\.json|vocab\.\w+|merges\.txt|special_tokens_map\.json"
    r"|added_tokens\.json|chat_template\.jinja|[\w.-]+\.safetensors(?:\.index\.json)?)"
    r"|(?P<documents>data/(?:.*/)?[\w.-]+\.(?:parquet|jsonl))|data/(?:.*/)?gathered\.json"
)
"""Paths below a run directory that training writes (`training.run`, `export`, `training.data_stage`)."""

_WRITTEN_BY_JOB = re.compile(
    r"job\.yaml|manifest\.json|report\.html|\.lock.*|(?:parts|vectors)/[\w.-]+\.parquet|work/.*"
)
"""Paths below an explanation job's directory that the job writes (`explain.schema`)."""

REVOKE = "take them out or move the files away, then run the same command again; revoke a token that stood in a file"


def require_clean(release: Release, *, source: Path) -> None:
    """Raise a PublishError with everything in a release, and around it, that must not be published.

    Args:
        release: as it is staged.
        source: the directory or file that is published: a run, a pair, a data set.

    Raises:
        PublishError: file, line and column of each: access tokens (also the account's own, compared by value), paths of
            people's directories and of this machine, e-mail addresses outside licence texts, host and user name, ids of
            trackers' runs, also in the names of files; notebooks with outputs, pickles; of what is sent also code,
            programs, hidden and unknown files, and links that lead elsewhere. No secret is repeated in the message.
    """
    rules = own_rules(source=source, public=_public_names(release), vocabularies=_vocabularies(release))
    in_names = (*rules.tokens, *EMAILS)
    faults: list[str] = []
    sent: set[Path] = set()
    for repo in release.repos:
        for entry in repo.entries:
            named = [*_name_faults(entry.name, rules.all)]
            found = [*named, *nature_faults(entry, repo.kind, source)]
            if not any(fault.startswith(_LINK) for fault in found):  # what it leads to is nobody's business
                found += _content_faults(entry, _rules_for(entry, repo.kind, rules))
            shown = secrets.mask(_place(entry), in_names) if named else _place(entry)
            faults += [f"{shown}, {fault}" for fault in shorten(found)]
            if isinstance(entry.content, Path):
                sent.add(entry.content.resolve())
    is_data = all(repo.kind == "dataset" for repo in release.repos)
    for place in _places(release, source):
        faults += _lying_around(place, sent, rules, data=is_data)
    if faults:
        raise PublishError(
            f"This must not be published: {len(faults)} findings.",
            where=source,
            faults=shorten(faults, at_most=60),
            next_step=REVOKE,
        )


def findings(source: Path) -> list[str]:
    """The same of a directory that cannot be staged: what lies there, with file and line."""
    return [*_lying_around(source, set(), own_rules(source=source), data=False)]


def _lying_around(place: Path, sent: set[Path], rules: Rules, *, data: bool) -> Iterator[str]:
    in_names = (*rules.tokens, *EMAILS)
    writer = _writer(place)
    for entry in _around(place, sent):
        named = [*_name_faults(entry.name, in_names)]
        found = [*named, *_bystander_faults(entry, writer, rules, data=data)]
        shown = secrets.mask(entry.name, in_names) if named else entry.name
        yield from (f"{place / shown}, {fault}" for fault in shorten(found))


def mask(text: str) -> str:
    """A text with "[token]", "[e-mail]", "[path]" or "[run id]" in the place of such things, for samples on cards."""
    return secrets.mask(text)


def own_rules(*, source: Path, public: Sequence[str] = (), vocabularies: Sequence[bytes] = ()) -> Rules:
    """All that is searched for on this machine.

    Args:
        source: what is published.
        public: names that the release is called by; see `this_machine.own_names`.
        vocabularies: contents of tokenizers; see there.
    """
    places = this_machine.own_places([source])
    names = this_machine.own_names(public, vocabularies)
    return Rules(
        (*this_machine.own_tokens(), *TOKENS),
        (*EMAILS, *places, *PATHS, *RUN_IDS, *this_machine.own_runs(), *names),
    )


def _public_names(release: Release) -> list[str]:
    names = [repo.name for repo in release.repos]
    return names if release.facts is None else [*names, release.facts.base_model]


def _vocabularies(release: Release) -> list[bytes]:
    found = (e for repo in release.repos for e in repo.entries if PurePosixPath(e.name).name == "tokenizer.json")
    first = next(found, None)
    return [] if first is None else [b"".join(first.chunks())]


def _rules_for(entry: Entry, kind: RepoKind, rules: Rules) -> Rules:
    name = PurePosixPath(entry.name).name
    if kind == "dataset" and name.endswith((".jsonl", ".csv")):
        return Rules(rules.tokens)  # documents are whoever's they are; what stands in them is the publisher's business
    return rules.without("e-mail") if LICENCES.fullmatch(name) else rules


def _place(entry: Entry) -> str:
    """How a message names a file: where it lies, or what it is called where it was made for the occasion."""
    return entry.name if isinstance(entry.content, bytes) else str(entry.content)


# -- what is sent --------------------------------------------------------------------------------------------


def _name_faults(name: str, rules: Sequence[Rule]) -> Iterator[str]:
    """What the names of a file and of its folders tell; what they end with is no part of an address."""
    for part in PurePosixPath(name).parts:
        stem = part
        while PurePosixPath(stem).suffix.lower() in _ENDS:
            stem = stem.removesuffix(PurePosixPath(stem).suffix)
        data = os.fsencode(stem)
        for start, end, rule in secrets.spans(data, rules):
            yield f"its name: {rule.what} ({secrets.masked(data[start:end], rule)})"


def nature_faults(entry: Entry, kind: RepoKind, source: Path) -> Iterator[str]:
    """What is wrong with a file of a repository before anything of it is read: its kind, its place."""
    name = PurePosixPath(entry.name)
    if any(part.startswith(".") for part in name.parts) and not HIDDEN.fullmatch(entry.name):
        yield "a hidden file"
    suffix = name.suffix.lower()
    if suffix in (".py", ".pyc", ".so", ".sh", ".ipynb"):
        yield "code: a release holds none, and nothing here runs any"
    elif suffix in OTHER_WEIGHTS:
        yield "weights in another form than safetensors"
    elif not _is_known(entry.name, kind):
        yield "a file of a kind that no release holds"
    if isinstance(entry.content, Path):
        links = [*_link_faults(entry.content, source)]
        yield from links
        if links:
            return
    start = head_of(entry)
    if is_executable(start):
        yield "a program or a script"
    elif start.startswith(b"GGUF"):
        yield "weights in another form than safetensors"


def _is_known(name: str, kind: RepoKind) -> bool:
    suffixes = (
        *SUFFIXES,
        *(DATA_SUFFIXES if kind == "dataset" else ()),
        *PICKLE_SUFFIXES,
    )  # pickles are told by content
    last = PurePosixPath(name).name
    return last.lower().endswith(suffixes) or bool(LICENCES.fullmatch(last) or HIDDEN.fullmatch(name))


def _link_faults(path: Path, source: Path) -> Iterator[str]:
    """A link that leads out of what is published: whoever put it there could publish any file of this machine."""
    if not path.exists():
        yield f"{_LINK} or file that is not there"
        return
    here, root = path.absolute(), source.absolute()
    if path.resolve().is_relative_to(root.resolve()):
        return
    below = here.is_relative_to(root)
    out = below and any(
        folder.is_symlink() for folder in here.parents if folder != root and folder.is_relative_to(root)
    )
    if not out and path.is_symlink():
        try:
            inside(path.parent, path.name)  # a downloaded snapshot links its files into the cache
        except WeightsError:
            out = True
    if out:
        yield f"{_LINK} that leads out of what is published: copy the file to where the link is, if it is meant"


def _content_faults(entry: Entry, rules: Rules, *, pickles: bool = False) -> Iterator[str]:
    """What stands in a file; `pickles`: whether it may be one, which is then not searched."""
    try:
        code = code_in(entry)
        if code is None:
            yield from secrets_of(entry, rules)
        elif not pickles:
            yield code
    except OSError as cause:
        yield f"it cannot be read: {cause.strerror or cause}"


# -- what lies around it -------------------------------------------------------------------------------------


def _places(release: Release, source: Path) -> list[Path]:
    """`source`, and where a half's weights lie that are not below it."""
    root = source.absolute()
    weights = (e.content for repo in release.repos for e in repo.entries if e.name.endswith(".safetensors"))
    beside = {path.absolute().parent for path in weights if isinstance(path, Path)}
    return [source, *sorted(place for place in beside if not place.is_relative_to(root))]


def _around(source: Path, sent: set[Path]) -> Iterator[Entry]:
    """Every other file below `source`, called by its path there."""
    if not source.is_dir():
        return
    for folder, folders, files in os.walk(source):
        folders[:] = sorted(name for name in folders if name not in NEVER_SENT)
        for name in sorted(files):
            path = Path(folder, name)
            if not path.is_symlink() and path.is_file() and path.resolve() not in sent:
                yield Entry(path.relative_to(source).as_posix(), path)


def _bystander_faults(entry: Entry, writer: re.Pattern[str] | None, rules: Rules, *, data: bool) -> Iterator[str]:
    """What is wrong with a file that is not sent."""
    own = None if writer is None else writer.fullmatch(entry.name)
    part = None if own is None else own.lastgroup
    if part == "documents" or (
        data and entry.name.endswith(DATA_SUFFIXES)
    ):  # strangers' texts: anything may stand there
        return _content_faults(entry, Rules(tuple(rule for rule in rules.tokens if rule not in TOKENS)))
    if own is not None or data or _REWRITTEN.fullmatch(PurePosixPath(entry.name).name):
        return _content_faults(entry, Rules(rules.tokens), pickles=part == "state")
    return _content_faults(entry, _rules_for(entry, "model", rules))


def _writer(source: Path) -> re.Pattern[str] | None:
    """What the owner of a directory writes there; None where nobody can tell."""
    if (source / "job.yaml").is_file():
        return _WRITTEN_BY_JOB
    is_run = (source / "config.yaml").is_file() and any((source / stage).is_dir() for stage in STAGES)
    return _WRITTEN_BY_RUN if is_run else None
