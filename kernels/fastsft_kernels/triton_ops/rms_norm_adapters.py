"""RMS norm's backward in tiles: with the adapters' term, and for rows too wide for registers.

    g  = dy + scaling · Σ_i mask_i ∘ (d_i · a_i)
    dx = rstd · (w g - x̂ · s / H)           x̂ = x · rstd, s = Σ over the row of w g x̂

The term is a product of small depth, and a product wants tiles of many rows: 128 tiles of 64 rows
read `a` (48 rows of 4096 for R = 16 on q, k and v) 128 times, 50 MB from the L2 cache beside 134 of
dy and x; tiles of 16 rows would read 201. But 64 whole rows of dy and x are 1 MB, four times what a
multiprocessor holds, and the 138 MB that 132 programs would have under way do not wait in an L2
cache of 50 MB for a second pass over the row. So there are two launches instead of two passes: the
first writes partial sums of s, for slices of columns; the second adds those up and writes dx, tile
by tile. Its product is made again (3 GFLOP, 4 us on an H200, hidden behind the loads in both).

Bytes at 8192 x 4096 in bf16: 134 MB first, then 201 with dx: 31 + 47 us at 4.3 TB/s. The first
launch takes the rows from the last to the first and the second from the first on, so each begins
with what the launch before it left in the L2 cache, some 35 MB, 8 us. What remains over the plain
backward is some 23 us, whatever R; an addmm in front of the plain backward costs 31 and rounds the
sum, and with dropout there is one for each adapter. Masks are drawn in both launches, about 12
integer instructions a number and strip: with three strips they, not the bytes, are the limit.

A weight gradient is summed in the second launch: a program then keeps its columns, takes every
n-th tile of rows, and holds the sum of g x̂ in registers.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastsft_kernels.fused.strips import Adapters
from fastsft_kernels.integers import cdiv, next_power_of_2
from fastsft_kernels.launch import capability, launch, multiprocessors, pinned
from fastsft_kernels.triton_ops.philox import keep_mask, mask_arguments, module_of
from fastsft_kernels.triton_ops.reduce import reduce_partials
from fastsft_kernels.triton_ops.rows import rows_of, side_by_side

_HOPPER = (90, 100, 103)
_MOST_SLICES = 32  # of columns in the first launch: more partial sums cost more than they spread


def backward_tiles(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    rstd: Tensor,
    offset: float,
    residual_grad: Tensor | None,
    adapters: Adapters | None,
    dweight: Tensor | None,
    dx: Tensor,
) -> None:
    """Writes dx, and dweight where there is one. What is read has the numbers of a row side by side."""
    columns = x.shape[-1]
    rows, heads, strides = rows_of(dy, x, residual_grad, dx)
    if heads > 1:  # so wide, heads with gaps between tokens come from nowhere: copies serve
        more = None if residual_grad is None else residual_grad.reshape(rows, columns)
        new = torch.empty(rows, columns, dtype=x.dtype, device=x.device)
        dy, x = dy.reshape(rows, columns), x.reshape(rows, columns)
        backward_tiles(dy, x, weight, rstd, offset, more, None, dweight, new)
        dx.copy_(new.view(dx.shape))
        return
    term, shape = _term(adapters, x)
    config = pinned(*_sums_candidates(x, adapters), x)
    assert max(strides) * config["BM"] < 2**31, "rows this far apart need 64 bits within a tile"
    tiles = cdiv(rows, config["BM"])
    slices, steps = _slices(tiles, cdiv(columns, config["BN"]), x)
    sums = torch.empty(slices, rows, dtype=torch.float32, device=x.device)
    read = (dy, x, weight, rstd)
    launch(
        _row_sums,
        (tiles * slices,),
        *(*read, *term, sums, rows, tiles, slices, steps, strides[0], strides[2], float(offset)),
        H=columns,
        **shape,
        **config,
    )
    config = pinned(*_apply_candidates(x, adapters, dweight is not None), x)
    tiles, chunks = cdiv(rows, config["BM"]), cdiv(columns, config["BN"])
    programs, partials = tiles, None
    if dweight is not None:
        programs = min(tiles, cdiv(4 * multiprocessors(x), chunks))
        partials = torch.empty(programs, columns, dtype=torch.float32, device=x.device)
    launch(
        _apply,
        (programs * chunks,),
        *(*read, *term, residual_grad, sums, dx, partials, rows, tiles, programs, slices),
        *(*strides[::2], float(offset)),
        H=columns,
        **shape,
        **config,
    )
    if dweight is not None and partials is not None:
        reduce_partials(partials, dweight)


def _slices(tiles: int, chunks: int, x: Tensor) -> tuple[int, int]:
    """Slices of columns for about 8 programs per multiprocessor -> (slices, chunks of each)."""
    wanted = cdiv(8 * multiprocessors(x), max(tiles, 1))
    steps = cdiv(chunks, min(wanted, chunks, _MOST_SLICES))
    return cdiv(chunks, steps), steps


def _term(adapters: Adapters | None, x: Tensor) -> tuple[tuple[Any, ...], dict[str, int]]:
    """The adapters as arguments and as constexprs of a kernel."""
    if adapters is None:
        return (None, None, 0, 0, 0.0, *mask_arguments(None)), {"STRIPS": 0, "R": 16, "BR": 16}
    d, a = side_by_side(adapters.d), side_by_side(adapters.a)
    dropout = adapters.dropout
    strips = 1 if dropout is None else len(dropout.modules)
    width = d.shape[1] // strips
    strides = (d.stride(0), a.stride(0), float(adapters.scaling))
    # Products of float32 run on plain registers, which 64 rows of `a` would fill.
    depth = 16 if x.element_size() == 4 else min(next_power_of_2(width), 64)
    return (d, a, *strides, *mask_arguments(dropout)), {"STRIPS": strips, "R": width, "BR": depth}


# Tiles by what fills the registers. Of 64 x 64 in the first launch there are four on a Hopper
# multiprocessor, 64 KB under way. The second also holds the residual's gradient; its 64 x 128
# halve how often d is read, and at 121 registers there are two, 96 KB under way. Before Hopper a
# product's operands are in registers too, and those of float32 always. Masks cost most.
_NARROW = {"BM": 64, "BN": 64, "num_warps": 8, "num_stages": 2}
_BROAD = {"BM": 64, "BN": 128, "num_warps": 8, "num_stages": 2}
_SMALL = {"BM": 32, "BN": 64, "num_warps": 4, "num_stages": 2}
_Named = tuple[str, list[dict[str, int]]]


def _sums_candidates(x: Tensor, adapters: Adapters | None) -> _Named:
    """Name and candidates of the first launch."""
    if adapters is None:
        return "rms_norm_sums_wide", [{"BM": 16, "BN": 256, "num_warps": 8, "num_stages": 1}]
    if x.element_size() == 4:
        return "rms_norm_sums_f32", [{**_NARROW, "num_stages": 1}]
    if adapters.dropout is not None:
        more = [{**_NARROW, "BN": 32}] if capability(x) == 90 else []
        return "rms_norm_sums_dropout", [_SMALL, *more]
    return "rms_norm_sums", [_NARROW, _BROAD if capability(x) in _HOPPER else _SMALL]


def _apply_candidates(x: Tensor, adapters: Adapters | None, weight_grad: bool) -> _Named:
    """Name and candidates of the second launch."""
    if weight_grad and adapters is not None and x.element_size() < 4:
        return "rms_norm_apply_weight", [
            {**_SMALL, "num_warps": 8}
        ]  # the loop over tiles keeps more alive
    name, candidates = _sums_candidates(x, adapters)
    if name == "rms_norm_sums" and capability(x) in _HOPPER:
        candidates = candidates[::-1]
    return name.replace("sums", "apply"), candidates


@triton.jit(do_not_specialize=["seed", "step", "modules", "rows", "tiles", "slices", "steps"])
def _row_sums(
    dy,
    x,
    weight,
    rstd,
    d,
    a,
    d_row,
    a_row,
    scaling,
    row_keys,
    seed,
    step,
    modules,
    threshold,
    sums,
    rows,
    tiles,
    slices,
    steps,
    dy_row,
    x_row,
    offset,
    H: tl.constexpr,
    STRIPS: tl.constexpr,
    R: tl.constexpr,
    BR: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    """sums[slice, row] = Σ of w g x̂ over the slice's columns; the last rows first."""
    top = (tiles - 1 - tl.program_id(0) // slices) * BM
    row = top + tl.arange(0, BM)
    part = tl.program_id(0) % slices
    total = tl.zeros([BM], tl.float32)
    dy += top.to(tl.int64) * dy_row
    x += top.to(tl.int64) * x_row
    for chunk in range(part * steps, (part + 1) * steps):
        first = chunk * BN
        column = first + tl.arange(0, BN)
        inside = (row < rows)[:, None] & (column < H)[None, :]
        g = tl.load(dy + _within(column, dy_row, BM), mask=inside, other=0.0)
        z = tl.load(x + _within(column, x_row, BM), mask=inside, other=0.0)
        w = tl.load(weight + column, mask=column < H, other=0.0)
        if STRIPS > 0:
            keys = (row_keys, seed, step, modules, threshold)
            term = _low_rank(d, a, row, rows, first, d_row, a_row, keys, H, STRIPS, R, BR, BM, BN)
            g = term * scaling + g.to(tl.float32)
        product = g.to(tl.float32) * z.to(tl.float32)
        total += tl.sum(product * (w.to(tl.float32) + offset)[None, :], 1)
    total *= tl.load(rstd + row, mask=row < rows, other=0.0)
    tl.store(sums + part.to(tl.int64) * rows + row, total, mask=row < rows)


@triton.jit(do_not_specialize=["seed", "step", "modules", "rows", "tiles", "programs", "slices"])
def _apply(
    dy,
    x,
    weight,
    rstd,
    d,
    a,
    d_row,
    a_row,
    scaling,
    row_keys,
    seed,
    step,
    modules,
    threshold,
    residual_grad,
    sums,
    dx,
    partials,
    rows,
    tiles,
    programs,
    slices,
    dy_row,
    x_row,
    residual_row,
    dx_row,
    offset,
    H: tl.constexpr,
    STRIPS: tl.constexpr,
    R: tl.constexpr,
    BR: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    """dx of a tile of BM rows by BN columns; for a weight gradient of every n-th tile of rows."""
    chunks: tl.constexpr = (H + BN - 1) // BN
    first = tl.program_id(0) % chunks * BN
    column = first + tl.arange(0, BN)
    w = tl.load(weight + column, mask=column < H, other=0.0)
    read = (dy, x, residual_grad, rstd, sums, d, a)
    strides = (dy_row, x_row, residual_row, dx_row, d_row, a_row)
    keys = (row_keys, seed, step, modules, threshold)
    if partials is None:
        top = tl.program_id(0) // chunks * BM
        _apply_tile(
            *(read, dx, w, top, first, rows, slices, strides, keys, scaling, offset),
            *(H, STRIPS, R, BR, BM, BN),
        )
    else:
        total = tl.zeros([BN], tl.float32)
        for tile in range(tl.program_id(0) // chunks, tiles, programs):
            total += _apply_tile(
                *(read, dx, w, tile * BM, first, rows, slices, strides, keys, scaling, offset),
                *(H, STRIPS, R, BR, BM, BN),
            )
        to = partials + (tl.program_id(0) // chunks).to(tl.int64) * H + column
        tl.store(to, total, mask=column < H)


@triton.jit
def _apply_tile(
    read,
    dx,
    w,
    top,
    first,
    rows,
    slices,
    strides,
    keys,
    scaling,
    offset,
    H: tl.constexpr,
    STRIPS: tl.constexpr,
    R: tl.constexpr,
    BR: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    """Writes dx of one tile -> Σ over its rows of g x̂, dead code to the compiler unless used."""
    dy, x, residual_grad, rstd, sums, d, a = read
    dy_row, x_row, residual_row, dx_row, d_row, a_row = strides
    row = top + tl.arange(0, BM)
    column = first + tl.arange(0, BN)
    far = tl.cast(top, tl.int64)
    inside = (row < rows)[:, None] & (column < H)[None, :]
    g = tl.load(dy + far * dy_row + _within(column, dy_row, BM), mask=inside, other=0.0)
    z = tl.load(x + far * x_row + _within(column, x_row, BM), mask=inside, other=0.0)
    if residual_grad is not None:
        at = residual_grad + far * residual_row + _within(column, residual_row, BM)
        more = tl.load(at, mask=inside, other=0.0)
    scale = tl.load(rstd + row, mask=row < rows, other=0.0)
    mean = tl.zeros([BM], tl.float32)
    at_sum = sums + row
    for _ in range(slices):
        mean += tl.load(at_sum, mask=row < rows, other=0.0)
        at_sum += rows
    if STRIPS > 0:
        term = _low_rank(d, a, row, rows, first, d_row, a_row, keys, H, STRIPS, R, BR, BM, BN)
        g = term * scaling + g.to(tl.float32)
    normed = z.to(tl.float32) * scale[:, None]
    product = g.to(tl.float32) * normed
    wide = w.to(tl.float32)[None, :] + offset
    result = (g.to(tl.float32) * wide - normed * (mean / H)[:, None]) * scale[:, None]
    if residual_grad is not None:
        result += more.to(tl.float32)
    to = dx + far * dx_row + _within(column, dx_row, BM)
    tl.store(to, result.to(dx.dtype.element_ty), mask=inside)
    return tl.sum(product, 0)


@triton.jit
def _within(column, stride, BM: tl.constexpr):
    """Where the numbers of BM rows lie, from the first row on, in 32 bits."""
    return tl.arange(0, BM)[:, None] * stride + column[None, :]


@triton.jit
def _low_rank(
    d,
    a,
    row,
    rows,
    first,
    d_row,
    a_row,
    keys,
    H: tl.constexpr,
    STRIPS: tl.constexpr,
    R: tl.constexpr,
    BR: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    """Σ over strips of mask ∘ (d · a) at `row` and BN columns from `first`, unscaled."""
    row_keys, seed, step, modules, threshold = keys
    column = first + tl.arange(0, BN)[None, :]
    known = row < rows
    d += row.to(tl.int64)[:, None] * d_row
    total = tl.zeros([BM, BN], tl.float32)
    if row_keys is not None:
        key = tl.load(row_keys + row, mask=known, other=0)
    for strip in range(STRIPS):
        product = tl.zeros([BM, BN], tl.float32)
        for r in range(0, R, BR):
            k = r + tl.arange(0, BR)
            left = tl.load(
                d + strip * R + k[None, :], mask=known[:, None] & (k < R)[None, :], other=0.0
            )
            at = a + (strip * R + k).to(tl.int64)[:, None] * a_row + column
            right = tl.load(at, mask=(k < R)[:, None] & (column < H), other=0.0)
            product = tl.dot(left, right, product, input_precision="ieee")
        if row_keys is not None:
            keep = keep_mask(key, first, seed, step, module_of(modules, strip), threshold, BN)
            product = tl.where(keep, product, 0.0)
        total += product
    return total
