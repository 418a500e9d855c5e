"""What a layer sweep measured, in figures, in a sentence, and what they cannot show."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class LayerFigures:
    """What was measured at one layer, on held-out rows unless said otherwise.

    Attributes:
        fve, fve_low, fve_high: of labels read by this layer's AR, raw variance, with a 95 % interval over documents.
        cosine: mean of the same rows.
        raw_variance: the denominator, of this layer's own vectors.
        mean_fve: of an AR that always gives the mean direction, on the same denominator: labels that say nothing.
        ridge_fve: of the ridge map from the words of the labels, on the same denominator.
        facts: mean balanced accuracy of the linear probes, None where no facts are known; `accuracy` has each.
        norm_p75: 75th percentile of the raw norms of the training vectors, what an injection scale is taken from.
        loss: of the AR, mean over the last tenth of its `steps`.
    """

    layer: int
    fve: float
    fve_low: float
    fve_high: float
    cosine: float
    raw_variance: float
    mean_fve: float
    ridge_fve: float
    facts: float | None
    accuracy: dict[str, float]
    norm_p75: float
    loss: float
    steps: int
    seconds: float


@dataclass(frozen=True)
class SweepResult:
    """A finished sweep.

    Attributes:
        depth: blocks of the base model. recipe_layer: what the recipe reads.
        documents, train_rows, held_out_rows: what it was measured with.
        layers: ascending.
    """

    recipe: str
    base: str
    depth: int
    recipe_layer: int
    documents: int
    train_rows: int
    held_out_rows: int
    layers: tuple[LayerFigures, ...]

    @property
    def best(self) -> LayerFigures:
        """The layer with the highest FVE of labels; of equals the first."""
        return max(self.layers, key=lambda each: each.fve)

    def sentence(self) -> str:
        """Which layer came out best, and which others cannot be told from it."""
        best = self.best
        near = [str(each.layer) for each in self.layers if each is not best and each.fve_high >= best.fve_low]
        text = (
            f"Layer {best.layer} of {self.depth} (counted from 0) has the highest FVE of labels: {best.fve:.3f} "
            f"[{best.fve_low:.3f}, {best.fve_high:.3f}] (raw variance, held-out rows, n={self.held_out_rows:,}). "
        )
        if near:
            several = len(near) > 1
            text += f"The interval{'s' if several else ''} of layer{'s' if several else ''} {', '.join(near)} overlap"
            text += f"{'' if several else 's'} with its own. "
        own = next((each for each in self.layers if each.layer == self.recipe_layer), None)
        if own is not None and own is not best:
            text += f"The recipe's layer {own.layer}: {own.fve:.3f}."
        elif own is best:
            text += "It is the recipe's layer."
        return text.strip()

    def caveats(self) -> list[str]:
        """What the figures cannot show."""
        steps = max(each.steps for each in self.layers)
        return [
            f"Little data: {self.train_rows:,} rows, {steps:,} steps of each AR; a whole run may order the layers otherwise.",
            "Regression on labels, no reinforcement learning: what an AV can learn to say about a layer is not measured.",
            "An FVE is a share of its own layer's variance; vectors of a layer that hardly differ are easily explained.",
        ]

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready mapping."""
        return {**asdict(self), "best": self.best.layer, "sentence": self.sentence(), "caveats": self.caveats()}
