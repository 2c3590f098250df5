"""What is measured inside a training process, the same for every trainer.

A trainer calls `begin` before its first step and `step` after each; that is all it does for the
measurement. Steps come in three stretches: warm (compiling, filling caches), timed, profiled.
Nothing waits for the device within a stretch; marks are CUDA events, read at the end. Timed steps
run without the profiler, which slows the host: the profiled ones behind them only count kernels and
add up the time the device worked, and the busy share is that time over the median of the timed
steps. (A busy time longer than the step would say that kernels overlap; the union of their
intervals is taken, so it cannot.)

On a CPU a second is one of processor time, all threads added up: what else the machine does then
leaves the figures alone.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import torch

from bench.train.job import Job

DEVICE_WORK = ("kernel", "gpu_memcpy", "gpu_memset")


class Clock:
    """Marks of one run; `result` is what goes into its row."""

    def __init__(self, job: Job) -> None:
        self.job, self.done = job, 0
        self.on_gpu = torch.cuda.is_available()
        self.first = 0.0
        self.marks: list[Any] = []
        self.profile: Any = None
        self.device: dict[str, float] = {}
        self.peaks: dict[str, int] = {}

    def begin(self) -> None:
        """Before the first step: from here on memory is that of training."""
        if self.on_gpu:
            self.peaks["peak_loading_bytes"] = torch.cuda.max_memory_reserved()
            torch.cuda.reset_peak_memory_stats()

    def step(self) -> None:
        """After an optimizer step."""
        self.done += 1
        warm, timed = self.job.warm, self.job.timed
        if self.done == 1:
            self._wait()
            self.first = time.time() - self.job.began
        if self.done == warm:
            self._wait()
        if warm <= self.done <= warm + timed:
            self.marks.append(self._mark())
        if self.done == warm + timed:
            self._wait()
            self._read_peaks()
            self._start_profile()
        if self.done == self.job.steps and self.profile is not None:
            self._wait()
            self._stop_profile()

    def _wait(self) -> None:
        if self.on_gpu:
            torch.cuda.synchronize()

    def _mark(self) -> Any:
        if not self.on_gpu:
            return time.process_time()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _read_peaks(self) -> None:
        if self.on_gpu:
            self.peaks["peak_allocated_bytes"] = torch.cuda.max_memory_allocated()
            self.peaks["peak_reserved_bytes"] = torch.cuda.max_memory_reserved()

    def _start_profile(self) -> None:
        if self.on_gpu and self.job.profiled:
            self.profile = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA])
            self.profile.start()

    def _stop_profile(self) -> None:
        self.profile.stop()
        trace = Path(self.job.out) / "trace.json"
        self.profile.export_chrome_trace(str(trace))
        self.device = read_trace(json.loads(trace.read_text()), self.job.profiled)
        trace.unlink()

    def seconds(self) -> list[float]:
        """Of each timed step, from the end of the one before it."""
        pairs = list(zip(self.marks, self.marks[1:], strict=False))
        if self.on_gpu:
            return [a.elapsed_time(b) / 1000 for a, b in pairs]
        return [b - a for a, b in pairs]

    def result(self) -> dict[str, Any]:
        assert self.done == self.job.steps, f"{self.done} of {self.job.steps} steps were taken"
        return {
            "first_step_seconds": self.first,
            "step_seconds": self.seconds(),
            "clock": "device" if self.on_gpu else "processor",
            **self.peaks,
            **self.device,
        }


def read_trace(trace: dict[str, Any], steps: int) -> dict[str, float]:
    """Per step: kernels on the device, launches by the host, seconds in which the device worked."""
    events = [e for e in trace["traceEvents"] if e.get("ph") == "X"]
    work = sorted((e["ts"], e["ts"] + e["dur"]) for e in events if e.get("cat") in DEVICE_WORK)
    kernels = sum(e.get("cat") == "kernel" for e in events)
    calls = [e["name"] for e in events if e.get("cat") in ("cuda_runtime", "cuda_driver")]
    launches = sum("LaunchKernel" in name or "GraphLaunch" in name for name in calls)
    busy, until = 0.0, float("-inf")
    for start, end in work:
        busy += max(0.0, end - max(start, until))
        until = max(until, end)
    return {
        "kernels_a_step": kernels / steps,
        "launches_a_step": launches / steps,
        "device_seconds_a_step": busy / 1e6 / steps,
    }
