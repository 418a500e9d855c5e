"""Reading strangers' YAML without executing, exploding or guessing; writing our own atomically."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from nla_hub.errors import NLAError

MAX_BYTES = 1_000_000
MAX_NODES = 20_000
"""A sidecar or recipe has some hundred nodes. Aliases may multiply them ("billion laughs"): counted expanded."""

MAX_DIGITS = 100
"""Of a whole number; Python itself refuses to print very long ones."""


def _expanded_nodes(root: yaml.Node) -> int:
    """Number of nodes once every alias is replaced by its target; raises ValueError on cycles."""
    sizes: dict[int, int] = {}
    open_nodes: set[int] = set()

    def size(node: yaml.Node) -> int:
        if id(node) in sizes:
            return sizes[id(node)]
        if id(node) in open_nodes:
            raise ValueError("an anchor that contains itself")
        if isinstance(node, yaml.ScalarNode) and node.tag.endswith(":int") and len(node.value) > MAX_DIGITS:
            raise ValueError(f"a number of {len(node.value)} digits")
        open_nodes.add(id(node))
        children: list[yaml.Node] = []
        if isinstance(node, yaml.MappingNode):
            children = [child for pair in node.value for child in pair]
        elif isinstance(node, yaml.SequenceNode):
            children = list(node.value)
        total = 1 + sum(size(child) for child in children)
        if total > MAX_NODES:
            raise ValueError(f"more than {MAX_NODES} nodes once its anchors are expanded")
        open_nodes.discard(id(node))
        sizes[id(node)] = total
        return total

    return size(root)


def _refuse_duplicates(root: yaml.Node) -> None:
    if isinstance(root, yaml.MappingNode):
        seen: set[str] = set()
        for key, value in root.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in seen:
                    raise ValueError(f"the key {key.value!r} stands twice (line {key.start_mark.line + 1})")
                seen.add(key.value)
            _refuse_duplicates(value)
    elif isinstance(root, yaml.SequenceNode):
        for value in root.value:
            _refuse_duplicates(value)


PLAIN = "write it as plain YAML: text, numbers, lists and mappings, no tags; if it is a stranger's, ask before using it"


def loads(data: bytes | str, *, where: object, error: type[NLAError]) -> dict[str, Any]:
    """A mapping with string keys from YAML text.

    Raises:
        error: binary data, bad syntax, tags that build objects, exploding anchors, duplicate keys, or not a mapping.
    """
    try:
        text = data.decode("utf-8") if isinstance(data, bytes) else data
        if len(text) > MAX_BYTES:
            raise ValueError(f"{len(text)} characters, more than {MAX_BYTES}")
        loader = yaml.SafeLoader(text)
        try:
            root = loader.get_single_node()
            if root is None:
                raise ValueError("the file is empty")
            _expanded_nodes(root)
            _refuse_duplicates(root)
            value = loader.construct_document(root)
        finally:
            loader.dispose()
    except UnicodeDecodeError as cause:
        raise error(
            "This is not a YAML text file: it holds binary data.", where=where, next_step="copy or download it again"
        ) from cause
    except (yaml.YAMLError, ValueError, RecursionError) as cause:
        reason = " ".join(str(cause).split())
        raise error(f"This YAML is refused: {reason}", where=where, next_step=PLAIN) from cause
    except (ArithmeticError, AttributeError, LookupError, TypeError) as cause:
        # A tag that does not fit its text, such as `!!float ''` or `!!bool maybe`: PyYAML lets its own mishaps through.
        raise error("This YAML is refused: a value does not fit its tag.", where=where, next_step=PLAIN) from cause
    if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
        raise error("A mapping with named keys is expected here.", where=where, got=type(value).__name__)
    return value


def read(path: Path, *, error: type[NLAError]) -> dict[str, Any]:
    """The mapping in a YAML file; raises `error` (see `loads`) or for a file that cannot be read."""
    try:
        if (size := path.stat().st_size) > 4 * MAX_BYTES:  # a character has up to four bytes
            raise error(f"This YAML is refused: {size} bytes, more than {MAX_BYTES} characters", where=path)
        data = path.read_bytes()
    except OSError as cause:
        raise error(f"Cannot be read: {cause.strerror or cause}", where=path) from cause
    return loads(data, where=path, error=error)


def dumps(value: Mapping[str, Any]) -> str:
    """YAML text of a mapping: keys in the order given, no anchors, unicode as it is."""

    class Dumper(yaml.SafeDumper):
        def ignore_aliases(self, data: Any) -> bool:
            return True

    def text(dumper: yaml.SafeDumper, data: str) -> yaml.Node:
        # Unquoted and single-quoted, PyYAML folds these line separators into blanks.
        style = '"' if any(c in data for c in "\x85\u2028\u2029") else None
        return dumper.represent_scalar("tag:yaml.org,2002:str", data, style=style)

    def members(dumper: yaml.SafeDumper, data: set[Any]) -> yaml.Node:
        return dumper.represent_mapping("tag:yaml.org,2002:set", [(item, None) for item in sorted(data, key=str)])

    Dumper.add_representer(str, text)
    Dumper.add_representer(set, members)  # in an order that does not change from process to process
    return yaml.dump(dict(value), Dumper=Dumper, sort_keys=False, allow_unicode=True, width=110)


def write_text(path: Path, text: str) -> None:
    """Write a file so that it is there whole or not at all: temporary name, fsync, rename."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
