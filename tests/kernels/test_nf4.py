"""NF4 against bitsandbytes on the CPU: codes, decoded values, checkpoint keys, bit for bit."""

import json

import bitsandbytes.functional as bnb
import pytest
import torch
from bitsandbytes.functional import QuantState
from fastsft_kernels import NF4Weight, nf4_dequantize, nf4_quantize
from fastsft_kernels.nf4_format import dynamic_code, nf4_code

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(64, 128), (64, 96), (300, 130), (7, 33), (5, 70), (33, 10), (1, 1), (1030, 520)]
NAME = "layers.0.q_proj.weight"


def bnb_state(packed, state):
    """What bitsandbytes writes into a checkpoint."""
    return {NAME: packed} | {f"{NAME}.{k}": v for k, v in state.as_dict(packed=True).items()}


@pytest.fixture(autouse=True)
def eager():
    """bitsandbytes compiles its decode of odd shapes, which costs a quarter of a minute."""
    with torch.compiler.set_stance("force_eager"):
        yield


def bnb_decode(packed, state):
    """bitsandbytes' decode, as one row.

    Blocks run on over the ends of rows, so the shape must not matter; but the vectorised CPU
    path of 0.50 starts each row at a new block and is wrong for K = 96 and the like.
    """
    shape, state.shape = state.shape, torch.Size([1, state.shape.numel()])
    return bnb.dequantize_4bit(packed.view(torch.uint8).view(-1, 1), state).reshape(shape)


def weights(shape, dtype):
    torch.manual_seed(sum(shape))
    weight = torch.randn(shape) * torch.logspace(-3, 1, shape[0])[:, None]
    return weight.to(dtype)


def test_tables():
    assert torch.equal(dynamic_code(), bnb.create_dynamic_map())
    assert torch.equal(nf4_code(), bnb.get_4bit_type("nf4", device="cpu"))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("double", [True, False])
def test_reads_and_decodes_what_bitsandbytes_wrote(shape, dtype, double):
    packed, state = bnb.quantize_4bit(
        weights(shape, dtype), compress_statistics=double, quant_type="nf4"
    )
    nf4 = NF4Weight.from_state_dict({"other": packed, **bnb_state(packed, state)}, NAME)
    assert nf4.shape == shape and nf4.dtype == dtype and nf4.double_quant is double
    want = bnb_decode(packed, state)
    got = nf4_dequantize(nf4, dtype=dtype)
    assert got.dtype == dtype and torch.equal(got, want)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("double", [True, False])
def test_bitsandbytes_reads_and_decodes_what_we_wrote(shape, dtype, double):
    nf4 = nf4_quantize(weights(shape, dtype), double_quant=double)
    ours = nf4.state_dict(NAME)
    packed = ours.pop(NAME)
    state = QuantState.from_dict(
        {k.removeprefix(NAME + "."): v for k, v in ours.items()}, torch.device("cpu")
    )
    want = bnb_decode(packed, state)
    assert torch.equal(nf4_dequantize(nf4, dtype=dtype), want)
    again = NF4Weight.from_state_dict(nf4.state_dict(NAME), NAME)
    assert torch.equal(nf4_dequantize(again, dtype=dtype), want)


@pytest.mark.parametrize("double", [True, False])
def test_the_checkpoint_is_byte_for_byte_theirs(double):
    weight = weights((96, 130), torch.bfloat16)
    packed, state = bnb.quantize_4bit(weight, compress_statistics=double, quant_type="nf4")
    theirs = bnb_state(packed, state)
    ours = NF4Weight.from_state_dict(theirs, NAME).state_dict(NAME)
    assert list(sorted(ours)) == list(sorted(theirs))
    for key, tensor in theirs.items():
        assert ours[key].dtype == tensor.dtype and torch.equal(ours[key], tensor), key
    facts = json.loads(bytes(ours[NAME + ".quant_state.bitsandbytes__nf4"].tolist()))
    assert facts["dtype"] == "bfloat16" and facts["shape"] == [96, 130]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_quantises_as_bitsandbytes_does(shape, dtype):
    """Codes and scales are equal; the 8-bit scale codes are the nearest ones.

    The CPU build of bitsandbytes finds those through a coarser table, so one in a thousand is
    a neighbour there; ours must never be the worse of the two.
    """
    weight = weights(shape, dtype)
    packed, state = bnb.quantize_4bit(weight, compress_statistics=True, quant_type="nf4")
    nf4 = nf4_quantize(weight)
    assert torch.equal(nf4.packed, packed.flatten())
    assert torch.equal(nf4.offset, state.offset)
    assert torch.equal(nf4.absmax2, state.state2.absmax)
    differ = nf4.absmax != state.absmax
    assert differ.float().mean() <= 2e-3 + (3 / differ.numel() if differ.any() else 0)
    plain = nf4_quantize(weight, double_quant=False)
    scale = nf4.absmax2.repeat_interleave(256)[: nf4.absmax.numel()]
    target = (plain.absmax - nf4.offset) / scale.clamp(min=1e-38)
    error = (nf4.code2[nf4.absmax.int()] - target).abs()
    theirs = (nf4.code2[state.absmax.int()] - target).abs()
    assert (error <= theirs + 1e-6).all()
    assert torch.equal(plain.absmax, bnb.quantize_4bit(weight, quant_type="nf4")[1].absmax)


def test_ties_fall_as_they_do_there():
    """Numbers on the border of two codes: the rounding of the reciprocal decides."""
    torch.manual_seed(0)
    borders = (nf4_code()[1:] + nf4_code()[:-1]) / 2
    absmax = torch.rand(2000, 1)
    weight = absmax * torch.cat([torch.ones(1), borders.repeat(5)[:63]])
    packed, _ = bnb.quantize_4bit(weight, quant_type="nf4")
    assert torch.equal(nf4_quantize(weight).packed, packed.flatten())


def test_other_storage_dtype():
    """FSDP checkpoints store the bytes as bfloat16."""
    packed, state = bnb.quantize_4bit(
        weights((64, 96), torch.float16),
        compress_statistics=True,
        quant_type="nf4",
        quant_storage=torch.bfloat16,
    )
    assert packed.dtype == torch.bfloat16
    nf4 = NF4Weight.from_state_dict(bnb_state(packed, state), NAME)
    assert torch.equal(nf4_dequantize(nf4, dtype=torch.float16), bnb_decode(packed, state))


@pytest.mark.parametrize("block_size", [32, 128, 4096])
def test_other_block_sizes(block_size):
    weight = weights((50, 130), torch.float32)
    packed, state = bnb.quantize_4bit(
        weight, blocksize=block_size, compress_statistics=True, quant_type="nf4"
    )
    nf4 = nf4_quantize(weight, block_size=block_size)
    assert torch.equal(nf4.packed, packed.flatten())
    read = NF4Weight.from_state_dict(bnb_state(packed, state), NAME)
    want = bnb_decode(packed, state)
    assert torch.equal(nf4_dequantize(read, dtype=torch.float32), want)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_pitched_out_writes_its_numbers_and_no_others(dtype):
    nf4 = nf4_quantize(weights((20, 33), torch.float32))
    want = nf4_dequantize(nf4, dtype=dtype)
    buffer = torch.full((20, 64), torch.nan, dtype=dtype)
    out = nf4_dequantize(nf4, dtype=dtype, out=buffer[:, :33])
    assert out.data_ptr() == buffer.data_ptr() and torch.equal(buffer[:, :33], want)
    assert buffer[:, 33:].isnan().all()
    dense = torch.full((20, 33), torch.nan, dtype=dtype)
    assert nf4_dequantize(nf4, dtype=dtype, out=dense) is dense and torch.equal(dense, want)


def test_size_and_zero_blocks():
    weight = torch.randn(256, 256)
    weight[:4] = 0
    nf4 = nf4_quantize(weight)
    assert (nf4.nbytes - 4 * (16 + 256 + 1)) / weight.numel() == pytest.approx(0.5159, abs=1e-4)
    decoded = nf4_dequantize(nf4, dtype=torch.float32)
    assert (decoded[:4] == 0).all() and decoded.isfinite().all()
    tensors = [v for v in vars(nf4.to("meta")).values() if isinstance(v, torch.Tensor)]
    assert len(tensors) == 6 and all(t.device.type == "meta" for t in tensors)


def test_damaged_checkpoints_say_so():
    packed, state = bnb.quantize_4bit(
        torch.randn(64, 64), compress_statistics=True, quant_type="nf4"
    )
    good = bnb_state(packed, state)
    cases = [
        ({k: v for k, v in good.items() if "bitsandbytes__nf4" not in k}, "no NF4 weight called"),
        ({k: v for k, v in good.items() if k != NAME + ".absmax"}, "absmax is missing"),
        (good | {NAME: packed[:-1]}, "must have 2048 entries"),
        (good | {NAME + ".nested_absmax": torch.ones(9)}, "nested_absmax must have 1 entries"),
        (good | {NAME + ".quant_map": torch.ones(16)}, "must be the 16 NF4 values"),
    ]
    for state_dict, message in cases:
        with pytest.raises(ValueError, match=message):
            NF4Weight.from_state_dict(state_dict, NAME)
    fp4 = bnb_state(*bnb.quantize_4bit(torch.randn(64, 64), quant_type="fp4"))
    with pytest.raises(ValueError, match="no NF4 weight called"):
        NF4Weight.from_state_dict(fp4, NAME)
