"""Strips: the columns of adapters that share an input, and their dropout."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from fastsft_kernels.checks import (
    bad,
    check_device,
    check_float,
    check_like,
    check_shape,
    describe,
)
from fastsft_kernels.dropout import DropoutKey, check_key


class StripDropout(NamedTuple):
    """Dropout of S adapters that share an input; strip i has the masks of modules[i].

    p in (0, 1); seed, step, modules: ints in [0, 2^32); rows: int64 [T], the key of each token
    (see `fastsft_kernels.dropout`). Kernels apply the mask alone: the factor
    `dropout.keep_scale(p)` belongs to the scaling that the caller passes or has folded in.
    """

    p: float
    seed: int
    step: int
    modules: tuple[int, ...]
    rows: Tensor

    def key(self, strip: int) -> DropoutKey:
        return DropoutKey(self.seed, self.step, self.modules[strip], self.rows)


def check_strips(op: str, columns: int, tokens: int, dropout: StripDropout | None) -> None:
    """Raises ValueError unless `columns` split into as many strips as the dropout has modules."""
    if dropout is None:
        return
    if not 0 < dropout.p < 1:
        raise bad(op, "dropout.p must be in (0, 1)", dropout.p, "Pass dropout=None for none.")
    if not dropout.modules or columns % len(dropout.modules):
        raise bad(
            op,
            f"{columns} columns do not split into {len(dropout.modules)} strips",
            f"modules {dropout.modules}",
            "Pass one module per strip, strips being of one width.",
        )
    for strip in range(len(dropout.modules)):
        check_key(op, dropout.key(strip), tokens)


class Adapters(NamedTuple):
    """What S adapters that share an input add to its gradient: scaling · Σ_i mask_i ∘ (d_i · a_i).

    d [T, S·R] = dY · B, at any row pitch, as the product with [W | B] leaves it behind dX; a [S·R, K].
    Strip i is columns iR to (i+1)R of d and the same rows of a; mask_i, of shape [T, K], is its
    dropout mask. `scaling` is the adapters' own, times `dropout.keep_scale(p)`; it is applied in
    float32, so that nobody needs a launch for it.
    """

    d: Tensor
    a: Tensor
    dropout: StripDropout | None = None
    scaling: float = 1.0


def check_adapters(op: str, adapters: Adapters, tokens: int, columns: int) -> None:
    """Raises ValueError unless `adapters` make a term of shape [tokens, columns].

    That the dtype fits the caller's tensors is the caller's to check: `d` and `a` agree.
    """
    d, a, dropout, _ = adapters
    check_float(op, "adapters.d", d)
    if d.dim() != 2 or d.shape[1] % 16 or not d.shape[1]:
        raise bad(
            op,
            "adapters.d must be [T, S·R], its strips multiples of 16 wide",
            describe(d),
            "Fill the strips up with zeros.",
        )
    check_shape(op, "adapters.d", d, (tokens, d.shape[1]), "[T, S·R]")
    check_shape(op, "adapters.a", a, (d.shape[1], columns), "[S·R, K]")
    check_like(op, "adapters.a", a, "adapters.d", d)
    if dropout is None:
        return
    check_strips(op, d.shape[1], tokens, dropout)
    if d.shape[1] // len(dropout.modules) % 16:
        raise bad(
            op,
            "strips must be multiples of 16 wide",
            f"{d.shape[1]} columns for {len(dropout.modules)} modules",
            "Fill the strips up with zeros.",
        )
    check_device(op, "adapters.dropout.rows", dropout.rows, "adapters.d", d)
