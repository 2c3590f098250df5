"""Tails, dA and dB: each against one read of its wide matrix, beside cuBLAS.

The peers do the product alone: without dropout, without adding to a buffer, with the scaling and
the norm in separate operations where the case has them.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from fastsft_kernels import limits, reference
from fastsft_kernels.fused import NormedInput, StripDropout, skinny_dA, skinny_dB, tails
from torch import Tensor

from bench.kernels.case import Case

T = 8192
QKV = (4096, 1024, 1024)
SCALING = 2.0
P = 0.1


def cases() -> list[Case]:
    plain = [_tails(4096, 16), _tails(4096, 128), _tails(14336, 16), _tails(14336, 128)]
    return [
        *plain,
        _tails(4096, 48, strips=3),
        _dA(4096, 16),
        _dA(4096, 128),
        _dA(14336, 16),
        _dA(14336, 128),
        _dA(4096, 48, normed=True),
        _dA(4096, 48, normed=True, strips=3),
        _dB(14336, 16, None),
        _dB(14336, 128, None),
        _dB(4096, 16, None),
        _dB(sum(QKV), 16, QKV),
    ]


def _tails(k: int, columns: int, strips: int = 0) -> Case:
    """As a block calls it: behind x in one buffer, padding zeroed, with a copy to keep."""
    return Case(
        op="tails",
        label=_label(k, columns, f"{strips} masks" if strips else ""),
        record=partial(_tails_inputs, T, k, columns, strips),
        small=partial(_tails_inputs, 130, 600, columns, strips),
        run=lambda x, a, dropout, out, copy: tails(
            x, a, SCALING, dropout=dropout, out=out, copy=copy
        )[:, :columns],
        oracle=lambda x, a, dropout, *_: reference.tails(x, a, SCALING, dropout=dropout),
        work=lambda x, a, *_: limits.tails(*x.shape, a.shape[0], x.element_size()),
        peers={"torch.mm": _mm_tails},
    )


def _dA(k: int, columns: int, normed: bool = False, strips: int = 0) -> Case:
    extras = [name for name, on in (("normed", normed), (f"{strips} masks", strips)) if on]
    return Case(
        op="skinny_dA",
        label=_label(k, columns, *extras),
        record=partial(_dA_inputs, T, k, columns, normed, strips),
        small=partial(_dA_inputs, 300, 200, columns, normed, strips),
        run=lambda d, x, norm, dropout: skinny_dA(d, x, norm=norm, dropout=dropout),
        oracle=lambda d, x, norm, dropout: _rounded(
            reference.skinny_dA(d, x, norm=norm, dropout=dropout), x
        ),
        work=lambda d, x, *_: limits.skinny_dA(*x.shape, d.shape[1], x.element_size()),
        peers={"torch.mm": _mm_dA},
    )


def _dB(n: int, rank: int, segments: tuple[int, ...] | None) -> Case:
    strips = len(segments or (n,))
    small = (130, 3, 67) if segments else None
    return Case(
        op="skinny_dB",
        label=_label(n, rank, f"{strips} segments" if segments else ""),
        record=partial(_dB_inputs, T, n, strips * rank, segments),
        small=partial(_dB_inputs, 300, 200, strips * rank, small),
        run=skinny_dB,
        oracle=lambda dy, tail, segments: _rounded(reference.skinny_dB(dy, tail, segments), dy),
        work=lambda dy, tail, segments: limits.skinny_dB(*dy.shape, rank, dy.element_size()),
        peers={"torch.mm": _mm_dB},
    )


def _label(wide: int, columns: int, *extras: str) -> str:
    return ", ".join([f"{T}x{wide} R {columns}", *(e for e in extras if e)])


def _rounded(gradient: Tensor, x: Tensor) -> Tensor:
    """The float32 sum as precise as torch's own product of x's dtype returns it.

    The matrix units add with truncation, which over 8192 rows leaves more than float32's own
    rounding (about 1e-5 against 1e-6): only the inputs' precision is a fair measure.
    """
    return gradient.to(x.dtype).to(gradient.dtype)


def _dropout(rows: int, strips: int, device: torch.device) -> StripDropout | None:
    if not strips:
        return None
    keys = torch.arange(rows, device=device)
    return StripDropout(P, 1, 2, tuple(range(1, strips + 1)), keys)


def _tails_inputs(
    rows: int, k: int, columns: int, strips: int, device: torch.device, dtype: torch.dtype
) -> tuple[Any, ...]:
    buffer = torch.randn(rows, 64 * -(-(k + columns) // 64), device=device, dtype=dtype)
    a = torch.randn(columns, k, device=device, dtype=dtype) / k**0.5
    copy = torch.empty(rows, columns, device=device, dtype=dtype)
    return buffer[:, :k], a, _dropout(rows, strips, device), buffer[:, k:], copy


def _dA_inputs(
    rows: int,
    k: int,
    columns: int,
    normed: bool,
    strips: int,
    device: torch.device,
    dtype: torch.dtype,
) -> tuple[Any, ...]:
    d = torch.randn(rows, columns, device=device, dtype=dtype)
    x = torch.randn(rows, k, device=device, dtype=dtype)
    norm = None
    if normed:
        weight = torch.randn(k, device=device, dtype=dtype)
        norm = NormedInput(torch.rsqrt(x.float().square().mean(1) + 1e-6), weight)
    return d, x, norm, _dropout(rows, strips, device)


def _dB_inputs(
    rows: int,
    n: int,
    columns: int,
    segments: tuple[int, ...] | None,
    device: torch.device,
    dtype: torch.dtype,
) -> tuple[Any, ...]:
    dy = torch.randn(rows, n, device=device, dtype=dtype)
    return dy, torch.randn(rows, columns, device=device, dtype=dtype), segments


def _mm_tails(x: Tensor, a: Tensor, dropout: StripDropout | None, *_: Tensor) -> Callable[[], Any]:
    strips = len(dropout.modules) if dropout else 1
    p = dropout.p if dropout else 0.0

    def run() -> list[Tensor]:
        inputs = [F.dropout(x, p) if p else x for _ in range(strips)]
        pairs = zip(inputs, a.chunk(strips), strict=True)
        return [torch.mm(z, part.t()) * SCALING for z, part in pairs]

    return run


def _mm_dA(
    d: Tensor, x: Tensor, norm: NormedInput | None, dropout: StripDropout | None
) -> Callable[[], Any]:
    strips = len(dropout.modules) if dropout else 1
    p = dropout.p if dropout else 0.0

    def run() -> list[Tensor]:
        z = x if norm is None else F.rms_norm(x, norm.weight.shape, norm.weight, 1e-6)
        inputs = [F.dropout(z, p) if p else z for _ in range(strips)]
        pairs = zip(d.chunk(strips, 1), inputs, strict=True)
        return [torch.mm(part.t(), z) for part, z in pairs]

    return run


def _mm_dB(dy: Tensor, tail: Tensor, segments: tuple[int, ...] | None) -> Callable[[], Any]:
    sizes = segments or (dy.shape[1],)
    pairs = list(zip(dy.split(sizes, 1), tail.chunk(len(sizes), 1), strict=True))
    return lambda: [torch.mm(columns.t(), strip) for columns, strip in pairs]
