"""The cases under pytest-benchmark: `pytest bench/kernels -k rms_norm`, or `make bench` for all.

On a GPU the inputs of the record, on a CPU the small ones, in plain torch. Times are of the wall
clock with the device waited for, so calls of some microseconds show their launch; `bench.gpu` has
the figures for the record.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch

from bench.kernels import find
from bench.kernels.case import Case

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
ROUNDS = 20


def _everyone() -> list[Any]:
    """A parameter for ours and each peer of each case; peers on a GPU alone, where they belong."""
    found = []
    for case in find():
        for who in ["fastsft", *(case.peers if DEVICE.type == "cuda" else [])]:
            found.append(pytest.param(case, who, id=f"{case.op} {case.label}-{who}"))
    return found


@pytest.mark.parametrize("case,who", _everyone())
def test_kernel(case: Case, who: str, benchmark: Any) -> None:
    benchmark.group = f"{case.op} {case.label}"
    run = case.run if who == "fastsft" else case.peers[who]

    def fresh() -> tuple[tuple[Callable[[], Any]], dict[str, Any]]:
        """New inputs for every round: some ops overwrite theirs."""
        make = case.record if DEVICE.type == "cuda" else case.small
        inputs = make(DEVICE, case.dtypes[0])
        return (partial(run, *inputs) if who == "fastsft" else run(*inputs),), {}

    try:
        fresh()
    except ImportError as error:
        pytest.skip(str(error))
    benchmark.pedantic(_call, setup=fresh, rounds=ROUNDS, warmup_rounds=2)


def _call(thunk: Callable[[], Any]) -> None:
    thunk()
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
