"""The cross entropy kernel and the two ops on it, against torch in float64."""

import pytest
import torch
import torch.nn.functional as F
from fastsft_kernels import cross_entropy, linear_cross_entropy, reference
from fastsft_kernels import launch as gate
from fastsft_kernels.fused import cross_entropy_
from fastsft_kernels.triton_ops import cross_entropy as triton_ops
from kernel_checks import DEVICE, DTYPES, check, poisoned_memory, randn  # noqa: F401
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime.interpreter import TensorHandle

IGNORED = -100
OPTIONS = [{}, {"scale": 0.3}, {"softcap": 2.0}, {"softcap": 3.0, "scale": 1.7}]
REDUCTIONS = ["none", "mean", "sum"]
# One column; fewer than 16 bytes; odd; a block of 4096 (float32: 2048) and a little on either side.
WIDTHS = [1, 3, 100, 2047, 4097, 8200]


def labels_for(n, V, *, seed=0, masked=True):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, V, (n,), generator=generator)
    labels[:2] = torch.tensor([0, V - 1])[:n]
    if masked and n > 3:
        labels[[2, n - 1]] = IGNORED
    return labels.to(DEVICE)


def upstream_for(loss):
    return randn(loss.numel() + 1, seed=3)[1:].view(loss.shape)


def rows_with_gradient(logits, labels, by, softcap=None, scale=1.0):
    """(loss, entropy, gradient), in float64 for float64 logits and else as torch has them."""
    x = logits.detach().clone().requires_grad_()
    z = x.to(torch.float64 if x.dtype == torch.float64 else torch.float32) * scale
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
    loss = F.cross_entropy(z, labels, reduction="none", ignore_index=IGNORED)
    (gradient,) = torch.autograd.grad((loss * by).sum(), [x])
    entropy = torch.special.entr(torch.softmax(z, 1)).sum(1).detach()
    return loss.detach(), entropy.masked_fill(labels == IGNORED, 0), gradient


def check_rows(logits, labels, *, by=1.0, out=None, **options):
    """cross_entropy_ on a copy of `logits` at their strides, every result against float64."""
    held = torch.empty_strided(logits.shape, logits.stride(), dtype=logits.dtype, device=DEVICE)
    held.copy_(logits)
    wide = by.double() if isinstance(by, torch.Tensor) else by
    exact = rows_with_gradient(logits.double(), labels, wide, **options)
    plain = rows_with_gradient(logits, labels, by, **options)
    got = cross_entropy_(held, labels, gradient_scale=by, out=out, backend="triton", **options)
    gradient = held if out is None else out
    if out is not None:
        assert torch.equal(held, logits)
    factor = 3.0 if logits.numel() < 64 else 2.0  # torch's own error of few numbers is luck
    for i, result in enumerate((got.loss, got.entropy, gradient)):
        check(result, exact[i], plain[i], factor=factor, name=("loss", "entropy", "gradient")[i])
    correct = (logits.argmax(1) == labels) & (labels != IGNORED)
    assert torch.equal(got.correct, correct)
    return got


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("V", WIDTHS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows(dtype, V, options):
    logits, labels = randn(6, V, dtype=dtype, scale=3.0), labels_for(6, V)
    logits[3, 0 if V == 1 else labels[3]] = 20.0  # one certain answer
    check_rows(logits, labels, by=0.37, **options)


@pytest.mark.parametrize("name,number", [("short", 0), ("short", 1), ("long", 0), ("long", 1),
                                         ("long", 2), ("longest", 0), ("longest", 1)])  # fmt: skip
@pytest.mark.parametrize("odd", [0, 1])
def test_every_configuration(name, number, odd):
    """Of rows of each length class, with whole blocks, a rest, and rows at odd addresses."""
    V = {"short": 9000, "long": 33000, "longest": 66000}[name] + odd
    logits, labels = randn(3, V), labels_for(3, V)
    with gate.forced(**{f"cross_entropy_{name}": number}):
        check_rows(logits, labels)
    with gate.record_launches() as recording:
        cross_entropy_(logits.to("meta"), labels.to("meta"))
    assert f"cross_entropy_{name}" in recording.candidates


@pytest.mark.parametrize("V", [2500, 4099])
@pytest.mark.parametrize("pitch", [4104, 4111])
def test_rows_at_a_pitch(V, pitch):
    """In place and to `out` at another pitch; no number outside the rows changes."""
    backing = torch.full((5, pitch + 7), 77.0, dtype=torch.float16, device=DEVICE)
    logits, labels = backing[:, 3 : 3 + V], labels_for(5, V)
    logits.copy_(randn(5, V, dtype=torch.float16))
    exact = rows_with_gradient(logits.double(), labels, 1.0)
    plain = rows_with_gradient(logits, labels, 1.0)
    for width in (pitch, pitch + 3, V):
        other = torch.full((5, width), 55.0, dtype=torch.float16, device=DEVICE)
        cross_entropy_(logits, labels, out=other[:, :V], backend="triton")
        check(other[:, :V], exact[2], plain[2], name="gradient in out")
        assert (other[:, V:] == 55).all()
    cross_entropy_(logits, labels, backend="triton")
    check(logits, exact[2], plain[2], name="gradient")
    assert (backing[:, :3] == 77).all() and (backing[:, 3 + V :] == 77).all()


@pytest.mark.skipif(DEVICE == "cuda", reason="looks into the interpreter")
@pytest.mark.parametrize("V,pitch", [(2500, 2501), (2500, 2504), (4099, 4099)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_the_compiler_is_told_the_truth(dtype, V, pitch, monkeypatch):
    """What the kernel calls a multiple of 16 bytes is one: reads of 16 bytes rest on it."""
    told = []

    def note(handle, name, by):
        told.append((handle.data.item(), by[0]))

    monkeypatch.setattr(TensorHandle, "set_attr", note)
    logits, labels = randn(5, pitch, dtype=dtype)[:, :V], labels_for(5, V)
    for width in (pitch, pitch + 8, pitch + 1):
        out = torch.empty(5, width, dtype=dtype)[:, :V]
        cross_entropy_(logits, labels, out=out, backend="triton")
    assert len(told) >= 3 * 3 * 2 and all(x % by == 0 for x, by in told)


def test_a_factor_for_each_row_and_one_on_the_device():
    logits, labels = randn(7, 130), labels_for(7, 130)
    per_row = randn(14, seed=5)[::2]
    per_row[2] = torch.nan  # of a row that is ignored
    clean = per_row.nan_to_num(0.0)
    exact = rows_with_gradient(logits.double(), labels, clean.double(), 2.0, 0.5)[2]
    plain = rows_with_gradient(logits, labels, clean, 2.0, 0.5)[2]
    cross_entropy_(logits, labels, softcap=2.0, scale=0.5, gradient_scale=per_row, backend="triton")
    check(logits, exact, plain)
    check_rows(randn(7, 130), labels, by=torch.tensor(-2.5, device=DEVICE))


def test_no_gradient_leaves_the_logits():
    logits, labels = randn(6, 300), labels_for(6, 300)
    before = logits.clone()
    kept = cross_entropy_(logits, labels, gradient_scale=None, entropy=False, backend="triton")
    assert torch.equal(logits, before) and kept.entropy is None
    full = cross_entropy_(logits, labels, backend="triton")
    assert torch.equal(kept.loss, full.loss) and torch.equal(kept.correct, full.correct)


def test_ignored_rows_are_not_read():
    logits, labels = randn(4, 5000), labels_for(4, 5000)
    clean = cross_entropy_(logits.clone(), labels, backend="triton")
    logits[labels == IGNORED] = torch.nan
    got = cross_entropy_(logits, labels, backend="triton")
    assert all(torch.equal(a, b) for a, b in zip(got, clean, strict=True))
    assert (logits[labels == IGNORED] == 0).all() and not logits.isnan().any()
    everything = torch.full_like(labels, 7)  # also where the ignored label is a column
    got = cross_entropy_(logits, everything, ignore_index=7, backend="triton")
    assert not got.loss.any() and not got.correct.any() and not logits.any()


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_extreme_logits(dtype):
    """Certain, hopeless, tied, far below zero, masked out with -inf or the lowest number."""
    low, high = torch.finfo(dtype).min, 1e4
    logits = torch.zeros(7, 5000, dtype=dtype, device=DEVICE)
    logits[0, 3], logits[1, 4999], logits[2, [3, 9]] = high, high, high
    logits[3] = -high
    logits[4, 5:], logits[5, :4990], logits[6, 100:] = -torch.inf, -torch.inf, low
    labels = torch.tensor([3, 3, 3, 17, 2, 4995, 50], device=DEVICE)
    exact = rows_with_gradient(logits.double(), labels, 1.0)
    plain = rows_with_gradient(logits, labels, 1.0)
    got = cross_entropy_(logits, labels, backend="triton")
    for i, result in enumerate((got.loss, got.entropy, logits)):
        check(result, exact[i], plain[i], name=("loss", "entropy", "gradient")[i])
    assert got.correct.tolist() == [True, False] + [True] * 5


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_what_is_wrong_shows():
    """A label outside the vocabulary, a nan and an infinity give nan, not a plausible number."""
    logits = randn(4, 50)
    logits[2, 7], logits[3, 7] = torch.nan, torch.inf
    labels = torch.tensor([50, -1, 3, 3], device=DEVICE)
    assert triton_ops.cross_entropy_(logits, labels).loss.isnan().all()


@pytest.mark.parametrize("n", [0, 1])
def test_few_rows(n):
    logits, labels = randn(n, 40), labels_for(n, 40)
    check_rows(logits, labels)
    for reduction in REDUCTIONS:
        x = logits.clone().requires_grad_()
        loss = cross_entropy(x, labels, reduction=reduction, backend="triton")
        want = F.cross_entropy(logits, labels, reduction=reduction)
        torch.testing.assert_close(loss.detach(), want, equal_nan=True)
        loss.sum().backward()
        assert x.grad.shape == (n, 40) and x.grad.isfinite().all()


def oracle(logits, labels, reduction, softcap):
    z = logits.to(torch.float64 if logits.dtype == torch.float64 else torch.float32)
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
    return F.cross_entropy(z, labels, reduction=reduction, ignore_index=IGNORED)


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_cross_entropy(dtype, reduction, softcap):
    wide, labels = randn(9, 1200, dtype=dtype), labels_for(9, 1200)
    logits = wide[:, :1111]
    labels = labels.where(labels < 1111, 1110)
    before = logits.clone()
    results, upstream = [], None
    for x, run in (
        (logits, None),
        (logits.double(), oracle),
        (logits, oracle),
    ):
        x = x.detach().requires_grad_()
        if run is None:
            loss = cross_entropy(x, labels, reduction=reduction, softcap=softcap, backend="triton")
            upstream = upstream_for(loss)
        else:
            loss = run(x, labels, reduction, softcap)
        results.append([loss.detach(), *torch.autograd.grad(loss, [x], upstream.to(loss.dtype))])
    for name, *triple in zip(("loss", "gradient"), *results, strict=True):
        check(*triple, factor=4.0 if triple[0].ndim == 0 else 2.0, name=name)
    assert torch.equal(logits, before)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_backward_twice(reduction):
    """A graph that is kept gives each upstream gradient its own gradient, and 1 as well as 2."""
    x, labels = randn(5, 77).requires_grad_(), labels_for(5, 77)
    loss = cross_entropy(x, labels, reduction=reduction, backend="triton")
    ones = torch.ones_like(loss)
    first = torch.autograd.grad(loss, [x], 2 * ones, retain_graph=True)[0]
    kept = first.clone()
    second = torch.autograd.grad(loss, [x], ones)[0]
    assert torch.equal(first, kept) and torch.equal(first, 2 * second)


def test_a_loss_scale_reaches_small_gradients():
    """float16 gradients of a mean vanish below 6e-8; scaled on the way they do not."""
    x, labels = torch.zeros(8, 4096, dtype=torch.float16, device=DEVICE), labels_for(8, 4096)
    x[:, 1:] -= 8.0
    x.requires_grad_()
    loss = cross_entropy(x, labels, backend="triton")
    (small,) = torch.autograd.grad(loss * 2.0**16, [x])
    assert (small[labels != IGNORED] != 0).all()


def test_logits_by_columns():
    logits, labels = randn(60, 5), labels_for(5, 60)
    x = logits.t().detach().requires_grad_()
    loss = cross_entropy(x, labels, backend="triton")
    torch.testing.assert_close(loss, F.cross_entropy(logits.t(), labels))
    loss.backward()
    want = logits.t().detach().requires_grad_()
    F.cross_entropy(want, labels).backward()
    torch.testing.assert_close(x.grad, want.grad)


# --- behind a head ----------------------------------------------------------------------------------


def head(dtype, T=15, H=20, V=301):
    hidden = randn(T, 2 * H, dtype=dtype)[:, :H]
    weight = randn(V, H, dtype=dtype, seed=1)
    labels = labels_for(T, V)
    labels[5:9] = IGNORED
    rows = (labels != IGNORED).nonzero().squeeze(1)
    return hidden, weight, labels, rows[torch.randperm(rows.numel())]


def linear_oracle(hidden, weight, labels, *, reduction, softcap=None, scale=1.0):
    logits = hidden @ weight.t()
    z = logits.to(torch.float64 if logits.dtype == torch.float64 else torch.float32) * scale
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
    return F.cross_entropy(z, labels, reduction=reduction, ignore_index=IGNORED)


@pytest.mark.parametrize("options", [{}, {"softcap": 3.0, "scale": 0.7}], ids=str)
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("chunk_rows", [4, None])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_linear_cross_entropy(dtype, chunk_rows, reduction, options):
    hidden, weight, labels, rows = head(dtype)
    results, upstream = [], None
    for low, ours in ((True, True), (False, False), (True, False)):
        leaves = [x if low else x.double() for x in (hidden, weight)]
        leaves = [x.detach().requires_grad_() for x in leaves]
        if ours:
            loss, correct = linear_cross_entropy(
                *leaves,
                labels,
                reduction=reduction,
                chunk_rows=chunk_rows,
                rows=rows,
                return_correct=True,
                backend="triton",
                **options,
            )
            upstream = upstream_for(loss)
        else:
            loss = linear_oracle(*leaves, labels, reduction=reduction, **options)
        grads = torch.autograd.grad(loss, leaves, upstream.to(loss.dtype))
        results.append([loss.detach(), *grads])
    for name, *triple in zip(("loss", "dhidden", "dweight"), *results, strict=True):
        # Of one number torch's error may happen to be nothing.
        check(*triple, factor=4.0 if triple[0].ndim == 0 else 2.0, name=name)
    guesses = (hidden.double() @ weight.double().t()).argmax(1)
    assert correct == (guesses == labels).sum() and correct.dtype == torch.int64


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_a_frozen_head_and_a_frozen_body(reduction):
    hidden, weight, labels, rows = head(torch.float32, T=10)
    options = {"reduction": reduction, "backend": "triton"}
    x, w = hidden.detach().requires_grad_(), weight.clone().requires_grad_()
    both = linear_cross_entropy(x, w, labels, rows=rows, chunk_rows=4, **options)
    both.sum().backward()
    y = hidden.detach().requires_grad_()
    linear_cross_entropy(y, weight, labels, chunk_rows=4, **options).sum().backward()
    torch.testing.assert_close(y.grad, x.grad)
    v = weight.clone().requires_grad_()
    linear_cross_entropy(hidden, v, labels, chunk_rows=4, **options).sum().backward()
    torch.testing.assert_close(v.grad, w.grad)
    with torch.no_grad():
        quiet = linear_cross_entropy(x, w, labels, rows=rows, chunk_rows=4, **options)
    assert torch.equal(quiet, both.detach()) and not quiet.requires_grad


@pytest.mark.parametrize("T", [0, 1, 5])
def test_nothing_to_train(T):
    labels = torch.full((T,), IGNORED, device=DEVICE)
    for rows in (None, labels[:0]):
        x, w = randn(T, 8).requires_grad_(), randn(30, 8).requires_grad_()
        options = {"rows": rows, "backend": "triton"}
        loss, correct = linear_cross_entropy(
            x, w, labels, reduction="sum", return_correct=True, **options
        )
        loss.backward()
        assert loss == 0 and correct == 0 and not x.grad.any() and not w.grad.any()
        assert linear_cross_entropy(x, w, labels, **options).isnan()
        each = linear_cross_entropy(x, w, labels, reduction="none", **options)
        assert each.tolist() == [0.0] * T


def test_one_row_with_the_last_label():
    hidden, weight = randn(1, 8), randn(30, 8)
    labels = torch.tensor([29], device=DEVICE)
    loss = linear_cross_entropy(hidden, weight, labels, backend="triton")
    torch.testing.assert_close(loss, F.cross_entropy(hidden @ weight.t(), labels))


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_autocast(reduction):
    hidden, weight, labels, rows = head(torch.float32)
    x, w = hidden.detach().requires_grad_(), weight.clone().requires_grad_()
    options = {"rows": rows, "reduction": reduction, "backend": "triton"}
    with torch.autocast(DEVICE, torch.float16):
        ours = linear_cross_entropy(x, w, labels, **options)
    low = [t.half().detach().requires_grad_() for t in (hidden, weight)]
    want = linear_cross_entropy(*low, labels, **options)
    assert torch.equal(ours, want)
    upstream = upstream_for(ours)
    got = torch.autograd.grad(ours, [x, w], upstream)
    for g, w in zip(got, torch.autograd.grad(want, low, upstream), strict=True):
        assert g.dtype == torch.float32
        torch.testing.assert_close(g, w.float(), rtol=2**-10, atol=1e-7)


def test_backend_makes_no_difference():
    hidden, weight, labels, _ = head(torch.float32)
    ours = linear_cross_entropy(hidden, weight, labels, softcap=5.0, scale=2.0, backend="triton")
    theirs = reference.linear_cross_entropy(hidden, weight, labels, softcap=5.0, scale=2.0)
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    "rows,most,want",
    [(0, 2048, 128), (1, 2048, 128), (2048, 2048, 2048), (2049, 2048, 1152), (5000, 2048, 1792),
     (37, 5, 5), (4096, 4096, 4096), (300, 200, 200)],
)  # fmt: skip
def test_chunks_are_even(rows, most, want):
    assert triton_ops._even_chunk(rows, most) == want
    sizes = [x.numel() for x in torch.empty(rows).split(want)]
    assert len(sizes) == max(-(-rows // most), 1)


@pytest.mark.parametrize("V,want", [(128256, 2048), (32000, 4096), (256000, 1024), (50257, 4096)])
def test_a_chunk_of_logits_is_about_half_a_gigabyte(V, want):
    assert triton_ops._chunk_rows(V) == want


# --- on the device ------------------------------------------------------------------------------------


def meta(*shape, dtype=torch.bfloat16):
    return torch.empty(*shape, dtype=dtype, device="meta")


@pytest.mark.parametrize("train_head", [False, True])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_no_host_synchronisation_and_no_more_launches_than_needed(reduction, train_head):
    """On meta tensors reading a value raises, so what runs on them never waits for the device."""
    hidden = meta(9000, 512).requires_grad_()
    weight = meta(128256, 512).requires_grad_(train_head)
    labels, rows = meta(9000, dtype=torch.int64), meta(5000, dtype=torch.int64)
    with gate.record_launches() as recording:
        loss = linear_cross_entropy(hidden, weight, labels, reduction=reduction, rows=rows)
        loss.backward(torch.empty_like(loss))
    again = 1 + (reduction == "none")  # its gradient is computed in backward
    sizes = [x.args[0].shape for x in recording.launches]
    assert sizes == [(1792, 128256), (1792, 128256), (1416, 128256)] * again
    assert hidden.grad.shape == hidden.shape and (weight.grad is not None) == train_head
    gradient = [x.options["GRADIENT"] for x in recording.launches]
    assert gradient == [reduction != "none"] * 3 + [True] * 3 * (again - 1)


class Operations(TorchDispatchMode):
    """Notes what torch computes: the name of each operation, and the largest result."""

    def __init__(self):
        super().__init__()
        self.names, self.largest = [], 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        self.names.append(function.overloadpacket.__name__)
        for tensor in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(tensor, torch.Tensor):
                self.largest = max(self.largest, tensor.numel())
        return out


def test_a_frozen_head_is_two_products_a_piece_and_nothing_large():
    hidden, weight = meta(9000, 512).requires_grad_(), meta(128257, 512)
    labels, rows = meta(9000, dtype=torch.int64), meta(5000, dtype=torch.int64)
    with gate.record_launches() as recording, Operations() as operations:
        linear_cross_entropy(hidden, weight, labels, reduction="sum", rows=rows).backward()
    count = operations.names.count
    assert count("mm") == 6 and len(recording.launches) == 3 and not count("addmm")
    assert count("index_select") == 6 and count("index_copy_") == 1 and count("mul") == 1
    assert operations.largest == 1792 * 128320  # one piece, rows at a multiple of 128 bytes
    small = ("cat", "sum", "ones_like", "zeros", "mul", "new_zeros", "index_copy_")
    assert sum(count(name) for name in small) == 9, operations.names


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_cross_entropy_waits_for_nothing(reduction):
    logits, labels = meta(8192, 128256).requires_grad_(), meta(8192, dtype=torch.int64)
    with gate.record_launches() as recording:
        cross_entropy(logits, labels, reduction=reduction).sum().backward()
    first, second = recording.launches
    assert not first.options["GRADIENT"] and second.options["GRADIENT"]
    assert first.grid == (8192,) and second.args[1] is not second.args[0]  # the logits stay


BAD = [
    ({"logits": randn(3, 2, 4)}, r"logits must be \[n, V\]"),
    ({"logits": randn(3, 0)}, r"logits must be \[n, V\]"),
    ({"logits": randn(3, 8).int()}, "logits must be floating point"),
    ({"logits": randn(8, 3).t()}, "logits must have contiguous rows that do not overlap"),
    ({"logits": randn(1, 8).expand(3, 8)}, "logits must have contiguous rows that do not overlap"),
    ({"labels": labels_for(2, 8)}, r"labels must be \[T\] = \[3\]"),
    ({"labels": labels_for(3, 8).int()}, "labels must be int64"),
    ({"softcap": 0.0}, "softcap must be positive"),
    ({"scale": 0.0}, "scale must be positive"),
    (
        {"gradient_scale": randn(2)},
        r"gradient_scale must be a number, or torch.float32 \[\] or \[3\]",
    ),
    ({"gradient_scale": randn(3).half()}, "gradient_scale must be a number"),
    ({"out": randn(3, 7)}, r"out must be \[n, V\] = \[3, 8\]"),
    ({"out": randn(3, 8).half()}, "out takes a gradient of"),
    ({"out": randn(3, 8), "gradient_scale": None}, "out takes a gradient of"),
    ({"out": randn(1, 8).expand(3, 8)}, "out must have contiguous rows"),
]


@pytest.mark.parametrize("change,message", BAD, ids=[m[:40] for _, m in BAD])
def test_bad_arguments(change, message):
    given = {"logits": randn(3, 8), "labels": labels_for(3, 8), **change}
    with pytest.raises(ValueError, match=message):
        cross_entropy_(given.pop("logits"), given.pop("labels"), **given)
