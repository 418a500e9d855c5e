"""From a record (column -> value) to an item: which columns hold texts, conversations and ids.

Without a name given, a record's text is in "text", else its conversation in "messages"; its id is in "doc_id", else in
"id".
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from nla_hub.errors import InputError, TextError, did_you_mean
from nla_hub.explain.inputs.items import BadItem, TextItem, encodable, one_line, refused
from nla_hub.source_text import Content, check_messages, require_encodable

TEXT, MESSAGES = "text", "messages"
IDS = ("doc_id", "id")

SPEAKERS = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
"""Roles of conversations written as {"from": ..., "value": ...} (ShareGPT's form) -> what chat templates call them."""

NAMED_COLUMNS = 20
"""Columns that a message lists."""


@dataclass(frozen=True)
class Columns:
    """Where a record's parts stand. A record's first id that is a text or a whole number counts."""

    text: str | None
    messages: str | None
    ids: tuple[str, ...] = IDS

    def names(self) -> tuple[str, ...]:
        """All of them, in the order in which they are looked at."""
        return tuple(name for name in (self.text, self.messages, *self.ids) if name is not None)

    def pick(self, record: Mapping[str, Any], where: str) -> TextItem | BadItem:
        """The item of one record."""
        doc_id = next((found for name in self.ids if (found := as_id(record.get(name))) is not None), None)
        try:
            return TextItem(self._content(record, where), doc_id, where)
        except TextError as error:
            return refused(error, where, doc_id)

    def _content(self, record: Mapping[str, Any], where: str) -> Content:
        text = record.get(self.text) if self.text is not None else None
        if isinstance(text, bytes):
            text = decoded(text, where)
        if isinstance(text, str):
            require_encodable(text, where)
            return text
        messages = record.get(self.messages) if self.messages is not None else None
        if isinstance(messages, str):
            messages = _parsed(messages, where)
        if isinstance(messages, list):
            return check_messages([_renamed(message) for message in messages], where=where)
        wanted = [f"a text in {self.text!r}"] if self.text is not None else []
        wanted += [f"a list of messages in {self.messages!r}"] if self.messages is not None else []
        found = [
            f"{name!r} {_state(record[name])}"
            for name in (self.text, self.messages)
            if name is not None and name in record
        ]
        raise TextError(
            "This row holds nothing to explain.",
            where=where,
            got=" and ".join(found) or _listed(list(record)),
            expected=" or ".join(wanted),
        )


def choose_columns(
    found: Sequence[str] | None,
    *,
    column: str | None,
    messages_column: str | None,
    id_column: str | None,
    where: object,
) -> Columns:
    """The columns to read, held against those that there are (None: there is no row to see them from).

    Raises:
        InputError: two columns asked for, or one that is absent; no text column among them.
    """
    if column is not None and messages_column is not None:
        raise InputError(
            "A row is a text or a conversation, not both.",
            got=f"--column {column} and --messages-column {messages_column}",
            next_step="name one of them",
        )
    if column is None and messages_column is None:
        chosen = Columns(TEXT, MESSAGES)
    else:
        chosen = Columns(column, messages_column)
    if id_column is not None:
        chosen = Columns(chosen.text, chosen.messages, (id_column,))
    if found is None:
        return chosen
    asked = {"--column": column, "--messages-column": messages_column, "--id-column": id_column}
    for option, name in asked.items():
        if name is not None and name not in found:
            near = did_you_mean(name, found)
            raise InputError(
                f"There is no column {name!r}.",
                where=where,
                got=_listed(found),
                next_step=f"name a column that is there{f', such as {option} {near[0]}' if near else f' with {option}'}",
            )
    if column is None and messages_column is None and not {TEXT, MESSAGES} & set(found):
        raise InputError(
            f'There is no column "{TEXT}" or "{MESSAGES}".',
            where=where,
            got=_listed(found),
            next_step="say which one holds the texts: --column NAME, or the conversations: --messages-column NAME",
        )
    if twice := [name for name in chosen.names() if found.count(name) > 1]:
        raise InputError(
            f"The column {twice[0]!r} is there twice.", where=where, got=_listed(found), next_step="rename one of them"
        )
    return chosen


def decoded(data: bytes, where: str) -> str:
    """Bytes as text; a TextError for what is not UTF-8."""
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise TextError(f"This is not UTF-8 text (byte {error.start}).", where=where) from error


def as_id(value: object) -> str | None:
    """An id as text: a text that is not empty, or a whole number; None for everything else."""
    if isinstance(value, str):
        return encodable(value) or None
    if isinstance(value, float) and value.is_integer():  # ids beside missing ones, as pandas keeps them
        value = int(value)
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else None


def _parsed(text: str, where: str) -> Any:
    """A conversation that a cell holds as JSON."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise TextError(f"This conversation is not JSON: {error}.", where=where) from error


def _renamed(message: Any) -> Any:
    """A message in the words of chat templates, where it is written in ShareGPT's; others as they are."""
    if not isinstance(message, dict) or "role" in message or not {"from", "value"} <= set(message):
        return message
    role = SPEAKERS.get(message["from"]) if isinstance(message["from"], str) else None
    return message if role is None else {"role": role, "content": message["value"]}


def _state(value: object) -> str:
    return "is null" if value is None else f"holds {type(value).__name__}"


def _listed(names: Sequence[str]) -> str:
    rest = len(names) - NAMED_COLUMNS
    shown = ", ".join(one_line(name, 60) for name in names[:NAMED_COLUMNS])
    return f"columns {shown}{f' and {rest} more' if rest > 0 else ''}" if names else "no columns"
