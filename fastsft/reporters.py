"""TensorBoard and Weights & Biases behind one small interface; neither is a dependency.

Both are imported only when asked for, before anything expensive happens, and a missing package is
an error then and not after an hour. A resumed run continues the same TensorBoard folder (events
behind the checkpoint are purged) and the same W&B run (its id is kept beside the metrics).
"""

import importlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastsft.errors import UserError
from fastsft.metrics import Reporter

if TYPE_CHECKING:
    from fastsft.config import Config


def open_reporters(config: "Config", run_dir: Path, resume_step: int | None) -> list[Reporter]:
    """One reporter per name in `report_to`. Raises UserError where its package is missing."""
    reporters: list[Reporter] = []
    for name in config.report_to:
        if name == "tensorboard":
            reporters.append(TensorBoardReporter(run_dir, resume_step))
        else:
            reporters.append(WandbReporter(config, run_dir, resuming=resume_step is not None))
    return reporters


class TensorBoardReporter:
    """Scalars under train/ and eval/ in `<run>/tensorboard`."""

    def __init__(self, run_dir: Path, resume_step: int | None) -> None:
        module = _import("torch.utils.tensorboard", "tensorboard")
        purge = None if resume_step is None else resume_step + 1
        self._writer = module.SummaryWriter(str(run_dir / "tensorboard"), purge_step=purge)

    def log(self, record: dict[str, Any]) -> None:
        for name, value in _scalars(record).items():
            self._writer.add_scalar(name, value, record["step"])
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class WandbReporter:
    """One W&B run per run folder, with the whole config attached."""

    def __init__(self, config: "Config", run_dir: Path, *, resuming: bool) -> None:
        wandb = _import("wandb", "wandb")
        id_file = run_dir / "wandb_id"
        known = id_file.read_text().strip() if resuming and id_file.exists() else None
        self._run = wandb.init(
            project="fastsft",
            name=config.run_name or run_dir.name,
            dir=str(run_dir),
            config=config.model_dump(),
            id=known,
            resume="allow",
        )
        id_file.write_text(f"{self._run.id}\n")

    def log(self, record: dict[str, Any]) -> None:
        self._run.log(_scalars(record), step=record["step"])

    def close(self) -> None:
        self._run.finish()


def _scalars(record: dict[str, Any]) -> dict[str, float]:
    """eval_loss -> eval/loss, lr -> train/lr; what is null stays out."""
    return {
        f"eval/{key[5:]}" if key.startswith("eval_") else f"train/{key}": value
        for key, value in record.items()
        if key != "step" and value is not None
    }


def _import(module: str, package: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UserError(
            f"report_to: {package} is asked for and cannot be imported ({error}). Install it with: "
            f"pip install {package} - or take it out of report_to."
        ) from error
