"""GLU backward with the adapters around it: everything that needs a tile of dh, gate or up, at once.

    dh += scaling · mask∘(d·a)         the down projection's adapter, seen from its output
    h, dgate, dup                      as in `triton_ops.glu`
    da_down = scaling · dᵀ·(mask∘h)    db_gate = dgateᵀ·tail_gate    db_up = dupᵀ·tail_up

In bytes, for 8192 x 14336 numbers of bf16 (235 MB a matrix) and R = 16: the elementwise backward
moves 5 of them. Apart, adding d·a reads and writes dh once more, and the products read h, which
must then be written first, dgate and dup: 6 more, and even with the sum left to a GEMM 4, 218 us
at 4.3 TB/s. Here it is 5, and the sums, 14336 x 48 x 4 = 2.8 MB for each slice of the rows.

A program takes BF columns and a slice of the rows, BM at a time; dh, gate and up arrive in shared
memory two stages ahead. The sums are kept as [R, BF]: the big tile is then the right operand, whose
columns are dealt out to the warps, so that no warp computes an activation that another computes
too. That is 39 instructions a number, where the left operand of a [BF, R] takes 107 on sm_80; an
H200 has time for 68. On sm_90 and for R up to 32 the big tile is the left operand all the same
(LEFT): wgmma, whose 64 rows R does not fill and BF does, takes it from shared memory. That is 36,
in programs of four warps, two or three on a multiprocessor: while one waits at a barrier, of which
there are 17 a tile, the others go on. Ranks beyond the 64 (128 on sm_90 and 100) that registers hold
are summed up by launches of their own, which read the three matrices again: 3 more of them where
separate passes for the products would also read 3. The last launch writes dgate, dup and h.

Slices of rows are summed into partials that a second launch adds up, all three sums in one:
deterministic, and without atomics.
"""

from __future__ import annotations

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastsft_kernels.fused.glu import GluGradients
from fastsft_kernels.fused.strips import Adapters
from fastsft_kernels.integers import cdiv, next_power_of_2
from fastsft_kernels.launch import capability, launch, multiprocessors, pinned
from fastsft_kernels.triton_ops.glu import activate, backward_rows, new_like, rows_contiguous
from fastsft_kernels.triton_ops.philox import keep_mask, mask_arguments

Sums = tuple[Tensor | None, Tensor | None, Tensor | None]

_FEWEST_STEPS = 4  # of a slice of the rows: with fewer the stages never fill
_MOST_SLICES = 32
# The wide tile as wgmma's left operand: four warps make its 64 rows.
_LEFT = {"BM": 32, "BF": 64, "num_warps": 4, "num_stages": 3, "PER_SM": 2, "LEFT": True}


def glu_backward(
    dh: Tensor,
    gate: Tensor,
    up: Tensor,
    activation: str = "silu",
    *,
    adapters: Adapters | None = None,
    tails: tuple[Tensor | None, Tensor | None] | None = None,
    h_out: Tensor | None = None,
    out: tuple[Tensor, Tensor] | None = None,
    grads_out: Sums | None = None,
) -> GluGradients:
    """See `fastsft_kernels.fused.glu_backward`."""
    dh, gate, up = (rows_contiguous(x) for x in (dh, gate, up))
    dgate, dup = (new_like(gate), new_like(gate)) if out is None else out
    tail_gate, tail_up = (None if t is None else rows_contiguous(t) for t in tails or (None, None))
    if adapters is None and tail_gate is None and tail_up is None:
        backward_rows(dh, gate, up, activation, dgate, dup, h_out)
        return GluGradients(dgate, dup, h_out)
    if adapters is not None:
        adapters = adapters._replace(d=rows_contiguous(adapters.d), a=rows_contiguous(adapters.a))
    strips = (tail_gate, tail_up)
    sums = _new_sums(gate, adapters, *strips) if grads_out is None else grads_out
    matrices = (dh, gate, up, dgate, dup, h_out)
    _launch(matrices, adapters, strips, sums, activation, grads_out is not None)
    return GluGradients(dgate, dup, h_out, *sums)


def _new_sums(
    gate: Tensor, adapters: Adapters | None, tail_gate: Tensor | None, tail_up: Tensor | None
) -> Sums:
    features = gate.shape[1]
    da = None if adapters is None else _float32(gate, adapters.a.shape[0], features)
    db = [None if t is None else _float32(gate, features, t.shape[1]) for t in (tail_gate, tail_up)]
    return da, db[0], db[1]


def _float32(like: Tensor, *shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.float32, device=like.device)


def _launch(
    matrices: tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None],
    adapters: Adapters | None,
    tails: tuple[Tensor | None, Tensor | None],
    sums: Sums,
    activation: str,
    add: bool,
) -> None:
    """Launches the backward, once for each chunk of ranks, and the sum of the partials."""
    (tokens, features), gate = matrices[1].shape, matrices[1]
    d, a, dropout, scaling = adapters or (None, None, None, 1.0)
    down_rank = 0 if d is None else d.shape[1]
    tail_rank = next((t.shape[1] for t in tails if t is not None), 0)
    config, chunk, piece = _config(gate, max(down_rank, tail_rank), dropout is not None)
    slots = config.pop("PER_SM") * multiprocessors(gate)
    blocks, steps = cdiv(features, config["BF"]), cdiv(tokens, config["BM"])
    sizes = [0 if x is None else x.numel() for x in sums]
    # A slice writes its sums and has them read again; all slices together move five matrices.
    cost = 8 * sum(sizes) / (5 * gate.element_size() * max(gate.numel(), 1))
    each = max(1, cdiv(steps, _slices(blocks, steps, slots, cost)))
    splits = max(1, cdiv(steps, each))
    partials = None if splits == 1 else _float32(gate, splits, sum(sizes))
    into = sums if partials is None else _parts(partials, sums)
    rows = tuple(0 if x is None else x.stride(0) for x in (*matrices, d, a, *tails))
    down, behind = (min(chunk, _power(r)) for r in (down_rank, tail_rank))
    for start in range(0, max(down_rank, tail_rank), chunk):
        last = start + chunk >= max(down_rank, tail_rank)
        launch(
            _backward_sums,
            (blocks, splits),
            *matrices[:3],
            *(x if last else None for x in matrices[3:]),
            *(d, a, *(t if start < tail_rank else None for t in tails)),
            *(into[0] if start < down_rank else None, into[1], into[2]),
            *(tokens, features, each, rows),
            *(0 if partials is None else partials.stride(0), float(scaling)),
            *mask_arguments(dropout),
            ACTIVATION=activation,
            DROPOUT=dropout is not None,
            ADD=add and partials is None,
            **{"RD": down_rank, "RT": tail_rank, "FROM": start},
            **{"BA": min(piece, _power(down_rank)), "BD": down, "BT": behind},
            **config,
        )
    if partials is not None:
        reduced = pinned("glu_backward_reduce", [{"BN": 512, "num_warps": 4}], gate)
        grid = (cdiv(max(sizes), reduced["BN"]), 3)
        launch(_add_up, grid, partials, *sums, splits, *sizes, ADD=add, **reduced)


def _power(rank: int) -> int:
    """The width of a tile that holds `rank` columns: a product's sides are 16 at least."""
    return max(16, next_power_of_2(rank))


def _parts(partials: Tensor, sums: Sums) -> Sums:
    """Where the first slice's sums begin in the partials, one behind the other."""
    parts: list[Tensor | None] = []
    start = 0
    for x in sums:
        parts.append(None if x is None else partials[0, start:])
        start += 0 if x is None else x.numel()
    return parts[0], parts[1], parts[2]


def _config(gate: Tensor, rank: int, masked: bool) -> tuple[dict[str, int], int, int]:
    """(configuration, ranks summed up in one launch, ranks of d·a multiplied at a time).

    PER_SM says how many programs a multiprocessor holds, by the registers they take; maxnreg lets
    a program that is alone there have all of them, where the assembler would rather spill a few
    bytes to fit in two. Of dh, gate and up, 24 KiB a stage, two stages are under way: 1 us of a
    multiprocessor's reads at 4.3 TB/s. sm_86, 89 and 120 have 99 KB for them. The chunks of ranks
    are what compiles without a spill; products of warp groups leave more registers than those of
    warps, and masks and BM = 32 together leave too few for R = 64.
    """
    small = {"BM": 16, "BF": 128, "num_warps": 8, "num_stages": 3, "maxnreg": 255, "PER_SM": 1}
    large = {**small, "BM": 32}
    if gate.dtype == torch.float32:
        config = dict(pinned("glu_backward_f32", [{**small, "BF": 64, "num_stages": 2}], gate))
        return config, 32, 32
    groups = capability(gate) in (90, 100)
    chunk = 128 if groups and rank > 64 else 64
    if rank <= 32:
        name, candidates = str(_power(rank)), [large]
        if capability(gate) == 90:
            three = rank <= 16 and not masked
            candidates.insert(0, {**_LEFT, "PER_SM": 3, "maxnreg": 168} if three else _LEFT)
        if rank <= 16:
            candidates.append({"BM": 16, "BF": 128, "num_warps": 8, "num_stages": 3, "PER_SM": 2})
    elif groups:
        name, wide = ("wide", {**large, "BF": 64}) if rank > 64 else ("64", large)
        candidates = [small if masked and rank <= 64 else wide]
    else:
        name, candidates = "wide", [small if rank <= 64 else {**small, "num_stages": 2}]
    name += "_masked" if masked else ""
    return dict(pinned(f"glu_backward_{name}", candidates, gate)), chunk, 256


@lru_cache(maxsize=1024)
def _slices(blocks: int, steps: int, slots: int, cost: float) -> int:
    """Into how many slices the rows are cut, so that waves of `slots` programs come out full.

    Each slice adds `cost`, in units of the time that the matrices take, for its partial sums.
    """

    def time(slices: int) -> float:
        programs = blocks * slices
        return -(-programs // slots) * slots / programs + slices * cost

    most = max(1, min(_MOST_SLICES, steps // _FEWEST_STEPS))
    return min(range(1, most + 1), key=time) if blocks else 1


@triton.jit
def _at(x, row, row_stride, rows, columns):
    """Pointers to a tile whose rows begin at `row`: 64 bits to its first, as T x F may pass 2^31.

    Within the tile 32 bits do, and cost a register less each, for rows up to 2^26 numbers apart.
    """
    return x + row.to(tl.int64) * row_stride + (rows * row_stride + columns)


@triton.jit
def _strip(x, row, row_stride, T, start, R: tl.constexpr, BM: tl.constexpr, BR: tl.constexpr):
    """Columns start to start + BR, below R, of rows `row` to row + BM of x: a tail or d."""
    rows, rank = tl.arange(0, BM)[:, None], start + tl.arange(0, BR)[None, :]
    mask = (row + rows < T) & (rank < R)
    return tl.load(_at(x, row, row_stride, rows, rank), mask=mask, other=0.0)


@triton.jit
def _part_of_a(a, a_row, column, F, start, R: tl.constexpr, BR: tl.constexpr):
    rank = start + tl.arange(0, BR)[:, None]
    return tl.load(a + rank * a_row + column, mask=(rank < R) & (column < F), other=0.0)


@triton.jit(do_not_specialize=["T", "steps", "seed", "step", "modules"])
def _backward_sums(
    dh,
    gate,
    up,
    dgate,
    dup,
    h_out,
    d,
    a,
    tail_gate,
    tail_up,
    da_down,
    db_gate,
    db_up,
    T,
    F,
    steps,
    strides,
    split_stride,
    scaling,
    row_keys,
    seed,
    step,
    modules,
    threshold,
    ACTIVATION: tl.constexpr,
    DROPOUT: tl.constexpr,
    ADD: tl.constexpr,
    RD: tl.constexpr,
    RT: tl.constexpr,
    FROM: tl.constexpr,
    BA: tl.constexpr,
    BD: tl.constexpr,
    BT: tl.constexpr,
    BM: tl.constexpr,
    BF: tl.constexpr,
    LEFT: tl.constexpr = False,
):
    dh_row, gate_row, up_row, dgate_row, dup_row, h_row = strides[:6]
    d_row, a_row, tail_gate_row, tail_up_row = strides[6:]
    dtype: tl.constexpr = gate.dtype.element_ty
    first = tl.program_id(0) * BF
    rows, column = tl.arange(0, BM)[:, None], first + tl.arange(0, BF)[None, :]
    row = tl.program_id(1) * steps * BM
    sum_down = tl.zeros([BF, BD] if LEFT else [BD, BF], tl.float32)
    sum_gate = tl.zeros([BF, BT] if LEFT else [BT, BF], tl.float32)
    sum_up = tl.zeros([BF, BT] if LEFT else [BT, BF], tl.float32)
    HELD: tl.constexpr = RD <= BA
    if d is not None and HELD:
        a_tile = _part_of_a(a, a_row, column, F, 0, RD, BA)
        d_tile = _strip(d, row, d_row, T, 0, RD, BM, BA)
    for _ in range(steps):
        inside = (row + rows < T) & (column < F)
        g = tl.load(_at(gate, row, gate_row, rows, column), mask=inside, other=0.0).to(tl.float32)
        u = tl.load(_at(up, row, up_row, rows, column), mask=inside, other=0.0).to(tl.float32)
        dy = tl.load(_at(dh, row, dh_row, rows, column), mask=inside, other=0.0).to(tl.float32)
        value, slope = activate(g, ACTIVATION, dtype == tl.float32)
        if h_out is not None:
            h = (value * u).to(dtype)
            tl.store(_at(h_out, row, h_row, rows, column), h, mask=inside)
        if d is not None:
            if HELD:
                # Used by two products, the next tile of d is not staged by the compiler.
                d_next = _strip(d, row + BM, d_row, T, 0, RD, BM, BA)
                term = tl.dot(d_tile, a_tile, input_precision="ieee")
            else:
                term = tl.zeros([BM, BF], tl.float32)
                for start in range(0, RD, BA):
                    left = _strip(d, row, d_row, T, start, RD, BM, BA)
                    below = _part_of_a(a, a_row, column, F, start, RD, BA)
                    term = tl.dot(left, below, term, input_precision="ieee")
            if DROPOUT:
                token = row + tl.arange(0, BM)
                keys = tl.load(row_keys + token, mask=token < T, other=0)
                keep = keep_mask(keys, first, seed, step, modules[0], threshold, BF)
                term = tl.where(keep, term, 0.0)
            dy += term * scaling
            if da_down is not None:
                # Without the zero the compiler gives h a layout of its own and computes the
                # activation twice: 45 instructions a number, not 38. (A dh that is not finite,
                # from which no step may follow, then shows here too.)
                right = value * u + dy * 0.0
                if DROPOUT:
                    right = tl.where(keep, right, 0.0)
                if HELD and BA == BD:
                    left = d_tile
                else:
                    left = _strip(d, row, d_row, T, FROM, RD, BM, BD)
                sum_down = _add_product(left, right.to(dtype), sum_down, LEFT)
            if HELD:
                d_tile = d_next
        dg = (dy * u * slope).to(dtype)
        du = (dy * value).to(dtype)
        if dgate is not None:
            tl.store(_at(dgate, row, dgate_row, rows, column), dg, mask=inside)
            tl.store(_at(dup, row, dup_row, rows, column), du, mask=inside)
        if tail_gate is not None:
            tail = _strip(tail_gate, row, tail_gate_row, T, FROM, RT, BM, BT)
            sum_gate = _add_product(tail, dg, sum_gate, LEFT)
        if tail_up is not None:
            tail = _strip(tail_up, row, tail_up_row, T, FROM, RT, BM, BT)
            sum_up = _add_product(tail, du, sum_up, LEFT)
        row += BM
    if LEFT:
        sum_down, sum_gate, sum_up = tl.trans(sum_down), tl.trans(sum_gate), tl.trans(sum_up)
    slab = tl.program_id(1).to(tl.int64) * split_stride
    if da_down is not None:
        rank = FROM + tl.arange(0, BD)[:, None]
        _put(
            da_down + slab + rank * F + column, sum_down * scaling, (rank < RD) & (column < F), ADD
        )
    rank = FROM + tl.arange(0, BT)[:, None]
    inside = (rank < RT) & (column < F)
    if tail_gate is not None:
        _put(db_gate + slab + column * RT + rank, sum_gate, inside, ADD)
    if tail_up is not None:
        _put(db_up + slab + column * RT + rank, sum_up, inside, ADD)


@triton.jit
def _add_product(narrow, wide, total, LEFT: tl.constexpr):
    """total [R, BF] + narrowᵀ · wide for narrow [BM, R], wide [BM, BF]; LEFT: total [BF, R]."""
    if LEFT:
        total = tl.dot(tl.trans(wide), narrow, total, input_precision="ieee")
    else:
        total = tl.dot(tl.trans(narrow), wide, total, input_precision="ieee")
    return total


@triton.jit
def _put(into, total, inside, ADD: tl.constexpr):
    if ADD:
        total += tl.load(into, mask=inside, other=0.0)
    tl.store(into, total, mask=inside)


@triton.jit(do_not_specialize=["splits"])
def _add_up(
    partials,
    da_down,
    db_gate,
    db_up,
    splits,
    n_down,
    n_gate,
    n_up,
    ADD: tl.constexpr,
    BN: tl.constexpr,
):
    """Adds up the slices of all three sums: program_id(1) says which sum."""
    which, n = tl.program_id(1), n_down + n_gate + n_up
    if which == 0:
        if da_down is not None:
            _add_slices(partials, da_down, splits, n, n_down, ADD, BN)
    elif which == 1:
        if db_gate is not None:
            _add_slices(partials + n_down, db_gate, splits, n, n_gate, ADD, BN)
    elif db_up is not None:
        _add_slices(partials + n_down + n_gate, db_up, splits, n, n_up, ADD, BN)


@triton.jit
def _add_slices(part, out, splits, n, size, ADD: tl.constexpr, BN: tl.constexpr):
    index = tl.program_id(0) * BN + tl.arange(0, BN)
    total = tl.zeros([BN], tl.float32)
    part += index
    for _ in range(splits):
        total += tl.load(part, mask=index < size, other=0.0)
        part += n
    _put(out + index, total, index < size, ADD)
