"""What the compiler makes of every kernel, for six targets, on a machine without a GPU.

    python -m bench.static [--quick] [--keep] [--ops a,b] [--targets 80,90] [--out FILE.json]

Each case of `bench.kernels` runs on meta tensors inside a recording; what it would launch is
compiled, in every pinned configuration for the dtype of the record and in the default one for the
other dtypes. Tabulated are registers, spills, shared memory, blocks per multiprocessor, the matrix
instruction, the width of global loads and the number of instructions. A spill, more shared memory
than the card has, a half-precision product of 64 rows or more without wgmma on sm_90, a fused
multiply-add in a kernel of NF4 (its bits would differ from bitsandbytes') or a kernel that does not
compile makes the exit code 1.

--quick takes the default configurations in the dtype of the record, for sm_80 and sm_90. Without
--quick, --ops and --targets the rows go to bench/results/static/, one file per Triton version, with
a table in Markdown beside it. --keep compiles only what failed or changed since the file was
written: a row's fingerprint is of the kernel's source, of what it is specialised for and of the code
that judges it. Another Triton is a folder in front: PYTHONPATH=FOLDER.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import multiprocessing
import os
import sys
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any, Literal, NamedTuple

os.environ.pop("TRITON_INTERPRET", None)  # before any kernel is defined: here they are compiled

import torch
import triton
from fastsft_kernels.launch import Launch

from bench import compiled, nvcc, rows, tables
from bench.kernels import find
from bench.kernels.case import Case
from bench.recordings import configurations, record

Row = dict[str, Any]
# The dtype of the record in the default configurations; that dtype in all and the others in the
# default ones; everything.
Depth = Literal["default", "record", "all"]
RESULTS = Path(__file__).parent / "results" / "static"


class Job(NamedTuple):
    """One kernel to compile: a launch, the target, and the case and configuration it came from."""

    launch: Launch
    capability: int
    origin: dict[str, str]  # op, case, dtype, choice (empty: the defaults)

    def fingerprint(self) -> str:
        """Equal only where the row would be; the results are of one Triton version."""
        kernel = self.launch.kernel.cache_key  # of its source and of all that it calls
        digest = hashlib.sha256(Path(compiled.__file__).read_bytes())
        digest.update(f"{self.capability} {kernel} {identity(self.launch)}".encode())
        return digest.hexdigest()[:16]


def jobs(
    cases: Iterable[Case], targets: Iterable[int], depth: Depth, small: bool = False
) -> tuple[list[Job], list[Row]]:
    """Everything to compile, each kernel once for a target; and rows for cases that do not run."""
    found: dict[Any, Job] = {}
    broken: list[Row] = []
    for capability, case in itertools.product(targets, cases):
        for dtype in case.dtypes[:1] if depth == "default" else case.dtypes:
            origin = {
                "op": case.op,
                "case": case.label,
                "dtype": str(dtype).removeprefix("torch."),
                "choice": "",
            }
            every = depth == "all" or (depth == "record" and dtype == case.dtypes[0])
            try:
                defaults = record(case, capability, dtype, {}, small)
                for configuration in configurations(defaults)[: None if every else 1]:
                    origin = origin | {"choice": configuration.label}
                    choice = configuration.choice
                    for launch in record(case, capability, dtype, choice, small).launches:
                        job = Job(launch, capability, origin)
                        found.setdefault((capability, identity(launch)), job)
            except Exception as error:  # whatever it is, the row says it
                failure = (
                    f"does not run on meta tensors: {type(error).__name__}: {str(error)[-300:]}"
                )
                broken.append(_row("", origin, capability, {}) | {"failures": [failure]})
    return list(found.values()), broken


def identity(launch: Launch) -> Any:
    """Equal for launches that Triton compiles to one kernel: types, divisibility, constexprs."""
    kernel = launch.kernel
    args = [_specialised(a, p) for a, p in zip(launch.args, kernel.params, strict=False)]
    return (kernel.fn.__module__, kernel.fn.__name__, *args, str(launch.options))


def _specialised(x: Any, parameter: Any) -> Any:
    if isinstance(x, torch.Tensor):
        return x.dtype, x.data_ptr() % 16 == 0
    if isinstance(x, tuple):
        return tuple(_specialised(part, parameter) for part in x)
    if parameter.is_constexpr or isinstance(x, bool) or x is None:
        return str(x)
    if isinstance(x, int):
        wide = not -(2**31) <= x < 2**31
        return (wide,) if parameter.do_not_specialize else (wide, x == 1, x % 16 == 0)
    return type(x).__name__


_jobs: list[Job] = []  # inherited by the pool's processes: launches cannot be pickled


def compile_one(number: int) -> Row:
    """The row of job `number`."""
    job = _jobs[number]
    row = _row_of(job)
    try:
        row["fingerprint"] = job.fingerprint()
        made = compiled.compile_launch(job.launch, job.capability)
        facts = compiled.describe(made, job.capability)
    except Exception as error:  # whatever it is, the row says it and the exit code is 1
        return row | {
            "failures": [f"does not compile: {type(error).__name__}: {str(error)[-300:]}"]
        }
    if "nf4_dequantize" in row["kernel"]:
        facts["per_weight"] = compiled.per_number(facts, 4 if row["dtype"] == "float32" else 2)
    return row | facts | {"failures": compiled.failures(row["kernel"], facts, job.capability)}


def _row_of(job: Job) -> Row:
    options = {k: v for k, v in job.launch.options.items() if isinstance(v, (int, bool, str))}
    return _row(job.launch.kernel.fn.__name__, job.origin, job.capability, options)


def _row(kernel: str, origin: dict[str, str], capability: int, options: dict[str, Any]) -> Row:
    return {"kernel": kernel, **origin, "capability": capability, "options": options}


def compile_all(todo: list[Job], workers: int) -> Iterator[Row]:
    """Compiles all jobs in processes; one that ends its process becomes a row that says so."""
    global _jobs
    _jobs = todo
    fork = multiprocessing.get_context("fork")
    lost = []
    with ProcessPoolExecutor(workers, fork) as pool:
        futures = [pool.submit(compile_one, i) for i in range(len(todo))]
        for i, future in enumerate(futures):
            try:
                yield future.result()
            except BrokenProcessPool:
                lost.append(i)
    for i in lost:  # each alone now, so that the one to blame is known
        with ProcessPoolExecutor(1, fork) as pool:
            try:
                yield pool.submit(compile_one, i).result()
            except BrokenProcessPool:
                yield _row_of(todo[i]) | {"failures": ["the compiler ended the process"]}


def keep(todo: list[Job], old: list[Row]) -> tuple[list[Row], list[Job]]:
    """(rows of `old` that a job would make again, the jobs without such a row)."""
    sound = {row["fingerprint"]: row for row in old if "fingerprint" in row and not row["failures"]}
    kept, left = [], []
    for job in todo:
        row = sound.get(job.fingerprint())
        if row is None:
            left.append(job)
        else:  # the case may have another name by now
            kept.append(row | _row_of(job))
    return kept, left


def _complain(row: Row) -> None:
    if row["failures"]:
        where = f"sm_{row['capability']} {row['dtype']} {row['choice'] or 'default'}"
        what = f"{row['kernel']} ({row['op']} {row['case']}) {where}"
        print(f"{what}: {'; '.join(row['failures'])}", flush=True)


def _place(row: Row) -> tuple[str, ...]:
    """Where a row stands in the file, whatever was compiled first."""
    names = ("op", "case", "dtype", "choice", "kernel")
    return (*(row[n] for n in names), f"{row['capability']:3}", str(row["options"]))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="default configurations, sm_80, sm_90")
    parser.add_argument("--keep", action="store_true", help="rows of the file that still hold")
    parser.add_argument("--ops", default="", help="comma-separated; all by default")
    parser.add_argument("--targets", default="", help="such as 80,90; all six by default")
    parser.add_argument("--out", type=Path, help="the file of rows")
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--cases", default="", help="a module of cases instead of bench.kernels")
    given = parser.parse_args()
    targets = [int(t) for t in given.targets.split(",") if t]
    targets = targets or ([80, 90] if given.quick else list(compiled.CARDS))
    part = given.quick or given.ops or given.targets or given.cases
    out = given.out or (None if part else RESULTS / f"triton-{triton.__version__}.json")
    cases = find([o for o in given.ops.split(",") if o], given.cases)
    todo, found = jobs(cases, targets, "default" if given.quick else "record")
    if given.keep and out:
        kept, todo = keep(todo, rows.load(out)[1])
        found += kept
        print(f"{len(kept)} kernels are as they were, {len(todo)} to compile", flush=True)
    for row in found:
        _complain(row)
    for row in compile_all(todo, given.jobs):
        found.append(row)
        _complain(row)
    if not given.cases and (not given.ops or "nf4" in given.ops):
        for row in nvcc.static_rows(targets):
            found.append(row)
            _complain(row)
    found.sort(key=_place)
    if out:
        rows.save(out, rows.circumstances(), found)
        if not part:
            out.with_suffix(".md").write_text(tables.static(found), encoding="utf-8")
    wrong = sum(bool(row["failures"]) for row in found)
    print(f"triton {triton.__version__}: {len(found)} kernels compiled, {wrong} with failures")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
