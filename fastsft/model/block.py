"""One decoder block: forward, and the backward written out, over the fused kernels.

    total   = x + branch                         branch: what the block before left to be added
    y       = norm1(total) | tail                buffers at a pitch, see projection.py
    qkv     = [y | t] [W | B]ᵀ                   q/k norm, rope in place
    o       = attention(q, k, v) | tail
    branch1 = post1(o Wᵀ)
    total2  = total + branch1                    added by the kernel that norms it
    z       = norm2(total2) | tail
    gate,up = [z | t] [W | B]ᵀ
    h       = act(gate) ∘ up | tail
    branch2 = post2(h Wᵀ)                        added in the next block

Norms a family lacks are left out. total2 and branch2 are only ever added to each other, so their
gradients are one tensor; so are those of x and branch. Normed inputs and h are not kept: the kernels
that need them again compute them on the fly.

`Saved` is what backward needs. Recomputing a block is running its forward again: the same kernels on
the same numbers, so its gradients are bitwise those of a kept block.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from fastsft_kernels import fused, lora_dropout_mask
from fastsft_kernels.fused import Adapters, AttentionOptions, NormedInput, StripDropout
from torch import Tensor, nn

from fastsft.model.projection import DecodeBuffers, Projection
from fastsft.model.spec import DecoderSpec


class Pass(NamedTuple):
    """What every block knows of the micro-batch.

    rope: table name -> (cos, sin), float32 [T, R/2]; keys int64 [T]; training: dropout is on;
    last_rows int64 [n]: the trained rows, to which the last block's o and MLP are limited.
    """

    cu_seqlens: Tensor
    max_seqlen: int
    rope: dict[str, tuple[Tensor, Tensor]]
    keys: Tensor
    last_rows: Tensor
    seed: int
    step: int
    training: bool


class Saved(NamedTuple):
    """What a block keeps for backward; None where the family has no such norm."""

    total: Tensor
    rstd1: Tensor | None
    tail_qkv: Tensor
    qkv: Tensor
    qk_raw: Tensor | None  # q and k before their norms
    q_rstd: Tensor | None
    k_rstd: Tensor | None
    o: Tensor  # at its pitch
    lse: Tensor
    o_rows: Tensor  # o; in the last block the trained rows of it
    tail_o: Tensor
    unnormed1: Tensor | None  # o Wᵀ before post1
    post1_rstd: Tensor | None
    total2: Tensor
    rstd2: Tensor | None
    tail_gate_up: Tensor
    gate_up: Tensor | None  # None: made again in backward
    tail_down: Tensor
    unnormed2: Tensor | None  # h Wᵀ before post2
    post2_rstd: Tensor | None


class Norm(NamedTuple):
    """A frozen RMS norm of the model."""

    weight: Tensor
    eps: float
    offset: float

    def forward(
        self, x: Tensor, residual: Tensor | None = None, out: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """-> (normed, rstd, x + residual)"""
        return fused.rms_norm_forward(
            x, self.weight, self.eps, offset=self.offset, residual=residual, out=out
        )

    def backward(
        self,
        dy: Tensor,
        x: Tensor,
        rstd: Tensor,
        residual_grad: Tensor | None = None,
        adapters: Adapters | None = None,
        out: Tensor | None = None,
    ) -> Tensor:
        return fused.rms_norm_backward(
            dy,
            x,
            self.weight,
            rstd,
            offset=self.offset,
            residual_grad=residual_grad,
            adapters=adapters,
            out=out,
        )[0]


NORM_NAMES = {
    "pre": ("input_layernorm", None, "post_attention_layernorm", None),
    "post": (None, "post_attention_layernorm", None, "post_feedforward_layernorm"),
    "sandwich": (
        "input_layernorm",
        "post_attention_layernorm",
        "pre_feedforward_layernorm",
        "post_feedforward_layernorm",
    ),
}


class Block:
    """One layer's weights and its two passes."""

    def __init__(self, spec: DecoderSpec, index: int, layer: Any, dtype: torch.dtype) -> None:
        self.spec, self.index = spec, index
        self.last = index == spec.layers - 1
        self.rope = spec.rope[index]
        attention, mlp = layer.self_attn, layer.mlp
        if spec.fused_weights:
            qkv, gate_up = [attention.qkv_proj], [mlp.gate_up_proj]
        else:
            qkv = [attention.q_proj, attention.k_proj, attention.v_proj]
            gate_up = [mlp.gate_proj, mlp.up_proj]
        self.qkv = Projection(f"layer {index} qkv", qkv, dtype)
        self.o = Projection(f"layer {index} o", [attention.o_proj], dtype)
        self.gate_up = Projection(f"layer {index} gate_up", gate_up, dtype)
        self.down = Projection(f"layer {index} down", [mlp.down_proj], dtype)
        self.projections = (self.qkv, self.o, self.gate_up, self.down)
        norms = (self._norm(layer, name) for name in NORM_NAMES[spec.norms])
        self.norm1, self.post1, self.norm2, self.post2 = norms
        self.q_norm = self._norm(attention, "q_norm") if spec.qk_norm else None
        self.k_norm = self._norm(attention, "k_norm") if spec.qk_norm else None

    def _norm(self, owner: nn.Module, name: str | None) -> Norm | None:
        if name is None:
            return None
        weight = owner.get_parameter(f"{name}.weight").detach()
        return Norm(weight, self.spec.eps, self.spec.norm_offset)

    # --- forward -------------------------------------------------------------------------------

    def forward(
        self, x: Tensor, branch: Tensor | None, batch: Pass, buffers: DecodeBuffers
    ) -> tuple[Tensor, Tensor, Saved]:
        """x [T, H], branch [T, H] or None -> (total2, branch2, saved); in the last block [n, H]."""
        y, rstd1, total = _add_and_norm(self.norm1, x, branch, self.qkv)
        qkv, tail_qkv = self.qkv.forward(y, buffers, self._dropout(self.qkv, batch))
        qk_raw, q_rstd, k_rstd = self._norm_qk(qkv)
        q, k, v = self._heads(qkv)
        if self.rope is not None:
            fused.rope_(q, k, *batch.rope[self.rope])
        o = self.o.buffer(x.shape[0])
        options = self._options(batch)
        _, lse = fused.attention_forward(q, k, v, batch.cu_seqlens, options, out=self._per_head(o))
        o_rows, residual = o, total
        if self.last:  # of the other rows nothing is ever looked at again
            o_rows, residual = (t.index_select(0, batch.last_rows) for t in (o, total))
        attended, tail_o = self.o.forward(o_rows, buffers, self._dropout(self.o, batch))
        branch1, unnormed1, post1_rstd = self._leave(self.post1, attended)
        z, rstd2, total2 = _add_and_norm(self.norm2, residual, branch1, self.gate_up)
        gate_up, tail_gu = self.gate_up.forward(z, buffers, self._dropout(self.gate_up, batch))
        h = self.down.buffer(gate_up.shape[0])
        gate, up = gate_up.chunk(2, 1)
        fused.glu_forward(gate, up, self.spec.activation, out=h[:, : self.down.k])
        down, tail_down = self.down.forward(h, buffers, self._dropout(self.down, batch))
        branch2, unnormed2, post2_rstd = self._leave(self.post2, down)
        saved = Saved(
            total, rstd1, tail_qkv, qkv, qk_raw, q_rstd, k_rstd, o, lse, o_rows, tail_o, unnormed1,
            post1_rstd, total2, rstd2, tail_gu, gate_up, tail_down, unnormed2, post2_rstd,
        )  # fmt: skip
        return total2, branch2, saved

    def _leave(
        self, post: Norm | None, branch: Tensor
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """What is added to the stream, and for backward the unnormed branch and its rstd."""
        if post is not None:
            normed, rstd, _ = post.forward(branch)
            return normed, branch, rstd
        if self.spec.residual_scale != 1.0:
            branch *= self.spec.residual_scale
        return branch, None, None

    def _norm_qk(self, qkv: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Norms q and k in place -> (both as they were, rstds)."""
        if self.q_norm is None or self.k_norm is None:
            return None, None, None
        q, k = self._normed_parts(qkv)
        raw = torch.cat([q.flatten(1), k.flatten(1)], 1)
        _, q_rstd, _ = self.q_norm.forward(q, out=q)
        _, k_rstd, _ = self.k_norm.forward(k, out=k)
        return raw, q_rstd, k_rstd

    def with_gate_up(self, saved: Saved, buffers: DecodeBuffers) -> Saved:
        """`saved` with gate and up made again, for a block that did not keep them."""
        z = self.gate_up.buffer(saved.total2.shape[0])
        home = z[:, : self.gate_up.k]
        if self.norm2 is None:
            home.copy_(saved.total2)
        else:
            self.norm2.forward(saved.total2, out=home)
        self.gate_up.tail_of(z).copy_(saved.tail_gate_up)
        return saved._replace(gate_up=self.gate_up.product(z, buffers))

    # --- backward ------------------------------------------------------------------------------

    def backward(
        self, grad: Tensor, saved: Saved, batch: Pass, buffers: DecodeBuffers, *, to_input: bool
    ) -> Tensor | None:
        """grad of total2 and branch2 -> grad of x and branch (None unless `to_input`).

        The adapters' gradients are added to their masters'.
        """
        dtotal2 = self._mlp_backward(grad, saved, batch, buffers)
        dqkv, dtotal = self._attention_backward(dtotal2, saved, batch, buffers)
        self.qkv.add_grad_b(dqkv, saved.tail_qkv)
        if not (to_input or self.qkv.tail):
            return None
        dy, adapters = self.qkv.backward(dqkv, buffers, self._dropout(self.qkv, batch))
        self.qkv.add_grad_a(adapters, saved.total, _normed(self.norm1, saved.rstd1))
        if not to_input:
            return None
        return _leave_norm(self.norm1, dy, saved.total, saved.rstd1, dtotal, adapters)

    def _mlp_backward(
        self, grad: Tensor, saved: Saved, batch: Pass, buffers: DecodeBuffers
    ) -> Tensor:
        """Gradient of total2: through the MLP, and past it."""
        dout = self._enter(self.post2, grad, saved.unnormed2, saved.post2_rstd)
        self.down.add_grad_b(dout, saved.tail_down)
        dh, adapters = self.down.backward(dout, buffers, self._dropout(self.down, batch))
        dgate_up = self._glu_backward(dh, adapters, saved)
        dz, adapters = self.gate_up.backward(dgate_up, buffers, self._dropout(self.gate_up, batch))
        self.gate_up.add_grad_a(adapters, saved.total2, _normed(self.norm2, saved.rstd2))
        return _leave_norm(self.norm2, dz, saved.total2, saved.rstd2, grad, adapters)

    def _glu_backward(self, dh: Tensor, adapters: Adapters | None, saved: Saved) -> Tensor:
        """d[gate | up]; the gradients of down's A and of gate's and up's B on the way."""
        assert saved.gate_up is not None
        gate_up, r = self.gate_up, self.gate_up.r
        pair = len(gate_up.rows) == 2 and r > 0
        tail = saved.tail_gate_up
        tails = (tail[:, :r], tail[:, r:]) if pair else None
        grads_out = None  # or straight into the masters' gradients
        if pair and adapters is not None and gate_up.grad_b is not None:
            db_gate, db_up = gate_up.grad_b.chunk(2)
            grads_out = (self.down.grad_a, db_gate, db_up)
        dgate_up = torch.empty_like(saved.gate_up)
        dgate, dup = dgate_up.chunk(2, 1)
        gate, up = saved.gate_up.chunk(2, 1)
        glu = fused.glu_backward(
            dh,
            gate,
            up,
            self.spec.activation,
            adapters=adapters,
            tails=tails,
            out=(dgate, dup),
            grads_out=grads_out,
        )
        if not pair:  # one fused weight: its strip belongs to gate and up alike
            gate_up.add_grad_b(dgate_up, tail)
        if grads_out is None and glu.da_down is not None:
            self.down.grad_a += glu.da_down
        if grads_out is None and glu.db_gate is not None and glu.db_up is not None:
            gate_up.add_padded_b(torch.cat([glu.db_gate, glu.db_up]))
        return dgate_up

    def _attention_backward(
        self, dtotal2: Tensor, saved: Saved, batch: Pass, buffers: DecodeBuffers
    ) -> tuple[Tensor, Tensor]:
        """-> (gradient of the qkv product, gradient of total past the attention)."""
        dout = self._enter(self.post1, dtotal2, saved.unnormed1, saved.post1_rstd)
        self.o.add_grad_b(dout, saved.tail_o)
        do, adapters = self.o.backward(dout, buffers, self._dropout(self.o, batch))
        self.o.add_grad_a(adapters, saved.o_rows[:, : self.o.k], None)
        do = self._per_head(do)
        delta = fused.attention_delta(self._per_head(saved.o_rows), do, adapters=adapters)
        if self.last:
            tokens, rows = saved.total.shape[0], batch.last_rows
            do = do.new_zeros(tokens, *do.shape[1:]).index_copy_(0, rows, do)
            delta = delta.new_zeros(delta.shape[0], tokens).index_copy_(1, rows, delta)
            dtotal2 = dtotal2.new_zeros(saved.total.shape).index_copy_(0, rows, dtotal2)
        dqkv = torch.empty_like(saved.qkv)
        dq, dk, dv = self._heads(dqkv)
        q, k, v = self._heads(saved.qkv)
        fused.attention_backward(
            do,
            q,
            k,
            v,
            saved.lse,
            delta,
            batch.cu_seqlens,
            self._options(batch),
            out=(dq, dk, dv),
        )
        if self.rope is not None:
            fused.rope_(dq, dk, *batch.rope[self.rope], inverse=True)
        self._norm_qk_backward(dqkv, saved)
        return dqkv, dtotal2

    def _norm_qk_backward(self, dqkv: Tensor, saved: Saved) -> None:
        if self.q_norm is None or self.k_norm is None:
            return
        assert saved.qk_raw is not None and saved.q_rstd is not None and saved.k_rstd is not None
        dq, dk = self._normed_parts(dqkv)
        q, k = self._normed_parts(saved.qk_raw)
        self.q_norm.backward(dq, q, saved.q_rstd, out=dq)
        self.k_norm.backward(dk, k, saved.k_rstd, out=dk)

    def _enter(
        self, post: Norm | None, grad: Tensor, branch: Tensor | None, rstd: Tensor | None
    ) -> Tensor:
        """Gradient of a branch's last product from that of the stream."""
        if post is not None:
            assert branch is not None and rstd is not None
            return post.backward(grad, branch, rstd)
        return grad if self.spec.residual_scale == 1.0 else grad * self.spec.residual_scale

    # --- views ---------------------------------------------------------------------------------

    def _heads(self, qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """[T, N] -> q [T, Hq, D], k and v [T, Hkv, D]."""
        s = self.spec
        heads = qkv.unflatten(1, (-1, s.head_dim))
        q, k, v = heads.split([s.heads, s.kv_heads, s.kv_heads], 1)
        return q, k, v

    def _normed_parts(self, qk: Tensor) -> tuple[Tensor, Tensor]:
        """q and k as their norms see them: per head, or all heads as one row. qk: [T, >= (Hq+Hkv)·D]"""
        s = self.spec
        split = s.heads * s.head_dim
        q, k = qk[:, :split], qk[:, split : split + s.kv_heads * s.head_dim]
        if s.qk_norm == "all":
            return q, k
        return q.unflatten(1, (-1, s.head_dim)), k.unflatten(1, (-1, s.head_dim))

    def _per_head(self, o: Tensor) -> Tensor:
        return o[:, : self.o.k].unflatten(1, (self.spec.heads, self.spec.head_dim))

    def _options(self, batch: Pass) -> AttentionOptions:
        return AttentionOptions(
            batch.max_seqlen,
            scale=self.spec.attention_scale,
            window=self.spec.windows[self.index],
            softcap=self.spec.attention_softcap,
        )

    def _dropout(self, projection: Projection, batch: Pass) -> StripDropout | None:
        rows = self.last and projection is not self.qkv
        keys = batch.keys.index_select(0, batch.last_rows) if rows else batch.keys
        return projection.dropout(keys, batch.seed, batch.step, batch.training)


def _add_and_norm(
    norm: Norm | None, x: Tensor, branch: Tensor | None, projection: Projection
) -> tuple[Tensor, Tensor | None, Tensor]:
    """-> (the projection's input buffer, rstd, x + branch)"""
    buffer = projection.buffer(x.shape[0])
    home = buffer[:, : projection.k]
    if norm is None:
        total = x if branch is None else x + branch
        home.copy_(total)
        return buffer, None, total
    if branch is None:
        _, rstd, total = norm.forward(x, out=home)
    else:
        _, rstd, total = norm.forward(branch, residual=x, out=home)
    return buffer, rstd, total


def _normed(norm: Norm | None, rstd: Tensor | None) -> NormedInput | None:
    if norm is None:
        return None
    assert rstd is not None
    return NormedInput(rstd, norm.weight, norm.offset)


def _leave_norm(
    norm: Norm | None,
    dy: Tensor,
    total: Tensor,
    rstd: Tensor | None,
    dtotal: Tensor,
    adapters: Adapters | None,
) -> Tensor:
    """Gradient of total: through the norm (and the adapters behind it), and past it."""
    if norm is not None:
        assert rstd is not None
        return norm.backward(dy, total, rstd, residual_grad=dtotal, adapters=adapters)
    return dtotal + (dy if adapters is None else _with_adapters(dy, adapters))


def _with_adapters(dy: Tensor, adapters: Adapters) -> Tensor:
    """dy + scaling · Σ mask_i ∘ (d_i a_i), where no norm reads dy and could add it (OLMo 2)."""
    d, a, dropout, scaling = adapters
    if dropout is None:
        return torch.addmm(dy, d, a, alpha=scaling)
    strips = len(dropout.modules)
    for i, (d_i, a_i) in enumerate(zip(d.chunk(strips, 1), a.chunk(strips), strict=True)):
        mask = lora_dropout_mask(dropout.key(i), dy.shape[1], dropout.p)
        dy = dy + (d_i @ a_i).mul_(mask).mul_(scaling)
    return dy
