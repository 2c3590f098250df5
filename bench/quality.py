"""Do we learn what TRL + PEFT learn? `python -m bench.quality` lays loss curves over each other.

    python -m bench.quality [--model M] [--steps N] [--quick] [--limit SECONDS] [--out DIR] [--work DIR]

Every trainer starts from the same weights and takes the same examples in the same steps; the loss
of each of 200 steps is kept. What a seed may change is where adapters start, so two seeds of one
trainer show how much a curve may differ for no reason (noise). Compared with that: fastsft with
TRL, the fast engine with compat, our kernels with plain torch (backend reference), 4-bit weights
with whole ones. Full fine-tuning starts from no random number: its curves must be one, up to
rounding.

`apart` is the root mean square difference of two curves from step 10 on; two trainers agree where
theirs is no more than 1.5 times the noise, or what rounding explains (0.002 nats in fp32, 0.01 in
bf16). A disagreement ends the command with code 1. QLoRA against LoRA is shown and not judged: 4
bits do cost something. Results go to bench/results/<card>/quality.json.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

from bench.train import session as sessions
from bench.train.job import Job
from bench.train.models import NAMES
from bench.train.session import Session

KEY = ("kind", "model", "method", "who", "seed")
STEPS, LEARN_FROM = 200, 10
FACTOR = 1.5
FLOORS = {"float32": 0.002, "bfloat16": 0.01}  # nats that rounding alone may put between curves
RATES = {"lora": 1e-3, "qlora": 1e-3, "full": 1e-4}
PLAN = (
    ("lora", "fastsft", 0),
    ("lora", "trl", 0),
    ("lora", "fastsft", 1),
    ("lora", "trl", 1),
    ("lora", "fastsft compat", 0),
    ("lora", "fastsft plain kernels", 0),
    ("qlora", "fastsft", 0),
    ("qlora", "trl", 0),
    ("qlora", "fastsft", 1),
    ("qlora", "trl", 1),
    ("full", "fastsft", 0),
    ("full", "trl", 0),
)
QUICK = (("lora", "fastsft", 0), ("lora", "fastsft compat", 0))
# (method, who, against whom): what must agree.
PAIRS = (
    ("lora", "fastsft", "trl"),
    ("lora", "fastsft", "fastsft compat"),
    ("lora", "fastsft", "fastsft plain kernels"),
    ("qlora", "fastsft", "trl"),
    ("full", "fastsft", "trl"),
)


class Verdict(NamedTuple):
    """How far two curves are apart, how far two seeds of one trainer are, and whether that will do."""

    method: str
    who: str
    other: str
    apart: float
    noise: float
    agree: bool


def apart(one: Sequence[float], other: Sequence[float]) -> float:
    """Root mean square difference of two curves behind their first steps; NaN is as far as can be."""
    assert len(one) == len(other), (len(one), len(other))
    first = min(LEARN_FROM, len(one) // 2)
    squares = [(a - b) ** 2 for a, b in zip(one[first:], other[first:], strict=True)]
    mean = sum(squares) / len(squares)
    return mean**0.5 if mean == mean else float("inf")


def verdicts(rows: Sequence[dict[str, Any]], model: str) -> list[Verdict]:
    """Of every pair whose curves are there."""
    curves = {
        (r["method"], r["who"], r["seed"]): r["losses"]
        for r in rows
        if r["kind"] == "curve" and r["model"] == model and "losses" in r
    }
    floor = max((FLOORS[r["dtype"]] for r in rows if "dtype" in r), default=FLOORS["float32"])
    found = []
    for method, who, other in PAIRS:
        one, two = curves.get((method, who, 0)), curves.get((method, other, 0))
        if one is None or two is None:
            continue
        seeds = [
            apart(curves[method, w, 0], curves[method, w, 1])
            for w in (who, other)
            if (method, w, 0) in curves and (method, w, 1) in curves
        ]
        noise, distance = max(seeds, default=0.0), apart(one, two)
        agree = distance <= max(FACTOR * noise, floor)
        found.append(Verdict(method, who, other, distance, noise, agree))
    return found


def take(session: Session, model: str, steps: int, plan: Sequence[tuple[str, str, int]]) -> int:
    """Every curve of the plan that has no row yet; returns how many failed."""
    folder, failed = session.model(model), 0
    kind = "text" if model == "builtin:tiny" else "alpaca"
    path, rows = session.rows(kind, folder, 8 * steps, 1024 if session.book.on_gpu else 128)
    for method, who, seed in plan:
        key = {"kind": "curve", "model": model, "method": method, "who": who, "seed": seed}
        if session.book.find(**key):
            continue
        job = Job(
            "train",
            who=who,
            method=method,
            model=str(folder),
            rows=str(path),
            out=session.out("quality", model, method, who, str(seed)),
            batch=8,
            peer_rows=8,
            micro_tokens=0 if session.book.on_gpu else 2048,
            longest=int(rows.lengths.max()),
            learning_rate=RATES[method],
            seed=seed,
            warm=2,
            timed=steps - 2,
            profiled=0,
            every_loss=True,
        )
        found = session.run(job)
        row = {"error": found["error"]} if "error" in found else {"losses": found["losses"]}
        dtype = "bfloat16" if session.book.on_gpu else "float32"
        settings = {"steps": steps, "learning_rate": job.learning_rate, "dtype": dtype}
        session.book.add(key | settings | row)
        failed += "error" in row
        ends = row.get("error") or f"{found['losses'][0]:.3f} to {found['losses'][-1]:.3f}"
        print(f"{model} {method} {who}, seed {seed}: {ends}", flush=True)
    return failed


def main(argv: list[str] | None = None) -> int:
    parser = sessions.arguments(__doc__)
    parser.add_argument("--model", default="", choices=("", *NAMES))
    parser.add_argument("--steps", type=int, default=0)
    given = parser.parse_args(argv)
    model = given.model or ("tiny" if given.quick else "builtin:tiny")
    steps = given.steps or (12 if given.quick else STEPS)
    failed = 0
    with sessions.opened(given, "quality", KEY) as session:
        plan: Sequence[tuple[str, str, int]] = QUICK if given.quick else PLAN
        if not session.book.on_gpu:  # plain torch is all there is
            plan = tuple(one for one in plan if one[1] != "fastsft plain kernels")
        failed = take(session, model, steps, plan)
        for v in verdicts(session.book.rows, model):
            says = "agree" if v.agree else "DISAGREE"
            print(
                f"{v.method}: {v.who}, {v.other} {says}: {v.apart:.4f} apart, noise {v.noise:.4f}"
            )
            failed += not v.agree
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
