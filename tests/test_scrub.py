"""Nothing secret is published: planted in texts, headers and runs, it is found where it stands; other files are left alone.

Tokens are put together here, so that no file of this repository holds one.
"""

from __future__ import annotations

import bz2
import getpass
import gzip
import io
import json
import lzma
import pickle
import shutil
import socket
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from nla_hub import resources
from nla_hub.errors import PublishError
from nla_hub.publish.guards import scrub
from nla_hub.publish.guards.content import Rules, secrets_of
from nla_hub.publish.guards.scrub import mask, require_clean
from nla_hub.publish.guards.secret_forms import LOOK_AHEAD, TOKENS, TRACES
from nla_hub.publish.guards.secrets import kinds_in, search, tokens_in
from nla_hub.publish.release import Entry, Release, RepoKind, StagedRepo

ROOT = Path(__file__).resolve().parents[1]
TINY = ROOT / "nla_hub" / "tiny" / "weights"

LETTERS = "Zk3Qw8Rt5Yp1Ls7Df9Gh2Jm4Nb6Vc0Xz8Qa3Ws5Ed7Rf1Tg9Yh2Uj4Ik6Ol8"
HEX = "9f8e7d6c5b4a39281706f5e4d3c2b1a098765432"
SECRETS: Mapping[str, tuple[str, str]] = {
    "hugging face": ("hf" + "_" + LETTERS[:34], "a Hugging Face token"),
    "hugging face, letters only": ("hf" + "_" + "abcdefghijklmnopqrstuvwxyzABCDEFGH", "a Hugging Face token"),
    "openai": ("sk" + "-" + LETTERS[:48], "an OpenAI key"),
    "openai project": ("sk" + "-proj-" + LETTERS[:20] + "_" + LETTERS[:40], "an OpenAI key"),
    "anthropic": ("sk" + "-ant-api03-" + LETTERS[:40] + "-" + LETTERS[:9] + "AA", "an Anthropic key"),
    "github": ("gh" + "p_" + LETTERS[:36], "a GitHub token"),
    "github, fine-grained": ("github" + "_pat_" + LETTERS[:22] + "_" + LETTERS[:59], "a GitHub token"),
    "gitlab": ("gl" + "pat-" + LETTERS[:20], "a GitLab token"),
    "aws": ("AK" + "IA" + "Q3W5E7R9T1Y2U4I6", "an AWS access key"),
    "google": ("AI" + "za" + LETTERS[:35], "a Google API key"),
    "slack": ("xo" + "xb-" + "123456789012-123456789012-" + LETTERS[:24], "a Slack token"),
    "w&b": ("wandb" + "_v1_" + LETTERS[:40], "a Weights & Biases key"),
    "groq": ("gs" + "k_" + LETTERS[:52], "a Groq key"),
    "private key": ("-----BEGIN " + "RSA PRIVATE" + " KEY-----", "a private key"),
    "bearer": ("Authorization: Bearer " + LETTERS[:30], "a bearer token"),
    "assigned": ("api_" + 'key = "' + LETTERS[:24], "an assigned secret"),
    "assigned in JSON": ('"wandb_api_key"' + ': "' + HEX, "an assigned secret"),
    "password": ("password" + ": Tr0ub4dor&3", "a password"),
    "netrc": ("login user password " + HEX, "a password"),
    "address": ("https://someone:" + LETTERS[:12] + "@host.org/x", "a user name and password in an address"),
}
TRACED: Mapping[str, tuple[str, str]] = {
    "linux home": ("/home/someone/runs", "a home directory"),
    "mac home": ("/Users/someone/runs", "a home directory"),
    "windows home": ("C:\\Users\\someone\\runs", "a home directory"),
    "windows home in JSON": ("C:\\\\Users\\\\someone", "a home directory"),
    "home in JSON": (r"\/home\/someone\/runs", "a home directory"),
    "root": ("/root/.cache/huggingface", "a home directory"),
    "temporary": ("/tmp/abc/x.json", "a temporary directory"),
    "address of a file": ("file:///data/x", "a file of a machine"),
    "e-mail": ("first.last+tag@cs.some-university.edu", "an e-mail address"),
    "w&b run": ("https://wandb.ai/team/project/runs/3k2j1h4g", "the address of a tracker's run"),
    "w&b directory": ("wandb/run-20250102_030405-abcd1234", "the id of a tracker's run"),
}
ALL = {**SECRETS, **TRACED}

AROUND = st.text(st.characters(exclude_categories=("Cs",)), max_size=200)
EDGES = st.sampled_from([" ", "\n", '"', "'", "\t", "(", "\u00a0", "語"])


def release(
    entries: Mapping[str, bytes | Path], kind: RepoKind = "model", name: str = "someone/nla-x-L2-av"
) -> Release:
    found = tuple(Entry(key, value) for key, value in sorted(entries.items()))
    return Release((StagedRepo(name, kind, "av" if kind == "model" else "data", found),), "0" * 12, "nla-0")


def refusal(staged: Release, source: Path) -> str:
    with pytest.raises(PublishError) as error:
        require_clean(staged, source=source)
    return str(error.value)


@pytest.fixture
def empty(tmp_path: Path) -> Path:
    place = tmp_path / "empty"
    place.mkdir()
    return place


@pytest.fixture(autouse=True)
def nobody(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    """A machine whose owner has no tokens and an ordinary name."""
    for name in ("HF_TOKEN", "OPENAI_API_KEY", "ANTHROPIC_API_KEY", "GITHUB_TOKEN", "WANDB_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    home = tmp_path_factory.mktemp("home")
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(home / "token"))
    monkeypatch.setattr("huggingface_hub.constants.HF_STORED_TOKENS_PATH", str(home / "stored_tokens"))
    monkeypatch.setattr(socket, "gethostname", lambda: "localhost")
    monkeypatch.setattr(getpass, "getuser", lambda: "root")


# -- texts -----------------------------------------------------------------------------------------------------


@given(case=st.sampled_from(sorted(ALL)), before=AROUND, left=EDGES, right=EDGES, after=AROUND)
@example(case="hugging face", before="", left="\n", right="\n", after="")
@example(case="windows home", before="\r\n\r\n", left='"', right='"', after="")
def test_a_secret_inside_any_text_is_found_where_it_stands(
    case: str, before: str, left: str, right: str, after: str
) -> None:
    secret, what = ALL[case]
    text = f"{before}{left}{secret}{right}{after}"
    found = list(search([text.encode()], TRACES))
    lead = f"{before}{left}"
    line = lead.count("\n") + 1
    first, last = len(lead.rpartition("\n")[2]) + 1, len((lead + secret).rpartition("\n")[2])
    hits = [f for f in found if f.rule.what == what and f.line == line and first <= f.column <= last]
    assert hits, found
    assert all(secret not in str(f) for f in found)
    assert secret not in mask(text) or case in ("bearer", "assigned")


LONG = {
    **ALL,
    "a long address": ("https://someone:" + "p" * 150 + "1@host.org/x", "a user name and password in an address"),
}


@pytest.mark.parametrize("case", sorted(LONG))
def test_the_same_is_found_wherever_a_file_is_cut(case: str) -> None:
    """Through what is told, before it and behind it, and where the part ends that is judged before more is read."""
    before, after = "é b\nc " * 1000, " d e\n" * 2000
    raw = f"{before}{LONG[case][0]}{after}".encode()
    place, size = len(before.encode()), len(LONG[case][0])
    whole = [str(f) for f in search([raw], TRACES)]
    assert len(whole) == 1
    for cut in range(place - 2, place + size + 2, 3):
        for end in (cut, cut + LOOK_AHEAD):
            assert [str(f) for f in search([raw[:end], raw[end:]], TRACES)] == whole, end - place


@settings(max_examples=20)
@given(places=st.lists(st.integers(0, 9_000), min_size=2, max_size=6), step=st.integers(500, 5000), data=st.data())
def test_many_findings_in_many_pieces(places: list[int], step: int, data: st.DataObject) -> None:
    text = "é語 x\n" * 1800
    for place in places:
        text = f"{text[:place]} {ALL[data.draw(st.sampled_from(sorted(ALL)))][0]} {text[place:]}"
    raw = text.encode()
    pieces = [raw[i : i + step] for i in range(0, len(raw), step)]
    assert [str(f) for f in search(pieces, TRACES)] == [str(f) for f in search([raw], TRACES)]


@pytest.mark.parametrize("case", sorted(SECRETS))
def test_tokens_in_a_text_are_told_by_kind(case: str) -> None:
    secret, what = SECRETS[case]
    assert tokens_in(f"nothing {secret} nothing") == [what]


@pytest.mark.parametrize("case", sorted(ALL))
def test_masking(case: str) -> None:
    secret, what = ALL[case]
    masked = mask(f"She wrote:\n {secret} and left.")
    kind = next(rule.kind for rule in TRACES if rule.what == what)
    assert f"[{kind}]" in masked
    assert masked.startswith("She wrote:\n ") and masked.endswith(" and left.")
    assert secret not in masked
    assert kinds_in(masked, TRACES) == []


@given(st.text())
def test_masking_leaves_a_text_without_secrets_alone(text: str) -> None:
    if not kinds_in(text, TRACES):
        assert mask(text) == text


HARMLESS = [
    "risk-adjusted-return-of-the-2nd-kind and task-oriented-dialogue-systems-2024",
    "https://example.org/home/page/x and https://huggingface.co/Users/guide",
    "and/or/root, either/home/or/work, ../home/x, ./tmp/x, ~/models",
    "recall@10.mean, precision@5, user@host, a@b, decorator @torch.no_grad() and name@v1.2",
    "contact noreply@github.com, x@users.noreply.github.com, you@example.com, or git@github.com:owner/name.git",
    '"tokenizer_class": "Qwen2TokenizerFast", "tokenizer_name": "Qwen2.5-7B-Instruct-1M"',
    'token: hf_xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx, HF_TOKEN=$HF_TOKEN, api_key = os.environ["OPENAI_API_KEY"]',
    "Authorization: Bearer $TOKEN; Bearer YOUR_TOKEN; api_key=<your key here>; password: see below",
    "tokens_per_document: 1234567890123456, token_id: 149705, eos_token: <|endoftext|>",
    f"commit {HEX}, sha256 {HEX}{HEX[:24]}",
    "http://localhost:8000/v1 and postgres://$USER:$PASSWORD@host/db",
    "The password was given to nobody. Her secret: she had never learned to swim. A token of love.",
    "sklearn, sk-learn, hf_transfer, hf_hub_download, ghost_writer, AKIA, AIza, xoxo-lots-of-love",
    "C:\\Program Files\\x, the /tmp directory, the /home directory, rooted in /rootless ground",
]


@pytest.mark.parametrize("text", HARMLESS)
def test_ordinary_words_give_no_alarm(text: str) -> None:
    assert [str(f) for f in search([text.encode()], TRACES)] == []


def documents() -> Iterator[Path]:
    yield from sorted((ROOT / "docs").glob("*.md"))
    yield from sorted((ROOT / "nla_hub").rglob("*.py"))


def test_the_texts_of_this_repository_hold_no_token() -> None:
    found = {
        p.name: [str(f) for f in search([p.read_bytes()], TOKENS)] for p in [*documents(), *sorted(TINY.rglob("*.*"))]
    }
    assert {name: what for name, what in found.items() if what} == {}


@pytest.mark.parametrize("encoding", ["utf-16", "utf-32", "utf-16-le", "utf-16-be", "utf-32-le", "utf-32-be"])
def test_letters_of_several_bytes_are_read_too(encoding: str, empty: Path) -> None:
    text = f"one é\ntwo {SECRETS['hugging face'][0]}\n"
    message = refusal(release({"notes.txt": text.encode(encoding)}), empty)
    assert "notes.txt, line 2, column 5: a Hugging Face token" in message


def test_bytes_that_are_no_text_are_searched_as_they_are(empty: Path) -> None:
    data = bytes(400) + SECRETS["hugging face"][0].encode() + bytes(100)
    assert "a Hugging Face token" in refusal(release({"notes.txt": data}), empty)


# -- JSON that says something else than it shows ---------------------------------------------------------------


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "vocab.json", "model.safetensors"])
@pytest.mark.parametrize(
    ("shown", "what"),
    [
        (r"\u002fhome\u002fsomeone\u002fx", "a home directory"),
        (SECRETS["hugging face"][0].replace("_", r"\u005f"), "a Hugging Face token"),
        (r"two lines\n" + SECRETS["openai"][0], "an OpenAI key"),
        (r"two lines\n/home/someone/x", "a home directory"),
        (SECRETS["address"][0].replace("/", r"\/"), "a user name and password in an address"),
    ],
)
def test_escapes_hide_nothing(name: str, shown: str, what: str, empty: Path) -> None:
    told = f'{{\n "__metadata__": {{"a": "\\u00e9 ok",\n "b": "{shown}"}}}}'.encode()
    data = len(told).to_bytes(8, "little") + told if name.endswith(".safetensors") else told
    message = refusal(release({name: data}), empty)
    assert "line 3: " in message and f"{what} (" in message and "in a string with escapes" in message


def test_what_is_shown_is_told_once(empty: Path) -> None:
    told = f'{{"a": "\\u00e9 {SECRETS["hugging face"][0]} /home/someone/x"}}'.encode()
    message = refusal(release({"config.json": told}), empty)
    assert "2 findings" in message and "with escapes" not in message


def test_escapes_in_a_vocabulary_are_words_of_it(empty: Path) -> None:
    words = json.dumps({"model": {"vocab": {"é\n/home/user": 0, "Ġ/tmp/x": 1}, "merges": []}, "is": "\n"}).encode()
    require_clean(release({"tokenizer.json": words}), source=empty)
    planted = json.dumps({"model": {"vocab": {"é\n/home/user": 0}, "merges": []}, "is": "\n/home/x"}).encode()
    assert refusal(release({"tokenizer.json": planted}), empty).count("a home directory") == 1


@given(st.binary(max_size=200))
@example(b'\\ "a\\')
@example(b'"\\')
def test_no_bytes_break_the_search_of_json(data: bytes) -> None:
    list(secrets_of(Entry("config.json", data), Rules()))


# -- names -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", ["hugging face", "e-mail"])
@pytest.mark.parametrize("name", ["{}.txt", "{}/a.txt", "a/x {}.safetensors.index.json"])
def test_names_of_files_and_folders_are_searched(case: str, name: str, tmp_path: Path) -> None:
    secret, what = ALL[case]
    name = name.format(secret)
    message = refusal(release({name: b"{}"}), tmp_path / "empty")
    (tmp_path / "pair" / name).parent.mkdir(parents=True)
    (tmp_path / "pair" / name).write_bytes(b"{}")
    beside = refusal(release({"README.md": b"x"}), tmp_path / "pair")
    assert all(f"its name: {what} (" in told for told in (message, beside))
    assert all(secret not in told for told in (message, beside))


def test_names_with_an_at_are_no_addresses(empty: Path) -> None:
    names = ("mean@L20.json", "step@v1.safetensors.index.json", "recall@10.md", "a@b/x.yaml")
    require_clean(release(dict.fromkeys(names, b"{}")), source=empty)


# -- tokenizers ------------------------------------------------------------------------------------------------


@cache
def vocabulary() -> tuple[str, ...]:
    """What a vocabulary of the web may hold: words of real texts, and beginnings of everything that is looked for."""
    words = {word for path in documents() if path.suffix == ".md" for word in path.read_text(encoding="utf-8").split()}
    odd = ["/home/user", "/tmp/x", "Ġ/Users/", "me@gmail.com", "://", "sk-", "hf_", "Bearer", "-----BEGIN", "file:///C"]
    return tuple(sorted({word for word in words if len(word) < 40} | {*odd, "C:\\Users\\x"}))


def vocabulary_file(name: str, *more: str, **beside: object) -> bytes:
    """A file of that name with the vocabulary in it."""
    words = [*vocabulary(), *more]
    numbered = {w: i for i, w in enumerate(words)}
    if name == "tokenizer.json":
        model = {"type": "BPE", "vocab": numbered, "merges": [f"{w} x" for w in words]}
        return json.dumps({"version": "1.0", "model": model, **beside}, ensure_ascii=False, indent=1).encode()
    if name == "vocab.json":
        return json.dumps(numbered).encode()
    return "\n".join(["#version: 0.2", *(f"{w} x" for w in words)] if name == "merges.txt" else words).encode()


@pytest.mark.parametrize(
    "name", ["tokenizer.json", "vocab.json", "merges.txt", "vocab.txt", "tokenizer.model", "x.tiktoken"]
)
def test_a_vocabulary_may_hold_anything_but_tokens(name: str, empty: Path) -> None:
    require_clean(release({name: vocabulary_file(name)}), source=empty)
    planted = vocabulary_file(name, SECRETS["hugging face"][0])
    assert "a Hugging Face token" in refusal(release({name: planted}), empty)


@pytest.mark.parametrize(
    "beside",
    [
        {"added_tokens": [{"content": "/home/someone/x"}]},
        {"normalizer": {"/home/someone/x": 1}},
        {"made": '/home/someone/x"'},
    ],
)
def test_outside_its_vocabulary_a_tokenizer_is_a_file_like_any_other(beside: dict[str, object], empty: Path) -> None:
    message = refusal(release({"tokenizer.json": vocabulary_file("tokenizer.json", **beside)}), empty)
    assert message.count("a home directory") == 1


def test_what_is_only_called_a_vocabulary_is_searched_whole(empty: Path) -> None:
    for name in ("merges.txt", "vocab.txt", "vocab.json", "tokenizer.json"):
        message = refusal(release({name: b"a note by somebody\nwho lives in /home/someone/x now\n"}), empty)
        assert f"{name}, line 2, column 14: a home directory" in message


# -- headers ---------------------------------------------------------------------------------------------------


def test_headers_of_weights_are_searched(tmp_path: Path, empty: Path) -> None:
    save_file({"w": torch.zeros(4)}, tmp_path / "model.safetensors", metadata={"made_in": "/home/someone/x"})
    message = refusal(release({"model.safetensors": tmp_path / "model.safetensors"}), empty)
    assert "model.safetensors, header, line 1" in message and "a home directory" in message


def test_weights_themselves_are_not_searched(tmp_path: Path, empty: Path) -> None:
    told = torch.tensor(list(b" " + SECRETS["hugging face"][0].encode() + b" "), dtype=torch.uint8)
    save_file({"w": told}, tmp_path / "model.safetensors")
    require_clean(release({"model.safetensors": tmp_path / "model.safetensors"}), source=empty)


def test_schemas_of_tables_are_searched(tmp_path: Path, empty: Path) -> None:
    for n, metadata in enumerate([{"who": "me@some-university.edu"}, {"where": "/home/someone/x"}]):
        field = pa.field("x", pa.int64(), metadata=metadata if n else None)
        path = tmp_path / f"{n}.parquet"
        pq.write_table(pa.table([[1]], schema=pa.schema([field], metadata=None if n else metadata)), path)
        message = refusal(release({path.name: path}, "dataset"), empty)
        assert f"{path.name}, metadata {next(iter(metadata))!r}" in message


# -- this machine ----------------------------------------------------------------------------------------------


def test_the_accounts_own_tokens_are_known_by_their_value(monkeypatch: pytest.MonkeyPatch, empty: Path) -> None:
    """Without anything that a pattern could tell them by: a W&B key looks like a commit."""
    monkeypatch.setenv("WANDB_API_KEY", HEX)
    (Path.home() / ".netrc").write_text(f"machine some.host login me password {HEX[::-1]}\n")
    (Path.home() / "token").write_text("just-some-words-of-a-token")
    told = f"commit {HEX}\ncommit {HEX[::-1]}\nsays just-some-words-of-a-token\n"
    message = refusal(release({"README.md": told.encode()}), empty)
    assert "line 1, column 8: the value of WANDB_API_KEY" in message
    assert "line 2, column 8: the password for some.host in ~/.netrc" in message
    assert "line 3, column 6: this account's Hugging Face token" in message
    assert not any(secret in message for secret in (HEX, HEX[::-1], "words-of-a-token"))


def test_variables_that_hold_no_secret_are_left_out(monkeypatch: pytest.MonkeyPatch, empty: Path) -> None:
    monkeypatch.setenv("SOME_TOKEN", "/etc/secrets/token")
    monkeypatch.setenv("OTHER_API_KEY", "none")
    require_clean(release({"README.md": b"it reads none of etc/secrets/token"}), source=empty)


def test_where_the_release_was_made_is_never_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = tmp_path / "runs" / "tiny-0123abcd"
    run.mkdir(parents=True)
    monkeypatch.chdir(run.parent)
    monkeypatch.setattr(scrub, "PATHS", ())  # so that only the machine's own are known
    for place in (run / "av", run, run.parent, Path.home() / "x"):
        assert "line 1, column 4" in refusal(release({"README.md": f"in {place} it lies".encode()}), run)
    require_clean(release({"README.md": b"the run tiny-0123abcd"}), source=run)


@pytest.mark.parametrize(
    ("host", "user", "text", "found"),
    [
        ("gpu07.cluster.org", "root", "made on gpu07 in May", "this machine's host name"),
        ("gpu07.cluster.org", "root", "made on gpu07.cluster.org", "this machine's host name"),
        ("localhost", "jdoe", "made by jdoe, in May", "this machine's user name"),
        ("localhost", "jdoe", "jdoes and xjdoe and jdoe_2", None),
        ("localhost", "someone", "published as someone/nla-x-L2-av", None),
        ("vector", "ubuntu", "ubuntu on localhost", None),
        ("gpu", "ann", "ann has a gpu", None),
        ("a1b2c3d4e5f6", "root", "a1b2c3d4e5f6a1 is a commit", None),
    ],
)
def test_names_of_host_and_user(
    host: str, user: str, text: str, found: str | None, monkeypatch: pytest.MonkeyPatch, empty: Path
) -> None:
    monkeypatch.setattr(socket, "gethostname", lambda: host)
    monkeypatch.setattr(getpass, "getuser", lambda: user)
    staged = release({"README.md": text.encode()})
    if found is None:
        require_clean(staged, source=empty)
    else:
        assert found in refusal(staged, empty)


def test_a_name_that_is_a_word_of_the_language_says_nothing(monkeypatch: pytest.MonkeyPatch, empty: Path) -> None:
    monkeypatch.setattr(getpass, "getuser", lambda: "harbour")
    text = {"README.md": b"a ship in the harbour"}
    assert "this machine's user name" in refusal(release(text), empty)
    words = json.dumps({"model": {"vocab": {"Ġharbour": 0}, "merges": []}}, ensure_ascii=False).encode()
    require_clean(release({**text, "tokenizer.json": words}), source=empty)


def test_licences_may_name_their_authors(empty: Path) -> None:
    text = b"Copyright Someone <someone@some-university.edu>\n"
    require_clean(release({"LICENSE": text, "NOTICE.txt": text, "USE_POLICY.md": text}), source=empty)
    assert "an e-mail address (...@some-university.edu" in refusal(release({"README.md": text}), empty)
    assert "a home directory" in refusal(release({"LICENSE": b"see /home/someone/x"}), empty)


# -- a run with planted secrets --------------------------------------------------------------------------------


def torch_file() -> bytes:
    stream = io.BytesIO()
    torch.save({"w": torch.zeros(2)}, stream)
    return stream.getvalue()


class Runs:
    """What a pickle may do."""

    def __reduce__(self) -> tuple[Callable[..., object], tuple[str]]:
        return print, ("x",)


def old_pickle(what: object) -> bytes:
    return pickle.dumps(what, protocol=0)


NOTEBOOK = json.dumps({"cells": [{"cell_type": "code", "outputs": []}, {"outputs": [{"text": "x"}]}]}, indent=1)
PLANTED: Mapping[str, tuple[str, bytes, str]] = {
    **{
        f"{case} in {place}": (place, f"first\n\n  {ALL[case][0]}\n".encode(), f"{place}, line 3, column")
        for place in ("notes.txt", "export/checkpoint/av/notes", "ar/deep/er/memo.md", ".env", "labels/x.json")
        for case in ("hugging face", "aws", "linux home", "windows home", "e-mail")
    },
    "a token in the metrics": (
        "av/metrics.jsonl",
        f'{{"a": 1}}\n{{"b": "{SECRETS["openai"][0]}"}}\n'.encode(),
        "metrics.jsonl, line 2",
    ),
    "a token in the configuration": (
        "config.yaml",
        f"a: 1\ntold: {SECRETS['github'][0]}\n".encode(),
        "config.yaml, line 2",
    ),
    "a notebook with outputs": (
        "look.ipynb",
        NOTEBOOK.encode(),
        "look.ipynb, line 8: a notebook with the outputs of 1 cells",
    ),
    "a notebook below the pair": ("export/checkpoint/look.ipynb", NOTEBOOK.encode(), "look.ipynb, line 8: a notebook"),
    "a pickle of torch": ("av/checkpoint/best.bin", torch_file(), "best.bin, a pickle"),
    "a pickle called as the run's own": ("ar/checkpoint/tokenizer.json", torch_file(), "tokenizer.json, a pickle in"),
    "a pickle by its content alone": ("notes.json", torch_file(), "notes.json, a pickle in an archive"),
    "a notebook called something else": (
        "look.json",
        json.dumps({"nbformat": 4, **json.loads(NOTEBOOK)}).encode(),
        "look.json, line 1: a notebook with the outputs of 1 cells",
    ),
    "a large pickle without a mark": ("thing.txt", old_pickle([Runs(), "x" * 2**17]), "thing.txt, a pickle"),
    "a large pickle of texts": ("thing.txt", old_pickle([f"{n}" * 50 for n in range(9000)]), "thing.txt, a pickle"),
    "a pickle that begins otherwise": ("thing.txt", b"I1\n0" + old_pickle(Runs()), "thing.txt, a pickle"),
    **{
        f"a pickle in {name}": (f"thing.{name}", packer(pickle.dumps([1, 2])), f"thing.{name}, a compressed pickle")
        for name, packer in (("gz", gzip.compress), ("bz2", bz2.compress), ("xz", lzma.compress))
    },
    **{
        f"a pickle of protocol {n}": (f"thing{n}", pickle.dumps({"a": np.zeros(1)}, protocol=n), f"thing{n}, a pickle")
        for n in range(6)
    },
}


def make_run(place: Path) -> Path:
    """What a run leaves, with the places of its machine in it, and the packaged pair as its result."""
    for half in ("av", "ar"):
        shutil.copytree(TINY / half, place / "export" / "checkpoint" / half)
        (place / half / "state").mkdir(parents=True)
        (place / half / "state" / "loop-00000001.pt").write_bytes(torch_file())
        (place / half / "config.yaml").write_text("corpus: /home/someone/texts\n")
        (place / half / "metrics.jsonl").write_text(json.dumps({"where": "/home/someone/runs/x"}) + "\n")
        (place / half / "DONE").write_text("{}\n")
        (place / half / "checkpoint").mkdir()
        (place / half / "checkpoint" / "config.json").write_text('{"_name_or_path": "/home/someone/base"}')
    (place / "config.yaml").write_text("base: {name: /home/someone/base}\nname: x\n")
    (place / "report.html").write_text("<p>/home/someone/runs/x</p>")
    (place / "data" / "checkpoint").mkdir(parents=True)
    (place / "data" / "checkpoint" / "eval.jsonl").write_text(json.dumps({"text": SECRETS["aws"][0]}) + "\n")
    (place / "labels").mkdir()
    (place / "labels" / "labels.sqlite").write_bytes(b"SQLite format 3\0 /home/someone/x a@some-university.edu")
    (place / "export" / "checkpoint" / "av" / "config.json").write_text('{"_name_or_path": "/home/someone/base"}')
    return place


@pytest.fixture(scope="module")
def a_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("run") / "x-0123abcd")


def of_run(run: Path) -> Release:
    """Its AV, the configuration without the machine's places."""
    folder = run / "export" / "checkpoint" / "av"
    kept = {p.name: p for p in folder.iterdir() if p.name not in ("config.json", "notes")}
    return release({**kept, "config.json": b"{}"})


def test_a_run_as_training_leaves_it_is_clean(a_run: Path) -> None:
    require_clean(of_run(a_run), source=a_run)


@pytest.mark.parametrize("case", sorted(PLANTED))
def test_whatever_is_planted_in_a_run_is_refused(case: str, a_run: Path) -> None:
    place, content, told = PLANTED[case]
    path = a_run / place
    before = path.read_bytes() if path.exists() else None
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    try:
        message = refusal(of_run(a_run), a_run)
    finally:
        path.unlink() if before is None else path.write_bytes(before)
    assert told in message
    assert str(path) in message
    assert not any(secret in message for secret, _ in ALL.values())


def test_everything_is_told_at_once(tmp_path: Path) -> None:
    run = make_run(tmp_path / "x-0123abcd")
    for case in (
        "hugging face in notes.txt",
        "e-mail in ar/deep/er/memo.md",
        "a notebook with outputs",
        "a pickle of torch",
    ):
        place, content, _ = PLANTED[case]
        (run / place).parent.mkdir(parents=True, exist_ok=True)
        (run / place).write_bytes(content)
    staged = of_run(run)
    repo = staged.repos[0]
    card = Entry("README.md", f"one\n{SECRETS['slack'][0]} {TRACED['e-mail'][0]}".encode())
    message = refusal(Release((StagedRepo(repo.name, "model", "av", (card, *repo.entries)),), staged.id, "t"), run)
    for told in (
        "notes.txt",
        "memo.md",
        "look.ipynb",
        "best.bin",
        "README.md, line 2, column 1: a Slack token",
        "(...@cs.",
    ):
        assert told in message
    assert "revoke a token" in message


def test_the_accounts_own_token_is_found_in_documents_too(a_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where strangers' texts may hold any token of theirs."""
    monkeypatch.setenv("HF_TOKEN", SECRETS["aws"][0])
    assert "eval.jsonl, line 1, column 11: the value of HF_TOKEN" in refusal(of_run(a_run), a_run)


def test_the_other_half_may_lie_elsewhere(tmp_path: Path) -> None:
    """Files beside its weights are searched too."""
    av, ar = tmp_path / "av", tmp_path / "elsewhere" / "ar"
    for place in (av, ar):
        place.mkdir(parents=True)
        save_file({"w": torch.zeros(1)}, place / "model.safetensors")
    staged = release({"model.safetensors": ar / "model.safetensors"})
    require_clean(staged, source=av)
    (ar / "notes.txt").write_text(TRACED["e-mail"][0])
    assert f"{ar / 'notes.txt'}, line 1, column 1: an e-mail address" in refusal(staged, av)


def test_folders_of_git_are_not_looked_into(tmp_path: Path) -> None:
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git" / "config").write_text(SECRETS["address"][0])
    require_clean(release({"README.md": b"x"}), source=tmp_path)


def test_a_notebook_without_outputs_is_a_text(tmp_path: Path) -> None:
    (tmp_path / "look.ipynb").write_text(json.dumps({"cells": [{"source": ["x"], "outputs": []}]}))
    require_clean(release({"README.md": b"x"}), source=tmp_path)
    (tmp_path / "look.ipynb").write_text(json.dumps({"cells": [{"source": [TRACED["e-mail"][0]], "outputs": []}]}))
    assert "an e-mail address" in refusal(release({"README.md": b"x"}), tmp_path)


def test_a_header_that_begins_like_a_pickle_is_none(tmp_path: Path, empty: Path) -> None:
    """Its length has the bytes of a pickle's mark; a pickle is one under any name."""
    save_file({"w": torch.zeros(4)}, tmp_path / "x.safetensors")
    header, values = (tmp_path / "x.safetensors").read_bytes()[8:].partition(b"}")[::2]
    for second in range(2, 6):
        length = 0x80 + 256 * second
        data = length.to_bytes(8, "little") + (header + b"}}").ljust(length) + values[-16:]
        path = tmp_path / "model.safetensors"
        path.write_bytes(data)
        assert load_file(path)["w"].tolist() == [0] * 4
        require_clean(release({"model.safetensors": path}), source=empty)
        assert "a pickle" in refusal(release({"model.txt": data}), empty)
        assert "a pickle" in refusal(release({"model.safetensors": data[:200]}), empty)
    assert "a pickle" in refusal(release({"model.safetensors": pickle.dumps({"w": [1, 2]})}), empty)


@pytest.mark.parametrize(
    "text",
    [
        "config\nmodel\nReadme\n",
        "Various things\ncat\ndog\nRun\n.\n",
        "(a)\nNone\nI\n",
        "isympy\nsympy\n",
        "S'a\\ b'\n",
        "cat\ndog\nVan\nRun\ntR\n",
        "}\n",
        "(one of them).\n",
    ],
)
def test_words_that_are_opcodes_too(text: str, empty: Path) -> None:
    require_clean(release({"notes.txt": text.encode()}), source=empty)


# -- what is sent ----------------------------------------------------------------------------------------------

OF_NO_RELEASE: Mapping[str, tuple[bytes, str]] = {
    "modeling_x.py": (b"import os", "code: a release holds none"),
    "run.sh": (b"echo", "code: a release holds none"),
    "look.ipynb": (b"{}", "code: a release holds none"),
    "tool.json": (b"#!/bin/sh\n", "a program or a script"),
    "lib.json": (b"\x7fELF\x02", "a program or a script"),
    ".env": (b"A=1", "a hidden file"),
    "av/.cache/x.json": (b"{}", "a hidden file"),
    "model.gguf": (b"GGUF", "weights in another form than safetensors"),
    "model.json": (b"GGUF", "weights in another form than safetensors"),
    "model.onnx": (b"x", "weights in another form than safetensors"),
    "weights.npz": (b"x", "weights in another form than safetensors"),
    "movie.mp4": (b"x", "a file of a kind that no release holds"),
    "rows.parquet": (b"x", "a file of a kind that no release holds"),
    "pytorch_model.bin": (b"x", "a pickle"),
    "optimizer.pt": (b"x", "a pickle"),
}


@pytest.mark.parametrize("name", sorted(OF_NO_RELEASE))
def test_what_no_release_holds(name: str, empty: Path) -> None:
    content, told = OF_NO_RELEASE[name]
    assert f"{name}, {told}" in refusal(release({name: content}), empty)


def test_what_every_release_holds(empty: Path) -> None:
    names = ("README.md", "LICENSE", "NOTICE", "USE_POLICY.md", "config.json", "chat_template.jinja", "nla_meta.yaml")
    require_clean(
        release({**dict.fromkeys(names, b"x"), ".eval_results/x.yaml": b"a: 1", ".gitattributes": b"x"}), source=empty
    )
    require_clean(release({"rows.jsonl": TRACED["e-mail"][0].encode(), "README.md": b"x"}, "dataset"), source=empty)


def test_links(tmp_path: Path) -> None:
    """One that leads out would publish any file of the machine; those of a downloaded snapshot lead into its own cache."""
    pair, elsewhere = tmp_path / "pair", tmp_path / "elsewhere"
    for place in (pair, elsewhere):
        place.mkdir()
    (elsewhere / "secret.json").write_text("{}")
    (pair / "config.json").symlink_to(elsewhere / "secret.json")
    (pair / "av").symlink_to(elsewhere)
    (pair / "gone.json").symlink_to(elsewhere / "gone.json")
    (pair / "own.json").write_text("{}")
    (pair / "near.json").symlink_to(pair / "own.json")
    for name in ("config.json", "av/secret.json"):
        assert f"{name}, a link that leads out" in refusal(release({"config.json": pair / name}), pair)
    assert "a link or file that is not there" in refusal(release({"config.json": pair / "gone.json"}), pair)
    require_clean(release({"config.json": pair / "near.json"}), source=pair)
    cache = tmp_path / "models--a--b"
    snapshot = cache / "snapshots" / "0123"
    for place in (cache / "blobs", snapshot):
        place.mkdir(parents=True)
    (cache / "blobs" / "1").write_text("{}")
    (snapshot / "config.json").symlink_to(Path("..", "..", "blobs", "1"))
    require_clean(release({"config.json": snapshot / "config.json"}), source=snapshot)


def test_a_file_that_cannot_be_read_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "notes.txt").write_text("x")
    (tmp_path / "other.txt").write_text("x")
    opened: Callable[..., object] = Path.open

    def refuse(self: Path, *arguments: object, **more: object) -> object:
        if self.name == "notes.txt":
            raise PermissionError(13, "Permission denied")
        return opened(self, *arguments, **more)

    monkeypatch.setattr(Path, "open", refuse)
    assert "notes.txt, it cannot be read: Permission denied" in refusal(release({"README.md": b"x"}), tmp_path)


def test_findings_of_one_file_are_not_all_listed(empty: Path) -> None:
    text = "".join(f"{SECRETS['hugging face'][0][:-3]}{n:03}\n" for n in range(500))
    message = refusal(release({"README.md": text.encode()}), empty)
    assert "line 8, column 1" in message and "and 492 more" in message and len(message) < 2000


def test_the_packaged_cards_and_pair_are_clean(empty: Path) -> None:
    entries = {p.name: p for p in sorted((TINY / "ar").iterdir())}
    card = resources.data_directory("model_cards") / "tiny.md"
    require_clean(release({**entries, "README.md": card.read_bytes()}), source=empty)


def test_rules_without_a_kind() -> None:
    entry = Entry("x.txt", b"me@some-university.edu /home/someone/x")
    whole = Rules((), TRACES)
    assert [fault.split(": ")[1].split(" (")[0] for fault in secrets_of(entry, whole)] == [
        "an e-mail address",
        "a home directory",
    ]
    assert len(list(secrets_of(entry, whole.without("e-mail")))) == 1
