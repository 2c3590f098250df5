"""Which implementation runs an op, and how a Triton kernel is launched.

A public function checks its arguments, asks `select` for the implementation and calls it. The
two candidates have one signature: `reference.<op>` in plain torch, and `triton_ops.<file>.<op>`.

Every Triton kernel is launched through `launch`, with a configuration from `pinned`. That one
gate gives three things: a tensor on another card than the current one is launched there; an empty
grid launches nothing; and inside `record_launches` ops on meta tensors note what they would have
launched instead. The static report compiles such records, and a test counts them.

Which of several configurations or implementations is fastest is a matter of measurement, not of
opinion: `pinned` and `variant` take the first candidate unless `choices.json` holds another for
the card, put there by the benchmark that measured it.
"""

from __future__ import annotations

import importlib.util
import json
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastsft_kernels.checks import bad, describe

BACKENDS = ("reference", "triton")
_CHOICES = Path(__file__).with_name("choices.json")

# Op -> the file of `triton_ops` that holds its Triton implementation.
TRITON_OPS: dict[str, str] = {
    "attention_backward": "attention_backward",
    "attention_delta": "attention_delta",
    "attention_forward": "attention",
    "cross_entropy": "cross_entropy",
    "cross_entropy_": "cross_entropy",
    "geglu": "glu",
    "glu_backward": "glu_adapters",
    "glu_forward": "glu",
    "linear_cross_entropy": "cross_entropy",
    "lora_linear": "lora",
    "nf4_dequantize": "nf4",
    "nf4_dequantize_group": "nf4",
    "nf4_quantize": "nf4",
    "pack_adapters": "pack",
    "rms_norm": "rms_norm",
    "rms_norm_backward": "rms_norm",
    "rms_norm_forward": "rms_norm",
    "rope": "rope",
    "rope_": "rope",
    "skinny_dA": "skinny",
    "skinny_dB": "skinny",
    "swiglu": "glu",
    "tails": "tails",
    "varlen_attention": "attention",
}

# What the interpreter and a recording take a card to be: compute capability times ten, and its
# multiprocessors. A recording names its own.
_INTERPRETED = (90, 4)


@dataclass
class Launch:
    """One launch of a recording: what `launch` was given."""

    kernel: Any
    grid: tuple[int, ...]
    args: tuple[Any, ...]
    options: dict[str, Any]


@dataclass
class Recording:
    """Launches and chosen configurations seen by `record_launches`."""

    capability: int
    multiprocessors: int
    card: str = ""  # whose measured choices apply
    launches: list[Launch] = field(default_factory=list)
    candidates: dict[str, int] = field(default_factory=dict)  # of each `pinned` name: how many
    choices: dict[str, list[Any]] = field(default_factory=dict)  # of `pinned` and `variant`: all


_recording: Recording | None = None
_forced: dict[str, Any] = {}


def select(op: str, backend: str | None, x: Tensor) -> Callable[..., Any]:
    """The function that runs `op` on tensors such as `x`.

    None takes the best there is: Triton on a GPU, the reference elsewhere and for float64. A
    backend that is named is never replaced by another. Raises ValueError for an unknown backend,
    and for "triton" where it cannot run.
    """
    backend = backend or _forced.get("backend")
    if backend is None:
        return _implementation(op, _best(op, x))
    if backend not in BACKENDS:
        raise bad(op, "unknown backend", repr(backend), "Pass None, 'reference' or 'triton'.")
    if backend == "triton":
        reason = _obstacle(op, x)
        if reason:
            raise bad(op, f"Triton cannot run here: {reason}", describe(x), "Pass backend=None.")
    return _implementation(op, backend)


def explain(op: str, x: Tensor) -> tuple[str, str]:
    """(backend, reason) that backend=None chooses for tensors such as `x`; for a start-up table."""
    if _best(op, x) == "triton":
        return "triton", "Triton kernel"
    return "reference", _obstacle(op, x) or "runs on a CPU"


def interpreting() -> bool:
    """Whether Triton's interpreter is on: kernels then run on CPU tensors, slowly."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def _best(op: str, x: Tensor) -> str:
    on_gpu = x.device.type == "cuda" or (x.device.type == "meta" and _recording is not None)
    if not on_gpu:
        return "reference"
    if not has_triton():
        _warn_without_triton()
    return "reference" if _obstacle(op, x) else "triton"


def _obstacle(op: str, x: Tensor) -> str:
    """Why Triton cannot run `op` on `x`; empty where it can."""
    if op not in TRITON_OPS:
        return "there is no Triton kernel for this op"
    if not has_triton():
        return "the package triton is not installed"
    if x.dtype == torch.float64:
        return "the kernels compute in float32, and x is float64"
    kind = x.device.type
    if kind == "cuda" or (kind == "meta" and _recording) or (kind == "cpu" and interpreting()):
        return ""
    return f"x is on {x.device}, not on a GPU"


@cache
def has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


@cache
def _warn_without_triton() -> None:
    warnings.warn(
        "fastsft_kernels: tensors are on a GPU, but the package triton is not installed; plain "
        "torch runs instead, several times slower. Install triton.",
        stacklevel=4,
    )


@cache
def _implementation(op: str, backend: str) -> Callable[..., Any]:
    name = "reference" if backend == "reference" else f"triton_ops.{TRITON_OPS[op]}"
    return getattr(importlib.import_module(f"fastsft_kernels.{name}"), op)


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
    """Launches `kernel` on the card of its first tensor; on meta tensors, records it."""
    if 0 in grid:
        return
    device = next(a.device for a in args if isinstance(a, Tensor))
    if device.type == "meta":
        assert _recording is not None, "a kernel was launched on meta tensors outside a recording"
        _recording.launches.append(Launch(kernel, grid, args, options))
    elif device.type == "cuda" and device.index != torch.cuda.current_device():
        with torch.cuda.device(device):
            start(kernel, grid, device, args, options)
    else:
        start(kernel, grid, device, args, options)


def start(
    kernel: Any,
    grid: tuple[int, ...],
    device: torch.device,
    args: tuple[Any, ...],
    options: dict[str, Any],
) -> None:
    """Launches `kernel` on `device`, the current card, as it was compiled for an earlier launch like this.

    Triton finds out at each launch which compiled kernel the arguments need, in several times the
    time of the launch itself. Here a key at least as fine as Triton's says so.
    """
    kinds = _kinds(args)
    if kinds is None:
        kernel[grid](*args, **options)
        return
    key = (id(kernel), device, kinds, *options, *options.values())
    ready = _ready.get(key)
    if ready is not None:
        _, compiled, rest = ready
        compiled[(*grid, 1, 1)[:3]](*args, *rest)
        return
    compiled = kernel[grid](*args, **options)
    if compiled is not None:  # the interpreter compiles nothing
        names = list(kernel.signature.parameters)[len(args) :]
        if set(names) <= set(options):
            _ready[key] = kernel, compiled, tuple(options[name] for name in names)


# Key of `start` -> (kernel, held so that its id stays its own; compiled; its last arguments).
_ready: dict[tuple[Any, ...], tuple[Any, Any, tuple[Any, ...]]] = {}


def _kinds(args: tuple[Any, ...]) -> tuple[Any, ...] | None:
    """What of the arguments decides on the compiled kernel; None if that is not known here.

    Of tensors the dtype and alignment to 16 bytes; of integers whether they are 1, divisible
    by 16 and within 32 bits, signed or not; of floats nothing.
    """
    kinds: list[Any] = []
    for a in args:
        kind = type(a)
        if kind is int:
            if -(2**31) <= a < 2**31:
                kinds.append(1 if a == 1 else 16 if a % 16 == 0 else 32)
            else:
                kinds.append((a % 16 == 0, a >= 2**63))
        elif isinstance(a, Tensor):
            kinds.append((a.dtype, a.data_ptr() % 16 == 0))
        elif kind is float or a is None:
            kinds.append(kind)
        elif kind is tuple:
            inner = _kinds(a)
            if inner is None:
                return None
            kinds.append(inner)
        else:
            return None
    return tuple(kinds)


@contextmanager
def record_launches(
    capability: int = 90, multiprocessors: int = 132, card: str = ""
) -> Iterator[Recording]:
    """Ops on meta tensors inside run their Triton path, recording launches instead of making them."""
    global _recording
    assert _recording is None, "recordings do not nest"
    _recording = Recording(capability, multiprocessors, card)
    try:
        yield _recording
    finally:
        _recording = None


def capability(x: Tensor) -> int:
    """Compute capability times ten of the card that `x` is on: 90 for Hopper."""
    if x.device.type == "cuda":
        return _properties(x.device)[0]
    return _recording.capability if _recording else _INTERPRETED[0]


def multiprocessors(x: Tensor) -> int:
    """How many multiprocessors the card of `x` has."""
    if x.device.type == "cuda":
        return _properties(x.device)[1]
    return _recording.multiprocessors if _recording else _INTERPRETED[1]


def shared_memory(x: Tensor) -> int:
    """Bytes of shared memory that one program may use on the card of `x`."""
    kib = {80: 163, 86: 99, 87: 163, 89: 99, 120: 99, 121: 99}
    return 1024 * kib.get(capability(x), 227)


@cache
def _properties(device: torch.device) -> tuple[int, int, str]:
    p = torch.cuda.get_device_properties(device)
    return 10 * p.major + p.minor, p.multi_processor_count, p.name


def pinned(name: str, candidates: Sequence[dict[str, int]], x: Tensor) -> dict[str, int]:
    """The launch configuration called `name`: constexprs, num_warps, num_stages.

    `candidates[0]` is the default. A choice recorded for the card, or one forced, must be among
    the candidates: configurations nobody compiled and checked do not run.
    """
    assert candidates
    if _recording is not None:
        _recording.candidates[name] = len(candidates)
        _recording.choices[name] = list(candidates)
    if name in _forced:
        return candidates[_forced[name] % len(candidates)]
    chosen = _recorded(x).get(name)
    return candidates[candidates.index(chosen) if chosen in candidates else 0]


def variant(name: str, candidates: Sequence[str], x: Tensor) -> str:
    """Which of several implementations of `name` runs; `candidates[0]` unless measured otherwise."""
    if _recording is not None:
        _recording.choices[name] = list(candidates)
    chosen = _forced.get(name) or _recorded(x).get(name)
    return candidates[candidates.index(chosen) if chosen in candidates else 0]


def forced_choice(name: str) -> Any:
    """What `forced` says for `name`, or None."""
    return _forced.get(name)


@contextmanager
def forced(**choices: Any) -> Iterator[None]:
    """Takes candidate number `choices[name]` of a `pinned`, or that `variant`: for tests and search.

    backend="triton" stands in for every backend=None, which the interpreter needs.
    """
    before = dict(_forced)
    _forced.update(choices)
    try:
        yield
    finally:
        _forced.clear()
        _forced.update(before)


def _recorded(x: Tensor) -> dict[str, Any]:
    if x.device.type == "cuda":
        return _choices().get(_properties(x.device)[2], {})
    return _choices().get(_recording.card, {}) if _recording is not None else {}


@cache
def _choices() -> dict[str, dict[str, Any]]:
    """Card -> name -> what was fastest there."""
    return json.loads(_CHOICES.read_text())
