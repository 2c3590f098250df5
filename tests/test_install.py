"""tools/install.sh says in one sentence what a machine lacks, before pip prints a page about it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def install(tmp_path, **environment):
    done = subprocess.run(
        ["sh", str(ROOT / "tools" / "install.sh"), str(tmp_path / "venv"), "."],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, **environment},
    )
    assert not (tmp_path / "venv").exists()
    return done.returncode, done.stderr.strip()


def fake_python(tmp_path, script):
    path = tmp_path / "python"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return str(path)


def test_no_python(tmp_path):
    code, message = install(tmp_path, PYTHON="python-that-is-not-there")
    assert code == 2
    assert message == (
        "fastsft: no python-that-is-not-there here; install Python 3.11 or later, "
        "or set PYTHON=/path/to/python"
    )


def test_old_python(tmp_path):
    python = fake_python(
        tmp_path, 'if [ "$1" = --version ]; then echo Python 3.9.18; else exit 1; fi'
    )
    code, message = install(tmp_path, PYTHON=python)
    assert code == 2
    assert message.startswith("fastsft: Python 3.9.18 is too old; Python 3.11 or later is needed")


def test_no_venv_module(tmp_path):
    python = fake_python(tmp_path, 'case "$2" in *ensurepip*) exit 1;; esac; exit 0')
    code, message = install(tmp_path, PYTHON=python)
    assert code == 2 and "no venv module" in message and "python3-venv" in message


def test_system_torch_that_is_not_there(tmp_path):
    python = fake_python(
        tmp_path, f'case "$2" in *torch*) exit 1;; esac; exec {sys.executable} "$@"'
    )
    code, message = install(tmp_path, PYTHON=python, TORCH="system")
    assert code == 2 and "TORCH=system" in message and "no torch" in message


@pytest.mark.parametrize("target", ["train", "test", "bench"])
def test_make_targets_exist(target):
    done = subprocess.run(
        ["make", "-n", "-W", "pyproject.toml", target], capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == 0 and "install.sh" in done.stdout
