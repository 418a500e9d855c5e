"""Model cards and data set cards, rendered from what was measured and from templates in model_cards/templates/.

`python -m nla_hub.publish.card NAME` prints the card of the packaged pair (`tiny`) or of a recipe. A stale one fails the tests.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from nla_hub.publish.card.page import Page
from nla_hub.publish.card.planned import recipe_card
from nla_hub.publish.card.results import TASKS, eval_results
from nla_hub.publish.card.rules import metadata_faults
from nla_hub.publish.card.templates import card
from nla_hub.publish.card.tiny import tiny_card
from nla_hub.publish.card.vocabulary import size_category
from nla_hub.publish.facts import ReleaseFacts
from nla_hub.publish.release import RepoRole

__all__ = [
    "TASKS",
    "dataset_card",
    "eval_results",
    "metadata_faults",
    "model_card",
    "recipe_card",
    "size_category",
    "tiny_card",
]


def model_card(facts: ReleaseFacts, role: RepoRole) -> str:
    """The README.md of a release's repository; `role` says which half it holds, or "pair" for both."""
    return Page.of(facts, role).markdown()


def dataset_card(metadata: Mapping[str, Any], body: str) -> str:
    """The README.md of a data set.

    Args:
        metadata: front matter; keys whose value is None are left out. The tag `nla` and the library's are added.
        body: the page, in Markdown.
    """
    tags = dict.fromkeys(["nla", "interpretability", *(metadata.get("tags") or [])])
    return card("dataset", {**metadata, "tags": list(tags)}, body)
