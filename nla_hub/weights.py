"""What lies on disk: the tensors of a checkpoint from their headers alone, and whether values can be believed."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from nla_hub.errors import WeightsError

WEIGHTS_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"
HEAD_NAME = "value_head.safetensors"
REFERENCE_NAME = "fve_reference.safetensors"
"""The mean vector of a reference; beside an AV other programs take it for weights, so it lies with the AR alone."""
ADAPTER_CONFIG_NAME = "adapter_config.json"
PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


@dataclass(frozen=True)
class StoredTensor:
    """Where one tensor lies: file, shape and safetensors dtype name ("F32", "BF16", ...)."""

    file: Path
    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True)
class WeightIndex:
    """All tensors of a model directory, from the headers alone."""

    directory: Path
    tensors: dict[str, StoredTensor] = field(default_factory=dict)

    @classmethod
    def read(cls, directory: Path) -> WeightIndex:
        """Read and check the headers of every shard.

        Raises:
            WeightsError: no safetensors (pickled weights are refused), a missing or truncated shard, a header larger than
                its file, an index that points outside the directory or disagrees with the shards.
        """
        index_path, single = directory / INDEX_NAME, directory / WEIGHTS_NAME
        # The order in which transformers looks: what is checked here is what it will load.
        if single.is_symlink() or single.is_file():
            return cls(directory, read_header(inside(directory, WEIGHTS_NAME)))
        if index_path.is_symlink() or index_path.is_file():
            return cls(directory, _read_sharded(directory, inside(directory, INDEX_NAME)))
        pickled = sorted(p.name for p in directory.glob("*") if p.suffix in PICKLED)
        if pickled:
            raise WeightsError(
                "This checkpoint has pickled weights only; loading them could run a stranger's code.",
                where=directory,
                got=", ".join(pickled[:3]),
                expected=f"{WEIGHTS_NAME} or {INDEX_NAME}",
                next_step="ask its author for safetensors, or convert it where you trust it (save_pretrained writes them)",
            )
        raise WeightsError(
            "This directory has no weights.", where=directory, expected=f"{WEIGHTS_NAME} or {INDEX_NAME}"
        )


def inside(directory: Path, name: str) -> Path:
    """`directory / name`, refused where it leaves the directory or its links run in a circle.

    A downloaded snapshot links its files into the cache's blobs: such a link, one hop to a plain file, is followed.
    """
    if Path(name).is_absolute() or ".." in Path(name).parts or Path(name).name != name:
        raise WeightsError(
            "The index points outside the checkpoint.",
            where=directory,
            got=repr(name),
            expected="plain file names",
            next_step="do not use this checkpoint unless its author explains it",
        )
    path = directory / name
    try:
        real = path.resolve(strict=True)
    except (RuntimeError, OSError) as cause:
        looped = isinstance(cause, RuntimeError) or getattr(cause, "errno", None) == 40  # ELOOP
        what = "This link runs in a circle." if looped else "This file is missing."
        raise WeightsError(what, where=path, next_step="download the checkpoint again") from cause
    allowed = [directory.resolve()]
    for folder in (directory, *directory.parents):
        if folder.parent.name == "snapshots":  # a folder of a downloaded repository, or the whole of it
            allowed.append(folder.resolve().parent.parent)
            break
    if not any(real.is_relative_to(root) for root in allowed):
        raise WeightsError(
            "This link leads outside the checkpoint.",
            where=path,
            got=real,
            next_step="copy the file to where the link is, if you trust it",
        )
    return path


def read_header(path: Path) -> dict[str, StoredTensor]:
    """The tensors of one safetensors file, from its header; raises a WeightsError where the file is damaged."""
    try:
        with safe_open(path, framework="pt") as file:
            result = {}
            for name in file.keys():  # noqa: SIM118 -- safe_open is no mapping
                part = file.get_slice(name)
                result[name] = StoredTensor(path, tuple(part.get_shape()), part.get_dtype())
            return result
    except (SafetensorError, OSError, ValueError) as cause:
        raise WeightsError(
            f"This file is damaged or incomplete: {cause}",
            where=path,
            next_step="download it again (force_download=True), or copy it again",
        ) from cause


def _read_sharded(directory: Path, index_path: Path) -> dict[str, StoredTensor]:
    try:
        weight_map = json.loads(index_path.read_text(encoding="utf-8"))["weight_map"]
        if not isinstance(weight_map, dict):
            raise TypeError("weight_map is no mapping")
    except (OSError, ValueError, KeyError, TypeError) as cause:
        raise WeightsError("This index cannot be read.", where=index_path, next_step="download it again") from cause
    found: dict[str, StoredTensor] = {}
    for name in sorted({str(v) for v in weight_map.values()}):
        found |= read_header(inside(directory, name))
    faults = [f"missing from its shard {weight_map[n]}: {n}" for n in weight_map if n not in found]
    faults += [f"in a shard, but not in the index: {n}" for n in found if n not in weight_map]
    if faults:
        raise WeightsError("Index and shards disagree.", where=index_path, faults=shorten(faults))
    return found


def file_hashes(directory: Path) -> dict[str, str]:
    """The weights of a model directory, file by file: name -> sha256. The mean vector of a reference is none of them."""
    found = {}
    for path in sorted(directory.glob("*.safetensors")):
        if path.name != REFERENCE_NAME:
            with path.open("rb") as file:
                found[path.name] = hashlib.file_digest(file, "sha256").hexdigest()
    return found


def shorten(faults: Sequence[str], at_most: int = 8) -> list[str]:
    """The first faults of a long list, and how many more there are."""
    rest = len(faults) - at_most
    return [*faults[:at_most], *([f"... and {rest} more"] if rest > 0 else [])]


def read_tensor(path: Path, name: str) -> Tensor:
    """One tensor of a safetensors file."""
    with safe_open(path, framework="pt") as file:
        return cast(Tensor, file.get_tensor(name))


class StoredSlice:
    """A tensor on disk that is read when it is asked for, in the words of safetensors' own slices.

    Each reading opens the file anew: its pages are given back with the tensor, where one mapping of the whole file would
    hold every page that was ever read until the last tensor is gone.
    """

    def __init__(self, name: str, stored: StoredTensor) -> None:
        self.name = name
        self.stored = stored

    def __getitem__(self, key: object) -> Tensor:
        with safe_open(self.stored.file, framework="pt") as file:
            return cast(Tensor, file.get_slice(self.name)[key])

    def get_shape(self) -> list[int]:
        """Its shape, from the header."""
        return list(self.stored.shape)

    def get_dtype(self) -> str:
        """Its dtype as safetensors calls it ("F32", "BF16", ...)."""
        return self.stored.dtype


def is_finite(value: Tensor) -> bool:
    """Whether no value is NaN or infinite. Makes no copy, where `torch.isfinite` makes several of a weight's size."""
    if value.numel() == 0 or not value.is_floating_point() or value.device.type == "meta":
        return True
    if value.element_size() == 1:  # the 8-bit floats know no minimum
        return all(is_finite(part.float()) for part in value.flatten().split(SLICE))
    smallest, largest = torch.aminmax(value)  # a NaN anywhere makes both NaN
    return bool(torch.isfinite(smallest)) and bool(torch.isfinite(largest))


SLICE = 2**22
"""Values that are widened at a time: 16 MB in float32."""


def require_finite_weights(model: nn.Module, where: object, *, but: Sequence[str] = ()) -> None:
    """Raise a WeightsError that names every weight with a NaN or infinite value."""
    broken = [
        name
        for name, value in [*model.named_parameters(), *model.named_buffers()]
        if not matches(name, but) and not is_finite(value)
    ]
    if broken:
        raise WeightsError(
            f"{len(broken)} weights hold NaN or infinite values.",
            where=where,
            faults=shorten(broken),
            next_step="download it again; if it stays, ask its author to export it again",
        )


def matches(name: str, patterns: Iterable[str]) -> bool:
    """Whether a weight's name fits any pattern: a regex, or "blocks>LIST>K" for the blocks of LIST above K."""
    for pattern in patterns:
        if pattern.startswith("blocks>"):
            _, blocks, last = pattern.split(">")
            found = re.search(rf"(?:^|\.){blocks}\.(\d+)\.", name)
            if found and int(found.group(1)) > int(last):
                return True
        elif re.search(pattern, name):
            return True
    return False
