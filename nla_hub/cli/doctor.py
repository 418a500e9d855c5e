"""`nla-hub doctor`: what this machine has, what is missing, and what to type about it."""

from __future__ import annotations

import os
import platform
import re
import shutil
import sys
from collections.abc import Iterator
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any

import typer

from nla_hub.cli import output
from nla_hub.cli import pair as pair_options
from nla_hub.doctor import CORE, Finding, memory, pair, plugins
from nla_hub.errors import NLAError
from nla_hub.units import size


def register(app: typer.Typer) -> None:
    """Add `doctor` to the command."""
    app.command("doctor")(doctor)


def doctor(
    nla: pair_options.Name = "tiny",
    ar: pair_options.Ar = None,
    base_model: pair_options.Base = None,
    subfolder: pair_options.Subfolder = "",
    ar_subfolder: pair_options.ArSubfolder = "",
    sidecar: pair_options.SidecarFile = None,
    json: Annotated[bool, typer.Option("--json", help="One JSON object a line.")] = False,
) -> None:
    """Check versions, extras, devices, caches, plug-ins, and a pair: is it here, what memory does it need, does it load.

    Sizes of a pair on the Hub are read before anything is downloaded. Exit 1 where the main job cannot work.
    """
    parts: dict[str, Any] = {
        "ar": ar,
        "base_model": base_model,
        "subfolder": subfolder,
        "ar_subfolder": ar_subfolder,
        "sidecar": sidecar,
    }
    sources = (machine(), packages(), imports(), devices(), caches(), hub(), plugins())
    findings: list[Finding] = []
    for source in (*sources, memory(nla, **parts), pair(nla, **parts)):
        for finding in source:
            findings.append(finding)
            if json:
                output.print_json_lines([asdict(finding)])
    if not json:
        output.print_table(
            ("part", "name", "state", "found", "next"),
            [(f.part, f.name, f.state, f.found, f.next_step) for f in findings],
        )
    broken = [finding for finding in findings if finding.fatal]
    if broken:
        names = ", ".join(finding.name for finding in broken)
        raise NLAError(
            f"The core of nla-hub does not work here: {names}."
            if any(finding.part == CORE for finding in broken)
            else f"This pair does not work here: {names}.",
            next_step=next((f.next_step for f in broken if f.next_step), None),
        )
    output.message("nla-hub works here.")


def machine() -> Iterator[Finding]:
    """Python, platform and main memory."""
    version = platform.python_version()
    old = sys.version_info < (3, 11)
    yield Finding(CORE, "Python", "too old" if old else "ok", version, "install Python 3.11 or newer" if old else None)
    yield Finding("machine", "platform", "note", platform.platform())
    yield Finding("machine", "processor cores", "note", str(os.cpu_count()))
    if (free := _main_memory()) is not None:
        yield Finding("machine", "free memory", "note", size(free))


def packages() -> Iterator[Finding]:
    """Every declared dependency: installed, and within its bounds."""
    from packaging.requirements import Requirement

    try:
        declared = [Requirement(line) for line in metadata.requires("nla-hub") or ()]
    except metadata.PackageNotFoundError:
        yield Finding(
            CORE, "nla-hub", "missing", None, "pip install -e . (this checkout is used without installing it)"
        )
        return
    for requirement in declared:
        extra = _extra(requirement)
        if extra == "dev" or (requirement.marker and not requirement.marker.evaluate({"extra": extra or ""})):
            continue
        yield _judge(requirement, extra)


def _judge(requirement: Any, extra: str | None) -> Finding:
    part = extra or CORE
    install = f"pip install '{'nla-hub[' + extra + ']' if extra else 'nla-hub'}'"
    try:
        installed = metadata.version(requirement.name)
    except metadata.PackageNotFoundError:
        return Finding(part, requirement.name, "missing", None, install)
    if requirement.specifier.contains(installed, prereleases=True):
        return Finding(part, requirement.name, "ok", installed)
    floors = [spec for spec in requirement.specifier if spec.operator == ">="]
    old = not all(spec.contains(installed, prereleases=True) for spec in floors)
    return Finding(part, requirement.name, "too old" if old else "too new", installed, f"{install} ({requirement})")


def _extra(requirement: Any) -> str | None:
    found = re.search(r"extra\s*==\s*['\"]([\w-]+)['\"]", str(requirement.marker or ""))
    return found.group(1) if found else None


def imports() -> Iterator[Finding]:
    """Whether torch and transformers can be imported: an installed package may still be broken."""
    for name in ("torch", "transformers"):
        try:
            module = __import__(name)
        except Exception as cause:  # a broken shared library raises nearly anything
            reason = f"{type(cause).__name__}: {str(cause).splitlines()[0] if str(cause) else ''}"
            yield Finding(CORE, f"import {name}", "broken", reason, f"pip install --force-reinstall {name}")
        else:
            yield Finding(CORE, f"import {name}", "ok", getattr(module, "__version__", None))


def devices() -> Iterator[Finding]:
    """Accelerators and their free memory."""
    try:
        import torch
    except Exception:  # reported by imports()
        return
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            free, total = torch.cuda.mem_get_info(index)
            name = torch.cuda.get_device_name(index)
            yield Finding("machine", f"cuda:{index}", "note", f"{name}, {size(free)} of {size(total)} free")
    elif torch.accelerator.is_available():
        yield Finding("machine", "accelerator", "note", str(torch.accelerator.current_accelerator()))
    else:
        yield Finding("machine", "accelerator", "note", "none: everything runs on the CPU")


def caches() -> Iterator[Finding]:
    """Where downloads go, and the room there."""
    from huggingface_hub import constants

    cache = Path(constants.HF_HUB_CACHE)
    place = next(parent for parent in (cache, *cache.parents) if parent.exists())
    yield Finding("cache", "HF_HUB_CACHE", "note", f"{cache} ({size(shutil.disk_usage(place).free)} free)")


def hub() -> Iterator[Finding]:
    """Offline flags, and whether there is a token (never its value)."""
    from huggingface_hub import constants, get_token

    yield Finding("hub", "HF_HUB_OFFLINE", "note", "on: nothing is downloaded" if constants.HF_HUB_OFFLINE else "off")
    if constants.ENDPOINT != "https://huggingface.co":
        yield Finding("hub", "HF_ENDPOINT", "note", "set to another host")
    there = get_token() is not None
    yield Finding(
        "hub", "token", "note", "yes" if there else "no", None if there else "hf auth login, for gated models"
    )


def _main_memory() -> int | None:
    """Bytes of main memory that are free for new work, or None where nothing says so."""
    try:
        from nla_hub.hardware import free_memory
    except Exception:  # torch is broken: reported by imports()
        return None
    return free_memory("cpu")
