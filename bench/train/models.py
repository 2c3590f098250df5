"""The models of the benchmarks: published shapes, random weights.

Speed and memory depend on shapes, not on what a model knows, so nothing is downloaded: weights are
drawn on the device from a seed, as transformers initialises them, and written once as an ordinary
checkpoint that every trainer loads in its own way. Loading is part of the seconds to the first
step. The tokenizer beside it exists because trainers ask for one; rows are token ids already.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch

BUILTIN = Path(__file__).parents[2] / "fastsft" / "builtin" / "tiny"


def _llama3(factor: float, **sizes: Any) -> dict[str, Any]:
    rope = {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    common = {"vocab_size": 128256, "max_position_embeddings": 131072, "rms_norm_eps": 1e-5}
    return {"model_type": "llama", "rope_parameters": rope} | common | sizes


def _qwen3(**sizes: Any) -> dict[str, Any]:
    rope = {"rope_type": "default", "rope_theta": 1e6}
    common = {"vocab_size": 151936, "max_position_embeddings": 40960, "rms_norm_eps": 1e-6}
    return {"model_type": "qwen3", "rope_parameters": rope, "head_dim": 128} | common | sizes


def _sizes(hidden: int, ffn: int, layers: int, heads: int, kv_heads: int) -> dict[str, int]:
    return {
        "hidden_size": hidden,
        "intermediate_size": ffn,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
    }


CONFIGS: dict[str, dict[str, Any]] = {
    "llama-3.1-8b": _llama3(8.0, **_sizes(4096, 14336, 32, 32, 8), tie_word_embeddings=False),
    "llama-3.2-1b": _llama3(32.0, **_sizes(2048, 8192, 16, 32, 8), tie_word_embeddings=True),
    "qwen3-4b": _qwen3(**_sizes(2560, 9728, 36, 32, 8), tie_word_embeddings=True),
    "qwen3-8b": _qwen3(**_sizes(4096, 12288, 36, 32, 8), tie_word_embeddings=False),
    "mistral-7b": {
        "model_type": "mistral",
        "vocab_size": 32768,
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-5,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
        "sliding_window": None,
        "tie_word_embeddings": False,
        **_sizes(4096, 14336, 32, 32, 8),
    },
    # For a CPU: large enough that products are most of the work, small enough for seconds.
    "tiny": {
        "model_type": "llama",
        "vocab_size": 1024,
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-5,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
        "tie_word_embeddings": True,
        **_sizes(128, 256, 2, 4, 2),
    },
}
NAMES = (*CONFIGS, "builtin:tiny")


def folder_of(name: str, parent: Path, seed: int, longest: int) -> Path:
    """Where `write` puts a model."""
    if name == "builtin:tiny":
        return BUILTIN
    positions = max(CONFIGS[name]["max_position_embeddings"], longest)
    return parent / f"model-{name}-{seed}-{positions}"


def is_there(folder: Path) -> bool:
    """Whether a model was written there whole."""
    return folder == BUILTIN or (folder / "whole").exists()


def write(name: str, parent: Path, *, seed: int = 0, longest: int = 0) -> Path:
    """The checkpoint of model `name` in a folder under `parent`; one that is there whole is kept.

    longest: positions the config must allow at least. Other models under `parent` are deleted: they
    take 16 GB each.
    """
    folder = folder_of(name, parent, seed, longest)
    if is_there(folder):
        return folder
    for other in parent.glob("model-*"):
        shutil.rmtree(other)
    from transformers import AutoConfig, AutoModelForCausalLM

    options = dict(CONFIGS[name])
    options["max_position_embeddings"] = max(options["max_position_embeddings"], longest)
    tokens = {"bos_token_id": None, "eos_token_id": 1, "pad_token_id": 0}
    config = AutoConfig.for_model(options.pop("model_type"), **options, **tokens)
    on_gpu = torch.cuda.is_available()
    dtype = torch.bfloat16 if on_gpu else torch.float32
    torch.manual_seed(seed)
    with torch.device("cuda" if on_gpu else "cpu"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    model.save_pretrained(folder)
    del model
    _write_tokenizer(folder)
    (folder / "whole").touch()
    return folder


def _write_tokenizer(folder: Path) -> None:
    """Bytes as tokens, and the control tokens trainers look for."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    names = ["<pad>", "</s>", "<unk>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE({n: i for i, n in enumerate(names)}, [], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(names[:3])
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "pad_token": "<pad>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
