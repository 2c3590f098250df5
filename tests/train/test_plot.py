"""loss.png from metrics.jsonl: what is drawn, and the smoothing against its definition."""

import json
from pathlib import Path

import pytest

from fastsft.plot import _limits, plot_loss, smoothed


def write(path: Path, records: list[dict[str, float | None]]) -> Path:
    path.write_text("".join(json.dumps(r) + "\n" for r in records))
    return path


def test_both_curves_in_their_colours(tmp_path: Path) -> None:
    from matplotlib.image import imread

    records: list[dict[str, float | None]] = [{"step": s, "loss": 4 / s} for s in range(1, 50)]
    records += [{"step": s, "eval_loss": 4.2 / s} for s in (10, 20, 30, 40)]
    png = tmp_path / "loss.png"
    assert plot_loss(write(tmp_path / "m.jsonl", records), png, title="a run")
    image = (imread(png)[..., :3] * 255).round().astype(int)
    assert image.shape == (675, 1200, 3)
    for colour in ((0x25, 0x63, 0xEB), (0xEA, 0x58, 0x0C)):
        assert (abs(image - colour).sum(-1) < 12).sum() > 500, colour
    assert [p.name for p in tmp_path.glob("*.png*")] == ["loss.png"]


@pytest.mark.parametrize("records", [[], [{"step": 1, "loss": None}], [{"step": 1}]])
def test_nothing_to_draw(tmp_path: Path, records: list[dict[str, float | None]]) -> None:
    assert not plot_loss(write(tmp_path / "m.jsonl", records), tmp_path / "loss.png")
    assert not (tmp_path / "loss.png").exists()
    assert not plot_loss(tmp_path / "none.jsonl", tmp_path / "loss.png")


@pytest.mark.parametrize("records", [[{"step": 1, "loss": 2.0}], [{"step": 5, "eval_loss": 2.0}]])
def test_a_single_point_is_drawn(tmp_path: Path, records: list[dict[str, float | None]]) -> None:
    assert plot_loss(write(tmp_path / "m.jsonl", records), tmp_path / "loss.png")


def test_smoothing_is_the_two_sided_weighted_mean() -> None:
    values = [5.0, 1.0, 4.0, 2.0, 8.0]
    keep = 1 - 1 / 3
    for i, got in enumerate(smoothed(values, 3.0)):
        weights = [keep ** abs(i - j) for j in range(len(values))]
        expected = sum(w * v for w, v in zip(weights, values, strict=True)) / sum(weights)
        assert got == pytest.approx(expected)
    assert smoothed(values, 1.0) == values
    straight = [float(i) for i in range(201)]
    assert smoothed(straight, 10.0)[100] == pytest.approx(100.0)  # no lag


def test_the_axis_shows_the_course_not_the_spike() -> None:
    losses = [2.0 + 0.001 * i for i in range(400)]
    assert _limits([90.0, *losses], [2.5])[1] < 3
    assert _limits([90.0, 2.0, 2.1], [])[1] > 90  # few points: all of them
    assert _limits([2.0, 2.1], [3.0])[1] > 3.0
