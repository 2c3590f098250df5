"""Attention inside each document of a pack, by torch's scaled_dot_product_attention.

One call per document. On a CPU this is as fast as it gets: documents of about 100 tokens, padded
to a common length and batched, took half as long again (gathering costs more than the calls it
saves); only below some 20 tokens did batching win. Sliding windows shorter than a document and
soft-caps make a mask or scores of one document's size, never of the pack's.

Documents are split by lengths known on the host. Whoever packed them knows the lengths and passes
them; otherwise `cu_seqlens` is read, which on a GPU waits for the device once a call.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


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
    """See `fastsft_kernels.varlen_attention`. `max_seqlen` and `blocks` are for the kernels."""
    sizes = cu_seqlens.diff().tolist() if lengths is None else list(lengths)
    # split, not slices: the backward of a slice fills a tensor of the whole pack with zeros
    documents = zip(q.split(sizes), k.split(sizes), v.split(sizes), strict=True)
    out = [_document(*qkv, causal, scale, window, softcap) for qkv in documents]
    return torch.cat(out) if out else torch.empty_like(q)


def _document(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    causal: bool,
    scale: float | None,
    window: int | None,
    softcap: float | None,
) -> Tensor:
    q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
    length = q.shape[2]
    mask = None
    if window is not None and window < length:
        distance = torch.arange(length, device=q.device)
        distance = distance[:, None] - distance[None, :]
        mask = (distance >= 0) & (distance < window)
    if softcap is not None:
        o = _capped(q, k, v, causal, scale, mask, softcap)
    else:
        if not _can_share_heads(q, mask):
            k, v = _repeated(k, q.shape[1]), _repeated(v, q.shape[1])
        o = F.scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=mask,
            is_causal=causal and mask is None,
            scale=scale,
            enable_gqa=q.shape[1] != k.shape[1],
        )
    return o[0].transpose(0, 1)


def _can_share_heads(q: Tensor, mask: Tensor | None) -> bool:
    """Whether grouped key heads may be left to torch.

    Of its fused kernels on a GPU only flash attention shares key heads: half precision, no mask, heads
    of up to 256. Elsewhere it would take the plain products with their scores [Hq, n, n]; with the
    key heads repeated (n·Hq·D numbers) the memory-efficient kernel serves. A CPU's kernel shares always.
    """
    if q.device.type == "cpu":
        return True
    half = q.dtype in (torch.bfloat16, torch.float16)
    return half and mask is None and q.shape[-1] <= 256


def _repeated(x: Tensor, heads: int) -> Tensor:
    """x [1, Hkv, n, D] -> [1, heads, n, D], each head repeated in place."""
    return x.repeat_interleave(heads // x.shape[1], 1) if heads != x.shape[1] else x


def _capped(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    causal: bool,
    scale: float | None,
    mask: Tensor | None,
    softcap: float,
) -> Tensor:
    k, v = _repeated(k, q.shape[1]), _repeated(v, q.shape[1])
    scores = q @ k.mT * (q.shape[-1] ** -0.5 if scale is None else scale)
    scores = softcap * torch.tanh(scores.to(torch.promote_types(q.dtype, torch.float32)) / softcap)
    if mask is None and causal:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).tril()
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    return torch.softmax(scores, -1).to(v.dtype) @ v
