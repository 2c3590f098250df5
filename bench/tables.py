"""Tables in Markdown, from rows alone: a figure without a row cannot appear."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from bench import limits

Row = Mapping[str, Any]
NOT_MEASURED = "not measured"


def markdown(head: Iterable[str], lines: Iterable[Iterable[str]]) -> str:
    """A table; `head` and each line of equal length."""
    head = list(head)
    rows = [head, ["---"] * len(head), *lines]
    return "".join("| " + " | ".join(row) + " |\n" for row in rows)


def static(rows: Sequence[Row]) -> str:
    """One line per kernel and configuration, one column per target."""
    targets = sorted({row["capability"] for row in rows})
    lines: dict[tuple[str, ...], dict[int, str]] = {}
    for row in rows:
        options = " ".join(f"{k}={v}" for k, v in row["options"].items())
        key = (row["kernel"], row["dtype"], options)
        lines.setdefault(key, {})[row["capability"]] = _static_cell(row)
    return markdown(
        ["kernel", "dtype", "configuration", *(f"sm_{t}" for t in targets)],
        [
            [f"`{kernel}`", dtype, options, *(cells.get(t, "") for t in targets)]
            for (kernel, dtype, options), cells in sorted(lines.items())
        ],
    )


STATIC_KEY = (
    "A cell: registers a thread (r), KiB of shared memory a block (K), blocks on a multiprocessor "
    "(b), the matrix\ninstruction, the width of most loads from global memory in bits, "
    "instructions for each weight decoded (i).\n"
)


def _static_cell(row: Row) -> str:
    if "registers" not in row:
        return "**fails**"
    parts = [f"{row['registers']}r", f"{row['shared'] / 1024:.0f}K"]
    if "blocks_per_sm" in row:
        parts.append(f"{row['blocks_per_sm']}b")
    if row.get("matrix"):
        parts.append(row["matrix"])
    if row["loads"]:
        parts.append(max(row["loads"], key=row["loads"].get))
    if "per_weight" in row:
        parts.append(f"{row['per_weight']:.1f}i")
    return " ".join(parts) + (" **fails**" if row["failures"] else "")


def times(rows: Sequence[Row]) -> dict[tuple[str, str], dict[str, Row]]:
    """(op, case) -> who -> the row of its time or error."""
    found: dict[tuple[str, str], dict[str, Row]] = {}
    for row in rows:
        if row["kind"] == "time":
            found.setdefault((row["op"], row["case"]), {})[row["who"]] = row
    return found


def kernels(card: str, rows: Sequence[Row]) -> str:
    """Ours and the peers on one card, op by op, with the share of the card's own limit."""
    lines = []
    for (op, case), everyone in sorted(times(rows).items()):
        ours = everyone.get("fastsft", {})
        peers = [f"{who} {_versus(row, ours)}" for who, row in everyone.items() if row is not ours]
        lines.append([op, case, _time(ours), _rate(ours), _share(ours), "; ".join(peers)])
    for row in rows:
        if row["kind"] == "check" and row["problem"]:
            wrong = f"**wrong** ({row['dtype']}, {row.get('choice') or 'default'})"
            lines.append([row["op"], row["case"], wrong, "", "", row["problem"]])
    rates = limits.rates_of(card, rows)
    says = f"{rates.bandwidth / 1e12:.2f} TB/s, {rates.flops / 1e12:.0f} TFLOP/s" if rates else ""
    source = f"The limit: {says}, {rates.source}.\n\n" if rates else ""
    head = ["op", "call", "us (p20 to p80)", "rate", "of the limit", "peers: us, our speed-up"]
    return source + markdown(head, lines)


def _time(row: Row) -> str:
    if "p50" not in row:
        return row.get("error", NOT_MEASURED)
    p20, p50, p80 = (1e6 * row[p] for p in ("p20", "p50", "p80"))
    return f"{p50:,.1f} ({p20:,.1f} to {p80:,.1f})"


def _rate(row: Row) -> str:
    if "p50" not in row:
        return ""
    return f"{row['tflop_per_s']:.0f} TFLOP/s" if row["flops"] else f"{row['gb_per_s']:,.0f} GB/s"


def _share(row: Row) -> str:
    return f"{row['share_of_limit']:.0%}" if "share_of_limit" in row else ""


def _versus(row: Row, ours: Row) -> str:
    if "p50" not in row:
        return f"({row['error']})"
    ratio = f", {row['p50'] / ours['p50']:.2f}x" if "p50" in ours else ""
    return f"{1e6 * row['p50']:,.1f}{ratio}"


def gain(op: str, card: str, rows: Sequence[Row]) -> str:
    """What kernels/README.md says of an op: share of the limit and speed-up over the fastest peer."""
    said = []
    for (name, case), everyone in sorted(times(rows).items()):
        ours = everyone.get("fastsft", {})
        if name != op or "p50" not in ours:
            continue
        peers = {
            who: row["p50"] for who, row in everyone.items() if row is not ours and "p50" in row
        }
        best = min(peers, key=peers.__getitem__, default="")
        ahead = f", {peers[best] / ours['p50']:.2f}x {best}" if best else ""
        said.append(f"{case}: {_share(ours)} of the limit{ahead}")
    return f"{'; '.join(said)} ({card})" if said else NOT_MEASURED
