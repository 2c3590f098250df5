"""Is this machine fit to train, and on what: versions, GPU, Triton's needs, and every kernel op.

The report of `fastsft doctor`. What a run itself asks before it starts is in device.py.
"""

import importlib.metadata
import os
import platform
import shutil
import sysconfig
from pathlib import Path

import torch
from rich.table import Table

from fastsft.console import RunConsole, size
from fastsft.device import Facts, gather, why_no_gpu
from fastsft.selfcheck import OpCheck, check_ops

PACKAGES = (
    "torch triton bitsandbytes transformers tokenizers tiktoken datasets safetensors numpy".split()
)


def missing_for_triton() -> str | None:
    """What Triton lacks to build its launchers, in one sentence; None when it has everything."""
    compiler = os.environ.get("CC") or next(filter(shutil.which, ("gcc", "clang", "cc")), None)
    if compiler is None or shutil.which(compiler) is None:
        return (
            "Triton needs a C compiler and none is found (gcc, clang or $CC). Install one, for "
            "example with: apt install gcc."
        )
    header = Path(sysconfig.get_paths()["include"]) / "Python.h"
    if not header.exists():
        return (
            f"Triton needs Python's headers and {header} is missing. Install them, for example "
            f"with: apt install python{'.'.join(platform.python_version_tuple()[:2])}-dev."
        )
    return None


def doctor(console: RunConsole | None = None) -> int:
    """Print the report; 0 when everything works, 2 when something here needs mending."""
    console = console or RunConsole()
    facts = gather()
    problems = [problem for problem in (why_no_gpu(facts),) if problem]
    console.print(_versions())
    console.print(_gpu_line(facts))
    lacks = missing_for_triton()
    if facts.torch_sees_gpu and lacks:
        problems.append(lacks)
    console.print(f"Triton:  {lacks or 'C compiler and Python.h found'}")
    device = torch.device("cuda", 0) if facts.torch_sees_gpu else torch.device("cpu")
    checks = check_ops(device)
    console.print(_op_table(checks, device))
    problems += [
        f"{c.op} is wrong on this machine: error {c.error:.1e}" for c in checks if not c.ok
    ]
    for problem in problems:
        console.warn(problem)
    if not problems:
        console.print("All well. Next:")
        console.print("fastsft train")
    return 2 if problems else 0


def _versions() -> str:
    lines = [f"python {platform.python_version()} on {platform.platform()}"]
    for name in PACKAGES:
        try:
            lines.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            lines.append(f"{name} is not installed")
    return "\n".join(lines)


def _gpu_line(facts: Facts) -> str:
    built = (
        f"torch is built for CUDA {facts.torch_cuda}" if facts.torch_cuda else "torch has no CUDA"
    )
    if not facts.gpus and not facts.torch_sees_gpu:
        return f"GPU:     no NVIDIA GPU; {built}; training runs on {os.cpu_count()} CPU cores"
    names = ", ".join(facts.gpus)
    if facts.torch_sees_gpu:
        card = torch.cuda.get_device_properties(0)
        names = f"{card.name} (sm_{card.major}{card.minor}, {size(card.total_memory)})"
    return f"GPU:     {names}; driver {facts.driver or 'unknown'}; {built}"


def _op_table(checks: list[OpCheck], device: torch.device) -> Table:
    table = Table(title=f"kernel ops on {device}", title_justify="left")
    for heading in ("op", "runs on", "why", "error against float64", "verdict"):
        table.add_column(heading)
    for check in checks:
        verdict = "ok" if check.ok else "WRONG"
        table.add_row(check.op, check.backend, check.why, f"{check.error:.1e}", verdict)
    return table
