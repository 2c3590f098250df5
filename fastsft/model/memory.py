"""How much memory a run of the compat engine will need, from the model's config alone.

    weights          as they lie in memory (an NF4 weight 0.516 bytes)
    trained          16 bytes a parameter: fp32 master, gradient and AdamW's two moments
    activations      per token: what transformers' decoder layers save for backward
    head             two blocks of logits rows

Per token and layer a Llama-shaped block saves about 8 vectors of the hidden size (residual, both norms'
inputs and outputs, attention's output, the two additions), q, k, v before and after rope, and four of the
MLP's width (gate, its activation, up, their product). With recomputation only the block's input stays, and
one block's worth while it is recomputed. It is an estimate to size micro-batches by, not a promise.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from transformers import PreTrainedModel

HEAD_ROWS = 2048  # rows of logits alive at once, twice: logits and their gradient
CUDA_CONTEXT = 600 * 10**6


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes of each part; `per_token` is what one more token of a micro-batch costs."""

    weights: int
    trained: int
    head: int
    context: int
    per_token: int

    @property
    def fixed(self) -> int:
        return self.weights + self.trained + self.head + self.context

    def total(self, tokens: int) -> int:
        """Predicted peak with micro-batches of `tokens` tokens."""
        return self.fixed + tokens * self.per_token


def estimate_memory(
    model: PreTrainedModel, *, trained: int, optimizer: str, recompute: bool, dtype: torch.dtype
) -> MemoryEstimate:
    """Predict for `model` as loaded, with `trained` trainable parameters."""
    config: Any = model.config.get_text_config()
    hidden = config.hidden_size
    layers = config.num_hidden_layers
    heads = getattr(config, "num_attention_heads", 1) or 1
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    head_dim = getattr(config, "head_dim", None) or hidden // heads
    width = getattr(config, "intermediate_size", None) or 4 * hidden
    layer = dtype.itemsize * (8 * hidden + 2 * (heads + 2 * kv_heads) * head_dim + 4 * width)
    per_token = layer + layers * hidden * dtype.itemsize if recompute else layers * layer
    tensors = {t.data_ptr(): t.nbytes for t in (*model.parameters(), *model.buffers())}
    state = 16 if optimizer == "adamw" else 10
    return MemoryEstimate(
        weights=sum(tensors.values()) - 4 * trained,
        trained=state * trained,
        head=2 * HEAD_ROWS * config.vocab_size * dtype.itemsize,
        context=CUDA_CONTEXT if next(model.parameters()).is_cuda else 0,
        per_token=per_token + 3 * hidden * dtype.itemsize,
    )
