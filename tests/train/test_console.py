"""What reaches a file (plain lines) and what a terminal of a given width shows."""

import io
import re
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from fastsft.console import (
    RunConsole,
    RunSummary,
    _Status,
    clean,
    count,
    duration,
    size,
    sparkline,
)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def summary(**changed: Any) -> RunSummary:
    values: dict[str, Any] = dict(
        model="builtin:tiny", method="lora", engine="compat", engine_reason="the only one so far",
        device="cpu", dtype="fp32", trainable=41_943_040, parameters=8_030_261_248, rows=11_400,
        tokens=3_010_000, trained_tokens=1_204_000, total_steps=600, first_step=0,
        batch="64 examples a step", predicted_memory=9_800_000_000,
        output_dir=Path("runs/a-rather-long-folder-name/with/another/part/and/yet/another/one/x"),
        notes=["head: has a bias"],
    )  # fmt: skip
    return RunSummary(**{**values, **changed})


def record(step: int, **changed: Any) -> dict[str, Any]:
    values = dict(
        step=step, epoch=0.1, loss=2.5 / step, lr=2e-4, grad_norm=0.93, trained_tokens=400,
        total_tokens=1000, tokens_per_second=18_345.6, step_seconds=2.0,
        peak_memory_bytes=9_800_000_000, mfu=0.4, token_accuracy=0.5,
    )  # fmt: skip
    return {**values, **changed}


def drive(stream: io.StringIO, width: int | None = None) -> str:
    with RunConsole(stream, width) as console:
        with console.task("Tokenising", 10) as advance:
            advance(10)
        console.print("rows [bold]11[/bold]")
        console.warn("the step is too small to fill the card")
        console.summary(summary())
        console.samples("Before training", [("Hi [bold]you", "a\x1b[31mb\rc\nd"), ("Again", " ")])
        console.start(4)
        for step in range(1, 5):
            console.step(record(step))
        console.evaluation({"step": 4, "eval_loss": 1.25, "eval_perplexity": 3.49,
                            "eval_token_accuracy": 0.614}, best=True)  # fmt: skip
        console.finish("Done.", "fastsft chat " + "runs/long/" * 12)
    return stream.getvalue()


def test_a_file_gets_plain_lines() -> None:
    text = drive(io.StringIO())
    assert "\x1b" not in text and "\r" not in text
    lines = text.splitlines()
    assert "rows [bold]11[/bold]" in lines
    assert "warning: the step is too small to fill the card" in lines
    assert "model:   builtin:tiny (8.03B parameters)" in lines
    assert "method:  lora: 41.9M trained (0.52%)" in lines
    assert "engine:  compat: the only one so far" in lines
    assert "data:    11,400 rows, 3.01M tokens, 40% trained" in lines
    assert "memory:  9.8 GB predicted" in lines and "note:    head: has a bias" in lines
    assert f"output:  {summary().output_dir}" in lines
    assert sum(line.startswith("step ") and "/4" in line for line in lines) == 4
    assert (
        "step 1/4  loss 2.5000  tokens/s 18,346  memory 9.8 GB  lr 2.00e-04  grad norm 0.93"
        "  0:06 left" in lines
    )
    assert "step 4: evaluation loss 1.2500  perplexity 3.49  accuracy 61.4%  (best so far)" in lines
    assert "  > Hi [bold]you" in lines and "    a�[31mb�c" in lines and "    (nothing)" in lines
    assert lines[-1] == "fastsft chat " + "runs/long/" * 12  # one line, however long


def test_a_terminal_gets_a_live_display(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm-256color")
    text = drive(Terminal(), width=80)
    assert "\x1b[" in text and "━" in text
    assert "\x1b[31mb" not in text and "\rc" not in text  # nothing a model said became a code
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text)
    assert plain.rstrip().splitlines()[-1] == "fastsft chat " + "runs/long/" * 12


@pytest.mark.parametrize("width", [10, 24, 40, 60, 80, 120, 200])
def test_the_status_fits_any_width(width: int) -> None:
    status = _Status(100_000, 0)
    status.eval_loss = 1.5
    for step in range(1, 300):
        status.update(record(step))
    out = io.StringIO()
    Console(file=out, width=width, color_system=None).print(status)
    lines = out.getvalue().splitlines()
    assert all(len(line) <= width for line in lines)
    assert len(lines) == (3 if width > 40 else 2)
    if width >= 24:
        assert "299/100000" in lines[0] and "loss" in lines[1]
    if width >= 80:
        for word in ("left", "eval", "tokens/s", "memory", "lr"):
            assert word in lines[0] + lines[1]


def test_eta_follows_the_pace_after_the_first_record(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr("fastsft.console.time.monotonic", lambda: now[0])
    status = _Status(total_steps=110, first_step=50)
    assert status.eta() is None
    now[0] = 400.0  # a slow first step
    status.update(record(51))
    assert status.eta() == 2.0 * 59  # by its own step time so far
    now[0] = 430.0
    status.update(record(61))
    assert status.eta() == pytest.approx(3.0 * 49)


def test_a_loss_that_is_not_finite_is_said() -> None:
    out = io.StringIO()
    console = RunConsole(out)
    console.start(9)
    console.step(record(1, loss=float("nan"), grad_norm=None))
    assert "loss not finite" in out.getvalue() and "grad norm not finite" in out.getvalue()


def test_an_ascii_stream_does_not_end_the_run() -> None:
    raw = io.BytesIO()
    console = RunConsole(io.TextIOWrapper(raw, encoding="ascii"))
    console.print("naïve → ok")
    console.rich.file.flush()
    assert raw.getvalue() == b"na?ve ? ok\n"


def test_helpers() -> None:
    assert clean("a\tb\x07\x9b\n") == "a   b��\n"
    assert sparkline([3, 2, 1], 10) == "█▄▁" or sparkline([3, 2, 1], 10) == "█▅▁"
    assert len(sparkline(list(range(1000)), 37)) == 37 and sparkline([1, 1], 5) == "▁▁"
    assert [count(n) for n in (999, 9_999, 12_345, 3_010_000, 8_030_261_248)] == [
        "999",
        "9,999",
        "12.3k",
        "3.01M",
        "8.03B",
    ]
    assert (size(1_500_000), size(24_000_000_000)) == ("1.5 MB", "24 GB")
    assert (duration(7), duration(754), duration(11_045)) == ("0:07", "12:34", "3:04:05")
