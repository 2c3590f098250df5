"""The fast engine on this machine: right numbers, no wait for the device, the memory that was promised.

    python -m bench.engine [--quick] [--model M] [--tokens N] [--out DIR]

Checks, on a small model with heads of 64, each a row with its worst relative error:

    step            a QLoRA step, dropout, policies mixed, offload among them, against the CPU's references
    half            the same in bf16: no farther from float32 than the references in bf16 are, times 2
    policies        offload, recomputation: the kept block's gradients bit for bit
    tiles           MLP tiles, head pieces, embedding and head on the host
    full            every weight, fp32 masters under bf16 products
    rounded         bf16 weights, update in backward: neighbours of what float32 gives
    no waiting      a step with torch's synchronisation debugging set to raise (on a GPU)

Then memory, on a GPU: one step of `--model` under each policy for LoRA and QLoRA, what the allocator had
reserved at its peak beside the planner's prediction (goal: within 3 %), and how much was allocated.
Results go to bench/results/<card>/engine.json.
"""

from __future__ import annotations

import argparse
import gc
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from fastsft_kernels import nf4_quantize
from torch import Tensor

from bench import ledger
from bench.rows import TRAINING
from bench.train.models import CONFIGS
from fastsft.config import LoraConfig, make_config
from fastsft.data.batches import Document, MicroBatch, collate
from fastsft.data.loader import to_device
from fastsft.device import grow_segments
from fastsft.model.context import StepContext
from fastsft.model.fast import FastEngine
from fastsft.model.lora import add_adapters
from fastsft.model.memory import predict
from fastsft.model.plan import POLICIES, Plan
from fastsft.model.planning import job_of
from fastsft.model.quant import NF4Linear
from fastsft.model.spec import read_spec
from fastsft.optim import apply_update, build_optimizer

KEY = ("kind", "case", "model", "method", "policy", "tokens")
SMALL = {
    "model_type": "llama",
    "vocab_size": 512,
    "hidden_size": 192,
    "intermediate_size": 320,
    "num_hidden_layers": 4,
    "num_attention_heads": 3,
    "num_key_value_heads": 1,
    "head_dim": 64,
    "tie_word_embeddings": False,
}
MIXED = ("offload", "recompute_mlp", "recompute_block", "offload")
KEEP = ("keep",) * 4
Gradients = dict[str, Tensor]


def model_of(
    sizes: dict[str, Any],
    method: str,
    dtype: torch.dtype,
    device: torch.device,
    context: StepContext,
) -> Any:
    """A random model with what `method` puts on it; the same numbers on every device."""
    from transformers import AutoConfig, AutoModelForCausalLM

    tokens = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    options = {k: v for k, v in sizes.items() if k != "model_type"}
    config = AutoConfig.for_model(sizes["model_type"], **options, **tokens)
    large = sizes is not SMALL
    torch.manual_seed(0)
    with torch.device(device if large else "cpu"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype if large else torch.float32)
    model.to(dtype)
    if method == "qlora":
        for name, module in list(model.named_modules()):
            if type(module) is torch.nn.Linear and module is not model.get_output_embeddings():
                model.set_submodule(name, NF4Linear(nf4_quantize(module.weight.detach())))
    if method != "full":
        lora = LoraConfig(r=16, alpha=32, dropout=0.0 if large else 0.1)
        adapters = add_adapters(model, lora, seed=0, context=context)
        for layer in adapters.layers.values():
            layer.lora_B.data.normal_(
                0, 0.02, generator=torch.Generator().manual_seed(1)
            ) if not large else None
    return model.to(device)


def batch_of(lengths: list[int], vocabulary: int, device: torch.device) -> MicroBatch:
    """Random documents, half of their tokens to be learned."""
    rng = np.random.default_rng(0)
    documents = []
    for key, n in enumerate(lengths):
        trained = rng.random(n) < 0.5
        trained[-1] = True
        documents.append(Document(key, rng.integers(0, vocabulary, n).astype(np.int32), trained))
    counted = sum(int(d.trained[1:].sum()) for d in documents)
    return to_device(collate(documents, counted, round_to=64), device)


def engine_on(device: torch.device, method: str, plan: Plan, **how: Any) -> FastEngine:
    """masters: dtype of the weights as loaded; dtype: of the products."""
    context = StepContext(seed=5)
    masters = how.pop("masters", torch.float32)
    model = model_of(SMALL, method, masters, device, context)
    return FastEngine(model, context, plan=plan, **how)


def step(engine: FastEngine) -> Gradients:
    """The loss and every gradient of a step of two micro-batches, on the CPU in float32."""
    device, total = engine.masters.device, torch.zeros(())
    for lengths in ([70, 1, 133, 19], [200]):
        loss = engine.loss(batch_of(lengths, SMALL["vocab_size"], device), step=3).loss_sum
        loss.backward()
        total += loss.detach().cpu()
    found = {n: p.grad for n, p in engine.model.named_parameters() if p.grad is not None}
    found |= {str(i): total for i, total in enumerate(engine.sums.values())}
    engine.model.zero_grad(set_to_none=True)
    return {"loss": total} | {n: g.detach().float().cpu() for n, g in found.items()}


def error(found: Gradients, wanted: Gradients) -> float:
    """The worst relative difference (2-norm) of a tensor."""
    assert found.keys() == wanted.keys(), found.keys() ^ wanted.keys()
    pairs = ((found[name], wanted[name]) for name in wanted)
    return max(float((a - b).norm() / b.norm().clamp(min=1e-12)) for a, b in pairs)


# --- checks: device -> (error, allowed) -------------------------------------------------------------

CPU = torch.device("cpu")


def check_step(device: torch.device) -> tuple[float, float]:
    plan = Plan(MIXED)
    wanted = step(engine_on(CPU, "qlora", plan))
    return error(step(engine_on(device, "qlora", plan)), wanted), 1e-4


def check_half(device: torch.device) -> tuple[float, float]:
    how: dict[str, Any] = {"masters": torch.bfloat16}
    exact = step(engine_on(CPU, "lora", Plan(KEEP)))
    theirs = error(step(engine_on(CPU, "lora", Plan(KEEP), **how)), exact)
    return error(step(engine_on(device, "lora", Plan(KEEP), **how)), exact), 2 * theirs + 1e-3


def check_policies(device: torch.device) -> tuple[float, float]:
    kept = step(engine_on(device, "qlora", Plan(KEEP)))
    plans = [Plan((policy,) * 4) for policy in POLICIES] + [Plan(MIXED), Plan(KEEP, resident=2)]
    return max(error(step(engine_on(device, "qlora", plan)), kept) for plan in plans), 0.0


def check_tiles(device: torch.device) -> tuple[float, float]:
    kept = step(engine_on(device, "lora", Plan(KEEP)))
    plan = Plan(MIXED, mlp_rows=37, head_rows=50, host_embedding=True, host_head=True)
    return error(step(engine_on(device, "lora", plan)), kept), 1e-4


def check_full(device: torch.device) -> tuple[float, float]:
    how: dict[str, Any] = {"dtype": torch.bfloat16}
    exact = step(engine_on(CPU, "full", Plan(KEEP)))
    theirs = error(step(engine_on(CPU, "full", Plan(KEEP), **how)), exact)
    return error(step(engine_on(device, "full", Plan(MIXED), **how)), exact), 2 * theirs + 1e-3


def check_rounded(device: torch.device) -> tuple[float, float]:
    """Distance from AdamW's first step in float32, in steps of bf16; updates in backward the same bits."""
    keys = {"method": "full", "masters": "bf16", "max_grad_norm": None, "weight_decay": 0.0}
    config = make_config({"model": "m", "data": "d", **keys})
    after: list[Gradients] = []
    worst = 0.0
    for early in (False, True):
        engine = engine_on(device, "full", Plan(KEEP), masters=torch.bfloat16, shared_sums=early)
        named = list(engine.model.named_parameters())
        before = {n: p.detach().float().cpu() for n, p in named}
        optimizer: Any = build_optimizer(named, config, engine.sums)
        if early:
            engine.after_block = partial(optimizer.update_early, rate=0.01)
        engine.loss(batch_of([70, 133], SMALL["vocab_size"], device), step=1).loss_sum.backward()
        gradients = {n: engine.sums[p].cpu().clone() for n, p in named}
        optimizer.update(0.01, None)
        after.append({n: p.detach().float().cpu() for n, p in named})
        if not early:
            for name, g in gradients.items():
                wanted = before[name] - 0.01 * g / (g.abs() + 1e-8)
                spacing = 2.0 ** (torch.floor(torch.log2(wanted.abs().clamp(min=1e-4))) - 7)
                worst = max(worst, float(((after[0][name] - wanted).abs() / spacing).max()))
    same = all(torch.equal(after[0][n], after[1][n]) for n in after[0])
    return worst if same else float("inf"), 1.01


def check_no_waiting(device: torch.device) -> tuple[float, float]:
    """0 where nothing waited; torch raises where something does."""
    engine = engine_on(device, "qlora", Plan(MIXED))
    config = make_config({"model": "m", "data": "d"})
    named = [(n, p) for n, p in engine.model.named_parameters() if p.requires_grad]
    optimizer = build_optimizer(named, config)
    batch = batch_of([70, 133], SMALL["vocab_size"], device)
    for strict in (False, True):  # the first step compiles, and takes its buffers
        if device.type == "cuda":
            torch.cuda.set_sync_debug_mode("error" if strict else "default")
        try:
            engine.loss(batch, step=1).loss_sum.backward()
            apply_update(optimizer, 1e-4, 1.0)
        finally:
            if device.type == "cuda":
                torch.cuda.set_sync_debug_mode("default")
    return 0.0, 0.0


CHECKS: dict[str, Callable[[torch.device], tuple[float, float]]] = {
    "step": check_step,
    "half": check_half,
    "policies": check_policies,
    "tiles": check_tiles,
    "full": check_full,
    "rounded": check_rounded,
    "no waiting": check_no_waiting,
}


def run_check(name: str, device: torch.device) -> dict[str, Any]:
    started = time.monotonic()
    row: dict[str, Any] = {"kind": "check", "case": name}
    try:
        found, allowed = CHECKS[name](device)
        row |= {"error": found, "allowed": allowed, "problem": "" if found <= allowed else "wrong"}
    except (
        RuntimeError,
        ValueError,
        AssertionError,
    ) as failure:  # shown as a row; the rest goes on
        row |= {"problem": f"{type(failure).__name__}: {failure}"[:300]}
    return row | {"seconds": time.monotonic() - started}


# --- memory -----------------------------------------------------------------------------------------


def memory_rows(name: str, tokens: int, device: torch.device) -> Iterator[dict[str, Any]]:
    """Predicted and measured peaks of one step, documents of 4,096 tokens, all of the batch's tokens."""
    sizes = CONFIGS[name]
    for method in ("lora", "qlora"):
        context = StepContext(seed=5)
        model = model_of(sizes, method, torch.bfloat16, device, context)
        config = make_config({"model": name, "data": "d", "method": method})
        job = job_of(model, read_spec(model.config), config, torch.bfloat16)
        batch = batch_of([4096] * max(1, tokens // 4096), sizes["vocab_size"], device)
        engine = FastEngine(model, context)
        named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
        optimizer = build_optimizer(named, config)
        for policy in reversed(POLICIES):
            layers = job.spec.layers
            for plan in (Plan((policy,) * layers), Plan((policy,) * layers, mlp_rows=2048)):
                row = {"kind": "memory", "model": name, "method": method, "tokens": tokens}
                row |= {"policy": policy + (" in tiles" if plan.mlp_rows else "")}
                engine.plan = plan
                memory = predict(job, plan, len(batch.ids), len(batch.trained_rows))
                yield row | _measured(engine, optimizer, batch, memory.peak - memory.context)
        del engine, model, optimizer
        gc.collect()
        torch.cuda.empty_cache()


def _measured(
    engine: FastEngine, optimizer: Any, batch: MicroBatch, predicted: int
) -> dict[str, Any]:
    torch.cuda.empty_cache()  # what the plan before reserved is not this one's
    try:
        for _ in range(2):
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            started = time.monotonic()
            engine.loss(batch, step=1).loss_sum.backward()
            apply_update(optimizer, 0.0, 1.0)
            torch.cuda.synchronize()
            seconds = time.monotonic() - started
    except torch.OutOfMemoryError:
        optimizer.zero_grad(set_to_none=True)
        torch.cuda.empty_cache()
        return {"predicted_bytes": predicted, "problem": "out of memory"}
    reserved = torch.cuda.max_memory_reserved()
    return {
        "predicted_bytes": predicted,
        "allocated_bytes": torch.cuda.max_memory_allocated(),
        "reserved_bytes": reserved,
        "off": reserved / predicted - 1,
        "tokens_per_second": batch.tokens / seconds,
    }


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="checks alone")
    parser.add_argument("--model", choices=sorted(CONFIGS), default="llama-3.1-8b")
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument(
        "--limit", type=float, default=600.0, help="seconds; what is left is for a next run"
    )
    parser.add_argument("--out", type=Path, help="a folder for the rows")
    given = parser.parse_args(argv)
    grow_segments()
    book = ledger.opened(given.out, "engine", KEY, TRAINING)
    end, failed = time.monotonic() + given.limit, 0
    for name in CHECKS:
        row = book.find(kind="check", case=name) or run_check(name, book.device)
        book.add(row)
        failed += bool(row["problem"])
        print(
            f"{name:12} {row['problem'] or 'right':8} {row.get('error', float('nan')):.2e}",
            flush=True,
        )
    if not book.on_gpu or given.quick:
        print("memory: not measured" + ("" if book.on_gpu else ", there is no GPU"))
        return 1 if failed else 0
    for row in memory_rows(given.model, given.tokens, book.device):
        book.add(row)
        said = row.get("problem") or (
            f"{row['allocated_bytes'] / 1e9:.2f} GB allocated, {row['reserved_bytes'] / 1e9:.2f} reserved,"
            f" off by {row['off']:+.1%}"
        )
        print(f"{row['method']:6}{row['policy']:28} {said}", flush=True)
        if time.monotonic() > end:
            break
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
