"""A layer sweep: what a recipe's labels say about each of several layers, on little data, before a run is paid for.

The same tokens are read at all layers in one pass and labelled once. Then each layer gets an AR of its own, trained on the
labels with the recipe's settings, and is measured on rows of other documents; beside it stand two linear figures that owe
nothing to that training: a ridge map from the words of the labels to the vectors, and, where the facts are known (the tiny
world), a linear probe for them on the vectors. It lives in the run directory, `layer-sweep/`, and a layer that is done stays.
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from nla_hub import yaml_io
from nla_hub.batching import pad_id_of
from nla_hub.capture import run_trunk_at
from nla_hub.errors import InputError, RunError, TrainingError
from nla_hub.evaluation import require_disjoint
from nla_hub.evaluation.stats import mean_interval
from nla_hub.evaluation.tiny_rows import facts_at
from nla_hub.geometry import Reference, fve_value, norms
from nla_hub.loading import Source
from nla_hub.pretrained import LoadOptions, load_causal_lm, load_config, load_tokenizer, load_trunk
from nla_hub.prompts import ARPrompt
from nla_hub.schema import differences
from nla_hub.sidecar import Sidecar, Site
from nla_hub.source_text import context_length, encode_source
from nla_hub.training.ar_regression import evaluate_ar, train_ar
from nla_hub.training.checks import TINY_WORLD, source_settings
from nla_hub.training.contract import suffix_ids
from nla_hub.training.data import BATCH_SIZE, TrainingRows, make_labeler, pick_positions, read_rows, write_rows
from nla_hub.training.halves import Halves
from nla_hub.training.labelers import CorpusDocument, LabelContext, LabelRequest, opened
from nla_hub.training.recipe import Recipe, StageSpec
from nla_hub.training.resolve import base_files, two_thirds
from nla_hub.training.run import RunDirectory
from nla_hub.training.splits import split_documents
from nla_hub.training.state import TrainingState
from nla_hub.training.sweep.label_words import fact_accuracies, ridge_from_words
from nla_hub.training.sweep.result import LayerFigures, SweepResult
from nla_hub.training.view.sweep_page import sweep_page

FOLDER = "layer-sweep"
CONFIG, LABELS, RESULT, PAGE = "config.yaml", "labels.json", "result.json", "layer-sweep.html"
LABEL_CACHE = "answers"
"""Where a labeler keeps what it was answered."""

LAYERS = 8
"""Layers where none are named."""

DOCUMENTS = 400
"""Documents where no number is named; a quarter as many others are held out."""

LEAST_DOCUMENTS = 8

SPLITS = {"train": "ar_sft", "held_out": "dev"}
"""Rows of the sweep -> the stream of the corpus that their documents come from."""


def choose_layers(depth: int, recipe_layer: int, asked: Sequence[int] | None = None) -> tuple[int, ...]:
    """The layers of a sweep, ascending: those asked for, else about eight, evenly spaced over all `depth` blocks.

    The layer at two thirds of the depth and the recipe's own are always among the latter: each takes the place of the nearest.

    Raises:
        InputError: a layer that the base model does not have, or none at all.
    """
    if asked is not None:
        wrong = [layer for layer in asked if not 0 <= layer < depth]
        if wrong or not asked:
            raise InputError(
                "The base model has no such layer." if wrong else "No layer was named.",
                got=", ".join(map(str, wrong)),
                expected=f"0 to {depth - 1}",
            )
        return tuple(sorted(set(asked)))
    if depth <= LAYERS:
        return tuple(range(depth))
    chosen = {round(i * (depth - 1) / (LAYERS - 1)) for i in range(LAYERS)}
    wanted = {layer for layer in (two_thirds(depth), recipe_layer) if layer < depth}
    for layer in sorted(wanted - chosen):
        chosen.remove(min(chosen - wanted, key=lambda other: (abs(other - layer), other)))
        chosen.add(layer)
    return tuple(sorted(chosen))


def check_sweep(recipe: Recipe, layers: Sequence[int] | None, documents: int) -> tuple[int, ...]:
    """The layers of a sweep, before weights are downloaded or a source is trained for it.

    Raises:
        InputError: see `choose_layers`; too few documents. CheckpointError, HubError and their children: no such base.
    """
    if documents < LEAST_DOCUMENTS:
        raise InputError("A sweep needs more documents.", got=documents, expected=f"{LEAST_DOCUMENTS} or more")
    if recipe.base.train is not None:
        depth = source_settings(recipe).layers
    else:
        depth = int(load_config(base_files(recipe)).get_text_config().num_hidden_layers)
    return choose_layers(depth, recipe.site.layer, layers)


@dataclass(frozen=True)
class _Chosen:
    """The rows of a split before any model runs; lists are parallel to each other."""

    ids: list[tuple[int, ...]]
    doc_ids: list[str]
    positions: list[int]
    prefixes: list[str]
    requests: list[LabelRequest]

    def sequences(self, rows: Sequence[int]) -> list[tuple[tuple[int, ...], list[int]]]:
        """(ids, positions) of each document among `rows`, in their order."""
        found: dict[str, tuple[tuple[int, ...], list[int]]] = {}
        for row in rows:
            found.setdefault(self.doc_ids[row], (self.ids[row], []))[1].append(self.positions[row])
        return list(found.values())


def _silent(text: str) -> None:
    """Says nothing."""


class LayerSweep:
    """The sweep of a recipe in its run directory.

    Args:
        recipe: with a layer that is a number.
        base: the directory of the base model, weights included.
        layers: as `check_sweep` gives them.
        documents: to learn from.
        say: receives a line now and then.
    """

    def __init__(
        self,
        recipe: Recipe,
        run: RunDirectory,
        base: Path,
        *,
        layers: Sequence[int],
        documents: int = DOCUMENTS,
        say: Callable[[str], None] = _silent,
    ) -> None:
        self.recipe, self.run, self.base, self.say = recipe, run, base, say
        self.depth = int(load_config(base).get_text_config().num_hidden_layers)
        self.layers = tuple(layers)
        self.sizes = {"train": documents, "held_out": max(LEAST_DOCUMENTS, documents // 4)}
        self.place = run.path / FOLDER

    @property
    def spec(self) -> StageSpec:
        """How each AR is trained: the recipe's settings on the sweep's documents."""
        return dataclasses.replace(self.recipe.ar, documents=self.sizes["train"])

    def execute(self) -> SweepResult:
        """Do what is left to do, and write `result.json` and a page beside it.

        Raises:
            RunError: the place holds a sweep of other sizes. TrainingError: no row has a label. What the labeler, the corpus
            and `train_ar` raise; layers that are done are kept.
        """
        with self.run:
            self._claim()
            self._capture()
            figures = tuple(self._layer(layer) for layer in self.layers)
            result = SweepResult(
                recipe=self.recipe.name,
                base=str(self.recipe.base.model),
                depth=self.depth,
                recipe_layer=self.recipe.site.layer,
                documents=self.sizes["train"],
                train_rows=len(self._usable("train")),
                held_out_rows=len(self._usable("held_out")),
                layers=figures,
            )
            yaml_io.write_text(self.place / RESULT, json.dumps(result.to_dict(), indent=1, allow_nan=False) + "\n")
            yaml_io.write_text(self.place / PAGE, sweep_page(result.to_dict()))
        return result

    def _claim(self) -> None:
        config = self.place / CONFIG
        wanted = {"documents": self.sizes["train"]}
        if config.is_file() and (changed := list(differences(yaml_io.read(config, error=RunError), wanted))):
            raise RunError(
                "The layer sweep here was made with another number of documents.",
                where=self.place,
                faults=changed,
                next_step="repeat that number with --documents, or name another place with -o",
            )
        yaml_io.write_text(config, yaml_io.dumps(wanted))

    # -- rows ------------------------------------------------------------------------------------------------

    @cached_property
    def tokenizer(self) -> Any:
        """Of the base model."""
        return load_tokenizer(self.base)

    @cached_property
    def chosen(self) -> dict[str, _Chosen]:
        """The rows of both splits, as the data stage would choose them."""
        documents = {name: self._documents(name) for name in SPLITS}
        require_disjoint([d.content for d in documents["held_out"]], [d.content for d in documents["train"]])
        limit = context_length(load_config(self.base).get_text_config())
        return {name: self._choose(name, found, limit) for name, found in documents.items()}

    def _documents(self, name: str) -> Sequence[CorpusDocument]:
        """The first documents of a split; fewer, where a mixture has no more."""
        found = split_documents(self.recipe, SPLITS[name], self.sizes[name])
        if len(found) < self.sizes[name]:
            self.say(f"the corpus has {len(found)} documents, {name.replace('_', ' ')}, not {self.sizes[name]}")
        return found

    def _choose(self, name: str, documents: Sequence[Any], limit: int | None) -> _Chosen:
        data = self.recipe.data
        limit = min(limit or data.max_tokens or 0, data.max_tokens or limit or 0) or None
        rows = _Chosen([], [], [], [], [])
        for i, document in enumerate(documents):
            doc_id = f"{SPLITS[name]}-{i}"
            encoded = encode_source(
                self.tokenizer, document.content, max_length=limit, overflow="truncate", where=f"document {doc_id}"
            )[0]
            for p in pick_positions(
                encoded, doc_id, n=data.positions, minimum=data.min_position, seed=self.recipe.seed
            ):
                end = encoded.offsets[p][1]
                rows.ids.append(encoded.ids)
                rows.doc_ids.append(doc_id)
                rows.positions.append(p)
                rows.prefixes.append(encoded.text[:end])
                rows.requests.append(LabelRequest(document, end, encoded.text[:end]))
        return rows

    @cached_property
    def labels(self) -> dict[str, list[str | None]]:
        """The label of every row, None where the labeler had no answer; asked for once."""
        place = self.place / LABELS
        if place.is_file():
            kept: dict[str, list[str | None]] = json.loads(place.read_text(encoding="utf-8"))
            return kept
        base = f"{self.recipe.base.model}@{self.recipe.base.revision}"
        context = LabelContext(self.place / LABEL_CACHE, base, self._whole_source)
        found = {}
        with opened(make_labeler(self.recipe.labels), context) as labeler:
            for name, rows in self.chosen.items():
                self.say(f"labels: {len(rows.requests):,} rows, {name.replace('_', ' ')}")
                found[name] = labeler.label(rows.requests)
        yaml_io.write_text(place, json.dumps(found, ensure_ascii=False) + "\n")
        return found

    def _whole_source(self) -> Source:
        return Source(load_causal_lm(self.base, LoadOptions()), self.tokenizer, str(self.recipe.base.model))

    def _usable(self, name: str) -> list[int]:
        """Indices of the rows of a split that have a label."""
        return [i for i, label in enumerate(self.labels[name]) if label]

    def _rows_path(self, layer: int, name: str) -> Path:
        return self.place / "rows" / f"L{layer}-{name}.parquet"

    def _capture(self) -> None:
        """Read the rows at every layer that has none yet, all in one pass."""
        missing = [layer for layer in self.layers if not all(self._rows_path(layer, n).is_file() for n in SPLITS)]
        if not missing:
            return
        for name in SPLITS:
            self._require_rows(name)
        source = load_trunk(self.base, Site(max(missing)), LoadOptions())
        for name in SPLITS:
            chosen, usable = self.chosen[name], self._usable(name)
            self.say(
                f"capture: {len(usable):,} rows, {name.replace('_', ' ')}, at layers {', '.join(map(str, missing))}"
            )
            vectors = run_trunk_at(
                source.adapter,
                source.model,
                [Site(layer) for layer in missing],
                chosen.sequences(usable),
                pad_id=pad_id_of(self.tokenizer),
                batch_size=BATCH_SIZE,
            )
            for i, layer in enumerate(missing):
                rows = TrainingRows(
                    vectors[:, i].contiguous(),
                    tuple(str(self.labels[name][row]) for row in usable),
                    tuple(chosen.doc_ids[row] for row in usable),
                    tuple(chosen.positions[row] for row in usable),
                    tuple(chosen.prefixes[row] for row in usable),
                    Site(layer),
                )
                write_rows(self._rows_path(layer, name), rows, meta={"stage": f"{FOLDER}, {name}"})

    def _require_rows(self, name: str) -> None:
        """Raise a TrainingError where a split has too few rows with a label to measure anything."""
        labelled = {self.chosen[name].doc_ids[i] for i in self._usable(name)}
        if len(labelled) < 2:
            raise TrainingError(
                "Fewer than two documents have a row with a label.",
                where=f"{FOLDER}, {name.replace('_', ' ')}",
                got=f"{len(self.labels[name])} positions, {len(self._usable(name))} labels",
                next_step="raise --documents; check data.min_position against the length of the documents, and the labeler",
            )

    def _facts(self, name: str) -> list[Mapping[str, Hashable]] | None:
        """What is known at each usable row; None where the corpus does not say."""
        if self.recipe.data.corpus != TINY_WORLD:
            return None
        requests: list[Any] = self.chosen[name].requests
        return [facts_at(requests[i].document, requests[i].char_end) for i in self._usable(name)]

    # -- layers ----------------------------------------------------------------------------------------------

    def _layer(self, layer: int) -> LayerFigures:
        stage = self.run.stage(f"{FOLDER}/L{layer}")
        if stage.is_done:
            self.say(f"layer {layer}: done before")
            return LayerFigures(**stage.summary())
        begun = time.perf_counter()
        stage.begin(self.recipe)
        train, held = (read_rows(self._rows_path(layer, name)) for name in SPLITS)
        prompt = ARPrompt(self.tokenizer, self.recipe.prompts.ar, suffix_ids(self.tokenizer, self.recipe.prompts.ar))
        torch.manual_seed(self.recipe.seed)
        model = Halves(self.recipe, self.base).load_ar(Sidecar("ar", train.vectors.shape[1], Site(layer)))
        trained = train_ar(
            model, prompt, train, self.spec, seed=self.recipe.seed, report=stage.log, state=TrainingState(stage, "ar")
        )
        mse = evaluate_ar(model, prompt, held).double()
        reference = Reference.measure(held.vectors, f"{FOLDER}, held-out rows")
        low, high = mean_interval(mse.numpy(), held.doc_ids, seed=self.recipe.seed)
        facts = [self._facts(name) for name in SPLITS]
        accuracy: dict[str, float] = {}
        if facts[0] is not None and facts[1] is not None:
            accuracy = fact_accuracies(train.vectors, facts[0], held.vectors, facts[1])
        figures = LayerFigures(
            layer=layer,
            fve=fve_value(mse, reference.raw_variance),
            fve_low=1.0 - high / reference.raw_variance,
            fve_high=1.0 - low / reference.raw_variance,
            cosine=float(1.0 - mse.mean() / 2.0),
            raw_variance=reference.raw_variance,
            mean_fve=1.0 - reference.mean_norm / reference.raw_variance,
            ridge_fve=fve_value(ridge_from_words(train, held), reference.raw_variance),
            facts=sum(accuracy.values()) / len(accuracy) if accuracy else None,
            accuracy=accuracy,
            norm_p75=float(torch.quantile(norms(train.vectors), 0.75)),
            loss=trained.loss,
            steps=trained.steps,
            seconds=round(time.perf_counter() - begun, 1),
        )
        stage.finish(asdict(figures))
        self.say(f"layer {layer}: FVE of labels {figures.fve:.3f}")
        return figures
