"""Masters to strips in plain torch, one matrix after the other."""

from __future__ import annotations

from torch import Tensor

from fastsft_kernels.fused.pack import PackPlan


def pack_adapters(masters: Tensor, plan: PackPlan) -> None:
    """See `fastsft_kernels.fused.pack_adapters`."""
    for offset, rows, columns, destination in plan.entries:
        destination[:, columns:] = 0
        destination[rows:, :columns] = 0
        source = masters[offset : offset + rows * columns]
        destination[:rows, :columns] = source.view(rows, columns)
