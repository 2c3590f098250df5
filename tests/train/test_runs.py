"""Runs from a data file to a product that PEFT and transformers load, and what they leave behind."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from peft import LoraConfig as PeftConfig
from peft import PeftModel, get_peft_model
from runs import SEED_DATA, lines, product, run, same, series, small_model, write_rows
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from fastsft import trainer
from fastsft.errors import UserError
from fastsft.metrics import read_metrics
from fastsft.model.inference import load_for_inference

TRAINED = (
    "step epoch loss lr grad_norm trained_tokens total_tokens tokens_per_second step_seconds "
    "peak_memory_bytes mfu token_accuracy"
).split()
EVALUATED = "step eval_loss eval_tokens eval_perplexity eval_token_accuracy".split()
PROMPT = torch.tensor([[4, 40, 41, 42, 99, 17, 250, 3]])


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """One folder with the model, the rows and the token cache for all runs here."""
    folder = tmp_path_factory.mktemp("runs")
    write_rows(folder / "held_out.jsonl", 8)
    return folder


@pytest.mark.parametrize("method", ["lora", "qlora", "full"])
@pytest.mark.parametrize("file", ["alpaca.json", "sharegpt.jsonl", "messages.jsonl"])
def test_every_method_learns_from_every_seed_format(place, method, file):
    rate = 0.005 if method == "full" else 0.02
    left = run(
        place, method=method, data=str(SEED_DATA / file), batch_size=12, max_steps=5, learning_rate=rate,
        chat_template="chatml",
    )  # fmt: skip
    losses = series(left.output_dir)
    assert len(losses) == left.steps == 5
    assert losses[-1] < losses[0] - 0.3
    report = json.loads((left.output_dir / "data_report.json").read_text())
    assert report["train"]["examples"] == 12
    assert left.summary["product"] == ("model" if method == "full" else "adapter")


def test_peft_loads_the_adapter_with_our_logits(place):
    folder = run(place, max_steps=6).output_dir
    ours, _, _ = load_for_inference(str(folder))
    base = AutoModelForCausalLM.from_pretrained(place / "base", dtype=torch.float32)
    start = base(PROMPT).logits
    theirs = PeftModel.from_pretrained(base, folder / "adapter").eval()
    expected = theirs(PROMPT).logits
    torch.testing.assert_close(ours(PROMPT).logits, expected, atol=1e-4, rtol=0)
    assert (expected - start).abs().max() > 0.01
    assert json.loads((folder / "adapter/generation_config.json").read_text())["eos_token_id"]
    assert AutoTokenizer.from_pretrained(folder / "adapter").chat_template


def test_transformers_loads_the_model_with_our_logits(place):
    folder = run(place, method="full", max_steps=6, learning_rate=1e-3).output_dir
    ours, _, _ = load_for_inference(str(folder))
    theirs = AutoModelForCausalLM.from_pretrained(folder / "model").eval()
    start = AutoModelForCausalLM.from_pretrained(place / "base")
    torch.testing.assert_close(ours(PROMPT).logits, theirs(PROMPT).logits, atol=1e-4, rtol=0)
    assert (theirs(PROMPT).logits - start(PROMPT).logits).abs().max() > 0.01
    assert theirs.generation_config.eos_token_id
    assert AutoTokenizer.from_pretrained(folder / "model").chat_template


def test_the_quantised_run_answers_as_it_was_trained(place):
    """The logits of the product are those of the evaluation that the run logged."""
    from fastsft.evaluate import evaluate

    folder = run(
        place, method="qlora", max_steps=4, eval_data=str(place / "held_out.jsonl")
    ).output_dir
    logged = series(folder, "eval_loss")[-1]
    found = evaluate(str(folder), [f"data={place / 'held_out.jsonl'}"])
    assert found["eval_loss"] == pytest.approx(logged, rel=1e-6)


def test_an_adapter_made_by_peft_goes_on_here(place, tmp_path):
    base = AutoModelForCausalLM.from_pretrained(place / "base", dtype=torch.float32)
    made = get_peft_model(base, PeftConfig(r=3, lora_alpha=5, target_modules=["q_proj", "up_proj"]))
    torch.manual_seed(2)
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.2)
    made.save_pretrained(tmp_path / "made")
    # At this learning rate nothing moves: the product is the adapter that came in.
    still = run(place, adapter=str(tmp_path / "made"), learning_rate=1e-30).output_dir
    before = load_file(tmp_path / "made" / "adapter_model.safetensors")
    assert same(product(still), before)
    ours, _, _ = load_for_inference(str(still))
    expected = made.eval()(PROMPT).logits
    torch.testing.assert_close(ours(PROMPT).logits, expected, atol=1e-4, rtol=0)
    written = yaml.safe_load((still / "config.yaml").read_text())["lora"]
    assert (written["r"], written["alpha"]) == (3, 5)
    moved = run(place, adapter=str(tmp_path / "made"), max_steps=6).output_dir
    losses = series(moved)
    assert losses[0] == series(still)[0] and losses[-1] < losses[0]
    with pytest.raises(UserError, match=r"lora\.r is 4, but the adapter .* has 3"):
        run(place, adapter=str(tmp_path / "made"), lora={"r": 4})


# --- what a run leaves ------------------------------------------------------------------------------


def test_what_a_run_leaves(place):
    keys = {
        "eval_data": str(place / "held_out.jsonl"),
        "max_steps": 5,
        "eval_steps": 2,
        "save_steps": 4,
    }
    left = run(place, output_dir="left", **keys)
    folder = left.output_dir
    assert folder == place / "left"
    records = read_metrics(folder / "metrics.jsonl")
    trained = [r for r in records if "loss" in r]
    evaluated = [r for r in records if "eval_loss" in r]
    assert [r["step"] for r in trained] == [1, 2, 3, 4, 5]
    assert all(list(r) == TRAINED for r in trained)
    assert [r["step"] for r in evaluated] == [0, 2, 4, 5]  # before training and at the end too
    assert all(list(r) == EVALUATED for r in evaluated)
    assert trained[2]["epoch"] == pytest.approx(0.5)
    assert evaluated[0]["eval_perplexity"] == pytest.approx(math.exp(evaluated[0]["eval_loss"]))
    checkpoints = {p.name for p in (folder / "checkpoints").iterdir()}
    assert {"step-000004", "step-000005"} <= checkpoints
    summary = json.loads((folder / "summary.json").read_text())
    assert summary == left.summary
    assert (summary["steps"], summary["product"], summary["engine"]) == (5, "adapter", "fast")
    assert summary["best_eval_loss"] == min(r["eval_loss"] for r in evaluated[1:])
    assert summary["total_tokens"] == sum(r["total_tokens"] for r in trained)
    report = json.loads((folder / "data_report.json").read_text())
    assert (report["train"]["examples"], report["eval"]["examples"]) == (24, 8)
    assert (folder / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_the_first_and_the_last_step_are_kept(place):
    folder = run(place, max_steps=4, save_steps=50, logging_steps=50).output_dir
    assert sorted(p.name for p in (folder / "checkpoints").iterdir()) == [
        "step-000001",
        "step-000004",
    ]
    assert [r["step"] for r in lines(folder)] == [1, 4]


def test_the_written_config_repeats_the_run_in_a_new_folder(place):
    dropout = {"r": 4, "dropout": 0.2}
    first = run(place, lora=dropout, val_size=4, max_steps=4, output_dir="first").output_dir
    written = yaml.safe_load((first / "config.yaml").read_text())
    again = run(place, **{**written, "batch_tokens": None}).output_dir
    assert again != first
    assert lines(again) == lines(first)
    assert same(product(again), product(first))
    rewritten = yaml.safe_load((again / "config.yaml").read_text())
    assert rewritten == written


def test_the_next_command_is_the_last_line(place, capsys):
    folder = run(place, max_steps=1, output_dir="said").output_dir
    said = capsys.readouterr().out.strip().splitlines()
    assert said[-1].strip() == "fastsft chat said"
    assert folder.name in said[-2]


# --- on the way -------------------------------------------------------------------------------------


def test_early_stopping_ends_the_run_and_the_best_is_the_product(place, capsys):
    keys = {"eval_data": str(place / "held_out.jsonl"), "data": str(place / "rows.jsonl")}
    left = run(
        place, **keys, max_steps=60, eval_steps=1, early_stopping_patience=3, learning_rate=0.5,
        lr_scheduler="constant", engine="compat",  # where this rate is known to go wrong early
    )  # fmt: skip
    losses = series(left.output_dir, "eval_loss")
    best = min(range(1, len(losses)), key=losses.__getitem__)
    assert left.steps == best + 3 < 60
    assert left.summary["best_step"] == best
    assert "stopped early" in capsys.readouterr().out
    kept = left.output_dir / "checkpoints" / f"step-{best:06d}" / "adapter"
    assert same(product(left.output_dir), load_file(kept / "adapter_model.safetensors"))
    latest = left.output_dir / "checkpoints" / f"step-{left.steps:06d}" / "adapter"
    if latest.exists():
        assert not same(product(left.output_dir), load_file(latest / "adapter_model.safetensors"))


def test_prompts_are_answered_before_on_the_way_and_after(place, capsys, monkeypatch):
    monkeypatch.setattr(trainer, "SAMPLE_TOKENS", 6)
    prompts = ["what is this?", "hello"]
    keys = {"eval_data": str(place / "held_out.jsonl"), "max_steps": 3, "eval_steps": 2}
    with_samples = run(place, sample_prompts=prompts, **keys).output_dir
    said = capsys.readouterr().out
    for title in ("before training", "after step 2", "after training"):
        assert said.count(title) == 1, title
    assert said.count("what is this?") >= 3
    assert lines(with_samples) == lines(run(place, **keys).output_dir)  # sampling changes nothing


def test_a_stream_trains_and_repeats(place):
    keys = {"streaming": True, "max_steps": 8, "data": str(write_rows(place / "stream.jsonl", 10))}
    first = run(place, **keys).output_dir
    assert series(first)[-1] < series(first)[0]
    assert lines(run(place, **keys).output_dir) == lines(first)


def test_a_mixture_holds_each_source_as_often_as_its_weight_says(place):
    chat, text = place / "rows.jsonl", place / "text.jsonl"
    text.write_text("".join(json.dumps({"text": f"hello world {i}"}) + "\n" for i in range(10)))
    sources = [{"path": str(chat), "weight": 2.0}, {"path": str(text), "weight": 0.5}]
    left = run(place, data=sources, epochs=1, batch_size=10)
    assert left.steps == math.ceil((2 * 24 + 5) / 10)
    report = json.loads((left.output_dir / "data_report.json").read_text())
    assert [s["kept"] for s in report["sources"]] == [24, 10]


# --- numbers that are not finite --------------------------------------------------------------------


def test_a_loss_that_is_not_finite_stops_the_run_and_names_it(place):
    with pytest.raises(UserError) as error:
        run(place, learning_rate=1e30, lr_scheduler="constant", max_steps=9, output_dir="burnt")
    message = str(error.value)
    step = int(message.split(":")[0].removeprefix("step "))
    assert 1 < step <= 4
    assert "not finite" in message and "rows.jsonl:" in message
    assert "the last good checkpoint is burnt/checkpoints/step-000001" in message
    kept = load_file(place / "burnt/checkpoints/step-000001/adapter/adapter_model.safetensors")
    assert all(t.isfinite().all() for t in kept.values())
    assert not (place / "burnt" / "adapter").exists()


def test_weights_that_are_not_finite_stop_before_anything_is_learned(place, tmp_path):
    small_model(tmp_path / "base")
    weights = load_file(tmp_path / "base" / "model.safetensors")
    weights["model.layers.1.mlp.down_proj.weight"][0, 0] = math.inf
    save_file(weights, tmp_path / "base" / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=r"step 1: .*not finite"):
        run(tmp_path, data=str(place / "rows.jsonl"))
    assert not list(Path(tmp_path).glob("runs/run/checkpoints/step-*"))


def defaults(place: Path, rows: int, **keys: Any) -> Path:
    """A run that leaves batch, epochs and schedule to their defaults."""
    data = str(write_rows(place / f"{rows}.jsonl", rows))
    config = {"model": str(small_model(place / "base")), "method": "lora", "data": data, **keys}
    config["output_dir"] = str(
        place / f"default-{rows}{''.join(f'-{k}-{v}' for k, v in keys.items())}"
    )
    return trainer.train(config).output_dir


def test_a_default_run_on_few_rows_learns_and_says_how_few_steps_it_has(place, capsys):
    few = "which train little; batch_size=2 would give 20"
    folder = defaults(place, 40)
    said = " ".join(capsys.readouterr().out.split())
    assert f"only 1 step, {few}" in said and said.index(few) < said.index("step 1/1 ")
    assert series(folder, "lr") == [1e-4]
    assert any(tensor.any() for name, tensor in product(folder).items() if "lora_B" in name)
    assert len(series(defaults(place, 40, batch_size=2))) == 20
    assert "train little" not in capsys.readouterr().out
    defaults(place, 5, batch_size=1)
    assert "only 5 steps, which train little; raise epochs" in " ".join(
        capsys.readouterr().out.split()
    )
    defaults(place, 40, max_steps=2)  # asked for by name
    assert "train little" not in capsys.readouterr().out


def test_a_batch_of_tokens_that_gives_few_steps_is_said_too(place, capsys):
    defaults(place, 40, batch_tokens=10**6)
    said = " ".join(capsys.readouterr().out.split())
    assert "only 1 step, which train little; batch_tokens=" in said
    size = int(said.split("little; batch_tokens=")[1].split()[0])
    assert 15 <= len(series(defaults(place, 40, batch_tokens=size))) <= 30
