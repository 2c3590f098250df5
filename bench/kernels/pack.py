"""pack_adapters: all adapters of an 8B model at rank 16, after an optimizer step.

B's strips lie behind W at W's pitch. The weights themselves, 14 GB, are left out of the record: a
pitch of 256 numbers scatters B's rows as well, 32 bytes in 512.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from fastsft_kernels import limits, reference
from fastsft_kernels.fused import PackEntry, PackPlan, pack_adapters, pack_plan
from torch import Tensor

from bench.kernels.case import Case

RANK, PITCH = 16, 256
# (in, out) of q, k, v, o, gate, up, down
ATTENTION = ((4096, 4096), (4096, 1024), (4096, 1024), (4096, 4096))
LAYER = (*ATTENTION, (4096, 14336), (4096, 14336), (14336, 4096))


class Planned:
    """Hides a plan's tensors from the harness, which fills copies of inputs from the originals: the
    table of a plan is true for its own destinations alone. (Every strip is rewritten whole.)
    """

    def __init__(self, plan: PackPlan) -> None:
        self.plan = plan


def cases() -> list[Case]:
    return [
        Case(
            op="pack_adapters",
            label="42 M parameters, 448 matrices",
            record=partial(_inputs, LAYER * 32, RANK),
            small=partial(_inputs, ((100, 37), (64, 128), (33, 5)), 7),
            run=_run,
            oracle=_oracle,
            work=lambda masters, planned: limits.pack_adapters(masters.numel()),
            peers={"torch, a copy each": _copies, "torch, foreach": _foreach},
        )
    ]


def _inputs(
    layers: tuple[tuple[int, int], ...], rank: int, device: torch.device, dtype: torch.dtype
) -> tuple[Tensor, Planned]:
    entries, offset = [], 0
    strips = torch.empty(sum(k for k, _ in layers) * RANK, device=device, dtype=dtype)
    behind = torch.empty(sum(n for _, n in layers), PITCH, device=device, dtype=dtype)
    begin = row = 0
    for k, n in layers:
        strip = strips[begin : begin + RANK * k].view(RANK, k)
        entries.append(PackEntry(offset, rank, k, strip))
        entries.append(PackEntry(offset + rank * k, n, rank, behind[row : row + n, -RANK:]))
        offset, begin, row = offset + rank * (k + n), begin + RANK * k, row + n
    return torch.randn(offset, device=device), Planned(pack_plan(entries, device))


def _run(masters: Tensor, planned: Planned) -> list[Tensor]:
    pack_adapters(masters, planned.plan)
    return [entry.destination for entry in planned.plan.entries]


def _oracle(masters: Tensor, planned: Planned) -> list[Tensor]:
    reference.pack_adapters(masters, planned.plan)
    return [entry.destination for entry in planned.plan.entries]


def _pairs(masters: Tensor, planned: Planned) -> tuple[list[Tensor], list[Tensor]]:
    entries = planned.plan.entries
    sources = [masters[e.offset :][: e.rows * e.columns].view(e.rows, -1) for e in entries]
    return [e.destination[: e.rows, : e.columns] for e in entries], sources


def _copies(masters: Tensor, planned: Planned) -> Callable[[], Any]:
    pairs = list(zip(*_pairs(masters, planned), strict=True))
    return lambda: [destination.copy_(source) for destination, source in pairs]


def _foreach(masters: Tensor, planned: Planned) -> Callable[[], Any]:
    destinations, sources = _pairs(masters, planned)
    return lambda: torch._foreach_copy_(destinations, sources)
