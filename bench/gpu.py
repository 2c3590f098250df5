"""Every kernel checked, then measured against its limit and its peers: one command for a GPU.

    python -m bench.gpu [--ops a,b] [--quick | --defaults] [--search] [--limit SECONDS] [--out DIR]

Each case of `bench.kernels` is first checked in every pinned configuration and dtype (`bench.check`):
what is wrong is reported, not timed, and makes the exit code 1. Then the inputs of the record are
timed, ours and every peer that is installed, beside the card's own copy and matrix product measured
in the same run. Rows go to DIR/<card>/kernels.json, where DIR is bench/results on a GPU.

--search also times every configuration, and writes the fastest into the package's choices.json.
--defaults checks the default configurations alone, in the dtype of the record, and times them and the
peers; --quick does without the record's shape in the check, and without peers. --limit begins no case
after that time: cases come in order of worth, and the same command goes on where it ended.

On a machine without a GPU the same path runs on a CPU, where small inputs are timed and figures mean
nothing: through the reference, or through Triton's interpreter where TRITON_INTERPRET=1 is set.
"""

from __future__ import annotations

import argparse
import copy
import math
import os
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from fastsft_kernels.limits import Work

from bench import choices, ledger, limits, timing, worth
from bench.check import check, configurations_of, dtypes, running, tensors, values
from bench.kernels import find
from bench.kernels.case import Case
from bench.ledger import Ledger
from fastsft.device import grow_segments

if TYPE_CHECKING:
    from fastsft_kernels.precompile import Misses


class Inputs:
    """Copies of a case's inputs, together beyond the cache, and how to make them as they were."""

    def __init__(
        self, book: Ledger, case: Case, dtype: torch.dtype, overwritten: list[int]
    ) -> None:
        self.pristine = (case.record if book.on_gpu else case.small)(book.device, dtype)
        count = self._count(book.device) if book.on_gpu else 1
        self.sets = [copy.deepcopy(self.pristine) for _ in range(count)]
        self.overwritten = overwritten

    def _count(self, device: torch.device) -> int:
        """Three times the L2 cache, at most 16 and what a third of the free memory holds."""
        size = max(1, sum(t.nbytes for t in tensors(self.pristine)))
        cache = torch.cuda.get_device_properties(device).L2_cache_size
        room = torch.cuda.mem_get_info(device)[0] // 3 // size
        return max(1, min(16, room, max(2, -(-3 * cache // size))))

    def restore(self, everything: bool = False) -> None:
        """Copies the inputs that ours overwrites, or all, back from the pristine ones."""
        originals = values(self.pristine)
        which = range(len(originals)) if everything else self.overwritten
        with torch.no_grad():
            for given in self.sets if which else []:
                copies = values(given)
                for i in which:
                    copies[i].copy_(originals[i])


def time_case(
    book: Ledger, case: Case, dtype: torch.dtype, overwritten: list[int], given: argparse.Namespace
) -> None:
    """Adds a row for ours and each peer; with --search one for each configuration too."""
    try:
        inputs = Inputs(book, case, dtype, overwritten)
        work = case.work(*inputs.pristine)
    except Exception as error:  # out of memory, for one: it is this case's row
        book.add(_key(case, dtype, "time") | {"who": "fastsft", "error": _said(error)})
        return

    everyone = {"fastsft": _ours(case)} | ({} if given.quick else dict(case.peers))
    for who, factory in everyone.items():
        key = _key(case, dtype, "time") | {"who": who}
        if not book.find(**key):
            with running({}):
                book.add(key | _timed(book, inputs, factory, work, given.quick))
    if given.search:
        _search(book, case, dtype, inputs, work, given.quick)


def _search(
    book: Ledger, case: Case, dtype: torch.dtype, inputs: Inputs, work: Work, quick: bool
) -> None:
    """Adds a row for each configuration, where there is more than one."""
    try:
        every = configurations_of(book, case, dtype, "record" if book.on_gpu else "small")
    except Exception as error:  # it is this case's row
        book.add(_key(case, dtype, "search") | {"error": _said(error)})
        return
    for one in every if len(every) > 1 else []:
        key = _key(case, dtype, "search") | {"choice": one.label}
        if not book.find(**key):
            with running(one.choice):
                measured = _timed(book, inputs, _ours(case), work, quick)
            book.add(key | {"name": one.name, "candidate": one.candidate} | measured)


def _ours(case: Case) -> Callable[..., Callable[[], Any]]:
    return lambda *inputs: partial(case.run, *inputs)


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0][:200]


def _key(case: Case, dtype: torch.dtype, kind: str) -> dict[str, Any]:
    short = str(dtype).removeprefix("torch.")
    return {"kind": kind, "op": case.op, "case": case.label, "dtype": short}


def _timed(
    book: Ledger, inputs: Inputs, factory: Callable[..., Any], work: Work, quick: bool
) -> dict[str, Any]:
    try:
        inputs.restore(everything=True)
        calls = [factory(*given) for given in inputs.sets]
        restore = inputs.restore if inputs.overwritten else None
        found = timing.measure(calls, book.device, _budget(book, quick), restore)
        peak = timing.peak_bytes(calls[0], book.device)
    except Exception as error:  # a peer that is missing or fails is a row that says so
        return {"error": _said(error)}
    row = found._asdict() | {"peak_bytes": peak} | work._asdict()
    row["gb_per_s"] = (work.bytes + work.unhidden) / found.p50 / 1e9
    row["tflop_per_s"] = work.flops / found.p50 / 1e12
    rates = limits.rates_of(book.about["card"], book.rows)
    return row | ({"share_of_limit": limits.share(work, rates, found.p50)} if rates else {})


def _budget(book: Ledger, quick: bool) -> float:
    """Seconds for one timing."""
    return (0.05 if quick else 0.25) if book.on_gpu else 0.02


def precompile(cases: list[Case], quick: bool) -> Misses:
    """Fills Triton's cache from all cores: one after the other, first calls would take minutes."""
    from bench.precompile import compile_everything

    done = compile_everything(cases, quick=quick, checks=False, models=())
    for problem in done.problems:
        print(problem)
    print(f"compiled {done.compiled} kernels in {done.seconds:.0f} s", flush=True)
    return done.misses


def measure_card(book: Ledger, quick: bool) -> None:
    """What this card does today: the row all shares of the limit refer to."""
    size, side = (4 << 30, 8192) if book.on_gpu else (1 << 26, 512)
    dtype = torch.bfloat16 if book.on_gpu else torch.float32
    if not book.find(kind="rates"):
        bandwidth = timing.copy_bandwidth(book.device, size, _budget(book, quick))
        flops = timing.product_rate(book.device, side, dtype, _budget(book, quick))
        book.add({"kind": "rates", "bandwidth": bandwidth, "flops": flops})
        print(f"{book.about['card']}: {bandwidth / 1e12:.2f} TB/s, {flops / 1e12:.0f} TFLOP/s")


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ops", default="", help="comma-separated; all by default")
    depth = parser.add_mutually_exclusive_group()
    depth.add_argument("--quick", action="store_true", help="defaults alone, no peers")
    depth.add_argument("--defaults", action="store_true", help="defaults alone, and peers")
    parser.add_argument("--limit", type=float, default=math.inf, help="seconds it may take")
    parser.add_argument("--search", action="store_true", help="time every configuration")
    parser.add_argument("--out", type=Path, help="a folder for the rows")
    parser.add_argument("--seed", type=int, default=time.time_ns() % 2**32, help="of the inputs")
    parser.add_argument("--skip", action="append", default=[], help="a case, as 'op label'")
    parser.add_argument("--cases", default="", help="a module of cases instead of bench.kernels")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    given = arguments(argv)
    began = time.monotonic()
    ends = began + given.limit
    grow_segments()
    cases = worth.by_worth(find([o for o in given.ops.split(",") if o], given.cases))
    book = ledger.opened(given.out)
    book.about["seed"] = given.seed
    misses = precompile(cases, given.quick or given.defaults) if book.on_gpu else None
    measure_card(book, given.quick)
    failed = done = 0
    for case in cases:
        if time.monotonic() >= ends:
            print(f"{given.limit:.0f} s are over; the same command goes on from here")
            break
        done += 1
        if f"{case.op} {case.label}" in given.skip:
            book.add(_key(case, case.dtypes[0], "check") | {"problem": "ended the process"})
            failed += 1
            continue
        row = measure_case(book, case, given)
        failed += row is None or "error" in row
        print(f"{case.op} {case.label}: {_outcome(row)}", flush=True)
        if book.on_gpu:
            left = ["--limit", str(max(0.0, ends - time.monotonic()))]
            _go_on(case, [*(sys.argv[1:] if argv is None else argv), *left])
    if given.search and book.path and book.path.is_relative_to(ledger.RESULTS):
        choices.write()
    if misses is not None:
        print(f"{len(misses.names)} kernels compiled later, at a launch: {', '.join(misses.names)}")
    print(f"{done} of {len(cases)} cases in {time.monotonic() - began:.0f} s, {failed} failed")
    return 1 if failed else 0


def measure_case(book: Ledger, case: Case, given: argparse.Namespace) -> dict[str, Any] | None:
    """Checks a case, and times it where it is right; the row of its time, or None."""
    torch.manual_seed(given.seed)
    right, overwritten = check(book, case, given.quick, given.defaults)
    if not right:
        return None
    fewer = given.quick or given.defaults
    dtype = case.dtypes[0] if book.on_gpu else dtypes(book, case, fewer)[0]
    time_case(book, case, dtype, overwritten, given)
    return book.find(**_key(case, dtype, "time"), who="fastsft")


def _go_on(case: Case, argv: list[str]) -> None:
    """Frees memory; where a kernel has broken the device's context, starts afresh without it."""
    try:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
    except RuntimeError as error:
        print(f"{case.op} {case.label} ended the process: {error}", flush=True)
        again = [sys.executable, "-m", "bench.gpu", *argv, "--skip", f"{case.op} {case.label}"]
        os.execv(sys.executable, again)


def _outcome(row: dict[str, Any] | None) -> str:
    if row is None:
        return "fails its check"
    if "error" in row:
        return row["error"]
    share = f", {row['share_of_limit']:.0%} of the limit" if "share_of_limit" in row else ""
    return f"{row['p50'] * 1e6:.1f} us{share}"


if __name__ == "__main__":
    sys.exit(main())
