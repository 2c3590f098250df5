"""The gated activations' kernels: elementwise, and the backward with the adapters around it."""

import math

import pytest
import torch
from fastsft_kernels import fused, geglu, lora_dropout_mask, reference, swiglu
from fastsft_kernels import launch as gate_of
from fastsft_kernels.dropout import keep_scale
from fastsft_kernels.fused import Adapters, StripDropout
from fastsft_kernels.triton_ops import glu_adapters
from kernel_checks import (  # noqa: F401
    DEVICE,
    DTYPES,
    check,
    check_gradients,
    poisoned_memory,
    randn,
)
from transformers.models.gemma.configuration_gemma import GemmaConfig
from transformers.models.gemma.modeling_gemma import GemmaMLP
from transformers.models.llama.configuration_llama import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaMLP

ACTIVATIONS = ("silu", "gelu_tanh", "gelu")
PUBLIC = {
    "silu": (swiglu, reference.swiglu, {}),
    "gelu_tanh": (geglu, reference.geglu, {"approximate": "tanh"}),
    "gelu": (geglu, reference.geglu, {"approximate": "none"}),
}
NAMES = ("dgate", "dup", "h", "da_down", "db_gate", "db_up")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("shape", [(5, 1100), (2, 3, 100), (67, 1), (33,)])
def test_forward_and_gradients(shape, activation, dtype):
    ours, plain, kwargs = PUBLIC[activation]
    gate, up = randn(*shape, scale=2.0, dtype=dtype), randn(*shape, seed=1, dtype=dtype)
    check_gradients(
        lambda g, u: ours(g, u, backend="triton", **kwargs),
        lambda g, u: plain(g, u, **kwargs),
        [gate, up],
        names=["gate", "up"],
    )


@pytest.mark.filterwarnings("ignore:overflow")  # of exp, which is meant to reach infinity
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_finite_gate_gives_finite_numbers(activation):
    """The kernels overflow nowhere torch does not: at 3e38, at the tanh's steep end, at zero."""
    gate = [0.0, -0.0, 1e-30, -1e-6, 1.0, -4.0, 5.5, -9.0, 13.3, -16.1, 88.0, -89.0, -120.0, 1e4]
    gate = torch.tensor([[*gate, -1e4, 1e12, -1e12, 2e38, -2e38]], device=DEVICE)
    up, dh = torch.full_like(gate, 0.5), torch.full_like(gate, 1.5)
    got = fused.glu_backward(dh, gate, up, activation, h_out=up.clone(), backend="triton")
    want = reference.glu_backward(
        dh.double(), gate.double(), up.double(), activation, h_out=up.double()
    )
    for name, a, b in zip(NAMES, got[:3], want[:3], strict=False):
        assert torch.isfinite(a).all(), name
        error = (a.double() - b).abs() / (b.abs() + gate.double().abs().clamp(max=1))
        assert error.nan_to_num(0).max() < 4e-7, (name, error)


@pytest.mark.parametrize("module,op", [(LlamaMLP, swiglu), (GemmaMLP, geglu)])
def test_against_transformers(module, op):
    torch.manual_seed(0)
    config = LlamaConfig if module is LlamaMLP else GemmaConfig
    heads = {"num_attention_heads": 2} if module is LlamaMLP else {}
    mlp = module(config(hidden_size=8, intermediate_size=24, **heads)).to(DEVICE)
    x = randn(5, 8)
    h = op(mlp.gate_proj(x), mlp.up_proj(x), backend="triton")
    weights = [mlp.gate_proj.weight, mlp.up_proj.weight]
    ours = torch.autograd.grad(mlp.down_proj(h).square().sum(), weights)
    theirs = torch.autograd.grad(mlp(x).square().sum(), weights)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("candidate", range(3))
def test_halves_of_one_buffer(candidate):
    """gate and up halves of [T, 2F], outputs at a pitch: what lies between stays as it was."""
    both, dh = randn(6, 2 * 48), randn(6, 48, seed=3)
    gate, up, pitched = both[:, :48], both[:, 48:], torch.full((6, 160), 7.0, device=DEVICE)
    parts = [pitched[:, start : start + 48] for start in (3, 52, 102)]
    want = reference.glu_backward(dh, gate, up, h_out=torch.empty(6, 48, device=DEVICE))
    with gate_of.forced(glu_forward=candidate, glu_backward=candidate):
        got = fused.glu_backward(
            dh, gate, up, out=(parts[0], parts[1]), h_out=parts[2], backend="triton"
        )
        for mine, part, theirs in zip(got[:3], parts, want[:3], strict=True):
            assert mine is part
            torch.testing.assert_close(mine, theirs)
        assert got[3:] == (None, None, None)
        assert fused.glu_forward(gate, up, "gelu", out=parts[1], backend="triton") is parts[1]
        torch.testing.assert_close(parts[1], reference.geglu(gate, up, "none"))
    between = [pitched[:, i] for i in (0, 1, 2, 51, 100, 101, *range(150, 160))]
    assert all((column == 7).all() for column in between)


def case(tokens, features, rank, tail_rank, dtype, p=0.0, activation="silu"):
    """Arguments of glu_backward: pitched strips, a scaling, and random everything."""
    x = randn(tokens, 3 * features + 5, dtype=dtype)
    gate, up, dh = (x[:, i * features : (i + 1) * features] for i in range(3))
    wide = randn(tokens, rank + 2 * tail_rank + 8, seed=5, dtype=dtype)
    d, tails = wide[:, :rank], wide[:, rank : rank + 2 * tail_rank].split(max(tail_rank, 1), 1)
    rows = torch.arange(tokens, device=DEVICE) * 2**33 + 11
    dropout = StripDropout(p, 5, 2**31, (2**32 - 1,), rows) if p else None
    a = randn(rank, features + 3, seed=6, dtype=dtype, scale=rank**-0.5 if rank else 1.0)[:, :-3]
    adapters = Adapters(d, a, dropout, 0.5 * keep_scale(p)) if rank else None
    return (dh, gate, up, activation), {
        "adapters": adapters,
        "tails": (tails[0], tails[1]) if tail_rank else None,
    }


def double(args, kwargs):
    """The same in float64."""

    def wide(x):
        if isinstance(x, torch.Tensor):
            return x.double() if x.is_floating_point() else x
        if isinstance(x, tuple) and not isinstance(x, StripDropout):
            parts = [wide(y) for y in x]
            return type(x)(*parts) if hasattr(x, "_fields") else tuple(parts)
        return x

    return wide(args), {k: wide(v) for k, v in kwargs.items()}


def check_backward(args, kwargs, **more):
    got = fused.glu_backward(*args, **kwargs, **more, backend="triton")
    wide_args, wide_kwargs = double(args, kwargs)
    h = {"h_out": torch.empty_like(args[1])} if "h_out" in more else {}
    wide_h = {"h_out": torch.empty_like(wide_args[1])} if h else {}
    exact = reference.glu_backward(*wide_args, **wide_kwargs, **wide_h)
    plain = reference.glu_backward(*args, **kwargs, **h)
    for name, a, b, c in zip(NAMES, got, exact, plain, strict=True):
        assert (a is None) == (b is None) == (c is None), name
        if a is not None:
            check(a, b, c, name=name)
    return got


# (tokens, features, down rank, tail rank, dropout): one token; ragged rows and columns; strips that
# are no power of two; more rank than one launch sums up, on one side or both; each part absent
FUSED = [
    (1, 40, 16, 16, 0.0),
    (37, 136, 16, 16, 0.0),
    (70, 64, 16, 48, 0.3),
    (33, 40, 48, 0, 0.5),
    (20, 130, 0, 16, 0.0),
    (21, 33, 96, 16, 0.0),
    (18, 72, 16, 144, 0.2),
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens,features,rank,tail_rank,p", FUSED)
def test_backward_with_adapters(tokens, features, rank, tail_rank, p, dtype):
    args, kwargs = case(tokens, features, rank, tail_rank, dtype, p)
    check_backward(args, kwargs)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_h_is_written_without_its_mask(activation):
    args, kwargs = case(19, 40, 16, 16, torch.float16, 0.5, activation)
    got = check_backward(args, kwargs, h_out=torch.empty_like(args[1]))
    plain = fused.glu_forward(*args[1:], backend="triton")
    assert torch.equal(got.h, plain)


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("rank,p", [(16, 0.1), (64, 0.0), (64, 0.1), (128, 0.0)])
def test_every_configuration(rank, p, capability, monkeypatch):
    """Each candidate of each kind of card."""
    monkeypatch.setattr(gate_of, "_INTERPRETED", (capability, 2))
    args, kwargs = case(70, 80, rank, rank, torch.float16, p)
    kind = rank if rank <= (64 if capability == 90 else 32) else "wide"
    for candidate in range(3 if rank == 16 else 1):  # modulo those there are
        with gate_of.forced(**{f"glu_backward_{kind}{'_masked' if p else ''}": candidate}):
            check_backward(args, kwargs)


@pytest.mark.parametrize("slices", [1, 3])
@pytest.mark.parametrize("present", [(True, True, True), (True, False, True), (False, True, False)])
def test_gradients_are_added_in_place(slices, present, monkeypatch):
    """With and without partial sums; what is absent is None in and out."""
    monkeypatch.setattr(glu_adapters, "_slices", lambda *_: slices)
    args, kwargs = case(75, 48, 16, 32, torch.float32, 0.2)
    tails = tuple(
        t if there else None for t, there in zip(kwargs["tails"], present[1:], strict=True)
    )
    kwargs = {"adapters": kwargs["adapters"] if present[0] else None, "tails": tails}
    shapes = [(16, 48), (48, 32), (48, 32)]
    old = [randn(*s, seed=9) if there else None for s, there in zip(shapes, present, strict=True)]
    into = tuple(None if x is None else x.clone() for x in old)
    got = fused.glu_backward(*args, **kwargs, grads_out=into, backend="triton")
    alone = check_backward(args, kwargs)
    for before, after, fresh, given in zip(old, got[3:], alone[3:], into, strict=True):
        assert after is given
        if after is not None:
            torch.testing.assert_close(after, before + fresh, rtol=0, atol=4e-6)
    again = fused.glu_backward(*args, **kwargs, backend="triton")
    assert all(torch.equal(a, b) for a, b in zip(alone, again, strict=True) if a is not None)


def test_outputs_where_the_inputs_were():
    args, kwargs = case(40, 136, 80, 16, torch.float32, 0.1)
    want = reference.glu_backward(*args, **kwargs)
    dh, gate, up, activation = args
    got = fused.glu_backward(
        dh, gate, up, activation, **kwargs, out=(gate, up), h_out=dh, backend="triton"
    )
    assert got.dgate is gate and got.dup is up and got.h is dh
    for a, b in zip((got.dgate, got.dup, *got[3:]), (want.dgate, want.dup, *want[3:]), strict=True):
        torch.testing.assert_close(a, b, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_reference_is_autograd_of_the_composed_formula(activation):
    """h's gradient through the down projection and its adapter; the adapters of gate and up."""
    dtype, scaling = torch.float64, 0.7
    x, weight = randn(9, 6, dtype=dtype), randn(4, 20, seed=1, dtype=dtype)
    w = [randn(20, 6, seed=i, dtype=dtype) for i in (2, 3)]
    tails = [randn(9, 16, seed=i, dtype=dtype) for i in (4, 5)]
    b = [randn(20, 16, seed=i, dtype=dtype).requires_grad_() for i in (6, 7)]
    a = randn(16, 20, seed=8, dtype=dtype).requires_grad_()
    b_down, upstream = randn(4, 16, seed=10, dtype=dtype), randn(9, 4, seed=11, dtype=dtype)
    dropout = StripDropout(0.25, 1, 2, (3,), torch.arange(9, device=DEVICE) + 2**40)
    mask = lora_dropout_mask(dropout.key(0), 20, 0.25)
    gate, up = (x @ wi.t() + ti @ bi.t() for wi, ti, bi in zip(w, tails, b, strict=True))
    h = reference.glu_forward(gate, up, activation)
    y = h @ weight.t() + scaling * ((mask * h) @ a.t()) @ b_down.t()
    want = torch.autograd.grad(y, [gate, up, a, *b], upstream)
    got = fused.glu_backward(
        upstream @ weight,
        gate.detach(),
        up.detach(),
        activation,
        adapters=Adapters(upstream @ b_down, a.detach(), dropout, scaling),
        tails=(tails[0], tails[1]),
        h_out=torch.empty(9, 20, dtype=dtype, device=DEVICE),
    )
    torch.testing.assert_close(got.h, h, rtol=1e-14, atol=1e-14)
    for name, mine, theirs in zip(
        ("dgate", "dup", "da", "db", "db"), got[:2] + got[3:], want, strict=True
    ):
        torch.testing.assert_close(mine.to(dtype), theirs, rtol=1e-11, atol=1e-11, msg=name)


def test_nothing_there():
    """No tokens: the sums are zero, added to what is given. No features: nothing at all."""
    args, kwargs = case(0, 40, 16, 16, torch.float16)
    got = fused.glu_backward(*args, **kwargs, backend="triton")
    assert got.dgate.shape == (0, 40) and all(not s.any() for s in got[3:])
    into = tuple(torch.ones_like(s) for s in got[3:])
    added = fused.glu_backward(*args, **kwargs, grads_out=into, backend="triton")
    assert all((s == 1).all() for s in added[3:])
    empty = randn(3, 0)
    assert swiglu(empty, empty, backend="triton").shape == (3, 0)
    assert swiglu(empty.t(), empty.t(), backend="triton").shape == (0, 3)


@pytest.mark.parametrize(
    "blocks,steps,slots,cost",
    [(112, 256, 132, 0.005), (12, 256, 132, 0.005), (1, 3, 132, 1), (0, 9, 8, 0)],
)
def test_slices_fill_the_card_and_stay_few(blocks, steps, slots, cost):
    slices = glu_adapters._slices(blocks, steps, slots, cost)
    assert 1 <= slices <= max(1, steps // 4)
    if blocks and steps > 100:
        filled = blocks * slices / slots
        assert filled / math.ceil(filled) > 0.95 and slices * cost < 0.1


@pytest.mark.skipif(DEVICE == "cuda", reason="4 GiB of address space, of which 130 pages are used")
def test_offsets_beyond_31_bits():
    torch.utils.deterministic.fill_uninitialized_memory = False
    buffer = torch.empty(2**31 + 2**26, dtype=torch.float16)
    far = buffer.as_strided((131, 24), (2**24, 1))
    (dh, gate, up, _), kwargs = case(131, 24, 16, 16, torch.float16)
    far.copy_(up)
    want = reference.glu_backward(dh, gate, up, **kwargs)
    for more in ({}, kwargs):
        got = fused.glu_backward(dh, gate, far, **more, backend="triton")
        torch.testing.assert_close(got.dgate, fused.glu_backward(dh, gate, up, **more).dgate)
    torch.testing.assert_close(got.db_up, want.db_up, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(fused.glu_forward(gate, far, backend="triton"), swiglu(gate, up))


def test_two_launches_and_partials_are_small():
    """The record's shape on an H200: one backward and one sum, whose partials are under 5 %."""
    with gate_of.record_launches(90, 132) as recording:
        x = torch.empty(8192, 14336, dtype=torch.bfloat16, device="meta")
        d, a = (
            torch.empty(*s, dtype=torch.bfloat16, device="meta") for s in ((8192, 16), (16, 14336))
        )
        fused.glu_backward(x, x, x, adapters=Adapters(d, a), tails=(d, d))
    backward, reduction = recording.launches
    partials = reduction.args[0]
    assert 8 * partials.numel() < 0.05 * 5 * x.numel() * 2
    assert backward.grid == (224, partials.shape[0])


BAD = [
    ({"activation": "relu"}, "unknown activation; got 'relu'"),
    ({"dh": randn(5, 8)}, "dh must be of gate's shape"),
    ({"up": randn(6, 8).double()}, "up must have the dtype"),
    ({"gate": randn(6, 2, 4), "up": randn(6, 2, 4)}, r"gate must be \[T, F\]"),
    ({"adapters": Adapters(randn(6, 8), randn(8, 8))}, "multiples of 16"),
    ({"adapters": Adapters(randn(6, 272), randn(272, 8))}, "up to 256; got 272"),
    ({"adapters": Adapters(randn(6, 16).half(), randn(16, 8).half())}, "adapters.d must have"),
    ({"tails": (randn(5, 16), None)}, r"tail_gate must be \[T, R\], T = 6"),
    ({"tails": (None, randn(6, 24))}, "tail_up's strip must be a multiple of 16"),
    ({"tails": (randn(6, 16), randn(6, 32))}, "tail_up must be of tail_gate's shape"),
    ({"out": (randn(6, 8), randn(8, 6).t())}, r"out\[1\]'s rows must be contiguous"),
    ({"h_out": randn(6, 9)}, "h_out must be of gate's shape"),
    ({"grads_out": (None, randn(8, 16), None)}, "db_gate must be given exactly if"),
    ({"tails": (randn(6, 16), None), "grads_out": (None, randn(16, 8).t(), None)}, "contiguous"),
]


@pytest.mark.parametrize("change,message", BAD, ids=[m[:24] for _, m in BAD])
def test_bad_arguments(change, message):
    kwargs = {"dh": randn(6, 8), "gate": randn(6, 8), "up": randn(6, 8), **change}
    with pytest.raises(ValueError, match=message) as caught:
        fused.glu_backward(**kwargs)
    assert str(caught.value).startswith("glu_backward: ") and "; got " in str(caught.value)
