"""What a run measures: sums kept on the device, read one step late, written once per step.

A micro-batch adds its loss sum and its count of correct tokens to device scalars. At the end of a
step five numbers start their copy to pinned host memory and are looked at when the following step
has been queued, so that the host never waits for the step it has just launched and is never more
than one step ahead. Times are CUDA events on a GPU and the clock on a CPU; evaluation and saving
are taken out of them.

A logged object covers the window since the one before it: `loss` and `token_accuracy` are means
over the window's trained tokens, `trained_tokens` and `total_tokens` its sums (padding is never
counted), `tokens_per_second` is total_tokens over time, `step_seconds` a mean, `grad_norm` and `lr`
those of its last step. Numbers that are not finite become null: NaN is no JSON.
"""

import json
import math
import os
import resource
import sys
import time
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from fastsft.optim import Update

# Dense bf16 tensor-core TFLOP/s with fp32 accumulation, from the vendor's data sheets; the first
# entry whose name occurs in the device's name counts, so longer names stand first.
PEAK_TFLOPS = (
    ("GB200", 2500.0),
    ("B200", 2250.0),
    ("H200 NVL", 835.0),
    ("H200", 989.0),
    ("GH200", 989.0),
    ("H100 PCIe", 756.0),
    ("H100 NVL", 835.0),
    ("H100", 989.0),
    ("A100", 312.0),
    ("A800", 312.0),
    ("RTX 6000 Ada", 364.0),
    ("L40S", 362.0),
    ("L40", 181.0),
    ("L4", 121.0),
    ("A10G", 70.0),
    ("A10", 125.0),
    ("A6000", 154.8),
    ("RTX 5090", 209.5),
    ("RTX 4090", 165.2),
    ("RTX 3090", 71.0),
)


def device_peak_flops(device: torch.device) -> float | None:
    """Peak dense bf16 FLOP/s by the data sheet, or None for a CPU or a card not in the table."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak * 1e12 for part, peak in PEAK_TFLOPS if part in name), None)


def flops_per_token(frozen: int, trained: int) -> float:
    """Model FLOPs per token: 2 forward and 2 backward per weight, 2 more where its gradient is due.

    Counts are of weights in matrix products (the head, not the embedding). Attention and whatever
    is recomputed are left out, so an `mfu` made from this is on the low side.
    """
    return 4.0 * frozen + 6.0 * trained


def peak_memory_bytes(device: torch.device) -> int:
    """Peak bytes torch allocated on the GPU; on a CPU the peak resident size of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


class _Clock:
    """Marks and the seconds between them, without waiting for the device when a mark is set."""

    def __init__(self, device: torch.device) -> None:
        self.cuda = device.type == "cuda"

    def mark(self) -> Any:
        if not self.cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def wait(self, mark: Any) -> None:
        if self.cuda:
            mark.synchronize()

    def seconds(self, start: Any, end: Any) -> float:
        return start.elapsed_time(end) / 1e3 if self.cuda else end - start


@dataclass
class _Step:
    """A step whose numbers are on their way to the host."""

    step: int
    epoch: float
    lr: float
    trained: int
    total: int
    log: bool
    numbers: Tensor  # float64 [4]: loss sum, correct, gradient norm, skipped
    start: Any
    end: Any


@dataclass
class _Window:
    steps: int = 0
    loss_sum: float = 0.0
    correct: float = 0.0
    trained: int = 0
    total: int = 0
    seconds: float = 0.0


@dataclass
class Meter:
    """Adds up one run. Call `start`, then per step: `add` per micro-batch, `end_step`, `poll`."""

    device: torch.device
    flops_per_token: float | None = None
    not_finite: int | None = None  # the first step whose loss or gradient norm was not finite
    _queue: deque[_Step] = field(default_factory=deque)
    _window: _Window = field(default_factory=_Window)

    def __post_init__(self) -> None:
        self._clock = _Clock(self.device)
        self._peak = device_peak_flops(self.device)
        self._sums = torch.zeros(2, dtype=torch.float64, device=self.device)
        self._trained = self._total = 0
        self._mark: Any = None

    def start(self) -> None:
        """The next step's time counts from here."""
        self._mark = self._clock.mark()

    def state(self) -> dict[str, Any]:
        """The window under way as JSON, for a checkpoint; only after `poll(wait=True)`."""
        assert not self._queue, "poll(wait=True) first"
        return asdict(self._window)

    def restore(self, state: dict[str, Any]) -> None:
        """Go on with a window that `state` gave."""
        self._window = _Window(**state)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Take what happens inside (evaluation, saving, samples) out of the step times."""
        yield
        self.start()

    def add(self, loss_sum: Tensor, correct: Tensor, trained: int, total: int) -> None:
        """One micro-batch: summed loss and correct count (device scalars), its token counts."""
        self._sums += torch.stack([loss_sum.detach().double(), correct.detach().double()])
        self._trained += trained
        self._total += total

    def end_step(self, step: int, epoch: float, lr: float, update: Update, *, log: bool) -> None:
        """Close step `step` (counted from 1); with `log` a record is due for the window."""
        assert self._mark is not None, "start() first"
        gradient = torch.stack([update.norm.double(), update.skipped.double()])
        numbers = torch.cat([self._sums, gradient.to(self._sums.device)])
        if self._clock.cuda:
            host = torch.empty(4, dtype=torch.float64, pin_memory=True)
            numbers = host.copy_(numbers, non_blocking=True)
        end = self._clock.mark()
        self._queue.append(
            _Step(step, epoch, lr, self._trained, self._total, log, numbers, self._mark, end)
        )
        self._mark = end
        self._sums = torch.zeros_like(self._sums)
        self._trained = self._total = 0

    def poll(self, *, wait: bool = False) -> list[dict[str, Any]]:
        """Records that became due, up to the step before the last; with `wait` the last one too.

        Call with `wait=True` before a checkpoint is written and at the end: a resume keeps the
        lines up to its step, so they must have been written by then. Sets `not_finite`.
        """
        records = []
        while len(self._queue) > (0 if wait else 1):
            record = self._read(self._queue.popleft())
            if record is not None:
                records.append(record)
        return records

    def _read(self, step: _Step) -> dict[str, Any] | None:
        self._clock.wait(step.end)
        loss_sum, correct, norm, skipped = step.numbers.tolist()
        if self.not_finite is None and (skipped or not math.isfinite(loss_sum)):
            self.not_finite = step.step
        window = self._window
        window.steps += 1
        window.loss_sum += loss_sum
        window.correct += correct
        window.trained += step.trained
        window.total += step.total
        window.seconds += self._clock.seconds(step.start, step.end)
        if not step.log:
            return None
        self._window = _Window()
        speed = window.total / window.seconds if window.seconds > 0 else None
        mfu = None
        if speed and self._peak and self.flops_per_token:
            mfu = speed * self.flops_per_token / self._peak
        trained = max(1, window.trained)
        return {
            "step": step.step,
            "epoch": step.epoch,
            "loss": window.loss_sum / trained,
            "lr": step.lr,
            "grad_norm": norm,
            "trained_tokens": window.trained,
            "total_tokens": window.total,
            "tokens_per_second": speed,
            "step_seconds": window.seconds / window.steps,
            "peak_memory_bytes": peak_memory_bytes(self.device),
            "mfu": mfu,
            "token_accuracy": window.correct / trained,
        }


class EvalSums:
    """Token-weighted evaluation: sums over micro-batches, one read at the end, no logits kept."""

    def __init__(self, device: torch.device) -> None:
        self._sums = torch.zeros(2, dtype=torch.float64, device=device)
        self._tokens = 0

    def add(self, loss_sum: Tensor, correct: Tensor, trained: int) -> None:
        self._sums += torch.stack([loss_sum.detach().double(), correct.detach().double()])
        self._tokens += trained

    def record(self, step: int) -> dict[str, Any]:
        """The evaluation object of metrics.jsonl; waits for the device."""
        assert self._tokens, "an evaluation without trained tokens"
        loss_sum, correct = self._sums.tolist()
        loss = loss_sum / self._tokens
        return {
            "step": step,
            "eval_loss": loss,
            "eval_tokens": self._tokens,
            "eval_perplexity": math.exp(loss) if loss < 700 else math.inf,
            "eval_token_accuracy": correct / self._tokens,
        }


class Reporter(Protocol):
    """Where records go besides metrics.jsonl."""

    def log(self, record: dict[str, Any]) -> None: ...

    def close(self) -> None: ...


class MetricsLog:
    """metrics.jsonl: one object per logged step, flushed; each step once, also after a resume.

    resume_step: the step of the checkpoint a run goes on from. Lines behind it belong to a course
    that is run again; they and a line torn by a kill are dropped. None begins an empty file.
    A second record of a kind (training, evaluation) for the same step is not written.
    """

    def __init__(
        self, path: Path, resume_step: int | None = None, reporters: Iterable[Reporter] = ()
    ) -> None:
        kept = [r for r in read_metrics(path) if r["step"] <= (resume_step or 0)]
        if resume_step is None:
            kept = []
        _replace(path, "".join(_line(record) for record in kept))
        self._seen = {_kind(record) for record in kept}
        self._file = open(path, "a", encoding="utf-8")  # noqa: SIM115 - open for the whole run
        self._reporters = list(reporters)

    def write(self, record: dict[str, Any]) -> None:
        """Append one record, and pass it to the reporters."""
        if _kind(record) in self._seen:
            return
        self._seen.add(_kind(record))
        self._file.write(_line(record))
        self._file.flush()
        for reporter in self._reporters:
            reporter.log(record)

    def sync(self) -> None:
        """Force the lines to the disk; before a checkpoint, so that it never runs ahead of them."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()
        for reporter in self._reporters:
            reporter.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The records of a metrics.jsonl in order; [] without a file; a torn line is left out."""
    if not path.exists():
        return []
    records = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            continue
        if isinstance(record, dict) and "step" in record:
            records.append(record)
    return records


def write_summary(run_dir: Path, summary: dict[str, Any]) -> None:
    """summary.json, replaced in one rename."""
    _replace(run_dir / "summary.json", json.dumps(_finite(summary), indent=2) + "\n")


def _kind(record: dict[str, Any]) -> tuple[int, bool]:
    return record["step"], "eval_loss" in record


def _line(record: dict[str, Any]) -> str:
    return json.dumps(_finite(record), allow_nan=False) + "\n"


def _finite(record: dict[str, Any]) -> dict[str, Any]:
    return {
        key: None if isinstance(value, float) and not math.isfinite(value) else value
        for key, value in record.items()
    }


def _replace(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.new")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)
