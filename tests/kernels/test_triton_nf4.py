"""NF4 in Triton, to the last bit: against the reference, and both ways against bitsandbytes.

The interpreter cuts float32 to bfloat16 where a GPU rounds; there the tests expect the cut, which
still shows that every number is at its place. (That the compiled kernels round is in their PTX.)
"""

from dataclasses import replace

import bitsandbytes.functional as bnb
import pytest
import torch
from bitsandbytes.functional import QuantState
from fastsft_kernels import NF4Weight, launch, nf4_dequantize, nf4_quantize, reference
from fastsft_kernels.fused import nf4_dequantize_group
from fastsft_kernels.triton_ops import nf4 as ours
from kernel_checks import DEVICE, poisoned_memory, randn  # noqa: F401

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
FIELDS = ("packed", "absmax", "absmax2", "offset", "code", "code2")
NAME = "layers.0.q_proj.weight"
# Whole blocks; words that straddle blocks; words that straddle rows; odd N·K; several tiles.
SHAPES = [
    *((64, 128), (33, 576), (3, 4160), (7, 200), (2, 1032)),
    *((7, 33), (3, 4095), (31, 130), (5, 70), (1, 1), (1, 8)),
]


@pytest.fixture(autouse=True)
def eager():
    """bitsandbytes compiles its decode of odd shapes, which costs a quarter of a minute."""
    with torch.compiler.set_stance("force_eager"):
        yield


def weights(shape, dtype=torch.float32):
    scale = torch.logspace(-3, 1, shape[0], device=DEVICE)[:, None]
    return (randn(*shape) * scale).to(dtype)


def quantised(shape, block_size=64, double=True):
    return reference.nf4_quantize(weights(shape), block_size=block_size, double_quant=double)


def same(a, b):
    """Equal to the last bit, NaN included."""
    kind = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[a.element_size()]
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a.view(kind), b.view(kind))


def same_nf4(a, b):
    pairs = [(getattr(a, f), getattr(b, f)) for f in FIELDS]
    facts = (a.shape, a.dtype, a.block_size) == (b.shape, b.dtype, b.block_size)
    return facts and all(y is None if x is None else same(x, y) for x, y in pairs)


def as_written(exact, dtype):
    """float32 numbers as the kernel writes them."""
    if dtype != torch.bfloat16 or not launch.interpreting():
        return exact.to(dtype)
    return (exact.contiguous().view(torch.int32) >> 16).to(torch.int16).view(torch.bfloat16)


def decoded(nf4, dtype=torch.float32):
    return as_written(reference.nf4_dequantize(nf4, dtype=torch.float32), dtype)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("double", [True, False])
def test_decodes_to_the_bits_of_the_reference(shape, double):
    nf4 = quantised(shape, double=double)
    for dtype in DTYPES:
        assert same(nf4_dequantize(nf4, dtype=dtype, backend="triton"), decoded(nf4, dtype))


@pytest.mark.parametrize("block_size", [32, 128, 4096])
def test_decodes_other_block_sizes(block_size):
    for shape in ((21, 192), (5, 1000), (3, 2730)):
        nf4 = quantised(shape, block_size)
        assert same(nf4_dequantize(nf4, dtype=torch.float32, backend="triton"), decoded(nf4))


def test_decodes_codes_that_are_not_aligned():
    nf4 = quantised((9, 128))
    bytes_ = torch.zeros(nf4.packed.numel() + 1, dtype=torch.uint8, device=DEVICE)
    odd = replace(nf4, packed=bytes_[1:].copy_(nf4.packed))
    assert same(nf4_dequantize(odd, dtype=torch.float32, backend="triton"), decoded(nf4))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape,pitch", [((11, 200), 256), ((11, 200), 201), ((6, 33), 40)])
def test_a_pitched_out_keeps_what_is_not_the_weight(dtype, shape, pitch):
    nf4 = quantised(shape)
    buffer = torch.full((shape[0], pitch), torch.nan, dtype=dtype, device=DEVICE)
    out = nf4_dequantize(nf4, dtype=dtype, out=buffer[:, : shape[1]], backend="triton")
    assert out.data_ptr() == buffer.data_ptr() and buffer[:, shape[1] :].isnan().all()
    assert same(out.contiguous(), decoded(nf4, dtype))


@pytest.mark.parametrize("rows", [(37,), (8, 1, 17), (64, 64), (3,) * 7], ids=str)
@pytest.mark.parametrize("columns", [128, 200, 33])
@pytest.mark.parametrize("rank", [0, 16])
def test_a_group_with_its_tails(rows, columns, rank):
    group = [quantised((n, columns)) for n in rows]
    dtype = torch.float16
    width = columns + 16 + rank * len(rows)
    # b's rows lie in a buffer of their own, further apart than R.
    b = randn(sum(rows), rank + 3, dtype=dtype)[:, :rank] if rank else None
    shape = (sum(rows), width + 8)
    want, got = (torch.full(shape, torch.nan, dtype=dtype, device=DEVICE) for _ in range(2))
    reference.nf4_dequantize_group(group, want[:, :width], b=b)
    returned = nf4_dequantize_group(group, got[:, :width], b=b, backend="triton")
    assert returned.data_ptr() == got.data_ptr() and returned.shape == (sum(rows), width)
    assert same(got, want) and got[:, width:].isnan().all()


def test_the_reference_of_a_group_is_what_it_says():
    group = [quantised((n, 96)) for n in (5, 2)]
    b = randn(7, 16)
    out = torch.full((7, 160), torch.nan, device=DEVICE)
    assert reference.nf4_dequantize_group(group, out, b=b) is out
    want = torch.zeros(7, 160, device=DEVICE)
    want[:, :96] = torch.cat([reference.nf4_dequantize(w, dtype=torch.float32) for w in group])
    want[:5, 96:112], want[5:, 112:128] = b[:5], b[5:]
    assert same(out, want)


def test_a_wide_tail_and_none():
    """Ranks of 256 for three weights of tiles 64 rows high: the tail is written in pieces."""
    group = [quantised((n, 64)) for n in (70, 3, 64)]
    b = randn(137, 256)
    want, got = (torch.full((137, 64 + 768), torch.nan, device=DEVICE) for _ in range(2))
    reference.nf4_dequantize_group(group, want, b=b)
    assert same(nf4_dequantize_group(group, got, b=b, backend="triton"), want)
    bare = torch.empty(137, 64, device=DEVICE)
    assert same(nf4_dequantize_group(group, bare, backend="triton"), want[:, :64].contiguous())
    plain = [quantised((n, 64), double=False) for n in (3, 2)]
    five = torch.empty(5, 64, device=DEVICE)
    wanted = torch.cat([decoded(w) for w in plain])
    assert same(nf4_dequantize_group(plain, five, backend="triton"), wanted)


@pytest.mark.parametrize("i", range(len(ours._DECODE)))
def test_every_configuration_of_the_decode(i):
    group = [quantised((n, 1088)) for n in (9, 1)]
    b = randn(10, 16)
    want, got = (torch.full((10, 1088 + 64), torch.nan, device=DEVICE) for _ in range(2))
    reference.nf4_dequantize_group(group, want, b=b)
    with launch.forced(nf4_dequantize_tile=i):
        assert same(nf4_dequantize_group(group, got, b=b, backend="triton"), want)


@pytest.mark.parametrize("shape", [(16, 128), (7, 33), (31, 130), (129, 520), (1, 1)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_quantises_to_the_bits_of_the_reference(shape, dtype):
    weight = weights(shape, dtype)
    weight[0] = 0
    for block_size, double in ((64, True), (32, False), (4096, True)):
        want = reference.nf4_quantize(weight, block_size=block_size, double_quant=double)
        kinds = {"block_size": block_size, "double_quant": double}
        assert same_nf4(nf4_quantize(weight, **kinds, backend="triton"), want)


@pytest.mark.parametrize("i", range(len(ours._ENCODE)))
def test_every_configuration_of_the_quantiser(i):
    weight = weights((40, 130))
    with launch.forced(nf4_quantize_tile=i):
        got = nf4_quantize(weight, backend="triton")
    assert same_nf4(got, reference.nf4_quantize(weight))


def test_quantises_rows_that_are_apart():
    weight = weights((20, 200))[:, 7:137]
    assert same_nf4(nf4_quantize(weight, backend="triton"), reference.nf4_quantize(weight))


def test_ties_extremes_and_what_is_not_a_number():
    borders = (reference.nf4_quantize(torch.ones(1, 1)).code[1:] + ours.nf4_code()[:-1]) / 2
    ties = randn(300, 1).abs().cpu() * torch.cat([torch.ones(1), borders.repeat(5)[:63]])
    tiny = randn(4, 64).cpu() * torch.tensor([[1e-36], [1e-38], [1e-39], [1e-45]])
    for weight in (ties.to(DEVICE), tiny.to(DEVICE), randn(4, 64, scale=1e37)):
        want = reference.nf4_quantize(weight)
        assert same_nf4(nf4_quantize(weight, backend="triton"), want)
    weight = randn(2, 64)
    weight[1, 5] = torch.nan
    nf4 = nf4_quantize(weight, double_quant=False, backend="triton")
    shown = nf4_dequantize(nf4, dtype=torch.float32, backend="triton")
    assert shown[0].isfinite().all() and shown[1].isnan().all()


def bnb_decode(packed, state):
    """bitsandbytes' decode as one row: on a CPU 0.50 starts each row at a new block, wrongly."""
    shape, state.shape = state.shape, torch.Size([1, state.shape.numel()])
    return bnb.dequantize_4bit(packed.view(torch.uint8).view(-1, 1), state).reshape(shape)


@pytest.mark.parametrize("shape", [(64, 128), (31, 130), (7, 33), (9, 200)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("double", [True, False])
def test_reads_what_bitsandbytes_wrote_and_it_what_we_wrote(shape, dtype, double):
    weight = weights(shape, dtype)
    packed, state = bnb.quantize_4bit(weight, compress_statistics=double, quant_type="nf4")
    file = {f"{NAME}.{k}": v for k, v in state.as_dict(packed=True).items()} | {NAME: packed}
    nf4 = NF4Weight.from_state_dict(file, NAME)
    want = bnb_decode(packed, state)
    assert same(nf4_dequantize(nf4, dtype=dtype, backend="triton"), want)

    nf4 = nf4_quantize(weight, double_quant=double, backend="triton")
    differ = (nf4.packed != packed.flatten()).float().mean()
    assert differ <= (1e-4 if DEVICE == "cuda" else 0)  # there its reciprocal is an approximate one
    file = nf4.state_dict(NAME)
    packed = file.pop(NAME)
    entries = {k.removeprefix(NAME + "."): v for k, v in file.items()}
    want = bnb_decode(packed, QuantState.from_dict(entries, torch.device(DEVICE)))
    assert same(nf4_dequantize(nf4, dtype=dtype, backend="triton"), want)


def meta(rows, columns):
    nf4 = quantised((1, 64)).to("meta")
    blocks = -(-rows * columns // 64)
    return replace(
        nf4,
        packed=torch.empty(rows * columns // 2, dtype=torch.uint8, device="meta"),
        absmax=torch.empty(blocks, dtype=torch.uint8, device="meta"),
        absmax2=torch.empty(-(-blocks // 256), device="meta"),
        shape=(rows, columns),
    )


def test_one_launch_decodes_a_group_and_two_quantise():
    group = [meta(n, 4096) for n in (4096, 1024, 1024)]
    out = torch.empty(6144, 4160, dtype=torch.bfloat16, device="meta")
    b = torch.empty(6144, 16, dtype=torch.bfloat16, device="meta")
    with launch.record_launches(90) as recording:
        nf4_dequantize_group(group, out, b=b)
        nf4_dequantize(meta(4096, 14336))
        nf4_quantize(torch.empty(4096, 14336, dtype=torch.bfloat16, device="meta"))
    grids = [(x.kernel.__name__, x.grid) for x in recording.launches]
    assert grids == [
        ("_nf4_dequantize", (6144,)),
        ("_nf4_dequantize", (2048 * 7,)),
        ("_nf4_quantize", (14336,)),
        ("_nf4_quantize_scales", (896,)),
    ]
    assert all(x.options["enable_fp_fusion"] is False for x in recording.launches)


@pytest.mark.parametrize(
    "columns,wide",
    [(4096, 4096), (14336, 2048), (11008, 1024), (576, 64), (2304, 256), (8, 64), (100000, 4096)],
)
def test_tiles_hang_over_a_row_by_little(columns, wide):
    assert ours._tile_columns(columns, 4096) == wide


def test_what_does_not_fit_a_group():
    group = [quantised((n, 64)) for n in (3, 2)]
    out = torch.empty(5, 96, device=DEVICE)
    b = torch.empty(5, 16, device=DEVICE)
    cases = [
        (([], out), {}, "there must be a weight; got"),
        (([*group, quantised((1, 128))], out), {}, "one K, block_size, double_quant and device"),
        (([*group, quantised((1, 64), double=False)], out), {}, "one K, block_size, double_quant"),
        ((group, out[:4]), {}, r"out must be \[5, at least 64\]"),
        ((group, out.t().contiguous().t()), {}, r"out must be .*strides \(1, 5\)"),
        ((group, out.double()), {}, "out must be"),
        ((group, out), {"b": b[:4]}, r"b must be \[sum of N, R\] = \[5, 16\]"),
        ((group, out), {"b": b.half()}, "b must have the dtype and device of out"),
        ((group, out[:, :95]), {"b": b}, "2 strips of 16 columns need 32 behind K; got 31"),
    ]
    for args, kwargs, message in cases:
        with pytest.raises(ValueError, match=f"nf4_dequantize_group: .*{message}"):
            nf4_dequantize_group(*args, **kwargs)
