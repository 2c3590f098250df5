"""What to compute on, and in which dtype: asked by everything that loads a model.

Where an NVIDIA GPU is present and torch cannot use it, that is an error with its cause and never a
silent run on the CPU; whoever wants the CPU says so with CUDA_VISIBLE_DEVICES="". The verdict is a
pure function of the facts gathered, so that every cause can be tested on a machine that has none
of them.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import warnings
from dataclasses import dataclass
from pathlib import Path

import torch

from fastsft.errors import UserError

# The oldest driver that runs a CUDA major version, by NVIDIA's compatibility table.
OLDEST_DRIVER = {11: 450, 12: 525, 13: 580}


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
    """The device to work on: the first visible NVIDIA GPU, or the CPU where there is none.

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


def choose_dtype(wanted: str, device: torch.device) -> torch.dtype:
    """The dtype of the computation. wanted: fp32, bf16 or auto, which is bf16 where the card has it.

    Raises UserError for bf16 on a card that would only emulate it.
    """
    if wanted == "fp32":
        return torch.float32
    native = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    if wanted == "bf16" and device.type == "cuda" and not native:
        raise UserError(
            f"dtype: bf16 is not in the hardware of {torch.cuda.get_device_name(device)}; use dtype: fp32"
        )
    return torch.bfloat16 if native or wanted == "bf16" else torch.float32


def free_host_memory() -> int:
    """Bytes of host memory that can be had: what the kernel calls available, within the container's limit."""
    fields = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
    free = 1024 * int(fields["MemAvailable"].split()[0])
    limit, used = (Path(f"/sys/fs/cgroup/memory.{name}") for name in ("max", "current"))
    if limit.exists() and used.exists() and limit.read_text().strip() != "max":
        free = min(free, int(limit.read_text()) - int(used.read_text()))
    return max(free, 0)


def grow_segments() -> None:
    """Lets torch's allocator grow its segments, before CUDA starts; what the user has set stays.

    Micro-batches differ in length, and segments of fixed size would leave a gap for every length.
    """
    if not {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"} & set(os.environ):
        os.environ["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"
