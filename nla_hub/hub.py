"""The only module that talks to the Hugging Face Hub; its refusals become this project's errors.

HF_HOME, HF_HUB_CACHE, HF_TOKEN, HF_ENDPOINT and HF_HUB_OFFLINE mean what they mean to huggingface_hub.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

from nla_hub.errors import HubAuthError, HubError, HubGatedError, HubNotFoundError, HubUnreachableError

MODEL_FILES = ("*.json", "*.safetensors", "*.yaml", "*.jinja", "*.model", "*.txt", "LICENSE*", "NOTICE*")
"""What a checkpoint is made of here. Pickled weights and Python files are never downloaded."""


@dataclass(frozen=True)
class HubOptions:
    """How to download; the keywords of transformers' `from_pretrained`."""

    token: str | bool | None = None
    cache_dir: str | Path | None = None
    local_files_only: bool = False
    force_download: bool = False

    def __repr__(self) -> str:  # a token never reaches a log
        return f"HubOptions(token={'***' if isinstance(self.token, str) else self.token}, cache_dir={self.cache_dir})"


def fetch(repo: str, *, revision: str | None, options: HubOptions, files: Sequence[str] = MODEL_FILES) -> Path:
    """Download (or find in the cache) the files of a model repository that match `files`; its local directory.

    Raises:
        HubNotFoundError, HubAuthError, HubGatedError, HubUnreachableError, HubError.
    """
    from huggingface_hub import snapshot_download

    with _typed(repo, revision):
        return Path(
            snapshot_download(
                repo,
                revision=revision,
                token=options.token,
                cache_dir=options.cache_dir,
                local_files_only=options.local_files_only,
                force_download=options.force_download,
                allow_patterns=list(files),
            )
        )


@contextmanager
def _typed(repo: str, revision: str | None) -> Iterator[None]:
    from huggingface_hub import errors as hf

    where = f"{repo}@{revision}" if revision else repo
    try:
        yield
    except hf.GatedRepoError as cause:
        raise HubGatedError(
            "This repository is gated, and this account may not read it yet.",
            where=where,
            got=_status(cause),
            next_step=f"accept its terms on the page of {repo}, then `hf auth login`",
        ) from cause
    except hf.RevisionNotFoundError as cause:
        raise HubNotFoundError(
            f"The repository has no revision {revision!r}.",
            where=repo,
            got=_status(cause),
            next_step="leave the revision out for the newest one, or look it up on the repository's page",
        ) from cause
    except hf.EntryNotFoundError as cause:
        if isinstance(cause, hf.LocalEntryNotFoundError):
            answer = cause.__cause__  # where the Hub did answer, but not with the files
            raise (_refused(where, answer) if isinstance(answer, hf.HfHubHTTPError) else _unreachable(where)) from cause
        raise HubNotFoundError(
            f"A file is missing: {_first_line(cause)}", where=where, next_step="try again, or name another revision"
        ) from cause
    except hf.RepositoryNotFoundError as cause:
        if _code(cause) == 401:
            raise _unauthorized(where, cause) from cause
        raise HubNotFoundError(
            "The Hub has no such repository (or it is private and the token cannot see it).",
            where=where,
            got=_status(cause),
            next_step="check the spelling owner/name; for a private one `hf auth login`; a local directory is written ./name",
        ) from cause
    except hf.HFValidationError as cause:
        raise HubNotFoundError(
            "This is not a repository name.",
            where=where,
            expected="owner/name or owner/name@revision",
            next_step="check the spelling; a local directory is written ./name",
        ) from cause
    except hf.OfflineModeIsEnabled as cause:
        raise _unreachable(where) from cause
    except hf.HfHubHTTPError as cause:
        raise _refused(where, cause) from cause
    except _transport_errors() as cause:
        raise _unreachable(where) from cause
    except OSError as cause:
        raise HubError(
            f"The download could not be stored: {cause}",
            where=where,
            next_step="check free space and permissions of the cache (HF_HOME, cache_dir=)",
        ) from cause


def _transport_errors() -> tuple[type[Exception], ...]:
    """What a broken connection raises: huggingface_hub 1 speaks through httpx, huggingface_hub 2 through httpx2."""
    found: list[type[Exception]] = []
    for name in ("httpx", "httpx2"):
        with suppress(ImportError):
            found.append(import_module(name).TransportError)
    return (ConnectionError, TimeoutError, *found)


def _refused(where: str, cause: Exception) -> HubError:
    code = _code(cause)
    if code == 401:
        return _unauthorized(where, cause)
    if code == 403:
        return HubGatedError(
            "The Hub refuses this account.", where=where, got=_status(cause), next_step="check the token's permissions"
        )
    if code == 404:
        return HubNotFoundError(
            "The Hub does not have this.", where=where, got=_status(cause), next_step="check name and revision"
        )
    return HubError(f"The Hub answered with an error: {_first_line(cause)}", where=where, next_step="try again later")


def _unauthorized(where: str, cause: Exception) -> HubAuthError:
    return HubAuthError(
        "The Hub does not accept this token, or wants one and none was sent.",
        where=where,
        got=_status(cause),
        next_step="`hf auth login`, or set HF_TOKEN; check the spelling too, since unknown repositories answer the same",
    )


def _unreachable(where: str) -> HubUnreachableError:
    return HubUnreachableError(
        "The Hub cannot be reached, and the cache does not hold what is needed.",
        where=where,
        next_step="check the connection (and HF_HUB_OFFLINE, HF_ENDPOINT); a directory is written ./path; the packaged pair "
        "needs no network: --nla tiny",
    )


def _code(cause: Exception) -> int | None:
    response = getattr(cause, "response", None)
    return getattr(response, "status_code", None)


def _status(cause: Exception) -> str | None:
    code = _code(cause)
    return f"HTTP {code}" if code else None


def _first_line(cause: Exception) -> str:
    return str(cause).strip().splitlines()[0] if str(cause).strip() else type(cause).__name__
