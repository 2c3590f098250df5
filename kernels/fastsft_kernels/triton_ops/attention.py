"""Attention over packed documents: the forward kernel, and the differentiable op.

FlashAttention-2's loop (Dao, https://arxiv.org/abs/2307.08691): a program holds BM query rows of
one head and walks over the keys they see, BN at a time, carrying for each row the largest score,
the sum of exponentials and the weighted sum of values. Key blocks that every row sees in full run
without a mask; those cut by the diagonal, by the window's edge or by the end of the document come
first, in a loop of their own. Blocks outside the window are not visited. The log-sum-exp of each
row is kept for the backward (`attention_backward`), natural logarithm, float32 [Hq, T].

Per key block of 128 and 128 rows, at D = 128 on Hopper, each of eight warps issues some 525
instructions in the main loop, 16 of them matrix products: about half the time the products take.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastsft_kernels.fused.attention import AttentionOptions
from fastsft_kernels.launch import launch
from fastsft_kernels.triton_ops.attention_backward import attention_backward
from fastsft_kernels.triton_ops.attention_delta import attention_delta
from fastsft_kernels.triton_ops.attention_tiles import (
    LN2,
    Table,
    bend,
    configuration,
    load_tile,
    locate,
    rows_and_mask,
    seen_keys,
    sees,
    shared_arguments,
)
from fastsft_kernels.triton_ops.rows import side_by_side

_TABLE: Table = {
    "90": {
        64: [(128, 128, 8, 3), (128, 64, 4, 3), (128, 64, 8, 3)],
        128: [(128, 128, 8, 2), (128, 64, 8, 3), (64, 64, 4, 2)],
        256: [(128, 64, 8, 2), (128, 32, 8, 2)],
    },
    "100": {
        64: [(128, 128, 8, 3), (128, 64, 4, 3), (128, 64, 8, 3)],
        128: [(128, 64, 8, 3), (128, 64, 8, 2), (64, 64, 4, 2)],
        256: [(128, 32, 8, 2), (64, 64, 8, 2)],
    },
    "80": {
        64: [(128, 64, 4, 3), (128, 64, 8, 3), (64, 64, 4, 3)],
        128: [(128, 64, 8, 3), (64, 64, 4, 2), (128, 32, 8, 3)],
        256: [(64, 64, 8, 2), (64, 32, 8, 2)],
    },
    "small": {
        64: [(128, 64, 8, 3)],
        128: [(128, 64, 8, 2), (128, 32, 8, 3)],
        256: [(64, 32, 8, 2), (32, 32, 4, 2)],
    },
    "float32": {64: [(32, 32, 4, 2)], 128: [(32, 16, 4, 2)], 256: [(32, 16, 8, 2)]},
}


class _VarlenAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, options: AttentionOptions
    ) -> Tensor:
        o, lse = attention_forward(q, k, v, cu_seqlens, options)
        ctx.save_for_backward(q, k, v, o, lse, cu_seqlens)
        ctx.options = options
        return o

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, do: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, o, lse, cu_seqlens = ctx.saved_tensors
        do = side_by_side(do)
        delta = attention_delta(o, do)
        grads = attention_backward(do, q, k, v, lse, delta, cu_seqlens, ctx.options)
        return (*grads, None, None)


def varlen_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    *,
    causal: bool = True,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
    lengths: Sequence[int] | None = None,
    blocks: Tensor | None = None,
) -> Tensor:
    """See `fastsft_kernels.varlen_attention`; `max_seqlen` and `lengths` are not needed."""
    options = AttentionOptions(max_seqlen, causal, scale, window, softcap, blocks)
    return _VarlenAttention.apply(*map(side_by_side, (q, k, v)), cu_seqlens, options)


def attention_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    options: AttentionOptions,
    *,
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """See `fastsft_kernels.fused.attention_forward`."""
    tokens, heads, _ = q.shape
    o = torch.empty(q.shape, dtype=q.dtype, device=q.device) if out is None else out
    lse = torch.empty((heads, tokens), dtype=torch.float32, device=q.device)
    if tokens:
        config = configuration("attention_forward", _TABLE, q, options, "BN")
        programs, arguments, constants = shared_arguments(q, k, cu_seqlens, options, config["BM"])
        strides = tuple(x.stride(i) for x in (q, k, v, o) for i in (0, 1))
        pointers = (q, k, v, o, lse, strides, tokens)
        launch(_forward, (programs * heads,), *pointers, *arguments, **constants, **config)
    return o, lse


@triton.jit(do_not_specialize=["tokens", "programs", "documents", "steps"])
def _forward(
    q,
    k,
    v,
    o,
    lse,
    strides,
    tokens,
    cu_seqlens,
    blocks,
    programs,
    documents,
    steps,
    scores,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    DP: tl.constexpr,
    CAUSAL: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    q_token, q_head, k_token, k_head, v_token, v_head, o_token, o_head = strides
    head = (tl.program_id(0) % HEADS).to(tl.int64)
    program = tl.program_id(0) // HEADS
    if blocks is None:
        program = programs - 1 - program  # the last rows of a document see the most keys
    start, length, first = locate(cu_seqlens, blocks, program, documents, steps, BM)
    if first >= length:
        return
    row, column, inside = rows_and_mask(first, length, D, DP, BM)
    q += (start + first) * q_token + head * q_head
    queries = tl.load(q + row * q_token + column, mask=inside, other=0.0)
    k += start * k_token + head // GROUP * k_head
    v += start * v_token + head // GROUP * v_head

    begin, full_begin, full_end, end = seen_keys(first, length, scores[2], BM, BN, CAUSAL)
    left = (full_begin - begin) // BN
    gap = full_end - full_begin
    cut = left + tl.cdiv(end - full_end, BN)
    peak = tl.full([BM], float("-inf"), tl.float32)
    sums = tl.zeros([BM], tl.float32)
    acc = tl.zeros([BM, DP], tl.float32)
    given = (queries, k, v, k_token, v_token, first, length, scores)
    acc, peak, sums = _attend(
        acc, peak, sums, given, begin, left, gap, cut, D, DP, BM, BN, CAUSAL, True
    )
    acc, peak, sums = _attend(
        acc, peak, sums, given, full_begin, 0, 0, gap // BN, D, DP, BM, BN, CAUSAL, False
    )

    # The mask is made again, from scalars and by another comparison that the compiler does not
    # know to be the same: carried through the loops, it costs registers that spill at 255.
    inside = (first + row < length) & (column < D)
    o += (start + first) * o_token + head * o_head
    tl.store(o + row * o_token + column, (acc / sums[:, None]).to(o.dtype.element_ty), mask=inside)
    row = first + tl.arange(0, BM)
    lse += head * tokens + start + row
    tl.store(lse, (peak + tl.log2(sums)) * LN2, mask=row < length)


@triton.jit
def _attend(
    acc,
    peak,
    sums,
    given,
    begin,
    left,
    gap,
    count,
    D: tl.constexpr,
    DP: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    CAUSAL: tl.constexpr,
    CUT: tl.constexpr,
):
    """`count` key blocks from key `begin` on; behind the first `left` of them lie `gap` keys to skip."""
    queries, k, v, k_token, v_token, first, length, scores = given
    scale, cap, window = scores
    key = tl.arange(0, BN)
    column = tl.arange(0, DP)[None, :]
    k_tile = key[:, None] * k_token + column
    v_tile = key[:, None] * v_token + column
    k_token = tl.cast(k_token, tl.int64)
    v_token = tl.cast(v_token, tl.int64)
    for block in range(count):
        n = begin + block * BN
        inside = column < D
        if CUT:
            n += tl.where(block < left, 0, gap)
            inside = inside & (key[:, None] < length - n)
        keys = load_tile(k + n * k_token, k_tile, inside, CUT or D < DP)
        values = load_tile(v + n * v_token, v_tile, inside, CUT or D < DP)
        s = tl.dot(queries, tl.trans(keys), input_precision="ieee")
        slope = scale
        if cap is not None:
            s, _ = bend(s, scale, cap)
            slope = 1.0
        if CUT:
            row = first - n + tl.arange(0, BM)
            visible = sees(row[:, None], key[None, :], length - n, window, CAUSAL)
            s = tl.where(visible, s, float("-inf"))
        largest = tl.maximum(peak, tl.max(s, 1) * slope)
        shift = largest
        if CUT:  # a row may have seen nothing yet: exp2(-inf - 0) is 0, exp2(-inf + inf) is not
            shift = tl.where(largest == float("-inf"), 0.0, largest)
        p = tl.exp2(s * slope - shift[:, None])
        fade = tl.exp2(peak - shift)
        sums = sums * fade + tl.sum(p, 1)
        acc = acc * fade[:, None]
        acc = tl.dot(p.to(values.dtype), values, acc, input_precision="ieee")
        peak = largest
    return acc, peak, sums
