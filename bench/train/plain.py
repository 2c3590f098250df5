"""Plain PyTorch: transformers' model, PEFT's adapters, a short loop. What the others are measured by.

Rows are padded to the longest of their micro-batch; the loss is transformers' logits through torch's
cross-entropy, divided by the trained tokens of the step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from peft import get_peft_model, prepare_model_for_kbit_training

from bench.train import trl
from bench.train.clock import Clock
from bench.train.job import Job
from bench.train.workloads import Rows


def _loaded(job: Job) -> tuple[Any, torch.optim.Optimizer]:
    torch.manual_seed(job.seed)
    model, adapter = trl.base_model(job)
    if job.method == "qlora":
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=job.checkpointing)
    elif job.checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    model = get_peft_model(model, adapter) if adapter else model
    if job.checkpointing:
        model.enable_input_require_grads()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=job.learning_rate, weight_decay=0.0)
    return model.train(), optimizer


def _padded(rows: Rows, first: int, count: int) -> dict[str, torch.Tensor]:
    chosen = [rows[i % len(rows)] for i in range(first, first + count)]
    longest = max(len(ids) for ids, _ in chosen)
    shape = (count, longest)
    ids, mask = torch.zeros(shape, dtype=torch.int64), torch.zeros(shape, dtype=torch.int64)
    labels = torch.full(shape, -100, dtype=torch.int64)
    for i, (row, trained) in enumerate(chosen):
        n = len(row)
        ids[i, :n], mask[i, :n] = torch.from_numpy(row), 1
        labels[i, :n] = torch.where(torch.from_numpy(trained), ids[i, :n], -100)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def _loss(model: Any, batch: dict[str, torch.Tensor], job: Job) -> torch.Tensor:
    """Summed over the micro-batch's trained tokens."""
    labels = batch.pop("labels")[:, 1:]
    mixed = job.method == "full" and labels.is_cuda
    with torch.autocast("cuda", torch.bfloat16, enabled=mixed):
        logits = model(**batch, use_cache=False).logits[:, :-1]
    return F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), reduction="sum")


def _steps(rows: Rows, job: Job) -> Iterator[list[dict[str, torch.Tensor]]]:
    size = min(job.peer_rows, job.batch)
    for step in range(job.steps):
        first = step * job.batch
        yield [_padded(rows, first + i, size) for i in range(0, job.batch - size + 1, size)]


def train(job: Job) -> dict[str, Any]:
    """The whole job."""
    rows, clock = Rows.load(Path(job.rows)), Clock(job)
    model, optimizer = _loaded(job)
    device = next(model.parameters()).device
    found: dict[str, list[Any]] = {"tokens": [], "trained": [], "losses": []}
    clock.begin()
    for batches in _steps(rows, job):
        trained = sum(int((b["labels"][:, 1:] != -100).sum()) for b in batches)
        found["tokens"].append(sum(int(b["attention_mask"].sum()) for b in batches))
        found["trained"].append(trained)
        total = torch.zeros((), device=device)
        for batch in batches:
            batch = {name: tensor.to(device, non_blocking=True) for name, tensor in batch.items()}
            loss = _loss(model, batch, job) / trained
            loss.backward()
            total += loss.detach()
        torch.nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        found["losses"].append(total)
        clock.step()
    found["losses"] = [float(loss) for loss in found["losses"]]
    note = trl.describe(job, 0, model.config._attn_implementation)
    return {**clock.result(), **found, "note": note}


def probe(job: Job) -> Callable[[int], None]:
    """A step of one document."""
    model, optimizer = _loaded(job)
    device = next(model.parameters()).device

    def step(tokens: int) -> None:
        optimizer.zero_grad(set_to_none=True)
        ids = torch.arange(tokens, device=device)[None] % 1000 + 3
        batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.clone()}
        (_loss(model, batch, job) / (tokens - 1)).backward()
        torch.nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], 1.0)
        optimizer.step()

    return step
