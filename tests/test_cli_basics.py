"""The command line's frame: exit codes, streams, names, and that nothing heavy is loaded for help."""

from __future__ import annotations

import json
import os
import pty
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from nla_hub import __version__
from nla_hub.cli import app as app_module
from nla_hub.cli import doctor, models, output
from nla_hub.cli.app import app
from nla_hub.errors import GateFailedError, NLAError
from nla_hub.resources import data_directory
from nla_hub.zoo import zoo

runner = CliRunner()
HEAVY = ("torch", "transformers", "numpy", "pyarrow", "huggingface_hub", "rich")


def run(*args: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "nla_hub", *args],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, **environment},
        stdin=subprocess.DEVNULL,
    )


def loaded_after(code: str) -> set[str]:
    """Which of HEAVY are loaded by a fresh interpreter that runs `code`."""
    shown = subprocess.run(
        [sys.executable, "-c", f"{code}\nimport sys; print(*[m for m in {HEAVY!r} if m in sys.modules])"],
        capture_output=True,
        text=True,
        check=True,
    )
    return set(shown.stdout.split()) & set(HEAVY)


# -- loading -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "code",
    [
        "import nla_hub",
        "import nla_hub; nla_hub.Site, nla_hub.Sidecar, nla_hub.errors, dir(nla_hub)",
        "import nla_hub.cli.app",
        "import nla_hub.tiny",
        "from nla_hub.cli.app import app\ntry: app(['--help'])\nexcept SystemExit as e: assert not e.code",
        "from nla_hub.cli.app import app\ntry: app(['models', 'ls'])\nexcept SystemExit as e: assert not e.code",
    ],
)
def test_nothing_heavy_is_loaded(code: str) -> None:
    assert loaded_after(code) == set()


def test_the_check_above_can_fail() -> None:
    assert "numpy" in loaded_after("import numpy")


def test_public_names_exist_and_no_others() -> None:
    import nla_hub

    for name in nla_hub.__all__:
        assert getattr(nla_hub, name) is not None
    assert set(nla_hub.__all__) <= set(dir(nla_hub))
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = nla_hub.nonsense


def test_every_command_is_registered() -> None:
    command = typer.main.get_command(app)
    assert list(command.commands) == [*app_module.COMMANDS] or set(command.commands) == {*app_module.COMMANDS}  # type: ignore[attr-defined]


# -- help, version, usage ------------------------------------------------------------------------------------


def test_version() -> None:
    result = run("--version")
    assert (result.returncode, result.stdout, result.stderr) == (0, f"nla-hub {__version__}\n", "")


def test_help_of_every_command_answers() -> None:
    for name in app_module.COMMANDS:
        result = runner.invoke(app, [name, "--help"])
        assert result.exit_code == 0
        assert "Usage:" in result.stdout


@pytest.mark.parametrize(
    ("args", "hint"),
    [
        (["modles", "ls"], "Did you mean 'models'"),
        (["models", "ls", "--jsno"], "--json"),
        (["models", "show"], "Missing argument"),
    ],
)
def test_wrong_usage_is_exit_2_with_a_hint(args: list[str], hint: str) -> None:
    result = runner.invoke(app, args)
    assert result.exit_code == 2
    assert hint in result.stderr
    assert result.stdout == ""


# -- errors --------------------------------------------------------------------------------------------------


def test_unknown_names_are_exit_1_with_suggestions_and_no_traceback() -> None:
    result = run("models", "show", "qwen2.5")
    assert (result.returncode, result.stdout) == (1, "")
    assert result.stderr.splitlines() == [
        "Error: No pair in the zoo is called 'qwen2.5'.",
        "  Next: did you mean 'qwen2.5-7b'?",
    ]


def test_hf_debug_shows_the_traceback() -> None:
    result = run("models", "show", "qwen2.5", HF_DEBUG="1")
    assert result.returncode == 1
    assert "Traceback" in result.stderr
    assert "Error: No pair" in result.stderr


@pytest.mark.parametrize(
    ("error", "code", "text"),
    [
        (NLAError("Wrong."), 1, "Error: Wrong."),
        (GateFailedError("Too low."), 3, "Error: Too low."),
        (KeyboardInterrupt(), 130, ""),
        (PermissionError(13, "Permission denied", "out.yaml"), 1, "Error: out.yaml: Permission denied"),
        (NLAError("Bad \x1b[31mname"), 1, "Error: Bad \\x1b[31mname"),
    ],
)
def test_exit_codes(monkeypatch: pytest.MonkeyPatch, error: BaseException, code: int, text: str) -> None:
    def fails() -> Any:
        raise error

    monkeypatch.setattr(models, "zoo", fails)
    result = runner.invoke(app, ["models", "ls"])
    assert result.exit_code == code
    assert text in result.stderr
    assert "Traceback" not in result.stderr


def test_our_own_mistakes_keep_their_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models, "zoo", lambda: 1 / 0)
    assert isinstance(runner.invoke(app, ["models", "ls"]).exception, ZeroDivisionError)


def test_an_interrupt_is_exit_130() -> None:
    code = (
        "import os, signal\nfrom nla_hub.cli import models\nfrom nla_hub.cli.app import main\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # ignored where a shell started the tests with &
        "models.zoo = lambda: os.kill(os.getpid(), signal.SIGINT)\n"
        "import sys; sys.argv = ['nla-hub', 'models', 'ls']\nmain()"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 130
    assert "Traceback" not in result.stderr


def test_a_closed_pipe_is_quiet() -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "nla_hub", "models", "ls", "--json"], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdout is not None
    process.stdout.close()
    assert process.stderr is not None
    with process.stderr as stream:
        assert stream.read() == b""
    process.wait()


# -- output --------------------------------------------------------------------------------------------------


def test_models_ls_json_is_one_object_a_line() -> None:
    result = runner.invoke(app, ["models", "ls", "--json"])
    rows = [json.loads(line) for line in result.stdout.splitlines()]
    assert [row["name"] for row in rows] == list(zoo())
    assert all(
        {"av", "ar", "base_model", "adapter", "recipe", "card", "measured", "published"} <= set(row) for row in rows
    )


def test_piped_tables_have_a_line_a_row_and_no_escapes() -> None:
    result = run("models", "ls", COLUMNS="40", FORCE_COLOR="1")
    lines = result.stdout.splitlines()
    assert len(lines) == 1 + len(zoo())
    assert "\x1b" not in result.stdout
    qwen = next(line for line in lines if line.startswith("qwen2.5-7b"))
    assert qwen.endswith("published: 0.752, raw variance, Fraser-Taliente et al. 2026")
    assert "not measured" in next(line for line in lines if line.startswith("gemma-3-12b"))


def test_models_show_names_everything() -> None:
    text = runner.invoke(app, ["models", "show", "gemma-3-27b"]).stdout
    for part in ("kitft/nla-gemma3-27b-L41-av@4e72123", "aa2f297", "unpinned", "gated", "41/62", "gemma3"):
        assert part in text


def on_a_terminal(*args: str, **environment: str) -> str:
    """What the command prints on a terminal of 200 columns."""
    main, child = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "nla_hub", *args],
        stdout=child,
        stderr=subprocess.DEVNULL,
        stdin=subprocess.DEVNULL,
        env={**os.environ, "TERM": "xterm-256color", "COLUMNS": "200", **environment},
    )
    os.close(child)
    chunks = []
    try:
        while chunk := os.read(main, 4096):
            chunks.append(chunk)
    except OSError:  # the terminal is closed: the end
        pass
    os.close(main)
    assert process.wait() == 0
    return b"".join(chunks).decode()


def test_no_color_means_no_colour() -> None:
    text = on_a_terminal("models", "ls", NO_COLOR="1")
    assert "qwen2.5-7b" in text
    assert "\x1b[3" not in text


def test_a_narrow_terminal_gets_blocks_instead_of_torn_words() -> None:
    text = on_a_terminal("models", "ls", COLUMNS="60")
    assert "base model  Qwen/Qwen2.5-7B-Instruct\r\n" in text


def test_quiet_and_verbose_may_stand_anywhere() -> None:
    for args in (["-q", "recipes", "ls"], ["recipes", "ls", "-q"], ["recipes", "-v", "ls"]):
        assert runner.invoke(app, args).exit_code == 0


def test_quiet_drops_messages(tmp_path: Path) -> None:
    loud = runner.invoke(app, ["recipes", "cp", "tiny", str(tmp_path / "a.yaml")])
    quiet = runner.invoke(app, ["recipes", "cp", "tiny", str(tmp_path / "b.yaml"), "-q"])
    assert "next: edit it" in loud.stderr
    assert quiet.stderr == ""
    assert quiet.stdout.strip().endswith("b.yaml")


def test_json_lines_survive_strange_text(capsys: pytest.CaptureFixture[str]) -> None:
    output.print_json_lines([{"text": "ü\n\x1b[31m"}, {"text": None}])
    assert [json.loads(line) for line in capsys.readouterr().out.splitlines()] == [
        {"text": "ü\n\x1b[31m"},
        {"text": None},
    ]
    with pytest.raises(ValueError, match="JSON"):
        output.print_json_lines([{"cosine": float("nan")}])


def test_text_cannot_steer_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    output.print_text("a\x1b[2Jb\u202ec\nd")
    output.print_table(("x", "y"), [("a\nb", None)])
    assert capsys.readouterr().out == "a\\x1b[2Jb\\u202ec\nd\nx     y\na\\nb  -\n"


def test_wide_characters_stay_aligned(capsys: pytest.CaptureFixture[str]) -> None:
    output.print_table(("x", "y"), [("漢字", "1"), ("abcd", "2")])
    assert capsys.readouterr().out.splitlines() == ["x     y", "漢字  1", "abcd  2"]


# -- recipes -------------------------------------------------------------------------------------------------


def test_recipes() -> None:
    assert "tiny" in runner.invoke(app, ["recipes", "ls"]).stdout
    assert runner.invoke(app, ["recipes", "validate", "tiny"]).stdout == "tiny: valid\n"
    shown = runner.invoke(app, ["recipes", "show", "tiny", "--json"])
    assert json.loads(shown.stdout)


def test_recipes_validate_lists_faults(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text((data_directory("recipes") / "tiny.yaml").read_text() + "\nnonsense: 1\nmore_nonsense: 2\n")
    result = runner.invoke(app, ["recipes", "validate", str(file)])
    assert result.exit_code == 1
    assert "nonsense: unknown key" in result.stderr
    assert "more_nonsense: unknown key" in result.stderr


def test_recipes_cp_writes_the_file_as_it_is_and_never_over_another(tmp_path: Path) -> None:
    source = data_directory("recipes") / "tiny.yaml"
    assert runner.invoke(app, ["recipes", "cp", "tiny", str(tmp_path)]).exit_code == 0
    assert (tmp_path / "tiny.yaml").read_bytes() == source.read_bytes()
    (tmp_path / "tiny.yaml").write_text("mine")
    for target in (tmp_path, tmp_path / "tiny.yaml", tmp_path / "no" / "x.yaml", tmp_path / "x.txt"):
        assert runner.invoke(app, ["recipes", "cp", "tiny", str(target)]).exit_code == 1
    assert (tmp_path / "tiny.yaml").read_text() == "mine"
    assert [path.name for path in tmp_path.iterdir()] == ["tiny.yaml"]


# -- doctor --------------------------------------------------------------------------------------------------


def test_doctor_reports_in_json(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_averysecrettoken")
    result = runner.invoke(app, ["doctor", "--json", "--nla", "qwen2.5-7b"])
    rows = [json.loads(line) for line in result.stdout.splitlines()]
    names = {row["name"] for row in rows}
    assert {"Python", "platform", "free memory", "import torch", "HF_HUB_CACHE", "HF_HUB_OFFLINE", "token"} <= names
    assert next(row for row in rows if row["name"] == "token")["found"] == "yes"
    assert "hf_averysecrettoken" not in result.output
    assert {"qwen2.5-7b: AV", "qwen2.5-7b: AR", "qwen2.5-7b: source"} <= names


def test_doctor_loads_the_packaged_pair() -> None:
    (finding,) = doctor.pair("tiny")
    assert (finding.state, finding.fatal) == ("ok", False), finding


def test_doctor_fails_where_the_core_is_broken(monkeypatch: pytest.MonkeyPatch) -> None:
    broken = doctor.Finding("core", "torch", "missing", None, "pip install 'nla-hub'")
    monkeypatch.setattr(doctor, "packages", lambda: iter([broken]))
    monkeypatch.setattr(doctor, "pair", lambda name, **parts: iter([]))
    result = runner.invoke(app, ["doctor"])
    assert result.exit_code == 1
    assert "Next: pip install 'nla-hub'" in result.stderr


@pytest.mark.parametrize(
    ("line", "installed", "state"),
    [
        ("torch>=2.9,<2.14", "2.13.0+cpu", "ok"),
        ("torch>=2.9,<2.14", "2.8.1", "too old"),
        ("torch>=2.9,<2.14", "2.14.0", "too new"),
        ("torch>=2.9,<2.14", None, "missing"),
    ],
)
def test_doctor_judges_versions(monkeypatch: pytest.MonkeyPatch, line: str, installed: str | None, state: str) -> None:
    from packaging.requirements import Requirement

    def version(name: str) -> str:
        if installed is None:
            raise doctor.metadata.PackageNotFoundError(name)
        return installed

    monkeypatch.setattr(doctor.metadata, "version", version)
    finding = doctor._judge(Requirement(line), "train")
    assert finding.state == state
    assert (finding.next_step is None) == (state == "ok")
    assert not finding.fatal, "an extra is never fatal"


def test_doctor_reads_the_declared_bounds() -> None:
    findings = list(doctor.packages())
    by_name = {(f.part, f.name): f for f in findings}
    if ("core", "nla-hub") in by_name:
        pytest.skip("nla-hub is not installed here")
    assert by_name["core", "torch"].state == "ok"
    assert ("train", "trl") in by_name
    assert not any(part == "dev" for part, _ in by_name)


def test_an_interrupted_run_says_how_to_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from nla_hub.training.pipeline import Pipeline

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Pipeline, "execute", interrupted)
    result = CliRunner().invoke(app, ["train", "tiny", "rl=null", "-o", str(tmp_path / "run")])
    assert result.exit_code == 130
    assert "the same command continues" in result.stderr
