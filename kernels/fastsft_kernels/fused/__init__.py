"""The fast engine's producers: raw forwards and backwards with the adapters' terms fused in.

Unlike the ops of `fastsft_kernels` these are not differentiable: a block's autograd function calls
them in its forward and its backward. Each takes `backend` and has a reference of the same name
and signature in `fastsft_kernels.reference`. Outputs may be given, at any row pitch.

R is the width of a strip: an adapter's rank, rounded up to a multiple of 16. Adapters that share
an input (q, k, v; gate, up) lie side by side in strips of one width, so S strips make S·R columns.
"""

from fastsft_kernels.fused.attention import (
    AttentionOptions,
    attention_backward,
    attention_blocks,
    attention_delta,
    attention_forward,
)
from fastsft_kernels.fused.cross_entropy import RowLosses, cross_entropy_
from fastsft_kernels.fused.glu import GluGradients, glu_backward, glu_forward
from fastsft_kernels.fused.nf4 import nf4_dequantize_group
from fastsft_kernels.fused.norm import rms_norm_backward, rms_norm_forward
from fastsft_kernels.fused.pack import PackEntry, PackPlan, pack_adapters, pack_plan
from fastsft_kernels.fused.rope import rope_
from fastsft_kernels.fused.skinny import NormedInput, skinny_dA, skinny_dB, tails
from fastsft_kernels.fused.strips import Adapters, StripDropout

__all__ = [
    "Adapters",
    "AttentionOptions",
    "GluGradients",
    "NormedInput",
    "PackEntry",
    "PackPlan",
    "RowLosses",
    "StripDropout",
    "attention_backward",
    "attention_blocks",
    "attention_delta",
    "attention_forward",
    "cross_entropy_",
    "glu_backward",
    "glu_forward",
    "nf4_dequantize_group",
    "pack_adapters",
    "pack_plan",
    "rms_norm_backward",
    "rms_norm_forward",
    "rope_",
    "skinny_dA",
    "skinny_dB",
    "tails",
]
