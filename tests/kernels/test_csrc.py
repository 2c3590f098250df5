"""csrc: what nvcc makes of it for six cards, and the kernels themselves run on a CPU, bit for bit.

The CPU build is the same source: `cuda_on_cpu.h` gives g++ what it lacks of CUDA, warps included.
It shows everything but what the compiler for the GPU does to the arithmetic, and that its machine
code shows: no fused multiply-add.
"""

import ctypes
import mmap
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import bitsandbytes.functional as bnb
import pytest
import torch
from fastsft_kernels import cuda_ops, nf4_dequantize, nf4_quantize, reference
from fastsft_kernels.cuda_ops import library
from fastsft_kernels.fused import nf4_dequantize_group
from fastsft_kernels.launch import forced
from kernel_checks import poisoned_memory  # noqa: F401

ROOT = Path(__file__).parents[2]
SOURCE = ROOT / "csrc" / "nf4.cu"
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
FIELDS = ("packed", "absmax", "absmax2", "offset", "code", "code2")
FORCED = {op: "cuda" for op in ("nf4_dequantize", "nf4_dequantize_group", "nf4_quantize")}


@pytest.fixture(scope="module")
def cpu_build(tmp_path_factory):
    """The library of csrc, compiled for the CPU."""
    if not shutil.which("g++"):
        pytest.skip("no g++ here")
    path = tmp_path_factory.mktemp("csrc") / "libfastsft.so"
    flags = "-O1 -std=c++17 -ffp-contract=off -fPIC -shared -Wall -Werror -Wno-unknown-pragmas"
    shim = Path(__file__).with_name("cuda_on_cpu.h")
    command = ["g++", *flags.split(), "-include", shim, "-x", "c++", SOURCE, "-o", path]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return path


@pytest.fixture
def on_cpu(cpu_build, monkeypatch):
    """`fastsft_kernels.cuda_ops` with the CPU build, on CPU tensors and without a stream."""
    lib = ctypes.CDLL(str(cpu_build))

    def call(function, device, *args):
        assert device.type == "cpu" and getattr(lib, function)(*args, None) == 0

    monkeypatch.setattr(cuda_ops.nf4, "call", call)
    monkeypatch.setattr(cuda_ops.nf4, "_check", lambda op, x: None)
    with forced(**FORCED):
        yield lib


def weights(shape, dtype=torch.float32):
    torch.manual_seed(sum(shape))
    weight = torch.randn(shape) * torch.logspace(-3, 1, shape[0])[:, None]
    return weight.to(dtype)


def quantised(shape, block_size=64, double=True):
    return reference.nf4_quantize(weights(shape), block_size=block_size, double_quant=double)


def same(a, b):
    """Equal to the last bit, NaN included."""
    sizes = {1: torch.uint8, 2: torch.int16, 4: torch.int32}
    kind = sizes[a.element_size()]
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a.view(kind), b.view(kind))


def same_nf4(a, b):
    pairs = [(getattr(a, f), getattr(b, f)) for f in FIELDS]
    facts = (a.shape, a.dtype, a.block_size) == (b.shape, b.dtype, b.block_size)
    return facts and all(y is None if x is None else same(x, y) for x, y in pairs)


# K: a word to a thread; words that straddle blocks; rows that end within a word; several tiles.
SHAPES = [
    (9, 64),
    (37, 128),
    (20, 1088),
    (3, 4096),
    (7, 200),
    (2, 1032),
    (7, 33),
    (31, 130),
    (1, 1),
]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("double", [True, False])
def test_decodes_to_the_bits_of_the_reference(on_cpu, shape, double):
    nf4 = quantised(shape, double=double)
    for dtype in DTYPES:
        want = reference.nf4_dequantize(nf4, dtype=dtype)
        assert same(nf4_dequantize(nf4, dtype=dtype), want)


@pytest.mark.parametrize("block_size", [32, 128, 4096])
def test_decodes_other_block_sizes(on_cpu, block_size):
    for shape in ((21, 192), (5, 1000)):
        nf4 = quantised(shape, block_size)
        want = reference.nf4_dequantize(nf4, dtype=torch.bfloat16)
        assert same(nf4_dequantize(nf4, dtype=torch.bfloat16), want)


def test_decodes_what_is_not_aligned(on_cpu):
    """Codes that begin at an odd byte, an out that begins within 16, a pitch that breaks it."""
    nf4 = quantised((9, 128))
    want = reference.nf4_dequantize(nf4)
    odd = torch.empty(nf4.packed.numel() + 1, dtype=torch.uint8)[1:].copy_(nf4.packed)
    assert same(nf4_dequantize(replace(nf4, packed=odd)), want)
    wide, ragged = (torch.zeros(9, n, dtype=torch.bfloat16) for n in (136, 131))
    for out in (wide[:, 1:129], ragged[:, :128]):
        assert same(nf4_dequantize(nf4, out=out).contiguous(), want)


def test_rounds_to_even(on_cpu):
    """Scales halfway between two numbers in half precision, times the code 1 and all others."""
    bits = 0x3F800000 + torch.arange(0, 64, dtype=torch.int32) * 0x1000
    packed = torch.arange(255, -1, -1).repeat(8).to(torch.uint8)
    nf4 = replace(quantised((64, 64), double=False), packed=packed, absmax=bits.view(torch.float32))
    for dtype in DTYPES:
        want = reference.nf4_dequantize(nf4, dtype=dtype)
        assert same(nf4_dequantize(nf4, dtype=dtype), want)


def guarded(x):
    """`x` moved to the end of its memory: reading one byte behind it ends the process."""
    page, length = mmap.PAGESIZE, -(-x.nbytes // mmap.PAGESIZE) * mmap.PAGESIZE
    memory = mmap.mmap(-1, length + page)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    assert ctypes.CDLL(None).mprotect(ctypes.c_void_p(address + length), page, 0) == 0
    bytes_ = torch.frombuffer(memory, dtype=torch.uint8, count=x.nbytes, offset=length - x.nbytes)
    return bytes_.view(x.dtype).view(x.shape).copy_(x)


@pytest.mark.parametrize("shape", [(9, 128), (7, 200), (3, 1096), (7, 33)], ids=str)
def test_reads_nothing_behind_the_weight(on_cpu, shape):
    nf4 = quantised(shape)
    fields = {f: guarded(getattr(nf4, f)) for f in ("packed", "absmax", "absmax2")}
    got = nf4_dequantize(replace(nf4, **fields))
    assert same(got, reference.nf4_dequantize(nf4))
    weight = weights(shape, torch.bfloat16)
    assert same_nf4(nf4_quantize(guarded(weight)), reference.nf4_quantize(weight))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_pitched_out_keeps_what_is_not_the_weight(on_cpu, dtype):
    nf4 = quantised((11, 200))
    buffer = torch.full((11, 256), torch.nan, dtype=dtype)
    out = nf4_dequantize(nf4, dtype=dtype, out=buffer[:, :200])
    assert out.data_ptr() == buffer.data_ptr() and buffer[:, 200:].isnan().all()
    assert same(out.contiguous(), reference.nf4_dequantize(nf4, dtype=dtype))


@pytest.mark.parametrize("rows", [(37,), (8, 1, 17), (3,) * 11], ids=str)
@pytest.mark.parametrize("columns", [128, 200, 33])
@pytest.mark.parametrize("rank", [0, 4])
def test_a_group_with_its_tails(on_cpu, rows, columns, rank):
    """Eleven weights take two launches, whose strips go on where the first one's ended."""
    group = [quantised((n, columns)) for n in rows]
    width = columns + 16 + rank * len(rows)
    b = torch.randn(sum(rows), rank + 3)[:, :rank].half() if rank else None
    want, got = (torch.full((sum(rows), width + 8), torch.nan).half() for _ in range(2))
    reference.nf4_dequantize_group(group, want[:, :width], b=b)
    assert nf4_dequantize_group(group, got[:, :width], b=b).data_ptr() == got.data_ptr()
    assert same(got, want) and got[:, width:].isnan().all()


@pytest.mark.parametrize("shape", [(16, 128), (7, 33), (31, 130), (129, 520), (1, 1)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_quantises_to_the_bits_of_the_reference(on_cpu, shape, dtype):
    weight = weights(shape, dtype)
    weight[0] = 0
    for block_size, double in ((64, True), (64, False), (32, True), (1024, True), (4096, False)):
        want = reference.nf4_quantize(weight, block_size=block_size, double_quant=double)
        got = nf4_quantize(weight, block_size=block_size, double_quant=double)
        assert same_nf4(got, want)
    packed, state = bnb.quantize_4bit(weight, compress_statistics=True, quant_type="nf4")
    ours = nf4_quantize(weight)
    assert torch.equal(ours.packed, packed.flatten()) and same(ours.absmax2, state.state2.absmax)


def test_ties_extremes_and_what_is_not_a_number(on_cpu):
    code = reference.nf4_quantize(torch.ones(1, 1)).code
    borders = (code[1:] + code[:-1]) / 2
    ties = torch.rand(300, 1) * torch.cat([torch.ones(1), borders.repeat(5)[:63]])
    tiny = torch.randn(4, 64) * torch.tensor([[1e-36], [1e-38], [1e-39], [1e-45]])
    for weight in (ties, tiny, torch.randn(4, 64) * 1e37):
        assert same_nf4(nf4_quantize(weight), reference.nf4_quantize(weight))
    weight = torch.randn(2, 64)
    weight[1, 5] = torch.nan
    decoded = nf4_dequantize(nf4_quantize(weight, double_quant=False), dtype=torch.float32)
    assert decoded[0].isfinite().all() and decoded[1].isnan().all()


def test_a_bad_call_returns_a_code(on_cpu):
    args = (None, 0, 0, ctypes.c_longlong(64), 64, None, ctypes.c_longlong(64), 2)
    rest = (ctypes.c_longlong(0), None, ctypes.c_longlong(0), 0, None)
    assert on_cpu.fastsft_nf4_dequantize(*args, *rest) == 1
    on_cpu.fastsft_error.restype = ctypes.c_char_p
    assert on_cpu.fastsft_error(1) == b"an error"
    assert on_cpu.fastsft_abi() == library.ABI


@pytest.fixture
def no_library(tmp_path, monkeypatch):
    for name in ("is_built", "library"):
        getattr(library, name).cache_clear()
    path = tmp_path / "libfastsft.so"
    monkeypatch.setattr(library, "LIBRARY", path)
    yield path
    for name in ("is_built", "library"):
        getattr(library, name).cache_clear()


def test_forced_without_a_library(no_library):
    nf4 = quantised((4, 64))
    calls = {
        "nf4_dequantize": lambda: nf4_dequantize(nf4),
        "nf4_dequantize_group": lambda: nf4_dequantize_group([nf4], torch.empty(4, 64)),
        "nf4_quantize": lambda: nf4_quantize(torch.ones(4, 64)),
    }
    for op, run in calls.items():
        run()  # the choice is Triton or, here, the reference
        with forced(**{op: "cuda"}), pytest.raises(RuntimeError, match="not built; got no"):
            run()
    assert same(nf4_dequantize(nf4, backend="reference"), reference.nf4_dequantize(nf4))


def test_forced_on_a_cpu_or_with_a_broken_library(no_library, cpu_build):
    nf4 = quantised((4, 64))
    no_library.write_bytes(b"not a library")
    with forced(**FORCED), pytest.raises(RuntimeError, match="do not load; got"):
        nf4_dequantize(nf4)
    no_library.unlink()
    shutil.copy(cpu_build, no_library)
    library.library.cache_clear()
    with forced(**FORCED), pytest.raises(ValueError, match="nf4_dequantize: the CUDA kernels run"):
        nf4_dequantize(nf4)


# The real library, built once as an installation builds it.

ARCHS = ["80", "86", "89", "90", "100", "120"]


def run_setup(folder, **environment):
    command = [sys.executable, "setup.py", "-q", "build_ext", "--build-lib", folder, "--build-temp"]
    return subprocess.run(
        [*command, folder],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "FASTSFT_BUILD_EXT": "1", **environment},
        check=False,
    )


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """(the library, what nvcc said, kernel -> architecture -> opcodes)."""
    if not shutil.which("nvcc"):
        pytest.skip("no nvcc here")
    pytest.importorskip("triton")
    import triton

    folder = tmp_path_factory.mktemp("built")
    done = run_setup(folder)
    said = done.stdout + done.stderr
    assert done.returncode == 0, said
    path = folder / "fastsft_kernels" / "cuda_ops" / "libfastsft.so"
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    text = subprocess.run([tool, "-sass", path], capture_output=True, text=True, check=True).stdout
    kernels = {}
    for part in re.split(r"\n(?=\s*arch = sm_)", text)[1:]:
        arch = re.match(r"\s*arch = sm_(\d+)", part)[1]
        for name, code in re.findall(r"Function : (\S+)\n(.*?)(?=\n\s*Function :|\Z)", part, re.S):
            opcodes = re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?([A-Z][\w.]*)", code)
            kernels.setdefault(name, {})[arch] = [o for o in opcodes if o != "NOP"]
    return path, said, kernels


def test_built_for_every_card_without_spills(built):
    _, said, kernels = built
    assert len(kernels) == 3 * 3 + 3 * 2 + 3 + 1
    assert all(sorted(archs, key=int) == ARCHS for archs in kernels.values())
    spills = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+)", said)
    assert len(spills) == len(kernels) * len(ARCHS) and set(spills) == {("0", "0", "0")}
    registers = [int(n) for n in re.findall(r"Used (\d+) registers", said)]
    assert max(registers) <= 64


def test_the_decode_has_no_fused_multiply_add(built):
    """In the quantiser the correctly rounded division is made of them: there PTX has to show it."""
    for name, archs in built[2].items():
        if "dequantize" in name:
            for opcodes in archs.values():
                assert not [o for o in opcodes if o.startswith("FFMA")], name


def test_the_quantiser_has_no_fused_multiply_add_but_in_divisions(tmp_path, built):
    command = [
        "nvcc",
        "-O3",
        "-std=c++17",
        "--fmad=false",
        "-arch=compute_80",
        "-ptx",
        SOURCE,
        "-o",
    ]
    subprocess.run([*command, tmp_path / "out.ptx"], check=True)
    ptx = (tmp_path / "out.ptx").read_text()
    assert "div.rn.f32" in ptx and not re.search(r"\b(fma|mad)\.\S*f32|div\.(full|approx)", ptx)


def test_the_decode_takes_few_instructions_and_whole_stores(built):
    """Of 64 weights a thread: a shuffle each, 16-byte stores; 16 instructions each at the most."""
    for name, archs in built[2].items():
        if "dequantize_words" in name:
            for arch, opcodes in archs.items():
                count = Counter(opcodes)
                assert len(opcodes) <= 16 * 64, (name, arch, len(opcodes))
                assert 64 <= count["SHFL.IDX"] <= 72
                assert count["STG.E.128"] == (16 if "wordsIf" in name else 8)
                assert not any(o.startswith(("LDL", "STL")) for o in opcodes)


def test_the_built_library_loads(built):
    lib = ctypes.CDLL(str(built[0]))
    assert lib.fastsft_abi() == library.ABI
    lib.fastsft_error.restype = ctypes.c_char_p
    assert lib.fastsft_error(1) == b"invalid argument"


def test_building_without_nvcc_says_so(tmp_path):
    done = run_setup(tmp_path, PATH=str(tmp_path), CUDA_HOME=str(tmp_path))
    assert done.returncode != 0 and "FASTSFT_BUILD_EXT=1 needs nvcc" in done.stderr


def test_an_older_nvcc_builds_what_it_knows_and_says_what_not(tmp_path):
    nvcc = tmp_path / "nvcc"
    nvcc.write_text(
        "#!/bin/sh\n"
        'if [ "$1" = --list-gpu-arch ]; then echo compute_80; echo compute_90; exit; fi\n'
        f'echo "$@" > {tmp_path}/asked\n'
        'while [ "$1" != -o ]; do shift; done\n'
        'echo > "$2"\n'
    )
    nvcc.chmod(0o755)
    done = run_setup(tmp_path / "lib", PATH=f"{tmp_path}:{os.environ['PATH']}")
    assert done.returncode == 0, done.stderr
    asked = (tmp_path / "asked").read_text()
    assert re.findall(r",code=(\w+)", asked) == ["sm_80", "sm_90", "compute_90"]
    assert "--fmad=false" in asked and "sm_86, sm_89, sm_100, sm_120" in done.stderr
    nvcc.write_text("#!/bin/sh\necho broken >&2; exit 1\n")
    done = run_setup(tmp_path / "other", PATH=f"{tmp_path}:{os.environ['PATH']}")
    assert done.returncode != 0 and "broken" in done.stderr
