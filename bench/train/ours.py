"""fastsft over rows that are tokens already: the trainer's own step, on a run put together here.

Left out is what has no part in a step: the data's preparation (bench.data), evaluation, checkpoints
and the console's tables. The rehearsal of the worst micro-batches is in, and counts towards the
first step.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import torch
from fastsft_kernels import launch

from bench.train import budget
from bench.train.clock import Clock
from bench.train.job import Job
from bench.train.workloads import Rows
from fastsft import trainer
from fastsft.config import Config, make_config
from fastsft.console import RunConsole
from fastsft.data.batches import Document, ExampleOrder, Mixture, collate, step_bounds_by_examples
from fastsft.data.loader import Ahead, Layout, stored_steps, to_device
from fastsft.data.tokenizer import Tokenizer
from fastsft.device import check_device
from fastsft.errors import UserError
from fastsft.metrics import Meter
from fastsft.model.build import Built, build
from fastsft.optim import apply_update, build_optimizer
from fastsft.rehearsal import rehearse
from fastsft.run import TAIL, Course, Run


class Stored:
    """Rows as the loader reads a token store: one sequence an example."""

    def __init__(self, rows: Rows) -> None:
        self.rows, self.lengths = rows, rows.lengths
        self.example_offsets = np.arange(len(rows) + 1)

    def sequence(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        return self.rows[index]

    def where(self, example: int) -> str:
        return f"row {example}"


def _config(job: Job, **more: Any) -> Config:
    keys: dict[str, Any] = {
        "model": job.model,
        "method": job.method,
        "engine": job.options.get("engine", "auto"),
        "vram": job.options.get("vram", "auto"),
        "data": "tokens",  # never read: rows come as token ids
        "batch_size": job.batch,
        "max_length": job.longest,
        "max_steps": job.steps,
        "learning_rate": job.learning_rate,
        "lr_scheduler": "constant",
        "warmup_steps": 0,
        "seed": job.seed,
        "shuffle": False,
        "micro_batch_tokens": job.micro_tokens or "auto",
    }
    if job.method != "full":
        keys["lora"] = {"r": job.rank, "alpha": job.alpha}
    return make_config(keys | more)


def _built(config: Config, longest: int) -> Built:
    tokenizer = Tokenizer.load(Path(config.model))
    return build(config, tokenizer, None, device=check_device(), longest=longest)


def _run(config: Config, folder: Path, console: RunConsole) -> Run:
    """A run as set_up makes it, without prepared data and a log."""
    built, device = _built(config, config.max_length), check_device()
    values: Any = built.model.config
    # Attention's cost per token of document length over the products' cost per token.
    quadratic = values.num_hidden_layers * values.hidden_size / sum(built.matmul_weights())
    examples = (config.max_steps or 0) * (config.batch_size or 0)
    return Run(
        config=config,
        folder=folder,
        console=console,
        built=built,
        optimizer=build_optimizer(built.named_parameters(), config),
        data=None,  # type: ignore[arg-type]  # the steps come from elsewhere
        layout=Layout(built.micro_batch_tokens, quadratic, TAIL[device.type], device),
        course=Course(total_steps=config.max_steps or 0, warmup_steps=0),
        meter=Meter(device),
        log=None,  # type: ignore[arg-type]
        order=ExampleOrder(Mixture((examples,), (1.0,), config.seed, shuffle=False)),
        bounds=step_bounds_by_examples(examples, config.batch_size or 0),
    )


def train(job: Job) -> dict[str, Any]:
    """The whole job; see Clock for what is measured."""
    rows, clock = Rows.load(Path(job.rows)), Clock(job)
    config = _config(job, max_length=int(rows.lengths.max()))
    with ExitStack() as stack:
        if "backend" in job.options:
            stack.enter_context(launch.forced(backend=job.options["backend"]))
        run = _run(config, Path(job.out), stack.enter_context(RunConsole()))
        clock.begin()
        if clock.on_gpu:
            rehearse(run)
        records = _steps(run, rows, clock)
    return {
        **clock.result(),
        "tokens": [r["total_tokens"] for r in records],
        "trained": [r["trained_tokens"] for r in records],
        "losses": [r["loss"] for r in records],
        "note": f"{run.built.engine.name}: {run.built.reason}",
        **({"predicted_bytes": run.built.predicted_memory} if clock.on_gpu else {}),
    }


def _steps(run: Run, rows: Rows, clock: Clock) -> list[dict[str, Any]]:
    """Every step as the trainer takes it (its `_step`: what is to be measured is that, no copy of it)."""
    records: list[dict[str, Any]] = []
    order, bounds = run.order, run.bounds
    assert order is not None and bounds is not None
    run.meter.start()
    with Ahead(lambda: stored_steps(Stored(rows), order, bounds, run.layout)) as steps:
        for step in steps:
            trainer._step(run, step)
            clock.step()
            records += run.meter.poll()
    return records + run.meter.poll(wait=True)


def probe(job: Job) -> Callable[[int], None]:
    """A step of one document, every token trained: what `vram` and `max_length` of that size would give.

    The model is built anew for each length, because the plan is made for it. A length the planner
    refuses does not fit. On a CPU there is no plan; what little the engine can keep is kept.
    """
    device = check_device()
    held: list[Built] = []

    def step(tokens: int) -> None:
        held.clear()
        if device.type == "cuda":
            torch.cuda.empty_cache()
            more = {"vram": f"{job.budget / 1e9:.3f}GB"}
        else:
            more = {"activations": "recompute_block"}
        config = _config(job, max_length=tokens, **more)
        try:
            held.append(_built(config, tokens))
        except UserError as error:
            if "vram" in str(error):
                raise torch.OutOfMemoryError(str(error)) from error
            raise
        budget.enforce(job.budget)  # the same limit as for everyone, whatever the plan thought
        built = held[0]
        optimizer = build_optimizer(built.named_parameters(), config)
        ids = np.arange(tokens, dtype=np.int32) % 1000 + 3
        document = Document(1, ids, np.ones(tokens, bool))
        whole = collate([document], tokens - 1, round_to=TAIL[device.type])
        output = built.engine.loss(to_device(whole, device), step=1)
        (output.loss_sum / (tokens - 1)).backward()
        apply_update(optimizer, job.learning_rate, config.max_grad_norm)

    return step
