"""The kernels, measured: one file of cases per op, shared by every way of running them.

`bench.static` compiles what a case launches, `bench.gpu` checks and times it on a card, and
`pytest bench/kernels` runs the same cases under pytest-benchmark.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Collection
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from bench.kernels.case import Case


def find(ops: Collection[str] = (), module: str = "") -> list[Case]:
    """All cases, or those of `ops`; of one module alone (for tests of the harness) if it is named.

    Raises ValueError for an op that no case is of, and where two cases have one name.
    """
    files = [f"{__name__}.{m.name}" for m in pkgutil.iter_modules(__path__)]
    ours = [m for m in files if not m.rsplit(".", 1)[1].startswith(("case", "test_", "conftest"))]
    cases = [c for m in ([module] if module else ours) for c in importlib.import_module(m).cases()]
    names = [(c.op, c.label) for c in cases]
    twice = sorted({n for n in names if names.count(n) > 1})
    if twice:
        raise ValueError(f"cases of one name: {twice}")
    unknown = set(ops) - {c.op for c in cases}
    if unknown:
        raise ValueError(f"no case of {sorted(unknown)}; there are {sorted({c.op for c in cases})}")
    return [c for c in cases if not ops or c.op in ops]
