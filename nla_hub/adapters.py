"""What differs between architecture families, as data: where the blocks are, what may be left over on disk.

An adapter holds no code of its own unless a family needs it. Adapters register under the entry-point group
`nla_hub.adapters`; the ones below come through the same door as a plug-in's.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

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
        causal_prefix: what the trunk's weight names begin with inside a complete causal LM on disk, dot included.
        stored_lm_head: what the lm_head's weight names begin with on disk, where that is another name than `lm_head`.
        untrained_norm: values of a final norm's weight that mean "nobody trained this"; its bias, if any, is then zero.
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
    causal_prefix: str = "model."
    stored_lm_head: str | None = None
    untrained_norm: tuple[float, ...] = (1.0,)
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

    def final_norm_module(self, model: nn.Module) -> nn.Module:
        """The norm behind the last block, or the identity where it was dropped."""
        module: nn.Module = getattr(self.trunk(model), self.final_norm)
        return module

    def drop_final_norm(self, model: nn.Module) -> None:
        """Replace the final norm by the identity: an AR reads the residual stream itself."""
        setattr(self.trunk(model), self.final_norm, nn.Identity())

    @contextmanager
    def cut(self, model: nn.Module, site: Site) -> Iterator[nn.Module]:
        """While open, `model` ends at `site`: blocks 0..K, no final norm; yields its trunk.

        The trunk's `last_hidden_state` is then what a hook on block K sees, and no block above K runs. Afterwards, also
        after an exception, the model is what it was: the blocks are the same modules in the same order. Its config is left
        alone: every family here runs over the list of its blocks, and reads only entries of blocks that it runs.

        Args:
            model: a CausalLM, a wrapper or a trunk, also inside PEFT or DDP; an lm_head, where it is called, reads the cut
                trunk's output.
            site: where to end.

        Raises:
            CheckpointError: the model has no block K; nothing was changed.
        """
        self.block(model, site)
        trunk = self.trunk(model)
        blocks, norm = self.block_list(model), self.final_norm_module(model)
        try:
            setattr(trunk, self.blocks, nn.ModuleList(list(blocks)[: site.n_blocks]))
            setattr(trunk, self.final_norm, nn.Identity())
            yield trunk
        finally:
            setattr(trunk, self.blocks, blocks)
            setattr(trunk, self.final_norm, norm)

    @property
    def final_norm_weights(self) -> tuple[str, ...]:
        """Regexes for the names of the final norm's weight and bias: on disk, in a causal LM, a wrapper or a trunk.

        They are anchored at both ends, so a norm of the same name inside a block or a vision tower is not meant.
        """
        paths = [*self.trunk_paths, self.causal_prefix, "base_model"]
        steps = dict.fromkeys(step for path in paths for step in path.split(".") if step)
        return (rf"^(?:(?:{'|'.join(map(re.escape, steps))})\.)*{re.escape(self.final_norm)}\.(?:weight|bias)$",)

    @property
    def lm_head_weights(self) -> tuple[str, ...]:
        """Regexes for the names of the lm_head's weights, in a causal LM and on disk."""
        names = dict.fromkeys((self.lm_head, self.stored_lm_head or self.lm_head))
        return (rf"(?:^|\.)(?:{'|'.join(map(re.escape, names))})\.",)

    def stored_name(self, name: str) -> str:
        """The name on disk of a causal LM's weight, as this family's checkpoints on the Hub spell it."""
        if self.stored_lm_head is not None and name.startswith(f"{self.lm_head}."):
            return self.stored_lm_head + name.removeprefix(self.lm_head)
        return name

    def is_untrained_norm(self, name: str, value: Tensor) -> bool:
        """Whether a final norm's `value` of any shape, called `name`, is what the family starts its training from."""
        wide = value.float()
        if name.endswith("bias"):
            return bool((wide == 0).all())
        return any(bool((wide == start).all()) for start in self.untrained_norm)

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


_OLD_ROTARY = r"(?:^|\.)rotary_emb\.inv_freq$"
"""A buffer of every block in what transformers wrote in 2023 (Llama 2, Pythia); it follows from the config."""

_GEMMA_NORM = (0.0, 1.0)
"""Gemma multiplies by 1 + weight, so it starts from zeros; ones are what a tool that does not know writes."""

QWEN2 = Adapter(name="qwen2", model_types=("qwen2",))
QWEN3 = Adapter(name="qwen3", model_types=("qwen3",))
LLAMA = Adapter(name="llama", model_types=("llama",), ignored_weights=(_OLD_ROTARY,))
MISTRAL = Adapter(name="mistral", model_types=("mistral",))
GEMMA2 = Adapter(name="gemma2", model_types=("gemma2",), untrained_norm=_GEMMA_NORM)
GEMMA3 = Adapter(
    name="gemma3",
    model_types=("gemma3_text",),
    trunk_paths=("model.language_model", "language_model", "model", ""),
    untrained_norm=_GEMMA_NORM,
    wrapper_types=("gemma3",),
    wrapper_key_mapping={r"^language_model\.model\.": "", r"^model\.language_model\.": "", r"^language_model\.": ""},
    ignored_weights=(r"(^|\.)vision_tower\.", r"(^|\.)multi_modal_projector\."),
)
GPT2 = Adapter(
    name="gpt2",
    model_types=("gpt2",),
    trunk_paths=("transformer", ""),
    embedding="wte",
    blocks="h",
    final_norm="ln_f",
    causal_prefix="transformer.",
    # The causal mask, a buffer of every block in the checkpoints of 2019 (openai-community/gpt2 has `h.0.attn.bias`).
    ignored_weights=(r"(?:^|\.)attn\.(?:masked_)?bias$",),
)
"""The position embedding is added behind `wte`: an overwritten row still gets its position, as with `inputs_embeds`."""
GPT_NEOX = Adapter(
    name="gpt_neox",
    model_types=("gpt_neox",),
    trunk_paths=("gpt_neox", ""),
    embedding="embed_in",
    final_norm="final_layer_norm",
    causal_prefix="gpt_neox.",
    stored_lm_head="embed_out",
    # The causal mask, buffers of every block in what older transformers wrote (Pythia).
    ignored_weights=(r"(?:^|\.)attention\.(?:masked_)?bias$", _OLD_ROTARY),
)


def adapter_for(config: Any) -> Adapter:
    """The adapter whose family a transformers config belongs to.

    Raises:
        UnknownNameError: no registered adapter reads this `model_type`.
    """
    model_type = str(config.model_type)
    found: dict[str, Adapter] = {}
    known: set[str] = set()
    for name, adapter in registry.adapters.items():
        if model_type in (*adapter.model_types, *adapter.wrapper_types):
            found[name] = adapter
            if registry.adapters.origin(name) == registry.OWN_DISTRIBUTION:
                return adapter  # ours come first: no plug-in is imported for a family of our own
        known |= {*adapter.model_types, *adapter.wrapper_types}
    if len(found) > 1:
        origins = [f"{name} of {registry.adapters.origin(name)}" for name in found]
        raise CheckpointError(
            f"Several plug-ins read models of the type {model_type!r}.",
            faults=origins,
            next_step="uninstall one of them",
        )
    if found:
        return next(iter(found.values()))
    raise registry.unknown(
        "adapter for model_type", model_type, known, next_step="A plug-in may add one: see docs/add-a-model.md."
    )
