"""Is this machine fit to train, and on what: versions, GPU, Triton's needs, and every kernel op.

`check_device` is also what a training run asks first. Where an NVIDIA GPU is present and torch
cannot use it, that is an error with its cause and never a silent run on the CPU; whoever wants the
CPU says so with CUDA_VISIBLE_DEVICES="". The verdict is a pure function of the facts gathered, so
that every cause can be tested on a machine that has none of them.
"""

import importlib.metadata
import os
import platform
import shutil
import subprocess
import sysconfig
import warnings
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.table import Table

from fastsft.console import RunConsole, size
from fastsft.errors import UserError
from fastsft.selfcheck import OpCheck, check_ops

# The oldest driver that runs a CUDA major version, by NVIDIA's compatibility table.
OLDEST_DRIVER = {11: 450, 12: 525, 13: 580}
PACKAGES = (
    "torch triton bitsandbytes transformers tokenizers tiktoken datasets safetensors numpy".split()
)


@dataclass(frozen=True)
class Facts:
    """What was found. `driver` and `gpus` come from the system, the rest from torch."""

    torch_version: str
    torch_cuda: str | None  # the CUDA torch was built for; None in a CPU build
    torch_sees_gpu: bool
    torch_says: str = ""  # torch's own warning when CUDA could not start
    driver: str | None = None
    gpus: tuple[str, ...] = ()
    device_files: bool = False
    visible: str | None = None  # CUDA_VISIBLE_DEVICES


def gather() -> Facts:
    """Ask torch, the driver's files and nvidia-smi; the latter only where torch sees no GPU."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        sees = torch.cuda.is_available()
    driver, gpus = _driver()
    return Facts(
        torch_version=torch.__version__,
        torch_cuda=torch.version.cuda,
        torch_sees_gpu=sees,
        torch_says=" ".join(str(w.message).split(" (Triggered")[0] for w in caught),
        driver=driver,
        gpus=gpus,
        device_files=any(Path("/dev").glob("nvidia[0-9]*")),
        visible=os.environ.get("CUDA_VISIBLE_DEVICES"),
    )


def _driver() -> tuple[str | None, tuple[str, ...]]:
    """Driver version and GPU names, from nvidia-smi or, without it, from the driver's own files."""
    if shutil.which("nvidia-smi"):
        query = ["nvidia-smi", "--query-gpu=driver_version,name", "--format=csv,noheader"]
        try:
            answer = subprocess.run(query, capture_output=True, text=True, timeout=20, check=False)
        except (OSError, subprocess.TimeoutExpired):
            answer = None
        rows = [line.split(", ", 1) for line in answer.stdout.splitlines()] if answer else []
        if answer and answer.returncode == 0 and rows and all(len(row) == 2 for row in rows):
            return rows[0][0], tuple(row[1] for row in rows)
    folders = sorted(Path("/proc/driver/nvidia/gpus").glob("*"))
    if not folders:
        return None, ()
    version = Path("/proc/driver/nvidia/version")
    words = version.read_text().split() if version.exists() else []
    number = next((word for word in words if word[0].isdigit() and "." in word), None)
    return number, tuple(f"NVIDIA GPU at {folder.name}" for folder in folders)


def why_no_gpu(facts: Facts) -> str | None:
    """One sentence when a GPU is present and torch cannot use it, with the cause; else None."""
    if facts.torch_sees_gpu or not facts.gpus or facts.visible in ("", "-1"):
        return None
    found = f"this machine has {facts.gpus[0]}, but torch {facts.torch_version} cannot use it: "
    on_cpu = ' To train on the CPU all the same, set CUDA_VISIBLE_DEVICES="".'
    if facts.torch_cuda is None:
        cause = "it is a build without CUDA. Install one with it, as pytorch.org/get-started says"
        return f"{found}{cause}.{on_cpu}"
    needed = OLDEST_DRIVER.get(int(facts.torch_cuda.split(".")[0]), 0)
    if facts.driver and int(facts.driver.split(".")[0]) < needed:
        cause = (
            f"the driver {facts.driver} is too old for its CUDA {facts.torch_cuda}, which needs "
            f"{needed} or newer. Update the driver, or install a torch for an older CUDA, as "
            "pytorch.org/get-started says"
        )
        return f"{found}{cause}.{on_cpu}"
    if not facts.device_files:
        cause = "there is no /dev/nvidia0 here; a container must be given the GPU (--gpus all)"
        return f"{found}{cause}.{on_cpu}"
    if facts.visible is not None:
        return f"{found}CUDA_VISIBLE_DEVICES={facts.visible} names no GPU it has.{on_cpu}"
    return f"{found}{facts.torch_says or 'CUDA does not start, without a reason given'}.{on_cpu}"


def check_device() -> torch.device:
    """The device to train on: the first visible NVIDIA GPU, or the CPU where there is none.

    Raises UserError where a GPU is present and torch cannot use it.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what torch warns of here is said by why_no_gpu
        if torch.cuda.is_available():
            return torch.device("cuda", 0)
    problem = why_no_gpu(gather())
    if problem:
        raise UserError(problem)
    return torch.device("cpu")


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
