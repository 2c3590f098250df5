"""A model's files: where a name leads, whether the weights are whole, and writing so that they stay so.

Everything here is decided from names, sizes and safetensors headers (8 bytes of length, a JSON table,
then the tensors back to back), before a library maps a broken file and dies inside it. A header costs
a read of a few kilobytes, so every file of a checkpoint is checked, not the first alone.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from fastsft import builtin
from fastsft.disk import is_disk_full, sync
from fastsft.errors import UserError

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
# What a checkpoint needs; not the same weights a second time as .bin, .gguf or consolidated.safetensors.
HUB_FILES = ["*.safetensors", "*.json", "*.jinja", "*.model", "*.tiktoken", "*.txt", "*.py"]
HUB_EXCEPT = ["*/*", "consolidated*"]
# Options under which A and B alone do not say what the adapter computes.
REFUSED = (
    "use_dora", "lora_bias", "use_qalora", "use_bdlora", "layer_replication", "target_parameters",
    "alora_invocation_tokens", "velora_config", "kasa_config", "monteclora_config", "arrow_config",
)  # fmt: skip
# Initialisations that also change the base weights.
CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


def resolve_model(
    name: str, revision: str | None = None, *, files: Sequence[str] = HUB_FILES
) -> Path:
    """The local folder of `builtin:tiny`, a folder, or a hub id (downloaded or found in the cache).

    files: patterns of what is wanted from the hub.
    Raises UserError when there is none; `check_weights` says whether its weights can be read.
    """
    local = Path(name).expanduser()
    if name.startswith(builtin.PREFIX) or local.is_dir():
        if revision is not None:
            raise UserError(f"revision: {revision!r} belongs to a hub id; {name} is a folder here")
        return builtin.model_path(name) if name.startswith(builtin.PREFIX) else local
    if local.is_file():
        raise UserError(
            f"model: {name} is a file; give the folder with config.json and the weights"
        )
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise UserError(
            f"model: no folder {name}; give an existing folder or a hub id such as owner/name"
        )
    return _download(name, revision, files)


def _download(name: str, revision: str | None, files: Sequence[str]) -> Path:
    from huggingface_hub import errors as hub
    from huggingface_hub import snapshot_download

    at = f"{name}@{revision}" if revision else name
    try:
        return Path(
            snapshot_download(
                name, revision=revision, allow_patterns=list(files), ignore_patterns=HUB_EXCEPT
            )
        )
    except hub.GatedRepoError as error:
        reason = (
            f"it is gated: accept its licence at https://huggingface.co/{name}, then set HF_TOKEN or run "
            "`hf auth login`"
        )
        cause: Exception = error
    except hub.RevisionNotFoundError as error:
        reason, cause = "the hub has no such revision; look at its branches and commits", error
    except (hub.RepositoryNotFoundError, hub.HFValidationError) as error:
        reason = (
            "there is neither such a folder nor such a model on the hub (a private one needs HF_TOKEN or "
            "`hf auth login`); check the spelling"
        )
        cause = error
    except (hub.LocalEntryNotFoundError, hub.OfflineModeIsEnabled) as error:
        reason = (
            "it is not in the local cache and the hub cannot be reached (or HF_HUB_OFFLINE is set); go "
            "online once, or give a local folder"
        )
        cause = error
    except OSError as error:
        reason, cause = f"the download failed: {error}", error
    raise UserError(f"model: cannot get {at}: {reason}") from cause


def read_config(folder: Path) -> dict[str, Any]:
    """config.json as a dictionary. Raises UserError without one, saying what the folder is instead."""
    path = folder / "config.json"
    if not path.is_file():
        if (folder / ADAPTER_CONFIG).is_file():
            raise UserError(
                f"model: {folder} holds an adapter, not a model; give its base as model and this folder as "
                "adapter"
            )
        raise UserError(
            f"model: {folder} has no config.json; give a folder in transformers' layout"
        )
    return read_json(path)


def read_json(path: Path) -> dict[str, Any]:
    """The object in a file. Raises UserError where it is something else."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON: {error}; fetch the file again") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} holds {type(content).__name__}, expected a JSON object")
    return content


def check_weights(folder: Path) -> dict[str, Path]:
    """Every tensor of the checkpoint and the file it is in. Raises UserError where it is not whole."""
    if (folder / INDEX).is_file():
        return _check_shards(folder)
    if (folder / WEIGHTS).is_file():
        return dict.fromkeys(read_header(folder / WEIGHTS), folder / WEIGHTS)
    other = sorted(
        path.name for suffix in ("bin", "pt", "pth", "gguf") for path in folder.glob(f"*.{suffix}")
    )
    if other:
        raise UserError(
            f"model: {folder} holds weights only as {', '.join(other[:3])}; fastsft reads safetensors. "
            f"Convert once: AutoModelForCausalLM.from_pretrained({str(folder)!r})"
            ".save_pretrained(NEW_FOLDER), then "
            "copy the tokenizer files beside them"
        )
    raise UserError(
        f"model: {folder} has no weights (neither {WEIGHTS} nor {INDEX}); fetch the model again"
    )


def _check_shards(folder: Path) -> dict[str, Path]:
    weight_map = read_json(folder / INDEX).get("weight_map")
    if not isinstance(weight_map, dict):
        raise UserError(f"{folder / INDEX} has no weight_map; fetch the file again")
    headers: dict[str, dict[str, Any]] = {}
    for shard in sorted(set(weight_map.values())):
        if not (folder / shard).is_file():
            raise UserError(
                f"model: {folder / INDEX} names {shard}, which is missing; fetch the model again"
            )
        headers[shard] = read_header(folder / shard)
    for tensor, shard in weight_map.items():
        if tensor not in headers[shard]:
            raise UserError(
                f"model: {folder / INDEX} says that {tensor} is in {shard}, which does not hold it; the "
                "index and the files do not belong together"
            )
    return {tensor: folder / shard for shard, header in headers.items() for tensor in header}


def read_header(path: Path) -> dict[str, Any]:
    """The table of a safetensors file: tensor -> {dtype, shape, data_offsets}. UserError if cut short."""
    actual = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if actual < 8 or length > actual - 8:
            raise UserError(
                f"{path} is cut short or not safetensors: its header alone needs {8 + length} bytes, the "
                f"file has {actual}; fetch it again"
            )
        try:
            header = json.loads(file.read(length))
        except ValueError:
            raise UserError(
                f"{path} is not a safetensors file: no JSON header; fetch it again"
            ) from None
    header.pop("__metadata__", None)
    expected = 8 + length + max((entry["data_offsets"][1] for entry in header.values()), default=0)
    if actual != expected:
        raise UserError(
            f"{path} should have {expected} bytes and has {actual}: the download or copy was cut short; "
            "fetch it again"
        )
    return header


def read_adapter_config(folder: Path) -> dict[str, Any]:
    """adapter_config.json, checked to be a LoRA adapter that can be continued. Raises UserError if not."""
    path = folder / ADAPTER_CONFIG
    if not path.is_file():
        raise UserError(
            f"adapter {folder}: there is no {ADAPTER_CONFIG}; give a folder that PEFT or fastsft has written"
        )
    config = read_json(path)
    kind = config.get("peft_type")
    if kind != "LORA":
        raise UserError(f"{path}: peft_type is {kind!r}; only LORA adapters can be continued")
    for key in REFUSED:
        if config.get(key):
            raise UserError(f"{path}: {key} is {config[key]!r}; only plain LoRA can be continued")
    if config.get("bias", "none") != "none":
        raise UserError(
            f"{path}: bias is {config['bias']!r}, which trains base biases; only 'none' can be continued"
        )
    start = str(config.get("init_lora_weights", True)).lower()
    if start.startswith(CHANGES_BASE):
        raise UserError(
            f"{path}: init_lora_weights is {start!r}, which changes the base model; save it from PEFT with"
            " path_initial_model_for_weight_conversion, or merge it first"
        )
    for key, kinds in (("r", int), ("lora_alpha", (int, float))):
        if not isinstance(config.get(key), kinds) or config[key] <= 0:
            raise UserError(f"{path}: {key} is {config.get(key)!r}; expected a positive number")
    return config


def adapter_weights(folder: Path) -> Path:
    """The file of an adapter's tensors. Raises UserError where there is none."""
    path = folder / ADAPTER_WEIGHTS
    if not path.is_file():
        old = (folder / "adapter_model.bin").is_file()
        hint = (
            "it holds a pickle, which is not read; save it again from PEFT as safetensors"
            if old
            else "is it whole?"
        )
        raise UserError(f"adapter {folder}: there is no {ADAPTER_WEIGHTS}; {hint}")
    return path


@contextlib.contextmanager
def written_whole(folder: Path) -> Iterator[Path]:
    """A staging folder whose files appear in `folder` together at the end, or not at all.

    Each file is synced, then renamed, config.json last: a folder with a config.json is complete. A full
    disk becomes a UserError that names the folder, and what was there before is untouched.
    """
    staging = folder / ".writing"
    try:
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir(parents=True)
        yield staging
        for path in sorted(staging.iterdir(), key=lambda path: path.name == "config.json"):
            sync(path)
            os.replace(path, folder / path.name)
        sync(folder)
    except (OSError, SafetensorError) as error:
        if is_disk_full(error):
            raise UserError(
                f"no space left on the device of {folder}; free some, or give another output_dir"
            ) from error
        raise
    finally:
        shutil.rmtree(staging, ignore_errors=True)
