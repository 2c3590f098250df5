"""The adapters' skinny products in plain torch, in float32 (float64 for float64 inputs)."""

from __future__ import annotations

import torch
from torch import Tensor

from fastsft_kernels.dropout import lora_dropout_mask
from fastsft_kernels.fused.skinny import NormedInput
from fastsft_kernels.fused.strips import StripDropout


def tails(
    x: Tensor,
    a: Tensor,
    scaling: float,
    *,
    dropout: StripDropout | None = None,
    out: Tensor | None = None,
    copy: Tensor | None = None,
) -> Tensor:
    """See `fastsft_kernels.fused.tails`."""
    strips = [
        masked @ rows.t()
        for masked, rows in zip(_masked(_wide(x), dropout), _strips(_wide(a), dropout), strict=True)
    ]
    t = torch.cat(strips, 1).mul_(scaling).to(x.dtype)
    if copy is not None:
        copy.copy_(t)
    if out is None:
        return t
    out[:, : t.shape[1]] = t
    out[:, t.shape[1] :] = 0
    return out


def skinny_dA(
    d: Tensor,
    x: Tensor,
    scaling: float = 1.0,
    *,
    norm: NormedInput | None = None,
    dropout: StripDropout | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """See `fastsft_kernels.fused.skinny_dA`."""
    z = _wide(x)
    if norm is not None:
        # Rounded to x's dtype, as the normed input was that the forward multiplied by A.
        z = _wide((z * norm.rstd[:, None] * (_wide(norm.weight) + norm.offset)).to(x.dtype))
    parts = _strips(_wide(d).t(), dropout)
    dA = torch.cat([part @ masked for part, masked in zip(parts, _masked(z, dropout), strict=True)])
    dA *= scaling
    return dA if out is None else out.add_(dA)


def skinny_dB(
    dy: Tensor,
    tail: Tensor,
    segments: tuple[int, ...] | None = None,
    *,
    out: Tensor | None = None,
) -> Tensor:
    """See `fastsft_kernels.fused.skinny_dB`."""
    segments = segments or (dy.shape[1],)
    pairs = zip(_wide(dy).split(segments, 1), _wide(tail).chunk(len(segments), 1), strict=True)
    dB = torch.cat([columns.t() @ strip for columns, strip in pairs])
    return dB if out is None else out.add_(dB)


def _strips(rows: Tensor, dropout: StripDropout | None) -> tuple[Tensor, ...]:
    return (rows,) if dropout is None else rows.chunk(len(dropout.modules))


def _masked(x: Tensor, dropout: StripDropout | None) -> list[Tensor]:
    """x as each strip sees it."""
    if dropout is None:
        return [x]
    keys = map(dropout.key, range(len(dropout.modules)))
    return [x * lora_dropout_mask(key, x.shape[1], dropout.p) for key in keys]


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()
