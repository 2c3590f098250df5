"""Rotary position embedding: q and k in one launch, a program for all heads of a few tokens.

    [a | b] -> [a·cos - b·sin | b·cos + a·sin]        the inverse: with -sin

A tile is [tokens, heads, R/2], once for a and once for b, and each program reads the table rows
of its tokens once: 0.5 KiB against 20 KiB of heads (40 heads of 128 numbers). Nothing is kept but
the tables: the backward of a turn is the turn backwards. A launch reads and writes every turned
number once, 39 us for 8192 tokens x 40 heads x 128 at 4.3 TB/s. Out of place the numbers behind R
are copied by the same launch.

R/2 need not be a power of two (48 in Phi-3's heads of 96); columns beyond it are masked, as are
heads: 40 heads of a tile of 64 move no bytes for the other 24.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastsft_kernels.integers import cdiv, next_power_of_2
from fastsft_kernels.launch import launch, pinned

# Numbers of a tile of a, and warps: 2048 on 4 warps are two 16-byte loads of a and two of b in each
# thread, and one token of 32 heads x 128.
_TILES = [
    {"NUMBERS": 2048, "num_warps": 4},
    {"NUMBERS": 4096, "num_warps": 4},
    {"NUMBERS": 2048, "num_warps": 8},
]
_MOST = 4096  # the heads of one tile, and with them its registers


def rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """See `fastsft_kernels.rope`."""
    turned: tuple[Tensor, Tensor] = _Rope.apply(q, k, cos, sin)
    return turned


def rope_(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *, inverse: bool = False) -> None:
    """See `fastsft_kernels.fused.rope_`."""
    _launch(q, k, q, k, cos, sin, inverse)


class _Rope(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(cos, sin)
        return _turned(q, k, cos, sin, False)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dq: Tensor, dk: Tensor) -> tuple[Tensor, Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return *_turned(dq, dk, cos, sin, True), None, None


def _turned(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, inverse: bool) -> tuple[Tensor, Tensor]:
    q, k = (x if x.stride(2) == 1 else x.contiguous() for x in (q, k))
    q_out, k_out = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k))
    _launch(q, k, q_out, k_out, cos, sin, inverse)
    return q_out, k_out


def _launch(
    q: Tensor, k: Tensor, q_out: Tensor, k_out: Tensor, cos: Tensor, sin: Tensor, inverse: bool
) -> None:
    cos, sin = (t if t.stride(1) == 1 else t.contiguous() for t in (cos, sin))
    (tokens, q_heads, size), k_heads, half = q.shape, k.shape[1], cos.shape[1]
    rest = 0 if q_out is q else size - 2 * half
    columns, behind = _power(half), _power(rest)
    widest = max(1, _MOST // max(columns, behind))
    q_tile, k_tile = min(_power(q_heads), widest), min(_power(k_heads), widest)
    config = dict(pinned("rope", _TILES, q))
    block = max(1, config.pop("NUMBERS") // (max(q_tile, k_tile) * max(columns, behind)))
    launch(
        _turn,
        (cdiv(tokens, block),),
        *(q, k, q_out, k_out, cos, sin, tokens),
        *(stride for x in (q, k, q_out, k_out) for stride in x.stride()[:2]),
        *(cos.stride(0), sin.stride(0)),
        **{"HQ": q_heads, "HK": k_heads, "HALF": half, "REST": rest, "INVERSE": inverse},
        **{"BT": block, "BQ": q_tile, "BK": k_tile, "BC": columns, "BREST": behind},
        **config,
    )


def _power(n: int) -> int:
    return next_power_of_2(max(n, 1))


@triton.jit(do_not_specialize=["T"])
def _turn(
    q,
    k,
    q_out,
    k_out,
    cos,
    sin,
    T,
    q_token,
    q_head,
    k_token,
    k_head,
    q_out_token,
    q_out_head,
    k_out_token,
    k_out_head,
    cos_token,
    sin_token,
    HQ: tl.constexpr,
    HK: tl.constexpr,
    HALF: tl.constexpr,
    REST: tl.constexpr,
    INVERSE: tl.constexpr,
    BT: tl.constexpr,
    BQ: tl.constexpr,
    BK: tl.constexpr,
    BC: tl.constexpr,
    BREST: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64) * BT + tl.arange(0, BT)[:, None, None]
    column = tl.arange(0, BC)[None, None, :]
    known = (token < T) & (column < HALF)
    c = tl.load(cos + token * cos_token + column, mask=known, other=0.0).to(tl.float32)
    s = tl.load(sin + token * sin_token + column, mask=known, other=0.0).to(tl.float32)
    if INVERSE:
        s = -s
    q_in, q_to = q + token * q_token, q_out + token * q_out_token
    k_in, k_to = k + token * k_token, k_out + token * k_out_token
    inside = token < T
    for first in tl.static_range(0, HQ, BQ):
        _turn_heads(
            q_in, q_to, first, q_head, q_out_head, inside, c, s, HQ, HALF, REST, BQ, BC, BREST
        )
    for first in tl.static_range(0, HK, BK):
        _turn_heads(
            k_in, k_to, first, k_head, k_out_head, inside, c, s, HK, HALF, REST, BK, BC, BREST
        )


@triton.jit
def _turn_heads(
    x,
    y,
    first,
    x_head,
    y_head,
    inside,
    c,
    s,
    HEADS: tl.constexpr,
    HALF: tl.constexpr,
    REST: tl.constexpr,
    BH: tl.constexpr,
    BC: tl.constexpr,
    BREST: tl.constexpr,
):
    """Turns heads first to first + BH of the tokens at x [BT, 1, 1] into y."""
    head = first + tl.arange(0, BH)[None, :, None]
    inside = inside & (head < HEADS)
    x += head.to(tl.int64) * x_head
    y += head.to(tl.int64) * y_head
    column = tl.arange(0, BC)[None, None, :]
    turns = inside & (column < HALF)
    a = tl.load(x + column, mask=turns).to(tl.float32)
    b = tl.load(x + HALF + column, mask=turns).to(tl.float32)
    tl.store(y + column, (a * c - b * s).to(y.dtype.element_ty), mask=turns)
    tl.store(y + HALF + column, (b * c + a * s).to(y.dtype.element_ty), mask=turns)
    if REST > 0:
        behind = tl.arange(0, BREST)[None, None, :]
        copied = inside & (behind < REST)
        tl.store(y + 2 * HALF + behind, tl.load(x + 2 * HALF + behind, mask=copied), mask=copied)
