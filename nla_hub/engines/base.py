"""What an engine is: vectors in, completions out. Everything before (checking, keys) and after (parsing) is shared."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, ClassVar, Literal, Protocol

import torch
from torch import Tensor

from nla_hub.errors import ContextLengthError, InjectionError
from nla_hub.injection import Injector
from nla_hub.pretrained import LoadedModel
from nla_hub.prompts import AVPrompt
from nla_hub.sidecar import Injection
from nla_hub.weights import StoredSlice

Finish = Literal["tag", "eos", "length"]

Reads = Literal["model", "files", "contract"]
"""What an engine wants of an AV: its loaded modules (a `LoadedAV`), its files (a `StoredAV`), or no weights at all, because
they are somewhere else (a `StoredAV` whose directory holds config and tokenizer)."""


@dataclass(frozen=True)
class LoadedAV:
    """An AV ready for an engine: verified weights, tokenizer, its one prompt, and the injector for its site."""

    loaded: LoadedModel
    tokenizer: Any
    prompt: AVPrompt
    injector: Injector

    @property
    def config(self) -> Any:
        """transformers config of the text model."""
        return self.loaded.model.config.get_text_config()

    @property
    def directory(self) -> Path:
        """Where its files are."""
        return self.loaded.directory


@dataclass(frozen=True)
class StoredAV:
    """An AV on disk, for engines that read the weights themselves, and for those whose weights are elsewhere.

    Attributes:
        directory: a complete causal LM without a wrapper: config.json, safetensors whose names, shapes and values were
            verified, tokenizer files. For an engine that reads the contract alone the weights may be absent.
        config: transformers config of the text model.
        dtype: what to compute in.
        scratch: holds `directory` where it was written for this AV alone (a LoRA merged into its base, a text model taken
            out of a wrapper); whoever closes the engine cleans it up.
        embedding: the embedding table [vocabulary, d] on disk (of a LoRA: its base's); calling it fetches the one file that
            holds it, where the weights are elsewhere. Rows are read as they are indexed.
    """

    directory: Path
    config: Any
    tokenizer: Any
    prompt: AVPrompt
    injector: Injector
    dtype: torch.dtype
    scratch: TemporaryDirectory[str] | None = None
    embedding: Callable[[], StoredSlice] | None = None


@dataclass(frozen=True)
class Completion:
    """What the AV wrote for one vector.

    Attributes:
        ids: the new token ids, the stopping one included.
        text: their decoded text, special tokens left out.
        finish: stopped by the closing tag, by an end-of-sequence token, or by the length bound.
        logprobs: log-probability of each new token under the distribution it was drawn from, float32 [len(ids)].
    """

    ids: tuple[int, ...]
    text: str
    finish: Finish
    logprobs: Tensor


class Engine(Protocol):
    """Runs one AV.

    A third party registers a class with this shape under the entry-point group `nla_hub.engines`. It may take keyword-only
    options after the AV: `engine_options` of `NLA.from_pretrained` become those.
    A class attribute `exact_draws = False` says that the uniforms only seed draws of its own (`testing.check_engine` asks).
    """

    name: ClassVar[str]
    kinds: ClassVar[frozenset[str]]
    """Injection kinds that this engine can do; others are refused at construction."""

    reads: ClassVar[Reads] = "model"
    """What its constructor wants to be given."""

    def __init__(self, av: Any) -> None: ...

    def generate(
        self,
        vectors: Tensor,
        draws: Tensor | None,
        *,
        temperature: float,
        max_new_tokens: int,
        batch_size: int,
        progress: Callable[[int], None] | None = None,
    ) -> list[Completion]:
        """One completion for each row of `vectors` (raw float32 [N, d]), in order.

        Args:
            draws: uniforms float64 [N, max_new_tokens], one a token; None is greedy.
        """
        ...

    def probe(self) -> None:
        """Raise an InjectionError unless the vector reaches the logits."""
        ...

    def close(self) -> None:
        """Free what the engine holds besides the AV itself."""
        ...


def require_kind(engine: type[Engine], spec: Injection) -> None:
    """Raise an InjectionError where an engine cannot do an AV's kind of injection."""
    if spec.kind not in engine.kinds:
        raise InjectionError(
            f"The engine {engine.name!r} cannot inject the way this AV was trained.",
            got=f"injection.kind {spec.kind!r}",
            expected=" or ".join(sorted(engine.kinds)),
            next_step='use engine="transformers"',
        )


def require_room(av: Any, new: int, longest: int | None, **details: Any) -> None:
    """Raise a ContextLengthError where an AV's prompt and `new` tokens are more than `longest` (None: no bound).

    `details` are the error's own: where, expected, next_step.
    """
    prompt = len(av.prompt)
    if longest is not None and prompt + new > longest:
        told = {
            "got": f"max_new_tokens={new} after a prompt of {prompt}",
            "expected": f"at most {longest - prompt}",
            "next_step": f"ask for shorter answers: max_new_tokens={longest - prompt}",
            **details,
        }
        raise ContextLengthError("The AV cannot write answers as long as this.", **told)


def probe_vectors(d_model: int, n: int = 2) -> Tensor:
    """A fixed pair of opposite random vectors float32 [n, d] to probe an engine with."""
    one = torch.randn(1, d_model, generator=torch.Generator().manual_seed(0))
    return torch.cat([one, -one])[:n]


def require_sensitive(logprobs: Sequence[Tensor], engine: str) -> None:
    """Raise an InjectionError where two opposite vectors give the same next-token log-probabilities."""
    moved = float((logprobs[0].float() - logprobs[1].float()).abs().max())
    if not moved > PROBE_THRESHOLD:
        raise InjectionError(
            "Two opposite vectors give the same next word: the vector does not reach the model.",
            where=f"engine {engine!r}",
            got=f"largest change of a log-probability {moved:.1e}",
            expected=f"more than {PROBE_THRESHOLD:.0e}",
            next_step="check the marker, its neighbours and the injection scale in the sidecar",
        )


PROBE_THRESHOLD = 1e-5
"""Far above float32 noise (~1e-6) on one next-token distribution, far below any AV that reads its vector (> 0.01)."""
