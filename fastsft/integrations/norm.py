"""RMSNorm modules, recognised by structure: one weight of one dimension, an epsilon, one argument.

Llama's norm multiplies by the weight, Gemma's by 1 + weight: what the module does on a small input says
which. Where weight and input have different dtypes (PEFT keeps norms of a 4-bit model in float32), some
return the input's dtype and some the promoted one; that is seen in the same way, and kept.
"""

from __future__ import annotations

import inspect
from typing import cast

import torch
from fastsft_kernels import rms_norm
from torch import Tensor, nn

from fastsft.integrations.changes import (
    Changes,
    Forward,
    Plan,
    probe_input,
    with_gradients,
)

_EPSILONS = ("variance_epsilon", "eps", "epsilon")


def rebind_norms(model: nn.Module, changes: Changes) -> None:
    """Rebind every RMSNorm of `model` to `rms_norm`."""
    for name, module in model.named_modules():
        if _looks_like_norm(module):
            changes.rebind("norm", name, module, _plan)


def _looks_like_norm(module: nn.Module) -> bool:
    parameters = dict(module.named_parameters())
    return (
        list(parameters) == ["weight"]
        and parameters["weight"].dim() == 1
        and not any(module.children())
        and _epsilon(module) is not None
    )


def _epsilon(module: nn.Module) -> float | None:
    found = (getattr(module, name, None) for name in _EPSILONS)
    return next((value for value in found if isinstance(value, float)), None)


def _weight(module: nn.Module) -> Tensor:
    return cast(Tensor, module.weight)


def _plan(module: nn.Module) -> Plan:
    if len(inspect.signature(module.forward).parameters) != 1:
        return Plan(why="it takes more than the hidden states")
    weight, eps = _weight(module).detach(), cast(float, _epsilon(module))
    with torch.no_grad():
        x = probe_input(3, weight.numel(), weight, weight.dtype)
        expected = module(x)
        apart = [float((_norm(x, weight, eps, offset) - expected).norm()) for offset in (0.0, 1.0)]
        offset = float(apart[1] < apart[0])
        other = torch.bfloat16 if weight.dtype == torch.float32 else torch.float32
        promotes = module(x.to(other)).dtype != other

    def make(original: Forward) -> Forward:
        def forward(self: nn.Module, x: Tensor) -> Tensor:
            weight = _weight(self)
            if promotes and x.dtype != weight.dtype:
                x = x.to(torch.promote_types(x.dtype, weight.dtype))
            return _norm(x, weight, eps, offset)

        return forward

    return Plan(f"rms_norm{' with 1 + weight' if offset else ''}", make, _probe)


def _norm(x: Tensor, weight: Tensor, eps: float, offset: float) -> Tensor:
    return cast(Tensor, rms_norm(x, weight, eps, offset=offset))


def _probe(module: nn.Module) -> list[Tensor]:
    weight = _weight(module)
    x = probe_input(3, weight.numel(), weight, weight.dtype)
    inputs = [x, weight] if weight.requires_grad else [x]
    return with_gradients(module(x), inputs)
