"""Where a figure comes from: commit and versions."""

from __future__ import annotations

import platform
import subprocess
from importlib import metadata
from pathlib import Path

import nla_hub


def commit() -> str | None:
    """git HEAD of the checkout that this package runs from ("-dirty" with uncommitted changes to the package), else
    "v" + its version.

    A checkout of some other project around an installed package does not count.
    """
    package = Path(nla_hub.__file__).resolve().parent
    top = _git(package, "rev-parse", "--show-toplevel")
    if top is None or Path(top).resolve() != package.parent:
        return f"v{nla_hub.__version__}"
    head = _git(package, "rev-parse", "HEAD")
    if head is None:
        return None
    return head + ("-dirty" if _git(package, "status", "--porcelain", "--", ".") else "")


def _git(directory: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(directory), *arguments], capture_output=True, text=True, timeout=20, check=False
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def versions() -> dict[str, str | None]:
    """Versions of what a figure may depend on; None where a package is absent."""
    found: dict[str, str | None] = {"nla_hub": nla_hub.__version__, "python": platform.python_version()}
    for name in ("torch", "transformers", "tokenizers", "numpy"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = None
    return found
