"""LoRA dropout whose mask belongs to a token, not to a place in a buffer.

A mask bit is a function of (seed, step, row key, module, column): the row key names the training
example and the position in it. Packing, the size of a micro-batch, recomputation and resuming
then leave every mask as it was. The random numbers are Philox4x32-10 (Salmon et al., Random123,
2011), a counter-based generator: 128 bits for each (key, counter), in any order.

    key     = (seed, step)
    counter = (row low 32 bits, row high 32 bits, column // 8, module)

The four words give eight 16-bit numbers, for columns 8c to 8c+7, the low half of a word first. A
column is kept if its number is at least round(p * 65536), so the keep rate is exact to 2^-16 and
kept values are scaled by the reciprocal of that exact rate.

In torch a 32-bit word lives in an int64. A product of two words may overflow it, but the bits
wrap as those of an unsigned product do, and the high word is cut out of them.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fastsft_kernels.checks import bad, describe

_WORD = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10
# Counters at a time. On a CPU their words stay in the cache. On a GPU an op over 2 M of them takes
# longer than its launch (10 us at 4 TB/s), so a larger piece gains nothing, while the dozen words
# alive at once, 16 MiB each, would grow with it.
CPU_PIECE = 1 << 16
GPU_PIECE = 1 << 21


class DropoutKey(NamedTuple):
    """Names the random numbers of one linear layer in one step.

    seed, step, module: ints in [0, 2^32). rows: int64[T], the key of each token.
    """

    seed: int
    step: int
    module: int
    rows: Tensor


def random_key(rows: int, device: torch.device) -> DropoutKey:
    """A key drawn from torch's CPU generator, for callers that name no tokens."""
    seed, step = torch.randint(0, _WORD, (2,)).tolist()
    return DropoutKey(seed, step, 0, torch.arange(rows, device=device))


def check_key(op: str, key: DropoutKey, rows: int) -> None:
    """Raises ValueError unless `key` fits `rows` tokens."""
    if key.rows.dtype != torch.int64 or tuple(key.rows.shape) != (rows,):
        raise bad(
            op,
            f"the dropout key needs one int64 row key per token, [{rows}]",
            describe(key.rows),
            "Pass the micro-batch's row_key.",
        )
    for name in ("seed", "step", "module"):
        value = getattr(key, name)
        if not 0 <= value <= _WORD:
            raise bad(op, f"the dropout key's {name} must be in [0, 2^32)", value, "Reduce it.")


def threshold(p: float) -> int:
    """16-bit numbers below this are dropped."""
    return round(p * 65536)


def keep_scale(p: float) -> float:
    """What kept values are multiplied by."""
    return 65536 / (65536 - threshold(p))


def lora_dropout_mask(key: DropoutKey, columns: int, p: float) -> Tensor:
    """bool[T, columns], True where kept; T = len(key.rows)."""
    check_key("lora_dropout_mask", key, key.rows.numel())
    rows = key.rows
    groups = -(-columns // 8)
    kept = torch.empty(rows.numel(), groups * 8, dtype=torch.bool, device=rows.device)
    column = torch.arange(groups, device=rows.device)[None, :]
    module = torch.full_like(column, key.module)
    piece = CPU_PIECE if rows.device.type == "cpu" else GPU_PIECE
    step = max(1, piece // max(groups, 1))
    for start in range(0, rows.numel(), step):
        row = rows[start : start + step, None]
        w0, w1, w2, w3 = philox(
            (row & _WORD, (row >> 32) & _WORD, column, module), (key.seed, key.step)
        )
        # Two words to an int64, whose 16-bit parts then lie in the order of the columns. Torch
        # compares them signed, so both sides are shifted by half the range.
        pairs = torch.stack([w0 | (w1 << 32), w2 | (w3 << 32)], dim=-1)
        halves = pairs.view(torch.int16).view(row.numel(), groups * 8) ^ -32768
        torch.ge(halves, threshold(p) - 32768, out=kept[start : start + step])
    return kept[:, :columns]


def philox(
    counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[int, int]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox4x32-10 on int64 tensors that hold 32-bit words and broadcast against each other."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_ROUNDS):
        p0, p1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        # The high words of c1 and c3 are not cleared until they have passed through the xor.
        c0 = ((p1 >> 32) ^ c1).bitwise_xor_(k0).bitwise_and_(_WORD)
        c2 = ((p0 >> 32) ^ c3).bitwise_xor_(k1).bitwise_and_(_WORD)
        c1, c3 = p1, p0
        k0, k1 = (k0 + _WEYL[0]) & _WORD, (k1 + _WEYL[1]) & _WORD
    return c0, c1 & _WORD, c2, c3 & _WORD
