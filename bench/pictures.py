"""Pictures of whole trainers, drawn from rows alone.

tokens.png     tokens a second, a bar for each trainer, a panel for each model and method
context.png    memory against context: peaks of the probes and the budgets they stayed under
curves.png     loss curves laid over each other
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bench.tables import Row
from bench.training_tables import groups

SMOOTH = 10  # steps a loss is averaged over before it is drawn


def wanted(found: Mapping[str, Sequence[Row]]) -> list[str]:
    """The pictures that these rows (name of the ledger -> rows) make."""
    has = {
        "tokens.png": any("p50" in row for row in found.get("train", ())),
        "context.png": any(row.get("fits") for row in found.get("context", ())),
        "curves.png": any("losses" in row for row in found.get("quality", ())),
    }
    return [name for name, there in has.items() if there]


def draw(folder: Path, found: Mapping[str, Sequence[Row]]) -> None:
    """Draws them into `folder`."""
    painters = {
        "tokens.png": ("train", tokens),
        "context.png": ("context", context),
        "curves.png": ("quality", curves),
    }
    for name in wanted(found):
        ledger, paint = painters[name]
        paint(found[ledger], folder / name)


def _pyplot() -> Any:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def _colour(who: str) -> str:
    """fastsft stands out; the others are told apart by their names."""
    if who == "fastsft":
        return "#d1495b"
    return "#e8a1aa" if who.startswith("fastsft") else "#8d99ae"


def _panels(pyplot: Any, count: int, height: float) -> tuple[Any, list[Any]]:
    columns = min(2, count)
    rows = -(-count // columns)
    size = (6.5 * columns, height * rows)
    figure, axes = pyplot.subplots(rows, columns, figsize=size, layout="constrained", squeeze=False)
    flat = list(axes.flat)
    for spare in flat[count:]:
        spare.set_axis_off()
    return figure, flat[:count]


def tokens(rows: Sequence[Row], path: Path) -> None:
    """Bars with the 20th to 80th percentile of the steps; a trainer that failed is named with its error."""
    found = groups(rows)
    pyplot = _pyplot()
    longest = max(len(everyone) for everyone in found.values())
    figure, panels = _panels(pyplot, len(found), 0.9 + 0.38 * longest)
    for axis, ((model, kind, method), everyone) in zip(panels, found.items(), strict=True):
        names = [row["who"] for row in everyone]
        for i, row in enumerate(everyone):
            if "p50" not in row:
                axis.text(0, i, " failed", va="center", fontsize=8)
                continue
            speed = row["tokens_per_second"]
            axis.barh(i, speed, color=_colour(row["who"]))
            axis.plot([row["p20"], row["p80"]], [i, i], color="black", lw=1)
            axis.text(max(speed, row["p80"]), i, f" {speed:,.0f}", va="center", fontsize=8)
        axis.set_yticks(range(len(names)), names, fontsize=8)
        axis.invert_yaxis()
        axis.margins(x=0.18)
        axis.set_xlim(left=0)
        axis.set_title(f"{model}, {method}, {kind} rows", fontsize=10)
        axis.set_xlabel("real tokens a second", fontsize=8)
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def context(rows: Sequence[Row], path: Path) -> None:
    """Every probe that fitted: its length and the memory it took."""
    probes = [row for row in rows if row.get("fits")]
    pyplot = _pyplot()
    figure, axis = pyplot.subplots(figsize=(7, 4.5), layout="constrained")
    small = max(row["budget"] for row in probes) < 1
    unit, name = (10**6, "MB") if small else (10**9, "GB")
    for label in dict.fromkeys((r["model"], r["method"], r["who"]) for r in probes):
        mine = [r for r in probes if (r["model"], r["method"], r["who"]) == label]
        points = sorted((r["tokens"], r["peak_bytes"] / unit) for r in mine)
        axis.plot(*zip(*points, strict=True), "o-", ms=4, label=" ".join(label))
    for budget in sorted({row["budget"] for row in probes}):
        axis.axhline(budget * 10**9 / unit, color="grey", lw=0.6, ls=":")
    kinds = {row.get("limit", "") for row in probes}
    axis.set(xlabel="tokens of one document", ylabel=f"peak, {name} ({', '.join(sorted(kinds))})")
    axis.set_xscale("log", base=2)
    axis.set_yscale("log", base=2)
    axis.xaxis.set_major_formatter("{x:,.0f}")
    axis.yaxis.set_major_formatter("{x:g}")
    axis.legend(fontsize=8)
    axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def curves(rows: Sequence[Row], path: Path) -> None:
    """A panel for each model and method, a line for each trainer and seed; then fastsft's methods."""
    panels: dict[str, list[tuple[str, Row]]] = {}
    for row in rows:
        if "losses" in row:
            title = f"{row['model']}, {row['method']}"
            panels.setdefault(title, []).append((f"{row['who']}, seed {row['seed']}", row))
    for row in rows:
        if "losses" in row and row["who"] == "fastsft" and row["seed"] == 0:
            panels.setdefault(f"{row['model']}, fastsft", []).append((row["method"], row))
    pyplot = _pyplot()
    figure, axes = _panels(pyplot, len(panels), 3.8)
    for axis, (title, lines) in zip(axes, panels.items(), strict=True):
        for label, row in lines:
            style = {"lw": 1.4} if row["who"] == "fastsft" else {"lw": 1.0, "ls": "--"}
            axis.plot(_smooth(row["losses"]), label=label, alpha=0.85, **style)
        axis.set_title(title, fontsize=10)
        axis.set_xlabel(f"step (mean of {SMOOTH})", fontsize=8)
        axis.set_ylabel("loss", fontsize=8)
        axis.legend(fontsize=7)
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def _smooth(losses: Sequence[float]) -> list[float]:
    return [
        sum(part) / len(part)
        for i in range(len(losses))
        for part in [losses[max(0, i + 1 - SMOOTH) : i + 1]]
    ]
