"""Schedules against transformers', AdamW against torch's plain one, and what a NaN leaves behind."""

import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from fastsft.errors import UserError
from fastsft.optim import (
    apply_update,
    build_optimizer,
    clip_gradients,
    learning_rate,
    peak_learning_rate,
    warmup_steps,
)


def options(**changed: Any) -> Any:
    values = dict(
        method="lora",
        learning_rate=3e-4,
        lr_scheduler="cosine",
        warmup_ratio=0.0,
        warmup_steps=None,
        min_lr_ratio=0.0,
        decay_ratio=0.2,
        weight_decay=0.0,
        optimizer="adamw",
    )
    return SimpleNamespace(**{**values, **changed})


def their_rates(name: str, warmup: int, total: int, **extra: Any) -> list[float]:
    from transformers import get_scheduler

    parameter = nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=3e-4)
    scheduler = get_scheduler(name, optimizer, warmup, total, scheduler_specific_kwargs=extra)
    rates = []
    for _ in range(total + 2):  # two steps past the end, too
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return rates


def warming(steps: int) -> list[float]:
    """The rates of the warm-up: equal parts of the peak, the first of them not 0."""
    return [3e-4 * (step + 1) / (steps + 1) for step in range(steps)]


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant", "wsd"])
@pytest.mark.parametrize("minimum", [0.0, 0.1])
def test_no_update_has_rate_zero(schedule: str, minimum: float) -> None:
    config = options(lr_scheduler=schedule, min_lr_ratio=minimum, warmup_ratio=0.03)
    for total in range(1, 70):
        for warmup in (0, 1, 3, total, total + 5, warmup_steps(config, total)):
            rates = [learning_rate(step, total, warmup, config) for step in range(total)]
            assert all(0 < rate <= 3e-4 for rate in rates), (total, warmup)
            assert rates[:warmup] == sorted(rates[:warmup])


@pytest.mark.parametrize("total", [1, 2, 7, 100, 333])
@pytest.mark.parametrize("warmup", [0, 1, 5])
@pytest.mark.parametrize("minimum", [0.0, 0.1])
def test_schedules_equal_transformers(total: int, warmup: int, minimum: float) -> None:
    cases: list[tuple[str, str, dict[str, Any]]] = [
        ("constant", "constant_with_warmup", {}),
        ("cosine", "cosine_with_min_lr", {"min_lr_rate": minimum}),
    ]
    if minimum == 0.0:  # transformers' linear and cosine know no minimum
        cases += [("linear", "linear", {}), ("cosine", "cosine", {})]
    for ours, theirs, extra in cases:
        config = options(lr_scheduler=ours, min_lr_ratio=minimum)
        # past the end the plain cosine turns up again, theirs and ours
        got = [learning_rate(step, total, warmup, config) for step in range(total + 2)]
        expected = their_rates(theirs, warmup, total, **extra)
        assert got[warmup:] == pytest.approx(expected[warmup:], rel=1e-12, abs=0)
        assert got[:warmup] == pytest.approx(warming(warmup)[: total + 2], rel=1e-12, abs=0)


@pytest.mark.parametrize(("total", "warmup", "decay"), [(10, 2, 2), (100, 5, 20), (333, 0, 67)])
@pytest.mark.parametrize("minimum", [0.0, 0.25])
def test_wsd_equals_transformers(total: int, warmup: int, decay: int, minimum: float) -> None:
    config = options(lr_scheduler="wsd", min_lr_ratio=minimum)
    got = [learning_rate(step, total, warmup, config) for step in range(total + 2)]
    theirs = their_rates(
        "warmup_stable_decay", warmup, total, num_decay_steps=decay, min_lr_ratio=minimum
    )
    assert got[warmup:] == pytest.approx(theirs[warmup:], rel=1e-12, abs=0)
    assert got[:warmup] == pytest.approx(warming(warmup), rel=1e-12, abs=0)
    assert got[warmup] == 3e-4 and got[total - decay] == 3e-4 > got[total - decay + 1]


def test_linear_ends_at_its_minimum() -> None:
    config = options(lr_scheduler="linear", min_lr_ratio=0.1)
    assert learning_rate(0, 100, 0, config) == 3e-4
    assert learning_rate(50, 100, 0, config) == pytest.approx(3e-4 * 0.55)
    assert learning_rate(100, 100, 0, config) == pytest.approx(3e-5)


def test_warmup_ratio_rounds_up_and_steps_win() -> None:
    assert warmup_steps(options(warmup_ratio=0.03), 101) == 4
    assert warmup_steps(options(warmup_ratio=0.03, warmup_steps=9), 101) == 9


def test_auto_learning_rate_depends_on_the_method() -> None:
    assert peak_learning_rate(options(learning_rate="auto")) == 2e-4
    assert peak_learning_rate(options(learning_rate="auto", method="full")) == 1e-5
    assert peak_learning_rate(options(learning_rate=1)) == 1.0


def small_model(dtype: torch.dtype = torch.float64) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 7), nn.LayerNorm(7), nn.Linear(7, 3)).to(dtype)


def backward(model: nn.Module, step: int) -> None:
    generator = torch.Generator().manual_seed(step)
    dtype = next(model.parameters()).dtype
    x = torch.randn(4, 5, generator=generator, dtype=torch.float64).to(dtype)
    model(x).pow(2).sum().backward()


def test_updates_equal_plain_adamw_with_clipping() -> None:
    ours, plain = small_model(), small_model()
    config = options(weight_decay=0.1)
    optimizer = build_optimizer(ours.named_parameters(), config)
    matrices = [p for p in plain.parameters() if p.ndim == 2]
    vectors = [p for p in plain.parameters() if p.ndim == 1]
    reference = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}],
        betas=(0.9, 0.999),
        eps=1e-8,
        foreach=False,
    )
    for step in range(20):
        rate = learning_rate(step, 20, 0, config)
        backward(ours, step)
        backward(plain, step)
        update = apply_update(optimizer, rate, 1.0)
        norm = torch.nn.utils.clip_grad_norm_(plain.parameters(), 1.0)
        for group in reference.param_groups:
            group["lr"] = rate
        reference.step()
        reference.zero_grad()
        assert update.norm.item() == pytest.approx(norm.item(), rel=1e-12)
        assert update.skipped.item() == 0
    for a, b in zip(ours.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_weight_decay_spares_norms_and_biases() -> None:
    model = small_model()
    before = [p.detach().clone() for p in model.parameters()]
    optimizer = build_optimizer(model.named_parameters(), options(weight_decay=0.5))
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    apply_update(optimizer, 0.1, None)
    for old, new in zip(before, model.parameters(), strict=True):
        expected = old * (1 - 0.1 * 0.5) if old.ndim == 2 else old
        torch.testing.assert_close(new.detach(), expected)


def test_frozen_parameters_stay_out() -> None:
    model = small_model()
    model[0].requires_grad_(False)
    optimizer = build_optimizer(model.named_parameters(), options())
    assert sum(len(g["params"]) for g in optimizer.param_groups) == 4


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite_changes_nothing(bad: float) -> None:
    hurt, spared = small_model(), small_model()
    hurt_optimizer = build_optimizer(hurt.named_parameters(), options(weight_decay=0.1))
    spared_optimizer = build_optimizer(spared.named_parameters(), options(weight_decay=0.1))
    for step in range(3):
        backward(hurt, step)
        apply_update(hurt_optimizer, 1e-3, 1.0)
        if step == 1:
            backward(hurt, 99)
            hurt[2].weight.grad[0, 0] = bad
            update = apply_update(hurt_optimizer, 1e-3, 1.0)
            assert update.skipped.item() == 1 and not torch.isfinite(update.norm)
        backward(spared, step)
        apply_update(spared_optimizer, 1e-3, 1.0)
    for a, b in zip(hurt.parameters(), spared.parameters(), strict=True):
        assert torch.equal(a, b)  # weights, and through them moments and step counts


def test_no_limit_measures_only() -> None:
    parameter = nn.Parameter(torch.zeros(4))
    parameter.grad = torch.full((4,), 10.0)
    assert clip_gradients([parameter], None).item() == pytest.approx(20.0)
    assert torch.equal(parameter.grad, torch.full((4,), 10.0))
    assert clip_gradients([parameter], 1.0).item() == pytest.approx(20.0)
    assert parameter.grad.norm().item() == pytest.approx(1.0, rel=1e-5)


def test_no_value_is_read_inside_an_update() -> None:
    """On meta tensors a read fails: everything but the fused kernel runs there."""
    parameter = nn.Parameter(torch.zeros(4, 4, device="meta"))
    parameter.grad = torch.zeros(4, 4, device="meta")
    norm = clip_gradients([parameter], 1.0)
    assert norm.is_meta
    with pytest.raises((RuntimeError, NotImplementedError)):
        norm.item()


def test_optimizer_state_survives_a_round_trip(tmp_path: Any) -> None:
    kept, resumed = small_model(torch.float32), small_model(torch.float32)
    kept_optimizer = build_optimizer(kept.named_parameters(), options())
    for step in range(3):
        backward(kept, step)
        apply_update(kept_optimizer, 1e-3, 1.0)
    torch.save(kept_optimizer.state_dict(), tmp_path / "o.pt")
    resumed.load_state_dict(kept.state_dict())
    optimizer = build_optimizer(resumed.named_parameters(), options())
    optimizer.load_state_dict(torch.load(tmp_path / "o.pt", weights_only=True, mmap=True))
    for step in range(3, 6):
        for model, which in ((kept, kept_optimizer), (resumed, optimizer)):
            backward(model, step)
            apply_update(which, 1e-3, 1.0)
    for a, b in zip(kept.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b)


def test_eight_bit_adamw_follows_the_32_bit_one() -> None:
    pytest.importorskip("bitsandbytes")
    torch.manual_seed(0)
    target = torch.randn(64, 64)
    weights = {}
    for name in ("adamw", "adamw_8bit"):
        weight = nn.Parameter(torch.zeros(64, 64))
        optimizer = build_optimizer([("w", weight)], options(optimizer=name))
        for step in range(60):
            (weight - target).pow(2).sum().backward()
            if step == 30:
                weight.grad = torch.full_like(weight, float("nan"))
            skipped = apply_update(optimizer, 1e-2, None).skipped
            assert skipped.item() == (step == 30)
        weights[name] = weight.detach()
    assert next(iter(optimizer.state.values()))["state1"].dtype == torch.uint8
    gap = (weights["adamw"] - weights["adamw_8bit"]).abs().mean()
    assert 0 < gap < 0.02 < weights["adamw"].abs().mean()


def test_paged_without_a_gpu_is_refused_at_start() -> None:
    parameter = nn.Parameter(torch.zeros(4, 4))
    with pytest.raises(UserError, match=r"optimizer: paged_adamw_8bit .* on cpu.*optimizer=adamw"):
        build_optimizer([("w", parameter)], options(optimizer="paged_adamw_8bit"))


def test_missing_bitsandbytes_is_said_at_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    parameter = nn.Parameter(torch.zeros(4, 4))
    with pytest.raises(UserError, match="pip install bitsandbytes"):
        build_optimizer([("w", parameter)], options(optimizer="adamw_8bit"))


def test_bitsandbytes_without_a_kernel_is_said_at_start(monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken:
        def __init__(self, *_: Any, **__: Any) -> None: ...

        def step(self) -> None:
            raise NotImplementedError("no kernel for cpu\nmore")

    fake = SimpleNamespace(optim=SimpleNamespace(AdamW8bit=Broken))
    monkeypatch.setitem(sys.modules, "bitsandbytes", fake)
    with pytest.raises(UserError, match=r"no working adamw_8bit for cpu .*\(no kernel for cpu\)"):
        build_optimizer([("w", nn.Parameter(torch.zeros(4, 4)))], options(optimizer="adamw_8bit"))
