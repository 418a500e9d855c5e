"""Plug-ins in a directory, as pip would put them there: the package and the metadata that announce it."""

from __future__ import annotations

import shutil
import sys
import tomllib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import pytest

from nla_hub import registry

EXAMPLE = Path(__file__).with_name("plugin_example")


def install(site: Path, name: str, version: str, groups: Mapping[str, Mapping[str, str]]) -> None:
    """Write the metadata of a distribution with its entry points: group -> name -> "module:attribute"."""
    info = site / f"{name.replace('-', '_')}-{version}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    lines = []
    for group, points in groups.items():
        lines += [f"[{group}]", *(f"{point} = {value}" for point, value in points.items()), ""]
    (info / "entry_points.txt").write_text("\n".join(lines))


def install_example(site: Path) -> None:
    """Install tests/plugin_example (.ci/run has pip do it, in an environment of its own)."""
    project = tomllib.loads((EXAMPLE / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    (package,) = (path for path in EXAMPLE.iterdir() if (path / "__init__.py").is_file())
    shutil.copytree(package, site / package.name, ignore=shutil.ignore_patterns("__pycache__"))
    install(site, project["name"], project["version"], project["entry-points"])


def install_module(site: Path, name: str, version: str, group: str, point: str, source: str) -> str:
    """Install a distribution of one module whose `thing` is the entry point `point`; returns the module's name."""
    module = f"plugin_{name.replace('-', '_')}"
    (site / f"{module}.py").write_text(source)
    install(site, name, version, {group: {point: f"{module}:thing"}})
    return module


@contextmanager
def plugged(site: Path) -> Iterator[None]:
    """While open, what `site` holds is installed."""
    before = set(sys.modules)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(site)
        registry.refresh()
        try:
            yield
        finally:
            for name in set(sys.modules) - before:
                if str(getattr(sys.modules[name], "__file__", None) or "").startswith(str(site)):
                    del sys.modules[name]
    registry.refresh()
