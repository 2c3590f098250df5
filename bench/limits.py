"""From bytes and operations to time: what a card can do, and how near to it a measurement is.

What an op must move and compute is counted in `fastsft_kernels.limits`. The rates of a card come
from the same run, where it measured them (a copy and a matrix product, `bench.gpu`); otherwise from
the table in `fastsft_kernels.cards`, and the report says which.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from fastsft_kernels.cards import CARDS, Rates, seconds
from fastsft_kernels.limits import Work

__all__ = ["Rates", "Work", "rates_of", "seconds", "share"]


def share(work: Work, rates: Rates, measured: float) -> float:
    """How much of the limit `measured` seconds reach: 1 is the limit itself."""
    return seconds(work, rates) / measured


def rates_of(card: str, rows: Iterable[Mapping[str, Any]]) -> Rates | None:
    """The rates that `rows`, a run on `card`, measured, else the nominal ones, else None."""
    for row in rows:
        if row["kind"] == "rates":
            return Rates(row["bandwidth"], row["flops"], "measured in the same run")
    return CARDS.get(card)
