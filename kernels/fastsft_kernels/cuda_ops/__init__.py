"""The CUDA C++ kernels of csrc/, where they were built: loaded through ctypes, torch not linked.

`FASTSFT_BUILD_EXT=1 pip install .` puts the library beside this file; nothing needs it.
"""

from fastsft_kernels.cuda_ops.library import is_built
from fastsft_kernels.cuda_ops.nf4 import nf4_dequantize, nf4_dequantize_group, nf4_quantize

__all__ = ["is_built", "nf4_dequantize", "nf4_dequantize_group", "nf4_quantize"]
