"""docs/explain.md, from its first block to its last: Python and commands in one directory, in their order."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest
from test_docs import ROOT, blocks
from typer.testing import CliRunner

from nla_hub.cli.app import app
from nla_hub.explain.schema import COLUMNS

PAGE = ROOT / "docs" / "explain.md"


def test_every_block_of_the_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, object] = {"__name__": "__main__"}
    commands = 0
    for block in blocks(PAGE.read_text(encoding="utf-8")):
        if block.reason is not None:
            continue
        if block.language == "python":
            exec(compile("\n" * (block.line - 1) + block.text, str(PAGE), "exec"), namespace)
        if block.language == "bash":
            for line in block.text.splitlines():
                program, *arguments = shlex.split(line)
                assert program == "nla-hub"
                result = CliRunner().invoke(app, arguments)
                assert result.exit_code == 0, f"{line}\n{result.output}"
                commands += 1
    assert commands >= 5


def test_the_page_names_every_column_with_its_meaning() -> None:
    page = PAGE.read_text(encoding="utf-8")
    for name, meaning in COLUMNS.items():
        assert f"| `{name}` | {meaning} |" in page
