"""The attention half of a block: forward, and the backward written out.

    total   = x + branch                         branch: what the block before left to be added
    y       = norm1(total) | tail                buffers at a pitch, see projection.py
    qkv     = [y | t] [W | B]ᵀ                   q/k norm, rope in place
    o       = attention(q, k, v) | tail
    branch1 = post1(o Wᵀ)

In the last block what follows the attention is made for the trained rows only: nothing ever looks at
the others again. Backward comes in three steps, so that a block that was recomputed can let go of o
before the scores' gradient is made, and of q, k and v before that of the input is.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from fastsft_kernels import fused
from fastsft_kernels.fused import AttentionOptions
from torch import Tensor

from fastsft.model.micro_pass import Pass, scaled
from fastsft.model.norm import Norm, add_and_norm, leave_norm, normed_again, normed_input
from fastsft.model.projection import DecodeBuffers, Projection
from fastsft.model.spec import DecoderSpec


class AttentionSaved(NamedTuple):
    """What the attention keeps for backward; None where the family has no such norm."""

    total: Tensor
    rstd1: Tensor | None
    tail_qkv: Tensor
    qkv: Tensor | None  # None: not needed any more
    qk_raw: Tensor | None  # q and k before their norms
    q_rstd: Tensor | None
    k_rstd: Tensor | None
    lse: Tensor
    o: (
        Tensor | None
    )  # [T, pitch], tail included; in the last block the trained rows. None: not needed any more
    unnormed1: Tensor | None  # o Wᵀ before post1
    post1_rstd: Tensor | None


class SelfAttention:
    """One layer's attention with the norms before and behind it."""

    def __init__(
        self,
        spec: DecoderSpec,
        index: int,
        attention: Any,
        norms: tuple[Norm | None, Norm | None],
        qk_norms: tuple[Norm | None, Norm | None],
        dtype: torch.dtype,
    ) -> None:
        self.spec, self.index = spec, index
        self.last = index == spec.layers - 1
        self.rope = spec.rope[index]
        self.norm1, self.post1 = norms
        self.q_norm, self.k_norm = qk_norms
        qkv = [attention.qkv_proj] if spec.fused_weights else []
        qkv = qkv or [attention.q_proj, attention.k_proj, attention.v_proj]
        self.qkv = Projection(f"layer {index} qkv", qkv, dtype)
        self.o = Projection(f"layer {index} o", [attention.o_proj], dtype)
        self.projections = (self.qkv, self.o)
        self.norms = [norm for norm in (*norms, *qk_norms) if norm is not None]

    # --- forward -------------------------------------------------------------------------------

    def forward(
        self, x: Tensor, branch: Tensor | None, known: Pass, buffers: DecodeBuffers
    ) -> tuple[Tensor, Tensor, AttentionSaved]:
        """x [T, H], branch [T, H] or None -> (the stream, what is to be added to it, saved).

        The first two are [T, H], in the last block [n, H].
        """
        y, rstd1, total = add_and_norm(self.norm1, x, branch, self.qkv)
        tail_qkv = self.qkv.fill_tail(y, known.dropout(self.qkv, known.keys))
        qkv = self.qkv.product(y, buffers)
        del y
        qk_raw, q_rstd, k_rstd = self._norm_qk(qkv)
        q, k, v = self._heads(qkv)
        if self.rope is not None:
            fused.rope_(q, k, *known.rope[self.rope])
        o = self.o.buffer(total.shape[0])
        options = self._options(known)
        _, lse = fused.attention_forward(q, k, v, known.cu_seqlens, options, out=self._per_head(o))
        residual = total
        if self.last:
            residual, o = (t.index_select(0, known.last_rows) for t in (total, o))
        self.o.fill_tail(o, known.dropout(self.o, self._keys(known)), copy=False)
        branch1 = self.o.product(o, buffers)
        unnormed1 = post1_rstd = None
        if self.post1 is not None:
            unnormed1 = branch1
            branch1, post1_rstd, _ = self.post1.forward(unnormed1)
        else:
            scaled(branch1, self.spec)
        saved = AttentionSaved(
            total, rstd1, tail_qkv, qkv, qk_raw, q_rstd, k_rstd, lse, o, unnormed1, post1_rstd
        )
        return residual, branch1, saved

    def _norm_qk(self, qkv: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Norms q and k in place -> (both as they were, rstds)."""
        if self.q_norm is None or self.k_norm is None:
            return None, None, None
        q, k = self._normed_parts(qkv)
        raw = torch.cat([q.flatten(1), k.flatten(1)], 1)
        _, q_rstd, _ = self.q_norm.forward(q, out=q)
        _, k_rstd, _ = self.k_norm.forward(k, out=k)
        return raw, q_rstd, k_rstd

    # --- backward ------------------------------------------------------------------------------

    def backward_o(
        self, grad: Tensor, saved: AttentionSaved, known: Pass, buffers: DecodeBuffers
    ) -> tuple[Tensor, Tensor]:
        """grad of branch1 -> (grad of the attention's output [T, Hq, D], delta [Hq, T])."""
        assert saved.o is not None
        if self.post1 is not None:
            assert saved.unnormed1 is not None and saved.post1_rstd is not None
            dout = self.post1.backward(grad, saved.unnormed1, saved.post1_rstd)
        else:
            dout = scaled(grad, self.spec, copy=True)
        self.o.add_grad_b(dout, self.o.tail_of(saved.o))
        self.o.add_grad_weight(dout, saved.o)
        do, adapters = self.o.backward(dout, buffers, known.dropout(self.o, self._keys(known)))
        self.o.add_grad_a(adapters, saved.o[:, : self.o.k], None)
        do = self._per_head(do)
        delta = fused.attention_delta(self._per_head(saved.o), do, adapters=adapters)
        if self.last:
            tokens, rows = saved.total.shape[0], known.last_rows
            do = do.new_zeros(tokens, *do.shape[1:]).index_copy_(0, rows, do)
            delta = delta.new_zeros(delta.shape[0], tokens).index_copy_(1, rows, delta)
        return do, delta

    def backward_scores(
        self, do: Tensor, delta: Tensor, saved: AttentionSaved, known: Pass
    ) -> Tensor:
        """-> gradient of the qkv product, [T, N]."""
        assert saved.qkv is not None
        dqkv = torch.empty_like(saved.qkv)
        q, k, v = self._heads(saved.qkv)
        dq, dk, dv = self._heads(dqkv)
        out = (dq, dk, dv)
        options = self._options(known)
        fused.attention_backward(do, q, k, v, saved.lse, delta, known.cu_seqlens, options, out=out)
        if self.rope is not None:
            fused.rope_(dq, dk, *known.rope[self.rope], inverse=True)
        if self.q_norm is not None and self.k_norm is not None:
            assert saved.qk_raw is not None
            assert saved.q_rstd is not None and saved.k_rstd is not None
            dq, dk = self._normed_parts(dqkv)
            q, k = self._normed_parts(saved.qk_raw)
            self.q_norm.backward(dq, q, saved.q_rstd, out=dq)
            self.k_norm.backward(dk, k, saved.k_rstd, out=dk)
        return dqkv

    def backward_qkv(
        self,
        dqkv: Tensor,
        dtotal: Tensor,
        saved: AttentionSaved,
        known: Pass,
        buffers: DecodeBuffers,
        *,
        to_input: bool,
    ) -> Tensor | None:
        """Gradient of x and branch (None unless `to_input`); dtotal: what reached total past the block."""
        self.qkv.add_grad_b(dqkv, saved.tail_qkv)
        if self.qkv.trains:
            self.qkv.add_grad_weight(dqkv, normed_again(self.norm1, saved.total, self.qkv))
        trained_norm = self.norm1 is not None and self.norm1.grad is not None
        if not (to_input or self.qkv.tail or trained_norm):
            return None
        dy, adapters = self.qkv.backward(dqkv, buffers, known.dropout(self.qkv, known.keys))
        self.qkv.add_grad_a(adapters, saved.total, normed_input(self.norm1, saved.rstd1))
        if not (to_input or trained_norm):
            return None
        return leave_norm(self.norm1, dy, saved.total, saved.rstd1, dtotal, adapters)

    # --- views ---------------------------------------------------------------------------------

    def _keys(self, known: Pass) -> Tensor:
        return known.last_keys if self.last else known.keys

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

    def _options(self, known: Pass) -> AttentionOptions:
        return AttentionOptions(
            known.max_seqlen,
            scale=self.spec.attention_scale,
            window=self.spec.windows[self.index],
            softcap=self.spec.attention_softcap,
            blocks=known.blocks,
        )
