"""The roofline of a card: every measured op under the limits that the same run measured."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from bench.limits import Rates
from bench.tables import Row, times


def plot(card: str, rows: Sequence[Row], rates: Rates, path: Path) -> None:
    """Left: operations a second over operations a byte, for ops with matrix products. Right: the
    share of its limit that each op reaches, ours and the fastest peer's.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    shares = []
    figure, (roof, bars) = pyplot.subplots(1, 2, figsize=(13, 7), layout="constrained")
    for (op, case), everyone in sorted(times(rows).items(), reverse=True):
        ours = everyone.get("fastsft", {})
        if "share_of_limit" not in ours:
            continue
        limit = ours["p50"] * ours["share_of_limit"]
        peers = [row["p50"] for row in everyone.values() if row is not ours and "p50" in row]
        shares.append((f"{op} {case}", ours["share_of_limit"], limit / min(peers) if peers else 0))
        if ours["flops"]:
            intensity = ours["flops"] / (ours["bytes"] + ours["unhidden"])
            roof.plot(intensity, ours["tflop_per_s"], "o", label=f"{op} {case}")
    intensities = [2.0**i for i in range(-2, 15)]
    best = [min(x * rates.bandwidth, rates.flops) / 1e12 for x in intensities]
    roof.loglog(intensities, best, "k-", lw=1)
    roof.set(xlabel="operations / byte", ylabel="TFLOP/s", title=f"{card}: {rates.source}")
    if roof.get_legend_handles_labels()[0]:
        roof.legend(fontsize=7)
    names, ours_shares, peer_shares = zip(*shares, strict=True) if shares else ((), (), ())
    at = range(len(names))
    bars.barh([i + 0.2 for i in at], ours_shares, 0.4, label="fastsft")
    bars.barh([i - 0.2 for i in at], peer_shares, 0.4, label="fastest peer")
    bars.set_yticks(list(at), names, fontsize=7)
    bars.axvline(1, color="k", lw=1)
    bars.set(xlabel="share of the limit")
    bars.legend(fontsize=7)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
