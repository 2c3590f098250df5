"""The longest context under a memory budget, by bisection: `python -m bench.context`.

    python -m bench.context [--model M] [--budgets 8,12,..] [--method qlora] [--who W,..]
                            [--quick] [--limit SECONDS] [--out DIR] [--work DIR]

One optimizer step of one document, every token trained, under 8, 12, 16, 24, 40, 48 and 80 GB: the
budget is the allocator's own limit less the CUDA context, so a card of that size could have done
it. Every trainer recomputes activations as far as it can. A length that fits and one that does not
close in on each other until they are within 3 %; between them the next guess is where the peaks
seen so far, on a line, meet the budget. Each probe is a row, so an interrupted search goes on where
it was. A process takes many probes, and out of memory ends a probe and not the process.

On a CPU the same search runs under budgets of a few MB on what autograd saves (train/budget.py):
it shows that the search works, and says nothing about memory on a GPU. Results go to
bench/results/<card>/context.json.
"""

from __future__ import annotations

import sys
from typing import Any

from bench.train import session as sessions
from bench.train.job import METHODS, TRAINERS, Job, Prober
from bench.train.models import NAMES
from bench.train.session import Session

KEY = ("kind", "model", "method", "who", "budget", "tokens")
BUDGETS = (8, 12, 16, 24, 40, 48, 80)  # GB: 10^9 bytes, as `vram` counts
UNIT = 128  # tokens
CLOSE = 1.03
FIRST = 2048
ENOUGH = 1 << 20  # tokens: nobody asks for more
SLOWEST = 240.0  # seconds a probe may take


def within(budget: int, key: dict[str, Any], session: Session) -> list[dict[str, Any]]:
    """The probes of one search so far, shortest first."""
    rows = [r for r in session.book.rows if r["kind"] == "probe"]
    mine = [r for r in rows if all(r[k] == v for k, v in key.items()) and r["budget"] == budget]
    return sorted(mine, key=lambda r: int(r["tokens"]))


def next_length(probes: list[dict[str, Any]], budget: int, unit: int, first: int) -> int | None:
    """The length to try after these probes, shortest first; None when the answer is known.

    budget: bytes. Lengths are multiples of `unit`.
    """
    if any(p.get("hopeless") for p in probes):
        return None  # the model alone does not fit
    good = [p for p in probes if p["fits"]]
    bad = [p["tokens"] for p in probes if not p["fits"]]
    low, high = (good[-1]["tokens"] if good else 0), min(bad, default=0)
    if not probes:
        return first
    if not good:
        return _whole(high // 2, unit) if high > unit else None
    if low >= ENOUGH or (high and (high <= low * CLOSE or high - low <= unit)):
        return None
    guess = _on_the_line(good, budget)
    if not high:
        return _whole(min(max(guess or 0, 2 * low), 8 * low, ENOUGH), unit)
    middle = (low + high) // 2
    # Just under what the line says: if it fits the search is nearly over.
    guess = int(guess * 0.99) if guess else middle
    inside = low * CLOSE < guess < high and len(probes) < 8
    return min(max(_whole(guess if inside else middle, unit), low + unit), high - unit)


def _on_the_line(good: list[dict[str, Any]], budget: int) -> int | None:
    """Where the peaks of the two longest lengths that fit, on a line, meet the budget."""
    if len(good) < 2:
        return None
    (a, b), (c, d) = ((p["tokens"], p["peak_bytes"]) for p in good[-2:])
    return int(c + (budget - d) * (c - a) / (d - b)) if d > b else None


def _whole(tokens: int, unit: int) -> int:
    return max(unit, tokens // unit * unit)


def search(
    session: Session, key: dict[str, Any], job: Job, unit: int, first: int
) -> dict[str, Any]:
    """Probes until the answer is known; the row of the answer."""
    with Prober(job) as prober:
        while True:
            probes = within(key["budget"], {k: key[k] for k in ("model", "method", "who")}, session)
            tokens = next_length(probes, job.budget, unit, first)
            if tokens is None:
                break
            limit = session.left(SLOWEST)
            found = prober.ask(tokens, limit)
            session.cut_off(found, limit < SLOWEST)
            if "error" in found:
                return {"error": found["error"]} | _best(probes)
            session.book.add(key | {"kind": "probe", "tokens": tokens} | found)
    return _best(probes)


def _best(probes: list[dict[str, Any]]) -> dict[str, Any]:
    """The longest that fitted; 0 where not even the shortest did."""
    good = [p for p in probes if p["fits"]]
    if not good:
        return {"longest": 0}
    longest = good[-1]
    return {"longest": longest["tokens"]} | {
        k: longest[k] for k in ("peak_bytes", "seconds", "limit")
    }


def sizes(on_gpu: bool, quick: bool) -> tuple[list[float], int, int]:
    """(budgets in GB, unit, first length)."""
    if not on_gpu:
        return [mb / 1000 for mb in ((4,) if quick else (2, 4, 8))], 8, 64
    return ([8] if quick else list(BUDGETS)), UNIT, FIRST


def main(argv: list[str] | None = None) -> int:
    parser = sessions.arguments(__doc__)
    parser.add_argument("--model", default="")
    for option in ("budgets", "who"):
        parser.add_argument(f"--{option}", default="", help="comma-separated")
    parser.add_argument("--method", default="qlora", choices=METHODS)
    given = parser.parse_args(argv)
    failed = 0
    with sessions.opened(given, "context", KEY) as session:
        on_gpu = session.book.on_gpu
        usual = "llama-3.2-1b" if given.quick else "llama-3.1-8b"
        (name,) = sessions.names(given.model, (usual if on_gpu else "tiny",), NAMES)
        budgets, unit, first = sizes(on_gpu, given.quick)
        budgets = [float(b) for b in given.budgets.split(",") if b] or budgets
        peers = ("unsloth", "trl", "trl liger") if on_gpu and not given.quick else ("reference",)
        everyone = sessions.names(given.who, ("fastsft", *peers), tuple(TRAINERS))
        folder = session.model(name, longest=2 * ENOUGH if on_gpu else 0)
        for budget in budgets:
            for who in everyone:
                key = {"model": name, "method": given.method, "who": who, "budget": budget}
                if session.book.find(kind="context", **key):
                    continue
                job = Job(
                    "probe",
                    who=who,
                    method=given.method,
                    model=str(folder),
                    out=session.out("context", name, who, f"{budget:g}"),
                    peer_rows=1,
                    longest=2 * ENOUGH if on_gpu else 4096,
                    checkpointing=on_gpu,
                    budget=int(budget * 10**9),
                    seed=session.seed,
                )
                row = search(session, key, job, unit, first)
                session.book.add(key | {"kind": "context"} | row)
                failed += "error" in row
                told = row.get("error") or f"{row['longest']:,} tokens"
                print(f"{name} {given.method} {budget:g} GB {who}: {told}", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
