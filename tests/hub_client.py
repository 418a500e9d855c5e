"""Runs in a process of its own: everything that can go wrong between huggingface_hub and the server of hub_server.py.

    python hub_client.py ENDPOINT FOLDER TOKEN

One line of JSON a scenario. No torch, so that it also runs where only the client is installed.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import resource
import sys
import time
import traceback
import urllib.request
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from hub_server import REVISION
from huggingface_hub import constants

from nla_hub.errors import NLAError
from nla_hub.hub import HubOptions, exists, fetch, fetch_files, headers, listing

ENDPOINT, FOLDER, TOKEN = sys.argv[1], Path(sys.argv[2]), sys.argv[3]
SMALL = ("*.json",)


class Run:
    """One scenario: a cache of its own, and what came out."""

    def __init__(self, what: str) -> None:
        self.what = what
        self.cache = FOLDER / "caches" / what.replace(" ", "-")

    def options(self, **changes: Any) -> HubOptions:
        return HubOptions(**{"cache_dir": self.cache, "token": TOKEN, **changes})

    def __call__(self, act: Callable[[Run], Any]) -> None:
        result: dict[str, Any] = {"what": self.what}
        began = time.monotonic()
        try:
            result["value"] = act(self)
        except Exception as error:
            result |= {"error": type(error).__name__, "typed": isinstance(error, NLAError), "text": str(error)}
            result["trace"] = "".join(traceback.format_exception(error))
        result["seconds"] = round(time.monotonic() - began, 2)
        result["loose"] = sorted(p.name for p in self.cache.rglob("*") if "incomplete" in p.name)
        sys.stdout.write(f"RESULT {json.dumps(result)}\n")  # in one piece: threads
        sys.stdout.flush()


def files(directory: Path) -> dict[str, str]:
    """What a download holds: name -> sha256."""
    return {
        path.relative_to(directory).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(directory.rglob("*"))
        if path.is_file()
    }


def get(repo: str, **keywords: Any) -> Callable[[Run], Any]:
    """Fetch all of a repository."""
    token = {"token": keywords.pop("token")} if "token" in keywords else {}
    return lambda run: files(fetch(repo, revision=keywords.get("revision"), options=run.options(**token)))


def listed(repo: str, revision: str | None = None) -> Callable[[Run], Any]:
    def act(run: Run) -> Any:
        found = listing(repo, revision=revision, options=run.options())
        return {"commit": found.commit, "files": dict(found.files), "cached": found.cached}

    return act


def head(repo: str, *names: str, revision: str | None = None) -> Callable[[Run], Any]:
    return lambda run: headers(repo, names, revision=revision, options=run.options())


def there(repo: str, **token: Any) -> Callable[[Run], Any]:
    return lambda run: exists(repo, options=run.options(**token))


def exact(run: Run) -> Any:
    found = listing("owner/pair", revision=None, options=run.options())
    names = ("av/model.safetensors", "av/odd[1].json", "LICENSE")
    directory = fetch_files("owner/pair", names, revision=None, commit=found.commit, options=run.options())
    offline = run.options(local_files_only=True)
    again = listing("owner/pair", revision=None, options=offline)
    return {
        "files": files(directory),
        "commit": found.commit,
        "offline": {"commit": again.commit, "files": dict(again.files), "cached": again.cached},
        "offline files": files(fetch_files("owner/pair", names, revision=None, options=offline)),
    }


def exact_offline_without(run: Run) -> Any:
    fetch_files("owner/pair", ["LICENSE"], revision=None, options=run.options())
    return str(fetch_files("owner/pair", ["av/config.json"], revision=None, options=run.options(local_files_only=True)))


def headers_of_cached(run: Run) -> Any:
    fetch_files("owner/pair", ["av/model.safetensors"], revision=REVISION, options=run.options())
    offline = run.options(local_files_only=True)
    return headers("owner/pair", ["av/model.safetensors"], revision=REVISION, options=offline)


def two_at_once(run: Run) -> Any:
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(lambda _: files(fetch("owner/twice", revision=None, options=run.options())), range(2)))
    return found


def fails_then_cached(run: Run) -> Any:
    """The Hub hangs up on every question, but the cache has it all."""
    first = files(fetch("owner/hangs-up", revision=None, options=run.options(), files=SMALL))
    found = listing("owner/hangs-up", revision=None, options=run.options())
    return [first, files(fetch("owner/hangs-up", revision=None, options=run.options(), files=SMALL)), found.cached]


def no_place(run: Run) -> Any:
    (FOLDER / "a file").write_text("in the way")
    return str(fetch("owner/pair", revision=None, options=run.options(cache_dir=FOLDER / "a file" / "cache")))


def read_only(run: Run) -> Any:
    run.cache.mkdir(parents=True)
    run.cache.chmod(0o555)
    return str(fetch("owner/pair", revision=None, options=run.options()))


def disk_full(run: Run) -> Any:
    """A disk without room, as far as one process can have it: no file may grow beyond 1 MB."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, hard))
    try:
        return str(fetch("owner/large", revision=None, options=run.options()))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


ONLINE: dict[str, Callable[[Run], Any]] = {
    "whole": get("owner/pair"),
    "moved": get("owner/old-name"),
    "listed": listed("owner/pair"),
    "listed at a commit": listed("owner/pair", REVISION),
    "exact": exact,
    "exact absent": lambda run: str(
        fetch_files("owner/pair", ["LICENSE", "no.json", "av/no.json"], revision=None, options=run.options())
    ),
    "exact offline without": exact_offline_without,
    "exact escape": lambda run: str(fetch_files("owner/pair", ["../x"], revision=None, options=run.options())),
    "listed escape": listed("owner/escape"),
    "fetched escape": get("owner/escape"),
    "listed absolute": listed("owner/absolute"),
    "odd commit": listed("owner/odd-commit"),
    "listed no revision": listed("owner/pair", "v9"),
    "headers": head("owner/pair", "av/model.safetensors", "ar/model.safetensors"),
    "headers of cached": headers_of_cached,
    "headers long": head("owner/hostile", "long.safetensors"),
    "headers list": head("owner/hostile", "list.safetensors"),
    "headers nested": head("owner/hostile", "nested.safetensors"),
    "headers shapes": head("owner/hostile", "shapes.safetensors"),
    "headers text": head("owner/hostile", "text.safetensors"),
    "headers empty": head("owner/hostile", "empty.safetensors"),
    "headers absent": head("owner/pair", "no.safetensors"),
    "headers later": head("owner/later-headers", "model.safetensors"),
    "exists": there("owner/pair"),
    "exists not": there("owner/absent"),
    "exists hidden": there("owner/hidden", token=False),
    "exists unauthorized": there("owner/unauthorized-av", token=False),
    "exists bad token": there("owner/bad-token-av"),
    "exists gated": there("owner/gated-av"),
    "exists broken": there("owner/broken-av"),
    "exists later": there("owner/later-exists"),
    "gated 403": get("owner/gated-av"),
    "gated 401": get("owner/gated-anonymous", token=False),
    "disabled": get("owner/disabled"),
    "hidden": get("owner/hidden", token=False),
    "unauthorized": get("owner/unauthorized-av", token=False),
    "down": get("owner/down"),
    "busy for long": get("owner/busy-for-long"),
    "busy window": listed("owner/busy-window"),
    "later info": get("owner/later-info"),
    "later tree": get("owner/later-tree"),
    "later head": get("owner/later-head"),
    "later blob": get("owner/later-blob"),
    "storage down": get("owner/storage-down"),
    "cut": get("owner/cut"),
    "cut late": get("owner/cut-late"),
    "reset": get("owner/reset"),
    "reset for good": get("owner/reset-for-good"),
    "other size": get("owner/other-size"),
    "damaged once": get("owner/damaged-once"),
    "damaged": get("owner/damaged"),
    "hangs up": fails_then_cached,
    "no Hub": get("owner/no-hub"),
    "two at once": two_at_once,
    "no place": no_place,
    "token with a line break": lambda run: repr(run.options(token=TOKEN + "\nHost: elsewhere")),
    "token with spaces around": lambda run: exists("owner/pair", options=run.options(token=f" {TOKEN}\n")),
    "no token stored": get("owner/pair", token=True),
}
if os.geteuid():  # nothing is read-only for root
    ONLINE["read only"] = read_only

WHOLE = Run("whole").cache
"""The cache that "whole" filled: what is left when there is no network."""


def cached(act: Callable[[Run], Any]) -> Callable[[Run], Any]:
    def with_cache(run: Run) -> Any:
        run.cache = WHOLE
        return act(run)

    return with_cache


OFFLINE: dict[str, Callable[[Run], Any]] = {
    "fetch": get("owner/pair"),
    "fetch at a commit": get("owner/pair", revision=REVISION),
    "list": listed("owner/pair"),
    "list at a commit": listed("owner/pair", REVISION),
    "headers": head("owner/pair", "av/model.safetensors"),
    "exists": there("owner/pair"),
    "fetch cached": cached(get("owner/pair")),
    "fetch cached at a commit": cached(get("owner/pair", revision=REVISION)),
    "list cached": cached(listed("owner/pair")),
    "headers cached": cached(head("owner/pair", "av/model.safetensors")),
    "exists cached": cached(there("owner/pair")),
}


def main() -> None:
    warnings.simplefilter("ignore")
    logging.basicConfig(level=logging.DEBUG, stream=sys.stderr)
    with ThreadPoolExecutor(16) as pool:  # most of them wait
        list(pool.map(lambda item: Run(item[0])(item[1]), ONLINE.items()))
    Run("disk full")(disk_full)
    try:
        while True:
            urllib.request.urlopen(ENDPOINT + "/stop").read()
    except OSError:
        pass  # refused from now on
    for what, act in OFFLINE.items():
        Run(f"refused {what}")(act)
    constants.HF_HUB_OFFLINE = True
    for what, act in OFFLINE.items():
        Run(f"offline {what}")(act)


if __name__ == "__main__":
    main()
