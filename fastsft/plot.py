"""loss.png, drawn from metrics.jsonl alone: each logged loss faint, its smoothed course, evaluation.

The smoothed line averages over both sides with exponentially decaying weights; an average over the
past alone trails behind a falling loss. Its span grows with the run (a fiftieth of the points), so
a short run is not flattened and a long one is not noise. From 200 points on, the axis leaves out
the largest half percent of the training losses, which would squeeze all the others.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fastsft.metrics import read_metrics

_TRAIN, _EVAL, _GRID = "#2563eb", "#ea580c", "#e5e7eb"


def plot_loss(metrics: Path, png: Path, title: str | None = None) -> bool:
    """Draw `png` from `metrics`; False, and no file, when no loss has been logged yet."""
    records = read_metrics(metrics)
    train = _series(records, "loss")
    evaluation = _series(records, "eval_loss")
    if not train and not evaluation:
        return False

    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(8, 4.5), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    if train:
        steps, losses = zip(*train, strict=True)
        smooth = smoothed(losses, max(1.0, len(losses) / 50))
        if len(losses) > 1:
            axes.plot(steps, losses, color=_TRAIN, alpha=0.25, lw=1)
        marker = "o" if len(losses) <= 10 else None
        label = f"training  {smooth[-1]:.3f}"
        axes.plot(steps, smooth, color=_TRAIN, lw=2, marker=marker, ms=4.5, label=label)
    if evaluation:
        steps, losses = zip(*evaluation, strict=True)
        label = f"evaluation  {losses[-1]:.3f}"
        axes.plot(steps, losses, color=_EVAL, lw=1.6, marker="o", ms=4.5, mec="white", label=label)
    axes.set_ylim(*_limits([loss for _, loss in train], [loss for _, loss in evaluation]))
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("loss per trained token (nats)")
    axes.set_xlim(left=0)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.grid(color=_GRID, lw=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc="upper right" if len(train) > 10 else "best")
    if title:
        axes.set_title(title, loc="left", fontsize=11, fontweight="bold")
    temporary = png.with_name(f".{png.name}.new")
    figure.savefig(temporary, format="png")
    temporary.replace(png)
    return True


def smoothed(values: Sequence[float], span: float) -> list[float]:
    """Means with weights keep^|distance| on both sides, keep = 1 - 1/span; ends see one side."""
    keep = 1.0 - 1.0 / span
    past = _decaying_sums(values, keep)
    future = _decaying_sums(values[::-1], keep)[::-1]
    return [
        (before + after - value) / (weight_before + weight_after - 1.0)
        for (before, weight_before), (after, weight_after), value in zip(
            past, future, values, strict=True
        )
    ]


def _decaying_sums(values: Sequence[float], keep: float) -> list[tuple[float, float]]:
    """(sum of keep^(i-j) v_j, sum of keep^(i-j)) over j <= i."""
    total = weight = 0.0
    sums = []
    for value in values:
        total, weight = keep * total + value, keep * weight + 1.0
        sums.append((total, weight))
    return sums


def _series(records: list[dict[str, Any]], key: str) -> list[tuple[int, float]]:
    return [(r["step"], r[key]) for r in records if r.get(key) is not None]


def _limits(train: list[float], evaluation: list[float]) -> tuple[float, float]:
    ordered = sorted(train)
    if len(ordered) >= 200:
        ordered = ordered[: int(0.995 * len(ordered))]
    high = max(ordered[-1:] + evaluation)
    low = min(train + evaluation)
    margin = 0.06 * (high - low) or 0.5
    return (0.0 if low < 0.25 * high else low - margin), high + margin
