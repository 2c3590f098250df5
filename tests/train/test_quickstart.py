"""The built-in quickstart: what `fastsft train` promises to a person who gives it nothing.

The run is quickstart.yaml as it ships, but for its rows: a frozen copy of builtin:docstrings, so that the
outcome does not depend on the Python that runs the test. It takes about 80 s on one thread.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import series
from safetensors import safe_open

from fastsft import cli, trainer
from fastsft.builtin import model_path, quickstart_path
from fastsft.builtin.docstrings import HELD_OUT, answered, correct
from fastsft.config import load_config
from fastsft.metrics import read_metrics
from fastsft.model.generate import generate
from fastsft.model.inference import load_for_inference
from fastsft.model.load import load_model
from fastsft.trainer import Result

FROZEN = Path(__file__).parents[1] / "data" / "docstrings.jsonl"
ANSWER_TOKENS = 64  # the longest sentence has 110 characters


@dataclass(frozen=True)
class Judged:
    """How many held-out questions got an answer that ended by itself, and how many of those are right."""

    answered: int
    correct: int
    said: str


def held_out() -> list[tuple[str, str]]:
    rows = [json.loads(line)["messages"] for line in FROZEN.read_text("utf-8").splitlines()[-20:]]
    return [(question["content"], answer["content"]) for question, answer in rows]


def judge(model: Any, tokenizer: Any, template: Any) -> Judged:
    formed = right = 0
    said = []
    for question, reference in held_out():
        text, stopped = generate(model, tokenizer, template, question, max_new_tokens=ANSWER_TOKENS)
        whole = text if stopped else None
        formed, right = formed + answered(whole, reference), right + correct(whole, reference)
        said.append(f"{'+' if answered(whole, reference) else '-'} {question} {text!r}")
    return Judged(formed, right, "\n".join(said))


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The quickstart, trained."""
    folder = tmp_path_factory.mktemp("quickstart")
    lines = FROZEN.read_text("utf-8").splitlines(keepends=True)
    (folder / "train.jsonl").write_text("".join(lines[:-20]), "utf-8")
    (folder / "held_out.jsonl").write_text("".join(lines[-20:]), "utf-8")
    config = load_config(
        quickstart_path(),
        [f"data={folder}/train.jsonl", f"eval_data={folder}/held_out.jsonl", f"output_dir={folder}/run"],
    )  # fmt: skip
    threads, before = torch.get_num_threads(), os.environ.get("FASTSFT_CACHE")
    os.environ["FASTSFT_CACHE"] = str(folder / "cache")
    torch.set_num_threads(1)
    try:
        return trainer.train(config)
    finally:
        torch.set_num_threads(threads)
        os.environ.pop("FASTSFT_CACHE")
        if before is not None:
            os.environ["FASTSFT_CACHE"] = before


# --- what ships -------------------------------------------------------------------------------------


def test_train_without_a_word_is_the_quickstart(monkeypatch):
    started = []

    def noted(config: Any, **options: Any) -> Result:
        started.append((config, options))
        return Result(Path(), 0, False, {})

    monkeypatch.setattr(trainer, "train", noted)
    assert cli.main(["train"]) == 0
    assert cli.main(["train", "seed=3"]) == 0
    (plain, options), (seeded, _) = started
    assert plain == load_config(quickstart_path()) and seeded.seed == 3
    assert options["config_path"] == str(quickstart_path())
    assert (plain.model, plain.method) == ("builtin:tiny", "lora")
    assert [(s.path, s.split) for s in plain.data] == [("builtin:docstrings", "train")]
    assert [(s.path, s.split) for s in plain.eval_data] == [("builtin:docstrings", "held_out")]
    names = {prompt.split("`")[1] for prompt in plain.sample_prompts}
    assert names and names <= set(HELD_OUT)  # nothing shown as learned was in the training rows


def test_the_base_is_small_and_knows_no_chat():
    folder = model_path()
    config = json.loads((folder / "config.json").read_text())
    assert config["model_type"] == "llama" and config["vocab_size"] == 4096
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        weights = [file.get_tensor(name) for name in file.keys()]  # noqa: SIM118
    assert {tensor.dtype for tensor in weights} == {torch.bfloat16}
    assert 2.5e6 < sum(tensor.numel() for tensor in weights) < 3.5e6
    assert (folder / "model.safetensors").stat().st_size < 8e6
    assert "chat_template" not in json.loads((folder / "tokenizer_config.json").read_text())


# --- what it does -----------------------------------------------------------------------------------


def test_the_base_answers_next_to_nothing(trained):
    _, tokenizer, template = load_for_inference(str(trained.output_dir))
    model = load_model(model_path(), quantize=False, dtype=torch.float32)
    before = judge(model, tokenizer, template)
    assert before.answered <= 2, before.said


def test_training_teaches_it_to_answer_and_to_stop(trained):
    model, tokenizer, template = load_for_inference(str(trained.output_dir))
    # The base ends a sentence with EOS, which it read in pre-training; the end of a turn is new to it.
    template.stop_ids = (tokenizer.id_of("<|im_end|>"),)
    after = judge(model, tokenizer, template)
    assert after.answered >= 18, after.said
    assert after.correct >= 12, after.said  # 13, 17, 16, 16 were seen for seeds 0 to 3


def test_the_loss_falls(trained):
    evaluated = series(trained.output_dir, "eval_loss")
    assert evaluated[-1] < evaluated[0] / 2
    losses = series(trained.output_dir)
    assert losses[-1] < losses[0] / 2
    # What runs/quickstart shows a person afterwards.
    assert (trained.output_dir / "loss.png").read_bytes().startswith(b"\x89PNG")
    steps = [r["step"] for r in read_metrics(trained.output_dir / "metrics.jsonl") if "loss" in r]
    assert len(steps) > 10 and steps[-1] == trained.steps
