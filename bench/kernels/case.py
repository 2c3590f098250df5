"""What a benchmark of one op is: inputs, our function, the oracle, the peers, the work.

A case holds functions, never tensors: it is made on any device, the meta device included, where
the static report records what would be launched.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from fastsft_kernels.limits import Work

Make = Callable[[torch.device, torch.dtype], tuple[Any, ...]]


@dataclass(frozen=True)
class Case:
    """One measured call.

    op      the row of kernels/README.md, such as "rms_norm"
    label   the call and its shape for the record, such as "backward 8192x4096"
    record  (device, dtype) -> inputs of the shape for the record
    small   the same for a check: odd and ragged, well under 0.1 s in plain torch on a CPU
    run     ours, on those inputs -> a tensor or a tuple of tensors, compared with the oracle's
    oracle  plain torch, on the same inputs at their dtype or in float64 (floating inputs converted)
    work    the inputs -> bytes and operations, from fastsft_kernels.limits
    peers   name -> function of the inputs that returns a thunk to time (set-up is not timed);
            raises ImportError where the peer is not installed
    dtypes  in which the case is checked; the first is the record's
    """

    op: str
    label: str
    record: Make
    small: Make
    run: Callable[..., Any]
    oracle: Callable[..., Any]
    work: Callable[..., Work]
    peers: Mapping[str, Callable[..., Callable[[], Any]]] = field(default_factory=dict)
    dtypes: tuple[torch.dtype, ...] = (torch.bfloat16, torch.float16, torch.float32)
