"""What one process of a benchmark is to do, and how its parent runs it.

A trainer never shares a process with another: some replace parts of torch and transformers when
they are imported, allocators keep what they had, and a failure must cost one row and no more. The
job goes in as JSON on the command line, results come out as lines that begin with a mark (trainers
print much else), and what went wrong is read from the exit code and the last error on stderr.
"""

from __future__ import annotations

import dataclasses
import json
import os
import queue
import re
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
MARK = "@@result "
OUT_OF_MEMORY = "out of memory"
NO_END = "no end within"

# Who -> (module, options of that module). The order is the order of rows and bars.
TRAINERS: dict[str, tuple[str, dict[str, Any]]] = {
    "fastsft": ("ours", {}),
    "fastsft in 24 GB": ("ours", {"vram": "24GB"}),  # no room to keep 4-bit weights decoded
    "fastsft compat": ("ours", {"engine": "compat"}),
    "fastsft plain kernels": ("ours", {"backend": "reference"}),
    "unsloth": ("trl", {"unsloth": True}),
    "unsloth packed": ("trl", {"unsloth": True, "packing": True}),
    "trl": ("trl", {}),
    "trl packed": ("trl", {"packing": True}),
    "trl liger": ("trl", {"liger": True}),
    "trl liger packed": ("trl", {"liger": True, "packing": True}),
    "reference": ("plain", {}),
}
METHODS = ("lora", "qlora", "full")


@dataclass(frozen=True)
class Job:
    """One process. Paths are strings so that it is JSON as it stands.

    batch: examples of an optimizer step. peer_rows: rows a padded trainer takes at once.
    micro_tokens: tokens a packed one takes; 0: what fastsft's planner says, and peers' packs are of
    `longest`. budget: bytes of device memory a probe may use, 0 for all.
    """

    task: str  # train, probe, model, rates
    who: str = "fastsft"
    method: str = "lora"
    model: str = ""
    rows: str = ""
    out: str = ""
    batch: int = 8
    peer_rows: int = 8
    micro_tokens: int = 0
    longest: int = 1024
    rank: int = 16
    alpha: int = 32
    learning_rate: float = 2e-4
    seed: int = 0
    warm: int = 3
    timed: int = 10
    profiled: int = 2
    every_loss: bool = False
    checkpointing: bool = False
    budget: int = 0
    began: float = 0.0

    @property
    def steps(self) -> int:
        return self.warm + self.timed + self.profiled

    @property
    def options(self) -> dict[str, Any]:
        return TRAINERS[self.who][1]


def _start(job: Job) -> subprocess.Popen[str]:
    job = dataclasses.replace(job, began=time.time())
    work = Path(job.out)
    work.mkdir(parents=True, exist_ok=True)
    paths = [str(ROOT), str(ROOT / "kernels"), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    paths = [str(Path(p).resolve()) for p in paths if p]
    offline = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "WANDB_MODE": "disabled"}
    with (work / "stderr.txt").open("w") as errors:
        return subprocess.Popen(
            [sys.executable, "-m", "bench.train.child", json.dumps(dataclasses.asdict(job))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            cwd=work,  # some trainers leave files where they stand
            env=os.environ | offline | {"PYTHONPATH": os.pathsep.join(paths)},
            start_new_session=True,
        )


def run(job: Job, limit: float) -> dict[str, Any]:
    """What the process measured, or {"error": ..}: it failed, or took more than `limit` seconds."""
    child = _start(job)
    try:
        printed, _ = child.communicate(timeout=limit)
    except subprocess.TimeoutExpired:
        _kill(child)
        return {"error": f"{NO_END} {limit:.0f} s"}
    found = [line for line in printed.splitlines() if line.startswith(MARK)]
    if child.returncode or not found:
        return {"error": last_error(Path(job.out) / "stderr.txt", child.returncode)}
    return json.loads(found[-1].removeprefix(MARK))


def last_error(stderr: Path, code: int) -> str:
    """The exception a process ended with, in one line."""
    lines = [line.strip() for line in stderr.read_text(errors="replace").splitlines()]
    errors = [line for line in lines if re.match(r"[\w.]*(Error|Exception|Exit|Interrupt)\b", line)]
    told = next(reversed(errors or [line for line in lines if line]), "nothing on stderr")
    return f"{told[:240]} (exit code {code})"


def _kill(child: subprocess.Popen[str]) -> None:
    """The process and whatever it started: it leads a process group of its own."""
    os.killpg(child.pid, signal.SIGKILL)
    child.wait()


class Prober:
    """A process that holds a model and takes one optimizer step of whatever length it is asked for."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self._child: subprocess.Popen[str] | None = None
        self._lines: queue.Queue[str | None] = queue.Queue()

    def __enter__(self) -> Prober:
        return self

    def __exit__(self, *exc: object) -> None:
        self._stop()

    def _stop(self) -> None:
        if self._child is not None:
            _kill(self._child)
            self._child = None

    def _read(self, child: subprocess.Popen[str], lines: queue.Queue[str | None]) -> None:
        assert child.stdout is not None
        for line in child.stdout:
            if line.startswith(MARK):
                lines.put(line.removeprefix(MARK))
        lines.put(None)

    def ask(self, tokens: int, limit: float) -> dict[str, Any]:
        """{"fits": bool, ..} for one document of `tokens` tokens, or {"error": ..}.

        A process that died of too little memory says that it does not fit; the next question starts
        another.
        """
        if self._child is None:
            self._child, self._lines = _start(self.job), queue.Queue()
            reader = threading.Thread(
                target=self._read, args=(self._child, self._lines), daemon=True
            )
            reader.start()
        child = self._child
        assert child.stdin is not None
        try:
            child.stdin.write(f"{tokens}\n")
            child.stdin.flush()
            answer = self._lines.get(timeout=limit)
        except queue.Empty:
            self._stop()
            return {"error": f"{NO_END} {limit:.0f} s, a step of {tokens:,} tokens"}
        except BrokenPipeError:
            answer = None
        if answer is not None:
            return json.loads(answer)
        child.wait()
        self._child = None
        error = last_error(Path(self.job.out) / "stderr.txt", child.returncode)
        return {"fits": False} if OUT_OF_MEMORY in error.lower() else {"error": error}
