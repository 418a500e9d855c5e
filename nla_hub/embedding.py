"""The rows of a model's embedding table without the model: for whoever sends embeddings to a model that runs elsewhere.

Only the one file that holds the table is needed, and of it only the rows that are asked for are read. What the family's own
module makes of a row (Gemma multiplies by sqrt(d), rounded to the dtype) is left to that module.
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModel

from nla_hub.adapters import Adapter
from nla_hub.errors import WeightsError
from nla_hub.pretrained import TORCH_DTYPES
from nla_hub.weights import INDEX_NAME, WEIGHTS_NAME, StoredSlice, inside, is_finite, matches, read_header


def embedding_names(names: Collection[str], adapter: Adapter) -> list[str]:
    """Those weight names that are the embedding table: of a causal LM, a trunk or a wrapper."""
    pattern = rf"(?:^|\.){re.escape(adapter.embedding)}\.weight$"
    return [name for name in names if re.search(pattern, name) and not matches(name, adapter.ignored_weights)]


def embedding_file(directory: Path, files: Collection[str], adapter: Adapter) -> str:
    """Name of the safetensors file that holds the embedding table of a model directory; it need not be there yet.

    Args:
        directory: has the index, where the model is cut into shards.
        files: names in that directory, or of a repository's folder that it is a part of.

    Raises:
        WeightsError: no safetensors, or an index that cannot be read or names no embedding table.
    """
    if WEIGHTS_NAME in files or INDEX_NAME not in files:
        return WEIGHTS_NAME
    index = inside(directory, INDEX_NAME)
    try:
        weight_map = dict(json.loads(index.read_text(encoding="utf-8"))["weight_map"])
    except (OSError, ValueError, KeyError, TypeError) as cause:
        raise WeightsError("This index cannot be read.", where=index, next_step="download it again") from cause
    return str(weight_map[_only(embedding_names(weight_map, adapter), index, adapter)])


def embedding_table(directory: Path, file: str, adapter: Adapter) -> StoredSlice:
    """The embedding table in one file of a model directory [vocabulary, d]; nothing but the header is read.

    Raises:
        WeightsError: the file is missing or damaged, or holds no such table.
    """
    header = read_header(inside(directory, file))
    name = _only(embedding_names(header, adapter), directory / file, adapter)
    return StoredSlice(name, header[name])


def stored_dtype(table: StoredSlice) -> torch.dtype:
    """The dtype that a table is stored in; raises a WeightsError for a quantised one."""
    dtype = TORCH_DTYPES.get(table.get_dtype())
    if dtype is None:
        raise WeightsError(
            "The embedding table is not stored as plain numbers.",
            where=table.stored.file,
            got=table.get_dtype(),
            expected=" or ".join(TORCH_DTYPES),
        )
    return dtype


def embedded(ids: Sequence[int], table: StoredSlice, config: Any, adapter: Adapter, dtype: torch.dtype) -> Tensor:
    """What enters the model's first block for `ids`: `dtype` [len(ids), d], as the model in `dtype` computes it.

    Args:
        config: transformers config of the text model.

    Raises:
        WeightsError: the table is misshapen, lacks a row, or a row is not finite.
    """
    d = int(config.hidden_size)
    shape = table.get_shape()
    if len(shape) != 2 or shape[1] != d or max(ids) >= shape[0]:
        raise WeightsError(
            "The embedding table does not fit config and tokenizer.",
            where=table.stored.file,
            got=f"{table.name} {shape}",
            expected=f"[more than {max(ids)}, {d}]",
        )
    distinct = sorted(set(ids))
    rows = torch.cat([table[i : i + 1] for i in distinct]).to(dtype)
    if not is_finite(rows):
        raise WeightsError(
            "Rows of the embedding table hold NaN or infinite values.",
            where=table.stored.file,
            next_step="download it again; if it stays, ask its author to export it again",
        )
    module = _module(config, adapter, len(distinct), dtype)
    with torch.inference_mode():
        module.weight.copy_(rows)
        found: Tensor = module(torch.tensor([distinct.index(i) for i in ids]))
    return found.clone()


def _module(config: Any, adapter: Adapter, rows: int, dtype: torch.dtype) -> Any:
    """The family's own embedding module with so many rows: that of a model without blocks."""
    small = copy.deepcopy(config)
    small.vocab_size, small.num_hidden_layers, small.pad_token_id = rows, 0, None
    for name in adapter.per_layer_config:
        if getattr(small, name, None) is not None:
            setattr(small, name, [])
    with torch.random.fork_rng(devices=[]):  # its first values are drawn, and then overwritten
        return adapter.embedding_module(AutoModel.from_config(small, dtype=dtype))


def _only(names: list[str], where: Path, adapter: Adapter) -> str:
    if len(names) != 1:
        raise WeightsError(
            "It is not clear which weight is the embedding table.",
            where=where,
            got=", ".join(names) or "none",
            expected=f"one that ends in {adapter.embedding}.weight",
        )
    return names[0]
