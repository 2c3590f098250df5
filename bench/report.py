"""What the README files say of results, from the rows in bench/results/ and nothing else.

    python -m bench.report

rewrites the blocks between markers in README.md and bench/README.md, the last column of the table
in kernels/README.md and the roofline of each card. A figure without a row behind it cannot appear;
a test fails when text and rows disagree.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from bench import limits, roofline, tables
from bench import rows as bench_rows

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "bench" / "results" / "cpu"
STATIC = ROOT / "bench" / "results" / "static"
README = ROOT / "README.md"
BENCH_README = ROOT / "bench" / "README.md"
KERNELS_README = ROOT / "kernels" / "README.md"
BLOCK = re.compile(r"(?<=<!-- results -->\n).*?(?=<!-- /results -->)", re.DOTALL)
FIRST_CARD = "NVIDIA H200"  # whose figures kernels/README.md shows where it has any


def rows(name: str) -> list[dict[str, Any]]:
    """The rows of one result file; none where it was not measured."""
    path = RESULTS / name
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else []


def data_table(found: list[dict[str, Any]]) -> list[str]:
    lines = [
        "| preparing the same rows | processes | seconds | M tokens/s | against TRL |",
        "|---|---|---|---|---|",
    ]
    for row in found:
        if row["bench"] != "data":
            continue
        who = "TRL" if row["who"] == "trl" else f"fastsft through {row['tokenizer_runs_on']}"
        speed = f"{row['tokens_per_second'] / 1e6:.2f}"
        what = f"{who} ({row['tokenizer']} vocabulary)"
        lines.append(
            f"| {what} | {row['processes']} | {row['seconds']:.1f} | {speed} | {row['times_trl']:.1f}x |"
        )
    for row in found:
        if row["bench"] == "data memory":
            size, peak = row["file_bytes"] / 1e6, row["peak_bytes_over_imports"] / 1e6
            lines += ["", f"Preparing {size:.0f} MB peaked at {peak:.0f} MB over imports."]
    return lines


def training_table(found: list[dict[str, Any]]) -> list[str]:
    lines = [
        "",
        "| LoRA on builtin:tiny, fp32 | real tokens/s | p20 to p80 of the steps |",
        "|---|---|---|",
    ]
    for row in found:
        if "error" in row:
            lines.append(f"| {row['who']} | failed: {row['error']} | |")
        else:
            spread = f"{row['p20']:,.0f} to {row['p80']:,.0f}"
            lines.append(f"| {row['who']} | {row['tokens_per_second']:,.0f} | {spread} |")
    return lines


def block() -> str:
    """What stands between the markers."""
    data, training = rows("data.json"), rows("training.json")
    if not data and not training:
        return "not measured yet\n"
    first = (data or training)[0]
    versions = ", ".join(f"{name} {first['versions'][name]}" for name in ("trl", "transformers"))
    lines = [f"{first['cpu']}, {first['cores']} cores; {versions}.", ""]
    lines += data_table(data) if data else ["data preparation: not measured"]
    lines += training_table(training) if training else ["", "training: not measured"]
    return "\n".join(lines) + "\n"


def measured() -> dict[str, list[dict[str, Any]]]:
    """Card -> the rows of its kernels, of every GPU there are results of."""
    files = [bench_rows.load(path) for path in sorted(RESULTS.parent.glob("*/kernels.json"))]
    return {about["card"]: found for about, found in files if about["driver"]}


def kernels_block() -> str:
    """The tables of bench/README.md: kernels on each card, and what the compiler made of them."""
    parts: list[str] = []
    for card, found in measured().items():
        parts += [f"### {card}\n\n", tables.kernels(card, found), f"\n![]({_picture(card)})\n\n"]
    parts = parts or ["Kernels on a GPU: not measured.\n\n"]
    compiled = [(path.stem, bench_rows.load(path)[1]) for path in sorted(STATIC.glob("*.json"))]
    for name, built in compiled:
        wrong = sum(bool(row["failures"]) for row in built)
        parts.append(
            f"- [{name}](results/static/{name}.md): {len(built)} kernels compiled, {wrong} with failures\n"
        )
    for name, built in compiled[-1:]:  # the newest Triton, as most people run it
        usual = [r for r in built if r["choice"] in ("", "nvcc") and r["dtype"] in ("bfloat16", "")]
        parts += [f"\nDefault configurations in bf16, {name}. ", tables.STATIC_KEY, "\n"]
        parts.append(tables.static(usual))
    return "".join(parts)


def _picture(card: str) -> str:
    return f"results/{bench_rows.slug(card)}/roofline.png"


def kernels_readme(text: str) -> str:
    """kernels/README.md with the measured gain of each op in the last column of its table."""
    cards = measured()
    card = FIRST_CARD if FIRST_CARD in cards else min(cards, default="")

    def line(match: re.Match[str]) -> str:
        cells = match[0].split(" | ")
        gains = [
            tables.gain(op, card, cards.get(card, ()))
            for op in cells[0].strip("| ").replace("`", "").split(", ")
        ]
        known = [g for g in gains if g != tables.NOT_MEASURED]
        return " | ".join([*cells[:-1], "; ".join(known) or tables.NOT_MEASURED]) + " |"

    table = re.compile(r"(?<=measured gain \|\n)\|[-|]+\|\n(?:\|.*\n)*")
    return table.sub(lambda m: re.sub(r"^\| .*\|$", line, m[0], flags=re.MULTILINE), text)


def main() -> None:
    for path, made in ((README, block()), (BENCH_README, kernels_block())):
        head, rest = path.read_text(encoding="utf-8").split("<!-- results -->\n")
        tail = rest.split("<!-- /results -->")[1]
        whole = f"{head}<!-- results -->\n{made}<!-- /results -->{tail}"
        path.write_text(whole, encoding="utf-8")
    text = KERNELS_README.read_text(encoding="utf-8")
    KERNELS_README.write_text(kernels_readme(text), encoding="utf-8")
    for card, found in measured().items():
        rates = limits.rates_of(card, found)
        if rates:
            roofline.plot(card, found, rates, BENCH_README.parent / _picture(card))


if __name__ == "__main__":
    main()
