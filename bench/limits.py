"""From bytes and operations to time: what a card can do, and how near to it a measurement is.

What an op must move and compute is counted in `fastsft_kernels.limits`. The rates of a card come
from the same run, where it measured them (a copy and a matrix product, `bench.gpu`); otherwise from
the table below, and the report says which.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from fastsft_kernels.limits import Work


class Rates(NamedTuple):
    """Bytes a second of a copy, read and written; operations a second of a bf16 product."""

    bandwidth: float
    flops: float
    source: str


# By the name torch gives the card. Datasheet: dense, without sparsity, bf16 with fp32 accumulation.
NOMINAL = {
    "NVIDIA H200": Rates(4.3e12, 790e12, "copy and 8192³ bf16 product measured once, 2026-10"),
    "NVIDIA H100 80GB HBM3": Rates(3.35e12, 989e12, "datasheet"),
    "NVIDIA B200": Rates(8.0e12, 2250e12, "datasheet"),
    "NVIDIA A100-SXM4-80GB": Rates(2.04e12, 312e12, "datasheet"),
    "NVIDIA A100-SXM4-40GB": Rates(1.56e12, 312e12, "datasheet"),
    "NVIDIA GeForce RTX 4090": Rates(1.01e12, 165e12, "datasheet"),
    "NVIDIA GeForce RTX 3090": Rates(0.94e12, 71e12, "datasheet"),
}


def seconds(work: Work, rates: Rates) -> float:
    """The least time `work` takes at these rates."""
    hidden = max(work.bytes / rates.bandwidth, work.flops / rates.flops)
    return hidden + work.unhidden / rates.bandwidth


def share(work: Work, rates: Rates, measured: float) -> float:
    """How much of the limit `measured` seconds reach: 1 is the limit itself."""
    return seconds(work, rates) / measured


def rates_of(card: str, rows: Iterable[Mapping[str, Any]]) -> Rates | None:
    """The rates that `rows`, a run on `card`, measured, else the nominal ones, else None."""
    for row in rows:
        if row["kind"] == "rates":
            return Rates(row["bandwidth"], row["flops"], "measured in the same run")
    return NOMINAL.get(card)
