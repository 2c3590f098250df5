"""Embedding and head in host memory: the same loss, gradient and generation."""

from __future__ import annotations

import pytest
import torch
from test_compat import assert_close, step
from test_fast import both
from tiny_models import batch_of, documents

from fastsft.model import host_weights
from fastsft.model.fast import FastEngine
from fastsft.model.host_weights import HostEmbedding, HostHead, streamed_cross_entropy
from fastsft.model.plan import Plan


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    monkeypatch.setattr(host_weights, "TILE", 30)  # of 97 to 100 words: three and a rest


def with_hosted(family, *, dtype, embedding=True, head=True, head_rows=None, **more):
    engine = both(family, dtype=dtype, **more)[1]
    plan = Plan(engine.plan.policies, head_rows=head_rows, host_embedding=embedding, host_head=head)
    return FastEngine(engine.model, engine.context, plan=plan)


@pytest.mark.parametrize("family", ["llama", "gemma2", "granite", "qwen3"])
@pytest.mark.parametrize("head_rows", [None, 5])
def test_the_loss_and_every_gradient_are_those_on_the_device(family, head_rows):
    batches = [batch_of(documents()), batch_of(documents((5, 2), seed=1))]
    for batch in batches:
        batch.host_ids = batch.ids
    plain = both(family, dtype=torch.float64)[1]
    hosted = with_hosted(family, dtype=torch.float64, head_rows=head_rows)
    model = hosted.model
    assert isinstance(model.get_input_embeddings(), HostEmbedding)
    assert isinstance(model.get_output_embeddings(), HostHead)
    wanted, want_grads = step(plain, batches)
    found, grads = step(hosted, batches)
    assert float(found) == pytest.approx(float(wanted), rel=1e-12)
    assert_close(grads, want_grads, 1e-12)
    for batch in batches:
        ours, theirs = hosted.evaluate(batch), plain.evaluate(batch)
        assert float(ours.loss_sum) == pytest.approx(float(theirs.loss_sum), rel=1e-12)
        assert int(ours.correct) == int(theirs.correct)


def test_the_largest_logit_is_found_in_every_tile():
    """Ninety words in three tiles; two of three rows are labelled with their largest logit."""
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(n, 16, generator=generator) for n in (60, 90))
    labels = (hidden @ weight.t()).argmax(1)
    assert labels.div(30, rounding_mode="floor").unique().numel() == 3
    labels[::3] = (labels[::3] + 1) % 90
    head = HostHead(weight, torch.device("cpu"))
    loss, correct = streamed_cross_entropy(hidden, head, labels, chunk_rows=7)
    wanted = torch.nn.functional.cross_entropy(hidden @ weight.t(), labels, reduction="sum")
    assert float(loss) == pytest.approx(float(wanted), rel=1e-5) and int(correct) == 40


def test_one_of_the_two_alone():
    batch = batch_of(documents())
    batch.host_ids = batch.ids
    wanted, _ = step(both("llama", dtype=torch.float64)[1], [batch])
    for one in ({"head": False}, {"embedding": False}):
        hosted = with_hosted("llama", dtype=torch.float64, tie_word_embeddings=False, **one)
        plain = both("llama", dtype=torch.float64, tie_word_embeddings=False)[1]
        found, _ = step(hosted, [batch])
        assert float(found) == pytest.approx(float(step(plain, [batch])[0]), rel=1e-12)
    assert float(wanted) > 0


def test_transformers_own_forward_goes_on():
    """What generation and samples run through."""
    plain = both("llama", dtype=torch.float64)[1]
    hosted = with_hosted("llama", dtype=torch.float64)
    ids = torch.arange(7)[None]
    with torch.no_grad():
        wanted, found = (e.model.eval()(input_ids=ids).logits for e in (plain, hosted))
    assert torch.allclose(found, wanted, rtol=1e-12, atol=1e-12)


def test_nothing_trained():
    docs = [d._replace(trained=d.trained & False) for d in documents()]
    batch = batch_of(docs)
    batch.host_ids = batch.ids
    loss, grads = step(with_hosted("llama", dtype=torch.float64), [batch])
    assert float(loss) == 0 and not any(g.any() for g in grads.values())
