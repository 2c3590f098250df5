"""Cross entropy on a GPU: one program per row, one read of memory, one write.

A row of 128256 logits in bfloat16 is 250 KiB, more than registers and shared memory hold, so its
program goes over it twice: first for the maximum and the sum, then, from the L2 cache, for the
gradient. Everything here serves that second read, which a row must not lose to the rows beside it:

- One program has many warps, so that few rows are under way at once. 132 multiprocessors with two
  programs of 16 warps each keep 66 MB of 250 KiB rows in flight, of which on average half is
  still to be read again: 33 MB, where Hopper's L2 holds 50. Twice the rows would miss.
- The second pass goes backwards. What was read last is wanted first, so a cache that is too small
  loses the far end of a row, not all of it, and the near end may still be in L1.
- The first pass asks the cache to keep what it reads, the second to let go.

The first pass keeps a maximum and a sum for each 16 bytes of a row's width that a thread reads at
a time (8 logits in 16 bits), not one for the program. The running sum is then rescaled once in 8
logits, and no thread waits for another until the end. Exponentials are powers of two:
e^(z - max) = 2^(v u - b) with u = log2(e), b = u max rounded. The product and the difference are
one fused operation, so the power is exact for the b that was used, and b enters the loss and the
gradient alike. That leaves 7 instructions a logit in the first pass and 8 in the second: by count
0.54 ms for 8192 such rows on an H200, under the 0.98 ms of its memory traffic. A soft-cap makes
them 19 and 23 (tanh is a power, a division and its scaling): then the count is 1.5 ms, and
arithmetic is the limit.

Fewer rows than multiprocessors leave some idle, and a lone row takes some 25 us, mostly latency.
Sharing a row between programs would need a second launch and a round trip through memory for 10
of them; the head works on 1000 rows and more at a time, so no row is shared.

A vocabulary such as 128257 puts rows at any multiple of 2 bytes. Blocks then start at the row's
first 16-byte boundary and are read in 16-byte pieces all the same; what is left at both ends
makes one last block, wrapped round from the end of the row to its start, read number by number.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastsft_kernels.fused.cross_entropy import RowLosses
from fastsft_kernels.integers import cdiv
from fastsft_kernels.launch import capability, launch, pinned
from fastsft_kernels.reference.cross_entropy import CrossEntropy, LossOptions, linear_loss

# By bytes of a row: pieces of 16 bytes at a time, warps. See above for why long rows take many.
_SHORT = [{"G": 512, "num_warps": 8}, {"G": 256, "num_warps": 4}]
_LONG = [{"G": 1024, "num_warps": 16}, {"G": 2048, "num_warps": 32}, {"G": 512, "num_warps": 8}]
_LONGEST = [{"G": 2048, "num_warps": 32}, {"G": 1024, "num_warps": 16}]

# A piece of logits. The products around it are bound by arithmetic from some 200 rows on, but
# they fill the card evenly only with many tiles: dhidden of 2048 x 4096 is 256 tiles of 128 x 256,
# 97 % of two rounds of 132. 2^28 logits are 2093 rows of 128256, 0.5 GB in 16 bits.
_PIECE, _MOST_ROWS, _LEAST_ROWS, _TILE_ROWS = 1 << 28, 4096, 1024, 128

_LOG2E = math.log2(math.e)
_LN2 = tl.constexpr(math.log(2.0))
# Below any logit that counts, and still finite times `unit`.
_LOWEST = tl.constexpr(-1e30)


def cross_entropy(
    logits: Tensor,
    labels: Tensor,
    *,
    ignore_index: int = -100,
    reduction: str = "mean",
    softcap: float | None = None,
) -> Tensor:
    """See `fastsft_kernels.cross_entropy`."""
    options = LossOptions(cross_entropy_, ignore_index, reduction, softcap)
    return CrossEntropy.apply(logits, labels, options)


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    ignore_index: int = -100,
    reduction: str = "mean",
    softcap: float | None = None,
    chunk_rows: int | None = None,
    rows: Tensor | None = None,
    scale: float = 1.0,
    return_correct: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """See `fastsft_kernels.linear_cross_entropy`."""
    if rows is None:
        rows = (labels != ignore_index).nonzero().squeeze(1)
    chunk = _even_chunk(rows.numel(), chunk_rows or _chunk_rows(weight.shape[0]))
    options = LossOptions(cross_entropy_, ignore_index, reduction, softcap, scale)
    loss, correct = linear_loss(hidden, weight, labels, rows, chunk, options)
    return (loss, correct) if return_correct else loss


def _chunk_rows(vocabulary: int) -> int:
    rows = _PIECE // vocabulary // _TILE_ROWS * _TILE_ROWS
    return min(max(rows, _LEAST_ROWS), _MOST_ROWS)


def _even_chunk(rows: int, most: int) -> int:
    """`rows` in as few chunks of at most `most` as it takes, none of them small, in whole tiles."""
    even = cdiv(rows, max(cdiv(rows, most), 1))
    return min(cdiv(max(even, 1), _TILE_ROWS) * _TILE_ROWS, most)


def cross_entropy_(
    logits: Tensor,
    labels: Tensor,
    *,
    ignore_index: int = -100,
    softcap: float | None = None,
    scale: float = 1.0,
    gradient_scale: float | Tensor | None = 1.0,
    out: Tensor | None = None,
    entropy: bool = True,
) -> RowLosses:
    """See `fastsft_kernels.fused.cross_entropy_`."""
    n, vocabulary = logits.shape
    vector = 16 // logits.element_size()
    if out is not None and (out.stride(0) - logits.stride(0)) % vector:
        logits = out.copy_(logits)  # rows of the two start at different places in 16 bytes
    out = logits if out is None else out
    factor = gradient_scale if isinstance(gradient_scale, Tensor) else None
    number = 1.0 if factor is not None or gradient_scale is None else gradient_scale
    loss = logits.new_empty(n, dtype=torch.float32)
    correct = logits.new_empty(n, dtype=torch.bool)
    entropies = torch.empty_like(loss) if entropy else None
    launch(
        _row_losses,
        (n,),
        logits,
        out,
        labels.contiguous(),
        loss,
        correct,
        entropies,
        factor,
        0 if factor is None or factor.ndim == 0 else factor.stride(0),
        vocabulary,
        logits.stride(0),
        out.stride(0),
        ignore_index,
        float(number) * scale,
        _LOG2E * (scale if softcap is None else softcap),
        None if softcap is None else 2.0 * _LOG2E * scale / softcap,
        GRADIENT=gradient_scale is not None,
        ALIGNED=logits.stride(0) % 16 == 0 and vocabulary % 16 == 0,  # as Triton knows arguments
        E=vector,
        **_config(logits),
    )
    return RowLosses(loss, correct, entropies)


def _config(logits: Tensor) -> dict[str, int]:
    row_bytes = logits.shape[1] * logits.element_size()
    if row_bytes <= 1 << 16:
        return pinned("cross_entropy_short", _SHORT, logits)
    if row_bytes <= 1 << 18:
        return pinned("cross_entropy_long", _LONG, logits)
    spills = capability(logits) >= 120  # 16 warps with a soft-cap, under Triton 3.6
    return pinned("cross_entropy_longest", _LONGEST[:1] if spills else _LONGEST, logits)


@triton.jit
def _value(x, double):
    """What the softmax is over, but for the factor `unit`: the logit, or tanh of it over the cap."""
    v = x.to(tl.float32)
    if double is not None:
        w = v * double
        power = tl.exp2(-tl.abs(w))
        size = (1.0 - power) / (1.0 + power)
        v = tl.where(w < 0, -size, size)
        if x.dtype == tl.float32:
            # The difference has lost the low bits of a small tanh: those come from its series.
            t = w * (_LN2 / 2)
            s = t * t
            series = 2 / 15 + s * (-17 / 315 + s * (62 / 2835))
            v = tl.where(s < 0.0625, t + t * s * (-1 / 3 + s * series), v)
    return v


@triton.jit
def _seen(v, unit, top, total, weighted, ENTROPY: tl.constexpr):
    """Of each lane [G], after its columns v [G, E]: maximum, Σ e and Σ e p; e = 2^p, p = unit (v - top)."""
    higher = tl.maximum(top, tl.max(v, 1))
    base = higher * unit
    power = tl.fma(v, unit, -base[:, None])
    e = tl.exp2(power)
    moved = top * unit - base
    decay = tl.exp2(moved)
    if ENTROPY:
        power = tl.maximum(power, -200.0)  # logits may be -inf, and 0 · inf is nan
        weighted = decay * (weighted + moved * total) + tl.sum(e * power, 1)
    return higher, total * decay + tl.sum(e, 1), weighted


@triton.jit
def _wrapped(column, V, ALIGNED: tl.constexpr):
    return column if ALIGNED else tl.where(column < V, column, column - V)


@triton.jit(do_not_specialize=["ignore_index", "factor_stride"])
def _row_losses(
    logits,
    out,
    labels,
    losses,
    correct,
    entropies,
    factor,
    factor_stride,
    V,
    stride,
    out_stride,
    ignore_index,
    gradient_scale,
    unit,
    double,
    GRADIENT: tl.constexpr,
    ALIGNED: tl.constexpr,
    E: tl.constexpr,
    G: tl.constexpr,
):
    BV: tl.constexpr = G * E
    ENTROPY: tl.constexpr = entropies is not None
    KEEP: tl.constexpr = "evict_last" if GRADIENT else "evict_first"
    row = tl.program_id(0).to(tl.int64)
    label = tl.load(labels + row)
    if label == ignore_index:
        tl.store(losses + row, 0.0)
        tl.store(correct + row, False)
        if ENTROPY:
            tl.store(entropies + row, 0.0)
        if GRADIENT:
            for start in range(0, V, BV):
                column = start + tl.arange(0, BV)
                tl.store(out + row * out_stride + column, 0.0, mask=column < V)
        return

    # Columns head .. edge are whole blocks from a 16-byte boundary; `rest` columns are left.
    head = 0
    if not ALIGNED:
        head = tl.minimum(((E - row * stride % E) % E).to(tl.int32), V)
    blocks = (V - head) // BV
    edge = head + blocks * BV
    rest = V - blocks * BV
    x_body = logits + tl.multiple_of(row * stride + head, E)
    out_body = out + tl.multiple_of(row * out_stride + head, E)
    x_row, out_row = x_body - head, out_body - head
    lane = tl.arange(0, G)[:, None] * E + tl.arange(0, E)[None, :]
    # Columns read number by number come two to a lane: their addresses fill registers.
    AT_EDGE: tl.constexpr = E if ALIGNED else 2
    near = tl.arange(0, G)[:, None] * AT_EDGE + tl.arange(0, AT_EDGE)[None, :]
    # Read here, before the barriers below: later, another warp may have written its gradient there.
    known = (label >= 0) & (label < V)
    x_label = tl.load(x_row + label, mask=known, other=float("nan"))

    top = tl.full([G], _LOWEST, tl.float32)
    total = tl.zeros([G], tl.float32)
    weighted = tl.zeros([G], tl.float32)
    for i in range(blocks):
        v = _value(tl.load(x_body + i * BV + lane, eviction_policy=KEEP), double)
        top, total, weighted = _seen(v, unit, top, total, weighted, ENTROPY)
    for start in range(0, rest, G * AT_EDGE):
        column = _wrapped(edge + start + near, V, ALIGNED)
        inside = start + near < rest
        v = _value(tl.load(x_row + column, mask=inside, other=0.0), double)
        v = tl.where(inside, v, float("-inf"))
        top, total, weighted = _seen(v, unit, top, total, weighted, ENTROPY)

    row_top = tl.max(top, 0)
    base = row_top * unit
    moved = top * unit - base
    decay = tl.exp2(moved)
    row_total = tl.sum(total * decay, 0)
    v_label = _value(x_label, double)
    bits = tl.log2(row_total)
    tl.store(losses + row, (bits - tl.fma(v_label, unit, -base)) * _LN2)
    tl.store(correct + row, v_label >= row_top)
    if ENTROPY:
        row_weighted = tl.sum(decay * (weighted + moved * total), 0)
        tl.store(entropies + row, (bits - row_weighted / row_total) * _LN2)

    if GRADIENT:
        by = gradient_scale
        if factor is not None:
            by *= tl.load(factor + row * factor_stride)
        share = by / row_total
        at = label.to(tl.int32)
        for start in range(0, rest, G * AT_EDGE):
            column = _wrapped(edge + start + near, V, ALIGNED)
            within = start + near < rest
            v = _value(tl.load(x_row + column, mask=within, other=0.0), double)
            g = tl.exp2(tl.fma(v, unit, -base)) * share
            g = tl.where(column == at, g - by, g)
            if double is not None:
                g *= 1.0 - v * v
            tl.store(out_row + column, g, mask=within)
        at -= head
        for i in range(blocks):
            start = (blocks - 1 - i) * BV
            v = _value(tl.load(x_body + start + lane, eviction_policy="evict_first"), double)
            g = tl.exp2(tl.fma(v, unit, -base)) * share
            if (at >= start) & (at < start + BV):
                g = tl.where(lane == at - start, g - by, g)
            if double is not None:
                g *= 1.0 - v * v
            tl.store(out_body + start + lane, g, eviction_policy="evict_first")
