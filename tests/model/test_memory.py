"""The prediction of the fast engine's memory against the bytes of every tensor of a step, counted."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from live_bytes import LLAMA_8B, counted_peak, shaped
from tiny_models import FAMILIES, tiny
from transformers import AutoConfig

from fastsft.config import LoraConfig, make_config
from fastsft.model import host_weights, memory
from fastsft.model.context import StepContext
from fastsft.model.fast import FastEngine
from fastsft.model.job import Job, linear_names, ranks_of
from fastsft.model.lora import LoraLinear, add_adapters
from fastsft.model.memory import predict
from fastsft.model.plan import POLICIES, Plan
from fastsft.model.planning import job_of
from fastsft.model.shapes import meta_batch
from fastsft.model.spec import read_spec
from fastsft.optim import build_optimizer

LAYERS = 6
NO_TOKENS = {"pad_token_id": None, "bos_token_id": None, "eos_token_id": None}


def spec_of(family, **sizes):
    return read_spec(AutoConfig.for_model(family, **{**NO_TOKENS, **sizes}))


def apart(plan, method="qlora", *, tokens=4096, trained=None, family="llama", r=32, **sizes):
    """How far the prediction is from the count: relative; the optimizer's moments left out of both."""
    sizes = {**LLAMA_8B, "num_hidden_layers": len(plan.policies), **sizes}
    model = shaped(family, method, lora=LoraConfig(r=r), **sizes)
    counted, host = counted_peak(model, plan, meta_batch([tokens], trained or tokens))
    spec = spec_of(family, **sizes)
    job = Job(spec, method, ranks_of(spec, "all-linear", r))
    memory = predict(job, plan, tokens, trained, cuda=False)
    assert memory.host == host
    return (memory.peak - memory.moments) / counted - 1


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("share", [1.0, 0.25])
def test_what_one_more_token_costs(policy, share):
    """Within 1 %: beside weights of 8 GB a tensor that was forgotten would hardly show."""
    sizes = {**LLAMA_8B, "num_hidden_layers": 4, "vocab_size": 32000}
    job = Job(
        spec_of("llama", **sizes), "lora", ranks_of(spec_of("llama", **sizes), "all-linear", 16)
    )
    plan = Plan((policy,) * 4)
    peaks = []
    for tokens in (65536, 131072):
        trained = int(share * tokens)
        model = shaped("llama", "lora", lora=LoraConfig(r=16), **sizes)
        counted, _ = counted_peak(model, plan, meta_batch([tokens], trained))
        peaks.append((counted, predict(job, plan, tokens, trained, cuda=False).peak))
    (counted, predicted), (more_counted, more_predicted) = peaks
    assert more_predicted - predicted == pytest.approx(more_counted - counted, rel=0.01)


@pytest.mark.parametrize("method", ["lora", "qlora"])
@pytest.mark.parametrize("policy", POLICIES)
def test_the_predicted_peak_is_the_counted_one(method, policy):
    """Within 3 %, at Llama-3.1-8B's widths; what a whole model adds is more layers of the same."""
    for tokens, trained in ((4096, None), (8192, 2000), (32768, None)):
        found = apart(Plan((policy,) * LAYERS), method, tokens=tokens, trained=trained)
        assert abs(found) < 0.03, (tokens, trained, found)


def test_a_whole_llama_8b():
    for policy in POLICIES:
        assert abs(apart(Plan((policy,) * 32), tokens=8192)) < 0.015, policy


@pytest.mark.parametrize("policy", POLICIES)
def test_tiles_pieces_and_resident_layers(policy):
    plan = Plan((policy,) * LAYERS, mlp_rows=4096, head_rows=512, resident=2)
    for tokens, trained in ((16384, None), (16384, 3000), (65536, None)):
        assert abs(apart(plan, tokens=tokens, trained=trained)) < 0.03, (tokens, trained)


@pytest.mark.parametrize("hosted", [{"host_embedding": True}, {"host_head": True}, "both"])
def test_what_lies_in_host_memory(hosted):
    hosted = {"host_embedding": True, "host_head": True} if hosted == "both" else hosted
    for policy, rows in (("keep", None), ("offload", 2048)):
        plan = Plan((policy,) * LAYERS, mlp_rows=rows, **hosted)
        for tokens, trained in ((2048, None), (8192, 1000), (16384, None)):
            assert abs(apart(plan, tokens=tokens, trained=trained)) < 0.03, (policy, tokens)


def test_the_longest_contexts():
    plan = Plan(("offload",) * 3, mlp_rows=8192, host_embedding=True, host_head=True)
    assert abs(apart(plan, tokens=131072, trained=8192)) < 0.03


@pytest.mark.parametrize(
    "policies",
    [("recompute_block", "keep"), ("offload", "recompute_block"), ("recompute_mlp", "keep")],
)
def test_mixed_policies(policies):
    cheap, dear = policies
    assert abs(apart(Plan((cheap,) * 4 + (dear,) * 2), tokens=16384)) < 0.03


@pytest.mark.parametrize("family", ["qwen3", "gemma2", "gemma3_text", "olmo2", "phi3", "granite"])
@pytest.mark.parametrize("policy", POLICIES)
def test_other_families(family, policy):
    own = {k: v for k, v in FAMILIES[family].items() if not k.startswith(("hidden", "inter"))}
    own |= {"hidden_size": 2048, "intermediate_size": 5632, "head_dim": 128, "vocab_size": 65536}
    own |= {"num_attention_heads": 16, "num_key_value_heads": 4, "num_hidden_layers": LAYERS}
    if "layer_types" in own:
        own["layer_types"] = ["sliding_attention", "full_attention"] * (LAYERS // 2)
    own["tie_word_embeddings"] = family in ("gemma2", "gemma3_text")
    found = apart(Plan((policy,) * LAYERS), family=family, tokens=8192, trained=5000, **own)
    assert abs(found) < 0.03


@pytest.mark.parametrize("masters", ["fp32", "bf16"])
@pytest.mark.parametrize("policy", ["keep", "recompute_block"])
@pytest.mark.parametrize("early", [False, True])
def test_full_fine_tuning(policy, masters, early):
    if early and masters == "fp32":
        pytest.skip("gradients wait for no update there")
    dtype = torch.float32 if masters == "fp32" else torch.bfloat16
    sizes = {**LLAMA_8B, "num_hidden_layers": LAYERS, "vocab_size": 32000}
    model = shaped("llama", "full", lora=LoraConfig(), dtype=dtype, **sizes)
    plan, tokens = Plan((policy,) * LAYERS), 16384
    counted, _ = counted_peak(
        model, plan, meta_batch([tokens], tokens), dtype=torch.bfloat16, shared_sums=early
    )
    job = Job(
        spec_of("llama", **sizes),
        "full",
        {},
        whole=frozenset({"embedding", "head"}),
        fp32_masters=masters == "fp32",
        update_in_backward=early,
    )
    memory = predict(job, plan, tokens, cuda=False)
    assert (memory.peak - memory.moments) / counted == pytest.approx(1, abs=0.03)


# --- what lasts -----------------------------------------------------------------------------------


@pytest.mark.parametrize("family", sorted(set(FAMILIES) & {
    "llama", "qwen2", "qwen3", "gemma2", "gemma3_text", "phi3", "mistral", "granite", "olmo2", "smollm3"
}))  # fmt: skip
def test_a_jobs_groups_are_the_engines_projections(family):
    model = tiny(family)
    targets = ["o_proj", "down_proj"] if family == "olmo2" else "all-linear"
    add_adapters(model, LoraConfig(r=5, target_modules=targets), seed=0, context=StepContext())
    spec = read_spec(model.config)
    job = Job(spec, "lora", ranks_of(spec, targets, 5), size=4)
    assert set(linear_names(spec)) <= {name for name, _ in model.named_modules()}
    assert job.ranks == {n: m.r for n, m in model.named_modules() if isinstance(m, LoraLinear)}
    engine = FastEngine(model, StepContext())
    for layer, block in zip(job.layers, engine.blocks, strict=True):
        for group, p in zip(layer.groups, block.projections, strict=True):
            found = (group.rows, group.k, group.r, group.tail, group.pitch, group.master_numbers)
            assert found == (p.rows, p.k, p.r, p.tail, p.pitch, p.master_numbers)


@pytest.mark.parametrize("saved", [[], ["embed_tokens"], ["lm_head"], ["embed_tokens", "lm_head"]])
@pytest.mark.parametrize("tied", [True, False])
def test_what_lasts_is_exact(saved, tied):
    """Weights, masters, gradients, moments and copies of a small run after a step, on the CPU."""
    model = tiny("llama", dtype=torch.bfloat16, hidden_size=64, tie_word_embeddings=tied)
    lora = LoraConfig(r=16, alpha=32, modules_to_save=saved)
    adapters = add_adapters(model, lora, seed=0, context=StepContext())
    engine = FastEngine(model, StepContext())
    config = make_config({"model": "m", "data": "d", "method": "lora", "dtype": "bf16"})
    job = job_of(model, engine.spec, config, torch.bfloat16)
    memory = predict(job, engine.plan, 8, cuda=False)
    trained = list(adapters.named_parameters())
    for _, parameter in trained:
        parameter.grad = torch.zeros_like(parameter)
    optimizer = build_optimizer(trained, config)
    optimizer.step()
    moments = [v for s in optimizer.state.values() for v in s.values() if v.dim()]
    assert memory.moments == sum(t.nbytes for t in moments)
    masters = {p.untyped_storage()._cdata: p.untyped_storage().nbytes() for _, p in trained}
    assert memory.masters == sum(masters.values()) == memory.gradients
    projections = [p for block in engine.blocks for p in block.projections]
    assert memory.copies == sum(p.a.nbytes + p.b.nbytes for p in projections)
    frozen = {
        t.untyped_storage()._cdata: t.untyped_storage().nbytes()
        for t in model.parameters()
        if not t.requires_grad
    }
    assert memory.weights + memory.embedding + memory.head == sum(frozen.values())


def test_the_parts_add_up_and_the_host_stands_apart():
    spec = spec_of("llama", **LLAMA_8B)
    job = Job(spec, "qlora", ranks_of(spec, "all-linear", 32))
    plan = Plan(("offload",) * 32, host_embedding=True)
    memory = predict(job, plan, 10_000)
    assert memory.peak == sum(memory.parts.values()) and memory.embedding == 0
    assert memory.host == 32 * 10_000 * 4096 * 2 + 128256 * 4096 * 2
    there = predict(job, replace(plan, host_embedding=False), 10_000)
    assert there.peak - memory.peak == memory.host - there.host == 128256 * 4096 * 2
    eight = predict(replace(job, optimizer="adamw_8bit"), plan, 10_000)
    assert memory.moments / eight.moments == pytest.approx(8 / (2 + 2 * 4 / 256))


def test_the_heads_pieces_are_the_kernels():
    from fastsft_kernels.triton_ops.cross_entropy import _chunk_rows, _even_chunk

    for vocabulary, rows in itertools.product((300, 32000, 128256, 262144), (1, 500, 5000, 70000)):
        for given in (None, 512):
            wanted = _even_chunk(rows, given or _chunk_rows(vocabulary))
            assert memory.chunk_rows(vocabulary, rows, given) == wanted
    assert (memory.HEAD_TILE, memory.HEAD_ROWS) == (host_weights.TILE, host_weights.ROWS)
