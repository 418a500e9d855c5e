"""Which documents a run uses for what, and the guards that what is measured was not trained on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import ceil

from nla_hub.evaluation import require_disjoint
from nla_hub.source_text import Content
from nla_hub.training.checks import source_settings
from nla_hub.training.data import open_corpus
from nla_hub.training.labelers import CorpusDocument
from nla_hub.training.recipe import Recipe

SEED_OFFSETS = {"source": 0, "av_sft": 1_000_001, "ar_sft": 2_000_003, "dev": 3_000_017, "rl": 4_000_037}
"""Every purpose draws its documents from its own stream of the corpus."""

DEV_DOCUMENTS = 100
"""Least number of documents of the held-out rows that the stages report on; the evaluation uses others."""

UNLABELLED = frozenset({"rl"})
"""Splits whose rows are vectors alone."""


def data_splits(recipe: Recipe) -> dict[str, int]:
    """The splits that the data stage makes, and the number of documents of each."""
    splits = {"av_sft": recipe.av.documents, "ar_sft": recipe.ar.documents, "dev": DEV_DOCUMENTS}
    if recipe.rl is not None:
        splits["rl"] = recipe.rl.documents
        splits["dev"] = max(DEV_DOCUMENTS, ceil(recipe.rl.evaluate_rows / recipe.data.positions))
    return splits


def split_documents(recipe: Recipe, split: str, n: int) -> Sequence[CorpusDocument]:
    """The first `n` documents of a split."""
    return open_corpus(recipe.data).documents(n, seed=recipe.seed + SEED_OFFSETS[split])


def training_documents(recipe: Recipe) -> Iterator[Content]:
    """Every document that anything of the pair learns from, the source's own where it is trained here."""
    splits = {name: n for name, n in data_splits(recipe).items() if name != "dev"}
    if recipe.base.train is not None:
        splits["source"] = source_settings(recipe).documents
    for split, n in splits.items():
        for document in split_documents(recipe, split, n):
            yield document.content


def require_held_out(recipe: Recipe, contents: Sequence[Content]) -> int:
    """How many of `contents` stand verbatim in what the run trains on; an InputError from 0.5 % up."""
    return require_disjoint(contents, training_documents(recipe))


def require_dev_held_out(recipe: Recipe) -> None:
    """Raise an InputError where the held-out rows' documents are trained on."""
    documents = split_documents(recipe, "dev", data_splits(recipe)["dev"])
    require_held_out(recipe, [document.content for document in documents])
