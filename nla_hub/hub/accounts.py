"""What the Hub says of a token: where it may write; and that nobody can ask without a connection."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from nla_hub.errors import HubUnreachableError


def require_connection() -> None:
    """Refuse to publish where the client may not use the network.

    Raises:
        HubUnreachableError: HF_HUB_OFFLINE is set.
    """
    from huggingface_hub import is_offline_mode

    if is_offline_mode():
        raise HubUnreachableError(
            "Nothing can be published with HF_HUB_OFFLINE=1.",
            next_step="unset it, with a connection; --dry-run works with it",
        )


def only_reads(whoami: Mapping[str, Any]) -> bool:
    """Whether a token may write nowhere at all, not even propose a change; `whoami` as in `may_write`."""
    return _token(whoami).get("role") == "read"


def may_write(whoami: Mapping[str, Any], owner: str) -> bool:
    """Whether a token may make repositories of `owner`: False where the Hub says so, True where only a refusal can tell.

    Args:
        whoami: the answer of `/api/whoami-v2`: `name`; `orgs`, each with a `roleInOrg`; under `auth.accessToken` the token's
            role (read, write, fineGrained) and what a fine-grained one may do for whom (`fineGrained.scoped`).
    """
    if only_reads(whoami):
        return False
    scoped = (_token(whoami).get("fineGrained") or {}).get("scoped")
    if scoped is not None:
        names = [str(s.get("entity", {}).get("name")) for s in scoped if "repo.write" in s.get("permissions", ())]
        return any(name == owner or name.startswith(f"{owner}/") for name in names)
    roles = {org.get("name"): org.get("roleInOrg") for org in whoami.get("orgs") or ()}
    return owner == whoami.get("name") or (owner in roles and roles[owner] != "read")


def _token(whoami: Mapping[str, Any]) -> Mapping[str, Any]:
    return (whoami.get("auth") or {}).get("accessToken") or {}
