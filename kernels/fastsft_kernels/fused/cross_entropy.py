"""Cross entropy of a piece of logits that nobody needs afterwards: its gradient overwrites them.

The head of the fast engine computes logits for one to four thousand rows at a time. Everything
anybody wants of them, the loss, whether the guess was right, the entropy and the gradient, comes
out of one launch that reads them once and writes once.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fastsft_kernels.checks import bad, check_device, check_float, check_shape, describe
from fastsft_kernels.cross_entropy import check_labels
from fastsft_kernels.launch import select


class RowLosses(NamedTuple):
    """Of each row: loss [n], whether no logit exceeds the label's [n], entropy of softmax [n].

    loss and entropy (in nats) are float32, float64 for float64 logits; correct is bool. Ignored
    rows hold 0, False, 0. entropy is None where it was not asked for.
    """

    loss: Tensor
    correct: Tensor
    entropy: Tensor | None


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
    backend: str | None = None,
) -> RowLosses:
    """logits [n, V] at any row pitch, labels int64 [n] -> RowLosses; logits become the gradient.

    The loss is the cross entropy of z = softcap · tanh(scale · logits / softcap), or scale ·
    logits without a softcap; scale is positive. The logits are overwritten by
    gradient_scale · d(Σ loss)/d logits, rounded once. Nothing waits for the device.

    gradient_scale  a number, float32 [] or [n] on the device, or None: no gradient, logits stay
                    (a tensor is float64 where the logits are)
    out             [n, V] of the logits' dtype: takes the gradient, and the logits stay
    entropy         False saves computing it

    Ignored rows are not read; their gradient is 0. On a GPU a label outside [0, V) gives nan.
    Raises ValueError for wrong shapes, dtypes or devices and for rows that overlap.
    """
    op = "cross_entropy_"
    run = select(op, backend, logits)
    check_float(op, "logits", logits)
    if logits.ndim != 2 or not logits.shape[1]:
        raise bad(op, "logits must be [n, V]", describe(logits), "Flatten batch and sequence.")
    check_labels(op, labels, logits, logits.shape[1], ignore_index)
    if softcap is not None and softcap <= 0:
        raise bad(op, "softcap must be positive", softcap, "Pass None for no soft-cap.")
    if scale <= 0:
        raise bad(op, "scale must be positive", scale, "Pass 1.0 for none.")
    if isinstance(gradient_scale, Tensor):
        _check_gradient_scale(op, gradient_scale, logits)
    _check_rows(op, "logits", logits)
    if out is not None:
        check_shape(op, "out", out, tuple(logits.shape), "[n, V]")
        _check_rows(op, "out", out)
        if out.dtype != logits.dtype or out.device != logits.device or gradient_scale is None:
            raise bad(
                op,
                f"out takes a gradient of {describe(logits)}",
                f"{describe(out)}, gradient_scale {gradient_scale}",
                "Leave out away, or pass one like the logits, and a gradient_scale.",
            )
    return run(
        logits,
        labels,
        ignore_index=ignore_index,
        softcap=softcap,
        scale=scale,
        gradient_scale=gradient_scale,
        out=out,
        entropy=entropy,
    )


def _check_gradient_scale(op: str, gradient_scale: Tensor, logits: Tensor) -> None:
    check_device(op, "gradient_scale", gradient_scale, "logits", logits)
    wide = torch.float64 if logits.dtype == torch.float64 else torch.float32
    if gradient_scale.shape not in ((), (logits.shape[0],)) or gradient_scale.dtype != wide:
        raise bad(
            op,
            f"gradient_scale must be a number, or {wide} [] or [{logits.shape[0]}]",
            describe(gradient_scale),
            "Convert it, or pass one number.",
        )


def _check_rows(op: str, name: str, x: Tensor) -> None:
    """Rows are written: each lies in one piece, and none on another."""
    rows, columns = x.shape
    if (columns > 1 and x.stride(1) != 1) or (rows > 1 and x.stride(0) < columns):
        raise bad(
            op,
            f"{name} must have contiguous rows that do not overlap",
            f"{describe(x)}, strides {x.stride()}",
            f"Pass {name}.contiguous().",
        )
