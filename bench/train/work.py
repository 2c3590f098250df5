"""Operations a training step needs, from a config: the numerator of MFU.

Two a weight and token forward, two for the gradient that goes on, two more where the weight itself
trains. The head counts at trained tokens alone, since no other logit is needed. Attention: scores
and their sum over values, 2·2·D a pair of tokens and head, causal, three times as much with its
backward. Whatever is computed again or computed in vain (padding, masked logits, checkpointing)
does not count.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from bench.train.workloads import Rows


def linear_weights(config: dict[str, Any]) -> int:
    """Weights of all projections: they meet every token once."""
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    size = config.get("head_dim") or hidden // heads
    kv = config["num_key_value_heads"]
    attention = hidden * size * (2 * heads + 2 * kv)
    return config["num_hidden_layers"] * (attention + 3 * hidden * config["intermediate_size"])


def adapter_weights(config: dict[str, Any], rank: int) -> int:
    """Weights of adapters of this rank on all projections."""
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    size = config.get("head_dim") or hidden // heads
    q, kv, ffn = heads * size, config["num_key_value_heads"] * size, config["intermediate_size"]
    sides = (hidden + q) * 2 + (hidden + kv) * 2 + (hidden + ffn) * 3
    return config["num_hidden_layers"] * rank * sides


def operations(folder: Path, rows: Rows, method: str, rank: int) -> float:
    """Of one pass over `rows`, forward and backward; sliding windows count as if they saw all."""
    config = json.loads((folder / "config.json").read_text())
    tokens, trained = float(rows.lengths.sum()), float(rows.targets.sum())
    linear = linear_weights(config)
    head = config["hidden_size"] * config["vocab_size"]
    adapters = 0 if method == "full" else adapter_weights(config, rank)
    each = 6 if method == "full" else 4
    heads = config["num_attention_heads"]
    size = config.get("head_dim") or config["hidden_size"] // heads
    pairs = float((rows.lengths.astype(np.float64) ** 2).sum()) / 2
    attention = 3 * 4 * size * heads * pairs * config["num_hidden_layers"]
    return tokens * (each * linear + 6 * adapters) + each * trained * head + attention
