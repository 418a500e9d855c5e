"""What each part of the rl stage is worth in the tiny world: one change at a time, from shared checkpoints, three seeds.

Runs everything (an hour and a half on one core; the same command continues where it stopped), or prints the page:

    python tests/ablations.py -o DIR              a JSON file a variant in DIR, what was trained in DIR/work
    python tests/ablations.py --page > docs/ablations.md

The page is made of docs/ablations/*.json, which are the files of such a run. An AR that lags behind its AV, or that never
learns, is no measure of a text. So a judge is trained for each finished AV: a new AR, on texts at vectors that no AV saw.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from torch import Tensor

    from nla_hub.engines.base import LoadedAV
    from nla_hub.prompts import ARPrompt
    from nla_hub.reconstructor import ARModel
    from nla_hub.sidecar import Sidecar
    from nla_hub.training.data import TrainingRows
    from nla_hub.training.pipeline import Pipeline
    from nla_hub.training.recipe import Recipe
    from nla_hub.training.rl.dev_eval import DevEvaluation
    from nla_hub.training.rl.rollouts import Rollout

RESULTS = Path(__file__).resolve().parents[1] / "docs" / "ablations"

COMMON = (
    "rl.documents=1000", "rl.steps=40", "rl.prompts=32", "rl.evaluate_rows=800", "rl.evaluate_every=20",
    "rl.reward.contrastive=0",
)  # fmt: skip
"""What every run changes in tiny-weak: fewer samples, so that one run takes a minute or two, and a base without extras."""

SEEDS = (0, 1, 2)

JUDGES = "judges.json"
"""Beside the results: FVEs by further judges, and of which variants."""

JUDGED_AGAIN = ("base", "control", "no-kl")


@dataclass(frozen=True)
class Variant:
    """One run a seed: the settings that differ from `COMMON`, and what the AV starts from."""

    name: str
    title: str
    changes: tuple[str, ...] = ()
    start: Literal["warm", "format", "source"] = "warm"


VARIANTS = (
    Variant("base", "base"),
    Variant("control", "AV frozen (control)", ("rl.lr=0",)),
    Variant("no-kl", "no KL", ("rl.beta=0",)),
    Variant("no-warm-start", "no warm start, form only", start="format"),
    Variant("source", "no warm start at all", ("rl.steps=3",), start="source"),
    Variant("frozen-ar", "AR frozen", ("rl.ar_lr=0",)),
    Variant("neg-log-mse", "-log mse", ("rl.reward.kind=neg_log_mse",)),
    Variant("lora", "LoRA", ("rl.lora.r=16", "rl.lora.alpha=32", "rl.lr=3e-3")),
    Variant("group-4", "group 4", ("rl.group=4", "rl.prompts=64")),
    Variant("group-16", "group 16", ("rl.group=16", "rl.prompts=16")),
    Variant("length-penalty", "length penalty", ("rl.reward.length_penalty=0.01",)),
    Variant("contrastive", "contrastive", ("rl.reward.contrastive=0.3",)),
)


@dataclass(frozen=True)
class Scale:
    """How large everything is: `overrides` of the recipe, rows and passes of a judge, a bound on supervised steps."""

    overrides: tuple[str, ...] = COMMON
    judge_rows: int = 8000
    judge_epochs: int = 2
    max_steps: int | None = None


class Silent:
    """A listener that keeps the evaluations and the last figures of a step."""

    def __init__(self) -> None:
        self.evaluations: dict[int, dict[str, Any]] = {}
        self.steps: list[dict[str, Any]] = []

    def stage(self, name: str, *, resumed: bool) -> None:
        """Of the pipeline."""

    def done(self, name: str, summary: dict[str, Any]) -> None:
        """Of the pipeline."""

    def metrics(self, name: str, metrics: dict[str, Any]) -> None:
        """Of the pipeline."""

    def report(self, metrics: dict[str, Any]) -> None:
        """Of the rl stage."""
        if "evaluation" in metrics:
            self.evaluations[metrics["step"]] = metrics["evaluation"]
        elif "seconds_policy" in metrics:
            self.steps.append(metrics)


# -- what is shared --------------------------------------------------------------------------------------------


class Start:
    """The data and the supervised halves of one seed, made once and read by every variant."""

    def __init__(self, place: Path, seed: int, scale: Scale) -> None:
        self.place, self.seed, self.scale = place, seed, scale
        self.make = self.pipeline(())
        self.make.execute(("source", "data", "ar", "av"))

    def recipe(self, changes: Sequence[str]) -> Recipe:
        """tiny-weak at this scale with a variant's changes."""
        from nla_hub.training.recipe import load_recipe

        return load_recipe("tiny-weak", [f"seed={self.seed}", *self.scale.overrides, *changes])

    def pipeline(self, changes: Sequence[str]) -> Pipeline:
        """A pipeline over the shared stages; only the rl section of its recipe may differ from theirs."""
        from nla_hub.training.pipeline import Pipeline
        from nla_hub.training.run import RunDirectory

        run = RunDirectory(self.place / "warm", self.recipe(()))
        changed = self.recipe(changes)
        assert dataclasses.replace(changed, rl=run.recipe.rl) == run.recipe
        return Pipeline(changed, run, Silent(), max_steps=self.scale.max_steps)

    @property
    def av(self) -> Path:
        """The AV of the warm start."""
        return self.make.run.stage("av").checkpoint

    @property
    def ar(self) -> Path:
        """The AR of the warm start."""
        return self.make.run.stage("ar").checkpoint

    @property
    def watch(self) -> Path:
        """The second AR of the warm start."""
        return self.make.run.stage("ar").path / "watch"

    def new_ar(self) -> Path:
        """An AR that has learned nothing: the source's own blocks and the identity."""
        import torch

        from nla_hub.export import save_ar

        place, made = self.place / "new-ar", self.make
        if not place.is_dir():
            model = made.halves.load_ar(made.sidecars[1])
            save_ar(place, model.trunk, model.head, made.base.tokenizer, made.sidecars[1], dtype=torch.float32)
        return place

    def format_av(self) -> Path:
        """An AV that was taught the form of labels alone: as the warm start's, but each label with a foreign vector."""
        import torch

        from nla_hub.export import save_av
        from nla_hub.training.av_sft import train_av
        from nla_hub.training.run import StageDirectory

        stage, made = StageDirectory(self.place / "format"), self.make
        if not stage.is_done:
            stage.begin(made.recipe)
            torch.manual_seed(self.seed)
            av = open_av(made.base.directory, made)
            rows = made.rows("av_sft")
            foreign = dataclasses.replace(rows, vectors=rows.vectors.roll(len(rows) // 2, dims=0))
            train_av(
                av.loaded.model, av.tokenizer, av.prompt, av.injector, foreign, made.recipe.av, seed=self.seed,
                report=stage.log, held_out=made.rows("dev"), max_steps=self.scale.max_steps,
            )  # fmt: skip
            save_av(stage.checkpoint, av.loaded.model, av.tokenizer, made.sidecars[0], dtype=torch.float32)
            stage.finish({})
        return stage.checkpoint


def open_av(directory: Path, made: Pipeline) -> LoadedAV:
    """The AV in a directory, float32, with the run's prompt and injection."""
    from nla_hub.engines.base import LoadedAV
    from nla_hub.injection import Injector
    from nla_hub.pretrained import load_causal_lm
    from nla_hub.prompts import AVPrompt
    from nla_hub.training.loop import TRAINED

    sidecar, tokenizer = made.sidecars[0], made.base.tokenizer
    assert sidecar.marker is not None
    loaded = load_causal_lm(directory, TRAINED)
    injector = Injector(loaded.adapter, sidecar.injection, sidecar.marker)
    return LoadedAV(loaded, tokenizer, AVPrompt.build(tokenizer, sidecar), injector)


def open_ar(directory: Path, sidecar: Sidecar) -> ARModel:
    """The AR in a directory, float32."""
    from nla_hub.checkpoints import load_ar
    from nla_hub.reconstructor import ARModel
    from nla_hub.training.loop import TRAINED

    trunk, head = load_ar(directory, sidecar, TRAINED)
    return ARModel(trunk.adapter, trunk.model, head)


# -- one run ---------------------------------------------------------------------------------------------------


def run_variant(variant: Variant, start: Start) -> dict[str, Any]:
    """Train a variant from the shared checkpoints and measure it; a killed run is continued."""
    import torch

    from nla_hub.evaluation.provenance import commit
    from nla_hub.training.rl.stage import train_rl
    from nla_hub.training.run import StageDirectory

    made = start.pipeline(variant.changes)
    recipe, spec = made.recipe, made.recipe.rl
    assert spec is not None
    warm = variant.start == "warm"
    starts = {"warm": lambda: start.av, "format": start.format_av, "source": lambda: made.base.directory}
    origin = starts[variant.start]()
    stage, heard = StageDirectory(start.place / variant.name), Silent()
    stage.begin(recipe)
    torch.manual_seed(start.seed)
    av_sidecar, ar_sidecar = (sidecar.with_(stage="rl") for sidecar in made.sidecars)
    summary = train_rl(
        halves=made.halves,
        run_stage=stage,
        base=made.base,
        sidecars=(av_sidecar, ar_sidecar),
        av_directory=origin,
        ar_directory=start.ar if warm else start.new_ar(),
        watch_directory=start.watch if warm else None,  # two new ARs would be one
        rows=made.rows("rl"),
        label_rows=made.rows("ar_sft"),
        dev_rows=made.rows("dev"),
        report=heard.report,
    )
    figures = measure(start, made, stage.checkpoint / "av", stage.checkpoint / "ar", origin)
    last = heard.evaluations.get(spec.steps)
    if last is not None and last["watch_cosine"] is not None:
        figures["fve"]["watch"] = 1.0 - 2.0 * (1.0 - last["watch_cosine"]) / figures["raw_variance"]
    seconds = [sum(step[f"seconds_{part}"] for part in ("rollout", "reward", "policy")) for step in heard.steps]
    return {
        **figures,
        "before": heard.evaluations.get(0) and _brief(heard.evaluations[0]),
        "gap": heard.steps[-1].get("gap") if heard.steps else None,
        "alarms": summary["alarms"],
        "seconds_a_step": statistics.median(seconds) if seconds else None,
        "settings": recipe.to_mapping()["rl"],
        "commit": commit(),
    }


def reading(made: Pipeline, av_place: Path) -> tuple[LoadedAV, Any, DevEvaluation, ARPrompt]:
    """A finished AV, its engine, the held-out evaluation, and the prompt of all ARs."""
    from nla_hub.engines.transformers import TransformersEngine
    from nla_hub.prompts import ARPrompt
    from nla_hub.training.rl.dev_eval import DevEvaluation
    from nla_hub.training.rl.stage import known_facts

    spec, dev = made.recipe.rl, made.rows("dev")
    assert spec is not None
    av = open_av(av_place, made)
    prompt = ARPrompt.build(av.tokenizer, made.sidecars[1], max_length=made.base.context)
    named, truth = known_facts(made.recipe, dev)
    evaluation = DevEvaluation(
        dev, prompt, n=spec.evaluate_rows, max_new_tokens=spec.max_new_tokens, batch_size=spec.rollout_block,
        named=named, truth=truth,
    )  # fmt: skip
    return av, TransformersEngine(av), evaluation, prompt


def measure(start: Start, made: Pipeline, av_place: Path, ar_place: Path, origin: Path) -> dict[str, Any]:
    """The held-out figures of a finished AV, by its own AR, by the warm start's and by a judge; see `Scale`."""
    from nla_hub.training.rl.rollouts import sample

    spec, sidecar = made.recipe.rl, made.sidecars[1]
    assert spec is not None
    av, engine, evaluation, prompt = reading(made, av_place)
    own = evaluation.measure(engine, open_ar(ar_place, sidecar))
    by_start = evaluation.measure(engine, open_ar(start.ar, sidecar))
    judge = make_judge(start, made, engine, prompt)
    judged = None if judge is None else evaluation.measure(engine, judge)
    rollout = sample(
        engine, evaluation.rows, range(own.n), spec, seed=start.seed, step=spec.steps
    )  # a step that was not trained on
    return {
        "n": own.n,
        "raw_variance": evaluation.reference.raw_variance,
        "fve": {"own": own.fve, "start": by_start.fve, "judge": None if judged is None else judged.fve},
        "cosine": {"own": own.cosine, "start": by_start.cosine, "judge": None if judged is None else judged.cosine},
        "shuffled": {"own": own.permuted, "judge": None if judged is None else judged.permuted},
        **_brief(own.to_dict()),
        "usable": own.statuses.get("ok", 0) / own.n,
        "usable_sampled": len(rollout.usable) / len(rollout),
        "kl": divergence(av, open_av(origin, made), rollout),
        "samples": [dataclasses.asdict(sample) for sample in own.samples[:3]],
    }


def make_judge(start: Start, made: Pipeline, engine: Any, prompt: Any, number: int = 0) -> ARModel | None:
    """A new AR trained on the AV's greedy texts at rows of the stream `ar_sft`; None where too few are usable.

    Judges differ by `number` in the order of their rows.
    """
    from nla_hub.prompts import parse_explanation
    from nla_hub.training.ar_regression import train_ar

    rows, spec = made.rows("ar_sft"), made.recipe.rl
    assert spec is not None
    count = min(start.scale.judge_rows, len(rows))
    taken = [i * len(rows) // count for i in range(count)]
    written = engine.generate(
        rows.vectors[taken], None, temperature=1.0, max_new_tokens=spec.max_new_tokens, batch_size=spec.rollout_block
    )
    texts = [parse_explanation(completion.text)[1] for completion in written]
    usable = [i for i, text in enumerate(texts) if text is not None and prompt.fits(text)]
    if 2 * len(usable) < count:
        return None
    judge = made.halves.load_ar(made.sidecars[1])
    chosen = _picked(rows, [taken[i] for i in usable], [str(texts[i]) for i in usable])
    settings = dataclasses.replace(made.recipe.ar, epochs=start.scale.judge_epochs)
    seed = start.seed + 7 + 100 * number
    train_ar(judge, prompt, chosen, settings, seed=seed, report=lambda _: None, max_steps=start.scale.max_steps)
    return judge


def more_judges(out: Path, *, names: Sequence[str], seeds: Sequence[int], scale: Scale, count: int = 2) -> None:
    """Judge finished AVs again, each by further judges: how far two judges of one AV are apart."""
    file = out / JUDGES
    found = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    for seed in seeds:
        start = Start(out / "work" / f"seed-{seed}", seed, scale)
        for name in names:
            if str(seed) in found.setdefault(name, {}):
                continue
            made = start.pipeline(next(variant.changes for variant in VARIANTS if variant.name == name))
            _, engine, evaluation, prompt = reading(made, start.place / name / "checkpoint" / "av")
            judges = [make_judge(start, made, engine, prompt, number) for number in range(1, count + 1)]
            found[name][str(seed)] = rounded([None if j is None else evaluation.measure(engine, j).fve for j in judges])
            file.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def divergence(policy: LoadedAV, origin: LoadedAV, rollout: Rollout) -> float:
    """KL(policy || origin) in nats a token of sampled texts, summed over the whole vocabulary at each token."""
    import torch

    from nla_hub.batching import pad_id_of, pad_right

    total, count, start = 0.0, 0, len(policy.prompt)
    with torch.inference_mode():
        for begin in range(0, len(rollout), 128):
            part = slice(begin, begin + 128)
            written = [list(c.ids) for c in rollout.completions[part]]
            ids, mask = pad_right([[*policy.prompt.ids, *w] for w in written], pad_id_of(policy.tokenizer))
            ours, theirs = (log_probabilities(av, ids, mask, rollout.vectors[part]) for av in (policy, origin))
            kl = (ours.exp() * (ours - theirs)).sum(-1) * mask[:, start:]
            total, count = total + float(kl.double().sum()), count + int(mask[:, start:].sum())
    return total / count


def log_probabilities(av: LoadedAV, ids: Tensor, mask: Tensor, vectors: Tensor) -> Tensor:
    """What an AV expects at each token after its prompt: float32 [rows, tokens, vocabulary]."""
    import torch

    columns = torch.full((len(ids),), av.prompt.marker_position)
    with av.injector.inject(av.loaded.model, vectors, columns):
        logits = av.loaded.model(input_ids=ids, attention_mask=mask).logits[:, len(av.prompt) - 1 : -1]
    return torch.log_softmax(logits.float(), dim=-1)


def _picked(rows: TrainingRows, taken: Sequence[int], texts: Sequence[str]) -> TrainingRows:
    return dataclasses.replace(
        rows,
        vectors=rows.vectors[list(taken)],
        texts=tuple(texts),
        **{name: tuple(getattr(rows, name)[i] for i in taken) for name in ("doc_ids", "positions", "prefixes")},
    )


def _brief(evaluation: Mapping[str, Any]) -> dict[str, Any]:
    """The text's own figures from an evaluation; `claims` are facts named a row, `right` the correct share of them all."""
    facts = evaluation["facts"]
    rows = [row for row in facts["rows"] if row["named"]]
    named = sum(row["named"] for row in rows)
    return {
        "recall": facts["recall"],
        "precision": facts["precision"],
        "claims": named / evaluation["n"],
        "right": sum(row["named"] * row["precision"] for row in rows) / named if named else None,
        "facts": {row["fact"]: [row["n"], row["recall"], row["named"], row["precision"]] for row in facts["rows"]},
        "words": evaluation["words"],
        "repetition": evaluation["repetition"],
    }


# -- all of them -----------------------------------------------------------------------------------------------


def run_all(
    out: Path, *, seeds: Sequence[int], variants: Sequence[Variant], scale: Scale, say: Callable[[str], None]
) -> None:
    """Every variant of every seed that has no result in `out` yet."""
    out.mkdir(parents=True, exist_ok=True)
    for seed in seeds:
        start: Start | None = None
        for variant in variants:
            file = out / f"{variant.name}.json"
            found = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
            if str(seed) in found:
                continue
            start = start or Start(out / "work" / f"seed-{seed}", seed, scale)
            found[str(seed)] = rounded(run_variant(variant, start))
            file.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
            fve = found[str(seed)]["fve"]
            say(f"seed {seed}  {variant.name}: FVE {fve}")


def rounded(value: Any) -> Any:
    """Floats with five significant figures, in whatever holds them."""
    if isinstance(value, float):
        return float(f"{value:.5g}")
    if isinstance(value, Mapping):
        return {key: rounded(item) for key, item in value.items()}
    return [rounded(item) for item in value] if isinstance(value, (list, tuple)) else value


# -- the page --------------------------------------------------------------------------------------------------

INTRODUCTION = """\
<!-- Generated: python tests/ablations.py --page > docs/ablations.md -->
# Ablations in the tiny world

What the parts of the rl stage do: one thing changed at a time, all runs of a seed from the same supervised checkpoints.

The base is [`recipes/tiny-weak.yaml`](../recipes/tiny-weak.yaml) without its contrastive term and with fewer samples:
labels that tell a third of what is known, full weights, `-mse`, `beta=0.1`, [[steps]] steps of [[samples]] samples in
groups of 8. A seed has its own documents, labels, AV and ARs, made once; the source model is the packaged one. Figures
are from [[n]] held-out rows a seed, explained greedily; FVE is against their raw variance. A cell is the mean and, in
brackets, each seed.

```bash
python tests/ablations.py -o runs/ablations
```

**Nothing was tuned for these runs.** Learning rates and `beta` are those that tiny-weak was given on seed 0, for more
and larger steps and with the contrastive term; the LoRA's rate and rank and the length penalty are first guesses. A
variant that does worse here may do better with settings of its own. Measured at commit [[commits]].

## Who reads the texts

FVE belongs to a text and the AR that reads it, so the texts of each AV are read by four:

- *its own AR*: the one that paid, as it came out of the run;
- *the watching AR*: trained beside it on the same samples, without ever paying. Where the AR is frozen, this one is
  too;
- *the judge*: a new AR with the identity as head, which has seen no label: two passes over the finished AV's greedy
  texts at 8,000 other rows. Only this one is made alike for all, so only this one can compare an AR that stood still
  with one that learned;
- *the warm start's AR*: has learned from nothing but labels. It shows how far an AV still speaks as the labels do.
"""

TABLES = """\
## What was measured

FVE, and the cosine of two of the readers:

[[readers]]

*Judge, shuffled*: the same texts at rows of other documents. An output without a usable text counts as the orthogonal
direction, which is an FVE of 1 - 2 / variance: [[orthogonal]].

Two judges of one AV differ too. FVE by the judge above and by two more, which saw the rows in another order:

[[judges]]

What the texts tell:

[[texts]]

*Recall* and *precision* are means over the facts that at least 20 rows have or name, so precision is a mean over other
facts where other facts are named. *Of these right* counts all claims alike, easy ones too.

[[training]]

*KL* is the divergence of the finished AV from its own start, over the whole vocabulary, a token of sampled texts:
measured alike for all, with a KL term in training or without. A step took [[seconds]] s (medians of the runs) on one
thread of a machine that did other work as well, so times are not compared.

### Seed by seed against the base

Runs of a seed share start, vectors and held-out rows, so these differences say more than the columns above.

[[differences]]

### What they say

The first held-out rows of the first seed:

[[examples]]
"""

CONCLUSIONS = """\
## What each shows, and what it cannot

Judges of one AV were up to [[spread]] apart. Three seeds can show a direction where all of them agree and, by the
judge, differ by more than that; they can hardly show how large an effect is.

**First of all, the AR learns.** The control's AV does not move: its texts are the warm start's. To the warm start's AR
they are worth [[control fve.start]], to the same AR after the run's steps on them [[control fve.own]], to the judge
[[control fve.judge]]. The base's own AR reads [[base fve.own]] where the judge reads [[base fve.judge]]. So RL lifts
the pair's own FVE by far more than the judge's: control minus base is [[diff control fve.own]] by their own ARs,
[[diff control fve.judge]] by judges. We read this as two halves that mostly learn to understand each other in a run as
short as this; recall *falls* on all three seeds. It cannot show a long run, in which the AR catches up.

**No KL.** By its own AR nothing is lost: [[diff no-kl fve.own]]. By the judge and in recall it is worse on all three
seeds ([[diff no-kl fve.judge]] and [[diff no-kl recall]]): the AV goes further from its start ([[no-kl kl]] nats a
token against [[base kl]]) and drops clauses. It cannot show that `beta=0.1` is right, nor that KL keeps a language
readable: with it and without nearly all outputs are well-formed.

**No warm start.** From the bare source not one greedy or sampled text is usable, so all rewards are equal and GRPO has
no gradient: three steps were run, and the AV is bit for bit what it was. *Form only* is an AV trained as the warm
start's, but with each label at a foreign vector, and a new AR. It writes labels that hardly depend on the vector, and
after the run still does: judge [[each no-warm-start fve.judge]], shuffled [[each no-warm-start shuffled.judge]]. The
monitor's `vector_ignored` says so before the first step. The third seed has begun to tell rows apart, with claims that
are nearly all wrong. It cannot show whether many more steps would lead to true texts or to a private code: nothing was
learned that could be either.

**AR frozen.** Its own AR has not learned, so its own FVE is no comparison. To the judge the texts are worth as much as
the base's on two seeds and less on one ([[diff frozen-ar fve.judge]]), and more of their claims are right on all three
([[diff frozen-ar right]]). A reward that stands still did no harm on two seeds in so few steps. It cannot show what is
feared of a frozen AR, gaming, which takes longer. A first sign of an AV that suits the one AR that pays is in every run
from the warm start in which the AV moved, the AR frozen or not: the watching AR reads less out of the same texts, by up
to [[gap]].

**-log mse against -mse.** No direction: [[diff neg-log-mse fve.judge]] by the judge. With advantages normalised in each
group the two differ only in how they weigh the samples of a group. It cannot show a difference far from this range of
mse.

**LoRA against full weights.** By the judge as good as full weights ([[diff lora fve.judge]]), and more claims are right
on all three seeds ([[diff lora right]]). Rank 16 at five times the learning rate, on a model of width 128: that is no
low rank, and says nothing of memory or of large models. Nor does a share of right claims say that more is known: a text
that names more of the easy facts has a higher one.

**Group size** at equal samples a step. Groups of 4, with twice as many vectors, are better by their own AR on all three
seeds ([[diff group-4 fve.own]]), by the judge too, on one seed by less than two judges differ
([[diff group-4 fve.judge]]). Groups of 16 are worse by their own AR on all three ([[diff group-16 fve.own]]) and not by
the judge ([[diff group-16 fve.judge]]). It cannot separate the size of a group from the number of vectors, nor tell
what holds at 512 samples.

**Length penalty**, 0.01 a token. All three seeds end at two words, the next one and hardly anything else: recall
[[length-penalty recall]] against [[base recall]], and less by the judge ([[diff length-penalty fve.judge]]). The pair's
own FVE does not notice ([[diff length-penalty fve.own]]). It cannot show that a smaller penalty is bad: what counts is
the price of a clause against what the clause wins, and neither was varied.

**Contrastive term**, 0.3. Higher by its own AR on all three seeds, by little ([[diff contrastive fve.own]]), no
direction by the judge ([[diff contrastive fve.judge]]) or in recall. It cannot show what the term is for, the same text
for every vector: from a warm start that was not happening.

For all of them: one source model, one small grammar, labels from a program, a weak warm start, [[steps]] steps. How far
two runs of the same seed with other samples are apart was not measured. Nothing here is about natural text or models of
another size; [tiny-rl.md](tiny-rl.md) has longer runs, on the evaluation's own documents.
"""

Runs = Mapping[str, Mapping[str, Any]]
"""Seed -> what `run_variant` returned."""

Judged = Mapping[str, Mapping[str, Sequence[float]]]
"""Variant -> seed -> FVEs by further judges."""


def read_results(directory: Path) -> dict[str, Runs]:
    """The results of every variant that has a file, in the order of `VARIANTS`."""
    files = {v.name: directory / f"{v.name}.json" for v in VARIANTS}
    return {name: json.loads(file.read_text(encoding="utf-8")) for name, file in files.items() if file.is_file()}


def figure(run: Mapping[str, Any], path: str) -> float | None:
    """A figure by its dotted path."""
    value: Any = run
    for part in path.split("."):
        value = value.get(part)
    return None if value is None else float(value)


def cell(values: Sequence[float | None], pattern: str = ".3f") -> str:
    """The mean and each seed's value."""
    known = [v for v in values if v is not None]
    if len(known) < len(values):
        return "not measured" if not known else ", ".join("none" if v is None else f"{v:{pattern}}" for v in values)
    return f"{statistics.mean(known):{pattern}} ({', '.join(f'{v:{pattern}}' for v in known)})"


def table(results: Mapping[str, Runs], columns: Mapping[str, tuple[str, str]]) -> str:
    """A row a variant; `columns` map a title to a figure's path and a format."""
    from nla_hub.evaluation.render import markdown_table

    rows = [
        (titles()[name], *(cell([figure(run, path) for run in runs.values()], form) for path, form in columns.values()))
        for name, runs in results.items()
    ]
    return markdown_table(("", *columns), rows)


def differences(results: Mapping[str, Runs], columns: Mapping[str, str]) -> str:
    """A row a variant: its figure minus the base's, seed by seed."""
    from nla_hub.evaluation.render import markdown_table

    base, rows = results["base"], []
    for name, runs in results.items():
        if name in ("base", "source"):
            continue
        cells = []
        for path in columns.values():
            values = [figure(run, path) for run in runs.values()]
            cells.append(cell(minus(values, [figure(base[seed], path) for seed in runs]), "+.3f"))
        rows.append((titles()[name], *cells))
    return markdown_table(("", *columns), rows)


def examples(results: Mapping[str, Runs]) -> str:
    """What each variant of the first seed says of the same vectors."""
    from nla_hub.evaluation.render import markdown_table

    shown = {name: next(iter(runs.values()))["samples"] for name, runs in results.items()}
    first = next(iter(shown.values()))
    heads = [f"...{sample['context'][-45:]}" for sample in first]
    rows = [("its label", *(sample["gold"] for sample in first))]
    for name, samples in shown.items():
        rows.append((titles()[name], *(s["text"] if s["text"] is not None else f"({s['status']})" for s in samples)))
    return markdown_table(("", *heads), rows)


def titles() -> dict[str, str]:
    """What the page calls the variants."""
    return {variant.name: variant.title for variant in VARIANTS}


READERS = {
    "its own AR": ("fve.own", ".3f"),
    "the watching AR": ("fve.watch", ".3f"),
    "the judge": ("fve.judge", ".3f"),
    "the warm start's AR": ("fve.start", ".3f"),
    "judge, shuffled": ("shuffled.judge", ".3f"),
    "cosine, its own AR": ("cosine.own", ".3f"),
    "cosine, judge": ("cosine.judge", ".3f"),
}
TEXTS = {
    "recall": ("recall", ".3f"),
    "precision": ("precision", ".3f"),
    "claims a text": ("claims", ".2f"),
    "of these right": ("right", ".3f"),
    "words": ("words", ".1f"),
    "repeated pairs": ("repetition", ".3f"),
}
TRAINING = {
    "usable, greedy": ("usable", ".3f"),
    "usable, sampled": ("usable_sampled", ".3f"),
    "KL, nats a token": ("kl", ".3f"),
}
DIFFERENCES = {
    "FVE, its own AR": "fve.own",
    "FVE, judge": "fve.judge",
    "recall": "recall",
    "of the claims right": "right",
}

PLACE = re.compile(r"\[\[(?P<what>[^\]]+)\]\]")


def page(directory: Path) -> str:
    """The page from the results in a directory."""
    results = read_results(directory)
    runs = [run for every in results.values() for run in every.values()]
    spec = next(iter(results["base"].values()))["settings"]
    seconds = [run["seconds_a_step"] for run in runs]
    gaps = [run["fve"]["own"] - run["fve"]["watch"] for run in runs if "watch" in run["fve"]]
    more = json.loads((directory / JUDGES).read_text(encoding="utf-8"))

    texts = {name: every for name, every in results.items() if name != "source"}
    values = {
        "steps": str(spec["steps"]),
        "samples": str(spec["prompts"] * spec["group"]),
        "n": ", ".join(sorted({str(run["n"]) for run in runs})),
        "orthogonal": cell([1 - 2 / run["raw_variance"] for run in results["base"].values()]),
        "commits": ", ".join(sorted({run["commit"] for run in runs})),
        "seconds": f"{min(seconds):.1f} to {max(seconds):.1f}",
        "readers": table(results, READERS),
        "gap": f"{max(gaps):.2f}",
        "spread": f"{spread(results, more):.3f}",
        "judges": judges(results, more),
        "texts": table(texts, TEXTS),
        "training": table(results, TRAINING),
        "differences": differences(results, DIFFERENCES),
        "examples": examples(texts),
    }

    def fill(found: re.Match[str]) -> str:
        what = found["what"]
        return values[what] if what in values else quoted(results, what)

    return PLACE.sub(fill, "\n".join((INTRODUCTION, TABLES, CONCLUSIONS)))


def quoted(results: Mapping[str, Runs], what: str) -> str:
    """A figure in a sentence: "NAME PATH" is its mean, "each NAME PATH" has each seed's, "diff NAME PATH" minus the base's."""
    *kind, name, path = what.split()
    values = [figure(run, path) for run in results[name].values()]
    if kind == ["each"]:
        return cell(values, ".2f")
    if kind == ["diff"]:
        return cell(minus(values, [figure(results["base"][seed], path) for seed in results[name]]), "+.3f")
    return cell(values, ".2f").split()[0]


def minus(values: Sequence[float | None], others: Sequence[float | None]) -> list[float | None]:
    """Differences, None where one of the two is not known."""
    return [None if a is None or b is None else a - b for a, b in zip(values, others, strict=True)]


def verdicts(results: Mapping[str, Runs], more: Judged) -> dict[str, list[list[float]]]:
    """For each variant that was judged again, each seed's FVEs by all its judges."""
    return {
        name: [[results[name][seed]["fve"]["judge"], *found] for seed, found in seeds.items()]
        for name, seeds in more.items()
    }


def spread(results: Mapping[str, Runs], more: Judged) -> float:
    """How far judges of one AV are apart at most."""
    return max(max(fves) - min(fves) for seeds in verdicts(results, more).values() for fves in seeds)


def judges(results: Mapping[str, Runs], more: Judged) -> str:
    """What each judge of an AV reads, a column a seed."""
    from nla_hub.evaluation.render import markdown_table

    rows = [
        (titles()[name], *(", ".join(f"{fve:.3f}" for fve in fves) for fves in seeds))
        for name, seeds in verdicts(results, more).items()
    ]
    return markdown_table(("", *(f"seed {seed}" for seed in next(iter(more.values())))), rows)


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path, help="where results and checkpoints go")
    parser.add_argument("--page", action="store_true", help="print the page instead")
    parser.add_argument("--only", nargs="+", choices=[v.name for v in VARIANTS], help="only these variants")
    arguments = parser.parse_args()
    if arguments.page:
        print(page(RESULTS), end="")
        return
    if arguments.output is None:
        parser.error("name a directory with -o, or ask for the --page")
    import torch

    torch.set_num_threads(1)
    chosen = [v for v in VARIANTS if not arguments.only or v.name in arguments.only]
    run_all(
        arguments.output,
        seeds=SEEDS,
        variants=chosen,
        scale=Scale(),
        say=lambda line: print(line, flush=True),
    )
    again = [variant.name for variant in chosen if variant.name in JUDGED_AGAIN]
    more_judges(arguments.output, names=again, seeds=SEEDS, scale=Scale())


if __name__ == "__main__":
    main()
