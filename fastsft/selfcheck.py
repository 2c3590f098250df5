"""Every kernel op once, on small inputs, forwards and backwards, against the same op in float64.

Not a replacement for the tests: it answers, on the machine at hand and in a second, whether what
runs there computes the right thing (a miscompiled kernel, a broken driver, a bad card). Errors are
the largest difference over outputs and gradients, relative to the largest value of each.
"""

from collections.abc import Callable
from dataclasses import dataclass

import fastsft_kernels as fk
import torch
from fastsft_kernels.launch import explain
from torch import Tensor

TOLERANCE = 1e-4  # float32 over sums of some hundred terms, with room
Op = Callable[..., Tensor]


@dataclass(frozen=True)
class OpCheck:
    """One op's verdict: the backend that runs it, why that one, and how wrong it was."""

    op: str
    backend: str
    why: str
    error: float

    @property
    def ok(self) -> bool:
        return self.error <= TOLERANCE  # False for NaN


def check_ops(device: torch.device) -> list[OpCheck]:
    """Run all checks on `device`."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    labels = torch.tensor([3, -100, 7, 0, 60, -100, 31, 5])
    documents = torch.tensor([0, 3, 8], dtype=torch.int32)
    angles = normal(8, 8)
    cases: list[tuple[str, Op, list[Tensor]]] = [
        ("rms_norm", lambda x, w: _one(fk.rms_norm(x, w)), [normal(8, 96), normal(96)]),
        (
            "rope",
            lambda q, k: torch.cat(fk.rope(q, k, angles.cos().to(q), angles.sin().to(q)), dim=1),
            [normal(8, 4, 16), normal(8, 2, 16)],
        ),
        ("swiglu", fk.swiglu, [normal(8, 96), normal(8, 96)]),
        ("geglu", fk.geglu, [normal(8, 96), normal(8, 96)]),
        (
            "varlen_attention",
            lambda q, k, v: fk.varlen_attention(q, k, v, documents.to(q.device), 5),
            [normal(8, 4, 16), normal(8, 2, 16), normal(8, 2, 16)],
        ),
        (
            "cross_entropy",
            lambda x: _one(fk.cross_entropy(x, labels.to(x.device))),
            [normal(8, 64)],
        ),
        (
            "linear_cross_entropy",
            lambda x, w: _one(fk.linear_cross_entropy(x, w, labels.to(x.device))),
            [normal(8, 96), normal(64, 96)],
        ),
        (
            "lora_linear",
            lambda x, w, a, b: fk.lora_linear(x, w, a, b, 2.0),
            [normal(8, 96), normal(64, 96), normal(4, 96), normal(64, 4)],
        ),
    ]
    checks = [
        OpCheck(op, *_backend(op, device), _error(run, inputs, device)) for op, run, inputs in cases
    ]
    nf4 = _nf4_error(normal(64, 96).float(), device)
    checks += [OpCheck(op, *_backend(op, device), nf4) for op in ("nf4_quantize", "nf4_dequantize")]
    return checks


def _backend(op: str, device: torch.device) -> tuple[str, str]:
    return explain(op, torch.empty(0, device=device))


def _error(run: Op, inputs: list[Tensor], device: torch.device) -> float:
    exact = _forward_backward(run, inputs)
    got = _forward_backward(run, [x.float().to(device) for x in inputs])
    errors = [
        ((g.cpu().double() - e).abs().max() / e.abs().max().clamp_min(1e-30))
        for g, e in zip(got, exact, strict=True)
    ]
    return torch.stack(errors).max().item()  # max keeps NaN


def _forward_backward(run: Op, inputs: list[Tensor]) -> list[Tensor]:
    """The output and every input's gradient, for an upstream gradient that is not uniform."""
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    output = run(*leaves)
    upstream = torch.linspace(-1.0, 2.0, output.numel(), dtype=output.dtype, device=output.device)
    grads = torch.autograd.grad(output, leaves, upstream.view_as(output), allow_unused=True)
    return [output.detach()] + [g for g in grads if g is not None]


def _nf4_error(weight: Tensor, device: torch.device) -> float:
    """Quantised and decoded there, against the nearest codes searched for in float64 here."""
    packed = fk.nf4_quantize(weight.to(device), double_quant=False)
    back = fk.nf4_dequantize(packed, dtype=torch.float32).cpu().double()
    blocks = weight.double().reshape(-1, 64)
    largest = blocks.abs().amax(1, keepdim=True)
    code = packed.code.cpu().double()
    nearest = code[((blocks / largest).unsqueeze(-1) - code).abs().argmin(-1)] * largest
    return ((back.reshape(-1, 64) - nearest).abs().max() / largest.max()).item()


def _one(result: Tensor | tuple[Tensor, Tensor]) -> Tensor:
    assert isinstance(result, Tensor)
    return result
