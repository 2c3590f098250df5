"""The second stage of every sum over rows: partial sums [S, n] -> [n], always in the same order.

A sum over a million rows is cut into S slices, each summed by one program into its own row of
`partials`; this kernel adds those rows up. Unlike atomic additions that gives the same bits in
every run, for S x n x 4 bytes more traffic.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from fastsft_kernels.launch import launch, pinned


def reduce_partials(partials: Tensor, out: Tensor, *, accumulate: bool = False) -> Tensor:
    """partials float32 [S, ..], out of shape [..], any float dtype, contiguous -> out.

    With accumulate the sum is added to what `out` holds.
    """
    splits, n = partials.shape[0], out.numel()
    assert partials.is_contiguous() and out.is_contiguous() and partials.numel() == splits * n
    config = pinned("reduce_partials", [{"BN": 512, "num_warps": 4}], out)
    grid = (triton.cdiv(n, config["BN"]),)
    launch(_reduce, grid, partials, out, splits, n, ACCUMULATE=accumulate, **config)
    return out


@triton.jit(do_not_specialize=["splits"])
def _reduce(partials, out, splits, n, ACCUMULATE: tl.constexpr, BN: tl.constexpr):
    column = tl.program_id(0).to(tl.int64) * BN + tl.arange(0, BN)
    inside = column < n
    total = tl.zeros([BN], tl.float32)
    row = partials + column
    for _ in range(splits):
        total += tl.load(row, mask=inside, other=0.0)
        row += n
    if ACCUMULATE:
        total += tl.load(out + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + column, total.to(out.dtype.element_ty), mask=inside)
