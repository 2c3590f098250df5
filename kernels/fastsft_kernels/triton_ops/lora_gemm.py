"""A matrix product that adds a low-rank product and a bias before its only store.

    out = left · right + mask ∘ (tail · factor) + bias

    forward    left x [T, K],  right Wᵀ (W [N, K]),  tail s·xAᵀ [T, R],  factor Bᵀ (B [N, R])
    backward   left dY [T, N], right W [N, K],       tail s·dY·B [T, R], factor A [R, K]

As an operation of its own the low-rank part reads and writes `out` once more: 110 us for
8192 x 14336 numbers of bf16 at 4.3 TB/s, beside the product's 1.2 ms. Here it costs R / K of the
product's arithmetic, 0.4 % for R = 16, and a wait of under 1 us at the start of each 45 us tile:
the low-rank product is made first, masked if there is dropout, and the sums of the large product
go on top of it, so that nothing needs a second set of registers. 9 % is the most there is to win,
so this pays only where the product itself is within 9 % of cuBLAS: which of the two runs is a
matter of measurement (`lora.lora_linear`).

One program makes a tile of 128 x 256. Tiles are visited in groups of 8 rows of tiles: the 132
that run at a time then share their operands in the L2 cache (8 x 17 tiles read 44 MB for K = 4096;
in plain order 2.4 x 56 would read 119 MB). On Hopper and sm_100 the tensor copy engine fetches the
tiles, where addresses and pitches are multiples of 16 bytes; elsewhere plain asynchronous copies do.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from fastsft_kernels.fused.strips import StripDropout
from fastsft_kernels.integers import cdiv, next_power_of_2
from fastsft_kernels.launch import capability, launch, pinned, shared_memory
from fastsft_kernels.triton_ops.philox import keep_mask, mask_arguments


def lora_gemm(
    left: Tensor,
    right: Tensor,
    *,
    transposed: bool,
    tail: Tensor | None = None,
    factor: Tensor | None = None,
    bias: Tensor | None = None,
    dropout: StripDropout | None = None,
) -> Tensor:
    """left [M, K] · right [K, N] + mask ∘ (tail [M, R] · factor [R, N]) + bias [N] -> [M, N].

    transposed: `right` is given as [N, K] and `factor` as [N, R]. All of one dtype, last
    dimensions contiguous. dropout: of one strip; its mask has the shape of the result.
    """
    (m, k), n = left.shape, right.shape[0 if transposed else 1]
    rank = 0 if tail is None else tail.shape[1]
    masked = dropout is not None
    name = "lora_gemm_" + ("nt" if transposed else "nn") + ("_masked" if masked else "")
    name += "_f32" if left.dtype == torch.float32 else ""
    config = pinned(name, _candidates(left, masked), left)
    bm, bn, bk = config["BM"], config["BN"], config["BK"]
    sides: tuple[Any, Any] = (left, right)
    # Cards with the copy engine but little shared memory (sm_120) do without: Triton 3.6 spills.
    roomy = capability(left) >= 90 and shared_memory(left) > 1024 * 200
    descriptors = roomy and all(map(_describable, sides))
    if descriptors:
        blocks = ([bm, bk], [bn, bk] if transposed else [bk, bn])
        sides = tuple(
            TensorDescriptor.from_tensor(s, b) for s, b in zip(sides, blocks, strict=True)
        )
    out = left.new_empty(m, n)
    launch(
        _gemm,
        (cdiv(m, bm) * cdiv(n, bn),),
        *(*sides, out, tail, factor, bias, m, n, k, rank, left.stride(0), right.stride(0)),
        *(0 if matrix is None else matrix.stride(0) for matrix in (tail, factor)),
        *mask_arguments(dropout),
        TRANSPOSED=transposed,
        DESCRIPTORS=descriptors,
        DROPOUT=masked,
        EVEN_K=k % bk == 0,
        BR=0 if rank == 0 else min(bk, max(16, next_power_of_2(rank))),
        **config,
    )
    return out


def _describable(matrix: Tensor) -> bool:
    """Whether the tensor copy engine can read it: rows apart, each at a multiple of 16 bytes."""
    pitch, size = matrix.stride(0), matrix.element_size()
    apart = pitch >= matrix.shape[1] > 0 and matrix.shape[0] > 0
    return apart and matrix.data_ptr() % 16 == 0 and pitch * size % 16 == 0 and size == 2


def _candidates(x: Tensor, masked: bool) -> list[dict[str, int]]:
    if x.dtype == torch.float32:
        return [{"BM": 128, "BN": 64, "BK": 16, "GROUP": 8, "num_warps": 8, "num_stages": 4}]
    memory = shared_memory(x)
    tile = {"BM": 128, "BN": 128, "BK": 64, "GROUP": 8, "num_warps": 8, "num_stages": 3}
    if memory < 1024 * 100:  # sums of 128 x 128 spill on sm_120
        return [tile | ({"BN": 64} if capability(x) >= 120 else {"BK": 32, "num_stages": 4})]
    if memory < 1024 * 200 or masked:  # masks of 128 x 256 take all 255 registers
        return [tile, tile | {"BK": 32, "num_stages": 4}]
    return [
        tile | {"BN": 256, "num_stages": 4},
        tile | {"BN": 256, "num_stages": 3},
        tile | {"num_stages": 4},
    ]


@triton.jit(do_not_specialize=["M", "seed", "step", "modules", "threshold"])
def _gemm(
    left,
    right,
    out,
    tail,
    factor,
    bias,
    M,
    N,
    K,
    R,
    left_stride,
    right_stride,
    tail_stride,
    factor_stride,
    row_keys,
    seed,
    step,
    modules,
    threshold,
    TRANSPOSED: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    DROPOUT: tl.constexpr,
    EVEN_K: tl.constexpr,
    BR: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    GROUP: tl.constexpr,
):
    tile = tl.program_id(0)
    rows, columns = tl.cdiv(M, BM), tl.cdiv(N, BN)
    group = tile // (GROUP * columns)
    height = tl.minimum(rows - group * GROUP, GROUP)
    within = tile % (GROUP * columns)
    first_row = (group * GROUP + within % height) * BM
    first_column = within // height * BN
    row = first_row + tl.arange(0, BM)
    column = first_column + tl.arange(0, BN)
    near = tl.minimum(row, M - 1).to(tl.int64)  # rows beyond the end read the last one again
    k = tl.arange(0, BK)

    total = tl.zeros([BM, BN], tl.float32)
    if BR > 0:
        r = tl.arange(0, BR)
        for _ in tl.range(tl.cdiv(R, BR), num_stages=1):
            place = tail + near[:, None] * tail_stride + r[None, :]
            low = tl.load(place, mask=(r < R)[None, :], other=0.0)
            if TRANSPOSED:
                inside = (column < N)[:, None] & (r < R)[None, :]
                place = factor + column.to(tl.int64)[:, None] * factor_stride + r[None, :]
                high = tl.trans(tl.load(place, mask=inside, other=0.0))
            else:
                inside = (r < R)[:, None] & (column < N)[None, :]
                place = factor + r.to(tl.int64)[:, None] * factor_stride + column[None, :]
                high = tl.load(place, mask=inside, other=0.0)
            total = tl.dot(low, high, total, input_precision="ieee")
            r += BR
    if DROPOUT:
        keys = tl.load(row_keys + near)
        keep = keep_mask(keys, first_column, seed, step, modules[0], threshold, BN)
        total = tl.where(keep, total, 0.0)

    if not DESCRIPTORS:
        left_tile = left + near[:, None] * left_stride + k[None, :]
        if TRANSPOSED:
            near_column = tl.minimum(column, N - 1).to(tl.int64)
            right_tile = right + near_column[:, None] * right_stride + k[None, :]
        else:
            right_tile = right + k.to(tl.int64)[:, None] * right_stride + column[None, :]
    first = 0
    for _ in range(tl.cdiv(K, BK)):
        if DESCRIPTORS:
            a = left.load([first_row, first])
            if TRANSPOSED:
                b = tl.trans(right.load([first_column, first]))
            else:
                b = right.load([first, first_column])
        else:
            inside = EVEN_K | (first + k < K)
            a = tl.load(left_tile, mask=inside[None, :], other=0.0)
            left_tile += BK
            if TRANSPOSED:
                b = tl.trans(tl.load(right_tile, mask=inside[None, :], other=0.0))
                right_tile += BK
            else:
                inside = inside[:, None] & (column < N)[None, :]
                b = tl.load(right_tile, mask=inside, other=0.0)
                right_tile += BK * right_stride
        total = tl.dot(a, b, total, input_precision="ieee")
        first += BK

    if bias is not None:
        total += tl.load(bias + column, mask=column < N, other=0.0).to(tl.float32)[None, :]
    inside = (row < M)[:, None] & (column < N)[None, :]
    place = out + row.to(tl.int64)[:, None] * N + column[None, :]
    tl.store(place, total.to(out.dtype.element_ty), mask=inside)
