"""RMS norm: whole rows in registers, so that every number is read once and written once.

    y  = x · rstd · w                        rstd = 1 / sqrt(mean(x²) + eps), w = weight + offset
    dx = rstd · (w g - x̂ · mean(w g x̂))      x̂ = x · rstd, g the gradient of y
    dw = Σ over rows of g x̂

A program holds 4096 numbers of a tensor, 32 in each of its threads as four 16-byte loads: one row
of 4096, or 32 rows of 128 for the norms of q and k, whose heads it finds by two strides without a
copy. A row that is not a power of two wide costs lanes, not bytes: its tail is masked. Bandwidth
is bytes in flight: 4.3 TB/s at a latency of 700 ns are 23 KB per multiprocessor of an H200. By
registers eight programs of the forward fit on one, 64 KB of x, and four of the backward, 64 KB of
dy and x, 96 with the residual's gradient.

The residual addition rides along (y and the sum in one launch); in backward the gradient of x and
of the residual is one tensor, to which the sum's own gradient is added on the way. rstd is kept,
4 bytes a row. Without a weight gradient a program ends with its rows. With one, two programs per
multiprocessor take every n-th tile each, its loads two tiles ahead, and keep their sum in
registers; `reduce` adds up their rows in order: no atomics, 4 MB written where dx is 67.

Rows too wide for the registers (more than 16384 numbers; in backward 8192 of float32, and half of
either with a weight gradient) are walked twice in forward, and in backward go to the tiles of
`rms_norm_adapters`, as everything with adapters does. At 8192 x 4096 in bf16 and 4.3 TB/s forward
takes at least 31 us, with the residual 62, backward 47.
"""

from __future__ import annotations

from typing import Any, overload

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastsft_kernels.fused.strips import Adapters
from fastsft_kernels.integers import cdiv, next_power_of_2
from fastsft_kernels.launch import launch, multiprocessors, pinned
from fastsft_kernels.triton_ops.reduce import reduce_partials
from fastsft_kernels.triton_ops.rms_norm_adapters import backward_tiles
from fastsft_kernels.triton_ops.rows import row_offset, rows_of, side_by_side, tile_offset

_WIDEST = 16384  # numbers of a row that a program still holds: 32 in each of 512 threads
_PROGRAMS = 2  # per multiprocessor for a weight gradient: as many as its registers let be there
_MOST_ROWS = 64  # of a program: very short rows would make tiles of many


def rms_norm(
    x: Tensor,
    weight: Tensor,
    eps: float = 1e-6,
    *,
    offset: float = 0.0,
    residual: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """See `fastsft_kernels.rms_norm`."""
    result: Tensor | tuple[Tensor, Tensor] = _RmsNorm.apply(x, residual, weight, eps, offset)
    return result


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, offset: float
    ) -> Tensor | tuple[Tensor, Tensor]:
        y, total = _empty(x), None if residual is None else _empty(x)
        rows = _rows(x)
        rstd = torch.empty(rows.shape[:-1], dtype=torch.float32, device=x.device)
        _forward_rows(rows, _rows(residual), weight, eps, offset, _rows(y), _rows(total), rstd)
        ctx.save_for_backward(x if total is None else total, weight, rstd)
        ctx.offset = offset
        ctx.set_materialize_grads(False)
        return y if total is None else (y, total)

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, dy: Tensor | None, dtotal: Tensor | None = None
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None, None, None]:
        total, weight, rstd = ctx.saved_tensors
        if dy is None:
            return dtotal, dtotal, None, None, None
        dweight = torch.empty_like(weight) if ctx.needs_input_grad[2] else None
        dx = _empty(total)
        read = _rows(dy), _rows(total), weight, rstd, ctx.offset, _rows(dtotal), None
        _backward(*read, dweight, _rows(dx))
        return dx, (dx if ctx.needs_input_grad[1] else None), dweight, None, None


def _empty(x: Tensor) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


@overload
def _rows(x: Tensor) -> Tensor: ...
@overload
def _rows(x: None) -> None: ...
def _rows(x: Tensor | None) -> Tensor | None:
    """`x` as [T, H] or [T, heads, H]; a view unless its leading strides allow none."""
    if x is None or x.dim() in (2, 3):
        return x
    return x[None] if x.dim() == 1 else x.flatten(0, -3)


def rms_norm_forward(
    x: Tensor,
    weight: Tensor,
    eps: float = 1e-6,
    *,
    offset: float = 0.0,
    residual: Tensor | None = None,
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """See `fastsft_kernels.fused.rms_norm_forward`."""
    y, total = _empty(x) if out is None else out, None if residual is None else _empty(x)
    rstd = torch.empty(x.shape[:-1], dtype=torch.float32, device=x.device)
    _forward_rows(x, residual, weight, eps, offset, y, total, rstd)
    return y, rstd, x if total is None else total


def _forward_rows(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    eps: float,
    offset: float,
    y: Tensor,
    total: Tensor | None,
    rstd: Tensor,
) -> None:
    """Writes y, rstd, and total where there is a residual."""
    x, weight = side_by_side(x), side_by_side(weight)
    residual = None if residual is None else side_by_side(residual)
    rows, heads, strides = rows_of(x, residual, y, total)
    width = next_power_of_2(x.shape[-1])
    if width > _WIDEST:
        kernel, config = _forward_wide, pinned("rms_norm_forward_wide", _WIDE, x)
        blocks = rows
    else:
        kernel, config = _forward, _config("rms_norm_forward", width, _FORWARD_SIZES, x)
        blocks = cdiv(rows, config["BM"])
    launch(
        kernel,
        (blocks,),
        *(x, residual, weight, y, total, rstd, rows, *strides, float(eps), float(offset)),
        H=x.shape[-1],
        HEADS=heads,
        **config,
    )


def rms_norm_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    rstd: Tensor,
    *,
    offset: float = 0.0,
    residual_grad: Tensor | None = None,
    adapters: Adapters | None = None,
    weight_grad: bool = False,
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """See `fastsft_kernels.fused.rms_norm_backward`."""
    dx = _empty(x) if out is None else out
    dweight = None
    if weight_grad:
        dweight = torch.empty(weight.shape, dtype=torch.float32, device=x.device)
    _backward(dy, x, weight, rstd, offset, residual_grad, adapters, dweight, dx)
    return dx, dweight


def _backward(
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
    """Writes dx, and dweight where there is one, of any float dtype."""
    dy, x, weight, rstd = side_by_side(dy), side_by_side(x), side_by_side(weight), rstd.contiguous()
    residual_grad = None if residual_grad is None else side_by_side(residual_grad)
    width = next_power_of_2(x.shape[-1])
    widest = _WIDEST // (x.element_size() // 2) // (1 if dweight is None else 2)
    if adapters is not None or width > widest:
        backward_tiles(dy, x, weight, rstd, offset, residual_grad, adapters, dweight, dx)
        return
    rows, heads, strides = rows_of(dy, x, residual_grad, dx)
    if dweight is None:
        config = _config("rms_norm_backward", width, _BACKWARD_SIZES, x)
    else:
        config = _config("rms_norm_backward_weight", width, _WEIGHT_SIZES, x)
    programs, partials = cdiv(rows, config["BM"]), None
    if dweight is not None:
        programs = min(programs, _PROGRAMS * multiprocessors(x))
        partials = torch.empty(programs, x.shape[-1], dtype=torch.float32, device=x.device)
    launch(
        _backward_rows,
        (programs,),
        *(dy, x, weight, rstd, residual_grad, dx, partials, rows, *strides, float(offset)),
        H=x.shape[-1],
        HEADS=heads,
        STAGES=3 if config["BM"] * width * x.element_size() <= 8192 else 2,
        **config,
    )
    if dweight is not None and partials is not None:
        reduce_partials(partials, dweight)


# Each candidate: numbers of a tile, and of a warp of it. A row that is wider is a tile.
_Sizes = tuple[tuple[int, int], ...]
_FORWARD_SIZES: _Sizes = ((4096, 1024), (4096, 512), (8192, 1024))
_BACKWARD_SIZES: _Sizes = ((4096, 1024), (4096, 512), (2048, 512))
_WEIGHT_SIZES: _Sizes = ((4096, 512), (2048, 512))
_WIDE = [{"BN": 8192, "num_warps": 8}]


def _config(name: str, width: int, sizes: _Sizes, x: Tensor) -> dict[str, int]:
    """A tile of whole rows, `width` columns each, and warps for it."""
    candidates: list[dict[str, int]] = []
    for numbers, per_warp in sizes:
        rows = min(max(numbers // width, 1), _MOST_ROWS)
        warps = min(max(rows * width // per_warp, 1), 32)
        config = {"BM": rows, "BH": width, "num_warps": warps}
        if config not in candidates:
            candidates.append(config)
    return pinned(f"{name}_{width}" + ("_f32" if x.element_size() == 4 else ""), candidates, x)


@triton.jit(do_not_specialize=["rows"])
def _forward(
    x,
    residual,
    weight,
    y,
    total,
    rstd,
    rows,
    x_token,
    x_head,
    residual_token,
    residual_head,
    y_token,
    y_head,
    total_token,
    total_head,
    eps,
    offset,
    H: tl.constexpr,
    HEADS: tl.constexpr,
    BM: tl.constexpr,
    BH: tl.constexpr,
):
    row, column = tl.program_id(0) * BM + tl.arange(0, BM), tl.arange(0, BH)
    inside = (row < rows)[:, None] & (column < H)[None, :]
    z = tl.load(x + tile_offset(row, column, x_token, x_head, HEADS), mask=inside, other=0.0)
    w = tl.load(weight + column, mask=column < H, other=0.0)
    if residual is not None:
        at = tile_offset(row, column, residual_token, residual_head, HEADS)
        more = tl.load(residual + at, mask=inside, other=0.0)
        z = (z.to(tl.float32) + more.to(tl.float32)).to(z.dtype)
        to = total + tile_offset(row, column, total_token, total_head, HEADS)
        tl.store(to, z, mask=inside)
    z = z.to(tl.float32)
    scale = tl.rsqrt(tl.sum(z * z, 1) / H + eps)
    tl.store(rstd + row, scale, mask=row < rows)
    result = z * scale[:, None] * (w.to(tl.float32) + offset)[None, :]
    to = y + tile_offset(row, column, y_token, y_head, HEADS)
    tl.store(to, result.to(y.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["rows"])
def _forward_wide(
    x,
    residual,
    weight,
    y,
    total,
    rstd,
    rows,
    x_token,
    x_head,
    residual_token,
    residual_head,
    y_token,
    y_head,
    total_token,
    total_head,
    eps,
    offset,
    H: tl.constexpr,
    HEADS: tl.constexpr,
    BN: tl.constexpr,
):
    """One row, walked twice; the second time it comes from the L2 cache."""
    row = tl.program_id(0)
    x += row_offset(row, x_token, x_head, HEADS)
    y += row_offset(row, y_token, y_head, HEADS)
    if residual is not None:
        residual += row_offset(row, residual_token, residual_head, HEADS)
        total += row_offset(row, total_token, total_head, HEADS)
    squares = tl.zeros([BN], tl.float32)
    for first in range(0, H, BN):
        column = first + tl.arange(0, BN)
        z = _summed(x, residual, column, column < H)
        if residual is not None:
            tl.store(total + column, z, mask=column < H)
        squares += z.to(tl.float32) * z.to(tl.float32)
    scale = tl.rsqrt(tl.sum(squares, 0) / H + eps)
    tl.store(rstd + row, scale)
    for first in range(0, H, BN):
        column = first + tl.arange(0, BN)
        z = _summed(x, residual, column, column < H).to(tl.float32)
        w = tl.load(weight + column, mask=column < H, other=0.0).to(tl.float32) + offset
        tl.store(y + column, (z * scale * w).to(y.dtype.element_ty), mask=column < H)


@triton.jit
def _summed(x, residual, column, inside):
    """x + residual at `column`, rounded as the sum is when it is stored."""
    z = tl.load(x + column, mask=inside, other=0.0)
    if residual is not None:
        more = tl.load(residual + column, mask=inside, other=0.0)
        z = (z.to(tl.float32) + more.to(tl.float32)).to(z.dtype)
    return z


@triton.jit(do_not_specialize=["rows"])
def _backward_rows(
    dy,
    x,
    weight,
    rstd,
    residual_grad,
    dx,
    partials,
    rows,
    dy_token,
    dy_head,
    x_token,
    x_head,
    residual_token,
    residual_head,
    dx_token,
    dx_head,
    offset,
    H: tl.constexpr,
    HEADS: tl.constexpr,
    STAGES: tl.constexpr,
    BM: tl.constexpr,
    BH: tl.constexpr,
):
    """dx of a tile of BM rows; for a weight gradient of every n-th tile."""
    column = tl.arange(0, BH)
    w = tl.load(weight + column, mask=column < H, other=0.0)
    read = (dy, x, residual_grad, rstd)
    strides = (dy_token, dy_head, x_token, x_head, residual_token, residual_head, dx_token, dx_head)
    if partials is None:
        _backward_tile(read, dx, w, tl.program_id(0) * BM, rows, strides, offset, H, HEADS, BM, BH)
    else:
        total = tl.zeros([BM, BH], tl.float32)
        tiles, step = tl.cdiv(rows, BM), tl.num_programs(0)
        for tile in tl.range(tl.program_id(0), tiles, step, num_stages=STAGES):
            total += _backward_tile(read, dx, w, tile * BM, rows, strides, offset, H, HEADS, BM, BH)
        to = partials + tl.program_id(0).to(tl.int64) * H + column
        tl.store(to, tl.sum(total, 0), mask=column < H)


@triton.jit
def _backward_tile(
    read,
    dx,
    w,
    top,
    rows,
    strides,
    offset,
    H: tl.constexpr,
    HEADS: tl.constexpr,
    BM: tl.constexpr,
    BH: tl.constexpr,
):
    """Writes dx of BM rows from `top` on -> their g x̂, dead code to the compiler unless used."""
    dy, x, residual_grad, rstd = read
    dy_token, dy_head, x_token, x_head, residual_token, residual_head, dx_token, dx_head = strides
    row, column = top + tl.arange(0, BM), tl.arange(0, BH)
    inside = (row < rows)[:, None] & (column < H)[None, :]
    z = tl.load(x + tile_offset(row, column, x_token, x_head, HEADS), mask=inside, other=0.0)
    g = tl.load(dy + tile_offset(row, column, dy_token, dy_head, HEADS), mask=inside, other=0.0)
    if residual_grad is not None:
        at = tile_offset(row, column, residual_token, residual_head, HEADS)
        more = tl.load(residual_grad + at, mask=inside, other=0.0)
    scale = tl.load(rstd + row, mask=row < rows, other=0.0)[:, None]
    normed = z.to(tl.float32) * scale
    product = g.to(tl.float32) * normed
    wide = (w.to(tl.float32) + offset)[None, :]
    mean = tl.sum(product * wide, 1)[:, None] / H
    result = (g.to(tl.float32) * wide - normed * mean) * scale
    if residual_grad is not None:
        result += more.to(tl.float32)
    to = dx + tile_offset(row, column, dx_token, dx_head, HEADS)
    tl.store(to, result.to(dx.dtype.element_ty), mask=inside)
    return product
