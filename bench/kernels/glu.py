"""The gated activations: forward, backward, and the backward with the adapters around it.

Peers' backwards are autograd's, of a graph that is kept; Liger's writes them over gate and up, so
its later calls compute on other numbers in the same time. The peer of the backward with adapters
is what one does without it: our elementwise backward and a product for each of its four terms.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from fastsft_kernels import geglu, limits, reference, swiglu
from fastsft_kernels.fused import Adapters, StripDropout, glu_backward
from torch import Tensor

from bench.kernels.case import Case

T, FEATURES = 8192, 14336
SCALING, P = 2.0, 0.1
TORCH = {
    "silu": F.silu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "gelu": F.gelu,
}
OURS: dict[str, tuple[str, Callable[..., Tensor], Callable[..., Tensor]]] = {
    "silu": ("swiglu", swiglu, reference.swiglu),
    "gelu_tanh": ("geglu", geglu, reference.geglu),
    "gelu": (
        "geglu",
        partial(geglu, approximate="none"),
        partial(reference.geglu, approximate="none"),
    ),
}
Thunk = Callable[[], Any]


def cases() -> list[Case]:
    return [
        *(_forward(activation) for activation in OURS),
        *(_backward(activation, False) for activation in OURS),
        _backward("silu", True),
        *(_adapters(rank, False) for rank in (16, 32, 64, 128)),
        _adapters(16, True),
    ]


def _forward(activation: str) -> Case:
    op, run, oracle = OURS[activation]
    return Case(
        op=op,
        label=_label(activation, "forward"),
        record=partial(_inputs, 2, T, FEATURES),
        small=partial(_inputs, 2, 37, 1100),
        run=run,
        oracle=oracle,
        work=lambda gate, up: limits.glu_forward(*gate.shape, gate.element_size()),
        peers={
            "torch": lambda *inputs: partial(_torch_glu, activation, *inputs),
            "torch.compile": lambda *inputs: partial(
                torch.compile(_torch_glu), activation, *inputs
            ),
            **({"Liger": partial(_liger_forward, activation)} if activation != "gelu" else {}),
        },
    )


def _backward(activation: str, with_h: bool) -> Case:
    return Case(
        op=OURS[activation][0],
        label=_label(activation, "backward", ", h written" if with_h else ""),
        record=partial(_inputs, 3, T, FEATURES),
        small=partial(_inputs, 3, 37, 1100),
        run=partial(_run_backward, glu_backward, activation, with_h),
        oracle=partial(_run_backward, reference.glu_backward, activation, with_h),
        work=lambda dh, gate, up: limits.glu_backward(*gate.shape, gate.element_size(), with_h),
        peers={
            "torch": partial(_autograd, partial(_torch_glu, activation)),
            "torch.compile": partial(_autograd, torch.compile(partial(_torch_glu, activation))),
            **({"Liger": partial(_liger_backward, activation)} if activation != "gelu" else {}),
        }
        if not with_h
        else {},
    )


def _adapters(rank: int, masked: bool) -> Case:
    return Case(
        op="glu_backward",
        label=f"{T}x{FEATURES}, adapters of R {rank}{', masked' if masked else ''}",
        record=partial(_adapter_inputs, T, FEATURES, rank, masked),
        small=partial(_adapter_inputs, 70, 200, rank, masked),
        run=partial(_run_adapters, glu_backward),
        oracle=partial(_run_adapters, reference.glu_backward),
        work=lambda dh, gate, up, adapters, *_: limits.glu_backward(
            *gate.shape, gate.element_size(), rank=adapters.a.shape[0]
        ),
        peers={} if masked else {"separate passes": _separate_passes},
    )


def _label(activation: str, call: str, more: str = "") -> str:
    exact = " exact" if activation == "gelu" else ""
    return f"{call}{exact} {T}x{FEATURES}{more}"


def _inputs(
    count: int, rows: int, columns: int, device: torch.device, dtype: torch.dtype
) -> tuple[Tensor, ...]:
    """(dh,) gate, up: the last two are the halves of one buffer."""
    both = torch.randn(rows, 2 * columns, device=device, dtype=dtype)
    dh = torch.randn(rows, columns, device=device, dtype=dtype)
    halves = both[:, :columns], both[:, columns:]
    return halves if count == 2 else (dh, *halves)


def _adapter_inputs(
    rows: int, columns: int, rank: int, masked: bool, device: torch.device, dtype: torch.dtype
) -> tuple[Any, ...]:
    """dh, gate, up, the down projection's adapter, the tails of gate and up."""
    dh, gate, up = _inputs(3, rows, columns, device, dtype)
    d, *strips = torch.randn(rows, 3 * rank, device=device, dtype=dtype).split(rank, 1)
    a = torch.randn(rank, columns, device=device, dtype=dtype) / rank**0.5
    keys = torch.arange(rows, device=device)
    dropout = StripDropout(P, 1, 2, (3,), keys) if masked else None
    return dh, gate, up, Adapters(d, a, dropout, SCALING), *strips


def _run_backward(
    function: Callable[..., Any],
    activation: str,
    with_h: bool,
    dh: Tensor,
    gate: Tensor,
    up: Tensor,
) -> tuple[Tensor, ...]:
    h = torch.empty_like(dh) if with_h else None
    got = function(dh, gate, up, activation, h_out=h)
    return tuple(x for x in got if x is not None)


def _run_adapters(
    function: Callable[..., Any],
    dh: Tensor,
    gate: Tensor,
    up: Tensor,
    adapters: Adapters,
    tail_gate: Tensor,
    tail_up: Tensor,
) -> tuple[Tensor, ...]:
    got = function(dh, gate, up, adapters=adapters, tails=(tail_gate, tail_up))
    return tuple(x for x in got if x is not None)


def _torch_glu(activation: str, gate: Tensor, up: Tensor) -> Tensor:
    return TORCH[activation](gate) * up


def _autograd(function: Callable[..., Tensor], dh: Tensor, *inputs: Tensor) -> Thunk:
    leaves = [x.detach().requires_grad_() for x in inputs]
    return partial(torch.autograd.grad, function(*leaves), leaves, dh, retain_graph=True)


def _liger(activation: str) -> Callable[..., Tensor]:
    if activation == "silu":
        from liger_kernel.ops.swiglu import LigerSiLUMulFunction

        return LigerSiLUMulFunction.apply
    from liger_kernel.ops.geglu import LigerGELUMulFunction

    return LigerGELUMulFunction.apply


def _liger_forward(activation: str, gate: Tensor, up: Tensor) -> Thunk:
    return partial(_liger(activation), gate.contiguous(), up.contiguous())


def _liger_backward(activation: str, dh: Tensor, gate: Tensor, up: Tensor) -> Thunk:
    return _autograd(_liger(activation), dh, gate.contiguous(), up.contiguous())


def _separate_passes(
    dh: Tensor, gate: Tensor, up: Tensor, adapters: Adapters, tail_gate: Tensor, tail_up: Tensor
) -> Thunk:
    d, a, _, scaling = adapters
    h = torch.empty_like(dh)

    def run() -> tuple[Tensor, ...]:
        dh.addmm_(d, a, alpha=scaling)
        dgate, dup, *_ = glu_backward(dh, gate, up, h_out=h)
        return dgate, dup, d.t() @ h, dgate.t() @ tail_gate, dup.t() @ tail_up

    return run
