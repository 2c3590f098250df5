"""Cross entropy, alone and behind an output head, over whatever computes a row's loss.

Both autograd Functions here take `row_losses`, a function with the signature of `cross_entropy_`:
the one in plain torch for the reference, the kernel for the Triton backend.

`CrossEntropy` leaves the caller's logits alone. Forward reads them for the losses; backward reads
them again and writes the gradient, the upstream gradient already in it, into a new tensor. Making
the gradient in forward would save one read of three passes, but only where the upstream gradient
is 1: otherwise backward reads and writes a gradient that forward wrote, four passes. It would
also hold logits and gradient between forward and backward, lose what a loss scale is there to
save (a mean over 8192 rows is below float16's smallest number in most columns), and give
`retain_graph` a buffer that was scaled already.

`LinearCrossEntropy` goes through the trained rows in pieces. Logits exist for one piece, in one
buffer; forward turns them into their gradient at once and multiplies that out to the gradient of
the hidden rows (and, if it trains, of the weight), so the head's products run once. Backward only
multiplies by the upstream gradient. That holds for a sum or a mean, where the upstream gradient
is one number. For reduction="none" the weight's gradient mixes rows with different upstream
gradients, so there the pieces are computed again in backward.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastsft_kernels.checks import compute_dtype
from fastsft_kernels.fused.cross_entropy import RowLosses
from fastsft_kernels.products import add_product
from fastsft_kernels.reference.fused_cross_entropy import accumulator, cross_entropy_

_CPU_PIECE = 1 << 20  # logits at a time on a CPU, where a piece should stay in the cache
_GPU_PIECE = 1 << 27  # and on a GPU, where a product needs some thousand rows to fill the card
_PITCH = 64  # rows of a piece of logits start at multiples of it: 128 bytes at 16 bits


class LossOptions(NamedTuple):
    row_losses: Callable[..., RowLosses]
    ignore_index: int
    reduction: str
    softcap: float | None
    scale: float = 1.0

    def rows(self, logits: Tensor, labels: Tensor, **kwargs: Any) -> RowLosses:
        """The row losses of a piece, with the gradient in its place (see `cross_entropy_`)."""
        return self.row_losses(
            logits,
            labels,
            ignore_index=self.ignore_index,
            softcap=self.softcap,
            scale=self.scale,
            entropy=False,
            **kwargs,
        )


def cross_entropy(
    logits: Tensor,
    labels: Tensor,
    *,
    ignore_index: int = -100,
    reduction: str = "mean",
    softcap: float | None = None,
) -> Tensor:
    """See `fastsft_kernels.cross_entropy`."""
    options = LossOptions(_in_pieces, ignore_index, reduction, softcap)
    return CrossEntropy.apply(logits, labels, options)


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
) -> Tensor | tuple[Tensor, Tensor]:
    """See `fastsft_kernels.linear_cross_entropy`."""
    if rows is None:
        rows = (labels != ignore_index).nonzero().squeeze(1)
    chunk = chunk_rows or default_chunk_rows(hidden, weight.shape[0])
    options = LossOptions(cross_entropy_, ignore_index, reduction, softcap, scale)
    loss, correct = linear_loss(hidden, weight, labels, rows, chunk, options)
    return (loss, correct) if return_correct else loss


def linear_loss(
    hidden: Tensor, weight: Tensor, labels: Tensor, rows: Tensor, chunk: int, options: LossOptions
) -> tuple[Tensor, Tensor]:
    """(loss, number correct) of the trained `rows`, `chunk` of them at a time."""
    hidden = hidden.to(compute_dtype(hidden))
    grad = torch.is_grad_enabled()
    return LinearCrossEntropy.apply(hidden, weight, labels, rows, chunk, options, grad)


def default_chunk_rows(x: Tensor, vocabulary: int) -> int:
    """Rows whose logits are computed at a time."""
    piece = _CPU_PIECE if x.device.type == "cpu" else _GPU_PIECE
    return max(256, piece // vocabulary)


def _in_pieces(
    logits: Tensor,
    labels: Tensor,
    *,
    gradient_scale: Tensor | None,
    out: Tensor | None = None,
    **options: Any,
) -> RowLosses:
    """`cross_entropy_` a piece of rows at a time, for its float32 copies of them."""
    size = default_chunk_rows(logits, logits.shape[1])
    losses = []
    for i, piece in enumerate(logits.split(size)):
        at = slice(i * size, (i + 1) * size)
        by = gradient_scale
        if by is not None and by.ndim:
            by = by[at]
        into = None if out is None else out[at]
        losses.append(cross_entropy_(piece, labels[at], gradient_scale=by, out=into, **options))
    return _joined(losses)


def _joined(losses: list[RowLosses]) -> RowLosses:
    return RowLosses(
        torch.cat([x.loss for x in losses]), torch.cat([x.correct for x in losses]), None
    )


class CrossEntropy(torch.autograd.Function):
    """(logits[T, V], labels[T], options) -> loss; see the top of this file."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor, options: LossOptions) -> Tensor:
        losses = options.rows(logits, labels, gradient_scale=None).loss
        counted = (labels != options.ignore_index).sum(dtype=losses.dtype)
        ctx.save_for_backward(logits, labels, counted)
        ctx.options = options
        if options.reduction == "none":
            return losses
        return losses.sum() if options.reduction == "sum" else losses.sum() / counted

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        logits, labels, counted = ctx.saved_tensors
        if ctx.options.reduction == "mean":
            upstream = upstream / counted  # no rows: inf, but then none is multiplied by it
        dlogits = logits.new_empty(logits.shape)
        ctx.options.rows(logits, labels, gradient_scale=upstream, out=dlogits)
        return dlogits, None, None


class LinearCrossEntropy(torch.autograd.Function):
    """(hidden, weight, labels, rows, chunk rows, options, grad enabled) -> (loss, correct)."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        rows: Tensor,
        chunk: int,
        options: LossOptions,
        grad: bool,
    ) -> tuple[Tensor, Tensor]:
        later = options.reduction == "none"
        needs = [grad and not later and need for need in ctx.needs_input_grad[:2]]
        done = _head(hidden, weight, labels, rows, chunk, options, *needs)
        if later:
            ctx.save_for_backward(hidden, weight, labels, rows)
        else:
            ctx.save_for_backward(done.dhidden, done.dweight, rows)
        ctx.chunk, ctx.options = chunk, options
        ctx.tokens, ctx.dtype = hidden.shape[0], weight.dtype
        ctx.mark_non_differentiable(done.correct)
        if later:
            loss = done.losses.new_zeros(labels.numel()).index_copy_(0, rows, done.losses)
        else:
            loss = done.losses.sum() if options.reduction == "sum" else done.losses.mean()
        return loss, done.correct

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.options.reduction == "none":
            hidden, weight, labels, rows = ctx.saved_tensors
            needs = ctx.needs_input_grad[:2]
            args = (hidden, weight, labels, rows, ctx.chunk, ctx.options)
            done = _head(*args, *needs, upstream=upstream[rows])
            dhidden, dweight = done.dhidden, done.dweight
            dweight = None if dweight is None else dweight.to(ctx.dtype)
        else:
            dhidden, dweight, rows = ctx.saved_tensors
            if ctx.options.reduction == "mean":
                upstream = upstream / max(rows.numel(), 1)
            dhidden = None if dhidden is None else _scaled(dhidden, upstream, dhidden.dtype)
            dweight = None if dweight is None else _scaled(dweight, upstream, ctx.dtype)
        if dhidden is not None:
            whole = dhidden.new_zeros(ctx.tokens, dhidden.shape[1])
            dhidden = whole.index_copy_(0, rows, dhidden)
        return dhidden, dweight, None, None, None, None, None


class _Head(NamedTuple):
    """What the trained rows of a head gave: losses [n], the number correct, gradients."""

    losses: Tensor
    correct: Tensor
    dhidden: Tensor | None
    dweight: Tensor | None


def _head(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    rows: Tensor,
    chunk: int,
    options: LossOptions,
    need_hidden: bool,
    need_weight: bool,
    *,
    upstream: Tensor | None = None,
) -> _Head:
    """Piece by piece; `upstream` [n] weighs each row's gradient (reduction="none")."""
    weight = weight.to(hidden.dtype)
    (vocabulary, width), n = weight.shape, rows.numel()
    pitch = -(-vocabulary // _PITCH) * _PITCH
    buffer = hidden.new_empty(min(chunk, n), pitch)[:, :vocabulary]
    dhidden = hidden.new_empty(n, width) if need_hidden else None
    dweight = None
    if need_weight:
        dweight = weight.new_empty(weight.shape, dtype=accumulator(weight.dtype))
    losses = []
    for i, piece in enumerate(rows.split(chunk)):  # one empty piece where there are no rows
        at = slice(i * chunk, i * chunk + piece.numel())
        h, logits = hidden.index_select(0, piece), buffer[: piece.numel()]
        torch.mm(h, weight.t(), out=logits)
        by: float | Tensor | None = 1.0 if upstream is None else upstream[at]
        by = by if need_hidden or need_weight else None
        losses.append(options.rows(logits, labels.index_select(0, piece), gradient_scale=by))
        if dhidden is not None:
            torch.mm(logits, weight, out=dhidden[at])
        if dweight is not None:
            add_product(dweight, logits.t(), h, first=i == 0)
    joined = _joined(losses)
    return _Head(joined.loss, joined.correct.sum(), dhidden, dweight)


def _scaled(x: Tensor, by: Tensor, dtype: torch.dtype) -> Tensor:
    """x · by, computed in float32 or more and rounded once to `dtype`, without a wide copy."""
    return torch.mul(x, by.view(1, 1), out=x.new_empty(x.shape, dtype=dtype))
