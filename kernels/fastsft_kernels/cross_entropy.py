"""Cross entropy, alone and with the output head in front of it.

`linear_cross_entropy` is for training: it takes the last hidden state and the head's weight,
gathers the trained rows first, and never holds the logits of more than a piece of them. Masked
tokens cost nothing. Labels are aligned with `hidden`: row t is scored against labels[t].
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastsft_kernels.checks import (
    bad,
    check_device,
    check_float,
    check_shape,
    compute_dtype,
    describe,
)
from fastsft_kernels.launch import select

_REDUCTIONS = ("none", "mean", "sum")


def cross_entropy(
    logits: Tensor,
    labels: Tensor,
    *,
    ignore_index: int = -100,
    reduction: str = "mean",
    softcap: float | None = None,
    backend: str | None = None,
) -> Tensor:
    """logits[T, V], labels int64[T] -> loss, float32 (float64 for float64 logits).

    Rows labelled `ignore_index` have loss 0 and no gradient. reduction "mean" divides by the rows
    that count and is nan where there is none, as in torch; "none" gives [T]. softcap c replaces
    the logits by c tanh(logits / c). The logits are kept as they are, and kept for backward, which
    reads them again. Nothing waits for the device. A second derivative is not supported.
    """
    op = "cross_entropy"
    run = select(op, backend, logits)
    check_float(op, "logits", logits)
    if logits.ndim != 2:
        raise bad(op, "logits must be [T, V]", describe(logits), "Flatten batch and sequence.")
    check_labels(op, labels, logits, logits.shape[1], ignore_index)
    _check_options(op, reduction, softcap)
    logits = logits if logits.stride(1) == 1 else logits.contiguous()
    return run(logits, labels, ignore_index=ignore_index, reduction=reduction, softcap=softcap)


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    ignore_index: int = -100,
    reduction: str = "mean",
    softcap: float | None = None,
    chunk_rows: int | None = None,
    rows: Tensor | None = None,
    scale: float = 1.0,
    return_correct: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Cross entropy of softcap(scale · hidden weightᵀ) against labels, logits never whole; scale > 0.

    hidden [T, H], weight [V, H] of the same dtype (any, under autocast), labels int64 [T].
    rows            int64 [n], exactly the rows whose label counts; without it they are looked
                    for, one host synchronisation on a GPU
    reduction       "mean" (over the rows that count; nan where there is none, as in torch),
                    "sum", or "none" ([T], 0 in the other rows; computed again in backward)
    chunk_rows      rows whose logits exist at a time; None: a size that suits the device
    return_correct  also return the number of rows, int64 scalar, where no logit exceeds the label's

    The loss is float32 (float64 for float64 inputs). Gradients for hidden and, if it requires
    one, weight (accumulated in float32); computed in forward, not at all under no_grad. A second
    derivative is not supported.
    """
    op = "linear_cross_entropy"
    run = select(op, backend, hidden)
    check_float(op, "hidden", hidden)
    if hidden.ndim != 2 or weight.ndim != 2 or hidden.shape[1] != weight.shape[1]:
        raise bad(
            op,
            "hidden must be [T, H] and weight [V, H]",
            f"{describe(hidden)} and {describe(weight)}",
            "Flatten batch and sequence; pass the head's weight as it is.",
        )
    check_device(op, "weight", weight, "hidden", hidden)
    if weight.dtype != hidden.dtype and compute_dtype(hidden) == hidden.dtype:
        raise bad(
            op,
            f"weight must have hidden's dtype ({hidden.dtype}) outside autocast",
            describe(weight),
            "Convert one of them.",
        )
    _check_options(op, reduction, softcap)
    if scale <= 0:
        raise bad(op, "scale must be positive", scale, "Pass 1.0 for none.")
    if chunk_rows is not None and chunk_rows < 1:
        raise bad(op, "chunk_rows must be at least 1", chunk_rows, "Leave it out.")
    check_labels(op, labels, hidden, weight.shape[0], ignore_index, rows)
    return run(
        hidden,
        weight,
        labels,
        ignore_index=ignore_index,
        reduction=reduction,
        softcap=softcap,
        chunk_rows=chunk_rows,
        rows=rows,
        scale=scale,
        return_correct=return_correct,
    )


def _check_options(op: str, reduction: str, softcap: float | None) -> None:
    if reduction not in _REDUCTIONS:
        raise bad(op, "unknown reduction", repr(reduction), f"Pass one of {_REDUCTIONS}.")
    if softcap is not None and softcap <= 0:
        raise bad(op, "softcap must be positive", softcap, "Pass None for no soft-cap.")


def check_labels(
    op: str,
    labels: Tensor,
    x: Tensor,
    vocabulary: int,
    ignore_index: int,
    rows: Tensor | None = None,
) -> None:
    """Raises ValueError unless `labels` (and `rows`) fit x [T, ..]; on a CPU, values too."""
    check_shape(op, "labels", labels, (x.shape[0],), "[T]")
    check_device(op, "labels", labels, "the input", x)
    if labels.dtype != torch.int64:
        raise bad(op, "labels must be int64", describe(labels), "Convert with labels.long().")
    if rows is not None:
        if rows.dtype != torch.int64 or rows.ndim != 1:
            raise bad(op, "rows must be int64 [n]", describe(rows), "Pass indices, not a mask.")
        check_device(op, "rows", rows, "the input", x)
    if labels.device.type != "cpu":
        return
    counted = labels[labels != ignore_index] if rows is None else labels[rows]
    if counted.numel() and not 0 <= int(counted.min()) <= int(counted.max()) < vocabulary:
        raise bad(
            op,
            f"labels of trained rows must be in [0, {vocabulary})",
            f"{int(counted.min())} to {int(counted.max())}",
            "Mask other rows with ignore_index and leave them out of rows.",
        )
