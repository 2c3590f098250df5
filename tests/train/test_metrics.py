"""Sums against plain arithmetic, lines against kills and resumes, reporters against their readers."""

import json
import math
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fastsft.config import Config, DataSource
from fastsft.errors import UserError
from fastsft.metrics import (
    EvalSums,
    Meter,
    MetricsLog,
    flops_per_token,
    peak_memory_bytes,
    read_metrics,
    write_summary,
)
from fastsft.optim import Update
from fastsft.reporters import open_reporters

CPU = torch.device("cpu")
KEYS = {
    "step", "epoch", "loss", "lr", "grad_norm", "trained_tokens", "total_tokens",
    "tokens_per_second", "step_seconds", "peak_memory_bytes", "mfu", "token_accuracy",
}  # fmt: skip


def update(norm: float = 1.0, skipped: float = 0.0) -> Update:
    return Update(torch.tensor(norm), torch.tensor(skipped))


def test_a_record_covers_its_window() -> None:
    meter = Meter(CPU)
    meter.start()
    records = []
    for step in range(1, 7):
        for part in range(2):  # micro-batches of unequal size
            trained = step + part
            loss, correct = torch.tensor(2.0 * trained * step), torch.tensor(part)
            meter.add(loss, correct, trained, 10)
        meter.end_step(step, step / 6, 0.1 * step, update(float(step)), log=step % 3 == 0)
        records += meter.poll()
        assert len(records) == (step - 1) // 3  # one step late, never in the step itself
    records += meter.poll(wait=True)
    assert [r["step"] for r in records] == [3, 6]
    first = records[0]
    assert set(first) == KEYS
    trained = 1 + 2 + 2 + 3 + 3 + 4
    assert (first["trained_tokens"], first["total_tokens"]) == (trained, 60)
    assert first["loss"] == pytest.approx(2 * (3 * 1 + 5 * 2 + 7 * 3) / trained)
    assert first["token_accuracy"] == pytest.approx(3 / trained)
    assert (first["grad_norm"], first["lr"], first["epoch"]) == (3.0, pytest.approx(0.3), 0.5)
    assert first["tokens_per_second"] == pytest.approx(60 / (3 * first["step_seconds"]))
    assert records[1]["total_tokens"] == 60 and records[1]["grad_norm"] == 6.0
    assert first["mfu"] is None and first["peak_memory_bytes"] > 10_000_000
    assert meter.not_finite is None


@pytest.mark.parametrize("bad", [update(math.nan, 1.0), None])
def test_the_first_step_that_is_not_finite_is_named(bad: Update | None) -> None:
    meter = Meter(CPU)
    meter.start()
    for step in (1, 2, 3):
        loss = math.inf if step == 2 and bad is None else 1.0
        meter.add(torch.tensor(loss), torch.tensor(0), 1, 1)
        meter.end_step(step, 0.0, 0.0, bad if bad and step == 2 else update(), log=False)
        meter.poll()
        assert meter.not_finite == (2 if step == 3 else None)


def test_pauses_are_not_step_time(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("fastsft.metrics.time.perf_counter", lambda: now[0])
    meter = Meter(CPU)
    meter.start()
    for step in (1, 2):
        now[0] += 0.5
        meter.add(torch.tensor(1.0), torch.tensor(1), 1, 100)
        meter.end_step(step, 0.0, 0.0, update(), log=step == 2)
        with meter.paused():
            now[0] += 60.0
    (record,) = meter.poll(wait=True)
    assert record["step_seconds"] == 0.5 and record["tokens_per_second"] == 200.0


def test_sums_do_not_lose_small_terms() -> None:
    meter = Meter(CPU)
    meter.start()
    for _ in range(1000):
        meter.add(torch.tensor(1e5 + 0.0078125), torch.tensor(2**24 + 1), 1, 1)
    meter.end_step(1, 0.0, 0.0, update(), log=True)
    (record,) = meter.poll(wait=True)
    assert record["loss"] == pytest.approx(1e5 + 0.0078125, rel=1e-12)
    assert record["token_accuracy"] == 2**24 + 1


def test_evaluation_is_weighted_by_token() -> None:
    sums = EvalSums(CPU)
    sums.add(torch.tensor(3.0), torch.tensor(1), 1)
    sums.add(torch.tensor(9.0), torch.tensor(4), 9)
    record = sums.record(40)
    assert record == {
        "step": 40,
        "eval_loss": pytest.approx(1.2),
        "eval_tokens": 10,
        "eval_perplexity": pytest.approx(math.exp(1.2)),
        "eval_token_accuracy": 0.5,
    }


def test_model_flops() -> None:
    assert flops_per_token(0, 7) == 42 and flops_per_token(10, 1) == 46
    assert peak_memory_bytes(CPU) < 1 << 40


def train_record(step: int, loss: float = 1.0) -> dict[str, Any]:
    return {"step": step, "loss": loss}


def eval_record(step: int) -> dict[str, Any]:
    return {"step": step, "eval_loss": 2.0}


def test_each_step_once_also_after_a_kill_and_a_resume(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    log = MetricsLog(path)
    for step in range(1, 6):
        log.write(train_record(step))
    log.write(eval_record(4))
    log.sync()
    lines = path.read_text()  # flushed without a close, as a kill leaves it
    log.close()
    path.write_text(lines + '{"step": 6, "lo')
    log = MetricsLog(path, resume_step=4)
    for step in range(4, 8):
        log.write(train_record(step, loss=5.0))
    log.write(eval_record(4))
    log.close()
    records = read_metrics(path)
    assert [r["step"] for r in records if "loss" in r] == [1, 2, 3, 4, 5, 6, 7]
    assert [r["loss"] for r in records if "loss" in r] == [1.0] * 4 + [5.0] * 3
    assert [r["step"] for r in records if "eval_loss" in r] == [4]
    assert path.read_text().endswith("}\n") and len(path.read_text().splitlines()) == 8


def test_a_fresh_start_begins_an_empty_file(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(json.dumps(train_record(1)) + "\n")
    MetricsLog(path).close()
    assert path.read_text() == ""


def test_what_is_not_finite_is_null(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path / "m.jsonl")
    log.write(train_record(1, math.nan))
    log.close()
    assert (tmp_path / "m.jsonl").read_text() == '{"step": 1, "loss": null}\n'
    write_summary(tmp_path, {"best": math.inf, "steps": 3})
    assert json.loads((tmp_path / "summary.json").read_text()) == {"best": None, "steps": 3}


def run_config(*report_to: Any) -> Config:
    data = [DataSource(path="d.jsonl")]
    return Config(model="m", data=data, report_to=list(report_to), run_name="first try")


def test_tensorboard_holds_each_step_once(tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    for resume, steps in ((None, (1, 2, 3)), (2, (3, 4))):
        reporters = open_reporters(run_config("tensorboard"), tmp_path, resume)
        log = MetricsLog(tmp_path / "metrics.jsonl", resume, reporters)
        for step in steps:
            log.write({**train_record(step, 10.0 * step + (resume or 0)), "mfu": None})
        log.write(eval_record(steps[-1]))
        log.close()
    events = accumulator.EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(e.step, e.value) for e in events.Scalars("train/loss")] == [
        (1, 10.0),
        (2, 20.0),
        (3, 32.0),
        (4, 42.0),
    ]
    assert [e.step for e in events.Scalars("eval/loss")] == [4]
    assert "train/mfu" not in events.Tags()["scalars"]


def test_wandb_gets_the_config_the_name_and_every_record(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[dict[str, Any]] = []
    logged: list[Any] = []

    def init(**arguments: Any) -> Any:
        started.append(arguments)
        return SimpleNamespace(
            id=arguments["id"] or "abc",
            log=lambda values, step: logged.append((step, values)),
            finish=lambda: logged.append("finished"),
        )

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init))
    for resume in (None, 1):
        (reporter,) = open_reporters(run_config("wandb"), tmp_path, resume)
        reporter.log({**train_record(2), "mfu": None})
        reporter.log(eval_record(2))
        reporter.close()
    assert started[0]["name"] == "first try" and started[0]["config"]["batch_size"] == 64
    assert [arguments["id"] for arguments in started] == [None, "abc"]
    assert logged[:3] == [(2, {"train/loss": 1.0}), (2, {"eval/loss": 2.0}), "finished"]


@pytest.mark.parametrize(
    ("name", "module"), [("wandb", "wandb"), ("tensorboard", "torch.utils.tensorboard")]
)
def test_a_missing_reporter_is_said_at_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, module: str
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(UserError, match=f"report_to: {name} .* pip install {name}"):
        open_reporters(run_config(name), tmp_path, None)
