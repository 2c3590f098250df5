"""Checkpoints: whole or absent, damage named, a kill at any moment, and who owns which folder."""

import errno
import itertools
import json
import os
import random
import shutil
import signal
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from fastsft import checkpoint as ck
from fastsft.config import Config, DataSource
from fastsft.errors import UserError
from fastsft.run_folder import check_resume_config, claim_output_dir, resolve_resume


def write_model(folder: Path) -> None:
    (folder / "adapter").mkdir()
    (folder / "adapter" / "weights.bin").write_bytes(bytes(range(256)) * 100)


def save(run: Path, step: int, **state: Any) -> Path:
    return ck.save_checkpoint(run, step, write_model, state, {"m": torch.arange(1000)})


def test_round_trip(tmp_path: Path) -> None:
    path = save(tmp_path, 7, data={"epoch": 1, "offset": 3}, best={"value": 0.5, "step": 5})
    assert path == tmp_path / "checkpoints" / "step-000007"
    found = ck.load_checkpoint(path)
    assert (found.step, found.run_dir, found.path) == (7, tmp_path, path)
    assert found.state["data"] == {"epoch": 1, "offset": 3}
    assert torch.equal(found.tensors()["m"], torch.arange(1000))
    assert (path / "adapter" / "weights.bin").stat().st_size == 25600


DAMAGES: dict[str, tuple[Any, str]] = {
    "cut": (lambda p: os.truncate(p / "adapter/weights.bin", 100), "100 bytes instead of 25600"),
    "flipped": (
        lambda p: (p / "adapter/weights.bin").write_bytes(b"x" * 25600),
        "does not match its checksum",
    ),
    "gone": (lambda p: (p / "tensors.pt").unlink(), "tensors.pt is missing"),
    "no state": (lambda p: (p / "state.json").unlink(), "state.json is missing"),
    "torn state": (lambda p: os.truncate(p / "state.json", 50), "state.json is damaged"),
    "edited state": (
        lambda p: (p / "state.json").write_text(
            (p / "state.json").read_text().replace('"step": 2', '"step": 3')
        ),
        "state.json does not match its checksum",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_named_and_skipped(tmp_path: Path, damage: str) -> None:
    hurt, words = DAMAGES[damage]
    save(tmp_path, 1)
    path = save(tmp_path, 2)
    hurt(path)
    said: list[str] = []
    found = ck.newest_whole(tmp_path, said.append)
    assert found is not None and found.step == 1
    assert len(said) == 1 and "step-000002" in said[0] and words in said[0]
    with pytest.raises(UserError, match="not a whole checkpoint"):
        resolve_resume(str(path), tmp_path)


def test_prune_keeps_the_newest_and_the_best(tmp_path: Path) -> None:
    for step in (1, 2, 3, 4, 5):
        save(tmp_path, step)
    gone = ck.prune(tmp_path, keep_last=2, best_step=2)
    assert [p.name for p in gone] == ["step-000001", "step-000003"]
    assert [p.name for p in ck.list_checkpoints(tmp_path)] == [
        "step-000002",
        "step-000004",
        "step-000005",
    ]
    assert ck.prune(tmp_path, keep_last=2, best_step=2) == []


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        RuntimeError("Error while serializing: I/O error: No space left on device"),
    ],
)
def test_no_space_left(tmp_path: Path, error: Exception) -> None:
    save(tmp_path, 1)

    def full(folder: Path) -> None:
        (folder / "half").write_bytes(b"x")
        raise error

    with pytest.raises(
        UserError, match=r"no space left in .* step 2: it needs more than .* MB"
    ) as e:
        ck.save_checkpoint(tmp_path, 2, full, {}, {})
    assert (
        "step-000001, 0.0 MB, is kept" in str(e.value)
        and "is kept" in str(e.value)
        and "resume=auto" in str(e.value)
    )
    assert os.listdir(tmp_path / "checkpoints") == ["step-000001"]


def test_other_errors_keep_their_kind_and_leave_nothing(tmp_path: Path) -> None:
    def broken(folder: Path) -> None:
        raise KeyError("a bug")

    with pytest.raises(KeyError):
        ck.save_checkpoint(tmp_path, 2, broken, {}, {})
    assert os.listdir(tmp_path / "checkpoints") == []


def test_the_same_step_again_replaces_it(tmp_path: Path) -> None:
    save(tmp_path, 1, tag="old")
    path = save(tmp_path, 1, tag="new")
    assert ck.load_checkpoint(path).state["tag"] == "new"
    assert os.listdir(tmp_path / "checkpoints") == ["step-000001"]


FILE_EVENTS = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "shutil.rmtree"}


def save_and_die(run: Path, at: int) -> bool:
    """Save step 3 and prune in a child that kills itself before its `at`-th file operation.

    True when it was killed, False when it finished first.
    """
    child = os.fork()
    if child == 0:
        seen = 0

        def count_down(event: str, _: Any) -> None:
            nonlocal seen
            if event in FILE_EVENTS:
                seen += 1
                if seen == at:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(count_down)
        try:
            save(run, 3)
            ck.prune(run, 1, None)
            os._exit(0)
        finally:
            os._exit(1)
    status = os.waitpid(child, 0)[1]
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0
    return os.WIFSIGNALED(status)


def test_a_kill_before_any_file_operation_leaves_whole_checkpoints(tmp_path: Path) -> None:
    for step in (1, 2):
        save(tmp_path / "before", step)
    newest_seen = set()
    for at in itertools.count(1):
        run = shutil.copytree(tmp_path / "before", tmp_path / str(at))
        killed = save_and_die(run, at)
        visible = ck.list_checkpoints(run)
        assert all(ck.verify(path) is None for path in visible)
        newest = ck.newest_whole(run)
        assert newest is not None and newest.step in (2, 3)
        newest_seen.add((newest.step, len(visible)))
        if not killed:
            break
        ck.remove_left_overs(run)
        names = os.listdir(run / "checkpoints")
        assert names and all(name.startswith("step-") for name in names)
    assert newest_seen == {(2, 2), (3, 3), (3, 2), (3, 1)} and at > 20


def test_random_state_round_trip(tmp_path: Path) -> None:
    random.seed(3), np.random.seed(3), torch.manual_seed(3)
    random.gauss(0, 1), np.random.randn(3)  # half-used Gaussian pairs belong to the state
    ck.save_checkpoint(tmp_path, 1, write_model, {}, {"random": ck.random_state()})
    drawn = (random.gauss(0, 1), np.random.randn(5).tolist(), torch.randn(5).tolist())
    random.seed(9), np.random.seed(9), torch.manual_seed(9)
    ck.restore_random_state(
        ck.load_checkpoint(ck.list_checkpoints(tmp_path)[0]).tensors()["random"]
    )
    assert drawn == (random.gauss(0, 1), np.random.randn(5).tolist(), torch.randn(5).tolist())


def test_going_back_sets_later_checkpoints_aside(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        save(tmp_path, step)
    aside = ck.set_aside_later(tmp_path, 1)
    assert [p.name for p in aside] == ["superseded-step-000002", "superseded-step-000003"]
    save(tmp_path, 2)
    assert [p.name for p in ck.set_aside_later(tmp_path, 1)] == ["superseded-step-000002-again"]
    found = ck.newest_whole(tmp_path)
    assert found is not None and found.step == 1


def run_config(**changed: Any) -> Config:
    return Config(model="builtin:tiny", data=[DataSource(path="d.jsonl")], **changed)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"batch_size": 32}, "batch_size was 64 and is 32"),
        ({"lora": {"r": 8}}, "lora.r was 16 and is 8"),
        ({"seed": 1}, "seed was 0 and is 1"),
        ({"lr_scheduler": "linear"}, "lr_scheduler was 'cosine' and is 'linear'"),
    ],
)
def test_a_changed_key_is_refused_on_resume(change: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError) as error:
        check_resume_config(run_config().model_dump(), run_config(**change).model_dump())
    assert words in str(error.value) and "save_steps" in str(error.value)


def test_keys_that_may_change_on_resume() -> None:
    changed = run_config(
        max_steps=9,
        logging_steps=2,
        eval_steps=5,
        save_steps=5,
        save_total_limit=1,
        report_to=["wandb"],
        vram="24GB",
        resume="auto",
        output_dir="x",
        run_name="y",
        sample_prompts=["z"],
    )
    assert changed.epochs is None
    check_resume_config(run_config().model_dump(), changed.model_dump())


def claim(output_dir: str = "auto", resume: str | None = None) -> Path:
    config: Any = SimpleNamespace(output_dir=output_dir, resume=resume)
    return claim_output_dir(config, "quick")


def test_output_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert claim() == Path("runs/quick")
    assert claim() == Path("runs/quick-2")
    assert claim() == Path("runs/quick-3")
    # auto resume: the highest-numbered folder that holds a run, or a fresh one
    assert claim(resume="auto") == Path("runs/quick-4")
    save(Path("runs/quick"), 5)
    save(Path("runs/quick-2"), 3)
    assert claim(resume="auto") == Path("runs/quick-2")
    assert claim(resume="runs/quick/checkpoints/step-000005") == Path("runs/quick")
    assert claim(resume="runs/quick") == Path("runs/quick")
    # a folder named by the user
    assert claim("mine") == Path("mine")
    assert claim("mine") == Path("mine")  # nothing of a run in it yet
    save(Path("mine"), 1)
    with pytest.raises(UserError, match="output_dir: mine already holds a run"):
        claim("mine")
    with pytest.raises(UserError, match="another folder than the run"):
        claim("mine", resume="runs/quick")
    assert claim("mine", resume="auto") == Path("mine")
    assert claim("mine", resume="mine/checkpoints/step-000001") == Path("mine")
    Path("file").write_text("")
    with pytest.raises(UserError, match="file is a file"):
        claim("file")


def test_resolve_resume(tmp_path: Path) -> None:
    assert resolve_resume(None, tmp_path) is None
    assert resolve_resume("auto", tmp_path) is None
    for step in (1, 2):
        save(tmp_path, step)
    for resume, step in (
        ("auto", 2),
        (str(tmp_path), 2),
        (f"{tmp_path}/checkpoints/step-000001", 1),
    ):
        found = resolve_resume(resume, tmp_path)
        assert found is not None and found.step == step
    with pytest.raises(UserError, match="there is no folder"):
        resolve_resume(str(tmp_path / "nowhere"), tmp_path)
    shutil.rmtree(tmp_path / "checkpoints")
    with pytest.raises(UserError, match="holds no whole checkpoint"):
        resolve_resume(str(tmp_path), tmp_path)


def test_state_is_readable_json(tmp_path: Path) -> None:
    manifest = json.loads((save(tmp_path, 4, epoch=0.5) / "state.json").read_text())
    assert manifest["state"] == {"step": 4, "epoch": 0.5}
    assert set(manifest["files"]) == {"adapter/weights.bin", "tensors.pt"}
