"""The compat engine against plain transformers: the loss of a pack is the sum over its documents alone."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from tiny_models import batch_of, documents, tiny
from torch import Tensor, nn

from fastsft.config import LoraConfig
from fastsft.errors import UserError
from fastsft.model.attention import NAME, CannotPack, plain_attention
from fastsft.model.compat import CompatEngine
from fastsft.model.context import StepContext
from fastsft.model.lora import LoraSet, add_adapters

PACKS = (
    "llama", "qwen2", "qwen3", "gemma2", "gemma3_text", "phi3", "mistral", "granite", "olmo2", "cohere",
    "gpt_neox", "gpt2", "phi", "mixtral", "qwen3_moe", "deepseek_v3", "opt",
)  # fmt: skip
LEAKS = ("bloom", "falcon", "mpt", "mamba", "rwkv", "gpt_oss")
# Their own code reads values on the host, or has no meta form.
READERS = ("mixtral", "qwen3_moe", "deepseek_v3", "gpt_oss", "mamba", "rwkv")


def alone(model: nn.Module, docs) -> Tensor:
    """The oracle: summed loss over documents, each in a forward pass of its own."""
    total = torch.zeros(())
    for doc in docs:
        ids = torch.from_numpy(doc.ids).long()
        logits = model(input_ids=ids[None], use_cache=False).logits[0, :-1]
        labels = torch.where(torch.from_numpy(doc.trained[1:]), ids[1:], -100)
        total = total + F.cross_entropy(logits.float(), labels, reduction="sum", ignore_index=-100)
    return total


def assert_same_gradients(model: nn.Module, oracle: nn.Module, tolerance: float) -> None:
    # Some gradients are zero in exact arithmetic (the bias of a key projection): compare to the whole's size.
    size = max(float(q.grad.norm()) for q in oracle.parameters() if q.grad is not None)
    for (name, p), q in zip(model.named_parameters(), oracle.parameters(), strict=True):
        if p.grad is None or q.grad is None:
            assert p.grad is None and (q.grad is None or not q.grad.any()), name
            continue
        assert float((p.grad - q.grad).norm()) <= tolerance * max(
            float(q.grad.norm()), 0.01 * size
        ), name


def with_adapters(
    family: str, *, dropout: float = 0.0, seed: int = 0, **more
) -> tuple[LoraSet, StepContext]:
    """A tiny model with adapters whose B is not zero."""
    context = StepContext(seed=seed)
    adapters = add_adapters(
        tiny(family, **more), LoraConfig(r=4, alpha=8, dropout=dropout), seed=1, context=context
    )
    generator = torch.Generator().manual_seed(2)
    for layer in adapters.layers.values():
        layer.lora_B.data.normal_(0, 0.3, generator=generator)
    return adapters, context


def step(engine: CompatEngine, batches, number: int = 5) -> tuple[Tensor, dict[str, Tensor]]:
    """Summed loss and gradients over some micro-batches of one step."""
    engine.model.zero_grad()
    losses = []
    for batch in batches:
        output = engine.loss(batch, step=number)
        output.loss_sum.backward()
        losses.append(output.loss_sum.detach())
    grads = {n: p.grad.clone() for n, p in engine.model.named_parameters() if p.grad is not None}
    return torch.stack(losses).sum(), grads


def assert_close(
    found: dict[str, Tensor], wanted: dict[str, Tensor], tolerance: float = 1e-5
) -> None:
    assert found.keys() == wanted.keys() and found
    for name, tensor in wanted.items():
        assert float((found[name] - tensor).norm()) <= tolerance * float(tensor.norm()) + 1e-7, name


# --- packing ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", PACKS + LEAKS)
def test_packed_loss_and_gradients_are_those_of_documents_alone(family: str) -> None:
    model = tiny(family)
    oracle = copy.deepcopy(model).eval()
    engine = CompatEngine(model, StepContext())
    assert engine.isolate == (family in LEAKS)
    assert any("own forward pass" in note for note in engine.notes) == engine.isolate
    docs = documents()
    output = engine.loss(batch_of(docs, round_to=8), step=0)
    output.loss_sum.backward()
    expected = alone(oracle, docs)
    expected.backward()
    assert output.loss_sum.item() == pytest.approx(expected.item(), rel=1e-5)
    assert_same_gradients(model, oracle, 1e-5)


def test_the_whole_is_exact_in_float64() -> None:
    model = tiny("llama", dtype=torch.float64)
    oracle = copy.deepcopy(model).eval()
    docs = documents()
    loss, grads = step(CompatEngine(model, StepContext()), [batch_of(docs)])
    single = CompatEngine(oracle, StepContext())
    expected, wanted = step(single, [batch_of([doc]) for doc in docs])
    assert float(loss) == pytest.approx(float(expected), rel=1e-12)
    assert_close(grads, wanted, 1e-12)


@pytest.mark.parametrize("family", [f for f in PACKS + LEAKS if f not in READERS])
def test_a_step_reads_nothing_from_the_device(family: str) -> None:
    """On the meta device reading a value raises; on a GPU the host would wait for it."""
    engine = CompatEngine(tiny(family), StepContext())
    engine.model.to("meta")
    batch = batch_of(documents(), round_to=8)
    for name in ("ids", "labels", "positions", "cu_seqlens", "trained_rows", "row_key"):
        setattr(batch, name, getattr(batch, name).to("meta"))
    engine.loss(batch, step=0).loss_sum.backward()
    engine.evaluate(batch)
    assert all(
        p.grad.device.type == "meta" for p in engine.model.parameters() if p.grad is not None
    )


class TokenShift(nn.Module):
    """Mixes each token with the one before it, across documents: a leak no attention can prevent."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) + 0.3 * F.pad(x, (0, 0, 1, 0))[:, :-1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_probe_sees_a_leak_and_falls_back(dtype: torch.dtype) -> None:
    model = tiny("llama", dtype=dtype)
    sound = CompatEngine(copy.deepcopy(model), StepContext())
    assert not sound.isolate
    model.model.layers[1].mlp = TokenShift(model.model.layers[1].mlp)
    oracle = copy.deepcopy(model).eval()
    engine = CompatEngine(model, StepContext())
    assert engine.isolate and "change by" in engine.notes[0]
    docs = documents()
    found = float(engine.evaluate(batch_of(docs)).loss_sum)
    assert found == pytest.approx(
        float(alone(oracle, docs)), rel=1e-5 if dtype == torch.float32 else 1e-2
    )


def test_the_probe_sees_that_positions_do_not_restart() -> None:
    model = tiny("llama")
    rotary = model.model.rotary_emb
    model.model.rotary_emb = CountingOn(rotary)
    engine = CompatEngine(model, StepContext())
    assert engine.isolate and "differ by" in engine.notes[0]


class CountingOn(nn.Module):
    """Rotary embedding that ignores where documents begin, and stretches with the input's length."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        return self.inner(x, position_ids * x.shape[1])


def test_longrope_documents_do_not_change_each_others_frequencies() -> None:
    rope = {
        "rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 16,
        "short_factor": [1.0] * 4, "long_factor": [1.0, 2.0, 4.0, 8.0],
    }  # fmt: skip
    model = tiny("phi3", rope_parameters=rope, original_max_position_embeddings=16)
    oracle = copy.deepcopy(model).eval()
    engine = CompatEngine(model, StepContext())
    assert not engine.isolate
    for lengths in ((40, 9), (12, 9)):
        docs = documents(lengths)
        found = float(engine.evaluate(batch_of(docs)).loss_sum)
        assert found == pytest.approx(float(alone(oracle, docs)), rel=1e-5)


# --- the head ---------------------------------------------------------------------------------------


def test_heads_are_read_from_the_config_and_checked() -> None:
    assert CompatEngine(tiny("granite"), StepContext()).head.scale == pytest.approx(1 / 7)
    assert CompatEngine(tiny("gemma2"), StepContext()).head.softcap == 1.0
    assert "bias" in CompatEngine(tiny("phi"), StepContext()).head.reason
    model = tiny("llama")
    model.config.logits_scaling = 3.0  # says what the model does not do
    oracle = copy.deepcopy(model).eval()
    engine = CompatEngine(model, StepContext())
    assert engine.head.own and "miss the logits" in engine.notes[-1]
    docs = documents()
    assert float(engine.evaluate(batch_of(docs)).loss_sum) == pytest.approx(
        float(alone(oracle, docs)), rel=1e-5
    )


def test_an_adapter_on_the_head_is_part_of_the_loss() -> None:
    lora = LoraConfig(r=4, alpha=8, target_modules=["q_proj", "lm_head"])
    context = StepContext()
    adapters = add_adapters(tiny("llama"), lora, seed=0, context=context)
    engine = CompatEngine(adapters.model, context)
    assert engine.head.own and "carries an adapter" in engine.head.reason
    adapters.layers["lm_head"].lora_B.data.normal_(0, 0.3)
    docs = documents()
    found = engine.loss(batch_of(docs), step=0).loss_sum
    with plain_attention(adapters.model):
        expected = alone(adapters.model, docs)
    assert float(found) == pytest.approx(float(expected), rel=1e-5)


@pytest.mark.parametrize("family", ["llama", "phi", "falcon"])
def test_correct_counts_predicted_tokens(family: str) -> None:
    model = tiny(family)
    engine = CompatEngine(model, StepContext())
    docs = documents()
    batch = batch_of(docs)
    expected = 0
    with torch.no_grad(), plain_attention(model):
        for doc in docs:
            ids = torch.from_numpy(doc.ids).long()
            best = model(input_ids=ids[None]).logits[0, :-1].argmax(-1)
            right = torch.from_numpy(doc.trained[1:])
            expected += int(((best == ids[1:]) & right).sum())
    # The labels are what the model would say, so that there is something to count.
    assert int(engine.evaluate(batch).correct) == expected
    assert int(engine.loss(batch, step=0).correct) == expected


# --- dropout, recomputation -------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "phi3", "falcon"])
def test_dropout_does_not_depend_on_packing(family: str) -> None:
    adapters, context = with_adapters(family, dropout=0.3)
    engine = CompatEngine(adapters.model, context)
    docs = documents()
    loss, grads = step(engine, [batch_of(docs)])
    reordered, same = step(engine, [batch_of(docs[::-1], round_to=16)])
    single, sums = step(engine, [batch_of([doc]) for doc in docs])
    assert float(single) == pytest.approx(float(loss), rel=1e-5)
    assert float(reordered) == pytest.approx(float(loss), rel=1e-5)
    assert_close(grads, sums)
    assert_close(grads, same)
    other, _ = step(engine, [batch_of(docs)], number=6)
    assert abs(float(other - loss)) > 1e-3  # the step is part of the key, and dropout is on


def test_dropout_on_the_head_does_not_depend_on_packing() -> None:
    context = StepContext()
    lora = LoraConfig(r=4, alpha=8, dropout=0.3, target_modules=["lm_head"])
    adapters = add_adapters(tiny("llama"), lora, seed=0, context=context)
    adapters.layers["lm_head"].lora_B.data.normal_(0, 0.3)
    engine, docs = CompatEngine(adapters.model, context), documents()
    loss, grads = step(engine, [batch_of(docs)])
    single, sums = step(engine, [batch_of([doc]) for doc in docs])
    assert float(single) == pytest.approx(float(loss), rel=1e-5)
    assert_close(grads, sums)
    other, _ = step(engine, [batch_of(docs)], number=6)
    assert abs(float(other - loss)) > 1e-3


@pytest.mark.parametrize("family", ["llama", "mixtral", "falcon"])
def test_recomputing_blocks_changes_no_bit(family: str) -> None:
    kept, context = with_adapters(family, dropout=0.3)
    again, other = with_adapters(family, dropout=0.3)
    docs = documents()
    loss, grads = step(CompatEngine(kept.model, context), [batch_of(docs)])
    engine = CompatEngine(again.model, other, activations="recompute_block")
    calls = _count_calls(next(iter(again.layers.values())))
    reloss, regrads = step(engine, [batch_of(docs)])
    forwards = sum(len(doc.ids) > 1 for doc in docs) if family == "falcon" else 1
    assert len(calls) == 2 * forwards  # it was recomputed
    assert torch.equal(loss, reloss)
    assert all(torch.equal(grads[name], regrads[name]) for name in grads)


def _count_calls(module: nn.Module) -> list[int]:
    calls: list[int] = []
    module.register_forward_hook(lambda *_: calls.append(1))
    return calls


def test_recomputation_sees_its_own_batch_whatever_ran_in_between() -> None:
    adapters, context = with_adapters("llama", dropout=0.3)
    engine = CompatEngine(adapters.model, context, activations="recompute_block")
    docs = documents()
    _, expected = step(engine, [batch_of(docs)])
    adapters.model.zero_grad()
    output = engine.loss(batch_of(docs), step=5)
    engine.evaluate(batch_of(documents((4, 11), seed=3)))
    output.loss_sum.backward()
    found = {n: p.grad for n, p in adapters.model.named_parameters() if p.grad is not None}
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_dropout_of_the_base_is_off_and_said() -> None:
    model = tiny("gpt2", resid_pdrop=0.5, attn_pdrop=0.5, embd_pdrop=0.5)
    engine = CompatEngine(model, StepContext())
    assert any("dropout inside the base model is off" in note for note in engine.notes)
    losses = [float(engine.loss(batch_of(documents()), step=i).loss_sum) for i in range(2)]
    assert (
        losses[0]
        == losses[1]
        == pytest.approx(float(engine.evaluate(batch_of(documents())).loss_sum), rel=1e-6)
    )


# --- the rest of the surface ------------------------------------------------------------------------


def test_evaluation_has_no_dropout_and_no_gradient() -> None:
    adapters, context = with_adapters("llama", dropout=0.5)
    engine = CompatEngine(adapters.model, context)
    docs = documents()
    training = float(engine.loss(batch_of(docs), step=0).loss_sum)
    output = engine.evaluate(batch_of(docs))
    assert not output.loss_sum.requires_grad and adapters.model.training
    with torch.no_grad(), plain_attention(adapters.model):
        expected = float(alone(adapters.model.eval(), docs))
    assert float(output.loss_sum) == pytest.approx(expected, rel=1e-5)
    assert abs(training - expected) > 1e-2


@pytest.mark.parametrize("family", ["llama", "falcon"])
def test_a_batch_with_nothing_to_learn_has_loss_zero(family: str) -> None:
    adapters, context = with_adapters(family)
    engine = CompatEngine(adapters.model, context)
    docs = [doc._replace(trained=doc.trained & False) for doc in documents()]
    output = engine.loss(batch_of(docs), step=0)
    output.loss_sum.backward()
    assert float(output.loss_sum) == 0 and int(output.correct) == 0


@pytest.mark.parametrize("family", ["llama", "gemma2", "phi"])
def test_autocast_keeps_fp32_masters(family: str) -> None:
    model = tiny(family)
    reference, _ = step(CompatEngine(copy.deepcopy(model), StepContext()), [batch_of(documents())])
    engine = CompatEngine(model, StepContext(), autocast=torch.bfloat16)
    assert not engine.isolate
    loss, grads = step(engine, [batch_of(documents())])
    assert loss.dtype == torch.float32 and all(g.dtype == torch.float32 for g in grads.values())
    assert float(loss) == pytest.approx(float(reference), rel=2e-2)
    assert float(loss) != float(reference)


def test_weights_out_of_reach_are_named() -> None:
    adapters, context = with_adapters("mixtral")
    notes = " ".join(CompatEngine(adapters.model, context).notes)
    assert "experts.gate_up_proj" in notes and "experts.down_proj" in notes
    adapters, context = with_adapters("llama")
    assert "do not reach" not in " ".join(CompatEngine(adapters.model, context).notes)


def test_activations_it_does_not_know_are_refused() -> None:
    with pytest.raises(UserError, match="needs the fast engine; the compat engine has keep"):
        CompatEngine(tiny("llama"), StepContext(), activations="offload")
    model = tiny("llama")
    model.supports_gradient_checkpointing = False
    with pytest.raises(UserError, match="does not support recomputation"):
        CompatEngine(model, StepContext(), activations="recompute_block")


def test_generation_needs_the_models_own_attention() -> None:
    model = tiny("gemma2")
    expected = model.generate(
        torch.tensor([[5, 6, 7, 8, 9, 10, 11]]), max_new_tokens=5, do_sample=False
    )
    CompatEngine(model, StepContext())
    with pytest.raises(CannotPack, match="plain_attention"):
        model(input_ids=torch.tensor([[5, 6, 7]]))
    with plain_attention(model):
        found = model.generate(
            torch.tensor([[5, 6, 7, 8, 9, 10, 11]]), max_new_tokens=5, do_sample=False
        )
    assert torch.equal(found, expected)
    assert model.config._attn_implementation == NAME
