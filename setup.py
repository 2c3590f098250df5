"""What setup metadata cannot hold: where `fastsft_kernels` lives, and the optional CUDA build.

`kernels/` itself must never become a package: a regular package of that name in the working
directory shadows Hugging Face's `kernels`, which transformers imports.

FASTSFT_BUILD_EXT=1 compiles csrc/ with nvcc into one shared library beside `cuda_ops`. It holds
machine code for the cards below and PTX for later ones, and links neither torch nor Python, so one
build serves every version of both. Without it nothing is compiled and nothing is missing: Triton
has the same kernels.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import SetupError

CARDS = (80, 86, 89, 90, 100, 120)
# No fused multiply-adds: NF4's scales have other bits with them.
FLAGS = "-O3 -std=c++17 --fmad=false -Xptxas -v -Xcompiler -fPIC,-ffp-contract=off".split()
LIBRARY = Extension(
    "fastsft_kernels.cuda_ops.libfastsft", ["csrc/nf4.cu"], depends=["csrc/nf4.cuh"]
)


class BuildWithNvcc(build_ext):
    """Compiles an extension with nvcc to a plain shared library, without Python's file suffix."""

    def get_ext_filename(self, fullname: str) -> str:
        return os.path.join(*fullname.split(".")) + ".so"

    def build_extension(self, ext: Extension) -> None:
        nvcc = find_nvcc()
        known = known_cards(nvcc)
        cards = [c for c in CARDS if c in known]
        missing = ", ".join(f"sm_{c}" for c in CARDS if c not in known)
        if not cards:
            raise SetupError(f"{nvcc} compiles for none of {CARDS}. Install CUDA 11.8 or later.")
        if missing:
            print(f"fastsft: {nvcc} does not know {missing}; left out", file=sys.stderr)
        targets = [f"-gencode=arch=compute_{c},code=sm_{c}" for c in cards]
        targets.append(f"-gencode=arch=compute_{cards[-1]},code=compute_{cards[-1]}")
        path = Path(self.get_ext_fullpath(ext.name))
        path.parent.mkdir(parents=True, exist_ok=True)
        command = [nvcc, "-shared", "--threads=0", *FLAGS, *targets, *ext.sources, "-o", str(path)]
        if subprocess.run(command, check=False).returncode:
            raise SetupError(f"nvcc failed: {' '.join(command)}")


def find_nvcc() -> str:
    home = os.environ.get("CUDA_HOME") or "/usr/local/cuda"
    found = shutil.which("nvcc") or shutil.which("nvcc", path=os.path.join(home, "bin"))
    if found is None:
        raise SetupError(
            f"FASTSFT_BUILD_EXT=1 needs nvcc, and there is none on PATH or in {home}/bin. "
            "Install the CUDA toolkit, set CUDA_HOME, or install without FASTSFT_BUILD_EXT."
        )
    return found


def known_cards(nvcc: str) -> set[int]:
    done = subprocess.run([nvcc, "--list-gpu-arch"], capture_output=True, text=True, check=False)
    if done.returncode:
        raise SetupError(f"{nvcc} --list-gpu-arch failed: {done.stderr.strip()}")
    numbers = [line.strip().removeprefix("compute_") for line in done.stdout.splitlines()]
    return {int(n) for n in numbers if n.isdigit()}


setup(
    package_dir={"fastsft_kernels": "kernels/fastsft_kernels"},
    ext_modules=[LIBRARY] if os.environ.get("FASTSFT_BUILD_EXT") == "1" else [],
    cmdclass={"build_ext": BuildWithNvcc},
)
