"""Accelerators that a recipe can declare: what `train --plan` knows about them without having one.

Memory is what PyTorch reports as the device's total, rounded down to half a GiB: a little less than the sheet's figure, because
the driver keeps some. Peaks are for dense matrices; sheets that print them "with sparsity" say twice as much.
"""

from __future__ import annotations

from dataclasses import dataclass

from nla_hub.errors import UnknownNameError

GIB = 2**30

CPU = "cpu"
"""`hardware.gpu` of a recipe that needs none; nothing is declared about its memory."""


@dataclass(frozen=True)
class GPU:
    """One kind of accelerator.

    Attributes:
        memory: bytes that PyTorch can hand out.
        flops: operations a second with dense bfloat16 matrices, added up in float32.
        bandwidth: bytes a second between its memory and its cores.
        source: where `flops` and `bandwidth` are from.
    """

    memory: int
    flops: float
    bandwidth: float
    source: str


GPUS: dict[str, GPU] = {
    "H100-80GB": GPU(79 * GIB, 989e12, 3.35e12, "NVIDIA H100 data sheet, SXM"),
    "H100-PCIe-80GB": GPU(79 * GIB, 756e12, 2.0e12, "NVIDIA H100 data sheet, PCIe"),
    "H200-141GB": GPU(139 * GIB, 989e12, 4.8e12, "NVIDIA H200 data sheet, SXM"),
    "B200": GPU(178 * GIB, 2250e12, 8.0e12, "NVIDIA DGX B200 data sheet, an eighth of the system"),
    "A100-80GB": GPU(79 * GIB, 312e12, 2.039e12, "NVIDIA A100 80GB data sheet, SXM"),
    "A100-40GB": GPU(39 * GIB, 312e12, 1.555e12, "NVIDIA A100 40GB data sheet, SXM"),
    "L40S-48GB": GPU(44 * GIB, 362e12, 0.864e12, "NVIDIA L40S data sheet"),
    "RTX-4090-24GB": GPU(47 * GIB // 2, 165e12, 1.008e12, "NVIDIA Ada GPU architecture white paper"),
}
"""By the names that `hardware.gpu` takes."""


def gpu_named(name: str) -> GPU | None:
    """The accelerator of that name, None for "cpu"; raises an UnknownNameError."""
    if name == CPU:
        return None
    if name not in GPUS:
        raise UnknownNameError("GPU", name, [CPU, *GPUS])
    return GPUS[name]
