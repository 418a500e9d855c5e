"""Code for readers: a pair with nla-hub, and each half with transformers alone.

Both are written for exactly this contract, and tests run them on random repositories of every family.
"""

from __future__ import annotations

import json
import shlex
from typing import Any

from nla_hub import registry
from nla_hub.adapters import Adapter
from nla_hub.publish.card.contract import Contract
from nla_hub.publish.card.rules import on_the_hub
from nla_hub.publish.card.templates import render
from nla_hub.publish.card.text import code
from nla_hub.publish.facts import Form, Quantised, ReleaseNames
from nla_hub.publish.release import RepoRole
from nla_hub.publish.staging.naming import MADE_HERE
from nla_hub.sidecar import Role
from nla_hub.zoo import zoo

TEXT = "The quick brown fox jumps over the lazy dog."
"""Whose last token is explained."""

EXPLANATIONS = ("a fable about a clever fox", "the end of a sentence")
"""What is turned into vectors."""

BASE = "./BASE"
"""Stands for the directory of a base model that nobody can download."""


def base_option(base_model: str | None) -> str:
    """What a command needs besides a pair's name to find its base model; "" where the Hub has that.

    A base model that a run trained is called by its recipe. Of a recipe whose pair is packaged, the pair's name stands for it.
    """
    if on_the_hub(base_model):
        return ""
    packaged = (entry.name for entry in zoo().values() if entry.packaged)
    name = next((name for name in packaged if base_model == f"{name}{MADE_HERE}"), BASE)
    return f" --base-model {shlex.quote(name)}"


def base_note(base_model: str) -> str | None:
    """What `base_option` stands for, in Markdown; None where there is no option."""
    option = base_option(base_model)
    if not option:
        return None
    told = f"The base model, {code(base_model)}, is not on the Hub."
    if option.endswith(BASE):
        return f"{told} Its directory is needed: `{BASE}` stands for that."
    name = code(option.split()[-1])
    return (
        f"{told} {name} names the one that is packaged with nla-hub; of one that was trained anew name its directory."
    )


def with_nla_hub(contract: Contract, names: ReleaseNames, role: RepoRole) -> str:
    """A fenced block for the repository of `role`."""
    unknown = contract.site is not None and contract.base_model is not None and not on_the_hub(contract.base_model)
    return render(
        "with_nla_hub.md",
        role=role,
        name=_quoted(f"{names.av}@{names.tag}"),
        text=_quoted(TEXT),
        texts=_quoted(EXPLANATIONS),
        d=contract.d_model if unknown and role != "ar" else None,
        k=None if contract.site is None else contract.site.layer,
    ).strip()


def with_transformers(
    contract: Contract, names: ReleaseNames, half: Role, form: Form, quantised: Quantised | None
) -> str | None:
    """A fenced block for one half; None where there is no short way, or something of the contract is not known yet.

    The factors of a LoRA on a base that is a multimodal wrapper are named for its text stack alone: peft does not find them in
    what transformers makes of the base.
    """
    if contract.site is None or contract.base_model is None or contract.family is None:
        return None
    if form == "lora" and not on_the_hub(contract.base_model):
        return None
    adapter = registry.adapters.get(contract.family)
    if form == "lora" and adapter.wrapper_types:
        return None
    values = {
        **_common(contract, names, half, form, adapter),
        **(_av(contract) if half == "av" else _ar(contract, adapter)),
    }
    package = None if quantised is None else unpacked_by(quantised)
    return render(f"{half}_with_transformers.md", package=package, **values).strip()


def unpacked_by(quantised: Quantised) -> str:
    """The distribution that transformers needs to load packed weights."""
    from nla_hub.publish.staging.packed import PACKAGES

    return PACKAGES[quantised][1]


def _common(contract: Contract, names: ReleaseNames, half: Role, form: Form, adapter: Adapter) -> dict[str, Any]:
    assert contract.site is not None
    revision = contract.base_revision
    return {
        "repo": _quoted(names.av if half == "av" else names.ar),
        "tag": _quoted(names.tag),
        "folder": f"{half}/" if names.single else "",
        "subfolder": f', subfolder="{half}"' if names.single else "",
        "base": _quoted(contract.base_model) if on_the_hub(contract.base_model) else None,
        "base_revision": "" if revision is None else f", revision={_quoted(revision)}",
        "lora": form == "lora",
        "blocks": adapter.blocks,
    }


def _av(contract: Contract) -> dict[str, Any]:
    assert contract.site is not None
    return {
        "d": contract.d_model,
        "k": contract.site.layer,
        "last_block": contract.reads_last_block,
        "text": _quoted(TEXT),
        "kind": contract.injection.kind,
        "raw": contract.injection.scale is None and not contract.scale_by_run,
    }


def _ar(contract: Contract, adapter: Adapter) -> dict[str, Any]:
    assert contract.site is not None
    normalised = contract.head_input == "normalized" and contract.mse_norm is not None
    return {
        "n_blocks": contract.site.n_blocks,
        "norm": adapter.final_norm,
        "norm_kept": contract.norm_kept,
        "bos": contract.ar_bos,
        "head_norm": repr(contract.mse_norm) if normalised else "",
        "texts": _quoted(EXPLANATIONS),
    }


def _quoted(value: Any) -> str:
    """A text, or a list of texts, as a Python literal."""
    return json.dumps(value)
