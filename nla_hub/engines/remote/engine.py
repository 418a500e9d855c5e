"""An AV that a vLLM server runs: the prompt goes there as embeddings, with the vector in the marker's place.

`nla-hub serve-command NLA` prints how to start such a server. Its `/v1/completions` takes whole prompts as embeddings and
no mixture of ids and embeddings, so the rows of the prompt's own tokens come from the AV's embedding table: of a checkpoint
on the Hub the one file that holds it is downloaded. (The chat route would put its template around the prompt once more.)

The server draws by itself. Each row's request carries a seed that follows from the row's own stream, so a row's text depends
on neither batch nor order; it is drawn from the same distribution as that of engine="transformers", and is another text.
"""

from __future__ import annotations

import base64
import io
import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property, partial
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor

from nla_hub.embedding import embedded, embedding_file, embedding_table, stored_dtype
from nla_hub.engines.base import (
    Completion,
    Reads,
    StoredAV,
    probe_vectors,
    require_kind,
    require_room,
    require_sensitive,
)
from nla_hub.engines.endings import Endings
from nla_hub.engines.remote import answers
from nla_hub.engines.remote.answers import Served
from nla_hub.engines.remote.pace import Batch
from nla_hub.engines.remote.transport import Address, Client, ServerError
from nla_hub.errors import InjectionError, InputError, Interrupted, VectorError
from nla_hub.prompts import CLOSING_TAG, OPENING_TAG
from nla_hub.sampling import request_seed
from nla_hub.source_text import context_length
from nla_hub.weights import StoredSlice, is_finite

T = TypeVar("T")

MODELS, COMPLETIONS = "/v1/models", "/v1/completions"

ROWS = 8
"""Rows of one greedy request at most: a few megabytes. Drawn rows go alone, since a request has one seed."""

TOP = 20
"""Likeliest tokens that probes ask for: what vLLM allows unless it is told otherwise (--max-logprobs)."""

COLDEST = 0.01
"""vLLM raises lower temperatures to this (`_MAX_TEMP` of its sampling_params.py)."""

ALIKE = 0.25
"""How far apart two answers to the same prompt may be, as a part of how far apart answers to different ones are.

From pass to pass bfloat16 moves a log-probability by 0.1 or so; another vector, rows of another table, rows that are scaled
twice or stand in another order move it by as much as another text.
"""

PLAIN: Mapping[str, Any] = {
    "top_p": 1.0,
    "top_k": -1,
    "min_p": 0.0,
    "repetition_penalty": 1.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
}
"""Sampling from the model's own distribution, said aloud: a server takes what is left out from the model's
generation_config.json."""

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
"""What a server may compute in, as vLLM calls it."""


class RemoteEngine:
    """Runs an AV on a vLLM server; injection kind `overwrite`.

    Args:
        url: of the server.
        api_key: what it was started with (--api-key), if anything; never printed.
        model: what it calls the AV, where it serves several models.
        dtype: what it computes in: "float32", "bfloat16" or "float16". By default what the embedding table is stored in,
            as serve-command has it.
        concurrency: requests in flight at most; fewer while the server says that it is busy.
        retries: how often a request is made again after a broken connection, a timeout, or a busy server.
        timeout: seconds that the server may be silent: a request is answered once its last token is there.

    Raises:
        InputError: an option that cannot be used. InjectionError: an AV of another kind.
    """

    name: ClassVar[str] = "remote"
    kinds: ClassVar[frozenset[str]] = frozenset({"overwrite"})
    reads: ClassVar[Reads] = "contract"
    exact_draws: ClassVar[bool] = False

    def __init__(
        self,
        av: StoredAV,
        *,
        url: str = "http://localhost:8000",
        api_key: str | None = None,
        model: str | None = None,
        dtype: str | None = None,
        concurrency: int = 16,
        retries: int = 5,
        timeout: float = 600.0,
    ) -> None:
        require_kind(type(self), av.injector.spec)
        _require_number("concurrency", concurrency, 1, whole=True)
        _require_number("retries", retries, 0, whole=True)
        _require_number("timeout", timeout, 0.001)
        if model is not None and not isinstance(model, str):
            raise InputError("model is what the server calls the AV.", got=type(model).__name__, expected="a text")
        if dtype is not None and dtype not in DTYPES:
            raise InputError("Unknown dtype.", where="dtype", got=repr(dtype), expected=" or ".join(DTYPES))
        self.av = av
        self._model = model
        self._dtype = None if dtype is None else DTYPES[dtype]
        self._client = Client(
            Address.parse(url), api_key=_key(api_key), timeout=timeout, retries=retries, concurrency=concurrency
        )
        self._endings = Endings.stored(av.tokenizer, av.config, av.directory)

    def close(self) -> None:
        """Close the connections."""
        self._client.close()

    # -- the server ------------------------------------------------------------------------------------------

    @cached_property
    def served(self) -> Served:
        """What the server says it serves; asked once.

        Raises:
            ServerError: nobody answers, or no such model. ContextLengthError: not even the prompt fits.
        """
        return self._ask(MODELS, None, lambda answer: answers.served_model(answer, self._model))

    def probe(self) -> None:
        """Raise an InjectionError unless the vector reaches the logits, through the embeddings of the model that is served.

        Two opposite vectors are sent, twice, so that what the server keeps of prompts is read too; and the prompt itself, as
        ids and as embeddings, which must say the same. The answer's opening tag stands behind each of them: it is what an AV
        writes whatever the vector, and what differs is the word after it.

        Raises:
            InjectionError: see above. ServerError, ContextLengthError: see `generate`.
        """
        tag = [int(i) for i in self.av.tokenizer(OPENING_TAG, add_special_tokens=False)["input_ids"]]
        self._require_room(len(tag) + 1)
        behind = self._embedded(tag)
        bare = torch.cat([self._rows, behind])
        one, other = (
            _encoded(torch.cat([self._with(row), behind])) for row in self._entering(probe_vectors(bare.shape[1]))
        )
        up, down, own, backwards = self._nexts({"prompt_embeds": [one, other, _encoded(bare), _encoded(bare.flip(0))]})
        shared = sorted(up.keys() & down.keys())
        require_sensitive(
            [torch.tensor([near[i] for i in shared] or [far]) for near, far in ((up, 0.0), (down, math.inf))], self.name
        )
        down_again, up_again = self._nexts({"prompt_embeds": [other, one]})
        self._require_alike(
            "The server's answer to a vector changes as much as if it were another vector.",
            max(answers.distance(up, up_again), answers.distance(down, down_again)),
            answers.distance(up, down),
            "start the server with --no-enable-prefix-caching: its cache may take one vector for another",
        )
        (ids,) = self._nexts({"prompt": [[*self.av.prompt.ids, *tag]]})
        self._require_alike(
            "The embeddings of this AV's prompt are not those of the model that is served.",
            answers.distance(ids, own),
            answers.distance(ids, backwards),
            f"{answers.START}: this AV, at this revision, in this dtype",
        )

    def _require_alike(self, what: str, off: float, unlike: float, next_step: str) -> None:
        """Raise an InjectionError where two answers that should be one are nearly as far apart as two that should not."""
        if not off <= ALIKE * unlike:
            raise InjectionError(
                what,
                where=f"{self._client.address}, model {self.served.name!r}",
                got=f"log-probabilities that differ by {off:.2g}",
                expected=f"at most {ALIKE * unlike:.2g}",
                next_step=next_step,
            )

    @cached_property
    def at_temperature(self) -> bool:
        """Whether the server's log-probabilities are those that it draws from, and not those before the temperature.

        At half the temperature the likeliest tokens lie twice as far apart.
        """
        prompt = {"prompt_embeds": [_encoded(self._rows)]}
        (plain,), (cold,) = self._nexts(prompt), self._nexts(prompt, temperature=0.5, seed=0)
        shared = plain.keys() & cold.keys()

        if not shared:
            return False
        spread, colder = (max(near[i] for i in shared) - min(near[i] for i in shared) for near in (plain, cold))
        return colder > 1.5 * spread

    # -- generation ------------------------------------------------------------------------------------------

    def generate(
        self,
        vectors: Tensor,
        draws: Tensor | None,
        *,
        temperature: float,
        max_new_tokens: int,
        batch_size: int,
        progress: Callable[[int], None] | None = None,
    ) -> list[Completion]:
        """See `Engine.generate`; `batch_size` bounds the rows of a greedy request, and changes no result.

        Raises:
            ContextLengthError: prompt and answer do not fit into what the server reads.
            InputError: a temperature that the server would raise.
            ServerError: no answer after all retries, a refusal, or an answer that cannot be used.
            Interrupted: Ctrl-C; carries the completions that are done.
        """
        if not len(vectors):
            return []
        self._require_room(max_new_tokens)
        if draws is not None and temperature < COLDEST:
            raise InputError(
                "vLLM does not draw at temperatures as low as this.",
                got=temperature,
                expected=f"at least {COLDEST}, or 0, which is greedy",
            )
        if draws is not None and temperature != 1.0 and not self.at_temperature:
            raise ServerError(
                "The server reports log-probabilities of another distribution than the one it draws from.",
                where=self._client.address,
                expected="--logprobs-mode processed_logprobs",
                next_step=f"{answers.START}, or ask for temperature 0 or 1",
            )
        entering = self._entering(vectors)
        size = min(batch_size, ROWS) if draws is None else 1
        batches = [slice(i, min(i + size, len(vectors))) for i in range(0, len(vectors), size)]
        calls = [
            partial(
                self._complete,
                entering=entering[rows],
                max_new_tokens=max_new_tokens,
                temperature=0.0 if draws is None else temperature,
                seed=None if draws is None else request_seed(draws[rows.start]),
            )
            for rows in batches
        ]
        found: dict[int, Completion] = {}

        def done(i: int, part: list[Completion]) -> None:
            found.update(zip(range(len(vectors))[batches[i]], part, strict=True))
            if progress is not None:
                progress(len(part))

        try:
            Batch().run(calls, threads=self._client.gate.most, done=done)
        except KeyboardInterrupt as cause:
            raise Interrupted(found) from cause
        return [found[i] for i in range(len(vectors))]

    def _complete(
        self, batch: Batch, *, entering: Tensor, max_new_tokens: int, temperature: float, seed: int | None
    ) -> list[Completion]:
        """One request, for rows that are scaled already."""
        asked = {
            "max_tokens": max_new_tokens,
            "temperature": temperature,
            "seed": seed,
            "logprobs": 0,
            "return_token_ids": True,
            "stop": [CLOSING_TAG],
            "include_stop_str_in_output": True,
            "stop_token_ids": sorted(self._endings.eos),
        }
        body = partial(self._body, lambda: {"prompt_embeds": [_encoded(self._with(row)) for row in entering]}, asked)
        read = partial(
            answers.completion,
            endings=self._endings,
            vocabulary=int(self.av.config.vocab_size),
            max_new_tokens=max_new_tokens,
        )
        return self._client.ask(
            batch, COMPLETIONS, body, lambda answer: [read(choice) for choice in answers.choices(answer, len(entering))]
        )

    # -- requests --------------------------------------------------------------------------------------------

    @cached_property
    def _rows(self) -> Tensor:
        """The embedded prompt [tokens, d], in the dtype that goes over the wire; the marker's row is a word like others."""
        return self._embedded(self.av.prompt.ids)

    def _embedded(self, ids: Sequence[int]) -> Tensor:
        """What ids become in the served model, in the dtype that goes over the wire: [len(ids), d]."""
        av, table = self.av, self._table
        return embedded(ids, table, av.config, av.injector.adapter, self._dtype or stored_dtype(table))

    @cached_property
    def _table(self) -> StoredSlice:
        av = self.av
        if av.embedding is not None:
            return av.embedding()
        file = embedding_file(av.directory, [path.name for path in av.directory.iterdir()], av.injector.adapter)
        return embedding_table(av.directory, file, av.injector.adapter)

    def _entering(self, vectors: Tensor) -> Tensor:
        """What raw vectors [N, d] become in the marker's place, in the dtype that goes over the wire."""
        found = self.av.injector.entering(vectors.cpu()).to(self._rows.dtype)
        if not is_finite(found):
            raise VectorError(
                f"Vectors of the norm {self.av.injector.spec.scale} are infinite in this dtype.",
                got=str(found.dtype).removeprefix("torch."),
                next_step='serve the AV with --dtype bfloat16, and pass engine_options={"dtype": "bfloat16"}',
            )
        return found

    def _with(self, entering: Tensor) -> Tensor:
        """The embedded prompt with one row [d] in the marker's place."""
        rows = self._rows.clone()
        rows[self.av.prompt.marker_position] = entering
        return rows

    def _body(self, prompts: Callable[[], Mapping[str, Any]], asked: Mapping[str, Any]) -> bytes:
        """A request for completions of what `prompts` makes when its turn has come."""
        asked = {"model": self.served.name, **prompts(), "n": 1, "stream": False, **PLAIN, **asked}
        return json.dumps(asked).encode()

    def _nexts(self, prompts: Mapping[str, list[Any]], **asked: Any) -> list[dict[int, float]]:
        """The likeliest next tokens of prompts, as ids or as embeddings, each with its log-probability."""
        settings = {"max_tokens": 1, "temperature": 0.0, "logprobs": TOP, "return_tokens_as_token_ids": True, **asked}
        (n,) = (len(each) for each in prompts.values())
        return self._ask(
            COMPLETIONS,
            partial(self._body, lambda: prompts, settings),
            lambda answer: [answers.likeliest(choice) for choice in answers.choices(answer, n)],
        )

    def _ask(self, route: str, body: Callable[[], bytes] | None, read: Callable[[Any], T]) -> T:
        """One request by itself."""
        found: list[T] = []
        call = partial(self._client.ask, route=route, body=body, read=read)
        Batch().run([call], threads=1, done=lambda _, answer: found.append(answer))
        return found[0]

    def _require_room(self, new: int) -> None:
        """Raise a ContextLengthError where prompt and answer are more than the AV, or its server, reads."""
        limits = [limit for limit in (context_length(self.av.config), self.served.max_model_len) if limit is not None]
        require_room(
            self.av,
            new,
            min(limits, default=None),
            where=self._client.address,
            next_step=f"ask for less, or {answers.START}, with a larger --max-model-len",
        )


def _encoded(rows: Tensor) -> str:
    """A tensor as vLLM wants it: `torch.save`, in base64."""
    file = io.BytesIO()
    torch.save(rows.contiguous(), file)
    return base64.b64encode(file.getbuffer()).decode("ascii")


def _require_number(name: str, value: object, least: float, *, whole: bool = False) -> None:
    kinds = (int,) if whole else (int, float)
    if isinstance(value, bool) or not isinstance(value, kinds) or not least <= value < math.inf:
        raise InputError(f"{name} is a {'whole ' if whole else ''}number from {least:g} up.", got=repr(value))


def _key(api_key: object) -> str | None:
    """An API key that can be sent; the HTTP library would quote one that it cannot send."""
    if api_key is None:
        return None
    key = str(api_key).strip() if isinstance(api_key, (str, int)) else ""
    if not re.fullmatch(r"[\x21-\x7e]+", key):
        raise InputError(
            "This is no API key: it is empty, or holds spaces, line breaks or characters outside ASCII.",
            where="api_key",
        )
    return key
