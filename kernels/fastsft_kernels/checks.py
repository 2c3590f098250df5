"""The argument checks that every op shares.

The checks look at shapes, dtypes and devices only: reading a value from a GPU tensor would stall
the step, so values are checked on the CPU alone, where reading is free.

Every error says what was wrong, what was got and what to do. It is a plain ValueError: this
package depends on torch (and, for its kernels, on Triton) and on nothing else.
"""

from __future__ import annotations

import torch
from torch import Tensor

FLOATS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


def bad(op: str, what: str, got: object, do: str) -> ValueError:
    """The one form of an argument error: what is wrong, what was got, what to do."""
    return ValueError(f"{op}: {what}; got {got}. {do}")


def describe(x: Tensor) -> str:
    """A tensor in an error message: shape, dtype, device."""
    return f"{list(x.shape)} {str(x.dtype).removeprefix('torch.')} on {x.device}"


def check_float(op: str, name: str, x: Tensor) -> None:
    if x.dtype not in FLOATS:
        raise bad(
            op,
            f"{name} must be floating point",
            describe(x),
            "Pass bfloat16, float16, float32 or float64.",
        )


def check_like(op: str, name: str, x: Tensor, like_name: str, like: Tensor) -> None:
    """`x` must have the dtype and the device of `like`."""
    if x.dtype != like.dtype or x.device != like.device:
        raise bad(
            op,
            f"{name} must have the dtype and device of {like_name} ({describe(like)})",
            describe(x),
            f"Convert it with {name}.to({like_name}).",
        )


def check_device(op: str, name: str, x: Tensor, like_name: str, like: Tensor) -> None:
    if x.device != like.device:
        raise bad(
            op,
            f"{name} must be on the device of {like_name} ({like.device})",
            describe(x),
            f"Move it with {name}.to({like_name}.device).",
        )


def check_shape(op: str, name: str, x: Tensor, shape: tuple[int, ...], meaning: str) -> None:
    if tuple(x.shape) != shape:
        raise bad(
            op,
            f"{name} must be {meaning} = {list(shape)}",
            describe(x),
            "Check which tensors belong together.",
        )


def compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype matrix products run in: autocast's where it is on, else that of `x`.

    Operations inside a torch.autograd.Function see autocast in forward but not in backward, so
    ops with their own backward settle the dtype themselves, before they start.
    """
    kind = x.device.type
    known = torch.amp.is_autocast_available(kind)  # the meta device, say, has none
    if known and x.dtype != torch.float64 and torch.is_autocast_enabled(kind):
        return torch.get_autocast_dtype(kind)
    return x.dtype
