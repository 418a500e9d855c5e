"""The stages of a run: source -> data -> ar -> av -> (rl) -> export -> eval, each resumable by its DONE.

What they are made of lies elsewhere: `stages.py` (names and order), `checks.py` (what is refused at once), `splits.py`
(which documents), `data.py` (rows), `contract.py` (sidecars and the score), `loop.py` (the supervised loop), `rl/`,
`run.py` (the directory), `state.py` (what a killed stage continues from), `processes.py` (several processes).
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from nla_hub import yaml_io
from nla_hub.checkpoints import load_ar
from nla_hub.errors import RecipeError, RunError
from nla_hub.evaluation import get_protocol, run_protocol
from nla_hub.evaluation.protocol_rows import capture_protocol
from nla_hub.export import save_ar, save_av, save_source
from nla_hub.hub import HubOptions
from nla_hub.injection import Injector
from nla_hub.loading import Source
from nla_hub.locate import zoo_ref
from nla_hub.nla import NLA
from nla_hub.pretrained import LoadOptions, load_causal_lm, load_tokenizer, load_trunk
from nla_hub.prompts import ARPrompt, AVPrompt
from nla_hub.sidecar import Sidecar
from nla_hub.source_text import context_length
from nla_hub.training.ar_regression import init_ar, train_ar
from nla_hub.training.av_sft import train_av
from nla_hub.training.checks import check_recipe, source_settings
from nla_hub.training.contract import make_sidecars, record_score
from nla_hub.training.data import TrainingRows, collect, make_labeler, read_rows, write_rows
from nla_hub.training.loop import TRAINED
from nla_hub.training.recipe import Recipe
from nla_hub.training.resolve import require_config
from nla_hub.training.run import RunDirectory, StageDirectory, timed
from nla_hub.training.splits import UNLABELLED, data_splits, require_dev_held_out, require_held_out, split_documents
from nla_hub.training.stages import IN_ALL_PROCESSES, Listener, require_stages, stages_of
from nla_hub.training.stand_in import write_stand_in
from nla_hub.training.state import TrainingState
from nla_hub.training.view.report import write_report
from nla_hub.weights import WEIGHTS_NAME

if TYPE_CHECKING:
    from nla_hub.tiny.source import SourceSettings

WATCH = "watch"
"""The second AR: its folder in the stage `ar`, and the "model" of its lines in metrics.jsonl."""

EVALUATION_NAME = "eval.jsonl"
"""Held-out documents beside the rows, for a protocol that has none of its own."""

WATCH_SEED_OFFSET = 1
"""What the second AR's seed, the order of its rows, differs by."""


class Pipeline:
    """Runs a recipe in a run directory.

    `max_steps` bounds every training stage (a rehearsal); `report_to` names trackers that the rl stage also reports to.
    """

    def __init__(
        self,
        recipe: Recipe,
        run: RunDirectory,
        listener: Listener,
        *,
        max_steps: int | None = None,
        report_to: Sequence[str] = (),
    ) -> None:
        self.recipe = recipe
        self.run = run
        self.processes = run.processes
        self.listener = listener
        self.max_steps = max_steps
        self.report_to = tuple(report_to)
        self.options = LoadOptions()

    def execute(self, stages: Sequence[str] | None = None) -> Path:
        """Run the stages that are not done yet (None: all); returns the directory of the finished pair.

        Raises:
            TrainingError, RunError, CheckpointError and what the stages' parts raise; done stages are kept.
        """
        stages = stages_of(self.recipe) if stages is None else stages
        require_stages(self.recipe, stages)
        check_recipe(self.recipe, world=self.processes.world)
        ran = False
        with self.run:
            try:
                for name in stages:
                    ran = self._execute(name) or ran
            finally:
                if self.processes.is_main and (ran or not all(self.run.stage(name).is_done for name in stages)):
                    write_report(self.run.path)
        return self.pair_directory

    def _execute(self, name: str) -> bool:
        """Bring a stage to its end; whether anything was left to do."""
        directory = self.run.stage(name)
        begun = self.processes.on_main(lambda: self._begin(name, directory))
        if begun:
            action: Callable[[StageDirectory], dict[str, Any]] = getattr(self, f"_{name}")
            if name in IN_ALL_PROCESSES:
                summary = timed(lambda: action(directory))
            else:
                summary = self.processes.on_main(lambda: timed(lambda: action(directory)))
            self.processes.on_main(lambda: directory.finish(summary))
        if self.processes.is_main:
            self.listener.done(name, directory.summary())
        return begun

    def _begin(self, name: str, directory: StageDirectory) -> bool:
        """Whether the stage is to run; its directory is ready then."""
        order = stages_of(self.recipe)
        for earlier in order[: order.index(name)]:
            if not self.run.stage(earlier).is_done:
                raise RunError(
                    f"The stage {name!r} needs the stage {earlier!r}, which is not done.",
                    where=self.run.path,
                    next_step=f"run it first: --stage {earlier}, or leave --stage out",
                )
        self.listener.stage(name, resumed=directory.is_done)
        if directory.is_done:
            directory.drop_state()
            return False
        directory.begin(self.recipe)
        return True

    @property
    def pair_directory(self) -> Path:
        """Where the finished pair lies: `av/`, `ar/` and, if it was trained here, `source/`."""
        return self.run.stage("export").checkpoint

    def _reporter(self, directory: StageDirectory, **labels: Any) -> Callable[[dict[str, Any]], None]:
        def report(metrics: dict[str, Any]) -> None:
            if self.processes.is_main:
                directory.log({**labels, **metrics})
                self.listener.metrics(directory.path.name, {**labels, **metrics})

        return report

    # -- the source ------------------------------------------------------------------------------------------

    def _source(self, directory: StageDirectory) -> dict[str, Any]:
        if self.recipe.base.stand_in is not None:
            write_stand_in(directory.checkpoint, self.recipe.base.stand_in, seed=self.recipe.seed)
            return {"base": self.base_name, "trained": False, "revision": self._base_digest()}
        if self.recipe.base.train is None:
            require_config(self.recipe, self.base_directory)  # downloaded here, by one process
            return {"base": self.base_name, "trained": False}
        from nla_hub.tiny.source import train_source

        settings = self.source_settings()
        report = self._reporter(directory)
        train_source(
            directory.checkpoint,
            seed=self.recipe.seed,
            settings=settings,
            progress=lambda metrics: report({**metrics, "steps": settings.steps}),
            state=TrainingState(directory, "source"),
        )
        return {"base": self.base_name, "trained": True, "revision": self._base_digest()}

    def source_settings(self) -> SourceSettings:
        """The settings of a source that is trained here."""
        settings = source_settings(self.recipe)
        return settings if self.max_steps is None else dataclasses.replace(settings, steps=self.max_steps)

    @cached_property
    def base_directory(self) -> Path:
        """The directory of the base model."""
        if self.base_is_made_here:
            return self.run.stage("source").checkpoint
        return zoo_ref(self.recipe.base.name, revision=self.recipe.base.revision).fetch(HubOptions())

    @property
    def base_is_made_here(self) -> bool:
        """Whether the run trains its source, or makes one that stands in for it."""
        return self.recipe.base.train is not None or self.recipe.base.stand_in is not None

    @property
    def base_name(self) -> str:
        """What sidecars call the base model."""
        if self.recipe.base.stand_in is not None:
            return f"{self.recipe.name}-stand-in"
        return f"{self.recipe.name}-source" if self.recipe.base.train is not None else self.recipe.base.name

    def _base_digest(self) -> str | None:
        weights = self.base_directory / WEIGHTS_NAME
        if self.recipe.base.revision is not None or not weights.is_file():
            return self.recipe.base.revision
        return "sha256:" + hashlib.sha256(weights.read_bytes()).hexdigest()

    @cached_property
    def source(self) -> Source:
        """The trunk up to block K, for capture."""
        loaded = load_trunk(self.base_directory, self.recipe.site, self.options)
        return Source(loaded, load_tokenizer(self.base_directory), self.base_name)

    # -- data ------------------------------------------------------------------------------------------------

    def _data(self, directory: StageDirectory) -> dict[str, Any]:
        require_dev_held_out(self.recipe)
        labeler = make_labeler(self.recipe.labels)
        self._require_room()
        counts = {}
        for split, n in data_splits(self.recipe).items():
            documents = split_documents(self.recipe, split, n)
            answers = None if split in UNLABELLED else labeler
            rows = collect(self.source, self.recipe, documents, answers, prefix=split)
            write_rows(directory.checkpoint / f"{split}.parquet", rows, meta=self._dataset_meta(split))
            counts[split] = len(rows)
            self.listener.metrics("data", {"split": split, "documents": len(documents), "rows": len(rows)})
        return {"rows": counts}

    def _require_room(self) -> None:
        """Raise a RecipeError where the AV cannot write answers as long as the rl stage asks for."""
        limit = context_length(self.source.loaded.model.config)
        if self.recipe.rl is not None and limit is not None and self.recipe.rl.max_new_tokens >= limit:
            raise RecipeError(
                "The AV cannot write answers as long as this.",
                got=f"rl.max_new_tokens: {self.recipe.rl.max_new_tokens}",
                expected=f"fewer than the {limit} tokens that the base model reads, its prompt included",
                next_step="lower rl.max_new_tokens",
            )

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

    @cached_property
    def sidecars(self) -> tuple[Sidecar, Sidecar]:
        """Sidecars of AV and AR after the supervised stages."""
        return make_sidecars(
            self.recipe,
            self.source,
            self.rows("av_sft").vectors,
            base_name=self.base_name,
            revision=self._base_digest(),
        )

    # -- the halves ------------------------------------------------------------------------------------------

    def _ar(self, directory: StageDirectory) -> dict[str, Any]:
        summary = self._regression(directory, directory.checkpoint, None)
        if self.recipe.rl is not None and self.recipe.rl.watch_ar:
            summary[WATCH] = self._regression(directory, directory.path / WATCH, WATCH)
        return summary

    def _regression(self, directory: StageDirectory, place: Path, model_name: str | None) -> dict[str, Any]:
        """Train one AR and write it to `place`."""
        seed = self.recipe.seed + (0 if model_name is None else WATCH_SEED_OFFSET)
        torch.manual_seed(seed)
        _, sidecar = self.sidecars
        model = init_ar(self.source.loaded.adapter, self.source.loaded.model)
        result = train_ar(
            model,
            ARPrompt.build(self.source.tokenizer, sidecar),
            self.rows("ar_sft"),
            self.recipe.ar,
            seed=seed,
            report=self._reporter(directory, **({} if model_name is None else {"model": model_name})),
            held_out=self.rows("dev"),
            max_steps=self.max_steps,
            state=TrainingState(directory, model_name or "ar", model_name, self.processes),
        )
        self.processes.on_main(
            lambda: save_ar(place, model.trunk, model.head, self.source.tokenizer, sidecar, dtype=torch.float32)
        )
        return dataclasses.asdict(result)

    def _av(self, directory: StageDirectory) -> dict[str, Any]:
        torch.manual_seed(self.recipe.seed)
        sidecar, _ = self.sidecars
        loaded = load_causal_lm(self.base_directory, TRAINED)
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
            state=TrainingState(directory, "av", processes=self.processes),
        )
        self.processes.on_main(
            lambda: save_av(directory.checkpoint, loaded.model, tokenizer, sidecar, dtype=torch.float32)
        )
        return dataclasses.asdict(result)

    def _rl(self, directory: StageDirectory) -> dict[str, Any]:
        from nla_hub.training.rl.stage import train_rl

        torch.manual_seed(self.recipe.seed)
        watch = self.run.stage("ar").path / WATCH
        av, ar = (sidecar.with_(stage="rl") for sidecar in self.sidecars)
        summary: dict[str, Any] = train_rl(
            recipe=self.recipe,
            run_stage=directory,
            source=self.source,
            sidecars=(av, ar),
            av_directory=self.run.stage("av").checkpoint,
            ar_directory=self.run.stage("ar").checkpoint,
            watch_directory=watch if self.recipe.rl is not None and self.recipe.rl.watch_ar else None,
            rows=self.rows("rl"),
            label_rows=self.rows("ar_sft"),
            dev_rows=self.rows("dev"),
            report=self._reporter(directory),
            report_to=self.report_to,
            max_steps=self.max_steps,
        )
        return summary

    # -- the finished pair -----------------------------------------------------------------------------------

    def _export(self, directory: StageDirectory) -> dict[str, Any]:
        dtype, head_dtype = (getattr(torch, name) for name in (self.recipe.export.dtype, self.recipe.export.head_dtype))
        place = directory.checkpoint
        trained: dict[str, Any] = {
            "recipe": self.recipe.name,
            "recipe_hash": self.recipe.digest(),
            "seed": self.recipe.seed,
        }
        av_sidecar, ar_sidecar = self.sidecars
        av_place, ar_place = (self.run.stage(name).checkpoint for name in ("av", "ar"))
        if self.recipe.rl is not None:
            rl = self.run.stage("rl")
            trained["rl_steps"] = rl.summary().get("steps", self.recipe.rl.steps)
            av_sidecar, ar_sidecar = av_sidecar.with_(stage="rl"), ar_sidecar.with_(stage="rl")
            av_place, ar_place = rl.checkpoint / "av", rl.checkpoint / "ar"
        extra = {"training": trained, "created_by": "nla-hub"}
        av = load_causal_lm(av_place, self.options)
        save_av(place / "av", av.model, self.source.tokenizer, av_sidecar.with_(extra=extra), dtype=dtype)
        ar, head = load_ar(ar_place, ar_sidecar, self.options)
        save_ar(
            place / "ar",
            ar.model,
            head,
            self.source.tokenizer,
            ar_sidecar.with_(extra=extra),
            dtype=dtype,
            head_dtype=head_dtype,
        )
        if self.base_is_made_here:
            source = load_causal_lm(self.base_directory, self.options)
            save_source(place / "source", source.model, self.source.tokenizer, dtype=dtype)
        sizes = {p.name: _bytes(p) for p in sorted(place.iterdir()) if p.is_dir()}
        return {"bytes": sizes}

    def _eval(self, directory: StageDirectory) -> dict[str, Any]:
        nla = NLA.from_pretrained(self.pair_directory, base_model=self._exported_base())
        corpus = self._eval_corpus()
        result = run_protocol(
            nla,
            self.recipe.eval.protocol,
            corpus=corpus,
            **self._eval_size(),
            progress=lambda what, done, total: self.listener.metrics("eval", {"what": what, "done": done, "of": total}),
        )
        measured = capture_protocol(nla, result.protocol, corpus=corpus, facts=False)
        shared = require_held_out(self.recipe, measured.contents)
        record_score(self.pair_directory, result, measured.own.vectors)
        yaml_io.write_text(directory.path / "result.json", json.dumps(result.to_dict(), indent=1) + "\n")
        figures = {name: value for name, value in result.figures().items() if value is not None}
        return {**figures, "evaluation_documents_trained_on": shared}

    def _eval_corpus(self) -> Path | None:
        """The held-out documents of a protocol that has none of its own."""
        if get_protocol(self.recipe.eval.protocol).corpus is not None:
            return None
        return self.run.stage("data").checkpoint / EVALUATION_NAME

    def _eval_size(self) -> dict[str, Any]:
        documents = self.recipe.eval.documents
        if documents is not None:
            return {"documents": documents, "facts": False, "probe_documents": documents}
        return {"sampled": self.recipe.rl is not None}  # what the AV was paid for

    def _exported_base(self) -> Path:
        exported = self.pair_directory / "source"
        return exported if exported.is_dir() else self.base_directory


def _bytes(directory: Path) -> int:
    return sum(p.stat().st_size for p in directory.rglob("*") if p.is_file())
