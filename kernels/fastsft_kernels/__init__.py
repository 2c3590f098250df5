"""Kernels for fine-tuning language models, importable by any trainer.

Every function is differentiable where that makes sense, chooses its implementation by device,
takes backend=None | "triton" | "reference", and raises ValueError with what, got and do-this on
bad arguments. `fastsft_kernels.reference` holds the same functions in plain torch.

T tokens, H hidden, N out features, K in features, R rank, V vocabulary, D head size.
"""

from fastsft_kernels.attention import varlen_attention
from fastsft_kernels.cross_entropy import cross_entropy, linear_cross_entropy
from fastsft_kernels.dropout import DropoutKey, lora_dropout_mask
from fastsft_kernels.glu import geglu, swiglu
from fastsft_kernels.lora import lora_linear
from fastsft_kernels.nf4 import NF4Weight, nf4_dequantize, nf4_quantize
from fastsft_kernels.rms_norm import rms_norm
from fastsft_kernels.rope import rope

__all__ = [
    "DropoutKey",
    "NF4Weight",
    "cross_entropy",
    "geglu",
    "linear_cross_entropy",
    "lora_dropout_mask",
    "lora_linear",
    "nf4_dequantize",
    "nf4_quantize",
    "rms_norm",
    "rope",
    "swiglu",
    "varlen_attention",
]
