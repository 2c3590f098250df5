"""Tasks for test_workers.py, in a module that worker processes can import cheaply."""

from __future__ import annotations

import os
import sys
import time

from fastsft.errors import UserError

CHILD = "pytest" not in sys.modules


def slow_square(number: int) -> tuple[int, int]:
    time.sleep(0.02 if number % 3 else 0.05)
    if number == 1000:
        raise UserError("row 1000 is one too many")
    return number * number, os.getpid()


def kill_yourself(number: int) -> int:
    if CHILD:
        os.kill(os.getpid(), 9)
    slow_square(number)
    return number


def exit_quietly(number: int) -> int:
    if CHILD:
        os._exit(3)
    slow_square(number)
    return number
