"""What a layer costs the host: one thread's microseconds for forward and backward, without a GPU.

    python -m bench.host [--label TEXT] [--repeats N] [--profile] [--out DIR]

One block at the shapes of Llama-3.1-8B runs on meta tensors inside a recording, which is all of a
step's host work but the launches themselves: our code, and torch's dispatch of views, allocations and
products (`code_us`; of it `torch_us`, by making the same operations again by themselves). Then the
recorded launches are made, once through `launch.start` (`launching_us`) and once through Triton's own
`JITFunction.run` (`triton_us`), to a driver that stands in for CUDA's and runs nothing. The kernels are
compiled for sm_90 first, which takes minutes where Triton's cache holds none of them. `integers_us` is what
Triton's `cdiv` takes on the host, and `cdiv_us` ours.

Not in the figures: Triton's launcher in C, the CUDA calls behind it and behind torch's products and
allocations, for which meta's dispatch stands, in Python in part; autograd's node for each block. A
microsecond is one of the process's processor time, the least of the repeats; on a busy machine only
ratios of one row mean something. --profile prints where the time goes, function by function. Rows go
to bench/results/cpu/host.json, beside those of other labels.
"""

from __future__ import annotations

import argparse
import cProfile
import os
import pstats
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

os.environ.pop("TRITON_INTERPRET", None)  # before any kernel is defined: here they are compiled

import torch
import triton
from fastsft_kernels.fused import attention_blocks
from fastsft_kernels.integers import cdiv
from fastsft_kernels.launch import Launch, record_launches, start
from fastsft_kernels.precompile import TargetDriver
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime import driver

from bench import rows
from bench.kernels.lora import nf4_weight
from bench.train.models import CONFIGS
from fastsft.config import LoraConfig
from fastsft.model.block import Block
from fastsft.model.context import StepContext
from fastsft.model.fast import FastEngine
from fastsft.model.lora import add_adapters
from fastsft.model.micro_pass import Pass
from fastsft.model.quant import NF4Linear

RESULTS = Path(__file__).parent / "results"
META = torch.device("meta")
GOAL = 800  # microseconds a layer


class IdleDriver(TargetDriver):
    """A stub that also loads and launches: nothing, that is."""

    def __init__(self, capability: int) -> None:
        super().__init__(capability)
        self.utils = SimpleNamespace(
            load_binary=lambda *_: (0, 0, 0, 0, 1024),
            get_device_properties=lambda _: {"max_shared_mem": 232448},
        )

    def launcher_cls(self, source: Any, metadata: Any) -> Callable[..., None]:
        return lambda *_: None


def engine_of(method: str, dropout: float) -> FastEngine:
    """Two layers, so that the first is not the last, whose rows are fewer."""
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = CONFIGS["llama-3.1-8b"] | {"num_hidden_layers": 2}
    tokens = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    config = AutoConfig.for_model(**sizes, **tokens)
    with META:
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        add_adapters(model, LoraConfig(r=16, dropout=dropout), seed=0, context=StepContext())
    if method == "qlora":
        for name, module in list(model.named_modules()):
            if type(module) is torch.nn.Linear and module is not model.get_output_embeddings():
                model.set_submodule(name, NF4Linear(nf4_weight(*module.weight.shape, META)))
    return FastEngine(model, StepContext())


def pass_of(tokens: int) -> Pass:
    """Four documents of one length."""

    def empty(*shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=META)

    cos, sin = (empty(tokens, 64, dtype=torch.float32) for _ in range(2))
    keys, trained = empty(tokens), empty(tokens // 2)
    return Pass(
        cu_seqlens=empty(5, dtype=torch.int32),
        max_seqlen=tokens // 4,
        blocks=attention_blocks([tokens // 4] * 4, META),
        rope={"": (cos, sin)},
        keys=keys,
        last_rows=trained,
        last_keys=trained,
        seed=1,
        step=1,
        training=True,
    )


def passer(engine: FastEngine, tokens: int) -> Callable[[], None]:
    """Forward and backward of the first block."""
    block: Block = engine.blocks[0]
    known = pass_of(tokens)
    known = known._replace(rope=dict.fromkeys(engine.tables, known.rope[""]))
    x, branch, grad = (
        torch.empty(tokens, 4096, dtype=torch.bfloat16, device=META) for _ in range(3)
    )

    def run() -> None:
        engine.buffers.forget()
        kept = block.forward(x, branch, known, engine.buffers, policy="keep")[2]
        block.backward(grad, kept, known, engine.buffers, mlp_rows=None, to_input=True)

    return run


def relaunch(launches: list[Launch]) -> None:
    for one in launches:
        start(one.kernel, one.grid, META, one.args, one.options)


class Operations(TorchDispatchMode):
    """Notes torch's operations."""

    def __init__(self) -> None:
        super().__init__()
        self.made: list[tuple[Any, tuple[Any, ...], dict[str, Any]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.made.append((func, args, kwargs or {}))
        return func(*args, **(kwargs or {}))

    def again(self) -> None:
        for func, args, kwargs in self.made:
            func(*args, **kwargs)


def triton_launch(launches: list[Launch]) -> None:
    for one in launches:
        one.kernel[one.grid](*one.args, **one.options)


def microseconds(run: Callable[[], None], repeats: int) -> float:
    """The least processor time of a call over `repeats` rounds of ten."""
    best = float("inf")
    for _ in range(repeats):
        before = time.process_time()
        for _ in range(10):
            run()
        best = min(best, (time.process_time() - before) / 10)
    return 1e6 * best


def measure(
    method: str, tokens: int, dropout: float, repeats: int, profile: bool
) -> dict[str, Any]:
    """One row."""
    with record_launches() as recording:
        run = passer(engine_of(method, dropout), tokens)
        run()  # what the first call alone does
        recording.launches.clear()
        with Operations() as operations:
            run()
        launches = list(recording.launches)
        relaunch(launches)  # compiles

        def forgetful() -> None:
            recording.launches.clear()
            run()

        code = microseconds(forgetful, repeats)
        torchs = microseconds(operations.again, repeats)
        launching = microseconds(lambda: relaunch(launches), repeats)
        tritons = microseconds(lambda: triton_launch(launches), repeats)
        if profile:
            _profile(forgetful)
            _profile(lambda: relaunch(launches))
    return {
        "method": method,
        "tokens": tokens,
        "dropout": dropout,
        "launches": len(launches),
        "operations": len(operations.made),
        "code_us": round(code),
        "torch_us": round(torchs),
        "launching_us": round(launching),
        "triton_us": round(tritons),
        "integers_us": round(microseconds(lambda: triton.cdiv(1000, 64), repeats), 2),
        "cdiv_us": round(microseconds(lambda: cdiv(1000, 64), repeats), 2),
        "layer_us": round(code + launching),
        "goal_us": GOAL,
    }


def _profile(run: Callable[[], None]) -> None:
    profiler = cProfile.Profile()
    profiler.enable()
    for _ in range(50):
        run()
    profiler.disable()
    pstats.Stats(profiler).sort_stats("tottime").print_stats(40)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--label", default="")
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    driver.set_active(IdleDriver(90))
    path = options.out / "cpu" / "host.json"
    _, found = rows.load(path)
    kept = [row for row in found if row["label"] != options.label]
    about = rows.circumstances(rows.TRAINING) | {"card": rows.processor()}
    for method, dropout in (("qlora", 0.0), ("qlora", 0.1), ("lora", 0.0)):
        row = measure(method, 1024, dropout, options.repeats, options.profile)
        kept.append({"label": options.label} | row)
        print(kept[-1], flush=True)
        rows.save(path, about, kept)
    return 0


if __name__ == "__main__":
    sys.exit(main())
