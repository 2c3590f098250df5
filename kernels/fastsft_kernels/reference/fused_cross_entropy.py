"""The gradient in place of the logits, in plain torch.

A row with logits z (after scale and soft-cap) and label y has

    loss = logsumexp(z) - z_y     dz = softmax(z) - onehot(y)     entropy = -Σ p log p

logsumexp is max(z) - log(max(softmax(z))): the largest probability is at least 1/V, so nothing
underflows, and the softmax is needed anyway.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastsft_kernels.fused.cross_entropy import RowLosses


def cross_entropy_(
    logits: Tensor,
    labels: Tensor,
    *,
    ignore_index: int = -100,
    softcap: float | None = None,
    scale: float = 1.0,
    gradient_scale: float | Tensor | None = 1.0,
    out: Tensor | None = None,
    entropy: bool = True,
) -> RowLosses:
    """See `fastsft_kernels.fused.cross_entropy_`."""
    ignored = labels == ignore_index
    target = labels.masked_fill(ignored, 0)[:, None]
    z = logits.to(accumulator(logits.dtype))
    if scale != 1.0:
        z = z * scale
    if softcap is not None:
        z = (z / softcap).tanh_().mul_(softcap)
    top = z.amax(1)
    z_label = z.gather(1, target).squeeze(1)
    p = torch.softmax(z, 1)
    losses = RowLosses(
        (top - p.amax(1).log() - z_label).masked_fill_(ignored, 0.0),
        (z_label == top) & ~ignored,
        torch.special.entr(p).sum(1).masked_fill_(ignored, 0.0) if entropy else None,
    )
    if gradient_scale is None:
        return losses
    p.scatter_add_(1, target, p.new_full((1, 1), -1.0).expand_as(target))
    if softcap is not None:
        p *= z.div_(softcap).square_().neg_().add_(1.0)
    factor = gradient_scale * scale
    if isinstance(factor, Tensor):
        p *= factor if factor.ndim == 0 else factor[:, None]
    elif factor != 1.0:
        p *= factor
    (logits if out is None else out).copy_(p.masked_fill_(ignored[:, None], 0.0))
    return losses


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """What losses and sums of gradients are kept in."""
    return torch.float64 if dtype == torch.float64 else torch.float32
