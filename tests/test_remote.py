"""The remote engine against a server on this machine: the same text as without one, and what it makes of a bad server."""

from __future__ import annotations

import json
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from av_server import AVServer, Fault, decoded, error, within
from conftest import Case, Spec
from parity import close, same_rows, stops_rightly
from wild import shard

from nla_hub import NLA, hub
from nla_hub.embedding import embedded, embedding_file, embedding_table
from nla_hub.engines.base import Completion, StoredAV
from nla_hub.engines.remote import transport
from nla_hub.engines.remote.engine import RemoteEngine
from nla_hub.engines.remote.pace import Batch, Gate
from nla_hub.engines.remote.transport import ServerError
from nla_hub.errors import (
    ContextLengthError,
    InjectionError,
    InputError,
    Interrupted,
    UnknownNameError,
    VectorError,
    WeightsError,
)
from nla_hub.hub import Listing
from nla_hub.loading import open_pair, stored_av
from nla_hub.locate import resolve_pair
from nla_hub.pretrained import LoadOptions
from nla_hub.sampling import RowKey, request_seed, uniforms
from nla_hub.testing import D_MODEL, random_pair

STEPS = 6
GREEDY: dict[str, Any] = {"temperature": 1.0, "max_new_tokens": STEPS}


@contextmanager
def serving(model: Any, tokenizer: Any, **settings: Any) -> Iterator[AVServer]:
    server = AVServer(model, tokenizer, **settings)
    try:
        yield server
    finally:
        server.close()


@pytest.fixture
def server(llama: Case) -> Iterator[AVServer]:
    """The plain AV, served."""
    with serving(llama.av.model, llama.av.tokenizer) as server:
        yield server


@pytest.fixture
def waited(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Seconds that retries would have waited; they do not."""
    seconds: list[float] = []
    monkeypatch.setattr(Batch, "sleep", lambda self, delay: seconds.append(delay))
    return seconds


def contract(root: Path) -> StoredAV:
    half = open_pair(resolve_pair(root), components=("av",), weights=False).av
    assert half is not None
    return stored_av(half, LoadOptions(), weights=False)


Connect = Callable[..., RemoteEngine]


@pytest.fixture
def engine() -> Iterator[Connect]:
    """Makes engines on servers, and closes them."""
    made: list[RemoteEngine] = []

    def connect(av: Case | StoredAV, server: AVServer, **options: Any) -> RemoteEngine:
        stored = contract(av.pair.root) if isinstance(av, Case) else av
        made.append(RemoteEngine(stored, url=server.url, **options))
        return made[-1]

    yield connect
    for one in made:
        one.close()


def rows(n: int, seed: int = 11) -> torch.Tensor:
    return torch.randn(n, D_MODEL, generator=torch.Generator().manual_seed(seed))


def draws(n: int) -> torch.Tensor:
    return uniforms(0, [RowKey(str(i)) for i in range(n)], STEPS)


def threads() -> list[str]:
    return [t.name for t in threading.enumerate() if t.name.startswith("nla-hub-remote")]


# -- what it writes ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spec", [Spec("qwen2"), Spec("llama", bos=False), Spec("gemma3")], ids=str)
def test_greedy_text_is_that_of_the_transformers_engine(
    spec: Spec, make_case: Callable[[Spec], Case], vectors: torch.Tensor, engine: Connect
) -> None:
    case = make_case(spec)
    near = case.nla.av.engine.generate(vectors, None, batch_size=7, **GREEDY)
    _, margins = case.av.decode(vectors, STEPS)
    with serving(case.av.model, case.av.tokenizer) as server:
        far = engine(case, server)
        far.probe()
        found = far.generate(vectors, None, batch_size=3, **GREEDY)
    same_rows([c.ids for c in found], [c.ids for c in near], margins)
    for mine, theirs in zip(found, near, strict=True):
        stops_rightly(mine, case.av, STEPS)
        if mine.ids == theirs.ids:
            assert (mine.text, mine.finish) == (theirs.text, theirs.finish)
            assert mine.logprobs.dtype == torch.float32
            assert torch.allclose(mine.logprobs, theirs.logprobs, atol=1e-4, rtol=0)


def test_a_pair_by_name_with_its_weights_elsewhere(llama: Case, server: AVServer) -> None:
    vectors = rows(3)
    near = [e.raw for e in llama.nla.verbalize(vectors, temperature=0, max_new_tokens=8)]
    with NLA.from_pretrained(
        llama.pair.root, components=("av",), engine="remote", engine_options={"url": f"{server.url}/v1/"}
    ) as far:
        assert [e.raw for e in far.verbalize(vectors, temperature=0, max_new_tokens=8)] == near


def test_what_is_sent_is_the_embedded_prompt_with_the_vector_in_the_markers_place(
    make_case: Callable[[Spec], Case], vectors: torch.Tensor, engine: Connect
) -> None:
    gemma = make_case(Spec("gemma3"))  # whose embedding scales
    with serving(gemma.av.model, gemma.av.tokenizer) as server:
        engine(gemma, server).generate(vectors, None, batch_size=7, temperature=1.0, max_new_tokens=1)
        (asked,) = server.asked
    unit = vectors.double() / vectors.double().norm(dim=-1, keepdim=True)
    with torch.no_grad():
        plain = gemma.av.model.get_input_embeddings()(torch.tensor(gemma.av.ids))
    for text, direction in zip(asked["prompt_embeds"], unit, strict=True):
        sent = decoded(text)
        close(sent[gemma.av.at], (direction * gemma.av.meta["extraction"]["injection_scale"]).float())
        sent[gemma.av.at] = plain[gemma.av.at]
        assert torch.equal(sent, plain)


def test_drawn_text_follows_from_the_rows_own_stream(llama: Case, server: AVServer, engine: Connect) -> None:
    far = engine(llama, server)
    vectors, streams = rows(6), draws(6)
    run: dict[str, Any] = {"temperature": 0.8, "max_new_tokens": STEPS}
    straight = far.generate(vectors, streams, batch_size=6, **run)
    seeds = {body["seed"] for body in server.asked if body["max_tokens"] == STEPS}
    order = [3, 0, 5, 1, 4, 2]
    shuffled = far.generate(vectors[order], streams[order], batch_size=2, **run)
    assert seeds == {request_seed(row) for row in streams}
    assert [c.ids for c in shuffled] == [straight[i].ids for i in order]
    assert far.generate(vectors[:1], draws(2)[1:], batch_size=1, **run)[0].ids != straight[0].ids
    teacher = llama.av.logits(vectors, torch.tensor([[*c.ids, *[0] * (STEPS - len(c.ids))] for c in straight]))
    logprobs = (teacher / 0.8).log_softmax(-1)
    for row, completion in enumerate(straight):
        expected = torch.stack([logprobs[row, i, token] for i, token in enumerate(completion.ids)])
        assert torch.allclose(completion.logprobs, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("spelled", [False, True], ids=["one token", "many tokens"])
def test_the_closing_tag_ends_a_row_and_what_came_after_it_is_cut(
    llama: Case, server: AVServer, spelled: bool, engine: Connect
) -> None:
    text = "<explanation>the cat</explanation>"

    def encode(part: str) -> list[int]:
        ids: list[int] = llama.av.tokenizer(part, add_special_tokens=False)["input_ids"]
        return ids

    ids = [i for char in text for i in encode(char)] if spelled else encode(text)
    server.script = [*ids, *encode(" and more" * 9)]

    def overrun(answer: Any) -> Any:
        """As a server that draws several tokens at a time."""
        for choice in answer["choices"]:
            choice["token_ids"] = [*choice["token_ids"], 5, 6]
            choice["logprobs"]["token_logprobs"] += [-1.0, -1.0]
        return answer

    for twist in (server.twist, overrun):
        server.twist = twist
        (found,) = engine(llama, server).generate(rows(1), None, temperature=1.0, max_new_tokens=60, batch_size=1)
        assert (found.ids, found.text, found.finish) == (tuple(ids), text, "tag")
        assert found.logprobs.shape == (len(ids),)


def test_a_row_ends_at_eos_and_a_marker_among_its_tokens_is_just_a_token(
    llama: Case, server: AVServer, engine: Connect
) -> None:
    marker = llama.nla.av.engine.av.injector.marker
    server.script = [marker.left_id, marker.id, marker.right_id, llama.av.tokenizer.eos_token_id, 9]
    (found,) = engine(llama, server).generate(rows(1), None, temperature=1.0, max_new_tokens=9, batch_size=1)
    assert (list(found.ids), found.finish) == (server.script[:4], "eos")


def test_rows_come_back_in_order_and_progress_is_told(llama: Case, server: AVServer, engine: Connect) -> None:
    vectors, told = rows(20), []
    server.faults.append(Fault(sleep=0.3, status=503))  # the first request is answered last
    expected = llama.nla.av.engine.generate(vectors, None, temperature=1.0, max_new_tokens=3, batch_size=20)
    found = engine(llama, server).generate(
        vectors, None, temperature=1.0, max_new_tokens=3, batch_size=2, progress=told.append
    )
    assert [c.ids for c in found] == [c.ids for c in expected]
    assert told == [2] * 10
    assert engine(llama, server).generate(vectors[:0], None, temperature=1.0, max_new_tokens=3, batch_size=2) == []


def test_log_probabilities_of_another_distribution_are_refused_where_they_would_be_wrong(
    llama: Case, server: AVServer, engine: Connect
) -> None:
    server.scaled = False
    far = engine(llama, server)
    assert len(far.generate(rows(1), draws(1), temperature=1.0, max_new_tokens=2, batch_size=1)) == 1
    with pytest.raises(ServerError, match="processed_logprobs"):
        far.generate(rows(1), draws(1), temperature=0.7, max_new_tokens=2, batch_size=1)
    with pytest.raises(InputError, match="temperatures as low"):
        far.generate(rows(1), draws(1), temperature=0.001, max_new_tokens=2, batch_size=1)


# -- the embedding table -------------------------------------------------------------------------------------


def test_the_rows_are_what_the_models_own_embedding_makes_of_them(architecture: Case) -> None:
    directory, adapter = architecture.pair.av, architecture.nla.av.engine.av.injector.adapter
    ids = [5, 300, 5, 0, architecture.av.marker_id]
    table = embedding_table(directory, embedding_file(directory, ["model.safetensors"], adapter), adapter)
    state = torch.random.get_rng_state()
    for dtype in (torch.float32, torch.bfloat16):
        module = type(architecture.av.model).from_pretrained(directory, dtype=dtype).get_input_embeddings()
        config = architecture.av.model.config
        assert torch.equal(embedded(ids, table, config, adapter, dtype), module(torch.tensor(ids)))
    assert torch.equal(torch.random.get_rng_state(), state)


def test_only_the_file_with_the_embedding_table_is_downloaded(
    llama: Case, server: AVServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    there, here = tmp_path / "there", tmp_path / "here"
    shutil.copytree(llama.pair.av, there)
    shard(there / "model.safetensors")
    files = {path.name: path.stat().st_size for path in there.iterdir()}
    fetched: list[str] = []

    def fetch(repo: str, names: Sequence[str], **_: Any) -> Path:
        here.mkdir(exist_ok=True)
        for name in names:
            fetched.append(name)
            shutil.copy(there / name, here / name)
        return here

    monkeypatch.setattr(hub, "listing", lambda repo, **_: Listing(repo, "0" * 40, files))
    monkeypatch.setattr(hub, "fetch_files", fetch)
    with NLA.from_pretrained(
        "owner/name-av", components=("av",), engine="remote", engine_options={"url": server.url}
    ) as far:
        expected = llama.nla.verbalize(rows(2), temperature=0, max_new_tokens=4)
        assert [e.raw for e in far.verbalize(rows(2), temperature=0, max_new_tokens=4)] == [e.raw for e in expected]
    index = json.loads((there / "model.safetensors.index.json").read_text(encoding="utf-8"))["weight_map"]
    assert [name for name in fetched if name.endswith(".safetensors")] == [index["model.embed_tokens.weight"]]
    assert len({name for name in files if name.endswith(".safetensors")}) == 2


def test_a_table_that_does_not_fit_is_refused(llama: Case, tmp_path: Path, engine: Connect) -> None:
    from safetensors.torch import save_file

    for name, value, said in (
        ("model.embed_tokens.weight", torch.zeros(9, D_MODEL), "does not fit"),
        ("model.embed_tokens.weight", torch.full((400, D_MODEL), torch.nan), "NaN"),
        ("model.embed_tokens.weight", torch.zeros(400, D_MODEL, dtype=torch.int8), "not stored as plain numbers"),
        ("model.other.weight", torch.zeros(400, D_MODEL), "not clear which weight"),
    ):
        save_file({name: value}, tmp_path / "model.safetensors")
        av = replace(contract(llama.pair.root), directory=tmp_path, embedding=None)
        with serving(llama.av.model, llama.av.tokenizer) as server, pytest.raises(WeightsError, match=said):
            engine(av, server).probe()


# -- a server that must not be used --------------------------------------------------------------------------


def test_the_probe_refuses_a_server_that_does_not_read_the_vector(
    llama: Case, server: AVServer, engine: Connect
) -> None:
    def deaf(embeds: torch.Tensor) -> torch.Tensor:
        return torch.cat([embeds[: llama.av.at], torch.ones(1, D_MODEL), embeds[llama.av.at + 1 :]])

    server.embeds = deaf
    with pytest.raises(InjectionError, match="does not reach"):
        engine(llama, server).probe()


def test_the_probe_refuses_another_model(llama: Case, tmp_path: Path, engine: Connect) -> None:
    other = random_pair(tmp_path, "llama", seed=9)
    stranger = type(llama.av.model).from_pretrained(other.av, dtype=torch.float32)
    with serving(stranger, llama.av.tokenizer) as server, pytest.raises(InjectionError, match="not those of the model"):
        engine(llama, server).probe()


def test_the_probe_refuses_rows_that_are_scaled_twice(make_case: Callable[[Spec], Case], engine: Connect) -> None:
    gemma = make_case(Spec("gemma3"))
    with serving(gemma.av.model, gemma.av.tokenizer) as server:
        server.embeds = lambda embeds: embeds * D_MODEL**0.5
        with pytest.raises(InjectionError, match="not those of the model"):
            engine(gemma, server).probe()


def test_the_probe_refuses_a_cache_that_takes_one_vector_for_another(
    llama: Case, server: AVServer, engine: Connect
) -> None:
    kept: list[torch.Tensor] = []

    def cached(embeds: torch.Tensor) -> torch.Tensor:
        kept.append(embeds)
        return embeds if len(kept) <= 4 else kept[len(kept) - 5]  # by its place, whatever the vector

    server.embeds = cached
    with pytest.raises(InjectionError, match="no-enable-prefix-caching"):
        engine(llama, server).probe()


def test_the_probe_takes_noise_as_large_as_bfloat16s(llama: Case, server: AVServer, engine: Connect) -> None:
    server.embeds = lambda embeds: embeds * (1 + 0.01 * torch.randn(1).item())
    engine(llama, server).probe()


def test_prompt_and_answer_must_fit_into_what_the_server_reads(llama: Case, engine: Connect) -> None:
    n = len(llama.av.ids)
    with serving(llama.av.model, llama.av.tokenizer, max_model_len=n + 4) as server:
        far = engine(llama, server)
        assert len(far.generate(rows(1), None, temperature=1.0, max_new_tokens=4, batch_size=1)[0].ids) <= 4
        with pytest.raises(ContextLengthError, match=rf"max_new_tokens=5 after a prompt of {n}.*at most 4"):
            far.generate(rows(1), None, temperature=1.0, max_new_tokens=5, batch_size=1)
    with serving(llama.av.model, llama.av.tokenizer, max_model_len=n) as server, pytest.raises(ContextLengthError):
        engine(llama, server).probe()


def test_of_several_models_one_must_be_named(llama: Case, server: AVServer, engine: Connect) -> None:
    server.models = [{"id": "one"}, {"id": "two"}]
    with pytest.raises(ServerError, match=r"2 models.*one, two"):
        engine(llama, server).probe()
    engine(llama, server, model="two").probe()
    assert {body["model"] for body in server.asked} == {"two"}
    with pytest.raises(ServerError, match="no model called 'three'"):
        engine(llama, server, model="three").probe()


# -- trouble on the way --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "fault",
    [
        Fault(status=429, headers={"Retry-After": "7"}),
        Fault(status=503),
        Fault(status=502, body=b"<html>"),
        Fault(status=504),
        Fault(cut=True),
        Fault(reset=True),
        Fault(sleep=1.0),
    ],
    ids=["429", "503", "502", "504", "cut", "reset", "slow"],
)
def test_what_passes_is_asked_again(
    llama: Case, server: AVServer, waited: list[float], fault: Fault, engine: Connect
) -> None:
    expected = llama.nla.av.engine.generate(rows(3), None, batch_size=3, **GREEDY)
    far = engine(llama, server, timeout=0.5 if fault.sleep else 60.0)
    assert far.served.name == "served"
    server.faults.extend([fault, fault])
    found = far.generate(rows(3), None, batch_size=3, **GREEDY)
    assert [c.ids for c in found] == [c.ids for c in expected]
    assert len(server.asked) == 3
    assert len(waited) == 2
    if fault.status == 429:
        assert waited == [7.0, 7.0]
    else:
        assert 0.25 <= waited[0] <= 0.5
        assert 0.5 <= waited[1] <= 1.0


def test_a_server_that_stays_busy_is_given_up(
    llama: Case, server: AVServer, waited: list[float], engine: Connect
) -> None:
    far = engine(llama, server, retries=2)
    server.faults.extend([Fault(status=429)] * 9)
    with pytest.raises(ServerError, match=r"too much to do.*HTTP 429"):
        far.generate(rows(1), None, batch_size=1, **GREEDY)
    assert (len(server.asked), len(waited)) == (3, 2)
    server.faults[0] = Fault(status=503, headers={"Retry-After": "86400"})
    with pytest.raises(ServerError, match="in 86400 s, as it says") as caught:
        far.generate(rows(1), None, batch_size=1, **GREEDY)
    assert len(server.asked) == 4
    assert caught.value.status == 503


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        (Fault(400, body=error("You must set `--enable-prompt-embeds` to input")), r"serve-command NLA"),
        (Fault(400, body=error("Out of range float values are not JSON compliant")), "restart it"),
        (Fault(401, body=error("no")), "wants an API key"),
        (Fault(403, body=b"forbidden"), "HTTP 403: forbidden"),
        (Fault(404, body=error("The model `x` does not exist.")), "`x` does not exist"),
        (Fault(500, body=b""), "HTTP 500"),
        (Fault(302, headers={"Location": "http://elsewhere"}), "HTTP 302"),
        (Fault(200, body=b"<html>welcome</html>"), "not JSON"),
        (Fault(200, body=b"[1]"), "choices"),
    ],
    ids=lambda value: str(value.status) if isinstance(value, Fault) else "",
)
def test_what_does_not_pass_is_an_error_at_once(
    llama: Case, server: AVServer, waited: list[float], fault: Fault, said: str, engine: Connect
) -> None:
    far = engine(llama, server)
    server.faults.append(fault)
    with pytest.raises(ServerError, match=said) as caught:
        far.generate(rows(2), None, batch_size=2, **GREEDY)
    assert server.url in str(caught.value)
    assert (len(server.asked), waited, threads()) == (1, [], [])


def change(**parts: Any) -> Callable[[Any], Any]:
    def twist(answer: Any) -> Any:
        answer["choices"][0] |= parts
        return answer

    return twist


@pytest.mark.parametrize(
    ("twist", "said"),
    [
        (lambda answer: {"choices": answer["choices"][:1]}, "1 of them, expected one for each of 2"),
        (lambda answer: {"choices": [answer["choices"][0]] * 2}, "2 of them, expected one for each of 2"),
        (change(token_ids=[10**6] * STEPS), "token_ids"),
        (change(token_ids=[True] * STEPS), "token_ids"),
        (change(token_ids=None), "token_ids"),
        (change(token_ids=[]), "token_ids"),
        (change(token_ids=[9] * 3), "token_logprobs"),
        (change(logprobs=None), "logprobs"),
        (change(logprobs={"token_logprobs": [float("nan")] * STEPS}, token_ids=[9] * STEPS), "token_logprobs"),
        (change(logprobs={"token_logprobs": [None] * STEPS}, token_ids=[9] * STEPS), "token_logprobs"),
        (change(logprobs={"token_logprobs": [3.5] * STEPS}, token_ids=[9] * STEPS), "token_logprobs"),
        (change(logprobs={"token_logprobs": [-1.0]}, token_ids=[9], finish_reason="abort"), "finish_reason"),
        (change(logprobs={"token_logprobs": [-1.0]}, token_ids=[9], finish_reason="length"), "finish_reason"),
    ],
)
def test_an_answer_that_is_not_what_was_asked_for(
    llama: Case, server: AVServer, twist: Any, said: str, engine: Connect
) -> None:
    far = engine(llama, server)
    server.twist = twist
    with pytest.raises(ServerError, match=f"cannot be used: .*{said}"):
        far.generate(rows(2), None, batch_size=2, **GREEDY)


def test_a_server_that_is_not_there(llama: Case, server: AVServer, waited: list[float], engine: Connect) -> None:
    far = engine(llama, server)
    server.close()
    with pytest.raises(ServerError, match=r"(?s)does not answer.*serve-command"):
        far.probe()
    assert waited == []  # nobody was ever there, so nobody is waited for


def test_the_key_is_sent_and_never_shown(llama: Case, server: AVServer, engine: Connect) -> None:
    secret = "s3cret-" + "k" * 20
    server.key = secret
    engine(llama, server, api_key=f" {secret}\n").probe()
    assert {headers["Authorization"] for headers in server.headers} == {f"Bearer {secret}"}
    server.key = "another"  # and the server repeats the one it got
    far = engine(llama, server, api_key=secret)
    with pytest.raises(ServerError, match=r"another API key.*\*\*\*") as caught:
        far.probe()
    assert secret not in f"{caught.value}{vars(caught.value)}{far!r}"
    with pytest.raises(InputError) as refused:
        engine(llama, server, api_key=f"{secret}\r\nX: y")
    assert secret not in str(refused.value)
    with pytest.raises(InputError) as refused:
        RemoteEngine(contract(llama.pair.root), url=f"http://me:{secret}@host")
    assert secret not in str(refused.value)


# -- how many at a time, and what is left --------------------------------------------------------------------


def test_no_more_requests_than_wanted_are_in_flight_and_connections_are_kept(
    llama: Case, server: AVServer, engine: Connect
) -> None:
    far = engine(llama, server, concurrency=3)
    server.faults.extend([Fault(sleep=0.05, cut=False)] * 12)
    far.generate(rows(12), None, batch_size=1, temperature=1.0, max_new_tokens=1)
    assert 1 < server.most_running <= 3
    assert len(server.connections) <= 3
    assert (threads(), len(server.asked)) == ([], 12)
    far.close()
    far.close()


def test_a_connection_that_the_server_closed_meanwhile_costs_nothing(
    llama: Case, server: AVServer, waited: list[float], engine: Connect
) -> None:
    server.hang_up = True
    far = engine(llama, server, concurrency=1, retries=0)
    found = far.generate(rows(4), None, batch_size=1, temperature=1.0, max_new_tokens=1)
    assert (len(found), waited) == (4, [])


def test_an_idle_connection_is_not_used_once_the_server_will_have_closed_it(
    llama: Case, server: AVServer, monkeypatch: pytest.MonkeyPatch, engine: Connect
) -> None:
    far = engine(llama, server)
    assert far.served
    monkeypatch.setattr(transport, "KEPT", -1.0)
    far.generate(rows(1), None, batch_size=1, temperature=1.0, max_new_tokens=1)
    assert len(server.connections) == 2


def test_a_busy_server_gets_half_as_many_and_slowly_more_again() -> None:
    gate = Gate(8)
    for expected in (4, 2, 1, 1):
        gate.lower()
        assert int(gate.limit) == expected
    raised = 0
    while gate.limit < 8:
        gate.raise_slowly()
        raised += 1
    assert 20 < raised < 40  # about 1 + 2 + ... + 7
    inside: list[int] = []
    batch, gate.limit = Batch(), 2.5

    def enter() -> None:
        with gate.passed(batch):
            inside.append(1)
            time.sleep(0.1)
            inside.append(-1)

    workers = [threading.Thread(target=enter) for _ in range(6)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert max(sum(inside[:i]) for i in range(len(inside))) == 2


def test_a_busy_servers_answer_lowers_the_gate(
    llama: Case, server: AVServer, waited: list[float], engine: Connect
) -> None:
    far = engine(llama, server, concurrency=8)
    server.faults.extend([Fault(status=429)] * 2)
    far.generate(rows(1), None, batch_size=1, temperature=1.0, max_new_tokens=1)
    assert 2 <= far._client.gate.limit < 3
    assert len(waited) == 2


def test_after_an_error_nothing_goes_on(llama: Case, server: AVServer, engine: Connect) -> None:
    far = engine(llama, server, concurrency=4)
    assert far.served
    server.faults.extend([Fault(sleep=30), Fault(sleep=30), Fault(sleep=30), Fault(status=400)])
    began = time.monotonic()
    with pytest.raises(ServerError, match="HTTP 400"):
        far.generate(rows(40), None, batch_size=1, temperature=1.0, max_new_tokens=1)
    assert time.monotonic() - began < 10
    assert threads() == []
    assert len(server.asked) <= 8
    server.released.set()
    assert len(far.generate(rows(2), None, batch_size=1, temperature=1.0, max_new_tokens=1)) == 2  # it goes on working


def test_an_interrupt_ends_every_request_and_keeps_what_is_done(llama: Case, server: AVServer, engine: Connect) -> None:
    far = engine(llama, server, concurrency=3)
    assert far.served
    server.faults.extend([Fault(), Fault(sleep=30), Fault(sleep=30)])

    def interrupt(_: int) -> None:
        assert within(5, lambda: len(server.asked) >= 3)
        raise KeyboardInterrupt

    expected = llama.nla.av.engine.generate(rows(9), None, temperature=1.0, max_new_tokens=2, batch_size=9)
    began = time.monotonic()
    with pytest.raises(Interrupted) as caught:
        far.generate(rows(9), None, batch_size=1, temperature=1.0, max_new_tokens=2, progress=interrupt)
    assert time.monotonic() - began < 10
    assert threads() == []
    done: dict[int, Completion] = caught.value.done
    assert len(done) == 1
    assert all(done[i].ids == expected[i].ids for i in done)


# -- options -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {"url": "localhost:8000"},
        {"url": "ftp://host"},
        {"url": "http://host:port"},
        {"url": "http://host/?q=1"},
        {"url": 8000},
        {"concurrency": 0},
        {"concurrency": 2.5},
        {"retries": -1},
        {"timeout": 0},
        {"timeout": float("inf")},
        {"dtype": "int8"},
        {"model": 3},
        {"api_key": ""},
        {"api_key": ["k"]},
    ],
    ids=str,
)
def test_options_out_of_range(llama: Case, options: dict[str, Any]) -> None:
    with pytest.raises(InputError):
        RemoteEngine(contract(llama.pair.root), **options)


def test_addresses() -> None:
    for url, said in {
        "http://host": "http://host:80",
        "https://host/v1/": "https://host:443",
        "https://host/proxy/v1": "https://host:443/proxy",
        "http://[::1]:8000": "http://[::1]:8000",
    }.items():
        assert str(transport.Address.parse(url)) == said


def test_unknown_options_and_other_kinds_are_refused_before_anything_is_asked(
    make_case: Callable[[Spec], Case],
) -> None:
    with pytest.raises(UnknownNameError, match="did you mean 'url'"):
        NLA.from_pretrained(make_case(Spec("llama")).pair.root, engine="remote", engine_options={"uri": "x"})
    with pytest.raises(InjectionError, match=r"injection.kind 'add'"):
        NLA.from_pretrained(make_case(Spec("llama", kind="add")).pair.root, components=("av",), engine="remote")


def test_a_vector_that_is_infinite_in_the_servers_dtype_is_refused(
    llama: Case, server: AVServer, engine: Connect
) -> None:
    av = contract(llama.pair.root)
    loud = replace(av, injector=replace(av.injector, spec=replace(av.injector.spec, scale=1e7)))
    with pytest.raises(VectorError, match=r"infinite.*float16"):
        engine(loud, server, dtype="float16").probe()
    assert server.asked == []
    engine(av, server, dtype="bfloat16").probe()
    assert {decoded(text).dtype for body in server.asked for text in body.get("prompt_embeds", [])} == {torch.bfloat16}
