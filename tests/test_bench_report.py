"""Tables, rooflines and the READMEs say what rows say, and "not measured" where there are none."""

import json
import re

import pytest

from bench import report, tables

CARD = "NVIDIA Test"


def timed(who, p50, **more):
    spread = {"p20": 0.9 * p50, "p50": p50, "p80": 1.1 * p50}
    rates = {"bytes": 8e6, "flops": 0, "unhidden": 0, "gb_per_s": 800.0, "tflop_per_s": 0.0}
    key = {"kind": "time", "op": "rope", "case": "8192", "who": who, "dtype": "bfloat16"}
    return key | spread | rates | {"share_of_limit": 1e-5 / p50} | more


ROWS = [
    {"kind": "rates", "bandwidth": 4e12, "flops": 8e14},
    timed("fastsft", 2e-5),
    timed("slow", 8e-5),
    timed("quick", 3e-5),
    {"kind": "time", "op": "rope", "case": "8192", "who": "gone", "error": "ImportError: gone"},
    timed("fastsft", 4e-3, op="linear", case="4096", flops=10**12, tflop_per_s=250.0),
    {
        "kind": "check",
        "op": "glu",
        "case": "small",
        "dtype": "float16",
        "choice": "glu=1",
        "problem": "rms error 1",
    },
]


@pytest.fixture
def results(tmp_path):
    """A results folder with one card."""
    folder = tmp_path / "nvidia-test"
    folder.mkdir()
    about = {"card": CARD, "driver": "1"}
    (folder / "kernels.json").write_text(json.dumps({"circumstances": about, "rows": ROWS}))
    return tmp_path


def test_the_readmes_show_the_rows_as_they_are():
    shown = report.BLOCK.search(report.BENCH_README.read_text(encoding="utf-8"))
    made = f"{report.kernels_block()}\n{report.training_block()}"
    assert shown and shown[0] == made, "run: python -m bench.report"
    text = report.KERNELS_README.read_text(encoding="utf-8")
    assert text == report.kernels_readme(text), "run: python -m bench.report"


def test_a_card_s_table(results):
    block = report.kernels_block(results)
    assert (
        "### NVIDIA Test" in block and "4.00 TB/s, 800 TFLOP/s, measured in the same run" in block
    )
    (rope,) = [line for line in block.splitlines() if line.startswith("| rope")]
    assert "| 20.0 (18.0 to 22.0) | 800 GB/s | 50% |" in rope
    assert "slow 80.0, 4.00x; quick 30.0, 1.50x; gone (ImportError: gone)" in rope
    assert "| 250 TFLOP/s |" in block and "**wrong** (float16, glu=1)" in block


def test_figures_come_from_rows_alone(results):
    """Every number in the table is one of a row's, rounded; without rows there is none."""
    (results / "nvidia-test" / "kernels.json").unlink()
    assert report.kernels_block(results) == "Kernels on a GPU: not measured.\n\n"
    readme = "| op | measured gain |\n|---|---|\n| rope, glu | 7x faster |\n"
    assert "| rope, glu | not measured |\n" in report.kernels_readme(readme, results)


def test_the_gain_is_over_the_fastest_peer(results):
    readme = (
        "| op | measured gain |\n|---|---|\n| `rope`, glu | old |\n| other | old |\n\nend | old |\n"
    )
    made = report.kernels_readme(readme, results)
    assert "| `rope`, glu | 8192: 50% of the limit, 1.50x quick (NVIDIA Test) |\n" in made
    assert "| other | not measured |\n\nend | old |\n" in made


def test_the_roofline_is_drawn(results, monkeypatch):
    pages = {"BENCH_README": "bench.md", "KERNELS_README": "kernels.md", "README": "readme.md"}
    for name, file in pages.items():
        (results / file).write_text("a\n<!-- results -->\nold\n<!-- /results -->\nb\n")
        monkeypatch.setattr(report, name, results / file)
    report.write(results)
    report.draw(results)
    assert (results / "nvidia-test" / "roofline.png").read_bytes().startswith(b"\x89PNG")
    assert re.search(r"a\n<!-- results -->\n### NVIDIA Test", (results / "bench.md").read_text())


def test_the_static_table(results):
    row = {"kernel": "_rope", "op": "rope", "case": "8192", "dtype": "bfloat16", "choice": ""}
    row |= {"capability": 90, "options": {"BM": 4}, "failures": []}
    facts = {"registers": 40, "shared": 2048, "blocks_per_sm": 8, "loads": {"128": 4, "32": 1}}
    other = row | {"capability": 80, "failures": ["does not compile"]}
    table = tables.static([row | facts | {"matrix": "wgmma"}, other])
    assert table.splitlines()[2] == (
        "| `_rope` | bfloat16 | BM=4 | **fails** | 40r 2K 8b wgmma 128 |"
    )
    (results / "static").mkdir()
    whole = {"circumstances": {}, "rows": [row | facts, other]}
    (results / "static" / "triton-3.9.json").write_text(json.dumps(whole))
    assert "2 kernels compiled, 1 with failures" in report.kernels_block(results)
