"""A folder becomes a model, and a model a folder.

Loading goes through transformers' `from_pretrained`, which knows each architecture's key names, tied
weights and computed buffers; what it would do quietly is made loud. It fills weights that are in no file
with random numbers and skips weights it has no place for: here both are errors that name the tensors.
Quantising happens tensor by tensor on the way (see quantizer.py), so the peak is the loaded model plus one
tensor. Weights that keep the file's dtype on the CPU are mapped from the file, not copied.

Saving is the reverse: shards of at most 5 GB are cast one at a time, so that writing bf16 from fp32 masters
needs no second model in memory, and appear in the folder together or not at all. `cast_model` does the
same from a folder that was saved before, without a model.
"""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from fastsft.disk import sync
from fastsft.errors import UserError
from fastsft.model.files import (
    INDEX,
    WEIGHTS,
    check_weights,
    read_config,
    resolve_model,
    written_whole,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from fastsft.model.quantizer import Progress

__all__ = [
    "cast_model",
    "is_prequantized",
    "kept_in_fp32",
    "load_model",
    "resolve_model",
    "save_model",
]

SHARD_BYTES = 5 * 10**9
SHOWN = 5  # tensor names in a message


def is_prequantized(folder: Path) -> bool:
    """Whether the checkpoint is in bitsandbytes' NF4. Raises UserError for every other quantisation."""
    config = read_config(folder)
    settings = config.get("quantization_config")
    if settings is None:
        settings = (config.get("text_config") or {}).get("quantization_config")
    if settings is None:
        return False
    four_bit = settings.get("load_in_4bit") or settings.get("_load_in_4bit")
    eight_bit = settings.get("load_in_8bit") or settings.get("_load_in_8bit")
    method = settings.get("quant_method") or (
        "bitsandbytes" if four_bit or eight_bit else "unknown"
    )
    if method != "bitsandbytes":
        found = f"by {method}"
    elif not four_bit:
        found = "by bitsandbytes to 8 bits (int8)"
    elif (kind := settings.get("bnb_4bit_quant_type", "fp4")) != "nf4":
        found = f"by bitsandbytes to {kind}"
    else:
        return True
    raise UserError(
        f"model: {folder} is quantised {found}; fastsft trains on bf16, fp16 or fp32 weights and on "
        "bitsandbytes' nf4. Use the original checkpoint"
    )


def load_model(
    folder: Path,
    *,
    quantize: bool,
    dtype: torch.dtype | None,
    device: torch.device | str = "cpu",
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> PreTrainedModel:
    """The causal language model in `folder`, on `device`, in evaluation mode.

    dtype: of every weight that is not quantised; None keeps the checkpoint's. quantize: every nn.Linear
    but the head becomes an NF4Linear; `progress(done, all)` is told of each. A checkpoint that
    bitsandbytes quantised keeps its 4-bit values and needs quantize=True.
    Raises UserError for a checkpoint that is not whole, has other tensors than the model, is quantised in
    another way, or needs code that `trust_remote_code` does not allow.
    """
    prequantized = is_prequantized(folder)
    if prequantized and not quantize:
        raise UserError(
            f"model: {folder} is quantised to 4 bits already; use method: qlora, or the original checkpoint"
        )
    check_weights(folder)
    device = torch.device(device)
    options: dict[str, Any] = {
        "config": model_config(folder, trust_remote_code),
        "trust_remote_code": trust_remote_code,
        "dtype": "auto" if dtype is None else dtype,
    }
    if quantize:
        from fastsft.model.quantizer import METHOD, NF4Config

        how: dict[str, Any] = {"quant_method": METHOD, "device": device, "progress": progress}
        if prequantized:  # transformers takes what the file says over what it is told
            options["config"].quantization_config = how
        else:
            options["quantization_config"] = NF4Config(**how)
    model, found = _from_pretrained(folder, options)
    problems: list[str] = []
    if quantize:
        problems = model.hf_quantizer.problems
        if model.hf_quantizer.done == 0 and not problems:
            raise UserError(
                f"model: config.json in {folder} says the weights are in 4 bits, and none of them is; "
                "take quantization_config out of it, or fetch the 4-bit files"
            )
        model.hf_quantizer.forget(model)
    _refuse_differences(folder, found, problems)
    return model.to(device)


def _from_pretrained(folder: Path, options: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """transformers' model and what it found different between the files and the model."""
    from transformers import AutoModelForCausalLM

    with _quiet_transformers():
        try:
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                folder,
                use_safetensors=True,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # they are refused here, with their names
                **options,
            )
        except (ValueError, ImportError) as error:
            raise UserError(f"model: transformers cannot load {folder}: {error}") from error
    return loaded


def model_config(folder: Path, trust_remote_code: bool) -> Any:
    """transformers' object for config.json in `folder`. Raises UserError where it cannot be read."""
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except (ValueError, KeyError, ImportError) as error:
        raise UserError(
            f"model: transformers cannot read {folder / 'config.json'}: {error}"
        ) from error


def _refuse_differences(folder: Path, found: dict[str, Any], problems: list[str]) -> None:
    """A weight nobody loaded is random; a weight nobody wanted is a sign of the wrong architecture."""
    sizes = [
        f"{name} is {tuple(got)} in the file, config.json asks for {tuple(want)}"
        for name, got, want in sorted(found["mismatched_keys"])
    ]
    for what, names in (
        ("weights of another size", problems + sizes),
        ("no values for", sorted(found["missing_keys"])),
        ("tensors the model has no place for", sorted(found["unexpected_keys"])),
    ):
        if names:
            more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
            raise UserError(
                f"model: {folder} has {what}: {', '.join(names[:SHOWN])}{more}; the weights and config.json "
                "do not belong together"
            )


@contextlib.contextmanager
def _quiet_transformers() -> Iterator[None]:
    """No progress bar and no loading report on stderr: what matters of them is raised or shown by us."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def save_model(
    model: PreTrainedModel,
    folder: Path,
    dtype: torch.dtype,
    *,
    stop_ids: Sequence[int] = (),
    max_shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write `model` to `folder` in transformers' layout: config, generation config, safetensors shards.

    Floating weights are cast to `dtype`, but for those the architecture keeps in fp32. `stop_ids`: the
    tokens that end a generation. A model with NF4 layers cannot be saved so (merge decodes them first).
    Raises UserError when the disk is full; nothing half written is left, an earlier save stays whole.
    """
    state, tied = _state_to_save(model)
    fp32 = kept_in_fp32(model)
    dtypes = {name: _saved_dtype(name, tensor, dtype, fp32) for name, tensor in state.items()}
    shards: list[list[str]] = [[]]
    filled = total = 0
    for name, tensor in state.items():
        size = tensor.numel() * dtypes[name].itemsize
        if shards[-1] and filled + size > max_shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
        total += size
    files = [
        WEIGHTS if len(shards) == 1 else f"model-{i:05d}-of-{len(shards):05d}.safetensors"
        for i in range(1, len(shards) + 1)
    ]
    with written_whole(folder) as staging:
        for file, names in zip(files, shards, strict=True):
            cast = {n: state[n].to("cpu", dtypes[n]).contiguous() for n in names}
            save_file(cast, staging / file, metadata={"format": "pt"})
        if len(shards) > 1:
            weight_map = {n: file for file, names in zip(files, shards, strict=True) for n in names}
            _write_index(staging, weight_map, total)
        _write_configs(model, staging, dtype, tied, stop_ids)
    _remove_older_weights(folder, set(files))


def cast_model(
    source: Path, target: Path, dtype: torch.dtype, *, fp32: Collection[str] = ()
) -> None:
    """Copy a model's folder with its floating weights cast to `dtype`; all other files as they are.

    fp32: parts of names whose tensors keep their dtype (`kept_in_fp32`). One shard is in memory at a time
    and no model is built. Raises UserError where `source` is not whole or the disk is full; the files
    appear in `target` together or not at all.
    """
    weight_map = check_weights(source)
    files = sorted(set(weight_map.values()))
    total = 0
    with written_whole(target) as staging:
        for path in source.iterdir():
            if path.is_file() and path not in files and path.name != INDEX:
                shutil.copyfile(path, staging / path.name)
        config = read_config(source) | {"dtype": str(dtype).removeprefix("torch.")}
        _write_config(staging, config)
        for path in files:
            cast: dict[str, Tensor] = {}
            with safe_open(path, "pt") as file:
                for name in (name for name, place in weight_map.items() if place == path):
                    tensor = file.get_tensor(name)
                    cast[name] = tensor.to(_saved_dtype(name, tensor, dtype, fp32))
                    total += cast[name].nbytes
            save_file(cast, staging / path.name, metadata={"format": "pt"})
        if len(files) > 1:
            _write_index(staging, {name: path.name for name, path in weight_map.items()}, total)
    _remove_older_weights(target, {path.name for path in files})


def kept_in_fp32(model: PreTrainedModel) -> tuple[str, ...]:
    """Parts of names whose weights the architecture keeps in fp32 whatever the rest is."""
    return tuple(getattr(model, "_keep_in_fp32_modules_strict", None) or ())


def _saved_dtype(
    name: str, tensor: Tensor, dtype: torch.dtype, fp32: Collection[str]
) -> torch.dtype:
    if not tensor.is_floating_point() or any(part in fp32 for part in name.split(".")):
        return tensor.dtype
    return dtype


def _write_index(folder: Path, weight_map: dict[str, str], total: int) -> None:
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _write_config(folder: Path, config: dict[str, Any]) -> None:
    text = json.dumps(config, indent=2, sort_keys=True)
    (folder / "config.json").write_text(text + "\n", encoding="utf-8")


def _state_to_save(model: PreTrainedModel) -> tuple[dict[str, Tensor], bool]:
    """The tensors under the checkpoint's own names, tied ones once, and whether all ties still hold."""
    from transformers.core_model_loading import revert_weight_conversion

    state = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    holds = True
    for name, source in model.all_tied_weights_keys.items():
        if name not in state or source not in state:
            continue
        if state[name].data_ptr() == state[source].data_ptr():
            del state[name]
        else:
            holds = False  # for instance a head that was trained apart from the embedding
    return revert_weight_conversion(model, state), holds


def _write_configs(
    model: PreTrainedModel, staging: Path, dtype: torch.dtype, tied: bool, stop_ids: Sequence[int]
) -> None:
    config = json.loads(model.config.to_json_string(use_diff=True))
    config["dtype"] = str(dtype).removeprefix("torch.")
    config["architectures"] = [type(model).__name__]
    if not tied:
        config["tie_word_embeddings"] = False
    _write_config(staging, config)
    if (generation := model.generation_config) is not None:
        if stop_ids:
            generation.eos_token_id = list(stop_ids)
        # Not save_pretrained, which refuses settings that many published models have.
        generation.to_json_file(staging / "generation_config.json")
    if getattr(model.config, "auto_map", None):
        for code in Path(model.name_or_path or ".").glob("*.py"):
            shutil.copyfile(code, staging / code.name)


def _remove_older_weights(folder: Path, keep: set[str]) -> None:
    """Shards of an earlier, differently divided save would be read, or at least puzzle, later on."""
    for path in folder.glob("model*.safetensors"):
        if path.name not in keep:
            path.unlink()
    if len(keep) == 1:
        (folder / INDEX).unlink(missing_ok=True)
    sync(folder)
