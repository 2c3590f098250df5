"""NF4Linear: F.linear on the decoded weight, of which nothing is kept, and safe to move and convert."""

import pytest
import torch
import torch.nn.functional as F
from fastsft_kernels import nf4_dequantize, nf4_quantize
from torch import nn

from fastsft.model.quant import NF4Linear


def make(n=48, k=64, *, bias=True, double_quant=True, dtype=torch.float32):
    torch.manual_seed(0)
    nf4 = nf4_quantize(torch.randn(n, k, dtype=dtype), double_quant=double_quant)
    return NF4Linear(nf4, nn.Parameter(torch.randn(n, dtype=dtype)) if bias else None)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("double_quant", [True, False])
def test_forward_and_gradients_are_those_of_the_decoded_weight(bias, double_quant):
    layer = make(bias=bias, double_quant=double_quant)
    x = torch.randn(2, 5, 64, requires_grad=True)
    oracle_x = x.detach().double().requires_grad_()
    weight = nf4_dequantize(layer.nf4, dtype=torch.float32).double()
    b = None if layer.bias is None else layer.bias.detach().double().requires_grad_()
    want = F.linear(oracle_x, weight, b)
    upstream = torch.randn_like(want)
    want.backward(upstream)
    got = layer(x)
    got.backward(upstream.float())
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(x.grad.double(), oracle_x.grad, rtol=1e-5, atol=1e-5)
    if b is not None:
        torch.testing.assert_close(layer.bias.grad.double(), b.grad, rtol=1e-5, atol=1e-5)


def test_autograd_keeps_nothing_of_the_weight():
    layer = make(n=96, k=128, bias=False)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.shape), lambda t: t):
        layer(torch.randn(3, 128, requires_grad=True))
    assert all(shape.numel() < 96 * 128 // 2 for shape in saved), saved


def test_converting_the_module_to_bf16_leaves_the_weight_alone():
    layer = make()
    before = layer.weight
    layer.to(torch.bfloat16)
    assert layer.bias.dtype == torch.bfloat16
    assert torch.equal(layer.weight, before)


def test_moving_the_module_moves_every_tensor_of_the_weight():
    layer = make().to("meta")
    tensors = [t for t in vars(layer.nf4).values() if isinstance(t, torch.Tensor)]
    assert tensors and all(t.device.type == "meta" for t in tensors)


def test_state_dict_round_trip_is_exact():
    layer, other = make(), make()
    other.load_state_dict({name: torch.zeros_like(t) for name, t in layer.state_dict().items()})
    assert not torch.equal(other.weight, layer.weight)
    other.load_state_dict(layer.state_dict())
    x = torch.randn(4, 64)
    assert torch.equal(other(x), layer(x))


def test_the_frozen_weight_is_no_parameter_and_the_layer_is_small():
    layer = make(n=1024, k=1024, bias=False, dtype=torch.bfloat16)
    assert not list(layer.parameters())
    size = sum(b.nbytes for b in layer.buffers())
    assert size / 1024**2 < 0.518  # 4 bits, 8 bits per 64, 32 bits per 16384, two small tables
    assert layer.weight.dtype == torch.bfloat16
