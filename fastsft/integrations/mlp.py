"""Gated feed-forward blocks: down(act(gate(x)) · up(x)), with gate and up apart or in one linear layer.

Recognised by the names of the inner layers, which Llama's and its many descendants share, and by Phi-3's
fused gate_up_proj. The activation is tried on numbers (gelu and its tanh form differ by 5e-4), and the
whole block is run before and after. The inner layers are called as modules, so adapters on them, 4-bit
weights and hooks work as before; what is saved is the activation's separate passes over [T, F].
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from fastsft_kernels import geglu, swiglu
from torch import Tensor, nn

from fastsft.integrations.changes import (
    Changes,
    Forward,
    Plan,
    probe_input,
    with_gradients,
)
from fastsft.integrations.linear import input_dtype, input_features, lowest_dtype, weight_of

Gated = Callable[[Tensor, Tensor], Tensor]

_ACTIVATIONS: tuple[tuple[str, Callable[[Tensor], Tensor], Gated], ...] = (
    ("swiglu", F.silu, swiglu),
    ("geglu, tanh", partial(F.gelu, approximate="tanh"), geglu),
    ("geglu", F.gelu, partial(geglu, approximate="none")),
)


def rebind_mlps(model: nn.Module, changes: Changes) -> None:
    """Rebind every gated block of `model` to `swiglu` or `geglu`."""
    for name, module in model.named_modules():
        inner = dict(module.named_children())
        if "down_proj" in inner and (
            {"gate_proj", "up_proj"} <= inner.keys() or "gate_up_proj" in inner
        ):
            changes.rebind("mlp", name, module, _plan)


def _plan(module: Any) -> Plan:
    if len(inspect.signature(module.forward).parameters) != 1:
        return Plan(why="it takes more than the hidden states")
    fused = hasattr(module, "gate_up_proj")
    first: Any = module.gate_up_proj if fused else module.gate_proj
    features = input_features(first)
    if features is None:
        return Plan(why=f"its first layer is a {type(first).__name__}")
    known = _known(getattr(module, "activation_fn", getattr(module, "act_fn", None)))
    if known is None:
        return Plan(why="its activation is neither silu nor gelu")
    now, gated = known

    def make(original: Forward) -> Forward:
        def forward(self: Any, x: Tensor) -> Tensor:
            if fused:
                gate, up = self.gate_up_proj(x).chunk(2, dim=-1)
            else:
                gate, up = self.gate_proj(x), self.up_proj(x)
            out: Tensor = self.down_proj(gated(gate, up))
            return out

        return forward

    def probe(module: nn.Module) -> list[Tensor]:
        x = probe_input(3, features, weight_of(first), input_dtype(first))
        return with_gradients(module(x[None])[0], [x])

    return Plan(now, make, probe, lowest_dtype(module))


def _known(act: Any) -> tuple[str, Gated] | None:
    """Our gated product for an activation, found by trying it on numbers."""
    if not callable(act):
        return None
    x = torch.linspace(-6, 6, 257)
    expected = act(x)
    for now, torchs, ours in _ACTIVATIONS:
        if isinstance(expected, Tensor) and torch.allclose(torchs(x), expected, rtol=0, atol=1e-6):
            return now, ours
    return None
