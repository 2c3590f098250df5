"""Checkpoints that are whole or absent.

A checkpoint is written into a hidden folder beside its place, every file is synced, and one rename
makes it visible; `state.json`, written last, has each file's size and CRC-32 and a CRC of itself.
A kill at any time therefore leaves whole checkpoints and hidden left-overs, which the next run
removes. "Whole" is verified by reading every byte before a resume trusts it: seconds per 10 GB, and
what is damaged later (a copy that broke off, a full disk on another machine) is named and skipped.

    runs/name/checkpoints/step-000100/state.json      step, data position, best, stopping, config
                                      tensors.pt      optimizer and random state (weights_only load)
                                      adapter/ ...    whatever the caller's `write` puts there

Optimizer tensors are memory-mapped on load, so that resuming needs no second copy in memory.
"""

import json
import os
import random
import shutil
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fastsft.disk import STEP_NAME, is_disk_full, sync
from fastsft.errors import UserError

STATE = "state.json"
_TENSORS = "tensors.pt"
_LEFT_OVER = ".unfinished-"


@dataclass(frozen=True)
class Checkpoint:
    """A verified checkpoint. `state` is what was given to `save_checkpoint`."""

    path: Path
    step: int
    state: dict[str, Any]

    @property
    def run_dir(self) -> Path:
        return self.path.parent.parent

    def tensors(self, device: str = "cpu") -> dict[str, Any]:
        """The tensors given to `save_checkpoint`; on the CPU they stay mapped from the file."""
        file = self.path / _TENSORS
        return torch.load(file, map_location=device, mmap=device == "cpu", weights_only=True)


def save_checkpoint(
    run_dir: Path,
    step: int,
    write: Callable[[Path], None],
    state: dict[str, Any],
    tensors: dict[str, Any],
) -> Path:
    """Write `checkpoints/step-XXXXXX` under `run_dir`, whole or not at all, and return its path.

    write: puts model or adapter files into the folder it is given (sub-folders allowed).
    state: JSON-able; tensors: what torch.load(weights_only=True) can read back.
    Raises UserError when the disk is full; earlier checkpoints are untouched then.
    """
    parent = run_dir / "checkpoints"
    final = parent / f"step-{step:06d}"
    temporary = parent / f"{_LEFT_OVER}{final.name}"
    try:
        parent.mkdir(parents=True, exist_ok=True)
        _remove(temporary)
        temporary.mkdir()
        write(temporary)
        with open(temporary / _TENSORS, "wb") as file:
            torch.save(tensors, file)
        _write_state(temporary, {"step": step, **state})
        _sync_tree(temporary)
    except BaseException as error:
        message = _no_space(temporary, step) if is_disk_full(error, parent) else None
        _remove(temporary)
        if message:
            raise UserError(message) from error
        raise
    if final.exists():  # the same step again, after a resume from before it
        replaced = parent / f"{_LEFT_OVER}replaced-{final.name}"
        _remove(replaced)
        final.rename(replaced)
        temporary.rename(final)
        _remove(replaced)
    else:
        temporary.rename(final)
    sync(parent)
    return final


def _write_state(folder: Path, state: dict[str, Any]) -> None:
    files = {
        str(path.relative_to(folder)): {"bytes": path.stat().st_size, "crc32": _file_crc(path)}
        for path in _files(folder)
    }
    body = {"state": state, "files": files}
    crc = zlib.crc32(_canonical(body))
    (folder / STATE).write_text(json.dumps({**body, "crc32": crc}, indent=1), encoding="utf-8")


def verify(path: Path) -> str | None:
    """None when the checkpoint at `path` is whole, else one clause saying what is wrong with it."""
    try:
        manifest = json.loads((path / STATE).read_text(encoding="utf-8"))
        body = {"state": manifest["state"], "files": manifest["files"]}
        if zlib.crc32(_canonical(body)) != manifest["crc32"]:
            return f"{STATE} does not match its checksum"
        for name, expected in manifest["files"].items():
            size = (path / name).stat().st_size
            if size != expected["bytes"]:
                return f"{name} has {size} bytes instead of {expected['bytes']}"
            if _file_crc(path / name) != expected["crc32"]:
                return f"{name} does not match its checksum"
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except OSError as error:
        return f"it cannot be read ({error})"
    except (ValueError, KeyError, TypeError, AttributeError):
        return f"{STATE} is damaged"
    return None


def list_checkpoints(run_dir: Path) -> list[Path]:
    """Visible checkpoint folders, oldest step first, not verified."""
    folder = run_dir / "checkpoints"
    found = [p for p in folder.iterdir() if STEP_NAME.fullmatch(p.name)] if folder.is_dir() else []
    return sorted(found, key=step_of)


def load_checkpoint(path: Path) -> Checkpoint:
    """Verify and open one checkpoint. Raises UserError naming what is wrong with it."""
    broken = verify(path)
    if broken:
        raise UserError(
            f"resume: {path} is not a whole checkpoint: {broken}. Name another one of that run, or "
            "use resume=auto, which takes the newest whole one."
        )
    state = json.loads((path / STATE).read_text(encoding="utf-8"))["state"]
    return Checkpoint(path, state["step"], state)


def newest_whole(run_dir: Path, warn: Callable[[str], None] = print) -> Checkpoint | None:
    """The newest checkpoint that passes verification; broken ones are named through `warn`."""
    for path in reversed(list_checkpoints(run_dir)):
        broken = verify(path)
        if broken is None:
            return load_checkpoint(path)
        warn(f"{path} is not whole ({broken}); looking for an older one")
    return None


def remove_left_overs(run_dir: Path) -> None:
    """Delete what an interrupted save or prune left; call once, before the first save of a run."""
    folder = run_dir / "checkpoints"
    for path in folder.glob(f"{_LEFT_OVER}*") if folder.is_dir() else ():
        _remove(path)


def prune(run_dir: Path, keep_last: int, best_step: int | None) -> list[Path]:
    """Delete all but the `keep_last` newest checkpoints and the best; return what was deleted."""
    paths = list_checkpoints(run_dir)
    doomed = [p for p in paths[:-keep_last] if step_of(p) != best_step]
    for path in doomed:
        hidden = path.with_name(f"{_LEFT_OVER}pruned-{path.name}")
        _remove(hidden)
        path.rename(hidden)  # invisible in one step: a kill cannot leave half a checkpoint in view
        _remove(hidden)
    return doomed


def set_aside_later(run_dir: Path, step: int) -> list[Path]:
    """Rename checkpoints after `step` to superseded-*: they belong to a course now abandoned.

    For a resume from an earlier checkpoint than the newest. Nothing is deleted; say the paths.
    """
    renamed = []
    for path in list_checkpoints(run_dir):
        if step_of(path) > step:
            target = path.with_name(f"superseded-{path.name}")
            while target.exists():
                target = target.with_name(f"{target.name}-again")
            renamed.append(path.rename(target))
    return renamed


def random_state() -> dict[str, Any]:
    """The state of Python's, numpy's and torch's generators, as tensors and plain numbers."""
    version, words, gauss = random.getstate()
    kind, keys, position, has_gauss, cached = np.random.get_state()
    state: dict[str, Any] = {
        "python": (version, torch.tensor(words, dtype=torch.int64), gauss),
        "numpy": (
            kind,
            torch.from_numpy(np.asarray(keys).astype(np.int64)),
            int(position),
            int(has_gauss),
            float(cached),
        ),
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state_all()
    return state


def restore_random_state(state: dict[str, Any]) -> None:
    """Undo whatever was drawn since `random_state` gave `state`."""
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words.tolist()), gauss))
    kind, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), position, has_gauss, cached))
    torch.set_rng_state(state["torch"].clone())
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state_all([s.cpu() for s in state["cuda"]])


def step_of(path: Path) -> int:
    """The step in a checkpoint folder's name."""
    match = STEP_NAME.fullmatch(path.name)
    assert match, path
    return int(match[1])


def _files(folder: Path) -> list[Path]:
    return sorted(p for p in folder.rglob("*") if p.is_file() and p.name != STATE)


def _canonical(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()


def _file_crc(path: Path) -> int:
    crc = 0
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            crc = zlib.crc32(block, crc)
    return crc


def _sync_tree(folder: Path) -> None:
    for root, _, names in os.walk(folder, topdown=False):
        for name in names:
            sync(Path(root) / name)
        sync(Path(root))


def _remove(path: Path) -> None:
    shutil.rmtree(path, ignore_errors=True)


def _no_space(temporary: Path, step: int) -> str:
    parent = temporary.parent
    earlier = list_checkpoints(parent.parent)
    room = (_bytes(temporary) + shutil.disk_usage(parent).free) / 1e6
    last = "there is no earlier checkpoint"
    if earlier:
        last = f"{earlier[-1]}, {_bytes(earlier[-1]) / 1e6:,.1f} MB, is kept"
    return (
        f"no space left in {parent} for the checkpoint of step {step}: it needs more than the "
        f"{room:,.1f} MB there were; {last}. Free some (save_total_limit says how many are kept), "
        "then go on with resume=auto."
    )


def _bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in _files(folder))
