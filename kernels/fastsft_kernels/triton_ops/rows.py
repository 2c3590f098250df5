"""Rows of a tensor [T, H], or [T, heads, H] with any strides but the last: where each one lies.

A head of a buffer that holds q, k and v lies `heads` to a token and one token's heads behind the
next one's: two strides. Kernels number all rows from 0 and take the number apart, so one launch
serves every head and nothing is copied.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor


def side_by_side(x: Tensor) -> Tensor:
    """`x`, copied only if the numbers of its rows do not lie side by side."""
    return x if x.stride(-1) == 1 else x.contiguous()


def rows_of(*tensors: Tensor | None) -> tuple[int, int, tuple[int, ...]]:
    """(rows, heads, strides) of tensors of one shape [T, H] or [T, heads, H].

    strides holds two for each tensor, of tokens and of heads; None has none to speak of. heads is
    1 where one stride serves: then kernels divide nothing.
    """
    given = [t for t in tensors if t is not None]
    tokens, heads = given[0].shape[0], given[0].shape[1] if given[0].dim() == 3 else 1
    if given[0].dim() == 2:
        pairs = [None if t is None else (t.stride(0), 0) for t in tensors]
    elif all(t.stride(0) == heads * t.stride(1) for t in given):
        pairs = [None if t is None else (t.stride(1), 0) for t in tensors]
        tokens, heads = tokens * heads, 1
    else:
        pairs = [None if t is None else (t.stride(0), t.stride(1)) for t in tensors]
    return tokens * heads, heads, tuple(s for pair in pairs for s in pair or (0, 0))


@triton.jit
def row_offset(row, token_stride, head_stride, HEADS: tl.constexpr):
    """Where row number `row` begins, in int64: T x H may pass 2^31."""
    if HEADS == 1:
        offset = row.to(tl.int64) * token_stride
    else:
        token, head = row // HEADS, row % HEADS
        offset = token.to(tl.int64) * token_stride + head.to(tl.int64) * head_stride
    return offset


@triton.jit
def tile_offset(row, column, token_stride, head_stride, HEADS: tl.constexpr):
    """Where the numbers of rows `row` [BM] and columns `column` [BN] lie, [BM, BN]."""
    return row_offset(row, token_stride, head_stride, HEADS)[:, None] + column[None, :]
