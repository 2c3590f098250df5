"""How much memory a run on the compat engine will need, from the sizes of the model as loaded.

    weights          as they lie in memory (an NF4 weight 0.516 bytes)
    trained          16 bytes a parameter: fp32 master, gradient and AdamW's two moments
    activations      per token: what transformers' decoder layers save for backward
    head             one piece of logits; the weight's own gradient and copies where it trains

Per token and layer a Llama-shaped block saves two fp32 vectors of the hidden size (what its norms saw; a
trained norm keeps two more), the two normed ones, q, k, v and the attention's output twice, four of the
MLP's width (gate, its activation, up, their product) and the adapters' low-rank products. With recomputation
only the block's input stays, and one block's worth while it is recomputed. It is an estimate to size
micro-batches by, not a promise.

The head turns a piece of logits into fp32 logits and probabilities and casts the gradient back. A trained
weight's gradient is summed in fp32 and scaled by the upstream gradient, two tensors of its size; a
parametrized weight (extras.py) is made anew, a copy for each of its users.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from fastsft_kernels.reference.cross_entropy import default_chunk_rows
from torch.nn.utils import parametrize

from fastsft.model.lora import LoraLinear

if TYPE_CHECKING:
    from transformers import PreTrainedModel


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
    hidden, layers = config.hidden_size, config.num_hidden_layers
    size, full = dtype.itemsize, _norms_train(model)
    layer = _layer_bytes(config, size, norms_train=full) + size * _ranks(model) // layers
    # Autocast keeps the products' weights a second time, in its own dtype.
    cast = trained * size if full and size < 4 else 0
    return MemoryEstimate(
        weights=_weight_bytes(model) - 4 * trained + cast,
        trained=_trained_bytes(optimizer) * trained,
        head=_head_bytes(model, size),
        context=_context_bytes(model),
        per_token=(layer + layers * hidden * size if recompute else layers * layer)
        + 3 * hidden * size,
    )


def _weight_bytes(model: PreTrainedModel) -> int:
    tensors = {t.data_ptr(): t.nbytes for t in (*model.parameters(), *model.buffers())}
    return sum(tensors.values())


def _trained_bytes(optimizer: str) -> int:
    """A parameter that trains: master, gradient and AdamW's moments, in float32 or 8 bits."""
    return 16 if optimizer == "adamw" else 10


def _context_bytes(model: PreTrainedModel) -> int:
    return CUDA_CONTEXT if next(model.parameters()).is_cuda else 0


def _layer_bytes(config: Any, size: int, *, norms_train: bool) -> int:
    """What one block saves for a token, in products of `size` bytes a number."""
    hidden = config.hidden_size
    heads = getattr(config, "num_attention_heads", 1) or 1
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    head_dim = getattr(config, "head_dim", None) or hidden // heads
    width = getattr(config, "intermediate_size", None) or 4 * hidden
    norms = 4 * hidden * (4 if norms_train else 2)
    return norms + size * (2 * hidden + (3 * heads + 2 * kv_heads) * head_dim + 4 * width)


def _norms_train(model: PreTrainedModel) -> bool:
    """Full fine-tuning: everything trains, vectors too."""
    return all(parameter.requires_grad for parameter in model.parameters())


def _ranks(model: PreTrainedModel) -> int:
    """Numbers the adapters save for a token: x Aᵀ of each."""
    return sum(module.r for module in model.modules() if isinstance(module, LoraLinear))


def _head_bytes(model: PreTrainedModel, size: int) -> int:
    """One piece of logits at its largest, and what a trained embedding and head make beside it."""
    embedding: Any = model.get_input_embeddings()
    head: Any = model.get_output_embeddings()
    weight: Any = (embedding if head is None else head).weight
    rows = default_chunk_rows(weight, weight.shape[0])
    total = rows * weight.shape[0] * (8 + (size if size < 4 else 0))
    for module in (embedding, head):
        if module is not None and parametrize.is_parametrized(module, "weight"):
            total += weight.numel() * size
    if head is not None and any(parameter.requires_grad for parameter in head.parameters()):
        total += 2 * 4 * weight.numel()
    return total
