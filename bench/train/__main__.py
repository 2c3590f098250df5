"""Speed and memory of whole trainers, side by side: `python -m bench.train`.

    python -m bench.train [--model M,..] [--rows R,..] [--method M,..] [--who W,..]
                          [--quick] [--limit SECONDS] [--out DIR] [--work DIR] [--seed N]

Models: llama-3.1-8b, llama-3.2-1b, qwen3-4b, qwen3-8b, mistral-7b; on a CPU tiny and builtin:tiny.
Rows: alpaca, sharegpt, long; text for builtin:tiny. Methods: lora, qlora, full. Each trainer is a
process of its own and gets the same weights, rows, rank and targets, and as many trained tokens an
optimizer step (packed peers: as near as whole packs come). Peers run without checkpointing where
that fits, with it where it does not.

Tokens are real ones. tokens/s is over all timed steps, p20 to p80 over single ones; the first steps
are left out; `first step` is from the start of the process, imports and loading included. Rows go
to bench/results/<card>/train.json. A row that is there is not measured again.
"""

from __future__ import annotations

import itertools
import statistics
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from bench.train import session as sessions
from bench.train import work
from bench.train.job import METHODS, TRAINERS, Job
from bench.train.models import NAMES
from bench.train.session import Session
from bench.train.workloads import TINY, WORKLOADS, Rows

KEY = ("kind", "model", "rows", "method", "who")
CPU_MICRO_BATCH = 2048
ALL = tuple(who for who in TRAINERS if who != "fastsft plain kernels")
ON_CPU = ("fastsft", "fastsft compat", "trl", "trl packed", "reference")


def template(name: str, on_gpu: bool, quick: bool) -> Job:
    """The steps and sizes of rows of one kind."""
    shape = (WORKLOADS if on_gpu else TINY).get(name)
    job = Job("train", longest=512, batch=32, peer_rows=8)  # text
    if shape is not None:
        job = replace(job, longest=shape.longest, batch=shape.batch, peer_rows=shape.peer_rows)
    if not on_gpu:
        job = replace(job, micro_tokens=CPU_MICRO_BATCH, warm=2, timed=6, profiled=0)
    if quick:
        job = replace(job, warm=1, timed=2, profiled=1 if on_gpu else 0)
    return job


def measured(found: dict[str, Any], job: Job, rows: Rows, flops: float | None) -> dict[str, Any]:
    """What a row says, from what a process measured. flops: the card's rate, where it has a steady one."""
    if "error" in found:
        return {"error": found["error"]}
    timed = slice(job.warm, job.warm + job.timed)
    tokens, trained, seconds = (
        found["tokens"][timed],
        found["trained"][timed],
        found["step_seconds"],
    )
    speeds = [t / s for t, s in zip(tokens, seconds, strict=True)]
    deciles = statistics.quantiles(speeds, n=10, method="inclusive")
    speed = sum(tokens) / sum(seconds)
    row = {
        "tokens_per_second": speed,
        "trained_per_second": sum(trained) / sum(seconds),
        "p20": deciles[1],
        "p50": statistics.median(speeds),
        "p80": deciles[7],
        "tokens_a_step": sum(tokens) / len(tokens),
        "trained_a_step": sum(trained) / len(trained),
        "first_loss": found["losses"][0],
        "last_loss": found["losses"][-1],
    }
    names = (
        "first_step_seconds",
        "peak_loading_bytes",
        "peak_allocated_bytes",
        "peak_reserved_bytes",
    )
    row |= {
        name: found[name] for name in (*names, "clock", "predicted_bytes", "note") if name in found
    }
    if flops is not None:
        needed = work.operations(Path(job.model), rows, job.method, job.rank) / rows.lengths.sum()
        row["mfu"] = float(needed) * speed / flops
    if "device_seconds_a_step" in found:
        row |= {name: found[name] for name in ("kernels_a_step", "launches_a_step")}
        row["busy_share"] = found["device_seconds_a_step"] / statistics.median(seconds)
    return row


def compare(
    session: Session, names: list[str], kinds: list[str], methods: list[str], who: list[str]
) -> int:
    """Every combination that has no row yet; returns how many failed."""
    failed, flops = 0, session.rates()["flops"] if session.book.on_gpu else None
    for name, kind in itertools.product(names, kinds):
        key = {"kind": "train", "model": name, "rows": kind}
        missing = [
            (method, one)
            for method, one in itertools.product(methods, who)
            if not session.book.find(**key, method=method, who=one)
        ]
        if not missing:
            continue
        folder = session.model(name)
        base = template(kind, session.book.on_gpu, session.quick)
        path, rows = session.rows(kind, folder, base.batch * base.steps, base.longest)
        base = replace(base, model=str(folder), rows=str(path), seed=session.seed)
        for method, one in missing:
            out = session.out("train", name, kind, method, one)
            job = replace(base, who=one, method=method, out=out)
            row = measured(session.run(job), job, rows, flops)
            settings = {"batch": job.batch, "rank": job.rank, "timed": job.timed}
            this = key | {"method": method, "who": one}
            session.book.add(this | settings | rows.shape() | row)
            failed += "error" in row
            print(f"{name} {method} {kind} {one}: {told(row)}", flush=True)
    return failed


def told(row: dict[str, Any]) -> str:
    if "error" in row:
        return row["error"]
    parts = [f"{row['tokens_per_second']:,.0f} tokens/s"]
    parts += [f"mfu {row['mfu']:.0%}"] if "mfu" in row else []
    parts.append(f"first step after {row['first_step_seconds']:.1f} s")
    if "peak_reserved_bytes" in row:
        allocated, reserved = (
            row[f"peak_{name}_bytes"] / 2**30 for name in ("allocated", "reserved")
        )
        parts.append(f"{allocated:.1f} GiB allocated, {reserved:.1f} reserved")
    parts.append(f"loss {row['first_loss']:.3f} to {row['last_loss']:.3f}")
    return ", ".join(parts)


def main(argv: list[str] | None = None) -> int:
    parser = sessions.arguments(__doc__)
    for option in ("model", "rows", "method", "who"):
        parser.add_argument(f"--{option}", default="", help="comma-separated")
    given = parser.parse_args(argv)
    failed = 0
    with sessions.opened(given, "train", KEY) as session:
        on_gpu, quick = session.book.on_gpu, given.quick
        usual = ("llama-3.1-8b", "llama-3.2-1b") if on_gpu else ("builtin:tiny", "tiny")
        models = sessions.names(given.model, (usual[quick],), NAMES)
        text = "text" if models == ["builtin:tiny"] else "alpaca"
        kinds = sessions.names(given.rows, (text,), (*WORKLOADS, "text"))
        methods = sessions.names(given.method, ("lora",) if quick else ("lora", "qlora"), METHODS)
        some = ("fastsft", "trl") if quick else ALL if on_gpu else ON_CPU
        who = sessions.names(given.who, some, tuple(TRAINERS))
        failed = compare(session, models, kinds, methods, who)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
