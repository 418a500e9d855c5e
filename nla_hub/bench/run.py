"""A whole run: the machine first, then every route of every operation, then the verdict."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from nla_hub.architecture import Architecture
from nla_hub.bench.machine import describe, measure
from nla_hub.bench.operations import MEASURES, Settings
from nla_hub.bench.route import Operation, Route
from nla_hub.bench.subject import Subject
from nla_hub.errors import GateFailedError


def run(
    subject: Subject, operations: Sequence[Operation], settings: Settings, *, command: str
) -> Iterator[dict[str, Any] | Route]:
    """The machine's record, then routes as they are measured.

    Raises:
        GateFailedError: at the end, where a route computed something else than the plain one (float32 alone is judged).
    """
    faults: list[str] = []
    model = _first(subject, operations[0])
    device, dtype = model.get_input_embeddings().weight.device, model.dtype
    shape = vars(Architecture.of(model.config))
    del model
    limits = measure(device, dtype)
    yield {
        "record": "machine",
        "command": command,
        "subject": subject.name,
        "random": subject.random,
        "site": str(subject.site),
        "shape": {**shape, "windows": list(shape["windows"])},
        "dtype": str(dtype).removeprefix("torch."),
        **describe(device),
        "copy_bytes_per_s": limits.bandwidth,
        "matmul_flops": limits.rate,
    }
    for operation in operations:
        for route in MEASURES[operation](subject, settings, limits):
            yield route
            if (fault := route.fault(dtype)) is not None:
                faults.append(fault)
        subject.release()
    if faults:
        raise GateFailedError(
            "A route did not compute what the plain one does, so its speed is worth nothing.",
            where=subject.name,
            faults=faults,
        )


def _first(subject: Subject, operation: Operation) -> Any:
    """The model that an operation runs."""
    if operation == "verbalize":
        return subject.av()[0].loaded.model
    return subject.ar().model.trunk if operation == "reconstruct" else subject.source().loaded.model
