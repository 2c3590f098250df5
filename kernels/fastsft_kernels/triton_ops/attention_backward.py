"""Attention backward over packed documents: one kernel for dk and dv, one for dq.

With P = exp(S - lse) and dP = do·vᵀ the gradients are dv = Pᵀ·do, dS = P ∘ (dP - delta),
dk = scale · dSᵀ·q, dq = scale · dS·k, where delta is the row sum of do ∘ o (`attention_delta`); a
soft-cap multiplies dS by 1 - tanh². Each kernel makes S and dP for itself: 7 products where one
kernel would need 5. That one would have to add up dq over key blocks, by atomics (another result
in every run) or in turn (programs that wait for each other); or store it once per key block, at 4k
tokens 16 times dq's size on average. Storing dS instead costs as much time as the two products.

dk, dv: a program has BN keys of one key head and walks over the queries that see them, in every
head of the group, so that dk and dv are summed in registers and written once. The scores are held
transposed, [keys, queries]: P and dS are then the left operands of their products and come from
registers. dP is issued before the exponentials, which run while it is being made, and dS while dv
is. Query blocks cut by the diagonal, the window's edge or the end of the document come first, of
all heads, then the whole ones, which need no mask. Rows behind the end of a document are read as
zeros, lse and delta too: then P = 1, and they add nothing since do = 0, dP = 0. Heads of 256 take
two launches on sm_90, one for dk and one for dv (8 products): a program with 64 keys would hold
both sums, but its two warpgroups would each make all of S and dP, and 128 keys fill the registers
with one sum.

dq: a program has BM rows of one head and walks over keys as the forward does. Both kernels are
deterministic: every sum has one order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastsft_kernels.fused.attention import AttentionOptions
from fastsft_kernels.launch import capability, launch
from fastsft_kernels.triton_ops.attention_tiles import (
    LOG2E,
    Table,
    bend,
    configuration,
    load_tile,
    locate,
    padded,
    rows_and_mask,
    score_scale,
    seen_keys,
    sees,
    shared_arguments,
)

_KEYS: Table = {
    "90": {
        64: [(64, 128, 8, 2), (64, 64, 4, 2), (64, 128, 8, 3)],
        128: [(64, 128, 8, 2), (64, 128, 8, 3), (32, 128, 8, 2)],
    },
    "100": {
        64: [(64, 128, 8, 2), (64, 64, 4, 2)],
        128: [(64, 128, 8, 2), (64, 64, 4, 2)],
        256: [(32, 64, 8, 2), (32, 32, 8, 2)],
    },
    "80": {
        64: [(64, 128, 8, 2), (64, 64, 4, 2)],
        128: [(64, 64, 8, 2), (32, 64, 4, 2)],
        256: [(32, 64, 8, 2), (32, 32, 8, 2)],
    },
    "small": {
        64: [(64, 128, 8, 2), (64, 64, 4, 2)],
        128: [(64, 64, 8, 2), (32, 64, 4, 2)],
        256: [(32, 32, 8, 2), (16, 32, 8, 2)],
    },
    "float32": {64: [(32, 32, 8, 2)], 128: [(16, 16, 4, 2)], 256: [(16, 16, 8, 2)]},
}
_DK_ALONE: Table = {"90": {256: [(32, 128, 8, 2), (16, 128, 8, 2)]}}
_DV_ALONE: Table = {"90": {256: [(64, 128, 8, 2), (32, 128, 8, 2)]}}
_QUERIES: Table = {
    "90": {
        64: [(128, 128, 8, 2), (128, 64, 8, 2), (64, 64, 4, 2)],
        128: [(128, 64, 8, 2), (128, 64, 8, 3), (64, 64, 4, 2)],
        256: [(128, 32, 8, 2), (128, 16, 8, 2)],
    },
    "100": {
        64: [(128, 128, 8, 2), (128, 64, 4, 2)],
        128: [(128, 64, 4, 2), (128, 32, 8, 2)],
        256: [(64, 32, 8, 2), (64, 32, 4, 2)],
    },
    "80": {
        64: [(128, 64, 8, 2), (64, 64, 4, 2)],
        128: [(128, 32, 8, 2), (64, 64, 8, 2)],
        256: [(64, 32, 8, 2), (32, 32, 8, 2)],
    },
    "small": {
        64: [(128, 64, 8, 2), (64, 64, 4, 2)],
        128: [(128, 32, 8, 2), (64, 64, 8, 2)],
        256: [(32, 32, 8, 2), (64, 16, 8, 2)],
    },
    "float32": {64: [(32, 32, 4, 2)], 128: [(32, 16, 4, 2)], 256: [(16, 16, 8, 2)]},
}


def attention_backward(
    do: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lse: Tensor,
    delta: Tensor,
    cu_seqlens: Tensor,
    options: AttentionOptions,
    *,
    out: tuple[Tensor, Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """See `fastsft_kernels.fused.attention_backward`."""
    if out is None:
        out = tuple(torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))  # type: ignore[assignment]
    dq, dk, dv = out  # type: ignore[misc]
    if not q.shape[0]:
        return dq, dk, dv
    assert lse.is_contiguous() and delta.is_contiguous()
    inputs = (q, k, v, do, lse, delta)

    strides = tuple(x.stride(i) for x in (q, k, v, do, dk, dv) for i in (0, 1))
    keys_own = (dk, dv, strides, q.shape[0], score_scale(q, options))
    for name, table, wanted in _key_passes(q):
        config = configuration(name, table, q, options, "BM") | wanted
        programs, arguments, constants = shared_arguments(q, k, cu_seqlens, options, config["BN"])
        grid = (programs * k.shape[1],)
        launch(_key_gradients, grid, *inputs, *keys_own, *arguments, **constants, **config)

    config = configuration("attention_backward_queries", _QUERIES, q, options, "BN")
    programs, arguments, constants = shared_arguments(q, k, cu_seqlens, options, config["BM"])
    strides = tuple(x.stride(i) for x in (q, k, v, do, dq) for i in (0, 1))
    own = (dq, strides, q.shape[0], score_scale(q, options))
    grid = (programs * q.shape[1],)
    launch(_query_gradients, grid, *inputs, *own, *arguments, **constants, **config)
    return dq, dk, dv


def _key_passes(q: Tensor) -> list[tuple[str, Table, dict[str, int]]]:
    """Name, configurations and constexprs of the launches that make dk and dv."""
    if capability(q) == 90 and padded(q) == 256 and q.dtype != torch.float32:
        return [
            ("attention_backward_dk", _DK_ALONE, {"DK": True, "DV": False}),
            ("attention_backward_dv", _DV_ALONE, {"DK": False, "DV": True}),
        ]
    return [("attention_backward_keys", _KEYS, {"DK": True, "DV": True})]


@triton.jit(do_not_specialize=["tokens", "programs", "documents", "steps"])
def _key_gradients(
    q,
    k,
    v,
    do,
    lse,
    delta,
    dk,
    dv,
    strides,
    tokens,
    slope,
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
    DK: tl.constexpr,
    DV: tl.constexpr,
):
    q_token, q_head, k_token, k_head, v_token, v_head, do_token, do_head = strides[:8]
    dk_token, dk_head, dv_token, dv_head = strides[8:]
    head = (tl.program_id(0) % (HEADS // GROUP)).to(tl.int64)
    program = tl.program_id(0) // (HEADS // GROUP)
    start, length, first = locate(cu_seqlens, blocks, program, documents, steps, BN)
    if first >= length:
        return
    if CAUSAL and blocks is not None:
        first = (length - 1) // BN * BN - first  # the first keys of a document are seen most
    row, column, inside = rows_and_mask(first, length, D, DP, BN)
    k += (start + first) * k_token + head * k_head
    v += (start + first) * v_token + head * v_head
    keys = tl.load(k + row * k_token + column, mask=inside, other=0.0)
    values = keys
    if DK:
        values = tl.load(v + row * v_token + column, mask=inside, other=0.0)
    q += start * q_token + head * GROUP * q_head
    do += start * do_token + head * GROUP * do_head
    statistics = head * GROUP * tokens + start

    # In query blocks: cut by the diagonal from `begin` on, `left` of them; whole, `whole` of them;
    # cut by the window's edge or the end of the document, up to `end`.
    begin = first * 0
    left = begin
    end = tl.cdiv(length, BM)
    whole = length // BM
    if CAUSAL:
        begin = first // BM
        left = tl.minimum(tl.cdiv(first + BN - 1, BM), end) - begin
        if scores[2] is not None:
            end = tl.minimum(tl.cdiv(first + BN - 1 + scores[2], BM), end)
            whole = tl.minimum((first + scores[2]) // BM, whole)
        whole = tl.maximum(whole - begin - left, 0)
    given = (keys, values, q, do, lse + statistics, delta + statistics)
    sizes = (q_token, q_head, do_token, do_head, tokens, first, length)
    dk_sum = tl.zeros([BN, DP], tl.float32)
    dv_sum = tl.zeros([BN, DP], tl.float32)
    dk_sum, dv_sum = _visit_queries(
        *(dk_sum, dv_sum, given, sizes, scores, begin * BM, left, whole * BM),
        *(end - begin - whole, GROUP, D, DP, CAUSAL, BM, BN, DK, DV, True),
    )
    dk_sum, dv_sum = _visit_queries(
        *(dk_sum, dv_sum, given, sizes, scores, (begin + left) * BM, 0, 0),
        *(whole, GROUP, D, DP, CAUSAL, BM, BN, DK, DV, False),
    )
    inside = (first + row < length) & (column < D)  # made again: see `attention._forward`
    dk += (start + first) * dk_token + head * dk_head
    dv += (start + first) * dv_token + head * dv_head
    if DV:
        tl.store(dv + row * dv_token + column, dv_sum.to(dv.dtype.element_ty), mask=inside)
    if DK:
        dk_sum *= slope
        tl.store(dk + row * dk_token + column, dk_sum.to(dk.dtype.element_ty), mask=inside)


@triton.jit
def _visit_queries(
    dk,
    dv,
    given,
    sizes,
    scores,
    begin,
    left,
    gap,
    count,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    DP: tl.constexpr,
    CAUSAL: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    DK: tl.constexpr,
    DV: tl.constexpr,
    CUT: tl.constexpr,
):
    """`count` query blocks of every head of the group, from row `begin` on; `gap` as in `_attend`."""
    keys, values, q, do, lse, delta = given
    q_token, q_head, do_token, do_head, tokens, first, length = sizes
    scale, cap, window = scores
    row = tl.arange(0, BM)
    column = tl.arange(0, DP)[None, :]
    q += column
    do += column
    for step in range(count * GROUP):
        member = (step // count).to(tl.int64)
        m = begin + step % count * BM
        if CUT:
            m += tl.where(step % count < left, 0, gap)
        # Offsets are made anew in each turn: held across turns, those of q and do cost 16
        # registers where the two sums alone take 128 of 255.
        here = (m + row[:, None]).to(tl.int64)
        known = row < length - m
        inside = column < D
        if CUT:
            inside = inside & known[:, None]
        queries = load_tile(q + member * q_head, here * q_token, inside, CUT or D < DP)
        grads = load_tile(do + member * do_head, here * do_token, inside, CUT or D < DP)
        at = member * tokens + m + row
        s = tl.dot(keys, tl.trans(queries), input_precision="ieee")
        exponent = load_tile(lse, at, known, CUT) * LOG2E
        if DK:
            dp = tl.dot(values, tl.trans(grads), input_precision="ieee")
        if cap is None:
            p = tl.exp2(s * scale - exponent[None, :])
        else:
            s, bent = bend(s, scale, cap)
            p = tl.exp2(s - exponent[None, :])
        if CUT and CAUSAL:
            key = first - m + tl.arange(0, BN)
            p = tl.where(sees(row[None, :], key[:, None], length, window, True), p, 0.0)
        weight = p.to(grads.dtype)
        if cap is not None:
            p *= 1.0 - bent * bent  # now, so that `bent` need not live on
        if DV:
            dv = tl.dot(weight, grads, dv, input_precision="ieee")
        if DK:
            mean = load_tile(delta, at, known, CUT)
            ds = p * (dp - mean[None, :])
            dk = tl.dot(ds.to(queries.dtype), queries, dk, input_precision="ieee")
    return dk, dv


@triton.jit(do_not_specialize=["tokens", "programs", "documents", "steps"])
def _query_gradients(
    q,
    k,
    v,
    do,
    lse,
    delta,
    dq,
    strides,
    tokens,
    slope,
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
    q_token, q_head, k_token, k_head, v_token, v_head = strides[:6]
    do_token, do_head, dq_token, dq_head = strides[6:]
    head = (tl.program_id(0) % HEADS).to(tl.int64)
    program = tl.program_id(0) // HEADS
    if blocks is None:
        program = programs - 1 - program
    start, length, first = locate(cu_seqlens, blocks, program, documents, steps, BM)
    if first >= length:
        return
    row, column, inside = rows_and_mask(first, length, D, DP, BM)
    q += (start + first) * q_token + head * q_head
    do += (start + first) * do_token + head * do_head
    queries = tl.load(q + row * q_token + column, mask=inside, other=0.0)
    grads = tl.load(do + row * do_token + column, mask=inside, other=0.0)
    known = tl.arange(0, BM) < length - first
    at = head * tokens + start + first + tl.arange(0, BM)
    exponent = tl.load(lse + at, mask=known, other=0.0) * LOG2E
    mean = tl.load(delta + at, mask=known, other=0.0)
    k += start * k_token + head // GROUP * k_head
    v += start * v_token + head // GROUP * v_head

    begin, full_begin, full_end, end = seen_keys(first, length, scores[2], BM, BN, CAUSAL)
    left = (full_begin - begin) // BN
    gap = full_end - full_begin
    cut = left + tl.cdiv(end - full_end, BN)
    given = (queries, grads, exponent, mean, k, v, k_token, v_token, first, length, scores)
    total = tl.zeros([BM, DP], tl.float32)
    total = _visit_keys(total, given, begin, left, gap, cut, D, DP, BM, BN, CAUSAL, True)
    total = _visit_keys(total, given, full_begin, 0, 0, gap // BN, D, DP, BM, BN, CAUSAL, False)
    inside = (first + row < length) & (column < D)  # made again: see `attention._forward`
    dq += (start + first) * dq_token + head * dq_head
    tl.store(dq + row * dq_token + column, (total * slope).to(dq.dtype.element_ty), mask=inside)


@triton.jit
def _visit_keys(
    dq,
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
    """`count` key blocks from key `begin` on; `gap` as in `attention._attend`."""
    queries, grads, exponent, mean, k, v, k_token, v_token, first, length, scores = given
    scale, cap, window = scores
    key = tl.arange(0, BN)
    column = tl.arange(0, DP)[None, :]
    k += column
    v += column
    for block in range(count):
        n = begin + block * BN
        inside = column < D
        if CUT:
            n += tl.where(block < left, 0, gap)
            inside = inside & (key[:, None] < length - n)
        here = (n + key[:, None]).to(tl.int64)
        keys = load_tile(k, here * k_token, inside, CUT or D < DP)
        values = load_tile(v, here * v_token, inside, CUT or D < DP)
        s = tl.dot(queries, tl.trans(keys), input_precision="ieee")
        dp = tl.dot(grads, tl.trans(values), input_precision="ieee")
        if cap is None:
            p = tl.exp2(s * scale - exponent[:, None])
        else:
            s, bent = bend(s, scale, cap)
            p = tl.exp2(s - exponent[:, None]) * (1.0 - bent * bent)
        if CUT:
            row = first - n + tl.arange(0, BM)
            p = tl.where(sees(row[:, None], key[None, :], length - n, window, CAUSAL), p, 0.0)
        ds = p * (dp - mean[:, None])
        dq = tl.dot(ds.to(keys.dtype), keys, dq, input_precision="ieee")
    return dq
