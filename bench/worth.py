"""The order in which cases are worth measuring, where time on a card may end before they do."""

from __future__ import annotations

from collections.abc import Iterable

from bench.kernels.case import Case

# (op, how its label begins): what decides a step's time first. What is not named comes last.
WORTH = (
    ("varlen_attention", "forward 4k D 128"),
    ("varlen_attention", "backward 4k D 128"),
    ("varlen_attention", "forward ragged"),
    ("varlen_attention", "backward ragged"),
    ("nf4_dequantize_group", ""),
    ("rms_norm", "forward 8192x4096"),
    ("rms_norm", "backward 8192x4096"),
    ("rms_norm_backward", "8192x4096, adapters of R 16"),
    ("glu_backward", "8192x14336, adapters of R 16"),
    ("tails", ""),
    ("skinny_dA", ""),
    ("skinny_dB", ""),
    ("linear_cross_entropy", "frozen head"),
    ("rope", ""),
    ("swiglu", ""),
    ("lora_linear", ""),
)


def by_worth(cases: Iterable[Case]) -> list[Case]:
    """The cases, the most worthy first; equals keep their order."""

    def place(case: Case) -> int:
        named = (op == case.op and case.label.startswith(label) for op, label in WORTH)
        return next((i for i, found in enumerate(named) if found), len(WORTH))

    return sorted(cases, key=place)
