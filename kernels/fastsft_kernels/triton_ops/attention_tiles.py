"""What the three attention kernels share: which rows a program has, which keys see them, the scores.

Which rows. Without a list, document s begins at program cu[s] // BM + s. Its ceil(n / BM) blocks
end before the next document begins, since with cu[s+1] = cu[s] + n
cu[s+1] // BM + s + 1 >= cu[s] // BM + n // BM + s + 1 >= (cu[s] // BM + s) + ceil(n / BM). So
T // BM + S programs are enough; one finds its document by bisection (a dozen reads from L2), and
at most S of them find no rows and leave. The list of `attention_blocks` has no spare programs and
the longest run first. Heads are the fastest index of the grid: the programs that run together are
the heaviest of all heads, and heads that share keys read them from L2 at the same time.

Exponentials are powers of two: log2(e) is in the scale, so that an element of the scores costs one
multiply-add and one exp2. A soft-cap's tanh is 1 - 2 / (1 + exp2(x)), which is off by 6e-8 wherever
it lies: times a cap of 50 that showed in the log-sum-exp. So near 0 it is a series.

A head whose size is no power of two is padded with zeros, in registers and in shared memory.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastsft_kernels.attention import LARGEST_HEAD
from fastsft_kernels.fused.attention import BLOCK_ROWS, AttentionOptions
from fastsft_kernels.integers import next_power_of_2
from fastsft_kernels.launch import capability, pinned

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
LISTED_ROWS = tl.constexpr(BLOCK_ROWS)

# Card ("small": 99 KiB of shared memory a program) -> padded head -> (BM, BN, warps, stages).
Table = dict[str, dict[int, list[tuple[int, int, int, int]]]]


def configuration(
    name: str, table: Table, q: Tensor, options: AttentionOptions, streamed: str
) -> dict[str, int]:
    """The pinned configuration of kernel `name` for the card, the dtype and the head size of q.

    `streamed` is the side of the tiles, BM or BN, that the kernel walks along. A soft-cap keeps a
    tanh beside each score: on Blackwell and consumer cards, where it may spill, tiles are halved.
    """
    card = {80: "80", 87: "80", 90: "90", 100: "100", 103: "100"}.get(capability(q), "small")
    card = "float32" if q.dtype == torch.float32 else card
    size = max(64, padded(q))
    names = ("BM", "BN", "num_warps", "num_stages")
    candidates = [dict(zip(names, c, strict=True)) for c in table[card][size]]
    name = f"{name}_d{size}" + ("_f32" if card == "float32" else "")
    if options.softcap is not None and card in ("100", "small"):
        name += "_capped"  # beside sums of 128 x 256 it spills even so
        candidates = [c for c in candidates if c["BM"] * c["BN"] * size <= c[streamed] << 14]
        for c in candidates:
            c[streamed] = max(c[streamed] // 2, min(c[streamed], 32))
    return pinned(name, candidates, q)


def padded(q: Tensor) -> int:
    """The head size of q as the kernels see it: a power of two, at least 16 as tl.dot wants."""
    assert q.shape[2] <= LARGEST_HEAD
    return max(16, next_power_of_2(q.shape[2]))


def score_scale(q: Tensor, options: AttentionOptions) -> float:
    return float(q.shape[2] ** -0.5 if options.scale is None else options.scale)


def shared_arguments(
    q: Tensor, k: Tensor, cu_seqlens: Tensor, options: AttentionOptions, rows: int
) -> tuple[int, tuple[Any, ...], dict[str, Any]]:
    """(programs a head, last arguments, constexprs) of a kernel whose programs have `rows` rows."""
    documents, blocks = cu_seqlens.numel() - 1, options.blocks
    if blocks is None:
        programs = q.shape[0] // rows + documents
    else:
        assert blocks.is_contiguous()
        programs = blocks.shape[0] * (BLOCK_ROWS // rows)
    scale, cap = score_scale(q, options) * LOG2E.value, None
    if options.softcap is not None:
        scale, cap = 2 * scale / options.softcap, options.softcap * LOG2E.value
    arguments = (
        *(cu_seqlens, blocks, programs, documents, documents.bit_length()),
        (scale, cap, options.window),
    )
    constants = {
        "HEADS": q.shape[1],
        "GROUP": q.shape[1] // k.shape[1],
        "D": q.shape[2],
        "DP": padded(q),
        "CAUSAL": options.causal,
    }
    return programs, arguments, constants


@triton.jit
def locate(cu_seqlens, blocks, program, documents, steps, ROWS: tl.constexpr):
    """(start of the document, its length, first of the program's rows in it); none if first >= length."""
    if blocks is None:
        document = 0
        above = documents
        for _ in range(steps):
            middle = (document + above) // 2
            before = tl.load(cu_seqlens + middle) // ROWS + middle <= program
            document = tl.where(before, middle, document)
            above = tl.where(before, above, middle)
        first = (program - tl.load(cu_seqlens + document) // ROWS - document) * ROWS
    else:
        parts: tl.constexpr = LISTED_ROWS // ROWS
        entry = blocks + program // parts * 2
        document = tl.load(entry)
        first = tl.load(entry + 1) + program % parts * ROWS
    start = tl.load(cu_seqlens + document)
    return start.to(tl.int64), tl.load(cu_seqlens + document + 1) - start, first


@triton.jit
def seen_keys(first, length, window, BM: tl.constexpr, BN: tl.constexpr, CAUSAL: tl.constexpr):
    """The keys that the rows first to first+BM see: (begin, full_begin, full_end, end).

    All but `end` are multiples of BN. Every row sees all keys from full_begin to full_end.
    """
    begin = first * 0
    full_begin = begin
    if CAUSAL:
        end = tl.minimum(first + BM, length)
        full_end = first // BN * BN
        if window is not None:
            begin = tl.maximum(first - window + 1, 0) // BN * BN
            full_begin = tl.maximum(first + BM - window + BN - 1, 0) // BN * BN
            full_begin = tl.minimum(full_begin, full_end)
    else:
        end = length
        full_end = length // BN * BN
    return begin, full_begin, full_end, end


@triton.jit
def rows_and_mask(first, length, D: tl.constexpr, DP: tl.constexpr, ROWS: tl.constexpr):
    """(row [ROWS, 1], column [1, DP], mask of those inside) of a tile that begins at row `first`."""
    row = tl.arange(0, ROWS)[:, None]
    column = tl.arange(0, DP)[None, :]
    return row, column, (row < length - first) & (column < D)


@triton.jit
def load_tile(x, offset, mask, MASKED: tl.constexpr):
    """A mask that is all true costs a predicate for each load: whole tiles go without."""
    if MASKED:
        tile = tl.load(x + offset, mask=mask, other=0.0)
    else:
        tile = tl.load(x + offset)
    return tile


@triton.jit
def sees(row, key, length, window, CAUSAL: tl.constexpr):
    """Whether a row sees a key, for indices that broadcast against each other."""
    if CAUSAL:
        visible = key <= row
        if window is not None:
            visible = visible & (key > row - window)
    else:
        visible = key < length
    return visible


@triton.jit
def bend(s, scale, cap):
    """Soft-capped scores: (exponents of two, tanh). scale holds 2 / softcap, cap the soft-cap."""
    x = s * scale
    u = x * (0.5 * LN2)
    u2 = u * u
    series = u * (1.0 - u2 * (1 / 3 - u2 * (2 / 15 - u2 * (17 / 315 - u2 * (62 / 2835)))))
    t = tl.where(tl.abs(u) < 0.25, series, 1.0 - 2.0 / (1.0 + tl.exp2(x)))
    return t * cap, t
