"""An adapter on disk, in PEFT's layout, both ways.

    adapter_config.json             the fields that every PEFT version knows, no others
    adapter_model.safetensors       base_model.model.<module>.lora_A.weight [r, K], .lora_B.weight [N, r]
                                    base_model.model.<module>.<weight>                modules_to_save
                                    base_model.model.<module>.token_adapter.trainable_tokens_delta [n, H]

Tensors are fp32 masters, so that an adapter read again continues exactly. Reading goes by the
tensors: they say which modules carry adapters and of which rank, and the config must agree; whatever
is left over, missing or of another shape is an error that names the module. What this trainer would
continue wrongly (DoRA, biases, adapters that are only right on a changed base) is refused rather
than read in part.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from fastsft.errors import UserError
from fastsft.model.context import StepContext
from fastsft.model.extras import (
    TokenRows,
    attach_token_rows,
    embedding_names,
    resize_vocabulary,
    saved_names,
    train_modules,
)
from fastsft.model.files import ADAPTER_CONFIG as CONFIG
from fastsft.model.files import ADAPTER_WEIGHTS as WEIGHTS
from fastsft.model.files import adapter_weights, read_adapter_config
from fastsft.model.lora import AdapterSettings, LoraSet, wrap_linear
from fastsft.model.targets import (
    ALL_LINEAR,
    as_written,
    embedding_weight,
    endings,
    ends_with,
    find_targets,
    is_linear,
    matches,
    module_numbers,
    pattern_value,
)

if TYPE_CHECKING:
    from fastsft.config import LoraConfig

PREFIX = "base_model.model."
TOKENS = ".token_adapter.trainable_tokens_delta"


# --- writing ---------------------------------------------------------------------------------------


def adapter_config(adapters: LoraSet, base_name: str, revision: str | None) -> dict[str, Any]:
    """adapter_config.json as a mapping."""
    settings = adapters.settings
    target = adapters.target
    if isinstance(target, str):
        # Names rather than the rule: PEFT reads "all-linear" and regular expressions in its own way on
        # models whose experts it reaches and we do not.
        target = as_written(adapters.model, adapters.layers)
    config: dict[str, Any] = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_name,
        "revision": revision,
        "auto_mapping": None,
        "inference_mode": True,
        "r": settings.r,
        "lora_alpha": int(settings.alpha)
        if settings.alpha == int(settings.alpha)
        else settings.alpha,
        "lora_dropout": settings.dropout,
        "use_rslora": settings.use_rslora,
        "use_dora": False,
        "target_modules": target,
        "rank_pattern": settings.rank_pattern,
        "alpha_pattern": settings.alpha_pattern,
        "layers_to_transform": None,
        "layers_pattern": None,
        "modules_to_save": sorted(adapters.saved) or None,
        "bias": "none",
        "fan_in_fan_out": any(isinstance(x.base, Conv1D) for x in adapters.layers.values()),
        "init_lora_weights": True,
    }
    if adapters.tokens is not None:
        config["trainable_token_indices"] = {
            name: adapters.tokens.ids for name in adapters.tokens.rows
        }
    return config


def adapter_tensors(adapters: LoraSet) -> dict[str, Tensor]:
    """Every trained tensor under PEFT's name, fp32, on the CPU, each with memory of its own."""
    tensors: dict[str, Tensor] = {}
    for name, layer in adapters.layers.items():
        tensors[f"{name}.lora_A.weight"] = layer.lora_A
        tensors[f"{name}.lora_B.weight"] = layer.lora_B
    for name, module in adapters.saved.items():
        for inner, tensor in {**module.parameters, **module.buffers}.items():
            tensors[f"{name}.{inner}"] = tensor
    if adapters.tokens is not None:
        for name, rows in adapters.tokens.rows.items():
            tensors[name + TOKENS] = rows
    return {
        PREFIX + name: tensor.detach().to("cpu", copy=True).contiguous()
        for name, tensor in tensors.items()
    }


def save_adapter(
    adapters: LoraSet, folder: Path, base_name: str, revision: str | None = None
) -> None:
    """Write config and tensors into `folder`. OSError passes through: the caller knows what it was saving."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file(adapter_tensors(adapters), folder / WEIGHTS, metadata={"format": "pt"})
    text = json.dumps(adapter_config(adapters, base_name, revision), indent=2, sort_keys=True)
    (folder / CONFIG).write_text(text + "\n", encoding="utf-8")


# --- reading ---------------------------------------------------------------------------------------


def read_adapter_tensors(folder: Path) -> dict[str, Tensor]:
    """The adapter's tensors, PEFT's prefix taken off. Raises UserError on a missing or damaged file."""
    path = adapter_weights(folder)
    try:
        with safe_open(path, framework="pt") as file:
            return {name.removeprefix(PREFIX): file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise UserError(f"{path}: damaged or cut short ({error}); fetch or save it again") from None


def load_adapter(
    folder: Path,
    model: PreTrainedModel,
    context: StepContext,
    *,
    expected: LoraConfig | None = None,
) -> LoraSet:
    """Freeze `model` and put the adapter in `folder` on it, ready to train on.

    `expected`: the run's own lora settings; those that were given and differ are an error. Raises
    UserError where the adapter cannot be continued or is not this model's.
    """
    config = read_adapter_config(folder)
    tensors = read_adapter_tensors(folder)
    settings = AdapterSettings(
        r=config["r"],
        alpha=config["lora_alpha"],
        dropout=config.get("lora_dropout") or 0.0,
        use_rslora=bool(config.get("use_rslora")),
        rank_pattern=config.get("rank_pattern") or {},
        alpha_pattern=config.get("alpha_pattern") or {},
    )
    names = _adapted_names(folder, model, config, tensors, settings)
    if expected is not None:
        _check_expected(folder, model, expected, settings, config, names)
    model.requires_grad_(False)
    rest = {
        k: v for k, v in tensors.items() if not k.endswith((".lora_A.weight", ".lora_B.weight"))
    }
    target = as_written(model, names)
    numbers = module_numbers(model)
    tokens = _load_token_rows(folder, model, config, rest)
    adapters = LoraSet(model, settings, target, {}, {}, tokens)
    _load_saved_modules(folder, adapters, config, rest)
    if rest:
        raise UserError(
            f"adapter {folder}: cannot continue the tensor {next(iter(rest))}; merge the adapter instead"
        )
    for name in names:
        layer = adapters.layers[name] = wrap_linear(model, name, settings, numbers[name], context)
        layer.lora_A.data.copy_(tensors[f"{name}.lora_A.weight"])
        layer.lora_B.data.copy_(tensors[f"{name}.lora_B.weight"])
    return adapters


def _adapted_names(
    folder: Path,
    model: PreTrainedModel,
    config: dict[str, Any],
    tensors: dict[str, Tensor],
    settings: AdapterSettings,
) -> list[str]:
    """Names of the adapted layers in the model's order, every shape checked."""
    modules = dict(model.named_modules())
    named = {
        key.removesuffix(".lora_A.weight") for key in tensors if key.endswith(".lora_A.weight")
    }
    for name in sorted(named):
        module = modules.get(name)
        if module is None or not is_linear(module):
            linears = ", ".join(endings(n for n, m in modules.items() if is_linear(m)))
            raise UserError(
                f"adapter {folder} is for another model: this one has no linear layer {name}"
                f" (it has {linears})"
            )
        a, b = tensors[f"{name}.lora_A.weight"], tensors.get(f"{name}.lora_B.weight")
        if b is None:
            raise UserError(
                f"adapter {folder}: {name} has lora_A but no lora_B; is the file whole?"
            )
        rank = pattern_value(settings.rank_pattern, name, settings.r)
        if a.shape[0] != rank or b.shape[1] != rank:
            raise UserError(
                f"adapter {folder}: {name} has rank {a.shape[0]} in {WEIGHTS} and {rank} in {CONFIG};"
                " the two files do not belong together"
            )
        shape = tuple(module.weight.shape)
        wanted = shape[::-1] if isinstance(module, Conv1D) else shape
        if (b.shape[0], a.shape[1]) != wanted:
            raise UserError(
                f"adapter {folder} is for another model: {name} is {list(wanted)} here"
                f" and [{b.shape[0]}, {a.shape[1]}] in the adapter"
            )
    if not named:
        raise UserError(f"adapter {folder}: {WEIGHTS} holds no lora_A tensors")
    _check_complete(folder, model, config, named)
    return [name for name in modules if name in named]


def _check_complete(
    folder: Path, model: PreTrainedModel, config: dict[str, Any], named: set[str]
) -> None:
    """Every layer that the config means must have its tensors: a file cut at a boundary reads well."""
    target, excluded = config.get("target_modules"), config.get("exclude_modules") or []
    if not target or config.get("layers_to_transform") is not None:
        return
    if isinstance(target, str) and target.lower() == ALL_LINEAR:
        meant = set(find_targets(model, target))
    else:
        meant = {
            name for name, m in model.named_modules() if is_linear(m) and matches(name, target)
        }
    whole = config.get("modules_to_save") or []
    for name in sorted(meant - named):
        inside = any(re.match(rf"(^|.*\.){entry}($|\..*)", name) for entry in whole)
        if not inside and not matches(name, excluded):
            raise UserError(
                f"adapter {folder}: {CONFIG} names {name}, which has no tensors in {WEIGHTS}; it is not "
                "whole, or it is for a model with fewer layers"
            )


def _load_token_rows(
    folder: Path, model: PreTrainedModel, config: dict[str, Any], rest: dict[str, Tensor]
) -> TokenRows | None:
    """Attach the rows of trainable tokens and take their tensors out of `rest`."""
    wanted = config.get("trainable_token_indices")
    places = [key.removesuffix(TOKENS) for key in rest if key.endswith(TOKENS)]
    if not wanted and not places:
        return None
    embedding, head, _ = embedding_names(model)
    lists = wanted if isinstance(wanted, dict) else {embedding: wanted}
    lists = {
        place: next((ids for key, ids in lists.items() if key and ends_with(place, [key])), None)
        for place in places
    }
    ids = next(iter(lists.values()), None)
    strange = (
        not ids or set(places) - {embedding, head} or any(other != ids for other in lists.values())
    )
    if strange:
        raise UserError(
            f"adapter {folder}: trainable_token_indices {wanted!r} do not fit the tensors of"
            f" {', '.join(places) or 'none'};"
            " only the same tokens in the embedding and the head can be continued"
        )
    assert ids is not None
    for place in places:
        shape = (len(ids), embedding_weight(model).shape[1])
        if tuple(rest[place + TOKENS].shape) != shape:
            raise UserError(
                f"adapter {folder} is for another model: {place}{TOKENS} is"
                f" {list(rest[place + TOKENS].shape)}, here it would be {list(shape)}"
            )
    resize_vocabulary(model, max(ids) + 1)
    tokens = attach_token_rows(model, list(ids), places)
    for place in places:
        tokens.rows[place].data.copy_(rest.pop(place + TOKENS))
    return tokens


def _saved_in(model: PreTrainedModel, config: dict[str, Any]) -> list[str]:
    """Whole names of modules_to_save. PEFT's endings need no dot: its "norm" means input_layernorm too."""
    entries = tuple(config.get("modules_to_save") or ())
    names = [name for name, _ in model.named_modules() if name.endswith(entries)] if entries else []
    return names or list(entries)


def _load_saved_modules(
    folder: Path, adapters: LoraSet, config: dict[str, Any], rest: dict[str, Tensor]
) -> None:
    """Make modules_to_save trainable with the adapter's values and take their tensors out of `rest`."""
    model, wanted = adapters.model, _saved_in(adapters.model, config)
    if not wanted:
        return
    embedding, head, tied = embedding_names(model)
    pair = [rest.get(f"{name}.weight") for name in (embedding, head)]
    one = tied and all(tensor is not None for tensor in pair) and torch.equal(*pair)  # type: ignore[arg-type]
    adapters.saved = train_modules(model, wanted, tie=one)
    if tied and not one and {embedding, head} & set(adapters.saved):
        adapters.notes.append(
            f"the adapter gives {embedding} and {head} separate weights: they are no longer tied"
        )
    for name, module in adapters.saved.items():
        for inner, parameter in module.parameters.items():
            tensor = rest.pop(f"{name}.{inner}", None)
            if tensor is None:
                raise UserError(
                    f"adapter {folder}: modules_to_save names {name}, but {name}.{inner} is missing"
                )
            if tensor.shape != parameter.shape:
                raise UserError(
                    f"adapter {folder} is for another model: {name}.{inner} is {list(parameter.shape)} here"
                    f" and {list(tensor.shape)} in the adapter"
                )
            parameter.data.copy_(tensor)
        for inner in module.buffers:
            rest.pop(f"{name}.{inner}", None)


def _check_expected(
    folder: Path,
    model: PreTrainedModel,
    expected: LoraConfig,
    settings: AdapterSettings,
    config: dict[str, Any],
    names: list[str],
) -> None:
    """lora.* keys the user has set must be the adapter's."""
    given = expected.model_fields_set
    for key in ("r", "alpha", "dropout", "use_rslora"):
        if key in given and getattr(expected, key) != getattr(settings, key):
            raise UserError(
                f"lora.{key} is {getattr(expected, key)}, but the adapter {folder} has"
                f" {getattr(settings, key)}; leave the key out to continue the adapter as it is"
            )
    if "modules_to_save" in given:
        ours = saved_names(model, expected.modules_to_save)
        theirs = saved_names(model, _saved_in(model, config))
        if set(ours) != set(theirs):
            raise UserError(
                f"lora.modules_to_save means {', '.join(ours) or 'nothing'}, but the adapter {folder} trains"
                f" {', '.join(theirs) or 'nothing'} whole; leave the key out to continue the adapter as it is"
            )
    if "target_modules" in given:
        meant = set(
            find_targets(
                model, expected.target_modules, kept_whole=config.get("modules_to_save") or []
            )
        )
        other = sorted(meant ^ set(names))
        if other:
            raise UserError(
                f"lora.target_modules and the adapter {folder} differ in {other[0]} ({len(other)}"
                " modules in all); leave the key out to continue the adapter as it is"
            )
