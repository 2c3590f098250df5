"""What the planner promises, beside what others published: contexts by card, speed beside the goals.

    python -m bench.planned

writes rows to bench/results/planned/ and the block between markers in README.md. Nothing here is measured:
memory is predicted by fastsft/model/memory.py (held to 3 % of counted bytes by a test), time by speed.py.
The same command on a machine with a GPU would say the same.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from fastsft_kernels.cards import CARDS
from transformers import LlamaConfig

from fastsft.model.job import Job, ranks_of
from fastsft.model.plan import Plan
from fastsft.model.planner import Budget, Wish, describe, fastest, longest_context
from fastsft.model.spec import read_spec
from fastsft.model.speed import packed, predict_speed, shares

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
RESULTS = ROOT / "bench" / "results" / "planned"
BLOCK = re.compile(r"(?<=<!-- planned -->\n).*?(?=<!-- /planned -->)", re.DOTALL)

# GB of a card -> tokens. Unsloth's blog, 2024-12: Llama 3.1 8B, QLoRA, r = 32 on all linear layers.
UNSLOTH = {
    8: 2_972, 12: 21_848, 16: 40_724, 24: 78_475, 40: 153_977, 48: 191_728, 80: 342_733,
}  # fmt: skip
CARD = "NVIDIA H200"
ALPACA, ALPACA_TRAINED = 200, 0.6  # tokens of a row, and the share of them that is trained
# (method, tokens of a document, share trained, goal in tokens/s).
GOALS = (
    ("lora", ALPACA, ALPACA_TRAINED, 20_000),
    ("qlora", ALPACA, ALPACA_TRAINED, 19_000),
    ("lora", 4096, 1.0, 17_000),
    ("qlora", 4096, 1.0, 16_500),
)
GOAL_TOKENS = 16384


def llama(method: str, r: int) -> Job:
    """Llama-3.1-8B with adapters on all seven projections."""
    spec = read_spec(
        LlamaConfig(
            vocab_size=128256,
            hidden_size=4096,
            intermediate_size=14336,
            num_hidden_layers=32,
            num_attention_heads=32,
            num_key_value_heads=8,
            rms_norm_eps=1e-5,
            tie_word_embeddings=False,
        )
    )
    return Job(spec, method, ranks_of(spec, "all-linear", r))


def contexts() -> list[dict[str, Any]]:
    """For each card the longest document that fits, with the host memory it takes."""
    job, rates, found = llama("qlora", 32), CARDS[CARD], []
    for gb, published in UNSLOTH.items():
        budget = Budget(gb * 10**9)
        longest = longest_context(job, budget)
        plan = None
        if longest:
            plan = fastest(job, rates, budget, Wish(longest, longest, micro_batch=longest))
        found.append(
            {
                "kind": "context",
                "gb": gb,
                "tokens": longest,
                "host_bytes": plan.memory.host if plan else 0,
                "peak_bytes": plan.memory.peak if plan else 0,
                "plan": describe(plan.plan) if plan else "nothing fits",
                "unsloth_published": published,
            }
        )
    return found


def speeds() -> list[dict[str, Any]]:
    """Tokens a second on an H200 with everything kept, beside the goals."""
    found = []
    for method, document, trained, goal in GOALS:
        for resident in (32, 0) if method == "qlora" else (0,):
            plan = Plan(("keep",) * 32, resident=resident)
            load = packed(GOAL_TOKENS, document, trained)
            speed = predict_speed(llama(method, 16), plan, CARDS[CARD], load)
            found.append(
                {
                    "kind": "speed",
                    "method": method,
                    "document": document,
                    "resident": resident,
                    "tokens_per_second": round(speed.tokens_per_second),
                    "goal": goal,
                }
            )
    return found


def block(rows: list[dict[str, Any]]) -> str:
    """What stands between the markers."""
    lines = [
        "Planned, not measured. Llama-3.1-8B, QLoRA, r = 32 on all seven projections, AdamW in fp32: the",
        "longest document that fits, all of it trained, with the host memory its offloaded activations",
        "take, beside Unsloth's published figures. GB is 10^9 bytes.",
        "",
        "| card | tokens | host memory | Unsloth published | times |",
        "|---|---|---|---|---|",
    ]
    for row in rows:
        if row["kind"] == "context":
            published, tokens = row["unsloth_published"], row["tokens"]
            times = f"{tokens / published:.1f}x" if tokens else "-"
            host = f"{row['host_bytes'] / 1e9:.0f} GB"
            lines.append(f"| {row['gb']} GB | {tokens:,} | {host} | {published:,} | {times} |")
    lines += [
        "",
        f"Predicted speed on one H200, Llama-3.1-8B, r = 16, micro-batches of {GOAL_TOKENS:,} tokens,",
        "everything kept.",
        f"Assumed: {shares(CARDS[CARD]).said()}.",
        f"Rates: {CARDS[CARD].source}.",
        "",
        "| | documents of | tokens/s | goal |",
        "|---|---|---|---|",
    ]
    for row in rows:
        if row["kind"] == "speed":
            way = "" if row["method"] == "lora" else ", decoded each time"
            way = ", weights stay decoded" if row["resident"] else way
            name = {"lora": "LoRA", "qlora": "QLoRA"}[row["method"]]
            speed, goal = round(row["tokens_per_second"], -2), row["goal"]
            lines.append(f"| {name}{way} | {row['document']:,} | {speed:,} | {goal:,} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    rows = contexts() + speeds()
    RESULTS.mkdir(parents=True, exist_ok=True)
    (RESULTS / "llama-3.1-8b.json").write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    text = README.read_text(encoding="utf-8")
    assert BLOCK.search(text), "README.md has no <!-- planned --> block"
    README.write_text(BLOCK.sub(lambda _: block(rows), text), encoding="utf-8")


if __name__ == "__main__":
    main()
