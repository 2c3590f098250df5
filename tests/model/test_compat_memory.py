"""The prediction against tensors counted: what autograd keeps, the optimizer holds, the head makes."""

from __future__ import annotations

import importlib

import pytest
import torch
from tiny_models import VOCABULARY, batch_of, documents, tiny

from fastsft.config import LoraConfig, make_config
from fastsft.model.compat import CompatEngine
from fastsft.model.compat_memory import estimate_memory
from fastsft.model.context import StepContext
from fastsft.model.lora import add_adapters, trainable_summary
from fastsft.optim import build_optimizer

SIZES = {
    "hidden_size": 64,
    "intermediate_size": 192,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
}
TOKENS = (64, 256)


def made(method, *, layers=4, activations="keep", dtype=torch.float32, **lora):
    """A tiny Llama ready to train, and its estimate."""
    context = StepContext()
    model = tiny("llama", dtype=dtype, num_hidden_layers=layers, **SIZES)
    if method == "lora":
        tokens = lora.pop("new_token_ids", ())
        settings = LoraConfig(r=4, alpha=8, **lora)
        add_adapters(model, settings, seed=0, context=context, new_token_ids=tokens)
    engine = CompatEngine(model, context, activations=activations)
    estimate = estimate_memory(
        model,
        trained=trainable_summary(model)[0],
        optimizer="adamw",
        recompute=activations != "keep",
        dtype=dtype,
    )
    return engine, estimate


def saved_per_token(engine):
    """Bytes autograd holds for one more token, weights left out."""
    weights = (*engine.model.parameters(), *engine.model.buffers())
    known = {tensor.untyped_storage().data_ptr() for tensor in weights}
    sums = []
    for tokens in TOKENS:
        kept = {}

        def keep(tensor, kept=kept):
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in known:
                kept[storage.data_ptr()] = storage
            return tensor

        batch = batch_of(documents([tokens // 2] * 2, trained=1.0))
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            loss = engine.loss(batch, step=0).loss_sum
        sums.append(sum(storage.nbytes() for storage in kept.values()))
        del loss
    return (sums[1] - sums[0]) / (TOKENS[1] - TOKENS[0])


@pytest.mark.parametrize("method", ["lora", "full"])
@pytest.mark.parametrize("activations", ["keep", "recompute_block"])
def test_activations_are_those_autograd_keeps(method, activations):
    engine, estimate = made(method, activations=activations)
    counted = saved_per_token(engine)
    if activations == "recompute_block":  # one block's worth besides, while it is recomputed
        four, two = (saved_per_token(made(method, layers=n)[0]) for n in (4, 2))
        counted += (four - two) / 2
    assert estimate.per_token == pytest.approx(counted, rel=0.15)


@pytest.mark.parametrize("method", ["lora", "full"])
def test_weights_and_optimizer_are_exact(method):
    engine, estimate = made(method)
    model = engine.model
    engine.loss(batch_of(documents()), step=0).loss_sum.backward()
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    config = make_config({"model": "m", "data": "d", "method": method})
    optimizer = build_optimizer(trained, config)
    optimizer.step()
    moments = [
        value
        for state in optimizer.state.values()
        for value in state.values()
        if isinstance(value, torch.Tensor) and value.dim()
    ]
    held = moments + [p for _, p in trained] + [p.grad for _, p in trained]
    assert estimate.trained == sum(tensor.nbytes for tensor in held)
    frozen = [p for p in model.parameters() if not p.requires_grad]
    everything = {t.data_ptr(): t.nbytes for t in (*frozen, *model.buffers())}
    assert estimate.weights == sum(everything.values())


def test_the_head_counts_logits_and_probabilities_of_a_piece_and_its_gradient(monkeypatch):
    head = importlib.import_module("fastsft_kernels.reference.cross_entropy")
    monkeypatch.setattr(head, "_CPU_PIECE", 256 * VOCABULARY)
    logits = 256 * VOCABULARY
    weight = VOCABULARY * SIZES["hidden_size"]
    for method, dtype, options, expected in (
        ("lora", torch.float32, {}, 8 * logits),
        ("lora", torch.bfloat16, {}, 10 * logits),
        ("full", torch.float32, {}, 8 * logits + 8 * weight),
        ("lora", torch.bfloat16, {"new_token_ids": [3]}, 10 * logits + 8 * weight + 4 * weight),
    ):
        _, estimate = made(method, dtype=dtype, **options)
        assert estimate.head == expected, (method, dtype)
