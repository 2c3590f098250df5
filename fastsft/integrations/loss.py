"""A causal language model's loss without its logits.

    model(**batch, labels=...) -> loss        hidden states -> `linear_cross_entropy`, in pieces

While the model trains and a batch has labels, its forward runs the base model and takes the loss from the
hidden states of the tokens that count; `logits` of what it returns is None, because [T, V] never exist. In
evaluation, and without labels, the model's own forward runs and returns logits as ever: metrics need
them. `num_items_in_batch`, `shift_labels` and `ignore_index` mean what they mean in transformers' loss;
soft-capped and scaled heads (Gemma 2, Granite, Cohere) are taken from the config and measured.

A model is changed only if its loss is transformers' causal one, its head multiplies by a dense weight, and
on a few tokens both its logits and its loss come out. At each call the model's own forward runs where
something else is asked for: router losses, logits_to_keep, tuples, or TRL's fused head (`fused_lm_head`),
which returns log-probabilities and entropies of its own, made in pieces too.

Finding the tokens that count is one synchronisation per forward pass on a GPU.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
import torch.nn.functional as F
from fastsft_kernels import linear_cross_entropy
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.loss.loss_utils import ForCausalLMLoss

from fastsft.integrations.changes import (
    DOES_NOT_RUN,
    Change,
    Changes,
    Forward,
    Rebinding,
    disagreement,
    evaluating,
    has_hooks,
    unusable,
)
from fastsft.integrations.linear import lowest_dtype
from fastsft.model import probes

_OF_THE_LOSS = ("labels", "num_items_in_batch", "shift_labels", "ignore_index")
# What the loss path does not do; with one of these set, the model's own forward runs.
_OF_OTHERS = ("fused_lm_head", "logits_to_keep", "output_router_logits")


def rebind_loss(model: PreTrainedModel, changes: Changes) -> None:
    """Rebind the model's forward, if its loss is what we think it is; record it either way."""
    was = type(model).__name__
    why = unusable(model) or _obstacle(model)
    if not why and "labels" not in inspect.signature(model.forward).parameters:
        why = "its forward takes no labels"
    if not why:
        with torch.no_grad(), evaluating(model):
            try:
                head, kind, why = _try(model)
            except DOES_NOT_RUN as error:
                why = f"it does not run on a few tokens: {error}"
    if why:
        changes.record(Change("loss", "", was, why=why))
        return
    rebinding = Rebinding(model, _maker(inspect.signature(model.forward), head, kind))
    changes.on_undo(rebinding.undo)
    now = "linear_cross_entropy while training, without logits"
    trl = getattr(rebinding.before, "__code__", None)
    if trl is not None and "fused_lm_head" in trl.co_varnames:
        now += "; calls with fused_lm_head, as SFTTrainer's, stay with TRL's own fused head"
    changes.record(Change("loss", "", was, now))


def _obstacle(model: PreTrainedModel) -> str:
    """What about the head or the loss is not ours to compute; empty where nothing is."""
    head = model.get_output_embeddings()
    if type(head) is not nn.Linear or not head.weight.is_floating_point():
        return f"its head is a {type(head).__name__}"
    if head.bias is not None:
        return "its head has a bias"
    if has_hooks(head):
        return "a hook stands on its head"
    if model.loss_function is not ForCausalLMLoss:
        return "its loss is not transformers' causal one"
    if model.config.return_dict is False:
        return "its config asks for tuples"
    return ""


def _try(model: PreTrainedModel) -> tuple[probes.Head, type, str]:
    """(how logits come about, what the model returns, why its loss is not ours) from a few tokens."""

    def hidden(ids: Tensor) -> Tensor:
        states: Tensor = model.base_model(input_ids=ids[None]).last_hidden_state[0]
        return states

    precision = lowest_dtype(model)
    head = probes.checked_head(model, hidden, {}, precision)
    ids = probes.random_ids(model, "loss", 12)[None]
    labels = torch.where(torch.arange(ids.shape[1], device=ids.device) % 3 == 0, -100, ids)
    kind: type = dict
    for extra in ({}, {"num_items_in_batch": torch.tensor(5)}):
        expected = model(input_ids=ids, labels=labels, **extra)
        kind = type(expected)
        if head.own:
            return head, kind, head.reason
        found = _with_loss(model, {"input_ids": ids, "labels": labels, **extra}, head, kind)
        why = disagreement([found["loss"][None]], [expected["loss"][None]], precision)
        if why:
            return head, kind, f"its loss: {why}"
    return head, kind, ""


def _maker(signature: inspect.Signature, head: probes.Head, kind: type) -> Any:
    variadic = next(
        (p.name for p in signature.parameters.values() if p.kind is p.VAR_KEYWORD), None
    )

    def make(original: Forward) -> Forward:
        def forward(self: PreTrainedModel, *args: Any, **kwargs: Any) -> Any:
            arguments = dict(signature.bind(*args, **kwargs).arguments)
            arguments |= arguments.pop(variadic, {}) if variadic else {}
            if self.training and _is_ours_to_do(self, arguments):
                return _with_loss(self, arguments, head, kind)
            return original(self, *args, **kwargs)

        return forward

    return make


def _is_ours_to_do(model: PreTrainedModel, arguments: dict[str, Any]) -> bool:
    asked = any(
        isinstance(arguments.get(name), Tensor) or bool(arguments.get(name)) for name in _OF_OTHERS
    )
    routed = getattr(model.config.get_text_config(), "output_router_logits", False)
    plain = not asked and not routed and arguments.get("return_dict") is not False
    return plain and arguments.get("labels") is not None and not _obstacle(model)


def _with_loss(
    model: PreTrainedModel, arguments: dict[str, Any], head: probes.Head, kind: type
) -> Any:
    """The base model's outputs with the loss, as `kind`; logits None."""
    aside = (*_OF_THE_LOSS, *_OF_OTHERS, "return_dict")
    outputs = model.base_model(**{k: v for k, v in arguments.items() if k not in aside})
    loss = _loss(outputs.last_hidden_state, model.get_output_embeddings().weight, arguments, head)
    known = set(inspect.signature(kind).parameters) - {"loss", "logits"}
    return kind(loss=loss, **{name: value for name, value in outputs.items() if name in known})


def _loss(hidden: Tensor, weight: Tensor, options: dict[str, Any], head: probes.Head) -> Tensor:
    """transformers' ForCausalLMLoss of softcap(scale · hidden weightᵀ)."""
    ignored = options.get("ignore_index", -100)
    labels = options.get("shift_labels")
    if labels is None:
        labels = F.pad(options["labels"], (0, 1), value=ignored)[..., 1:]
    items = options.get("num_items_in_batch")
    loss = linear_cross_entropy(
        hidden.flatten(0, -2).to(weight.device),
        weight,
        labels.flatten().to(weight.device, torch.int64),
        ignore_index=ignored,
        reduction="mean" if items is None else "sum",
        softcap=head.softcap,
        scale=head.scale,
    )
    assert isinstance(loss, Tensor)
    if items is None:
        return loss
    return loss / (items.to(loss.device) if isinstance(items, Tensor) else items)
