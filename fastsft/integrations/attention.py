"""Our attention for any trainer on transformers: `attn_implementation="fastsft"`.

    import fastsft.integrations
    model = AutoModelForCausalLM.from_pretrained(..., attn_implementation="fastsft")

The name stands in transformers' AttentionInterface and AttentionMaskInterface after the import. What comes:

    packed rows     position_ids that restart, or cu_seq_lens_q with max_length_q (FlashAttention's
                    keywords, which transformers' and TRL's padding-free collators pass): documents do not
                    see each other
    padded batches  a 2-D attention_mask: the padding is left out of the computation; its outputs are
                    zero. Beside a mask position_ids say nothing of packing, as in transformers' masks
    plain batches   each row a document
    a cache         generation after the prompt, where queries are fewer than keys: torch's own attention

Torch's attention with the whole mask also runs, explicitly, where `varlen_attention` cannot: dropout of
attention weights in training, a position bias, a mask of four dimensions, batches that are no causal runs
(layout.py). It is told what transformers tells it: packing by position_ids, in passes without a cache. It
needs memory for the mask, L x L. Attention sinks are refused, and so is whatever would return the
weights. Grouped heads, windows and soft-caps are `varlen_attention`'s own.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from fastsft.integrations.layout import BatchLayout, Runs, batch_layout
from fastsft.model.attention import CannotPack, Documents, documents_attention

NAME = "fastsft"


def register_attention() -> None:
    """Make `attn_implementation="fastsft"` known to transformers. Importing the package has done it."""
    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, batch_layout)


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: BatchLayout | Tensor | None,
    *,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    cu_seq_lens_q: Tensor | None = None,
    max_length_q: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """query [B, Hq, L, D], key and value [B, Hkv, N, D]; returns ([B, L, Hq, D], no attention weights).

    Raises CannotPack, a ValueError, for attention sinks, wanted weights, and packing that only
    cu_seq_lens_q tells of where torch's attention would have to run.
    """
    if kwargs.pop("s_aux", None) is not None:
        raise CannotPack(
            'attn_implementation="fastsft" has no attention sinks; load this model with another one'
        )
    if kwargs.get("output_attentions"):
        raise CannotPack(
            'attn_implementation="fastsft" makes no attention weights to return; use "eager" for them'
        )
    layout = attention_mask if isinstance(attention_mask, BatchLayout) else None
    packed = None
    if cu_seq_lens_q is not None and (layout is None or not layout.has_padding):
        packed = _packed(cu_seq_lens_q, max_length_q)
    runs = None
    if _can_run(module, query, key, kwargs):
        if packed is not None and not isinstance(attention_mask, Tensor):
            runs = Runs(packed, None)
        elif layout is not None:
            unseen = None if kwargs.get("use_cache") is False else kwargs.get("position_ids")
            runs = layout.runs if unseen is None else layout.runs_with(unseen)
    if runs is not None:
        return _by_documents(
            query, key, value, runs, scale=scaling, window=sliding_window, softcap=softcap
        ), None
    if packed is not None and (layout is None or layout.rows_are_documents):
        raise CannotPack(
            "fastsft attention: cu_seq_lens_q says the row is packed, but here torch's attention has to"
            " run (dropout of attention weights, a position bias, a cache or a mask), and only"
            " position_ids that restart would tell it; pass them too"
        )
    mask = layout.mask if layout is not None else attention_mask
    assert not isinstance(mask, BatchLayout)
    if softcap is None:
        out, _ = sdpa_attention_forward(module, query, key, value, mask, scaling=scaling, **kwargs)
        return out, None
    return _capped(module, query, key, value, mask, scaling, softcap, kwargs), None


def _packed(cu_seqlens: Tensor, max_length: int | None) -> Documents:
    if max_length is None:  # one synchronisation a layer: collators that know the lengths pass it
        max_length = int(cu_seqlens.diff().max())
    return Documents(cu_seqlens.int(), int(max_length))


def _can_run(module: nn.Module, query: Tensor, key: Tensor, options: dict[str, Any]) -> bool:
    """Whether `varlen_attention` computes what is asked for, if the batch is made of documents."""
    return (
        _is_causal(module, options)
        and query.shape[2] == key.shape[2]
        and not options.get("dropout")
        and options.get("position_bias") is None
        and options.get("cache") is None
    )


def _is_causal(module: nn.Module, options: dict[str, Any]) -> bool:
    asked = options.get("is_causal")
    return bool(getattr(module, "is_causal", True) if asked is None else asked)


def _by_documents(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    runs: Runs,
    *,
    scale: float | None,
    window: int | None,
    softcap: float | None,
) -> Tensor:
    batch, heads, length, _ = query.shape
    documents, rows = runs
    documents = documents._replace(cu_seqlens=documents.cu_seqlens.to(query.device))
    query, key, value = (x.transpose(1, 2).flatten(0, 1) for x in (query, key, value))
    if rows is not None:
        rows = rows.to(query.device)
        query, key, value = (x.index_select(0, rows) for x in (query, key, value))
    out = documents_attention(
        query, key, value, documents, scale=scale, window=window, softcap=softcap
    )
    if rows is not None:
        out = out.new_zeros(batch * length, *out.shape[1:]).index_copy(0, rows, out)
    return out.reshape(batch, length, heads, -1)


def _capped(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scaling: float | None,
    softcap: float,
    options: dict[str, Any],
) -> Tensor:
    """Soft-capped attention with a whole mask, for generation: torch's fused attention has no cap."""
    groups = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(groups, 1) for x in (key, value))
    scores = query @ key.mT * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    scores = softcap * torch.tanh(scores.float() / softcap)
    if options.get("position_bias") is not None:
        scores = scores + options["position_bias"]
    if mask is None and query.shape[2] > 1 and _is_causal(module, options):
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=query.device).tril()
    if mask is not None and mask.dtype == torch.bool:
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    elif mask is not None:
        scores = scores + mask
    weights = torch.softmax(scores, -1).to(value.dtype)
    weights = F.dropout(weights, options.get("dropout", 0.0), module.training)
    return (weights @ value).transpose(1, 2).contiguous()
