"""nvcc's own report for csrc/: the CUDA C++ kernels compiled for each target, read like Triton's.

Rows only where nvcc is; without it there are none, and nothing fails.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from bench import compiled, rows

SOURCES = rows.ROOT / "csrc"
# As the wheel's build compiles them (setup.py).
FLAGS = ("-O3", "-std=c++17", "--fmad=false")


def static_rows(targets: Iterable[int]) -> list[dict[str, Any]]:
    """One row per kernel of csrc/*.cu and target."""
    files = sorted(SOURCES.glob("*.cu"))
    if not files or not shutil.which("nvcc"):
        return []
    found = []
    for file in files:
        for capability in targets:
            found += _compile(file, capability)
    return found


def _compile(file: Path, capability: int) -> list[dict[str, Any]]:
    base: dict[str, Any] = {"case": file.name, "op": "csrc", "dtype": "", "choice": "nvcc"}
    base |= {"capability": capability, "options": {}}
    with tempfile.TemporaryDirectory() as folder:
        ptx, cubin = (str(Path(folder) / f"out.{suffix}") for suffix in ("ptx", "cubin"))
        to_ptx = ["nvcc", *FLAGS, "-ptx", f"-arch=compute_{capability}", "-o", ptx, str(file)]
        to_cubin = ["nvcc", "-cubin", f"-arch=sm_{capability}", "-o", cubin, ptx]
        for command in (to_ptx, to_cubin):
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                failure = f"does not compile: {done.stderr[-300:]}"
                return [base | {"kernel": file.stem, "failures": [failure]}]
        kernels = compiled.describe_cubin(Path(cubin))
        bodies = Path(ptx).read_text().split(".entry ")
    found = []
    for name, facts in kernels.items():
        (body,) = [b for b in bodies if b.startswith(name + "(")]
        facts["fused_multiply_adds"] = compiled.fused_multiply_adds(facts, body)
        short = _readable(name)
        if "nf4_dequantize_words" in short:
            facts["per_weight"] = compiled.per_number(facts, 4 if "<float" in short else 2)
        wrong = compiled.failures(short, facts, capability)
        found.append(base | {"kernel": short} | facts | {"failures": wrong})
    return found


def _readable(name: str) -> str:
    """The kernel's name with its template arguments, without namespaces and parameters."""
    tool = shutil.which("cu++filt") or shutil.which("c++filt")
    if not tool:
        return name
    done = subprocess.run([tool, name], capture_output=True, text=True, check=True)
    plain = done.stdout.replace("(anonymous namespace)::", "")
    return re.sub(r"^(?:void )?(\w+(?:<.*>)?)\(.*", r"\1", plain.strip())
