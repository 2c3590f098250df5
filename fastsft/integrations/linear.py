"""Linear layers: PEFT's LoRA layers, over dense or 4-bit weights, and bitsandbytes' 4-bit layers alone.

    PEFT over nn.Linear or Linear4bit   one `lora_linear` in place of the base layer, dropout, two small
                                        layers, a scaling, an addition and the casts between them
    Linear4bit without an adapter       the same call without the adapter

The 4-bit weight is read where bitsandbytes keeps it (`nf4_view`): nothing is copied. What the adapter is, is
asked at each call, as PEFT does: while adapters are disabled, merged or several, while a batch names its
adapters or somebody's hook stands on an inner layer (as ZeRO-3's do), PEFT's own forward runs. Variants
(DoRA and others), adapters with a bias and other base layers are left to PEFT.

Two things differ from PEFT, in low precision and in dropout: the adapter's product runs in the
activations' dtype, where PEFT casts them to the adapter's own (usually float32); and dropout's random numbers
come from a key drawn from torch's CPU generator, so a seed gives other masks than PEFT's, of the same kind.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from fastsft_kernels import NF4Weight, lora_linear
from torch import Tensor, nn
from torch.func import functional_call

from fastsft.integrations.changes import (
    Changes,
    Forward,
    Plan,
    has_hooks,
    probe_input,
    with_gradients,
)

_PEFT_FILES = ("peft.tuners.lora.layer", "peft.tuners.lora.bnb")
_NESTED_BLOCK = 256


def rebind_linears(model: nn.Module, changes: Changes) -> None:
    """Rebind PEFT's LoRA layers and bitsandbytes' 4-bit layers to `lora_linear`."""
    for name, module in model.named_modules():
        if is_peft_lora(module):
            changes.rebind("lora", name, module, _lora_plan)
        elif is_4bit(module):
            changes.rebind("nf4", name, module, _4bit_plan)


def is_peft_lora(module: nn.Module) -> bool:
    """Whether `module` is one of PEFT's LoRA layers, of whatever kind."""
    kind = type(module)
    return (
        kind.__module__ in _PEFT_FILES
        and hasattr(module, "lora_A")
        and hasattr(module, "base_layer")
    )


def is_4bit(module: nn.Module) -> bool:
    """Whether `module` is bitsandbytes' 4-bit linear layer, fp4 or nf4."""
    return any(
        kind.__name__ == "Linear4bit" and kind.__module__.startswith("bitsandbytes.")
        for kind in type(module).__mro__
    )


def nf4_view(layer: Any) -> NF4Weight | None:
    """The weight of a bitsandbytes Linear4bit as the kernels take it, on the same storage.

    None where it is not quantised yet, not nf4, or rearranged for a CPU's instructions.
    """
    weight = layer.weight
    state = getattr(weight, "quant_state", None)
    if state is None or state.quant_type != "nf4" or len(state.shape) != 2:
        return None
    if getattr(state, "packing_format_for_cpu", False) or not weight.is_contiguous():
        return None
    nested = state.state2
    if nested is not None and nested.blocksize != _NESTED_BLOCK:
        return None
    return NF4Weight(
        packed=weight.detach().flatten().view(torch.uint8),
        absmax=state.absmax,
        absmax2=None if nested is None else nested.absmax,
        offset=None if nested is None else state.offset,
        code=state.code,
        code2=None if nested is None else nested.code,
        shape=(int(state.shape[0]), int(state.shape[1])),
        dtype=state.dtype,
        block_size=state.blocksize,
    )


@contextmanager
def bitsandbytes_kept(model: nn.Module) -> Iterator[None]:
    """Two things that trying a 4-bit layer must not do to it, and bitsandbytes would.

    A layer fixes its compute dtype at its first input; and in evaluation on a CPU with bfloat16
    instructions it rearranges its weight.
    """
    keys = ("compute_dtype", "compute_type_is_set", "support_avx512bf16_for_cpu")
    layers = [module for module in model.modules() if is_4bit(module)]
    kept = [{key: vars(layer)[key] for key in keys if key in vars(layer)} for layer in layers]
    for layer in layers:
        vars(layer)["support_avx512bf16_for_cpu"] = False
    try:
        yield
    finally:
        for layer, values in zip(layers, kept, strict=True):
            del vars(layer)["support_avx512bf16_for_cpu"]
            vars(layer).update(values)


# --- what a layer takes, whether it is plain, 4-bit or PEFT's ----------------------------------------


def base_of(layer: Any) -> Any:
    """The layer below an adapter, or the layer itself."""
    return layer.base_layer if is_peft_lora(layer) else layer


def weight_of(layer: Any) -> Tensor:
    """A tensor on the layer's device."""
    weight: Tensor = base_of(layer).weight
    return weight


def input_features(layer: Any) -> int | None:
    """How many numbers a row of input has; None where that is not a linear layer's to say."""
    found = getattr(base_of(layer), "in_features", None)
    return found if isinstance(found, int) else None


def input_dtype(layer: Any) -> torch.dtype:
    """The dtype activations have in front of the layer, as far as its weight tells."""
    base = base_of(layer)
    if is_4bit(base):
        state = getattr(base.weight, "quant_state", None)
        return torch.float32 if state is None else state.dtype
    dtype: torch.dtype = base.weight.dtype
    return dtype


def lowest_dtype(module: nn.Module) -> torch.dtype:
    """The lowest precision that plays a part in `module`: of weights, adapters, 4-bit layers' products."""
    known = [p.dtype for p in module.parameters() if p.is_floating_point()]
    for layer in module.modules():
        if is_4bit(layer):
            known.append(input_dtype(layer))
            known.append(getattr(layer, "compute_dtype", None) or input_dtype(layer))
    return min(known, key=lambda dtype: dtype.itemsize, default=torch.float32)


# --- the plans -----------------------------------------------------------------------------------------


def _4bit_plan(layer: Any) -> Plan:
    if nf4_view(layer) is None:
        return Plan(why="its weight is not quantised to nf4")

    def make(original: Forward) -> Forward:
        def forward(self: Any, x: Tensor) -> Tensor:
            y = _multiply(self, x)
            out: Tensor = original(self, x) if y is None else y
            return out

        return forward

    def probe(module: nn.Module) -> list[Tensor]:
        x = _input(module)
        return with_gradients(module(x), [x])

    return Plan(
        "lora_linear without adapter, on the same 4-bit storage", make, probe, lowest_dtype(layer)
    )


def _lora_plan(layer: Any) -> Plan:
    adapter, why = _adapter(layer)
    base = layer.base_layer
    if type(layer).__name__ not in ("Linear", "Linear4bit"):
        why = f"PEFT's {type(layer).__name__} adapter"
    elif type(base) is not nn.Linear and not is_4bit(base):
        why = f"its base layer is a {type(base).__name__}"
    elif is_4bit(base) and nf4_view(base) is None:
        why = "its base weight is not quantised to nf4"
    elif getattr(layer, "fan_in_fan_out", False):
        why = "its base weight is stored the other way round"
    if why:
        return Plan(why=why)

    def make(original: Forward) -> Forward:
        def forward(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Any:
            y = None if args or kwargs else _with_adapter(self, x)
            return original(self, x, *args, **kwargs) if y is None else y

        return forward

    def probe(module: Any) -> list[Tensor]:
        # B starts at zero and would hide the adapter: it is tried with another B, which stays outside.
        b = module.lora_B[adapter].weight
        other = probe_input(b.shape[0], b.shape[1], b, b.dtype)
        x, a = _input(module), module.lora_A[adapter].weight
        y = functional_call(module, {f"lora_B.{adapter}.weight": other}, (x,))
        return with_gradients(y, [x, other, a] if a.requires_grad else [x, other])

    stored = "on the same 4-bit storage" if is_4bit(base) else "in one call"
    return Plan(f"lora_linear, {stored}", make, probe, lowest_dtype(layer))


def _adapter(layer: Any) -> tuple[str, str]:
    """(the one plain adapter that is active, ""), or ("", why there is none)."""
    if layer.disable_adapters:
        return "", "its adapters are disabled"
    if layer.merged:
        return "", "its adapter is merged into the weight"
    names = [name for name in layer.active_adapters if name in layer.lora_A]
    if len(names) != 1:
        return "", f"{len(names)} adapters are active"
    name = names[0]
    if name in layer.lora_variant:
        return "", f"its adapter is a {type(layer.lora_variant[name]).__name__}"
    if layer.lora_B[name].bias is not None:
        return "", "its adapter has a bias"
    return name, ""


def _with_adapter(layer: Any, x: Tensor) -> Tensor | None:
    """Base layer and adapter in one; None where PEFT's own forward has to run."""
    name, why = _adapter(layer)
    if why:
        return None
    base, a, b, dropout = (
        layer.base_layer,
        layer.lora_A[name],
        layer.lora_B[name],
        layer.lora_dropout[name],
    )
    if any(has_hooks(inner) for inner in (base, a, b, dropout)):
        return None
    return _multiply(
        base,
        x,
        lora_a=a.weight,
        lora_b=b.weight,
        scaling=layer.scaling[name],
        dropout_p=getattr(dropout, "p", 0.0),
        training=dropout.training,
    )


def _multiply(base: Any, x: Tensor, **adapter: Any) -> Tensor | None:
    """`lora_linear` over a base layer; None where its 4-bit weight cannot be read."""
    options = {"lora_a": None, "lora_b": None, "scaling": 1.0, **adapter}
    if not is_4bit(base):
        return lora_linear(x, base.weight, bias=base.bias, **options)
    nf4 = nf4_view(base)
    if nf4 is None:
        return None
    y = lora_linear(x.to(base.compute_dtype or x.dtype), nf4, bias=base.bias, **options)
    return y.to(x.dtype)


def _input(layer: Any) -> Tensor:
    features = input_features(layer)
    assert features is not None
    return probe_input(3, features, weight_of(layer), input_dtype(layer))
