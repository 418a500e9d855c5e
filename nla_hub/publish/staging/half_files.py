"""Which files of a half are published: what a loader reads, and nothing else.

What stands in neither list below is refused by its name: a release never leaves anything out in silence.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from nla_hub.layouts import ADAPTER_WEIGHTS_NAME, AR_LORA_NAME, AR_META_NAME, Form
from nla_hub.publish.release import Entry
from nla_hub.publish.staging.licences import PAPER
from nla_hub.sidecar import SIDECAR_NAME, Role
from nla_hub.weights import ADAPTER_CONFIG_NAME, HEAD_NAME, INDEX_NAME, REFERENCE_NAME, WEIGHTS_NAME

TOKENIZER = re.compile(
    r"tokenizer(?:_config)?\.json|tokenizer\.model|special_tokens_map\.json|added_tokens\.json|vocab\.(?:json|txt)|"
    r"merges\.txt|chat_template\.(?:jinja|json)|additional_chat_templates/[\w.-]+\.jinja"
)
"""Files of a tokenizer."""

CONFIG, GENERATION = "config.json", "generation_config.json"

LEFT_OUT = re.compile(
    r"README\.md|\.eval_results/.*|"  # written anew
    r"preprocessor_config\.json|processor_config\.json|"  # of the images that a base's wrapper reads
    r"DONE|\.nla-hub/.*|"  # our own marks: of a run's stages, of a download
    r"\.gitattributes|\.gitignore|\.cache/.*|\.DS_Store"  # those of git, the Hub's client, a file manager
)
"""What may lie in a half's folder and is not published; licences, the sidecar and the reference are taken from elsewhere."""

OF_THE_MACHINE = ("_name_or_path", "name_or_path", "tokenizer_file", "special_tokens_map_file")
"""Keys of configurations in which libraries store where a file lay."""

MAX_JSON = 2**22
"""Bytes of a configuration that is looked into."""


def weight_files(directory: Path, form: Form, role: Role) -> list[str]:
    """Names of the files with a half's own weights, and what says how they are read."""
    if form == "model":
        found = [WEIGHTS_NAME] if (directory / WEIGHTS_NAME).is_file() else [INDEX_NAME, *_shards(directory)]
    else:
        found = [ADAPTER_CONFIG_NAME, ADAPTER_WEIGHTS_NAME] if form == "lora" else [AR_LORA_NAME]
        found += [AR_META_NAME] if role == "ar" else []
        found += [AR_LORA_NAME] if role == "ar" and form == "lora" else []
    found += [HEAD_NAME] if role == "ar" else []
    return [name for name in dict.fromkeys(found) if (directory / name).is_file()]


def _shards(directory: Path) -> list[str]:
    path = directory / INDEX_NAME
    if not path.is_file():
        return []
    return sorted(set(map(str, json.loads(path.read_text(encoding="utf-8")).get("weight_map", {}).values())))


def strangers(folder: Path, known: Collection[str], *, beside: Iterable[str] = ()) -> list[str]:
    """Files below a folder that are neither published nor known to be left out, sorted.

    Args:
        known: names of its files that are published.
        beside: names of its entries that are somebody else's business (the other half, the source).
    """
    apart = set(beside)
    return [
        name
        for name in _below(folder)
        if name.partition("/")[0] not in apart and name not in known and not _is_left_out(name)
    ]


def _is_left_out(name: str) -> bool:
    if LEFT_OUT.fullmatch(name) or TOKENIZER.fullmatch(name) or name in (CONFIG, GENERATION):
        return True
    return bool(PAPER.fullmatch(name)) or name in (SIDECAR_NAME, REFERENCE_NAME, AR_META_NAME)


def _below(folder: Path) -> Iterator[str]:
    """All files, links to folders as themselves."""
    for path in sorted(folder.rglob("*")):
        if not path.is_dir() or path.is_symlink():
            yield path.relative_to(folder).as_posix()


def half_entries(directory: Path, form: Form, role: Role, *, tokenizer: Path, base: str) -> list[Entry]:
    """Weights, configurations and tokenizer of a half, in place; without sidecar, card and licences.

    Args:
        tokenizer: the folder that its tokenizer was read from.
        base: what factors lie on, by its Hub name.
    """
    found = [Entry(name, directory / name) for name in weight_files(directory, form, role)]
    found += [Entry(name, directory / name) for name in (CONFIG, GENERATION) if (directory / name).is_file()]
    found += [Entry(name, tokenizer / name) for name in _below(tokenizer) if TOKENIZER.fullmatch(name)]
    if role == "ar" and (directory / REFERENCE_NAME).is_file():
        found.append(Entry(REFERENCE_NAME, directory / REFERENCE_NAME))
    return [_without_places(entry, base) for entry in found]


def generation_config(config: Any) -> bytes:
    """How an AV generates that brings no such file: what transformers reads from its config then."""
    from transformers import GenerationConfig

    return as_json(json.loads(GenerationConfig.from_model_config(config).to_json_string()))


def _without_places(entry: Entry, base: str) -> Entry:
    """A configuration without the keys that say where a file lay, factors with their base's name; other files as they are."""
    if not entry.name.endswith("config.json") or entry.size > MAX_JSON or not isinstance(entry.content, Path):
        return entry
    config = json.loads(entry.content.read_text(encoding="utf-8"))
    if not isinstance(config, dict):
        return entry
    kept = {key: value for key, value in config.items() if key not in OF_THE_MACHINE}
    if entry.name == ADAPTER_CONFIG_NAME:
        kept["base_model_name_or_path"] = base
    return entry if kept == config else Entry(entry.name, as_json(kept))


def as_json(value: Mapping[str, Any]) -> bytes:
    """A configuration as transformers spells it."""
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()
