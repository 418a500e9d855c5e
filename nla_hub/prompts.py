"""AV prompts, AR prompts, and what an AV writes: rendering rules 2 and 3 (rule 1 is in `source_text.py`).

Templates come from strangers' repositories and are filled by literal replacement, never with `str.format`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from nla_hub.errors import ContextLengthError, SidecarError, TextError
from nla_hub.sidecar import EXPLANATION_PLACEHOLDER, INJECTION_PLACEHOLDER, MarkerTokens, Sidecar
from nla_hub.source_text import render_messages, require_encodable

Status = Literal["ok", "truncated", "no_tags", "empty"]

OPENING_TAG = "<explanation>"
CLOSING_TAG = "</explanation>"


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
    return _render(tokenizer, sidecar.av_template, sidecar.marker.char)


def _render(tokenizer: Any, template: str, marker: str) -> str:
    content = template.replace(INJECTION_PLACEHOLDER, marker)
    return render_messages(
        tokenizer, [{"role": "user", "content": content}], parse_special_tokens=True, add_generation_prompt=True
    )


def measure_marker(tokenizer: Any, char: str, template: str) -> MarkerTokens:
    """The ids of a marker and its neighbours in the rendered prompt, for contracts that name only the character.

    Raises:
        SidecarError: the marker is not one token, or does not stand once between two others.
    """
    alone = tokenizer(char, add_special_tokens=False)["input_ids"]
    if len(alone) != 1:
        raise SidecarError(f"The marker {char!r} is {len(alone)} tokens here.", got=alone, expected="one token")
    ids = tokenizer(_render(tokenizer, template, char), add_special_tokens=False)["input_ids"]
    places = [i for i, token in enumerate(ids) if token == alone[0]]
    if len(places) != 1 or not 0 < places[0] < len(ids) - 1:
        raise SidecarError(
            f"The marker {char!r} stands {len(places)} times in the rendered prompt, expected once, inside it."
        )
    return MarkerTokens(char, alone[0], ids[places[0] - 1], ids[places[0] + 1])


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
    special_tokens: bool = True

    @classmethod
    def build(cls, tokenizer: Any, sidecar: Sidecar, *, max_length: int | None = None) -> ARPrompt:
        """The AR prompt of a sidecar; raises a SidecarError where the suffix ids do not fit the tokenizer."""
        if sidecar.ar_template is None:
            raise SidecarError("The sidecar has no AR template.", expected="prompt_templates.ar")
        prompt = cls(tokenizer, sidecar.ar_template, sidecar.ar_suffix_ids, max_length, sidecar.ar_special_tokens)
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
        if self.suffix_ids and tuple(ids[-len(self.suffix_ids) :]) != self.suffix_ids:
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
        return [
            int(i) for i in self.tokenizer(text, add_special_tokens=self.special_tokens, verbose=False)["input_ids"]
        ]

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
        require_encodable(explanation, where)
        ids = self._ids(explanation)
        if self.max_length is not None and len(ids) > self.max_length:
            raise ContextLengthError(
                "The explanation is longer than the AR reads.",
                where=where,
                got=f"{len(ids)} tokens with its prompt",
                expected=f"at most {self.max_length}",
            )
        return ids

    def fits(self, explanation: str) -> bool:
        """Whether the AR reads an explanation to its end."""
        return self.max_length is None or len(self._ids(explanation)) <= self.max_length


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


def response_ids(tokenizer: Any, explanation: str) -> list[int]:
    """What an AV is trained to write: the tagged explanation and an end-of-sequence token where there is one."""
    ids = [int(i) for i in tokenizer(f"{OPENING_TAG}{explanation}{CLOSING_TAG}", add_special_tokens=False)["input_ids"]]
    eos = getattr(tokenizer, "eos_token_id", None)
    return ids if eos is None else [*ids, int(eos)]
