"""The stages of a supervised run: source -> data -> ar -> av -> export -> eval, each resumable by its DONE."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from safetensors.torch import save_file

from nla_hub import registry, yaml_io
from nla_hub.checkpoints import LoadOptions, load_ar, load_causal_lm, load_tokenizer, load_trunk
from nla_hub.errors import InputError, RecipeError, RunError
from nla_hub.evaluation import EvalResult, get_protocol, require_disjoint, run_protocol
from nla_hub.evaluation.tiny_rows import base_rows, capture_rows, source_tokenizer
from nla_hub.export import save_ar, save_av, save_source
from nla_hub.geometry import norms, unit
from nla_hub.hub import HubOptions
from nla_hub.injection import Injector
from nla_hub.locate import parse_name
from nla_hub.nla import NLA, Source
from nla_hub.prompts import ARPrompt, AVPrompt, render_av_prompt
from nla_hub.sidecar import EXPLANATION_PLACEHOLDER, Injection, MarkerTokens, ReferenceRecord, Score, Sidecar, Site
from nla_hub.training.ar_regression import init_ar, train_ar
from nla_hub.training.av_sft import train_av
from nla_hub.training.data import TrainingRows, collect, open_corpus, read_rows, write_rows
from nla_hub.training.labelers import Labeler
from nla_hub.training.recipe import Recipe
from nla_hub.training.run import RunDirectory, StageDirectory, timed
from nla_hub.weights import WEIGHTS_NAME

if TYPE_CHECKING:
    from nla_hub.tiny.source import SourceSettings

STAGES = ("source", "data", "ar", "av", "export", "eval")

SEED_OFFSETS = {"source": 0, "av_sft": 1_000_001, "ar_sft": 2_000_003, "dev": 3_000_017}
"""Every purpose draws its documents from its own stream of the corpus."""

REFERENCE_NAME = "fve_reference.safetensors"
"""The mean of the reference's unit vectors, float32 [d], beside each half's weights."""

DEV_DOCUMENTS = 100
"""Documents of the held-out rows that the stages report on; the evaluation uses others."""


SIZES = (
    "hidden_size",
    "layers",
    "heads",
    "mlp_size",
    "documents",
    "steps",
    "batch_documents",
    "lr",
    "tokenizer_documents",
)
"""Settings of a source that must be above 0."""


def check_recipe(recipe: Recipe) -> None:
    """Raise for anything in a recipe that only a later stage would stumble over, before anything is written.

    Raises:
        UnknownNameError: corpus, labeler or protocol. RecipeError: a source that cannot be trained, a layer it lacks.
    """
    open_corpus(recipe.data.corpus)
    registry.labelers.get(recipe.labels.labeler)
    get_protocol(recipe.eval.protocol)
    if recipe.base.train is not None:
        layers = source_settings(recipe).layers
        if recipe.layer >= layers:
            raise RecipeError("The source has no such layer.", got=f"layer {recipe.layer}", expected=f"below {layers}")


def source_settings(recipe: Recipe) -> SourceSettings:
    """The settings of a source that a recipe trains; a RecipeError for those that it does not have or cannot use."""
    from nla_hub.tiny.source import SourceSettings

    try:
        settings = dataclasses.replace(SourceSettings(), **(recipe.base.train or {}))  # type: ignore[arg-type]
    except TypeError as cause:
        known = ", ".join(f.name for f in dataclasses.fields(SourceSettings))
        raise RecipeError(f"base.train: {cause}", expected=known) from cause
    faults = [
        f"base.train.{name}: got {value!r}, expected a value above 0"
        for name in SIZES
        if not (value := getattr(settings, name)) > 0
    ]
    if not faults and settings.hidden_size % settings.heads:
        faults.append(f"base.train: hidden_size {settings.hidden_size} is no multiple of heads {settings.heads}")
    if faults:
        raise RecipeError("This source cannot be trained.", faults=faults)
    return settings


class Listener(Protocol):
    """Is told what a run does, as it does it."""

    def stage(self, name: str, *, resumed: bool) -> None:
        """A stage begins, or was found done."""
        ...

    def metrics(self, name: str, metrics: dict[str, Any]) -> None:
        """Figures of a running stage."""
        ...

    def done(self, name: str, summary: dict[str, Any]) -> None:
        """A stage is done."""
        ...


class Pipeline:
    """Runs a recipe in a run directory.

    `max_steps` bounds every supervised stage (a rehearsal).
    """

    def __init__(self, recipe: Recipe, run: RunDirectory, listener: Listener, *, max_steps: int | None = None) -> None:
        self.recipe = recipe
        self.run = run
        self.listener = listener
        self.max_steps = max_steps
        self.options = LoadOptions()

    def execute(self, stages: Sequence[str] = STAGES) -> Path:
        """Run the stages that are not done yet; returns the directory of the finished pair.

        Raises:
            TrainingError, RunError, CheckpointError and what the stages' parts raise; done stages are kept.
        """
        actions: dict[str, Callable[[StageDirectory], dict[str, Any]]] = {
            "source": self._source,
            "data": self._data,
            "ar": self._ar,
            "av": self._av,
            "export": self._export,
            "eval": self._eval,
        }
        for name in stages:
            if name not in actions:
                raise InputError("There is no such stage.", got=repr(name), expected=", ".join(STAGES))
        check_recipe(self.recipe)
        with self.run:
            for name in stages:
                directory = self.run.stage(name)
                for earlier in STAGES[: STAGES.index(name)]:
                    if not self.run.stage(earlier).is_done:
                        raise RunError(
                            f"The stage {name!r} needs the stage {earlier!r}, which is not done.",
                            where=self.run.path,
                            next_step=f"run it first: --stage {earlier}, or leave --stage out",
                        )
                if directory.is_done:
                    self.listener.stage(name, resumed=True)
                    self.listener.done(name, directory.summary())
                    continue
                self.listener.stage(name, resumed=False)
                directory.begin(self.recipe)
                summary = timed(lambda action=actions[name], place=directory: action(place))  # type: ignore[misc]
                directory.finish(summary)
                self.listener.done(name, summary)
        return self.pair_directory

    @property
    def pair_directory(self) -> Path:
        """Where the finished pair lies: `av/`, `ar/` and, if it was trained here, `source/`."""
        return self.run.stage("export").checkpoint

    def _reporter(self, directory: StageDirectory) -> Callable[[dict[str, Any]], None]:
        def report(metrics: dict[str, Any]) -> None:
            directory.log(metrics)
            self.listener.metrics(directory.path.name, metrics)

        return report

    # -- the source ------------------------------------------------------------------------------------------

    def _source(self, directory: StageDirectory) -> dict[str, Any]:
        if self.recipe.base.train is None:
            return {"base": self.recipe.base.model, "trained": False}
        from nla_hub.tiny.source import train_source

        if self.recipe.base.model != "tiny-world":
            raise RecipeError(
                "Only the tiny world's source can be trained.", got=f"base.model {self.recipe.base.model!r}"
            )
        settings = self.source_settings()
        report = self._reporter(directory)
        train_source(
            directory.checkpoint,
            seed=self.recipe.seed,
            settings=settings,
            progress=lambda metrics: report({**metrics, "steps": settings.steps}),
        )
        return {"base": self.base_name, "trained": True, "revision": self._base_digest()}

    def source_settings(self) -> SourceSettings:
        """The settings of a source that is trained here."""
        settings = source_settings(self.recipe)
        return settings if self.max_steps is None else dataclasses.replace(settings, steps=self.max_steps)

    @cached_property
    def base_directory(self) -> Path:
        """The directory of the base model."""
        trained = self.run.stage("source").checkpoint
        if self.recipe.base.train is not None:
            return trained
        return parse_name(self.recipe.base.model, revision=self.recipe.base.revision).fetch(HubOptions())

    @property
    def base_name(self) -> str:
        """What sidecars call the base model."""
        return f"{self.recipe.name}-source" if self.recipe.base.train is not None else self.recipe.base.model

    def _base_digest(self) -> str | None:
        weights = self.base_directory / WEIGHTS_NAME
        if self.recipe.base.revision is not None or not weights.is_file():
            return self.recipe.base.revision
        return "sha256:" + hashlib.sha256(weights.read_bytes()).hexdigest()

    @cached_property
    def source(self) -> Source:
        """The trunk up to block K, for capture."""
        loaded = load_trunk(self.base_directory, Site(self.recipe.layer), self.options)
        return Source(loaded, load_tokenizer(self.base_directory), self.base_name)

    # -- data ------------------------------------------------------------------------------------------------

    def _data(self, directory: StageDirectory) -> dict[str, Any]:
        corpus = open_corpus(self.recipe.data.corpus)
        labeler = self._labeler()
        counts = {}
        wanted = {"av_sft": self.recipe.av.documents, "ar_sft": self.recipe.ar.documents, "dev": DEV_DOCUMENTS}
        for split, n in wanted.items():
            documents = corpus.documents(n, seed=self.recipe.seed + SEED_OFFSETS[split])
            rows = collect(self.source, self.recipe, documents, labeler, prefix=split)
            write_rows(directory.checkpoint / f"{split}.parquet", rows, meta=self._dataset_meta(split))
            counts[split] = len(rows)
            self.listener.metrics("data", {"split": split, "documents": len(documents), "rows": len(rows)})
        return {"rows": counts}

    def _labeler(self) -> Labeler:
        spec = self.recipe.labels
        kind: Any = registry.labelers.get(spec.labeler)
        return kind() if spec.clauses is None else kind(spec.clauses)  # type: ignore[no-any-return]

    def _dataset_meta(self, split: str) -> dict[str, Any]:
        return {
            "stage": split,
            "extraction": {
                "base_model": self.base_name,
                "d_model": self.source.loaded.d_model,
                "layer_index": self.recipe.layer,
                "norm": "none",
                "corpus": self.recipe.data.corpus,
                "positions_per_doc": self.recipe.data.positions,
            },
        }

    def rows(self, split: str) -> TrainingRows:
        """The rows of a split, from disk."""
        return read_rows(self.run.stage("data").checkpoint / f"{split}.parquet")

    # -- the contract of the pair ----------------------------------------------------------------------------

    @cached_property
    def sidecars(self) -> tuple[Sidecar, Sidecar]:
        """Sidecars of AV and AR: ids measured on the tokenizer, injection scale on the training vectors."""
        tokenizer = self.source.tokenizer
        marker = self.recipe.marker
        alone = tokenizer(marker, add_special_tokens=False)["input_ids"]
        if len(alone) != 1:
            raise RecipeError(
                "The marker must be one token of this tokenizer.",
                got=f"{marker!r} is {len(alone)} tokens",
                next_step="choose a single rare character that is one token (nla-hub recipes show tiny has an example)",
            )
        unchecked = Sidecar(
            role="av",
            d_model=self.source.loaded.d_model,
            site=Site(self.recipe.layer),
            marker=MarkerTokens(marker, alone[0], -1, -1),
            av_template=self.recipe.prompts.av,
            ar_template=self.recipe.prompts.ar,
            ar_suffix_ids=_suffix_ids(tokenizer, self.recipe.prompts.ar),
            injection=Injection(self.recipe.injection.kind, self._injection_scale()),
            base_model=self.base_name,
            source_revision=self._base_digest(),
        )
        ids = tokenizer(render_av_prompt(tokenizer, unchecked), add_special_tokens=False)["input_ids"]
        if ids.count(alone[0]) != 1:
            raise RecipeError("The AV prompt must hold the marker once.", got=f"{ids.count(alone[0])} times")
        at = ids.index(alone[0])
        av = unchecked.with_(marker=MarkerTokens(marker, alone[0], ids[at - 1], ids[at + 1]), stage="av_sft")
        return av, av.with_(role="ar", stage="ar_sft", final_norm_stripped=True)

    def _injection_scale(self) -> float | None:
        spec = self.recipe.injection
        if spec.kind == "add":
            return None
        if not isinstance(spec.scale, str):
            return spec.scale
        # About the 75th percentile of the raw norms at layer K, rounded (the reference's recipe): three figures.
        return float(f"{float(torch.quantile(norms(self.rows('av_sft').vectors), 0.75)):.3g}")

    # -- the halves ------------------------------------------------------------------------------------------

    def _ar(self, directory: StageDirectory) -> dict[str, Any]:
        torch.manual_seed(self.recipe.seed)
        _, sidecar = self.sidecars
        prompt = ARPrompt.build(self.source.tokenizer, sidecar)
        model = init_ar(self.source.loaded.adapter, self.source.loaded.model)
        result = train_ar(
            model,
            prompt,
            self.rows("ar_sft"),
            self.recipe.ar,
            seed=self.recipe.seed,
            report=self._reporter(directory),
            held_out=self.rows("dev"),
            max_steps=self.max_steps,
        )
        save_ar(directory.checkpoint, model.trunk, model.head, self.source.tokenizer, sidecar, dtype=torch.float32)
        return dataclasses.asdict(result)

    def _av(self, directory: StageDirectory) -> dict[str, Any]:
        torch.manual_seed(self.recipe.seed)
        sidecar, _ = self.sidecars
        loaded = load_causal_lm(self.base_directory, self.options)
        tokenizer = self.source.tokenizer
        assert sidecar.marker is not None
        result = train_av(
            loaded.model,
            tokenizer,
            AVPrompt.build(tokenizer, sidecar),
            Injector(loaded.adapter, sidecar.injection, sidecar.marker),
            self.rows("av_sft"),
            self.recipe.av,
            seed=self.recipe.seed,
            report=self._reporter(directory),
            held_out=self.rows("dev"),
            max_steps=self.max_steps,
        )
        save_av(directory.checkpoint, loaded.model, tokenizer, sidecar, dtype=torch.float32)
        return dataclasses.asdict(result)

    # -- the finished pair -----------------------------------------------------------------------------------

    def _export(self, directory: StageDirectory) -> dict[str, Any]:
        dtype, head_dtype = (getattr(torch, name) for name in (self.recipe.export.dtype, self.recipe.export.head_dtype))
        place = directory.checkpoint
        av = load_causal_lm(self.run.stage("av").checkpoint, self.options)
        av_sidecar, ar_sidecar = self.sidecars
        trained = {"recipe": self.recipe.name, "recipe_hash": self.recipe.digest(), "seed": self.recipe.seed}
        extra = {"training": trained, "created_by": "nla-hub"}
        save_av(place / "av", av.model, self.source.tokenizer, av_sidecar.with_(extra=extra), dtype=dtype)
        ar, head = load_ar(self.run.stage("ar").checkpoint, ar_sidecar, self.options)
        save_ar(
            place / "ar",
            ar.model,
            head,
            self.source.tokenizer,
            ar_sidecar.with_(extra=extra),
            dtype=dtype,
            head_dtype=head_dtype,
        )
        if self.recipe.base.train is not None:
            source = load_causal_lm(self.base_directory, self.options)
            save_source(place / "source", source.model, self.source.tokenizer, dtype=dtype)
        sizes = {p.name: _bytes(p) for p in sorted(place.iterdir()) if p.is_dir()}
        return {"bytes": sizes}

    def _eval(self, directory: StageDirectory) -> dict[str, Any]:
        nla = NLA.from_pretrained(self.pair_directory, base_model=self._exported_base())
        result = run_protocol(
            nla,
            self.recipe.eval.protocol,
            **self._eval_size(),
            progress=lambda what, done, total: self.listener.metrics("eval", {"what": what, "done": done, "of": total}),
        )
        shared = self._require_no_leak(nla, result)
        record_score(self.pair_directory, nla, result)
        yaml_io.write_text(directory.path / "result.json", json.dumps(result.to_dict(), indent=1) + "\n")
        figures = {name: value for name, value in result.figures().items() if value is not None}
        return {**figures, "evaluation_documents_trained_on": shared}

    def _require_no_leak(self, nla: NLA, result: EvalResult) -> int:
        """How many evaluation documents stand verbatim in what this run trained on; an InputError from 0.5 % up."""
        tokenizer, limit = source_tokenizer(nla)
        held_out = {row.document.text: row.document.content for row in base_rows(tokenizer, result.protocol, limit)}
        corpus = open_corpus(self.recipe.data.corpus)
        sizes = {"av_sft": self.recipe.av.documents, "ar_sft": self.recipe.ar.documents}
        if self.recipe.base.train is not None:
            sizes["source"] = self.source_settings().documents
        trained_on = (
            document.content
            for split, n in sizes.items()
            for document in corpus.documents(n, seed=self.recipe.seed + SEED_OFFSETS[split])
        )
        return require_disjoint(list(held_out.values()), trained_on)

    def _eval_size(self) -> dict[str, Any]:
        documents = self.recipe.eval.documents
        return {} if documents is None else {"documents": documents, "facts": False, "probe_documents": documents}

    def _exported_base(self) -> Path:
        exported = self.pair_directory / "source"
        return exported if exported.is_dir() else self.base_directory


def record_score(pair: Path, nla: NLA, result: EvalResult) -> None:
    """Write a result's FVE, its reference and the reference's mean vector into both halves of a pair."""
    if result.reference is None or result.fve.value is None:
        return  # a rehearsal has too few rows to measure anything
    score = Score(
        value=round(result.fve.value, 4),
        baseline=result.fve.baseline,
        dataset=result.fve.dataset,
        n=result.fve.n,
        cosine=None if result.real.cosine is None else round(result.real.cosine, 4),
        protocol=result.protocol.name,
        commit=result.commit,
    )
    record = ReferenceRecord(**vars(result.reference))
    tokenizer, limit = source_tokenizer(nla)
    rows = base_rows(tokenizer, result.protocol, limit)
    mean = unit(capture_rows(nla, rows).vectors).mean(dim=0).float()
    for half in ("av", "ar"):
        sidecar = Sidecar.read(pair / half)
        sidecar.with_(fve=score, fve_reference=record).write(pair / half)
        save_file({"mean": mean}, pair / half / REFERENCE_NAME, metadata={"format": "pt", "dataset": record.dataset})


def _suffix_ids(tokenizer: Any, template: str) -> tuple[int, ...]:
    """The ids that end every AR prompt, whatever the explanation: the longest common tail over two texts."""
    tails = [
        tokenizer(template.replace(EXPLANATION_PLACEHOLDER, text), add_special_tokens=True)["input_ids"]
        for text in ("one thing", "several other words.")
    ]
    common: list[int] = []
    for a, b in zip(reversed(tails[0]), reversed(tails[1]), strict=False):
        if a != b:
            break
        common.insert(0, int(a))
    return tuple(common)


def _bytes(directory: Path) -> int:
    return sum(p.stat().st_size for p in directory.rglob("*") if p.is_file())
