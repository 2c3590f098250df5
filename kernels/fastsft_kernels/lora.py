"""A linear layer with a LoRA adapter: frozen (or trained) dense base, or NF4 base.

One call in place of the base layer, dropout, two small layers, a scaling and an addition. The
adapter's fp32 masters are cast to x's dtype for the products, and their gradients come back in
the masters' dtype. Under autocast everything runs in autocast's dtype.
"""

from __future__ import annotations

from torch import Tensor

from fastsft_kernels.checks import (
    bad,
    check_device,
    check_float,
    check_shape,
    compute_dtype,
    describe,
)
from fastsft_kernels.dropout import DropoutKey, check_key
from fastsft_kernels.launch import select
from fastsft_kernels.nf4_format import NF4Weight


def lora_linear(
    x: Tensor,
    weight: Tensor | NF4Weight,
    lora_a: Tensor | None,
    lora_b: Tensor | None,
    scaling: float,
    *,
    bias: Tensor | None = None,
    dropout_p: float = 0.0,
    training: bool = True,
    dropout_key: DropoutKey | None = None,
    backend: str | None = None,
) -> Tensor:
    """x[.., K] -> y[.., N] = x Wᵀ + bias + scaling · drop(x) Aᵀ Bᵀ, in x's (or autocast's) dtype.

    weight       [N, K] in x's dtype, or an NF4Weight (decoded for each product, never kept)
    lora_a [R, K], lora_b [N, R]    any float dtype; both None: the base layer alone
    bias         [N] or None
    dropout_p    in [0, 1), on the adapter's input only, only while training
    dropout_key  names the random numbers (see `dropout`); its rows are x's rows in order. None
                 draws a key from torch's CPU generator.

    Gradients for x, lora_a, lora_b, and for weight and bias where they require them.
    """
    op = "lora_linear"
    run = select(op, backend, x)
    _check(op, x, weight, lora_a, lora_b, bias)
    if not 0 <= dropout_p < 1:
        raise bad(op, "dropout_p must be in [0, 1)", dropout_p, "Pass a probability below 1.")
    if dropout_key is not None:
        check_key(op, dropout_key, x.numel() // x.shape[-1])
    return run(
        x,
        weight,
        lora_a,
        lora_b,
        scaling,
        bias=bias,
        dropout_p=dropout_p,
        training=training,
        dropout_key=dropout_key,
    )


def _check(
    op: str,
    x: Tensor,
    weight: Tensor | NF4Weight,
    lora_a: Tensor | None,
    lora_b: Tensor | None,
    bias: Tensor | None,
) -> None:
    check_float(op, "x", x)
    n, k = weight.shape
    if x.ndim == 0 or x.shape[-1] != k:
        raise bad(op, f"x must end in K = {k}, weight being {[n, k]}", describe(x), "Check both.")
    check_device(op, "weight", weight if isinstance(weight, Tensor) else weight.packed, "x", x)
    mixed = isinstance(weight, Tensor) and weight.dtype != x.dtype
    if mixed and compute_dtype(x) == x.dtype:
        raise bad(
            op,
            f"weight must have x's dtype ({x.dtype}) outside autocast",
            weight.dtype,
            "Convert one of them.",
        )
    if (lora_a is None) != (lora_b is None):
        raise bad(op, "lora_a and lora_b come together", "one of them None", "Pass both or none.")
    if lora_a is not None and lora_b is not None:
        check_float(op, "lora_a", lora_a)
        check_float(op, "lora_b", lora_b)
        check_device(op, "lora_a", lora_a, "x", x)
        check_device(op, "lora_b", lora_b, "x", x)
        check_shape(op, "lora_a", lora_a, (lora_a.shape[0], k), "[R, K]")
        check_shape(op, "lora_b", lora_b, (n, lora_a.shape[0]), "[N, R]")
    if bias is not None:
        check_shape(op, "bias", bias, (n,), "[N]")
        check_device(op, "bias", bias, "x", x)
