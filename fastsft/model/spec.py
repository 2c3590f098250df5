"""What a decoder is made of, read from its transformers config: one row per family.

    config.json -> DecoderSpec -> the fast engine's blocks

The families here differ in where norms stand, whether q and k are normed, which layers turn (rope) and
which see a window, in a few multipliers, and in whether projections are stored fused. Everything else is
a size. A model outside the table, or with a setting its row does not know, runs on the compat
engine; `why_not_fast` says why.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

ACTIVATIONS = {
    "silu": "silu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "gelu": "gelu",
}
# Frequencies that do not depend on how long the longest row of a batch is.
FIXED_ROPE = ("default", "linear", "llama3", "yarn")


@dataclass(frozen=True)
class DecoderSpec:
    """One decoder. T tokens, H hidden, F ffn, D head_dim.

    norms     pre: before attention and MLP. post: behind them only (OLMo 2). sandwich: both (Gemma)
    qk_norm   of q and k before rope: "head" (over D), "all" (over all heads at once), or None
    rope      per layer: which table of the model's rotary module turns q and k; None: none
    embedding_scale   beyond what the embedding module does itself (Gemma's scales)
    windows   per layer: how many tokens back a token sees, itself included; None: all
    """

    family: str
    layers: int
    hidden: int
    ffn: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    eps: float
    activation: str
    tied: bool
    rope: tuple[str | None, ...]
    windows: tuple[int | None, ...]
    norms: str = "pre"
    norm_offset: float = 0.0
    qk_norm: str | None = None
    fused_weights: bool = False
    attention_scale: float | None = None
    attention_softcap: float | None = None
    logits_softcap: float | None = None
    embedding_scale: float = 1.0
    residual_scale: float = 1.0
    logits_scale: float = 1.0


class NotFast(Exception):
    """Why a model runs on the compat engine; the text is shown to the user."""


def read_spec(config: Any) -> DecoderSpec:
    """The spec of a transformers config. Raises NotFast with the reason where there is none."""
    family = config.model_type
    if family not in FAMILIES:
        raise NotFast(f"the fast engine has no row for model_type {family!r}")
    activation = getattr(config, "hidden_activation", None) or config.hidden_act
    if activation not in ACTIVATIONS:
        raise NotFast(f"the fast engine has no activation {activation!r}")
    layers = config.num_hidden_layers
    heads = config.num_attention_heads
    kinds = _rope_kinds(config)
    unknown = sorted({k for k in kinds.values() if k not in FIXED_ROPE})
    if unknown:
        raise NotFast(
            f"its rotary frequencies ({', '.join(unknown)}) depend on the longest document in a batch"
        )
    common: dict[str, Any] = {
        "family": family,
        "layers": layers,
        "hidden": config.hidden_size,
        "ffn": config.intermediate_size,
        "heads": heads,
        "kv_heads": getattr(config, "num_key_value_heads", None) or heads,
        "head_dim": getattr(config, "head_dim", None) or config.hidden_size // heads,
        "vocabulary": config.vocab_size,
        "eps": config.rms_norm_eps,
        "activation": ACTIVATIONS[activation],
        "tied": bool(config.tie_word_embeddings),
        "rope": ("",) * layers,
        "windows": (None,) * layers,
    }
    return DecoderSpec(**(common | FAMILIES[family](config)))


def _rope_kinds(config: Any) -> dict[str, str]:
    """Name of each rope table ("" where there is one) -> its type."""
    parameters = config.rope_parameters
    if "rope_type" in parameters:
        return {"": parameters["rope_type"]}
    return {name: values["rope_type"] for name, values in parameters.items()}


def _windows(config: Any) -> tuple[int | None, ...]:
    """One entry per layer, from layer_types where the config has them."""
    kinds = getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers
    return tuple(config.sliding_window if k == "sliding_attention" else None for k in kinds)


def _everywhere(config: Any) -> tuple[int | None, ...]:
    return (getattr(config, "sliding_window", None),) * config.num_hidden_layers


def _gemma(config: Any) -> dict[str, Any]:
    return {
        "norms": "sandwich",
        "norm_offset": 1.0,
        "windows": _windows(config),
        "attention_scale": config.query_pre_attn_scalar**-0.5,
        "attention_softcap": config.attn_logit_softcapping,
        "logits_softcap": config.final_logit_softcapping,
    }


FAMILIES: dict[str, Callable[[Any], dict[str, Any]]] = {
    "llama": lambda c: {},
    "mistral": lambda c: {"windows": _everywhere(c)},
    "qwen2": lambda c: {"windows": _windows(c)},
    "qwen3": lambda c: {"windows": _windows(c), "qk_norm": "head"},
    "gemma2": _gemma,
    "gemma3_text": lambda c: _gemma(c) | {"qk_norm": "head", "rope": tuple(c.layer_types)},
    "phi3": lambda c: {"windows": _everywhere(c), "fused_weights": True},
    "smollm3": lambda c: {
        "windows": _windows(c),
        "rope": tuple("" if used else None for used in c.no_rope_layers),
    },
    "olmo2": lambda c: {"norms": "post", "qk_norm": "all"},
    "granite": lambda c: {
        "attention_scale": c.attention_multiplier,
        "embedding_scale": c.embedding_multiplier,
        "residual_scale": c.residual_multiplier,
        "logits_scale": 1.0 / c.logits_scaling,
    },
}
