"""What was changed in a model, why the rest was not, and how it is all taken back.

A change is an attribute `forward` of one module instance, which Python finds before the class's; neither
classes nor other models know of it. accelerate's hooks (device_map) put a `forward` of their own on an
instance and keep the old one as `_old_forward`: then ours goes there, inside their hook.

Before a forward of ours may stay, the module is run as it was and again with ours, on a small random
input, forwards and backwards, and the numbers must agree. So what a module is decides by what it does,
not by what it is called.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import MethodType, TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from fastsft.model.probes import difference

Forward = Callable[..., Any]  # a forward as a function: its first argument is the module
Probe = Callable[[nn.Module], Sequence[Tensor]]  # runs a module; outputs and gradients

# What a module of another library may raise when it is called as its kind is usually called.
DOES_NOT_RUN = (RuntimeError, ValueError, TypeError, AttributeError, AssertionError)

_ABSENT = object()


class Rebinding:
    """One module's forward, ours until undone; `make(original)` returns ours.

    The functions take the module as argument and hold no reference to it, so that a deep copy of a
    model works on its own weights.
    """

    def __init__(self, module: nn.Module, make: Callable[[Forward], Forward]) -> None:
        self.module = module
        hooked = "_hf_hook" in vars(module) and "_old_forward" in vars(module)
        self.slot = "_old_forward" if hooked else "forward"
        self.before = vars(module).get(self.slot, _ABSENT)
        self.active = True
        original = self._as_function()
        ours = make(original)

        def forward(this: nn.Module, *args: Any, **kwargs: Any) -> Any:
            return (ours if self.active else original)(this, *args, **kwargs)

        # The signature as it was: trainers and `generate` ask a model what it accepts. Not by way of
        # functools.wraps, whose __wrapped__ accelerate follows to take wrappers off.
        signature = inspect.signature(getattr(module, self.slot))
        this = inspect.Parameter("self", inspect.Parameter.POSITIONAL_ONLY)
        parameters = [this, *signature.parameters.values()]
        forward.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
        forward.fastsft = self  # type: ignore[attr-defined]
        self.forward = forward
        setattr(module, self.slot, MethodType(forward, module))

    def _as_function(self) -> Forward:
        before = self.before
        if before is _ABSENT:
            return type(self.module).forward
        if isinstance(before, MethodType) and before.__self__ is self.module:
            return before.__func__
        assert callable(before)
        return lambda this, *args, **kwargs: before(*args, **kwargs)

    def undo(self) -> None:
        """Put back what was there. Where others have wrapped ours since, it stays and does nothing."""
        self.active = False
        bound = vars(self.module).get(self.slot)
        if getattr(bound, "__func__", None) is not self.forward:
            return
        if self.before is _ABSENT:
            delattr(self.module, self.slot)
        else:
            setattr(self.module, self.slot, self.before)


def is_ours(module: nn.Module) -> bool:
    """Whether a Rebinding is at work on `module`."""
    slots = (vars(module).get(slot) for slot in ("forward", "_old_forward"))
    found = (getattr(getattr(bound, "__func__", None), "fastsft", None) for bound in slots)
    return any(rebinding is not None and rebinding.active for rebinding in found)


@dataclass(frozen=True)
class Change:
    """One line of the report. `now` is empty where the module was left alone; then `why` says why."""

    part: str
    name: str
    was: str
    now: str = ""
    why: str = ""


@dataclass(frozen=True)
class Plan:
    """How a module would be changed: to what, by which forward, and how it is tried; or `why` not."""

    now: str = ""
    make: Callable[[Forward], Forward] = lambda original: original
    probe: Probe = lambda module: ()
    precision: torch.dtype = torch.float32  # the lowest that products run in
    why: str = ""


class Changes:
    """What `accelerate` did to a model. Printed, a report; as a context manager, undone at the end."""

    def __init__(self, model: str) -> None:
        self.model = model
        self.entries: list[Change] = []
        self._undo: list[Callable[[], None]] = []

    @property
    def changed(self) -> list[Change]:
        return [entry for entry in self.entries if entry.now]

    @property
    def left(self) -> list[Change]:
        return [entry for entry in self.entries if not entry.now]

    def count(self, part: str) -> int:
        """How many modules of a part (norm, mlp, lora, nf4, attention, loss) were changed."""
        return sum(entry.part == part for entry in self.changed)

    def record(self, entry: Change) -> None:
        self.entries.append(entry)

    def on_undo(self, undo: Callable[[], None]) -> None:
        """To be said before or as a change is made, so that a failure behind it takes it back too."""
        self._undo.append(undo)

    def take_back(self) -> None:
        """Undo the latest change alone."""
        self._undo.pop()()

    def rebind(
        self, part: str, name: str, module: nn.Module, planned: Callable[[Any], Plan]
    ) -> None:
        """Rebind `module` as planned if ours gives its numbers; record it either way."""
        was = type(module).__name__
        why = unusable(module)
        if not why:
            with torch.enable_grad(), evaluating(module):
                try:
                    plan = planned(module)
                    expected = plan.probe(module)
                except DOES_NOT_RUN as error:
                    why = f"it does not run on a small input: {error}"
                else:
                    why = plan.why or self._try(module, plan, expected)
        self.record(Change(part, name, was, "" if why else plan.now, why))

    def _try(self, module: nn.Module, plan: Plan, expected: Sequence[Tensor]) -> str:
        """Rebind; undo it where the numbers differ, and say how."""
        self.on_undo(Rebinding(module, plan.make).undo)
        why = disagreement(plan.probe(module), expected, plan.precision)
        if why:
            self.take_back()
        return why

    def undo(self) -> None:
        """Make the model what it was. A second call does nothing."""
        while self._undo:
            self.take_back()

    def __enter__(self) -> Changes:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.undo()

    def __str__(self) -> str:
        lines = [f"fastsft in {self.model}", *_table(self.changed, " -> ", lambda entry: entry.now)]
        if not self.changed:
            lines.append("  nothing was changed")
        if self.left:
            lines += ["left alone", *_table(self.left, ": ", lambda entry: entry.why)]
        return "\n".join(lines)


def _table(entries: Sequence[Change], sign: str, what: Callable[[Change], str]) -> list[str]:
    """A line for each part and text: how many modules, of which kind, the first one's name."""
    groups: dict[tuple[str, str, str], list[str]] = {}
    for entry in entries:
        groups.setdefault((entry.part, entry.was, what(entry)), []).append(entry.name)
    lines = []
    for (part, was, text), names in groups.items():
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        where = f"  ({names[0]}{more})" if names[0] else ""
        lines.append(f"  {part:<10}{len(names):>4}  {was}{sign}{text}{where}")
    return lines


# --- running a module to see what it does ------------------------------------------------------------


def unusable(module: nn.Module) -> str:
    """Why `module` cannot be run on its own here; empty where it can."""
    if is_ours(module):
        return "it was changed before; undo that first"
    for inner in module.modules():
        hooks = getattr(inner, "_hf_hook", None)
        if any(getattr(hook, "offload", False) for hook in getattr(hooks, "hooks", [hooks])):
            return "its weights are offloaded"
    for parameter in module.parameters():
        sharded = hasattr(parameter, "device_mesh") or not parameter.numel()  # DTensor; ZeRO-3
        if sharded or parameter.device.type == "meta":
            return "its weights are not here (sharded, or on the meta device)"
    return ""


def has_hooks(module: nn.Module) -> bool:
    """Whether somebody's hooks stand on `module`, which reading its weight would pass by."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    )


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """`module` and all inside it in evaluation mode for a while: no dropout."""
    flags = [(inner, inner.training) for inner in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for inner, training in flags:
            inner.training = training


def probe_input(rows: int, columns: int, like: Tensor, dtype: torch.dtype) -> Tensor:
    """Random [rows, columns] that requires a gradient, off centre, its rows of different sizes.

    The smallest row is of the size of a norm's epsilon. torch's own random state is left alone.
    """
    generator = torch.Generator().manual_seed(rows * columns)
    x = torch.randn(rows, columns, generator=generator) + 0.25
    x *= torch.logspace(0, -3, rows)[:, None]
    return x.to(like.device, dtype).requires_grad_()


def with_gradients(y: Tensor, inputs: Sequence[Tensor]) -> list[Tensor]:
    """y and the gradients of a random weighing of it; no gradient is accumulated anywhere."""
    generator = torch.Generator().manual_seed(1)
    upstream = torch.randn(y.shape, generator=generator).to(y.device, y.dtype)
    return [y.detach(), *torch.autograd.grad(y, list(inputs), upstream)]


def tolerance(dtype: torch.dtype) -> float:
    """Largest allowed difference of a tensor, relative to its size."""
    exact = dtype in (torch.float32, torch.float64)
    return 1e-5 if exact and torch.get_float32_matmul_precision() == "highest" else 2e-2


def disagreement(
    found: Sequence[Tensor], expected: Sequence[Tensor], precision: torch.dtype
) -> str:
    """Empty where two runs of a probe agree, tensor by tensor; else what differs."""
    for x, y in zip(found, expected, strict=True):
        if x.dtype != y.dtype or x.shape != y.shape:
            return f"it returns {y.dtype} {list(y.shape)}, ours {x.dtype} {list(x.shape)}"
        apart = difference(x, y)
        if not apart <= max(tolerance(precision), tolerance(y.dtype)):
            return f"its numbers and ours differ by {apart:.0e}"
    return ""
