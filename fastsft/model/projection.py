"""Linear layers that share an input, as one matrix product with their adapters inside.

    y = x Wᵀ + b + s (mask∘x) Aᵀ Bᵀ  =  [ x | t ] · [ W | B ]ᵀ + b        t = s (mask∘x) Aᵀ

q, k and v are one such group, gate and up another, o and down stand alone. Layer i of a group has
the strip of columns K + iR .. K + (i+1)R for its B, zero in the other layers' rows; R is the largest
rank of the group rounded up to a multiple of 16, the pitch a multiple of 64 numbers (128 bytes, for
vector loads). A layer without an adapter in a group that has one keeps a strip of zeros.

A dense base weight lives in the pitched buffer from the start (the module's own weight becomes a view
of it, so saving and merging see what they always saw). An NF4 base is decoded into a buffer shared by
all layers, its strips written by the same launch.

The fp32 masters of a group lie together, strips and padding included (A: [S·R, K], B: [N, R]), in one
flat buffer for the whole model, and their gradients in another: the kernels add to the gradients in
place, and one kernel writes the compute copies after an optimizer step.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from fastsft_kernels import fused
from fastsft_kernels.dropout import keep_scale
from fastsft_kernels.fused import Adapters, NormedInput, PackEntry, StripDropout
from torch import Tensor, nn

from fastsft.model.lora import LoraLinear
from fastsft.model.quant import NF4Linear
from fastsft.model.spec import NotFast

MAX_RANK = 256  # of the kernels that add an adapter's term on the way


class DecodeBuffers:
    """Where NF4 weights are decoded: two buffers in turn."""

    def __init__(self) -> None:
        self._flat: list[Tensor | None] = [None, None]
        self._turn = 0

    def take(self, rows: int, pitch: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        """An uninitialised [rows, pitch], valid until the call after next."""
        self._turn ^= 1
        flat = self._flat[self._turn]
        if flat is None or flat.numel() < rows * pitch:
            flat = self._flat[self._turn] = torch.empty(rows * pitch, dtype=dtype, device=device)
        return flat[: rows * pitch].view(rows, pitch)


class Projection:
    """A group of linear layers (LoraLinear, nn.Linear, NF4Linear) on one input [T, K]; N rows in all."""

    def __init__(self, name: str, layers: Sequence[nn.Module], dtype: torch.dtype) -> None:
        self.name, self.dtype = name, dtype
        self.adapters = [m if isinstance(m, LoraLinear) else None for m in layers]
        bases: list[Any] = [m.base if isinstance(m, LoraLinear) else m for m in layers]
        self.rows: tuple[int, ...] = tuple(base.out_features for base in bases)
        self.n, self.k = sum(self.rows), int(bases[0].in_features)
        self.device = next(t.device for t in (*bases[0].parameters(), *bases[0].buffers()))
        self._settle_strips()
        self._bases = bases
        quantised = [base.nf4 for base in bases if isinstance(base, NF4Linear)]
        if quantised and len(quantised) < len(bases):
            raise NotFast(f"{name}: some of its weights are in 4 bits and some are not")
        self.nf4 = quantised

    def _settle_strips(self) -> None:
        present = [m for m in self.adapters if m is not None]
        scalings = {m.scaling for m in present}
        if len(scalings) > 1:
            raise NotFast(f"{self.name}: its adapters have different scalings")
        if max((m.r for m in present), default=0) > MAX_RANK:
            raise NotFast(f"{self.name}: its adapters' rank is above {MAX_RANK}")
        self.scaling = scalings.pop() if scalings else 1.0
        self.p = max((m.dropout for m in present), default=0.0)
        self.r = 16 * -(-max((m.r for m in present), default=0) // 16)
        self.tail = len(self.adapters) * self.r
        self.pitch = self.k if not present else 64 * -(-(self.k + self.tail) // 64)

    def settle(self) -> None:
        """Takes the weights over; once nothing can fail any more, since a dense base moves."""
        self.bias = _joined_bias(self._bases, self.dtype, self.device)
        self.a = self._zeros(self.tail, self.k)
        self.b = self._zeros(self.n, self.r if self.nf4 else 0)
        self.dense: Tensor | None = None
        if not self.nf4:
            self.dense = self._zeros(self.n, self.pitch)
            for base, block in zip(self._bases, self.dense.split(self.rows), strict=True):
                block[:, : self.k] = base.weight.detach()
                base.weight.data = block[:, : self.k]

    def _zeros(self, rows: int, columns: int) -> Tensor:
        return torch.zeros(rows, columns, dtype=self.dtype, device=self.device)

    # --- masters -------------------------------------------------------------------------------

    @property
    def master_numbers(self) -> int:
        """float32 numbers the group takes in the flat buffers."""
        pairs = zip(self.rows, self.adapters, strict=True)
        return self.tail * self.k + sum(n * m.r for n, m in pairs if m is not None)

    def bind(self, masters: Tensor, grads: Tensor, offset: int) -> list[PackEntry]:
        """Moves the adapters' masters to their place in `masters` from `offset` on, and says where
        their compute copies go. masters and grads: flat, grads zero.

        A's lie in strips as the products need them; B's are dense, since an optimizer's fused
        kernel takes no gaps. Where ranks fill their strips the B's make one matrix [N, R] too.
        """
        end = offset + self.tail * self.k
        m_a, self.grad_a = (t[offset:end].view(self.tail, self.k) for t in (masters, grads))
        full = all(m is not None and m.r == self.r for m in self.adapters)
        whole = grads[end : end + self.n * self.r]
        self.grad_b = whole.view(self.n, self.r) if full else None
        entries = [PackEntry(offset, self.tail, self.k, self.a)] if self.tail else []
        self.views: list[tuple[nn.Parameter, Tensor]] = []
        first = 0
        for i, (adapter, rows) in enumerate(zip(self.adapters, self.rows, strict=True)):
            if adapter is not None:
                strip = slice(i * self.r, i * self.r + adapter.r)
                self._move_master(adapter.lora_A, m_a[strip], self.grad_a[strip])
                stop = end + rows * adapter.r
                home, grad = (t[end:stop].view(rows, adapter.r) for t in (masters, grads))
                self._move_master(adapter.lora_B, home, grad)
                entries.append(PackEntry(end, rows, adapter.r, self._home_of_b(first, i)))
                end = stop
            first += rows
        return entries

    def _home_of_b(self, first: int, strip: int) -> Tensor:
        rows = slice(first, first + self.rows[strip])
        if self.dense is None:
            return self.b[rows]
        return self.dense[rows, self.k + strip * self.r : self.k + (strip + 1) * self.r]

    def _move_master(self, master: nn.Parameter, home: Tensor, grad: Tensor) -> None:
        home.copy_(master.detach())
        master.data = home
        self.views.append((master, grad))

    # --- products ------------------------------------------------------------------------------

    def dropout(self, keys: Tensor, seed: int, step: int, training: bool) -> StripDropout | None:
        if not training or self.p == 0:
            return None
        modules = tuple(0 if m is None else m.module_index for m in self.adapters)
        return StripDropout(self.p, seed, step, modules, keys)

    def buffer(self, tokens: int) -> Tensor:
        """An input buffer [T, pitch]: uninitialised, but zero behind the strips."""
        x = torch.empty(tokens, self.pitch, dtype=self.dtype, device=self.device)
        if self.pitch > self.k + self.tail:
            x[:, self.k + self.tail :].zero_()
        return x

    def tail_of(self, x: Tensor) -> Tensor:
        return x[:, self.k : self.k + self.tail]

    def forward(
        self, x: Tensor, buffers: DecodeBuffers, dropout: StripDropout | None
    ) -> tuple[Tensor, Tensor]:
        """x [T, pitch], the input in its first K columns -> (y [T, N], a tail [T, S·R] to keep).

        Fills the tail of x. The one returned is memory of its own: a view would keep all of x.
        """
        tail = x[:, :0]
        if self.tail:
            home = self.tail_of(x)
            scaling = self._scale(dropout)
            tail = fused.tails(x[:, : self.k], self.a, scaling, dropout=dropout, out=home).clone()
        return self.product(x, buffers), tail

    def product(self, x: Tensor, buffers: DecodeBuffers) -> Tensor:
        """x [T, pitch], tail included -> y [T, N]."""
        weight = self._weight(buffers)
        return x @ weight.t() if self.bias is None else torch.addmm(self.bias, x, weight.t())

    def backward(
        self, dy: Tensor, buffers: DecodeBuffers, dropout: StripDropout | None
    ) -> tuple[Tensor, Adapters | None]:
        """dy [T, N] -> (dy W [T, K], what the adapters add to it)."""
        dx = dy @ self._weight(buffers)
        if not self.tail:
            return dx, None
        adapters = Adapters(self.tail_of(dx), self.a, dropout, self._scale(dropout))
        return dx[:, : self.k], adapters

    def add_grad_b(self, dy: Tensor, tail: Tensor) -> None:
        """Adds dyᵀ · tail to the gradients of B."""
        if self.grad_b is not None and self.tail:
            fused.skinny_dB(dy, tail, self.rows, out=self.grad_b)
        elif self.tail:
            self.add_padded_b(fused.skinny_dB(dy, tail, self.rows))

    def add_padded_b(self, grad: Tensor) -> None:
        """Adds [N, R] to the gradients of B that fill their strips in part."""
        for adapter, part in zip(self.adapters, grad.split(self.rows), strict=True):
            if adapter is not None:
                assert adapter.lora_B.grad is not None  # the engine sees to it before a step
                adapter.lora_B.grad += part[:, : adapter.r]

    def add_grad_a(self, adapters: Adapters | None, x: Tensor, norm: NormedInput | None) -> None:
        if adapters is not None:
            d, _, dropout, scaling = adapters
            fused.skinny_dA(d, x, scaling, norm=norm, dropout=dropout, out=self.grad_a)

    def _weight(self, buffers: DecodeBuffers) -> Tensor:
        """[W | B], [N, pitch]."""
        if self.dense is not None:
            return self.dense
        out = buffers.take(self.n, self.pitch, self.dtype, self.device)
        return fused.nf4_dequantize_group(self.nf4, out, b=self.b if self.tail else None)

    def _scale(self, dropout: StripDropout | None) -> float:
        return self.scaling * (1.0 if dropout is None else keep_scale(dropout.p))


def _joined_bias(bases: Sequence[Any], dtype: torch.dtype, device: torch.device) -> Tensor | None:
    if all(base.bias is None for base in bases):
        return None
    zeros = (torch.zeros(base.out_features, dtype=dtype, device=device) for base in bases)
    parts = (
        z if b.bias is None else b.bias.detach().to(dtype)
        for b, z in zip(bases, zeros, strict=True)
    )
    return torch.cat(list(parts))
