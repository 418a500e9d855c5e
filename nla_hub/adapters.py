"""What differs between architecture families, as data: where the blocks are, what may be left over on disk.

An adapter holds no code of its own unless a family needs it. Adapters register under the entry-point group
`nla_hub.adapters`; the ones below come through the same door as a plug-in's.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from nla_hub import registry
from nla_hub.errors import CheckpointError
from nla_hub.sidecar import Site


@dataclass(frozen=True)
class Adapter:
    """One architecture family.

    Attributes:
        name: registry name, also what the zoo prints.
        model_types: `config.model_type` values of the text stack that this adapter reads.
        trunk_paths: attribute paths from a model down to its trunk (embedding, blocks, final norm), tried in order;
            "" is the model itself.
        embedding, blocks, final_norm, lm_head: attribute names, the first three on the trunk.
        per_layer_config: config lists with an entry a block, cut when a model is truncated.
        wrapper_types: `config.model_type` values of multimodal wrappers whose text stack this is.
        wrapper_key_mapping: regex -> replacement that turns a wrapper's weight names into the text stack's.
        ignored_weights: regexes of weight names that may be left over on disk (a vision tower, a projector).
    """

    name: str
    model_types: tuple[str, ...]
    trunk_paths: tuple[str, ...] = ("model", "")
    embedding: str = "embed_tokens"
    blocks: str = "layers"
    final_norm: str = "norm"
    lm_head: str = "lm_head"
    per_layer_config: tuple[str, ...] = ("layer_types",)
    wrapper_types: tuple[str, ...] = ()
    wrapper_key_mapping: Mapping[str, str] = field(default_factory=dict)
    ignored_weights: tuple[str, ...] = ()

    def trunk(self, model: nn.Module) -> nn.Module:
        """The module of `model` that holds embedding, blocks and final norm (a CausalLM, a wrapper or the trunk)."""
        inner = _unwrap(model)
        for path in self.trunk_paths:
            try:
                candidate = inner.get_submodule(path)
            except AttributeError:
                continue
            if isinstance(getattr(candidate, self.blocks, None), nn.ModuleList):
                return candidate
        raise CheckpointError(
            f"The adapter {self.name!r} finds no {self.blocks!r} in this model.",
            got=type(inner).__name__,
            expected=" or ".join(repr(p) for p in self.trunk_paths),
            next_step="choose the adapter of this model's family, or register one (nla-hub models ls shows them)",
        )

    def block_list(self, model: nn.Module) -> nn.ModuleList:
        """The decoder blocks, first to last."""
        blocks: nn.ModuleList = getattr(self.trunk(model), self.blocks)
        return blocks

    def block(self, model: nn.Module, site: Site) -> nn.Module:
        """The block whose output is the site."""
        blocks = self.block_list(model)
        if not 0 <= site.layer < len(blocks):
            raise CheckpointError(
                "This model has no such layer.", got=f"K = {site.layer}", expected=f"0 to {len(blocks) - 1}"
            )
        return blocks[site.layer]

    def embedding_module(self, model: nn.Module) -> nn.Module:
        """The module that turns ids into the residual stream, with whatever scaling the family applies in it."""
        module: nn.Module = getattr(self.trunk(model), self.embedding)
        return module

    def drop_final_norm(self, model: nn.Module) -> None:
        """Replace the final norm by the identity: an AR reads the residual stream itself."""
        setattr(self.trunk(model), self.final_norm, nn.Identity())

    def truncate_config(self, config: Any, site: Site) -> Any:
        """Cut a text config (in place) to the blocks that reach `site`, per-layer lists included; returns it."""
        if site.layer >= config.num_hidden_layers:
            raise CheckpointError(
                "This model has no such layer.",
                got=f"K = {site.layer}",
                expected=f"0 to {config.num_hidden_layers - 1}",
            )
        config.num_hidden_layers = site.n_blocks
        for name in self.per_layer_config:
            if isinstance(value := getattr(config, name, None), (list, tuple)):
                setattr(config, name, list(value)[: site.n_blocks])
        return config


def _unwrap(model: nn.Module) -> nn.Module:
    """The transformers model inside a DDP wrapper, a PEFT one, or the one around the other."""
    inner = getattr(model, "module", None)
    if isinstance(inner, nn.Module) and hasattr(inner, "config"):
        model = inner
    if hasattr(model, "get_base_model"):
        return model.get_base_model()  # type: ignore[no-any-return, operator]
    return model


QWEN2 = Adapter(name="qwen2", model_types=("qwen2",))
LLAMA = Adapter(name="llama", model_types=("llama",))
GEMMA3 = Adapter(
    name="gemma3",
    model_types=("gemma3_text",),
    trunk_paths=("model.language_model", "language_model", "model", ""),
    wrapper_types=("gemma3",),
    wrapper_key_mapping={r"^language_model\.model\.": "", r"^model\.language_model\.": "", r"^language_model\.": ""},
    ignored_weights=(r"(^|\.)vision_tower\.", r"(^|\.)multi_modal_projector\."),
)


def adapter_for(config: Any) -> Adapter:
    """The adapter whose family a transformers config belongs to.

    Raises:
        UnknownNameError: no registered adapter reads this `model_type`.
    """
    model_type = str(config.model_type)
    for name in registry.adapters.names():
        adapter = registry.adapters.get(name)
        if model_type in adapter.model_types or model_type in adapter.wrapper_types:
            return adapter
    known = sorted({t for n in registry.adapters.names() for t in registry.adapters.get(n).model_types})
    raise registry.unknown(
        "adapter for model_type", model_type, known, next_step="A plug-in may add one: see docs/architecture.md."
    )
