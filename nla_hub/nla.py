"""The front door: `NLA.from_pretrained(...)`, then capture, verbalize, reconstruct, score, explain, steer. Glue only."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

import torch
from torch import Tensor

from nla_hub.batching import pad_id_of
from nla_hub.capture import Activations, capture, run_trunk
from nla_hub.engines.choice import EngineChoice
from nla_hub.errors import InputError, Interrupted, PositionError
from nla_hub.flags import row_flags
from nla_hub.geometry import Reference, as_vectors
from nla_hub.hub import HubOptions
from nla_hub.library import Library
from nla_hub.loading import Pair, Source, open_pair
from nla_hub.locate import Ref, resolve_pair
from nla_hub.opening import read_contract
from nla_hub.parts import Memory, Mode, PartName, Parts, build, source_loaders
from nla_hub.positions import Positions, select_in_pieces
from nla_hub.pretrained import LoadOptions
from nla_hub.reconstructor import Reconstructor
from nla_hub.results import Explanation, Explanations, Scores
from nla_hub.round_trip import RoundTrip, round_trip
from nla_hub.sampling import BARE_POSITION
from nla_hub.scoring import score_rows
from nla_hub.sidecar import Sidecar, Site
from nla_hub.source_text import Content, Overflow, as_documents, context_length, encode_source
from nla_hub.steering import SteeringVector
from nla_hub.verbalizer import ROWS, Verbalizer, as_keys

if TYPE_CHECKING:
    from nla_hub.publish.push import Pushed

Component = Literal["av", "ar"]
EngineName = str


class NLA:
    """A pair of AV and AR with the base model that they explain.

    Build it with `NLA.from_pretrained`. The halves are loaded then; the source is loaded when it is first needed.
    """

    def __init__(
        self,
        *,
        name: str,
        av: Verbalizer | None = None,
        ar: Reconstructor | None = None,
        base: Ref | None = None,
        family: str | None = None,
        hub_options: HubOptions | None = None,
        load_options: LoadOptions | None = None,
    ) -> None:
        half = av or ar
        if half is None:
            raise InputError("An NLA has at least one half.", expected='components "av", "ar" or both')
        ready: dict[PartName, Any] = {}
        if av is not None:
            ready["av"] = av
        if ar is not None:
            ready["ar"] = ar
        sources = source_loaders(base, half.sidecar, family, name, Library(hub_options), load_options or LoadOptions())
        self._settle(
            name, Parts(sources, ready), half.sidecar, ar.sidecar if ar is not None else None, base, "resident"
        )

    def _settle(
        self, name: str, parts: Parts, sidecar: Sidecar, ar_sidecar: Sidecar | None, base: Ref | None, memory: Mode
    ) -> None:
        self.name = name
        self.memory = memory
        self._parts = parts
        self._sidecar = sidecar
        self._ar_sidecar = ar_sidecar
        self._base = base
        self._opened: Pair | None = None
        self._told = False

    # -- loading ---------------------------------------------------------------------------------------------

    @classmethod
    def from_pretrained(
        cls,
        name: str | os.PathLike[str] = "tiny",
        *,
        ar: str | os.PathLike[str] | None = None,
        base_model: str | os.PathLike[str] | None = None,
        components: Sequence[Component] = ("av", "ar"),
        engine: EngineName = "auto",
        engine_options: Mapping[str, Any] | None = None,
        revision: str | None = None,
        subfolder: str = "",
        ar_subfolder: str = "",
        sidecar: Mapping[str, Any] | str | os.PathLike[str] | None = None,
        memory: Memory = "auto",
        token: str | bool | None = None,
        cache_dir: str | Path | None = None,
        local_files_only: bool = False,
        force_download: bool = False,
        device_map: Any = None,
        dtype: str | torch.dtype = "auto",
        quantization_config: Any = None,
        attn_implementation: str | None = None,
        trust_remote_code: bool = False,
        **deprecated: Any,
    ) -> NLA:
        """Load a pair, verified. Layouts and dialects that are read: docs/layouts.md, docs/sidecar.md.

        Args:
            name: zoo name ("tiny"), Hub id of the AV ("owner/name" or "owner/name@revision"), or directory ("./path", a
                Path) of the AV or of a folder with `av/`, `ar/` and perhaps `source/`.
            ar, base_model: the other parts, where they are not found by the sidecar, the name or the layout.
            components: which halves to load; the weights of the other are never opened.
            engine: "auto", "transformers", or another registered engine (docs/engines.md).
            engine_options: what that engine can be told, as its constructor's keywords.
            revision: of the AV. token, cache_dir, local_files_only, force_download: as in transformers.
            subfolder, ar_subfolder: folders of the AV and the AR, in a checkpoint that holds several.
            sidecar: what is known about the contract besides `nla_meta.yaml`, or instead of one: its keys as a mapping, or a
                YAML file of them. What stands here wins over the file.
            memory: "resident" keeps AV, AR and source in memory; "staged" one at a time, each loaded when it is needed;
                "shared" plays AV and AR as LoRA roles on the one source; "auto" takes resident where it fits, else staged.
            device_map, dtype, quantization_config, attn_implementation, trust_remote_code: as in transformers. dtype
                "auto" is float32 on a CPU and bfloat16 elsewhere. A quantised pair must pass `round_trip` on loading.

        Raises:
            UnknownNameError, HubError and its children, CheckpointError and its children, InjectionError (the vector does
            not reach the AV's logits), GateFailedError (a quantised pair that no longer reads its own vectors).
        """
        if "torch_dtype" in deprecated:
            warnings.warn("torch_dtype is called dtype now", FutureWarning, stacklevel=2)
            dtype = deprecated.pop("torch_dtype")
        if deprecated:
            raise TypeError(f"from_pretrained() got unexpected keywords: {', '.join(sorted(deprecated))}")
        hub_options = HubOptions(token, cache_dir, local_files_only, force_download)
        options = LoadOptions(dtype, device_map, quantization_config, attn_implementation, trust_remote_code)
        choice = EngineChoice(engine, engine_options or {})
        choice.check()
        pair = open_pair(
            resolve_pair(
                name, ar=ar, base_model=base_model, revision=revision, subfolder=subfolder, ar_subfolder=ar_subfolder
            ),
            components=components,
            sidecar=read_contract(sidecar),
            hub_options=hub_options,
            load_options=options,
            weights=("ar",) if choice.reads == "contract" else True,
        )
        parts, mode = build(pair, engine=choice, memory=memory, load_options=options)
        nla = cls.__new__(cls)
        nla._settle(pair.name, parts, pair.sidecar, pair.ar.sidecar if pair.ar is not None else None, pair.base, mode)
        nla._opened, nla._told = pair, sidecar is not None
        if pair.wanted == {"av", "ar"} and (quantization_config is not None or pair.is_packed):
            nla.round_trip().require()
        return nla

    # -- what it is ------------------------------------------------------------------------------------------

    @property
    def sidecar(self) -> Sidecar:
        """The AV's sidecar (the AR's where only that was loaded)."""
        return self._sidecar

    @property
    def site(self) -> Site:
        """Where this pair reads vectors."""
        return self._sidecar.site

    @property
    def d_model(self) -> int:
        """Width of the vectors."""
        return self._sidecar.d_model

    @property
    def reference(self) -> Reference | None:
        """FVE denominators stored with the pair, None where there are none."""
        record = self._sidecar.fve_reference or (self._ar_sidecar.fve_reference if self._ar_sidecar else None)
        return None if record is None else Reference(**vars(record))

    @property
    def av(self) -> Verbalizer:
        """The verbalizer."""
        return cast(Verbalizer, self._part("av"))

    @property
    def ar(self) -> Reconstructor:
        """The reconstructor."""
        return cast(Reconstructor, self._part("ar"))

    def _part(self, name: Literal["av", "ar"]) -> Any:
        if name not in self._parts:
            raise InputError(f"The {name.upper()} was not loaded.", next_step='load with components=("av", "ar")')
        return self._parts.get(name)

    def close(self) -> None:
        """Stop what the engine runs beside this process, and free the parts; `with NLA.from_pretrained(...) as nla:` does it.

        Nothing needs to be closed where the engine is "transformers". What is asked for next is loaded again.
        """
        self._parts.close()

    def __enter__(self) -> NLA:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        halves = "+".join(name for name in ("av", "ar") if name in self._parts)
        return (
            f"NLA({self.name!r}, {halves}, {self.site} of {self._base or self._sidecar.base_model}, d={self.d_model})"
        )

    @property
    def source(self) -> Source:
        """The complete base model, for generation and steering."""
        return cast(Source, self._parts.get("source"))

    @property
    def capture_source(self) -> Source:
        """What capture runs on: the complete base model where it is loaded already, else only its trunk up to block K."""
        return cast(Source, self._parts.get("source" if "source" in self._parts.loaded else "trunk"))

    def release(self) -> None:
        """Free the weights that are in memory; what is asked for next is loaded again. Under "shared" nothing is freed."""
        self._parts.release()

    # -- verbs -----------------------------------------------------------------------------------------------

    def capture(
        self,
        texts: Content | Sequence[Content],
        positions: Positions = "last",
        *,
        doc_ids: Sequence[str] | None = None,
        batch_size: int | None = None,
        overflow: Overflow = "error",
        parse_special_tokens: bool = False,
        seed: int = 0,
    ) -> Activations:
        """Residual-stream vectors of texts or conversations at this pair's site.

        Args:
            texts: a text, a conversation (list of {"role", "content"}), or several of either.
            positions: an index, several, a slice, a word ("last", "all", "user", "assistant", "every:N", "sample:K",
                "regex:PATTERN"), or a function.
            doc_ids: names for the documents; their sha256 by default.
            batch_size: rows that run together at most; None leaves it to the project.
            overflow: what to do with texts longer than the model reads: "error", "truncate" or "stride".
            seed: of "sample:K".

        Raises:
            TextError, ContextLengthError, PositionError: before the model runs, with the index of the text.
        """
        documents = as_documents(texts)
        if doc_ids is not None and len(doc_ids) != len(documents):
            raise InputError("doc_ids= needs one id a document.", got=len(doc_ids), expected=len(documents))
        if doc_ids is not None and not all(isinstance(doc_id, str) for doc_id in doc_ids):
            raise InputError("doc_ids= are texts.", got=repr(doc_ids)[:80], next_step="pass [str(i) for i in ...]")
        source = self.capture_source
        with self._parts.turn:
            return capture(
                source.loaded.adapter,
                source.loaded.model,
                source.tokenizer,
                self.site,
                documents,
                positions=positions,
                doc_ids=doc_ids,
                batch_size=_rows(batch_size),
                overflow=overflow,
                parse_special_tokens=parse_special_tokens,
                seed=seed,
                base_model=source.name,
            )

    def capture_ids(
        self,
        sequences: Sequence[tuple[Sequence[int], Sequence[int]]],
        *,
        batch_size: int | None = None,
        check: bool = True,
    ) -> Tensor:
        """Vectors of (token ids, positions) pairs, as `run_trunk` takes them: float32 [total positions, d]."""
        source = self.capture_source
        with self._parts.turn:
            return run_trunk(
                source.loaded.adapter,
                source.loaded.model,
                self.site,
                sequences,
                pad_id=pad_id_of(source.tokenizer),
                batch_size=_rows(batch_size),
                check=check,
            )

    def check_text(
        self,
        content: Content,
        positions: Positions = "last",
        *,
        overflow: Overflow = "error",
        parse_special_tokens: bool = False,
        where: str = "text",
    ) -> None:
        """Raise the InputError that `capture` would raise for one text or conversation, without running the model."""
        source = self.capture_source
        limit = context_length(source.loaded.model.config)
        pieces = encode_source(
            source.tokenizer,
            content,
            parse_special_tokens=parse_special_tokens,
            max_length=limit,
            overflow=overflow,
            where=where,
        )
        if not any(select_in_pieces(pieces, positions, where=where)):
            raise PositionError(
                "No token of this text is among the positions.", where=where, expected=f"0 to {len(pieces[0]) - 1}"
            )

    def verbalize(
        self,
        vectors: Activations | Tensor | Any,
        *,
        n: int = 1,
        temperature: float = 0.7,
        max_new_tokens: int = 200,
        seed: int = 0,
        batch_size: int | None = None,
        keys: Sequence[object] | None = None,
        show_progress_bar: bool | None = None,
    ) -> Any:
        """Explanations of vectors, not scored.

        Args:
            vectors: Activations, or float [d] or [..., d] of any kind (tensor, array, lists).
            n: samples a vector.
            temperature: 0 is greedy.
            batch_size: rows that run together; None takes as many as fit into free memory.
            keys: one a row; what its randomness depends on besides the seed (the vector's own bytes by default).
            show_progress_bar: None shows one from 64 vectors up, on a terminal.

        Returns:
            One vector [d]: one Explanation. [N, d] or Activations: a list of N. With n > 1 each becomes a list of n.

        Raises:
            VectorError: wrong width, not floating point, NaN, infinite or zero rows (listed).
            Interrupted: Ctrl-C; its `done` maps the index of each row that is finished to what would have been returned for it.
        """
        acts = vectors if isinstance(vectors, Activations) else None
        if acts is not None and (acts.site != self.site):
            raise InputError("These vectors come from another site.", got=str(acts.site), expected=str(self.site))
        values = acts.vectors if acts is not None else vectors
        rows = as_vectors(values, d=self.d_model)
        row_keys = as_keys(keys) if keys is not None else (list(acts.keys) if acts is not None else None)

        def shaped(i: int, group: Sequence[Explanation]) -> Any:
            annotated = [self._annotated(e, acts, i) for e in group]
            return annotated if n > 1 else annotated[0]

        with _progress_bar(show_progress_bar, len(rows) * n) as bar:
            try:
                nested = self.av.verbalize(
                    rows,
                    keys=row_keys,
                    n=n,
                    temperature=temperature,
                    max_new_tokens=max_new_tokens,
                    seed=seed,
                    batch_size=batch_size,
                    progress=bar.update,
                )
            except Interrupted as stop:
                stop.done = {i: shaped(i, group) for i, group in stop.done.items()}
                raise
        found = [shaped(i, group) for i, group in enumerate(nested)]
        return found[0] if acts is None and _ndim(values) == 1 else found

    def _annotated(self, explanation: Explanation, acts: Activations | None, i: int) -> Explanation:
        marker = self._sidecar.marker.char if self._sidecar.marker else None
        record = self._sidecar.fve_reference
        common: dict[str, Any] = {
            "text": explanation.text,
            "norm": explanation.norm,
            "marker": marker,
            "reference": record,
        }
        if acts is None:
            flags = row_flags(position=None, from_source=False, **common)
            return explanation.with_(position=BARE_POSITION, flags=flags)
        return explanation.with_(
            doc_id=acts.doc_id[i],
            position=acts.position[i],
            token=acts.token[i],
            flags=row_flags(position=acts.read[i], special=acts.special[i], context=acts.context[i], **common),
        )

    def reconstruct(self, texts: str | Sequence[str], *, batch_size: int | None = None) -> Tensor:
        """The AR's vectors of texts: float32 [N, d] on the CPU; one text gives [d]. Only their direction means anything.

        Raises:
            TextError, ContextLengthError: with the index of the text.
        """
        if isinstance(texts, str):
            return self.ar.reconstruct([texts], batch_size=_rows(batch_size))[0]
        if not isinstance(texts, Sequence):
            raise InputError("Texts are expected here.", got=type(texts).__name__, expected="a text, or a list of them")
        return self.ar.reconstruct(list(texts), batch_size=_rows(batch_size))

    def score(
        self,
        explanations: Explanation | str | Sequence[Explanation | str | None],
        vectors: Activations | Tensor | Any,
        *,
        batch_size: int | None = None,
    ) -> Scores:
        """How well texts bring their vectors back: cosine and mse = 2 (1 - cosine) of each row.

        Rows without a usable explanation (status not "ok", None) have neither, and count with mse 2 in the FVE.

        Raises:
            InputError: as many texts as vectors are needed. VectorError: see `verbalize`.
        """
        targets = as_vectors(vectors.vectors if isinstance(vectors, Activations) else vectors, d=self.d_model)
        return score_rows(explanations, targets, partial(self.reconstruct, batch_size=batch_size), self.reference)

    def explain(
        self,
        texts: Content | Sequence[Content],
        positions: Positions = "last",
        *,
        n: int = 1,
        temperature: float = 0.7,
        max_new_tokens: int = 200,
        seed: int = 0,
        batch_size: int | None = None,
        doc_ids: Sequence[str] | None = None,
        overflow: Overflow = "error",
        parse_special_tokens: bool = False,
        show_progress_bar: bool | None = None,
    ) -> Explanations:
        """Capture, verbalize and score in one call; see those three for arguments and errors."""
        acts = self.capture(
            texts,
            positions,
            doc_ids=doc_ids,
            batch_size=batch_size,
            overflow=overflow,
            parse_special_tokens=parse_special_tokens,
            seed=seed,
        )
        return self.explain_activations(
            acts,
            n=n,
            temperature=temperature,
            max_new_tokens=max_new_tokens,
            seed=seed,
            batch_size=batch_size,
            show_progress_bar=show_progress_bar,
        )

    def explain_activations(
        self,
        acts: Activations,
        *,
        n: int = 1,
        temperature: float = 0.7,
        max_new_tokens: int = 200,
        seed: int = 0,
        batch_size: int | None = None,
        show_progress_bar: bool | None = None,
    ) -> Explanations:
        """Verbalize and score captured vectors; without an AR the rows stay unscored.

        Raises:
            Interrupted: Ctrl-C; its `done` are the Explanations that are finished, without scores.
        """
        try:
            found = self.verbalize(
                acts,
                n=n,
                temperature=temperature,
                max_new_tokens=max_new_tokens,
                seed=seed,
                batch_size=batch_size,
                show_progress_bar=show_progress_bar,
            )
        except Interrupted as stop:
            stop.done = Explanations(_flat([stop.done[i] for i in sorted(stop.done)]), self.reference)
            raise
        rows = _flat(found)
        if "ar" not in self._parts or not rows:
            return Explanations(rows, self.reference)
        scores = self.score(rows, acts.vectors.repeat_interleave(n, dim=0), batch_size=batch_size)
        scored = tuple(e.with_(cosine=c, mse=m) for e, c, m in zip(rows, scores.cosine, scores.mse, strict=True))
        return Explanations(scored, scores.reference, scores.in_sample)

    def round_trip(self) -> RoundTrip:
        """Whether the pair still reads its own vectors: fixed texts through AR, AV (greedy) and AR again; see `round_trip`."""

        def words(vectors: Tensor) -> list[str | None]:
            return [e.text for e in self.verbalize(vectors, temperature=0)]

        return round_trip(self.reconstruct, words)

    def steering_vector(self, to: str, minus: str | None = None) -> SteeringVector:
        """The direction from one text to another: AR(to)/||AR(to)|| - AR(minus)/||AR(minus)||, or the first alone.

        Both are made unit vectors first, because the length of an AR's output means nothing.
        """
        texts = [to] if minus is None else [to, minus]
        found = self.reconstruct(texts).double()
        units = found / found.norm(dim=-1, keepdim=True)
        vector = units[0] - units[1] if minus is not None else units[0]
        note = to if minus is None else f"{to} - {minus}"
        return SteeringVector(vector.float(), self.site, str(self._base or self._sidecar.base_model or ""), note)

    # -- publishing ------------------------------------------------------------------------------------------

    def push_to_hub(self, repo: str | None = None, **options: Any) -> Pushed:
        """Publish the pair on the Hugging Face Hub, as `nla-hub push --yes` does; docs/publishing.md says how that goes.

        What is published are the files that the pair was loaded from, never what is in memory: another dtype or a
        quantization_config of `from_pretrained` changes nothing (`quantize=` packs weights).

        Args:
            repo: owner/name: `owner/name-av` and `owner/name-ar`. None makes a name of the base model's and the layer, under
                the token's account.
            options: those of the command, with "_" for "-": private, create_pr, revision, collection, tag, form, quantize,
                licence, base_model, steps, evaluation_set, gpu_price, verify, work, single_repo; and token, as in
                `from_pretrained`.

        Returns:
            The repositories with their commits, the tag, and `url`.

        Raises:
            InputError: the pair does not lie in directories here, or a contract was told besides its files.
            PublishError: what must not go out. GateFailedError: what arrived is not what was sent. HubError and its children.
        """
        from nla_hub.publish.prepare import push_pair

        return push_pair(self._opened, repo, told=self._told, **options)


def _rows(batch_size: int | None) -> int:
    """Rows of a capture or an AR batch at most; `batching.PASS_TOKENS` bounds their tokens besides."""
    return ROWS if batch_size is None else batch_size


def _flat(found: Sequence[Any]) -> tuple[Explanation, ...]:
    """What `verbalize` returns for several rows, one sample after another."""
    return tuple(e for group in found for e in ([group] if isinstance(group, Explanation) else group))


def _progress_bar(show: bool | None, total: int) -> Any:
    from tqdm import tqdm

    # tqdm's own rule for None: no bar where stderr is not a terminal.
    hidden = None if show is None and total >= PROGRESS_FROM else not show
    return tqdm(total=total, desc="verbalize", unit="vector", disable=hidden, leave=False)


PROGRESS_FROM = 64
"""Vectors from which a progress bar is shown unasked."""


def _ndim(values: Any) -> int:
    return (
        values.ndim
        if hasattr(values, "ndim")
        else (1 + _ndim(values[0]) if isinstance(values, (list, tuple)) and values else 0)
    )
