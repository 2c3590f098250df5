"""The fastest exact plan that fits: policies of the layers, size of the micro-batch, what lies where.

    for each size of micro-batch, for each rung of a ladder of savings that cost little time:
        as many layers as fit under the dearer of two neighbouring policies, the others under the cheaper
    -> the fastest of all that fit, by speed.py's model of time

Layers under the cheaper policy come first: when backward reaches them, those behind them have given
back what they kept, and there is room to recompute. Nothing here changes the gradient; what would
(8-bit moments, a quantised head) is a key of the user's.

A search over everything would find a few per cent more at best: time is nearly linear in what is kept,
so a mix of more than two policies gains nothing, and the rungs are ordered by what they cost.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from fastsft_kernels.cards import Rates

from fastsft.model.job import Job
from fastsft.model.memory import Memory, chunk_rows, predict
from fastsft.model.plan import POLICIES, Plan
from fastsft.model.speed import Speed, packed, predict_speed

# Larger micro-batches gain under 1 %, and a step's tokens must fill them.
SIZES = (16384, 12288, 8192, 6144, 4096, 3072, 2048, 1024, 512)
MARGIN = 0.04  # of a budget, for the gaps of torch's allocator
ENOUGH = 1.002  # a leaner rung must be faster by this, or it is only complicated
LESS = 0.95  # of a plan's memory that did not suffice, for the next one
SETTLED = ("resident", "host_embedding", "host_head")  # where weights lie: once the engine is built
LONGEST = 1 << 24  # tokens; row keys hold no more

# Each rung saves memory on top of those before it, and costs more time.
LADDER: tuple[dict[str, Any], ...] = (
    {},
    {"head_rows": 1024},
    {"head_rows": 1024, "mlp_rows": 8192},
    {"head_rows": 512, "mlp_rows": 4096},
    {"head_rows": 512, "mlp_rows": 4096, "host_embedding": True},
    {"head_rows": 512, "mlp_rows": 2048, "host_embedding": True},
    {"mlp_rows": 1024, "host_embedding": True, "host_head": True},
)


@dataclass(frozen=True)
class Budget:
    """Bytes that may be taken; host None: as much as it needs. cuda: a context and workspaces count."""

    device: int
    host: int | None = None
    cuda: bool = True

    def fits(self, memory: Memory) -> bool:
        host = self.host is None or memory.host <= self.host
        return host and memory.peak <= self.device * (1 - MARGIN)


@dataclass(frozen=True)
class Planned:
    """A plan with the micro-batch it is for, and what is expected of it."""

    plan: Plan
    micro_batch_tokens: int
    memory: Memory
    speed: Speed

    def said(self) -> str:
        return describe(self.plan)


@dataclass(frozen=True)
class Wish:
    """What the plan must do. longest: tokens every micro-batch can hold; document: their usual length;
    policy, micro_batch: given by the user; built: a plan whose weights lie where they lie already."""

    longest: int
    document: int
    policy: str | None = None
    micro_batch: int | None = None
    built: Plan | None = None


def fastest(job: Job, rates: Rates, budget: Budget, wish: Wish) -> Planned | None:
    """The fastest plan within the budget; None where nothing fits."""
    best: Planned | None = None
    for tokens in _sizes(wish):
        for rung in _rungs(job, wish, tokens):
            found = _mixed(job, budget, wish, tokens, rung)
            if found is None:
                continue
            planned = plan_as_told(
                job, rates, found, tokens, document=wish.document, cuda=budget.cuda
            )
            if best is None or planned.speed.tokens_per_second > (
                ENOUGH * best.speed.tokens_per_second
            ):
                best = planned
            if set(found.policies) == {"keep"}:
                break  # the rungs below save memory that nothing wants
    return best


def _sizes(wish: Wish) -> list[int]:
    if wish.micro_batch is not None:
        return [max(wish.micro_batch, wish.longest)]
    larger = [size for size in SIZES if size >= wish.longest]
    return larger if wish.longest in larger else [*larger, wish.longest]


def _rungs(job: Job, wish: Wish, tokens: int) -> Iterator[dict[str, Any]]:
    """The rungs that a run with micro-batches of `tokens` tokens can stand on, each once."""
    seen: list[dict[str, Any]] = []
    piece = chunk_rows(job.spec.vocabulary, tokens, None)
    for rung in LADDER:
        rung = {k: v for k, v in rung.items() if k != "mlp_rows" or v < tokens}
        rung = {k: v for k, v in rung.items() if k != "head_rows" or v < piece}
        for end in ("embedding", "head"):  # a tied weight is both
            if end in job.whole or job.spec.tied or job.token_rows:
                rung.pop(f"host_{end}", None)
        if wish.built is not None:
            for key in SETTLED:
                rung[key] = getattr(wish.built, key)
        if rung not in seen:
            seen.append(rung)
            yield rung


def _mixed(job: Job, budget: Budget, wish: Wish, tokens: int, rung: dict[str, Any]) -> Plan | None:
    """The dearest policies that fit on this rung, then as many resident layers as fit."""
    layers = job.spec.layers

    def fits(plan: Plan) -> bool:
        return budget.fits(predict(job, plan, tokens, cuda=budget.cuda))

    def within_device(plan: Plan) -> bool:
        return replace(budget, host=None).fits(predict(job, plan, tokens, cuda=budget.cuda))

    if wish.policy is not None:
        pairs = [(wish.policy, wish.policy)]
    else:
        pairs = list(zip(POLICIES, POLICIES[1:], strict=False))
    for dear, cheap in pairs:

        def mix(count: int, dear: str = dear, cheap: str = cheap) -> Plan:
            return Plan((cheap,) * (layers - count) + (dear,) * count, **rung)

        count = _most(lambda n: within_device(mix(n)), layers)
        if count is None or not fits(mix(count)):
            continue
        plan = mix(count)
        if job.quantised and wish.built is None and set(plan.policies) == {dear}:
            return _with_resident(plan, fits)
        return plan
    return None


def _with_resident(plan: Plan, fits: Callable[[Plan], bool]) -> Plan:
    count = _most(lambda n: fits(replace(plan, resident=n)), len(plan.policies))
    return replace(plan, resident=count or 0)


def _most(fits: Callable[[int], bool], most: int) -> int | None:
    """The largest n up to `most` that fits, of a question that turns from yes to no once."""
    if not fits(0):
        return None
    low, high = 0, most
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low


def plan_as_told(
    job: Job,
    rates: Rates,
    plan: Plan,
    tokens: int,
    *,
    document: int | None = None,
    cuda: bool = True,
) -> Planned:
    """What is to be expected of a plan that someone else made."""
    load = packed(tokens, min(document or tokens, tokens))
    memory = predict(job, plan, tokens, cuda=cuda)
    return Planned(plan, tokens, memory, predict_speed(job, plan, rates, load))


# --- limits, for people ---------------------------------------------------------------------------


def longest_context(job: Job, budget: Budget, policy: str | None = None) -> int:
    """Tokens of the longest document, all trained, that fits under some plan (of this policy); 0: none."""

    def fits(tokens: int) -> bool:
        wish = Wish(tokens, tokens, policy, micro_batch=tokens)
        return any(_mixed(job, budget, wish, tokens, rung) for rung in _rungs(job, wish, tokens))

    return 64 * (_most(lambda n: n == 0 or fits(n * 64), LONGEST // 64) or 0)


def largest_micro_batch(job: Job, budget: Budget, plan: Plan) -> int:
    """The most tokens a micro-batch may hold under a plan, all trained; 0: none."""
    steps = _most(
        lambda n: n == 0 or budget.fits(predict(job, plan, n * 64, cuda=budget.cuda)),
        LONGEST // 64,
    )
    return 64 * (steps or 0)


def cheaper(job: Job, rates: Rates, budget: Budget, now: Planned) -> Planned | None:
    """The next plan that needs less for the same micro-batches, weights staying where they are; None: none.

    Other policies before smaller tiles: those change no bit of the gradient, these its last digits.
    """
    less = replace(budget, device=int(LESS * now.memory.peak / (1 - MARGIN)))
    tokens = now.micro_batch_tokens
    wish = Wish(tokens, tokens, built=now.plan)
    same = {key: getattr(now.plan, key) for key in ("mlp_rows", "head_rows", *SETTLED)}
    rungs = [same, *(rung for rung in _rungs(job, wish, tokens) if _leaner(rung, same))]
    for rung in rungs:
        found = _mixed(job, less, wish, tokens, rung)
        if found is not None:
            return plan_as_told(job, rates, found, tokens, cuda=budget.cuda)
    return None


def _leaner(rung: dict[str, Any], than: dict[str, Any]) -> bool:
    pairs = [(rung.get(key), than[key]) for key in ("mlp_rows", "head_rows")]
    return all(ours is not None and (theirs is None or ours <= theirs) for ours, theirs in pairs)


def describe(plan: Plan) -> str:
    """A plan in words: "20 layers keep, 12 recompute_mlp; 8 layers stay decoded"."""
    counts = {policy: plan.policies.count(policy) for policy in POLICIES}
    used = [(policy, n) for policy, n in counts.items() if n]
    if len(used) == 1:
        parts = [used[0][0]]
    else:
        parts = [", ".join(f"{n} layers {policy}" for policy, n in used)]
    if plan.mlp_rows is not None:
        parts.append(f"MLP in tiles of {plan.mlp_rows:,} rows")
    if plan.head_rows is not None:
        parts.append(f"head in pieces of {plan.head_rows:,} rows")
    if plan.resident:
        parts.append(f"{plan.resident} layers stay decoded")
    hosted = [n for n, on in (("embedding", plan.host_embedding), ("head", plan.host_head)) if on]
    if hosted:
        parts.append(f"{' and '.join(hosted)} in host memory")
    return "; ".join(parts)
