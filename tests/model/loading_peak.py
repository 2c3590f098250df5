"""What loading for QLoRA takes of host memory: a checkpoint of random weights, its anonymous pages sampled.

    python loading_peak.py FOLDER LAYERS HIDDEN      writes it (17 layers of 2048 are 2.1 GB)
    python loading_peak.py FOLDER                    loads it

Loading prints one JSON object, in bytes: `peak` of anonymous memory over its beginning (pages mapped from
files are the file cache's), `quantised` what the layers take at the end, `largest` tensor, `file`.
"""

from __future__ import annotations

import json
import sys
import threading
import time
from pathlib import Path

import torch
from transformers import AutoConfig, LlamaConfig, LlamaForCausalLM

from fastsft.model.load import load_model
from fastsft.model.quant import NF4Linear


def anonymous() -> int:
    """Bytes of this process's memory that no file stands behind."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(next(x for x in status.splitlines() if x.startswith("RssAnon")).split()[1])


def write(folder: Path, layers: int, hidden: int) -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        num_hidden_layers=layers,
        hidden_size=hidden,
        intermediate_size=4 * hidden,
        num_attention_heads=hidden // 128,
        num_key_value_heads=2,
        vocab_size=8192,
        tie_word_embeddings=True,
    )
    torch.set_default_dtype(torch.bfloat16)
    LlamaForCausalLM(config).save_pretrained(folder, max_shard_size="500MB")


class Peak(threading.Thread):
    """The most anonymous memory seen, looked at every millisecond."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.highest, self.done = 0, False

    def run(self) -> None:
        while not self.done:
            self.highest = max(self.highest, anonymous())
            time.sleep(0.001)


def measure(folder: Path) -> dict[str, int]:
    hidden = AutoConfig.from_pretrained(folder).hidden_size
    # Imports what loading imports, and takes what the first quantising takes.
    load_model(folder.parent / "warm", quantize=True, dtype=torch.bfloat16)
    start, peak = anonymous(), Peak()
    peak.start()
    model = load_model(folder, quantize=True, dtype=torch.bfloat16)
    peak.done = True
    peak.join()
    layers = [m for m in model.modules() if isinstance(m, NF4Linear)]
    return {
        "peak": peak.highest - start,
        "quantised": sum(b.nbytes for m in layers for b in m.buffers()),
        "largest": 2 * hidden * 4 * hidden,
        "file": sum(f.stat().st_size for f in folder.glob("*.safetensors")),
    }


if __name__ == "__main__":
    place = Path(sys.argv[1])
    if len(sys.argv) > 2:
        layers, hidden = int(sys.argv[2]), int(sys.argv[3])
        write(place / "model", layers, hidden)
        write(place / "warm", 1, 128)
    else:
        print(json.dumps(measure(place / "model")))
