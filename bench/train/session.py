"""What end-to-end benchmarks share: ledger, time left, models made once, rows written once."""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from bench import ledger, rows
from bench.ledger import Ledger
from bench.train import child, models
from bench.train import job as jobs
from bench.train.job import Job
from bench.train.workloads import TINY, WORKLOADS, Rows, documentation, generate, vocabulary_of

LEAST = 10.0  # seconds: with less than that left nothing more is begun
LONGEST = 300.0  # seconds a process may take


class TimeIsUp(Exception):
    """The command's limit is reached; what is missing is done by the same command again."""


@dataclass
class Session:
    """One command. `work` holds checkpoints and what processes leave."""

    book: Ledger
    work: Path
    quick: bool
    ends: float
    seed: int = 0

    def left(self, most: float = LONGEST) -> float:
        """Seconds a process may take. Raises TimeIsUp where that is too few to begin."""
        seconds = min(most, self.ends - time.monotonic())
        if seconds < LEAST:
            raise TimeIsUp
        return seconds

    def model(self, name: str, longest: int = 0) -> Path:
        """The folder of a model's checkpoint, made on the device unless it is there."""
        folder = models.folder_of(name, self.work, self.seed, longest)
        if not models.is_there(folder):
            job = Job(
                "model",
                model=name,
                rows=str(self.work),
                out=self.out("model"),
                longest=longest,
                seed=self.seed,
            )
            self._help(job)
        return folder

    def rates(self) -> dict[str, Any]:
        """The card's rates, measured by this command or the one it goes on from."""
        key = {"kind": "rates"}
        if not self.book.find(**key):
            self.book.add(key | self._help(Job("rates", out=self.out("rates"))))
        return self.book.find(**key) or {}

    def _help(self, job: Job) -> dict[str, Any]:
        """What is no trainer's work: on a GPU in a process of its own, whose memory is free afterwards."""
        found = jobs.run(job, self.left()) if self.book.on_gpu else child.prepare(job)
        if "error" in found:
            raise SystemExit(f"{job.task} {job.model}: {found['error']}")
        return found

    def rows(self, kind: str, model: Path, count: int, longest: int = 0) -> tuple[Path, Rows]:
        """A file of `count` rows for a model, and the rows; longest: cut them there."""
        if kind == "text":
            found = documentation(model, count, longest or 512, self.seed)
        else:
            shape = (WORKLOADS if self.book.on_gpu else TINY)[kind]
            found = generate(shape, count, vocabulary_of(model), self.seed)
        path = self.work / f"rows-{kind}-{count}-{self.seed}.npz"
        found.save(path)
        return path, found

    def run(self, job: Job, most: float = LONGEST) -> dict[str, Any]:
        """A job's outcome. A peer whose activations do not fit runs once more, with checkpointing."""
        found = self._run(job, most)
        ours = jobs.TRAINERS[job.who][0] == "ours"
        if jobs.OUT_OF_MEMORY in found.get("error", "").lower() and not ours:
            found = self._run(replace(job, checkpointing=True), most)
        return found

    def _run(self, job: Job, most: float) -> dict[str, Any]:
        limit = self.left(most)
        found = jobs.run(job, limit)
        self.cut_off(found, limit < most)
        return found

    def cut_off(self, found: dict[str, Any], early: bool) -> None:
        """Raises TimeIsUp where a process was ended by the command's limit: that is no result of its own."""
        if early and found.get("error", "").startswith(jobs.NO_END):
            raise TimeIsUp

    def out(self, *parts: str) -> str:
        """A folder for a process."""
        return str(self.work / "out" / "-".join(parts).replace(" ", "-"))


def arguments(doc: str) -> argparse.ArgumentParser:
    """The options every command has."""
    parser = argparse.ArgumentParser(description=doc.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="few steps; writes only into --out")
    parser.add_argument("--limit", type=float, help="seconds it may take: 540, or 170 if quick")
    parser.add_argument("--out", type=Path, help="a folder for the rows")
    parser.add_argument("--work", type=Path, help="a folder for checkpoints, kept")
    parser.add_argument("--seed", type=int, default=0, help="of weights and rows")
    return parser


def names(given: str, default: tuple[str, ...], known: tuple[str, ...]) -> list[str]:
    """A comma-separated option; ends the command where a name is not known."""
    chosen = given.split(",") if given else list(default)
    unknown = [name for name in chosen if name not in known]
    if unknown:
        raise SystemExit(f"unknown: {', '.join(unknown)}; there are {', '.join(known)}")
    return chosen


@contextmanager
def opened(given: argparse.Namespace, name: str, key: tuple[str, ...]) -> Iterator[Session]:
    """A session from a command's options. When its time is up it says so and ends without an error."""
    limit = given.limit or (170 if given.quick else 540)
    with tempfile.TemporaryDirectory() as folder:
        out = given.out or (Path(folder) if given.quick else ledger.RESULTS)
        book = ledger.opened(out, name, key, rows.TRAINING)
        work = (given.work or Path(folder)).resolve()
        work.mkdir(parents=True, exist_ok=True)
        try:
            yield Session(book, work, given.quick, time.monotonic() + limit, given.seed)
        except TimeIsUp:
            print(f"{limit:.0f} s are over; the same command goes on from here", flush=True)
