"""The planner on this machine: what the loaded model is, what the card and the host have, which plan runs.

    vram: auto     what the card has free now, and what this process holds of it already
    vram: 24GB     that much in all; on a GPU torch's allocator is told the same limit

On a CPU there is nothing to plan (blocks keep what they can use again, micro-batches of 2048 tokens), unless
`vram` is given: then its plan is made and obeyed, as on a GPU.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from fastsft_kernels.cards import CARDS, Rates
from torch import nn

from fastsft.config import Config, size_in_bytes
from fastsft.console import size
from fastsft.device import free_host_memory
from fastsft.errors import UserError
from fastsft.model.job import Job
from fastsft.model.lora import LoraLinear
from fastsft.model.memory import CUDA_CONTEXT, predict
from fastsft.model.plan import Plan
from fastsft.model.planner import (
    Budget,
    Planned,
    Wish,
    cheaper,
    fastest,
    longest_context,
    plan_as_told,
)
from fastsft.model.spec import DecoderSpec

CPU_MICRO_BATCH = 2048  # tokens; larger ones leave the caches of the CPUs seen and gain nothing
HOST_SHARE = 0.8  # of the free host memory; the rest is the data's and the file cache's
TYPICAL = "NVIDIA GeForce RTX 4090"  # whose proportions an unknown card is taken to have


@dataclass(frozen=True)
class Planning:
    """What a plan was made from and for; on a CPU without a budget there is no `budget`."""

    job: Job
    rates: Rates
    budget: Budget | None
    planned: Planned

    def cheaper(self) -> Planning | None:
        """The same micro-batches under the next plan that needs less memory; None: there is none."""
        budget = self.budget or Budget(0, cuda=False)
        found = cheaper(self.job, self.rates, budget, self.planned)
        return None if found is None else replace(self, planned=found)


def job_of(model: Any, spec: DecoderSpec, config: Config, dtype: torch.dtype) -> Job:
    """The sizes of a run from the model as it is loaded, adapters on."""
    ranks = {name: m.r for name, m in model.named_modules() if isinstance(m, LoraLinear)}
    ends = {"embedding": model.get_input_embeddings(), "head": model.get_output_embeddings()}
    rows = {name: _trained_rows(module) for name, module in ends.items()}
    whole = frozenset(name for name, n in rows.items() if n >= spec.vocabulary)
    return Job(
        spec=spec,
        method=config.method,
        ranks=ranks,
        optimizer=config.optimizer,
        size=dtype.itemsize,
        whole=whole,
        token_rows=0 if whole else max(rows.values()),
        fp32_masters=config.masters == "fp32",
        update_in_backward=config.update_in_backward,
    )


def _trained_rows(module: nn.Module) -> int:
    return max((p.shape[0] for p in module.parameters() if p.requires_grad), default=0)


def make_plan(config: Config, job: Job, device: torch.device, longest: int) -> Planning:
    """The plan of a run. Raises UserError where the longest row does not fit, saying what would."""
    policy = None if config.activations == "auto" else str(config.activations)
    given = None if config.micro_batch_tokens == "auto" else config.micro_batch_tokens
    rates = rates_of(device)
    if device.type != "cuda" and config.vram == "auto":
        tokens = max(given or CPU_MICRO_BATCH, longest)
        plan = Plan((policy or "keep",) * job.spec.layers)
        return Planning(job, rates, None, plan_as_told(job, rates, plan, tokens, cuda=False))
    budget = budget_of(config, device)
    wish = Wish(longest, longest, policy, given)
    found = fastest(job, rates, budget, wish)
    if found is None:
        raise _does_not_fit(config, job, budget, wish)
    return Planning(job, rates, budget, found)


def budget_of(config: Config, device: torch.device) -> Budget:
    """Raises UserError where `vram` is more than the card has left."""
    host = int(HOST_SHARE * free_host_memory())
    if device.type != "cuda":
        return Budget(size_in_bytes(config.vram), host, cuda=False)
    free, total = torch.cuda.mem_get_info(device)
    ours = free + torch.cuda.memory_reserved(device) + CUDA_CONTEXT
    if config.vram == "auto":
        return Budget(min(ours, total), host)
    wanted = size_in_bytes(config.vram)
    if wanted > ours:
        raise UserError(
            f"vram: {config.vram} is more than this card can give: it has {total / 1e9:.1f} GB, of which "
            f"{ours / 1e9:.1f} GB are free. Lower vram, or end what else runs there"
        )
    return Budget(wanted, host)


def limit_allocator(config: Config, device: torch.device) -> None:
    """Tells torch's allocator the limit too, before anything is loaded."""
    if device.type == "cuda" and config.vram != "auto":
        total = torch.cuda.mem_get_info(device)[1]
        share = (size_in_bytes(config.vram) - CUDA_CONTEXT) / total
        torch.cuda.set_per_process_memory_fraction(min(1.0, max(share, 0.01)), device)


def rates_of(device: torch.device) -> Rates:
    """The card's rates; of a card that is not in the table, the proportions of a common one."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "a CPU"
    known = CARDS.get(name)
    if known is not None:
        return known
    source = f"{name} is not in the table of cards: as if it were a {TYPICAL}"
    return CARDS[TYPICAL]._replace(source=source)


def _does_not_fit(config: Config, job: Job, budget: Budget, wish: Wish) -> UserError:
    """What the run would need, and what of it the user can change."""
    longest = longest_context(job, budget, wish.policy)
    told = [
        f"{key}: {value}"
        for key, value in (("activations", wish.policy), ("micro_batch_tokens", wish.micro_batch))
        if value is not None
    ]
    given = f" under {' and '.join(told)}" if told else ""
    hints = [f"max_length of at most {longest:,}"] if longest else []
    if told:
        hints.append(f"leave {' and '.join(t.split(':')[0] for t in told)} at auto")
    if job.optimizer == "adamw":
        hints.append("optimizer: adamw_8bit (rounds the moments)")
    if job.method == "lora":
        hints.append("method: qlora")
    if budget.host is not None and not _host_suffices(job, budget, wish):
        hints.append(f"more host memory than the {size(budget.host)} free for it")
    plan = Plan((wish.policy or "recompute_block",) * job.spec.layers)
    memory = predict(job, plan, 1, cuda=budget.cuda)
    lasting = memory.peak - memory.kept - memory.working - memory.logits
    reason = (
        f"the longest row has {wish.longest:,} tokens, and at most {longest:,} fit"
        if longest and longest < wish.longest
        else f"weights, adapters and optimizer alone take {size(lasting)}"
    )
    return UserError(
        f"the run does not fit into {size(budget.device)}{given}: {reason}. What helps: "
        f"{'; '.join(hints) or 'a smaller model'}; or a larger vram"
    )


def _host_suffices(job: Job, budget: Budget, wish: Wish) -> bool:
    more = replace(budget, host=None)
    return longest_context(job, more, wish.policy) <= longest_context(job, budget, wish.policy)
