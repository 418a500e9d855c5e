"""Whether a pair that was found may go out: no strange files in its folders, a contract that others can use."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from nla_hub import layouts
from nla_hub.errors import PublishError
from nla_hub.layouts import Form
from nla_hub.opening import hub_name
from nla_hub.publish.staging.forms import ROLES, Prepared
from nla_hub.publish.staging.found import Found
from nla_hub.publish.staging.half_files import strangers, weight_files
from nla_hub.sidecar import EXPLANATION_PLACEHOLDER, INJECTION_PLACEHOLDER, Role, Sidecar


def require_publishable(found: Found, prepared: Prepared, base_model: str) -> None:
    """Raise a PublishError with everything that is wrong about the pair's files and contract."""
    faults = list(_stray_faults(found, prepared))
    for role in ROLES:
        faults += _brace_faults(prepared.half(role).sidecar)
    scores = [prepared.half(role).sidecar.fve for role in ROLES]
    if None not in scores and scores[0] != scores[1]:
        faults.append("fve: the sidecars of AV and AR have different scores")
    is_name = hub_name(base_model) is not None
    if not is_name and re.search(r"[/\\~]", base_model):
        faults.append(
            f"base model: {base_model!r} is a place on this machine (--base-model OWNER/NAME says what it is)"
        )
    elif not is_name and prepared.form == "lora":
        faults.append(f"base model: factors need one that others can get, and {base_model!r} is no Hub name")
    if faults:
        raise PublishError(
            "This pair cannot be published as it is.",
            where=found.path,
            faults=faults,
            next_step="remove or correct what is named, then push again",
        )


def _stray_faults(found: Found, prepared: Prepared) -> Iterator[str]:
    """Files of the pair's folders that are no part of a release, by name."""
    av, ar = found.require_pair()
    if prepared.form == "lora" and found.factors:
        av, ar = found.factors["av"], found.factors["ar"]
    halves: dict[Role, tuple[Path, Path]] = {"av": (av, ar), "ar": (ar, av)}
    places: dict[Path, tuple[list[str], list[str]]] = {}
    for role, (folder, other) in halves.items():
        beside = [other.name] if other.parent == folder else []
        places[folder] = (weight_files(folder, _form_there(folder), role), [*beside, "source"])
    if av.parent == ar.parent and lies_in(av, found.path):
        places[av.parent] = ([], [av.name, ar.name, "source"])
    for folder, (known, beside) in places.items():
        for name in strangers(folder, known, beside=beside):
            yield f"{folder / name} is no part of a release"


def _form_there(folder: Path) -> Form:
    return next((p.form for p in layouts.places([p.name for p in folder.iterdir()]) if p.folder == ""), "model")


def _brace_faults(sidecar: Sidecar) -> list[str]:
    """Templates that the reference client cannot fill: it uses `str.format`."""
    templates = {
        "av": (sidecar.av_template, INJECTION_PLACEHOLDER),
        "ar": (sidecar.ar_template, EXPLANATION_PLACEHOLDER),
    }
    return [
        f"prompt_templates.{name} of the {sidecar.role.upper()}: braces besides {placeholder} break other clients"
        for name, (text, placeholder) in templates.items()
        if text is not None and re.search(r"[{}]", text.replace(placeholder, ""))
    ]


def lies_in(folder: Path, top: Path) -> bool:
    """Whether a folder lies below `top`, and is not `top` itself."""
    return folder != top.absolute() and folder.is_relative_to(top.absolute())
