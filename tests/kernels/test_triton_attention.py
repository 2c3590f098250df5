"""Attention's kernels against float64, their references against autograd, and which rows a program has."""

import math
import mmap
import random
from contextlib import contextmanager

import pytest
import torch
import triton
import triton.language as tl
from fastsft_kernels import launch as gate
from fastsft_kernels import lora_dropout_mask, reference, varlen_attention
from fastsft_kernels.dropout import keep_scale
from fastsft_kernels.fused import (
    Adapters,
    AttentionOptions,
    StripDropout,
    attention_backward,
    attention_blocks,
    attention_delta,
    attention_forward,
)
from fastsft_kernels.launch import forced, launch, record_launches
from fastsft_kernels.triton_ops import attention
from fastsft_kernels.triton_ops import attention_backward as backward_file
from fastsft_kernels.triton_ops.attention_tiles import locate
from kernel_checks import (  # noqa: F401
    DEVICE,
    DTYPES,
    check,
    check_gradients,
    poisoned_memory,
    randn,
)
from test_attention import CASES, cu_seqlens, oracle

# Rows behind the end of a document may see no key at all; what they divide by 0 is not stored.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")
# Just above a tile of 128 rows (float32 has tiles of 32), beside documents of a few and no tokens.
LENGTHS = [1, 0, 135, 2, 64, 0]
SHORTER = [1, 0, 70, 2, 32, 0]


def qkv(lengths, heads=2, groups=1, size=16, dtype=torch.float32):
    """Views of one buffer, as a fused product leaves them."""
    buffer = randn(sum(lengths), heads + 2 * groups, size, dtype=dtype)
    return buffer.split([heads, groups, groups], 1)


def bounds(lengths):
    return cu_seqlens(lengths).to(DEVICE)


def both(lengths, listed=False, **options):
    """The kernels and the reference, as functions of q, k, v."""
    cu = bounds(lengths)
    blocks = attention_blocks(lengths, DEVICE) if listed else None
    most = max(lengths, default=0)

    def run(backend, blocks=None):
        return lambda q, k, v: varlen_attention(
            q, k, v, cu, most, **options, lengths=lengths, blocks=blocks, backend=backend
        )

    return run("triton", blocks), run("reference")


def raw(q, k, v, do, lengths, backend="triton", **options):
    """o, lse, delta and the three gradients by the functions of the fast engine."""
    cu, options = bounds(lengths), AttentionOptions(max(lengths, default=0), **options)
    o, lse = attention_forward(q, k, v, cu, options, backend=backend)
    delta = attention_delta(o, do, backend=backend)
    grads = attention_backward(do, q, k, v, lse, delta, cu, options, backend=backend)
    return o, lse, delta, *grads


# The references of the raw functions, in float64, against autograd of the one that transformers proves.


@pytest.mark.parametrize("options", CASES, ids=str)
def test_references_are_autograds(options):
    lengths = [3, 0, 12, 1]
    q, k, v = (x.double().requires_grad_() for x in qkv(lengths, 4, 2, 6))
    o = varlen_attention(q, k, v, bounds(lengths), 12, **options, backend="reference")
    do = randn(*o.shape, seed=5).double()
    want = torch.autograd.grad(o, [q, k, v], do)
    got = raw(q.detach(), k.detach(), v.detach(), do, lengths, "reference", **options)
    torch.testing.assert_close(got[0], o)
    torch.testing.assert_close(got[2], (o * do).sum(-1).t())
    for g, w in zip(got[3:], want, strict=True):
        torch.testing.assert_close(g, w)
    # the sum of exponentials, by its definition, in the last row of the longest document
    row = k.detach()[3:15].repeat_interleave(2, 1)
    scores = torch.einsum("hd,jhd->hj", q.detach()[14], row) * options.get("scale", 6**-0.5)
    if cap := options.get("softcap"):
        scores = cap * torch.tanh(scores / cap)
    scores = scores[:, -options.get("window", 12) :]
    torch.testing.assert_close(got[1][:, 14], scores.logsumexp(-1))


@pytest.mark.parametrize("p", [0.0, 0.3])
def test_delta_reference_is_autograds(p):
    """Of y = o·Wᵀ + scaling · (mask ∘ o)·Aᵀ·Bᵀ."""
    T, heads, size, rank, scaling = 9, 3, 8, 16, 0.7
    o = randn(T, heads, size).double().requires_grad_()
    w, a, b = (randn(*s).double() for s in ((5, 24), (rank, 24), (5, rank)))
    dropout = StripDropout(p, 3, 4, (5,), torch.arange(T) + 7) if p else None
    flat = o.flatten(1)
    masked = flat * lora_dropout_mask(dropout.key(0), 24, p) * keep_scale(p) if p else flat
    y = flat @ w.t() + scaling * masked @ a.t() @ b.t()
    dy = randn(T, 5, seed=1).double()
    (want,) = torch.autograd.grad(y, [o], dy)
    do = (dy @ w).view_as(o)
    adapters = Adapters(dy @ b, a, dropout, scaling * (keep_scale(p) if p else 1.0))
    delta = reference.attention_delta(o.detach(), do, adapters=adapters)
    torch.testing.assert_close(do, want)
    torch.testing.assert_close(delta, (want * o.detach()).sum(-1).t())


# Which rows a program has.


@triton.jit(do_not_specialize=["documents", "steps"])
def _mark(cu, blocks, out, documents, steps, ROWS: tl.constexpr):
    start, length, first = locate(cu, blocks, tl.program_id(0), documents, steps, ROWS)
    if first < length:
        tl.store(out + tl.program_id(0) * 2, start + first)
        tl.store(out + tl.program_id(0) * 2 + 1, tl.minimum(length - first, ROWS))


@pytest.mark.parametrize("rows", [32, 128])
@pytest.mark.parametrize("listed", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_every_row_belongs_to_one_program(seed, listed, rows):
    draw = random.Random(seed)
    lengths = [draw.choice([0, 1, 2, 31, 32, 33, 127, 128, 129, 300]) for _ in range(11 * seed + 1)]
    T, blocks = sum(lengths), attention_blocks(lengths, DEVICE) if listed else None
    programs = len(blocks) * 128 // rows if listed else T // rows + len(lengths)
    out = torch.zeros(programs, 2, dtype=torch.int64, device=DEVICE)
    count = len(lengths)
    launch(_mark, (programs,), bounds(lengths), blocks, out, count, count.bit_length(), ROWS=rows)
    marked = sorted(map(tuple, out[out[:, 1] > 0].tolist()))
    want, start = [], 0
    for n in lengths:
        want += [(start + i, min(rows, n - i)) for i in range(0, n, rows)]
        start += n
    assert marked == want


def test_the_list_is_exact_and_its_longest_come_first():
    blocks = attention_blocks([5, 0, 300, 128, 129], DEVICE).tolist()
    assert blocks == [[2, 256], [2, 128], [4, 128], [2, 0], [3, 0], [4, 0], [0, 0]]
    assert attention_blocks([], DEVICE).shape == (0, 2)
    assert attention_blocks([7], "meta").shape == (1, 2)


# Forward and gradients.


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", CASES, ids=str)
def test_attention(options, dtype):
    options = {k: 8 * v - 5 if k == "window" else v for k, v in options.items()}
    lengths = SHORTER if dtype == torch.float32 else LENGTHS
    ours, plain = both(lengths, **options)
    check_gradients(ours, plain, qkv(lengths, dtype=dtype), names="qkv")


def test_a_window_of_one_token():
    """Each sees itself: o is v, dv is do, and dq, exactly 0, is what two ways of do·v differ by."""
    q, k, v = qkv(SHORTER, 1, 1)
    do = randn(*q.shape, seed=3)
    o, _, _, dq, dk, dv = raw(q, k, v, do, SHORTER, window=1)
    assert torch.equal(o, v) and torch.equal(dv, do)
    assert dq.abs().max() < 1e-5 and dk.abs().max() < 1e-5


@pytest.mark.parametrize("options", [{}, {"causal": False}, {"window": 40}], ids=str)
def test_a_list_of_blocks_changes_nothing(options):
    """To the last bit: each row is computed as without it, only by another program."""
    lengths = [1, 0, 135, 2, 128]
    q, k, v = qkv(lengths, dtype=torch.float16)
    do = randn(*q.shape, dtype=torch.float16, seed=3)
    without = raw(q, k, v, do, lengths, **options)
    listed = raw(q, k, v, do, lengths, **options, blocks=attention_blocks(lengths, DEVICE))
    assert all(torch.equal(a, b) for a, b in zip(without, listed, strict=True))


@pytest.mark.parametrize("heads,groups", [(3, 3), (6, 2), (4, 1)])
def test_grouped_heads(heads, groups):
    lengths = [40, 3]
    ours, plain = both(lengths, listed=True)
    check_gradients(ours, plain, qkv(lengths, heads, groups, dtype=torch.float16), names="qkv")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [1, 20, 72, 80, 96, 128, 256])
def test_head_sizes(size, dtype):
    lengths = [37, 1]
    ours, plain = both(lengths)
    check_gradients(ours, plain, qkv(lengths, 1, 1, size, dtype), names="qkv")


@contextmanager
def card(capability):
    """The interpreter takes itself for another card, whose configurations then run."""
    before, gate._INTERPRETED = gate._INTERPRETED, (capability, 4)
    try:
        yield
    finally:
        gate._INTERPRETED = before


def tilings():
    """Every pair of tile sizes among all pinned configurations once: (card, head size, candidate)."""
    tables = [attention._TABLE, backward_file._KEYS, backward_file._QUERIES]
    tables += [backward_file._DK_ALONE, backward_file._DV_ALONE]
    seen, found = set(), set()
    for n, table in enumerate(tables):
        for kind, capability in {"90": 90, "80": 80, "100": 100, "small": 86}.items():
            for size, candidates in table.get(kind, {}).items():
                for i, (rows, keys, _, _) in enumerate(candidates):
                    if (n, size, rows, keys) not in seen and i:  # the first run everywhere else
                        found.add((capability, size, i))
                    seen.add((n, size, rows, keys))
    return sorted(found | {(80, 128, 0), (80, 256, 0), (86, 256, 0), (100, 256, 0)})


@pytest.mark.skipif(DEVICE == "cuda", reason="a GPU's own candidates: python -m bench.gpu")
@pytest.mark.parametrize("capability,size,number", tilings())
def test_every_configuration(capability, size, number):
    lengths = [132, 5]
    ours, plain = both(lengths, listed=number % 2 == 0, window=70)
    kernels = ["forward", "backward_keys", "backward_queries", "backward_dk", "backward_dv"]
    with card(capability), forced(**{f"attention_{k}_d{size}": number for k in kernels}):
        check_gradients(ours, plain, qkv(lengths, 1, 1, size, torch.float16), names="qkv")


def test_attention_is_transformers_with_window_and_softcap():
    """Gemma 2's eager attention, forward and gradients, in float32."""
    lengths, options = [10, 70], {"window": 24, "softcap": 3.0, "scale": 0.25}
    ours, _ = both(lengths, **options)
    q, k, v = (x.clone().requires_grad_() for x in qkv(lengths, 2, 1, 24))
    theirs, got = oracle(q, k, v, lengths, **options), ours(q, k, v)
    torch.testing.assert_close(got, theirs, rtol=1e-5, atol=2e-6)
    upstream = randn(*got.shape, seed=1)
    for g, w in zip(
        *(torch.autograd.grad(o, [q, k, v], upstream) for o in (got, theirs)), strict=True
    ):
        torch.testing.assert_close(g, w, rtol=1e-5, atol=5e-6)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("softcap", [None, 50.0])
def test_raw_functions_are_their_references(softcap, dtype):
    """lse and delta too: float32 whatever the inputs are. A large cap makes tanh's argument small."""
    lengths = SHORTER if dtype == torch.float32 else LENGTHS
    q, k, v = qkv(lengths, dtype=dtype)
    do = randn(*q.shape, dtype=dtype, seed=3)
    got = raw(q, k, v, do, lengths, softcap=softcap)
    plain = raw(q, k, v, do, lengths, "reference", softcap=softcap)
    exact = raw(*(x.double() for x in (q, k, v, do)), lengths, "reference", softcap=softcap)
    names = ["o", "lse", "delta", "dq", "dk", "dv"]
    for name, *three in zip(names, got, exact, plain, strict=True):
        check(*three, name=name)


def test_nothing_of_a_neighbour_enters():
    """A document is the same, to the last bit, whatever the others hold, and where it stands.

    Of 200 rows: blocks of 64 queries that all see the first 128 keys, and a part of one behind them.
    """
    lengths = [1, 0, 200, 2, 64, 0]
    q, k, v = (x.clone() for x in qkv(lengths, dtype=torch.float16))
    do = randn(*q.shape, dtype=torch.float16, seed=3)
    rows = slice(1, 201)
    want = raw(*(x[rows] for x in (q, k, v, do)), [200])
    for x in (q, k, v, do):
        x[:1], x[201:] = math.nan, math.nan
    got = raw(q, k, v, do, lengths)
    for g, w in zip(got, want, strict=True):
        assert torch.equal(g[:, rows] if g.dim() == 2 else g[rows], w)


@pytest.mark.parametrize("dtype", DTYPES)
def test_outputs_at_a_pitch(dtype):
    """Gradients of q, k and v in one wider buffer; what lies outside stays as it was."""
    lengths = [3, 0, 45]
    heads, groups, size, T = 2, 1, 20, sum(lengths)
    q, k, v = qkv(lengths, heads, groups, size, dtype)
    do = randn(*q.shape, dtype=dtype, seed=3)
    want = raw(q, k, v, do, lengths)
    cu, options = bounds(lengths), AttentionOptions(45)
    wide = torch.full((T, 8 + heads * size), math.nan, dtype=dtype, device=DEVICE)
    out = wide[:, 8:].unflatten(1, (heads, size))
    o, lse = attention_forward(q, k, v, cu, options, out=out, backend="triton")
    assert o is out and torch.equal(o, want[0]) and wide[:, :8].isnan().all()
    buffer = torch.full((T, heads + 2 * groups + 1, size + 4), math.nan, dtype=dtype, device=DEVICE)
    grads = buffer[:, :-1, :size].split([heads, groups, groups], 1)
    attention_backward(do, q, k, v, lse, want[2], cu, options, out=grads, backend="triton")
    assert all(torch.equal(g, w) for g, w in zip(grads, want[3:], strict=True))
    assert int(buffer.isnan().sum()) == buffer.numel() - sum(g.numel() for g in grads)


def test_upstream_gradients_of_any_strides():
    lengths = [20, 5]
    ours, plain = both(lengths)
    q, k, v = (x.clone().requires_grad_() for x in qkv(lengths))
    transposed = q.detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_()
    got = torch.autograd.grad(ours(transposed, k, v).sum(), [transposed, k, v])  # strides of 0
    want = torch.autograd.grad(plain(q, k, v).sum(), [q, k, v])
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "lengths", [[0], [0, 0, 0], [1], [1] * 20, [0, 40, 0, 0]], ids=lambda x: f"{x[:4]} {len(x)}"
)
@pytest.mark.parametrize("listed", [False, True])
def test_small_and_empty_documents(lengths, listed):
    ours, plain = both(lengths, listed=listed)
    inputs = qkv(lengths, 1, 1, dtype=torch.float16)
    check_gradients(ours, plain, inputs, terms=4.0, names="qkv")  # a token alone: dp - delta is 0
    assert both([], listed)[0](*qkv([], 1, 1)).shape == (0, 1, 16)


@pytest.mark.skipif(DEVICE == "cuda", reason="6 GB of pages that are mapped, not touched")
@pytest.mark.parametrize(
    "lengths,heads,token,head", [([270, 30], 1, 1 << 23, 0), ([20, 5], 3, 256, 1 << 30)]
)
def test_rows_beyond_32_bits(lengths, heads, token, head):
    """The last tokens, or heads, lie past 2^31 numbers. Pages that nothing reads cost nothing."""
    size, lazily = 16, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x4000
    memory = mmap.mmap(-1, 3 << 31, flags=lazily)
    far = torch.frombuffer(memory, dtype=torch.float16)
    q, k, v = qkv(lengths, heads, 1, size, torch.float16)
    near = (q, k, v, randn(*q.shape, dtype=torch.float16, seed=3))
    want = raw(*near, lengths)
    likes = (*near, q, q, k, v)
    places = [far.as_strided(x.shape, (token, head, 1), 16 * i) for i, x in enumerate(likes)]
    for place, x in zip(places, near, strict=False):
        place.copy_(x)
    *inputs, do, out, dq, dk, dv = places
    cu, options = bounds(lengths), AttentionOptions(max(lengths))
    o, lse = attention_forward(*inputs, cu, options, out=out, backend="triton")
    delta = attention_delta(o, do, backend="triton")
    grads = (dq, dk, dv)
    attention_backward(do, *inputs, lse, delta, cu, options, out=grads, backend="triton")
    got = (o, lse, delta, *grads)
    assert all(torch.equal(g, w) for g, w in zip(got, want, strict=True))


# delta.


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rank,p", [(0, 0.0), (16, 0.0), (48, 0.3), (128, 0.3)])
@pytest.mark.parametrize("T,heads,size", [(70, 2, 64), (1, 3, 72)])
def test_delta(T, heads, size, rank, p, dtype):
    """do at a pitch, read and, with adapters, written in place; outside it nothing changes."""
    o = randn(T, heads, size, dtype=dtype)
    buffer = torch.full((T, heads * size + 16), math.nan, dtype=dtype, device=DEVICE)
    do = buffer[:, : heads * size].unflatten(1, (heads, size))
    do.copy_(randn(T, heads, size, dtype=dtype, seed=1))
    adapters = wide = None
    if rank:
        d = randn(T, rank + 16, dtype=dtype)[:, :rank]
        a = randn(rank, heads * size, dtype=dtype, scale=rank**-0.5)
        rows = torch.arange(T, device=DEVICE) * (1 << 24) + 9
        dropout = StripDropout(p, 2**32 - 1, 3, (7,), rows) if p else None
        adapters = Adapters(d, a, dropout, 0.7)
        wide = Adapters(d.double(), a.double(), dropout, 0.7)
    exact_do, plain_do = do.double(), do.clone()
    exact = reference.attention_delta(o.double(), exact_do, adapters=wide)
    plain = reference.attention_delta(o, plain_do, adapters=adapters)
    got = attention_delta(o, do, adapters=adapters, backend="triton")
    check(got, exact, plain, name="delta")
    check(do.clone(), exact_do, plain_do, name="do")
    assert buffer[:, heads * size :].isnan().all()


@pytest.mark.parametrize("size", [64, 256])
def test_every_configuration_of_delta(size):
    o, do = randn(40, 2, size, dtype=torch.float16), randn(40, 2, size, dtype=torch.float16, seed=1)
    want = attention_delta(o, do, backend="triton")
    with forced(**{f"attention_delta_d{size}": 1}):
        torch.testing.assert_close(attention_delta(o, do, backend="triton"), want)
    assert attention_delta(o[:0], do[:0], backend="triton").shape == (2, 0)


# What is launched, and what is refused.


def test_launches_of_a_step_and_their_grids():
    """On meta tensors nothing can be read: what runs there waits for nothing on a GPU either."""
    lengths = [4096, 20, 4076]
    q, k, v = torch.empty(8192, 48, 128, dtype=torch.bfloat16, device="meta").split([32, 8, 8], 1)
    cu = torch.empty(4, dtype=torch.int32, device="meta")
    for blocks, programs in ((attention_blocks(lengths, "meta"), 32 + 1 + 32), (None, 64 + 3)):
        with record_launches(90) as recording:
            leaves = [x.detach().requires_grad_() for x in (q, k, v)]
            varlen_attention(*leaves, cu, 4096, lengths=lengths, blocks=blocks).sum().backward()
        assert [(x.kernel.fn.__name__, x.grid[0]) for x in recording.launches] == [
            ("_forward", programs * 32),
            ("_delta", 8192 // 64 * 32),
            ("_key_gradients", programs * 8),
            ("_query_gradients", programs * 32),
        ]


def test_large_heads_run_the_reference():
    q, k, v = qkv([3], 1, 1, 264)
    with record_launches():  # a GPU's choice
        o = varlen_attention(
            *(x.to("meta") for x in (q, k, v)), bounds([3]).to("meta"), 3, lengths=[3]
        )
    assert o.shape == q.shape
    with pytest.raises(ValueError, match=r"up to 256 numbers; got .*264.* Pass backend=None"):
        varlen_attention(q, k, v, bounds([3]), 3, backend="triton")


Q = torch.randn(6, 2, 8)
CU = torch.tensor([0, 6], dtype=torch.int32)
STATISTICS = torch.zeros(2, 6)
FITS = AttentionOptions(6)
TERM = Adapters(torch.zeros(6, 16), torch.zeros(16, 16))
DROPPED = StripDropout(0.1, 0, 0, (1, 2), torch.arange(6))
BAD = [
    (varlen_attention, (Q, Q, Q, CU, 6), {"scale": 0.0}, "scale must be positive; got 0.0"),
    (varlen_attention, (Q, Q, Q, CU, 6), {"blocks": CU}, r"blocks must be int32 \[n, 2\]"),
    (attention_forward, (Q, Q, Q, CU, FITS._replace(window=0)), {}, "window must be at least 1"),
    (attention_forward, (Q, Q, Q, CU.long(), FITS), {}, "cu_seqlens must be int32"),
    (attention_forward, (Q, Q, Q, CU, FITS), {"out": Q[:3]}, "out must be of q's shape"),
    (
        attention_forward,
        (Q, Q, Q, CU, FITS),
        {"out": Q.mT.contiguous().mT},
        "must lie side by side",
    ),
    (attention_backward, (Q[:3], Q, Q, Q, STATISTICS, STATISTICS, CU, FITS), {}, "do must be of"),
    (attention_backward, (Q, Q, Q, Q, STATISTICS.t(), STATISTICS, CU, FITS), {}, "lse must be"),
    (
        attention_backward,
        (Q, Q, Q, Q, STATISTICS, STATISTICS.half(), CU, FITS),
        {},
        "delta must be",
    ),
    (
        attention_backward,
        (Q, Q, Q, Q, STATISTICS, STATISTICS, CU, FITS),
        {"out": (Q, Q[:2], Q)},
        "out's dk must be of k's shape",
    ),
    (attention_delta, (Q[0], Q[0]), {}, r"o must be \[T, H, D\]"),
    (attention_delta, (Q, Q[:3]), {}, "do must be of o's shape"),
    (attention_delta, (Q, Q), {"adapters": TERM._replace(a=TERM.a[:, :8])}, "adapters.a must be"),
    (attention_delta, (Q, Q.mT.contiguous().mT), {"adapters": TERM}, "must lie side by side"),
    (
        attention_delta,
        (Q, Q),
        {"adapters": Adapters(torch.zeros(6, 32), torch.zeros(32, 16), DROPPED)},
        "one strip",
    ),
]


@pytest.mark.parametrize(
    "op,args,kwargs,message", BAD, ids=[f"{c[0].__name__}-{c[3][:20]}" for c in BAD]
)
def test_bad_arguments(op, args, kwargs, message):
    with pytest.raises(ValueError, match=message) as caught:
        op(*args, **kwargs)
    assert str(caught.value).startswith(op.__name__ + ": ") and "; got " in str(caught.value)
