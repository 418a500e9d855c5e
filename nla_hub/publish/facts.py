"""Everything that the cards of a release say, found out once. None is "not measured" or "not known", never a guess."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from nla_hub.evaluation import EvalResult
    from nla_hub.sidecar import Score, Sidecar

Form = Literal["full", "lora", "merged"]
"""What the weights of a release are: complete ones, factors on a base that is named, or factors merged into it."""

Quantised = Literal["fp8", "nf4"]
"""In what the weights are packed."""


@dataclass(frozen=True)
class Licence:
    """Under what a release may be used.

    Attributes:
        id: as the Hub's metadata spells it: "apache-2.0", "gemma", "llama3.3", or "other".
        name, link: for "other", as the Hub asks for them; a link to the terms otherwise where there is one.
        files: licence files of a repository: name -> content.
        notice: a sentence that the card must show ("Built with Llama"), or None.
        name_starts_with: what a repository's name must begin with ("Llama"), or None.
    """

    id: str
    name: str | None = None
    link: str | None = None
    files: Mapping[str, bytes] = field(default_factory=dict)
    notice: str | None = None
    name_starts_with: str | None = None


@dataclass(frozen=True)
class Effort:
    """What a run took, as its directory says.

    Attributes:
        stage_seconds: stage -> wall seconds.
        processes: how many worked side by side; None where nothing says.
        device: what they ran on ("NVIDIA H100 80GB HBM3", "cpu"); None where nothing says.
    """

    stage_seconds: Mapping[str, float]
    processes: int | None
    device: str | None

    @property
    def gpu_hours(self) -> float | None:
        """Processes x wall hours; None on a CPU and where something is not known."""
        if self.processes is None or self.device in (None, "cpu") or not self.stage_seconds:
            return None
        return self.processes * sum(self.stage_seconds.values()) / 3600


@dataclass(frozen=True)
class RecipeFacts:
    """Where the weights come from.

    Attributes:
        name, hash: of the recipe; the hash is the run directory's.
        resolved: its resolved configuration, without anything that is a path or an address of the machine.
        corpora: data sets by their Hub names.
        labels: who wrote the warm start's explanations, in words.
    """

    name: str
    hash: str
    resolved: Mapping[str, Any]
    corpora: tuple[str, ...] = ()
    labels: str | None = None


@dataclass(frozen=True)
class ReleaseNames:
    """How the repositories are called. In a single repository `av` and `ar` are the same."""

    av: str
    ar: str
    tag: str

    @property
    def single(self) -> bool:
        """Whether both halves lie in one repository, in the folders av/ and ar/."""
        return self.av == self.ar


@dataclass(frozen=True)
class ReleaseFacts:
    """What is known of a pair that is published.

    Attributes:
        names, release_id: see `ReleaseNames`, `release.release_id`.
        base_model, base_revision: Hub name and commit of the model whose vectors are explained; a commit of None is
            printed as "not pinned".
        n_layers: its number of blocks. family: name of the adapter.
        av, ar: the sidecars as they are published.
        licence: see `Licence`.
        form, quantised: what the weights are.
        dtypes: role -> dtype of the weights ("bfloat16").
        parameters: role -> number of stored values.
        score, score_mean_norm: measured on exactly these weights; None: not measured.
        evaluation: the whole result, whose samples the card shows.
        evaluation_set: Hub name of the published evaluation set, without which the Hub shows no score.
        recipe, effort: of the run; None where a bare directory is published.
        steps: tags of earlier reinforcement-learning steps that are published beside this one.
        parity: role -> largest relative difference of packed weights' outputs, or other figures by name that a variant
            was accepted on.
        attribution: sentences that data sets ask for.
        rehearsal: whether this came from a rehearsal: random weights that say nothing about any model.
        price_per_gpu_hour: in US dollars, as the caller says; None leaves the cost "not known".
    """

    names: ReleaseNames
    release_id: str
    base_model: str
    base_revision: str | None
    n_layers: int | None
    family: str
    av: Sidecar
    ar: Sidecar
    licence: Licence
    form: Form = "full"
    quantised: Quantised | None = None
    dtypes: Mapping[str, str] = field(default_factory=dict)
    parameters: Mapping[str, int] = field(default_factory=dict)
    score: Score | None = None
    score_mean_norm: Score | None = None
    evaluation: EvalResult | None = None
    evaluation_set: str | None = None
    recipe: RecipeFacts | None = None
    effort: Effort | None = None
    steps: tuple[str, ...] = ()
    parity: Mapping[str, float] = field(default_factory=dict)
    attribution: tuple[str, ...] = ()
    rehearsal: bool = False
    price_per_gpu_hour: float | None = None
