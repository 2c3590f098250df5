"""How much memory a run will need, from the model's sizes alone.

    weights          as they lie in memory (an NF4 weight 0.516 bytes)
    trained          16 bytes a parameter: fp32 master, gradient and AdamW's two moments
    activations      per token: what transformers' decoder layers save for backward
    head             one piece of logits; the weight's own gradient and copies where it trains

For the fast engine activations are what `block.Saved` holds, counted from the spec, and on top of them
what one block needs while its backward runs. For the compat engine: per token and layer a Llama-shaped
block saves two fp32 vectors of the hidden size (what its norms saw; a trained norm keeps two more), the
two normed ones, q, k, v and the attention's output twice, four of the MLP's width (gate, its
activation, up, their product) and the adapters' low-rank products. With recomputation only the block's
input stays, and one block's worth while it is recomputed. It is an estimate to size micro-batches by,
not a promise.

The head turns a piece of logits into fp32 logits and probabilities and casts the gradient back. A trained
weight's gradient is summed in fp32 and scaled by the upstream gradient, two tensors of its size; a
parametrized weight (extras.py) is made anew, a copy for each of its users.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from fastsft_kernels.reference.cross_entropy import default_chunk_rows
from torch.nn.utils import parametrize

from fastsft.model.lora import LoraLinear

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from fastsft.model.fast import FastEngine
    from fastsft.model.spec import DecoderSpec

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


def estimate_fast_memory(
    engine: FastEngine, *, trained: int, optimizer: str, activations: str
) -> MemoryEstimate:
    """Predict for the fast engine, with `trained` trainable parameters and one of its policies."""
    spec, size, model = engine.spec, engine.dtype.itemsize, engine.model
    kept, working = fast_token_bytes(
        spec, size, [p.tail for p in engine.blocks[0].projections], activations
    )
    return MemoryEstimate(
        weights=_weight_bytes(model) - 4 * trained + engine.own_bytes,
        trained=_trained_bytes(optimizer) * trained,
        head=_head_bytes(model, size),
        context=_context_bytes(model),
        per_token=spec.layers * kept + working,
    )


def fast_token_bytes(
    spec: DecoderSpec, size: int, tails: Sequence[int], activations: str
) -> tuple[int, int]:
    """(bytes a layer keeps for a token, bytes one token needs while a block works).

    tails: columns of the adapters' strips on qkv, o, gate-up and down.
    """
    h, f = spec.hidden, spec.ffn
    norms = 16 if spec.norms == "sandwich" else 8  # a float32 rstd each
    qk, qkv = (
        n * spec.head_dim for n in (spec.heads + spec.kv_heads, spec.heads + 2 * spec.kv_heads)
    )
    o = spec.heads * spec.head_dim
    o = 64 * -(-(o + tails[1]) // 64) if tails[1] else o  # kept at its pitch
    numbers = 2 * h + qkv + o + sum(tails)
    if spec.norms != "pre":
        numbers += 2 * h
    if spec.qk_norm:
        numbers += qk
        norms += 4 * (spec.heads + spec.kv_heads if spec.qk_norm == "head" else 2)
    rest = size * numbers + norms + 4 * spec.heads  # and the attention's log-sum-exp
    whole = rest + size * 2 * f
    # Backward at its widest: dh, dgate and dup beside the gradients of the stream; forward is below.
    working = size * (3 * f + 3 * h + tails[3])
    if activations == "keep":
        return whole, working
    if activations == "recompute_mlp":
        return rest, working + size * (2 * f + h)
    return size * h, working + whole


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
