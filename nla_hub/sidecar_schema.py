"""The JSON Schema of the sidecar as this project writes it, and the page on sidecars; both are rendered from tables.

`python -m nla_hub.sidecar_schema` prints docs/sidecar.schema.json, `--page` docs/sidecar.md. A stale file fails the tests.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from nla_hub.sidecar import EXPLANATION_PLACEHOLDER, INJECTION_PLACEHOLDER, OUTPUT_FORMAT, SCHEMA_VERSION
from nla_hub.sidecar_dialects import PLACES, ROLES, SCHEMA_VERSIONS
from nla_hub.sidecar_reading import FOLDER, LARGEST, RAW_WORDS, SQRT_D_MODEL

DIALECT = "https://json-schema.org/draft/2020-12/schema"


def _once(placeholder: str) -> str:
    """A pattern for texts that hold `placeholder` exactly once."""
    escaped = placeholder.replace("{", r"\{").replace("}", r"\}")
    other = rf"(?:(?!{escaped})[\s\S])*"
    return f"^{other}{escaped}{other}$"


def _text(description: str, **more: Any) -> dict[str, Any]:
    return {"description": description, "type": "string", **more}


def _whole(description: str, minimum: int = 0) -> dict[str, Any]:
    return {"description": description, "type": "integer", "minimum": minimum, "maximum": LARGEST}


def _number(description: str, **more: Any) -> dict[str, Any]:
    return {"description": description, "type": "number", **more}


def _scale(description: str) -> dict[str, Any]:
    return {"description": description, "type": ["number", "null"], "exclusiveMinimum": 0}


def _mapping(description: str, properties: dict[str, Any], *required: str) -> dict[str, Any]:
    return {"description": description, "type": "object", "properties": properties, "required": list(required)}


MARKER_KEYS = ("injection_char", "injection_token_id", "injection_left_neighbor_id", "injection_right_neighbor_id")


def schema() -> dict[str, Any]:
    """JSON Schema (draft 2020-12) of what `Sidecar.to_mapping` returns and `Sidecar.write` writes; other keys are allowed."""
    properties = {
        "kind": {"description": "What the file is.", "const": "nla_model"},
        "schema_version": {"description": "Version of this form.", "const": SCHEMA_VERSION},
        "role": {
            "description": "Which half this is: `av` (vector to text) or `ar` (text to vector).",
            "enum": ["av", "ar"],
        },
        "stage": _text("Training stage that made the weights, such as `av_sft` or `rl`."),
        "base_checkpoint": _text("The model whose vectors are explained: a name on the Hub."),
        "source_revision": _text("Its revision, or a hash of its weights."),
        "pair_repo": _text("Repository of the other half."),
        "d_model": _whole("Width of the vectors.", 1),
        "extraction_layer_index": _whole(
            "K: vectors are the output of decoder block K, counted from 0. In transformers that is `hidden_states[K + 1]`."
        ),
        "extraction": _mapping(
            "Norms that vectors get on their way.",
            {
                "injection_scale": _scale(
                    "L2 norm of the vector that overwrites the marker's embedding; null leaves it as it is. No default: the "
                    "AV learned with this figure."
                ),
                "mse_scale": _scale("L2 norm of both vectors in the AR's loss; null compared them as they were."),
            },
            "mse_scale",
        ),
        "injection": _mapping(
            "How a vector enters the AV.",
            {
                "kind": {
                    "description": "`overwrite` replaces the marker's embedding, `add` adds h + ‖h‖ · v/‖v‖ at the output "
                    "of block 1. Weights trained one way are useless the other way.",
                    "enum": ["overwrite", "add"],
                }
            },
            "kind",
        ),
        "tokens": _mapping(
            "Token ids that are checked against the tokenizer.",
            {
                "injection_char": _text("The marker: one character that is one token.", minLength=1, maxLength=1),
                "injection_token_id": _whole("Its id."),
                "injection_left_neighbor_id": _whole("Id of the token before it in the rendered AV prompt."),
                "injection_right_neighbor_id": _whole("Id of the token after it."),
                "critic_suffix_ids": {
                    "description": "Ids that every AR prompt ends in.",
                    "type": "array",
                    "items": {"type": "integer", "minimum": 0, "maximum": LARGEST},
                },
            },
        ),
        "prompt_templates": _mapping(
            "What the two halves are asked.",
            {
                "av": _text(
                    f"One user turn for the chat template; holds `{INJECTION_PLACEHOLDER}` once.",
                    pattern=_once(INJECTION_PLACEHOLDER),
                ),
                "ar": _text(
                    f"Plain text, no chat template; holds `{EXPLANATION_PLACEHOLDER}` once. The AR is read at its last token.",
                    pattern=_once(EXPLANATION_PLACEHOLDER),
                ),
            },
        ),
        "output_format": {
            "description": "The AV writes `<explanation>...</explanation>`.",
            "const": OUTPUT_FORMAT,
        },
        "final_norm_stripped": {
            "description": "Whether the AR's head was trained without the model's final norm.",
            "type": "boolean",
        },
        "head_input": {
            "description": "What the AR's head reads, where that is not h: `normalized` is h · mse_scale/‖h‖.",
            "enum": ["normalized"],
        },
        "ar_special_tokens": {
            "description": "`false` where the AR was trained on prompts without the tokenizer's BOS.",
            "const": False,
        },
        "adapter_stack": {
            "description": "LoRA folders that are applied to the base model, in this order.",
            "type": "array",
            "minItems": 1,
            "items": {"type": "string", "pattern": f"^{FOLDER}$"},
        },
        "fve": _mapping(
            "A measured score.",
            {
                "value": _number("Fraction of variance explained."),
                "baseline": _text("Its denominator: `raw_variance` or `mean_norm`."),
                "dataset": _text("Name of the data set."),
                "n": {"description": "Number of its vectors.", "type": "integer", "minimum": 0},
                "cosine": _number("Mean cosine over them."),
                "protocol": _text("Name of the evaluation protocol."),
                "commit": _text("Commit of the code that measured."),
            },
            *("value", "baseline", "dataset", "n"),
        ),
        "fve_reference": _mapping(
            "Denominators of FVE.",
            {
                "dataset": _text("Name of the data set."),
                "n": {"description": "Number of its vectors.", "type": "integer", "minimum": 0},
                "raw_variance": _number("E‖u − mean(u)‖² of unit vectors u.", exclusiveMinimum=0),
                "mean_norm": _number("E‖u − mean(u)/‖mean(u)‖‖².", exclusiveMinimum=0),
                "norm_p0_5": _number("0.5 % quantile of the raw norms."),
                "norm_p99_5": _number("Their 99.5 % quantile."),
            },
            *("dataset", "n", "raw_variance", "mean_norm"),
        ),
        "release": _mapping(
            "Which push this half came with; both halves of a pair carry the same one.",
            {
                "id": _text(
                    "Twelve hexadecimal digits over all that is loaded of both halves.", pattern="^[0-9a-f]{12}$"
                ),
                "tag": _text("What this revision of both repositories is called."),
            },
            *("id", "tag"),
        ),
        "integrity": _mapping(
            "Hash over the rest, which tells an edited file from the one that was written.",
            {"sha256": _text("64 hexadecimal digits.", pattern="^[0-9a-f]{64}$")},
            "sha256",
        ),
    }

    def where(**values: Mapping[str, Any]) -> dict[str, Any]:
        return {"properties": values, "required": list(values)}

    av, overwrites = {"const": "av"}, where(kind={"const": "overwrite"})
    marker, norm = {"required": list(MARKER_KEYS)}, {"required": ["injection_scale"]}
    return {
        "$schema": DIALECT,
        "$comment": "Generated: python -m nla_hub.sidecar_schema > docs/sidecar.schema.json",
        "title": "nla_meta.yaml, the sidecar of one half of a natural language autoencoder",
        **_mapping(
            "As nla-hub writes it. What it reads besides is in docs/sidecar.md; keys that are not named here are kept.",
            properties,
            *("kind", "schema_version", "role", "d_model", "extraction_layer_index"),
            *("extraction", "injection", "output_format"),
        ),
        "allOf": [
            {"if": where(role=av), "then": where(tokens=marker, prompt_templates={"required": ["av"]})},
            {"if": where(role=av, injection=overwrites), "then": where(extraction=norm)},
            {"if": where(role={"const": "ar"}), "then": where(prompt_templates={"required": ["ar"]})},
            {"if": where(head_input={}), "then": where(extraction=where(mse_scale={"type": "number"}))},
        ],
    }


def schema_json() -> str:
    """The text of docs/sidecar.schema.json."""
    return json.dumps(schema(), indent=2, ensure_ascii=False) + "\n"


# -- the page ------------------------------------------------------------------------------------------------


def keys(node: Mapping[str, Any], path: tuple[str, ...] = ()) -> Iterator[tuple[str, bool, Mapping[str, Any]]]:
    """Every key of the schema: dotted name, whether its mapping requires it, its node."""
    for name, inner in node.get("properties", {}).items():
        yield ".".join((*path, name)), name in node.get("required", ()), inner
        yield from keys(inner, (*path, name))


def _table(head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    lines = [head, tuple("---" for _ in head), *rows]
    return "".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |\n" for line in lines)


def page() -> str:
    """The text of docs/sidecar.md."""
    known = [(f"`{name}`", "yes" if needed else "", node["description"]) for name, needed, node in keys(schema())]
    read = [
        (f"`{name}`" if i == 0 else "", f"`{place.path}`", place.found_in)
        for name, places in PLACES.items()
        for i, place in enumerate(places)
    ]
    roles = ", ".join(f"`{other}` for `{role}`" for other, role in ROLES.items() if other != role)
    return PAGE.format(
        keys=_table(("key", "always there", "meaning"), known),
        places=_table(("value", "may stand at", "found in"), read),
        roles=roles,
        versions=" and ".join(map(str, SCHEMA_VERSIONS)),
        sqrt=SQRT_D_MODEL,
        raw=", ".join(f'`"{word}"`' for word in RAW_WORDS),
    )


PAGE = """\
<!-- Generated: python -m nla_hub.sidecar_schema --page > docs/sidecar.md -->
# The sidecar: `nla_meta.yaml`

Everything in which two NLAs differ stands in this file, beside the weights of each half. Whoever publishes a checkpoint
writes it once; whoever loads the checkpoint types none of it. nla-hub checks the file against tokenizer, config and the
other half before it loads a weight, and names all faults at once.

## What to write

[`sidecar.schema.json`](sidecar.schema.json) describes the same keys for editors and validators. An AV also needs
`prompt_templates.av`, the marker and its three ids, and, where it overwrites, `extraction.injection_scale`; an AR needs
`prompt_templates.ar`. Any other key is kept, and written back where the file is rewritten.

{keys}
To see whether a file is right:

```python
from nla_hub import Sidecar
from nla_hub.errors import SidecarError

mine = {{
    "kind": "nla_model",
    "schema_version": 2,
    "role": "ar",
    "base_checkpoint": "owner/base",
    "d_model": 64,
    "extraction_layer_index": 2,
    "prompt_templates": {{"ar": "<text>{{explanation}}</text> <summary>"}},
}}
sidecar = Sidecar.parse(mine)
assert sidecar.site.hidden_states_index == 3
print(sidecar.to_mapping())  # the form that is written

try:
    Sidecar.parse({{**mine, "role": "av", "d_model": -64}})
except SidecarError as error:
    print(error)  # every fault, and what to do
```

`Sidecar.read(path)` takes a directory, the file itself, or a parquet file with its sidecar beside it.

## What is read besides

Files of other writers hold the same values elsewhere. Two places that disagree are a fault that names both; names of a base
model agree where they differ in owner and revision only. Versions {versions} are read.

{places}
- **Roles**: {roles}. `kind: nla_dataset` (the sidecar of training data, which some repositories of adapters carry as it is)
  names no role; then it is the half that was asked for.
- **Scales**: a number, a number as text, `"{sqrt}"`, or null, {raw} for vectors as they are. An absent `mse_scale` is
  sqrt(d_model). An absent `injection_scale` is a fault on an AV that overwrites; null is not.
- **`injection.kind`**: absent, it is `overwrite` where `injection_scale` is there. Otherwise nla-hub asks, unless the origin
  of the checkpoint is known: EasyNLA and nanoNLA train `add`.
- **`training.num_layers`** counts the blocks of the model that was trained: K + 1 on an AR, the base's depth on an AV. It is
  used on an AR only, where no other place names the layer, and never compared with one.
- **Marker ids** that an AV's file lacks are measured where its tokenizer is at hand.

Refused, because vectors would need another treatment than a pair gives them: `extraction.norm` or `extraction.whitening` other
than none, several `extraction.checkpoints`, `variant: universal`, `d_shared`. YAML with tags that build objects, anchors that
explode or keys that stand twice is refused as well.

## Knowing better than the file

What a user says wins, in whatever dialect the file is:

```python
from nla_hub.sidecar import merge

older = {{"role": "actor", "d_model": 64, "layer": 3, "prompt_templates": {{"actor": "<v>{{injection_char}}</v>"}}}}
tokens = {{
    "injection_char": "㊥",
    "injection_token_id": 9,
    "injection_left_neighbor_id": 7,
    "injection_right_neighbor_id": 8,
}}
better = merge(older, {{"extraction_layer_index": 2, "injection": {{"kind": "add"}}, "tokens": tokens}})
assert Sidecar.parse(better).site.layer == 2
```
"""


if __name__ == "__main__":
    print(page() if "--page" in sys.argv[1:] else schema_json(), end="")
