"""Rotary position embedding, half-split, on queries and keys at once.

The caller's tables carry the positions and any scaling of the frequencies (Llama 3, YaRN,
linear): row t holds the cosines and sines of token t. Tables narrower than half a head turn the
first part of the head and leave the rest (partial rotary).
"""

from __future__ import annotations

from torch import Tensor

from fastsft_kernels.checks import bad, check_device, check_float, check_like, describe
from fastsft_kernels.launch import select


def rope(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *, backend: str | None = None
) -> tuple[Tensor, Tensor]:
    """q [T, Hq, D], k [T, Hkv, D], cos and sin [T, R/2] with R <= D -> (q, k), new tensors.

    Number i < R/2 of a head turns with number i + R/2. The tables may be of another float dtype
    than q; no gradient flows to them. Gradients for q and k.
    """
    run = select("rope", backend, q)
    check_rope("rope", q, k, cos, sin)
    return run(q, k, cos.detach(), sin.detach())


def check_rope(op: str, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> None:
    """Raises ValueError unless the heads fit each other and the tables fit them."""
    check_float(op, "q", q)
    check_float(op, "cos", cos)
    check_like(op, "k", k, "q", q)
    check_like(op, "sin", sin, "cos", cos)
    check_device(op, "cos", cos, "q", q)
    if q.ndim != 3 or k.ndim != 3 or q.shape[::2] != k.shape[::2]:
        raise bad(
            op,
            "q must be [T, Hq, D] and k [T, Hkv, D]",
            f"{describe(q)} and {describe(k)}",
            "Drop the batch dimension; put heads second.",
        )
    if cos.ndim != 2 or cos.shape != sin.shape or cos.shape[0] != q.shape[0]:
        raise bad(
            op,
            f"cos and sin must be [T, R/2] with T = {q.shape[0]}",
            f"{describe(cos)} and {describe(sin)}",
            "Pass one row per token, without the repeated half.",
        )
    if 2 * cos.shape[1] > q.shape[2]:
        raise bad(
            op,
            f"the tables turn more than a head's {q.shape[2]} numbers",
            describe(cos),
            "Pass R/2 columns, without the repeated half.",
        )
