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

Where the base itself trains (full fine-tuning) there are no adapters, and dW = dYᵀ x is added to a
float32 gradient [N, K]. Masters wider than the products' dtype are copied to the dense buffer when
they have changed; masters of the same dtype live in it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from fastsft_kernels import fused
from fastsft_kernels.dropout import keep_scale
from fastsft_kernels.fused import Adapters, NormedInput, PackEntry, StripDropout
from fastsft_kernels.products import add_product
from torch import Tensor, nn

from fastsft.model.lora import LoraLinear
from fastsft.model.quant import NF4Linear
from fastsft.model.spec import NotFast

MAX_RANK = 256  # of the kernels that add an adapter's term on the way


class Trained(NamedTuple):
    """A weight of the model that trains: its master, the copy the products use, its gradient's sum."""

    master: nn.Parameter
    copy: Tensor
    grad: Tensor


# Memory for a gradient's sum, zeroed: in float32, or float64 for a float64 model.
Zeros = Callable[..., Tensor]


def compute_copy(master: Tensor, dtype: torch.dtype) -> Tensor:
    """The master in the products' dtype; itself where it has that dtype."""
    return master.detach().to(dtype)


def refresh(trained: Iterable[Trained]) -> None:
    """Writes the copies of masters of another dtype."""
    pairs = [(t.copy, t.master.detach()) for t in trained if t.copy.dtype != t.master.dtype]
    for copy, master in pairs:
        copy.copy_(master)


class DecodeBuffers:
    """Where NF4 weights are decoded: two buffers, the one not used last taken first.

    A weight that still lies in one of them is not decoded again: the rows of a long micro-batch go
    through an MLP tile by tile, and its two weights stay for all of them.
    """

    def __init__(self) -> None:
        self._flat: list[Tensor | None] = [None, None]
        self._owners: list[Projection | None] = [None, None]
        self._last = 1

    def weight(self, projection: Projection) -> Tensor:
        """[W | B] of the projection, [N, pitch], valid until two other weights were asked for."""
        known = self._owners.index(projection) if projection in self._owners else None
        self._last = self._last ^ 1 if known is None else known
        numbers = projection.n * projection.pitch
        flat = self._flat[self._last]
        if flat is None or flat.numel() < numbers:
            flat = torch.empty(numbers, dtype=projection.dtype, device=projection.device)
            self._flat[self._last] = flat
        out = flat[:numbers].view(projection.n, projection.pitch)
        if known is None:
            self._owners[self._last] = projection
            projection.decode(out)
        return out

    def forget(self) -> None:
        """The adapters have changed, so what was decoded is out of date."""
        self._owners = [None, None]


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
        self.resident = False  # an NF4 weight that stays decoded
        self._settle_training()

    def _settle_training(self) -> None:
        self.trains = any(p.requires_grad for base in self._bases for p in base.parameters())
        masters = [p for base in self._bases for p in base.parameters()]
        if self.trains and not all(p.requires_grad for p in masters):
            raise NotFast(f"{self.name}: some of its weights train and some do not")
        if self.trains and self.tail:
            raise NotFast(f"{self.name}: an adapter on a base that trains")

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

    def settle(self, zeros: Zeros) -> list[Trained]:
        """Takes the weights over, once nothing can fail any more, since a dense base moves: what trains."""
        self.bias = _joined_bias(self._bases, self.dtype, self.device)
        self.a = self._zeros(self.tail, self.k)
        in_pitch = not self.nf4 or self.resident
        self.b = self._zeros(self.n, 0 if in_pitch else self.r)
        self.dense: Tensor | None = None
        self.grad_w: Tensor | None = None
        self.grad_bias: Tensor | None = None
        if self.nf4 and self.resident:
            self.dense = self.decode(self._zeros(self.n, self.pitch))
        elif not self.nf4:
            self.dense = self._zeros(self.n, self.pitch)
            for base, block in zip(self._bases, self.dense.split(self.rows), strict=True):
                block[:, : self.k] = base.weight.detach()
                if base.weight.dtype == self.dtype:
                    base.weight.data = block[:, : self.k]
        return self._trained(zeros) if self.trains else []

    def _trained(self, zeros: Zeros) -> list[Trained]:
        assert self.dense is not None
        self.grad_w = zeros(self.n, self.k)
        parts = zip(self.dense.split(self.rows), self.grad_w.split(self.rows), strict=True)
        trained = [
            Trained(base.weight, *both) for base, both in zip(self._bases, parts, strict=True)
        ]
        if self.bias is not None:
            self.grad_bias = zeros(self.n)
            parts = zip(self.bias.split(self.rows), self.grad_bias.split(self.rows), strict=True)
            for base, (copy, grad) in zip(self._bases, parts, strict=True):
                if base.bias is not None and base.bias.dtype == self.dtype:
                    base.bias.data = copy
                if base.bias is not None:
                    trained.append(Trained(base.bias, copy, grad))
        return trained

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
        """An input buffer [T, pitch], uninitialised: K columns for the caller, the rest for `fill_tail`."""
        return torch.empty(tokens, self.pitch, dtype=self.dtype, device=self.device)

    def tail_of(self, x: Tensor) -> Tensor:
        return x[:, self.k : self.k + self.tail]

    def fill_tail(self, x: Tensor, dropout: StripDropout | None, *, copy: bool = True) -> Tensor:
        """Writes the tail of x [T, pitch] from its first K columns, zeros behind it -> the tail [T, S·R].

        The one returned is memory of its own, since a view keeps all of x; without `copy` it is a view.
        """
        kept = x.new_empty(x.shape[0], self.tail) if copy else self.tail_of(x)
        if self.tail:
            scaling, columns = self._scale(dropout), x[:, : self.k]
            more = kept if copy else None
            fused.tails(columns, self.a, scaling, dropout=dropout, out=x[:, self.k :], copy=more)
        return kept

    def restore_tail(self, x: Tensor, tail: Tensor) -> None:
        """Writes a tail that was kept back into x, zeros behind it."""
        x[:, self.k :].zero_()
        self.tail_of(x).copy_(tail)

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

    def add_grad_weight(self, dy: Tensor, x: Tensor) -> None:
        """Adds dyᵀ · x, and the bias's, where the base trains. dy [T, N], x [T, >= K]."""
        if self.grad_w is not None:
            add_product(self.grad_w, dy.t(), x[:, : self.k])
        if self.grad_bias is not None:
            self.grad_bias += dy.sum(0, dtype=self.grad_bias.dtype)

    def _weight(self, buffers: DecodeBuffers) -> Tensor:
        """[W | B], [N, pitch]."""
        return buffers.weight(self) if self.dense is None else self.dense

    def decode(self, out: Tensor) -> Tensor:
        """Writes [W | B] to out [N, pitch]; B is zero where it is kept in the pitch."""
        b = self.b if self.tail and self.b.shape[1] else None
        return fused.nf4_dequantize_group(self.nf4, out, b=b)

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
