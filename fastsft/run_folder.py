"""The folder a run owns, where a resume goes on, and what may change when it does.

Claiming is one mkdir, so two runs started at once never share a folder. A folder that a person
named and that already holds a run is never written to, unless that run is being resumed.
"""

import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastsft.checkpoint import STATE, Checkpoint, load_checkpoint, newest_whole
from fastsft.disk import STEP_NAME
from fastsft.errors import UserError

if TYPE_CHECKING:
    from fastsft.config import Config

MAY_CHANGE_ON_RESUME = (
    "early_stopping_patience",
    "epochs",
    "eval_steps",
    "logging_steps",
    "max_steps",
    "output_dir",
    "report_to",
    "resume",
    "run_name",
    "sample_prompts",
    "save_steps",
    "save_total_limit",
    "vram",
)
_RUN_MARKS = ("config.yaml", "metrics.jsonl", "checkpoints")


def holds_run(folder: Path) -> bool:
    """Whether a training run has left anything in `folder`."""
    return any((folder / mark).exists() for mark in _RUN_MARKS)


def claim_output_dir(config: "Config", stem: str) -> Path:
    """Create, or find again, the folder this run owns.

    auto: runs/<stem>, and when taken runs/<stem>-2, -3, ...; with a resume the run's own folder
    (auto: the highest-numbered; a named checkpoint: the run it lies in). A folder named by the user
    that already holds a run is an error unless this run resumes in it.
    """
    resumed = None if config.resume in (None, "auto") else _run_of(Path(str(config.resume)))
    if config.output_dir != "auto":
        folder = Path(config.output_dir)
        if folder.exists() and not folder.is_dir():
            raise UserError(f"output_dir: {folder} is a file; name a folder.")
        if resumed and resumed.resolve() != folder.resolve():
            raise UserError(
                f"output_dir: {folder} is another folder than the run {resumed} that resume names; a run "
                "goes on in its own folder, so leave output_dir out"
            )
        ours = config.resume == "auto" or (resumed and resumed.resolve() == folder.resolve())
        if holds_run(folder) and not ours:
            raise UserError(
                f"output_dir: {folder} already holds a run. Name another folder, or continue that "
                f"run with resume=auto."
            )
        _make(folder, parents=True, exist_ok=True)
        return folder
    if resumed is not None:
        return resumed
    if config.resume == "auto":
        earlier = itertools.takewhile(Path.exists, _numbered(Path("runs"), stem))
        held = [folder for folder in earlier if holds_run(folder)]
        if held:
            return held[-1]
    _make(Path("runs"), exist_ok=True)
    return next(folder for folder in _numbered(Path("runs"), stem) if _created(folder))


def _make(folder: Path, **options: bool) -> None:
    try:
        folder.mkdir(**options)
    except FileExistsError:
        raise
    except OSError as error:
        raise UserError(
            f"output_dir: the folder {folder} cannot be made ({error.strerror}). Name another place."
        ) from error


def _created(folder: Path) -> bool:
    try:
        _make(folder)
    except FileExistsError:
        return False
    return True


def resolve_resume(
    resume: str | None, run_dir: Path, warn: Callable[[str], None] = print
) -> Checkpoint | None:
    """The checkpoint to go on from: None (start afresh), the newest whole one, or the one named.

    A named run folder means its newest whole checkpoint. Raises UserError when the named one does
    not exist or is not whole; `auto` without any whole checkpoint starts afresh.
    """
    if resume is None:
        return None
    if resume == "auto":
        return newest_whole(run_dir, warn)
    path = Path(resume)
    if not path.is_dir():
        raise UserError(f"resume: there is no folder {path}. Give a checkpoint folder or auto.")
    if STEP_NAME.fullmatch(path.resolve().name) or (path / STATE).exists():
        return load_checkpoint(path)
    found = newest_whole(path, warn)
    if found is None:
        raise UserError(
            f"resume: {path} holds no whole checkpoint (looked for checkpoints/step-*). Give a "
            "checkpoint folder, a run folder that has one, or auto."
        )
    return found


def check_resume_config(old: dict[str, Any], new: dict[str, Any]) -> None:
    """Refuse a resume with a changed key, other than those that cannot bend the course so far.

    Both are `Config.model_dump()`. Raises UserError naming every such key, old and new value.
    """
    before, after = dict(_flat(old)), dict(_flat(new))
    changed = [
        f"{key} was {before.get(key)!r} and is {after.get(key)!r}"
        for key in sorted(before.keys() | after.keys())
        if key.split(".")[0] not in MAY_CHANGE_ON_RESUME and before.get(key) != after.get(key)
    ]
    if changed:
        raise UserError(
            "resume: a run goes on only with the settings it began with, but "
            f"{'; '.join(changed)}. Set the old value again, or drop resume to start a new run. "
            f"These may change: {', '.join(MAY_CHANGE_ON_RESUME)}."
        )


def _flat(mapping: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in mapping.items():
        if isinstance(value, list) and any(isinstance(item, dict) for item in value):
            value = {str(place): item for place, item in enumerate(value)}
        if isinstance(value, dict) and value:
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def _run_of(path: Path) -> Path:
    """The run folder a checkpoint path, or a run path itself, belongs to."""
    return path.parent.parent if path.resolve().parent.name == "checkpoints" else path


def _numbered(parent: Path, stem: str) -> Iterator[Path]:
    yield parent / stem
    for number in itertools.count(2):
        yield parent / f"{stem}-{number}"
