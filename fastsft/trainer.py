"""The story of a run: set-up in order, then the loop, with the step on one screen.

    config -> device -> folder -> tokenizer, template -> tokens -> model -> plan -> step, step, step -> product

Every number that moves the weights is a function of the config and the step: the order of the examples, the
learning rate, dropout. What an interruption must carry over is therefore small: trained weights, the
optimizer's moments, the step, and the position in a stream.
"""

from __future__ import annotations

import json
import random
import signal
import threading
import time
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError

from fastsft.checkpoint import (
    Checkpoint,
    list_checkpoints,
    prune,
    random_state,
    remove_left_overs,
    restore_random_state,
    save_checkpoint,
    set_aside_later,
)
from fastsft.config import Config, make_config
from fastsft.console import RunConsole, RunSummary
from fastsft.data.batches import (
    ExampleOrder,
    Mixture,
    step_bounds_by_examples,
    step_bounds_by_tokens,
)
from fastsft.data.loader import (
    Ahead,
    Layout,
    Step,
    evaluation_batches,
    stored_steps,
    streamed_steps,
)
from fastsft.data.prepare import Prepared, Streamed
from fastsft.doctor import check_device
from fastsft.errors import UserError
from fastsft.metrics import EvalSums, Meter, MetricsLog, flops_per_token, write_summary
from fastsft.model.build import Built, build, refuse_what_is_not_there
from fastsft.model.files import is_disk_full
from fastsft.optim import apply_update, build_optimizer, learning_rate, peak_learning_rate
from fastsft.plot import plot_loss
from fastsft.preparation import settle_date, take_in
from fastsft.reporters import open_reporters
from fastsft.run_folder import check_resume_config, claim_output_dir, resolve_resume

TAIL = {"cuda": 64, "cpu": 1}  # T is rounded up on a GPU so that its kernels see few sizes
SAMPLE_TOKENS = 128  # an answer to a sample prompt is cut here


@dataclass(frozen=True)
class Result:
    """What a finished or interrupted run left."""

    output_dir: Path
    steps: int
    interrupted: bool
    summary: dict[str, Any]


@dataclass
class Course:
    """Where the run is and how good it has been: all that a checkpoint adds to weights and moments."""

    total_steps: int
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
    optimizer: torch.optim.Optimizer
    data: Prepared | Streamed
    layout: Layout
    course: Course
    meter: Meter
    log: MetricsLog
    rows_of: dict[int, tuple[str, ...]] = field(default_factory=dict)


def train(config: Config | dict[str, Any], *, config_path: str | None = None) -> Result:
    """Train as `config` says and return what was left. Raises UserError for what the user can mend."""
    config = make_config(config) if isinstance(config, dict) else config.model_copy(deep=True)
    stem = config.run_name or (Path(config_path).stem if config_path else "run")
    refuse_what_is_not_there(config)
    device = check_device()
    with RunConsole() as console, _claimed(config, stem) as folder:
        checkpoint = resolve_resume(config.resume, folder, console.warn)
        run = set_up(config, folder, checkpoint, console, device, stem)
        with interruptions(console) as stop:
            interrupted = loop(run, stop)
        return finish(run, interrupted)


@contextmanager
def _claimed(config: Config, stem: str) -> Iterator[Path]:
    """The run's folder; taken away again if set-up failed before anything was written into it."""
    folder = claim_output_dir(config, stem)
    try:
        yield folder
    except (OSError, SafetensorError) as error:
        if not is_disk_full(error):
            raise
        kept = list_checkpoints(folder)
        last = f"the checkpoint {kept[-1]} is kept" if kept else "there is no checkpoint yet"
        raise UserError(
            f"no space left on the device of {folder}; {last}. Free some, then go on with resume=auto"
        ) from error
    finally:
        with suppress(OSError):  # not empty: there is a run in it
            folder.rmdir()


# --- set-up, in order ---------------------------------------------------------------------------


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
    config, data = intake.config, intake.data
    data.report.render(console.rich)
    stored = data.train if isinstance(data, Prepared) else None
    longest = int(stored.lengths.max()) if stored is not None else config.max_length
    with console.task("loading the model") as advance:
        built = build(
            config,
            intake.tokenizer,
            intake.template,
            device=device,
            longest=longest,
            resume_from=checkpoint.path if checkpoint else None,
            progress=lambda done, total: advance(1),
        )
    config = built.config
    if checkpoint:
        check_resume_config(checkpoint.state["config"], config.model_dump())
        if checkpoint.state["data"] != data_mark(data):
            raise UserError(
                "resume: the files under data have changed since the run began (other rows, or other lengths "
                "of them); put them back, or drop resume to start a new run"
            )
        for path in set_aside_later(folder, checkpoint.step):
            console.warn(f"a checkpoint from after step {checkpoint.step} was set aside as {path}")
    remove_left_overs(folder)
    course, optimizer = _course(config, folder, built, data, checkpoint)
    folder.joinpath("config.yaml").write_text(_repeatable(config, stem).to_yaml(), encoding="utf-8")
    report = json.dumps(data.report.to_json(), indent=2, ensure_ascii=False)
    folder.joinpath("data_report.json").write_text(report + "\n", encoding="utf-8")
    resume_step = checkpoint.step if checkpoint else None
    run = Run(
        config=config,
        folder=folder,
        console=console,
        built=built,
        optimizer=optimizer,
        data=data,
        layout=Layout(built.micro_batch_tokens, _quadratic(built), TAIL[device.type], device),
        course=course,
        meter=Meter(device, flops_per_token(*built.matmul_weights())),
        log=MetricsLog(
            folder / "metrics.jsonl", resume_step, open_reporters(config, folder, resume_step)
        ),
    )
    _say(run)
    return run


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


def data_mark(data: Prepared | Streamed) -> int | None:
    """Changes with the rows' number, order and lengths; of a stream nothing is known beforehand."""
    if isinstance(data, Streamed):
        return None
    return zlib.crc32(data.train.lengths.tobytes())


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
    checkpoint: Checkpoint | None,
) -> tuple[Course, torch.optim.Optimizer]:
    """Plan the steps; restore position, moments and random state from a checkpoint."""
    total = config.max_steps if isinstance(data, Streamed) else len(step_bounds(config, data)) - 1
    assert total, "config requires max_steps for a stream"
    optimizer = build_optimizer(built.named_parameters(), config)
    if checkpoint is None:
        return Course(total_steps=total), optimizer
    course = Course(**{**checkpoint.state["course"], "total_steps": total})
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


def step_bounds(config: Config, data: Prepared) -> np.ndarray:
    """Positions in the stream where steps begin, int64[steps + 1]."""
    order = example_order(config, data)
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
    examples = f"{config.batch_size} examples" if config.batch_size else f"{config.batch_tokens:,} tokens"
    notes = list(built.engine.notes)
    if stored is not None and (hint := _small_step(run)):
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
        )
    )


def _small_step(run: Run) -> str | None:
    """A step whose tokens do not fill one micro-batch on a GPU, said once with the size that would."""
    config, built = run.config, run.built
    if run.layout.device.type != "cuda" or config.batch_size is None or isinstance(run.data, Streamed):
        return None
    mean = float(run.data.train.example_tokens.mean())
    if config.batch_size * mean >= built.micro_batch_tokens / 2:
        return None
    return (
        f"a step holds about {config.batch_size * mean:,.0f} tokens, less than the card takes at once; "
        f"batch_size={round(built.micro_batch_tokens / mean)} would fill it"
    )


# --- the loop -----------------------------------------------------------------------------------


def loop(run: Run, stop: threading.Event) -> bool:
    """Take every remaining step; True if a signal ended it early (a checkpoint is written then)."""
    course, config = run.course, run.config
    if course.step == 0:
        _samples(run, "before training")
        _evaluate(run, 0)
    elif _out_of_patience(run):  # killed before the product of a run stopped early
        return False
    run.console.start(course.total_steps, course.step)
    run.meter.start()
    with Ahead(lambda: _steps(run)) as steps:
        for step in steps:
            _step(run, step)
            stopping = stop.is_set()  # read once: a signal from here on ends the next step
            last = step.index == course.total_steps
            evaluate = last or step.index % config.eval_steps == 0
            save = stopping or last or step.index == 1 or step.index % config.save_steps == 0
            _report(run, wait=evaluate or save)
            if evaluate or save:
                with run.meter.paused():
                    better = evaluate and _evaluate(run, step.index)
                    enough = evaluate and _out_of_patience(run)
                    if save or better or enough:
                        _save(run)
                if stopping or enough:
                    return stopping and not last
    return False


def _step(run: Run, step: Step) -> None:
    """One optimizer step: the loss is summed over trained tokens and divided by their number once."""
    course, started = run.course, time.perf_counter()
    for batch in step.batches:
        output = run.built.engine.loss(batch, step=step.index)
        (output.loss_sum / batch.step_trained).backward()
        run.meter.add(output.loss_sum, output.correct, len(batch.trained_rows), batch.tokens)
    rate = learning_rate(step.index - 1, course.total_steps, run.config)
    update = apply_update(run.optimizer, rate, run.config.max_grad_norm)
    logged = step.index in (1, course.total_steps) or step.index % run.config.logging_steps == 0
    run.meter.end_step(step.index, step.epoch, rate, update, log=logged)
    course.step, course.cursor = step.index, step.cursor
    course.trained_tokens += step.trained
    course.total_tokens += step.tokens
    course.seconds += time.perf_counter() - started
    run.rows_of[step.index] = step.rows


def _steps(run: Run) -> Iterator[Step]:
    first = run.course.step + 1
    if isinstance(run.data, Streamed):
        assert run.config.batch_size is not None
        return streamed_steps(
            run.data.stream, run.config.batch_size, run.course.total_steps, run.layout, first=first
        )
    order, bounds = example_order(run.config, run.data), step_bounds(run.config, run.data)
    return stored_steps(run.data.train, order, bounds, run.layout, first=first)


def _report(run: Run, *, wait: bool) -> None:
    """Write what has become known, one step late; stop at a loss or gradient that is not finite."""
    for record in run.meter.poll(wait=wait):
        run.log.write(record)
        run.console.step(record)
    bad = run.meter.not_finite
    if bad is not None:
        rows = run.rows_of[bad]
        shown = ", ".join(rows[:8]) + (f" and {len(rows) - 8} more" if len(rows) > 8 else "")
        kept = list_checkpoints(run.folder)
        last = f"the last good checkpoint is {kept[-1]}" if kept else "there is no checkpoint yet"
        raise UserError(
            f"step {bad}: the loss or its gradient is not finite (its update was skipped). Rows of that "
            f"step: {shown}; {last}. Lower learning_rate, or look at these rows"
        )
    for index in [i for i in run.rows_of if i < run.course.step - 1]:
        del run.rows_of[index]


def _evaluate(run: Run, step: int) -> bool:
    """Loss over the evaluation data, weighted by token; True if it is the best after step 0."""
    if run.data.eval is None:
        return False
    store, engine = run.data.eval, run.built.engine
    sums = EvalSums(run.layout.device)
    for batch in evaluation_batches(store, np.arange(len(store)), run.layout):
        output = engine.evaluate(batch)
        sums.add(output.loss_sum, output.correct, len(batch.trained_rows))
    record = sums.record(step)
    course = run.course
    better = step > 0 and (course.best_loss is None or record["eval_loss"] < course.best_loss)
    if better:
        course.best_loss, course.best_step = record["eval_loss"], step
        course.evaluations_without_gain = 0
    elif step > 0:
        course.evaluations_without_gain += 1
    run.log.write(record)
    run.console.evaluation(record, best=better)
    if 0 < step < course.total_steps:
        _samples(run, f"after step {step}")
    return better


def _out_of_patience(run: Run) -> bool:
    patience = run.config.early_stopping_patience
    if patience is None or run.course.evaluations_without_gain < patience:
        return False
    run.console.print(
        f"stopped early: {run.course.evaluations_without_gain} evaluations without a better loss"
    )
    return True


def _samples(run: Run, title: str) -> None:
    """Answer `sample_prompts` as the model stands now."""
    if not run.config.sample_prompts:
        return
    from fastsft.model.generate import generate

    built, answers = run.built, []
    for prompt in run.config.sample_prompts:
        text, stopped = generate(
            built.model, built.tokenizer, built.template, prompt, max_new_tokens=SAMPLE_TOKENS
        )
        answers.append((prompt, text if stopped else f"{text} [...]"))
    run.console.samples(title, answers)


def _save(run: Run) -> None:
    """A checkpoint of the state after the current step; older ones beyond the limit go."""
    course = run.course
    run.log.sync()
    save_checkpoint(
        run.folder,
        course.step,
        lambda folder: run.built.write(folder, masters=True),
        {
            "course": vars(course),
            "config": run.config.model_dump(),
            "data": data_mark(run.data),
        },
        {"optimizer": run.optimizer.state_dict(), "random": random_state()},
    )
    prune(run.folder, run.config.save_total_limit, course.best_step)


@contextmanager
def interruptions(console: RunConsole) -> Iterator[threading.Event]:
    """An event set by Ctrl-C or SIGTERM: the step is finished and a checkpoint written.

    A second Ctrl-C ends the run at once. Outside the main thread signals are left alone.
    """
    event = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield event
        return

    def ask(number: int, frame: Any) -> None:
        if event.is_set() and number == signal.SIGINT:
            raise KeyboardInterrupt
        event.set()
        console.print("interrupted: finishing this step and writing a checkpoint (again: leave at once)")

    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield event
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


# --- the end ------------------------------------------------------------------------------------


def finish(run: Run, interrupted: bool) -> Result:
    """Write the product, the summary and the plot; say what to type next."""
    course, config = run.course, run.config
    plot_loss(run.folder / "metrics.jsonl", run.folder / "loss.png", title=run.folder.name)
    if interrupted:
        run.log.close()
        command = f"fastsft train {run.folder / 'config.yaml'} resume={run.folder}"
        run.console.finish(
            f"interrupted after step {course.step} of {course.total_steps}; a checkpoint is written. "
            "To go on:",
            command,
        )
        return Result(run.folder, course.step, True, {})
    product = _product(run)
    _samples(run, "after training")
    summary = {
        "model": config.model,
        "method": config.method,
        "engine": run.built.engine.name,
        "steps": course.step,
        "total_steps": course.total_steps,
        "trained_tokens": course.trained_tokens,
        "total_tokens": course.total_tokens,
        "seconds": course.seconds,
        "best_eval_loss": course.best_loss,
        "best_step": course.best_step,
        "product": product.name,
    }
    write_summary(run.folder, summary)
    run.log.close()
    message = f"done: {product}"
    if course.best_step not in (None, course.step):
        message += f" (best evaluation: checkpoints/step-{course.best_step:06d})"
    run.console.finish(message, f"fastsft chat {run.folder}")
    return Result(run.folder, course.step, False, summary)


def _product(run: Run) -> Path:
    """adapter/ or model/: the last state, or with early stopping the best one."""
    best = run.course.best_step
    if run.config.early_stopping_patience and best not in (None, run.course.step):
        run.built.write_from(run.folder / "checkpoints" / f"step-{best:06d}", run.folder)
    else:
        run.built.write(run.folder, masters=False)
    return run.folder / run.built.product
