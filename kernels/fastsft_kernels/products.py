"""A matrix product added to a sum of wider numbers, on every device."""

from __future__ import annotations

import torch
from torch import Tensor


def add_product(total: Tensor, a: Tensor, b: Tensor, *, first: bool = False) -> None:
    """total [N, K] += a [N, T] · b [T, K], summed in total's dtype; the first one replaces its content.

    a and b share a dtype, total's or a narrower one.
    """
    beta = 0 if first else 1
    if total.dtype == a.dtype:
        torch.addmm(total, a, b, beta=beta, out=total)
    elif total.device.type == "cpu":  # no product of 16-bit matrices with a 32-bit result there
        torch.addmm(total, a.to(total.dtype), b.to(total.dtype), beta=beta, out=total)
    elif total.device.type == "meta":
        # torch 2.11 has no `out_dtype` here. One op without other memory, as on a GPU: a part of total.
        part = total.view(a.dtype)[:, : total.shape[1]]
        torch.addmm(part, a, b, beta=beta, out=part)
    else:
        torch.addmm(total, a, b, out_dtype=total.dtype, beta=beta, out=total)
