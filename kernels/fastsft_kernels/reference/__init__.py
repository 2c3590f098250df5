"""Plain torch for every op: the CPU path, the oracle of the kernels, the benchmarks' baseline.

Each function has the name and the parameters of the public one in `fastsft_kernels`, less
`backend`, and does not check its arguments.
"""

from fastsft_kernels.dropout import lora_dropout_mask
from fastsft_kernels.reference.attention import varlen_attention
from fastsft_kernels.reference.cross_entropy import cross_entropy, linear_cross_entropy
from fastsft_kernels.reference.elementwise import geglu, rms_norm, rope, swiglu
from fastsft_kernels.reference.lora import lora_linear
from fastsft_kernels.reference.nf4 import nf4_dequantize, nf4_quantize

__all__ = [
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
