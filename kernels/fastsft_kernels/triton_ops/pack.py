"""Masters to strips in one launch: a table says which matrix a program works on, and where it lies.

A program writes 256 chunks of 16 columns of one matrix. Chunks are counted row by row over the
padded matrix, so the same program serves wide rows (A, 4096 columns) and rows of one chunk (B,
16 columns at W's pitch): one division per chunk of 16 numbers, none per number. Destinations are
separate allocations; the table gives their distances from the first of them, in numbers, and one
pointer plus an int64 offset reaches all. (A pointer made from an int64 would too, but the compiler
then forgets what it knows of alignment, and stores 2 bytes at a time.) Bound by memory: 4 bytes in
and 2 out per number.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from fastsft_kernels.fused.pack import CHUNK, TILE, PackPlan
from fastsft_kernels.launch import launch, pinned


def pack_adapters(masters: Tensor, plan: PackPlan) -> None:
    """See `fastsft_kernels.fused.pack_adapters`."""
    if plan.aligned:
        config = pinned("pack_adapters", [{"num_warps": 4}, {"num_warps": 8}], masters)
    else:  # scalar loads need a register for each address: more threads
        config = pinned("pack_adapters_unaligned", [{"num_warps": 8}], masters)
    launch(
        _pack,
        (plan.tiles.shape[0],),
        masters,
        plan.entries[0].destination,
        plan.table,
        plan.tiles,
        ALIGNED=plan.aligned,
        TILE=TILE,
        CHUNK=CHUNK,
        **config,
    )


@triton.jit
def _pack(
    masters,
    base,
    table,
    tiles,
    ALIGNED: tl.constexpr,
    TILE: tl.constexpr,
    CHUNK: tl.constexpr,
):
    program = tl.program_id(0)
    entry = table + tl.load(tiles + 2 * program).to(tl.int64) * 7
    first = tl.load(tiles + 2 * program + 1) * TILE
    source = tl.load(entry)
    target = tl.load(entry + 1)
    pitch = tl.load(entry + 2)
    rows = tl.load(entry + 3)
    columns = tl.load(entry + 4)
    padded_rows = tl.load(entry + 5)
    padded_columns = tl.load(entry + 6)
    if ALIGNED:  # what the plan has checked, so that loads and stores are whole vectors
        source = tl.multiple_of(source, 4)
        columns = tl.multiple_of(columns, 4)
        target = tl.multiple_of(target, 8)
        pitch = tl.multiple_of(pitch, 8)
        padded_columns = tl.multiple_of(padded_columns, 16)
    chunks = tl.cdiv(padded_columns, CHUNK).to(tl.int32)
    chunk = first + tl.arange(0, TILE)
    row = (chunk // chunks).to(tl.int64)[:, None]
    column = (chunk % chunks * CHUNK)[:, None] + tl.arange(0, CHUNK)[None, :]
    inside = (row < padded_rows) & (column < padded_columns)
    known = (row < rows) & (column < columns)
    value = tl.load(masters + source + row * columns + column, mask=known, other=0.0)
    place = base + target + row * pitch + column
    tl.store(place, value.to(base.dtype.element_ty), mask=inside)
