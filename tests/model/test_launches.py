"""Kernels a layer launches, counted on the meta device at the shapes of Llama-3.1-8B.

The step runs on tensors without numbers: reading one back, which on a card would wait for it, raises.
"""

from __future__ import annotations

from collections import Counter

import pytest
from fastsft_kernels.launch import forced, record_launches
from live_bytes import LLAMA_8B, shaped
from torch.utils._python_dispatch import TorchDispatchMode

from fastsft.config import LoraConfig
from fastsft.model.context import StepContext
from fastsft.model.fast import FastEngine
from fastsft.model.plan import Plan
from fastsft.model.shapes import meta_batch

FREE = {
    "view", "_unsafe_view", "unsqueeze", "slice", "select", "detach", "t", "split", "split_with_sizes",
    "alias", "expand", "empty", "new_empty", "empty_like",
}  # fmt: skip


class Counted(TorchDispatchMode):
    """Names of torch's own operations that would launch a kernel."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.__name__.split(".")[0]
        self.names += [name] if name not in FREE else []
        return func(*args, **(kwargs or {}))


def launches(layers: int, tokens: int, policy: str, dropout: float) -> tuple[Counter, Counter]:
    """What a QLoRA step launches, forward and backward."""
    lora = LoraConfig(r=16, dropout=dropout)
    model = shaped("llama", "qlora", lora=lora, **LLAMA_8B | {"num_hidden_layers": layers})
    batch = meta_batch([tokens // 4] * 4, tokens // 2)
    with record_launches() as recording:
        engine = FastEngine(model, StepContext(), plan=Plan((policy,) * layers))
        with Counted() as forward:
            loss = engine.loss(batch, step=1).loss_sum
        ours = [launch.kernel.__name__ for launch in recording.launches]
        with Counted() as backward:
            loss.backward()
        rest = [launch.kernel.__name__ for launch in recording.launches][len(ours) :]
        engine.evaluate(batch)
    return Counter(ours + forward.names), Counter(rest + backward.names)


def of_a_layer(*args) -> tuple[Counter, Counter]:
    two, three = launches(2, *args), launches(3, *args)
    return three[0] - two[0], three[1] - two[1]


# The goal is 18 forward and 28 backward. 16,384 tokens miss the second by two in the default
# configurations: sums over so many tokens are cut into slices, and seven of them take a second launch
# that adds the slices up. Narrow programs fill a card without slices; a card must say what is faster.
@pytest.mark.parametrize("tokens,most", [(16384, (18, 30)), (64, (21, 28))])
def test_a_layer_launches_few_kernels(tokens, most):
    forward, backward = of_a_layer(tokens, "keep", 0.0)
    assert forward["_nf4_dequantize"] == backward["_nf4_dequantize"] == 4
    assert forward["mm"] == backward["mm"] == 4
    assert forward.total() <= most[0] and backward.total() <= most[1], (forward, backward)


def test_narrow_programs_need_fewer():
    with forced(skinny_dA_16=2, skinny_dB_16=2):
        backward = of_a_layer(16384, "keep", 0.0)[1]
    assert backward["_reduce"] == 2 and backward.total() <= 28, backward


@pytest.mark.parametrize("policy,more", [("recompute_mlp", 6), ("recompute_block", 15)])
def test_what_is_recomputed_is_no_more_than_it_must_be(policy, more):
    """recompute_block leaves the down product out, and its decode."""
    (kept, kept_back), (forward, backward) = (of_a_layer(16384, p, 0.1) for p in ("keep", policy))
    assert forward == kept
    again = backward - kept_back
    assert again.total() <= more, again
    assert again["mm"] == {"recompute_mlp": 1, "recompute_block": 3}[policy]
    assert again["_nf4_dequantize"] <= again["mm"]
