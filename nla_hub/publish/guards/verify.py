"""A release is held against itself before anything is sent: a broken one cannot be taken back from those who have it.

Weights are read where they lie and as they will be sent, piece by piece. No model is built with values, and nothing is copied
but configurations and tokenizers, and those only where they do not lie together.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from nla_hub.adapters import adapter_for
from nla_hub.errors import NLAError, PublishError
from nla_hub.layouts import ADAPTER_WEIGHTS_NAME, AR_LORA_NAME, AR_META_NAME
from nla_hub.pretrained import GENERATION_CONFIG_NAME, load_config, load_tokenizer
from nla_hub.prompts import ARPrompt, AVPrompt
from nla_hub.publish.facts import ReleaseFacts
from nla_hub.publish.guards import coverage, papers
from nla_hub.publish.guards.stored import StoredFile
from nla_hub.publish.release import Entry, Release, StagedRepo
from nla_hub.publish.staging.half_files import CONFIG, TOKENIZER
from nla_hub.sidecar import SIDECAR_NAME, Role, Sidecar
from nla_hub.weights import ADAPTER_CONFIG_NAME, INDEX_NAME, REFERENCE_NAME, shorten

FIX = (
    "nothing was sent; make the pair again from its run (nla-hub convert SRC DST for a bare directory), then push that"
)

DTYPES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
"""Dtypes of weights that are not packed, by their names in config.json -> in safetensors."""


def require_whole(release: Release) -> list[str]:
    """Raise a PublishError with everything in which a release is not what it says it is.

    Args:
        release: as it is staged. Files that are still to be written (a dry run) are left out, and that is said.

    Returns:
        What was checked, a line each.

    Raises:
        PublishError: weights that are damaged, not finite, missing, unexpected or misshapen; configurations, tokenizers
            and sidecars that disagree; missing licence files; cards that the Hub refuses or that hold a template's
            leftovers; names and sizes that the Hub does not take.
    """
    faults: list[str] = []
    checked: list[str] = []
    for repo in release.repos:
        found = [*papers.name_faults(repo), *_card_faults(repo)]
        if release.facts is not None:
            found += papers.licence_faults(repo, release.facts)
        faults += [f"{repo.name}: {fault}" for fault in found]
        checked.append(f"{repo.name}: {len(repo.entries)} files, their names, sizes and cards")
    if release.facts is not None:
        checked.append(
            f"licence {release.facts.licence.id}: {', '.join(release.facts.licence.files) or 'no files asked for'}"
        )
        halves = [half for repo in release.repos for half in Half.of(repo)]
        for half in halves:
            faults += [f"{half.repo.name}: {half.named(fault)}" for fault in half.faults(release, release.facts)]
            checked += half.checked
        sidecars = [half.sidecar for half in halves if half.sidecar is not None]
        faults += papers.pair_faults(sidecars)
        faults += _halves_faults(halves, sidecars)
        checked.append("sidecars: canonical, of one release, each naming the other's repository")
    if faults:
        raise PublishError(
            f"This release is not whole: {len(faults)} faults.",
            where=", ".join(repo.name for repo in release.repos),
            faults=shorten(faults, at_most=60),
            next_step=FIX,
        )
    return checked


def _card_faults(repo: StagedRepo) -> Iterator[str]:
    for entry in repo.entries:
        if entry.name == papers.CARD_NAME:
            yield from papers.card_faults(entry, repo.kind)
        elif entry.name.startswith(".eval_results/"):
            yield from papers.yaml_faults(entry)


def _halves_faults(halves: list[Half], sidecars: list[Sidecar]) -> Iterator[str]:
    roles = [half.role for half in halves]
    yield from (f"there is no {role.upper()} in this release" for role in ("av", "ar") if role not in roles)


@dataclass(frozen=True)
class Half:
    """One half of a pair inside a release.

    Attributes:
        files: its files by their names in its folder.
        unwritten: names of weights that are still to be written.
    """

    repo: StagedRepo
    role: Role
    files: Mapping[str, Entry]
    unwritten: frozenset[str]

    @classmethod
    def of(cls, repo: StagedRepo) -> Iterator[Half]:
        """The halves of a repository: itself, or its folders av/ and ar/."""
        roles: tuple[Role, ...] = ("av", "ar") if repo.role == "pair" else () if repo.role == "data" else (repo.role,)
        for role in roles:
            prefix = f"{role}/" if repo.role == "pair" else ""
            files = {e.name.removeprefix(prefix): e for e in repo.entries if e.name.startswith(prefix)}
            unwritten = (name.removeprefix(prefix) for name in repo.to_be_written if name.startswith(prefix))
            yield cls(repo, role, files, frozenset(unwritten))

    def named(self, fault: str) -> str:
        """A fault with the half's folder, where it has one."""
        return f"{self.role}/: {fault}" if self.repo.role == "pair" else fault

    @cached_property
    def stored(self) -> dict[str, StoredFile]:
        """Its weight files, from their headers."""
        return {name: StoredFile.read(e) for name, e in self.files.items() if name.endswith(".safetensors")}

    @cached_property
    def _read(self) -> tuple[Sidecar | None, list[str]]:
        return papers.read_sidecar(self.files.get(SIDECAR_NAME), self.role)

    @property
    def sidecar(self) -> Sidecar | None:
        """Its contract; None where it cannot be read."""
        return self._read[0]

    @property
    def is_lora(self) -> bool:
        """Whether it consists of factors on a base model."""
        return ADAPTER_CONFIG_NAME in self.files or AR_LORA_NAME in self.files

    @property
    def checked(self) -> list[str]:
        """What was looked at, in words."""
        values = sum(file.values for file in self.stored.values())
        size = sum(file.entry.size for file in self.stored.values())
        name = f"{self.role.upper()} ({self.repo.name})"
        said = [
            f"{name}: {len(self.stored)} weight files, {size:,} bytes, all {values:,} values finite, every name and shape"
        ]
        said += (
            [f"{name}: {', '.join(sorted(self.unwritten))}: not written yet, so not checked"] if self.unwritten else []
        )
        return [*said, f"{name}: config, tokenizer and prompt agree with the sidecar"]

    # -- what is wrong -----------------------------------------------------------------------------------------

    def faults(self, release: Release, facts: ReleaseFacts) -> Iterator[str]:
        """Everything that is wrong with it."""
        yield from self._weight_file_faults(facts)
        yield from self._read[1]
        if self.sidecar is None:
            return
        yield from papers.sidecar_faults(self.sidecar, release, facts)
        yield from self._reference_faults(self.sidecar)
        if self.role == "ar":
            yield from coverage.head_faults(self.stored, self.sidecar.d_model)
        with self._small_files() as directory:
            yield from self._tokenizer_faults(directory, self.sidecar)
            if self.is_lora:
                yield from self._lora_faults(self.sidecar, facts)
            else:
                yield from self._model_faults(directory, self.sidecar, facts)

    def _weight_file_faults(self, facts: ReleaseFacts) -> Iterator[str]:
        for name, file in self.stored.items():
            yield from (f"{name}: {fault}" for fault in file.faults)
            if file.faults:
                continue
            asked = name in coverage.model_files(self.stored) or (name != REFERENCE_NAME and file.metadata)
            if asked and file.metadata.get("format") != "pt":
                yield f"{name}: its metadata does not say format 'pt', without which transformers loads nothing"
            try:
                yield from (f"{name}: {fault}" for fault in file.value_faults())
            except OSError as cause:
                yield f"{name}: it cannot be read: {cause}"

    def _reference_faults(self, sidecar: Sidecar) -> Iterator[str]:
        file = self.stored.get(REFERENCE_NAME)
        if file is None:
            return
        if self.role == "av":
            yield f"{REFERENCE_NAME} lies beside an AV, where vLLM takes it for weights; it belongs to the AR"
        if not file.faults and {name: part.shape for name, part in file.parts.items()} != {"mean": (sidecar.d_model,)}:
            yield f"{REFERENCE_NAME}: expected one tensor, mean [{sidecar.d_model}]"
        record = sidecar.fve_reference
        if not file.faults and (record is None or file.metadata.get("dataset") != record.dataset):
            said = None if record is None else record.dataset
            yield f"{REFERENCE_NAME}: it is of {file.metadata.get('dataset')!r}, the sidecar's fve_reference of {said!r}"

    def _tokenizer_faults(self, directory: Path, sidecar: Sidecar) -> Iterator[str]:
        try:
            tokenizer = load_tokenizer(directory)
            if self.role == "av":
                AVPrompt.build(tokenizer, sidecar)
            else:
                ARPrompt.build(tokenizer, sidecar)
        except NLAError as error:
            yield from (f"tokenizer: {fault}" for fault in (error.faults or (error.what,)))

    def _model_faults(self, directory: Path, sidecar: Sidecar, facts: ReleaseFacts) -> Iterator[str]:
        if self.role == "av":
            yield from self._generation_faults(directory)
        try:
            config = load_config(directory)
            adapter = adapter_for(config)
        except NLAError as error:
            yield f"{CONFIG}: {error.what}"
            return
        text = config.get_text_config()
        layers = int(text.num_hidden_layers)
        yield from (f"{CONFIG}: {fault}" for fault in sidecar.config_faults(config))
        if self.role == "av" and facts.n_layers is not None and layers != facts.n_layers:
            yield f"{CONFIG}: num_hidden_layers is {layers}, and the base model has {facts.n_layers}"
        if adapter.name != facts.family:
            yield f"{CONFIG}: it is of the family {adapter.name}, and the release says {facts.family}"
        yield from self._dtype_faults(config, facts)
        if self.unwritten or any(file.faults for file in coverage.model_files(self.stored).values()):
            return
        yield from shorten([*coverage.index_faults(self.stored, self.files.get(INDEX_NAME))])
        yield from shorten([*coverage.weight_faults(self.stored, config, adapter, sidecar, self.role)])

    def _dtype_faults(self, config: Any, facts: ReleaseFacts) -> Iterator[str]:
        """Weights in another dtype than config and cards say; packed ones have several."""
        if getattr(config, "quantization_config", None) is not None:
            if facts.quantised is None:
                yield f"{CONFIG}: it has a quantization_config, and the release says nothing of packed weights"
            return
        if facts.quantised is not None and not self.unwritten:
            yield f"{CONFIG}: it has no quantization_config, and the release says {facts.quantised}"
        stored = {part.dtype for file in coverage.model_files(self.stored).values() for part in file.parts.values()}
        told = str(getattr(config, "dtype", None)).removeprefix("torch.")
        for who, name in ((CONFIG, told), ("the card", facts.dtypes.get(self.role, told))):
            if stored and name in DTYPES and stored != {DTYPES[name]}:
                yield f"the weights are stored in {', '.join(sorted(stored))}, and {who} says {name}"

    def _generation_faults(self, directory: Path) -> Iterator[str]:
        from transformers import GenerationConfig

        if GENERATION_CONFIG_NAME not in self.files:
            yield f"{GENERATION_CONFIG_NAME} is missing: others would not know where the AV's answer ends"
            return
        try:
            config = GenerationConfig.from_pretrained(directory)
        except Exception as cause:  # strangers' files fail in every way there is
            yield f"{GENERATION_CONFIG_NAME} cannot be read: {' '.join(str(cause).split())[:200]}"
            return
        if config.eos_token_id is None:
            yield f"{GENERATION_CONFIG_NAME} has no eos_token_id: others would not know where the AV's answer ends"

    def _lora_faults(self, sidecar: Sidecar, facts: ReleaseFacts) -> Iterator[str]:
        blocks = sidecar.site.n_blocks if self.role == "ar" else facts.n_layers
        if self.role == "ar" and ADAPTER_CONFIG_NAME not in self.files and AR_META_NAME not in self.files:
            yield f"{AR_META_NAME} is missing: nothing says how strong these factors are"
        place = ADAPTER_WEIGHTS_NAME if ADAPTER_CONFIG_NAME in self.files else AR_LORA_NAME
        if place in self.stored and self.stored[place].faults:
            return
        config = self.files.get(ADAPTER_CONFIG_NAME)
        yield from shorten([*coverage.factor_faults(self.stored, config, blocks, facts.base_model)])

    @contextmanager
    def _small_files(self) -> Iterator[Path]:
        """A directory with configurations and tokenizer as they will be sent: their own, or a temporary copy."""
        small = {n: e for n, e in self.files.items() if n in (CONFIG, GENERATION_CONFIG_NAME) or TOKENIZER.fullmatch(n)}
        with ExitStack() as stack:
            directory = _common(small)
            if directory is None:
                directory = Path(stack.enter_context(TemporaryDirectory(prefix="nla-hub-")))
                for name, entry in small.items():
                    (directory / name).parent.mkdir(parents=True, exist_ok=True)
                    (directory / name).write_bytes(b"".join(entry.chunks()))
            yield directory


def _common(small: Mapping[str, Entry]) -> Path | None:
    """The directory in which these files lie under these names, where no other of their kind lies there."""
    places = {
        entry.content.parent if isinstance(entry.content, Path) and entry.content.name == name else None
        for name, entry in small.items()
    }
    place = places.pop() if len(places) == 1 else None
    if place is None:
        return None
    kinds = (path.name for path in place.iterdir() if path.is_file())
    there = {name for name in kinds if name in (CONFIG, GENERATION_CONFIG_NAME) or TOKENIZER.fullmatch(name)}
    return place if there == small.keys() else None
