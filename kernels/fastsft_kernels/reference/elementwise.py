"""RMS norm, rotary embedding and gated activations in plain torch.

All compute in float32 (float64 for float64 inputs) and round once to the input's dtype. Where
transformers rounds in between (bf16 only), these are the more exact ones.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def rms_norm(
    x: Tensor,
    weight: Tensor,
    eps: float = 1e-6,
    *,
    offset: float = 0.0,
    residual: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """See `fastsft_kernels.rms_norm`."""
    total = x if residual is None else x + residual
    z = _wide(total)
    y = z * torch.rsqrt(z.square().mean(-1, keepdim=True) + eps) * (_wide(weight) + offset)
    y = y.to(x.dtype)
    return y if residual is None else (y, total)


def rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """See `fastsft_kernels.rope`."""
    return _rotate(q, cos, sin), _rotate(k, cos, sin)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = cos.shape[1]
    cos, sin = _wide(cos)[:, None, :], _wide(sin)[:, None, :]
    a, b, rest = x.split([half, half, x.shape[-1] - 2 * half], dim=-1)
    a, b = _wide(a), _wide(b)
    turned = torch.cat([a * cos - b * sin, b * cos + a * sin], -1).to(x.dtype)
    return torch.cat([turned, rest], -1) if rest.shape[-1] else turned


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """See `fastsft_kernels.swiglu`."""
    return (F.silu(_wide(gate)) * _wide(up)).to(gate.dtype)


def geglu(gate: Tensor, up: Tensor, approximate: str = "tanh") -> Tensor:
    """See `fastsft_kernels.geglu`."""
    return (F.gelu(_wide(gate), approximate=approximate) * _wide(up)).to(gate.dtype)


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()
