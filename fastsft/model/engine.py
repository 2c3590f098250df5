"""Which engine runs a model, and how much it keeps and takes at a time.

The fast engine runs the families in spec.py under a plan (planning.py); everything else is the compat
engine's, under the first policy whose estimate fits the card, dearest first, with the largest micro-batch
that fits with it. What is refused or falls back says why.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from fastsft_kernels.launch import explain

from fastsft.config import Config
from fastsft.errors import UserError
from fastsft.model.compat import CompatEngine
from fastsft.model.compat_memory import MemoryEstimate, estimate_memory
from fastsft.model.context import StepContext
from fastsft.model.fast import FastEngine
from fastsft.model.lora import LoraLinear, trainable_summary
from fastsft.model.planner import describe
from fastsft.model.planning import CPU_MICRO_BATCH, Planning, budget_of, job_of, make_plan
from fastsft.model.projection import Projection
from fastsft.model.spec import NotFast, read_spec
from fastsft.model.targets import endings

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Engine = FastEngine | CompatEngine

GPU_MICRO_BATCH = 16384
COMPAT_POLICIES = ("keep", "recompute_block")
COMPAT_SHARE = 0.85  # of the memory, for what the estimate does not know


@dataclass(frozen=True)
class Chosen:
    """An engine with its settings; `reason` is for people. planning: of the fast engine."""

    engine: Engine
    reason: str
    micro_batch_tokens: int
    predicted_memory: int
    planning: Planning | None = None


def choose_engine(
    config: Config,
    model: PreTrainedModel,
    context: StepContext,
    dtype: torch.dtype,
    device: torch.device,
    longest: int,
) -> Chosen:
    """The engine for a model with its adapters on it. Raises UserError where the config asks for what
    cannot be; `longest`: tokens a micro-batch must be able to hold."""
    why = "as asked for" if config.engine == "compat" else ""
    if not why:
        try:
            return _fast(config, model, context, dtype, device, longest)
        except NotFast as reason:
            why = str(reason)
        if config.engine == "fast":
            raise UserError(f"engine: fast cannot run this model: {why}; use engine: auto")
        if config.masters == "bf16":
            raise UserError(f"masters: bf16 needs the fast engine, and {why}; use masters: fp32")
    return _compat(config, model, context, dtype, device, longest, why)


def _fast(
    config: Config,
    model: PreTrainedModel,
    context: StepContext,
    dtype: torch.dtype,
    device: torch.device,
    longest: int,
) -> Chosen:
    spec = read_spec(model.config)
    planning = make_plan(config, job_of(model, spec, config, dtype), device, longest)
    planned = planning.planned
    early = config.update_in_backward
    engine = FastEngine(model, context, dtype=dtype, plan=planned.plan, shared_sums=early)
    what = f"our own decoder for {spec.family}"
    if config.method != "full":
        what += ", adapters inside its products"
    asked = "as asked for: " if config.engine == "fast" else ""
    reason = f"{asked}{what}; activations: {describe(planned.plan)}"
    return Chosen(engine, reason, planned.micro_batch_tokens, planned.memory.peak, planning)


def _compat(
    config: Config,
    model: PreTrainedModel,
    context: StepContext,
    dtype: torch.dtype,
    device: torch.device,
    longest: int,
    why: str,
) -> Chosen:
    trained, _ = trainable_summary(model)

    def estimate(activations: str) -> MemoryEstimate:
        return estimate_memory(
            model,
            trained=trained,
            optimizer=config.optimizer,
            recompute=activations == "recompute_block",
            dtype=dtype,
        )

    tokens, activations, predicted = _fit(config, estimate, device, longest)
    autocast = dtype if config.method == "full" and dtype != torch.float32 else None
    engine = CompatEngine(model, context, activations=activations, autocast=autocast)
    parts = [] if config.method == "full" else ["our adapters"]
    packed = "our attention over packed documents"
    parts.append("its own attention (one document at a time)" if engine.isolate else packed)
    parts.append("its own logits" if engine.head.own else "our loss")
    listed = f"{', '.join(parts[:-1])} and {parts[-1]}"
    reason = (
        f"{why}: transformers' {type(model).__name__} with {listed}; activations: {activations}"
    )
    return Chosen(engine, reason, tokens, predicted)


def _fit(
    config: Config,
    estimate: Callable[[str], MemoryEstimate],
    device: torch.device,
    longest: int,
) -> tuple[int, str, int]:
    """(tokens of a micro-batch, activations, predicted bytes): what the config says, or what fits."""
    planless = device.type != "cuda" and config.vram == "auto"
    choices = [str(config.activations)] if config.activations != "auto" else list(COMPAT_POLICIES)
    choices = choices[:1] if planless else choices
    room = None if planless else COMPAT_SHARE * budget_of(config, device).device
    for activations in choices:
        expected = estimate(activations)
        if config.micro_batch_tokens != "auto":
            tokens = config.micro_batch_tokens
        elif room is None:
            tokens = CPU_MICRO_BATCH
        else:
            tokens = min(GPU_MICRO_BATCH, int((room - expected.fixed) // expected.per_token))
        tokens = max(tokens, longest)
        if room is None or expected.total(tokens) <= room:
            return tokens, activations, expected.total(tokens)
    if config.vram != "auto":
        raise UserError(
            f"vram: {config.vram} is not enough: a micro-batch of {tokens:,} tokens is estimated at "
            f"{expected.total(tokens) / 1e9:.1f} GB under activations: {activations}. Lower max_length or "
            "micro_batch_tokens"
        )
    return tokens, activations, expected.total(tokens)


def paths(engine: Engine, model: PreTrainedModel) -> list[str]:
    """What runs each linear layer: one line for all that go the same way."""
    if isinstance(engine, FastEngine):
        return _fast_paths(engine)
    layers = {n: m for n, m in model.named_modules() if isinstance(m, LoraLinear)}
    if not layers:
        return ["every linear layer: torch's own product under autocast"]
    weight = next(model.parameters())
    backend, why = explain("lora_linear", weight)
    names = ", ".join(endings(layers))
    return [
        f"{names}: base product, then the adapter's two ({backend}: {why}); others: torch's own"
    ]


def _fast_paths(engine: FastEngine) -> list[str]:
    """Projections of equal kind together; a layer that differs from the others stands by itself."""
    ways: dict[str, list[tuple[int, str]]] = {}
    for block in engine.blocks:
        for projection in block.projections:
            name = projection.name.rsplit(" ", 1)[-1]
            ways.setdefault(_way(projection), []).append((block.index, name))
    backend, why = explain("tails", engine.masters)
    lines = []
    for way, members in ways.items():
        names = list(dict.fromkeys(name for _, name in members))
        layers = sorted({index for index, _ in members})
        everywhere = len(layers) == len(engine.blocks)
        where = "" if everywhere else f" of layers {_ranges(layers)}"
        lines.append(f"{', '.join(names)}{where}: {way}")
    return [*lines, f"kernels: {backend} ({why})"]


def _way(projection: Projection) -> str:
    if projection.nf4:
        kept = "stays decoded" if projection.resident else "decoded for each product"
        weight = f"NF4, {kept}"
    else:
        weight = str(projection.dtype).removeprefix("torch.")
    if projection.trains:
        return f"{weight}, its gradient summed in place"
    r = max((m.r for m in projection.adapters if m is not None), default=0)
    if not r:
        return f"{weight}, no adapter, one product"
    drop = f", dropout {projection.p:g}" if projection.p else ""
    return f"{weight}, adapters (r={r}{drop}) inside one product"


def _ranges(numbers: list[int]) -> str:
    """[0, 1, 2, 5] -> "0-2, 5"."""
    parts: list[list[int]] = []
    for n in numbers:
        if parts and n == parts[-1][-1] + 1:
            parts[-1][1:] = [n]
        else:
            parts.append([n])
    return ", ".join("-".join(map(str, part)) for part in parts)
