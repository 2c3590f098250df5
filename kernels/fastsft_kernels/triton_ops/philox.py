"""LoRA dropout masks inside a kernel, bit for bit those of `fastsft_kernels.dropout`.

One Philox call gives four 32-bit words, that is the masks of eight neighbouring columns. A tile
draws BM x BN/8 calls and spreads their words, so a mask costs an eighth of a call (about 60
integer instructions for eight columns) and nothing is read but the row keys.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from fastsft_kernels.dropout import threshold
from fastsft_kernels.fused.strips import StripDropout


def mask_arguments(dropout: StripDropout | None) -> tuple[Any, ...]:
    """(row keys, seed, step, modules, threshold) for a kernel; without dropout none is read.

    A kernel is compiled anew where a number of a tuple becomes 1 or a multiple of 16, whatever
    do_not_specialize says. So modules travel as 4 m + 2, which is neither, and `keep_mask` takes
    them so.
    """
    if dropout is None:
        return None, 0, 0, (2,), 0
    modules = tuple(4 * module + 2 for module in dropout.modules)
    return dropout.rows, dropout.seed, dropout.step, modules, threshold(dropout.p)


@triton.jit
def module_of(modules, strip):
    """modules[strip] for a strip that is known only when the kernel runs."""
    module = modules[0]
    for i in tl.static_range(1, len(modules)):
        module = tl.where(strip == i, modules[i], module)
    return module


@triton.jit
def keep_mask(row_keys, columns_from, seed, step, module, threshold, BN: tl.constexpr):
    """row_keys int64 [BM], columns_from a multiple of 8 -> bool [BM, BN], True where kept.

    Column j of the tile is column columns_from + j of the op. The other arguments are those of
    `mask_arguments`: `module` is 4 m + 2, `threshold` is `dropout.threshold(p)`.
    """
    tl.static_assert(BN % 8 == 0)
    group = columns_from // 8 + tl.arange(0, BN // 8)
    zero = tl.zeros([row_keys.shape[0], BN // 8], tl.uint32)
    low = (row_keys & 0xFFFFFFFF).to(tl.uint32)[:, None] + zero
    high = ((row_keys >> 32) & 0xFFFFFFFF).to(tl.uint32)[:, None] + zero
    c2 = group.to(tl.uint32)[None, :] + zero
    c3 = tl.full(zero.shape, module >> 2, tl.uint32)
    k0 = tl.full(zero.shape, seed, tl.uint32)
    k1 = tl.full(zero.shape, step, tl.uint32)
    w0, w1, w2, w3 = tl.philox_impl(low, high, c2, c3, k0, k1, 10)
    # join appends an axis, the second operand behind the first: [BM, BN/8, 2, 2] = w0 w1 w2 w3
    words = tl.join(tl.join(w0, w2), tl.join(w1, w3))
    halves = tl.join(words & 0xFFFF, words >> 16)
    return tl.reshape(halves, [row_keys.shape[0], BN]).to(tl.int32) >= threshold
