"""Source texts as a model reads them: rendering rule 1, for texts and conversations.

Raw text is encoded with BOS where the tokenizer has one, and special-token strings inside it stay text; conversations go
through the chat template. The other two rules, AV and AR prompts, are in `prompts.py`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, overload

from nla_hub.errors import ContextLengthError, InputError, TextError

Message = Mapping[str, Any]
Content = str | Sequence[Message]
Overflow = Literal["error", "truncate", "stride"]


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
        require_encodable(content, where)
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
        require_encodable(message["content"], f"{where}, message {i}")
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


def require_encodable(text: str, where: str) -> None:
    """Raise a TextError for a text that cannot become UTF-8."""
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


@overload
def as_documents(texts: str) -> list[Content]: ...
@overload
def as_documents(texts: Any) -> list[Content]: ...
def as_documents(texts: Any) -> list[Content]:
    """One text or conversation, or several, as a list of documents."""
    if isinstance(texts, str):
        return [texts]
    if not isinstance(texts, Sequence):
        raise InputError(
            "Texts are expected here.", got=type(texts).__name__, expected="a text, a conversation, or a list of them"
        )
    items = list(texts)
    if items and all(isinstance(item, dict) for item in items):
        return [items]
    return items
