"""The sections of a recipe: what each setting means, and the rules that its type cannot say."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

from nla_hub.errors import RecipeError
from nla_hub.sidecar import EXPLANATION_PLACEHOLDER, INJECTION_PLACEHOLDER


@dataclass(frozen=True)
class BaseSpec:
    """The model that is explained.

    Attributes:
        model: as `--nla` names models; None where the recipe is for any and the user says which (base.model=OWNER/NAME).
        revision: of the Hub.
        train: how to make it from nothing (tiny world only); else it is loaded.
        quantization: how the frozen weights under LoRA factors are packed (bitsandbytes); only with `Recipe.lora`.
        config: what its config.json says about the text model, as far as sizes and architecture depend on it: what a plan and
            a rehearsal know without the network. A base whose config says otherwise is refused.
        stand_in: the config of a tiny random model that is made in its place (a rehearsal).
    """

    model: str | None
    revision: str | None = None
    train: dict[str, int | float] | None = None
    quantization: Literal["nf4", "int8"] | None = None
    config: dict[str, Any] | None = None
    stand_in: dict[str, Any] | None = None

    @property
    def name(self) -> str:
        """The model's name; an error where the user has to say it."""
        if self.model is None:
            raise RecipeError(
                "This recipe is for any model, and none was named.",
                next_step="add base.model=OWNER/NAME to the command",
            )
        return self.model


@dataclass(frozen=True)
class PromptSpec:
    """The two templates: `av` holds {injection_char} once, `ar` holds {explanation} once."""

    av: str
    ar: str

    def faults(self) -> Iterator[str]:
        """Templates without their one placeholder."""
        for name, text, placeholder in (
            ("av", self.av, INJECTION_PLACEHOLDER),
            ("ar", self.ar, EXPLANATION_PLACEHOLDER),
        ):
            if text.count(placeholder) != 1:
                yield f"{name}: {placeholder} stands {text.count(placeholder)} times, expected once"


@dataclass(frozen=True)
class InjectionSpec:
    """How vectors enter the AV. `scale` "p75" is the 75th percentile of the raw norms of the training vectors."""

    kind: Literal["overwrite", "add"] = "overwrite"
    scale: float | Literal["p75"] = "p75"

    def faults(self) -> Iterator[str]:
        """A scale that is no length."""
        if not isinstance(self.scale, str) and not self.scale > 0:
            yield f"scale: got {self.scale}, expected a positive number or p75"


@dataclass(frozen=True)
class CorpusPart:
    """Documents of one place in a mixture.

    Attributes:
        data: a file, a directory, a pattern, or a data set of the Hub; names as in `nla-hub explain --data`.
        weight: its share of the mixture's documents, beside the others' weights.
        column, messages: the column with texts or with conversations (None: found by its usual name).
        split: of a data set of the Hub.
    """

    data: str
    weight: float = 1.0
    column: str | None = None
    messages: str | None = None
    split: str | None = None

    def faults(self) -> Iterator[str]:
        """A weight that is none, two columns."""
        if not self.weight > 0:
            yield f"weight: got {self.weight}, expected a value above 0"
        if self.column is not None and self.messages is not None:
            yield "messages: column is given too; a document is a text or a conversation"


@dataclass(frozen=True)
class DataSpec:
    """Which tokens are captured: `positions` distinct ones a document, at or after `min_position`, none special.

    Attributes:
        corpus: name of a registered corpus; or None, and `mix` says where documents come from.
        mix: places whose documents are mixed by weight.
        max_tokens: documents are cut after this many tokens (None: where the base model ends).
    """

    corpus: str | None = None
    mix: tuple[CorpusPart, ...] = ()
    positions: int = 8
    min_position: int = 10
    max_tokens: int | None = None

    def faults(self) -> Iterator[str]:
        """Counts out of range, no documents, two kinds of them."""
        if (self.corpus is None) == (not self.mix):
            yield "corpus: expected either the name of a corpus or a mix, not both"
        if self.max_tokens is not None and self.max_tokens <= self.min_position:
            yield f"max_tokens: got {self.max_tokens}, expected more than min_position = {self.min_position}"
        if self.positions < 1:
            yield f"positions: got {self.positions}, expected 1 or more"
        if self.min_position < 0:
            yield f"min_position: got {self.min_position}, expected 0 or more"


@dataclass(frozen=True)
class LabelSpec:
    """Who writes the warm-start labels: the name of a registered labeler and its own settings."""

    labeler: str
    settings: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class StageSpec:
    """One supervised stage: AdamW, linear warm-up, cosine decay to `final_lr` times the peak.

    `documents` are drawn for this stage alone; a batch has `batch_size` rows over all processes together, of which each process
    runs at most `micro_batch` at once (None: all of its share).
    """

    documents: int
    lr: float
    batch_size: int = 64
    epochs: int = 1
    warmup: float = 0.05
    final_lr: float = 0.05
    weight_decay: float = 0.01
    beta2: float = 0.95
    clip: float = 1.0
    micro_batch: int | None = None
    gradient_checkpointing: bool = False

    def faults(self) -> Iterator[str]:
        """Numbers that no training can use."""
        for name in ("documents", "lr", "batch_size", "epochs", "clip", "micro_batch"):
            if getattr(self, name) is not None and not getattr(self, name) > 0:
                yield f"{name}: got {getattr(self, name)}, expected a value above 0"
        for name in ("warmup", "final_lr", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                yield f"{name}: got {getattr(self, name)}, expected 0 or more and less than 1"


@dataclass(frozen=True)
class RewardSpec:
    """What an explanation is paid, before the group's mean is taken off.

    `kind` is minus the direction mse of the live AR (the released code's default) or minus its logarithm (the paper's);
    anything but a usable explanation gets the value of an orthogonal vector. `length_penalty` is taken off for every new
    token, `repetition_penalty` times the share of word pairs that stand there a second time. `contrastive` pays the
    log-probability, at `contrastive_temperature`, of this explanation against those of other vectors for this vector.
    """

    kind: Literal["neg_mse", "neg_log_mse"] = "neg_mse"
    length_penalty: float = 0.0
    repetition_penalty: float = 0.0
    contrastive: float = 0.0
    contrastive_temperature: float = 0.1

    def faults(self) -> Iterator[str]:
        """Weights below zero."""
        for name in ("length_penalty", "repetition_penalty", "contrastive"):
            if not getattr(self, name) >= 0:
                yield f"{name}: got {getattr(self, name)}, expected 0 or more"
        if not self.contrastive_temperature > 0:
            yield f"contrastive_temperature: got {self.contrastive_temperature}, expected a value above 0"


@dataclass(frozen=True)
class LoRASpec:
    """Low-rank factors instead of full weights; `targets` as peft's `target_modules`."""

    r: int = 64
    alpha: int = 128
    targets: str | tuple[str, ...] = "all-linear"

    def faults(self) -> Iterator[str]:
        """Ranks that are none, and the one module that the log-probabilities go around."""
        for name in ("r", "alpha"):
            if getattr(self, name) < 1:
                yield f"{name}: got {getattr(self, name)}, expected 1 or more"
        if not self.targets:
            yield "targets: got none, expected all-linear or names of modules"
        if "lm_head" in self.targets:
            yield "targets: lm_head cannot carry an adapter, its log-probabilities are computed from the weight itself"


@dataclass(frozen=True)
class RolloutSpec:
    """What samples from the AV in the rl stage.

    Attributes:
        engine: "transformers": in the training process, from the weights themselves, or from a gathered copy where they are
            sharded. "vllm": in the same processes on the same devices; the weights are sent to it before each step.
        tensor_parallel: vLLM only: devices that one copy of the AV is divided over.
        memory: vLLM only: share of a device's memory that it may take.
    """

    engine: Literal["transformers", "vllm"] = "transformers"
    tensor_parallel: int = 1
    memory: float = 0.3

    def faults(self) -> Iterator[str]:
        """Shares and counts out of range, settings of the other engine."""
        if self.tensor_parallel < 1:
            yield f"tensor_parallel: got {self.tensor_parallel}, expected 1 or more"
        if self.engine != "vllm" and self.tensor_parallel != 1:
            yield f"tensor_parallel: got {self.tensor_parallel}, which only engine: vllm can do"
        if not 0 < self.memory < 1:
            yield f"memory: got {self.memory}, expected a share between 0 and 1"


@dataclass(frozen=True)
class RLSpec:
    """The joint stage: the AV by GRPO with the live AR's error as reward, the AR by regression on the same samples.

    A step is one generation of `prompts` x `group` samples followed by `updates` x `iterations` optimizer steps of the AV
    (1 x 1: strictly on-policy) and one of the AR. Both learning rates rise linearly over `warmup` steps and fall on a
    cosine to `final_lr` times the peak (1: constant).

    Attributes:
        documents: drawn for this stage alone; each gives `data.positions` vectors, each used once before any is again.
        beta: coefficient of the KL divergence to the AV that the stage started from.
        micro_batch: sequences a forward pass of one process.
        rollout_block: rows that the sampler runs together; part of the result, because sums depend on the batch.
        ar_warmup: first steps in which only the AR learns, from samples of the AV as it is.
        label_share: label rows that the AR sees beside its samples, as a share of them.
        watch_ar: train a second AR on the same samples that never pays anything, to see whether the first is being gamed.
        evaluate_every, evaluate_rows: the greedy measurement on held-out rows of the training stream.
        precision_drop: stop once the facts' mean precision on these rows has fallen this far below its best (tiny world).
        checkpoint_every: steps between checkpoints that a killed run continues from.
        export_every: steps between pairs that stay in rl/steps, as `export` writes them; each takes a pair's disk. None: none.
        lora: fresh factors on an AV that was fine-tuned as a whole; see `Recipe.lora` for factors in every stage.
    """

    documents: int
    steps: int
    lr: float
    ar_lr: float
    prompts: int = 64
    group: int = 8
    beta: float = 0.01
    temperature: float = 1.0
    max_new_tokens: int = 150
    updates: int = 1
    iterations: int = 1
    micro_batch: int = 64
    rollout_block: int = 256
    loss: Literal["grpo", "dapo", "dr_grpo"] = "dapo"
    warmup: int = 0
    final_lr: float = 1.0
    weight_decay: float = 0.0
    beta2: float = 0.95
    clip: float = 1.0
    ar_warmup: int = 0
    label_share: float = 0.0
    watch_ar: bool = True
    evaluate_every: int = 10
    evaluate_rows: int = 400
    precision_drop: float | None = None
    checkpoint_every: int = 10
    export_every: int | None = None
    gradient_checkpointing: bool = False
    reward: RewardSpec = field(default_factory=RewardSpec)
    lora: LoRASpec | None = None
    rollouts: RolloutSpec = field(default_factory=RolloutSpec)

    @property
    def samples(self) -> int:
        """Samples of a step, over all processes."""
        return self.prompts * self.group

    @property
    def per_step(self) -> int:
        """Optimizer steps of the AV in a step."""
        return self.updates * self.iterations

    def sharing_fault(self, world: int = 1) -> str | None:
        """Why `world` processes cannot share a step's samples, None where they can."""
        share = self.micro_batch * self.updates * world
        if self.samples % share == 0:
            return None
        return (
            f"micro_batch: prompts x group = {self.samples} samples are no multiple of micro_batch x updates x processes = "
            f"{self.micro_batch} x {self.updates} x {world}"
        )

    def faults(self) -> Iterator[str]:
        """Numbers that no training can use, and sizes that do not divide each other."""
        positive = ("documents", "steps", "prompts", "temperature", "max_new_tokens", "updates", "iterations",
                    "micro_batch", "rollout_block", "clip", "evaluate_every", "evaluate_rows", "checkpoint_every",
                    "export_every")  # fmt: skip
        for name in positive:
            if getattr(self, name) is not None and not getattr(self, name) > 0:
                yield f"{name}: got {getattr(self, name)}, expected a value above 0"
        for name in ("lr", "ar_lr", "beta", "warmup", "weight_decay", "ar_warmup", "label_share"):
            if not getattr(self, name) >= 0:
                yield f"{name}: got {getattr(self, name)}, expected 0 or more"
        if self.group < 2:
            yield f"group: got {self.group}, expected 2 or more: advantages are differences within a group"
        if self.evaluate_rows == 1:
            yield "evaluate_rows: got 1, expected 2 or more: a variance is measured on them"
        if self.precision_drop is not None and not self.precision_drop >= 0:
            yield f"precision_drop: got {self.precision_drop}, expected 0 or more"
        if not 0 <= self.beta2 < 1:
            yield f"beta2: got {self.beta2}, expected 0 or more and less than 1"
        if not 0 <= self.final_lr <= 1:
            yield f"final_lr: got {self.final_lr}, expected 0 to 1"
        if self.updates > 0 and self.micro_batch > 0 and (fault := self.sharing_fault()):
            yield fault


@dataclass(frozen=True)
class EvalSpec:
    """How the finished pair is measured; `documents` other than None departs from the protocol (a rehearsal)."""

    protocol: str
    documents: int | None = None


@dataclass(frozen=True)
class ExportSpec:
    """How the finished pair is stored. The value head of an AR is always float32 in training."""

    dtype: Literal["float16", "bfloat16", "float32"] = "bfloat16"
    head_dtype: Literal["float16", "bfloat16", "float32"] = "float32"


@dataclass(frozen=True)
class PlacementSpec:
    """Where the models of a run live.

    Attributes:
        source: while it is read: "each" process has a copy, or it is "spread" over a node's devices, block by block, in one
            process. It is there in the data stage alone.
        av, ar: while they are trained, with their gradients and moments (and the frozen copy of the AV): "each" process has a
            copy (data parallelism), or they are "sharded" over all processes (FSDP2).
        optimizers: "device", or "cpu": weights, gradients and moments of what is sharded stay in main memory between uses.
    """

    source: Literal["each", "spread"] = "each"
    av: Literal["each", "sharded"] = "each"
    ar: Literal["each", "sharded"] = "each"
    optimizers: Literal["device", "cpu"] = "device"

    def faults(self) -> Iterator[str]:
        """Off-loading of what is not sharded."""
        if self.optimizers == "cpu" and "sharded" not in (self.av, self.ar):
            yield "optimizers: cpu needs a sharded av or ar"


@dataclass(frozen=True)
class HardwareSpec:
    """The machines a recipe is written for, by which `--plan` judges it.

    Attributes:
        gpu: a name of `planning.gpus.GPUS`, or "cpu".
        gpus: on each node. nodes: of them. One process runs on each GPU.
    """

    gpu: str = "cpu"
    gpus: int = 1
    nodes: int = 1
    placement: PlacementSpec = field(default_factory=PlacementSpec)

    @property
    def world(self) -> int:
        """Processes."""
        return self.gpus * self.nodes

    def faults(self) -> Iterator[str]:
        """Counts out of range; shards in one process."""
        for name in ("gpus", "nodes"):
            if getattr(self, name) < 1:
                yield f"{name}: got {getattr(self, name)}, expected 1 or more"
