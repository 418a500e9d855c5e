"""The real huggingface_hub client against a local server: one process loads a pair and meets every refusal."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import warnings
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from conftest import Case
from hub_server import REVISION, Hub, Request
from wild import World, easynla_rl, run_folders

from nla_hub.hub import MODEL_FILES, HubOptions

PEFT = find_spec("peft") is not None
TOKEN = "hf_" + "s3cret" * 5

SCRIPT = r"""
import json, sys, traceback, urllib.request
import torch, transformers
from huggingface_hub import constants
from nla_hub import NLA
from nla_hub.errors import NLAError

torch.set_num_threads(1)
cache, endpoint, token, revision = sys.argv[1:5]

def attempt(what, name, **keywords):
    result = {"what": what}
    try:
        nla = NLA.from_pretrained(name, **{"cache_dir": cache, **keywords})
        result["repr"] = repr(nla) + repr(vars(nla))
        if "av" in keywords.get("components", ("av",)):
            rows = nla.explain(["the cat sees", "a house"], temperature=0, max_new_tokens=8)
            result["rows"] = [row.raw for row in rows]
            result["revision"], result["model"] = rows[0].revision, rows[0].model
        else:
            result["vector"] = nla.reconstruct("the cat").tolist()
    except Exception as error:
        result["error"] = type(error).__name__
        result["typed"] = isinstance(error, NLAError)
        result["text"] = str(error)
        result["trace"] = "".join(traceback.format_exception(error))
        result["attributes"] = repr({k: str(v) for k, v in vars(error).items()})
    print("RESULT " + json.dumps(result), flush=True)

attempt("ar alone", "owner/name-av", components=("ar",), cache_dir=cache + "-ar")
attempt("pinned", "owner/name-av", revision=revision)
attempt("pinned by name", f"owner/name-av@{revision}")
attempt("with token", "owner/name-av", token=token, force_download=True)
attempt("no such repository", "owner/absent-av")
attempt("no such revision", "owner/name-av", revision="v9")
attempt("no such pinned revision", "owner/name-av", revision="f" * 40)
attempt("no ar beside it", "owner/lonely-av")
attempt("no name", "owner/a..b--c-av")
attempt("faulty contract", "owner/faulty-av")
attempt("folder", "owner/runs", subfolder="iter_0000200")
attempt("which folder", "owner/runs")
attempt("another word", "owner/x_Verbalizer_final")
attempt("lora", "owner/lora")
for name in ("unauthorized", "bad-token", "gated", "forbidden", "broken"):
    attempt(name, f"owner/{name}-av", token=token)
try:
    while True:
        urllib.request.urlopen(endpoint + "/stop").read()
except OSError:
    pass  # refused from now on
attempt("refused", "owner/other-av")
attempt("refused but cached", "owner/name-av", revision=revision)
attempt("local files only", "owner/other-av", local_files_only=True)
attempt("local files only but cached", "owner/name-av", local_files_only=True)
constants.HF_HUB_OFFLINE = True
attempt("offline", "owner/other-av")
attempt("offline but cached", "owner/name-av")
"""


@dataclass
class Session:
    """What the process saw, and what the server was asked for."""

    results: dict[str, dict[str, Any]]
    requests: list[Request]
    output: str


@pytest.fixture(scope="module")
def session(llama: Case, tmp_path_factory: pytest.TempPathFactory) -> Session:
    import shutil

    root = tmp_path_factory.mktemp("hub")
    av = root / "av"
    shutil.copytree(llama.pair.av, av)
    for decoy in ("pytorch_model.bin", "modeling_evil.py", "train.parquet"):
        (av / decoy).write_bytes(b"never downloaded")
    faulty = root / "faulty"
    shutil.copytree(llama.pair.av, faulty)
    sidecar = faulty / "nla_meta.yaml"
    sidecar.write_text(sidecar.read_text("utf-8").replace("injection_scale: 8.0", "injection_scale: -8.0"), "utf-8")
    world = World()
    folders = run_folders(world, root / "runs")
    world.write_base(root / "lora" / "base")  # also what the sidecars of the folders call their base
    if PEFT:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # of transformers about what peft asks it
            easynla_rl(world, root / "lora")
    hub = Hub(
        {
            "owner/name-av": av,
            "owner/name-ar": llama.pair.ar,
            "owner/lonely-av": llama.pair.av,
            "random/source": llama.pair.source,
            "owner/runs": folders.name,
            "owner/faulty-av": faulty,
            "owner/faulty-ar": llama.pair.ar,
            "owner/x_Verbalizer_final": llama.pair.av,
            "owner/x_Reconstructor_final": llama.pair.ar,
            "owner/base": root / "lora" / "base",
            "owner/lora": root / "lora" / "run",
        }
    )
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING"))}
    environment |= {
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(root / "home"),
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]),
        "NO_PROXY": "127.0.0.1",
    }
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(root / "cache"), hub.url, TOKEN, REVISION],
        env=environment,
        capture_output=True,
        text=True,
        cwd=root,
        timeout=240,
        check=False,
    )
    lines = [
        json.loads(line.removeprefix("RESULT ")) for line in done.stdout.splitlines() if line.startswith("RESULT ")
    ]
    assert done.returncode == 0, done.stderr[-3000:]
    return Session({line["what"]: line for line in lines}, hub.requests, done.stdout + done.stderr)


def test_a_pinned_revision_loads_and_explains_as_from_disk(session: Session, llama: Case) -> None:
    expected = [e.raw for e in llama.nla.explain(["the cat sees", "a house"], temperature=0, max_new_tokens=8)]
    for what in ("pinned", "pinned by name", "with token"):
        assert session.results[what].get("rows") == expected, session.results[what]
    assert session.results["pinned"]["revision"] == REVISION
    assert session.results["pinned"]["model"] == "owner/name-av"


def test_the_ar_is_found_beside_the_av_and_the_source_by_the_sidecar(session: Session) -> None:
    paths = [path for _, path, *_ in session.requests]
    assert any(path.startswith("owner/name-ar/resolve/") for path in paths)
    assert any(path.startswith("random/source/resolve/") for path in paths)


def test_of_many_folders_only_the_named_one_is_downloaded(session: Session) -> None:
    assert session.results["folder"].get("rows"), session.results["folder"]
    assert session.results["folder"]["model"] == "owner/runs/iter_0000200/av"
    there = {path.split("/", 4)[4] for _, path, *_ in session.requests if path.startswith("owner/runs/resolve/")}
    assert {"iter_0000200/av/model.safetensors", "iter_0000200/ar/value_head.safetensors"} <= there
    assert not any(name.startswith("iter_0000100") for name in there)
    asked = session.results["which folder"]
    assert asked["error"] == "CheckpointError"
    assert "iter_0000100/av" in asked["text"] and 'subfolder="' in asked["text"]


def test_no_weight_is_downloaded_before_the_contract_was_read(session: Session) -> None:
    assert "injection_scale: got -8.0" in session.results["faulty contract"]["text"]
    paths = [path for _, path, *_ in session.requests if path.startswith("owner/faulty-")]
    assert any(path.endswith("nla_meta.yaml") for path in paths)
    assert not any(path.endswith(".safetensors") for path in paths)


def test_a_sibling_is_found_by_the_word_for_its_half(session: Session) -> None:
    assert session.results["another word"].get("rows"), session.results["another word"]


@pytest.mark.skipif(not PEFT, reason="the LoRA repository is written with peft (extra lora)")
def test_a_lora_repository_brings_its_base_from_the_hub(session: Session) -> None:
    assert session.results["lora"].get("rows"), session.results["lora"]
    paths = [path for _, path, *_ in session.requests]
    assert any(path.startswith("owner/base/resolve/") and path.endswith("model.safetensors") for path in paths)
    assert not any("reference" in path for path in paths if path.startswith("owner/lora/resolve/"))


def test_a_pinned_revision_is_what_is_asked_for(session: Session) -> None:
    asked = [path for _, path, *_ in session.requests if path.startswith("owner/name-av/resolve/")]
    assert asked
    assert {path.split("/")[3] for path in asked} == {REVISION}


def test_pickles_code_and_data_are_never_downloaded(session: Session) -> None:
    files = {path.split("/")[-1] for _, path, *_ in session.requests if "/resolve/" in path}
    assert "model.safetensors" in files
    assert not files & {"pytorch_model.bin", "modeling_evil.py", "train.parquet"}
    assert not any(pattern.endswith((".bin", ".py", ".pt")) for pattern in MODEL_FILES)


def test_the_weights_of_a_half_that_was_not_asked_for_are_never_opened(session: Session, llama: Case) -> None:
    def first(half: str, name: str) -> int:
        path = f"owner/name-{half}/resolve/{REVISION}/{name}"
        return next(i for i, (_, asked, *_) in enumerate(session.requests) if asked == path)

    assert first("av", "nla_meta.yaml") < first("ar", "model.safetensors") < first("av", "model.safetensors")
    assert session.results["ar alone"]["vector"] == pytest.approx(llama.nla.reconstruct("the cat").tolist(), rel=1e-4)


@pytest.mark.parametrize(
    ("what", "error", "words"),
    [
        ("unauthorized", "HubAuthError", ["does not accept this token", "HTTP 401", "hf auth login"]),
        ("bad-token", "HubAuthError", ["does not accept this token", "HTTP 401", "HF_TOKEN"]),
        ("gated", "HubGatedError", ["is gated", "HTTP 403", "accept its terms on the page of owner/gated-av"]),
        ("forbidden", "HubGatedError", ["refuses this account", "HTTP 403", "token's permissions"]),
        ("broken", "HubError", ["answered with an error", "500", "try again later"]),
        ("no such repository", "HubNotFoundError", ["no such repository", "HTTP 404", "owner/absent-av", "spelling"]),
        ("no such revision", "HubNotFoundError", ["no revision 'v9'", "HTTP 404", "owner/name-av"]),
        ("no such pinned revision", "HubNotFoundError", ["no revision 'ffff", "HTTP 404"]),
        ("no ar beside it", "HubNotFoundError", ["no such repository", "owner/lonely-ar"]),
        ("no name", "HubNotFoundError", ["not a repository name", "owner/name"]),
        ("refused", "HubUnreachableError", ["cannot be reached", "HF_ENDPOINT", "--nla tiny"]),
        ("local files only", "HubUnreachableError", ["cannot be reached", "cache does not hold"]),
        ("offline", "HubUnreachableError", ["cannot be reached", "HF_HUB_OFFLINE"]),
    ],
)
def test_every_refusal_is_an_error_of_its_own(session: Session, what: str, error: str, words: list[str]) -> None:
    result = session.results[what]
    assert result.get("error") == error, result
    for word in (*words, "Next: "):
        assert word in result["text"], result["text"]
    assert result["text"].count("\n") == 1


def test_the_refusals_can_be_told_apart(session: Session) -> None:
    texts = [
        session.results[what]["text"]
        for what in (
            "unauthorized",
            "gated",
            "forbidden",
            "broken",
            "no such repository",
            "no such revision",
            "refused",
        )
    ]
    assert len({text.split(": ", 1)[1] for text in texts}) == len(texts)


@pytest.mark.parametrize("what", ["refused but cached", "local files only but cached", "offline but cached"])
def test_what_is_in_the_cache_needs_no_network(session: Session, what: str) -> None:
    assert session.results[what].get("rows") == session.results["pinned"]["rows"], session.results[what]


def test_a_token_is_sent_and_never_shown(session: Session) -> None:
    assert any(sent == f"Bearer {TOKEN}" for _, _, sent, *_ in session.requests)
    assert not any(sent for _, path, sent, *_ in session.requests if "absent" in path)
    assert TOKEN not in session.output
    assert TOKEN not in repr(HubOptions(token=TOKEN))
    assert repr(HubOptions(token=True)).startswith("HubOptions(token=True")
