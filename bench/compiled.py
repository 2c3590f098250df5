"""What a compiled kernel says about itself: registers, spills, shared memory, instructions.

Triton compiles for any target without a GPU, and its wheel carries `cuobjdump` and `nvdisasm`.
Registers and stack come from the cubin, instructions from its disassembly, the tiles of matrix
products from Triton's GPU dialect before it is lowered. What is wrong is decided here too, in
`failures`.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import triton
from fastsft_kernels.launch import Launch
from fastsft_kernels.precompile import TargetDriver
from triton.runtime import driver

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


class Card(NamedTuple):
    """What one multiprocessor of a compute capability has (CUDA programming guide, table of them)."""

    block_shared: int  # bytes a block may ask for
    shared: int  # bytes of the multiprocessor; each block reserves 1 KiB of it besides its own
    threads: int
    blocks: int


CARDS = {
    80: Card(163 << 10, 164 << 10, 2048, 32),
    86: Card(99 << 10, 100 << 10, 1536, 16),
    89: Card(99 << 10, 100 << 10, 1536, 24),
    90: Card(227 << 10, 228 << 10, 2048, 32),
    100: Card(227 << 10, 228 << 10, 2048, 32),
    120: Card(99 << 10, 100 << 10, 1536, 24),
}


def card(capability: int) -> Card:
    """That of the capability, or of the nearest older one."""
    return CARDS[max((c for c in CARDS if c <= capability), default=80)]


TENSOR_MEMORY = 512  # columns, on sm_100


def compile_launch(launch: Launch, capability: int) -> Any:
    """The kernel of `launch` compiled for a card that need not be there."""
    driver.set_active(TargetDriver(capability))
    return launch.kernel.warmup(*launch.args, grid=launch.grid, **launch.options)


def describe(compiled: Any, capability: int) -> dict[str, Any]:
    """The facts of one compiled Triton kernel."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        (facts,) = describe_cubin(Path(file.name)).values()
    metadata, ptx = compiled.metadata, compiled.asm["ptx"]
    facts["shared"] = metadata.shared
    facts["warps"] = metadata.num_warps
    facts["tensor_memory"] = getattr(metadata, "tmem_size", None) or 0
    facts["fused_multiply_adds"] = fused_multiply_adds(facts, ptx)
    facts["matrix"] = _matrix_instruction(ptx)
    facts["dots"] = dots(compiled.asm["ttgir"])
    facts["blocks_per_sm"] = blocks_per_sm(facts, capability)
    return facts


def describe_cubin(path: Path) -> dict[str, dict[str, Any]]:
    """Of each function of a cubin: registers, stack, shared memory, instructions, global accesses."""
    found: dict[str, dict[str, Any]] = {}
    usage = _output("cuobjdump", "-res-usage", str(path))
    pattern = r"Function (\S+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)"
    for name, registers, stack, shared, local in re.findall(pattern, usage):
        found[name] = {
            "registers": int(registers),
            "spill": int(stack) + int(local),
            "shared": int(shared),
        }
    # Without flow analysis, which would take a third of the time that compiling does.
    code = _output("nvdisasm", "-c", "-ndf", "-novliw", str(path))
    for name, body in re.findall(r"^\.text\.(\S+):\n(.*?)(?=^\s*\.section|\Z)", code, re.S | re.M):
        opcodes = re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?([A-Z][\w.]*)", body)
        found[name] |= {
            "instructions": len(opcodes) - opcodes.count("NOP"),
            "loads": _widths(opcodes, ("LDG", "LDGSTS", "UTMALDG")),
            "stores": _widths(opcodes, ("STG", "UTMASTG")),
            "fused_multiply_adds": sum(o.split(".")[0] in ("FFMA", "FFMA2") for o in opcodes),
        }
    return found


def fused_multiply_adds(facts: dict[str, Any], ptx: str) -> int:
    """How many the compiler made. A correctly rounded division is itself made of them in machine
    code, so a kernel that divides is judged by its PTX, where they have names of their own.
    """
    if re.search(r"\b(?:div|rcp|sqrt)\.rn\.f32", ptx):
        return len(re.findall(r"\bfma\.", ptx))
    return facts["fused_multiply_adds"]


def per_number(facts: dict[str, Any], itemsize: int) -> float:
    """Instructions of the whole program for each number it stores.

    Where a program has a path for whole tiles and one for the edge, both stand above and below.
    """
    bits = sum(int(width) * count for width, count in facts["stores"].items())
    return facts["instructions"] * 8 * itemsize / bits


def _output(tool: str, *arguments: str) -> str:
    command = [str(TOOLS / tool), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def _widths(opcodes: list[str], kinds: tuple[str, ...]) -> dict[str, int]:
    """Bits a thread moves -> how many such instructions; "bulk" is the tensor copy engine."""
    counts: Counter[str] = Counter()
    for opcode in opcodes:
        kind, *modifiers = opcode.split(".")
        if kind in kinds:
            said = (m.lstrip("US") for m in modifiers)
            width = next((m for m in said if m in ("8", "16", "64", "128", "256")), "32")
            counts["bulk" if kind.startswith("UTMA") else width] += 1
    return dict(counts)


def _matrix_instruction(ptx: str) -> str:
    for name, pattern in (("wgmma", "wgmma"), ("tcgen05", "tcgen05.mma"), ("mma", "mma.sync")):
        if pattern in ptx:
            return name
    return ""


def dots(ttgir: str) -> list[tuple[str, int, int, str]]:
    """Of each matrix product: instruction of the dialect, rows and columns of its tile, operand type."""
    found = set()
    for line in ttgir.splitlines():
        kind = re.search(r"\b(tt\.dot|ttng\.warp_group_dot|ttng\.tc_gen5_mma)\s", line)
        shapes = re.findall(r"(?:tensor|memdesc)<(\d+)x(\d+)x(\w+)", line)
        if kind and len(shapes) >= 3:
            (rows, _, operand), (_, columns, _) = shapes[:2]
            found.add((kind[1].split(".")[1], int(rows), int(columns), operand))
    return sorted(found)


def blocks_per_sm(facts: dict[str, Any], capability: int) -> int:
    """How many blocks a multiprocessor holds at once."""
    sm, warps = card(capability), facts["warps"]
    # Registers go to warps in units of 256, out of 16384 in each of four partitions.
    warp_registers = -(-facts["registers"] * 32 // 256) * 256
    by_registers = 4 * (16384 // max(warp_registers, 1)) // warps
    by_shared = sm.shared // (facts["shared"] + 1024)
    return min(by_registers, by_shared, sm.threads // (32 * warps), sm.blocks)


def failures(kernel: str, facts: dict[str, Any], capability: int) -> list[str]:
    """What is wrong with a compiled kernel; empty where nothing is."""
    available, wrong = card(capability).block_shared, []
    if facts["spill"]:
        wrong.append(f"spill: {facts['spill']} bytes of stack or local memory a thread")
    if facts["shared"] > available:
        wrong.append(f"shared memory: {facts['shared']} bytes, a block has {available}")
    if facts.get("tensor_memory", 0) > TENSOR_MEMORY:
        wrong.append(f"tensor memory: {facts['tensor_memory']} columns of {TENSOR_MEMORY}")
    for kind, rows, columns, operand in facts.get("dots", []):
        half = operand in ("bf16", "f16")
        if capability == 90 and half and rows >= 64 and kind == "dot":
            wrong.append(f"no wgmma: a {rows}x{columns} {operand} product on sm_90 does without")
        elif half and not facts["matrix"]:
            wrong.append(f"no matrix instruction for a {rows}x{columns} {operand} product")
    if kernel.lstrip("_").startswith("nf4") and facts["fused_multiply_adds"]:
        wrong.append(f"{facts['fused_multiply_adds']} fused multiply-adds; NF4's bits need none")
    return wrong
