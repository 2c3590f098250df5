"""NF4 weights that share an input, decoded into the one buffer their product reads.

The K-augmented product of q, k and v (gate and up) reads [W | B] with its rows one after another
and, behind the K columns of W, one strip of B for each adapter: block-diagonal, zero elsewhere.
Both sides of that product are rewritten whole at every decode, because a forgotten number there
may be NaN and 0 · NaN is NaN.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastsft_kernels.checks import bad, check_like, check_shape, describe
from fastsft_kernels.nf4 import select_nf4
from fastsft_kernels.nf4_format import NF4Weight


def nf4_dequantize_group(
    weights: Sequence[NF4Weight],
    out: Tensor,
    *,
    b: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Decodes weights [N_i, K] below each other into out [ΣN, P >= K]; returns out.

    out is bf16, fp16 or fp32, its rows at any pitch. Its columns K..P are rewritten too: with
    b [ΣN, R] of out's dtype, the rows of weight i get b's row in columns K + iR .. K + (i+1)R;
    every other number there becomes 0. One launch.
    The weights must have one K, one block size, and all or none doubly quantised scales.
    Raises ValueError for what does not fit.
    """
    op = "nf4_dequantize_group"
    if not weights:
        raise bad(op, "there must be a weight", weights, "Pass at least one NF4Weight.")
    run = select_nf4(op, backend, weights[0].packed)
    first = weights[0]
    for w in weights:
        kind = (w.shape[1], w.block_size, w.double_quant, w.device)
        if kind != (first.shape[1], first.block_size, first.double_quant, first.device):
            raise bad(
                op,
                "weights must have one K, block_size, double_quant and device",
                [(w.shape[1], w.block_size, w.double_quant, str(w.device)) for w in weights],
                "Decode them apart with nf4_dequantize.",
            )
    rows, columns = sum(w.shape[0] for w in weights), first.shape[1]
    if (
        out.ndim != 2
        or out.shape[0] != rows
        or out.shape[1] < columns
        or out.dtype not in (torch.bfloat16, torch.float16, torch.float32)
        or out.device != first.device
        or (out.shape[1] > 1 and out.stride(1) != 1)
    ):
        raise bad(
            op,
            f"out must be [{rows}, at least {columns}] bfloat16, float16 or float32 on "
            f"{first.device} with contiguous rows",
            f"{describe(out)}, strides {out.stride()}",
            "Pass a row-major buffer or a slice of its columns.",
        )
    if b is not None:
        check_like(op, "b", b, "out", out)
        rank = b.shape[-1]
        check_shape(op, "b", b, (rows, rank), "[sum of N, R]")
        if len(weights) * rank > out.shape[1] - columns:
            raise bad(
                op,
                f"{len(weights)} strips of {rank} columns need {len(weights) * rank} behind K",
                f"{out.shape[1] - columns}",
                "Pass a wider out.",
            )
        b = b if b.stride(1) == 1 else b.contiguous()
    return run(weights, out, b=b)
