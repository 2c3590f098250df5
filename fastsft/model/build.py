"""Which engine runs, and everything on its way there: base weights, adapters, the forms that are saved.

    resolve engine -> load base (quantised for qlora) -> adapters (fresh, continued, resumed) -> engine

A resumed run differs from a fresh one in where the trained weights come from, nowhere else. What training
leaves is written by `Built.write` in the form people use it in (a PEFT folder, or a transformers folder),
the same form a checkpoint holds.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from fastsft.config import Config, LoraConfig
from fastsft.device import choose_dtype
from fastsft.errors import UserError
from fastsft.model.adapter import load_adapter
from fastsft.model.context import StepContext
from fastsft.model.engine import Engine, choose_engine
from fastsft.model.extras import resize_vocabulary, train_token_rows
from fastsft.model.files import written_whole
from fastsft.model.load import cast_model, kept_in_fp32, load_model, resolve_model, save_model
from fastsft.model.lora import LoraSet, add_adapters, trainable_summary
from fastsft.model.planning import Planning, limit_allocator

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from fastsft.data.templates import Template
    from fastsft.data.tokenizer import Tokenizer
    from fastsft.model.quantizer import Progress


@dataclass
class Built:
    """A model ready to train. `adapters` is None for full fine-tuning."""

    config: Config
    engine: Engine
    model: PreTrainedModel
    adapters: LoraSet | None
    tokenizer: Tokenizer
    template: Template | None
    dtype: torch.dtype
    product_dtype: torch.dtype
    reason: str
    micro_batch_tokens: int
    predicted_memory: int
    planning: Planning | None = None  # of the fast engine

    @property
    def product(self) -> str:
        """The folder name of what training leaves: adapter or model."""
        return "model" if self.adapters is None else "adapter"

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Each trained fp32 master once, under a stable name."""
        if self.adapters is not None:
            yield from self.adapters.named_parameters()
        else:
            yield from ((n, p) for n, p in self.model.named_parameters() if p.requires_grad)

    @property
    def stop_ids(self) -> list[int]:
        """The tokens that end an answer."""
        return list((self.template or self.tokenizer).stop_ids)

    def counts(self) -> tuple[int, int]:
        """(parameters that train, parameters in all)."""
        return trainable_summary(self.model)

    def matmul_weights(self) -> tuple[int, int]:
        """(frozen, trained) weights that take part in matrix products: all but an untied embedding."""
        trained, total = self.counts()
        model: Any = self.model
        embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
        tied = head is not None and embedding.weight is head.weight
        outside = 0 if tied else embedding.weight.numel()
        if self.adapters is None:
            return 0, total - outside
        return total - trained - outside, trained

    def write(self, parent: Path, *, masters: bool) -> None:
        """Write adapter/ or model/ under `parent`: fp32 masters, or the product's dtype."""
        folder = parent / self.product
        folder.mkdir(parents=True, exist_ok=True)
        if self.adapters is not None:
            self.adapters.save(folder, self.config.model, self.config.revision)
            self.tokenizer.save(folder, self.template)
        else:
            self.tokenizer.save(folder, self.template, generation=False)
            dtype = torch.float32 if masters else self.product_dtype
            save_model(self.model, folder, dtype, stop_ids=self.stop_ids)

    def write_from(self, checkpoint: Path, parent: Path) -> None:
        """The product as it stood at an earlier checkpoint, under `parent`."""
        source, folder = checkpoint / self.product, parent / self.product
        if self.adapters is None:
            cast_model(source, folder, self.product_dtype, fp32=kept_in_fp32(self.model))
        else:
            with written_whole(folder) as staging:
                shutil.copytree(source, staging, dirs_exist_ok=True)


def checkpoint_dtype(folder: Path) -> torch.dtype | None:
    """The dtype config.json states for the weights in `folder`."""
    values = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    name = values.get("dtype") or values.get("torch_dtype")
    dtype = getattr(torch, name, None) if isinstance(name, str) else None
    return dtype if isinstance(dtype, torch.dtype) else None


def build(
    config: Config,
    tokenizer: Tokenizer,
    template: Template | None,
    *,
    device: torch.device,
    longest: int,
    resume_from: Path | None = None,
    progress: Progress | None = None,
) -> Built:
    """Load the base, put the adapters on it and choose the engine's settings.

    longest: tokens of the longest row, which every micro-batch must be able to hold. resume_from: a
    checkpoint whose adapter/ or model/ takes the place of the starting weights.
    """
    full = config.method == "full"
    dtype = choose_dtype(config.dtype, device)
    folder = resolve_model(config.model, config.revision)
    limit_allocator(config, device)
    model = load_model(
        resume_from / "model" if full and resume_from else folder,
        quantize=config.method == "qlora",
        dtype=master_dtype(config, dtype) if full else dtype,
        device=device,
        trust_remote_code=config.trust_remote_code,
        progress=progress,
    )
    if full and tokenizer.new_ids:
        resize_vocabulary(model, tokenizer.vocab_size)
    context = StepContext(seed=config.seed)
    adapters = None if full else put_adapters(config, model, tokenizer, context, resume_from)
    if adapters is not None and config.adapter is not None:
        config = config.model_copy(update={"lora": _settings_of(adapters)})
    chosen = choose_engine(config, model, context, dtype, device, longest)
    if adapters is not None:
        chosen.engine.notes += adapters.notes
    return Built(
        config=config,
        engine=chosen.engine,
        model=model,
        adapters=adapters,
        tokenizer=tokenizer,
        template=template,
        dtype=dtype,
        product_dtype=checkpoint_dtype(folder) or torch.bfloat16,
        reason=chosen.reason,
        micro_batch_tokens=chosen.micro_batch_tokens,
        predicted_memory=chosen.predicted_memory,
        planning=chosen.planning,
    )


def master_dtype(config: Config, dtype: torch.dtype) -> torch.dtype:
    """Of the weights that full fine-tuning trains."""
    if config.masters == "bf16" and dtype != torch.bfloat16:
        raise UserError(
            f"masters: bf16 needs products in bf16, and dtype: {config.dtype} gives {dtype} here; set "
            "dtype: bf16, or masters: fp32"
        )
    return dtype if config.masters == "bf16" else torch.float32


def put_adapters(
    config: Config,
    model: PreTrainedModel,
    tokenizer: Tokenizer,
    context: StepContext,
    resume_from: Path | None,
) -> LoraSet:
    """The adapters that train: a checkpoint's, those of `adapter`, or fresh ones."""
    if resume_from is not None:
        return load_adapter(resume_from / "adapter", model, context)
    if config.adapter is not None:
        given = config.lora if "lora" in config.model_fields_set else None
        adapters = load_adapter(Path(config.adapter), model, context, expected=given)
        _train_new_tokens(adapters, tokenizer)
        return adapters
    return add_adapters(
        model, config.lora, seed=config.seed, context=context, new_token_ids=tokenizer.new_ids
    )


def _train_new_tokens(adapters: LoraSet, tokenizer: Tokenizer) -> None:
    """Rows for control tokens the continued adapter does not know yet."""
    known = adapters.tokens.ids if adapters.tokens is not None else []
    if set(tokenizer.new_ids) <= set(known):
        return
    if known:
        raise UserError(
            "new_tokens: the adapter trains rows of its own for other tokens, and they cannot be joined; "
            "use the chat_template it was made with"
        )
    adapters.tokens = train_token_rows(
        adapters.model, tokenizer.new_ids, trained_whole=list(adapters.saved)
    )


def _settings_of(adapters: LoraSet) -> LoraConfig:
    """An adapter's own settings as config.yaml writes them down."""
    settings = adapters.settings
    return LoraConfig(
        r=settings.r,
        alpha=settings.alpha,
        dropout=settings.dropout,
        target_modules=adapters.target,
        use_rslora=settings.use_rslora,
        modules_to_save=list(adapters.saved),
    )
