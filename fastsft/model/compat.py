"""The compat engine: any AutoModelForCausalLM, packed where the model isolates documents.

    micro-batch -> base model on one packed row [1, T] -> hidden states of the trained rows -> summed loss

The model's code is transformers'; ours are the linear layers with adapters, the attention (registered under
transformers' own interface) and the loss, which never sees a masked token nor a whole [T, V] of logits. What
the model does with packed documents and how its logits come about is measured at start (probes.py): a model
that lets documents see each other runs them one by one, a head that is more than a scaled product keeps
its own code. `notes` says what was found.

Slower than a decoder of our own but right; the fast engine is measured against it. Nothing here waits
for the device: what the host must know of a micro-batch came with it. (A model's own code may wait, as
mixtures of experts do to route.)

Dropout inside the base model is switched off: its random numbers would depend on the packing.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from fastsft_kernels import linear_cross_entropy
from torch import Tensor, nn
from transformers import PreTrainedModel

from fastsft.data.batches import MicroBatch
from fastsft.errors import UserError
from fastsft.model import attention, probes
from fastsft.model.context import StepContext
from fastsft.model.lora import LoraLinear
from fastsft.model.targets import embedding_weight, unreached_weights


class LossOutput(NamedTuple):
    """loss_sum: float32 scalar, summed over trained tokens; correct: int64 scalar, of those predicted."""

    loss_sum: Tensor
    correct: Tensor


class CompatEngine:
    """MicroBatch -> summed loss for any causal language model of transformers.

    `activations`: keep, or recompute_block (each block is run again in the backward pass). `autocast`: the
    dtype products run in over fp32 weights; None: as the weights are. Raises UserError on what it cannot do.
    """

    name = "compat"

    def __init__(
        self,
        model: PreTrainedModel,
        context: StepContext,
        *,
        activations: str = "keep",
        autocast: torch.dtype | None = None,
    ) -> None:
        self.model = model
        self.context = context
        self.autocast = autocast
        self.notes: list[str] = []
        self._precision = autocast or embedding_weight(model).dtype
        self._base_arguments = inspect.signature(model.base_model.forward).parameters
        self._arguments = inspect.signature(model.forward).parameters
        self._packed_limit = _rope_limit(model)
        silenced = silence_dropout(model)
        if silenced:
            self.notes.append(f"dropout inside the base model is off ({', '.join(silenced)})")
        with torch.no_grad(), self._evaluating(), self._autocast():
            self.isolate = self._probe_isolation()
            self.head = self._probe_head()
        if any(isinstance(module, LoraLinear) for module in model.modules()):
            self._note_unreached()
        if activations != "keep":
            self._recompute(activations)

    # --- the step ------------------------------------------------------------------------------

    def loss(self, batch: MicroBatch, *, step: int) -> LossOutput:
        """The loss summed over the micro-batch's trained tokens, differentiable; `step` keys dropout."""
        if not self.model.training:
            self.model.train()
        self.context.step = step
        return self._run(batch)

    def evaluate(self, batch: MicroBatch) -> LossOutput:
        """The same without gradient and without dropout."""
        with torch.no_grad(), self._evaluating():
            return self._run(batch)

    def _run(self, batch: MicroBatch) -> LossOutput:
        if self.isolate or batch.max_seqlen > self._packed_limit:
            parts = [self._score(*part) for part in self._documents(batch)]
            if not parts:  # nothing trained here: a zero that backward() accepts
                zero = torch.zeros(
                    (), device=batch.ids.device, requires_grad=torch.is_grad_enabled()
                )
                return LossOutput(zero, torch.zeros((), dtype=torch.int64, device=batch.ids.device))
            losses, corrects = zip(*parts, strict=True)
            return LossOutput(torch.stack(losses).sum(), torch.stack(corrects).sum())
        self._describe(batch, slice(None), batch.cu_seqlens, batch.lengths)
        return self._score(batch.ids, batch.labels, batch.trained_rows)

    def _describe(
        self, batch: MicroBatch, part: slice, cu_seqlens: Tensor, lengths: tuple[int, ...]
    ) -> None:
        context = self.context
        context.row_key, context.positions = batch.row_key[part], batch.positions[part]
        context.cu_seqlens, context.lengths = cu_seqlens, lengths
        context.max_seqlen = max(lengths)

    def _documents(self, batch: MicroBatch) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """(ids, labels, trained rows) of each document with something to learn, the context set to it."""
        start = first = 0
        for place, (length, count) in enumerate(zip(batch.lengths, batch.targets, strict=True)):
            if count:
                part = slice(start, start + length)
                self._describe(batch, part, batch.cu_seqlens[place : place + 2] - start, (length,))
                rows = batch.trained_rows[first : first + count] - start
                yield batch.ids[part], batch.labels[part], rows
            start, first = start + length, first + count

    def _score(self, ids: Tensor, labels: Tensor, rows: Tensor) -> LossOutput:
        """Forward pass of one packed row and the summed loss of its trained rows."""
        if self.head.own:
            with self._autocast():
                logits = self._own_logits(ids, rows)
            wanted = labels[rows]
            logits = logits if logits.dtype == torch.float64 else logits.float()
            loss = F.cross_entropy(logits, wanted, reduction="sum")
            return LossOutput(loss, (logits.argmax(-1) == wanted).sum())
        with self._autocast():
            hidden = self._hidden(ids)
        if self.autocast is not None:
            hidden = hidden.to(self.autocast)
        loss, correct = linear_cross_entropy(
            hidden,
            self.model.get_output_embeddings().weight.to(hidden.dtype),
            labels,
            reduction="sum",
            softcap=self.head.softcap,
            rows=rows,
            scale=self.head.scale,
            return_correct=True,
        )
        return LossOutput(loss, correct)

    # --- the model -----------------------------------------------------------------------------

    def _options(self, arguments: Any) -> dict[str, Any]:
        """Keyword arguments of a forward pass that the model takes; the packing from the context."""
        options: dict[str, Any] = {"use_cache": False} if "use_cache" in arguments else {}
        context = self.context
        if (
            self.model.config._attn_implementation == attention.NAME
            and context.positions is not None
        ):
            options["position_ids"] = context.positions.long()[None]
            options["cu_seq_lens_q"] = options["cu_seq_lens_k"] = context.cu_seqlens
            options["max_length_q"] = options["max_length_k"] = context.max_seqlen
            options["host_lengths"] = context.lengths
        return options

    def _hidden(self, ids: Tensor) -> Tensor:
        """ids [T] -> what the head sees, [T, H]."""
        output = self.model.base_model(input_ids=ids[None], **self._options(self._base_arguments))
        hidden: Tensor = output.last_hidden_state[0]
        return hidden

    def _own_logits(self, ids: Tensor, rows: Tensor) -> Tensor:
        """ids [T], rows [n] -> the model's own logits [n, V]."""
        options = self._options(self._arguments)
        if "logits_to_keep" in self._arguments:
            head, keys = self.model.get_output_embeddings(), self.context.row_key
            if isinstance(head, LoraLinear) and keys is not None:  # it sees these rows only
                head.context = replace(self.context, row_key=keys[rows])
            logits: Tensor = self.model(input_ids=ids[None], logits_to_keep=rows, **options).logits[
                0
            ]
            return logits
        whole: Tensor = self.model(input_ids=ids[None], **options).logits[0]
        return whole[rows]

    def _autocast(self) -> AbstractContextManager[Any]:
        if self.autocast is None:
            return nullcontext()
        return torch.autocast(self.model.device.type, self.autocast)

    @contextmanager
    def _evaluating(self) -> Iterator[None]:
        training = self.model.training
        self.model.eval()
        try:
            yield
        finally:
            self.model.train(training)

    # --- start-up ------------------------------------------------------------------------------

    def _probe_isolation(self) -> bool:
        """Install our attention if the model isolates packed documents; else one by one. Says which."""
        reason = self._why_not_packed()
        if reason:
            self.notes.append(f"packing: each document gets its own forward pass, because {reason}")
        else:
            self.notes.append(
                "packing: documents share a forward pass; the model was seen to isolate them"
            )
        return bool(reason)

    def _why_not_packed(self) -> str:
        model, arguments = self.model, self._base_arguments
        if not attention.can_pack(model):
            return f"{type(model).__name__} does not call attention through transformers' AttentionInterface"
        open_ended = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in arguments.values())
        if "position_ids" not in arguments or not open_ended:
            return f"{type(model).__name__} takes no position_ids or no cu_seq_lens"
        first, second = (
            probes.random_ids(model, f"document {i}", n) for i, n in enumerate(probes.LENGTHS)
        )
        other = probes.random_ids(model, "another document", len(first))
        alone = [self._hidden(ids) for ids in (first, second)]
        before = model.config._attn_implementation
        model.set_attn_implementation(attention.NAME)
        try:
            reason = probes.leak_between(
                self._probe_pack, alone, [first, second], other, self._precision
            )
        except attention.CannotPack as error:
            reason = str(error)
        self.context.restore(StepContext(seed=self.context.seed, step=self.context.step))
        if reason:
            model.set_attn_implementation(before)
        return reason

    def _probe_pack(self, documents: list[Tensor]) -> Tensor:
        device = self.model.device
        context, lengths = self.context, tuple(len(ids) for ids in documents)
        ends = F.pad(torch.tensor(lengths).cumsum(0), (1, 0)).int()
        context.positions = torch.cat([torch.arange(n) for n in lengths]).int().to(device)
        context.cu_seqlens, context.lengths = ends.to(device), lengths
        context.max_seqlen = max(lengths)
        return self._hidden(torch.cat(documents))

    def _probe_head(self) -> probes.Head:
        with attention.plain_attention(self.model):
            options = self._options(self._arguments)
            head = probes.checked_head(self.model, self._hidden, options, self._precision)
        if head.own:
            self.notes.append(f"loss: from the model's own logits, because {head.reason}")
        return head

    def _note_unreached(self) -> None:
        weights = unreached_weights(self.model)
        if weights:
            listed = ", ".join(f"{name} ({count:,})" for name, count in weights.items())
            self.notes.append(f"adapters do not reach weights that are no linear layers: {listed}")

    def _recompute(self, activations: str) -> None:
        if activations != "recompute_block":
            raise UserError(
                f"activations: {activations} needs the fast engine; the compat engine has keep"
                " and recompute_block"
            )
        model = self.model
        if not model.supports_gradient_checkpointing:
            raise UserError(
                f"activations: {type(model).__name__} does not support recomputation; set activations: keep"
            )
        enable = getattr(
            model, "activation_checkpointing_enable", model.gradient_checkpointing_enable
        )
        # No random state to preserve: base dropout is off and ours is keyed.
        options = {"preserve_rng_state": False, "context_fn": self.context.for_checkpoint}
        enable({"use_reentrant": False, **options})


def silence_dropout(model: nn.Module) -> list[str]:
    """Set every dropout and jitter of the base model to zero; returns the names of those that were not."""
    found: dict[str, None] = {}
    for name, module in model.named_modules():
        if isinstance(module, LoraLinear):
            continue
        if isinstance(module, nn.Dropout) and module.p > 0:
            module.p = 0.0
            found[f"{name.rsplit('.', 1)[-1]}"] = None
        for key, value in vars(module).items():
            if isinstance(value, float) and value > 0 and ("drop" in key or "jitter" in key):
                setattr(module, key, 0.0)
                found[key] = None
    return list(found)


def _rope_limit(model: PreTrainedModel) -> float:
    """Longest document up to which rotary frequencies do not depend on the pack's longest document.

    "dynamic" and "longrope" choose frequencies by the longest position in the input: beyond this
    length a document must not share its forward pass.
    """
    config = model.config.get_text_config()
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    kinds = [rope, *(value for value in rope.values() if isinstance(value, dict))]
    if not any(
        kind.get("rope_type", kind.get("type")) in ("dynamic", "longrope") for kind in kinds
    ):
        return float("inf")
    known = [kind.get("original_max_position_embeddings") for kind in kinds]
    known.append(getattr(config, "original_max_position_embeddings", None))
    limits = [value for value in known if value]
    return float(min(limits) if limits else config.max_position_embeddings)
