"""Grouped NF4 decoding in plain torch: one decode after another, then the tails."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from fastsft_kernels.nf4_format import NF4Weight
from fastsft_kernels.reference.nf4 import nf4_dequantize


def nf4_dequantize_group(
    weights: Sequence[NF4Weight], out: Tensor, *, b: Tensor | None = None
) -> Tensor:
    """See `fastsft_kernels.fused.nf4_dequantize_group`."""
    columns = weights[0].shape[1]
    parts = out.split([w.shape[0] for w in weights])
    strips = [None] * len(weights) if b is None else b.split([w.shape[0] for w in weights])
    for i, (weight, part, strip) in enumerate(zip(weights, parts, strips, strict=True)):
        nf4_dequantize(weight, dtype=out.dtype, out=part[:, :columns])
        part[:, columns:] = 0
        if strip is not None:
            start = columns + i * strip.shape[1]
            part[:, start : start + strip.shape[1]] = strip
    return out
