"""The direction of imports, and where optional packages may be imported: read from the sources, nothing is executed."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "nla_hub"

LAYERS: tuple[tuple[str, ...], ...] = (
    ("errors", "log", "units", "lifeline", "svg", "hardware", "accelerator"),
    ("yaml_io", "resources", "schema", "locks", "sampling", "registry", "shapes", "hub", "batching", "source_text"),
    ("sidecar_dialects", "sidecar", "sidecar_reading", "sidecar_schema", "geometry"),
    ("prompts", "positions", "flags", "adapters", "architecture", "locate", "zoo", "hub_pairs"),
    ("injection", "weights", "layouts", "library", "lora", "lora_roles", "lora_stages"),
    ("pretrained", "embedding", "checkpoints", "export", "results", "memory"),
    ("engines", "capture", "reconstructor", "steering", "scoring"),
    ("verbalizer",),
    ("opening", "releases"),
    ("loading",),
    ("sizing",),
    ("parts", "round_trip", "convert", "serving", "download", "download_folder"),
    ("nla",),
    ("report", "explain", "evaluation"),
    ("training", "publish"),
    ("tiny", "testing", "bench", "doctor"),
    ("cli",),
    ("__main__",),
)
"""A module imports from its own layer and those above it in this table, at module level. A package is one entry."""

ONLY_IN: dict[str, tuple[str, ...]] = {
    "trl": ("training",),
    "peft": ("training",),
    "vllm": ("engines.vllm",),
    "ray": ("explain.distributed",),
    "openai": ("training.labeling",),
    "anthropic": ("training.labeling",),
    "gradio": ("app",),
    "fastapi": ("app",),
    "huggingface_hub": ("hub", "export", "publish", "cli.doctor"),
}
"""Where a package may be imported at all, inside functions too."""

NEVER_AT_MODULE_LEVEL = (
    "trl",
    "peft",
    "vllm",
    "ray",
    "gradio",
    "fastapi",
    "datasets",
    "bitsandbytes",
    "sklearn",
    "pandas",
    "openai",
    "anthropic",
)
"""Optional packages: absent unless an extra is installed, so importing one is the business of a function."""


def modules() -> dict[str, str]:
    """Dotted name below `nla_hub` -> source; packages by their own name, the root package as ""."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        found[".".join(part for part in parts if part != "__init__")] = path.read_text(encoding="utf-8")
    return found


def imports(source: str, *, module_level: bool) -> Iterator[str]:
    """Full dotted names that a source imports, those under `if TYPE_CHECKING` left out."""

    def visit(node: ast.AST) -> Iterator[str]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.dump(child.test):
                continue
            if module_level and isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
                continue
            if isinstance(child, ast.Import):
                yield from (alias.name for alias in child.names)
            elif isinstance(child, ast.ImportFrom) and child.module:
                assert child.level == 0, "absolute imports only"
                yield child.module
                if child.module == "nla_hub" or child.module.endswith((".cli", ".tiny", ".training")):
                    yield from (f"{child.module}.{alias.name}" for alias in child.names)
            yield from visit(child)

    yield from visit(ast.parse(source))


def layer_of(module: str) -> int | None:
    head = module.split(".")[0]
    return next((i for i, names in enumerate(LAYERS) if head in names), None)


def own_imports(module: str, source: str) -> set[str]:
    """First parts of this package's modules that `module` imports at module level, itself left out."""
    heads = set()
    for name in imports(source, module_level=True):
        root, _, rest = name.partition(".")
        head = rest.split(".")[0]
        if root == "nla_hub" and head and head != module.split(".")[0] and layer_of(head) is not None:
            heads.add(head)
    return heads


def backward(module: str, source: str) -> list[str]:
    """The imports of `module` that go against the table."""
    mine = layer_of(module)
    assert mine is not None, f"nla_hub.{module} has no place in LAYERS: give it one"
    return [head for head in sorted(own_imports(module, source)) if (layer_of(head) or 0) > mine]


def misplaced(module: str, source: str) -> list[str]:
    """Imports of packages that belong somewhere else."""
    found = []
    for name in imports(source, module_level=False):
        allowed = ONLY_IN.get(name.split(".")[0])
        if allowed is not None and not any(module == place or module.startswith(f"{place}.") for place in allowed):
            found.append(name)
    for name in imports(source, module_level=True):
        if name.split(".")[0] in NEVER_AT_MODULE_LEVEL and not module.startswith(("training.", "engines.", "app")):
            found.append(f"{name} at module level")
    return found


SOURCES = modules()


@pytest.mark.parametrize("module", [name for name in SOURCES if name])
def test_no_import_goes_backwards(module: str) -> None:
    assert backward(module, SOURCES[module]) == []


@pytest.mark.parametrize("module", [name for name in SOURCES if name])
def test_optional_packages_stay_in_their_place(module: str) -> None:
    assert misplaced(module, SOURCES[module]) == []


def test_the_root_imports_nothing_of_ours() -> None:
    assert own_imports("", SOURCES[""]) == set()


def test_module_level_imports_have_no_cycle() -> None:
    graph: dict[str, set[str]] = {}
    for module, source in SOURCES.items():
        if module:
            graph.setdefault(module.split(".")[0], set()).update(own_imports(module, source))
    done: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, f"a cycle: {' -> '.join((*path, name))}"
        if name not in done:
            for below in sorted(graph.get(name, ())):
                visit(below, (*path, name))
            done.add(name)

    for name in graph:
        visit(name, ())


@pytest.mark.parametrize(
    ("module", "source", "wrong"),
    [
        ("sidecar", "from nla_hub.nla import NLA", ["nla"]),
        ("sidecar", "from nla_hub import nla", ["nla"]),
        ("sidecar", "import nla_hub.cli.app", ["cli"]),
        ("sidecar", "if True:\n    from nla_hub.nla import NLA", ["nla"]),
        ("sidecar", "def f():\n    from nla_hub.nla import NLA", []),
        ("sidecar", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from nla_hub.nla import NLA", []),
        ("nla", "from nla_hub.sidecar import Sidecar", []),
    ],
)
def test_the_check_itself_sees_backward_imports(module: str, source: str, wrong: list[str]) -> None:
    assert backward(module, source) == wrong


@pytest.mark.parametrize(
    ("module", "source", "count"),
    [
        ("nla", "def f():\n    import trl", 1),
        ("training.grpo", "import trl", 0),
        ("training.x", "def f():\n    from peft import PeftModel", 0),
        ("lora", "from peft import PeftModel", 2),
        ("engines.transformers", "def f():\n    import vllm", 1),
        ("results", "import pandas as pd", 1),
    ],
)
def test_the_check_itself_sees_misplaced_packages(module: str, source: str, count: int) -> None:
    assert len(misplaced(module, source)) == count
