"""What a server's answer must hold, before anything is made of it; all else is a `ServerError` that says what was there."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from nla_hub.engines.base import Completion
from nla_hub.engines.endings import Endings
from nla_hub.engines.remote.transport import ServerError

ROUNDING = 1e-3
"""How far above 0 a log-probability may be: float32 sums of a vocabulary end a little above 1."""

START = "start the server as nla-hub serve-command NLA says"


@dataclass(frozen=True)
class Served:
    """The model that a server answers with, and the tokens that it reads at most (None where it does not say)."""

    name: str
    max_model_len: int | None


def served_model(answer: Any, wanted: str | None) -> Served:
    """The model that is called `wanted`, or the only one, from what `/v1/models` says."""
    models = {str(one.get("id")): one for one in field(answer, "data", list) if isinstance(one, dict)}
    if wanted is None and len(models) != 1:
        raise ServerError(
            f"The server has {len(models)} models.",
            got=", ".join(models) or None,
            next_step='name the AV: engine_options={"model": "..."} (--engine-option model=...)',
        )
    name = next(iter(models)) if wanted is None else wanted
    if name not in models:
        raise ServerError(
            f"The server has no model called {name!r}.",
            got=", ".join(models) or "none",
            next_step="leave model out where the server has one alone, or name one of these",
        )
    length = models[name].get("max_model_len")
    return Served(name, length if isinstance(length, int) else None)


def choices(answer: Any, n: int) -> list[Mapping[str, Any]]:
    """The answers of one request, in the order of its `n` prompts."""
    given = field(answer, "choices", list)
    found = {one.get("index"): one for one in given if isinstance(one, dict)}
    if len(given) != n or set(found) != set(range(n)):
        raise unusable("choices", f"{len(given)} of them", f"one for each of {n} prompts")
    return [found[i] for i in range(n)]


def completion(choice: Mapping[str, Any], endings: Endings, *, vocabulary: int, max_new_tokens: int) -> Completion:
    """One answer, ended where engine="transformers" would have ended it.

    Args:
        vocabulary: ids are below this.
    """
    said, why = field(choice, "token_ids", list), choice.get("finish_reason")
    logprobs = field(field(choice, "logprobs", dict), "token_logprobs", list)
    if not said or not all(type(i) is int and 0 <= i < vocabulary for i in said):
        raise unusable("token_ids", str(said)[:80], "ids of the AV's vocabulary")
    if len(logprobs) != len(said):
        raise unusable("token_logprobs", f"{len(logprobs)} of them", f"one for each of {len(said)} tokens")
    if not all(_is_number(p) and p <= ROUNDING for p in logprobs):
        raise unusable("token_logprobs", str(logprobs)[:80], "log-probabilities")
    ids, finish = endings.cut(said)
    if finish is None and (why != "length" or len(ids) != max_new_tokens):
        got = f"{why!r} after {len(said)} tokens"
        raise unusable("finish_reason", got, f"an end that was asked for, or {max_new_tokens} tokens")
    values = torch.tensor(logprobs[: len(ids)], dtype=torch.float32)
    return Completion(ids, endings.text(ids), finish or "length", values)


def likeliest(choice: Mapping[str, Any]) -> dict[int, float]:
    """The likeliest first tokens of an answer, each with its log-probability; at least two."""
    steps = field(field(choice, "logprobs", dict), "top_logprobs", list)
    likely = steps[0] if steps and isinstance(steps[0], dict) else {}
    named = {re.fullmatch(r"token_id:(\d+)", name): logprob for name, logprob in likely.items()}
    found = {int(token[1]): float(logprob) for token, logprob in named.items() if token and _is_number(logprob)}
    if len(found) < max(2, len(likely)):
        raise unusable("top_logprobs", str(likely)[:80], 'finite numbers by "token_id:N"')
    return found


def distance(a: Mapping[int, float], b: Mapping[int, float]) -> float:
    """How far the likeliest tokens of `a` are from where they are in `b`: a mean of log-probabilities.

    What is not among the likeliest of `b` is at most as likely as the last of them.
    """
    least = min(b.values())
    return sum(abs(value - b.get(token, least)) for token, value in a.items()) / len(a)


def field(answer: Any, name: str, kind: type) -> Any:
    """A part of an answer, which must be of a JSON kind."""
    value = answer.get(name) if isinstance(answer, dict) else None
    if not isinstance(value, kind):
        raise unusable(name, type(value).__name__, f"a {kind.__name__}")
    return value


def unusable(what: str, got: str, expected: str) -> ServerError:
    """The error for an answer that is not what was asked for."""
    return ServerError(
        f"The server's answer cannot be used: {what}.",
        got=got,
        expected=expected,
        next_step=f"{START}; it must be vLLM 0.31 or newer",
    )


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
