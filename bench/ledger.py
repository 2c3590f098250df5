"""One run on one machine: the device, the circumstances, and the rows as they are made.

Rows are written one by one, so that an interrupted run goes on where it was, as long as sources,
versions and card are the same. What failed is tried again.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from bench import rows

RESULTS = Path(__file__).parent / "results"
KEY = ("kind", "op", "case", "dtype", "shape", "who", "choice")


@dataclass
class Ledger:
    """path is None where nothing is to be written."""

    device: torch.device
    path: Path | None
    about: dict[str, Any]
    rows: list[dict[str, Any]] = field(default_factory=list)
    key: tuple[str, ...] = KEY

    @property
    def on_gpu(self) -> bool:
        return self.device.type == "cuda"

    @property
    def capability(self) -> int:
        """Of the card; on a CPU that which the interpreter takes it to be."""
        return self.about["capability"]

    def find(self, **key: Any) -> dict[str, Any] | None:
        """The row of this key, if there is one."""
        wanted = [key.get(k) for k in self.key]
        return next((r for r in self.rows if [r.get(k) for k in self.key] == wanted), None)

    def add(self, row: dict[str, Any]) -> None:
        """Writes a row, in place of an older one of its key."""
        old = self.find(**{k: row.get(k) for k in self.key})
        self.rows = [r for r in self.rows if r is not old] + [row]
        if self.path:
            rows.save(self.path, self.about, self.rows)


def opened(
    out: Path | None,
    name: str = "kernels",
    key: tuple[str, ...] = KEY,
    folders: rows.Folders = rows.KERNELS,
) -> Ledger:
    """The ledger `name` of this machine in folder `out`, by default bench/results on a GPU and none else.

    folders: whose sources, as (folder, pattern), the rows depend on.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    about = rows.circumstances(folders)
    if device.type == "cuda":
        p = torch.cuda.get_device_properties(device)
        about |= {"card": p.name, "capability": 10 * p.major + p.minor, "driver": rows.driver()}
        out = out or RESULTS
    else:
        about |= {"card": rows.processor(), "capability": 90, "driver": ""}
    path = path_of(out, name, about) if out else None
    before, found = rows.load(path) if path else ({}, [])
    same = all(before.get(k) == about[k] for k in ("source", "versions", "card", "driver"))
    kept = [r for r in found if not r.get("problem") and "error" not in r] if same else []
    return Ledger(device, path, about, kept, key)


def path_of(out: Path, name: str, about: dict[str, Any]) -> Path:
    """Where in folder `out` the ledger `name` of a machine is."""
    folder = rows.slug(about["card"]) if about["driver"] or name == "kernels" else "cpu"
    return out / folder / f"{name}.json"
