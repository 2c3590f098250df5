"""Which configurations a card runs: the fastest of those `bench.gpu --search` timed.

    python -m bench.choices        rewrites fastsft_kernels/choices.json from the rows

A name (of `launch.pinned` or `launch.variant`) is shared by all shapes that use it, so a candidate
is judged by the geometric mean of its times over all cases, against the first candidate's. Less
than 2 % is noise and changes nothing.
"""

from __future__ import annotations

import json
import math
import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any

from bench import rows

RESULTS = rows.ROOT / "bench" / "results"
CHOICES = rows.ROOT / "kernels" / "fastsft_kernels" / "choices.json"
NOISE = math.log(0.98)


def winners(found: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Name -> the candidate to take, of the names whose first candidate is not the fastest."""
    searched = [row for row in found if row["kind"] == "search" and "p50" in row]
    first = {(row["op"], row["case"]): row["p50"] for row in searched if not row["name"]}
    gains: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for row in searched:
        if row["name"]:
            gain = math.log(row["p50"] / first[row["op"], row["case"]])
            gains[row["name"]][json.dumps(row["candidate"])].append(gain)
    chosen = {}
    for name, candidates in sorted(gains.items()):
        best = min(candidates, key=lambda c: statistics.mean(candidates[c]))
        if statistics.mean(candidates[best]) < NOISE:
            chosen[name] = json.loads(best)
    return chosen


def text() -> str:
    """What choices.json must hold: card -> name -> candidate, from all rows there are."""
    files = [rows.load(path) for path in sorted(RESULTS.glob("*/kernels.json"))]
    chosen = {about["card"]: winners(found) for about, found in files if about["driver"]}
    return json.dumps({card: names for card, names in chosen.items() if names}, indent=1) + "\n"


def write() -> None:
    CHOICES.write_text(text(), encoding="utf-8")


if __name__ == "__main__":
    write()
