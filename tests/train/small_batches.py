"""Small batches, packed and padded, and how two runs of a model over them are compared."""

from __future__ import annotations

import torch
from torch import Tensor, nn

FAMILIES = (
    "llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "phi3", "olmo2", "granite", "smollm3",
)  # fmt: skip
IDS = torch.randint(1, 96, (3, 17), generator=torch.Generator().manual_seed(0))
LABELS = torch.where(torch.arange(17) % 4 == 1, -100, IDS)
PADDING = torch.ones_like(IDS)
PADDING[0, 12:] = 0
PADDING[1, :4] = 0
# No token counts that is padding, or that padding would have to predict.
PADDED_LABELS = torch.where(PADDING.bool() & PADDING.roll(1, 1).bool(), LABELS, -100)
POSITIONS = torch.cat([torch.arange(n) for n in (9, 1, 7)])[None]
# transformers looks for packing only where it makes no cache.
PACKED = {"position_ids": POSITIONS, "use_cache": False}


def gradients(model: nn.Module, **batch: object) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad()
    loss = model(**batch).loss
    loss.backward()
    found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return loss.detach(), {name: gradient.clone() for name, gradient in found.items()}


def assert_close_gradients(found: dict, expected: dict, tolerance: float = 1e-5) -> None:
    # Some gradients are zero in exact arithmetic (the bias of a key projection): compare to the whole's size.
    assert found.keys() == expected.keys()
    size = max(float(g.norm()) for g in expected.values())
    for name, gradient in expected.items():
        apart = float((found[name] - gradient).norm())
        assert apart <= tolerance * max(float(gradient.norm()), 0.01 * size), name


def assert_same_gradients(found: dict, expected: dict) -> None:
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def close(x: Tensor, y: Tensor) -> bool:
    return float((x - y).norm()) <= 1e-5 * float(y.norm())


def assert_untouched(model: nn.Module) -> None:
    assert not [n for n, m in model.named_modules() if {"forward", "_old_forward"} & vars(m).keys()]
