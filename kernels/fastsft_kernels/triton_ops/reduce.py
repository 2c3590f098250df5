"""The second stage of every sum over rows: partial sums [S, n] -> [n], always in the same order.

A sum over a million rows is cut into S slices, each summed by one program into its own row of
`partials`; this kernel adds those rows up. Unlike atomic additions that gives the same bits in
every run, for S x n x 4 bytes more traffic. S comes from the shape and the card alone (`slices`).
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from fastsft_kernels.integers import cdiv, next_power_of_2
from fastsft_kernels.launch import launch, multiprocessors, pinned

_FEWEST_STEPS = 4  # of a slice: with fewer the pipeline never fills


def slices(steps: int, programs: int, x: Tensor) -> tuple[int, int]:
    """Cuts a loop of `steps` so that `programs` x slices fill the card once -> (slices, steps each).

    One program per multiprocessor is enough where each keeps some 48 KB of loads under way; more
    slices would only write more partial sums. Never more than 64 slices, none of them empty.
    """
    wanted = max(1, multiprocessors(x) // max(programs, 1))
    each = max(-(-steps // min(wanted, 64)), min(_FEWEST_STEPS, steps), 1)
    return max(1, -(-steps // each)), each


def reduce_partials(
    partials: Tensor, out: Tensor, *, accumulate: bool = False, copy: Tensor | None = None
) -> Tensor:
    """partials float32 [S, ..], out of shape [..], any float dtype -> out.

    `out` is contiguous, or a matrix whose rows are further apart. With accumulate the sum is added
    to what `out` holds. copy: a contiguous matrix that gets the first columns of a matrix `out`.
    """
    splits, n = partials.shape[0], out.numel()
    pitched = not out.is_contiguous()
    assert partials.is_contiguous() and partials.numel() == splits * n
    assert copy is None or (out.dim() == 2 and copy.is_contiguous() and not accumulate)
    assert not pitched or (out.dim() == 2 and (out.stride(1) == 1 or out.shape[1] == 1))
    # 64 rows at a time: one after the other, 264 rows of a norm's weight gradient would wait 264
    # times for the L2 cache, 40 us where the whole backward takes 47.
    block = min(64, next_power_of_2(max(splits, 1)))
    config = pinned("reduce_partials", [{"BN": min(512, 4096 // block), "num_warps": 4}], out)
    grid = (cdiv(n, config["BN"]),)
    launch(
        _reduce,
        grid,
        *(partials, out, copy, splits, n),
        *((out.shape[1], out.stride(0)) if pitched or copy is not None else (n, n)),
        0 if copy is None else copy.shape[1],
        ACCUMULATE=accumulate,
        PITCHED=pitched or copy is not None,
        BS=block,
        **config,
    )
    return out


@triton.jit(do_not_specialize=["splits"])
def _reduce(
    partials,
    out,
    copy,
    splits,
    n,
    columns,
    pitch,
    copied,
    ACCUMULATE: tl.constexpr,
    PITCHED: tl.constexpr,
    BS: tl.constexpr,
    BN: tl.constexpr,
):
    index = tl.program_id(0).to(tl.int64) * BN + tl.arange(0, BN)
    inside = index < n
    part = tl.arange(0, BS)
    many = tl.zeros([BS, BN], tl.float32)
    for first in range(0, splits, BS):
        at = partials + (first + part).to(tl.int64)[:, None] * n + index[None, :]
        many += tl.load(at, mask=(first + part < splits)[:, None] & inside[None, :], other=0.0)
    total = tl.sum(many, 0)
    if PITCHED:
        row, column = index // columns, index % columns
        out += row * pitch + column
    else:
        out += index
    if ACCUMULATE:
        total += tl.load(out, mask=inside, other=0.0).to(tl.float32)
    tl.store(out, total.to(out.dtype.element_ty), mask=inside)
    if copy is not None:
        number = total.to(copy.dtype.element_ty)
        tl.store(copy + row * copied + column, number, mask=inside & (column < copied))
