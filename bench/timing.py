"""How long a call takes: medians of many passes over inputs that do not fit the cache.

A pass calls the function once on each of several copies of its inputs, together well beyond the L2
cache, and keeps every result until the pass is over, so that neither reads nor writes meet a line
that a former call left there. On a GPU a pass lies between two events, and the device sleeps
before it for as long as the host needs to enqueue it: what is timed is the work, not Python. An op
that makes the host wait shows that wait, as it would in training.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

Thunk = Callable[[], Any]
CLOCK = 2.0e9  # cycles a second of `torch.cuda._sleep`, an upper bound: sleeping longer is harmless
LONGEST_SLEEP = 0.05


class Timing(NamedTuple):
    """Seconds a call: 20th percentile, median, 80th; how many passes, of how many calls."""

    p20: float
    p50: float
    p80: float
    passes: int
    calls: int


def measure(
    calls: Sequence[Thunk], device: torch.device, budget: float, restore: Thunk | None = None
) -> Timing:
    """Times passes over `calls` for about `budget` seconds; `restore` runs before each, untimed."""
    once = _cuda_pass if device.type == "cuda" else _cpu_pass
    restore = restore or _nothing
    for _ in range(2):  # compiles, fills the allocator
        restore()
        host = _enqueue(calls)
    samples: list[float] = []
    end = time.perf_counter() + budget
    while len(samples) < 3 or (time.perf_counter() < end and len(samples) < 1000):
        restore()
        samples.append(once(calls, host) / len(calls))
    deciles = statistics.quantiles(samples, n=10, method="inclusive")
    return Timing(deciles[1], statistics.median(samples), deciles[7], len(samples), len(calls))


def _enqueue(calls: Sequence[Thunk]) -> float:
    """Seconds the host needs to ask for a whole pass; waits for it to be done."""
    start = time.perf_counter()
    results = [call() for call in calls]
    seconds = time.perf_counter() - start
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    del results
    return seconds


def _cuda_pass(calls: Sequence[Thunk], host: float) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(int(CLOCK * min(1.5 * host, LONGEST_SLEEP)))
    start.record()
    results = [call() for call in calls]
    end.record()
    end.synchronize()
    del results
    return start.elapsed_time(end) / 1000


def _cpu_pass(calls: Sequence[Thunk], host: float) -> float:
    start = time.perf_counter()
    results = [call() for call in calls]
    seconds = time.perf_counter() - start
    del results
    return seconds


def _nothing() -> None:
    pass


def copy_bandwidth(device: torch.device, size: int, budget: float) -> float:
    """Bytes a second, read and written, of copies of `size` bytes."""
    a, b = (torch.randn(size // 4, device=device) for _ in range(2))
    timing = measure([lambda: b.copy_(a)], device, budget)
    return 2 * size / timing.p50


def product_rate(device: torch.device, size: int, dtype: torch.dtype, budget: float) -> float:
    """Operations a second of size x size matrix products on random numbers (zeros run faster)."""
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    timing = measure([lambda: a @ b], device, budget)
    return 2 * size**3 / timing.p50


def peak_bytes(call: Thunk, device: torch.device) -> int | None:
    """The most device memory a call holds over what was allocated before; None on a CPU."""
    if device.type != "cuda":
        return None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before
