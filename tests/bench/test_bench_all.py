"""Every benchmark in quick mode, as one command, on a CPU: a broken harness shows before a GPU is seen."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bench import all as bench_all
from bench import engine
from fastsft.model.block import Block

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    out = tmp_path_factory.mktemp("results")
    paths = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    command = [sys.executable, "-m", "bench.all", "--quick", "--limit", "900", "--out", str(out)]
    env = os.environ | {"PYTHONPATH": paths, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=env)
    ledgers = {p.stem: json.loads(p.read_text()) for p in out.glob("*/*.json")}
    return done, ledgers, out


def test_everything_runs(quick):
    done, _, out = quick
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    drawn = {p.name for p in out.glob("*/*.png")}
    assert {"tokens.png", "context.png", "curves.png"} <= drawn


def test_rows_carry_their_circumstances(quick):
    for name in ("engine", "data", "train", "context", "quality"):
        about = quick[1][name]["circumstances"]
        assert about["command"].startswith(f"python -m bench.{name} "), about["command"]
        assert {"card", "driver", "versions", "commit", "source", "when"} <= set(about)
        assert {"torch", "transformers", "trl"} <= set(about["versions"])


def test_ours_and_a_peer_are_measured_on_the_same_tokens(quick):
    rows = {r["who"]: r for r in quick[1]["train"]["rows"] if r["kind"] == "train"}
    assert not any("error" in row for row in rows.values()), rows
    ours, theirs = rows["fastsft"], rows["trl"]
    for name in ("tokens_a_step", "trained_a_step"):
        assert ours[name] == theirs[name] > 0
    assert ours["first_loss"] == pytest.approx(theirs["first_loss"], abs=2e-3)
    for row in (ours, theirs):
        assert row["p20"] <= row["p50"] <= row["p80"] and row["first_step_seconds"] > 0
        assert row["clock"] == "processor" and "mfu" not in row


def test_contexts_are_found(quick):
    rows = [r for r in quick[1]["context"]["rows"] if r["kind"] == "context"]
    assert {r["who"] for r in rows} == {"fastsft", "reference"}
    assert all(r["longest"] > 64 and r["limit"] for r in rows), rows


def test_curves_are_of_the_same_steps(quick):
    rows = quick[1]["quality"]["rows"]
    assert {len(r["losses"]) for r in rows} == {12}
    assert "agree" in quick[0].stdout


def test_the_engine_is_checked(quick):
    rows = {r["case"]: r for r in quick[1]["engine"]["rows"]}
    assert set(rows) == set(engine.CHECKS)
    assert not any(r["problem"] for r in rows.values()), rows
    assert all(0 <= r["error"] <= r["allowed"] for r in rows.values())


def test_an_engine_that_is_wrong_is_a_row_that_says_so(monkeypatch, capsys):
    def broken(device):
        raise RuntimeError("no kernel image")

    monkeypatch.setattr(engine, "CHECKS", {"a": lambda device: (0.5, 0.1), "b": broken})
    assert engine.main(["--quick"]) == 1
    said = capsys.readouterr().out
    assert "wrong" in said and "RuntimeError: no kernel image" in said


def test_the_checks_see_a_wrong_gradient(monkeypatch):
    """A tile too few, and a policy that gives other bits."""
    rows = Block._rows
    monkeypatch.setattr(Block, "_rows", lambda *given: list(rows(*given))[:-1])
    assert engine.run_check("tiles", torch.device("cpu"))["problem"]
    monkeypatch.undo()
    again = Block._mlp_again
    monkeypatch.setattr(Block, "_mlp_again", lambda *given: again(*given) * (1 + 2**-20))
    assert engine.run_check("policies", torch.device("cpu"))["problem"] == "wrong"


def test_every_command_on_a_card_gets_the_limit(monkeypatch):
    ran = {}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(
        bench_all, "_ran", lambda name, options: ran.update({name: options}) or True
    )
    assert bench_all.main(["--limit", "300"]) == 0
    assert list(ran) == [*bench_all.COMMANDS, "report"]
    for name in bench_all.COMMANDS:
        assert ran[name][:2] == ["--limit", "300.0"], name
