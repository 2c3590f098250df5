"""Models and micro-batches without numbers: shapes and dtypes on the meta device, of any size at no cost."""

from __future__ import annotations

from typing import Any

import torch
from fastsft_kernels import NF4Weight

from fastsft.data.batches import MicroBatch
from fastsft.model.quant import NF4Linear


def shaped_model(config: Any, dtype: torch.dtype, *, nf4: bool, remote_code: bool = False) -> Any:
    """transformers' model of its `config`; nf4: every linear layer but the head in 4 bits."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=remote_code)
    model.tie_weights()
    if nf4:
        for name, module in list(model.named_modules()):
            if type(module) is torch.nn.Linear and module is not model.get_output_embeddings():
                model.set_submodule(name, NF4Linear(_nf4(module.weight), module.bias))
    return model


def _nf4(weight: torch.Tensor) -> NF4Weight:
    n, k = weight.shape
    blocks = -(-n * k // 64)

    def empty(count: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.empty(count, dtype=dtype, device="meta")

    return NF4Weight(
        packed=empty(-(-n * k // 2), torch.uint8),
        absmax=empty(blocks, torch.uint8),
        absmax2=empty(-(-blocks // 256), torch.float32),
        offset=torch.empty((), device="meta"),
        code=empty(16, torch.float32),
        code2=empty(256, torch.float32),
        shape=(n, k),
        dtype=weight.dtype,
    )


def meta_batch(lengths: list[int], trained: int) -> MicroBatch:
    """Documents of these lengths, the last `trained` tokens of the row to be learned."""
    tokens = sum(lengths)

    def empty(count: int, dtype: torch.dtype = torch.int64) -> torch.Tensor:
        return torch.empty(count, dtype=dtype, device="meta")

    return MicroBatch(
        ids=empty(tokens),
        labels=empty(tokens),
        positions=empty(tokens, torch.int32),
        cu_seqlens=empty(len(lengths) + 1, torch.int32),
        max_seqlen=max(lengths),
        trained_rows=empty(trained),
        row_key=empty(tokens),
        step_trained=trained,
        tokens=tokens,
        lengths=tuple(lengths),
        targets=(trained,) + (0,) * (len(lengths) - 1),
        sequences=tuple(range(len(lengths))),
        host_ids=empty(tokens),
    )
