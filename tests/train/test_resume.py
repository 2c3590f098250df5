"""Interrupted and resumed equals uninterrupted, bit for bit; and what a resume refuses."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from runs import (
    killed_at,
    lines,
    product,
    run,
    run_quietly,
    same,
    series,
    settings,
    write_rows,
)

from fastsft import cli, trainer
from fastsft.checkpoint import list_checkpoints, newest_whole
from fastsft.errors import UserError

KINDS: dict[str, dict[str, Any]] = {
    "lora": {"lora": {"r": 4, "dropout": 0.3}, "val_size": 4, "eval_steps": 3},
    "full": {"method": "full", "learning_rate": 1e-3, "weight_decay": 0.1},
    "stream": {"streaming": True, "lora": {"r": 4, "dropout": 0.3}},
    # Whole modules in another order than the model's: their moments must find them again.
    "whole": {
        "lora": {"r": 2, "modules_to_save": ["lm_head", "embed_tokens"]},
        "batch_tokens": 200,
    },
}
STEPS = 8


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tmp_path_factory.mktemp("resume")


@pytest.fixture(scope="module")
def whole(place):
    """The uninterrupted run of each kind, made once."""
    made: dict[str, Path] = {}

    def of(kind: str, steps: int = STEPS, **keys: Any) -> Path:
        name = f"{kind}-{steps}"
        if name not in made:
            keys = {**KINDS[kind], **keys, "output_dir": name}
            made[name] = run(place, max_steps=steps, **keys).output_dir
        return made[name]

    return of


def last_state(folder: Path) -> dict[str, Any]:
    """Everything the newest checkpoint carries beyond the weights, without the clock."""
    checkpoint = newest_whole(folder)
    assert checkpoint is not None
    course = {k: v for k, v in checkpoint.state["course"].items() if k != "seconds"}
    return {"step": checkpoint.step, "course": course, **checkpoint.tensors()}


def assert_same_run(found: Path, expected: Path) -> None:
    assert lines(found) == lines(expected)
    assert same(product(found), product(expected))
    assert same(last_state(found), last_state(expected))


def interrupt_at(monkeypatch: pytest.MonkeyPatch, step: int, number: int) -> None:
    """Send this process a signal once `step` has been reported."""
    report = trainer.RunConsole.step

    def spy(self: Any, record: dict[str, Any]) -> None:
        report(self, record)
        if record["step"] == step:
            os.kill(os.getpid(), number)

    monkeypatch.setattr(trainer.RunConsole, "step", spy)


@pytest.mark.parametrize("kind", KINDS)
def test_a_signal_then_resume_is_the_uninterrupted_run(place, whole, kind, monkeypatch):
    with monkeypatch.context() as patch:
        interrupt_at(patch, 4, signal.SIGTERM if kind == "full" else signal.SIGINT)
        keys = {**KINDS[kind], "max_steps": STEPS, "output_dir": f"{kind}-cut"}
        left = run(place, **keys)
    assert left.interrupted and 4 <= left.steps <= 6
    assert not (left.output_dir / "summary.json").exists()
    assert list_checkpoints(left.output_dir)[-1].name == f"step-{left.steps:06d}"
    again = run(place, **keys, resume=f"{kind}-cut")
    assert not again.interrupted
    assert_same_run(again.output_dir, whole(kind))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_with_130_and_says_how_to_go_on(place, number, monkeypatch, capsys):
    monkeypatch.chdir(place)
    monkeypatch.setenv("FASTSFT_CACHE", str(place / "cache"))
    before = signal.getsignal(number)
    name = f"said-{number.name}"
    config = place / f"{name}.yaml"
    config.write_text(yaml.safe_dump(settings(place, max_steps=STEPS, save_steps=1000)))
    with monkeypatch.context() as patch:
        interrupt_at(patch, 3, number)
        assert cli.main(["train", str(config)]) == 130
    assert signal.getsignal(number) == before
    said = capsys.readouterr().out.strip().splitlines()
    assert any("finishing this step" in line for line in said)
    assert said[-1].strip() == f"fastsft train runs/{name}/config.yaml resume=runs/{name}"
    assert cli.main(said[-1].split()[1:]) == 0  # the command it names goes on
    assert (place / "runs" / name / "summary.json").exists()


def test_a_signal_during_an_evaluation_is_not_lost(place, whole, monkeypatch):
    """It comes when saving has been decided against; the run ends with a checkpoint all the same."""
    evaluate = trainer._evaluate

    def spy(run_: Any, step: int) -> bool:
        better = evaluate(run_, step)
        if step == 6:
            os.kill(os.getpid(), signal.SIGINT)
            return False
        return better

    keys = {**KINDS["lora"], "max_steps": STEPS, "output_dir": "evaluating"}
    with monkeypatch.context() as patch:
        patch.setattr(trainer, "_evaluate", spy)
        left = run(place, **keys)
    assert left.interrupted
    assert list_checkpoints(left.output_dir)[-1].name == f"step-{left.steps:06d}"


def test_stopped_early_and_killed_before_the_product_stops_again(place, monkeypatch):
    keys = {"eval_steps": 1, "early_stopping_patience": 2, "learning_rate": 0.5, "max_steps": 40}
    keys |= {"val_size": 6, "lr_scheduler": "constant", "save_steps": 1}
    first = run(place, **keys, output_dir="patience")
    with monkeypatch.context() as patch:
        patch.setattr(trainer, "finish", _die)
        with pytest.raises(KeyboardInterrupt):
            run(place, **keys, output_dir="patience-cut")
    again = run(place, **keys, output_dir="patience-cut", resume="auto")
    assert again.steps == first.steps < 40
    assert_same_run(again.output_dir, first.output_dir)


def _die(*_: Any) -> Any:
    raise KeyboardInterrupt


def test_killed_after_the_last_step_the_product_is_still_made(place, whole, monkeypatch):
    keys = {**KINDS["lora"], "max_steps": STEPS, "output_dir": "unfinished"}
    with monkeypatch.context() as patch:
        patch.setattr(trainer, "finish", _die)
        with pytest.raises(KeyboardInterrupt):
            run(place, **keys)
    assert_same_run(run(place, **keys, resume="auto").output_dir, whole("lora"))
    with pytest.raises(UserError, match="nothing is left to train"):
        run(place, **keys, resume="auto")


# --- what may change, and what may not --------------------------------------------------------------


CHANGES: dict[str, dict[str, Any]] = {
    "learning_rate was 0.01 and is 0.02": {"learning_rate": 0.02},
    "lora.dropout was 0.3 and is 0.2": {"lora": {"r": 4, "dropout": 0.2}},
    "lora.r was 4 and is 8": {"lora": {"r": 8, "dropout": 0.3}},
    "method was 'lora' and is 'full'": {"method": "full"},
    "seed was 0 and is 1": {"seed": 1},
    "batch_size was 4 and is None": {"batch_tokens": 100, "batch_size": None},
    "micro_batch_tokens was 'auto' and is 64": {"micro_batch_tokens": 64},
    "data.0.path was": {"data": "other.jsonl"},
    "streaming was False and is True": {"streaming": True, "val_size": 0},
}


@pytest.mark.parametrize("message", CHANGES)
def test_a_changed_key_is_named(place, whole, message):
    write_rows(place / "other.jsonl", 9)
    folder = whole("lora")
    before = sorted(p.name for p in folder.rglob("*"))
    keys = {**KINDS["lora"], "max_steps": STEPS + 2, **CHANGES[message]}
    if keys.get("method") == "full":
        del keys["lora"]
    with pytest.raises(
        UserError, match="a run goes on only with the settings it began with"
    ) as error:
        run(place, **keys, resume=str(folder))
    assert message in str(error.value)
    assert sorted(p.name for p in folder.rglob("*")) == before


def test_changed_data_is_noticed(place):
    """The path is the same and so is the config; what is in the file is not."""
    keys = {"data": str(write_rows(place / "changing.jsonl", 12)), "epochs": 2}
    folder = run(place, **keys, output_dir="changing").output_dir
    write_rows(place / "changing.jsonl", 13)
    with pytest.raises(UserError, match="give other tokens than when the run began"):
        run(place, **{**keys, "epochs": 3}, resume=str(folder))


def test_allowed_keys_may_change(place, tmp_path):
    """A finished run of one epoch goes on for two more; eval, save and logging keys may differ."""
    keys = {"epochs": 1, "lora": {"r": 2}, "lr_scheduler": "constant", "batch_size": 8}
    first = run(place, **keys, output_dir="grown")
    assert first.steps == 3
    grown = run(
        place, **{**keys, "epochs": 3}, resume=str(first.output_dir), eval_steps=7, save_steps=2,
        logging_steps=2, save_total_limit=9, sample_prompts=["hello"], run_name="x",
    )  # fmt: skip
    assert grown.steps == 9 and grown.output_dir == first.output_dir
    assert [r["step"] for r in lines(grown.output_dir)] == [1, 2, 3, 4, 6, 8, 9]
    straight = run(place, **{**keys, "epochs": 3}, output_dir="straight")
    assert same(product(grown.output_dir), product(straight.output_dir))


def test_a_longer_resume_never_warms_up_again(place):
    """The warm-up is a share of the steps a run began with, and stays what it was then."""
    keys = {"warmup_ratio": 0.5, "warmup_steps": None, "lr_scheduler": "constant"}
    folder = run(place, **keys, max_steps=4, output_dir="warm").output_dir
    assert series(folder, "lr") == pytest.approx([0.01 / 3, 0.02 / 3, 0.01, 0.01])
    run(place, **keys, max_steps=12, resume=str(folder))
    assert series(folder, "lr")[2:] == [0.01] * 10
    newest = newest_whole(folder)
    assert newest is not None and newest.state["course"]["warmup_steps"] == 2


def test_resume_auto_starts_afresh_where_there_is_none(place):
    left = run(place, resume="auto", output_dir="afresh")
    assert left.steps == 3


def test_a_broken_newest_checkpoint_gives_way_to_the_one_before(place, whole, capsys):
    folder = place / "broken"
    shutil.copytree(whole("stream"), folder)
    newest = list_checkpoints(folder)[-1]
    os.truncate(newest / "tensors.pt", 1000)
    again = run(place, **KINDS["stream"], max_steps=STEPS, resume="broken")
    assert "is not whole" in capsys.readouterr().out
    assert lines(again.output_dir) == lines(whole("stream"))


# --- killed without warning -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def starts():
    """Processes from a server that has imported everything: a fresh start costs seconds each time."""
    before = os.environ.get("PYTHONPATH")
    roots = [str(Path(__file__).parents[i]) for i in (2, 0)]
    roots += [f"{roots[0]}/kernels", f"{roots[0]}/tests/model"]
    os.environ["PYTHONPATH"] = os.pathsep.join(roots)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["runs", "fastsft.trainer"])
    yield context.Process
    if before is None:
        os.environ.pop("PYTHONPATH")
    else:
        os.environ["PYTHONPATH"] = before


# Where a process dies, one after the other: none of these is a matter of time.
MOMENTS: list[tuple[str, int]] = [
    ("set-up", 0),
    ("update", 3),
    ("metrics", 5),
    ("tensors", 8),
    ("state", 10),
    ("synced", 12),
    ("named", 14),
    ("prune", 16),
    ("product", 20),
]
UNFINISHED = ("tensors", "state", "synced")  # leave a checkpoint that was not whole


@pytest.mark.parametrize("kind", ["lora", "stream"])
def test_kills_at_named_moments_then_the_same_run(place, whole, starts, kind):
    steps = 20
    expected = whole(kind, steps)
    folder = place / f"{kind}-killed"
    keys = {**KINDS[kind], "max_steps": steps, "save_steps": 2, "output_dir": folder.name}
    keys["resume"] = "auto"
    for moment, step in MOMENTS:
        child = starts(target=killed_at, args=(place, keys, moment, step), daemon=False)
        child.start()
        child.join()
        assert child.exitcode == -signal.SIGKILL, moment
        hidden = list(folder.glob(f"checkpoints/.unfinished-step-{step:06d}"))
        assert bool(hidden) == (moment in UNFINISHED), moment
    assert not (folder / "summary.json").exists()
    child = starts(target=run_quietly, args=(place, keys))
    child.start()
    child.join()
    assert child.exitcode == 0
    assert_same_run(folder, expected)
    assert not list(folder.glob("checkpoints/.*"))
    assert torch.isfinite(torch.tensor([r["loss"] for r in lines(folder) if "loss" in r])).all()
