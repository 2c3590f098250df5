"""NF4 weights: quantise, decode, and bitsandbytes' checkpoint layout (`NF4Weight`).

Decoded values are bit-equal to bitsandbytes', in both directions of the checkpoint, without
importing it; `nf4_format` holds the arithmetic that this rests on. Quantising gives the codes of
bitsandbytes' CUDA kernels; its CPU quantiser of the scales uses a coarser table and now and then
picks the neighbouring 8-bit code.

On a GPU there are two implementations, Triton's and, where csrc is built, CUDA C++. Both give the
same bits; the one that the benchmark found faster on the card runs, and Triton's where nothing
was measured.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastsft_kernels import cuda_ops
from fastsft_kernels.checks import bad, describe
from fastsft_kernels.launch import forced_choice, select, variant
from fastsft_kernels.nf4_format import NF4Weight

__all__ = ["NF4Weight", "nf4_dequantize", "nf4_quantize"]

_BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def nf4_quantize(
    weight: Tensor,
    *,
    block_size: int = 64,
    double_quant: bool = True,
    backend: str | None = None,
) -> NF4Weight:
    """weight[N, K] (bf16, fp16 or fp32) -> NF4Weight on the same device.

    double_quant stores the block scales in 8 bits as well. No gradient flows.
    """
    op = "nf4_quantize"
    run = select_nf4(op, backend, weight)
    if weight.ndim != 2 or weight.numel() == 0:
        raise bad(
            op, "weight must be a matrix [N, K] that is not empty", describe(weight), "Reshape it."
        )
    if weight.dtype not in _DTYPES:
        raise bad(
            op,
            "weight must be bfloat16, float16 or float32",
            describe(weight),
            "Convert it first.",
        )
    if block_size not in _BLOCK_SIZES:
        raise bad(op, "no such block_size", block_size, f"Pass one of {_BLOCK_SIZES}.")
    return run(weight, block_size=block_size, double_quant=double_quant)


def nf4_dequantize(
    nf4: NF4Weight,
    *,
    dtype: torch.dtype = torch.bfloat16,
    out: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """NF4Weight -> weight[N, K] in `dtype`.

    out: write there and return it; its rows may be further apart than K (a pitched buffer), its
    last dimension must be contiguous. Only its N x K numbers are written.
    """
    op = "nf4_dequantize"
    run = select_nf4(op, backend, nf4.packed)
    if dtype not in _DTYPES:
        raise bad(op, "dtype must be bfloat16, float16 or float32", dtype, "Convert afterwards.")
    if out is not None and (
        tuple(out.shape) != nf4.shape
        or out.dtype != dtype
        or out.device != nf4.device
        or (nf4.shape[1] > 1 and out.stride(1) != 1)
    ):
        raise bad(
            op,
            f"out must be {list(nf4.shape)} {dtype} on {nf4.device} with contiguous rows",
            f"{describe(out)}, strides {out.stride()}",
            "Pass a slice of a row-major buffer.",
        )
    return run(nf4, dtype=dtype, out=out)


def select_nf4(op: str, backend: str | None, x: Tensor) -> Callable[..., Any]:
    """As `launch.select`, and for backend=None also the CUDA C++ build where it is the choice."""
    run = select(op, backend, x)
    if backend is not None or x.device.type == "meta":
        return run
    chosen = forced_choice(op)
    if chosen is None and cuda_ops.is_built():
        chosen = variant(op, ["triton", "cuda"], x)
    return getattr(cuda_ops, op) if chosen == "cuda" else run
