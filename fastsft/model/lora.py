"""Low-rank adapters on a frozen model.

    y = W x + b + s · B A drop(x)        s = alpha / r, with rsLoRA alpha / sqrt(r)

A [r, K] starts as PEFT starts it (uniform in ±1/sqrt(K)), B [N, r] at zero, so training starts from the
base model exactly. A and B are fp32 masters; the product runs in the activations' dtype. A's start is drawn
from a generator keyed by (seed, module name), so it depends neither on the order of modules nor on which
others carry adapters; dropout is keyed by (seed, step, document, position, module) for the same reason
(context.py).

Fused weights such as Phi-3's qkv_proj are one linear layer with one adapter. What trains beside the adapters
(whole modules, rows of new tokens) is in extras.py; the files on disk are in adapter.py.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from fastsft_kernels import DropoutKey, NF4Weight, lora_linear
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from fastsft.errors import UserError
from fastsft.model.context import StepContext
from fastsft.model.extras import TokenRows, TrainedModule, train_modules, train_token_rows
from fastsft.model.quant import NF4Linear
from fastsft.model.targets import Linear, ends_with, find_targets, module_numbers, pattern_value

if TYPE_CHECKING:
    from fastsft.config import LoraConfig


class LoraLinear(nn.Module):
    """A frozen linear layer with an adapter: x [..., K] -> [..., N] in x's dtype (or autocast's)."""

    def __init__(
        self,
        base: Linear,
        *,
        r: int,
        alpha: float,
        dropout: float,
        use_rslora: bool,
        module_index: int,
        context: StepContext,
    ) -> None:
        super().__init__()
        self.base = base
        if isinstance(base, Conv1D):
            self.in_features, self.out_features = base.nx, base.nf
        else:
            self.in_features, self.out_features = base.in_features, base.out_features
        self.r, self.alpha, self.dropout, self.use_rslora = r, alpha, dropout, use_rslora
        self.scaling = alpha / math.sqrt(r) if use_rslora else alpha / r
        self.module_index = module_index
        self.context = context
        device = next(t.device for t in (*base.parameters(), *base.buffers()))
        self.lora_A = nn.Parameter(torch.zeros(r, self.in_features, device=device))
        self.lora_B = nn.Parameter(torch.zeros(self.out_features, r, device=device))

    @property
    def weight(self) -> Tensor:
        """The base weight (decoded if it is 4-bit), for model code that reads a layer's weight or dtype."""
        return self.base.weight

    @property
    def bias(self) -> Tensor | None:
        return self.base.bias

    def base_weight(self) -> Tensor | NF4Weight:
        """The base weight [N, K] as the kernels take it."""
        if isinstance(self.base, NF4Linear):
            return self.base.nf4
        return self.base.weight.t() if isinstance(self.base, Conv1D) else self.base.weight

    def delta(self) -> Tensor:
        """s · B A, float32 [N, K]: what merging adds to the base weight."""
        return self.scaling * (self.lora_B.detach() @ self.lora_A.detach())

    def forward(self, x: Tensor) -> Tensor:
        key = self._dropout_key(x) if self.training and self.dropout > 0 else None
        return lora_linear(
            x,
            self.base_weight(),
            self.lora_A,
            self.lora_B,
            self.scaling,
            bias=self.base.bias,
            dropout_p=self.dropout,
            training=self.training,
            dropout_key=key,
        )

    def _dropout_key(self, x: Tensor) -> DropoutKey:
        context = self.context
        rows = x.numel() // self.in_features
        if context.row_key is None or context.row_key.numel() != rows:
            known = "no" if context.row_key is None else context.row_key.numel()
            raise UserError(
                f"lora.dropout: linear layer number {self.module_index} sees {rows} rows where the"
                f" batch has {known} tokens (experts that see a part of the tokens?), so its dropout"
                " cannot be keyed by token; set lora.dropout to 0 or leave it out of"
                " lora.target_modules"
            )
        return DropoutKey(context.seed, context.step, self.module_index, context.row_key)

    def extra_repr(self) -> str:
        return f"r={self.r}, scaling={self.scaling:g}, dropout={self.dropout:g}"


@dataclass(frozen=True)
class AdapterSettings:
    """An adapter's shape, in PEFT's terms; the patterns give single modules another r or alpha."""

    r: int
    alpha: float
    dropout: float = 0.0
    use_rslora: bool = False
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, float] = field(default_factory=dict)


@dataclass
class LoraSet:
    """Everything that trains on a frozen model, by the names the modules had before."""

    model: PreTrainedModel
    settings: AdapterSettings
    target: str | list[str]  # as it stands in adapter_config.json
    layers: dict[str, LoraLinear]
    saved: dict[str, TrainedModule]
    tokens: TokenRows | None = None
    notes: list[str] = field(default_factory=list)

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Each trained parameter once, fp32, under a stable name."""
        seen: set[int] = set()
        for name, parameter in self._all_parameters():
            if id(parameter) not in seen:  # a tied head and its embedding share one
                seen.add(id(parameter))
                yield name, parameter

    def _all_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        for name, layer in self.layers.items():
            yield f"{name}.lora_A", layer.lora_A
            yield f"{name}.lora_B", layer.lora_B
        for name, module in self.saved.items():
            for inner, parameter in module.parameters.items():
                yield f"{name}.{inner}", parameter
        if self.tokens is not None:
            for name, rows in self.tokens.rows.items():
                yield f"{name}.token_rows", rows

    def save(self, folder: Path, base_name: str, revision: str | None = None) -> None:
        """Write adapter_config.json and adapter_model.safetensors as PEFT reads them."""
        from fastsft.model.adapter import save_adapter

        save_adapter(self, folder, base_name, revision)


def keyed_generator(seed: int, name: str) -> torch.Generator:
    """A CPU generator that depends on (seed, name) alone."""
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def wrap_linear(
    model: PreTrainedModel, name: str, settings: AdapterSettings, number: int, context: StepContext
) -> LoraLinear:
    """Put a LoraLinear in the place of the linear layer `name`."""
    base = model.get_submodule(name)
    layer = LoraLinear(
        base,  # type: ignore[arg-type]  # find_targets returns linear layers only
        r=pattern_value(settings.rank_pattern, name, settings.r),
        alpha=pattern_value(settings.alpha_pattern, name, settings.alpha),
        dropout=settings.dropout,
        use_rslora=settings.use_rslora,
        module_index=number,
        context=context,
    )
    layer.train(base.training)
    model.set_submodule(name, layer)
    return layer


def add_adapters(
    model: PreTrainedModel,
    lora: LoraConfig,
    *,
    seed: int,
    context: StepContext,
    new_token_ids: Sequence[int] = (),
) -> LoraSet:
    """Freeze `model` and add fresh adapters to it, in place.

    `new_token_ids`: tokens whose rows of the embedding and the head train (`new_tokens: train`); the
    vocabulary is enlarged where they lie beyond it. Raises UserError on targets that are not there.
    """
    settings = AdapterSettings(lora.r, lora.alpha, lora.dropout, lora.use_rslora)
    target: str | list[str] = lora.target_modules
    names = find_targets(model, target, kept_whole=lora.modules_to_save)
    numbers = module_numbers(model)
    model.requires_grad_(False)
    saved = train_modules(model, lora.modules_to_save)
    notes = _tied_note(lora.modules_to_save, saved)
    tokens = train_token_rows(model, new_token_ids, trained_whole=saved) if new_token_ids else None
    layers = {name: wrap_linear(model, name, settings, numbers[name], context) for name in names}
    for name, layer in layers.items():
        start = torch.empty(layer.r, layer.in_features)
        nn.init.kaiming_uniform_(start, a=math.sqrt(5), generator=keyed_generator(seed, name))
        layer.lora_A.data.copy_(start)
    return LoraSet(model, settings, target, layers, saved, tokens, notes)


def _tied_note(wanted: Sequence[str], saved: Collection[str]) -> list[str]:
    unasked = [name for name in saved if not ends_with(name, wanted)]
    return [
        f"{name} shares its weight with a trained module: both train, as one" for name in unasked
    ]


def trainable_summary(model: nn.Module) -> tuple[int, int]:
    """(parameters that train, parameters in all); a 4-bit weight counts as many as it stands for."""
    trained = total = 0
    for parameter in model.parameters():
        total += parameter.numel()
        trained += parameter.numel() if parameter.requires_grad else 0
    for module in model.modules():
        if isinstance(module, NF4Linear):
            total += module.in_features * module.out_features
    return trained, total
