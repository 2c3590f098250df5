"""pack_adapters: every strip as the plain loop writes it, and nothing outside the strips."""

import copy

import pytest
import torch
from fastsft_kernels.fused import PackEntry, pack_adapters, pack_plan
from fastsft_kernels.launch import forced, record_launches
from kernel_checks import DEVICE, DTYPES, poisoned_memory, randn  # noqa: F401


def block(rank, k, n, width, dtype, start=0, shift=0):
    """Entries of one layer: A's rows in a strip, B block-diagonal behind W, and their buffers.

    q, k and v of n, 5 and 3 rows: B's buffer has `width` columns for each, behind k columns of W.
    """
    a = torch.full((3 * width, k), float("nan"), dtype=dtype, device=DEVICE)
    w = torch.full((n + 8, shift + k + 3 * width + 16), float("nan"), dtype=dtype, device=DEVICE)
    entries, offset = [], start
    for i in range(3):
        strip = a[i * width : (i + 1) * width]
        entries.append(PackEntry(offset, rank, k, strip))
        offset += rank * k
    row = 0
    for i, rows in enumerate((n, 5, 3)):
        left = shift + k + i * width
        entries.append(PackEntry(offset, rows, rank, w[row : row + rows, left : left + width]))
        offset += rows * rank
        row += rows
    return entries, (a, w), offset


def expected(entries, masters):
    """What each destination must hold, and a check of a view against it."""
    for offset, rows, columns, destination in entries:
        want = torch.zeros(destination.shape, dtype=destination.dtype, device=DEVICE)
        want[:rows, :columns] = masters[offset : offset + rows * columns].view(rows, columns)
        yield destination, want


@pytest.mark.parametrize("backend", ["triton", "reference"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "rank,k,width,shift",
    [
        (16, 64, 16, 0),
        (8, 64, 16, 0),
        (4, 48, 16, 8),
        (3, 50, 16, 1),
        (1, 33, 7, 0),
        (20, 32, 32, 0),
    ],
)
def test_strips(rank, k, width, shift, dtype, backend):
    first, buffers, end = block(rank, k, 40, width, dtype, shift=shift)
    second, more, end = block(rank, 2 * k, 300, width, dtype, start=end, shift=shift)
    entries = [*first, *second]
    masters = randn(end + 3)
    plan = pack_plan(entries, DEVICE)
    pack_adapters(masters, plan, backend=backend)
    inside = 0
    for destination, want in expected(entries, masters):
        assert torch.equal(destination, want)
        inside += want.numel()
    everything = [*buffers, *more]
    untouched = sum(int(b.isnan().sum()) for b in everything)
    assert untouched == sum(b.numel() for b in everything) - inside


def test_whole_vectors_where_they_are_possible():
    """The plan of an ordinary model is aligned: r 4, 8 or 16 in strips of 16."""
    for rank in (4, 8, 16):
        entries, _, _ = block(rank, 64, 40, 16, torch.bfloat16)
        assert pack_plan(entries, DEVICE).aligned
    for odd in (dict(rank=3, k=64), dict(rank=8, k=64, start=2), dict(rank=8, k=64, shift=1)):
        entries, _, _ = block(n=40, width=16, dtype=torch.bfloat16, **odd)
        assert not pack_plan(entries, DEVICE).aligned


@pytest.mark.parametrize("number", [0, 1])
def test_every_configuration(number):
    for start in (0, 1):
        entries, _, end = block(8, 256, 600, 16, torch.float16, start=start)
        masters = randn(end)
        with forced(pack_adapters=number, pack_adapters_unaligned=number):
            pack_adapters(masters, pack_plan(entries, DEVICE), backend="triton")
        assert all(torch.equal(got, want) for got, want in expected(entries, masters))


def test_float64_masters_go_through_the_reference():
    entries, _, end = block(4, 32, 9, 16, torch.float64)
    masters = randn(end).double() / 3
    pack_adapters(masters, pack_plan(entries, DEVICE))
    assert all(torch.equal(got, want) for got, want in expected(entries, masters))


def test_packing_again_overwrites_what_grew_in_the_zeros():
    entries, _, end = block(4, 32, 9, 16, torch.float32)
    plan = pack_plan(entries, DEVICE)
    for seed in (0, 1):
        masters = randn(end, seed=seed)
        for entry in entries:
            entry.destination.fill_(float("inf"))
        pack_adapters(masters, plan, backend="triton")
        assert all(torch.equal(got, want) for got, want in expected(entries, masters))


def test_a_copied_plan_writes_to_the_copies():
    entries, _, end = block(8, 64, 40, 16, torch.float32)
    plan, masters = pack_plan(entries, DEVICE), randn(end)
    copied = copy.deepcopy(plan)
    pack_adapters(masters, copied, backend="triton")
    assert all(torch.equal(got, want) for got, want in expected(copied.entries, masters))
    assert all(entry.destination.isnan().all() for entry in entries)


def test_one_launch_for_a_model():
    """224 layers' strips: one launch, 4096 numbers a program, and the host waits for nothing."""
    entries, offset = [], 0
    for _ in range(224):
        a = torch.empty(16, 4096, dtype=torch.bfloat16, device="meta")
        w = torch.empty(4096, 4160, dtype=torch.bfloat16, device="meta")
        for rows, columns, view in ((16, 4096, a), (4096, 16, w[:, 4096:4112])):
            entries.append(PackEntry(offset, rows, columns, view))
            offset += rows * columns
    plan = pack_plan(entries, "meta")
    with record_launches(90) as recording:
        pack_adapters(torch.empty(offset, device="meta"), plan)
    (only,) = recording.launches
    assert only.grid == (offset // 4096,) and only.options["ALIGNED"]


def entry(**changes):
    return PackEntry(0, 2, 3, torch.zeros(4, 8, device=DEVICE))._replace(**changes)


BAD = [
    ([], "at least one entry"),
    ([entry(), entry(destination=torch.zeros(4, 8).half())], "of entry 1 must be torch.float32"),
    ([entry(destination=torch.zeros(4, 8, dtype=torch.int32))], "of entry 0 must be"),
    ([entry(rows=5)], r"at least \[5, 3\]"),
    ([entry(columns=9)], r"at least \[2, 9\]"),
    ([entry(offset=-1)], "offset -1"),
    ([entry(destination=torch.zeros(8, 4).t())], "lie side by side"),
]


@pytest.mark.parametrize("entries,message", BAD, ids=[case[1][:20] for case in BAD])
def test_bad_entries(entries, message):
    with pytest.raises(ValueError, match=message) as caught:
        pack_plan(entries, DEVICE)
    assert str(caught.value).startswith("pack_plan: ") and "; got " in str(caught.value)


def test_bad_masters():
    plan = pack_plan([entry(offset=10)], DEVICE)
    for masters, message in (
        (randn(15), "reads masters up to number 16"),
        (randn(20).half(), "must be float32"),
        (randn(4, 5), "flat"),
        (torch.empty(20, device="meta"), "device"),
    ):
        with pytest.raises(ValueError, match=f"pack_adapters: .*{message}"):
            pack_adapters(masters, plan)
