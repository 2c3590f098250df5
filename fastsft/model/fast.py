"""The fast engine: a decoder of our own over the weights of a loaded model.

    ids -> embedding -> block ... block -> final norm -> trained rows' loss

The model object stays what it is (adapters, saving, merging and generation go on through it); this
engine takes its layers' weights and runs them through `block.py`, one autograd function per block.
Every projection is one product with its adapters inside; nothing waits for the device.

`activations` says what a block keeps: keep (all it needs), recompute_mlp (all but gate and up, made
again from what is kept) or recompute_block (its input alone). The gradient is the same bit for bit.
"""

from __future__ import annotations

from typing import Any

import torch
from fastsft_kernels import linear_cross_entropy, rms_norm
from fastsft_kernels.fused import pack_adapters, pack_plan
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastsft.data.batches import MicroBatch
from fastsft.model.block import Block, Norm, Pass, Saved
from fastsft.model.compat import LossOutput
from fastsft.model.context import StepContext
from fastsft.model.lora import LoraLinear
from fastsft.model.projection import DecodeBuffers
from fastsft.model.spec import DecoderSpec, NotFast, read_spec


class FastEngine:
    """MicroBatch -> summed loss. Raises NotFast where the model needs the compat engine."""

    name = "fast"

    def __init__(self, model: Any, context: StepContext, *, activations: str = "keep") -> None:
        self.model, self.context, self.activations = model, context, activations
        self.spec = read_spec(model.config)
        _refuse_other_training(model)
        base = model.base_model
        self.dtype = base.embed_tokens.weight.dtype
        self.blocks = [
            Block(self.spec, i, layer, self.dtype) for i, layer in enumerate(base.layers)
        ]
        self.norm = Norm(base.norm.weight.detach(), self.spec.eps, self.spec.norm_offset)
        self.buffers = DecodeBuffers()
        self.tables = _rope_tables(base.rotary_emb, self.spec)
        self.anchor = torch.zeros((), requires_grad=True)
        self._bind_masters()
        self.notes: list[str] = []
        self.isolate = False

    def _bind_masters(self) -> None:
        projections = [p for block in self.blocks for p in block.projections]
        for p in projections:
            p.settle()
        device = projections[0].device
        total = sum(p.master_numbers for p in projections)
        wide = torch.float64 if self.dtype == torch.float64 else torch.float32
        self.masters = torch.zeros(total, dtype=wide, device=device)
        self.grads = torch.zeros_like(self.masters)
        entries, offset = [], 0
        for p in projections:
            entries += p.bind(self.masters, self.grads, offset)
            offset += p.master_numbers
        self.views = [view for p in projections for view in p.views]
        self.plan = pack_plan(entries, device)

    @property
    def own_bytes(self) -> int:
        """Memory beside the model's weights: compute copies, padding, and room for two decodes."""
        projections = [p for block in self.blocks for p in block.projections]
        numbers = sum(p.a.numel() + p.b.numel() for p in projections)
        numbers += sum(p.n * (p.pitch - p.k) for p in projections if p.dense is not None)
        numbers += 2 * max((p.n * p.pitch for p in projections if p.dense is None), default=0)
        return numbers * self.dtype.itemsize

    # --- the step ------------------------------------------------------------------------------

    def loss(self, batch: MicroBatch, *, step: int) -> LossOutput:
        """The loss summed over the micro-batch's trained tokens, differentiable; `step` keys dropout."""
        self.context.step = step
        self._ready_gradients()
        return self._run(batch, training=True)

    def evaluate(self, batch: MicroBatch) -> LossOutput:
        """The same without gradient and without dropout."""
        with torch.no_grad():
            return self._run(batch, training=False)

    def _ready_gradients(self) -> None:
        """Gradients live in one buffer; a master whose gradient was cleared gets its place back, zeroed."""
        if all(master.grad is view for master, view in self.views):
            return
        self.grads.zero_()
        for master, view in self.views:
            master.grad = view

    def _run(self, batch: MicroBatch, training: bool) -> LossOutput:
        pack_adapters(self.masters, self.plan)
        known = self._pass(batch, training)
        x = self.model.get_input_embeddings()(batch.ids)
        if self.spec.embedding_scale != 1.0:
            x = x * self.spec.embedding_scale
        branch = None
        for block in self.blocks:
            if training:
                x, branch = _BlockPass.apply(x, branch, self.anchor, self, block, known)
            else:
                x, branch, _ = block.forward(x, branch, known, self.buffers)
        assert branch is not None
        hidden, _ = rms_norm(
            branch, self.norm.weight, self.norm.eps, offset=self.norm.offset, residual=x
        )
        loss, correct = linear_cross_entropy(
            hidden,
            self.model.get_output_embeddings().weight.to(hidden.dtype),
            batch.labels.index_select(0, batch.trained_rows),
            reduction="sum",
            softcap=self.spec.logits_softcap,
            rows=torch.arange(batch.trained_rows.numel(), device=hidden.device),
            scale=self.spec.logits_scale,
            return_correct=True,
        )
        return LossOutput(loss, correct)

    def _pass(self, batch: MicroBatch, training: bool) -> Pass:
        return Pass(
            batch.cu_seqlens,
            batch.max_seqlen,
            {kind: self._rope(kind, batch.positions) for kind in self.tables},
            batch.row_key,
            batch.trained_rows,
            self.context.seed,
            self.context.step,
            training,
        )

    def _rope(self, kind: str, positions: Tensor) -> tuple[Tensor, Tensor]:
        """(cos, sin) [T, R/2] in float32; transformers rounds them to the activations' dtype."""
        frequencies, scaling = self.tables[kind]
        angle = positions[:, None].to(frequencies.dtype) * frequencies
        return angle.cos() * scaling, angle.sin() * scaling


def _refuse_other_training(model: Any) -> None:
    """Adapters, the embedding and the head may train; nothing else has a backward here."""
    known = {
        id(parameter)
        for module in (
            *(m for m in model.modules() if isinstance(m, LoraLinear)),
            model.get_input_embeddings(),
            model.get_output_embeddings(),
        )
        for parameter in module.parameters()
    }
    others = [n for n, p in model.named_parameters() if p.requires_grad and id(p) not in known]
    if others:
        raise NotFast(
            f"{others[0]} trains, and the fast engine trains adapters, embedding and head"
        )


def _rope_tables(rotary: Any, spec: DecoderSpec) -> dict[str, tuple[Tensor, float]]:
    """Table name -> (inverse frequencies [R/2], scaling of cos and sin), from the model's own module."""
    names = {kind for kind in spec.rope if kind is not None}
    prefix = {kind: f"{kind}_" if kind else "" for kind in names}
    return {
        kind: (getattr(rotary, f"{p}inv_freq"), getattr(rotary, f"{p}attention_scaling"))
        for kind, p in prefix.items()
    }


class _BlockPass(torch.autograd.Function):
    """One block in autograd's graph; `anchor` ties it there where the embedding does not train."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        branch: Tensor | None,
        anchor: Tensor,
        engine: FastEngine,
        block: Block,
        known: Pass,
    ) -> tuple[Tensor, Tensor]:
        total2, branch2, saved = block.forward(x, branch, known, engine.buffers)
        ctx.engine, ctx.block, ctx.known = engine, block, known
        if engine.activations == "recompute_block":
            ctx.save_for_backward(saved.total)
        elif engine.activations == "recompute_mlp":
            ctx.save_for_backward(*saved._replace(gate_up=None))
        else:
            ctx.save_for_backward(*saved)
        return total2, branch2

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        """The gradients of the two outputs are one tensor: the next block only adds them up."""
        block, known, buffers = ctx.block, ctx.known, ctx.engine.buffers
        if ctx.engine.activations == "recompute_block":
            saved = block.forward(ctx.saved_tensors[0], None, known, buffers)[2]
        else:
            saved = Saved(*ctx.saved_tensors)
            if saved.gate_up is None:
                saved = block.with_gate_up(saved, buffers)
        to_input = ctx.needs_input_grad[0]
        dx = block.backward(grad, saved, known, buffers, to_input=to_input)
        return dx, dx if ctx.needs_input_grad[1] else None, None, None, None, None
