"""How a checkpoint becomes NF4 while transformers loads it: an own quantisation method at its public seam.

`from_pretrained` already handles shards, renamed and fused keys, tied weights and buffers that are in no
file (rope frequencies). All that is ours is what happens to one linear layer's weight when it arrives:
the `nn.Linear` of the skeleton is replaced by an `NF4Linear` built from it, and the full-precision tensor
is dropped before the next one is read. So the peak is the finished model plus one tensor, and on a GPU
the quantiser runs there. The same seam takes checkpoints that bitsandbytes has quantised: the six tensors
of a layer are collected and become an `NF4Linear` without bitsandbytes and without decoding.

Registered under a name of our own; afterwards nothing of it stays on the model, which is then an ordinary
one whose linear layers happen to be `NF4Linear`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from fastsft_kernels import NF4Weight, nf4_quantize
from torch import Tensor, nn
from transformers.core_model_loading import ConversionOps, WeightConverter
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from fastsft.errors import UserError
from fastsft.model.quant import NF4Linear

METHOD = "fastsft_nf4"
STATE_KEY = "weight.quant_state.bitsandbytes__nf4"
# `weight` last: the names are tried in order and each of the others begins with it.
BITSANDBYTES_KEYS = [
    "weight.nested_absmax",
    "weight.nested_quant_map",
    "weight.quant_map",
    "weight.absmax",
    STATE_KEY,
    "weight",
]
Progress = Callable[[int, int], None]


@register_quantization_config(METHOD)
class NF4Config(QuantizationConfigMixin):
    """What the loader tells the quantiser: where to quantise, and whom to tell how far it is."""

    def __init__(
        self,
        device: torch.device,
        progress: Progress | None = None,
        quant_method: str = METHOD,
    ) -> None:
        self.quant_method = quant_method  # type: ignore[assignment]  # transformers' enum is closed
        self.device = device
        self.progress = progress


@register_quantizer(METHOD)
class NF4Quantizer(HfQuantizer):
    """Turns every linear layer but the head into NF4Linear (bf16 checkpoints: as it arrives)."""

    quantization_config: NF4Config

    def _process_model_before_weight_loading(self, model: nn.Module, **_: Any) -> nn.Module:
        # Identity, not names: a head tied to the embedding is excluded by being the head.
        head = model.get_output_embeddings()  # type: ignore[operator]
        linears = {
            name: module
            for name, module in model.named_modules()
            if type(module) is nn.Linear and module is not head
        }
        if not self.pre_quantized and not linears:
            raise UserError(
                f"method: qlora needs torch.nn.Linear layers to quantise, and {type(model).__name__} has "
                "none besides its head; use method: lora"
            )
        self.targets = set(linears)
        self.done = 0
        self.problems: list[str] = []
        return model

    def param_needs_quantization(self, model: nn.Module, param_name: str, **kwargs: Any) -> bool:
        module, _, leaf = param_name.rpartition(".")
        return leaf == "weight" and module in self.targets

    def get_quantize_ops(self) -> ConversionOps:
        return _Quantize(self)

    def get_weight_conversions(self) -> list[WeightConverter]:
        if not self.pre_quantized:
            return []
        return [WeightConverter(BITSANDBYTES_KEYS, "weight", [_Adopt(self)])]

    def forget(self, model: Any) -> None:
        """Take the traces of the method off a loaded model: it is an ordinary one from here on."""
        self.remove_quantization_config(model)
        # What saving would undo: the model's own renamings yes, our replacement of layers no.
        model._weight_conversions = [
            step
            for step in model._weight_conversions
            if not any(isinstance(op, _Operation) for op in getattr(step, "operations", ()))
        ]
        for module in model.modules():
            if hasattr(getattr(module, "config", None), "_is_quantized"):
                del module.config._is_quantized

    def is_serializable(self) -> bool:
        return False

    @property
    def is_trainable(self) -> bool:
        return True

    def replace(self, model: nn.Module, name: str, make: Callable[[], NF4Weight]) -> None:
        """Put an NF4Linear in the place of the layer called `name`; its bias may be loaded yet or not.

        transformers swallows what is raised here, so a problem is noted down for the loader to raise.
        """
        linear = model.get_submodule(name)
        assert isinstance(linear, nn.Linear)
        try:
            nf4 = make()
        except ValueError as error:
            self.problems.append(f"{name}.weight: {error}")
            return
        if tuple(nf4.shape) != tuple(linear.weight.shape):
            self.problems.append(
                f"{name}.weight in the file is {tuple(nf4.shape)}, config.json asks for "
                f"{tuple(linear.weight.shape)}"
            )
            return
        replacement = NF4Linear(nf4, linear.bias)
        # transformers looks for this mark to tell a loaded module from one it must initialise.
        replacement._is_hf_initialized = True  # type: ignore[assignment]
        model.set_submodule(name, replacement)
        self.done += 1
        if self.quantization_config.progress is not None:
            self.quantization_config.progress(self.done, len(self.targets))


class _Operation(ConversionOps):
    """One step of transformers' loading; the name of the attribute tells it that dtypes are our affair."""

    def __init__(self, hf_quantizer: NF4Quantizer) -> None:
        self.hf_quantizer = hf_quantizer

    def __deepcopy__(self, memo: dict[int, Any]) -> _Operation:
        return type(self)(self.hf_quantizer)  # transformers copies operations for each parameter


class _Quantize(_Operation):
    def convert(  # type: ignore[override]  # transformers passes all by keyword
        self,
        input_dict: dict[str, Any],
        model: nn.Module | None = None,
        missing_keys: set[str] | None = None,
        **_: Any,
    ) -> dict[str, Tensor]:
        assert model is not None
        rest: dict[str, Tensor] = {}
        for key, value in input_dict.items():
            tensor = value[0] if isinstance(value, list) else value
            if not self.hf_quantizer.param_needs_quantization(model, key):
                rest[key] = tensor
                continue
            tensor = tensor.to(self.hf_quantizer.quantization_config.device)
            self.hf_quantizer.replace(
                model, key.removesuffix(".weight"), functools.partial(nf4_quantize, tensor)
            )
            if missing_keys is not None:
                missing_keys.discard(key)
        return rest


class _Adopt(_Operation):
    def convert(  # type: ignore[override]
        self,
        input_dict: dict[str, Any],
        model: nn.Module | None = None,
        full_layer_name: str | None = None,
        missing_keys: set[str] | None = None,
        **_: Any,
    ) -> dict[str, Tensor]:
        assert model is not None and full_layer_name is not None
        tensors = {key: value[0] for key, value in input_dict.items()}
        if STATE_KEY not in tensors:  # an embedding or a norm: as it is, in the dtype asked for
            (tensor,) = tensors.values()
            skeleton = model.get_parameter_or_buffer(full_layer_name)  # type: ignore[operator]
            return {"weight": tensor.to(skeleton.dtype)}
        name = full_layer_name.removesuffix(".weight")
        state = {f"{name}.{key}": value for key, value in tensors.items()}
        make = functools.partial(NF4Weight.from_state_dict, state, f"{name}.weight")
        self.hf_quantizer.replace(model, name, make)
        if missing_keys is not None:
            missing_keys.discard(f"{name}.weight")
        return {}
