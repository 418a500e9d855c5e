"""The labeler `source`: the base model describes its own reading, in this process, without an account or a price.

A small model describes worse than a large one and breaks the rules more often; what it costs is time, which all processes
of a run share. The complete model is loaded only where an answer is missing, and freed when the labels are there.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from nla_hub.accelerator import free_memory
from nla_hub.batching import by_length, check_batch_size, pad_id_of, run_batches
from nla_hub.errors import InputError
from nla_hub.sampling import RowKey, choose, uniforms
from nla_hub.source_text import context_length, render_messages, special_tokens
from nla_hub.training.labeling.cache import Answer
from nla_hub.training.labeling.in_process import InProcessLabeler
from nla_hub.training.labeling.prompt import PromptSettings
from nla_hub.training.labeling.run import Missing, PromptedLabeler

if TYPE_CHECKING:
    from torch import Tensor

    from nla_hub.loading import Source

PROMPT_TOKENS = 64 * 1024
"""Tokens of the prompts that run together, padding included: 64 of 1,024. A pass that writes a token reads every weight once,
for however many prompts, so they are bounded by memory alone, and halved where it does not suffice. Untuned."""


@dataclass(frozen=True, kw_only=True)
class SourceSettings(PromptSettings):
    """Settings of the labeler `source`.

    Attributes:
        temperature: 0 is greedy.
        seed: of the draws; a snippet's draws depend on it and on the snippet alone.
        batch_size: prompts that run together at most.
    """

    temperature: float = 0.0
    seed: int = 0
    batch_size: int = 64

    def faults(self) -> Iterator[str]:
        """Numbers out of range."""
        yield from super().faults()
        if not self.temperature >= 0:
            yield f"temperature: got {self.temperature}, expected 0 or more"
        if self.batch_size < 1:
            yield f"batch_size: got {self.batch_size}, expected 1 or more"


class SourceLabeler(InProcessLabeler[SourceSettings], PromptedLabeler[SourceSettings]):
    """Prompts the base model of the run through its chat template."""

    name: ClassVar[str] = "source"
    kind: ClassVar[type[Any]] = SourceSettings
    by_size: ClassVar[bool] = True

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self._source: Source | None = None

    def identity(self) -> dict[str, Any]:
        """The base model and how it is sampled."""
        sampling: dict[str, Any] = {
            "temperature": self.settings.temperature,
            "max_output_tokens": self.settings.max_output_tokens,
        }
        if self.settings.temperature:
            sampling["seed"] = self.settings.seed
        return {"model": self._context.base if self._context else "", "sampling": sampling}

    @property
    def block(self) -> int:
        """What runs together."""
        return self.settings.batch_size

    def write(self, blocks: Sequence[Missing]) -> Iterator[dict[str, Answer]]:
        """What the base model answers; it is loaded for the first of them."""
        keys = [key for block in blocks for key in block]
        prompts = [self.settings.prompt(request) for block in blocks for request in block.values()]
        numbers = iter(range(len(keys)))
        yield from write(self._loaded(), prompts, keys, self.settings, [[next(numbers) for _ in b] for b in blocks])

    def close(self) -> None:
        """Free the model."""
        super().close()
        if self._source is not None:
            self._source = None
            free_memory()

    def _loaded(self) -> Source:
        if self._source is None:
            if self._context is None or self._context.source is None:
                raise InputError(
                    "There is no base model to ask.",
                    where="labeler source",
                    next_step="call open(LabelContext(directory, base=..., source=...)) first",
                )
            self._source = self._context.source()
        return self._source


def write(
    source: Source,
    prompts: Sequence[str],
    keys: Sequence[str],
    settings: SourceSettings,
    blocks: Sequence[Sequence[int]] | None = None,
) -> Iterator[dict[str, Answer]]:
    """What a model answers to prompts, in batches of like length; each answer under its key.

    Args:
        blocks: indices of prompts of which none runs together with one of another block; None: all may.

    Raises:
        TextError: no chat template. InputError: a prompt that leaves no room for an answer.
    """
    check_batch_size(settings.batch_size)
    ids = [array("i", _encoded(source, prompt, settings)) for prompt in prompts]
    batches = [
        [block[i] for i in batch]
        for block in (blocks if blocks is not None else [range(len(ids))])
        for batch in by_length([len(ids[i]) for i in block], settings.batch_size, PROMPT_TOKENS)
    ]
    for batch, answers in run_batches(
        batches, lambda rows: _batch(source, [ids[i].tolist() for i in rows], [keys[i] for i in rows], settings)
    ):
        yield {keys[i]: answer for i, answer in zip(batch, answers, strict=True)}


def _encoded(source: Source, prompt: str, settings: SourceSettings) -> list[int]:
    """A prompt as one user turn. Special tokens in it are broken by a space: they are text here, never structure."""
    tokenizer = source.tokenizer
    for token in special_tokens(tokenizer).values():
        if len(token) > 1:
            prompt = prompt.replace(token, f"{token[0]} {token[1:]}")
    text = render_messages(
        tokenizer,
        [{"role": "user", "content": prompt}],
        add_generation_prompt=True,
        where="labeler source",
    )
    ids = [int(i) for i in tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]]
    limit = context_length(source.loaded.model.config)
    if limit is not None and len(ids) + settings.max_output_tokens > limit:
        raise InputError(
            "The prompt leaves no room for an answer.",
            where="labeler source",
            got=f"{len(ids)} + {settings.max_output_tokens} tokens",
            expected=f"at most {limit}",
            next_step="lower labels.settings.snippet_chars or max_output_tokens",
        )
    return ids


def _batch(source: Source, rows: list[list[int]], keys: Sequence[str], settings: SourceSettings) -> list[Answer]:
    """The answers to a batch of prompts; padded on the left, so that all of them end where the answers begin."""
    import torch
    from transformers import GenerationConfig

    from nla_hub.engines.endings import eos_ids

    model, tokenizer = source.loaded.model, source.tokenizer
    eos = eos_ids(tokenizer, model.config, getattr(model, "generation_config", None))
    pad, longest = pad_id_of(tokenizer), max(len(row) for row in rows)
    device = next(source.loaded.adapter.embedding_module(model).parameters()).device
    ids = torch.tensor([[pad] * (longest - len(row)) + row for row in rows], device=device)
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows], device=device)
    # Said in full, because what is left out is taken from the model's own defaults.
    plain = GenerationConfig(
        do_sample=False,
        num_beams=1,
        max_new_tokens=settings.max_output_tokens,
        repetition_penalty=1.0,
        eos_token_id=sorted(eos) or None,
        pad_token_id=pad,
    )
    draws = None
    if settings.temperature:
        keyed = [RowKey(key) for key in keys]
        draws = uniforms(settings.seed, keyed, settings.max_output_tokens)
    with torch.inference_mode():
        out = model.generate(
            input_ids=ids,
            attention_mask=mask,
            generation_config=plain,
            logits_processor=_processors(draws, settings.temperature, longest),
        )
    return [_answer(tokenizer, row, new[longest:].tolist(), eos, settings) for row, new in zip(rows, out, strict=True)]


def _answer(tokenizer: Any, prompt: list[int], new: list[int], eos: frozenset[int], settings: SourceSettings) -> Answer:
    end = next((i for i, token in enumerate(new) if token in eos), len(new))
    finish = "stop" if end < len(new) else "length"
    text = str(tokenizer.decode(new[:end], skip_special_tokens=True))
    return Answer(text, finish, len(prompt), min(end + 1, len(new)))


def _processors(draws: Tensor | None, temperature: float, start: int) -> Any:
    """Our own draws inside `generate`: the token that a row's stream chooses is the only one left."""
    import torch
    from transformers import LogitsProcessor, LogitsProcessorList

    if draws is None:
        return LogitsProcessorList()
    streams = draws

    class Draws(LogitsProcessor):
        def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
            chosen, _ = choose(scores, streams[:, input_ids.shape[1] - start], temperature)
            return torch.full_like(scores, -torch.inf).scatter_(1, chosen[:, None], 0.0)

    return LogitsProcessorList([Draws()])
