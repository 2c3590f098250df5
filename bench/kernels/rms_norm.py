"""RMS norm: forward, with the residual, heads of q, backward, and the backward that adds adapters.

The backward is timed as the step calls it, with rstd given. Peers' backwards are autograd's, of a
graph that is kept; Liger's has the weight's gradient in all of them.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from fastsft_kernels import limits, reference, rms_norm
from fastsft_kernels.fused import Adapters, StripDropout, rms_norm_backward
from torch import Tensor

from bench.kernels.case import Case

T, H = 8192, 4096
HEADS, KV, D = 32, 8, 128
EPS, SCALING, P = 1e-5, 2.0, 0.1
Thunk = Callable[[], Any]


def cases() -> list[Case]:
    return [
        _forward(f"forward {T}x{H}", (T, H), (37, 576)),
        _forward(f"forward {T}x576", (T, 576), (70, 96)),
        _forward(f"add and norm {T}x{H}", (T, H), (37, 576), residual=True),
        Case(
            op="rms_norm",
            label=f"heads of q {T}x{HEADS}x{D}",
            record=partial(_heads_inputs, T, HEADS, KV, D),
            small=partial(_heads_inputs, 19, 3, 1, 72),
            run=lambda x, weight: rms_norm(x, weight, EPS),
            oracle=lambda x, weight: reference.rms_norm(x, weight, EPS),
            work=_forward_work,
            peers={"torch": _torch_forward, "torch.compile": _compiled_forward},
        ),
        _backward(f"backward {T}x{H}", {}),
        _backward(f"backward of add and norm {T}x{H}", {"residual": True}),
        _backward(f"backward and weight gradient {T}x{H}", {"weight_grad": True}),
        _adapters(3, 16, False),
        _adapters(3, 32, False),
        _adapters(3, 128, False),
        _adapters(3, 16, True),
    ]


def _forward(
    label: str, record: tuple[int, int], small: tuple[int, int], residual: bool = False
) -> Case:
    peers = {"torch": _torch_forward, "torch.compile": _compiled_forward, "Liger": _liger_forward}
    return Case(
        op="rms_norm",
        label=label,
        record=partial(_forward_inputs, *record, residual),
        small=partial(_forward_inputs, *small, residual),
        run=lambda x, weight, *more: rms_norm(x, weight, EPS, residual=_first(more)),
        oracle=lambda x, weight, *more: reference.rms_norm(x, weight, EPS, residual=_first(more)),
        work=_forward_work,
        peers=peers,
    )


def _backward(label: str, how: dict[str, bool]) -> Case:
    weight_grad = how.get("weight_grad", False)
    return Case(
        op="rms_norm",
        label=label,
        record=partial(_backward_inputs, T, H, how.get("residual", False), None),
        small=partial(_backward_inputs, 37, 576, how.get("residual", False), None),
        run=partial(_run_backward, rms_norm_backward, weight_grad),
        oracle=partial(_run_backward, reference.rms_norm_backward, weight_grad),
        work=_backward_work,
        peers={
            "torch": partial(_torch_backward, weight_grad),
            "torch.compile": partial(_compiled_backward, weight_grad),
            "Liger": _liger_backward,
        },
    )


def _adapters(strips: int, width: int, masked: bool) -> Case:
    masks = f", {strips} masks" if masked else ""
    return Case(
        op="rms_norm_backward",
        label=f"{T}x{H}, adapters of R {width} on q, k, v{masks}",
        record=partial(_backward_inputs, T, H, True, (strips, width, masked)),
        small=partial(_backward_inputs, 70, 200, True, (strips, width, masked)),
        run=partial(_run_backward, rms_norm_backward, False),
        oracle=partial(_run_backward, reference.rms_norm_backward, False),
        work=_backward_work,
        peers={} if masked else {"addmm, then our backward": _addmm_backward},
    )


def _first(more: tuple[Tensor, ...]) -> Tensor | None:
    return more[0] if more else None


def _forward_inputs(
    rows: int, columns: int, residual: bool, device: torch.device, dtype: torch.dtype
) -> tuple[Tensor, ...]:
    x = torch.randn(rows, columns, device=device, dtype=dtype)
    weight = torch.randn(columns, device=device, dtype=dtype)
    return (x, weight, torch.randn_like(x)) if residual else (x, weight)


def _heads_inputs(
    rows: int, heads: int, kv: int, size: int, device: torch.device, dtype: torch.dtype
) -> tuple[Tensor, ...]:
    """The heads of q in a buffer that holds q, k and v."""
    qkv = torch.randn(rows, heads + 2 * kv, size, device=device, dtype=dtype)
    return qkv[:, :heads], torch.randn(size, device=device, dtype=dtype)


def _backward_inputs(
    rows: int,
    columns: int,
    residual: bool,
    strips: tuple[int, int, bool] | None,
    device: torch.device,
    dtype: torch.dtype,
) -> tuple[Any, ...]:
    """dy, x, weight, rstd, residual_grad or None, adapters or None."""
    x, weight, dy = _forward_inputs(rows, columns, True, device, dtype)
    rstd = torch.rsqrt(x.float().square().mean(-1) + EPS)
    more = torch.randn_like(x) if residual else None
    if strips is None:
        return dy, x, weight, rstd, more, None
    count, width, masked = strips
    d = torch.randn(rows, count * width, device=device, dtype=dtype)
    a = torch.randn(count * width, columns, device=device, dtype=dtype) / (count * width) ** 0.5
    keys = torch.arange(rows, device=device)
    dropout = StripDropout(P, 1, 2, tuple(range(1, count + 1)), keys) if masked else None
    return dy, x, weight, rstd, more, Adapters(d, a, dropout, SCALING)


def _run_backward(
    function: Callable[..., tuple[Tensor, Tensor | None]],
    weight_grad: bool,
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    rstd: Tensor,
    more: Tensor | None,
    adapters: Adapters | None,
) -> tuple[Tensor, ...]:
    dx, dweight = function(
        *(dy, x, weight, rstd), residual_grad=more, adapters=adapters, weight_grad=weight_grad
    )
    return (dx,) if dweight is None else (dx, dweight)


def _forward_work(x: Tensor, weight: Tensor, *more: Tensor) -> limits.Work:
    rows = x.numel() // x.shape[-1]
    return limits.rms_norm_forward(rows, x.shape[-1], x.element_size(), residual=bool(more))


def _backward_work(
    dy: Tensor, x: Tensor, weight: Tensor, rstd: Tensor, more: Any, adapters: Any
) -> limits.Work:
    rank = 0 if adapters is None else adapters.d.shape[1]
    return limits.rms_norm_backward(*x.shape, x.element_size(), more is not None, rank)


def _torch_norm(x: Tensor, weight: Tensor, *more: Tensor) -> tuple[Tensor, Tensor]:
    total = x + more[0] if more else x
    return F.rms_norm(total, weight.shape, weight, EPS), total


def _torch_forward(*inputs: Tensor) -> Thunk:
    return partial(_torch_norm, *inputs)


def _compiled_forward(*inputs: Tensor) -> Thunk:
    return partial(torch.compile(_torch_norm, dynamic=False), *inputs)


def _liger_norm(x: Tensor, weight: Tensor, *more: Tensor) -> tuple[Tensor, ...]:
    if more:
        from liger_kernel.ops.fused_add_rms_norm import LigerFusedAddRMSNormFunction

        return LigerFusedAddRMSNormFunction.apply(x, *more, weight, EPS, 0.0, "llama", False)
    from liger_kernel.ops.rms_norm import LigerRMSNormFunction

    return (LigerRMSNormFunction.apply(x, weight, EPS, 0.0, "llama", False),)


def _liger_forward(*inputs: Tensor) -> Thunk:
    import liger_kernel.ops.rms_norm  # noqa: F401

    return partial(_liger_norm, *inputs)


def _torch_backward(weight_grad: bool, *inputs: Any) -> Thunk:
    dy, x, weight, _, more, _ = inputs
    x, weight = x.detach().requires_grad_(), weight.detach().requires_grad_(weight_grad)
    if more is None:
        outputs, given = _torch_norm(x, weight)[:1], [dy]
    else:
        outputs, given = _torch_norm(x, weight, torch.zeros_like(x)), [dy, more]
    wanted = [x, weight] if weight_grad else [x]
    return partial(torch.autograd.grad, outputs, wanted, given, retain_graph=True)


def _compiled_backward(weight_grad: bool, *inputs: Any) -> Thunk:
    return partial(torch.compile(_run_backward), reference.rms_norm_backward, weight_grad, *inputs)


def _liger_backward(*inputs: Any) -> Thunk:
    dy, x, weight, _, more, _ = inputs
    x, weight = x.detach().requires_grad_(), weight.detach().requires_grad_()
    if more is None:
        outputs, given = _liger_norm(x, weight), [dy]
    else:
        outputs, given = _liger_norm(x, weight, torch.zeros_like(x)), [dy, more]
    return partial(torch.autograd.grad, outputs, [x, weight], given, retain_graph=True)


def _addmm_backward(
    dy: Tensor, x: Tensor, weight: Tensor, rstd: Tensor, more: Tensor, adapters: Adapters
) -> Thunk:
    """The term added by the product that makes it, in place: dy is read and written once more."""

    def run() -> Tensor:
        dy.addmm_(adapters.d, adapters.a, alpha=adapters.scaling)
        return rms_norm_backward(dy, x, weight, rstd, residual_grad=more)[0]

    return run
