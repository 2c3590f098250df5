"""Every configuration of a case against float64, before anything is timed.

In each dtype on small inputs, and on a GPU also at the shape of the record, where loops are long
enough for software pipelines to go wrong and addresses large enough to overflow. Each
configuration runs twice and must give the same bits.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from fastsft_kernels.launch import forced, has_triton, interpreting
from torch import Tensor

from bench import accuracy
from bench.accuracy import Verdict
from bench.kernels.case import Case
from bench.ledger import Ledger
from bench.recordings import Choice, Configuration, configurations, record


def dtypes(ledger: Ledger, case: Case, quick: bool) -> list[torch.dtype]:
    """In which the case is checked; the first is timed. bf16 products fail in the interpreter."""
    if ledger.on_gpu:
        return list(case.dtypes[:1] if quick else case.dtypes)
    usable = [d for d in case.dtypes if not (interpreting() and d == torch.bfloat16)]
    return usable[-1:] if quick else usable


def configurations_of(
    ledger: Ledger, case: Case, dtype: torch.dtype, shape: str
) -> list[Configuration]:
    """All a case can run in; the one without a choice where no kernel would be launched."""
    if not has_triton() or not (ledger.on_gpu or interpreting()):
        return [Configuration({})]
    return configurations(record(case, ledger.capability, dtype, {}, shape == "small"))


@contextmanager
def running(choice: Choice) -> Iterator[None]:
    """Forces a choice, and the kernels where the interpreter is on."""
    backend = {"backend": "triton"} if interpreting() else {}
    with forced(**choice, **backend):
        yield


def check(
    ledger: Ledger, case: Case, quick: bool, defaults: bool = False
) -> tuple[bool, list[int]]:
    """Adds the rows of a case; (whether all are right, the numbers of the inputs it overwrites).

    quick: the default configuration on small inputs, in one dtype; defaults: at the record's shape too.
    What a row says is right already is not checked again.
    """
    fewer = quick or defaults
    places = [("small", dtype) for dtype in dtypes(ledger, case, fewer)]
    if ledger.on_gpu and not quick:
        places.append(("record", case.dtypes[0]))
    right, overwritten = True, set[int]()
    for shape, dtype in places:
        key = {"kind": "check", "op": case.op, "case": case.label, "shape": shape}
        key["dtype"] = str(dtype).removeprefix("torch.")
        try:
            every = configurations_of(ledger, case, dtype, shape)[: 1 if fewer else None]
            known = [ledger.find(**key, choice=one.label) for one in every]
            overwritten.update(i for row in known if row for i in row.get("overwritten", ()))
            every = [one for one, row in zip(every, known, strict=True) if row is None]
            for one, verdict, written in _verdicts(ledger.device, case, dtype, shape, every):
                overwritten |= written
                right = right and not verdict.problem
                found = {"choice": one.label, "overwritten": sorted(written)}
                ledger.add(key | found | verdict._asdict())
                if verdict.problem:
                    print("WRONG", *key.values(), one.label, verdict.problem)
        except torch.cuda.OutOfMemoryError:
            # The oracle in float64 needs several times an op's memory: a smaller card has less.
            ledger.add(key | {"choice": "", "problem": "", "unchecked": "out of memory"})
        except Exception as error:  # from the inputs or the oracle: it is this row's result
            ledger.add(key | {"choice": "", "problem": f"{type(error).__name__}: {error}"[:300]})
            print("WRONG", *key.values(), ledger.rows[-1]["problem"])
            right = False
    return right, sorted(overwritten)


def _verdicts(
    device: torch.device, case: Case, dtype: torch.dtype, shape: str, every: list[Configuration]
) -> Iterator[tuple[Configuration, Verdict, set[int]]]:
    """Of each configuration: the verdict, and the inputs it wrote to."""
    if not every:
        return
    with accuracy.poisoned_memory():
        inputs = (case.small if shape == "small" else case.record)(device, dtype)
        plain = accuracy.flat(case.oracle(*copy.deepcopy(inputs)))
        exact = accuracy.flat(case.oracle(*accuracy.widened(copy.deepcopy(inputs))))
        for one in every:
            results, written = [], set()
            try:
                with running(one.choice):
                    for _ in range(2):
                        given = copy.deepcopy(inputs)
                        results.append([t.clone() for t in accuracy.flat(case.run(*given))])
            except torch.cuda.OutOfMemoryError:
                raise
            except Exception as error:  # whatever it is, it is this row's result
                yield one, Verdict(f"{type(error).__name__}: {error}"[:300], float("inf")), set()
                continue
            pairs = zip(values(inputs), values(given), strict=True)
            written = {i for i, (a, b) in enumerate(pairs) if not torch.equal(a, b)}
            verdict = accuracy.judge_all(results[0], exact, plain)
            if not all(torch.equal(a, b) for a, b in zip(*results, strict=True)):
                problem = f"two runs give different bits. {verdict.problem}".strip()
                verdict = Verdict(problem, verdict.share)
            yield one, verdict, written


def values(x: Any) -> list[Tensor]:
    """The floating-point tensors of inputs: integers are indices and tables, which no op writes."""
    return [t for t in tensors(x) if t.is_floating_point()]


def tensors(x: Any) -> list[Tensor]:
    """All tensors that inputs hold, NF4 weights' included."""
    if isinstance(x, Tensor):
        return [x]
    if is_dataclass(x) and not isinstance(x, type):
        x = tuple(getattr(x, f.name) for f in fields(x))
    return [t for part in x for t in tensors(part)] if isinstance(x, (tuple, list)) else []
