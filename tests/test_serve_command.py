"""`nla-hub serve-command`: what it prints, what it refuses, and that a real server started so gives the same text."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from av_server import within
from conftest import Case, Spec
from parity import ReferenceAV, same_rows, stops_rightly
from safetensors.torch import save_file
from typer.testing import CliRunner
from wild import shard

from nla_hub import NLA, hub
from nla_hub.cli.app import app
from nla_hub.errors import NLAError
from nla_hub.hub import Listing
from nla_hub.sampling import RowKey, uniforms
from nla_hub.testing import D_MODEL, random_gemma3_wrapper, random_pair
from nla_hub.weights import read_header

runner = CliRunner()


def ask(*args: str) -> Any:
    return runner.invoke(app, ["serve-command", *args])


def refused(said: str, *args: str) -> str:
    """What the command says on stderr when it refuses."""
    done = ask(*args)
    assert (done.exit_code, done.stdout) == (1, "")
    assert said in done.stderr
    return str(done.stderr)


def options(command: str) -> dict[str, str]:
    """The command's options by name; "" for those without a value."""
    words = shlex.split(command)
    assert words[:3] == ["python", "-m", "vllm.entrypoints.openai.api_server"]
    found: dict[str, str] = {}
    for i, word in enumerate(words):
        if word.startswith("--"):
            value = words[i + 1] if i + 1 < len(words) else "--"
            assert word not in found
            found[word] = "" if value.startswith("--") else value
    return found


def test_one_line_on_stdout_and_what_to_know_on_stderr(llama: Case) -> None:
    done = ask(str(llama.pair.root), "--port", "8123", "--tensor-parallel", "2", "--max-new-tokens", "100")
    assert (done.exit_code, done.stdout.count("\n")) == (0, 1)
    said = options(done.stdout)
    assert said["--model"] == str(llama.pair.av.resolve())
    assert "--hf-overrides" not in said
    assert {name: said[name] for name in ("--dtype", "--port", "--tensor-parallel-size", "--host")} == {
        "--dtype": "float32",
        "--port": "8123",
        "--tensor-parallel-size": "2",
        "--host": "127.0.0.1",
    }
    assert said["--max-model-len"] == str(len(llama.av.ids) + 100)
    assert said["--logprobs-mode"] == "processed_logprobs"
    assert "--enable-prompt-embeds" in said
    assert "--revision" not in said
    assert "NaN" in done.stderr
    assert "--engine-option url=http://127.0.0.1:8123" in done.stderr
    assert "Warning" not in done.stderr
    assert "Warning: 0.0.0.0" in ask(str(llama.pair.root), "--host", "0.0.0.0").stderr


def test_the_longest_answer_ends_where_the_model_does(llama: Case) -> None:
    assert options(ask(str(llama.pair.root)).stdout)["--max-model-len"] == "512"


def test_json_and_names_that_a_shell_would_split(llama: Case, tmp_path: Path) -> None:
    place = tmp_path / "my pairs; ls"
    shutil.copytree(llama.pair.av, place / "the av")
    done = ask(str(place / "the av"), "--dtype", "bfloat16", "--json")
    found = json.loads(done.stdout)
    assert shlex.split(found["command"]) == found["argv"]
    assert options(found["command"])["--model"] == str((place / "the av").resolve())
    assert (found["model"], found["url"]) == ("the av", "http://127.0.0.1:8000")
    assert options(found["command"])["--dtype"] == "bfloat16"
    assert any("--engine-option dtype=bfloat16" in note for note in found["notes"])


def test_a_repository_is_pinned_and_nothing_of_its_weights_is_downloaded(
    llama: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    there = tmp_path / "there"
    shutil.copytree(llama.pair.av, there)
    shard(there / "model.safetensors")
    config = json.loads((there / "config.json").read_text(encoding="utf-8"))
    (there / "config.json").write_text(json.dumps(config | {"architectures": ["LlamaForCausalLM"]}), encoding="utf-8")
    files = {path.name: path.stat().st_size for path in there.iterdir()}
    commit = "0123456789" * 4

    def fetch(repo: str, names: list[str], **_: Any) -> Path:
        assert not any(name.endswith(".safetensors") for name in names)
        return there

    def headers(repo: str, names: list[str], *, revision: str, **_: Any) -> Any:
        assert revision == commit
        return {n: {k: (t.shape, t.dtype) for k, t in read_header(there / n).items()} for n in names}

    monkeypatch.setattr(hub, "listing", lambda repo, **_: Listing(repo, commit, files))
    monkeypatch.setattr(hub, "fetch_files", fetch)
    monkeypatch.setattr(hub, "headers", headers)
    said = options(ask("owner/name-av@main").stdout)
    assert said["--model"] == said["--served-model-name"] == "owner/name-av"
    assert said["--revision"] == said["--tokenizer-revision"] == commit
    assert said["--dtype"] == "float32"
    assert "--hf-overrides" not in said
    files |= {f"av/{name}": size for name, size in files.items()}
    for name in [name for name in files if "/" not in name]:
        del files[name]
    shutil.copytree(there, there / "av")
    refused("folder of its repository", "owner/name-av@main")


def lora(copied: Any) -> None:
    """The pair's AV becomes a LoRA on its source."""
    (copied.av / "model.safetensors").unlink()
    (copied.av / "config.json").unlink()
    said = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"]}
    (copied.av / "adapter_config.json").write_text(json.dumps(said), encoding="utf-8")
    save_file({"x": torch.zeros(1)}, copied.av / "adapter_model.safetensors")


def wrapped(copied: Any) -> None:
    """The pair's AV becomes a multimodal wrapper."""
    tokens = json.loads((copied.av / "config.json").read_text(encoding="utf-8"))["vocab_size"]
    random_gemma3_wrapper(tokens).save_pretrained(copied.av)


def other_head(copied: Any) -> None:
    """The pair's AV says that its lm_head is the embedding, and has another one."""
    path = copied.av / "config.json"
    said = json.loads(path.read_text(encoding="utf-8")) | {"tie_word_embeddings": True}
    path.write_text(json.dumps(said), encoding="utf-8")


@pytest.mark.parametrize(
    ("change", "said"), [(lora, "is a LoRA"), (wrapped, "multimodal wrapper"), (other_head, "lm_head of its own")]
)
def test_what_vllm_cannot_read_as_it_lies_is_to_be_converted(
    copied: Any, change: Callable[[Any], None], said: str
) -> None:
    change(copied)
    message = refused(said, str(copied.root), "--base-model", str(copied.source))
    assert f"nla-hub convert {copied.root} ./served --half av" in message


def test_another_kind_of_injection_is_refused(make_case: Callable[[Spec], Case]) -> None:
    refused("injection.kind 'add'", str(make_case(Spec("llama", kind="add")).pair.root))


# -- a real server -------------------------------------------------------------------------------------------

LONG = "the cat sees a house and walks in the night of the old river "
"""Repeated around the marker it fills blocks of the cache on both sides of it."""


@pytest.fixture(scope="module")
def pair_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pair whose prompt is long enough that a server keeps parts of it."""
    root = tmp_path_factory.mktemp("served")
    random_pair(root, "gemma3")
    path = root / "av" / "nla_meta.yaml"
    said = yaml.safe_load(path.read_text(encoding="utf-8"))
    said.pop("integrity", None)
    said["prompt_templates"]["av"] = f"{LONG * 6}{said['prompt_templates']['av']} {LONG * 6}"
    path.write_text(yaml.safe_dump(said, allow_unicode=True), encoding="utf-8")
    return root


@pytest.fixture(scope="module")
def vllm_server(pair_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a vLLM server, started as the command says."""
    if find_spec("vllm") is None:
        pytest.skip("vLLM is not installed")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    printed = ask(str(pair_root), "--port", str(port), "--max-new-tokens", "64")
    _, *words = shlex.split(printed.stdout)
    environment = {**os.environ, "VLLM_NO_USAGE_STATS": "1", "VLLM_API_KEY": "k3y"}
    if not torch.cuda.is_available():  # a small machine: little memory, no compiling, blocks that its kernels like
        environment |= {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1"}
        words += ["--enforce-eager", "--block-size", "32"]
    log = tmp_path_factory.mktemp("log") / "server.log"
    with log.open("w") as out:
        process = subprocess.Popen(
            [sys.executable, *words], env=environment, stdout=out, stderr=out, start_new_session=True
        )
    url = f"http://127.0.0.1:{port}"

    def answers() -> bool:
        assert process.poll() is None, log.read_text()[-4000:]
        with suppress(urllib.error.URLError, OSError):
            return urllib.request.urlopen(f"{url}/health", timeout=1).status == 200
        return False

    try:
        assert within(240, answers), log.read_text()[-4000:]
        yield url
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
            process.wait(30)
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


@pytest.mark.vllm
def test_a_real_server_writes_what_the_transformers_engine_writes(vllm_server: str, pair_root: Path) -> None:
    vectors = torch.randn(24, D_MODEL, generator=torch.Generator().manual_seed(5))
    reference, steps = ReferenceAV(pair_root / "av"), 24
    expected, margins = reference.decode(vectors, steps)
    with NLA.from_pretrained(
        pair_root, components=("av",), engine="remote", engine_options={"url": vllm_server, "api_key": "k3y"}
    ) as far:
        engine: Any = far.av.engine
        assert engine.at_temperature
        for order in (torch.arange(24), torch.arange(24).flip(0)):  # again, from what the server kept of the prompts
            found = engine.generate(vectors[order], None, temperature=1.0, max_new_tokens=steps, batch_size=8)
            same_rows([c.ids for c in found], [expected[i] for i in order], [margins[i] for i in order])
            for completion in found:
                stops_rightly(completion, reference, steps)
        draws = uniforms(0, [RowKey(str(i)) for i in range(24)], steps)
        drawn = engine.generate(vectors, draws, temperature=0.8, max_new_tokens=steps, batch_size=8)
        again = engine.generate(vectors[[7]], draws[[7]], temperature=0.8, max_new_tokens=steps, batch_size=1)
        assert again[0].ids == drawn[7].ids
    ids = torch.tensor([[*c.ids, *[0] * (steps - len(c.ids))] for c in drawn])
    logprobs = (reference.logits(vectors, ids) / 0.8).log_softmax(-1)
    for row, completion in enumerate(drawn):
        wanted = torch.stack([logprobs[row, i, token] for i, token in enumerate(completion.ids)])
        assert torch.allclose(completion.logprobs, wanted, atol=1e-4, rtol=0)


@pytest.mark.vllm
def test_a_real_servers_first_tokens_are_drawn_from_the_models_distribution(vllm_server: str, pair_root: Path) -> None:
    """Pearson's chi-square over the eight likeliest tokens and the rest: 0.999 quantile with 8 degrees 26.1."""
    n, vector = 1000, torch.randn(1, D_MODEL, generator=torch.Generator().manual_seed(6))
    exact = (
        ReferenceAV(pair_root / "av").logits(vector, torch.empty(1, 0, dtype=torch.long))[0, -1].double().softmax(-1)
    )
    with NLA.from_pretrained(
        pair_root, components=("av",), engine="remote", engine_options={"url": vllm_server, "api_key": "k3y"}
    ) as far:
        draws = uniforms(7, [RowKey("x", sample=i) for i in range(n)], 1)
        run: dict[str, Any] = {"temperature": 1.0, "max_new_tokens": 1, "batch_size": 32}
        found = far.av.engine.generate(vector.expand(n, -1), draws, **run)
    top = exact.topk(8)
    counts = torch.bincount(torch.tensor([c.ids[0] for c in found]), minlength=len(exact)).double()
    observed = torch.cat([counts[top.indices], (n - counts[top.indices].sum())[None]])
    expected = n * torch.cat([top.values, (1 - top.values.sum())[None]])
    assert float(expected.min()) > 5
    assert float(((observed - expected) ** 2 / expected).sum()) < 26.1


@pytest.mark.vllm
def test_a_real_server_wants_its_key(vllm_server: str, pair_root: Path) -> None:
    with pytest.raises(NLAError, match="wants an API key"):
        NLA.from_pretrained(pair_root, components=("av",), engine="remote", engine_options={"url": vllm_server})


def test_files_that_vllm_would_take_for_weights_are_named(copied: Any) -> None:
    """Our own pairs keep the mean of their reference beside the weights."""
    (copied.av / "fve_reference.safetensors").write_bytes((copied.av / "model.safetensors").read_bytes())
    refused("rm ./served/av/fve_reference.safetensors", str(copied.root))


def test_a_config_that_names_no_class_is_told_to_vllm(copied: Any) -> None:
    config = json.loads((copied.av / "config.json").read_text())
    del config["architectures"]
    (copied.av / "config.json").write_text(json.dumps(config))
    said = options(ask(str(copied.root)).stdout)
    assert json.loads(said["--hf-overrides"]) == {"architectures": ["LlamaForCausalLM"]}
