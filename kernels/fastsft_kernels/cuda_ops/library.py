"""The shared library built from csrc/: where it is, loading it, errors.

Plain C functions that take addresses and a stream and return a cudaError, so that one build serves
every torch version. The CUDA runtime is linked in; it works in the context that torch made.
"""

from __future__ import annotations

import ctypes
from functools import cache
from pathlib import Path
from typing import Any

import torch

LIBRARY = Path(__file__).with_name("libfastsft.so")
ABI = 1  # FASTSFT_ABI in csrc/nf4.cu: counts up with every change of a signature
DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}


@cache
def is_built() -> bool:
    """Whether this installation holds the CUDA kernels."""
    return LIBRARY.exists()


@cache
def library() -> ctypes.CDLL:
    """The library, loaded. Raises RuntimeError where it is missing or of another version."""
    if not LIBRARY.exists():
        raise RuntimeError(
            f"the CUDA kernels are not built; got no {LIBRARY}. Install with FASTSFT_BUILD_EXT=1 "
            "where nvcc is, or do not force them."
        )
    try:
        loaded = ctypes.CDLL(str(LIBRARY))
    except OSError as error:
        raise RuntimeError(
            f"the CUDA kernels do not load; got {error}. Build them again on this machine with "
            "FASTSFT_BUILD_EXT=1."
        ) from error
    if loaded.fastsft_abi() != ABI:
        raise RuntimeError(
            f"the CUDA kernels are of another version; got {loaded.fastsft_abi()}, not {ABI}. "
            "Build them again with FASTSFT_BUILD_EXT=1."
        )
    loaded.fastsft_error.restype = ctypes.c_char_p
    return loaded


def call(function: str, device: torch.device, *args: Any) -> None:
    """Calls a function of the library on the device's current stream.

    Raises RuntimeError with CUDA's own words where the launch fails.
    """
    lib = library()
    with torch.cuda.device(device):
        stream = ctypes.c_void_p(torch.cuda.current_stream(device).cuda_stream)
        code = getattr(lib, function)(*args, stream)
    if code:
        what = lib.fastsft_error(code).decode()
        raise RuntimeError(
            f"{function} did not launch; got cudaError {code} ({what}). 'no kernel image' means a "
            "card the library was not built for: build it there with FASTSFT_BUILD_EXT=1. "
            "Otherwise an earlier kernel failed: run with CUDA_LAUNCH_BLOCKING=1."
        )
