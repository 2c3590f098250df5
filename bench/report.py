"""What the README files say of results, from the rows in bench/results/ and nothing else.

    python -m bench.report [--results DIR]

rewrites the blocks between markers in README.md and bench/README.md, the last column of the table
in kernels/README.md, the roofline of each card and the pictures of whole trainers. A figure without
a row behind it cannot appear; a test fails when text and rows disagree. With --results the tables
of that folder are printed and its pictures drawn into it, and no README is touched.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench import limits, pictures, roofline, tables, training_tables
from bench import rows as bench_rows

ROOT = Path(__file__).parent.parent
TRAINING = ("train", "context", "quality")
RESULTS = ROOT / "bench" / "results"
README = ROOT / "README.md"
BENCH_README = ROOT / "bench" / "README.md"
KERNELS_README = ROOT / "kernels" / "README.md"
BLOCK = re.compile(r"(?<=<!-- results -->\n).*?(?=<!-- /results -->)", re.DOTALL)
FIRST_CARD = "NVIDIA H200"  # whose figures kernels/README.md shows where it has any


def ledger(folder: Path, name: str) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """(circumstances, rows) of one ledger of a card; empty where it was not measured."""
    return bench_rows.load(folder / f"{name}.json")


def ledgers(folder: Path) -> dict[str, list[dict[str, Any]]]:
    """Rows of whole trainers on one card; empty lists where there are none."""
    return {name: ledger(folder, name)[1] for name in TRAINING}


def cards(results: Path) -> dict[str, Path]:
    """GPU -> its folder, of every one that trained."""
    found = {}
    for path in sorted(results.glob("*/*.json")):
        if path.stem in TRAINING:
            about = bench_rows.load(path)[0]
            if about["driver"]:
                found[about["card"]] = path.parent
    return found


def made_by(about: dict[str, Any]) -> str:
    """Where and with what rows were made."""
    names = ("torch", "trl", "transformers", "unsloth")
    versions = [f"{n} {about['versions'][n]}" for n in names if n in about["versions"]]
    driver = f", driver {about['driver']}" if about["driver"] else f", {about['cores']} cores"
    return f"{about['card']}{driver}; {', '.join(versions)}; commit {about['commit']}."


def block(results: Path = RESULTS) -> str:
    """What stands between the markers of the main README: a GPU's figures first, then a CPU's."""
    parts, cpu = [], results / "cpu"
    for card, folder in cards(results).items():
        found = ledgers(folder)
        parts.append(f"### {card}\n\n{_said(folder, 'train', training_tables.speed)}")
        parts.append(training_tables.context(found["context"]) if found["context"] else "")
    if not parts:
        parts.append("On a GPU: training speed, memory and context are not measured yet.\n")
    for name, table, what in (
        ("data", training_tables.data, "Data preparation"),
        ("train", training_tables.speed, "Training"),
        ("quality", training_tables.curves, "Loss curves"),
    ):
        said = _said(cpu, name, table)
        parts.append(said or f"{what} on a CPU: not measured yet.\n")
    return "\n".join(part for part in parts if part)


def _said(folder: Path, name: str, table: Callable[[list[dict[str, Any]]], str]) -> str:
    about, found = ledger(folder, name)
    return f"{made_by(about)}\n\n{table(found)}" if found else ""


def training_block(results: Path = RESULTS) -> str:
    """The tables of bench/README.md: whole trainers on each card, then on a CPU."""
    parts = []
    for title, folder in {**cards(results), "CPU": results / "cpu"}.items():
        parts.append(f"### Whole trainers: {title}\n")
        for name, table in (
            ("engine", training_tables.engine),
            ("train", training_tables.training),
            ("context", training_tables.context),
            ("quality", training_tables.curves),
        ):
            parts.append(_said(folder, name, table) or f"bench.{name}: {tables.NOT_MEASURED}.\n")
        shown = pictures.wanted(ledgers(folder))
        parts += [f"![](results/{folder.name}/{name})\n" for name in shown]
    if not cards(results):
        parts.insert(0, "Whole trainers on a GPU: not measured.\n")
    return "\n".join(parts)


def measured(results: Path = RESULTS) -> dict[str, list[dict[str, Any]]]:
    """Card -> the rows of its kernels, of every GPU there are results of."""
    files = [bench_rows.load(path) for path in sorted(results.glob("*/kernels.json"))]
    return {about["card"]: found for about, found in files if about["driver"]}


def kernels_block(results: Path = RESULTS) -> str:
    """The tables of bench/README.md: kernels on each card, and what the compiler made of them."""
    parts: list[str] = []
    for card, found in measured(results).items():
        parts += [f"### {card}\n\n", tables.kernels(card, found), f"\n![]({_picture(card)})\n\n"]
    parts = parts or ["Kernels on a GPU: not measured.\n\n"]
    compiled = [
        (path.stem, bench_rows.load(path)[1])
        for path in sorted((results / "static").glob("*.json"))
    ]
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
    """As the Markdown beside the folder names it."""
    return f"results/{bench_rows.slug(card)}/roofline.png"


def kernels_readme(text: str, results: Path = RESULTS) -> str:
    """kernels/README.md with the measured gain of each op in the last column of its table."""
    found = measured(results)
    card = FIRST_CARD if FIRST_CARD in found else min(found, default="")

    def line(match: re.Match[str]) -> str:
        cells = match[0].split(" | ")
        gains = [
            tables.gain(op, card, found.get(card, ()))
            for op in cells[0].strip("| ").replace("`", "").split(", ")
        ]
        known = [g for g in gains if g != tables.NOT_MEASURED]
        return " | ".join([*cells[:-1], "; ".join(known) or tables.NOT_MEASURED]) + " |"

    table = re.compile(r"(?<=measured gain \|\n)\|[-|]+\|\n(?:\|.*\n)*")
    return table.sub(lambda m: re.sub(r"^\| .*\|$", line, m[0], flags=re.MULTILINE), text)


def draw(results: Path) -> None:
    """Every picture there are rows of, beside its rows."""
    for folder in (*cards(results).values(), results / "cpu"):
        pictures.draw(folder, ledgers(folder))
    for card, found in measured(results).items():
        rates = limits.rates_of(card, found)
        if rates:
            roofline.plot(card, found, rates, results / bench_rows.slug(card) / "roofline.png")


def write(results: Path = RESULTS) -> None:
    """The blocks of the README files."""
    made = {
        README: block(results),
        BENCH_README: f"{kernels_block(results)}\n{training_block(results)}",
    }
    for path, text in made.items():
        head, rest = path.read_text(encoding="utf-8").split("<!-- results -->\n")
        tail = rest.split("<!-- /results -->")[1]
        whole = f"{head}<!-- results -->\n{text}<!-- /results -->{tail}"
        path.write_text(whole, encoding="utf-8")
    text = KERNELS_README.read_text(encoding="utf-8")
    KERNELS_README.write_text(kernels_readme(text, results), encoding="utf-8")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--results", type=Path, help="print these results instead")
    given = parser.parse_args(argv)
    draw(given.results or RESULTS)
    if given.results:
        print(block(given.results), training_block(given.results), sep="\n")
    else:
        write()


if __name__ == "__main__":
    main()
