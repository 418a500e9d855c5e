"""The Hub's failures, met by the real client in one process (hub_client.py) that talks to a local server."""

from __future__ import annotations

import hashlib
import json
import os
import struct
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hub_server import REVISION, SIGNATURE, Faults, Hub, Request

TOKEN = "hf_" + "0pen5esame" * 3
TENSORS = {"a": ([2, 3], "F32"), "b.weight": ([4], "BF16")}


def safetensors(size: int = 0) -> bytes:
    """A file with the tensors above and, where it is to be larger, one more."""
    shapes = dict(TENSORS) | ({"large": ([size], "U8")} if size else {})
    widths, offset, header = {"F32": 4, "BF16": 2, "U8": 1}, 0, {}
    for name, (shape, dtype) in shapes.items():
        width = widths[dtype]
        for n in shape:
            width *= n
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [offset, offset + width]}
        offset += width
    text = json.dumps(header).encode()
    return (
        struct.pack("<Q", len(text))
        + text
        + bytes(i * 37 % 251 for i in range(251)) * (offset // 251)
        + bytes(offset % 251)
    )


def raw(header: bytes, length: int | None = None) -> bytes:
    return struct.pack("<Q", len(header) if length is None else length) + header


HOSTILE = {
    "long.safetensors": raw(b"{}", 2**62),
    "list.safetensors": raw(b"[1, 2]"),
    "nested.safetensors": raw(b"[" * 100_000),
    "shapes.safetensors": raw(b'{"w": {"dtype": "F32", "shape": [-1, 4], "data_offsets": [0, 4]}}'),
    "text.safetensors": b"<html>log in here</html>",
    "empty.safetensors": b"",
}


@dataclass
class Session:
    """What the process saw, and what the two hosts were asked for."""

    results: dict[str, dict[str, Any]]
    requests: list[Request]
    output: str
    sources: dict[str, Path]

    def value(self, what: str) -> Any:
        result = self.results[what]
        assert "error" not in result, result.get("trace")
        return result["value"]

    def refused(self, what: str, error: str, *words: str) -> str:
        result = self.results[what]
        assert result.get("error") == error, result
        for word in words:
            assert word in result["text"], result["text"]
        assert "\n  Next: " in result["text"]
        return str(result["text"])

    def of(self, repo: str, host: str | None = None) -> list[Request]:
        return [request for request in self.requests if repo in request.path and host in (None, request.host)]


@pytest.fixture(scope="module")
def session(tmp_path_factory: pytest.TempPathFactory) -> Session:
    root = tmp_path_factory.mktemp("failures")

    def repository(name: str, contents: dict[str, bytes]) -> Path:
        for file, data in contents.items():
            (root / name / file).parent.mkdir(parents=True, exist_ok=True)
            (root / name / file).write_bytes(data)
        return root / name

    weights = safetensors()
    small = repository("small", {"config.json": b'{"a": 1}', "model.safetensors": weights})
    pair = repository(
        "pair",
        {
            "LICENSE": b"yours\n",
            "README.md": b"not asked for\n",
            "av/config.json": b"{}",
            "av/odd[1].json": b"[1]",
            "av/odd1.json": b"[2]",
            "av/model.safetensors": weights,
            "ar/model.safetensors": safetensors(300_000),
            "ar/pytorch_model.bin": b"never downloaded",
        },
    )
    large = repository("large", {"config.json": b"{}", "model.safetensors": safetensors(12_000_000)})
    later = {"Retry-After": "0"}
    one = "model.safetensors"
    # repository -> its files, and what goes wrong
    world: dict[str, tuple[Path, Faults]] = {
        "owner/pair": (pair, Faults()),
        "owner/large": (large, Faults()),
        "owner/twice": (large, Faults()),
        "owner/hostile": (repository("hostile", HOSTILE), Faults()),
        "owner/old-name": (small, Faults(moved="owner/new-name")),
        "owner/new-name": (small, Faults()),
        "owner/escape": (small, Faults(extra=("../../../escaped.json",))),
        "owner/absolute": (small, Faults(extra=("/tmp/escaped.json",))),
        "owner/odd-commit": (small, Faults(commit="../../elsewhere")),
        "owner/later-info": (small, Faults(refuse={"info": (2, 429, {"Retry-After": "1"})})),
        "owner/later-exists": (small, Faults(refuse={"info": (1, 429, {"Retry-After": "1"})})),
        "owner/later-tree": (small, Faults(refuse={"tree": (1, 429, later)})),
        "owner/later-head": (small, Faults(refuse={"head": (2, 429, later)})),
        "owner/later-blob": (small, Faults(refuse={"blob": (1, 429, later)})),
        "owner/later-headers": (small, Faults(refuse={"blob": (1, 429, later)})),
        "owner/storage-down": (small, Faults(refuse={"blob": (99, 503, {})})),
        "owner/cut": (small, Faults(cut={one: (1, 40), "config.json": (1, 3)})),
        "owner/cut-late": (large, Faults(cut={one: (1, 11_000_000)})),
        "owner/reset": (small, Faults(cut={one: (1, 40)}, reset=frozenset([one]))),
        "owner/reset-for-good": (small, Faults(cut={one: (99, 40)}, reset=frozenset([one]))),
        "owner/other-size": (small, Faults(promise={one: 7})),
        "owner/damaged-once": (small, Faults(damage={one: 1})),
        "owner/damaged": (small, Faults(damage={one: 99})),
        "owner/hangs-up": (small, Faults(hang_up=True)),
        "owner/no-hub": (small, Faults(answer=b"<html>log in to the network of this hotel</html>")),
    }
    sources = {name: directory for name, (directory, _) in world.items()}
    hub = Hub(sources, {name: faults for name, (_, faults) in world.items()})
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING"))}
    here = Path(__file__).parent
    environment |= {
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(root / "home"),
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "PYTHONPATH": os.pathsep.join([str(here.parent), str(here), *filter(None, [os.environ.get("PYTHONPATH")])]),
        "NO_PROXY": "127.0.0.1,localhost",
    }
    done = subprocess.run(
        [sys.executable, str(here / "hub_client.py"), hub.url, str(root), TOKEN],
        env=environment,
        capture_output=True,
        text=True,
        cwd=root,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [
        json.loads(line.removeprefix("RESULT ")) for line in done.stdout.splitlines() if line.startswith("RESULT ")
    ]
    return Session({line["what"]: line for line in lines}, hub.requests, done.stdout + done.stderr, sources)


def held(directory: Path, *names: str) -> dict[str, str]:
    """name -> sha256, of the files named or of all that belong to a checkpoint."""
    files = {p.relative_to(directory).as_posix(): p for p in sorted(directory.rglob("*")) if p.is_file()}
    kept = names or [name for name in files if not name.endswith((".bin", ".md"))]
    return {name: hashlib.sha256(files[name].read_bytes()).hexdigest() for name in sorted(kept)}


def sizes(directory: Path) -> dict[str, int]:
    return {p.relative_to(directory).as_posix(): p.stat().st_size for p in directory.rglob("*") if p.is_file()}


WHOLE = ("whole", "refused fetch cached", "refused fetch cached at a commit", "offline fetch cached")


@pytest.mark.parametrize("what", [*WHOLE, "offline fetch cached at a commit"])
def test_a_whole_download_is_what_the_hub_holds_and_stays_without_network(session: Session, what: str) -> None:
    assert session.value(what) == held(session.sources["owner/pair"])


def test_large_files_come_from_the_other_host_and_the_token_stays_at_home(session: Session) -> None:
    delivered = [request for request in session.requests if request.host == "storage"]
    assert len(delivered) > 10
    assert {request.authorization for request in delivered} == {None}
    assert any(request.authorization == f"Bearer {TOKEN}" for request in session.of("owner/pair", "hub"))
    assert any("pair/av/model.safetensors" in request.path and request.range for request in delivered), "headers too"


def test_a_repository_that_moved_is_followed(session: Session) -> None:
    assert session.value("moved") == held(session.sources["owner/new-name"])


@pytest.mark.parametrize("what", ["listed", "listed at a commit", "refused list cached", "offline list cached"])
def test_a_listing_is_names_sizes_and_commit(session: Session, what: str) -> None:
    found = session.value(what)
    everything = sizes(session.sources["owner/pair"])
    downloaded = {name: size for name, size in everything.items() if not name.endswith((".bin", ".md"))}
    assert found == {
        "commit": REVISION,
        "files": downloaded if "cached" in what else everything,
        "cached": "cached" in what,
    }


def test_a_listing_has_pages_and_downloads_nothing(session: Session) -> None:
    assert len(sizes(session.sources["owner/pair"])) > 2 * 3
    assert len(session.of("api/models/owner/pair/tree")) >= 3
    assert not [request for request in session.of("owner/busy-window") if "resolve" in request.path]


def test_exactly_the_files_named_come_and_are_found_again_offline(session: Session) -> None:
    found = session.value("exact")
    expected = held(session.sources["owner/pair"], "av/model.safetensors", "av/odd[1].json", "LICENSE")
    assert found["files"] == found["offline files"] == expected
    assert found["commit"] == found["offline"]["commit"] == REVISION
    assert set(found["offline"]["files"]) == set(expected)
    assert found["offline"]["cached"]


def test_files_that_are_not_there_are_all_named(session: Session) -> None:
    session.refused("exact absent", "HubNotFoundError", "lacks 2 of 3 files", "no.json, av/no.json")
    session.refused("exact offline without", "HubUnreachableError", "local_files_only", "av/config.json")


@pytest.mark.parametrize("what", ["exact escape", "listed escape", "listed absolute", "fetched escape"])
def test_names_that_leave_the_repository_are_refused(session: Session, what: str) -> None:
    session.refused(what, "HubError", "outside the repository" if what != "fetched escape" else "Invalid filename")
    assert not list(session.sources["owner/pair"].parent.rglob("escaped.json"))


def test_a_commit_that_is_a_path_is_refused(session: Session) -> None:
    session.refused("odd commit", "HubError", "../../elsewhere")


def test_headers_are_read_without_a_download(session: Session) -> None:
    tensors = {name: [shape, dtype] for name, (shape, dtype) in TENSORS.items()}
    found = session.value("headers")
    assert found["av/model.safetensors"] == tensors
    assert found["ar/model.safetensors"] == tensors | {"large": [[300_000], "U8"]}
    for what in ("headers of cached", "refused headers cached", "offline headers cached"):
        assert session.value(what) == {"av/model.safetensors": tensors}
    assert session.value("headers later") == {"model.safetensors": tensors}
    asked = [request for request in session.of("owner/later-headers") if request.method == "GET"]
    assert asked
    assert all(request.range for request in asked)


@pytest.mark.parametrize(
    ("what", "words"),
    [
        ("long", "too big"),
        ("list", "not a safetensors file"),
        ("nested", "not a safetensors file"),
        ("shapes", "no shape"),
        ("text", "not a safetensors file"),
        ("empty", "too small"),
    ],
)
def test_a_header_that_is_none_is_refused(session: Session, what: str, words: str) -> None:
    session.refused(f"headers {what}", "WeightsError", words, f"owner/hostile/{what}.safetensors")


def test_a_repository_exists_or_not_without_an_error(session: Session) -> None:
    there = ("exists", "exists gated", "exists later", "refused exists cached", "offline exists cached")
    assert [session.value(what) for what in there] == [True] * 5
    assert [session.value(f"exists {what}") for what in ("not", "hidden", "unauthorized")] == [False] * 3
    session.refused("exists bad token", "HubAuthError", "does not accept this token")
    session.refused("exists broken", "HubError", "500")


@pytest.mark.parametrize(
    ("what", "error", "words"),
    [
        ("gated 403", "HubGatedError", ["HTTP 403", "this account may not read it", "/owner/gated-av)"]),
        ("gated 401", "HubGatedError", ["HTTP 401", "nobody is logged in", "hf auth login"]),
        ("disabled", "HubError", ["disabled this repository"]),
        ("hidden", "HubNotFoundError", ["no such repository", "HTTP 401", "hf auth login"]),
        ("unauthorized", "HubAuthError", ["none was sent", "hf auth login"]),
        ("listed no revision", "HubNotFoundError", ["no revision 'v9'"]),
        ("headers absent", "HubNotFoundError", ["lacks 'no.safetensors'", "HTTP 404"]),
        ("down", "HubError", ["503", "try again later", "status.huggingface.co"]),
        ("storage down", "HubError", ["503", "try again later"]),
        ("busy for long", "HubError", ["wants fewer requests", "HTTP 429", "try again in 24 hours"]),
        ("busy window", "HubError", ["wants fewer requests", "try again in 9 minutes"]),
        ("reset for good", "HubUnreachableError", ["broke off 3 times", "try again"]),
        ("other size", "HubError", ["damaged", "size 183 but has size 176", "try again"]),
        ("damaged", "HubError", ["damaged", "sha256", "try again"]),
        ("no Hub", "HubUnreachableError", ["not a Hugging Face Hub", "HF_ENDPOINT"]),
        ("no place", "HubError", ["could not be stored", "cache_dir="]),
        ("disk full", "HubError", ["could not be stored", "make room"]),
        ("token with a line break", "HubAuthError", ["no token"]),
        ("no token stored", "HubAuthError", ["token=True", "hf auth login"]),
    ],
)
def test_every_failure_has_an_error_and_a_next_step(session: Session, what: str, error: str, words: list[str]) -> None:
    session.refused(what, error, *words)


@pytest.mark.skipif(os.geteuid() == 0, reason="nothing is read-only for root")
def test_a_cache_that_is_read_only(session: Session) -> None:
    session.refused("read only", "HubError", "could not be stored", "may write to")


RECOVERED = ("later info", "later tree", "later head", "later blob", "cut", "cut late", "reset", "damaged once")


@pytest.mark.parametrize("what", RECOVERED)
def test_what_passes_is_waited_for_and_the_files_are_intact(session: Session, what: str) -> None:
    repo = f"owner/{what.replace(' ', '-')}"
    assert session.value(what) == held(session.sources[repo])
    asked = [(request.method, request.path) for request in session.of(repo)]
    assert len(asked) > len(set(asked)), "nothing was asked for twice"


def test_a_download_cut_short_goes_on_where_it_stopped(session: Session) -> None:
    ranges = [request.range for request in session.of("owner/cut-late", "storage")]
    assert len(ranges) == 2
    assert ranges[0] is None
    assert ranges[1] is not None
    assert int(ranges[1].removeprefix("bytes=").removesuffix("-")) > 10_000_000


def test_waiting_is_said(session: Session) -> None:
    assert "owner/later-info: 429 Too Many Requests" in session.output
    assert "Trying again in 1 s." in session.output


def test_a_hub_that_hangs_up_leaves_the_cache(session: Session) -> None:
    config = held(session.sources["owner/hangs-up"], "config.json")
    assert session.value("hangs up") == [config, config, True]


@pytest.mark.parametrize("mode", ["refused", "offline"])
@pytest.mark.parametrize("what", ["fetch", "fetch at a commit", "list", "list at a commit", "headers", "exists"])
def test_without_network_and_cache_the_error_says_so(session: Session, mode: str, what: str) -> None:
    advice = "HF_ENDPOINT" if mode == "refused" else "without HF_HUB_OFFLINE"
    session.refused(
        f"{mode} {what}", "HubUnreachableError", "cannot be reached", "cache does not hold", advice, "--nla tiny"
    )


def test_two_at_once_do_not_damage_the_cache(session: Session) -> None:
    assert session.value("two at once") == [held(session.sources["owner/twice"])] * 2


def test_nothing_half_done_stays_in_a_cache(session: Session) -> None:
    assert {what: result["loose"] for what, result in session.results.items() if result["loose"]} == {}


def test_every_error_is_typed(session: Session) -> None:
    assert [what for what, result in session.results.items() if not result.get("typed", True)] == []


def test_neither_token_nor_signature_is_in_an_error_and_the_token_nowhere(session: Session) -> None:
    assert len(session.output) > 10_000, "the logs are in it"
    assert TOKEN not in session.output
    texts = [result["text"] for result in session.results.values() if "text" in result]
    assert any("/owner/storage-down/" in text for text in texts)
    assert not any(SIGNATURE in text for text in texts)
