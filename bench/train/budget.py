"""A step under a memory budget, as if the card were smaller.

On a GPU the allocator's own limit is set to the budget less what lies outside it (the CUDA
context), so that what is promised for a 24 GB card is what such a card could have given. On a CPU,
where no allocator has a limit, the budget is held against what autograd saves for the backward
pass: another quantity, which exercises the same search; its rows say so.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

CONTEXT = 600 * 10**6  # bytes a CUDA context takes outside torch's allocator, at most


class Limit:
    """On a GPU: counts what the allocator held."""

    kind = "allocator"

    def measure(self, step: Callable[[], None]) -> dict[str, Any]:
        """Whether the step fits, its peak and its seconds. Memory a failure left behind is given back."""
        self._clear()
        started = time.perf_counter()
        try:
            step()
            self._wait()
        except torch.OutOfMemoryError:
            fits = False
        else:
            fits = True
        found = {"fits": fits, "seconds": time.perf_counter() - started, "peak_bytes": self._peak()}
        self._clear()
        return found | {"limit": self.kind}

    def _wait(self) -> None:
        torch.cuda.synchronize()

    def _peak(self) -> int:
        return torch.cuda.max_memory_reserved()

    def _clear(self) -> None:
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


class SavedTensors(Limit):
    """On a CPU: counts the storages autograd keeps, each once."""

    kind = "saved for backward"

    def __init__(self, budget: int) -> None:
        self.budget = budget
        self.held: dict[int, int] = {}

    def keep(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        self.held[storage.data_ptr()] = storage.nbytes()
        if self._peak() > self.budget:
            raise torch.OutOfMemoryError(f"{self._peak():,} bytes saved of {self.budget:,}")
        return tensor

    def _wait(self) -> None:
        pass

    def _peak(self) -> int:
        return sum(self.held.values())

    def _clear(self) -> None:
        gc.collect()
        self.held.clear()


def enforce(budget: int) -> None:
    """On a GPU: torch's allocator may hold `budget` bytes less a CUDA context."""
    if torch.cuda.is_available():
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(max(0.0, (budget - CONTEXT) / total))


@contextmanager
def held_to(budget: int) -> Iterator[Limit]:
    """Everything inside keeps within `budget` bytes, loading included on a GPU."""
    if torch.cuda.is_available():
        enforce(budget)
        yield Limit()
        return
    saved = SavedTensors(budget)
    with torch.autograd.graph.saved_tensors_hooks(saved.keep, lambda tensor: tensor):
        yield saved
