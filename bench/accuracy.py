"""How a kernel is judged: against float64, by the error torch itself makes at that precision.

One rule for the tests and for the check that comes before every timing on a GPU.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Verdict(NamedTuple):
    """problem  what is wrong, empty where nothing is
    share    root mean square error as a share of what the rule allows
    """

    problem: str
    share: float


def judge(
    got: Tensor, exact: Tensor, plain: Tensor, factor: float = 2.0, terms: float = 0.0
) -> Verdict:
    """Whether `got` is as near to the float64 `exact` as torch's own `plain` at the same precision.

    The root mean square error may be `factor` times torch's, the largest error 2 x factor times;
    to both is added half the spacing of got's dtype at the size of the result (an exact `plain`
    would otherwise allow no rounding at all), and float32's spacing at the size of the `terms` that
    cancel out in the result. What is not floating point must be equal to `plain`.
    """
    form = (tuple(got.shape), got.dtype)
    if form != (tuple(plain.shape), plain.dtype) or got.shape != exact.shape:
        return Verdict(f"shape and dtype {form}, not {tuple(plain.shape), plain.dtype}", math.inf)
    if not got.numel():
        return Verdict("", 0.0)
    if not got.is_floating_point():
        wrong = int((got != plain).sum())
        return Verdict(f"{wrong} of {got.numel()} differ" if wrong else "", float(wrong > 0))
    assert exact.dtype == torch.float64, exact.dtype
    if not torch.isfinite(got).all():
        return Verdict(f"{int((~torch.isfinite(got)).sum())} numbers not finite", math.inf)
    ours, theirs = got.double() - exact, plain.double() - exact
    half = torch.finfo(got.dtype).eps / 2
    rms, largest = _rms(ours), ours.abs().max().item()
    cancelled = torch.finfo(torch.float32).eps * terms
    allowed_rms = factor * _rms(theirs) + half * _rms(exact) + cancelled
    allowed = 2 * (factor * theirs.abs().max().item() + cancelled) + half * exact.abs().max().item()
    if math.isnan(allowed + allowed_rms):
        return Verdict("the oracle gives NaN", math.inf)
    share = rms / allowed_rms if allowed_rms else (math.inf if rms else 0.0)
    if rms > allowed_rms:
        return Verdict(f"rms error {rms:.3g}, the rule allows {allowed_rms:.3g}", share)
    if largest > allowed:
        return Verdict(f"largest error {largest:.3g}, the rule allows {allowed:.3g}", share)
    return Verdict("", share)


def _rms(x: Tensor) -> float:
    return x.square().mean().sqrt().item()


def judge_all(
    got: Sequence[Tensor], exact: Sequence[Tensor], plain: Sequence[Tensor], factor: float = 2.0
) -> Verdict:
    """`judge` for each of several outputs: the worst verdict, which names its output."""
    if len(got) != len(plain):
        return Verdict(f"{len(got)} outputs, not {len(plain)}", math.inf)
    worst = Verdict("", 0.0)
    for i, (ours, wide, low) in enumerate(zip(got, exact, plain, strict=True)):
        found = judge(ours, wide.double() if ours.is_floating_point() else wide, low, factor)
        if found.problem:
            return Verdict(f"output {i} of {len(got)}: {found.problem}", found.share)
        worst = max(worst, found, key=lambda v: v.share)
    return worst


def flat(x: Any) -> list[Tensor]:
    """The tensors of nested tuples and lists, detached, in order; what is None is left out."""
    if isinstance(x, Tensor):
        return [x.detach()]
    return [t for part in x for t in flat(part)] if isinstance(x, (tuple, list)) else []


def convert(x: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """`x` with `change` applied to every tensor of nested tuples; whatever else it holds stays."""
    if isinstance(x, Tensor):
        return change(x)
    if isinstance(x, tuple):
        parts = [convert(part, change) for part in x]
        return type(x)(*parts) if hasattr(x, "_fields") else tuple(parts)
    return x


def widened(x: Any) -> Any:
    """Floating-point tensors in float64; leaves stay leaves."""

    def wide(t: Tensor) -> Tensor:
        return t.detach().double().requires_grad_(t.requires_grad) if t.is_floating_point() else t

    return convert(x, wide)


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """Uninitialised memory holds NaN, so that a number a kernel forgot to write shows."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    deterministic: Any = torch.utils.deterministic
    deterministic.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)
