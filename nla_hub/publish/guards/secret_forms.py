"""What secrets look like: access tokens, e-mail addresses, paths of machines, ids of trackers' runs. All of it is data.

A rule is looked for by a literal key first, so that a file of megabytes costs milliseconds.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

Kind = Literal["token", "e-mail", "path", "name", "run id"]

LOOK_BACK = 64
"""Bytes before a key that may belong to what it tells: the longest local part of an e-mail address (RFC 5321)."""

LOOK_AHEAD = 4096
"""Bytes behind a key that may belong to it: the longest path of Linux."""

Pattern = re.Pattern[bytes]


@dataclass(frozen=True)
class Rule:
    """One kind of secret.

    Attributes:
        what: in words, for messages: "a Hugging Face token".
        kind: what `scrub.mask` puts in its place.
        keys: literals, one of which every such secret holds.
        pattern: what stands from the key on; a group `secret` is the part that matters, where it is not all of it.
        before: what stands before the key and belongs to it.
        folded: whether the keys, in small letters, stand for any spelling.
        accepts: a last word on what the pattern found.
    """

    what: str
    kind: Kind
    keys: tuple[bytes, ...]
    pattern: Pattern
    before: Pattern | None = None
    folded: bool = False
    accepts: Callable[[bytes], bool] | None = None

    def spans(self, data: bytes, folded: bytes) -> Iterator[tuple[int, int]]:
        """Where it stands in `data`; `folded` is the same in small letters."""
        hay = folded if self.folded else data
        for key in self.keys:
            place = hay.find(key)
            while place >= 0:
                if (span := self._at(data, place)) is not None:
                    yield span
                place = hay.find(key, place + 1)

    def _at(self, data: bytes, place: int) -> tuple[int, int] | None:
        found = self.pattern.match(data, place)
        if found is None:
            return None
        start, end = found.span("secret") if "secret" in self.pattern.groupindex else found.span()
        if self.before is not None:
            leading = self.before.search(data, max(0, place - LOOK_BACK), place)
            if leading is None:
                return None
            start = leading.start()
        if self.accepts is not None and not self.accepts(data[start:end]):
            return None
        return start, end


def entropy(value: bytes) -> float:
    """Bits a byte, by how often each occurs in it."""
    return -sum(n / len(value) * math.log2(n / len(value)) for n in Counter(value).values())


def _random(value: bytes) -> bool:
    """Whether a value looks drawn and not written: letters and digits, and little repetition. Commit hashes have 3.5 to 3.9
    bits a byte, words of this length without a digit up to 3.5.
    """
    return bool(re.search(rb"[A-Za-z]", value)) and bool(re.search(rb"\d", value)) and entropy(value) >= 3.0


def _password(value: bytes) -> bool:
    return bool(re.search(rb"[A-Za-z]", value)) and bool(re.search(rb"[\d!#$%^&*?]", value)) and entropy(value) >= 2.5


def _no_stand_in(value: bytes) -> bool:
    """Whether it is not the row of x, * or dots that documentation puts in a token's place."""
    return not re.search(rb"[xX*.]{8,}\Z|\.\.\.|YOUR_|<", value)


def _token(what: str, key: str, pattern: str, *, edge: bool = False) -> Rule:
    """A token with a beginning of its own; `edge`: one so short that it counts at the beginning of a word only."""
    bounded = (rb"(?<![A-Za-z0-9])" if edge else b"") + pattern.encode()
    return Rule(what, "token", (key.encode(),), re.compile(bounded), accepts=_no_stand_in)


_ASSIGNED = rb"""(?:[_-]?(?:key|value))?\\?["']?[ \t]{0,8}(?::=|=>|[:=])[ \t]{0,8}\\?["']?"""

TOKENS: tuple[Rule, ...] = (
    _token("a Hugging Face token", "hf_", r"hf_[A-Za-z0-9]{20,}"),
    _token("a Hugging Face token", "api_org_", r"api_org_[A-Za-z0-9]{20,}"),
    _token("an Anthropic key", "sk-ant-", r"sk-ant-[A-Za-z0-9_-]{16,}"),
    _token("an OpenAI key", "sk-", r"sk-(?:[a-z]+-)?(?=[A-Za-z0-9_-]{0,200}\d)[A-Za-z0-9_-]{20,}", edge=True),
    _token("an OpenAI key", "sk-", r"sk-[A-Za-z0-9]{32,}", edge=True),
    _token("a GitHub token", "gh", r"gh[pousr]_[A-Za-z0-9]{30,}"),
    _token("a GitHub token", "github_pat_", r"github_pat_[A-Za-z0-9_]{30,}"),
    _token("a GitLab token", "glpat-", r"glpat-[A-Za-z0-9_-]{20,}"),
    *(
        _token("an AWS access key", key, key + r"[A-Z0-9]{16}(?![A-Za-z0-9])", edge=True)
        for key in ("AKIA", "ASIA", "ABIA", "ACCA")
    ),
    _token("a Google API key", "AIza", r"AIza[A-Za-z0-9_-]{35}", edge=True),
    _token("a Google token", "ya29.", r"ya29\.[A-Za-z0-9_-]{20,}", edge=True),
    _token("a Google client secret", "GOCSPX-", r"GOCSPX-[A-Za-z0-9_-]{20,}"),
    _token("a Slack token", "xox", r"xox[a-z]-(?=[A-Za-z-]{0,40}\d)[A-Za-z0-9-]{10,}"),
    _token("a Slack token", "xapp-", r"xapp-\d-[A-Za-z0-9-]{10,}"),
    _token("a Slack webhook", "hooks.slack.com/", r"hooks\.slack\.com/(?:services|workflows)/[A-Za-z0-9/_-]{20,}"),
    _token("a Weights & Biases key", "wandb_v1_", r"wandb_v1_[A-Za-z0-9_]{30,}"),
    _token("a Weights & Biases key", "local-", r"local-[0-9a-f]{40}", edge=True),
    _token("an npm token", "npm_", r"npm_[A-Za-z0-9]{30,}"),
    _token("a PyPI token", "pypi-", r"pypi-[A-Za-z0-9_-]{50,}"),
    _token("a Stripe key", "k_live_", r"k_live_[A-Za-z0-9]{20,}"),
    _token("a SendGrid key", "SG.", r"SG\.[A-Za-z0-9_-]{16,}\.[A-Za-z0-9_-]{30,}", edge=True),
    _token("a Groq key", "gsk_", r"gsk_[A-Za-z0-9]{30,}", edge=True),
    _token("a Replicate token", "r8_", r"r8_[A-Za-z0-9]{30,}", edge=True),
    _token("an NVIDIA key", "nvapi-", r"nvapi-[A-Za-z0-9_-]{30,}"),
    _token("an xAI key", "xai-", r"xai-[A-Za-z0-9]{40,}", edge=True),
    _token("a Perplexity key", "pplx-", r"pplx-[A-Za-z0-9]{30,}"),
    _token("a Together key", "tgp_v1_", r"tgp_v1_[A-Za-z0-9_-]{30,}"),
    _token("a RunPod key", "rpa_", r"rpa_[A-Z0-9]{30,}", edge=True),
    _token("a Databricks token", "dapi", r"dapi[0-9a-f]{32}", edge=True),
    _token("a web token", "eyJ", r"eyJ[A-Za-z0-9_-]{10,}\.eyJ[A-Za-z0-9_-]{10,}\.[A-Za-z0-9_-]{10,}"),
    _token("a private key", "-----BEGIN ", r"-----BEGIN (?:[A-Z0-9]+ ){0,3}PRIVATE KEY(?: BLOCK)?-----"),
    Rule(
        "a private key", "token", (b"putty-user-key-file-",), re.compile(rb"(?i)putty-user-key-file-\d:"), folded=True
    ),
    Rule(
        "a user name and password in an address",
        "token",
        (b"://",),
        re.compile(rb"""://[^\s/:@"'<>{}$*]{0,128}:[^\s/@"'<>{}$*]{1,256}@(?=[A-Za-z0-9\[])"""),
        before=re.compile(rb"[A-Za-z][A-Za-z0-9+.-]{0,31}\Z"),
    ),
    Rule(
        "a bearer token",
        "token",
        (b"bearer ", b"basic "),
        re.compile(rb"(?i)(?<![A-Za-z])(?:bearer|basic) +(?P<secret>[A-Za-z0-9._~+/=-]{16,})"),
        folded=True,
        accepts=_random,
    ),
    Rule(
        "an assigned secret",
        "token",
        tuple(b"secret token api_key apikey api-key access_key access-key accesskey account_key accountkey".split()),
        re.compile(
            rb"(?i)(?:secret|token|(?:api|access|account)[_-]?key)" + _ASSIGNED + rb"(?P<secret>[\w+/=.~-]{16,})"
        ),
        folded=True,
        accepts=_random,
    ),
    Rule(
        "a password",
        "token",
        (b"password", b"passwd"),
        re.compile(rb"""(?i)passw(?:or)?d""" + _ASSIGNED + rb"""(?P<secret>[^\s"'<>{}()\[\],;\\]{8,})"""),
        folded=True,
        accepts=_password,
    ),
    Rule(
        "a password",
        "token",
        (b"password ",),  # as ~/.netrc has it
        re.compile(rb"(?i)(?<![A-Za-z])password[ \t]+(?P<secret>[A-Za-z0-9_-]{24,})"),
        folded=True,
        accepts=_random,
    ),
)
"""Access tokens by what they look like. From the issuers' own descriptions of their formats; lengths are lower bounds."""

NOBODY = (
    re.compile(rb"(?i)(?:.*[+.-])?(?:no[-_.]?reply|do[-_.]?not[-_.]?reply)@.*"),
    re.compile(rb"(?i).*@(?:.*\.)?example\.(?:com|net|org)|.*@(?:.*\.)?(?:example|invalid|test)"),  # RFC 2606
    re.compile(rb"(?i).*@users\.noreply\.(?:github\.com|huggingface\.co)"),
    re.compile(rb"git@.*"),  # the account under which repositories are cloned
)
"""Addresses that belong to nobody, and so may stand anywhere."""

_LABEL = rb"(?=[A-Za-z0-9-]*[A-Za-z])[A-Za-z0-9](?:[A-Za-z0-9-]{0,61}[A-Za-z0-9])?"

EMAILS = (
    Rule(
        "an e-mail address",
        "e-mail",
        (b"@",),
        re.compile(rb"@(?:" + _LABEL + rb"\.){1,8}[A-Za-z]{2,24}(?![A-Za-z0-9])"),
        before=re.compile(rb"[A-Za-z0-9._%+-]*[A-Za-z0-9_%+-]\Z"),
        accepts=lambda address: not any(rule.fullmatch(address) for rule in NOBODY),
    ),
)
"""A domain has a letter in each part: `recall@10.mean` is none."""

_EDGE = rb"(?<![A-Za-z0-9_.~/)\]}@%+#*-])"
"""What stands before an absolute path; anything else is the end of a web address or of a relative path."""
_NAME = rb"[A-Za-z0-9_.@%+-]+"
_REST = rb"""(?:(?:\\{1,2}/?|/+)[^\s"'<>|:*?,;()\[\]{}`\\/]*){0,64}"""


def _path(what: str, folder: str, *, name: bytes = rb"\\?/" + _NAME) -> Rule:
    """A path that begins with a folder; JSON may put a backslash before each slash."""
    keys = (folder.encode(), folder.replace("/", r"\/").encode())
    parts = rb"\\?/".join(re.escape(part).encode() for part in folder.split("/"))
    return Rule(what, "path", keys, re.compile(_EDGE + parts + name + _REST))


PATHS: tuple[Rule, ...] = (
    _path("a home directory", "/home"),
    _path("a home directory", "/Users"),
    _path("a home directory", "/root", name=rb"(?![A-Za-z0-9_.-])"),
    Rule(
        "a home directory",
        "path",
        (rb":\users" + b"\\", rb":\\users" + b"\\\\", rb":/users/"),
        re.compile(rb"(?i):(?:\\{1,2}|/)Users(?:\\{1,2}|/)" + _NAME + _REST),
        before=re.compile(rb"(?<![A-Za-z0-9])[A-Za-z]\Z"),
        folded=True,
    ),
    *(_path("a temporary directory", folder) for folder in ("/tmp", "/var/tmp", "/var/folders", "/private")),
    *(_path("a directory of a machine", folder) for folder in ("/mnt", "/scratch", "/workspace", "/kaggle", "/dbfs")),
    _path("a directory of a machine", "/content/drive"),
    Rule(
        "a file of a machine", "path", (b"file:" + b"//",), re.compile(rb"(?i)file:/{2,3}" + _NAME + _REST), folded=True
    ),
)
"""Where people's files lie on Linux, macOS, Windows, and on rented machines."""

RUN_IDS: tuple[Rule, ...] = (
    Rule(
        "the address of a tracker's run",
        "run id",
        (b"wandb.ai/",),
        re.compile(rb"wandb\.ai/[\w.-]+/[\w.-]+/runs/[\w-]+"),
    ),
    Rule("the id of a tracker's run", "run id", (b"run-",), re.compile(rb"run-\d{8}_\d{6}-[a-z0-9]{8}(?![a-z0-9])")),
    Rule(
        "the id of a tracker's run",
        "run id",
        (b"run_id", b"run-id", b"runid", b"wandb_id", b"experiment_key"),
        re.compile(
            rb"(?i)(?:run[_-]?id|wandb_id|experiment_key)" + _ASSIGNED + rb"(?P<secret>[A-Za-z0-9][A-Za-z0-9-]{5,})"
        ),
        folded=True,
        accepts=lambda value: bool(re.search(rb"\d", value)),
    ),
)
"""What experiment trackers call a run. The recipe's own hash, which names a run directory, is no secret."""

TRACES: tuple[Rule, ...] = (*TOKENS, *EMAILS, *PATHS, *RUN_IDS)
"""Everything that can be told by its look alone."""


def value_rule(what: str, kind: Kind, value: str, *, whole: bool = False) -> Rule:
    """Exactly this value, wherever it stands; `whole`: as a word of its own."""
    key = value.encode("utf-8", "surrogateescape")
    word = rb"[A-Za-z0-9_\x80-\xff]"
    pattern = rb"(?<!" + word + rb")" + re.escape(key) + rb"(?!" + word + rb")" if whole else re.escape(key)
    return Rule(what, kind, (key,), re.compile(pattern))


def place_rule(what: str, place: str) -> Rule:
    """An absolute path and everything below it."""
    keys = dict.fromkeys(s.encode("utf-8", "surrogateescape") for s in (place, place.replace("\\", "\\\\")))
    pattern = rb"(?:" + rb"|".join(map(re.escape, keys)) + rb")(?![A-Za-z0-9_.-])" + _REST
    return Rule(what, "path", tuple(keys), re.compile(_EDGE + pattern))
