"""Which engine, and the start-up table: the path of every projection is named."""

from __future__ import annotations

import pytest
import torch
from test_fast import quantised
from tiny_models import tiny

from fastsft.config import LoraConfig, make_config
from fastsft.model.compat import CompatEngine
from fastsft.model.context import StepContext
from fastsft.model.engine import choose_engine, paths
from fastsft.model.fast import FastEngine
from fastsft.model.lora import add_adapters
from fastsft.model.plan import Plan


def adapted(family, **lora):
    context = StepContext()
    return add_adapters(tiny(family), LoraConfig(r=4, alpha=8, **lora), seed=0, context=context)


def test_every_projections_path_is_named():
    model = quantised(adapted("llama", dropout=0.1)).model
    engine = FastEngine(model, StepContext(), plan=Plan(("keep",) * 2, resident=1))
    adapters = "adapters (r=4, dropout 0.1) inside one product"
    assert paths(engine, model) == [
        f"qkv, o, gate_up, down of layers 0: NF4, stays decoded, {adapters}",
        f"qkv, o, gate_up, down of layers 1: NF4, decoded for each product, {adapters}",
        "kernels: reference (runs on a CPU)",
    ]
    model = adapted("llama", target_modules=["q_proj", "down_proj"]).model
    assert paths(FastEngine(model, StepContext()), model)[:2] == [
        "qkv, down: float32, adapters (r=4) inside one product",
        "o, gate_up: float32, no adapter, one product",
    ]
    model = tiny("llama")
    assert "its gradient summed in place" in paths(FastEngine(model, StepContext()), model)[0]


def test_the_compat_engines_paths_are_named_too():
    model = adapted("llama").model
    said = paths(CompatEngine(model, StepContext()), model)
    assert said[0].startswith("q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj: base")


@pytest.mark.parametrize("family,name", [("llama", "fast"), ("gpt_neox", "compat")])
def test_the_families_choose(family, name):
    config = make_config({"model": "m", "data": "d", "method": "lora"})
    model, context = adapted(family).model, StepContext()
    found = choose_engine(config, model, context, torch.float32, torch.device("cpu"), 10)
    assert found.engine.name == name and (found.planning is not None) == (name == "fast")
    assert found.micro_batch_tokens == 2048
