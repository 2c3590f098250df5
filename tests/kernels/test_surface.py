"""The package as others meet it: what importing it needs, its signatures, its errors."""

import inspect
import os
import pkgutil
import subprocess
import sys
from pathlib import Path

import fastsft_kernels as fk
import pytest
import torch
from fastsft_kernels import DropoutKey, reference

KERNELS = Path(__file__).parents[2] / "kernels"
OPS = [
    "rms_norm",
    "rope",
    "swiglu",
    "geglu",
    "varlen_attention",
    "cross_entropy",
    "linear_cross_entropy",
    "nf4_quantize",
    "nf4_dequantize",
    "lora_linear",
]
BLOCKER = """
import importlib, sys
class Blocked:
    names = sys.argv[1].split()
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in self.names:
            raise ImportError("blocked: " + name)
sys.meta_path.insert(0, Blocked())
for name in sys.argv[2:]:
    importlib.import_module(name)
print(len(sys.argv) - 2)
"""
OTHERS = "fastsft transformers datasets peft bitsandbytes accelerate"


def modules():
    found = pkgutil.walk_packages([str(KERNELS)])
    return [m.name for m in found if m.name.startswith("fastsft_kernels")]


@pytest.mark.parametrize("without", ["", "triton"])
def test_every_module_imports_with_torch_and_triton_alone(without):
    """Without Triton, everything but its own kernels and what compiles them imports."""
    needs = (".triton_ops.", ".precompile")
    names = [m for m in modules() if not (without and any(part in m for part in needs))]
    assert "fastsft_kernels.lora" in names
    done = subprocess.run(
        [sys.executable, "-c", BLOCKER, f"{OTHERS} {without}", *names],
        capture_output=True,
        text=True,
        cwd=KERNELS,
        env={**os.environ, "TRITON_INTERPRET": "0"},
    )
    assert done.stdout.strip() == str(len(names)), done.stderr


@pytest.mark.parametrize("name", OPS)
def test_reference_has_the_same_signature(name):
    public = inspect.signature(getattr(fk, name)).parameters
    ours = inspect.signature(getattr(reference, name)).parameters
    assert [str(p) for p in public.values() if p.name != "backend"] == [
        str(p) for p in ours.values()
    ]
    assert public["backend"].kind is inspect.Parameter.KEYWORD_ONLY
    assert public["backend"].default is None


X, W = torch.randn(4, 8), torch.randn(6, 8)
HEADS = torch.randn(4, 2, 8)
CU = torch.tensor([0, 4], dtype=torch.int32)
LABELS = torch.tensor([0, 1, 2, -100])
GOOD = {
    "rms_norm": ((X, X[0]), {}),
    "rope": ((HEADS, HEADS, torch.randn(4, 4), torch.randn(4, 4)), {}),
    "swiglu": ((X, X), {}),
    "geglu": ((X, X), {}),
    "varlen_attention": ((HEADS, HEADS, HEADS, CU, 4), {}),
    "cross_entropy": ((X, LABELS), {}),
    "linear_cross_entropy": ((X, W, LABELS), {}),
    "nf4_quantize": ((W,), {}),
    "nf4_dequantize": ((fk.nf4_quantize(W),), {}),
    "lora_linear": ((X, W, torch.randn(2, 8), torch.randn(6, 2), 1.0), {}),
}


@pytest.mark.parametrize("name", OPS)
def test_a_backend_is_never_replaced_silently(name, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    args, kwargs = GOOD[name]
    op = getattr(fk, name)
    op(*args, **kwargs)
    op(*args, **kwargs, backend="reference")
    with pytest.raises(ValueError, match=f"{name}: Triton cannot run here: .*got.*backend=None"):
        op(*args, **kwargs, backend="triton")
    with pytest.raises(ValueError, match=f"{name}: unknown backend; got 'cuda'. Pass"):
        op(*args, **kwargs, backend="cuda")


def cu(*bounds):
    return torch.tensor(bounds, dtype=torch.int32)


KEY = DropoutKey(0, 0, 0, torch.arange(3))
A, B = torch.randn(2, 8), torch.randn(6, 2)
BAD = [
    (fk.rms_norm, (X.int(), X[0]), {}, "x must be floating point"),
    (fk.rms_norm, (X, W), {}, r"weight must be \[H\] = \[8\]"),
    (fk.rms_norm, (X, X[0]), {"residual": X[:2]}, "residual must be of x's shape"),
    (fk.rms_norm, (X, X[0]), {"residual": X.double()}, "residual must have the dtype"),
    (fk.rope, (X, X, X, X), {}, r"q must be \[T, Hq, D\]"),
    (fk.rope, (HEADS, HEADS, X, X), {}, "the tables turn more"),
    (fk.rope, (HEADS, HEADS, X[:2], X[:2]), {}, r"cos and sin must be \[T, R/2\]"),
    (fk.swiglu, (X, X[:2]), {}, "up must be of gate's shape"),
    (fk.geglu, (X, X.double()), {}, "up must have the dtype"),
    (fk.geglu, (X, X, "erf"), {}, "unknown approximate; got 'erf'"),
    (fk.varlen_attention, (X, X, X, CU, 4), {}, r"q must be \[T, Hq, D\]"),
    (fk.varlen_attention, (HEADS, HEADS, HEADS, CU.long(), 4), {}, "cu_seqlens must be int32"),
    (fk.varlen_attention, (HEADS, HEADS, HEADS, cu(0, 3), 4), {}, "rise from 0 to T = 4"),
    (fk.varlen_attention, (HEADS, HEADS, HEADS, cu(0, 3, 2, 4), 4), {}, "rise from 0 to T = 4"),
    (fk.varlen_attention, (HEADS, HEADS, HEADS, cu(1, 4), 4), {}, "rise from 0 to T = 4"),
    (fk.varlen_attention, (HEADS, HEADS, HEADS, CU, 3), {}, "max_seqlen is shorter.*got 3"),
    (fk.varlen_attention, (HEADS, HEADS, HEADS, CU, 4), {"lengths": [3]}, "lengths must be"),
    (fk.varlen_attention, (HEADS, HEADS, HEADS, CU, 4), {"lengths": [2, 2]}, "lengths must be"),
    (fk.varlen_attention, (HEADS, HEADS, HEADS, CU, 3), {"lengths": [4]}, "max_seqlen is shorter"),
    (fk.varlen_attention, (HEADS, HEADS, HEADS, CU, 4), {"window": 0}, "window must be"),
    (
        fk.varlen_attention,
        (HEADS, HEADS, HEADS, CU, 4),
        {"window": 2, "causal": False},
        "window must be",
    ),
    (
        fk.varlen_attention,
        (HEADS, HEADS, HEADS, CU, 4),
        {"softcap": 0.0},
        "softcap must be positive",
    ),
    (fk.varlen_attention, (HEADS, torch.randn(4, 3, 8), HEADS, CU, 4), {}, "Hq a multiple of Hkv"),
    (fk.cross_entropy, (X, LABELS[:2]), {}, r"labels must be \[T\] = \[4\]"),
    (fk.cross_entropy, (X, LABELS.int()), {}, "labels must be int64"),
    (fk.cross_entropy, (X, LABELS + 7), {}, r"in \[0, 8\); got -93 to 9"),
    (fk.cross_entropy, (X, LABELS), {"reduction": "avg"}, "unknown reduction; got 'avg'"),
    (fk.linear_cross_entropy, (X, A[:, :3], LABELS), {}, r"hidden must be \[T, H\] and weight"),
    (fk.linear_cross_entropy, (X, W.double(), LABELS), {}, "weight must have hidden's dtype"),
    (fk.linear_cross_entropy, (X, W, LABELS), {"chunk_rows": 0}, "chunk_rows must be at least 1"),
    (
        fk.linear_cross_entropy,
        (X, W, LABELS),
        {"rows": torch.tensor([3])},
        "got -100 to -100.*leave them out",
    ),
    (fk.linear_cross_entropy, (X, W, LABELS), {"rows": LABELS == 0}, "rows must be int64"),
    (fk.linear_cross_entropy, (X, W, LABELS), {"softcap": -1.0}, "softcap must be positive"),
    (fk.nf4_quantize, (X[0],), {}, r"weight must be a matrix \[N, K\]"),
    (fk.nf4_quantize, (W.double(),), {}, "weight must be bfloat16, float16 or float32"),
    (fk.nf4_quantize, (W,), {"block_size": 48}, "no such block_size; got 48"),
    (fk.nf4_dequantize, (fk.nf4_quantize(W),), {"dtype": torch.float64}, "dtype must be"),
    (fk.nf4_dequantize, (fk.nf4_quantize(W),), {"out": W}, r"out must be \[6, 8\] torch.bfloat16"),
    (fk.nf4_dequantize, (fk.nf4_quantize(W),), {"out": W.t(), "dtype": W.dtype}, "out must be"),
    (fk.lora_linear, (X, W[:, :3], A, B, 1.0), {}, "x must end in K = 3"),
    (fk.lora_linear, (X, W.double(), A, B, 1.0), {}, "weight must have x's dtype"),
    (fk.lora_linear, (X, W, A, None, 1.0), {}, "come together"),
    (fk.lora_linear, (X, W, A, B.t(), 1.0), {}, r"lora_b must be \[N, R\] = \[6, 2\]"),
    (fk.lora_linear, (X, W, A[:, :3], B, 1.0), {}, r"lora_a must be \[R, K\] = \[2, 8\]"),
    (fk.lora_linear, (X, W, A, B, 1.0), {"dropout_p": 1.0}, "dropout_p must be in"),
    (
        fk.lora_linear,
        (X, W, A, B, 1.0),
        {"dropout_key": KEY},
        r"one int64 row key per token, \[4\]",
    ),
    (fk.lora_linear, (X, W, A, B, 1.0), {"bias": X[0]}, r"bias must be \[N\] = \[6\]"),
    (fk.lora_dropout_mask, (KEY._replace(seed=-1), 8, 0.5), {}, "seed must be in"),
]


@pytest.mark.parametrize(
    "op,args,kwargs,message", BAD, ids=[f"{c[0].__name__}-{c[3][:24]}" for c in BAD]
)
def test_bad_arguments_say_what_got_and_do_this(op, args, kwargs, message):
    with pytest.raises(ValueError, match=message) as caught:
        op(*args, **kwargs)
    assert str(caught.value).startswith(op.__name__ + ": ") and "; got " in str(caught.value)
