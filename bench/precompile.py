"""Everything a benchmark will launch compiled at once, on all cores: cases, engine checks, steps.

    python -m bench.precompile [--quick] [--ops a,b]

Launches are recorded on meta tensors and compiled as `fastsft train` does it (fastsft_kernels.precompile),
without a look at the machine code. `compile_everything` is for benchmarks that are about to launch them.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterable, Sequence
from contextlib import closing
from dataclasses import fields, replace
from typing import Any, NamedTuple

import torch
from fastsft_kernels.launch import Launch, record_launches
from fastsft_kernels.precompile import Misses, Precompile, recipes
from triton.runtime import driver

from bench import engine
from bench.kernels import find
from bench.kernels.case import Case
from bench.recordings import META, MULTIPROCESSORS, configurations, record
from bench.train.models import CONFIGS
from fastsft.config import LoraConfig
from fastsft.data.batches import MicroBatch
from fastsft.model.context import StepContext
from fastsft.model.fast import FastEngine
from fastsft.model.lora import add_adapters
from fastsft.model.plan import Plan
from fastsft.model.precompile import micro_batches, record_steps
from fastsft.model.shapes import shaped_model


class Everything(NamedTuple):
    """seconds: from the first recording on; problems: what was not recorded, compiled or linked, and why;
    misses: open, it lists what compiles later all the same."""

    seconds: float
    compiled: int
    problems: list[str]
    misses: Misses


# What bench.engine's checks run: method, plan, and what `engine_on` takes besides.
CHECKED: list[tuple[str, Plan, dict[str, Any]]] = [
    ("qlora", Plan(engine.MIXED), {}),
    ("qlora", Plan(engine.KEEP, resident=2), {}),
    ("lora", Plan(engine.KEEP), {}),
    ("lora", Plan(engine.KEEP), {"masters": torch.bfloat16}),
    (
        "lora",
        Plan(engine.MIXED, mlp_rows=37, head_rows=50, host_embedding=True, host_head=True),
        {},
    ),
    ("full", Plan(engine.MIXED), {"dtype": torch.bfloat16}),
    ("full", Plan(engine.KEEP), {"masters": torch.bfloat16}),
]


def of_cases(cases: Iterable[Case], quick: bool, problems: list[str]) -> list[Launch]:
    """Both shapes of each case; quick: in the default configuration and the dtype of the record."""
    found: list[Launch] = []
    capability = driver.active.get_current_target().arch
    for case in cases:
        for small in (False, True):
            for dtype in case.dtypes[: 1 if quick else None]:
                every = not quick and (small or dtype == case.dtypes[0])
                try:
                    defaults = record(case, capability, dtype, {}, small)
                    found += defaults.launches
                    for one in configurations(defaults)[1:] if every else []:
                        found += record(case, capability, dtype, one.choice, small).launches
                except Exception as error:  # whatever it is, the problem says it
                    where = f"{case.op} {case.label} {dtype}"
                    problems.append(f"{where}: {type(error).__name__}: {error}"[:300])
    return found


def of_checks() -> list[Launch]:
    """bench.engine's checks, whose small model launches kernels of other sizes."""
    lengths = [[70, 1, 133, 19], [200], [70, 133]]
    batches = [
        _on_meta(engine.batch_of(n, engine.SMALL["vocab_size"], engine.CPU)) for n in lengths
    ]
    with _recording() as recording:
        for method, plan, how in CHECKED:
            record_steps(engine.engine_on(META, method, plan, **how), batches)
    return recording.launches


def _on_meta(batch: MicroBatch) -> MicroBatch:
    values = {f.name: getattr(batch, f.name) for f in fields(batch)}
    moved = {n: v.to(META) for n, v in values.items() if isinstance(v, torch.Tensor)}
    return replace(batch, **moved)


def of_steps(model: str, method: str, tokens: int, longest: int = 4096) -> list[Launch]:
    """Steps of up to `tokens` tokens of a model in bench.train.models, LoRA or QLoRA, in bf16."""
    from transformers import AutoConfig

    sizes = dict(CONFIGS[model])
    config = AutoConfig.for_model(sizes.pop("model_type"), **sizes)
    shapes = shaped_model(config, torch.bfloat16, nf4=method == "qlora")
    context = StepContext()
    with torch.device(META):
        add_adapters(shapes, LoraConfig(), seed=0, context=context)
    layers = config.num_hidden_layers
    with _recording() as recording:
        for plan in (
            Plan(("keep",) * layers),
            Plan(("offload",) * layers, mlp_rows=2048),
            Plan(("keep",) * layers, resident=layers if method == "qlora" else 0),
        ):
            record_steps(FastEngine(shapes, context, plan=plan), micro_batches(tokens, longest))
    return recording.launches


def _recording() -> Any:
    capability = driver.active.get_current_target().arch
    return record_launches(capability, MULTIPROCESSORS.get(capability, 132))


def compile_everything(
    cases: Iterable[Case] = (),
    *,
    quick: bool = True,
    checks: bool = True,
    models: Sequence[str] = ("llama-3.1-8b",),
    tokens: int = 16384,
    workers: int | None = None,
) -> Everything:
    """Records and compiles for the active driver's card; workers: processes, None: one a core."""
    began = time.monotonic()
    problems: list[str] = []
    launches = of_cases(cases, quick, problems)
    launches += of_checks() if checks else []
    for model in models:
        for method in ("lora", "qlora"):
            launches += of_steps(model, method, tokens)
    with closing(Precompile(recipes(launches), workers)) as work:
        done = work.join()
    problems += done.problems
    return Everything(time.monotonic() - began, done.kernels, problems, Misses())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ops", default="", help="comma-separated; all by default")
    parser.add_argument("--quick", action="store_true", help="default configurations alone")
    given = parser.parse_args()
    cases = find([o for o in given.ops.split(",") if o])
    done = compile_everything(cases, quick=given.quick)
    done.misses.close()
    for problem in done.problems:
        print(problem)
    print(f"compiled {done.compiled} kernels in {done.seconds:.0f} s")
    return 1 if done.problems else 0


if __name__ == "__main__":
    sys.exit(main())
