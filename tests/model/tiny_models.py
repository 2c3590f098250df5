"""Tiny random models of many families, and packs of random documents, for the model tests."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from fastsft.data.batches import Document, MicroBatch, collate

VOCABULARY = 96

_LLAMA = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
_MOE = {**_LLAMA, "num_experts_per_tok": 2}
_OLD = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}

FAMILIES: dict[str, dict] = {
    "llama": {**_LLAMA, "tie_word_embeddings": True},
    "qwen2": _LLAMA,
    "qwen3": {**_LLAMA, "head_dim": 8},
    "gemma2": {**_LLAMA, "head_dim": 8, "sliding_window": 6, "attn_logit_softcapping": 2.0,
               "final_logit_softcapping": 1.0, "query_pre_attn_scalar": 8},
    "gemma3_text": {**_LLAMA, "head_dim": 8, "sliding_window": 6,
                    "layer_types": ["sliding_attention", "full_attention"]},
    "phi3": {**_LLAMA, "pad_token_id": 0, "sliding_window": None},
    "mistral": {**_LLAMA, "sliding_window": 5},
    "granite": {**_LLAMA, "logits_scaling": 7.0, "attention_multiplier": 0.3,
                "residual_multiplier": 0.4, "embedding_multiplier": 3.0},
    "olmo2": _LLAMA,
    "smollm3": {**_LLAMA, "no_rope_layers": [1, 0], "use_sliding_window": False},
    "cohere": {**_LLAMA, "logit_scale": 0.25},
    "gpt_neox": {**_OLD, "intermediate_size": 48, "max_position_embeddings": 128},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128},
    "phi": {**_LLAMA, "partial_rotary_factor": 0.5},
    "mixtral": {**_MOE, "num_local_experts": 4},
    "qwen3_moe": {**_MOE, "head_dim": 8, "num_experts": 4, "moe_intermediate_size": 16},
    "deepseek_v3": {**_MOE, "n_routed_experts": 4, "n_group": 2, "topk_group": 1, "q_lora_rank": 8,
                    "kv_lora_rank": 8, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 8,
                    "moe_intermediate_size": 16, "first_k_dense_replace": 1,
                    "num_key_value_heads": 4},
    "opt": {**_OLD, "ffn_dim": 48, "max_position_embeddings": 128, "word_embed_proj_dim": 32},
    "bloom": {"hidden_size": 32, "n_layer": 2, "n_head": 4},
    "falcon": {**_OLD, "new_decoder_architecture": False, "alibi": False},
    "mpt": {"d_model": 32, "n_layers": 2, "n_heads": 4, "max_seq_len": 128, "expansion_ratio": 2},
    "mamba": {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 4},
    "rwkv": {"hidden_size": 32, "num_hidden_layers": 2, "attention_hidden_size": 32, "context_length": 64},
    "gpt_oss": {**_MOE, "head_dim": 8, "num_local_experts": 4, "sliding_window": 5},
}  # fmt: skip


def tiny(
    family: str, *, seed: int = 0, dtype: torch.dtype = torch.float32, **more
) -> PreTrainedModel:
    """A random model of `family`, its weights large enough for every part to matter."""
    tokens = {"pad_token_id": None, "bos_token_id": None, "eos_token_id": None}
    options = {**tokens, **FAMILIES[family], "vocab_size": VOCABULARY, **more}
    config = AutoConfig.for_model(family, **options)
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() >= 2:
                parameter.mul_(5.0)
            elif parameter.dim() == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model.to(dtype)


def documents(
    lengths: Sequence[int] = (9, 1, 14, 3), *, seed: int = 0, trained: float = 0.6
) -> list[Document]:
    """Random documents, about `trained` of their tokens to be learned (the last always)."""
    rng = np.random.default_rng(seed)
    found = []
    for key, n in enumerate(lengths):
        mask = rng.random(n) < trained
        mask[-1] = True
        ids = rng.integers(1, VOCABULARY, n).astype(np.int32)
        found.append(Document(key + 1, ids, mask))
    return found


def batch_of(docs: Sequence[Document], *, round_to: int = 1) -> MicroBatch:
    """The documents side by side, as tensors."""
    batch = collate(docs, sum(int(d.trained[1:].sum()) for d in docs), round_to=round_to)
    for name in ("ids", "labels", "positions", "cu_seqlens", "trained_rows", "row_key"):
        setattr(batch, name, torch.from_numpy(getattr(batch, name)))
    return batch
