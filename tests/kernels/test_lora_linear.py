"""lora_linear against PEFT's layer, autograd in float64, and bitsandbytes-free NF4 decoding."""

import sys

import pytest
import torch
import torch.nn.functional as F
from fastsft_kernels import DropoutKey, lora_dropout_mask, lora_linear, nf4_dequantize, nf4_quantize
from torch.autograd import gradcheck

T, K, N, R, SCALING = 11, 40, 24, 4, 0.7
KEY = DropoutKey(seed=3, step=5, module=7, rows=torch.arange(T) * (1 << 24) + 9)


def case(dtype=torch.float64):
    torch.manual_seed(0)
    shapes = {"x": (T, K), "weight": (N, K), "a": (R, K), "b": (N, R), "bias": (N,)}
    return {k: torch.randn(s, dtype=dtype).requires_grad_() for k, s in shapes.items()}


def naive(x, weight, a, b, bias, *, p=0.0, key=KEY):
    dropped = x
    if p:
        keep = 1 - round(p * 65536) / 65536
        dropped = x * lora_dropout_mask(key, x.shape[-1], p) / keep
    return F.linear(x, weight, bias) + SCALING * dropped @ a.t() @ b.t()


def gradients(y, inputs, seed=1):
    torch.manual_seed(seed)
    return torch.autograd.grad(y, inputs, torch.randn(y.shape).to(y.dtype))


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("keep_mask_on", [("cpu",), ()], ids=["mask kept", "mask drawn again"])
def test_float64(p, keep_mask_on, monkeypatch):
    monkeypatch.setattr(sys.modules["fastsft_kernels.reference.lora"], "KEEP_MASK_ON", keep_mask_on)
    t = case()
    y = lora_linear(
        t["x"], t["weight"], t["a"], t["b"], SCALING, bias=t["bias"], dropout_p=p, dropout_key=KEY
    )
    want = naive(*t.values(), p=p)
    torch.testing.assert_close(y, want, rtol=1e-12, atol=1e-12)
    for g, w in zip(gradients(y, t.values()), gradients(want, t.values()), strict=True):
        torch.testing.assert_close(g, w, rtol=1e-12, atol=1e-12)


def test_gradcheck():
    torch.manual_seed(0)
    shapes = [(5, 6), (4, 6), (2, 6), (4, 2), (4,)]
    inputs = [torch.randn(s, dtype=torch.float64).requires_grad_() for s in shapes]
    key = KEY._replace(rows=torch.arange(5))

    def op(x, weight, a, b, bias):
        return lora_linear(x, weight, a, b, SCALING, bias=bias, dropout_p=0.4, dropout_key=key)

    assert gradcheck(op, inputs)


@pytest.mark.parametrize("bias", [False, True])
def test_peft_layer(bias):
    from peft import LoraConfig
    from peft.tuners.lora import Linear

    torch.manual_seed(0)
    config = LoraConfig(r=R, lora_alpha=8, init_lora_weights=False)
    base = torch.nn.Linear(K, N, bias=bias).requires_grad_(False)
    layer = Linear(base, "default", config=config, r=R, lora_alpha=8)
    a, b = (m["default"].weight for m in (layer.lora_A, layer.lora_B))
    x = torch.randn(2, T, K).requires_grad_()
    y = lora_linear(x, base.weight, a, b, 8 / R, bias=base.bias)
    theirs = layer(x)
    assert y.shape == (2, T, N)
    torch.testing.assert_close(y, theirs)
    for g, w in zip(gradients(y, [x, a, b]), gradients(theirs, [x, a, b]), strict=True):
        torch.testing.assert_close(g, w)


@pytest.mark.parametrize("k", [64, 40, 33])
@pytest.mark.parametrize("p", [0.0, 0.2])
def test_nf4_base_is_its_decoded_self(k, p):
    torch.manual_seed(0)
    nf4 = nf4_quantize(torch.randn(N, k))
    dense = nf4_dequantize(nf4, dtype=torch.float32)
    a, b = torch.randn(R, k).requires_grad_(), torch.randn(N, R).requires_grad_()
    x = torch.randn(T, k).requires_grad_()
    kwargs = {"dropout_p": p, "dropout_key": KEY}
    y = lora_linear(x, nf4, a, b, SCALING, **kwargs)
    want = lora_linear(x, dense, a, b, SCALING, **kwargs)
    assert torch.equal(y, want)
    for g, w in zip(gradients(y, [x, a, b]), gradients(want, [x, a, b]), strict=True):
        assert torch.equal(g, w)


@pytest.mark.parametrize("quantised", [False, True])
def test_backward_keeps_the_input_and_the_tail_alone(quantised):
    """No decoded weight, no dropped input and no [T, N] tensor is saved."""
    t = case(torch.float32)
    weight = nf4_quantize(t["weight"].detach()) if quantised else t["weight"].detach()
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda s: saved.append(s) or s, lambda s: s):
        lora_linear(t["x"], weight, t["a"], t["b"], SCALING)
    own = {t[k].data_ptr() for k in ("x", "weight", "a", "b")}
    extra = [tuple(s.shape) for s in saved if s.data_ptr() not in own]
    assert extra == [(T, R)]


def test_gradients_only_where_asked_for():
    t = case(torch.float32)
    y = lora_linear(t["x"].detach(), t["weight"].detach(), t["a"], t["b"], SCALING)
    y.sum().backward()
    assert t["a"].grad is not None and t["x"].grad is None and t["weight"].grad is None
    y = lora_linear(t["x"], t["weight"].detach(), t["a"].detach(), t["b"].detach(), SCALING)
    (dx,) = gradients(y, [t["x"]])
    (want,) = gradients(naive(t["x"], t["weight"], t["a"], t["b"], None), [t["x"]])
    torch.testing.assert_close(dx, want)


def test_without_adapter():
    t = case()
    y = lora_linear(t["x"], t["weight"], None, None, 1.0, bias=t["bias"], dropout_p=0.5)
    want = F.linear(t["x"], t["weight"], t["bias"])
    torch.testing.assert_close(y, want, rtol=1e-12, atol=1e-12)
    inputs = [t["x"], t["weight"], t["bias"]]
    for g, w in zip(gradients(y, inputs), gradients(want, inputs), strict=True):
        torch.testing.assert_close(g, w, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_with_float32_masters(dtype):
    t = case(torch.float32)
    x, weight = (t[k].detach().to(dtype).requires_grad_() for k in ("x", "weight"))
    y = lora_linear(x, weight, t["a"], t["b"], SCALING)
    da, db, dx = gradients(y, [t["a"], t["b"], x])
    assert y.dtype == dx.dtype == dtype and da.dtype == db.dtype == torch.float32
    low = [v.detach().to(dtype).requires_grad_() for v in (t["a"], t["b"])]
    exact = [v.detach().double().requires_grad_() for v in (x, weight, *low)]
    plain = naive(x, weight, *low, None)
    best = naive(*exact, None)
    ours = [y, da, db, dx]
    torchs = [plain, *gradients(plain, [*low, x])]
    wants = [best, *gradients(best, [exact[2], exact[3], exact[0]])]
    for got, other, want in zip(ours, torchs, wants, strict=True):
        error, theirs = ((v - want).abs().max() for v in (got, other))
        assert error <= 1.5 * theirs


def test_autocast_runs_in_its_dtype():
    t = case(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        y = lora_linear(t["x"], t["weight"], t["a"], t["b"], SCALING, bias=t["bias"])
        want = naive(*t.values())
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y, want, rtol=0.05, atol=0.2)
    for g, w in zip(gradients(y, t.values()), gradients(want, t.values()), strict=True):
        assert g.dtype == torch.float32
        assert (g - w).norm() < 0.02 * w.norm()


def test_dropout_belongs_to_the_token():
    """Permuted, split or repeated rows: a token's output and gradient stay what they were."""
    t = case()
    order = torch.randperm(T)
    frozen = (t["weight"].detach(), t["a"], t["b"], SCALING)
    whole = lora_linear(t["x"], *frozen, dropout_p=0.5, dropout_key=KEY)
    moved = KEY._replace(rows=KEY.rows[order])
    permuted = lora_linear(t["x"][order], *frozen, dropout_p=0.5, dropout_key=moved)
    torch.testing.assert_close(permuted, whole[order], rtol=1e-12, atol=1e-12)
    part = lora_linear(
        t["x"][4:6], *frozen, dropout_p=0.5, dropout_key=KEY._replace(rows=KEY.rows[4:6])
    )
    torch.testing.assert_close(part, whole[4:6], rtol=1e-12, atol=1e-12)
    off = lora_linear(t["x"], *frozen, dropout_p=0.5, training=False)
    torch.testing.assert_close(off, naive(t["x"], t["weight"], t["a"], t["b"], None))
    assert not torch.allclose(off, whole)


def test_without_a_key_torchs_generator_decides():
    t = case()
    outputs = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        y = lora_linear(t["x"], t["weight"], t["a"], t["b"], SCALING, dropout_p=0.5)
        outputs.append((y, *gradients(y, [t["x"]])))
    assert torch.equal(outputs[0][0], outputs[1][0]) and torch.equal(outputs[0][1], outputs[1][1])
    assert not torch.equal(outputs[0][0], outputs[2][0])


def test_recomputation_draws_the_same_mask():
    from torch.utils.checkpoint import checkpoint

    t = case()

    def op(x):
        return lora_linear(x, t["weight"], t["a"], t["b"], SCALING, dropout_p=0.5, dropout_key=KEY)

    want = gradients(op(t["x"]), [t["x"], t["a"], t["b"]])
    got = gradients(checkpoint(op, t["x"], use_reentrant=False), [t["x"], t["a"], t["b"]])
    for g, w in zip(got, want, strict=True):
        assert torch.equal(g, w)


def test_strided_rows_expanded_gradient_and_no_rows():
    t = case()
    wide = torch.randn(T, 2 * K, dtype=torch.float64)
    y = lora_linear(wide[:, K:], t["weight"], t["a"], t["b"], SCALING)
    torch.testing.assert_close(y, naive(wide[:, K:], t["weight"], t["a"], t["b"], None))
    y.sum().backward()  # an upstream gradient of stride 0
    got = t["a"].grad.clone()
    t["a"].grad = None
    naive(wide[:, K:], t["weight"], t["a"], t["b"], None).sum().backward()
    torch.testing.assert_close(got, t["a"].grad)
    none = lora_linear(wide[:0, :K], t["weight"], t["a"], t["b"], SCALING, dropout_p=0.5)
    assert none.shape == (0, N)
    none.sum().backward()
