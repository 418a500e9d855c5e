"""Where a job's rows come from: the name of a data set becomes its items, one after the other.

Names are explained in `naming`, formats in `texts`, `tables`, `arrays` and `streamed`. A row that cannot be read is an item
of its own with its reason, so the numbers of all others stay what they are.
"""

from __future__ import annotations

from nla_hub.errors import InputError
from nla_hub.explain.inputs.dataset import Options, open_files
from nla_hub.explain.inputs.items import BadItem, Dataset, Item, RecordedSite, TextItem, VectorItem
from nla_hub.explain.inputs.naming import Files, parse
from nla_hub.explain.inputs.texts import read_lines, read_text
from nla_hub.hub import HubOptions

__all__ = [
    "BadItem",
    "Dataset",
    "Item",
    "RecordedSite",
    "TextItem",
    "VectorItem",
    "open_dataset",
    "read_lines",
    "read_text",
]


def open_dataset(
    name: str,
    *,
    column: str | None = None,
    messages_column: str | None = None,
    id_column: str | None = None,
    limit: int | None = None,
    split: str | None = None,
    options: HubOptions | None = None,
) -> Dataset:
    """The data set of this name, looked into as far as needed to know that its rows can be read.

    Args:
        name: see `naming`.
        column: holds the texts ("text" by default), or the vectors; of a .safetensors file the tensor's name.
        messages_column: holds conversations ("messages" by default, where there is no text).
        id_column: holds the rows' ids ("doc_id", else "id" by default).
        limit: items at most.
        split: of a data set of the Hub read by its name.

    Raises:
        InputError: no such data set, columns that are not there, options that do not fit, or nothing to read.
        SidecarError: the sidecar of a file of vectors cannot be read.
        MissingExtraError: a data set of the Hub by its name, without the extra `data`.
        HubError: the Hub refuses, or cannot be reached.
        RunError: a disk or network failed meanwhile.
    """
    if limit is not None and limit < 1:
        raise InputError("A job has at least one row.", got=f"--limit {limit}")
    asked = Options(column, messages_column, id_column, limit)
    options = options or HubOptions()
    found = parse(name, options)
    if isinstance(found, Files):
        if split is not None:
            raise InputError("Only a data set of the Hub has splits.", where=name, got=f"split {split!r}")
        return open_files(name, found, asked)
    from nla_hub.explain.inputs.streamed import open_stream

    return open_stream(name, found, split, asked, options)
