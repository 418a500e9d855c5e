"""`nla-hub new-adapter`: the files that a new base model begins with, written from its config and tokenizer, without weights.

For a family that no adapter reads: a plug-in to install, with the adapter, its test and the entry point. For all: a recipe
and the template of a sidecar. What is written was tried before: the adapter by `nla_hub.testing.check_adapter`, the recipe by
the reader of recipes.
"""

from __future__ import annotations

import dataclasses
import json
import re
import runpy
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from string import Template
from tempfile import mkdtemp
from typing import Any

from nla_hub import yaml_io
from nla_hub.adapters import Adapter
from nla_hub.errors import CheckpointError, InputError, NLAError, RunError, TextError
from nla_hub.prompts import measure_marker
from nla_hub.sidecar import SIDECAR_NAME, Injection, MarkerTokens, Sidecar, Site
from nla_hub.training.contract import suffix_ids
from nla_hub.training.family import guess_adapter, small_model
from nla_hub.training.marker import choose_marker
from nla_hub.training.recipe import PromptSpec, load_recipe, recipe_path
from nla_hub.training.scaffold.new_base import NewBase

PATTERN = "qwen2.5-7b-lora"
"""The packaged recipe whose settings a new one takes over: LoRA on one GPU."""

TAKEN_OVER_FROM = "prompts:"
"""The line of that recipe from which on all is taken over; what stands before is about its base model."""

MEASURED = "MEASURED-BY-A-RUN"
"""Stands in a sidecar's template for what only a run knows; a reader of sidecars refuses it."""

CONFIG_KEYS = (
    "model_type",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "vocab_size",
    "max_position_embeddings",
    "sliding_window",
    "use_sliding_window",
    "layer_types",
    "tie_word_embeddings",
)
"""What a recipe's `base.config` says, where the model has it: what memory and the shape of a rehearsal depend on."""


@dataclass(frozen=True)
class Written:
    """What was written where; `adapter` names the one that reads the family, `is_new` says whether it is in the plug-in."""

    directory: Path
    recipe: Path
    files: tuple[str, ...]
    adapter: str
    is_new: bool
    marker: str


def default_place(base: NewBase, layer: int) -> Path:
    """Where the files go when nobody says."""
    return Path(f"nla-{base.slug}-L{layer}")


def write_scaffold(base: NewBase, layer: int, place: Path | None = None) -> Written:
    """Write the files of a new base; the directory is there whole or not at all.

    Args:
        place: a directory that does not exist yet.

    Raises:
        InputError: no such layer. RunError: something is there already. TextError: no chat template. RecipeError: no marker.
        CheckpointError: a family that an adapter cannot describe, or does not do what nla-hub needs.
    """
    if not 0 <= layer < base.depth:
        raise InputError(
            "The base model has no such layer.", where="--layer", got=layer, expected=f"0 to {base.depth - 1}"
        )
    place = default_place(base, layer) if place is None else place
    if place.exists() or place.is_symlink():
        raise RunError("This exists already; nothing was written.", where=place, next_step="name another place with -o")
    if not place.parent.is_dir():
        raise RunError("There is no such directory; nothing was written.", where=place.parent)
    prompts = load_recipe(PATTERN).prompts
    marker = _marker(base, prompts)
    words = _words(base, layer, marker)
    work = Path(mkdtemp(dir=place.parent, prefix=f".{place.name}."))
    try:
        if base.adapter is None:
            _write_plugin(work, base, words)
        else:
            _write(work / "README.md", "README.recipe.md.in", words)
        _write(work / words["recipe"], "recipe.yaml.in", words)
        load_recipe(str(work / words["recipe"]))
        _write_sidecar(work, base, layer, marker, prompts, words)
        written = tuple(sorted(str(path.relative_to(work)) for path in work.rglob("*") if path.is_file()))
        work.chmod(0o755)
        work.rename(place)
    except BaseException:
        shutil.rmtree(work, ignore_errors=True)
        raise
    return Written(place, place / words["recipe"], written, words["adapter"], base.adapter is None, marker.char)


def _marker(base: NewBase, prompts: PromptSpec) -> MarkerTokens:
    """The marker for a base and its neighbours in the AV's prompt, measured on its tokenizer."""
    if not getattr(base.tokenizer, "chat_template", None):
        raise TextError(
            "This base model has no chat template, so an AV made from it could not be asked anything.",
            where=base.model,
            next_step="name the instruct or chat version of the model",
        )
    return measure_marker(base.tokenizer, choose_marker(base.tokenizer, prompts.av), prompts.av)


def _words(base: NewBase, layer: int, marker: MarkerTokens) -> dict[str, str]:
    """What the files are filled with."""
    family = str(base.text.model_type)
    identifier = re.sub(r"\W", "_", family)
    lines = recipe_path(PATTERN).read_text(encoding="utf-8").splitlines()
    begin = next(i for i, line in enumerate(lines) if line.startswith(TAKEN_OVER_FROM))
    rest = "\n".join(lines[begin:])
    rest = re.sub(
        r"(?m)^hardware:.*$", "hardware:                          # untouched: --plan says what this model needs", rest
    )
    return {
        "base": base.model,
        "model": _yaml(base.model),
        "revision": _yaml(base.revision),
        "family": family,
        "adapter": family if base.adapter is None else base.adapter.name,
        "constant": identifier.upper(),
        "factory": f"random_{identifier}",
        "package": f"nla_{identifier.lower()}",
        "distribution": f"nla-{re.sub(r'[^a-z0-9]+', '-', family.lower())}",
        "slug": base.slug,
        "recipe": f"{base.slug}.yaml",
        "summary": _yaml(f"{base.model} at layer {layer} of {base.depth}: LoRA factors on a frozen base"),
        "layer": str(layer),
        "depth": str(base.depth),
        "config": "\n".join(f"    {key}: {_yaml(value)}" for key, value in base_config(base.text).items()),
        "marker": json.dumps(marker.char, ensure_ascii=False),
        "codepoint": f"U+{ord(marker.char):04X}",
        "marker_id": str(marker.id),
        "left_id": str(marker.left_id),
        "right_id": str(marker.right_id),
        "pattern": PATTERN,
        "rest": rest,
    }


def base_config(text: Any) -> dict[str, Any]:
    """`base.config` of a recipe for a text config: plain values under transformers' common names."""
    found = {key: getattr(text, key, None) for key in CONFIG_KEYS}
    kept = {
        key: list(value) if isinstance(value, tuple) else value for key, value in found.items() if value is not None
    }
    if len(set(kept.get("layer_types", ()))) < 2:
        kept.pop("layer_types", None)  # one kind: the family's own default
    return kept


def _yaml(value: Any) -> str:
    """A value as YAML on one line."""
    return json.dumps(value, ensure_ascii=False)


def _write(path: Path, template: str, words: Mapping[str, str]) -> None:
    text = (files("nla_hub.training.scaffold") / "files" / template).read_text(encoding="utf-8")
    yaml_io.write_text(path, Template(text).substitute(words).rstrip() + "\n")


def _write_sidecar(
    work: Path, base: NewBase, layer: int, marker: MarkerTokens, prompts: PromptSpec, words: Mapping[str, str]
) -> None:
    sidecar = Sidecar(
        role="av",
        d_model=int(base.text.hidden_size),
        site=Site(layer),
        marker=marker,
        av_template=prompts.av,
        ar_template=prompts.ar,
        ar_suffix_ids=suffix_ids(base.tokenizer, prompts.ar),
        injection=Injection("overwrite", 1.0),
        base_model=base.model,
        source_revision=base.revision,
    ).to_mapping()
    sidecar["extraction"]["injection_scale"] = MEASURED
    _write(work / SIDECAR_NAME, "sidecar.yaml.in", words)
    head = (work / SIDECAR_NAME).read_text(encoding="utf-8")
    yaml_io.write_text(work / SIDECAR_NAME, head + yaml_io.dumps(sidecar))


def _write_plugin(work: Path, base: NewBase, words: Mapping[str, str]) -> None:
    """Write the package with the adapter, check it, and write what belongs to it."""
    small = small_model(base.text)
    adapter = guess_adapter(base.config, small)
    said = {
        **words,
        "attributes": _attributes(adapter),
        "settings": "\n".join(f"    {_python(key)}: {_python(value)}," for key, value in small.settings.items()),
        "kinds": _python(small.per_layer),
        "attention": ', attn_implementation="eager"' if small.eager else "",
        "wrapper": _about_wrapper(adapter),
    }
    package = work / words["package"]
    yaml_io.write_text(package / "__init__.py", f'"""The {words["family"]} family for nla-hub."""\n')
    _write(package / "family.py", "family.py.in", said)
    _check(package / "family.py", words)
    _write(work / "tests" / "test_family.py", "test_family.py.in", said)
    _write(work / "pyproject.toml", "pyproject.toml.in", said)
    _write(work / "README.md", "README.plugin.md.in", said)


def _check(path: Path, words: Mapping[str, str]) -> None:
    """Check the adapter as it was written."""
    from nla_hub.testing import check_adapter  # random models are of no use to anything else here

    written = runpy.run_path(str(path))
    try:
        check_adapter(written[words["constant"]], written[words["factory"]])
    except Exception as cause:  # a foreign architecture may fail in its own forward pass
        faults = cause.faults if isinstance(cause, NLAError) else [f"{type(cause).__name__}: {cause}"]
        raise CheckpointError(
            "An adapter can be guessed for this family, but nla-hub does not work with it; nothing was written.",
            where=f"model_type {words['family']!r}",
            faults=faults,
            next_step="docs/add-a-model.md says what an adapter can tell; what it cannot is a matter for an issue of nla-hub",
        ) from cause


def _attributes(adapter: Adapter) -> str:
    """The arguments of an adapter that differ from the usual names, a line each."""
    lines = []
    for field in dataclasses.fields(adapter):
        value = getattr(adapter, field.name)
        default = {} if field.name == "wrapper_key_mapping" else field.default
        if value != default:
            lines.append(f"    {field.name}={_python(value)},")
    return "\n".join(lines)


def _python(value: Any) -> str:
    """A plain value as Python source, strings in double quotes."""
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False)
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{_python(k)}: {_python(v)}" for k, v in value.items()) + "}"
    if isinstance(value, tuple):
        return "(" + ", ".join(map(_python, value)) + ("," if len(value) == 1 else "") + ")"
    if isinstance(value, list):
        return "[" + ", ".join(map(_python, value)) + "]"
    return repr(value)


def _about_wrapper(adapter: Adapter) -> str:
    if not adapter.wrapper_types:
        return ""
    return (
        f"\nThe base model is a wrapper ({adapter.wrapper_types[0]}) around a text model. How its weights are named could not "
        "be read without them: `wrapper_key_mapping` and `ignored_weights` are the usual names. Load it once before you train."
    )
