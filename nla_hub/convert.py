"""A pair in any layout and dialect -> the canonical one: two complete directories with canonical sidecars.

Values are kept: each half is written in the widest dtype that its weights are stored in. Only LoRAs are changed, by being
merged into their base (in float32, rounded once to the dtype written).
"""

from __future__ import annotations

import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch

from nla_hub.checkpoints import HeadFile, load_ar, load_av
from nla_hub.errors import CheckpointError, RunError
from nla_hub.export import save_ar, save_av
from nla_hub.loading import Pair, ar_prompt
from nla_hub.log import logger
from nla_hub.lora import read_ar_meta
from nla_hub.opening import AR_META_KEY, Half
from nla_hub.pretrained import TORCH_DTYPES, LoadOptions
from nla_hub.prompts import AVPrompt
from nla_hub.sidecar import Role, Sidecar
from nla_hub.weights import WeightIndex, inside

PAPERS = ("LICENSE*", "NOTICE*", "USE_POLICY*", "README.md", "fve_reference.safetensors")
"""What is copied beside weights, tokenizer and sidecar: licences, what the author wrote, the mean vector of FVE."""


@dataclass(frozen=True)
class Converted:
    """One half that was written.

    Attributes:
        role, directory: which, and where.
        came_from: folder and form it was found in.
        dtype: what its weights are stored in now.
        merged: LoRAs that were merged into their base.
    """

    role: Role
    directory: Path
    came_from: str
    dtype: str
    merged: int


def convert(pair: Pair, destination: Path, *, dtype: str | None = None) -> list[Converted]:
    """Write the opened halves of a pair as `destination`/av and `destination`/ar.

    Everything is written beside the destination first and moved there when it is complete.

    Args:
        pair: from `loading.open_pair`; halves without weights on disk are left out.
        dtype: "float32", "bfloat16" or "float16"; None is the widest that each half is stored in.

    Raises:
        RunError: the destination exists and is not empty.
        CheckpointError and its children: the pair cannot be believed.
    """
    if destination.exists() and (not destination.is_dir() or any(destination.iterdir())):
        raise RunError(
            "The destination exists and is not empty.",
            where=destination,
            next_step="name a new directory, or remove it",
        )
    halves = [half for half in (pair.av, pair.ar) if half is not None and half.role in pair.wanted]
    for half in halves:
        if half.role == "av":
            AVPrompt.build(half.tokenizer, half.sidecar)
        else:
            ar_prompt(half)
    destination.parent.mkdir(parents=True, exist_ok=True)
    draft = Path(tempfile.mkdtemp(prefix=f".{destination.name}.", dir=destination.parent))
    try:
        done = [_write(half, draft / half.role, dtype) for half in halves]
        if destination.exists():
            destination.rmdir()
        os.replace(draft, destination)
    except BaseException:
        shutil.rmtree(draft, ignore_errors=True)
        raise
    destination.chmod(0o755)
    return [Converted(c.role, destination / c.role, c.came_from, c.dtype, c.merged) for c in done]


def _write(half: Half, directory: Path, dtype: str | None) -> Converted:
    files = half.files
    chosen = LoadOptions(dtype=dtype).torch_dtype() if dtype else _widest(files.model_directory)
    options = LoadOptions(dtype=chosen, device_map={"": "cpu"})
    sidecar = _canonical(half)
    if half.role == "av":
        save_av(directory, load_av(files, options).model, half.tokenizer, sidecar, dtype=chosen)
    else:
        loaded, head = load_ar(files, half.sidecar, options)
        stored = HeadFile.find(files.directory).dtype
        save_ar(directory, loaded.model, head, half.tokenizer, sidecar, dtype=chosen, head_dtype=stored)
    for pattern in PAPERS:
        for paper in sorted(files.directory.glob(pattern)):
            shutil.copyfile(inside(paper.parent, paper.name), directory / paper.name)
    name = str(chosen).removeprefix("torch.")
    if files.stack:
        logger.info(
            "%s: %d LoRA%s merged into %s, written in %s",
            half.place,
            len(files.stack),
            "s" if len(files.stack) > 1 else "",
            files.base,
            name,
        )
    return Converted(half.role, directory, str(half.place), name, len(files.stack))


def _canonical(half: Half) -> Sidecar:
    """The half's sidecar for its new form; what `ar_meta.json` said is kept in it."""
    extra = dict(half.sidecar.extra)
    if meta := read_ar_meta(half.files.directory, half.files.told):
        extra[AR_META_KEY] = meta
    return half.sidecar.with_(adapter_stack=None, extra=extra)


def _widest(directory: Path) -> torch.dtype:
    """The dtype that holds every stored weight of a directory without loss."""
    names = {tensor.dtype for tensor in WeightIndex.read(directory).tensors.values()}
    known = {TORCH_DTYPES[name] for name in names if name in TORCH_DTYPES} - {torch.float64}
    if len(known) < len(names):
        raise CheckpointError(
            "These weights are stored in a form that is not converted.",
            where=directory,
            got=", ".join(sorted(names)),
            expected="float32, bfloat16 or float16",
            next_step="pass the dtype to write: --dtype bfloat16",
        )
    return known.pop() if len(known) == 1 else torch.float32


def describe(done: Converted) -> str:
    """One line about a written half."""
    merged = f", {done.merged} merged" if done.merged else ""
    return f"{done.role.upper()}: {done.came_from}{merged} -> {done.directory} ({done.dtype})"
