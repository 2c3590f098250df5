"""Which engine runs a model, and how much it keeps and takes at a time.

The fast engine runs adapters on the families in spec.py; everything else is the compat engine's. Then
the first policy whose predicted memory fits the card, dearest first, and the largest micro-batch that
fits with it. What is refused or falls back says why.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from fastsft.config import Config
from fastsft.errors import UserError
from fastsft.model.compat import CompatEngine
from fastsft.model.context import StepContext
from fastsft.model.fast import FastEngine
from fastsft.model.lora import trainable_summary
from fastsft.model.memory import MemoryEstimate, estimate_fast_memory, estimate_memory
from fastsft.model.spec import NotFast

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Engine = FastEngine | CompatEngine

CPU_MICRO_BATCH = 2048  # tokens; larger ones leave the caches of the CPUs seen and gain nothing
GPU_MICRO_BATCH = 16384
FAST_POLICIES = ("keep", "recompute_mlp", "recompute_block")  # dearest in memory first
COMPAT_POLICIES = ("keep", "recompute_block")
GPU_SHARE = 0.85  # of the free memory, for what the estimate does not know


@dataclass(frozen=True)
class Chosen:
    """An engine with its settings; `reason` is for people."""

    engine: Engine
    reason: str
    micro_batch_tokens: int
    predicted_memory: int


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
    trained, _ = trainable_summary(model)
    fast, why = _fast_engine(config, model, context)

    def estimate(activations: str) -> MemoryEstimate:
        optimizer = config.optimizer
        if fast is not None:
            return estimate_fast_memory(
                fast, trained=trained, optimizer=optimizer, activations=activations
            )
        recompute = activations == "recompute_block"
        return estimate_memory(
            model, trained=trained, optimizer=optimizer, recompute=recompute, dtype=dtype
        )

    policies = COMPAT_POLICIES if fast is None else FAST_POLICIES
    tokens, activations, predicted = _fit(config, policies, estimate, device, longest)
    engine: Engine
    if fast is not None:
        engine, fast.activations = fast, activations
    else:
        autocast = dtype if config.method == "full" and dtype != torch.float32 else None
        engine = CompatEngine(model, context, activations=activations, autocast=autocast)
    return Chosen(engine, _reason(config, why, engine, activations), tokens, predicted)


def _fast_engine(
    config: Config, model: PreTrainedModel, context: StepContext
) -> tuple[FastEngine | None, str]:
    """The fast engine where it can run, else why it cannot."""
    if config.engine == "compat":
        return None, "as asked for"
    if config.method == "full":
        return None, "the fast engine does not train all weights yet"
    try:
        return FastEngine(model, context), "as asked for" if config.engine == "fast" else ""
    except NotFast as reason:
        if config.engine == "fast":
            raise UserError(
                f"engine: fast cannot run this model: {reason}; use engine: auto"
            ) from None
        return None, str(reason)


def _reason(config: Config, why: str, engine: Engine, activations: str) -> str:
    """Why this engine, and which parts of it are ours."""
    if isinstance(engine, FastEngine):
        what = f"our own decoder for {engine.spec.family}, adapters inside its products"
        return f"{why}: {what}; activations: {activations}".removeprefix(": ")
    parts = [] if config.method == "full" else ["our adapters"]
    packed = "our attention over packed documents"
    parts.append("its own attention (one document at a time)" if engine.isolate else packed)
    parts.append("its own logits" if engine.head.own else "our loss")
    listed = f"{', '.join(parts[:-1])} and {parts[-1]}"
    return f"{why}: transformers' {type(engine.model).__name__} with {listed}; activations: {activations}"


def _fit(
    config: Config,
    policies: Sequence[str],
    estimate: Callable[[str], MemoryEstimate],
    device: torch.device,
    longest: int,
) -> tuple[int, str, int]:
    """(tokens of a micro-batch, activations, predicted bytes): what the config says, or what fits."""
    choices = policies if config.activations == "auto" else [str(config.activations)]
    if device.type != "cuda":
        choices = choices[:1]
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else None
    for activations in choices:
        expected = estimate(activations)
        if config.micro_batch_tokens != "auto":
            tokens = config.micro_batch_tokens
        elif free is None:
            tokens = CPU_MICRO_BATCH
        else:
            room = GPU_SHARE * free - (expected.fixed - expected.weights)
            tokens = min(GPU_MICRO_BATCH, int(room // expected.per_token))
        tokens = max(tokens, longest)
        if free is None or expected.total(tokens) - expected.weights <= GPU_SHARE * free:
            break
    return tokens, activations, expected.total(tokens)
