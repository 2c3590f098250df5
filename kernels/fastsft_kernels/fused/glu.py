"""The gated activation for the step: its forward, and its backward with the adapters around it.

The backward holds every tile of dh, gate and up once. Whatever else needs them is done there: the
down projection's adapter adds its part to dh, and the gradients of that adapter's A and of both B
behind it are summed up, which would otherwise read h, dgate and dup again, 235 MB each for
8192 x 14336 numbers of bf16.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fastsft_kernels.checks import (
    bad,
    check_device,
    check_float,
    check_like,
    check_shape,
    describe,
)
from fastsft_kernels.fused.strips import Adapters, check_adapters
from fastsft_kernels.launch import select

ACTIVATIONS = ("silu", "gelu_tanh", "gelu")
_WIDEST = 256


class GluGradients(NamedTuple):
    """What `glu_backward` gives: gradients of the activations, and float32 ones of the adapters."""

    dgate: Tensor
    dup: Tensor
    h: Tensor | None = None
    da_down: Tensor | None = None
    db_gate: Tensor | None = None
    db_up: Tensor | None = None


def glu_forward(
    gate: Tensor,
    up: Tensor,
    activation: str = "silu",
    *,
    out: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """gate, up [T, F] -> h = activation(gate) · up, written to `out` if given, at any row pitch.

    activation: "silu", "gelu_tanh" or "gelu". Computed in float32, rounded once. Raises ValueError
    for shapes or dtypes that do not fit and for another activation.
    """
    op = "glu_forward"
    run = select(op, backend, gate)
    _check_pair(op, gate, up, activation)
    if out is not None:
        _check_written(op, "out", out, gate)
    return run(gate, up, activation, out=out)


def glu_backward(
    dh: Tensor,
    gate: Tensor,
    up: Tensor,
    activation: str = "silu",
    *,
    adapters: Adapters | None = None,
    tails: tuple[Tensor | None, Tensor | None] | None = None,
    h_out: Tensor | None = None,
    out: tuple[Tensor, Tensor] | None = None,
    grads_out: tuple[Tensor | None, Tensor | None, Tensor | None] | None = None,
    backend: str | None = None,
) -> GluGradients:
    """dh, gate, up [T, F] -> GluGradients(dgate, dup, h, da_down, db_gate, db_up).

    adapters: the down projection's, one strip: d [T, R], a [R, F], R a multiple of 16 up to 256.
        dh grows by scaling · mask∘(d·a), and da_down [R, F] = scaling · dᵀ·(mask∘h).
    tails: (tail_gate, tail_up), each [T, R'] or None, R' likewise: db_gate [F, R'] = dgateᵀ·tail_gate,
        db_up [F, R'] = dupᵀ·tail_up.
    h_out [T, F]: where h = activation(gate) · up is written; without it h is None.
    out: (dgate, dup) to write to, such as the halves of one [T, 2F] buffer. They may be gate and up
        themselves.
    grads_out: (da_down, db_gate, db_up) float32, contiguous, that the gradients are ADDED to; None
        where there is no such gradient.
    The products multiply h, dgate and dup as rounded to gate's dtype and sum up in float32.
    Deterministic. Raises ValueError for shapes, dtypes and strides that do not fit.
    """
    op = "glu_backward"
    run = select(op, backend, gate)
    _check_pair(op, gate, up, activation)
    check_shape(op, "dh", dh, tuple(gate.shape), "of gate's shape")
    check_like(op, "dh", dh, "gate", gate)
    tail_gate, tail_up = tails or (None, None)
    if adapters is not None:
        _check_down(op, adapters, gate)
    for name, tail in (("tail_gate", tail_gate), ("tail_up", tail_up)):
        if tail is not None:
            _check_tail(op, name, tail, gate)
    if tail_gate is not None and tail_up is not None:
        check_shape(op, "tail_up", tail_up, tuple(tail_gate.shape), "of tail_gate's shape")
    for name, x in (("h_out", h_out), *zip(("out[0]", "out[1]"), out or (), strict=False)):
        if x is not None:
            _check_written(op, name, x, gate)
    features = gate.shape[1]
    shapes = [None if adapters is None else (adapters.a.shape[0], features)]
    shapes += [None if t is None else (features, t.shape[1]) for t in (tail_gate, tail_up)]
    _check_sums(op, grads_out, shapes, gate)
    return run(
        dh,
        gate,
        up,
        activation,
        adapters=adapters,
        tails=tails,
        h_out=h_out,
        out=out,
        grads_out=grads_out,
    )


def _check_pair(op: str, gate: Tensor, up: Tensor, activation: str) -> None:
    check_float(op, "gate", gate)
    if gate.dim() != 2:
        raise bad(op, "gate must be [T, F]", describe(gate), "Flatten the leading dimensions.")
    check_shape(op, "up", up, tuple(gate.shape), "of gate's shape")
    check_like(op, "up", up, "gate", gate)
    if activation not in ACTIVATIONS:
        raise bad(op, "unknown activation", repr(activation), f"Pass one of {ACTIVATIONS}.")


def _check_written(op: str, name: str, x: Tensor, gate: Tensor) -> None:
    check_shape(op, name, x, tuple(gate.shape), "of gate's shape")
    check_like(op, name, x, "gate", gate)
    if x.stride(1) != 1 and x.shape[1] > 1:
        raise bad(
            op, f"{name}'s rows must be contiguous", f"strides {x.stride()}", "Pass such a view."
        )


def _check_down(op: str, adapters: Adapters, gate: Tensor) -> None:
    check_adapters(op, adapters, *gate.shape)
    check_like(op, "adapters.d", adapters.d, "gate", gate)
    if adapters.dropout is not None and len(adapters.dropout.modules) != 1:
        raise bad(
            op,
            "adapters must be the down projection's alone, one strip",
            f"modules {adapters.dropout.modules}",
            "Pass the one module.",
        )
    _check_width(op, "adapters.d", adapters.d)


def _check_tail(op: str, name: str, tail: Tensor, gate: Tensor) -> None:
    check_like(op, name, tail, "gate", gate)
    if tail.dim() != 2 or tail.shape[0] != gate.shape[0]:
        raise bad(
            op, f"{name} must be [T, R], T = {gate.shape[0]}", describe(tail), "Pass its strip."
        )
    _check_width(op, name, tail)


def _check_width(op: str, name: str, x: Tensor) -> None:
    width = x.shape[1]
    if width % 16 or not 0 < width <= _WIDEST:
        raise bad(
            op,
            f"{name}'s strip must be a multiple of 16 wide, up to {_WIDEST}",
            width,
            "Fill the strip up with zeros.",
        )


def _check_sums(
    op: str,
    grads: Sequence[Tensor | None] | None,
    shapes: Sequence[tuple[int, int] | None],
    gate: Tensor,
) -> None:
    """Gradients to add to are there for just the gradients that are computed."""
    if grads is None:
        return
    names = ("da_down", "db_gate", "db_up")
    for name, x, shape in zip(names, grads, shapes, strict=True):
        if (x is None) != (shape is None):
            raise bad(
                op,
                f"grads_out's {name} must be given exactly if that gradient is computed",
                "none" if x is None else describe(x),
                "Pass None for gradients without an adapter or tail.",
            )
        if x is None or shape is None:
            continue
        check_shape(op, name, x, shape, "the gradient's shape")
        check_device(op, name, x, "gate", gate)
        if (x.dtype != torch.float32 and gate.dtype != torch.float64) or not x.is_contiguous():
            raise bad(
                op, f"{name} must be float32 and contiguous", describe(x), "Pass such a tensor."
            )
