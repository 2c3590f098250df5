"""Attention over packed documents: a token sees its own document and nothing else.

A pack is T tokens in a row; `cu_seqlens` marks where documents begin and end. No T x T mask is
ever built. Grouped-query attention, sliding windows and soft-capped scores are arguments.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fastsft_kernels.checks import bad, check_device, check_float, check_like, describe
from fastsft_kernels.launch import select

LARGEST_HEAD = 256


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
    backend: str | None = None,
) -> Tensor:
    """q [T, Hq, D], k and v [T, Hkv, D] -> o [T, Hq, D].

    cu_seqlens  int32 [S+1], from 0 to T; document s is the rows cu_seqlens[s] to cu_seqlens[s+1]
    max_seqlen  the longest document, or more
    Hq must be a multiple of Hkv: query head h reads key head h // (Hq / Hkv).
    scale       of the scores, positive; 1/sqrt(D) by default
    window      causal only: token i sees the tokens i-window+1 to i (as in transformers)
    softcap     c: scores become c tanh(scores / c)
    lengths     host copy of the S document lengths, when the caller has them: they are believed.
                Without it the reference reads cu_seqlens, one host synchronisation
    blocks      `fused.attention_blocks(lengths, device)`, for the kernels: the grid is then exact
                and the longest blocks run first. Made once for all layers; the reference ignores it

    Gradients for q, k and v; on Triton not twice differentiable. Heads of more than 256 numbers run
    the reference. Raises ValueError for shapes, dtypes and options that do not fit, and for lengths
    that the host can see are wrong.
    """
    op = "varlen_attention"
    run = choose(op, backend, q)
    check_attention(op, q, k, v, cu_seqlens, blocks)
    check_scores(op, causal, scale, window, softcap)
    _check_lengths(op, q, cu_seqlens, max_seqlen, lengths)
    return run(
        q,
        k,
        v,
        cu_seqlens,
        max_seqlen,
        causal=causal,
        scale=scale,
        window=window,
        softcap=softcap,
        lengths=lengths,
        blocks=blocks,
    )


def choose(op: str, backend: str | None, q: Tensor) -> Callable[..., Any]:
    """`select`, but heads that are too large for the kernels run the reference."""
    if q.ndim == 3 and q.shape[2] > LARGEST_HEAD:
        if backend == "triton":
            what = f"the kernels hold heads of up to {LARGEST_HEAD} numbers"
            raise bad(op, what, describe(q), "Pass backend=None.")
        backend = backend or "reference"
    return select(op, backend, q)


def check_attention(
    op: str, q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, blocks: Tensor | None
) -> None:
    """Raises ValueError unless the tensors belong together."""
    check_float(op, "q", q)
    check_like(op, "k", k, "q", q)
    check_like(op, "v", v, "q", q)
    fits = q.ndim == k.ndim == 3 and k.shape == v.shape
    if not fits or q.shape[::2] != k.shape[::2] or q.shape[1] % max(k.shape[1], 1):
        raise bad(
            op,
            "q must be [T, Hq, D] and k, v [T, Hkv, D] with Hq a multiple of Hkv",
            f"{describe(q)}, {describe(k)}, {describe(v)}",
            "Drop the batch dimension; put heads second.",
        )
    if cu_seqlens.dtype != torch.int32 or cu_seqlens.ndim != 1 or cu_seqlens.numel() < 1:
        raise bad(
            op, "cu_seqlens must be int32 [S+1]", describe(cu_seqlens), "Convert with .int()."
        )
    check_device(op, "cu_seqlens", cu_seqlens, "q", q)
    if blocks is None:
        return
    if blocks.dtype != torch.int32 or blocks.ndim != 2 or blocks.shape[1] != 2:
        raise bad(
            op, "blocks must be int32 [n, 2]", describe(blocks), "Make it with attention_blocks."
        )
    check_device(op, "blocks", blocks, "q", q)


def check_scores(
    op: str, causal: bool, scale: float | None, window: int | None, softcap: float | None
) -> None:
    """Raises ValueError for options of the scores that mean nothing."""
    if scale is not None and not scale > 0:
        raise bad(op, "scale must be positive", scale, "Pass None for 1/sqrt(D).")
    if window is not None and (window < 1 or not causal):
        raise bad(
            op,
            "window must be at least 1, and needs causal=True",
            f"window={window}, causal={causal}",
            "Pass window=None for full attention.",
        )
    if softcap is not None and not softcap > 0:
        raise bad(op, "softcap must be positive", softcap, "Pass None for no soft-cap.")


def _check_lengths(
    op: str, q: Tensor, cu_seqlens: Tensor, max_seqlen: int, lengths: Sequence[int] | None
) -> None:
    """What the host knows of the documents; a GPU's cu_seqlens are not read for a check."""
    if lengths is not None:
        count = cu_seqlens.numel() - 1
        if (len(lengths), sum(lengths)) != (count, q.shape[0]) or min(lengths, default=0) < 0:
            raise bad(
                op,
                f"lengths must be those of cu_seqlens: {count} that sum to T = {q.shape[0]}",
                f"{len(lengths)} that sum to {sum(lengths)}",
                "Pass the document lengths, or leave them out.",
            )
    elif cu_seqlens.device.type == "cpu":
        bounds = cu_seqlens.tolist()
        lengths = [b - a for a, b in zip(bounds, bounds[1:], strict=False)]
        if bounds[0] != 0 or bounds[-1] != q.shape[0] or min(lengths, default=0) < 0:
            raise bad(
                op,
                f"cu_seqlens must rise from 0 to T = {q.shape[0]}",
                bounds if len(bounds) <= 8 else f"{bounds[:4]} ... {bounds[-4:]}",
                "Pass the running sum of the document lengths, beginning with 0.",
            )
    else:
        return
    if max(lengths, default=0) > max_seqlen:
        raise bad(
            op,
            "max_seqlen is shorter than a document",
            f"{max_seqlen}, the longest being {max(lengths)}",
            "Pass the longest length.",
        )
