"""Whole numbers of grids and tiles, on the host.

Triton's functions of the same names may be called inside kernels too, and find out each time where
they are: 3.5 us a call, where a layer makes 150 of them a step. These take a fraction of one.
"""

from __future__ import annotations


def cdiv(x: int, y: int) -> int:
    """x / y rounded up; y is positive."""
    return -(-x // y)


def next_power_of_2(n: int) -> int:
    """The smallest power of 2 not below n, which is positive."""
    return 1 << (n - 1).bit_length()
