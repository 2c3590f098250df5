"""A whole decoder block out of the fused producers, against autograd over the plain formulas.

This is the composition the fused functions are made for: products whose inputs carry the adapters'
low-rank part behind K, and backwards that add the adapters' terms on the way. Done in float64
by the references (1e-12), in float32 by the Triton kernels, and on the meta device, where a
recording counts the launches.
"""

from typing import NamedTuple

import pytest
import torch
from fastsft_kernels import fused, lora_dropout_mask, reference
from fastsft_kernels.dropout import keep_scale
from fastsft_kernels.fused import Adapters, AttentionOptions, NormedInput, StripDropout
from fastsft_kernels.launch import record_launches
from kernel_checks import DEVICE, poisoned_memory  # noqa: F401

T, H, F, R = 40, 48, 80, 16
HEADS, KV, D = 4, 2, 16
EPS, SCALING = 1e-5, 1.5
LENGTHS = [1, 17, 15, 7]
SPLIT_QKV = (HEADS * D, KV * D, KV * D)


class Weights(NamedTuple):
    """Base weights, norms, and the adapters' A [S·R, K] and B [N, R], strips in order."""

    norm1: torch.Tensor
    norm2: torch.Tensor
    qkv: torch.Tensor
    o: torch.Tensor
    gate_up: torch.Tensor
    down: torch.Tensor
    a_qkv: torch.Tensor
    a_o: torch.Tensor
    a_gate_up: torch.Tensor
    a_down: torch.Tensor
    b_qkv: torch.Tensor
    b_o: torch.Tensor
    b_gate_up: torch.Tensor
    b_down: torch.Tensor


TRAINED = [name for name in Weights._fields if name.startswith(("a_", "b_"))]


def weights(dtype, device):
    generator = torch.Generator().manual_seed(3)

    def normal(*shape):
        x = torch.randn(*shape, generator=generator, dtype=torch.float64) / shape[-1] ** 0.5
        return x.to(dtype).to(device)

    return Weights(
        1 + normal(H),
        1 + normal(H),
        normal(sum(SPLIT_QKV), H),
        normal(H, HEADS * D),
        normal(2 * F, H),
        normal(H, F),
        normal(3 * R, H),
        normal(R, HEADS * D),
        normal(2 * R, H),
        normal(R, F),
        normal(sum(SPLIT_QKV), R),
        normal(H, R),
        normal(2 * F, R),
        normal(H, R),
    )


def inputs(dtype, device):
    generator = torch.Generator().manual_seed(4)
    x, dout = torch.randn(2, T, H, generator=generator, dtype=torch.float64)
    angle = torch.rand(T, D // 2, generator=generator, dtype=torch.float64) * 6
    made = [t.to(dtype).to(device) for t in (x, dout, angle.cos(), angle.sin())]
    cu = torch.tensor([0, *LENGTHS]).cumsum(0).to(torch.int32).to(device)
    return *made, cu


def dropout(modules, rows, p):
    return StripDropout(p, 11, 5, modules, rows) if p else None


def augmented(weight, b, segments):
    """[W | B] with the strips of B block-diagonal, at a pitch of a multiple of 64."""
    n, k = weight.shape
    strips = len(segments)
    out = weight.new_zeros(n, -(-(k + strips * R) // 64) * 64)
    out[:, :k] = weight
    first = 0
    for i, rows in enumerate(segments):
        out[first : first + rows, k + i * R : k + (i + 1) * R] = b[first : first + rows]
        first += rows
    return out


class Block:
    """Forward and backward of one block by the fused functions of one backend."""

    def __init__(self, w, cu, cos, sin, p, backend):
        self.w, self.cos, self.sin, self.backend = w, cos, sin, backend
        self.cu = cu
        rows = torch.arange(100, 100 + T, device=cu.device)
        self.s = SCALING * (keep_scale(p) if p else 1.0)
        self.drop = {
            "qkv": dropout((0, 1, 2), rows, p),
            "o": dropout((3,), rows, p),
            "gate_up": dropout((4, 5), rows, p),
            "down": dropout((6,), rows, p),
        }
        self.options = AttentionOptions(max(LENGTHS))
        self.wqkv = augmented(w.qkv, w.b_qkv, SPLIT_QKV)
        self.wo = augmented(w.o, w.b_o, (H,))
        self.wgu = augmented(w.gate_up, w.b_gate_up, (F, F))
        self.wdown = augmented(w.down, w.b_down, (H,))

    def run(self, name, *args, **kwargs):
        return getattr(fused, name)(*args, **kwargs, backend=self.backend)

    def buffer(self, x, weight):
        return x.new_zeros(T, weight.shape[1])

    def tail(self, buffer, a, k, name):
        out = buffer[:, k : k + a.shape[0]]
        self.run("tails", buffer[:, :k], a, self.s, dropout=self.drop[name], out=out)
        return out

    def da(self, adapters, x, norm=None):
        d, _, drop, scaling = adapters
        return self.run("skinny_dA", d, x, scaling, norm=norm, dropout=drop)

    def heads(self, qkv):
        q, k, v = qkv.split(SPLIT_QKV, 1)
        return q.unflatten(1, (HEADS, D)), k.unflatten(1, (KV, D)), v.unflatten(1, (KV, D))

    def forward(self, x):
        w, self.x = self.w, x
        y = self.buffer(x, self.wqkv)
        _, self.rstd1, _ = self.run("rms_norm_forward", x, w.norm1, EPS, out=y[:, :H])
        self.tail_qkv = self.tail(y, w.a_qkv, H, "qkv")
        self.qkv = y @ self.wqkv.t()
        q, k, v = self.heads(self.qkv)
        self.run("rope_", q, k, self.cos, self.sin)
        self.o = self.buffer(x, self.wo)
        o = self.o[:, : HEADS * D].unflatten(1, (HEADS, D))
        _, self.lse = self.run("attention_forward", q, k, v, self.cu, self.options, out=o)
        self.tail_o = self.tail(self.o, w.a_o, HEADS * D, "o")
        z = self.buffer(x, self.wgu)
        _, self.rstd2, self.total = self.run(
            "rms_norm_forward", self.o @ self.wo.t(), w.norm2, EPS, residual=x, out=z[:, :H]
        )
        self.tail_gu = self.tail(z, w.a_gate_up, H, "gate_up")
        self.gate_up = z @ self.wgu.t()
        h = self.buffer(x, self.wdown)
        self.run("glu_forward", self.gate_up[:, :F], self.gate_up[:, F:], "silu", out=h[:, :F])
        self.tail_down = self.tail(h, w.a_down, F, "down")
        return self.total + h @ self.wdown.t()

    def backward(self, dout):
        w, grads = self.w, {}
        dh = dout @ self.wdown
        grads["b_down"] = self.run("skinny_dB", dout, self.tail_down, None)
        dgate_up = torch.empty_like(self.gate_up)
        glu = self.run(
            "glu_backward",
            dh[:, :F],
            self.gate_up[:, :F],
            self.gate_up[:, F:],
            "silu",
            adapters=Adapters(dh[:, F : F + R], w.a_down, self.drop["down"], self.s),
            tails=(self.tail_gu[:, :R], self.tail_gu[:, R:]),
            out=(dgate_up[:, :F], dgate_up[:, F:]),
        )
        grads["a_down"] = glu.da_down
        grads["b_gate_up"] = torch.cat([glu.db_gate, glu.db_up])
        dz = dgate_up @ self.wgu
        adapters = Adapters(dz[:, H : H + 2 * R], w.a_gate_up, self.drop["gate_up"], self.s)
        grads["a_gate_up"] = self.da(adapters, self.total, NormedInput(self.rstd2, w.norm2, 0.0))
        dtotal, _ = self.run(
            "rms_norm_backward",
            dz[:, :H],
            self.total,
            w.norm2,
            self.rstd2,
            residual_grad=dout,
            adapters=adapters,
        )
        do = dtotal @ self.wo
        grads["b_o"] = self.run("skinny_dB", dtotal, self.tail_o, None)
        adapters = Adapters(do[:, HEADS * D :][:, :R], w.a_o, self.drop["o"], self.s)
        grads["a_o"] = self.da(adapters, self.o[:, : HEADS * D])
        o, do = (t[:, : HEADS * D].unflatten(1, (HEADS, D)) for t in (self.o, do))
        delta = self.run("attention_delta", o, do, adapters=adapters)
        dqkv = torch.empty_like(self.qkv)
        dq, dk, dv = self.heads(dqkv)
        qkv = self.heads(self.qkv)
        self.run(
            "attention_backward",
            do,
            *qkv,
            self.lse,
            delta,
            self.cu,
            self.options,
            out=(dq, dk, dv),
        )
        self.run("rope_", dq, dk, self.cos, self.sin, inverse=True)
        dy = dqkv @ self.wqkv
        grads["b_qkv"] = self.run("skinny_dB", dqkv, self.tail_qkv, SPLIT_QKV)
        adapters = Adapters(dy[:, H : H + 3 * R], w.a_qkv, self.drop["qkv"], self.s)
        grads["a_qkv"] = self.da(adapters, self.x, NormedInput(self.rstd1, w.norm1, 0.0))
        dx, _ = self.run(
            "rms_norm_backward",
            dy[:, :H],
            self.x,
            w.norm1,
            self.rstd1,
            residual_grad=dtotal,
            adapters=adapters,
        )
        return dx, grads


def plain(w, x, cu, cos, sin, drop):
    """The same block as anyone would write it, for autograd."""

    def linear(y, weight, a, b, segments, name):
        parts, first = [], 0
        for i, rows in enumerate(segments):
            mask = 1.0
            if drop[name] is not None:
                p = drop[name].p
                mask = lora_dropout_mask(drop[name].key(i), y.shape[1], p).to(y.dtype) * keep_scale(
                    p
                )
            low = (y * mask) @ a[i * R : (i + 1) * R].t() @ b[first : first + rows].t()
            parts.append(y @ weight[first : first + rows].t() + SCALING * low)
            first += rows
        return parts

    q, k, v = linear(reference.rms_norm(x, w.norm1, EPS), w.qkv, w.a_qkv, w.b_qkv, SPLIT_QKV, "qkv")
    q, k = reference.rope(q.unflatten(1, (HEADS, D)), k.unflatten(1, (KV, D)), cos, sin)
    v = v.unflatten(1, (KV, D))
    o = reference.varlen_attention(q, k, v, cu, max(LENGTHS)).flatten(1)
    total = x + linear(o, w.o, w.a_o, w.b_o, (H,), "o")[0]
    z = reference.rms_norm(total, w.norm2, EPS)
    gate, up = linear(z, w.gate_up, w.a_gate_up, w.b_gate_up, (F, F), "gate_up")
    h = reference.swiglu(gate, up)
    return total + linear(h, w.down, w.a_down, w.b_down, (H,), "down")[0]


BACKENDS = [
    pytest.param("reference", torch.float64, 1e-12, id="reference-float64"),
    pytest.param("triton", torch.float32, 3e-5, id="triton-float32"),
]


@pytest.mark.parametrize("p", [0.0, 0.25])
@pytest.mark.parametrize("backend,dtype,tolerance", BACKENDS)
def test_the_block_is_autograds(backend, dtype, tolerance, p):
    x, dout, cos, sin, cu = inputs(dtype, DEVICE)
    w = weights(dtype, DEVICE)
    block = Block(w, cu, cos, sin, p, backend)
    got = block.forward(x)
    dx, grads = block.backward(dout)

    wide = Weights(*(t.double() for t in w))
    leaves = wide._replace(**{n: getattr(wide, n).requires_grad_() for n in TRAINED})
    x64 = x.double().requires_grad_()
    want = plain(leaves, x64, cu, cos.double(), sin.double(), block.drop)
    want_dx, *want_grads = torch.autograd.grad(
        want, [x64, *(getattr(leaves, n) for n in TRAINED)], dout.double()
    )
    pairs = {"y": (got, want), "dx": (dx, want_dx)}
    pairs |= {n: (grads[n], g) for n, g in zip(TRAINED, want_grads, strict=True)}
    for name, (ours, exact) in pairs.items():
        error = (ours.double() - exact).abs().max() / exact.abs().max()
        assert error <= tolerance, f"{name}: relative error {error:.2e}"


def test_launches_of_a_block():
    """With the four decodes of QLoRA, 18 forward and 28 backward are what a layer may launch."""
    x, dout, cos, sin, cu = (t.to("meta") for t in inputs(torch.bfloat16, "cpu"))
    w = Weights(*(t.to("meta") for t in weights(torch.bfloat16, "cpu")))
    block = Block(w, cu, cos, sin, 0.1, None)
    products, decodes = 4, 4
    with record_launches() as forward:
        block.forward(x)
    with record_launches() as backward:
        block.backward(dout)
    assert len(forward.launches) + products + decodes <= 18
    assert len(backward.launches) + products + decodes <= 28
