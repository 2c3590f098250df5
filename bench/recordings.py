"""What a case launches, and in which configurations, learned on meta tensors without a GPU."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from fastsft_kernels.launch import Recording, forced, record_launches

from bench.kernels.case import Case

META = torch.device("meta")
# Multiprocessors of a card of each capability, which some grids and splits follow.
MULTIPROCESSORS = {80: 108, 86: 82, 89: 128, 90: 132, 100: 148, 120: 170}

Choice = dict[str, Any]  # of each name: the number of a pinned candidate, or the name of a variant


class Configuration(NamedTuple):
    """What `launch.forced` takes; and which name is not at its default, in favour of what."""

    choice: Choice
    name: str = ""
    candidate: Any = None

    @property
    def label(self) -> str:
        return f"{self.name}={self.choice[self.name]}" if self.name else ""


def record(
    case: Case, capability: int, dtype: torch.dtype, choice: Choice, small: bool = False
) -> Recording:
    """Runs a case at the shape of the record, or at the small one, for a card of `capability`."""
    make = case.small if small else case.record
    count = MULTIPROCESSORS.get(capability, 132)
    with record_launches(capability, count) as recording, forced(**choice):
        case.run(*make(META, dtype))
    return recording


def configurations(recording: Recording) -> list[Configuration]:
    """All defaults, then every other candidate of every name once, the others at their defaults."""
    default = {name: _nth(candidates, 0) for name, candidates in recording.choices.items()}
    others = [
        Configuration(default | {name: _nth(candidates, i)}, name, candidates[i])
        for name, candidates in recording.choices.items()
        for i in range(1, len(candidates))
    ]
    return [Configuration(default), *others]


def _nth(candidates: list[Any], i: int) -> Any:
    return candidates[i] if isinstance(candidates[i], str) else i
