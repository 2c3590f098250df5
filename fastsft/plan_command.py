"""`fastsft plan`: predicted memory and speed of a run, from config.json alone.

No weights, no data and no GPU are needed. Per policy: the peak, tokens a second, the largest micro-batch,
the longest document; then the plan that training would choose, part by part, and what it would be on cards
from 8 to 141 GB. Everything is predicted; what the predictions assume stands under the tables.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from fastsft_kernels.cards import CARDS, Rates
from rich.console import Console
from rich.table import Table

from fastsft.builtin import quickstart_path
from fastsft.config import Config, load_config, size_in_bytes
from fastsft.console import size
from fastsft.model.files import read_adapter_config, read_config, resolve_model
from fastsft.model.job import Job, ranks_of
from fastsft.model.plan import POLICIES, Plan
from fastsft.model.planner import (
    Budget,
    Planned,
    Wish,
    fastest,
    largest_micro_batch,
    longest_context,
    plan_as_told,
)
from fastsft.model.planning import budget_of, rates_of
from fastsft.model.spec import DecoderSpec, NotFast, read_spec
from fastsft.model.speed import shares
from fastsft.model.targets import ends_with, matches, pattern_value

# GB of a card -> one that has them.
EXAMPLES = {
    8: "NVIDIA GeForce RTX 4060",
    12: "NVIDIA GeForce RTX 3060",
    16: "NVIDIA GeForce RTX 4080",
    24: "NVIDIA GeForce RTX 4090",
    40: "NVIDIA A100-SXM4-40GB",
    48: "NVIDIA L40S",
    80: "NVIDIA H100 80GB HBM3",
    141: "NVIDIA H200",
}
NO_DATA = "data=not-read"
DEFAULT_GB = 24
NARROW = 110  # columns of the tables where there is no terminal


@dataclass(frozen=True)
class Place:
    """Where a plan would run."""

    name: str
    rates: Rates
    budget: Budget


def show_plan(path: str | None, words: Sequence[str], vram: str | None) -> int:
    """Prints the tables. Raises UserError for a config or model that cannot be read."""
    words = [*words, *([f"vram={vram}"] if vram else [])]
    if path is None and not any(word.startswith("model=") for word in words):
        path = str(quickstart_path())
    elif path is None and not any(word.startswith("data=") for word in words):
        words.append(NO_DATA)
    config = load_config(path, words)
    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=NARROW)
    try:
        job = job_of_config(config)
    except NotFast as reason:
        console.print(f"{config.model}: no plan, since the compat engine runs it: {reason}.")
        console.print("Its memory is estimated when it is loaded; see the start of a run.")
        return 0
    place, longest = _place(config), config.max_length
    wish = Wish(longest, longest, _policy(config), _micro_batch(config))
    adapters = f"r={max(job.ranks.values())}, " if job.ranks else ""
    console.print(
        f"{config.model}: {config.method}, {adapters}{config.optimizer}, {8 * job.size}-bit activations, "
        f"documents of {longest:,} tokens. Predicted, not measured; GB is 10^9 bytes."
    )
    planned = fastest(job, place.rates, place.budget, wish)
    console.print(_policies_table(job, place, longest, planned))
    _tell_plan(console, planned, place)
    console.print(_cards_table(job, wish))
    used = {
        card.source: card for card in (place.rates, *(CARDS[name] for name in EXAMPLES.values()))
    }
    for source, rates in used.items():
        console.print(f"assumed (rates: {source}): {shares(rates).said()}")
    return 0


def job_of_config(config: Config) -> Job:
    """The sizes of the run. Raises NotFast where the compat engine would run it."""
    if config.engine == "compat":
        raise NotFast("as asked for")
    spec = read_spec(_transformers_config(config))
    size = 4 if config.dtype == "fp32" else 2
    common: dict[str, Any] = {"optimizer": config.optimizer, "size": size}
    if config.method == "full":
        whole = frozenset({"embedding", "head"})
        common["fp32_masters"] = config.masters == "fp32"
        common["update_in_backward"] = config.update_in_backward
        return Job(spec, "full", {}, whole=whole, **common)
    return Job(spec, config.method, _ranks(config, spec), whole=_whole(config, spec), **common)


def _transformers_config(config: Config) -> Any:
    from transformers import AutoConfig

    folder = resolve_model(config.model, config.revision, files=["config.json", "*.py"])
    read_config(folder)
    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=config.trust_remote_code)
    except (ValueError, KeyError, ImportError) as error:
        raise NotFast(f"transformers cannot read its config.json ({error})") from error


def _ranks(config: Config, spec: DecoderSpec) -> dict[str, int]:
    lora, kept = config.lora, config.lora.modules_to_save
    if config.adapter is None:
        _refuse_head(lora.target_modules)
        return ranks_of(spec, lora.target_modules, lora.r, kept_whole=kept)
    found = read_adapter_config(Path(config.adapter))
    _refuse_head(found["target_modules"])
    names = ranks_of(spec, found["target_modules"], found["r"])
    patterns = found.get("rank_pattern") or {}
    return {name: pattern_value(patterns, name, r) for name, r in names.items()}


def _refuse_head(target: str | list[str]) -> None:
    if matches("lm_head", target):
        raise NotFast("lm_head carries an adapter; the fast engine takes those of the layers only")


def _whole(config: Config, spec: DecoderSpec) -> frozenset[str]:
    """Which of embedding and head modules_to_save names."""
    ends = {"embedding": "model.embed_tokens", "head": "lm_head"}
    saved = config.lora.modules_to_save
    others = [s for s in saved if not any(ends_with(name, [s]) for name in ends.values())]
    if others:
        raise NotFast(
            f"{others[0]} trains, and the fast engine trains adapters, embedding and head"
        )
    whole = {end for end, name in ends.items() if any(ends_with(name, [s]) for s in saved)}
    return frozenset(ends) if spec.tied and whole else frozenset(whole)


def _policy(config: Config) -> str | None:
    return None if config.activations == "auto" else str(config.activations)


def _micro_batch(config: Config) -> int | None:
    return None if config.micro_batch_tokens == "auto" else config.micro_batch_tokens


def _place(config: Config) -> Place:
    """The card here, or one with as much memory as `vram` says (24 GB without)."""
    if torch.cuda.is_available():
        device = torch.device("cuda", 0)
        name = torch.cuda.get_device_name(device)
        return Place(f"{name} here", rates_of(device), budget_of(config, device))
    given = DEFAULT_GB * 10**9 if config.vram == "auto" else size_in_bytes(config.vram)
    gb = next((gb for gb in EXAMPLES if gb * 10**9 >= given), max(EXAMPLES))
    name = f"{size(given)} of a card such as {_short(EXAMPLES[gb])}"
    return Place(name, CARDS[EXAMPLES[gb]], Budget(given))


def _short(card: str) -> str:
    return card.removeprefix("NVIDIA ").removeprefix("GeForce ").split(" 80GB")[0].split("-SXM")[0]


def _speed(value: float) -> str:
    return f"{value:,.0f}" if value < 1000 else f"{round(value, -2):,.0f}"


# --- tables ---------------------------------------------------------------------------------------


def _policies_table(job: Job, place: Place, longest: int, planned: Planned | None) -> Table:
    tokens = planned.micro_batch_tokens if planned else longest
    table = Table(title=f"{place.name}: every layer under one policy", title_justify="left")
    table.caption_justify = "left"
    table.caption = (
        "Peak, speed, largest micro-batch: all rows at once, all weights on the card. Longest document: with "
        "tiles, smaller pieces and what may lie in host memory."
    )
    headings = ("policy", f"peak at {tokens:,} tokens", "tokens/s", "largest micro-batch")
    for heading in (*headings, "longest document", "with host memory"):
        table.add_column(heading, justify="left" if heading == "policy" else "right")
    for policy in POLICIES:
        plan = Plan((policy,) * job.spec.layers)
        told = plan_as_told(job, place.rates, plan, tokens, document=longest)
        most = largest_micro_batch(job, place.budget, plan)
        longest_fit = longest_context(job, place.budget, policy)
        fits = place.budget.fits(told.memory)
        table.add_row(
            policy,
            size(told.memory.peak) + ("" if fits else " (too much)"),
            _speed(told.speed.tokens_per_second),
            f"{most:,}" if most else "-",
            f"{longest_fit:,}" if longest_fit else "-",
            size(_host_of(job, place, longest_fit, policy)) if longest_fit else "-",
        )
    return table


def _host_of(job: Job, place: Place, tokens: int, policy: str | None) -> int:
    wish = Wish(tokens, tokens, policy, micro_batch=tokens)
    found = fastest(job, place.rates, place.budget, wish)
    return found.memory.host if found else 0


def _tell_plan(console: Console, planned: Planned | None, place: Place) -> None:
    if planned is None:
        console.print("No plan fits: see the longest documents above.")
        return
    parts = [f"{name} {size(n)}" for name, n in planned.memory.parts.items() if n]
    console.print(
        f"The plan: {planned.said()}; micro-batches of {planned.micro_batch_tokens:,} tokens, "
        f"{_speed(planned.speed.tokens_per_second)} tokens/s."
    )
    console.print(
        f"Its peak, {size(planned.memory.peak)} in {planned.memory.moment}: {', '.join(parts)}; "
        f"{size(planned.memory.host)} of host memory."
    )


def _cards_table(job: Job, wish: Wish) -> Table:
    table = Table(title="on cards of other sizes", title_justify="left")
    right = ("GB", "micro-batch", "peak GB", "tokens/s", "longest document", "host GB")
    for heading in ("GB", "such as", "plan", *right[1:]):
        table.add_column(heading, justify="right" if heading in right else "left")
    for gb, card in EXAMPLES.items():
        place = Place(card, CARDS[card], Budget(gb * 10**9))
        planned = fastest(job, place.rates, place.budget, replace(wish, built=None))
        longest = longest_context(job, place.budget, wish.policy)
        host = _host_of(job, place, longest, wish.policy) if longest else 0
        table.add_row(
            str(gb),
            _short(card),
            planned.said() if planned else "nothing fits",
            f"{planned.micro_batch_tokens:,}" if planned else "-",
            f"{planned.memory.peak / 1e9:.1f}" if planned else "-",
            _speed(planned.speed.tokens_per_second) if planned else "-",
            f"{longest:,}" if longest else "-",
            f"{host / 1e9:.0f}",
        )
    return table
