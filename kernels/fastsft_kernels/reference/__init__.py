"""Plain torch for every op: the CPU path, the oracle of the kernels, the benchmarks' baseline.

Each function has the name and the parameters of the public one in `fastsft_kernels`, less
`backend`, and does not check its arguments.
"""

from fastsft_kernels.dropout import lora_dropout_mask
from fastsft_kernels.reference.attention import varlen_attention
from fastsft_kernels.reference.cross_entropy import cross_entropy, linear_cross_entropy
from fastsft_kernels.reference.elementwise import geglu, rms_norm, rope, swiglu
from fastsft_kernels.reference.fused_attention import (
    attention_backward,
    attention_delta,
    attention_forward,
)
from fastsft_kernels.reference.fused_cross_entropy import cross_entropy_
from fastsft_kernels.reference.fused_glu import glu_backward, glu_forward
from fastsft_kernels.reference.fused_nf4 import nf4_dequantize_group
from fastsft_kernels.reference.fused_norm import rms_norm_backward, rms_norm_forward
from fastsft_kernels.reference.fused_pack import pack_adapters
from fastsft_kernels.reference.fused_rope import rope_
from fastsft_kernels.reference.fused_skinny import skinny_dA, skinny_dB, tails
from fastsft_kernels.reference.lora import lora_linear
from fastsft_kernels.reference.nf4 import nf4_dequantize, nf4_quantize

__all__ = [
    "attention_backward",
    "attention_delta",
    "attention_forward",
    "cross_entropy",
    "cross_entropy_",
    "geglu",
    "glu_backward",
    "glu_forward",
    "linear_cross_entropy",
    "lora_dropout_mask",
    "lora_linear",
    "nf4_dequantize",
    "nf4_dequantize_group",
    "nf4_quantize",
    "pack_adapters",
    "rms_norm",
    "rms_norm_backward",
    "rms_norm_forward",
    "rope",
    "rope_",
    "skinny_dA",
    "skinny_dB",
    "swiglu",
    "tails",
    "varlen_attention",
]
