"""The MLP half of a block, on any rows of a micro-batch: forward, and the backward written out.

    total2  = total + branch1                    added by the kernel that norms it
    z       = norm2(total2) | tail
    gate,up = [z | t] [W | B]ᵀ
    h       = act(gate) ∘ up | tail
    branch2 = post2(h Wᵀ)

No row sees another, so a long micro-batch may go through in tiles of rows. Its widest tensors, gate, up
and their gradients, are what tiles make small: 7 numbers of the MLP's width for a token and block.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from fastsft_kernels import fused
from fastsft_kernels.fused import Adapters
from torch import Tensor

from fastsft.model.micro_pass import Pass, scaled
from fastsft.model.norm import Norm, add_and_norm, leave_norm, normed_again, normed_input
from fastsft.model.projection import DecodeBuffers, Projection
from fastsft.model.spec import DecoderSpec


class MlpSaved(NamedTuple):
    """What the MLP keeps for backward, [n, ..] for n rows; None where the family has no such norm."""

    total2: Tensor
    rstd2: Tensor | None
    tail_gate_up: Tensor
    gate_up: Tensor | None  # None: made again in backward
    tail_down: Tensor
    unnormed2: Tensor | None  # h Wᵀ before post2
    post2_rstd: Tensor | None


class Mlp:
    """One layer's MLP with the norms before and behind it."""

    def __init__(
        self,
        spec: DecoderSpec,
        name: str,
        mlp: Any,
        norms: tuple[Norm | None, Norm | None],
        dtype: Any,
    ) -> None:
        self.spec = spec
        self.norm2, self.post2 = norms
        gate_up = [mlp.gate_up_proj] if spec.fused_weights else [mlp.gate_proj, mlp.up_proj]
        self.gate_up = Projection(f"{name} gate_up", gate_up, dtype)
        self.down = Projection(f"{name} down", [mlp.down_proj], dtype)
        self.projections = (self.gate_up, self.down)
        self.norms = [norm for norm in norms if norm is not None]

    def forward(
        self,
        total: Tensor,
        branch: Tensor | None,
        keys: Tensor,
        known: Pass,
        buffers: DecodeBuffers,
        *,
        to_output: bool = True,
    ) -> tuple[Tensor | None, MlpSaved]:
        """total, branch [n, H], dropout's keys [n] -> (branch2, saved); total2 is saved.total2.

        Without `to_output` the last product is left out where backward can do without it.
        """
        z, rstd2, total2 = add_and_norm(self.norm2, total, branch, self.gate_up)
        tail_gu = self.gate_up.fill_tail(z, known.dropout(self.gate_up, keys))
        gate_up = self.gate_up.product(z, buffers)
        del z
        h = self.down.buffer(gate_up.shape[0])
        gate, up = gate_up.chunk(2, 1)
        fused.glu_forward(gate, up, self.spec.activation, out=h[:, : self.down.k])
        tail_down = self.down.fill_tail(h, known.dropout(self.down, keys))
        branch2 = unnormed2 = post2_rstd = None
        if to_output or self.post2 is not None:
            branch2 = self.down.product(h, buffers)
            if self.post2 is not None:
                unnormed2 = branch2
                branch2, post2_rstd, _ = self.post2.forward(unnormed2)
            else:
                scaled(branch2, self.spec)
        saved = MlpSaved(total2, rstd2, tail_gu, gate_up, tail_down, unnormed2, post2_rstd)
        return branch2, saved

    def backward(
        self,
        grad: Tensor,
        saved: MlpSaved,
        keys: Tensor,
        known: Pass,
        buffers: DecodeBuffers,
        out: Tensor | None = None,
    ) -> Tensor:
        """grad of total2 and branch2 -> grad of total2, through the MLP and past it.

        The gradients of what trains are added to their sums.
        """
        if saved.gate_up is None:
            saved = saved._replace(gate_up=self._gate_up_again(saved, buffers))
        if self.post2 is not None:
            assert saved.unnormed2 is not None and saved.post2_rstd is not None
            dout = self.post2.backward(grad, saved.unnormed2, saved.post2_rstd)
        else:
            dout = scaled(grad, self.spec, copy=True)
        self.down.add_grad_b(dout, saved.tail_down)
        dh, adapters = self.down.backward(dout, buffers, known.dropout(self.down, keys))
        dgate_up = self._glu_backward(dh, dout, adapters, saved)
        del dh, adapters  # one tensor: the adapters' part is a view of its tail
        drop = known.dropout(self.gate_up, keys)
        dz, adapters = self.gate_up.backward(dgate_up, buffers, drop)
        if self.gate_up.trains:
            z = normed_again(self.norm2, saved.total2, self.gate_up)
            self.gate_up.add_grad_weight(dgate_up, z)
        self.gate_up.add_grad_a(adapters, saved.total2, normed_input(self.norm2, saved.rstd2))
        return leave_norm(self.norm2, dz, saved.total2, saved.rstd2, grad, adapters, out)

    def _gate_up_again(self, saved: MlpSaved, buffers: DecodeBuffers) -> Tensor:
        z = normed_again(self.norm2, saved.total2, self.gate_up)
        self.gate_up.restore_tail(z, saved.tail_gate_up)
        return self.gate_up.product(z, buffers)

    def _glu_backward(
        self, dh: Tensor, dout: Tensor, adapters: Adapters | None, saved: MlpSaved
    ) -> Tensor:
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
        h = torch.empty_like(dh) if self.down.trains else None
        glu = fused.glu_backward(
            dh,
            gate,
            up,
            self.spec.activation,
            adapters=adapters,
            tails=tails,
            h_out=h,
            out=(dgate, dup),
            grads_out=grads_out,
        )
        if h is not None:
            self.down.add_grad_weight(dout, h)
        if not pair:  # one fused weight: its strip belongs to gate and up alike
            gate_up.add_grad_b(dgate_up, tail)
        if grads_out is None and glu.da_down is not None:
            self.down.grad_a += glu.da_down
        if grads_out is None and glu.db_gate is not None and glu.db_up is not None:
            gate_up.add_padded_b(torch.cat([glu.db_gate, glu.db_up]))
        return dgate_up
