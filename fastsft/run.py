"""What a run is made of, and how it is put together before step 1.

    config -> tokens -> model -> plan of the steps -> optimizer -> (checkpoint restored) -> Run

A fresh and a resumed run take the same road. What resuming must not change is compared on the way: the
settings before anything is loaded, and again what only the model settles; the tokens themselves by a digest.
"""

from __future__ import annotations

import json
import math
import random
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from fastsft.checkpoint import (
    Checkpoint,
    remove_left_overs,
    restore_random_state,
    set_aside_later,
)
from fastsft.config import Config
from fastsft.console import RunConsole, RunSummary
from fastsft.data.batches import (
    ExampleOrder,
    Mixture,
    step_bounds_by_examples,
    step_bounds_by_tokens,
)
from fastsft.data.loader import Layout
from fastsft.data.prepare import Prepared, Streamed
from fastsft.data.store import TokenStore
from fastsft.errors import UserError
from fastsft.metrics import Meter, MetricsLog, flops_per_token
from fastsft.model.build import Built, build
from fastsft.model.engine import paths
from fastsft.model.fast import FastEngine
from fastsft.model.precompile import compiled_ahead
from fastsft.optim import Optimizer, build_optimizer, peak_learning_rate, warmup_steps
from fastsft.preparation import Intake, settle_date, take_in
from fastsft.reporters import open_reporters
from fastsft.run_folder import check_resume_config

if TYPE_CHECKING:
    from fastsft_kernels.precompile import Misses

FEW_STEPS = 20  # fewer are said before step 1
TAIL = {"cuda": 64, "cpu": 1}  # T is rounded up on a GPU so that its kernels see few sizes


@dataclass
class Course:
    """Where the run is and how good it has been: all that a checkpoint adds to weights and moments."""

    total_steps: int
    warmup_steps: int  # as settled when the run began
    step: int = 0
    cursor: dict[str, Any] = field(default_factory=dict)
    best_loss: float | None = None
    best_step: int | None = None
    evaluations_without_gain: int = 0
    trained_tokens: int = 0
    total_tokens: int = 0
    seconds: float = 0.0


@dataclass
class Run:
    """The parts of a run that the loop works with."""

    config: Config
    folder: Path
    console: RunConsole
    built: Built
    optimizer: Optimizer
    data: Prepared | Streamed
    layout: Layout
    course: Course
    meter: Meter
    log: MetricsLog
    order: ExampleOrder | None  # None for a stream, as are the bounds of its steps
    bounds: np.ndarray | None
    rows_of: dict[int, tuple[str, ...]] = field(default_factory=dict)
    misses: Misses | None = None  # kernels that compile at a launch, until step 1 is through


def set_up(
    config: Config,
    folder: Path,
    checkpoint: Checkpoint | None,
    console: RunConsole,
    device: torch.device,
    stem: str,
) -> Run:
    """From a checked config to a run that can take its first step."""
    config = settle(config, checkpoint)
    if checkpoint:
        _refuse_changes(config, checkpoint)
    seed_everything(config.seed)
    intake = take_in(config, console.rich)
    intake.data.report.render(console.rich)
    built, misses = _load(intake, device, checkpoint, console)
    config, data = built.config, intake.data
    if checkpoint:
        _continue(checkpoint, config, data, folder, console)
    remove_left_overs(folder)
    order = example_order(config, data) if isinstance(data, Prepared) else None
    bounds = step_bounds(config, data, order) if isinstance(data, Prepared) and order else None
    total = len(bounds) - 1 if bounds is not None else config.max_steps or 0
    course, optimizer = _course(config, folder, built, data, total, checkpoint)
    folder.joinpath("config.yaml").write_text(_repeatable(config, stem).to_yaml(), encoding="utf-8")
    data.report.write(folder / "data_report.json")
    resume_step = checkpoint.step if checkpoint else None
    meter = Meter(device, flops_per_token(*built.matmul_weights()))
    if checkpoint:
        meter.restore(checkpoint.state["window"])
    reporters = open_reporters(config, folder, resume_step)
    run = Run(
        config=config,
        folder=folder,
        console=console,
        built=built,
        optimizer=optimizer,
        data=data,
        layout=Layout(built.micro_batch_tokens, _quadratic(built), TAIL[device.type], device),
        course=course,
        order=order,
        bounds=bounds,
        meter=meter,
        log=MetricsLog(folder / "metrics.jsonl", resume_step, reporters),
        misses=misses,
    )
    _say(run)
    return run


def _load(
    intake: Intake, device: torch.device, checkpoint: Checkpoint | None, console: RunConsole
) -> tuple[Built, Misses | None]:
    """The model, sized for the longest row of all data; its embedding must hold every token.

    On a GPU its kernels compile meanwhile, and those that were missed are counted from here on.
    """
    stored = intake.data.train if isinstance(intake.data, Prepared) else None
    longest = int(stored.lengths.max()) if stored is not None else intake.config.max_length
    if intake.data.eval is not None:
        longest = max(longest, int(intake.data.eval.lengths.max()))
    config, tokenizer = intake.config, intake.tokenizer
    resume = checkpoint.path if checkpoint else None
    with (
        compiled_ahead(config, tokenizer, device, longest, resume, console) as kernels,
        console.task("loading the model") as advance,
    ):
        built = build(
            config,
            tokenizer,
            intake.template,
            device=device,
            longest=longest,
            resume_from=resume,
            progress=lambda done, total: advance(1),
        )
    _check_ids(built, stored)
    return built, kernels.misses


def _continue(
    checkpoint: Checkpoint,
    config: Config,
    data: Prepared | Streamed,
    folder: Path,
    console: RunConsole,
) -> None:
    """Refuse to resume with other settings or tokens; move what came after the checkpoint out of the way."""
    check_resume_config(checkpoint.state["config"], config.model_dump())
    if checkpoint.state["data"] != data.digest:
        raise UserError(
            "resume: data, tokenizer or template give other tokens than when the run began; put "
            "back what was changed, or drop resume to start a new run"
        )
    for path in set_aside_later(folder, checkpoint.step):
        console.warn(f"a checkpoint from after step {checkpoint.step} was set aside as {path}")


def _check_ids(built: Built, stored: TokenStore | None) -> None:
    """A token id beyond the embedding's rows would be a crash, on a GPU one without a name."""
    rows = built.model.get_input_embeddings().weight.shape[0]  # type: ignore[union-attr, index]
    largest = built.tokenizer.vocab_size - 1
    if largest >= rows and stored is not None:
        largest = int(stored.ids.max())
    if largest >= rows:
        raise UserError(
            f"tokenizer: the data holds token {largest}, but {built.config.model} has {rows} rows in its "
            "embedding; use the model's own tokenizer, or new_tokens: train for a template's control tokens"
        )


def settle(config: Config, checkpoint: Checkpoint | None) -> Config:
    """Fix what `auto` leaves to the moment: the date a template may print, the learning rate."""
    config = settle_date(config, checkpoint.state["config"]["date"] if checkpoint else None)
    return config.model_copy(update={"learning_rate": peak_learning_rate(config)})


def _refuse_changes(config: Config, checkpoint: Checkpoint) -> None:
    """Before anything is loaded; what only the model can settle is looked at again afterwards."""
    old = checkpoint.state["config"]
    later = {"max_length"} | ({"lora"} if config.adapter else set())
    unsettled = {key: old[key] for key in later - config.model_fields_set}
    check_resume_config(old, {**config.model_dump(), **unsettled})


def seed_everything(seed: int) -> None:
    """Nothing of ours draws from these generators; a model's own code may."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def _repeatable(config: Config, stem: str) -> Config:
    """The config as it is written down: run again, it repeats the run in a new folder."""
    return config.model_copy(update={"output_dir": "auto", "resume": None, "run_name": stem})


def _course(
    config: Config,
    folder: Path,
    built: Built,
    data: Prepared | Streamed,
    total: int,
    checkpoint: Checkpoint | None,
) -> tuple[Course, Optimizer]:
    """Optimizer and course, at their beginning or as a checkpoint left them."""
    assert total, "the config asks for at least one step"
    sums = built.engine.sums if isinstance(built.engine, FastEngine) else None
    optimizer = build_optimizer(built.named_parameters(), config, sums)
    if checkpoint is None:
        return Course(total_steps=total, warmup_steps=warmup_steps(config, total)), optimizer
    course = Course(**{**checkpoint.state["course"], "total_steps": total})
    best = f"step-{course.best_step:06d}" if course.best_step is not None else ""
    if best and best != checkpoint.path.name and not (checkpoint.path.parent / best).exists():
        course.best_loss = course.best_step = None  # it went with a course that was abandoned
    if course.step > total or (course.step == total and _finished(folder, total)):
        raise UserError(
            f"resume: the run is at step {course.step} and {total} steps were asked for; nothing is left "
            "to train. Raise epochs or max_steps to train on"
        )
    tensors = checkpoint.tensors()
    optimizer.load_state_dict(tensors["optimizer"])
    restore_random_state(tensors["random"])
    if isinstance(data, Streamed):
        data.stream.restore(course.cursor["stream"])
    return course, optimizer


def _finished(folder: Path, steps: int) -> bool:
    """Whether the run in `folder` left its product: a kill may come between the last step and that."""
    summary = folder / "summary.json"
    return summary.exists() and json.loads(summary.read_text(encoding="utf-8"))["steps"] == steps


def example_order(config: Config, data: Prepared) -> ExampleOrder:
    """The stream of examples of a run over stored tokens."""
    weights = tuple(source.weight for source in config.data)
    mixture = Mixture(data.sizes, weights, config.seed, config.shuffle)
    if mixture.epoch_size() == 0:
        raise UserError(
            f"data: the weights {weights} leave no row of {data.sizes} for an epoch; raise a weight"
        )
    return ExampleOrder(mixture)


def step_bounds(config: Config, data: Prepared, order: ExampleOrder) -> np.ndarray:
    """Positions in the stream where steps begin, int64[steps + 1]."""
    total = None
    if config.epochs is not None:
        total = max(1, round(config.epochs * order.mixture.epoch_size()))
    if config.batch_tokens is not None:
        tokens = data.train.example_tokens
        return step_bounds_by_tokens(
            order, tokens, config.batch_tokens, total=total, max_steps=config.max_steps
        )
    assert config.batch_size is not None
    if total is None:
        total = (config.max_steps or 0) * config.batch_size
    return step_bounds_by_examples(total, config.batch_size)


def _quadratic(built: Built) -> float:
    """Attention's cost per token of document length, relative to the matmuls' cost per token."""
    config = built.model.config.get_text_config()
    attention = 2 * config.num_hidden_layers * config.hidden_size  # causal: half of 4·L·H a token
    return attention / (2 * sum(built.matmul_weights()))


def _say(run: Run) -> None:
    """The summary before step 1."""
    config, built, course = run.config, run.built, run.course
    trained, total = built.counts()
    device = run.layout.device
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    stored = run.data.train if isinstance(run.data, Prepared) else None
    examples = (
        f"{config.batch_size} examples" if config.batch_size else f"{config.batch_tokens:,} tokens"
    )
    notes = list(built.engine.notes)
    if stored is not None and (hint := _few_steps(run) or _small_step(run)):
        notes.append(hint)
    run.console.summary(
        RunSummary(
            model=config.model,
            method=config.method,
            engine=built.engine.name,
            engine_reason=built.reason,
            device=where,
            dtype=str(built.dtype).removeprefix("torch."),
            trainable=trained,
            parameters=total,
            rows=len(stored) if stored is not None else None,
            tokens=int(stored.lengths.sum()) if stored is not None else None,
            trained_tokens=int(stored.targets.sum()) if stored is not None else None,
            total_steps=course.total_steps,
            first_step=course.step,
            batch=f"{examples} a step, micro-batches of up to {built.micro_batch_tokens:,} tokens",
            predicted_memory=built.predicted_memory,
            output_dir=run.folder,
            notes=notes,
            paths=paths(built.engine, built.model),
            memory_parts={} if built.planning is None else built.planning.planned.memory.parts,
            host_memory=0 if built.planning is None else built.planning.planned.memory.host,
        )
    )


def _few_steps(run: Run) -> str | None:
    """A run whose data fill few steps, said once with the batch that would give more."""
    config, course, bounds = run.config, run.course, run.bounds
    if course.step or course.total_steps >= FEW_STEPS or config.max_steps or bounds is None:
        return None
    count = f"{course.total_steps} step{'s' if course.total_steps > 1 else ''}"
    if config.batch_tokens is not None:
        assert isinstance(run.data, Prepared) and run.order is not None
        taken = run.order.take(0, int(bounds[-1]))
        size = int(run.data.train.example_tokens[taken].sum()) // FEW_STEPS
        return f"only {count}, which train little; batch_tokens={max(1, size)} would give about {FEW_STEPS}"
    examples = int(bounds[-1])
    size = max(1, examples // FEW_STEPS)
    if size == config.batch_size:
        return f"only {count}, which train little; raise epochs for more"
    return f"only {count}, which train little; batch_size={size} would give {math.ceil(examples / size)}"


def _small_step(run: Run) -> str | None:
    """A step whose tokens do not fill one micro-batch on a GPU, said once with the size that would."""
    config, built = run.config, run.built
    if (
        run.layout.device.type != "cuda"
        or config.batch_size is None
        or isinstance(run.data, Streamed)
    ):
        return None
    mean = float(run.data.train.example_tokens.mean())
    if config.batch_size * mean >= built.micro_batch_tokens / 2:
        return None
    return (
        f"a step holds about {config.batch_size * mean:,.0f} tokens, less than the card takes at once; "
        f"batch_size={round(built.micro_batch_tokens / mean)} would fill it"
    )
