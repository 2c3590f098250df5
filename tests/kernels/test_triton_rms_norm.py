"""RMS norm in Triton: forward, every gradient, the adapters' term; and the fused references' proof."""

import pytest
import torch
import triton
import triton.language as tl
from fastsft_kernels import fused, lora_dropout_mask, reference, rms_norm
from fastsft_kernels.fused import Adapters, StripDropout
from fastsft_kernels.launch import forced, launch, record_launches
from fastsft_kernels.triton_ops.rows import row_offset
from kernel_checks import (  # noqa: F401
    DEVICE,
    DTYPES,
    check,
    check_gradients,
    poisoned_memory,
    randn,
)
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm


def public(function, offset=0.0, residual=False, **options):
    """x, weight (, residual) -> the outputs, for check_gradients."""

    def run(x, weight, *more):
        given = {"residual": more[0]} if residual else {}
        return function(x, weight, 1e-5, offset=offset, **given, **options)

    return run


def both(inputs, factor=2.0, **how):
    ours = public(rms_norm, backend="triton", **how)
    names = ["x", "weight", "residual"]
    check_gradients(ours, public(reference.rms_norm, **how), inputs, factor=factor, names=names)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize(
    "shape", [(37, 576), (2, 3, 100), (1, 64), (70, 16), (5, 1), (48,), (11, 2100)]
)
def test_forward_and_gradients(shape, residual, dtype):
    inputs = [randn(*shape, dtype=dtype), randn(shape[-1], dtype=dtype, seed=1)]
    if residual:
        inputs.append(randn(*shape, dtype=dtype, seed=2))
    # The gradient of a row of one number is eps beside 1: rounding is all of it.
    both(inputs, factor=8.0 if shape[-1] == 1 else 2.0, residual=residual, offset=1.0)


def test_rows_too_wide_for_registers():
    inputs = [randn(2, 16400), randn(16400, seed=1), randn(2, 16400, seed=2)]
    both(inputs, residual=True, offset=0.5)


@pytest.mark.parametrize("x_dtype,weight_dtype", [(torch.float16, torch.float32), DTYPES[:2]])
def test_weight_of_another_dtype(x_dtype, weight_dtype):
    x = randn(9, 72, dtype=x_dtype).requires_grad_()
    weight = randn(72, dtype=weight_dtype, seed=1).requires_grad_()
    y = rms_norm(x, weight, backend="triton")
    dx, dweight = torch.autograd.grad(y, [x, weight], randn(9, 72, dtype=x_dtype, seed=2))
    assert (y.dtype, dx.dtype, dweight.dtype) == (x_dtype, x_dtype, weight_dtype)
    both([x.detach(), weight.detach()])


def views():
    """Inputs whose rows do not follow each other, or whose numbers do not."""
    qkv = randn(6, 3 * 4 * 32)
    return {
        "heads of a qkv buffer": qkv.view(6, 12, 32)[:, 4:8],
        "heads of a batch": qkv.view(2, 3, 12, 32)[:, :, :4],
        "every other row": qkv[::2],
        "a pitch": qkv[:, 8:40],
        "numbers apart": qkv[:, ::3],
        "turned": qkv.t(),
        "heads before tokens": qkv.view(6, 12, 32).transpose(0, 1),
        "no view of its rows": qkv.view(2, 3, 12, 32)[:, :2].transpose(0, 2),
        "one row many times": qkv[:1].expand(6, -1),
    }


@pytest.mark.parametrize("name", views())
def test_strided(name):
    x = views()[name]
    weight, residual = randn(x.shape[-1], seed=1), randn(*x.shape, seed=2)
    both([x, weight])
    both([x, weight, residual], residual=True)
    both([residual, weight, x], residual=True)
    leaf = residual.clone().requires_grad_()
    y = rms_norm(leaf, weight, backend="triton")
    (got,) = torch.autograd.grad(y, leaf, x)
    (want,) = torch.autograd.grad(rms_norm(leaf, weight, backend="reference"), leaf, x)
    torch.testing.assert_close(got, want)


def test_upstream_gradients_may_be_missing_or_expanded():
    x, residual, weight = (randn(7, 40, seed=i).requires_grad_() for i in (0, 1, 2))
    weight = weight[0].detach().requires_grad_()
    wanted = [x, residual, weight]
    for use in (lambda y, t: y.sum(), lambda y, t: (t * t).sum(), lambda y, t: y.sum() + t.sum()):
        grads = []
        for backend in ("triton", "reference"):
            out = rms_norm(x, weight, residual=residual, backend=backend)
            grads.append(torch.autograd.grad(use(*out), wanted, allow_unused=True))
        for got, want in zip(*grads, strict=True):
            assert (got is None) == (want is None)
            if got is not None:
                torch.testing.assert_close(got, want)


def test_gradients_add_up_where_x_is_used_twice():
    """x and the residual get one tensor for a gradient: what is added to one must not reach the other."""
    x, residual, weight = randn(5, 24), randn(5, 24, seed=1), randn(24, seed=2)
    grads = []
    for backend in ("triton", "reference"):
        a, b = x.clone().requires_grad_(), residual.clone().requires_grad_()
        y, total = rms_norm(a * 1, weight, residual=b * 1, backend=backend)
        (y.square().sum() + (3 * a).sum() + (total * b).sum()).backward()
        grads.append((a.grad, b.grad))
    for got, want in zip(*grads, strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("shape", [(8,), (3, 8), (2, 3, 2, 8)])
def test_the_result_may_be_changed_in_place(shape):
    x, weight = randn(*shape).requires_grad_(), randn(8, seed=1).requires_grad_()
    found = []
    for backend in ("triton", "reference"):
        y = rms_norm(x, weight, backend=backend).mul_(3)
        found.append((y, *torch.autograd.grad(y.square().sum(), [x, weight])))
    for got, want in zip(*found, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", [(0, 96), (0, 4, 32), (3, 0, 32), (1, 96)])
def test_no_rows_and_one(shape):
    x, weight = randn(*shape).requires_grad_(), randn(shape[-1], seed=1).requires_grad_()
    y, total = rms_norm(x, weight, residual=x, backend="triton")
    y.sum().backward()
    assert y.shape == total.shape == x.grad.shape == shape
    assert torch.isfinite(weight.grad).all() and (x.numel() or not weight.grad.any())


@pytest.mark.parametrize("candidate", [0, 1, 2])
@pytest.mark.parametrize("width", [64, 1024, 2048])
def test_every_configuration(width, candidate):
    names = ["forward", "backward", "backward_weight"]
    suffixes = [f"_{width}", f"_{width}_f32"]
    with forced(**{f"rms_norm_{n}{s}": candidate for n in names for s in suffixes}):
        x = randn(21, width - 7)
        both([x, randn(width - 7, seed=1), randn(21, width - 7, seed=2)], residual=True)


@pytest.mark.parametrize("module,offset", [(LlamaRMSNorm, 0.0), (GemmaRMSNorm, 1.0)])
def test_transformers(module, offset):
    norm = module(72, eps=1e-3).to(DEVICE)
    torch.nn.init.normal_(norm.weight)
    x = randn(3, 5, 72).requires_grad_()
    upstream = randn(3, 5, 72, seed=1)
    ours, theirs = rms_norm(x, norm.weight, 1e-3, offset=offset, backend="triton"), norm(x)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    for got, want in zip(
        torch.autograd.grad(ours, [x, norm.weight], upstream),
        torch.autograd.grad(theirs, [x, norm.weight], upstream),
        strict=True,
    ):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def test_float64_is_the_references():
    x = randn(3, 8).double()
    assert torch.equal(rms_norm(x, x[0]), reference.rms_norm(x, x[0]))
    with pytest.raises(ValueError, match="float64"):
        rms_norm(x, x[0], backend="triton")


@triton.jit
def _offsets(out, rows, token_stride, head_stride, HEADS: tl.constexpr):
    i = tl.arange(0, 4)
    tl.store(out + i, row_offset(tl.load(rows + i), token_stride, head_stride, HEADS))


@pytest.mark.parametrize("heads", [1, 3])
def test_addresses_beyond_32_bits(heads):
    rows = torch.tensor([0, 1, 5, 1_000_000], dtype=torch.int32, device=DEVICE)
    out = torch.empty(4, dtype=torch.int64, device=DEVICE)
    launch(_offsets, (1,), out, rows, 90_000_000, 30_000_000, HEADS=heads)
    wide = rows.long()
    assert torch.equal(out, wide // heads * 90_000_000 + wide % heads * 30_000_000)


# ---- the fused producers -----------------------------------------------------------------------


def pitched(*shape, dtype, pitch=16, left=8):
    """A view in the middle of a buffer of sevens -> (buffer, view)."""
    buffer = torch.full((*shape[:-1], shape[-1] + pitch), 7.0, dtype=dtype, device=DEVICE)
    return buffer, buffer[..., left : left + shape[-1]]


def untouched(buffer, columns, left=8):
    return bool((buffer[..., :left] == 7).all() and (buffer[..., left + columns :] == 7).all())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("shape", [(13, 100), (5, 4, 32), (2, 17000), (0, 64)])
def test_fused_forward(shape, residual, dtype):
    x, weight = randn(*shape, dtype=dtype), randn(shape[-1], seed=1)
    more = randn(*shape, dtype=dtype, seed=2) if residual else None
    buffer, out = pitched(*shape, dtype=dtype)

    def run(function, cast, **options):
        given = None if more is None else cast(more)
        return function(cast(x), cast(weight), 1e-5, offset=1.0, residual=given, **options)

    got = run(fused.rms_norm_forward, lambda t: t, out=out, backend="triton")
    exact = run(reference.rms_norm_forward, torch.Tensor.double)
    plain = run(reference.rms_norm_forward, lambda t: t)
    assert got[0] is out and untouched(buffer, shape[-1])
    assert residual or got[2] is x
    for name, *triple in zip(("y", "rstd", "total"), got, exact, plain, strict=True):
        check(*triple, name=name)


def test_fused_forward_and_backward_in_place():
    x, weight, dy = randn(9, 48), randn(48, seed=1), randn(9, 48, seed=2)
    want, rstd, _ = fused.rms_norm_forward(x, weight, backend="reference")
    want_dx, _ = fused.rms_norm_backward(dy, x, weight, rstd, backend="reference")
    got, _ = fused.rms_norm_backward(dy, x, weight, rstd, out=dy, backend="triton")
    assert got is dy
    torch.testing.assert_close(dy, want_dx)
    fused.rms_norm_forward(x, weight, out=x, backend="triton")
    torch.testing.assert_close(x, want)


class Backward:
    """The arguments of one rms_norm_backward, and its judgement by float64."""

    def __init__(self, rows, columns, dtype, strips=0, width=16, p=0.0, heads=()):
        shape = (rows, *heads, columns)
        self.dy, self.x, self.more = (randn(*shape, dtype=dtype, seed=i) for i in range(3))
        self.weight, self.rstd = randn(columns, seed=4), 0.5 + randn(*shape[:-1], seed=5).abs()
        self.adapters = None
        if strips:
            # d lies behind dX in the product's buffer, at its pitch
            d = pitched(rows, strips * width, dtype=dtype)[1]
            d.copy_(randn(rows, strips * width, dtype=dtype, seed=6))
            a = randn(strips * width, columns, dtype=dtype, seed=7, scale=0.2)
            keys = torch.arange(rows, device=DEVICE) * 2**31 + 5
            modules = tuple(3 + 4 * i for i in range(strips))
            dropout = StripDropout(p, 2**31 + 1, 9, modules, keys) if p else None
            self.adapters = Adapters(d, a, dropout, 1.75)

    def run(self, function, cast=lambda t: t, residual=True, **options):
        adapters = self.adapters
        if adapters is not None:
            adapters = adapters._replace(d=cast(adapters.d), a=cast(adapters.a))
        return function(
            *(cast(t) for t in (self.dy, self.x, self.weight, self.rstd)),
            offset=0.5,
            residual_grad=cast(self.more) if residual else None,
            adapters=adapters,
            **options,
        )

    def judge(self, *, weight_grad=False, **how):
        buffer, out = pitched(*self.x.shape, dtype=self.x.dtype)
        options = {"weight_grad": weight_grad, "out": out, "backend": "triton"}
        dx, dweight = self.run(fused.rms_norm_backward, **options, **how)
        how["weight_grad"] = weight_grad
        exact = self.run(reference.rms_norm_backward, torch.Tensor.double, **how)
        plain = self.run(reference.rms_norm_backward, **how)
        assert dx is out and untouched(buffer, self.x.shape[-1])
        check(dx, exact[0], plain[0], name="dx")
        assert (dweight is None) != weight_grad
        if weight_grad:
            check(dweight, exact[1], plain[1], name="dweight")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("weight_grad", [False, True])
@pytest.mark.parametrize("rows,columns,heads", [(37, 576, ()), (5, 64, (3,)), (2, 8200, (2,))])
def test_fused_backward(rows, columns, heads, weight_grad, dtype):
    case = Backward(rows, columns, dtype, heads=heads)
    case.judge(weight_grad=weight_grad, residual=weight_grad)


ADAPTERS = [
    (70, 200, 3, 16, 0.0),
    (70, 72, 3, 16, 0.3),
    (1, 576, 1, 48, 0.0),
    (65, 36, 2, 80, 0.1),
    (20, 40, 3, 256, 0.0),
    (20, 40, 3, 256, 0.5),
    (6, 1, 1, 16, 0.5),
    (0, 64, 2, 16, 0.1),
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows,columns,strips,width,p", ADAPTERS)
def test_adapters(rows, columns, strips, width, p, dtype):
    Backward(rows, columns, dtype, strips, width, p).judge()


@pytest.mark.parametrize("p", [0.0, 0.2])
def test_adapters_and_weight_gradient(p):
    Backward(200, 392, torch.float16, 2, 16, p).judge(weight_grad=True, residual=False)


def test_every_run_gives_the_same_bits():
    case = Backward(45, 576, torch.float16)
    first, second = (
        case.run(fused.rms_norm_backward, weight_grad=True, backend="triton") for _ in "ab"
    )
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("candidate", [0, 1])
@pytest.mark.parametrize("p", [0.0, 0.2])
def test_every_configuration_with_adapters(p, candidate):
    names = [
        f"rms_norm_{launch}{kind}" for launch in ("sums", "apply") for kind in ("", "_dropout")
    ]
    with forced(**dict.fromkeys(names, candidate)):
        Backward(66, 72, torch.float16, 3, 32, p).judge()


def test_no_adapter_is_adapters_of_zero():
    case = Backward(10, 96, torch.float32, 3, 16, 0.3)
    case.adapters.d.zero_()
    case.adapters.a.fill_(torch.finfo(torch.float32).max)
    dx, _ = case.run(fused.rms_norm_backward, backend="triton")
    case.adapters = None
    want, _ = case.run(fused.rms_norm_backward, backend="triton")
    torch.testing.assert_close(dx, want)


@pytest.mark.parametrize("p", [0.0, 0.3])
def test_reference_is_autograd_over_the_plain_formula(p):
    """<dy, y> + scaling Σ <d_i, (mask_i ∘ y) a_iᵀ> + <residual_grad, total>, differentiated."""
    rows, columns, width = 7, 24, 16
    case = Backward(rows, columns, torch.float64, 3, width, p)
    d, a, drop, scaling = case.adapters
    x = case.x.clone().requires_grad_()
    weight = case.weight.double().requires_grad_()
    y, rstd, total = reference.rms_norm_forward(x, weight, 1e-3, offset=0.5)
    value = (case.dy * y).sum() + (case.more * total).sum()
    for i in range(3):
        part = slice(i * width, (i + 1) * width)
        mask = 1 if drop is None else lora_dropout_mask(drop.key(i), columns, p)
        value = value + scaling * (d[:, part] * ((mask * y) @ a[part].t())).sum()
    want = torch.autograd.grad(value, [x, weight])
    case.weight, case.rstd = weight.detach(), rstd.detach()
    got = case.run(reference.rms_norm_backward, weight_grad=True)
    for mine, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-12)


def test_launches():
    """What is launched, from shapes alone, and with few enough sums for a weight gradient."""

    def names(rows, columns, strips=0, weight_grad=False):
        x, weight = (torch.empty(*s, device="meta") for s in ((rows, columns), (columns,)))
        adapters = None
        if strips:
            d, a = (torch.empty(*s, device="meta") for s in ((rows, strips), (strips, columns)))
            adapters = Adapters(d, a)
        with record_launches() as recording:
            y, rstd, _ = fused.rms_norm_forward(x, weight)
            fused.rms_norm_backward(y, x, weight, rstd, adapters=adapters, weight_grad=weight_grad)
        return [x.kernel.fn.__name__ for x in recording.launches], recording.launches

    assert names(100, 4096)[0] == ["_forward", "_backward_rows"]
    assert names(100, 4096, weight_grad=True)[0] == ["_forward", "_backward_rows", "_reduce"]
    assert names(100, 4096, 48)[0] == ["_forward", "_row_sums", "_apply"]
    assert names(100, 4096, 48, True)[0] == ["_forward", "_row_sums", "_apply", "_reduce"]
    assert names(100, 65536)[0] == ["_forward_wide", "_row_sums", "_apply"]
    assert names(0, 4096)[0] == []
    million = names(1_000_000, 4096, 48, True)[1]
    assert million[-1].args[0].numel() < 32 * 4096 and max(x.grid[0] for x in million) < 2**31


def test_errors():
    x, weight, rstd = randn(6, 32), randn(32), randn(6)
    d, a = randn(6, 32), randn(32, 32)

    def forward(match, *args, **kwargs):
        with pytest.raises(ValueError, match=match):
            fused.rms_norm_forward(*args, **kwargs, backend="triton")

    def backward(match, **change):
        given = {"dy": x, "x": x, "weight": weight, "rstd": rstd} | change
        with pytest.raises(ValueError, match=match):
            fused.rms_norm_backward(**given, backend="triton")

    forward(r"\[T, H\] or", x[0], weight)
    forward("weight must be", x, weight[:5])
    forward("residual must be", x, weight, residual=x[:3])
    forward("residual must have the dtype", x, weight, residual=x.half())
    forward("out must be", x, weight, out=x[:3])
    forward("side by side", x, weight, out=randn(32, 6).t())
    backward("dy must have the dtype", dy=x.half())
    backward("rstd must be", rstd=rstd[:2])
    backward("rstd must be", rstd=rstd.half())
    backward("residual_grad must be", residual_grad=x[:2])
    backward("adapters.d must be", adapters=Adapters(d[:, :8], a[:8]))
    backward("adapters.d must be", adapters=Adapters(d[:3], a))
    backward("adapters.a must be", adapters=Adapters(d, a[:, :8]))
    backward("adapters.a must have", adapters=Adapters(d, a.half()))
    backward("adapters.d must have the dtype", adapters=Adapters(d.half(), a.half()))
    keys = torch.arange(6, device=DEVICE)
    backward("do not split", adapters=Adapters(d, a, StripDropout(0.1, 0, 0, (1, 2, 3), keys)))
    backward(
        "multiples of 16", adapters=Adapters(d, a, StripDropout(0.1, 0, 0, (1, 2, 3, 4), keys))
    )
    backward("must be in", adapters=Adapters(d, a, StripDropout(1.0, 0, 0, (1,), keys)))
    backward("row key per token", adapters=Adapters(d, a, StripDropout(0.1, 0, 0, (1,), keys[:2])))
    cube = randn(6, 2, 32)
    backward("need x to be", dy=cube, x=cube, rstd=randn(6, 2), adapters=Adapters(d, a))
    with pytest.raises(ValueError, match="dimension to norm over"):
        rms_norm(torch.ones((), device=DEVICE), weight)
