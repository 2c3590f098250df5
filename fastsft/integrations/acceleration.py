"""`accelerate(model)`: our kernels in a model that is already there, whoever made it and whoever trains it.

    changes = accelerate(model)      # transformers or PEFT, before or after a trainer took it
    print(changes)                   # what was changed, what not, and why
    changes.undo()                   # as it was

Everything is done to the instance: modules of this model get a forward of ours, its config another
attention. No class, no module of another library and no second model is touched. Nothing is taken on trust:
each part is run before and after on a small input, modules with gradients, and left alone where the numbers
differ. What follows from this:

- rotary embedding is not among the parts: transformers calls it as a function of the modelling file, which
  could only be replaced for all models at once;
- saving a whole model with pickle fails while it is changed (functions cannot be pickled): undo first.
  state_dict, save_pretrained and PEFT's saving are as before;
- nn.DataParallel copies a module's attributes, a forward bound to the first copy among them, and fails on the
  second device. One process per device (DistributedDataParallel, FSDP) is what works.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from fastsft.integrations.attention import NAME
from fastsft.integrations.changes import (
    DOES_NOT_RUN,
    Change,
    Changes,
    evaluating,
    unusable,
)
from fastsft.integrations.linear import bitsandbytes_kept, lowest_dtype, rebind_linears
from fastsft.integrations.loss import rebind_loss
from fastsft.integrations.mlp import rebind_mlps
from fastsft.integrations.norm import rebind_norms
from fastsft.model import probes
from fastsft.model.attention import CannotPack, can_pack


def accelerate(
    model: nn.Module,
    *,
    norm: bool = True,
    mlp: bool = True,
    lora: bool = True,
    attention: bool = True,
    loss: bool = True,
) -> Changes:
    """Put our kernels into `model`, a loaded transformers or PEFT model, in place.

    norm        RMSNorm modules                                  rms_norm
    mlp         gated feed-forward blocks                        swiglu, geglu
    lora        PEFT's LoRA layers, bitsandbytes' 4-bit layers   lora_linear
    attention   the model's attn_implementation                  varlen_attention
    loss        forward with labels, while training              linear_cross_entropy; no logits

    Raises ValueError for anything but a transformers or PEFT model. Of what cannot be changed, the result
    says why. It also undoes everything, by `undo()` or at the end of a `with`.
    """
    inner = causal_model(model)
    changes = Changes(f"{type(inner).__name__} on {inner.device}")
    parts = (
        (norm, "norm", rebind_norms),
        (mlp, "mlp", rebind_mlps),
        (lora, "lora", rebind_linears),
        (attention, "attention", _change_attention),
        (loss, "loss", rebind_loss),
    )
    try:
        with bitsandbytes_kept(inner):
            for wanted, part, change in parts:
                seen = len(changes.entries)
                if wanted:
                    change(inner, changes)
                if wanted and len(changes.entries) == seen:
                    why = "none of a kind known here"
                    changes.record(Change(part, "", type(inner).__name__, why=why))
    except BaseException:
        changes.undo()
        raise
    return changes


def causal_model(model: nn.Module) -> PreTrainedModel:
    """The transformers model itself, inside PEFT's wrapper or not."""
    unwrap: Any = getattr(model, "get_base_model", None)
    inner = model if unwrap is None else unwrap()
    if not isinstance(inner, PreTrainedModel):
        raise ValueError(
            "accelerate: model must be a transformers or PEFT model; got "
            f"{type(model).__name__}. Pass the model inside it."
        )
    return inner


def _change_attention(model: PreTrainedModel, changes: Changes) -> None:
    """Set our attention; where it does not do what the model's own did, set that back and say why."""
    before = model.config._attn_implementation
    why = "it is ours already" if before == NAME else _attention_obstacle(model)
    if not why:
        with torch.no_grad(), evaluating(model):
            try:
                documents = [probes.random_ids(model, f"document {n}", n) for n in probes.LENGTHS]
                alone = [_hidden(model, ids[None])[0] for ids in documents]
            except DOES_NOT_RUN as error:
                why = f"the model does not run on a few tokens: {error}"
            else:
                changes.on_undo(partial(model.set_attn_implementation, before))
                model.set_attn_implementation(NAME)
                why = _compare(model, documents, alone)
                if why:
                    changes.take_back()
    now = "" if why else f'"{NAME}", varlen_attention'
    changes.record(Change("attention", "", f'"{before}"', now, why))


def _attention_obstacle(model: PreTrainedModel) -> str:
    """Why our attention is not even tried; empty where it is."""
    if not can_pack(model):
        return "the model does not call attention through transformers' AttentionInterface"
    if dropout := _attention_dropout(model):
        return f"{dropout} asks for dropout of attention weights, which only torch's attention does"
    return unusable(model)


def _attention_dropout(model: PreTrainedModel) -> str:
    """The config's key for it, whatever its name (attention_dropout, attn_pdrop); empty where it is off."""
    for key, value in vars(model.config.get_text_config()).items():
        if "drop" in key and "att" in key and isinstance(value, float) and value > 0:
            return key
    return ""


def _compare(model: PreTrainedModel, documents: list[Tensor], alone: list[Tensor]) -> str:
    """Empty where documents packed in a row, and padded in a batch, come out as they do alone."""
    limit = probes.tolerances(lowest_dtype(model))[1]
    positions = torch.cat([torch.arange(len(ids)) for ids in documents])[None].to(model.device)
    try:
        packed = _hidden(model, torch.cat(documents)[None], position_ids=positions)[0]
    except CannotPack as error:
        return str(error)
    short, long = documents
    gap = len(long) - len(short)
    mask = torch.stack([F.pad(torch.ones_like(short), (0, gap)), torch.ones_like(long)])
    padded = _hidden(model, torch.stack([F.pad(short, (0, gap)), long]), attention_mask=mask)
    for how, found in (
        ("packed in a row", packed),
        ("padded in a batch", torch.cat([padded[0, : len(short)], padded[1]])),
    ):
        apart = probes.difference(found, torch.cat(alone))
        if apart > limit:
            return f"documents {how} differ by {apart:.1e} from the same documents alone"
    return ""


def _hidden(model: PreTrainedModel, ids: Tensor, **options: Tensor) -> Tensor:
    output = model.base_model(input_ids=ids, use_cache=False, return_dict=True, **options)
    states: Tensor = output.last_hidden_state
    return states
