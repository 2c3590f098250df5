"""`accelerate(trainer.model)` under the real trainers, TRL's SFTTrainer and transformers' Trainer.

Each run is made twice from the same seed, without our kernels and with them: every step's loss and gradient
must agree. Plain gradient descent, because Adam's first steps are the gradient's signs, which rounding
turns where a gradient is nearly zero.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from small_run import write_model
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)
from trl import SFTConfig, SFTTrainer

from fastsft.integrations import Changes, accelerate

STEPS = 5
WORDS = "hello there what is this world a line of tea and one more word for the road".split()
ROWS = [{"text": " ".join(WORDS[i % 7 :][: 3 + i % 9])} for i in range(40)]
COMMON: dict[str, Any] = {
    "per_device_train_batch_size": 4,
    "max_steps": STEPS,
    "optim": "sgd",
    "learning_rate": 0.05,
    "lr_scheduler_type": "constant",
    "logging_steps": 1,
    "report_to": "none",
    "save_strategy": "no",
    "disable_tqdm": True,
    "bf16": False,
    "use_cpu": True,
}


@dataclass
class Seen(TrainerCallback):
    """Every step's gradients, before they are used."""

    gradients: list[dict[str, Tensor]] = field(default_factory=list)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        named = kwargs["model"].named_parameters()
        self.gradients.append({n: p.grad.clone() for n, p in named if p.grad is not None})


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(
        tmp_path_factory.mktemp("trl") / "base", hidden_size=32, intermediate_size=48
    )


def sft(
    base: Path,
    folder: Path,
    *,
    lora: bool,
    four_bits: BitsAndBytesConfig | None = None,
    **options: Any,
) -> SFTTrainer:
    """TRL's trainer as a user makes it."""
    set_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(base)
    adapter = LoraConfig(r=4, lora_alpha=16, target_modules="all-linear")
    return SFTTrainer(
        model=AutoModelForCausalLM.from_pretrained(
            base, dtype="bfloat16" if four_bits else "float32", quantization_config=four_bits
        ),
        args=SFTConfig(output_dir=str(folder), **{**COMMON, "max_length": 64, **options}),
        train_dataset=Dataset.from_list(ROWS),
        processing_class=tokenizer,
        peft_config=adapter if lora else None,
    )


def train(trainer: Trainer) -> tuple[list[float], list[dict[str, Tensor]]]:
    seen = Seen()
    trainer.add_callback(seen)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == len(seen.gradients) == STEPS
    return losses, seen.gradients


def assert_same_run(found: tuple, expected: tuple) -> None:
    assert found[0] == pytest.approx(expected[0], rel=1e-5)
    for ours, theirs in zip(found[1], expected[1], strict=True):
        assert ours.keys() == theirs.keys()
        size = max(float(g.norm()) for g in theirs.values())
        for name, gradient in theirs.items():
            apart = float((ours[name] - gradient).norm())
            assert apart <= 1e-4 * max(float(gradient.norm()), 0.01 * size), name
    assert expected[0][-1] != pytest.approx(expected[0][0], rel=1e-3)  # it learned something


CASES = {
    "packed": {"lora": True, "packing": True, "gradient_checkpointing": False},
    "packed, checkpointing": {"lora": True, "packing": True, "gradient_checkpointing": True},
    "padded, checkpointing": {"lora": True, "gradient_checkpointing": True},
    "padded, accumulated": {
        "lora": True,
        "gradient_checkpointing": False,
        "gradient_accumulation_steps": 2,
    },
    "padding-free, full": {"lora": False, "padding_free": True, "max_length": None},
}


@pytest.mark.parametrize("name", CASES)
def test_sft_trainer_takes_the_same_steps(name: str, base: Path, tmp_path: Path) -> None:
    expected = train(sft(base, tmp_path / "without", **CASES[name]))
    trainer = sft(base, tmp_path / "with", **CASES[name])
    changes = accelerate(trainer.model)
    check_changes(changes, lora=CASES[name]["lora"])
    assert "stay with TRL's own fused head" in next(
        c.now for c in changes.changed if c.part == "loss"
    )
    found = train(trainer)
    assert_same_run(found, expected)
    ids = torch.tensor([[5, 40, 41, 42]])
    trained = trainer.model.eval()(ids).logits
    changes.undo()
    torch.testing.assert_close(trainer.model(ids).logits, trained, rtol=1e-4, atol=1e-5)


def test_qlora_takes_the_same_steps(tmp_path: Path) -> None:
    """bitsandbytes' layers as from_pretrained makes them, PEFT's on top, everything in bfloat16."""
    # Rows of whole blocks: of others bitsandbytes' decoder for CPUs makes something else.
    base = write_model(tmp_path / "base", hidden_size=64, intermediate_size=128)
    runs = []
    for ours in (False, True):
        four_bits = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16,
        )
        trainer = sft(
            base, tmp_path / str(ours), lora=True, four_bits=four_bits, packing=True, bf16=True
        )
        if ours:
            changes = accelerate(trainer.model)
            check_changes(changes, lora=True)
            assert changes.count("nf4") == 14 and not changes.left
        runs.append(train(trainer))
    (expected, theirs), (found, ours) = runs
    assert found == pytest.approx(expected, rel=1e-3)
    for x, y in zip(ours, theirs, strict=True):
        size = max(float(g.norm()) for g in y.values())
        assert all(
            float((x[n] - y[n]).norm()) < 0.05 * max(float(y[n].norm()), 0.1 * size) for n in y
        )


def check_changes(changes: Changes, *, lora: bool) -> None:
    counts = {part: changes.count(part) for part in ("norm", "mlp", "lora", "attention", "loss")}
    assert counts == {"norm": 5, "mlp": 2, "lora": 14 if lora else 0, "attention": 1, "loss": 1}


def test_transformers_trainer_takes_the_same_steps(base: Path, tmp_path: Path) -> None:
    """Here the loss is the model's own, and so becomes ours: nothing makes logits while it trains."""
    tokenizer = AutoTokenizer.from_pretrained(base)
    rows = [tokenizer(row["text"])["input_ids"] for row in ROWS]

    def collate(batch: list[dict[str, Any]]) -> dict[str, Tensor]:
        longest = max(len(row["input_ids"]) for row in batch)
        ids = torch.zeros(len(batch), longest, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for place, row in enumerate(batch):
            ids[place, : len(row["input_ids"])] = torch.tensor(row["input_ids"])
            mask[place, : len(row["input_ids"])] = 1
        return {
            "input_ids": ids,
            "attention_mask": mask,
            "labels": torch.where(mask.bool(), ids, -100),
        }

    def trainer(folder: str) -> Trainer:
        set_seed(0)
        return Trainer(
            model=AutoModelForCausalLM.from_pretrained(base, dtype="float32"),
            args=TrainingArguments(
                output_dir=str(tmp_path / folder), **COMMON, gradient_accumulation_steps=2
            ),
            train_dataset=Dataset.from_dict({"input_ids": rows}),
            eval_dataset=Dataset.from_dict({"input_ids": rows[:8]}),
            data_collator=collate,
        )

    plain = trainer("without")
    expected = train(plain)
    ours = trainer("with")
    changes = accelerate(ours.model)
    check_changes(changes, lora=False)
    made: list[int] = []
    assert_same_run(train(ours), expected)
    ours.model.lm_head.register_forward_hook(lambda *_: made.append(1))
    metrics = ours.evaluate(), plain.evaluate()
    assert metrics[0]["eval_loss"] == pytest.approx(metrics[1]["eval_loss"], rel=1e-4)
    assert len(made) == 1  # in evaluation logits are made, for whoever computes metrics of them
