"""Attention over packs: forward and backward at the shapes of the issue, and delta with adapters.

"4k": two documents of 4096 tokens. "ragged": 200 documents from 20 to 4000 tokens, as many of any
size as of twice that size, 150k tokens in all. Peers run on the same packs: torch's varlen_attn
and FlashAttention read cu_seqlens, scaled_dot_product_attention takes document after document.
A torch whose varlen_attn knows no grouped queries gets K and V expanded before it is timed, and the
name of that peer says so.
The backward's lse and delta are what random inputs give on average, so that no forward is needed.
"""

from __future__ import annotations

import inspect
import random
from collections.abc import Callable
from functools import partial
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from fastsft_kernels import limits, reference
from fastsft_kernels.fused import (
    Adapters,
    AttentionOptions,
    StripDropout,
    attention_backward,
    attention_blocks,
    attention_delta,
    attention_forward,
)
from torch import Tensor

from bench.kernels.case import Case

LONG = (4096, 4096)
RAGGED = tuple(round(20 * 200 ** (i / 199)) for i in range(200))
SMALL = (1, 150, 37, 0, 15)
T = 8192


class Shape(NamedTuple):
    heads: int = 32
    groups: int = 8
    size: int = 128
    causal: bool = True
    window: int | None = None
    softcap: float | None = None
    listed: bool = True


LLAMA = Shape()
LLAMA_1B = Shape(size=64)
GEMMA_2 = Shape(heads=16, size=256, window=4096, softcap=50.0)
PHI_3 = Shape(groups=32, size=96, causal=False, listed=False)


def cases() -> list[Case]:
    return [
        _forward("4k D 128", LONG, LLAMA),
        _backward("4k D 128", LONG, LLAMA),
        _forward("ragged D 128", RAGGED, LLAMA),
        _backward("ragged D 128", RAGGED, LLAMA),
        _forward("4k D 64", LONG, LLAMA_1B),
        _backward("4k D 64", LONG, LLAMA_1B),
        _forward("8k D 256, window, soft-cap", (T,), GEMMA_2),
        _backward("8k D 256, window, soft-cap", (T,), GEMMA_2),
        _forward("4k D 96, not causal, no list", LONG, PHI_3),
        _backward("4k D 96, not causal, no list", LONG, PHI_3),
        _delta("8192x4096", 0, 0.0),
        _delta("8192x4096, adapters of R 16", 16, 0.0),
        _delta("8192x4096, adapters of R 16, dropout", 16, 0.1),
    ]


def _forward(label: str, lengths: tuple[int, ...], shape: Shape) -> Case:
    return Case(
        op="varlen_attention",
        label=f"forward {label}",
        record=partial(_inputs, lengths, shape),
        small=partial(_inputs, SMALL, _fewer(shape)),
        run=lambda q, k, v, cu, options, _: attention_forward(q, k, v, cu, options),
        oracle=_rounded_forward,
        work=lambda q, k, v, cu, options, lengths: limits.attention_forward(
            *(lengths, q.shape[1], k.shape[1], q.shape[2], q.element_size()),
            *(options.causal, options.window),
        ),
        peers={name: partial(_forward_peer, peer) for name, peer in _peers(shape).items()},
    )


def _backward(label: str, lengths: tuple[int, ...], shape: Shape) -> Case:
    return Case(
        op="varlen_attention",
        label=f"backward {label}",
        record=partial(_backward_inputs, lengths, shape),
        small=partial(_backward_inputs, SMALL, _fewer(shape)),
        run=lambda *inputs: attention_backward(*inputs[:-1]),
        oracle=lambda *inputs: reference.attention_backward(*inputs[:-1]),
        work=lambda do, q, k, v, lse, delta, cu, options, lengths: limits.attention_backward(
            *(lengths, q.shape[1], k.shape[1], q.shape[2], q.element_size()),
            *(options.causal, options.window),
        ),
        peers={name: partial(_backward_peer, peer) for name, peer in _peers(shape).items()},
    )


def _delta(label: str, rank: int, p: float) -> Case:
    return Case(
        op="attention_delta",
        label=label,
        record=partial(_delta_inputs, T, 32, 128, rank, p),
        small=partial(_delta_inputs, 67, 3, 72, rank, p),
        run=lambda o, do, adapters: (attention_delta(o, do, adapters=adapters), do),
        oracle=lambda o, do, adapters: (reference.attention_delta(o, do, adapters=adapters), do),
        work=lambda o, do, adapters: limits.attention_delta(
            *o.shape, o.element_size(), rank=adapters.d.shape[1] if adapters else 0
        ),
        peers={"torch": _torch_delta},
    )


def _rounded_forward(
    q: Tensor, k: Tensor, v: Tensor, cu: Tensor, options: AttentionOptions, _: tuple[int, ...]
) -> tuple[Tensor, Tensor]:
    """The log-sum-exp as precise as q: the matrix units add the scores with truncation."""
    o, lse = reference.attention_forward(q, k, v, cu, options)
    return o, lse.to(q.dtype).to(lse.dtype)


def _fewer(shape: Shape) -> Shape:
    """An eighth of the heads, and a window that is shorter than a document."""
    window = shape.window and 41
    return shape._replace(heads=shape.heads // 8, groups=shape.groups // 8, window=window)


def _inputs(
    lengths: tuple[int, ...], shape: Shape, device: torch.device, dtype: torch.dtype
) -> tuple[Any, ...]:
    """q, k, v are views of one buffer, as the qkv product leaves them."""
    lengths = tuple(random.Random(0).sample(lengths, len(lengths)))
    heads = shape.heads + 2 * shape.groups
    qkv = torch.randn(sum(lengths), heads, shape.size, device=device, dtype=dtype)
    q, k, v = qkv.split([shape.heads, shape.groups, shape.groups], 1)
    cu = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32).to(device)
    blocks = attention_blocks(lengths, device) if shape.listed else None
    options = AttentionOptions(
        max(lengths), shape.causal, None, shape.window, shape.softcap, blocks
    )
    return q, k, v, cu, options, lengths


def _backward_inputs(
    lengths: tuple[int, ...], shape: Shape, device: torch.device, dtype: torch.dtype
) -> tuple[Any, ...]:
    """Scores of random inputs are about normal: n of them have a log-sum-exp near log(n) + 1/2."""
    q, k, v, cu, options, lengths = _inputs(lengths, shape, device, dtype)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    seen = [torch.arange(1, n + 1) if shape.causal else torch.full((n,), n) for n in lengths]
    count = torch.cat(seen).clamp(max=shape.window or sum(lengths)).to(device, wide)
    lse = (count.log() + 0.5).expand(shape.heads, -1).contiguous()
    delta = torch.randn(lse.shape, device=device, dtype=wide) / count.sqrt()
    return torch.randn_like(q), q, k, v, lse, delta, cu, options, lengths


def _delta_inputs(
    tokens: int,
    heads: int,
    size: int,
    rank: int,
    p: float,
    device: torch.device,
    dtype: torch.dtype,
) -> tuple[Any, ...]:
    o, do = torch.randn(2, tokens, heads, size, device=device, dtype=dtype).unbind()
    if not rank:
        return o, do, None
    d = torch.randn(tokens, rank, device=device, dtype=dtype)
    a = torch.randn(rank, heads * size, device=device, dtype=dtype)
    dropout = StripDropout(p, 1, 2, (3,), torch.arange(tokens, device=device)) if p else None
    return o, do, Adapters(d, a, dropout, 0.5)


Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
Maker = Callable[[Tensor, AttentionOptions, tuple[int, ...]], Attend]


class Peer(NamedTuple):
    """expanded: gets a head of K and V for each of Q, made before anything is timed."""

    make: Maker
    expanded: bool = False

    def inputs(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
        if not self.expanded:
            return q, k, v
        return q, *(x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))


def _peers(shape: Shape) -> dict[str, Peer]:
    """Those that can do what the shape asks; without the soft-cap nobody's time would compare."""
    others = {"flash_attn": Peer(_flash_attn), "torch per document": Peer(_per_document)}
    if shape.softcap:
        return others
    expanded = shape.heads != shape.groups and not _knows_groups()
    name = "torch varlen_attn" + (", K and V expanded" if expanded else "")
    return {name: Peer(_varlen_attn, expanded)} | others


def _knows_groups() -> bool:
    """Whether torch's varlen_attn takes fewer heads of K and V than of Q; 2.11's does not."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:  # the peer's row will say so
        return True
    return "enable_gqa" in inspect.signature(varlen_attn).parameters


def _varlen_attn(cu: Tensor, options: AttentionOptions, lengths: tuple[int, ...]) -> Attend:
    from torch.nn.attention.varlen import varlen_attn

    sides = ((options.window or 0) - 1, 0) if options.causal else (-1, -1)
    n = options.max_seqlen
    more: dict[str, Any] = {"enable_gqa": True} if _knows_groups() else {}
    attend: Callable[..., Any] = varlen_attn  # a tuple where more is asked for
    return lambda q, k, v: attend(q, k, v, cu, cu, n, n, window_size=sides, **more)


def _flash_attn(cu: Tensor, options: AttentionOptions, lengths: tuple[int, ...]) -> Attend:
    from flash_attn import flash_attn_varlen_func

    n = options.max_seqlen
    more = {
        "causal": options.causal,
        "window_size": ((options.window or 0) - 1, 0 if options.window else -1),
        "softcap": options.softcap or 0.0,
    }
    return lambda q, k, v: flash_attn_varlen_func(q, k, v, cu, cu, n, n, **more)


def _per_document(cu: Tensor, options: AttentionOptions, lengths: tuple[int, ...]) -> Attend:
    more = options._asdict()
    n = more.pop("max_seqlen")
    return lambda q, k, v: reference.varlen_attention(q, k, v, cu, n, lengths=lengths, **more)


def _forward_peer(
    peer: Peer,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu: Tensor,
    options: AttentionOptions,
    lengths: tuple[int, ...],
) -> Callable[[], Any]:
    attend, inputs = peer.make(cu, options, lengths), peer.inputs(q, k, v)
    return lambda: attend(*inputs)


def _backward_peer(peer: Peer, do: Tensor, *inputs: Any) -> Callable[[], Any]:
    q, k, v, _, _, cu, options, lengths = inputs
    leaves = [x.detach().requires_grad_() for x in peer.inputs(q, k, v)]
    o = peer.make(cu, options, lengths)(*leaves)
    return lambda: torch.autograd.grad(o, leaves, do, retain_graph=True)


def _torch_delta(o: Tensor, do: Tensor, adapters: Adapters | None) -> Callable[[], Any]:
    if adapters is None:
        return lambda: (o.float() * do.float()).sum(-1).t().contiguous()

    def run() -> Tensor:
        term = (adapters.d @ adapters.a) * adapters.scaling
        if adapters.dropout is not None:
            term = torch.nn.functional.dropout(term, adapters.dropout.p)
        do.add_(term.view(do.shape))
        return (o.float() * do.float()).sum(-1).t().contiguous()

    return run
