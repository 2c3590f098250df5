"""The README's results, from the rows in bench/results/ and nothing else.

    python -m bench.report          rewrites the block between the two markers

A figure without a row behind it cannot appear; a test fails when block and rows disagree.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "bench" / "results" / "cpu"
README = ROOT / "README.md"
BLOCK = re.compile(r"(?<=<!-- results -->\n).*?(?=<!-- /results -->)", re.DOTALL)


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


def main() -> None:
    text = README.read_text(encoding="utf-8")
    assert BLOCK.search(text), "README.md lost its markers"
    README.write_text(BLOCK.sub(lambda _: block(), text), encoding="utf-8")


if __name__ == "__main__":
    main()
