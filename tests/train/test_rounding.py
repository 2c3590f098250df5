"""Training bf16 weights without masters: rounding at random, and updates during backward."""

from __future__ import annotations

import math

import pytest
import torch
from runs import lines, run, same, series
from safetensors.torch import load_file
from torch import nn

from fastsft.config import make_config
from fastsft.errors import UserError
from fastsft.optim import apply_update, build_optimizer
from fastsft.rounding import RoundedOptimizer, round_at_random

FULL = {"method": "full", "dtype": "bf16", "masters": "bf16", "learning_rate": 5e-4}
EARLY = {**FULL, "max_grad_norm": None, "update_in_backward": True}


def neighbours(x):
    """The bf16 numbers around each float32, by float64 arithmetic on the spacing."""
    exponent = torch.floor(torch.log2(x.double().abs()))
    spacing = 2.0 ** (exponent - 7)
    low = torch.floor(x.double() / spacing) * spacing
    return low, low + spacing


def test_rounding_gives_a_neighbour_and_the_mean_is_the_number():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(500, generator=generator) * 10.0 ** torch.randint(-6, 6, (500,))
    out, total, draws = torch.empty(500, dtype=torch.bfloat16), torch.zeros(500).double(), 2000
    low, high = neighbours(x)
    for _ in range(draws):
        round_at_random(x, out, generator)
        assert bool(((out.double() == low) | (out.double() == high)).all())
        total += out.double()
    spread = (high - low) / 2 / math.sqrt(draws)  # at most: a coin between two numbers
    assert bool(((total / draws - x.double()).abs() <= 5 * spread).all())


def test_what_rounding_leaves_alone():
    kept = torch.tensor([0.0, -0.0, 1.0, -2.5, math.inf, -math.inf, math.nan])
    out = torch.empty(7, dtype=torch.bfloat16)
    round_at_random(kept, out, torch.Generator().manual_seed(1))
    assert torch.allclose(out.float(), kept, rtol=0, atol=0, equal_nan=True)


def weights(*shapes):
    generator = torch.Generator().manual_seed(3)
    made = [nn.Parameter(torch.randn(shape, generator=generator).bfloat16()) for shape in shapes]
    return made, [torch.randn(shape, generator=generator) for shape in shapes]


def rounded(config, made, gradients):
    named = [(str(i), p) for i, p in enumerate(made)]
    sums = dict(zip(made, (g.clone() for g in gradients), strict=True))
    optimizer = build_optimizer(named, config, sums)
    assert isinstance(optimizer, RoundedOptimizer)
    return optimizer


def config_of(**more):
    return make_config({"model": "m", "data": "d", **FULL, "weight_decay": 0.1, **more})


@pytest.mark.parametrize("max_norm", [None, 0.3])
def test_an_update_is_adamw_in_float32_rounded(max_norm):
    made, gradients = weights((24, 16), (7,))
    wide = [nn.Parameter(p.detach().float()) for p in made]
    for p, gradient in zip(wide, gradients, strict=True):
        p.grad = gradient.clone()
    config = config_of()
    theirs = build_optimizer([(str(i), p) for i, p in enumerate(wide)], config)
    optimizer = rounded(config, made, gradients)
    wanted = apply_update(theirs, 0.01, max_norm)
    found = apply_update(optimizer, 0.01, max_norm)
    assert float(found.norm) == pytest.approx(float(wanted.norm), rel=1e-6)
    for ours, exact, (_, gradient) in zip(made, wide, optimizer.weights, strict=True):
        low, high = neighbours(exact.detach())
        assert bool(((ours.double() == low) | (ours.double() == high)).all())
        assert not gradient.any()
    assert [s["exp_avg"].dtype for s in optimizer.state.values()] == [torch.float32] * 2


def test_small_updates_are_not_lost():
    """Steps of a hundredth of bf16's spacing at 1: to nearest, nothing would ever move."""
    made, _ = weights((4096,))
    made[0].data.fill_(1.0)
    optimizer = rounded(config_of(weight_decay=0.0), made, [torch.ones(4096)])
    for _ in range(50):
        optimizer.weights[0][1].fill_(1.0)
        apply_update(optimizer, 2.0**-8 / 100, None)
    assert float(made[0].double().mean()) == pytest.approx(1 - 50 * 2.0**-8 / 100, abs=3e-4)


def test_every_weight_and_every_update_is_rounded_by_numbers_of_its_own():
    """Equal weights with equal gradients: what they round to differs, and between updates too."""
    start = torch.full((4096,), 1.0).bfloat16()
    made = [nn.Parameter(start.clone()) for _ in range(2)]
    optimizer = rounded(config_of(weight_decay=0.0), made, [torch.zeros(4096)] * 2)
    seen = []
    for _ in range(2):
        for weight, total in optimizer.weights:
            weight.data.copy_(start)
            total.fill_(1.0)
        apply_update(optimizer, 2.0**-10, None)
        seen += [weight.detach().clone() for weight, _ in optimizer.weights]
    assert all(0 < int((w != start).sum()) < 4096 for w in seen)
    pairs = [(0, 1), (0, 2), (1, 3), (2, 3)]
    assert not any(torch.equal(seen[i], seen[j]) for i, j in pairs)


def test_a_gradient_that_is_not_finite_changes_nothing():
    made, gradients = weights((8, 8), (5,))
    gradients[1][2] = math.nan
    before = [p.detach().clone() for p in made]
    optimizer = rounded(config_of(), made, gradients)
    assert float(apply_update(optimizer, 0.1, 1.0).skipped) == 1
    assert all(torch.equal(p, b) for p, b in zip(made, before, strict=True))
    assert not any(g.any() for _, g in optimizer.weights)


def test_state_goes_through_a_checkpoint():
    config, (made, gradients) = config_of(), weights((24, 16), (7,))
    first = rounded(config, made, gradients)
    apply_update(first, 0.01, None)
    copies = [nn.Parameter(p.detach().clone()) for p in made]
    second = rounded(config, copies, gradients)
    second.load_state_dict(first.state_dict())
    for optimizer in (first, second):
        for (_, total), gradient in zip(optimizer.weights, gradients, strict=True):
            total.copy_(gradient)
        apply_update(optimizer, 0.01, None)
    assert all(torch.equal(p, q) for p, q in zip(made, copies, strict=True))


def test_moments_in_8_bits():
    """Through bitsandbytes, on weights large enough to be quantised: near AdamW's own step."""
    made, gradients = weights((96, 64))
    before = made[0].detach().float().clone()
    optimizer = rounded(config_of(optimizer="adamw_8bit", weight_decay=0.0), made, gradients)
    apply_update(optimizer, 0.05, None)
    assert {s["state1"].dtype for s in optimizer.state.values()} == {torch.uint8}
    moved = made[0].detach().float() - before
    assert torch.equal(moved.sign(), -gradients[0].sign())
    assert float(moved.abs().mean()) == pytest.approx(0.05, rel=0.02)


# --- whole runs -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tmp_path_factory.mktemp("rounding")


def test_a_run_learns_and_resumes(place):
    whole = run(place, **FULL, max_steps=12, save_steps=6).output_dir
    losses = series(whole)
    wide = series(run(place, **{**FULL, "masters": "fp32"}, max_steps=12).output_dir)
    assert losses[-1] < losses[0] - 0.1
    assert losses == pytest.approx(wide, rel=0.02)
    half = place / "half"
    run(place, **FULL, max_steps=12, save_steps=6, output_dir=str(half))
    for file in (half / "model").iterdir():
        file.unlink()
    (half / "model").rmdir()
    (half / "summary.json").unlink()
    resumed = run(
        place, **FULL, max_steps=12, save_steps=6, output_dir=str(half),
        resume=str(half / "checkpoints" / "step-000006"),
    ).output_dir  # fmt: skip
    assert lines(resumed) == lines(whole)
    weights_of = [load_file(folder / "model" / "model.safetensors") for folder in (whole, resumed)]
    assert same(*weights_of)


def test_updates_in_backward_are_those_after_it(place):
    """The same rounding, so the same weights bit for bit; and their gradients shared one block's memory."""
    late = {**EARLY, "update_in_backward": False}
    runs = [run(place, **keys, max_steps=4, batch_size=4).output_dir for keys in (late, EARLY)]
    first, second = (load_file(folder / "model" / "model.safetensors") for folder in runs)
    assert same(first, second)
    assert series(runs[0]) == series(runs[1])
    norms = [series(folder, "grad_norm") for folder in runs]
    assert norms[0] == pytest.approx(norms[1], rel=1e-6)


def test_what_cannot_be_is_refused(place):
    with pytest.raises(UserError, match="step 1 has 4 micro-batches"):
        run(place, **EARLY, max_steps=2, batch_size=4, micro_batch_tokens=1)
    with pytest.raises(UserError, match=r"masters: bf16 needs products in bf16.*torch\.float32"):
        run(place, **{**FULL, "dtype": "fp32"})
    for keys, words in (
        ({"method": "lora", "masters": "bf16"}, "masters: bf16 is for method: full"),
        ({**FULL, "engine": "compat"}, "masters: bf16 is for method: full on the fast engine"),
        ({**EARLY, "max_grad_norm": 1.0}, "max_grad_norm: null"),
        ({**EARLY, "masters": "fp32"}, "it needs masters: bf16"),
    ):
        with pytest.raises(UserError, match=words):
            make_config({"model": "m", "data": "d", **keys})
