"""Bytes that live on the device while a step runs, counted on meta tensors: no memory, no GPU.

Every storage an operation makes is followed until it dies. The kernels' own host code runs as on a
card of sm_90 (their scratch buffers are seen, the kernels' work is not). `shaped` makes a model of any
size whose weights exist as shapes alone.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from typing import Any

import torch
from fastsft_kernels.launch import record_launches
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoConfig

from fastsft.config import LoraConfig
from fastsft.data.batches import MicroBatch
from fastsft.model.context import StepContext
from fastsft.model.fast import FastEngine
from fastsft.model.host_weights import TILE
from fastsft.model.lora import add_adapters
from fastsft.model.plan import Plan
from fastsft.model.shapes import shaped_model

LLAMA_8B = {
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
    "tie_word_embeddings": False,
}


class LiveBytes(TorchDispatchMode):
    """Follows the storages that operations return; `peak` is the most that lived at a time."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._known: dict[int, int] = {}

    def follow(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._known or tensor.device.type != "meta":
            return
        self._known[key] = size = storage.nbytes()
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._forget, key)

    def _forget(self, key: int) -> None:
        self.live -= self._known.pop(key)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                self.follow(leaf)
        return result


class _Nothing(list):
    """Launches keep their arguments alive; these are forgotten."""

    def append(self, item: Any) -> None:
        pass


@contextmanager
def counting() -> Iterator[LiveBytes]:
    with record_launches() as recording:
        recording.launches = _Nothing()
        with LiveBytes() as live:
            yield live


def shaped(
    family: str, method: str, *, lora: LoraConfig, dtype: torch.dtype = torch.bfloat16, **sizes: Any
) -> Any:
    """A model without numbers, with adapters on it for lora and qlora."""
    tokens = {"pad_token_id": None, "bos_token_id": None, "eos_token_id": None}
    config = AutoConfig.for_model(family, **{**tokens, **sizes})
    model = shaped_model(config, dtype, nf4=method == "qlora")
    if method != "full":
        with torch.device("meta"):
            add_adapters(model, lora, seed=0, context=StepContext())
    return model


def counted_peak(model: Any, plan: Plan, batch: MicroBatch, **options: Any) -> tuple[int, int]:
    """(the most bytes alive in a step on the device, bytes of what lies in host memory).

    On shapes alone the host is no other device, and a tile of a streamed head no copy.
    """
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    with counting() as live:
        values = (getattr(batch, f.name) for f in fields(batch) if f.name != "host_ids")
        tensors = [t for t in values if isinstance(t, torch.Tensor)]
        for tensor in (*model.parameters(), *model.buffers(), *tensors):
            live.follow(tensor)
        engine = FastEngine(model, StepContext(), plan=plan, **options)
        for _ in range(2):  # the second finds the buffers that the first has made
            loss = engine.loss(batch, step=1).loss_sum
            (loss / 2).backward()
            del loss
        host = engine.stash.host_bytes if engine.stash is not None else 0
        host += embedding.weight.nbytes if plan.host_embedding else 0
        host += head.weight.nbytes if plan.host_head else 0
        tiles = 2 * TILE * head.weight[0].nbytes if plan.host_head else 0
        return live.peak - host + tiles, host
