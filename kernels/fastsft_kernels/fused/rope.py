"""Rotary position embedding in place, for the step: forward on q and k, backward on their gradients.

q and k are usually slices of one qkv buffer; turning them where they lie saves the buffers of a
new q and k, and the gradients of both turn back in the buffer the qkv product's backward reads.
"""

from __future__ import annotations

from torch import Tensor

from fastsft_kernels.checks import bad
from fastsft_kernels.launch import select
from fastsft_kernels.rope import check_rope


def rope_(
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    sin: Tensor,
    *,
    inverse: bool = False,
    backend: str | None = None,
) -> None:
    """Turns q [T, Hq, D] and k [T, Hkv, D] in place by cos and sin [T, R/2], R <= D.

    q and k may have any strides but the last, which is 1; they must not overlap. inverse: turns
    backwards, which is the backward of the turn. The tables may be of another float dtype.
    Raises ValueError for shapes, dtypes or strides that do not fit.
    """
    op = "rope_"
    run = select(op, backend, q)
    check_rope(op, q, k, cos, sin)
    for name, x in (("q", q), ("k", k)):
        if x.stride(2) != 1 and x.shape[2] > 1:
            raise bad(
                op,
                f"the numbers of a head of {name} must lie side by side, as it is turned in place",
                f"strides {x.stride()}",
                "Pass a view whose last stride is 1.",
            )
    run(q, k, cos, sin, inverse=inverse)
