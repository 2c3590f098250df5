"""rms_norm, rope, swiglu, geglu against transformers' own modules, and gradcheck."""

import pytest
import torch
from fastsft_kernels import geglu, rms_norm, rope, swiglu
from torch.autograd import gradcheck
from transformers.models.gemma.configuration_gemma import GemmaConfig
from transformers.models.gemma.modeling_gemma import GemmaMLP, GemmaRMSNorm
from transformers.models.llama.configuration_llama import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm, apply_rotary_pos_emb


def randn(*shape, dtype=torch.float64):
    return torch.randn(*shape, dtype=dtype).requires_grad_()


def same_gradients(ours, theirs, inputs, theirs_inputs=None, **tolerance):
    """Output and gradients agree for a random upstream gradient."""
    upstream = torch.randn_like(ours)
    torch.testing.assert_close(ours, theirs, **tolerance)
    got = torch.autograd.grad(ours, inputs, upstream)
    want = torch.autograd.grad(theirs, theirs_inputs or inputs, upstream.to(theirs.dtype))
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w, **tolerance)


@pytest.mark.parametrize("module,offset", [(LlamaRMSNorm, 0.0), (GemmaRMSNorm, 1.0)])
def test_rms_norm_is_transformers(module, offset):
    torch.manual_seed(0)
    norm = module(72, eps=1e-3)
    torch.nn.init.normal_(norm.weight)
    x = randn(3, 5, 144, dtype=torch.float32)
    rows = x[..., ::2]  # strided, and not of unit stride
    y = rms_norm(rows, norm.weight, 1e-3, offset=offset)
    same_gradients(y, norm(rows), [x, norm.weight], rtol=1e-5, atol=1e-5)


def test_rms_norm_with_residual():
    torch.manual_seed(0)
    x, residual, weight = randn(7, 16), randn(7, 16), randn(16)
    y, total = rms_norm(x, weight, residual=residual)
    assert torch.equal(total, x + residual)
    assert torch.equal(y, rms_norm(x + residual, weight))
    assert gradcheck(
        lambda x, r, w: rms_norm(x, w, 1e-2, offset=0.5, residual=r), (x, residual, weight)
    )


def test_low_precision_rounds_once():
    torch.manual_seed(0)
    x, weight = torch.randn(64, 96).bfloat16(), torch.randn(96).bfloat16()
    exact = rms_norm(x.double(), weight.double())
    assert torch.equal(rms_norm(x, weight), exact.bfloat16())
    gate, up = torch.randn(64, 96).bfloat16(), torch.randn(64, 96).bfloat16()
    for op in (swiglu, geglu):
        exact = op(gate.double(), up.double())
        assert (op(gate, up) != exact.bfloat16()).float().mean() < 1e-3
        assert op(gate, up).dtype == torch.bfloat16


@pytest.mark.parametrize("turned", [16, 12, 4])
def test_rope_is_transformers_and_may_be_partial(turned):
    torch.manual_seed(0)
    q, k = randn(6, 4, 16), randn(6, 2, 16)
    angle = torch.randn(6, turned // 2, dtype=torch.float64)
    cos, sin = angle.cos(), angle.sin()
    whole = [torch.cat([t, t], -1)[None] for t in (cos, sin)]
    parts = [x[None, ..., :turned].transpose(1, 2) for x in (q, k)]
    turns = [x[0].transpose(0, 1) for x in apply_rotary_pos_emb(*parts, *whole)]
    for ours, x, theirs in zip(rope(q, k, cos, sin), (q, k), turns, strict=True):
        same_gradients(ours, torch.cat([theirs, x[..., turned:]], -1), [x])
    assert gradcheck(lambda q, k: rope(q, k, cos[:2], sin[:2]), (randn(2, 1, 16), randn(2, 1, 16)))


def test_rope_takes_tables_of_another_dtype():
    q, cos = torch.randn(5, 2, 8).bfloat16(), torch.randn(5, 4)
    out, _ = rope(q, q, cos, cos)
    want, _ = rope(q.double(), q.double(), cos.double(), cos.double())
    assert torch.equal(out, want.bfloat16())


def test_glu_is_transformers():
    torch.manual_seed(0)
    llama = LlamaMLP(
        LlamaConfig(hidden_size=8, intermediate_size=24, num_attention_heads=2)
    ).double()
    gemma = GemmaMLP(GemmaConfig(hidden_size=8, intermediate_size=24)).double()
    for mlp, op in ((llama, swiglu), (gemma, geglu)):
        x = randn(5, 8)
        ours = mlp.down_proj(op(mlp.gate_proj(x), mlp.up_proj(x)))
        same_gradients(ours, mlp(x), [x, mlp.gate_proj.weight, mlp.up_proj.weight])


def test_glu_gradients():
    torch.manual_seed(0)
    gate, up = randn(3, 6), randn(3, 6)
    assert gradcheck(swiglu, (gate, up))
    for approximate in ("tanh", "none"):
        assert gradcheck(lambda g, u, a=approximate: geglu(g, u, a), (gate, up))
    exact = torch.nn.functional.gelu(gate) * up
    torch.testing.assert_close(geglu(gate, up, "none"), exact)


def test_no_rows():
    x, heads, table = torch.empty(0, 8), torch.empty(0, 2, 8), torch.empty(0, 4)
    assert rms_norm(x, torch.ones(8)).shape == (0, 8)
    assert swiglu(x, x).shape == geglu(x, x).shape == (0, 8)
    assert rope(heads, heads, table, table)[0].shape == (0, 2, 8)
