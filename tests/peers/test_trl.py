"""TRL's SFTTrainer as an oracle: from the same weights, on the same full batch, it takes the same steps.

TRL pads its rows and goes through PEFT's layers, transformers' attention and its own masks; here rows are
packed into several micro-batches and nothing of these is used. What must agree then is the mathematics:
which tokens train, how the loss of a step is averaged, the gradient, its clipping, the schedule, AdamW.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import load_dataset
from peft import LoraConfig, PeftModel, get_peft_model
from runs import run, series
from safetensors.torch import load_file
from small_run import write_model
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from trl import SFTConfig, SFTTrainer

TAGGED = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}"
    "{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}\n"
    "{% else %}{{ m.content }}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
WORDS = "hello there what is this world a line of tea and one more word for the road".split()
STEPS, RATE, CLIP, DECAY = 5, 0.01, 0.6, 0.1
PROMPT = torch.tensor([[4, 40, 41, 42, 99, 17, 250, 3]])


def conversation(i: int) -> dict[str, Any]:
    """Some with a system message, some of two turns, no two of one length."""
    said = [" ".join(WORDS[(i * k) % 11 :][: 2 + (i + k) % 7]) for k in range(1, 5)]
    messages = [{"role": "system", "content": "be brief"}] if i % 3 == 0 else []
    for question, answer in list(zip(said[::2], said[1::2], strict=True))[: 1 + i % 2]:
        messages.append({"role": "user", "content": question})
        messages.append({"role": "assistant", "content": f"{answer} {i}"})
    return {"messages": messages}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """The model, twelve chats, and an adapter that PEFT made for it (A random, B zero)."""
    folder = tmp_path_factory.mktemp("trl")
    write_model(
        folder / "base",
        template=TAGGED,
        hidden_size=32,
        intermediate_size=48,
        max_position_embeddings=256,
    )
    rows = [json.dumps(conversation(i)) + "\n" for i in range(12)]
    (folder / "chats.jsonl").write_text("".join(rows))
    torch.manual_seed(3)
    get_peft_model(
        base(folder), LoraConfig(r=4, lora_alpha=16, target_modules="all-linear")
    ).save_pretrained(folder / "start")
    return folder


def base(place: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(place / "base", dtype=torch.float32)


def theirs(place: Path, model: Any) -> list[dict[str, float]]:
    """Their trainer's log of each step."""
    config = SFTConfig(
        output_dir=str(place / "theirs"),
        max_length=256,
        per_device_train_batch_size=12,
        max_steps=STEPS,
        learning_rate=RATE,
        lr_scheduler_type="cosine",
        warmup_steps=0,
        weight_decay=DECAY,
        max_grad_norm=CLIP,
        assistant_only_loss=True,
        gradient_checkpointing=False,
        bf16=False,
        use_cpu=True,
        logging_steps=1,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
    )
    trainer = SFTTrainer(
        model=model,
        args=config,
        train_dataset=load_dataset(
            "json",
            data_files=str(place / "chats.jsonl"),
            split="train",
            cache_dir=str(place / "hf"),
        ),
        processing_class=AutoTokenizer.from_pretrained(place / "base"),
    )
    trainer.train()
    return [log for log in trainer.state.log_history if "grad_norm" in log]


def ours(place: Path, **keys: Any) -> Path:
    """The same steps, each in several packed micro-batches; the run's folder."""
    return run(
        place,
        data=str(place / "chats.jsonl"),
        max_length=256,
        batch_size=12,
        micro_batch_tokens=160,
        max_steps=STEPS,
        learning_rate=RATE,
        lr_scheduler="cosine",
        warmup_steps=0,
        weight_decay=DECAY,
        max_grad_norm=CLIP,
        **keys,
    ).output_dir


def compare(folder: Path, logs: list[dict[str, float]]) -> None:
    """Every step's loss, gradient norm and learning rate."""
    assert len(logs) == STEPS
    for key, name in (("loss", "loss"), ("grad_norm", "grad_norm"), ("lr", "learning_rate")):
        assert series(folder, key) == pytest.approx([log[name] for log in logs], rel=1e-4), key
    # The comparison means something: clipping bites, and what was learned is far from nothing.
    assert max(series(folder, "grad_norm")) > 2 * CLIP
    assert series(folder)[-1] < 0.95 * series(folder)[0]


def test_lora_takes_the_steps_of_trl_with_peft(place):
    model = PeftModel.from_pretrained(base(place), place / "start", is_trainable=True)
    logs = theirs(place, model)
    folder = ours(place, adapter=str(place / "start"))
    compare(folder, logs)
    ends = [
        m.eval()(PROMPT).logits
        for m in (PeftModel.from_pretrained(base(place), folder / "adapter"), model)
    ]
    torch.testing.assert_close(*ends, atol=1e-3, rtol=0)
    assert (ends[0] - base(place)(PROMPT).logits).abs().max() > 0.05


def test_full_takes_the_steps_of_trl(place):
    model = base(place)
    logs = theirs(place, model)
    folder = ours(place, method="full")
    compare(folder, logs)
    # The product is in the checkpoint's own dtype, fp32 here, so it can be compared.
    state = load_file(folder / "model" / "model.safetensors")
    end = model.state_dict()
    for name, tensor in state.items():
        torch.testing.assert_close(
            tensor, end[name], atol=1e-3, rtol=0, msg=lambda m, n=name: f"{n}: {m}"
        )
