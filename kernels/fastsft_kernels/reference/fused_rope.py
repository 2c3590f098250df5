"""The in-place turn in plain torch."""

from __future__ import annotations

from torch import Tensor

from fastsft_kernels.reference.elementwise import rope


def rope_(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *, inverse: bool = False) -> None:
    """See `fastsft_kernels.fused.rope_`."""
    turned = rope(q, k, cos, -sin if inverse else sin)
    for x, new in zip((q, k), turned, strict=True):
        x.copy_(new)
