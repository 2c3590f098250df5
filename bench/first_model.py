"""Training steps of an 8B model for bench.first: random weights, the planner's plans, goals."""

from __future__ import annotations

import json
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench import engine, limits
from bench.first_steps import Bench, Figures
from bench.planned import GOAL_TOKENS, GOALS
from bench.train import work
from bench.train.clock import read_trace
from bench.train.models import CONFIGS
from bench.train.workloads import TINY, WORKLOADS, Rows, generate
from fastsft.config import make_config
from fastsft.data.batches import Document, MicroBatch, collate
from fastsft.data.loader import to_device
from fastsft.model.context import StepContext
from fastsft.model.fast import FastEngine
from fastsft.model.memory import predict
from fastsft.model.planner import describe
from fastsft.model.planning import job_of, make_plan
from fastsft.model.spec import read_spec
from fastsft.optim import apply_update, build_optimizer

# Name -> keys of the run. "decoded each time" is what a smaller card would do.
ROWS: dict[str, dict[str, Any]] = {
    "lora": {"method": "lora"},
    "qlora resident": {"method": "qlora"},
    "qlora decoded": {"method": "qlora", "vram": "24GB"},
    "qlora offload": {"method": "qlora", "activations": "offload"},
}
WITH_GOALS = ("lora", "qlora resident")
WARM, TIMED = 2, 4


def measure_model(name: str, bench: Bench) -> None:
    """2 steps to warm up, 4 timed, 1 profiled, for short documents and for long ones."""
    small = bench.quick or not bench.on_gpu
    sizes = engine.SMALL if small else CONFIGS["llama-3.1-8b"]
    dtype = torch.bfloat16 if bench.on_gpu else torch.float32
    keys = dict(ROWS[name])
    if small:
        keys.pop("vram", None)
    longest = 64 if small else 4096
    if not keys.get("vram"):
        keys["micro_batch_tokens"] = 4 * longest if small else GOAL_TOKENS
    config = make_config({"model": "m", "data": "d", "lora": {"r": 16, "alpha": 32}, **keys})
    context = StepContext(seed=5)
    model = engine.model_of(sizes, config.method, dtype, bench.device, context)
    job = job_of(model, read_spec(model.config), config, dtype)
    planned = make_plan(config, job, bench.device, longest).planned
    fast = FastEngine(model, context, plan=planned.plan)
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    optimizer = build_optimizer(named, config)
    figures = Figures(bench, "model", name)
    figures.add(
        f"{name}: plan", "", f"{planned.micro_batch_tokens} tokens, {describe(planned.plan)}"
    )
    for kind in ("alpaca", "long"):
        rows = rows_of(kind, planned.micro_batch_tokens, longest, sizes["vocab_size"], small)
        batch = batch_of(rows, bench.device)
        found = steps(fast, optimizer, batch, bench)
        speed = batch.tokens / found["seconds"]
        goal = next(
            g[3] for g in GOALS if g[0] == config.method and (g[1] == 4096) == (kind == "long")
        )
        label = f"{name}, {kind}"
        figures.add(f"{label}: speed", "tokens/s", speed,
                    goal if name in WITH_GOALS and not small else None,
                    fastest_possible(sizes, rows, config.method, bench))  # fmt: skip
        if bench.on_gpu:
            memory = predict(job, planned.plan, len(batch.ids), len(batch.trained_rows))
            promised = (memory.peak - memory.context) / 1e9
            for which in ("allocated", "reserved"):
                figures.add(f"{label}: {which}", "GB", found[which] / 1e9, limit=promised)
            figures.add(f"{label}: busy", "%", found["device_seconds_a_step"] / found["seconds"])
            figures.add(f"{label}: launches", "", found["launches_a_step"])


def rows_of(kind: str, tokens: int, longest: int, vocabulary: int, small: bool) -> Rows:
    """Rows that fill a micro-batch of `tokens`: Alpaca's lengths, or `longest` and all trained."""
    if kind == "long":
        count = max(1, tokens // longest)
        ids = np.random.default_rng(0).integers(3, vocabulary, count * longest).astype(np.int32)
        return Rows(ids, np.ones(len(ids), bool), np.full(count, longest))
    found = generate((TINY if small else WORKLOADS)["alpaca"], tokens // 16, vocabulary)
    fitting = int((np.cumsum(found.lengths) <= tokens).sum())
    end = int(found.lengths[:fitting].sum())
    return Rows(found.ids[:end], found.trained[:end], found.lengths[:fitting])


def batch_of(rows: Rows, device: torch.device) -> MicroBatch:
    documents = [Document(i, *rows[i]) for i in range(len(rows))]
    return to_device(collate(documents, int(rows.targets.sum()), round_to=64), device)


def steps(fast: FastEngine, optimizer: Any, batch: MicroBatch, bench: Bench) -> dict[str, Any]:
    """Seconds of a step; on a GPU peaks, launches and the time the device worked, too."""

    def take(count: int) -> float:
        started = time.perf_counter()
        for _ in range(count):
            fast.loss(batch, step=1).loss_sum.backward()
            apply_update(optimizer, 0.0, 1.0)
        if bench.on_gpu:
            torch.cuda.synchronize()
        return (time.perf_counter() - started) / count

    if bench.on_gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    take(WARM)
    found: dict[str, Any] = {"seconds": take(TIMED)}
    if not bench.on_gpu:
        return found
    found["allocated"] = torch.cuda.max_memory_allocated()
    found["reserved"] = torch.cuda.max_memory_reserved()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        take(1)
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        profile.export_chrome_trace(str(trace))
        return found | read_trace(json.loads(trace.read_text()), 1)


def fastest_possible(sizes: dict[str, Any], rows: Rows, method: str, bench: Bench) -> float | None:
    """Tokens a second if the card did nothing but the needed products, at the rate it reached."""
    rates = limits.rates_of(bench.books["kernels"].about["card"], bench.books["kernels"].rows)
    if rates is None:
        return None
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(sizes))
        needed = work.operations(Path(folder), rows, method, 16)
    return float(rows.lengths.sum()) * rates.flops / needed
