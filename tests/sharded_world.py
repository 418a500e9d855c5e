"""What `test_sharding.py` runs in two processes with shards and, the same functions, in one without."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from nla_hub.checkpoints import load_ar
from nla_hub.export import save_av
from nla_hub.injection import Injector
from nla_hub.pretrained import LoadOptions, load_causal_lm, load_tokenizer
from nla_hub.prompts import ARPrompt, AVPrompt
from nla_hub.reconstructor import ARModel
from nla_hub.sidecar import Sidecar, Site
from nla_hub.testing import D_MODEL, LAYER, RandomPair
from nla_hub.training.ar_regression import train_ar
from nla_hub.training.av_sft import train_av
from nla_hub.training.data import TrainingRows
from nla_hub.training.halves import Halves
from nla_hub.training.loop import run_loop
from nla_hub.training.processes import Processes
from nla_hub.training.recipe import LoRASpec, StageSpec, load_recipe
from nla_hub.training.run import StageDirectory
from nla_hub.training.sharding import Execution, full_weights, local, mapped_options, shard, whole_model
from nla_hub.training.state import TrainingState

CPU = torch.device("cpu")
SPEC = StageSpec(documents=1, lr=1e-3, batch_size=7, epochs=2, micro_batch=2)

WORDS = ("the cat", "red house", "a river runs", "night song of an old dog", "old dog")


def some_rows(n: int, d: int, *, seed: int = 0) -> TrainingRows:
    generator = torch.Generator().manual_seed(seed)
    return TrainingRows(
        vectors=torch.randn(n, d, generator=generator) * 7,
        texts=tuple(WORDS[i % len(WORDS)] for i in range(n)),
        doc_ids=tuple(f"doc-{i}" for i in range(n)),
        positions=tuple(10 + i for i in range(n)),
        prefixes=tuple("the cat sees" for _ in range(n)),
        site=Site(LAYER),
    )


class World:
    """A pair on disk, and how its halves are trained."""

    def __init__(self, root: Path, execution: Execution, processes: Processes) -> None:
        self.root, self.execution, self.processes = root, execution, processes
        self.av, self.ar = root / "av", root / "ar"
        self.tokenizer = load_tokenizer(self.av)
        self.sidecar, self.ar_sidecar = Sidecar.read(self.av), Sidecar.read(self.ar)
        self.prompt = AVPrompt.build(self.tokenizer, self.sidecar)
        self.ar_prompt = ARPrompt.build(self.tokenizer, self.ar_sidecar)
        assert self.sidecar.marker is not None
        self.marker = self.sidecar.marker

    def options(self, directory: Path) -> LoadOptions:
        return mapped_options(directory) if self.execution.sharded else LoadOptions(device_map={"": "cpu"})

    def load_av(self, *, checkpointing: bool = False) -> tuple[Any, Injector]:
        loaded = load_causal_lm(self.av, self.options(self.av))
        loaded.model.requires_grad_(True)
        if checkpointing:
            loaded.model.gradient_checkpointing_enable({"use_reentrant": False})
        if self.execution.sharded:
            shard(loaded.model, loaded.adapter, self.execution, CPU)
        return loaded.model, Injector(loaded.adapter, self.sidecar.injection, self.marker)

    def load_ar(self) -> ARModel:
        trunk, head = load_ar(self.ar, self.ar_sidecar, self.options(self.ar))
        model = ARModel(trunk.adapter, trunk.model, head)
        model.requires_grad_(True)
        if self.execution.sharded:
            shard(model, model.adapter, self.execution, CPU)
        return model

    def state(self, name: str) -> TrainingState:
        stage = StageDirectory(self.root / f"stage-{self.processes.world}" / name)
        self.processes.on_main(lambda: stage.path.mkdir(parents=True, exist_ok=True))
        return TrainingState(stage, name, processes=self.processes)

    def train_ar(self, name: str, *, stop: int | None = None) -> dict[str, Any]:
        """As `train_av`."""
        model = self.load_ar()
        lines: list[dict[str, Any]] = []
        train_ar(
            model, self.ar_prompt, some_rows(23, D_MODEL), SPEC, seed=1, report=killing(lines, stop),
            held_out=some_rows(9, D_MODEL, seed=5), state=self.state(name), execution=self.execution,
        )  # fmt: skip
        halves = Halves(load_recipe("tiny"), self.root, self.processes)  # full weights: written as a stage writes them
        halves.write_ar(self.out(name), model, self.tokenizer, self.ar_sidecar)
        return {"lines": lines, "parts": parts(model)}

    def out(self, name: str) -> Path:
        return self.root / f"out-{self.processes.world}" / name

    def train_av(self, name: str, *, stop: int | None = None, checkpointing: bool = False) -> dict[str, Any]:
        """Two epochs, written at the end; with `stop` killed after so many steps, and continued by the next call."""
        model, injector = self.load_av(checkpointing=checkpointing)
        lines: list[dict[str, Any]] = []
        train_av(
            model, self.tokenizer, self.prompt, injector, some_rows(23, D_MODEL),
            dataclasses.replace(SPEC, gradient_checkpointing=checkpointing),
            seed=1, report=killing(lines, stop), held_out=some_rows(9, D_MODEL, seed=5), state=self.state(name),
            execution=self.execution,
        )  # fmt: skip
        whole = whole_model(model, keep=self.processes.is_main) if self.execution.sharded else model
        if whole is not None:
            save_av(self.out(name), whole, self.tokenizer, self.sidecar, dtype=torch.float32)
        return {"lines": lines, "parts": parts(model)}

    def logits(self) -> list[float]:
        model, injector = self.load_av()
        ids = torch.tensor([self.prompt.ids, self.prompt.ids])
        places = torch.full((2,), self.prompt.marker_position)
        with torch.inference_mode(), injector.inject(model, some_rows(2, D_MODEL).vectors, places):
            found: list[float] = model(input_ids=ids).logits.flatten().tolist()
        return found


class Killed(BaseException):
    """Stands for a signal that cannot be caught."""


def killing(lines: list[dict[str, Any]], stop: int | None) -> Any:
    def report(line: dict[str, Any]) -> None:
        lines.append({name: value for name, value in line.items() if name != "seconds"})
        if line["step"] == stop:
            raise Killed

    return report


def parts(model: torch.nn.Module) -> dict[str, list[Any]]:
    """Of each parameter: its kind, what of its values lies here, and how many there are."""
    return {
        name: [type(p).__name__, str(getattr(p, "placements", "")), local(p).numel(), p.numel()]
        for name, p in model.named_parameters()
    }


def supervised(world: World) -> dict[str, Any]:
    found: dict[str, Any] = {"logits": world.logits()}
    found["av"] = world.train_av("av", checkpointing=True)
    found["ar"] = world.train_ar("ar")
    copies = World(world.root, Execution(), world.processes)
    found["copies"] = copies.train_ar("copies")
    if world.processes.world > 1:
        for train in (world.train_av, world.train_ar):
            name = f"{train.__name__}-again"
            try:
                train(name, stop=7)
            except Killed:
                found[name] = train(name)["lines"]
    return found


def grpo(world: World, **changes: Any) -> dict[str, Any]:
    """Three steps with a reference and a second AR; of two processes the second has no usable sample in one of them."""
    from rl_world import make_trainer, random_rows

    processes = world.processes
    pair = RandomPair(world.root, world.root / "source", world.av, world.ar, Site(LAYER))
    trainer, watcher = make_trainer(
        pair, world.root / f"rl-{processes.world}", steps=3, watch=True, world=processes.world, rows=random_rows(16),
        labels=random_rows(9, seed=4), label_share=0.5, execution=world.execution, micro_batch=2, **changes,
    )  # fmt: skip
    rollouts: list[Any] = []
    sample = trainer._roll_out

    def kept(rows: Any) -> Any:
        rollout = sample(rows)
        if len(rollouts) == 1:  # the second half of the second step's samples
            rollout = dataclasses.replace(
                rollout, texts=tuple(t if rollout.first + i < 8 else None for i, t in enumerate(rollout.texts))
            )
        rollouts.append(rollout)
        return rollout

    trainer._roll_out = kept
    trainer.train()
    return {
        "figures": watcher.figures,
        "logs": watcher.logs,
        "samples": [[list(c.ids) for c in rollout.completions] for rollout in rollouts],
        "usable": [len(rollout.usable) for rollout in rollouts],
        "av": values(trainer.model),
        "ar": values(trainer.scoring.ar.model),
        "watch": values(trainer.scoring.watch.model),
        "parts": [parts(m) for m in (trainer.model, trainer.scoring.ar.model) if world.execution.sharded]
        + ([parts(trainer.ref_model)] if trainer.ref_model is not None else []),
    }


def stage(world: World) -> dict[str, Any]:
    """The conductor's run with evaluations and checkpoints: undisturbed, and killed after its third step and continued."""
    return {
        "whole": conducted(world, "whole"),
        "cut": conducted(world, "cut", stop=3),
        "again": conducted(world, "cut"),
    }


def conducted(world: World, name: str, *, stop: int | None = None) -> dict[str, Any]:
    from rl_world import make_trainer, random_rows

    from nla_hub.training.rl.dev_eval import DevEvaluation
    from nla_hub.training.rl.stage import Conductor

    processes = world.processes
    pair = RandomPair(world.root, world.root / "source", world.av, world.ar, Site(LAYER))
    directory = world.state(name).stage
    trainer, _ = make_trainer(
        pair, directory.state, steps=4, watch=True, world=processes.world, rows=random_rows(16), checkpoint_every=2,
        evaluate_every=2, execution=world.execution,
    )  # fmt: skip
    evaluation = DevEvaluation(random_rows(9, seed=3), world.ar_prompt, n=9, max_new_tokens=12, batch_size=2)
    lines: list[dict[str, Any]] = []
    conductor = Conductor(trainer, trainer.spec, evaluation, directory, killing(lines, stop), processes)
    try:
        conductor.run()
    except Killed:
        return {"lines": lines}
    return {"lines": lines, "av": values(trainer.model), "ar": values(trainer.scoring.ar.model)}


def values(model: torch.nn.Module) -> dict[str, list[float]]:
    """Some values of each parameter of the whole model."""
    found = {}
    for name, value in full_weights(model):
        flat = value.detach().flatten()
        found[name] = flat[:: max(1, flat.numel() // 50)].tolist()
    return found


def factors(world: World) -> dict[str, Any]:
    """`grpo` with factors on a frozen AV."""
    return grpo(world, lora=LoRASpec(r=4, alpha=8))


def rounded(world: World) -> dict[str, Any]:
    """`grpo` in bfloat16 under float32 weights."""
    world.execution = dataclasses.replace(world.execution, bf16=True)
    return grpo(world)


SECTIONS: dict[str, Callable[[World], dict[str, Any]]] = {
    "supervised": supervised,
    "grpo": grpo,
    "stage": stage,
    "factors": factors,
    "rounded": rounded,
}


def main() -> None:
    torch.set_num_threads(1)
    run_loop.__kwdefaults__["report_every"] = 1
    root = Path(sys.argv[1])
    processes = Processes.here()
    world = World(root, Execution(sharded=processes.world > 1), processes)
    for section in sys.argv[2:]:
        found = SECTIONS[section](world)
        (root / f"{section}-{processes.world}-{processes.rank}.json").write_text(json.dumps(found), encoding="utf-8")
    processes.close()


if __name__ == "__main__":
    main()
