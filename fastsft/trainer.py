"""The story of a run: set-up in order, then the loop, with the step on one screen.

    config -> device -> folder -> set-up (run.py) -> step, step, step -> product

Every number that moves the weights is a function of the config and the step: the order of the examples, the
learning rate, dropout. What an interruption must carry over is therefore small: trained weights, the
optimizer's moments, the step, and the position in a stream.
"""

from __future__ import annotations

import math
import signal
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError

from fastsft.checkpoint import list_checkpoints, prune, random_state, save_checkpoint
from fastsft.config import Config, make_config
from fastsft.console import RunConsole, size
from fastsft.data.loader import (
    Ahead,
    Step,
    evaluation_batches,
    stored_steps,
    streamed_steps,
)
from fastsft.data.prepare import Streamed
from fastsft.device import check_device, grow_segments
from fastsft.disk import is_disk_full
from fastsft.errors import UserError
from fastsft.metrics import EvalSums, write_summary
from fastsft.model.compat import LossOutput
from fastsft.model.fast import FastEngine
from fastsft.optim import apply_update, learning_rate
from fastsft.plot import plot_loss
from fastsft.rehearsal import make_room, rehearse
from fastsft.rounding import RoundedOptimizer
from fastsft.run import Run, set_up
from fastsft.run_folder import claim_output_dir, resolve_resume

SAMPLE_TOKENS = 128  # an answer to a sample prompt is cut here


@dataclass(frozen=True)
class Result:
    """What a finished or interrupted run left."""

    output_dir: Path
    steps: int
    interrupted: bool
    summary: dict[str, Any]


def train(config: Config | dict[str, Any], *, config_path: str | None = None) -> Result:
    """Train as `config` says and return what was left. Raises UserError for what the user can mend."""
    config = make_config(config) if isinstance(config, dict) else config.model_copy(deep=True)
    stem = config.run_name or (Path(config_path).stem if config_path else "run")
    grow_segments()
    device = check_device()
    with RunConsole() as console, termination_as_interrupt(), _claimed(config, stem) as folder:
        checkpoint = resolve_resume(config.resume, folder, console.warn)
        run = set_up(config, folder, checkpoint, console, device, stem)
        with interruptions(console) as stop, _told_out_of_memory(run):
            if device.type == "cuda":
                _rehearse(run)
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


def _rehearse(run: Run) -> None:
    """The worst micro-batches before step 1, so that memory cannot run out at hour three."""
    with run.console.task("trying the worst micro-batches"):
        peak = rehearse(run)
    expected = run.built.predicted_memory
    run.console.print(
        f"memory: {size(peak)} at their peak, {size(expected)} predicted with CUDA's own"
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
        for step in _or_saved(run, steps):
            _step(run, step)
            _say_misses(run)
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
    rate = learning_rate(step.index - 1, course.total_steps, course.warmup_steps, run.config)
    with _updates_in_backward(run, step, rate):
        while (sums := _accumulate(run, step)) is None:
            pass  # under a cheaper plan, from the first micro-batch
    for batch, output in zip(step.batches, sums, strict=True):
        run.meter.add(output.loss_sum, output.correct, len(batch.trained_rows), batch.tokens)
    update = apply_update(run.optimizer, rate, run.config.max_grad_norm)
    logged = step.index in (1, course.total_steps) or step.index % run.config.logging_steps == 0
    run.meter.end_step(step.index, step.epoch, rate, update, log=logged)
    course.step, course.cursor = step.index, step.cursor
    course.trained_tokens += step.trained
    course.total_tokens += step.tokens
    course.seconds += time.perf_counter() - started
    run.rows_of[step.index] = step.rows


def _say_misses(run: Run) -> None:
    """Once, after the first step on a GPU: kernels that were not there and had a launch wait for them."""
    if run.misses is None:
        return
    run.misses.close()
    names = run.misses.names
    which = f": {', '.join(dict.fromkeys(names))}" if names else ""
    run.console.print(f"{len(names)} kernels compiled at a launch of the first step{which}")
    run.misses = None


def _accumulate(run: Run, step: Step) -> list[LossOutput] | None:
    """The step's gradient and its micro-batches' sums; None where memory ran out and there is a way on."""
    sums = []
    try:
        for batch in step.batches:
            output = run.built.engine.loss(batch, step=step.index)
            (output.loss_sum / batch.step_trained).backward()
            sums.append(LossOutput(output.loss_sum.detach(), output.correct))
        return sums
    except torch.OutOfMemoryError as error:
        failure = error.with_traceback(None)  # which holds the tensors of the attempt
    if run.config.update_in_backward:
        raise failure  # some weights have moved already: the step cannot be taken again
    make_room(run, f"step {step.index}", failure)
    return None


@contextmanager
def _updates_in_backward(run: Run, step: Step, rate: float) -> Iterator[None]:
    """With `update_in_backward` each block's weights move as soon as their gradient is whole."""
    if not run.config.update_in_backward:
        yield
        return
    if len(step.batches) > 1:
        raise UserError(
            f"update_in_backward: step {step.index} has {len(step.batches)} micro-batches, and a gradient is "
            "whole only after the last; lower batch_size, or raise micro_batch_tokens"
        )
    engine, optimizer = run.built.engine, run.optimizer
    assert isinstance(engine, FastEngine) and isinstance(optimizer, RoundedOptimizer)
    engine.after_block = partial(optimizer.update_early, rate=rate)
    try:
        yield
    finally:
        engine.after_block = None


def _steps(run: Run) -> Iterator[Step]:
    first = run.course.step + 1
    if isinstance(run.data, Streamed):
        assert run.config.batch_size is not None
        return streamed_steps(
            run.data.stream, run.config.batch_size, run.course.total_steps, run.layout, first=first
        )
    assert run.order is not None and run.bounds is not None
    return stored_steps(run.data.train, run.order, run.bounds, run.layout, first=first)


def _or_saved(run: Run, steps: Iterable[Step]) -> Iterator[Step]:
    """The steps; a row that ends a stream does not take what was learned before it along."""
    try:
        yield from steps
    except UserError as error:
        if run.course.step == 0:
            raise
        _report(run, wait=True)
        _save(run)
        product = run.built.product
        newest = list_checkpoints(run.folder)[-1] / product
        raise UserError(
            f"{error}\nWhat was learned until then is in {newest}. Mended data is other data, so start a "
            f"new run from there: {product}={newest}"
        ) from error


def _report(run: Run, *, wait: bool) -> None:
    """Write what has become known, one step late; stop at a loss or gradient that is not finite."""
    for record in run.meter.poll(wait=wait):
        run.log.write(record)
        run.console.step(record)
    bad = run.meter.not_finite
    if bad is not None:
        rows = run.rows_of[bad]
        shown = ", ".join(rows[:8]) + (f" and {len(rows) - 8} more" if len(rows) > 8 else "")
        raise UserError(
            f"step {bad}: the loss or its gradient is not finite (its update was skipped). Rows of that "
            f"step: {shown}; {_last_good(run)}. Lower learning_rate in a new run, or look at these rows"
        )
    for index in [i for i in run.rows_of if i < run.course.step - 1]:
        del run.rows_of[index]


def _last_good(run: Run) -> str:
    kept = list_checkpoints(run.folder)
    return f"the last good checkpoint is {kept[-1]}" if kept else "there is no checkpoint yet"


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
    if not math.isfinite(record["eval_loss"]):
        raise UserError(
            f"the evaluation loss after step {step} is not finite; {_last_good(run)}. Lower learning_rate in "
            "a new run, or look at the evaluation data"
        )
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
            "data": run.data.digest,
            "window": run.meter.state(),
        },
        {"optimizer": run.optimizer.state_dict(), "random": random_state()},
    )
    prune(run.folder, run.config.save_total_limit, course.best_step)


@contextmanager
def _told_out_of_memory(run: Run) -> Iterator[None]:
    """The card's memory ran out: which keys move it."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        built = run.built
        raise UserError(
            f"the GPU ran out of memory in step {run.course.step + 1}, with micro-batches of up to "
            f"{built.micro_batch_tokens:,} tokens; {_last_good(run)}. Set micro_batch_tokens lower (the "
            "longest row is the least), activations: recompute_block, or max_length lower"
        ) from error


@contextmanager
def termination_as_interrupt() -> Iterator[None]:
    """SIGTERM outside the loop ends the run as Ctrl-C does, so that everything is tidied up."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(number: int, frame: Any) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


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
        console.print(
            "interrupted: finishing this step and writing a checkpoint (again: leave at once)"
        )

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
    _tell_stream(run)
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


def _tell_stream(run: Run) -> None:
    """A stream's rows are counted as they come; what became of all of them is said at the end."""
    if not isinstance(run.data, Streamed):
        return
    report = run.data.report
    report.sources, report.partial = run.data.stream.reports, "streaming: rows read so far"
    report.write(run.folder / "data_report.json")
    for source in report.sources:
        if source.dropped:
            run.console.print(f"{source.label}: {source.rows:,} rows read, {source.reasons()}")


def _product(run: Run) -> Path:
    """adapter/ or model/: the last state, or with early stopping the best one."""
    best = run.course.best_step
    if run.config.early_stopping_patience and best not in (None, run.course.step):
        run.built.write_from(run.folder / "checkpoints" / f"step-{best:06d}", run.folder)
    else:
        run.built.write(run.folder, masters=False)
    return run.folder / run.built.product
