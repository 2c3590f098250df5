"""The fast engine: a decoder of our own over the weights of a loaded model.

    ids -> embedding -> block ... block -> final norm -> trained rows' loss

The model object stays what it is (adapters, saving, merging and generation go on through it); this
engine takes its layers' weights and runs them through `block.py`, one autograd function per block.
Every projection is one product with its adapters inside; nothing waits for the device.

The plan says what each block keeps (plan.py). The gradient is the same bit for bit whichever policy;
tiles of the MLP's rows change the order of sums.

Embedding, final norm and head go through autograd. What trains inside the blocks has its gradient's
sum in a buffer of the engine, which `grad` of the parameter points to; sums of another dtype than the
parameter's (float32 for bf16 weights) are in `sums`, since torch allows no such `grad`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from fastsft_kernels import linear_cross_entropy, rms_norm
from fastsft_kernels.fused import attention_blocks, pack_adapters, pack_plan
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from fastsft.data.batches import MicroBatch
from fastsft.model.block import Block, Kept, settle_blocks
from fastsft.model.compat import LossOutput
from fastsft.model.context import StepContext
from fastsft.model.host_weights import HostEmbedding, HostHead, streamed_cross_entropy
from fastsft.model.lora import LoraLinear
from fastsft.model.micro_pass import Pass
from fastsft.model.offload import Stash
from fastsft.model.plan import Plan
from fastsft.model.projection import DecodeBuffers, refresh
from fastsft.model.spec import DecoderSpec, NotFast, read_spec


class FastEngine:
    """MicroBatch -> summed loss. Raises NotFast where the model needs the compat engine.

    dtype: of the products; None: the weights'. plan: `policies`, `mlp_rows` and `head_rows` may be
    changed between steps through the attribute, the rest is settled here; None: everything is kept.
    shared_sums: the blocks' gradients take turns in one buffer, and `after_block` must use each block's
    up while backward goes on.
    """

    name = "fast"

    def __init__(
        self,
        model: Any,
        context: StepContext,
        *,
        dtype: torch.dtype | None = None,
        plan: Plan | None = None,
        shared_sums: bool = False,
    ) -> None:
        self.model, self.context = model, context
        self.spec = read_spec(model.config)
        _refuse_other_training(model)
        base = model.base_model
        self.dtype = dtype or base.embed_tokens.weight.dtype
        self.plan = plan or Plan(("keep",) * self.spec.layers)
        self.blocks = [
            Block(self.spec, i, layer, self.dtype) for i, layer in enumerate(base.layers)
        ]
        for block in self.blocks[: self.plan.resident]:
            for projection in block.projections:
                projection.resident = True
        self.final_norm = base.norm.weight
        self.buffers = DecodeBuffers()
        self.tables = _rope_tables(base.rotary_emb, self.spec)
        self.anchor = torch.zeros((), requires_grad=True)
        self.stash: Stash | None = None
        self.after_block: Callable[[list[nn.Parameter]], None] | None = None
        self._bind_masters(shared_sums)
        self._move_to_host()
        self.notes: list[str] = []
        self.isolate = False

    def _bind_masters(self, shared_sums: bool) -> None:
        projections = [p for block in self.blocks for p in block.projections]
        device = projections[0].device
        wide = torch.float64 if self.dtype == torch.float64 else torch.float32
        settled = settle_blocks(self.blocks, wide, device, shared=shared_sums)
        self.trained_of = settled
        self.trained = [trained for block in settled for trained in block]
        total = sum(p.master_numbers for p in projections)
        self.masters = torch.zeros(total, dtype=wide, device=device)
        self.grads = torch.zeros_like(self.masters)
        entries, offset = [], 0
        for p in projections:
            entries += p.bind(self.masters, self.grads, offset)
            offset += p.master_numbers
        self.views = [view for p in projections for view in p.views]
        self.views += [(t.master, t.grad) for t in self.trained if t.grad.dtype == t.master.dtype]
        self.sums = {t.master: t.grad for t in self.trained if t.grad.dtype != t.master.dtype}
        if self.sums:
            self._sum_outside_blocks()
        self.pack = pack_plan(entries, device) if entries else None

    def _move_to_host(self) -> None:
        """What the plan keeps in host memory; frozen weights only, the planner knows."""
        model, device = self.model, self.masters.device
        embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
        if self.plan.host_head:
            assert not head.weight.requires_grad and getattr(head, "bias", None) is None
            model.set_output_embeddings(HostHead(head.weight, device))
        if self.plan.host_embedding:
            assert not any(p.requires_grad for p in embedding.parameters())
            model.set_input_embeddings(HostEmbedding(embedding, device))

    def _sum_outside_blocks(self) -> None:
        """Embedding, final norm and head in 16 bits: autograd's gradients go into float32 sums too."""

        def add(master: Tensor) -> None:
            assert isinstance(master, nn.Parameter) and master.grad is not None
            self.sums[master] += master.grad
            master.grad = None

        for master in self.model.parameters():
            if master not in self.sums:
                self.sums[master] = torch.zeros_like(master, dtype=torch.float32)
                master.register_post_accumulate_grad_hook(add)

    # --- the step ------------------------------------------------------------------------------

    def loss(self, batch: MicroBatch, *, step: int) -> LossOutput:
        """The loss summed over the micro-batch's trained tokens, differentiable; `step` keys dropout."""
        self.context.step = step
        self._refresh_copies()
        self._ready_gradients()
        return self._run(batch, training=True)

    def evaluate(self, batch: MicroBatch) -> LossOutput:
        """The same without gradient and without dropout."""
        with torch.no_grad():
            self._refresh_copies()
            return self._run(batch, training=False)

    def _gradients_are_ours(self) -> bool:
        return all(master.grad is view for master, view in self.views)

    def _ready_gradients(self) -> None:
        """What trains has its gradient in our buffers; one that was cleared gets its place back, zeroed."""
        if self._gradients_are_ours():
            return
        self.grads.zero_()
        for trained in self.trained:
            trained.grad.zero_()
        for master, view in self.views:
            master.grad = view

    def _refresh_copies(self) -> None:
        """The numbers the products use follow the masters.

        Adapters' are written anew for each micro-batch, one launch. A whole model's only where gradients
        have been cleared, which is the trace every optimizer step leaves (fused ones do not even
        count up the tensors' versions).
        """
        self.buffers.forget()
        if self.pack is not None:
            pack_adapters(self.masters, self.pack)
        if not self._gradients_are_ours():
            refresh(self.trained)

    def _run(self, batch: MicroBatch, training: bool) -> LossOutput:
        known = self._pass(batch, training)
        x = self._embedded(batch)
        if self.spec.embedding_scale != 1.0:
            x = x * self.spec.embedding_scale
        x = x.to(self.dtype)
        if training:
            self._ready_stash(x)
        branch = None
        for block in self.blocks:
            if training:
                x, branch = _BlockPass.apply(x, branch, self.anchor, self, block, known)
            else:
                rows = self.plan.mlp_rows
                x, branch, _ = block.forward(
                    x, branch, known, self.buffers, policy="none", mlp_rows=rows
                )
        assert branch is not None
        hidden, _ = rms_norm(
            branch,
            self.final_norm.to(self.dtype),
            self.spec.eps,
            offset=self.spec.norm_offset,
            residual=x,
        )
        del x, branch
        return self._scored(hidden, batch.labels.index_select(0, batch.trained_rows))

    def _embedded(self, batch: MicroBatch) -> Tensor:
        embedding = self.model.get_input_embeddings()
        if isinstance(embedding, HostEmbedding):
            return embedding.rows(batch.host_ids)
        x: Tensor = embedding(batch.ids)
        return x

    def _scored(self, hidden: Tensor, labels: Tensor) -> LossOutput:
        """hidden [n, H] of the trained rows, labels [n]."""
        head, spec = self.model.get_output_embeddings(), self.spec
        logits: dict[str, Any] = {"softcap": spec.logits_softcap, "scale": spec.logits_scale}
        logits["chunk_rows"] = self.plan.head_rows
        if isinstance(head, HostHead):
            return LossOutput(*streamed_cross_entropy(hidden, head, labels, **logits))
        loss, correct = linear_cross_entropy(
            hidden,
            head.weight.to(hidden.dtype),
            labels,
            reduction="sum",
            rows=torch.arange(labels.numel(), device=hidden.device),
            return_correct=True,
            **logits,
        )
        return LossOutput(loss, correct)

    def _ready_stash(self, x: Tensor) -> None:
        slots = sum(policy == "offload" for policy in self.plan.policies)
        if self.stash is not None and self.stash.slots != slots:
            self.stash.end()
            self.stash = None
        if slots == 0:
            return
        if self.stash is None:
            self.stash = Stash(slots, self.spec.hidden, self.dtype, x.device)
        self.stash.begin(x.shape[0])

    def _slot(self, index: int) -> int:
        """Which of the offloaded layers `index` is."""
        return self.plan.policies[:index].count("offload")

    def _pass(self, batch: MicroBatch, training: bool) -> Pass:
        return Pass(
            batch.cu_seqlens,
            batch.max_seqlen,
            attention_blocks(batch.lengths, batch.ids.device),
            {kind: self._rope(kind, batch.positions) for kind in self.tables},
            batch.row_key,
            batch.trained_rows,
            batch.row_key.index_select(0, batch.trained_rows),
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
    """All of a base may train, or adapters, embedding and head; no other share has a backward here."""
    inside = set(model.base_model.layers.modules())
    for name, module in model.named_modules():
        if isinstance(module, LoraLinear) and module not in inside:
            raise NotFast(
                f"{name} carries an adapter; the fast engine takes those of the layers only"
            )
    known = {
        id(parameter)
        for module in (
            *(m for m in model.modules() if isinstance(m, LoraLinear)),
            model.get_input_embeddings(),
            model.get_output_embeddings(),
        )
        for parameter in module.parameters()
    }
    others = [(n, p) for n, p in model.named_parameters() if id(p) not in known]
    trains = [n for n, p in others if p.requires_grad]
    if trains and len(trains) < len(others):
        raise NotFast(
            f"{trains[0]} trains and other weights do not; the fast engine trains adapters, embedding and "
            "head, or everything"
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
        plan, policy = engine.plan, engine.plan.policies[block.index]
        total2, branch2, kept = block.forward(
            x, branch, known, engine.buffers, policy=policy, mlp_rows=plan.mlp_rows
        )
        ctx.engine, ctx.block, ctx.known, ctx.plan, ctx.policy = engine, block, known, plan, policy
        if policy == "offload":
            assert engine.stash is not None
            engine.stash.put(engine._slot(block.index), kept.total)
        else:
            ctx.save_for_backward(*kept.tensors())
        return total2, branch2

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        """The gradients of the two outputs are one tensor: the next block only adds them up."""
        engine, block, known = ctx.engine, ctx.block, ctx.known
        if ctx.policy == "offload":
            kept = Kept(engine.stash.take(engine._slot(block.index)))
        else:
            kept = Kept.of(ctx.saved_tensors)
        to_input = ctx.needs_input_grad[0]
        rows = ctx.plan.mlp_rows
        dx = block.backward(grad, kept, known, engine.buffers, mlp_rows=rows, to_input=to_input)
        if engine.after_block is not None:
            engine.after_block([t.master for t in engine.trained_of[block.index]])
        return dx, dx if ctx.needs_input_grad[1] else None, None, None, None, None
