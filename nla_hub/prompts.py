"""Rendering and tokenising: source texts for capture, AV prompts, AR prompts; parsing of explanations.

Three rules, one home each: `encode_source`, `AVPrompt.build`, `ARPrompt`. Templates come from strangers' repositories
and are filled by literal replacement, never with `str.format`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from nla_hub.errors import ContextLengthError, InjectionError, InputError, SidecarError, TextError
from nla_hub.sidecar import EXPLANATION_PLACEHOLDER, INJECTION_PLACEHOLDER, MarkerTokens, Sidecar

Message = Mapping[str, Any]
Content = str | Sequence[Message]
Overflow = Literal["error", "truncate", "stride"]
Status = Literal["ok", "truncated", "no_tags", "empty"]

OPENING_TAG = "<explanation>"
CLOSING_TAG = "</explanation>"


# -- rule 1: source texts ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Encoded:
    """One source text as the model reads it.

    Attributes:
        text: the exact string that was encoded (for messages: the rendered conversation).
        ids: token ids, BOS included.
        offsets: character span of each token in `text` ((0, 0) for tokens added around it).
        special: whether each token is a special one.
        roles: role of the message whose content each token stands in, None outside contents and in raw text.
        start: index of `ids[0]` in the whole sequence (> 0 only in later pieces of overflow="stride").
    """

    text: str
    ids: tuple[int, ...]
    offsets: tuple[tuple[int, int], ...]
    special: tuple[bool, ...]
    roles: tuple[str | None, ...]
    start: int = 0

    def __len__(self) -> int:
        return len(self.ids)


def encode_source(
    tokenizer: Any,
    content: Content,
    *,
    parse_special_tokens: bool = False,
    max_length: int | None = None,
    overflow: Overflow = "error",
    where: str = "text",
) -> list[Encoded]:
    """Encode one text or conversation for capture; several pieces only with overflow="stride".

    Raw text is encoded with BOS where the tokenizer has one; special-token strings inside it stay text unless
    `parse_special_tokens`. Messages go through the chat template without a generation prompt and are encoded as
    rendered; special-token strings inside their content are refused unless `parse_special_tokens`.

    Raises:
        TextError: empty, not text, no chat template, special tokens inside content.
        ContextLengthError: longer than `max_length` with overflow="error".
    """
    if overflow not in ("error", "truncate", "stride"):
        raise TextError("Unknown overflow rule.", got=repr(overflow), expected="'error', 'truncate' or 'stride'")
    if isinstance(content, str):
        if not content:
            raise TextError(
                "The text is empty: there is no token to explain.",
                where=where,
                next_step="drop empty rows before capturing",
            )
        _require_encodable(content, where)
        text, messages = content, None
        batch = tokenizer(
            text,
            add_special_tokens=True,
            split_special_tokens=not parse_special_tokens,
            return_offsets_mapping=True,
            verbose=False,
        )
    else:
        messages = check_messages(content, where=where)
        text = render_messages(tokenizer, messages, parse_special_tokens=parse_special_tokens, where=where)
        batch = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    ids = [int(i) for i in batch["input_ids"]]
    offsets = [(int(a), int(b)) for a, b in batch["offset_mapping"]]
    # A token counts as special by its id, except where raw text merely spelled it: those ids are never special then.
    known = special_tokens(tokenizer)
    special = [i in known for i in ids]
    roles: list[str | None] = [None] * len(ids)
    if messages is not None:
        roles = _roles(messages, _content_spans(tokenizer, messages, text), offsets, special)
    pieces = _pieces(len(ids), max_length, overflow, where)
    return [
        Encoded(
            text,
            tuple(ids[a:b]),
            tuple(offsets[a:b]),
            tuple(special[a:b]),
            tuple(roles[a:b]),
            start=a,
        )
        for a, b in pieces
    ]


def special_tokens(tokenizer: Any) -> dict[int, str]:
    """Id -> text of every token that the model reads as structure.

    Wider than the tokenizer's `all_special_tokens`: Llama 3 and Gemma list their turn markers only among added tokens.
    """
    listed = dict(zip(tokenizer.all_special_ids, map(str, tokenizer.all_special_tokens), strict=True))
    added = getattr(tokenizer, "added_tokens_decoder", {})
    return listed | {int(i): str(token.content) for i, token in added.items() if token.special}


def check_messages(content: object, *, where: str = "messages") -> list[dict[str, Any]]:
    """A conversation as a list of {"role", "content"} with text contents; raises a TextError otherwise."""
    expected = 'a text, or a list of {"role": ..., "content": ...}'
    if not isinstance(content, Sequence) or isinstance(content, (str, bytes)):
        raise TextError(
            "This is neither a text nor a conversation.", where=where, got=type(content).__name__, expected=expected
        )
    if not content:
        raise TextError("The conversation has no messages.", where=where, expected=expected)
    messages: list[dict[str, Any]] = []
    for i, message in enumerate(content):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise TextError(
                "This message has no role.", where=f"{where}, message {i}", got=repr(message)[:80], expected=expected
            )
        if not isinstance(message.get("content"), str):
            raise TextError(
                "Only text contents can be explained.",
                where=f"{where}, message {i} ({message['role']})",
                got=type(message.get("content")).__name__,
                expected="a string",
            )
        _require_encodable(message["content"], f"{where}, message {i}")
        messages.append(dict(message))
    return messages


def render_messages(
    tokenizer: Any,
    messages: Sequence[Message],
    *,
    parse_special_tokens: bool = False,
    add_generation_prompt: bool = False,
    where: str = "messages",
) -> str:
    """The conversation as the model's chat template writes it (a string, not ids)."""
    template = getattr(tokenizer, "chat_template", None)
    if not template:
        raise TextError(
            "This model has no chat template, so it cannot read messages.",
            where=where,
            next_step="pass a plain text, or use the instruct version of the model",
        )
    if not parse_special_tokens:
        special = set(special_tokens(tokenizer).values())
        for i, message in enumerate(messages):
            found = sorted(token for token in special if token in message["content"])
            if found:
                raise TextError(
                    "A special token stands inside the content: the model would read it as structure, not as text.",
                    where=f"{where}, message {i} ({message['role']})",
                    got=", ".join(found),
                    next_step="remove it, or pass parse_special_tokens=True if that is what you mean",
                )
    extra = {"enable_thinking": False} if "enable_thinking" in str(template) else {}
    try:
        rendered = tokenizer.apply_chat_template(
            [dict(m) for m in messages], tokenize=False, add_generation_prompt=add_generation_prompt, **extra
        )
    except Exception as cause:  # jinja templates raise anything they like
        raise TextError(f"The chat template refuses this conversation: {cause}", where=where) from cause
    return str(rendered)


def _require_encodable(text: str, where: str) -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as cause:
        raise TextError(
            "The text holds a lone surrogate, which no tokenizer can encode.",
            where=where,
            got=repr(text[cause.start : cause.end]),
            next_step='clean it with text.encode("utf-8", "replace").decode()',
        ) from cause


def _roles(
    messages: Sequence[Message],
    spans: Sequence[tuple[int, int] | None],
    offsets: Sequence[tuple[int, int]],
    special: Sequence[bool],
) -> list[str | None]:
    roles: list[str | None] = [None] * len(offsets)
    for message, span in zip(messages, spans, strict=True):
        if span is None:
            continue
        for i, (a, b) in enumerate(offsets):
            if a < span[1] and b > span[0] and a < b and not special[i]:
                roles[i] = str(message["role"])
    return roles


def _content_spans(tokenizer: Any, messages: Sequence[Message], text: str) -> list[tuple[int, int] | None]:
    """Where each message's content stands in the rendered conversation `text` (None where it does not).

    The template may spell the same words itself (a default system prompt, a role's name), so its own parts are learnt
    from rendering placeholders. Where it then writes contents differently (drops reasoning, say) they are searched for.
    """
    placeholders = [f"\ue000{i}\ue001" for i in range(len(messages))]
    try:
        skeleton = render_messages(
            tokenizer,
            [{**m, "content": p} for m, p in zip(messages, placeholders, strict=True)],
            parse_special_tokens=True,
        )
    except TextError:
        skeleton = ""
    pattern, cursor, found = "", 0, []
    for i, (message, placeholder) in enumerate(zip(messages, placeholders, strict=True)):
        if (begin := skeleton.find(placeholder, cursor)) < 0:
            continue
        contents = dict.fromkeys((message["content"], message["content"].strip()))  # many templates strip contents
        pattern += re.escape(skeleton[cursor:begin]) + f"({'|'.join(map(re.escape, contents))})"
        cursor = begin + len(placeholder)
        found.append(i)
    spans: list[tuple[int, int] | None] = [None] * len(messages)
    if match := re.fullmatch(pattern + re.escape(skeleton[cursor:]), text):
        for group, i in enumerate(found, 1):
            spans[i] = match.span(group)
        return spans
    cursor = 0
    for i, message in enumerate(messages):
        for content in (message["content"], message["content"].strip()):
            if content and (begin := text.find(content, cursor)) >= 0:
                cursor = begin + len(content)
                spans[i] = (begin, cursor)
                break
    return spans


def _pieces(length: int, max_length: int | None, overflow: Overflow, where: str) -> list[tuple[int, int]]:
    if max_length is None or length <= max_length:
        return [(0, length)]
    if overflow == "truncate":
        return [(0, max_length)]
    if overflow == "stride":
        return [(a, min(a + max_length, length)) for a in range(0, length, max_length)]
    raise ContextLengthError(
        "The text is longer than the model reads.",
        where=where,
        got=f"{length} tokens",
        expected=f"at most {max_length}",
        next_step='shorten it, or pass overflow="truncate" (keep the beginning) or "stride" (independent pieces)',
    )


def context_length(config: Any) -> int | None:
    """Tokens that a model reads at most, from its config (None where it does not say)."""
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    value = getattr(text, "max_position_embeddings", None)
    return int(value) if value else None


# -- rule 2: the AV prompt -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class AVPrompt:
    """The one prompt of an AV: all its rows are these ids, except the embedding at `marker_position`."""

    ids: tuple[int, ...]
    marker_position: int
    text: str

    @classmethod
    def build(cls, tokenizer: Any, sidecar: Sidecar) -> AVPrompt:
        """Render the sidecar's AV template as one user turn and find the marker.

        Raises:
            SidecarError: the marker, its neighbours or the template do not fit this tokenizer; all faults at once.
        """
        faults = av_faults(tokenizer, sidecar)
        if faults or sidecar.marker is None or sidecar.av_template is None:
            raise SidecarError(
                "The AV's prompt does not fit its tokenizer.",
                faults=faults,
                next_step="check that tokenizer and sidecar come from the same training run",
            )
        text = render_av_prompt(tokenizer, sidecar)
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        return cls(tuple(ids), marker_positions(ids, sidecar.marker)[0], text)

    def __len__(self) -> int:
        return len(self.ids)


def render_av_prompt(tokenizer: Any, sidecar: Sidecar) -> str:
    """The AV's template with its marker, as one user turn through the chat template, ready for the answer."""
    assert sidecar.marker is not None and sidecar.av_template is not None
    content = sidecar.av_template.replace(INJECTION_PLACEHOLDER, sidecar.marker.char)
    return render_messages(
        tokenizer, [{"role": "user", "content": content}], parse_special_tokens=True, add_generation_prompt=True
    )


def marker_positions(ids: Sequence[int], marker: MarkerTokens) -> list[int]:
    """Positions of the marker with both of its neighbours beside it."""
    return [
        i
        for i in range(1, len(ids) - 1)
        if ids[i] == marker.id and ids[i - 1] == marker.left_id and ids[i + 1] == marker.right_id
    ]


def av_faults(tokenizer: Any, sidecar: Sidecar) -> list[str]:
    """What disagrees between an AV's sidecar and its tokenizer."""
    marker = sidecar.marker
    if marker is None:
        return ["tokens: the sidecar names no injection marker"]
    if sidecar.av_template is None:
        return ["prompt_templates.av: missing"]
    faults = []
    alone = tokenizer(marker.char, add_special_tokens=False)["input_ids"]
    if len(alone) != 1:
        faults.append(f"tokens.injection_char: {marker.char!r} is {len(alone)} tokens here ({alone}), expected one")
    elif alone[0] != marker.id:
        faults.append(f"tokens.injection_token_id: the sidecar says {marker.id}, the tokenizer {alone[0]}")
    ids = tokenizer(render_av_prompt(tokenizer, sidecar), add_special_tokens=False)["input_ids"]
    places = [i for i, token in enumerate(ids) if len(alone) == 1 and token == alone[0]]
    if len(places) != 1:
        faults.append(
            f"prompt_templates.av: the marker stands {len(places)} times in the rendered prompt, expected once"
        )
    elif not 0 < places[0] < len(ids) - 1:
        faults.append("prompt_templates.av: the marker stands at an end of the prompt, where it has only one neighbour")
    else:
        left, right = ids[places[0] - 1], ids[places[0] + 1]
        for side, got, said in (("left", left, marker.left_id), ("right", right, marker.right_id)):
            if got != said:
                faults.append(
                    f"tokens.injection_{side}_neighbor_id: the sidecar says {said}, the rendered prompt has {got}"
                )
    bos = getattr(tokenizer, "bos_token_id", None)
    if bos is not None and ids.count(bos) > 1:
        faults.append(f"the rendered prompt holds {ids.count(bos)} BOS tokens, expected at most one")
    return faults


# -- rule 3: AR prompts --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ARPrompt:
    """Turns explanations into the AR's input ids: plain text, no chat template, BOS where the tokenizer has one."""

    tokenizer: Any
    template: str
    suffix_ids: tuple[int, ...] | None
    max_length: int | None = None

    @classmethod
    def build(cls, tokenizer: Any, sidecar: Sidecar, *, max_length: int | None = None) -> ARPrompt:
        """The AR prompt of a sidecar; raises a SidecarError where the suffix ids do not fit the tokenizer."""
        if sidecar.ar_template is None:
            raise SidecarError("The sidecar has no AR template.", expected="prompt_templates.ar")
        prompt = cls(tokenizer, sidecar.ar_template, sidecar.ar_suffix_ids, max_length)
        faults = prompt.faults()
        if faults:
            raise SidecarError(
                "The AR's prompt does not fit its tokenizer.",
                faults=faults,
                next_step="check that tokenizer and sidecar come from the same training run",
            )
        return prompt

    def faults(self) -> list[str]:
        """What disagrees between template, suffix ids and tokenizer."""
        ids = self._ids("any words")
        faults = []
        if self.suffix_ids is not None and tuple(ids[-len(self.suffix_ids) :]) != self.suffix_ids:
            tail = list(ids[-len(self.suffix_ids) :])
            faults.append(
                f"tokens.critic_suffix_ids: the sidecar says {list(self.suffix_ids)}, the prompt ends in {tail}"
            )
        bos = getattr(self.tokenizer, "bos_token_id", None)
        if bos is not None and ids.count(bos) > 1:
            faults.append(f"prompt_templates.ar: the prompt holds {ids.count(bos)} BOS tokens, expected at most one")
        return faults

    def _ids(self, explanation: str) -> list[int]:
        text = self.template.replace(EXPLANATION_PLACEHOLDER, explanation)
        return [int(i) for i in self.tokenizer(text, add_special_tokens=True, verbose=False)["input_ids"]]

    def encode(self, explanation: str, *, where: str = "explanation") -> list[int]:
        """Ids of one filled template; the last one is the reading position.

        Raises:
            TextError: empty, or not encodable.
            ContextLengthError: longer than the AR reads.
        """
        if not isinstance(explanation, str):
            raise TextError("An explanation is a text.", where=where, got=type(explanation).__name__)
        if not explanation.strip():
            raise TextError(
                "The explanation is empty.", where=where, next_step="reconstruct only explanations with text"
            )
        _require_encodable(explanation, where)
        ids = self._ids(explanation)
        if self.max_length is not None and len(ids) > self.max_length:
            raise ContextLengthError(
                "The explanation is longer than the AR reads.",
                where=where,
                got=f"{len(ids)} tokens with its prompt",
                expected=f"at most {self.max_length}",
            )
        return ids


def check_batch_size(batch_size: object) -> None:
    """Raise an InputError for a batch size that is not a whole number from 1 up."""
    if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
        raise InputError("batch_size is a whole number from 1 up.", got=repr(batch_size))


def pad_right(sequences: Sequence[Sequence[int]], pad_id: int) -> tuple[Tensor, Tensor]:
    """Token ids and attention mask, both int64 [rows, longest], padded on the right."""
    longest = max(len(s) for s in sequences)
    ids = torch.full((len(sequences), longest), pad_id, dtype=torch.long)
    mask = torch.zeros((len(sequences), longest), dtype=torch.long)
    for i, sequence in enumerate(sequences):
        ids[i, : len(sequence)] = torch.tensor(list(sequence), dtype=torch.long)
        mask[i, : len(sequence)] = 1
    return ids, mask


def pad_id_of(tokenizer: Any) -> int:
    """An id to pad with; padding is masked, so any will do."""
    for name in ("pad_token_id", "eos_token_id", "bos_token_id"):
        if (value := getattr(tokenizer, name, None)) is not None:
            return int(value)
    return 0


def last_real(mask: Tensor) -> Tensor:
    """Index of the last attended token of each row of `mask` [rows, length]; right for any padding side."""
    length = mask.shape[1]
    index = torch.arange(length, device=mask.device)
    if bool((mask.sum(dim=1) == 0).any()):
        raise InjectionError("A row without any attended token has no reading position.")
    return (mask.long() * (index + 1)).argmax(dim=1)


def response_ids(tokenizer: Any, explanation: str) -> list[int]:
    """What an AV is trained to write: the tagged explanation and an end-of-sequence token where there is one."""
    ids = [int(i) for i in tokenizer(f"{OPENING_TAG}{explanation}{CLOSING_TAG}", add_special_tokens=False)["input_ids"]]
    eos = getattr(tokenizer, "eos_token_id", None)
    return ids if eos is None else [*ids, int(eos)]


# -- explanations --------------------------------------------------------------------------------------------


def parse_explanation(raw: str) -> tuple[Status, str | None]:
    """The status of an AV's output, and its text where that is "ok".

    `truncated`: an opening tag and no closing one; `no_tags`: no opening tag; `empty`: nothing between them.
    """
    begin = raw.find(OPENING_TAG)
    if begin < 0:
        return "no_tags", None
    begin += len(OPENING_TAG)
    end = raw.find(CLOSING_TAG, begin)
    if end < 0:
        return "truncated", None
    text = raw[begin:end].strip()
    return ("ok", text) if text else ("empty", None)
