"""The table of verdicts on damaged or odd checkpoints, row by row; whatever the verdict, nothing outside is even opened.

Outside of every checkpoint lies a directory with a secret, which the kernel watches (inotify): each case fails if anything
in this process, in whatever language, opens a file there, or if a program is started.
"""

from __future__ import annotations

import ctypes
import logging
import os
import struct
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import Case
from damage import HEAD, WEIGHTS, edit, edit_config, edit_index, residecar, shard
from safetensors.torch import load_file, save_file

from nla_hub import NLA
from nla_hub.errors import CheckpointError
from nla_hub.sidecar import Sidecar, Site
from nla_hub.testing import RandomPair

OPENED = 0x00000020  # IN_OPEN


@contextmanager
def watched(directory: Path) -> Iterator[None]:
    """Fail where any file directly in `directory` is opened meanwhile."""
    libc = ctypes.CDLL(None, use_errno=True)
    descriptor = libc.inotify_init1(os.O_NONBLOCK)
    assert descriptor >= 0
    try:
        assert libc.inotify_add_watch(descriptor, os.fsencode(directory), OPENED) >= 0
        yield
        try:
            data = os.read(descriptor, 65536)
        except BlockingIOError:
            return
        names, at = set(), 0
        while at < len(data):
            _, _, _, length = struct.unpack_from("iIII", data, at)
            names.add(data[at + 16 : at + 16 + length].rstrip(b"\0").decode())
            at += 16 + length
        raise AssertionError(f"opened outside of the checkpoint: {sorted(names)}")
    finally:
        os.close(descriptor)


PROGRAMS: list[str] = []


def _hook(event: str, args: tuple[Any, ...]) -> None:
    if event in ("os.system", "subprocess.Popen", "os.exec", "os.posix_spawn", "pickle.find_class"):
        PROGRAMS.append(f"{event}{args!r}"[:200])


sys.addaudithook(_hook)


@dataclass(frozen=True)
class Row:
    """One case of the table.

    Attributes:
        case: its name in the table.
        half: which half it is about.
        spoil: makes it in a copied pair; the second argument is the directory outside.
        words: what the refusal says; () where it loads.
        log: what the log says where it loads.
    """

    case: str
    half: str
    spoil: Callable[[RandomPair, Path], object]
    words: tuple[str, ...] = ()
    log: str = ""


def raw(pair: RandomPair, half: str, change: Callable[[dict[str, Any]], object]) -> None:
    """Edit a sidecar as its YAML, as a stranger would."""
    path = getattr(pair, half) / "nla_meta.yaml"
    mapping = yaml.safe_load(path.read_text(encoding="utf-8"))
    mapping.pop("integrity", None)
    change(mapping)
    path.write_text(yaml.safe_dump(mapping, allow_unicode=True), encoding="utf-8")


def text(pair: RandomPair, half: str, content: str | bytes) -> None:
    path = getattr(pair, half) / "nla_meta.yaml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())


def truncate(pair: RandomPair, half: str) -> None:
    last = shard(getattr(pair, half))[-1]
    last.write_bytes(last.read_bytes()[:-64])


def weights(half: str, change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[RandomPair, Path], object]:
    return lambda pair, _: edit(getattr(pair, half) / WEIGHTS, change)  # type: ignore[arg-type]


def head(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[RandomPair, Path], object]:
    return lambda pair, _: edit(pair.ar / HEAD, change)  # type: ignore[arg-type]


def pickled(pair: RandomPair, outside: Path) -> None:
    class Bomb:
        def __reduce__(self) -> tuple[Any, ...]:
            return (os.system, (f"cat {outside / 'secret'}",))

    torch.save({"w": Bomb()}, pair.av / "pytorch_model.bin")
    (pair.av / WEIGHTS).unlink()


def escape(pair: RandomPair, outside: Path) -> None:
    first = shard(pair.av)[0]
    first.rename(outside / first.name)
    there = os.path.relpath(outside / first.name, pair.av)
    edit_index(pair.av, lambda m: m.update({k: there for k, v in m.items() if v == first.name}))


def link(name: str, half: str = "av") -> Callable[[RandomPair, Path], object]:
    def spoil(pair: RandomPair, outside: Path) -> None:
        path = getattr(pair, half) / name
        path.rename(outside / name)
        path.symlink_to(outside / name)

    return spoil


def cycle(pair: RandomPair, outside: Path) -> None:
    (pair.av / WEIGHTS).unlink()
    (pair.av / WEIGHTS).symlink_to(pair.av / "b")
    (pair.av / "b").symlink_to(pair.av / WEIGHTS)


def big_header(pair: RandomPair, outside: Path) -> None:
    path = pair.av / WEIGHTS
    path.write_bytes((2**40).to_bytes(8, "little") + path.read_bytes()[8:])


def norm(pair: RandomPair, stripped: bool | None) -> None:
    edit(pair.ar / WEIGHTS, lambda s: s.update({"model.norm.weight": torch.linspace(0.5, 2, 64)}))
    if stripped is not None:
        residecar(pair.ar, final_norm_stripped=stripped)


def scale(value: object) -> Callable[[RandomPair, Path], object]:
    def change(mapping: dict[str, Any]) -> None:
        if value is None:
            del mapping["extraction"]["injection_scale"]
        else:
            mapping["extraction"]["injection_scale"] = value

    return lambda pair, _: raw(pair, "av", change)


def without_kind(pair: RandomPair, *, with_scale: bool) -> None:
    def change(mapping: dict[str, Any]) -> None:
        del mapping["injection"]
        if not with_scale:
            del mapping["extraction"]["injection_scale"]

    raw(pair, "av", change)


def set_token(name: str, value: object, half: str = "av") -> Callable[[RandomPair, Path], object]:
    return lambda pair, _: raw(pair, half, lambda m: m["tokens"].update({name: value}))


def template(value: str, half: str = "av") -> Callable[[RandomPair, Path], object]:
    return lambda pair, _: raw(pair, half, lambda m: m["prompt_templates"].update({half: value}))


def key(name: str, value: object, half: str = "av") -> Callable[[RandomPair, Path], object]:
    return lambda pair, _: raw(pair, half, lambda m: m.update({name: value}))


NAN = float("nan")
BILLION = (
    "a: &a [x,x,x,x,x,x,x,x,x]\nb: &b [*a,*a,*a,*a,*a,*a,*a,*a,*a]\nc: &c [*b,*b,*b,*b,*b,*b,*b,*b,*b]\n"
    + "".join(
        f"{n}: &{n} [*{p},*{p},*{p},*{p},*{p},*{p},*{p},*{p},*{p}]\n" for p, n in zip("cdefgh", "defghi", strict=True)
    )
)
DOWN = "model.layers.1.mlp.down_proj.weight"

ROWS = (
    # refuse: damaged weights
    Row("truncated shard", "av", lambda pair, _: truncate(pair, "av"), ("damaged or incomplete",)),
    Row("missing weight", "ar", weights("ar", lambda s: s.pop(DOWN)), ("missing: ", "would be random")),
    Row(
        "NaN in a used weight",
        "av",
        weights("av", lambda s: s[DOWN].view(-1)[:1].fill_(NAN)),
        ("NaN or infinite", DOWN),
    ),
    Row("infinity in the head", "ar", head(lambda s: s["weight"][0].fill_(float("inf"))), ("64 of 4096 values",)),
    Row("head of wrong shape", "ar", head(lambda s: s.update(weight=torch.ones(64, 63))), ("expected (64, 64)",)),
    Row("pickled weights only", "av", pickled, ("pickled weights only", "safetensors")),
    Row("path escape in an index", "av", escape, ("points outside",)),
    Row("weights behind a link", "av", link(WEIGHTS), ("leads outside",)),
    Row("head behind a link", "ar", link(HEAD, "ar"), ("leads outside",)),
    Row("sidecar behind a link", "av", link("nla_meta.yaml"), ("leads outside",)),
    Row("config behind a link", "av", link("config.json"), ("leads outside",)),
    Row("tokenizer behind a link", "av", link("tokenizer.json"), ("leads outside",)),
    Row("cyclic link", "av", cycle, ("runs in a circle",)),
    Row("header larger than the file", "av", big_header, ("damaged or incomplete",)),
    # unexpected weights
    Row("unexpected weight", "av", weights("av", lambda s: s.update(extra=torch.ones(3))), ("unexpected: extra",)),
    Row(
        "lm_head of any shape on an AR",
        "ar",
        weights("ar", lambda s: s.update({"lm_head.weight": torch.ones(7)})),
        log="1 weights on disk are not needed",
    ),
    Row(
        "norm of ones on an AR",
        "ar",
        weights("ar", lambda s: s.update({"model.norm.weight": torch.ones(64)})),
        log="dropped a final norm of ones",
    ),
    # a trained final norm
    Row("norm, nothing said", "ar", lambda pair, _: norm(pair, None), ("final_norm_stripped", "ask its author")),
    Row("norm, stripped", "ar", lambda pair, _: norm(pair, True)),
    Row("norm, kept", "ar", lambda pair, _: norm(pair, False)),
    # tokens and templates
    Row("marker of two tokens", "av", set_token("injection_char", "é"), ("is 2 tokens here",)),
    Row("marker id differs", "av", set_token("injection_token_id", 5), ("injection_token_id: the sidecar says 5",)),
    Row(
        "neighbours differ",
        "av",
        set_token("injection_left_neighbor_id", 5),
        ("injection_left_neighbor_id: the sidecar says 5",),
    ),
    Row("no marker in the template", "av", template("nothing"), ("{injection_char} stands 0 times",)),
    Row("two markers in the template", "av", template("<v>{injection_char}</v> {injection_char}"), ("stands 2 times",)),
    Row("unknown placeholder", "av", template("<v>{injection_char}</v> {x}"), ("unknown placeholder {x}",)),
    Row(
        "suffix ids differ",
        "ar",
        set_token("critic_suffix_ids", [1, 2], "ar"),
        ("critic_suffix_ids: the sidecar says [1, 2]",),
    ),
    # contradictions
    Row(
        "d_model",
        "av",
        lambda pair, _: residecar(pair.av, d_model=65),
        ("the sidecar says 65, config.json says hidden_size 64",),
    ),
    Row(
        "layer count of an AR",
        "ar",
        lambda pair, _: edit_config(pair.ar, num_hidden_layers=2),
        ("num_hidden_layers 2",),
    ),
    Row(
        "K of AV against AR",
        "pair",
        lambda pair, _: residecar(pair.av, site=Site(1)),
        ("layer K: the AV says 1, the AR says 2",),
    ),
    Row("role", "av", key("role", "ar"), ("This is the AR half where the AV is expected",)),
    Row(
        "base family",
        "pair",
        lambda pair, _: residecar(pair.av, base_model="owner/other"),
        ("base model: the AV says other",),
    ),
    # injection
    Row("scale absent", "av", scale(None), ("injection_scale",)),
    Row("scale zero", "av", scale(0), ("injection_scale: got 0",)),
    Row("scale negative", "av", scale(-3.0), ("injection_scale: got -3.0",)),
    Row("scale NaN", "av", scale(NAN), ("injection_scale: got nan",)),
    Row("kind absent, scale present", "av", lambda pair, _: without_kind(pair, with_scale=True)),
    Row("kind and scale absent", "av", lambda pair, _: without_kind(pair, with_scale=False), ("injection", "add")),
    # sidecars
    Row(
        "edited by hand",
        "av",
        lambda pair, _: text(
            pair, "av", (pair.av / "nla_meta.yaml").read_text("utf-8").replace("stands in", "lies in")
        ),
        log="was edited after it was written",
    ),
    Row("unknown keys", "av", key("of_mine", {"a": [1]})),
    Row(
        "a tag that builds objects",
        "av",
        lambda pair, out: text(pair, "av", f"!!python/object/apply:os.system ['cat {out}/secret']"),
        ("nla_meta.yaml",),
    ),
    Row("anchors that explode", "av", lambda pair, _: text(pair, "av", BILLION), ("nla_meta.yaml",)),
    Row("binary file", "av", lambda pair, _: text(pair, "av", bytes(range(256)) * 8), ("nla_meta.yaml",)),
)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.case.replace(" ", "-"))
def test_the_verdict_of_the_table(row: Row, copied: RandomPair, tmp_path_factory: Any, caplog: Any) -> None:
    outside = tmp_path_factory.mktemp("outside")
    (outside / "secret").write_text("secret", encoding="utf-8")
    row.spoil(copied, outside)
    PROGRAMS.clear()
    wanted = ("av", "ar") if row.half == "pair" else (row.half,)
    with watched(outside), caplog.at_level(logging.DEBUG, logger="nla_hub"):
        if row.words:
            with pytest.raises(CheckpointError) as caught:
                NLA.from_pretrained(copied.root, components=wanted)  # type: ignore[arg-type]
        else:
            NLA.from_pretrained(copied.root, components=wanted)  # type: ignore[arg-type]
    assert PROGRAMS == []
    if row.words:
        for word in row.words:
            assert word in str(caught.value), f"{word!r} is not in: {caught.value}"
        error = caught.value
        assert error.next_step or error.expected or error.faults, str(error)
    elif row.log:
        assert caplog.text.count(row.log) == 1, caplog.text


def test_the_watch_itself_sees_what_any_language_opens(copied: RandomPair, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    save_file({"w": torch.ones(2)}, outside / "w.safetensors")
    with pytest.raises(AssertionError, match=r"w\.safetensors"), watched(outside):
        load_file(outside / "w.safetensors")  # opened by Rust
    with watched(outside):
        load_file(copied.ar / HEAD)


def test_all_faults_of_a_contract_come_at_once(copied: RandomPair) -> None:
    raw(
        copied,
        "av",
        lambda m: (
            m["tokens"].update(injection_token_id=5, injection_left_neighbor_id=6, injection_right_neighbor_id=7),
            None,
        ),
    )
    with pytest.raises(CheckpointError) as caught:
        NLA.from_pretrained(copied.root, components=("av",))
    assert len(caught.value.faults) == 3


def test_float32_on_disk_is_loaded_in_another_dtype_and_said(copied: RandomPair, caplog: Any) -> None:
    with caplog.at_level(logging.INFO, logger="nla_hub"):
        nla = NLA.from_pretrained(copied.root, components=("av",), dtype="bfloat16")
    assert nla.av.engine.model.dtype == torch.bfloat16  # type: ignore[attr-defined]
    assert "stored in float32, loaded in bfloat16" in caplog.text


def test_unknown_keys_are_written_back(copied: RandomPair) -> None:
    raw(copied, "av", lambda m: m.update(of_mine={"a": [1]}))
    read = Sidecar.read(copied.av)
    read.write(copied.av)
    assert yaml.safe_load((copied.av / "nla_meta.yaml").read_text("utf-8"))["of_mine"] == {"a": [1]}


def test_a_source_may_hold_more_than_is_used(copied: RandomPair, llama: Case, caplog: Any) -> None:
    with caplog.at_level(logging.DEBUG, logger="nla_hub"):
        NLA.from_pretrained(copied.root, components=("ar",)).capture("the cat")
    assert "weights on disk are not needed here" in caplog.text  # block 3, the final norm and the lm_head
