"""Gradients of adapters: a wide matrix, transposed, times a few columns, summed over all tokens.

    dA[r, k] = scaling · Σ_t d[t, r] · mask(t, k) · z[t, k]
    dB[n, r] = Σ_t dy[t, n] · tail[t, r]

The wide matrix (x or dY) is read once: that is the limit. A program holds the sum of BN of its
columns with all columns of the narrow one, which the others read again from the L2 cache, and
walks down its slice of the rows, BM at a time, in a pipeline of loads: 64 x 128 numbers a stage
are 16 KB, and three stages under way on each of 132 multiprocessors twice what the memory's
latency asks for. Slices are as many as fill the card once; their float32 sums are added up by a
second launch, in a fixed order. (For R = 16 and K = 4096, four slices: 2 MB beside 67 MB of x.)

For matrix instructions the wide columns are the rows of the product (M = BN = 128), so that on
Hopper the tile goes from shared memory straight into wgmma, transposed on the way. With a norm or
dropout the tile passes through registers first: z = x · rstd · (weight + offset) is rounded to x's
dtype as the forward rounded it, and the mask is drawn again.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastsft_kernels.fused.skinny import NormedInput
from fastsft_kernels.fused.strips import StripDropout
from fastsft_kernels.integers import cdiv, next_power_of_2
from fastsft_kernels.launch import launch, pinned, shared_memory
from fastsft_kernels.triton_ops.philox import keep_mask, mask_arguments, module_of
from fastsft_kernels.triton_ops.reduce import reduce_partials, slices
from fastsft_kernels.triton_ops.rows import side_by_side


def skinny_dA(
    d: Tensor,
    x: Tensor,
    scaling: float = 1.0,
    *,
    norm: NormedInput | None = None,
    dropout: StripDropout | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """See `fastsft_kernels.fused.skinny_dA`."""
    d, x = side_by_side(d), side_by_side(x)
    (rows, k), columns = x.shape, d.shape[1]
    strips = 1 if dropout is None else len(dropout.modules)
    strip = columns // strips
    br, config = _configuration("skinny_dA", x, strip)
    per_strip = cdiv(strip, br)
    blocks = cdiv(k, config["BN"])
    # Masks cost more than the read, and arithmetic balances only over many programs.
    programs = blocks * strips * per_strip // (1 if dropout is None else 4)
    splits, steps = slices(cdiv(rows, config["BM"]), programs, x)
    result = x.new_empty(columns, k, dtype=torch.float32) if out is None else out
    into = result if splits == 1 else x.new_empty(splits, columns, k, dtype=torch.float32)
    rstd, weight, offset = norm if norm is not None else (None, None, 0.0)
    launch(
        _dA,
        (strips * per_strip, blocks, splits),
        *(d, x, into, rows, k, columns, strip, per_strip, steps),
        *(d.stride(0), x.stride(0), into.stride(-2)),
        *(rstd, weight, float(offset), float(scaling)),
        *mask_arguments(dropout),
        NORM=norm is not None,
        DROPOUT=dropout is not None,
        ACCUMULATE=out is not None and splits == 1,
        BR=br,
        **config,
    )
    if splits > 1:
        reduce_partials(into, result, accumulate=out is not None)
    return result


def skinny_dB(
    dy: Tensor,
    tail: Tensor,
    segments: tuple[int, ...] | None = None,
    *,
    out: Tensor | None = None,
) -> Tensor:
    """See `fastsft_kernels.fused.skinny_dB`."""
    dy, tail = side_by_side(dy), side_by_side(tail)
    rows, n = dy.shape
    segments = segments or (n,)
    strip = tail.shape[1] // len(segments)
    br, config = _configuration("skinny_dB", dy, strip)
    per_strip = cdiv(strip, br)
    blocks = sum(cdiv(columns, config["BN"]) for columns in segments)
    splits, steps = slices(cdiv(rows, config["BM"]), blocks * per_strip, dy)
    result = dy.new_empty(n, strip, dtype=torch.float32) if out is None else out
    into = result if splits == 1 else dy.new_empty(splits, n, strip, dtype=torch.float32)
    launch(
        _dB,
        (per_strip, blocks, splits),
        *(dy, tail, into, rows, n, strip, steps),
        *(dy.stride(0), tail.stride(0), into.stride(-2)),
        SEGMENTS=tuple(segments),
        ACCUMULATE=out is not None and splits == 1,
        BR=br,
        **config,
    )
    if splits > 1:
        reduce_partials(into, result, accumulate=out is not None)
    return result


def _configuration(name: str, wide: Tensor, columns: int) -> tuple[int, dict[str, int]]:
    """(columns of the narrow matrix per program, launch configuration)."""
    narrow = max(16, next_power_of_2(columns))
    if wide.dtype == torch.float32:  # products on plain registers: small tiles
        br = min(64, narrow)
        candidates = [{"BM": 16, "BN": 64, "num_warps": 8, "num_stages": 4}]
        return br, pinned(f"{name}_f32_{br}", candidates, wide)
    # 128 x 256 sums spill before Hopper, whose wgmma reads both operands from shared memory.
    memory = shared_memory(wide) // 1024
    br = min(256 if memory > 200 else 128, narrow)
    stages = 4 if memory > 100 or br <= 64 else 3
    candidates = [
        {"BM": 64, "BN": 128, "num_warps": 8, "num_stages": stages},
        {"BM": 32, "BN": 128, "num_warps": 8, "num_stages": stages + 1},
    ]
    if memory < 100:  # a normed tile of 64 rows spills a word on sm_120
        candidates = candidates[1:]
    if br <= 32:  # a quarter of the width fills the card without slices, so without a second launch
        more = 6 if memory > 100 else 4
        candidates.append({"BM": 128, "BN": 32, "num_warps": 4, "num_stages": more})
    return br, pinned(f"{name}_{br}", candidates, wide)


@triton.jit(do_not_specialize=["T", "steps", "seed", "step", "modules", "threshold"])
def _dA(
    d,
    x,
    out,
    T,
    K,
    columns,
    strip_columns,
    blocks_per_strip,
    steps,
    d_stride,
    x_stride,
    out_stride,
    rstd,
    weight,
    offset,
    scaling,
    row_keys,
    seed,
    step,
    modules,
    threshold,
    NORM: tl.constexpr,
    DROPOUT: tl.constexpr,
    ACCUMULATE: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BR: tl.constexpr,
):
    # The strips of one block of columns are neighbours, and share its tiles through the L2 cache.
    strip = tl.program_id(0) // blocks_per_strip
    within = tl.program_id(0) % blocks_per_strip * BR + tl.arange(0, BR)
    k = tl.program_id(1) * BN + tl.arange(0, BN)
    r = strip * strip_columns + within
    first = tl.program_id(2) * steps * BM
    row = (first + tl.arange(0, BM)).to(tl.int64)
    x_tile = x + row[None, :] * x_stride + k[:, None]
    d_tile = d + row[:, None] * d_stride + r[None, :]
    if NORM:
        gain = tl.load(weight + k, mask=k < K, other=0.0).to(tl.float32) + offset
    if DROPOUT:
        module = module_of(modules, strip)
    total = tl.zeros([BN, BR], tl.float32)
    for _ in range(steps):
        token = first + tl.arange(0, BM)
        wide = tl.load(x_tile, mask=(token < T)[None, :] & (k < K)[:, None], other=0.0)
        narrow = tl.load(
            d_tile, mask=(token < T)[:, None] & (within < strip_columns)[None, :], other=0.0
        )
        if NORM:
            scale = tl.load(rstd + token, mask=token < T, other=0.0)
            z = wide.to(tl.float32) * scale[None, :] * gain[:, None]
            wide = z.to(wide.dtype)
        if DROPOUT:
            keys = tl.load(row_keys + token, mask=token < T, other=0)
            start = tl.program_id(1) * BN
            keep = keep_mask(keys, start, seed, step, module, threshold, BN)
            wide = tl.where(tl.trans(keep), wide, 0.0)
        total = tl.dot(wide, narrow, total, input_precision="ieee")
        first += BM
        x_tile += BM * x_stride
        d_tile += BM * d_stride
    total *= scaling
    inside = (k < K)[:, None] & (within < strip_columns)[None, :]
    target = out + (tl.program_id(2).to(tl.int64) * columns + r)[None, :] * out_stride + k[:, None]
    if ACCUMULATE:
        total += tl.load(target, mask=inside, other=0.0)
    tl.store(target, total, mask=inside)


@triton.jit(do_not_specialize=["T", "steps"])
def _dB(
    dy,
    tail,
    out,
    T,
    N,
    strip_columns,
    steps,
    dy_stride,
    tail_stride,
    out_stride,
    SEGMENTS: tl.constexpr,
    ACCUMULATE: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BR: tl.constexpr,
):
    # Which segment this block of columns belongs to, where it begins and where the segment ends.
    block = tl.program_id(1)
    begin = block * BN
    end = SEGMENTS[0]
    strip = 0
    blocks_before = (SEGMENTS[0] + BN - 1) // BN
    columns_before = SEGMENTS[0]
    for i in tl.static_range(1, len(SEGMENTS)):
        here = block >= blocks_before
        begin = tl.where(here, columns_before + (block - blocks_before) * BN, begin)
        end = tl.where(here, columns_before + SEGMENTS[i], end)
        strip = tl.where(here, i, strip)
        blocks_before += (SEGMENTS[i] + BN - 1) // BN
        columns_before += SEGMENTS[i]
    n = begin + tl.arange(0, BN)
    within = tl.program_id(0) * BR + tl.arange(0, BR)
    first = tl.program_id(2) * steps * BM
    row = (first + tl.arange(0, BM)).to(tl.int64)
    dy_tile = dy + row[None, :] * dy_stride + n[:, None]
    tail_tile = tail + row[:, None] * tail_stride + (strip * strip_columns + within)[None, :]
    total = tl.zeros([BN, BR], tl.float32)
    for _ in range(steps):
        token = first + tl.arange(0, BM)
        wide = tl.load(dy_tile, mask=(token < T)[None, :] & (n < end)[:, None], other=0.0)
        narrow = tl.load(
            tail_tile, mask=(token < T)[:, None] & (within < strip_columns)[None, :], other=0.0
        )
        total = tl.dot(wide, narrow, total, input_precision="ieee")
        first += BM
        dy_tile += BM * dy_stride
        tail_tile += BM * tail_stride
    inside = (n < end)[:, None] & (within < strip_columns)[None, :]
    target = out + (tl.program_id(2).to(tl.int64) * N + n)[:, None] * out_stride + within[None, :]
    if ACCUMULATE:
        total += tl.load(target, mask=inside, other=0.0)
    tl.store(target, total, mask=inside)
