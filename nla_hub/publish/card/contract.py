"""Everything in which two NLAs differ, as a table that a reader can implement from."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from nla_hub.publish.card.text import code, inline
from nla_hub.publish.facts import ReleaseFacts
from nla_hub.sidecar import HeadInput, Injection, MarkerTokens, Site

NOT_PINNED = "not pinned"
BY_THE_RUN = "measured by the run"
"""What a recipe leaves to the run that follows it."""


@dataclass(frozen=True)
class Contract:
    """The contract of a pair, or as much of it as a recipe knows.

    Attributes:
        base_model, base_revision: the model whose vectors are explained; None: any, and not pinned.
        n_layers, d_model: its blocks and its width. family: name of its adapter.
        site: where vectors live; None: not known yet.
        marker: with its ids; `marker_char` alone where a run still has to measure them.
        injection: kind and scale; `scale_by_run` where the run measures the scale.
        mse_scale: as in a sidecar. ar_bos, head_input, norm_kept: of the AR, see `Sidecar`.
        dtypes, parameters: role -> dtype, number of stored values.
    """

    base_model: str | None
    base_revision: str | None
    n_layers: int | None
    d_model: int | None
    family: str | None
    site: Site | None
    marker_char: str | None
    marker: MarkerTokens | None
    injection: Injection
    av_template: str | None
    ar_template: str | None
    suffix_ids: tuple[int, ...] | None = None
    scale_by_run: bool = False
    mse_scale: float | Literal["raw"] | None = None
    ar_bos: bool = True
    head_input: HeadInput = "raw"
    norm_kept: bool = False
    dtypes: Mapping[str, str] = field(default_factory=dict)
    parameters: Mapping[str, int] = field(default_factory=dict)

    @classmethod
    def of(cls, facts: ReleaseFacts) -> Contract:
        """The contract of a release: what its two sidecars say."""
        av, ar = facts.av, facts.ar
        return cls(
            base_model=facts.base_model,
            base_revision=facts.base_revision,
            n_layers=facts.n_layers,
            d_model=av.d_model,
            family=facts.family,
            site=av.site,
            marker_char=None if av.marker is None else av.marker.char,
            marker=av.marker,
            injection=av.injection,
            av_template=av.av_template,
            ar_template=ar.ar_template or av.ar_template,
            suffix_ids=ar.ar_suffix_ids,
            mse_scale=ar.mse_scale,
            ar_bos=ar.ar_special_tokens,
            head_input=ar.head_input,
            norm_kept=ar.final_norm_stripped is False,
            dtypes=facts.dtypes,
            parameters=facts.parameters,
        )

    @property
    def reads_last_block(self) -> bool:
        """Whether K is the base's last block, whose entry of `hidden_states` is not its output."""
        return self.site is not None and self.site.n_blocks == self.n_layers

    @property
    def mse_norm(self) -> float | None:
        """The L2 norm that both vectors get in the AR's loss; None where it compares them as they are, or d is not known."""
        if self.mse_scale == "raw" or (self.mse_scale is None and self.d_model is None):
            return None
        return math.sqrt(self.d_model or 0) if self.mse_scale is None else self.mse_scale

    def rows(self) -> list[tuple[str, str]]:
        """Names and values in Markdown."""
        return [*self._vectors(), *self._verbalizer(), *self._reconstructor(), *self._weights()]

    def _vectors(self) -> list[tuple[str, str]]:
        base = "not chosen" if self.base_model is None else code(self.base_model)
        revision = NOT_PINNED if self.base_revision is None else f"revision {code(self.base_revision)}"
        rows = [("base model", f"{base}, {revision}")]
        if self.site is None:
            rows.append(("layer K", "two thirds of the blocks, counted from 0"))
        else:
            of = "" if self.n_layers is None else f" of {self.n_layers}"
            k = self.site.layer
            rows.append(("layer K", f"{k}{of}, counted from 0: the output of decoder block {k}"))
            index = f"`hidden_states[{self.site.hidden_states_index}]`"
            if self.reads_last_block:
                index = f"a hook on block {k} ({index} is after the final norm)"
            other = f"`blocks.{k}.hook_resid_post` in TransformerLens, the output of `layers[{k}]` in nnsight"
            rows.append(("the same elsewhere", f"{index} in transformers, {other}"))
        rows.append(("vectors", f"float32, width d = {self.d_model or 'of the base model'}, unnormalised"))
        return rows

    def _verbalizer(self) -> list[tuple[str, str]]:
        char = self.marker_char
        if char is None:
            marker = "chosen for the tokenizer: one character that is one token"
        else:
            ids = f"token {BY_THE_RUN}" if self.marker is None else f"token {self.marker.id}"
            marker = f"{code(char)} ({', '.join(f'U+{ord(c):04X}' for c in char)}), {ids}"
        beside = "token left / right of it: "
        beside += BY_THE_RUN if self.marker is None else f"{self.marker.left_id} / {self.marker.right_id}"
        return [
            ("AV: marker", marker),
            ("AV: neighbours", f"{beside}; a marker counts only between them, once, inside the prompt"),
            ("AV: injection", self._injection()),
            ("AV: prompt", "the template below as one user turn of the chat template, ready for the answer"),
        ]

    def _injection(self) -> str:
        if self.injection.kind == "add":
            return "`add`: at the output of block 1 the residual h at the marker becomes h + ‖h‖ v/‖v‖"
        row = "`overwrite`: the marker's embedding row, after the model's own scaling of embeddings, becomes"
        if self.scale_by_run:
            return f"{row} v · scale/‖v‖; scale: the 75th percentile of the raw norms, {BY_THE_RUN}"
        if self.injection.scale is None:
            return f"{row} v as it is (no scale)"
        return f"{row} v · {self.injection.scale:g}/‖v‖, the norm in float32"

    def _reconstructor(self) -> list[tuple[str, str]]:
        blocks = "blocks 0 to K" if self.site is None else f"{self.site.n_blocks} blocks"
        norm = "with the final norm" if self.norm_kept else "without final norm"
        bos = "with BOS where the tokenizer has one" if self.ar_bos else "without BOS"
        read = "the hidden state h"
        if self.head_input == "normalized":
            read = "h as it is" if self.mse_norm is None else f"h · {self.mse_norm:.6g}/‖h‖"
        if self.suffix_ids is None:
            suffix = BY_THE_RUN
        else:
            suffix = " ".join(map(str, self.suffix_ids)) or "none"
        scale = "the vectors as they are" if self.mse_scale == "raw" else "both vectors scaled to length √d"
        if self.mse_norm is not None:
            scale = f"both vectors scaled to length {self.mse_norm:.6g}"
        return [
            (
                "AR: trunk and head",
                f"{blocks} {norm}, then a linear d × d head in float32 on {read} at the last real token",
            ),
            (
                "AR: prompt",
                f"the template below as plain text, no chat template, {bos}; the last token by the attention mask",
            ),
            ("AR: suffix ids", suffix),
            ("AR: mse_scale", f"{scale}; only the direction of what an AR returns means anything"),
        ]

    def _weights(self) -> list[tuple[str, str]]:
        rows = []
        for role, name in (("av", "AV"), ("ar", "AR")):
            parts = [inline(self.dtypes[role])] if role in self.dtypes else []
            if role in self.parameters:
                parts.append(f"{self.parameters[role]:,} stored values")
            if parts:
                rows.append((f"{name}: on disk", ", ".join(parts)))
        return rows
