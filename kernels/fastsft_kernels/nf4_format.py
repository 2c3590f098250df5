"""NF4 storage: 4-bit codes in blocks, their scales, and bitsandbytes' names for them in a checkpoint.

A weight [N, K] is read row by row and cut into blocks of 64 numbers; a block may run over the
end of a row. Each number is stored as the index of the nearest of 16 fixed values times the
block's largest magnitude (absmax). Two indices share a byte, the earlier one in the high half.
With double quantisation the absmax values, less their mean (offset), are themselves stored as
8-bit codes in blocks of 256: 0.516 bytes per weight in all.

    weight[i] = code[index_i] * absmax[i // 64]
    absmax[b] = code2[absmax8_b] * absmax2[b // 256] + offset

each product and sum rounded to float32 by itself (a fused multiply-add gives other values), the
result rounded once to the weight's dtype. That is what bitsandbytes computes, so its files load
here and ours load there, bit for bit.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache

import torch
from torch import Tensor

from fastsft_kernels.checks import bad, describe

# Quantiles of the normal distribution, scaled to [-1, 1], with an exact zero
# (Dettmers et al., QLoRA, 2023, appendix E).
NF4_VALUES = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)
NESTED_BLOCK_SIZE = 256
_STATE_KEY = ".quant_state.bitsandbytes__nf4"
_DTYPES = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
}


@cache
def nf4_code() -> Tensor:
    """The 16 NF4 values, float32[16], ascending, on the CPU."""
    return torch.tensor(NF4_VALUES, dtype=torch.float32)


@cache
def dynamic_code() -> Tensor:
    """The 256 values of the signed dynamic 8-bit type, float32[256], ascending, on the CPU.

    (Dettmers et al., 8-bit Approximations, 2015.) Seven decades, 10^-6 to 1; decade i is cut
    into 2^i equal parts of [0.1, 1] and the mid of each part is a value, with both signs: 2 * 127
    values, and zero and one make 256.
    """
    values = [0.0, 1.0]
    for decade in range(7):
        edges = torch.linspace(0.1, 1.0, 2**decade + 1, dtype=torch.float32)
        middles = (10.0 ** (decade - 6)) * ((edges[:-1] + edges[1:]) / 2.0)
        values += middles.tolist() + (-middles).tolist()
    return torch.tensor(sorted(values), dtype=torch.float32)


@dataclass(frozen=True, eq=False)
class NF4Weight:
    """A weight [N, K] in NF4.

    packed   uint8[ceil(N*K/2)]    two codes a byte, the earlier number in the high half
    absmax   uint8[blocks] (codes into code2), or float32[blocks] without double quantisation
    absmax2  float32[ceil(blocks/256)] or None      offset  float32 scalar tensor or None
    code     float32[16]           code2   float32[256] or None
    shape    (N, K)                dtype   of the original weight, and of a decode by default
    """

    packed: Tensor
    absmax: Tensor
    absmax2: Tensor | None
    offset: Tensor | None
    code: Tensor
    code2: Tensor | None
    shape: tuple[int, int]
    dtype: torch.dtype
    block_size: int = 64

    @property
    def device(self) -> torch.device:
        return self.packed.device

    @property
    def double_quant(self) -> bool:
        return self.absmax2 is not None

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        tensors = (self.packed, self.absmax, self.absmax2, self.offset, self.code, self.code2)
        return sum(t.nbytes for t in tensors if t is not None)

    def to(self, device: torch.device | str) -> NF4Weight:
        """The same weight on another device."""

        def move(t: Tensor | None) -> Tensor | None:
            return None if t is None else t.to(device)

        return replace(
            self,
            packed=self.packed.to(device),
            absmax=self.absmax.to(device),
            absmax2=move(self.absmax2),
            offset=move(self.offset),
            code=self.code.to(device),
            code2=move(self.code2),
        )

    def state_dict(self, prefix: str) -> dict[str, Tensor]:
        """The tensors bitsandbytes stores for the weight called `prefix`, for safetensors.

        `prefix` is the full name, such as "layers.0.q_proj.weight". Reads `offset` on the host.
        """
        facts: dict[str, object] = {
            "quant_type": "nf4",
            "blocksize": self.block_size,
            "dtype": str(self.dtype).removeprefix("torch."),
            "shape": list(self.shape),
        }
        state = {
            prefix: self.packed.view(-1, 1),
            f"{prefix}.absmax": self.absmax,
            f"{prefix}.quant_map": self.code,
        }
        if self.absmax2 is not None:
            assert self.offset is not None and self.code2 is not None
            facts |= {
                "nested_blocksize": NESTED_BLOCK_SIZE,
                "nested_dtype": "float32",
                "nested_offset": self.offset.item(),
            }
            state[f"{prefix}.nested_absmax"] = self.absmax2
            state[f"{prefix}.nested_quant_map"] = self.code2
        data = bytearray(json.dumps(facts).encode())
        state[prefix + _STATE_KEY] = torch.frombuffer(data, dtype=torch.uint8).clone()
        return state

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Tensor], key: str) -> NF4Weight:
        """Reads the weight called `key` from tensors in bitsandbytes' layout.

        Other entries of `state` are left alone. The packed codes may be stored as any dtype
        (bnb_4bit_quant_storage); the bytes are what counts.
        Raises ValueError for a missing tensor, another 4-bit type, or sizes that do not fit.
        """
        facts = _read_facts(state, key)
        shape, block = tuple(facts["shape"]), int(facts["blocksize"])
        if len(shape) != 2:
            raise bad(
                "NF4Weight", f"{key} must be a matrix", list(shape), "Only linear layers load."
            )
        packed = _tensor(state, key).contiguous().flatten().view(torch.uint8)
        absmax = _tensor(state, f"{key}.absmax").flatten()
        code = _tensor(state, f"{key}.quant_map").flatten().float()
        if code.shape != (16,) or not torch.allclose(code.cpu(), nf4_code(), rtol=0, atol=1e-6):
            raise bad(
                "NF4Weight",
                f"{key}.quant_map must be the 16 NF4 values",
                code.tolist(),
                "The file is damaged, or quantised to another 4-bit type.",
            )
        numbers = shape[0] * shape[1]
        blocks = -(-numbers // block)
        _check_size(key, packed, -(-numbers // 2))
        _check_size(f"{key}.absmax", absmax, blocks)
        absmax2 = offset = code2 = None
        if f"{key}.nested_absmax" in state:
            if int(facts["nested_blocksize"]) != NESTED_BLOCK_SIZE:
                raise bad(
                    "NF4Weight",
                    f"{key}: nested blocks must have {NESTED_BLOCK_SIZE} scales",
                    facts["nested_blocksize"],
                    "Quantise the model again with bitsandbytes' defaults.",
                )
            absmax2 = _tensor(state, f"{key}.nested_absmax").flatten().float()
            code2 = _tensor(state, f"{key}.nested_quant_map").flatten().float()
            offset = torch.tensor(float(facts["nested_offset"]), device=packed.device)
            _check_size(f"{key}.nested_absmax", absmax2, -(-blocks // NESTED_BLOCK_SIZE))
            _check_size(f"{key}.nested_quant_map", code2, 256)
        else:
            absmax = absmax.float()
        dtype = _DTYPES[facts["dtype"]]
        return cls(packed, absmax, absmax2, offset, code, code2, shape, dtype, block)


def _read_facts(state: Mapping[str, Tensor], key: str) -> dict:
    if key + _STATE_KEY not in state:
        raise bad(
            "NF4Weight",
            f"no NF4 weight called {key}: {key}{_STATE_KEY} is missing",
            f"{sum(name.startswith(key) for name in state)} names beginning with {key}",
            "Only bitsandbytes' nf4 checkpoints load; quantise from the unquantised model else.",
        )
    facts = json.loads(bytes(state[key + _STATE_KEY].cpu().tolist()).decode())
    if facts.get("quant_type") != "nf4" or facts.get("dtype") not in _DTYPES:
        raise bad(
            "NF4Weight",
            f"{key} must be nf4 of a 16- or 32-bit dtype",
            facts,
            "Load the unquantised model instead.",
        )
    return facts


def _tensor(state: Mapping[str, Tensor], name: str) -> Tensor:
    if name not in state:
        raise bad(
            "NF4Weight",
            f"{name} is missing",
            "none",
            "The checkpoint is not whole; fetch it again.",
        )
    return state[name]


def _check_size(name: str, x: Tensor, size: int) -> None:
    if x.numel() != size:
        raise bad(
            "NF4Weight",
            f"{name} must have {size} entries",
            describe(x),
            "The checkpoint is damaged; fetch it again.",
        )
