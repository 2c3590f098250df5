"""The end-to-end benchmark: its rows, its weights, its arithmetic, its clock and its processes."""

import dataclasses
import json
import os
import subprocess
import sys
import time
import types

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from bench.ledger import Ledger
from bench.train import __main__ as bench_train
from bench.train import child, clock, job, models, plain, trl, work
from bench.train.job import Job
from bench.train.session import Session, TimeIsUp
from bench.train.workloads import TINY, WORKLOADS, Rows, generate

# Billions, as their publishers give them.
PARAMETERS = {
    "llama-3.1-8b": 8.03,
    "llama-3.2-1b": 1.24,
    "qwen3-4b": 4.02,
    "qwen3-8b": 8.19,
    "mistral-7b": 7.25,
}


@pytest.mark.parametrize("name", PARAMETERS)
def test_models_have_the_published_size(name):
    options = dict(models.CONFIGS[name])
    config = AutoConfig.for_model(options.pop("model_type"), **options)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    assert sum(p.numel() for p in model.parameters()) / 1e9 == pytest.approx(
        PARAMETERS[name], abs=0.006
    )


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return models.write("tiny", tmp_path_factory.mktemp("models"))


def test_a_model_is_made_once_and_depends_on_its_seed_alone(checkpoint):
    again = checkpoint.stat().st_mtime_ns
    assert models.write("tiny", checkpoint.parent) == checkpoint
    assert checkpoint.stat().st_mtime_ns == again
    first = (checkpoint / "model.safetensors").read_bytes()
    other = models.write("tiny", checkpoint.parent / "elsewhere")
    assert (other / "model.safetensors").read_bytes() == first
    assert models.write("tiny", checkpoint.parent / "elsewhere", seed=1) != other
    assert not other.exists(), "only the newest model keeps its 16 GB"


@pytest.mark.parametrize("name", WORKLOADS)
def test_rows_have_the_shape_they_are_named_after(name):
    shape = WORKLOADS[name]
    rows = generate(shape, 400, 5000, seed=3)
    assert rows.lengths.max() <= shape.longest and rows.targets.min() >= 1
    assert rows.ids.min() >= 3 and rows.ids.max() < 5000
    one_turn = shape.prompt[0] + shape.answer[0]
    assert 0.85 * one_turn < np.median(rows.lengths) < 4 * one_turn
    again = generate(shape, 400, 5000, seed=3)
    assert np.array_equal(rows.ids, again.ids) and np.array_equal(rows.trained, again.trained)
    assert not np.array_equal(rows.lengths, generate(shape, 400, 5000, seed=4).lengths)


def test_rows_are_read_as_they_were_written(tmp_path):
    rows = generate(TINY["alpaca"], 9, 300)
    rows.save(tmp_path / "rows.npz")
    read = Rows.load(tmp_path / "rows.npz")
    at = 0
    for i in range(9):
        ids, trained = read[i]
        assert np.array_equal(ids, rows.ids[at : at + len(ids)])
        assert read.targets[i] == trained[1:].sum()
        at += len(ids)
    assert at == len(rows.ids)


def test_operations_are_those_torch_counts(checkpoint):
    """One row, every token trained, all weights: torch counts attention in full, we the causal half."""
    from torch.utils.flop_counter import FlopCounterMode

    n = 64
    model = AutoModelForCausalLM.from_pretrained(checkpoint, attn_implementation="eager")
    ids = torch.arange(n)[None] + 3
    with FlopCounterMode(display=False) as counted:
        logits = model(ids).logits[:, :-1]
        logits.sum().backward()
    rows = Rows(ids[0].numpy(), np.ones(n, bool), np.array([n]))
    config = json.loads((checkpoint / "config.json").read_text())
    heads = config["num_hidden_layers"] * config["num_attention_heads"] * config["head_dim"]
    head = 6 * config["hidden_size"] * config["vocab_size"]  # torch ran it over the last row too
    expected = work.operations(checkpoint, rows, "full", 16) + 3 * 4 * heads * n * n / 2 + head
    assert counted.get_total_flops() == pytest.approx(expected, rel=1e-6)


def test_adapters_add_their_own_operations(checkpoint):
    rows = Rows(np.arange(10, dtype=np.int32), np.ones(10, bool), np.array([10]))
    more = work.operations(checkpoint, rows, "lora", 16) - work.operations(
        checkpoint, rows, "lora", 8
    )
    # 128 -> 128 (q, o), 128 -> 64 (k, v), 128 <-> 256 (three) in each of two layers.
    assert more == 10 * 6 * 8 * 2 * (2 * 256 + 2 * 192 + 3 * 384)


def test_a_trace_is_added_up():
    def event(cat, name, ts, dur):
        return {"ph": "X", "cat": cat, "name": name, "ts": ts, "dur": dur}

    events = [
        event("cuda_runtime", "cudaLaunchKernel", 0, 5),
        event("cuda_driver", "cuLaunchKernelEx", 6, 5),
        event("cuda_runtime", "cudaMemcpyAsync", 12, 5),
        event("kernel", "a", 10, 100),
        event("kernel", "b", 60, 100),  # beside a, for a while
        event("gpu_memcpy", "c", 300, 40),
        event("gpu_user_annotation", "step", 0, 1000),
        {"ph": "M", "name": "process_name"},
    ]
    found = clock.read_trace({"traceEvents": events}, steps=2)
    assert found == {
        "kernels_a_step": 1,
        "launches_a_step": 1,
        "device_seconds_a_step": pytest.approx((150 + 40) / 1e6 / 2),
    }


def test_the_clock_times_the_steps_behind_the_warm_ones():
    watch = clock.Clock(Job("train", warm=2, timed=3, profiled=1))
    watch.begin()
    for _ in range(6):
        watch.step()
    assert len(watch.seconds()) == 3
    assert watch.result()["step_seconds"] == watch.seconds()
    with pytest.raises(AssertionError):
        watch.step()
        watch.result()


def test_what_a_row_says_follows_from_the_timed_steps(checkpoint):
    base = Job("train", model=str(checkpoint), warm=1, timed=2, profiled=1)
    rows = generate(TINY["alpaca"], 8, 300)
    found = {
        "tokens": [900, 100, 300, 900],
        "trained": [90, 10, 30, 90],
        "step_seconds": [1.0, 1.0],
        "losses": [7.0, 6.0],
        "first_step_seconds": 3.0,
        "device_seconds_a_step": 0.25,
        "kernels_a_step": 5,
        "launches_a_step": 4,
    }
    row = bench_train.measured(found, base, rows, flops=1e9)
    assert row["tokens_per_second"] == 200 and row["trained_per_second"] == 20
    assert row["p20"] == 140 and row["p50"] == 200 and row["p80"] == 260
    assert row["busy_share"] == 0.25 and row["launches_a_step"] == 4
    needed = work.operations(checkpoint, rows, "lora", 16) / rows.lengths.sum()
    assert row["mfu"] == pytest.approx(needed * 200 / 1e9)
    assert "mfu" not in bench_train.measured(found, base, rows, None)
    assert bench_train.measured({"error": "gone"}, base, rows, 1e9) == {"error": "gone"}


# --- the peers' rows ------------------------------------------------------------------------------


def test_packs_hold_the_tokens_of_a_step():
    rows = generate(TINY["alpaca"], 64, 300)
    tokens = 16 * rows.lengths.mean()
    size, a_step = trl.packs(rows, 16, 100)
    assert rows.lengths.max() <= size and abs(size * a_step - tokens) <= size
    size, a_step = trl.packs(rows, 16, 10**6)
    assert a_step == 1 and size >= tokens


def test_real_tokens_are_counted_without_the_first_of_each_document():
    dataset = [
        {"input_ids": [1, 2, 3, 4], "labels": [-100, 2, 3, 4], "seq_lengths": [4]},
        {"input_ids": [1, 2, 3, 4], "labels": [1, 2, 3, 4], "seq_lengths": [1, 3]},
        {"input_ids": [1, 2], "labels": [-100, 2]},
    ]
    assert trl.counts(dataset, 1, 4) == ([4, 4, 2, 4], [3, 2, 1, 3])
    assert trl.counts(dataset, 2, 2) == ([8, 6], [5, 4])


def test_plain_rows_are_padded_by_position():
    rows = Rows(
        np.array([5, 0, 7, 8, 9], np.int32), np.array([0, 1, 0, 1, 1], bool), np.array([2, 3])
    )
    (batch,) = next(plain._steps(rows, Job("train", batch=2, peer_rows=2, warm=1)))
    assert batch["attention_mask"].tolist() == [[1, 1, 0], [1, 1, 1]]
    assert batch["labels"].tolist() == [[-100, 0, -100], [-100, 8, 9]]


# --- the processes --------------------------------------------------------------------------------


def test_a_process_that_fails_says_why(tmp_path):
    found = job.run(Job("train", model="nowhere", rows="nowhere.npz", out=str(tmp_path)), 120)
    assert "FileNotFoundError" in found["error"] and "exit code 1" in found["error"]


def test_a_process_that_does_not_end_is_ended(tmp_path):
    found = job.run(Job("rates", out=str(tmp_path)), 0.05)
    assert found == {"error": "no end within 0 s"}
    running = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True)
    assert str(tmp_path) not in running.stdout


def test_the_last_error_is_found_among_other_lines(tmp_path):
    path = tmp_path / "stderr.txt"
    path.write_text(
        "Traceback\n  File\nValueError: bad\n\ntorch.OutOfMemoryError: CUDA out of memory\nbye\n"
    )
    assert job.last_error(path, 1) == "torch.OutOfMemoryError: CUDA out of memory (exit code 1)"
    path.write_text("just this\n")
    assert job.last_error(path, -9) == "just this (exit code -9)"
    path.write_text("")
    assert job.last_error(path, 3) == "nothing on stderr (exit code 3)"


def test_jobs_are_json():
    one = Job("probe", who="trl liger", budget=5)
    assert Job(**json.loads(json.dumps(dataclasses.asdict(one)))) == one


@pytest.fixture
def session(tmp_path):
    book = Ledger(torch.device("cpu"), None, {})
    return Session(book, tmp_path, quick=True, ends=time.monotonic() + 100)


def test_a_peer_that_runs_out_of_memory_gets_checkpointing(session, monkeypatch):
    seen = []

    def run(job, limit):
        seen.append((job.who, job.checkpointing))
        return {"error": "torch.OutOfMemoryError: CUDA out of memory"}

    monkeypatch.setattr(job, "run", run)
    session.run(Job("train", who="trl"))
    session.run(Job("train", who="fastsft"))
    assert seen == [("trl", False), ("trl", True), ("fastsft", False)]


def test_a_process_cut_off_by_the_command_s_limit_leaves_no_row(session, monkeypatch):
    monkeypatch.setattr(job, "run", lambda one, limit: {"error": f"{job.NO_END} {limit:.0f} s"})
    with pytest.raises(TimeIsUp):
        session.run(Job("train"))
    assert "error" in session.run(Job("train"), most=50)  # its own limit: a result
    session.ends = time.monotonic() + 1
    with pytest.raises(TimeIsUp):
        session.left()


def test_a_row_that_is_there_is_not_measured_again(session, monkeypatch):
    key = {"kind": "train", "model": "tiny", "rows": "alpaca", "method": "lora"}
    session.book.rows = [key | {"who": "fastsft"}]
    asked = []
    monkeypatch.setattr(Session, "model", lambda self, name: asked.append(name) or self.work)
    monkeypatch.setattr(Session, "rows", lambda self, *_: ("", generate(TINY["alpaca"], 8, 300)))
    monkeypatch.setattr(job, "run", lambda one, limit: {"error": one.who})
    assert bench_train.compare(session, ["tiny"], ["alpaca"], ["lora"], ["fastsft"]) == 0
    assert not asked
    assert bench_train.compare(session, ["tiny"], ["alpaca"], ["lora"], ["fastsft", "trl"]) == 1
    assert asked == ["tiny"] and session.book.find(**key, who="trl")["error"] == "trl"


@pytest.mark.parametrize("who,grows", [("fastsft", True), ("trl", False)])
def test_ours_trains_with_the_product_s_allocator_settings(who, grows, monkeypatch):
    """Set before the trainer's module, which could start CUDA, is imported; peers keep their own."""
    seen = []

    def imported(name):
        seen.append("expandable_segments:True" in os.environ.get("PYTORCH_ALLOC_CONF", ""))
        return types.SimpleNamespace(train=lambda job: {})

    monkeypatch.setenv("PYTORCH_ALLOC_CONF", "")  # so that it is taken back afterwards
    for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(child.importlib, "import_module", imported)
    monkeypatch.setattr(
        sys, "argv", ["child", json.dumps(dataclasses.asdict(Job("train", who=who)))]
    )
    child.main()
    assert seen == [grows]
