"""varlen_attention against transformers' eager attention under a block-diagonal mask."""

import itertools
from types import SimpleNamespace

import pytest
import torch
from fastsft_kernels import fused, varlen_attention
from torch.autograd import gradcheck
from torch.overrides import TorchFunctionMode
from transformers.masking_utils import causal_mask_function, sliding_window_causal_mask_function
from transformers.models.gemma2.modeling_gemma2 import eager_attention_forward

LENGTHS = [1, 7, 1, 1, 15, 0, 4, 40, 2]


def cu_seqlens(lengths):
    return torch.tensor([0, *lengths]).cumsum(0).int()


def heads(tokens, count, size=8, dtype=torch.float64):
    return torch.randn(tokens, count, size, dtype=dtype).requires_grad_()


def oracle(q, k, v, lengths, *, causal=True, window=None, softcap=None, scale=None):
    """Dense attention of the whole pack, every pair of tokens judged by transformers' own rules."""
    document = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    i = torch.arange(len(document))
    allowed = document[:, None] == document[None, :]
    if causal:
        rule = (
            causal_mask_function if window is None else sliding_window_causal_mask_function(window)
        )
        zero = torch.zeros((), dtype=torch.long)
        pairs = torch.func.vmap(torch.func.vmap(rule, (None, None, None, 0)), (None, None, 0, None))
        allowed = allowed & pairs(zero, zero, i, i)
    mask = torch.zeros(allowed.shape, dtype=q.dtype).masked_fill(~allowed, -torch.inf)
    module = SimpleNamespace(
        head_dim=q.shape[-1], num_key_value_groups=q.shape[1] // k.shape[1], training=False
    )
    batched = [x.transpose(0, 1)[None] for x in (q, k, v)]
    return eager_attention_forward(module, *batched, mask, scaling=scale, softcap=softcap)[0][0]


CASES = [
    {},
    {"causal": False},
    {"scale": 0.3},
    {"window": 1},
    {"window": 5},
    {"window": 100},
    {"softcap": 0.7},
    {"softcap": 0.7, "causal": False},
    {"softcap": 0.7, "window": 4, "scale": 1.5},
]


@pytest.mark.parametrize("options", CASES, ids=str)
@pytest.mark.parametrize("kv_heads", [4, 2, 1])
def test_attention_is_transformers(options, kv_heads):
    torch.manual_seed(0)
    tokens = sum(LENGTHS)
    q, k, v = heads(tokens, 4), heads(tokens, kv_heads), heads(tokens, kv_heads)
    ours = varlen_attention(q, k, v, cu_seqlens(LENGTHS), max(LENGTHS), **options)
    theirs = oracle(q, k, v, LENGTHS, **options)
    # their softmax is float32 whatever the inputs, so float64 cannot agree further than that
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    upstream = torch.randn_like(ours)
    got = torch.autograd.grad(ours, [q, k, v], upstream)
    want = torch.autograd.grad(theirs, [q, k, v], upstream)
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("options", CASES, ids=str)
def test_attention_gradcheck(options):
    torch.manual_seed(0)
    lengths = [3, 1, 5]
    q, k, v = heads(9, 2, 4), heads(9, 1, 4), heads(9, 1, 4)
    bounds = cu_seqlens(lengths)
    assert gradcheck(lambda q, k, v: varlen_attention(q, k, v, bounds, 5, **options), (q, k, v))


@pytest.mark.parametrize("options", CASES, ids=str)
def test_a_document_is_the_same_alone_and_packed(options):
    """To the last bit: nothing of the neighbours enters, whatever they hold."""
    torch.manual_seed(0)
    tokens = sum(LENGTHS)
    q, k, v = (heads(tokens, 2, dtype=torch.float32).detach() for _ in range(3))
    bounds = cu_seqlens(LENGTHS)
    packed = varlen_attention(q, k, v, bounds, max(LENGTHS), **options)
    start, stop = bounds[4], bounds[5]
    poisoned = [torch.full_like(x, torch.nan) for x in (q, k, v)]
    for x, p in zip((q, k, v), poisoned, strict=True):
        p[start:stop] = x[start:stop]
    again = varlen_attention(*poisoned, bounds, max(LENGTHS), **options)
    assert torch.equal(again[start:stop], packed[start:stop])
    one = [x[start:stop] for x in (q, k, v)]
    alone = varlen_attention(*one, cu_seqlens([LENGTHS[4]]), LENGTHS[4], **options)
    assert torch.equal(alone, packed[start:stop])


def test_strided_heads_low_precision_and_no_tokens():
    torch.manual_seed(0)
    fused = torch.randn(12, 6, 8)
    q, k, v = fused.split([4, 1, 1], dim=1)
    bounds = cu_seqlens([5, 7])
    exact = varlen_attention(q.double(), k.double(), v.double(), bounds, 7)
    torch.testing.assert_close(varlen_attention(q, k, v, bounds, 7), exact.float())
    for options in ({}, {"softcap": 5.0}):
        low = varlen_attention(*(x.bfloat16() for x in (q, k, v)), bounds, 7, **options)
        exact = varlen_attention(q.double(), k.double(), v.double(), bounds, 7, **options)
        assert low.dtype == torch.bfloat16
        assert (low.double() - exact).abs().max() < 0.03
    empty = torch.empty(0, 2, 8)
    assert varlen_attention(empty, empty, empty, cu_seqlens([]), 0).shape == (0, 2, 8)
    assert varlen_attention(empty, empty, empty, cu_seqlens([0, 0]), 0).shape == (0, 2, 8)


# --- what the caller knows, and what a GPU must not do ---------------------------------------------


@pytest.mark.parametrize("options", [{}, {"window": 5}, {"softcap": 0.7}], ids=str)
def test_lengths_from_the_host_change_nothing_and_spare_the_wait(options):
    """On the meta device every read of a value raises, as a GPU would have to wait for it."""
    q, k, v = heads(sum(LENGTHS), 4), heads(sum(LENGTHS), 2), heads(sum(LENGTHS), 2)
    bounds = cu_seqlens(LENGTHS)
    want = varlen_attention(q, k, v, bounds, max(LENGTHS), **options)
    got = varlen_attention(q, k, v, bounds, max(LENGTHS), lengths=LENGTHS, **options)
    assert torch.equal(got, want)
    q, k, v, bounds = (
        x.detach().to("meta").requires_grad_(x.requires_grad) for x in (q, k, v, bounds)
    )
    with pytest.raises(RuntimeError, match="meta"):
        varlen_attention(q, k, v, bounds, max(LENGTHS), **options)
    out = varlen_attention(q, k, v, bounds, max(LENGTHS), lengths=tuple(LENGTHS), **options)
    out.sum().backward()
    assert out.shape == q.grad.shape and k.grad.shape == k.shape


class Shared(TorchFunctionMode):
    """What each call of torch's attention is told about heads: enable_gqa, query heads, key heads."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is torch.nn.functional.scaled_dot_product_attention:
            self.calls.append((kwargs["enable_gqa"], args[0].shape[1], args[1].shape[1]))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("dtype", "size", "options", "shared"),
    [
        (torch.bfloat16, 64, {}, True),
        (torch.bfloat16, 64, {"window": 3}, False),  # a mask
        (torch.bfloat16, 512, {}, False),
        (torch.float32, 64, {}, False),
    ],
)
def test_off_the_cpu_heads_are_repeated_where_no_fused_kernel_shares_them(
    dtype, size, options, shared
):
    q, k = (torch.empty(8, n, size, dtype=dtype, device="meta") for n in (4, 2))
    with Shared() as seen:
        varlen_attention(q, k, k, cu_seqlens([8]).to("meta"), 8, lengths=[8], **options)
    assert seen.calls == [(True, 4, 2) if shared else (False, 4, 4)]
    with Shared() as seen:
        k = torch.randn(8, 2, 8)
        varlen_attention(torch.randn(8, 4, 8), k, k, cu_seqlens([8]), 8, **options)
    assert seen.calls == [(True, 4, 2)]


def test_repeated_heads_give_the_same_attention(monkeypatch):
    from fastsft_kernels.reference import attention

    q, k, v = heads(sum(LENGTHS), 4), heads(sum(LENGTHS), 2), heads(sum(LENGTHS), 2)
    upstream = torch.randn_like(q)

    def run():
        out = varlen_attention(q, k, v, cu_seqlens(LENGTHS), max(LENGTHS), window=5)
        return out, *torch.autograd.grad(out, [q, k, v], upstream)

    want = run()
    monkeypatch.setattr(attention, "_can_share_heads", lambda *_: False)
    for got, expected in zip(run(), want, strict=True):
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize(
    "options", [{}, {"causal": False}, {"window": 40}, {"window": 9}, {"scale": 0.3}]
)
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 2), (3, 3), (8, 1)])
def test_torchs_attention_in_the_step_is_the_formulas(options, heads, kv_heads):
    """float32 takes torch's own where it can, float64 the formulas; views of wider rows, as in a block."""
    generator = torch.Generator().manual_seed(0)
    lengths, width = (37, 1, 64, 40), 24
    tokens = sum(lengths)
    cu = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)
    numbers = (heads + 2 * kv_heads) * width
    qkv = torch.randn(tokens, numbers + 16, generator=generator)[:, :numbers]
    do = torch.randn(tokens, heads * width + 16, generator=generator)[:, : heads * width]
    do[3], do[70] = 0, do[70] * 1e-25  # a row without a gradient; one whose square is 0 in float32
    found = []
    for dtype in (torch.float32, torch.float64):
        split = qkv.to(dtype).unflatten(1, (-1, width)).split([heads, kv_heads, kv_heads], 1)
        grad = do.to(dtype).unflatten(1, (heads, width))
        given = fused.AttentionOptions(max(lengths), **options)
        o, lse = fused.attention_forward(*split, cu, given, backend="reference")
        delta = fused.attention_delta(o, grad, backend="reference")
        back = fused.attention_backward(grad, *split, lse, delta, cu, given, backend="reference")
        found.append((o, lse, *back, back[0][70] * 1e25))
    for ours, wanted in zip(*found, strict=True):
        assert torch.allclose(ours.double(), wanted, rtol=2e-5, atol=2e-5)
