"""Three questions about matrix products, which only a measurement answers (DESIGN §4).

How far is a Triton product from cuBLAS on the four shapes of an 8B layer, forward (x Wᵀ) and
backward (dY W)? Beyond 9 % it loses all that a low-rank epilogue wins. And what does the
K-augmented product [x | t] · [W | B]ᵀ cost over the plain one: its 64 more columns are 1.6 % of
the arithmetic at K = 4096, and is the pitch of K + 64 as fast as K?
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from fastsft_kernels.launch import interpreting
from fastsft_kernels.limits import Work
from torch import Tensor

from bench.kernels.case import Case

M, TAIL = 8192, 64
# (in, out) of the fused q k v, of o, of the fused gate and up, of down
SHAPES = ((4096, 6144), (4096, 4096), (4096, 28672), (14336, 4096))


def cases() -> list[Case]:
    return [make(k, n) for make in (_forward, _backward, _augmented) for k, n in SHAPES]


def _forward(k: int, n: int) -> Case:
    return Case(
        op="gemm",
        label=f"Triton x Wᵀ {M}x{k}->{n}",
        record=partial(_inputs, (M, k), (n, k)),
        small=partial(_inputs, (130, 104), (136, 104)),
        run=partial(_product, True),
        oracle=lambda x, weight: x @ weight.t(),
        work=lambda x, weight: _work(*x.shape, weight.shape[0], x.element_size()),
        peers={"cuBLAS": lambda x, weight: lambda: x @ weight.t()},
    )


def _backward(k: int, n: int) -> Case:
    return Case(
        op="gemm",
        label=f"Triton dY W {M}x{n}->{k}",
        record=partial(_inputs, (M, n), (n, k)),
        small=partial(_inputs, (130, 136), (136, 104)),
        run=partial(_product, False),
        oracle=lambda dy, weight: dy @ weight,
        work=lambda dy, weight: _work(*dy.shape, weight.shape[1], dy.element_size()),
        peers={"cuBLAS": lambda dy, weight: lambda: dy @ weight},
    )


def _augmented(k: int, n: int) -> Case:
    return Case(
        op="gemm",
        label=f"augmented by cuBLAS {M}x({k}+{TAIL})->{n}",
        record=partial(_inputs, (M, k + TAIL), (n, k + TAIL)),
        small=partial(_inputs, (130, 104), (136, 104)),
        run=lambda x, weight: x @ weight.t(),
        oracle=lambda x, weight: x @ weight.t(),
        work=lambda x, weight: _work(*x.shape, weight.shape[0], x.element_size()),
        peers={"cuBLAS, the plain product": _plain, "cuBLAS, plain at the pitch": _pitched},
    )


def _inputs(
    left: tuple[int, int], right: tuple[int, int], device: torch.device, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    x = torch.randn(*left, device=device, dtype=dtype)
    return x, torch.randn(*right, device=device, dtype=dtype) / left[1] ** 0.5


def _product(transposed: bool, left: Tensor, right: Tensor) -> Tensor:
    if left.device.type == "cpu" and not interpreting():
        return left @ (right.t() if transposed else right)
    from fastsft_kernels.triton_ops.lora_gemm import lora_gemm

    return lora_gemm(left, right, transposed=transposed)


def _plain(x: Tensor, weight: Tensor) -> Callable[[], Any]:
    x, weight = (t[:, :-TAIL].contiguous() for t in (x, weight))
    return lambda: x @ weight.t()


def _pitched(x: Tensor, weight: Tensor) -> Callable[[], Any]:
    x, weight = x[:, :-TAIL], weight[:, :-TAIL]
    return lambda: x @ weight.t()


def _work(m: int, k: int, n: int, itemsize: int) -> Work:
    return Work((m * k + k * n + m * n) * itemsize, 2 * m * n * k)
