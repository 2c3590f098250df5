"""What is compiled ahead is what a launch looks for, and what was not is counted."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")


def run_stub(cache, *left_out):
    environment = os.environ | {"TRITON_CACHE_DIR": str(cache)}
    environment.pop("TRITON_INTERPRET", None)
    script = Path(__file__).with_name("precompile_stub.py")
    done = subprocess.run(
        [sys.executable, str(script), *left_out], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_after_it_nothing_compiles_and_what_is_left_out_is_counted(tmp_path):
    found = run_stub(tmp_path / "a")
    assert found["run"] == found["launches"] == 7
    assert len(found["recipes"]) == 5  # sizes and addresses divisible by 16 or not
    assert found["compiled"] == len(found["recipes"]), found["problems"]
    # Triton 3.6 links a launcher in C against libcuda, which a machine without a GPU lacks.
    assert all(problem.startswith("launcher of") for problem in found["problems"])
    assert found["misses"] == []

    found = run_stub(tmp_path / "b", "3")
    assert found["misses"] == found["recipes"][3:4]
    assert found["compiled"] == len(found["recipes"]) - 1
