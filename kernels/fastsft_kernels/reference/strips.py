"""What adapters add to the gradient of their input, in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor

from fastsft_kernels.dropout import lora_dropout_mask
from fastsft_kernels.fused.strips import Adapters


def adapters_term(adapters: Adapters) -> Tensor:
    """scaling · Σ_i mask_i ∘ (d_i · a_i), [T, K], in float32 (float64 for float64 inputs)."""
    d, a, dropout, scaling = adapters
    wide = d.dtype if d.dtype == torch.float64 else torch.float32
    d, a = d.to(wide), a.to(wide)
    if dropout is None:
        return d @ a * scaling
    strips = len(dropout.modules)
    total = a.new_zeros(d.shape[0], a.shape[1])
    for i, (low, rows) in enumerate(zip(d.chunk(strips, 1), a.chunk(strips), strict=True)):
        total += lora_dropout_mask(dropout.key(i), a.shape[1], dropout.p) * (low @ rows)
    return total * scaling
