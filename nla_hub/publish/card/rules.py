"""Our own copy of what the Hub asks of the front matter of a card, as far as its public documentation says.

huggingface_hub's own check goes online, and a card that is refused there is refused after the weights were sent. The sources
stand beside each rule; words are in `vocabulary`. Two rules are this project's own: a model card names no `pipeline_tag` (no
widget or snippet of the Hub fits an NLA) and no `model-index` (scores are in `.eval_results/`).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from nla_hub import yaml_io
from nla_hub.errors import PublishError
from nla_hub.publish.card.vocabulary import LANGUAGES_BESIDES, LICENCE_FILES, LICENCES, RELATIONS, SIZES
from nla_hub.publish.release import RepoKind

FRONT_MATTER = re.compile(r"\A---\n(.*?)\n---[ \t]*(?:\n|\Z)", re.DOTALL)
"""What the Hub takes for metadata: between two lines of `---`, the first of them the file's first line
(https://huggingface.co/docs/hub/model-cards#editing-the-yaml-section-of-the-readmemd-file)."""

MAX_FRONT_MATTER = 100_000
"""Characters; our own bound: what is written here has some thousand."""

MAX_BYTES = 10_000_000
"""Of a README.md that is stored as text: larger files go to LFS (https://huggingface.co/docs/hub/repositories-recommendations)."""

_LICENCE_NAME = re.compile(r"[a-z0-9][a-z0-9.+-]*")
_ADDRESS = re.compile(r"https?://\S+")
_LANGUAGE = re.compile(r"[a-z]{2,3}")

Metadata = Mapping[str, Any]


def metadata_faults(text: str, kind: RepoKind) -> list[str]:
    """What the Hub would refuse or misread in a card, or what is false on a card of ours; empty where all is well.

    Args:
        text: the complete README.md.
        kind: of the repository; a model's card and a data set's have different keys.
    """
    if len(text.encode("utf-8", "surrogatepass")) > MAX_BYTES:
        return [f"README.md: larger than {MAX_BYTES} bytes, so the Hub would not show it as a card"]
    found = FRONT_MATTER.match(text)
    if found is None:
        return ["front matter: the card does not begin with a block between two lines of ---"]
    if len(found[1]) > MAX_FRONT_MATTER:
        return [f"front matter: {len(found[1])} characters, more than {MAX_FRONT_MATTER}"]
    try:
        metadata = yaml_io.loads(found[1], where="README.md", error=PublishError)
    except PublishError as error:
        return [f"front matter: {error.what}"]
    return [fault for rule in (*_COMMON, *_OF[kind]) for fault in rule(metadata)]


def repo_id_fault(value: object) -> str | None:
    """Why `value` is no name of a repository on the Hub (owner/name, or one of the old names without an owner)."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]  # there, but not in its `__all__`

    if not isinstance(value, str):
        return f"got {value!r}, expected owner/name"
    try:
        validate_repo_id(value)
    except HFValidationError as error:
        return f"got {value!r}: {error}"
    return None


def on_the_hub(name: str | None) -> bool:
    """Whether a model or data set may be asked for by this name: an owner and a name."""
    return name is not None and "/" in name and repo_id_fault(name) is None


# -- both kinds ----------------------------------------------------------------------------------------------


def _licence(metadata: Metadata) -> Iterator[str]:
    value = metadata.get("license")
    if value is None:
        yield "license: missing; write the identifier of a licence, or other with license_name and license_link"
        return
    for one in value if isinstance(value, list) else [value]:
        if one not in LICENCES:
            yield f"license: got {one!r}, expected one of the Hub's identifiers, or other"
    name, link = metadata.get("license_name"), metadata.get("license_link")
    if value == "other" and (name is None or link is None):
        yield "license: other needs license_name and license_link (docs/hub/model-cards#specifying-a-license)"
    if name is not None and not (isinstance(name, str) and _LICENCE_NAME.fullmatch(name)):
        yield f"license_name: got {name!r}, expected an identifier such as my-license-1.0"
    if link is not None and not (isinstance(link, str) and (link in LICENCE_FILES or _ADDRESS.fullmatch(link))):
        yield f"license_link: got {link!r}, expected {' or '.join(LICENCE_FILES)}, or an address"


def _tags(metadata: Metadata) -> Iterator[str]:
    yield from _texts(metadata, "tags")


def _languages(metadata: Metadata) -> Iterator[str]:
    value = metadata.get("language")
    if value is None:
        return
    for one in value if isinstance(value, list) else [value]:
        # YAML reads the Norwegian "no" as false unless it stands in quotes.
        if not isinstance(one, str) or not (_LANGUAGE.fullmatch(one) or one in LANGUAGES_BESIDES):
            yield f"language: got {one!r}, expected an ISO 639 code of two or three letters"


def _texts(metadata: Metadata, key: str) -> Iterator[str]:
    """A list of texts that are not empty; a null in it is what broke the cards of others (transformers issue 13528)."""
    value = metadata.get(key)
    if value is None:
        if key in metadata:
            yield f"{key}: got null, expected a list of texts, or no such key"
    elif not isinstance(value, list) or not all(isinstance(one, str) and one.strip() for one in value):
        yield f"{key}: got {value!r}, expected a list of texts"
    elif len(set(value)) < len(value):
        yield f"{key}: a value stands twice in {value!r}"


def _ids(metadata: Metadata, key: str, *, single: bool) -> Iterator[str]:
    value = metadata.get(key)
    if value is None:
        if key in metadata:
            yield f"{key}: got null, expected names of repositories, or no such key"
        return
    if not isinstance(value, list) and not (single and isinstance(value, str)):
        yield f"{key}: got {value!r}, expected a list of repositories"
        return
    for one in value if isinstance(value, list) else [value]:
        if fault := repo_id_fault(one):
            yield f"{key}: {fault}"


# -- models --------------------------------------------------------------------------------------------------


def _library(metadata: Metadata) -> Iterator[str]:
    """https://huggingface.co/docs/hub/model-cards#specifying-a-library"""
    if metadata.get("library_name") != "nla-hub":
        yield f"library_name: got {metadata.get('library_name')!r}, expected 'nla-hub'"


def _base(metadata: Metadata) -> Iterator[str]:
    """https://huggingface.co/docs/hub/model-cards#specifying-a-base-model"""
    yield from _ids(metadata, "base_model", single=True)
    relation, base = metadata.get("base_model_relation"), metadata.get("base_model")
    if "base_model_relation" not in metadata:
        return
    if relation not in RELATIONS:
        yield f"base_model_relation: got {relation!r}, expected one of {', '.join(RELATIONS)}"
    elif base is None:
        yield "base_model_relation: stands there without a base_model"
    elif relation == "merge" and not (isinstance(base, list) and len(base) > 1):
        yield "base_model_relation: a merge has two or more models in base_model"


def _data(metadata: Metadata) -> Iterator[str]:
    """https://huggingface.co/docs/hub/model-cards#specifying-a-dataset"""
    yield from _ids(metadata, "datasets", single=False)


def _nothing_false(metadata: Metadata) -> Iterator[str]:
    if "pipeline_tag" in metadata:
        yield f"pipeline_tag: got {metadata['pipeline_tag']!r}; no task of the Hub is what an NLA does, so its snippet is wrong"
    if "model-index" in metadata:
        yield "model-index: scores stand in .eval_results/ (https://huggingface.co/docs/hub/eval-results)"


# -- data sets -----------------------------------------------------------------------------------------------


def _sizes(metadata: Metadata) -> Iterator[str]:
    value = metadata.get("size_categories")
    for one in value if isinstance(value, list) else [] if value is None else [value]:
        if one not in SIZES:
            yield f"size_categories: got {one!r}, expected one of {', '.join(SIZES)}"


def _tasks(metadata: Metadata) -> Iterator[str]:
    for key in ("task_categories", "task_ids"):
        yield from _texts(metadata, key)


def _title(metadata: Metadata) -> Iterator[str]:
    value = metadata.get("pretty_name", "-")
    if not (isinstance(value, str) and value.strip()):
        yield f"pretty_name: got {value!r}, expected a text"


def _configs(metadata: Metadata) -> Iterator[str]:
    """https://github.com/huggingface/hub-docs/blob/main/datasetcard.md and docs/hub/datasets-manual-configuration"""
    value = metadata.get("configs")
    if value is None:
        return
    if not isinstance(value, list) or not all(isinstance(one, dict) for one in value):
        yield f"configs: got {value!r}, expected a list of mappings"
        return
    names = [one.get("config_name") for one in value]
    if not all(isinstance(name, str) and name for name in names):
        yield "configs: each needs a config_name"
    elif len(set(names)) < len(names):
        yield f"configs: a config_name stands twice in {names!r}"
    for one in value:
        files = one.get("data_files")
        parts = files if isinstance(files, list) else [files]
        if files is not None and not all(_names_files(part) for part in parts):
            yield f"configs: data_files of {one.get('config_name')!r}: expected paths, or mappings with split and path"


def _names_files(part: object) -> bool:
    if isinstance(part, str):
        return bool(part)
    if not isinstance(part, dict) or not isinstance(part.get("split"), str):
        return False
    path = part.get("path")
    paths = path if isinstance(path, list) else [path]
    return bool(paths) and all(isinstance(one, str) and one for one in paths)


Rule = Callable[[Metadata], Iterator[str]]

_COMMON: tuple[Rule, ...] = (_licence, _tags, _languages)
_OF: dict[RepoKind, tuple[Rule, ...]] = {
    "model": (_library, _base, _data, _nothing_false),
    "dataset": (_sizes, _tasks, _title, _configs),
}
