"""The stages of a run: source -> data -> ar -> av -> (rl) -> export -> eval, each resumable by its DONE.

What they are made of lies elsewhere: `stages.py` (names and order), `checks.py` (what is refused at once), `splits.py`
(which documents), `data.py` (rows), `contract.py` (sidecars and the score), `loop.py` (the supervised loop), `rl/`,
`run.py` (the directory), `state.py` (what a killed stage continues from), `processes.py` (several processes).
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from nla_hub import yaml_io
from nla_hub.errors import RecipeError, RunError
from nla_hub.evaluation import get_protocol, run_protocol
from nla_hub.evaluation.protocol_rows import capture_protocol
from nla_hub.export import save_source
from nla_hub.injection import Injector
from nla_hub.nla import NLA
from nla_hub.pretrained import load_causal_lm
from nla_hub.prompts import ARPrompt, AVPrompt
from nla_hub.sidecar import Sidecar
from nla_hub.training.ar_regression import train_ar
from nla_hub.training.av_sft import train_av
from nla_hub.training.base import Base
from nla_hub.training.checks import check_recipe
from nla_hub.training.contract import make_sidecars, record_score
from nla_hub.training.data import TrainingRows, make_labeler, read_rows
from nla_hub.training.data_stage import prepare_rows
from nla_hub.training.halves import Halves
from nla_hub.training.labelers import LabelContext, opened
from nla_hub.training.machine import machine_record
from nla_hub.training.marker import require_marker
from nla_hub.training.pair_export import export_pair, pair_options
from nla_hub.training.recipe import Recipe
from nla_hub.training.run import LABELS, MACHINE, RunDirectory, StageDirectory, timed, writing_run
from nla_hub.training.splits import EVALUATION_NAME, require_held_out
from nla_hub.training.stages import IN_ALL_PROCESSES, Listener, require_stages, stages_of
from nla_hub.training.state import TrainingState
from nla_hub.training.view.report import write_report
from nla_hub.weights import file_hashes

if TYPE_CHECKING:
    pass

WATCH = "watch"
"""The second AR: its folder in the stage `ar`, and the "model" of its lines in metrics.jsonl."""

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

    def execute(self, stages: Sequence[str] | None = None) -> Path:
        """Run the stages that are not done yet (None: all); returns the directory of the finished pair.

        Raises:
            TrainingError, RunError, CheckpointError and what the stages' parts raise; done stages are kept.
        """
        stages = stages_of(self.recipe) if stages is None else stages
        require_stages(self.recipe, stages)
        check_recipe(self.recipe, world=self.processes.world)
        with writing_run(self.run.path), self.run:
            try:
                ran = [self._execute(name) for name in stages]
            except BaseException:
                with suppress(OSError):  # a full disk says so itself
                    self._report()
                raise
            if any(ran):
                self._report()
        return self.pair_directory

    def _report(self) -> None:
        if self.processes.is_main:
            write_report(self.run.path)

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
            record = {**summary, MACHINE: machine_record(self.processes)}
            self.processes.on_main(lambda: directory.finish(record))
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
        return self.base.make(directory, self._reporter(directory), max_steps=self.max_steps)

    @cached_property
    def base(self) -> Base:
        """The base model of this run."""
        return Base(self.recipe, self.run.stage("source").checkpoint)

    @cached_property
    def halves(self) -> Halves:
        """How this run's halves are loaded and written while they are trained."""
        return Halves(self.recipe, self.base.directory, self.processes)

    # -- data ------------------------------------------------------------------------------------------------

    def _data(self, directory: StageDirectory) -> dict[str, Any]:
        self.processes.on_main(self._require_usable)
        try:
            return prepare_rows(
                self.recipe,
                directory,
                self.processes,
                source=self.base.trunk,
                labeler=lambda: opened(make_labeler(self.recipe.labels), self._label_context(directory)),
                meta=self._dataset_meta,
                report=lambda figures: self.listener.metrics("data", figures),
            )
        finally:
            self.base.drop()

    def _label_context(self, directory: StageDirectory) -> LabelContext:
        return LabelContext(
            directory=self.run.path / LABELS,
            base=f"{self.base.name}@{self.base.digest}",
            source=self.base.complete,
            report=self._reporter(directory),
        )

    def _require_usable(self) -> None:
        """Raise a RecipeError for what later stages would stumble over once all vectors are there.

        A marker that this tokenizer cannot use, and answers longer than the AV can write.
        """
        require_marker(self.base.tokenizer, self.recipe.marker, self.recipe.prompts.av)
        limit = self.base.context
        if self.recipe.rl is not None and limit is not None and self.recipe.rl.max_new_tokens >= limit:
            raise RecipeError(
                "The AV cannot write answers as long as this.",
                got=f"rl.max_new_tokens: {self.recipe.rl.max_new_tokens}",
                expected=f"fewer than the {limit} tokens that the base model reads, its prompt included",
                next_step="lower rl.max_new_tokens",
            )

    def _dataset_meta(self, split: str) -> dict[str, Any]:
        data = self.recipe.data
        return {
            "stage": split,
            "extraction": {
                "base_model": self.base.name,
                "d_model": self.base.d_model,
                "layer_index": self.recipe.layer,
                "norm": "none",
                "corpus": data.corpus or ", ".join(part.data for part in data.mix),
                "positions_per_doc": data.positions,
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
            self.base.tokenizer,
            self.rows("av_sft").vectors,
            base_name=self.base.name,
            revision=self.base.digest,
        )

    @cached_property
    def _rl_sidecars(self) -> tuple[Sidecar, Sidecar]:
        av, ar = self.sidecars
        return av.with_(stage="rl"), ar.with_(stage="rl")

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
        model = self.halves.load_ar(sidecar, seed=seed)
        result = train_ar(
            model,
            ARPrompt.build(self.base.tokenizer, sidecar),
            self.rows("ar_sft"),
            self.recipe.ar,
            seed=seed,
            report=self._reporter(directory, **({} if model_name is None else {"model": model_name})),
            held_out=self.rows("dev"),
            max_steps=self.max_steps,
            state=TrainingState(directory, model_name or "ar", model_name, self.processes),
            execution=self.halves.ar_execution,
        )
        self.halves.write_ar(place, model, self.base.tokenizer, sidecar)
        return dataclasses.asdict(result)

    def _av(self, directory: StageDirectory) -> dict[str, Any]:
        torch.manual_seed(self.recipe.seed)
        sidecar, _ = self.sidecars
        loaded = self.halves.load_av()
        tokenizer = self.base.tokenizer
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
            execution=self.halves.av_execution,
        )
        self.halves.write_av(directory.checkpoint, loaded.model, tokenizer, sidecar)
        return dataclasses.asdict(result)

    def _rl(self, directory: StageDirectory) -> dict[str, Any]:
        from nla_hub.training.rl.stage import train_rl

        torch.manual_seed(self.recipe.seed)
        watch = self.run.stage("ar").path / WATCH
        summary: dict[str, Any] = train_rl(
            halves=self.halves,
            run_stage=directory,
            base=self.base,
            sidecars=self._rl_sidecars,
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
        place = directory.checkpoint
        sidecars, rl_steps = self.sidecars, None
        kept = (self.run.stage("av").checkpoint, self.run.stage("ar").checkpoint)
        if self.recipe.rl is not None:
            rl = self.run.stage("rl")
            rl_steps = rl.summary().get("steps", self.recipe.rl.steps)
            sidecars, kept = self._rl_sidecars, (rl.checkpoint / "av", rl.checkpoint / "ar")
        export_pair(self.halves, self.base.tokenizer, sidecars, kept, place, rl_steps=rl_steps)
        if self.base.is_made_here:
            options = pair_options(self.recipe)
            source = load_causal_lm(self.base.directory, options)
            save_source(place / "source", source.model, self.base.tokenizer, dtype=options.torch_dtype())
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
        shared = require_held_out(self.recipe, measured.contents, self.run.stage("data").checkpoint)
        record_score(self.pair_directory, result, measured.own.vectors)
        yaml_io.write_text(directory.path / "result.json", json.dumps(result.to_dict(), indent=1) + "\n")
        figures = {name: value for name, value in result.figures().items() if value is not None}
        weights = {role: file_hashes(self.pair_directory / role) for role in ("av", "ar")}
        return {**figures, "evaluation_documents_trained_on": shared, "weights": weights}

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
        return exported if exported.is_dir() else self.base.directory


def _bytes(directory: Path) -> int:
    return sum(p.stat().st_size for p in directory.rglob("*") if p.is_file())
