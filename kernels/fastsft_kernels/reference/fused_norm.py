"""RMS norm's raw forward and backward, the adapters' term included, in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor

from fastsft_kernels.fused.strips import Adapters
from fastsft_kernels.reference.strips import adapters_term


def rms_norm_forward(
    x: Tensor,
    weight: Tensor,
    eps: float = 1e-6,
    *,
    offset: float = 0.0,
    residual: Tensor | None = None,
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """See `fastsft_kernels.fused.rms_norm_forward`."""
    total = x if residual is None else x + residual
    z = _wide(total)
    rstd = torch.rsqrt(z.square().mean(-1) + eps)
    y = (z * rstd[..., None] * (_wide(weight) + offset)).to(x.dtype)
    return (y if out is None else out.copy_(y)), rstd, total


def rms_norm_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    rstd: Tensor,
    *,
    offset: float = 0.0,
    residual_grad: Tensor | None = None,
    adapters: Adapters | None = None,
    weight_grad: bool = False,
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """See `fastsft_kernels.fused.rms_norm_backward`."""
    g = _wide(dy)
    if adapters is not None:
        g = g + adapters_term(adapters)
    normed = _wide(x) * rstd[..., None]
    weighted = g * (_wide(weight) + offset)
    dx = (weighted - normed * (weighted * normed).mean(-1, keepdim=True)) * rstd[..., None]
    if residual_grad is not None:
        dx = dx + _wide(residual_grad)
    dx = dx.to(x.dtype)
    dweight = (g * normed).flatten(0, -2).sum(0) if weight_grad else None
    return (dx if out is None else out.copy_(dx)), dweight


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()
