"""Tables of whole trainers, from the rows of bench.train, bench.context, bench.quality and bench.data."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from bench import quality
from bench.tables import NOT_MEASURED, Row, markdown

GIB = 2**30


def groups(rows: Sequence[Row]) -> dict[tuple[str, str, str], list[Row]]:
    """(model, rows, method) -> everyone's row, in the order they were measured."""
    found: dict[tuple[str, str, str], list[Row]] = {}
    for row in rows:
        if row["kind"] == "train":
            found.setdefault((row["model"], row["rows"], row["method"]), []).append(row)
    return found


def speed(rows: Sequence[Row]) -> str:
    """The short table: tokens a second, and against whom."""
    lines = []
    for (model, kind, method), everyone in groups(rows).items():
        ours = next((r for r in everyone if r["who"] == "fastsft" and "p50" in r), None)
        for row in everyone:
            what = [f"{model}, {method}, {kind} rows", row["who"]]
            if "p50" not in row:
                lines.append([*what, f"failed: {row['error']}", "", "", ""])
                continue
            ratio = f"{ours['tokens_per_second'] / row['tokens_per_second']:.2f}x" if ours else ""
            spread = f"{row['p20']:,.0f} to {row['p80']:,.0f}"
            speed = f"{row['tokens_per_second']:,.0f}"
            lines.append([*what, speed, spread, _memory(row), ratio])
    head = [
        "training",
        "trainer",
        "real tokens/s",
        "p20 to p80",
        "allocated, reserved",
        "fastsft is",
    ]
    return markdown(head, lines) + _seconds(rows)


def engine(rows: Sequence[Row]) -> str:
    """What was checked of the fast engine, and its memory as predicted and as measured."""
    checks = [r for r in rows if r["kind"] == "check"]
    lines = [
        [r["case"], r["problem"] or "right", _found(r, "error"), _found(r, "allowed")]
        for r in checks
    ]
    text = markdown(["check of the fast engine", "", "error", "allowed"], lines)
    lines = [
        [
            f"{r['model']}, {r['method']}, {r['tokens']:,} tokens",
            r["policy"],
            f"{r['predicted_bytes'] / 1e9:.2f}",
            f"{r['allocated_bytes'] / 1e9:.2f}" if "allocated_bytes" in r else r["problem"],
            f"{r['reserved_bytes'] / 1e9:.2f}" if "reserved_bytes" in r else "",
            f"{r['off']:+.1%}" if "off" in r else "",
            f"{r['tokens_per_second']:,.0f}" if "tokens_per_second" in r else "",
        ]
        for r in rows
        if r["kind"] == "memory"
    ]
    if not lines:
        return f"{text}\nPredicted against measured memory: {NOT_MEASURED}.\n"
    head = ["memory of a step", "policy", "predicted GB", "allocated GB", "reserved GB"]
    head += ["off by", "tokens/s"]
    return f"{text}\n{markdown(head, lines)}"


def _found(row: Row, key: str) -> str:
    return f"{row[key]:.1e}" if key in row else ""


def _seconds(rows: Sequence[Row]) -> str:
    if not any(row.get("clock") == "processor" for row in rows):
        return ""
    return "\nSeconds are those of the processor, all threads added up.\n"


def training(rows: Sequence[Row]) -> str:
    """All that was measured of each trainer."""
    lines = []
    for (model, kind, method), everyone in groups(rows).items():
        for row in everyone:
            what = [f"{model}, {method}, {kind}", row["who"]]
            if "p50" not in row:
                lines.append([*what, f"failed: {row['error']}", *[""] * 8])
                continue
            loss = f"{row['first_loss']:.3f} to {row['last_loss']:.3f}"
            lines.append(
                [
                    *what,
                    f"{row['tokens_per_second']:,.0f}",
                    f"{row['trained_per_second']:,.0f}",
                    f"{row['first_step_seconds']:.1f}",
                    _gib(row, "peak_allocated_bytes"),
                    _reserved(row),
                    f"{row['busy_share']:.0%}" if "busy_share" in row else NOT_MEASURED,
                    f"{row['mfu']:.1%}" if "mfu" in row else NOT_MEASURED,
                    f"{row['launches_a_step']:,.0f}" if "launches_a_step" in row else NOT_MEASURED,
                    f"{loss}; {row['note']}",
                ]
            )
    head = [
        *("training", "trainer", "tokens/s", "trained tokens/s", "first step, s"),
        *("allocated", "reserved", "GPU busy", "MFU", "launches a step", "loss; how it ran"),
    ]
    return markdown(head, lines) + _seconds(rows)


def _gib(row: Row, name: str) -> str:
    return f"{row[name] / GIB:.1f} GiB" if name in row else NOT_MEASURED


def _memory(row: Row) -> str:
    """Peaks of the allocator: what tensors held, and what it took from the card."""
    if "peak_reserved_bytes" not in row:
        return NOT_MEASURED
    return f"{_gib(row, 'peak_allocated_bytes')}, {_gib(row, 'peak_reserved_bytes')}"


def _reserved(row: Row) -> str:
    predicted = f" ({_gib(row, 'predicted_bytes')} planned)" if "predicted_bytes" in row else ""
    return _gib(row, "peak_reserved_bytes") + predicted


def context(rows: Sequence[Row]) -> str:
    """The longest context of each trainer, one column per budget."""
    found = [row for row in rows if row["kind"] == "context"]
    budgets = sorted({row["budget"] for row in found})
    names = list(dict.fromkeys((r["model"], r["method"], r["who"]) for r in found))
    cells = {(r["model"], r["method"], r["who"], r["budget"]): _longest(r) for r in found}
    lines = [
        [f"{model}, {method}", who]
        + [cells.get((model, method, who, b), NOT_MEASURED) for b in budgets]
        for model, method, who in names
    ]
    return markdown(["longest context", "trainer", *(budget_name(b) for b in budgets)], lines)


def budget_name(gigabytes: float) -> str:
    return f"{gigabytes:g} GB" if gigabytes >= 1 else f"{1000 * gigabytes:g} MB"


def _longest(row: Row) -> str:
    if "error" in row:
        least = f", at least {row['longest']:,}" if row.get("longest") else ""
        return f"failed: {row['error']}{least}"
    return f"{row['longest']:,}" if row["longest"] else "none"


def curves(rows: Sequence[Any]) -> str:
    """Who agrees with whom, and the curves that failed."""
    lines = []
    for model in dict.fromkeys(row["model"] for row in rows if row["kind"] == "curve"):
        for v in quality.verdicts(rows, model):
            says = "yes" if v.agree else "**no**"
            pair = f"{v.who}, {v.other}"
            lines.append([f"{model}, {v.method}", pair, f"{v.apart:.4f}", f"{v.noise:.4f}", says])
    for row in rows:
        if row["kind"] == "curve" and "error" in row:
            what = f"{row['model']}, {row['method']}"
            lines.append([what, row["who"], f"failed: {row['error']}", "", "**no**"])
    head = ["loss curves", "trainers", "apart, nats", "two seeds apart", "one within the noise"]
    return markdown(head, lines)


def data(rows: Sequence[Row]) -> str:
    """Preparing the same rows, and what it needs of memory."""
    lines = []
    for row in rows:
        if row["kind"] != "data":
            continue
        if "error" in row:
            lines.append([row["who"], "", "", row["error"], ""])
            continue
        who = "TRL" if row["who"] == "trl" else f"fastsft through {row['tokenizer_runs_on']}"
        lines.append(
            [
                f"{who} ({row['tokenizer']} vocabulary)",
                f"{row['processes']}",
                f"{row['seconds']:.1f}",
                f"{row['tokens_per_second'] / 1e6:.2f}",
                f"{row['times_trl']:.1f}x",
            ]
        )
    head = ["preparing the same rows", "processes", "seconds", "M tokens/s", "against TRL"]
    said = markdown(head, lines)
    for row in rows:
        if row["kind"] == "data memory" and "error" not in row:
            size, peak = row["file_bytes"] / 1e6, row["peak_bytes_over_imports"] / 1e6
            said += f"\nPreparing {size:.0f} MB peaked at {peak:.0f} MB over imports.\n"
    return said
