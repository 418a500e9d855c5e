"""`check_adapter`: whether an adapter does for its family what every part of nla-hub takes for granted."""

from __future__ import annotations

import re
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from nla_hub import registry
from nla_hub.adapters import Adapter, adapter_for
from nla_hub.capture import capture
from nla_hub.checkpoints import load_ar
from nla_hub.engines.transformers import TransformersEngine
from nla_hub.errors import WeightsError
from nla_hub.export import save_ar, save_source
from nla_hub.pretrained import load_causal_lm, load_trunk
from nla_hub.reconstructor import ARModel
from nla_hub.sidecar import Site
from nla_hub.steering import SteeringVector
from nla_hub.testing.engine_checks import rows_differ
from nla_hub.testing.harness import (
    ON_CPU,
    Faults,
    ModelFactory,
    entering,
    random_av,
    reference_logits,
    reference_rows,
    require,
    require_close,
    require_same,
    sample_vectors,
    sidecars_for,
    width,
)
from nla_hub.testing.random_models import LAYER, LAYERS, random_tokenizer
from nla_hub.weights import WEIGHTS_NAME

TEXTS = (
    "the cat sees a house",
    "a story in the night: the red dog walks and walks, the small quick cat is where it was, and then of the river",
    "who sees the blue house, the old river and a song of the night . what next , what last",
)
"""Of different lengths, so that two are padded; the second is longer than the random models' sliding windows (32)."""


def check_adapter(adapter: Adapter, model_factory: ModelFactory) -> None:
    """Check an adapter on random models of its family, on the CPU, in a few seconds. It need not be registered yet.

    What is checked: that trunk, blocks, embedding, final norm and lm_head are found; that capture by hook equals
    `hidden_states[K+1]`, alone and padded; that an overwritten row and an added vector give the logits of an independent
    forward pass; that a truncated load ends at block K; that a source, an AV and an AR come back from disk with every
    weight, and an AR with a trained final norm is refused; that steering adds what it says, zero steers nothing and no
    trace is left; that generation with a cache equals generation without.

    Args:
        adapter: what a plug-in registers under `nla_hub.adapters`.
        model_factory: makes a random model of the family; called with different seeds and numbers of blocks.

    Raises:
        NLAError: lists everything that is wrong.
    """
    faults = Faults()
    next_step = "docs/add-a-model.md says what each attribute of an adapter means"
    with torch.random.fork_rng(devices=[]):
        what = f"The adapter {getattr(adapter, 'name', adapter)!r} does not do what an adapter must."
        tokenizer = random_tokenizer()
        with faults.part("adapter"):
            require(
                isinstance(adapter, Adapter), f"got a {type(adapter).__name__}, expected an nla_hub.adapters.Adapter"
            )
            require(adapter.model_types, "model_types is empty, so it reads no model")
        faults.raise_if_any(what, next_step)
        with registry.adapters.lend(adapter.name, adapter), TemporaryDirectory() as folder:
            model: Any = None
            with faults.part("model_factory"):
                model = model_factory(len(tokenizer), seed=0, layers=LAYERS)
                _factory(model)
            faults.raise_if_any(what, next_step)
            _parts(faults, adapter, model)
            faults.raise_if_any(what, next_step)  # the rest would only say the same again
            _Check(adapter, model, tokenizer, Path(folder)).run(faults, model_factory)
    faults.raise_if_any(what, next_step)


def _factory(model: Any) -> None:
    config = model.config.get_text_config()
    require(config.num_hidden_layers == LAYERS, f"gave {config.num_hidden_layers} blocks where {LAYERS} were asked for")
    kinds = {value.dtype for value in model.parameters()}
    require(kinds == {torch.float32}, f"gave {', '.join(sorted(map(str, kinds)))}, expected float32")
    require(not model.training, "gave a model in training mode, expected model.eval()")


def _parts(faults: Faults, adapter: Adapter, model: Any) -> None:
    with faults.part("model_types"):
        reader = adapter_for(model.config)
        require(
            reader is adapter,
            f"models of type {model.config.model_type!r} are read by the adapter {reader.name!r} already",
        )
    with faults.part("trunk_paths, blocks"):
        blocks = adapter.block_list(model)
        require(len(blocks) == LAYERS, f"{adapter.blocks!r} holds {len(blocks)} modules, the model has {LAYERS} blocks")
    with faults.part("embedding"):
        expected = model.get_input_embeddings()
        require(adapter.embedding_module(model) is expected, f"{adapter.embedding!r} is not the input embedding")
    with faults.part("final_norm"):
        norm = adapter.final_norm_module(model)
        require(isinstance(norm, nn.Module), f"{adapter.final_norm!r} is a {type(norm).__name__}, expected a module")
        require(not isinstance(norm, nn.Identity), f"{adapter.final_norm!r} is the identity in a fresh model")
    with faults.part("lm_head"):
        head = getattr(model, adapter.lm_head, None)
        require(
            head is not None and head is model.get_output_embeddings(), f"{adapter.lm_head!r} is not the output layer"
        )
    with faults.part("ignored_weights"):
        patterns = [re.compile(pattern) for pattern in adapter.ignored_weights]
        used = [n for n, _ in model.named_parameters() if any(pattern.search(n) for pattern in patterns)]
        require(not used, f"they match weights that the model uses: {', '.join(used[:3])}")


class _Check:
    """The parts of the check that run the model."""

    def __init__(self, adapter: Adapter, model: Any, tokenizer: Any, folder: Path) -> None:
        self.adapter = adapter
        self.model = model
        self.tokenizer = tokenizer
        self.folder = folder
        self.ids = torch.tensor([tokenizer(TEXTS[1])["input_ids"]])
        with torch.no_grad():
            self.expected = [self._ends(torch.tensor([tokenizer(text)["input_ids"]])) for text in TEXTS]
            self.logits = model(input_ids=self.ids, use_cache=False).logits

    def _ends(self, ids: Tensor) -> list[Tensor]:
        """The output of every block for one unpadded sequence: [length, d] each; the last as it enters the final norm."""
        with entering(self.adapter.final_norm_module(self.model), lambda hidden: hidden) as last:
            out = self.model(input_ids=ids, output_hidden_states=True, use_cache=False)
        require(
            len(last) == 1, f"final_norm: {self.adapter.final_norm!r} ran {len(last)} times in one pass, expected once"
        )
        return [hidden[0] for hidden in (*out.hidden_states[1:-1], last[0])]

    def run(self, faults: Faults, factory: ModelFactory) -> None:
        with faults.part("capture"):
            self.capture()
        for kind in ("overwrite", "add"):
            with faults.part(f"injection {kind!r}"):
                self.injection(kind, factory)
        with faults.part("source on disk"):
            save_source(self.folder / "source", self.model, self.tokenizer, dtype=torch.float32)
            self.source_on_disk()
        with faults.part("truncate_config, drop_final_norm"):
            self.truncation()
        with faults.part("AR on disk"):
            self.ar_on_disk()
        with faults.part("steering"):
            self.steering()
        with faults.part("afterwards"):
            with torch.no_grad():
                again = self.model(input_ids=self.ids, use_cache=False).logits
            require_same(again, self.logits, "logits after everything")

    def capture(self) -> None:
        for layer in range(LAYERS):
            for batch_size in (1, len(TEXTS)) if layer == LAYER else (len(TEXTS),):
                acts = capture(
                    self.adapter,
                    self.model,
                    self.tokenizer,
                    Site(layer),
                    TEXTS,
                    positions="all",
                    batch_size=batch_size,
                )
                expected = torch.cat([ends[layer] for ends in self.expected])
                require_close(acts.vectors, expected, f"output of block {layer}, {batch_size} texts at once")

    def injection(self, kind: str, factory: ModelFactory) -> None:
        av = random_av(self.folder / f"av-{kind}", factory, kind=kind)
        model, prompt = av.loaded.model, av.prompt
        vectors = sample_vectors(width(model), 3)
        ids = torch.tensor(prompt.ids).expand(len(vectors), -1)
        columns = torch.full((len(vectors),), prompt.marker_position)
        with torch.no_grad():
            plain = model(input_ids=ids, output_hidden_states=True, use_cache=False).hidden_states
            with av.injector.inject(model, vectors, columns):
                out = model(input_ids=ids, output_hidden_states=True, use_cache=False)
            if kind == "overwrite":
                # The row counts behind whatever the model multiplies its embeddings by: a factor outside of the embedding
                # module would scale the vector too.
                row = model.get_input_embeddings()(ids)[:, prompt.marker_position]
                moved = (out.hidden_states[0] - plain[0])[:, prompt.marker_position]
                require_close(moved, av.injector.entering(vectors) - row, "change of the row that enters block 0")
        nothing = torch.empty(len(vectors), 0, dtype=torch.long)
        require_close(out.logits[:, -1], reference_logits(av, vectors, nothing)[:, -1], "logits under the vectors")
        engine = TransformersEngine(av)
        engine.probe()
        found = engine.generate(vectors, None, temperature=1.0, max_new_tokens=4, batch_size=len(vectors))
        require(not (wrong := rows_differ(av, found, reference_rows(av, vectors, 4, None, 1.0))), wrong)

    def source_on_disk(self) -> None:
        loaded = load_causal_lm(self.folder / "source", ON_CPU)
        require(loaded.model.state_dict().keys() == self.model.state_dict().keys(), "other weights than before")
        with torch.no_grad():
            require_same(loaded.model(input_ids=self.ids, use_cache=False).logits, self.logits, "logits after loading")

    def truncation(self) -> None:
        for layer in (0, LAYER, LAYERS - 1):
            site = Site(layer)
            loaded = load_trunk(self.folder / "source", site, ON_CPU)
            blocks = len(self.adapter.block_list(loaded.model))
            require(blocks == site.n_blocks, f"{blocks} blocks for {site}, expected {site.n_blocks}")
            with torch.no_grad():
                out = self.adapter.trunk(loaded.model)(input_ids=self.ids, use_cache=False).last_hidden_state[0]
            require_close(out, self.expected[1][layer], f"trunk that ends at {site}")

    def ar_on_disk(self) -> None:
        site = Site(LAYER)
        trunk = load_trunk(self.folder / "source", site, ON_CPU).model
        head = nn.Linear(width(self.model), width(self.model), bias=False)
        _, sidecar = sidecars_for(self.model, self.tokenizer)
        place = self.folder / "ar"
        save_ar(place, trunk, head, self.tokenizer, sidecar, dtype=torch.float32)
        source = load_file(self.folder / "source" / WEIGHTS_NAME)
        stored = load_file(place / WEIGHTS_NAME)
        strange = sorted(set(stored) - set(source))
        require(
            not strange, f"causal_prefix: an AR's weights are not named as in a causal LM: {', '.join(strange[:3])}"
        )
        loaded, read_head = load_ar(place, sidecar, ON_CPU)
        mask = torch.ones_like(self.ids)
        with torch.no_grad():
            vector = ARModel(self.adapter, loaded.model, read_head)(self.ids, mask)
            expected = head(self.expected[1][LAYER][-1])[None]
        require_close(vector, expected, "vector of an AR from disk")
        norm = self.adapter.final_norm_module(self.model)
        prefix = next(name for name, module in self.model.named_modules() if module is norm)
        names = [self.adapter.stored_name(f"{prefix}.{name}") for name, _ in norm.named_parameters()]
        if not names:
            return
        trained = {name: torch.rand_like(source[name]) + 2.0 for name in names if name in source}
        require(len(trained) == len(names), f"the final norm is not stored as {', '.join(names)}")
        save_file({**stored, **trained}, place / WEIGHTS_NAME, metadata={"format": "pt"})
        try:
            load_ar(place, sidecar, ON_CPU)
        except WeightsError:
            return
        require(False, "an AR with a trained final norm was loaded, though nothing says what to do with it")

    def steering(self) -> None:
        site = Site(LAYER)
        generator = torch.Generator().manual_seed(3)
        vector = SteeringVector(torch.randn(width(self.model), generator=generator), site)

        require_same(self._steered((vector, 0.0)), self.logits, "logits under strength 0")
        require_same(self._steered((vector - vector, 1.0)), self.logits, "logits under v - v")
        require_same(self._steered((vector, 0.5), (vector, -0.5)), self.logits, "logits under v and -v at once")
        unit = vector.vector.double() / vector.vector.double().norm()
        with (
            torch.no_grad(),
            entering(
                self.adapter.block_list(self.model)[LAYER + 1],
                lambda hidden: (hidden.double() + 0.5 * hidden.double().norm(dim=-1, keepdim=True) * unit).float(),
            ),
        ):
            expected = self.model(input_ids=self.ids, use_cache=False).logits
        require(not torch.equal(expected, self.logits), "what leaves block K does not reach the logits")
        require_close(self._steered((vector, 0.5)), expected, "logits under strength 0.5")

    def _steered(self, *vectors: tuple[SteeringVector, float]) -> Tensor:
        with ExitStack() as stack, torch.no_grad():
            for vector, strength in vectors:
                stack.enter_context(vector.apply(self.model, strength, positions="all", adapter=self.adapter))
            logits: Tensor = self.model(input_ids=self.ids, use_cache=False).logits
        return logits
