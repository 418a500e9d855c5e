"""Where an answer ends: at the closing tag, at an end-of-sequence token, or at the length bound."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from transformers import GenerationConfig

from nla_hub.engines.base import Finish
from nla_hub.pretrained import GENERATION_CONFIG_NAME
from nla_hub.prompts import CLOSING_TAG


def eos_ids(tokenizer: Any, *configs: Any) -> frozenset[int]:
    """Every token that ends a sequence, by the tokenizer and by model and generation configs (None where there is none)."""
    found = {tokenizer.eos_token_id}
    for config in configs:
        value = getattr(config, "eos_token_id", None)
        found |= set(value) if isinstance(value, (list, tuple)) else {value}
    return frozenset(int(i) for i in found if i is not None)


class Endings:
    """What ends the answers of one AV.

    Args:
        eos: see `eos_ids`.
    """

    def __init__(self, tokenizer: Any, eos: frozenset[int]) -> None:
        self.tokenizer = tokenizer
        self.eos = eos

    @classmethod
    def stored(cls, tokenizer: Any, config: Any, directory: Path) -> Endings:
        """Those of an AV on disk, with the generation config of its directory where there is one."""
        here = (directory / GENERATION_CONFIG_NAME).is_file()
        return cls(tokenizer, eos_ids(tokenizer, config, GenerationConfig.from_pretrained(directory) if here else None))

    def text(self, ids: Sequence[int]) -> str:
        """The decoded text of an answer, special tokens left out."""
        return str(self.tokenizer.decode(ids, skip_special_tokens=True))

    def at(self, ids: Sequence[int]) -> Finish | None:
        """Why an answer ends with the last of `ids`; None where it goes on."""
        if ids[-1] in self.eos:
            return "eos"
        # Only a token that holds ">" can complete the tag; the tag itself is at most as many tokens as characters.
        closed = ids[-1] in self._bracket_ids and CLOSING_TAG in self.text(ids[-len(CLOSING_TAG) :])
        return "tag" if closed else None

    def cut(self, ids: Sequence[int]) -> tuple[tuple[int, ...], Finish | None]:
        """An answer up to its end, the token that ends it included; None where nothing in it ends it."""
        for end, token in enumerate(ids, start=1):
            if (token in self.eos or token in self._bracket_ids) and (finish := self.at(ids[:end])) is not None:
                return tuple(ids[:end]), finish
        return tuple(ids), None

    @cached_property
    def _bracket_ids(self) -> frozenset[int]:
        texts = self.tokenizer.batch_decode([[i] for i in range(len(self.tokenizer))])
        return frozenset(i for i, text in enumerate(texts) if ">" in text)
