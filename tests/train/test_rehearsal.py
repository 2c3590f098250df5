"""Memory before and during a run: the worst micro-batches tried, a step retried under a cheaper plan."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from runs import lines, product, run, same, settings

from fastsft import rehearsal, trainer
from fastsft.checkpoint import random_state
from fastsft.console import RunConsole
from fastsft.errors import UserError
from fastsft.model.fast import FastEngine


class Limited:
    """A FastEngine.loss that runs out of memory where `full` says so, given (call number, engine)."""

    def __init__(self, monkeypatch, full):
        self.calls, self.plans = 0, []
        loss = FastEngine.loss

        def limited(engine, batch, *, step):
            self.calls += 1
            self.plans.append(engine.plan)
            output = loss(engine, batch, step=step)
            if full(self.calls, engine):
                raise torch.OutOfMemoryError("no more")
            return output

        monkeypatch.setattr(FastEngine, "loss", limited)


KEYS = {"max_steps": 4, "micro_batch_tokens": 64, "lora": {"dropout": 0.2}, "batch_size": 8}


def test_a_step_without_memory_is_taken_again(tmp_path, monkeypatch, capsys):
    wanted = run(tmp_path, **KEYS, output_dir="plain")
    counted = Limited(monkeypatch, lambda call, engine: False)
    run(tmp_path, **KEYS, output_dir="counted")
    micro_batches = counted.calls
    capsys.readouterr()
    limited = Limited(monkeypatch, lambda call, engine: call == 6)  # in the middle of a step
    found = run(tmp_path, **KEYS, output_dir="limited")
    said = [line for line in capsys.readouterr().out.splitlines() if "memory ran out" in line]
    assert len(said) == 1 and "recompute" in said[0] and "the gradient is the same" in said[0]
    assert limited.calls > micro_batches and limited.plans[-1] != limited.plans[0]
    assert lines(found.output_dir) == lines(wanted.output_dir)
    assert same(product(found.output_dir), product(wanted.output_dir))


def test_the_cheapest_plan_is_the_end(tmp_path, monkeypatch):
    Limited(monkeypatch, lambda call, engine: True)
    with pytest.raises(UserError, match="ran out of memory in step 1"):
        run(tmp_path, **KEYS)


def rehearsed(folder, monkeypatch, capsys):
    """A run that goes through its worst micro-batches first, as on a GPU, and what it looked like."""
    seen = {}

    def loop(a_run, stop):
        a_run.built.engine.context.step = 7
        torch.manual_seed(11)
        np.random.seed(11)
        random.seed(11)
        state = random_state()
        weights = {n: p.detach().clone() for n, p in a_run.built.named_parameters()}
        rehearsal.rehearse(a_run)
        seen["random"] = same(state, random_state())
        seen["weights"] = same(weights, {n: p for n, p in a_run.built.named_parameters()})
        seen["gradients"] = [p.grad for _, p in a_run.built.named_parameters()]
        seen["step"] = a_run.built.engine.context.step
        seen["moments"] = dict(a_run.optimizer.state)
        return original(a_run, stop)

    original = trainer.loop
    monkeypatch.setattr(trainer, "loop", loop)
    return run(folder, **KEYS, output_dir="rehearsed"), seen


def test_the_rehearsal_leaves_no_trace(tmp_path, monkeypatch, capsys):
    wanted = run(tmp_path, **KEYS, output_dir="plain")
    found, seen = rehearsed(tmp_path, monkeypatch, capsys)
    assert seen["random"] and seen["weights"] and seen["step"] == 7 and not seen["moments"]
    assert all(grad is None for grad in seen["gradients"])
    assert lines(found.output_dir) == lines(wanted.output_dir)
    assert same(product(found.output_dir), product(wanted.output_dir))


def test_the_rehearsal_finds_a_plan_that_fits(tmp_path, monkeypatch, capsys):
    limited = Limited(monkeypatch, lambda call, engine: "keep" in engine.plan.policies)
    found, _ = rehearsed(tmp_path, monkeypatch, capsys)
    said = capsys.readouterr().out
    assert "memory ran out in the worst micro-batch" in said and "in step" not in said
    assert "keep" in limited.plans[0].policies and "keep" not in limited.plans[-1].policies
    assert found.steps == 4


def test_the_worst_micro_batches_are_the_longest_and_the_most_documents(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = trainer.make_config(settings(tmp_path, micro_batch_tokens=100))
    with RunConsole() as console:
        a_run = trainer.set_up(config, tmp_path, None, console, torch.device("cpu"), "x")
    lengths = a_run.data.train.lengths
    first, second = rehearsal.worst_micro_batches(a_run)
    assert first.max_seqlen == lengths.max() and second.lengths[0] == lengths.min()
    assert len(second.lengths) > len(first.lengths)
    for batch in (first, second):
        assert 100 - int(lengths.max()) < batch.tokens <= 100
        assert len(batch.trained_rows) == batch.tokens - len(batch.lengths)
