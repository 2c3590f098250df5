"""What is kept must survive: reaching the disk, telling a full one, and the name of a checkpoint.

A full disk shows itself in three ways: the system says ENOSPC, safetensors puts the system's words into
an exception of its own, and torch raises a RuntimeError without a reason. Leaf module: it imports neither
torch nor anything of ours.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
from pathlib import Path

STEP_NAME = re.compile(r"step-(\d+)")  # the folder of a checkpoint, under checkpoints/
FULL = ("no space left", "os error 28", "storagefull")
FULL_BYTES = 1 << 20


def sync(path: Path) -> None:
    """Make a file's bytes, or the renames in a folder, survive a power cut.

    A folder can be opened for this on POSIX only; elsewhere it is left to the system.
    """
    if os.name != "posix" and path.is_dir():
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def is_disk_full(error: BaseException, folder: Path | None = None) -> bool:
    """Whether `error` means no space, or a spent quota.

    folder: where torch was writing; its bare RuntimeError counts if less than 1 MiB is free there.
    """
    if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT):
        return True
    if any(words in str(error).lower() for words in FULL):
        return True
    if folder is None or not isinstance(error, RuntimeError):
        return False
    return shutil.disk_usage(folder).free < FULL_BYTES
