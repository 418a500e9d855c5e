"""What the parts of a pair that is not loaded yet, or not even downloaded, will take: headers -> `memory.PartSize`.

Headers are read from the files that are here, and requested from the Hub for those that are not; no weights are downloaded.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any

import torch

from nla_hub import hub
from nla_hub.adapters import adapter_for
from nla_hub.errors import WeightsError
from nla_hub.hardware import free_memory
from nla_hub.layouts import ADAPTER_WEIGHTS_NAME, AR_LORA_NAME
from nla_hub.library import Checkpoint, Under
from nla_hub.loading import Pair
from nla_hub.locate import Ref
from nla_hub.memory import Header, Mode, PartSize, Quantization, Workload, choose, part_size
from nla_hub.opening import Half
from nla_hub.pretrained import LoadOptions, load_config
from nla_hub.prompts import AVPrompt
from nla_hub.weights import HEAD_NAME, INDEX_NAME, WEIGHTS_NAME, read_header

_SHARD = re.compile(r"model-[\w-]+\.safetensors")


def pair_sizes(pair: Pair, options: LoadOptions, *, source: bool = True) -> list[PartSize]:
    """The wanted halves of an opened pair and, where it is known, its source cut to the site.

    Raises:
        WeightsError: a file without a readable header. HubError and its children: headers that had to be requested.
        CheckpointError: files that no size can be told from.
    """
    halves = [half for half in (pair.av, pair.ar) if half is not None and half.role in pair.wanted]
    sizes = [half_size(half, options) for half in halves]
    if source and pair.base is not None:
        sizes.append(source_size(pair.base, pair, options))
    return sizes


def choose_mode(
    pair: Pair, options: LoadOptions, work: Workload | None = None, *, elsewhere: Collection[str] = ()
) -> Mode:
    """What `memory="auto"` takes for an opened pair: "resident" where everything fits into what is free, else "staged".

    `elsewhere` are the halves that some other machine runs.

    Nobody is asked over the network: a source that is not here counts as its AV's equal up to the site (the AV is a
    fine-tune of it, or lies on it), and is left out where only one half is wanted.

    Raises:
        WeightsError: a half whose headers cannot be read.
    """
    sizes = pair_sizes(replace(pair, wanted=pair.wanted - set(elsewhere)), options, source=False)
    half = pair.av if "av" in pair.wanted else pair.ar
    if len(pair.wanted) == 2 and half is not None:
        sizes.append(_like_source(half, options))
    return choose(sizes, workload_of(pair, work), free_memory(device_of(options)), on_cpu=options.on_cpu())


def _like_source(half: Half, options: LoadOptions) -> PartSize:
    """A source cut to the site, by the complete model that a half is or lies on."""
    under = half.under or Under(half.checkpoint, half.place.folder)
    header = _headers(under.checkpoint, _model_files(under.checkpoint, under.folder))
    return part_size("source", header, half.config, half.adapter, site=half.sidecar.site, **_how(options))


def device_of(options: LoadOptions) -> torch.device:
    """The device that most is asked of: the first of the device map, or the first accelerator for "auto"."""
    place = options.placement()
    if isinstance(place, dict) and place:
        first = next(iter(place.values()))
        return torch.device(first if not isinstance(first, int) else f"cuda:{first}") if first != "disk" else _CPU
    if isinstance(place, (str, torch.device)) and str(place).split(":")[0] in ("cpu", "cuda", "mps", "xpu"):
        return torch.device(place)
    return torch.accelerator.current_accelerator() or _CPU if torch.accelerator.is_available() else _CPU


_CPU = torch.device("cpu")


def half_size(half: Half, options: LoadOptions) -> PartSize:
    """One half; a LoRA with what it lies on."""
    folder = half.place.folder
    names = set(half.checkpoint.files)
    head = _headers(half.checkpoint, [half.place.path(HEAD_NAME)]) if half.place.path(HEAD_NAME) in names else None
    common: dict[str, Any] = {**_how(options), "site": half.sidecar.site, "head": head}
    if half.place.form == "model":
        header = _headers(half.checkpoint, _model_files(half.checkpoint, folder))
        return part_size(half.role, header, half.config, half.adapter, **common)
    factors: dict[str, tuple[tuple[int, ...], str]] = {}
    for place in half.files.stack or (half.files.directory,):
        inside = _folder_in(half, place)
        own = [name for n in (ADAPTER_WEIGHTS_NAME, AR_LORA_NAME) if (name := f"{inside}{n}") in names][:1]
        factors |= {f"{inside}{n}": spec for n, spec in _headers(half.checkpoint, own).items()}
    assert half.under is not None
    header = _headers(half.under.checkpoint, _model_files(half.under.checkpoint, half.under.folder))
    return part_size(half.role, header, half.config, half.adapter, factors=factors, **common)


def source_size(base: Ref, pair: Pair, options: LoadOptions, *, complete: bool = False) -> PartSize:
    """The base model: up to block K for capture, or complete for steering."""
    half = pair.av or pair.ar
    assert half is not None
    checkpoint = pair.library.open(base)
    directory = Under(checkpoint, base.subfolder).fetch(weights=False)
    config = load_config(directory, trust_remote_code=options.trust_remote_code)
    header = _headers(checkpoint, _model_files(checkpoint, base.subfolder))
    adapter = adapter_for(config)
    return part_size("source", header, config, adapter, site=pair.sidecar.site, complete=complete, **_how(options))


def workload_of(pair: Pair, work: Workload | None = None) -> Workload:
    """A workload with the lengths of the pair's own prompts."""
    work = work or Workload()
    if pair.av is None or "av" not in pair.wanted:
        return work
    prompt = AVPrompt.build(pair.av.tokenizer, pair.av.sidecar)
    return replace(work, prompt=len(prompt), shared=prompt.marker_position)


def quantization_of(config: Any) -> Quantization | None:
    """What a `quantization_config` (an object or a mapping) of bitsandbytes packs weights into; None for anything else."""
    if config is None:
        return None
    values = config if isinstance(config, Mapping) else vars(config)

    def on(key: str) -> bool:
        return bool(values.get(key) or values.get(f"_{key}"))

    return "nf4" if on("load_in_4bit") else "int8" if on("load_in_8bit") else None


def _how(options: LoadOptions) -> dict[str, Any]:
    return {
        "dtype": options.torch_dtype(),
        "quantization": quantization_of(options.quantization_config),
        "on_cpu": options.on_cpu(),
    }


def _folder_in(half: Half, directory: Any) -> str:
    """The folder of a LoRA of a stack inside its checkpoint, with its slash."""
    if directory == half.files.directory:
        return half.place.path("")
    root = half.files.directory
    for _ in [part for part in half.place.folder.split("/") if part]:
        root = root.parent
    inside = directory.relative_to(root).as_posix()
    return "" if inside == "." else f"{inside}/"


def _model_files(checkpoint: Checkpoint, folder: str) -> list[str]:
    """The files of a complete model in a folder: what transformers would load."""
    prefix = f"{folder}/" if folder else ""
    names = [n.removeprefix(prefix) for n in checkpoint.files if n.startswith(prefix)]
    if WEIGHTS_NAME in names:
        return [prefix + WEIGHTS_NAME]
    shards = sorted(n for n in names if _SHARD.fullmatch(n))
    if not shards:
        raise WeightsError(
            "No weights whose size could be told were found here.",
            where=f"{checkpoint.ref}{'/' + folder if folder else ''}",
            expected=f"{WEIGHTS_NAME}, or {INDEX_NAME} with its shards",
        )
    return [prefix + n for n in shards]


def _headers(checkpoint: Checkpoint, names: list[str]) -> Header:
    """All tensors of some files together."""
    found: dict[str, tuple[tuple[int, ...], str]] = {}
    if checkpoint.ref.kind == "hub":
        revision = checkpoint.ref.revision or checkpoint.commit
        for header in hub.headers(checkpoint.ref.name, names, revision=revision, options=checkpoint.options).values():
            found |= header
        return found
    root = checkpoint.fetch(names)
    for name in names:
        found |= {n: (t.shape, t.dtype) for n, t in read_header(root / name).items()}
    return found
