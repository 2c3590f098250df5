"""What bench.first measures: the items of its steps, in order of worth."""

from __future__ import annotations

import argparse
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from fastsft_kernels.cards import CARDS

from bench import engine, ledger, rows, timing
from bench import gpu as kernels_bench
from bench.check import check
from bench.kernels import find
from bench.kernels.case import Case
from bench.ledger import Ledger

STEPS = ("facts", "compile", "engine", "kernels", "duels", "model", "trainers")
Row = dict[str, Any]


@dataclass
class Bench:
    """What an item is given. add(book, row) writes a row; ends: when the item is ended, monotonic."""

    books: dict[str, Ledger]
    out: Path
    quick: bool
    send: Callable[[str, Row], None]
    ends: float = 0.0

    @property
    def device(self) -> torch.device:
        return self.books["first"].device

    @property
    def on_gpu(self) -> bool:
        return self.books["first"].on_gpu

    def add(self, book: str, row: Row) -> None:
        self.books[book].add(row)
        self.send(book, row)


@dataclass(frozen=True)
class Item:
    """seconds: what must be left for it to begin. do: performs it, returns what is wrong, if anything.
    alone: in a process of its own."""

    step: str
    name: str
    seconds: float
    do: Callable[[Bench], str | None]
    needs_gpu: bool = False
    alone: bool = False


@dataclass(frozen=True)
class Figures:
    """Adds the lines of the table that an item yields."""

    bench: Bench
    step: str
    item: str

    def add(
        self, what: str, unit: str, measured: float | str, goal: Any = None, limit: Any = None
    ) -> None:
        """unit "%": a share of 1."""
        row = {"kind": "figure", "step": self.step, "item": self.item, "what": what, "unit": unit}
        self.bench.add("first", row | {"goal": goal, "measured": measured, "limit": limit})


# Most is lost or won in the first. (op, what the label begins with).
KERNELS = (
    ("varlen_attention", "forward 4k D 128"),
    ("varlen_attention", "backward 4k D 128"),
    ("varlen_attention", "forward ragged D 128"),
    ("varlen_attention", "backward ragged D 128"),
    ("nf4_dequantize_group", ""),
    ("rms_norm", "add and norm 8192x4096"),
    ("rms_norm", "backward of add and norm 8192x4096"),
    ("rms_norm_backward", "8192x4096, adapters of R 16 on q, k, v"),
    ("glu_backward", "8192x14336, adapters of R 16"),
    ("tails", "8192x4096 R 16"),
    ("tails", "8192x14336 R 16"),
    ("skinny_dA", "8192x4096 R 48, normed"),
    ("skinny_dB", "8192x6144 R 16, 3 segments"),
    ("linear_cross_entropy", "frozen head 4096x4096x128256"),
    ("rope", "in place 8192x40x128"),
    ("swiglu", "forward 8192x14336"),
    ("lora_linear", "forward + backward 8192x4096->14336 R 16"),
    ("pack_adapters", ""),
)
DUELS = (
    ("varlen_attention", "forward 4k D 128"),
    ("varlen_attention", "backward 4k D 128"),
    ("gemm", "Triton x Wᵀ 8192x4096->28672"),
)
# (out, in) of the products of an 8B layer.
PRODUCTS = ((6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336))
TRAINERS = (("fastsft", 105.0), ("unsloth packed", 75.0), ("trl packed", 60.0))


def cases_of(wanted: tuple[tuple[str, str], ...]) -> list[Case]:
    """The cases, in the order of `wanted`. Raises ValueError for one that is not there."""
    there = find()
    found = []
    for op, label in wanted:
        matching = [c for c in there if c.op == op and c.label in (label, label or c.label)]
        if not matching:
            raise ValueError(f"no case {op} {label}")
        found.append(matching[0])
    return found


def items_of(quick: bool, on_gpu: bool) -> list[Item]:
    """Every item; `quick` leaves of the engine's checks on a CPU those that take a second."""
    from bench.first_model import ROWS, measure_model

    checks = [c for c in engine.CHECKS if on_gpu or not quick or c == "no waiting"]
    kernels, duels = cases_of(KERNELS[:4] if quick else KERNELS), cases_of(DUELS)
    return [
        Item("facts", "machine", 1.0, machine),
        Item("facts", "rates", 3.0, rates),
        Item("facts", "products", 5.0, products, needs_gpu=not quick),
        Item("facts", "transfers", 4.0, transfers, needs_gpu=True),
        Item("facts", "registering", 4.0, registering, needs_gpu=True),
        Item("compile", "all", 35.0, compile_kernels, needs_gpu=True),
        *(Item("engine", name, 8.0, partial(engine_check, name)) for name in checks),
        *(Item("kernels", f"{c.op} {c.label}", 5.0, partial(kernel, c)) for c in kernels),
        *(Item("duels", f"{c.op} {c.label}", 8.0, partial(duel, c), True) for c in duels),
        *(
            Item("model", name, 15.0, partial(measure_model, name), alone=on_gpu)
            for name in (list(ROWS)[:2] if quick and not on_gpu else ROWS)
        ),
        *(
            Item(
                "trainers", who, 30.0 if quick else seconds, partial(trainer, who), who != "fastsft"
            )
            for who, seconds in TRAINERS
        ),
    ]


# --- facts -------------------------------------------------------------------------------------------


def machine(bench: Bench) -> None:
    """Versions and the card are in the circumstances of every ledger; here what limits memory."""
    from fastsft.device import free_host_memory

    figures = Figures(bench, "facts", "machine")
    about = bench.books["first"].about
    named = [f"{n} {about['versions'][n]}" for n in ("torch", "triton", "transformers")]
    figures.add("card", "", f"{about['card']}, driver {about['driver'] or 'none'}")
    figures.add("versions", "", ", ".join([f"Python {about['python']}", *named]))
    figures.add("free host memory", "GB", free_host_memory() / 1e9)
    locked = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    figures.add("RLIMIT_MEMLOCK", "GB", "unlimited" if locked < 0 else locked / 1e9)
    if bench.on_gpu:
        free, total = torch.cuda.mem_get_info()
        figures.add("free of the card's memory", "GB", free / 1e9, limit=total / 1e9)


def rates(bench: Bench) -> None:
    """A copy and a product of 8192^3, to which all shares of the limit refer."""
    found = bench.books["kernels"]
    kernels_bench.measure_card(found, bench.quick)
    row = found.find(kind="rates") or {}
    bench.add("kernels", row)
    figures, known = Figures(bench, "facts", "rates"), CARDS.get(found.about["card"])
    expected = (known.bandwidth / 1e12, known.flops / 1e12) if known else (None, None)
    figures.add("copy", "TB/s", row["bandwidth"] / 1e12, expected[0])
    figures.add("product", "TFLOP/s", row["flops"] / 1e12, expected[1])


def products(bench: Bench) -> None:
    """The four of an 8B layer, at K and with the K + 64 columns of the adapters' tails."""
    figures = Figures(bench, "facts", "products")
    tokens, by = (16384, 1) if bench.on_gpu else (256, 16)
    dtype = torch.bfloat16 if bench.on_gpu else torch.float32
    for out, inner in PRODUCTS:
        seconds = []
        for k in (inner // by, inner // by + 64):
            x, w = (torch.randn(m, k, device=bench.device).to(dtype) for m in (tokens, out // by))
            calls = [lambda x=x, w=w: x @ w.t()]
            seconds.append(timing.measure(calls, bench.device, 0.15 if bench.on_gpu else 0.01).p50)
        plain = 2 * tokens * (out // by) * (inner // by) / seconds[0] / 1e12
        rate = bench.books["kernels"].find(kind="rates")
        name = f"product {tokens}x{inner // by} to {out // by}"
        figures.add(name, "TFLOP/s", plain, limit=rate["flops"] / 1e12 if rate else None)
        figures.add(f"{name}: K + 64", "%", seconds[1] / seconds[0] - 1, goal=64 / (inner // by))


def transfers(bench: Bench) -> None:
    """1 GiB from and to pinned memory; offload is planned with 25 GB/s."""
    figures, size = Figures(bench, "facts", "transfers"), 1 << 30
    host = torch.empty(size, dtype=torch.uint8, pin_memory=True)
    there = torch.empty(size, dtype=torch.uint8, device=bench.device)
    for name, to, source in (
        ("host to device", there, host),
        ("device to host", host, there),
    ):
        calls = [lambda a=to, b=source: a.copy_(b, non_blocking=True)]
        seconds = timing.measure(calls, bench.device, 0.3).p50
        figures.add(f"pinned, {name}", "GB/s", size / seconds / 1e9, goal=25.0)


def registering(bench: Bench) -> None:
    """Memory that is there already, made known to CUDA: may it be, and how long does it take."""
    figures, size = Figures(bench, "facts", "registering"), 2 * 10**9
    block, runtime = torch.zeros(size, dtype=torch.uint8), torch.cuda.cudart()
    started = time.perf_counter()
    torch.cuda.check_error(int(runtime.cudaHostRegister(block.data_ptr(), size, 0)))
    figures.add("registering 2 GB", "s", time.perf_counter() - started)
    torch.cuda.check_error(int(runtime.cudaHostUnregister(block.data_ptr())))


# --- kernels -----------------------------------------------------------------------------------------


def compile_kernels(bench: Bench) -> str | None:
    """Fills Triton's cache from all cores, so that nothing after it compiles: defaults of every case here,
    all configurations of the duels, the engine's checks, steps of the 8B model."""
    from bench.precompile import compile_everything

    figures = Figures(bench, "compile", "all")
    duels = compile_everything(cases_of(DUELS), quick=False, checks=False, models=())
    duels.misses.close()
    rest = compile_everything(cases_of(KERNELS))
    rest.misses.close()
    figures.add("kernels compiled", "", duels.compiled + rest.compiled)
    figures.add("compiling", "s", duels.seconds + rest.seconds, goal=35.0)
    return "; ".join(duels.problems + rest.problems)[:300] or None


def engine_check(name: str, bench: Bench) -> str | None:
    row = engine.run_check(name, bench.device)
    bench.add("engine", row)
    if "error" in row:
        Figures(bench, "engine", name).add(
            f"engine: {name}", "", f"{row['error']:.1e}", limit=f"{row['allowed']:.1e}"
        )
    return row["problem"]


def _options(bench: Bench, search: bool) -> argparse.Namespace:
    return argparse.Namespace(quick=bench.quick, search=search)


def kernel(case: Case, bench: Bench) -> str | None:
    """Right on small inputs in the default configuration; only then timed, with its peers."""
    scratch = Ledger(bench.device, None, bench.books["kernels"].about)
    scratch.rows = [r for r in bench.books["kernels"].rows if r["kind"] == "rates"]
    places = len(scratch.rows)
    right, overwritten = check(scratch, case, True)
    if right:
        kernels_bench.time_case(
            scratch, case, _dtype(bench, case), overwritten, _options(bench, False)
        )
    made = scratch.rows[places:]
    for row in made:
        bench.add("kernels", row)
    wrong = [r["problem"] for r in made if r.get("problem")]
    return wrong[0] if wrong else _timed(bench, "kernels", case, made)


def duel(case: Case, bench: Bench) -> str | None:
    """Every configuration timed beside the default."""
    scratch = Ledger(bench.device, None, bench.books["kernels"].about)
    kernels_bench.time_case(scratch, case, _dtype(bench, case), [], _options(bench, True))
    for row in scratch.rows:
        bench.add("kernels", row)
    figures = Figures(bench, "duels", f"{case.op} {case.label}")
    base = next((r["p50"] for r in scratch.rows if r.get("who") == "fastsft" and "p50" in r), None)
    for row in scratch.rows:
        if row["kind"] == "search" and "p50" in row:
            said = row["choice"] or "default"
            figures.add(f"{case.op} {case.label}: {said} {row['candidate'] or ''}", "us",
                        row["p50"] * 1e6, goal=base and base * 1e6)  # fmt: skip
    return _timed(bench, "duels", case, scratch.rows)


def _dtype(bench: Bench, case: Case) -> torch.dtype:
    return case.dtypes[0] if bench.on_gpu else case.dtypes[-1]


def _timed(bench: Bench, step: str, case: Case, made: list[Row]) -> str | None:
    """The line of a case: its goal is the fastest peer's time, its limit that of the card."""
    times = {r["who"]: r for r in made if r["kind"] == "time"}
    ours = times.get("fastsft", {"error": "not timed"})
    if "error" in ours:
        return ours["error"]
    peers = [r["p50"] for who, r in times.items() if who != "fastsft" and "p50" in r]
    share = ours.get("share_of_limit")
    Figures(bench, step, f"{case.op} {case.label}").add(
        f"{case.op} {case.label}",
        "us",
        ours["p50"] * 1e6,
        goal=min(peers) * 1e6 if peers else None,
        limit=ours["p50"] * share * 1e6 if share else None,
    )
    return None


# --- whole trainers ----------------------------------------------------------------------------------


def trainer(who: str, bench: Bench) -> str | None:
    """Through bench.train, in one folder of checkpoints, so that weights are written once."""
    work = Path(tempfile.gettempdir()) / f"bench-first-{os.getuid()}"
    limit = max(20.0, bench.ends - time.monotonic() - 5)
    command = [sys.executable, "-m", "bench.train", "--who", who, "--method"]
    command += ["lora" if bench.quick else "qlora", "--limit", str(limit)]
    command += ["--out", str(bench.out), "--work", str(work), *(["--quick"] if bench.quick else [])]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    path = ledger.path_of(bench.out, "train", bench.books["first"].about)
    found = [r for r in rows.load(path)[1] if r["kind"] == "train" and r["who"] == who]
    if not found:
        said = (done.stderr or done.stdout).strip().splitlines()
        return f"no row: {said[-1] if said else 'nothing was printed'}"[:300]
    if "error" in found[-1]:
        return found[-1]["error"]
    figures, speed = Figures(bench, "trainers", who), found[-1]["tokens_per_second"]
    figures.add(f"bench.train, {who}", "tokens/s", speed)
    if who != "fastsft":
        ours = bench.books["first"].find(
            kind="figure", step="trainers", item="fastsft", what="bench.train, fastsft"
        )
        if ours:
            goal = 2.0 if "unsloth" in who else 4.0
            figures.add(f"fastsft over {who}", "x", ours["measured"] / speed, goal=goal)
    return None
