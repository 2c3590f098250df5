"""Cross entropy over trained rows in pieces, with the gradient made in forward.

A row with logits z (after scale and soft-cap) and label y has

    loss = logsumexp(z) - z_y          dz = softmax(z) - onehot(y)

Both come from the same numbers, so forward turns each piece of logits into dz at once and
multiplies it out to the gradient of the hidden rows (and, if it trains, of the weight); logits
exist for one piece at a time and are computed once. Backward only multiplies by the upstream
gradient. That holds for a sum or a mean, where the upstream gradient is one number. For
reduction="none" the weight's gradient mixes rows with different upstream gradients, so there the
pieces are computed again in backward.

logsumexp is max(z) - log(max(softmax(z))): the largest probability is at least 1/V, so nothing
underflows, and the softmax is needed anyway.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastsft_kernels.checks import compute_dtype

_CPU_PIECE = 1 << 20  # logits at a time on a CPU, where a piece should stay in the cache
_GPU_PIECE = 1 << 27  # and on a GPU, where a product needs some thousand rows to fill the card


class _Options(NamedTuple):
    reduction: str
    softcap: float | None
    scale: float
    chunk_rows: int


def cross_entropy(
    logits: Tensor,
    labels: Tensor,
    *,
    ignore_index: int = -100,
    reduction: str = "mean",
    softcap: float | None = None,
) -> Tensor:
    """See `fastsft_kernels.cross_entropy`."""
    rows = (labels != ignore_index).nonzero().squeeze(1)
    options = _Options(reduction, softcap, 1.0, default_chunk_rows(logits, logits.shape[1]))
    return _CrossEntropy.apply(logits, labels, rows, options, torch.is_grad_enabled())


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
    options = _Options(reduction, softcap, scale, chunk)
    loss, correct = _LinearCrossEntropy.apply(
        hidden.to(compute_dtype(hidden)),
        weight,
        labels,
        rows,
        options,
        torch.is_grad_enabled(),
    )
    return (loss, correct) if return_correct else loss


def default_chunk_rows(x: Tensor, vocabulary: int) -> int:
    """Rows whose logits are computed at a time."""
    piece = _CPU_PIECE if x.device.type == "cpu" else _GPU_PIECE
    return max(256, piece // vocabulary)


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, labels: Tensor, rows: Tensor, options: _Options, grad: bool
    ) -> Tensor:
        losses = logits.new_empty(rows.numel(), dtype=_accumulator(logits.dtype))
        want = grad and ctx.needs_input_grad[0]
        dlogits = torch.zeros_like(logits) if want else None
        for start in range(0, rows.numel(), options.chunk_rows):
            piece = rows[start : start + options.chunk_rows]
            z = logits.index_select(0, piece).to(losses.dtype)
            loss, dz, _ = _piece_loss(z, labels[piece], options, want)
            losses[start : start + loss.numel()] = loss
            if dlogits is not None and dz is not None:
                dlogits.index_copy_(0, piece, dz.to(logits.dtype))
        ctx.save_for_backward(dlogits)
        ctx.rows, ctx.options = rows.numel(), options
        return _reduce(losses, rows, labels.numel(), options.reduction)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        (dlogits,) = ctx.saved_tensors
        if ctx.options.reduction == "none":
            upstream = upstream[:, None]
        elif ctx.options.reduction == "mean":
            upstream = upstream / max(ctx.rows, 1)
        return dlogits * upstream.to(dlogits.dtype), None, None, None, None


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        rows: Tensor,
        options: _Options,
        grad: bool,
    ) -> tuple[Tensor, Tensor]:
        need_hidden = grad and ctx.needs_input_grad[0]
        need_weight = grad and ctx.needs_input_grad[1]
        later = options.reduction == "none"
        work = _Pieces(hidden, weight, labels, rows, options)
        work.run(need_hidden=need_hidden and not later, need_weight=need_weight and not later)
        if later:
            ctx.save_for_backward(hidden, weight, labels, rows)
        else:
            ctx.save_for_backward(work.dhidden, work.dweight, rows)
        ctx.options, ctx.shape = options, hidden.shape
        ctx.dtypes = hidden.dtype, weight.dtype
        ctx.mark_non_differentiable(work.correct)
        return _reduce(work.losses, rows, labels.numel(), options.reduction), work.correct

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        need_hidden, need_weight = ctx.needs_input_grad[:2]
        if ctx.options.reduction == "none":
            hidden, weight, labels, rows = ctx.saved_tensors
            work = _Pieces(hidden, weight, labels, rows, ctx.options, upstream[rows])
            work.run(need_hidden=need_hidden, need_weight=need_weight)
            dhidden, dweight = work.dhidden, work.dweight
        else:
            dhidden, dweight, rows = ctx.saved_tensors
            if ctx.options.reduction == "mean":
                upstream = upstream / max(rows.numel(), 1)
            dhidden = None if dhidden is None else dhidden * upstream.to(dhidden.dtype)
            dweight = None if dweight is None else dweight * upstream
        if dhidden is not None:
            dhidden = dhidden.new_zeros(ctx.shape).index_copy_(0, rows, dhidden)
        if dweight is not None:
            dweight = dweight.to(ctx.dtypes[1])
        return dhidden, dweight, None, None, None, None


class _Pieces:
    """The trained rows of one head, piece by piece: losses, and gradients where wanted.

    `row_gradient` weighs each row's gradient (the upstream gradient of reduction="none").
    """

    def __init__(
        self,
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        rows: Tensor,
        options: _Options,
        row_gradient: Tensor | None = None,
    ) -> None:
        self.hidden, self.weight = hidden, weight.to(hidden.dtype)
        self.labels, self.rows, self.options = labels, rows, options
        self.row_gradient = row_gradient
        self.losses = hidden.new_empty(rows.numel(), dtype=_accumulator(hidden.dtype))
        self.dhidden: Tensor | None = None
        self.dweight: Tensor | None = None
        self.correct = rows.new_zeros(())

    def run(self, *, need_hidden: bool, need_weight: bool) -> None:
        dtype = self.losses.dtype
        if need_hidden:
            self.dhidden = self.hidden.new_empty(self.rows.numel(), self.hidden.shape[1])
        if need_weight:
            self.dweight = self.weight.new_zeros(self.weight.shape, dtype=dtype)
        for start in range(0, self.rows.numel(), self.options.chunk_rows):
            stop = min(start + self.options.chunk_rows, self.rows.numel())
            piece = self.rows[start:stop]
            h = self.hidden.index_select(0, piece)
            z = (h @ self.weight.t()).to(dtype)
            want = need_hidden or need_weight
            loss, dz, correct = _piece_loss(z, self.labels[piece], self.options, want)
            self.losses[start:stop] = loss
            self.correct += correct
            if dz is None:
                continue
            if self.row_gradient is not None:
                dz *= self.row_gradient[start:stop, None]
            dz = dz.to(h.dtype)
            if self.dhidden is not None:
                torch.mm(dz, self.weight, out=self.dhidden[start:stop])
            if self.dweight is not None and h.dtype == dtype:
                self.dweight.addmm_(dz.t(), h)
            elif self.dweight is not None:
                self.dweight += dz.t() @ h


def _piece_loss(
    z: Tensor, labels: Tensor, options: _Options, want: bool
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Raw logits z[n, V] (overwritten) -> (loss[n], gradient of the raw logits, correct)."""
    cap, scale = options.softcap, options.scale
    if scale != 1.0:
        z *= scale
    if cap is not None:
        z.div_(cap).tanh_().mul_(cap)
    top = z.amax(1)
    z_label = z.gather(1, labels[:, None]).squeeze(1)
    p = torch.softmax(z, 1)
    loss = top - p.amax(1).log() - z_label
    correct = (z_label == top).sum()
    if not want:
        return loss, None, correct
    p.scatter_add_(1, labels[:, None], p.new_full((1, 1), -1.0).expand(labels.numel(), 1))
    if cap is not None:
        p *= z.div_(cap).square_().neg_().add_(1.0)
    if scale != 1.0:
        p *= scale
    return loss, p, correct


def _accumulator(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _reduce(losses: Tensor, rows: Tensor, total: int, reduction: str) -> Tensor:
    if reduction == "none":
        return losses.new_zeros(total).index_copy_(0, rows, losses)
    return losses.sum() if reduction == "sum" else losses.mean()
