"""What every block knows of the micro-batch that passes through it."""

from __future__ import annotations

from typing import NamedTuple

from fastsft_kernels.fused import StripDropout
from torch import Tensor

from fastsft.model.projection import Projection
from fastsft.model.spec import DecoderSpec


class Pass(NamedTuple):
    """A micro-batch of T tokens, n of them trained.

    blocks: the attention's programs (fused.attention_blocks);
    rope: table name -> (cos, sin), float32 [T, R/2]; keys int64 [T]: dropout's; training: dropout is on;
    last_rows int64 [n]: the trained rows, to which the last block's o and MLP are limited; last_keys
    int64 [n]: their keys.
    """

    cu_seqlens: Tensor
    max_seqlen: int
    blocks: Tensor
    rope: dict[str, tuple[Tensor, Tensor]]
    keys: Tensor
    last_rows: Tensor
    last_keys: Tensor
    seed: int
    step: int
    training: bool

    def dropout(self, projection: Projection, keys: Tensor) -> StripDropout | None:
        """The masks of a projection's strips, or None where there are none."""
        return projection.dropout(keys, self.seed, self.step, self.training)


def scaled(branch: Tensor, spec: DecoderSpec, *, copy: bool = False) -> Tensor:
    """branch · residual_scale (Granite), in place unless `copy`; the branch itself where that is 1."""
    if spec.residual_scale == 1.0:
        return branch
    return branch * spec.residual_scale if copy else branch.mul_(spec.residual_scale)
