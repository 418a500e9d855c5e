"""Pages from the templates of model_cards/templates/, through huggingface_hub's card classes."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import TYPE_CHECKING, Any

from nla_hub import resources
from nla_hub.publish.release import RepoKind

if TYPE_CHECKING:
    import jinja2

FRAME = "---\n{{ card_data }}\n---\n\n{{ body }}"
"""A card: front matter and page. The page is put in as it is: nothing inside it is taken for a template."""


@cache
def _environment() -> jinja2.Environment:
    import jinja2  # comes with torch, which requires it, and is what chat templates are written in

    return jinja2.Environment(
        loader=jinja2.FileSystemLoader(resources.data_directory("model_cards") / "templates"),
        undefined=jinja2.StrictUndefined,  # a name that a template uses and nobody gives is an error, never an empty place
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,  # Markdown: what comes from outside has gone through `text`
    )


def render(template: str, **values: Any) -> str:
    """The template of that file name with `values` in it."""
    return _environment().get_template(template).render(**values)


def card(kind: RepoKind, metadata: Mapping[str, Any], body: str) -> str:
    """A README.md: the metadata as front matter, then the page. Keys whose value is None are left out."""
    from huggingface_hub import DatasetCard, DatasetCardData, ModelCard, ModelCardData

    page = body.strip("\n") + "\n"
    if kind == "model":
        return str(ModelCard.from_template(ModelCardData(**metadata), template_str=FRAME, body=page))
    return str(DatasetCard.from_template(DatasetCardData(**metadata), template_str=FRAME, body=page))
