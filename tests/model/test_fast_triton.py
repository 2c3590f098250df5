"""The whole fast engine on Triton's kernels (their interpreter, without a GPU) against the references."""

from __future__ import annotations

import pytest
import torch
from fastsft_kernels.launch import forced
from test_compat import assert_close, step
from test_fast import both
from test_fast_full import full, gradients
from tiny_models import batch_of, documents

from fastsft.model.fast import FastEngine
from fastsft.model.plan import Plan

# The kernels' smallest head; 96 and 80 leave a tail's padding to be zeroed.
SIZES = {
    "hidden_size": 96,
    "intermediate_size": 80,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 64,
    "num_hidden_layers": 2,
}
CASES = {
    "llama": ("llama", {"nf4": True, "lora": {"r": 16, "dropout": 0.25}}, ("keep", "offload")),
    "qwen3": ("qwen3", {"lora": {"r": 5}}, ("recompute_mlp", "recompute_block")),
    "gemma2": ("gemma2", {"nf4": True, "lora": {"r": 8}}, ("offload", "keep")),
}


@pytest.fixture(autouse=True)
def needs_triton():
    pytest.importorskip("triton")


def batches():
    return [batch_of(documents((9, 1, 14, 3)), round_to=8)]


@pytest.mark.parametrize("case", CASES)
def test_a_step_of_adapters(case):
    family, options, policies = CASES[case]
    runs = []
    for backend in ("reference", "triton"):
        engine = both(family, **options, **SIZES)[1]
        engine.plan = Plan(policies, mlp_rows=None if backend == "reference" else 11)
        with forced(backend=backend):
            loss, grads = step(engine, batches())
            evaluated = engine.evaluate(batches()[0])
        runs.append((loss, grads, evaluated))
    (wanted, want_grads, want_eval), (found, grads, found_eval) = runs
    assert float(found) == pytest.approx(float(wanted), rel=1e-5)
    assert float(found_eval.loss_sum) == pytest.approx(float(want_eval.loss_sum), rel=1e-5)
    assert int(found_eval.correct) == int(want_eval.correct)
    assert_close(grads, want_grads, 1e-4)


def test_a_step_of_every_weight():
    runs = []
    for backend in ("reference", "triton"):
        engine: FastEngine = full("llama", **SIZES)
        with forced(backend=backend):
            runs.append(gradients(engine, batches()))
    assert runs[1][0] == pytest.approx(runs[0][0], rel=1e-5)
    assert_close(runs[1][1], runs[0][1], 1e-4)
    assert all(torch.isfinite(g).all() for g in runs[1][1].values())
