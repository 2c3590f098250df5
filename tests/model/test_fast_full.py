"""The fast engine training every weight, against transformers' own gradients."""

from __future__ import annotations

import pytest
import torch
from test_compat import assert_close
from test_fast import NAMES, VARIANTS
from tiny_models import batch_of, documents, tiny

from fastsft.model.compat import CompatEngine
from fastsft.model.context import StepContext
from fastsft.model.fast import FastEngine, _BlockPass
from fastsft.model.plan import Plan


def gradients(engine, batches):
    """(summed loss, name -> gradient of every weight) of one step from these micro-batches."""
    total = 0.0
    for batch in batches:
        loss = engine.loss(batch, step=1).loss_sum
        loss.backward()
        total += float(loss.detach())
    return total, {n: p.grad.clone() for n, p in engine.model.named_parameters()}


def full(family, *, dtype=torch.float32, compute=None, plan=None, **more):
    model = tiny(family, dtype=dtype, **more)
    return FastEngine(model, StepContext(seed=3), dtype=compute, plan=plan)


@pytest.mark.parametrize("family,more", VARIANTS, ids=NAMES)
def test_every_weights_gradient_is_transformers(family, more):
    batches = [batch_of(documents(), round_to=8), batch_of(documents((5, 2), seed=1))]
    oracle = CompatEngine(tiny(family, **more), StepContext(seed=3))
    wanted, want_grads = gradients(oracle, batches)
    found, grads = gradients(full(family, **more), batches)
    assert found == pytest.approx(wanted, rel=1e-5)
    assert grads.keys() == want_grads.keys() and len(grads) > 8
    assert_close(grads, want_grads, 1e-4)


@pytest.mark.parametrize("policy", ["recompute_mlp", "recompute_block", "offload"])
@pytest.mark.parametrize("family", ["llama", "gemma3_text", "olmo2"])
def test_policies_change_no_bit(family, policy):
    batches = [batch_of(documents())]
    wanted, want_grads = gradients(full(family), batches)
    engine = full(family)
    engine.plan = Plan((policy,) * engine.spec.layers)
    found, grads = gradients(engine, batches)
    assert found == wanted
    assert all(torch.equal(want_grads[name], grad) for name, grad in grads.items())


def test_half_precision_products_over_wide_masters():
    """bf16 products, fp32 masters and gradients: as near to the fp32 gradient as autocast comes."""
    batches = [batch_of(documents(), round_to=8)]
    _, exact = gradients(full("llama"), batches)
    engine = full("llama", compute=torch.bfloat16)
    assert all(p.dtype == torch.float32 for p in engine.model.parameters())
    _, ours = gradients(engine, batches)
    theirs_engine = CompatEngine(tiny("llama"), StepContext(seed=3), autocast=torch.bfloat16)
    _, theirs = gradients(theirs_engine, batches)
    for name, wanted in exact.items():
        error = float((ours[name] - wanted).norm() / wanted.norm())
        torchs = float((theirs[name] - wanted).norm() / wanted.norm())
        assert ours[name].dtype == torch.float32
        assert error <= 1.5 * torchs + 1e-3, (name, error, torchs)


@pytest.mark.parametrize("compute", [None, torch.bfloat16])
def test_the_products_follow_the_optimizer(compute):
    """Three AdamW steps, then the loss equals that of an engine made from the trained weights."""
    batch = batch_of(documents())
    engine = full("llama", compute=compute)
    optimizer = torch.optim.AdamW(engine.model.parameters(), lr=1e-2, fused=True)
    losses = []
    for number in range(3):
        output = engine.loss(batch, step=number)
        output.loss_sum.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(float(output.loss_sum.detach()))
    again = tiny("llama")
    again.load_state_dict(engine.model.state_dict())
    fresh = FastEngine(again, StepContext(seed=3), dtype=compute)
    assert float(engine.evaluate(batch).loss_sum) == float(fresh.evaluate(batch).loss_sum)
    assert losses[2] < losses[0]


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "olmo2", "granite"])
@pytest.mark.parametrize("index", [0, 1])
def test_gradcheck_of_a_block(family, index):
    """Each input's gradient against differences in float64; the last block gives its trained rows alone."""
    engine = full(family, dtype=torch.float64)
    batch = batch_of(documents((4, 2)))
    engine._ready_gradients()
    known = engine._pass(batch, training=True)
    shape = (2, 6, engine.spec.hidden)
    x, branch = torch.randn(shape, generator=torch.Generator().manual_seed(0)).double()

    def block(x, branch):
        out = _BlockPass.apply(x, branch, engine.anchor, engine, engine.blocks[index], known)
        return out[0] + out[1]  # as the next block's norm does

    assert torch.autograd.gradcheck(block, (x.requires_grad_(), branch.requires_grad_()))
