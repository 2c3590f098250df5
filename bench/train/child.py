"""The process of one trainer: `python -m bench.train.child JOB`.

    train    the rows of the job through the trainer's own loop, measured by the clock
    probe    a length on each line of stdin; one optimizer step of a document that long; does it fit
    model    writes a checkpoint of random weights
    rates    the card's copy bandwidth and matrix product rate

Only the module of the trainer asked for is imported: Unsloth must come before transformers.
"""

from __future__ import annotations

import functools
import importlib
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from bench.train.job import MARK, TRAINERS, Job


class Trainer(Protocol):
    """What a module of a trainer has."""

    def train(self, job: Job) -> dict[str, Any]: ...

    def probe(self, job: Job) -> Callable[[int], None]: ...


def say(result: dict[str, Any]) -> None:
    print(f"\n{MARK}{json.dumps(result)}", flush=True)


def answer_probes(job: Job, trainer: Trainer) -> None:
    """Under the budget from loading on; each answer with what the step held."""
    import torch

    from bench.train import budget

    with budget.held_to(job.budget) as limit:
        try:
            step = trainer.probe(job)
        except torch.OutOfMemoryError:
            step = None
        for line in sys.stdin:
            if step is None:
                say({"fits": False, "hopeless": True})
            else:
                say(limit.measure(functools.partial(step, int(line))))


def rates(job: Job) -> dict[str, Any]:
    """As bench.gpu measures them."""
    import torch

    from bench import timing

    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda" if on_gpu else "cpu")
    size, side = (4 << 30, 8192) if on_gpu else (1 << 26, 512)
    dtype = torch.bfloat16 if on_gpu else torch.float32
    return {
        "bandwidth": timing.copy_bandwidth(device, size, 0.25),
        "flops": timing.product_rate(device, side, dtype, 0.25),
    }


def prepare(job: Job) -> dict[str, Any]:
    """The tasks that are no trainer's."""
    if job.task == "rates":
        return rates(job)
    from bench.train import models

    started = time.monotonic()
    models.write(job.model, Path(job.rows), seed=job.seed, longest=job.longest)
    return {"seconds": time.monotonic() - started}


def main() -> None:
    job = Job(**json.loads(sys.argv[1]))
    if job.who in TRAINERS and TRAINERS[job.who][0] == "ours":
        from fastsft.device import grow_segments

        grow_segments()  # before anything starts CUDA, as `fastsft train` does
    if job.task in ("model", "rates"):
        say(prepare(job))
        return
    trainer: Any = importlib.import_module(f"bench.train.{TRAINERS[job.who][0]}")
    if job.task == "probe":
        answer_probes(job, trainer)
    else:
        say(trainer.train(job))


if __name__ == "__main__":
    main()
