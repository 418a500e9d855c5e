"""What the Hub says of a token: where it may write."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def may_write(whoami: Mapping[str, Any], owner: str) -> bool:
    """Whether a token may make repositories of `owner`: False where the Hub says so, True where only a refusal can tell.

    Args:
        whoami: the answer of `/api/whoami-v2`: `name`; `orgs`, each with a `roleInOrg`; under `auth.accessToken` the token's
            role (read, write, fineGrained) and what a fine-grained one may do for whom (`fineGrained.scoped`).
    """
    token = (whoami.get("auth") or {}).get("accessToken") or {}
    if token.get("role") == "read":
        return False
    scoped = (token.get("fineGrained") or {}).get("scoped")
    if scoped is not None:
        names = [str(s.get("entity", {}).get("name")) for s in scoped if "repo.write" in s.get("permissions", ())]
        return any(name == owner or name.startswith(f"{owner}/") for name in names)
    roles = {org.get("name"): org.get("roleInOrg") for org in whoami.get("orgs") or ()}
    return owner == whoami.get("name") or (owner in roles and roles[owner] != "read")
