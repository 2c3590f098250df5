"""Kernels that are each wrong in one way, for the test that the static report says so."""

import os

import torch
import triton
import triton.language as tl
from fastsft_kernels.launch import launch, pinned
from fastsft_kernels.limits import Work

from bench.kernels.case import Case


@triton.jit
def _sum_of_outer(x, out, N: tl.constexpr):
    """N² numbers alive at once."""
    i = tl.arange(0, N)
    a = tl.load(x + i[:, None] * N + i[None, :])
    rows = tl.sum(a, 1)
    tl.store(out + i[:, None] * N + i[None, :], a / rows[:, None] - tl.max(a, 0)[None, :])


@triton.jit
def _product(a, b, out, K, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):
    m, n, k = tl.arange(0, BM), tl.arange(0, BN), tl.arange(0, BK)
    total = tl.zeros([BM, BN], tl.float32)
    for at in range(0, K, BK):
        left = tl.load(a + m[:, None] * K + (at + k)[None, :])
        right = tl.load(b + n[None, :] * K + (at + k)[:, None])
        total = tl.dot(left, right, total, input_precision="ieee")
    tl.store(out + m[:, None] * BN + n[None, :], total.to(out.dtype.element_ty))


@triton.jit
def _nf4_fused(x, scale, offset, out, BN: tl.constexpr):
    i = tl.arange(0, BN)
    tl.store(out + i, tl.load(x + i) * tl.load(scale) + tl.load(offset))


@triton.jit
def _misspelt(out):
    tl.store(out, tl.nothing_of_this_name(out))


class Killer:
    """Stands for a kernel on which the compiler ends its process."""

    params = ()
    cache_key = "of no source"

    def fn(self):
        pass

    def warmup(self, *args, **options):
        os._exit(3)


def sound(a, out):
    config = pinned("toy_product", [{"BK": 32}, {"BK": 64}], a)
    launch(_product, (1,), a, a, out, 512, BM=64, BN=64, num_warps=4, **config)


def shared(a, out):
    launch(_product, (1,), a, a, out, 512, BM=128, BN=128, BK=128, num_warps=8, num_stages=5)


def without_wgmma(a, out):
    launch(_product, (1,), a, a, out, 512, BM=64, BN=64, BK=32, num_warps=2)


def spill(a, out):
    launch(_sum_of_outer, (1,), a.float(), out.float(), N=64, num_warps=4, maxnreg=24)


def fused(a, out):
    f = out.float()
    launch(_nf4_fused, (1,), f, f, f, f, BN=128, num_warps=1)


def unfused(a, out):
    f = out.float()
    launch(_nf4_fused, (1,), f, f, f, f, BN=128, num_warps=1, enable_fp_fusion=False)


def misspelt(a, out):
    launch(_misspelt, (1,), out)


def killer(a, out):
    launch(Killer(), (1,), a)


def unrecorded(a, out):
    raise RuntimeError("reads a value")


def _inputs(device, dtype):
    return torch.empty(512, 512, device=device, dtype=dtype), torch.empty(512, 512, device=device)


def cases():
    runs = (sound, shared, without_wgmma, spill, fused, unfused, misspelt, killer, unrecorded)
    return [
        Case(
            "toy", r.__name__, _inputs, _inputs, r, r, lambda *_: Work(1), dtypes=(torch.bfloat16,)
        )
        for r in runs
    ]
