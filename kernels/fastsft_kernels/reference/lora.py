"""A linear layer with a LoRA adapter, as one autograd Function in plain torch.

    y  = x Wᵀ + bias + t Bᵀ            t = s · (mask ∘ x) Aᵀ           [T, R]
    dB = dyᵀ t        d = s · dy B     dA = dᵀ (mask ∘ x)
    dx = dy W + mask ∘ (d A)

Autograd over separate modules would keep mask ∘ x, x Aᵀ and the unscaled product, and for a
quantised base the decoded weight. Here backward needs x and t alone: W is decoded again, the
mask is drawn again from its key (on a CPU it is kept), and the factor 1/(1-p) rides in s. The
low-rank products accumulate into the large results in place, so no second [T, N] or, without
dropout, [T, K] tensor is made.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastsft_kernels.checks import compute_dtype
from fastsft_kernels.dropout import DropoutKey, keep_scale, lora_dropout_mask, random_key
from fastsft_kernels.nf4_format import NF4Weight
from fastsft_kernels.reference.nf4 import nf4_dequantize

# Where the mask is kept for backward, a byte a number, and not drawn again: on a CPU drawing it
# takes as long as a small layer's products, and memory is not what runs out.
KEEP_MASK_ON = ("cpu",)


def lora_linear(
    x: Tensor,
    weight: Tensor | NF4Weight,
    lora_a: Tensor | None,
    lora_b: Tensor | None,
    scaling: float,
    *,
    bias: Tensor | None = None,
    dropout_p: float = 0.0,
    training: bool = True,
    dropout_key: DropoutKey | None = None,
) -> Tensor:
    """See `fastsft_kernels.lora_linear`."""
    rows = x.to(compute_dtype(x)).reshape(-1, x.shape[-1])
    p = dropout_p if training and lora_a is not None else 0.0
    if p > 0 and dropout_key is None:
        dropout_key = random_key(rows.shape[0], rows.device)
    nf4 = weight if isinstance(weight, NF4Weight) else None
    dense = None if isinstance(weight, NF4Weight) else weight
    if p > 0:
        scaling *= keep_scale(p)
    y = _LoraLinear.apply(rows, dense, bias, lora_a, lora_b, nf4, scaling, p, dropout_key)
    return y.view(*x.shape[:-1], y.shape[-1])


class _LoraLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        lora_a: Tensor | None,
        lora_b: Tensor | None,
        nf4: NF4Weight | None,
        scaling: float,
        p: float,
        key: DropoutKey | None,
    ) -> Tensor:
        y = F.linear(x, _base(weight, nf4, x.dtype), None if bias is None else bias.to(x.dtype))
        tail = mask = None
        if lora_a is not None and lora_b is not None:
            mask = _mask(p, key, x.shape[1])
            tail = _apply(x, mask) @ lora_a.to(x.dtype).t()
            tail *= scaling
            y.addmm_(tail, lora_b.to(x.dtype).t())
        needs_x = ctx.needs_input_grad[1] or ctx.needs_input_grad[3]
        kept = mask if x.device.type in KEEP_MASK_ON else None
        ctx.save_for_backward(x if needs_x else None, tail, weight, lora_a, lora_b, kept)
        ctx.nf4, ctx.scaling, ctx.p, ctx.key = nf4, scaling, p, key
        ctx.bias_dtype = None if bias is None else bias.dtype
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, tail, weight, lora_a, lora_b, mask = ctx.saved_tensors
        need_x, need_weight, need_bias, need_a, need_b = ctx.needs_input_grad[:5]
        dx = dweight = dbias = da = db = None
        if need_x:
            dx = dy @ _base(weight, ctx.nf4, dy.dtype)
        if lora_a is not None:
            if need_b:
                db = (dy.t() @ tail).to(lora_b.dtype)
            if need_a or need_x:
                d = dy @ lora_b.to(dy.dtype)
                d *= ctx.scaling
                mask = _mask(ctx.p, ctx.key, lora_a.shape[1]) if mask is None else mask
            if need_a:
                da = (d.t() @ _apply(x, mask)).to(lora_a.dtype)
            if dx is not None and mask is None:
                dx.addmm_(d, lora_a.to(dy.dtype))
            elif dx is not None:
                dx += _apply(d @ lora_a.to(dy.dtype), mask)
        if need_weight:
            dweight = (dy.t() @ x).to(weight.dtype)
        if need_bias:
            dbias = dy.sum(0).to(ctx.bias_dtype)
        return dx, dweight, dbias, da, db, None, None, None, None


def _base(weight: Tensor | None, nf4: NF4Weight | None, dtype: torch.dtype) -> Tensor:
    if nf4 is None:
        assert weight is not None
        return weight.to(dtype)
    if dtype == torch.float64:
        return nf4_dequantize(nf4, dtype=torch.float32).double()
    return nf4_dequantize(nf4, dtype=dtype)


def _mask(p: float, key: DropoutKey | None, columns: int) -> Tensor | None:
    if p == 0:
        return None
    assert key is not None
    return lora_dropout_mask(key, columns, p)


def _apply(x: Tensor, mask: Tensor | None) -> Tensor:
    # Converting first beats a product of two dtypes by up to five times on a CPU.
    return x if mask is None else mask.to(x.dtype).mul_(x)
