"""Our attention inside transformers' models, through the interface transformers has for it.

transformers' models look their attention up by name in `AttentionInterface`. Under the name
"fastsft_packed" stands a function that runs `varlen_attention`: the documents of a packed row [1, T] are
told apart by `cu_seq_lens_q`, the keyword transformers itself uses for FlashAttention, so no token sees
another document and no T x T mask exists. `host_lengths` takes the same way and spares a GPU's host the
wait for them.

No mask function is registered under the name, on purpose: transformers then builds no mask at all (and
saves the host synchronisation with which it looks for packing). The price is that padding would go
unseen; therefore a call without `cu_seq_lens_q` is refused, and whoever generates text does so inside
`plain_attention(model)`, which puts the model's own implementation back for a while. The name "fastsft", for
other people's trainers, takes whatever batch comes (fastsft.integrations); both run `documents_attention`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch.nn.functional as F
from fastsft_kernels import varlen_attention
from fastsft_kernels.checks import compute_dtype
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel

NAME = "fastsft_packed"


class CannotPack(ValueError):
    """The model asks its attention for something `varlen_attention` does not do."""


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    cu_seq_lens_q: Tensor | None = None,
    max_length_q: int | None = None,
    host_lengths: Sequence[int] | None = None,
    s_aux: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """query [1, Hq, T, D], key and value [1, Hkv, T, D]; returns ([1, T, Hq, D], no attention weights).

    Raises CannotPack where the call asks for what `varlen_attention` does not do: sinks, a position bias, a
    cache, or no packing. Dropout of attention weights is not applied: it would depend on the packing.
    """
    if cu_seq_lens_q is None or max_length_q is None:
        raise CannotPack(
            "fastsft attention got no cu_seq_lens_q: it runs packed documents only; to generate or to use "
            "padding, go through fastsft.model.attention.plain_attention(model)"
        )
    if s_aux is not None or kwargs.get("position_bias") is not None:
        raise CannotPack("fastsft attention has neither attention sinks nor position biases")
    if query.shape[0] != 1 or key.shape[2] != query.shape[2]:
        raise CannotPack(
            f"fastsft attention takes one packed row without a cache; got query {tuple(query.shape)}, "
            f"key {tuple(key.shape)}"
        )
    out = documents_attention(
        query[0].transpose(0, 1),
        key[0].transpose(0, 1),
        value[0].transpose(0, 1),
        Documents(cu_seq_lens_q, max_length_q, host_lengths),
        scale=scaling,
        window=sliding_window,
        softcap=softcap,
    )
    return out.unsqueeze(0), None


class Documents(NamedTuple):
    """Where documents lie in T rows: cu_seqlens int32[S+1], the longest, the host's copy of the lengths."""

    cu_seqlens: Tensor
    max_seqlen: int
    lengths: Sequence[int] | None = None


def documents_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    documents: Documents,
    *,
    scale: float | None,
    window: int | None,
    softcap: float | None,
) -> Tensor:
    """Causal attention inside documents: query [T, Hq, D], key [T, Hkv, D], value [T, Hkv, Dv].

    Returns [T, Hq, Dv].

    Dv may be less than D (DeepSeek). Runs in value's dtype, or autocast's: a norm in float32 before
    the rotation, as PEFT leaves it, would otherwise make queries and values differ.
    """
    dtype = compute_dtype(value)
    query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    width, value_width = query.shape[-1], value.shape[-1]
    if value_width != width:
        value = F.pad(value, (0, width - value_width))
    out = varlen_attention(
        query,
        key,
        value,
        documents.cu_seqlens,
        documents.max_seqlen,
        causal=True,
        scale=scale,
        window=window,
        softcap=softcap,
        lengths=documents.lengths,
    )
    return out[..., :value_width]


AttentionInterface.register(NAME, packed_attention)


def can_pack(model: PreTrainedModel) -> bool:
    """Whether the model calls attention through the interface, with windows and caps as keywords."""
    return model.is_backend_compatible() and bool(getattr(model, "_supports_flash_attn", False))


@contextmanager
def plain_attention(model: PreTrainedModel) -> Iterator[None]:
    """The model with its own default attention: for generation, padding, caches, and as an oracle."""
    current = model.config._attn_implementation
    if current != NAME:
        yield
        return
    model.set_attn_implementation(model.get_correct_attn_implementation(None))
    try:
        yield
    finally:
        model.set_attn_implementation(NAME)
