"""What the compiler makes of the kernels: the suite fails on a spill as it does on a wrong gradient.

The report runs in a process of its own, since here kernels belong to the interpreter.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from bench import compiled

ROOT = Path(__file__).parent.parent.parent


def report(*args):
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    folders = [str(ROOT / "kernels"), str(Path(__file__).parent)]
    environment["PYTHONPATH"] = os.pathsep.join([*folders, environment.get("PYTHONPATH", "")])
    command = [sys.executable, "-m", "bench.static", *map(str, args)]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


def test_every_kernel_compiles_clean_for_sm_80_and_sm_90():
    done = report("--quick")
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]


@pytest.fixture(scope="module")
def toys_file(tmp_path_factory):
    out = tmp_path_factory.mktemp("static") / "toys.json"
    done = report("--cases", "static_toys", "--targets", "80,90", "--out", out)
    assert done.returncode == 1, done.stderr
    return out


@pytest.fixture(scope="module")
def toys(toys_file):
    return json.loads(toys_file.read_text())["rows"]


def failures(toys, case):
    return {row["capability"]: row["failures"] for row in toys if row["case"] == case}


def test_a_sound_kernel_passes_in_every_configuration(toys):
    rows = [row for row in toys if row["case"] == "sound"]
    assert {row["choice"] for row in rows} == {"", "toy_product=1"}
    assert not any(row["failures"] for row in rows)
    assert {row["capability"]: row["matrix"] for row in rows} == {80: "mma", 90: "wgmma"}
    assert all("128" in row["loads"] and 0 < row["blocks_per_sm"] <= 16 for row in rows)
    assert not any(failures(toys, "unfused").values())


@pytest.mark.parametrize(
    "case,said",
    [
        ("shared", "shared memory: "),
        ("spill", "spill: "),
        ("fused", "fused multiply-adds"),
        ("misspelt", "does not compile: "),
        ("killer", "the compiler ended the process"),
        ("unrecorded", "does not run on meta tensors: RuntimeError: reads a value"),
    ],
)
def test_a_defect_is_found_on_both_targets(toys, case, said):
    found = failures(toys, case)
    assert set(found) == {80, 90}
    for problems in found.values():
        assert any(said in problem for problem in problems), problems


def test_a_product_without_wgmma_is_found_on_sm_90_alone(toys):
    found = failures(toys, "without_wgmma")
    assert not found[80] and found[90] == ["no wgmma: a 64x64 bf16 product on sm_90 does without"]


def test_what_neither_failed_nor_changed_is_kept(toys, toys_file, tmp_path):
    file = tmp_path / "toys.json"
    old = json.loads(toys_file.read_text())
    changed = next(row for row in old["rows"] if row["case"] == "sound")
    changed["fingerprint"] = "of other sources"
    for row in old["rows"]:
        row["registers"] = -1
    file.write_text(json.dumps(old))
    done = report("--cases", "static_toys", "--targets", "80,90", "--keep", "--out", file)
    assert done.returncode == 1
    now = json.loads(file.read_text())["rows"]
    sound = sum(not row["failures"] for row in toys)
    assert f"{sound - 1} kernels are as they were" in done.stdout
    assert sum(row.get("registers") == -1 for row in now) == sound - 1
    assert [row | {"registers": 0} for row in now] == [row | {"registers": 0} for row in toys]


@pytest.mark.parametrize(
    "registers,shared,warps,capability,blocks",
    [
        (128, 0, 4, 90, 4),  # 65536 registers
        (129, 0, 4, 90, 3),  # rounded up to 136
        (255, 0, 8, 90, 1),
        (32, 100 << 10, 4, 90, 2),  # 228 KiB, and 1 KiB for each block
        (32, 50 << 10, 4, 86, 1),
        (32, 0, 4, 90, 16),  # 2048 threads
        (32, 0, 4, 86, 12),  # 1536 threads
        (16, 0, 1, 90, 32),
        (16, 0, 1, 86, 16),
    ],
)
def test_blocks_of_a_multiprocessor(registers, shared, warps, capability, blocks):
    facts = {"registers": registers, "shared": shared, "warps": warps}
    assert compiled.blocks_per_sm(facts, capability) == blocks


def test_an_unknown_card_is_taken_for_the_nearest_older_one():
    assert compiled.card(103) == compiled.CARDS[100] and compiled.card(75) == compiled.CARDS[80]
