"""What must not move a run: packing, accumulation, recomputation. Loss and gradient norm over whole runs.

Equal mathematics in another order of summation differs by rounding, and the steps carry it on: fp32 shows
that a run stays the same to the eye, float64 that the mathematics is the same, to twelve digits.
"""

from __future__ import annotations

import json
import os
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import lines, product, run, same, series, settings

from fastsft import trainer
from fastsft.config import make_config
from fastsft.console import RunConsole
from fastsft.model.fast import FastEngine

STEPS = 24
GOLDEN = Path(__file__).parents[1] / "golden" / "losses"
DROPOUT = {"lora": {"r": 4, "dropout": 0.25}}
METHODS: dict[str, dict[str, Any]] = {
    "lora": {"method": "lora", "learning_rate": 7e-4, **DROPOUT},
    "qlora": {"method": "qlora", "learning_rate": 7e-4, **DROPOUT},
    "compat": {"method": "lora", "engine": "compat", "learning_rate": 7e-4, **DROPOUT},
    "full": {"method": "full", "learning_rate": 5e-4, "weight_decay": 0.01},
    "compat-full": {
        "method": "full",
        "engine": "compat",
        "learning_rate": 5e-4,
        "weight_decay": 0.01,
    },
}
PACKED, ALONE = {"micro_batch_tokens": 4096}, {"micro_batch_tokens": 1}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """With `even.jsonl`, whose rows all have the same number of tokens."""
    folder = tmp_path_factory.mktemp("trajectories")
    rows = [
        {"instruction": f"{i * 37 % 997:03d}", "output": f"{i * 101 % 9973:04d}{i * 7 % 89:02d}"}
        for i in range(40)
    ]
    (folder / "even.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def in_float64(place: Path, name: str, monkeypatch: pytest.MonkeyPatch, **keys: Any) -> Path:
    """The trainer's own loop over a model cast to float64; no config has that dtype. No checkpoints."""
    monkeypatch.setenv("FASTSFT_CACHE", str(place / "cache"))
    monkeypatch.setattr(trainer, "_save", lambda run: None)
    config = make_config(settings(place, **keys))
    folder = place / name
    folder.mkdir()
    with RunConsole() as console:
        started = trainer.set_up(config, folder, None, console, torch.device("cpu"), name)
        _widen(started.built)
        assert not trainer.loop(started, threading.Event())
        assert {p.dtype for _, p in started.built.named_parameters()} == {torch.float64}
        started.log.close()
    return folder


def _widen(built: Any) -> None:
    """To float64, the fast engine over the widened weights."""
    built.model.double()
    if isinstance(built.engine, FastEngine):
        built.engine = FastEngine(built.model, built.engine.context, plan=built.engine.plan)


def counting(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of micro-batches of every step taken from here on."""
    counts: list[int] = []
    take = trainer._step

    def spy(run_: Any, step: Any) -> None:
        counts.append(len(step.batches))
        take(run_, step)

    monkeypatch.setattr(trainer, "_step", spy)
    return counts


def assert_close(first: Path, second: Path, tolerance: float) -> None:
    for key in ("loss", "grad_norm", "eval_loss"):
        a, b = series(first, key), series(second, key)
        assert len(a) == len(b) and (key == "eval_loss" or len(a) == STEPS)
        assert a == pytest.approx(b, rel=tolerance, abs=0), key
    exact = ("step", "lr", "trained_tokens", "total_tokens", "epoch")
    for x, y in zip(lines(first), lines(second), strict=True):
        assert all(x.get(k) == y.get(k) for k in exact)


def falls(folder: Path) -> bool:
    losses = series(folder)
    return losses[-1] < losses[0] - 0.1


@pytest.mark.parametrize("method", METHODS)
def test_packed_is_unpacked_in_fp32(place, monkeypatch, method):
    counts = counting(monkeypatch)
    keys = {**METHODS[method], "max_steps": STEPS, "batch_size": 6, "val_size": 4}
    packed = run(place, **keys, **PACKED).output_dir
    unpacked = run(place, **keys, **ALONE).output_dir
    assert set(counts[:STEPS]) == {1} and min(counts[STEPS:]) >= 3
    assert falls(packed)
    assert_close(packed, unpacked, 1e-5)


@pytest.mark.parametrize("method", ["lora", "full"])
def test_packed_is_unpacked_in_float64(place, monkeypatch, method):
    keys = {**METHODS[method], "max_steps": STEPS, "batch_size": 6}
    packed = in_float64(place, f"packed-{method}", monkeypatch, **keys, **PACKED)
    unpacked = in_float64(place, f"alone-{method}", monkeypatch, **keys, **ALONE)
    assert falls(packed)
    assert_close(packed, unpacked, 1e-12)


@pytest.mark.parametrize("method", ["lora", "full"])
def test_eight_micro_batches_of_one_are_one_of_eight(place, monkeypatch, method):
    counts = counting(monkeypatch)
    keys = {
        **METHODS[method],
        "max_steps": STEPS,
        "batch_size": 8,
        "data": str(place / "even.jsonl"),
    }
    one = run(place, **keys, **PACKED).output_dir
    eight = run(place, **keys, **ALONE).output_dir
    assert counts == [1] * STEPS + [8] * STEPS
    assert falls(one)
    assert_close(one, eight, 1e-5)
    monkeypatch.undo()
    one = in_float64(place, f"one-{method}", monkeypatch, **keys, **PACKED)
    eight = in_float64(place, f"eight-{method}", monkeypatch, **keys, **ALONE)
    assert_close(one, eight, 1e-12)


@pytest.mark.parametrize("method", METHODS)
def test_recomputing_changes_no_bit(place, method):
    keys = {**METHODS[method], "max_steps": STEPS, "micro_batch_tokens": 100}
    kept = run(place, **keys, activations="keep").output_dir
    assert falls(kept)
    policies = ["recompute_block"]
    policies += [] if "compat" in method else ["recompute_mlp", "offload"]
    for policy in policies:
        again = run(place, **keys, activations=policy).output_dir
        assert lines(kept) == lines(again)
        assert same(product(kept), product(again))


@pytest.mark.parametrize("method", METHODS)
def test_golden_losses(place, method):
    """A refactoring leaves them; FASTSFT_UPDATE_GOLDEN=1 writes them anew after a change that is meant."""
    folder = run(place, **METHODS[method], max_steps=STEPS, val_size=4, eval_steps=8).output_dir
    found = [
        f"{r['step']} {'eval ' if 'eval_loss' in r else ''}{r.get('loss', r.get('eval_loss')):.9g}"
        for r in lines(folder)
    ]
    golden = GOLDEN / f"{method}.txt"
    if os.environ.get("FASTSFT_UPDATE_GOLDEN"):
        golden.parent.mkdir(exist_ok=True)
        golden.write_text("\n".join(found) + "\n")
    expected = golden.read_text().splitlines()
    assert [line.split()[:-1] for line in found] == [line.split()[:-1] for line in expected]
    values = [[float(line.split()[-1]) for line in each] for each in (found, expected)]
    assert values[0] == pytest.approx(values[1], rel=1e-5)
