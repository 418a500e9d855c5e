"""What the Hub and its client say when something fails, as this project's errors; and when to ask again."""

from __future__ import annotations

import errno
import re
import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from importlib import import_module
from json import JSONDecodeError
from typing import Any, TypeVar

from nla_hub.errors import (
    HubAuthError,
    HubError,
    HubGatedError,
    HubNotFoundError,
    HubUnreachableError,
    NLAError,
)
from nla_hub.log import logger

T = TypeVar("T")

PATIENCE = 300.0
"""Seconds waited in all for a Hub that says "later": its rate limits count in windows of five minutes."""

CUTS = 2
"""How often what was reset or arrived damaged is asked for again; files that are complete are kept."""


class Damaged(OSError):
    """A download that is not what was promised."""


def ask(call: Callable[[], T], *, repo: str, revision: str | None, local_only: bool) -> T:
    """The answer of one call of the client, asked again where that is worth while.

    The client waits by itself (told by Retry-After, else 1 to 8 seconds, five times) while it lists files and while it
    downloads; it does not while it looks a repository up, nor for headers, nor after a connection that was reset.

    Args:
        local_only: the caller wants the cache only, so nobody was asked.

    Raises:
        HubNotFoundError, HubAuthError, HubGatedError, HubUnreachableError, HubError.
    """
    where = place(repo, revision)
    began, attempt = time.monotonic(), 0
    while True:
        try:
            return call()
        except NLAError:
            raise
        except Exception as error:
            cause, attempt = _reason(error), attempt + 1
            wait = _wait(cause, attempt)
            if wait is not None and time.monotonic() - began + wait <= PATIENCE:
                logger.warning("%s: %s. Trying again in %.0f s.", where, first_line(cause).rstrip("."), wait)
                time.sleep(wait)
                continue
            typed = _typed(cause, error, repo, revision, local_only)
            if typed is None:
                raise
            raise typed from cause


def place(repo: str, revision: str | None) -> str:
    """owner/name or owner/name@revision."""
    return f"{repo}@{revision}" if revision else repo


def transport_errors(*names: str) -> tuple[type[Exception], ...]:
    """What a broken connection raises: huggingface_hub 1 speaks through httpx, huggingface_hub 2 through httpx2."""
    found: list[type[Exception]] = []
    for package in ("httpx", "httpx2"):
        try:
            module = import_module(package)
        except ImportError:
            continue
        found += [getattr(module, name) for name in names or ("TransportError",)]
    return tuple(found)


def status(cause: BaseException) -> int | None:
    """The HTTP status of a refusal."""
    code = getattr(getattr(cause, "response", None), "status_code", None)
    return code if isinstance(code, int) else None


def token_refused(cause: BaseException) -> bool:
    """Whether a 401 speaks of the token; the Hub also answers 401 for what does not exist."""
    response = getattr(cause, "response", None)
    return "invalid credentials" in str(response.headers.get("X-Error-Message", "")).lower() if response else False


def unreachable(where: str, *, local_only: bool, cause: BaseException | None = None, lacks: str = "") -> NLAError:
    """Nobody to ask, and the cache has no answer."""
    from huggingface_hub import is_offline_mode

    cache = f"the cache does not hold what is needed{f' ({lacks})' if lacks else ''}"
    if local_only or is_offline_mode():
        switch = "local_files_only=True" if local_only else "HF_HUB_OFFLINE"
        return HubUnreachableError(
            f"The Hub cannot be reached ({switch} forbids it), and {cache}.",
            where=where,
            next_step=f"run it once without {switch}, with a connection; the packaged pair needs no network: --nla tiny",
        )
    return HubUnreachableError(
        f"The Hub cannot be reached, and {cache}.",
        where=where,
        got=first_line(cause) if cause is not None and str(cause) else None,
        next_step="check the connection (and HF_HUB_OFFLINE, HF_ENDPOINT); a directory is written ./path; the packaged pair "
        "needs no network: --nla tiny",
    )


def _reason(error: BaseException) -> BaseException:
    """The refusal or the broken connection behind an error: the client wraps both in errors about its cache."""
    from huggingface_hub import errors as hf

    inner = error.__cause__
    wraps = isinstance(error, hf.LocalEntryNotFoundError | ValueError) and not isinstance(error, hf.HfHubHTTPError)
    known = (hf.HfHubHTTPError, hf.OfflineModeIsEnabled, hf.FileMetadataError, *transport_errors())
    return inner if inner is not None and wraps and isinstance(inner, known) else error


def _wait(cause: BaseException, attempt: int) -> float | None:
    """Seconds until it is worth asking again; None if it is not."""
    if status(cause) == 429:
        seconds = told(cause.response.headers)  # type: ignore[attr-defined]
        return max(seconds, 1.0) if seconds is not None else min(2.0**attempt, 60.0)
    again = _broke_off(cause) or isinstance(cause, Damaged) or _inconsistent(cause)
    return 1.0 if again and attempt <= CUTS else None


def told(answer: Mapping[str, str]) -> float | None:
    """When a 429 says to come back, in seconds: Retry-After (a number or a date), or `RateLimit: "api";r=0;t=55`."""
    after = answer.get("Retry-After", "").strip()
    if after.isdigit():
        return float(after)
    if limit := re.search(r"\bt\s*=\s*(\d+)", answer.get("RateLimit", "")):
        return float(limit[1])
    try:
        date = parsedate_to_datetime(after)
    except ValueError:
        return None
    return (date - datetime.now(date.tzinfo and UTC)).total_seconds()


def _broke_off(cause: BaseException) -> bool:
    return isinstance(cause, transport_errors("ReadError", "WriteError", "RemoteProtocolError"))


def _inconsistent(cause: BaseException) -> bool:
    return isinstance(cause, OSError) and str(cause).startswith("Consistency check failed")


def _typed(
    cause: BaseException, error: BaseException, repo: str, revision: str | None, local_only: bool
) -> NLAError | None:
    """This project's error for one of the client's; None for what is not about the Hub."""
    from huggingface_hub import constants
    from huggingface_hub import errors as hf

    where = place(repo, revision)
    if isinstance(cause, hf.RevisionNotFoundError):
        return HubNotFoundError(
            f"The repository has no revision {revision!r}.",
            where=repo,
            got=status_line(cause),
            next_step="leave the revision out for the newest one, or look it up on the repository's page",
        )
    if isinstance(cause, hf.HfHubHTTPError):
        return _refused(cause, repo, where)
    if isinstance(cause, hf.HFValidationError):
        return HubNotFoundError(
            "This is not a repository name.",
            where=where,
            expected="owner/name or owner/name@revision",
            next_step="check the spelling; a local directory is written ./name",
        )
    if isinstance(cause, hf.LocalTokenNotFoundError):
        return HubAuthError(
            "A token is asked for (token=True), and none is stored.",
            where=where,
            next_step="`hf auth login`, or set HF_TOKEN",
        )
    if isinstance(cause, hf.LocalEntryNotFoundError):
        lacks = re.search(r"\d+ file\(s\) are missing \(.*?\)", str(cause))
        return unreachable(where, local_only=local_only, lacks=lacks[0] if lacks else "")
    if _broke_off(cause):
        return HubUnreachableError(
            f"The connection to the Hub broke off {CUTS + 1} times.",
            where=where,
            got=first_line(cause),
            next_step="try again: complete files are kept. If it stays so, look at proxies and VPNs on the way",
        )
    if isinstance(cause, (hf.OfflineModeIsEnabled, ConnectionError, TimeoutError, *transport_errors())):
        return unreachable(where, local_only=local_only, cause=cause)
    if isinstance(
        cause, hf.FileMetadataError | JSONDecodeError | KeyError | TypeError | AttributeError | AssertionError
    ):
        return HubUnreachableError(
            "What answers is not a Hugging Face Hub.",
            where=where,
            got=f"{constants.ENDPOINT}: {first_line(cause)}",
            next_step="check HF_ENDPOINT, proxies and login pages of the network",
        )
    if isinstance(cause, Damaged) or _inconsistent(cause):
        return HubError(
            f"The download is damaged: {first_line(cause)}",
            where=where,
            next_step="try again: complete files are kept. If it stays so, the repository or a proxy on the way is damaged",
        )
    if isinstance(cause, OSError):
        return _not_stored(cause, where)
    if isinstance(cause, ValueError | RuntimeError | hf.XetDownloadError):
        # Among them file names that leave the cache, and files too large to come without hf_xet.
        return HubError(f"The download was refused: {first_line(cause)}", where=where, next_step="try another revision")
    return None


def _refused(cause: Any, repo: str, where: str) -> HubError:
    from huggingface_hub import constants
    from huggingface_hub import errors as hf

    code, page, answer = status(cause), f"{constants.ENDPOINT}/{repo}", cause.response
    sent = "authorization" in answer.request.headers
    if isinstance(cause, hf.GatedRepoError):
        login = "" if sent and code != 401 else ", then `hf auth login`"
        return HubGatedError(
            "This repository is gated, and this account may not read it yet."
            if sent
            else "This repository is gated, and nobody is logged in.",
            where=where,
            got=status_line(cause),
            next_step=f"accept its terms on the page of {repo} ({page}){login}; its authors may have to agree first",
        )
    if isinstance(cause, hf.DisabledRepoError):
        return HubError(
            "The Hub has disabled this repository.", where=where, got=status_line(cause), next_step=f"see {page}"
        )
    if code == 401 and (sent or not isinstance(cause, hf.RepositoryNotFoundError)):
        return HubAuthError(
            "The Hub does not accept this token." if sent else "The Hub wants a token, and none was sent.",
            where=where,
            got=status_line(cause),
            next_step="`hf auth login`, or set HF_TOKEN; check the spelling too, since unknown repositories answer the same",
        )
    if isinstance(cause, hf.RepositoryNotFoundError):
        return HubNotFoundError(
            "The Hub has no such repository (or it is private and the token cannot see it).",
            where=where,
            got=status_line(cause),
            next_step="check the spelling owner/name; for a private one `hf auth login`; a local directory is written ./name",
        )
    if isinstance(cause, hf.EntryNotFoundError):
        name = re.search(r"/resolve/[^/]+/(.+)", answer.url.path)
        return HubNotFoundError(
            f"The repository lacks {name[1]!r}." if name else "The repository lacks a file.",
            where=where,
            got=status_line(cause),
            next_step="try again, or name another revision",
        )
    if code == 403:
        return HubGatedError(
            "The Hub refuses this account.",
            where=where,
            got=status_line(cause),
            next_step="check the token's permissions",
        )
    if code == 404:
        return HubNotFoundError(
            "The Hub does not have this.", where=where, got=status_line(cause), next_step="check name and revision"
        )
    if code == 429:
        seconds = told(cause.response.headers)
        return HubError(
            "The Hub wants fewer requests.",
            where=where,
            got=status_line(cause),
            next_step=f"try again {'later' if seconds is None else f'in {duration(seconds)}'}"
            + ("" if sent else "; with `hf auth login` its limits are higher"),
        )
    advice = (
        "try again later; the Hub's own state: https://status.huggingface.co"
        if (code or 500) >= 500
        else "try again later"
    )
    return HubError(f"The Hub answered with an error: {first_line(cause)}", where=where, next_step=advice)


def _not_stored(cause: OSError, where: str) -> HubError:
    if cause.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        advice = "make room, or name a cache on a larger disk (HF_HOME, cache_dir=); complete files are kept"
    elif cause.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        advice = "name a cache that you may write to (HF_HOME, cache_dir=)"
    else:
        advice = "check free space and permissions of the cache (HF_HOME, cache_dir=)"
    return HubError(f"The download could not be stored: {cause}", where=where, next_step=advice)


def duration(seconds: float) -> str:
    """Hours, minutes or seconds, for people."""
    for unit, size in (("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{max(seconds, 1):.0f} seconds"


def status_line(cause: BaseException) -> str | None:
    """HTTP and the status of a refusal."""
    code = status(cause)
    return f"HTTP {code}" if code else None


def first_line(cause: BaseException) -> str:
    """What an error says first, without what follows a `?` in addresses."""
    text = str(cause).strip().splitlines()[0] if str(cause).strip() else type(cause).__name__
    return re.sub(r"\?[^\s'\"]*", "?...", text)  # a signed address is as good as a key for an hour
