"""Adapters' float32 masters, cast into the strips that the products read: one launch for all.

The masters of all adapters lie in one flat buffer, which a fused optimizer updates. The products
read half-precision copies at other places: rows of A side by side for the tails, columns of B
behind W at its pitch, zeros in between. After each optimizer step `pack_adapters` writes all of
them, several hundred matrices. What goes where never changes during a run, so `pack_plan` makes
the table for it once, on the device; a launch per matrix would cost 3 us each, 2 ms in all, where
the bytes need 60 us (42 M numbers read in 4 bytes and written in 2, at 4.3 TB/s).
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastsft_kernels.checks import FLOATS, bad, check_device, describe
from fastsft_kernels.launch import select

CHUNK = 16  # neighbouring columns of one row, handled together
TILE = 256  # chunks that one program writes: 4096 numbers


class PackEntry(NamedTuple):
    """One matrix: masters[offset : offset + rows · columns], row by row, goes to `destination`.

    destination: a matrix of at least [rows, columns] whose last stride is 1, rows at any pitch; a
    sub-view of a larger buffer (a block of a block-diagonal B, say) is fine. What it has beyond
    [rows, columns] is filled with zeros. Nothing outside it is touched.
    """

    offset: int
    rows: int
    columns: int
    destination: Tensor


@dataclass(frozen=True, eq=False)
class PackPlan:
    """What `pack_adapters` does, as tables on the device. It keeps the destinations alive.

    table    int64 [E, 7]: source offset, place of the destination counted from the first one's in
             numbers, pitch, rows, columns, and the rows and columns of the destination
    tiles    int32 [tiles, 2]: entry, and which run of TILE chunks of it
    needed   the length of the masters that the entries reach to
    aligned  whether all rows start where whole vectors do, on both sides
    """

    entries: tuple[PackEntry, ...]
    table: Tensor
    tiles: Tensor
    needed: int
    aligned: bool

    def __deepcopy__(self, memo: dict[int, Any]) -> PackPlan:
        """A plan for the copies of the destinations: the places in a copied table would be wrong."""
        return pack_plan(copy.deepcopy(self.entries, memo), self.table.device)


def pack_plan(entries: Sequence[PackEntry], device: torch.device | str) -> PackPlan:
    """The plan for `pack_adapters`: made once, before the first step.

    Destinations must be of one dtype, all on `device`, and must not be moved or freed and
    allocated anew afterwards: the plan holds their addresses (and references to them). Raises
    ValueError for entries that do not fit.
    """
    op = "pack_plan"
    device = torch.empty(0, device=device).device  # "cuda" is a name, "cuda:0" a device
    if not entries:
        raise bad(op, "there must be at least one entry", len(entries), "Leave the call out.")
    dtype = entries[0].destination.dtype
    for number, entry in enumerate(entries):
        _check_entry(op, f"entry {number}", entry, dtype, device)
    table = [_line(entry, entries[0].destination) for entry in entries]
    # -(-n // m) is n over m, rounded up.
    counts = [-(-rows * -(-columns // CHUNK) // TILE) for *_, rows, columns in table]
    tiles = [(number, tile) for number, count in enumerate(counts) for tile in range(count)]
    return PackPlan(
        tuple(entries),
        torch.tensor(table, dtype=torch.int64).to(device),
        torch.tensor(tiles, dtype=torch.int32).view(-1, 2).to(device),
        max(e.offset + e.rows * e.columns for e in entries),
        all(_aligned(*line) for line in table),
    )


def pack_adapters(masters: Tensor, plan: PackPlan, *, backend: str | None = None) -> None:
    """masters float32 (or float64), flat: writes every entry of `plan`, cast to its dtype.

    One launch, no host synchronisation. Raises ValueError for masters that are too short or on
    another device.
    """
    op = "pack_adapters"
    run = select(op, backend, masters)
    wide = masters.dtype in (torch.float32, torch.float64)
    if not wide or masters.dim() != 1 or not masters.is_contiguous():
        raise bad(
            op,
            "masters must be float32 or float64, flat, contiguous",
            describe(masters),
            "Flatten.",
        )
    check_device(op, "masters", masters, "the plan", plan.table)
    if masters.numel() < plan.needed:
        raise bad(
            op,
            f"the plan reads masters up to number {plan.needed}",
            describe(masters),
            "Pass the buffer that the plan's offsets refer to.",
        )
    run(masters, plan)


def _check_entry(
    op: str, name: str, entry: PackEntry, dtype: torch.dtype, device: torch.device
) -> None:
    offset, rows, columns, d = entry
    if d.dtype != dtype or d.dtype not in FLOATS or d.device != device:
        raise bad(
            op,
            f"the destination of {name} must be {dtype} on {device}, as the first is",
            describe(d),
            "Make one plan per dtype and device.",
        )
    if d.dim() != 2 or d.shape[0] < rows or d.shape[1] < columns or min(offset, rows, columns) < 0:
        raise bad(
            op,
            f"the destination of {name} must be a matrix of at least [{rows}, {columns}]",
            f"{describe(d)}, offset {offset}",
            "Pass a view that holds the matrix.",
        )
    if d.shape[1] > 1 and d.stride(1) != 1:
        raise bad(
            op,
            f"the numbers of a row of {name}'s destination must lie side by side",
            f"strides {d.stride()}",
            "Pass a view whose last stride is 1.",
        )


def _line(entry: PackEntry, first: Tensor) -> tuple[int, ...]:
    offset, rows, columns, d = entry
    place = (d.data_ptr() - first.data_ptr()) // d.element_size()
    return offset, place, d.stride(0), rows, columns, *d.shape


def _aligned(
    offset: int, place: int, pitch: int, rows: int, columns: int, all_rows: int, all_columns: int
) -> bool:
    """Whether rows are made of whole vectors: 4 numbers of float32 in, 8 numbers out."""
    source, target = offset % 4 + columns % 4, place % 8 + pitch % 8 + all_columns % CHUNK
    return source + target == 0
