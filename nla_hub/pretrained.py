"""Model directories -> verified transformers models: configs, tokenizers, complete causal LMs, trunks.

A load is believed only once every weight the model uses was found on disk, every weight on disk was used (or is one that
the adapter lists), and every used value is finite. transformers alone would fill a missing weight with random numbers and
leave a line in the log.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from nla_hub.adapters import Adapter, adapter_for
from nla_hub.errors import CheckpointError, WeightsError
from nla_hub.log import logger
from nla_hub.sidecar import Site
from nla_hub.weights import (
    ADAPTER_CONFIG_NAME,
    INDEX_NAME,
    WEIGHTS_NAME,
    StoredSlice,
    WeightIndex,
    matches,
    require_finite_weights,
    shorten,
)

GENERATION_CONFIG_NAME = "generation_config.json"


@dataclass(frozen=True)
class LoadOptions:
    """How weights become modules; the keywords of transformers' `from_pretrained`.

    `dtype` "auto" is float32 on a CPU and bfloat16 elsewhere. `device_map` None is the first accelerator, or the CPU.
    """

    dtype: str | torch.dtype = "auto"
    device_map: Any = None
    quantization_config: Any = None
    attn_implementation: str | None = None
    trust_remote_code: bool = False

    def placement(self) -> Any:
        """The device map that is used."""
        if self.device_map is not None:
            return self.device_map
        return (
            {"": torch.accelerator.current_accelerator() or "cpu"} if torch.accelerator.is_available() else {"": "cpu"}
        )

    def on_cpu(self) -> bool:
        """Whether all weights end in main memory."""
        place = self.placement()
        return str(place) == "cpu" or (isinstance(place, dict) and {str(v) for v in place.values()} == {"cpu"})

    def torch_dtype(self) -> torch.dtype:
        """The dtype that weights are loaded in."""
        if isinstance(self.dtype, torch.dtype):
            return self.dtype
        if self.dtype == "auto":
            return torch.float32 if self.on_cpu() else torch.bfloat16
        found = getattr(torch, self.dtype, None) if isinstance(self.dtype, str) else None
        if not isinstance(found, torch.dtype) or not found.is_floating_point:
            raise CheckpointError(
                "Unknown dtype.", got=repr(self.dtype), expected="'auto', 'float32', 'bfloat16' or 'float16'"
            )
        return found


# -- configs and tokenizers ----------------------------------------------------------------------------------


def load_config(directory: Path, *, trust_remote_code: bool = False) -> Any:
    """The transformers config of a directory; raises a CheckpointError where it is missing or cannot be read."""
    if not (directory / "config.json").is_file():
        raise CheckpointError(
            "This directory has no config.json, so it is no model.",
            where=directory,
            next_step="name the directory that holds config.json and the weights",
        )
    try:
        return AutoConfig.from_pretrained(directory, trust_remote_code=trust_remote_code)
    except Exception as cause:  # configs of strangers fail in every way there is
        remote = "trust_remote_code" in str(cause)
        raise CheckpointError(
            f"Its config.json cannot be used: {first_line(cause)}",
            where=directory,
            next_step="its architecture needs code of its own; pass trust_remote_code=True only if you have read that code"
            if remote
            else "download or copy the checkpoint again; if it stays, ask its author",
        ) from cause


def load_tokenizer(directory: Path, *, trust_remote_code: bool = False) -> Any:
    """The fast tokenizer of a directory; raises a CheckpointError where there is none."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(directory, trust_remote_code=trust_remote_code)
    except Exception as cause:
        raise CheckpointError(
            f"Its tokenizer cannot be loaded: {first_line(cause)}",
            where=directory,
            next_step="copy the tokenizer files of the base model into the directory",
        ) from cause
    if not tokenizer.is_fast:
        raise CheckpointError(
            "This tokenizer cannot tell where its tokens stand in the text.",
            where=directory,
            got=type(tokenizer).__name__,
            expected="a fast tokenizer (tokenizer.json)",
        )
    return tokenizer


def has_tokenizer(directory: Path) -> bool:
    """Whether a directory holds a tokenizer of its own."""
    return any((directory / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "tokenizer_config.json"))


def first_line(cause: Exception) -> str:
    lines = [line.strip() for line in str(cause).splitlines() if line.strip()]
    return lines[0] if lines else type(cause).__name__


# -- models --------------------------------------------------------------------------------------------------


@dataclass
class LoadedModel:
    """A verified model with the adapter that reads it."""

    model: Any
    adapter: Adapter
    directory: Path

    @property
    def d_model(self) -> int:
        """Width of the residual stream."""
        return int(self.model.config.get_text_config().hidden_size)


def load_causal_lm(directory: Path, options: LoadOptions) -> LoadedModel:
    """A complete causal LM: an AV, or a source that is to be steered."""
    config = load_config(directory, trust_remote_code=options.trust_remote_code)
    adapter = adapter_for(config)
    text = config.get_text_config()
    wrapped = config.model_type in adapter.wrapper_types
    mapping = {pattern: ("" if "lm_head" in pattern else "model.") for pattern in adapter.wrapper_key_mapping}
    mapping = {r"^language_model\.lm_head\.": "lm_head.", **mapping} if wrapped else {}
    return load_model(directory, AutoModelForCausalLM, text, adapter, options, mapping=mapping)


def verify_causal_lm(directory: Path, options: LoadOptions) -> None:
    """Raise what `load_causal_lm` would, and keep nothing: the weights are looked at where they lie, mapped as they are."""
    stored = {TORCH_DTYPES.get(tensor.dtype) for tensor in WeightIndex.read(directory).tensors.values()}
    dtype = stored.pop() if len(stored) == 1 else None
    load_causal_lm(
        directory,
        replace(options, dtype=dtype or options.torch_dtype(), device_map={"": "cpu"}, quantization_config=None),
    )


def load_trunk(directory: Path, site: Site, options: LoadOptions) -> LoadedModel:
    """The embedding and the blocks that reach `site`, nothing above: a source for capture."""
    config = load_config(directory, trust_remote_code=options.trust_remote_code)
    adapter = adapter_for(config)
    text = adapter.truncate_config(config.get_text_config(), site)
    mapping = dict(adapter.wrapper_key_mapping) if config.model_type in adapter.wrapper_types else {}
    droppable = [*_blocks_above(adapter, site), *adapter.lm_head_weights]
    loaded = load_model(directory, AutoModel, text, adapter, options, mapping=mapping, droppable=droppable)
    adapter.drop_final_norm(loaded.model)
    return loaded


def _blocks_above(adapter: Adapter, site: Site) -> list[str]:
    # layers.K+1 and up, as a pattern over digits is unreadable: matched by number in `matches`.
    return [f"blocks>{adapter.blocks}>{site.layer}"]


def load_model(
    directory: Path,
    auto_class: Any,
    config: Any,
    adapter: Adapter,
    options: LoadOptions,
    *,
    mapping: dict[str, str] | None = None,
    droppable: Sequence[str] = (),
    may_miss: Sequence[str] = (),
) -> LoadedModel:
    _refuse_other_weights(directory, config)
    index = WeightIndex.read(directory)
    dtype = options.torch_dtype()
    stored = {t.dtype for t in index.tensors.values()}
    if "F32" in stored and dtype != torch.float32:
        logger.info("%s: stored in float32, loaded in %s", directory, str(dtype).removeprefix("torch."))
    extra: dict[str, Any] = {}
    if mapping:
        extra["key_mapping"] = mapping
    if options.quantization_config is not None:
        extra["quantization_config"] = options.quantization_config
    attention = _attention(config, options, directory)
    if attention is not None:
        extra["attn_implementation"] = attention
    streamed = _is_streamed(index, dtype, config, options)
    if streamed:
        extra["state_dict"] = {name: StoredSlice(name, stored) for name, stored in index.tensors.items()}
    try:
        # Only a model's own class takes tensors instead of a directory.
        model_class = _model_class(auto_class, config) if streamed else auto_class
        with _without_load_report():
            model, info = model_class.from_pretrained(
                None if streamed else directory,
                config=config,
                dtype=dtype,
                device_map=options.placement(),
                use_safetensors=True,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # judged below, by name
                trust_remote_code=options.trust_remote_code,
                **extra,
            )
            if streamed:
                _complete_streamed(model, directory)
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as cause:  # configs of strangers fail in every way there is
        raise WeightsError(
            f"No model can be built from its config.json and weights: {type(cause).__name__}: {first_line(cause)}",
            where=directory,
            next_step="check that config.json and weights come from the same model",
        ) from cause
    missing = [n for n in info["missing_keys"] if not matches(n, may_miss)]
    unexpected = [n for n in info["unexpected_keys"] if not matches(n, [*droppable, *adapter.ignored_weights])]
    dropped = len(info["unexpected_keys"]) - len(unexpected)
    if dropped:
        logger.debug("%s: %d weights on disk are not needed here", directory, dropped)
    misshapen = sorted((n, tuple(a), tuple(b)) for n, a, b in info["mismatched_keys"] if not matches(n, droppable))
    faults = [f"missing: {n}" for n in sorted(missing)] + [f"unexpected: {n}" for n in sorted(unexpected)]
    faults += [f"{n}: got shape {got}, expected {expected}" for n, got, expected in misshapen]
    if faults:
        raise WeightsError(
            f"{len(missing)} weights are missing, {len(unexpected)} unexpected, {len(misshapen)} misshapen; "
            "a missing one would be random.",
            where=directory,
            faults=shorten(faults),
            next_step="check that the directory holds the whole model, and that its adapter is the right one",
        )
    require_finite_weights(model, directory, but=may_miss)
    model.eval().requires_grad_(False)
    return LoadedModel(model, adapter, directory)


def _attention(config: Any, options: LoadOptions, directory: Path) -> str | None:
    """The attention to ask for; None leaves it to transformers.

    A cap on attention scores (Gemma 2) is computed by some implementations only, and transformers 5.17 takes one that
    leaves it out without a word.
    """
    asked = options.attn_implementation
    if getattr(config, "attn_logit_softcapping", None) is None:
        return asked
    if asked == "sdpa":
        raise WeightsError(
            "sdpa leaves out the cap on attention scores that this model was trained with (attn_logit_softcapping).",
            where=directory,
            next_step='load it with attn_implementation="eager", or leave the choice out',
        )
    return asked or "eager"


def _is_streamed(index: WeightIndex, dtype: torch.dtype, config: Any, options: LoadOptions) -> bool:
    """Whether transformers is handed the tensors one by one instead of the files.

    Given the files it maps all of them and keeps every page it has read until the model is complete. That costs nothing
    where the mapped pages become the weights (same dtype, CPU). Everywhere else it is the whole checkpoint a second time:
    measured 1.57 times the bytes of a bfloat16 checkpoint loaded in float32.
    """
    placement = options.placement()
    if not isinstance(placement, dict) or "disk" in placement.values():
        return False  # "auto" and offloading look into the files themselves
    if getattr(config, "auto_map", None) or getattr(config, "quantization_config", None):
        return False  # code of its own, and weights that are quantised on disk
    same = {TORCH_DTYPES.get(t.dtype) for t in index.tensors.values()} == {dtype}
    return not (same and options.on_cpu()) or options.quantization_config is not None


TORCH_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "F64": torch.float64}
"""What safetensors calls them -> what torch calls them."""


def _model_class(auto_class: Any, config: Any) -> Any:
    """The class that an auto class would build for a config."""
    with torch.device("meta"):
        return type(auto_class.from_config(copy.deepcopy(config)))


def _complete_streamed(model: Any, directory: Path) -> None:
    """What transformers reads from a directory besides config and weights."""
    model.config.name_or_path = str(directory)
    if model.can_generate() and (directory / GENERATION_CONFIG_NAME).is_file():
        model.generation_config = GenerationConfig.from_pretrained(directory)


def _refuse_other_weights(directory: Path, config: Any) -> None:
    """Refuse what would make transformers load other files than those that were checked."""
    if (name := getattr(config, "transformers_weights", None)) is not None:
        raise CheckpointError(
            "Its config.json names a weights file of its own (transformers_weights).",
            where=directory,
            got=repr(name),
            expected=f"{WEIGHTS_NAME} or {INDEX_NAME}",
            next_step="rename the file and take the entry out of config.json, if you trust it",
        )
    if (directory / ADAPTER_CONFIG_NAME).exists():
        raise CheckpointError(
            f"This is a LoRA adapter ({ADAPTER_CONFIG_NAME}), not a complete model.",
            where=directory,
            next_step="merge it into its base model first (peft: merge_and_unload, then save_pretrained)",
        )


@contextmanager
def _without_load_report() -> Iterator[None]:
    """Silence transformers' own table of missing and unexpected weights: what it lists is judged right after."""
    report = logging.getLogger("transformers.modeling_utils")
    report.addFilter(_keep_all_but_report)
    try:
        yield
    finally:
        report.removeFilter(_keep_all_but_report)


def _keep_all_but_report(record: logging.LogRecord) -> bool:
    return "LOAD REPORT" not in record.getMessage()
