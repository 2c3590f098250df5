"""The optimizer step: schedule, AdamW, clipping, and what happens when a gradient is not finite.

Schedules are pure functions of the step, so a resumed run needs no scheduler state and any step's
rate can be asked for. No update has rate 0: of w warm-up steps update s (from 0) has (s + 1)/(w + 1)
of the peak, where transformers has s/w. From update w on the rates are those of transformers'
`get_scheduler` with w warm-up steps. w is settled when a run begins and goes with its checkpoints, so
that a run that is made longer does not warm up again. `min_lr_ratio` m maps a decay factor f to
m + (1 - m) f, transformers' form for cosine and wsd, used for linear too.

Clipping multiplies all gradients by min(1, max_norm / (norm + 1e-6)). Nothing here waits for the
device with torch's fused AdamW: rates are host numbers, the norm stays a tensor, and `found_inf`,
read by the fused kernel itself, leaves weights, moments and step counts untouched when the norm is
not finite. The caller reads `Update.skipped` a step later. bitsandbytes' optimizers have no such
input and wait for the device after every parameter anyway, so there the flag is read at once.
"""

import importlib
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fastsft.errors import UserError
from fastsft.rounding import RoundedOptimizer, Update

if TYPE_CHECKING:
    from fastsft.config import Config

BETAS = (0.9, 0.999)
EPS = 1e-8
_BITSANDBYTES = {"adamw_8bit": "AdamW8bit", "paged_adamw_8bit": "PagedAdamW8bit"}
Optimizer = torch.optim.Optimizer | RoundedOptimizer


def peak_learning_rate(config: "Config") -> float:
    """The rate the schedule scales: the configured one, or auto's 2e-4 (adapters), 1e-5 (full)."""
    if config.learning_rate == "auto":
        return 1e-5 if config.method == "full" else 2e-4
    return float(config.learning_rate)


def warmup_steps(config: "Config", total_steps: int) -> int:
    """`warmup_steps` where given, else the share `warmup_ratio` of a run that begins, rounded up."""
    if config.warmup_steps is not None:
        return config.warmup_steps
    return math.ceil(total_steps * config.warmup_ratio)


def learning_rate(step: int, total_steps: int, warmup: int, config: "Config") -> float:
    """The learning rate of update `step` (from 0) of `total_steps`, the first `warmup` of them rising."""
    minimum = config.min_lr_ratio
    if step < warmup:
        factor = (step + 1) / (warmup + 1)
    elif config.lr_scheduler == "wsd":
        factor = _wsd(step, total_steps, warmup, config.decay_ratio, minimum)
    elif config.lr_scheduler == "constant":
        factor = 1.0
    else:
        length = max(1, total_steps - warmup)
        if config.lr_scheduler == "cosine":
            decay = 0.5 * (1.0 + math.cos(math.pi * (step - warmup) / length))
        else:
            decay = max(0.0, (total_steps - step) / length)
        factor = minimum + (1.0 - minimum) * decay
    return peak_learning_rate(config) * factor


def _wsd(step: int, total: int, warmup: int, decay_ratio: float, minimum: float) -> float:
    """After the warm-up: a stable stretch, then a half cosine over the last `decay_ratio` of the run."""
    decay = min(math.ceil(total * decay_ratio), max(0, total - warmup))
    into_decay = step - (total - decay)
    if into_decay < 0:
        return 1.0
    if step >= total:
        return minimum
    return minimum + (1.0 - minimum) * 0.5 * (1.0 + math.cos(math.pi * into_decay / decay))


def build_optimizer(
    named_params: Iterable[tuple[str, nn.Parameter]],
    config: "Config",
    sums: Mapping[nn.Parameter, Tensor] | None = None,
) -> Optimizer:
    """AdamW over the trainable parameters, weight decay on matrices only (norms and biases none).

    sums: the float32 gradients of bf16 weights (masters: bf16), which are rounded at random.
    Raises UserError where bitsandbytes, or its kernel for the parameters' device, is missing: here,
    before the first step, because the failure would otherwise come after all the set-up.
    """
    params = [p for _, p in named_params if p.requires_grad]
    assert params, "no trainable parameters"
    if not sums:
        return _adamw(params, config)
    weights = [(p, sums[p]) for p in params]
    return RoundedOptimizer(weights, lambda stand_ins: _adamw(stand_ins, config), config.seed)


def _adamw(params: Sequence[nn.Parameter], config: "Config") -> torch.optim.Optimizer:
    matrices = [p for p in params if p.ndim >= 2]
    vectors = [p for p in params if p.ndim < 2]
    groups: list[dict[str, Any]] = [
        {"params": params, "weight_decay": decay}
        for params, decay in ((matrices, config.weight_decay), (vectors, 0.0))
        if params
    ]
    rate = peak_learning_rate(config)
    if config.optimizer in _BITSANDBYTES:
        kind = _bitsandbytes_class(config.optimizer, params[0].device)
        return kind(groups, lr=rate, betas=BETAS, eps=EPS)
    return torch.optim.AdamW(groups, lr=rate, betas=BETAS, eps=EPS, fused=True)


def _bitsandbytes_class(name: str, device: torch.device) -> Any:
    """The optimizer class, after one update of a throw-away parameter has shown that it works."""
    if name.startswith("paged") and device.type != "cuda":
        raise UserError(
            f"optimizer: {name} pages its state between the GPU and the host, and this run is on "
            f"{device.type}. Use optimizer=adamw_8bit or optimizer=adamw."
        )
    try:
        optim = importlib.import_module("bitsandbytes").optim
    except ImportError as error:
        raise UserError(
            f"optimizer: {name} needs the package bitsandbytes, which cannot be imported here "
            f"({error}). Install it with: pip install bitsandbytes - or use optimizer=adamw."
        ) from error
    kind = getattr(optim, _BITSANDBYTES[name])
    trial = nn.Parameter(torch.zeros(64, 64, device=device))  # 4096: the least that gets 8 bits
    trial.grad = torch.ones_like(trial)
    try:
        kind([trial], lr=1e-3).step()
    except (RuntimeError, NotImplementedError, AttributeError, ValueError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(
            f"optimizer: bitsandbytes has no working {name} for {device.type} on this machine "
            f"({reason}). Update it with: pip install -U bitsandbytes - or use optimizer=adamw."
        ) from error
    return kind


def clip_gradients(params: Iterable[Tensor], max_norm: float | None) -> Tensor:
    """Scale the gradients in place to a global 2-norm of at most `max_norm`; no host wait.

    Returns the norm before clipping, a scalar tensor. With `max_norm=None` it is only measured.
    """
    params = [p for p in params if p.grad is not None]
    norm = torch.nn.utils.get_total_norm([p.grad for p in params if p.grad is not None])
    if max_norm is not None:
        torch.nn.utils.clip_grads_with_norm_(params, max_norm, norm)
    return norm


def apply_update(optimizer: Optimizer, rate: float, max_norm: float | None) -> Update:
    """Clip, update at learning rate `rate`, drop the gradients; skip if the norm is not finite."""
    if isinstance(optimizer, RoundedOptimizer):
        return optimizer.update(rate, max_norm)
    for group in optimizer.param_groups:
        group["lr"] = rate
    params = [p for group in optimizer.param_groups for p in group["params"]]
    norm = clip_gradients(params, max_norm)
    skipped = torch.isfinite(norm).logical_not().float()
    if isinstance(optimizer, torch.optim.AdamW):
        # The attribute torch's own GradScaler sets: the fused kernel reads it on the device.
        optimizer.found_inf = skipped  # type: ignore[attr-defined]
        optimizer.step()
    elif not skipped.item():
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return Update(norm, skipped)
