"""Weight files as they will be sent: headers that cover their file exactly, every value finite, no weight of zeros only.

A file is read as bytes, wherever it lies, a few megabytes at a time: safetensors maps files, and a mapped file of 140 GB counts
as memory in some containers. Nothing is copied.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from math import prod
from typing import Any

import torch
from torch import Tensor

from nla_hub.publish.guards.content import LARGEST_HEADER
from nla_hub.publish.release import Entry
from nla_hub.weights import is_finite

CHUNK = 2**24
"""Bytes of values that are looked at together; a multiple of every dtype's size."""

BITS = {
    **{"F64": 64, "F32": 32, "F16": 16, "BF16": 16, "C64": 64, "BOOL": 8},
    **{"F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F6_E2M3": 6, "F6_E3M2": 6, "F4": 4},
    **{f"{sign}{bits}": bits for sign in "IU" for bits in (8, 16, 32, 64)},
}
"""Width of each dtype of safetensors 0.8."""

_FLOATS = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "C64": torch.complex64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
"""Those that can be NaN or infinite; F4 and F6 have neither."""

DESTROYED = "an export destroyed them; export them again from the checkpoint that they came from"
"""What to do with values that are finite and yet nobody's weights."""

_MAY_BE_ZERO = re.compile(r"lora_|zero")
"""In names of matrices that may be all zeros: LoRA factors before the first step, zero points of packed weights."""

EXPONENT_NAN = 0xFF
"""The one NaN of float8_e8m0, in which packed weights store the exponents of their scales (OCP MX specification 1.0)."""

_EXPONENTS = ("_scale", "_scales", ".scales", "scale_inv")
"""Ends of the names under which such scales are stored as plain bytes (U8)."""

QUANT_STATE = ".quant_state."
"""In the name of the tensor in which bitsandbytes keeps a mapping as JSON, one byte a letter."""


@dataclass(frozen=True)
class Part:
    """One tensor of a file: dtype by its safetensors name, shape, and its bytes, counted from the end of the header."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


@dataclass(frozen=True)
class StoredFile:
    """A safetensors file.

    Attributes:
        entry: where it lies.
        parts: name -> tensor, in the order of the bytes.
        metadata: `__metadata__` of the header.
        start: where the tensors' bytes begin.
        faults: what is wrong with header or file, without its name.
    """

    entry: Entry
    parts: Mapping[str, Part] = field(default_factory=dict)
    metadata: Mapping[str, str] = field(default_factory=dict)
    start: int = 0
    faults: tuple[str, ...] = ()

    @classmethod
    def read(cls, entry: Entry) -> StoredFile:
        """From its header alone; what is wrong is in `faults`."""
        with entry.open() as stream:
            first = stream.read(8)
            length = int.from_bytes(first, "little")
            if len(first) < 8 or not 2 <= length <= min(LARGEST_HEADER, entry.size - 8):
                return cls(entry, faults=("no safetensors header, or one that is larger than its file",))
            raw = stream.read(length)
        try:
            header = json.loads(raw.decode("utf-8"), object_pairs_hook=_once)
            if not isinstance(header, dict):
                raise ValueError("it is no mapping")
            metadata = header.pop("__metadata__", {})
            if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
                raise ValueError("__metadata__ is no mapping of texts")
            found = {name: _part(name, told) for name, told in header.items()}
        except (ValueError, RecursionError) as cause:
            return cls(entry, faults=(f"its header cannot be read: {cause}",))
        parts = dict(sorted(found.items(), key=lambda item: (item[1].begin, item[1].end)))
        return cls(entry, parts, metadata, 8 + length, tuple(_gaps(parts, entry.size - 8 - length)))

    @property
    def values(self) -> int:
        """Number of stored values."""
        return sum(prod(part.shape) for part in self.parts.values())

    def value_faults(self) -> Iterator[str]:
        """Every tensor with NaN or infinite values (how many, the flat index of the first), and every matrix of zeros only.

        Reads the whole file.
        """
        with self.entry.open() as stream:
            for name, part in self.parts.items():
                stream.seek(self.start + part.begin)
                if QUANT_STATE in name:
                    yield from _state_faults(name, stream.read(part.end - part.begin))
                    continue
                bad, first, seen, is_zero = 0, 0, 0, True
                for values in _values(stream, name, part):
                    broken = _broken(values)
                    if broken is not None:
                        first = first if bad else seen + int(broken[0])
                        bad += len(broken)
                    seen += values.numel()
                    is_zero = is_zero and _is_zero(values)
                if seen and is_zero and len(part.shape) > 1 and not _MAY_BE_ZERO.search(name):
                    yield f"{name}: all {seen:,} values are zero: {DESTROYED}"
                if bad:
                    yield f"{name}: {bad:,} of {prod(part.shape):,} values are NaN or infinite, the first at flat index {first}"

    def tensor(self, name: str) -> Tensor:
        """One float tensor, copied out of the file."""
        part = self.parts[name]
        with self.entry.open() as stream:
            stream.seek(self.start + part.begin)
            data = bytearray(stream.read(part.end - part.begin))
        return torch.frombuffer(data, dtype=_FLOATS[part.dtype]).reshape(part.shape)


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a name stands twice")
    return found


def _part(name: str, told: Any) -> Part:
    if not isinstance(told, dict) or told.keys() != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"{name!r} is not described by dtype, shape and data_offsets")
    dtype, shape, offsets = told["dtype"], told["shape"], told["data_offsets"]
    if dtype not in BITS:
        raise ValueError(f"{name!r} has the unknown dtype {dtype!r}")
    for numbers in (shape, offsets):
        if not isinstance(numbers, list) or not all(type(n) is int and n >= 0 for n in numbers):
            raise ValueError(f"{name!r} has a shape or offsets that are no whole numbers")
    if len(offsets) != 2 or (offsets[1] - offsets[0]) * 8 != prod(shape) * BITS[dtype]:
        raise ValueError(f"{name!r} has other offsets than a tensor of {shape} in {dtype}")
    return Part(dtype, tuple(shape), *offsets)


def _gaps(parts: Mapping[str, Part], size: int) -> Iterator[str]:
    """Where tensors and bytes do not cover each other exactly."""
    place = 0
    for name, part in parts.items():
        if part.begin != place:
            yield f"{name} begins at byte {part.begin}, expected {place}: tensors overlap or leave a gap"
            return
        place = part.end
    if place != size:
        yield f"its tensors take {place} bytes, the file has {size}: it is cut off, or something was added"


def _values(stream: Any, name: str, part: Part) -> Iterator[Tensor]:
    """The values of a tensor that could be broken, piece by piece; the stream stands at its beginning."""
    dtype = _FLOATS.get(part.dtype)
    is_exponents = part.dtype == "F8_E8M0" or (part.dtype == "U8" and name.endswith(_EXPONENTS))
    if dtype is None and not is_exponents:
        return
    buffer = bytearray(min(CHUNK, part.end - part.begin))
    left = part.end - part.begin
    while left:
        piece = memoryview(buffer)[: min(left, CHUNK)]
        if stream.readinto(piece) != len(piece):
            raise OSError(f"the file ends inside {name}")
        left -= len(piece)
        if is_exponents:  # as floats whose only NaN is theirs
            codes = torch.frombuffer(piece, dtype=torch.uint8)
            yield torch.where(codes == EXPONENT_NAN, torch.nan, 1.0)
        else:
            assert dtype is not None
            yield torch.frombuffer(piece, dtype=dtype)


def _is_zero(values: Tensor) -> bool:
    """Whether all values are zero. Nearly every weight is told by its first ones, so no more of it are looked at."""
    if values.element_size() == 1:  # the 8-bit floats cannot be compared
        values = values.view(torch.uint8) & 0x7F  # but for the sign
    return not bool((values[:1024] != 0).any()) and not bool((values != 0).any())


def _broken(values: Tensor) -> Tensor | None:
    """Flat indices of NaN and infinite values; None where all are finite."""
    plain = torch.view_as_real(values).flatten() if values.is_complex() else values
    if is_finite(plain):
        return None
    wide = values if values.is_complex() else values.float() if values.element_size() < 4 else values
    return (~torch.isfinite(wide)).nonzero().flatten()


def _state_faults(name: str, data: bytes) -> Iterator[str]:
    try:
        json.loads(data, parse_constant=_no_number)
    except (ValueError, RecursionError) as cause:
        yield f"{name}: its state cannot be read: {cause}"


def _no_number(word: str) -> float:
    raise ValueError(f"it holds {word}")
