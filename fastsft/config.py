"""The documented surface: every key a run understands, its default, and what refuses to work together.

A config is YAML plus `key=value` words (nested keys with dots, values read as YAML). Nothing is
ignored: an unknown key is an error that suggests the nearest known one and knows what other trainers
call it; a key given twice is an error; a key of the wrong type is an error. The same object, written
back by `to_yaml`, repeats the run. This module imports no other part of fastsft but the error.
"""

from __future__ import annotations

import difflib
import re
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from fastsft.errors import UserError

Positive = Annotated[int, Field(gt=0)]
Share = Annotated[float, Field(ge=0.0, le=1.0)]
WARMUP_RATIO, DECAY_RATIO = 0.03, 0.2
PAIRS = (("batch_size", "batch_tokens"), ("epochs", "max_steps"))  # exactly one of each
SIZE = re.compile(r"^(\d+(?:\.\d+)?)\s*GB$", re.IGNORECASE)
# Arguments of a chat template that the trainer itself gives it.
TEMPLATE_ARGUMENTS = ("messages", "tools", "add_generation_prompt", "self")


def size_in_bytes(text: str) -> int:
    """ "24GB" -> 24 · 10^9. Raises ValueError for anything else."""
    match = SIZE.match(text)
    if match is None:
        raise ValueError(f"expected a size such as 24GB (GB is 10^9 bytes); got {text!r}")
    return int(float(match[1]) * 10**9)


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, validate_assignment=True)


class LoraConfig(_Strict):
    """Adapter shape. `target_modules`: all-linear, one regex, or a list of module names."""

    r: Positive = 16
    alpha: Annotated[float, Field(gt=0)] = 32
    dropout: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    target_modules: str | list[str] = "all-linear"
    use_rslora: bool = False
    modules_to_save: list[str] = []


class DataSource(_Strict):
    """One file, folder or hub id. `columns`: our field -> its column; `roles`: its role -> ours."""

    path: str
    name: str | None = None
    split: str | None = None
    revision: str | None = None
    format: Literal["auto", "alpaca", "sharegpt", "messages", "completion", "text"] = "auto"
    columns: dict[str, str] | None = None
    roles: dict[str, str] | None = None
    max_rows: Positive | None = None
    weight: Annotated[float, Field(gt=0)] = 1.0


class Config(_Strict):
    """A whole run. Defaults are the documented ones; see README for what each key does."""

    model: str
    revision: str | None = None
    tokenizer: str | None = None
    trust_remote_code: bool = False
    method: Literal["lora", "qlora", "full"] = "qlora"
    adapter: str | None = None
    engine: Literal["auto", "fast", "compat"] = "auto"
    lora: LoraConfig = LoraConfig()
    new_tokens: Literal["error", "train"] = "error"

    data: list[DataSource]
    eval_data: list[DataSource] | None = None
    val_size: Annotated[float, Field(ge=0)] = 0
    on_bad_row: Literal["error", "drop"] = "error"
    streaming: bool = False
    shuffle: bool = True
    chat_template: str = "auto"
    chat_template_kwargs: dict[str, Any] = {}
    date: str = "auto"
    system: str | None = None
    stop: str | list[str] = "auto"
    train_on: Literal["assistant", "last", "all"] = "assistant"
    multi_turn: Literal["auto", "joint", "per_turn"] = "auto"
    max_length: Positive = 4096
    overlong: Literal["auto", "drop", "truncate", "split", "error"] = "auto"

    batch_size: Positive | None = 64
    batch_tokens: Positive | None = None
    micro_batch_tokens: Positive | Literal["auto"] = "auto"
    activations: Literal["auto", "keep", "recompute_mlp", "recompute_block", "offload"] = "auto"
    epochs: Annotated[float, Field(gt=0)] | None = 1
    max_steps: Positive | None = None
    learning_rate: Annotated[float, Field(gt=0)] | Literal["auto"] = "auto"
    lr_scheduler: Literal["cosine", "linear", "constant", "wsd"] = "cosine"
    warmup_ratio: Share = WARMUP_RATIO
    warmup_steps: Annotated[int, Field(ge=0)] | None = None
    min_lr_ratio: Share = 0.0
    decay_ratio: Share = DECAY_RATIO
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    max_grad_norm: Annotated[float, Field(gt=0)] | None = 1.0
    optimizer: Literal["adamw", "adamw_8bit", "paged_adamw_8bit"] = "adamw"
    masters: Literal["fp32", "bf16"] = "fp32"
    update_in_backward: bool = False
    dtype: Literal["auto", "bf16", "fp32"] = "auto"
    vram: str = "auto"
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0

    logging_steps: Positive = 1
    eval_steps: Positive = 100
    save_steps: Positive = 100
    save_total_limit: Positive = 3
    early_stopping_patience: Positive | None = None
    sample_prompts: list[str] = []
    resume: str | None = None
    output_dir: str = "auto"
    run_name: str | None = None
    report_to: list[Literal["tensorboard", "wandb"]] = []

    @field_validator("data", "eval_data", mode="before")
    @classmethod
    def _one_path_is_a_list_of_one(cls, value: Any) -> Any:
        if isinstance(value, (str, dict)):
            value = [value]
        if isinstance(value, list):
            value = [{"path": item} if isinstance(item, str) else item for item in value]
        return value

    @field_validator("vram")
    @classmethod
    def _vram_is_a_size(cls, value: str) -> str:
        if value != "auto" and not SIZE.match(value):
            raise ValueError('expected "auto" or a size such as 24GB (GB is 10^9 bytes)')
        return value

    @field_validator("date")
    @classmethod
    def _date_is_iso(cls, value: str) -> str:
        if value != "auto" and not re.fullmatch(r"\d{4}-\d{2}-\d{2}", value):
            raise ValueError('expected "auto" or a date such as 2026-01-31')
        return value

    @field_validator("chat_template_kwargs")
    @classmethod
    def _kwargs_leave_ours_alone(cls, value: dict[str, Any]) -> dict[str, Any]:
        taken = [name for name in TEMPLATE_ARGUMENTS if name in value]
        if taken:
            raise ValueError(
                f"{', '.join(taken)} cannot be given; the trainer sets it for each row"
            )
        return value

    @field_validator("lora", mode="before")
    @classmethod
    def _no_adapter_settings(cls, value: Any) -> Any:
        return {} if value is None else value

    @model_validator(mode="before")
    @classmethod
    def _one_of_each_pair(cls, values: Any) -> Any:
        """A default gives way to its alternative when only the alternative is given."""
        if not isinstance(values, dict):
            return values
        values = dict(values)
        for default, other in PAIRS:
            if values.get(other) is not None and default not in values:
                values[default] = None
        return values

    @model_validator(mode="after")
    def _keys_that_exclude_each_other(self) -> Config:
        for a, b in PAIRS:
            if (getattr(self, a) is None) == (getattr(self, b) is None):
                raise ValueError(f"exactly one of {a} and {b} must be set")
        if {"warmup_ratio", "warmup_steps"} <= self.model_fields_set and (
            self.warmup_steps is not None and self.warmup_ratio != WARMUP_RATIO
        ):
            raise ValueError("give warmup_ratio or warmup_steps, not both")
        if not self.data:
            raise ValueError("data: the list is empty; name at least one file or hub id")
        if self.eval_data is not None and self.val_size:
            raise ValueError("give eval_data or val_size, not both")
        if self.val_size >= 1 and self.val_size != int(self.val_size):
            raise ValueError("val_size below 1 is a share; from 1 on it is a number of rows")
        if self.streaming and self.max_steps is None:
            raise ValueError("streaming: true has no last row to count to; set max_steps")
        if self.streaming and self.val_size:
            raise ValueError(
                "streaming: true cannot set rows aside; give eval_data instead of val_size"
            )
        if self.streaming and self.batch_tokens:
            raise ValueError(
                "streaming: true counts examples; give batch_size instead of batch_tokens"
            )
        if self.early_stopping_patience and not self.eval_data and not self.val_size:
            raise ValueError("early_stopping_patience needs eval_data or val_size")
        if self.lr_scheduler == "constant" and self.min_lr_ratio:
            raise ValueError("min_lr_ratio: a constant learning rate never falls; leave it out")
        if self.lr_scheduler != "wsd" and self.decay_ratio != DECAY_RATIO:
            raise ValueError(f"decay_ratio belongs to lr_scheduler: wsd, not {self.lr_scheduler}")
        if self.method == "full" and self.lora != LoraConfig():
            raise ValueError("lora settings have no meaning with method: full; leave them out")
        if self.method == "full" and self.adapter:
            raise ValueError(
                "adapter belongs to method lora or qlora; merge it first to train in full"
            )
        if self.masters == "bf16" and (self.method != "full" or self.engine == "compat"):
            raise ValueError(
                "masters: bf16 is for method: full on the fast engine (adapters keep fp32 masters)"
            )
        if self.update_in_backward and (self.masters != "bf16" or self.max_grad_norm is not None):
            raise ValueError(
                "update_in_backward takes each gradient before the others are known: it needs masters: bf16 "
                "and max_grad_norm: null"
            )
        return self

    @property
    def has_eval(self) -> bool:
        return bool(self.eval_data) or self.val_size > 0

    def to_yaml(self) -> str:
        """Every key, in the documented order; reading it back gives an equal Config."""
        return yaml.safe_dump(self.model_dump(), sort_keys=False, allow_unicode=True)


# What other trainers call our keys, or why there is no such key here.
PEERS_NAMES = {
    "per_device_train_batch_size": "batch_size (examples per optimizer step, whatever the memory)",
    "gradient_accumulation_steps": "batch_size (examples per optimizer step; accumulation follows from it)",
    "micro_batch_size": "batch_size (examples per optimizer step) and micro_batch_tokens",
    "per_device_eval_batch_size": "micro_batch_tokens (evaluation is weighted by token, whatever the batch)",
    "num_train_epochs": "epochs",
    "num_epochs": "epochs",
    "sequence_len": "max_length",
    "max_seq_length": "max_length",
    "cutoff_len": "max_length",
    "excess_length_strategy": "overlong",
    "lora_r": "lora.r",
    "lora_rank": "lora.r",
    "lora_alpha": "lora.alpha",
    "lora_dropout": "lora.dropout",
    "lora_target": "lora.target_modules",
    "lora_target_modules": "lora.target_modules",
    "lora_target_linear": "lora.target_modules: all-linear",
    "lora_modules_to_save": "lora.modules_to_save",
    "use_rslora": "lora.use_rslora",
    "load_in_4bit": "method: qlora",
    "load_in_8bit": "method: qlora (4-bit NF4; there is no 8-bit base)",
    "quantization_bit": "method: qlora",
    "finetuning_type": "method",
    "val_set_size": "val_size",
    "eval_dataset": "eval_data",
    "test_datasets": "eval_data",
    "datasets": "data",
    "dataset": "data",
    "dataset_name": "data",
    "train_file": "data",
    "base_model": "model",
    "model_name_or_path": "model",
    "adapter_name_or_path": "adapter",
    "lora_model_dir": "adapter",
    "packing": "nothing: packing is always on and never changes the result",
    "sample_packing": "nothing: packing is always on and never changes the result",
    "padding_free": "nothing: there is no padding",
    "assistant_only_loss": "train_on: assistant (the default)",
    "completion_only_loss": "train_on: assistant (the default)",
    "train_on_inputs": "train_on: all",
    "train_on_prompt": "train_on: all",
    "mask_history": "train_on: last",
    "roles_to_train": "train_on: assistant or all; `train: false` on a message leaves it out",
    "lr": "learning_rate",
    "lr_scheduler_type": "lr_scheduler",
    "optim": "optimizer",
    "bf16": "dtype: bf16",
    "fp16": "dtype: bf16 (fp16 training is not offered: it needs loss scaling and gains nothing)",
    "gradient_checkpointing": "activations: recompute_block",
    "gradient_clipping": "max_grad_norm",
    "template": "chat_template",
    "warmup": "warmup_ratio or warmup_steps",
    "max_samples": "max_rows on a data entry",
    "num_workers": "nothing: rows are prepared on every core and memory-mapped",
    "dataset_num_proc": "nothing: rows are prepared on every core",
    "resume_from_checkpoint": "resume",
    "logging_dir": "output_dir",
    "wandb_project": "report_to: [wandb] and the WANDB_PROJECT variable",
    "save_strategy": "save_steps",
    "eval_strategy": "eval_steps",
    "load_best_model_at_end": "nothing: the best checkpoint is always kept",
    "attn_implementation": "nothing: attention is ours on every engine",
    "flash_attention": "nothing: attention is ours on every engine",
}


class _Loader(yaml.SafeLoader):
    """YAML 1.1 as PyYAML reads it; but 2e-4 is a number, 2026-01-31 is text, a repeated key an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key_node, _ in node.value:
            key = getattr(key_node, "value", None)
            if isinstance(key, str) and key in seen:
                line = key_node.start_mark.line + 1
                raise UserError(f"line {line}: the key {key!r} is given twice; keep one of them")
            if isinstance(key, str):
                seen.add(key)
        return super().construct_mapping(node, deep)


_Loader.yaml_implicit_resolvers = {
    first: [(tag, form) for tag, form in resolvers if not tag.endswith(":timestamp")]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(?:\d+\.?\d*|\.\d+)[eE][-+]?\d+$"),
    list("-+0123456789."),
)


def _parse(text: str, where: str) -> Any:
    try:
        return yaml.load(text, Loader=_Loader)  # a SafeLoader underneath
    except UserError as error:
        raise UserError(f"{where}: {error}") from None
    except yaml.YAMLError as error:
        raise UserError(f"{where}: not valid YAML: {' '.join(str(error).split())}") from None


def _set(values: dict[str, Any], dotted: str, value: Any) -> None:
    *parents, leaf = dotted.split(".")
    for parent in parents:
        inner = values.setdefault(parent, {})
        if not isinstance(inner, dict):
            raise UserError(
                f"{dotted}={value}: {parent} is {inner!r}, which has no keys inside; set {parent} whole"
            )
        values = inner
    values[leaf] = value


def _unknown_key(path: str, known: list[str]) -> str:
    leaf = path.rsplit(".", 1)[-1]
    if leaf in PEERS_NAMES:
        return f"unknown key {path!r}: here it is {PEERS_NAMES[leaf]}"
    near = difflib.get_close_matches(leaf, known, n=1, cutoff=0.6)
    hint = f"did you mean {near[0]!r}?" if near else f"known keys: {', '.join(known)}"
    return f"unknown key {path!r}: {hint}"


def _fields_at(location: tuple[int | str, ...]) -> list[str]:
    parent = next((part for part in location[:-1] if isinstance(part, str)), None)
    models: dict[str, type[BaseModel]] = {
        "lora": LoraConfig,
        "data": DataSource,
        "eval_data": DataSource,
    }
    return list(models.get(parent or "", Config).model_fields)


def _explain(error: ValidationError, where: str) -> UserError:
    """All of pydantic's findings as sentences of ours, one a line."""
    lines: dict[str, None] = {}
    for item in error.errors():
        # A union's members appear as extra path parts such as "int"; only real keys are kept.
        location = [
            str(p) for p in item["loc"] if isinstance(p, int) or re.fullmatch(r"[a-z][a-z0-9_]*", p)
        ]
        location = [
            p for p in location if p not in ("int", "float", "str", "bool", "constrained-int")
        ]
        path = ".".join(location)
        if item["type"] == "extra_forbidden":
            lines[_unknown_key(path, _fields_at(item["loc"]))] = None
        elif item["type"] == "missing":
            lines[f"{path}: this key is required; add `{path}: ...`"] = None
        elif item["type"] == "value_error":
            text = item["msg"].removeprefix("Value error, ")
            lines[f"{path}: {text}" if path else text] = None
        else:
            expected = item["msg"].removeprefix("Input should be ")
            if item["type"] == "model_type":
                expected = f"key: value pairs of {', '.join(_fields_at((*item['loc'], '')))}"
            lines[f"{path}: expected {expected}; got {item['input']!r}"] = None
    return UserError(f"{where}: " + "\n".join(lines))


def make_config(values: dict[str, Any], where: str = "config") -> Config:
    """A checked Config from a plain mapping. Raises UserError naming every wrong key."""
    try:
        return Config.model_validate(values)
    except ValidationError as error:
        raise _explain(error, where) from None


def load_config(path: str | Path | None, overrides: list[str] | None = None) -> Config:
    """Read a YAML file (None: no file) and `key=value` words over it into a checked Config."""
    where, values = "command line", {}
    if path is not None:
        where, file = str(path), Path(path)
        if not file.is_file():
            what = "is a folder, not a file" if file.is_dir() else "does not exist"
            raise UserError(f"config file {where} {what}; give the path of a YAML file")
        try:
            text = file.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise UserError(f"{where}: not a text file (byte {error.start} is not UTF-8)") from None
        values = _parse(text, where)
        if values is None:
            raise UserError(f"{where}: the file is empty; it needs at least `model:` and `data:`")
        if not isinstance(values, dict):
            raise UserError(f"{where}: expected `key: value` lines; got a {type(values).__name__}")
    for word in overrides or []:
        key, equals, text = word.partition("=")
        if not equals or not key:
            raise UserError(f"{word!r} is neither a config file nor key=value")
        _set(values, key.strip(), _parse(text, word) if text else None)
    words = {word.partition("=")[0].strip() for word in overrides or []}
    for pair in PAIRS:
        for given, other in (
            pair,
            pair[::-1],
        ):  # a word for one takes the file's word for the other back
            if given in words and other not in words and values[given] is not None:
                values.pop(other, None)
    return make_config(values, where)
