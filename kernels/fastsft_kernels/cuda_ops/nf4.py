"""NF4 in CUDA C++ (csrc/nf4.cu): the same functions and bits as `triton_ops.nf4`, on a GPU only."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

from fastsft_kernels.checks import bad, describe
from fastsft_kernels.cuda_ops.library import DTYPES, call, library
from fastsft_kernels.nf4_format import NESTED_BLOCK_SIZE, NF4Weight, dynamic_code, nf4_code

MOST = 8  # weights of one launch, FASTSFT_MOST in csrc/nf4.cu


class _Weight(ctypes.Structure):
    """fastsft_nf4 of csrc/nf4.cu."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("packed", "absmax", "absmax2", "offset")),
        *((name, ctypes.c_void_p) for name in ("code", "code2")),
        ("rows", ctypes.c_longlong),
    )


def nf4_dequantize(
    nf4: NF4Weight, *, dtype: torch.dtype = torch.bfloat16, out: Tensor | None = None
) -> Tensor:
    """See `fastsft_kernels.nf4_dequantize`."""
    _check("nf4_dequantize", nf4.packed)
    if out is None:
        out = torch.empty(nf4.shape, dtype=dtype, device=nf4.device)
    return _decode([nf4], out, 0, None)


def nf4_dequantize_group(
    weights: Sequence[NF4Weight], out: Tensor, *, b: Tensor | None = None
) -> Tensor:
    """See `fastsft_kernels.fused.nf4_dequantize_group`. More than 8 weights take several launches."""
    _check("nf4_dequantize_group", out)
    tail, begin = out.shape[1] - weights[0].shape[1], 0
    for i in range(0, len(weights), MOST):
        part = weights[i : i + MOST]
        end = begin + sum(w.shape[0] for w in part)
        strip = None if b is None else b[begin:end]
        _decode(part, out[begin:end], tail, strip, first=i)
        begin = end
    return out


def _decode(
    weights: Sequence[NF4Weight], out: Tensor, tail: int, b: Tensor | None, first: int = 0
) -> Tensor:
    fields = ("packed", "absmax", "absmax2", "offset", "code", "code2")
    operands = (_Weight * len(weights))(
        *(_Weight(*(_address(getattr(w, f)) for f in fields), w.shape[0]) for w in weights)
    )
    call(
        "fastsft_nf4_dequantize",
        out.device,
        *(operands, len(weights), first),
        *(ctypes.c_longlong(weights[0].shape[1]), weights[0].block_size),
        *(ctypes.c_void_p(out.data_ptr()), ctypes.c_longlong(out.stride(0)), DTYPES[out.dtype]),
        *(ctypes.c_longlong(tail), ctypes.c_void_p(_address(b))),
        *(ctypes.c_longlong(0 if b is None else b.stride(0)), 0 if b is None else b.shape[1]),
    )
    return out


def nf4_quantize(weight: Tensor, *, block_size: int = 64, double_quant: bool = True) -> NF4Weight:
    """See `fastsft_kernels.nf4_quantize`."""
    _check("nf4_quantize", weight)
    device, shape = weight.device, (weight.shape[0], weight.shape[1])
    flat = weight.detach().reshape(-1)
    blocks = -(-flat.numel() // block_size)
    packed = torch.empty((flat.numel() + 1) // 2, dtype=torch.uint8, device=device)
    absmax = torch.empty(blocks, dtype=torch.float32, device=device)
    code, absmax2, offset, code2 = nf4_code().to(device), None, None, None
    call(
        "fastsft_nf4_quantize",
        device,
        *(ctypes.c_void_p(t.data_ptr()) for t in (packed, absmax, flat, nf4_code())),
        *(DTYPES[flat.dtype], ctypes.c_longlong(flat.numel()), block_size),
    )
    if double_quant:
        # The mean is torch's, so that it has the reference's bits.
        offset, code2 = absmax.mean(), dynamic_code().to(device)
        absmax8 = torch.empty(blocks, dtype=torch.uint8, device=device)
        nested = -(-blocks // NESTED_BLOCK_SIZE)
        absmax2 = torch.empty(nested, dtype=torch.float32, device=device)
        call(
            "fastsft_nf4_quantize_scales",
            device,
            *(ctypes.c_void_p(t.data_ptr()) for t in (absmax8, absmax2, absmax, offset, code2)),
            ctypes.c_longlong(blocks),
        )
        absmax = absmax8
    return NF4Weight(packed, absmax, absmax2, offset, code, code2, shape, weight.dtype, block_size)


def _address(x: Tensor | None) -> int | None:
    return None if x is None else x.data_ptr()


def _check(op: str, x: Tensor) -> None:
    library()
    if x.device.type != "cuda":
        raise bad(op, "the CUDA kernels run on a GPU only", describe(x), "Move it to one.")
