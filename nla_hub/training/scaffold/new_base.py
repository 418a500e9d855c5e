"""A base model nobody made a recipe for yet, as far as its config and tokenizer tell; no weights are read."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import transformers
from transformers import CONFIG_MAPPING

from nla_hub.adapters import Adapter, adapter_for
from nla_hub.architecture import causal_class
from nla_hub.errors import CheckpointError, InputError, UnknownNameError
from nla_hub.hub import HubOptions
from nla_hub.locate import Ref, parse_name
from nla_hub.pretrained import load_config, load_tokenizer
from nla_hub.zoo import zoo


@dataclass(frozen=True)
class NewBase:
    """A base model as far as it can be known without weights.

    Attributes:
        model: as a recipe names it; a directory by its whole path.
        revision: the commit that was read, None for a directory.
        config: of its config.json, perhaps a wrapper's around a text model.
        adapter: of nla-hub or an installed plug-in that reads its family; None where none does.
    """

    model: str
    revision: str | None
    config: Any
    tokenizer: Any
    adapter: Adapter | None

    @property
    def text(self) -> Any:
        """The config of the text model."""
        return self.config.get_text_config()

    @property
    def depth(self) -> int:
        """Decoder blocks."""
        return int(self.text.num_hidden_layers)

    @property
    def slug(self) -> str:
        """Its name in small letters, for files."""
        return re.sub(r"[^a-z0-9.]+", "-", Path(self.model).name.lower()).strip("-.") or "model"


def read_base(name: str) -> NewBase:
    """Read config and tokenizer of a base model: a Hub name, or a directory.

    Raises:
        InputError: a name that is neither. CheckpointError: no model, or an architecture that transformers does not have.
        HubError and its children: absent, gated or out of reach.
    """
    ref = parse_name(name)
    if ref.kind == "zoo":
        raise _no_base(ref)
    directory = ref.fetch(HubOptions(), weights=False)
    config = _config(directory, name)
    try:
        adapter = adapter_for(config)
    except UnknownNameError:
        adapter = None
    if adapter is None:
        _refuse_known_text_model(config)
    local = ref.kind == "directory"
    commit = directory.name if not local and directory.parent.name == "snapshots" else None
    model = str(directory.resolve()) if local else ref.name
    return NewBase(model, commit, config, load_tokenizer(directory), adapter)


def _no_base(ref: Ref) -> InputError:
    found = zoo().get(ref.name)
    if found is not None:
        return InputError(
            "This names a pair, not a base model.",
            where=ref.name,
            next_step=None if found.packaged else f"its base model is {found.base}",
        )
    hint = f"for the directory of that name write ./{ref.name}" if Path(ref.name).is_dir() else None
    return InputError(
        "This is neither a repository of the Hub nor a directory.",
        where=ref.name,
        expected="owner/name, or ./directory",
        next_step=hint,
    )


def _config(directory: Path, name: str) -> Any:
    """The config of a decoder that transformers has the code of."""
    try:
        raw = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raw = {}  # the reader of configs says what is wrong
    kind = raw.get("model_type") if isinstance(raw, dict) else None
    if isinstance(kind, str) and kind not in CONFIG_MAPPING:
        own_code = "auto_map" in raw
        raise CheckpointError(
            f"transformers {transformers.__version__} has no architecture of this type"
            + (", and the code in its repository is not run." if own_code else "."),
            where=name,
            got=f"model_type {kind!r}",
            next_step="an adapter describes modules of transformers: wait until it has this architecture, or load it with a "
            "newer version",
        )
    config = load_config(directory)
    text = config.get_text_config()
    if getattr(config, "is_encoder_decoder", False) or causal_class(text) is None:
        raise CheckpointError(
            "This is no decoder that writes text; an NLA is made from one.",
            where=name,
            got=f"model_type {config.model_type!r}",
            next_step="name a causal language model",
        )
    return config


def _refuse_known_text_model(config: Any) -> None:
    """Raise where only the wrapper around the text model is unknown: no second adapter may read that family."""
    text = config.get_text_config()
    if text.model_type == config.model_type:
        return
    try:
        known = adapter_for(text)
    except UnknownNameError:
        return
    raise CheckpointError(
        f"Its text model is read by the adapter {known.name!r}, but not inside a model of this type.",
        got=f"model_type {config.model_type!r}",
        expected=" or ".join((*known.model_types, *known.wrapper_types)),
        next_step="save the text model alone (transformers: save_pretrained of its language model), and name that directory",
    )
