"""Names. The spelling alone decides what a name means, never the file system:

`tiny`, `qwen2.5-7b`, ...: a zoo entry. `owner/name` or `owner/name@revision`: the Hub. `./x`, `../x`, `/x`, `~/x` (or a
Path): a directory.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, replace
from functools import partial
from importlib.resources import files
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Literal

from nla_hub import hub
from nla_hub.errors import CheckpointError, InputError
from nla_hub.hub import HubOptions
from nla_hub.sidecar import SIDECAR_NAME

if TYPE_CHECKING:
    from nla_hub.zoo import ZooEntry

PACKAGE_PREFIX = "package:"
"""Inside zoo.yaml only: a directory of the installed package."""


@dataclass(frozen=True)
class Ref:
    """A parsed name: where a checkpoint is, nothing read yet."""

    kind: Literal["zoo", "hub", "directory", "package"]
    name: str
    revision: str | None = None
    subfolder: str = ""
    """The folder of a half inside the checkpoint, with "/" between parts; "" where the layout says it."""

    @property
    def is_local(self) -> bool:
        """Whether no download is involved."""
        return self.kind in ("directory", "package")

    def __str__(self) -> str:
        name = f"{PACKAGE_PREFIX}{self.name}" if self.kind == "package" else self.name
        name = f"{name}@{self.revision}" if self.revision else name
        return f"{name} ({self.subfolder})" if self.subfolder else name

    def fetch(self, options: HubOptions, *, weights: bool = True) -> Path:
        """The local directory of this checkpoint, downloaded where needed (without its weights if so asked)."""
        if self.kind == "directory":
            path = Path(self.name)
            if not path.is_dir():
                what = "This is a file, not a directory." if path.exists() else "There is no such directory."
                raise CheckpointError(
                    what, where=self.name, next_step="check the path; a Hub repository is written owner/name"
                )
            return path
        if self.kind == "package":
            return Path(str(files("nla_hub"))) / self.name
        if self.kind == "hub":
            patterns = hub.MODEL_FILES if weights else hub.SMALL_FILES
            return hub.fetch(self.name, revision=self.revision, options=options, files=patterns)
        raise AssertionError(f"zoo name {self.name!r} was not resolved")


def parse_name(name: str | os.PathLike[str], *, revision: str | None = None) -> Ref:
    """What a name means; see the module's first lines.

    Raises:
        InputError: a name that is none of these, or a revision given twice.
    """
    if isinstance(name, os.PathLike):
        if revision is not None:
            raise InputError("A directory has no revisions.", where=name, got=f"revision={revision!r}")
        return Ref("directory", str(expand(name)))
    if not isinstance(name, str) or not name.strip():
        raise InputError("A name is expected here.", got=repr(name), expected="tiny, owner/name or ./directory")
    if name.startswith(("./", "../", "/", "~")) or name in (".", ".."):
        if revision is not None:
            raise InputError("A directory has no revisions.", where=name, got=f"revision={revision!r}")
        return Ref("directory", str(expand(name)))
    stem, at, given = name.partition("@")
    if at and not given:
        raise InputError("Nothing stands after the @.", where=name, expected="owner/name@revision")
    if at and revision is not None and given != revision:
        raise InputError("Two different revisions.", where=name, got=f"@{given} and revision={revision!r}")
    revision = given or revision
    if re.fullmatch(r"[\w.-]+/[\w.-]+", stem):
        return Ref("hub", stem, revision)
    if "/" in stem or "\\" in stem:
        raise InputError(
            "This is neither a Hub name nor a directory.",
            got=repr(name),
            expected="owner/name, or ./path for a directory",
        )
    return Ref("zoo", stem, revision)


def expand(name: str | os.PathLike[str]) -> Path:
    """A path with its ~ replaced; an InputError for a user that does not exist."""
    try:
        return Path(name).expanduser()
    except RuntimeError as cause:
        raise InputError("There is no such user's home directory.", got=repr(str(name))) from cause


def zoo_ref(name: str, revision: str | None = None) -> Ref:
    """What a repository is called in a zoo entry: as `parse_name`, and `package:` for directories of this package."""
    if name.startswith(PACKAGE_PREFIX):
        return Ref("package", name.removeprefix(PACKAGE_PREFIX))
    return parse_name(name, revision=revision)


@dataclass(frozen=True)
class PairRefs:
    """Where the two halves of a pair and their source are. `name` is what the user called it."""

    name: str
    av: Ref | None
    ar: Ref | None
    base: Ref | None
    ar_guessed: bool = False
    """The AR is only a guess by its name; the AV's own checkpoint and what its sidecar says come before it."""
    ar_named: bool = False
    """The caller named the AR, and its revision with it."""
    ar_subfolder: str = ""
    """The AR's folder, where it lies in the AV's checkpoint."""


def resolve_pair(
    name: str | os.PathLike[str],
    *,
    ar: str | os.PathLike[str] | None = None,
    base_model: str | os.PathLike[str] | None = None,
    revision: str | None = None,
    subfolder: str | os.PathLike[str] = "",
    ar_subfolder: str | os.PathLike[str] = "",
) -> PairRefs:
    """Find both halves of a pair and its source, as far as names and directory layout tell.

    The AR is, in this order: the one named, the zoo entry's (pinned), the directory beside the AV, another folder of the
    AV's own checkpoint, what the AV's sidecar calls its pair, the Hub's `...-ar` of `...-av`. `subfolder` and
    `ar_subfolder` name the folders of the halves in a checkpoint that holds several.

    A directory may be an AV, or hold `av/`, `ar/` and perhaps `source/`; the AR of `x/av` is looked for at `x/ar`, and
    `.../name-av` at `.../name-ar`. What the AV's sidecar says (`pair_repo`, `base_checkpoint`) is consulted later,
    by `NLA.from_pretrained`.
    """
    subfolder, ar_subfolder = _folder(subfolder), _folder(ar_subfolder)
    explicit_ar = named_part(ar, "ar")
    if explicit_ar is not None and ar_subfolder:
        explicit_ar = replace(explicit_ar, subfolder=ar_subfolder)
    explicit_base = named_part(base_model, "base")
    ref = parse_name(name, revision=revision)
    if ref.kind == "zoo":
        entry = _entry(ref)
        av = zoo_ref(entry.av, entry.av_revision)
        if ref.revision is not None:
            if av.is_local:
                raise InputError("The packaged pair has no revisions.", where=ref.name, got=repr(ref.revision))
            av = replace(av, revision=ref.revision)
        return PairRefs(
            ref.name,
            replace(av, subfolder=subfolder or entry.av_folder),
            explicit_ar or replace(zoo_ref(entry.ar, entry.ar_revision), subfolder=ar_subfolder or entry.ar_folder),
            explicit_base or zoo_ref(entry.base, entry.base_revision),
            ar_named=explicit_ar is not None,
        )
    ref = replace(ref, subfolder=subfolder)
    if ref.kind == "hub":
        sibling = Ref("hub", re.sub(r"-av$", "-ar", ref.name)) if ref.name.endswith("-av") else None
        return PairRefs(
            str(ref),
            ref,
            explicit_ar or sibling,
            explicit_base,
            ar_guessed=explicit_ar is None,
            ar_named=explicit_ar is not None,
            ar_subfolder=ar_subfolder,
        )
    directory = ref.fetch(HubOptions())
    if not subfolder and not (directory / SIDECAR_NAME).exists() and (directory / "av").is_dir():
        return PairRefs(
            ref.name,
            _directory(directory / "av"),
            explicit_ar or (replace(ref, subfolder=ar_subfolder) if ar_subfolder else _directory(directory / "ar")),
            explicit_base or _directory(directory / "source"),
            ar_named=explicit_ar is not None,
        )
    beside = directory.resolve().parent
    mine = directory.resolve().name
    other = re.sub(r"(^|-)av$", r"\1ar", mine)
    return PairRefs(
        ref.name,
        ref,
        explicit_ar or (_directory(beside / other) if other != mine and not ar_subfolder else None),
        explicit_base or _directory(directory / "source") or _directory(beside / "source"),
        ar_named=explicit_ar is not None,
        ar_subfolder=ar_subfolder,
    )


def _folder(spelled: str | os.PathLike[str]) -> str:
    """A folder inside a checkpoint, in one spelling; raises an InputError for one outside of it."""
    path = PurePosixPath(str(spelled).replace("\\", "/"))
    if path.is_absolute() or ".." in path.parts:
        raise InputError(
            "A subfolder lies inside the checkpoint.", got=repr(str(spelled)), expected="such as av/iter_000400"
        )
    return "" if str(path) == "." else str(path)


def _entry(ref: Ref) -> ZooEntry:
    from nla_hub.zoo import entry

    there = Path(ref.name).is_dir()
    return entry(ref.name, hint=f"For the directory of that name write ./{ref.name}" if there else None)


def named_part(name: str | os.PathLike[str] | None, half: Literal["ar", "base"]) -> Ref | None:
    """An AR or a base model that the caller named; the name of a pair stands for that pair's part."""
    if name is None:
        return None
    ref = parse_name(name)
    if ref.kind != "zoo":
        return ref
    entry = _entry(ref)
    return zoo_ref(getattr(entry, half), ref.revision or getattr(entry, f"{half}_revision"))


def _directory(path: Path) -> Ref | None:
    return Ref("directory", str(path)) if path.is_dir() else None


_AV_WORDS = {"av": "ar", "actor": "critic", "verbalizer": "reconstructor", "verbaliser": "reconstructor"}


def sibling_names(name: str) -> list[str]:
    """What the AR of an AV called `name` may be called: the word for the one half put in the place of the other's."""
    found = []
    for word, other in _AV_WORDS.items():
        replaced = _whole_word(word).sub(partial(_in_the_case_of, other), name)
        if replaced != name:
            found.append(replaced)
    return found


def half_named(name: str) -> Literal["av", "ar"] | None:
    """Which half a repository's name speaks of; None where it has a word for neither, or for both."""
    said = [any(_whole_word(word).search(name) for word in words) for words in (_AV_WORDS, _AV_WORDS.values())]
    return None if said[0] == said[1] else "av" if said[0] else "ar"


def _whole_word(word: str) -> re.Pattern[str]:
    return re.compile(rf"(?<![A-Za-z0-9]){word}(?![A-Za-z0-9])", re.I)


def _in_the_case_of(word: str, found: re.Match[str]) -> str:
    there = found[0]
    return word.upper() if there.isupper() else word.capitalize() if there[0].isupper() else word
