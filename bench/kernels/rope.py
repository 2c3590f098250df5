"""The rotary turn: in place on slices of a qkv buffer, out of place, backwards, partial.

Peers turn [batch, heads, T, D] with tables of whole heads, as transformers does; Liger's kernel
works in place on contiguous heads, so its inputs are made so beforehand.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from fastsft_kernels import limits, reference, rope
from fastsft_kernels.fused import rope_
from torch import Tensor

from bench.kernels.case import Case

T, HEADS, KV, D = 8192, 32, 8, 128


def cases() -> list[Case]:
    return [
        _case(f"in place {T}x{HEADS + KV}x{D}", _turn_in_place, D // 2),
        _case(f"out of place {T}x{HEADS + KV}x{D}", rope, D // 2),
        _case(f"backwards in place {T}x{HEADS + KV}x{D}", _turn_back, D // 2),
        _case(f"96 of {D} in place {T}x{HEADS + KV}x{D}", _turn_in_place, 48),
    ]


def _case(label: str, run: Callable[..., Any], half: int) -> Case:
    return Case(
        op="rope",
        label=label,
        record=partial(_inputs, T, HEADS, KV, D, half),
        small=partial(_inputs, 37, 3, 1, 96, 48 if half == D // 2 else 20),
        run=run,
        oracle=_inverse if run is _turn_back else reference.rope,
        work=_work,
        peers={
            "torch": partial(_peer, run is _turn_back, _torch_turn),
            "torch.compile": partial(_peer, run is _turn_back, torch.compile(_torch_turn)),
            **({"Liger": partial(_liger, run is _turn_back)} if half == D // 2 else {}),
        },
    )


def _inputs(
    tokens: int,
    heads: int,
    kv: int,
    size: int,
    half: int,
    device: torch.device,
    dtype: torch.dtype,
) -> tuple[Tensor, ...]:
    """q and k in a buffer that holds q, k and v; float32 tables."""
    qkv = torch.randn(tokens, heads + 2 * kv, size, device=device, dtype=dtype)
    frequency = 500_000.0 ** (-torch.arange(half, device=device) / half)
    angle = torch.arange(tokens, device=device)[:, None] * frequency
    return qkv[:, :heads], qkv[:, heads : heads + kv], angle.cos(), angle.sin()


def _turn_in_place(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    rope_(q, k, cos, sin)
    return q, k


def _turn_back(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    rope_(q, k, cos, sin, inverse=True)
    return q, k


def _inverse(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    return reference.rope(q, k, cos, -sin)


def _work(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> limits.Work:
    """What turns is read and written; a peer that also copies what does not pays for it itself."""
    tokens, heads = q.shape[0], q.shape[1] + k.shape[1]
    return limits.rope(tokens, heads, 2 * cos.shape[1], q.element_size())


def _torch_turn(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, ...]:
    turned = []
    for x in (q, k):
        part, rest = x.split([cos.shape[-1], x.shape[-1] - cos.shape[-1]], -1)
        a, b = part.chunk(2, -1)
        turned.append(torch.cat([part * cos + torch.cat([-b, a], -1) * sin, rest], -1))
    return tuple(turned)


def _batched(
    back: bool, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """[1, heads, T, D] and tables [1, T, D] of q's dtype, as transformers has them."""
    tables = [torch.cat([t, t], -1)[None].to(q.dtype) for t in (cos, -sin if back else sin)]
    heads = [x.contiguous()[None].transpose(1, 2) for x in (q, k)]
    return heads[0], heads[1], tables[0], tables[1]


def _peer(back: bool, function: Callable[..., Any], *inputs: Tensor) -> Callable[[], Any]:
    q, k, cos, sin = _batched(back, *inputs)
    return partial(function, q, k, cos[:, None], sin[:, None])


def _liger(back: bool, *inputs: Tensor) -> Callable[[], Any]:
    from liger_kernel.ops.rope import LigerRopeFunction

    return partial(LigerRopeFunction.apply, *_batched(back, *inputs))
