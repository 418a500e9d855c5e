"""What labels cost: an estimate before, what the API counted after. Prices are the user's; none is known here."""

from __future__ import annotations

import threading
from dataclasses import dataclass

from nla_hub.errors import TrainingError

BYTES_PER_TOKEN = 4.0
"""UTF-8 bytes of a token of a large vocabulary: OpenAI's help pages say 4 characters of English; an estimate."""

EXPECTED_OUTPUT_TOKENS = 220
"""Of an answer: the middle of 80 to 200 words at 1.4 tokens a word, and the tags; an estimate. Models that think write more."""

MILLION = 1_000_000


def tokens_in(text: str) -> int:
    """About how many tokens a text is."""
    return round(len(text.encode("utf-8", "surrogatepass")) / BYTES_PER_TOKEN) + 1


@dataclass(frozen=True)
class Prices:
    """Of a million tokens, in the currency in which the user gave them; None: not known."""

    input: float | None = None
    output: float | None = None

    @property
    def known(self) -> bool:
        """Whether costs can be computed."""
        return self.input is not None and self.output is not None

    def cost(self, input_tokens: float, output_tokens: float) -> float | None:
        """Of so many tokens; None where a price is not known."""
        if self.input is None or self.output is None:
            return None
        return (input_tokens * self.input + output_tokens * self.output) / MILLION


@dataclass(frozen=True)
class Estimate:
    """What requests will come to.

    Attributes:
        requests: answers to be paid.
        input_tokens, output_tokens: of all of them together.
        cost: in the currency of the prices; None where these are not known, 0 where nothing is paid.
    """

    requests: int
    input_tokens: int
    output_tokens: int
    cost: float | None

    def __str__(self) -> str:
        price = "the price is not known" if self.cost is None else f"about {money(self.cost)}"
        tokens = f"{self.input_tokens:,} input and {self.output_tokens:,} output tokens"
        return f"{self.requests:,} requests, about {tokens}, {price}"


@dataclass(frozen=True)
class Usage:
    """What an API counted: `answers`, of which `uncounted` came without figures, and their tokens."""

    answers: int = 0
    uncounted: int = 0
    input_tokens: int = 0
    output_tokens: int = 0

    def plus(self, input_tokens: int | None, output_tokens: int | None) -> Usage:
        """With one answer more."""
        silent = input_tokens is None or output_tokens is None
        return self + Usage(1, int(silent), input_tokens or 0, output_tokens or 0)

    def __add__(self, other: Usage) -> Usage:
        return Usage(
            self.answers + other.answers,
            self.uncounted + other.uncounted,
            self.input_tokens + other.input_tokens,
            self.output_tokens + other.output_tokens,
        )


def money(amount: float) -> str:
    """An amount in the user's currency, which has no name here."""
    return f"{amount:,.2f}" if amount >= 1 or amount == 0 else f"{amount:.2g}"


class Budget:
    """Keeps what is paid below a bound, with requests in flight counted at their worst.

    Args:
        most: the bound; None: there is none.
        spent: what was paid already.
    """

    def __init__(self, prices: Prices, most: float | None, spent: Usage) -> None:
        self.prices = prices
        self.most = most
        self._spent = self._cost(spent.input_tokens, spent.output_tokens)
        self._reserved = 0.0
        self._lock = threading.Lock()

    def _cost(self, input_tokens: float, output_tokens: float) -> float:
        return self.prices.cost(input_tokens, output_tokens) or 0.0

    def require(self, estimate: Estimate) -> None:
        """Raise a TrainingError where an estimate goes beyond the bound."""
        total = self._spent + (estimate.cost or 0.0)
        if self.most is not None and total > self.most:
            raise TrainingError(
                "These labels cost more than labels.settings.max_cost.",
                got=f"{estimate}; {money(self._spent)} were paid before",
                expected=f"{money(self.most)} in all",
                next_step="raise max_cost, label fewer documents, or take a cheaper model; answers that are paid stay",
            )

    def reserve(self, input_tokens: float, output_tokens: float) -> float:
        """Before a request: what it costs at most; a TrainingError where that could go beyond the bound."""
        worst = self._cost(input_tokens, output_tokens)
        with self._lock:
            if self.most is not None and self._spent + self._reserved + worst > self.most:
                raise TrainingError(
                    "The next request could cost more than labels.settings.max_cost leaves.",
                    got=f"{money(self._spent)} paid",
                    expected=f"{money(self.most)} in all",
                    next_step="raise max_cost and run the same command again: answers that are paid stay",
                )
            self._reserved += worst
        return worst

    def settle(self, reserved: float, input_tokens: float | None, output_tokens: float | None) -> None:
        """After it: what it did cost; what was reserved where its answer has no figures."""
        known = input_tokens is not None and output_tokens is not None
        paid = self._cost(input_tokens or 0, output_tokens or 0) if known else reserved
        with self._lock:
            self._reserved -= reserved
            self._spent += paid
