"""lora_linear on Triton: both ways of making the large product, against the plain formula in float64."""

import pytest
import torch
import torch.nn.functional as F
from fastsft_kernels import DropoutKey, lora_dropout_mask, lora_linear, nf4_dequantize, nf4_quantize
from fastsft_kernels.dropout import keep_scale
from fastsft_kernels.fused import StripDropout
from fastsft_kernels.launch import forced, record_launches
from fastsft_kernels.triton_ops.lora import add_masked
from fastsft_kernels.triton_ops.lora_gemm import lora_gemm
from kernel_checks import DEVICE, DTYPES, check, check_gradients, poisoned_memory, randn  # noqa: F401

SCALING = 0.7
VARIANTS = ["cublas", "epilogue"]
NAMES = ["x", "weight", "a", "b", "bias"]


def key(T):
    rows = torch.arange(T, device=DEVICE) * (1 << 24) + 9
    return DropoutKey(seed=2**32 - 1, step=5, module=7, rows=rows)


def forcing(variant):
    ways = ("lora_linear", "lora_linear_backward")
    return forced(**{way + kind: variant for way in ways for kind in ("", "_f32")})


def ours(x, weight, a, b, bias=None, *, p=0.0):
    T = x.numel() // x.shape[-1]
    return lora_linear(
        x, weight, a, b, SCALING, bias=bias, dropout_p=p, dropout_key=key(T), backend="triton"
    )


def naive(x, weight, a, b, bias=None, *, p=0.0):
    dropped = x
    if p:
        T = x.numel() // x.shape[-1]
        mask = lora_dropout_mask(key(T), x.shape[-1], p).view(x.shape)
        dropped = x * mask * keep_scale(p)
    return F.linear(x, weight, bias) + SCALING * (dropped @ a.t()) @ b.t()


def tensors(T, K, N, R, dtype):
    shapes = [(T, K), (N, K), (R, K), (N, R), (N,)]
    # weights at the scale of real ones, so that float16 does not overflow and sums stay near 1
    scales = [1.0, K**-0.5, K**-0.5, R**-0.5, 1.0]
    return [
        randn(*s, dtype=dtype, seed=i, scale=scale)
        for i, (s, scale) in enumerate(zip(shapes, scales, strict=True))
    ]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize(
    "T,K,N,R",
    [(150, 96, 280, 16), (37, 100, 50, 8), (1, 64, 1, 1), (130, 33, 129, 20), (20, 64, 48, 80)],
)
def test_forward_and_every_gradient(T, K, N, R, p, variant, dtype):
    with forcing(variant):
        check_gradients(
            lambda *t: ours(*t, p=p),
            lambda *t: naive(*t, p=p),
            tensors(T, K, N, R, dtype),
            names=NAMES,
        )


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("K", [64, 40, 33])
def test_nf4_base(K, p, variant):
    nf4 = nf4_quantize(randn(24, K))
    dense = nf4_dequantize(nf4, dtype=torch.float32)
    x, _, a, b, bias = tensors(11, K, 24, 4, torch.float32)
    with forcing(variant):
        check_gradients(
            lambda x, a, b, bias: ours(x, nf4, a, b, bias, p=p),
            lambda x, a, b, bias: naive(x, dense.to(x.dtype), a, b, bias, p=p),
            [x, a, b, bias],
            names=["x", "a", "b", "bias"],
        )


@pytest.mark.parametrize("variant", VARIANTS)
def test_peft_layer(variant):
    from peft import LoraConfig
    from peft.tuners.lora import Linear

    torch.manual_seed(0)
    K, N, R = 40, 24, 4
    config = LoraConfig(r=R, lora_alpha=8, init_lora_weights=False)
    base = torch.nn.Linear(K, N).requires_grad_(False)
    layer = Linear(base, "default", config=config, r=R, lora_alpha=8).to(DEVICE)
    a, b = (m["default"].weight for m in (layer.lora_A, layer.lora_B))
    x = randn(2, 11, K).requires_grad_()
    with forcing(variant):
        y = lora_linear(x, base.weight, a, b, 8 / R, bias=base.bias, backend="triton")
        upstream = randn(*y.shape, seed=1)
        got = torch.autograd.grad(y, [x, a, b], upstream)
    theirs = layer(x)
    torch.testing.assert_close(y, theirs)
    for g, w in zip(got, torch.autograd.grad(theirs, [x, a, b], upstream), strict=True):
        torch.testing.assert_close(g, w)


@pytest.mark.parametrize("variant", VARIANTS)
def test_float32_masters_of_half_precision_layers(variant):
    """Cast once each for the products; their gradients come back in float32, unrounded."""
    x, weight, a, b, _ = tensors(40, 64, 50, 8, torch.float16)
    masters = [a.float().requires_grad_(), b.float().requires_grad_()]
    with forcing(variant):
        y = ours(x, weight, *masters)
        upstream = randn(*y.shape, seed=1, dtype=torch.float16)
        da, db = torch.autograd.grad(y, masters, upstream)
    assert y.dtype == torch.float16 and da.dtype == db.dtype == torch.float32

    low = [t.detach().double().requires_grad_() for t in (a, b)]
    exact = naive(x.double(), weight.double(), *low)
    for got, want in zip((da, db), torch.autograd.grad(exact, low, upstream.double()), strict=True):
        # t and d are rounded to float16 on the way: errors of eps / sqrt(3) in each term of a sum
        assert (got - want).norm() < 5e-4 * want.norm()


@pytest.mark.parametrize("variant", VARIANTS)
def test_gradients_only_where_asked_for(variant):
    x, weight, a, b, bias = tensors(9, 40, 24, 4, torch.float32)
    upstream = randn(9, 24, seed=5)
    for wanted in (1, 2, 4, 8, 16, 31, 13, 26):
        leaves = [
            t.clone().requires_grad_(bool(wanted >> i & 1))
            for i, t in enumerate((x, weight, a, b, bias))
        ]
        trained = [t for t in leaves if t.requires_grad]
        with forcing(variant):
            got = torch.autograd.grad(ours(*leaves, p=0.3), trained, upstream)
        want = torch.autograd.grad(naive(*leaves, p=0.3), trained, upstream)
        for g, w in zip(got, want, strict=True):
            torch.testing.assert_close(g, w, rtol=1e-4, atol=1e-5)


def test_without_adapter():
    x, weight, _, _, bias = tensors(9, 40, 24, 4, torch.float32)
    y = lora_linear(x, weight, None, None, 1.0, bias=bias, dropout_p=0.5, backend="triton")
    torch.testing.assert_close(y, F.linear(x, weight, bias))


@pytest.mark.parametrize("variant", VARIANTS)
def test_no_rows(variant):
    _, weight, a, b, bias = (t.requires_grad_() for t in tensors(1, 40, 24, 4, torch.float32))
    with forcing(variant):
        y = ours(torch.zeros(0, 40, device=DEVICE), weight, a, b, bias, p=0.3)
        assert y.shape == (0, 24)
        y.sum().backward()
    for t in (weight, a, b, bias):
        assert t.grad.shape == t.shape and t.grad.count_nonzero() == 0


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("variant", VARIANTS)
def test_strided_inputs_and_expanded_gradient(variant, dtype):
    """Rows of a wider buffer, transposed weights, batch dimensions, an upstream gradient of stride 0."""
    x, weight, a, b, bias = tensors(3 * 5, 64, 56, 16, dtype)
    wide = torch.cat([x, x, x], 1).view(3, 5, 192)[..., 64:128]
    inputs = [t.t().contiguous().t() for t in (weight, a, b)]
    with forcing(variant):
        check_gradients(ours, naive, [wide, *inputs, bias], names=NAMES)
        leaf = a.clone().requires_grad_()
        ours(wide, weight, leaf, b).sum().backward()
    other = a.clone().requires_grad_()
    naive(wide, weight, other, b).sum().backward()
    torch.testing.assert_close(leaf.grad, other.grad, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("variant", VARIANTS)
def test_autocast(variant):
    leaves = [t.requires_grad_() for t in tensors(20, 64, 48, 16, torch.float32)]
    with forcing(variant), torch.autocast(DEVICE, torch.float16):
        y = ours(*leaves)
    assert y.dtype == torch.float16
    upstream = randn(20, 48, seed=5)
    with forcing(variant):
        got = torch.autograd.grad(y, leaves, upstream.half())
    want_y = naive(*leaves)
    torch.testing.assert_close(y.float(), want_y, rtol=1e-2, atol=1e-2)
    for g, w in zip(got, torch.autograd.grad(want_y, leaves, upstream), strict=True):
        assert g.dtype == torch.float32
        assert (g - w).norm() < 2e-3 * w.norm()


def test_dropout_belongs_to_the_token():
    x, weight, a, b, _ = tensors(30, 64, 48, 16, torch.float32)
    order = torch.randperm(30)
    moved = key(30)._replace(rows=key(30).rows[order])
    whole = ours(x, weight, a, b, p=0.5)
    part = lora_linear(
        x[order], weight, a, b, SCALING, dropout_p=0.5, dropout_key=moved, backend="triton"
    )
    torch.testing.assert_close(part, whole[order], rtol=1e-5, atol=1e-5)
    off = lora_linear(x, weight, a, b, SCALING, dropout_p=0.5, training=False, backend="triton")
    torch.testing.assert_close(off, naive(x, weight, a, b))


@pytest.mark.parametrize("quantised", [False, True])
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_backward_keeps_the_input_and_the_tail_alone(quantised, p):
    """No decoded weight, no mask, no dropped input and no [T, N] tensor is saved."""
    x, weight, a, b, _ = tensors(11, 40, 24, 4, torch.float32)
    leaves = [t.requires_grad_() for t in (x, a, b)]
    base = nf4_quantize(weight) if quantised else weight
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda s: saved.append(s) or s, lambda s: s):
        ours(leaves[0], base, *leaves[1:], p=p)
    own = {t.data_ptr() for t in (*leaves, weight)}
    assert [tuple(s.shape) for s in saved if s.data_ptr() not in own] == [(11, 4)]


# The product with a low-rank product inside.


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("transposed", [True, False])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("number", [0, 1, 2])
@pytest.mark.parametrize("aligned", [True, False], ids=["descriptors", "pointers"])
def test_product_in_every_configuration(aligned, number, masked, transposed, dtype):
    """Odd sizes, several tiles each way, rows at a pitch; with the copy engine and without."""
    M, N, K, R = 140, 272, 200, 40
    pitch = 8 if aligned else 3
    left = randn(M, K + pitch, dtype=dtype)[:, :K]
    right = randn(*((N, K + pitch) if transposed else (K, N + pitch)), dtype=dtype, seed=1)
    right = right[:, : K if transposed else N]
    tail, bias = randn(M, R, dtype=dtype, seed=2), randn(N, dtype=dtype, seed=3)
    factor = randn(*((N, R) if transposed else (R, N)), dtype=dtype, seed=4)
    drop = key(M)
    dropout = StripDropout(0.3, drop.seed, drop.step, (drop.module,), drop.rows)
    mask = lora_dropout_mask(drop, N, 0.3) if masked else 1

    def plain(left, right, tail, factor):
        right, factor = (right.t(), factor.t()) if transposed else (right, factor)
        return left @ right + mask * (tail @ factor)

    kinds = [d + m + f for d in ("nt", "nn") for m in ("", "_masked") for f in ("", "_f32")]
    with forced(**{f"lora_gemm_{kind}": number for kind in kinds}):
        got = lora_gemm(
            left,
            right,
            transposed=transposed,
            tail=tail,
            factor=factor,
            bias=bias,
            dropout=dropout if masked else None,
        )
    args = (left, right, tail, factor)
    exact = plain(*(t.double() for t in args)) + bias.double()
    check(got, exact, plain(*args) + bias)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("T,K,R", [(70, 150, 100), (1, 3, 1), (64, 128, 16)])
def test_masked_addition_in_place(T, K, R, dtype):
    dx, d, a = randn(T, K, dtype=dtype), randn(T, R, dtype=dtype, seed=1), randn(R, K, dtype=dtype)
    drop = key(T)
    mask = lora_dropout_mask(drop, K, 0.3)
    dropout = StripDropout(0.3, drop.seed, drop.step, (drop.module,), drop.rows)
    exact = dx.double() + mask * (d.double() @ a.double())
    plain = dx + mask * (d @ a)
    assert add_masked(dx, d, a, dropout) is dx
    check(dx, exact, plain)


# What would be launched on a card.


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("p", [0.0, 0.1])
def test_launches(variant, p):
    """d = s·dY·B is made once; no host synchronisation; one product of ours per direction."""
    M, K, N = 8192, 4096, 14336

    def meta(*shape, dtype=torch.bfloat16):
        return torch.empty(*shape, dtype=dtype, device="meta")

    x, a, b = meta(M, K), meta(16, K, dtype=torch.float32), meta(N, 16, dtype=torch.float32)
    rows = DropoutKey(1, 2, 3, meta(M, dtype=torch.int64))
    with record_launches(90) as recording, forcing(variant):
        y = lora_linear(
            x.requires_grad_(),
            meta(N, K),
            a.requires_grad_(),
            b.requires_grad_(),
            2.0,
            dropout_p=p,
            dropout_key=rows,
        )
        y.backward(meta(M, N))
    names = [launch.kernel.__name__ for launch in recording.launches]
    gemm = ["_gemm"] if variant == "epilogue" else []
    added = ["_add_masked"] if p and not gemm else []
    assert names == ["_tails", *gemm, "_tails", *gemm, *added, "_dA", "_reduce", "_dB"]
    assert all(
        launch.options["DESCRIPTORS"]
        for launch in recording.launches
        if gemm == [launch.kernel.__name__]
    )
    assert x.grad.shape == x.shape and a.grad.dtype == b.grad.dtype == torch.float32
