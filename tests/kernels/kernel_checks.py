"""How a kernel is judged: against float64, by the error torch itself makes at that precision.

On a machine without a GPU the kernels run in Triton's interpreter (float32 and float16: its
bfloat16 products are wrong); with one, the same tests run on it, bfloat16 included.
"""

import pytest
import torch

from bench import accuracy

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.float16] + ([torch.bfloat16] if DEVICE == "cuda" else [])


@pytest.fixture(autouse=True)
def poisoned_memory():
    """Uninitialised memory holds NaN, so that a number a kernel forgot to write shows."""
    with accuracy.poisoned_memory():
        yield


def randn(*shape, dtype=torch.float32, seed=0, scale=1.0):
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return (torch.randn(*shape, generator=generator) * scale).to(dtype).to(DEVICE)


def check(got, exact, plain, *, factor=2.0, terms=0.0, name="result"):
    """`got` is as near to the float64 `exact` as torch's own `plain`, by the rule of bench.accuracy."""
    problem = accuracy.judge(got, exact, plain, factor, terms).problem
    assert not problem, f"{name}: {problem}"


def check_gradients(op, oracle, inputs, *, factor=2.0, terms=0.0, names=None):
    """`op`'s outputs and gradients against `oracle` in float64 and at the inputs' precision.

    Both take the tensors of `inputs` and return a tensor or a tuple; the upstream gradients are
    random. Gradients are checked for the inputs that are floating point.
    """

    def run(function, tensors, upstream):
        leaves = [t.detach().clone(memory_format=torch.preserve_format) for t in tensors]
        leaves = [t.requires_grad_() if t.is_floating_point() else t for t in leaves]
        outputs = function(*leaves)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        if upstream is None:
            upstream = [randn(*o.shape, seed=99 + i).to(o.dtype) for i, o in enumerate(outputs)]
        wanted = [t for t in leaves if t.requires_grad]
        given = [u.to(o.dtype) for u, o in zip(upstream, outputs, strict=True)]
        grads = torch.autograd.grad(outputs, wanted, given)
        return [o.detach() for o in outputs], list(grads), upstream

    outputs, grads, upstream = run(op, inputs, None)
    wide = [t.double() if t.is_floating_point() else t for t in inputs]
    exact_outputs, exact_grads, _ = run(oracle, wide, upstream)
    plain_outputs, plain_grads, _ = run(oracle, inputs, upstream)
    for i, triple in enumerate(zip(outputs, exact_outputs, plain_outputs, strict=True)):
        check(*triple, factor=factor, terms=terms, name=f"output {i}")
    for i, triple in enumerate(zip(grads, exact_grads, plain_grads, strict=True)):
        check(*triple, factor=factor, terms=terms, name=f"gradient of {names[i] if names else i}")
