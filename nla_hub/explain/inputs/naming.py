"""The name of a data set. Its spelling alone decides what it means, never what lies on the disk:

`./x`, `../x`, `/x`, `~/x`, or a name that ends like a data file: a file or directory of this machine. With `*`, `?` or `[`
in it: all files that match (`**` stands for any number of folders). `hf://datasets/owner/name[@revision]/path`: files of
the Hub, patterns too. `owner/name[@revision][:split]`: a data set of the Hub, read through the `datasets` library.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, Literal

from nla_hub.errors import HubNotFoundError, InputError, did_you_mean
from nla_hub.explain.inputs.files import COMPRESSIONS, REFUSALS, DataFile, LocalFile, damage
from nla_hub.explain.inputs.items import encodable, one_line
from nla_hub.hub import HubOptions, Listing
from nla_hub.locate import expand

Format = Literal["txt", "jsonl", "json", "csv", "tsv", "parquet", "arrow", "npy", "safetensors"]

FORMATS: dict[str, Format] = {
    ".txt": "txt",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "json",
    ".csv": "csv",
    ".tsv": "tsv",
    ".parquet": "parquet",
    ".arrow": "arrow",
    ".feather": "arrow",
    ".npy": "npy",
    ".safetensors": "safetensors",
}
"""Endings of data files -> what they are."""

BINARY: tuple[Format, ...] = ("parquet", "arrow", "npy", "safetensors")
"""Formats that are not read through a further compression."""

HUB_SCHEME = "hf://"
HUB_DATASETS = "hf://datasets/"


@dataclass(frozen=True)
class HubFile:
    """A file of a data set on the Hub, at one commit."""

    listing: Listing
    name: str
    options: HubOptions

    @property
    def size(self) -> int:
        return self.listing.files[self.name]

    def open(self) -> BinaryIO:
        from nla_hub.hub.data_files import open_dataset_file

        return open_dataset_file(self.listing, self.name, self.options)

    def sibling(self, suffix: str) -> HubFile | None:
        name = self.name + suffix
        return HubFile(self.listing, name, self.options) if name in self.listing.files else None

    def identity(self) -> dict[str, Any]:
        return {"name": self.name, "size": self.size}


@dataclass(frozen=True)
class Files:
    """The files of a data set, all of one format, in order of their names.

    Attributes:
        commit: of the Hub's data set; None for files of this machine.
    """

    format: Format
    files: tuple[DataFile, ...]
    repo: str | None = None
    commit: str | None = None


@dataclass(frozen=True)
class HubName:
    """`owner/name[@revision][:split]`; a split may have its configuration before it, as in "sample/train"."""

    repo: str
    revision: str | None
    split: str | None


def parse(name: str, options: HubOptions) -> Files | HubName:
    """What a name means, with its files found.

    Raises:
        InputError: a name that is none of these, nothing there, files of several formats or of an unknown one.
        HubError: as `hub.data_files.dataset_files`.
    """
    if not name.strip():
        raise InputError("The name of a data set is expected here.", got=repr(name))
    if name == "-":
        raise InputError(
            "A job is continued after an interruption, and what came through a pipe cannot be read again.",
            got="-",
            next_step="write it to a file first: ... > texts.jsonl, then --data texts.jsonl",
        )
    if name.startswith(HUB_SCHEME):
        return _on_the_hub(name, options)
    if any(sign in name for sign in "*?["):
        return _matching(name)
    if name.startswith(("./", "../", "/", "~")) or name in (".", "..") or _split_suffix(name)[0] is not None:
        return _local(name)
    found = re.fullmatch(r"([\w.-]+/[\w.-]+)(?:@([^:]+))?(?::(.+))?", name)
    if found:
        return HubName(found[1], found[2], found[3])
    there = Path(name).exists()
    near = [] if there or "/" in name else did_you_mean(name, _data_names(Path()))
    raise InputError(
        "This is no name of a data set.",
        got=repr(name),
        expected="./path, a file ending in "
        + ", ".join(FORMATS)
        + "; owner/name of the Hub; hf://datasets/owner/name/path",
        next_step=f"for what lies here write ./{name}"
        if there
        else (f"did you mean {' or '.join(near)}?" if near else "check the spelling"),
    )


def compression_of(name: str) -> str:
    """ ".gz", ".zst" or ""."""
    return _split_suffix(name)[1]


def _split_suffix(name: str) -> tuple[Format | None, str]:
    """Format and compression by the ending; None for one that is not known."""
    path = PurePosixPath(name.lower())
    compression = path.suffix if path.suffix in COMPRESSIONS else ""
    found = FORMATS.get(PurePosixPath(path.stem).suffix if compression else path.suffix)
    return (None, "") if compression and found in BINARY else (found, compression)


def _local(name: str) -> Files:
    path = expand(name)
    if path.is_dir():
        return _directory(path)
    if not path.exists() and not path.is_symlink():
        raise _absent(name, path)
    if not path.is_file():
        looped = path.is_symlink() and not path.exists()
        what = "This link leads nowhere." if looped else "This is not a regular file."
        raise InputError(what, where=name, next_step="name a file, or a directory of files")
    if _split_suffix(path.name)[0] is None:
        raise _unknown(name)
    return _of_one_format([LocalFile(path, encodable(path.name))], name)


def _absent(name: str, path: Path) -> InputError:
    near = did_you_mean(path.name, _data_names(path.parent))
    return InputError(
        "There is no such file.",
        where=name,
        next_step=f"did you mean {' or '.join(str(path.with_name(n)) for n in near)}?" if near else "check the path",
    )


def _data_names(folder: Path) -> list[str]:
    """The data files and folders in a folder, of which somebody may have meant one."""
    try:
        return [p.name for p in folder.iterdir() if p.is_dir() or _split_suffix(p.name)[0] is not None]
    except OSError:
        return []


def _unknown(name: str) -> InputError:
    return InputError(
        "The ending does not say what this file is.",
        where=name,
        expected=f"one of {', '.join(FORMATS)} (the text formats also with {' or '.join(COMPRESSIONS)} behind)",
        next_step="rename it, or convert it to one of these",
    )


def _directory(folder: Path) -> Files:
    try:
        entries = sorted(entry.name for entry in folder.iterdir() if not entry.is_dir())
    except OSError as cause:
        raise InputError(f"This directory cannot be read: {cause.strerror}", where=folder) from cause
    names = [name for name in entries if not name.startswith((".", "_")) and _split_suffix(name)[0] is not None]
    if not names:
        raise InputError(
            "This directory holds no data files (its folders are not searched).",
            where=folder,
            got=", ".join(map(one_line, entries[:8])) or "nothing",
            expected=f"files ending in {', '.join(FORMATS)}",
            next_step=f"files in folders are named by a pattern: '{folder}/**/*.parquet'",
        )
    return _of_one_format([LocalFile(folder / name, encodable(name)) for name in names], folder)


def _matching(name: str) -> Files:
    pattern = expand(name)
    root = Path(pattern.anchor) if pattern.is_absolute() else Path()
    found = sorted({str(path) for path in match(root, pattern.parts[1:] if pattern.is_absolute() else pattern.parts)})
    paths = [Path(path) for path in found if _split_suffix(path)[0] is not None]
    if not paths:
        literal = "; a name that holds these signs itself is put into its directory's name" if pattern.exists() else ""
        raise InputError(
            "No data file matches this pattern." if not found else "No file that matches has a known ending.",
            where=name,
            got=", ".join(map(one_line, found[:3])) or None,
            expected=f"files ending in {', '.join(FORMATS)}",
            next_step=f"check the pattern; quote it, so that the shell leaves it alone{literal}",
        )
    shared = Path(os.path.commonpath([path.parent for path in paths]))
    return _of_one_format([LocalFile(path, encodable(path.relative_to(shared).as_posix())) for path in paths], name)


def match(folder: Path, pattern: Sequence[str]) -> Iterator[Path]:
    """The files below `folder` whose path fits the parts of a pattern; hidden ones only where a part begins with a dot.

    `**` goes through folders and not through links to folders, which may run in circles.
    """
    head, rest = pattern[0], pattern[1:]
    if not any(sign in head for sign in "*?["):
        path = folder / head
        if rest and path.is_dir():
            yield from match(path, rest)
        elif not rest and path.exists() and not path.is_dir():
            yield path
        return
    try:
        entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
    except OSError as cause:
        if cause.errno not in REFUSALS:  # its files would be left out, and nobody told
            damage(cause, str(folder))
        return
    if head == "**":
        yield from match(folder, rest or ("*",))
    for entry in entries:
        if entry.name.startswith(".") and not head.startswith("."):
            continue
        path = folder / entry.name
        if head == "**":
            if entry.is_dir(follow_symlinks=False):
                yield from match(path, pattern)
        elif fnmatchcase(entry.name, head):
            if rest and entry.is_dir():
                yield from match(path, rest)
            elif not rest and not entry.is_dir():
                yield path


def _on_the_hub(name: str, options: HubOptions) -> Files:
    from nla_hub.hub.data_files import dataset_files

    found = re.fullmatch(r"([\w.-]+/[\w.-]+)(?:@([^/]+))?(?:/(.*))?", name.removeprefix(HUB_DATASETS))
    if not name.startswith(HUB_DATASETS) or found is None:
        raise InputError(
            "This is no path of a data set on the Hub.",
            got=repr(name),
            expected="hf://datasets/owner/name/path or hf://datasets/owner/name@revision/path; the path may be a pattern",
        )
    repo, revision, path = found[1], found[2], (found[3] or "").strip("/")
    revision = revision.replace("%2F", "/") if revision else None
    listing = dataset_files(repo, revision=revision, options=options)
    if path in listing.files:
        if _split_suffix(path)[0] is None:
            raise _unknown(name)
        names = [path]
    else:
        names = [n for n in sorted(listing.files) if _split_suffix(n)[0] is not None and _fits(n, path)]
    if not names:
        near = did_you_mean(path, [n for n in listing.files if _split_suffix(n)[0] is not None])
        raise HubNotFoundError(
            "The data set has no such data files.",
            where=name,
            expected=f"files ending in {', '.join(FORMATS)}",
            next_step=f"did you mean {' or '.join(near)}?" if near else "look at its files on its page",
        )
    files = [HubFile(listing, n, options) for n in names]
    return _of_one_format(files, name, repo=repo, commit=listing.commit)


def _fits(name: str, pattern: str) -> bool:
    """Whether a file of the Hub fits a pattern, or lies directly in the folder called so."""
    if not any(sign in pattern for sign in "*?["):
        parent = str(PurePosixPath(name).parent)
        return (parent if parent != "." else "") == pattern
    return _fit(name.split("/"), pattern.split("/"))


def _fit(parts: Sequence[str], pattern: Sequence[str]) -> bool:
    if not pattern or not parts:
        return not pattern and not parts
    if pattern[0] == "**":
        rest = pattern[1:] or ["*"]
        return _fit(parts, rest) or (len(parts) > 1 and _fit(parts[1:], pattern))
    return fnmatchcase(parts[0], pattern[0]) and _fit(parts[1:], pattern[1:])


def _of_one_format(
    files: Sequence[DataFile], where: object, *, repo: str | None = None, commit: str | None = None
) -> Files:
    by_format: dict[Format, list[DataFile]] = {}
    for file in files:
        found = _split_suffix(file.name)[0]
        assert found is not None
        by_format.setdefault(found, []).append(file)
    if len(by_format) > 1:
        listed = [
            f"{len(group)} of {kind}: {', '.join(f.name for f in group[:5])}" for kind, group in by_format.items()
        ]
        raise InputError(
            "These are files of several formats.",
            where=where,
            faults=listed,
            next_step="name those of one format by a pattern, such as 'folder/*.jsonl'",
        )
    return Files(next(iter(by_format)), tuple(files), repo, commit)
