"""The gate of every launch: who runs what, what a recording notes, and the shared device functions."""

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
