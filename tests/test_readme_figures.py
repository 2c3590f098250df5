"""The README shows what was measured, and nothing else."""

import json
import re

import pytest

from bench import report, training_tables

CARD = "NVIDIA Test"
ABOUT = {"card": "A CPU", "driver": "", "cores": 2, "versions": {"torch": "2", "trl": "1"}}
ABOUT |= {"commit": "abc"}


def trained(who, speed, **more):
    key = {"kind": "train", "model": "m", "rows": "alpaca", "method": "lora", "who": who}
    spread = {"p20": 0.9 * speed, "p50": speed, "p80": 1.1 * speed, "note": "as it ran"}
    numbers = {"tokens_per_second": speed, "trained_per_second": speed / 2, "mfu": 0.125}
    losses = {"first_loss": 7.0, "last_loss": 6.5, "first_step_seconds": 3.25}
    return key | spread | numbers | losses | more


CARD_ROWS = {
    "train": [
        {"kind": "rates", "flops": 1e15},
        trained(
            "fastsft",
            9000.0,
            peak_allocated_bytes=2**30,
            peak_reserved_bytes=3 * 2**29,
            predicted_bytes=2**31,
            busy_share=0.96,
            launches_a_step=1234.0,
        ),
        trained("trl", 4500.0),
        {k: v for k, v in trained("unsloth", 1.0).items() if k in ("kind", "model", "rows")}
        | {"method": "lora", "who": "unsloth", "error": "ImportError: none"},
    ],
    "context": [
        {"kind": "probe", "model": "m", "method": "qlora", "who": "fastsft", "budget": 8.0}
        | {"tokens": 1000, "fits": True, "peak_bytes": 2**32, "limit": "allocator"},
        {"kind": "context", "model": "m", "method": "qlora", "who": "fastsft", "budget": 8.0}
        | {"longest": 1000},
        {"kind": "context", "model": "m", "method": "qlora", "who": "trl", "budget": 24.0}
        | {"longest": 512, "error": "RuntimeError: no"},
    ],
    "quality": [
        {"kind": "curve", "model": "m", "method": "lora", "who": who, "seed": seed}
        | {"losses": [5.0 - 0.1 * i + shift for i in range(20)]}
        for who, seed, shift in (("fastsft", 0, 0), ("fastsft", 1, 0.01), ("trl", 0, 0.5))
    ],
}


@pytest.fixture
def results(tmp_path):
    """A folder of results with one card and a CPU."""
    about = ABOUT | {"card": CARD, "driver": "1"}
    (tmp_path / "nvidia-test").mkdir()
    for name, found in CARD_ROWS.items():
        text = json.dumps({"circumstances": about, "rows": found})
        (tmp_path / "nvidia-test" / f"{name}.json").write_text(text)
    (tmp_path / "cpu").mkdir()
    found = {"circumstances": ABOUT, "rows": [trained("fastsft", 700.0)]}
    (tmp_path / "cpu" / "train.json").write_text(json.dumps(found))
    return tmp_path


def line(text, *words):
    (found,) = [one for one in text.splitlines() if all(word in one for word in words)]
    return found


def test_the_readme_shows_the_rows_as_they_are():
    shown = report.BLOCK.search(report.README.read_text(encoding="utf-8"))
    assert shown and shown.group(0) == report.block(), "run: python -m bench.report"


def test_what_was_not_measured_says_so(tmp_path):
    said = report.block(tmp_path)
    for what in (
        "On a GPU",
        "Data preparation on a CPU",
        "Training on a CPU",
        "Loss curves on a CPU",
    ):
        assert what in said
    assert not re.search(r"\d", said), said
    said = report.training_block(tmp_path)
    assert "Whole trainers on a GPU: not measured." in said
    assert "bench.train: not measured" in said and "bench.quality: not measured" in said


def test_a_card_s_figures_come_before_a_cpu_s(results):
    said = report.block(results)
    assert said.index("### NVIDIA Test") < said.index("A CPU, 2 cores; torch 2, trl 1; commit abc.")
    assert "| fastsft | 9,000 | 8,100 to 9,900 | 1.0 GiB, 1.5 GiB | 1.00x |" in said
    assert "| trl | 4,500 | 4,050 to 4,950 | not measured | 2.00x |" in said
    assert "| unsloth | failed: ImportError: none |" in said
    assert "| fastsft | 700 | 630 to 770 | not measured | 1.00x |" in said
    assert "Loss curves on a CPU: not measured yet" in said  # on the CPU


def test_all_that_was_measured_of_a_trainer_is_in_the_long_table(results):
    said = report.training_block(results)
    ours = line(said, "| fastsft | 9,000")
    for figure in ("4,500", "3.2", "1.0 GiB", "1.5 GiB (2.0 GiB planned)", "96%", "12.5%", "1,234"):
        assert figure in ours, figure
    assert "7.000 to 6.500; as it ran" in ours
    assert "not measured" in line(said, "| trl | 4,500")


def test_contexts_and_curves_have_their_tables(results):
    said = report.training_block(results)
    assert "| longest context | trainer | 8 GB | 24 GB |" in said
    assert line(said, "| fastsft | 1,000") == "| m, qlora | fastsft | 1,000 | not measured |"
    assert "failed: RuntimeError: no, at least 512" in said
    assert "| m, lora | fastsft, trl | 0.5000 | 0.0100 | **no** |" in said


def test_pictures_are_drawn_of_what_there_is(results):
    said = report.training_block(results)
    report.draw(results)
    for name in ("tokens.png", "context.png", "curves.png"):
        assert (results / "nvidia-test" / name).read_bytes().startswith(b"\x89PNG")
        assert f"![](results/nvidia-test/{name})" in said
    assert (results / "cpu" / "tokens.png").exists()
    assert not (results / "cpu" / "curves.png").exists() and "cpu/curves.png" not in said


def test_memory_of_the_engine_shows_reserved_beside_allocated():
    key = {"kind": "memory", "model": "m", "method": "lora", "policy": "keep", "tokens": 16384}
    found = {"predicted_bytes": 20e9, "allocated_bytes": 18e9, "reserved_bytes": 21e9, "off": 0.05}
    said = training_tables.engine([key | found | {"tokens_per_second": 9.0}])
    assert "| predicted GB | allocated GB | reserved GB | off by |" in said
    assert "| keep | 20.00 | 18.00 | 21.00 | +5.0% | 9 |" in said
