"""NF4: decode into a buffer, decode of q, k, v with their tails, quantise at load.

Results are compared as bits: what decodes must be what bitsandbytes decodes, to the last of them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from fastsft_kernels import NF4Weight, limits, nf4_dequantize, nf4_quantize, reference
from fastsft_kernels.fused import nf4_dequantize_group
from fastsft_kernels.limits import Work
from fastsft_kernels.nf4_format import dynamic_code, nf4_code
from torch import Tensor

from bench.kernels.case import Case

RANK, TAIL = 16, 64  # the strips of q, k, v and their tail, rounded up to 128 bytes


def cases() -> list[Case]:
    return [
        Case(
            op="nf4_dequantize",
            label="14336x4096",
            record=lambda device, dtype: _decode(14336, 4096, 4096, device, dtype),
            small=lambda device, dtype: _decode(37, 130, 192, device, dtype),
            run=lambda nf4, out: _bits(nf4_dequantize(nf4, dtype=out.dtype, out=out)),
            oracle=_decoded,
            work=lambda nf4, out: limits.nf4_dequantize(*nf4.shape, out.element_size()),
            peers={"bitsandbytes": _bitsandbytes_decode},
        ),
        Case(
            op="nf4_dequantize",
            label="4096x14336 pitched",
            record=lambda device, dtype: _decode(4096, 14336, 14336 + TAIL, device, dtype),
            small=lambda device, dtype: _decode(37, 1032, 1088, device, dtype),
            run=lambda nf4, out: _bits(nf4_dequantize(nf4, dtype=out.dtype, out=out)),
            oracle=_decoded,
            work=lambda nf4, out: limits.nf4_dequantize(*nf4.shape, out.element_size()),
        ),
        Case(
            op="nf4_dequantize",
            label="14336x4096, scales in float32",
            record=lambda device, dtype: _decode(14336, 4096, 4096, device, dtype, plain=True),
            small=lambda device, dtype: _decode(37, 136, 200, device, dtype, plain=True),
            run=lambda nf4, out: _bits(nf4_dequantize(nf4, dtype=out.dtype, out=out)),
            oracle=_decoded,
            work=lambda nf4, out: Work(round(out.numel() * (0.5 + 4 / 64 + out.element_size()))),
        ),
        Case(
            op="nf4_dequantize_group",
            label="q, k, v of 4096, tails of 64",
            record=lambda device, dtype: _group((4096, 1024, 1024), 4096, device, dtype),
            small=lambda device, dtype: _group((37, 5, 64), 200, device, dtype),
            run=lambda weights, out, b: _bits(nf4_dequantize_group(weights, out, b=b)),
            oracle=lambda weights, out, b: _bits(reference.nf4_dequantize_group(weights, out, b=b)),
            work=_group_work,
            peers={"bitsandbytes, no tails": _bitsandbytes_group},
        ),
        Case(
            op="nf4_quantize",
            label="14336x4096",
            record=lambda device, dtype: (torch.randn(14336, 4096, device=device, dtype=dtype),),
            small=lambda device, dtype: (torch.randn(37, 131, device=device, dtype=dtype),),
            run=lambda weight: _all_bits(nf4_quantize(weight)),
            oracle=lambda weight: _all_bits(reference.nf4_quantize(weight)),
            work=lambda weight: limits.nf4_quantize(*weight.shape, weight.element_size()),
            peers={"bitsandbytes": _bitsandbytes_encode},
        ),
    ]


def _weight(rows: int, columns: int, device: torch.device) -> NF4Weight:
    """Random codes and scales: quantising would not work on the meta device."""
    n = rows * columns
    blocks = -(-n // 64)
    packed = torch.randint(0, 256, (-(-n // 2),), dtype=torch.uint8, device=device)
    absmax = torch.randint(0, 256, (blocks,), dtype=torch.uint8, device=device)
    absmax2 = torch.rand(-(-blocks // 256), device=device)
    offset = torch.full((), 1.5, device=device)
    codes = nf4_code().to(device), dynamic_code().to(device)
    return NF4Weight(packed, absmax, absmax2, offset, *codes, (rows, columns), torch.bfloat16)


def _decode(
    rows: int,
    columns: int,
    pitch: int,
    device: torch.device,
    dtype: torch.dtype,
    plain: bool = False,
) -> tuple[NF4Weight, Tensor]:
    out = torch.empty(rows, pitch, device=device, dtype=dtype)[:, :columns]
    nf4 = _weight(rows, columns, device)
    if plain:
        absmax = torch.rand(nf4.absmax.numel(), device=device)
        nf4 = replace(nf4, absmax=absmax, absmax2=None, offset=None, code2=None)
    return nf4, out


def _decoded(nf4: NF4Weight, out: Tensor) -> Tensor:
    return _bits(reference.nf4_dequantize(nf4, dtype=out.dtype))


def _group(
    rows: tuple[int, ...], columns: int, device: torch.device, dtype: torch.dtype
) -> tuple[tuple[NF4Weight, ...], Tensor, Tensor]:
    out = torch.empty(sum(rows), columns + TAIL, device=device, dtype=dtype)
    b = torch.randn(sum(rows), RANK, device=device, dtype=dtype)
    return tuple(_weight(n, columns, device) for n in rows), out, b


def _group_work(weights: tuple[NF4Weight, ...], out: Tensor, b: Tensor) -> Work:
    rows, columns = out.shape[0], weights[0].shape[1]
    decode = limits.nf4_dequantize(rows, columns, out.element_size()).bytes
    return Work(decode + rows * (out.shape[1] - columns + b.shape[1]) * out.element_size())


def _bits(x: Tensor) -> Tensor:
    """Floating-point numbers as the integers of their bits, which compare exactly."""
    sizes = {2: torch.int16, 4: torch.int32, 8: torch.int64}
    return x.view(sizes[x.element_size()]) if x.is_floating_point() else x


def _all_bits(nf4: NF4Weight) -> tuple[Tensor, ...]:
    assert nf4.absmax2 is not None and nf4.offset is not None
    return nf4.packed, nf4.absmax, _bits(nf4.absmax2), _bits(nf4.offset)


def _state(nf4: NF4Weight, dtype: torch.dtype) -> tuple[Tensor, Any]:
    """The weight as bitsandbytes holds it."""
    from bitsandbytes.functional import QuantState

    entries = nf4.state_dict("w")
    packed = entries.pop("w")
    named = {name.removeprefix("w."): t for name, t in entries.items()}
    state = QuantState.from_dict(named, nf4.device)
    state.dtype = dtype
    return packed, state


def _bitsandbytes_decode(nf4: NF4Weight, out: Tensor) -> Callable[[], Any]:
    from bitsandbytes.functional import dequantize_4bit

    packed, state = _state(nf4, out.dtype)
    return lambda: dequantize_4bit(packed, state, out=out)


def _bitsandbytes_group(
    weights: tuple[NF4Weight, ...], out: Tensor, b: Tensor
) -> Callable[[], Any]:
    from bitsandbytes.functional import dequantize_4bit

    rows = out.new_empty(out.shape[0], weights[0].shape[1]).split([w.shape[0] for w in weights])
    states = [_state(w, out.dtype) for w in weights]

    def run() -> None:
        for (packed, state), part in zip(states, rows, strict=True):
            dequantize_4bit(packed, state, out=part)

    return run


def _bitsandbytes_encode(weight: Tensor) -> Callable[[], Any]:
    from bitsandbytes.functional import quantize_4bit

    return lambda: quantize_4bit(weight, compress_statistics=True, quant_type="nf4")
