"""What cards can do: bytes and operations a second. Where nobody measured, the datasheet says.

A product of bf16 matrices is counted dense, with fp32 accumulation (the datasheets' larger figures are
for sparsity, or for sums in fp16, which gaming cards do twice as fast). `pcie` is one direction between
pinned host memory and the card: 80 % of the link, not measured.
"""

from __future__ import annotations

from typing import NamedTuple

from fastsft_kernels.limits import Work

PCIE_4X8, PCIE_4, PCIE_5 = 13e9, 25e9, 50e9
DATASHEET = "datasheet"
MEASURED = "copy and 8192³ bf16 product measured once, 2026-10"


class Rates(NamedTuple):
    """Bytes a second of a copy, read and written; operations a second of a bf16 product."""

    bandwidth: float
    flops: float
    source: str
    pcie: float = PCIE_4


# By the name torch gives the card.
CARDS = {
    "NVIDIA H200": Rates(4.3e12, 790e12, MEASURED, PCIE_5),
    "NVIDIA H100 80GB HBM3": Rates(3.0e12, 798e12, MEASURED, PCIE_5),
    "NVIDIA B200": Rates(8.0e12, 2250e12, DATASHEET, PCIE_5),
    "NVIDIA A100-SXM4-80GB": Rates(2.04e12, 312e12, DATASHEET),
    "NVIDIA A100-SXM4-40GB": Rates(1.56e12, 312e12, DATASHEET),
    "NVIDIA L40S": Rates(0.86e12, 362e12, DATASHEET),
    "NVIDIA GeForce RTX 4090": Rates(1.01e12, 165e12, DATASHEET),
    "NVIDIA GeForce RTX 4080": Rates(0.72e12, 97e12, DATASHEET),
    "NVIDIA GeForce RTX 4060": Rates(0.27e12, 30e12, DATASHEET, PCIE_4X8),
    "NVIDIA GeForce RTX 3090": Rates(0.94e12, 71e12, DATASHEET),
    "NVIDIA GeForce RTX 3060": Rates(0.36e12, 25e12, DATASHEET),
}


def seconds(work: Work, rates: Rates) -> float:
    """The least time `work` takes at these rates."""
    hidden = max(work.bytes / rates.bandwidth, work.flops / rates.flops)
    return hidden + work.unhidden / rates.bandwidth
