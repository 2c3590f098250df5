"""RMS norm, with the residual addition in front of it where the caller wants both."""

from __future__ import annotations

from torch import Tensor

from fastsft_kernels.checks import bad, check_device, check_float, check_like, check_shape, describe
from fastsft_kernels.launch import select


def rms_norm(
    x: Tensor,
    weight: Tensor,
    eps: float = 1e-6,
    *,
    offset: float = 0.0,
    residual: Tensor | None = None,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """x [.., H], weight [H] -> y = x / sqrt(mean(x²) + eps) · (weight + offset), in x's dtype.

    offset is 1 for models that store weight - 1 (Gemma). With residual [.., H] the sum
    x + residual is normed, and (y, x + residual) returned. weight may be of another float dtype.
    x may be a view with strides, such as [T, heads, D] of a buffer that holds q, k and v. Computed
    in float32 at least. Gradients for x, weight and residual.
    """
    op = "rms_norm"
    run = select(op, backend, x)
    check_norm(op, x, weight)
    if residual is not None:
        check_shape(op, "residual", residual, tuple(x.shape), "of x's shape")
        check_like(op, "residual", residual, "x", x)
    return run(x, weight, eps, offset=offset, residual=residual)


def check_norm(op: str, x: Tensor, weight: Tensor) -> None:
    """Raises ValueError unless `weight` is that of a norm of `x` over its last dimension."""
    check_float(op, "x", x)
    check_float(op, "weight", weight)
    if not x.dim():
        raise bad(op, "x must have a dimension to norm over", describe(x), "Pass [.., H].")
    check_shape(op, "weight", weight, tuple(x.shape[-1:]), "[H]")
    check_device(op, "weight", weight, "x", x)
