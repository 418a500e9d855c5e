"""The card that a release of a recipe will have, before anybody has run it: what a run measures is "not measured"."""

from __future__ import annotations

from nla_hub.publish.card.contract import Contract
from nla_hub.publish.card.page import Page
from nla_hub.publish.card.text import code, inline
from nla_hub.publish.facts import Licence, RecipeFacts, ReleaseNames
from nla_hub.publish.staging.licences import META, attributions
from nla_hub.publish.staging.naming import stem
from nla_hub.publish.staging.run_facts import labels_in_words, public_config
from nla_hub.sidecar import Injection, Site, base_family
from nla_hub.training.recipe import AUTO, Recipe, load_recipe
from nla_hub.zoo import ZooEntry, zoo

OWNER = "OWNER"
"""Stands for whoever publishes."""

TAG = "TAG"

HUB_DATA = "hf://datasets/"


def recipe_card(name: str) -> str:
    """The AV's card of a packaged recipe.

    Raises:
        UnknownNameError: no such recipe. RecipeError: it is faulty.
    """
    recipe = load_recipe(name)
    entry = _known(recipe)
    licence, facts = _licence(entry), _facts(recipe)
    return Page(
        role="av",
        names=_names(recipe, licence),
        contract=_contract(recipe),
        licence=licence,
        form="full" if recipe.lora is None else "merged",
        recipe=facts,
        attribution=attributions(facts.corpora),
        planned=recipe.name,
        published=None if entry is None else _published(entry),
        comment=f"Generated: python -m nla_hub.publish.card {recipe.name} > model_cards/{recipe.name}.md",
    ).markdown()


def _known(recipe: Recipe) -> ZooEntry | None:
    """The released pair of the same base model, by others than the community."""
    family = base_family(recipe.base.model)
    pairs = (e for e in zoo().values() if not e.community and not e.packaged)
    return next((e for e in pairs if family is not None and base_family(e.base) == family), None)


def _licence(entry: ZooEntry | None) -> Licence:
    if entry is None:
        return Licence("unknown")
    meta = META.get(entry.licence)
    return Licence(
        entry.licence,
        notice=None if meta is None else meta.notice,
        name_starts_with=None if meta is None else meta.first,
    )


def _names(recipe: Recipe, licence: Licence) -> ReleaseNames:
    if recipe.base.model is None or isinstance(recipe.layer, str):
        name = "nla-BASE-LK"
    else:
        name = stem(recipe.base.model, recipe.site, first=licence.name_starts_with)
    return ReleaseNames(f"{OWNER}/{name}-av", f"{OWNER}/{name}-ar", TAG)


def _contract(recipe: Recipe) -> Contract:
    config = recipe.base.config or {}
    scale = recipe.injection.scale
    return Contract(
        base_model=recipe.base.model,
        base_revision=recipe.base.revision,
        n_layers=config.get("num_hidden_layers"),
        d_model=config.get("hidden_size"),
        family=None,
        site=None if isinstance(recipe.layer, str) else Site(recipe.layer),
        marker_char=None if recipe.marker == AUTO else recipe.marker,
        marker=None,
        injection=Injection(recipe.injection.kind, None if isinstance(scale, str) else scale),
        scale_by_run=isinstance(scale, str),
        av_template=recipe.prompts.av,
        ar_template=recipe.prompts.ar,
        dtypes=dict.fromkeys(("av", "ar"), recipe.export.dtype),
    )


def _facts(recipe: Recipe) -> RecipeFacts:
    config = recipe.to_mapping()
    parts = [part.data for part in recipe.data.mix if part.data.startswith(HUB_DATA)]
    return RecipeFacts(
        recipe.name,
        recipe.digest(),
        public_config(config, frozenset(parts)),
        tuple(part.removeprefix(HUB_DATA) for part in parts),
        labels_in_words(config["labels"], {}),
    )


def _published(entry: ZooEntry) -> str:
    """A released pair of the same base model: where it is, and what its authors say of it."""
    layer = "" if entry.layer is None else f" at layer {entry.layer}"
    halves = f"{code(entry.where('av'))} and {code(entry.where('ar'))}"
    figure = entry.published()
    said = "Its FVE: not measured." if figure is None else f"Its FVE: {inline(str(figure))}; not measured here."
    return (
        f"A pair for the same base model{layer} was released with the paper: {halves}, in nla-hub under the name "
        f"`{entry.name}`. It is another pair than this page's. {said}"
    )
