"""The LoRA linear layer on a GPU: cuBLAS or `lora_gemm` for the large products, kernels for the rest.

    forward    t = s · (mask ∘ x) Aᵀ          y = x Wᵀ + bias + t Bᵀ
    backward   d = s · dY · B                 dx = dY · W + mask ∘ (d · A)
               dA = dᵀ (mask ∘ x)             dB = dYᵀ t

t is saved, [T, R], and d made once, for dx and dA alike. Masks are drawn inside the kernels, from
the key: neither a mask nor a masked x exists. An NF4 base is decoded for each product.

Which product adds the low-rank part is measured per card: "cublas" makes the base product and
adds t Bᵀ to it in place, one more read and write of y (10 % at 4096 -> 14336), "epilogue" adds
it before the store in a product of our own. At 790 TFLOP/s a Triton product 9 % slower than
cuBLAS loses all of that, so cuBLAS is the choice until a card's measurement says otherwise.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastsft_kernels.checks import compute_dtype
from fastsft_kernels.dropout import DropoutKey, keep_scale, random_key
from fastsft_kernels.fused.strips import StripDropout
from fastsft_kernels.integers import cdiv, next_power_of_2
from fastsft_kernels.launch import launch, pinned, variant
from fastsft_kernels.nf4 import NF4Weight, nf4_dequantize
from fastsft_kernels.triton_ops.lora_gemm import lora_gemm
from fastsft_kernels.triton_ops.philox import keep_mask, mask_arguments
from fastsft_kernels.triton_ops.rows import side_by_side
from fastsft_kernels.triton_ops.skinny import skinny_dA, skinny_dB
from fastsft_kernels.triton_ops.tails import tails


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
    rows = side_by_side(x.to(compute_dtype(x)).reshape(-1, x.shape[-1]))
    dropout = None
    if training and dropout_p > 0 and lora_a is not None:
        seed, step, module, keys = dropout_key or random_key(rows.shape[0], rows.device)
        dropout = StripDropout(dropout_p, seed, step, (module,), keys)
        scaling *= keep_scale(dropout_p)
    nf4 = weight if isinstance(weight, NF4Weight) else None
    dense = None if isinstance(weight, NF4Weight) else weight
    y = _LoraLinear.apply(rows, dense, bias, lora_a, lora_b, nf4, scaling, dropout)
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
        dropout: StripDropout | None,
    ) -> Tensor:
        base = _base(weight, nf4, x.dtype)
        offset = None if bias is None else bias.to(x.dtype)
        tail = None
        if lora_a is None or lora_b is None:
            y = F.linear(x, base, offset)
        else:
            tail = tails(x, lora_a.to(x.dtype), scaling, dropout=dropout)
            factor = side_by_side(lora_b.to(x.dtype))
            if _in_epilogue("lora_linear", x):
                y = lora_gemm(x, base, transposed=True, tail=tail, factor=factor, bias=offset)
            else:
                y = F.linear(x, base, offset).addmm_(tail, factor.t())
        needs_x = ctx.needs_input_grad[1] or ctx.needs_input_grad[3]
        ctx.save_for_backward(x if needs_x else None, tail, weight, lora_a, lora_b)
        ctx.nf4, ctx.scaling, ctx.dropout = nf4, scaling, dropout
        ctx.bias_dtype = None if bias is None else bias.dtype
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, tail, weight, lora_a, lora_b = ctx.saved_tensors
        need_x, need_weight, need_bias, need_a, need_b = ctx.needs_input_grad[:5]
        dy = side_by_side(dy)
        dx = dweight = dbias = da = db = d = None
        if lora_a is not None and (need_a or need_x):
            d = _times_b(dy, lora_b, ctx.scaling)
        if need_x:
            dx = _input_gradient(dy, _base(weight, ctx.nf4, dy.dtype), d, lora_a, ctx.dropout)
        if need_a:
            assert d is not None
            da = skinny_dA(d, x, dropout=ctx.dropout).to(lora_a.dtype)
        if need_b:
            db = skinny_dB(dy, tail).to(lora_b.dtype)
        if need_weight:
            dweight = (dy.t() @ x).to(weight.dtype)
        if need_bias:
            dbias = dy.sum(0).to(ctx.bias_dtype)
        return dx, dweight, dbias, da, db, None, None, None


def _in_epilogue(name: str, x: Tensor) -> bool:
    # Float32 has names of its own: its products run on plain registers, and what was measured for
    # matrix instructions says nothing about them.
    name += "_f32" if x.dtype == torch.float32 else ""
    return variant(name, ["cublas", "epilogue"], x) == "epilogue"


def _base(weight: Tensor | None, nf4: NF4Weight | None, dtype: torch.dtype) -> Tensor:
    if nf4 is not None:
        return nf4_dequantize(nf4, dtype=dtype)
    assert weight is not None
    return side_by_side(weight.to(dtype))


def _times_b(dy: Tensor, lora_b: Tensor, scaling: float) -> Tensor:
    """scaling · dy · B: the tails' product, with Bᵀ laid out for it in the launch that casts it."""
    b = torch.empty(lora_b.shape[1], lora_b.shape[0], dtype=dy.dtype, device=dy.device)
    return tails(dy, b.copy_(lora_b.t()), scaling)


def _input_gradient(
    dy: Tensor,
    base: Tensor,
    d: Tensor | None,
    lora_a: Tensor | None,
    dropout: StripDropout | None,
) -> Tensor:
    if d is None or lora_a is None:
        return dy @ base
    a = side_by_side(lora_a.to(dy.dtype))
    if _in_epilogue("lora_linear_backward", dy):
        return lora_gemm(dy, base, transposed=False, tail=d, factor=a, dropout=dropout)
    dx = dy @ base
    return dx.addmm_(d, a) if dropout is None else add_masked(dx, d, a, dropout)


def add_masked(dx: Tensor, d: Tensor, a: Tensor, dropout: StripDropout) -> Tensor:
    """dx [T, K] += mask ∘ (d [T, R] · a [R, K]) in place, for one strip; dx contiguous.

    One read and write of dx; its masks are drawn on the way.
    """
    (rows, k), rank = dx.shape, d.shape[1]
    half = dx.dtype != torch.float32
    config = pinned(
        "lora_add_masked" + ("" if half else "_f32"),
        [{"BM": 64, "BN": 128 if half else 64, "num_warps": 8}],
        dx,
    )
    launch(
        _add_masked,
        (cdiv(rows, config["BM"]), cdiv(k, config["BN"])),
        *(dx, d, a, rows, k, rank, dx.stride(0), d.stride(0), a.stride(0)),
        *mask_arguments(dropout),
        BR=min(64 if half else 16, max(16, next_power_of_2(rank))),
        **config,
    )
    return dx


@triton.jit(do_not_specialize=["T", "seed", "step", "modules", "threshold"])
def _add_masked(
    dx,
    d,
    a,
    T,
    K,
    R,
    dx_stride,
    d_stride,
    a_stride,
    row_keys,
    seed,
    step,
    modules,
    threshold,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BR: tl.constexpr,
):
    row = tl.program_id(0) * BM + tl.arange(0, BM)
    first = tl.program_id(1) * BN
    k = first + tl.arange(0, BN)
    wide = row.to(tl.int64)[:, None]
    inside = (row < T)[:, None] & (k < K)[None, :]
    place = dx + wide * dx_stride + k[None, :]
    base = tl.load(place, mask=inside, other=0.0).to(tl.float32)
    keys = tl.load(row_keys + row, mask=row < T, other=0)
    keep = keep_mask(keys, first, seed, step, modules[0], threshold, BN)
    term = tl.zeros([BM, BN], tl.float32)
    r = tl.arange(0, BR)
    for _ in tl.range(tl.cdiv(R, BR), num_stages=1):
        known = (row < T)[:, None] & (r < R)[None, :]
        low = tl.load(d + wide * d_stride + r[None, :], mask=known, other=0.0)
        known = (r < R)[:, None] & (k < K)[None, :]
        high = tl.load(a + r.to(tl.int64)[:, None] * a_stride + k[None, :], mask=known, other=0.0)
        term = tl.dot(low, high, term, input_precision="ieee")
        r += BR
    total = base + tl.where(keep, term, 0.0)
    tl.store(place, total.to(dx.dtype.element_ty), mask=inside)
