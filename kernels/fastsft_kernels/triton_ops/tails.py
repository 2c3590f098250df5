"""The tails of all strips, t = scaling · (mask_i ∘ x) a_iᵀ: a tall product of few columns.

Each program multiplies BM rows of x by up to BN rows of `a`, all strips at once, so x is read from
memory once; `a` (131 KB for 16 rows of 4096) comes from the L2 cache. The limit is one read of x:
16 us for 8192 x 4096 numbers of bf16 at 4.3 TB/s. By Little's law (700 ns) that takes 3 MB in
flight, 23 KB for each of 132 multiprocessors; 64 rows by 128 columns in four stages, three of
them under way, are 48 KB.

8192 tokens make 128 programs of 64 rows. Fewer tokens would leave multiprocessors idle, so K is
then cut into as many slices as fill them, each slice writing float32 partial sums which a second
launch adds up: no atomics, the same bits in every run.

With dropout each strip has a mask of its own, so a program works for one strip, and the programs
of one block of rows, being neighbours, read x from the L2 cache. The masks then cost more than the
read: about 12 integer instructions a number.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastsft_kernels.fused.strips import StripDropout
from fastsft_kernels.integers import cdiv, next_power_of_2
from fastsft_kernels.launch import launch, pinned, shared_memory
from fastsft_kernels.triton_ops.philox import keep_mask, mask_arguments, module_of
from fastsft_kernels.triton_ops.reduce import reduce_partials, slices
from fastsft_kernels.triton_ops.rows import side_by_side


def tails(
    x: Tensor,
    a: Tensor,
    scaling: float,
    *,
    dropout: StripDropout | None = None,
    out: Tensor | None = None,
    copy: Tensor | None = None,
) -> Tensor:
    """See `fastsft_kernels.fused.tails`."""
    x, a = side_by_side(x), side_by_side(a)
    (rows, k), columns = x.shape, a.shape[0]
    if out is None:
        # Rows at a multiple of 16 numbers, so that a rank of 8 is still read in whole vectors.
        out = x.new_empty(rows, -(-columns // 16) * 16)[:, :columns]
    strips = 1 if dropout is None else len(dropout.modules)
    strip, padding = columns // strips, out.shape[1] - columns
    bn = min(_widest(x), max(16, next_power_of_2(strip + padding)))
    config = pinned(
        f"tails_{bn}" + ("_f32" if x.dtype == torch.float32 else ""), _candidates(x, bn), x
    )
    blocks = cdiv(rows, config["BM"])
    per_strip = cdiv(strip + padding, bn)
    splits, steps = slices(cdiv(k, config["BK"]), blocks * strips * per_strip, x)
    into = out
    if splits > 1:
        into = x.new_empty(splits, rows, columns + padding, dtype=torch.float32)
    launch(
        _tails,
        (strips * per_strip, blocks, splits),
        *(x, a, into, None if splits > 1 else copy, rows, k, strip, padding, per_strip, steps),
        *(x.stride(0), a.stride(0), into.stride(-2), float(scaling)),
        *mask_arguments(dropout),
        DROPOUT=dropout is not None,
        BN=bn,
        **config,
    )
    return out if splits == 1 else reduce_partials(into, out, copy=copy)


def _widest(x: Tensor) -> int:
    """Columns of a program's tile: float32 products run on plain registers, so theirs are small."""
    return 64 if x.dtype == torch.float32 else 256


def _candidates(x: Tensor, bn: int) -> list[dict[str, int]]:
    if x.dtype == torch.float32:
        return [{"BM": 32, "BK": 16, "num_warps": 4, "num_stages": 4}]
    memory = shared_memory(x) // 1024
    if bn <= 64:
        stages = 4 if memory > 100 or bn <= 32 else 3
        narrow = [
            {"BM": 64, "BK": 128, "num_warps": 4, "num_stages": stages},
            {"BM": 32, "BK": 128, "num_warps": 4, "num_stages": stages},
        ]
        wide = {"BM": 128, "BK": 64, "num_warps": 8, "num_stages": stages}
        return [*narrow, wide] if memory > 200 else narrow
    if memory < 200:  # without wgmma the operands take registers too: half the sums
        return [{"BM": 64, "BK": 64, "num_warps": 8, "num_stages": 4 if memory > 100 else 3}]
    return [
        {"BM": 128, "BK": 64, "num_warps": 8, "num_stages": 3},
        {"BM": 64, "BK": 64, "num_warps": 8, "num_stages": 3},
    ]


@triton.jit(do_not_specialize=["T", "steps", "seed", "step", "modules", "threshold"])
def _tails(
    x,
    a,
    out,
    copy,
    T,
    K,
    strip_columns,
    padding,
    blocks_per_strip,
    steps,
    x_stride,
    a_stride,
    out_stride,
    scaling,
    row_keys,
    seed,
    step,
    modules,
    threshold,
    DROPOUT: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    strip = tl.program_id(0) // blocks_per_strip
    within = tl.program_id(0) % blocks_per_strip * BN + tl.arange(0, BN)
    row = tl.program_id(1) * BM + tl.arange(0, BM)
    near = tl.minimum(row, T - 1)  # rows beyond the end read the last one again, unmasked
    column = strip * strip_columns + within
    k = tl.program_id(2) * steps * BK + tl.arange(0, BK)
    x_tile = x + near.to(tl.int64)[:, None] * x_stride + k[None, :]
    a_tile = a + column.to(tl.int64)[:, None] * a_stride + k[None, :]
    if DROPOUT:
        keys = tl.load(row_keys + near)
        module = module_of(modules, strip)
    total = tl.zeros([BM, BN], tl.float32)
    first = tl.program_id(2) * steps * BK
    for _ in range(steps):
        inside = (first + tl.arange(0, BK))[None, :] < K
        left = tl.load(x_tile, mask=inside, other=0.0)
        right = tl.load(a_tile, mask=inside & (within < strip_columns)[:, None], other=0.0)
        if DROPOUT:
            keep = keep_mask(keys, first, seed, step, module, threshold, BK)
            left = tl.where(keep, left, 0.0)
        total = tl.dot(left, tl.trans(right), total, input_precision="ieee")
        x_tile += BK
        a_tile += BK
        first += BK
    # Behind the last strip's columns the sums are zero: nothing of `a` was read there.
    last = (strip + 1) * blocks_per_strip == tl.num_programs(0)
    width = strip_columns + tl.where(last, padding, 0)
    place = (tl.program_id(2).to(tl.int64) * T + row)[:, None]
    number = (total * scaling).to(out.dtype.element_ty)
    inside = row[:, None] < T
    target = out + place * out_stride + column[None, :]
    tl.store(target, number, mask=inside & (within[None, :] < width))
    if copy is not None:
        all_columns = tl.num_programs(0) // blocks_per_strip * strip_columns
        target = copy + place * all_columns + column[None, :]
        tl.store(target, number, mask=inside & (within[None, :] < strip_columns))
