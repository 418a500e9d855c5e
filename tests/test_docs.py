"""The documentation: its Python runs, its links lead somewhere, its generated pages are fresh."""

from __future__ import annotations

import json
import re
import subprocess
import textwrap
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from nla_hub import sidecar_schema
from nla_hub.cli.reference import reference
from nla_hub.publish import tiny_rl
from nla_hub.publish.card import recipe_card, tiny_card
from nla_hub.training.view.history import render

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("model_cards/**/*.md")])
RUN_PAGES = [
    ROOT / "README.md",
    *sorted(
        path for path in ROOT.glob("docs/**/*.md") if path.name != "explain.md"
    ),  # with its commands: test_explain_docs
]

GENERATED: dict[str, Callable[[], str]] = {
    "docs/cli.md": reference,
    "docs/sidecar.md": sidecar_schema.page,
    "docs/sidecar.schema.json": sidecar_schema.schema_json,
    "docs/tiny-rl.md": tiny_rl.page,
    "docs/tiny-training.md": lambda: render(json.loads((ROOT / "model_cards/tiny/history.json").read_text("utf-8"))),
    "model_cards/tiny.md": tiny_card,
    **{
        f"model_cards/{name}.md": partial(recipe_card, name)
        for name in ("qwen2.5-7b", "gemma-3-12b", "gemma-3-27b", "llama-3.3-70b")
    },
}
"""Page -> what it must hold. To renew one: see its first line (of a card with front matter the first behind it)."""

FENCE = re.compile(r"^(?P<indent> *)```(?P<info>[^\n`]*)\n(?P<body>.*?)^(?P=indent)```[ ]*$", re.M | re.S)
NOT_RUN = re.compile(r"<!-- not run: (?P<reason>\S[^>]*) -->\s*\Z")
LINK = re.compile(r"\[[^\]\[]*\]\((?P<target>[^)\s]+)(?: \"[^\"]*\")?\)")

FORBIDDEN = {
    r"(?<![\w.~/-])/(?:home|root|work|Users|mnt|opt|tmp)/\w": "a path of somebody's machine",
    r"file://|--(?:extra-)?index-url|--find-links|--trusted-host": "where somebody's packages come from",
    r"\b(?:TODO|FIXME|XXX|lorem ipsum)\b": "unfinished",
    r"(?i)\b(?:cutting-edge|state-of-the-art|seamless(?:ly)?|blazing|revolutionary|effortless)\b": "praise",
}


@dataclass(frozen=True)
class Block:
    """A fenced block: its language, text, line in the page (1-based), and the stated reason not to run it."""

    language: str
    text: str
    line: int
    reason: str | None


def blocks(page: str) -> Iterator[Block]:
    """The fenced blocks of a page."""
    for found in FENCE.finditer(page):
        marked = NOT_RUN.search(page[: found.start()])
        yield Block(
            (found["info"].split() or [""])[0],
            textwrap.dedent(found["body"]),
            page[: found.start("body")].count("\n") + 1,
            marked["reason"].strip() if marked else None,
        )


def run_page(text: str, name: str) -> int:
    """Execute the Python blocks of a page in one namespace; how many were run."""
    namespace: dict[str, Any] = {"__name__": "__main__"}
    count = 0
    for block in blocks(text):
        if block.language in ("python", "py") and block.reason is None:
            code = compile("\n" * (block.line - 1) + block.text, name, "exec")  # its lines are the page's lines
            exec(code, namespace)
            count += 1
    return count


def slugs(page: str) -> set[str]:
    """Anchors of a page's headings, as GitHub makes them."""
    without_code = FENCE.sub("", page)
    heads = re.findall(r"^#{1,6} +(.+?) *#*$", without_code, re.M)
    return {re.sub(r"[^\w\- ]", "", head.lower().replace("`", "")).strip().replace(" ", "-") for head in heads}


def broken_links(page: Path, text: str) -> list[str]:
    """Relative links of a page that lead nowhere."""
    found = []
    for link in LINK.finditer(FENCE.sub("", text)):
        target = link["target"]
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        there = (page.parent / path).resolve() if path else page
        if not there.exists():
            found.append(target)
        elif anchor and there.suffix == ".md":
            body = text if there == page else there.read_text(encoding="utf-8")
            if anchor not in slugs(body):
                found.append(target)
    return found


def forbidden(text: str) -> list[str]:
    """What must not stand in a page or source."""
    return [f"{found[0]!r}: {why}" for pattern, why in FORBIDDEN.items() for found in re.finditer(pattern, text)]


def relative(path: Path) -> str:
    return str(path.relative_to(ROOT))


# -- the pages -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", RUN_PAGES, ids=relative)
def test_python_blocks_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    run_page(page.read_text(encoding="utf-8"), relative(page))


@pytest.mark.parametrize("name", GENERATED)
def test_generated_pages_are_fresh(name: str) -> None:
    page = (ROOT / name).read_text(encoding="utf-8")
    assert page == GENERATED[name](), f"{name} is stale; its comment says how to renew it"


@pytest.mark.parametrize("page", PAGES, ids=relative)
def test_links_lead_somewhere(page: Path) -> None:
    assert broken_links(page, page.read_text(encoding="utf-8")) == []


def sources() -> list[Path]:
    """Pages and everything else that a reader of the repository sees, these tests left out."""
    listed = [ROOT / "pyproject.toml", *ROOT.glob("constraints*.txt"), ROOT / ".ci" / "run"]
    for folder, pattern in (("nla_hub", "*.py"), ("nla_hub", "*.yaml"), ("recipes", "*.yaml"), ("model_cards", "*")):
        listed += (ROOT / folder).rglob(pattern)
    return sorted(path for path in {*PAGES, *listed} if path.is_file())


@pytest.mark.parametrize("path", sources(), ids=relative)
def test_no_forbidden_words(path: Path) -> None:
    assert forbidden(path.read_text(encoding="utf-8")) == []


def test_the_readme_has_its_two_commands() -> None:
    found = [block.text.strip() for block in blocks((ROOT / "README.md").read_text(encoding="utf-8"))]
    from_nothing = [text for text in found if text.startswith("python3 -m venv ")]  # .ci/run runs these two
    assert len(from_nothing) == 2
    assert "nla-hub explain" in from_nothing[0]
    assert from_nothing[1].endswith("-m pytest -n auto --dist loadfile")


def test_the_changelog_knows_this_version_or_is_unreleased() -> None:
    from nla_hub import __version__

    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert "## [Unreleased]" in text or f"## [{__version__}]" in text


def test_constraints_pin_exactly_and_name_no_place() -> None:
    for path in ROOT.glob("constraints*.txt"):
        lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line and not line.startswith("#")]
        assert lines
        assert [line for line in lines if not re.fullmatch(r"[\w.-]+==[\w.]+", line)] == [], relative(path)


def test_the_ci_script_is_sound_bash() -> None:
    script = ROOT / ".ci" / "run"
    assert script.stat().st_mode & 0o100
    assert subprocess.run(["bash", "-n", str(script)], check=False).returncode == 0


# -- these checks can fail -----------------------------------------------------------------------------------


def test_blocks_of_a_page_share_a_namespace_and_errors_keep_their_line() -> None:
    assert run_page("```python\nx = 1\n```\n\ntext\n\n```python\nassert x == 1\n```\n", "p.md") == 2
    with pytest.raises(ZeroDivisionError) as caught:
        run_page("# Title\n\n```python\n1 / 0\n```\n", "p.md")
    assert caught.traceback[-1].lineno + 1 == 4


def test_only_blocks_with_a_stated_reason_are_left_out() -> None:
    assert run_page("<!-- not run: needs a GPU -->\n```python\n1 / 0\n```\n", "p.md") == 0
    for mark in ("<!-- not run: -->", "<!-- not run: needs a GPU -->\n\ntext\n"):
        with pytest.raises(ZeroDivisionError):
            run_page(f"{mark}\n```python\n1 / 0\n```\n", "p.md")
    assert run_page("```bash\nfalse\n```\n", "p.md") == 0


def test_indented_blocks_are_found() -> None:
    assert [b.text for b in blocks("- item\n\n  ```python\n  x = 1\n  if x:\n      y = 2\n  ```\n")] == [
        "x = 1\nif x:\n    y = 2\n"
    ]


def test_broken_links_are_seen(tmp_path: Path) -> None:
    page = tmp_path / "a.md"
    text = "# One Title\n[ok](a.md) [ok](#one-title) [no](b.md) [no](#two) [web](https://x.y) ```[x](z.md)```"
    page.write_text(text)
    assert broken_links(page, text) == ["b.md", "#two"] + (["z.md"] if "```[x]" in FENCE.sub("", text) else [])


@pytest.mark.parametrize("text", ["see /home/me/x", "pip install --index-url=x", "TODO: write", "a seamless tool"])
def test_forbidden_words_are_seen(text: str) -> None:
    assert forbidden(text)


@pytest.mark.parametrize("text", ["~/x and ./work/x", "owner/name", "a/tmp/b", "https://x.y/home/z"])
def test_ordinary_words_are_not(text: str) -> None:
    assert not forbidden(text)
