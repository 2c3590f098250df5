"""NF4 encode and decode in plain torch; see `fastsft_kernels.nf4_format` for the format.

The decode looks up two codes at once: a table of 256 entries of 8 bytes, each the pair of
float32 values of one packed byte. That halves the number of look-ups, and one gather of 8-byte
items is the fastest that torch offers on a CPU. It works in pieces that stay in the cache.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastsft_kernels.nf4_format import NESTED_BLOCK_SIZE, NF4Weight, dynamic_code, nf4_code

_PIECE = 1 << 18  # numbers decoded at a time; a multiple of every block size


def nf4_quantize(weight: Tensor, *, block_size: int = 64, double_quant: bool = True) -> NF4Weight:
    """See `fastsft_kernels.nf4_quantize`."""
    code = nf4_code().to(weight.device)
    indices, absmax = _quantize_blocks(weight.detach().reshape(-1), code, block_size)
    if indices.numel() % 2:
        # The half byte after the last number holds the code of zero, as bitsandbytes leaves it.
        indices = torch.cat([indices, indices.new_full((1,), 7)])
    packed = (indices[::2] << 4) | indices[1::2]
    absmax2 = offset = code2 = None
    if double_quant:
        offset = absmax.mean()
        code2 = dynamic_code().to(weight.device)
        absmax, absmax2 = _quantize_blocks(absmax - offset, code2, NESTED_BLOCK_SIZE)
    shape = (weight.shape[0], weight.shape[1])
    return NF4Weight(packed, absmax, absmax2, offset, code, code2, shape, weight.dtype, block_size)


def _quantize_blocks(x: Tensor, code: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    """Nearest code of each number over its block's absmax -> (uint8[n], float32[blocks])."""
    n = x.numel()
    bounds = (code[:-1] + code[1:]) / 2
    indices = torch.empty(n, dtype=torch.uint8, device=x.device)
    absmax = torch.empty(-(-n // block_size), dtype=torch.float32, device=x.device)
    for start in range(0, n, _PIECE):
        piece = x[start : start + _PIECE].float()
        length = piece.numel()
        pad = -length % block_size
        blocks = torch.nn.functional.pad(piece, (0, pad)).view(-1, block_size)
        scale = blocks.abs().amax(1)
        first = start // block_size
        absmax[first : first + scale.numel()] = scale
        # Times the reciprocal, not divided: bitsandbytes rounds there, and ties depend on it.
        scaled = blocks * (1.0 / scale.clamp(min=1e-38))[:, None]
        nearest = torch.bucketize(scaled.clamp_(-1.0, 1.0), bounds, out_int32=True)
        indices[start : start + length] = nearest.flatten()[:length]
    return indices, absmax


def nf4_dequantize(
    nf4: NF4Weight, *, dtype: torch.dtype = torch.bfloat16, out: Tensor | None = None
) -> Tensor:
    """See `fastsft_kernels.nf4_dequantize`."""
    n = nf4.shape[0] * nf4.shape[1]
    direct = out is not None and out.is_contiguous() and out.dtype == dtype
    flat = (
        out.view(-1)
        if out is not None and direct
        else torch.empty(n, dtype=dtype, device=nf4.packed.device)
    )
    pairs = _pair_table(nf4.code)
    absmax = _decode_absmax(nf4)
    for start in range(0, n, _PIECE):
        stop = min(start + _PIECE, n)
        packed = nf4.packed[start // 2 : (stop + 1) // 2]
        values = pairs.index_select(0, packed.int()).view(torch.float32)[: stop - start]
        scale = absmax[start // nf4.block_size : -(-stop // nf4.block_size)]
        whole = values.numel() // nf4.block_size
        blocks = values[: whole * nf4.block_size].view(whole, nf4.block_size)
        blocks.mul_(scale[:whole, None])
        if whole < scale.numel():  # the last block, cut short
            values[whole * nf4.block_size :].mul_(scale[-1])
        flat[start:stop] = values
    if out is None:
        return flat.view(nf4.shape)
    return out if direct else out.copy_(flat.view(nf4.shape))


def _pair_table(code: Tensor) -> Tensor:
    """float64[256] whose bytes are the two float32 values of each packed byte."""
    high = code.repeat_interleave(16)
    low = code.repeat(16)
    return torch.stack([high, low], dim=1).view(torch.float64).flatten()


def _decode_absmax(nf4: NF4Weight) -> Tensor:
    """float32[blocks]; the product and the sum are rounded apart, on purpose."""
    if nf4.absmax2 is None:
        return nf4.absmax
    assert nf4.code2 is not None and nf4.offset is not None
    scale = nf4.absmax2.repeat_interleave(NESTED_BLOCK_SIZE)[: nf4.absmax.numel()]
    return nf4.code2.index_select(0, nf4.absmax.int()).mul_(scale).add_(nf4.offset)
