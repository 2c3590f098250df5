"""Tails and the gradients of A and B: the kernels against float64, their references against autograd."""

import inspect

import pytest
import torch
from fastsft_kernels import DropoutKey, fused, lora_dropout_mask, reference
from fastsft_kernels.dropout import keep_scale
from fastsft_kernels.fused import NormedInput, StripDropout, skinny_dA, skinny_dB, tails
from fastsft_kernels.launch import forced, record_launches
from kernel_checks import DEVICE, DTYPES, check, poisoned_memory, randn  # noqa: F401

P, SCALING, EPS = 0.3, 0.7, 1e-6
WIDTHS = (16, 32, 64, 128, 256)  # of a program's tile, which configurations are named after


def strip_dropout(T, modules=(5, 2**32 - 1, 1)):
    rows = torch.arange(T, device=DEVICE) * (1 << 24) + 9
    return StripDropout(P, 2**32 - 1, 3, modules, rows)


def normed(x, weight, offset):
    rstd = torch.rsqrt(x.double().square().mean(1) + EPS)
    return NormedInput(rstd.float(), weight, offset)


def doubled(x):
    """An argument in float64, where it is floating point."""
    if isinstance(x, NormedInput):
        return NormedInput(x.rstd.double(), x.weight.double(), x.offset)
    return x.double() if isinstance(x, torch.Tensor) else x


def pitched(rows, columns, pitch, dtype, ahead=0):
    """A view at a row pitch, and the buffer of NaN that it lies in."""
    buffer = torch.full((rows, pitch), float("nan"), dtype=dtype, device=DEVICE)
    return buffer[:, ahead : ahead + columns], buffer


def outside_untouched(view, buffer):
    view.zero_()
    return int(buffer.isnan().sum()) == buffer.numel() - view.numel()


def assert_sum(got, reference_op, *args, **kwargs):
    """A float32 sum over rows against the reference in float64.

    The reference rounds as float32 does. Matrix units add products of half precision with
    truncation instead: up to 4e-8 of the sum for each 16 rows, which no float32 product shows, so
    on a GPU those sums get a factor of their own.
    """
    half = args[0].dtype != torch.float32 and DEVICE == "cuda"
    exact = reference_op(*map(doubled, args), **{k: doubled(v) for k, v in kwargs.items()})
    plain = reference_op(*args, **kwargs)
    assert got.dtype == torch.float32
    check(got, exact, plain, factor=20.0 if half else 2.0)


# The references against autograd over the plain formula, in float64.


@pytest.mark.parametrize("offset", [None, 0.0, 1.0])
@pytest.mark.parametrize("p", [0.0, P])
def test_references_are_autograds(p, offset):
    T, K, R, segments = 13, 24, 4, (10, 3, 7)
    x, weight = (randn(*s, seed=1).double() for s in ((T, K), (K,)))
    a = randn(3 * R, K).double().requires_grad_()
    bs = [randn(n, R, seed=n).double().requires_grad_() for n in segments]
    dropout = strip_dropout(T) if p else None
    z, norm = x, None
    if offset is not None:
        norm = NormedInput(torch.rsqrt(x.square().mean(1) + EPS), weight, offset)
        z = x * norm.rstd[:, None] * (weight + offset)
    scaling = SCALING * (keep_scale(p) if p else 1.0)
    outputs, ts = [], []
    for i, b in enumerate(bs):
        key = DropoutKey(2**32 - 1, 3, strip_dropout(T).modules[i], strip_dropout(T).rows)
        masked = z * lora_dropout_mask(key, K, p) if p else z
        ts.append(scaling * masked @ a[i * R : (i + 1) * R].t())
        outputs.append(ts[-1] @ b.t())
    dy = randn(T, sum(segments), seed=9).double()
    da, *dbs = torch.autograd.grad(torch.cat(outputs, 1), [a, *bs], dy)

    with torch.no_grad():
        t = reference.tails(z, a, scaling, dropout=dropout)
        torch.testing.assert_close(t, torch.cat(ts, 1))
        got_db = reference.skinny_dB(dy, t, segments)
        torch.testing.assert_close(got_db, torch.cat(dbs))
        d = torch.cat([g @ b for g, b in zip(dy.split(segments, 1), bs, strict=True)], 1)
        got_da = reference.skinny_dA(d, x, scaling, norm=norm, dropout=dropout)
        torch.testing.assert_close(got_da, da)
        torch.testing.assert_close(
            reference.skinny_dA(d, x, scaling, norm=norm, dropout=dropout, out=got_da.clone()),
            2 * da,
        )
        torch.testing.assert_close(
            reference.skinny_dB(dy, t, segments, out=got_db.clone()), 2 * torch.cat(dbs)
        )


# Tails.


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "T,K,columns",
    [(70, 200, 48), (1, 64, 16), (33, 1, 3), (5, 600, 1), (129, 96, 144)],
)
def test_tails(T, K, columns, dtype):
    x, a = randn(T, K, dtype=dtype), randn(columns, K, dtype=dtype, seed=1)
    got = tails(x, a, SCALING, backend="triton")
    exact = reference.tails(x.double(), a.double(), SCALING)
    check(got, exact, reference.tails(x, a, SCALING))
    # and at least as exact as torch's own two operations
    check(got, exact, (x @ a.t()) * SCALING)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("strip", [16, 48, 5])
def test_tails_with_dropout(strip, dtype):
    T, K = 67, 150
    x, a = randn(T, K, dtype=dtype), randn(3 * strip, K, dtype=dtype, seed=1)
    dropout = strip_dropout(T)
    got = tails(x, a, SCALING, dropout=dropout, backend="triton")
    exact = reference.tails(x.double(), a.double(), SCALING, dropout=dropout)
    check(got, exact, reference.tails(x, a, SCALING, dropout=dropout))


@pytest.mark.parametrize("T", [20, 300])  # in slices of K with a second launch, and without
def test_tails_behind_x_in_one_buffer(T):
    """Written at the pitch where the augmented product reads them, x and the rest left alone."""
    K, columns = 1100, 32
    buffer = torch.full((T, K + 64), float("nan"), device=DEVICE)
    x, out = buffer[:, :K], buffer[:, K : K + columns]
    x.copy_(randn(T, K))
    before, a = x.clone(), randn(columns, K, seed=1)
    assert tails(x, a, SCALING, out=out, backend="triton") is out
    exact = reference.tails(before.double(), a.double(), SCALING)
    check(out, exact, reference.tails(before, a, SCALING))
    assert torch.equal(x, before)
    assert outside_untouched(buffer[:, : K + columns], buffer)


@pytest.mark.parametrize("backend", ["triton", "reference"])
@pytest.mark.parametrize(
    "T,K,columns,padding", [(5, 40, 16, 8), (70, 64, 48, 16), (3, 1200, 32, 32)]
)
@pytest.mark.parametrize("strips", [None, 2])
def test_padding_is_zeroed_and_a_copy_made(T, K, columns, padding, strips, backend):
    """Also where K is cut into slices and a second launch adds them up (K = 1200)."""
    x, a = randn(T, K), randn(columns, K, seed=1)
    dropout = strips and StripDropout(0.25, 3, 4, tuple(range(strips)), torch.arange(T))
    buffer = torch.full((T, columns + padding + 5), torch.nan)
    copy = torch.full((T, columns), torch.nan)
    out = buffer[:, : columns + padding]
    found = tails(x, a, SCALING, dropout=dropout, out=out, copy=copy, backend=backend)
    assert found is out
    exact = reference.tails(x.double(), a.double(), SCALING, dropout=dropout)
    check(out[:, :columns], exact, reference.tails(x, a, SCALING, dropout=dropout))
    assert torch.equal(copy, out[:, :columns])
    assert not out[:, columns:].any()
    assert bool(buffer[:, columns + padding :].isnan().all())


def test_tails_wider_than_a_tile_and_strided():
    """More columns than one program holds, and rows that are not contiguous."""
    x = randn(40, 300)[:, ::2]
    a = randn(200, 300, seed=1)[:, ::2]
    for dropout in (None, strip_dropout(40, (7, 8))):
        got = tails(x, a, SCALING, dropout=dropout, backend="triton")
        exact = reference.tails(x.double(), a.double(), SCALING, dropout=dropout)
        check(got, exact, reference.tails(x, a, SCALING, dropout=dropout))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("columns", [16, 100, 300])
@pytest.mark.parametrize("number", [0, 1, 2])
def test_tails_in_every_configuration(number, columns, dtype):
    x, a = randn(130, 70, dtype=dtype), randn(columns, 70, dtype=dtype, seed=1)
    names = [f"tails_{width}{kind}" for width in WIDTHS for kind in ("", "_f32")]
    with forced(**dict.fromkeys(names, number)):
        got = tails(x, a, SCALING, backend="triton")
    exact = reference.tails(x.double(), a.double(), SCALING)
    check(got, exact, reference.tails(x, a, SCALING))


# dA and dB.


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("with_norm", [False, True])
@pytest.mark.parametrize("with_dropout", [False, True])
@pytest.mark.parametrize("T,K,strip", [(200, 200, 16), (1, 40, 16), (77, 130, 7)])
def test_dA(T, K, strip, with_dropout, with_norm, dtype):
    x, d = randn(T, K, dtype=dtype), randn(T, 3 * strip, dtype=dtype, seed=1)
    norm = normed(x, randn(K, dtype=dtype, seed=2), 1.0) if with_norm else None
    dropout = strip_dropout(T) if with_dropout else None
    got = skinny_dA(d, x, SCALING, norm=norm, dropout=dropout, backend="triton")
    assert_sum(got, reference.skinny_dA, d, x, SCALING, norm=norm, dropout=dropout)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "T,segments,strip",
    [(300, (200,), 16), (90, (130, 3, 40), 16), (33, (128, 128), 7), (1, (5, 1, 1, 1), 1)],
)
def test_dB(T, segments, strip, dtype):
    dy = randn(T, sum(segments), dtype=dtype)
    tail = randn(T, len(segments) * strip, dtype=dtype, seed=1)
    got = skinny_dB(dy, tail, segments, backend="triton")
    assert_sum(got, reference.skinny_dB, dy, tail, segments)


def test_dB_of_one_strip_needs_no_segments():
    dy, tail = randn(20, 30), randn(20, 16, seed=1)
    got = skinny_dB(dy, tail, backend="triton")
    assert torch.equal(got, skinny_dB(dy, tail, (30,), backend="triton"))


@pytest.mark.parametrize("T", [500, 40, 0])  # in slices of rows with a second launch; in one; none
@pytest.mark.parametrize("pitch", [64, 200])
def test_gradients_are_added_to_out(T, pitch):
    """Into a view at a pitch, whose surroundings stay as they were."""
    x, d, dy = randn(T, 64), randn(T, 32, seed=1), randn(T, 40, seed=2)
    before = randn(32, 64, seed=3)
    out, buffer = pitched(32, 64, pitch, torch.float32)
    out.copy_(before)
    assert skinny_dA(d, x, SCALING, out=out, backend="triton") is out
    assert_sum(
        out, lambda d, x: reference.skinny_dA(d, x, SCALING, out=before.to(d.dtype).clone()), d, x
    )
    assert outside_untouched(out, buffer)

    before = randn(40, 32, seed=4)
    out, buffer = pitched(40, 32, pitch, torch.float32, ahead=pitch - 32)
    out.copy_(before)
    assert skinny_dB(dy, d, out=out, backend="triton") is out
    assert_sum(out, lambda dy, d: reference.skinny_dB(dy, d, out=before.to(d.dtype).clone()), dy, d)
    assert outside_untouched(out, buffer)


def test_no_rows():
    x, d = randn(0, 40), randn(0, 16)
    assert tails(x, randn(16, 40), SCALING, backend="triton").shape == (0, 16)
    for got in (skinny_dA(d, x, backend="triton"), skinny_dB(x, d, backend="triton")):
        assert got.count_nonzero() == 0 and got.isfinite().all()
    assert skinny_dA(d, x, dropout=strip_dropout(0, (1,)), backend="triton").count_nonzero() == 0


def test_strided_rows():
    x, d = randn(50, 300)[::2, 60:260], randn(50, 64, seed=1)[::2, ::2]
    got = skinny_dA(d, x, backend="triton")
    assert_sum(got, reference.skinny_dA, d, x)
    got = skinny_dB(x, d, backend="triton")
    assert_sum(got, reference.skinny_dB, x, d)


def test_nothing_beyond_the_last_row_or_column_is_read():
    """NaN behind both must not reach the sums."""
    x, _ = pitched(70, 100, 256, torch.float32)
    d, _ = pitched(70, 16, 32, torch.float32)
    x[:37], d[:37] = randn(37, 100), randn(37, 16, seed=1)
    got = skinny_dA(d[:37], x[:37], backend="triton")
    assert_sum(got, reference.skinny_dA, d[:37], x[:37])
    got = skinny_dB(x[:37], d[:37], backend="triton")
    assert_sum(got, reference.skinny_dB, x[:37], d[:37])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("number,strip", [(0, 16), (1, 16), (2, 16), (0, 300), (1, 300)])
def test_gradients_in_every_configuration(number, strip, dtype):
    x, d = randn(100, 140, dtype=dtype), randn(100, strip, dtype=dtype, seed=1)
    names = [f"skinny_{op}{f}_{w}" for op in ("dA", "dB") for f in ("", "_f32") for w in WIDTHS]
    with forced(**dict.fromkeys(names, number)):
        for dropout in (None, strip_dropout(100, (5,))):
            got = skinny_dA(d, x, dropout=dropout, backend="triton")
            assert_sum(got, reference.skinny_dA, d, x, dropout=dropout)
        got = skinny_dB(x, d, backend="triton")
    assert_sum(got, reference.skinny_dB, x, d)


def test_repeated_calls_give_the_same_bits():
    x, d, a = randn(200, 300), randn(200, 16, seed=1), randn(16, 300, seed=2)
    for op in (
        lambda: tails(x, a, SCALING, backend="triton"),
        lambda: skinny_dA(d, x, backend="triton"),
        lambda: skinny_dB(x, d, backend="triton"),
    ):
        assert torch.equal(op(), op())


# What would be launched for the shapes of an 8B model.


def meta(*shape, dtype=torch.bfloat16):
    return torch.empty(*shape, dtype=dtype, device="meta")


def test_launches_on_a_hopper_card():
    """x is read by one program per block of rows; the slices fill 132 multiprocessors once."""
    T, K = 8192, 4096
    with record_launches(90, 132) as recording:
        tails(meta(T, K), meta(48, K), 1.0)  # 128 programs of 64 rows: no slices
        tails(meta(2048, K), meta(48, K), 1.0)
        skinny_dA(meta(T, 16), meta(T, K))
        skinny_dB(meta(T, 6144), meta(T, 48), (4096, 1024, 1024))
        tails(meta(10**6, 14336), meta(16, 14336), 1.0, dropout=None)
    grids = [launch.grid for launch in recording.launches]
    assert grids[0] == (1, 128, 1)
    assert grids[1] == (1, 32, 4) and len(grids[2]) == 1
    assert grids[3] == (1, 32, 4) and len(grids[4]) == 1
    assert grids[5] == (1, 48, 2) and len(grids[6]) == 1
    assert grids[7] == (1, 15625, 1) and len(grids) == 8


BAD = [
    (tails, (randn(4, 8), randn(16, 9), 1.0), {}, r"a must be \[S·R, K\] = \[16, 8\]"),
    (tails, (randn(4, 8), randn(16, 8).double(), 1.0), {}, "a must have the dtype"),
    (tails, (randn(8), randn(16, 8), 1.0), {}, "x must be a matrix"),
    (tails, (randn(4, 8), randn(16, 8), 1.0), {"out": randn(4, 8)}, r"out must be \[T, S·R\]"),
    (tails, (randn(4, 8), randn(4, 8), 1.0), {"out": randn(4, 4).t()}, "lie side by side"),
    (
        tails,
        (randn(4, 8), randn(16, 8), 1.0),
        {"dropout": strip_dropout(4)},
        "16 columns do not split into 3 strips",
    ),
    (
        tails,
        (randn(4, 8), randn(48, 8), 1.0),
        {"dropout": strip_dropout(3)},
        r"one int64 row key per token, \[4\]",
    ),
    (skinny_dA, (randn(3, 16), randn(4, 8)), {}, r"d must be \[T, S·R\] = \[4, 16\]"),
    (
        skinny_dA,
        (randn(4, 16), randn(4, 8)),
        {"norm": NormedInput(randn(4).half(), randn(8))},
        "norm.rstd must be torch.float32",
    ),
    (skinny_dA, (randn(4, 16), randn(4, 8)), {"out": randn(16, 8).half()}, "out must be torch.fl"),
    (skinny_dA, (randn(4, 16), randn(4, 8)), {"out": randn(8, 16)}, r"out must be \[S·R, K\]"),
    (skinny_dB, (randn(4, 8), randn(4, 16), (5, 4)), {}, "segments must be S numbers.*N = 8"),
    (skinny_dB, (randn(4, 8), randn(4, 16), (4, 2, 2)), {}, "segments must be S numbers"),
    (skinny_dB, (randn(4, 8), randn(4, 16)), {"out": randn(8, 8)}, r"out must be \[N, R\]"),
]


@pytest.mark.parametrize("op,args,kwargs,message", BAD, ids=[str(i) for i in range(len(BAD))])
def test_bad_arguments_say_what_got_and_do_this(op, args, kwargs, message):
    with pytest.raises(ValueError, match=message) as caught:
        op(*args, **kwargs)
    assert str(caught.value).startswith(op.__name__ + ": ") and "; got " in str(caught.value)


@pytest.mark.parametrize("name", ["tails", "skinny_dA", "skinny_dB", "pack_adapters"])
def test_references_have_the_same_signature(name):
    public = inspect.signature(getattr(fused, name)).parameters
    ours = inspect.signature(getattr(reference, name)).parameters
    assert [str(p) for p in public.values() if p.name != "backend"] == list(map(str, ours.values()))
    assert public["backend"].default is None
