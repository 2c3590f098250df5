"""cross_entropy and linear_cross_entropy against torch in float64, and against transformers."""

import pytest
import torch
import torch.nn.functional as F
from fastsft_kernels import cross_entropy, linear_cross_entropy
from fastsft_kernels.fused import cross_entropy_
from fastsft_kernels.products import add_product
from fastsft_kernels.reference.fused_cross_entropy import accumulator
from torch.autograd import gradcheck

T, H, V = 37, 12, 50
REDUCTIONS = ["none", "mean", "sum"]
OPTIONS = [{}, {"softcap": 1.5}, {"scale": 0.3}, {"softcap": 2.0, "scale": 1.7}]


def case(dtype=torch.float64, ignore_index=-100):
    torch.manual_seed(0)
    hidden = torch.randn(T, H, dtype=dtype).requires_grad_()
    weight = torch.randn(V, H, dtype=dtype).requires_grad_()
    labels = torch.randint(0, V, (T,))
    labels[torch.rand(T) < 0.4] = ignore_index
    labels[:2] = torch.tensor([0, V - 1])
    return hidden, weight, labels


def naive(hidden, weight, labels, *, reduction, softcap=None, scale=1.0, ignore_index=-100):
    logits = hidden @ weight.t() * scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    return F.cross_entropy(logits, labels, reduction=reduction, ignore_index=ignore_index)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("chunk_rows", [1, 5, None])
@pytest.mark.parametrize("give_rows", [False, True])
def test_linear_cross_entropy(options, reduction, chunk_rows, give_rows):
    hidden, weight, labels = case()
    rows = (labels != -100).nonzero().squeeze(1) if give_rows else None
    ours, correct = linear_cross_entropy(
        hidden,
        weight,
        labels,
        reduction=reduction,
        chunk_rows=chunk_rows,
        rows=rows,
        return_correct=True,
        **options,
    )
    theirs = naive(hidden, weight, labels, reduction=reduction, **options)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    assert correct.dtype == torch.int64 and not correct.requires_grad
    right = ((hidden @ weight.t()).argmax(1) == labels).sum()
    assert correct == right and right > 0
    upstream = torch.randn_like(ours)
    got = torch.autograd.grad(ours, [hidden, weight], upstream)
    want = torch.autograd.grad(theirs, [hidden, weight], upstream)
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("softcap", [None, 1.5])
def test_cross_entropy(reduction, softcap):
    hidden, weight, labels = case(ignore_index=-1)
    logits = (hidden @ weight.t()).detach().requires_grad_()
    ours = cross_entropy(logits, labels, ignore_index=-1, reduction=reduction, softcap=softcap)
    capped = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    theirs = F.cross_entropy(capped, labels, ignore_index=-1, reduction=reduction)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    upstream = torch.randn_like(ours)
    (got,) = torch.autograd.grad(ours, [logits], upstream)
    (want,) = torch.autograd.grad(theirs, [logits], upstream)
    torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_gradcheck(reduction):
    torch.manual_seed(0)
    hidden = torch.randn(6, 4, dtype=torch.float64).requires_grad_()
    weight = torch.randn(7, 4, dtype=torch.float64).requires_grad_()
    labels = torch.tensor([3, -100, 0, 6, -100, 3])
    kwargs = {"reduction": reduction, "softcap": 2.0}
    assert gradcheck(
        lambda h, w: linear_cross_entropy(h, w, labels, scale=0.7, chunk_rows=2, **kwargs),
        (hidden, weight),
    )
    logits = torch.randn(6, 7, dtype=torch.float64).requires_grad_()
    assert gradcheck(lambda z: cross_entropy(z, labels, **kwargs), (logits,))


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("by", ["number", "one", "per row", "none"])
@pytest.mark.parametrize("in_out", [False, True])
def test_the_gradient_in_place_is_autograds(options, by, in_out):
    """cross_entropy_ in float64: losses, correct guesses, entropies, and the gradient for each `by`."""
    hidden, weight, labels = case()
    logits = (3 * hidden @ weight.t()).detach().requires_grad_()
    z = logits * options.get("scale", 1.0)
    if "softcap" in options:
        z = options["softcap"] * torch.tanh(z / options["softcap"])
    losses = F.cross_entropy(z, labels, reduction="none")
    factor = {"number": 0.3, "one": torch.randn((), dtype=z.dtype), "none": None}.get(by)
    if by == "per row":
        factor = torch.randn(T, dtype=z.dtype)
    held = logits.detach().clone()
    out = torch.full_like(held, torch.nan) if in_out and by != "none" else None
    got = cross_entropy_(held, labels, gradient_scale=factor, out=out, **options)
    torch.testing.assert_close(got.loss, losses.detach(), rtol=1e-12, atol=1e-12)
    trained = labels != -100
    assert torch.equal(got.correct, (logits.argmax(1) == labels) & trained) and got.correct.any()
    entropy = torch.distributions.Categorical(logits=z.detach()).entropy() * trained
    torch.testing.assert_close(got.entropy, entropy, rtol=1e-12, atol=1e-12)
    if by == "none" or in_out:
        assert torch.equal(held, logits)
    if by != "none":
        (want,) = torch.autograd.grad((losses * factor).sum(), [logits])
        torch.testing.assert_close(held if out is None else out, want, rtol=1e-11, atol=1e-13)


def test_soft_capped_scaled_head_is_transformers():
    from transformers.models.gemma2 import Gemma2Config, Gemma2ForCausalLM

    torch.manual_seed(0)
    config = Gemma2Config(
        vocab_size=V,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        final_logit_softcapping=0.5,
    )
    model = Gemma2ForCausalLM(config).eval()
    ids = torch.randint(0, V, (1, 20))
    hidden = model.model(ids).last_hidden_state[0, :-1]
    ours = linear_cross_entropy(hidden, model.lm_head.weight, ids[0, 1:], softcap=0.5)
    torch.testing.assert_close(ours, model(ids, labels=ids).loss)


def test_frozen_weight_and_evaluation_compute_no_gradient(monkeypatch):
    hidden, weight, labels = case()
    shapes = []
    keep = torch.autograd.graph.saved_tensors_hooks(
        lambda t: shapes.append(t.shape) or t, lambda t: t
    )
    with keep:
        loss = linear_cross_entropy(hidden, weight.detach(), labels)
    assert (V, H) not in shapes
    loss.backward()
    assert weight.grad is None and hidden.grad is not None
    calls = []
    product = torch.mm
    monkeypatch.setattr(torch, "mm", lambda *a, **k: calls.append(1) or product(*a, **k))
    linear_cross_entropy(hidden, weight.detach(), labels)
    assert len(calls) == 2  # training multiplies the gradient of the logits out in forward ...
    calls.clear()
    with torch.no_grad():
        quiet = linear_cross_entropy(hidden, weight, labels)
    assert len(calls) == 1 and not quiet.requires_grad  # ... evaluation does not
    torch.testing.assert_close(quiet, loss.detach(), rtol=1e-12, atol=0)


def test_masked_rows_cost_nothing(monkeypatch):
    """Only trained rows reach the head, and nothing in the others (not even NaN) matters."""
    hidden, weight, labels = case()
    poisoned = hidden.detach().clone()
    poisoned[labels == -100] = torch.nan
    poisoned.requires_grad_()
    want = linear_cross_entropy(hidden, weight, labels, reduction="sum")
    got = linear_cross_entropy(poisoned, weight, labels, reduction="sum")
    assert torch.equal(got, want)
    got.backward()
    assert (poisoned.grad[labels == -100] == 0).all() and not poisoned.grad.isnan().any()


@pytest.mark.parametrize("tokens", [0, 4])
def test_nothing_to_train(tokens):
    hidden = torch.randn(tokens, H).requires_grad_()
    weight = torch.randn(V, H).requires_grad_()
    labels = torch.full((tokens,), -100)
    loss, correct = linear_cross_entropy(
        hidden, weight, labels, reduction="sum", return_correct=True
    )
    assert loss == 0 and correct == 0
    loss.backward()
    assert (hidden.grad == 0).all() and (weight.grad == 0).all()
    assert linear_cross_entropy(hidden, weight, labels).isnan()  # torch's mean of nothing
    assert F.cross_entropy(hidden @ weight.t(), labels).isnan()
    assert linear_cross_entropy(hidden, weight, labels, reduction="none").tolist() == [0] * tokens
    assert cross_entropy(hidden @ weight.t(), labels, reduction="sum") == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_low_precision_is_no_worse_than_torch(dtype):
    hidden, weight, labels = case(dtype)
    exact = [x.detach().double().requires_grad_() for x in (hidden, weight)]
    results = []
    for loss, inputs in (
        (linear_cross_entropy(hidden, weight, labels, chunk_rows=7), (hidden, weight)),
        (naive(hidden, weight, labels, reduction="mean"), (hidden, weight)),
        (naive(*exact, labels, reduction="mean"), exact),
    ):
        results.append([loss, *torch.autograd.grad(loss, inputs)])
    assert results[0][0].dtype == torch.float32 and results[0][1].dtype == dtype
    for ours, torchs, want in zip(*results, strict=True):
        error, theirs = (ours - want).abs().max(), (torchs - want).abs().max()
        assert error <= 2 * theirs + 1e-6


def test_extreme_logits():
    """A certain answer, a hopeless one, and one tied: no overflow, no log of zero."""
    logits = torch.tensor([[1e4, 0, -1e4], [0, 0, 1e4], [-1e4, 1.0, 1.0]]).requires_grad_()
    labels = torch.tensor([0, 1, 1])
    loss = cross_entropy(logits, labels, reduction="none")
    torch.testing.assert_close(loss, F.cross_entropy(logits, labels, reduction="none"))
    loss.sum().backward()
    assert logits.grad.isfinite().all()
    weight = torch.eye(3)
    kwargs = {"reduction": "none", "return_correct": True}
    _, correct = linear_cross_entropy(logits.detach(), weight, labels, **kwargs)
    assert correct == 2  # the tie counts


def test_strided_inputs():
    _, _, labels = case()
    wide, tall = torch.randn(T, 2 * H), torch.randn(H, V)
    strided = linear_cross_entropy(wide[:, :H], tall.t(), labels)
    plain = linear_cross_entropy(wide[:, :H].contiguous(), tall.t().contiguous(), labels)
    torch.testing.assert_close(strided, plain)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_autocast_is_its_dtype_throughout(reduction):
    """Also where the gradient is computed in backward, which autocast does not reach."""
    hidden, weight, labels = case(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        ours = linear_cross_entropy(hidden, weight, labels, reduction=reduction)
    low = hidden.bfloat16(), weight.bfloat16()
    want = linear_cross_entropy(*low, labels, reduction=reduction)
    assert torch.equal(ours, want)
    upstream = torch.randn_like(ours)
    got = torch.autograd.grad(ours, [hidden, weight], upstream)
    low_grads = torch.autograd.grad(want, low, upstream)
    for g, w in zip(got, low_grads, strict=True):
        assert g.dtype == torch.float32
        torch.testing.assert_close(g, w.float(), rtol=2**-7, atol=0)


def test_backward_twice():
    """Backward scales a copy: kept graphs give the same gradient again."""
    hidden, weight, labels = case()
    loss = linear_cross_entropy(hidden, weight, labels)
    first = torch.autograd.grad(2 * loss, [hidden, weight], retain_graph=True)
    second = torch.autograd.grad(loss, [hidden, weight])
    for a, b in zip(first, second, strict=True):
        torch.testing.assert_close(a, 2 * b)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_a_product_is_added_in_the_dtype_of_the_sum(dtype):
    a, b = (torch.randn(n, dtype=dtype) for n in ((5, 3), (3, 7)))
    wide = accumulator(dtype)
    total = torch.full((5, 7), torch.nan, dtype=wide)
    add_product(total, a, b, first=True)
    torch.testing.assert_close(total, a.to(wide) @ b.to(wide))
    add_product(total, a, b)
    torch.testing.assert_close(total, 2 * (a.to(wide) @ b.to(wide)))
    shape = total.to("meta")  # where a launch is recorded
    add_product(shape, a.to("meta"), b.to("meta"))
    assert (shape.shape, shape.dtype) == ((5, 7), wide)
