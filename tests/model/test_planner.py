"""The planner: what it chooses fits, nothing it could know is faster, and it says what would fit."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from fastsft_kernels.cards import CARDS
from live_bytes import LLAMA_8B
from transformers import AutoConfig

from fastsft.config import make_config
from fastsft.errors import UserError
from fastsft.model import planner
from fastsft.model.job import Job, ranks_of
from fastsft.model.memory import predict
from fastsft.model.plan import POLICIES, Plan
from fastsft.model.planner import (
    MARGIN,
    Budget,
    Wish,
    cheaper,
    fastest,
    largest_micro_batch,
    longest_context,
    plan_as_told,
)
from fastsft.model.planning import make_plan
from fastsft.model.spec import read_spec
from fastsft.model.speed import Load, packed, predict_speed

H200 = CARDS["NVIDIA H200"]
GB = 10**9


def job(method="qlora", layers=32, r=32, **more):
    spec = read_spec(AutoConfig.for_model("llama", **{**LLAMA_8B, "num_hidden_layers": layers}))
    return Job(spec, method, ranks_of(spec, "all-linear", r), **more)


def speed(a_job, plan, tokens, document, share=1.0):
    return predict_speed(a_job, plan, H200, packed(tokens, document, share)).tokens_per_second


# --- the plan ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("gb", [8, 12, 16, 24, 48, 141])
@pytest.mark.parametrize("method", ["lora", "qlora"])
def test_what_is_chosen_fits_and_holds_the_longest_row(gb, method):
    a_job, budget = job(method), Budget(gb * GB, host=64 * GB)
    for longest in (512, 4096, 16384, 50_000):
        found = fastest(a_job, H200, budget, Wish(longest, longest))
        if found is None:
            assert longest_context(a_job, budget) < longest
            continue
        assert found.micro_batch_tokens >= longest
        assert found.memory == predict(a_job, found.plan, found.micro_batch_tokens)
        assert found.memory.peak <= gb * GB * (1 - MARGIN)
        assert found.memory.host <= 64 * GB
        # Cheaper layers first: they are made again once those behind them have let go.
        order = [POLICIES.index(policy) for policy in found.plan.policies]
        assert order == sorted(order, reverse=True)


def test_no_mix_of_policies_is_faster():
    """Against every choice of a policy for each of five layers, in any order."""
    a_job = job(layers=5)
    tokens = 8192
    for budget in (Budget(round(x * GB)) for x in (6.4, 6.8, 7.5, 8.5, 9.5)):
        wish = Wish(tokens, 4096, micro_batch=tokens, built=Plan(("keep",) * 5))
        found = fastest(a_job, H200, budget, wish)
        speeds = [0.0]
        for policies in itertools.product(POLICIES, repeat=5):
            plan = Plan(policies)
            if budget.fits(predict(a_job, plan, tokens)):
                speeds.append(speed(a_job, plan, tokens, 4096))
        if found is None:
            assert max(speeds) == 0
        else:
            assert found.speed.tokens_per_second >= 0.985 * max(speeds)


def test_more_memory_is_never_slower():
    a_job = job()
    speeds = []
    for gb in (7, 8, 10, 12, 16, 20, 24, 32, 48, 80):
        found = fastest(a_job, H200, Budget(gb * GB), Wish(2048, 2048))
        speeds.append(found.speed.tokens_per_second if found else 0.0)
    assert all(b >= a * 0.998 for a, b in zip(speeds, speeds[1:], strict=False))
    assert speeds[-1] > 1.2 * speeds[2] > 0


def test_room_goes_to_resident_layers_last():
    found = fastest(job(), H200, Budget(141 * GB), Wish(4096, 4096))
    assert set(found.plan.policies) == {"keep"} and found.plan.resident == 32
    tight = fastest(job(), H200, Budget(16 * GB), Wish(4096, 4096))
    assert tight.plan.resident == 0 and "keep" not in tight.plan.policies[:1]


def test_host_memory_is_a_budget_too():
    a_job = job()
    free, bound = (Budget(12 * GB, host) for host in (None, 5 * GB))
    most = longest_context(a_job, bound)
    assert 0 < most < longest_context(a_job, free)
    found = fastest(a_job, H200, bound, Wish(most, most, micro_batch=most))
    assert found.memory.host <= 5 * GB < 32 * most * 4096 * 2
    assert "offload" in found.plan.policies and "recompute_block" in found.plan.policies


def test_the_longest_context_is_the_longest():
    a_job, budget = job(), Budget(12 * GB)
    for policy in (None, "recompute_block"):
        most = longest_context(a_job, budget, policy)
        fits = [
            fastest(a_job, H200, budget, Wish(n, n, policy, micro_batch=n)) is not None
            for n in (most, most + 64)
        ]
        assert fits == [True, False]
    plan = Plan(("recompute_block",) * 32)
    most = largest_micro_batch(a_job, budget, plan)
    assert budget.fits(predict(a_job, plan, most))
    assert not budget.fits(predict(a_job, plan, most + 64))


def test_what_the_user_fixes_is_kept():
    found = fastest(job(), H200, Budget(24 * GB), Wish(1000, 1000, "recompute_mlp", 3000))
    assert set(found.plan.policies) == {"recompute_mlp"} and found.micro_batch_tokens == 3000
    found = fastest(job(), H200, Budget(24 * GB), Wish(5000, 5000, None, 3000))
    assert found.micro_batch_tokens == 5000  # the longest row has its place


def test_cheaper_plans_end_and_keep_their_micro_batches(monkeypatch):
    a_job = job(layers=4)
    now = plan_as_told(a_job, H200, Plan(("keep",) * 4, resident=1), 8192)
    seen = [now]
    while (now := cheaper(a_job, H200, Budget(0), now)) is not None:
        assert now.memory.peak < seen[-1].memory.peak and now.micro_batch_tokens == 8192
        assert now.plan.resident == 1
        seen.append(now)
    assert len(seen) > 4 and "offload" in seen[-1].plan.policies
    # Policies change no bit; tiles, which change the order of sums, come after them.
    tiled = [p.plan.mlp_rows is not None for p in seen]
    assert tiled == sorted(tiled) and not tiled[1]


def test_tied_and_trained_ends_stay_on_the_device():
    wish = Wish(8192, 8192, micro_batch=8192)
    for a_job, hosted in (
        (job(), {"host_embedding", "host_head"}),
        (job(whole=frozenset({"head"})), {"host_embedding"}),
        (job(token_rows=3), set()),
        (replace(job(), spec=replace(job().spec, tied=True)), set()),
    ):
        rungs = list(planner._rungs(a_job, wish, 8192))
        assert {key for rung in rungs for key in rung if key.startswith("host")} == hosted


# --- the message --------------------------------------------------------------------------------


def config(**keys):
    return make_config({"model": "m", "data": "d", **keys})


def test_what_does_not_fit_says_what_would():
    cpu = torch.device("cpu")
    with pytest.raises(UserError) as error:
        make_plan(config(vram="12GB", method="lora"), job("lora"), cpu, 4096)
    said = str(error.value)
    assert "does not fit into 12 GB: weights, adapters and optimizer alone take 17." in said
    assert "method: qlora" in said and "adamw_8bit" in said
    a_job = job()
    most = longest_context(a_job, Budget(24 * GB, cuda=False), "keep")
    with pytest.raises(UserError) as error:
        make_plan(config(vram="24GB", activations="keep"), a_job, cpu, 40_000)
    said = str(error.value)
    assert f"the longest row has 40,000 tokens, and at most {most:,} fit" in said
    assert "under activations: keep" in said and "leave activations at auto" in said
    fits = make_plan(config(vram="24GB", activations="keep"), a_job, cpu, most)
    assert fits.planned.memory.peak <= 24 * GB


# --- time -----------------------------------------------------------------------------------------


def test_policies_cost_what_they_recompute():
    """Operations by hand, per token of an 8B Llama: the design's table of 33.8, 41.3 and 45.1 GFLOP."""
    a_job = job("lora", r=16)
    ideal = CARDS["NVIDIA H200"]._replace(bandwidth=1e18)
    everything = planner_shares(1.0)
    times = {}
    for policy in POLICIES[:3]:
        load = Load((4096,) * 4, 16384)
        with everything:
            times[policy] = (
                predict_speed(a_job, Plan((policy,) * 32), ideal, load).seconds
                * ideal.flops
                / 16384
            )
    table = {"keep": 33.8e9, "recompute_mlp": 41.3e9, "recompute_block": 45.1e9}
    for policy, flops in table.items():
        # Adapters' products in the tails add 3 %.
        assert times[policy] == pytest.approx(flops, rel=0.05), policy


class planner_shares:
    """Every op at the card's rate, for comparing with operations counted by hand."""

    def __init__(self, share):
        self.share = share

    def __enter__(self):
        from fastsft.model import speed as module

        self.module, self.before = module, module.OF_MEASURED
        module.OF_MEASURED = module.Shares(*(self.share,) * 4, gap=0.0)
        module._layer_seconds.cache_clear()

    def __exit__(self, *_):
        self.module.OF_MEASURED = self.before
        self.module._layer_seconds.cache_clear()


def test_decoding_longer_documents_and_masks_change_the_time():
    keep = Plan(("keep",) * 32)
    assert speed(job("lora"), keep, 8192, 4096) > speed(job("qlora"), keep, 8192, 4096)
    resident = replace(keep, resident=32)
    assert speed(job("qlora"), resident, 8192, 4096) == pytest.approx(
        speed(job("lora"), keep, 8192, 4096)
    )
    assert speed(job(), keep, 8192, 200) > speed(job(), keep, 8192, 8192)
    assert speed(job(), keep, 8192, 200, share=0.3) > speed(job(), keep, 8192, 200)
    slow = H200._replace(pcie=1e9)
    offload = Plan(("offload",) * 32)
    times = [predict_speed(job(), offload, r, packed(8192, 4096)).seconds for r in (H200, slow)]
    assert times[1] > 2 * times[0]
    assert times[1] >= 2 * 32 * 8192 * 4096 * 2 / 1e9  # there and back
