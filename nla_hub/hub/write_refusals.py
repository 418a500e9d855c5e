"""Calls that change something on the Hub: when to make one again, and what its refusal means for somebody who publishes.

A call that was cut off may have been carried out or not. That is never guessed: the Hub is asked whether what was wanted is
so, and only if not is the call made again.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Mapping
from json import JSONDecodeError
from typing import TypeVar
from urllib.parse import urlsplit

from nla_hub.errors import HubAuthError, HubError, HubGatedError, HubNotFoundError, HubUnreachableError, NLAError
from nla_hub.hub.refusals import (
    PATIENCE,
    duration,
    first_line,
    status,
    told,
    transport_errors,
    unreachable,
)
from nla_hub.log import logger

T = TypeVar("T")

TRIES = 5
"""How often a call is made whose connection ends, or that the Hub fails to answer, with 1, 2, 4 and 8 seconds in between. The
client itself makes six attempts like that for large files and for what is asked before them, and none for anything else."""


def persist(act: Callable[[], T], *, where: str, settled: Callable[[], T | None] | None = None) -> T:
    """The answer of one call of the client, made again where that is worth while.

    A 429 is waited for as it says, up to `PATIENCE` in all; a connection that ends and an error of the Hub `TRIES` times; a
    conflict (409, 412) never, and neither is anything else.

    Args:
        where: owner/name or owner/name@revision, for errors.
        settled: asks the Hub whether what `act` is to bring about is so, and answers as `act` would; None where it is not.
            Asked after every failure but a 429, before anything is sent again.

    Raises:
        HubNotFoundError, HubAuthError, HubGatedError, HubUnreachableError, HubError.
    """
    attempt, waited = 0, 0.0
    while True:
        try:
            return act()
        except NLAError:
            raise
        except Exception as error:
            cause, attempt = _reason(error), attempt + 1
            if settled is not None and _code(cause) != 429 and (found := settled()) is not None:
                return found
            wait = _wait(cause, attempt)
            if wait is not None and waited + wait <= PATIENCE:
                logger.warning("%s: %s. Trying again in %.0f s.", where, _said(cause).rstrip("."), wait)
                time.sleep(wait)
                waited += wait
                continue
            typed = _typed(cause, where)
            if typed is None:
                raise
            raise typed from cause


def _reason(error: BaseException) -> BaseException:
    """The refusal or the broken connection behind an error: uploads wrap it. What the client finds wrong by itself stays."""
    from huggingface_hub import errors as hf

    inner: BaseException | None = error
    while inner is not None:
        if isinstance(inner, (hf.HfHubHTTPError, hf.OfflineModeIsEnabled, *transport_errors())):
            return inner
        inner = None if isinstance(inner, ValueError) else inner.__cause__
    return error


def _wait(cause: BaseException, attempt: int) -> float | None:
    """Seconds until it is worth trying again; None if it is not."""
    from huggingface_hub.errors import OfflineModeIsEnabled

    code = _code(cause)
    if code == 429:
        seconds = told(_headers(cause))
        return max(seconds, 1.0) if seconds is not None else min(2.0**attempt, 60.0)
    # Between the Hub and here stand proxies, whose own error pages the client reads as if they were the Hub's answers.
    broken = isinstance(cause, (ConnectionError, TimeoutError, JSONDecodeError, *transport_errors())) and code is None
    passing = (broken and not isinstance(cause, OfflineModeIsEnabled)) or code == 408 or (code or 0) >= 500
    # The address that a file is sent to holds for some time only; the next try asks for a new one.
    passing = passing or (code == 403 and _of_storage(cause))
    return 2.0 ** (attempt - 1) if passing and attempt < TRIES else None


def _code(cause: BaseException) -> int | None:
    """The HTTP status of a refusal; hf_xet gives it in the words of a ConnectionError."""
    if (code := status(cause)) is not None:
        return code
    named = re.search(r"HTTP status (?:client|server) error \((\d{3})", str(cause))
    return int(named[1]) if named else None


def _of_storage(cause: BaseException) -> bool:
    """Whether not the Hub itself refuses, but the host that large files go to."""
    from huggingface_hub import constants

    response = getattr(cause, "response", None)
    return response is not None and response.request.url.host != urlsplit(constants.ENDPOINT).hostname


def _headers(cause: BaseException) -> Mapping[str, str]:
    found: Mapping[str, str] = getattr(getattr(cause, "response", None), "headers", {})
    return found


def _typed(cause: BaseException, where: str) -> NLAError | None:
    """This project's error for one of the client's; None for what is not about the Hub."""
    from huggingface_hub import constants
    from huggingface_hub import errors as hf

    if isinstance(cause, hf.LocalTokenNotFoundError):
        return HubAuthError(
            "Publishing needs a token, and nobody is logged in.", where=where, next_step=_token_advice()
        )
    if (code := _code(cause)) is not None:
        return _refused(cause, code, where)
    if isinstance(cause, hf.OfflineModeIsEnabled):
        return unreachable(where, local_only=False)
    if isinstance(cause, (ConnectionError, TimeoutError, *transport_errors())):
        of_hub = isinstance(cause, transport_errors())
        whom = "the Hub" if of_hub else "the Hub's storage"
        return HubUnreachableError(
            f"The connection to {whom} broke off {TRIES} times.",
            where=where,
            got=f"{constants.ENDPOINT}: {_said(cause)}",
            next_step=_AGAIN if of_hub else _ANOTHER_WAY,
        )
    if isinstance(cause, JSONDecodeError | KeyError | TypeError | AttributeError):
        return HubUnreachableError(
            "What answers is not a Hugging Face Hub.",
            where=where,
            got=f"{constants.ENDPOINT}: {_said(cause)}",
            next_step="check HF_ENDPOINT, proxies and login pages of the network",
        )
    if isinstance(cause, hf.HFValidationError):
        return HubError(
            "This is not a repository name.",
            where=where,
            expected="owner/name, of letters, digits, '-', '_' and '.', at most 96 characters",
            next_step="name another one with --repo",
        )
    if isinstance(cause, OSError):
        return HubError(
            f"A file cannot be read: {_said(cause)}",
            where=where,
            next_step="check the file, then run the same command again",
        )
    if isinstance(cause, RuntimeError):
        return HubError(f"Sending failed: {_said(cause)}", where=where, next_step=_ANOTHER_WAY)
    if isinstance(cause, ValueError):
        # Among them a card with invalid metadata, a file too large for the Hub, a file that was removed meanwhile.
        return HubError(f"This cannot be sent: {_said(cause)}", where=where, next_step="correct it, then run it again")
    return None


def _refused(cause: BaseException, code: int, where: str) -> HubError:
    from huggingface_hub import errors as hf

    said, got = _said(cause), f"HTTP {code}"
    if code == 401:
        return HubAuthError(
            "The Hub does not accept this token, or none was sent.", where=where, got=got, next_step=_token_advice()
        )
    if code == 403 and _of_storage(cause):
        return HubError(f"The Hub's storage does not take a file: {said}", where=where, got=got, next_step=_AGAIN)
    if code == 402 or (code == 403 and re.search(r"storage|quota|billing|\bplan\b", said, re.IGNORECASE)):
        return HubError(
            f"The account's storage on the Hub is used up, or its plan does not cover this: {said}",
            where=where,
            got=got,
            next_step="make room or upgrade (settings, billing), or publish without --private: public storage has other limits",
        )
    if code == 403:
        return _forbidden(said, where, got)
    if isinstance(cause, hf.RevisionNotFoundError):
        return HubNotFoundError(
            "The repository has no such branch, tag or commit.", where=where, got=got, next_step=_AGAIN
        )
    if code == 404:
        return HubNotFoundError(
            "The Hub does not have this, or this account cannot see it.",
            where=where,
            got=got,
            next_step="check the spelling owner/name and whose token is used: `hf auth whoami`",
        )
    if code == 409:
        return HubError(
            f"The Hub reports a conflict: {said}",
            where=where,
            got=got,
            next_step="another push may be under way, or the name be taken: look at the page, then run it again",
        )
    if code == 412:
        return HubError(
            "Somebody else has committed here in the meantime.",
            where=where,
            got=got,
            next_step="look at the repository's history; run the same command again to publish on top of it",
        )
    if code == 413:
        return HubError(
            "This is more than the Hub takes at once.",
            where=where,
            got=got,
            next_step="cut the weights into smaller shards, or the rows into larger files",
        )
    if code == 429:
        seconds = told(_headers(cause))
        return HubError(
            "The Hub wants fewer requests.",
            where=where,
            got=got,
            next_step=f"run the same command again {'later' if seconds is None else f'in {duration(seconds)}'}: {_KEPT}",
        )
    if code >= 500:
        return HubError(
            f"The Hub answered with an error {TRIES} times: {said}",
            where=where,
            got=got,
            next_step=f"run the same command again later: {_KEPT}. The Hub's own state: https://status.huggingface.co",
        )
    return HubError(
        f"The Hub does not accept this: {said}", where=where, got=got, next_step="correct it, then run it again"
    )


_KEPT = "what has arrived is not sent again"
_AGAIN = f"run the same command again: {_KEPT}"
_ANOTHER_WAY = f"{_AGAIN}. With HF_HUB_DISABLE_XET=1 large files go another way"


def _forbidden(said: str, where: str, got: str) -> HubGatedError:
    if re.search(r"write token|read[- ]only|read token", said, re.IGNORECASE):
        return HubGatedError("This token may read and not write.", where=where, got=got, next_step=_token_advice())
    return HubGatedError(
        f"This account, or this token of it, may not write here: {said}",
        where=where,
        got=got,
        next_step="check the owner's spelling; in an organisation the account needs the role write or contributor, and a"
        " fine-grained token must name the organisation or the repository. `hf auth whoami` says who this is;"
        " --create-pr needs no membership",
    )


def _token_advice() -> str:
    from huggingface_hub import constants

    return (
        f"make a token of type write ({constants.ENDPOINT}/settings/tokens), or a fine-grained one that may write to this"
        " repository's owner, then `hf auth login`, or set HF_TOKEN"
    )


def _said(cause: BaseException) -> str:
    """What the Hub or the client says, on one line and without anything secret."""
    told_by_hub = getattr(cause, "server_message", None)
    text = (
        first_line(cause)
        if told_by_hub is None and status(cause)
        else str(told_by_hub or cause) or type(cause).__name__
    )
    return re.sub(r"hf_\w+", "hf_***", re.sub(r"\?[^\s'\"]*", "?...", " ".join(text.split())))[:300]
