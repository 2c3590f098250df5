"""Which modules an adapter reaches: PEFT's rules for `target_modules`, applied to a loaded model.

    all-linear        every linear layer except the output head
    one string        a regular expression that matches a module's whole name
    a list            module names or endings of names at a dot ("q_proj", "layers.0.mlp.down_proj")

A linear layer is nn.Linear, GPT-2's Conv1D (weight stored [K, N]) or our 4-bit NF4Linear. PEFT ignores
a list entry that matches nothing; here it is an error, because it is nearly always a misspelling or another
family's name.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from typing import TypeGuard, TypeVar

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from fastsft.errors import UserError
from fastsft.model.quant import NF4Linear

ALL_LINEAR = "all-linear"
# These models' fused scan multiplies by the weight of `out_proj` without calling the layer.
BYPASSED = {"mamba", "mamba2", "falcon_mamba", "falcon_h1", "nemotron_h"}
Linear = nn.Linear | Conv1D | NF4Linear
T = TypeVar("T", int, float)


def is_linear(module: nn.Module) -> TypeGuard[Linear]:
    """Whether `module` is a linear layer that can carry an adapter."""
    return isinstance(module, (nn.Linear, Conv1D, NF4Linear))


def name_of(model: nn.Module, wanted: nn.Module | None) -> str | None:
    """The dotted name of `wanted` inside `model`; None where it is not there."""
    return next((name for name, module in model.named_modules() if module is wanted), None)


def embedding_weight(model: PreTrainedModel) -> Tensor:
    """The input embedding's weight [V, H]."""
    weight = model.get_input_embeddings().weight
    assert isinstance(weight, Tensor)
    return weight


def ends_with(name: str, endings: Iterable[str]) -> bool:
    """Whether `name` is one of `endings`, or ends with one of them at a dot."""
    return any(name == ending or name.endswith("." + ending) for ending in endings)


def module_numbers(model: PreTrainedModel) -> dict[str, int]:
    """Every linear layer's name and its number in the model: what keys dropout, whatever the targets."""
    linears = (name for name, module in model.named_modules() if is_linear(module))
    return {name: number for number, name in enumerate(linears)}


def matches(name: str, target: str | Collection[str]) -> bool:
    """PEFT's rule for one name: a string is a regular expression for all of it, a list holds endings."""
    if isinstance(target, str):
        return re.fullmatch(target, name) is not None
    return ends_with(name, target)


def endings(names: Iterable[str]) -> list[str]:
    """The last parts of `names`, each once, in order: a readable list of a model's linear layers."""
    return list(dict.fromkeys(name.rsplit(".", 1)[-1] for name in names))


def find_targets(
    model: PreTrainedModel, target: str | list[str], *, kept_whole: Collection[str] = ()
) -> list[str]:
    """Names of the linear layers that `target` means, in the model's order.

    `kept_whole`: modules_to_save, whose insides take no adapter. Raises UserError where nothing
    matches, where a list entry matches nothing, and where something else than a linear layer matches.
    """
    modules = dict(model.named_modules())
    linears = [name for name, module in modules.items() if is_linear(module)]
    known = f"linear layers here: {', '.join(endings(linears))}"
    if isinstance(target, str) and target.lower() == ALL_LINEAR:
        head = name_of(model, model.get_output_embeddings())
        found = [name for name in linears if name != head and not _bypassed(model, name)]
    else:
        try:
            hits = [name for name in modules if name and matches(name, target)]
        except re.error as error:
            raise UserError(
                f"lora.target_modules: {target!r} is not a regular expression ({error})"
            ) from None
        if isinstance(target, list):
            idle = [entry for entry in target if not any(ends_with(name, [entry]) for name in hits)]
            if idle:
                raise UserError(
                    f"lora.target_modules: nothing in this model is called {', '.join(idle)}; {known}"
                )
        other = [name for name in hits if not is_linear(modules[name])]
        if other:
            kind = type(modules[other[0]]).__name__
            raise UserError(
                f"lora.target_modules: {other[0]} is a {kind}, not a linear layer; {known}"
                " (train other modules whole with lora.modules_to_save)"
            )
        fused = [name for name in hits if _bypassed(model, name)]
        if fused:
            raise UserError(
                f"lora.target_modules: {fused[0]} can carry no adapter, the model's fused scan reads its"
                " weight without calling the layer; leave it out"
            )
        found = hits
    whole = [name for name in found if any(ends_with(part, kept_whole) for part in _parents(name))]
    found = [name for name in found if name not in set(whole)]
    if not found:
        raise UserError(f"lora.target_modules: {target!r} matches no linear layer; {known}")
    return found


def _bypassed(model: PreTrainedModel, name: str) -> bool:
    return model.config.model_type in BYPASSED and ends_with(name, ["out_proj"])


def _parents(name: str) -> list[str]:
    """ "a.b.c" -> ["a", "a.b", "a.b.c"]."""
    parts = name.split(".")
    return [".".join(parts[: i + 1]) for i in range(len(parts))]


def as_written(model: nn.Module, names: Collection[str]) -> list[str]:
    """The shortest list of endings that means exactly `names` in this model; else the whole names."""
    short = endings(names)
    meant = {name for name, _ in model.named_modules() if ends_with(name, short)}
    return sorted(short) if meant == set(names) else sorted(names)


def unreached_weights(model: nn.Module) -> dict[str, int]:
    """Weights of three dimensions (experts stacked in one tensor), which no linear layer holds.

    Returns the endings of their names with the number of parameters behind each.
    """
    found: dict[str, int] = {}
    for name, parameter in model.named_parameters():
        if parameter.dim() == 3:
            ending = ".".join(name.split(".")[-2:])
            found[ending] = found.get(ending, 0) + parameter.numel()
    return found


def pattern_value(patterns: Mapping[str, T], name: str, default: T) -> T:
    """PEFT's rank_pattern and alpha_pattern: the first key that, as a regular expression, ends `name`."""
    for key, value in patterns.items():
        if re.match(rf"(.*\.)?({key})$", name):
            return value
    return default
