"""Which documents a run uses for what, and the guards that what is measured was not trained on.

A registered corpus has a stream of its own for every purpose. The documents of a mixture are divided by their content
(`corpora.Splitter`); which ones were used is kept beside the rows as keys of their contents, so that nothing is read again.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice
from math import ceil
from pathlib import Path

from nla_hub import registry
from nla_hub.evaluation import get_protocol, require_disjoint
from nla_hub.source_text import Content
from nla_hub.training.checks import TINY_WORLD, source_settings
from nla_hub.training.corpora import RESERVED, Mixture, Splitter, content_key
from nla_hub.training.data import open_corpus
from nla_hub.training.gathering import INDEX_NAME, Wanted, keys_of
from nla_hub.training.labelers import CorpusDocument
from nla_hub.training.recipe import Recipe

SEED_OFFSETS = {
    "source": 0,
    "av_sft": 1_000_001,
    "ar_sft": 2_000_003,
    "dev": 3_000_017,
    "rl": 4_000_037,
    "eval": 5_000_011,
}
"""Every purpose draws its documents from its own stream of a registered corpus."""

DEV_DOCUMENTS = 100
"""Least number of documents of the held-out rows that the stages report on; the evaluation uses others."""

UNLABELLED = frozenset({"rl"})
"""Splits whose rows are vectors alone."""

HELD_OUT = frozenset(RESERVED)
"""Splits that nothing is trained on."""

EVALUATION_MARGIN = 4
"""Documents kept for the evaluation, as a multiple of the protocol's: many are shorter than it wants."""

EVALUATION_NAME = "eval.jsonl"
"""Beside the rows: held-out documents for a protocol that has none of its own, a text or messages a line."""


def data_splits(recipe: Recipe) -> dict[str, int]:
    """The splits that the data stage makes, and the number of documents of each."""
    splits = {"av_sft": recipe.av.documents, "ar_sft": recipe.ar.documents, "dev": DEV_DOCUMENTS}
    if recipe.rl is not None:
        splits["rl"] = recipe.rl.documents
        splits["dev"] = max(DEV_DOCUMENTS, ceil(recipe.rl.evaluate_rows / recipe.data.positions))
    return splits


def evaluation_documents(recipe: Recipe) -> Wanted | None:
    """How many documents the data stage keeps for the evaluation; None where the protocol has its own."""
    protocol = get_protocol(recipe.eval.protocol).changed(documents=recipe.eval.documents)
    if protocol.corpus is not None:
        return None
    return Wanted(protocol.documents, EVALUATION_MARGIN * protocol.documents, "eval.documents")


def wanted_documents(recipe: Recipe) -> dict[str, Wanted]:
    """How many documents of each split are taken out of a mixture, the evaluation's among them."""
    settings = {"av_sft": "av.documents", "ar_sft": "ar.documents", "rl": "rl.documents"}
    found = {split: Wanted(n, n, settings.get(split)) for split, n in data_splits(recipe).items()}
    if (evaluation := evaluation_documents(recipe)) is not None:
        found["eval"] = evaluation
    return found


def splitter_of(recipe: Recipe) -> Splitter:
    """The rule by which documents of the recipe's mixture belong to splits."""
    return Splitter(recipe.seed, {name: n for name, n in data_splits(recipe).items() if name not in HELD_OUT})


def split_documents(recipe: Recipe, split: str, n: int) -> Sequence[CorpusDocument]:
    """The first `n` documents of a split (of a mixture: fewer, where it has no more); a mixture is read for it."""
    corpus = open_corpus(recipe.data)
    if not isinstance(corpus, Mixture):
        return corpus.documents(n, seed=recipe.seed + SEED_OFFSETS[split])
    splitter = splitter_of(recipe)
    return list(islice((d for d in corpus.documents() if splitter.split_of(d.key) == split), n))


def training_documents(recipe: Recipe) -> Iterator[Content]:
    """Every document of a registered corpus that the pair learns from, and those that its source was trained on here."""
    if recipe.base.train is not None:
        tiny = registry.corpora.get(TINY_WORLD)()
        n = source_settings(recipe).documents
        yield from (document.content for document in tiny.documents(n, seed=recipe.seed + SEED_OFFSETS["source"]))
    if recipe.data.corpus is not None:
        for split, n in data_splits(recipe).items():
            if split not in HELD_OUT:
                yield from (document.content for document in split_documents(recipe, split, n))


# -- guards ------------------------------------------------------------------------------------------------


def require_held_out(recipe: Recipe, contents: Sequence[Content], rows: Path) -> int:
    """How many of `contents` stand verbatim in what the run trains on; an InputError from 0.5 % up.

    Args:
        rows: the directory of the run's training rows.
    """

    def trained() -> Iterator[Content]:
        yield from training_documents(recipe)
        if recipe.data.corpus is None:
            keys = keys_of(rows / INDEX_NAME, but=HELD_OUT)
            yield from (content for content in contents if content_key(content) in keys)

    return require_disjoint(contents, trained())


def require_dev_held_out(recipe: Recipe) -> None:
    """Raise an InputError where the held-out rows' documents are trained on; those of a mixture cannot be."""
    if recipe.data.corpus is None:
        return
    documents = split_documents(recipe, "dev", data_splits(recipe)["dev"])
    require_disjoint([document.content for document in documents], training_documents(recipe))
