"""Whole runs on a model small enough for tests: a random Llama with a byte-level tokenizer, and its rows."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from small_run import CHATML, write_model

import fastsft
from fastsft import checkpoint, trainer
from fastsft.config import make_config
from fastsft.metrics import MetricsLog, read_metrics
from fastsft.model.build import Built, build
from fastsft.preparation import Intake, settle_date, take_in
from fastsft.trainer import Result

SEED_DATA = Path(__file__).parents[1] / "data" / "seed"
SMALL = {"hidden_size": 32, "intermediate_size": 48, "max_position_embeddings": 2048}
CLOCK = {
    "tokens_per_second",
    "step_seconds",
    "peak_memory_bytes",
    "mfu",
}  # differ between equal runs
WORDS = "hello there what is this world a line of tea and one more word for the road".split()


def write_rows(path: Path, count: int = 24) -> Path:
    """Rows of one question and one answer, of many lengths."""
    rows = [
        {
            "instruction": " ".join(WORDS[i % 7 : i % 7 + 1 + i % 3]),
            "output": " ".join(WORDS[(i * 5) % 11 : (i * 5) % 11 + 1 + i % 5]) + f" {i}",
        }
        for i in range(count)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def written(path: Path, *rows: dict[str, Any] | str) -> str:
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in rows))
    return str(path)


def turn(role: str, content: str, **more: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **more}


def small_model(folder: Path, **options: Any) -> Path:
    """The model in `folder`, written if it is not there."""
    if not (folder / "config.json").exists():
        write_model(folder, template=CHATML, **{**SMALL, **options})
    return folder


def settings(folder: Path, **keys: Any) -> dict[str, Any]:
    """A config as a mapping: model and rows in `folder`, three steps of LoRA, under `keys`."""
    values: dict[str, Any] = {
        "model": str(small_model(folder / "base")),
        "method": "lora",
        "batch_size": 4,
        "learning_rate": 0.01,
        "warmup_steps": 0,
        "date": "2026-01-31",
    }
    if not {"max_steps", "epochs"} & set(keys):
        values["max_steps"] = 3
    if "data" not in keys:
        rows = folder / "rows.jsonl"
        values["data"] = str(rows if rows.exists() else write_rows(rows))
    if keys.get("batch_tokens"):
        del values["batch_size"]
    return {**values, **keys}


def run(folder: Path, **keys: Any) -> Result:
    """Train in this process, in `folder` as the working directory, the token cache in it too."""
    before, cache = Path.cwd(), os.environ.get("FASTSFT_CACHE")
    os.chdir(folder)
    os.environ["FASTSFT_CACHE"] = str(folder / "cache")
    try:
        result = fastsft.train(settings(folder, **keys))
    finally:
        os.chdir(before)
        os.environ.pop("FASTSFT_CACHE")
        if cache is not None:
            os.environ["FASTSFT_CACHE"] = cache
    return Result(folder / result.output_dir, result.steps, result.interrupted, result.summary)


def taken(folder: Path, **keys: Any) -> Intake:
    return take_in(settle_date(make_config(settings(folder, **keys))))


def texts(folder: Path, **keys: Any) -> list[str]:
    """Each sequence of the training data as text, what is trained in ⟦ ⟧."""
    intake = taken(folder, **keys)
    store, decode = intake.data.train, intake.tokenizer.decode
    found = []
    for number in range(len(store.lengths)):
        ids, trained = store.sequence(number)
        text, inside = "", False
        for token, mark in zip(ids.tolist(), trained.tolist(), strict=True):
            text += ("⟦" if mark and not inside else "⟧" if inside and not mark else "") + decode(
                [token]
            )
            inside = mark
        found.append(text + ("⟧" if inside else ""))
    return found


def built(folder: Path, **keys: Any) -> Built:
    config = make_config(settings(folder, **keys))
    intake = take_in(settle_date(config))
    return build(
        intake.config, intake.tokenizer, intake.template, device=torch.device("cpu"), longest=64
    )


def lines(folder: Path) -> list[dict[str, Any]]:
    """A run's metrics without what the clock and the machine put into them."""
    records = read_metrics(folder / "metrics.jsonl")
    return [{k: v for k, v in record.items() if k not in CLOCK} for record in records]


def series(folder: Path, key: str = "loss") -> list[float]:
    """One training metric over the steps."""
    return [record[key] for record in lines(folder) if key in record]


def product(folder: Path) -> dict[str, torch.Tensor]:
    """The trained tensors that a run left."""
    for file in ("adapter/adapter_model.safetensors", "model/model.safetensors"):
        if (folder / file).exists():
            return load_file(folder / file)
    raise AssertionError(f"no product in {folder}")


def same(first: Any, second: Any) -> bool:
    """Whether two nested structures hold the same values, tensors bit for bit."""
    if isinstance(first, torch.Tensor):
        return torch.equal(first, second) and first.dtype == second.dtype
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(same(first[k], second[k]) for k in first)
    if isinstance(first, (list, tuple)):
        return len(first) == len(second) and all(map(same, first, second))
    return bool(first == second)


# --- in a process of their own ----------------------------------------------------------------------


def run_quietly(folder: Path, keys: dict[str, Any]) -> None:
    """A run whose output goes nowhere."""
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere):
        torch.set_num_threads(1)
        run(folder, **keys)


def killed_at(folder: Path, keys: dict[str, Any], moment: str, step: int) -> None:
    """A run that kills its own process, with SIGKILL, at the named moment of `step`.

    set-up: everything is loaded, no step taken. update: the weights have moved, nothing is written.
    metrics: half a line of metrics.jsonl. tensors: half of tensors.pt. state: every file but state.json.
    synced: whole, not yet renamed. named: renamed, the older ones not pruned. prune: renamed out of view,
    not deleted. product: after the last step and its checkpoint.
    """
    owner, name, when = MOMENTS[moment]
    before = getattr(owner, name)

    def until_then(*args: Any, **options: Any) -> Any:
        now = step if moment == "set-up" else when(*args)
        if now != step:
            return before(*args, **options)
        if moment in AFTER:
            before(*args, **options)
        TORN.get(moment, lambda *_: None)(*args)
        os.kill(os.getpid(), signal.SIGKILL)
        raise AssertionError("unreachable")

    setattr(owner, name, until_then)
    run_quietly(folder, keys)
    raise AssertionError(f"the run never came to {moment} of step {step}")


def _half_a_line(log: MetricsLog, record: dict[str, Any]) -> None:
    log._file.write(json.dumps(record)[:20])
    log._file.flush()


def _half_the_tensors(target: Path, state: dict[str, Any]) -> None:
    os.truncate(target / "tensors.pt", 100)


def _hidden(path: Path) -> int:
    """The step of a checkpoint that is being written, from its folder's name."""
    return int(path.name.rsplit("-", 1)[1])


def newest_step(folder: Path) -> int:
    return checkpoint.step_of(checkpoint.list_checkpoints(folder)[-1])


def _pruned(path: Path) -> int:
    """The newest step when a checkpoint that was pruned is deleted, else -1."""
    return newest_step(path.parents[1]) if "pruned" in path.name and path.exists() else -1


# Moment -> the function it is told by, and the step of a call.
MOMENTS: dict[str, tuple[Any, str, Callable[..., int]]] = {
    "set-up": (trainer, "loop", lambda *_: 0),
    "update": (trainer, "_step", lambda run_, step: step.index),
    "metrics": (MetricsLog, "write", lambda log, record: record["step"]),
    "tensors": (checkpoint, "_write_state", lambda folder, state: state["step"]),
    "state": (checkpoint, "_write_state", lambda folder, state: state["step"]),
    "synced": (checkpoint, "_sync_tree", _hidden),
    "named": (trainer, "prune", lambda folder, *_: newest_step(folder)),
    "prune": (checkpoint, "_remove", _pruned),
    "product": (trainer, "finish", lambda run_, _: run_.course.step),
}
AFTER = ("update", "synced")
TORN: dict[str, Callable[..., None]] = {"metrics": _half_a_line, "tensors": _half_the_tensors}
