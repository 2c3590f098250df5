"""delta, the row sum of do ∘ o per head, on the way adding the output projection's adapters to do.

A program has BM tokens of one head. With adapters it first adds scaling · mask ∘ (d·a) to its tile
of do and writes that back: the base product leaves do without the adapters' part, and this kernel
reads do anyway. The sum is of do as written, rounded, since that is what the backward will read.
One read of o and do (and one write of do); the rows of d come from L2 once per head.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastsft_kernels.fused.strips import Adapters
from fastsft_kernels.integers import cdiv
from fastsft_kernels.launch import launch, pinned
from fastsft_kernels.triton_ops.attention_tiles import padded
from fastsft_kernels.triton_ops.philox import keep_mask, mask_arguments
from fastsft_kernels.triton_ops.rows import side_by_side


def attention_delta(o: Tensor, do: Tensor, *, adapters: Adapters | None = None) -> Tensor:
    """See `fastsft_kernels.fused.attention_delta`."""
    tokens, heads, size = o.shape
    delta = torch.empty((heads, tokens), dtype=torch.float32, device=o.device)
    term, rank, depth = (None, None, (0, 0), 0.0, *mask_arguments(None)), 0, 16
    name = "attention_delta"
    if adapters is not None:
        d, a = side_by_side(adapters.d), side_by_side(adapters.a)
        rank, name = d.shape[1], "attention_delta_adapters"
        widest = 16 if o.dtype == torch.float32 else 64  # float32 products unroll into registers
        depth = min(rank & -rank, widest)
        strides = (d.stride(0), a.stride(0))
        term = (d, a, strides, float(adapters.scaling), *mask_arguments(adapters.dropout))
    config = _config(name, o)
    launch(
        _delta,
        (cdiv(tokens, config["BM"]) * heads,),
        *(o, do, delta, (o.stride(0), o.stride(1), do.stride(0), do.stride(1)), tokens, *term),
        HEADS=heads,
        D=size,
        DP=padded(o),
        R=rank,
        BR=depth,
        **config,
    )
    return delta


def _config(name: str, o: Tensor) -> dict[str, int]:
    """Tiles of 8192 numbers. Alone, a program of 4 warps keeps 34 registers a thread and 15 of them
    fit a multiprocessor; with adapters the sum takes 160, or 93 over 8 warps.
    """
    if o.dtype == torch.float32:
        return pinned(f"{name}_f32", [{"BM": max(16, 2048 // padded(o)), "num_warps": 4}], o)
    rows = max(16, 8192 // padded(o))
    candidates = [{"BM": rows, "num_warps": warps} for warps in (4, 8)]
    if name.endswith("adapters"):
        candidates.reverse()
    return pinned(f"{name}_d{padded(o)}", candidates, o)


@triton.jit(do_not_specialize=["tokens", "seed", "step"])
def _delta(
    o,
    do,
    delta,
    strides,
    tokens,
    d,
    a,
    term_strides,
    scaling,
    row_keys,
    seed,
    step,
    modules,
    threshold,
    HEADS: tl.constexpr,
    D: tl.constexpr,
    DP: tl.constexpr,
    R: tl.constexpr,
    BR: tl.constexpr,
    BM: tl.constexpr,
):
    head = (tl.program_id(0) % HEADS).to(tl.int64)
    row = tl.program_id(0) // HEADS * BM + tl.arange(0, BM)
    column = tl.arange(0, DP)[None, :]
    known = row < tokens
    inside = known[:, None] & (column < D)
    token = row.to(tl.int64)[:, None]
    do += head * strides[3] + token * strides[2] + column
    grad = tl.load(do, mask=inside, other=0.0)
    out = tl.load(o + head * strides[1] + token * strides[0] + column, mask=inside, other=0.0)
    if R > 0:
        total = tl.zeros([BM, DP], tl.float32)
        a += head * D + column
        d += token * term_strides[0]
        for r in range(0, R, BR):
            k = r + tl.arange(0, BR)
            left = tl.load(d + k[None, :], mask=known[:, None], other=0.0)
            at = k.to(tl.int64)[:, None] * term_strides[1]
            right = tl.load(a + at, mask=column < D, other=0.0)
            total = tl.dot(left, right, total, input_precision="ieee")
        if row_keys is not None:
            keys = tl.load(row_keys + row, mask=known, other=0)
            keep = keep_mask(keys, head * D, seed, step, modules[0], threshold, DP)
            total = tl.where(keep, total, 0.0)
        grad = (grad.to(tl.float32) + total * scaling).to(grad.dtype)
        tl.store(do, grad, mask=inside)
    sums = tl.sum(grad.to(tl.float32) * out.to(tl.float32), 1)
    tl.store(delta + head * tokens + row, sums, mask=known)
