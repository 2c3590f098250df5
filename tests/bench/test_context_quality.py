"""The search for the longest context, the budget it runs under, and what loss curves must show."""

import pytest
import torch

from bench import context, quality
from bench.train.budget import SavedTensors


def searched(fixed, per_token, budget, unit=8, first=64):
    """The answer and the number of probes, on a memory that grows on a line."""
    probes = []
    while (tokens := context.next_length(probes, budget, unit, first)) is not None:
        peak = fixed + per_token * tokens
        probes.append({"tokens": tokens, "fits": peak <= budget, "peak_bytes": peak})
        probes.sort(key=lambda p: p["tokens"])
        assert len(probes) < 40, "no end"
    good = [p["tokens"] for p in probes if p["fits"]]
    return max(good, default=0), len(probes)


@pytest.mark.parametrize("budget", [700, 5_000, 123_457, 8_000_000])
@pytest.mark.parametrize("per_token", [1, 7.3, 90])
def test_the_search_comes_within_three_per_cent(budget, per_token):
    fixed = 600
    true = (budget - fixed) / per_token
    longest, probes = searched(fixed, per_token, budget)
    assert longest <= true
    assert longest >= min(true / 1.03, context.ENOUGH / 1.03) - 8 and probes <= 16
    assert longest % 8 == 0


def test_the_search_ends_where_nothing_fits():
    assert searched(1000, 1, 900)[0] == 0


def test_memory_that_bends_does_not_mislead_the_search():
    """Quadratic beyond 1,000 tokens: the line is wrong, halving finds the answer all the same."""
    probes = []
    while (tokens := context.next_length(probes, 10**6, 8, 64)) is not None:
        peak = 100 * tokens + max(0, tokens - 1000) ** 2
        probes.append({"tokens": tokens, "fits": peak <= 10**6, "peak_bytes": peak})
        probes.sort(key=lambda p: p["tokens"])
    longest = max(p["tokens"] for p in probes if p["fits"])
    assert 1900 / 1.05 < longest <= 1901 and len(probes) < 25


def test_a_search_goes_on_from_its_rows():
    probes = [{"tokens": 64, "fits": True, "peak_bytes": 64}, {"tokens": 128, "fits": False}]
    assert 64 < context.next_length(probes, 100, 8, 64) < 128


def test_the_budget_on_a_cpu_counts_each_saved_storage_once():
    limit = SavedTensors(4096)
    weight = torch.randn(16, 16, requires_grad=True)  # 1 KiB

    def step(rows):
        with torch.autograd.graph.saved_tensors_hooks(limit.keep, lambda t: t):
            x = torch.ones(rows, 16)
            ((x @ weight) * (x @ weight).detach()).sum().backward()

    small, large = limit.measure(lambda: step(8)), limit.measure(lambda: step(1000))
    assert small["fits"] and not large["fits"]
    assert small["peak_bytes"] <= 4096 and limit.measure(lambda: step(8))["fits"]


# --- curves ---------------------------------------------------------------------------------------


def curve(who, seed, shift, method="lora"):
    losses = [5.0 / (1 + i / 50) + shift for i in range(60)]
    return {"kind": "curve", "model": "m", "method": method, "who": who, "seed": seed} | {
        "losses": losses
    }


def judged(*rows):
    return {(v.method, v.other): v for v in quality.verdicts(rows, "m")}


def test_curves_within_the_noise_of_two_seeds_agree():
    rows = [curve("fastsft", 0, 0), curve("fastsft", 1, 0.02), curve("trl", 0, 0.025)]
    verdict = judged(*rows)["lora", "trl"]
    assert verdict.agree and verdict.apart == pytest.approx(0.025)
    assert verdict.noise == pytest.approx(0.02)


def test_curves_beyond_the_noise_do_not():
    rows = [curve("fastsft", 0, 0), curve("fastsft", 1, 0.02), curve("trl", 0, 0.031)]
    assert not judged(*rows)["lora", "trl"].agree


def test_without_random_numbers_curves_must_be_one():
    full = [curve("fastsft", 0, 0, "full"), curve("trl", 0, 0.0019, "full")]
    assert judged(*full)["full", "trl"].agree
    full[1] = curve("trl", 0, 0.0021, "full")
    assert not judged(*full)["full", "trl"].agree


def test_a_curve_that_is_not_finite_never_agrees():
    broken = curve("trl", 0, float("nan"))
    assert not judged(curve("fastsft", 0, 0), broken)["lora", "trl"].agree


def test_a_pair_without_both_curves_is_not_judged():
    assert judged(curve("fastsft", 0, 0)) == {}
