"""Every benchmark this machine can run, one after the other: `python -m bench.all`.

    python -m bench.all [--quick] [--limit SECONDS] [--out DIR]

Kernels (on a GPU alone: on a CPU their bench is a test), the fast engine, data preparation, whole
trainers, context, loss curves, and the report of what they wrote. Each is a command of its own and
may fail by itself; the exit code says whether any did. --quick takes tiny shapes and few steps,
writes into --out or nowhere, and is a test: a broken harness is seen before a GPU is.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

COMMANDS = ("gpu", "engine", "data", "train", "context", "quality")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="tiny shapes; writes only into --out")
    parser.add_argument("--limit", type=float, help="seconds for each command")
    parser.add_argument("--out", type=Path, help="a folder for the rows")
    given = parser.parse_args(argv)
    failed = []
    with tempfile.TemporaryDirectory() as folder:
        out = given.out or (Path(folder) if given.quick else None)
        to = ["--out", str(out.resolve())] if out else []
        work = ["--work", str(Path(folder).resolve() / "work")]  # so that weights are made once
        for name in COMMANDS if torch.cuda.is_available() else COMMANDS[1:]:
            options = [*to, *(["--quick"] if given.quick else [])]
            options += ["--limit", str(given.limit)] if given.limit else []
            options += work if name in ("train", "context", "quality") else []
            if not _ran(name, options):
                failed.append(name)
        if not _ran("report", ["--results", to[1]] if to else []):
            failed.append("report")
    print(f"failed: {', '.join(failed)}" if failed else "all of them ran")
    return 1 if failed else 0


def _ran(name: str, options: list[str]) -> bool:
    print(f"--- bench.{name}", flush=True)
    started = time.monotonic()
    done = subprocess.run([sys.executable, "-m", f"bench.{name}", *options], check=False)
    print(f"--- bench.{name}: {time.monotonic() - started:.0f} s, exit code {done.returncode}")
    return done.returncode == 0


if __name__ == "__main__":
    sys.exit(main())
