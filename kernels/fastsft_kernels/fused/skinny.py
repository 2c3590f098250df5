"""The skinny products of adapters: tails x Aᵀ, and the gradients of A and B.

Each has one side of a few columns (R = 16 to 128), so its cost is one read of x or dY, and what
matters is to make it one: all strips in one pass, gradients in float32 straight into the buffer
that the optimizer reads, x re-normalised on the fly instead of kept, and dropout masks drawn again
from their keys. A strip of any width is right; multiples of 16 load whole vectors.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fastsft_kernels.checks import (
    bad,
    check_device,
    check_float,
    check_like,
    check_shape,
    describe,
)
from fastsft_kernels.fused.strips import StripDropout, check_strips
from fastsft_kernels.launch import select


class NormedInput(NamedTuple):
    """Makes `skinny_dA` read the RMS norm of x: x · rstd · (weight + offset), in x's dtype.

    rstd float32 [T] as `rms_norm_forward` returned it, weight [K], offset 0 or 1 (Gemma).
    """

    rstd: Tensor
    weight: Tensor
    offset: float = 0.0


def tails(
    x: Tensor,
    a: Tensor,
    scaling: float,
    *,
    dropout: StripDropout | None = None,
    out: Tensor | None = None,
    copy: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """x [T, K], a [S·R, K] of x's dtype -> t [T, S·R] = scaling · (mask_i ∘ x) a_iᵀ in x's dtype.

    Strip i is rows iR to (i+1)R of a and the same columns of t; without dropout no strips are
    told apart. The scaling (with `dropout.keep_scale(p)`, the caller's business) enters in
    float32, before the only rounding. t is written to `out` where given: rows at any pitch, the
    columns behind x in x's own buffer allowed; columns of `out` beyond S·R are zeroed. copy: a
    contiguous [T, S·R] that gets t as well. Raises ValueError for what does not fit.
    """
    op = "tails"
    run = select(op, backend, x)
    _check_matrix(op, "x", x)
    check_shape(op, "a", a, (a.shape[0], x.shape[1]), "[S·R, K]")
    check_like(op, "a", a, "x", x)
    _check_dropout(op, dropout, a.shape[0], x)
    if out is not None:
        width = max(a.shape[0], out.shape[-1])
        check_shape(op, "out", out, (x.shape[0], width), "[T, S·R] or wider")
        check_like(op, "out", out, "x", x)
        _check_rows(op, out)
    if copy is not None:
        check_shape(op, "copy", copy, (x.shape[0], a.shape[0]), "[T, S·R]")
        check_like(op, "copy", copy, "x", x)
        if not copy.is_contiguous():
            raise bad(op, "copy must be contiguous", f"strides {copy.stride()}", "Make it so.")
    return run(x, a, scaling, dropout=dropout, out=out, copy=copy)


def skinny_dA(
    d: Tensor,
    x: Tensor,
    scaling: float = 1.0,
    *,
    norm: NormedInput | None = None,
    dropout: StripDropout | None = None,
    out: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """d [T, S·R], x [T, K] of one dtype -> dA [S·R, K] = scaling · d_iᵀ · (mask_i ∘ z).

    z is x, or with `norm` its RMS norm, computed on the way. Sums and the result are float32
    (float64 for float64 inputs); the result is ADDED to `out` where given, whose rows may be
    further apart than K. Deterministic: the same shapes on the same card give the same bits.
    Raises ValueError for what does not fit.
    """
    op = "skinny_dA"
    run = select(op, backend, x)
    _check_matrix(op, "x", x)
    _check_matrix(op, "d", d)
    check_shape(op, "d", d, (x.shape[0], d.shape[1]), "[T, S·R]")
    check_like(op, "d", d, "x", x)
    if norm is not None:
        _check_norm(op, norm, x)
    _check_dropout(op, dropout, d.shape[1], x)
    _check_gradient(op, out, (d.shape[1], x.shape[1]), "[S·R, K]", x)
    return run(d, x, scaling, norm=norm, dropout=dropout, out=out)


def skinny_dB(
    dy: Tensor,
    tail: Tensor,
    segments: tuple[int, ...] | None = None,
    *,
    out: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """dy [T, N], tail [T, S·R] of one dtype -> dB [N, R] = dyᵀ · tail, summed in float32.

    segments: how many columns of dy belong to each of the S strips, in order, N in all (q, k and
    v in one call); None for one strip. Row n of dB uses the strip of its segment. The result is
    float32 (float64 for float64 inputs), and is ADDED to `out` where given, whose rows may be
    further apart than R. Deterministic. Raises ValueError for what does not fit.
    """
    op = "skinny_dB"
    run = select(op, backend, dy)
    _check_matrix(op, "dy", dy)
    _check_matrix(op, "tail", tail)
    check_shape(op, "tail", tail, (dy.shape[0], tail.shape[1]), "[T, S·R]")
    check_like(op, "tail", tail, "dy", dy)
    parts = (dy.shape[1],) if segments is None else tuple(segments)
    if not parts or min(parts) < 0 or sum(parts) != dy.shape[1] or tail.shape[1] % len(parts):
        raise bad(
            op,
            f"segments must be S numbers that sum to N = {dy.shape[1]}, tail having S·R columns",
            f"segments {segments}, tail {describe(tail)}",
            "Pass one segment per strip, strips being of one width.",
        )
    _check_gradient(op, out, (dy.shape[1], tail.shape[1] // len(parts)), "[N, R]", dy)
    return run(dy, tail, segments, out=out)


def _check_matrix(op: str, name: str, x: Tensor) -> None:
    check_float(op, name, x)
    if x.dim() != 2 or not x.shape[1]:
        raise bad(op, f"{name} must be a matrix with columns", describe(x), "Reshape it.")


def _check_rows(op: str, out: Tensor) -> None:
    if out.stride(-1) != 1 and out.shape[-1] > 1:
        raise bad(
            op,
            "the numbers of a row of out must lie side by side",
            f"strides {out.stride()}",
            "Pass a view whose last stride is 1.",
        )


def _check_dropout(op: str, dropout: StripDropout | None, columns: int, x: Tensor) -> None:
    check_strips(op, columns, x.shape[0], dropout)
    if dropout is not None:
        check_device(op, "dropout.rows", dropout.rows, "x", x)


def _check_norm(op: str, norm: NormedInput, x: Tensor) -> None:
    check_shape(op, "norm.rstd", norm.rstd, (x.shape[0],), "[T]")
    check_shape(op, "norm.weight", norm.weight, (x.shape[1],), "[K]")
    check_float(op, "norm.weight", norm.weight)
    check_device(op, "norm.weight", norm.weight, "x", x)
    if norm.rstd.dtype != _wide(x) or norm.rstd.device != x.device:
        raise bad(
            op,
            f"norm.rstd must be {_wide(x)} on {x.device}",
            describe(norm.rstd),
            "Pass rms_norm_forward's.",
        )


def _check_gradient(
    op: str, out: Tensor | None, shape: tuple[int, int], meaning: str, x: Tensor
) -> None:
    if out is None:
        return
    check_shape(op, "out", out, shape, meaning)
    if out.dtype != _wide(x) or out.device != x.device:
        raise bad(op, f"out must be {_wide(x)} on {x.device}", describe(out), "Convert it first.")
    _check_rows(op, out)


def _wide(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32
