"""Gated activations: SwiGLU (Llama, Qwen, Mistral) and GeGLU (Gemma)."""

from __future__ import annotations

from torch import Tensor

from fastsft_kernels.checks import bad, check_float, check_like, check_shape
from fastsft_kernels.launch import select


def swiglu(gate: Tensor, up: Tensor, *, backend: str | None = None) -> Tensor:
    """silu(gate) · up, for gate and up of one shape and dtype; computed in float32 at least."""
    run = select("swiglu", backend, gate)
    _check("swiglu", gate, up)
    return run(gate, up)


def geglu(
    gate: Tensor, up: Tensor, approximate: str = "tanh", *, backend: str | None = None
) -> Tensor:
    """gelu(gate) · up; approximate: "tanh" or "none" (the exact gelu)."""
    run = select("geglu", backend, gate)
    _check("geglu", gate, up)
    if approximate not in ("tanh", "none"):
        raise bad("geglu", "unknown approximate", repr(approximate), "Pass 'tanh' or 'none'.")
    return run(gate, up, approximate)


def _check(op: str, gate: Tensor, up: Tensor) -> None:
    check_float(op, "gate", gate)
    check_shape(op, "up", up, tuple(gate.shape), "of gate's shape")
    check_like(op, "up", up, "gate", gate)
