"""The gate of every launch: who runs what, what a recording notes, and the shared device functions."""

import inspect

import pytest
import torch
import triton
import triton.language as tl
from fastsft_kernels import DropoutKey, lora_dropout_mask
from fastsft_kernels import launch as gate
from fastsft_kernels.dropout import threshold
from fastsft_kernels.triton_ops.philox import keep_mask
from fastsft_kernels.triton_ops.reduce import reduce_partials
from kernel_checks import DEVICE, poisoned_memory, randn  # noqa: F401


@triton.jit(do_not_specialize=["seed", "step", "module"])
def _write_mask(out, rows, T, K, seed, step, module, threshold, BM: tl.constexpr, BN: tl.constexpr):
    row = tl.program_id(0) * BM + tl.arange(0, BM)
    first = tl.program_id(1) * BN
    column = first + tl.arange(0, BN)
    keys = tl.load(rows + row, mask=row < T, other=0)
    mask = keep_mask(keys, first, seed, step, module, threshold, BN)
    inside = (row[:, None] < T) & (column[None, :] < K)
    tl.store(out + row[:, None] * K + column[None, :], mask.to(tl.int8), mask=inside)


@pytest.mark.parametrize("p", [0.05, 0.3, 0.9])
@pytest.mark.parametrize("seed,step,module", [(0, 0, 0), (1, 1, 1), (2**32 - 1, 2**31, 7)])
def test_masks_are_those_of_the_reference(p, seed, step, module):
    rows = torch.tensor([0, 1, 2**24 + 3, 2**33 + 7, 2**62 + 2**31], device=DEVICE)
    out = torch.full((5, 44), 9, dtype=torch.int8, device=DEVICE)
    gate.launch(
        _write_mask,
        (1, 2),
        out,
        rows,
        5,
        44,
        seed,
        step,
        4 * module + 2,
        threshold(p),
        BM=16,
        BN=32,
    )
    assert torch.equal(out.bool(), lora_dropout_mask(DropoutKey(seed, step, module, rows), 44, p))


@pytest.mark.parametrize("accumulate", [False, True])
def test_partial_sums(accumulate):
    partials, out = randn(7, 3, 400), randn(3, 400, seed=1)
    want = partials.double().sum(0) + (out.double() if accumulate else 0)
    reduce_partials(partials, out, accumulate=accumulate)
    torch.testing.assert_close(out.double(), want, rtol=0, atol=2e-6)


def test_an_empty_grid_launches_nothing():
    gate.launch(_write_mask, (0, 2), *[None] * 8, BM=16, BN=32)


def test_a_recording_notes_launches_and_runs_nothing():
    partials, out = torch.empty(4, 640, device="meta"), torch.empty(640, device="meta")
    with gate.record_launches(80, 108) as recording:
        reduce_partials(partials, out)
        assert (gate.capability(out), gate.multiprocessors(out)) == (80, 108)
    (only,) = recording.launches
    assert only.grid == (2,) and only.args[0] is partials and only.options["BN"] == 512
    assert recording.candidates == {"reduce_partials": 1}
    with pytest.raises(AssertionError, match="outside a recording"):
        reduce_partials(partials, out)


def test_candidates_and_variants():
    x, candidates = torch.empty(0), [{"BN": 1}, {"BN": 2}]
    assert gate.pinned("some", candidates, x) == {"BN": 1}
    assert gate.variant("other", ["a", "b"], x) == "a"
    with gate.forced(some=1, other="b"):
        assert gate.pinned("some", candidates, x) == {"BN": 2}
        assert gate.variant("other", ["a", "b"], x) == "b"
        assert gate.variant("other", ["a", "c"], x) == "a"
    assert gate.pinned("some", candidates, x) == {"BN": 1}


class Kernel:
    """Stands in for Triton's: compiles for each set of kinds, and says what ran with which arguments."""

    def __init__(self):
        self.compiled, self.ran = 0, []

        def arguments(x, y, n, factor, pair, BM, BN): ...

        self.signature = inspect.signature(arguments)

    def __getitem__(self, grid):
        def run(*args, BM, BN, num_warps):
            self.compiled += 1
            self.ran.append((self.compiled, (*grid, 1, 1)[:3], (*args, BM, BN)))
            return Compiled(self, self.compiled)

        return run


class Compiled:
    def __init__(self, kernel, number):
        self.kernel, self.number = kernel, number

    def __getitem__(self, grid):
        return lambda *args: self.kernel.ran.append((self.number, grid, args))


def kernels_of(*calls, **options):
    """The numbers of the compiled kernels that calls with these arguments use."""
    kernel = Kernel()
    for args in calls:
        gate.launch(kernel, (5, 2), *args, **({"BN": 64, "BM": 32, "num_warps": 4} | options))
        assert kernel.ran[-1][1:] == ((5, 2, 1), (*args, options.get("BM", 32), 64))
    return [number for number, *_ in kernel.ran]


X = torch.zeros(64)
LIKE = (X, None, 48, 0.5, (X, 7))


def but(**changes):
    return tuple(changes.get(name, a) for name, a in zip("xynfp", LIKE, strict=True))


@pytest.mark.parametrize(
    "same",
    [but(x=X[4:]), but(n=1024), but(n=-32), but(f=1.0), but(p=(X[8:], 9)), but(x=X.view(8, 8))],
)
def test_a_launch_like_an_earlier_one_is_ready(same):
    assert kernels_of(LIKE, same, LIKE) == [1, 1, 1]


@pytest.mark.parametrize(
    "other",
    [
        but(x=X[1:]), but(x=X.half()), but(y=X), but(n=49), but(n=1), but(n=2**31), but(n=None),
        but(n=2**63), but(p=(X[1:], 7)), but(p=(X, 16)), but(p=(X, 1)), but(p=(X,)), but(f=3),
    ],
)  # fmt: skip
def test_what_triton_compiles_anew_is_not_taken_for_the_same(other):
    assert kernels_of(LIKE, other, LIKE, other) == [1, 2, 1, 2]
    wide = [but(n=n) for n in (2**31, 2**63, 2**31 + 1, -(2**31) - 16)]
    assert kernels_of(*wide) == [1, 2, 3, 1]


def test_options_are_part_of_what_is_ready():
    kernel = Kernel()
    for options in ({"BM": 32}, {"BM": 64}, {"BM": 32, "num_warps": 8}, {"BM": 32}):
        gate.launch(kernel, (1,), *LIKE, **({"BN": 64, "num_warps": 4} | options))
    assert [number for number, *_ in kernel.ran] == [1, 2, 3, 1]


def test_arguments_of_unknown_kinds_go_to_triton_each_time():
    assert kernels_of(but(y="?"), but(y="?")) == [1, 2]
