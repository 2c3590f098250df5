"""The attention of the step in plain torch, document by document: forward, delta, backward.

The formulas are written out, scores and all, in float32 (float64 for float64 inputs): this is
what the kernels compute. Documents are found by reading cu_seqlens, one host synchronisation on a
GPU.

On a CPU float32 documents go through torch's own attention, which gives the log-sum-exp and keeps
the scores in its cache: what training there spends its time on. Soft-caps, windows shorter than a
document and other dtypes have the formulas alone.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from fastsft_kernels.fused.attention import AttentionOptions
from fastsft_kernels.fused.strips import Adapters
from fastsft_kernels.reference.strips import adapters_term

_FORWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


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
    o = torch.empty(q.shape, dtype=q.dtype, device=q.device) if out is None else out
    lse = torch.empty((q.shape[1], q.shape[0]), dtype=_wide(q), device=q.device)
    scale = _scale(q, options)
    for rows in _documents(cu_seqlens):
        if _torch_can(q[rows], options):
            found = _FORWARD(*_batch(q[rows], k[rows], v[rows]), 0.0, options.causal, scale=scale)
            o[rows], lse[:, rows] = found[0][0].transpose(0, 1), found[1][0]
            continue
        scores, _ = _scores(q[rows], k[rows], options)
        lse[:, rows] = scores.logsumexp(-1)
        p = torch.exp(scores - lse[:, rows, None])
        o[rows] = torch.einsum("hij,jhd->ihd", p, _heads(v[rows], q.shape[1])).to(q.dtype)
    return o, lse


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
    heads, wide = q.shape[1], _wide(q)
    if out is None:
        dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    else:
        dq, dk, dv = out
    for rows in _documents(cu_seqlens):
        if _torch_can(q[rows], options):
            found = _backward(
                do[rows], q[rows], k[rows], v[rows], lse[:, rows], delta[:, rows], options
            )
            for grad, new in zip((dq, dk, dv), found, strict=True):
                grad[rows] = new
            continue
        scores, bent = _scores(q[rows], k[rows], options)
        p = torch.exp(scores - lse[:, rows, None])
        upstream = do[rows].to(wide)
        dp = torch.einsum("ihd,jhd->hij", upstream, _heads(v[rows], heads))
        ds = p * (dp - delta[:, rows, None]) * _scale(q, options)
        if bent is not None:
            ds = ds * (1 - bent.square())
        dq[rows] = torch.einsum("hij,jhd->ihd", ds, _heads(k[rows], heads)).to(q.dtype)
        by_head = torch.einsum("hij,ihd->jhd", ds, q[rows].to(wide))
        dk[rows] = by_head.unflatten(1, (k.shape[1], -1)).sum(2).to(k.dtype)
        by_head = torch.einsum("hij,ihd->jhd", p, upstream)
        dv[rows] = by_head.unflatten(1, (k.shape[1], -1)).sum(2).to(v.dtype)
    return dq, dk, dv


def attention_delta(o: Tensor, do: Tensor, *, adapters: Adapters | None = None) -> Tensor:
    """See `fastsft_kernels.fused.attention_delta`."""
    wide = _wide(o)
    if adapters is not None:
        do.copy_(do.to(wide) + adapters_term(adapters).view(do.shape))
    return (o.to(wide) * do.to(wide)).sum(-1).t().contiguous()


def _torch_can(q: Tensor, options: AttentionOptions) -> bool:
    """Whether torch's attention on a CPU computes the same of one document's q [n, Hq, D], n > 1."""
    plain = options.softcap is None and (options.window is None or options.window >= q.shape[0])
    several = q.shape[0] > 1  # a token alone sees itself: the formulas are cheaper than a call
    return plain and several and q.device.type == "cpu" and q.dtype == torch.float32


def _batch(*rows: Tensor) -> list[Tensor]:
    """[n, H, D] each -> [1, H, n, D], as torch's attention takes them."""
    return [x.transpose(0, 1)[None] for x in rows]


def _backward(
    do: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lse: Tensor,
    delta: Tensor,
    options: AttentionOptions,
) -> list[Tensor]:
    """(dq, dk, dv) of one document by torch's attention.

    It reads o for nothing but delta = Σ do ∘ o, and o is not known here: it gets the multiple of do that
    has this sum, by do divided by its row's largest number, whose square cannot vanish.
    """
    unit = do / do.abs().amax(-1, keepdim=True).clamp_min(torch.finfo(do.dtype).tiny)
    weight = (do * unit).sum(-1, keepdim=True)
    o = unit * torch.where(weight > 0, delta.t()[..., None] / weight, 0.0)
    tensors = _batch(do, q, k, v, o)
    found = _BACKWARD(*tensors, lse[None], 0.0, options.causal, scale=_scale(q, options))
    return [x[0].transpose(0, 1) for x in found]


def _documents(cu_seqlens: Tensor) -> Iterator[slice]:
    bounds = cu_seqlens.tolist()
    return (slice(a, b) for a, b in zip(bounds, bounds[1:], strict=False) if b > a)


def _scores(q: Tensor, k: Tensor, options: AttentionOptions) -> tuple[Tensor, Tensor | None]:
    """(scores [Hq, n, n] with -inf where unseen, the soft-cap's tanh) of one document."""
    keys = _heads(k, q.shape[1])
    scores = torch.einsum("ihd,jhd->hij", q.to(keys.dtype), keys) * _scale(q, options)
    bent = None
    if options.softcap is not None:
        bent = torch.tanh(scores / options.softcap)
        scores = options.softcap * bent
    if options.causal:
        i = torch.arange(q.shape[0], device=q.device)
        distance = i[:, None] - i[None, :]
        unseen = distance < 0
        if options.window is not None:
            unseen |= distance >= options.window
        scores = scores.masked_fill(unseen, -torch.inf)
    return scores, bent


def _heads(x: Tensor, heads: int) -> Tensor:
    """Key heads repeated for their groups, in the dtype that is computed in."""
    return x.to(_wide(x)).repeat_interleave(heads // x.shape[1], 1)


def _scale(q: Tensor, options: AttentionOptions) -> float:
    return q.shape[-1] ** -0.5 if options.scale is None else options.scale


def _wide(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32
