"""An RMS norm of the model, and what stands around it in a block: the sum it reads, the projection it feeds.

Its weight is used in the products' dtype; where it trains, its gradient is summed in the master's.
A family that lacks a norm somewhere has None there, and the functions below do without.
"""

from __future__ import annotations

import torch
from fastsft_kernels import fused, lora_dropout_mask
from fastsft_kernels.fused import Adapters, NormedInput
from torch import Tensor, nn

from fastsft.model.projection import Projection, Trained, Zeros, compute_copy


class Norm:
    """y = x / rms(x) · (weight + offset), over the last dimension."""

    def __init__(self, master: nn.Parameter, eps: float, offset: float, dtype: torch.dtype) -> None:
        self.master, self.eps, self.offset, self.dtype = master, eps, offset, dtype
        self.weight = master.detach()
        self.grad: Tensor | None = None

    def settle(self, zeros: Zeros) -> list[Trained]:
        """Takes the weight over: what trains of it."""
        self.weight = compute_copy(self.master, self.dtype)
        if not self.master.requires_grad:
            return []
        trained = Trained(self.master, self.weight, zeros(*self.master.shape))
        self.grad = trained.grad
        return [trained]

    def forward(
        self, x: Tensor, residual: Tensor | None = None, out: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """-> (normed, rstd, x + residual)"""
        return fused.rms_norm_forward(
            x, self.weight, self.eps, offset=self.offset, residual=residual, out=out
        )

    def backward(
        self,
        dy: Tensor,
        x: Tensor,
        rstd: Tensor,
        residual_grad: Tensor | None = None,
        adapters: Adapters | None = None,
        out: Tensor | None = None,
    ) -> Tensor:
        """The gradient of x; that of the weight is added to its master's."""
        dx, dweight = fused.rms_norm_backward(
            dy,
            x,
            self.weight,
            rstd,
            offset=self.offset,
            residual_grad=residual_grad,
            adapters=adapters,
            weight_grad=self.grad is not None,
            out=out,
        )
        if self.grad is not None and dweight is not None:
            self.grad += dweight
        return dx


def add_and_norm(
    norm: Norm | None, x: Tensor, branch: Tensor | None, projection: Projection
) -> tuple[Tensor, Tensor | None, Tensor]:
    """-> (the projection's input buffer, rstd, x + branch)"""
    buffer = projection.buffer(x.shape[0])
    home = buffer[:, : projection.k]
    if norm is None:
        total = x if branch is None else x + branch
        home.copy_(total)
        return buffer, None, total
    if branch is None:
        _, rstd, total = norm.forward(x, out=home)
    else:
        _, rstd, total = norm.forward(branch, residual=x, out=home)
    return buffer, rstd, total


def normed_again(norm: Norm | None, total: Tensor, projection: Projection) -> Tensor:
    """The input buffer of a projection once more, its tail not yet written."""
    return add_and_norm(norm, total, None, projection)[0]


def normed_input(norm: Norm | None, rstd: Tensor | None) -> NormedInput | None:
    """How a kernel norms what it reads."""
    if norm is None:
        return None
    assert rstd is not None
    return NormedInput(rstd, norm.weight, norm.offset)


def leave_norm(
    norm: Norm | None,
    dy: Tensor,
    total: Tensor,
    rstd: Tensor | None,
    dtotal: Tensor,
    adapters: Adapters | None,
    out: Tensor | None = None,
) -> Tensor:
    """Gradient of total: through the norm (and the adapters behind it), and past it."""
    if norm is not None:
        assert rstd is not None
        return norm.backward(dy, total, rstd, residual_grad=dtotal, adapters=adapters, out=out)
    dy = dy if adapters is None else _with_adapters(dy, adapters)
    return torch.add(dtotal, dy, out=out)


def _with_adapters(dy: Tensor, adapters: Adapters) -> Tensor:
    """dy + scaling · Σ mask_i ∘ (d_i a_i), where no norm reads dy and could add it (OLMo 2)."""
    d, a, dropout, scaling = adapters
    if dropout is None:
        return torch.addmm(dy, d, a, alpha=scaling)
    strips = len(dropout.modules)
    for i, (d_i, a_i) in enumerate(zip(d.chunk(strips, 1), a.chunk(strips), strict=True)):
        mask = lora_dropout_mask(dropout.key(i), dy.shape[1], dropout.p)
        dy = dy + (d_i @ a_i).mul_(mask).mul_(scaling)
    return dy
