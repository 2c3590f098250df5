"""Full fine-tuning without a wider copy of the weights: AdamW in float32, one weight at a time.

    w32 = float32(w);  AdamW(w32, gradient);  w = w32 rounded at random to bf16

To nearest, an update below half a bf16 step (2^-9 of the weight) is lost every time, which at rates
of 1e-5 is nearly every update. Rounded up with the probability of the remainder none is lost on
average (https://arxiv.org/abs/2010.06192). Memory a parameter: 2 bytes of weight, 4 of gradient and
AdamW's moments, 8 bytes or with `adamw_8bit` 2, against 18 or 12 with float32 masters; and 4 bytes for
the one weight at work.

The optimizer itself is the library's. Each of its parameters is an empty stand-in that holds its weight
and gradient only while it is updated, so state, checkpoints and schedules are what they always are.
The random numbers are keyed by seed, update and weight: a resumed run rounds as an uninterrupted one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn


class Update(NamedTuple):
    """What one optimizer step did; both stay on the device until somebody reads them.

    norm: fp32/fp64 scalar, the global gradient norm before clipping.
    skipped: fp32 scalar, 1 where the norm was not finite and nothing was changed, else 0.
    """

    norm: Tensor
    skipped: Tensor


def round_at_random(x: Tensor, out: Tensor, generator: torch.Generator) -> None:
    """float32 x to bfloat16 out of the same shape: to one of the two neighbours, the nearer one likelier.

    A bf16 number is the upper half of a float32: 16 random bits are added to the lower half, then cut.
    Infinities stay, as does NaN.
    """
    bits = x.view(torch.int32)
    noise = torch.empty_like(bits).random_(0, 1 << 16, generator=generator)
    cut = noise.add_(bits).bitwise_and_(-(1 << 16)).view(torch.float32)
    out.copy_(torch.where(torch.isfinite(x), cut, x))


class RoundedOptimizer:
    """An optimizer of torch or bitsandbytes over bf16 weights and float32 gradients.

    weights: each with the float32 sum of its gradient; make: groups of parameters -> the optimizer.
    """

    def __init__(
        self,
        weights: Sequence[tuple[nn.Parameter, Tensor]],
        make: Callable[[Sequence[nn.Parameter]], torch.optim.Optimizer],
        seed: int,
    ) -> None:
        self.weights, self.seed, self.updates = list(weights), seed, 0
        device = self.weights[0][0].device
        self._empty = torch.empty(0, device=device)
        number = torch.empty((), device=device)  # of the weight's shape, without its memory
        self._stand_ins = [nn.Parameter(number.expand(weight.shape)) for weight, _ in self.weights]
        self.inner = make(self._stand_ins)
        for stand_in in self._stand_ins:
            stand_in.data = self._empty
        self._numbers = {id(weight): i for i, (weight, _) in enumerate(self.weights)}
        self._generator = torch.Generator(device)
        self._early: list[Tensor] = []  # squared norms of what was updated during backward
        self._done: set[int] = set()

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return self.inner.param_groups

    @property
    def state(self) -> Any:
        return self.inner.state

    def update(self, rate: float, max_norm: float | None) -> Update:
        """Clip, update, clear the gradients; skip if their norm is not finite."""
        rest = [i for i in range(len(self.weights)) if i not in self._done]
        squares = [*self._early, *self._squares(rest)]
        norm = torch.stack(squares).sum().sqrt()
        if max_norm is not None:
            share = torch.clamp(max_norm / (norm + 1e-6), max=1.0)
            torch._foreach_mul_([self.weights[i][1] for i in rest], share)
        skipped = torch.isfinite(norm).logical_not().float()
        self._take(rest, rate, skipped)
        self.updates += 1
        self._early, self._done = [], set()
        return Update(norm, skipped)

    def update_early(self, weights: Iterable[nn.Parameter], rate: float) -> None:
        """Update these weights already, while backward goes on; their gradients' memory is free then.

        Where they are not finite these weights stay as they are.
        """
        numbers = [self._numbers[id(weight)] for weight in weights]
        squares = self._squares(numbers)
        self._early += squares
        skipped = torch.isfinite(torch.stack(squares).sum()).logical_not().float()
        self._take(numbers, rate, skipped)
        self._done.update(numbers)

    def _squares(self, numbers: Sequence[int]) -> list[Tensor]:
        norms = torch._foreach_norm([self.weights[i][1] for i in numbers])
        return [norm.square() for norm in norms]

    def _take(self, numbers: Sequence[int], rate: float, skipped: Tensor) -> None:
        for group in self.param_groups:
            group["lr"] = rate
        fused = isinstance(self.inner, torch.optim.AdamW)
        if not fused and skipped.item():  # bitsandbytes waits for the device anyway
            self.zero_grad()
            return
        if fused:  # read by the kernel itself, as torch's GradScaler has it
            self.inner.found_inf = skipped  # type: ignore[attr-defined]
        for i in numbers:
            weight, gradient = self.weights[i]
            stand_in = self._stand_ins[i]
            stand_in.data = weight.detach().float()
            stand_in.grad = gradient
            self.inner.step()  # whoever has no gradient is passed over
            self._generator.manual_seed(hash((self.seed, self.updates, i)))
            round_at_random(stand_in.data, weight.detach(), self._generator)
            stand_in.grad, stand_in.data = None, self._empty
            gradient.zero_()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clears the sums; they are never set to None."""
        for _, gradient in self.weights:
            gradient.zero_()
        self._early, self._done = [], set()

    def state_dict(self) -> dict[str, Any]:
        return {"inner": self.inner.state_dict(), "updates": self.updates}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.inner.load_state_dict(state["inner"])
        self.updates = state["updates"]
