"""lora_linear: the record shape with a bf16 and an NF4 base, forward alone and with backward.

Peers: PEFT's layer as its modules run it (base, A, B, scaling, addition, each an operation), and
the addmm form that Unsloth's and Axolotl's kernels use. Autograd makes the peers' backward, or a
Function that saves what theirs saves.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from fastsft_kernels import (
    DropoutKey,
    NF4Weight,
    limits,
    lora_dropout_mask,
    lora_linear,
    reference,
)
from fastsft_kernels.dropout import keep_scale
from fastsft_kernels.limits import Work
from fastsft_kernels.nf4_format import dynamic_code, nf4_code
from torch import Tensor

from bench.kernels.case import Case

M, K, N = 8192, 4096, 14336
SCALING = 2.0


def cases() -> list[Case]:
    return [
        _case(K, N, 16, nf4=False, backward=False),
        _case(K, N, 16, nf4=False, backward=True),
        _case(K, N, 16, nf4=True, backward=False),
        _case(K, N, 16, nf4=True, backward=True),
        _case(N, K, 16, nf4=False, backward=True),
        _case(K, K, 16, nf4=False, backward=True),
        _case(K, N, 128, nf4=False, backward=True),
        _case(K, N, 16, nf4=False, backward=True, p=0.1),
    ]


def _case(k: int, n: int, rank: int, *, nf4: bool, backward: bool, p: float = 0.0) -> Case:
    what = "forward + backward" if backward else "forward"
    extras = ["NF4"] * nf4 + [f"dropout {p}"] * (p > 0)
    both = {"PEFT": partial(_peft, backward, p), "addmm": partial(_addmm, backward)}
    peers: Mapping[str, Callable[..., Callable[[], Any]]] = (
        both if not p else {"PEFT": both["PEFT"]}
    )
    return Case(
        op="lora_linear",
        label=", ".join([f"{what} {M}x{k}->{n} R {rank}", *extras]),
        record=partial(_inputs, M, k, n, rank, nf4),
        small=partial(_inputs, 130, 160, 136, min(rank, 20), nf4),
        run=partial(_run, lora_linear, backward, p),
        oracle=partial(_run, _composed, backward, p),
        work=partial(_work, backward),
        peers=peers,
    )


def _inputs(
    m: int, k: int, n: int, rank: int, nf4: bool, device: torch.device, dtype: torch.dtype
) -> tuple[Any, ...]:
    """x, the base, A, B, dy, the row keys of the dropout, and the dtype of the layer."""
    base: Tensor | NF4Weight
    if nf4:
        base = nf4_weight(n, k, device)
    else:
        base = torch.randn(n, k, device=device, dtype=dtype) / k**0.5
    a = torch.randn(rank, k, device=device) / k**0.5
    b = torch.randn(n, rank, device=device) / rank**0.5
    x, dy = (torch.randn(m, c, device=device, dtype=dtype) for c in (k, n))
    return x, base, a, b, dy, torch.arange(m, device=device), dtype


def nf4_weight(rows: int, columns: int, device: torch.device) -> NF4Weight:
    """Random codes, and scales near 1 / sqrt(columns): quantising would not work on meta."""
    n = rows * columns
    blocks = -(-n // 64)
    packed = torch.randint(0, 256, (-(-n // 2),), dtype=torch.uint8, device=device)
    absmax = torch.randint(0, 256, (blocks,), dtype=torch.uint8, device=device)
    absmax2 = torch.rand(-(-blocks // 256), device=device) / columns**0.5
    offset = torch.full((), 2 / columns**0.5, device=device)
    codes = nf4_code().to(device), dynamic_code().to(device)
    return NF4Weight(packed, absmax, absmax2, offset, *codes, (rows, columns), torch.bfloat16)


def _run(
    op: Callable[..., Tensor],
    backward: bool,
    p: float,
    x: Tensor,
    base: Tensor | NF4Weight,
    a: Tensor,
    b: Tensor,
    dy: Tensor,
    keys: Tensor,
    dtype: torch.dtype,
) -> tuple[Tensor, ...]:
    """y, and with backward the gradients of x, A and B."""
    if op is _composed and isinstance(base, NF4Weight):
        base = reference.nf4_dequantize(base, dtype=dtype).to(x.dtype)
    leaves = [t.detach().requires_grad_(backward) for t in (x, a, b)]
    y = op(
        leaves[0],
        base,
        *leaves[1:],
        SCALING,
        dropout_p=p,
        dropout_key=DropoutKey(1, 2, 3, keys),
    )
    return (y, *torch.autograd.grad(y, leaves, dy)) if backward else (y,)


def _composed(
    x: Tensor,
    weight: Tensor,
    a: Tensor,
    b: Tensor,
    scaling: float,
    *,
    dropout_p: float,
    dropout_key: Any,
) -> Tensor:
    """The plain formula; the masters rounded to x's dtype, or in float64 to what that would be."""
    dropped = x
    if dropout_p:
        mask = lora_dropout_mask(dropout_key, x.shape[1], dropout_p)
        dropped = x * mask * keep_scale(dropout_p)
    low = F.linear(F.linear(dropped, a.to(x.dtype)), b.to(x.dtype))
    return F.linear(x, weight) + low * scaling


def _work(
    backward: bool,
    x: Tensor,
    base: Tensor | NF4Weight,
    a: Tensor,
    b: Tensor,
    dy: Tensor,
    keys: Tensor,
    dtype: torch.dtype,
) -> Work:
    sizes = (x.shape[0], x.shape[1], b.shape[0], a.shape[0], x.element_size())
    nf4 = isinstance(base, NF4Weight)
    parts = [limits.lora_linear_forward(*sizes, nf4=nf4)]
    if backward:
        parts.append(limits.lora_linear_backward(*sizes, nf4=nf4))
    return Work(*(sum(column) for column in zip(*parts, strict=True)))


def _leaves(backward: bool, *tensors: Tensor) -> list[Tensor]:
    return [t.detach().clone().requires_grad_(backward) for t in tensors]


def _decoder(base: Tensor | NF4Weight, dtype: torch.dtype) -> Callable[[], Tensor]:
    """The peers' base weight: with bitsandbytes' decode where it is NF4."""
    if isinstance(base, Tensor):
        return lambda: base
    from bitsandbytes.functional import QuantState, dequantize_4bit

    entries = base.state_dict("w")
    packed = entries.pop("w")
    state = QuantState.from_dict({k.removeprefix("w."): v for k, v in entries.items()}, base.device)
    state.dtype = dtype
    return lambda: dequantize_4bit(packed, state)


class _FrozenLinear(torch.autograd.Function):
    """A base layer that decodes its weight for each product, as bitsandbytes' Linear4bit does."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Callable[[], Tensor]) -> Tensor:
        ctx.weight = weight
        return F.linear(x, weight())

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
        return dy @ ctx.weight(), None


def _peft(
    backward: bool,
    p: float,
    x: Tensor,
    base: Tensor | NF4Weight,
    a: Tensor,
    b: Tensor,
    dy: Tensor,
    keys: Tensor,
    dtype: torch.dtype,
) -> Callable[[], Any]:
    """peft.tuners.lora.Linear.forward under autocast, as its trainers run it: float32 masters."""
    leaves = _leaves(backward, x, a, b)
    weight = _decoder(base, dtype)

    def run() -> Any:
        x, a, b = leaves
        result = _FrozenLinear.apply(x, weight)
        if not isinstance(base, Tensor):
            result = result.clone()  # peft/tuners/lora/bnb.py, for inference in 4 bits
        dropped = F.dropout(x, p) if p else x
        low = F.linear(F.linear(dropped, a.to(dtype)), b.to(dtype))
        y = result + low * SCALING
        return torch.autograd.grad(y, leaves, dy) if backward else y

    return run


class _AddmmLinear(torch.autograd.Function):
    """The products in the order of unsloth/kernels/fast_lora.py: low-rank parts by addmm_."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, a: Tensor, b: Tensor, weight: Any) -> Tensor:
        ctx.save_for_backward(x, a, b)
        ctx.weight = weight
        y = F.linear(x, weight())
        return y.addmm_(x @ a.t().to(x.dtype), b.t().to(x.dtype), alpha=SCALING)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, a, b = ctx.saved_tensors
        low_a, low_b = a.to(dy.dtype), b.to(dy.dtype)
        d = dy @ low_b
        da = (d.t() @ x).mul_(SCALING)
        db = (dy.t() @ (x @ low_a.t())).mul_(SCALING)
        dx = (dy @ ctx.weight()).addmm_(d, low_a, alpha=SCALING)
        return dx, da.to(a.dtype), db.to(b.dtype), None


def _addmm(
    backward: bool,
    x: Tensor,
    base: Tensor | NF4Weight,
    a: Tensor,
    b: Tensor,
    dy: Tensor,
    keys: Tensor,
    dtype: torch.dtype,
) -> Callable[[], Any]:
    leaves = _leaves(backward, x, a, b)
    weight = _decoder(base, dtype)

    def run() -> Any:
        y = _AddmmLinear.apply(*leaves, weight)
        return torch.autograd.grad(y, leaves, dy) if backward else y

    return run
