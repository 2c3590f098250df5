"""Embedding and head in host memory: for a card that has room for the layers and little else.

Both are exact. The embedding's rows of a micro-batch are gathered by the host and sent along with it.
The head comes in tiles of the vocabulary, the next on its way while one is worked on; the loss takes two
passes over them, since a row's gradient needs its sum over the whole vocabulary first:

    1   z = h Wᵀ of a tile: running maximum and sum of exp, the label's z, the largest z
    2   z again; p = exp(z - lse) - [label]; dh += p W

That is three products instead of two, and twice the head over the bus: 2 x 42 ms for 1 GB at 25 GB/s.
Generation goes through the same modules, one small product at a time.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from fastsft_kernels.products import add_product
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from fastsft.model.offload import Copies, CopyStream, pin

TILE = 8192  # rows of the head on the device at a time: 67 MB at 4096 numbers of bf16, and as much coming
ROWS = 1024  # rows of hidden states: a piece of logits has 8 M numbers


class HostEmbedding(nn.Module):
    """An embedding module that lies in host memory; ids of any device -> rows on that device."""

    def __init__(self, embedding: nn.Module, device: torch.device) -> None:
        super().__init__()
        self.inner, self.device = embedding.to("cpu" if device.type == "cuda" else device), device

    @property
    def weight(self) -> Any:
        return self.inner.weight

    def rows(self, host_ids: Tensor) -> Tensor:
        """host_ids [T], on the host -> [T, H] on the device; nothing waits for the device."""
        rows: Tensor = self.inner(host_ids)
        if self.device.type == "cuda":
            rows = rows.pin_memory().to(self.device, non_blocking=True)
        return rows

    def forward(self, ids: Tensor) -> Tensor:
        return self.rows(ids.to(self.inner.weight.device)).to(ids.device)  # type: ignore[arg-type]


class HostHead(nn.Module):
    """A head [V, H] without bias in pinned host memory."""

    def __init__(self, weight: Tensor, device: torch.device) -> None:
        super().__init__()
        weight = weight.detach().to("cpu" if device.type == "cuda" else device)
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.device = device
        self._release = pin(self.weight) if device.type == "cuda" else None
        self.copies: Copies | None = CopyStream(device) if device.type == "cuda" else None

    def tiles(self) -> Iterator[tuple[int, Tensor]]:
        """(first row, rows on the device) from the first tile to the last, the next one on its way.

        A tile is valid until the next but one is asked for: two buffers, which only the main stream's
        order frees, so that the host may run ahead without a third.
        """
        weight, starts = self.weight.detach(), range(0, self.weight.shape[0], TILE)
        if self.copies is None:
            yield from ((first, weight[first : first + TILE]) for first in starts)
            return
        copies, shape = self.copies, (min(TILE, weight.shape[0]), weight.shape[1])
        buffers = [torch.empty(shape, dtype=weight.dtype, device=self.device) for _ in starts[:2]]

        def fetch(i: int) -> tuple[int, Tensor, Any]:
            rows = weight[starts[i] : starts[i] + TILE]
            tile = buffers[i % 2][: rows.shape[0]]
            return starts[i], tile, copies.copy(tile, rows)

        coming = fetch(0)
        try:
            for i in range(len(starts)):
                first, tile, arrived = coming
                copies.wait(arrived)
                if i + 1 < len(starts):
                    coming = fetch(i + 1)
                yield first, tile
        finally:  # left early: a buffer is not free before the copy into it has ended
            copies.wait(coming[2])

    def forward(self, hidden: Tensor) -> Tensor:
        return torch.cat([hidden @ tile.t() for _, tile in self.tiles()], -1)


def streamed_cross_entropy(
    hidden: Tensor,
    head: HostHead,
    labels: Tensor,
    *,
    softcap: float | None = None,
    scale: float = 1.0,
    chunk_rows: int | None = None,
) -> tuple[Tensor, Tensor]:
    """hidden [n, H], labels int64 [n], all of them trained -> (summed loss, how many predicted right).

    As `linear_cross_entropy(reduction="sum")` with logits softcap(scale · hidden Wᵀ).
    """
    loss, correct = _StreamedLoss.apply(hidden, labels, head, softcap, scale, chunk_rows or ROWS)
    return loss, correct


class _StreamedLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        labels: Tensor,
        head: HostHead,
        softcap: float | None,
        scale: float,
        chunk_rows: int,
    ) -> tuple[Tensor, Tensor]:
        n = hidden.shape[0]
        pieces = [slice(i, min(i + chunk_rows, n)) for i in range(0, n, chunk_rows)]
        lse, target, best = _scores(hidden, labels, head, softcap, scale, pieces)
        if ctx.needs_input_grad[0]:
            dhidden = _gradient(hidden, labels, head, softcap, scale, pieces, lse)
            ctx.save_for_backward(dhidden.to(hidden.dtype))
        correct = (best == labels).sum()
        ctx.mark_non_differentiable(correct)
        return (lse - target).sum(), correct

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        (dhidden,) = ctx.saved_tensors
        return dhidden * grad, None, None, None, None, None


def _logits(hidden: Tensor, tile: Tensor, softcap: float | None, scale: float) -> Tensor:
    z = hidden @ tile.t()
    z = z if z.dtype == torch.float64 else z.float()
    z = z.mul_(scale) if scale != 1.0 else z
    return z if softcap is None else z.div_(softcap).tanh_().mul_(softcap)


def _scores(
    hidden: Tensor,
    labels: Tensor,
    head: HostHead,
    softcap: float | None,
    scale: float,
    pieces: list[slice],
) -> tuple[Tensor, Tensor, Tensor]:
    """(log of the sum of exp, the label's logit, the first largest logit's index), [n] each."""
    wide = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    n, device = hidden.shape[0], hidden.device
    peak = torch.full((n,), -torch.inf, dtype=wide, device=device)
    total, target = (torch.zeros(n, dtype=wide, device=device) for _ in range(2))
    best = torch.zeros(n, dtype=torch.int64, device=device)
    for first, tile in head.tiles():
        for rows in pieces:
            z = _logits(hidden[rows], tile, softcap, scale)
            largest, index = z.max(1)
            best[rows] = torch.where(largest > peak[rows], index + first, best[rows])
            above = torch.maximum(peak[rows], largest)
            target[rows] += _at_label(z, labels[rows] - first)
            total[rows] *= torch.exp(peak[rows] - above)
            total[rows] += z.sub_(above[:, None]).exp_().sum(1)
            peak[rows] = above
    return peak + total.log(), target, best


def _at_label(z: Tensor, label: Tensor) -> Tensor:
    """z [m, v] at its row's label, or 0 where the label is in another tile."""
    inside = (label >= 0) & (label < z.shape[1])
    found = z.gather(1, label.clamp(0, z.shape[1] - 1)[:, None])[:, 0]
    return torch.where(inside, found, 0.0)


def _gradient(
    hidden: Tensor,
    labels: Tensor,
    head: HostHead,
    softcap: float | None,
    scale: float,
    pieces: list[slice],
    lse: Tensor,
) -> Tensor:
    """Of the summed loss in `hidden`, summed over the tiles in float32."""
    dhidden = torch.zeros(hidden.shape, dtype=lse.dtype, device=hidden.device)
    for first, tile in head.tiles():
        for rows in pieces:
            z = _logits(hidden[rows], tile, softcap, scale)
            slope = None if softcap is None else 1 - (z / softcap).square()
            p = z.sub_(lse[rows, None]).exp_()
            label = labels[rows] - first
            inside = (label >= 0) & (label < p.shape[1])
            label = label.clamp(0, p.shape[1] - 1)[:, None]
            p.scatter_add_(1, label, -inside.to(p.dtype)[:, None])
            p = p if slope is None else p.mul_(slope)
            p = p.mul_(scale).to(hidden.dtype)
            add_product(dhidden[rows], p, tile)
    return dhidden
