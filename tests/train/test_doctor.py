"""Every cause of an unusable GPU in one sentence, never a silent CPU run, and the op self-check."""

import io
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from fastsft import device as dv
from fastsft import doctor as dr
from fastsft import selfcheck
from fastsft.console import RunConsole
from fastsft.errors import UserError

NO_GPU = dv.Facts("2.13.0", "13.0", torch_sees_gpu=False)
GPU = replace(NO_GPU, driver="580.65.06", gpus=("NVIDIA L4",), device_files=True)


def test_no_gpu_or_a_working_one_is_no_problem() -> None:
    assert dv.why_no_gpu(NO_GPU) is None
    assert dv.why_no_gpu(replace(GPU, torch_sees_gpu=True)) is None


@pytest.mark.parametrize("visible", ["", "-1"])
def test_choosing_the_cpu_is_respected(visible: str) -> None:
    assert dv.why_no_gpu(replace(GPU, visible=visible)) is None


@pytest.mark.parametrize(
    ("facts", "words"),
    [
        (replace(GPU, torch_cuda=None), "it is a build without CUDA"),
        (
            replace(GPU, driver="535.54.03"),
            "the driver 535.54.03 is too old for its CUDA 13.0, which needs 580 or newer",
        ),
        (replace(GPU, driver="510.1", torch_cuda="12.6"), "which needs 525 or newer"),
        (replace(GPU, device_files=False), "a container must be given the GPU"),
        (replace(GPU, visible="3"), "CUDA_VISIBLE_DEVICES=3 names no GPU it has"),
        (replace(GPU, torch_says="CUDA unknown error"), "CUDA unknown error"),
        (GPU, "without a reason given"),
    ],
)
def test_each_cause_is_one_sentence(facts: dv.Facts, words: str) -> None:
    problem = dv.why_no_gpu(facts)
    assert problem is not None and words in problem
    assert problem.startswith("this machine has NVIDIA L4, but torch 2.13.0 cannot use it: ")
    assert problem.endswith('To train on the CPU all the same, set CUDA_VISIBLE_DEVICES="".')
    assert "\n" not in problem


def test_training_never_falls_back_silently(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(dv, "gather", lambda: replace(GPU, torch_cuda=None))
    with pytest.raises(UserError, match="build without CUDA"):
        dv.check_device()
    monkeypatch.setattr(dv, "gather", lambda: NO_GPU)
    assert dv.check_device() == torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert dv.check_device() == torch.device("cuda", 0)


def fake_program(folder: Path, name: str, text: str) -> None:
    (folder / name).write_text(f"#!/bin/sh\n{text}\n")
    (folder / name).chmod(0o755)


def test_nvidia_smi_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}/bin")
    fake_program(tmp_path, "nvidia-smi", "echo '535.54.03, NVIDIA L4'; echo '535.54.03, NVIDIA T4'")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    facts = dv.gather()
    assert (facts.driver, facts.gpus) == ("535.54.03", ("NVIDIA L4", "NVIDIA T4"))
    assert facts.visible == "0"
    fake_program(tmp_path, "nvidia-smi", "echo 'NVIDIA-SMI has failed'; exit 9")
    if not Path("/proc/driver/nvidia").exists():
        assert dv.gather().gpus == ()


def test_what_triton_lacks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "needs a C compiler" in (dr.missing_for_triton() or "")
    fake_program(tmp_path, "gcc", "")
    monkeypatch.setattr(dr.sysconfig, "get_paths", lambda: {"include": str(tmp_path)})
    lacks = dr.missing_for_triton() or ""
    assert f"{tmp_path}/Python.h is missing" in lacks and "-dev" in lacks
    (tmp_path / "Python.h").write_text("")
    assert dr.missing_for_triton() is None
    monkeypatch.setenv("CC", "no-such-compiler")
    assert "needs a C compiler" in (dr.missing_for_triton() or "")


def test_every_public_op_is_checked_and_right() -> None:
    import fastsft_kernels

    checks = selfcheck.check_ops(torch.device("cpu"))
    not_ops = {"DropoutKey", "NF4Weight", "lora_dropout_mask"}
    assert {c.op for c in checks} == set(fastsft_kernels.__all__) - not_ops
    for check in checks:
        assert check.ok and check.error < 1e-5, check
        assert check.backend == "reference" and check.why


def run_doctor() -> tuple[int, str]:
    out = io.StringIO()
    return dr.doctor(RunConsole(out)), out.getvalue()


def test_the_report(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dr, "gather", lambda: NO_GPU)
    code, text = run_doctor()
    assert code == 0 and text.splitlines()[-1] == "fastsft train"
    for words in (f"torch {torch.__version__}", "no NVIDIA GPU", "lora_linear", "reference"):
        assert words in text


def test_a_wrong_op_and_an_unusable_gpu_are_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dr, "gather", lambda: replace(GPU, torch_cuda=None))
    exact = selfcheck.fk.swiglu

    def wrong(gate: Any, up: Any) -> Any:
        return exact(gate, up) * (1 + 1e-2 * (gate.dtype == torch.float32))

    monkeypatch.setattr(selfcheck.fk, "swiglu", wrong)
    code, text = run_doctor()
    assert code == 2 and "WRONG" in text
    assert "swiglu is wrong on this machine: error 1.0e-02" in text
    assert "build without CUDA" in text and "All well" not in text
