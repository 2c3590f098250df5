"""Rows of results: one JSON file per run, with the circumstances they were measured in.

    {"circumstances": {gpu, driver, versions, commit, source, command, when}, "rows": [..]}

One row is one line, so that a difference between two runs can be read.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
import subprocess
import sys
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
LIBRARIES = (
    "torch triton transformers trl peft accelerate bitsandbytes liger-kernel cut-cross-entropy "
    "unsloth unsloth_zoo flash-attn datasets tokenizers tiktoken numpy axolotl llamafactory"
).split()
Folders = tuple[tuple[str, str], ...]
KERNELS: Folders = (
    ("kernels/fastsft_kernels", "*.py"),
    ("csrc", "*.c*"),
    ("bench/kernels", "*.py"),
)
TRAINING: Folders = (*KERNELS[:2], ("fastsft", "*.py"), ("bench/train", "*.py"))


def circumstances(folders: Folders = KERNELS) -> dict[str, Any]:
    """Everything but the card: what ran, in which versions, when."""
    return {
        "when": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": _output("git", "-C", str(ROOT), "describe", "--always", "--dirty") or "unknown",
        "source": source(folders),
        "command": " ".join(["python -m", _module(), *sys.argv[1:]]),
        "python": platform.python_version(),
        "cores": len(os.sched_getaffinity(0)),
        "versions": {name: v for name in LIBRARIES if (v := _version(name))},
    }


def source(folders: Folders = KERNELS) -> str:
    """A fingerprint of the files that rows depend on: rows of one fingerprint belong together.

    Unlike the commit it is known where git is not, and tells one uncommitted state from another.
    """
    digest = hashlib.sha256()
    for folder, pattern in folders:
        for path in sorted((ROOT / folder).rglob(pattern)):
            digest.update(str(path.relative_to(ROOT)).encode() + path.read_bytes())
    return digest.hexdigest()[:12]


def processor() -> str:
    """The CPU's name."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if os.path.exists("/proc") else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def slug(card: str) -> str:
    """A card's name as a folder's."""
    return re.sub(r"[^a-z0-9]+", "-", card.lower()).strip("-")


def driver() -> str:
    """The NVIDIA driver's version, empty where there is none."""
    found = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    return found.splitlines()[0] if found else ""


def save(path: Path, about: Mapping[str, Any], rows: Iterable[Mapping[str, Any]]) -> None:
    """Writes all of `path` anew, whole or not at all."""
    lines = ",\n  ".join(json.dumps(row) for row in rows)
    head = json.dumps(about, indent=1).replace("\n", "\n ")
    text = f'{{\n "circumstances": {head},\n "rows": [\n  {lines}\n ]\n}}\n'
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_name(path.name + ".tmp")
    fresh.write_text(text, encoding="utf-8")
    fresh.replace(path)


def load(path: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """(circumstances, rows); both empty where there is no file."""
    if not path.exists():
        return {}, []
    found = json.loads(path.read_text(encoding="utf-8"))
    return found["circumstances"], found["rows"]


def _module() -> str:
    """As it was named after `python -m`."""
    parts = Path(sys.argv[0]).with_suffix("").parts
    first = len(parts) - 1 - parts[::-1].index("bench") if "bench" in parts else -2
    return ".".join(parts[first:]).removesuffix(".__main__")


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return ""


def _output(*command: str) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""
