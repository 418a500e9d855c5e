"""Training the tiny source language model from nothing, on documents of the tiny world."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random

import torch
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from nla_hub.export import save_source
from nla_hub.tiny.labels import label_texts
from nla_hub.tiny.tokenizer import build_tokenizer
from nla_hub.tiny.world import documents
from nla_hub.training.loop import checkpoint_interval
from nla_hub.training.state import TrainingState

__all__ = ["SourceSettings", "train_source"]

Progress = Callable[[dict[str, float]], None]


@dataclass(frozen=True)
class SourceSettings:
    """The recipe of the tiny source model. Sizes in numbers, `lr` per step, `steps` in optimizer steps."""

    hidden_size: int = 128
    layers: int = 4
    heads: int = 4
    mlp_size: int = 256
    documents: int = 64_000
    steps: int = 2_000
    batch_documents: int = 32
    lr: float = 6e-3
    warmup: float = 0.05
    final_lr: float = 0.02
    weight_decay: float = 0.05
    betas: tuple[float, float] = (0.9, 0.95)
    clip: float = 1.0
    max_length: int = 512
    tokenizer_documents: int = 4_000
    # The tokenizer learns from a stream of its own, so that models of all seeds share one vocabulary.
    tokenizer_seed: int = 0


def train_source(
    out_dir: str | Path,
    *,
    seed: int = 0,
    settings: SourceSettings | None = None,
    progress: Progress | None = None,
    state: TrainingState | None = None,
) -> Path:
    """Train tokenizer and model, save both to `out_dir` as an ordinary Hugging Face directory, and return it.

    Where `state` has a checkpoint of this training, it is continued.
    """
    settings = settings or SourceSettings()
    out_dir = Path(out_dir)
    tokenizer = make_tokenizer(settings)
    model = make_model(settings, tokenizer, seed)
    fit(model, tokenizer, settings, seed, progress, state)
    save(model, tokenizer, out_dir)
    return out_dir


def make_tokenizer(settings: SourceSettings) -> PreTrainedTokenizerFast:
    """The tokenizer of the tiny world's documents and labels."""
    docs = documents(settings.tokenizer_documents, settings.tokenizer_seed)
    return build_tokenizer([d.text for d in docs] + label_texts(docs[:1500]), max_length=settings.max_length)


def make_model(settings: SourceSettings, tokenizer: PreTrainedTokenizerFast, seed: int) -> LlamaForCausalLM:
    """A fresh model, float32."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=settings.hidden_size,
        intermediate_size=settings.mlp_size,
        num_hidden_layers=settings.layers,
        num_attention_heads=settings.heads,
        num_key_value_heads=settings.heads,
        max_position_embeddings=settings.max_length,
        tie_word_embeddings=True,
        initializer_range=settings.hidden_size**-0.5 / 2,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaForCausalLM(config)


def encode(tokenizer: PreTrainedTokenizerFast, texts: list[str], chat: list[bool]) -> list[list[int]]:
    """Token ids of each text with BOS (rendered chats bring their own) and EOS."""
    rows = tokenizer(texts, add_special_tokens=False)["input_ids"]
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    return [[*([] if own else [bos]), *row, eos] for row, own in zip(rows, chat, strict=True)]


def batches(rows: list[list[int]], size: int, pad: int, rng: Random) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Endless batches of similar length: ids [B, T], right-padded, and targets [B * (T-1)] with -100 for padding.

    Right padding under a causal mask needs no attention mask, which keeps the fast attention path.
    """
    while True:
        order = list(range(len(rows)))
        rng.shuffle(order)
        pool = size * 50
        groups: list[list[int]] = []
        for start in range(0, len(order), pool):
            part = sorted(order[start : start + pool], key=lambda i: len(rows[i]))
            groups += [part[a : a + size] for a in range(0, len(part) - size + 1, size)]
        rng.shuffle(groups)
        for group in groups:
            width = max(len(rows[i]) for i in group)
            ids = torch.full((len(group), width), pad, dtype=torch.long)
            for line, i in enumerate(group):
                ids[line, : len(rows[i])] = torch.tensor(rows[i])
            targets = ids[:, 1:].masked_fill(ids[:, 1:] == pad, -100)
            yield ids[:, :-1], targets


def learning_rate(step: int, settings: SourceSettings) -> float:
    """Linear warm-up, then a cosine down to `final_lr` times the peak."""
    warm = max(1, int(settings.warmup * settings.steps))
    if step < warm:
        return settings.lr * (step + 1) / warm
    done = (step - warm) / max(1, settings.steps - warm)
    return settings.lr * (settings.final_lr + (1 - settings.final_lr) * 0.5 * (1 + math.cos(math.pi * done)))


def fit(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    settings: SourceSettings,
    seed: int,
    progress: Progress | None = None,
    state: TrainingState | None = None,
) -> float:
    """Next-token training, from the last checkpoint of `state` on; returns the mean loss of the last 50 steps, nats a token."""
    docs = documents(settings.documents, seed)
    rows = encode(tokenizer, [d.text for d in docs], [not isinstance(d.content, str) for d in docs])
    stream = batches(rows, settings.batch_documents, int(tokenizer.pad_token_id), Random(seed))
    matrices = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": settings.weight_decay}, {"params": others, "weight_decay": 0.0}],
        lr=settings.lr,
        betas=settings.betas,
    )
    model.train()
    begun, recent, seconds = 0, 0.0, 0.0
    if state is not None and (found := state.load()) is not None:
        begun, content = found
        model.load_state_dict(content["model"])
        optimizer.load_state_dict(content["optimizer"])
        recent, seconds = content["recent"], content["seconds"]
        for _ in range(begun):
            next(stream)
    started = time.perf_counter() - seconds
    every = checkpoint_interval(settings.steps)
    for step in range(begun, settings.steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, settings)
        ids, targets = next(stream)
        hidden = model.model(ids, use_cache=False).last_hidden_state
        keep = targets != -100
        loss = torch.nn.functional.cross_entropy(model.lm_head(hidden[keep]), targets[keep])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), settings.clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        recent = loss.item() if step == 0 else 0.98 * recent + 0.02 * loss.item()
        if progress is not None and (step % 50 == 49 or step + 1 == settings.steps):
            progress({"step": step + 1, "loss": recent, "seconds": time.perf_counter() - started})
        if state is not None and (step + 1) % every == 0 and step + 1 < settings.steps:
            content = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "recent": recent}
            state.save(step + 1, {**content, "seconds": time.perf_counter() - started})
    model.eval()
    return recent


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, out_dir: Path) -> None:
    """Write config, fp16 weights, tokenizer and generation config."""
    ends = [tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<|end|>")]
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id, eos_token_id=ends, pad_token_id=tokenizer.pad_token_id
    )
    save_source(out_dir, model, tokenizer, dtype=torch.float16)
