"""Memory found wanting before the first step, or at least without losing one.

    rehearse    the worst micro-batches of the data, forwards and backwards, on the memory that training will
                have: trained weights, optimizer state, random state and meters are as they were
    make_room   after memory ran out in a step: the next cheaper plan, for the same micro-batches

The worst are two: as many tokens as a micro-batch may hold in documents of the greatest length, all trained;
and as many in documents of the least length. What a plan keeps, recomputes or moves to the host changes no
gradient, so a step that is run again under a cheaper one is the step that would have been.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from fastsft.data.batches import Document, MicroBatch, collate
from fastsft.data.loader import to_device
from fastsft.data.prepare import Prepared
from fastsft.run import Run


def rehearse(run: Run) -> int:
    """Runs the worst micro-batches, under cheaper plans where memory runs out -> peak bytes (0 on a CPU).

    Raises torch.OutOfMemoryError where no plan is left.
    """
    device = run.layout.device
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    with _as_it_was(run), _moments_to_come(run):
        for batch in worst_micro_batches(run):
            while not _fits(run, batch):
                pass
    peak = 0
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
    return peak


def _fits(run: Run, batch: MicroBatch) -> bool:
    """True once the micro-batch has gone through; False where a cheaper plan must try."""
    try:
        run.built.engine.loss(batch, step=0).loss_sum.backward()
        return True
    except torch.OutOfMemoryError as error:
        failure = error.with_traceback(None)  # which holds the tensors of the attempt
    make_room(run, "the worst micro-batch", failure)
    return False


def worst_micro_batches(run: Run) -> Iterator[MicroBatch]:
    """The longest documents the data holds, and the shortest, a micro-batch of each."""
    layout = run.layout
    if isinstance(run.data, Prepared):
        lengths = run.data.train.lengths
        longest, shortest = int(lengths.max()), max(2, int(lengths.min()))
    else:
        longest, shortest = run.config.max_length, 2
    for length in dict.fromkeys((longest, shortest)):
        whole, rest = divmod(layout.budget, length)
        sizes = [length] * max(whole, 1) + ([rest] if whole and rest > 1 else [])
        documents = [
            Document(key, np.zeros(n, np.int32), np.ones(n, bool)) for key, n in enumerate(sizes)
        ]
        trained = sum(n - 1 for n in sizes)
        yield to_device(collate(documents, trained, round_to=layout.round_to), layout.device)


@contextmanager
def _as_it_was(run: Run) -> Iterator[None]:
    """Gradients, random state and the step that keys dropout are afterwards what they were."""
    cuda = run.layout.device.type == "cuda"
    context = run.built.engine.context
    before = (random.getstate(), np.random.get_state(), torch.get_rng_state(), context.step)
    on_card = torch.cuda.get_rng_state(run.layout.device) if cuda else None
    try:
        yield
    finally:
        run.optimizer.zero_grad(set_to_none=True)
        random.setstate(before[0])
        np.random.set_state(before[1])
        torch.set_rng_state(before[2])
        context.step = before[3]
        if on_card is not None:
            torch.cuda.set_rng_state(on_card, run.layout.device)


@contextmanager
def _moments_to_come(run: Run) -> Iterator[None]:
    """Holds the memory of the optimizer's state, which it takes at its first step."""
    planning = run.built.planning
    wanted = 0 if planning is None or run.optimizer.state else planning.planned.memory.moments
    held: Any = torch.empty(wanted, dtype=torch.uint8, device=run.layout.device)
    try:
        yield
    finally:
        del held


def make_room(run: Run, where: str, failure: torch.OutOfMemoryError) -> None:
    """Takes the next cheaper plan, and says so. Raises `failure` where there is none."""
    built = run.built
    planning = built.planning.cheaper() if built.planning is not None else None
    if planning is None or built.engine.name != "fast":
        raise failure
    run.optimizer.zero_grad(set_to_none=True)
    now, then = planning.planned.plan, built.engine.plan  # type: ignore[union-attr]
    tiles = (now.mlp_rows, now.head_rows) != (then.mlp_rows, then.head_rows)
    same = "the same gradient, summed in another order" if tiles else "the gradient is the same"
    built.planning = planning
    built.engine.plan = now  # type: ignore[union-attr]
    built.predicted_memory = planning.planned.memory.peak
    if run.layout.device.type == "cuda":
        torch.cuda.empty_cache()
    run.console.warn(f"memory ran out in {where}; from here on: {planning.planned.said()} ({same})")
