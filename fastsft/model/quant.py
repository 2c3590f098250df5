"""Linear layers whose weight stays in 4 bits: the storage behind `method: qlora`.

A weight [N, K] is held as NF4 codes with doubly quantised block scales, 0.516 bytes per parameter
instead of 2. The kernel decodes it, multiplies, and forgets the decoded weight; the backward pass
decodes it again (dX = dY W), so that autograd keeps nothing of its size alive. Decoding costs a few
per cent of the matrix product at training lengths; a kept bf16 copy would cost the memory that 4 bits
saved. The 4-bit weight itself is frozen: it is data, not a parameter.

The tensors live in buffers, so `.to(device)`, `state_dict` and checkpoints treat them like any other.
Scales are stored as the bits of their floats (int32 views): `module.to(torch.bfloat16)` converts
floating buffers and would silently ruin them.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from fastsft_kernels import NF4Weight, lora_linear, nf4_dequantize
from torch import Tensor, nn

PREFIX = "nf4_"


class NF4Linear(nn.Module):
    """y = x W^T + b with W in NF4. x [..., K] floating; returns [..., N] in x's dtype (or autocast's)."""

    bias: nn.Parameter | None

    def __init__(self, nf4: NF4Weight, bias: nn.Parameter | None = None) -> None:
        """`nf4`: a [N, K] weight. `bias`: [N], any floating dtype; kept as given."""
        super().__init__()
        self.out_features, self.in_features = nf4.shape
        self._constants: dict[str, Any] = {}
        self._float_buffers: set[str] = set()
        for field in dataclasses.fields(nf4):
            value = getattr(nf4, field.name)
            if not isinstance(value, Tensor):
                self._constants[field.name] = value
                continue
            if value.is_floating_point():
                assert value.dtype == torch.float32, f"NF4 scales are float32, got {value.dtype}"
                self._float_buffers.add(field.name)
                # A copy: the code tables are one object for all weights, and load_state_dict writes in place.
                value = value.clone().view(torch.int32)
            self.register_buffer(PREFIX + field.name, value)
        self.register_parameter("bias", bias)

    @property
    def nf4(self) -> NF4Weight:
        """The weight as the kernels take it; views of the buffers, nothing is copied."""
        tensors: dict[str, Any] = {
            name.removeprefix(PREFIX): buffer
            for name, buffer in self._buffers.items()
            if name.startswith(PREFIX) and buffer is not None
        }
        for name in self._float_buffers:
            tensors[name] = tensors[name].view(torch.float32)
        return NF4Weight(**self._constants, **tensors)

    @property
    def weight(self) -> Tensor:
        """The decoded weight [N, K], made anew at each call: for model code that reads a layer's weight."""
        nf4 = self.nf4
        return nf4_dequantize(nf4, dtype=nf4.dtype)

    def forward(self, x: Tensor) -> Tensor:
        return lora_linear(x, self.nf4, None, None, 1.0, bias=self.bias)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, bias={self.bias is not None}"
