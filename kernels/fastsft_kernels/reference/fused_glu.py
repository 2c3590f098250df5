"""The gated activation's forward and its backward with adapters, in plain torch.

Computed in float32 (float64 for float64 inputs); h, dgate and dup are rounded to the input's dtype
before they are multiplied, as kernels do which would read them back from memory.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from fastsft_kernels.dropout import lora_dropout_mask
from fastsft_kernels.fused.glu import GluGradients
from fastsft_kernels.fused.strips import Adapters
from fastsft_kernels.reference.elementwise import geglu, swiglu


def glu_forward(
    gate: Tensor, up: Tensor, activation: str = "silu", *, out: Tensor | None = None
) -> Tensor:
    """See `fastsft_kernels.fused.glu_forward`."""
    if activation == "silu":
        h = swiglu(gate, up)
    else:
        h = geglu(gate, up, "tanh" if activation == "gelu_tanh" else "none")
    return h if out is None else out.copy_(h)


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
) -> GluGradients:
    """See `fastsft_kernels.fused.glu_backward`."""
    dtype, (g, u) = gate.dtype, (_wide(gate), _wide(up))
    value, slope = _activate(g, activation)
    total, h = _wide(dh), (value * u).to(dtype)
    da_down = None
    if adapters is not None:
        d, a, dropout, scaling = adapters
        term, masked = _wide(d) @ _wide(a), _wide(h)
        if dropout is not None:
            mask = lora_dropout_mask(dropout.key(0), gate.shape[1], dropout.p)
            term, masked = term * mask, masked * mask
        total = total + scaling * term
        da_down = scaling * (_wide(d).t() @ masked)
    dgate, dup = (total * u * slope).to(dtype), (total * value).to(dtype)
    sums = [da_down]
    for dy, tail in zip((dgate, dup), tails or (None, None), strict=True):
        sums.append(None if tail is None else _wide(dy).t() @ _wide(tail))
    if grads_out is not None:
        pairs = zip(grads_out, sums, strict=True)
        sums = [None if x is None or new is None else x.add_(new) for x, new in pairs]
    if out is not None:
        dgate, dup = (x.copy_(new) for x, new in zip(out, (dgate, dup), strict=True))
    return GluGradients(dgate, dup, None if h_out is None else h_out.copy_(h), *sums)


def _activate(g: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    """The activation of g, and its derivative there."""
    if activation == "gelu":
        density = torch.exp(-0.5 * g * g) / math.sqrt(2 * math.pi)
        return F.gelu(g), 0.5 * (1 + torch.erf(g / math.sqrt(2))) + g * density
    if activation == "silu":
        s = torch.sigmoid(g)
        return g * s, s * (1 + g * (1 - s))
    c = math.sqrt(2 / math.pi)
    t = torch.tanh(c * (g + 0.044715 * g**3))
    slope = 0.5 * (1 + t) + 0.5 * g * (1 - t * t) * c * (1 + 3 * 0.044715 * g * g)
    return 0.5 * g * (1 + t), slope


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()
