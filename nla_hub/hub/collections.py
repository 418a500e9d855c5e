"""Collections: lists of repositories on the Hub under one page."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING

from nla_hub.errors import HubError
from nla_hub.hub.commits import RepoKind
from nla_hub.hub.write_refusals import persist

if TYPE_CHECKING:
    from huggingface_hub import HfApi

_SLUG = re.compile(r"[^/]+/[^/]*-[0-9a-f]{24}")


def collect(api: HfApi, collection: str, items: Sequence[tuple[str, RepoKind]], *, private: bool) -> str:
    """Add repositories to a collection; its page.

    Args:
        collection: `owner/slug` as in its address, or `owner/title`, made where the owner has none of that title.
        private: of a collection that is made.

    Raises:
        HubError and its children: as `HubWriter`.
    """
    owner, _, title = collection.partition("/")
    if not title.strip():
        raise HubError(
            "This is not the name of a collection.",
            where=collection,
            expected="owner/title, or owner/slug as in its address",
            next_step="give --collection owner/title",
        )
    slug = collection if _SLUG.fullmatch(collection) else _slug(api, owner, title.strip(), private=private)
    page = persist(lambda: api.get_collection(slug), where=collection)
    held = {(item.item_id, item.item_type) for item in page.items}
    for repo, kind in items:
        if (repo, kind) not in held:
            # Adding again what is there is a 409, which `exists_ok` takes for the success it is.
            persist(partial(api.add_collection_item, slug, repo, kind, exists_ok=True), where=collection)
    return page.url


def _slug(api: HfApi, owner: str, title: str, *, private: bool) -> str:
    """The address of an owner's collection with this title; made where there is none."""

    def there() -> str | None:
        found = persist(lambda: list(api.list_collections(owner=owner)), where=f"{owner}/{title}")
        return next((c.slug for c in found if c.title.casefold() == title.casefold()), None)

    def make() -> str:
        return api.create_collection(title, namespace=owner, private=private, exists_ok=True).slug

    return there() or persist(make, where=f"{owner}/{title}", settled=there)
