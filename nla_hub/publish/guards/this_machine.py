"""What would tell whose machine a release was made on: its account's tokens, its directories, its names.

Values are compared, never shown: a W&B key is forty hex digits like any commit, so nothing but comparing would find it.
"""

from __future__ import annotations

import getpass
import netrc
import os
import re
import socket
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path

from nla_hub.publish.guards.secret_forms import Kind, Rule, place_rule, value_rule

_SECRET_VARIABLE = re.compile(
    r"(?:^|_)(?:TOKEN|API_?KEY|ACCESS_KEY(?:_ID)?|SECRET(?:_KEY)?|PASSWORD|PASSWD)$", re.IGNORECASE
)
_RUN_VARIABLES = ("WANDB_RUN_ID", "MLFLOW_RUN_ID", "COMET_EXPERIMENT_KEY", "NEPTUNE_RUN_ID")

SHORTEST_TOKEN = 12
"""Characters; anything shorter may stand in a text by chance."""

SHORTEST_NAME = 4
"""Characters of a host or user name that is looked for."""

ORDINARY = frozenset(
    """root user users admin administrator guest test tester demo owner home host server client node worker main master
    login local localhost localdomain computer desktop laptop machine cluster docker container runner builder build service
    system nobody default debian ubuntu centos fedora rocky alpine arch linux windows macbook vagrant jovyan colab kaggle
    azureuser ec2-user vscode codespace codespaces gitpod devcontainer jenkins travis circleci python conda jupyter notebook
    model models data dataset train trainer trainee training source gpu-server workstation development production student
    research researcher scientist engineer developer""".split()
)
"""Names that say nothing about anybody: accounts that systems come with, and words of this trade."""


def own_tokens() -> list[Rule]:
    """The account's own tokens: of the environment, of huggingface_hub's files, of ~/.netrc. Nothing goes online."""
    rules: dict[str, Rule] = {}
    for name, value in os.environ.items():
        if _SECRET_VARIABLE.search(name) and _is_secret(value):
            rules.setdefault(value, value_rule(f"the value of {name}", "token", value))
    for what, value in [*_stored_tokens(), *_netrc_passwords()]:
        if _is_secret(value):
            rules.setdefault(value, value_rule(what, "token", value))
    return list(rules.values())


def _is_secret(value: str) -> bool:
    # A variable may hold the place of a token in place of a token.
    return len(value) >= SHORTEST_TOKEN and not re.search(r"\s", value) and not value.startswith(("/", "~", "."))


def _stored_tokens() -> Iterator[tuple[str, str]]:
    """What `hf auth login` keeps. Its own reader may go online to renew a token; the files are enough here."""
    from huggingface_hub import constants

    with suppress(OSError):
        yield "this account's Hugging Face token", Path(constants.HF_TOKEN_PATH).read_text(errors="replace").strip()
    with suppress(OSError):
        stored = Path(constants.HF_STORED_TOKENS_PATH).read_text(errors="replace")
        for found in re.finditer(r"(?m)^\s*\w*token\s*[:=]\s*(\S+)\s*$", stored):
            yield "a stored Hugging Face token", found[1]


def _netrc_passwords() -> Iterator[tuple[str, str]]:
    try:
        # Named, so that it is read however its permissions are.
        hosts = netrc.netrc(os.environ.get("NETRC") or str(Path.home() / ".netrc")).hosts
    except (OSError, netrc.NetrcParseError, RuntimeError):  # absent, unreadable, or no home directory
        return
    for host, (_, _, password) in hosts.items():
        if password:
            yield f"the password for {host} in ~/.netrc", password


def own_places(places: Iterable[Path]) -> list[Rule]:
    """The home, working and temporary directory, and `places` (a run, a pair), as they are called and as they really are."""
    known = [("this machine's home directory", _known(Path.home)), ("the working directory", _known(Path.cwd))]
    known += [("the temporary directory", Path(tempfile.gettempdir()))]
    known += [("where the release was made", place.absolute()) for place in places]
    found: dict[str, str] = {}
    for what, place in known:
        for form in () if place is None else (place, place.resolve()):
            if len(form.parts) > 2 or (what.endswith("home directory") and len(form.parts) > 1):
                found.setdefault(str(form), what)
    # The longest first: the same text is told once, by what it says most exactly.
    return [place_rule(what, place) for place, what in sorted(found.items(), key=lambda item: -len(item[0]))]


def _known(ask: Callable[[], Path]) -> Path | None:
    """A directory; None where there is none: a user without a home, a working directory that was removed."""
    try:
        return ask()
    except (RuntimeError, OSError):
        return None


def own_names(public: Sequence[str], is_word: Iterable[bytes] = ()) -> list[Rule]:
    """The host's and the user's name, as words of their own; those that say nothing about anybody are left out.

    Args:
        public: what the release is called by: a user name that is the name of an account on the Hub stands there anyway.
        is_word: vocabularies of the release's tokenizers; a name that is one token of a language is a word of it.
    """
    shown = {part.lower() for name in public for part in re.split(r"[^A-Za-z0-9]+|$", name)} | {
        n.lower() for n in public
    }
    vocabularies = list(is_word)
    rules = []
    for what, name in _names():
        if len(name) < SHORTEST_NAME or name.isdigit() or name.lower() in ORDINARY | shown:
            continue
        if any(_is_token(name, vocabulary) for vocabulary in vocabularies):
            continue
        rules.append(value_rule(what, "name", name, whole=True))
    return rules


def _names() -> list[tuple[str, str]]:
    host = socket.gethostname()
    found = [("this machine's host name", host), ("this machine's host name", host.split(".")[0])]
    with suppress(OSError, KeyError):  # no such user in the password database, as in containers
        found.append(("this machine's user name", getpass.getuser()))
    if (home := _known(Path.home)) is not None:
        found.append(("this machine's user name", home.name))
    return list(dict.fromkeys(found))


def _is_token(name: str, vocabulary: bytes) -> bool:
    return any(f'"{mark}{name}"'.encode() in vocabulary for mark in ("", "Ġ", "▁"))


def own_runs() -> list[Rule]:
    """Ids that trackers gave the run in this process's environment."""
    kind: Kind = "run id"
    values = {name: os.environ.get(name, "") for name in _RUN_VARIABLES}
    return [value_rule(f"the value of {n}", kind, value, whole=True) for n, value in values.items() if len(value) >= 6]
