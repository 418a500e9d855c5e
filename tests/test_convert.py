"""`nla-hub convert`: what is carried over, where it may be written, what is left behind, and what it tells to type next."""

from __future__ import annotations

import json
import os
import re
import resource
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from click.testing import Result
from conftest import Case, Spec
from hub_server import Hub
from parity import close, engine_logits
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner
from wild import LAYER, TEXTS, World, one_directory, run_folders, two_directories, vectors, write_sidecar

from nla_hub import NLA
from nla_hub import convert as convert_module
from nla_hub.cli.app import app
from nla_hub.cli.convert import named_directory
from nla_hub.cli.wording import for_command
from nla_hub.convert import Converted, check_destination, convert
from nla_hub.errors import CheckpointError, InputError, NLAError, RunError, WeightsError
from nla_hub.loading import open_pair
from nla_hub.locate import resolve_pair

runner = CliRunner()


@pytest.fixture(scope="module")
def world() -> World:
    return World()


@pytest.fixture(scope="module")
def original(world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A complete pair, `av/` and `ar/` in one directory, that no test changes."""
    root = tmp_path_factory.mktemp("original") / "pair"
    one_directory(world, root)
    return root


@pytest.fixture
def source(original: Path, tmp_path: Path) -> Path:
    """A copy of it."""
    shutil.copytree(original, tmp_path / "pair")
    return tmp_path / "pair"


def run(name: Path, destination: Path, *, components: Any = ("av", "ar"), **options: Any) -> list[Converted]:
    told, dtype = options.pop("sidecar", None), options.pop("dtype", None)
    return convert(
        open_pair(resolve_pair(name, **options), components=components, sidecar=told), destination, dtype=dtype
    )


def command(*words: object) -> Result:
    return runner.invoke(app, [*map(str, words)])


def rewrite(path: Path, **changes: torch.Tensor) -> None:
    """Change or add tensors of a file of weights."""
    save_file({**load_file(path), **changes}, path, metadata={"format": "pt"})


def in_bfloat16(path: Path) -> None:
    save_file({n: v.bfloat16() for n, v in load_file(path).items()}, path, metadata={"format": "pt"})


def there(directory: Path) -> set[str]:
    return {path.name for path in directory.iterdir()}


# -- values --------------------------------------------------------------------------------------------------


def test_a_head_of_its_own_survives_a_config_that_calls_it_the_embedding(
    world: World, source: Path, tmp_path: Path
) -> None:
    config = source / "av" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"tie_word_embeddings": True}))
    expected = world.av_logits(world.full_av)
    close(engine_logits(NLA.from_pretrained(source, components=("av",)).av.engine, vectors()), expected)
    run(source, tmp_path / "out")
    close(engine_logits(NLA.from_pretrained(tmp_path / "out", components=("av",)).av.engine, vectors()), expected)


@pytest.mark.parametrize(
    ("weight", "bias", "written"),
    [
        (torch.float32, torch.bfloat16, torch.float32),
        (torch.bfloat16, torch.float32, torch.float32),
        (torch.bfloat16, torch.float16, torch.float32),
        (torch.bfloat16, torch.bfloat16, torch.bfloat16),
        (torch.float64, torch.float64, torch.float32),
    ],
)
def test_a_value_head_is_written_in_what_holds_all_of_it(
    world: World, tmp_path: Path, weight: torch.dtype, bias: torch.dtype, written: torch.dtype
) -> None:
    world.write_ar(tmp_path / "ar", world.model_sidecar("ar"), bias=True)
    file = tmp_path / "ar" / "value_head.safetensors"
    head = world.head
    rewrite(file, weight=head.weight.detach().to(weight), bias=head.bias.detach().to(bias))
    run(tmp_path / "ar", tmp_path / "out", components=("ar",))
    before, after = load_file(file), load_file(tmp_path / "out" / "ar" / "value_head.safetensors")
    assert {value.dtype for value in after.values()} == {written}
    for name in ("weight", "bias"):
        assert torch.equal(after[name].float(), before[name].float())


def test_tensors_that_nobody_loads_say_nothing_about_the_dtype(world: World, source: Path, tmp_path: Path) -> None:
    for half in ("av", "ar"):
        in_bfloat16(source / half / "model.safetensors")
    rewrite(source / "av" / "model.safetensors", **{"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(16)})
    rewrite(
        source / "ar" / "model.safetensors",
        **{"lm_head.weight": torch.ones(64, 64), "model.norm.weight": torch.ones(64)},
    )
    assert [one.dtype for one in run(source, tmp_path / "out")] == ["bfloat16", "bfloat16"]


def test_a_causal_mask_of_booleans_is_no_weight(make_case: Any, tmp_path: Path) -> None:
    shutil.copytree(make_case(Spec("gpt_neox")).pair.av, tmp_path / "av")
    rewrite(
        tmp_path / "av" / "model.safetensors",
        **{"gpt_neox.layers.0.attention.bias": torch.ones(1, 1, 8, 8, dtype=torch.bool)},
    )
    (done,) = run(tmp_path / "av", tmp_path / "out", components=("av",))
    assert done.dtype == "float32"


def test_a_form_that_cannot_be_kept_is_refused_before_anything_is_written(source: Path, tmp_path: Path) -> None:
    file = source / "av" / "model.safetensors"
    rewrite(file, **{"model.norm.weight": load_file(file)["model.norm.weight"].double()})
    with pytest.raises(CheckpointError, match=r"not converted.*got F32, F64.*\n.*dtype=") as caught:
        run(source, tmp_path / "new" / "out")
    assert for_command(caught.value.next_step or "", {"--dtype"}) == "pass the dtype to write: --dtype bfloat16"
    assert not (tmp_path / "new").exists()
    assert [one.dtype for one in run(source, tmp_path / "new" / "out", dtype="float32")] == ["float32"] * 2


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
def test_the_dtype_of_a_merged_ar_is_that_of_the_blocks_it_keeps(world: World, tmp_path: Path) -> None:
    pytest.importorskip("peft", reason="writes the LoRA")
    world.write_base(tmp_path / "base")
    file = tmp_path / "base" / "model.safetensors"
    in_bfloat16(file)
    state = load_file(file)
    unread = [n for n in state if n.startswith(f"model.layers.{LAYER + 1}.") or n == "lm_head.weight"]
    rewrite(file, **{name: state[name].float() for name in unread})
    assert len(unread) > 2
    world.write_ar_lora(tmp_path / "ar", world.lora(40))
    write_sidecar(tmp_path / "ar", world.dataset_sidecar())
    (done,) = run(tmp_path / "ar", tmp_path / "out", components=("ar",), base_model=tmp_path / "base")
    assert (done.dtype, done.merged) == ("bfloat16", 1)


# -- papers --------------------------------------------------------------------------------------------------

PAPERS = ("LICENSE", "NOTICE.txt", "README.md", "USE_POLICY.md")


def test_papers_of_a_half_and_of_the_folders_above_it_are_carried(source: Path, tmp_path: Path) -> None:
    for name in PAPERS:
        (source / name).write_text(f"pair's {name}")
    (source / "training.log").write_text("no paper")
    (source / "LICENSES").mkdir()
    (source.parent / "LICENSE-of-somebody-else").write_text("outside")
    (source / "av" / "LICENSE").write_text("the AV's own")
    save_file({"mean": torch.ones(64)}, source / "fve_reference.safetensors")
    run(source, tmp_path / "out")
    for half in ("av", "ar"):
        written = tmp_path / "out" / half
        assert there(written) & {"training.log", "LICENSES", "LICENSE-of-somebody-else"} == set()
        for name in PAPERS:
            own = half == "av" and name == "LICENSE"
            assert (written / name).read_text() == ("the AV's own" if own else f"pair's {name}")
    assert torch.equal(load_file(tmp_path / "out" / "ar" / "fve_reference.safetensors")["mean"], torch.ones(64))
    assert not (tmp_path / "out" / "av" / "fve_reference.safetensors").exists()


def test_the_nearest_paper_speaks_for_a_half(world: World, tmp_path: Path) -> None:
    run_folders(world, tmp_path / "runs")
    for folder in (".", "iter_0000200", "iter_0000100"):
        (tmp_path / "runs" / folder / "LICENSE").write_text(folder)
    (tmp_path / "runs" / "Notice").write_text("of all")
    (tmp_path / "LICENSE.md").write_text("above the checkpoint")
    run(tmp_path / "runs", tmp_path / "out", subfolder="iter_0000200")
    for half in ("av", "ar"):
        assert (tmp_path / "out" / half / "LICENSE").read_text() == "iter_0000200"
        assert (tmp_path / "out" / half / "Notice").read_text() == "of all"
        assert not (tmp_path / "out" / half / "LICENSE.md").exists()


def test_a_paper_may_be_a_link_inside_the_pair_and_never_one_out_of_it(source: Path, tmp_path: Path) -> None:
    (source / "README.md").write_text("mine")
    (source / "av" / "README.md").symlink_to("../README.md")
    run(source, tmp_path / "out")
    assert (tmp_path / "out" / "av" / "README.md").read_text() == "mine"
    (tmp_path / "secret").write_text("stolen")
    (source / "USE_POLICY.md").symlink_to(tmp_path / "secret")
    with pytest.raises(WeightsError, match="leads outside"):
        run(source, tmp_path / "again")
    assert there(tmp_path) == {"pair", "out", "secret"}


FROM_THE_HUB = """
import logging, sys
from pathlib import Path
from nla_hub.convert import convert
from nla_hub.loading import open_pair
from nla_hub.locate import resolve_pair
logging.basicConfig(level=logging.WARNING, format="%(message)s")
convert(open_pair(resolve_pair("owner/pair"), components=("av",)), Path(sys.argv[1]))
"""


def test_papers_come_from_the_hub_too(source: Path, tmp_path: Path) -> None:
    for name in PAPERS:
        (source / name).write_text(f"pair's {name}")
    (source / "av" / "README.md").write_text("the AV's own")
    (source / "LICENSE-scan.pdf").write_bytes(bytes(2**20 + 1))
    hub = Hub({"owner/pair": source})
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING"))} | {
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(tmp_path / "home"),
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "PYTHONPATH": str(Path(__file__).parents[1]),
        "NO_PROXY": "127.0.0.1,localhost",
    }
    done = subprocess.run(
        [sys.executable, "-c", FROM_THE_HUB, str(tmp_path / "out")],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    hub.close()
    assert done.returncode == 0, done.stderr
    written = {name: (tmp_path / "out" / "av" / name).read_text() for name in PAPERS}
    assert written == {name: "the AV's own" if name == "README.md" else f"pair's {name}" for name in PAPERS}
    assert "LICENSE-scan.pdf is too large" in done.stderr
    assert not any("scan.pdf" in request.path for request in hub.requests)


# -- where to ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spelled", ["link", ".", "empty"])
def test_an_empty_directory_may_be_named_in_any_way(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spelled: str
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to("empty")
    monkeypatch.chdir(tmp_path / "empty" if spelled == "." else tmp_path)
    done = run(source, Path(spelled))
    assert [one.directory for one in done] == [Path(spelled) / "av", Path(spelled) / "ar"]
    assert there(tmp_path / "empty") == {"av", "ar"}
    assert (tmp_path / "link").is_symlink()
    assert there(tmp_path) == {"empty", "link", "pair"}
    NLA.from_pretrained(tmp_path / "empty", components=("av",))


def a_dangling_link(root: Path) -> Path:
    (root / "l").symlink_to(root / "nowhere")
    return root / "l"


def a_circle(root: Path) -> Path:
    (root / "l").symlink_to(root / "l")
    return root / "l"


def below_a_file(root: Path) -> Path:
    (root / "f").write_text("x")
    return root / "f" / "x" / "out"


def a_file(root: Path) -> Path:
    (root / "f").write_text("x")
    return root / "f"


def in_use(root: Path) -> Path:
    (root / "d" / "av").mkdir(parents=True)
    return root / "d"


def too_long(root: Path) -> Path:
    return root / ("x" * 300)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (a_dangling_link, "link that leads nowhere"),
        (a_circle, "link|Symlink|symbolic"),
        (below_a_file, "below a file|Not a directory"),
        (a_file, "is a file"),
        (in_use, r"not empty \(got av\)"),
        (too_long, "name too long"),
    ],
)
def test_a_destination_that_cannot_be_used_is_refused_before_the_pair_is_looked_for(
    make: Any, words: str, tmp_path: Path
) -> None:
    destination = make(tmp_path)
    before = there(tmp_path)
    with pytest.raises(RunError, match=f"(?i){words}") as caught:
        check_destination(destination)
    assert caught.value.next_step
    result = command("convert", "./no/such/pair", destination)
    assert result.exit_code == 1
    assert re.search(words, result.stderr, re.I)
    assert there(tmp_path) == before


def test_a_destination_without_permission_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "closed").mkdir(mode=0o555)
    if os.geteuid() == 0:  # root may do anything; what is asked is the same
        monkeypatch.setattr(os, "access", lambda path, _: str(path) != str(tmp_path / "closed"))
    with pytest.raises(RunError, match="cannot be written to") as caught:
        check_destination(tmp_path / "closed" / "new" / "out")
    assert caught.value.got == str(tmp_path / "closed")


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs a directory where nobody can create anything")
def test_what_the_system_refuses_is_an_error_with_a_next_step(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "access", lambda *_: True)
    monkeypatch.setattr(convert_module, "load_av", lambda *_: pytest.fail("it was loaded first"))
    with pytest.raises(RunError, match="Nothing was converted") as caught:
        run(source, Path("/proc/new/out"))
    assert caught.value.next_step


@pytest.mark.parametrize("below", ["pair/out", "pair/av/out", "pair/av/a/b", "pair", "pair/source/out", "."])
def test_source_and_destination_lie_apart(original: Path, tmp_path: Path, below: str) -> None:
    root = tmp_path / "around"
    shutil.copytree(original, root / "pair")
    (root / "pair" / "source").mkdir()
    with pytest.raises(RunError, match=r"lies inside the|not empty"):
        run(root / "pair", root / below)
    assert there(root / "pair") == {"av", "ar", "source"}
    (tmp_path / "link").symlink_to(root)
    with pytest.raises(RunError, match=r"lies inside the|not empty"):  # by another spelling of the same place
        run(root / "pair", tmp_path / "link" / below)


def test_a_destination_inside_the_base_or_the_other_half_is_refused(world: World, tmp_path: Path) -> None:
    two_directories(world, tmp_path)
    world.write_base(tmp_path / "base")
    for inner in ("x-av", "x-ar", "base"):
        with pytest.raises(RunError, match="The destination lies inside the source"):
            run(tmp_path / "x-av", tmp_path / inner / "out", base_model=tmp_path / "base")
    assert len(run(tmp_path / "x-av", tmp_path / "out")) == 2


@pytest.mark.parametrize(
    ("spelled", "meant"),
    [
        ("out", "out"),
        ("my@dir", "my@dir"),
        ("./owner/name", "owner/name"),
        ("./owner/name@main", "owner/name@main"),
        ("/tmp/name", "/tmp/name"),
        ("../name", "../name"),
        ("a/b/c", "a/b/c"),
        (".", "."),
        ("owner/name", None),
        ("owner/name@main", None),
        (".hidden/name", None),
        ("", None),
    ],
)
def test_a_destination_is_never_spelled_like_a_repository(spelled: str, meant: str | None) -> None:
    if meant is not None:
        assert str(named_directory(spelled)) == meant
        return
    with pytest.raises(InputError) as caught:
        named_directory(spelled)
    assert not spelled or caught.value.next_step == f"write ./{spelled}"


# -- what is left behind -------------------------------------------------------------------------------------


@contextmanager
def files_up_to(limit: int) -> Iterator[None]:
    """A disk that is full: no file grows beyond `limit` bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, ignored)


@pytest.mark.parametrize("where", ["new/deep/out", "empty"])
def test_a_full_disk_is_an_error_that_leaves_nothing(source: Path, tmp_path: Path, where: str) -> None:
    (tmp_path / "empty").mkdir()
    pair = open_pair(resolve_pair(source))
    with files_up_to(50_000), pytest.raises(RunError) as caught:
        convert(pair, tmp_path / where)
    assert caught.value.next_step
    assert there(tmp_path) == {"pair", "empty"}
    assert there(tmp_path / "empty") == set()


@pytest.mark.parametrize("where", ["new/deep/out", "empty"])
def test_sigterm_cleans_up(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    (tmp_path / "empty").mkdir()
    seen: list[str] = []

    def ends(directory: Path, *_: Any, **__: Any) -> None:
        seen.extend(path.name for path in directory.parent.iterdir())
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(convert_module, "save_ar", ends)
    before = signal.getsignal(signal.SIGTERM)
    result = command("convert", source, tmp_path / where)
    assert result.exit_code == 143
    assert seen == ["av"]  # the AV was there already
    assert there(tmp_path) == {"pair", "empty"}
    assert there(tmp_path / "empty") == set()
    assert signal.getsignal(signal.SIGTERM) is before


def test_every_file_has_the_permissions_of_an_ordinary_one(source: Path, tmp_path: Path) -> None:
    (source / "LICENSE").write_text("x")
    before = os.umask(0o027)
    try:
        run(source, tmp_path / "out")
    finally:
        os.umask(before)
    everything = [tmp_path / "out", *(tmp_path / "out").rglob("*")]
    assert {path.stat().st_mode & 0o777 for path in everything if path.is_dir()} == {0o750}
    assert {path.stat().st_mode & 0o777 for path in everything if path.is_file()} == {0o640}
    assert not any(path.name.startswith(".") for path in everything)


# -- what is printed -----------------------------------------------------------------------------------------


def told(result: Result) -> str:
    assert result.exit_code == 0, result.stderr
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("Use it: ")]
    return line.removeprefix("Use it: ")


def typed(line: str) -> None:
    """Do what the line says."""
    if line.startswith("NLA."):
        assert isinstance(eval(line, {"NLA": NLA}), NLA)
        return
    program, *words = shlex.split(line)
    assert program == "nla-hub"
    result = command(*words, "--max-new-tokens", 2)
    assert result.exit_code == 0, result.stderr


def test_the_command_that_is_printed_works_for_the_packaged_pair(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    line = told(command("convert", "tiny", "out"))
    assert line == 'nla-hub explain "..." --nla ./out --base-model tiny'
    typed(line)


@pytest.mark.parametrize("spelled", ["./a b/.out", "./.hidden/out", "."])
def test_the_command_that_is_printed_works_for_a_pair_with_its_base_beside_it(
    llama: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spelled: str
) -> None:
    for part in ("source", "av", "ar"):
        shutil.copytree(llama.pair.root / part, tmp_path / "my pair" / part)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    line = told(command("convert", "../my pair", spelled))
    assert "--base-model '../my pair/source'" in line
    typed(line)


def test_a_base_that_the_sidecar_names_is_not_repeated(source: Path, tmp_path: Path) -> None:
    assert told(command("convert", source, tmp_path / "out")) == f'nla-hub explain "..." --nla {tmp_path / "out"}'
    again = told(command("convert", source, tmp_path / "other", "--base-model", "owner/other@v1"))
    assert again.endswith(" --base-model owner/other@v1")


@pytest.mark.parametrize("half", ["av", "ar"])
def test_one_half_is_written_once_and_its_line_works(world: World, source: Path, tmp_path: Path, half: str) -> None:
    result = command("convert", source, tmp_path / "out", "--half", half, "--half", half)
    assert [line.partition(":")[0] for line in result.stdout.splitlines()] == [half.upper()]
    assert there(tmp_path / "out") == {half}
    line = told(result)
    assert line.startswith("NLA.from_pretrained(")
    nla = eval(line, {"NLA": NLA})
    if half == "ar":
        close(nla.reconstruct(list(TEXTS)), world.ar_vectors(world.full_ar))
    else:
        close(engine_logits(nla.av.engine, vectors()), world.av_logits(world.full_av))


def test_a_base_that_nobody_names_leaves_a_line_of_python(source: Path, tmp_path: Path) -> None:
    for half in ("av", "ar"):
        sidecar = yaml.safe_load((source / half / "nla_meta.yaml").read_text())
        del sidecar["base_checkpoint"]
        write_sidecar(source / half, sidecar)
    line = told(command("convert", source, tmp_path / "out"))
    assert line.startswith("NLA.from_pretrained(")
    typed(line)


# -- advice --------------------------------------------------------------------------------------------------

PYTHON = re.compile(r'\b(?:ar|subfolder|ar_subfolder|base_model|sidecar|components|dtype)=[("{.]')
"""What no advice of a command may hold."""


def lonely(world: World, root: Path) -> list[object]:
    world.write_av(root / "x", world.model_sidecar("av"))
    return [root / "x"]


def several(world: World, root: Path) -> list[object]:
    run_folders(world, root / "x")
    return [root / "x"]


def ar_first(world: World, root: Path) -> list[object]:
    two_directories(world, root)
    return [root / "x-ar"]


def unsaid_kind(world: World, root: Path) -> list[object]:
    sidecar = world.model_sidecar("av")
    del sidecar["extraction"]
    world.write_av(root / "x", sidecar)
    return [root / "x", "--half", "av"]


def nothing_said(world: World, root: Path) -> list[object]:
    world.write_av(root / "x", None)
    return [root / "x", "--half", "av"]


def base_nowhere(world: World, root: Path) -> list[object]:
    (root / "x").mkdir()
    sidecar = world.model_sidecar("av", base_checkpoint="C:\\somewhere")
    write_sidecar(root / "x", sidecar)
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 6, "base_model_name_or_path": "/home/somebody/base"}
    (root / "x" / "adapter_config.json").write_text(json.dumps(config))
    save_file({"x": torch.ones(1)}, root / "x" / "adapter_model.safetensors")
    return [root / "x", "--half", "av"]


@pytest.mark.parametrize(
    ("make", "advice"),
    [
        (lonely, ["--ar owner/name", "--ar ./path", "--half av"]),
        (several, ["--subfolder iter_0000200"]),
        (ar_first, ["--ar ..."]),
        (unsaid_kind, ["--sidecar FILE (a YAML file with `injection: {kind: add}`)"]),
        (nothing_said, ["--sidecar FILE", "tokens: {injection_char: ...}"]),
        (base_nowhere, ["--base-model owner/name", "--base-model ./path"]),
    ],
)
def test_advice_is_given_in_the_words_of_the_command(
    make: Any, advice: list[str], world: World, tmp_path: Path
) -> None:
    words = make(world, tmp_path)
    result = command("convert", *words, tmp_path / "out")
    assert result.exit_code == 1
    for part in advice:
        assert part in result.stderr
    assert not PYTHON.search(result.stderr), result.stderr


def test_the_file_that_is_advised_is_accepted(world: World, tmp_path: Path) -> None:
    words = unsaid_kind(world, tmp_path)
    advice = re.search(r"YAML file with `(.*?)`\)", command("convert", *words, tmp_path / "out").stderr)
    assert advice
    (tmp_path / "told.yaml").write_text(advice[1])
    assert command("convert", *words, tmp_path / "out", "--sidecar", tmp_path / "told.yaml").exit_code == 0


def test_what_a_command_cannot_do_is_said_to_be_python(world: World, tmp_path: Path) -> None:
    (name,) = lonely(world, tmp_path)
    result = command("explain", "a text", "--nla", name)
    assert 'pass --ar owner/name or --ar ./path, or in Python components=("av",)' in result.stderr


def test_the_sdk_keeps_its_own_words(world: World, tmp_path: Path) -> None:
    (name,) = lonely(world, tmp_path)
    with pytest.raises(NLAError, match=r'ar="owner/name".*components=\("av",\)'):
        NLA.from_pretrained(str(name))


EVERY = {"--ar", "--base-model", "--subfolder", "--ar-subfolder", "--sidecar", "--engine", "--memory"}


@pytest.mark.parametrize(
    ("sdk", "shell"),
    [
        ('pass sidecar={"adapter_stack": ["rl/a"]} or ["sft", "rl/a"]', None),
        ('sidecar={"a": {"b": "}"}}: x', '--sidecar FILE (a YAML file with `a: {b: "}"}`): x'),
        ('sidecar={"ar_special_tokens": False}', "--sidecar FILE (a YAML file with `ar_special_tokens: false`)"),
        (
            'sidecar={"a": ..., "b": {"c": ..., "d": 1}}',
            "--sidecar FILE (a YAML file with `{a: ..., b: {c: ..., d: 1}}`)",
        ),
        ("sidecar={unclosed", "sidecar={unclosed"),
        ('use memory="staged": one part at a time', "use --memory staged: one part at a time"),
        ('name one: ar_subfolder="my folder"', "name one: --ar-subfolder 'my folder'"),
        ('names={"bar="x", x.ar="y"', 'names={"bar="x", x.ar="y"'),
        ('dtype="bfloat16"', 'dtype="bfloat16"'),
        ("no advice at all", "no advice at all"),
    ],
)
def test_keywords_become_options(sdk: str, shell: str | None) -> None:
    expected = 'pass --sidecar FILE (a YAML file with `adapter_stack: [rl/a]`) or ["sft", "rl/a"]'
    assert for_command(sdk, EVERY) == (expected if shell is None else shell)


def test_what_the_user_wrote_is_not_translated(tmp_path: Path) -> None:
    result = command("convert", tmp_path / 'ar="x"', tmp_path / "out")
    assert 'ar="x"' in result.stderr


def test_a_converted_pair_names_where_it_was_asked_to_be(original: Path, tmp_path: Path) -> None:
    done = run(original, tmp_path / "x" / ".." / "out")
    assert [str(one.directory) for one in done] == [f"{tmp_path}/x/../out/{half}" for half in ("av", "ar")]
    assert there(tmp_path) == {"out"}
