"""First contact with a card: what matters most, in order of worth, before a deadline.

    python -m bench.first --deadline SECONDS --out DIR [--quick] [--steps a,b]

    facts       versions, memory, locked memory, copy, products, transfers
    compile     every kernel of what follows, in parallel
    engine      the fast engine's checks (bench.engine) on the card
    kernels     each in its default configuration: right, then timed beside its peers
    duels       the configurations of the kernels that matter most
    model       8B LoRA and QLoRA with random weights, against goals and plan
    trainers    ours, Unsloth packed, TRL packed, through bench.train

An item is begun only where its seconds are left, and may take twice as many. Items run in a process
of their own, which ends where one of them breaks the device or does not end; what fails or is skipped
is a row. Rows are written as they come, and the same command goes on where it was: what is there is
not measured again. The last thing printed is a table of goal, measured and limit. Exit code 1 says
that nothing ran.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bench import engine, ledger, rows
from bench.first_steps import STEPS, Bench, Figures, Item, items_of
from bench.ledger import Ledger
from fastsft.device import grow_segments

KEY = ("kind", "step", "item", "what")
ALL: rows.Folders = (*rows.KERNELS, *rows.TRAINING[2:])
PATIENCE = 2.0  # times an item's own seconds, before it is ended
OPENING = 60.0  # seconds to start a process and the device
Row = dict[str, Any]
Add = Callable[[str, Row], None]
Perform = Callable[[Item, float, Add], str]  # (item, seconds, add) -> what went wrong, or ""


def books(out: Path) -> dict[str, Ledger]:
    """The ledgers rows go to; starts the device."""
    return {
        "first": ledger.opened(out, "first", KEY, ALL),
        "kernels": ledger.opened(out),
        "engine": ledger.opened(out, "engine", engine.KEY, rows.TRAINING),
    }


@dataclass
class Schedule:
    """The items against one deadline. clock: seconds, of which `ends` is the last."""

    books: dict[str, Ledger]
    perform: Perform
    clock: Callable[[], float]
    ends: float

    def run(self, items: Sequence[Item]) -> int:
        """Every item that has no row yet; returns how many have one that is no failure."""
        return sum(self._one(item) for item in items)

    def _one(self, item: Item) -> bool:
        first, key = self.books["first"], {"kind": "item", "step": item.step, "item": item.name}
        if first.find(**key):
            print(f"{item.step:9} {item.name}: is there", flush=True)
            return True
        began = self.clock()
        left = self.ends - began
        if item.needs_gpu and not first.on_gpu:
            problem = "not measured: no GPU"
        elif left < item.seconds:
            problem = f"skipped: {left:.0f} s left, {item.seconds:.0f} s needed"
        else:
            limit = min(left, PATIENCE * item.seconds)
            problem = self.perform(item, limit, lambda book, row: self.books[book].add(row))
        seconds = self.clock() - began
        first.add(key | {"what": None, "problem": problem, "seconds": seconds})
        print(f"{item.step:9} {item.name}: {problem or 'done'}, {seconds:.1f} s", flush=True)
        return not problem


# --- processes ---------------------------------------------------------------------------------------


class Worker:
    """A process that performs items, one after the other; another takes its place when it is lost."""

    def __init__(self, method: str, out: Path, quick: bool) -> None:
        self.out, self.quick = out, quick
        self.context: Any = multiprocessing.get_context(method)
        self.process: Any = None
        self.step = ""

    def start(self) -> None:
        self.pipe, theirs = self.context.Pipe()
        self.process = self.context.Process(target=_serve, args=(theirs, self.out, self.quick))
        self.process.start()
        theirs.close()

    def stop(self) -> None:
        """Ends the process and what it started: it leads a process group of its own."""
        if self.process is None:
            return
        try:
            os.killpg(self.process.pid, signal.SIGKILL)
        except ProcessLookupError:  # not a leader yet, or gone
            self.process.kill()
        self.process.join()
        self.pipe.close()
        self.process = None

    def ask(self, question: Any, limit: float, add: Add) -> Any:
        """The answer; rows that come before it are added. Raises TimeoutError, and EOFError where the
        process ended."""
        if self.process is None:
            self.start()
        self.pipe.send(question)
        until = time.monotonic() + limit
        while self.pipe.poll(max(0.0, until - time.monotonic())):
            kind, *what = self.pipe.recv()
            if kind == "answer":
                return what[0]
            add(*what)
        raise TimeoutError

    def perform(self, item: Item, limit: float, add: Add) -> str:
        """Runs an item. A step that wants the whole card to itself gets a new process."""
        if item.step != self.step or item.alone:
            self.stop()
        self.step = item.step
        try:
            problem, broken = self.ask((item.step, item.name, limit), limit, add)
        except TimeoutError:
            problem, broken = f"no end within {limit:.0f} s", True
        except (EOFError, OSError):
            self.process.join()
            problem, broken = f"its process ended, exit code {self.process.exitcode}", True
        if broken:
            self.stop()
        return problem


def _serve(pipe: Any, out: Path, quick: bool) -> None:
    """The process: a question is "open" or (step, name, seconds); rows go back as they are made."""
    os.setsid()
    grow_segments()  # as a run does
    opened = books(out)
    for book in opened.values():
        book.path = None  # the parent writes
    bench = Bench(opened, out, quick, lambda book, row: pipe.send(("row", book, row)))
    items = {(item.step, item.name): item for item in items_of(quick, bench.on_gpu)}
    late = compiled_late(bench)
    while True:
        question = pipe.recv()
        if question == "open":
            about = {name: (b.about, b.rows) for name, b in opened.items()}
            pipe.send(("answer", (bench.on_gpu, about)))
            continue
        step, name, seconds = question
        bench.ends = time.monotonic() + seconds
        problem = performed(items[step, name], bench)
        if late:
            said = f"{len(late)}: {', '.join(late)}"[:200]
            Figures(bench, step, name).add(f"{name}: compiled at a launch", "", said, goal="none")
            late.clear()
        pipe.send(("answer", (problem, _is_broken(bench))))


def performed(item: Item, bench: Bench) -> str:
    """Whatever an item raises is its row; the others go on."""
    try:
        return item.do(bench) or ""
    except Exception as error:
        return f"{type(error).__name__}: {error}".splitlines()[0][:300]


def compiled_late(bench: Bench) -> list[str]:
    """The names of kernels that this process compiles at a launch, added as it does: the compile step
    left them out."""
    if not bench.on_gpu:
        return []
    from fastsft_kernels.precompile import Misses

    return Misses().names


def _is_broken(bench: Bench) -> bool:
    if not bench.on_gpu:
        return False
    try:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
    except RuntimeError:
        return True
    return False


def opened_by(out: Path, quick: bool) -> tuple[Worker, dict[str, Ledger]]:
    """A worker, and the ledgers as it sees them: this process never starts the device, whose memory
    belongs to the items. Forks where the device allows it, since imports take seconds."""
    nothing: Add = lambda book, row: None  # noqa: E731
    for method in ("fork", "spawn"):
        worker = Worker(method, out, quick)
        try:
            on_gpu, found = worker.ask("open", OPENING, nothing)
        except (EOFError, OSError, TimeoutError) as error:
            print(f"{method}: the device was not reached: {type(error).__name__}", flush=True)
            worker.stop()
            continue
        device = torch.device("cuda" if on_gpu else "cpu")
        names, opened = {"first": KEY, "kernels": ledger.KEY, "engine": engine.KEY}, {}
        for name, (about, kept) in found.items():
            path = ledger.path_of(out, name, about)
            opened[name] = Ledger(device, path, about, kept, names[name])
        return worker, opened
    raise SystemExit("no process could open the device: nothing was measured")


# --- the table ---------------------------------------------------------------------------------------


def table(first: Ledger, items: Sequence[Item]) -> str:
    """Goal, measured, limit of every figure; of an item without one, what came of it."""
    lines = ["| | goal | measured | limit |", "|---|---|---|---|"]
    for item in items:
        mine = [r for r in first.rows if (r["step"], r["item"]) == (item.step, item.name)]
        for row in mine:
            if row["kind"] == "figure":
                cells = (_cell(row[k], row["unit"]) for k in ("goal", "measured", "limit"))
                lines.append(f"| {row['what']} | {' | '.join(cells)} |")
        outcome = [r["problem"] for r in mine if r["kind"] == "item"]
        if not outcome or outcome[0] or len(mine) == 1:
            said = outcome[0] or "done" if outcome else "not measured"
            lines.append(f"| {item.step}: {item.name} | - | {said.replace('|', '/')} | - |")
    return "\n".join(lines)


def _cell(value: Any, unit: str) -> str:
    if value is None:
        return "-"
    if isinstance(value, str):
        return value
    if unit == "%":
        return f"{value:.1%}"
    digits = 0 if abs(value) >= 1000 else 1 if abs(value) >= 10 else 3
    return f"{value:,.{digits}f} {unit}".strip()


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--deadline", type=float, required=True, help="seconds from now")
    parser.add_argument("--out", type=Path, required=True, help="a folder for the rows")
    parser.add_argument("--quick", action="store_true", help="tiny shapes, on a CPU too")
    parser.add_argument("--steps", default="", help=f"comma-separated, of {', '.join(STEPS)}")
    given = parser.parse_args(argv)
    unknown = set(filter(None, given.steps.split(","))) - set(STEPS)
    if unknown:
        parser.error(f"unknown: {', '.join(sorted(unknown))}; there are {', '.join(STEPS)}")
    ends = time.monotonic() + given.deadline
    # Without this torch starts the driver to learn whether there is one, and a fork could not.
    os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"
    out = given.out.resolve()
    worker, opened = opened_by(out, given.quick)
    try:
        items = items_of(given.quick, opened["first"].on_gpu)
        chosen = [i for i in items if not given.steps or i.step in given.steps.split(",")]
        ran = Schedule(opened, worker.perform, time.monotonic, ends).run(chosen)
    finally:
        worker.stop()
    print(table(opened["first"], chosen), flush=True)
    return 0 if ran else 1


if __name__ == "__main__":
    sys.exit(main())
