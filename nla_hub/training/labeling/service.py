"""Settings of labelers behind an API, and where their key comes from: an environment variable, and nowhere else."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from nla_hub.errors import InputError
from nla_hub.training.labeling.cost import Prices
from nla_hub.training.labeling.prompt import PromptSettings

_VARIABLE = re.compile(r"[A-Z_][A-Z0-9_]{0,63}")
"""Names of variables: upper case, which no key is, so that a key that was pasted here is refused and never printed."""

PLACEHOLDER = "none"
"""What is sent as a key to a server that wants none: the SDKs insist on one."""


@dataclass(frozen=True, kw_only=True)
class ServiceSettings(PromptSettings):
    """What labelers behind an API share.

    Attributes:
        model: as the API calls it.
        base_url: of the API; None: the company's own.
        api_key_env: name of the environment variable with the key. None: the usual one for the company's own API, and no key
            for any other server, to which a key is never sent unasked.
        temperature: None: not sent, so the API's default (some models take no other).
        options: further fields of the request's body, as the API documents them.
        input_price, output_price: of a million tokens. None: not known, and no cost is computed.
        max_cost: refuse to begin, and stop, where all labels of these settings in this cache would cost more.
        requests_per_minute, tokens_per_minute: of the account; None: only what the API says (429, Retry-After).
        timeout: seconds that an answer may take.
        patience: seconds for which a request is made again, while the API does not answer or is busy.
    """

    model: str
    base_url: str | None = None
    api_key_env: str | None = None
    temperature: float | None = None
    options: dict[str, Any] = field(default_factory=dict)
    input_price: float | None = None
    output_price: float | None = None
    max_cost: float | None = None
    requests_per_minute: float | None = None
    tokens_per_minute: float | None = None
    timeout: float = 300.0
    patience: float = 900.0

    def faults(self) -> Iterator[str]:
        """Addresses that are none, bounds out of range, a key where its variable's name should be."""
        yield from super().faults()
        if not self.model:
            yield "model: got nothing, expected the model's name"
        if self.base_url is not None and (fault := _address_fault(self.base_url)):
            yield f"base_url: {fault}"
        if self.api_key_env is not None and not _VARIABLE.fullmatch(self.api_key_env):
            yield "api_key_env: expected the name of an environment variable in upper case (never the key itself)"
        if (self.input_price is None) != (self.output_price is None):
            yield "input_price, output_price: only one of them is given"
        if self.max_cost is not None and self.input_price is None:
            yield "max_cost: needs input_price and output_price"
        for name in ("input_price", "output_price", "max_cost", "temperature"):
            if (value := getattr(self, name)) is not None and value < 0:
                yield f"{name}: got {value}, expected 0 or more"
        for name in ("requests_per_minute", "tokens_per_minute", "timeout", "patience"):
            if (value := getattr(self, name)) is not None and not value > 0:
                yield f"{name}: got {value}, expected a value above 0"
        if taken := sorted(set(self.options) & {"model", "messages", "stream", "temperature", "n"}):
            yield f"options: {', '.join(taken)} cannot be set here"

    @property
    def prices(self) -> Prices:
        """As the user gave them."""
        return Prices(self.input_price, self.output_price)


@dataclass(frozen=True)
class Key:
    """The key of an API, which no message, log or file shows.

    Attributes:
        secret: None: none is sent.
        variable: where it is from, or would be.
    """

    secret: str | None = field(repr=False)
    variable: str

    @classmethod
    def find(cls, settings: ServiceSettings, *, own: str, usual: str) -> Key:
        """The key for these settings; an InputError where it is needed and not there.

        Args:
            own: the company's own address, for which the variable `usual` holds.
        """
        variable = settings.api_key_env
        if variable is None:
            if settings.base_url is not None and host_of(settings.base_url) != host_of(own):
                return cls(None, usual)
            variable = usual
        secret = os.environ.get(variable, "").strip()
        if not secret:
            raise InputError(
                "There is no API key for the labeler.",
                where=f"environment variable {variable}",
                next_step=f"export {variable}=..., or name another variable in labels.settings.api_key_env",
            )
        return cls(secret, variable)

    def clean(self, text: object) -> str:
        """Somebody else's words on one line, short, and without the key should they repeat it."""
        words = " ".join(str(text).split())
        if self.secret:
            words = words.replace(self.secret, "***")
        return words[:300]


def host_of(url: str) -> str | None:
    """The host of an address."""
    return urlsplit(url).hostname


def _address_fault(url: str) -> str | None:
    try:
        parts = urlsplit(url)
        _ = parts.port
    except ValueError:
        return "expected http://host:port/v1 or https://host/v1"
    if parts.username is not None or parts.password is not None or parts.query or parts.fragment:
        return "it holds more than an address; a key is read from the variable that api_key_env names"
    if parts.scheme not in ("http", "https") or not parts.hostname:
        return f"got {url!r}, expected http://host:port/v1 or https://host/v1"
    return None
