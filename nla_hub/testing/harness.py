"""What the checks of plug-ins stand on: a model factory, pairs made with one, and computations that share no code with
what they are compared with: no hooks of ours, no cache, rescaling in float64.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from nla_hub import registry
from nla_hub.adapters import Adapter, adapter_for
from nla_hub.engines.base import LoadedAV
from nla_hub.errors import NLAError
from nla_hub.export import save_ar, save_av, save_source
from nla_hub.injection import Injector
from nla_hub.pretrained import LoadOptions, load_causal_lm, load_tokenizer
from nla_hub.prompts import AVPrompt
from nla_hub.sidecar import Sidecar, Site
from nla_hub.testing.random_models import LAYER, LAYERS, RandomPair, random_tokenizer, sidecars

ON_CPU = LoadOptions(dtype=torch.float32, device_map={"": "cpu"})
NEAR_TIE = 1e-4
"""Two choices nearer than this, in log-probability or on the CDF, may fall either way."""
CLOSE = 1e-5
"""max|a-b| / max|b| of tensors that are called equal in float32."""


class ModelFactory(Protocol):
    """Makes a random model of a family: `functools.partial(random_model, "llama")` is one."""

    def __call__(self, vocab_size: int, *, seed: int, layers: int) -> Any:
        """A causal LM of transformers in float32 and eval mode, with `layers` blocks and random weights.

        The weights must be large enough that the model's output depends on what it reads (initializer_range 0.15 at
        width 64); where its embeddings are tied, they must be small beside what the blocks add.
        """
        ...


def random_pair_of(
    root: Path, factory: ModelFactory, *, bos: bool = True, kind: str = "overwrite", seed: int = 0
) -> RandomPair:
    """Write `root`/source, `root`/av and `root`/ar with models of `factory`, in the layout of the released pairs.

    Their adapter must be registered.
    """
    tokenizer = random_tokenizer(bos=bos)
    vocab = len(tokenizer)
    with torch.random.fork_rng(devices=[]):
        source = factory(vocab, seed=seed, layers=LAYERS)
        verbalizer = factory(vocab, seed=seed + 1, layers=LAYERS)
        short = factory(vocab, seed=seed + 2, layers=Site(LAYER).n_blocks)
        torch.manual_seed(seed + 3)
        d_model = width(source)
        head = nn.Linear(d_model, d_model, bias=False)
    av, ar = sidecars_for(source, tokenizer, kind=kind)
    adapter = adapter_for(source.config)
    trunk = adapter.trunk(short)
    adapter.drop_final_norm(trunk)
    save_source(root / "source", source, tokenizer, dtype=torch.float32)
    save_av(root / "av", verbalizer, tokenizer, av, dtype=torch.float32)
    save_ar(root / "ar", trunk, head, tokenizer, ar, dtype=torch.float32)
    return RandomPair(root, root / "source", root / "av", root / "ar", Site(LAYER))


def random_av(
    root: Path, factory: ModelFactory, *, adapter: Adapter | None = None, kind: str = "overwrite", seed: int = 1
) -> LoadedAV:
    """Write an AV with a model of `factory` into the directory `root` and load it on the CPU, in float32.

    Args:
        adapter: of its family, where that is not registered.
        kind: of injection, "overwrite" or "add".
    """
    with ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(devices=[]))
        if adapter is not None:
            stack.enter_context(registry.adapters.lend(adapter.name, adapter))
        tokenizer = random_tokenizer()
        model = factory(len(tokenizer), seed=seed, layers=LAYERS)
        sidecar, _ = sidecars_for(model, tokenizer, kind=kind)
        save_av(root, model, tokenizer, sidecar, dtype=torch.float32)
        return open_av(root, sidecar)


def open_av(directory: Path, sidecar: Sidecar) -> LoadedAV:
    """An AV of a directory, ready for an engine."""
    loaded = load_causal_lm(directory, ON_CPU)
    tokenizer = load_tokenizer(directory)
    assert sidecar.marker is not None
    injector = Injector(loaded.adapter, sidecar.injection, sidecar.marker)
    return LoadedAV(loaded, tokenizer, AVPrompt.build(tokenizer, sidecar), injector)


def sidecars_for(model: Any, tokenizer: Any, *, kind: str = "overwrite", layer: int = LAYER) -> tuple[Sidecar, Sidecar]:
    """AV and AR sidecars for halves as wide as `model`."""
    av, ar = sidecars(tokenizer, "random/source", kind=kind, layer=layer)
    return av.with_(d_model=width(model)), ar.with_(d_model=width(model))


def width(model: Any) -> int:
    """Width of a model's residual stream."""
    return int(model.config.get_text_config().hidden_size)


def sample_vectors(d_model: int, n: int = 7) -> Tensor:
    """Raw vectors float32 [n, d] with norms from about 0.1 to 1e6: whoever reads them must have rescaled them."""
    rows = torch.randn(n, d_model, generator=torch.Generator().manual_seed(5))
    return rows * torch.logspace(-2, 5, n)[:, None]


# -- independent computations --------------------------------------------------------------------------------


def reference_logits(av: LoadedAV, vectors: Tensor, completions: Tensor) -> Tensor:
    """Next-token logits behind the prompt and behind each token of `completions` int64 [N, T]: [N, T + 1, vocabulary].

    The vector comes in through `inputs_embeds` (`add`: in front of block 2), and the whole sequence is run at once.
    """
    model, prompt, spec = av.loaded.model, av.prompt, av.injector.spec
    ids = torch.cat([torch.tensor(prompt.ids).expand(len(vectors), -1), completions], dim=1)
    unit = vectors.double() / vectors.double().norm(dim=-1, keepdim=True)
    at = prompt.marker_position
    with torch.no_grad():
        embeds = model.get_input_embeddings()(ids).clone()
        if spec.kind == "overwrite":
            embeds[:, at] = (vectors if spec.scale is None else unit * spec.scale).float()
            out = model(inputs_embeds=embeds, use_cache=False).logits
        else:
            with entering(av.loaded.adapter.block_list(model)[2], lambda hidden: _added(hidden, at, unit)):
                out = model(inputs_embeds=embeds, use_cache=False).logits
    logits: Tensor = out[:, len(prompt) - 1 :]
    return logits


def _added(hidden: Tensor, at: int, unit: Tensor) -> Tensor:
    changed = hidden.clone()
    here = hidden[:, at].double()
    changed[:, at] = (here + here.norm(dim=-1, keepdim=True) * unit).float()
    return changed


@contextmanager
def entering(block: nn.Module, change: Any) -> Iterator[list[Tensor]]:
    """While open, `change` is applied to what enters `block`; yields the list of what would have entered."""
    seen: list[Tensor] = []

    def place(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        hidden = args[0] if args else kwargs["hidden_states"]
        seen.append(hidden)
        new = change(hidden)
        return ((new, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": new})

    handle = block.register_forward_pre_hook(place, with_kwargs=True)
    try:
        yield seen
    finally:
        handle.remove()


class Rows(NamedTuple):
    """What an AV writes by an independent computation: token ids int64, margins and log-probabilities, all [N, steps]."""

    ids: Tensor
    margins: Tensor
    logprobs: Tensor


def reference_rows(av: LoadedAV, vectors: Tensor, steps: int, draws: Tensor | None, temperature: float) -> Rows:
    """The tokens of every row, never stopping; `draws` None is greedy."""
    ids = torch.empty(len(vectors), 0, dtype=torch.long)
    margins, logprobs = [], []
    for step in range(steps):
        logits = reference_logits(av, vectors, ids)[:, -1].double()
        if draws is None:
            best = logits.log_softmax(-1).topk(2)
            token, margin = best.indices[:, 0], best.values[:, 0] - best.values[:, 1]
            logp = best.values[:, 0]
        else:
            scaled = (logits / temperature).log_softmax(-1)
            edges = scaled.exp().cumsum(-1)
            u = draws[:, step : step + 1]
            token = (edges <= u).sum(-1).clamp(max=logits.shape[-1] - 1)
            margin = (edges - u).abs().amin(-1)
            logp = scaled.gather(-1, token[:, None])[:, 0]
        ids = torch.cat([ids, token[:, None]], dim=1)
        margins.append(margin)
        logprobs.append(logp)
    return Rows(ids, torch.stack(margins, dim=1), torch.stack(logprobs, dim=1))


# -- faults --------------------------------------------------------------------------------------------------


class Wrong(Exception):
    """One thing that a check found, in a sentence."""


class Faults:
    """Gathers what is wrong, so that one error can list all of it."""

    def __init__(self) -> None:
        self.found: list[str] = []

    @contextmanager
    def part(self, title: str) -> Iterator[None]:
        """A part of a check: whatever it raises becomes a fault and the next part goes on."""
        try:
            yield
        except Wrong as fault:
            self.found.append(f"{title}: {fault}")
        except NLAError as error:
            self.found.append(f"{title}: {error.one_line()}")
        except Exception as cause:  # a plug-in may fail in every way there is
            first = str(cause).strip().splitlines()
            self.found.append(f"{title}: {type(cause).__name__}{f': {first[0]}' if first else ''}")

    def raise_if_any(self, what: str, next_step: str) -> None:
        """Raise an NLAError that lists every fault, where there is one."""
        if self.found:
            raise NLAError(what, faults=self.found, next_step=next_step)


def require(condition: object, sentence: str) -> None:
    """Raise `Wrong` unless `condition` holds."""
    if not condition:
        raise Wrong(sentence)


def require_close(got: Tensor, expected: Tensor, what: str) -> None:
    """Raise `Wrong` unless two tensors are equal in float32 (see `CLOSE`)."""
    require(got.shape == expected.shape, f"{what}: got shape {list(got.shape)}, expected {list(expected.shape)}")
    require(torch.isfinite(got).all(), f"{what}: NaN or infinite values")
    worst = float((got.double() - expected.double()).abs().max() / expected.double().abs().max())
    require(worst <= CLOSE, f"{what}: relative difference {worst:.1e}, expected at most {CLOSE:.0e}")


def require_same(got: Tensor, expected: Tensor, what: str) -> None:
    """Raise `Wrong` unless two tensors are the same to the bit."""
    require(torch.equal(got, expected), f"{what}: not bit-identical")
