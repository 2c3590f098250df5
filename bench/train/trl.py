"""TRL's SFTTrainer as people run it: with PEFT, with bitsandbytes, with Liger, with Unsloth in front.

Padded batches, or packed (strategy bfd, which keeps documents apart through position ids). The
attention is flash-attn's where it is installed, which is what TRL recommends with packing, else
torch's. A callback drives the clock and asks for a loss in the first and last steps alone, so that
logging costs nothing in between. Real tokens are counted on the host from the data set the trainer
made.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench.train.job import Job

PACK = 16384  # tokens of a pack where nothing else is said, as fastsft's largest micro-batch
TARGETS = "q_proj k_proj v_proj o_proj gate_proj up_proj down_proj".split()


def _attention() -> str:
    found = importlib.util.find_spec("flash_attn")
    return "flash_attention_2" if found else "sdpa"


def _dtype() -> Any:
    import torch

    return torch.bfloat16 if torch.cuda.is_available() else torch.float32


def base_model(job: Job) -> tuple[Any, Any]:
    """(model, PEFT config or None); full fine-tuning keeps fp32 weights, as fastsft does."""
    import torch
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    options: dict[str, Any] = {"dtype": torch.float32 if job.method == "full" else _dtype()}
    if job.method == "qlora":
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=_dtype(),
        )
    if torch.cuda.is_available():
        options["device_map"] = {"": 0}
    model = AutoModelForCausalLM.from_pretrained(
        job.model, attn_implementation=_attention(), **options
    )
    if job.method == "full":
        return model, None
    return model, LoraConfig(r=job.rank, lora_alpha=job.alpha, target_modules=TARGETS)


def _unsloth_model(job: Job, longest: int) -> tuple[Any, Any]:
    from unsloth import FastLanguageModel

    model, _ = FastLanguageModel.from_pretrained(
        model_name=job.model,
        max_seq_length=longest,
        dtype=_dtype(),
        load_in_4bit=job.method == "qlora",
        full_finetuning=job.method == "full",
    )
    if job.method == "full":
        return model, None
    model = FastLanguageModel.get_peft_model(
        model,
        r=job.rank,
        lora_alpha=job.alpha,
        target_modules=TARGETS,
        use_gradient_checkpointing="unsloth" if job.checkpointing else False,
        random_state=job.seed,
        max_seq_length=longest,
    )
    return model, None


def _settings(job: Job, pack: int, rows_a_step: int) -> dict[str, Any]:
    """SFTConfig's arguments."""
    import torch

    on_gpu = torch.cuda.is_available()
    at_once = 1 if pack else min(job.peer_rows, rows_a_step)
    return {
        "output_dir": str(Path(job.out) / "run"),
        "max_length": pack or job.longest,
        "packing": bool(pack),
        "per_device_train_batch_size": at_once,
        "gradient_accumulation_steps": max(1, rows_a_step // at_once),
        "max_steps": job.steps,
        "learning_rate": job.learning_rate,
        "lr_scheduler_type": "constant",
        "weight_decay": 0.0,
        "train_sampling_strategy": "sequential",
        "gradient_checkpointing": job.checkpointing,
        "bf16": on_gpu,
        "use_cpu": not on_gpu,
        "use_liger_kernel": bool(job.options.get("liger")),
        "logging_strategy": "no",
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        "seed": job.seed,
        "dataset_num_proc": None,
    }


def _trainer(job: Job, columns: dict[str, list[Any]], settings: dict[str, Any]) -> Any:
    """The trainer over rows given as columns of lists."""
    unsloth = job.options.get("unsloth")
    if unsloth:
        importlib.import_module("unsloth")  # before transformers, or it replaces less
    import torch
    from datasets import Dataset
    from transformers import AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    torch.manual_seed(job.seed)
    longest = settings["max_length"]
    model, peft_config = _unsloth_model(job, longest) if unsloth else base_model(job)
    return SFTTrainer(
        model=model,
        args=SFTConfig(**settings),
        train_dataset=Dataset.from_dict(columns),
        processing_class=AutoTokenizer.from_pretrained(job.model),
        peft_config=peft_config,
    )


def _columns(rows: Any) -> dict[str, list[Any]]:
    found: dict[str, list[Any]] = {"input_ids": [], "labels": []}
    for i in range(len(rows)):
        ids, trained = rows[i]
        found["input_ids"].append(ids.tolist())
        found["labels"].append([int(t) if m else -100 for t, m in zip(ids, trained, strict=True)])
    return found


def packs(rows: Any, batch: int, limit: int) -> tuple[int, int]:
    """(tokens of a pack, packs a step): about the tokens of `batch` rows a step, in equal parts."""
    tokens = batch * float(rows.lengths.mean())
    parts = max(1, -(-int(tokens) // limit))
    size = max(int(rows.lengths.max()), -(-int(tokens) // parts))
    return size, max(1, round(tokens / size))


def train(job: Job) -> dict[str, Any]:
    """The whole job through `SFTTrainer.train`."""
    if job.options.get("unsloth"):
        importlib.import_module("unsloth")
    from bench.train.clock import Clock
    from bench.train.workloads import Rows

    rows = Rows.load(Path(job.rows))
    pack, a_step = 0, job.batch
    if job.options.get("packing"):
        pack, a_step = packs(rows, job.batch, job.micro_tokens or PACK)
    trainer = _trainer(job, _columns(rows), _settings(job, pack, a_step))
    clock = Clock(job)
    losses = _follow(trainer, clock, job)
    trainer.train()
    tokens, trained = counts(trainer.train_dataset, a_step, job.steps)
    model = trainer.model
    return {
        **clock.result(),
        "tokens": tokens,
        "trained": trained,
        "losses": losses,
        "note": describe(job, pack, str(getattr(model.config, "_attn_implementation", ""))),
    }


def describe(job: Job, pack: int, attention: str) -> str:
    parts = [f"packs of {pack:,} tokens" if pack else f"{job.peer_rows} padded rows at once"]
    parts += [
        f"{attention} attention",
        "checkpointing" if job.checkpointing else "no checkpointing",
    ]
    return ", ".join(parts)


def _follow(trainer: Any, clock: Any, job: Job) -> list[float]:
    """Puts the clock into the trainer; the list fills with its losses."""
    from transformers import TrainerCallback

    losses: list[float] = []
    wanted = range(1, job.steps + 1) if job.every_loss else (1, job.steps - 1, job.steps)

    class Follow(TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            clock.begin()

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            clock.step()
            control.should_log = state.global_step in wanted

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
            if logs and "loss" in logs:
                losses.append(float(logs["loss"]))

    trainer.add_callback(Follow())
    return losses


def counts(dataset: Any, rows_a_step: int, steps: int) -> tuple[list[int], list[int]]:
    """(real tokens, trained tokens) of each step, the data set taken in order, round and round."""
    sizes: list[tuple[int, int]] = []
    for row in dataset:
        ids, labels = row["input_ids"], row.get("labels") or row["input_ids"]
        trained, at = 0, 0
        for length in row.get("seq_lengths") or [len(ids)]:
            trained += sum(label != -100 for label in labels[at + 1 : at + length])
            at += length
        sizes.append((len(ids), trained))
    found = []
    for step in range(steps):
        part = [sizes[i % len(sizes)] for i in range(step * rows_a_step, (step + 1) * rows_a_step)]
        found.append((sum(t for t, _ in part), sum(t for _, t in part)))
    return [t for t, _ in found], [t for _, t in found]


def probe(job: Job) -> Callable[[int], None]:
    """A step of one document through the trainer's own `training_step` and optimizer."""
    columns = {"input_ids": [[3, 4, 5, 6]] * 4, "labels": [[3, 4, 5, 6]] * 4}
    trainer = _trainer(job, columns, _settings(job, 0, 1))
    import torch

    model, optimizer = trainer.accelerator.prepare(trainer.model, trainer.create_optimizer())
    device = next(model.parameters()).device
    model.train()

    def step(tokens: int) -> None:
        optimizer.zero_grad(set_to_none=True)
        ids = torch.arange(tokens, device=device)[None] % 1000 + 3
        inputs = {"input_ids": ids, "labels": ids, "attention_mask": torch.ones_like(ids)}
        trainer.training_step(model, inputs, torch.tensor(tokens - 1, device=device))
        torch.nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], 1.0)
        optimizer.step()

    return step
