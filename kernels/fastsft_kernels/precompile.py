"""Compiles recorded launches before their first use, in parallel processes that need no GPU.

    launches on meta tensors -> recipes, one a kernel -> a child process with workers -> Triton's cache

What is compiled is what a launch would look for: Triton itself says, through its `jit_cache_hook`, which
specialisation a launch needs, and takes it back in `JITFunction.preload`. The child is a process of its own
since one that uses CUDA cannot be forked, and it compiles while its parent does something else. Where Triton
builds a launcher in C for each signature (3.6 does, 3.7 does not), the workers build those too.

`Misses` lists what was compiled later all the same, at a launch that waited for it.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any, NamedTuple

from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.errors import TritonError
from triton.runtime import driver

from fastsft_kernels.launch import Launch


class Recipe(NamedTuple):
    """One kernel to compile: where its function is, and Triton's own description of the rest."""

    module: str
    name: str
    specialization: str


class Compiled(NamedTuple):
    """kernels: how many are in the cache now; problems: a line for each that is not, or its launcher."""

    kernels: int
    seconds: float
    problems: list[str]


class PrecompileError(RuntimeError):
    """The process that compiles ended without a result."""


class TargetDriver:
    """Takes the place of CUDA's driver: names a target, runs nothing."""

    def __init__(self, capability: int) -> None:
        self.capability = capability

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        return self.capability  # Triton keeps compiled kernels by device: one per target

    def get_current_stream(self, device: int | None = None) -> int:
        return 0


def recipes(launches: Iterable[Launch]) -> list[Recipe]:
    """What the launches need compiled for the active driver's card, each kernel once.

    A kernel that this process has compiled or loaded already is left out.
    """
    found: dict[Recipe, None] = {}

    def note(*, fn: Any, compile: dict[str, Any], **_: Any) -> bool:
        found[Recipe(fn.module, fn.name, compile["specialization_data"])] = None
        return True  # and Triton leaves it at that

    before = knobs.runtime.jit_cache_hook
    knobs.runtime.jit_cache_hook = note
    try:
        for launch in launches:
            launch.kernel.warmup(*launch.args, grid=launch.grid, **launch.options)
    finally:
        knobs.runtime.jit_cache_hook = before
    return list(found)


class Precompile:
    """Compilation under way in the background. `join` waits for it; `close` ends it where it stands."""

    def __init__(self, todo: list[Recipe], workers: int | None = None) -> None:
        """workers: processes; None: one for each core that this process may use."""
        self.todo, self.began = todo, time.monotonic()
        self._process: subprocess.Popen[bytes] | None = None
        if not todo:
            return
        workers = min(workers or len(os.sched_getaffinity(0)), len(todo))
        capability = driver.active.get_current_target().arch
        self._said = tempfile.TemporaryFile()  # noqa: SIM115 (`close` closes it)
        with tempfile.TemporaryFile("w+") as asked:
            json.dump({"capability": capability, "workers": workers, "todo": todo}, asked)
            asked.seek(0)
            self._process = subprocess.Popen(
                [sys.executable, "-m", "fastsft_kernels.precompile"],
                stdin=asked,
                stdout=self._said,
                stderr=subprocess.STDOUT,
                env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
                start_new_session=True,  # so that its workers end with it
            )

    def join(self) -> Compiled:
        """Raises PrecompileError where the child ended without saying what it did."""
        if self._process is None:
            return Compiled(0, 0.0, [])
        status = self._process.wait()
        self._said.seek(0)
        *_, last = self._said.read().decode(errors="replace").splitlines() or [""]
        if status:
            raise PrecompileError(f"exit status {status}: {last[:200]}")
        result = json.loads(last)
        missing = result["missing"]
        seconds = result["ended"] - self.began
        return Compiled(len(self.todo) - missing, seconds, result["problems"])

    def close(self) -> None:
        if self._process is None:
            return
        if self._process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
        self._said.close()


class Misses:
    """From here to `close`: names of kernels that Triton compiles, because its cache has them not."""

    def __init__(self) -> None:
        self.names: list[str] = []
        self._before = knobs.compilation.listener
        knobs.compilation.listener = self._note

    def _note(self, *, src: Any, cache_hit: bool, **_: Any) -> None:
        if not cache_hit:
            self.names.append(src.name)

    def close(self) -> None:
        knobs.compilation.listener = self._before


# --- the child -------------------------------------------------------------------------------------


def build_launcher(kernel: Any) -> None:
    """Builds the C launcher of a compiled kernel where Triton has one for each signature."""
    from triton.backends.nvidia import driver as nvidia

    if hasattr(nvidia, "make_launcher"):
        nvidia.CudaLauncher(kernel.src, kernel.metadata)


def compile_one(recipe: Recipe) -> tuple[bool, str]:
    """(whether the kernel is in the cache, what went wrong with it or its launcher)."""
    compiled = False
    try:
        function = getattr(importlib.import_module(recipe.module), recipe.name)
        kernel = function.preload(recipe.specialization)
        compiled = True
        build_launcher(kernel)
    except (
        TritonError,
        RuntimeError,
        ValueError,
        AssertionError,
        OSError,
        subprocess.SubprocessError,
    ) as error:
        what = "kernel" if not compiled else "launcher"
        return compiled, f"{what} of {recipe.name}: {type(error).__name__}: {error}"[:300]
    return compiled, ""


def main() -> None:
    """Reads from standard input what `Precompile` asks; the last line of output is the result."""
    asked = json.load(sys.stdin)
    driver.set_active(TargetDriver(asked["capability"]))
    todo = [Recipe(*recipe) for recipe in asked["todo"]]
    for module in dict.fromkeys(recipe.module for recipe in todo):
        importlib.import_module(module)  # once, for all workers
    results = []
    with ProcessPoolExecutor(asked["workers"], multiprocessing.get_context("fork")) as pool:
        futures = [pool.submit(compile_one, recipe) for recipe in todo]
        for recipe, future in zip(todo, futures, strict=True):
            try:
                results.append(future.result())
            except BrokenProcessPool:
                results.append((False, f"kernel of {recipe.name}: its process ended"))
    missing = sum(not compiled for compiled, _ in results)
    problems = [problem for _, problem in results if problem]
    result = {"missing": missing, "problems": problems, "ended": time.monotonic()}
    print("\n" + json.dumps(result))


if __name__ == "__main__":
    main()
