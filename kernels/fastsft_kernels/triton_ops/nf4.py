"""NF4 in Triton: one launch decodes codes and nested scales into a pitched buffer, tails included.

    weight[i] = code[index_i] · absmax[i // 64]
    absmax[b] = code2[absmax8_b] · absmax2[b // 256] + offset

Bits are those of the reference: every kernel is compiled without fused multiply-adds, because one
in absmax gives other values, and the quantiser divides with `div_rn`.

Decode. A program writes a tile of 4096 weights, BM rows of BN columns, BN the largest power of two
that leaves at most a sixteenth of the tile beyond K. A thread takes a word of eight codes, so one
scale serves the word whatever K % 64 is, and writes eight weights, 16 bytes in half precision; the
lanes of a warp write side by side. Where K % 8 != 0 (no known model) words would straddle rows: the
same kernel then takes single codes, slowly.

At 4.3 TB/s the 58.7 M weights of 14336 x 4096 take 34 us, in which 132 multiprocessors of 128 lanes
at 1.7 GHz issue 16.6 instructions for each weight, 8.3 of them on the integer units. The table of
16 values lies in shared memory, one word in each of 16 banks, so a warp's look-ups never conflict:
one LDS for a weight is a quarter of what the load units do in that time. A gather from global
memory costs one or two more integer instructions for a 64-bit address; a tree of selects 15. What
is left is a shift, a mask, an address, a product and half a conversion: in all 9 to 10.5
instructions for a weight, 12 in a group of three with tails, 5 of them integer.

Weights that share an input (q, k, v; gate, up) are decoded into one buffer by one launch: programs
are numbered through all of them, and each finds its weight by counting row tiles. The program of a
row's last columns also rewrites the row's tail: its weight's strip of b at its place, else zeros.

Quantise. A program takes 4096 weights, whole blocks. The code of a number v in [-1, 1] is how many
of the 15 bounds between codes lie below it. Cut into cells 1/15 wide, no cell holds two bounds (the
nearest are 0.08 apart), so code = bounds in earlier cells + (v > the cell's own bound): two
look-ups and one comparison. Any rounding of the cell's number does, since it is monotone and the
bounds lie far from the ends of cells. About 30 instructions for a weight: twice what the memory
would allow, and a thirtieth of the 2.3 ms in which a weight of that size comes over PCIe.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastsft_kernels.integers import cdiv, next_power_of_2
from fastsft_kernels.launch import launch, pinned
from fastsft_kernels.nf4_format import NESTED_BLOCK_SIZE, NF4Weight, dynamic_code, nf4_code

_DECODE = [{"TILE": 4096, "num_warps": 4}, {"TILE": 8192, "num_warps": 8}]
_ENCODE = [{"TILE": 4096, "num_warps": 8}]  # whole blocks, of which the largest has 4096 numbers
# 1.5 * 2^23: numbers added to it are rounded to integers, found in the lowest bits of the sum.
_ROUNDER = tl.constexpr(12582912.0)


def nf4_dequantize(
    nf4: NF4Weight, *, dtype: torch.dtype = torch.bfloat16, out: Tensor | None = None
) -> Tensor:
    """See `fastsft_kernels.nf4_dequantize`."""
    if out is None:
        out = torch.empty(nf4.shape, dtype=dtype, device=nf4.device)
    return _decode([nf4], out, 0, None)


def nf4_dequantize_group(
    weights: Sequence[NF4Weight], out: Tensor, *, b: Tensor | None = None
) -> Tensor:
    """See `fastsft_kernels.fused.nf4_dequantize_group`."""
    return _decode(weights, out, out.shape[1] - weights[0].shape[1], b)


def _decode(weights: Sequence[NF4Weight], out: Tensor, tail: int, b: Tensor | None) -> Tensor:
    columns = weights[0].shape[1]
    config = dict(pinned("nf4_dequantize_tile", _DECODE, out))
    tile = config.pop("TILE")
    wide = _tile_columns(columns, tile)
    high, across = tile // wide, cdiv(columns, wide)
    # Words of eight codes, where each lies within a row and begins at a multiple of four bytes.
    unit = 8 if columns % 8 == 0 and all(w.packed.data_ptr() % 4 == 0 for w in weights) else 1
    nested = weights[0].double_quant
    operands = tuple(
        (
            w.packed if unit == 1 else w.packed.view(torch.int32),
            w.code,
            w.absmax,
            *((w.absmax2, w.offset, w.code2) if nested else ()),
        )
        for w in weights
    )
    rows = tuple(w.shape[0] for w in weights)
    tail_block = min(next_power_of_2(max(tail, 16)), max(16, 4096 // high))
    launch(
        _nf4_dequantize,
        (sum(cdiv(n, high) for n in rows) * across,),
        *(out, out.stride(0), operands, rows, columns // unit),
        *(b, 0 if b is None else b.stride(0), 0 if b is None else b.shape[1], tail, 0),
        **config,
        COLUMN_TILES=across,
        BM=high,
        BN=wide,
        UNIT=unit,
        BLOCK_SHIFT=(weights[0].block_size // unit).bit_length() - 1,
        NESTED=nested,
        TAIL=tail_block,
        TAILS=cdiv(tail, tail_block),
        enable_fp_fusion=False,
    )
    return out


def _tile_columns(columns: int, tile: int) -> int:
    """The widest power of two from `tile` to 64 whose tiles hang over a row by 1/16 or less."""
    wide = tile
    while wide > 64 and cdiv(columns, wide) * wide - columns > columns // 16:
        wide //= 2
    return wide


@triton.jit(do_not_specialize=["zero"])
def _nf4_dequantize(
    out,
    pitch,
    weights,
    rows,
    units,
    b,
    b_pitch,
    rank,
    tail,
    zero,
    COLUMN_TILES: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    UNIT: tl.constexpr,
    BLOCK_SHIFT: tl.constexpr,
    NESTED: tl.constexpr,
    TAIL: tl.constexpr,
    TAILS: tl.constexpr,
):
    column_tile = tl.program_id(0) % COLUMN_TILES
    tile = tl.program_id(0) // COLUMN_TILES
    # Which weight: its number, its rows, the row of `out` where it begins.
    which = 0
    height = rows[0]
    begins = tl.zeros([], tl.int64)
    for i in tl.static_range(1, len(rows)):
        before = tl.cdiv(rows[i - 1], BM)
        past = (which == i - 1) & (tile >= before)
        tile = tl.where(past, tile - before, tile)
        begins = tl.where(past, begins + rows[i - 1], begins)
        which = tl.where(past, i, which)
        height = tl.where(past, rows[i], height)
    row = tile * BM + tl.arange(0, BM)[:, None]
    to = out + (begins + tile * BM) * pitch + tl.arange(0, BM)[:, None] * pitch

    # Units of the tile, counted from the first unit of its first row, which is `first`.
    unit = column_tile * (BN // UNIT) + tl.arange(0, BN // UNIT)[None, :]
    inside = (row < height) & (unit < units)
    first = (tile * BM).to(tl.int64) * units
    local = tl.arange(0, BM)[:, None] * units + unit
    packed = _pick(weights, which, 0)
    if UNIT == 8:
        word = tl.load(packed + first + local, mask=inside, other=0).to(tl.uint32)
        # The earlier of two codes is the higher half of its byte.
        shifts = ((tl.arange(0, 8) ^ 1) * 4).to(tl.uint32)
        index = (word[:, :, None] >> shifts[None, None, :]) & 15
    else:
        place = (first & 1).to(tl.int32) + local
        byte = tl.load(packed + (first >> 1) + (place >> 1), mask=inside, other=0).to(tl.int32)
        index = tl.where(place & 1 == 1, byte & 15, byte >> 4)[:, :, None]
    table = tl.load(_pick(weights, which, 1) + tl.arange(0, 16))
    value = tl.gather(table, tl.reshape(index, [BM * BN]).to(tl.int32), 0)

    # Shifts and masks, since divisions of signed numbers cost four instructions.
    within = (first & ((1 << BLOCK_SHIFT) - 1)).to(tl.int32) + local
    block = (first >> BLOCK_SHIFT).to(tl.int32) + (within >> BLOCK_SHIFT)
    scale = tl.load(_pick(weights, which, 2) + block, mask=inside, other=0)
    if NESTED:
        product = tl.load(_pick(weights, which, 5) + scale.to(tl.int32))
        product *= tl.load(_pick(weights, which, 3) + (block >> 8), mask=inside, other=0.0)
        # On sm_100 Triton 3.6's ptxas fuses a packed product and sum even where told not to. It
        # cannot see through the bits of the product ^ an argument that is always 0.
        product = (product.to(tl.int32, bitcast=True) ^ zero).to(tl.float32, bitcast=True)
        scale = product + tl.load(_pick(weights, which, 4))
    value = tl.reshape(value, [BM, BN // UNIT, UNIT]) * scale[:, :, None]
    column = (unit * UNIT)[:, :, None] + tl.arange(0, UNIT)[None, None, :]
    tl.store(to[:, :, None] + column, value.to(out.dtype.element_ty), mask=inside[:, :, None])

    if TAILS > 0 and column_tile == COLUMN_TILES - 1:
        grown = begins + tile * BM
        for i in tl.static_range(TAILS):
            behind = i * TAIL + tl.arange(0, TAIL)[None, :]
            strip = behind - which * rank
            here = (row < height) & (behind < tail)
            rest = tl.zeros([BM, TAIL], out.dtype.element_ty)
            if b is not None:
                source = b + grown * b_pitch + tl.arange(0, BM)[:, None] * b_pitch + strip
                rest = tl.load(source, mask=here & (strip >= 0) & (strip < rank), other=0.0)
            tl.store(to + units * UNIT + behind, rest, mask=here)


@triton.jit
def _pick(weights, which, FIELD: tl.constexpr):
    """Field number FIELD of weight number `which`."""
    chosen = weights[0][FIELD]
    for i in tl.static_range(1, len(weights)):
        chosen = tl.where(which == i, weights[i][FIELD], chosen)
    return chosen


def nf4_quantize(weight: Tensor, *, block_size: int = 64, double_quant: bool = True) -> NF4Weight:
    """See `fastsft_kernels.nf4_quantize`."""
    device, shape = weight.device, (weight.shape[0], weight.shape[1])
    flat = weight.detach().reshape(-1)
    blocks = cdiv(flat.numel(), block_size)
    packed = torch.empty(cdiv(flat.numel(), 2), dtype=torch.uint8, device=device)
    absmax = torch.empty(blocks, dtype=torch.float32, device=device)
    bounds, counts, bounds2 = _tables(device)
    config = dict(pinned("nf4_quantize_tile", _ENCODE, weight))
    tile = config.pop("TILE")
    launch(
        _nf4_quantize,
        (cdiv(flat.numel(), tile),),
        *(packed, absmax, flat, flat.numel(), packed.numel(), bounds, counts),
        **config,
        BLOCKS=tile // block_size,
        BLOCK=block_size,
        enable_fp_fusion=False,
    )
    code, absmax2, offset, code2 = nf4_code().to(device), None, None, None
    if double_quant:
        # The mean is torch's, so that it has the reference's bits.
        offset, code2 = absmax.mean(), dynamic_code().to(device)
        absmax8 = torch.empty(blocks, dtype=torch.uint8, device=device)
        nested = cdiv(blocks, NESTED_BLOCK_SIZE)
        absmax2 = torch.empty(nested, dtype=torch.float32, device=device)
        config = pinned("nf4_quantize_scales", [{"BLOCKS": 4, "num_warps": 4}], weight)
        launch(
            _nf4_quantize_scales,
            (cdiv(nested, config["BLOCKS"]),),
            *(absmax8, absmax2, absmax, offset, blocks, bounds2),
            **config,
            enable_fp_fusion=False,
        )
        absmax = absmax8
    return NF4Weight(packed, absmax, absmax2, offset, code, code2, shape, weight.dtype, block_size)


@cache
def _tables(device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """(the bound in each cell, or infinity; the bounds in earlier cells; the bounds of 8-bit codes)."""
    code, code2 = nf4_code(), dynamic_code()
    bounds, bounds2 = (code[:-1] + code[1:]) / 2, (code2[:-1] + code2[1:]) / 2
    cells = ((bounds * 15 + (_ROUNDER.value + 16)).view(torch.int32) & 31).tolist()
    assert len(set(cells)) == len(cells), "two bounds in one cell"
    # Far from the ends of cells, so that the rounding of a cell's number cannot matter.
    assert ((bounds * 15).frac().abs() - 0.5).abs().min() > 0.01
    own = torch.full((32,), torch.inf)
    own[cells] = bounds
    earlier = torch.tensor([sum(c < i for c in cells) for i in range(32)], dtype=torch.int32)
    return own.to(device), earlier.to(device), bounds2.to(device)


@triton.jit
def _nf4_quantize(
    packed, absmax, x, n, size, bounds, counts, BLOCKS: tl.constexpr, BLOCK: tl.constexpr
):
    TILE: tl.constexpr = BLOCKS * BLOCK
    first = tl.program_id(0).to(tl.int64) * TILE
    left = n - first
    place = tl.arange(0, BLOCKS)[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    value = tl.load(x + first + place, mask=place < left, other=0.0).to(tl.float32)
    largest, scaled = _scaled(value)
    block = tl.arange(0, BLOCKS)
    tl.store(absmax + first // BLOCK + block, largest, mask=block * BLOCK < left)
    cell = (scaled * 15.0 + (_ROUNDER + 16.0)).to(tl.int32, bitcast=True) & 31
    cell = tl.reshape(cell, [TILE])
    cells = tl.arange(0, 32)
    bound = tl.reshape(tl.gather(tl.load(bounds + cells), cell, 0), [BLOCKS, BLOCK])
    index = tl.reshape(tl.gather(tl.load(counts + cells), cell, 0), [BLOCKS, BLOCK])
    index += (scaled > bound).to(tl.int32)
    # Numbers beyond the end are zeros, whose code fills the half byte after an odd end.
    even, odd = tl.split(tl.reshape(index, [TILE // 2, 2]))
    byte = tl.arange(0, TILE // 2)
    tl.store(
        packed + first // 2 + byte, ((even << 4) | odd).to(tl.uint8), mask=byte < size - first // 2
    )


@triton.jit
def _nf4_quantize_scales(codes, absmax2, absmax, offset, n, bounds, BLOCKS: tl.constexpr):
    block = tl.program_id(0) * BLOCKS + tl.arange(0, BLOCKS)
    place = block[:, None] * 256 + tl.arange(0, 256)[None, :]
    value = tl.load(absmax + place, mask=place < n, other=0.0) - tl.load(offset)
    largest, scaled = _scaled(tl.where(place < n, value, 0.0))
    tl.store(absmax2 + block, largest, mask=block * 256 < n)
    # How many of the 255 bounds lie below: a search in halves.
    index = tl.zeros([BLOCKS, 256], tl.int32)
    for i in tl.static_range(8):
        step = 128 >> i
        index += tl.where(scaled > tl.load(bounds + index + (step - 1)), step, 0)
    tl.store(codes + place, index.to(tl.uint8), mask=place < n)


@triton.jit
def _scaled(x):
    """Largest magnitude of each row of float32 x, and x times its reciprocal, each rounded."""
    # Bits without the sign are ordered as magnitudes are, and a NaN is above them all: it shows.
    bits = tl.max(x.to(tl.int32, bitcast=True) & 0x7FFFFFFF, axis=1)
    largest = bits.to(tl.float32, bitcast=True)
    one = tl.full(largest.shape, 1.0, tl.float32)
    # As a plain number 1e-38, below float32's normal range, would make the division a float64 one.
    least = tl.full(largest.shape, 1e-38, tl.float32)
    return largest, x * tl.div_rn(one, tl.maximum(largest, least))[:, None]
