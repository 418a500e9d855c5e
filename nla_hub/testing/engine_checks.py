"""`check_engine`: whether an engine writes what the model says, and refuses what it must."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from nla_hub import registry
from nla_hub.engines.base import Completion, Engine, LoadedAV, StoredAV
from nla_hub.errors import InjectionError
from nla_hub.export import save_av
from nla_hub.prompts import CLOSING_TAG
from nla_hub.sampling import RowKey, uniforms
from nla_hub.shapes import engine_faults
from nla_hub.sidecar import SIDECAR_NAME, Injection, InjectionKind, Sidecar
from nla_hub.testing.harness import NEAR_TIE, Faults, Rows, reference_logits, reference_rows, require, sample_vectors

STEPS = 6
BATCH_SIZES = (1, 3, 7)
KINDS: tuple[InjectionKind, ...] = ("overwrite", "add")
FLAT = 50.0
"""A temperature at which every token of a random model is about equally likely, so that a draw can ask for any of them."""
HOT = 2.0
"""As hot as engines go that draw by themselves (vLLM)."""


def check_engine(engine_type: type[Engine], av: LoadedAV) -> None:
    """Check an engine on a small AV in float32 on the CPU (`nla_hub.testing.random_av` makes one).

    What is checked, for every injection kind that the engine declares: that its shape is an engine's; that greedy tokens
    equal those of an independent forward pass a token, drawn ones those that the given uniforms stand for, each with its
    log-probability, for batches of 1, 3 and 7 rows; that a row ends at the closing tag (one token or many), at EOS and at the
    bound, says which, and leaves the others alone; that a marker among the new tokens is just a token; that the probe accepts
    this AV and refuses one whose vector does not reach its logits; that kinds it does not declare are refused; that it can be
    closed twice.

    An engine that draws by itself (`exact_draws = False`) cannot be told what to write: its drawn tokens must be repeated in
    other batches, have the log-probabilities that an independent forward pass gives them, and end where a row ends.

    Args:
        engine_type: what a plug-in registers under `nla_hub.engines`. One that reads files is given those of `av`; one whose
            weights are elsewhere cannot be checked here.
        av: a good AV; its weights are not changed.

    Raises:
        NLAError: lists everything that is wrong.
    """
    faults = Faults()
    what = f"The engine {getattr(engine_type, 'name', engine_type)!r} does not do what an engine must."
    next_step = "nla_hub/engines/base.py says what an engine is"
    faults.found += engine_faults(engine_type)
    with faults.part("av"):
        kinds = {value.dtype for value in av.loaded.model.parameters()}
        require(kinds == {torch.float32}, f"its weights are {', '.join(sorted(map(str, kinds)))}, expected float32")
    with faults.part("reads"):
        require(
            getattr(engine_type, "reads", "model") != "contract", "its weights are elsewhere: it cannot run this AV"
        )
    faults.raise_if_any(what, next_step)
    adapter = av.loaded.adapter
    with registry.adapters.lend(adapter.name, adapter):
        for kind in KINDS:
            each = av if av.injector.spec.kind == kind else _as_kind(av, kind)
            if kind in engine_type.kinds:
                _check_kind(faults, engine_type, each)
            else:
                with faults.part(f"kind {kind!r}"):
                    require(_refuses(engine_type, each), "not declared, but an AV of this kind is taken")
    with faults.part("kinds"), _declaring(engine_type, frozenset(KINDS) - {av.injector.spec.kind}):
        require(
            _refuses(engine_type, av), "an AV of a kind that is not declared is taken (see engines.base.require_kind)"
        )
    faults.raise_if_any(what, next_step)


def _check_kind(faults: Faults, engine_type: type[Engine], av: LoadedAV) -> None:
    kind = av.injector.spec.kind
    engine: Any = None
    with faults.part(f"{kind}: construction"):
        engine = engine_type(_given(engine_type, av))
    if engine is None:
        return
    vectors = sample_vectors(av.loaded.d_model)
    with faults.part(f"{kind}: probe"):
        engine.probe()
    draws = uniforms(0, [RowKey(str(i)) for i in range(len(vectors))], STEPS)
    exact = getattr(engine_type, "exact_draws", True)
    for title, given, temperature in (("greedy", None, 1.0), ("drawn", draws, 0.8)):
        if given is not None and not exact:
            continue
        expected = reference_rows(av, vectors, STEPS, given, temperature)
        for batch_size in BATCH_SIZES:
            with faults.part(f"{kind}: {title}, batches of {batch_size}"):
                found = _generate(engine, vectors, given, temperature, STEPS, batch_size)
                require(not (wrong := rows_differ(av, found, expected)), wrong)
    if exact:
        with faults.part(f"{kind}: where a row ends"):
            _endings(engine, av, vectors)
    else:
        with faults.part(f"{kind}: drawn by itself"):
            _own_draws(engine, av, vectors)
    with faults.part(f"{kind}: no rows"):
        require(_generate(engine, vectors[:0], None, 1.0, 2, 4) == [], "completions for no vectors")
    with faults.part(f"{kind}: progress"):
        seen: list[int] = []
        engine.generate(vectors, None, temperature=1.0, max_new_tokens=1, batch_size=3, progress=seen.append)
        require(sum(seen) == len(vectors), f"progress was told of {sum(seen)} rows, expected {len(vectors)}")
    with faults.part(f"{kind}: probe of an AV that does not read its vector"), TemporaryDirectory() as folder:
        require(_refuses_deaf(engine_type, _deaf(av, Path(folder))), "accepted")
    with faults.part(f"{kind}: close"):
        engine.close()
        engine.close()


def rows_differ(av: LoadedAV, found: Sequence[Completion], expected: Rows) -> str:
    """How completions differ from an independent computation, in a sentence; "" where they do not."""
    rows, margins, logprobs = expected
    if len(found) != len(rows):
        return f"{len(found)} completions for {len(rows)} vectors"
    for row, completion in enumerate(found):
        ids, finish = _ended(av, rows[row].tolist())
        if list(completion.ids) != ids:
            pairs = enumerate(zip(completion.ids, ids, strict=False))
            step = next((i for i, (a, b) in pairs if a != b), min(len(completion.ids), len(ids)) - 1)
            if float(margins[row, step]) >= NEAR_TIE:
                return f"row {row} differs from token {step} on: got {list(completion.ids)}, expected {ids}"
            continue  # two choices as good as equal: from here on it is another text
        if wrong := _faulty(completion, finish, av):
            return f"row {row}: {wrong}"
        off = float((completion.logprobs.double().cpu() - logprobs[row, : len(ids)]).abs().max())
        if not off <= NEAR_TIE:
            return f"row {row}: a log-probability is off by {off:.1e}, expected at most {NEAR_TIE:.0e}"
    return ""


def _faulty(completion: Completion, finish: str, av: LoadedAV) -> str:
    """What besides its tokens is wrong with a completion; "" where nothing is."""
    text = av.tokenizer.decode(completion.ids, skip_special_tokens=True)
    if completion.finish != finish:
        return f"finish is {completion.finish!r}, expected {finish!r}"
    if completion.text != text:
        return f"text is {completion.text!r}, expected {text!r}"
    kind, shape = completion.logprobs.dtype, list(completion.logprobs.shape)
    if shape != [len(completion.ids)] or kind != torch.float32:
        return f"logprobs are {kind} {shape}, expected float32 [{len(completion.ids)}]"
    return ""


def _ended(av: LoadedAV, ids: Sequence[int]) -> tuple[list[int], str]:
    """A row that never stopped, cut where it should have: at EOS, at the closing tag, or nowhere."""
    for end in range(1, len(ids) + 1):
        if ids[end - 1] == av.tokenizer.eos_token_id:
            return list(ids[:end]), "eos"
        if CLOSING_TAG in av.tokenizer.decode(ids[:end], skip_special_tokens=True):
            return list(ids[:end]), "tag"
    return list(ids), "length"


def _endings(engine: Engine, av: LoadedAV, vectors: Tensor) -> None:
    """Rows that are made to write what ends them, by draws that stand for the tokens wanted."""
    tokenizer, marker = av.tokenizer, av.injector.marker

    def ids_of(text: str) -> list[int]:
        return [int(i) for i in tokenizer(text, add_special_tokens=False)["input_ids"]]

    one = ids_of(CLOSING_TAG)
    spelled = [i for char in CLOSING_TAG for i in ids_of(char)]
    plain = ids_of("the cat sees a house and the river is old , what next ? " * 3)
    steps = len(spelled) + 2
    scripts = [
        plain,
        [*plain[:2], *one, *plain],  # the tag at once
        [plain[0], tokenizer.eos_token_id, *plain],
        [*plain[:1], *spelled, *plain],  # the tag in many tokens
        [marker.left_id, marker.id, marker.right_id, *plain],  # a marker among the new tokens
        [tokenizer.eos_token_id, *plain],
        plain[5:],
    ]
    wanted = torch.tensor([script[:steps] for script in scripts])
    cdf = (reference_logits(av, vectors, wanted[:, :-1]).double() / FLAT).softmax(-1).cumsum(-1)
    above = cdf.gather(-1, wanted[..., None])[..., 0]
    below = torch.where(wanted > 0, cdf.gather(-1, (wanted - 1).clamp(min=0)[..., None])[..., 0], torch.zeros(()))
    draws = (above + below) / 2
    for batch_size in (3, len(vectors)):
        found = _generate(engine, vectors, draws, FLAT, steps, batch_size)
        for row, completion in enumerate(found):
            ids, finish = _ended(av, wanted[row].tolist())
            sentence = (
                f"row {row} of {len(found)} in batches of {batch_size}: got {list(completion.ids)}, expected {ids}"
            )
            require(list(completion.ids) == ids, f"{sentence} ({finish})")
            wrong = _faulty(completion, finish, av)
            require(not wrong, f"row {row} in batches of {batch_size}: {wrong}")


def _own_draws(engine: Engine, av: LoadedAV, vectors: Tensor) -> None:
    """What an engine that draws by itself must hold to, in short rows and in rows of which some will meet their end."""
    for temperature, n, steps in ((0.8, 1, STEPS), (HOT, 16, 40)):
        rows = vectors.repeat(n, 1)
        draws = uniforms(0, [RowKey(str(i)) for i in range(len(rows))], steps)
        found = _generate(engine, rows, draws, temperature, steps, len(rows))
        require(len(found) == len(rows), f"{len(found)} completions for {len(rows)} vectors")
        require(len({completion.ids for completion in found}) > 1, "every row is the same, whatever was drawn")
        padded = [[*completion.ids, *[0] * (steps - len(completion.ids))] for completion in found]
        logprobs = (reference_logits(av, rows, torch.tensor(padded)) / temperature).log_softmax(-1)
        for row, completion in enumerate(found):
            ids, finish = _ended(av, completion.ids)
            finish = finish if finish != "length" or len(ids) == steps else "tag or eos"
            require(list(completion.ids) == ids, f"row {row} goes on after its end: {list(completion.ids)}")
            require(not (wrong := _faulty(completion, finish, av)), f"row {row}: {wrong}")
            at = torch.arange(len(ids))
            off = float((completion.logprobs.cpu() - logprobs[row, at, torch.tensor(ids)]).abs().max())
            require(off <= NEAR_TIE, f"row {row}: a log-probability is off by {off:.1e}")
        turned = list(range(len(rows)))[::-1]
        again = _generate(engine, rows[turned], draws[turned], temperature, steps, 3)
        require(
            [again[len(rows) - 1 - i].ids for i in range(len(rows))] == [completion.ids for completion in found],
            "the same draws give other tokens in another order",
        )


def _given(engine_type: type[Engine], av: LoadedAV) -> LoadedAV | StoredAV:
    """What an engine's constructor is given: the AV, or its files."""
    if getattr(engine_type, "reads", "model") == "model":
        return av
    return StoredAV(av.directory, av.config, av.tokenizer, av.prompt, av.injector, torch.float32)


def _generate(
    engine: Engine, vectors: Tensor, draws: Tensor | None, temperature: float, steps: int, batch_size: int
) -> list[Completion]:
    return engine.generate(vectors, draws, temperature=temperature, max_new_tokens=steps, batch_size=batch_size)


def _as_kind(av: LoadedAV, kind: InjectionKind) -> LoadedAV:
    """The same AV, said to have been trained with another kind of injection."""
    spec = Injection(kind, 8.0 if kind == "overwrite" else None)
    return replace(av, injector=replace(av.injector, spec=spec))


def _deaf(av: LoadedAV, folder: Path) -> LoadedAV:
    """The same AV with blocks that do nothing, so that no token learns of another: the vector reaches no logit.

    A residual block whose weights are all zero is the identity. The weights are written too, for engines that read them.
    """
    model = copy.deepcopy(av.loaded.model)
    with torch.no_grad():
        for value in av.loaded.adapter.block_list(model).parameters():
            value.zero_()
    if (av.loaded.directory / SIDECAR_NAME).is_file():
        sidecar = Sidecar.read(av.loaded.directory).with_(injection=av.injector.spec)
        save_av(folder, model, av.tokenizer, sidecar, dtype=torch.float32)
    return replace(av, loaded=replace(av.loaded, model=model, directory=folder))


def _refuses_deaf(engine_type: type[Engine], av: LoadedAV) -> bool:
    engine = engine_type(_given(engine_type, av))
    try:
        engine.probe()
    except InjectionError:
        return True
    finally:
        engine.close()
    return False


def _refuses(engine_type: type[Engine], av: LoadedAV) -> bool:
    try:
        engine_type(_given(engine_type, av)).close()
    except InjectionError:
        return True
    return False


@contextmanager
def _declaring(engine_type: Any, kinds: frozenset[str]) -> Iterator[None]:
    """While open, an engine declares other kinds than it has."""
    before = engine_type.kinds
    engine_type.kinds = kinds
    try:
        yield
    finally:
        engine_type.kinds = before
