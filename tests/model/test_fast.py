"""The fast engine against transformers with PEFT, against the compat engine, and against itself."""

from __future__ import annotations

import peft
import pytest
import torch
from test_compat import alone, assert_close, step, with_adapters
from tiny_models import batch_of, documents, tiny

from fastsft.config import LoraConfig, make_config
from fastsft.model.compat import CompatEngine
from fastsft.model.context import StepContext
from fastsft.model.engine import choose_engine
from fastsft.model.fast import FastEngine
from fastsft.model.lora import LoraLinear, add_adapters
from fastsft.model.offload import Stash
from fastsft.model.plan import Plan
from fastsft.model.quant import NF4Linear
from fastsft.model.spec import FAMILIES, NotFast, read_spec

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 5e5,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}
# What a family's row must get right beyond the tiny model's own settings.
VARIANTS: list[tuple[str, dict]] = [
    ("llama", {}),
    ("llama", {"tie_word_embeddings": False, "rope_parameters": LLAMA3, "attention_bias": True}),
    ("llama", {"mlp_bias": True, "hidden_size": 24, "num_attention_heads": 3, "num_key_value_heads": 1,
               "head_dim": 8}),
    ("llama", {"rope_parameters": YARN}),
    ("mistral", {}),
    ("qwen2", {}),
    ("qwen3", {}),
    ("gemma2", {}),
    ("gemma3_text", {}),
    ("phi3", {}),
    ("phi3", {"head_dim": 8, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4,
                                                 "partial_rotary_factor": 0.5}}),
    ("smollm3", {}),
    ("olmo2", {}),
    ("granite", {}),
]  # fmt: skip
NAMES = [f"{family}-{'-'.join(more) or 'plain'}" for family, more in VARIANTS]


def quantised(adapters, dtype=torch.float32):
    """The adapters' base weights in NF4, in place."""
    from fastsft_kernels import nf4_quantize

    for layer in adapters.layers.values():
        weight = layer.base.weight.detach().to(dtype)
        layer.base = NF4Linear(nf4_quantize(weight), layer.base.bias)
    return adapters


def both(family, *, nf4=False, lora=None, **more):
    """A compat and a fast engine over equal models with equal adapters."""
    engines = []
    for kind in (CompatEngine, FastEngine):
        context = StepContext(seed=3)
        settings = {"r": 4, "alpha": 8, "dropout": 0.0} | (lora or {})
        adapters = add_adapters(
            tiny(family, **more), LoraConfig(**settings), seed=1, context=context
        )
        generator = torch.Generator().manual_seed(2)
        for layer in adapters.layers.values():
            layer.lora_B.data.normal_(0, 0.3, generator=generator)
        engines.append(kind(quantised(adapters).model if nf4 else adapters.model, context))
    return engines


def assert_equal_runs(compat, fast, tolerance=2e-5):
    batches = [batch_of(documents(), round_to=8), batch_of(documents((5, 2), seed=1))]
    wanted, want_grads = step(compat, batches)
    found, grads = step(fast, batches)
    assert float(found) == pytest.approx(float(wanted), rel=1e-5)
    assert_close(grads, want_grads, tolerance)
    for batch in batches:
        theirs, ours = compat.evaluate(batch), fast.evaluate(batch)
        assert float(ours.loss_sum) == pytest.approx(float(theirs.loss_sum), rel=1e-5)
        assert int(ours.correct) == int(theirs.correct)


# --- families ---------------------------------------------------------------------------------------


def test_every_row_is_tested():
    assert {family for family, _ in VARIANTS} == set(FAMILIES)


@pytest.mark.parametrize("family,more", VARIANTS, ids=NAMES)
def test_a_family_is_transformers_with_peft(family, more):
    """Loss and every adapter's gradient, documents packed here and one by one there."""
    adapters, context = with_adapters(family, **more)
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")
    oracle = peft.get_peft_model(tiny(family, **more), config).eval()
    for name, layer in adapters.layers.items():
        theirs = oracle.base_model.model.get_submodule(name)
        theirs.lora_A.default.weight.data.copy_(layer.lora_A)
        theirs.lora_B.default.weight.data.copy_(layer.lora_B)
    docs = documents((9, 1, 21, 3))
    wanted = alone(oracle, docs)
    wanted.backward()
    found, grads = step(FastEngine(adapters.model, context), [batch_of(docs, round_to=8)])
    assert float(found) == pytest.approx(wanted.item(), rel=1e-5)
    assert len(grads) == 2 * len(adapters.layers)
    for name in adapters.layers:
        theirs = oracle.base_model.model.get_submodule(name)
        pair = {f"{name}.lora_A": theirs.lora_A.default.weight.grad}
        pair |= {f"{name}.lora_B": theirs.lora_B.default.weight.grad}
        assert_close({n: grads[n] for n in pair}, pair, 1e-4)


@pytest.mark.parametrize("family,more", VARIANTS, ids=NAMES)
def test_dropout_is_the_compat_engines(family, more):
    assert_equal_runs(*both(family, lora={"r": 5, "dropout": 0.3, "use_rslora": True}, **more))


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma2", "phi3", "olmo2"])
def test_nf4_is_the_compat_engines(family):
    assert_equal_runs(*both(family, nf4=True, lora={"dropout": 0.2}))


TARGETS = [["q_proj", "v_proj"], ["down_proj"], ["o_proj", "up_proj"], ["k_proj", "gate_proj"]]


@pytest.mark.parametrize("targets", TARGETS, ids=map("+".join, TARGETS))
def test_partial_targets(targets):
    assert_equal_runs(*both("qwen2", lora={"target_modules": targets, "dropout": 0.2}))


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("saved", [["embed_tokens"], ["lm_head"], ["embed_tokens", "lm_head"]])
def test_embedding_and_head_may_train(saved, tied):
    lora = {"modules_to_save": saved}
    assert_equal_runs(*both("llama", lora=lora, tie_word_embeddings=tied))


PLACES = [f"{name}_proj" for name in ("q", "k", "v", "o", "gate", "up", "down")] + ["lm_head"]


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("place", PLACES)
def test_an_adapter_trains_wherever_it_stands(place, tied):
    """The engine that is chosen has compat's loss, and a gradient for every weight that trains."""
    lora = {"target_modules": [place], "r": 4, "dropout": 0.2}
    assert_trains(lora, tied, "compat" if place == "lm_head" else "fast")


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("place", ["embed_tokens", "lm_head", "norm", "input_layernorm", "mlp"])
def test_a_weight_trains_wherever_it_stands(place, tied):
    lora = {"target_modules": ["q_proj"], "modules_to_save": [place]}
    ends = ("embed_tokens", "lm_head")
    assert_trains(lora, tied, "fast" if place in ends else "compat")


def assert_trains(lora, tied, name):
    """A model with these settings through choose_engine, beside a compat engine over an equal one."""
    engines = []
    for kind in ("auto", "compat"):
        keys = {"model": "m", "data": "d", "method": "lora", "lora": lora, "engine": kind}
        config, context = make_config({**keys, "micro_batch_tokens": 64}), StepContext(seed=3)
        adapters = add_adapters(
            tiny("llama", tie_word_embeddings=tied), config.lora, seed=1, context=context
        )
        generator = torch.Generator().manual_seed(2)
        for layer in adapters.layers.values():
            layer.lora_B.data.normal_(0, 0.3, generator=generator)
        cpu = torch.device("cpu")
        chosen = choose_engine(config, adapters.model, context, torch.float32, cpu, 32)
        engines.append(chosen.engine)
    assert engines[0].name == name
    batches = [batch_of(documents(), round_to=8)]
    wanted, want_grads = step(engines[1], batches)
    found, grads = step(engines[0], batches)
    assert float(found) == pytest.approx(float(wanted), rel=1e-5)
    assert_close(grads, want_grads, 2e-5)
    trained = {n for n, p in engines[0].model.named_parameters() if p.requires_grad}
    assert trained == set(grads) and all(grad.any() for grad in grads.values())


# --- invariants -------------------------------------------------------------------------------------


KINDS = ["sliding_attention", "full_attention"]
DEEP = {"llama": {}, "olmo2": {}, "gemma3_text": {"layer_types": [*KINDS, *KINDS, KINDS[0]]}}
MIXED = ("offload", "keep", "offload", "recompute_mlp", "recompute_block")
POLICIES = [(name,) * 5 for name in ("recompute_mlp", "recompute_block", "offload")] + [MIXED]


@pytest.mark.parametrize("family", DEEP)
@pytest.mark.parametrize("policies", POLICIES, ids=lambda p: p[0] if len(set(p)) == 1 else "mixed")
def test_what_is_recomputed_changes_no_bit(family, policies):
    batches = [batch_of(documents()), batch_of(documents((30, 4), seed=2))]
    results = []
    for plan in (Plan(("keep",) * 5), Plan(policies)):
        engine = both(family, lora={"dropout": 0.3}, num_hidden_layers=5, **DEEP[family])[1]
        engine.plan = plan
        results.append(step(engine, batches))
    assert torch.equal(results[0][0], results[1][0])
    assert all(torch.equal(results[1][1][name], grad) for name, grad in results[0][1].items())


def test_an_offloaded_block_leaves_nothing_behind():
    """What autograd holds between forward and backward does not grow with the layers."""
    held = []
    for layers in (2, 6):
        engine = both("llama", num_hidden_layers=layers)[1]
        engine.plan = Plan(("offload",) * layers)
        sizes = []
        hooks = torch.autograd.graph.saved_tensors_hooks(
            lambda t, sizes=sizes: sizes.append(t.nbytes) or t, lambda t: t
        )
        with hooks:
            engine.loss(batch_of(documents()), step=0)
        held.append(sum(sizes))
        assert engine.stash.host_bytes == layers * 27 * engine.spec.hidden * 4
    assert held[0] == held[1] > 0


def test_an_input_comes_back_while_the_layer_behind_it_works(monkeypatch):
    """Each is fetched once, one layer ahead of its use."""
    order = []
    for name in ("_fetch", "take"):
        method = getattr(Stash, name)

        def told(self, slot, name=name, method=method):
            order.append((name, slot))
            return method(self, slot)

        monkeypatch.setattr(Stash, name, told)
    engine = both("llama", num_hidden_layers=4)[1]
    engine.plan = Plan(("offload", "keep", "offload", "offload"))
    step(engine, [batch_of(documents())])
    assert [slot for name, slot in order if name == "_fetch"] == [2, 1, 0]
    assert order == [
        ("take", 2),
        ("_fetch", 2),
        ("_fetch", 1),
        ("take", 1),
        ("_fetch", 0),
        ("take", 0),
    ]


@pytest.mark.parametrize("family", ["llama", "gemma2", "olmo2", "granite"])
@pytest.mark.parametrize("policy", ["keep", "recompute_mlp", "offload"])
def test_tiles_of_rows_change_only_the_order_of_sums(family, policy):
    batches = [batch_of(documents())]
    results = []
    for rows in (None, 27, 5, 1):
        engine = both(family, dtype=torch.float64, lora={"dropout": 0.3})[1]
        engine.plan = Plan((policy,) * engine.spec.layers, mlp_rows=rows)
        results.append((*step(engine, batches), engine.evaluate(batches[0]).loss_sum))
    for loss, grads, evaluated in results[1:]:
        assert float(loss) == pytest.approx(float(results[0][0]), rel=1e-12)
        assert float(evaluated) == pytest.approx(float(results[0][2]), rel=1e-12)
        assert_close(grads, results[0][1], 1e-12)


@pytest.mark.parametrize("rows", [1, 7])
def test_pieces_of_the_head_change_only_the_order_of_sums(rows):
    batches, results = [batch_of(documents())], []
    for head_rows in (None, rows):
        engine = both("llama", dtype=torch.float64)[1]
        engine.plan = Plan(engine.plan.policies, head_rows=head_rows)
        results.append(step(engine, batches))
    assert float(results[1][0]) == pytest.approx(float(results[0][0]), rel=1e-12)
    assert_close(results[1][1], results[0][1], 1e-12)


@pytest.mark.parametrize("resident", [1, 2])
def test_weights_that_stay_decoded_change_no_bit(resident):
    """Also after the adapters have moved: B lies behind a resident weight."""
    batch, results = batch_of(documents()), []
    for count in (0, resident):
        engine = both("qwen2", nf4=True, lora={"dropout": 0.2})[1]
        plan = Plan(engine.plan.policies, resident=count)
        engine = FastEngine(engine.model, engine.context, plan=plan)
        for shift in (0.0, 0.1):
            engine.masters += shift
            results.append(step(engine, [batch]))
            engine.model.zero_grad(set_to_none=True)
    for before, after in zip(results[:2], results[2:], strict=True):
        assert torch.equal(before[0], after[0])
        assert all(torch.equal(after[1][name], grad) for name, grad in before[1].items())
    assert not torch.equal(results[0][0], results[1][0])


@pytest.mark.parametrize("family", ["llama", "gemma2", "qwen3"])
def test_packing_and_accumulating_change_nothing(family):
    docs = documents((9, 1, 14, 3, 6))
    runs = []
    for split in ([docs], [[doc] for doc in docs], [docs[::-1]]):
        engine = both(family, dtype=torch.float64, lora={"dropout": 0.3})[1]
        runs.append(step(engine, [batch_of(part, round_to=4) for part in split]))
    for loss, grads in runs[1:]:
        assert float(loss) == pytest.approx(float(runs[0][0]), rel=1e-12)
        assert_close(grads, runs[0][1], 1e-12)


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "olmo2", "granite"])
def test_the_gradient_is_the_losss_slope(family):
    """Finite differences along a random direction of all masters, in float64, with dropout on."""
    engine = both(family, dtype=torch.float64, lora={"dropout": 0.3})[1]
    batch = batch_of(documents())
    step(engine, [batch])
    direction = torch.randn(
        engine.masters.shape, generator=torch.Generator().manual_seed(0)
    ).double()
    slope = float(engine.grads @ direction)
    start, losses = engine.masters.clone(), []
    for h in (1e-6, -1e-6):
        engine.masters.copy_(start + h * direction)
        losses.append(float(engine.loss(batch, step=5).loss_sum))
    assert slope == pytest.approx((losses[0] - losses[1]) / 2e-6, rel=1e-6)


@pytest.mark.parametrize("r", [4, 16])
def test_adamw_steps_are_the_compat_engines(r):
    """Masters and gradients live in flat buffers, and torch's fused optimizer must not see the seams."""
    engines = both("llama", lora={"r": r})
    batch, runs = batch_of(documents()), []
    for engine in engines:
        layers = [m for m in engine.model.modules() if isinstance(m, LoraLinear)]
        masters = [p for m in layers for p in (m.lora_A, m.lora_B)]
        optimizer = torch.optim.AdamW(masters, lr=1e-3, fused=True)
        losses = []
        for number in range(5):
            optimizer.zero_grad(set_to_none=True)
            output = engine.loss(batch, step=number)
            output.loss_sum.backward()
            losses.append(float(output.loss_sum))
            optimizer.step()
        runs.append((losses, {str(i): p.detach() for i, p in enumerate(masters)}))
        assert all(p.is_contiguous() for p in masters)
    assert runs[0][0] == pytest.approx(runs[1][0], rel=1e-5) and runs[0][0][4] < runs[0][0][0]
    assert_close(runs[1][1], runs[0][1], 1e-3)
    home = engines[1].grads.untyped_storage().data_ptr()
    assert all(p.grad.untyped_storage().data_ptr() == home for p in masters)


@pytest.mark.parametrize("trained", [0.0, 1.0])
def test_a_batch_with_few_or_no_trained_tokens(trained):
    compat, fast = both("llama")
    docs = (
        [d._replace(trained=d.trained & False) for d in documents()] if not trained else documents()
    )
    batch = batch_of(docs)
    loss, grads = step(fast, [batch])
    if not trained:
        assert float(loss) == 0 and not any(g.any() for g in grads.values())
    else:
        assert float(loss) == pytest.approx(float(step(compat, [batch])[0]), rel=1e-5)


# --- what runs elsewhere ----------------------------------------------------------------------------


def test_other_models_are_named():
    with pytest.raises(NotFast, match="no row for model_type 'gpt2'"):
        read_spec(tiny("gpt2").config)
    dynamic = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    with pytest.raises(NotFast, match=r"frequencies \(dynamic\) depend on the longest"):
        read_spec(tiny("llama", rope_parameters=dynamic).config)
    with pytest.raises(NotFast, match="no activation 'relu'"):
        read_spec(tiny("llama", hidden_act="relu").config)
    adapters, context = with_adapters("llama")
    layer = next(iter(adapters.layers.values()))
    layer.scaling *= 2
    with pytest.raises(NotFast, match="different scalings"):
        FastEngine(adapters.model, context)
    layer.scaling /= 2
    layer.r = 257
    with pytest.raises(NotFast, match="rank is above 256"):
        FastEngine(adapters.model, context)
    layer.r = 4
    adapters.model.model.norm.weight.requires_grad_(True)
    with pytest.raises(NotFast, match=r"model\.norm\.weight trains"):
        FastEngine(adapters.model, context)
