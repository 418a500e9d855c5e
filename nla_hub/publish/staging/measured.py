"""Figures of the weights that are published: sizes and dtypes from headers, scores by running a protocol again."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from math import prod
from pathlib import Path

from nla_hub.errors import HubError, PublishError
from nla_hub.evaluation import EvalResult
from nla_hub.evaluation.protocols import PROTOCOLS
from nla_hub.log import logger
from nla_hub.opening import Half
from nla_hub.publish.facts import Quantised
from nla_hub.publish.release import Entry
from nla_hub.publish.staging.forms import ROLES, Prepared
from nla_hub.publish.staging.found import Found
from nla_hub.publish.staging.half_files import weight_files
from nla_hub.publish.staging.run_facts import RunFacts
from nla_hub.sidecar import Role, Score
from nla_hub.training.run import DONE
from nla_hub.training.splits import EVALUATION_NAME
from nla_hub.weights import HEAD_NAME, REFERENCE_NAME, StoredTensor, read_header

DTYPES = {
    "F64": "float64",
    "F32": "float32",
    "BF16": "bfloat16",
    "F16": "float16",
    "F8_E4M3": "float8_e4m3fn",
    "U8": "uint8",
}
"""What safetensors calls them -> what torch calls them."""


PACKED: Mapping[Quantised, str] = {"fp8": "float8_e4m3fn", "nf4": "nf4"}
"""What packed values are called beside other dtypes."""


def _stored(half: Half) -> dict[str, StoredTensor]:
    """The tensors of a half's own files, by file and name; {} where they are still to be written."""
    directory = half.files.directory
    files = [n for n in weight_files(directory, half.place.form, half.role) if n.endswith(".safetensors")]
    return {f"{file}:{name}": tensor for file in files for name, tensor in read_header(directory / file).items()}


def dtypes_of(prepared: Prepared) -> Mapping[str, str]:
    """By role, the dtype of most stored values beside the value head, or what packed ones are packed as."""
    if prepared.quantised is not None:
        return {str(role): PACKED[prepared.quantised] for role in ROLES}
    found = {}
    for role in ROLES:
        counted: Counter[str] = Counter()
        for name, tensor in _stored(prepared.half(role)).items():
            if not name.startswith(HEAD_NAME):
                counted[tensor.dtype] += prod(tensor.shape)
        if counted:
            stored = counted.most_common(1)[0][0]
            found[str(role)] = DTYPES.get(stored, stored)
    return found


def values_of(prepared: Prepared) -> Mapping[str, int]:
    """By role, the number of stored values, the value head included; of packed weights as many as were packed."""
    if prepared.values:
        return {str(role): n for role, n in prepared.values.items()}
    return {str(role): n for role in ROLES if (n := count_values(prepared.half(role)))}


def count_values(half: Half) -> int:
    """The number of values in a half's own files."""
    return sum(prod(tensor.shape) for tensor in _stored(half).values())


def evaluated(
    found: Found,
    prepared: Prepared,
    entries: Mapping[Role, Sequence[Entry]],
    base_model: str,
    run: RunFacts | None,
    *,
    measure: bool,
) -> EvalResult | None:
    """The result that was measured on exactly these weights: the run's own, or for new weights one made now.

    None where nothing was measured, or the protocol's documents or the base model are not to be had.
    """
    of_factors = prepared.form == "lora" and bool(found.factors)  # the run measured what they were merged into
    if not prepared.changed and not of_factors:
        if run is not None and run.evaluation is not None:
            _require_measured(entries, run)
        return None if run is None else run.evaluation
    if not measure or (asked := _protocol(found, prepared, run)) is None:
        return None
    from nla_hub.evaluation import run_protocol
    from nla_hub.nla import NLA

    name, documents, corpus = asked
    logger.info("Measuring the %s pair by %s", prepared.quantised or prepared.form, name)
    av, ar = (prepared.half(role).files.directory.absolute() for role in ROLES)
    try:
        with NLA.from_pretrained(av, ar=ar, base_model=found.base_model or base_model) as nla:
            return run_protocol(nla, name, corpus=corpus, documents=documents, facts=False)
    except HubError as error:
        logger.warning("Not measured, because the base model is not to be had: %s", error.one_line())
        return None


def _require_measured(entries: Mapping[Role, Sequence[Entry]], run: RunFacts) -> None:
    """Raise a PublishError where weights are no longer those that the run measured, as far as it recorded which."""
    changed = []
    for role in ROLES:
        files = [e for e in entries[role] if e.name.endswith(".safetensors") and not e.name.endswith(REFERENCE_NAME)]
        hashes = {e.name.rpartition("/")[2]: e.sha256 for e in files}  # taken for the release's id anyway
        if hashes != run.measured_weights.get(role, hashes):
            lies = run.pair / role if run.pair is not None else role
            changed.append(f"{role.upper()}: {lies} holds other weights than the stage eval measured")
    if changed:
        raise PublishError(
            "The scores of this run are not of these weights.",
            where=run.run,
            faults=changed,
            next_step=f"restore the weights, or measure these: rm {run.run / 'eval' / DONE}, then the nla-hub train command of "
            "the run again",
        )


def rounded(score: Score | None) -> Score | None:
    """A score with as many figures as sidecars have; a release that is staged again then has the same bytes."""
    if score is None:
        return None
    return replace(score, value=round(score.value, 4), cosine=None if score.cosine is None else round(score.cosine, 4))


def _protocol(found: Found, prepared: Prepared, run: RunFacts | None) -> tuple[str, int | None, Path | None] | None:
    """The protocol of the source's own score, its number of documents and its corpus, where all that can be had here."""
    score = next((fve for role in ROLES if (fve := prepared.half(role).sidecar.fve) is not None), None)
    protocol = None if score is None else score.protocol
    if protocol is None and run is not None and run.evaluation is not None:
        protocol = run.evaluation.protocol.name
    told = re.fullmatch(r"([\w.-]+)(?:\+documents=(\d+))?", protocol or "")
    if told is None or told[1] not in PROTOCOLS:
        return None
    name, documents = told[1], int(told[2]) if told[2] else None
    if PROTOCOLS[name].corpus is not None:
        return name, documents, None
    corpus = None if found.run is None else found.run / "data" / "checkpoint" / EVALUATION_NAME
    return (name, documents, corpus) if corpus is not None and corpus.is_file() else None
