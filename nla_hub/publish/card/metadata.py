"""Front matter: what the Hub finds, lists and links a repository by."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from nla_hub.hub.search import REHEARSAL_TAG
from nla_hub.publish.card.rules import on_the_hub
from nla_hub.publish.facts import Form, Licence, Quantised
from nla_hub.publish.release import RepoRole

LIBRARY = "nla-hub"

TAGS = ("nla", "interpretability", "activation-decoding")
ROLE_TAGS: Mapping[RepoRole, tuple[str, ...]] = {
    "av": ("activation-verbalizer",),
    "ar": ("activation-reconstructor",),
    "pair": ("activation-verbalizer", "activation-reconstructor"),
    "data": (),
}
"""By which `nla-hub models search` finds pairs."""


def relation(form: Form, quantised: Quantised | None) -> str:
    """What a half is to its base model, in the Hub's words.

    Factors that are merged into their base make a finetune: the Hub's "merge" is one of two or more models.
    """
    if quantised is not None:
        return "quantized"
    return "adapter" if form == "lora" else "finetune"


def model_metadata(
    role: RepoRole,
    *,
    licence: Licence,
    base_model: str | None,
    form: Form = "full",
    quantised: Quantised | None = None,
    corpora: tuple[str, ...] = (),
    rehearsal: bool = False,
) -> dict[str, Any]:
    """Front matter of a model's card. A base model or corpus that is not on the Hub is left to the page."""
    base = base_model if on_the_hub(base_model) else None
    datasets = [name for name in dict.fromkeys(corpora) if on_the_hub(name)]
    other = licence.id == "other"
    metadata: dict[str, Any] = {
        "library_name": LIBRARY,
        "license": licence.id,
        "license_name": licence.name if other else None,
        "license_link": (licence.link or ("LICENSE" if "LICENSE" in licence.files else None)) if other else None,
        "base_model": base,
        "base_model_relation": None if base is None else relation(form, quantised),
        "datasets": datasets or None,
        "tags": [*TAGS, *ROLE_TAGS[role], *([REHEARSAL_TAG] if rehearsal else [])],
    }
    return {key: value for key, value in metadata.items() if value is not None}
