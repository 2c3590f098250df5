"""Philox against Random123's known answers; the mask's layout, statistics and independence."""

import pytest
import torch
from fastsft_kernels import DropoutKey, dropout, lora_dropout_mask
from fastsft_kernels.dropout import philox
from torch.utils._python_dispatch import TorchDispatchMode

ONES = 0xFFFFFFFF
KNOWN = [  # counter, key, answer: Random123's kat_vectors for philox4x32-10
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((ONES,) * 4, (ONES, ONES), (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


def words(counter, key):
    return tuple(w.item() for w in philox(tuple(torch.tensor([c]) for c in counter), key))


@pytest.mark.parametrize("counter,key,answer", KNOWN)
def test_known_answers(counter, key, answer):
    assert words(counter, key) == answer


def test_mask_layout_number_by_number():
    """The contract other implementations must meet, spelled out in Python integers."""
    rows = torch.tensor([5, (3 << 24) | 17, (1 << 40) + 2, -1])
    key = DropoutKey(seed=11, step=22, module=33, rows=rows)
    p, columns = 0.3, 21
    mask = lora_dropout_mask(key, columns, p)
    assert mask.shape == (4, columns) and mask.dtype == torch.bool
    for i, row in enumerate(rows.tolist()):
        low, high = row & ONES, (row >> 32) & ONES
        for column in range(columns):
            four = words((low, high, column // 8, 33), (11, 22))
            place = column % 8
            number = (four[place // 2] >> (16 * (place % 2))) & 0xFFFF
            assert mask[i, column].item() == (number >= round(p * 65536)), (i, column)


def test_pieces_do_not_show():
    """Row counts around the internal piece size give the rows of the whole."""
    key = DropoutKey(1, 2, 3, torch.arange(9000))
    whole = lora_dropout_mask(key, 64, 0.5)
    part = lora_dropout_mask(key._replace(rows=key.rows[8190:8195]), 64, 0.5)
    assert torch.equal(whole[8190:8195], part)


@pytest.mark.parametrize("piece", [1, 100, 1 << 30])
def test_the_size_of_a_piece_changes_no_number(piece, monkeypatch):
    key = DropoutKey(1, 2, 3, torch.arange(300))
    whole = lora_dropout_mask(key, 50, 0.5)
    monkeypatch.setattr(dropout, "CPU_PIECE", piece)
    assert torch.equal(lora_dropout_mask(key, 50, 0.5), whole)


class Launches(TorchDispatchMode):
    """Counts the ops that reach a device and the bytes of the largest tensor they make."""

    def __init__(self):
        super().__init__()
        self.count = self.largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.count += 1
        if isinstance(out, torch.Tensor) and out.dtype == torch.int64:
            self.largest = max(self.largest, out.untyped_storage().nbytes())
        return out


def test_off_the_cpu_a_mask_takes_few_launches_and_bounded_memory():
    """16k tokens of an 8B model's layer. Each op on the meta device stands for one kernel launch."""
    key = DropoutKey(1, 2, 3, torch.empty(16384, dtype=torch.int64, device="meta"))
    with Launches() as launches:
        mask = lora_dropout_mask(key, 4096, 0.1)
    assert mask.shape == (16384, 4096)
    assert launches.count < 1000
    assert launches.largest <= 64 << 20


def test_permuted_rows_permute_the_mask():
    key = DropoutKey(1, 2, 3, torch.arange(50) << 24)
    order = torch.randperm(50)
    moved = lora_dropout_mask(key._replace(rows=key.rows[order]), 40, 0.5)
    assert torch.equal(moved, lora_dropout_mask(key, 40, 0.5)[order])


@pytest.mark.parametrize("p", [0.0, 0.05, 0.1, 0.5, 0.9])
def test_statistics(p):
    n, columns = 2000, 256
    mask = lora_dropout_mask(DropoutKey(7, 0, 0, torch.arange(n)), columns, p).double()
    rate = 1 - round(p * 65536) / 65536
    five_sigma = 5 * (rate * (1 - rate)) ** 0.5
    assert abs(mask.mean() - rate) <= five_sigma / (n * columns) ** 0.5
    assert ((mask.mean(0) - rate).abs() <= five_sigma / n**0.5).all()
    assert ((mask.mean(1) - rate).abs() <= five_sigma / columns**0.5).all()


@pytest.mark.parametrize(
    "change", [{"seed": 8}, {"step": 1}, {"module": 1}, {"rows": torch.arange(1000) + 1000}]
)
def test_every_part_of_the_key_counts(change):
    key = DropoutKey(7, 0, 0, torch.arange(1000))
    one, two = (lora_dropout_mask(k, 64, 0.5).double() - 0.5 for k in (key, key._replace(**change)))
    correlation = (one * two).mean() * 4
    assert abs(correlation) < 5 / one.numel() ** 0.5
    neighbours = (one[:, :-1] * one[:, 1:]).mean() * 4
    assert abs(neighbours) < 5 / one.numel() ** 0.5
