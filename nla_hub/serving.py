"""The command line that serves an AV with vLLM, for engine="remote": everything that must be so is pinned in it.

It is put together from the AV's contract and the headers of its weights, on any machine; vLLM need not be there.
"""

from __future__ import annotations

import ipaddress
import json
import shlex
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

from nla_hub import hub
from nla_hub.architecture import causal_class
from nla_hub.embedding import embedding_names
from nla_hub.engines.base import require_kind
from nla_hub.engines.remote.engine import DTYPES, RemoteEngine
from nla_hub.errors import CheckpointError, WeightsError
from nla_hub.layouts import files_of
from nla_hub.loading import Pair, denies_head
from nla_hub.opening import Half
from nla_hub.pretrained import TORCH_DTYPES, has_tokenizer
from nla_hub.prompts import AVPrompt
from nla_hub.source_text import context_length
from nla_hub.weights import INDEX_NAME, WeightIndex


@dataclass(frozen=True)
class Serving:
    """How to serve an AV.

    Attributes:
        argv: the command's words.
        url: where it then answers, seen from its own machine.
        model: what it calls the AV.
        notes: what a person must know before starting it.
    """

    argv: tuple[str, ...]
    url: str
    model: str
    notes: tuple[str, ...]

    @property
    def command(self) -> str:
        """The command as a shell reads it, one line."""
        return shlex.join(self.argv)

    def to_mapping(self) -> dict[str, Any]:
        """Everything, for JSON."""
        return {"command": self.command, "argv": self.argv, "url": self.url, "model": self.model, "notes": self.notes}


def serving(
    pair: Pair,
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    tensor_parallel: int = 1,
    max_new_tokens: int = 1024,
    dtype: str | None = None,
) -> Serving:
    """The command that serves the AV of an opened pair.

    Args:
        max_new_tokens: the longest answer that there is room for.
        dtype: what to compute in; None: what the embedding table is stored in, as the engine expects it.

    Raises:
        InjectionError: the AV reads its vector in a way that embeddings cannot carry. CheckpointError: vLLM cannot read the AV
            as it lies there. WeightsError, HubError and its children: its headers cannot be read.
    """
    half = pair.av
    assert half is not None, "the AV is opened even where only the AR is wanted"
    require_kind(RemoteEngine, half.sidecar.injection)
    _refuse(_as_it_lies(half), pair.name)
    stored = stored_dtypes(half, pair)
    _refuse(_own_head(half, stored), pair.name)
    _refuse_others(half, pair.name)
    model, revision = _place(half)
    prompt = AVPrompt.build(half.tokenizer, half.sidecar)
    room, limit = len(prompt) + max_new_tokens, context_length(half.config)
    served = half.name if half.checkpoint.ref.kind == "hub" else half.files.directory.resolve().name
    argv = ["python", "-m", "vllm.entrypoints.openai.api_server", "--model", model]
    if revision is not None:
        argv += ["--revision", revision, "--tokenizer-revision", revision]
    if not has_tokenizer(half.files.directory):
        argv += ["--tokenizer", str(half.tokenizer.name_or_path)]
    name = causal_class(half.config)
    if name is not None and name not in (getattr(half.config, "architectures", None) or ()):
        # A config that says nothing, or a wrapper's name, makes vLLM leave the lm_head out.
        argv += ["--hf-overrides", json.dumps({"architectures": [name]})]
    argv += ["--served-model-name", served]
    argv += ["--dtype", dtype or _dtype(half, stored)]
    argv += ["--max-model-len", str(room if limit is None else min(room, limit))]
    argv += ["--enable-prompt-embeds", "--enable-prefix-caching"]
    argv += ["--logprobs-mode", "processed_logprobs", "--generation-config", "vllm"]
    if tensor_parallel > 1:
        argv += ["--tensor-parallel-size", str(tensor_parallel)]
    argv += ["--host", host, "--port", str(port)]
    here = f"http://{'localhost' if _everywhere(host) else f'[{host}]' if ':' in host else host}:{port}"
    return Serving(tuple(argv), here, served, _notes(pair.name, here, host, dtype))


def stored_dtypes(half: Half, pair: Pair) -> dict[str, str]:
    """Every weight of a half's own folder and what it is stored in ("BF16"), from headers alone.

    Raises:
        WeightsError: no safetensors, or damaged ones. HubError and its children.
    """
    checkpoint = half.checkpoint
    if checkpoint.ref.kind != "hub":
        return {name: tensor.dtype for name, tensor in WeightIndex.read(half.files.directory).tensors.items()}
    files = [name for name in files_of(checkpoint.files, half.place) if name.endswith(".safetensors")]
    revision = checkpoint.commit or checkpoint.ref.revision
    found = hub.headers(checkpoint.ref.name, files, revision=revision, options=pair.library.options)
    return {name: dtype for header in found.values() for name, (_, dtype) in header.items()}


def _as_it_lies(half: Half) -> str | None:
    """Why vLLM would not read an AV where and as it is, by its files alone; None where it would."""
    if half.place.form != "model":
        return "This AV is a LoRA: it must be merged before vLLM takes prompts as embeddings for it."
    if half.config.get_text_config() is not half.config:
        return "This AV lies in a multimodal wrapper, and vLLM takes no prompts as embeddings there."
    if half.checkpoint.ref.kind == "hub" and half.place.folder:
        return "This AV lies in a folder of its repository, where vLLM does not look."
    return None


def _own_head(half: Half, stored: Collection[str]) -> str | None:
    """Why vLLM would read an AV as another model than transformers does, by the names of its weights; None where not."""
    if denies_head(half, stored):
        return "This AV has an lm_head of its own that its config denies: vLLM would leave it out."
    return None


def _refuse_others(half: Half, name: str) -> None:
    """Raise a CheckpointError where vLLM would take other files for weights: without an index it reads every safetensors."""
    own = files_of(half.checkpoint.files, half.place)
    beside = [
        file
        for file in half.checkpoint.files
        if file.endswith(".safetensors") and PurePosixPath(file).parent == PurePosixPath(half.place.folder or ".")
    ]
    others = [PurePosixPath(file).name for file in beside if file not in own]
    if others and half.place.path(INDEX_NAME) not in own:
        raise CheckpointError(
            "Beside this AV's weights are files that vLLM would take for weights.",
            where=name,
            got=", ".join(others),
            next_step=f"nla-hub convert {shlex.quote(name)} ./served --half av, then remove them: "
            f"rm {shlex.join(f'./served/av/{file}' for file in others)}, then nla-hub serve-command ./served/av",
        )


def _refuse(why: str | None, name: str) -> None:
    """Raise a CheckpointError where there is a reason."""
    if why is not None:
        raise CheckpointError(
            why,
            where=name,
            next_step=f"nla-hub convert {shlex.quote(name)} ./served --half av (with the same options), then "
            "nla-hub serve-command ./served/av",
        )


def _place(half: Half) -> tuple[str, str | None]:
    """What vLLM calls the AV's files: a repository with its commit, or a directory."""
    ref = half.checkpoint.ref
    if ref.kind == "hub":
        return ref.name, half.checkpoint.commit or ref.revision
    return str(half.files.directory.resolve()), None


def _dtype(half: Half, stored: Mapping[str, str]) -> str:
    """What the embedding table is stored in, as vLLM calls it."""
    kinds = {TORCH_DTYPES.get(stored[name]) for name in embedding_names(stored, half.adapter)}
    named = [name for name, dtype in DTYPES.items() if kinds == {dtype}]
    if len(named) != 1:
        raise WeightsError(
            "It is not clear what this AV computes in.",
            where=half.files.directory,
            next_step="name it: --dtype bfloat16",
        )
    return named[0]


def _everywhere(host: str) -> bool:
    """Whether a server on this address listens on all of them, or on this machine's own name."""
    return host in ("0.0.0.0", "::", "", "localhost")


def _private(host: str) -> bool:
    """Whether an address is reached from its own machine only."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _notes(name: str, url: str, host: str, dtype: str | None) -> tuple[str, ...]:
    told = f" --engine-option dtype={dtype}" if dtype else ""
    use = f'Use it: nla-hub explain "..." --nla {shlex.quote(name)} --engine remote --engine-option url={url}{told}'
    risk = (
        "Whoever reaches this port can hand vLLM serialised tensors, which it unpacks, and can spoil the answers of others "
        "with a NaN: let nobody in whom you do not trust."
    )
    key = (
        "With a key (VLLM_API_KEY in the server's environment, or --api-key) clients need --engine-option api_key=...; "
        "without one leave the server on 127.0.0.1, and reach it from elsewhere by ssh -L."
    )
    if not _private(host):
        return f"Warning: {host} can be reached from other machines. {risk}", key, use
    return risk, key, use
