"""Loading for QLoRA holds the quantised layers and about one tensor, never the checkpoint."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_host_memory_while_quantising(tmp_path):
    """Half the file would be twice what is allowed. 2.1 GB (17 layers of 2048) took 534 MB for the
    layers and 123 MB beside them at the peak; the promise is one tensor (34 MB) and 300 MB."""
    paths = [HERE.parents[1], HERE.parents[1] / "kernels"]
    env = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, paths))}
    script = [sys.executable, str(HERE / "loading_peak.py"), str(tmp_path)]
    subprocess.run([*script, "4", "1024"], check=True, env=env, capture_output=True)
    done = subprocess.run(script, check=True, env=env, capture_output=True, text=True)
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["file"] > 120e6 and found["quantised"] < 0.3 * found["file"]
    assert found["peak"] <= found["quantised"] + found["largest"] + 45e6, found
