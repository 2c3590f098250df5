"""Cases for the test of the benchmark itself: right, wrong in one configuration, unstable, in place."""

import torch
import triton
import triton.language as tl
from fastsft_kernels.launch import launch, pinned, variant
from fastsft_kernels.limits import Work

from bench.kernels.case import Case


@triton.jit
def _scale(x, out, factor, n, BN: tl.constexpr):
    i = tl.program_id(0) * BN + tl.arange(0, BN)
    tl.store(out + i, (tl.load(x + i, mask=i < n) * factor).to(out.dtype.element_ty), mask=i < n)


def _run(x, out, name, candidates, wrong=0):
    """Where `wrong` is a tile's width, that configuration leaves out the last tile."""
    config = pinned(name, candidates, x)
    tiles = x.numel() // config["BN"] + (config["BN"] != wrong)
    launch(_scale, (tiles,), x, out, 2.0, x.numel(), **config)
    return out


def right(x):
    if variant("toy_right_form", ["kernel", "torch"], x) == "torch":
        return 2 * x
    return _run(x, torch.empty_like(x), "toy_right", [{"BN": 64}, {"BN": 128}])


def wrong(x):
    return _run(x, torch.empty_like(x), "toy_wrong", [{"BN": 64}, {"BN": 128}], wrong=128)


def unstable(x):
    """One number is off by a last place, in every call another."""
    unstable.calls += 1
    out = _run(x, torch.empty_like(x), "toy_unstable", [{"BN": 64}])
    out[unstable.calls : unstable.calls + 1] *= 1 + 2 * torch.finfo(x.dtype).eps
    return out


unstable.calls = 0


def in_place(x):
    assert x.device.type == "meta" or x.abs().max() < 10, "timed on what an earlier call left"
    return _run(x, x, "toy_in_place", [{"BN": 64}])


def _inputs(device, dtype):
    x = torch.empty(1000, device=device, dtype=dtype)
    return (x if device.type == "meta" else x.uniform_(-1, 1),)


def _peer(x):
    return lambda: x + x


def _missing(x):
    raise ImportError("no module named peer")


def cases():
    peers = {"torch": _peer, "peer": _missing}
    return [
        Case(run.__name__, "1000", _inputs, _inputs, run, lambda x: 2 * x, _work, peers)
        for run in (right, wrong, unstable, in_place)
    ]


def _work(x):
    return Work(2 * x.nbytes)
