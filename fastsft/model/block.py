"""One decoder block: an attention half and an MLP half, over the fused kernels.

    x, branch ──attention──> total, branch1 ──MLP──> total2, branch2        x + branch is the stream

total2 and branch2 are only ever added to each other, in the next block's norm, so their gradients are
one tensor; so are those of x and branch. Normed inputs and h are not kept: the kernels that need them
again compute them on the fly.

`Kept` is what waits for backward. Recomputing a block is running its forward again: the same kernels on
the same numbers, so its gradients are bitwise those of a kept block. Tiles of rows are for blocks that
keep little; they change the order of sums.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastsft.model.micro_pass import Pass
from fastsft.model.mlp import Mlp, MlpSaved
from fastsft.model.norm import Norm
from fastsft.model.projection import DecodeBuffers, Trained, Zeros
from fastsft.model.self_attention import AttentionSaved, SelfAttention
from fastsft.model.spec import DecoderSpec

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


class Kept(NamedTuple):
    """What a block keeps, one MlpSaved for each tile of rows; only `total` where it is to be recomputed."""

    total: Tensor
    attention: AttentionSaved | None = None
    mlp: tuple[MlpSaved, ...] = ()

    def tensors(self) -> tuple[Tensor | None, ...]:
        """Flat, for autograd to hold."""
        if self.attention is None:
            return (self.total,)
        return (*self.attention, *(tensor for tile in self.mlp for tensor in tile))

    @classmethod
    def of(cls, tensors: tuple[Tensor | None, ...]) -> Kept:
        """The inverse of `tensors`."""
        if len(tensors) == 1:
            assert tensors[0] is not None
            return cls(tensors[0])
        width, tile = len(AttentionSaved._fields), len(MlpSaved._fields)
        attention = AttentionSaved(*tensors[:width])  # type: ignore[arg-type]
        starts = range(width, len(tensors), tile)
        mlp = tuple(MlpSaved(*tensors[i : i + tile]) for i in starts)  # type: ignore[arg-type]
        return cls(attention.total, attention, mlp)


class Block:
    """One layer's weights and its two passes."""

    def __init__(self, spec: DecoderSpec, index: int, layer: Any, dtype: torch.dtype) -> None:
        def norm(owner: nn.Module, name: str | None) -> Norm | None:
            if name is None:
                return None
            master = owner.get_parameter(f"{name}.weight")
            return Norm(master, spec.eps, spec.norm_offset, dtype)

        self.spec, self.index = spec, index
        names = NORM_NAMES[spec.norms]
        norm1, post1, norm2, post2 = (norm(layer, name) for name in names)
        heads = layer.self_attn
        named = ("q_norm", "k_norm") if spec.qk_norm else (None, None)
        qk_norms = norm(heads, named[0]), norm(heads, named[1])
        self.attention = SelfAttention(spec, index, heads, (norm1, post1), qk_norms, dtype)
        self.mlp = Mlp(spec, f"layer {index}", layer.mlp, (norm2, post2), dtype)
        self.projections = (*self.attention.projections, *self.mlp.projections)
        self.norms = [*self.attention.norms, *self.mlp.norms]

    def settle(self, zeros: Zeros) -> list[Trained]:
        """Takes the weights over, once nothing can fail any more: what trains of them."""
        projections = [trained for part in self.projections for trained in part.settle(zeros)]
        norms = [trained for part in self.norms for trained in part.settle(zeros)]
        return projections + norms

    def forward(
        self,
        x: Tensor,
        branch: Tensor | None,
        known: Pass,
        buffers: DecodeBuffers,
        *,
        policy: str,
        mlp_rows: int | None = None,
    ) -> tuple[Tensor, Tensor, Kept]:
        """x [T, H], branch [T, H] or None -> (total2, branch2, kept); in the last block [n, H].

        policy: keep, recompute_mlp, or anything else for the block's input alone.
        """
        residual, branch1, attention = self.attention.forward(x, branch, known, buffers)
        whole = policy in ("keep", "recompute_mlp")
        kept = Kept(attention.total, attention if whole else None)
        del attention  # its tensors, unless they are kept, are free from here on
        if mlp_rows is None or mlp_rows >= residual.shape[0]:
            keys = self._keys(known)
            branch2, saved = self.mlp.forward(residual, branch1, keys, known, buffers)
            assert branch2 is not None
            return saved.total2, branch2, kept._replace(mlp=_for_backward(saved, policy))
        total2, branch2 = branch1.add_(residual), torch.empty_like(residual)
        tiles: tuple[MlpSaved, ...] = ()
        for rows, keys in self._rows(residual, known, mlp_rows):
            part, saved = self.mlp.forward(total2[rows], None, keys, known, buffers)
            assert part is not None
            branch2[rows] = part
            tiles += _for_backward(saved, policy)
            del part, saved
        return total2, branch2, kept._replace(mlp=tiles)

    def backward(
        self,
        grad: Tensor,
        kept: Kept,
        known: Pass,
        buffers: DecodeBuffers,
        *,
        mlp_rows: int | None,
        to_input: bool,
    ) -> Tensor | None:
        """grad of total2 and branch2 -> grad of x and branch (None unless `to_input`).

        The gradients of what trains are added to their sums.
        """
        attention = self.attention
        if kept.attention is not None:
            saved, dtotal = kept.attention, self._mlp_backward(grad, kept, known, buffers)
        else:
            residual, branch1, saved = attention.forward(kept.total, None, known, buffers)
            dtotal = self._mlp_again(grad, residual, branch1, known, buffers, mlp_rows)
            del residual, branch1
        do, delta = attention.backward_o(dtotal, saved, known, buffers)
        saved = saved._replace(o=None, unnormed1=None)
        dqkv = attention.backward_scores(do, delta, saved, known)
        saved = saved._replace(qkv=None, qk_raw=None)
        del do, delta
        if attention.last:
            tokens = (kept.total.shape[0], dtotal.shape[1])
            dtotal = dtotal.new_zeros(tokens).index_copy_(0, known.last_rows, dtotal)
        return attention.backward_qkv(dqkv, dtotal, saved, known, buffers, to_input=to_input)

    def _mlp_backward(
        self, grad: Tensor, kept: Kept, known: Pass, buffers: DecodeBuffers
    ) -> Tensor:
        """Gradient of total2 from what was kept."""
        if len(kept.mlp) == 1:
            return self.mlp.backward(grad, kept.mlp[0], self._keys(known), known, buffers)
        dtotal2, tiles = torch.empty_like(grad), iter(kept.mlp)
        for rows, keys in self._rows(grad, known, kept.mlp[0].total2.shape[0]):
            self.mlp.backward(grad[rows], next(tiles), keys, known, buffers, out=dtotal2[rows])
        return dtotal2

    def _mlp_again(
        self,
        grad: Tensor,
        residual: Tensor,
        branch1: Tensor,
        known: Pass,
        buffers: DecodeBuffers,
        mlp_rows: int | None,
    ) -> Tensor:
        """Gradient of total2, the MLP made again."""
        if mlp_rows is None or mlp_rows >= grad.shape[0]:
            keys = self._keys(known)
            _, saved = self.mlp.forward(residual, branch1, keys, known, buffers, to_output=False)
            return self.mlp.backward(grad, saved, keys, known, buffers)
        total2, dtotal2 = branch1.add_(residual), torch.empty_like(grad)
        for rows, keys in self._rows(grad, known, mlp_rows):
            _, saved = self.mlp.forward(total2[rows], None, keys, known, buffers, to_output=False)
            self.mlp.backward(grad[rows], saved, keys, known, buffers, out=dtotal2[rows])
            del saved  # before the next tile's is made
        return dtotal2

    # --- rows ----------------------------------------------------------------------------------

    def _keys(self, known: Pass) -> Tensor:
        return known.last_keys if self.attention.last else known.keys

    def _rows(self, x: Tensor, known: Pass, mlp_rows: int) -> Iterator[tuple[slice, Tensor]]:
        """Tiles of x's rows, with dropout's keys."""
        keys, n = self._keys(known), x.shape[0]
        for first in range(0, n, mlp_rows):
            rows = slice(first, min(first + mlp_rows, n))
            yield rows, keys[rows]


def settle_blocks(
    blocks: Sequence[Block], wide: torch.dtype, device: torch.device, *, shared: bool
) -> list[list[Trained]]:
    """What trains of each block, its gradient's sum in memory of its own or, if `shared`, of all blocks'."""
    room: list[Tensor] = []  # a shared block's sums, by their order in it
    settled = []
    for block in blocks:
        turn = iter(room)

        def zeros(*shape: int, turn: Iterator[Tensor] = turn) -> Tensor:
            known = next(turn, None) if shared else None
            if known is not None and known.shape == shape:
                return known
            assert known is None, "layers of different shapes cannot share their sums"
            fresh = torch.zeros(shape, dtype=wide, device=device)
            room.append(fresh)
            return fresh

        settled.append(block.settle(zeros))
    return settled


def _for_backward(saved: MlpSaved, policy: str) -> tuple[MlpSaved, ...]:
    """What a policy keeps of a tile."""
    if policy == "keep":
        return (saved,)
    return (saved._replace(gate_up=None),) if policy == "recompute_mlp" else ()
